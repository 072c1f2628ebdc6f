// Max pooling as a layer of its own (where it cannot be fused with the convolution before it): windows of 2x2 or 3x3,
// stride 2, floor mode. No parameters. Under local reparameterization it passes squares on as the squares of its
// output.
#pragma once
#include "kernels/maxpool.h"
#include "layers/layer.h"

namespace baton {

class MaxPool2d {
 public:
  MaxPool2d(int channels, int height, int width, int window);
  void prepare(const LayerContext&);
  void forward(Device&, const Activation& x);
  // x.signal.grad = the whole gradient dL/dx; x.signal.grad_square, when there is one, = 0.
  void backward(Device&, const Activation& x);
  const Activation& output() const { return y_; }
  int out_height() const { return (height_ - window_) / 2 + 1; }
  int out_width() const { return (width_ - window_) / 2 + 1; }

 private:
  int channels_, height_, width_, window_, planes_ = 0;
  Activation y_;
  uint8_t* which_ = nullptr;
};

}  // namespace baton
