// Active learning with a last layer that learns while it chooses (Huseljic et al. 2024): a batch of samples to label is
// chosen by an acquisition function, either all at once (top-b, or the function's own batch form) or one after the
// other, the posterior updated in closed form with every label before the next choice. After each batch the layer is
// fitted anew to all that is labelled.
#pragma once
#include "trainers/last_layer/last_layer.h"

namespace baton {

enum class Acquisition {
  random,
  margin,   // least p_1st - p_2nd of the linked prediction
  entropy,  // most predictive entropy
  bald,     // most mutual information between prediction and weights (Houlsby et al. 2011), by Monte Carlo links
  badge,    // gradient embeddings (e_yhat - p) (x) phi (Ash et al. 2020), never formed. All at once: k-means++ seeding,
            // from the largest on. One after the other: the largest under the updated posterior, which is k-means++
            // for one sample at a time
  bait,  // greedily least tr(P^-1 F) with F the pool's mean Fisher matrix, D x D, P the posterior's precision, forward
         // over 2 b samples and back to b (Ash et al. 2021)
};
Acquisition acquisition_of(const std::string& name);  // InputError
const char* name_of(Acquisition);

struct SelectionOptions {
  Acquisition acquisition = Acquisition::margin;
  bool sequential = false;  // learn every label before the next choice
  UpdateOptions update;     // of the learning between choices
  LinkOptions link;         // of margin, entropy and badge; bald draws link.draws times
  uint64_t seed = 0;        // of random, and of badge all at once; the others take the first of equals
};

// Chooses `batch` different rows of the pool among `candidates` (indices into it) in the order of choice. Sequential
// selection leaves the layer updated with what was chosen, whose labels are the pool's; otherwise nothing changes.
// One after the other, the update takes the place of BADGE's diversity term: with D^2 sampling against the picks so far
// on top of it, little was left of the gain on LeNet-5's features (bench/results/laplace_update_cpu).
// Throws InputError for a batch larger than the candidates, an index outside the pool or a wrong dim.
// Cost of a sequential choice: O(D^2 + n C D) with n candidates; their variances follow v_i -= kappa (phi_i . s)^2.
template <class Real>
std::vector<int> select_batch(Device&, LastLayer<Real>&, const FeatureRows<Real>& pool,
                              const std::vector<int>& candidates, int batch, const SelectionOptions&);

// The upper baseline: of `trials` candidate batches (a third random, a third one sample from each of `batch` k-means
// clusters, a third random among the samples of above-mean margin uncertainty), the one after whose closed-form update
// the test set's cross-entropy is least. It looks at test labels: an oracle, not a method. All updates at once, in the
// samples' own space. The layer does not change.
struct LookAheadOptions {
  int trials = 300;
  UpdateOptions update;
  uint64_t seed = 0;
};
template <class Real>
std::vector<int> look_ahead_batch(Device&, LastLayer<Real>&, const FeatureRows<Real>& pool,
                                  const std::vector<int>& candidates, int batch, const FeatureRows<Real>& test,
                                  const LookAheadOptions&);

struct ActiveLearningPlan {
  LastLayerOptions layer;
  SelectionOptions selection;
  bool look_ahead = false;  // the upper baseline instead of an acquisition function
  int trials = 300;
  int initial = 20, cycles = 10, batch = 10;
  uint64_t seed = 0;  // of the initial samples: stratified, so that every class is there if it can be
};
struct ActiveLearningCurve {
  std::vector<int> labelled;             // samples: initial, initial + batch, ...
  std::vector<double> accuracy, nll;     // of the linked prediction on the test set, after fitting all of these
  std::vector<std::vector<int>> chosen;  // of every cycle
  double selection_seconds = 0;          // choosing, the updates between choices among it
};
// Throws Stopped, between two cycles or while fitting, when a signal asks the program to end.
template <class Real>
ActiveLearningCurve run_active_learning(Device&, const FeatureRows<Real>& pool, const FeatureRows<Real>& test,
                                        int classes, const ActiveLearningPlan&);

}  // namespace baton
