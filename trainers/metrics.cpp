#include "trainers/metrics.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "engine/error.h"

namespace baton {
namespace {

void check_sizes(const char* who, const std::vector<float>& probability, const std::vector<uint8_t>& labels,
                 int classes) {
  const size_t n = labels.size();
  if (n == 0 || classes < 1 || probability.size() != n * classes)
    throw InputError(std::string(who) + ": " + std::to_string(probability.size()) + " probabilities for " +
                     std::to_string(n) + " labels of " + std::to_string(classes) + " classes");
  const int last = *std::max_element(labels.begin(), labels.end());
  if (last >= classes)
    throw InputError(std::string(who) + ": label " + std::to_string(last) + " of " + std::to_string(classes) +
                     " classes");
}

// The class that image i's probabilities choose, the first of equals.
int chosen(const std::vector<float>& probability, size_t i, int classes) {
  const float* p = &probability[i * classes];
  return int(std::max_element(p, p + classes) - p);
}

// Bins of sums over their images, where `accuracy` counts the correct ones.
std::vector<ReliabilityBin> bin_by_confidence(const std::vector<float>& probability, const std::vector<uint8_t>& labels,
                                              int classes, int bins) {
  std::vector<ReliabilityBin> all(bins);
  for (size_t i = 0; i < labels.size(); i++) {
    const int best = chosen(probability, i, classes);
    const float p = probability[i * classes + best];
    ReliabilityBin& bin = all[std::clamp(int(p * bins), 0, bins - 1)];
    bin.confidence += p;
    bin.accuracy += best == labels[i];
    bin.count++;
  }
  return all;
}

}  // namespace

Metrics evaluate(const std::vector<float>& probability, const std::vector<uint8_t>& labels, int classes,
                 const std::vector<float>& entropy, const std::vector<float>& mutual_information) {
  check_sizes("evaluate", probability, labels, classes);
  const size_t n = labels.size();
  if ((!entropy.empty() && entropy.size() != n) || (!mutual_information.empty() && mutual_information.size() != n))
    throw InputError("evaluate: entropies and mutual informations must be as many as labels");
  Metrics m;
  for (size_t i = 0; i < n; i++) {
    m.nll -= std::log(std::max(double(probability[i * classes + labels[i]]), 1e-12));
    if (!entropy.empty()) m.entropy += entropy[i];
    if (!mutual_information.empty()) m.mutual_information += mutual_information[i];
  }
  for (const ReliabilityBin& bin : bin_by_confidence(probability, labels, classes, 15)) {
    m.accuracy += bin.accuracy;
    m.ece += std::abs(bin.confidence - bin.accuracy);
  }
  for (double* x : {&m.accuracy, &m.nll, &m.ece, &m.entropy, &m.mutual_information}) *x /= double(n);
  return m;
}

double brier(const std::vector<float>& probability, const std::vector<uint8_t>& labels, int classes) {
  check_sizes("brier", probability, labels, classes);
  double sum = 0;
  for (size_t i = 0; i < labels.size(); i++)
    for (int c = 0; c < classes; c++) {
      const double error = double(probability[i * classes + c]) - (c == labels[i]);
      sum += error * error;
    }
  return sum / double(labels.size());
}

std::vector<ReliabilityBin> reliability(const std::vector<float>& probability, const std::vector<uint8_t>& labels,
                                        int classes, int bins) {
  check_sizes("reliability", probability, labels, classes);
  if (bins < 1) throw InputError("reliability: " + std::to_string(bins) + " bins, at least 1 expected");
  std::vector<ReliabilityBin> diagram = bin_by_confidence(probability, labels, classes, bins);
  for (ReliabilityBin& bin : diagram)
    for (double* sum : {&bin.confidence, &bin.accuracy})
      *sum /= bin.count ? double(bin.count) : std::numeric_limits<double>::quiet_NaN();
  return diagram;
}

std::vector<std::vector<int64_t>> confusion_matrix(const std::vector<float>& probability,
                                                   const std::vector<uint8_t>& labels, int classes) {
  check_sizes("confusion_matrix", probability, labels, classes);
  std::vector<std::vector<int64_t>> counts(classes, std::vector<int64_t>(classes));
  for (size_t i = 0; i < labels.size(); i++) counts[labels[i]][chosen(probability, i, classes)]++;
  return counts;
}

// AUROC is Mann and Whitney's U over the number of pairs: a foreign image wins over the known ones that score lower,
// and counts half against its equals, which makes (lower + not higher) / 2. Whole numbers, so nothing is rounded.
Separation separation(const std::vector<float>& known, const std::vector<float>& foreign) {
  if (known.empty() || foreign.empty())
    throw InputError("separation: " + std::to_string(known.size()) + " scores of known images and " +
                     std::to_string(foreign.size()) + " of foreign ones, at least one of each expected");
  for (const std::vector<float>* scores : {&known, &foreign})
    for (size_t i = 0; i < scores->size(); i++)
      if (std::isnan((*scores)[i]))
        throw InputError(std::string("separation: score ") + std::to_string(i) + " of the " +
                         (scores == &known ? "known" : "foreign") + " images is NaN");
  std::vector<float> low = known, high = foreign;
  std::sort(low.begin(), low.end());
  std::sort(high.begin(), high.end());
  const size_t n = low.size(), m = high.size();
  size_t lower = 0, not_higher = 0;
  uint64_t halves = 0;
  for (float score : high) {
    while (lower < n && low[lower] < score) lower++;
    while (not_higher < n && low[not_higher] <= score) not_higher++;
    halves += lower + not_higher;
  }
  // The highest threshold that at least 95 % of the foreign scores reach; a known image that equals it is taken for a
  // foreign one too, as one threshold decides over both.
  const size_t reach = (95 * m + 99) / 100;
  const float threshold = high[m - reach];
  const auto taken = low.end() - std::lower_bound(low.begin(), low.end(), threshold);
  return {double(halves) / (2 * double(n) * double(m)), double(taken) / double(n)};
}

}  // namespace baton
