// LeNet-5-Caffe (Kochurov et al., table 1, with the pooling of stride 2 that its shapes demand), for every replica:
//
//   1x28x28  conv1 5x5, 20, ReLU, max 2x2/2 -> 20x12x12  conv2 5x5, 50, ReLU, max 2x2/2 -> 50x4x4 = 800
//            fc1 500, ReLU  fc2 classes
//
// 430,500 weights and 580 biases with ten classes. Forward and backward are written out; there is no autograd.
#pragma once
#include "layers/conv2d.h"
#include "layers/dense.h"
#include "layers/network.h"

namespace baton {

class LeNet5 : public Network {
 public:
  explicit LeNet5(int classes = 10);
  const char* architecture() const override { return "lenet5"; }
  int classes() const override { return classes_; }
  const ParameterLayout& layout() const override { return layout_; }
  void prepare(const LayerContext&, bool shared_input) override;
  const Activation& input() const override { return x_; }
  const float* logits() const override { return fc2_.output().signal.value; }
  float* logits_gradient() override { return fc2_.output().signal.grad; }
  void forward(Device&, WeightsView, const StepState*) override;
  void backward(Device&, WeightsView, GradientsView, const StepState*) override;
  std::vector<NamedActivation> activations() const override;

 private:
  int classes_;
  ParameterLayout layout_;
  Conv2d conv1_, conv2_;
  Dense fc1_, fc2_;
  Activation x_;
};

}  // namespace baton
