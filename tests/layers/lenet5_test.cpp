#include <nlohmann/json.hpp>
#include <numeric>

#include "kernels/softmax_xent.h"
#include "layers/networks.h"
#include "layers/posteriors/posterior.h"
#include "tests/support/device.h"
#include "tests/support/small_network.h"

namespace baton::test {
namespace {

const std::vector<std::string> layer_names{"conv1", "conv2", "fc1", "fc2"};
constexpr int classes = 10;

// LeNet5 in double precision, for a Gaussian posterior or (without variances) a point.
struct Reference {
  explicit Reference(int batch_size)
      : batch(batch_size),
        layers{{batch, 1, 28, 28, 20, 5, 0},
               {batch, 20, 12, 12, 50, 5, 0},
               ReferenceLayer::dense(batch, 800, 500),
               ReferenceLayer::dense(batch, 500, 10)} {}

  // The mean cross-entropy.
  double forward(const Doubles& x, const std::vector<int64_t>& labels, const std::vector<Doubles>& noise) {
    Doubles h = x;
    for (int i = 0; i < 3; i++) {
      const Doubles& y = layers[i].forward(h, noise[i]);
      h = pools[i].forward(y, batch * layers[i].out, layers[i].out_height(), layers[i].out_width(), i < 2 ? 2 : 0);
    }
    logits = layers[3].forward(h, noise[3]);
    loss.assign(batch, 0), up.assign(logits.size(), 0);
    for (int b = 0; b < batch; b++) {
      const double* l = &logits[size_t(b) * classes];
      double sum = 0;
      for (int c = 0; c < classes; c++) sum += std::exp(l[c]);
      loss[b] = std::log(sum) - l[labels[b]];
      for (int c = 0; c < classes; c++) up[size_t(b) * classes + c] = (std::exp(l[c]) / sum - (c == labels[b])) / batch;
    }
    return std::accumulate(loss.begin(), loss.end(), 0.0) / batch;
  }
  void backward() {
    Doubles g = layers[3].backward(up);
    for (int i = 2; i >= 0; i--) g = layers[i].backward(pools[i].backward(g, layers[i].outputs()));
  }
  std::vector<Doubles> noise(const StepState& s) const {
    return {conv_noise(s, stream_layers + 0, batch, 20, 24, 24), conv_noise(s, stream_layers + 1, batch, 50, 8, 8),
            dense_noise(s, stream_layers + 2, batch, 500), dense_noise(s, stream_layers + 3, batch, 10)};
  }
  void set(const struct Weights& w);

  int batch;
  std::vector<ReferenceLayer> layers;
  ReferencePool pools[3];
  Doubles logits, loss, up;
};

// [layer]
struct Weights {
  std::vector<Doubles> mean, sd, bias_mean, bias_sd;
};

void Reference::set(const Weights& w) {
  for (int i = 0; i < 4; i++) {
    layers[i].mean = w.mean[i], layers[i].bias_mean = w.bias_mean[i];
    if (!w.sd.empty()) layers[i].variance = squares(w.sd[i]), layers[i].bias_variance = squares(w.bias_sd[i]);
  }
}

struct Golden {
  Golden() : z(golden_file("layers/net_lenet5_ffg_b4")), x(z.f32("in_x")), labels(z.i64("in_y")) {
    const auto meta = nlohmann::json::parse(z.text("meta_json"));
    const auto scaled = [&](const std::string& name, const char* scale) {
      Doubles values = z.f64(name);
      for (double& v : values) v *= meta[scale].get<double>();
      return values;
    };
    for (const std::string& name : layer_names) {
      weights.mean.push_back(scaled("in_" + name + "_mu_q", "mu_scale"));
      weights.sd.push_back(scaled("in_" + name + "_sigma_q", "sigma_scale"));
      weights.bias_mean.push_back(scaled("in_" + name + "_b_mu_q", "mu_scale"));
      weights.bias_sd.push_back(scaled("in_" + name + "_b_sigma_q", "sigma_scale"));
      eps.push_back(z.f64("eps_" + name));
    }
  }
  Npz z;
  Weights weights;
  std::vector<float> x;
  std::vector<int64_t> labels;
  std::vector<Doubles> eps;
};

const Golden& golden() {
  static const Golden one;
  return one;
}
Weights point_weights(const Weights& w) { return {w.mean, {}, w.bias_mean, {}}; }

// The network of one replica on the device.
struct Net {
  Net(const Weights& weights, int batch, const StepState& step)
      : batch(batch),
        sampled(!weights.sd.empty()),
        network(make_network(network_spec("lenet5"))),
        posterior(make_posterior(memory.device(), memory.arena(), network->layout(), sampled ? "ffg" : "ft")),
        state(memory, std::vector<StepState>{step}) {
    network->prepare(posterior->training_context(batch));
    posterior->initialise(state);
    const auto log_of = [](Doubles sd) {
      for (double& s : sd) s = std::log(s);
      return floats(sd);
    };
    for (int i = 0; i < 4; i++) {
      write("mean", layer_names[i] + ".weight", floats(weights.mean[i]));
      write("mean", layer_names[i] + ".bias", floats(weights.bias_mean[i]));
      if (!sampled) continue;
      write("log_std", layer_names[i] + ".weight", log_of(weights.sd[i]));
      write("log_std", layer_names[i] + ".bias", log_of(weights.bias_sd[i]));
    }
    posterior->refresh(true);
  }
  void write(const std::string& array, const std::string& tensor, const std::vector<float>& values) {
    posterior->store().write(memory.device(), array, 0, find_tensor(network->layout(), tensor), values);
  }
  std::vector<float> read(const std::string& array, const std::string& tensor) {
    return posterior->store().read(memory.device(), array, 0, find_tensor(network->layout(), tensor));
  }
  void forward(const std::vector<float>& x, const std::vector<int64_t>& labels, bool gradient = true) {
    upload(memory.device(), network->input().signal.value, x);
    std::vector<float> square;
    for (float v : x) square.push_back(v * v);
    if (sampled) upload(memory.device(), network->input().signal.square, square);
    network->forward({state});
    Buffer label(memory, std::vector<int32_t>(labels.begin(), labels.end()));
    Buffer<float> losses(memory, size_t(batch)), hits(memory, size_t(batch));
    softmax_cross_entropy(losses, hits, gradient ? network->logits_gradient() : nullptr, network->logits(), label, 1,
                          batch, classes, 1.f / float(batch), memory.stream());
    loss = losses.host();
    logits = download(memory.device(), network->logits(), size_t(batch) * classes);
  }
  void backward() { network->backward({state}); }

  Memory memory;
  int batch;
  bool sampled;
  std::unique_ptr<Network> network;
  std::unique_ptr<Posterior> posterior;
  Buffer<StepState> state;
  std::vector<float> loss, logits;
};

const StepState step = state_of(21, 9);

TEST(LeNet5Net, Layout) {
  const auto net = make_network(network_spec("lenet5"));
  EXPECT_EQ(net->layout().parameters(), 430500u + 580u);
  EXPECT_STREQ(net->architecture(), "lenet5");
  EXPECT_EQ(net->classes(), classes);
  const std::vector<std::vector<int64_t>> shapes{{20, 1, 5, 5}, {20},  {50, 20, 5, 5}, {50},
                                                 {500, 800},    {500}, {10, 500},      {10}};
  ASSERT_EQ(net->layout().tensors().size(), shapes.size());
  for (int i = 0; i < 8; i++) {
    EXPECT_EQ(net->layout()[i].name, layer_names[i / 2] + (i % 2 ? ".bias" : ".weight"));
    EXPECT_EQ(net->layout()[i].shape, shapes[i]);
    EXPECT_EQ(net->layout()[i].bias, i % 2 == 1);
    EXPECT_EQ(net->layout()[i].fan_in, (std::vector<int>{25, 500, 800, 500})[i / 2]);
  }
}

// With the golden noise, the reference below reproduces what PyTorch computed.
TEST(LeNet5Net, TheReferenceIsRight) {
  const Golden& g = golden();
  Reference r(4);
  r.set(g.weights);
  const double nll = r.forward(doubles(g.x), g.labels, g.eps);
  r.backward();
  EXPECT_NEAR(nll, g.z.scalar("out_nll_mean"), 1e-12);
  EXPECT_TRUE(close(r.logits, g.z.f64("out_logits"), {.l2 = 1e-12}));
  EXPECT_TRUE(close(r.loss, g.z.f64("out_nll"), {.l2 = 1e-12}));
  for (int i = 0; i < 4; i++) {
    const std::string name = layer_names[i];
    const ReferenceLayer& layer = r.layers[i];
    expect_golden(g.z, "out_" + name + "_y", layer.y, 1e-7);
    for (const auto& [quantity, values] : {std::pair("out_" + name + "_m", &layer.m),
                                           {"out_" + name + "_v", &layer.v},
                                           {"g_" + name + "_mu", &layer.g_mean}}) {
      const auto print = fingerprint(*values);
      const Doubles want = g.z.f64(quantity + "_fp");
      for (size_t k = 0; k < print.size(); k++) EXPECT_NEAR(print[k], want[k], 1e-10 * want[1]) << quantity << " " << k;
    }
    Doubles sigma = layer.g_variance, bias_sigma = layer.g_bias_variance;
    for (size_t k = 0; k < sigma.size(); k++) sigma[k] *= 2 * g.weights.sd[i][k];
    for (size_t k = 0; k < bias_sigma.size(); k++) bias_sigma[k] *= 2 * g.weights.bias_sd[i][k];
    const auto print = fingerprint(sigma);
    const Doubles want = g.z.f64("g_" + name + "_sigma_fp");
    for (size_t k = 0; k < print.size(); k++) EXPECT_NEAR(print[k], want[k], 1e-10 * want[1]) << name << " " << k;
    expect_golden(g.z, "g_" + name + "_mu", layer.g_mean, 1e-7);
    expect_golden(g.z, "g_" + name + "_sigma", sigma, 1e-7);
    expect_golden(g.z, "g_" + name + "_b_mu", layer.g_bias_mean, 1e-7);
    expect_golden(g.z, "g_" + name + "_b_sigma", bias_sigma, 1e-7);
  }
}

void expect_gradients(Net& net, const Reference& r, double tolerance) {
  for (int i = 0; i < 4; i++) {
    SCOPED_TRACE(layer_names[i]);
    const ReferenceLayer& layer = r.layers[i];
    EXPECT_TRUE(close(net.read("mean.grad", layer_names[i] + ".weight"), layer.g_mean, {.l2 = tolerance}));
    EXPECT_TRUE(close(net.read("mean.grad", layer_names[i] + ".bias"), layer.g_bias_mean, {.l2 = tolerance}));
    if (!net.sampled) continue;
    EXPECT_TRUE(close(net.read("variance.grad", layer_names[i] + ".weight"), layer.g_variance, {.l2 = tolerance}));
    EXPECT_TRUE(close(net.read("variance.grad", layer_names[i] + ".bias"), layer.g_bias_variance, {.l2 = tolerance}));
  }
}

// With its own noise, the network agrees with the reference given that noise.
TEST(LeNet5Net, AgreesWithTheReference) {
  BATON_NEEDS_DEVICE();
  const Golden& g = golden();
  for (bool sampled : {true, false}) {
    SCOPED_TRACE(sampled ? "ffg" : "point");
    const Weights weights = sampled ? g.weights : point_weights(g.weights);
    Net net(weights, 4, step);
    net.forward(g.x, g.labels);
    net.backward();
    Reference r(4);
    r.set(weights);
    r.forward(doubles(g.x), g.labels, r.noise(step));
    r.backward();
    EXPECT_TRUE(close(net.logits, r.logits, {.l2 = 5e-6}));
    EXPECT_TRUE(close(net.loss, r.loss, {.l2 = 5e-6}));
    expect_gradients(net, r, 2e-5);
    EXPECT_NEAR(net.posterior->kl()[0] / g.z.scalar("out_kl"), sampled, 1e-5);
  }
}

// Slopes of the reference's loss by finite differences, with the noise held, against the network's gradients: of every
// tensor the steepest parameter and a few others, in the mean and in log sigma.
TEST(LeNet5Net, FiniteDifferences) {
  BATON_NEEDS_DEVICE();
  const Golden& g = golden();
  const int batch = 2;
  const std::vector<float> x(g.x.begin(), g.x.begin() + batch * 28 * 28);
  const std::vector<int64_t> labels(g.labels.begin(), g.labels.begin() + batch);
  for (bool sampled : {true, false}) {
    const Weights weights = sampled ? g.weights : point_weights(g.weights);
    Net net(weights, batch, step);
    net.forward(x, labels);
    net.backward();
    Reference r(batch);
    r.set(weights);
    const auto noise = r.noise(step);
    for (int i = 0; i < 4; i++)
      for (bool bias : {false, true})
        for (bool scale : {false, true}) {
          if (scale && !sampled) continue;
          const std::string tensor = layer_names[i] + (bias ? ".bias" : ".weight");
          SCOPED_TRACE(tensor + (scale ? ", log sigma" : ", mean") + (sampled ? "" : ", point"));
          ReferenceLayer& layer = r.layers[i];
          Doubles& parameters =
              scale ? (bias ? layer.bias_variance : layer.variance) : (bias ? layer.bias_mean : layer.mean);
          std::vector<float> gradient = net.read(scale ? "variance.grad" : "mean.grad", tensor);
          if (scale)
            for (size_t k = 0; k < gradient.size(); k++) gradient[k] *= 2 * float(parameters[k]);
          const size_t steepest = size_t(std::max_element(gradient.begin(), gradient.end(),
                                                          [](float a, float b) { return std::abs(a) < std::abs(b); }) -
                                         gradient.begin());
          Doubles got, want;
          for (size_t at : {steepest, gradient.size() / 3, gradient.size() - 1}) {
            const double before = parameters[at], h = scale ? 1e-3 : 1e-6;
            parameters[at] = scale ? before * std::exp(2 * h) : before + h;
            const double above = r.forward(doubles(x), labels, noise);
            parameters[at] = scale ? before * std::exp(-2 * h) : before - h;
            const double below = r.forward(doubles(x), labels, noise);
            parameters[at] = before;
            got.push_back(gradient[at]), want.push_back((above - below) / (2 * h));
          }
          EXPECT_TRUE(close(got, want, {.l2 = 1e-4, .bias = 1}));
        }
  }
}

TEST(LeNet5Net, AVanishingSigmaIsThePointPosterior) {
  BATON_NEEDS_DEVICE();
  const Golden& g = golden();
  Net point(point_weights(g.weights), 4, step);
  point.forward(g.x, g.labels);
  for (double log_std : {-40., -60.}) {  // at -60 the variance is 0 in float
    Weights weights = g.weights;
    for (auto* all : {&weights.sd, &weights.bias_sd})
      for (Doubles& sd : *all) sd.assign(sd.size(), std::exp(log_std));
    Net net(weights, 4, step);
    net.forward(g.x, g.labels);
    net.backward();
    EXPECT_TRUE(log_std > -50 ? close(net.logits, point.logits, {.l2 = 1e-7}) : exact(net.logits, point.logits));
    for (const char* array : {"mean.grad", "variance.grad"})
      for (const TensorSpec& t : net.network->layout().tensors())
        for (float d : net.read(array, t.name)) ASSERT_TRUE(std::isfinite(d)) << array << " " << t.name;
  }
}

TEST(LeNet5Net, NoiseChangesFromStepToStep) {
  BATON_NEEDS_DEVICE();
  const Golden& g = golden();
  Net a(g.weights, 4, step), b(g.weights, 4, step), next(g.weights, 4, state_of(21, 10));
  for (Net* net : {&a, &b, &next}) net->forward(g.x, g.labels);
  EXPECT_TRUE(exact(a.logits, b.logits));
  EXPECT_FALSE(exact(a.logits, next.logits));
}

// Without a backward pass there are no gradient buffers, and one batch may serve every replica.
TEST(LeNet5Net, ForwardAloneOnASharedInput) {
  BATON_NEEDS_DEVICE();
  const Golden& g = golden();
  const int replicas = 3, batch = 4;
  Memory memory;
  const auto network = make_network(network_spec("lenet5"));
  const size_t stride = network->layout().stride();
  std::vector<float> rows(stride * replicas);
  std::vector<std::vector<float>> want;
  for (int r = 0; r < replicas; r++) {
    Weights weights = point_weights(g.weights);
    for (auto* all : {&weights.mean, &weights.bias_mean})
      for (Doubles& mean : *all)
        for (double& m : mean) m *= 1 + 0.25 * r;
    Net net(weights, batch, step);
    net.forward(g.x, g.labels);
    want.push_back(net.logits);
    for (const TensorSpec& t : network->layout().tensors()) {
      const auto values = net.read("mean", t.name);
      std::copy(values.begin(), values.end(), rows.begin() + long(stride * r + t.offset));
    }
  }
  Buffer w(memory, rows);
  PointWeights weights(w, stride);
  network->prepare({memory.device(), memory.arena(), weights, replicas, batch, /*training*/ false,
                    /*shared_input*/ true});
  EXPECT_EQ(network->input().stride, 0u);
  upload(memory.device(), network->input().signal.value, g.x);
  network->forward({});
  const size_t count = size_t(batch) * classes;
  const auto logits = download(memory.device(), network->logits(), count * replicas);
  for (int r = 0; r < replicas; r++)
    EXPECT_TRUE(
        exact(std::vector<float>(logits.begin() + long(r * count), logits.begin() + long((r + 1) * count)), want[r]));
}

}  // namespace
}  // namespace baton::test
