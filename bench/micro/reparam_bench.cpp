// kernels/local_reparam.h at the shapes of LeNet5 (convolutions pooled 2x2, dense layers) and 3Conv3FC (convolutions
// pooled 3x3, and the same without pooling), for the Gaussian posterior (ffg: noise, variances, squares) and the point
// one (ft). In training at batch 128 all of it lies in a GPU's L2, as in /warm.
#include "common.h"
#include "kernels/local_reparam.h"

using namespace baton;

namespace {

const char* family(bool noisy) { return noisy ? "/ffg" : "/ft"; }

struct Size {
  int batch, replicas;
};
constexpr Size sizes[] = {{128, 1}, {128, 4}, {1024, 1}};

Bias take_bias(Buffers& b, int units, int replicas, bool noisy) {
  const size_t n = size_t(units) * replicas;
  return {b.normal(n, 0.1f), noisy ? b.positive(n) : nullptr, size_t(units)};
}

Signal take_output(Buffers& b, size_t n, bool square) {
  Signal s;
  s.value = b.room<float>(n);
  if (square) s.square = b.room<float>(n);
  return s;
}

// The way back reads the output, its gradient and, under noise, the gradient of its square.
Signal take_gradients(Buffers& b, size_t n, bool noisy) {
  Signal s;
  s.value = b.normal(n);
  s.grad = b.normal(n);
  if (noisy) s.grad_square = b.normal(n);
  return s;
}

// Bytes an output, forward: m, v read, v', y, y^2 written = 20 (ft: m, y = 8; no y^2 for the logits).
//   backward: grad, y, grad_square, v read, dm, dv written = 24 (ft: grad, y, dm = 12).
// FLOPs an output, forward: a normal, bias 2, sqrt, fma 2, relu, square = 67 (ft 2). Backward: a normal, fold 3, relu,
//   slope 3, product = 68 (ft 1).
void dense(const char* layer, int units, bool relu, bool feeds_layer, bool noisy, Size size) {
  const DenseShape s{size.replicas, size.batch, units};
  const size_t n = size_t(s.replicas) * s.batch * units;
  const std::string suffix = std::string(layer) + family(noisy) + batch_name(s.batch, s.replicas);
  const bool square = noisy && feeds_layer;
  add("dense_sample" + suffix, {n * (noisy ? square ? 20. : 16. : 8.), n * (noisy ? flops_a_normal + 7 : 2.)},
      [=](Buffers& b) -> std::function<void()> {
        const Signal out = take_output(b, n, square);
        const float* m = b.normal(n);
        float* v = noisy ? b.positive(n) : nullptr;
        const Bias bias = take_bias(b, units, s.replicas, noisy);
        const StepState* states = b.states(s.replicas);
        return [=, stream = b.stream()] { dense_sample(out, m, v, bias, s, relu, states, 2, stream); };
      });
  const bool folds = noisy && feeds_layer;  // the logits' gradient has no part through their squares
  add("dense_sample_backward" + suffix, {n * (noisy ? folds ? 24. : 20. : 12.), n * (noisy ? flops_a_normal + 8 : 1.)},
      [=](Buffers& b) -> std::function<void()> {
        const Signal out = take_gradients(b, n, folds);
        const float* v = noisy ? b.positive(n) : nullptr;
        float *dm = b.room<float>(n), *dv = noisy ? b.room<float>(n) : nullptr;
        const StepState* states = b.states(s.replicas);
        return [=, stream = b.stream()] { dense_sample_backward(dm, dv, out, v, s, relu, states, 2, stream); };
      });
  // Bytes: dm (and dv) read, a sum a unit written. FLOPs: an add each.
  const double arrays = noisy ? 2 : 1, rows = double(s.replicas) * units;
  add("dense_bias_gradient" + suffix, {arrays * 4 * (n + rows), arrays * n}, [=](Buffers& b) -> std::function<void()> {
    const float *dm = b.normal(n), *dv = noisy ? b.normal(n) : nullptr;
    float* db = b.room<float>(size_t(units) * s.replicas);
    float* db_variance = noisy ? b.room<float>(size_t(units) * s.replicas) : nullptr;
    return [=, stream = b.stream()] { dense_bias_gradient(db, db_variance, units, dm, dv, s, stream); };
  });
}

// As dense, and a sum or two a plane on the way back.
void conv(const char* layer, int channels, int h, int w, bool noisy, Size size) {
  const ConvPlanes s{size.replicas, size.batch, channels, h, w};
  const size_t planes = size_t(s.replicas) * s.batch * channels, n = planes * h * w;
  const std::string suffix = std::string(layer) + family(noisy) + batch_name(s.batch, s.replicas);
  add("conv_sample" + suffix, {n * (noisy ? 20. : 8.), n * (noisy ? flops_a_normal + 7 : 2.)},
      [=](Buffers& b) -> std::function<void()> {
        const Signal out = take_output(b, n, noisy);
        const float* m = b.normal(n);
        float* v = noisy ? b.positive(n) : nullptr;
        const Bias bias = take_bias(b, channels, s.replicas, noisy);
        const StepState* states = b.states(s.replicas);
        return [=, stream = b.stream()] { conv_sample(out, m, v, bias, s, true, states, 0, stream); };
      });
  add("conv_sample_backward" + suffix,
      {n * (noisy ? 24. : 12.) + planes * (noisy ? 8. : 4.), n * (noisy ? flops_a_normal + 10 : 2.)},
      [=](Buffers& b) -> std::function<void()> {
        const Signal out = take_gradients(b, n, noisy);
        const float* v = noisy ? b.positive(n) : nullptr;
        float *dm = b.room<float>(n), *dv = noisy ? b.room<float>(n) : nullptr, *sums = b.room<float>(2 * planes);
        const StepState* states = b.states(s.replicas);
        return [=, stream = b.stream()] { conv_sample_backward(dm, dv, sums, out, v, s, true, states, 0, stream); };
      });
}

// Bytes forward: m, v a pre-activation = 8 (ft 4); y, y^2, place, slope a window = 13 (ft: y, place = 5).
//   backward: dm, dv a pre-activation = 8 (ft 4); grad, y, grad_square, place, slope a window = 17 (ft 5); a plane's
//   sums
// FLOPs forward: a pre-activation a normal, bias, sqrt, fma 2, compare = 65 (ft 1); a window bias, relu, square,
//   slope 2 = 5 (ft 2). Backward, a window: fold 3, cut, product, two sums = 7 (ft 2). A window of 3x3 has five more
//   compares than pre-activations of its own, and on the way back adds to a winner that it may share, two sums (ft 1).
void conv_pool(const char* layer, int channels, int h, int w, bool noisy, Size size, int window = 2) {
  const ConvPlanes s{size.replicas, size.batch, channels, h, w, window};
  const int overlap = window == 3 ? 1 : 0;
  const size_t planes = size_t(s.replicas) * s.batch * channels, n = planes * h * w;
  const size_t pooled = planes * s.pooled_h() * s.pooled_w();
  const std::string suffix = std::string(layer) + family(noisy) + batch_name(s.batch, s.replicas);
  add("conv_sample_pool" + suffix,
      {n * (noisy ? 8. : 4.) + pooled * (noisy ? 13. : 5.),
       n * (noisy ? flops_a_normal + 5 : 1.) + pooled * ((noisy ? 5. : 2.) + 5 * overlap)},
      [=](Buffers& b) -> std::function<void()> {
        const Signal out = take_output(b, pooled, noisy);
        uint8_t* which = b.room<uint8_t>(pooled);
        float* slope = noisy ? b.room<float>(pooled) : nullptr;
        const float *m = b.normal(n), *v = noisy ? b.positive(n) : nullptr;
        const Bias bias = take_bias(b, channels, s.replicas, noisy);
        const StepState* states = b.states(s.replicas);
        return [=, stream = b.stream()] { conv_sample_pool(out, which, slope, m, v, bias, s, states, 0, stream); };
      });
  add("conv_sample_pool_backward" + suffix,
      {n * (noisy ? 8. : 4.) + pooled * (noisy ? 17. : 5.) + planes * (noisy ? 8. : 4.),
       pooled * ((noisy ? 7. : 2.) + (noisy ? 2 : 1) * overlap)},
      [=](Buffers& b) -> std::function<void()> {
        const Signal out = take_gradients(b, pooled, noisy);
        const uint8_t* which = b.integers<uint8_t>(pooled, window * window + 1);
        const float* slope = noisy ? b.normal(pooled) : nullptr;
        float *dm = b.room<float>(n), *dv = noisy ? b.room<float>(n) : nullptr, *sums = b.room<float>(2 * planes);
        return [=, stream = b.stream()] { conv_sample_pool_backward(dm, dv, sums, out, which, slope, s, stream); };
      });
  // Bytes: a sum or two a plane read, one or two a channel written. FLOPs: an add each.
  const double arrays = noisy ? 2 : 1;
  add("conv_bias_gradient" + suffix, {arrays * 4 * (planes + double(s.replicas) * channels), arrays * planes},
      [=](Buffers& b) -> std::function<void()> {
        const float* sums = b.normal(2 * planes);
        float* db = b.room<float>(size_t(channels) * s.replicas);
        float* db_variance = noisy ? b.room<float>(size_t(channels) * s.replicas) : nullptr;
        return [=, stream = b.stream()] { conv_bias_gradient(db, db_variance, channels, sums, s, stream); };
      });
}

}  // namespace

void add_reparam_benchmarks() {
  for (const bool noisy : {true, false})
    for (const Size size : sizes) {
      conv_pool("/lenet5.conv1", 20, 24, 24, noisy, size);
      conv_pool("/lenet5.conv2", 50, 8, 8, noisy, size);
      dense("/lenet5.fc1", 500, true, true, noisy, size);
      dense("/lenet5.fc2", 10, false, false, noisy, size);
    }
  for (const bool noisy : {true, false}) {
    conv_pool("/3conv3fc.conv1", 32, 32, 32, noisy, {128, 1}, 3);
    conv_pool("/3conv3fc.conv2", 64, 15, 15, noisy, {128, 1}, 3);
    conv_pool("/3conv3fc.conv3", 128, 7, 7, noisy, {128, 1}, 3);
    conv("/3conv3fc.conv1", 32, 32, 32, noisy, {128, 1});
    conv("/3conv3fc.conv2", 64, 15, 15, noisy, {128, 1});
    conv("/3conv3fc.conv3", 128, 7, 7, noisy, {128, 1});
  }
}
