#include <optional>

#include "kernels/softmax_xent.h"
#include "layers/networks.h"
#include "tests/support/device.h"
#include "tests/support/small_network.h"

namespace baton::test {
namespace {

const std::vector<std::string> layer_names{"conv1", "conv2", "conv3", "conv4", "fc1"};
constexpr size_t image = 3 * 32 * 32;

std::unique_ptr<Network> task_cnn(int heads, int classes = 10, bool dropout = true) {
  return make_network(network_spec("task-cnn", classes, {{"heads", heads}, {"dropout", dropout}}));
}

// What dropout multiplies the elements of one replica by: kernels/dropout.h's definition.
Doubles mask_of(const StepState& s, uint32_t stream_id, size_t count, int replica, double rate) {
  const size_t q = (count + 3) / 4;
  Doubles mask;
  for (size_t i = 0; i < count; i++) {
    const uint4 words = philox(make_uint4(uint32_t(i % q), stream_id, s.step, uint32_t(replica)), s.noise);
    const uint32_t word = i / q == 0 ? words.x : i / q == 1 ? words.y : i / q == 2 ? words.z : words.w;
    mask.push_back(double(word) < rate * 0x1p32 ? 0 : 1 / (1 - rate));
  }
  return mask;
}

// The network of one replica in double precision, its masks given (empty: no dropout); with variances it samples.
struct Reference {
  Reference(int batch, int classes)
      : batch(batch), classes(classes), layers{{batch, 3, 32, 32, 32, 3, 1},
                                               {batch, 32, 32, 32, 32, 3, 0},
                                               {batch, 32, 15, 15, 64, 3, 1},
                                               {batch, 64, 15, 15, 64, 3, 0},
                                               ReferenceLayer::dense(batch, 2304, 512),
                                               ReferenceLayer::dense(batch, 512, classes)} {}
  void drop(const StepState& s, int replica) {
    for (const auto& [layer, rate] : {std::pair(1, 0.25), {3, 0.25}, {4, 0.5}})
      masks[layer] = mask_of(s, uint32_t(stream_dropout + layer), pooled_size(layer) * batch, replica, rate);
  }
  size_t pooled_size(int i) const {
    const int div = window(i) ? 2 : 1;
    return size_t(layers[i].out) * (layers[i].out_height() / div) * (layers[i].out_width() / div);
  }
  static int window(int i) { return i == 1 || i == 3 ? 2 : 0; }

  // The mean cross-entropy, from layer `first` on, whose input is what it was in the last pass.
  double forward(int first) {
    Doubles h = layers[first].x;
    for (int i = first; i < 6; i++) {
      const Doubles e = noise[i], in = h;
      h = layers[i].forward(in, e);
      if (i == 5) break;
      h = pools[i].forward(h, batch * layers[i].out, layers[i].out_height(), layers[i].out_width(), window(i));
      for (size_t k = 0; k < masks[i].size(); k++) h[k] *= masks[i][k];
      outputs[i] = h;
    }
    outputs[5] = h;
    up.assign(h.size(), 0);
    double loss = 0;
    for (int b = 0; b < batch; b++) {
      const double* l = &h[size_t(b) * classes];
      double sum = 0;
      for (int c = 0; c < classes; c++) sum += std::exp(l[c]);
      loss += (std::log(sum) - l[labels[b]]) / batch;
      for (int c = 0; c < classes; c++) up[size_t(b) * classes + c] = (std::exp(l[c]) / sum - (c == labels[b])) / batch;
    }
    return loss;
  }
  void backward() {
    Doubles g = layers[5].backward(up);
    for (int i = 4; i >= 0; i--) {
      for (size_t k = 0; k < masks[i].size(); k++) g[k] *= masks[i][k];
      g = layers[i].backward(pools[i].backward(g, layers[i].outputs()));
    }
  }

  int batch, classes;
  std::vector<ReferenceLayer> layers;
  ReferencePool pools[5];
  Doubles noise[6], masks[5], outputs[6], up;
  std::vector<int32_t> labels;
};

// Replicas with weights of their own on one shared batch.
struct Net {
  Net(int heads, int classes, bool dropout, int replicas, int batch, bool sampled = false, bool training = true,
      bool equal_weights = false)
      : network(task_cnn(heads, classes, dropout)),
        store(memory.arena(), network->layout(), replicas),
        weights(store, sampled),
        replicas(replicas),
        batch(batch),
        sampled(sampled) {
    for (int r = 0; r < replicas; r++) steps.push_back(state_of(uint64_t(7 + r), uint32_t(3 + r)));
    states.emplace(memory, steps);
    network->prepare({memory.device(), memory.arena(), weights, replicas, batch, training, /*shared_input*/ true});
    for (int r = 0; r < replicas; r++)
      for (const TensorSpec& t : network->layout().tensors()) {
        const float sd = t.bias ? 0.1f : std::sqrt(2.f / float(t.fan_in));
        const unsigned seed = unsigned(t.offset) + (equal_weights ? 0u : unsigned(r));
        store.write(memory.device(), "mean", r, t, random_normal(t.size, 0, sd, seed));
        store.write(memory.device(), "variance", r, t, random_uniform(t.size, 1e-4f, 1e-3f, seed));
      }
    x = random_uniform(image * size_t(batch), -1.5f, 1.5f, 3);
    upload(memory.device(), network->input().signal.value, x);
    std::vector<float> square;
    for (float v : x) square.push_back(v * v);
    if (sampled) upload(memory.device(), network->input().signal.square, square);
    for (int i = 0; i < replicas * batch; i++) labels.push_back((3 * i + 1) % classes);
  }
  void set_step(uint32_t step) {
    for (StepState& s : steps) s.step = step;
    states->set(steps);
  }
  const std::vector<float>& forward() {
    network->forward({*states});
    logits = download(memory.device(), network->logits(), labels.size() * network->classes());
    return logits;
  }
  void pass() {
    weights.forget_gradients(memory.device());
    forward();
    Buffer label(memory, labels);
    Buffer<float> losses(memory, labels.size()), hits(memory, labels.size());
    softmax_cross_entropy(losses, hits, network->logits_gradient(), network->logits(), label, replicas, batch,
                          network->classes(), 1.f / float(batch), memory.stream());
    loss = losses.host();
    network->backward({*states});
  }
  std::vector<float> read(const char* array, const std::string& tensor, int replica) {
    return store.read(memory.device(), array, replica, find_tensor(network->layout(), tensor));
  }
  std::vector<float> logits_of(int replica) const {
    const long n = long(logits.size()) / replicas;
    return {logits.begin() + n * replica, logits.begin() + n * (replica + 1)};
  }
  Reference reference(int replica, int head) {
    const int classes = network->classes();
    Reference r(batch, classes);
    for (int i = 0; i < 6; i++) {
      const std::string name = i < 5 ? layer_names[i] : "head" + std::to_string(head);
      ReferenceLayer& l = r.layers[i];
      l.mean = doubles(read("mean", name + ".weight", replica));
      l.bias_mean = doubles(read("mean", name + ".bias", replica));
      if (!sampled) continue;
      l.variance = doubles(read("variance", name + ".weight", replica));
      l.bias_variance = doubles(read("variance", name + ".bias", replica));
      const uint32_t stream = uint32_t(stream_layers + i);
      r.noise[i] = i < 4 ? conv_noise(steps[replica], stream, batch, l.out, l.out_height(), l.out_width())
                         : dense_noise(steps[replica], stream, batch, l.out);
    }
    r.layers[0].x = doubles(x);
    r.labels.assign(labels.begin() + replica * batch, labels.begin() + (replica + 1) * batch);
    return r;
  }

  Memory memory;
  std::unique_ptr<Network> network;
  ParameterStore store;
  StoreWeights weights;
  int replicas, batch;
  bool sampled;
  std::vector<StepState> steps;
  std::optional<Buffer<StepState>> states;
  std::vector<float> x, loss, logits;
  std::vector<int32_t> labels;
};

TEST(TaskCnnNet, Layout) {
  const auto net = task_cnn(6);
  EXPECT_STREQ(net->architecture(), "task-cnn");
  EXPECT_EQ(net->classes(), 10);
  EXPECT_EQ(net->heads(), 6);
  EXPECT_EQ(net->layout().parameters(), 1'276'508u);
  const std::vector<std::vector<int64_t>> shapes{{32, 3, 3, 3},  {32}, {32, 32, 3, 3}, {32}, {64, 32, 3, 3}, {64},
                                                 {64, 64, 3, 3}, {64}, {512, 2304},    {512}};
  ASSERT_EQ(net->layout().tensors().size(), shapes.size() + 12);
  size_t weights = 0;
  for (int i = 0; i < 22; i++) {
    const TensorSpec& t = net->layout()[i];
    const int head = (i - 10) / 2;
    EXPECT_EQ(t.name, (i < 10 ? layer_names[i / 2] : "head" + std::to_string(head)) + (i % 2 ? ".bias" : ".weight"));
    if (i < 10) EXPECT_EQ(t.shape, shapes[i]);
    else EXPECT_EQ(t.shape, i % 2 ? std::vector<int64_t>{10} : (std::vector<int64_t>{10, 512}));
    EXPECT_EQ(t.bias, i % 2 == 1);
    EXPECT_EQ(t.fan_in, i < 10 ? (std::vector<int>{27, 288, 288, 576, 2304})[i / 2] : 512);
    if (!t.bias) weights += t.size;
  }
  EXPECT_EQ(weights, 1'275'744u);
  const auto other = task_cnn(2, 3);
  EXPECT_EQ(other->heads(), 2);
  EXPECT_EQ(other->classes(), 3);
  EXPECT_EQ(other->layout().parameters(), net->layout().parameters() - 6 * 5130 + 2 * 3 * 513);
}

TEST(TaskCnnNet, Errors) {
  BATON_NEEDS_DEVICE();
  EXPECT_THROW(task_cnn(0), InputError);
  EXPECT_THROW(task_cnn(-3), InputError);
  EXPECT_THROW(task_cnn(2, 1), InputError);
  Memory memory;
  const auto net = task_cnn(2, 2);
  ParameterStore store(memory.arena(), net->layout(), 1);
  StoreWeights sampled(store, true);
  const LayerContext context{memory.device(), memory.arena(), sampled, 1, 1, /*training*/ true, /*shared_input*/ true};
  EXPECT_THROW(net->prepare(context), InputError);
  EXPECT_THROW(net->use_head(2), InputError);
  EXPECT_THROW(net->use_head(-1), InputError);
}

// Two replicas with weights of their own against the reference, and the inactive heads left alone.
TEST(TaskCnnNet, AgreesWithTheReference) {
  BATON_NEEDS_DEVICE();
  struct Case {
    const char* name;
    bool dropout, sampled;
    int head;
  };
  for (const Case& c : {Case{"point", false, false, 2}, {"dropout", true, false, 1}, {"sampled", false, true, 0}}) {
    SCOPED_TRACE(c.name);
    const int batch = 2, classes = 5;
    Net net(3, classes, c.dropout, 2, batch, c.sampled);
    EXPECT_EQ(net.network->input().stride, 0u);
    net.network->use_head(c.head);
    for (int again = 0; again < 2; again++) net.pass();  // a pass leaves nothing to the next
    const std::vector<NamedActivation> activations = net.network->activations();
    ASSERT_EQ(activations.size(), 6u);
    for (int r = 0; r < 2; r++) {
      Reference reference = net.reference(r, c.head);
      if (c.dropout) reference.drop(net.steps[0], r);  // one key and step for all replicas
      const double loss = reference.forward(0);
      reference.backward();
      EXPECT_NEAR((net.loss[2 * r] + net.loss[2 * r + 1]) / 2, loss, 1e-5 * loss);
      for (int i = 0; i < 6; i++) {
        const std::string name = i < 5 ? layer_names[i] : "head" + std::to_string(c.head);
        SCOPED_TRACE(name + ", replica " + std::to_string(r));
        const Activation& a = activations[i].activation;
        EXPECT_EQ(activations[i].layer, name);
        ASSERT_EQ(a.stride, reference.outputs[i].size());
        EXPECT_TRUE(close(download(net.memory.device(), a.signal.value + a.stride * r, a.stride), reference.outputs[i],
                          {.l2 = 5e-6}));
        const ReferenceLayer& l = reference.layers[i];
        EXPECT_TRUE(close(net.read("mean.grad", name + ".weight", r), l.g_mean, {.l2 = 3e-5}));
        EXPECT_TRUE(close(net.read("mean.grad", name + ".bias", r), l.g_bias_mean, {.l2 = 3e-5}));
        if (!c.sampled) continue;
        EXPECT_TRUE(close(net.read("variance.grad", name + ".weight", r), l.g_variance, {.l2 = 3e-5}));
        EXPECT_TRUE(close(net.read("variance.grad", name + ".bias", r), l.g_bias_variance, {.l2 = 3e-5}));
      }
      for (int head = 0; head < 3; head++) {
        if (head == c.head) continue;
        for (const char* tensor : {".weight", ".bias"})
          for (const char* array : {"mean.grad", "variance.grad"})
            for (float g : net.read(array, "head" + std::to_string(head) + tensor, r))
              ASSERT_TRUE(std::isnan(g)) << "head" << head << tensor << " was written";
      }
    }
  }
}

// Slopes of the reference's loss by finite differences, with the masks held, against the network's gradients.
TEST(TaskCnnNet, FiniteDifferences) {
  BATON_NEEDS_DEVICE();
  Net net(2, 4, true, 2, 1);
  net.network->use_head(1);
  net.pass();
  for (int r = 0; r < 2; r++) {
    Reference reference = net.reference(r, 1);
    reference.drop(net.steps[0], r);
    reference.forward(0);
    for (int i = 5; i >= 0; i--)  // so that a layer's input is still what the first pass left
      for (bool bias : {false, true}) {
        const std::string tensor = (i < 5 ? layer_names[i] : "head1") + (bias ? ".bias" : ".weight");
        SCOPED_TRACE(tensor + ", replica " + std::to_string(r));
        Doubles& parameters = bias ? reference.layers[i].bias_mean : reference.layers[i].mean;
        const std::vector<float> gradient = net.read("mean.grad", tensor, r);
        const size_t steepest = size_t(std::max_element(gradient.begin(), gradient.end(),
                                                        [](float a, float b) { return std::abs(a) < std::abs(b); }) -
                                       gradient.begin());
        Doubles got, want;
        for (size_t at : {steepest, gradient.size() / 3}) {
          const double before = parameters[at], h = 1e-6;
          parameters[at] = before + h;
          const double above = reference.forward(i);
          parameters[at] = before - h;
          const double below = reference.forward(i);
          parameters[at] = before;
          got.push_back(gradient[at]), want.push_back((above - below) / (2 * h));
        }
        EXPECT_TRUE(close(got, want, {.l2 = 1e-4, .bias = 1}));
      }
  }
}

TEST(TaskCnnNet, Heads) {
  BATON_NEEDS_DEVICE();
  Net net(3, 4, false, 1, 2);
  const std::vector<float> first = net.forward();
  net.network->use_head(2);
  const std::vector<float> last = net.forward();
  EXPECT_FALSE(exact(first, last));
  EXPECT_THROW(net.network->use_head(3), InputError);
  EXPECT_TRUE(exact(net.forward(), last)) << "an error leaves the head as it was";
  EXPECT_EQ(net.network->activations().back().layer, "head2");
  net.network->use_head(0);
  EXPECT_TRUE(exact(net.forward(), first));
}

// Masks change with the step and the replica, return with the step, and are for training only.
TEST(TaskCnnNet, Dropout) {
  BATON_NEEDS_DEVICE();
  Net net(2, 4, true, 2, 2, false, true, true), plain(2, 4, false, 2, 2, false, true, true);
  net.set_step(3);
  const std::vector<float> step3 = net.forward();
  EXPECT_FALSE(exact(net.logits_of(0), net.logits_of(1)));
  EXPECT_TRUE(exact(net.forward(), step3));
  net.set_step(4);
  EXPECT_FALSE(exact(net.forward(), step3));
  plain.forward();
  EXPECT_TRUE(exact(plain.logits_of(0), plain.logits_of(1)));
  EXPECT_FALSE(exact(step3, plain.logits));
  Net prediction(2, 4, true, 2, 2, false, false, true);
  EXPECT_EQ(prediction.network->logits_gradient(), nullptr);
  EXPECT_TRUE(exact(prediction.forward(), plain.logits));
}

}  // namespace
}  // namespace baton::test
