// What the files last_layer*.cu share, and nobody else includes. All sums of a warp run over its lanes in one order, so
// every run gives the same bits.
#pragma once
#include <cmath>
#include <limits>

#include "kernels/last_layer.h"

namespace baton {

namespace {  // a copy in each file

template <class Real>
__device__ __forceinline__ Real largest_of_warp(Real v) {
  SIMT_UNROLL
  for (int bit = simt::warp_size / 2; bit > 0; bit /= 2) {
    const Real other = __shfl_xor_sync(~0u, v, bit);
    v = other > v ? other : v;
  }
  return v;
}
__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return ::exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return ::log(x); }
__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return ::sqrt(x); }
template <class Real>
__device__ __forceinline__ bool finite(Real x) {
  return x - x == Real(0);
}

template <class Real>
__device__ __forceinline__ Real largest(const Real* x, int n) {
  Real top = -INFINITY;
  for (int c = simt::lane_id(); c < n; c += simt::warp_size) top = x[c] > top ? x[c] : top;
  return largest_of_warp(top);
}

// p = softmax(x); returns ln sum exp(x - top), top = max x. A lane writes the elements that it read. p may be x.
template <class Real>
__device__ __forceinline__ Real softmax_row(Real* p, const Real* x, Real top, int n) {
  Real sum = 0;
  for (int c = simt::lane_id(); c < n; c += simt::warp_size) {
    const Real e = exponential(x[c] - top);
    p[c] = e;
    sum += e;
  }
  sum = simt::warp_sum(sum);
  for (int c = simt::lane_id(); c < n; c += simt::warp_size) p[c] /= sum;
  return logarithm(sum);
}
template <class Real>
__device__ __forceinline__ void softmax_row(Real* p, const Real* x, int n) {
  softmax_row(p, x, largest(x, n), n);
}

// Throws InputError unless `fine`.
inline void check(bool fine, const char* who, const std::string& what) {
  if (!fine) throw InputError(std::string(who) + ": " + what);
}
inline std::string shape(int n, int d) { return "[" + std::to_string(n) + "][" + std::to_string(d) + "]"; }

}  // namespace

}  // namespace baton
