// Bayesian gradient descent (Zeno et al. 2018, Algorithm 1): draws of the weights, and the moments of their gradients.
// The update that they lead to is in bgd_update.cu.
//
// The noise e_k of draw k is never kept: its counter gives it again. The moments of a dense layer come without its K
// gradients, in one of two ways:
//   fused (GPU): a block takes a tile of the weights. It multiplies dy_k^T x_k for k = 1..K in registers and adds each
//     product to two more register tiles, with the noise made in between. 2 out in K batch FLOPs of products, 4 normals
//     a thread and draw; dy and x are read in / 64 and out / 64 times, from L2, and the moments are written once.
//   by tiles (host): the same order, with a BLAS product into a tile that stays in the core's cache.
//
// Bytes: draw_weights 8 count + 4 count K; accumulate_moments 4 count K + 8 or 16 count.
#include "kernels/bgd.h"

#if !defined(BATON_CUDA)
#include "engine/blas_tiles_host.h"
#endif

namespace baton {

namespace {

struct Counter {  // the key and the step that a step's noise is drawn with
  Key key;
  uint32_t step;
};

__device__ __forceinline__ float lane_of(const float4& e, int lane) {
  return lane == 0 ? e.x : lane == 1 ? e.y : lane == 2 ? e.z : e.w;
}

__device__ __forceinline__ Counter counter_of(const StepState* states, const Counter& given) {
  return states ? Counter{states[0].noise, states[0].step} : given;
}

// A block takes a stretch of the weights. Its noise goes through shared memory, so that everything else is read and
// written weight after weight: coalesced on the GPU, and without shuffles between vectors on the host.
constexpr int stretch = 1024;
constexpr int stretch_threads = stretch / 4;

// e[i] for the weights [first, first + stretch) of the store, first a multiple of four.
__device__ __forceinline__ void draw_stretch(float* __restrict__ e, int first, uint32_t draw, const Counter& c) {
  SIMT_SIMD()
  for (int q = threadIdx.x; q < stretch / 4; q += blockDim.x) {
    const float4 n = normal4(c.key, uint32_t(first / 4 + q), stream_weights, c.step, draw);
    e[4 * q] = n.x;
    e[4 * q + 1] = n.y;
    e[4 * q + 2] = n.z;
    e[4 * q + 3] = n.w;
  }
  __syncthreads();
}

__global__ void __launch_bounds__(stretch_threads)
    draw_kernel(float* w, size_t stride, const float* mean, const float* sd, int count, int first_draw,
                const StepState* states, Counter given) {
  __shared__ float e[stretch];
  const int first = int(blockIdx.x) * stretch, n = min(stretch, count - first), k = simt::row();
  draw_stretch(e, first, uint32_t(first_draw + k), counter_of(states, given));
  float* __restrict__ to = w + stride * k + first;
  const float* __restrict__ m = mean + first;
  const float* __restrict__ s = sd + first;
  SIMT_SIMD()
  for (int i = threadIdx.x; i < n; i += blockDim.x) to[i] = m[i] + s[i] * e[i];
}

void draw(float* w, size_t stride, const float* mean, const float* sd, int count, int first_draw, int draws,
          const StepState* states, Counter given, Stream stream) {
  simt::launch<draw_kernel>(simt::blocks((count + stretch - 1) / stretch, stretch_threads, 0, draws), stream, w, stride,
                            mean, sd, count, first_draw, states, given);
}

// ------------------------------------------------------------------------------------------------------- moments
// A block takes all draws of its stretch, so that the sums are read and written once.
__global__ void __launch_bounds__(stretch_threads)
    accumulate_kernel(float* sum, float* noise, const float* grad, size_t grad_stride, int first, int count,
                      DrawnPass pass, const StepState* __restrict__ states) {
  __shared__ float e[stretch];
  const Counter c{states[0].noise, states[0].step};
  const int from = int(blockIdx.x) * stretch, n = min(stretch, count - from);
  float* __restrict__ s = sum + from;
  float* __restrict__ t = noise + from;
  for (int k = 0; k < pass.draws; k++) {
    draw_stretch(e, first + from, uint32_t(pass.first_draw + k), c);
    const float* __restrict__ g = grad + grad_stride * k + from;
    if (pass.add || k > 0) {
      SIMT_SIMD()
      for (int i = threadIdx.x; i < n; i += blockDim.x) {
        s[i] += g[i];
        t[i] += g[i] * e[i];
      }
    } else {
      SIMT_SIMD()
      for (int i = threadIdx.x; i < n; i += blockDim.x) {
        s[i] = g[i];
        t[i] = g[i] * e[i];
      }
    }
    __syncthreads();  // the next draw overwrites e
  }
}

// The same, weight by weight, for tensors at places that four does not divide.
__global__ void accumulate_each_kernel(float* __restrict__ sum, float* __restrict__ noise,
                                       const float* __restrict__ grad, size_t grad_stride, int first, int count,
                                       DrawnPass pass, const StepState* __restrict__ states) {
  const int i = simt::thread_item();
  if (i >= count) return;
  const Counter c{states[0].noise, states[0].step};
  const uint32_t place = uint32_t(first + i);
  float s = pass.add ? sum[i] : 0.f, n = pass.add ? noise[i] : 0.f;
  for (int k = 0; k < pass.draws; k++) {
    const float4 e = normal4(c.key, place / 4, stream_weights, c.step, uint32_t(pass.first_draw + k));
    const float g = grad[grad_stride * k + i];
    s += g;
    n += g * lane_of(e, int(place % 4));
  }
  sum[i] = s;
  noise[i] = n;
}

#if !defined(BATON_CUDA)
// Adds a tile's gradients of one draw, g [count], to the sums of the weights [from, from + count) of a tensor at
// `first`. This is host code between two BLAS calls, and no kernel: so it makes its noise itself, for draw_stretch()
// belongs to a block.
void fold_run(float* __restrict__ sum, float* __restrict__ noise, const float* __restrict__ g, int from, int count,
              int first, uint32_t draw, bool add, const Counter& c) {
  float e[stretch];
  for (int at = 0; at < count; at += stretch) {
    const int n = min(stretch, count - at);
    const uint32_t quad = uint32_t((first + from + at) / 4);
#pragma omp simd
    for (int q = 0; q < stretch / 4; q++) {
      const float4 v = normal4(c.key, quad + uint32_t(q), stream_weights, c.step, draw);
      e[4 * q] = v.x;
      e[4 * q + 1] = v.y;
      e[4 * q + 2] = v.z;
      e[4 * q + 3] = v.w;
    }
    float* __restrict__ s = sum + from + at;
    float* __restrict__ t = noise + from + at;
    const float* __restrict__ h = g + at;
    if (add)
      for (int i = 0; i < n; i++) {
        s[i] += h[i];
        t[i] += h[i] * e[i];
      }
    else
      for (int i = 0; i < n; i++) {
        s[i] = h[i];
        t[i] = h[i] * e[i];
      }
  }
}
#endif

// ---- the fused product. A block takes a tile of the weights, a thread a part of it. In the serial build the one
// thread of a block takes a whole small tile.
constexpr bool one_thread = simt::warp_size == 1;
constexpr int tile_out = one_thread ? 4 : 64, tile_in = one_thread ? 32 : 64, depth = 16;
constexpr int part_out = one_thread ? tile_out : 4, part_in = one_thread ? tile_in : 4;
constexpr int product_threads = (tile_out / part_out) * (tile_in / part_in);
constexpr int pitch_out = tile_out + 4, pitch_in = tile_in + 4;  // rows of shared memory start in other banks

struct ProductShape {
  int first, out, in, batch;
};

// Loads [depth][tile] of x from (row, column) on, with zeros beyond x's rows and columns, as the precision has it.
template <Precision precision>
__device__ __forceinline__ void load_piece(float* to, int pitch, int tile, const float* __restrict__ x, int columns,
                                           int column, int row, int rows) {
  for (int i = threadIdx.x; i < depth * tile; i += blockDim.x) {
    const int d = i / tile, j = i % tile;
    const bool inside = row + d < rows && column + j < columns;
    const float value = inside ? x[size_t(row + d) * columns + column + j] : 0.f;
    to[d * pitch + j] = precision == Precision::tf32 ? simt::round_to_tf32(value) : value;
  }
}

// a and b: shared memory for a piece of dy and of x.
template <Precision precision>
__device__ __forceinline__ void accumulate_product(float* a, float* b, float* __restrict__ sum,
                                                   float* __restrict__ noise, Matrices dy, Matrices x,
                                                   ProductShape shape, DrawnPass pass,
                                                   const StepState* __restrict__ states) {
  const int tiles = (shape.in + tile_in - 1) / tile_in, t = threadIdx.x;
  const int out0 = int(blockIdx.x) / tiles * tile_out, in0 = int(blockIdx.x) % tiles * tile_in;
  const int my_out = t / (tile_in / part_in) * part_out, my_in = t % (tile_in / part_in) * part_in;
  const Counter c{states[0].noise, states[0].step};
  float s[part_out][part_in], n[part_out][part_in];
  SIMT_UNROLL
  for (int i = 0; i < part_out; i++) {
    SIMT_UNROLL
    for (int j = 0; j < part_in; j++) s[i][j] = n[i][j] = 0.f;
  }
  for (int k = 0; k < pass.draws; k++) {
    float g[part_out][part_in];
    SIMT_UNROLL
    for (int i = 0; i < part_out; i++) {
      SIMT_UNROLL
      for (int j = 0; j < part_in; j++) g[i][j] = 0.f;
    }
    for (int row = 0; row < shape.batch; row += depth) {
      load_piece<precision>(a, pitch_out, tile_out, dy.data + dy.stride * k, shape.out, out0, row, shape.batch);
      load_piece<precision>(b, pitch_in, tile_in, x.data + x.stride * k, shape.in, in0, row, shape.batch);
      __syncthreads();
      for (int d = 0; d < depth; d++) {
        SIMT_UNROLL
        for (int i = 0; i < part_out; i++) {
          const float ai = a[d * pitch_out + my_out + i];
          SIMT_UNROLL
          for (int j = 0; j < part_in; j++) g[i][j] = fmaf(ai, b[d * pitch_in + my_in + j], g[i][j]);
        }
      }
      __syncthreads();
    }
    const uint32_t number = uint32_t(pass.first_draw + k);
    SIMT_UNROLL
    for (int i = 0; i < part_out; i++) {
      const uint32_t place =
          uint32_t(shape.first) + uint32_t(out0 + my_out + i) * uint32_t(shape.in) + uint32_t(in0 + my_in);
      uint32_t quad = place / 4;
      float4 e = normal4(c.key, quad, stream_weights, c.step, number);
      SIMT_UNROLL
      for (int j = 0; j < part_in; j++) {
        if ((place + j) / 4 != quad) {  // never within a part of 4 where four divides the row
          quad = (place + j) / 4;
          e = normal4(c.key, quad, stream_weights, c.step, number);
        }
        s[i][j] += g[i][j];
        n[i][j] += g[i][j] * lane_of(e, int((place + j) % 4));
      }
    }
  }
  SIMT_UNROLL
  for (int i = 0; i < part_out; i++) {
    SIMT_UNROLL
    for (int j = 0; j < part_in; j++) {
      const int row = out0 + my_out + i, column = in0 + my_in + j;
      if (row < shape.out && column < shape.in) {
        const size_t at = size_t(shape.first) + size_t(row) * shape.in + column;
        sum[at] = (pass.add ? sum[at] : 0.f) + s[i][j];
        noise[at] = (pass.add ? noise[at] : 0.f) + n[i][j];
      }
    }
  }
}

__global__ void __launch_bounds__(256)
    product_kernel(float* __restrict__ sum, float* __restrict__ noise, Matrices dy, Matrices x, ProductShape shape,
                   DrawnPass pass, const StepState* __restrict__ states) {
  __shared__ float a[depth * pitch_out];
  __shared__ float b[depth * pitch_in];
  accumulate_product<Precision::fp32>(a, b, sum, noise, dy, x, shape, pass, states);
}

__global__ void __launch_bounds__(256)
    product_tf32_kernel(float* __restrict__ sum, float* __restrict__ noise, Matrices dy, Matrices x, ProductShape shape,
                        DrawnPass pass, const StepState* __restrict__ states) {
  __shared__ float a[depth * pitch_out];
  __shared__ float b[depth * pitch_in];
  accumulate_product<Precision::tf32>(a, b, sum, noise, dy, x, shape, pass, states);
}

void check_product(int first, int out, int in, int batch) {
  if (first % 4 != 0 || first < 0 || out < 1 || in < 1 || batch < 1)
    throw InputError("the moments of a product [" + std::to_string(out) + "][" + std::to_string(in) + "] of " +
                     std::to_string(batch) + " examples at place " + std::to_string(first) +
                     ": sizes are positive, and the place divides by four");
}

}  // namespace

void draw_weights(float* w, size_t stride, const float* mean, const float* sd, int count, int first_draw, int draws,
                  const StepState* states, Stream stream) {
  BATON_RANGE("draw_weights");
  draw(w, stride, mean, sd, count, first_draw, draws, states, {}, stream);
}

void draw_weights(float* w, size_t stride, const float* mean, const float* sd, int count, int first_draw, int draws,
                  Key key, Stream stream) {
  BATON_RANGE("draw_weights");
  draw(w, stride, mean, sd, count, first_draw, draws, nullptr, {key, 0}, stream);
}

void accumulate_moments(Moments m, const float* grad, size_t grad_stride, int first, int count, DrawnPass pass,
                        const StepState* states, Stream stream) {
  BATON_RANGE("accumulate_moments");
  if (first % 4 == 0)
    simt::launch<accumulate_kernel>(simt::blocks((count + stretch - 1) / stretch, stretch_threads), stream,
                                    m.sum + first, m.noise + first, grad, grad_stride, first, count, pass, states);
  else
    simt::launch<accumulate_each_kernel>(simt::each(count), stream, m.sum + first, m.noise + first, grad, grad_stride,
                                         first, count, pass, states);
}

void product_moments_fused(Device& device, Moments m, int first, int out, int in, int batch, Matrices dy, Matrices x,
                           DrawnPass pass, const StepState* states) {
  BATON_RANGE("product_moments");
  check_product(first, out, in, batch);
  const int blocks = ((out + tile_out - 1) / tile_out) * ((in + tile_in - 1) / tile_in);
  const auto grid = simt::blocks(blocks, product_threads);
  const ProductShape shape{first, out, in, batch};
  if (device.precision() == Precision::tf32)
    simt::launch<product_tf32_kernel>(grid, device.stream(), m.sum, m.noise, dy, x, shape, pass, states);
  else simt::launch<product_kernel>(grid, device.stream(), m.sum, m.noise, dy, x, shape, pass, states);
}

#if defined(BATON_CUDA)
void product_moments_by_tiles(Device&, Moments, int, int, int, int, Matrices, Matrices, DrawnPass, const StepState*) {
  throw RunError("product_moments_by_tiles() runs on the host alone");
}
#else
void product_moments_by_tiles(Device& device, Moments m, int first, int out, int in, int batch, Matrices dy, Matrices x,
                              DrawnPass pass, const StepState* states) {
  check_product(first, out, in, batch);
  const Counter c{states[0].noise, states[0].step};
  for_product_tiles(device, out, in, batch, dy, x, pass.draws, [&](int k, int row, int rows, const float* g) {
    // A tile is whole rows: one run of the weights, which starts at a multiple of four.
    fold_run(m.sum + first, m.noise + first, g, row * in, rows * in, first, uint32_t(pass.first_draw + k),
             pass.add || k > 0, c);
  });
}
#endif

void accumulate_product_moments(Device& device, Moments m, int first, int out, int in, int batch, Matrices dy,
                                Matrices x, DrawnPass pass, const StepState* states) {
#if defined(BATON_CUDA) || defined(SIMT_EMULATE)
  product_moments_fused(device, m, first, out, in, batch, dy, x, pass, states);
#else
  product_moments_by_tiles(device, m, first, out, in, batch, dy, x, pass, states);
#endif
}

}  // namespace baton
