// A step under tf32 beside one under fp32, for every kind of posterior. On a GPU the two multiply by different kernels
// (kernels/layer_product.h and the libraries); on the host tf32 rounds the operands of the same products.
#include "kernels/softmax_xent.h"
#include "tests/layers/posteriors/networks.h"
#include "tests/support/device.h"
#include "tests/support/precision.h"

namespace baton::test {
namespace {

struct FirstStep {
  std::vector<float> logits, before, after;             // the network's outputs, and the mean weights around the step
  std::vector<float> mean_gradient, variance_gradient;  // where the posterior keeps them
};

FirstStep take_first_step(Precision precision, const Kind& kind, const NetworkFactory& make, int batch, int replicas) {
  Memory memory;
  Device& device = memory.device();
  const WithPrecision within(device, precision);
  const auto network = make();
  const std::vector<json> settings(size_t(replicas), kind.settings);
  const auto posterior = make_posterior(device, memory.arena(), network->layout(), kind.name, settings);
  const int rows = std::max(replicas, posterior->draws_at_once());
  StepState s = state_of(3, 0);
  s.stage_steps = 20;
  s.base_lr_mean = float(posterior->step_size());
  s.base_lr_scale = 0.01f;
  s.kl_weight = float(posterior->kl_weight(0, 100, batch));
  Buffer states(memory, std::vector<StepState>(size_t(rows), s));
  posterior->initialise(states);
  network->prepare(posterior->training_context(batch));
  std::vector<float> x = random_normal(network->input().size * batch, 0.2f, 1, 8), squares;
  for (float& v : x) v = simt::round_to_tf32(v), squares.push_back(v * v);
  const int inputs = network->input().stride ? rows : 1;
  const Signal& input = network->input().signal;
  for (int r = 0; r < inputs; r++) {
    upload(device, input.value + x.size() * size_t(r), x);
    if (input.square) upload(device, input.square + x.size() * size_t(r), squares);
  }
  std::vector<int32_t> labels;
  for (int i = 0; i < rows * batch; i++) labels.push_back(i % batch * 7 % 5 % 4);
  Buffer label(memory, labels);
  Buffer<float> loss(memory, labels.size()), hit(memory, labels.size()), mean(memory, network->layout().stride());

  FirstStep step;
  const int last = replicas - 1;
  posterior->mean_weights(mean, last);
  step.before = mean.host();
  advance_step(states, rows, memory.stream());
  for (int first = 0; first < posterior->draws(); first += posterior->draws_at_once()) {
    posterior->draw(first, states);
    network->forward({states, first});
    softmax_cross_entropy(loss, hit, network->logits_gradient(), network->logits(), label, rows, batch,
                          network->classes(), posterior->loss_scale(batch), memory.stream());
    network->backward({states, first});
  }
  step.logits = download(device, network->logits(), size_t(rows) * batch * network->classes());
  if (kind.name == "ffg") {
    const ParameterStore& store = posterior->store();
    const size_t stride = network->layout().stride();
    step.mean_gradient = download(device, store.at("mean.grad") + stride * last, stride);
    step.variance_gradient = download(device, store.at("variance.grad") + stride * last, stride);
  }
  posterior->step(states);
  posterior->mean_weights(mean, last);
  step.after = mean.host();
  return step;
}

// Optimizers may take steps of one length whatever the gradient, so a gradient near 0 may change a step's sign.
void expect_same_step(const Kind& kind, const NetworkFactory& make, int batch = 8, int replicas = 1) {
  SCOPED_TRACE(kind.name + " " + kind.settings.dump());
  const FirstStep want = take_first_step(Precision::fp32, kind, make, batch, replicas);
  const FirstStep got = take_first_step(Precision::tf32, kind, make, batch, replicas);
  EXPECT_TRUE(close(got.logits, want.logits, {.l2 = 3e-3}));
  EXPECT_NE(got.logits, want.logits) << "tf32 rounds something";
  std::vector<float> moved, expected;
  for (size_t i = 0; i < want.after.size(); i++) {
    moved.push_back(got.after[i] - got.before[i]);
    expected.push_back(want.after[i] - want.before[i]);
  }
  EXPECT_TRUE(close(moved, expected, {.l2 = 0.25, .worst = 2.5}));
  if (want.mean_gradient.empty()) return;
  EXPECT_TRUE(close(got.mean_gradient, want.mean_gradient, {.l2 = 3e-2}));  // another winner of a pool moves a gradient
  EXPECT_TRUE(close(got.variance_gradient, want.variance_gradient, {.l2 = 5e-2}));
}

std::unique_ptr<Network> tiny() { return std::make_unique<TinyNetwork>(); }

TEST(TensorCores, StepsOfEveryKind) {
  BATON_NEEDS_DEVICE();
  for (const PosteriorKind* kind : posterior_kinds()) expect_same_step({kind->name, json::object()}, tiny);
}

TEST(TensorCores, StepsOfGroupsAndMoments) {
  BATON_NEEDS_DEVICE();
  for (const Kind& kind : {cfg(2), mnf("realnvp", true, 2), mnf("planar", false), Kind{"cfg", {{"moments", true}}}})
    expect_same_step(kind, tiny);
}

TEST(TensorCores, StepsOfReplicas) {
  BATON_NEEDS_DEVICE();
  expect_same_step({"ffg"}, tiny, 8, 3);
  expect_same_step({"ffg"}, convolutional_heads, 12, 2);
  expect_same_step({"ft"}, perceptron(20, {70, 30}, 5), 6, 2);
}

TEST(TensorCores, StepsOfNetworks) {  // which have layers of every form, and write their passes out
  BATON_NEEDS_DEVICE();
  expect_same_step({"ffg"}, network_factory({"lenet5", 10, {1, 28, 28}, json::object()}), 4);
  expect_same_step({"ffg"}, network_factory({"3conv3fc", 10, {3, 32, 32}, json::object()}), 2);
}

}  // namespace
}  // namespace baton::test
