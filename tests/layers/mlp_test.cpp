#include <optional>

#include "kernels/softmax_xent.h"
#include "layers/networks.h"
#include "tests/support/device.h"
#include "tests/support/small_network.h"

namespace baton::test {
namespace {

std::unique_ptr<Network> perceptron(int in, const std::vector<int>& hidden, int classes) {
  return make_network({"mlp", classes, {1, 1, in}, {{"hidden", hidden}}});
}

// A perceptron on the device with random weights and inputs, for a Gaussian posterior (sampled) or a point.
struct Net {
  Net(int in, const std::vector<int>& hidden, int classes, int replicas, int batch, bool sampled, bool shared)
      : network(perceptron(in, hidden, classes)),
        store(memory.arena(), network->layout(), replicas),
        weights(store, sampled),
        replicas(replicas),
        batch(batch),
        sampled(sampled),
        inputs(shared ? 1 : replicas) {
    const size_t stride = network->layout().stride();
    for (int r = 0; r < replicas; r++) steps.push_back(state_of(uint64_t(7 + r), uint32_t(3 + r)));
    states.emplace(memory, steps);
    network->prepare({memory.device(), memory.arena(), weights, replicas, batch, /*training*/ true, shared});
    mean = random_normal(stride * replicas, 0, 0.5f, 1);
    variance = random_uniform(stride * replicas, 0.01f, 0.05f, 2);
    x = random_uniform(size_t(inputs) * batch * in, -1.5f, 1.5f, 3);
    for (int i = 0; i < replicas * batch; i++) labels.push_back((3 * i + i / batch) % classes);
  }
  void pass() {
    Device& device = memory.device();
    upload(device, store.at("mean"), mean);
    upload(device, store.at("variance"), variance);
    weights.forget_gradients(device);
    upload(device, network->input().signal.value, x);
    std::vector<float> square;
    for (float v : x) square.push_back(v * v);
    if (sampled) upload(device, network->input().signal.square, square);
    network->forward({*states});
    Buffer label(memory, labels);
    Buffer<float> losses(memory, labels.size()), hits(memory, labels.size());
    softmax_cross_entropy(losses, hits, network->logits_gradient(), network->logits(), label, replicas, batch,
                          network->classes(), 1.f / float(batch), memory.stream());
    loss = losses.host();
    logits = download(device, network->logits(), labels.size() * network->classes());
    network->backward({*states});
  }
  std::vector<float> gradient(const char* array, int replica, const TensorSpec& t) {
    return store.read(memory.device(), array, replica, t);
  }

  Memory memory;
  std::unique_ptr<Network> network;
  ParameterStore store;
  StoreWeights weights;
  int replicas, batch;
  bool sampled;
  int inputs;
  std::vector<StepState> steps;
  std::optional<Buffer<StepState>> states;
  std::vector<float> mean, variance, x, loss, logits;
  std::vector<int32_t> labels;
};

// One replica by the definition in double precision: y = m + sqrt(v) e, and a ReLU behind every layer but the last.
struct Reference {
  Reference(const Net& net, const std::vector<int>& widths, int replica)
      : widths(widths), replica(replica), batch(net.batch), sampled(net.sampled) {
    const auto row = [&](const std::vector<float>& all, size_t size, int r) {
      return Doubles(all.begin() + long(size * r), all.begin() + long(size * (r + 1)));
    };
    const size_t stride = net.network->layout().stride();
    mean = row(net.mean, stride, replica), variance = row(net.variance, stride, replica);
    x = row(net.x, size_t(batch) * widths[0], net.inputs == 1 ? 0 : replica);
    labels.assign(net.labels.begin() + replica * batch, net.labels.begin() + (replica + 1) * batch);
    for (size_t l = 0; l + 1 < widths.size(); l++)
      noise.push_back(dense_noise(net.steps[replica], uint32_t(stream_layers + l), batch, widths[l + 1]));
    tensors = net.network->layout().tensors();
  }
  double forward() {
    Doubles h = x;
    outputs.clear();
    for (size_t l = 0; l + 1 < widths.size(); l++) {
      const int in = widths[l], out = widths[l + 1];
      const size_t w = tensors[2 * l].offset, b = tensors[2 * l + 1].offset;
      Doubles y;
      for (int n = 0; n < batch; n++)
        for (int o = 0; o < out; o++) {
          double m = mean[b + o], v = variance[b + o];
          for (int i = 0; i < in; i++) {
            const double a = h[size_t(n) * in + i];
            m += mean[w + size_t(o) * in + i] * a;
            v += variance[w + size_t(o) * in + i] * a * a;
          }
          if (sampled) m += std::sqrt(v) * noise[l][size_t(n) * out + o];
          y.push_back(l + 2 < widths.size() ? std::max(0.0, m) : m);
        }
      outputs.push_back(y);
      h = y;
    }
    const int classes = widths.back();
    loss.clear();
    double total = 0;
    for (int n = 0; n < batch; n++) {
      double sum = 0;
      for (int c = 0; c < classes; c++) sum += std::exp(h[size_t(n) * classes + c]);
      loss.push_back(std::log(sum) - h[size_t(n) * classes + labels[n]]);
      total += loss.back() / batch;
    }
    return total;
  }
  // The slopes of the loss along all elements of a tensor; `parameters` is mean or variance.
  Doubles slopes(Doubles& parameters, const TensorSpec& t) {
    Doubles slope;
    for (size_t at = t.offset; at < t.offset + t.size; at++) {
      const double before = parameters[at], h = 1e-6;
      parameters[at] = before + h;
      const double above = forward();
      parameters[at] = before - h;
      slope.push_back((above - forward()) / (2 * h));
      parameters[at] = before;
    }
    return slope;
  }

  std::vector<int> widths;
  int replica, batch;
  bool sampled;
  Doubles mean, variance, x, loss;
  std::vector<Doubles> noise, outputs;
  std::vector<int32_t> labels;
  std::vector<TensorSpec> tensors;
};

TEST(Mlp, Layout) {
  const auto net = make_network(network_spec("mlp"));
  EXPECT_STREQ(net->architecture(), "mlp-784-400-400-10");
  EXPECT_EQ(net->classes(), 10);
  EXPECT_EQ(net->heads(), 1);
  const std::vector<std::vector<int64_t>> shapes{{400, 784}, {400}, {400, 400}, {400}, {10, 400}, {10}};
  ASSERT_EQ(net->layout().tensors().size(), shapes.size());
  for (int i = 0; i < 6; i++) {
    const TensorSpec& t = net->layout()[i];
    EXPECT_EQ(t.name, "fc" + std::to_string(i / 2 + 1) + (i % 2 ? ".bias" : ".weight"));
    EXPECT_EQ(t.shape, shapes[i]);
    EXPECT_EQ(t.bias, i % 2 == 1);
    EXPECT_EQ(t.fan_in, i / 2 == 0 ? 784 : 400);
  }
  const auto wide = perceptron(784, {1200, 1200}, 10);
  size_t weights = 0, biases = 0;
  for (const TensorSpec& t : wide->layout().tensors()) (t.bias ? biases : weights) += t.size;
  EXPECT_EQ(weights, 2'392'800u);
  EXPECT_EQ(biases, 2'410u);
  EXPECT_STREQ(wide->architecture(), "mlp-784-1200-1200-10");
  const auto small = perceptron(5, {4}, 3);
  EXPECT_STREQ(small->architecture(), "mlp-5-4-3");
  EXPECT_EQ(small->classes(), 3);
  EXPECT_EQ(small->layout().parameters(), 5u * 4 + 4 + 4 * 3 + 3);
}

TEST(Mlp, Errors) {
  EXPECT_THROW(perceptron(0, {4}, 3), InputError);
  EXPECT_THROW(perceptron(5, {}, 3), InputError);
  EXPECT_THROW(perceptron(5, {4, 0}, 3), InputError);
  EXPECT_THROW(perceptron(5, {-1, 4}, 3), InputError);
  EXPECT_THROW(perceptron(5, {4}, 1), InputError);
  const auto net = perceptron(5, {4}, 2);
  net->use_head(0);
  EXPECT_THROW(net->use_head(1), InputError);
  EXPECT_THROW(net->use_head(-1), InputError);
}

// Outputs of every layer, losses, and the slope along every parameter, of two replicas with weights of their own.
TEST(Mlp, AgreesWithTheReference) {
  BATON_NEEDS_DEVICE();
  const std::vector<std::vector<int>> shapes{{30, 24, 17, 7}, {6, 5, 2}, {5, 9, 4, 6, 3}};
  for (const std::vector<int>& widths : shapes)
    for (bool sampled : {false, true})
      for (bool shared : {true, false}) {
        SCOPED_TRACE(std::to_string(widths.size() - 1) + " layers" + (sampled ? ", sampled" : ", point") +
                     (shared ? ", one batch" : ", batches"));
        Net net(widths[0], {widths.begin() + 1, widths.end() - 1}, widths.back(), 2, 5, sampled, shared);
        EXPECT_EQ(net.network->input().stride, shared ? 0 : size_t(5 * widths[0]));
        for (int again = 0; again < 2; again++) net.pass();  // a pass leaves nothing to the next
        const std::vector<NamedActivation> activations = net.network->activations();
        ASSERT_EQ(activations.size(), widths.size() - 1);
        for (int r = 0; r < 2; r++) {
          Reference reference(net, widths, r);
          reference.forward();
          EXPECT_TRUE(close(std::vector<float>(net.loss.begin() + 5 * r, net.loss.begin() + 5 * (r + 1)),
                            reference.loss, {.l2 = 2e-6}));
          for (size_t l = 0; l < activations.size(); l++) {
            const Activation& a = activations[l].activation;
            EXPECT_EQ(activations[l].layer, "fc" + std::to_string(l + 1));
            ASSERT_EQ(a.size, size_t(widths[l + 1]));
            EXPECT_TRUE(close(download(net.memory.device(), a.signal.value + a.stride * r, a.stride),
                              reference.outputs[l], {.l2 = 2e-6}))
                << "fc" << l + 1;
          }
          for (const TensorSpec& t : net.network->layout().tensors()) {
            SCOPED_TRACE(t.name + ", replica " + std::to_string(r));
            EXPECT_TRUE(close(net.gradient("mean.grad", r, t), reference.slopes(reference.mean, t), {.l2 = 1e-5}));
            if (!sampled) continue;
            EXPECT_TRUE(
                close(net.gradient("variance.grad", r, t), reference.slopes(reference.variance, t), {.l2 = 1e-5}));
          }
        }
        const size_t stride = net.network->layout().stride();
        const auto all = download(net.memory.device(), net.store.at("mean.grad"), stride * 2);
        for (const auto& gap : net.network->layout().gaps())
          for (size_t i = gap.offset; i < gap.offset + gap.size; i++)
            ASSERT_TRUE(std::isnan(all[i]) && std::isnan(all[stride + i])) << "a gap was written";
      }
}

// Without a backward pass there are no gradient buffers, and the logits are the same bits.
TEST(Mlp, ForwardAlone) {
  BATON_NEEDS_DEVICE();
  Net net(13, {11, 8}, 4, 3, 6, false, true);
  net.pass();
  const auto alone = perceptron(13, {11, 8}, 4);
  PointWeights weights(net.store.at("mean"), alone->layout().stride());
  alone->prepare({net.memory.device(), net.memory.arena(), weights, 3, 6, /*training*/ false, /*shared_input*/ true});
  EXPECT_EQ(alone->logits_gradient(), nullptr);
  EXPECT_EQ(alone->input().signal.square, nullptr);
  upload(net.memory.device(), alone->input().signal.value, net.x);
  alone->forward({});
  EXPECT_TRUE(exact(download(net.memory.device(), alone->logits(), net.logits.size()), net.logits));
}

}  // namespace
}  // namespace baton::test
