#include "trainers/task_pruning.h"

#include <algorithm>
#include <cmath>

#include "engine/select.h"
#include "kernels/prune.h"

namespace baton {

namespace {

// Weights, not biases: under one threshold.
std::vector<Stretch> prunable(const ParameterLayout& layout) {
  std::vector<Stretch> stretches;
  for (const TensorSpec& t : layout.tensors())
    if (!t.bias) stretches.push_back({int(t.offset), int(t.size)});
  return stretches;
}

json layers_left(Device& device, Learner& learner) {
  json layers = json::object();
  for (const TensorSpec& t : learner.store().layout().tensors()) {
    if (t.bias) continue;
    const std::vector<float> w = learner.store().read(device, "mean", 0, t);
    layers[t.name] = double(w.size() - std::count(w.begin(), w.end(), 0.f)) / double(w.size());
  }
  return layers;
}

}  // namespace

json prune_and_judge(Device& device, Learner& learner, const std::vector<double>& fractions,
                     const std::function<double()>& error, const std::function<void(double fraction)>& pruned) {
  const ParameterLayout& layout = learner.store().layout();
  const std::vector<Stretch> stretches = prunable(layout);
  int weights = 0;
  for (const Stretch& s : stretches) weights += s.count;
  const std::vector<float> mean = download(device, learner.means(), layout.stride());
  const std::vector<float> sd =
      learner.deviations() ? download(device, learner.deviations(), layout.stride()) : std::vector<float>();
  Arena arena;
  float* score = arena.take<float>(weights);
  uint8_t* marked = arena.take<uint8_t>(weights);
  const double whole = error();
  std::vector<Ranking> rankings{Ranking::magnitude};
  if (learner.deviations()) rankings.insert(rankings.begin(), Ranking::signal_to_noise);
  json list = json::array();
  for (Ranking ranking : rankings)
    for (double fraction : fractions) {
      prune_scores(score, learner.means(), learner.deviations(), stretches, ranking, device.stream());
      const int lowest = int(std::lround(fraction * weights));
      const Selection selection = mark_lowest(device, marked, score, weights, lowest);
      prune_weights(learner.means(), learner.deviations(), marked, stretches, device.stream());
      const double left = error();
      json one;
      one["ranking"] = ranking == Ranking::magnitude ? "magnitude" : "signal-to-noise";
      one["fraction"] = fraction;
      one["threshold"] = selection.threshold;
      one["weights_left"] = weights - selection.count;
      one["error"] = left;
      one["error_ratio"] = left / std::max(whole, 1e-12);
      one["layers"] = layers_left(device, learner);
      const int64_t values = learner.deviations() ? 2 : 1;
      one["bytes_dense"] = 4 * values * weights;
      one["bytes_sparse"] = (4 * values + 4) * int64_t(weights - selection.count);  // and an index each
      list.push_back(one);
      if (pruned && ranking == rankings[0]) pruned(fraction);
      upload(device, learner.means(), mean);
      if (learner.deviations()) upload(device, learner.deviations(), sd);
    }
  return {{"error", whole}, {"weights", weights}, {"results", list}};
}

void add_pruned(TensorFile& file, Device& device, Learner& learner) {
  for (const TensorSpec& t : learner.store().layout().tensors()) {
    const std::vector<float> mean = learner.store().read(device, "mean", 0, t);
    const std::vector<float> sd =
        learner.deviations() ? learner.store().read(device, "std", 0, t) : std::vector<float>();
    std::vector<int32_t> index;
    std::vector<float> left_mean, left_sd;
    for (size_t i = 0; i < mean.size(); i++)
      if (t.bias || mean[i] != 0 || (!sd.empty() && sd[i] != 0)) {
        index.push_back(int32_t(i));
        left_mean.push_back(mean[i]);
        if (!sd.empty()) left_sd.push_back(sd[i]);
      }
    const int64_t n = int64_t(index.size());
    file.tensors[t.name + ".index"] = Tensor::of<int32_t>(index, {n});
    file.tensors[t.name + ".mean"] = Tensor::of<float>(left_mean, {n});
    if (!sd.empty()) file.tensors[t.name + ".std"] = Tensor::of<float>(left_sd, {n});
    file.metadata[t.name + ".shape"] = shape_text(t.shape);
  }
}

}  // namespace baton
