// 3Conv3FC (Kochurov et al. 2018, table 2, with padding 2 in the third convolution, the only reading that gives the
// table's 1152 inputs to fc1):
//
//   3x32x32  conv1 5x5 p2, 32, ReLU, max 3x3/2 -> 32x15x15  conv2 5x5 p2, 64, ReLU, max 3x3/2 -> 64x7x7
//            conv3 5x5 p2, 128, ReLU, max 3x3/2 -> 128x3x3 = 1152  fc1 1000, ReLU  fc2 1000, ReLU  fc3 classes
//
// 2,420,400 weights and 2,234 biases with ten classes.
#include "layers/networks.h"

namespace baton {

namespace {

class Conv3Fc3 : public Network {
 public:
  explicit Conv3Fc3(const NetworkSpec& spec)
      : Network("3conv3fc", spec.image, spec.classes),
        conv1_(add_convolution("conv1", 32, 5, 2, Pooling::max3)),
        conv2_(add_convolution("conv2", 64, 5, 2, Pooling::max3)),
        conv3_(add_convolution("conv3", 128, 5, 2, Pooling::max3)),
        fc1_(add_dense("fc1", 1000)),
        fc2_(add_dense("fc2", 1000)),
        fc3_(add_head("fc3")) {}

  void forward_layers(const Pass& pass) override {
    conv1_.forward(input(), pass);
    conv2_.forward(conv1_.output(), pass);
    conv3_.forward(conv2_.output(), pass);
    fc1_.forward(conv3_.output(), pass);
    fc2_.forward(fc1_.output(), pass);
    fc3_.forward(fc2_.output(), pass);
  }

  void backward_layers(const Pass& pass) override {
    fc3_.backward(fc2_.output(), pass);
    fc2_.backward(fc1_.output(), pass);
    fc1_.backward(conv3_.output(), pass);
    conv3_.backward(conv2_.output(), pass);
    conv2_.backward(conv1_.output(), pass);
    conv1_.backward(input(), pass);
  }

 private:
  Conv2d &conv1_, &conv2_, &conv3_;
  Dense &fc1_, &fc2_, &fc3_;
};

}  // namespace

extern const NetworkKind conv3fc3_kind{"3conv3fc", {3, 32, 32}, false, {}, make_chain<Conv3Fc3>};

}  // namespace baton
