// How good a batch of predictions is, from class probabilities on the host.
#pragma once
#include <cstdint>
#include <vector>

namespace baton {

struct Metrics {
  double accuracy = 0;            // fraction
  double nll = 0;                 // mean negative log-likelihood, nats
  double ece = 0;                 // expected calibration error, 15 equal-width bins of confidence (Guo et al. 2017)
  double entropy = 0;             // mean predictive entropy, nats
  double mutual_information = 0;  // mean, nats: what the weights' uncertainty adds
};

// probability [n][classes]; labels [n]; entropy, mutual_information [n] (may be empty). A probability of the true class
// below 1e-12 counts as 1e-12. Throws InputError when the sizes disagree or n is 0.
Metrics evaluate(const std::vector<float>& probability, const std::vector<uint8_t>& labels, int classes,
                 const std::vector<float>& entropy, const std::vector<float>& mutual_information);

// Brier's score for several classes: mean over images of sum_c (p_c - [c = label])^2; 0 to 2.
double brier(const std::vector<float>& probability, const std::vector<uint8_t>& labels, int classes);

// The reliability diagram: equal-width bins of the chosen class's probability; an empty bin has count 0 and NaNs.
struct ReliabilityBin {
  double confidence, accuracy;  // means over the bin's images
  int64_t count;
};
std::vector<ReliabilityBin> reliability(const std::vector<float>& probability, const std::vector<uint8_t>& labels,
                                        int classes, int bins = 15);

// [label][chosen class], counts; the first of equal probabilities is chosen.
std::vector<std::vector<int64_t>> confusion_matrix(const std::vector<float>& probability,
                                                   const std::vector<uint8_t>& labels, int classes);

// How well a score tells two sets apart, as an uncertainty tells foreign images (out of distribution) from known ones:
// the probability that a foreign image scores higher than a known one, equals counting half (the area under the ROC
// curve, exact by ranks), and the share of known images that reach (>=) the threshold which 95 % of the foreign ones
// reach (FPR at 95 % TPR; lower is better). Throws InputError if a set is empty or a score is NaN.
struct Separation {
  double auroc, fpr95;
};
Separation separation(const std::vector<float>& known, const std::vector<float>& foreign);

}  // namespace baton
