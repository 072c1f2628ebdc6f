// Baselines over the flat store, elementwise: each array is read once and written once.
//
// point_update: with G = g + weight_decay w + 2 strength importance (w - centre),
//   SGD  m = momentum m + G, w -= lr m;   Adam as in kernels/adam.h;   path += g (what was subtracted from w).
// A weight takes 20 bytes and 6 FLOPs with SGD, 28 bytes and 18 FLOPs with Adam; the anchor adds 8 bytes and 4 FLOPs,
// the path 8 bytes and 2 FLOPs.
//
// bbb_update with the mixture prior: with the components' log densities at theta, l1 = ln(pi / s1) - theta^2 / (2 s1^2)
// and l2 = ln((1 - pi) / s2) - theta^2 / (2 s2^2), and d = l2 - l1,
//   s = -d ln P / d theta = theta (r1 / s1^2 + r2 / s2^2),   r2 = 1 / (1 + exp(-d)) = 1 - r1.
// With u = exp(-|d|) the likelier component has r = 1 / (1 + u) and the other u / (1 + u): nothing overflows for any d.
// d sd / d rho = 1 / (1 + exp(-rho)), which equals 1 - exp(-sd) without its cancellation for small sd. A pruned weight
// (sd = 0) has no gradient and stays where it is. A weight takes 48 bytes and 48 FLOPs with SGD, 64 bytes and 72 FLOPs
// with Adam. The mixture adds 78 FLOPs a draw, 60 of them for the noise, which is made by quads.
#include "kernels/baselines.h"

#include <cmath>

#include "kernels/adam.h"

namespace baton {

namespace {

constexpr int chunk = 1024, threads = 256;

struct Rates {
  Adam adam;
  float momentum;
};
__device__ __forceinline__ Rates rates_of(const StepState& s, float momentum) {
  return {{s.lr_mean, s.correction1, s.correction2}, momentum};
}

// Updates the optimizer's moments of parameter i and returns what to subtract from it.
template <PointRule rule>
__device__ __forceinline__ float step_of(const Rates& s, float* m, float* v, int i, float g) {
  float mi = m[i], step;
  if constexpr (rule == PointRule::adam) {
    float vi = v[i];
    step = s.adam.step(mi, vi, g);
    v[i] = vi;
  } else {
    mi = s.momentum * mi + g;
    step = s.adam.lr * mi;
  }
  m[i] = mi;
  return step;
}

// A block takes a chunk, so that the check for a halted state is outside the loop: masked stores are slow.
template <PointRule rule, bool anchored, bool with_path>
__global__ void point_kernel(PointArrays a, int count, PointSettings set, const StepState* states) {
  const int first = blockIdx.x * chunk, n = states[0].halted ? 0 : min(chunk, count - first);
  const Rates rates = rates_of(states[0], set.momentum);
  SIMT_SIMD()
  for (int at = threadIdx.x; at < n; at += blockDim.x) {
    const int i = first + at;
    const float w = a.weights[i], g = a.grad[i];
    float total = g + set.weight_decay * w;
    if constexpr (anchored) total += 2.f * set.strength * a.importance[i] * (w - a.centre[i]);
    const float step = step_of<rule>(rates, a.m, a.v, i, total);
    a.weights[i] = w - step;
    if constexpr (with_path) a.path[i] += g * step;  // not w - (w - step), which would lose digits
  }
}

// 28 bytes and 6 FLOPs a weight.
__global__ void consolidate_path_kernel(float* __restrict__ importance, float* __restrict__ centre,
                                        float* __restrict__ path, const float* __restrict__ weights, int count,
                                        float xi) {
  const int i = simt::thread_item();
  if (i >= count) return;
  const float w = weights[i], moved = w - centre[i], next = importance[i] + path[i] / (moved * moved + xi);
  importance[i] = next > 0.f ? next : 0.f;
  centre[i] = w;
  path[i] = 0;
}

// The centre is a weighted average, so that it is exact for a share of 0 or 1. 24 bytes and 7 FLOPs a weight.
__global__ void consolidate_fisher_kernel(float* __restrict__ importance, float* __restrict__ centre,
                                          const float* __restrict__ fisher, const float* __restrict__ weights,
                                          int count, float decay) {
  const int i = simt::thread_item();
  if (i >= count) return;
  const float old = decay * importance[i], sum = old + fisher[i], quotient = old / sum;
  const float share = sum > 0.f ? quotient : 0.f;
  importance[i] = sum;
  centre[i] = share * centre[i] + (1.f - share) * weights[i];
}

// ln(1 + u) for 0 <= u <= 1: 2 artanh(z), z = u / (2 + u) <= 1/3.
__device__ __forceinline__ float log_one_plus(float u) {
  const float z = u / (2.f + u), zz = z * z;
  float p = 2.f / 13;
  p = fmaf(p, zz, 2.f / 11);
  p = fmaf(p, zz, 2.f / 9);
  p = fmaf(p, zz, 2.f / 7);
  p = fmaf(p, zz, 2.f / 5);
  p = fmaf(p, zz, 2.f / 3);
  return fmaf(p * zz, z, 2.f * z);
}
__device__ __forceinline__ float softplus(float x) { return (x > 0.f ? x : 0.f) + log_one_plus(expf(-fabsf(x))); }

// The inverse of the softplus: ln(1 - exp(-y)) + y; for small y the logarithm of the series of exp(y) - 1.
__device__ __forceinline__ float inverse_softplus(float y) {
  float p = 1;
  for (int n = 8; n >= 2; n--) p = fmaf(p * y, 1.f / float(n), 1.f);
  const bool small = y < 0.5f;
  return logf(small ? y * p : 1.f - expf(-y)) + (small ? 0.f : y);
}

// Both may work in place, so neither pointer is __restrict__.
__global__ void rho_kernel(float* rho, const float* sd, int count) {
  const int i = simt::thread_item();
  if (i >= count) return;
  rho[i] = inverse_softplus(sd[i]);
}
__global__ void sd_kernel(float* sd, const float* rho, int count) {
  const int i = simt::thread_item();
  if (i >= count) return;
  sd[i] = softplus(rho[i]);
}

// The step of one weight; score = E[s] and noisy_score = E[s e] are the prior's gradients.
template <PointRule rule>
__device__ __forceinline__ void bbb_one(const BbbArrays& a, int i, const Rates& s, float scale, float kl_weight,
                                        float score, float noisy_score) {
  const float mean = a.mean[i], rho = a.rho[i], sd = a.sd[i];
  const bool alive = sd > 0.f;
  const float slope = 1.f / (1.f + expf(-rho));
  const float g_mean = a.moments.sum[i] * scale + kl_weight * score;
  const float g_sd = a.moments.noise[i] * scale + kl_weight * (noisy_score - 1.f / sd);
  const float mean_step = step_of<rule>(s, a.mean_m, a.mean_v, i, alive ? g_mean : 0.f);
  const float rho_step = step_of<rule>(s, a.rho_m, a.rho_v, i, alive ? g_sd * slope : 0.f);
  const float next = rho - rho_step, next_sd = softplus(next);
  a.mean[i] = alive ? mean - mean_step : mean;
  a.rho[i] = alive ? next : rho;
  a.sd[i] = alive ? next_sd : sd;
}

// The Gaussian prior, by the exact moments of the noise.
template <PointRule rule>
__global__ void bbb_gaussian_kernel(BbbArrays a, int count, BbbSettings set, float precision, const StepState* states) {
  const StepState& s = states[0];
  const int first = blockIdx.x * chunk, n = s.halted ? 0 : min(chunk, count - first);
  const Rates rates = rates_of(s, set.momentum);
  const float kl_weight = s.kl_now;
  SIMT_SIMD()
  for (int at = threadIdx.x; at < n; at += blockDim.x) {
    const int i = first + at;
    bbb_one<rule>(a, i, rates, set.gradient_scale, kl_weight, a.mean[i] * precision, a.sd[i] * precision);
  }
}

struct Mixture {
  float precision1, precision2;  // 1 / s1^2, 1 / s2^2
  float offset, slope;           // d = offset + slope theta^2
  // -87, below which vectors of expf are slow. It is no literal, which g++ would turn into an exp(-87) beside every
  // expf(-|d|).
  float least;
  __device__ __forceinline__ float score(float theta) const {
    const float d = offset + slope * (theta * theta), gap = -fabsf(d);
    const float u = expf(gap > least ? gap : least), likelier = 1.f / (1.f + u);
    const float r2 = likelier * (d > 0.f ? 1.f : u), r1 = likelier * (d > 0.f ? u : 1.f);
    return theta * (r1 * precision1 + r2 * precision2);
  }
};

template <PointRule rule>
__device__ __forceinline__ void bbb_piece(const BbbArrays& a, int first, int n, const Rates& rates, float scale,
                                          float kl_weight, const float* score, const float* noisy_score, float share) {
  SIMT_SIMD()
  for (int i = threadIdx.x; i < n; i += blockDim.x)
    bbb_one<rule>(a, first + i, rates, scale, kl_weight, score[i] * share, noisy_score[i] * share);
}

// A block takes a chunk of weights. A thread makes the noise of whole quads and leaves it in shared memory, so that
// memory is read and written by consecutive threads. No template: g++ cannot poison shared memory in one
// (kernels/README.md, rule 5).
__global__ void bbb_mixture_kernel(BbbArrays a, int count, BbbSettings set, Mixture prior, const StepState* states) {
  __shared__ float e[chunk], score[chunk], noisy_score[chunk];
  const StepState s = states[0];
  const int first = blockIdx.x * chunk, n = s.halted ? 0 : min(chunk, count - first);
  for (int i = threadIdx.x; i < n; i += blockDim.x) score[i] = noisy_score[i] = 0;
  for (int k = 0; k < set.draws; k++) {
    SIMT_SIMD()
    for (int q = threadIdx.x; q < (n + 3) / 4; q += blockDim.x) {
      const float4 of = normal4(s.noise, uint32_t(first / 4 + q), stream_weights, s.step, k);
      e[4 * q] = of.x, e[4 * q + 1] = of.y, e[4 * q + 2] = of.z, e[4 * q + 3] = of.w;
    }
    __syncthreads();
    SIMT_SIMD()
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      const float at = prior.score(a.mean[first + i] + a.sd[first + i] * e[i]);
      score[i] += at;
      noisy_score[i] += at * e[i];
    }
    __syncthreads();  // the next draw overwrites e
  }
  const Rates rates = rates_of(s, set.momentum);
  const float share = 1.f / float(set.draws);
  if (set.rule == PointRule::adam)
    bbb_piece<PointRule::adam>(a, first, n, rates, set.gradient_scale, s.kl_now, score, noisy_score, share);
  else bbb_piece<PointRule::sgd>(a, first, n, rates, set.gradient_scale, s.kl_now, score, noisy_score, share);
}

simt::Blocks pieces(int count) { return simt::blocks((count + chunk - 1) / chunk, threads); }

[[noreturn]] void refuse(const char* who, const std::string& what) { throw InputError(std::string(who) + ": " + what); }
void check_count(const char* who, int count) {
  if (count < 1) refuse(who, std::to_string(count) + " weights");
}
void check_settings(const BbbArrays& a, const BbbSettings& s) {
  const char* who = "bbb_update";
  const bool mixture = s.prior == BbbPrior::mixture;
  if (s.draws < 1) refuse(who, std::to_string(s.draws) + " draws");
  if (s.rule == PointRule::adam && !(a.mean_v && a.rho_v)) refuse(who, "Adam without its second moments");
  if (!(s.sd1 > 0)) refuse(who, "a prior whose sd is " + std::to_string(s.sd1));
  if (mixture && !(s.sd2 > 0)) refuse(who, "a prior whose second sd is " + std::to_string(s.sd2));
  if (mixture && !(s.weight1 >= 0 && s.weight1 <= 1))
    refuse(who, "a mixture with the weight " + std::to_string(s.weight1));
}

}  // namespace

void point_update(const PointArrays& a, int count, const PointSettings& set, const StepState* states, Stream stream) {
  BATON_RANGE("point_update");
  check_count("point_update", count);
  if (set.rule == PointRule::adam && !a.v) refuse("point_update", "Adam without its second moments");
  if (!a.importance != !a.centre) refuse("point_update", "an anchor needs both importance and centre");
  const auto with = [&]<PointRule rule, bool anchored, bool with_path>() {
    simt::launch<point_kernel<rule, anchored, with_path>>(pieces(count), stream, a, count, set, states);
  };
  const auto with_rule = [&]<PointRule rule>() {
    if (a.importance && a.path) with.template operator()<rule, true, true>();
    else if (a.importance) with.template operator()<rule, true, false>();
    else if (a.path) with.template operator()<rule, false, true>();
    else with.template operator()<rule, false, false>();
  };
  if (set.rule == PointRule::adam) with_rule.template operator()<PointRule::adam>();
  else with_rule.template operator()<PointRule::sgd>();
}

void consolidate_path(float* importance, float* centre, float* path, const float* weights, int count, float xi,
                      Stream stream) {
  BATON_RANGE("consolidate_path");
  check_count("consolidate_path", count);
  if (!(xi > 0)) refuse("consolidate_path", "xi is " + std::to_string(xi) + ", and a weight may not have moved");
  simt::launch<consolidate_path_kernel>(simt::each(count), stream, importance, centre, path, weights, count, xi);
}

void consolidate_fisher(float* importance, float* centre, const float* fisher, const float* weights, int count,
                        float decay, Stream stream) {
  BATON_RANGE("consolidate_fisher");
  check_count("consolidate_fisher", count);
  if (!(decay >= 0 && decay <= 1)) refuse("consolidate_fisher", "a decay of " + std::to_string(decay));
  simt::launch<consolidate_fisher_kernel>(simt::each(count), stream, importance, centre, fisher, weights, count, decay);
}

void bbb_update(const BbbArrays& a, int count, const BbbSettings& set, const StepState* states, Stream stream) {
  BATON_RANGE("bbb_update");
  check_count("bbb_update", count);
  check_settings(a, set);
  const double precision1 = 1 / (double(set.sd1) * set.sd1), precision2 = 1 / (double(set.sd2) * set.sd2);
  if (set.prior == BbbPrior::mixture) {
    const double pi = set.weight1, odds = (1 - pi) * set.sd1 / (pi * set.sd2);  // 0 and infinity give the right result
    const Mixture prior{float(precision1), float(precision2), float(std::log(odds)),
                        float(0.5 * (precision1 - precision2)), -87};
    simt::launch<bbb_mixture_kernel>(pieces(count), stream, a, count, set, prior, states);
  } else if (set.rule == PointRule::adam) {
    simt::launch<bbb_gaussian_kernel<PointRule::adam>>(pieces(count), stream, a, count, set, float(precision1), states);
  } else {
    simt::launch<bbb_gaussian_kernel<PointRule::sgd>>(pieces(count), stream, a, count, set, float(precision1), states);
  }
}

void rho_of_sd(float* rho, const float* sd, int count, Stream stream) {
  BATON_RANGE("rho_of_sd");
  check_count("rho_of_sd", count);
  simt::launch<rho_kernel>(simt::each(count), stream, rho, sd, count);
}
void sd_of_rho(float* sd, const float* rho, int count, Stream stream) {
  BATON_RANGE("sd_of_rho");
  check_count("sd_of_rho", count);
  simt::launch<sd_kernel>(simt::each(count), stream, sd, rho, count);
}

}  // namespace baton
