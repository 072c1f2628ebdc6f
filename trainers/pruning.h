// Pruning what a posterior has learned (Zeno et al. 2018, section 4.1): a share of its weights, biases excepted, is set
// to 0 exactly, those of the lowest signal-to-noise ratio |mean| / sigma or of the lowest magnitude, under one
// threshold for the whole network.
#pragma once
#include <functional>

#include "engine/io/runlog.h"
#include "engine/io/safetensors.h"
#include "layers/posteriors/posterior.h"

namespace baton {

// Prunes each of `fractions` by every ranking that the posterior has (signal-to-noise where it holds standard
// deviations), judges what is left, and puts the weights back. error: of the weights as they are; it may throw, and the
// weights then stay pruned. pruned: called after each judgement by the first ranking, with the fraction, while the
// weights are pruned; may be empty. Returns {"error": of the whole network, "weights", "results": [{"ranking",
// "fraction", "threshold", "weights_left", "error", "error_ratio", "layers": share that is left, "bytes_dense",
// "bytes_sparse"}]}.
json prune_and_judge(Device&, Posterior&, const std::vector<double>& fractions, const std::function<double()>& error,
                     const std::function<void(double fraction)>& pruned);

// Adds a ".mask" to every tensor of a model's file: which weights are not 0 exactly. Biases are whole.
void add_masks(TensorFile&, const ParameterLayout&);

}  // namespace baton
