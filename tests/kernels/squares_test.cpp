#include "kernels/squares.h"

#include <random>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

std::vector<float> integers(size_t n, int seed) {
  std::mt19937 random(seed);
  std::vector<float> v(n);
  for (float& x : v) x = float(int(random() % 15)) - 7;
  return v;
}

void check_exact(size_t n) {
  SCOPED_TRACE(n);
  const std::vector<float> values = integers(n, 1), gradients = integers(n, 2), square_gradients = integers(n, 3);
  Memory memory;
  Buffer x(memory, values), grad(memory, gradients), grad_square(memory, square_gradients);
  Buffer<float> y(memory, n, NAN);
  square(y, x, n, memory.stream());
  fold_square_gradient(grad, x, grad_square, n, memory.stream());
  std::vector<float> squares(n), folded(n);
  for (size_t i = 0; i < n; i++) {
    squares[i] = values[i] * values[i];
    folded[i] = gradients[i] + 2 * values[i] * square_gradients[i];
  }
  EXPECT_TRUE(exact(y.host(), squares));
  EXPECT_TRUE(exact(grad.host(), folded));
  EXPECT_TRUE(exact(x.host(), values));
}

TEST(Squares, SmallExact) {
  BATON_NEEDS_DEVICE();
  check_exact(300);
}

TEST(Squares, Exact) {
  BATON_NEEDS_DEVICE();
  for (size_t n : {1, 7, 256, 4096, 5001, (1 << 20) + 3}) check_exact(n);  // the last: more than a grid's row
}

// d/dx of sum g x + h x^2.
TEST(Squares, FoldedGradientIsTheDerivative) {
  BATON_NEEDS_DEVICE();
  const size_t n = 20;
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  std::vector<float> values(n), gradients(n), square_gradients(n);
  for (size_t i = 0; i < n; i++)
    values[i] = normal(random), gradients[i] = normal(random), square_gradients[i] = normal(random);
  Memory memory;
  Buffer x(memory, values), grad(memory, gradients), grad_square(memory, square_gradients);
  Buffer<float> y(memory, n);
  fold_square_gradient(grad, x, grad_square, n, memory.stream());
  const std::vector<double> want = central_differences(values, 1.f / 64, [&](const std::vector<float>& at) {
    x.set(at);
    square(y, x, n, memory.stream());
    const std::vector<float> squares = y.host();
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += double(gradients[i]) * at[i] + double(square_gradients[i]) * squares[i];
    return sum;
  });
  EXPECT_TRUE(close(grad.host(), want, {.l2 = 1e-4}));
  record("squares.folded", grad.host(), 1e-6f);
}

// ------------------------------------------------------------------------------------ what per-example curvature needs
void check_rows(int rows, int n) {
  SCOPED_TRACE(testing::Message() << rows << " rows of " << n);
  const std::vector<float> values = integers(size_t(rows) * n, 5), start = integers(size_t(n), 6);
  Memory memory;
  Buffer x(memory, values), sum(memory, start), squared(memory, start);
  accumulate_rows(sum, x, rows, n, memory.stream());
  accumulate_squared_rows(squared, x, rows, n, memory.stream());
  std::vector<float> want = start, want_squared = start;
  for (int row = 0; row < rows; row++)
    for (int i = 0; i < n; i++) {
      const float v = values[size_t(row) * n + i];
      want[i] += v, want_squared[i] += v * v;
    }
  EXPECT_TRUE(exact(sum.host(), want));
  EXPECT_TRUE(exact(squared.host(), want_squared));
}
TEST(Squares, SmallAccumulatedRowsExact) {
  BATON_NEEDS_DEVICE();
  check_rows(3, 20), check_rows(1, 1);
  check_rows(0, 4);  // nothing is added
}
TEST(Squares, AccumulatedRowsExact) {
  BATON_NEEDS_DEVICE();
  check_rows(128, 1000), check_rows(8, 5001);
}

std::vector<float> fisher(const std::vector<float>& logits, int k, int batch, int classes) {
  Memory memory;
  Buffer x(memory, logits);
  Buffer<float> d(memory, logits.size(), NAN);
  fisher_column(d, x, k, batch, classes, memory.stream());
  return d.host();
}

// sum_k d_k d_k^T = diag(p) - p p^T, and every column's own formula.
void check_fisher(int batch, int classes, float spread) {
  SCOPED_TRACE(testing::Message() << batch << " examples, " << classes << " classes, spread " << spread);
  std::mt19937 random(classes);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> logits(size_t(batch) * classes);
  for (float& x : logits) x = normal(random);
  std::vector<double> p(logits.size()), want, got(logits.size() * classes);
  for (int b = 0; b < batch; b++) {
    double total = 0;
    for (int c = 0; c < classes; c++) total += std::exp(double(logits[b * classes + c]));
    for (int c = 0; c < classes; c++) p[b * classes + c] = std::exp(double(logits[b * classes + c])) / total;
    for (int c = 0; c < classes; c++)
      for (int e = 0; e < classes; e++) want.push_back(p[b * classes + c] * ((c == e) - p[b * classes + e]));
  }
  for (int k = 0; k < classes; k++) {
    const std::vector<float> d = fisher(logits, k, batch, classes);
    std::vector<double> column;
    for (int b = 0; b < batch; b++)
      for (int c = 0; c < classes; c++) {
        column.push_back(std::sqrt(p[b * classes + k]) * ((c == k) - p[b * classes + c]));
        for (int e = 0; e < classes; e++)
          got[size_t(b * classes + c) * classes + e] += double(d[b * classes + c]) * d[b * classes + e];
      }
    EXPECT_TRUE(close(d, column, {.l2 = 2e-6})) << k;
    record("fisher_column." + std::to_string(classes) + "." + std::to_string(int(spread)) + "." + std::to_string(k), d,
           2e-6f);
  }
  EXPECT_TRUE(close(got, want, {.l2 = 2e-6}));
}
TEST(FisherColumn, SmallIsARootOfTheInformation) {
  BATON_NEEDS_DEVICE();
  check_fisher(3, 4, 1);
}
TEST(FisherColumn, IsARootOfTheInformation) {
  BATON_NEEDS_DEVICE();
  check_fisher(128, 10, 3), check_fisher(5, 2, 0.1f), check_fisher(300, 3, 2);
}

TEST(FisherColumn, SmallExtremes) {
  BATON_NEEDS_DEVICE();
  // A sure prediction has no information; logits far from 0 do not overflow.
  for (int k = 0; k < 3; k++) {
    EXPECT_TRUE(exact(fisher({3e4f, 0, -3e4f}, k, 1, 3), std::vector<float>(3)));
    const std::vector<float> high = fisher({1e4f, 1e4f, 1e4f}, k, 1, 3), zero = fisher({0, 0, 0}, k, 1, 3);
    EXPECT_TRUE(exact(high, zero));
  }
}

TEST(FisherColumn, RefusesClasses) {
  float x = 0;
  EXPECT_THROW(fisher_column(&x, &x, 3, 1, 3, {}), InputError);
  EXPECT_THROW(fisher_column(&x, &x, -1, 1, 3, {}), InputError);
  EXPECT_THROW(fisher_column(&x, &x, 0, 1, 0, {}), InputError);
}

}  // namespace
}  // namespace baton::test
