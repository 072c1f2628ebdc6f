#include "layers/dense.h"

#include "kernels/squares.h"

namespace baton {

namespace {

class DenseProduct : public Product {
 public:
  DenseProduct(int in, int out, Rows rows) : in_(in), out_(out), rows_(rows) {}
  void forward(Device& device, Matrices x, Matrices w, MutableMatrices y) const override {
    gemm(device, false, true, rows_.batch, out_, in_, x, w, 0.f, y, rows_.count);
  }
  void backward_data(Device& device, Matrices dy, Matrices w, MutableMatrices dx) const override {
    gemm(device, false, false, rows_.batch, in_, out_, dy, w, 0.f, dx, rows_.count);
  }
  void backward_weights(Device& device, Matrices x, Matrices dy, MutableMatrices dw) const override {
    gemm(device, true, false, out_, in_, rows_.batch, dy, x, 0.f, dw, rows_.count);
  }

 private:
  int in_, out_;
  Rows rows_;
};

}  // namespace

Dense::Dense(ParameterLayout& layout, const std::string& name, int in, int out, bool relu, uint32_t stream_id)
    : Linear(layout, name, {out, in}, in, stream_id), in_(in), out_(out), relu_(relu) {}

std::unique_ptr<Product> Dense::make_product(Device&, Arena&, Rows rows) const {
  return std::make_unique<DenseProduct>(in_, out_, rows);
}

// The means of the pre-activations are activated in place, and their gradients are the output's.
void Dense::take_buffers(const LayerContext& c, bool noisy, bool squares) {
  batch_ = c.batch;
  y_ = take_activation(c, out_, squares, c.training);
  pre_stride_ = y_.stride;
  m_ = y_.signal.value;
  dm_ = y_.signal.grad;
  if (noisy) v_ = c.arena.take<float>(y_.stride * c.rows);
  if (noisy && c.training)
    dv_ = y_.signal.grad_square ? y_.signal.grad_square : c.arena.take<float>(y_.stride * c.rows);
}

// Nobody multiplies the network's outputs: they are not rounded.
Signal Dense::written() const {
  Signal out = y_.signal;
  out.rounded &= relu_;
  return out;
}

std::optional<Sampling> Dense::sampling(Bias bias, const Pass& pass) {
  return Sampling{written(), m_, v_, nullptr, nullptr, bias, pass.states, stream_id_, relu_, false};
}

void Dense::activate(Bias bias, Rows rows, const Pass& pass) {
  dense_sample(written(), m_, v_, bias, shape(rows), relu_, pass.states, stream_id_, device().stream());
}

void Dense::activate_backward(Rows rows, const Pass& pass) {
  dense_sample_backward(dm_, dv_, y_.signal, v_, shape(rows), relu_, pass.states, stream_id_, device().stream());
}

void Dense::bias_gradient(float* mean, float* variance, size_t stride, Rows rows) {
  dense_bias_gradient(mean, variance, stride, dm_, variance ? dv_ : nullptr, shape(rows), device().stream());
}

Linear::BiasParts Dense::bias_parts(Rows rows) const {
  const size_t row = size_t(rows.batch) * out_;
  return {{dm_, row}, {dv_, row}, rows.batch};
}

void Dense::add_moments(const Moments& moments, const DrawnPass& draws, const Activation& x, const Pass& pass) {
  accumulate_product_moments(device(), moments, int(weight_at()), out_, in_, batch_, {dm_, pre_stride_},
                             {x.signal.value, x.stride}, draws, pass.states);
}

void Dense::take_square_buffers(const LayerContext& c) {
  squared_gradient_ = c.arena.take<float>(size_t(out_) * c.batch);
  squared_input_ = c.arena.take<float>(size_t(in_) * c.batch);
}

// An example's gradient is dm x^T: its square is dm^2 (x^2)^T, and a product sums it over the examples.
void Dense::add_squares(float* squares, const Activation& x) {
  square(squared_gradient_, dm_, size_t(out_) * batch_, device().stream());
  square(squared_input_, x.signal.value, size_t(in_) * batch_, device().stream());
  gemm(device(), true, false, out_, in_, batch_, {squared_gradient_, 0}, {squared_input_, 0}, 1.f,
       {squares + weight_at(), 0}, 1);
  accumulate_rows(squares + bias_at(), squared_gradient_, batch_, out_, device().stream());
}

}  // namespace baton
