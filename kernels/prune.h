// Pruning a Gaussian posterior by its signal-to-noise ratio |mean| / sd (Graves 2011; Blundell et al. 2015), or weights
// by their magnitude: the mean and sd of all weights below one threshold become exactly 0.
#pragma once
#include <vector>

#include "engine/runtime.h"

namespace baton {

enum class Ranking : int { signal_to_noise, magnitude };

// Tensors that may be pruned, in the flat store.
struct Stretch {
  int first, count;
};

// score[j] = |mean| / sd or |mean| of the stretches' weights, where j counts on from stretch to stretch. A weight that
// is pruned already (mean = 0 and sd = 0) has the score -1, one with only sd = 0 infinity. sd may be null for
// magnitudes.
void prune_scores(float* score, const float* mean, const float* sd, const std::vector<Stretch>&, Ranking, Stream);
// mean = sd = 0 where pruned[j] is set, j as above. sd may be null.
void prune_weights(float* mean, float* sd, const uint8_t* pruned, const std::vector<Stretch>&, Stream);

// Keeps pruned weights pruned. Where kept[i] is 0: mean = prior_mean = 0 and log_std = prior_log_std, so that the KL
// there is 0, and variance = 1e-30, so that its noise is negligible and its inverse finite. All are [n]. For a point
// estimate all but mean and kept are null.
void hold_pruned(float* mean, float* log_std, float* variance, float* prior_mean, const float* prior_log_std,
                 const float* kept, int n, Stream);
// The same for draws of the weights: w [draws][stride] is exactly 0 where kept [n] is 0 (n <= stride).
void zero_pruned(float* w, size_t stride, const float* kept, int n, int draws, Stream);

}  // namespace baton
