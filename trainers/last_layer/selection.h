// The choice of a batch of samples to label, by an acquisition function on a last layer's posterior (Huseljic et al.
// 2024): either all at once (the best b, or the function's own form for batches), or one after the other, where the
// posterior is updated in closed form with every label before the next choice.
#pragma once
#include "trainers/last_layer/last_layer.h"

namespace baton {

enum class Acquisition {
  random,
  margin,   // the least p_1st - p_2nd of the linked prediction
  entropy,  // the most predictive entropy
  bald,     // the most mutual information between prediction and weights (Houlsby et al. 2011), by Monte Carlo links
  badge,  // gradient embeddings (e_yhat - p) (x) phi (Ash et al. 2020), which are never formed. All at once: k-means++
          // seeding from the largest on. One after the other: the largest under the updated posterior, which is
          // k-means++ for one sample at a time
  bait,   // greedily the least tr(P^-1 F), with F the pool's mean Fisher matrix [D x D] and P the posterior's
          // precision; all at once, forward over 2 b samples and back to b (Ash et al. 2021)
};
inline Names names(Acquisition) {
  return {"acquisition function", {"random", "margin", "entropy", "bald", "badge", "bait"}};
}

struct SelectionOptions {
  Acquisition acquisition = Acquisition::margin;
  bool sequential = false;        // learn every label before the next choice
  LastLayerUpdateOptions update;  // of the learning between choices
  LinkOptions link;               // of margin, entropy and badge; bald draws link.draws times
  uint64_t seed = 0;  // SplitMix64 of random, and of badge all at once; the others take the first of equal scores
};

// Chooses `batch` different rows of the pool among `candidates` (indices into it), in the order of choice. Sequential
// selection teaches the layer every choice by the pool's labels, at O(D^2 + n C D) a choice with n candidates;
// otherwise the layer does not change. BADGE has no D^2 sampling in sequential selection: with it, little was left of
// the gain of the updates (bench/results/laplace_update_cpu). Throws InputError for a batch larger than the candidates,
// an index outside the pool and a pool of another dim.
template <class Real>
std::vector<int> select_batch(Device&, LastLayer<Real>&, const FeatureRows<Real>& pool,
                              const std::vector<int>& candidates, int batch, const SelectionOptions&);

}  // namespace baton
