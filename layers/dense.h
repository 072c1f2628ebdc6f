// A dense layer: y = relu?(x W^T + b), W [out, in].
#pragma once
#include "layers/layer.h"

namespace baton {

class Dense : public Linear {
 public:
  // Adds `name`.weight [out, in] and `name`.bias [out] to the layout. stream_id: the layer's noise stream.
  Dense(ParameterLayout&, const std::string& name, int in, int out, bool relu, uint32_t stream_id);

  ConvShape shape(int batch) const override { return {batch, in_, 1, 1, out_, 1, 0}; }
  std::unique_ptr<Product> make_product(Device&, Arena&, Rows) const override;
  std::optional<Sampling> sampling(Bias, const Pass&) override;
  void activate(Bias, Rows, const Pass&) override;
  void activate_backward(Rows, const Pass&) override;
  void bias_gradient(float* mean, float* variance, size_t stride, Rows) override;
  BiasParts bias_parts(Rows) const override;
  void add_moments(const Moments&, const DrawnPass&, const Activation& x, const Pass&) override;
  void take_square_buffers(const LayerContext&) override;
  void add_squares(float* squares, const Activation& x) override;

 protected:
  void take_buffers(const LayerContext&, bool noisy, bool squares) override;

 private:
  Signal written() const;  // by a pass forward
  DenseShape shape(Rows rows) const { return {rows.count, rows.batch, out_}; }
  int in_, out_, batch_ = 0;
  bool relu_;
  float *squared_input_ = nullptr, *squared_gradient_ = nullptr;
};

}  // namespace baton
