#include "kernels/maxpool.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

struct Shape {
  int planes, h, w, window;
  int oh() const { return (h - window) / 2 + 1; }
  int ow() const { return (w - window) / 2 + 1; }
  size_t inputs() const { return size_t(planes) * h * w; }
  size_t outputs() const { return size_t(planes) * oh() * ow(); }
};
std::ostream& operator<<(std::ostream& out, const Shape& s) {
  return out << s.planes << "x" << s.h << "x" << s.w << " window " << s.window;
}

struct Pooled {
  std::vector<float> y;
  std::vector<uint8_t> which;
};

Pooled forward(const std::vector<float>& inputs, Shape s) {
  Memory memory;
  Buffer x(memory, inputs);
  Buffer<float> y(memory, s.outputs(), NAN);
  Buffer<uint8_t> which(memory, s.outputs(), uint8_t(77));
  maxpool_forward(y, which, x, s.planes, s.h, s.w, s.window, memory.stream());
  return {y.host(), which.host()};
}
std::vector<float> backward(const std::vector<float>& gradients, const std::vector<uint8_t>& winners, Shape s) {
  Memory memory;
  Buffer dy(memory, gradients);
  Buffer which(memory, winners);
  Buffer<float> dx(memory, s.inputs(), NAN);
  maxpool_backward(dx, dy, which, s.planes, s.h, s.w, s.window, memory.stream());
  return dx.host();
}

// Loops over the definition. A NaN beats what came before it.
Pooled forward_loop(const std::vector<float>& x, Shape s) {
  Pooled r;
  for (int p = 0; p < s.planes; p++)
    for (int row = 0; row < s.oh(); row++)
      for (int col = 0; col < s.ow(); col++) {
        float best = 0;
        int place = -1;
        for (int k = 0; k < s.window * s.window; k++) {
          const float v = x[(size_t(p) * s.h + 2 * row + k / s.window) * s.w + 2 * col + k % s.window];
          if (place < 0 || v > best || std::isnan(v)) best = v, place = k;
        }
        r.y.push_back(best), r.which.push_back(uint8_t(place));
      }
  return r;
}
template <class T>
std::vector<T> backward_loop(const std::vector<float>& dy, const std::vector<uint8_t>& which, Shape s) {
  std::vector<T> dx(s.inputs());
  size_t o = 0;
  for (int p = 0; p < s.planes; p++)
    for (int row = 0; row < s.oh(); row++)
      for (int col = 0; col < s.ow(); col++, o++)
        dx[(size_t(p) * s.h + 2 * row + which[o] / s.window) * s.w + 2 * col + which[o] % s.window] += dy[o];
  return dx;
}

std::vector<float> small_integers(size_t n, int seed) {  // many ties, both signs, zeros
  std::mt19937 random(seed);
  std::vector<float> v(n);
  for (float& x : v) x = float(int(random() % 7)) - 3;
  return v;
}

void check_exact(Shape s, bool nans = false) {
  SCOPED_TRACE(testing::Message() << s);
  std::vector<float> x = small_integers(s.inputs(), s.h * 100 + s.w);
  if (nans)
    for (size_t i = 0; i < x.size(); i += 5) x[i] = NAN;
  const std::vector<float> dy = small_integers(s.outputs(), 1);
  const Pooled got = forward(x, s), want = forward_loop(x, s);
  EXPECT_TRUE(exact(got.y, want.y));
  EXPECT_TRUE(exact(got.which, want.which));
  EXPECT_TRUE(exact(backward(dy, want.which, s), backward_loop<float>(dy, want.which, s)));
}

TEST(MaxPool, SmallExact) {
  BATON_NEEDS_DEVICE();
  for (int window : {2, 3})
    for (int h : {3, 4, 5})
      for (int w : {3, 6, 9}) check_exact({2, h, w, window});
  check_exact({1, 2, 2, 2});
}

TEST(MaxPool, Exact) {
  BATON_NEEDS_DEVICE();
  for (int window : {2, 3}) {
    for (int h = window; h < 9; h++)
      for (int w = window; w < 20; w++) check_exact({3, h, w, window});
    check_exact({5, 24, 24, window});  // LeNet5
    check_exact({7, 8, 8, window});
    check_exact({3, 32, 32, window});  // 3Conv3FC
    check_exact({3, 15, 15, window});
    check_exact({40, 7, 7, window});
    check_exact({1, 5, 150, window});  // wider than a strip of columns
    check_exact({1, 4, 131, window});
  }
}

TEST(MaxPool, SmallNaNWins) {
  BATON_NEEDS_DEVICE();
  check_exact({2, 6, 7, 2}, true);
  check_exact({2, 6, 7, 3}, true);
}

TEST(MaxPool, ManyPlanes) {  // more than a grid's second dimension holds
  BATON_NEEDS_DEVICE();
  check_exact({66000, 2, 2, 2});
}

TEST(MaxPool, SmallFirstOfEqualsWins) {
  BATON_NEEDS_DEVICE();
  const Shape s{1, 5, 5, 3};
  const Pooled r = forward(std::vector<float>(25, -2.f), s);
  EXPECT_TRUE(exact(r.which, std::vector<uint8_t>(4, 0)));
  EXPECT_TRUE(exact(r.y, std::vector<float>(4, -2.f)));
}

TEST(MaxPool, OverlappingWindowsAddUp) {
  BATON_NEEDS_DEVICE();
  const Shape s{1, 5, 5, 3};  // one input is in all four windows and wins them all
  std::vector<float> x(25, 0.f), want(25, 0.f);
  x[12] = 1, want[12] = 10;
  EXPECT_TRUE(exact(backward({1, 2, 3, 4}, forward(x, s).which, s), want));
}

TEST(MaxPool, BackwardAgainstReference) {
  BATON_NEEDS_DEVICE();
  for (Shape s : {Shape{6, 32, 32, 3}, Shape{6, 15, 15, 3}, Shape{6, 24, 24, 2}}) {
    SCOPED_TRACE(testing::Message() << s);
    std::mt19937 random(2);
    std::normal_distribution<float> normal;
    std::vector<float> x(s.inputs()), dy(s.outputs());
    for (float& v : x) v = normal(random);
    for (float& v : dy) v = normal(random);
    const Pooled pooled = forward(x, s);
    const std::vector<float> dx = backward(dy, pooled.which, s);
    EXPECT_TRUE(close(dx, backward_loop<double>(dy, pooled.which, s), {.l2 = 1e-7}));
    const std::string name = "maxpool." + std::to_string(s.window) + "." + std::to_string(s.h);
    record(name + ".y", pooled.y, 0);
    record(name + ".which", std::vector<float>(pooled.which.begin(), pooled.which.end()), 0);
    record(name + ".dx", dx, 0);
  }
}

TEST(MaxPool, FiniteDifferences) {
  BATON_NEEDS_DEVICE();
  for (Shape s : {Shape{2, 4, 5, 2}, Shape{2, 5, 6, 3}}) {
    SCOPED_TRACE(testing::Message() << s);
    std::vector<float> x(s.inputs());  // all different, further apart than the step: no kink is crossed
    std::iota(x.begin(), x.end(), 0.f);
    std::shuffle(x.begin(), x.end(), std::mt19937(1));
    const std::vector<float> weight = small_integers(s.outputs(), 6);
    auto objective = [&](const std::vector<float>& at) {
      const std::vector<float> y = forward(at, s).y;
      return std::inner_product(y.begin(), y.end(), weight.begin(), 0.0);
    };
    EXPECT_TRUE(exact(backward(weight, forward(x, s).which, s), central_differences(x, 0.25f, objective)));
  }
}

TEST(MaxPool, RefusesShapes) {
  float x = 0;
  uint8_t which = 0;
  try {
    maxpool_forward(&x, &which, &x, 4, 2, 8, 3, {});
    FAIL() << "no error";
  } catch (const InputError& e) {
    EXPECT_NE(std::string(e.what()).find("x has shape [4][2][8]"), std::string::npos) << e.what();
  }
  EXPECT_THROW(maxpool_backward(&x, &x, &which, 1, 8, 8, 4, {}), InputError);
  EXPECT_THROW(maxpool_forward(&x, &which, &x, 1 << 30, 8, 8, 2, {}), InputError);
  maxpool_forward(nullptr, nullptr, nullptr, 0, 8, 8, 2, {});  // nothing to do
}

TEST(Relu, SmallExactAndInPlace) {
  BATON_NEEDS_DEVICE();
  const std::vector<float> inputs{-2, -0.f, 0, 3, NAN, -INFINITY, INFINITY, 1e-40f};
  const std::vector<float> want{0, 0, 0, 3, NAN, 0, INFINITY, 1e-40f};
  Memory memory;
  Buffer x(memory, inputs);
  Buffer<float> y(memory, inputs.size(), 9.f);
  relu_forward(y, x, x.size(), memory.stream());
  EXPECT_TRUE(exact(y.host(), want));
  EXPECT_TRUE(exact(x.host(), inputs));
  relu_forward(x, x, x.size(), memory.stream());
  EXPECT_TRUE(exact(x.host(), want));
  for (float v : x.host()) EXPECT_FALSE(std::signbit(v));

  Buffer dy(memory, std::vector<float>{1, 2, 3, 4, 5, 6, 7, 8});
  Buffer<float> dx(memory, inputs.size(), 9.f);
  const std::vector<float> gradient{0, 0, 0, 4, 5, 0, 7, 8};
  relu_backward(dx, dy, y, y.size(), memory.stream());
  EXPECT_TRUE(exact(dx.host(), gradient));
  relu_backward(dy, dy, y, y.size(), memory.stream());
  EXPECT_TRUE(exact(dy.host(), gradient));
}

TEST(Relu, Exact) {
  BATON_NEEDS_DEVICE();
  for (size_t n : {size_t(1), size_t(255), size_t(256), size_t(5000), size_t(20001)}) {
    const std::vector<float> inputs = small_integers(n, int(n));
    Memory memory;
    Buffer x(memory, inputs);
    Buffer<float> y(memory, n, NAN);
    relu_forward(y, x, n, memory.stream());
    std::vector<float> want = inputs;
    for (float& v : want) v = std::max(v, 0.f);
    EXPECT_TRUE(exact(y.host(), want));
  }
  relu_forward(nullptr, nullptr, 0, {});  // nothing to do
}

}  // namespace
}  // namespace baton::test
