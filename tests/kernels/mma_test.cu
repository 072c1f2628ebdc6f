// The collectives of a warp (engine/simt.h): the layout of fragments, products on the tensor cores, rows of matrices,
// and copies that arrive later. The serial build has none of them: it runs the product's portable twin.
#include <algorithm>
#include <cmath>
#include <random>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"

namespace baton {
namespace {

__global__ void round_all(float* __restrict__ y, const float* __restrict__ x, int n) {
  const int i = simt::thread_item();
  if (i >= n) return;
  y[i] = simt::round_to_tf32(x[i]);
}

// One product. The fragments lie lane by lane in memory.
template <bool warps>
__global__ void multiply_fragments(float* __restrict__ c, const float* __restrict__ a, const float* __restrict__ b) {
  if constexpr (warps) {
    const int lane = simt::lane_id();
    float of_a[4], of_b[2], of_c[4];
    for (int i = 0; i < 4; i++) of_a[i] = a[lane * 4 + i], of_c[i] = c[lane * 4 + i];
    for (int i = 0; i < 2; i++) of_b[i] = b[lane * 2 + i];
    simt::mma_tf32(of_c, of_a, of_b);
    for (int i = 0; i < 4; i++) c[lane * 4 + i] = of_c[i];
  }
}

// Each lane reads at the place that `rows` says, and keeps what it gets.
template <bool warps>
__global__ void read_matrices(float* __restrict__ y, const float* __restrict__ x, const int* __restrict__ rows, int n) {
  if constexpr (warps) {
    SIMT_DYNAMIC_SHARED(float, s);
    for (int i = threadIdx.x; i < n; i += blockDim.x) s[i] = x[i];
    __syncthreads();
    float d[4];
    simt::load_matrix(d, s + rows[threadIdx.x]);
    for (int i = 0; i < 4; i++) y[threadIdx.x * 4 + i] = d[i];
  }
}

// y = x, each tile of the block in reverse, through `stages` buffers of blockDim.x * width elements. What lies beyond
// the n elements of x is 0 in y.
template <bool warps, int stages, int width>
__global__ void reverse_tiles(float* __restrict__ y, const float* __restrict__ x, int n, int tiles) {
  if constexpr (warps) {
    SIMT_DYNAMIC_SHARED(float, s);
    const int tile = blockDim.x * width, t = threadIdx.x;
    const auto fetch = [&](int k) {
      const int at = k * tile + t * width, valid = max(0, min(width, n - at));
      float* to = s + k % stages * tile + t * width;
      if ((k + 1) * tile <= n) simt::copy_async<width>(to, x + at);
      else simt::copy_async<width>(to, x + (valid ? at : 0), valid);
    };
    for (int k = 0; k < stages - 1; k++) {
      if (k < tiles) fetch(k);
      simt::copy_async_commit();
    }
    for (int k = 0; k < tiles; k++) {
      simt::copy_async_wait<stages - 2>();
      __syncthreads();  // tile k is there, and everyone has left the buffer of tile k - 1
      if (k + stages - 1 < tiles) fetch(k + stages - 1);
      simt::copy_async_commit();
      for (int i = t; i < tile; i += blockDim.x) y[k * tile + i] = s[k % stages * tile + tile - 1 - i];
    }
  }
}

// What a thread copies it may read, and change, without a barrier; the others see it after the next one.
template <bool warps>
__global__ void double_own(float* __restrict__ y, const float* __restrict__ x) {
  if constexpr (warps) {
    SIMT_DYNAMIC_SHARED(float, s);
    const int t = threadIdx.x, n = blockDim.x;
    for (int round = 0; round < 3; round++) {
      simt::copy_async<1>(s + t, x + round * n + t);
      simt::copy_async_commit();
      simt::copy_async_wait<0>();
      s[t] *= 2;
      if (round == 1) continue;  // this one nobody reads
      __syncwarp();
      y[round * n + t] = s[t ^ 1];
      __syncwarp();
    }
  }
}

// C = A B^T: A is m x k, B is n x k, C is m x n; the rows of A and B are `stride` apart, a multiple of 4. A block has
// a tile of 32 x 32, each of its four warps 16 x 16 of it.
constexpr int tile = 32, depth = 16, padded = depth + 4;
template <int stages>
constexpr size_t product_shared() {
  return size_t(stages) * 2 * tile * padded * sizeof(float);
}
template <bool warps, int stages>
__global__ void multiply(float* __restrict__ c, const float* __restrict__ a, const float* __restrict__ b, int m, int n,
                         int k, int stride) {
  const int across = (n + tile - 1) / tile, t = threadIdx.x;
  const int first_row = int(blockIdx.x) / across * tile, first_column = int(blockIdx.x) % across * tile;
  if constexpr (!warps) {
    for (int i = t; i < tile * tile; i += blockDim.x) {
      const int row = first_row + i / tile, column = first_column + i % tile;
      if (row >= m || column >= n) continue;
      float sum = 0;
      for (int j = 0; j < k; j++) sum += a[row * stride + j] * b[column * stride + j];
      c[row * n + column] = sum;
    }
  } else {
    SIMT_DYNAMIC_SHARED(float, s);
    const int lane = simt::lane_id(), warp = t / simt::warp_size;
    const int warp_row = warp / 2 * 16, warp_column = warp % 2 * 16;
    const auto copy_tile = [&](float* to, const float* from, int first, int rows, int step) {
      for (int i = t; i < tile * depth / 4; i += blockDim.x) {
        const int row = i / (depth / 4), at = i % (depth / 4) * 4;
        const int valid = first + row < rows ? max(0, min(4, k - step * depth - at)) : 0;
        const float* source = valid ? from + (first + row) * stride + step * depth + at : from;
        simt::copy_async<4>(to + row * padded + at, source, valid);
      }
    };
    const auto fetch = [&](int step) {
      float* to = s + step % stages * 2 * tile * padded;
      copy_tile(to, a, first_row, m, step);
      copy_tile(to + tile * padded, b, first_column, n, step);
    };
    const int steps = (k + depth - 1) / depth;
    float sums[2][4] = {};
    for (int step = 0; step < stages - 1; step++) {
      if (step < steps) fetch(step);
      simt::copy_async_commit();
    }
    for (int step = 0; step < steps; step++) {
      simt::copy_async_wait<stages - 2>();
      __syncthreads();
      if (step + stages - 1 < steps) fetch(step + stages - 1);
      simt::copy_async_commit();
      const float* of_a = s + step % stages * 2 * tile * padded;
      const float* of_b = of_a + tile * padded;
      for (int at = 0; at < depth; at += 8) {
        float x[4], w[4];
        simt::load_matrix(x, of_a + (warp_row + lane % 16) * padded + at + lane / 16 * 4);
        simt::load_matrix(w, of_b + (warp_column + lane % 8 + lane / 16 * 8) * padded + at + lane / 8 % 2 * 4);
        simt::mma_tf32(sums[0], x, {w[0], w[1]});
        simt::mma_tf32(sums[1], x, {w[2], w[3]});
      }
    }
    for (int half = 0; half < 2; half++)
      for (int i = 0; i < 4; i++) {
        const int row = first_row + warp_row + lane / 4 + i / 2 * 8;
        const int column = first_column + warp_column + half * 8 + lane % 4 * 2 + i % 2;
        if (row < m && column < n) c[row * n + column] = sums[half][i];
      }
  }
}

}  // namespace

namespace test {
namespace {

#define BATON_NEEDS_WARPS() \
  BATON_NEEDS_DEVICE();     \
  if (!simt::has_warps) GTEST_SKIP() << "a warp is one lane in this build: it has no fragments"

float of_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }

std::vector<float> small_integers(size_t count, int seed) {
  std::mt19937 random(seed);
  std::vector<float> v(count);
  for (float& x : v) x = float(int(random() % 17) - 8);
  return v;
}

// ------------------------------------------------------------------------------------------------------- rounding
// What rounds to what, as bits.
std::vector<std::pair<uint32_t, uint32_t>> roundings() {
  return {
      {0x00000000, 0x00000000}, {0x80000000, 0x80000000},  // zeros
      {0x3f800000, 0x3f800000}, {0xbf802000, 0xbf802000},  // tf32 numbers
      {0x3f800fff, 0x3f800000}, {0x3f801000, 0x3f802000},  // below half, half
      {0x3f801001, 0x3f802000}, {0x3f802fff, 0x3f802000},
      {0x3f803000, 0x3f804000}, {0xbf801000, 0xbf802000},  // halves go away from zero, on both sides of it
      {0xbf800fff, 0xbf800000}, {0x3fffffff, 0x40000000},  // into the next binade
      {0x00000fff, 0x00000000}, {0x00001000, 0x00002000},  // denormal numbers
      {0x807fffff, 0x80800000}, {0x7f7fefff, 0x7f7fe000},  // the largest that stays finite
      {0x7f7ff000, 0x7f800000}, {0xff7fffff, 0xff800000},  // beyond it
      {0x7f800000, 0x7f800000}, {0xff800000, 0xff800000},  // infinities
      {0x7f800001, 0x7fc00000}, {0x7fffffff, 0x7fc00000},  // NaNs
      {0xffc00000, 0x7fc00000}, {0xffffffff, 0x7fc00000},
  };
}
std::vector<uint32_t> bits_of(const std::vector<float>& v) {
  std::vector<uint32_t> bits;
  for (float x : v) bits.push_back(__builtin_bit_cast(uint32_t, x));
  return bits;
}

TEST(RoundToTf32, SmallCorners) {
  BATON_NEEDS_DEVICE();
  std::vector<float> x, on_host;
  std::vector<uint32_t> want;
  for (const auto& [from, to] : roundings()) {
    x.push_back(of_bits(from)), want.push_back(to);
    on_host.push_back(simt::round_to_tf32(x.back()));
  }
  EXPECT_TRUE(exact(bits_of(on_host), want));
  Memory memory;
  Buffer in(memory, x);
  Buffer<float> out(memory, x.size());
  simt::launch<round_all>(simt::each(int(x.size())), memory.stream(), out.data(), (const float*)in.data(),
                          int(x.size()));
  EXPECT_TRUE(exact(bits_of(out.host()), want));
}

TEST(RoundToTf32, IsTheNearest) {
  std::mt19937 random(1);
  for (int i = 0; i < 100000; i++) {
    const float x = of_bits(random());
    const float y = simt::round_to_tf32(x);
    if (!std::isfinite(x) || !std::isfinite(y)) continue;
    ASSERT_EQ(__builtin_bit_cast(uint32_t, y) & 0x1fff, 0u);
    const uint32_t below = __builtin_bit_cast(uint32_t, x) & 0xffffe000u;  // the nearer to zero of the neighbours
    const double to_below = std::abs(double(x) - of_bits(below)),
                 to_above = std::abs(double(of_bits(below + 0x2000)) - x);
    ASSERT_EQ(y, to_below < to_above ? of_bits(below) : of_bits(below + 0x2000)) << x;
    ASSERT_EQ(simt::round_to_tf32(y), y);
  }
}

// ------------------------------------------------------------------------------------------------------- fragments
// Where the PTX ISA puts the elements: (row, column) of each lane's numbers.
struct Place {
  int row, column;
};
Place place_in_a(int lane, int i) { return {lane / 4 + (i == 1 || i == 3 ? 8 : 0), lane % 4 + (i >= 2 ? 4 : 0)}; }
Place place_in_b(int lane, int i) { return {lane % 4 + (i == 1 ? 4 : 0), lane / 4}; }
Place place_in_c(int lane, int i) { return {lane / 4 + (i >= 2 ? 8 : 0), lane % 4 * 2 + (i & 1)}; }

// The matrices row by row; A is 16 x 8, B 8 x 8, C 16 x 8.
std::vector<float> multiply_once(const std::vector<float>& a, const std::vector<float>& b, std::vector<float> c) {
  std::vector<float> of_a(128), of_b(64), of_c(128);
  for (int lane = 0; lane < 32; lane++) {
    for (int i = 0; i < 4; i++) {
      const Place in_a = place_in_a(lane, i), in_c = place_in_c(lane, i);
      of_a[lane * 4 + i] = a[in_a.row * 8 + in_a.column];
      of_c[lane * 4 + i] = c[in_c.row * 8 + in_c.column];
    }
    for (int i = 0; i < 2; i++) {
      const Place in_b = place_in_b(lane, i);
      of_b[lane * 2 + i] = b[in_b.row * 8 + in_b.column];
    }
  }
  Memory memory;
  Buffer in_a(memory, of_a), in_b(memory, of_b), out(memory, of_c);
  simt::launch<multiply_fragments<simt::has_warps>>(simt::blocks(1, 32), memory.stream(), out.data(),
                                                    (const float*)in_a.data(), (const float*)in_b.data());
  of_c = out.host();
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      const Place at = place_in_c(lane, i);
      c[at.row * 8 + at.column] = of_c[lane * 4 + i];
    }
  return c;
}
template <class T>
std::vector<T> plain(const std::vector<float>& a, const std::vector<float>& b, const std::vector<float>& c) {
  std::vector<T> sums(c.begin(), c.end());
  for (int row = 0; row < 16; row++)
    for (int column = 0; column < 8; column++)
      for (int k = 0; k < 8; k++) sums[row * 8 + column] += T(a[row * 8 + k]) * T(b[k * 8 + column]);
  return sums;
}

TEST(Mma, EveryElementHasItsPlace) {  // one of A at a time times all of B, and all of A times one of B
  BATON_NEEDS_WARPS();
  std::vector<float> all_a(128), all_b(64), c(128);
  for (int i = 0; i < 128; i++) all_a[i] = float(i + 1), c[i] = float(1000 * i);
  for (int i = 0; i < 64; i++) all_b[i] = float(i + 200);
  for (int i = 0; i < 128; i++) {
    std::vector<float> a(128);
    a[i] = 3;
    ASSERT_TRUE(exact(multiply_once(a, all_b, c), plain<float>(a, all_b, c))) << "A[" << i / 8 << "][" << i % 8 << "]";
  }
  for (int i = 0; i < 64; i++) {
    std::vector<float> b(64);
    b[i] = 5;
    ASSERT_TRUE(exact(multiply_once(all_a, b, c), plain<float>(all_a, b, c))) << "B[" << i / 8 << "][" << i % 8 << "]";
  }
}

TEST(Mma, SmallIntegersAreExact) {
  BATON_NEEDS_WARPS();
  for (int seed = 0; seed < 10; seed++) {
    const auto a = small_integers(128, seed), b = small_integers(64, seed + 100), c = small_integers(128, seed + 200);
    ASSERT_TRUE(exact(multiply_once(a, b, c), plain<float>(a, b, c)));
  }
}

TEST(Mma, SmallLastBitsAreNotLookedAt) {
  BATON_NEEDS_WARPS();
  std::mt19937 random(4);
  const auto a = small_integers(128, 1), b = small_integers(64, 2), c = small_integers(128, 3);
  const auto with_bits = [&](std::vector<float> v) {
    for (float& x : v) x = of_bits(__builtin_bit_cast(uint32_t, x) | (random() & 0x1fff));
    return v;
  };
  EXPECT_TRUE(exact(multiply_once(with_bits(a), with_bits(b), c), plain<float>(a, b, c)));
}

// ------------------------------------------------------------------------------------------------------- matrices
TEST(LoadMatrix, SmallRowsGoToTheirLanes) {
  BATON_NEEDS_WARPS();
  const int n = 64 * 20;
  std::vector<float> x(n);
  for (int i = 0; i < n; i++) x[i] = float(i);
  std::mt19937 random(1);
  for (int trial = 0; trial < 10; trial++) {
    std::vector<int> rows(64);  // of two warps: multiples of four numbers, one after the other at first, then anywhere
    for (int lane = 0; lane < 64; lane++) rows[lane] = trial == 0 ? lane * 20 : int(random() % (n / 4)) * 4;
    Memory memory;
    Buffer in(memory, x);
    Buffer where(memory, rows);
    Buffer<float> out(memory, 64 * 4);
    simt::launch<read_matrices<simt::has_warps>>(simt::blocks(1, 64, n * sizeof(float)), memory.stream(), out.data(),
                                                 (const float*)in.data(), (const int*)where.data(), n);
    std::vector<float> want;
    for (int t = 0; t < 64; t++)
      for (int i = 0; i < 4; i++) want.push_back(x[size_t(rows[t / 32 * 32 + 8 * i + t % 32 / 4] + t % 4)]);
    ASSERT_TRUE(exact(out.host(), want));
  }
}

// ---------------------------------------------------------------------------------------------------------- copies
template <int stages, int width>
void reverse_by_copies(int n) {
  const int threads = 64, of_tile = threads * width, tiles = (n + of_tile - 1) / of_tile + 1;  // the last is all zero
  std::vector<float> x(n), want(size_t(tiles) * of_tile);
  for (int i = 0; i < n; i++) x[i] = float(i + 1);
  for (int i = 0; i < tiles * of_tile; i++) {
    const int from = i / of_tile * of_tile + of_tile - 1 - i % of_tile;
    want[i] = from < n ? x[from] : 0.f;
  }
  Memory memory;
  Buffer in(memory, x);
  Buffer<float> out(memory, want.size(), NAN);
  simt::launch<reverse_tiles<simt::has_warps, stages, width>>(
      simt::blocks(1, threads, size_t(stages) * of_tile * sizeof(float)), memory.stream(), out.data(),
      (const float*)in.data(), n, tiles);
  EXPECT_TRUE(exact(out.host(), want)) << stages << " stages, " << width << " numbers at once, " << n;
}

TEST(CopyAsync, SmallPipelinesOverRaggedLengths) {
  BATON_NEEDS_WARPS();
  for (const int n : {1, 63, 64, 67, 514, 1023}) {
    reverse_by_copies<2, 1>(n);
    reverse_by_copies<3, 1>(n);
    reverse_by_copies<2, 2>(n);
    reverse_by_copies<3, 2>(n);
    reverse_by_copies<2, 4>(n);
    reverse_by_copies<3, 4>(n);
    reverse_by_copies<4, 4>(n);
  }
}

TEST(CopyAsync, SmallAThreadSeesItsOwnCopiesBeforeABarrier) {
  BATON_NEEDS_WARPS();
  const int n = 64;
  std::vector<float> x(3 * n), want(3 * n);
  for (int i = 0; i < 3 * n; i++) x[i] = float(i + 1);
  for (int i = 0; i < 3 * n; i++) want[i] = i / n == 1 ? -1.f : 2 * x[i ^ 1];
  Memory memory;
  Buffer in(memory, x);
  Buffer<float> out(memory, 3 * n, -1.f);
  simt::launch<double_own<simt::has_warps>>(simt::blocks(1, n, n * sizeof(float)), memory.stream(), out.data(),
                                            (const float*)in.data());
  EXPECT_TRUE(exact(out.host(), want));
}

// --------------------------------------------------------------------------------------------------------- products
struct Shape {
  int m, n, k;
};

// Rows of k numbers, and of NaN behind them up to the stride: nobody may read those.
std::vector<float> padded_rows(const std::vector<float>& v, int rows, int k, int stride) {
  std::vector<float> out(size_t(rows) * stride, NAN);
  for (int row = 0; row < rows; row++) std::copy_n(v.begin() + row * k, k, out.begin() + row * stride);
  return out;
}
template <int stages>
std::vector<float> product(const std::vector<float>& a, const std::vector<float>& b, Shape s) {
  const int stride = (s.k + 3) / 4 * 4;
  Memory memory;
  Buffer in_a(memory, padded_rows(a, s.m, s.k, stride)), in_b(memory, padded_rows(b, s.n, s.k, stride));
  Buffer<float> out(memory, size_t(s.m) * s.n, NAN);
  const int tiles = (s.m + tile - 1) / tile * ((s.n + tile - 1) / tile);
  simt::launch<multiply<simt::has_warps, stages>>(simt::blocks(tiles, 128, product_shared<stages>()), memory.stream(),
                                                  out.data(), (const float*)in_a.data(), (const float*)in_b.data(), s.m,
                                                  s.n, s.k, stride);
  return out.host();
}
std::vector<double> product_reference(const std::vector<float>& a, const std::vector<float>& b, Shape s) {
  std::vector<double> c(size_t(s.m) * s.n);
  for (int row = 0; row < s.m; row++)
    for (int column = 0; column < s.n; column++)
      for (int j = 0; j < s.k; j++) c[row * s.n + column] += double(a[row * s.k + j]) * b[column * s.k + j];
  return c;
}

template <int stages>
void expect_exact_product(Shape s) {
  const auto a = small_integers(size_t(s.m) * s.k, 1), b = small_integers(size_t(s.n) * s.k, 2);
  EXPECT_TRUE(exact(product<stages>(a, b, s), product_reference(a, b, s)))
      << stages << " stages, " << s.m << " x " << s.n << " x " << s.k;
}

TEST(Mma, SmallProductsOfRaggedShapes) {
  BATON_NEEDS_DEVICE();
  for (const Shape s : {Shape{1, 1, 1}, Shape{5, 3, 7}, Shape{20, 10, 25}, Shape{33, 31, 17}, Shape{16, 50, 50}}) {
    expect_exact_product<2>(s);
    expect_exact_product<3>(s);
  }
}

TEST(Mma, ProductsOfManyTiles) {
  BATON_NEEDS_DEVICE();
  for (const Shape s : {Shape{100, 70, 130}, Shape{64, 96, 64}, Shape{128, 10, 500}}) {
    expect_exact_product<2>(s);
    expect_exact_product<3>(s);
    expect_exact_product<4>(s);
  }
}

TEST(Mma, ProductsOfRoundedNumbers) {  // against double on the same operands
  BATON_NEEDS_DEVICE();
  const Shape s{70, 50, 200};
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> a(size_t(s.m) * s.k), b(size_t(s.n) * s.k);
  for (float& x : a) x = simt::round_to_tf32(normal(random));
  for (float& x : b) x = simt::round_to_tf32(normal(random));
  const std::vector<float> c = product<3>(a, b, s);
  EXPECT_TRUE(close(c, product_reference(a, b, s), {.l2 = 1e-6}));
  record("mma.product", c, 2e-6f);
}

}  // namespace
}  // namespace test
}  // namespace baton
