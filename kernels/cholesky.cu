// The channel factorized Gaussian: sampling, and the optimizer's step fused with the closed form of the KL. A warp
// takes a block of weights; the factor and the prior's inverse factor come through shared memory, coalesced. What is
// done once a stage is in cholesky_convert.cu.
//
// With t_i = ln L_ii - ln L_0,ii, M = the part of L_0^-1 L below the diagonal, z = L_0^-1 (mu - mu_0):
//   KL        = sum_i [(exp(2 t_i) - 1) / 2 - t_i] + 1/2 (|M|_F^2 + |z|^2)
//   dKL/dmu   = L_0^-T z
//   dKL/dL    = tril(L_0^-T M) + diag((exp(2 t_i) - 1) / L_ii)
// since the diagonal of L_0^-1 L is exp(t_i), L_0^-T is upper triangular, and 1 / L_ii is subtracted from the
// diagonal's own term exp(2 t_i) / L_ii. So the diagonal's part is exact where posterior and prior are equal: it is no
// difference of large numbers. In stored coordinates (lambda_i = ln L_ii, r_ij = L_ij / L_ii)
//   dJ/dr_ij     = L_ii dJ/dL_ij        dJ/dlambda_i = L_ii (dJ/dL_ii + sum_{j<i} dJ/dL_ij r_ij)
//
// A lane owns columns of L, of M and of the gradient. The mean is a last column of them: L_0^-1 times it is z, L_0^-T
// times z is dKL/dmu, and with 1 for its noise the data's gradient tril(sum_g grad_w e^T) has d/dmu beside d/dL. Both
// products are done in place, two rows at a time. On a GPU a column is in registers. In the serial build the one lane
// has all columns, and the innermost loops run over them, a whole number of vectors.
//
// Bytes of a block with P = d (d + 1) / 2: sampling 4 P, and 8 d a draw; a step 32 P + 28 d, and 4 d a group. FLOPs:
// sampling 2 P and d normals (60 each) a draw; a step (2/3) d^3, 2 d^2 and d normals a group, and 15 P of the
// optimizer.
#include "kernels/adam.h"
#include "kernels/cholesky_parts.h"

namespace baton {

namespace {

__host__ __device__ constexpr int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }
__host__ __device__ constexpr int quads_of(int d) { return (d + 3) / 4; }

// A lane's piece of a row: one column on a GPU. The one lane of the serial build takes eight, in one of g++'s vector
// types, for its vectoriser would keep sums over rows in memory.
#if defined(__CUDACC__) || defined(SIMT_EMULATE)
using Lanes = float;
using Indices = int;
constexpr int vector = 1;
__device__ __forceinline__ Indices index_of(int c) { return simt::lane_id() + c * simt::warp_size; }
__device__ __forceinline__ Lanes load(const float* row, int c) { return row[index_of(c)]; }
// The columns of a row below `count`; what follows belongs to another row and is not read.
__device__ __forceinline__ Lanes load_below(const float* row, int c, int count) {
  return index_of(c) < count ? row[index_of(c)] : 0.f;
}
__device__ __forceinline__ void store(float* row, int c, Lanes x) { row[index_of(c)] = x; }
__device__ __forceinline__ Lanes fused(float a, Lanes b, Lanes c) { return fmaf(a, b, c); }
__device__ __forceinline__ float last_of(Lanes x) { return x; }  // in the last lane
__device__ __forceinline__ float sum_of(Lanes x) { return x; }
#else
typedef float Lanes __attribute__((vector_size(32)));
typedef int Indices __attribute__((vector_size(32)));
typedef float Unaligned __attribute__((vector_size(32), aligned(4), may_alias));
constexpr int vector = 8;
inline Indices index_of(int c) { return Indices{0, 1, 2, 3, 4, 5, 6, 7} + c * vector; }
inline Lanes load(const float* row, int c) { return *reinterpret_cast<const Unaligned*>(row + c * vector); }
inline Lanes load_below(const float* row, int c, int) { return load(row, c); }  // what follows is read but not used
inline void store(float* row, int c, Lanes x) { *reinterpret_cast<Unaligned*>(row + c * vector) = x; }
inline Lanes fused(float a, Lanes b, Lanes c) { return a * b + c; }
inline float last_of(Lanes x) { return x[vector - 1]; }
inline float sum_of(Lanes x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }
#endif

// D is d where the template knows it (3x3 and 5x5 kernels). Else it is the largest block, of which d rows are used.
constexpr int width = simt::warp_size * vector;
template <int D>
constexpr int columns = (D + width) / width;  // of Lanes
template <int D>
constexpr int reach = width* columns<D>;  // the columns that they cover: at least d + 1, and the last is the mean's
constexpr int whole_quads = simt::warp_size == 1 ? 4 : 1;
static_assert(simt::warp_size == 1 || (4 * quads_of(9) < reach<9> && 4 * quads_of(25) < reach<25> &&
                                       4 * quads_of(largest_block) < reach<largest_block>));  // two lanes' writes

// A warp's shared memory. The one lane of the serial build reads whole vectors, up to `reach` beyond a row's start:
// into the rows that follow, and into zeros behind the last.
template <int D>
struct Shared {
  float factor[packed(D) + reach<D>];  // as stored
  float inverse[packed(D) + reach<D>];
  float gradient[packed(D) + reach<D>];
  float mean_gradient[reach<D>];
  float scale[reach<D>];  // L_ii
  float ratio[reach<D>];  // exp(2 t_i)
  float upstream[reach<D>];
  float noise[round_up(reach<D>, 4 * whole_quads)];
};

template <int D>
__device__ __forceinline__ int size_of(int d) {
  return D == largest_block ? d : D;
}

__device__ __forceinline__ void stage(float* __restrict__ to, const float* __restrict__ from, int count) {
  SIMT_SIMD()
  for (int i = simt::lane_id(); i < count; i += simt::warp_size) to[i] = from[i];
}

// sum_{i < count} a_i b_i, by one lane. Reads whole vectors.
__device__ __forceinline__ float dot(const float* __restrict__ a, const float* __restrict__ b, int count) {
  float sum[vector];
  for (int k = 0; k < vector; k++) sum[k] = 0;
  for (int i = 0; i < count; i += vector)
    for (int k = 0; k < vector; k++) sum[k] += i + k < count ? a[i + k] * b[i + k] : 0.f;
  for (int half = vector / 2; half > 0; half /= 2)
    for (int k = 0; k < half; k++) sum[k] += sum[k + half];
  return sum[0];
}

// noise[i] = e_i for i < d, and 1 for the mean's column. `first` is the block's first counter.
template <int D>
__device__ __forceinline__ void draw(float* __restrict__ noise, int d, uint32_t first, Key key, uint32_t stream_id,
                                     uint32_t step) {
  SIMT_SIMD()
  for (int q = simt::lane_id(); q < round_up(quads_of(d), whole_quads); q += simt::warp_size) {
    const float4 e = normal4(key, first + q, stream_id, step);
    noise[4 * q] = e.x, noise[4 * q + 1] = e.y, noise[4 * q + 2] = e.z, noise[4 * q + 3] = e.w;
  }
  if (simt::lane_id() == simt::warp_size - 1) noise[reach<D> - 1] = 1;
}

// --------------------------------------------------------------------------------------------------------- sampling
// A row of the grid is a replica, with the draws of its groups, or with `predicting` a draw of the one replica.
template <int D, bool predicting>
__global__ void __launch_bounds__(simt::warp_size, 1)
    cholesky_sample_kernel(float* __restrict__ w, size_t w_stride, const float* __restrict__ mean, size_t stride,
                           const float* __restrict__ factor, size_t factor_stride, int any_d, int blocks, int groups,
                           const StepState* states, int first_sample, Key given, uint32_t stream_id) {
  SIMT_DYNAMIC_SHARED(Shared<D>, shared);
  const int b = blockIdx.x, row = simt::row(), r = predicting ? 0 : row, d = size_of<D>(any_d);
  const Key key = predicting ? given : states[r].noise;
  const uint32_t step = predicting ? uint32_t(first_sample + row) : states[r].step;
  mean += stride * r + size_t(b) * d;
  float* __restrict__ stored = shared->factor;
  float* __restrict__ scale = shared->scale;
  float* __restrict__ noise = shared->noise;
  stage(stored, factor + factor_stride * r + size_t(b) * packed(d), packed(d));
  __syncthreads();
  for (int i = simt::lane_id(); i < d; i += simt::warp_size) scale[i] = stored[diagonal(i)];
  SIMT_SIMD()
  for (int i = simt::lane_id(); i < d; i += simt::warp_size) scale[i] = expf(scale[i]);
  for (int g = 0; g < groups; g++) {
    draw<D>(noise, d, uint32_t(g * blocks + b) * quads_of(d), key, stream_id, step);
    __syncthreads();
    float* __restrict__ to = w + w_stride * (size_t(row) * groups + g) + size_t(b) * d;
    for (int i = simt::lane_id(); i < d; i += simt::warp_size) {
      to[i] = mean[i] + scale[i] * (noise[i] + dot(stored + packed(i), noise, i));
    }
    __syncthreads();
  }
}

// ----------------------------------------------------------------------------------------------------------- the KL
// The KL of a block (in every lane), column[i][c] = entry (i, index_of(c)) of M, and z in the last column. Leaves the
// factor, the inverse, scale and ratio in shared memory.
template <int D>
__device__ __forceinline__ float divergence(Lanes (&column)[D][columns<D>], Shared<D>& shared, const CholeskyArrays& a,
                                            int r, int b) {
  const int lane = simt::lane_id(), d = size_of<D>(a.d);
  const size_t mean_at = a.stride * r + size_t(b) * d, at = a.factor_stride * r + size_t(b) * packed(d);
  const float* __restrict__ prior_factor = a.prior_factor + at;
  float* __restrict__ factor = shared.factor;
  float* __restrict__ inverse = shared.inverse;
  float* __restrict__ scale = shared.scale;
  float* __restrict__ ratio = shared.ratio;
  stage(factor, a.factor + at, packed(d));
  stage(inverse, a.prior_inverse + at, packed(d));
  if constexpr (vector > 1)
    for (int i = 0; i < reach<D>; i++) factor[packed(d) + i] = 0;
  __syncthreads();

  for (int i = lane; i < d; i += simt::warp_size) {
    scale[i] = factor[diagonal(i)];
    ratio[i] = scale[i] - prior_factor[diagonal(i)];
    shared.mean_gradient[i] = a.mean[mean_at + i] - a.prior_mean[mean_at + i];
  }
  float kl = 0;
  SIMT_SIMD(reduction(+ : kl))
  for (int i = lane; i < d; i += simt::warp_size) {
    const float t = ratio[i];
    scale[i] = expf(scale[i]);
    ratio[i] = expf(2.f * t);
    kl += divergence_of_scale(t, ratio[i]);
  }
  __syncthreads();

  constexpr int mean_column = reach<D> - 1;
#pragma unroll
  for (int i = 0; i < D; i++) {
    if (i >= d) break;
    const Lanes own = scale[i] + Lanes{}, away = shared.mean_gradient[i] + Lanes{};
#pragma unroll
    for (int c = 0; c < columns<D>; c++) {
      const Indices j = index_of(c);
      const Lanes others = j == i ? own : j == mean_column ? away : Lanes{};
      column[i][c] = j < i ? own * load_below(factor + packed(i), c, i) : others;
    }
  }
  Lanes squares{};
#pragma unroll
  for (int i = (D - 1) / 2 * 2; i >= 0; i -= 2) {  // rows i and i + 1; from the last to the first, so it is in place
    if (i >= d) continue;
    const float* __restrict__ row = inverse + packed(i);
    const float* __restrict__ next_row =
        inverse + packed(i + 1 < d ? i + 1 : i);  // not used where there is no next row
    Lanes sum[columns<D>] = {}, next[columns<D>] = {};
#pragma unroll
    for (int k = 0; k <= i; k++) {
#pragma unroll
      for (int c = 0; c < columns<D>; c++) {
        sum[c] = fused(row[k], column[k][c], sum[c]);
        next[c] = fused(next_row[k], column[k][c], next[c]);
      }
    }
    if (i + 1 < d) {
#pragma unroll
      for (int c = 0; c < columns<D>; c++) {
        const Indices j = index_of(c);
        const Lanes m = fused(next_row[i + 1], column[i + 1][c], next[c]);
        column[i + 1][c] = (j <= i) | (j == mean_column) ? m : Lanes{};
        squares += column[i + 1][c] * column[i + 1][c];
      }
    }
#pragma unroll
    for (int c = 0; c < columns<D>; c++) {
      const Indices j = index_of(c);
      column[i][c] = (j < i) | (j == mean_column) ? sum[c] : Lanes{};
      squares += column[i][c] * column[i][c];
    }
  }
  return simt::warp_sum(0.5f * sum_of(squares) + kl);
}

template <int D>
__global__ void __launch_bounds__(simt::warp_size, 1)
    cholesky_kl_kernel(CholeskyArrays a, float* __restrict__ partial) {
  SIMT_DYNAMIC_SHARED(Shared<D>, shared);
  Lanes column[D][columns<D>];
  const int b = blockIdx.x, r = simt::row();
  const float kl = divergence<D>(column, *shared, a, r, b);
  if (simt::lane_id() == 0) partial[size_t(a.blocks) * r + b] = kl;
}

// --------------------------------------------------------------------------------------------------------- the step
__device__ __forceinline__ void adam_step(float* __restrict__ to, float* __restrict__ m, float* __restrict__ v,
                                          const float* __restrict__ gradient, int count, Adam adam) {
  SIMT_SIMD()
  for (int i = simt::lane_id(); i < count; i += simt::warp_size) {
    float first = m[i], second = v[i];
    to[i] -= adam.step(first, second, gradient[i]);
    m[i] = first, v[i] = second;
  }
}

__device__ __forceinline__ void add(float* __restrict__ to, const float* __restrict__ x, int count) {
  SIMT_SIMD()
  for (int i = simt::lane_id(); i < count; i += simt::warp_size) to[i] += x[i];
}

template <int D>
__global__ void __launch_bounds__(simt::warp_size, 1)
    cholesky_step_kernel(CholeskyArrays a, const float* __restrict__ grad_w, size_t w_stride, int groups,
                         uint32_t stream_id, const float* __restrict__ extra_mean, const float* __restrict__ extra,
                         const StepState* states, float* __restrict__ partial) {
  SIMT_DYNAMIC_SHARED(Shared<D>, shared);
  Lanes column[D][columns<D>];
  const int b = blockIdx.x, r = simt::row(), lane = simt::lane_id(), d = size_of<D>(a.d);
  const size_t mean_at = a.stride * r + size_t(b) * d, at = a.factor_stride * r + size_t(b) * packed(d);
  const StepState& s = states[r];
  const float kl_weight = s.kl_now;
  const float kl = divergence<D>(column, *shared, a, r, b);
  if (lane == 0) partial[size_t(a.blocks) * r + b] = s.halted ? 0.f : kl;
  const float* __restrict__ inverse = shared->inverse;
  const float* __restrict__ factor = shared->factor;
  const float* __restrict__ scale = shared->scale;
  float* __restrict__ gradient = shared->gradient;
  float* __restrict__ mean_gradient = shared->mean_gradient;
  float* __restrict__ upstream = shared->upstream;
  float* __restrict__ noise = shared->noise;

#pragma unroll
  for (int i = 0; i < D; i += 2) {  // rows i and i + 1; from the first to the last, so it is in place
    if (i >= d) break;
    Lanes sum[columns<D>] = {}, next[columns<D>] = {};
#pragma unroll
    for (int k = i + 1; k < D; k++) {
      if (k >= d) break;
      const float* __restrict__ row = inverse + packed(k);
#pragma unroll
      for (int c = 0; c < columns<D>; c++) {
        sum[c] = fused(row[i], column[k][c], sum[c]);
        next[c] = fused(row[i + 1], column[k][c], next[c]);
      }
    }
#pragma unroll
    for (int c = 0; c < columns<D>; c++) {
      column[i][c] = kl_weight * fused(inverse[diagonal(i)], column[i][c], sum[c]);
      if (i + 1 < d) column[i + 1][c] = kl_weight * next[c];
    }
  }

  // The columns between the block's and the mean's are not used.
  for (int i = 4 * round_up(quads_of(d), whole_quads) + lane; i < reach<D> - 1; i += simt::warp_size) noise[i] = 0;
  for (int g = 0; grad_w && g < groups; g++) {
    __syncthreads();
    draw<D>(noise, d, uint32_t(g * a.blocks + b) * quads_of(d), s.noise, stream_id, s.step);
    stage(upstream, grad_w + w_stride * (size_t(r) * groups + g) + size_t(b) * d, d);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < D; i++) {
      if (i >= d) break;
      const float up = upstream[i];
#pragma unroll
      for (int c = 0; c < columns<D>; c++) column[i][c] = fused(up, load(noise, c), column[i][c]);
    }
  }

  // From columns to the stored order, from the first row to the last: a row's vectors reach into the next row, which is
  // written after it.
#pragma unroll
  for (int i = 0; i < D; i++) {
    if (i >= d) break;
#pragma unroll
    for (int c = 0; c < columns<D>; c++)
      if (vector > 1 || simt::lane_id() + c * simt::warp_size <= i)
        store(gradient + packed(i), c, scale[i] * column[i][c]);
    if (lane == simt::warp_size - 1) mean_gradient[i] = last_of(column[i][columns<D> - 1]);
  }
  __syncthreads();
  for (int i = lane; i < d; i += simt::warp_size) {
    const int first = packed(i);
    gradient[first + i] += dot(gradient + first, factor + first, i) + kl_weight * (shared->ratio[i] - 1.f);
  }
  __syncthreads();
  if (extra) add(gradient, extra + at, packed(d));
  if (extra_mean) add(mean_gradient, extra_mean + mean_at, d);
  const int moves = s.halted ? 0 : 1;
  adam_step(a.factor + at, a.factor_m + at, a.factor_v + at, gradient, moves * packed(d),
            {s.lr_scale, s.correction1, s.correction2});
  adam_step(a.mean + mean_at, a.mean_m + mean_at, a.mean_v + mean_at, mean_gradient, moves * d,
            {s.lr_mean, s.correction1, s.correction2});
}

// A block takes a replica: thread t adds up the partial sums t, t + T, ..., then the threads' sums are added in a fixed
// order.
constexpr int total_threads = 256;
__global__ void __launch_bounds__(total_threads)
    add_partials_kernel(double* __restrict__ kl, size_t kl_stride, const float* __restrict__ partial, int blocks,
                        bool add) {
  const int r = blockIdx.x;
  partial += size_t(blocks) * r;
  double sum = 0;
  SIMT_SIMD(reduction(+ : sum))
  for (int i = threadIdx.x; i < blocks; i += blockDim.x) sum += double(partial[i]);
  sum = simt::block_sum(sum);
  if (threadIdx.x == 0) kl[kl_stride * r] = add ? kl[kl_stride * r] + sum : sum;
}

// --------------------------------------------------------------------------------------------------------- launching
void check_arrays(const char* who, const CholeskyArrays& a) {
  check_blocks(who, a.blocks, a.d, a.replicas);
  if (a.replicas == 1) return;
  check_stride(who, "means", a.stride, size_t(a.blocks) * a.d);
  check_stride(who, "factors", a.factor_stride, size_t(a.blocks) * packed(a.d));
}

// Calls f.operator()<D>() with the D of the kernel for d.
template <class F>
void with_size(int d, F f) {
  if (d == 25) f.template operator()<25>();
  else if (d == 9) f.template operator()<9>();
  else f.template operator()<largest_block>();
}

template <int D>
simt::Blocks shape_of(int blocks, int rows) {
  return simt::blocks(blocks, simt::warp_size, sizeof(Shared<D>), rows);
}

void add_partials(double* kl, size_t kl_stride, const float* partial, const CholeskyArrays& a, bool add,
                  Stream stream) {
  simt::launch<add_partials_kernel>(simt::blocks(a.replicas, total_threads), stream, kl, kl_stride, partial, a.blocks,
                                    add);
}

}  // namespace

void cholesky_sample(float* w, size_t w_stride, const CholeskyArrays& a, int groups, const StepState* states,
                     uint32_t stream_id, Stream stream) {
  BATON_RANGE("cholesky_sample");
  check_arrays("cholesky_sample", a);
  if (groups < 1) throw InputError("cholesky_sample: " + std::to_string(groups) + " groups");
  if (groups * a.replicas > 1) check_stride("cholesky_sample", "draws", w_stride, size_t(a.blocks) * a.d);
  with_size(a.d, [&]<int D>() {
    simt::launch<cholesky_sample_kernel<D, false>>(
        shape_of<D>(a.blocks, a.replicas), stream, w, w_stride, static_cast<const float*>(a.mean), a.stride,
        static_cast<const float*>(a.factor), a.factor_stride, a.d, a.blocks, groups, states, 0, Key{}, stream_id);
  });
}

void cholesky_sample_draws(float* w, size_t w_stride, const float* mean, const float* factor, int blocks, int d,
                           int first_sample, int samples, Key key, uint32_t stream_id, Stream stream) {
  BATON_RANGE("cholesky_sample_draws");
  check_blocks("cholesky_sample_draws", blocks, d, 1);
  if (samples < 1) throw InputError("cholesky_sample_draws: " + std::to_string(samples) + " samples");
  if (samples > 1) check_stride("cholesky_sample_draws", "draws", w_stride, size_t(blocks) * d);
  with_size(d, [&]<int D>() {
    simt::launch<cholesky_sample_kernel<D, true>>(shape_of<D>(blocks, samples), stream, w, w_stride, mean, size_t(0),
                                                  factor, size_t(0), d, blocks, 1,
                                                  static_cast<const StepState*>(nullptr), first_sample, key, stream_id);
  });
}

void cholesky_step(const CholeskyArrays& a, const float* grad_w, size_t w_stride, int groups, uint32_t stream_id,
                   const float* extra_mean_grad, const float* extra_factor_grad, const StepState* states, double* kl,
                   size_t kl_stride, float* partial, Stream stream) {
  BATON_RANGE("cholesky_step");
  check_arrays("cholesky_step", a);
  if (grad_w && groups < 1) throw InputError("cholesky_step: " + std::to_string(groups) + " groups");
  if (grad_w && groups * a.replicas > 1) check_stride("cholesky_step", "draws", w_stride, size_t(a.blocks) * a.d);
  with_size(a.d, [&]<int D>() {
    simt::launch<cholesky_step_kernel<D>>(shape_of<D>(a.blocks, a.replicas), stream, a, grad_w, w_stride, groups,
                                          stream_id, extra_mean_grad, extra_factor_grad, states, partial);
  });
  add_partials(kl, kl_stride, partial, a, true, stream);
}

void cholesky_kl(double* kl, size_t kl_stride, const CholeskyArrays& a, float* partial, Stream stream) {
  BATON_RANGE("cholesky_kl");
  check_arrays("cholesky_kl", a);
  with_size(a.d, [&]<int D>() {
    simt::launch<cholesky_kl_kernel<D>>(shape_of<D>(a.blocks, a.replicas), stream, a, partial);
  });
  add_partials(kl, kl_stride, partial, a, false, stream);
}

}  // namespace baton
