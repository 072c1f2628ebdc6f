#include "layers/estimators.h"

namespace baton {

namespace {

// Each group's share of a row, in the same memory.
Matrices of_groups(const float* data, size_t stride, int groups) { return {data, stride / groups}; }
MutableMatrices of_groups(float* data, size_t stride, int groups) { return {data, stride / groups}; }

class LibraryProducts : public RowProducts {
 public:
  LibraryProducts(const Linear& layer, const LayerContext& c, const RowWeights& means, const RowWeights* variances)
      : means_(means), mean_product_(layer.make_product(c.device, c.arena, split_rows(c, means.groups))) {
    if (!variances) return;
    variances_ = *variances;
    variance_product_ = means.groups > 1 ? layer.make_product(c.device, c.arena, {c.rows, c.batch}) : mean_product_;
  }
  void forward(Linear& layer, const Activation& x) override {
    multiply(*mean_product_, layer, x.signal.value, x.stride, means_, layer.mean());
    if (variance_product_) multiply(*variance_product_, layer, x.signal.square, x.stride, variances_, layer.variance());
  }
  void backward(Linear& layer, const Activation& x) override {
    multiply_back(*mean_product_, layer, x.signal.value, x.stride, means_, layer.mean_gradient(), x.signal.grad);
    if (variance_product_)
      multiply_back(*variance_product_, layer, x.signal.square, x.stride, variances_, layer.variance_gradient(),
                    x.signal.grad_square);
  }

 private:
  static void multiply(const Product& product, const Linear& layer, const float* x, size_t stride, const RowWeights& w,
                       float* y) {
    product.forward(layer.device(), of_groups(x, stride, w.groups), {w.weights + layer.weight_at(), w.stride},
                    of_groups(y, layer.pre_stride(), w.groups));
  }
  static void multiply_back(const Product& product, const Linear& layer, const float* x, size_t stride,
                            const RowWeights& w, const float* dy, float* dx) {
    const Matrices d = of_groups(dy, layer.pre_stride(), w.groups);
    if (w.gradients)
      product.backward_weights(layer.device(), of_groups(x, stride, w.groups), d,
                               {w.gradients + layer.weight_at(), w.stride});
    if (dx)
      product.backward_data(layer.device(), d, {w.weights + layer.weight_at(), w.stride},
                            of_groups(dx, stride, w.groups));
  }
  RowWeights means_, variances_{};
  std::shared_ptr<Product> mean_product_, variance_product_;  // the same where there is one group
};

class TensorProducts : public RowProducts {
 public:
  TensorProducts(const Linear& layer, const LayerContext& c, const RowWeights& means, const RowWeights* variances)
      : means_(means),
        variances_(variances ? *variances : RowWeights{}),
        product_(c.arena, layer.shape(split_rows(c, means.groups).batch), c.rows, means.groups,
                 means.stride ? c.rows * means.groups : 1, variances, c.training) {}
  void forward(Linear& layer, const Activation& x) override {
    const Stream stream = layer.device().stream();
    const int groups = means_.groups;
    product_.pack(weights(layer, means_), weights(layer, variances_), stream);
    product_.forward(of_groups(x.signal.value, x.stride, groups), of_groups(layer.mean(), layer.pre_stride(), groups),
                     of_groups(layer.variance(), layer.pre_stride(), groups), stream);
  }
  void backward(Linear& layer, const Activation& x) override {
    const Stream stream = layer.device().stream();
    const size_t pre = layer.pre_stride();
    const int groups = means_.groups;
    const float *dm = layer.mean_gradient(), *dv = layer.variance_gradient();
    if (means_.gradients)
      product_.backward_weights(of_groups(x.signal.value, x.stride, groups), of_groups(dm, pre, groups),
                                of_groups(dv, pre, groups), gradients(layer, means_), gradients(layer, variances_),
                                stream);
    if (x.signal.grad)
      product_.backward_data(of_groups(dm, pre, groups), of_groups(dv, pre, groups),
                             of_groups(x.signal.grad, x.stride, groups),
                             of_groups(x.signal.grad_square, x.stride, groups), stream);
  }

 private:
  // Of this layer; null where there are none.
  static Matrices weights(const Linear& layer, const RowWeights& w) {
    return {w.weights ? w.weights + layer.weight_at() : nullptr, w.stride};
  }
  static MutableMatrices gradients(const Linear& layer, const RowWeights& w) {
    return {w.gradients ? w.gradients + layer.weight_at() : nullptr, w.stride};
  }
  RowWeights means_, variances_;
  LayerProduct product_;
};

}  // namespace

std::unique_ptr<RowProducts> make_products(const Linear& layer, const LayerContext& c, const RowWeights& means,
                                           const RowWeights* variances) {
  if (c.device.tensor_cores()) return std::make_unique<TensorProducts>(layer, c, means, variances);
  return std::make_unique<LibraryProducts>(layer, c, means, variances);
}

// ------------------------------------------------------------------------------------------------- given weights
PointEstimator::PointEstimator(const Linear& layer, const LayerContext& c, const RowWeights& w)
    : w_(w), rows_(split_rows(c, w.groups)), products_(make_products(layer, c, w, nullptr)) {}

void PointEstimator::forward(Linear& layer, const Activation& x, const Pass& pass) {
  products_->forward(layer, x);
  layer.activate({w_.weights + layer.bias_at(), nullptr, w_.stride}, rows_, pass);
}

void PointEstimator::backward(Linear& layer, const Activation& x, const Pass& pass) {
  layer.activate_backward(rows_, pass);
  add_gradients(layer, x, pass);
  products_->backward(layer, x);
}

void PointEstimator::add_gradients(Linear& layer, const Activation&, const Pass&) {
  layer.bias_gradient(w_.gradients + layer.bias_at(), nullptr, w_.stride, rows_);
}

// ------------------------------------------------------------------------------------------------- Gaussian weights
LocalReparameterization::LocalReparameterization(const Linear& layer, const LayerContext& c, const GaussianWeights& w,
                                                 const RowWeights& means, bool variances)
    : w_(w), means_(means), rows_{c.rows, c.batch} {
  const RowWeights of_variances{w.variance, w.variance_gradient, w.stride};
  products_ = make_products(layer, c, means, variances ? &of_variances : nullptr);
}

void LocalReparameterization::forward(Linear& layer, const Activation& x, const Pass& pass) {
  products_->forward(layer, x);
  variance_forward(layer, x);
  layer.activate({w_.mean + layer.bias_at(), w_.variance + layer.bias_at(), w_.stride}, rows_, pass);
}

void LocalReparameterization::backward(Linear& layer, const Activation& x, const Pass& pass) {
  layer.activate_backward(rows_, pass);
  layer.bias_gradient(w_.mean_gradient + layer.bias_at(), w_.variance_gradient + layer.bias_at(), w_.stride, rows_);
  products_->backward(layer, x);
  variance_backward(layer, x);
}

ChannelMoments::ChannelMoments(const Linear& layer, const LayerContext& c, const GaussianWeights& w,
                               const RowWeights& factors, const ConvShape& shape)
    : LocalReparameterization(layer, c, w, {w.mean, w.mean_gradient, w.stride}, false),
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
