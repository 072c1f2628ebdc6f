// What the layers share. A layer owns its activations and their gradients, knows where its tensors lie in the flat
// store, and writes its forward and backward pass out; the weights themselves are the posterior's (layers/posterior.h).
#pragma once
#include "engine/blas.h"
#include "engine/store.h"
#include "kernels/local_reparam.h"

namespace baton {

// The weights of every replica: [replicas][stride]. variance null: a point posterior (or given draws of the weights).
struct WeightsView {
  const float* mean;
  const float* variance;
  size_t stride;
};
// Gradients of the mean cross-entropy, same layout; written (=), not added to. variance null for a point posterior.
struct GradientsView {
  float* mean;
  float* variance;
  size_t stride;
};

// A layer's input or output: `size` floats an example; the next replica's lies `stride` floats on (0: shared by all).
struct Activation {
  Signal signal;
  size_t size = 0, stride = 0;
};

struct LayerContext {
  Device& device;
  Arena& arena;
  int replicas, batch;
  bool sampled;   // local reparameterization: the layer keeps variances and passes squares on
  bool training;  // a backward pass will follow
};

// Takes the buffers of an activation: squares when the next layer samples, gradients when a backward pass follows.
inline Activation take_activation(const LayerContext& c, size_t size, bool square, bool gradient) {
  Activation a;
  a.size = size;
  a.stride = size * c.batch;
  const size_t count = a.stride * c.replicas;
  a.signal.value = c.arena.take<float>(count);
  if (square) a.signal.square = c.arena.take<float>(count);
  if (gradient) a.signal.grad = c.arena.take<float>(count);
  if (gradient && c.sampled) a.signal.grad_square = c.arena.take<float>(count);
  return a;
}

}  // namespace baton
