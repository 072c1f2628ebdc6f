// What the tests of layers and trainers share: a network that trains in a blink, the noise that layers draw, weights in
// a store of a test's own, a layer alone on the device, and a Gaussian layer in double precision, by plain loops over
// the definition.
#pragma once
#include <cmath>
#include <random>

#include "layers/estimators.h"
#include "layers/network.h"
#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/npz.h"

namespace baton::test {

// 1x28x28  conv1 5x5, 3, ReLU, max 2x2/2 -> 3x12x12  fc1 16, ReLU  fc2 10
class SmallNetwork : public Network {
 public:
  SmallNetwork() : Network("small", {1, 28, 28}, 10) {
    add_convolution("conv1", 3, 5, 0, Pooling::max2);
    add_dense("fc1", 16);
    add_head("fc2");
  }
};

// ------------------------------------------------------------------------------------------------------------ noise
using Doubles = std::vector<double>;
inline Doubles doubles(const std::vector<float>& x) { return {x.begin(), x.end()}; }
inline std::vector<float> floats(const Doubles& x) { return {x.begin(), x.end()}; }

inline double lane_of(const float4& n, int lane) { return lane == 0 ? n.x : lane == 1 ? n.y : lane == 2 ? n.z : n.w; }

// [batch][units]: unit j is lane j / q of counter b q + j mod q, q = ceil(units / 4).
inline Doubles dense_noise(const StepState& s, uint32_t stream_id, int batch, int units) {
  const int q = (units + 3) / 4;
  Doubles e;
  for (int b = 0; b < batch; b++)
    for (int j = 0; j < units; j++)
      e.push_back(lane_of(normal4(s.noise, uint32_t(b * q + j % q), stream_id, s.step), j / q));
  return e;
}

// [batch][channels][h][w]: a plane's 2x2 windows are its counters, row by row; the last may hang over the edge.
inline Doubles conv_noise(const StepState& s, uint32_t stream_id, int batch, int channels, int h, int w) {
  const int wh = (h + 1) / 2, ww = (w + 1) / 2;
  Doubles e;
  for (int plane = 0; plane < batch * channels; plane++)
    for (int y = 0; y < h; y++)
      for (int x = 0; x < w; x++)
        e.push_back(lane_of(normal4(s.noise, uint32_t((plane * wh + y / 2) * ww + x / 2), stream_id, s.step),
                            2 * (y % 2) + x % 2));
  return e;
}

inline StepState state_of(uint64_t seed, uint32_t step) {
  StepState s{};
  s.noise = key_of(seed, 1);
  s.shuffle = key_of(seed, 2);
  s.step = step;
  return s;
}

inline std::vector<float> random_normal(size_t count, float mean, float sd, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(mean, sd);
  std::vector<float> x(count);
  for (float& v : x) v = normal(random);
  return x;
}
inline std::vector<float> random_uniform(size_t count, float low, float high, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(low, high);
  std::vector<float> x(count);
  for (float& v : x) v = uniform(random);
  return x;
}

// ---------------------------------------------------------------------------------------------------- the reference
// y = m + sqrt(v) e, m = x * mean + bias_mean, v = x^2 * variance + bias_variance, and its gradients for dL/dy = up.
// A dense layer is the 1x1 convolution of a 1x1 plane. Without variances it is a point posterior; biases may be absent.
struct ReferenceLayer {
  int batch, in, height, width, out, kernel, pad;
  Doubles mean{}, variance{}, bias_mean{}, bias_variance{};
  Doubles x{}, e{}, m{}, v{}, y{};
  Doubles dm{}, dv{}, g_mean{}, g_variance{}, g_bias_mean{}, g_bias_variance{}, g_x{};

  static ReferenceLayer dense(int batch, int in, int out) { return {batch, in, 1, 1, out, 1, 0}; }
  int out_height() const { return height + 2 * pad - kernel + 1; }
  int out_width() const { return width + 2 * pad - kernel + 1; }
  int plane() const { return out_height() * out_width(); }
  size_t inputs() const { return size_t(batch) * in * height * width; }
  size_t outputs() const { return size_t(batch) * out * plane(); }
  size_t weights() const { return size_t(out) * in * kernel * kernel; }
  bool sampled() const { return !variance.empty(); }

  const Doubles& forward(const Doubles& input, const Doubles& noise) {
    x = input, e = noise;
    m.assign(outputs(), 0), v.assign(outputs(), 0), y.assign(outputs(), 0);
    for (size_t i = 0; i < outputs(); i++) {
      if (!bias_mean.empty()) m[i] = bias_mean[i / plane() % out];
      if (!bias_variance.empty()) v[i] = bias_variance[i / plane() % out];
    }
    runs([this](size_t at_x, size_t at_w, size_t at_y, int count) {
      const double mu = mean[at_w], sigma2 = sampled() ? variance[at_w] : 0;
      for (int i = 0; i < count; i++) {
        const double a = x[at_x + i];
        m[at_y + i] += mu * a;
        v[at_y + i] += sigma2 * a * a;
      }
    });
    for (size_t i = 0; i < outputs(); i++) y[i] = m[i] + (sampled() ? std::sqrt(v[i]) * e[i] : 0);
    return y;
  }

  const Doubles& backward(const Doubles& up) {
    dm = up, dv.assign(outputs(), 0);
    g_mean.assign(weights(), 0), g_variance.assign(weights(), 0), g_x.assign(inputs(), 0);
    g_bias_mean.assign(out, 0), g_bias_variance.assign(out, 0);
    for (size_t i = 0; i < outputs(); i++) {
      if (sampled() && v[i] > 0) dv[i] = up[i] * e[i] / (2 * std::sqrt(v[i]));
      g_bias_mean[i / plane() % out] += dm[i];
      g_bias_variance[i / plane() % out] += dv[i];
    }
    runs([this](size_t at_x, size_t at_w, size_t at_y, int count) {
      const double mu = mean[at_w], sigma2 = sampled() ? variance[at_w] : 0;
      double sum_m = 0, sum_v = 0;
      for (int i = 0; i < count; i++) {
        const double a = x[at_x + i], d = dm[at_y + i], h = dv[at_y + i];
        sum_m += d * a;
        sum_v += h * a * a;
        g_x[at_x + i] += d * mu + 2 * a * h * sigma2;
      }
      g_mean[at_w] += sum_m, g_variance[at_w] += sum_v;
    });
    return g_x;
  }

 private:
  // f(first input, weight, first output, length) for every stretch of a row that one weight connects.
  template <class F>
  void runs(F f) const {
    const int oh = out_height(), ow = out_width();
    for (int b = 0; b < batch; b++)
      for (int o = 0; o < out; o++)
        for (int k = 0; k < in * kernel * kernel; k++) {
          const int c = k / (kernel * kernel), ky = k / kernel % kernel - pad, kx = k % kernel - pad;
          const int from = std::max(0, -kx), to = std::min(ow, width - kx);
          for (int row = std::max(0, -ky); row < std::min(oh, height - ky); row++)
            f(((size_t(b) * in + c) * height + row + ky) * width + from + kx, size_t(o) * in * kernel * kernel + k,
              ((size_t(b) * out + o) * oh + row) * ow + from, to - from);
        }
  }
};

// ReLU, then max pooling of stride 2 (window 0: none), and its way back.
struct ReferencePool {
  std::vector<size_t> winner{};  // of every output, among the inputs
  Doubles y{};

  const Doubles& forward(const Doubles& x, int planes, int h, int w, int window) {
    winner.clear(), y.clear();
    const int stride = window ? 2 : 1, side = window ? window : 1;
    for (int p = 0; p < planes; p++)
      for (int row = 0; row + side <= h; row += stride)
        for (int col = 0; col + side <= w; col += stride) {
          size_t best = (size_t(p) * h + row) * w + col;
          for (int k = 0; k < side * side; k++) {
            const size_t at = (size_t(p) * h + row + k / side) * w + col + k % side;
            if (x[at] > x[best]) best = at;
          }
          winner.push_back(best), y.push_back(std::max(0.0, x[best]));
        }
    return y;
  }
  Doubles backward(const Doubles& up, size_t inputs) const {
    Doubles g(inputs, 0);
    for (size_t i = 0; i < up.size(); i++)
      if (y[i] > 0) g[winner[i]] += up[i];
    return g;
  }
};

// --------------------------------------------------------------------------------------------- weights, and a layer
// The tensor of that name. InputError: there is none.
inline const TensorSpec& find_tensor(const ParameterLayout& layout, const std::string& name) {
  for (const TensorSpec& t : layout.tensors())
    if (t.name == name) return t;
  throw InputError("no tensor " + name);
}

// Weights from the arrays "mean" and "variance" of a store, whose gradients go to "mean.grad" and "variance.grad":
// Gaussians by local reparameterization (sampled), or points.
class StoreWeights : public WeightSource {
 public:
  StoreWeights(ParameterStore& store, bool sampled) : store_(store), sampled_(sampled) {
    for (const char* name : {"mean", "variance", "mean.grad", "variance.grad"}) store.add(name);
  }
  std::unique_ptr<Estimator> make_estimator(Linear& layer, const LayerContext& c) override {
    const RowWeights means{store_.at("mean"), store_.at("mean.grad"), store_.layout().stride()};
    if (!sampled_) return std::make_unique<PointEstimator>(layer, c, means);
    const GaussianWeights w{means.weights, store_.at("variance"), means.gradients, store_.at("variance.grad"),
                            means.stride};
    return std::make_unique<LocalReparameterization>(layer, c, w, means);
  }
  void forget_gradients(Device& device) {  // NaN until a layer writes them
    for (const char* name : {"mean.grad", "variance.grad"})
      upload(device, store_.at(name), std::vector<float>(store_.layout().stride() * store_.replicas(), NAN));
  }

 private:
  ParameterStore& store_;
  bool sampled_;
};

// Weights, gradients, step states and input of a layer whose tensors `layout` lists, for `rows` networks side by side.
class LayerBench {
 public:
  LayerBench(const ParameterLayout& layout, int rows, int batch, bool sampled, size_t input_size,
             bool input_gradient = true)
      : store_(memory_.arena(), layout, rows), weights_(store_, sampled), batch_(batch), sampled_(sampled) {
    weights_.forget_gradients(device());
    for (int r = 0; r < rows; r++) states_.push_back(state_of(uint64_t(100 + r), uint32_t(5 + r)));
    device_states_ = memory_.arena().take<StepState>(rows);
    x_ = take_activation(context(), input_size, sampled, input_gradient);
    set_states(states_);
  }

  Device& device() { return memory_.device(); }
  LayerContext context() {
    return {memory_.device(), memory_.arena(), weights_, store_.replicas(), batch_, /*training*/ true};
  }
  const Activation& x() const { return x_; }
  Pass pass() const { return {device_states_}; }
  const StepState& state(int row) const { return states_[row]; }
  void set_states(const std::vector<StepState>& states) {
    states_ = states;
    upload(device(), device_states_, states_);
  }

  void write(float* to, const std::vector<float>& values) { upload(device(), to, values); }
  std::vector<float> read(const float* from, size_t count) { return download(device(), from, count); }

  void set(const std::string& tensor, const std::vector<float>& mean, const std::vector<float>& variance, int row = 0) {
    store_.write(device(), "mean", row, spec(tensor), mean);
    if (sampled_) store_.write(device(), "variance", row, spec(tensor), variance);
  }
  void set_input(const std::vector<float>& x) {  // of every row
    write(x_.signal.value, x);
    std::vector<float> squares;
    for (float v : x) squares.push_back(v * v);
    if (sampled_) write(x_.signal.square, squares);
  }
  std::vector<float> mean_gradient(const std::string& tensor, int row = 0) {
    return store_.read(device(), "mean.grad", row, spec(tensor));
  }
  std::vector<float> variance_gradient(const std::string& tensor, int row = 0) {
    return store_.read(device(), "variance.grad", row, spec(tensor));
  }
  // Whether what lies between the tensors' gradients is as it was.
  bool gaps_untouched() {
    const size_t stride = store_.layout().stride();
    for (const char* name : {"mean.grad", "variance.grad"}) {
      const auto all = read(store_.at(name), stride * store_.replicas());
      for (int r = 0; r < store_.replicas(); r++)
        for (const auto& gap : store_.layout().gaps())
          for (size_t i = 0; i < gap.size; i++)
            if (!std::isnan(all[stride * r + gap.offset + i])) return false;
    }
    return true;
  }

 private:
  const TensorSpec& spec(const std::string& tensor) const { return find_tensor(store_.layout(), tensor); }

  Memory memory_;
  ParameterStore store_;
  StoreWeights weights_;
  int batch_;
  bool sampled_;
  std::vector<StepState> states_;
  StepState* device_states_;
  Activation x_;
};

// dL/dvalue in total: both paths of the gradient, for dL/dvalue = grad and dL/dsquare = grad_square.
inline Doubles total_gradient(const std::vector<float>& value, const std::vector<float>& grad,
                              const std::vector<float>& grad_square) {
  Doubles g = doubles(grad);
  for (size_t i = 0; i < grad_square.size(); i++) g[i] += 2.0 * value[i] * grad_square[i];
  return g;
}

// --------------------------------------------------------------------------------------------------------- goldens
inline Doubles squares(Doubles x) {
  for (double& v : x) v *= v;
  return x;
}
// From the gradient with respect to the variance to that with respect to sigma.
inline Doubles sigma_gradient(const std::vector<float>& variance_gradient, const Doubles& sd) {
  Doubles g = doubles(variance_gradient);
  for (size_t i = 0; i < g.size(); i++) g[i] *= 2 * sd[i];
  return g;
}
// `name` in full, or its fingerprint and samples.
inline void expect_golden(const Npz& z, const std::string& name, const Doubles& got, double tolerance) {
  SCOPED_TRACE(name);
  if (z.has(name)) {
    EXPECT_TRUE(close(got, z.f64(name), {.l2 = tolerance}));
    return;
  }
  const auto print = fingerprint(got);
  const Doubles want = z.f64(name + "_fp");
  const double l2 = want[1];
  for (size_t i = 0; i < print.size(); i++) EXPECT_NEAR(print[i], want[i], tolerance * 10 * l2) << "entry " << i;
  Doubles samples;
  for (int64_t i : z.i64(name + "_idx")) samples.push_back(got.at(size_t(i)));
  EXPECT_TRUE(close(samples, z.f64(name + "_val"), {.l2 = tolerance}));
}

}  // namespace baton::test
