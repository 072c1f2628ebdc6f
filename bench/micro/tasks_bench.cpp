// What sequences of tasks add: dropout, batches whose pixels are in a task's order, and pruning, at the shapes of
// permuted MNIST and its networks. Byte and FLOP models: common.h.
#include <algorithm>
#include <numeric>

#include "common.h"
#include "kernels/batch.h"
#include "kernels/dropout.h"
#include "kernels/prune.h"

using namespace baton;

namespace {

// Bytes an element: 8. FLOPs: a product; the quarter of a Philox call is integer work and not counted.
void dropout_of(const char* layer, size_t count, int replicas) {
  const double n = double(count) * replicas;
  add("dropout" + std::string(layer) + "/n:" + std::to_string(count) + "/replicas:" + std::to_string(replicas),
      {8 * n, n}, [=](Buffers& b) -> std::function<void()> {
        float* x = b.normal(count * replicas);
        const StepState* states = b.states(replicas);
        // In place, again and again: a rate so small that x stays random. The work does not depend on it.
        return [=, stream = b.stream()] { dropout(x, count, replicas, 1e-7f, states, stream_dropout, stream); };
      });
}

// Bytes: a pixel read 1, written 4, 8 with the squares; a batch's pixel orders, 4 a pixel, once each; an image's label
// and index, 9; a step's probabilities. FLOPs a pixel: 2, 3 with the squares.
void gathers(const char* set_name, int channels, int extent, bool squares, int batch) {
  const int count = 4096, tasks = 10, steps = 1000, plane = extent * extent, size = channels * plane;
  const std::string suffix = std::string(set_name) + (squares ? "/ffg" : "/ft");
  const size_t pixels = size_t(batch) * size;
  struct Inputs {
    DeviceImages set;
    float *x, *x_squared;
    int32_t* labels;
    const int32_t* pixel_order;
  };
  const auto take = [=](Buffers& b) {
    const Normalisation n{{1 / 255.f, 1 / 255.f, 1 / 255.f}, {0.1f, 0.1f, 0.1f}};
    std::vector<int32_t> orders, one(size);
    std::iota(one.begin(), one.end(), 0);
    std::mt19937 random(1);
    for (int t = 0; t < tasks; t++) {
      std::shuffle(one.begin(), one.end(), random);
      orders.insert(orders.end(), one.begin(), one.end());
    }
    return Inputs{{b.integers<uint8_t>(size_t(count) * size, 256), b.integers<uint8_t>(count, 10), count, channels,
                   plane, n, extent, extent},
                  b.room<float>(pixels),
                  squares ? b.room<float>(pixels) : nullptr,
                  b.room<int32_t>(batch),
                  b.put(orders)};
  };
  const auto work = [=](int orders, double more) {
    return Work{pixels * (squares ? 9. : 5.) + 9. * batch + 4. * size * orders + more, pixels * (squares ? 3. : 2.)};
  };
  for (const bool mixture : {false, true})
    add(
        "gather_training_batch" + suffix + (mixture ? "/mixture" : "/task") + batch_name(batch),
        work(mixture ? tasks : 1, mixture ? 4. * tasks : 0),
        [=](Buffers& b) -> std::function<void()> {
          const Inputs in = take(b);
          const int32_t* order = b.integers<int32_t>(count, count);
          const StepState* states = b.states(1, count);
          std::vector<float> sums;
          for (int i = 0; i < steps * tasks; i++) sums.push_back(float(i % tasks + 1) / float(tasks));
          const TaskInputs inputs{in.pixel_order, tasks, mixture ? b.put(sums) : nullptr, steps};
          return [=, stream = b.stream()] {
            gather_training_batch(in.x, in.x_squared, in.labels, in.set, order, count, states, 1, batch, stream, false,
                                  &inputs);
          };
        },
        Sets::warm_cold);
  add("gather_indexed" + suffix + "/task" + batch_name(batch), work(1, 0), [=](Buffers& b) -> std::function<void()> {
    const Inputs in = take(b);
    const int32_t* index = b.integers<int32_t>(batch, count);
    return [=, stream = b.stream()] {
      gather_indexed(in.x, in.x_squared, in.labels, in.set, index, batch, stream, in.pixel_order);
    };
  });
}

// Bytes a weight: scores read mean and sd and write one number, 12 (8 by magnitude); pruning reads a mark, 1, and
// writes mean and sd of every tenth, 8. FLOPs: 4 (1 by magnitude); 0.
void pruning(const char* network, const std::vector<Stretch>& stretches) {
  size_t n = 0, size = 0;
  for (const Stretch& s : stretches) n += size_t(s.count), size = std::max(size, size_t(s.first) + s.count);
  const double weights = double(n);
  for (const Ranking ranking : {Ranking::signal_to_noise, Ranking::magnitude}) {
    const bool noise = ranking == Ranking::signal_to_noise;
    add("prune_scores" + std::string(network) + (noise ? "/signal_to_noise" : "/magnitude"),
        {weights * (noise ? 12 : 8), weights * (noise ? 4 : 1)}, [=](Buffers& b) -> std::function<void()> {
          const float *mean = b.normal(size), *sd = noise ? b.positive(size) : nullptr;
          float* score = b.room<float>(n);
          return [=, stream = b.stream()] { prune_scores(score, mean, sd, stretches, ranking, stream); };
        });
  }
  add("prune_weights" + std::string(network), {weights * 1.8, 0}, [=](Buffers& b) -> std::function<void()> {
    float *mean = b.normal(size), *sd = b.positive(size);
    std::vector<uint8_t> marks(n);
    std::mt19937 random(1);
    for (uint8_t& mark : marks) mark = random() % 10 == 0;
    const uint8_t* pruned = b.put(marks);
    return [=, stream = b.stream()] { prune_weights(mean, sd, pruned, stretches, stream); };
  });
}

}  // namespace

void add_task_benchmarks() {
  dropout_of("/mlp.2000", 128 * 2000, 1), dropout_of("/mlp.100", 128 * 100, 10);
  dropout_of("/cnn.conv1", 128 * 32 * 30 * 30, 1);
  for (const bool squares : {true, false}) gathers("/mnist", 1, 28, squares, 128);
  gathers("/cifar10", 3, 32, false, 128);
  const int wide = 1200;
  pruning("/mlp.2x1200", {{0, 784 * wide}, {785 * wide, wide * wide}, {785 * wide + (wide + 1) * wide, 10 * wide}});
}
