#include "layers/network.h"

#include "kernels/dropout.h"

namespace baton {

Network::Network(std::string name, ImageShape input, int classes)
    : name_(std::move(name)), input_(input), map_(input), classes_(classes) {
  if (input.channels < 1 || input.height < 1 || input.width < 1)
    throw InputError(name_ + ": an input has at least one feature, not " + std::to_string(input.size()));
  if (classes < 2) throw InputError(name_ + " needs at least two classes, not " + std::to_string(classes));
}

size_t Network::reads() const { return size_t(dense_outputs_ ? dense_outputs_ : map_.size()); }

Conv2d& Network::add_convolution(const std::string& name, int out, int kernel, int pad, Pooling pooling) {
  auto layer = std::make_unique<Conv2d>(layout_, name, map_.channels, map_.height, map_.width, out, kernel, pad,
                                        pooling, uint32_t(stream_layers + chain_.size()));
  Conv2d& added = *layer;
  map_ = {added.out_channels(), added.out_height(), added.out_width()};
  chain_.push_back({std::move(layer)});
  return added;
}

Dense& Network::add_dense(const std::string& name, int out) {
  if (out < 1) throw InputError(name_ + ": a hidden layer has at least one unit, not " + std::to_string(out));
  auto layer = std::make_unique<Dense>(layout_, name, int(reads()), out, true, uint32_t(stream_layers + chain_.size()));
  Dense& added = *layer;
  dense_outputs_ = out;
  chain_.push_back({std::move(layer)});
  return added;
}

void Network::add_dropout(float rate) { chain_.back().dropout = rate; }

Dense& Network::add_head(const std::string& name) {
  heads_.push_back(
      std::make_unique<Dense>(layout_, name, int(reads()), classes_, false, uint32_t(stream_layers + chain_.size())));
  return *heads_.back();
}

void Network::use_head(int head) {
  if (head < 0 || head >= heads())
    throw InputError(name_ + " has " + std::to_string(heads()) + " heads, no head " + std::to_string(head));
  head_ = head;
}

void Network::prepare(const LayerContext& given) {
  LayerContext c = given;
  rows_ = c.rows;
  training_ = c.training;
  jobs_ = {};
  if (c.device.tensor_cores()) c.jobs = &jobs_;
  bool squares = false;  // of the layer that is prepared: what the one behind it reads
  LayerContext of_heads = c;
  if (heads_.size() > 1) of_heads.jobs = nullptr;  // a pass takes one of them, and does its jobs alone
  for (const auto& head : heads_) head->prepare(of_heads, false);
  squares = heads_[0]->reads_squares();
  for (size_t i = chain_.size(); i-- > 0;) {
    if (chain_[i].dropout > 0 && squares)
      throw InputError(name_ + ": dropout does not go with local reparameterization");
    chain_[i].layer->prepare(c, squares);
    squares = chain_[i].layer->reads_squares();
  }
  LayerContext of_input = c;
  if (c.shared_input) of_input.rows = 1;
  x_ = take_activation(of_input, size_t(input_.size()), squares, false);
  if (c.shared_input) x_.stride = 0;
  if (c.jobs) jobs_.settle(c.device, c.arena);
}

// The activations of a layer, or their gradients, in place. A ReLU's derivative asks whether its output is above 0:
// where an output was dropped the gradient is 0 already, and elsewhere the answer is the same.
void Network::drop(const Link& link, float* x, const Pass& pass) const {
  if (link.dropout > 0 && training_ && pass.states)  // without states: curvature at the weights
    dropout(x, link.layer->output().stride, rows_, link.dropout, pass.states,
            uint32_t(stream_dropout + (&link - chain_.data())), link.layer->device().stream(), pass.first_draw,
            link.layer->output().signal.rounded);
}

void Network::forward(const Pass& pass) {
  BATON_RANGE("forward");
  jobs_.pack(output().device().stream());
  forward_layers(pass);
}

void Network::backward(const Pass& pass) {
  BATON_RANGE("backward");
  backward_layers(pass);
  jobs_.add_up(output().device().stream());
}

void Network::forward_layers(const Pass& pass) {
  const Activation* x = &x_;
  for (const Link& link : chain_) {
    link.layer->forward(*x, pass);
    x = &link.layer->output();
    drop(link, x->signal.value, pass);
  }
  output().forward(*x, pass);
}

void Network::backward_layers(const Pass& pass) {
  Linear* layer = &output();
  for (size_t i = chain_.size(); i-- > 0;) {
    const Activation& x = chain_[i].layer->output();
    layer->backward(x, pass);
    drop(chain_[i], x.signal.grad, pass);
    layer = chain_[i].layer.get();
  }
  layer->backward(x_, pass);
}

std::vector<NamedActivation> Network::activations() const {
  std::vector<NamedActivation> all;
  for (const Link& link : chain_) all.push_back({link.layer->name(), link.layer->output()});
  all.push_back({output().name(), output().output()});
  return all;
}

}  // namespace baton
