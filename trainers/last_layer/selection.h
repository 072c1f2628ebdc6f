// The choice of a batch of samples to label, by an acquisition function on a last layer's posterior (Huseljic et al.
// 2024): either all at once (the best b, or the function's own form for batches), or one after the other, where the
// posterior is updated in closed form with every label before the next choice.
#pragma once
#include <numeric>

#include "engine/io/dataset.h"
#include "kernels/acquisition.h"
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

// ------------------------------------------------------------------------------- what looking ahead needs as well

// The first `count` of a random order of 0 .. n - 1 (Fisher and Yates, from the front).
inline std::vector<int> draw_different(int n, int count, SplitMix64& random) {
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  for (int i = 0; i < count; i++) std::swap(order[i], order[i + int(random.below(uint64_t(n - i)))]);
  order.resize(count);
  return order;
}

// The candidates of a batch; a choice is a position in them. Their rows, and with `with_labels`, where they will be
// learned, their labels, gathered on the device in the given order. Throws InputError for a pool of another dim, a
// batch larger than the candidates, an index outside the pool or named twice, features that are not finite and labels
// that are missing or outside [0, C).
template <class Real>
struct Candidates {
  Candidates(Device& device, Arena& arena, const LastLayer<Real>& layer, const FeatureRows<Real>& pool,
             const std::vector<int>& candidates, int batch, bool with_labels)
      : count(int(candidates.size())), dim(pool.dim) {
    if (batch < 1 || batch > count)
      throw InputError("a batch of " + std::to_string(batch) + " from " + std::to_string(count) + " candidates");
    std::vector<char> there(std::max(pool.count, 0));
    for (int i : candidates) {
      if (i < 0 || i >= pool.count)
        throw InputError("a pool of " + std::to_string(pool.count) + " has no sample " + std::to_string(i));
      if (there[i]) throw InputError("sample " + std::to_string(i) + " of the pool is named twice");
      there[i] = 1;
    }
    x = place_rows(device, arena, pool.x, candidates, dim);
    check_features<Real>(device, {x, nullptr, count, dim}, layer.dim(), "candidate");
    if (!with_labels) return;
    if (!pool.labels) throw InputError("a selection that learns as it chooses needs the pool's labels");
    const std::vector<int32_t> all = download(device, pool.labels, pool.count);
    for (int i : candidates) host_labels.push_back(all[i]);
    check_labels(host_labels, layer.classes(), "candidate");
    labels = place(device, arena, host_labels);
  }
  const Real* row(int i) const { return x + size_t(i) * dim; }

  int count, dim;
  const Real* x;
  const int32_t* labels = nullptr;
  std::vector<int32_t> host_labels;
};

// `count` rows by the seeding of k-means++ (Arthur and Vassilvitskii 2007) over embeddings, beginning with `first`.
// Each further pick is the first row at which the running sum of squared distances (in double) to the nearest pick
// exceeds their sum times a uniform number of 53 bits; where nothing is left but copies of what is taken, the first row
// left.
template <class Real>
std::vector<int> draw_plus_plus(Device&, const Embeddings<Real>&, int first, int count, SplitMix64&);

}  // namespace baton
