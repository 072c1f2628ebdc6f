#include "layers/estimators.h"

namespace baton {

// ------------------------------------------------------------------------------------------------- given weights
PointEstimator::PointEstimator(const Linear& layer, const LayerContext& c, const RowWeights& w)
    : w_(w), rows_(split_rows(c, w.groups)), product_(layer.make_product(c.device, c.arena, rows_)) {}

void PointEstimator::forward(Linear& layer, const Activation& x, const Pass& pass) {
  product_->forward(layer.device(), {x.signal.value, x.stride / w_.groups}, {w_.weights + layer.weight_at(), w_.stride},
                    {layer.mean(), layer.pre_stride() / w_.groups});
  layer.activate({w_.weights + layer.bias_at(), nullptr, w_.stride}, rows_, pass);
}

void PointEstimator::backward(Linear& layer, const Activation& x, const Pass& pass) {
  layer.activate_backward(rows_, pass);
  write_gradients(layer, x, pass);
  if (x.signal.grad)
    product_->backward_data(layer.device(), {layer.mean_gradient(), layer.pre_stride() / w_.groups},
                            {w_.weights + layer.weight_at(), w_.stride}, {x.signal.grad, x.stride / w_.groups});
}

void PointEstimator::write_gradients(Linear& layer, const Activation& x, const Pass&) {
  layer.bias_gradient(w_.gradients + layer.bias_at(), nullptr, w_.stride, rows_);
  product_->backward_weights(layer.device(), {x.signal.value, x.stride / w_.groups},
                             {layer.mean_gradient(), layer.pre_stride() / w_.groups},
                             {w_.gradients + layer.weight_at(), w_.stride});
}

MomentsEstimator::MomentsEstimator(Linear& layer, const LayerContext& c, const float* draws, size_t stride,
                                   const Moments& moments)
    : PointEstimator(layer, c, {draws, nullptr, stride}), moments_(moments) {
  layer.take_moment_buffers(c);
}

void MomentsEstimator::write_gradients(Linear& layer, const Activation& x, const Pass& pass) {
  layer.add_moments(moments_, {pass.first_draw, rows_.count, pass.first_draw > 0}, x, pass);
}

SquaresEstimator::SquaresEstimator(Linear& layer, const LayerContext& c, const float* weights, float* squares)
    : PointEstimator(layer, c, {weights, nullptr, 0}), squares_(squares) {
  layer.take_square_buffers(c);
}

void SquaresEstimator::write_gradients(Linear& layer, const Activation& x, const Pass&) {
  layer.add_squares(squares_, x);
}

// ------------------------------------------------------------------------------------------------- Gaussian weights
LocalReparameterization::LocalReparameterization(const Linear& layer, const LayerContext& c, const GaussianWeights& w,
                                                 const RowWeights& means)
    : w_(w),
      means_(means),
      rows_{c.rows, c.batch},
      mean_product_(layer.make_product(c.device, c.arena, split_rows(c, means.groups))),
      variance_product_(means.groups > 1 ? layer.make_product(c.device, c.arena, rows_) : nullptr) {}

void LocalReparameterization::forward(Linear& layer, const Activation& x, const Pass& pass) {
  mean_product_->forward(layer.device(), {x.signal.value, x.stride / means_.groups},
                         {means_.weights + layer.weight_at(), means_.stride},
                         {layer.mean(), layer.pre_stride() / means_.groups});
  variance_forward(layer, x);
  layer.activate({w_.mean + layer.bias_at(), w_.variance + layer.bias_at(), w_.stride}, rows_, pass);
}

void LocalReparameterization::backward(Linear& layer, const Activation& x, const Pass& pass) {
  layer.activate_backward(rows_, pass);
  layer.bias_gradient(w_.mean_gradient + layer.bias_at(), w_.variance_gradient + layer.bias_at(), w_.stride, rows_);
  const Matrices dm{layer.mean_gradient(), layer.pre_stride() / means_.groups};
  mean_product_->backward_weights(layer.device(), {x.signal.value, x.stride / means_.groups}, dm,
                                  {means_.gradients + layer.weight_at(), means_.stride});
  if (x.signal.grad)
    mean_product_->backward_data(layer.device(), dm, {means_.weights + layer.weight_at(), means_.stride},
                                 {x.signal.grad, x.stride / means_.groups});
  variance_backward(layer, x);
}

void LocalReparameterization::variance_forward(Linear& layer, const Activation& x) {
  const Product& product = variance_product_ ? *variance_product_ : *mean_product_;
  product.forward(layer.device(), {x.signal.square, x.stride}, {w_.variance + layer.weight_at(), w_.stride},
                  {layer.variance(), layer.pre_stride()});
}

void LocalReparameterization::variance_backward(Linear& layer, const Activation& x) {
  const Product& product = variance_product_ ? *variance_product_ : *mean_product_;
  const Matrices dv{layer.variance_gradient(), layer.pre_stride()};
  product.backward_weights(layer.device(), {x.signal.square, x.stride}, dv,
                           {w_.variance_gradient + layer.weight_at(), w_.stride});
  if (x.signal.grad_square)
    product.backward_data(layer.device(), dv, {w_.variance + layer.weight_at(), w_.stride},
                          {x.signal.grad_square, x.stride});
}

ChannelMoments::ChannelMoments(const Linear& layer, const LayerContext& c, const GaussianWeights& w,
                               const FactorWeights& factors, size_t factor_at, const ConvShape& shape)
    : LocalReparameterization(layer, c, w, {w.mean, w.mean_gradient, w.stride}),
      factors_{factors.factors + factor_at, factors.gradients + factor_at, factors.stride},
      moments_(c.device, c.arena, shape, c.rows) {}

void ChannelMoments::variance_forward(Linear& layer, const Activation& x) {
  moments_.forward(layer.device(), {x.signal.value, x.stride}, factors_.factors, factors_.stride,
                   {layer.variance(), layer.pre_stride()});
}

void ChannelMoments::variance_backward(Linear& layer, const Activation& x) {
  moments_.backward(layer.device(), {x.signal.value, x.stride}, factors_.factors, factors_.stride,
                    {layer.variance_gradient(), layer.pre_stride()}, {x.signal.grad, x.stride}, factors_.gradients,
                    factors_.stride);
  if (x.signal.grad_square)
    fill_zero(layer.device(), x.signal.grad_square, sizeof(float) * x.stride * size_t(rows_.count));
}

std::unique_ptr<Estimator> PointWeights::make_estimator(Linear& layer, const LayerContext& c) {
  if (squares_) return std::make_unique<SquaresEstimator>(layer, c, weights_, squares_);
  return std::make_unique<PointEstimator>(layer, c, RowWeights{weights_, nullptr, stride_});
}

}  // namespace baton
