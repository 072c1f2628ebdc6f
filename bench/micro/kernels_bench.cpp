// Every kernel launcher but those of local_reparam.h (reparam_bench.cpp) and what CFG and MNF add (families_bench.cpp),
// at the shapes of LeNet5 and 3Conv3FC.
#include "kernels/batch.h"
#include "kernels/predictive.h"
#include "kernels/softmax_xent.h"
#include "kernels/squares.h"
#include "networks.h"

using namespace baton;

namespace {

// ------------------------------------------------------------------------------------------------- loss and totals
// Bytes: a logit read and its gradient written, 8; a row's label, loss and hit, 12. FLOPs: 1 exp and 8 a logit.
void softmax(int batch, int replicas, int classes) {
  const size_t rows = size_t(batch) * replicas, n = rows * classes;
  add("softmax_cross_entropy" + batch_name(batch, replicas) + "/classes:" + std::to_string(classes),
      {8. * n + 12. * rows, 9. * n}, [=](Buffers& b) -> std::function<void()> {
        const float* logits = b.normal(n, 3);
        const int32_t* labels = b.integers<int32_t>(rows, classes);
        float *loss = b.room<float>(rows), *hit = b.room<float>(rows), *gradient = b.room<float>(n);
        return [=, stream = b.stream()] {
          softmax_cross_entropy(loss, hit, gradient, logits, labels, replicas, batch, classes, 1.f / float(batch),
                                stream);
        };
      });
}

// Bytes: loss and hit, 8 an example; the totals. FLOPs: two adds an example.
void totals(int batch, int replicas) {
  const size_t rows = size_t(batch) * replicas;
  add("add_to_totals" + batch_name(batch, replicas), {8. * rows + 2. * sizeof(Totals) * replicas, 2. * rows},
      [=](Buffers& b) -> std::function<void()> {
        const float *loss = b.positive(rows), *hit = b.positive(rows);
        StepState* states = b.states(replicas);
        Totals* sums = b.room<Totals>(replicas);
        return [=, stream = b.stream()] { add_to_totals(sums, loss, hit, states, replicas, batch, stream); };
      });
}

// Bytes: every state read and written. FLOPs: about 80 a replica (two powers, a schedule).
void advance(int replicas) {
  add("advance_step" + replicas_name(replicas), {2. * sizeof(StepState) * replicas, 80. * replicas},
      [=](Buffers& b) -> std::function<void()> {
        StepState* states = b.states(replicas);
        return [=, stream = b.stream()] { advance_step(states, replicas, stream); };
      });
}

// A column of the Fisher information's square root. Bytes: a logit read, a value written, 8. FLOPs: 1 exp and 5 a
// logit. accumulate_rows, accumulate_squared_rows: what the gradients of 128 examples add to a sum. Bytes: 4 an element
// read, 8 a sum. FLOPs an element: 1 and 2.
void curvature() {
  for (const int batch : {128, 1024}) {
    const int classes = 10;
    const size_t n = size_t(batch) * classes;
    add("fisher_column/batch:" + std::to_string(batch) + "/classes:" + std::to_string(classes), {8. * n, 6. * n},
        [=](Buffers& b) -> std::function<void()> {
          const float* logits = b.normal(n, 3);
          float* d = b.room<float>(n);
          return [=, stream = b.stream()] { fisher_column(d, logits, 3, batch, classes, stream); };
        });
  }
  const int rows = 128;
  for (const auto& [layer, n] : {std::pair{"/lenet5.fc1.bias", 500}, {"/lenet5.conv2.weight", 25000}}) {
    const std::string suffix = std::string(layer) + "/rows:" + std::to_string(rows);
    const double elements = double(rows) * n, sums = n;
    const size_t size = size_t(rows) * n;
    add("accumulate_rows" + suffix, {4 * elements + 8 * sums, elements},
        [=, n = n](Buffers& b) -> std::function<void()> {
          const float* x = b.normal(size);
          float* sum = b.normal(n);
          return [=, stream = b.stream()] { accumulate_rows(sum, x, rows, n, stream); };
        });
    add("accumulate_squared_rows" + suffix, {4 * elements + 8 * sums, 2 * elements},
        [=, n = n](Buffers& b) -> std::function<void()> {
          const float* x = b.normal(size);
          float* sum = b.positive(n);
          return [=, stream = b.stream()] { accumulate_squared_rows(sum, x, rows, n, stream); };
        });
  }
}

// ------------------------------------------------------------------------------------------------------- elementwise
// Bytes an element: square 8, fold 16. FLOPs: 1, 3.
void elementwise(size_t n) {
  const std::string suffix = "/n:" + std::to_string(n);
  add("square" + suffix, {8. * n, 1. * n}, [=](Buffers& b) -> std::function<void()> {
    const float* x = b.normal(n);
    float* y = b.room<float>(n);
    return [=, stream = b.stream()] { square(y, x, n, stream); };
  });
  add("fold_square_gradient" + suffix, {16. * n, 3. * n}, [=](Buffers& b) -> std::function<void()> {
    const float *value = b.normal(n), *grad_square = b.normal(n);
    float* grad = b.normal(n);
    return [=, stream = b.stream()] { fold_square_gradient(grad, value, grad_square, n, stream); };
  });
}

// ----------------------------------------------------------------------------------------------- posterior and weights
// Bytes a parameter: gaussian_step reads 11 arrays and writes 7, 72 (natural: 10 and 6, 64); gaussian_kl reads 4, 16;
// point_step reads 4 and writes 3, 28. FLOPs: KL 13, either update 16, gradients 9, two exps with their products 5.
void posterior(const NetworkSizes& network, int replicas) {
  const double n = network.parameters() * replicas;
  const size_t slots = network.layout.tensors().size();
  const std::string suffix = network.name + replicas_name(replicas);
  for (const ScaleRule rule : {ScaleRule::adam, ScaleRule::natural}) {
    const bool adam = rule == ScaleRule::adam;
    add(std::string("gaussian_step/") + (adam ? "adam" : "natural") + suffix,
        {n * (adam ? 72 : 64), n * (adam ? 59 : 53)}, [=, &network](Buffers& b) -> std::function<void()> {
          const GaussianArrays a = take_arrays(b, network, replicas, true);
          const Pieces pieces = take_pieces(b, network.runs(false));
          const StepState* states = b.states(replicas);
          const KlAccumulator accumulator{b.room<double>(slots * replicas), slots};
          float* partial = b.room<float>(size_t(pieces.count) * replicas);
          return [=, stream = b.stream()] { gaussian_step(a, rule, pieces, states, accumulator, partial, stream); };
        });
  }
  add("gaussian_kl" + suffix, {16 * n, 15 * n}, [=, &network](Buffers& b) -> std::function<void()> {
    const GaussianArrays a = take_arrays(b, network, replicas, true);
    const Pieces pieces = take_pieces(b, network.runs(false));
    const KlAccumulator kl{b.room<double>(slots * replicas), slots};
    float* partial = b.room<float>(size_t(pieces.count) * replicas);
    return [=, stream = b.stream()] { gaussian_kl(kl, a, pieces, partial, stream); };
  });
  add("point_step" + suffix, {28 * n, 16 * n}, [=, &network](Buffers& b) -> std::function<void()> {
    const GaussianArrays a = take_arrays(b, network, replicas, false);
    const StepState* states = b.states(replicas);
    return [=, stream = b.stream()] { point_step(a, states, stream); };
  });
}

// Bytes a parameter: mean and variance read once, 8, and 4 a draw written. FLOPs a draw: a normal, sqrt, fma 2.
void draws(const NetworkSizes& network, int samples) {
  const double n = network.parameters();
  const size_t stride = network.layout.stride();
  add("sample_weights" + std::string(network.name) + "/draws:" + std::to_string(samples),
      {n * (8 + 4 * samples), n * samples * (flops_a_normal + 3)}, [=](Buffers& b) -> std::function<void()> {
        const float *mean = b.normal(stride), *variance = b.positive(stride);
        float* w = b.room<float>(stride * samples);
        const Key key = key_of(1, 7);
        return [=, stream = b.stream()] {
          sample_weights(w, mean, 0, variance, int(stride), stride, 0, samples, key, stream);
        };
      });
}

// Bytes a parameter: init_normal and fill_rows write 4, variance_of reads and writes 8. FLOPs: a normal and a product;
// 0; exp and a product.
void initialisation(const NetworkSizes& network, int replicas) {
  const size_t stride = network.layout.stride(), n = stride * replicas;
  const int count = int(stride);
  const double used = network.parameters() * replicas;
  const std::string suffix = network.name + replicas_name(replicas);
  add("init_normal" + suffix, {4 * used, (flops_a_normal + 1) * used}, [=](Buffers& b) -> std::function<void()> {
    float* x = b.room<float>(n);
    const StepState* states = b.states(replicas);
    return [=, stream = b.stream()] { init_normal(x, stride, 0, count, 0.1f, states, replicas, stream); };
  });
  add("fill_rows" + suffix, {4 * used, 0}, [=](Buffers& b) -> std::function<void()> {
    float* x = b.room<float>(n);
    const float* values = b.normal(replicas);
    return [=, stream = b.stream()] { fill_rows(x, stride, count, values, replicas, stream); };
  });
  add("variance_of" + suffix, {8 * used, 2 * used}, [=](Buffers& b) -> std::function<void()> {
    const float* log_std = b.normal(n);
    float* variance = b.room<float>(n);
    return [=, stream = b.stream()] { variance_of(variance, log_std, stride, count, replicas, stream); };
  });
}

// ------------------------------------------------------------------------------------------------ batches, predictions
DeviceImages take_images(Buffers& b, int count, int channels, int extent) {
  const int plane = extent * extent;
  const Normalisation n{{1 / 255.f, 1 / 255.f, 1 / 255.f}, {0.1f, 0.1f, 0.1f}};
  return {b.integers<uint8_t>(size_t(count) * channels * plane, 256),
          b.integers<uint8_t>(count, 10),
          count,
          channels,
          plane,
          n,
          extent,
          extent};
}

// Bytes a pixel: 1 read, 4 written, 8 with the squares; an image's label (5) and, where one is read, its index (4).
// FLOPs a pixel: 2, 3 with the squares. augmented: mirrored and cropped at random; what is read and written is the
// same. /cold: other images, and another set, at every call.
void gathers(const char* set_name, int channels, int extent, bool squares, int batch, int replicas) {
  const int count = 4096;
  const size_t image = size_t(channels) * extent * extent;
  const auto work = [=](double images, double index) {
    return Work{images * (image * (squares ? 9. : 5.) + 5 + index), images * image * (squares ? 3. : 2.)};
  };
  const std::string suffix = std::string(set_name) + (squares ? "/ffg" : "/ft");
  const auto outputs = [=](Buffers& b, size_t images) {
    struct Outputs {
      float *x, *x_squared;
      int32_t* labels;
    };
    return Outputs{b.room<float>(images * image), squares ? b.room<float>(images * image) : nullptr,
                   b.room<int32_t>(images)};
  };
  for (const bool augment : {false, true})
    add(
        "gather_training_batch" + suffix + (augment ? "/augmented" : "") + batch_name(batch, replicas),
        work(double(batch) * replicas, 4),
        [=](Buffers& b) -> std::function<void()> {
          const DeviceImages set = take_images(b, count, channels, extent);
          const auto to = outputs(b, size_t(batch) * replicas);
          const int32_t* order = b.integers<int32_t>(size_t(count) * replicas, count);
          const StepState* states = b.states(replicas, count);
          return [=, stream = b.stream()] {
            gather_training_batch(to.x, to.x_squared, to.labels, set, order, count, states, replicas, batch, stream,
                                  augment);
          };
        },
        Sets::warm_cold);
  if (replicas > 1) return;
  add("gather_indexed" + suffix + batch_name(batch), work(batch, 4), [=](Buffers& b) -> std::function<void()> {
    const DeviceImages set = take_images(b, count, channels, extent);
    const auto to = outputs(b, batch);
    const int32_t* index = b.integers<int32_t>(batch, count);
    return [=, stream = b.stream()] { gather_indexed(to.x, to.x_squared, to.labels, set, index, batch, stream); };
  });
}

// Bytes: a logit read, 4; a row's sums read and written, 8 (classes + 1). FLOPs a logit: 2 exp and 10.
// finish: sums read, means written, 8 a class, and 12 a row; 1 log and 4 a class.
void predictions(int batch, int samples) {
  const int classes = 10;
  const size_t n = size_t(samples) * batch * classes, sums = size_t(batch) * classes;
  const std::string suffix = "/batch:" + std::to_string(batch) + "/draws:" + std::to_string(samples);
  add("accumulate_predictions" + suffix, {4. * n + 8. * (sums + batch), 12. * n},
      [=](Buffers& b) -> std::function<void()> {
        const float* logits = b.normal(n, 3);
        float *probability = b.positive(sums), *entropy = b.positive(batch);
        return [=, stream = b.stream()] {
          accumulate_predictions(probability, entropy, logits, samples, batch, classes, stream);
        };
      });
  add("finish_predictions" + suffix, {8. * sums + 12. * batch, 5. * sums}, [=](Buffers& b) -> std::function<void()> {
    const float *sum = b.positive(sums, 1), *entropy_sum = b.positive(batch, 1);
    float *probability = b.room<float>(sums), *entropy = b.room<float>(batch), *information = b.room<float>(batch);
    return [=, stream = b.stream()] {
      finish_predictions(probability, entropy, information, sum, entropy_sum, samples, batch, classes, stream);
    };
  });
}

}  // namespace

void add_kernel_benchmarks() {
  softmax(128, 1, 10), softmax(128, 4, 10), softmax(1024, 1, 10), softmax(1024, 1, 100);
  totals(128, 1), totals(1024, 4);
  advance(1), advance(100);
  elementwise(128 * 500), elementwise(128 * 64 * 15 * 15);
  const NetworkSizes &lenet5 = lenet5_sizes(), &three_conv = conv3fc3_sizes();
  posterior(lenet5, 1), posterior(lenet5, 4), posterior(three_conv, 1);
  draws(lenet5, 1), draws(lenet5, 10), draws(three_conv, 1);
  initialisation(lenet5, 1), initialisation(lenet5, 4);
  curvature();
  for (const bool squares : {true, false}) {
    gathers("/mnist", 1, 28, squares, 128, 1);
    gathers("/mnist", 1, 28, squares, 128, 4);
    gathers("/cifar10", 3, 32, squares, 128, 1);
  }
  predictions(128, 1), predictions(500, 10), predictions(1000, 100);
}
