// VGG11 for 32x32 colour images without batch normalisation and with one output layer (Simonyan and Zisserman 2015;
// Zeno et al. 2018: 9.2 M weights), for every replica:
//
//   3x32x32  conv1 64, max 2/2 -> 16   conv2 128, max -> 8   conv3 256, conv4 256, max -> 4
//            conv5 512, conv6 512, max -> 2   conv7 512, conv8 512, max -> 512x1x1   fc 512 -> classes
//
// Convolutions are 3x3 with padding 1 and ReLU. 9,222,848 weights and 2,762 biases with ten classes.
// Forward and backward are written out; there is no autograd.
#pragma once
#include "layers/conv2d.h"
#include "layers/dense.h"
#include "layers/network.h"

namespace baton {

class Vgg11 : public Network {
 public:
  explicit Vgg11(int classes = 10);
  const char* architecture() const override { return "vgg11"; }
  int classes() const override { return classes_; }
  const ParameterLayout& layout() const override { return layout_; }
  void prepare(const LayerContext&, bool shared_input) override;
  const Activation& input() const override { return x_; }
  const float* logits() const override { return fc_.output().signal.value; }
  float* logits_gradient() override { return fc_.output().signal.grad; }
  void forward(Device&, WeightsView, const StepState*) override;
  void backward(Device&, WeightsView, GradientsView, const StepState*) override;
  std::vector<NamedActivation> activations() const override;

 private:
  int classes_;
  ParameterLayout layout_;
  Conv2d conv1_, conv2_, conv3_, conv4_, conv5_, conv6_, conv7_, conv8_;
  Dense fc_;
  Activation x_;
};

}  // namespace baton
