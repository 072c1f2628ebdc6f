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

}  // namespace baton
