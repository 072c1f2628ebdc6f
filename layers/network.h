// What a trainer sees of a network. Each network writes its forward and backward pass out by hand.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "layers/layer.h"

namespace baton {

struct NamedActivation {
  std::string layer;
  Activation activation;
};

class Network {
 public:
  virtual ~Network() = default;
  virtual const char* architecture() const = 0;
  virtual int classes() const = 0;  // of a head
  // Networks with one output layer a task: which one the next passes use (at construction the first). The gradients of
  // the others are not written. InputError for a head that is not there.
  virtual int heads() const { return 1; }
  virtual void use_head(int head);
  virtual const ParameterLayout& layout() const = 0;
  // Takes every buffer for `replicas` networks and batches of `batch`. shared_input: one batch serves all replicas.
  virtual void prepare(const LayerContext&, bool shared_input) = 0;
  // The batch goes here first: value, and square when the layers sample. [replicas or 1][batch][channels][h][w]
  virtual const Activation& input() const = 0;
  virtual const float* logits() const = 0;  // [replicas][batch][classes]
  virtual float* logits_gradient() = 0;     // the same shape; where a backward pass starts
  virtual void forward(Device&, WeightsView, const StepState*) = 0;
  // From logits_gradient() to the gradient of every weight.
  virtual void backward(Device&, WeightsView, GradientsView, const StepState*) = 0;
  // Every layer's output in the order of the forward pass: where to look for what went wrong.
  virtual std::vector<NamedActivation> activations() const = 0;
};

inline void Network::use_head(int head) {
  if (head < 0 || head >= heads())
    throw InputError(std::string(architecture()) + " has " + std::to_string(heads()) + " heads, no head " +
                     std::to_string(head));
}

}  // namespace baton
