// What local_reparam.cu and local_reparam_pool.cu share, and nobody else includes.
#pragma once
#include "kernels/local_reparam.h"

namespace baton {

namespace {  // a copy in each file

constexpr int plane_threads = 64;

// A pre-activation's variance. A product that should be 0 may come out below it, as a library's order of sums leaves
// errors of both signs: it counts as 0, or the square root would be NaN under a tiny bias variance. A NaN stays one,
// for it must reach the loss.
__device__ __forceinline__ float variance_with_bias(float v, float bias_variance) {
  return (v < 0.f ? 0.f : v) + bias_variance;
}

// Calls body<noisy, flag>() with the flags as constants.
template <class F>
inline void with_flags(bool noisy, bool flag, F body) {
  if (noisy && flag) body.template operator()<true, true>();
  if (noisy && !flag) body.template operator()<true, false>();
  if (!noisy && flag) body.template operator()<false, true>();
  if (!noisy && !flag) body.template operator()<false, false>();
}

// Throws InputError unless the shape is good.
inline void check_shape(const char* who, bool good) {
  if (!good)
    throw InputError(std::string(who) + ": every extent must be at least 1, and the pooling window where it is pooled");
}

}  // namespace

}  // namespace baton
