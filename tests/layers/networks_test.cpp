// What every network of the registry promises (layers/networks.h): it can be made, it runs, its tensors are recognised,
// and it is described as it is. A new network is tested here from its line in the registry on.
#include "layers/networks.h"

#include <set>

#include "kernels/softmax_xent.h"
#include "tests/support/device.h"
#include "tests/support/messages.h"
#include "tests/support/small_network.h"

namespace baton::test {
namespace {

TensorShapes shapes_of(const Network& network) {
  TensorShapes shapes;
  for (const TensorSpec& t : network.layout().tensors()) shapes[t.name] = t.shape;
  return shapes;
}

TEST(NetworkKinds, AreFoundByName) {
  std::set<std::string> names;
  for (const NetworkKind* kind : network_kinds()) {
    SCOPED_TRACE(kind->name);
    EXPECT_EQ(&find_network(kind->name), kind);
    EXPECT_TRUE(names.insert(kind->name).second);
    expect_says(list_networks(), {kind->name});
    expect_says(refusal([] { network_spec("lenet6"); }), {kind->name});
    const NetworkSpec spec = network_spec(kind->name);
    EXPECT_EQ(spec.classes, 10);
    EXPECT_EQ(spec.image, kind->image);
    EXPECT_EQ(spec.options.size(), kind->options.size());
    for (const Option& option : kind->options) EXPECT_EQ(spec.options[option.name], option.standard) << option.name;
    EXPECT_EQ(spec.description().find(kind->name), 0u);
    expect_says(spec.description(), {"10 classes"});
  }
}

// Weights by He et al. 2015, one image, and the gradient of its loss.
TEST(NetworkKinds, RunForwardAndBackward) {
  BATON_NEEDS_DEVICE();
  for (const NetworkKind* kind : network_kinds()) {
    SCOPED_TRACE(kind->name);
    Memory memory;
    Device& device = memory.device();
    const auto network = network_factory(network_spec(kind->name, 7))();
    EXPECT_EQ(network->classes(), 7);
    EXPECT_EQ(network->input_shape(), kind->image);
    EXPECT_GE(network->heads(), 1);
    ParameterStore store(memory.arena(), network->layout(), 1);
    StoreWeights weights(store, false);
    weights.forget_gradients(device);
    unsigned seed = 1;
    for (const TensorSpec& t : network->layout().tensors())
      store.write(device, "mean", 0, t, random_normal(t.size, 0, t.bias ? 0.1f : std::sqrt(2.f / t.fan_in), seed++));
    network->prepare({device, memory.arena(), weights, 1, 1, /*training*/ true});
    const std::vector<float> x = random_uniform(network->input().size, -1.5f, 1.5f, 3);
    ASSERT_EQ(x.size(), size_t(kind->image.size()));
    upload(device, network->input().signal.value, x);
    Buffer states(memory, std::vector<StepState>{state_of(5, 1)});
    network->forward({states});
    Buffer label(memory, std::vector<int32_t>{2});
    Buffer<float> loss(memory, 1), hit(memory, 1);
    softmax_cross_entropy(loss, hit, network->logits_gradient(), network->logits(), label, 1, 1, 7, 1, memory.stream());
    network->backward({states});
    EXPECT_GT(loss.host()[0], 0);
    EXPECT_TRUE(std::isfinite(loss.host()[0]));
    const auto activations = network->activations();
    EXPECT_EQ(activations.back().activation.size, 7u);
    for (const auto& [layer, a] : activations)
      for (float y : download(device, a.signal.value, a.size)) ASSERT_TRUE(std::isfinite(y)) << layer;
    for (const TensorSpec& t : network->layout().tensors()) {
      double sum = 0;
      for (float g : store.read(device, "mean.grad", 0, t)) sum += std::abs(g);
      EXPECT_TRUE(std::isfinite(sum) && sum > 0) << t.name;
    }
  }
}

TEST(NetworkKinds, TheirOwnTensorsAreRecognised) {
  for (const NetworkKind* kind : network_kinds()) {
    SCOPED_TRACE(kind->name);
    const NetworkSpec spec = network_spec(kind->name, 7);
    const NetworkSpec found = recognise_network(shapes_of(*make_network(spec)), "it");
    EXPECT_EQ(found.name, spec.name);
    EXPECT_EQ(found.classes, 7);
    EXPECT_EQ(found.image, spec.image);
    EXPECT_EQ(found.options, spec.options);
  }
  // Sizes that are not the standard.
  const NetworkSpec heads = network_spec("task-cnn", 5, {{"heads", 3}});
  EXPECT_EQ(recognise_network(shapes_of(*make_network(heads)), "it").options, heads.options);
  NetworkSpec mlp = network_spec("mlp", 3, {{"hidden", {30, 20, 40}}});
  for (const ImageShape& image : {ImageShape{1, 12, 12}, {3, 32, 32}}) {
    mlp.image = image;
    const NetworkSpec found = recognise_network(shapes_of(*make_network(mlp)), "it");
    EXPECT_EQ(found.options, mlp.options);
    EXPECT_EQ(found.image, image);
    EXPECT_EQ(found.classes, 3);
  }
  EXPECT_EQ(mlp.description(), "mlp 30-20-40, 32 x 32 colour images, 3 classes");
}

TEST(NetworkKinds, OtherTensorsAreRefused) {
  for (const NetworkKind* kind : network_kinds()) {
    SCOPED_TRACE(kind->name);
    const TensorShapes own = shapes_of(*make_network(network_spec(kind->name)));
    for (const bool more : {true, false}) {  // a tensor more, or the first layer's bias with one element less
      TensorShapes other = own;
      const std::string bias = own.count("conv1.bias") ? "conv1.bias" : "fc1.bias";
      if (more) other["another.weight"] = {3};
      else other[bias][0]--;
      const std::string message = refusal([&] { recognise_network(other, "model.safetensors"); });
      EXPECT_EQ(message.find("model.safetensors fits none of "), 0u) << message;
      expect_says(message, {"nearest is " + std::string(kind->name) + ": "});
      expect_says(message, {more ? "more tensors" : "'" + bias + "' has shape ["});
    }
  }
  expect_says(refusal([] { recognise_network({}, "it"); }), {"is missing"});
}

TEST(NetworkKinds, AreDescribedAsTheyAre) {
  const json all = describe_networks();
  EXPECT_EQ(all.size(), network_kinds().size());
  for (const NetworkKind* kind : network_kinds()) {
    SCOPED_TRACE(kind->name);
    const json& one = all[kind->name];
    EXPECT_EQ(one["image"], json({kind->image.channels, kind->image.height, kind->image.width}));
    EXPECT_EQ(one["any_image"], kind->any_image);
    EXPECT_EQ(one["options"], network_spec(kind->name).options);
    const auto network = make_network(network_spec(kind->name, 23));
    ASSERT_EQ(one["tensors"].size(), network->layout().tensors().size());
    for (const TensorSpec& t : network->layout().tensors()) {
      std::vector<int64_t> shape;
      for (const json& extent : one["tensors"][t.name]) shape.push_back(extent.is_null() ? 23 : int64_t(extent));
      EXPECT_EQ(shape, t.shape) << t.name;
    }
  }
}

TEST(NetworkKinds, WhatDoesNotFitIsRefused) {
  for (const NetworkKind* kind : network_kinds()) {
    SCOPED_TRACE(kind->name);
    const std::string unknown = refusal([&] { network_spec(kind->name, 10, {{"no_such_option", 1}}); });
    expect_says(unknown, {"no_such_option"});
    expect_says(unknown, {kind->name});
    for (const Option& option : kind->options)
      expect_says(refusal([&] { network_spec(kind->name, 10, {{option.name, json::object()}}); }), {option.name});
    for (int classes : {-1, 0, 1, 257})
      expect_says(refusal([&] { network_spec(kind->name, classes); }), {std::to_string(classes)});
    EXPECT_EQ(network_spec(kind->name, 256).classes, 256);
    NetworkSpec spec = network_spec(kind->name);
    spec.image = {kind->image.channels, 20, 20};
    const std::string message = refusal([&] { check_network(spec); });
    if (kind->any_image) EXPECT_EQ(message, nothing_refused);
    else expect_says(message, {"not 20 x 20"});
    spec.image = {2, 32, 32};
    EXPECT_THROW(check_network(spec), InputError);
  }
}

}  // namespace
}  // namespace baton::test
