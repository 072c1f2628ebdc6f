// The products of layers on tensor cores (kernels/layer_product.h) against their definitions, loop by loop in double.
#include "kernels/layer_product.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

using Doubles = std::vector<double>;
using Floats = std::vector<float>;

struct Case {
  ConvShape shape;  // of a group
  int rows = 1, groups = 1;
  bool own_means = true;  // of every group
  int launched() const { return rows * groups; }
  int mean_sets() const { return own_means ? launched() : 1; }
};

ConvShape dense(int batch, int in, int out) { return {batch, in, 1, 1, out, 1, 0}; }

// Operands and, for all five results, what they should be.
struct Problem {
  Floats x, mean, variance, dm, dv;
  Doubles m, v, dx, dsquare, dmean, dvariance;
};

// Calls f(b, c, o, place in the input, place in the weights, place in the output) for every product of one group.
template <class F>
void for_products(const ConvShape& s, F f) {
  for (int b = 0; b < s.batch; b++)
    for (int o = 0; o < s.out_channels; o++)
      for (int y = 0; y < s.out_height(); y++)
        for (int x = 0; x < s.out_width(); x++)
          for (int c = 0; c < s.in_channels; c++)
            for (int ky = 0; ky < s.kernel; ky++)
              for (int kx = 0; kx < s.kernel; kx++) {
                const int iy = y + ky - s.pad, ix = x + kx - s.pad;
                if (iy < 0 || iy >= s.height || ix < 0 || ix >= s.width) continue;
                f(size_t((b * s.in_channels + c) * s.height + iy) * s.width + ix,
                  size_t((o * s.in_channels + c) * s.kernel + ky) * s.kernel + kx,
                  size_t((b * s.out_channels + o) * s.out_height() + y) * s.out_width() + x);
              }
}

// draw(): an operand. square(x): what the variances' product takes for x^2.
template <class Draw, class Square>
Problem make_problem(const Case& c, Draw draw, Square square) {
  const ConvShape& s = c.shape;
  const size_t in = s.input_size(), out = s.output_size(), weights = s.weight_size();
  const size_t n = c.launched();
  Problem p;
  const auto fill = [&](Floats& v, size_t count) {
    v.resize(count);
    for (float& f : v) f = draw();
  };
  fill(p.x, in * n), fill(p.mean, weights * c.mean_sets()), fill(p.variance, weights * c.rows);
  fill(p.dm, out * n), fill(p.dv, out * n);
  p.m.resize(out * n), p.v.resize(out * n), p.dx.resize(in * n), p.dsquare.resize(in * n);
  p.dmean.resize(weights * n), p.dvariance.resize(weights * c.rows);
  for (size_t r = 0; r < n; r++) {
    const float *x = &p.x[in * r], *mean = &p.mean[c.own_means ? weights * r : 0];
    const float *variance = &p.variance[weights * (r / c.groups)], *dm = &p.dm[out * r], *dv = &p.dv[out * r];
    double *dmean = &p.dmean[weights * r], *dvariance = &p.dvariance[weights * (r / c.groups)];
    for_products(s, [&](size_t i, size_t w, size_t o) {
      const double x2 = square(x[i]);
      p.m[out * r + o] += double(x[i]) * mean[w];
      p.v[out * r + o] += x2 * variance[w];
      p.dx[in * r + i] += double(dm[o]) * mean[w];
      p.dsquare[in * r + i] += double(dv[o]) * variance[w];
      dmean[w] += double(x[i]) * dm[o];
      dvariance[w] += x2 * dv[o];
    });
  }
  return p;
}

Floats random_integers(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  Floats v(count);
  for (float& x : v) x = float(int(random() % 9) - 4);
  return v;
}

struct Results {
  Floats m, v, dx, dsquare, dmean, dvariance;
};

// With variances or without; then the second results stay NaN.
Results multiply(const Case& c, const Problem& p, bool dual) {
  const ConvShape& s = c.shape;
  const size_t in = s.input_size(), out = s.output_size(), weights = s.weight_size();
  const size_t n = c.launched();
  Memory memory;
  Buffer x(memory, p.x), mean(memory, p.mean), variance(memory, p.variance), dm(memory, p.dm), dv(memory, p.dv);
  Buffer<float> m(memory, out * n, NAN), v(memory, out * n, NAN), dx(memory, in * n, NAN), dsquare(memory, in * n, NAN);
  Buffer<float> dmean(memory, weights * n, NAN), dvariance(memory, weights * c.rows, NAN);
  ProductJobs jobs;
  const LayerProduct product(memory.arena(), jobs, s, c.rows, c.groups, {mean, c.own_means ? weights : 0},
                             {dual ? variance.data() : nullptr, weights}, true, {dmean, weights}, {dvariance, weights});
  jobs.settle(memory.device(), memory.arena());
  jobs.pack(memory.stream());
  product.forward({x, in}, {m, out}, {v, out}, memory.stream());
  product.backward_data({dm, out}, {dv, out}, {dx, in}, {dsquare, in}, memory.stream());
  product.backward_weights({x, in}, {dm, out}, {dv, out}, memory.stream());
  jobs.add_up(memory.stream());
  return {m.host(), v.host(), dx.host(), dsquare.host(), dmean.host(), dvariance.host()};
}

std::string describe(const Case& c) {
  const ConvShape& s = c.shape;
  std::string text;
  for (int i : {c.rows, c.groups, s.batch, s.in_channels, s.height, s.width, s.out_channels, s.kernel, s.pad})
    text += std::to_string(i) + " ";
  return text + (c.own_means ? "own means" : "shared means");
}

void expect_exact(const Case& c) {
  std::mt19937 random(7);
  const Problem p = make_problem(
      c, [&] { return float(int(random() % 9) - 4); }, [](float x) { return double(x) * x; });
  for (const bool dual : {true, false}) {
    SCOPED_TRACE(describe(c) + (dual ? ", with variances" : ""));
    const Results r = multiply(c, p, dual);
    EXPECT_TRUE(exact(r.m, p.m)) << "m";
    EXPECT_TRUE(exact(r.dx, p.dx)) << "dx";
    EXPECT_TRUE(exact(r.dmean, p.dmean)) << "dmean";
    if (!dual) continue;
    EXPECT_TRUE(exact(r.v, p.v)) << "v";
    EXPECT_TRUE(exact(r.dsquare, p.dsquare)) << "dsquare";
    EXPECT_TRUE(exact(r.dvariance, p.dvariance)) << "dvariance";
  }
}

TEST(LayerProduct, SmallDenseIsExact) {
  BATON_NEEDS_DEVICE();
  expect_exact({dense(1, 1, 1)});
  expect_exact({dense(5, 7, 3), 2});
  expect_exact({dense(4, 8, 12), 1, 2});
}

TEST(LayerProduct, SmallConvolutionsAreExact) {
  BATON_NEEDS_DEVICE();
  expect_exact({{1, 1, 5, 5, 3, 3, 0}});
  expect_exact({{2, 3, 4, 6, 2, 3, 1}, 2});
  expect_exact({{2, 2, 6, 6, 4, 5, 2}, 1, 2});
  expect_exact({{2, 2, 6, 6, 4, 5, 0}, 1, 1, false});
}

// Batches that fill no tile, outputs of one tile and of two, depths that are no multiple of a step.
TEST(LayerProduct, DenseIsExact) {
  BATON_NEEDS_DEVICE();
  expect_exact({dense(33, 50, 10), 2});
  expect_exact({dense(40, 100, 72), 3, 1, false});
  expect_exact({dense(20, 68, 132), 2, 2});
}

TEST(LayerProduct, WideDenseIsExact) {  // the large tile: 128 * 1024 outputs or more
  BATON_NEEDS_DEVICE();
  expect_exact({dense(130, 36, 1020)});
}

TEST(LayerProduct, ConvolutionsAreExact) {
  BATON_NEEDS_DEVICE();
  expect_exact({{3, 1, 12, 12, 20, 5, 0}, 2});          // one channel, as LeNet5's first
  expect_exact({{2, 20, 8, 8, 50, 5, 0}, 1, 2});        // two tiles of columns in the weights' gradient
  expect_exact({{2, 3, 9, 7, 40, 5, 2}, 2, 1, false});  // planes that no 4 divides, with padding
  expect_exact({{9, 7, 5, 5, 33, 3, 1}, 2, 3});         // channels of more than one tile
  expect_exact({{30, 2, 10, 10, 4, 3, 0}, 2});          // many parts of the weights' gradient
}

// Normal operands, rounded to tf32 as the contract says.
Problem rounded_problem(const Case& c, bool round) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  return make_problem(
      c, [&] { return round ? simt::round_to_tf32(normal(random)) : normal(random); },
      [&](float x) { return round ? double(simt::round_to_tf32(x * x)) : double(x) * x; });
}

void expect_close(const Case& c, bool round, double tolerance) {
  const Problem p = rounded_problem(c, round);
  Problem given = p;
  for (Floats* v : {&given.x, &given.dm, &given.dv})
    for (float& f : *v) f = simt::round_to_tf32(f);
  const Results r = multiply(c, given, true);
  SCOPED_TRACE(describe(c));
  EXPECT_TRUE(close(r.m, p.m, {.l2 = tolerance})) << "m";
  EXPECT_TRUE(close(r.v, p.v, {.l2 = tolerance})) << "v";
  EXPECT_TRUE(close(r.dx, p.dx, {.l2 = tolerance})) << "dx";
  EXPECT_TRUE(close(r.dsquare, p.dsquare, {.l2 = tolerance})) << "dsquare";
  EXPECT_TRUE(close(r.dmean, p.dmean, {.l2 = tolerance})) << "dmean";
  EXPECT_TRUE(close(r.dvariance, p.dvariance, {.l2 = tolerance})) << "dvariance";
}

const Case dense_case{dense(40, 130, 50), 2};
const Case convolution_case{{3, 20, 8, 8, 50, 5, 0}, 1, 1};
const Case padded_case{{2, 16, 9, 9, 24, 3, 1}, 2, 1};

TEST(LayerProduct, OfRoundedNumbers) {  // the rounding of float32 sums is all that is left
  BATON_NEEDS_DEVICE();
  for (const Case& c : {dense_case, convolution_case, padded_case}) expect_close(c, true, 1e-6);
}

TEST(LayerProduct, OfAnyNumbers) {  // what tf32 costs
  BATON_NEEDS_DEVICE();
  for (const Case& c : {dense_case, convolution_case, padded_case}) expect_close(c, false, 2e-3);
}

TEST(LayerProduct, BitsDoNotDependOnRows) {
  BATON_NEEDS_DEVICE();
  for (Case c : {dense_case, convolution_case, padded_case}) {
    c.rows = 1;
    const Problem p = rounded_problem(c, true);
    const Results one = multiply(c, p, true);
    Case more = c;
    more.rows = 3;
    Problem q = p;
    for (Floats* v : {&q.x, &q.mean, &q.variance, &q.dm, &q.dv}) {
      const Floats row = *v;
      for (int i = 0; i < 2; i++) v->insert(v->end(), row.begin(), row.end());
    }
    const Results three = multiply(more, q, true);
    const auto expect_rows = [&](const Floats& of_one, const Floats& of_three) {
      for (size_t r = 0; r < 3; r++)
        EXPECT_TRUE(
            exact(Floats(of_three.begin() + of_one.size() * r, of_three.begin() + of_one.size() * (r + 1)), of_one));
    };
    expect_rows(one.m, three.m), expect_rows(one.v, three.v), expect_rows(one.dx, three.dx);
    expect_rows(one.dsquare, three.dsquare), expect_rows(one.dmean, three.dmean);
    expect_rows(one.dvariance, three.dvariance);
  }
}

TEST(LayerProduct, RecordsAgree) {
  BATON_NEEDS_DEVICE();
  const Results r = multiply(convolution_case, rounded_problem(convolution_case, true), true);
  record("layer_product.m", r.m, 2e-6f);
  record("layer_product.v", r.v, 2e-6f);
  record("layer_product.dx", r.dx, 2e-6f);
  record("layer_product.dmean", r.dmean, 2e-6f);
  record("layer_product.dvariance", r.dvariance, 2e-6f);
}

TEST(LayerProduct, SmallNaNReachesTheMeans) {
  BATON_NEEDS_DEVICE();
  Problem p = rounded_problem(dense_case, true);
  p.x[3] = NAN;
  const Results r = multiply(dense_case, p, true);
  for (int j = 0; j < 50; j++) EXPECT_TRUE(std::isnan(r.m[j])) << j;
  for (int j = 50; j < 100; j++) EXPECT_FALSE(std::isnan(r.m[j])) << j;
}

// ------------------------------------------------------------------------------------------- with what follows
struct Outputs {
  Floats value, square, v, slope;
  std::vector<uint8_t> which;
};

// A product and what follows it, in one launch or one after the other. `pooled` by windows of 2.
Outputs sample(const Case& c, bool noisy, bool relu, bool pooled, bool at_once) {
  const ConvShape& s = c.shape;
  const bool is_dense = s.height == 1;
  const int h = s.out_height(), w = s.out_width(), all = s.batch * c.groups, channels = s.out_channels;
  const size_t in = s.input_size(), out = s.output_size(), weights = s.weight_size(), n = c.launched();
  const size_t outputs = pooled ? size_t(s.batch) * channels * (h / 2) * (w / 2) : out;
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  const auto some = [&](size_t count, bool positive) {
    Floats v(count);
    for (float& f : v) f = positive ? 0.1f * std::abs(normal(random)) : simt::round_to_tf32(normal(random));
    return v;
  };
  Memory memory;
  Buffer x(memory, some(in * n, false)), mean(memory, some(weights * c.mean_sets(), false));
  Buffer variance(memory, some(weights * c.rows, true)), bias_mean(memory, some(size_t(channels) * c.rows, false));
  Buffer bias_variance(memory, some(size_t(channels) * c.rows, true));
  StepState state{};
  state.noise = {17, 4}, state.step = 9;
  Buffer states(memory, std::vector<StepState>(size_t(c.rows), state));
  Buffer<float> m(memory, out * n, NAN), v(memory, out * n, NAN), value(memory, outputs * n, NAN);
  Buffer<float> square(memory, outputs * n, NAN), slope(memory, outputs * n, NAN);
  Buffer<uint8_t> which(memory, outputs * n, 77);
  ProductJobs jobs;
  const LayerProduct product(memory.arena(), jobs, s, c.rows, c.groups, {mean, c.own_means ? weights : 0},
                             {noisy ? variance.data() : nullptr, weights}, false, {}, {});
  jobs.settle(memory.device(), memory.arena());
  jobs.pack(memory.stream());
  Signal written;
  written.value = value, written.square = square, written.rounded = relu;
  const Bias bias{bias_mean, noisy ? bias_variance.data() : nullptr, size_t(channels)};
  const ConvPlanes planes{c.rows, all, channels, h, w};
  float *to_v = noisy ? v.data() : nullptr, *to_slope = noisy ? slope.data() : nullptr;
  if (at_once)
    product.forward({x, in}, Sampling{written, m, v, which, to_slope, bias, states, 3, relu, pooled}, memory.stream());
  else {
    product.forward({x, in}, {m, out}, {v, out}, memory.stream());
    if (is_dense) dense_sample(written, m, to_v, bias, {c.rows, all, channels}, relu, states, 3, memory.stream());
    else if (pooled) conv_sample_pool(written, which, to_slope, m, to_v, bias, planes, states, 3, memory.stream());
    else conv_sample(written, m, to_v, bias, planes, relu, states, 3, memory.stream());
  }
  return {value.host(), square.host(), pooled ? Floats{} : v.host(), slope.host(), which.host()};
}

void expect_same_outputs(const Case& c, bool pooled, bool relu = true) {
  for (const bool noisy : {true, false}) {
    SCOPED_TRACE(describe(c) + (noisy ? ", noisy" : "") + (pooled ? ", pooled" : ""));
    const Outputs got = sample(c, noisy, relu, pooled, true), want = sample(c, noisy, relu, pooled, false);
    EXPECT_TRUE(exact(got.value, want.value));
    EXPECT_TRUE(exact(got.square, want.square));
    EXPECT_TRUE(exact(got.v, want.v));
    EXPECT_TRUE(exact(got.slope, want.slope));
    EXPECT_TRUE(exact(got.which, want.which));
    for (float f : got.value) ASSERT_TRUE(std::isfinite(f));
  }
}

TEST(LayerProduct, SmallOutputsAtOnce) {
  BATON_NEEDS_DEVICE();
  expect_same_outputs({dense(5, 7, 3), 2, 2}, false);
  expect_same_outputs({dense(6, 8, 10)}, false, false);
  expect_same_outputs({{2, 2, 6, 7, 3, 3, 0}, 2}, false);
  expect_same_outputs({{2, 2, 7, 6, 3, 3, 0}, 1, 2}, true);
}

TEST(LayerProduct, OutputsAtOnce) {
  BATON_NEEDS_DEVICE();
  expect_same_outputs({dense(40, 100, 72), 3, 1, false}, false);
  expect_same_outputs({{3, 1, 12, 12, 20, 5, 0}, 2}, true);
  expect_same_outputs({{2, 20, 8, 8, 50, 5, 0}, 1, 2}, true);
  expect_same_outputs({{2, 3, 9, 7, 40, 5, 2}, 2, 1, false}, true);  // odd planes: the last row and column are dropped
  expect_same_outputs({{2, 3, 9, 7, 40, 5, 2}, 2, 1, false}, false);
}

TEST(LayerProduct, RefusesShapes) {
  Memory memory;
  float weight = 0;
  const auto make = [&](ConvShape s, int rows, int groups) {
    ProductJobs jobs;
    LayerProduct(memory.arena(), jobs, s, rows, groups, {&weight, 0}, {&weight, 0}, true, {}, {});
  };
  EXPECT_THROW(make({1, 1, 8, 8, 1, 7, 0}, 1, 1), InputError);
  EXPECT_THROW(make({1, 1, 8, 8, 1, 3, 3}, 1, 1), InputError);
  EXPECT_THROW(make({1, 1, 2, 2, 1, 3, 0}, 1, 1), InputError);
  EXPECT_THROW(make({1, 1, 8, 8, 1, 3, 1}, 3, 0), InputError);
}

// Sums of parts of several sizes in one launch, for rows that some of them lack.
TEST(LayerProduct, SmallSumsOfParts) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  Buffer a(memory, random_integers(3 * 7 * 40, 1)), b(memory, random_integers(2 * 30 * 5, 2));
  Buffer<float> of_a(memory, 3 * 40, NAN), of_b(memory, 2 * 5, NAN);
  ProductJobs jobs;
  jobs.add(PartSum{{of_a, 40}, {a, 7 * 40}, 40, 7, 40, 3});
  jobs.add(PartSum{{of_b, 5}, {b, 30 * 5}, 5, 30, 5, 2});
  jobs.settle(memory.device(), memory.arena());
  jobs.add_up(memory.stream());
  const auto sums = [](const Floats& v, int rows, int parts, int count) {
    Doubles want(size_t(rows) * count);
    for (int r = 0; r < rows; r++)
      for (int p = 0; p < parts; p++)
        for (int i = 0; i < count; i++) want[r * count + i] += v[(r * parts + p) * count + i];
    return want;
  };
  EXPECT_TRUE(exact(of_a.host(), sums(a.host(), 3, 7, 40)));
  EXPECT_TRUE(exact(of_b.host(), sums(b.host(), 2, 30, 5)));
}

}  // namespace
}  // namespace baton::test
