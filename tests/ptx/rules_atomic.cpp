// Rules of atomic operations: atom gives the old value back, red does not. Lanes act one after the other.
#include <algorithm>
#include <cstring>

#include "tests/ptx/access.h"
#include "tests/ptx/counters.h"

namespace ptx {

namespace {

template <class T, class F>
void update(Warp& w, const Instruction& i, const Addresses& at, char* memory) {
  constexpr F f{};
  for (int lane = 0; lane < lanes; lane++) {
    if (!has_lane(w.active, lane)) continue;
    T old;
    std::memcpy(&old, memory + at.of[lane], sizeof old);
    const T operand = T(lanes_of<T>(w, i.b)[lane]);
    const T second = i.flag ? T(lanes_of<T>(w, i.c)[lane]) : T();
    const T value = f(old, operand, second);
    std::memcpy(memory + at.of[lane], &value, sizeof value);
    lanes_of<T>(w, i.d)[lane] = widened(old);
  }
}

template <class T, class F>
void atomic(Warp& w, const Instruction& i) {
  Addresses a = addresses_of(w, i);
  const bool shared = i.space == Space::shared || (i.space == Space::generic && is_shared(w, i, a));
  if (shared) {
    if (w.counters) w.counters->count_shared(w, i, a);
    update<T, F>(w, i, check_shared(w, i, a, Access::atomic), w.block->shared.data());
  } else {
    if (w.counters) w.counters->count_global(w, i, a, true);
    update<T, F>(w, i, check_global(w, i, a, Access::atomic), DeviceMemory::instance().at(0));
  }
}

template <class T>
Handler operation(Builder& b) {
  const auto make = []<class F>(F) -> Handler { return atomic<T, F>; };
  if (b.has("add")) return make([](T old, T x, T) { return T(old + x); });
  if (b.has("min")) return make([](T old, T x, T) { return std::min(old, x); });
  if (b.has("max")) return make([](T old, T x, T) { return std::max(old, x); });
  if (b.has("exch")) return make([](T, T x, T) { return x; });
  if (b.has("cas")) return make([](T old, T expected, T x) { return old == expected ? x : old; });
  if constexpr (std::is_integral_v<T>) {
    if (b.has("and")) return make([](T old, T x, T) { return T(old & x); });
    if (b.has("or")) return make([](T old, T x, T) { return T(old | x); });
    if (b.has("xor")) return make([](T old, T x, T) { return T(old ^ x); });
    if (b.has("inc")) return make([](T old, T most, T) { return old >= most ? T(0) : T(old + 1); });
    if (b.has("dec")) return make([](T old, T most, T) { return old == 0 || old > most ? most : T(old - 1); });
  }
  b.refuse("this atomic operation is not known");
}

void take_atomic(Builder& b, bool gives_back) {
  Instruction& i = b.instruction;
  for (const char* hint : {"relaxed", "acquire", "release", "acq_rel", "cta", "gpu", "sys"}) b.has(hint);
  i.space = b.has("shared") || b.has("shared::cta") ? Space::shared : b.has("global") ? Space::global : Space::generic;
  const Type t = b.type();
  if (gives_back) b.destination(i.d, t);
  else b.unused_destination(i.d, t);
  b.address();
  b.source(i.b, t);
  i.flag = b.operands_left() > 0;  // compare and swap
  if (i.flag) b.source(i.c, t);
  i.bytes = uint8_t(t.bits / 8);
  i.cost = Class::atomic;
  i.handler = t.is_float() ? for_float(b, t, [&]<class T>() { return operation<T>(b); })
                           : for_integer(b, t, [&]<class T>() { return operation<T>(b); });
}

void atom(Builder& b) { take_atomic(b, true); }
void red(Builder& b) { take_atomic(b, false); }

}  // namespace

const Rules& atomic_rules() {
  static const Rules rules{{"atom", atom}, {"red", red}};
  return rules;
}

}  // namespace ptx
