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

}  // namespace
}  // namespace baton::test
