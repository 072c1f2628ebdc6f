// Matrix products by cuBLAS and convolutions by cuDNN, float32 on the ordinary cores (no tf32). All of it can be
// captured in a graph, and repeats bit for bit on one model of GPU with one version of the libraries.
#include <algorithm>
#include <vector>

#include "engine/blas.h"
#include "engine/cuda_libraries.h"

namespace baton {

// cuBLAS counts columns first. A packed row-major matrix is, read so, its transpose: we ask for C' = op(B)' op(A)'.
//
// One call for each replica. The order in which a product is summed is chosen by its shape, and nothing that cuBLAS
// documents keeps that choice from depending on the number of matrices in a batch; but a seed's result must not depend
// on how many seeds train beside it. The cost: R replicas are R nodes of a graph in place of one, and small products do
// not fill the chip together.
void gemm(Device& device, bool transpose_a, bool transpose_b, int m, int n, int k, Matrices a, Matrices b, float beta,
          MutableMatrices c, int replicas) {
  if (m == 0 || n == 0) return;
  const cublasOperation_t op_a = transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
  const cublasOperation_t op_b = transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N;
  const int lda = std::max(1, transpose_a ? m : k), ldb = std::max(1, transpose_b ? k : n);
  const float alpha = 1;
  for (int r = 0; r < replicas; r++)
    BATON_CALL(cublasSgemm, device.libraries().blas, op_b, op_a, n, m, k, &alpha, b.data + b.stride * r, ldb,
               a.data + a.stride * r, lda, &beta, c.data + c.stride * r, n);
}

namespace {

constexpr size_t most_workspace = size_t(512) << 20;

// The fastest algorithm, by cuDNN's own reckoning, that repeats bit for bit in float32. Not by timing: that could
// choose another one in the next run.
template <class Candidate>
const Candidate& choose(const std::vector<Candidate>& candidates, const char* what) {
  for (const Candidate& c : candidates)
    if (c.status == CUDNN_STATUS_SUCCESS && c.determinism == CUDNN_DETERMINISTIC && c.mathType == CUDNN_FMA_MATH &&
        c.memory <= most_workspace)
      return c;
  throw RunError(std::string("cuDNN has no deterministic float32 algorithm for a convolution's ") + what);
}

constexpr float one = 1, zero = 0;

}  // namespace

struct Convolution::Plan {
  cudnnTensorDescriptor_t x = nullptr, y = nullptr;
  cudnnFilterDescriptor_t w = nullptr;
  cudnnConvolutionDescriptor_t convolution = nullptr;
  cudnnConvolutionFwdAlgo_t forward{};
  cudnnConvolutionBwdDataAlgo_t backward_data{};
  cudnnConvolutionBwdFilterAlgo_t backward_weights{};
  void* workspace = nullptr;  // one for the three: they follow one another on the stream
  size_t workspace_bytes = 0;

  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() {
    if (convolution) cudnnDestroyConvolutionDescriptor(convolution);
    if (w) cudnnDestroyFilterDescriptor(w);
    if (y) cudnnDestroyTensorDescriptor(y);
    if (x) cudnnDestroyTensorDescriptor(x);
  }

  void describe(const ConvShape& s) {
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
    BATON_CALL(cudnnSetConvolutionMathType, convolution, CUDNN_FMA_MATH);
  }

  void choose_algorithms(cudnnHandle_t dnn) {
    int count = 0;
    std::vector<cudnnConvolutionFwdAlgoPerf_t> f(CUDNN_CONVOLUTION_FWD_ALGO_COUNT);
    BATON_CALL(cudnnGetConvolutionForwardAlgorithm_v7, dnn, x, w, convolution, y, int(f.size()), &count, f.data());
    f.resize(count);
    std::vector<cudnnConvolutionBwdDataAlgoPerf_t> d(CUDNN_CONVOLUTION_BWD_DATA_ALGO_COUNT);
    BATON_CALL(cudnnGetConvolutionBackwardDataAlgorithm_v7, dnn, w, y, convolution, x, int(d.size()), &count, d.data());
    d.resize(count);
    std::vector<cudnnConvolutionBwdFilterAlgoPerf_t> b(CUDNN_CONVOLUTION_BWD_FILTER_ALGO_COUNT);
    BATON_CALL(cudnnGetConvolutionBackwardFilterAlgorithm_v7, dnn, x, y, convolution, w, int(b.size()), &count,
               b.data());
    b.resize(count);

    const auto& best_f = choose(f, "forward");
    const auto& best_d = choose(d, "data gradient");
    const auto& best_b = choose(b, "weight gradient");
    forward = best_f.algo;
    backward_data = best_d.algo;
    backward_weights = best_b.algo;
    workspace_bytes = std::max({best_f.memory, best_d.memory, best_b.memory});
  }

  void run_forward(cudnnHandle_t dnn, const float* from, const float* weights, float* to) const {
    BATON_CALL(cudnnConvolutionForward, dnn, &one, x, from, w, weights, convolution, forward, workspace,
               workspace_bytes, &zero, y, to);
  }
  void run_backward_data(cudnnHandle_t dnn, const float* dy, const float* weights, float* dx) const {
    BATON_CALL(cudnnConvolutionBackwardData, dnn, &one, w, weights, y, dy, convolution, backward_data, workspace,
               workspace_bytes, &zero, x, dx);
  }
  void run_backward_weights(cudnnHandle_t dnn, const float* from, const float* dy, float* dw) const {
    BATON_CALL(cudnnConvolutionBackwardFilter, dnn, &one, x, from, y, dy, convolution, backward_weights, workspace,
               workspace_bytes, &zero, w, dw);
  }
};

Convolution::Convolution(Device& device, Arena& arena, const ConvShape& s, int replicas)
    : shape_(s), replicas_(replicas) {
  if (s.out_height() < 1 || s.out_width() < 1 || s.batch < 1 || s.kernel < 1)
    throw InputError("convolution: input " + std::to_string(s.height) + "x" + std::to_string(s.width) + ", padding " +
                     std::to_string(s.pad) + ", has no output for a kernel of " + std::to_string(s.kernel));
  const cudnnHandle_t dnn = device.libraries().dnn;
  plan_ = std::make_unique<Plan>();
  plan_->describe(s);
  plan_->choose_algorithms(dnn);
  plan_->workspace = arena.take<char>(plan_->workspace_bytes);

  // Each once, on zeros: cuDNN may compile, load and allocate at a first call, which a capture would not survive.
  Arena scratch;
  float* x = scratch.take<float>(s.input_size());
  float* w = scratch.take<float>(s.weight_size());
  float* y = scratch.take<float>(s.output_size());
  plan_->run_forward(dnn, x, w, y);
  plan_->run_backward_data(dnn, y, w, x);
  plan_->run_backward_weights(dnn, x, y, w);
  device.synchronize();
}

Convolution::~Convolution() = default;
Convolution::Convolution(Convolution&&) noexcept = default;

void Convolution::forward(Device& device, Matrices x, Matrices w, MutableMatrices y) const {
  for (int r = 0; r < replicas_; r++)
    plan_->run_forward(device.libraries().dnn, x.data + r * x.stride, w.data + r * w.stride, y.data + r * y.stride);
}

void Convolution::backward_data(Device& device, Matrices dy, Matrices w, MutableMatrices dx) const {
  for (int r = 0; r < replicas_; r++)
    plan_->run_backward_data(device.libraries().dnn, dy.data + r * dy.stride, w.data + r * w.stride,
                             dx.data + r * dx.stride);
}

void Convolution::backward_weights(Device& device, Matrices x, Matrices dy, MutableMatrices dw) const {
  for (int r = 0; r < replicas_; r++)
    plan_->run_backward_weights(device.libraries().dnn, x.data + r * x.stride, dy.data + r * dy.stride,
                                dw.data + r * dw.stride);
}

}  // namespace baton
