#include "layers/lenet5.h"

namespace baton {

LeNet5::LeNet5(int classes)
    : classes_(classes),
      conv1_(layout_, "conv1", 1, 28, 28, 20, 5, 0, Pooling::max2, stream_layers + 0),
      conv2_(layout_, "conv2", 20, 12, 12, 50, 5, 0, Pooling::max2, stream_layers + 1),
      fc1_(layout_, "fc1", 50 * 4 * 4, 500, true, stream_layers + 2),
      fc2_(layout_, "fc2", 500, classes, false, stream_layers + 3) {}

void LeNet5::prepare(const LayerContext& c, bool shared_input) {
  LayerContext input = c;
  if (shared_input) input.replicas = 1;
  x_ = take_activation(input, 28 * 28, c.convolutions_sampled(), false);
  if (shared_input) x_.stride = 0;
  conv1_.prepare(c, c.convolutions_sampled());
  conv2_.prepare(c, c.sampled);
  fc1_.prepare(c, true);
  fc2_.prepare(c, false);
}

void LeNet5::forward(Device& device, WeightsView w, const StepState* states) {
  BATON_RANGE("forward");
  conv1_.forward(device, w, x_, states);
  conv2_.forward(device, w, conv1_.output(), states);
  fc1_.forward(device, w, conv2_.output(), states);
  fc2_.forward(device, w, fc1_.output(), states);
}

void LeNet5::backward(Device& device, WeightsView w, GradientsView g, const StepState* states) {
  BATON_RANGE("backward");
  fc2_.backward(device, w, g, fc1_.output(), states);
  fc1_.backward(device, w, g, conv2_.output(), states);
  conv2_.backward(device, w, g, conv1_.output(), states);
  conv1_.backward(device, w, g, x_, states);
}

std::vector<NamedActivation> LeNet5::activations() const {
  return {{"conv1", conv1_.output()}, {"conv2", conv2_.output()}, {"fc1", fc1_.output()}, {"fc2", fc2_.output()}};
}

}  // namespace baton
