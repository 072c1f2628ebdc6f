#include "layers/conv2d.h"

#include "kernels/squares.h"

namespace baton {

Conv2d::Conv2d(ParameterLayout& layout, const std::string& name, int in, int height, int width, int out, int kernel,
               int pad, Pooling pooling, uint32_t stream_id)
    : geometry_{1, in, height, width, out, kernel, pad}, pooling_(pooling), stream_id_(stream_id) {
  const int fan_in = in * kernel * kernel;
  weight_at_ = layout[layout.add(name + ".weight", {out, in, kernel, kernel}, fan_in, false)].offset;
  const ParameterLayout factors = factor_layout(layout);
  factor_at_ = factors.tensors().back().offset;
  bias_at_ = layout[layout.add(name + ".bias", {out}, fan_in, true)].offset;
  planes_ = {1, 1, out, geometry_.out_height(), geometry_.out_width()};
  if (pooling == Pooling::max3) planes_.window = 3;
}

constexpr int examples_at_once = 8;  // whose gradients are looked at one by one, for their squares

void Conv2d::prepare(const LayerContext& c, bool feeds_sampled) {
  sampled_ = c.convolutions_sampled();
  drawn_ = c.draws != Draws::none;
  rows_ = rows_of(c, drawn_);
  replicas_ = c.replicas;
  // Where the bias is drawn with the weights, what follows the product runs by groups too.
  const Rows after = drawn_ && !sampled_ ? rows_ : Rows{c.replicas, c.batch};
  planes_.replicas = after.rows;
  planes_.batch = after.batch;
  geometry_.batch = c.batch;
  ConvShape by_group = geometry_;
  by_group.batch = rows_.batch;
  mean_product_.emplace(c.device, c.arena, by_group, rows_.rows);
  if (sampled_ && rows_.rows != c.replicas) variance_product_.emplace(c.device, c.arena, geometry_, c.replicas);
  pre_stride_ = geometry_.output_size();
  const size_t pre = pre_stride_ * c.replicas;
  y_ = take_activation(c, size_t(planes_.channels) * out_height() * out_width(), feeds_sampled, c.training);
  if (pooled()) {
    m_ = c.arena.take<float>(pre);
    if (c.training) which_ = c.arena.take<uint8_t>(y_.stride * c.replicas);
    if (c.training && sampled_) slope_ = c.arena.take<float>(y_.stride * c.replicas);
  } else {
    m_ = y_.signal.value;  // activated in place
    if (c.training && sampled_)
      dv_ = y_.signal.grad_square ? y_.signal.grad_square : c.arena.take<float>(y_.stride * c.replicas);
  }
  if (sampled_) v_ = c.arena.take<float>(pre);
  if (c.channel_moments) moments_.emplace(c.device, c.arena, geometry_, c.replicas);
  if (c.training) sums_ = c.arena.take<float>(size_t(2) * c.replicas * c.batch * planes_.channels);
  if (c.moments) {
    draw_product_.emplace(c.device, c.arena, geometry_, 1);
    gradients_ = c.arena.take<float>(geometry_.weight_size());
    bias_gradients_ = c.arena.take<float>(size_t(planes_.channels) * c.replicas);
  } else if (c.training && !c.sampled && c.replicas == 1 && c.batch % examples_at_once == 0) {
    ConvShape one = geometry_;
    one.batch = 1;
    example_product_.emplace(c.device, c.arena, one, examples_at_once);
    gradients_ = c.arena.take<float>(one.weight_size() * examples_at_once);
  }
}

// m = x * mu, v = x^2 * sigma^2, then bias, noise, ReLU and pooling in one pass.
void Conv2d::forward(Device& device, WeightsView w, const Activation& x, const StepState* states) {
  BATON_RANGE("conv forward");
  const size_t cut = rows_.rows / replicas_;  // groups
  const Matrices weight =
      drawn_ ? Matrices{w.draw + weight_at_, w.draw_stride} : Matrices{w.mean + weight_at_, w.stride};
  mean_product_->forward(device, {x.signal.value, x.stride / cut}, weight, {m_, pre_stride_ / cut});
  if (moments_)
    moments_->forward(device, {x.signal.value, x.stride}, w.factor + factor_at_, w.factor_stride, {v_, pre_stride_});
  else if (sampled_)
    (variance_product_ ? *variance_product_ : *mean_product_)
        .forward(device, {x.signal.square, x.stride}, {w.variance + weight_at_, w.stride}, {v_, pre_stride_});
  Bias bias{w.mean + bias_at_, sampled_ ? w.variance + bias_at_ : nullptr, w.stride};
  if (drawn_ && !sampled_) bias = {w.draw + bias_at_, nullptr, w.draw_stride};
  if (pooled()) conv_sample_pool(y_.signal, which_, slope_, m_, v_, bias, planes_, states, stream_id_, device.stream());
  else conv_sample(y_.signal, m_, v_, bias, planes_, true, states, stream_id_, device.stream());
}

// dmu = corr(x, dm), d(sigma^2) = corr(x^2, dv); dL/dx through the mean = dm *^T mu, dL/d(x^2) = dv *^T sigma^2.
void Conv2d::backward(Device& device, WeightsView w, GradientsView g, const Activation& x, const StepState* states) {
  BATON_RANGE("conv backward");
  const size_t cut = rows_.rows / replicas_;
  const Matrices weight =
      drawn_ ? Matrices{w.draw + weight_at_, w.draw_stride} : Matrices{w.mean + weight_at_, w.stride};
  float *dm, *dv;
  if (pooled()) {  // the pre-activations are done with: their gradients take their place
    dm = m_, dv = v_;
    conv_sample_pool_backward(dm, dv, sums_, y_.signal, which_, slope_, planes_, device.stream());
  } else {
    dm = y_.signal.grad, dv = dv_;
    conv_sample_backward(dm, dv, sums_, y_.signal, v_, planes_, true, states, stream_id_, device.stream());
  }
  if (g.squares) {
    add_squares(device, g, x, dm);
  } else if (g.moments.sum) {
    add_moments(device, g, x, dm, states);
  } else if (drawn_ && !sampled_) {
    conv_bias_gradient(g.draw + bias_at_, nullptr, g.draw_stride, sums_, planes_, device.stream());
  } else {
    conv_bias_gradient(g.mean + bias_at_, sampled_ ? g.variance + bias_at_ : nullptr, g.stride, sums_, planes_,
                       device.stream());
  }
  if (!g.squares && !g.moments.sum)
    mean_product_->backward_weights(
        device, {x.signal.value, x.stride / cut}, {dm, pre_stride_ / cut},
        drawn_ ? MutableMatrices{g.draw + weight_at_, g.draw_stride} : MutableMatrices{g.mean + weight_at_, g.stride});
  if (x.signal.grad)
    mean_product_->backward_data(device, {dm, pre_stride_ / cut}, weight, {x.signal.grad, x.stride / cut});
  if (!sampled_) return;
  if (moments_) {
    moments_->backward(device, {x.signal.value, x.stride}, w.factor + factor_at_, w.factor_stride, {dv, pre_stride_},
                       {x.signal.grad, x.stride}, g.factor + factor_at_, w.factor_stride);
    if (x.signal.grad_square) fill_zero(device, x.signal.grad_square, sizeof(float) * x.stride * replicas_);
    return;
  }
  const Convolution& product = variance_product_ ? *variance_product_ : *mean_product_;
  product.backward_weights(device, {x.signal.square, x.stride}, {dv, pre_stride_}, {g.variance + weight_at_, g.stride});
  if (x.signal.grad_square)
    product.backward_data(device, {dv, pre_stride_}, {w.variance + weight_at_, w.stride},
                          {x.signal.grad_square, x.stride});
}

// One draw's gradient at a time: it is folded into the moments before the next one takes its place.
void Conv2d::add_moments(Device& device, GradientsView g, const Activation& x, const float* dm,
                         const StepState* states) {
  const size_t weights = geometry_.weight_size();
  for (int k = 0; k < g.pass.draws; k++) {
    draw_product_->backward_weights(device, {x.signal.value + x.stride * k, 0}, {dm + pre_stride_ * k, 0},
                                    {gradients_, 0});
    accumulate_moments(g.moments, gradients_, weights, int(weight_at_), int(weights),
                       {g.pass.first_draw + k, 1, g.pass.add || k > 0}, states, device.stream());
  }
  conv_bias_gradient(bias_gradients_, nullptr, planes_.channels, sums_, planes_, device.stream());
  accumulate_moments(g.moments, bias_gradients_, planes_.channels, int(bias_at_), planes_.channels, g.pass, states,
                     device.stream());
}

// An example's gradient is a sum over positions, so it must exist before it is squared: a few examples at a time run as
// replicas of a batch of one.
void Conv2d::add_squares(Device& device, GradientsView g, const Activation& x, const float* dm) {
  if (!example_product_)
    throw InputError("squares of single examples' gradients need one replica and a batch that " +
                     std::to_string(examples_at_once) + " divides, not " + std::to_string(geometry_.batch));
  const size_t weights = geometry_.weight_size(), pre = pre_stride_ / geometry_.batch;
  for (int b = 0; b < geometry_.batch; b += examples_at_once) {
    example_product_->backward_weights(device, {x.signal.value + b * x.size, x.size}, {dm + b * pre, pre},
                                       {gradients_, weights});
    accumulate_squared_rows(g.squares + weight_at_, gradients_, examples_at_once, int(weights), device.stream());
  }
  accumulate_squared_rows(g.squares + bias_at_, sums_, geometry_.batch, planes_.channels, device.stream());
}

}  // namespace baton
