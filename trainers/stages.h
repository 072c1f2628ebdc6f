// What is learned, one stage after the other: the parts of one data set (Kochurov et al. 2018), or tasks (Zeno et al.
// 2018): the same images under other orders of their pixels, or tasks of their own with an output layer each.
#pragma once
#include <cstdint>
#include <vector>

namespace baton {

struct Images;

struct Stages {
  std::vector<int> sizes;                   // examples of each stage
  std::vector<std::vector<int32_t>> order;  // [replicas][sum of sizes]: its examples in the set, stage after stage
  std::vector<int> heads;                   // of each stage; empty: the first
  std::vector<bool> augment;                // of each stage; empty: nothing is augmented
  std::vector<std::vector<int32_t>> pixel_order;  // [tasks][channels * plane]; empty: pixels as they are
  // Continuous tasks: row i is the tasks' probabilities at step i of the one stage in which they all are learned.
  // Empty: one task after the other. `sizes` then has one entry, and `pixel_order` says the tasks.
  std::vector<std::vector<double>> probabilities;

  int count() const { return int(sizes.size()); }
  bool continuous() const { return !probabilities.empty(); }
  int tasks() const { return continuous() ? int(pixel_order.size()) : count(); }
  int first(int stage) const;  // where a stage's examples begin in an order
};

// `images` examples in equal parts, split and ordered by each replica's seed. InputError for more parts than images.
Stages split_into_parts(int images, int parts, const std::vector<uint64_t>& seeds, bool augment = false);
// Tasks one after the other, for one replica: the examples of each.
Stages tasks_in_turn(const std::vector<std::vector<int32_t>>& examples);
// Every example of a set, as one stage of one replica.
Stages whole_set(int images, bool augment = false);

// pixel_order[0] is the identity, the others are seeded permutations of [0, pixels).
std::vector<std::vector<int32_t>> permute_pixels(int tasks, int pixels, uint64_t seed);
// x[i] becomes x[order[i]] in every image.
void reorder_pixels(Images&, const std::vector<int32_t>& order);
// The schedule of the continuous task-agnostic experiment: [steps][tasks], row i the probabilities of the tasks at step
// i, which rise and fall linearly so that neighbours overlap; beta: how steep (the authors': 4).
std::vector<std::vector<double>> continuous_schedule(int tasks, int steps, double beta);

}  // namespace baton
