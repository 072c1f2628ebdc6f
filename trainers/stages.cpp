#include "trainers/stages.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/error.h"
#include "engine/io/dataset.h"

namespace baton {

int Stages::first(int stage) const { return std::accumulate(sizes.begin(), sizes.begin() + stage, 0); }

Stages split_into_parts(int images, int parts, const std::vector<uint64_t>& seeds, bool augment) {
  Stages stages;
  for (uint64_t seed : seeds) {
    const Stages one = tasks_in_turn(split_parts(images, parts, seed));
    stages.sizes = one.sizes;
    stages.order.push_back(one.order[0]);
  }
  stages.augment.assign(stages.sizes.size(), augment);
  return stages;
}

Stages tasks_in_turn(const std::vector<std::vector<int32_t>>& examples) {
  Stages stages;
  stages.order.emplace_back();
  for (const auto& task : examples) {
    stages.order[0].insert(stages.order[0].end(), task.begin(), task.end());
    stages.sizes.push_back(int(task.size()));
  }
  return stages;
}

Stages whole_set(int images, bool augment) {
  std::vector<int32_t> all(images);
  std::iota(all.begin(), all.end(), 0);
  Stages stages = tasks_in_turn({all});
  stages.augment = {augment};
  return stages;
}

std::vector<std::vector<int32_t>> permute_pixels(int tasks, int pixels, uint64_t seed) {
  if (tasks < 1 || pixels < 1) throw InputError("permuted tasks: at least one task and one pixel");
  std::vector<std::vector<int32_t>> orders(tasks, std::vector<int32_t>(pixels));
  for (int t = 0; t < tasks; t++) {
    std::iota(orders[t].begin(), orders[t].end(), 0);
    if (t == 0) continue;
    SplitMix64 random(seed, uint64_t(t));
    for (int i = pixels - 1; i > 0; i--) std::swap(orders[t][i], orders[t][random.below(uint64_t(i) + 1)]);
  }
  return orders;
}

void reorder_pixels(Images& images, const std::vector<int32_t>& order) {
  const std::vector<uint8_t> before = images.pixels;
  for (size_t first = 0; first < before.size(); first += order.size())
    for (size_t i = 0; i < order.size(); i++) images.pixels[first + i] = before[first + size_t(order[i])];
}

// Task t takes over from t - 1 between floor(t L - L / beta) and floor(t L + L / beta), L = steps / tasks.
std::vector<std::vector<double>> continuous_schedule(int tasks, int steps, double beta) {
  if (tasks < 1 || steps < tasks) throw InputError("a continuous schedule needs a task, and a step for each");
  if (!(beta >= 2)) throw InputError("beta of the continuous schedule is at least 2: only neighbours overlap");
  const double length = double(steps) / tasks;
  const auto taken_over = [&](int t, int i) {  // how far task t has come, in [0, 1]
    if (t <= 0) return 1.;
    if (t >= tasks) return 0.;
    const double from = std::floor(t * length - length / beta), to = std::floor(t * length + length / beta);
    return std::clamp((i - from) / std::max(to - from, 1.), 0., 1.);
  };
  std::vector<std::vector<double>> rows(steps, std::vector<double>(tasks));
  for (int i = 0; i < steps; i++) {
    double sum = 0;
    for (int t = 0; t < tasks; t++) sum += rows[i][t] = std::min(taken_over(t, i), 1 - taken_over(t + 1, i));
    for (double& p : rows[i]) p /= sum;
  }
  return rows;
}

}  // namespace baton
