// Matrix products by cuBLAS and convolutions by cuDNN: in float32 without tensor cores, or where the device's precision
// is tf32, with the tensor cores that take it. All calls can be captured in a graph, and repeat bit for bit on one
// model of GPU with one version of the libraries.
#include <algorithm>
#include <array>

#include "engine/blas.h"
#include "engine/cuda_libraries.h"

namespace baton {

namespace {

// Lets cuBLAS multiply by tf32, where that is the device's precision, for as long as it lives. The products of linalg.h
// go through the same handle.
class TensorCores {
 public:
  explicit TensorCores(Device& device) : blas_(device.libraries().blas), on_(device.precision() == Precision::tf32) {
    if (on_) BATON_CALL(cublasSetMathMode, blas_, CUBLAS_TF32_TENSOR_OP_MATH);
  }
  ~TensorCores() {
    if (on_) cublasSetMathMode(blas_, LibraryHandles::math);
  }
  TensorCores(const TensorCores&) = delete;
  TensorCores& operator=(const TensorCores&) = delete;

 private:
  cublasHandle_t blas_;
  bool on_;
};

}  // namespace

// cuBLAS is column-major, and to it a packed row-major matrix is its transpose: so we ask for C' = op(B)' op(A)'.
//
// There is one call for each replica. cuBLAS chooses the order of a sum by the shape, and its documentation does not
// rule out that the number of matrices in a batch has a part in the choice; but a seed's result must not depend on how
// many seeds train beside it. The cost is that R replicas are R nodes of a graph instead of one, and that small
// products cannot fill the chip together.
void gemm(Device& device, bool transpose_a, bool transpose_b, int m, int n, int k, Matrices a, Matrices b, float beta,
          MutableMatrices c, int replicas) {
  if (m == 0 || n == 0) return;
  const cublasOperation_t op_a = transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
  const cublasOperation_t op_b = transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
  const int lda = std::max(1, transpose_a ? m : k), ldb = std::max(1, transpose_b ? k : n);
  const float alpha = 1;
  const TensorCores allowed(device);
  for (int r = 0; r < replicas; r++)
    BATON_CALL(cublasSgemm, device.libraries().blas, op_b, op_a, n, m, k, &alpha, b.data + b.stride * r, ldb,
               a.data + a.stride * r, lda, &beta, c.data + c.stride * r, n);
}

namespace {

constexpr size_t most_workspace = size_t(512) << 20;
constexpr float one = 1, zero = 0;

// An algorithm that cuDNN offers for one direction; `algorithm` is of that direction's enumeration.
struct Candidate {
  int algorithm;
  cudnnStatus_t status;
  size_t workspace;
  cudnnDeterminism_t determinism;
  cudnnMathType_t math;
};

template <class Performance>
std::vector<Candidate> candidates_of(const std::vector<Performance>& offered, int count) {
  std::vector<Candidate> candidates;
  for (int i = 0; i < count; i++)
    candidates.push_back(
        {int(offered[i].algo), offered[i].status, offered[i].memory, offered[i].determinism, offered[i].mathType});
  return candidates;
}

// Whether it is a matrix product, which sums products of float32. The Winograd and Fourier transforms are not: where a
// result should be 0 beside a large element they give small numbers of both signs, and the root of such a variance is
// NaN.
bool sums_products(ConvDirection direction, int algorithm) {
  switch (direction) {
    case ConvDirection::forward:
      return algorithm == CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM ||
             algorithm == CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM ||
             algorithm == CUDNN_CONVOLUTION_FWD_ALGO_GEMM;
    case ConvDirection::data:
      return algorithm == CUDNN_CONVOLUTION_BWD_DATA_ALGO_1;
    case ConvDirection::weights:
      return algorithm == CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1;
  }
  return false;
}

// Whether it is offered, repeats bit for bit, and multiplies with the precision or a higher one. Under fp32 the
// descriptor asks for FMA; CUDNN_DEFAULT_MATH then only means that the algorithm has no other kind of arithmetic. Under
// tf32 it asks for CUDNN_DEFAULT_MATH, which allows tf32 for float32 tensors from the A100 on.
// CUDNN_TENSOR_OP_MATH_ALLOW_CONVERSION could make float16 of them.
bool can_be_trusted(const Candidate& c, Precision precision) {
  return c.status == CUDNN_STATUS_SUCCESS && c.determinism == CUDNN_DETERMINISTIC &&
         (c.math == CUDNN_FMA_MATH || c.math == CUDNN_DEFAULT_MATH ||
          (c.math == CUDNN_TENSOR_OP_MATH && precision == Precision::tf32)) &&
         c.workspace <= most_workspace;
}

#define BATON_NAME(x) \
  case x:             \
    return #x
std::string name_of(cudnnConvolutionFwdAlgo_t a) {
  switch (a) {
    BATON_NAME(CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM);
    BATON_NAME(CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM);
    BATON_NAME(CUDNN_CONVOLUTION_FWD_ALGO_GEMM);
    BATON_NAME(CUDNN_CONVOLUTION_FWD_ALGO_DIRECT);
    BATON_NAME(CUDNN_CONVOLUTION_FWD_ALGO_FFT);
    BATON_NAME(CUDNN_CONVOLUTION_FWD_ALGO_FFT_TILING);
    BATON_NAME(CUDNN_CONVOLUTION_FWD_ALGO_WINOGRAD);
    BATON_NAME(CUDNN_CONVOLUTION_FWD_ALGO_WINOGRAD_NONFUSED);
    default:
      return "cudnnConvolutionFwdAlgo_t " + std::to_string(int(a));
  }
}
std::string name_of(cudnnConvolutionBwdDataAlgo_t a) {
  switch (a) {
    BATON_NAME(CUDNN_CONVOLUTION_BWD_DATA_ALGO_0);
    BATON_NAME(CUDNN_CONVOLUTION_BWD_DATA_ALGO_1);
    BATON_NAME(CUDNN_CONVOLUTION_BWD_DATA_ALGO_FFT);
    BATON_NAME(CUDNN_CONVOLUTION_BWD_DATA_ALGO_FFT_TILING);
    BATON_NAME(CUDNN_CONVOLUTION_BWD_DATA_ALGO_WINOGRAD);
    BATON_NAME(CUDNN_CONVOLUTION_BWD_DATA_ALGO_WINOGRAD_NONFUSED);
    default:
      return "cudnnConvolutionBwdDataAlgo_t " + std::to_string(int(a));
  }
}
std::string name_of(cudnnConvolutionBwdFilterAlgo_t a) {
  switch (a) {
    BATON_NAME(CUDNN_CONVOLUTION_BWD_FILTER_ALGO_0);
    BATON_NAME(CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1);
    BATON_NAME(CUDNN_CONVOLUTION_BWD_FILTER_ALGO_3);
    BATON_NAME(CUDNN_CONVOLUTION_BWD_FILTER_ALGO_FFT);
    BATON_NAME(CUDNN_CONVOLUTION_BWD_FILTER_ALGO_FFT_TILING);
    BATON_NAME(CUDNN_CONVOLUTION_BWD_FILTER_ALGO_WINOGRAD);
    BATON_NAME(CUDNN_CONVOLUTION_BWD_FILTER_ALGO_WINOGRAD_NONFUSED);
    default:
      return "cudnnConvolutionBwdFilterAlgo_t " + std::to_string(int(a));
  }
}
std::string name_of(cudnnMathType_t m) {
  switch (m) {
    BATON_NAME(CUDNN_DEFAULT_MATH);
    BATON_NAME(CUDNN_TENSOR_OP_MATH);
    BATON_NAME(CUDNN_TENSOR_OP_MATH_ALLOW_CONVERSION);
    BATON_NAME(CUDNN_FMA_MATH);
    default:
      return "cudnnMathType_t " + std::to_string(int(m));
  }
}
#undef BATON_NAME
std::string name_of(ConvDirection direction, int algorithm) {
  if (direction == ConvDirection::forward) return name_of(cudnnConvolutionFwdAlgo_t(algorithm));
  if (direction == ConvDirection::data) return name_of(cudnnConvolutionBwdDataAlgo_t(algorithm));
  return name_of(cudnnConvolutionBwdFilterAlgo_t(algorithm));
}
constexpr ConvDirection directions[] = {ConvDirection::forward, ConvDirection::data, ConvDirection::weights};
constexpr const char* call_of[] = {"cudnnConvolutionForward", "cudnnConvolutionBackwardData",
                                   "cudnnConvolutionBackwardFilter"};

}  // namespace

// Descriptors, and the algorithm that was chosen for each direction.
struct Convolution::Plan {
  cudnnTensorDescriptor_t x = nullptr, y = nullptr;
  cudnnFilterDescriptor_t w = nullptr;
  cudnnConvolutionDescriptor_t convolution = nullptr;
  Precision precision;
  std::array<Candidate, 3> chosen{};
  void* workspace = nullptr;  // one for all three, as they follow one another on the stream
  size_t workspace_bytes = 0;

  explicit Plan(Precision p) : precision(p) {}
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() {
    if (convolution) cudnnDestroyConvolutionDescriptor(convolution);
    if (w) cudnnDestroyFilterDescriptor(w);
    if (y) cudnnDestroyTensorDescriptor(y);
    if (x) cudnnDestroyTensorDescriptor(x);
  }

  void describe(const ConvShape& s) {
    if (s.out_height() < 1 || s.out_width() < 1 || s.batch < 1 || s.kernel < 1)
      throw InputError("convolution: input " + std::to_string(s.height) + "x" + std::to_string(s.width) + ", padding " +
                       std::to_string(s.pad) + ", has no output for a kernel of " + std::to_string(s.kernel));
    BATON_CALL(cudnnCreateTensorDescriptor, &x);
    BATON_CALL(cudnnCreateTensorDescriptor, &y);
    BATON_CALL(cudnnCreateFilterDescriptor, &w);
    BATON_CALL(cudnnCreateConvolutionDescriptor, &convolution);
    BATON_CALL(cudnnSetTensor4dDescriptor, x, CUDNN_TENSOR_NCHW, CUDNN_DATA_FLOAT, s.batch, s.in_channels, s.height,
               s.width);
    BATON_CALL(cudnnSetTensor4dDescriptor, y, CUDNN_TENSOR_NCHW, CUDNN_DATA_FLOAT, s.batch, s.out_channels,
               s.out_height(), s.out_width());
    BATON_CALL(cudnnSetFilter4dDescriptor, w, CUDNN_DATA_FLOAT, CUDNN_TENSOR_NCHW, s.out_channels, s.in_channels,
               s.kernel, s.kernel);
    BATON_CALL(cudnnSetConvolution2dDescriptor, convolution, s.pad, s.pad, 1, 1, 1, 1, CUDNN_CROSS_CORRELATION,
               CUDNN_DATA_FLOAT);
    BATON_CALL(cudnnSetConvolutionMathType, convolution,
               precision == Precision::tf32 ? CUDNN_DEFAULT_MATH : CUDNN_FMA_MATH);
  }

  // In the order of cuDNN's own estimates, the fastest first. Measured times could choose another one in the next run.
  std::vector<Candidate> candidates(cudnnHandle_t dnn, ConvDirection direction) const {
    int count = 0;
    if (direction == ConvDirection::forward) {
      std::vector<cudnnConvolutionFwdAlgoPerf_t> f(CUDNN_CONVOLUTION_FWD_ALGO_COUNT);
      BATON_CALL(cudnnGetConvolutionForwardAlgorithm_v7, dnn, x, w, convolution, y, int(f.size()), &count, f.data());
      return candidates_of(f, count);
    }
    if (direction == ConvDirection::data) {
      std::vector<cudnnConvolutionBwdDataAlgoPerf_t> d(CUDNN_CONVOLUTION_BWD_DATA_ALGO_COUNT);
      BATON_CALL(cudnnGetConvolutionBackwardDataAlgorithm_v7, dnn, w, y, convolution, x, int(d.size()), &count,
                 d.data());
      return candidates_of(d, count);
    }
    std::vector<cudnnConvolutionBwdFilterAlgoPerf_t> b(CUDNN_CONVOLUTION_BWD_FILTER_ALGO_COUNT);
    BATON_CALL(cudnnGetConvolutionBackwardFilterAlgorithm_v7, dnn, x, y, convolution, w, int(b.size()), &count,
               b.data());
    return candidates_of(b, count);
  }

  // The operands are those of Convolution's function of this direction, in its order. Under tf32 the directions share
  // the descriptor, and each has the kind of arithmetic that its algorithm was offered with.
  cudnnStatus_t run(cudnnHandle_t dnn, ConvDirection direction, const Candidate& candidate, void* space,
                    size_t space_bytes, const float* first, const float* second, float* result) const {
    const int algorithm = candidate.algorithm;
    if (precision == Precision::tf32) BATON_CALL(cudnnSetConvolutionMathType, convolution, candidate.math);
    if (direction == ConvDirection::forward)
      return cudnnConvolutionForward(dnn, &one, x, first, w, second, convolution, cudnnConvolutionFwdAlgo_t(algorithm),
                                     space, space_bytes, &zero, y, result);
    if (direction == ConvDirection::data)
      return cudnnConvolutionBackwardData(dnn, &one, w, second, y, first, convolution,
                                          cudnnConvolutionBwdDataAlgo_t(algorithm), space, space_bytes, &zero, x,
                                          result);
    return cudnnConvolutionBackwardFilter(dnn, &one, x, first, y, second, convolution,
                                          cudnnConvolutionBwdFilterAlgo_t(algorithm), space, space_bytes, &zero, w,
                                          result);
  }

  // The first candidate that is acceptable, sums products, and runs on zeros; -1 if there is none. Gradients may come
  // from a transform where no product runs, for nothing takes their root. The answer to a trial run that fails becomes
  // the candidate's status. The trial also makes sure that the algorithm has run before it is captured: in a first call
  // cuDNN may compile, load and allocate, which is not possible in a capture.
  int choose(Device& device, Arena& scratch, const ConvShape& s, ConvDirection direction,
             std::vector<Candidate>& of) const {
    const auto zeros = [&](size_t n) { return scratch.take<float>(n); };
    const bool of_weights = direction == ConvDirection::weights;
    const float* first = zeros(direction == ConvDirection::data ? s.output_size() : s.input_size());
    const float* second = zeros(of_weights ? s.output_size() : s.weight_size());
    float* result = zeros(direction == ConvDirection::forward ? s.output_size()
                          : of_weights                        ? s.weight_size()
                                                              : s.input_size());
    for (const bool product : {true, false}) {
      if (!product && direction == ConvDirection::forward) break;
      for (size_t i = 0; i < of.size(); i++) {
        if (!can_be_trusted(of[i], precision) || sums_products(direction, of[i].algorithm) != product) continue;
        void* space = scratch.take<char>(of[i].workspace);
        of[i].status = run(device.libraries().dnn, direction, of[i], space, of[i].workspace, first, second, result);
        device.synchronize();
        if (of[i].status == CUDNN_STATUS_SUCCESS) return int(i);
        cudaGetLastError();  // clears the error, which has no other effect, or the next launch would report it
      }
    }
    return -1;
  }

  void choose_algorithms(Device& device, Arena& arena, const ConvShape& s) {
    Arena scratch;
    for (ConvDirection direction : directions) {
      std::vector<Candidate> of = candidates(device.libraries().dnn, direction);
      const int best = choose(device, scratch, s, direction, of);
      if (best < 0) {
        std::string offers;
        for (const Candidate& c : of)
          offers += std::string(offers.empty() ? "" : ", ") + name_of(direction, c.algorithm) + " " +
                    cudnnGetErrorString(c.status);
        throw RunError(std::string(call_of[int(direction)]) +
                       ": none of the algorithms that cuDNN offers is fit: one that repeats bit for bit, in " +
                       name(precision) + ", and sums products where a variance comes out of it (" + offers + ")");
      }
      chosen[int(direction)] = of[best];
      workspace_bytes = std::max(workspace_bytes, of[best].workspace);
    }
    workspace = arena.take<char>(workspace_bytes);
  }

  void run(Device& device, ConvDirection direction, const float* first, const float* second, float* result) const {
    check(run(device.libraries().dnn, direction, chosen[int(direction)], workspace, workspace_bytes, first, second,
              result),
          call_of[int(direction)]);
  }
};

std::vector<OfferedAlgorithm> Convolution::offered_algorithms(Device& device, const ConvShape& s,
                                                              ConvDirection direction) {
  Plan plan(device.precision());
  plan.describe(s);
  Arena scratch;
  std::vector<Candidate> candidates = plan.candidates(device.libraries().dnn, direction);
  const int best = plan.choose(device, scratch, s, direction, candidates);
  std::vector<OfferedAlgorithm> offered;
  for (const Candidate& c : candidates)
    offered.push_back({name_of(direction, c.algorithm), cudnnGetErrorString(c.status),
                       c.determinism == CUDNN_DETERMINISTIC ? "CUDNN_DETERMINISTIC" : "CUDNN_NON_DETERMINISTIC",
                       name_of(c.math), c.workspace, int(offered.size()) == best});
  return offered;
}

Convolution::Convolution(Device& device, Arena& arena, const ConvShape& s, int replicas)
    : shape_(s), replicas_(replicas), plan_(std::make_unique<Plan>(device.precision())) {
  plan_->describe(s);
  plan_->choose_algorithms(device, arena, s);
}

Convolution::~Convolution() = default;
Convolution::Convolution(Convolution&&) noexcept = default;

void Convolution::forward(Device& device, Matrices x, Matrices w, MutableMatrices y) const {
  for (int r = 0; r < replicas_; r++)
    plan_->run(device, ConvDirection::forward, x.data + r * x.stride, w.data + r * w.stride, y.data + r * y.stride);
}

void Convolution::backward_data(Device& device, Matrices dy, Matrices w, MutableMatrices dx) const {
  for (int r = 0; r < replicas_; r++)
    plan_->run(device, ConvDirection::data, dy.data + r * dy.stride, w.data + r * w.stride, dx.data + r * dx.stride);
}

void Convolution::backward_weights(Device& device, Matrices x, Matrices dy, MutableMatrices dw) const {
  for (int r = 0; r < replicas_; r++)
    plan_->run(device, ConvDirection::weights, x.data + r * x.stride, dy.data + r * dy.stride, dw.data + r * dw.stride);
}

}  // namespace baton
