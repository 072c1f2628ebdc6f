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

// One pre-activation of mean m and variance v without the bias: its output, and the variance with the bias.
template <bool noisy, bool relu>
__device__ __forceinline__ void write_sample(const Signal& out, float* v, float mean, float variance_product,
                                             float bias_mean, float bias_variance, size_t i, float e) {
  float y = mean + bias_mean;
  if constexpr (noisy) {
    const float variance = variance_with_bias(variance_product, bias_variance);
    v[i] = variance;
    y += sqrtf(variance) * e;
  }
  if constexpr (relu) y = y < 0.f ? 0.f : y;  // a NaN stays one: it must reach the loss
  y = simt::as_operand(y, out.rounded);
  out.value[i] = y;
  if (out.square) out.square[i] = y * y;
}
// The same, where the means and variances lie in memory. m may be out.value: so it has no __restrict__.
template <bool noisy, bool relu>
__device__ __forceinline__ void sample_one(const Signal& out, const float* m, float* v, float bias_mean,
                                           float bias_variance, size_t i, float e) {
  write_sample<noisy, relu>(out, v, m[i], noisy ? v[i] : 0.f, bias_mean, bias_variance, i, e);
}

// A window of 2x2 pre-activations p, with standard deviations s and noise e already added to p: the output, the
// winner's place (4 where the ReLU cut it), and its slope dy/dv. Selects, not branches: random data would mispredict.
struct PooledWindow {
  float y, slope;
  int place;
};
template <bool noisy>
__device__ __forceinline__ PooledWindow pool_window(float p0, float p1, float p2, float p3, float s0, float s1,
                                                    float s2, float s3, float4 e, float bias_mean) {
  PooledWindow w{};
  const float top = p1 > p0 ? p1 : p0, low = p3 > p2 ? p3 : p2;
  const float best = (low > top ? low : top) + bias_mean;
  w.y = best < 0.f ? 0.f : best;  // a NaN stays one: it must reach the loss
  const int first = p1 > p0 ? 1 : 0, second = p3 > p2 ? 3 : 2, winner = low > top ? second : first;
  w.place = best > 0.f ? winner : 4;
  if constexpr (noisy) {
    const float sd_top = p1 > p0 ? s1 : s0, sd_low = p3 > p2 ? s3 : s2, sd = low > top ? sd_low : sd_top;
    const float e_top = p1 > p0 ? e.y : e.x, e_low = p3 > p2 ? e.w : e.z, noise = low > top ? e_low : e_top;
    const float h = 0.5f * noise / (sd > 1e-15f ? sd : 1.f);
    w.slope = sd > 1e-15f ? h : 0.f;
  }
  return w;
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
