#include "layers/conv2d.h"

namespace baton {

Conv2d::Conv2d(ParameterLayout& layout, const std::string& name, int in, int height, int width, int out, int kernel,
               int pad, Pooling pooling, uint32_t stream_id)
    : geometry_{1, in, height, width, out, kernel, pad}, pooling_(pooling), stream_id_(stream_id) {
  const int fan_in = in * kernel * kernel;
  weight_at_ = layout[layout.add(name + ".weight", {out, in, kernel, kernel}, fan_in, false)].offset;
  bias_at_ = layout[layout.add(name + ".bias", {out}, fan_in, true)].offset;
  planes_ = {1, 1, out, geometry_.out_height(), geometry_.out_width()};
}

void Conv2d::prepare(const LayerContext& c) {
  geometry_.batch = c.batch;
  planes_.replicas = c.replicas;
  planes_.batch = c.batch;
  sampled_ = c.sampled;
  convolution_.emplace(c.device, c.arena, geometry_, c.replicas);
  pre_stride_ = geometry_.output_size();
  const size_t pre = pre_stride_ * c.replicas;
  if (pooling_ == Pooling::max2) {
    y_ = take_activation(c, size_t(planes_.channels) * planes_.pooled_h() * planes_.pooled_w(), c.sampled, c.training);
    m_ = c.arena.take<float>(pre);
    if (c.training) which_ = c.arena.take<uint8_t>(y_.stride * c.replicas);
    if (c.training && c.sampled) slope_ = c.arena.take<float>(y_.stride * c.replicas);
  } else {
    y_ = take_activation(c, size_t(planes_.channels) * planes_.h * planes_.w, c.sampled, c.training);
    m_ = y_.signal.value;  // activated in place
  }
  if (c.sampled) v_ = c.arena.take<float>(pre);
  if (c.training) sums_ = c.arena.take<float>(size_t(2) * c.replicas * c.batch * planes_.channels);
}

// m = x * mu, v = x^2 * sigma^2, then bias, noise, ReLU and pooling in one pass.
void Conv2d::forward(Device& device, WeightsView w, const Activation& x, const StepState* states) {
  BATON_RANGE("conv forward");
  convolution_->forward(device, {x.signal.value, x.stride}, {w.mean + weight_at_, w.stride}, {m_, pre_stride_});
  if (sampled_)
    convolution_->forward(device, {x.signal.square, x.stride}, {w.variance + weight_at_, w.stride}, {v_, pre_stride_});
  const Bias bias{w.mean + bias_at_, sampled_ ? w.variance + bias_at_ : nullptr, w.stride};
  if (pooling_ == Pooling::max2)
    conv_sample_pool(y_.signal, which_, slope_, m_, v_, bias, planes_, states, stream_id_, device.stream());
  else conv_sample(y_.signal, m_, v_, bias, planes_, true, states, stream_id_, device.stream());
}

// dmu = corr(x, dm), d(sigma^2) = corr(x^2, dv); dL/dx through the mean = dm *^T mu, dL/d(x^2) = dv *^T sigma^2.
void Conv2d::backward(Device& device, WeightsView w, GradientsView g, const Activation& x, const StepState* states) {
  BATON_RANGE("conv backward");
  float *dm, *dv;
  if (pooling_ == Pooling::max2) {  // the pre-activations are done with: their gradients take their place
    dm = m_, dv = v_;
    conv_sample_pool_backward(dm, dv, sums_, y_.signal, which_, slope_, planes_, device.stream());
  } else {
    dm = y_.signal.grad, dv = y_.signal.grad_square;
    conv_sample_backward(dm, dv, sums_, y_.signal, v_, planes_, true, states, stream_id_, device.stream());
  }
  conv_bias_gradient(g.mean + bias_at_, sampled_ ? g.variance + bias_at_ : nullptr, g.stride, sums_, planes_,
                     device.stream());
  convolution_->backward_weights(device, {x.signal.value, x.stride}, {dm, pre_stride_},
                                 {g.mean + weight_at_, g.stride});
  if (x.signal.grad)
    convolution_->backward_data(device, {dm, pre_stride_}, {w.mean + weight_at_, w.stride}, {x.signal.grad, x.stride});
  if (!sampled_) return;
  convolution_->backward_weights(device, {x.signal.square, x.stride}, {dv, pre_stride_},
                                 {g.variance + weight_at_, g.stride});
  if (x.signal.grad_square)
    convolution_->backward_data(device, {dv, pre_stride_}, {w.variance + weight_at_, w.stride},
                                {x.signal.grad_square, x.stride});
}

}  // namespace baton
