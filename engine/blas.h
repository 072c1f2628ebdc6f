// The interface to the libraries for matrix products and plain convolutions in float32, for all replicas of a layer.
// Host: OpenBLAS and the direct convolutions of conv_host.cpp. GPU: cuBLAS and cuDNN, a call for each replica; there
// the layers' own products are these under fp32 alone, and kernels/layer_product.h under tf32. Where the device's
// precision is tf32, their operands are rounded to it: on the host by simt::round_to_tf32(), on a GPU by the libraries,
// in a way that their documentation does not tell. A replica's result has the same bits in every call with the same
// shapes, for any number of threads and of other replicas. On a GPU that holds for one model of GPU and one version of
// the libraries, and only where the replicas' matrices are aligned alike, as a library may choose its kernel by the
// alignment of its arguments. Strides that are a multiple of 16 bytes are enough, and activations have them where the
// batch is a multiple of 4.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "engine/runtime.h"

namespace baton {

// A matrix for each replica: where the first starts, and how far apart they lie (0: all replicas share one).
struct Matrices {
  const float* data;
  size_t stride;
};
struct MutableMatrices {
  float* data;
  size_t stride;
  operator Matrices() const { return {data, stride}; }
};

// C[r] = op(A[r]) op(B[r]) + beta C[r], row-major and packed: op(A) is m x k, op(B) is k x n, C is m x n.
void gemm(Device&, bool transpose_a, bool transpose_b, int m, int n, int k, Matrices a, Matrices b, float beta,
          MutableMatrices c, int replicas);

// A square convolution (cross-correlation) of stride 1, NCHW, kernels [out, in, k, k].
struct ConvShape {
  int batch, in_channels, height, width, out_channels, kernel, pad;
  __host__ __device__ int out_height() const { return height + 2 * pad - kernel + 1; }
  __host__ __device__ int out_width() const { return width + 2 * pad - kernel + 1; }
  size_t input_size() const { return size_t(batch) * in_channels * height * width; }
  size_t output_size() const { return size_t(batch) * out_channels * out_height() * out_width(); }
  size_t weight_size() const { return size_t(out_channels) * in_channels * kernel * kernel; }
};

// The products of a convolution: y = x * w, then dL/dx from dL/dy and w, then dL/dw from x and dL/dy.
enum class ConvDirection { forward, data, weights };

// An algorithm that a library offers for one of them, in the library's own words.
struct OfferedAlgorithm {
  std::string name;         // "CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM"
  std::string status;       // "CUDNN_STATUS_SUCCESS", or why it cannot run, or did not in a trial run
  std::string determinism;  // "CUDNN_DETERMINISTIC"
  std::string math;         // "CUDNN_FMA_MATH"
  size_t workspace = 0;     // bytes
  bool chosen = false;      // whether a Convolution of this shape uses it; at most one is chosen
};

// A convolution whose shapes are fixed: algorithms are chosen and workspace is taken before step 0. On a GPU, for each
// direction, the choice is the first algorithm of cuDNN's list that repeats bit for bit, sums products of the device's
// precision or a higher one, and runs. Winograd and FFT do not sum products: their errors are relative to the largest
// element, and make variances negative. For a gradient they are allowed where no other algorithm runs.
class Convolution {
 public:
  // Throws InputError for shapes that have no output, RunError when no algorithm is suitable.
  Convolution(Device&, Arena&, const ConvShape&, int replicas);
  ~Convolution();
  Convolution(Convolution&&) noexcept;

  // All algorithms that cuDNN offers for this shape and direction, in the order of its preference; empty on the host,
  // which has none to choose from. It makes the same choice as the constructor, with trial runs, but does not throw
  // when none is suitable. Throws InputError for shapes that have no output.
  static std::vector<OfferedAlgorithm> offered_algorithms(Device&, const ConvShape&, ConvDirection);

  const ConvShape& shape() const { return shape_; }
  void forward(Device&, Matrices x, Matrices w, MutableMatrices y) const;          // y = x * w
  void backward_data(Device&, Matrices dy, Matrices w, MutableMatrices dx) const;  // dx = dL/dx
  void backward_weights(Device&, Matrices x, Matrices dy,
                        MutableMatrices dw) const;  // dw = dL/dw, summed over the batch

 private:
  struct Plan;
  ConvShape shape_;
  int replicas_;
  std::unique_ptr<Plan> plan_;
};

}  // namespace baton
