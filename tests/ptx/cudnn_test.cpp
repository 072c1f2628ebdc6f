// The stand-in of cuDNN: convolutions against plain loops in double, its table of algorithms, and its disturbances.
#include "tests/ptx/cudnn_test.h"

#include "tests/ptx/stream.h"

namespace ptx::test {
namespace {

TEST(Cudnn, ConvolutionsOfAllShapes) {
  const Shape shapes[] = {
      {1, 1, 1, 1, 1, 1, 1},        {3, 2, 7, 5, 4, 3, 2},         {130, 1, 12, 12, 3, 5, 5},
      {2, 3, 9, 9, 5, 3, 3, 1, 1},  {2, 3, 6, 8, 5, 5, 3, 2, 1},   {2, 2, 11, 9, 3, 3, 4, 1, 2, 2, 3},
      {2, 2, 3, 3, 2, 5, 5, 2, 2},  {5, 4, 2, 2, 600, 3, 3, 1, 1}, {2, 2, 4, 4, 2, 1, 1, 0, 3, 4, 4},
      {1, 2, 40, 40, 3, 5, 5, 2, 2}};
  for (const Shape& s : shapes)
    for (const Direction d : directions) {
      SCOPED_TRACE(testing::Message() << s.height << "x" << s.width << " kernel " << s.kernel_height << "x"
                                      << s.kernel_width << " direction " << d);
      Convolver exact(s, small_integers), c(s);
      exact.list(d);
      ASSERT_EQ(exact.run(d, product_of[d]), CUDNN_STATUS_SUCCESS);
      EXPECT_EQ(error_of(exact.result(d), exact.wanted(d)), 0);
      ASSERT_EQ(c.run(d, product_of[d]), CUDNN_STATUS_SUCCESS);
      const std::vector<float> first = c.result(d);
      EXPECT_LT(error_of(first, c.wanted(d)), 1e-6);
    }
}

TEST(Cudnn, TheSameBitsAtEveryCall) {
  for (const Direction d : directions) {
    Convolver c({9, 3, 12, 12, 7, 5, 5}), other({9, 3, 12, 12, 7, 5, 5});
    c.list(d);
    for (const int algorithm : {product_of[d], winograd_of[d]}) {
      ASSERT_EQ(c.run(d, algorithm), CUDNN_STATUS_SUCCESS);
      ASSERT_EQ(other.run(d, algorithm), CUDNN_STATUS_SUCCESS);
      EXPECT_EQ(c.result(d), other.result(d));
    }
  }
}

TEST(Cudnn, ScalesAndAccumulates) {
  for (const Direction d : directions) {
    Convolver c({2, 3, 9, 9, 5, 3, 3, 1, 1}, small_integers);
    c.list(d);
    c.alpha = 2;
    c.beta = -3;
    std::vector<double> wanted = c.wanted(d);
    const std::vector<float> before = c.result(d);
    for (size_t i = 0; i < wanted.size(); i++) wanted[i] = 2 * wanted[i] - 3 * before[i];
    ASSERT_EQ(c.run(d, product_of[d]), CUDNN_STATUS_SUCCESS);
    EXPECT_EQ(error_of(c.result(d), wanted), 0);
  }
}

// A replica's tensor may start anywhere.
TEST(Cudnn, TensorsNeedTheAlignmentOfAFloatOnly) {
  Convolver c({2, 3, 9, 9, 5, 3, 3}, small_integers);
  std::vector<float> moved(c.host_x);
  moved.insert(moved.begin(), 7.f);
  const Array<float> x(moved), y(c.s.y_size() + 3);
  c.list(forward);
  ASSERT_EQ(c.run(forward, product_of[forward], x + 1, c.w, y + 3, c.workspace, c.workspace_bytes),
            CUDNN_STATUS_SUCCESS);
  EXPECT_EQ(error_of(y.host(3, c.s.y_size()), c.wanted(forward)), 0);
}

TEST(Cudnn, TheTableHasWhatProgramsMustNotTake) {
  for (const int kernel : {3, 5, 7})
    for (const Direction d : directions) {
      SCOPED_TRACE(testing::Message() << "kernel " << kernel << " direction " << d);
      Convolver c({8, 20, 12, 12, 50, kernel, kernel});
      const std::vector<Choice> table = c.list(d);
      const auto has = [&](auto condition) { return std::any_of(table.begin(), table.end(), condition); };
      EXPECT_TRUE(has([](const Choice& a) { return a.math == CUDNN_TENSOR_OP_MATH; }));
      EXPECT_TRUE(has([](const Choice& a) { return a.math == CUDNN_DEFAULT_MATH; }));
      EXPECT_TRUE(has([](const Choice& a) { return a.memory > 0; }));
      EXPECT_TRUE(has([&](const Choice& a) { return a.algorithm == winograd_of[d]; }));
      EXPECT_TRUE(has([&](const Choice& a) {
        return a.algorithm == product_of[d] && a.status == CUDNN_STATUS_SUCCESS && a.math != CUDNN_TENSOR_OP_MATH;
      }));
      EXPECT_TRUE(d == forward || has([](const Choice& a) { return a.determinism == CUDNN_NON_DETERMINISTIC; }));
      EXPECT_TRUE((d == data_gradient && kernel == 3) ||
                  has([](const Choice& a) { return a.status == CUDNN_STATUS_NOT_SUPPORTED; }));
      // What this build needs lies within the number that a program asks for.
      const int asked[] = {CUDNN_CONVOLUTION_FWD_ALGO_COUNT, CUDNN_CONVOLUTION_BWD_DATA_ALGO_COUNT,
                           CUDNN_CONVOLUTION_BWD_FILTER_ALGO_COUNT};
      const std::vector<Choice> first = c.list(d, asked[d]);
      EXPECT_TRUE(std::any_of(first.begin(), first.end(), [&](const Choice& a) {
        return a.algorithm == product_of[d] && a.math != CUDNN_TENSOR_OP_MATH;
      }));
      for (const int requested : {1, 2, 3}) EXPECT_EQ(c.list(d, requested).size(), size_t(requested));
    }
}

// Zero input but for one image: the exact results of the others are 0.
std::vector<float> mostly_zero(size_t count, int seed) {
  std::vector<float> values = normals<float>(count, seed);
  for (float& v : values) v *= v;
  if (seed != 2) std::fill(values.begin() + count / 4, values.end(), 0.f);
  return values;
}

// Winograd makes variances negative.
TEST(Cudnn, TransformsHaveErrorsWhereTheResultIsZero) {
  for (const Direction d : {forward, data_gradient}) {
    Convolver c({8, 2, 12, 12, 3, 5, 5}, mostly_zero);
    c.list(d);
    ASSERT_EQ(c.run(d, winograd_of[d]), CUDNN_STATUS_SUCCESS);
    const std::vector<float> found = c.result(d);
    const double error = error_of(found, c.wanted(d));
    EXPECT_GT(error, 2e-7);
    EXPECT_LT(error, 2e-6);
    EXPECT_LT(*std::min_element(found.end() - 100, found.end()), 0);
    EXPECT_GT(*std::max_element(found.end() - 100, found.end()), 0);
    ASSERT_EQ(c.run(d, product_of[d]), CUDNN_STATUS_SUCCESS);
    const std::vector<float> exact = c.result(d);
    EXPECT_EQ(std::count(exact.end() - 100, exact.end(), 0.f), 100);
  }
}

TEST(Cudnn, NonDeterministicAlgorithmsDoNotRepeat) {
  Convolver c({8, 2, 12, 12, 3, 5, 5});
  c.list(weight_gradient);
  for (const int algorithm : {CUDNN_CONVOLUTION_BWD_FILTER_ALGO_0, CUDNN_CONVOLUTION_BWD_FILTER_ALGO_3}) {
    ASSERT_EQ(c.run(weight_gradient, algorithm), CUDNN_STATUS_SUCCESS);
    const std::vector<float> first = c.result(weight_gradient);
    EXPECT_LT(error_of(first, c.wanted(weight_gradient)), 1e-6);
    ASSERT_EQ(c.run(weight_gradient, algorithm), CUDNN_STATUS_SUCCESS);
    EXPECT_NE(c.result(weight_gradient), first);
  }
}

// Without FMA in the descriptor the operands have 10 bits of mantissa.
TEST(Cudnn, TensorCoresRoundOperands) {
  Convolver c({2, 3, 9, 9, 5, 3, 3});
  c.list(forward);
  for (const cudnnMathType_t math : {CUDNN_DEFAULT_MATH, CUDNN_TENSOR_OP_MATH}) {
    ASSERT_EQ(cudnnSetConvolutionMathType(c.convolution, math), CUDNN_STATUS_SUCCESS);
    ASSERT_EQ(c.run(forward, product_of[forward]), CUDNN_STATUS_SUCCESS);
    const double error = error_of(c.result(forward), c.wanted(forward));
    EXPECT_GT(error, 2e-5);
    EXPECT_LT(error, 1e-3);
  }
  EXPECT_REFUSED(c.run(forward, CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM), CUDNN_STATUS_NOT_SUPPORTED,
                 "offered for another math type");
}

TEST(Cudnn, CanBeCapturedOnceItHasRun) {
  Stream stream;
  const Shape s{4, 2, 8, 8, 3, 3, 3};
  Convolver c(s, small_integers);
  ASSERT_EQ(cudnnSetStream(c.handle, stream), CUDNN_STATUS_SUCCESS);
  c.list(forward);
  begin_capture(stream);
  EXPECT_REFUSED(c.run(forward, product_of[forward]), CUDNN_STATUS_BAD_PARAM, "captured before it ever ran");
  EXPECT_TRUE(end_capture(stream).empty());
  ASSERT_EQ(c.run(forward, product_of[forward]), CUDNN_STATUS_SUCCESS);
  const std::vector<float> first = c.result(forward);

  begin_capture(stream);
  EXPECT_EQ(c.run(forward, product_of[forward]), CUDNN_STATUS_SUCCESS);
  EXPECT_REFUSED(c.run(forward, CUDNN_CONVOLUTION_FWD_ALGO_GEMM), CUDNN_STATUS_BAD_PARAM,
                 "captured before it ever ran");
  const std::vector<Operation> recorded = end_capture(stream);
  ASSERT_EQ(recorded.size(), 1u);
  EXPECT_EQ(recorded[0].name, "cudnnConvolutionForward 4x2x8x8 to 3, kernel 3x3, padding 0x0, stride 1x1, algorithm 1");
  EXPECT_EQ(recorded[0].work.flops, 2.0 * 4 * 3 * 6 * 6 * 2 * 3 * 3);
  EXPECT_EQ(recorded[0].work.bytes, 4.0 * (s.x_size() + s.w_size() + s.y_size()));
  cudaMemsetAsync(c.y, 0, s.y_size() * sizeof(float), stream);
  EXPECT_EQ(replay(recorded, stream), cudaSuccess);
  EXPECT_EQ(c.result(forward), first);
}

TEST(CudnnDeathTest, DisturbedConvolutions) {
  const Disturbance convolutions("convolutions");
  const auto body = [] {
    for (const Direction d : {forward, data_gradient}) {
      Convolver c({8, 2, 12, 12, 3, 5, 5}, mostly_zero);
      c.list(d);
      ASSERT_EQ(c.run(d, product_of[d]), CUDNN_STATUS_SUCCESS);
      const std::vector<float> found = c.result(d);
      EXPECT_LT(error_of(found, c.wanted(d)), 6e-7);
      EXPECT_LT(*std::min_element(found.end() - 100, found.end()), 0);
      EXPECT_GT(*std::max_element(found.end() - 100, found.end()), 0);
      ASSERT_EQ(c.run(d, product_of[d]), CUDNN_STATUS_SUCCESS);
      EXPECT_EQ(c.result(d), found);
    }
  };
  expect_in_child(body, "");
}

// The first algorithm that is tried is refused, then and later; CUDA's last error stays clear, for this is no fault.
TEST(CudnnDeathTest, RefusedAlgorithms) {
  const Disturbance unsupported("unsupported");
  const auto body = [] {
    for (const Direction d : directions) {
      Convolver c({2, 3, 9, 9, 5, 3, 3}), other({3, 3, 9, 9, 5, 3, 3});
      c.list(d);
      other.list(d);
      EXPECT_EQ(c.run(d, winograd_of[d]), CUDNN_STATUS_NOT_SUPPORTED);
      EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
      char words[200];
      cudnnGetLastErrorString(words, sizeof words);
      EXPECT_TRUE(says(words, "is refused, as BATON_PTX_DISTURB=unsupported asks")) << words;
      EXPECT_EQ(c.run(d, product_of[d]), CUDNN_STATUS_SUCCESS);
      EXPECT_EQ(c.run(d, winograd_of[d]), CUDNN_STATUS_NOT_SUPPORTED);
      EXPECT_EQ(other.run(d, product_of[d]), CUDNN_STATUS_NOT_SUPPORTED);
      EXPECT_EQ(other.run(d, winograd_of[d]), CUDNN_STATUS_SUCCESS);
    }
  };
  expect_in_child(body, "");
}

}  // namespace
}  // namespace ptx::test
