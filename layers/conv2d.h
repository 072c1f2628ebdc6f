// A convolution of stride 1 with ReLU, and max pooling fused behind it where asked for (2x2 or 3x3, stride 2, floor
// mode): y = pool?(relu(x * W + b)), W [out, in, k, k], under a point or a Gaussian posterior. Local reparameterization
// draws noise for each example, filter and position; under CFG weights and bias are draws (no noise here), under MNF
// the weights' means are. CFG may also sample from the exact marginal moments of its pre-activations
// (kernels/cholesky_moments.h).
#pragma once
#include <optional>

#include "kernels/cholesky_moments.h"
#include "layers/layer.h"

namespace baton {

enum class Pooling { none, max2, max3 };

class Conv2d {
 public:
  // Adds `name`.weight [out, in, k, k] and `name`.bias [out]. The input has in channels of height x width.
  Conv2d(ParameterLayout&, const std::string& name, int in, int height, int width, int out, int kernel, int pad,
         Pooling pooling, uint32_t stream_id);
  // feeds_sampled: the next layer samples, so it wants squares.
  void prepare(const LayerContext&, bool feeds_sampled);

  void forward(Device&, WeightsView, const Activation& x, const StepState*);
  // As Dense::backward. An input without gradient buffers (the first layer's) costs no backward pass to the data.
  void backward(Device&, WeightsView, GradientsView, const Activation& x, const StepState*);
  const Activation& output() const { return y_; }
  int out_channels() const { return geometry_.out_channels; }
  int out_height() const { return pooled() ? planes_.pooled_h() : planes_.h; }
  int out_width() const { return pooled() ? planes_.pooled_w() : planes_.w; }

 private:
  void add_moments(Device&, GradientsView, const Activation& x, const float* dm, const StepState*);
  void add_squares(Device&, GradientsView, const Activation& x, const float* dm);
  bool pooled() const { return pooling_ != Pooling::none; }
  ConvShape geometry_;
  ConvPlanes planes_{};
  Pooling pooling_;
  size_t weight_at_, bias_at_, factor_at_;
  uint32_t stream_id_;
  bool sampled_ = false, drawn_ = false;
  Rows rows_{};  // of the products with the means
  int replicas_ = 1;
  std::optional<CholeskyMoments> moments_;
  std::optional<Convolution> mean_product_, variance_product_, example_product_, draw_product_;
  Activation y_;
  size_t pre_stride_ = 0;
  float* m_ = nullptr;  // pre-activations: means, then (pooled) their gradient
  float* v_ = nullptr;  // variances, then (pooled) their gradient
  uint8_t* which_ = nullptr;
  float* slope_ = nullptr;
  float* sums_ = nullptr;
  float* dv_ = nullptr;              // not pooled: the gradient of v
  float* gradients_ = nullptr;       // of single examples, or of one draw, for its moments
  float* bias_gradients_ = nullptr;  // of every draw
};

}  // namespace baton
