#include "layers/conv3fc3.h"

namespace baton {

Conv3Fc3::Conv3Fc3(int classes)
    : classes_(classes),
      conv1_(layout_, "conv1", 3, 32, 32, 32, 5, 2, Pooling::max3, stream_layers + 0),
      conv2_(layout_, "conv2", 32, 15, 15, 64, 5, 2, Pooling::max3, stream_layers + 1),
      conv3_(layout_, "conv3", 64, 7, 7, 128, 5, 2, Pooling::max3, stream_layers + 2),
      fc1_(layout_, "fc1", 128 * 3 * 3, 1000, true, stream_layers + 3),
      fc2_(layout_, "fc2", 1000, 1000, true, stream_layers + 4),
      fc3_(layout_, "fc3", 1000, classes, false, stream_layers + 5) {
  if (classes < 2) throw InputError("3Conv3FC needs at least two classes, not " + std::to_string(classes));
}

void Conv3Fc3::prepare(const LayerContext& c, bool shared_input) {
  LayerContext input = c;
  if (shared_input) input.replicas = 1;
  x_ = take_activation(input, 3 * 32 * 32, c.convolutions_sampled(), false);
  if (shared_input) x_.stride = 0;
  conv1_.prepare(c, c.convolutions_sampled());
  conv2_.prepare(c, c.convolutions_sampled());
  conv3_.prepare(c, c.sampled);
  fc1_.prepare(c, true);
  fc2_.prepare(c, true);
  fc3_.prepare(c, false);
}

void Conv3Fc3::forward(Device& device, WeightsView w, const StepState* states) {
  BATON_RANGE("forward");
  conv1_.forward(device, w, x_, states);
  conv2_.forward(device, w, conv1_.output(), states);
  conv3_.forward(device, w, conv2_.output(), states);
  fc1_.forward(device, w, conv3_.output(), states);
  fc2_.forward(device, w, fc1_.output(), states);
  fc3_.forward(device, w, fc2_.output(), states);
}

void Conv3Fc3::backward(Device& device, WeightsView w, GradientsView g, const StepState* states) {
  BATON_RANGE("backward");
  fc3_.backward(device, w, g, fc2_.output(), states);
  fc2_.backward(device, w, g, fc1_.output(), states);
  fc1_.backward(device, w, g, conv3_.output(), states);
  conv3_.backward(device, w, g, conv2_.output(), states);
  conv2_.backward(device, w, g, conv1_.output(), states);
  conv1_.backward(device, w, g, x_, states);
}

std::vector<NamedActivation> Conv3Fc3::activations() const {
  return {{"conv1", conv1_.output()}, {"conv2", conv2_.output()}, {"conv3", conv3_.output()},
          {"fc1", fc1_.output()},     {"fc2", fc2_.output()},     {"fc3", fc3_.output()}};
}

}  // namespace baton
