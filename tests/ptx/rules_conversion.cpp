// Rules of moves and conversions.
#include <cfenv>
#include <cmath>
#include <cstring>
#include <limits>

#include "tests/ptx/device_memory.h"
#include "tests/ptx/handlers.h"

namespace ptx {

namespace {

// ---------------------------------------------------------------------------------------------------------- moves
// mov.b64 {low, high}, x and mov.b64 x, {low, high}; the same of b32 and 16-bit halves.
template <class Whole, class Half>
void split(Warp& w, const Instruction& i) {
  const Stored<Whole>* a = lanes_of<Whole>(w, i.a);
  for (int lane = 0; lane < lanes; lane++)
    if (has_lane(w.active, lane)) {
      const Whole x = Whole(a[lane]);
      lanes_of<Half>(w, i.vector[0])[lane] = Half(x);
      lanes_of<Half>(w, i.vector[1])[lane] = Half(x >> (8 * sizeof(Half)));
    }
}
template <class Whole, class Half>
void join(Warp& w, const Instruction& i) {
  Stored<Whole>* d = lanes_of<Whole>(w, i.d);
  for (int lane = 0; lane < lanes; lane++)
    if (has_lane(w.active, lane)) {
      const Half low = Half(lanes_of<Half>(w, i.vector[0])[lane]), high = Half(lanes_of<Half>(w, i.vector[1])[lane]);
      d[lane] = Whole(low) | Whole(high) << (8 * sizeof(Half));
    }
}

void move_predicate(Warp& w, const Instruction& i) {
  uint32_t& d = predicate_of(w, i.d);
  d = (d & ~w.active) | (predicate_of(w, i.a) & w.active);
}

void mov(Builder& b) {
  Instruction& i = b.instruction;
  const Type t = b.type();
  if (t.is_predicate()) {
    b.destination(i.d, t);
    b.source(i.a, t);
    i.handler = move_predicate;
    return;
  }
  const Type half{'b', t.bits / 2};
  if (b.next_is_vector()) {
    if (b.vector_destination(half) != 2) b.refuse("a move into other than two halves");
    b.source(i.a, t);
    if (t.bits == 64) i.handler = split<uint64_t, uint32_t>;
    else if (t.bits == 32) i.handler = split<uint32_t, uint16_t>;
    else b.refuse("not for this type");
    return;
  }
  b.destination(i.d, t);
  if (b.next_is_vector()) {
    if (b.vector_source(half) != 2) b.refuse("a move from other than two halves");
    if (t.bits == 64) i.handler = join<uint64_t, uint32_t>;
    else if (t.bits == 32) i.handler = join<uint32_t, uint16_t>;
    else b.refuse("not for this type");
    return;
  }
  b.source(i.a, t);
  if (t.bits == 64) i.cost = Class::integer64;
  i.handler = for_bits(b, t, []<class T>() { return unary<T, T>([](T x) { return x; }); });
}

// Global addresses are the same in the generic space; shared ones lie in a window of it.
void cvta(Builder& b) {
  Instruction& i = b.instruction;
  const bool to = b.has("to"), shared = b.has("shared");
  if (!shared) b.need("global");
  const Type t = b.type();
  if (t.bits != 64) b.refuse("only for .u64");
  b.destination(i.d, t);
  b.source(i.a, t);
  i.cost = Class::integer64;
  if (!shared) i.handler = unary<uint64_t, uint64_t>([](uint64_t x) { return x; });
  else if (to) i.handler = unary<uint64_t, uint64_t>([](uint64_t x) { return x - shared_window; });
  else i.handler = unary<uint64_t, uint64_t>([](uint64_t x) { return x + shared_window; });
}

// ---------------------------------------------------------------------------------------------------- conversions
enum Rounding { nearest, toward_zero, integer_nearest, integer_zero, integer_down, integer_up };

template <class T>
T to_integer(T x, Rounding r) {
  switch (r) {
    case integer_nearest:
      return std::nearbyint(x);
    case integer_zero:
      return std::trunc(x);
    case integer_down:
      return std::floor(x);
    case integer_up:
      return std::ceil(x);
    default:
      return x;
  }
}

template <class D, class S, Rounding rounding, bool saturates>
D convert(S s) {
  constexpr bool from_real = std::is_floating_point_v<S>, to_real = std::is_floating_point_v<D>;
  if constexpr (from_real && to_real) {
    D d = D(to_integer(s, rounding));
    if constexpr (saturates) d = d != d ? D(0) : d <= 0 ? D(0) : d > 1 ? D(1) : d;
    return d;
  } else if constexpr (from_real) {  // to an integer: a NaN is 0, what is too large is the nearest that there is
    if (s != s) return 0;
    const double x = to_integer(double(s), rounding == nearest ? integer_zero : rounding);
    constexpr D least = std::numeric_limits<D>::min(), most = std::numeric_limits<D>::max();
    return x <= double(least) ? least : x >= double(most) ? most : D(x);
  } else if constexpr (to_real) {
    return D(s);
  } else if constexpr (saturates) {
    const __int128 x = s, least = std::numeric_limits<D>::min(), most = std::numeric_limits<D>::max();
    return D(x < least ? least : x > most ? most : x);
  } else {
    return D(s);
  }
}

// A conversion to a narrower or less exact real number that is cut off.
template <class D, class S>
void convert_toward_zero(Warp& w, const Instruction& i) {
  const int before = std::fegetround();
  std::fesetround(FE_TOWARDZERO);
  for (int lane = 0; lane < lanes; lane++)
    if (has_lane(w.active, lane)) {
      volatile S s = S(lanes_of<S>(w, i.a)[lane]);
      lanes_of<D>(w, i.d)[lane] = widened(D(S(s)));
    }
  std::fesetround(before);
}

template <class D, class S>
Handler conversion(Builder& b) {
  constexpr bool to_real = std::is_floating_point_v<D>;
  const auto make = []<Rounding r, bool saturates>() {
    return unary<D, S>([](S s) { return convert<D, S, r, saturates>(s); });
  };
  if (b.has("sat")) {
    b.has("rn");
    return make.template operator()<nearest, true>();
  }
  if (b.has("rni")) return make.template operator()<integer_nearest, false>();
  if (b.has("rzi")) return make.template operator()<integer_zero, false>();
  if (b.has("rmi")) return make.template operator()<integer_down, false>();
  if (b.has("rpi")) return make.template operator()<integer_up, false>();
  if constexpr (to_real)
    if (b.has("rz")) return convert_toward_zero<D, S>;
  b.has("rn");
  return make.template operator()<nearest, false>();
}

template <class Make>
Handler for_any(const Builder& b, Type t, Make make) {
  return t.is_float() ? for_float(b, t, make) : for_integer(b, t, make);
}

void cvt(Builder& b) {
  Instruction& i = b.instruction;
  const Type to = b.type(), from = b.type();
  b.destination(i.d, to);
  b.source(i.a, from);
  i.cost = Class::conversion;
  if (!to.is_float() && !from.is_float())  // widened or narrowed
    i.cost = to.bits == 64 || from.bits == 64 ? Class::integer64 : Class::integer;
  i.handler =
      for_any(b, to, [&]<class D>() { return for_any(b, from, [&]<class S>() { return conversion<D, S>(b); }); });
}

}  // namespace

const Rules& conversion_rules() {
  static const Rules rules{{"mov", mov}, {"cvta", cvta}, {"cvt", cvt}};
  return rules;
}

}  // namespace ptx
