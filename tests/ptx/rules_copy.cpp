// Rules of asynchronous copies from global to shared memory, and of the groups in which a thread waits for them.
#include <cstring>

#include "tests/ptx/access.h"
#include "tests/ptx/copies.h"
#include "tests/ptx/counters.h"

namespace ptx {

namespace {

// The source is read here; nobody sees it before the wait (copies.h). Operand b holds how many bytes each lane reads.
void copy(Warp& w, const Instruction& i) {
  const Addresses from = addresses_of(w, i), to = addresses_of(w, i.to);
  const uint32_t* bytes = lanes_of<uint32_t>(w, i.b);
  const uint32_t active = w.active;
  uint32_t reading = 0;
  for (int lane = 0; lane < lanes; lane++) {
    if (!has_lane(active, lane)) continue;
    if (bytes[lane] > i.bytes)
      fail(w, i, lane,
           "a copy that reads " + std::to_string(bytes[lane]) + " of " + std::to_string(i.bytes) + " bytes");
    reading |= uint32_t(bytes[lane] > 0) << lane;
  }
  if (w.counters) {
    w.counters->count_shared(w, i, to);
    w.active = reading;
    if (reading) w.counters->count_global(w, i, from, false);
    w.active = active;
  }
  const Addresses source = check_copied(w, i, from, bytes), offsets = check_shared(w, i, to, Access::store);
  for (int lane = 0; lane < lanes; lane++) {
    if (!has_lane(active, lane)) continue;
    char data[16] = {};
    if (bytes[lane] > 0) std::memcpy(data, DeviceMemory::instance().at(source.of[lane]), bytes[lane]);
    start_copy(w, i, lane, uint32_t(offsets.of[lane]), data);
  }
}

// cp.async.ca|cg.shared.global [to], [from], bytes [, bytes to read]; cp.async.commit_group; cp.async.wait_group n;
// cp.async.wait_all.
void cp(Builder& b) {
  Instruction& i = b.instruction;
  const Type word{'u', 32};
  b.need("async");
  if (b.has("commit_group")) {
    i.copying = Copying::commit;
    i.cost = Class::barrier;
    i.handler = [](Warp& w, const Instruction&) { commit_copies(w); };
    return;
  }
  const bool all = b.has("wait_all");
  if (all || b.has("wait_group")) {
    i.copying = Copying::wait;
    i.cost = Class::barrier;
    if (!all) i.address.displacement = std::stoi(b.text());
    i.handler = all ? Handler([](Warp& w, const Instruction&) { await_all_copies(w); })
                    : Handler([](Warp& w, const Instruction& i) { await_copies(w, uint32_t(i.address.displacement)); });
    return;
  }
  const bool past_l1 = b.has("cg");
  if (!past_l1) b.need("ca");
  if (!b.has("shared::cta")) b.need("shared");
  b.need("global");
  b.has("L2::128B");
  b.address(i.to);
  b.address();
  const std::string bytes = b.text();
  if (bytes != "16" && (past_l1 || (bytes != "4" && bytes != "8"))) b.refuse("a copy of " + bytes + " bytes");
  i.bytes = uint8_t(std::stoi(bytes));
  if (b.operands_left() > 0) b.source(i.b, word);
  else b.constant(i.b, i.bytes, word);
  i.copying = Copying::start;
  i.cost = Class::async_copy;
  i.handler = copy;
}

}  // namespace

const Rules& copy_rules() {
  static const Rules rules{{"cp", cp}};
  return rules;
}

}  // namespace ptx
