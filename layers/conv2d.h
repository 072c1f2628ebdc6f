// A convolution of stride 1 with ReLU, and max pooling fused behind it where asked for (2x2 or 3x3, stride 2, floor
// mode): y = pool?(relu(x * W + b)), W [out, in, k, k]. Local reparameterization draws noise for each example, filter
// and position.
#pragma once
#include "layers/layer.h"

namespace baton {

enum class Pooling { none, max2, max3 };

class Conv2d : public Linear {
 public:
  // Adds `name`.weight [out, in, k, k] and `name`.bias [out]. The input has `in` channels of height x width.
  Conv2d(ParameterLayout&, const std::string& name, int in, int height, int width, int out, int kernel, int pad,
         Pooling pooling, uint32_t stream_id);
  ConvShape shape(int batch) const override;
  int out_channels() const { return geometry_.out_channels; }
  int out_height() const { return pooled() ? planes_.pooled_h() : planes_.h; }
  int out_width() const { return pooled() ? planes_.pooled_w() : planes_.w; }

  std::unique_ptr<Product> make_product(Device&, Arena&, Rows) const override;
  std::optional<Sampling> sampling(Bias, const Pass&) override;
  void activate(Bias, Rows, const Pass&) override;
  void activate_backward(Rows, const Pass&) override;
  void bias_gradient(float* mean, float* variance, size_t stride, Rows) override;
  BiasParts bias_parts(Rows) const override;
  void take_moment_buffers(const LayerContext&) override;
  void add_moments(const Moments&, const DrawnPass&, const Activation& x, const Pass&) override;
  void take_square_buffers(const LayerContext&) override;
  void add_squares(float* squares, const Activation& x) override;

 protected:
  void take_buffers(const LayerContext&, bool noisy, bool squares) override;

 private:
  bool pooled() const { return pooling_ != Pooling::none; }
  ConvPlanes planes(Rows) const;
  ConvShape geometry_;
  ConvPlanes planes_{};
  Pooling pooling_;
  uint8_t* which_ = nullptr;  // pooled: each window's winner, and its slope
  float* slope_ = nullptr;
  float* sums_ = nullptr;       // of the pre-activations' gradients over each plane
  float* gradients_ = nullptr;  // of draws for their moments, or of single examples for their squares
  std::unique_ptr<Product> draw_product_, example_product_;
  // Where tensor cores multiply: the gradients of all draws at once.
  ProductJobs moment_jobs_;
  std::unique_ptr<LayerProduct> moment_product_;
};

}  // namespace baton
