// The products of a layer on tensor cores, all rows of a step in one launch: y = x W^T of dense layers, and
// convolutions. Operands are tf32 numbers, products are summed in float32. With variances, each launch makes two
// products at once:
//
//   forward            m = x mean,               v = x^2 variance
//   backward_data      dx = dm mean,             dx^2 = dv variance
//   backward_weights   dmean = x dm,             dvariance = x^2 dv
//
// which is local reparameterization (kernels/local_reparam.h); without them it is the first column alone. The squares
// of x are rounded to tf32 as well.
//
// A dense layer is a convolution of images of one pixel. The rows of a launch are a network's rows (replicas or draws)
// times the groups of a row's examples: each group may have means of its own, and variances are a row's.
//
// A result has the same bits for any number of rows, on one kind of build.
#pragma once
#include "engine/blas.h"

namespace baton {

class LayerProduct {
 public:
  // shape: of one group; its batch is the group's. mean_sets: rows * groups, or 1 where all share the means. dual: with
  // variances, one set a row. backward: for all three directions, else for forward alone. Throws InputError for shapes
  // without outputs, for kernels above 5x5 and for padding of a kernel's size or more.
  LayerProduct(Arena&, const ConvShape& shape, int rows, int groups, int mean_sets, bool dual, bool backward);

  // Rounds the weights to tf32 and lays them out for the products. Weights [out][in][kernel][kernel].
  void pack(Matrices mean, Matrices variance, Stream) const;
  // Of each group in turn; x, dm and dv hold tf32 numbers. The second of a pair is ignored without variances.
  void forward(Matrices x, MutableMatrices m, MutableMatrices v, Stream) const;
  void backward_data(Matrices dm, Matrices dv, MutableMatrices dx, MutableMatrices dsquare, Stream) const;
  // Writes (=) the gradients, laid out as the weights; those of the means for each group, of the variances for each
  // row.
  void backward_weights(Matrices x, Matrices dm, Matrices dv, MutableMatrices mean, MutableMatrices variance,
                        Stream) const;

 private:
  size_t forward_floats() const;  // of one packed matrix
  size_t backward_floats() const;
  int launched_rows() const { return rows_ * groups_; }
  ConvShape shape_;
  int rows_, groups_, mean_sets_, variance_sets_, parts_ = 1;
  float *forward_ = nullptr, *backward_ = nullptr;  // [mean_sets + variance_sets][...]
  float* partial_ = nullptr;                        // [rows * groups][parts][1 or 2][weights]
};

}  // namespace baton
