// Bayesian gradient descent (Zeno, Golan, Hoffer and Soudry 2018, Algorithm 1) over the flat parameter store: K draws
// of all weights a step, the moments of their gradients, and one update of every mean and standard deviation.
//
// The noise of the weight at place i of the store in draw k of a step is e(k, i) = lane i mod 4 of
// normal4(noise, i / 4, stream_weights, step, k). It is drawn again wherever it is needed, and kept nowhere.
#pragma once
#include "engine/blas.h"
#include "kernels/step_state.h"

namespace baton {

// w[stride * k + i] = mean[i] + sd[i] e(first_draw + k, i) for i < count, k < draws. states[0] gives step and key.
void draw_weights(float* w, size_t stride, const float* mean, const float* sd, int count, int first_draw, int draws,
                  const StepState* states, Stream);
// The same for predictions: the given key, step 0.
void draw_weights(float* w, size_t stride, const float* mean, const float* sd, int count, int first_draw, int draws,
                  Key, Stream);

// Sums over the draws of a step, each [stride] of the store: sum = sum_k g_k, noise = sum_k g_k e(k, .), where g_k is
// the gradient of draw k's loss.
struct Moments {
  float* sum = nullptr;
  float* noise = nullptr;
};
// The draws that a backward pass ran on: [first_draw, first_draw + draws) of the step. With `add` the sums continue
// (+=), else they begin (=).
struct DrawnPass {
  int first_draw = 0, draws = 1;
  bool add = false;
};
// Adds gradients that are in memory to the moments of the weights at places [first, first + count): grad
// [draws][grad_stride], the first `count` elements of each row.
void accumulate_moments(Moments, const float* grad, size_t grad_stride, int first, int count, DrawnPass,
                        const StepState* states, Stream);
// Adds the gradients of a dense layer's weights [out][in] at place `first` (a multiple of 4) without storing them:
//   g_k = dy_k^T x_k,  dy [draws][batch][out], x [draws][batch][in] (strides as in Matrices; 0: shared).
// On the GPU one kernel multiplies and accumulates over k in registers; on the host g_k exists a tile at a time.
void accumulate_product_moments(Device&, Moments, int first, int out, int in, int batch, Matrices dy, Matrices x,
                                DrawnPass, const StepState* states);
// The two ways in which it is done, for their tests and benchmarks. By tiles is the host's: RunError on a GPU.
void product_moments_by_tiles(Device&, Moments, int first, int out, int in, int batch, Matrices dy, Matrices x,
                              DrawnPass, const StepState* states);
void product_moments_fused(Device&, Moments, int first, int out, int in, int batch, Matrices dy, Matrices x, DrawnPass,
                           const StepState* states);

// ---- the update. By default it does not deviate from the paper.
struct BgdRule {
  float gradient_scale = 1;                 // turns the sums into E: 1 / K
  float clamp = 0;                          // of |E[g]| and |E[g e]|; 0: none
  float least_sd = 0, largest_sd = 0;       // bounds of sigma; 0: none
  float initial_sd = 0;                     // the trip-wire compares sigma with it
  float warn_ratio = 10, halt_ratio = 100;  // of the largest sigma to initial_sd
};

// Statistics of a step, gathered by the update itself. Weights with sigma = 0 (pruned) are not counted.
constexpr int sd_bins = 256, sd_bins_an_octave = 8, sd_first_octave = -24;  // bins of sigma: [2^-24, 2^8)
struct SigmaStatistics {
  float largest, smallest, median;  // of the new sigma; the median to within a bin (a sixteenth)
  float largest_x;                  // of |sigma E[g e] / 2|
  int32_t nonfinite;                // weights whose update was not finite: they were left as they were
  int32_t weights;                  // counted
  uint32_t histogram[sd_bins];      // bin: 8 (floor(log2 sigma) + 24) + the eighth of its octave, clipped
};
struct TripWire {
  int32_t warned_step;  // the first step (of the run) whose largest sigma passed warn_ratio initial_sd; 0: none
  int32_t halted_step;  // the step that passed halt_ratio or was not finite: the states are halted there
  float largest, median, largest_x;  // at warned_step
  float halted_largest;              // at halted_step
  int32_t nonfinite;                 // at halted_step
};

// With E1 = sum gradient_scale, E2 = noise gradient_scale, x = sd E2 / 2, both from the old sd, eta =
// states[0].lr_mean:
//   mean -= eta sd^2 E1,   sd = sd exp(-asinh x)
// which is Algorithm 1's sd sqrt(1 + x^2) - sd x without its cancellation. An element whose result is not finite keeps
// its old values. `statistics` describes the step; the trip-wire keeps what happened first. If one of the `replicas`
// states is halted (its loss was not finite), or if the wire has halted, nothing is done. Where the wire halts, it
// halts all states. partial: scratch of bgd_partials(count) floats.
void bgd_update(float* mean, float* sd, Moments, int count, const BgdRule&, SigmaStatistics* statistics, TripWire*,
                StepState* states, int replicas, float* partial, Stream);
size_t bgd_partials(int count);
// The statistics of given standard deviations, without an update (largest_x = 0).
void sigma_statistics(SigmaStatistics*, const float* sd, int count, float* partial, Stream);

// The lower edge of a bin of the histogram.
float sd_bin_edge(int bin);

}  // namespace baton
