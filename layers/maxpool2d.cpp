#include "layers/maxpool2d.h"

#include "kernels/squares.h"

namespace baton {

MaxPool2d::MaxPool2d(int channels, int height, int width, int window)
    : channels_(channels), height_(height), width_(width), window_(window) {
  if (window != 2 && window != 3)
    throw InputError("max pooling: windows are 2x2 or 3x3, not " + std::to_string(window));
  if (height < window || width < window)
    throw InputError("max pooling: a " + std::to_string(height) + "x" + std::to_string(width) +
                     " plane is smaller than the window of " + std::to_string(window));
}

void MaxPool2d::prepare(const LayerContext& c) {
  planes_ = c.replicas * c.batch * channels_;
  y_ = take_activation(c, size_t(channels_) * out_height() * out_width(), c.sampled, c.training);
  which_ = c.arena.take<uint8_t>(y_.stride * c.replicas);
}

void MaxPool2d::forward(Device& device, const Activation& x) {
  BATON_RANGE("pool forward");
  maxpool_forward(y_.signal.value, which_, x.signal.value, planes_, height_, width_, window_, device.stream());
  const size_t n = size_t(planes_) * out_height() * out_width();
  if (y_.signal.square) square(y_.signal.square, y_.signal.value, n, device.stream());
}

void MaxPool2d::backward(Device& device, const Activation& x) {
  BATON_RANGE("pool backward");
  const size_t n = size_t(planes_) * out_height() * out_width();
  if (y_.signal.grad_square)
    fold_square_gradient(y_.signal.grad, y_.signal.value, y_.signal.grad_square, n, device.stream());
  maxpool_backward(x.signal.grad, y_.signal.grad, which_, planes_, height_, width_, window_, device.stream());
  if (x.signal.grad_square) fill_zero(device, x.signal.grad_square, sizeof(float) * planes_ * height_ * width_);
}

}  // namespace baton
