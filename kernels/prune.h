// Pruning a Gaussian posterior by its signal-to-noise ratio |mean| / sd (Graves 2011; Blundell et al. 2015), or weights
// by their magnitude: the lowest of all weights, under one threshold, become exactly 0, mean and sd.
#pragma once
#include <vector>

#include "engine/runtime.h"

namespace baton {

enum class Ranking : int { signal_to_noise, magnitude };

// Tensors that may be pruned, in the flat store.
struct Stretch {
  int first, count;
};

// score[j] over the stretches' weights, one stretch after the other (j from 0): |mean| / sd, or |mean|. A weight that
// is pruned already (mean = 0 and sd = 0) scores -1; sd = 0 alone scores infinity. sd null: magnitude only.
void prune_scores(float* score, const float* mean, const float* sd, const std::vector<Stretch>&, Ranking, Stream);
// mean = sd = 0 (sd may be null) where pruned[j] is set, j as above.
void prune_weights(float* mean, float* sd, const uint8_t* pruned, const std::vector<Stretch>&, Stream);

// Holds pruned weights where they are: where kept[i] is 0, mean = prior_mean = 0, log_std = prior_log_std, so that the
// KL there is 0, and variance = 1e-30, so that no noise to speak of comes from it and its inverse stays finite. All
// [n]; but mean and kept, all are null for a point estimate.
void hold_pruned(float* mean, float* log_std, float* variance, float* prior_mean, const float* prior_log_std,
                 const float* kept, int n, Stream);
// Draws of the weights, w [draws][stride]: exactly 0 where kept [n] is (n <= stride).
void zero_pruned(float* w, size_t stride, const float* kept, int n, int draws, Stream);

}  // namespace baton
