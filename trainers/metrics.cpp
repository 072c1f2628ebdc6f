#include "trainers/metrics.h"

#include <algorithm>
#include <cmath>
#include <string>

#include "engine/error.h"

namespace baton {

Metrics evaluate(const std::vector<float>& probability, const std::vector<uint8_t>& labels, int classes,
                 const std::vector<float>& entropy, const std::vector<float>& mutual_information) {
  const size_t n = labels.size();
  if (n == 0 || classes < 1 || probability.size() != n * classes)
    throw InputError("evaluate: " + std::to_string(probability.size()) + " probabilities for " + std::to_string(n) +
                     " labels of " + std::to_string(classes) + " classes");
  if ((!entropy.empty() && entropy.size() != n) || (!mutual_information.empty() && mutual_information.size() != n))
    throw InputError("evaluate: entropies and mutual informations must be as many as labels");
  constexpr int bins = 15;
  double confidence[bins] = {}, correct[bins] = {};
  Metrics m;
  for (size_t i = 0; i < n; i++) {
    const float* p = &probability[i * classes];
    const int best = int(std::max_element(p, p + classes) - p), hit = best == labels[i];
    const int bin = std::clamp(int(p[best] * bins), 0, bins - 1);
    confidence[bin] += p[best];
    correct[bin] += hit;
    m.accuracy += hit;
    m.nll -= std::log(std::max(double(p[labels[i]]), 1e-12));
    if (!entropy.empty()) m.entropy += entropy[i];
    if (!mutual_information.empty()) m.mutual_information += mutual_information[i];
  }
  for (int b = 0; b < bins; b++) m.ece += std::abs(confidence[b] - correct[b]);
  for (double* x : {&m.accuracy, &m.nll, &m.ece, &m.entropy, &m.mutual_information}) *x /= double(n);
  return m;
}

}  // namespace baton
