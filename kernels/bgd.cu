// Bayesian gradient descent (Zeno et al. 2018, Algorithm 1). With draws theta_k = mu + sigma e_k of all weights and g_k
// the gradient of the batch's summed loss at theta_k:
//
//   E1 = mean_k g_k,  E2 = mean_k g_k e_k
//   mu    <- mu - eta sigma^2 E1
//   sigma <- sigma sqrt(1 + x^2) - sigma x = sigma exp(-asinh x),   x = sigma E2 / 2
//
// exp(-asinh x) is 1 / (x + sqrt(1 + x^2)) for x >= 0 and |x| + sqrt(1 + x^2) below: no difference of near-equal terms,
// so sigma stays positive for every x.
//
// e_k is never kept: its counter gives it again. The moments of a dense layer come without its K gradients:
//   fused (GPU): a block owns a tile of the weights, multiplies dy_k^T x_k for k = 1..K in registers and folds each
//     product into two more register tiles, with the noise made in between; 2 out in K batch FLOPs of products, 4
//     normals a thread and draw; dy and x are read (in / 64 and out / 64 times, from L2), the moments written once.
//   by tiles (host): the same order with a BLAS product into a tile that stays in the core's cache.
//
// Bytes: draw_weights 8 count + 4 count K; accumulate_moments 4 count K + 8 or 16 count; bgd_update 24 count.
#include "kernels/bgd.h"

#include <cfloat>

#if !defined(BATON_CUDA)
#include "engine/blas_tiles_host.h"
#endif

namespace baton {

namespace {

struct Counter {  // of a step's noise
  Key key;
  uint32_t step;
};

__device__ __forceinline__ float lane_of(const float4& e, int lane) {
  return lane == 0 ? e.x : lane == 1 ? e.y : lane == 2 ? e.z : e.w;
}

__device__ __forceinline__ Counter counter_of(const StepState* states, const Counter& given) {
  return states ? Counter{states[0].noise, states[0].step} : given;
}

// A block's stretch of weights. Its noise goes through shared memory, so that everything else is read and written
// weight after weight: coalesced on the GPU, without shuffles between vectors on the host.
constexpr int stretch = 1024;
constexpr int stretch_threads = stretch / 4;

// e[i] for the weights [first, first + stretch) of the store, first a multiple of four.
__device__ __forceinline__ void draw_stretch(float* __restrict__ e, int first, uint32_t draw, const Counter& c) {
  SIMT_SIMD()
  for (int q = threadIdx.x; q < stretch / 4; q += blockDim.x) {
    const float4 n = normal4(c.key, uint32_t(first / 4 + q), stream_weights, c.step, draw);
    e[4 * q] = n.x;
    e[4 * q + 1] = n.y;
    e[4 * q + 2] = n.z;
    e[4 * q + 3] = n.w;
  }
  __syncthreads();
}

__global__ void __launch_bounds__(stretch_threads)
    draw_kernel(float* w, size_t stride, const float* mean, const float* sd, int count, int first_draw,
                const StepState* states, Counter given) {
  __shared__ float e[stretch];
  const int first = int(blockIdx.x) * stretch, n = min(stretch, count - first), k = simt::row();
  draw_stretch(e, first, uint32_t(first_draw + k), counter_of(states, given));
  float* __restrict__ to = w + stride * k + first;
  const float* __restrict__ m = mean + first;
  const float* __restrict__ s = sd + first;
  SIMT_SIMD()
  for (int i = threadIdx.x; i < n; i += blockDim.x) to[i] = m[i] + s[i] * e[i];
}

void draw(float* w, size_t stride, const float* mean, const float* sd, int count, int first_draw, int draws,
          const StepState* states, Counter given, Stream stream) {
  simt::launch<draw_kernel>(simt::blocks((count + stretch - 1) / stretch, stretch_threads, 0, draws), stream, w, stride,
                            mean, sd, count, first_draw, states, given);
}

// ------------------------------------------------------------------------------------------------------- moments
// All draws of a stretch: the sums are read and written once.
__global__ void __launch_bounds__(stretch_threads)
    accumulate_kernel(float* sum, float* noise, const float* grad, size_t grad_stride, int first, int count,
                      DrawnPass pass, const StepState* __restrict__ states) {
  __shared__ float e[stretch];
  const Counter c{states[0].noise, states[0].step};
  const int from = int(blockIdx.x) * stretch, n = min(stretch, count - from);
  float* __restrict__ s = sum + from;
  float* __restrict__ t = noise + from;
  for (int k = 0; k < pass.draws; k++) {
    draw_stretch(e, first + from, uint32_t(pass.first_draw + k), c);
    const float* __restrict__ g = grad + grad_stride * k + from;
    if (pass.add || k > 0) {
      SIMT_SIMD()
      for (int i = threadIdx.x; i < n; i += blockDim.x) {
        s[i] += g[i];
        t[i] += g[i] * e[i];
      }
    } else {
      SIMT_SIMD()
      for (int i = threadIdx.x; i < n; i += blockDim.x) {
        s[i] = g[i];
        t[i] = g[i] * e[i];
      }
    }
    __syncthreads();  // e is drawn anew
  }
}

// The same, weight by weight: for tensors at places that four does not divide.
__global__ void accumulate_each_kernel(float* __restrict__ sum, float* __restrict__ noise,
                                       const float* __restrict__ grad, size_t grad_stride, int first, int count,
                                       DrawnPass pass, const StepState* __restrict__ states) {
  const int i = simt::thread_item();
  if (i >= count) return;
  const Counter c{states[0].noise, states[0].step};
  const uint32_t place = uint32_t(first + i);
  float s = pass.add ? sum[i] : 0.f, n = pass.add ? noise[i] : 0.f;
  for (int k = 0; k < pass.draws; k++) {
    const float4 e = normal4(c.key, place / 4, stream_weights, c.step, uint32_t(pass.first_draw + k));
    const float g = grad[grad_stride * k + i];
    s += g;
    n += g * lane_of(e, int(place % 4));
  }
  sum[i] = s;
  noise[i] = n;
}

#if !defined(BATON_CUDA)
// A tile's gradients of one draw, g [count], onto the sums of the weights [from, from + count) of a tensor at `first`.
// Host code between two BLAS calls and not a kernel, so it makes its noise itself: draw_stretch() belongs to a block.
void fold_run(float* __restrict__ sum, float* __restrict__ noise, const float* __restrict__ g, int from, int count,
              int first, uint32_t draw, bool add, const Counter& c) {
  float e[stretch];
  for (int at = 0; at < count; at += stretch) {
    const int n = min(stretch, count - at);
    const uint32_t quad = uint32_t((first + from + at) / 4);
#pragma omp simd
    for (int q = 0; q < stretch / 4; q++) {
      const float4 v = normal4(c.key, quad + uint32_t(q), stream_weights, c.step, draw);
      e[4 * q] = v.x;
      e[4 * q + 1] = v.y;
      e[4 * q + 2] = v.z;
      e[4 * q + 3] = v.w;
    }
    float* __restrict__ s = sum + from + at;
    float* __restrict__ t = noise + from + at;
    const float* __restrict__ h = g + at;
    if (add)
      for (int i = 0; i < n; i++) {
        s[i] += h[i];
        t[i] += h[i] * e[i];
      }
    else
      for (int i = 0; i < n; i++) {
        s[i] = h[i];
        t[i] = h[i] * e[i];
      }
  }
}
#endif

// ---- the fused product. A block's tile of the weights, and a thread's part of it. One thread a block: one small tile.
constexpr bool one_thread = simt::warp_size == 1;
constexpr int tile_out = one_thread ? 4 : 64, tile_in = one_thread ? 32 : 64, depth = 16;
constexpr int part_out = one_thread ? tile_out : 4, part_in = one_thread ? tile_in : 4;
constexpr int product_threads = (tile_out / part_out) * (tile_in / part_in);
constexpr int pitch_out = tile_out + 4, pitch_in = tile_in + 4;  // rows of shared memory start in other banks

struct ProductShape {
  int first, out, in, batch;
};

// rows [tile] of a [depth] x [columns] piece of x, zeros outside of it.
__device__ __forceinline__ void load_piece(float* to, int pitch, int tile, const float* __restrict__ x, int columns,
                                           int column, int row, int rows) {
  for (int i = threadIdx.x; i < depth * tile; i += blockDim.x) {
    const int d = i / tile, j = i % tile;
    const bool inside = row + d < rows && column + j < columns;
    to[d * pitch + j] = inside ? x[size_t(row + d) * columns + column + j] : 0.f;
  }
}

__global__ void __launch_bounds__(256)
    product_kernel(float* __restrict__ sum, float* __restrict__ noise, Matrices dy, Matrices x, ProductShape shape,
                   DrawnPass pass, const StepState* __restrict__ states) {
  __shared__ float a[depth * pitch_out];
  __shared__ float b[depth * pitch_in];
  const int tiles = (shape.in + tile_in - 1) / tile_in, t = threadIdx.x;
  const int out0 = int(blockIdx.x) / tiles * tile_out, in0 = int(blockIdx.x) % tiles * tile_in;
  const int my_out = t / (tile_in / part_in) * part_out, my_in = t % (tile_in / part_in) * part_in;
  const Counter c{states[0].noise, states[0].step};
  float s[part_out][part_in], n[part_out][part_in];
  SIMT_UNROLL
  for (int i = 0; i < part_out; i++) {
    SIMT_UNROLL
    for (int j = 0; j < part_in; j++) s[i][j] = n[i][j] = 0.f;
  }
  for (int k = 0; k < pass.draws; k++) {
    float g[part_out][part_in];
    SIMT_UNROLL
    for (int i = 0; i < part_out; i++) {
      SIMT_UNROLL
      for (int j = 0; j < part_in; j++) g[i][j] = 0.f;
    }
    for (int row = 0; row < shape.batch; row += depth) {
      load_piece(a, pitch_out, tile_out, dy.data + dy.stride * k, shape.out, out0, row, shape.batch);
      load_piece(b, pitch_in, tile_in, x.data + x.stride * k, shape.in, in0, row, shape.batch);
      __syncthreads();
      for (int d = 0; d < depth; d++) {
        SIMT_UNROLL
        for (int i = 0; i < part_out; i++) {
          const float ai = a[d * pitch_out + my_out + i];
          SIMT_UNROLL
          for (int j = 0; j < part_in; j++) g[i][j] = fmaf(ai, b[d * pitch_in + my_in + j], g[i][j]);
        }
      }
      __syncthreads();
    }
    const uint32_t number = uint32_t(pass.first_draw + k);
    SIMT_UNROLL
    for (int i = 0; i < part_out; i++) {
      const uint32_t place =
          uint32_t(shape.first) + uint32_t(out0 + my_out + i) * uint32_t(shape.in) + uint32_t(in0 + my_in);
      uint32_t quad = place / 4;
      float4 e = normal4(c.key, quad, stream_weights, c.step, number);
      SIMT_UNROLL
      for (int j = 0; j < part_in; j++) {
        if ((place + j) / 4 != quad) {  // never within a part of 4 where four divides the row
          quad = (place + j) / 4;
          e = normal4(c.key, quad, stream_weights, c.step, number);
        }
        s[i][j] += g[i][j];
        n[i][j] += g[i][j] * lane_of(e, int((place + j) % 4));
      }
    }
  }
  SIMT_UNROLL
  for (int i = 0; i < part_out; i++) {
    SIMT_UNROLL
    for (int j = 0; j < part_in; j++) {
      const int row = out0 + my_out + i, column = in0 + my_in + j;
      if (row < shape.out && column < shape.in) {
        const size_t at = size_t(shape.first) + size_t(row) * shape.in + column;
        sum[at] = (pass.add ? sum[at] : 0.f) + s[i][j];
        noise[at] = (pass.add ? noise[at] : 0.f) + n[i][j];
      }
    }
  }
}

void check_product(int first, int out, int in, int batch) {
  if (first % 4 != 0 || first < 0 || out < 1 || in < 1 || batch < 1)
    throw InputError("the moments of a product [" + std::to_string(out) + "][" + std::to_string(in) + "] of " +
                     std::to_string(batch) + " examples at place " + std::to_string(first) +
                     ": sizes are positive, and the place divides by four");
}

// -------------------------------------------------------------------------------------------------------- update
constexpr int update_threads = 256;
constexpr int span = 4096;       // weights a block
constexpr int block_values = 5;  // that a block leaves: largest, smallest, largest x, not finite, counted
constexpr int copies = 4;        // of a block's histogram: neighbours mostly meet in one bin

struct Update {
  float* mean;
  float* sd;
  Moments moments;
  int count;
  BgdRule rule;
};

__device__ __forceinline__ float bounded(float e, float clamp) {  // clamp: infinite for none; NaN stays
  const float above = e > clamp ? clamp : e;
  return above < -clamp ? -clamp : above;
}

__device__ __forceinline__ int bin_of(float sd) {
  const int eighths = (__builtin_bit_cast(int, sd) >> 20) - (127 + sd_first_octave) * sd_bins_an_octave;
  return min(max(eighths, 0), sd_bins - 1);
}

// Whether this step must leave everything alone goes to partial[0]; the histogram starts anew.
__global__ void begin_update_kernel(SigmaStatistics* statistics, const TripWire* wire, const StepState* states,
                                    int replicas, float* partial) {
  const int i = simt::thread_item();
  if (i >= sd_bins) return;
  int halted = wire ? wire->halted_step : 0;
  for (int r = 0; r < replicas; r++) halted |= states[r].halted;
  if (!halted) statistics->histogram[i] = 0;
  if (i == 0) partial[0] = halted ? 1.f : 0.f;
}

__device__ __forceinline__ void count_span(SigmaStatistics* statistics, const float* __restrict__ sd, int n) {
  __shared__ uint32_t bins[copies * sd_bins];
  for (int i = threadIdx.x; i < copies * sd_bins; i += blockDim.x) bins[i] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const float s = sd[i];
    if (s > 0.f) simt::add_shared(&bins[(i & (copies - 1)) * sd_bins + bin_of(s)], 1u);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < sd_bins; i += blockDim.x) {
    uint32_t total = 0;
    for (int c = 0; c < copies; c++) total += bins[c * sd_bins + i];
    if (total) atomicAdd(&statistics->histogram[i], total);
  }
}

__device__ __forceinline__ void leave(float* __restrict__ values, float largest, float smallest, float largest_x,
                                      float nonfinite, float counted) {
  largest = simt::block_max(largest);
  smallest = -simt::block_max(-smallest);
  largest_x = simt::block_max(largest_x);
  nonfinite = simt::block_sum(nonfinite);
  counted = simt::block_sum(counted);
  if (threadIdx.x == 0) {
    values[0] = largest;
    values[1] = smallest;
    values[2] = largest_x;
    values[3] = nonfinite;
    values[4] = counted;
  }
}

__global__ void update_kernel(Update u, const StepState* __restrict__ states, SigmaStatistics* statistics,
                              float* __restrict__ partial) {
  const int first = int(blockIdx.x) * span, n = min(span, u.count - first);
  const bool skip = partial[0] != 0.f;
  const float eta = states[0].lr_mean, scale = u.rule.gradient_scale,
              clamp = u.rule.clamp > 0.f ? u.rule.clamp : INFINITY;
  const float least = u.rule.least_sd, most = u.rule.largest_sd > 0.f ? u.rule.largest_sd : FLT_MAX;
  float* __restrict__ mean = u.mean + first;
  float* __restrict__ sd = u.sd + first;
  const float* __restrict__ sum = u.moments.sum + first;
  const float* __restrict__ noise = u.moments.noise + first;
  float largest = 0.f, smallest = FLT_MAX, largest_x = 0.f, nonfinite = 0.f, counted = 0.f;
  if (!skip) {
    SIMT_SIMD(reduction(max : largest, largest_x) reduction(min : smallest) reduction(+ : nonfinite, counted))
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      const float old = sd[i], old_mean = mean[i];
      const float e1 = bounded(sum[i] * scale, clamp), e2 = bounded(noise[i] * scale, clamp);
      const float x = 0.5f * old * e2, size = fabsf(x);
      const float root = size < 1e9f ? sqrtf(fmaf(size, size, 1.f)) : size;
      const float more = size + size * (size / (1.f + root));  // exp(asinh |x|) - 1
      // Both written as changes of sigma: with factors near 1 every step would round the same way.
      const float less = old / (1.f + more), shrunk = size < 1.f ? fmaf(-less, more, old) : less;
      const float least_normal = shrunk < FLT_MIN ? FLT_MIN : shrunk;
      const float moved = x < 0.f ? fmaf(old, more, old) : least_normal;
      const float raised = moved < least ? least : moved, limited = raised > most ? most : raised;
      const float next_mean = old_mean - eta * old * old * e1;
      const int fine = (fabsf(next_mean) <= FLT_MAX) & (moved <= FLT_MAX) & (size <= FLT_MAX);
      const int alive = old > 0.f;
      // sd = 0 is a pruned weight, and x = 0 (a head that is not in use) leaves the very bits.
      const int moves = fine & alive & (x != 0.f);
      const float next = moves ? limited : old;
      sd[i] = next;
      mean[i] = fine ? next_mean : old_mean;
      const float now = alive ? next : FLT_MAX, shown_x = size <= FLT_MAX ? size : FLT_MAX;
      largest = largest > next ? largest : next;
      smallest = smallest < now ? smallest : now;
      largest_x = largest_x > shown_x ? largest_x : shown_x;
      nonfinite += fine ? 0.f : 1.f;
      counted += alive ? 1.f : 0.f;
    }
  }
  leave(partial + 1 + size_t(block_values) * blockIdx.x, largest, smallest, largest_x, nonfinite, counted);
  count_span(statistics, sd, skip ? 0 : n);
}

__global__ void look_kernel(const float* __restrict__ sd, int count, SigmaStatistics* statistics,
                            float* __restrict__ partial) {
  const int first = int(blockIdx.x) * span, n = min(span, count - first);
  float largest = 0.f, smallest = FLT_MAX, counted = 0.f;
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const float s = sd[first + i];
    largest = fmaxf(largest, s);
    smallest = fminf(smallest, s > 0.f ? s : FLT_MAX);
    counted += s > 0.f ? 1.f : 0.f;
  }
  leave(partial + 1 + size_t(block_values) * blockIdx.x, largest, smallest, 0.f, 0.f, counted);
  count_span(statistics, sd + first, n);
}

// upto[i] becomes histogram[0] + ... + histogram[i]: in each round every element takes in the one `step` before it,
// from one half of `upto` [2][sd_bins] to the other. Returns the half with the result.
__device__ __forceinline__ const uint32_t* running_sums(uint32_t* upto, const uint32_t* histogram) {
  for (int i = threadIdx.x; i < sd_bins; i += blockDim.x) upto[i] = histogram[i];
  __syncthreads();
  uint32_t *from = upto, *to = upto + sd_bins;
  for (int step = 1; step < sd_bins; step *= 2) {
    for (int i = threadIdx.x; i < sd_bins; i += blockDim.x) to[i] = from[i] + (i >= step ? from[i - step] : 0u);
    __syncthreads();
    uint32_t* next = from;
    from = to;
    to = next;
  }
  return from;
}

// The blocks' values in one, the median from the histogram, and the wire.
__global__ void finish_update_kernel(SigmaStatistics* statistics, TripWire* wire, StepState* states, int replicas,
                                     BgdRule rule, const float* __restrict__ partial, int blocks) {
  float largest = 0.f, smallest = FLT_MAX, largest_x = 0.f;
  int nonfinite = 0, counted = 0;
  const bool skip = partial[0] != 0.f;
  for (int b = threadIdx.x; b < blocks; b += blockDim.x) {
    const float* values = partial + 1 + size_t(block_values) * b;
    largest = fmaxf(largest, values[0]);
    smallest = fminf(smallest, values[1]);
    largest_x = fmaxf(largest_x, values[2]);
    nonfinite += int(values[3]);
    counted += int(values[4]);
  }
  largest = simt::block_max(largest);
  smallest = -simt::block_max(-smallest);
  largest_x = simt::block_max(largest_x);
  __shared__ int totals[2];
  __shared__ float largest_of_all, smallest_of_all, median;
  __shared__ uint32_t upto[2 * sd_bins];
  if (threadIdx.x == 0) {
    totals[0] = totals[1] = 0;
    largest_of_all = largest;
    smallest_of_all = smallest;
    median = 0.f;
  }
  __syncthreads();
  simt::add_shared(&totals[0], nonfinite);
  simt::add_shared(&totals[1], counted);
  const uint32_t* sums = running_sums(upto, statistics->histogram);
  nonfinite = totals[0];
  counted = totals[1];
  for (int b = threadIdx.x; b < sd_bins; b += blockDim.x) {  // one bin has the middle, unless there is no weight
    const uint32_t below = b ? sums[b - 1] : 0u;
    if (2 * below < uint32_t(counted) && 2 * sums[b] >= uint32_t(counted)) {
      const int bits = (b + (127 + sd_first_octave) * sd_bins_an_octave) << 20;
      const float low = __builtin_bit_cast(float, bits), high = __builtin_bit_cast(float, bits + (1 << 20));
      // Of the values that there are.
      median = fminf(fmaxf(0.5f * (low + high), smallest_of_all), largest_of_all);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0 && !skip) {
    statistics->largest = largest;
    statistics->smallest = counted ? smallest : 0.f;
    statistics->median = median;
    statistics->largest_x = largest_x;
    statistics->nonfinite = nonfinite;
    statistics->weights = counted;
    if (wire) {
      const int step = int(states[0].step);
      if (!wire->warned_step && largest > rule.warn_ratio * rule.initial_sd) {
        wire->warned_step = step;
        wire->largest = largest;
        wire->median = median;
        wire->largest_x = largest_x;
      }
      if (nonfinite || largest > rule.halt_ratio * rule.initial_sd) {
        wire->halted_step = step;
        wire->halted_largest = largest;
        wire->nonfinite = nonfinite;
        for (int r = 0; r < replicas; r++) states[r].halted = step;
      }
    }
  }
}

__global__ void begin_look_kernel(SigmaStatistics* statistics, float* partial) {
  const int i = simt::thread_item();
  if (i >= sd_bins) return;
  statistics->histogram[i] = 0;
  if (i == 0) partial[0] = 0.f;
}

int blocks_of(int count) { return (count + span - 1) / span; }

}  // namespace

void draw_weights(float* w, size_t stride, const float* mean, const float* sd, int count, int first_draw, int draws,
                  const StepState* states, Stream stream) {
  BATON_RANGE("draw_weights");
  draw(w, stride, mean, sd, count, first_draw, draws, states, {}, stream);
}

void draw_weights(float* w, size_t stride, const float* mean, const float* sd, int count, int first_draw, int draws,
                  Key key, Stream stream) {
  BATON_RANGE("draw_weights");
  draw(w, stride, mean, sd, count, first_draw, draws, nullptr, {key, 0}, stream);
}

void accumulate_moments(Moments m, const float* grad, size_t grad_stride, int first, int count, DrawnPass pass,
                        const StepState* states, Stream stream) {
  BATON_RANGE("accumulate_moments");
  if (first % 4 == 0)
    simt::launch<accumulate_kernel>(simt::blocks((count + stretch - 1) / stretch, stretch_threads), stream,
                                    m.sum + first, m.noise + first, grad, grad_stride, first, count, pass, states);
  else
    simt::launch<accumulate_each_kernel>(simt::each(count), stream, m.sum + first, m.noise + first, grad, grad_stride,
                                         first, count, pass, states);
}

void product_moments_fused(Device& device, Moments m, int first, int out, int in, int batch, Matrices dy, Matrices x,
                           DrawnPass pass, const StepState* states) {
  BATON_RANGE("product_moments");
  check_product(first, out, in, batch);
  const int blocks = ((out + tile_out - 1) / tile_out) * ((in + tile_in - 1) / tile_in);
  simt::launch<product_kernel>(simt::blocks(blocks, product_threads), device.stream(), m.sum, m.noise, dy, x,
                               ProductShape{first, out, in, batch}, pass, states);
}

#if !defined(BATON_CUDA)
void product_moments_by_tiles(Device&, Moments m, int first, int out, int in, int batch, Matrices dy, Matrices x,
                              DrawnPass pass, const StepState* states) {
  check_product(first, out, in, batch);
  const Counter c{states[0].noise, states[0].step};
  for_product_tiles(out, in, batch, dy, x, pass.draws, [&](int k, int row, int rows, const float* g) {
    // Whole rows: one run of the weights, which starts at a multiple of four.
    fold_run(m.sum + first, m.noise + first, g, row * in, rows * in, first, uint32_t(pass.first_draw + k),
             pass.add || k > 0, c);
  });
}
#endif

void accumulate_product_moments(Device& device, Moments m, int first, int out, int in, int batch, Matrices dy,
                                Matrices x, DrawnPass pass, const StepState* states) {
#if defined(BATON_CUDA) || defined(SIMT_EMULATE)
  product_moments_fused(device, m, first, out, in, batch, dy, x, pass, states);
#else
  product_moments_by_tiles(device, m, first, out, in, batch, dy, x, pass, states);
#endif
}

void bgd_update(float* mean, float* sd, Moments moments, int count, const BgdRule& rule, SigmaStatistics* statistics,
                TripWire* wire, StepState* states, int replicas, float* partial, Stream stream) {
  BATON_RANGE("bgd_update");
  if (!(rule.initial_sd > 0) || !(rule.gradient_scale > 0) || rule.clamp < 0 || rule.least_sd < 0 ||
      (rule.largest_sd > 0 && rule.largest_sd < rule.least_sd))
    throw InputError("bgd_update: the initial sd and the gradients' scale are positive, bounds are not negative");
  simt::launch<begin_update_kernel>(simt::each(sd_bins), stream, statistics, wire, states, replicas, partial);
  simt::launch<update_kernel>(simt::blocks(blocks_of(count), update_threads), stream,
                              Update{mean, sd, moments, count, rule}, states, statistics, partial);
  simt::launch<finish_update_kernel>(simt::blocks(1, update_threads), stream, statistics, wire, states, replicas, rule,
                                     partial, blocks_of(count));
}

size_t bgd_partials(int count) { return 1 + size_t(block_values) * blocks_of(count); }

void sigma_statistics(SigmaStatistics* statistics, const float* sd, int count, float* partial, Stream stream) {
  BATON_RANGE("sigma_statistics");
  simt::launch<begin_look_kernel>(simt::each(sd_bins), stream, statistics, partial);
  simt::launch<look_kernel>(simt::blocks(blocks_of(count), update_threads), stream, sd, count, statistics, partial);
  simt::launch<finish_update_kernel>(simt::blocks(1, update_threads), stream, statistics,
                                     static_cast<TripWire*>(nullptr), static_cast<StepState*>(nullptr), 0, BgdRule{},
                                     partial, blocks_of(count));
}

float sd_bin_edge(int bin) {
  return __builtin_bit_cast(float, (bin + (127 + sd_first_octave) * sd_bins_an_octave) << 20);
}

}  // namespace baton
