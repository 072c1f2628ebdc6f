// The seam with libraries (engine/blas.h): the products of LeNet5's dense layers, and the convolutions of LeNet5
// and 3Conv3FC in their three directions. Under local reparameterization a step makes each of them twice (means,
// variances). One set of buffers, so that operands which fit lie in the cache (as in a step); these are bound by
// arithmetic.
#include "common.h"
#include "engine/blas.h"

using namespace baton;

namespace {

// Bytes: both operands read and the result written once. FLOPs: 2 m n k.
void product(const std::string& name, bool transpose_a, bool transpose_b, int m, int n, int k, int replicas) {
  const size_t a_size = size_t(m) * k, b_size = size_t(k) * n, c_size = size_t(m) * n;
  add(
      "gemm" + name, {4. * replicas * (a_size + b_size + c_size), 2. * replicas * m * n * k},
      [=](Buffers& buffers) -> std::function<void()> {
        const Matrices a{buffers.normal(a_size * replicas), a_size}, b{buffers.normal(b_size * replicas), b_size};
        const MutableMatrices c{buffers.room<float>(c_size * replicas), c_size};
        return
            [=, device = &buffers.device] { gemm(*device, transpose_a, transpose_b, m, n, k, a, b, 0.f, c, replicas); };
      },
      Sets::warm);
}

void dense(const char* layer, int in, int out, int batch, int replicas) {
  const std::string suffix = batch_name(batch, replicas);
  product(std::string(layer) + "/forward" + suffix, false, true, batch, out, in, replicas);
  product(std::string(layer) + "/data" + suffix, false, false, batch, in, out, replicas);
  product(std::string(layer) + "/weights" + suffix, true, false, out, in, batch, replicas);
}

enum class Direction { forward, data, weights };
constexpr const char* direction_names[] = {"/forward", "/data", "/weights"};

// Bytes: input, output and weights once each (two read, one written). FLOPs: 2 a weight and output position, products
// with the padding's zeros included, in every direction (cuda-practice.md 3.3: one MAC is 2 FLOP).
void convolution(const char* layer, ConvShape s, int replicas, Direction direction) {
  const double macs = double(s.output_size()) * s.in_channels * s.kernel * s.kernel;
  const double floats = double(s.input_size()) + double(s.output_size()) + double(s.weight_size());
  add(
      "convolution" + std::string(layer) + direction_names[int(direction)] + batch_name(s.batch, replicas),
      {4. * replicas * floats, 2. * replicas * macs},
      [=](Buffers& b) -> std::function<void()> {
        const auto conv = std::make_shared<Convolution>(b.device, b.arena, s, replicas);
        const auto in = [&](size_t n) { return Matrices{b.normal(n * replicas), n}; };
        const auto out = [&](size_t n) { return MutableMatrices{b.room<float>(n * replicas), n}; };
        Device* device = &b.device;
        if (direction == Direction::forward) {
          const Matrices x = in(s.input_size()), w = in(s.weight_size());
          const MutableMatrices y = out(s.output_size());
          return [=] { conv->forward(*device, x, w, y); };
        }
        const Matrices dy = in(s.output_size());
        if (direction == Direction::data) {
          const Matrices w = in(s.weight_size());
          const MutableMatrices dx = out(s.input_size());
          return [=] { conv->backward_data(*device, dy, w, dx); };
        }
        const Matrices x = in(s.input_size());
        const MutableMatrices dw = out(s.weight_size());
        return [=] { conv->backward_weights(*device, x, dy, dw); };
      },
      Sets::warm);
}

// first: the network's first layer, which has no gradient to hand down.
void convolution(const char* layer, ConvShape s, int replicas, bool first) {
  convolution(layer, s, replicas, Direction::forward);
  if (!first) convolution(layer, s, replicas, Direction::data);
  convolution(layer, s, replicas, Direction::weights);
}

}  // namespace

void add_seam_benchmarks() {
  constexpr struct { int batch, replicas; } sizes[] = {{128, 1}, {128, 4}, {1024, 1}};
  for (const auto& size : sizes) {
    dense("/lenet5.fc1", 800, 500, size.batch, size.replicas);
    dense("/lenet5.fc2", 500, 10, size.batch, size.replicas);
    convolution("/lenet5.conv1", {size.batch, 1, 28, 28, 20, 5, 0}, size.replicas, true);
    convolution("/lenet5.conv2", {size.batch, 20, 12, 12, 50, 5, 0}, size.replicas, false);
  }
  convolution("/3conv3fc.conv1", {128, 3, 32, 32, 32, 5, 2}, 1, true);
  convolution("/3conv3fc.conv2", {128, 32, 15, 15, 64, 5, 2}, 1, false);
  convolution("/3conv3fc.conv3", {128, 64, 7, 7, 128, 5, 2}, 1, false);
}
