// A dense layer: y = relu?(x W^T + b), W [out, in], under a point or a Gaussian posterior, whose means may be draws.
#pragma once
#include "layers/layer.h"

namespace baton {

class Dense {
 public:
  // Adds `name`.weight [out, in] and `name`.bias [out] to the layout. stream_id: the layer's noise stream.
  Dense(ParameterLayout&, const std::string& name, int in, int out, bool relu, uint32_t stream_id);
  // Takes the buffers. feeds_layer: another layer reads the output (else these are the network's logits).
  void prepare(const LayerContext&, bool feeds_layer);

  void forward(Device&, WeightsView, const Activation& x, const StepState*);
  // From output().signal.grad (and grad_square where another layer reads the output) to the gradients of the weights
  // and of x: x.signal.grad and grad_square are written when not null.
  void backward(Device&, WeightsView, GradientsView, const Activation& x, const StepState*);
  const Activation& output() const { return y_; }

 private:
  int in_, out_, weight_, bias_;
  size_t weight_at_, bias_at_;
  bool relu_, sampled_ = false, drawn_ = false;
  uint32_t stream_id_;
  DenseShape shape_{};
  Rows rows_{};  // of the products with the means
  Activation y_;
  float* v_ = nullptr;               // variances of the pre-activations
  float* dv_ = nullptr;              // their gradient: grad_square's place, or the logits' own
  float* bias_gradients_ = nullptr;  // of every draw, for their moments
  float *squared_input_ = nullptr, *squared_gradient_ = nullptr;  // for the squares of single examples' gradients
};

}  // namespace baton
