// Our own products for tensor cores (kernels/layer_product.h), each direction with mean and variance together, at the
// layers of LeNet5 and 3Conv3FC; rows are replicas. Beside them stand the libraries' single products of the same shapes
// (seam_bench.cpp): two of those do the work of one of these. The serial build multiplies by plain loops here, which
// tells nothing of speed, so the host has the smallest shape alone.
#include "common.h"
#include "kernels/layer_product.h"

using namespace baton;

namespace {

// Bytes: inputs and weights read once, outputs written once, for both products. FLOPs: 2 a weight and output position.
void own_product(const char* layer, const ConvShape& s, int rows, bool first) {
  enum class Direction { forward, data, weights };
  for (const auto& [direction, name] : {std::pair{Direction::forward, "/forward"}, std::pair{Direction::data, "/data"},
                                        std::pair{Direction::weights, "/weights"}}) {
    if (first && direction == Direction::data) continue;  // a first layer hands no gradient down
    const double macs = double(s.output_size()) * s.in_channels * s.kernel * s.kernel;
    const double floats = double(s.input_size()) + 2. * double(s.output_size()) + 2. * double(s.weight_size());
    add(
        "layer_product" + std::string(layer) + name + batch_name(s.batch, rows), {4. * rows * floats, 4. * rows * macs},
        [=, d = direction](Buffers& b) -> std::function<void()> {
          const size_t in = s.input_size(), out = s.output_size(), weights = s.weight_size();
          const auto jobs = std::make_shared<ProductJobs>();
          const auto rounded = [&](size_t n) {  // as the kernels before it leave operands: a tf32 number each
            std::vector<float> v = download(b.device, b.normal(n * rows), n * rows);
            for (float& x : v) x = simt::round_to_tf32(x);
            return Matrices{b.put(v), n};
          };
          const auto room = [&](size_t n) { return MutableMatrices{b.room<float>(n * rows), n}; };
          const Matrices mean{b.normal(weights * rows), weights}, variance{b.positive(weights * rows), weights};
          const auto own = std::make_shared<LayerProduct>(b.arena, *jobs, s, rows, 1, mean, variance, true,
                                                          room(weights), room(weights));
          jobs->settle(b.device, b.arena);
          jobs->pack(b.stream());
          const Stream stream = b.stream();
          if (d == Direction::forward) {
            const Matrices x = rounded(in);
            const MutableMatrices m = room(out), v = room(out);
            return [=] { own->forward(x, m, v, stream); };
          }
          const Matrices dm = rounded(out), dv = rounded(out);
          if (d == Direction::data) {
            const MutableMatrices dx = room(in), dsquare = room(in);
            return [=] { own->backward_data(dm, dv, dx, dsquare, stream); };
          }
          const Matrices x = rounded(in);
          return [=] {
            own->backward_weights(x, dm, dv, stream);
            jobs->add_up(stream);
          };
        },
        Sets::warm);
  }
}

}  // namespace

void add_product_benchmarks() {
  if (!on_gpu) return own_product("/lenet5.fc2", {8, 500, 1, 1, 10, 1, 0}, 1, false);
  for (const int rows : {1, 16, 100}) {
    own_product("/lenet5.conv1", {128, 1, 28, 28, 20, 5, 0}, rows, true);
    own_product("/lenet5.conv2", {128, 20, 12, 12, 50, 5, 0}, rows, false);
    own_product("/lenet5.fc1", {128, 800, 1, 1, 500, 1, 0}, rows, false);
    own_product("/lenet5.fc2", {128, 500, 1, 1, 10, 1, 0}, rows, false);
    own_product("/3conv3fc.conv1", {128, 3, 32, 32, 32, 5, 2}, rows, true);
    own_product("/3conv3fc.conv2", {128, 32, 15, 15, 64, 5, 2}, rows, false);
    own_product("/3conv3fc.conv3", {128, 64, 7, 7, 128, 5, 2}, rows, false);
  }
}
