// Bayesian gradient descent (Zeno et al. 2018, Algorithm 1): the update, its statistics and the trip-wire. With draws
// theta_k = mu + sigma e_k of all weights and g_k the gradient of the batch's summed loss at theta_k:
//
//   E1 = mean_k g_k,  E2 = mean_k g_k e_k
//   mu    <- mu - eta sigma^2 E1
//   sigma <- sigma sqrt(1 + x^2) - sigma x = sigma exp(-asinh x),   x = sigma E2 / 2
//
// exp(-asinh x) is 1 / (x + sqrt(1 + x^2)) for x >= 0 and |x| + sqrt(1 + x^2) below: no difference of near-equal terms,
// so sigma stays positive for every x. The update reads and writes 24 bytes a weight.
#include <cfloat>

#include "kernels/bgd.h"

namespace baton {

namespace {

constexpr int update_threads = 256;
constexpr int span = 4096;       // weights of a block
constexpr int block_values = 5;  // a block's partial results: largest, smallest, largest x, not finite, counted
constexpr int copies = 4;        // of a block's histogram, as neighbouring weights mostly fall into the same bin

struct Update {
  float* mean;
  float* sd;
  Moments moments;
  int count;
  BgdRule rule;
};

__device__ __forceinline__ float bounded(float e, float clamp) {  // an infinite clamp changes nothing; NaN stays NaN
  const float above = e > clamp ? clamp : e;
  return above < -clamp ? -clamp : above;
}

__device__ __forceinline__ int bin_of(float sd) {
  const int eighths = (__builtin_bit_cast(int, sd) >> 20) - (127 + sd_first_octave) * sd_bins_an_octave;
  return min(max(eighths, 0), sd_bins - 1);
}

// Writes to partial[0] whether this step must change nothing (1) or not (0), and clears the histogram.
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
      // Both cases are changes of sigma that are added: factors near 1 would round the same way in every step.
      const float less = old / (1.f + more), shrunk = size < 1.f ? fmaf(-less, more, old) : less;
      const float least_normal = shrunk < FLT_MIN ? FLT_MIN : shrunk;
      const float moved = x < 0.f ? fmaf(old, more, old) : least_normal;
      const float raised = moved < least ? least : moved, limited = raised > most ? most : raised;
      const float next_mean = old_mean - eta * old * old * e1;
      const int fine = (fabsf(next_mean) <= FLT_MAX) & (moved <= FLT_MAX) & (size <= FLT_MAX);
      const int alive = old > 0.f;
      // sd = 0 is a pruned weight; x = 0, as in a head that is not in use, leaves sigma's bits as they are.
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

// Running sums: upto[i] = histogram[0] + ... + histogram[i]. In each round every element adds the one that is `step`
// places before it, from one half of `upto` [2][sd_bins] to the other. Returns the half with the result.
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

// Reduces the blocks' partial results, finds the median in the histogram, and checks the trip-wire.
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
  for (int b = threadIdx.x; b < sd_bins; b += blockDim.x) {  // one bin holds the median, unless there is no weight
    const uint32_t below = b ? sums[b - 1] : 0u;
    if (2 * below < uint32_t(counted) && 2 * sums[b] >= uint32_t(counted)) {
      const int bits = (b + (127 + sd_first_octave) * sd_bins_an_octave) << 20;
      const float low = __builtin_bit_cast(float, bits), high = __builtin_bit_cast(float, bits + (1 << 20));
      // The bin's middle may lie outside the values that there are.
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
