// The cuDNN functions that Baton calls (libcudnn.so.9): convolutions of float tensors in NCHW, by OpenBLAS.
//
// Refused is what the documentation forbids: descriptors that do not exist, were not set or do not fit each other,
// algorithms that the heuristics did not offer for the problem, a workspace smaller than they asked for, operands
// outside an allocation or never written, outputs that overlap. And a convolution that is captured before it ever ran:
// cuDNN may compile, load and allocate at a first call. Tensors need the alignment of a float only.
//
// Winograd and FFT have their real errors, of both signs and also where the result is exactly 0; non-deterministic
// algorithms give other last bits at every call; under a descriptor that allows tensor cores operands are rounded to
// tf32 (CUDNN_DEFAULT_MATH allows them too).
#include <cudnn.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "tests/ptx/cudnn_algorithms.h"
#include "tests/ptx/library.h"
#include "tests/ptx/matrices.h"
#include "tests/ptx/options.h"
#include "tests/ptx/tf32.h"

struct cudnnContext {
  cudaStream_t stream = nullptr;
};
struct cudnnTensorStruct {
  bool set = false;
  int n, c, h, w;
};
struct cudnnFilterStruct {
  bool set = false;
  int k, c, h, w;
};
struct cudnnConvolutionStruct {
  bool set = false;
  int pad_h, pad_w, stride_h, stride_w;
  cudnnMathType_t math = CUDNN_DEFAULT_MATH;
};

namespace ptx {

namespace {

constexpr Statuses<cudnnStatus_t> statuses{CUDNN_STATUS_SUCCESS, CUDNN_STATUS_BAD_PARAM, CUDNN_STATUS_NOT_SUPPORTED,
                                           CUDNN_STATUS_EXECUTION_FAILED};
constexpr size_t workspace_alignment = 16;
constexpr float transform_error = 1e-6f, disturbed_error = 4 * 0x1p-24f, atomics_error = 2 * 0x1p-24f;

std::string& last_words() {
  static auto* words = new std::string;
  return *words;
}
template <class Body>
cudnnStatus_t attempt(const char* call, Body body) {
  return attempt(statuses, call, body, &last_words());
}

Handles<cudnnContext>& handles() {
  static auto* all = new Handles<cudnnContext>("cuDNN handle");
  return *all;
}
Handles<cudnnTensorStruct>& tensors() {
  static auto* all = new Handles<cudnnTensorStruct>("tensor descriptor");
  return *all;
}
Handles<cudnnFilterStruct>& filters() {
  static auto* all = new Handles<cudnnFilterStruct>("filter descriptor");
  return *all;
}
Handles<cudnnConvolutionStruct>& convolutions() {
  static auto* all = new Handles<cudnnConvolutionStruct>("convolution descriptor");
  return *all;
}
template <class T>
const T& find_set(const Handles<T>& all, T* descriptor, const char* name) {
  const T& found = all.find(descriptor);
  if (!found.set) refuse(std::string("the descriptor of ") + name + " was never set");
  return found;
}

void check_positive(std::initializer_list<std::pair<const char*, int>> extents) {
  for (const auto& [name, extent] : extents)
    if (extent < 1) refuse(std::string(name) + " is " + std::to_string(extent));
}
void check_equal(const char* what, int found, int expected) {
  if (found != expected) refuse(std::string(what) + ": " + std::to_string(found) + ", not " + std::to_string(expected));
}

struct Descriptors {
  cudnnTensorDescriptor_t x;
  cudnnFilterDescriptor_t w;
  cudnnConvolutionDescriptor_t convolution;
  cudnnTensorDescriptor_t y;
};

// The shape that they describe together. In a gradient's call x and dx are described alike, and so are w and y.
ConvolutionShape shape_of(const Descriptors& d) {
  const cudnnTensorStruct &x = find_set(tensors(), d.x, "x"), &y = find_set(tensors(), d.y, "y");
  const cudnnFilterStruct& w = find_set(filters(), d.w, "w");
  const cudnnConvolutionStruct& c = find_set(convolutions(), d.convolution, "the convolution");
  const ConvolutionShape s{x.n, x.c, x.h, x.w, w.k, w.h, w.w, c.pad_h, c.pad_w, c.stride_h, c.stride_w};
  check_equal("the channels of w and of x", w.c, x.c);
  check_equal("the images of y and of x", y.n, x.n);
  check_equal("the channels of y and the filters of w", y.c, w.k);
  if (x.h + 2 * c.pad_h < w.h || x.w + 2 * c.pad_w < w.w) refuse("the kernel is larger than the padded input");
  check_equal("the height of y and of the convolution's output", y.h, s.out_height());
  check_equal("the width of y and of the convolution's output", y.w, s.out_width());
  return s;
}

template <class Performance>
cudnnStatus_t list_algorithms(const char* call, cudnnHandle_t handle, Direction direction, const Descriptors& d,
                              int requested, int* returned, Performance* results) {
  return attempt(call, [&] {
    handles().find(handle);
    const Problem problem{direction, shape_of(d)};
    if (requested < 1) refuse("requestedAlgoCount is " + std::to_string(requested));
    if (!returned || !results) refuse("a null pointer to the results");
    *returned = 0;
    for (const Candidate& c : offer(problem, requested)) {
      Performance& p = results[(*returned)++];
      p = {};
      p.algo = static_cast<decltype(p.algo)>(c.algorithm);
      p.status = c.status;
      p.time = c.milliseconds;
      p.memory = c.memory;
      p.determinism = c.exactness == Exactness::atomics ? CUDNN_NON_DETERMINISTIC : CUDNN_DETERMINISTIC;
      p.mathType = c.math;
    }
  });
}

struct Tensor {
  const char* name;
  const void* data;
  size_t size;

  Region region() const {
    return {reinterpret_cast<uint64_t>(data), sizeof(float), (long long)size, 1, (long long)size};
  }
  const float* read() const { return DeviceMemory::instance().read(static_cast<const float*>(data), size, name); }
  float* write() const {
    return DeviceMemory::instance().write(static_cast<float*>(const_cast<void*>(data)), size, name);
  }
};

// result = alpha * convolution + beta * result, where the result is y, dx or dw by the direction.
struct Execution {
  Problem problem;
  Candidate candidate;
  cudnnMathType_t math;  // the descriptor's
  float alpha, beta;
  Tensor x, w, y;
  Workspace workspace;

  const Tensor& result() const {
    return problem.direction == Direction::forward ? y : problem.direction == Direction::data_gradient ? x : w;
  }
  bool is_input(const Tensor& t) const { return &t != &result(); }

  void check() const {
    for (const Tensor* t : {&x, &w, &y}) {
      if (is_input(*t)) check_apart(result().name, result().region(), t->name, t->region());
      check_apart("the workspace", Region(workspace), t->name, t->region());
    }
    if (candidate.memory && reinterpret_cast<uint64_t>(workspace.data) % workspace_alignment != 0)
      refuse("the workspace is not aligned to " + std::to_string(workspace_alignment) + " bytes");
  }

  void run() const {
    overwrite(workspace);
    std::vector<float> rounded_x, rounded_w, rounded_y;
    const float* xs = is_input(x) ? operand(x, rounded_x) : nullptr;
    const float* ws = is_input(w) ? operand(w, rounded_w) : nullptr;
    const float* ys = is_input(y) ? operand(y, rounded_y) : nullptr;
    if (beta != 0) result().read();
    float* target = result().write();

    const size_t size = result().size;
    const bool plain = alpha == 1 && beta == 0;
    std::vector<float> sum(plain ? 0 : size);
    float* to = plain ? target : sum.data();
    switch (problem.direction) {
      case Direction::forward:
        convolve(problem.shape, xs, ws, to);
        break;
      case Direction::data_gradient:
        convolve_data_gradient(problem.shape, ws, ys, to);
        break;
      case Direction::weight_gradient:
        convolve_weight_gradient(problem.shape, xs, ys, to);
        break;
    }
    static uint64_t calls = 0;
    if (candidate.exactness == Exactness::transform) add_errors(to, size, transform_error, 0);
    if (candidate.exactness == Exactness::atomics) add_errors(to, size, atomics_error, ++calls);
    if (options().disturb_convolutions) add_errors(to, size, disturbed_error, candidate.algorithm);
    if (plain) return;
    for (size_t i = 0; i < size; i++) target[i] = alpha * to[i] + (beta == 0 ? 0 : beta * target[i]);
  }

  const float* operand(const Tensor& t, std::vector<float>& rounded) const {
    const float* values = t.read();
    if (math == CUDNN_FMA_MATH) return values;
    rounded.assign(values, values + t.size);
    round_to_tf32(rounded.data(), t.size);
    return rounded.data();
  }
};

cudnnStatus_t execute(const char* call, cudnnHandle_t handle, Direction direction, int algorithm, const void* alpha,
                      const void* beta, const Descriptors& d, const void* x, const void* w, const void* y,
                      void* workspace, size_t workspace_bytes) {
  bool refused = false;
  const auto prepare = [&]() -> Submission {
    const cudaStream_t stream = handles().find(handle).stream;
    const ConvolutionShape s = shape_of(d);
    const cudnnMathType_t math = convolutions().find(d.convolution).math;
    const Problem problem{direction, s};
    const Candidate candidate = offered(problem, algorithm, math);
    if (workspace_bytes < candidate.memory)
      refuse("a workspace of " + std::to_string(workspace_bytes) + " bytes, but algorithm " +
             std::to_string(algorithm) + " wants " + std::to_string(candidate.memory));
    const Execution e{.problem = problem,
                      .candidate = candidate,
                      .math = math,
                      .alpha = host_scalar<float>("alpha", alpha),
                      .beta = host_scalar<float>("beta", beta),
                      .x = {direction == Direction::data_gradient ? "dx" : "x", x, s.input_size()},
                      .w = {direction == Direction::weight_gradient ? "dw" : "w", w, s.kernel_size()},
                      .y = {direction == Direction::forward ? "y" : "dy", y, s.output_size()},
                      .workspace = {workspace, candidate.memory}};
    e.check();
    if (is_capturing(stream) && !has_run(problem, algorithm, math))
      refuse("algorithm " + std::to_string(algorithm) + " for " + s.text() +
             " is captured before it ever ran. At a first call cuDNN may compile, load and allocate, which a capture "
             "does not survive");
    if (refused_under_disturbance(problem, algorithm)) {
      refused = true;
      return {};
    }
    const auto run = [e] {
      try {
        e.run();
      } catch (const Fault& fault) {
        last_words() = fault.what();
        throw;
      }
      note_run(e.problem, e.candidate.algorithm, e.math);
    };
    const double bytes = double(sizeof(float)) * double(s.input_size() + s.kernel_size() + s.output_size());
    return {stream,
            {std::string(call) + " " + s.text() + ", algorithm " + std::to_string(algorithm), run, {s.flops(), bytes}}};
  };
  const cudnnStatus_t status = attempt_operation(statuses, call, prepare, &last_words());
  if (!refused) return status;
  last_words() = "algorithm " + std::to_string(algorithm) + " is refused, as BATON_PTX_DISTURB=unsupported asks";
  return CUDNN_STATUS_NOT_SUPPORTED;  // no fault of the program, which may try another algorithm
}

}  // namespace
}  // namespace ptx

using namespace ptx;

extern "C" {

// ------------------------------------------------------------------------------------------------ handle and errors
cudnnStatus_t cudnnCreate(cudnnHandle_t* handle) {
  return attempt("cudnnCreate", [&] {
    forbid_while_capturing("it allocates");
    handles().create(handle);
  });
}
cudnnStatus_t cudnnDestroy(cudnnHandle_t handle) {
  return attempt("cudnnDestroy", [&] {
    forbid_while_capturing("it waits for the device");
    handles().destroy(handle);
  });
}
cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
  return attempt("cudnnSetStream", [&] {
    cudnnContext& h = handles().find(handle);
    check_stream(stream);
    h.stream = stream;
  });
}
size_t cudnnGetVersion(void) { return CUDNN_VERSION; }

const char* cudnnGetErrorString(cudnnStatus_t status) {
  switch (CUDNN_STATUS_CATEGORY(status)) {
    case CUDNN_STATUS_SUCCESS:
      return "CUDNN_STATUS_SUCCESS";
    case CUDNN_STATUS_NOT_INITIALIZED:
      return "CUDNN_STATUS_NOT_INITIALIZED";
    case CUDNN_STATUS_BAD_PARAM:
      return "CUDNN_STATUS_BAD_PARAM";
    case CUDNN_STATUS_NOT_SUPPORTED:
      return "CUDNN_STATUS_NOT_SUPPORTED";
    case CUDNN_STATUS_INTERNAL_ERROR:
      return "CUDNN_STATUS_INTERNAL_ERROR";
    case CUDNN_STATUS_EXECUTION_FAILED:
      return "CUDNN_STATUS_EXECUTION_FAILED";
  }
  return "CUDNN_UNKNOWN_STATUS";
}
// The message is given once, as by the real function.
void cudnnGetLastErrorString(char* message, size_t size) {
  if (!message || size == 0) return;
  std::snprintf(message, size, "%s", last_words().c_str());
  last_words().clear();
}

// ------------------------------------------------------------------------------------------------------- descriptors
cudnnStatus_t cudnnCreateTensorDescriptor(cudnnTensorDescriptor_t* descriptor) {
  return attempt("cudnnCreateTensorDescriptor", [&] { tensors().create(descriptor); });
}
cudnnStatus_t cudnnDestroyTensorDescriptor(cudnnTensorDescriptor_t descriptor) {
  return attempt("cudnnDestroyTensorDescriptor", [&] { tensors().destroy(descriptor); });
}
cudnnStatus_t cudnnCreateFilterDescriptor(cudnnFilterDescriptor_t* descriptor) {
  return attempt("cudnnCreateFilterDescriptor", [&] { filters().create(descriptor); });
}
cudnnStatus_t cudnnDestroyFilterDescriptor(cudnnFilterDescriptor_t descriptor) {
  return attempt("cudnnDestroyFilterDescriptor", [&] { filters().destroy(descriptor); });
}
cudnnStatus_t cudnnCreateConvolutionDescriptor(cudnnConvolutionDescriptor_t* descriptor) {
  return attempt("cudnnCreateConvolutionDescriptor", [&] { convolutions().create(descriptor); });
}
cudnnStatus_t cudnnDestroyConvolutionDescriptor(cudnnConvolutionDescriptor_t descriptor) {
  return attempt("cudnnDestroyConvolutionDescriptor", [&] { convolutions().destroy(descriptor); });
}

cudnnStatus_t cudnnSetTensor4dDescriptor(cudnnTensorDescriptor_t descriptor, cudnnTensorFormat_t format,
                                         cudnnDataType_t type, int n, int c, int h, int w) {
  return attempt("cudnnSetTensor4dDescriptor", [&] {
    cudnnTensorStruct& t = tensors().find(descriptor);
    if (format != CUDNN_TENSOR_NCHW || type != CUDNN_DATA_FLOAT) not_supported("only floats in NCHW are known here");
    check_positive({{"n", n}, {"c", c}, {"h", h}, {"w", w}});
    t = {true, n, c, h, w};
  });
}
cudnnStatus_t cudnnSetFilter4dDescriptor(cudnnFilterDescriptor_t descriptor, cudnnDataType_t type,
                                         cudnnTensorFormat_t format, int k, int c, int h, int w) {
  return attempt("cudnnSetFilter4dDescriptor", [&] {
    cudnnFilterStruct& f = filters().find(descriptor);
    if (format != CUDNN_TENSOR_NCHW || type != CUDNN_DATA_FLOAT) not_supported("only floats in NCHW are known here");
    check_positive({{"k", k}, {"c", c}, {"h", h}, {"w", w}});
    f = {true, k, c, h, w};
  });
}
cudnnStatus_t cudnnSetConvolution2dDescriptor(cudnnConvolutionDescriptor_t descriptor, int pad_h, int pad_w,
                                              int stride_h, int stride_w, int dilation_h, int dilation_w,
                                              cudnnConvolutionMode_t mode, cudnnDataType_t type) {
  return attempt("cudnnSetConvolution2dDescriptor", [&] {
    cudnnConvolutionStruct& c = convolutions().find(descriptor);
    check_not_negative("pad_h", pad_h);
    check_not_negative("pad_w", pad_w);
    check_positive({{"u", stride_h}, {"v", stride_w}, {"dilation_h", dilation_h}, {"dilation_w", dilation_w}});
    if (dilation_h != 1 || dilation_w != 1) not_supported("only dilation 1 is known here");
    if (mode != CUDNN_CROSS_CORRELATION) not_supported("only CUDNN_CROSS_CORRELATION is known here");
    if (type != CUDNN_DATA_FLOAT) not_supported("only sums in float are known here");
    c = {true, pad_h, pad_w, stride_h, stride_w, c.math};
  });
}
cudnnStatus_t cudnnSetConvolutionMathType(cudnnConvolutionDescriptor_t descriptor, cudnnMathType_t math) {
  return attempt("cudnnSetConvolutionMathType", [&] {
    cudnnConvolutionStruct& c = convolutions().find(descriptor);
    if (math < CUDNN_DEFAULT_MATH || math > CUDNN_FMA_MATH) refuse("no math type: " + std::to_string(math));
    c.math = math;
  });
}

// ------------------------------------------------------------------------------------------------------ convolutions
cudnnStatus_t cudnnGetConvolutionForwardAlgorithm_v7(cudnnHandle_t handle, const cudnnTensorDescriptor_t x,
                                                     const cudnnFilterDescriptor_t w,
                                                     const cudnnConvolutionDescriptor_t convolution,
                                                     const cudnnTensorDescriptor_t y, const int requested,
                                                     int* returned, cudnnConvolutionFwdAlgoPerf_t* results) {
  return list_algorithms("cudnnGetConvolutionForwardAlgorithm_v7", handle, Direction::forward, {x, w, convolution, y},
                         requested, returned, results);
}
cudnnStatus_t cudnnGetConvolutionBackwardDataAlgorithm_v7(cudnnHandle_t handle, const cudnnFilterDescriptor_t w,
                                                          const cudnnTensorDescriptor_t dy,
                                                          const cudnnConvolutionDescriptor_t convolution,
                                                          const cudnnTensorDescriptor_t dx, const int requested,
                                                          int* returned, cudnnConvolutionBwdDataAlgoPerf_t* results) {
  return list_algorithms("cudnnGetConvolutionBackwardDataAlgorithm_v7", handle, Direction::data_gradient,
                         {dx, w, convolution, dy}, requested, returned, results);
}
cudnnStatus_t cudnnGetConvolutionBackwardFilterAlgorithm_v7(cudnnHandle_t handle, const cudnnTensorDescriptor_t x,
                                                            const cudnnTensorDescriptor_t dy,
                                                            const cudnnConvolutionDescriptor_t convolution,
                                                            const cudnnFilterDescriptor_t dw, const int requested,
                                                            int* returned,
                                                            cudnnConvolutionBwdFilterAlgoPerf_t* results) {
  return list_algorithms("cudnnGetConvolutionBackwardFilterAlgorithm_v7", handle, Direction::weight_gradient,
                         {x, dw, convolution, dy}, requested, returned, results);
}

cudnnStatus_t cudnnConvolutionForward(cudnnHandle_t handle, const void* alpha, const cudnnTensorDescriptor_t x_at,
                                      const void* x, const cudnnFilterDescriptor_t w_at, const void* w,
                                      const cudnnConvolutionDescriptor_t convolution,
                                      cudnnConvolutionFwdAlgo_t algorithm, void* workspace, size_t workspace_bytes,
                                      const void* beta, const cudnnTensorDescriptor_t y_at, void* y) {
  return execute("cudnnConvolutionForward", handle, Direction::forward, algorithm, alpha, beta,
                 {x_at, w_at, convolution, y_at}, x, w, y, workspace, workspace_bytes);
}
cudnnStatus_t cudnnConvolutionBackwardData(cudnnHandle_t handle, const void* alpha, const cudnnFilterDescriptor_t w_at,
                                           const void* w, const cudnnTensorDescriptor_t dy_at, const void* dy,
                                           const cudnnConvolutionDescriptor_t convolution,
                                           cudnnConvolutionBwdDataAlgo_t algorithm, void* workspace,
                                           size_t workspace_bytes, const void* beta,
                                           const cudnnTensorDescriptor_t dx_at, void* dx) {
  return execute("cudnnConvolutionBackwardData", handle, Direction::data_gradient, algorithm, alpha, beta,
                 {dx_at, w_at, convolution, dy_at}, dx, w, dy, workspace, workspace_bytes);
}
cudnnStatus_t cudnnConvolutionBackwardFilter(cudnnHandle_t handle, const void* alpha,
                                             const cudnnTensorDescriptor_t x_at, const void* x,
                                             const cudnnTensorDescriptor_t dy_at, const void* dy,
                                             const cudnnConvolutionDescriptor_t convolution,
                                             cudnnConvolutionBwdFilterAlgo_t algorithm, void* workspace,
                                             size_t workspace_bytes, const void* beta,
                                             const cudnnFilterDescriptor_t dw_at, void* dw) {
  return execute("cudnnConvolutionBackwardFilter", handle, Direction::weight_gradient, algorithm, alpha, beta,
                 {x_at, dw_at, convolution, dy_at}, x, dw, dy, workspace, workspace_bytes);
}

}  // extern "C"
