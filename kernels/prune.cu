// Scores for pruning, and pruning: elementwise over stretches of the flat store, with a launch for each stretch. Not
// meant for every step.
//
//   signal_to_noise: score = |mean| / sd, infinite where sd = 0;  magnitude: score = |mean|;  -1 where mean = sd = 0
//
// A score takes 12 bytes and 4 FLOPs, or 8 bytes and 1 FLOP without sd. Pruning reads a byte for each weight, and
// writes 8 for each that is pruned.
#include "kernels/prune.h"

namespace baton {

namespace {

__global__ void signal_kernel(float* __restrict__ score, const float* __restrict__ mean, const float* __restrict__ sd,
                              int n) {
  const int i = simt::thread_item();
  if (i >= n) return;
  const float size = fabsf(mean[i]), noise = sd[i];
  const float alone = size == 0.f ? -1.f : INFINITY;  // the score where there is no noise, in place of 0 / 0
  score[i] = noise == 0.f ? alone : size / noise;
}

__global__ void magnitude_kernel(float* __restrict__ score, const float* __restrict__ mean,
                                 const float* __restrict__ sd, int n) {
  const int i = simt::thread_item();
  if (i >= n) return;
  const float size = fabsf(mean[i]);
  const int gone = sd ? (size == 0.f) & (sd[i] == 0.f) : 0;
  score[i] = gone ? -1.f : size;
}

__global__ void prune_kernel(float* __restrict__ mean, float* __restrict__ sd, const uint8_t* __restrict__ pruned,
                             int n) {
  const int i = simt::thread_item();
  if (i >= n || !pruned[i]) return;
  mean[i] = 0;
  if (sd) sd[i] = 0;
}

__global__ void hold_kernel(float* __restrict__ mean, float* __restrict__ log_std, float* __restrict__ variance,
                            float* __restrict__ prior_mean, const float* __restrict__ prior_log_std,
                            const float* __restrict__ kept, int n) {
  const int i = simt::thread_item();
  if (i >= n || kept[i] != 0.f) return;
  mean[i] = 0;
  if (!log_std) return;
  log_std[i] = prior_log_std[i];
  variance[i] = 1e-30f;
  prior_mean[i] = 0;
}

__global__ void zero_kernel(float* __restrict__ w, size_t stride, const float* __restrict__ kept, int n) {
  const int i = simt::thread_item();
  if (i < n && kept[i] == 0.f) w[stride * simt::row() + i] = 0;
}

// Calls f(place in the store, place in the scores, count) for every stretch.
template <class F>
void each_stretch(const char* who, const std::vector<Stretch>& stretches, F f) {
  for (const Stretch& s : stretches)
    if (s.first < 0 || s.count < 0)
      throw InputError(std::string(who) + ": a stretch of " + std::to_string(s.count) + " weights from place " +
                       std::to_string(s.first));
  size_t j = 0;
  for (const Stretch& s : stretches) {
    if (s.count > 0) f(size_t(s.first), j, s.count);
    j += size_t(s.count);
  }
}

}  // namespace

void prune_scores(float* score, const float* mean, const float* sd, const std::vector<Stretch>& stretches,
                  Ranking ranking, Stream stream) {
  BATON_RANGE("prune_scores");
  if (ranking == Ranking::signal_to_noise && !sd)
    throw InputError("prune_scores: signal to noise of weights without sd");
  each_stretch("prune_scores", stretches, [=](size_t first, size_t j, int n) {
    const float* noise = sd ? sd + first : nullptr;
    if (ranking == Ranking::signal_to_noise)
      simt::launch<signal_kernel>(simt::each(n), stream, score + j, mean + first, noise, n);
    else simt::launch<magnitude_kernel>(simt::each(n), stream, score + j, mean + first, noise, n);
  });
}

void hold_pruned(float* mean, float* log_std, float* variance, float* prior_mean, const float* prior_log_std,
                 const float* kept, int n, Stream stream) {
  BATON_RANGE("hold_pruned");
  if (log_std && !(variance && prior_mean && prior_log_std))
    throw InputError("hold_pruned: a Gaussian has log_std, variance, prior_mean and prior_log_std");
  simt::launch<hold_kernel>(simt::each(n), stream, mean, log_std, variance, prior_mean, prior_log_std, kept, n);
}

void zero_pruned(float* w, size_t stride, const float* kept, int n, int draws, Stream stream) {
  BATON_RANGE("zero_pruned");
  if (n < 0 || draws < 0 || size_t(n) > stride)
    throw InputError("zero_pruned: " + std::to_string(n) + " weights in rows of " + std::to_string(stride));
  simt::launch<zero_kernel>(simt::each(n, draws), stream, w, stride, kept, n);
}

void prune_weights(float* mean, float* sd, const uint8_t* pruned, const std::vector<Stretch>& stretches,
                   Stream stream) {
  BATON_RANGE("prune_weights");
  each_stretch("prune_weights", stretches, [=](size_t first, size_t j, int n) {
    simt::launch<prune_kernel>(simt::each(n), stream, mean + first, sd ? sd + first : nullptr, pruned + j, n);
  });
}

}  // namespace baton
