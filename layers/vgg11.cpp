#include "layers/vgg11.h"

namespace baton {

namespace {

int checked(int classes) {
  if (classes < 2) throw InputError("VGG11 needs at least two classes, not " + std::to_string(classes));
  return classes;
}

}  // namespace

Vgg11::Vgg11(int classes)
    : classes_(checked(classes)),
      conv1_(layout_, "conv1", 3, 32, 32, 64, 3, 1, Pooling::max2, stream_layers + 0),
      conv2_(layout_, "conv2", 64, 16, 16, 128, 3, 1, Pooling::max2, stream_layers + 1),
      conv3_(layout_, "conv3", 128, 8, 8, 256, 3, 1, Pooling::none, stream_layers + 2),
      conv4_(layout_, "conv4", 256, 8, 8, 256, 3, 1, Pooling::max2, stream_layers + 3),
      conv5_(layout_, "conv5", 256, 4, 4, 512, 3, 1, Pooling::none, stream_layers + 4),
      conv6_(layout_, "conv6", 512, 4, 4, 512, 3, 1, Pooling::max2, stream_layers + 5),
      conv7_(layout_, "conv7", 512, 2, 2, 512, 3, 1, Pooling::none, stream_layers + 6),
      conv8_(layout_, "conv8", 512, 2, 2, 512, 3, 1, Pooling::max2, stream_layers + 7),
      fc_(layout_, "fc", 512, classes, false, stream_layers + 8) {}

void Vgg11::prepare(const LayerContext& c, bool shared_input) {
  LayerContext input = c;
  if (shared_input) input.replicas = 1;
  x_ = take_activation(input, 3 * 32 * 32, c.convolutions_sampled(), false);
  if (shared_input) x_.stride = 0;
  for (Conv2d* conv : {&conv1_, &conv2_, &conv3_, &conv4_, &conv5_, &conv6_, &conv7_})
    conv->prepare(c, c.convolutions_sampled());
  conv8_.prepare(c, c.sampled);
  fc_.prepare(c, false);
}

void Vgg11::forward(Device& device, WeightsView w, const StepState* states) {
  BATON_RANGE("forward");
  conv1_.forward(device, w, x_, states);
  conv2_.forward(device, w, conv1_.output(), states);
  conv3_.forward(device, w, conv2_.output(), states);
  conv4_.forward(device, w, conv3_.output(), states);
  conv5_.forward(device, w, conv4_.output(), states);
  conv6_.forward(device, w, conv5_.output(), states);
  conv7_.forward(device, w, conv6_.output(), states);
  conv8_.forward(device, w, conv7_.output(), states);
  fc_.forward(device, w, conv8_.output(), states);
}

void Vgg11::backward(Device& device, WeightsView w, GradientsView g, const StepState* states) {
  BATON_RANGE("backward");
  fc_.backward(device, w, g, conv8_.output(), states);
  conv8_.backward(device, w, g, conv7_.output(), states);
  conv7_.backward(device, w, g, conv6_.output(), states);
  conv6_.backward(device, w, g, conv5_.output(), states);
  conv5_.backward(device, w, g, conv4_.output(), states);
  conv4_.backward(device, w, g, conv3_.output(), states);
  conv3_.backward(device, w, g, conv2_.output(), states);
  conv2_.backward(device, w, g, conv1_.output(), states);
  conv1_.backward(device, w, g, x_, states);
}

std::vector<NamedActivation> Vgg11::activations() const {
  return {{"conv1", conv1_.output()}, {"conv2", conv2_.output()}, {"conv3", conv3_.output()},
          {"conv4", conv4_.output()}, {"conv5", conv5_.output()}, {"conv6", conv6_.output()},
          {"conv7", conv7_.output()}, {"conv8", conv8_.output()}, {"fc", fc_.output()}};
}

}  // namespace baton
