#include "layers/task_cnn.h"

namespace baton {

namespace {

constexpr float rate_conv = 0.25f, rate_fc = 0.5f;
constexpr int after_conv2 = 1, after_conv4 = 3, after_fc1 = 4;  // the layers whose outputs are dropped

int checked(int heads, int classes) {
  if (heads < 1) throw InputError("the task CNN needs at least one head, not " + std::to_string(heads));
  if (classes < 2) throw InputError("the task CNN needs at least two classes, not " + std::to_string(classes));
  return classes;
}

}  // namespace

// The heads are one layer by number, with one noise stream: a pass runs one of them.
TaskCnn::TaskCnn(int heads, int classes, bool dropout)
    : classes_(checked(heads, classes)),
      dropout_(dropout),
      conv1_(layout_, "conv1", 3, 32, 32, 32, 3, 1, Pooling::none, stream_layers + 0),
      conv2_(layout_, "conv2", 32, 32, 32, 32, 3, 0, Pooling::max2, stream_layers + 1),
      conv3_(layout_, "conv3", 32, 15, 15, 64, 3, 1, Pooling::none, stream_layers + 2),
      conv4_(layout_, "conv4", 64, 15, 15, 64, 3, 0, Pooling::max2, stream_layers + 3),
      fc1_(layout_, "fc1", 64 * 6 * 6, 512, true, stream_layers + 4) {
  for (int i = 0; i < heads; i++)
    heads_.emplace_back(layout_, "head" + std::to_string(i), 512, classes, false, stream_layers + 5);
}

void TaskCnn::use_head(int head) {
  Network::use_head(head);
  head_ = head;
}

void TaskCnn::prepare(const LayerContext& c, bool shared_input) {
  // The squares that sampling layers pass on would not be dropped with the values.
  if (dropout_ && c.sampled) throw InputError("task-cnn: dropout does not go with local reparameterization");
  replicas_ = c.replicas;
  training_ = c.training;
  LayerContext input = c;
  if (shared_input) input.replicas = 1;
  x_ = take_activation(input, 3 * 32 * 32, c.convolutions_sampled(), false);
  if (shared_input) x_.stride = 0;
  for (Conv2d* conv : {&conv1_, &conv2_, &conv3_}) conv->prepare(c, c.convolutions_sampled());
  conv4_.prepare(c, c.sampled);
  fc1_.prepare(c, true);
  for (Dense& head : heads_) head.prepare(c, false);
}

// The activations of a layer, or their gradients, in place. A ReLU's derivative asks whether its output is above 0:
// where an output was dropped the gradient is 0 already, and elsewhere the answer is the same.
void TaskCnn::drop(Device& device, float* x, const Activation& a, float rate, int layer, const StepState* states,
                   int first_draw) {
  if (dropout_ && training_ && states)  // without states: curvature at the weights, where nothing is random
    dropout(x, a.stride, replicas_, rate, states, uint32_t(stream_dropout + layer), device.stream(), first_draw);
}

void TaskCnn::forward(Device& device, WeightsView w, const StepState* states) {
  BATON_RANGE("forward");
  const Activation &pool1 = conv2_.output(), &pool2 = conv4_.output(), &hidden = fc1_.output();
  conv1_.forward(device, w, x_, states);
  conv2_.forward(device, w, conv1_.output(), states);
  drop(device, pool1.signal.value, pool1, rate_conv, after_conv2, states, w.first_draw);
  conv3_.forward(device, w, pool1, states);
  conv4_.forward(device, w, conv3_.output(), states);
  drop(device, pool2.signal.value, pool2, rate_conv, after_conv4, states, w.first_draw);
  fc1_.forward(device, w, pool2, states);
  drop(device, hidden.signal.value, hidden, rate_fc, after_fc1, states, w.first_draw);
  heads_[head_].forward(device, w, hidden, states);
}

void TaskCnn::backward(Device& device, WeightsView w, GradientsView g, const StepState* states) {
  BATON_RANGE("backward");
  const Activation &pool1 = conv2_.output(), &pool2 = conv4_.output(), &hidden = fc1_.output();
  heads_[head_].backward(device, w, g, hidden, states);
  drop(device, hidden.signal.grad, hidden, rate_fc, after_fc1, states, w.first_draw);
  fc1_.backward(device, w, g, pool2, states);
  drop(device, pool2.signal.grad, pool2, rate_conv, after_conv4, states, w.first_draw);
  conv4_.backward(device, w, g, conv3_.output(), states);
  conv3_.backward(device, w, g, pool1, states);
  drop(device, pool1.signal.grad, pool1, rate_conv, after_conv2, states, w.first_draw);
  conv2_.backward(device, w, g, conv1_.output(), states);
  conv1_.backward(device, w, g, x_, states);
}

std::vector<NamedActivation> TaskCnn::activations() const {
  return {{"conv1", conv1_.output()}, {"conv2", conv2_.output()},
          {"conv3", conv3_.output()}, {"conv4", conv4_.output()},
          {"fc1", fc1_.output()},     {"head" + std::to_string(head_), heads_[head_].output()}};
}

}  // namespace baton
