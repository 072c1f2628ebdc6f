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
// A replica's result has the same bits for any number of rows: the order of sums depends on a row's shape alone.
#pragma once
#include "engine/blas.h"
#include "kernels/local_reparam.h"

namespace baton {

// Weights as operands: rounded to tf32 and laid out for the products, forward [out][in kernel^2] and, for the gradients
// of inputs, [in][out kernel^2] with the kernels turned round. The rows are filled up with zeros to a multiple of 4.
struct Packing {
  Matrices weights;           // [sets][out][in][kernel][kernel]
  float *forward, *backward;  // [sets][...]; backward may be null
  ConvShape shape;
  int sets, first_block = 0;
};
// to[row][i] = sum over p of from[row][p][i], i < count, p < parts, always in the same order.
struct PartSum {
  MutableMatrices to;
  Matrices from;
  int count, parts, part_stride, rows, first_block = 0;
};

// What all products of a network do in one launch: they lay out the weights before a pass, and add up parts of
// gradients after it. Each list is fixed by settle().
class ProductJobs {
 public:
  void add(const Packing&);
  void add(const PartSum&);
  void settle(Device&, Arena&);
  void pack(Stream) const;
  void add_up(Stream) const;

 private:
  std::vector<Packing> packings_;
  std::vector<PartSum> sums_;
  Packing* device_packings_ = nullptr;
  PartSum* device_sums_ = nullptr;
  int packing_blocks_ = 0, packing_rows_ = 0, sum_blocks_ = 0, sum_rows_ = 0;
};

// What follows a product forward (kernels/local_reparam.h): bias, noise where there are variances, and ReLU; for a
// convolution also max pooling by windows of 2, of which the winners and slopes are kept where they have a place.
struct Sampling {
  Signal out;
  float *m, *v;  // pre-activations. v is left as dense_sample leaves it; pooled ones are not written on a GPU
  uint8_t* which;
  float* slope;
  Bias bias;
  const StepState* states;
  uint32_t stream_id;
  bool relu, pooled;
};

class LayerProduct {
 public:
  // shape: of one group; its batch is the group's. means: one matrix for every row and group, or one that all share
  // (stride 0), or none (null) where gradients of weights alone are wanted; variances: one a row, or none (null).
  // backward: for all three directions, else for forward alone, and then there are no gradients. Gradients are laid out
  // as the weights, those of the means for each group; they are written (=) once the jobs have been added up; null:
  // nobody wants them. Throws InputError for shapes without outputs, for kernels above 5x5 and for padding of a
  // kernel's size or more.
  LayerProduct(Arena&, ProductJobs&, const ConvShape& shape, int rows, int groups, Matrices means, Matrices variances,
               bool backward, MutableMatrices mean_gradients, MutableMatrices variance_gradients);

  // Of each group in turn, with the weights as they were when the jobs were packed; x, dm and dv hold tf32 numbers. The
  // second of a pair is ignored without variances.
  void forward(Matrices x, MutableMatrices m, MutableMatrices v, Stream) const;
  // The same and what follows it, in one launch. Bias and noise are a row's, not a group's.
  void forward(Matrices x, const Sampling&, Stream) const;
  void backward_data(Matrices dm, Matrices dv, MutableMatrices dx, MutableMatrices dsquare, Stream) const;
  void backward_weights(Matrices x, Matrices dm, Matrices dv, Stream) const;

 private:
  ConvShape shape_;
  int rows_, groups_, mean_sets_, parts_ = 1;
  bool dual_;
  size_t forward_floats_, backward_floats_ = 0;     // of one packed matrix
  float *forward_ = nullptr, *backward_ = nullptr;  // [means, then variances][...]
  MutableMatrices mean_gradients_, variance_gradients_;
  float* partial_ = nullptr;  // [rows * groups][parts][1 or 2][weights]
};

}  // namespace baton
