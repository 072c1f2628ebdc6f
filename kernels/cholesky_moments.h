// Exact marginal moments of a convolution whose weights are channel factorized Gaussians (kernels/cholesky.h), for
// local reparameterization to sample from. The mean is a convolution with mu. The variance of a pre-activation is
//   v[r][b][n][p] = sum_c |L_nc^T patch_c(b, p)|^2,
// where patch_c(b, p) is the k x k patch of channel c around output p, zero outside the image. It costs about (d + 1) /
// 2 convolutions, and leaves out the correlations between positions.
#pragma once
#include "engine/blas.h"
#include "kernels/cholesky.h"

namespace baton {

// A convolution's variances, for fixed shapes (stride 1); the workspace is taken before step 0. Factors are stored as
// in cholesky.h, block n * in_channels + c.
class CholeskyMoments {
 public:
  // The workspace has room for the patches' products of as many images as fit into `bytes`, at least one. Throws
  // InputError for shapes without an output and for kernels larger than largest_block.
  CholeskyMoments(Device&, Arena&, const ConvShape&, int replicas, size_t bytes = size_t(64) << 20);

  const ConvShape& shape() const { return shape_; }
  // v =
  void forward(Device&, Matrices x, const float* factor, size_t factor_stride, MutableMatrices v) const;
  // dx += dL/dx (not computed where dx.data is null), dfactor += dL/dfactor in the stored coordinates.
  void backward(Device&, Matrices x, const float* factor, size_t factor_stride, Matrices dv, MutableMatrices dx,
                float* dfactor, size_t dfactor_stride) const;

 private:
  ConvShape shape_;
  int replicas_, images_;  // images_: how many are computed at once
  float *products_, *covariance_, *covariance_gradient_, *rows_, *patch_gradient_;
};

}  // namespace baton
