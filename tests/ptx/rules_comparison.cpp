// Rules of comparisons and selections. A predicate is a word with a bit for each lane.
#include "tests/ptx/handlers.h"

namespace ptx {

namespace {

template <class T, class F>
void compare(Warp& w, const Instruction& i) {
  constexpr F f{};
  const Stored<T>*a = lanes_of<T>(w, i.a), *b = lanes_of<T>(w, i.b);
  uint32_t bits = 0;
  for (int lane = 0; lane < lanes; lane++) bits |= uint32_t(f(T(a[lane]), T(b[lane]))) << lane;
  uint32_t& d = predicate_of(w, i.d);
  d = (d & ~w.active) | (bits & w.active);
}

// Ordered comparisons of floating-point numbers are false when one of them is a NaN, those ending in u are true.
template <class T>
Handler comparison(Builder& b) {
  const auto make = []<class F>(F) -> Handler { return compare<T, F>; };
  constexpr bool real = std::is_floating_point_v<T>;
  if (b.has("eq")) return make([](T x, T y) { return x == y; });
  if (b.has("ne")) return make([](T x, T y) { return real ? x < y || x > y : x != y; });
  if (b.has("lt") || b.has("lo")) return make([](T x, T y) { return x < y; });
  if (b.has("le") || b.has("ls")) return make([](T x, T y) { return x <= y; });
  if (b.has("gt") || b.has("hi")) return make([](T x, T y) { return x > y; });
  if (b.has("ge") || b.has("hs")) return make([](T x, T y) { return x >= y; });
  if constexpr (real) {
    if (b.has("equ")) return make([](T x, T y) { return !(x < y || x > y); });
    if (b.has("neu")) return make([](T x, T y) { return !(x == y); });
    if (b.has("ltu")) return make([](T x, T y) { return !(x >= y); });
    if (b.has("leu")) return make([](T x, T y) { return !(x > y); });
    if (b.has("gtu")) return make([](T x, T y) { return !(x <= y); });
    if (b.has("geu")) return make([](T x, T y) { return !(x < y); });
    if (b.has("num")) return make([](T x, T y) { return x == x && y == y; });
    if (b.has("nan")) return make([](T x, T y) { return x != x || y != y; });
  }
  b.refuse("this comparison is not known");
}

void setp(Builder& b) {
  Instruction& i = b.instruction;
  const Type t = b.type();
  b.destination(i.d, {'p', 1});
  b.source(i.a, t);
  b.source(i.b, t);
  i.cost = t.bits != 64 ? Class::integer : t.is_float() ? Class::float64 : Class::integer64;
  i.handler = t.is_float() ? for_float(b, t, [&]<class T>() { return comparison<T>(b); })
                           : for_integer(b, t, [&]<class T>() { return comparison<T>(b); });
}

template <class T>
void select(Warp& w, const Instruction& i) {
  const uint32_t chosen = predicate_of(w, i.c), active = w.active;
  Stored<T>* d = lanes_of<T>(w, i.d);
  const Stored<T>*a = lanes_of<T>(w, i.a), *b = lanes_of<T>(w, i.b);
  PTX_EACH_LANE {
    const Stored<T> value = has_lane(chosen, lane) ? a[lane] : b[lane];
    d[lane] = has_lane(active, lane) ? value : d[lane];
  }
}

void selp(Builder& b) {
  Instruction& i = b.instruction;
  const Type t = b.type();
  b.destination(i.d, t);
  b.source(i.a, t);
  b.source(i.b, t);
  b.source(i.c, {'p', 1});
  if (t.bits == 64) i.cost = Class::integer64;
  i.handler = for_bits(b, t, []<class T>() { return Handler(select<T>); });
}

}  // namespace

const Rules& comparison_rules() {
  static const Rules rules{{"setp", setp}, {"selp", selp}};
  return rules;
}

}  // namespace ptx
