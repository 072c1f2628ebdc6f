// 3Conv3FC (Kochurov et al. 2018, table 2, with padding 2 in the third convolution, the only reading that gives the
// table's 1152 inputs to fc1), for every replica:
//
//   3x32x32  conv1 5x5 p2, 32, ReLU, max 3x3/2 -> 32x15x15  conv2 5x5 p2, 64, ReLU, max 3x3/2 -> 64x7x7
//            conv3 5x5 p2, 128, ReLU, max 3x3/2 -> 128x3x3 = 1152  fc1 1000, ReLU  fc2 1000, ReLU  fc3 classes
//
// 2,420,400 weights and 2,234 biases with ten classes. Forward and backward are written out; there is no autograd.
#pragma once
#include "layers/conv2d.h"
#include "layers/dense.h"
#include "layers/network.h"

namespace baton {

class Conv3Fc3 : public Network {
 public:
  explicit Conv3Fc3(int classes = 10);
  const char* architecture() const override { return "3conv3fc"; }
  int classes() const override { return classes_; }
  const ParameterLayout& layout() const override { return layout_; }
  void prepare(const LayerContext&, bool shared_input) override;
  const Activation& input() const override { return x_; }
  const float* logits() const override { return fc3_.output().signal.value; }
  float* logits_gradient() override { return fc3_.output().signal.grad; }
  void forward(Device&, WeightsView, const StepState*) override;
  void backward(Device&, WeightsView, GradientsView, const StepState*) override;
  std::vector<NamedActivation> activations() const override;

 private:
  int classes_;
  ParameterLayout layout_;
  Conv2d conv1_, conv2_, conv3_;
  Dense fc1_, fc2_, fc3_;
  Activation x_;
};

}  // namespace baton
