// Rules of arithmetic: integers and floating-point numbers.
#include <bit>
#include <cfenv>
#include <cmath>
#include <limits>

#include "tests/ptx/handlers.h"

// glibc's libmvec has vector versions of these; its headers only say so under -ffast-math.
extern "C" {
#pragma omp declare simd notinbranch
double exp2(double) noexcept;
#pragma omp declare simd notinbranch
double log2(double) noexcept;
#pragma omp declare simd notinbranch
double sin(double) noexcept;
#pragma omp declare simd notinbranch
double cos(double) noexcept;
}

namespace ptx {

namespace {

// Twice as wide, with the same sign.
template <class T>
struct DoubledType;
template <>
struct DoubledType<uint8_t> {
  using type = uint16_t;
};
template <>
struct DoubledType<int8_t> {
  using type = int16_t;
};
template <>
struct DoubledType<uint16_t> {
  using type = uint32_t;
};
template <>
struct DoubledType<int16_t> {
  using type = int32_t;
};
template <>
struct DoubledType<uint32_t> {
  using type = uint64_t;
};
template <>
struct DoubledType<int32_t> {
  using type = int64_t;
};
template <>
struct DoubledType<uint64_t> {
  using type = unsigned __int128;
};
template <>
struct DoubledType<int64_t> {
  using type = __int128;
};
template <class T>
using Doubled = typename DoubledType<T>::type;

Type doubled(Type t) { return {t.kind, 2 * t.bits}; }

float flush(float x) {  // subnormal numbers to zero, as .ftz asks
  return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.f, x) : x;
}

// Of two numbers the smaller, -0 before 0; a NaN loses against a number.
template <class T>
T least(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (a == b) return std::signbit(a) ? a : b;
    if (a != a) return b;
    return b < a ? b : a;
  } else {
    return b < a ? b : a;
  }
}
template <class T>
T greatest(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    if (a == b) return std::signbit(a) ? b : a;
    if (a != a) return b;
    return b > a ? b : a;
  } else {
    return b > a ? b : a;
  }
}

// A fused product and sum in another direction than the nearest. The lanes that are not active must not be computed
// with exceptions in mind: none are enabled.
template <class T, int direction>
void fma_rounded(Warp& w, const Instruction& i) {
  const int before = std::fegetround();
  std::fesetround(direction);
  Stored<T>* d = lanes_of<T>(w, i.d);
  for (int lane = 0; lane < lanes; lane++)
    if (has_lane(w.active, lane)) {
      volatile T a = lanes_of<T>(w, i.a)[lane], b = lanes_of<T>(w, i.b)[lane], c = lanes_of<T>(w, i.c)[lane];
      d[lane] = std::fma(T(a), T(b), T(c));
    }
  std::fesetround(before);
}

// Takes the operands of d = f(a, b).
void take_binary(Builder& b, Type t) {
  b.destination(b.instruction.d, t);
  b.source(b.instruction.a, t);
  b.source(b.instruction.b, t);
}
void take_unary(Builder& b, Type t) {
  b.destination(b.instruction.d, t);
  b.source(b.instruction.a, t);
}

Class cost_of(Type t) {
  if (t.is_float()) return t.bits == 64 ? Class::float64 : Class::float32;
  return t.bits == 64 ? Class::integer64 : Class::integer;
}

// The round-to-nearest that every sum and product has unless it says otherwise. `full` operations on float64 must say
// it.
void take_nearest(Builder& b) { b.has("rn"); }

void add(Builder& b) {
  take_nearest(b);
  const Type t = b.type();
  take_binary(b, t);
  b.instruction.cost = cost_of(t);
  if (t.is_float())
    b.instruction.handler = for_float(b, t, []<class T>() { return binary<T, T, T>([](T x, T y) { return x + y; }); });
  else
    b.instruction.handler =
        for_bits(b, t, []<class T>() { return binary<T, T, T>([](T x, T y) { return T(x + y); }); });
}

void sub(Builder& b) {
  take_nearest(b);
  const Type t = b.type();
  take_binary(b, t);
  b.instruction.cost = cost_of(t);
  if (t.is_float())
    b.instruction.handler = for_float(b, t, []<class T>() { return binary<T, T, T>([](T x, T y) { return x - y; }); });
  else
    b.instruction.handler =
        for_bits(b, t, []<class T>() { return binary<T, T, T>([](T x, T y) { return T(x - y); }); });
}

// The lower or the upper half of a product of integers, or all of it (wide).
void mul(Builder& b) {
  Instruction& i = b.instruction;
  take_nearest(b);
  const bool high = b.has("hi"), wide = b.has("wide");
  b.has("lo");
  const Type t = b.type();
  i.cost = cost_of(t);
  if (wide) {
    b.destination(i.d, doubled(t));
    b.source(i.a, t);
    b.source(i.b, t);
    i.handler = for_integer(b, t, []<class T>() -> Handler {
      if constexpr (sizeof(T) <= 4)
        return binary<Doubled<T>, T, T>([](T x, T y) { return Doubled<T>(Doubled<T>(x) * Doubled<T>(y)); });
      else return nullptr;
    });
    if (!i.handler) b.refuse("not for this type");
    return;
  }
  take_binary(b, t);
  if (t.is_float()) {
    i.handler = for_float(b, t, []<class T>() { return binary<T, T, T>([](T x, T y) { return x * y; }); });
  } else if (high) {
    i.handler = for_integer(b, t, []<class T>() {
      return binary<T, T, T>([](T x, T y) { return T((Doubled<T>(x) * Doubled<T>(y)) >> (8 * sizeof(T))); });
    });
  } else {
    i.handler = for_bits(b, t, []<class T>() { return binary<T, T, T>([](T x, T y) { return T(uint64_t(x) * y); }); });
  }
}

// d = a * b + c of integers.
void mad(Builder& b) {
  Instruction& i = b.instruction;
  const bool high = b.has("hi"), wide = b.has("wide");
  b.has("lo");
  const Type t = b.type();
  i.cost = cost_of(t);
  b.destination(i.d, wide ? doubled(t) : t);
  b.source(i.a, t);
  b.source(i.b, t);
  b.source(i.c, wide ? doubled(t) : t);
  if (t.is_float()) b.refuse("mad of floating-point numbers is not rounded as fma");
  if (wide) {
    i.handler = for_integer(b, t, []<class T>() -> Handler {
      using W = Doubled<T>;
      if constexpr (sizeof(T) <= 4)
        return ternary<W, T, T, W>([](T x, T y, W z) { return W(uint64_t(W(x) * W(y)) + uint64_t(z)); });
      else return nullptr;
    });
    if (!i.handler) b.refuse("not for this type");
  } else if (high) {
    i.handler = for_integer(b, t, []<class T>() {
      return ternary<T, T, T, T>(
          [](T x, T y, T z) { return T(T((Doubled<T>(x) * Doubled<T>(y)) >> (8 * sizeof(T))) + z); });
    });
  } else {
    i.handler = for_bits(
        b, t, []<class T>() { return ternary<T, T, T, T>([](T x, T y, T z) { return T(uint64_t(x) * y + z); }); });
  }
}

void fma(Builder& b) {
  Instruction& i = b.instruction;
  const bool down = b.has("rm"), up = b.has("rp"), zero = b.has("rz");
  if (!down && !up && !zero) b.need("rn");
  const Type t = b.type();
  i.cost = cost_of(t);
  take_binary(b, t);
  b.source(i.c, t);
  if (down) i.handler = for_float(b, t, []<class T>() { return Handler(fma_rounded<T, FE_DOWNWARD>); });
  else if (up) i.handler = for_float(b, t, []<class T>() { return Handler(fma_rounded<T, FE_UPWARD>); });
  else if (zero) i.handler = for_float(b, t, []<class T>() { return Handler(fma_rounded<T, FE_TOWARDZERO>); });
  else
    i.handler =
        for_float(b, t, []<class T>() { return ternary<T, T, T, T>([](T x, T y, T z) { return std::fma(x, y, z); }); });
}

// Integers: division by zero gives all bits, as the chip does; float: correctly rounded, or with 2 units of error
// (full, approx), for which the correctly rounded quotient is taken.
void div(Builder& b) {
  Instruction& i = b.instruction;
  const bool rounded = b.has("rn"), full = b.has("full"), approximate = b.has("approx");
  const bool flushes = b.has("ftz");
  const Type t = b.type();
  take_binary(b, t);
  if (!t.is_float()) {
    i.cost = Class::division;
    i.handler = for_integer(b, t, []<class T>() {
      return binary<T, T, T>([](T x, T y) -> T {
        if (y == 0) return T(-1);
        if (std::is_signed_v<T> && y == T(-1)) return T(0 - uint64_t(x));  // the least number has no opposite
        return T(x / y);
      });
    });
    return;
  }
  if (rounded + full + approximate != 1) b.refuse("a division without a rounding");
  i.cost = !rounded ? Class::special : t.bits == 64 ? Class::exact64 : Class::exact32;
  if (flushes && t.bits == 32)
    i.handler = binary<float, float, float>([](float x, float y) { return flush(flush(x) / flush(y)); });
  else i.handler = for_float(b, t, []<class T>() { return binary<T, T, T>([](T x, T y) { return x / y; }); });
}

void rem(Builder& b) {
  const Type t = b.type();
  take_binary(b, t);
  b.instruction.cost = Class::division;
  b.instruction.handler = for_integer(b, t, []<class T>() {
    return binary<T, T, T>([](T x, T y) -> T {
      if (y == 0) return x;
      if (std::is_signed_v<T> && y == T(-1)) return 0;
      return T(x % y);
    });
  });
}

void neg(Builder& b) {
  const bool flushes = b.has("ftz");
  const Type t = b.type();
  take_unary(b, t);
  b.instruction.cost = cost_of(t);
  if (flushes) b.instruction.handler = unary<float, float>([](float x) { return -flush(x); });
  else if (t.is_float())
    b.instruction.handler = for_float(b, t, []<class T>() { return unary<T, T>([](T x) { return -x; }); });
  else b.instruction.handler = for_bits(b, t, []<class T>() { return unary<T, T>([](T x) { return T(0 - x); }); });
}

void abs(Builder& b) {
  const bool flushes = b.has("ftz");
  const Type t = b.type();
  take_unary(b, t);
  b.instruction.cost = cost_of(t);
  if (flushes) b.instruction.handler = unary<float, float>([](float x) { return std::fabs(flush(x)); });
  else if (t.is_float())
    b.instruction.handler = for_float(b, t, []<class T>() { return unary<T, T>([](T x) { return std::fabs(x); }); });
  else
    b.instruction.handler = for_integer(
        b, t, []<class T>() { return unary<T, T>([](T x) { return T(x < 0 ? 0 - uint64_t(x) : uint64_t(x)); }); });
}

void min(Builder& b) {
  const Type t = b.type();
  take_binary(b, t);
  b.instruction.cost = cost_of(t);
  if (t.is_float())
    b.instruction.handler =
        for_float(b, t, []<class T>() { return binary<T, T, T>([](T x, T y) { return least(x, y); }); });
  else
    b.instruction.handler =
        for_integer(b, t, []<class T>() { return binary<T, T, T>([](T x, T y) { return least(x, y); }); });
}

void max(Builder& b) {
  const Type t = b.type();
  take_binary(b, t);
  b.instruction.cost = cost_of(t);
  if (t.is_float())
    b.instruction.handler =
        for_float(b, t, []<class T>() { return binary<T, T, T>([](T x, T y) { return greatest(x, y); }); });
  else
    b.instruction.handler =
        for_integer(b, t, []<class T>() { return binary<T, T, T>([](T x, T y) { return greatest(x, y); }); });
}

void sqrt(Builder& b) {
  const bool rounded = b.has("rn"), approximate = b.has("approx"), flushes = b.has("ftz");
  if (rounded == approximate) b.refuse("a root without a rounding");
  const Type t = b.type();
  take_unary(b, t);
  b.instruction.cost = !rounded ? Class::special : t.bits == 64 ? Class::exact64 : Class::exact32;
  if (flushes) b.instruction.handler = unary<float, float>([](float x) { return std::sqrt(flush(x)); });
  else b.instruction.handler = for_float(b, t, []<class T>() { return unary<T, T>([](T x) { return std::sqrt(x); }); });
}

// 1 / x, correctly rounded (rn) or approximate. In float64 only the upper words of the approximate argument and result
// count: nvcc refines it by hand.
void rcp(Builder& b) {
  const bool rounded = b.has("rn"), approximate = b.has("approx"), flushes = b.has("ftz");
  if (rounded == approximate) b.refuse("a reciprocal without a rounding");
  const Type t = b.type();
  take_unary(b, t);
  b.instruction.cost = !rounded ? Class::special : t.bits == 64 ? Class::exact64 : Class::exact32;
  if (rounded) {
    if (flushes) b.refuse("rcp.rn.ftz");
    b.instruction.handler = for_float(b, t, []<class T>() { return unary<T, T>([](T x) { return T(1) / x; }); });
  } else if (t.bits == 32) {
    if (flushes) b.instruction.handler = unary<float, float>([](float x) { return flush(1.f / flush(x)); });
    else b.instruction.handler = unary<float, float>([](float x) { return 1.f / x; });
  } else {
    b.instruction.handler = unary<double, double>([](double x) {
      constexpr uint64_t upper = 0xffffffff00000000;
      const double coarse = std::bit_cast<double>(std::bit_cast<uint64_t>(x) & upper);
      return std::bit_cast<double>(std::bit_cast<uint64_t>(1.0 / coarse) & upper);
    });
  }
}

// The approximate functions of float32, here as near as a double makes them: the chip's last bits differ.
void take_approximate(Builder& b, bool& flushes) {
  b.need("approx");
  flushes = b.has("ftz");
  const Type t = b.type();
  if (!t.is_float() || t.bits != 32) b.refuse("only for .f32");
  take_unary(b, t);
  b.instruction.cost = Class::special;
}
void ex2(Builder& b) {
  bool flushes;
  take_approximate(b, flushes);
  if (flushes) b.instruction.handler = unary<float, float>([](float x) { return flush(float(::exp2(flush(x)))); });
  else b.instruction.handler = unary<float, float>([](float x) { return float(::exp2(double(x))); });
}
void lg2(Builder& b) {
  bool flushes;
  take_approximate(b, flushes);
  if (flushes) b.instruction.handler = unary<float, float>([](float x) { return float(::log2(flush(x))); });
  else b.instruction.handler = unary<float, float>([](float x) { return float(::log2(double(x))); });
}
void sine(Builder& b) {
  bool flushes;
  take_approximate(b, flushes);
  b.instruction.handler = unary<float, float>([](float x) { return float(::sin(double(x))); });
}
void cosine(Builder& b) {
  bool flushes;
  take_approximate(b, flushes);
  b.instruction.handler = unary<float, float>([](float x) { return float(::cos(double(x))); });
}
void tangent_hyperbolic(Builder& b) {
  bool flushes;
  take_approximate(b, flushes);
  b.instruction.handler = unary<float, float>([](float x) { return std::tanh(x); });
}
void rsqrt(Builder& b) {
  b.need("approx");
  const bool flushes = b.has("ftz");
  const Type t = b.type();
  take_unary(b, t);
  b.instruction.cost = Class::special;
  if (t.bits == 64) b.instruction.handler = unary<double, double>([](double x) { return 1 / std::sqrt(x); });
  else if (flushes)
    b.instruction.handler = unary<float, float>([](float x) { return float(1 / std::sqrt(double(flush(x)))); });
  else b.instruction.handler = unary<float, float>([](float x) { return float(1 / std::sqrt(double(x))); });
}

// The magnitude of b with the sign of a.
void copysign(Builder& b) {
  const Type t = b.type();
  take_binary(b, t);
  b.instruction.handler = for_float(b, t, []<class T>() {
    return binary<T, T, T>([](T sign, T magnitude) { return std::copysign(magnitude, sign); });
  });
}

}  // namespace

const Rules& arithmetic_rules() {
  static const Rules rules{
      {"add", add},     {"sub", sub},           {"mul", mul},
      {"mad", mad},     {"fma", fma},           {"div", div},
      {"rem", rem},     {"neg", neg},           {"abs", abs},
      {"min", min},     {"max", max},           {"sqrt", sqrt},
      {"rcp", rcp},     {"ex2", ex2},           {"lg2", lg2},
      {"sin", sine},    {"cos", cosine},        {"tanh", tangent_hyperbolic},
      {"rsqrt", rsqrt}, {"copysign", copysign},
  };
  return rules;
}

}  // namespace ptx
