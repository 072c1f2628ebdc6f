// Products under tf32 and what stays as it was. On the host the operands are rounded by simt::round_to_tf32(), so a
// result is that of rounded operands under fp32, bit for bit. How a GPU's libraries round is their own affair: there
// operands that tf32 has give their products, and others come within the step of tf32.
#include "engine/precision.h"

#include <random>

#include "engine/blas.h"
#include "engine/linalg.h"
#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"
#include "tests/support/precision.h"

namespace baton::test {
namespace {

using Floats = std::vector<float>;

Floats normals(size_t n, int seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Floats v(n);
  for (float& x : v) x = normal(random);
  return v;
}
Floats integers(size_t n, int seed) {
  std::mt19937 random(seed);
  Floats v(n);
  for (float& x : v) x = float(int(random() % 7)) - 3;
  return v;
}

TEST(Precision, HasNames) {
  for (Precision p : {Precision::fp32, Precision::tf32}) EXPECT_EQ(parse_precision(name(p)), p);
  for (const char* wrong : {"", "float", "TF32"}) EXPECT_THROW(parse_precision(wrong), InputError) << wrong;
}

// A product of three kinds of operands under both precisions. run(a, b): the product as the device has it; reference(a,
// b): in double.
template <class Run, class Reference>
void check(size_t size_a, size_t size_b, Run run, Reference reference) {
  Memory memory;
  const auto under = [&](Precision p, const Floats& a, const Floats& b) {
    const WithPrecision with(memory.device(), p);
    return run(memory, a, b);
  };
  const auto fp32 = [&](const Floats& a, const Floats& b) { return under(Precision::fp32, a, b); };
  const auto tf32 = [&](const Floats& a, const Floats& b) { return under(Precision::tf32, a, b); };
  const Floats whole_a = integers(size_a, 1), whole_b = integers(size_b, 2);
  const Floats whole = tf32(whole_a, whole_b);
  const std::vector<double> want = reference(whole_a, whole_b);
  EXPECT_TRUE(on_gpu ? close(whole, want, {.l2 = 2e-5, .worst = 2e-6, .bias = 2e-5}) : exact(whole, want));

  const Floats a = normals(size_a, 3), b = normals(size_b, 4);
  Floats rounded_a = a, rounded_b = b;
  for (Floats* v : {&rounded_a, &rounded_b})
    for (float& x : *v) x = simt::round_to_tf32(x);
  const Floats before = fp32(a, b), got = tf32(a, b), of_rounded = tf32(rounded_a, rounded_b);
  const Tolerance summed{.l2 = on_gpu ? 5e-6 : 1e-6};
  EXPECT_TRUE(close(of_rounded, reference(rounded_a, rounded_b), summed));
  EXPECT_TRUE(exact(tf32(rounded_a, rounded_b), of_rounded)) << "it does not repeat";
  EXPECT_TRUE(close(got, reference(a, b), {.l2 = 1e-3, .worst = 2e-3, .bias = 1e-3}));
  EXPECT_GT(difference(got, before).l2, 1e-5) << "nothing was rounded";
  EXPECT_TRUE(close(before, reference(a, b), summed)) << "fp32 was rounded";
  EXPECT_TRUE(exact(fp32(a, b), before)) << "tf32 left something behind";
  if (on_gpu) return;
  EXPECT_TRUE(close(got, reference(rounded_a, rounded_b), summed));
  EXPECT_TRUE(exact(got, fp32(rounded_a, rounded_b)));
}

TEST(Precision, OfMatrixProducts) {
  BATON_NEEDS_DEVICE();
  constexpr int replicas = 3;
  struct Shape {
    int m, n, k, gap;
    bool share_a, share_b;
  };
  for (const Shape& s : {Shape{33, 10, 70, 0, false, false}, Shape{128, 52, 300, 4, false, true},
                         Shape{20, 301, 170, 3, true, false}, Shape{301, 90, 170, 0, true, true}})
    for (bool ta : {false, true})
      for (bool tb : {false, true}) {
        SCOPED_TRACE(testing::Message() << s.m << "x" << s.n << "x" << s.k << " transposed " << ta << tb);
        const size_t one_a = size_t(s.m) * s.k + s.gap, one_b = size_t(s.k) * s.n + s.gap, one_c = size_t(s.m) * s.n;
        const size_t stride_a = s.share_a ? 0 : one_a, stride_b = s.share_b ? 0 : one_b;
        const auto run = [&](Memory& memory, const Floats& a, const Floats& b) {
          Buffer da(memory, a), db(memory, b);
          Buffer<float> c(memory, one_c * replicas);
          gemm(memory.device(), ta, tb, s.m, s.n, s.k, {da, stride_a}, {db, stride_b}, 0, {c, one_c}, replicas);
          return c.host();
        };
        const auto reference = [&](const Floats& a, const Floats& b) {
          std::vector<double> c;
          for (int r = 0; r < replicas; r++)
            for (int i = 0; i < s.m; i++)
              for (int j = 0; j < s.n; j++) {
                double sum = 0;
                for (int l = 0; l < s.k; l++)
                  sum += double(a[stride_a * r + (ta ? size_t(l) * s.m + i : size_t(i) * s.k + l)]) *
                         b[stride_b * r + (tb ? size_t(j) * s.k + l : size_t(l) * s.n + j)];
                c.push_back(sum);
              }
          return c;
        };
        check(s.share_a ? one_a : one_a * replicas, s.share_b ? one_b : one_b * replicas, run, reference);
      }
}

// f(index of x, index of w, index of y) for every product of the convolution.
template <class F>
void products(const ConvShape& s, F f) {
  size_t y = 0;
  for (int b = 0; b < s.batch; b++)
    for (int n = 0; n < s.out_channels; n++)
      for (int oy = 0; oy < s.out_height(); oy++)
        for (int ox = 0; ox < s.out_width(); ox++, y++)
          for (int c = 0; c < s.in_channels; c++)
            for (int i = 0; i < s.kernel; i++)
              for (int j = 0; j < s.kernel; j++) {
                const int row = oy + i - s.pad, column = ox + j - s.pad;
                if (row < 0 || row >= s.height || column < 0 || column >= s.width) continue;
                f(((size_t(b) * s.in_channels + c) * s.height + row) * s.width + column,
                  ((size_t(n) * s.in_channels + c) * s.kernel + i) * s.kernel + j, y);
              }
}

// Shapes for each way in which the host computes a convolution; `thin`: most of dy is zero, as behind a pooling.
TEST(Precision, OfConvolutions) {
  BATON_NEEDS_DEVICE();
  constexpr int replicas = 2;
  for (const ConvShape& s : {ConvShape{4, 1, 12, 12, 20, 5, 0}, ConvShape{3, 20, 12, 12, 10, 5, 0},
                             ConvShape{7, 16, 7, 7, 32, 5, 2}, ConvShape{2, 3, 9, 8, 6, 3, 1}})
    for (bool thin : {false, true}) {
      SCOPED_TRACE(testing::Message() << s.in_channels << " to " << s.out_channels << ", kernel " << s.kernel
                                      << (thin ? ", most of dy is zero" : ""));
      const size_t in = s.input_size(), weights = s.weight_size(), out = s.output_size();
      const auto thinned = [&](Floats dy) {
        for (size_t i = 0; i < dy.size(); i++)
          if (thin && i % 7) dy[i] = 0;
        return dy;
      };
      const auto sums = [&](size_t size, auto add) {
        std::vector<double> all(size * replicas);
        for (size_t r = 0; r < replicas; r++)
          products(s, [&](size_t x, size_t w, size_t y) { add(all, x + in * r, w + weights * r, y + out * r); });
        return all;
      };
      const auto with = [&](size_t result, auto call) {
        return [&s, result, call, thinned](Memory& memory, const Floats& a, const Floats& b) {
          const Convolution convolution(memory.device(), memory.arena(), s, replicas);
          Buffer da(memory, a), db(memory, b);
          Buffer<float> c(memory, result * replicas);
          call(convolution, memory.device(), da, db, c);
          return c.host();
        };
      };
      if (!thin)
        check(in * replicas, weights * replicas,
              with(out,
                   [&](const Convolution& c, Device& d, float* x, float* w, float* y) {
                     c.forward(d, {x, in}, {w, weights}, {y, out});
                   }),
              [&](const Floats& x, const Floats& w) {
                return sums(out, [&](auto& all, size_t i, size_t k, size_t o) { all[o] += double(x[i]) * w[k]; });
              });
      const auto data = with(in, [&](const Convolution& c, Device& d, float* dy, float* w, float* dx) {
        c.backward_data(d, {dy, out}, {w, weights}, {dx, in});
      });
      check(
          out * replicas, weights * replicas,
          [&](Memory& memory, const Floats& dy, const Floats& w) { return data(memory, thinned(dy), w); },
          [&](const Floats& full, const Floats& w) {
            const Floats dy = thinned(full);
            return sums(in, [&](auto& all, size_t i, size_t k, size_t o) { all[i] += double(dy[o]) * w[k]; });
          });
      const auto filters = with(weights, [&](const Convolution& c, Device& d, float* x, float* dy, float* dw) {
        c.backward_weights(d, {x, in}, {dy, out}, {dw, weights});
      });
      check(
          in * replicas, out * replicas,
          [&](Memory& memory, const Floats& x, const Floats& dy) { return filters(memory, x, thinned(dy)); },
          [&](const Floats& x, const Floats& full) {
            const Floats dy = thinned(full);
            return sums(weights, [&](auto& all, size_t i, size_t k, size_t o) { all[k] += double(dy[o]) * x[i]; });
          });
    }
}

// On a GPU both go through one handle of cuBLAS.
TEST(Precision, OfALastLayerIsThatOfItsType) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  const int m = 40, n = 30, k = 50;
  const Floats a = normals(m * k, 1), b = normals(k * n, 2);
  const auto run = [&](Precision p) {
    const WithPrecision with(memory.device(), p);
    Buffer da(memory, a), db(memory, b);
    Buffer<float> c(memory, size_t(m) * n);
    gemm(memory.device(), false, false, m, n, k, {da, 0}, {db, 0}, 0, {c, 0}, 1);
    multiply<float>(memory.device(), false, false, m, n, k, 1, da, k, db, n, 0, c, n);
    return c.host();
  };
  EXPECT_TRUE(exact(run(Precision::tf32), run(Precision::fp32)));
}

// The first of cuDNN's algorithms that sums products and repeats, with tensor cores where it has one.
TEST(Precision, ChoosesAnAlgorithmWithTensorCores) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  const ConvShape s{2, 20, 12, 12, 50, 5, 0};
  for (ConvDirection direction : {ConvDirection::forward, ConvDirection::data, ConvDirection::weights})
    for (Precision p : {Precision::fp32, Precision::tf32}) {
      const WithPrecision with(memory.device(), p);
      int chosen = 0;
      for (const OfferedAlgorithm& a : Convolution::offered_algorithms(memory.device(), s, direction)) {
        if (!a.chosen) continue;
        chosen++;
        EXPECT_EQ(a.determinism, "CUDNN_DETERMINISTIC") << a.name;
        EXPECT_NE(a.math, "CUDNN_TENSOR_OP_MATH_ALLOW_CONVERSION") << a.name;
        if (p == Precision::fp32) {
          EXPECT_NE(a.math, "CUDNN_TENSOR_OP_MATH") << a.name;
        }
      }
      EXPECT_EQ(chosen, on_gpu ? 1 : 0);
    }
}

}  // namespace
}  // namespace baton::test
