// What the stand-in of cuDNN refuses.
#include "tests/ptx/cudnn_test.h"

namespace ptx::test {
namespace {

TEST(Cudnn, RefusesDescriptors) {
  const auto bad = CUDNN_STATUS_BAD_PARAM, unsupported = CUDNN_STATUS_NOT_SUPPORTED;
  const Shape s{2, 3, 9, 9, 5, 3, 3};
  Convolver c(s);
  c.list(forward);
  const auto run_with = [&](const Shape& described) {
    c.describe(described);
    return c.run(forward, product_of[forward]);
  };
  EXPECT_EQ(run_with(s), CUDNN_STATUS_SUCCESS);
  const auto tensor = [&](int n, int channels, int h, int w) {
    c.describe(s);
    EXPECT_EQ(cudnnSetTensor4dDescriptor(c.y_at, CUDNN_TENSOR_NCHW, CUDNN_DATA_FLOAT, n, channels, h, w),
              CUDNN_STATUS_SUCCESS);
    return c.run(forward, product_of[forward]);
  };
  EXPECT_REFUSED(tensor(3, 5, 7, 7), bad, "images of y and of x: 3, not 2");
  EXPECT_REFUSED(tensor(2, 4, 7, 7), bad, "channels of y and the filters of w: 4, not 5");
  EXPECT_REFUSED(tensor(2, 5, 8, 7), bad, "height of y and of the convolution's output: 8, not 7");
  EXPECT_REFUSED(tensor(2, 5, 7, 6), bad, "width of y and of the convolution's output: 6, not 7");
  const auto filter = [&](int channels, int size) {
    c.describe(s);
    EXPECT_EQ(cudnnSetFilter4dDescriptor(c.w_at, CUDNN_DATA_FLOAT, CUDNN_TENSOR_NCHW, 5, channels, size, size),
              CUDNN_STATUS_SUCCESS);
    return c.run(forward, product_of[forward]);
  };
  EXPECT_REFUSED(filter(4, 3), bad, "channels of w and of x: 4, not 3");
  EXPECT_REFUSED(filter(3, 10), bad, "the kernel is larger than the padded input");

  char words[200];
  cudnnGetLastErrorString(words, sizeof words);
  EXPECT_STREQ(words, "the kernel is larger than the padded input");
  cudnnGetLastErrorString(words, sizeof words);
  EXPECT_STREQ(words, "");
  EXPECT_STREQ(cudnnGetErrorString(bad), "CUDNN_STATUS_BAD_PARAM");
  EXPECT_STREQ(cudnnGetErrorString(CUDNN_STATUS_BAD_PARAM_NULL_POINTER), "CUDNN_STATUS_BAD_PARAM");
  EXPECT_EQ(cudnnGetVersion(), size_t(CUDNN_VERSION));

  EXPECT_REFUSED(cudnnSetTensor4dDescriptor(c.x_at, CUDNN_TENSOR_NHWC, CUDNN_DATA_FLOAT, 1, 1, 1, 1), unsupported,
                 "only floats in NCHW");
  EXPECT_REFUSED(cudnnSetTensor4dDescriptor(c.x_at, CUDNN_TENSOR_NCHW, CUDNN_DATA_HALF, 1, 1, 1, 1), unsupported,
                 "only floats in NCHW");
  EXPECT_REFUSED(cudnnSetTensor4dDescriptor(c.x_at, CUDNN_TENSOR_NCHW, CUDNN_DATA_FLOAT, 1, 0, 1, 1), bad, "c is 0");
  const auto set = [&](int pad, int stride, int dilation, cudnnConvolutionMode_t mode) {
    return cudnnSetConvolution2dDescriptor(c.convolution, pad, pad, stride, stride, dilation, dilation, mode,
                                           CUDNN_DATA_FLOAT);
  };
  EXPECT_REFUSED(set(-1, 1, 1, CUDNN_CROSS_CORRELATION), bad, "pad_h is -1");
  EXPECT_REFUSED(set(0, 0, 1, CUDNN_CROSS_CORRELATION), bad, "u is 0");
  EXPECT_REFUSED(set(0, 1, 2, CUDNN_CROSS_CORRELATION), unsupported, "dilation");
  EXPECT_REFUSED(set(0, 1, 1, CUDNN_CONVOLUTION), unsupported, "CUDNN_CROSS_CORRELATION");

  cudnnTensorDescriptor_t fresh = nullptr;
  ASSERT_EQ(cudnnCreateTensorDescriptor(&fresh), CUDNN_STATUS_SUCCESS);
  std::swap(fresh, c.y_at);
  EXPECT_REFUSED(c.run(forward, product_of[forward]), bad, "descriptor of y was never set");
  std::swap(fresh, c.y_at);
  ASSERT_EQ(cudnnDestroyTensorDescriptor(fresh), CUDNN_STATUS_SUCCESS);
  std::swap(fresh, c.y_at);
  EXPECT_REFUSED(c.run(forward, product_of[forward]), bad, "a tensor descriptor that does not exist");
  std::swap(fresh, c.y_at);
  cudnnHandle_t other = nullptr;
  ASSERT_EQ(cudnnCreate(&other), CUDNN_STATUS_SUCCESS);
  ASSERT_EQ(cudnnDestroy(other), CUDNN_STATUS_SUCCESS);
  EXPECT_REFUSED(cudnnSetStream(other, nullptr), bad, "a cuDNN handle that does not exist");
}

TEST(Cudnn, RefusesArguments) {
  const auto bad = CUDNN_STATUS_BAD_PARAM;
  Convolver c({2, 3, 9, 9, 5, 3, 3});
  const auto run = [&](int algorithm, float* x, float* y, void* workspace, size_t bytes) {
    return c.run(forward, algorithm, x, c.w, y, workspace, bytes);
  };
  constexpr int gemm = CUDNN_CONVOLUTION_FWD_ALGO_GEMM;
  // Shapes of its own, for what was offered is remembered by the process.
  Convolver unknown({2, 3, 9, 11, 5, 3, 3});
  EXPECT_REFUSED(unknown.run(forward, gemm), CUDNN_STATUS_NOT_SUPPORTED, "was never offered");
  unknown.list(forward, 1);
  EXPECT_REFUSED(unknown.run(forward, gemm), CUDNN_STATUS_NOT_SUPPORTED, "was never offered");
  EXPECT_REFUSED(unknown.run(forward, product_of[forward]), CUDNN_STATUS_NOT_SUPPORTED, "for another math type");

  size_t memory = 0;
  for (const Choice& choice : c.list(forward))
    if (choice.algorithm == gemm) memory = choice.memory;
  ASSERT_GT(memory, 0u);
  EXPECT_REFUSED(c.run(forward, CUDNN_CONVOLUTION_FWD_ALGO_DIRECT), CUDNN_STATUS_NOT_SUPPORTED, "was never offered");
  EXPECT_EQ(run(gemm, c.x, c.y, c.workspace, memory), CUDNN_STATUS_SUCCESS);
  EXPECT_EQ(run(CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM, c.x, c.y, nullptr, 0), CUDNN_STATUS_SUCCESS);
  EXPECT_REFUSED(run(gemm, c.x, c.y, c.workspace, memory - 1), bad, "a workspace of .* bytes, but algorithm 2 wants");
  EXPECT_REFUSED(run(gemm, c.x, c.y, c.workspace + 4, memory), bad, "aligned to 16 bytes");
  EXPECT_REFUSED(run(gemm, c.x, c.x, c.workspace, memory), bad, "y overlaps x");
  EXPECT_REFUSED(run(gemm, c.x, c.y, c.y, memory), bad, "the workspace overlaps y");
  EXPECT_REFUSED(cudnnConvolutionForward(c.handle, c.x, c.x_at, c.x, c.w_at, c.w, c.convolution,
                                         cudnnConvolutionFwdAlgo_t(gemm), c.workspace, memory, &c.beta, c.y_at, c.y),
                 bad, "alpha is a pointer to device memory");
  int count = 0;
  cudnnConvolutionFwdAlgoPerf_t one{};
  EXPECT_REFUSED(
      cudnnGetConvolutionForwardAlgorithm_v7(c.handle, c.x_at, c.w_at, c.convolution, c.y_at, 0, &count, &one), bad,
      "requestedAlgoCount is 0");
}

TEST(CudnnDeathTest, FaultsThatStay) {
  const auto fails = [](const char* words, auto body) {
    expect_in_child(
        [&] {
          Convolver c({2, 3, 9, 9, 5, 3, 3});
          c.list(forward);
          body(c, [&](float* x, float* y, void* workspace) {
            EXPECT_EQ(c.run(forward, product_of[forward], x, c.w, y, workspace, c.workspace_bytes),
                      CUDNN_STATUS_EXECUTION_FAILED);
            EXPECT_EQ(cudnnSetStream(c.handle, nullptr), CUDNN_STATUS_EXECUTION_FAILED);
          });
        },
        words);
  };
  fails("cudnnConvolutionForward 2x3x9x9 to 5.*: x .* is read but was never written", [](auto& c, auto call) {
    const Array<float> unwritten(c.s.x_size());
    call(unwritten, c.y, c.workspace);
  });
  fails("y .* bytes, but its allocation ends after", [](auto& c, auto call) {
    const Array<float> small(c.s.y_size() - 1);
    call(c.x, small, c.workspace);
  });
  fails("x .* is not an address of the device", [](auto& c, auto call) { call(c.host_x.data(), c.y, c.workspace); });
  fails("the workspace .* is not an address of the device", [](auto& c, auto call) {
    static std::vector<double> host(1 << 19);
    call(c.x, c.y, host.data());
  });
  fails("y .* is read but was never written", [](auto& c, auto call) {
    const Array<float> unwritten(c.s.y_size());
    c.beta = 1;
    call(c.x, unwritten, c.workspace);
  });
}

}  // namespace
}  // namespace ptx::test
