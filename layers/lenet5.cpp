// LeNet-5-Caffe (Kochurov et al., table 1, with the pooling of stride 2 that its shapes demand):
//
//   1x28x28  conv1 5x5, 20, ReLU, max 2x2/2 -> 20x12x12  conv2 5x5, 50, ReLU, max 2x2/2 -> 50x4x4 = 800
//            fc1 500, ReLU  fc2 classes
//
// 430,500 weights and 580 biases with ten classes.
#include "layers/networks.h"

namespace baton {

namespace {

class LeNet5 : public Network {
 public:
  explicit LeNet5(const NetworkSpec& spec)
      : Network("lenet5", spec.image, spec.classes),
        conv1_(add_convolution("conv1", 20, 5, 0, Pooling::max2)),
        conv2_(add_convolution("conv2", 50, 5, 0, Pooling::max2)),
        fc1_(add_dense("fc1", 500)),
        fc2_(add_head("fc2")) {}

  void forward_layers(const Pass& pass) override {
    conv1_.forward(input(), pass);
    conv2_.forward(conv1_.output(), pass);
    fc1_.forward(conv2_.output(), pass);
    fc2_.forward(fc1_.output(), pass);
  }

  void backward_layers(const Pass& pass) override {
    fc2_.backward(fc1_.output(), pass);
    fc1_.backward(conv2_.output(), pass);
    conv2_.backward(conv1_.output(), pass);
    conv1_.backward(input(), pass);
  }

 private:
  Conv2d &conv1_, &conv2_;
  Dense &fc1_, &fc2_;
};

}  // namespace

extern const NetworkKind lenet5_kind{"lenet5", {1, 28, 28}, false, {}, make_chain<LeNet5>};

}  // namespace baton
