#include "kernels/batch.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <random>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

std::vector<uint32_t> order_of(uint32_t n, Key key, uint32_t epoch) {
  std::vector<uint32_t> order(n);
  for (uint32_t i = 0; i < n; i++) order[i] = shuffled(i, n, key, epoch);
  return order;
}

TEST(Shuffled, IsABijection) {
  for (uint32_t n : {1u, 2u, 3u, 4u, 5u, 16u, 17u, 100u, 1000u, 6000u})
    for (Key key : {key_of(0), key_of(1), Key{0, 0}, Key{~0u, ~0u}})
      for (uint32_t epoch : {0u, 1u, 7u, 3u << 20}) {
        std::vector<uint32_t> order = order_of(n, key, epoch);
        std::sort(order.begin(), order.end());
        for (uint32_t i = 0; i < n; i++) ASSERT_EQ(order[i], i) << n << " epoch " << epoch;
      }
}

TEST(Shuffled, DiffersByEpochKeyAndStage) {
  const uint32_t n = 1000;
  const std::vector<uint32_t> first = order_of(n, key_of(1), 0);
  for (const auto& other :
       {order_of(n, key_of(1), 1), order_of(n, key_of(1), 1 << 20), order_of(n, key_of(2), 0),
        order_of(n, {key_of(1).lo, key_of(2).hi}, 0), order_of(n, {key_of(2).lo, key_of(1).hi}, 0)}) {
    int same = 0;
    for (uint32_t i = 0; i < n; i++) same += other[i] == first[i];
    EXPECT_LT(same, 8);  // one, on average
  }
}

// Chi-squared, standardised: the place of every position over many epochs.
TEST(Shuffled, IsRoughlyUniform) {
  for (uint32_t n : {2u, 3u, 5u, 17u, 64u}) {
    const int epochs = 4000;
    std::vector<int> seen(n * n);
    for (int epoch = 0; epoch < epochs; epoch++)
      for (uint32_t i = 0; i < n; i++) seen[i * n + shuffled(i, n, key_of(5), epoch)]++;
    double statistic = 0;
    for (int count : seen)
      statistic += (count - double(epochs) / n) * (count - double(epochs) / n) / (double(epochs) / n);
    const double freedom = double(n - 1) * (n - 1);
    EXPECT_LT((statistic - freedom) / std::sqrt(2 * freedom), 5) << n;
  }
}

// Neighbours in the order are not neighbours in the set: their differences' sizes are n/3 on average.
TEST(Shuffled, NeighboursAreApart) {
  for (uint32_t n : {1000u, 6000u}) {
    double distance = 0, correlation = 0;
    const std::vector<uint32_t> order = order_of(n, key_of(8), 4);
    for (uint32_t i = 0; i + 1 < n; i++) distance += std::abs(double(order[i]) - order[i + 1]);
    for (uint32_t i = 0; i < n; i++) correlation += (i / (n - 1.) - 0.5) * (order[i] / (n - 1.) - 0.5) * 12;
    EXPECT_NEAR(distance / (n - 1) / n, 1. / 3, 4 * 0.24 / std::sqrt(double(n)));
    EXPECT_NEAR(correlation / n, 0, 4 / std::sqrt(double(n)));
  }
}

// ------------------------------------------------------------------------------------------------------- the batches
struct Images {
  Images(Memory& memory, int count, int channels, int plane, Normalisation n)
      : bytes(random_bytes(size_t(count) * channels * plane)),
        names(count),
        pixels(memory, bytes),
        labels(memory, numbered(names)),
        set{pixels, labels, count, channels, plane, n} {}
  static std::vector<uint8_t> random_bytes(size_t n) {
    std::mt19937 random(3);
    std::vector<uint8_t> v(n);
    for (uint8_t& x : v) x = uint8_t(random());
    return v;
  }
  static const std::vector<uint8_t>& numbered(std::vector<uint8_t>& names) {  // a label names its image
    std::iota(names.begin(), names.end(), uint8_t(0));
    return names;
  }
  size_t size() const { return size_t(set.channels) * set.plane; }
  // What a batch of these images must be.
  std::vector<double> values(const std::vector<int32_t>& examples) const {
    std::vector<double> x;
    for (int32_t e : examples)
      for (int c = 0; c < set.channels; c++)
        for (int i = 0; i < set.plane; i++)
          x.push_back(double(bytes[e * size() + size_t(c) * set.plane + i]) * set.normalisation.scale[c] +
                      set.normalisation.shift[c]);
    return x;
  }

  std::vector<uint8_t> bytes, names;
  Buffer<uint8_t> pixels, labels;
  DeviceImages set;
};
std::vector<double> squares(std::vector<double> x) {
  for (double& v : x) v *= v;
  return x;
}

const Normalisation in_binary{{1 / 64.f, 1 / 128.f, 1 / 256.f}, {-1, -2, 0.5f}};  // exact in float
const Normalisation in_decimal{{0.0127f, 0.0131f, 0.0149f}, {-1.7f, -1.6f, -1.4f}};

void check_gather(int channels, int plane, const Normalisation& normalisation, bool is_exact) {
  SCOPED_TRACE(testing::Message() << channels << "x" << plane);
  Memory memory;
  Images images(memory, 9, channels, plane, normalisation);
  const std::vector<int32_t> index{8, 0, 3, 3};
  Buffer device_index(memory, index);
  for (bool squared : {true, false}) {
    Buffer<float> x(memory, 4 * images.size(), NAN), x2(memory, 4 * images.size(), NAN);
    Buffer<int32_t> labels(memory, 4, -1);
    float* to = squared ? x2.data() : nullptr;
    gather_indexed(x, to, labels, images.set, device_index, 4, memory.stream());
    const std::vector<double> want = images.values(index);
    EXPECT_TRUE(exact(labels.host(), index));
    if (is_exact) {
      EXPECT_TRUE(exact(x.host(), want));
    } else {
      EXPECT_TRUE(close(x.host(), want, {.l2 = 1e-7}));
    }
    if (!squared) continue;
    if (is_exact) {
      EXPECT_TRUE(exact(x2.host(), squares(want)));
    } else {
      EXPECT_TRUE(close(x2.host(), squares(want), {.l2 = 2e-7}));
    }
    record("gather." + std::to_string(channels) + "x" + std::to_string(plane) + (is_exact ? ".exact" : ""), x2.host(),
           1e-6f);
  }
}

TEST(Batch, SmallGatherExact) {
  BATON_NEEDS_DEVICE();
  check_gather(3, 5, in_binary, true);
}

TEST(Batch, Gather) {
  BATON_NEEDS_DEVICE();
  check_gather(1, 9, in_binary, true);
  check_gather(1, 784, in_binary, true);
  check_gather(3, 1024, in_decimal, false);
  check_gather(2, 131, in_decimal, false);
}

// Labels are the images' numbers: what each step of each replica saw. Values are checked on the way.
std::vector<std::vector<int32_t>> train(const std::vector<StepState>& first, const std::vector<int32_t>& order,
                                        size_t order_stride, int images_count, int batch, int steps) {
  Memory memory;
  const int replicas = int(first.size());
  Images images(memory, images_count, 2, 6, in_binary);
  Buffer states(memory, first);
  Buffer device_order(memory, order);
  Buffer<float> x(memory, replicas * batch * images.size(), NAN), x2(memory, replicas * batch * images.size(), NAN);
  Buffer<int32_t> labels(memory, size_t(replicas) * batch, -1);
  std::vector<std::vector<int32_t>> seen(replicas);
  for (int t = 0; t < steps; t++) {
    advance_step(states, replicas, memory.stream());
    gather_training_batch(x, t % 2 ? nullptr : x2.data(), labels, images.set, device_order, order_stride, states,
                          replicas, batch, memory.stream());
    const std::vector<int32_t> now = labels.host();
    EXPECT_TRUE(exact(x.host(), images.values(now)));
    if (t % 2 == 0) {
      EXPECT_TRUE(exact(x2.host(), squares(images.values(now))));
    }
    for (int r = 0; r < replicas; r++)
      seen[r].insert(seen[r].end(), now.begin() + r * batch, now.begin() + (r + 1) * batch);
  }
  return seen;
}
StepState state_of(int replica, int stage, int part_offset, int part_size) {
  StepState s{};
  s.shuffle = key_of(11, replica);
  s.stage = stage, s.stage_steps = 100;
  s.part_offset = part_offset, s.part_size = part_size;
  return s;
}

TEST(Batch, EveryExampleOnceAnEpoch) {
  BATON_NEEDS_DEVICE();
  const int images = 40, batch = 4, epochs = 4;
  // Two replicas, with an order and a part of their own; the batch does not divide the parts.
  std::vector<int32_t> order(2 * images);
  std::iota(order.begin(), order.begin() + images, 0);
  for (int i = 0; i < images; i++) order[images + i] = (i * 7 + 3) % images;
  const StepState states[2] = {state_of(0, 1, 20, 10), state_of(1, 1, 5, 7)};
  const auto seen = train({states[0], states[1]}, order, images, images, batch, 10 * epochs / batch);
  for (int r = 0; r < 2; r++) {
    SCOPED_TRACE(testing::Message() << "replica " << r);
    const int n = states[r].part_size;
    const auto part = order.begin() + r * images + states[r].part_offset;
    std::vector<int32_t> want(part, part + n), before;
    std::sort(want.begin(), want.end());
    for (int epoch = 0; (epoch + 1) * n <= int(seen[r].size()); epoch++) {
      std::vector<int32_t> now(seen[r].begin() + epoch * n, seen[r].begin() + (epoch + 1) * n);
      for (int i = 0; i < n; i++)
        EXPECT_EQ(now[i], part[shuffled(i, n, states[r].shuffle, (1u << 20) + epoch)]) << epoch << " " << i;
      EXPECT_NE(now, before);  // a fresh order
      before = now;
      std::sort(now.begin(), now.end());
      EXPECT_EQ(now, want) << "epoch " << epoch;
    }
  }
}

TEST(Batch, SmallTrainingBatch) {
  BATON_NEEDS_DEVICE();
  const StepState first = state_of(0, 0, 0, 6), second = state_of(1, 0, 1, 5);
  const std::vector<int32_t> order{0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0};
  const auto seen = train({first, second}, order, 6, 6, 2, 1);
  for (uint32_t b : {0, 1}) {
    EXPECT_EQ(seen[0][b], order[shuffled(b, 6, first.shuffle, 0)]);
    EXPECT_EQ(seen[1][b], order[6 + 1 + shuffled(b, 5, second.shuffle, 0)]);
  }
}

TEST(Batch, ReplicasAndStagesDiffer) {
  BATON_NEEDS_DEVICE();
  std::vector<int32_t> order(60);
  for (int i = 0; i < 60; i++) order[i] = i % 20;
  const auto seen = train({state_of(0, 0, 0, 20), state_of(1, 0, 0, 20), state_of(0, 1, 0, 20)}, order, 20, 20, 5, 4);
  EXPECT_NE(seen[0], seen[1]);
  EXPECT_NE(seen[0], seen[2]);
  // A batch larger than the part goes on with the next epoch.
  std::map<int32_t, int> times;
  const auto large = train({state_of(0, 0, 4, 3)}, order, 20, 20, 12, 1);
  for (int32_t e : large[0]) times[e]++;
  EXPECT_EQ(times, (std::map<int32_t, int>{{4, 4}, {5, 4}, {6, 4}}));
}

// ------------------------------------------------------------------------------------------------------ augmentation
struct Augmented {
  std::vector<float> x, x2;
  std::vector<int32_t> labels;
};
Augmented augment(Memory& memory, Images& images, const std::vector<StepState>& states, int batch, bool squared) {
  const size_t n = states.size() * batch;
  std::vector<int32_t> order(images.set.count);
  std::iota(order.begin(), order.end(), 0);
  Buffer device_states(memory, states);
  Buffer device_order(memory, order);
  Buffer<float> x(memory, n * images.size(), NAN), x2(memory, n * images.size(), NAN);
  Buffer<int32_t> labels(memory, n, -1);
  gather_training_batch(x, squared ? x2.data() : nullptr, labels, images.set, device_order, 0, device_states,
                        int(states.size()), batch, memory.stream(), true);
  return {x.host(), x2.host(), labels.host()};
}
struct Move {
  bool mirror;
  int down, right;
};
Move move_of(const StepState& s, int b) {
  const uint4 u = philox(make_uint4(uint32_t(b), stream_augment, s.step, 0), s.shuffle);
  return {bool(u.x >> 31), int(uint64_t(u.y) * 9 >> 32), int(uint64_t(u.z) * 9 >> 32)};
}
// Through a padded image, as the paper puts it.
std::vector<double> moved(const std::vector<double>& image, int channels, int h, int w, Move m) {
  std::vector<double> to;
  for (int c = 0; c < channels; c++) {
    std::vector<double> padded(size_t(h + 8) * (w + 8));
    for (int y = 0; y < h; y++)
      for (int x = 0; x < w; x++) padded[size_t(y + 4) * (w + 8) + x + 4] = image[(size_t(c) * h + y) * w + x];
    for (int y = 0; y < h; y++)
      for (int x = 0; x < w; x++)
        to.push_back(padded[size_t(y + m.down) * (w + 8) + (m.mirror ? w - 1 - x : x) + m.right]);
  }
  return to;
}

void check_augmented(int channels, int h, int w, int batch) {
  SCOPED_TRACE(testing::Message() << channels << "x" << h << "x" << w);
  Memory memory;
  Images images(memory, 9, channels, h * w, in_binary);
  images.set.height = h, images.set.width = w;
  std::vector<StepState> states;
  for (int r = 0; r < 2; r++) {
    states.push_back(state_of(r, 0, 0, 9));
    states[r].stage_step = 1, states[r].step = 5 + r;
  }
  for (bool squared : {true, false}) {
    const Augmented got = augment(memory, images, states, batch, squared);
    std::vector<double> want;
    for (int r = 0; r < 2; r++)
      for (int b = 0; b < batch; b++) {
        const int32_t example = int32_t(shuffled(b % 9, 9, states[r].shuffle, b / 9));
        EXPECT_EQ(got.labels[r * batch + b], example);
        const auto x = moved(images.values({example}), channels, h, w, move_of(states[r], b));
        want.insert(want.end(), x.begin(), x.end());
      }
    EXPECT_TRUE(exact(got.x, want));
    if (squared) {
      EXPECT_TRUE(exact(got.x2, squares(want)));
    }
  }
}

TEST(Batch, SmallAugmented) {
  BATON_NEEDS_DEVICE();
  check_augmented(2, 3, 2, 2);  // may be moved out of the picture as a whole
}

TEST(Batch, Augmented) {
  BATON_NEEDS_DEVICE();
  check_augmented(3, 32, 32, 20);
  check_augmented(1, 5, 9, 12);
  check_augmented(2, 1, 13, 7);
}

// Mirrors and places are uniform, and differ by step, replica and place in the batch. A ramp tells how it was moved.
TEST(Batch, AugmentedMovesAreUniform) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  const int side = 12, batch = 486;
  Images images(memory, 1, 1, side * side, {{1, 0, 0}, {1, 0, 0}});
  std::vector<uint8_t> ramp(side * side);
  std::iota(ramp.begin(), ramp.end(), uint8_t(0));
  images.pixels.set(ramp);
  images.set.height = images.set.width = side;
  std::vector<StepState> states;
  for (int r = 0; r < 2; r++)
    for (int step = 0; step < 5; step++) {
      states.push_back(state_of(r, 0, 0, 1));
      states.back().stage_step = 1, states.back().step = step;
    }
  const Augmented got = augment(memory, images, states, batch, false);
  std::vector<int> times(2 * 81), codes;
  const int n = int(states.size()) * batch;
  for (int i = 0; i < n; i++) {
    auto at = [&](int y, int x) { return int(got.x[(size_t(i) * side + y) * side + x]) - 1; };
    const int middle = at(5, 5), mirror = at(5, 6) < middle;  // moved by 4 at most: always from inside
    const int down = middle / side - 5, right = middle % side - (mirror ? side - 1 - 5 : 5);
    ASSERT_LE(std::abs(down), 4);
    ASSERT_LE(std::abs(right), 4);
    codes.push_back((mirror * 9 + down + 4) * 9 + right + 4);
    times[codes.back()]++;
  }
  double statistic = 0;
  for (int count : times) statistic += (count - n / 162.) * (count - n / 162.) / (n / 162.);
  EXPECT_LT(std::abs(statistic - 161) / std::sqrt(2 * 161.), 5);
  for (int other = 1; other < int(states.size()); other++) {
    int same = 0;
    for (int b = 0; b < batch; b++) same += codes[b] == codes[other * batch + b];
    EXPECT_LT(same, 20);  // 3 on average
  }
}

TEST(Batch, RefusesToAugmentWithoutASize) {
  DeviceImages set{nullptr, nullptr, 10, 1, 12, in_binary};
  auto call = [&] { gather_training_batch(nullptr, nullptr, nullptr, set, nullptr, 0, nullptr, 1, 1, {}, true); };
  EXPECT_THROW(call(), InputError);
  set.height = 3, set.width = 5;
  EXPECT_THROW(call(), InputError);
  set.height = -3, set.width = -4;
  EXPECT_THROW(call(), InputError);
}

// ------------------------------------------------------------------------------------------------- tasks by pixel
// order
std::vector<int32_t> pixel_orders(int tasks, int size) {
  std::vector<int32_t> orders;
  std::mt19937 random(17);
  for (int t = 0; t < tasks; t++) {
    std::vector<int32_t> one(size);
    std::iota(one.begin(), one.end(), 0);
    std::shuffle(one.begin(), one.end(), random);
    orders.insert(orders.end(), one.begin(), one.end());
  }
  return orders;
}
std::vector<double> in_order(const std::vector<double>& image, const std::vector<int32_t>& orders, int task) {
  std::vector<double> x;
  for (size_t i = 0; i < image.size(); i++) x.push_back(image[orders[task * image.size() + i]]);
  return x;
}
// The first sum above u, or the last task.
int task_of(const StepState& s, int b, const std::vector<float>& cumulative, int tasks) {
  const double u = philox(make_uint4(uint32_t(b), stream_tasks, s.step, 0), s.shuffle).w / 4294967296.;
  const size_t steps = cumulative.size() / tasks, row = std::min<size_t>(s.stage_step, steps) - 1;
  for (int t = 0; t < tasks; t++)
    if (u < cumulative[row * tasks + t]) return t;
  return tasks - 1;
}

// Replica r of the states is in stage r; where there are probabilities (cumulative), they decide.
void check_tasks(int channels, int plane, int batch, int replicas, int tasks, const std::vector<float>& cumulative = {},
                 int stage_step = 1) {
  SCOPED_TRACE(testing::Message() << channels << "x" << plane << ", step " << stage_step << " of the stage");
  Memory memory;
  Images images(memory, 9, channels, plane, in_binary);
  const std::vector<int32_t> orders = pixel_orders(tasks, int(images.size()));
  std::vector<int32_t> all(9);
  std::iota(all.begin(), all.end(), 0);
  std::vector<StepState> states;
  for (int r = 0; r < replicas; r++) {
    states.push_back(state_of(r, r, 0, 9));
    states[r].stage_step = stage_step, states[r].step = uint32_t(20 + stage_step);
  }
  Buffer device_orders(memory, orders), order(memory, all);
  Buffer device_states(memory, states);
  Buffer sums(memory, cumulative);
  const int steps = int(cumulative.size()) / tasks;
  const TaskInputs inputs{device_orders, tasks, steps ? sums.data() : nullptr, steps};
  const size_t n = size_t(replicas) * batch;
  for (bool squared : {true, false}) {
    Buffer<float> x(memory, n * images.size(), NAN), x2(memory, n * images.size(), NAN);
    Buffer<int32_t> labels(memory, n, -1);
    gather_training_batch(x, squared ? x2.data() : nullptr, labels, images.set, order, 0, device_states, replicas,
                          batch, memory.stream(), false, &inputs);
    const std::vector<int32_t> seen = labels.host();
    std::vector<double> want;
    for (int r = 0; r < replicas; r++)
      for (int b = 0; b < batch; b++) {
        const uint32_t at = uint32_t((stage_step - 1) * batch + b);
        const int32_t example = int32_t(shuffled(at % 9, 9, states[r].shuffle, (uint32_t(r) << 20) + at / 9));
        ASSERT_EQ(seen[r * batch + b], example);
        const int task = steps ? task_of(states[r], b, cumulative, tasks) : r % tasks;
        const auto now = in_order(images.values({example}), orders, task);
        want.insert(want.end(), now.begin(), now.end());
      }
    EXPECT_TRUE(exact(x.host(), want));
    if (squared) {
      EXPECT_TRUE(exact(x2.host(), squares(want)));
      record("gather.tasks." + std::to_string(channels) + "x" + std::to_string(plane) +
                 (steps ? ".mixture" : ".stage") + std::to_string(stage_step),
             x.host(), 0);
    }
  }
}

TEST(Batch, SmallTasksByStage) {
  BATON_NEEDS_DEVICE();
  check_tasks(2, 5, 2, 2, 2);
}

TEST(Batch, TasksByStage) {
  BATON_NEEDS_DEVICE();
  check_tasks(1, 784, 5, 3, 4);
  check_tasks(3, 131, 4, 2, 2);
  check_tasks(1, 9, 4, 5, 2);  // more stages than tasks: they wrap around
  check_tasks(2, 7, 3, 2, 1, {}, 4);
}

TEST(Batch, SmallTasksByMixture) {
  BATON_NEEDS_DEVICE();
  check_tasks(1, 6, 3, 2, 2, {0.5f, 1, 0, 1}, 1);
}

TEST(Batch, TasksByMixture) {
  BATON_NEEDS_DEVICE();
  // Three steps' rows: a task that cannot be, sums that stay below 1, and nothing but the last.
  const std::vector<float> cumulative{0.25f, 0.25f, 0.75f, 1, 0.1f, 0.2f, 0.3f, 0.4f, 0, 0, 0, 0};
  for (int step : {1, 2, 3, 4, 9}) check_tasks(1, 50, 40, 2, 4, cumulative, step);
  check_tasks(3, 64, 20, 1, 3, {0.3f, 0.6f, 1}, 1);
}

// What is drawn has the probabilities that were asked for, and other steps and replicas draw others. The image is a
// ramp, and task t shows its pixel t first.
TEST(Batch, TasksHaveTheirProbabilities) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  const int tasks = 3, size = 4, batch = 1500, replicas = 6;
  Images images(memory, 1, 1, size, {{1, 0, 0}, {0, 0, 0}});
  images.pixels.set({0, 1, 2, 3});
  const std::vector<float> cumulative{0.2f, 0.5f, 1};
  Buffer orders(memory, std::vector<int32_t>{0, 1, 2, 3, 1, 0, 2, 3, 2, 1, 0, 3}),
      order(memory, std::vector<int32_t>{0});
  Buffer sums(memory, cumulative);
  std::vector<StepState> states;
  for (int r = 0; r < replicas; r++) {
    states.push_back(state_of(r % 2, 0, 0, 1));
    states[r].stage_step = 1, states[r].step = uint32_t(r / 2);
  }
  Buffer device_states(memory, states);
  Buffer<float> x(memory, size_t(replicas) * batch * size, NAN);
  Buffer<int32_t> labels(memory, size_t(replicas) * batch, -1);
  const TaskInputs inputs{orders, tasks, sums, 1};
  gather_training_batch(x, nullptr, labels, images.set, order, 0, device_states, replicas, batch, memory.stream(),
                        false, &inputs);
  const std::vector<float> seen = x.host();
  std::vector<int> times(tasks), drawn;
  for (int i = 0; i < replicas * batch; i++) {
    drawn.push_back(int(seen[size_t(i) * size]));
    ASSERT_LT(drawn.back(), tasks);
    times[drawn.back()]++;
  }
  const double n = replicas * batch, p[] = {0.2, 0.3, 0.5};
  for (int t = 0; t < tasks; t++) EXPECT_NEAR(times[t] / n, p[t], 4 * std::sqrt(p[t] * (1 - p[t]) / n)) << t;
  for (int r = 1; r < replicas; r++) {  // independent: alike with probability 0.04 + 0.09 + 0.25
    int same = 0;
    for (int b = 0; b < batch; b++) same += drawn[b] == drawn[r * batch + b];
    EXPECT_NEAR(same / double(batch), 0.38, 0.06) << r;
  }
}

void check_indexed_order(int channels, int plane, const Normalisation& normalisation) {
  Memory memory;
  Images images(memory, 9, channels, plane, normalisation);
  const std::vector<int32_t> index{8, 0, 3, 3, 7}, orders = pixel_orders(1, int(images.size()));
  Buffer device_index(memory, index), pixel_order(memory, orders);
  std::vector<double> want;
  for (int32_t e : index) {
    const auto now = in_order(images.values({e}), orders, 0);
    want.insert(want.end(), now.begin(), now.end());
  }
  for (bool squared : {true, false}) {
    Buffer<float> x(memory, 5 * images.size(), NAN), x2(memory, 5 * images.size(), NAN);
    Buffer<int32_t> labels(memory, 5, -1);
    gather_indexed(x, squared ? x2.data() : nullptr, labels, images.set, device_index, 5, memory.stream(), pixel_order);
    EXPECT_TRUE(exact(labels.host(), index));
    EXPECT_TRUE(close(x.host(), want, {.l2 = 1e-7}));
    if (squared) {
      EXPECT_TRUE(close(x2.host(), squares(want), {.l2 = 2e-7}));
    }
  }
}

TEST(Batch, SmallIndexedInOrder) {
  BATON_NEEDS_DEVICE();
  check_indexed_order(2, 5, in_binary);
}

TEST(Batch, IndexedInOrder) {
  BATON_NEEDS_DEVICE();
  check_indexed_order(1, 784, in_decimal);
  check_indexed_order(3, 131, in_decimal);
}

TEST(Batch, RefusesTasks) {
  const DeviceImages set{nullptr, nullptr, 10, 1, 12, in_binary, 3, 4};
  const int32_t orders[12] = {};
  const float sums[1] = {1};
  auto call = [&](TaskInputs tasks, bool augment) {
    gather_training_batch(nullptr, nullptr, nullptr, set, nullptr, 0, nullptr, 1, 0, {}, augment, &tasks);
  };
  call({orders, 1}, false);  // nothing to do
  EXPECT_THROW(call({orders, 1}, true), InputError);
  EXPECT_THROW(call({orders, 0}, false), InputError);
  EXPECT_THROW(call({nullptr, 1}, false), InputError);
  EXPECT_THROW(call({orders, 1, sums, 0}, false), InputError);
}

}  // namespace
}  // namespace baton::test
