// A convolution of stride 1 with ReLU, and 2x2 max pooling fused behind it where asked for: y = pool?(relu(x * W + b)),
// W [out, in, k, k], under a point or a fully factorized Gaussian posterior (noise for each example, filter and
// position).
#pragma once
#include <optional>

#include "layers/layer.h"

namespace baton {

enum class Pooling { none, max2 };

class Conv2d {
 public:
  // Adds `name`.weight [out, in, k, k] and `name`.bias [out]. The input has in channels of height x width.
  Conv2d(ParameterLayout&, const std::string& name, int in, int height, int width, int out, int kernel, int pad,
         Pooling pooling, uint32_t stream_id);
  void prepare(const LayerContext&);

  void forward(Device&, WeightsView, const Activation& x, const StepState*);
  // As Dense::backward. An input without gradient buffers (the first layer's) costs no backward pass to the data.
  void backward(Device&, WeightsView, GradientsView, const Activation& x, const StepState*);
  const Activation& output() const { return y_; }
  int out_channels() const { return geometry_.out_channels; }
  int out_height() const { return pooling_ == Pooling::max2 ? planes_.pooled_h() : planes_.h; }
  int out_width() const { return pooling_ == Pooling::max2 ? planes_.pooled_w() : planes_.w; }

 private:
  ConvShape geometry_;
  ConvPlanes planes_{};
  Pooling pooling_;
  size_t weight_at_, bias_at_;
  uint32_t stream_id_;
  bool sampled_ = false;
  std::optional<Convolution> convolution_;
  Activation y_;
  size_t pre_stride_ = 0;
  float* m_ = nullptr;  // pre-activations: means, then (pooled) their gradient
  float* v_ = nullptr;  // variances, then (pooled) their gradient
  uint8_t* which_ = nullptr;
  float* slope_ = nullptr;
  float* sums_ = nullptr;
};

}  // namespace baton
