// What the tests of the stand-in of cuDNN share: a convolution with its descriptors and tensors, and plain loops.
#pragma once
#include <cudnn.h>

#include <algorithm>
#include <cmath>

#include "tests/ptx/libraries_test.h"

namespace ptx::test {

struct Shape {
  int batch, channels, height, width, filters, kernel_height, kernel_width, pad_h = 0, pad_w = 0, stride_h = 1,
                                                                            stride_w = 1;
  int out_height() const { return (height + 2 * pad_h - kernel_height) / stride_h + 1; }
  int out_width() const { return (width + 2 * pad_w - kernel_width) / stride_w + 1; }
  size_t x_size() const { return size_t(batch) * channels * height * width; }
  size_t w_size() const { return size_t(filters) * channels * kernel_height * kernel_width; }
  size_t y_size() const { return size_t(batch) * filters * out_height() * out_width(); }
};

enum Direction { forward, data_gradient, weight_gradient };

struct Choice {
  int algorithm;
  cudnnStatus_t status;
  cudnnDeterminism_t determinism;
  cudnnMathType_t math;
  size_t memory;
};

// The plain loops: result += every product of the convolution, in double.
inline std::vector<double> reference(const Shape& s, Direction direction, const std::vector<float>& x,
                                     const std::vector<float>& w, const std::vector<float>& y) {
  std::vector<double> result(direction == forward ? s.y_size() : direction == data_gradient ? s.x_size() : s.w_size());
  size_t iy = 0;
  for (int n = 0; n < s.batch; n++)
    for (int f = 0; f < s.filters; f++)
      for (int oy = 0; oy < s.out_height(); oy++)
        for (int ox = 0; ox < s.out_width(); ox++, iy++)
          for (int c = 0; c < s.channels; c++)
            for (int r = 0; r < s.kernel_height; r++)
              for (int q = 0; q < s.kernel_width; q++) {
                const int row = oy * s.stride_h + r - s.pad_h, column = ox * s.stride_w + q - s.pad_w;
                if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
                const size_t ix = ((size_t(n) * s.channels + c) * s.height + row) * s.width + column;
                const size_t iw = ((size_t(f) * s.channels + c) * s.kernel_height + r) * s.kernel_width + q;
                if (direction == forward) result[iy] += double(x[ix]) * w[iw];
                if (direction == data_gradient) result[ix] += double(w[iw]) * y[iy];
                if (direction == weight_gradient) result[iw] += double(x[ix]) * y[iy];
              }
  return result;
}

// A convolution's descriptors, and its tensors on the device.
struct Convolver {
  Shape s;
  cudnnHandle_t handle = nullptr;
  cudnnTensorDescriptor_t x_at = nullptr, y_at = nullptr;
  cudnnFilterDescriptor_t w_at = nullptr;
  cudnnConvolutionDescriptor_t convolution = nullptr;
  std::vector<float> host_x, host_w, host_y;
  Array<float> x, w, y;
  Array<char> workspace{size_t(1) << 22};
  size_t workspace_bytes = size_t(1) << 22;
  float alpha = 1, beta = 0;

  explicit Convolver(const Shape& shape, std::vector<float> (*fill)(size_t, int) = normals<float>)
      : s(shape),
        host_x(fill(s.x_size(), 1)),
        host_w(fill(s.w_size(), 2)),
        host_y(fill(s.y_size(), 3)),
        x(host_x),
        w(host_w),
        y(host_y) {
    EXPECT_EQ(cudnnCreate(&handle), CUDNN_STATUS_SUCCESS);
    EXPECT_EQ(cudnnCreateTensorDescriptor(&x_at), CUDNN_STATUS_SUCCESS);
    EXPECT_EQ(cudnnCreateTensorDescriptor(&y_at), CUDNN_STATUS_SUCCESS);
    EXPECT_EQ(cudnnCreateFilterDescriptor(&w_at), CUDNN_STATUS_SUCCESS);
    EXPECT_EQ(cudnnCreateConvolutionDescriptor(&convolution), CUDNN_STATUS_SUCCESS);
    describe(s);
    EXPECT_EQ(cudnnSetConvolutionMathType(convolution, CUDNN_FMA_MATH), CUDNN_STATUS_SUCCESS);
  }
  ~Convolver() {
    cudnnDestroyConvolutionDescriptor(convolution);
    cudnnDestroyFilterDescriptor(w_at);
    cudnnDestroyTensorDescriptor(y_at);
    cudnnDestroyTensorDescriptor(x_at);
    cudnnDestroy(handle);
  }
  void describe(const Shape& d) {
    EXPECT_EQ(
        cudnnSetTensor4dDescriptor(x_at, CUDNN_TENSOR_NCHW, CUDNN_DATA_FLOAT, d.batch, d.channels, d.height, d.width),
        CUDNN_STATUS_SUCCESS);
    EXPECT_EQ(cudnnSetTensor4dDescriptor(y_at, CUDNN_TENSOR_NCHW, CUDNN_DATA_FLOAT, d.batch, d.filters, d.out_height(),
                                         d.out_width()),
              CUDNN_STATUS_SUCCESS);
    EXPECT_EQ(cudnnSetFilter4dDescriptor(w_at, CUDNN_DATA_FLOAT, CUDNN_TENSOR_NCHW, d.filters, d.channels,
                                         d.kernel_height, d.kernel_width),
              CUDNN_STATUS_SUCCESS);
    EXPECT_EQ(cudnnSetConvolution2dDescriptor(convolution, d.pad_h, d.pad_w, d.stride_h, d.stride_w, 1, 1,
                                              CUDNN_CROSS_CORRELATION, CUDNN_DATA_FLOAT),
              CUDNN_STATUS_SUCCESS);
  }

  std::vector<Choice> list(Direction direction, int requested = 20) {
    const auto choices = [&](auto performance, auto call) {
      std::vector<decltype(performance)> results(requested);
      int count = 0;
      EXPECT_EQ(call(&count, results.data()), CUDNN_STATUS_SUCCESS);
      std::vector<Choice> found;
      for (int i = 0; i < count; i++) {
        const auto& r = results[i];
        found.push_back({r.algo, r.status, r.determinism, r.mathType, r.memory});
      }
      return found;
    };
    if (direction == forward)
      return choices(cudnnConvolutionFwdAlgoPerf_t{}, [&](int* count, auto* results) {
        return cudnnGetConvolutionForwardAlgorithm_v7(handle, x_at, w_at, convolution, y_at, requested, count, results);
      });
    if (direction == data_gradient)
      return choices(cudnnConvolutionBwdDataAlgoPerf_t{}, [&](int* count, auto* results) {
        return cudnnGetConvolutionBackwardDataAlgorithm_v7(handle, w_at, y_at, convolution, x_at, requested, count,
                                                           results);
      });
    return choices(cudnnConvolutionBwdFilterAlgoPerf_t{}, [&](int* count, auto* results) {
      return cudnnGetConvolutionBackwardFilterAlgorithm_v7(handle, x_at, y_at, convolution, w_at, requested, count,
                                                           results);
    });
  }

  cudnnStatus_t run(Direction direction, int algorithm) {
    return run(direction, algorithm, x, w, y, workspace, workspace_bytes);
  }
  cudnnStatus_t run(Direction direction, int algorithm, float* xs, float* ws, float* ys, void* work,
                    size_t work_bytes) {
    if (direction == forward)
      return cudnnConvolutionForward(handle, &alpha, x_at, xs, w_at, ws, convolution,
                                     cudnnConvolutionFwdAlgo_t(algorithm), work, work_bytes, &beta, y_at, ys);
    if (direction == data_gradient)
      return cudnnConvolutionBackwardData(handle, &alpha, w_at, ws, y_at, ys, convolution,
                                          cudnnConvolutionBwdDataAlgo_t(algorithm), work, work_bytes, &beta, x_at, xs);
    return cudnnConvolutionBackwardFilter(handle, &alpha, x_at, xs, y_at, ys, convolution,
                                          cudnnConvolutionBwdFilterAlgo_t(algorithm), work, work_bytes, &beta, w_at,
                                          ws);
  }
  std::vector<float> result(Direction direction) const {
    return direction == forward ? y.host() : direction == data_gradient ? x.host() : w.host();
  }
  std::vector<double> wanted(Direction direction) const { return reference(s, direction, host_x, host_w, host_y); }
};

// The largest error, relative to the largest element.
inline double error_of(const std::vector<float>& found, const std::vector<double>& wanted) {
  EXPECT_EQ(found.size(), wanted.size());
  double error = 0, scale = 0;
  for (size_t i = 0; i < found.size(); i++) {
    error = std::max(error, std::fabs(found[i] - wanted[i]));
    scale = std::max(scale, std::fabs(wanted[i]));
  }
  return error / scale;
}

inline constexpr int product_of[] = {CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM,
                                     CUDNN_CONVOLUTION_BWD_DATA_ALGO_1, CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1};
inline constexpr int winograd_of[] = {CUDNN_CONVOLUTION_FWD_ALGO_WINOGRAD_NONFUSED,
                                      CUDNN_CONVOLUTION_BWD_DATA_ALGO_WINOGRAD_NONFUSED,
                                      CUDNN_CONVOLUTION_BWD_FILTER_ALGO_WINOGRAD_NONFUSED};
inline constexpr Direction directions[] = {forward, data_gradient, weight_gradient};

}  // namespace ptx::test
