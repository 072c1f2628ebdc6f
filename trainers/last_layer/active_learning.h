// An experiment of active learning: a last layer is fitted to a few labelled samples of a pool, chooses a batch to be
// labelled (selection.h), is fitted anew to all that is labelled, and so on.
#pragma once
#include "trainers/last_layer/selection.h"

namespace baton {

// The upper baseline: the batch after whose closed-form update the test set's cross-entropy is least. It looks at test
// labels, so it is an oracle and not a method.
struct LookAheadOptions {
  int trials = 300;
  LastLayerUpdateOptions update;
  uint64_t seed = 0;
};
// The best of `trials` candidate batches: in turn a random one, one sample from each of `batch` k-means clusters, and a
// random one among the samples whose margin is below the mean. All updates are made at once, in the samples' own space;
// the layer does not change. Throws InputError as select_batch, for labels that are missing or outside [0, C), and for
// more samples than most_update_samples a batch; RunError where no trial's update is finite.
template <class Real>
std::vector<int> look_ahead_batch(Device&, LastLayer<Real>&, const FeatureRows<Real>& pool,
                                  const std::vector<int>& candidates, int batch, const FeatureRows<Real>& test,
                                  const LookAheadOptions&);

struct ActiveLearningOptions {
  LastLayerOptions layer;
  SelectionOptions selection;  // cycle t selects with the seed SplitMix64(selection.seed, t).next()
  bool look_ahead = false;     // the upper baseline (look_ahead_batch) instead of an acquisition function
  int trials = 300;            // of look_ahead
  int initial = 20, cycles = 10, batch = 10;
  uint64_t seed = 0;  // of the initial samples, which are stratified so that every class is there if it can be
};
struct ActiveLearningCurve {
  std::vector<int> labelled;             // samples: initial, initial + batch, ...
  std::vector<double> accuracy, nll;     // of the linked prediction on the test set, after fitting all of these
  std::vector<std::vector<int>> chosen;  // of every cycle
  double selection_seconds = 0;          // choosing, with the updates between choices
};
// Throws InputError for counts that the pool does not hold, another dim and labels that are missing or outside
// [0, classes); Stopped, between two cycles or while fitting, when a signal asks the program to end.
template <class Real>
ActiveLearningCurve run_active_learning(Device&, const FeatureRows<Real>& pool, const FeatureRows<Real>& test,
                                        int classes, const ActiveLearningOptions&);

}  // namespace baton
