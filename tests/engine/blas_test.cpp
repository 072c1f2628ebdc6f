// Products and convolutions of small integers are exact in float32, whatever the order of the sums.
#include "engine/blas.h"

#include <omp.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

std::vector<float> integers(size_t n, int seed) {
  std::mt19937 random(seed);
  std::vector<float> v(n);
  for (float& x : v) x = float(int(random() % 7)) - 3;
  return v;
}
std::vector<float> normals(size_t n, int seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> v(n);
  for (float& x : v) x = normal(random);
  return v;
}

// ------------------------------------------------------------------------------------------------------------- gemm
struct Product {
  bool transpose_a, transpose_b;
  int m, n, k;
  float beta = 0;
  int replicas = 1;
  bool share_a = false, share_b = false;
  size_t gap = 0;  // floats between one replica's matrix and the next one's
};
std::ostream& operator<<(std::ostream& out, const Product& p) {
  return out << p.m << "x" << p.n << "x" << p.k << (p.transpose_a ? " A^T" : "") << (p.transpose_b ? " B^T" : "")
             << " beta " << p.beta << " replicas " << p.replicas << (p.share_a ? " shared A" : "")
             << (p.share_b ? " shared B" : "");
}

std::vector<float> run(const Product& p, const std::vector<float>& a, const std::vector<float>& b,
                       const std::vector<float>& c) {
  Memory memory;
  Buffer da(memory, a), db(memory, b), dc(memory, c);
  gemm(memory.device(), p.transpose_a, p.transpose_b, p.m, p.n, p.k, {da, p.share_a ? 0 : size_t(p.m) * p.k + p.gap},
       {db, p.share_b ? 0 : size_t(p.k) * p.n + p.gap}, p.beta, {dc, size_t(p.m) * p.n + p.gap}, p.replicas);
  return dc.host();
}

std::vector<float> inputs(const Product& p, int rows, int columns, int seed) {
  return integers((size_t(rows) * columns + p.gap) * p.replicas, seed);
}

void check_product(const Product& p) {
  SCOPED_TRACE(testing::Message() << p);
  const std::vector<float> a = inputs(p, p.m, p.k, 1), b = inputs(p, p.k, p.n, 2);
  std::vector<float> c = inputs(p, p.m, p.n, 3);
  if (p.beta == 0)  // not even read: 0 times a NaN is none
    for (int r = 0; r < p.replicas; r++)
      std::fill_n(c.begin() + r * (size_t(p.m) * p.n + p.gap), size_t(p.m) * p.n, NAN);
  std::vector<float> want = c;
  for (int r = 0; r < p.replicas; r++) {
    const float* ar = a.data() + (p.share_a ? 0 : r * (size_t(p.m) * p.k + p.gap));
    const float* br = b.data() + (p.share_b ? 0 : r * (size_t(p.k) * p.n + p.gap));
    float* cr = want.data() + r * (size_t(p.m) * p.n + p.gap);
    for (int i = 0; i < p.m; i++)
      for (int j = 0; j < p.n; j++) {
        float sum = p.beta == 0 ? 0 : p.beta * cr[i * p.n + j];
        for (int l = 0; l < p.k; l++)
          sum += ar[p.transpose_a ? l * p.m + i : i * p.k + l] * br[p.transpose_b ? j * p.k + l : l * p.n + j];
        cr[i * p.n + j] = sum;
      }
  }
  EXPECT_TRUE(exact(run(p, a, b, c), want));
}

TEST(Gemm, Exact) {
  BATON_NEEDS_DEVICE();
  for (bool ta : {false, true})
    for (bool tb : {false, true}) {
      check_product({ta, tb, 1, 1, 1});
      check_product({ta, tb, 3, 5, 7, 1});
      check_product({ta, tb, 33, 10, 17, 0, 3, false, false, 5});
      check_product({ta, tb, 10, 33, 17, 1, 3, false, false, 5});
      check_product({ta, tb, 7, 20, 9, 0, 3, true, false});
      check_product({ta, tb, 20, 7, 9, 2, 3, false, true, 3});
      check_product({ta, tb, 5, 5, 5, 0, 2, true, true});
      check_product({ta, tb, 301, 90, 170, 0, 2});  // several tiles on the host, of rows
      check_product({ta, tb, 90, 301, 170, 1, 2});  // and of columns
    }
}

TEST(Gemm, AgainstReference) {
  BATON_NEEDS_DEVICE();
  const Product p{false, true, 128, 50, 800};
  const std::vector<float> a = normals(128 * 800, 1), b = normals(800 * 50, 2), c(128 * 50);
  std::vector<double> want;
  for (int i = 0; i < p.m; i++)
    for (int j = 0; j < p.n; j++) want.push_back(std::inner_product(&a[i * 800], &a[i * 800] + 800, &b[j * 800], 0.0));
  EXPECT_TRUE(close(run(p, a, b, c), want, {.l2 = 1e-6}));
}

// A replica's product is the same bits alone, and beside any number of others.
TEST(Gemm, CompanyChangesNoBit) {
  BATON_NEEDS_DEVICE();
  constexpr int most = 16;
  for (const Product& shape : {Product{false, true, 128, 52, 800}, Product{false, false, 128, 800, 52, 1},
                               Product{true, false, 52, 800, 128}, Product{false, true, 12, 10, 33},
                               Product{true, true, 20, 300, 77}, Product{false, true, 128, 10, 500, 0, 1, true}}) {
    Product p = shape;
    p.replicas = most;
    SCOPED_TRACE(testing::Message() << p);
    const size_t one_a = size_t(p.m) * p.k, one_b = size_t(p.k) * p.n, one_c = size_t(p.m) * p.n;
    const std::vector<float> a = normals(one_a * most, 1), b = normals(one_b * most, 2), c = normals(one_c * most, 3);
    const auto part = [](const std::vector<float>& v, size_t first, size_t count) {
      return std::vector<float>(v.begin() + long(first), v.begin() + long(first + count));
    };
    const std::vector<float> all = run(p, a, b, c);
    for (int count : {1, 2, 3, 7})
      for (int first : {0, most - count}) {
        p.replicas = count;
        const std::vector<float> some =
            run(p, part(a, p.share_a ? 0 : one_a * first, one_a * count), part(b, one_b * first, one_b * count),
                part(c, one_c * first, one_c * count));
        EXPECT_TRUE(exact(some, part(all, one_c * first, one_c * count))) << count << " from " << first << " on";
      }
  }
}

TEST(Gemm, NothingToDo) {
  BATON_NEEDS_DEVICE();
  const std::vector<float> untouched(4, 7.f);
  EXPECT_TRUE(exact(run({false, false, 0, 4, 2}, integers(8, 1), integers(8, 1), untouched), untouched));
  EXPECT_TRUE(exact(run({false, false, 4, 0, 2}, integers(8, 1), integers(8, 1), untouched), untouched));
}

// ------------------------------------------------------------------------------------------------------ convolution
testing::Message text(const ConvShape& s) {
  return testing::Message() << s.batch << "x" << s.in_channels << "x" << s.height << "x" << s.width << " to "
                            << s.out_channels << ", kernel " << s.kernel << " padding " << s.pad;
}

// f(index of x, index of w, index of y) for every product of the convolution.
template <class F>
void products(const ConvShape& s, F f) {
  const int oh = s.out_height(), ow = s.out_width();
  for (int b = 0; b < s.batch; b++)
    for (int n = 0; n < s.out_channels; n++)
      for (int c = 0; c < s.in_channels; c++)
        for (int i = 0; i < s.kernel; i++)
          for (int j = 0; j < s.kernel; j++) {
            const size_t w = ((size_t(n) * s.in_channels + c) * s.kernel + i) * s.kernel + j;
            for (int oy = 0; oy < oh; oy++)
              for (int ox = 0; ox < ow; ox++) {
                const int y = oy + i - s.pad, x = ox + j - s.pad;
                if (y < 0 || y >= s.height || x < 0 || x >= s.width) continue;
                f(((size_t(b) * s.in_channels + c) * s.height + y) * s.width + x, w,
                  ((size_t(b) * s.out_channels + n) * oh + oy) * ow + ox);
              }
          }
}

struct Results {
  std::vector<float> y, dx, dw;
};

// Of every replica. A shared input is read by all of them; `gap` floats lie between one replica's tensor and the
// next's.
Results run(const ConvShape& s, int replicas, bool share_x, size_t gap, const std::vector<float>& x,
            const std::vector<float>& w, const std::vector<float>& dy) {
  Memory memory;
  Device& device = memory.device();
  const size_t in = s.input_size() + gap, weights = s.weight_size() + gap, out = s.output_size() + gap;
  Buffer dev_x(memory, x), dev_w(memory, w), dev_dy(memory, dy);
  Buffer<float> y(memory, out * replicas, 99.f), dx(memory, in * replicas, 99.f), dw(memory, weights * replicas, 99.f);
  Convolution convolution(device, memory.arena(), s, replicas);
  const Matrices from{dev_x, share_x ? 0 : in};
  Results first;
  for (int time = 0; time < 2; time++) {  // the workspace is used again
    convolution.forward(device, from, {dev_w, weights}, {y, out});
    convolution.backward_data(device, {dev_dy, out}, {dev_w, weights}, {dx, in});
    convolution.backward_weights(device, from, {dev_dy, out}, {dw, weights});
    Results now{y.host(), dx.host(), dw.host()};
    if (time == 0) {
      first = now;
    } else {
      EXPECT_TRUE(exact(now.y, first.y));
      EXPECT_TRUE(exact(now.dx, first.dx));
      EXPECT_TRUE(exact(now.dw, first.dw));
    }
  }
  return first;
}

// How cuDNN sums is its own affair: within a millionth of the largest element or two.
const Tolerance summed{.l2 = on_gpu ? 5e-6 : 1e-6};
template <class T>
testing::AssertionResult same(const std::vector<float>& got, const std::vector<T>& want) {
  if (on_gpu && std::any_of(want.begin(), want.end(), [](T x) { return x != 0; }))
    return close(got, want, {.l2 = 2e-5, .worst = 2e-6, .bias = 2e-5});
  return exact(got, want);
}

// The given share of the elements stays; 0 leaves none.
std::vector<float> thinned(std::vector<float> v, double density, int seed = 5) {
  std::mt19937 random(seed);
  for (float& x : v)
    if (random() >= density * 0x1p32) x = 0;
  return v;
}

void check_convolution(const ConvShape& s, int replicas = 1, bool share_x = false, size_t gap = 0, double density = 1,
                       int only = -1) {  // the one element of dy that stays
  SCOPED_TRACE(text(s) << ", replicas " << replicas << (share_x ? ", shared input" : "") << ", density " << density
                       << ", only " << only);
  const size_t in = s.input_size() + gap, weights = s.weight_size() + gap, out = s.output_size() + gap;
  const std::vector<float> x = integers(share_x ? s.input_size() : in * replicas, 1),
                           w = integers(weights * replicas, 2);
  std::vector<float> dy = thinned(integers(out * replicas, 3), density);
  if (only >= 0)
    for (size_t i = 0; i < dy.size(); i++) dy[i] = int(i) == only ? 3.f : 0.f;
  Results want{std::vector<float>(out * replicas, 99.f), std::vector<float>(in * replicas, 99.f),
               std::vector<float>(weights * replicas, 99.f)};
  for (int r = 0; r < replicas; r++) {
    const size_t x0 = share_x ? 0 : in * r;
    std::fill_n(want.y.begin() + out * r, s.output_size(), 0.f);
    std::fill_n(want.dx.begin() + in * r, s.input_size(), 0.f);
    std::fill_n(want.dw.begin() + weights * r, s.weight_size(), 0.f);
    products(s, [&](size_t i, size_t k, size_t o) {
      want.y[out * r + o] += x[x0 + i] * w[weights * r + k];
      want.dx[in * r + i] += dy[out * r + o] * w[weights * r + k];
      want.dw[weights * r + k] += dy[out * r + o] * x[x0 + i];
    });
  }
  const Results got = run(s, replicas, share_x, gap, x, w, dy);
  EXPECT_TRUE(same(got.y, want.y));
  EXPECT_TRUE(same(got.dx, want.dx));
  EXPECT_TRUE(same(got.dw, want.dw));
}

TEST(Convolution, ExactKernelsAndWidths) {
  BATON_NEEDS_DEVICE();
  struct Kernel {
    int size, pad;
  };
  for (Kernel k : {Kernel{5, 0}, Kernel{5, 2}, Kernel{3, 1}, Kernel{3, 0}, Kernel{1, 0}, Kernel{7, 0}, Kernel{7, 3},
                   Kernel{2, 0}, Kernel{2, 1}, Kernel{4, 0}, Kernel{6, 2}})
    for (int out_width :
         {1, 3, 7, 8, 9, 15, 16, 24})  // of vectors of eight: less, one, several, with and without a rest
      for (int out_height : {1, 4}) {
        const int width = out_width + k.size - 1 - 2 * k.pad, height = out_height + k.size - 1 - 2 * k.pad;
        if (width < 1 || height < 1) continue;
        check_convolution({2, 2, height, width, 3, k.size, k.pad});
      }
}

TEST(Convolution, ExactFilters) {
  BATON_NEEDS_DEVICE();
  for (int filters = 1; filters <= 13; filters++) {
    check_convolution({2, 3, 8, 12, filters, 5, 0}, 2, false, 3);
    check_convolution({1, 2, 6, 7, filters, 3, 1}, 2, false, 3);
  }
}

TEST(Convolution, ExactNetworks) {
  BATON_NEEDS_DEVICE();
  check_convolution({2, 1, 28, 28, 20, 5, 0});
  check_convolution({1, 20, 12, 12, 50, 5, 0});
  check_convolution({2, 3, 32, 32, 8, 5, 2});
  check_convolution({1, 8, 15, 15, 16, 5, 2});
  check_convolution({19, 2, 7, 7, 4, 3, 1});  // more images than one block of them
  check_convolution({33, 1, 12, 12, 3, 5, 0});
}

TEST(Convolution, ExactReplicas) {
  BATON_NEEDS_DEVICE();
  for (const ConvShape& s : {ConvShape{3, 2, 12, 12, 5, 5, 0}, ConvShape{3, 2, 7, 9, 4, 5, 2},
                             ConvShape{2, 3, 8, 8, 6, 3, 1}, ConvShape{2, 3, 5, 4, 3, 1, 0}}) {
    check_convolution(s, 3, false);
    check_convolution(s, 3, true);
    check_convolution(s, 3, false, 11);
    check_convolution(s, 2, true, 6);
  }
}

// On the host, convolutions of 16, 32, ... filters go by filters, 6 images at a time; backwards, those of as many
// channels.
TEST(Convolution, ExactByFilters) {
  BATON_NEEDS_DEVICE();
  for (int batch : {1, 2, 3, 4, 5, 6, 7, 14}) check_convolution({batch, 16, 7, 5, 16, 5, 2});
  for (const ConvShape& s :
       {ConvShape{7, 8, 15, 15, 16, 3, 1}, ConvShape{2, 16, 5, 3, 16, 5, 4}, ConvShape{7, 32, 6, 9, 48, 3, 0},
        ConvShape{3, 16, 6, 7, 16, 4, 2}, ConvShape{3, 16, 3, 7, 32, 1, 0}, ConvShape{2, 16, 9, 8, 16, 7, 3},
        ConvShape{2, 16, 1, 1, 16, 5, 2}, ConvShape{8, 64, 4, 5, 16, 5, 2}})
    check_convolution(s);
  check_convolution({7, 16, 7, 7, 32, 5, 2}, 3, false, 11);
  check_convolution({7, 16, 7, 7, 32, 5, 2}, 2, true, 6);
}

// On the host, gradients that are mostly zeros (what max pooling leaves) take another way: kernels of 3x3 and 5x5, by
// the number of channels.
TEST(Convolution, ExactSparseGradients) {
  BATON_NEEDS_DEVICE();
  for (double density : {0., 0.02, 0.15, 0.3, 0.5}) {
    for (int channels = 1; channels <= (density == 0.15 ? 24 : 2); channels++)
      for (int kernel : {3, 5}) {
        check_convolution({3, channels, 9, 8, 9, kernel, kernel / 2}, 1, false, 0, density);
        check_convolution({2, channels, 6, 9, 3, kernel, 0}, 1, false, 0, density);
      }
    for (int channels : {32, 33, 50}) check_convolution({2, channels, 7, 7, 17, 5, 2}, 1, false, 0, density);
    for (const ConvShape& s :
         {ConvShape{3, 3, 32, 32, 10, 5, 2}, ConvShape{2, 32, 15, 15, 8, 5, 2}, ConvShape{9, 16, 7, 7, 9, 5, 2},
          ConvShape{2, 1, 28, 28, 20, 5, 0}, ConvShape{2, 20, 12, 12, 10, 5, 0}, ConvShape{40, 16, 3, 3, 8, 3, 1},
          ConvShape{3, 16, 1, 1, 3, 5, 2}, ConvShape{3, 16, 2, 2, 3, 5, 2}, ConvShape{3, 16, 3, 2, 3, 5, 3},
          ConvShape{3, 16, 4, 5, 3, 5, 4}, ConvShape{3, 2, 3, 5, 3, 5, 4}, ConvShape{3, 16, 5, 4, 3, 3, 2}})
      check_convolution(s, 1, false, 0, density);
    check_convolution({3, 16, 7, 7, 9, 5, 2}, 3, false, 11, density);
    check_convolution({3, 3, 7, 9, 9, 5, 2}, 2, true, 6, density);
  }
}

TEST(Convolution, ExactOneGradient) {
  BATON_NEEDS_DEVICE();
  for (const ConvShape& s : {ConvShape{2, 16, 4, 5, 2, 5, 2}, ConvShape{2, 3, 4, 5, 2, 5, 2},
                             ConvShape{2, 16, 5, 4, 2, 3, 1}, ConvShape{2, 18, 6, 7, 2, 5, 0}})
    for (int only = 0; only < int(s.output_size()); only++) check_convolution(s, 1, false, 0, 1, only);
}

// Against double precision, with what a pooling layer's gradient looks like.
TEST(Convolution, SparseAgainstReference) {
  BATON_NEEDS_DEVICE();
  for (const ConvShape& s : {ConvShape{4, 3, 32, 32, 16, 5, 2}, ConvShape{4, 32, 15, 15, 16, 5, 2},
                             ConvShape{7, 64, 7, 7, 32, 5, 2}, ConvShape{4, 20, 12, 12, 10, 5, 0}})
    for (double density : {0.1, 1.}) {
      SCOPED_TRACE(text(s) << ", density " << density);
      const std::vector<float> x = normals(s.input_size(), 1), w = normals(s.weight_size(), 2),
                               dy = thinned(normals(s.output_size(), 3), density);
      const Results got = run(s, 1, false, 0, x, w, dy);
      std::vector<double> y(s.output_size()), dx(s.input_size()), dw(s.weight_size());
      products(s, [&](size_t i, size_t k, size_t o) {
        y[o] += double(x[i]) * w[k];
        dx[i] += double(dy[o]) * w[k];
        dw[k] += double(dy[o]) * x[i];
      });
      EXPECT_TRUE(close(got.y, y, summed));
      EXPECT_TRUE(close(got.dx, dx, summed));
      EXPECT_TRUE(close(got.dw, dw, summed));
    }
}

// No gradient is dropped because it is no number.
TEST(Convolution, SparseGradientsKeepNaN) {
  BATON_NEEDS_DEVICE();
  const ConvShape s{2, 16, 7, 7, 4, 5, 2};
  const std::vector<float> x = normals(s.input_size(), 1), w = normals(s.weight_size(), 2);
  for (size_t at : {size_t(0), s.output_size() / 2, s.output_size() - 1}) {
    std::vector<float> dy(s.output_size());
    dy[at] = NAN;
    const Results got = run(s, 1, false, 0, x, w, dy);
    auto any = [](const std::vector<float>& v) {
      return std::any_of(v.begin(), v.end(), [](float f) { return f != f; });
    };
    EXPECT_TRUE(any(got.dx));
    EXPECT_TRUE(any(got.dw));
  }
}

double dot(const std::vector<float>& a, const std::vector<float>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

// <conv(x, w), dy> = <x, backward_data(dy, w)> = <w, backward_weights(x, dy)>.
TEST(Convolution, IsItsOwnAdjoint) {
  BATON_NEEDS_DEVICE();
  for (const ConvShape& s : {ConvShape{3, 4, 12, 12, 10, 5, 0}, ConvShape{2, 3, 15, 15, 7, 5, 2},
                             ConvShape{2, 5, 9, 10, 6, 3, 1}, ConvShape{2, 2, 13, 11, 3, 7, 1}}) {
    SCOPED_TRACE(text(s));
    const std::vector<float> x = normals(s.input_size(), 1), w = normals(s.weight_size(), 2),
                             dy = normals(s.output_size(), 3);
    const Results r = run(s, 1, false, 0, x, w, dy);
    const double scale = std::sqrt(dot(r.y, r.y) * dot(dy, dy));
    EXPECT_NEAR(dot(r.y, dy), dot(x, r.dx), summed.l2 * scale);
    EXPECT_NEAR(dot(r.y, dy), dot(w, r.dw), summed.l2 * scale);
    std::vector<double> want(s.output_size());
    products(s, [&](size_t i, size_t k, size_t o) { want[o] += double(x[i]) * w[k]; });
    EXPECT_TRUE(close(r.y, want, summed));
  }
}

// What the library offers, and which is chosen: one that repeats and sums products in float32, no transform and no
// tf32. Only a gradient may come from a transform, and only where every such product was refused.
TEST(Convolution, OfferedAlgorithms) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  const ConvDirection directions[] = {ConvDirection::forward, ConvDirection::data, ConvDirection::weights};
  for (const ConvShape& s : {ConvShape{4, 1, 28, 28, 20, 5, 0}, ConvShape{2, 20, 12, 12, 50, 5, 0},
                             ConvShape{2, 32, 15, 15, 64, 5, 2}, ConvShape{2, 64, 8, 8, 64, 3, 1}})
    for (ConvDirection direction : directions) {
      SCOPED_TRACE(text(s) << ", direction " << int(direction));
      const std::vector<OfferedAlgorithm> offered = Convolution::offered_algorithms(memory.device(), s, direction);
      if (!on_gpu) {
        EXPECT_TRUE(offered.empty());
        continue;
      }
      const std::vector<std::string> fit[] = {
          {"CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM", "CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM",
           "CUDNN_CONVOLUTION_FWD_ALGO_GEMM"},
          {"CUDNN_CONVOLUTION_BWD_DATA_ALGO_1"},
          {"CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1"}};
      const auto trusted = [](const OfferedAlgorithm& a) {
        return a.determinism == "CUDNN_DETERMINISTIC" && (a.math == "CUDNN_FMA_MATH" || a.math == "CUDNN_DEFAULT_MATH");
      };
      const auto sums = [&](const OfferedAlgorithm& a) {
        return std::count(fit[int(direction)].begin(), fit[int(direction)].end(), a.name) == 1;
      };
      const bool no_product = std::none_of(offered.begin(), offered.end(), [&](const OfferedAlgorithm& a) {
        return sums(a) && trusted(a) && a.status == "CUDNN_STATUS_SUCCESS";
      });
      int chosen = 0;
      for (const OfferedAlgorithm& a : offered) {
        EXPECT_EQ(a.name.rfind("CUDNN_CONVOLUTION_", 0), 0u) << a.name;
        EXPECT_FALSE(a.status.empty());
        EXPECT_NE(a.determinism.find("DETERMINISTIC"), std::string::npos);
        EXPECT_NE(a.math.find("_MATH"), std::string::npos);
        if (!a.chosen) continue;
        chosen++;
        EXPECT_EQ(a.status, "CUDNN_STATUS_SUCCESS");
        EXPECT_TRUE(trusted(a)) << a.name << " " << a.determinism << " " << a.math;
        EXPECT_TRUE(sums(a) || (no_product && direction != ConvDirection::forward)) << a.name;
      }
      EXPECT_EQ(chosen, 1);
    }
  for (ConvDirection direction : directions)
    EXPECT_THROW(Convolution::offered_algorithms(memory.device(), {1, 1, 4, 8, 1, 5, 0}, direction), InputError);
}

TEST(Convolution, RefusesShapes) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  auto make = [&](ConvShape s) { Convolution(memory.device(), memory.arena(), s, 1); };
  EXPECT_THROW(make({1, 1, 4, 8, 1, 5, 0}), InputError);
  EXPECT_THROW(make({1, 1, 8, 4, 1, 5, 0}), InputError);
  EXPECT_THROW(make({1, 1, 2, 2, 1, 7, 2}), InputError);
  EXPECT_THROW(make({1, 1, 8, 8, 1, 0, 0}), InputError);
  EXPECT_THROW(make({0, 1, 8, 8, 1, 3, 0}), InputError);
  if (!on_gpu) {
    EXPECT_THROW(make({1, 1, 28, 28, 1, 9, 0}), InputError);
  }
  try {
    make({1, 1, 4, 8, 1, 5, 0});
  } catch (const InputError& e) {
    EXPECT_NE(std::string(e.what()).find("4x8"), std::string::npos) << e.what();
  }
}

TEST(Convolution, CanBeMoved) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  Convolution first(memory.device(), memory.arena(), {1, 1, 3, 3, 1, 2, 0}, 1), second(std::move(first));
  Buffer x(memory, std::vector<float>{1, 2, 3, 4, 5, 6, 7, 8, 9}), w(memory, std::vector<float>{1, 0, 0, -1});
  Buffer<float> y(memory, 4);
  second.forward(memory.device(), {x, 0}, {w, 0}, {y, 0});
  EXPECT_TRUE(same(y.host(), std::vector<float>{-4, -4, -4, -4}));
  EXPECT_EQ(second.shape().out_width(), 2);
}

TEST(Blas, TheSameBitsWhateverTheThreads) {
  const int before = omp_get_max_threads();
  const Product p{false, true, 301, 90, 170, 0, 2};
  const std::vector<float> a = normals(301 * 170 * 2, 1), b = normals(170 * 90 * 2, 2), c(301 * 90 * 2);
  std::vector<std::vector<float>> products;
  std::vector<Results> convolutions;
  const ConvShape shapes[] = {{18, 3, 12, 12, 10, 5, 0}, {3, 3, 15, 15, 7, 5, 2},  {13, 16, 7, 7, 16, 5, 2},
                              {13, 16, 7, 7, 25, 5, 2},  {3, 3, 15, 15, 20, 5, 2}, {9, 20, 12, 12, 10, 5, 0}};
  for (int threads : {1, 2, 3}) {
    omp_set_num_threads(threads);
    products.push_back(run(p, a, b, c));
    for (const ConvShape& s : shapes)
      for (double density : {1., 0.15})
        convolutions.push_back(run(s, 2, false, 0, normals(2 * s.input_size(), 1), normals(2 * s.weight_size(), 2),
                                   thinned(normals(2 * s.output_size(), 3), density)));
  }
  omp_set_num_threads(before);
  for (int t : {1, 2}) {
    EXPECT_TRUE(exact(products[t], products[0]));
    for (size_t i = 0; i < 2 * std::size(shapes); i++) {
      const Results& got = convolutions[2 * std::size(shapes) * t + i];
      EXPECT_TRUE(exact(got.y, convolutions[i].y));
      EXPECT_TRUE(exact(got.dx, convolutions[i].dx));
      EXPECT_TRUE(exact(got.dw, convolutions[i].dw));
    }
  }
}

}  // namespace
}  // namespace baton::test
