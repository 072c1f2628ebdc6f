// What the layers share. A layer owns its activations and their gradients, and knows where its tensors lie in the flat
// store. It can do a few things by hand: its product, what follows the product (bias, noise, ReLU, pooling), and both
// on the way back. How its weights enter the product is the business of an Estimator (layers/estimators.h), which a
// posterior or a plain array of weights supplies.
#pragma once
#include <memory>
#include <optional>
#include <string>

#include "engine/blas.h"
#include "engine/store.h"
#include "kernels/bgd.h"
#include "kernels/layer_product.h"
#include "kernels/local_reparam.h"

namespace baton {

// A layer's input or output: `size` floats an example; the next row's lies `stride` floats on (0: shared by all rows).
struct Activation {
  Signal signal;
  size_t size = 0, stride = 0;
};

// One pass through a network. states: [rows], or null where nothing is random. first_draw: row r is draw first_draw + r
// of the step, which the noise of weights and of dropout is counted by.
struct Pass {
  const StepState* states = nullptr;
  int first_draw = 0;
};

class Linear;
class Estimator;
struct LayerContext;

// Where the weights of a network come from: a posterior, or an array (PointWeights).
class WeightSource {
 public:
  virtual ~WeightSource() = default;
  // The estimator of one layer. It keeps the addresses of the weights, which must not move.
  virtual std::unique_ptr<Estimator> make_estimator(Linear&, const LayerContext&) = 0;
};

// What a network is prepared for: `rows` networks side by side (replicas of a training, or draws of the weights), each
// with `batch` examples.
struct LayerContext {
  Device& device;
  Arena& arena;
  WeightSource& weights;
  int rows, batch;
  bool training;                // a backward pass will follow
  bool shared_input = false;    // one batch serves all rows
  ProductJobs* jobs = nullptr;  // of the network, where the layer is in one and tensor cores multiply
};

// The rows of one layer's product: where each group of a row's examples has weights of its own (the draws of CFG and
// MNF), R rows of B examples are R * groups rows of B / groups, in the same memory.
struct Rows {
  int count, batch;
};
Rows split_rows(const LayerContext&, int groups);  // InputError where the batch does not divide

// Takes the buffers of an activation: squares, and their gradient, where the next layer reads them; gradients where a
// backward pass follows.
Activation take_activation(const LayerContext&, size_t size, bool squares, bool gradients);

// y = x W for a fixed number of rows and of examples a row; and the two products of the way back.
class Product {
 public:
  virtual ~Product() = default;
  virtual void forward(Device&, Matrices x, Matrices w, MutableMatrices y) const = 0;
  virtual void backward_data(Device&, Matrices dy, Matrices w, MutableMatrices dx) const = 0;
  virtual void backward_weights(Device&, Matrices x, Matrices dy, MutableMatrices dw) const = 0;
};

// A dense layer or a convolution: out = pool?(relu?(x W + b)).
class Linear {
 public:
  virtual ~Linear();
  const std::string& name() const { return name_; }
  int weight() const { return weight_; }  // the numbers of its tensors in the layout
  int bias() const { return weight_ + 1; }
  size_t weight_at() const { return weight_at_; }  // where they lie in a row of the store
  size_t bias_at() const { return bias_at_; }
  int outputs() const { return outputs_; }  // units or filters: the size of the bias

  // Takes the buffers. squares: the next layer reads the squares of the output.
  void prepare(const LayerContext&, bool squares);
  bool reads_squares() const;
  void forward(const Activation& x, const Pass&);
  // From output().signal.grad (and grad_square where squares are read) to the gradients of the weights and of x:
  // x.signal.grad and grad_square are written when not null.
  void backward(const Activation& x, const Pass&);
  const Activation& output() const { return y_; }

  // ---- what estimators build on. Pre-activations are [rows][batch][...], `pre_stride` floats a row.
  Device& device() const { return *device_; }
  size_t pre_stride() const { return pre_stride_; }
  float* mean() const { return m_; }
  float* variance() const { return v_; }
  float* mean_gradient() const { return dm_; }
  float* variance_gradient() const { return dv_; }
  virtual ConvShape shape(int batch) const = 0;  // of its product; a dense layer's images are of one pixel
  virtual std::unique_ptr<Product> make_product(Device&, Arena&, Rows) const = 0;
  // Where the sums of bias_gradient() would be taken from: parts of outputs() numbers for each row.
  struct BiasParts {
    Matrices mean, variance;
    int parts;
  };
  virtual BiasParts bias_parts(Rows) const = 0;
  // activate() as what follows a product in its launch, where that can be; else none.
  virtual std::optional<Sampling> sampling(Bias, const Pass&) { return std::nullopt; }
  // From the pre-activations to the output. Rows: those of the bias and of the noise.
  virtual void activate(Bias, Rows, const Pass&) = 0;
  // From the output's gradients to those of the pre-activations.
  virtual void activate_backward(Rows, const Pass&) = 0;
  // Sums of the pre-activations' gradients over the examples of each row; `variance` may be null.
  virtual void bias_gradient(float* mean, float* variance, size_t stride, Rows) = 0;
  // Rows are draws of the weights: adds the moments of their gradients, those of the bias excepted (kernels/bgd.h).
  virtual void take_moment_buffers(const LayerContext&) {}
  virtual void add_moments(const Moments&, const DrawnPass&, const Activation& x, const Pass&) = 0;
  // One row: adds the squares of every single example's gradient to `squares`, laid out like the store.
  virtual void take_square_buffers(const LayerContext&) = 0;
  virtual void add_squares(float* squares, const Activation& x) = 0;

 protected:
  // Adds `name`.weight and `name`.bias to the layout. stream_id: the layer's noise stream.
  Linear(ParameterLayout&, std::string name, std::vector<int64_t> weight_shape, int fan_in, uint32_t stream_id);
  virtual void take_buffers(const LayerContext&, bool noisy, bool squares) = 0;

  std::string name_;
  int weight_, outputs_;
  size_t weight_at_, bias_at_;
  uint32_t stream_id_;
  Activation y_;
  size_t pre_stride_ = 0;
  float *m_ = nullptr, *v_ = nullptr, *dm_ = nullptr, *dv_ = nullptr;

 private:
  Device* device_ = nullptr;
  std::unique_ptr<Estimator> estimator_;
};

}  // namespace baton
