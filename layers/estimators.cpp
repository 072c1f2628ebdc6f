#include "layers/estimators.h"

namespace baton {

namespace {

// From x to the pre-activations y. A row is split where groups of its examples have weights of their own.
void multiply(const Product& product, const Linear& layer, const float* x, size_t stride, const RowWeights& w,
              float* y) {
  product.forward(layer.device(), {x, stride / w.groups}, {w.weights + layer.weight_at(), w.stride},
                  {y, layer.pre_stride() / w.groups});
}

// From the gradients dy of the pre-activations to those of the weights, where they are wanted, and of x, where dx is
// not null.
void multiply_back(const Product& product, const Linear& layer, const float* x, size_t stride, const RowWeights& w,
                   const float* dy, float* dx) {
  const Matrices d{dy, layer.pre_stride() / w.groups};
  if (w.gradients)
    product.backward_weights(layer.device(), {x, stride / w.groups}, d, {w.gradients + layer.weight_at(), w.stride});
  if (dx) product.backward_data(layer.device(), d, {w.weights + layer.weight_at(), w.stride}, {dx, stride / w.groups});
}

}  // namespace

// ------------------------------------------------------------------------------------------------- given weights
PointEstimator::PointEstimator(const Linear& layer, const LayerContext& c, const RowWeights& w)
    : w_(w), rows_(split_rows(c, w.groups)), product_(layer.make_product(c.device, c.arena, rows_)) {}

void PointEstimator::forward(Linear& layer, const Activation& x, const Pass& pass) {
  multiply(*product_, layer, x.signal.value, x.stride, w_, layer.mean());
  layer.activate({w_.weights + layer.bias_at(), nullptr, w_.stride}, rows_, pass);
}

void PointEstimator::backward(Linear& layer, const Activation& x, const Pass& pass) {
  layer.activate_backward(rows_, pass);
  add_gradients(layer, x, pass);
  multiply_back(*product_, layer, x.signal.value, x.stride, w_, layer.mean_gradient(), x.signal.grad);
}

void PointEstimator::add_gradients(Linear& layer, const Activation&, const Pass&) {
  layer.bias_gradient(w_.gradients + layer.bias_at(), nullptr, w_.stride, rows_);
}

// ------------------------------------------------------------------------------------------------- Gaussian weights
LocalReparameterization::LocalReparameterization(const Linear& layer, const LayerContext& c, const GaussianWeights& w,
                                                 const RowWeights& means)
    : w_(w),
      means_(means),
      rows_{c.rows, c.batch},
      mean_product_(layer.make_product(c.device, c.arena, split_rows(c, means.groups))),
      variance_product_(means.groups > 1 ? layer.make_product(c.device, c.arena, rows_) : mean_product_) {}

void LocalReparameterization::forward(Linear& layer, const Activation& x, const Pass& pass) {
  multiply(*mean_product_, layer, x.signal.value, x.stride, means_, layer.mean());
  variance_forward(layer, x);
  layer.activate({w_.mean + layer.bias_at(), w_.variance + layer.bias_at(), w_.stride}, rows_, pass);
}

void LocalReparameterization::backward(Linear& layer, const Activation& x, const Pass& pass) {
  layer.activate_backward(rows_, pass);
  layer.bias_gradient(w_.mean_gradient + layer.bias_at(), w_.variance_gradient + layer.bias_at(), w_.stride, rows_);
  multiply_back(*mean_product_, layer, x.signal.value, x.stride, means_, layer.mean_gradient(), x.signal.grad);
  variance_backward(layer, x);
}

void LocalReparameterization::variance_forward(Linear& layer, const Activation& x) {
  multiply(*variance_product_, layer, x.signal.square, x.stride, {w_.variance, nullptr, w_.stride}, layer.variance());
}

void LocalReparameterization::variance_backward(Linear& layer, const Activation& x) {
  multiply_back(*variance_product_, layer, x.signal.square, x.stride, {w_.variance, w_.variance_gradient, w_.stride},
                layer.variance_gradient(), x.signal.grad_square);
}

ChannelMoments::ChannelMoments(const Linear& layer, const LayerContext& c, const GaussianWeights& w,
                               const RowWeights& factors, const ConvShape& shape)
    : LocalReparameterization(layer, c, w, {w.mean, w.mean_gradient, w.stride}),
      factors_(factors),
      moments_(c.device, c.arena, shape, c.rows) {}

void ChannelMoments::variance_forward(Linear& layer, const Activation& x) {
  moments_.forward(layer.device(), {x.signal.value, x.stride}, factors_.weights, factors_.stride,
                   {layer.variance(), layer.pre_stride()});
}

void ChannelMoments::variance_backward(Linear& layer, const Activation& x) {
  moments_.backward(layer.device(), {x.signal.value, x.stride}, factors_.weights, factors_.stride,
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
