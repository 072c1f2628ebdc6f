// Bayesian gradient descent (kernels/bgd.h) at the sizes of the perceptrons 784-h-h-10 and of VGG11's largest layer:
// the draws of the weights, the moments of given gradients and of a dense layer's product, in both ways, and the
// update.
#include "kernels/bgd.h"

#include "common.h"

using namespace baton;

namespace {

// Bytes: mean and sd read once, a weight written a draw: 8 n + 4 n K. FLOPs: a normal and 2 a weight and draw.
void draws(const char* network, int n, int k) {
  add(std::string("draw_weights") + network + "/draws:" + std::to_string(k),
      {8. * n + 4. * n * k, (flops_a_normal + 2) * n * k}, [=](Buffers& b) -> std::function<void()> {
        float *mean = b.normal(n, 0.05f), *sd = b.positive(n, 0.05f), *w = b.room<float>(size_t(n) * k);
        const StepState* states = b.states(1);
        return [=, stream = b.stream()] { draw_weights(w, n, mean, sd, n, 0, k, states, stream); };
      });
}

// Bytes: K gradients read, both sums written: 4 n K + 8 n. FLOPs: a normal and 3 a weight and draw.
void moments(const char* network, int n, int k) {
  add(std::string("accumulate_moments") + network + "/draws:" + std::to_string(k),
      {4. * n * k + 8. * n, (flops_a_normal + 3) * n * k}, [=](Buffers& b) -> std::function<void()> {
        const float* grad = b.normal(size_t(n) * k);
        const Moments m{b.room<float>(n), b.room<float>(n)};
        const StepState* states = b.states(1);
        return [=, stream = b.stream()] { accumulate_moments(m, grad, n, 0, n, {0, k, false}, states, stream); };
      });
}

// Bytes: dy and x of every draw read once, both sums written: 4 K batch (out + in) + 8 out in. FLOPs: 2 out in batch a
// draw, and a normal and 3 a weight and draw.
void products(const char* layer, int out, int in, int batch, int k) {
  const double weights = double(out) * in;
  const Work work{4. * k * batch * (out + in) + 8 * weights, k * weights * (2. * batch + flops_a_normal + 3)};
  const auto with = [=](const std::string& name, auto call) {
    add("product_moments/" + name + layer + "/batch:" + std::to_string(batch) + "/draws:" + std::to_string(k), work,
        [=](Buffers& b) -> std::function<void()> {
          const Matrices dy{b.normal(size_t(k) * batch * out, 1e-2f), size_t(batch) * out};
          const Matrices x{b.normal(size_t(k) * batch * in), size_t(batch) * in};
          const Moments m{b.room<float>(size_t(out) * in), b.room<float>(size_t(out) * in)};
          const StepState* states = b.states(1);
          return [=, &device = b.device] { call(device, m, 0, out, in, batch, dy, x, DrawnPass{0, k, false}, states); };
        });
  };
  with("fused", product_moments_fused);
  if (!on_gpu) with("tiles", product_moments_by_tiles);
}

// Bytes: mean and sd read and written, both sums read: 24 n. FLOPs a weight: about 20, a root and a division among
// them.
void updates(const char* network, int n) {
  add(std::string("bgd_update") + network, {24. * n, 20. * n}, [=](Buffers& b) -> std::function<void()> {
    float *mean = b.normal(n, 0.05f), *sd = b.positive(n, 0.05f), *partial = b.room<float>(bgd_partials(n));
    const Moments m{b.normal(n, 1e-9f), b.normal(n, 1e-9f)};
    SigmaStatistics* statistics = b.room<SigmaStatistics>(1);
    TripWire* wire = b.room<TripWire>(1);
    StepState* states = b.states(1);
    BgdRule rule;
    rule.initial_sd = 1e3f;  // the wire stays up
    return [=, stream = b.stream()] { bgd_update(mean, sd, m, n, rule, statistics, wire, states, 1, partial, stream); };
  });
}

}  // namespace

void add_bgd_benchmarks() {
  const struct {
    const char* name;
    int n;
  } networks[] = {{"/mlp400", 478410}, {"/mlp1200", 2395210}};
  for (const auto& of : networks) {
    draws(of.name, of.n, 1);
    draws(of.name, of.n, 10);
    moments(of.name, of.n, 1);
    updates(of.name, of.n);
  }
  products("/mlp400.fc1", 400, 784, 128, 10);
  products("/mlp1200.fc1", 1200, 784, 128, 10);
  products("/mlp1200.fc2", 1200, 1200, 128, 10);
  products("/mlp1200.fc3", 10, 1200, 128, 10);
}
