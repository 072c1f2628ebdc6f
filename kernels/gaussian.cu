// KL of diagonal Gaussians fused with the optimizer over the flat store. A block takes a chunk of one replica's
// parameters: it reads each of the eleven arrays once and writes seven, 72 bytes a parameter, two exponentials, and
// adds the chunk's KL to a partial sum that a second kernel adds up in a fixed order. At the start of a stage t = e = 0
// for every parameter, and the KL is 0 exactly.
#include "kernels/gaussian.h"

namespace baton {

namespace {

constexpr int chunk = 2048, threads = 256;

struct Adam {
  float lr, correction1, correction2;
  __device__ __forceinline__ float step(float& m, float& v, float g) const {
    m = adam_beta1 * m + (1.f - adam_beta1) * g;
    v = adam_beta2 * v + (1.f - adam_beta2) * g * g;
    return lr * (m * correction1) / (sqrtf(v * correction2) + adam_epsilon);
  }
};

// (exp(2t) - 1) / 2 - t, given exp(2t): by its series where the difference would cancel, as in the first steps of a
// stage.
__device__ __forceinline__ float divergence_of_scale(float t, float ratio) {
  const float series = t * t * (1.f + t * (2.f / 3 + t * (1.f / 3 + t * (2.f / 15 + t * (2.f / 45)))));
  const float direct = 0.5f * (ratio - 1.f) - t;
  return t * t < 0.01f ? series : direct;
}

template <ScaleRule rule>
__global__ void gaussian_step_kernel(GaussianArrays a, const StepState* states, float* __restrict__ partial) {
  const int r = simt::row(), first = blockIdx.x * chunk, count = min(chunk, a.count - first);
  const size_t at = a.stride * r + first;
  float* __restrict__ mean = a.mean + at;
  float* __restrict__ log_sd = a.log_sd + at;
  float* __restrict__ variance = a.variance + at;
  const float* __restrict__ prior_mean = a.prior_mean + at;
  const float* __restrict__ prior_log_sd = a.prior_log_sd + at;
  const float* __restrict__ grad_mean = a.grad_mean + at;
  const float* __restrict__ grad_variance = a.grad_variance + at;
  float* __restrict__ mean_m = a.mean_m + at;
  float* __restrict__ mean_v = a.mean_v + at;
  float* __restrict__ scale_m = a.scale_m + at;
  float* __restrict__ scale_v = a.scale_v + at;
  const StepState& s = states[r];
  const float kl_weight = s.kl_now, per_nat = 1.f / fmaxf(kl_weight, 1e-30f);
  const float rate = 0.5f * s.lr_scale, correction = s.correction1;
  const Adam mean_adam{s.lr_mean, s.correction1, s.correction2}, scale_adam{s.lr_scale, s.correction1, s.correction2};
  float kl = 0;
  SIMT_SIMD(reduction(+ : kl))
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const float mu = mean[i], ls = log_sd[i], t = ls - prior_log_sd[i];
    const float ratio = expf(2.f * t), sigma2 = variance[i], precision = ratio / sigma2;  // 1 / sigma_p^2
    const float away = mu - prior_mean[i];
    kl += divergence_of_scale(t, ratio) + 0.5f * away * away * precision;
    float m = mean_m[i], v = mean_v[i];
    mean[i] = mu - mean_adam.step(m, v, grad_mean[i] + kl_weight * away * precision);
    mean_m[i] = m, mean_v[i] = v;
    float sm = scale_m[i], next;
    if constexpr (rule == ScaleRule::adam) {
      float sv = scale_v[i];
      next = ls - scale_adam.step(sm, sv, 2.f * sigma2 * grad_variance[i] + kl_weight * (ratio - 1.f));
      scale_v[i] = sv;
    } else {
      sm = adam_beta1 * sm + (1.f - adam_beta1) * (2.f * sigma2 * grad_variance[i] * per_nat + ratio - 1.f);
      float move = rate * sm * correction;  // selects, not fminf: they vectorise
      move = move > largest_scale_step ? largest_scale_step : move;
      next = ls - (move < -largest_scale_step ? -largest_scale_step : move);
    }
    scale_m[i] = sm;
    log_sd[i] = next;
    variance[i] = expf(2.f * next);
  }
  kl = simt::block_sum(kl);
  if (threadIdx.x == 0) partial[size_t(gridDim.x) * r + blockIdx.x] = kl;
}

__global__ void gaussian_kl_kernel(GaussianArrays a, float* __restrict__ partial) {
  const int r = simt::row(), first = blockIdx.x * chunk, count = min(chunk, a.count - first);
  const size_t at = a.stride * r + first;
  float kl = 0;
  SIMT_SIMD(reduction(+ : kl))
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const float t = a.log_sd[at + i] - a.prior_log_sd[at + i], away = a.mean[at + i] - a.prior_mean[at + i];
    kl += divergence_of_scale(t, expf(2.f * t)) + 0.5f * away * away * expf(-2.f * a.prior_log_sd[at + i]);
  }
  kl = simt::block_sum(kl);
  if (threadIdx.x == 0) partial[size_t(gridDim.x) * r + blockIdx.x] = kl;
}

// Adds up a replica's partial sums in their order: a few hundred numbers, one thread each replica.
__global__ void add_partials_kernel(Totals* totals, double* kl, const float* partial, int parts, int replicas) {
  const int r = simt::thread_item();
  if (r >= replicas) return;
  double sum = 0;
  for (int i = 0; i < parts; i++) sum += double(partial[size_t(parts) * r + i]);
  if (totals) totals[r].kl += sum;
  if (kl) kl[r] = sum;
}

__global__ void point_step_kernel(GaussianArrays a, const StepState* states) {
  const int i = simt::thread_item(), r = simt::row();
  if (i >= a.count) return;
  const StepState& s = states[r];
  const size_t at = a.stride * r + i;
  float m = a.mean_m[at], v = a.mean_v[at];
  a.mean[at] -= Adam{s.lr_mean, s.correction1, s.correction2}.step(m, v, a.grad_mean[at]);
  a.mean_m[at] = m;
  a.mean_v[at] = v;
}

__global__ void sample_weights_kernel(float* __restrict__ w, const float* __restrict__ mean,
                                      const float* __restrict__ variance, int count, size_t stride, int first_sample,
                                      Key key) {
  const int i = simt::thread_item(), s = simt::row(), q = (count + 3) / 4;
  if (i >= q) return;
  const float4 e = normal4(key, i, stream_weights, first_sample + s);
  float* to = w + stride * s;
  to[i] = mean[i] + sqrtf(variance[i]) * e.x;
  if (i + q < count) to[i + q] = mean[i + q] + sqrtf(variance[i + q]) * e.y;
  if (i + 2 * q < count) to[i + 2 * q] = mean[i + 2 * q] + sqrtf(variance[i + 2 * q]) * e.z;
  if (i + 3 * q < count) to[i + 3 * q] = mean[i + 3 * q] + sqrtf(variance[i + 3 * q]) * e.w;
}

__global__ void init_normal_kernel(float* __restrict__ x, size_t stride, int first, int count, float sd,
                                   const StepState* states) {
  const int i = simt::thread_item(), r = simt::row();
  if (i >= count) return;
  x[stride * r + first + i] = sd * normal4(states[r].noise, uint32_t(first + i), stream_init, 0).x;
}

__global__ void fill_rows_kernel(float* __restrict__ x, size_t stride, int count, const float* __restrict__ values) {
  const int i = simt::thread_item(), r = simt::row();
  if (i >= count) return;
  x[stride * r + i] = values[r];
}

__global__ void variance_kernel(float* __restrict__ variance, const float* __restrict__ log_sd, size_t stride,
                                int count) {
  const int i = simt::thread_item();
  if (i >= count) return;
  const size_t at = stride * simt::row() + i;
  variance[at] = expf(2.f * log_sd[at]);
}

void check_arrays(const char* who, const GaussianArrays& a) {
  if (a.count < 1 || a.replicas < 1 || a.stride < size_t(a.count))
    throw InputError(std::string(who) + ": " + std::to_string(a.replicas) + " replicas of " + std::to_string(a.count) +
                     " parameters, " + std::to_string(a.stride) + " apart");
}

}  // namespace

int gaussian_partials(int count) { return (count + chunk - 1) / chunk; }

void gaussian_step(const GaussianArrays& a, ScaleRule rule, const StepState* states, Totals* totals, float* partial,
                   Stream stream) {
  BATON_RANGE("gaussian_step");
  check_arrays("gaussian_step", a);
  const int parts = gaussian_partials(a.count);
  const auto shape = simt::blocks(parts, threads, 0, a.replicas);
  if (rule == ScaleRule::adam) simt::launch<gaussian_step_kernel<ScaleRule::adam>>(shape, stream, a, states, partial);
  else simt::launch<gaussian_step_kernel<ScaleRule::natural>>(shape, stream, a, states, partial);
  simt::launch<add_partials_kernel>(simt::each(a.replicas), stream, totals, static_cast<double*>(nullptr), partial,
                                    parts, a.replicas);
}

void gaussian_kl(double* kl, const GaussianArrays& a, float* partial, Stream stream) {
  BATON_RANGE("gaussian_kl");
  check_arrays("gaussian_kl", a);
  const int parts = gaussian_partials(a.count);
  simt::launch<gaussian_kl_kernel>(simt::blocks(parts, threads, 0, a.replicas), stream, a, partial);
  simt::launch<add_partials_kernel>(simt::each(a.replicas), stream, static_cast<Totals*>(nullptr), kl, partial, parts,
                                    a.replicas);
}

void point_step(const GaussianArrays& a, const StepState* states, Stream stream) {
  BATON_RANGE("point_step");
  check_arrays("point_step", a);
  simt::launch<point_step_kernel>(simt::each(a.count, a.replicas), stream, a, states);
}

void sample_weights(float* w, const float* mean, const float* variance, int count, size_t stride, int first_sample,
                    int samples, Key key, Stream stream) {
  BATON_RANGE("sample_weights");
  simt::launch<sample_weights_kernel>(simt::each((count + 3) / 4, samples), stream, w, mean, variance, count, stride,
                                      first_sample, key);
}

void init_normal(float* x, size_t stride, int first, int count, float sd, const StepState* states, int replicas,
                 Stream stream) {
  BATON_RANGE("init_normal");
  simt::launch<init_normal_kernel>(simt::each(count, replicas), stream, x, stride, first, count, sd, states);
}

void fill_rows(float* x, size_t stride, int count, const float* values, int replicas, Stream stream) {
  BATON_RANGE("fill_rows");
  simt::launch<fill_rows_kernel>(simt::each(count, replicas), stream, x, stride, count, values);
}

void variance_of(float* variance, const float* log_sd, size_t stride, int count, int replicas, Stream stream) {
  BATON_RANGE("variance_of");
  simt::launch<variance_kernel>(simt::each(count, replicas), stream, variance, log_sd, stride, count);
}

}  // namespace baton
