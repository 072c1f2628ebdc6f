// What the files of layer_product share, and nobody else includes: one kernel for all products of layers, C = A B^T.
// The readers of its operands are in layer_product_readers.h.
//
// A block has a tile of C, each warp 32 x 32 of it, and goes along the depth in steps of 32. While a step is
// multiplied, the next ones are copied into shared memory. Two products may share their operands: the means' C = A B^T
// and the variances' C' = A' B'^T, where A' or B' are the squares of A or B, formed in registers, or operands of their
// own.
#pragma once
#include "kernels/layer_product_readers.h"
#include "kernels/local_reparam_parts.h"

namespace baton {

namespace {  // a copy in each file

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
    static_assert(T::slices == 1 || T::slices * T::parts * products * 32 * 32 <= stages * (piece_a + piece_b));
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
    // A lane has the sums of four rows in eight columns. Slices share the columns.
    constexpr int columns = 8 / T::slices;
    if constexpr (T::slices > 1) {
      __syncthreads();  // everyone has left the pieces
      SIMT_UNROLL
      for (int i = 0; i < products * 32; i++)
        pieces[((slice * T::parts + of_tile) * products * 32 + i) * simt::warp_size + simt::lane_id()] =
            sums[i / 32][i / 16 % 2][i / 4 % 4][i % 4];
      __syncthreads();
    }
    const int lane = simt::lane_id(), i = first_row + lane_row + lane / 4;
    SIMT_UNROLL
    for (int at = 0; at < columns; at++) {
      const int column = slice * columns + at;  // of eight
      float values[2][4] = {};
      SIMT_UNROLL
      for (int o = 0; o < products; o++) {
        SIMT_UNROLL
        for (int q = 0; q < 4; q++) {
          if constexpr (T::slices == 1) values[o][q] = sums[o][q / 2][at / 2][q % 2 * 2 + at % 2];
          else {
            const int number = ((o * 2 + q / 2) * 4 + column / 2) * 4 + q % 2 * 2 + column % 2;
            float sum = 0;
            SIMT_UNROLL
            for (int s = 0; s < T::slices; s++)
              sum += pieces[((s * T::parts + of_tile) * products * 32 + number) * simt::warp_size + lane];
            values[o][q] = sum;
          }
        }
      }
      form.store.column(values, i, first_column + lane_column + lane % 4 * 2 + column / 2 * 8 + column % 2, part, row);
    }
  }
}

template <class F>
void launch_product(const F& form, int rows, Stream stream) {
  simt::launch<product_kernel<F, simt::has_warps>>(
      simt::blocks(form.tiles(), F::TileOf::threads, form.shared_bytes(), rows), stream, form);
}

// Where the sums go, for C as it is: row i of column j, and of a lane's column its four rows.
template <class Store>
__device__ __forceinline__ void store_column(const Store& store, const float (&values)[2][4], int i, int j, int part,
                                             int row) {
  SIMT_UNROLL
  for (int q = 0; q < 4; q++) store.one(i + 8 * q, j, {values[0][q], values[1][q]}, part, row);
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
