#include "layers/dense.h"

#include "kernels/squares.h"

namespace baton {

Dense::Dense(ParameterLayout& layout, const std::string& name, int in, int out, bool relu, uint32_t stream_id)
    : in_(in), out_(out), relu_(relu), stream_id_(stream_id) {
  weight_ = layout.add(name + ".weight", {out, in}, in, false);
  bias_ = layout.add(name + ".bias", {out}, in, true);
  weight_at_ = layout[weight_].offset;
  bias_at_ = layout[bias_].offset;
}

void Dense::prepare(const LayerContext& c, bool feeds_layer) {
  shape_ = {c.replicas, c.batch, out_};
  sampled_ = c.sampled;
  drawn_ = c.draws == Draws::means;
  rows_ = rows_of(c, drawn_);
  y_ = take_activation(c, out_, feeds_layer && c.sampled, c.training);
  if (c.sampled) v_ = c.arena.take<float>(y_.stride * c.replicas);
  if (c.sampled && c.training) dv_ = feeds_layer ? y_.signal.grad_square : c.arena.take<float>(y_.stride * c.replicas);
  if (c.moments) bias_gradients_ = c.arena.take<float>(size_t(out_) * c.replicas);
  if (c.training && !c.sampled && c.replicas == 1) {
    squared_gradient_ = c.arena.take<float>(y_.stride);
    squared_input_ = c.arena.take<float>(size_t(in_) * c.batch);
  }
}

// m = x mu^T, v = x^2 (sigma^2)^T, then bias, noise and ReLU in one pass.
void Dense::forward(Device& device, WeightsView w, const Activation& x, const StepState* states) {
  BATON_RANGE("dense forward");
  const Matrices weight =
      drawn_ ? Matrices{w.draw + weight_at_, w.draw_stride} : Matrices{w.mean + weight_at_, w.stride};
  const size_t cut = rows_.rows / shape_.replicas;  // groups
  gemm(device, false, true, rows_.batch, out_, in_, {x.signal.value, x.stride / cut}, weight, 0.f,
       {y_.signal.value, y_.stride / cut}, rows_.rows);
  if (sampled_)
    gemm(device, false, true, shape_.batch, out_, in_, {x.signal.square, x.stride}, {w.variance + weight_at_, w.stride},
         0.f, {v_, y_.stride}, shape_.replicas);
  dense_sample(y_.signal, y_.signal.value, v_,
               {w.mean + bias_at_, sampled_ ? w.variance + bias_at_ : nullptr, w.stride}, shape_, relu_, states,
               stream_id_, device.stream());
}

// dmu = dm^T x, d(sigma^2) = dv^T x^2; dL/dx through the mean = dm mu, dL/d(x^2) = dv sigma^2.
void Dense::backward(Device& device, WeightsView w, GradientsView g, const Activation& x, const StepState* states) {
  BATON_RANGE("dense backward");
  float* dm = y_.signal.grad;
  dense_sample_backward(dm, dv_, y_.signal, v_, shape_, relu_, states, stream_id_, device.stream());
  const int batch = shape_.batch, replicas = shape_.replicas;
  const size_t cut = rows_.rows / replicas;
  const Matrices weight =
      drawn_ ? Matrices{w.draw + weight_at_, w.draw_stride} : Matrices{w.mean + weight_at_, w.stride};
  if (g.squares) {  // an example's gradient is dm x^T: its square is dm^2 (x^2)^T, and a product sums it over examples
    square(squared_gradient_, dm, y_.stride, device.stream());
    square(squared_input_, x.signal.value, size_t(in_) * batch, device.stream());
    gemm(device, true, false, out_, in_, batch, {squared_gradient_, 0}, {squared_input_, 0}, 1.f,
         {g.squares + weight_at_, 0}, 1);
    accumulate_rows(g.squares + bias_at_, squared_gradient_, batch, out_, device.stream());
  } else if (g.moments.sum) {
    dense_bias_gradient(bias_gradients_, nullptr, out_, dm, nullptr, shape_, device.stream());
    accumulate_moments(g.moments, bias_gradients_, out_, int(bias_at_), out_, g.pass, states, device.stream());
    accumulate_product_moments(device, g.moments, int(weight_at_), out_, in_, batch, {dm, y_.stride},
                               {x.signal.value, x.stride}, g.pass, states);
  } else {
    dense_bias_gradient(g.mean + bias_at_, sampled_ ? g.variance + bias_at_ : nullptr, g.stride, dm,
                        sampled_ ? dv_ : nullptr, shape_, device.stream());
    gemm(device, true, false, out_, in_, rows_.batch, {dm, y_.stride / cut}, {x.signal.value, x.stride / cut}, 0.f,
         drawn_ ? MutableMatrices{g.draw + weight_at_, g.draw_stride} : MutableMatrices{g.mean + weight_at_, g.stride},
         rows_.rows);
  }
  if (x.signal.grad)
    gemm(device, false, false, rows_.batch, in_, out_, {dm, y_.stride / cut}, weight, 0.f,
         {x.signal.grad, x.stride / cut}, rows_.rows);
  if (!sampled_) return;
  gemm(device, true, false, out_, in_, batch, {dv_, y_.stride}, {x.signal.square, x.stride}, 0.f,
       {g.variance + weight_at_, g.stride}, replicas);
  if (x.signal.grad_square)
    gemm(device, false, false, batch, in_, out_, {dv_, y_.stride}, {w.variance + weight_at_, w.stride}, 0.f,
         {x.signal.grad_square, x.stride}, replicas);
}

}  // namespace baton
