// How a layer's weights enter its product, once for dense layers and convolutions. Each posterior takes what it needs:
//
//   point weights            m = x w                     FT, SGD, Adam, SI, EWC; predictions (rows are draws); CFG's
//                                                        convolutions (every group of examples has a draw)
//   drawn weights, moments   the same forwards; back, the moments of the draws' gradients     BGD, Bayes by Backprop
//   squares                  the same forwards; back, sums of squares of examples' gradients  Laplace, EWC
//   local reparameterization m = x mu, v = x^2 sigma^2, y = m + sqrt(v) e                     FFG
//   drawn means              m = x (z mu), v = x^2 sigma^2: each group of examples has a z    MNF
//   exact channel moments    m = x mu, v from Cholesky factors                                CFG with `moments`
#pragma once
#include "kernels/cholesky_moments.h"
#include "layers/layer.h"

namespace baton {

class Estimator {
 public:
  virtual ~Estimator() = default;
  virtual bool noisy() const { return false; }          // the layer's pre-activations have variances
  virtual bool reads_squares() const { return false; }  // of its input
  virtual void settle(Linear&) {}                       // the layer has taken its buffers
  virtual void forward(Linear&, const Activation& x, const Pass&) = 0;
  virtual void backward(Linear&, const Activation& x, const Pass&) = 0;
};

// Weights and their gradients in the layout of the store, [rows * groups][stride] (stride 0: shared by all rows).
// gradients null: nobody wants them.
struct RowWeights {
  const float* weights;
  float* gradients;
  size_t stride;
  int groups = 1;  // of a row's examples, each with weights of its own; divides the batch
};

// The products of one layer with its weights, forward and back, for all rows: by the libraries, or on tensor cores
// where the device multiplies with them.
class RowProducts {
 public:
  virtual ~RowProducts() = default;
  virtual void settle(Linear&) {}
  // From x to the pre-activations' means, and variances where there are any.
  virtual void forward(Linear&, const Activation& x) = 0;
  // And on to the layer's output. Rows: those of the bias and of the noise.
  virtual void forward_to_output(Linear& layer, const Activation& x, Bias bias, Rows rows, const Pass& pass) {
    forward(layer, x);
    layer.activate(bias, rows, pass);
  }
  // From their gradients to those of the weights and biases, where they are wanted, and of x, where it has a place for
  // them. Those of the weights and biases may come only when the network adds up what its layers have left.
  virtual void backward(Linear&, const Activation& x) = 0;
};
// Where the gradients of a layer's biases go, [rows][stride]; null: nobody wants them.
struct BiasGradients {
  float *mean, *variance;
  size_t stride;
  Rows rows;
};
// variances: of the weights, or null; they have no groups.
std::unique_ptr<RowProducts> make_products(const Linear&, const LayerContext&, const RowWeights& means,
                                           const RowWeights* variances, const BiasGradients&);

// Products with given weights, without noise. Gradients are written (=).
class PointEstimator : public Estimator {
 public:
  PointEstimator(const Linear&, const LayerContext&, const RowWeights&);
  void settle(Linear& layer) override { products_->settle(layer); }
  void forward(Linear&, const Activation& x, const Pass&) override;
  void backward(Linear&, const Activation& x, const Pass&) override;

 protected:
  virtual void add_gradients(Linear&, const Activation&, const Pass&) {}  // what else is wanted
  RowWeights w_;
  Rows rows_;
  std::unique_ptr<RowProducts> products_;
};

// Every row's weights are a draw of the step: the backward pass adds the moments of their gradients.
class MomentsEstimator : public PointEstimator {
 public:
  MomentsEstimator(Linear& layer, const LayerContext& c, const float* draws, size_t stride, const Moments& moments)
      : PointEstimator(layer, c, {draws, nullptr, stride}), moments_(moments) {
    layer.take_moment_buffers(c);
    bias_gradients_ = c.arena.take<float>(size_t(layer.outputs()) * c.rows);
  }

 protected:
  void add_gradients(Linear& layer, const Activation& x, const Pass& pass) override {
    const DrawnPass draws{pass.first_draw, rows_.count, pass.first_draw > 0};
    const int n = layer.outputs();
    layer.bias_gradient(bias_gradients_, nullptr, size_t(n), rows_);
    accumulate_moments(moments_, bias_gradients_, size_t(n), int(layer.bias_at()), n, draws, pass.states,
                       layer.device().stream());
    layer.add_moments(moments_, draws, x, pass);
  }
  Moments moments_;
  float* bias_gradients_;  // [draws][outputs]
};

// The backward pass adds (+=) to `squares` the squares of every example's gradient: sums over examples of (dl_n/dw)^2.
class SquaresEstimator : public PointEstimator {
 public:
  SquaresEstimator(Linear& layer, const LayerContext& c, const float* weights, float* squares)
      : PointEstimator(layer, c, {weights, nullptr, 0}), squares_(squares) {
    layer.take_square_buffers(c);
  }

 protected:
  void add_gradients(Linear& layer, const Activation& x, const Pass&) override { layer.add_squares(squares_, x); }
  float* squares_;
};

// Means and variances of a Gaussian's weights, and their gradients, [rows][stride].
struct GaussianWeights {
  const float *mean, *variance;
  float *mean_gradient, *variance_gradient;
  size_t stride;
};

// Local reparameterization. `means` are what the product takes for the means of the weights: those of `w`, or draws of
// them; the means of biases are always those of `w`. Gradients are written (=).
class LocalReparameterization : public Estimator {
 public:
  // variances: whether they come of a product too.
  LocalReparameterization(const Linear&, const LayerContext&, const GaussianWeights& w, const RowWeights& means,
                          bool variances = true);
  void settle(Linear& layer) override { products_->settle(layer); }
  bool noisy() const override { return true; }
  bool reads_squares() const override { return true; }
  void forward(Linear&, const Activation& x, const Pass&) override;
  void backward(Linear&, const Activation& x, const Pass&) override;

 protected:
  Bias bias(const Linear& layer) const { return {w_.mean + layer.bias_at(), w_.variance + layer.bias_at(), w_.stride}; }
  GaussianWeights w_;
  RowWeights means_;
  Rows rows_;  // without groups
  std::unique_ptr<RowProducts> products_;
};

// Local reparameterization of a convolution from the exact marginal moments of its pre-activations. The squares of the
// input are not read, but a layer with variances has them written (kernels/local_reparam.h); their gradient is 0.
class ChannelMoments : public LocalReparameterization {
 public:
  // factors: the layer's Cholesky factors; their gradients are added to (+=).
  ChannelMoments(const Linear&, const LayerContext&, const GaussianWeights&, const RowWeights& factors,
                 const ConvShape&);
  void forward(Linear&, const Activation& x, const Pass&) override;
  void backward(Linear&, const Activation& x, const Pass&) override;

 private:
  RowWeights factors_;
  CholeskyMoments moments_;
};

// An array of weights as the source of a network's: predictions, features, curvature.
class PointWeights : public WeightSource {
 public:
  // [rows][stride]. squares: a backward pass adds the squares of examples' gradients there; null: there is none.
  PointWeights(const float* weights, size_t stride, float* squares = nullptr)
      : weights_(weights), stride_(stride), squares_(squares) {}
  std::unique_ptr<Estimator> make_estimator(Linear&, const LayerContext&) override;

 private:
  const float* weights_;
  size_t stride_;
  float* squares_;
};

}  // namespace baton
