// Local reparameterization (Kingma, Salimans and Welling 2015): a layer's pre-activations are Gaussian given its input,
//   y = m + sqrt(v) e,   m = x mu + b_mu,   v = x^2 sigma^2 + b_sigma^2,   e ~ N(0, 1) for each example and output,
// so a layer samples its outputs instead of its weights. engine/blas.h makes the products; this is what surrounds them.
// A variance product below 0, which rounding may leave where it should be 0, counts as 0; a NaN stays NaN.
// A point posterior is the same without the noise: pass v = nullptr.
#pragma once
#include "kernels/step_state.h"

namespace baton {

// The bias of a layer for every replica: mean and variance [replicas][stride]; variance null for a point posterior.
struct Bias {
  const float* mean;
  const float* variance;
  size_t stride;
};

// What flows between layers, [replicas][batch][...]. The squares feed the next layer's variance product; square and
// grad_square are null where nobody reads them. On the way back, the whole of dL/dvalue is grad + 2 value grad_square,
// or grad where grad_square is null. That does not depend on the layer's own noise: a layer without noise (v null) can
// feed one that reads squares. rounded: value and the gradients of pre-activations that come of it are written as tf32
// numbers, for tensor cores multiply them (kernels/layer_product.h).
struct Signal {
  float* value = nullptr;
  float* square = nullptr;
  float* grad = nullptr;
  float* grad_square = nullptr;
  bool rounded = false;
};

// ---- dense. m, v [replicas][batch][units]. With q = ceil(units / 4), the noise of unit j is lane j / q of the normal
// whose counter is b q + j mod q for example b.
struct DenseShape {
  int replicas, batch, units;
};
// out.value = relu?(m + b_mu + sqrt(v + b_sigma^2) e), out.square its square. v is replaced by v + b_sigma^2. m may be
// out.value.
void dense_sample(Signal out, const float* m, float* v, Bias, DenseShape, bool relu, const StepState*,
                  uint32_t stream_id, Stream);
// dm = g, dv = g e / (2 sqrt v), with g = dL/dy (0 where the ReLU cut) and e drawn again; v as dense_sample left it.
// dv is 0 where v is 0. dm may be out.grad.
void dense_sample_backward(float* dm, float* dv, Signal out, const float* v, DenseShape, bool relu, const StepState*,
                           uint32_t stream_id, Stream);
// db_mean[r][j] = sum_b dm, db_variance[r][j] = sum_b dv: [replicas][stride]. dv, db_variance may be null.
void dense_bias_gradient(float* db_mean, float* db_variance, size_t stride, const float* dm, const float* dv,
                         DenseShape, Stream);

// ---- convolution. m, v [replicas][batch][channels][h][w]. The four normals of one counter are the noise of the 2x2
// window (y/2, x/2) of a plane, lane 2 (y mod 2) + x mod 2: so pooling kernels draw a window's noise at once.
struct ConvPlanes {
  int replicas, batch, channels, h, w;
  int window = 2;  // of the pooling, at stride 2: 2, or 3 (overlapping); places that fill no window are dropped
  __host__ __device__ int pooled_h() const { return (h + 2 - window) / 2; }
  __host__ __device__ int pooled_w() const { return (w + 2 - window) / 2; }
};
// As dense_sample.
void conv_sample(Signal out, const float* m, float* v, Bias, ConvPlanes, bool relu, const StepState*,
                 uint32_t stream_id, Stream);
// dm, dv as for dense; sums [2][replicas][batch][channels]: each plane's sums of dm and dv, for conv_bias_gradient.
void conv_sample_backward(float* dm, float* dv, float* sums, Signal out, const float* v, ConvPlanes, bool relu,
                          const StepState*, uint32_t stream_id, Stream);

// Sampling, ReLU and max pooling in one pass. m and v are read once. Of the pre-activations only this is kept for each
// window: the pooled value, the winner's place (window * row + column, the first of equals; window^2 where the ReLU cut
// it) and its slope dy/dv = e / (2 sqrt v). out, which and slope are [replicas][batch][channels][pooled_h][pooled_w].
// slope is null for a point posterior or when no backward pass follows; which may be null then too. A layer with v
// writes squares. With windows of 3 a plane must fit into a block's shared memory: it has at most 72x72.
void conv_sample_pool(Signal out, uint8_t* which, float* slope, const float* m, const float* v, Bias, ConvPlanes,
                      const StepState*, uint32_t stream_id, Stream);
// The gradient of each window goes to its winner; those of windows that share a winner add up. dm, dv
// [replicas][batch][channels][h][w], all elements are written; sums as in conv_sample_backward. The kept slopes take
// the place of the noise. Where slope is given, dv is written and out.grad_square is read.
void conv_sample_pool_backward(float* dm, float* dv, float* sums, Signal out, const uint8_t* which, const float* slope,
                               ConvPlanes, Stream);
// db_mean[r][c] = sum_b sums[0][r][b][c], db_variance likewise from sums[1]; db_variance may be null.
void conv_bias_gradient(float* db_mean, float* db_variance, size_t stride, const float* sums, ConvPlanes, Stream);

}  // namespace baton
