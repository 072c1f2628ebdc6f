#include "layers/estimators.h"

namespace baton {

namespace {

// Each group's share of a row, in the same memory.
Matrices of_groups(const float* data, size_t stride, int groups) { return {data, stride / groups}; }
MutableMatrices of_groups(float* data, size_t stride, int groups) { return {data, stride / groups}; }

class LibraryProducts : public RowProducts {
 public:
  LibraryProducts(const Linear& layer, const LayerContext& c, const RowWeights& means, const RowWeights* variances,
                  const BiasGradients& bias)
      : means_(means), bias_(bias), mean_product_(layer.make_product(c.device, c.arena, split_rows(c, means.groups))) {
    if (!variances) return;
    variances_ = *variances;
    variance_product_ = means.groups > 1 ? layer.make_product(c.device, c.arena, {c.rows, c.batch}) : mean_product_;
  }
  void forward(Linear& layer, const Activation& x) override {
    multiply(*mean_product_, layer, x.signal.value, x.stride, means_, layer.mean());
    if (variance_product_) multiply(*variance_product_, layer, x.signal.square, x.stride, variances_, layer.variance());
  }
  void backward(Linear& layer, const Activation& x) override {
    if (bias_.mean) layer.bias_gradient(bias_.mean, bias_.variance, bias_.stride, bias_.rows);
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
  BiasGradients bias_;
  std::shared_ptr<Product> mean_product_, variance_product_;  // the same where there is one group
};

class TensorProducts : public RowProducts {
 public:
  TensorProducts(const Linear& layer, const LayerContext& c, const RowWeights& means, const RowWeights* variances,
                 const BiasGradients& bias)
      : arena_(c.arena),
        jobs_(c.jobs ? *c.jobs : alone_),
        bias_(bias),
        groups_(means.groups),
        product_(c.arena, jobs_, layer.shape(split_rows(c, groups_).batch), c.rows, groups_, weights(layer, means),
                 variances ? weights(layer, *variances) : Matrices{}, c.training, gradients(layer, means),
                 variances ? gradients(layer, *variances) : MutableMatrices{}),
        trains_(means.gradients) {}
  void settle(Linear& layer) override {
    const Linear::BiasParts p = layer.bias_parts(bias_.rows);
    const auto add = [&](float* to, const Matrices& from) {
      if (to) jobs_.add(PartSum{{to, bias_.stride}, from, layer.outputs(), p.parts, layer.outputs(), bias_.rows.count});
    };
    add(bias_.mean, p.mean), add(bias_.variance, p.variance);
    if (&jobs_ == &alone_) alone_.settle(layer.device(), arena_);
  }
  void forward(Linear& layer, const Activation& x) override {
    const Stream stream = layer.device().stream();
    if (&jobs_ == &alone_) alone_.pack(stream);
    product_.forward(of_groups(x.signal.value, x.stride, groups_), of_groups(layer.mean(), layer.pre_stride(), groups_),
                     of_groups(layer.variance(), layer.pre_stride(), groups_), stream);
  }
  void forward_to_output(Linear& layer, const Activation& x, Bias bias, Rows rows, const Pass& pass) override {
    const std::optional<Sampling> s = layer.sampling(bias, pass);
    if (!s) return RowProducts::forward_to_output(layer, x, bias, rows, pass);
    if (&jobs_ == &alone_) alone_.pack(layer.device().stream());
    product_.forward(of_groups(x.signal.value, x.stride, groups_), *s, layer.device().stream());
  }
  void backward(Linear& layer, const Activation& x) override {
    const Stream stream = layer.device().stream();
    const size_t pre = layer.pre_stride();
    const Matrices dm = of_groups(layer.mean_gradient(), pre, groups_),
                   dv = of_groups(layer.variance_gradient(), pre, groups_);
    if (trains_) product_.backward_weights(of_groups(x.signal.value, x.stride, groups_), dm, dv, stream);
    if (x.signal.grad)
      product_.backward_data(dm, dv, of_groups(x.signal.grad, x.stride, groups_),
                             of_groups(x.signal.grad_square, x.stride, groups_), stream);
    if (&jobs_ == &alone_) alone_.add_up(stream);
  }

 private:
  static Matrices weights(const Linear& layer, const RowWeights& w) {
    return {w.weights + layer.weight_at(), w.stride};
  }
  static MutableMatrices gradients(const Linear& layer, const RowWeights& w) {
    return {w.gradients ? w.gradients + layer.weight_at() : nullptr, w.stride};
  }
  Arena& arena_;
  ProductJobs alone_, &jobs_;  // alone_: of a layer that does its jobs itself
  BiasGradients bias_;
  int groups_;
  LayerProduct product_;
  bool trains_;
};

}  // namespace

std::unique_ptr<RowProducts> make_products(const Linear& layer, const LayerContext& c, const RowWeights& means,
                                           const RowWeights* variances, const BiasGradients& bias) {
  if (c.device.tensor_cores()) return std::make_unique<TensorProducts>(layer, c, means, variances, bias);
  return std::make_unique<LibraryProducts>(layer, c, means, variances, bias);
}

// ------------------------------------------------------------------------------------------------- given weights
PointEstimator::PointEstimator(const Linear& layer, const LayerContext& c, const RowWeights& w)
    : w_(w), rows_(split_rows(c, w.groups)) {
  const BiasGradients bias{w.gradients ? w.gradients + layer.bias_at() : nullptr, nullptr, w.stride, rows_};
  products_ = make_products(layer, c, w, nullptr, bias);
}

void PointEstimator::forward(Linear& layer, const Activation& x, const Pass& pass) {
  products_->forward_to_output(layer, x, {w_.weights + layer.bias_at(), nullptr, w_.stride}, rows_, pass);
}

void PointEstimator::backward(Linear& layer, const Activation& x, const Pass& pass) {
  layer.activate_backward(rows_, pass);
  add_gradients(layer, x, pass);
  products_->backward(layer, x);
}

// ------------------------------------------------------------------------------------------------- Gaussian weights
LocalReparameterization::LocalReparameterization(const Linear& layer, const LayerContext& c, const GaussianWeights& w,
                                                 const RowWeights& means, bool variances)
    : w_(w), means_(means), rows_{c.rows, c.batch} {
  const RowWeights of_variances{w.variance, w.variance_gradient, w.stride};
  float *mean = w.mean_gradient, *variance = w.variance_gradient;
  const BiasGradients bias{mean + layer.bias_at(), variance + layer.bias_at(), w.stride, rows_};
  products_ = make_products(layer, c, means, variances ? &of_variances : nullptr, bias);
}

void LocalReparameterization::forward(Linear& layer, const Activation& x, const Pass& pass) {
  products_->forward_to_output(layer, x, bias(layer), rows_, pass);
}

void LocalReparameterization::backward(Linear& layer, const Activation& x, const Pass& pass) {
  layer.activate_backward(rows_, pass);
  products_->backward(layer, x);
}

ChannelMoments::ChannelMoments(const Linear& layer, const LayerContext& c, const GaussianWeights& w,
                               const RowWeights& factors, const ConvShape& shape)
    : LocalReparameterization(layer, c, w, {w.mean, w.mean_gradient, w.stride}, false),
      factors_(factors),
      moments_(c.device, c.arena, shape, c.rows) {}

void ChannelMoments::forward(Linear& layer, const Activation& x, const Pass& pass) {
  products_->forward(layer, x);
  moments_.forward(layer.device(), {x.signal.value, x.stride}, factors_.weights, factors_.stride,
                   {layer.variance(), layer.pre_stride()});
  layer.activate(bias(layer), rows_, pass);
}

void ChannelMoments::backward(Linear& layer, const Activation& x, const Pass& pass) {
  LocalReparameterization::backward(layer, x, pass);
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
