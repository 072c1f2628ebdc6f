// What layer_product.cu and layer_product_weights.cu share, and nobody else includes: one kernel for all products of
// layers, C = A B^T, and the readers of its operands.
//
// A block has a tile of C, each warp 32 x 32 of it, and goes along the depth in steps of 32. While a step is
// multiplied, the next ones are copied into shared memory. Two products may share their operands: the means' C = A B^T
// and the variances' C' = A' B'^T, where A' or B' are the squares of A or B, formed in registers, or operands of their
// own. Every sum runs along the depth in the same order, whatever the tile and the number of rows.
#pragma once
#include "engine/blas.h"
#include "kernels/layer_product.h"

namespace baton {

namespace {  // a copy in each file

constexpr int step_depth = 32, stages = 3;

// Where a tile is small and the depth is long, several warps share a part of the tile: each takes a slice of every
// step, and their sums are added at the end. So the order of sums depends on the number of slices.
template <int warps_down, int warps_across, int warps_deep = 1>
struct Tile {
  static constexpr int rows = 32 * warps_down, columns = 32 * warps_across, across = warps_across;
  static constexpr int parts = warps_down * warps_across, slices = warps_deep, threads = 32 * parts * slices;
};

// An operand: a matrix for each row of the launch, or one for `sharing` neighbouring rows.
struct Operand {
  const float* data;
  size_t stride;
  int sharing;
  __host__ __device__ const float* of(int row) const { return data + stride * size_t(row / sharing); }
};

// ------------------------------------------------------------------------------------------- operands in shared memory
// A piece of an operand: `tile` rows of the matrix, one step deep. Row by row it is read by ldmatrix; where the rows
// are neighbours in memory, they stay neighbours, and an element at a time is read. Both pitches keep the banks apart.
template <bool by_rows, int tile>
struct Piece {
  static constexpr int pitch = by_rows ? step_depth + 4 : tile + 8;
  static constexpr int floats = pitch * (by_rows ? tile : step_depth);
  __device__ __forceinline__ static int at(int row, int k) { return by_rows ? row * pitch + k : k * pitch + row; }

  // The fragment a of mma_tf32 of 16 rows from `row` on, and the fragments b of 8 and 8 rows.
  __device__ __forceinline__ static void load_a(float (&a)[4], const float* s, int row, int k) {
    const int lane = simt::lane_id();
    if constexpr (by_rows) simt::load_matrix(a, s + at(row + lane % 16, k + lane / 16 * 4));
    else {
      const float* p = s + at(row + lane / 4, k + lane % 4);
      a[0] = p[0], a[1] = p[8], a[2] = p[4 * pitch], a[3] = p[4 * pitch + 8];
    }
  }
  __device__ __forceinline__ static void load_b(float (&b)[2], float (&c)[2], const float* s, int row, int k) {
    const int lane = simt::lane_id();
    if constexpr (by_rows) {
      float d[4];
      simt::load_matrix(d, s + at(row + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * 4));
      b[0] = d[0], b[1] = d[1], c[0] = d[2], c[1] = d[3];
    } else {
      const float* p = s + at(row + lane / 4, k + lane % 4);
      b[0] = p[0], b[1] = p[4 * pitch], c[0] = p[8], c[1] = p[4 * pitch + 8];
    }
  }
};

// ---- readers. A reader copies its operand's pieces, step after step: `count` matrices of the same form (means and
// variances). element() says what it reads, for the portable twin. Rows beyond the last one are anything, for what is
// multiplied with them is not stored. Beyond the depth one of the operands is 0, and the other a number.
//
// The loop of products has as few other instructions as its readers. So a reader keeps where its thread begins, in
// global memory and in a piece; all else are constants.

// Rows of `depth` numbers, one behind the other.
template <class T, int tile, int width, int count>
struct MatrixRows {
  using In = Piece<true, tile>;
  struct Source {
    Operand of[count];
    int rows, depth;
    __host__ __device__ size_t table_bytes() const { return 0; }
    __device__ float element(int o, int i, int k, int row) const { return of[o].of(row)[size_t(i) * depth + k]; }
  };
  static constexpr int operands = count;
  static constexpr int chunks = step_depth / width, at_once = T::threads / chunks, each = tile / at_once;
  const float* from[count];
  int depth, rows, left, place;  // rows: from this thread's first one on; left: of the depth

  __device__ __forceinline__ MatrixRows(const Source& s, int first_row, int first_step, int row, unsigned*) {
    const int t = threadIdx.x, i = t / chunks, k = t % chunks * width;
    depth = s.depth, rows = s.rows - first_row - i, left = s.depth - first_step * step_depth - k, place = In::at(i, k);
    SIMT_UNROLL
    for (int o = 0; o < count; o++)
      from[o] = s.of[o].of(row) + (rows > 0 ? (first_row + i) * s.depth : 0) + first_step * step_depth + k;
  }
  __device__ __forceinline__ void fetch(float* to) {
    SIMT_UNROLL
    for (int o = 0; o < count; o++) {
      SIMT_UNROLL
      for (int j = 0; j < each; j++)
        simt::copy_async_if<width>(to + place + o * In::floats + j * at_once * In::pitch, from[o] + j * at_once * depth,
                                   left > 0 && j * at_once < rows);
      from[o] += step_depth;
    }
    left -= step_depth;
  }
};

// The rows of `rows` numbers are the columns here: element (i, k) is number i of row k.
template <class T, int tile, int width, int count>
struct MatrixColumns {
  using In = Piece<false, tile>;
  struct Source {
    Operand of[count];
    int rows, depth;
    __host__ __device__ size_t table_bytes() const { return 0; }
    __device__ float element(int o, int i, int k, int row) const { return of[o].of(row)[size_t(k) * rows + i]; }
  };
  static constexpr int operands = count;
  static constexpr int chunks = tile / width, at_once = T::threads / chunks, each = step_depth / at_once;
  const float* from[count];
  int pitch, inside, left, place;  // left: of the depth, from this thread's first row on

  __device__ __forceinline__ MatrixColumns(const Source& s, int first_row, int first_step, int row, unsigned*) {
    const int t = threadIdx.x, i = t % chunks * width, k = t / chunks;
    pitch = s.rows, inside = first_row + i < s.rows, place = In::at(i, k);
    left = s.depth - first_step * step_depth - k;
    SIMT_UNROLL
    for (int o = 0; o < count; o++)
      from[o] = s.of[o].of(row) + (left > 0 && inside ? (first_step * step_depth + k) * pitch + first_row + i : 0);
  }
  __device__ __forceinline__ void fetch(float* to) {
    SIMT_UNROLL
    for (int o = 0; o < count; o++) {
      SIMT_UNROLL
      for (int j = 0; j < each; j++)
        simt::copy_async_if<width>(to + place + o * In::floats + j * at_once * In::pitch, from[o] + j * at_once * pitch,
                                   j * at_once < left && inside);
      from[o] += step_depth * pitch;
    }
    left -= step_depth;
  }
};

// The places that a window of an image covers, as one number each: how far the place lies behind the window's first one
// in memory, and in the last 5 bits its number among 5 x 5, for the mask of those that are inside the image.
constexpr int largest_kernel = 5;
constexpr unsigned outside = 31;  // a number that no mask has
__device__ __forceinline__ unsigned window_place(const ConvShape& s, int k) {
  const int plane = s.kernel * s.kernel, c = k / plane, y = (k - c * plane) / s.kernel,
            x = k - c * plane - y * s.kernel;
  return unsigned((c * s.height + y) * s.width + x) << 5 | unsigned(y * largest_kernel + x);
}
// Unsigned: one instruction then makes an address of it. An offset before the image wraps round, and is not read.
__device__ __forceinline__ unsigned offset_of(unsigned place) { return place >> 5; }
__device__ __forceinline__ bool is_inside(unsigned place, unsigned mask) { return mask >> (place & 31) & 1; }
// Which places of the window at (y, x), which may begin outside the image, are in it: bits low to high - 1 of a row.
__device__ __forceinline__ unsigned inside_mask(int height, int width, int y, int x) {
  const int left = max(0, -x), right = min(largest_kernel, width - x);
  const int top = max(0, -y) * largest_kernel, bottom = min(largest_kernel, height - y) * largest_kernel;
  return ((1u << right) - (1u << left)) * 0x108421u & ((1u << bottom) - (1u << top));
}
__device__ __forceinline__ float window_element(const ConvShape& s, const float* x, int position, int k) {
  const int plane = s.out_height() * s.out_width(), b = position / plane, p = position - b * plane;
  const int y = p / s.out_width() - s.pad, left = p % s.out_width() - s.pad;
  const unsigned place = window_place(s, k);
  if (!is_inside(place, inside_mask(s.height, s.width, y, left))) return 0;
  return x[unsigned((b * s.in_channels * s.height + y) * s.width + left) + offset_of(place)];
}

// The windows of images: row i is the window of position i of the batch, its depth the channels' kernel x kernel
// numbers. A table in shared memory has their places.
template <class T, int tile, bool padded, int count>
struct Windows {
  using In = Piece<false, tile>;
  struct Source {
    Operand of[count];
    ConvShape shape;
    int rows, depth;
    __host__ __device__ int table() const { return (depth + step_depth - 1) / step_depth * step_depth; }
    __host__ __device__ size_t table_bytes() const { return sizeof(int) * size_t(table()); }
    __device__ float element(int o, int i, int k, int row) const { return window_element(shape, of[o].of(row), i, k); }
  };
  static constexpr int operands = count, each = step_depth * tile / T::threads;  // each: of a column of the piece
  const float* from[count];
  const uint4* places;
  int place;
  unsigned base, mask = 0;

  __device__ __forceinline__ Windows(const Source& s, int first, int, int row, unsigned* table) {
    const ConvShape& g = s.shape;
    const int t = threadIdx.x, i = min(first + t % tile, s.rows - 1), plane = g.out_height() * g.out_width();
    const int b = i / plane, p = i - b * plane, y = p / g.out_width() - g.pad, x = p % g.out_width() - g.pad;
    SIMT_UNROLL
    for (int o = 0; o < count; o++) from[o] = simt::opaque(s.of[o].of(row));
    base = unsigned((b * g.in_channels * g.height + y) * g.width + x);
    if constexpr (padded) mask = inside_mask(g.height, g.width, y, x);
    place = In::at(t % tile, t / tile * each);
    places = reinterpret_cast<const uint4*>(table + t / tile * each);
    for (int k = t; k < s.table(); k += blockDim.x)
      table[k] = k >= s.depth ? (padded ? outside : 0u) : padded ? window_place(g, k) : offset_of(window_place(g, k));
    __syncthreads();
  }
  __device__ __forceinline__ void copy(float* to, unsigned at) const {
    SIMT_UNROLL
    for (int o = 0; o < count; o++) {
      if constexpr (padded)
        simt::copy_async_if<1>(to + o * In::floats, from[o] + (base + offset_of(at)), is_inside(at, mask));
      else simt::copy_async<1>(to + o * In::floats, from[o] + (base + at));
    }
  }
  __device__ __forceinline__ void fetch(float* to) {
    SIMT_UNROLL
    for (int k = 0; k < each; k += 4) {
      const uint4 at = places[k / 4];
      copy(to + place + k * In::pitch, at.x), copy(to + place + (k + 1) * In::pitch, at.y);
      copy(to + place + (k + 2) * In::pitch, at.z), copy(to + place + (k + 3) * In::pitch, at.w);
    }
    places += step_depth / 4;
  }
};

// The same, with the positions as the depth: row i is a place of the window.
template <class T, int tile, bool padded>
struct WindowColumns {
  using In = Piece<true, tile>;
  struct Source {
    Operand of[1];
    ConvShape shape;
    int rows, depth;
    __host__ __device__ size_t table_bytes() const { return sizeof(unsigned) * tile; }
    __device__ float element(int, int i, int k, int row) const { return window_element(shape, of[0].of(row), k, i); }
  };
  static constexpr int operands = 1, at_once = T::threads / step_depth, each = tile / at_once;
  const float* from;
  const uint4* places;     // of this thread's rows, which are neighbours
  int place, b, p;         // p: the position of this thread's number of the step, in image b
  const ConvShape& shape;  // a kernel's argument: it takes no registers
  float inverse;

  __device__ __forceinline__ WindowColumns(const Source& s, int first_row, int first_step, int row, unsigned* table)
      : from(simt::opaque(s.of[0].of(row))), shape(s.shape) {
    const ConvShape& g = s.shape;
    const int t = threadIdx.x, k = first_step * step_depth + t % step_depth;
    const int plane = g.out_height() * g.out_width();
    inverse = 1.f / float(g.out_width());
    b = k / plane, p = k - b * plane, place = In::at(t / step_depth * each, t % step_depth);
    places = reinterpret_cast<const uint4*>(table + t / step_depth * each);
    for (int i = t; i < tile; i += blockDim.x) {
      const unsigned of_row = window_place(g, min(first_row + i, s.rows - 1));
      table[i] = padded ? of_row : offset_of(of_row);
    }
    __syncthreads();
  }
  __device__ __forceinline__ void copy(float* to, unsigned at, unsigned corner, [[maybe_unused]] unsigned mask) const {
    if constexpr (padded) simt::copy_async_if<1>(to, from + (corner + offset_of(at)), is_inside(at, mask));
    else simt::copy_async<1>(to, from + (corner + at));  // beyond the depth the other operand is 0
  }
  __device__ __forceinline__ void fetch(float* to) {
    const ConvShape& g = shape;
    const int row = int((float(p) + 0.5f) * inverse);  // exact below 2^20
    const int y = row - g.pad, x = p - row * g.out_width() - g.pad, beyond = b >= g.batch;
    const unsigned corner = beyond ? 0 : unsigned((b * g.in_channels * g.height + y) * g.width + x);
    [[maybe_unused]] unsigned mask = 0;
    if constexpr (padded) mask = beyond ? 0 : inside_mask(g.height, g.width, y, x);
    SIMT_UNROLL
    for (int j = 0; j < each; j += 4) {
      const uint4 at = places[j / 4];
      float* target = to + place + j * In::pitch;
      copy(target, at.x, corner, mask), copy(target + In::pitch, at.y, corner, mask);
      copy(target + 2 * In::pitch, at.z, corner, mask), copy(target + 3 * In::pitch, at.w, corner, mask);
    }
    const int plane = g.out_height() * g.out_width();
    for (p += step_depth; p >= plane; p -= plane) b++;
  }
};

// Planes of a batch, [batch][rows][plane]: row i is channel i, its depth the positions of the whole batch.
template <class T, int tile, int width, int count>
struct PlaneRows {
  using In = Piece<true, tile>;
  struct Source {
    Operand of[count];
    int rows, plane, batch;
    __host__ __device__ size_t table_bytes() const { return 0; }
    __device__ float element(int o, int i, int k, int row) const {
      const int image = k / plane;
      return of[o].of(row)[(size_t(image) * rows + i) * plane + (k - image * plane)];
    }
  };
  static constexpr int operands = count;
  static constexpr int chunks = step_depth / width, at_once = T::threads / chunks, each = tile / at_once;
  const Source& source;
  const float* from[count];    // at this thread's first channel and number
  int rows, images, p, place;  // rows and images: from its own ones on

  __device__ __forceinline__ PlaneRows(const Source& s, int first_row, int first_step, int row, unsigned*) : source(s) {
    const int t = threadIdx.x, i = t / chunks, k = first_step * step_depth + t % chunks * width, b = k / s.plane;
    rows = s.rows - first_row - i, images = s.batch - b, p = k - b * s.plane;
    place = In::at(i, t % chunks * width);
    SIMT_UNROLL
    for (int o = 0; o < count; o++)
      from[o] = s.of[o].of(row) + (rows > 0 ? (size_t(b) * s.rows + first_row + i) * s.plane + p : 0);
  }
  __device__ __forceinline__ void fetch(float* to) {
    SIMT_UNROLL
    for (int o = 0; o < count; o++) {
      SIMT_UNROLL
      for (int j = 0; j < each; j++)
        simt::copy_async_if<width>(to + place + o * In::floats + j * at_once * In::pitch,
                                   from[o] + j * at_once * source.plane, images > 0 && j * at_once < rows);
    }
    int forward = step_depth;
    for (p += step_depth; p >= source.plane; p -= source.plane) images--, forward += (source.rows - 1) * source.plane;
    SIMT_UNROLL
    for (int o = 0; o < count; o++) from[o] += forward;
  }
};

// ---------------------------------------------------------------------------------------------------------- the kernel
// The square of a tf32 number, rounded to tf32: half a unit is added, for mma_tf32 does not look at the last bits. A
// NaN may become a number here, where round_to_tf32() would take three instructions to keep it: the means' product,
// which has the number itself for an operand, keeps it.
__device__ __forceinline__ float rounded_square(float x) {
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, x * x) + 0x1000u);
}

// The tiles of C, and how the depth is split: each part has `steps` steps.
struct Split {
  int rows, columns, depth, parts, steps;
};

template <class T, class A, class B, bool dual, class Store>
struct Form {
  using TileOf = T;
  using ReaderA = A;
  using ReaderB = B;
  using StoreOf = Store;
  static constexpr int products = dual ? 2 : 1;
  static constexpr int piece_a = A::In::floats * A::operands, piece_b = B::In::floats * B::operands;
  typename A::Source a;
  typename B::Source b;
  Store store;
  Split split;
  int tiles() const {
    return (split.rows + T::rows - 1) / T::rows * ((split.columns + T::columns - 1) / T::columns) * split.parts;
  }
  size_t shared_bytes() const {
    static_assert((T::slices - 1) * T::parts * products * 32 * 32 <= stages * (piece_a + piece_b));
    return a.table_bytes() + b.table_bytes() + sizeof(float) * size_t(stages) * (piece_a + piece_b);
  }
};

template <class F, bool warps>
__global__ void __launch_bounds__(F::TileOf::threads, F::TileOf::threads == 256 ? 2 : 1) product_kernel(F form) {
  using T = typename F::TileOf;
  using InA = typename F::ReaderA::In;
  using InB = typename F::ReaderB::In;
  constexpr int products = F::products, of_a = F::ReaderA::operands, of_b = F::ReaderB::operands;
  const Split& split = form.split;
  const int across = (split.columns + T::columns - 1) / T::columns, down = (split.rows + T::rows - 1) / T::rows;
  const int part = int(blockIdx.x) / (across * down), tile = int(blockIdx.x) % (across * down), row = simt::row();
  const int first_row = tile / across * T::rows, first_column = tile % across * T::columns;
  const int first_step = part * split.steps;
  if constexpr (!warps) {
    const int end = min(split.depth, (first_step + split.steps) * step_depth);
    for (int at = threadIdx.x; at < T::rows * T::columns; at += blockDim.x) {
      const int i = first_row + at / T::columns, j = first_column + at % T::columns;
      if (i >= split.rows || j >= split.columns) continue;
      float sums[2] = {};
      for (int k = first_step * step_depth; k < end; k++) {
        const float x = form.a.element(0, i, k, row), w = form.b.element(0, j, k, row);
        sums[0] = fmaf(x, w, sums[0]);
        if constexpr (products == 2) {
          const float y = of_a == 2 ? form.a.element(of_a - 1, i, k, row) : simt::round_to_tf32(x * x);
          const float v = of_b == 2 ? form.b.element(of_b - 1, j, k, row) : simt::round_to_tf32(w * w);
          sums[1] = fmaf(y, v, sums[1]);
        }
      }
      form.store.one(i, j, sums, part, row);
    }
  } else {
    SIMT_DYNAMIC_SHARED(float, pieces);  // [stages][A, then B]; the reader's table lies behind them
    constexpr int stage_floats = F::piece_a + F::piece_b;
    unsigned* tables = reinterpret_cast<unsigned*>(pieces + stages * stage_floats);
    typename F::ReaderA a(form.a, first_row, first_step, row, tables);
    typename F::ReaderB b(form.b, first_column, first_step, row, tables + form.a.table_bytes() / sizeof(unsigned));
    const int steps = min(split.steps, (split.depth + step_depth - 1) / step_depth - first_step);
    const int warp = threadIdx.x / simt::warp_size, slice = warp / T::parts, of_tile = warp % T::parts;
    const int lane_row = of_tile / T::across * 32, lane_column = of_tile % T::across * 32;
    float sums[products][2][4][4];
    SIMT_UNROLL
    for (int i = 0; i < products * 32; i++) sums[i / 32][i / 16 % 2][i / 4 % 4][i % 4] = 0;
    const auto fetch = [&](float* to) {
      a.fetch(to);
      b.fetch(to + F::piece_a);
    };
    SIMT_UNROLL
    for (int step = 0; step < stages - 1; step++) {
      if (step < steps) fetch(pieces + step * stage_floats);
      simt::copy_async_commit();
    }
    int read = 0, write = (stages - 1) * stage_floats;  // where the pieces of this step and of the one to copy lie
    for (int step = 0; step < steps; step++) {
      simt::copy_async_wait<stages - 2>();
      __syncthreads();  // this step's pieces are there, and everyone has left those of the step before
      if (step + stages - 1 < steps) fetch(pieces + write);
      simt::copy_async_commit();
      const float* now = pieces + read;
      write = read;
      read = read == (stages - 1) * stage_floats ? 0 : read + stage_floats;
      SIMT_UNROLL
      for (int unsliced = 0; unsliced < step_depth; unsliced += 8 * T::slices) {
        const int k = unsliced + 8 * slice;
        float x[products][2][4], w[products][4][2];
        SIMT_UNROLL
        for (int o = 0; o < of_a; o++) {
          SIMT_UNROLL
          for (int i = 0; i < 2; i++) InA::load_a(x[o][i], now + o * InA::floats, lane_row + 16 * i, k);
        }
        SIMT_UNROLL
        for (int o = 0; o < of_b; o++) {
          SIMT_UNROLL
          for (int j = 0; j < 4; j += 2)
            InB::load_b(w[o][j], w[o][j + 1], now + F::piece_a + o * InB::floats, lane_column + 8 * j, k);
        }
        if constexpr (products == 2 && of_a == 1) {
          SIMT_UNROLL
          for (int i = 0; i < 8; i++) x[1][i / 4][i % 4] = rounded_square(x[0][i / 4][i % 4]);
        }
        if constexpr (products == 2 && of_b == 1) {
          SIMT_UNROLL
          for (int i = 0; i < 8; i++) w[1][i / 2][i % 2] = rounded_square(w[0][i / 2][i % 2]);
        }
        SIMT_UNROLL
        for (int o = 0; o < products; o++) {
          SIMT_UNROLL
          for (int i = 0; i < 2; i++) {
            SIMT_UNROLL
            for (int j = 0; j < 4; j++) simt::mma_tf32(sums[o][i][j], x[o][i], w[o][j]);
          }
        }
      }
    }
    simt::copy_async_wait<0>();
    if constexpr (T::slices > 1) {
      constexpr int each = products * 32;  // sums of a lane
      __syncthreads();                     // everyone has left the pieces
      const auto place = [&](int of_slice, int i) {
        return ((of_slice - 1) * T::parts + of_tile) * each * simt::warp_size + i * simt::warp_size + simt::lane_id();
      };
      if (slice > 0) {
        SIMT_UNROLL
        for (int i = 0; i < each; i++) pieces[place(slice, i)] = sums[i / 32][i / 16 % 2][i / 4 % 4][i % 4];
      }
      __syncthreads();
      if (slice == 0) {
        SIMT_UNROLL
        for (int i = 0; i < each; i++) {
          SIMT_UNROLL
          for (int other = 1; other < T::slices; other++)
            sums[i / 32][i / 16 % 2][i / 4 % 4][i % 4] += pieces[place(other, i)];
        }
      }
    }
    if (slice == 0) form.store.warp(sums, first_row + lane_row, first_column + lane_column, part, row);
  }
}

template <class F>
void launch_product(const F& form, int rows, Stream stream) {
  simt::launch<product_kernel<F, simt::has_warps>>(
      simt::blocks(form.tiles(), F::TileOf::threads, form.shared_bytes(), rows), stream, form);
}

// Calls f(i, j, values) for each element of a warp's 32 x 32 sums.
template <int products, class G>
__device__ __forceinline__ void for_sums(const float (&sums)[products][2][4][4], int first_row, int first_column, G g) {
  const int lane = simt::lane_id();
  SIMT_UNROLL
  for (int half = 0; half < 4; half++) {
    SIMT_UNROLL
    for (int at = 0; at < 8; at++) {
      const int i = first_row + lane / 4 + 8 * half, j = first_column + lane % 4 * 2 + at / 2 * 8 + at % 2;
      float values[2] = {sums[0][half / 2][at / 2][half % 2 * 2 + at % 2], 0};
      if constexpr (products == 2) values[1] = sums[1][half / 2][at / 2][half % 2 * 2 + at % 2];
      g(i, j, values);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ choices
inline bool is_dense(const ConvShape& s) { return s.kernel == 1 && s.height == 1 && s.width == 1 && s.pad == 0; }

// Whether copies of 16 bytes reach all rows of `pitch` numbers.
template <int count>
bool is_aligned(const Operand (&of)[count], int pitch) {
  for (const Operand& o : of)
    if (reinterpret_cast<uintptr_t>(o.data) % 16 || o.stride % 4 || pitch % 4) return false;
  return true;
}

__host__ __device__ inline int forward_pitch(const ConvShape& s) {
  return (s.in_channels * s.kernel * s.kernel + 3) / 4 * 4;
}
__host__ __device__ inline int backward_pitch(const ConvShape& s) {
  return (s.out_channels * s.kernel * s.kernel + 3) / 4 * 4;
}

// Into how many parts the depth of the weights' gradients is split: enough to fill a GPU of 132 multiprocessors with
// one row, of at least four steps. They depend on the shape alone, so that the order of sums does.
inline int parts_of_gradients(const ConvShape& s) {
  const int columns = s.in_channels * s.kernel * s.kernel;
  const int steps = (s.batch * s.out_height() * s.out_width() + step_depth - 1) / step_depth;
  const int tiles = s.out_channels <= 32 && columns <= 32 ? 1 : (s.out_channels + 63) / 64 * ((columns + 127) / 128);
  const int wanted = max(1, min(132 / tiles, steps / 4)), steps_each = (steps + wanted - 1) / wanted;
  return (steps + steps_each - 1) / steps_each;
}

}  // namespace

}  // namespace baton
