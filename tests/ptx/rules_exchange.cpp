// Rules of what lanes of a warp do together: shuffles, votes and bar.warp.sync. The loop that runs a warp calls these
// handlers when all lanes of the mask (operand c) have arrived; they are the active ones then.
#include <bit>

#include "tests/ptx/handlers.h"

namespace ptx {

namespace {

enum Shuffle : uint8_t { up, down, butterfly, index };

// The source lane's value, where it lies in the segment; else the lane's own, and a false predicate.
template <Shuffle kind>
void shuffle(Warp& w, const Instruction& i) {
  const uint32_t* value = lanes_of<uint32_t>(w, i.a);
  const uint32_t* offset = lanes_of<uint32_t>(w, i.b);
  const uint32_t* clamp = lanes_of<uint32_t>(w, i.vector[0]);
  const uint32_t active = w.active;
  int source[lanes];
  uint32_t result[lanes], inside = 0, without = 0;
  PTX_EACH_LANE {
    const int by = int(offset[lane] & 31), segment = int(clamp[lane] >> 8 & 31), last = int(clamp[lane] & 31);
    const int highest = (lane & segment) | (last & ~segment), lowest = lane & segment;
    const int wanted = kind == up          ? lane - by
                       : kind == down      ? lane + by
                       : kind == butterfly ? lane ^ by
                                           : lowest | (by & ~segment);
    const bool in = kind == up ? wanted >= highest : wanted <= highest;
    source[lane] = in ? wanted : lane;
    inside |= uint32_t(in) << lane;
  }
  PTX_EACH_LANE {
    result[lane] = value[source[lane]];
    without |= (~active >> source[lane] & 1) << lane;
  }
  without &= active;
  if (without) {
    const int lane = std::countr_zero(without);
    fail(w, i, lane, "a shuffle from lane " + std::to_string(source[lane]) + ", which takes no part in it");
  }
  uint32_t* d = lanes_of<uint32_t>(w, i.d);
  PTX_EACH_LANE d[lane] = has_lane(active, lane) ? result[lane] : d[lane];
  if (i.flag) {
    uint32_t& p = predicate_of(w, i.e);
    p = (p & ~active) | (inside & active);
  }
}

void shfl(Builder& b) {
  Instruction& i = b.instruction;
  b.need("sync");
  i.kind = b.has("up") ? up : b.has("down") ? down : b.has("bfly") ? butterfly : index;
  if (i.kind == index) b.need("idx");
  b.need("b32");
  const Type word{'b', 32};
  i.flag = b.destination_and_predicate(i.d, word, i.e);
  b.source(i.a, word);
  b.source(i.b, word);
  b.source(i.vector[0], word);
  b.source(i.c, word);
  i.flow = Flow::meeting;
  i.cost = Class::exchange;
  constexpr Handler handlers[] = {shuffle<up>, shuffle<down>, shuffle<butterfly>, shuffle<index>};
  i.handler = handlers[i.kind];
}

enum Vote : uint8_t { ballot, any, all, uniform };

void vote_of(Warp& w, const Instruction& i) {
  const uint32_t p = predicate_of(w, i.a), yes = (i.flag ? ~p : p) & w.active;
  if (i.kind == ballot) {
    uint32_t* d = lanes_of<uint32_t>(w, i.d);
    PTX_EACH_LANE d[lane] = has_lane(w.active, lane) ? yes : d[lane];
    return;
  }
  const bool result = i.kind == any ? yes != 0 : i.kind == all ? yes == w.active : yes == 0 || yes == w.active;
  uint32_t& d = predicate_of(w, i.d);
  d = (d & ~w.active) | (result ? w.active : 0);
}

void vote(Builder& b) {
  Instruction& i = b.instruction;
  b.need("sync");
  i.kind = b.has("ballot") ? ballot : b.has("any") ? any : b.has("all") ? all : uniform;
  if (i.kind == uniform) b.need("uni");
  const Type t = b.type();
  if (t.is_predicate() == (i.kind == ballot)) b.refuse("a result of another type");
  b.destination(i.d, t);
  b.guarded_source(i.a);
  b.source(i.c, {'b', 32});
  i.flow = Flow::meeting;
  i.cost = Class::exchange;
  i.handler = vote_of;
}

// The lanes of the mask that hold the same value.
template <class T>
void match_any(Warp& w, const Instruction& i) {
  const Stored<T>* value = lanes_of<T>(w, i.a);
  uint32_t* d = lanes_of<uint32_t>(w, i.d);
  for (int lane = 0; lane < lanes; lane++) {
    if (!has_lane(w.active, lane)) continue;
    uint32_t same = 0;
    for (int other = 0; other < lanes; other++)
      same |= uint32_t(has_lane(w.active, other) && value[other] == value[lane]) << other;
    d[lane] = same;
  }
}

void match(Builder& b) {
  Instruction& i = b.instruction;
  b.need("any");
  b.need("sync");
  const Type t = b.type();
  b.destination(i.d, {'b', 32});
  b.source(i.a, t);
  b.source(i.c, {'b', 32});
  i.flow = Flow::meeting;
  i.cost = Class::exchange;
  i.handler = for_bits(b, t, []<class T>() { return Handler(match_any<T>); });
}

// A reduction of integers over the lanes of the mask.
template <class T, class F>
void reduce(Warp& w, const Instruction& i) {
  const Stored<T>* value = lanes_of<T>(w, i.a);
  const int first = std::countr_zero(w.active);
  T result = T(value[first]);
  for (int lane = first + 1; lane < lanes; lane++)
    if (has_lane(w.active, lane)) result = F{}(result, T(value[lane]));
  Stored<T>* d = lanes_of<T>(w, i.d);
  for (int lane = 0; lane < lanes; lane++)
    if (has_lane(w.active, lane)) d[lane] = widened(result);
}

template <class T>
Handler reduction(Builder& b) {
  const auto make = []<class F>(F) -> Handler { return reduce<T, F>; };
  if (b.has("add")) return make([](T x, T y) { return T(x + y); });
  if (b.has("min")) return make([](T x, T y) { return x < y ? x : y; });
  if (b.has("max")) return make([](T x, T y) { return x > y ? x : y; });
  if (b.has("and")) return make([](T x, T y) { return T(x & y); });
  if (b.has("or")) return make([](T x, T y) { return T(x | y); });
  if (b.has("xor")) return make([](T x, T y) { return T(x ^ y); });
  b.refuse("this reduction is not known");
}

void redux(Builder& b) {
  Instruction& i = b.instruction;
  b.need("sync");
  const Type t = b.type();
  if (t.bits != 32) b.refuse("only for 32 bits");
  b.destination(i.d, t);
  b.source(i.a, t);
  b.source(i.c, {'b', 32});
  i.flow = Flow::meeting;
  i.cost = Class::exchange;
  i.handler = for_integer(b, t, [&]<class T>() { return reduction<T>(b); });
}

void activemask(Builder& b) {
  Instruction& i = b.instruction;
  b.need("b32");
  b.destination(i.d, {'b', 32});
  i.handler = [](Warp& w, const Instruction& i) {
    uint32_t* d = lanes_of<uint32_t>(w, i.d);
    for (int lane = 0; lane < lanes; lane++)
      if (has_lane(w.active, lane)) d[lane] = w.active;
  };
}

}  // namespace

const Rules& exchange_rules() {
  static const Rules rules{
      {"shfl", shfl}, {"vote", vote}, {"match", match}, {"redux", redux}, {"activemask", activemask}};
  return rules;
}

}  // namespace ptx
