// Known answers, distribution and independence of the noise, and that every build draws the same bits.
#include "engine/philox.h"

#include <algorithm>
#include <random>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"

namespace baton {
namespace {

__global__ void draw_normals(float4* __restrict__ out, int n, Key key, uint32_t stream, uint32_t step, uint32_t draw) {
  const int i = simt::thread_item();
  if (i >= n) return;
  out[i] = normal4(key, uint32_t(i), stream, step, draw);
}

__global__ void draw_words(uint4* __restrict__ out, int n, Key key, uint32_t stream, uint32_t step) {
  const int i = simt::thread_item();
  if (i >= n) return;
  out[i] = philox(make_uint4(uint32_t(i), stream, step, 0), key);
}

}  // namespace

namespace test {
namespace {

std::vector<uint32_t> words(uint4 c, Key k) {
  const uint4 r = philox(c, k);
  return {r.x, r.y, r.z, r.w};
}

std::vector<float> normals(int n4, Key key, uint32_t stream = 0, uint32_t step = 0, uint32_t draw = 0) {
  Memory memory;
  Buffer<float4> out(memory, size_t(n4));
  simt::launch<draw_normals>(simt::each(n4), memory.stream(), out.data(), n4, key, stream, step, draw);
  std::vector<float> flat;
  for (float4 v : out.host()) flat.insert(flat.end(), {v.x, v.y, v.z, v.w});
  return flat;
}

TEST(Philox, SmallKnownAnswers) {  // Random123's vectors for Philox4x32-10
  EXPECT_TRUE(exact(words(make_uint4(0, 0, 0, 0), {0, 0}),
                    std::vector<uint32_t>{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  const uint32_t ones = ~0u;
  EXPECT_TRUE(exact(words(make_uint4(ones, ones, ones, ones), {ones, ones}),
                    std::vector<uint32_t>{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_TRUE(exact(words(make_uint4(0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344), {0xa4093822, 0x299f31d0}),
                    std::vector<uint32_t>{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, SmallKernelDrawsTheSameBits) {
  BATON_NEEDS_DEVICE();
  const int n = 300;
  const Key key = key_of(5);
  Memory memory;
  Buffer<uint4> out(memory, n);
  simt::launch<draw_words>(simt::each(n), memory.stream(), out.data(), n, key, 3u, 9u);
  std::vector<uint32_t> got, want;
  std::vector<float> normal_want;
  int i = 0;
  for (uint4 v : out.host()) {
    got.insert(got.end(), {v.x, v.y, v.z, v.w});
    const auto w = words(make_uint4(i, 3, 9, 0), key);
    want.insert(want.end(), w.begin(), w.end());
    const float4 z = normal4(key, i++, 3, 9);
    normal_want.insert(normal_want.end(), {z.x, z.y, z.z, z.w});
  }
  EXPECT_TRUE(exact(got, want));
  const std::vector<float> z = normals(n, key, 3, 9);
  EXPECT_EQ(std::memcmp(z.data(), normal_want.data(), z.size() * sizeof(float)), 0) << "float for float";
  record("philox.normals", z, 0);
}

TEST(Philox, NoiseDoesNotDependOnTheGrid) {
  BATON_NEEDS_DEVICE();
  const std::vector<float> many = normals(5000, key_of(1)), few = normals(70, key_of(1));
  EXPECT_TRUE(exact(few, std::vector(many.begin(), many.begin() + 280)));
}

TEST(Philox, LogIsExactToAnUlp) {
  std::mt19937 random(1);
  double worst = 0;
  auto check = [&](float x) {
    const double want = std::log(double(x));
    const double ulp = std::max(std::abs(want), 1e-30) * 0x1p-23;
    worst = std::max(worst, std::abs(log_unit(x) - want) / ulp);
  };
  for (int i = 0; i < 200000; i++) check(fmaf(float(random() >> 1), 0x1p-31f, 0x1p-32f));
  for (int i = 1; i < 1000; i++) check(1.f - i * 0x1p-24f), check(i * 0x1p-32f);
  EXPECT_LT(worst, 1.5);
  EXPECT_EQ(log_unit(1.f), 0.f);
}

TEST(Philox, BoxMullerAgainstReference) {
  std::mt19937 random(2);
  std::vector<float> got;
  std::vector<double> want;
  auto check = [&](uint32_t a, uint32_t b) {
    const float2 z = box_muller(a, b);
    const double u = double(fmaf(float(int(a >> 1)), 0x1p-31f, 0x1p-32f));
    const double r = std::sqrt(-2 * std::log(u)), angle = b * (2 * 3.14159265358979323846 * 0x1p-32);
    got.insert(got.end(), {z.x, z.y});
    want.insert(want.end(), {r * std::cos(angle), r * std::sin(angle)});
  };
  for (int i = 0; i < 50000; i++) check(random(), random());
  EXPECT_TRUE(close(got, want, {.l2 = 3e-7, .worst = 5e-7, .bias = 1e-7}));
  // The corners: finite, the largest normal is sqrt(64 ln 2), the smallest radius is 0.
  for (uint32_t a : {0u, 1u, 0x7fffffffu, 0x80000000u, ~0u})
    for (uint32_t b : {0u, 0x1fffffffu, 0x20000000u, 0x40000000u, 0x80000000u, 0xdfffffffu, 0xe0000000u, ~0u}) {
      const float2 z = box_muller(a, b);
      EXPECT_LE(std::hypot(z.x, z.y), 6.6605f);
    }
  EXPECT_NEAR(box_muller(0, 0).x, 6.66043f, 1e-4f);
  EXPECT_EQ(box_muller(~0u, 0).x, 0.f);
}

struct Sample {
  double mean = 0, variance = 0, skewness = 0, kurtosis = 0;
};
Sample moments(const std::vector<float>& z) {
  Sample s;
  for (float v : z) s.mean += v / double(z.size());
  for (float v : z) {
    const double d = v - s.mean, d2 = d * d, n = double(z.size());
    s.variance += d2 / n, s.skewness += d2 * d / n, s.kurtosis += d2 * d2 / n;
  }
  return s;
}

// Kolmogorov-Smirnov: sqrt(n) times the largest gap to the normal distribution; above 1.95 in one of 1000 samples.
double kolmogorov_smirnov(std::vector<float> z) {
  std::sort(z.begin(), z.end());
  double gap = 0;
  const double n = double(z.size());
  for (size_t i = 0; i < z.size(); i++) {
    const double p = 0.5 * std::erfc(-double(z[i]) / std::sqrt(2.0));
    gap = std::max({gap, p - i / n, (i + 1) / n - p});
  }
  return gap * std::sqrt(n);
}

double correlation(const std::vector<float>& a, const std::vector<float>& b, size_t lag = 0) {
  double sum = 0;
  for (size_t i = 0; i + lag < a.size(); i++) sum += double(a[i + lag]) * b[i];
  return sum / double(a.size() - lag);
}

TEST(Philox, NormalsAreNormal) {
  BATON_NEEDS_DEVICE();
  for (uint64_t seed : {0, 1, 2}) {
    const std::vector<float> z = normals(50000, key_of(seed), 7, 13);
    const double n = double(z.size());
    const Sample s = moments(z);
    EXPECT_LT(std::abs(s.mean), 4 / std::sqrt(n));
    EXPECT_LT(std::abs(s.variance - 1), 4 * std::sqrt(2 / n));
    EXPECT_LT(std::abs(s.skewness), 4 * std::sqrt(6 / n));
    EXPECT_LT(std::abs(s.kurtosis - 3), 4 * std::sqrt(96 / n));
    EXPECT_LT(kolmogorov_smirnov(z), 1.95);
    for (int lane = 0; lane < 4; lane++) {  // each of the four of a counter on its own
      std::vector<float> one;
      for (size_t i = lane; i < z.size(); i += 4) one.push_back(z[i]);
      EXPECT_LT(kolmogorov_smirnov(one), 1.95);
    }
  }
}

TEST(Philox, StreamsStepsDrawsAndSeedsAreIndependent) {
  BATON_NEEDS_DEVICE();
  const int n4 = 10000;
  const std::vector<float> base = normals(n4, key_of(1));
  const double bound = 4.5 / std::sqrt(4.0 * n4);
  const std::vector<std::vector<float>> others{normals(n4, key_of(1), 1, 0),    normals(n4, key_of(1), 0, 1),
                                               normals(n4, key_of(1), 0, 0, 1), normals(n4, key_of(2)),
                                               normals(n4, key_of(1, 1)),       normals(n4, key_of(1), 1, 1)};
  std::vector<float> squares = base;
  for (float& v : squares) v = (v * v - 1) * std::sqrt(0.5f);
  for (const auto& other : others) {
    EXPECT_LT(std::abs(correlation(base, other)), bound);
    std::vector<float> other_squares = other;
    for (float& v : other_squares) v = (v * v - 1) * std::sqrt(0.5f);
    EXPECT_LT(std::abs(correlation(squares, other_squares)), bound);
    std::vector<float> sum = base;  // independent normals add up to a normal of variance 2
    for (size_t i = 0; i < sum.size(); i++) sum[i] = (base[i] + other[i]) * std::sqrt(0.5f);
    EXPECT_LT(kolmogorov_smirnov(sum), 1.95);
  }
  for (size_t lag : {1, 2, 3, 4, 8, 256}) {
    EXPECT_LT(std::abs(correlation(base, base, lag)), bound) << "lag " << lag;
    EXPECT_LT(std::abs(correlation(squares, squares, lag)), bound) << "lag " << lag;
  }
}

TEST(Philox, SmallKeysOfNeighbouringSeedsShareNothing) {
  std::vector<uint32_t> seen;
  for (uint64_t seed = 0; seed < 200; seed++)
    for (uint64_t purpose = 0; purpose < 3; purpose++) {
      const Key k = key_of(seed, purpose);
      seen.insert(seen.end(), {k.lo, k.hi});
    }
  std::sort(seen.begin(), seen.end());
  EXPECT_EQ(std::adjacent_find(seen.begin(), seen.end()), seen.end());
}

}  // namespace
}  // namespace test
}  // namespace baton
