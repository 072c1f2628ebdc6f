#include <optional>

#include "kernels/softmax_xent.h"
#include "layers/networks.h"
#include "tests/support/device.h"
#include "tests/support/small_network.h"

namespace baton::test {
namespace {

const std::vector<std::string> layer_names{"conv1", "conv2", "conv3", "conv4", "conv5",
                                           "conv6", "conv7", "conv8", "fc"};
const int widths[] = {3, 64, 128, 256, 256, 512, 512, 512, 512};
const int sides[] = {32, 16, 8, 8, 4, 4, 2, 2};  // of the convolutions' inputs
const int windows[] = {2, 2, 0, 2, 0, 2, 0, 2};  // of the pooling behind them
constexpr size_t image = 3 * 32 * 32;

std::unique_ptr<Network> vgg11(int classes = 10) { return make_network(network_spec("vgg11", classes)); }

// The mean cross-entropy of one replica, and its gradient.
double cross_entropy(const Doubles& logits, const int32_t* labels, int batch, Doubles* up = nullptr) {
  const size_t classes = logits.size() / batch;
  double loss = 0;
  for (int b = 0; b < batch; b++) {
    const double* l = &logits[b * classes];
    double sum = 0;
    for (size_t c = 0; c < classes; c++) sum += std::exp(l[c]);
    loss += (std::log(sum) - l[labels[b]]) / batch;
    for (size_t c = 0; up && c < classes; c++) up->push_back((std::exp(l[c]) / sum - (int(c) == labels[b])) / batch);
  }
  return loss;
}

// Replicas with weights of their own on one shared batch.
struct Net {
  Net(int classes, int replicas, int batch, bool sampled)
      : network(vgg11(classes)),
        store(memory.arena(), network->layout(), replicas),
        weights(store, sampled),
        replicas(replicas),
        batch(batch),
        sampled(sampled) {
    Device& device = memory.device();
    for (int r = 0; r < replicas; r++) steps.push_back(state_of(uint64_t(7 + r), uint32_t(3 + r)));
    states.emplace(memory, steps);
    network->prepare({device, memory.arena(), weights, replicas, batch, /*training*/ true, /*shared_input*/ true});
    for (int r = 0; r < replicas; r++)
      for (const TensorSpec& t : network->layout().tensors()) {
        const float sd = t.bias ? 0.1f : std::sqrt(2.f / float(t.fan_in));
        store.write(device, "mean", r, t, random_normal(t.size, 0, sd, unsigned(t.offset) + unsigned(r)));
        if (sampled) store.write(device, "variance", r, t, random_uniform(t.size, 1e-5f, 1e-4f, unsigned(t.offset)));
      }
    x = random_uniform(image * size_t(batch), -1.5f, 1.5f, 3);
    upload(device, network->input().signal.value, x);
    std::vector<float> square;
    for (float v : x) square.push_back(v * v);
    if (sampled) upload(device, network->input().signal.square, square);
    for (int i = 0; i < replicas * batch; i++) labels.push_back((3 * i + 1) % classes);
  }
  void forward() {
    network->forward({*states});
    logits = download(memory.device(), network->logits(), labels.size() * network->classes());
  }
  void pass() {
    forward();
    Buffer label(memory, labels);
    Buffer<float> losses(memory, labels.size()), hits(memory, labels.size());
    softmax_cross_entropy(losses, hits, network->logits_gradient(), network->logits(), label, replicas, batch,
                          network->classes(), 1.f / float(batch), memory.stream());
    network->backward({*states});
  }
  Doubles logits_of(int replica) const {
    const long n = long(logits.size()) / replicas;
    return {logits.begin() + n * replica, logits.begin() + n * (replica + 1)};
  }
  double loss(int replica) const { return cross_entropy(logits_of(replica), &labels[replica * batch], batch); }
  std::vector<float> read(const char* array, int tensor, int replica) {
    return store.read(memory.device(), array, replica, network->layout()[tensor]);
  }

  Memory memory;
  std::unique_ptr<Network> network;
  ParameterStore store;
  StoreWeights weights;
  int replicas, batch;
  bool sampled;
  std::vector<StepState> steps;
  std::optional<Buffer<StepState>> states;
  std::vector<float> x, logits;
  std::vector<int32_t> labels;
};

TEST(Vgg11Net, Layout) {
  const auto net = vgg11();
  EXPECT_STREQ(net->architecture(), "vgg11");
  EXPECT_EQ(net->classes(), 10);
  EXPECT_EQ(net->heads(), 1);
  size_t weights = 0, biases = 0;
  ASSERT_EQ(net->layout().tensors().size(), 18u);
  for (int i = 0; i < 18; i++) {
    const TensorSpec& t = net->layout()[i];
    const int in = widths[i / 2], out = i < 16 ? widths[i / 2 + 1] : 10;
    EXPECT_EQ(t.name, layer_names[i / 2] + (i % 2 ? ".bias" : ".weight"));
    const std::vector<int64_t> bias{out}, conv{out, in, 3, 3}, dense{out, in};
    EXPECT_EQ(t.shape, i % 2 ? bias : i < 16 ? conv : dense);
    EXPECT_EQ(t.bias, i % 2 == 1);
    EXPECT_EQ(t.fan_in, i < 16 ? 9 * in : in);
    (t.bias ? biases : weights) += t.size;
  }
  EXPECT_EQ(weights, 9'222'848u);
  EXPECT_EQ(biases, 2'762u);
  EXPECT_EQ(vgg11(100)->layout().parameters(), net->layout().parameters() + 90 * 513);
  EXPECT_EQ(vgg11(100)->classes(), 100);
  EXPECT_THROW(vgg11(1), InputError);
  EXPECT_THROW(vgg11(-1), InputError);
  EXPECT_THROW(vgg11()->use_head(1), InputError);
}

// Every layer's output and every gradient of one image, for a point posterior and a Gaussian one.
TEST(Vgg11Net, AgreesWithTheReference) {
  BATON_NEEDS_DEVICE();
  const int classes = 10;
  for (bool sampled : {false, true}) {
    SCOPED_TRACE(sampled ? "sampled" : "point");
    Net net(classes, 1, 1, sampled);
    for (int again = 0; again < 2; again++) net.pass();  // a pass leaves nothing to the next
    const std::vector<NamedActivation> activations = net.network->activations();
    ASSERT_EQ(activations.size(), 9u);
    std::vector<ReferenceLayer> layers;
    ReferencePool pools[8];
    Doubles h = doubles(net.x), up;
    for (int i = 0; i < 9; i++) {
      SCOPED_TRACE(layer_names[i]);
      layers.push_back(i < 8 ? ReferenceLayer{1, widths[i], sides[i], sides[i], widths[i + 1], 3, 1}
                             : ReferenceLayer::dense(1, 512, classes));
      ReferenceLayer& l = layers.back();
      l.mean = doubles(net.read("mean", 2 * i, 0)), l.bias_mean = doubles(net.read("mean", 2 * i + 1, 0));
      Doubles noise;
      if (sampled) {
        l.variance = doubles(net.read("variance", 2 * i, 0));
        l.bias_variance = doubles(net.read("variance", 2 * i + 1, 0));
        const uint32_t stream = uint32_t(stream_layers + i);
        noise = i < 8 ? conv_noise(net.steps[0], stream, 1, l.out, sides[i], sides[i])
                      : dense_noise(net.steps[0], stream, 1, classes);
      }
      h = l.forward(h, noise);
      if (i < 8) h = pools[i].forward(h, l.out, sides[i], sides[i], windows[i]);
      const Activation& a = activations[i].activation;
      EXPECT_EQ(activations[i].layer, layer_names[i]);
      ASSERT_EQ(a.size, h.size());
      EXPECT_TRUE(close(download(net.memory.device(), a.signal.value, a.size), h, {.l2 = 5e-6}));
    }
    cross_entropy(h, net.labels.data(), 1, &up);
    for (int i = 8; i >= 0; i--) {
      SCOPED_TRACE(layer_names[i]);
      ReferenceLayer& l = layers[i];
      up = l.backward(i < 8 ? pools[i].backward(up, l.outputs()) : Doubles(up));
      EXPECT_TRUE(close(net.read("mean.grad", 2 * i, 0), l.g_mean, {.l2 = 3e-5}));
      EXPECT_TRUE(close(net.read("mean.grad", 2 * i + 1, 0), l.g_bias_mean, {.l2 = 3e-5}));
      if (!sampled) continue;
      EXPECT_TRUE(close(net.read("variance.grad", 2 * i, 0), l.g_variance, {.l2 = 3e-5}));
      EXPECT_TRUE(close(net.read("variance.grad", 2 * i + 1, 0), l.g_bias_variance, {.l2 = 3e-5}));
    }
  }
}

// Slopes of the network's own loss by finite differences, along the steepest parameter of every tensor, in two replicas
// at once. The step lies between the rounding of the logits and the kinks of ReLU and pooling.
TEST(Vgg11Net, FiniteDifferences) {
  BATON_NEEDS_DEVICE();
  const int replicas = 2;
  const float h = 1e-3f;
  Net net(10, replicas, 2, false);
  net.pass();
  Device& device = net.memory.device();
  const size_t stride = net.network->layout().stride();
  for (int tensor = 0; tensor < 18; tensor++) {
    const TensorSpec& t = net.network->layout()[tensor];
    SCOPED_TRACE(t.name);
    std::vector<float*> place;
    std::vector<float> got, before;
    for (int r = 0; r < replicas; r++) {
      const std::vector<float> g = net.read("mean.grad", tensor, r);
      const auto steepest =
          std::max_element(g.begin(), g.end(), [](float a, float b) { return std::abs(a) < std::abs(b); });
      place.push_back(net.store.at("mean") + stride * r + t.offset + (steepest - g.begin()));
      before.push_back(download(device, place[r], 1)[0]);
      got.push_back(*steepest);
    }
    const auto losses = [&](float step) {
      for (int r = 0; r < replicas; r++) upload(device, place[r], std::vector<float>{before[r] + step});
      net.forward();
      return Doubles{net.loss(0), net.loss(1)};
    };
    const Doubles above = losses(h), below = losses(-h);
    Doubles want;
    for (int r = 0; r < replicas; r++) {
      want.push_back((above[r] - below[r]) / (double(before[r] + h) - double(before[r] - h)));
      upload(device, place[r], std::vector<float>{before[r]});
    }
    EXPECT_TRUE(close(got, want, {.l2 = 5e-2, .bias = 1}));
  }
}

// Two replicas on one batch are two networks, bit for bit; without a backward pass too.
TEST(Vgg11Net, ReplicasDoNotSeeEachOther) {
  BATON_NEEDS_DEVICE();
  Net both(7, 2, 2, false);
  both.pass();
  Memory& memory = both.memory;
  EXPECT_EQ(both.network->input().stride, 0u);
  const size_t stride = both.network->layout().stride();
  for (int r = 0; r < 2; r++) {
    const auto one = vgg11(7);
    PointWeights weights(both.store.at("mean") + stride * r, stride);
    one->prepare({memory.device(), memory.arena(), weights, 1, 2, /*training*/ false, /*shared_input*/ true});
    EXPECT_EQ(one->logits_gradient(), nullptr);
    upload(memory.device(), one->input().signal.value, both.x);
    one->forward({});
    EXPECT_TRUE(exact(doubles(download(memory.device(), one->logits(), 2 * 7)), both.logits_of(r)));
  }
  EXPECT_FALSE(exact(both.logits_of(0), both.logits_of(1)));
}

}  // namespace
}  // namespace baton::test
