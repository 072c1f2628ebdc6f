// The readers of the operands of layer_product_parts.h, and how a piece of an operand lies in shared memory.
#pragma once
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
// Which position of a batch of images a row is. Plainly, the positions one after the other. In quads, 32 rows are 8
// blocks of 2x2 positions, so that a thread of mma_tf32 gets all four sums of a block: row 8 q + i is place q of block
// i.
struct Positions {
  int down, across, count;  // count: of positions, or of quads
  bool quads;
  __host__ __device__ int rows() const { return quads ? (count + 7) / 8 * 32 : count; }
};
struct Position {
  int b, y, x;
};
__device__ __forceinline__ Position position_of(const Positions& p, const ConvShape& s, int row) {
  const int last = p.count - 1, place = p.quads ? min(row / 32 * 8 + row % 8, last) : min(row, last);
  const int plane = p.down * p.across, b = place / plane, o = place - b * plane, y = o / p.across, x = o - y * p.across;
  if (!p.quads) return {b, y, x};
  const int q = row / 8 % 4;  // the places of a quad at an odd edge are not all there
  return {b, min(2 * y + q / 2, s.out_height() - 1), min(2 * x + q % 2, s.out_width() - 1)};
}

__device__ __forceinline__ float window_element(const ConvShape& s, const float* x, Position at, int k) {
  const int y = at.y - s.pad, left = at.x - s.pad;
  const unsigned place = window_place(s, k);
  if (!is_inside(place, inside_mask(s.height, s.width, y, left))) return 0;
  return x[unsigned((at.b * s.in_channels * s.height + y) * s.width + left) + offset_of(place)];
}

// The windows of images: row i is the window of a position of the batch, its depth the channels' kernel x kernel
// numbers. A table in shared memory has their places.
template <class T, int tile, bool padded, int count>
struct Windows {
  using In = Piece<false, tile>;
  struct Source {
    Operand of[count];
    ConvShape shape;
    Positions positions;
    int depth;
    __host__ __device__ int table() const { return (depth + step_depth - 1) / step_depth * step_depth; }
    __host__ __device__ size_t table_bytes() const { return sizeof(int) * size_t(table()); }
    __device__ float element(int o, int i, int k, int row) const {
      return window_element(shape, of[o].of(row), position_of(positions, shape, i), k);
    }
  };
  static constexpr int operands = count, each = step_depth * tile / T::threads;  // each: of a column of the piece
  const float* from[count];
  const uint4* places;
  int place;
  unsigned base, mask = 0;

  __device__ __forceinline__ Windows(const Source& s, int first, int, int row, unsigned* table) {
    const ConvShape& g = s.shape;
    const int t = threadIdx.x;
    const Position at = position_of(s.positions, g, first + t % tile);
    const int y = at.y - g.pad, x = at.x - g.pad;
    SIMT_UNROLL
    for (int o = 0; o < count; o++) from[o] = simt::opaque(s.of[o].of(row));
    base = unsigned((at.b * g.in_channels * g.height + y) * g.width + x);
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
    __device__ float element(int, int i, int k, int row) const {
      const Positions all{shape.out_height(), shape.out_width(), depth, false};
      return window_element(shape, of[0].of(row), position_of(all, shape, k), i);
    }
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

}  // namespace

}  // namespace baton
