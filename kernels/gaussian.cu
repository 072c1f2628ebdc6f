// KL of diagonal Gaussians fused with the optimizer over the flat store. A block takes a chunk of one replica's
// parameters. It reads each of the eleven arrays once and writes seven, 72 bytes and two exponentials a parameter, and
// writes the chunk's KL as a partial sum; a second kernel adds the partial sums up in a fixed order. At the start of a
// stage t = e = 0 for every parameter, and the KL is exactly 0.
#include "kernels/gaussian.h"

#include <algorithm>

#include "kernels/adam.h"

namespace baton {

namespace {

constexpr int chunk = 2048, threads = 256;

// The arrays of one replica, from a piece on.
struct Piece {
  float *mean, *log_std, *variance;
  const float *prior_mean, *prior_log_std, *grad_variance;
  float *mean_m, *mean_v, *scale_m, *scale_v;
};
__device__ __forceinline__ Piece piece_of(const GaussianArrays& a, size_t at) {
  return {a.mean + at,          a.log_std + at, a.variance + at, a.prior_mean + at, a.prior_log_std + at,
          a.grad_variance + at, a.mean_m + at,  a.mean_v + at,   a.scale_m + at,    a.scale_v + at};
}
struct Rates {
  float kl_weight, per_nat, rate;
  Adam mean, scale;
};
__device__ __forceinline__ Rates rates_of(const StepState& s) {
  return {s.kl_now,
          1.f / fmaxf(s.kl_now, 1e-30f),
          0.5f * s.lr_scale,
          {s.lr_mean, s.correction1, s.correction2},
          {s.lr_scale, s.correction1, s.correction2}};
}

// The step of one parameter whose data gradient is g and whose z^2 is z2; returns its KL.
template <ScaleRule rule>
__device__ __forceinline__ float step_one(const Piece& p, const Rates& s, int i, float g, float z2) {
  const float mu = p.mean[i], ls = p.log_std[i], t = ls - p.prior_log_std[i];
  const float ratio = expf(2.f * t), sigma2 = p.variance[i], precision = ratio / sigma2;  // 1 / sigma_p^2
  const float away = mu - p.prior_mean[i], pull = z2 * away * precision;
  float m = p.mean_m[i], v = p.mean_v[i];
  p.mean[i] = mu - s.mean.step(m, v, g + s.kl_weight * pull);
  p.mean_m[i] = m, p.mean_v[i] = v;
  float sm = p.scale_m[i], next;
  if constexpr (rule == ScaleRule::adam) {
    float sv = p.scale_v[i];
    next = ls - s.scale.step(sm, sv, 2.f * sigma2 * p.grad_variance[i] + s.kl_weight * (ratio - 1.f));
    p.scale_v[i] = sv;
  } else {
    sm = adam_beta1 * sm + (1.f - adam_beta1) * (2.f * sigma2 * p.grad_variance[i] * s.per_nat + ratio - 1.f);
    float move = s.rate * sm * s.mean.correction1;  // selects, not fminf: they vectorise
    move = move > largest_scale_step ? largest_scale_step : move;
    next = ls - (move < -largest_scale_step ? -largest_scale_step : move);
  }
  p.scale_m[i] = sm;
  p.log_std[i] = next;
  p.variance[i] = expf(2.f * next);
  return divergence_of_scale(t, ratio) + 0.5f * away * pull;
}

// The number of the z that element i of a piece has. The division vectorises, and is exact for i below 2^20.
struct ZIndex {
  float inverse;
  int width;
  bool column;
  __device__ __forceinline__ int operator()(int i) const {
    const int whole = int((float(i) + 0.5f) * inverse);
    return column ? i - whole * width : whole;
  }
};
__device__ __forceinline__ ZIndex z_index(const Run& run) { return {1.f / float(run.width), run.width, run.column}; }

// groups: 0 where nothing has z, 1 for one group, 2 for any number of them.
template <ScaleRule rule, int groups>
__global__ void gaussian_step_kernel(GaussianArrays a, const Run* __restrict__ pieces, const StepState* states,
                                     Multipliers z, float* __restrict__ partial) {
  const Run run = pieces[blockIdx.x];
  const int r = simt::row();
  const size_t at = a.stride * r + run.first;
  const Piece p = piece_of(a, at);
  const Rates s = rates_of(states[r]);
  const int count = states[r].halted ? 0 : run.count;
  float kl = 0;
  if (groups == 0 || run.z_first < 0) {
    const float* __restrict__ grad = a.grad_mean + at;
    SIMT_SIMD(reduction(+ : kl))
    for (int i = threadIdx.x; i < count; i += blockDim.x) kl += step_one<rule>(p, s, i, grad[i], 1.f);
  } else if (groups == 1) {
    const float* __restrict__ grad = z.grad + z.grad_stride * r + run.first;
    const float* __restrict__ zs = z.z + z.z_stride * r + run.z_first;
    if constexpr (simt::warp_size == 1) {  // loops over whole rows, or the weights of a whole z, need no gather
      const int width = run.width, outer = count / width;
      for (int o = 0; o < outer; o++) {
        const int first = o * width;
        if (run.column) {
          SIMT_SIMD(reduction(+ : kl))
          for (int i = 0; i < width; i++) kl += step_one<rule>(p, s, first + i, zs[i] * grad[first + i], zs[i] * zs[i]);
        } else {
          const float zi = zs[o];
          SIMT_SIMD(reduction(+ : kl))
          for (int i = 0; i < width; i++) kl += step_one<rule>(p, s, first + i, zi * grad[first + i], zi * zi);
        }
      }
    } else {
      const ZIndex index = z_index(run);
      for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const float zi = zs[index(i)];
        kl += step_one<rule>(p, s, i, zi * grad[i], zi * zi);
      }
    }
  } else if constexpr (simt::warp_size == 1) {  // as above, with the groups' sums in between
    constexpr int most = 2048;
    float g[most], z2[most];
    const int width = run.width, outer = count / width;
    const float share = 1.f / float(z.groups);
    for (int o = 0; o < outer; o++)
      for (int from = 0; from < width; from += most) {
        const int n = min(most, width - from), first = o * width + from;
        for (int i = 0; i < n; i++) g[i] = z2[i] = 0;
        for (int k = 0; k < z.groups; k++) {
          const size_t q = size_t(r) * z.groups + k;
          const float* __restrict__ grad = z.grad + z.grad_stride * q + run.first + first;
          const float* __restrict__ zs = z.z + z.z_stride * q + run.z_first + (run.column ? from : o);
          if (run.column) {
            SIMT_SIMD()
            for (int i = 0; i < n; i++) g[i] += zs[i] * grad[i], z2[i] += zs[i] * zs[i];
          } else {
            SIMT_SIMD()
            for (int i = 0; i < n; i++) g[i] += zs[0] * grad[i], z2[i] += zs[0] * zs[0];
          }
        }
        SIMT_SIMD(reduction(+ : kl))
        for (int i = 0; i < n; i++) kl += step_one<rule>(p, s, first + i, g[i], z2[i] * share);
      }
  } else {
    const ZIndex index = z_index(run);
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      float g = 0, z2 = 0;
      for (int k = 0; k < z.groups; k++) {
        const size_t q = size_t(r) * z.groups + k;
        const float zi = z.z[z.z_stride * q + run.z_first + index(i)];
        g += zi * z.grad[z.grad_stride * q + run.first + i];
        z2 += zi * zi;
      }
      kl += step_one<rule>(p, s, i, g, z2 / float(z.groups));
    }
  }
  kl = simt::block_sum(kl);
  if (threadIdx.x == 0) partial[size_t(gridDim.x) * r + blockIdx.x] = kl;
}

__device__ __forceinline__ float divergence_of(const GaussianArrays& a, size_t i, float z2) {
  const float t = a.log_std[i] - a.prior_log_std[i], away = a.mean[i] - a.prior_mean[i];
  return divergence_of_scale(t, expf(2.f * t)) + 0.5f * z2 * away * away * expf(-2.f * a.prior_log_std[i]);
}

__global__ void gaussian_kl_kernel(GaussianArrays a, const Run* __restrict__ pieces, Multipliers z,
                                   float* __restrict__ partial) {
  const Run run = pieces[blockIdx.x];
  const int r = simt::row();
  const size_t at = a.stride * r + run.first;
  float kl = 0;
  if (!z.z || run.z_first < 0) {
    SIMT_SIMD(reduction(+ : kl))
    for (int i = threadIdx.x; i < run.count; i += blockDim.x) kl += divergence_of(a, at + i, 1.f);
  } else {
    const ZIndex index = z_index(run);
    for (int i = threadIdx.x; i < run.count; i += blockDim.x) {
      float z2 = 0;
      for (int k = 0; k < z.groups; k++) {
        const float zi = z.z[z.z_stride * (size_t(r) * z.groups + k) + run.z_first + index(i)];
        z2 += zi * zi;
      }
      kl += divergence_of(a, at + i, z2 / float(z.groups));
    }
  }
  kl = simt::block_sum(kl);
  if (threadIdx.x == 0) partial[size_t(gridDim.x) * r + blockIdx.x] = kl;
}

// Adds the partial sums to the accumulator. A block takes a slot of a replica: thread t adds up those of the pieces t,
// t + T, ... that belong to the slot, then the threads' sums are added in a fixed order.
__global__ void __launch_bounds__(threads)
    accumulate_kl_kernel(KlAccumulator accumulator, const Run* __restrict__ pieces, const float* __restrict__ partial,
                         int count) {
  const int slot = blockIdx.x, r = simt::row();
  partial += size_t(count) * r;
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += blockDim.x) sum += pieces[i].slot == slot ? double(partial[i]) : 0.;
  sum = simt::block_sum(sum);
  if (threadIdx.x == 0) accumulator.sums[accumulator.stride * r + slot] += sum;
}

__global__ void multiply_kernel(float* __restrict__ w, size_t w_stride, const float* __restrict__ mean, size_t stride,
                                const Run* __restrict__ pieces, const float* __restrict__ z, size_t z_stride,
                                int groups) {
  const Run run = pieces[blockIdx.x];
  const int q = simt::row(), count = run.z_first < 0 ? 0 : run.count;
  const float* __restrict__ from = mean + stride * (q / groups) + run.first;
  float* __restrict__ to = w + w_stride * q + run.first;
  const float* __restrict__ zs = z + z_stride * q + (run.z_first < 0 ? 0 : run.z_first);
  const ZIndex index = z_index(run);
  SIMT_SIMD()
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = zs[index(i)] * from[i];
}

// The gradient of z. A warp adds up the neighbouring weights of a z. Of a strip of columns each team of threads takes a
// segment of rows, and the sums of the segments are added in their order.
constexpr int strip = 64, segment = 64, teams = simt::warp_size == 1 ? 1 : 8;
constexpr int own = simt::warp_size == 1 ? strip : 1;  // columns of a thread

__global__ void __launch_bounds__(strip* teams)
    multiplier_gradient_kernel(float* __restrict__ dz, GaussianArrays a, const ZPart* __restrict__ parts, Multipliers z,
                               const StepState* states) {
  __shared__ float sums[teams * strip];
  const Run run = parts[blockIdx.x].run;
  const int columns = parts[blockIdx.x].columns;  // 0 outside of strips
  const int q = simt::row(), r = q / z.groups, width = run.width, thread = threadIdx.x;
  const size_t at = a.stride * r + run.first;
  const float* __restrict__ mean = a.mean + at;
  const float* __restrict__ prior_mean = a.prior_mean + at;
  const float* __restrict__ prior_log_std = a.prior_log_std + at;
  const float* __restrict__ grad = z.grad + z.grad_stride * q + run.first;
  const float* __restrict__ zs = z.z + z.z_stride * q + run.z_first;
  float* __restrict__ to = dz + z.z_stride * q + run.z_first;
  const float kl_weight = states[r].kl_now / float(z.groups);
  const int of_block = columns > 0 ? 0 : run.count / width;
  for (int k = thread / simt::warp_size; k < of_block; k += blockDim.x / simt::warp_size) {
    const size_t first = size_t(k) * width;
    float data = 0, away2 = 0;
    SIMT_SIMD(reduction(+ : data, away2))
    for (int i = simt::lane_id(); i < width; i += simt::warp_size) {
      const float mu = mean[first + i], e = mu - prior_mean[first + i];
      data += mu * grad[first + i];
      away2 += e * e * expf(-2.f * prior_log_std[first + i]);
    }
    data = simt::warp_sum(data), away2 = simt::warp_sum(away2);
    if (simt::lane_id() == 0) to[k] = data + kl_weight * zs[k] * away2;
  }
  const int rows = columns > 0 ? run.count / columns : 0, team = thread * own / strip, column0 = thread * own % strip;
  const int count = max(0, min(own, columns - column0));
  float total[own] = {};
  for (int round = 0; round < rows; round += teams * segment) {
    const int first_row = round + team * segment, last_row = min(rows, first_row + segment);
    float data[own] = {}, away2[own] = {};
    for (int row = first_row; row < last_row; row++) {
      SIMT_SIMD()
      for (int k = 0; k < count; k++) {
        const size_t i = size_t(row) * width + column0 + k;
        const float mu = mean[i], e = mu - prior_mean[i];
        data[k] += mu * grad[i];
        away2[k] += e * e * expf(-2.f * prior_log_std[i]);
      }
    }
    for (int k = 0; k < count; k++) sums[team * strip + column0 + k] = data[k] + kl_weight * zs[column0 + k] * away2[k];
    __syncthreads();
    for (int k = 0; k < count; k++)
      for (int j = 0; j < teams; j++) total[k] += sums[j * strip + column0 + k];
    __syncthreads();
  }
  for (int k = 0; team == 0 && k < count; k++) to[column0 + k] = total[k];
}

__global__ void draw_gaussian_kernel(float* __restrict__ w, size_t w_stride, GaussianArrays a, int first, int count,
                                     int groups, const StepState* states, uint32_t stream_id) {
  const int i = simt::thread_item(), q = simt::row();
  if (i >= count) return;
  const int r = q / groups, g = q % groups;
  const size_t at = a.stride * r + first + i;
  const float e = normal4(states[r].noise, uint32_t(g) * count + i, stream_id, states[r].step).x;
  w[w_stride * q + first + i] = a.mean[at] + sqrtf(a.variance[at]) * e;
}
__global__ void draw_gaussian_backward_kernel(GaussianArrays a, const float* __restrict__ grad_w, size_t w_stride,
                                              int first, int count, int groups, const StepState* states,
                                              uint32_t stream_id) {
  const int i = simt::thread_item(), r = simt::row();
  if (i >= count) return;
  const size_t at = a.stride * r + first + i;
  float sum = 0, with_noise = 0;
  for (int g = 0; g < groups; g++) {
    const float e = normal4(states[r].noise, uint32_t(g) * count + i, stream_id, states[r].step).x;
    const float d = grad_w[w_stride * (size_t(r) * groups + g) + first + i];
    sum += d;
    with_noise += d * e;
  }
  a.grad_mean[at] = sum;
  a.grad_variance[at] = 0.5f * with_noise / sqrtf(a.variance[at]);
}

// A block takes a chunk, so that the loop has no branch: one would mask every store on the host.
__global__ void point_step_kernel(GaussianArrays a, const StepState* __restrict__ states) {
  const int r = simt::row(), first = int(blockIdx.x) * chunk, n = min(chunk, a.count - first);
  const StepState& s = states[r];
  const size_t at = a.stride * r + first;
  const Adam adam{s.lr_mean, s.correction1, s.correction2};
  float* __restrict__ mean = a.mean + at;
  float* __restrict__ mean_m = a.mean_m + at;
  float* __restrict__ mean_v = a.mean_v + at;
  const float* __restrict__ grad = a.grad_mean + at;
  if (!s.halted) {
    SIMT_SIMD()
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      float m = mean_m[i], v = mean_v[i];
      mean[i] -= adam.step(m, v, grad[i]);
      mean_m[i] = m;
      mean_v[i] = v;
    }
  }
}

__global__ void sample_weights_kernel(float* w, const float* mean, size_t mean_stride,
                                      const float* __restrict__ variance, int count, size_t stride, int first_sample,
                                      Key key) {
  const int i = simt::thread_item(), s = simt::row(), q = (count + 3) / 4;
  if (i >= q) return;
  const float4 e = normal4(key, i, stream_weights, first_sample + s);
  float* to = w + stride * s;
  const float* from = mean + mean_stride * s;
  to[i] = from[i] + sqrtf(variance[i]) * e.x;
  if (i + q < count) to[i + q] = from[i + q] + sqrtf(variance[i + q]) * e.y;
  if (i + 2 * q < count) to[i + 2 * q] = from[i + 2 * q] + sqrtf(variance[i + 2 * q]) * e.z;
  if (i + 3 * q < count) to[i + 3 * q] = from[i + 3 * q] + sqrtf(variance[i + 3 * q]) * e.w;
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

__global__ void variance_kernel(float* __restrict__ variance, const float* __restrict__ log_std, size_t stride,
                                int count) {
  const int i = simt::thread_item();
  if (i >= count) return;
  const size_t at = stride * simt::row() + i;
  variance[at] = expf(2.f * log_std[at]);
}

void check_arrays(const char* who, const GaussianArrays& a) {
  if (a.count < 1 || a.replicas < 1 || a.stride < size_t(a.count))
    throw InputError(std::string(who) + ": " + std::to_string(a.replicas) + " replicas of " + std::to_string(a.count) +
                     " parameters, " + std::to_string(a.stride) + " apart");
}

void accumulate_kl(KlAccumulator accumulator, Pieces pieces, const float* partial, int replicas, Stream stream) {
  simt::launch<accumulate_kl_kernel>(simt::blocks(pieces.slots, threads, 0, replicas), stream, accumulator,
                                     pieces.table, partial, pieces.count);
}

}  // namespace

int slots_of(const std::vector<Run>& runs) {
  int slots = 0;
  for (const Run& run : runs) slots = std::max(slots, run.slot + 1);
  return slots;
}

std::vector<Run> pieces_of(const std::vector<Run>& runs) {
  std::vector<Run> pieces;
  for (const Run& run : runs) {
    const int unit = run.z_first < 0 ? 1 : run.width;
    if (run.count < 1 || unit < 1 || run.count % unit != 0)
      throw InputError("a run of " + std::to_string(run.count) + " parameters does not hold whole z of " +
                       std::to_string(unit));
    const int step = std::max(1, chunk / unit) * unit;
    for (int i = 0; i < run.count; i += step) {
      Run piece = run;
      piece.first += i;
      piece.count = std::min(step, run.count - i);
      if (run.z_first >= 0 && !run.column) piece.z_first += i / unit;
      pieces.push_back(piece);
    }
  }
  return pieces;
}

void gaussian_step(const GaussianArrays& a, ScaleRule rule, Pieces pieces, const StepState* states,
                   KlAccumulator accumulator, float* partial, Stream stream, const Multipliers& z) {
  BATON_RANGE("gaussian_step");
  check_arrays("gaussian_step", a);
  const auto shape = simt::blocks(pieces.count, threads, 0, a.replicas);
  const auto with_rule = [&]<ScaleRule of>() {
    if (!z.z) simt::launch<gaussian_step_kernel<of, 0>>(shape, stream, a, pieces.table, states, z, partial);
    else if (z.groups == 1)
      simt::launch<gaussian_step_kernel<of, 1>>(shape, stream, a, pieces.table, states, z, partial);
    else simt::launch<gaussian_step_kernel<of, 2>>(shape, stream, a, pieces.table, states, z, partial);
  };
  if (rule == ScaleRule::adam) with_rule.template operator()<ScaleRule::adam>();
  else with_rule.template operator()<ScaleRule::natural>();
  accumulate_kl(accumulator, pieces, partial, a.replicas, stream);
}

void gaussian_kl(KlAccumulator accumulator, const GaussianArrays& a, Pieces pieces, float* partial, Stream stream,
                 const Multipliers& z) {
  BATON_RANGE("gaussian_kl");
  check_arrays("gaussian_kl", a);
  simt::launch<gaussian_kl_kernel>(simt::blocks(pieces.count, threads, 0, a.replicas), stream, a, pieces.table, z,
                                   partial);
  accumulate_kl(accumulator, pieces, partial, a.replicas, stream);
}

void multiply_weights(float* w, size_t w_stride, const GaussianArrays& a, Pieces pieces, const Multipliers& z,
                      Stream stream) {
  BATON_RANGE("multiply_weights");
  check_arrays("multiply_weights", a);
  simt::launch<multiply_kernel>(simt::blocks(pieces.count, threads, 0, a.replicas * z.groups), stream, w, w_stride,
                                a.mean, a.stride, pieces.table, z.z, z.z_stride, z.groups);
}

std::vector<ZPart> z_parts_of(const std::vector<Run>& runs) {
  std::vector<ZPart> parts;
  for (Run piece : pieces_of(runs))
    if (piece.z_first >= 0 && !piece.column) parts.push_back({piece, 0});
  for (const Run& run : runs)
    for (int i = 0; run.z_first >= 0 && run.column && i < run.width; i += strip) {
      const int columns = std::min(strip, run.width - i);
      Run part = run;
      part.first += i, part.z_first += i, part.count = run.count / run.width * columns;
      parts.push_back({part, columns});
    }
  return parts;
}

void multiplier_gradient(float* dz, const GaussianArrays& a, ZParts parts, const Multipliers& z,
                         const StepState* states, Stream stream) {
  BATON_RANGE("multiplier_gradient");
  check_arrays("multiplier_gradient", a);
  simt::launch<multiplier_gradient_kernel>(simt::blocks(parts.count, strip * teams, 0, a.replicas * z.groups), stream,
                                           dz, a, parts.table, z, states);
}

void draw_gaussian(float* w, size_t w_stride, const GaussianArrays& a, int first, int count, int groups,
                   const StepState* states, uint32_t stream_id, Stream stream) {
  BATON_RANGE("draw_gaussian");
  check_arrays("draw_gaussian", a);
  simt::launch<draw_gaussian_kernel>(simt::each(count, a.replicas * groups), stream, w, w_stride, a, first, count,
                                     groups, states, stream_id);
}

void draw_gaussian_backward(const GaussianArrays& a, const float* grad_w, size_t w_stride, int first, int count,
                            int groups, const StepState* states, uint32_t stream_id, Stream stream) {
  BATON_RANGE("draw_gaussian_backward");
  check_arrays("draw_gaussian_backward", a);
  simt::launch<draw_gaussian_backward_kernel>(simt::each(count, a.replicas), stream, a, grad_w, w_stride, first, count,
                                              groups, states, stream_id);
}

void point_step(const GaussianArrays& a, const StepState* states, Stream stream) {
  BATON_RANGE("point_step");
  check_arrays("point_step", a);
  simt::launch<point_step_kernel>(simt::blocks((a.count + chunk - 1) / chunk, threads, 0, a.replicas), stream, a,
                                  states);
}

void sample_weights(float* w, const float* mean, size_t mean_stride, const float* variance, int count, size_t stride,
                    int first_sample, int samples, Key key, Stream stream) {
  BATON_RANGE("sample_weights");
  simt::launch<sample_weights_kernel>(simt::each((count + 3) / 4, samples), stream, w, mean, mean_stride, variance,
                                      count, stride, first_sample, key);
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

void variance_of(float* variance, const float* log_std, size_t stride, int count, int replicas, Stream stream) {
  BATON_RANGE("variance_of");
  simt::launch<variance_kernel>(simt::each(count, replicas), stream, variance, log_std, stride, count);
}

}  // namespace baton
