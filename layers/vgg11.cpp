// VGG11 for 32x32 colour images without batch normalisation and with one output layer (Simonyan and Zisserman 2015;
// Zeno et al. 2018: 9.2 M weights):
//
//   3x32x32  conv1 64, max 2/2 -> 16   conv2 128, max -> 8   conv3 256, conv4 256, max -> 4
//            conv5 512, conv6 512, max -> 2   conv7 512, conv8 512, max -> 512x1x1   fc 512 -> classes
//
// Convolutions are 3x3 with padding 1 and ReLU. 9,222,848 weights and 2,762 biases with ten classes.
#include "layers/networks.h"

namespace baton {

namespace {

class Vgg11 : public Network {
 public:
  explicit Vgg11(const NetworkSpec& spec) : Network("vgg11", spec.image, spec.classes) {
    add_convolution("conv1", 64, 3, 1, Pooling::max2);
    add_convolution("conv2", 128, 3, 1, Pooling::max2);
    add_convolution("conv3", 256, 3, 1, Pooling::none);
    add_convolution("conv4", 256, 3, 1, Pooling::max2);
    add_convolution("conv5", 512, 3, 1, Pooling::none);
    add_convolution("conv6", 512, 3, 1, Pooling::max2);
    add_convolution("conv7", 512, 3, 1, Pooling::none);
    add_convolution("conv8", 512, 3, 1, Pooling::max2);
    add_head("fc");
  }
};

}  // namespace

extern const NetworkKind vgg11_kind{"vgg11", {3, 32, 32}, false, {}, make_chain<Vgg11>};

}  // namespace baton
