// How a prediction comes from a posterior (Zeno et al. 2018, section 4), and how good each way is.
#pragma once
#include <optional>

#include "trainers/metrics.h"
#include "trainers/predictor.h"

namespace baton {

// The weights at the mean; the mean accuracy of sampled networks (Zeno et al.'s default); the class of the mean
// softmax; a majority vote, ties to the first class.
enum class Inference { map, sampled, softmax, committee };
constexpr Inference all_inferences[] = {Inference::map, Inference::sampled, Inference::softmax, Inference::committee};
Inference parse_inference(const std::string& name);  // "map", ...; InputError
const char* name(Inference);

struct InferenceAccuracies {
  double all[4] = {};  // fractions by Inference; all alike for a point estimate
  double of(Inference i) const { return all[int(i)]; }
};
// chosen [draws][images]: the classes that the draws chose.
double sampled_accuracy(const std::vector<uint8_t>& chosen, const std::vector<uint8_t>& labels);
double committee_accuracy(const std::vector<uint8_t>& chosen, const std::vector<uint8_t>& labels, int classes);

// How good the predictions of a test set are.
struct Measurement {
  InferenceAccuracies accuracies;
  Metrics metrics;
  int samples = 0;                       // draws of the weights
  void add(const Measurement&, int of);  // a share of 1 / of, for a mean over tasks
};
// own: the way that counts; none: the average prediction alone. all_ways: by every way, else by those that come with
// `own`. samples: draws of the weights, numbered by `seed`; none of a point estimate.
Measurement measure(Predictor&, Posterior&, int replica, const std::vector<uint8_t>& labels, int classes,
                    std::optional<Inference> own, bool all_ways, int samples, uint64_t seed);

}  // namespace baton
