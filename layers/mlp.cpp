#include "layers/mlp.h"

namespace baton {

namespace {

std::string name_of(int in, const std::vector<int>& hidden, int classes) {
  std::string name = "mlp-" + std::to_string(in);
  for (int width : hidden) name += "-" + std::to_string(width);
  return name + "-" + std::to_string(classes);
}

}  // namespace

Mlp::Mlp(int in, std::vector<int> hidden, int classes)
    : in_(in), classes_(classes), name_(name_of(in, hidden, classes)) {
  if (in < 1) throw InputError(name_ + ": an input has at least one feature, not " + std::to_string(in));
  if (hidden.empty()) throw InputError(name_ + ": a multilayer perceptron has at least one hidden layer");
  for (int width : hidden)
    if (width < 1) throw InputError(name_ + ": a hidden layer has at least one unit, not " + std::to_string(width));
  if (classes < 2) throw InputError(name_ + " needs at least two classes, not " + std::to_string(classes));
  int from = in;
  for (int width : hidden) {
    const int layer = int(layers_.size());
    layers_.emplace_back(layout_, "fc" + std::to_string(layer + 1), from, width, true, uint32_t(stream_layers + layer));
    from = width;
  }
  layers_.emplace_back(layout_, "fc" + std::to_string(hidden.size() + 1), from, classes, false,
                       uint32_t(stream_layers + hidden.size()));
}

void Mlp::prepare(const LayerContext& c, bool shared_input) {
  LayerContext input = c;
  if (shared_input) input.replicas = 1;
  x_ = take_activation(input, size_t(in_), c.sampled, false);
  if (shared_input) x_.stride = 0;
  for (Dense& layer : layers_) layer.prepare(c, &layer != &layers_.back());
}

void Mlp::forward(Device& device, WeightsView w, const StepState* states) {
  BATON_RANGE("forward");
  const Activation* x = &x_;
  for (Dense& layer : layers_) {
    layer.forward(device, w, *x, states);
    x = &layer.output();
  }
}

void Mlp::backward(Device& device, WeightsView w, GradientsView g, const StepState* states) {
  BATON_RANGE("backward");
  for (size_t i = layers_.size(); i-- > 0;)
    layers_[i].backward(device, w, g, i > 0 ? layers_[i - 1].output() : x_, states);
}

std::vector<NamedActivation> Mlp::activations() const {
  std::vector<NamedActivation> all;
  for (const Dense& layer : layers_) all.push_back({"fc" + std::to_string(all.size() + 1), layer.output()});
  return all;
}

}  // namespace baton
