// The multilayer perceptron of Zeno et al. 2018 (MNIST: 784-h-h-10), for every replica:
//
//   in  fc1, hidden, ReLU  fc2, hidden, ReLU  fc3, classes
//
// Forward and backward are written out; there is no autograd.
#pragma once
#include "layers/dense.h"
#include "layers/network.h"

namespace baton {

class Mlp : public Network {
 public:
  // hidden: the widths of the hidden layers, at least one.
  explicit Mlp(int in = 784, std::vector<int> hidden = {400, 400}, int classes = 10);
  const char* architecture() const override { return name_.c_str(); }  // "mlp-784-400-400-10"
  int classes() const override { return classes_; }
  const ParameterLayout& layout() const override { return layout_; }
  void prepare(const LayerContext&, bool shared_input) override;
  const Activation& input() const override { return x_; }
  const float* logits() const override { return layers_.back().output().signal.value; }
  float* logits_gradient() override { return layers_.back().output().signal.grad; }
  void forward(Device&, WeightsView, const StepState*) override;
  void backward(Device&, WeightsView, GradientsView, const StepState*) override;
  std::vector<NamedActivation> activations() const override;

 private:
  int in_, classes_;
  std::string name_;
  ParameterLayout layout_;
  std::vector<Dense> layers_;  // fc1, fc2, ...: the last has no ReLU
  Activation x_;
};

}  // namespace baton
