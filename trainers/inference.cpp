#include "trainers/inference.h"

#include <algorithm>

#include "engine/error.h"

namespace baton {

Inference parse_inference(const std::string& text) {
  for (Inference i : all_inferences)
    if (text == name(i)) return i;
  throw InputError("unknown inference '" + text + "': map, sampled, softmax or committee");
}

const char* name(Inference i) {
  const char* const names[] = {"map", "sampled", "softmax", "committee"};
  return names[int(i)];
}

static void check_choices(const char* who, const std::vector<uint8_t>& chosen, const std::vector<uint8_t>& labels) {
  if (labels.empty() || chosen.empty() || chosen.size() % labels.size() != 0)
    throw InputError(std::string(who) + ": choices of whole draws over the labelled images are expected");
}

double sampled_accuracy(const std::vector<uint8_t>& chosen, const std::vector<uint8_t>& labels) {
  check_choices("sampled_accuracy", chosen, labels);
  size_t hits = 0;
  for (size_t i = 0; i < chosen.size(); i++) hits += chosen[i] == labels[i % labels.size()];
  return double(hits) / double(chosen.size());
}

double committee_accuracy(const std::vector<uint8_t>& chosen, const std::vector<uint8_t>& labels, int classes) {
  check_choices("committee_accuracy", chosen, labels);
  size_t hits = 0;
  std::vector<int> votes(classes);
  for (size_t n = 0; n < labels.size(); n++) {
    std::fill(votes.begin(), votes.end(), 0);
    for (size_t i = n; i < chosen.size(); i += labels.size()) {
      if (chosen[i] >= classes) throw InputError("committee_accuracy: a draw chose a class that is not there");
      votes[chosen[i]]++;
    }
    hits += std::max_element(votes.begin(), votes.end()) - votes.begin() == labels[n];
  }
  return double(hits) / double(labels.size());
}

void Measurement::add(const Measurement& m, int of) {
  for (Inference i : all_inferences) accuracies.all[int(i)] += m.accuracies.of(i) / of;
  metrics.nll += m.metrics.nll / of;
  metrics.ece += m.metrics.ece / of;
  metrics.entropy += m.metrics.entropy / of;
  metrics.mutual_information += m.metrics.mutual_information / of;
  samples = m.samples;
}

Measurement measure(Predictor& predictor, Posterior& posterior, int replica, const std::vector<uint8_t>& labels,
                    int classes, std::optional<Inference> own, bool all_ways, int samples, uint64_t seed) {
  Measurement m;
  m.samples = !posterior.uncertain() || (own == Inference::map && !all_ways) ? 0 : samples;
  const Predictions p = predictor.predict(posterior, replica, m.samples, seed, own.has_value());
  m.metrics = evaluate(p.probability, labels, classes, p.entropy, p.mutual_information);
  double map = m.metrics.accuracy;
  if (own && m.samples > 0 && (all_ways || own == Inference::map))
    map = evaluate(predictor.predict(posterior, replica, 0, 0).probability, labels, classes).accuracy;
  m.accuracies = {map, own ? sampled_accuracy(p.chosen, labels) : 0, m.metrics.accuracy,
                  own ? committee_accuracy(p.chosen, labels, classes) : 0};
  return m;
}

}  // namespace baton
