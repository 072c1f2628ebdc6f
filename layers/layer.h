// What the layers share. A layer owns its activations and their gradients, knows where its tensors lie in the flat
// store, and writes its forward and backward pass out; the weights themselves are the posterior's
// (layers/posteriors/posterior.h).
#pragma once
#include <string>

#include "engine/blas.h"
#include "engine/store.h"
#include "kernels/bgd.h"
#include "kernels/cholesky.h"
#include "kernels/local_reparam.h"

namespace baton {

// The weights of every replica: [replicas][stride]. variance null: a point posterior (or given draws of the weights).
// draw [replicas * groups][draw_stride], the same offsets: this step's draws, for the layers that use them (see Draws).
struct WeightsView {
  const float* mean;
  const float* variance;
  size_t stride;
  const float* draw = nullptr;
  size_t draw_stride = 0;
  const float* factor = nullptr;  // CFG: the Cholesky factors, where layers use their exact moments
  size_t factor_stride = 0;
  int first_draw = 0;  // replica r is draw first_draw + r of the step: what else is random (dropout) goes by it
};
// Gradients of the mean cross-entropy, same layouts; written (=), not added to. variance null for a point posterior.
// squares (a point posterior, one replica): the backward pass adds (+=) to it the squares of every *example's* gradient
// of the weights, and writes no gradients: sums over examples of (dl_n/dw)^2 (kernels/squares.h).
struct GradientsView {
  float* mean;
  float* variance;
  size_t stride;
  float* draw = nullptr;
  size_t draw_stride = 0;
  float* squares = nullptr;
  float* factor = nullptr;  // added to (+=): zero it before the backward pass
  // Where every replica is a draw of one posterior (LayerContext::moments): the backward pass writes the moments of the
  // draws' gradients, and no gradients; `mean` may be null.
  Moments moments{};
  DrawnPass pass{};
};

// Which weights are drawn once a step (and group of examples) instead of through local reparameterization.
enum class Draws {
  none,
  convolutions,  // weights and biases of convolutions are draws (CFG)
  means,         // the means of all weights are draws, z mu; their sigma^2 go through local reparameterization (MNF)
};

// A layer's input or output: `size` floats an example; the next replica's lies `stride` floats on (0: shared by all).
struct Activation {
  Signal signal;
  size_t size = 0, stride = 0;
};

// Where the Cholesky factors of a layout's convolutions lie: a tensor [filters, channels, d (d + 1) / 2] for each of
// four extents, in their order.
inline ParameterLayout factor_layout(const ParameterLayout& layout) {
  ParameterLayout factors;
  for (const TensorSpec& t : layout.tensors())
    if (t.shape.size() == 4)
      factors.add(t.name, {t.shape[0], t.shape[1], packed(int(t.shape[2] * t.shape[3]))}, t.fan_in, false);
  return factors;
}

struct LayerContext {
  Device& device;
  Arena& arena;
  int replicas, batch;
  bool sampled;   // local reparameterization: the layer keeps variances and passes squares on
  bool training;  // a backward pass will follow
  Draws draws = Draws::none;
  int groups = 1;                // of a replica's batch, each with draws of its own; divides the batch
  bool channel_moments = false;  // CFG by local reparameterization with the exact marginal moments, nothing drawn
  bool moments = false;          // replicas are draws, whose gradients' moments are wanted (GradientsView::moments)
  bool convolutions_sampled() const { return sampled && draws != Draws::convolutions; }
};

// Takes the buffers of an activation: squares, and their gradient, where the next layer samples (square); gradients
// where a backward pass follows.
inline Activation take_activation(const LayerContext& c, size_t size, bool square, bool gradient) {
  Activation a;
  a.size = size;
  a.stride = size * c.batch;
  const size_t count = a.stride * c.replicas;
  a.signal.value = c.arena.take<float>(count);
  if (square) a.signal.square = c.arena.take<float>(count);
  if (gradient) a.signal.grad = c.arena.take<float>(count);
  if (gradient && square) a.signal.grad_square = c.arena.take<float>(count);
  return a;
}

// How a layer's rows lie when each group of examples has weights of its own: R replicas of B examples are R * groups
// rows of B / groups, the same memory.
struct Rows {
  int rows, batch;
};
inline Rows rows_of(const LayerContext& c, bool drawn) {
  if (!drawn) return {c.replicas, c.batch};
  if (c.groups < 1 || c.batch % c.groups != 0)
    throw InputError("a batch of " + std::to_string(c.batch) + " does not divide into " + std::to_string(c.groups) +
                     " groups");
  return {c.replicas * c.groups, c.batch / c.groups};
}

}  // namespace baton
