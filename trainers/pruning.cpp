#include "trainers/pruning.h"

#include <algorithm>
#include <cmath>

#include "engine/select.h"
#include "kernels/prune.h"

namespace baton {

json prune_and_judge(Device& device, Posterior& posterior, const std::vector<double>& fractions,
                     const std::function<double()>& error, const std::function<void(double fraction)>& pruned) {
  const ParameterLayout& layout = posterior.store().layout();
  const auto& arrays = posterior.store().arrays();
  float* means = posterior.store().at("mean");
  float* deviations = std::count(arrays.begin(), arrays.end(), "std") ? posterior.store().at("std") : nullptr;
  std::vector<Stretch> stretches;  // weights, not biases: under one threshold
  int weights = 0;
  for (const TensorSpec& t : layout.tensors()) {
    if (t.bias) continue;
    stretches.push_back({int(t.offset), int(t.size)});
    weights += int(t.size);
  }
  const std::vector<float> mean = download(device, means, layout.stride());
  const std::vector<float> sd = deviations ? download(device, deviations, layout.stride()) : std::vector<float>();
  Arena arena;
  float* score = arena.take<float>(weights);
  uint8_t* marked = arena.take<uint8_t>(weights);
  const double whole = error();
  std::vector<Ranking> rankings{Ranking::magnitude};
  if (deviations) rankings.insert(rankings.begin(), Ranking::signal_to_noise);
  json list = json::array();
  for (Ranking ranking : rankings)
    for (double fraction : fractions) {
      prune_scores(score, means, deviations, stretches, ranking, device.stream());
      const Selection selection = mark_lowest(device, marked, score, weights, int(std::lround(fraction * weights)));
      prune_weights(means, deviations, marked, stretches, device.stream());
      const double left = error();
      const int64_t values = deviations ? 2 : 1;
      json layers = json::object();
      for (const TensorSpec& t : layout.tensors()) {
        if (t.bias) continue;
        const std::vector<float> w = posterior.store().read(device, "mean", 0, t);
        layers[t.name] = double(w.size() - std::count(w.begin(), w.end(), 0.f)) / double(w.size());
      }
      list.push_back({{"ranking", ranking == Ranking::magnitude ? "magnitude" : "signal-to-noise"},
                      {"fraction", fraction},
                      {"threshold", selection.threshold},
                      {"weights_left", weights - selection.count},
                      {"error", left},
                      {"error_ratio", left / std::max(whole, 1e-12)},
                      {"layers", layers},
                      {"bytes_dense", 4 * values * weights},  // an index with each value of the sparse form
                      {"bytes_sparse", (4 * values + 4) * int64_t(weights - selection.count)}});
      if (pruned && ranking == rankings[0]) pruned(fraction);
      upload(device, means, mean);
      if (deviations) upload(device, deviations, sd);
    }
  return {{"error", whole}, {"weights", weights}, {"results", list}};
}

void add_masks(TensorFile& file, const ParameterLayout& layout) {
  for (const TensorSpec& t : layout.tensors()) {
    std::vector<uint8_t> kept;
    for (float mean : file.at(t.name + ".mean", t.shape).as<float>()) kept.push_back(t.bias || mean != 0);
    file.tensors[t.name + ".mask"] = Tensor::of<uint8_t>(kept, t.shape);
  }
}

}  // namespace baton
