#include "layers/conv2d.h"

#include "kernels/squares.h"

namespace baton {

namespace {

constexpr int examples_at_once = 8;  // whose gradients are looked at one by one, for their squares

class ConvProduct : public Product {
 public:
  ConvProduct(Device& device, Arena& arena, const ConvShape& shape, int rows)
      : convolution_(device, arena, shape, rows) {}
  void forward(Device& device, Matrices x, Matrices w, MutableMatrices y) const override {
    convolution_.forward(device, x, w, y);
  }
  void backward_data(Device& device, Matrices dy, Matrices w, MutableMatrices dx) const override {
    convolution_.backward_data(device, dy, w, dx);
  }
  void backward_weights(Device& device, Matrices x, Matrices dy, MutableMatrices dw) const override {
    convolution_.backward_weights(device, x, dy, dw);
  }

 private:
  Convolution convolution_;
};

}  // namespace

Conv2d::Conv2d(ParameterLayout& layout, const std::string& name, int in, int height, int width, int out, int kernel,
               int pad, Pooling pooling, uint32_t stream_id)
    : Linear(layout, name, {out, in, kernel, kernel}, in * kernel * kernel, stream_id),
      geometry_{1, in, height, width, out, kernel, pad},
      pooling_(pooling) {
  planes_ = {1, 1, out, geometry_.out_height(), geometry_.out_width()};
  if (pooling == Pooling::max3) planes_.window = 3;
}

ConvShape Conv2d::shape(int batch) const {
  ConvShape s = geometry_;
  s.batch = batch;
  return s;
}

ConvPlanes Conv2d::planes(Rows rows) const {
  return {rows.count, rows.batch, planes_.channels, planes_.h, planes_.w, planes_.window};
}

std::unique_ptr<Product> Conv2d::make_product(Device& device, Arena& arena, Rows rows) const {
  return std::make_unique<ConvProduct>(device, arena, shape(rows.batch), rows.count);
}

// Without pooling the pre-activations are activated in place; with it their gradients take their own place, once they
// are done with.
void Conv2d::take_buffers(const LayerContext& c, bool noisy, bool squares) {
  geometry_.batch = c.batch;
  pre_stride_ = geometry_.output_size();
  const size_t pre = pre_stride_ * c.rows;
  y_ = take_activation(c, size_t(planes_.channels) * out_height() * out_width(), squares, c.training);
  if (noisy) v_ = c.arena.take<float>(pre);
  if (pooled()) {
    m_ = c.arena.take<float>(pre);
    dm_ = m_, dv_ = v_;
    if (c.training) which_ = c.arena.take<uint8_t>(y_.stride * c.rows);
    if (c.training && noisy) slope_ = c.arena.take<float>(y_.stride * c.rows);
  } else {
    m_ = y_.signal.value;
    dm_ = y_.signal.grad;
    if (c.training && noisy)
      dv_ = y_.signal.grad_square ? y_.signal.grad_square : c.arena.take<float>(y_.stride * c.rows);
  }
  if (c.training) sums_ = c.arena.take<float>(size_t(2) * c.rows * c.batch * planes_.channels);
}

// Windows of 3 overlap: they are pooled in a launch of their own.
std::optional<Sampling> Conv2d::sampling(Bias bias, const Pass& pass) {
  if (pooling_ == Pooling::max3) return std::nullopt;
  return Sampling{y_.signal, m_, v_, which_, slope_, bias, pass.states, stream_id_, true, pooled()};
}

void Conv2d::activate(Bias bias, Rows rows, const Pass& pass) {
  if (pooled())
    conv_sample_pool(y_.signal, which_, slope_, m_, v_, bias, planes(rows), pass.states, stream_id_, device().stream());
  else conv_sample(y_.signal, m_, v_, bias, planes(rows), true, pass.states, stream_id_, device().stream());
}

void Conv2d::activate_backward(Rows rows, const Pass& pass) {
  if (pooled()) conv_sample_pool_backward(dm_, dv_, sums_, y_.signal, which_, slope_, planes(rows), device().stream());
  else
    conv_sample_backward(dm_, dv_, sums_, y_.signal, v_, planes(rows), true, pass.states, stream_id_,
                         device().stream());
}

void Conv2d::bias_gradient(float* mean, float* variance, size_t stride, Rows rows) {
  conv_bias_gradient(mean, variance, stride, sums_, planes(rows), device().stream());
}

Linear::BiasParts Conv2d::bias_parts(Rows rows) const {
  const size_t row = size_t(rows.batch) * planes_.channels;
  return {{sums_, row}, {sums_ + row * rows.count, row}, rows.batch};
}

void Conv2d::take_moment_buffers(const LayerContext& c) {
  const size_t weights = geometry_.weight_size();
  if (!c.device.tensor_cores()) {
    draw_product_ = make_product(c.device, c.arena, {1, c.batch});
    gradients_ = c.arena.take<float>(weights);
    return;
  }
  gradients_ = c.arena.take<float>(weights * c.rows);
  moment_product_ =
      std::make_unique<LayerProduct>(c.arena, moment_jobs_, shape(c.batch), c.rows, 1, Matrices{}, Matrices{}, true,
                                     MutableMatrices{gradients_, weights}, MutableMatrices{});
  moment_jobs_.settle(c.device, c.arena);
}

// By the libraries one draw's gradient at a time: it is folded into the moments before the next one takes its place.
void Conv2d::add_moments(const Moments& moments, const DrawnPass& draws, const Activation& x, const Pass& pass) {
  const size_t weights = geometry_.weight_size();
  const Stream stream = device().stream();
  if (moment_product_) {
    moment_product_->backward_weights({x.signal.value, x.stride}, {dm_, pre_stride_}, {}, stream);
    moment_jobs_.add_up(stream);
    accumulate_moments(moments, gradients_, weights, int(weight_at()), int(weights), draws, pass.states, stream);
    return;
  }
  for (int k = 0; k < draws.draws; k++) {
    draw_product_->backward_weights(device(), {x.signal.value + x.stride * k, 0}, {dm_ + pre_stride_ * k, 0},
                                    {gradients_, 0});
    accumulate_moments(moments, gradients_, weights, int(weight_at()), int(weights),
                       {draws.first_draw + k, 1, draws.add || k > 0}, pass.states, stream);
  }
}

void Conv2d::take_square_buffers(const LayerContext& c) {
  if (c.rows != 1 || c.batch % examples_at_once != 0)
    throw InputError("squares of single examples' gradients need one row and a batch that " +
                     std::to_string(examples_at_once) + " divides, not " + std::to_string(c.batch));
  example_product_ = make_product(c.device, c.arena, {examples_at_once, 1});
  gradients_ = c.arena.take<float>(geometry_.weight_size() * examples_at_once);
}

// An example's gradient is a sum over positions, so it must exist before it is squared: a few examples at a time run as
// rows of a batch of one.
void Conv2d::add_squares(float* squares, const Activation& x) {
  const size_t weights = geometry_.weight_size(), pre = pre_stride_ / geometry_.batch;
  for (int b = 0; b < geometry_.batch; b += examples_at_once) {
    example_product_->backward_weights(device(), {x.signal.value + b * x.size, x.size}, {dm_ + b * pre, pre},
                                       {gradients_, weights});
    accumulate_squared_rows(squares + weight_at(), gradients_, examples_at_once, int(weights), device().stream());
  }
  accumulate_squared_rows(squares + bias_at(), sums_, geometry_.batch, planes_.channels, device().stream());
}

}  // namespace baton
