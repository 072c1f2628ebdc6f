// Rules of control: branches, exits, barriers of a block and fences. What they do, the loop that runs a warp does.
#include "tests/ptx/copies.h"
#include "tests/ptx/handlers.h"

namespace ptx {

namespace {

void nothing(Warp&, const Instruction&) {}

// The parser turns the label, which it takes itself, into the target.
void bra(Builder& b) {
  b.has("uni");
  b.instruction.flow = Flow::branch;
  b.instruction.cost = Class::control;
  b.instruction.handler = nothing;
}

void exit_(Builder& b) {
  b.instruction.flow = Flow::exit;
  b.instruction.cost = Class::control;
  b.instruction.handler = nothing;
}
void ret(Builder& b) {
  b.has("uni");
  exit_(b);
}

void trap(Builder& b) {
  b.instruction.cost = Class::control;
  b.instruction.handler = [](Warp& w, const Instruction& i) { fail(w, i, __builtin_ctz(w.active), "a trap"); };
}

// bar.sync id [, threads] and barrier.sync; bar.red.popc|and|or d, id [, threads], p; bar.warp.sync mask.
// Instruction::b holds the barrier's number, c the number of threads (parts 2 where it is given), kind the reduction.
void bar(Builder& b) {
  Instruction& i = b.instruction;
  const Type word{'b', 32};
  i.handler = nothing;
  i.cost = Class::barrier;
  if (b.has("warp")) {
    b.need("sync");
    b.source(i.c, word);
    i.flow = Flow::meeting;
    i.handler = [](Warp& w, const Instruction&) { show_copies(w, w.active); };
    return;
  }
  b.has("cta");
  b.has("aligned");
  i.flow = Flow::barrier;
  const bool reduces = b.has("red");
  if (!reduces) b.need("sync");
  if (reduces) {
    i.kind = b.has("popc") ? 1 : b.has("and") ? 2 : 3;
    if (i.kind == 3) b.need("or");
    const Type t = b.type();
    b.destination(i.d, t);
    b.source(i.b, word);
    if (b.operands_left() > 1) b.refuse("a reduction over a part of the block");
    b.guarded_source(i.a);
    return;
  }
  b.source(i.b, word);
  if (b.operands_left() > 0) {
    i.parts = 2;
    b.source(i.c, word);
  }
}

// One memory, in the order of the program: nothing is left to order.
void fence(Builder& b) {
  for (const char* word : {"sc", "acq_rel", "cta", "gpu", "sys", "gl", "proxy", "async"}) b.has(word);
  b.instruction.cost = Class::barrier;
  b.instruction.handler = nothing;
}
void nanosleep(Builder& b) {
  b.need("u32");
  b.source(b.instruction.a, {'u', 32});
  b.instruction.handler = nothing;
}

}  // namespace

const Rules& control_rules() {
  static const Rules rules{{"bra", bra},     {"ret", ret},      {"exit", exit_},  {"trap", trap},          {"bar", bar},
                           {"barrier", bar}, {"membar", fence}, {"fence", fence}, {"nanosleep", nanosleep}};
  return rules;
}

}  // namespace ptx
