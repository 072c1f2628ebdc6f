#include <numeric>

#include "kernels/softmax_xent.h"
#include "layers/networks.h"
#include "layers/posteriors/posterior.h"
#include "tests/support/device.h"
#include "tests/support/small_network.h"

namespace baton::test {
namespace {

const std::vector<std::string> layer_names{"conv1", "conv2", "conv3", "fc1", "fc2", "fc3"};
constexpr int classes = 10;

std::unique_ptr<Network> conv3fc3(int outputs = classes) { return make_network(network_spec("3conv3fc", outputs)); }

// 3Conv3FC in double precision, for a Gaussian posterior or (without variances) a point.
struct Reference {
  explicit Reference(int batch_size)
      : batch(batch_size),
        layers{{batch, 3, 32, 32, 32, 5, 2},
               {batch, 32, 15, 15, 64, 5, 2},
               {batch, 64, 7, 7, 128, 5, 2},
               ReferenceLayer::dense(batch, 1152, 1000),
               ReferenceLayer::dense(batch, 1000, 1000),
               ReferenceLayer::dense(batch, 1000, classes)} {}

  // The mean cross-entropy.
  double forward(const Doubles& x, const std::vector<int32_t>& labels, const StepState& s) {
    Doubles h = x;
    for (uint32_t i = 0; i < 6; i++) {
      ReferenceLayer& l = layers[i];
      const Doubles noise = i < 3 ? conv_noise(s, stream_layers + i, batch, l.out, l.out_height(), l.out_width())
                                  : dense_noise(s, stream_layers + i, batch, l.out);
      const Doubles& y = l.forward(h, noise);
      h = i < 5 ? pools[i].forward(y, batch * l.out, l.out_height(), l.out_width(), i < 3 ? 3 : 0) : y;
    }
    logits = h;
    up.assign(logits.size(), 0);
    double loss = 0;
    for (int b = 0; b < batch; b++) {
      const double* l = &logits[size_t(b) * classes];
      double sum = 0;
      for (int c = 0; c < classes; c++) sum += std::exp(l[c]);
      loss += (std::log(sum) - l[labels[b]]) / batch;
      for (int c = 0; c < classes; c++) up[size_t(b) * classes + c] = (std::exp(l[c]) / sum - (c == labels[b])) / batch;
    }
    return loss;
  }
  void backward() {
    Doubles g = layers[5].backward(up);
    for (int i = 4; i >= 0; i--) g = layers[i].backward(pools[i].backward(g, layers[i].outputs()));
  }

  int batch;
  std::vector<ReferenceLayer> layers;
  ReferencePool pools[5];
  Doubles logits, up;
};

// The network on the device, its batch, and what is left after both passes.
struct Net {
  Net(const std::string& kind, int batch, const std::vector<StepState>& steps, int inputs_from = 0)
      : batch(batch),
        replicas(int(steps.size())),
        posterior(
            make_posterior(memory.device(), memory.arena(), network->layout(), kind,
                           std::vector<json>(replicas, kind == "ft" ? json::object() : json{{"init_log_std", -4}}))),
        states(memory, steps) {
    network->prepare(posterior->training_context(batch));
    posterior->initialise(states);
    for (int r = 0; r < replicas; r++) {
      const std::vector<float> one =
          random_uniform(size_t(batch) * 3 * 32 * 32, -1.5f, 1.5f, unsigned(inputs_from + r));
      x.insert(x.end(), one.begin(), one.end());
      for (int b = 0; b < batch; b++) labels.push_back((inputs_from + r + 3 * b) % classes);
      for (const TensorSpec& t : network->layout().tensors())  // biases that are not 0
        if (t.bias)
          posterior->store().write(memory.device(), "mean", r, t,
                                   random_normal(t.size, 0, 0.1f, unsigned(inputs_from + r + int(t.offset))));
    }
    upload(memory.device(), network->input().signal.value, x);
    std::vector<float> square;
    for (float v : x) square.push_back(v * v);
    if (kind != "ft") upload(memory.device(), network->input().signal.square, square);
    network->forward({states});
    Buffer label(memory, labels);
    Buffer<float> losses(memory, labels.size()), hits(memory, labels.size());
    softmax_cross_entropy(losses, hits, network->logits_gradient(), network->logits(), label, replicas, batch, classes,
                          1.f / float(batch), memory.stream());
    loss = losses.host();
    logits = download(memory.device(), network->logits(), labels.size() * classes);
    network->backward({states});
  }
  std::vector<float> read(const char* array, int tensor, int replica = 0) {
    return posterior->store().read(memory.device(), array, replica, network->layout()[tensor]);
  }

  Memory memory;
  int batch, replicas;
  std::unique_ptr<Network> network = conv3fc3();
  std::unique_ptr<Posterior> posterior;
  Buffer<StepState> states;
  std::vector<float> x, loss, logits;
  std::vector<int32_t> labels;
};

TEST(Conv3Fc3Net, Layout) {
  const auto net = conv3fc3();
  EXPECT_STREQ(net->architecture(), "3conv3fc");
  EXPECT_EQ(net->classes(), classes);
  EXPECT_EQ(net->layout().parameters(), 2'420'400u + 2'234u);
  size_t weights = 0, biases = 0;
  const std::vector<std::vector<int64_t>> shapes{{32, 3, 5, 5}, {32},   {64, 32, 5, 5}, {64},   {128, 64, 5, 5}, {128},
                                                 {1000, 1152},  {1000}, {1000, 1000},   {1000}, {10, 1000},      {10}};
  ASSERT_EQ(net->layout().tensors().size(), shapes.size());
  for (int i = 0; i < 12; i++) {
    const TensorSpec& t = net->layout()[i];
    EXPECT_EQ(t.name, layer_names[i / 2] + (i % 2 ? ".bias" : ".weight"));
    EXPECT_EQ(t.shape, shapes[i]);
    EXPECT_EQ(t.bias, i % 2 == 1);
    EXPECT_EQ(t.fan_in, (std::vector<int>{75, 800, 1600, 1152, 1000, 1000})[i / 2]);
    (t.bias ? biases : weights) += t.size;
  }
  EXPECT_EQ(weights, 2'420'400u);
  EXPECT_EQ(biases, 2'234u);
  EXPECT_EQ(conv3fc3(5)->layout().parameters(), net->layout().parameters() - 5 * 1001);
  EXPECT_EQ(conv3fc3(5)->classes(), 5);
  EXPECT_THROW(conv3fc3(1), InputError);
}

TEST(Conv3Fc3Net, AgreesWithTheReference) {
  BATON_NEEDS_DEVICE();
  for (const std::string kind : {"ffg", "ft"}) {
    SCOPED_TRACE(kind);
    const StepState step = state_of(21, 9);
    Net net(kind, 2, {step});
    Reference r(2);
    for (int i = 0; i < 6; i++) {
      r.layers[i].mean = doubles(net.read("mean", 2 * i)), r.layers[i].bias_mean = doubles(net.read("mean", 2 * i + 1));
      if (kind == "ft") continue;
      r.layers[i].variance = doubles(net.read("variance", 2 * i));
      r.layers[i].bias_variance = doubles(net.read("variance", 2 * i + 1));
    }
    const double loss = r.forward(doubles(net.x), net.labels, step);
    r.backward();
    EXPECT_NEAR(std::accumulate(net.loss.begin(), net.loss.end(), 0.0) / 2, loss, 1e-5 * loss);
    EXPECT_TRUE(close(net.logits, r.logits, {.l2 = 5e-6}));
    const std::vector<NamedActivation> activations = net.network->activations();
    ASSERT_EQ(activations.size(), 6u);
    const size_t sizes[] = {32 * 15 * 15, 64 * 7 * 7, 128 * 3 * 3, 1000, 1000, 10};
    for (int i = 0; i < 6; i++) {
      SCOPED_TRACE(layer_names[i]);
      const Activation& a = activations[i].activation;
      EXPECT_EQ(activations[i].layer, layer_names[i]);
      ASSERT_EQ(a.size, sizes[i]);
      EXPECT_TRUE(close(download(net.memory.device(), a.signal.value, a.stride), i < 5 ? r.pools[i].y : r.logits,
                        {.l2 = 5e-6}));
      const ReferenceLayer& l = r.layers[i];
      EXPECT_TRUE(close(net.read("mean.grad", 2 * i), l.g_mean, {.l2 = 3e-5}));
      EXPECT_TRUE(close(net.read("mean.grad", 2 * i + 1), l.g_bias_mean, {.l2 = 3e-5}));
      if (kind == "ft") continue;
      EXPECT_TRUE(close(net.read("variance.grad", 2 * i), l.g_variance, {.l2 = 3e-5}));
      EXPECT_TRUE(close(net.read("variance.grad", 2 * i + 1), l.g_bias_variance, {.l2 = 3e-5}));
    }
  }
}

// Two replicas at once are two networks, under both kinds.
TEST(Conv3Fc3Net, ReplicasDoNotSeeEachOther) {
  BATON_NEEDS_DEVICE();
  for (const std::string kind : {"ffg", "ft"}) {
    SCOPED_TRACE(kind);
    const std::vector<StepState> steps{state_of(1, 4), state_of(2, 6)};
    Net both(kind, 2, steps);
    for (int r = 0; r < 2; r++) {
      Net one(kind, 2, {steps[r]}, r);
      EXPECT_TRUE(
          exact(std::vector<float>(both.logits.begin() + 20 * r, both.logits.begin() + 20 * (r + 1)), one.logits));
      for (int i = 0; i < 12; i++) {
        EXPECT_TRUE(exact(both.read("mean.grad", i, r), one.read("mean.grad", i))) << i;
        if (kind == "ft") continue;
        EXPECT_TRUE(exact(both.read("variance.grad", i, r), one.read("variance.grad", i))) << i;
      }
    }
  }
}

// Forward passes on one batch for all replicas, as predictions make them.
TEST(Conv3Fc3Net, ForwardAloneOnASharedInput) {
  BATON_NEEDS_DEVICE();
  const int replicas = 2, batch = 3;
  Memory memory;
  const auto shared = conv3fc3(7), apart = conv3fc3(7);
  const size_t stride = shared->layout().stride();
  Buffer w(memory, random_normal(stride * replicas, 0, 0.04f, 5));
  PointWeights weights(w, stride);
  LayerContext context{memory.device(), memory.arena(), weights, replicas, batch, /*training*/ false};
  apart->prepare(context);
  context.shared_input = true;
  shared->prepare(context);
  EXPECT_EQ(shared->input().stride, 0u);
  std::vector<float> x = random_uniform(size_t(batch) * 3 * 32 * 32, -1, 1, 6);
  upload(memory.device(), shared->input().signal.value, x);
  x.insert(x.end(), x.begin(), x.begin() + batch * 3 * 32 * 32);
  upload(memory.device(), apart->input().signal.value, x);
  for (Network* net : {shared.get(), apart.get()}) net->forward({});
  const auto logits = download(memory.device(), shared->logits(), size_t(replicas) * batch * 7);
  EXPECT_TRUE(exact(logits, download(memory.device(), apart->logits(), logits.size())));
  EXPECT_FALSE(exact(std::vector<float>(logits.begin(), logits.begin() + 21),
                     std::vector<float>(logits.begin() + 21, logits.end())));
}

}  // namespace
}  // namespace baton::test
