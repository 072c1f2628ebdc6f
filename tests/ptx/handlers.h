// Handlers made of a function of one lane: binary<float, float, float>([](float a, float b) { return a + b; }).
//
// With all lanes active the loop writes in place; with some, it computes all 32 and keeps the results of those: the
// function must therefore stand any value in a lane that is not active. Both loops become vector instructions.
#pragma once
#include <type_traits>
#include <utility>

#include "tests/ptx/rules.h"
#include "tests/ptx/warp.h"

namespace ptx {

#define PTX_EACH_LANE _Pragma("GCC ivdep") for (int lane = 0; lane < lanes; lane++)

// d = f(a) with one source, f(a, b) with two, f(a, b, c) with three.
template <class D, class A, class F>
void run_unary(Warp& w, const Instruction& i) {
  constexpr F f{};
  Stored<D>* d = lanes_of<D>(w, i.d);
  const Stored<A>* a = lanes_of<A>(w, i.a);
  if (w.active == ~0u) {
    PTX_EACH_LANE d[lane] = widened(D(f(A(a[lane]))));
  } else {
    Stored<D> result[lanes];
    PTX_EACH_LANE result[lane] = widened(D(f(A(a[lane]))));
    PTX_EACH_LANE d[lane] = has_lane(w.active, lane) ? result[lane] : d[lane];
  }
}
template <class D, class A, class B, class F>
void run_binary(Warp& w, const Instruction& i) {
  constexpr F f{};
  Stored<D>* d = lanes_of<D>(w, i.d);
  const Stored<A>* a = lanes_of<A>(w, i.a);
  const Stored<B>* b = lanes_of<B>(w, i.b);
  if (w.active == ~0u) {
    PTX_EACH_LANE d[lane] = widened(D(f(A(a[lane]), B(b[lane]))));
  } else {
    Stored<D> result[lanes];
    PTX_EACH_LANE result[lane] = widened(D(f(A(a[lane]), B(b[lane]))));
    PTX_EACH_LANE d[lane] = has_lane(w.active, lane) ? result[lane] : d[lane];
  }
}
template <class D, class A, class B, class C, class F>
void run_ternary(Warp& w, const Instruction& i) {
  constexpr F f{};
  Stored<D>* d = lanes_of<D>(w, i.d);
  const Stored<A>* a = lanes_of<A>(w, i.a);
  const Stored<B>* b = lanes_of<B>(w, i.b);
  const Stored<C>* c = lanes_of<C>(w, i.c);
  if (w.active == ~0u) {
    PTX_EACH_LANE d[lane] = widened(D(f(A(a[lane]), B(b[lane]), C(c[lane]))));
  } else {
    Stored<D> result[lanes];
    PTX_EACH_LANE result[lane] = widened(D(f(A(a[lane]), B(b[lane]), C(c[lane]))));
    PTX_EACH_LANE d[lane] = has_lane(w.active, lane) ? result[lane] : d[lane];
  }
}

// The first type is the result's, the others are the sources'. F is the type of a lambda without captures.
template <class D, class A, class F>
constexpr Handler unary(F) {
  return run_unary<D, A, F>;
}
template <class D, class A, class B, class F>
constexpr Handler binary(F) {
  return run_binary<D, A, B, F>;
}
template <class D, class A, class B, class C, class F>
constexpr Handler ternary(F) {
  return run_ternary<D, A, B, C, F>;
}

// Calls make.operator()<T>() with the C++ type for a PTX type.
template <class Make>
Handler for_integer(const Builder& b, Type t, Make make) {
  const bool s = t.is_signed();
  if (!t.is_float() && !t.is_predicate()) switch (t.bits) {
      case 8:
        return s ? make.template operator()<int8_t>() : make.template operator()<uint8_t>();
      case 16:
        return s ? make.template operator()<int16_t>() : make.template operator()<uint16_t>();
      case 32:
        return s ? make.template operator()<int32_t>() : make.template operator()<uint32_t>();
      case 64:
        return s ? make.template operator()<int64_t>() : make.template operator()<uint64_t>();
    }
  b.refuse("not for this type");
}
template <class Make>
Handler for_float(const Builder& b, Type t, Make make) {
  if (t.is_float() && t.bits == 32) return make.template operator()<float>();
  if (t.is_float() && t.bits == 64) return make.template operator()<double>();
  b.refuse("not for this type");
}
// For what only moves bits: one unsigned type a width.
template <class Make>
Handler for_bits(const Builder& b, Type t, Make make) {
  switch (t.bits) {
    case 8:
      return make.template operator()<uint8_t>();
    case 16:
      return make.template operator()<uint16_t>();
    case 32:
      return make.template operator()<uint32_t>();
    case 64:
      return make.template operator()<uint64_t>();
  }
  b.refuse("not for this type");
}

}  // namespace ptx
