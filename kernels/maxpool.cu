// Max pooling with windows of 2x2 or 3x3 (overlapping) at stride 2, without padding; and ReLU.
//
//   y[p][r][c] = max of x[p][2r + i][2c + j], i, j < window;  which = i window + j of the first maximum
//   dx = sum over the windows that an input is in of (which says so ? dy : 0)                          (=, all written)
//   relu: y = x <= 0 ? 0 : x,  dx = y <= 0 ? 0 : dy
//
// A NaN in a window wins (the last one of several), and ReLU passes a NaN on, as in PyTorch. Layouts: x, dx
// [planes][h][w]; y, dy, which [planes][oh][ow]. A block takes a run of rows, and `cols` neighbouring threads (a power
// of two) take the columns of a row: neighbours read neighbours, small planes fill warps too, and on the CPU the loops
// have unit stride. Selects are arithmetic, for random data would mispredict branches. The way back gathers: a thread
// computes the 2x2 patch of inputs at (2r, 2c), which lies in window (r, c) and, for 3x3, also in those to its left,
// above, and above left, which are added in that order. There are no atomics, so every run gives the same bits. Bytes
// of an output: forward 16 read and 5 written, backward 5 read and 16 written (for 3x3 too, where what windows share
// comes from L1). Comparisons: 3 for 2x2, 8 for 3x3. ReLU: 8 bytes an element, backward 12.
#include "kernels/maxpool.h"

namespace baton {
namespace {

constexpr int rows_per_block = 32;
constexpr int strip = simt::warp_size == 1 ? 64 : 1;  // columns that a thread takes at a time
constexpr int nobody = 255;                           // `which` of a window that does not exist; n | nobody == nobody

struct Plane {
  int h, w, oh, ow;
  int rows;  // of all planes together, which the kernel goes through
  int cols;  // neighbouring threads that take a row
};

// A block's threads are rows of `cols` neighbours. On the CPU one thread takes all columns, and the compiler must see
// it.
__device__ __forceinline__ int columns_of(Plane s) { return simt::warp_size == 1 ? 1 : s.cols; }

// Replaces the value when the challenger v beats it. A NaN beats everything, and only a NaN beats a NaN.
__device__ __forceinline__ void challenge(float& value, int& place, float v, int p) {
  const int wins = (v > value) | (v != v);
  value = wins ? v : value;
  place = wins ? p : place;
}

template <int window>
__global__ void forward(float* __restrict__ y, uint8_t* __restrict__ which, const float* __restrict__ x, Plane s) {
  const int cols = columns_of(s), t = threadIdx.x, first = blockIdx.x * rows_per_block;
  const int last = min(first + rows_per_block, s.rows);
  for (int row = first + t / cols; row < last; row += int(blockDim.x) / cols) {
    const int plane = row / s.oh, r = row - plane * s.oh;
    const float* __restrict__ a = x + (size_t(plane) * s.h + 2 * r) * s.w;
    float* __restrict__ to = y + size_t(row) * s.ow;
    uint8_t* __restrict__ won_by = which + size_t(row) * s.ow;
    for (int c0 = t % cols * strip; c0 < s.ow; c0 += cols * strip) {
      const int n = strip == 1 ? 1 : min(strip, s.ow - c0);
      int places[strip];
      SIMT_SIMD()
      for (int c = 0; c < n; c++) {
        const float* corner = a + 2 * (c0 + c);
        float value = corner[0];
        int place = 0;
        SIMT_UNROLL
        for (int k = 1; k < window * window; k++) challenge(value, place, corner[k / window * s.w + k % window], k);
        to[c0 + c] = value;
        places[c] = place;
      }
      SIMT_SIMD(simdlen(4))
      for (int c = 0; c < n; c++) won_by[c0 + c] = uint8_t(places[c]);
    }
  }
}

// The gradient that a window hands to the input at `place`, if that input won it.
__device__ __forceinline__ float won(float dy, int which, int place) { return which == place ? dy : 0.f; }

// Calls f(c, inside, after) for this thread's columns c of [0, patches): inside says whether a window starts at c,
// after whether one starts at c - 1. On the CPU these are constants of the loop, which then vectorises.
template <class F>
__device__ __forceinline__ void each_column(int t, int cols, int patches, int ow, F f) {
  if constexpr (simt::warp_size == 1) {
    f(0, true, false);
    SIMT_SIMD()
    for (int c = 1; c < ow; c++) f(c, true, true);
    if (ow < patches) f(ow, false, true);
  } else {
    for (int c = t % cols; c < patches; c += cols) {
      const bool inside = c < ow;
      const bool after = c > 0;
      f(c, inside, after);
    }
  }
}

template <int window>
__global__ void backward(float* __restrict__ dx, const float* __restrict__ dy, const uint8_t* __restrict__ which,
                         Plane s) {
  const int cols = columns_of(s), t = threadIdx.x, first = blockIdx.x * rows_per_block;
  const int last = min(first + rows_per_block, s.rows), patches = (s.w + 1) / 2, patch_rows = (s.h + 1) / 2;
  for (int row = first + t / cols; row < last; row += int(blockDim.x) / cols) {
    const int plane = row / patch_rows, r = row - plane * patch_rows;
    // The windows of this row of patches and of the one above. No input wins a window that does not exist.
    const bool here = r < s.oh, above = window == 3 && r > 0, two = 2 * r + 1 < s.h;
    const size_t low = (size_t(plane) * s.oh + (here ? r : 0)) * s.ow;
    const size_t high = (size_t(plane) * s.oh + (above ? r - 1 : 0)) * s.ow;
    const float *g = dy + low, *g_up = dy + high;
    const uint8_t *k = which + low, *k_up = which + high;
    const int absent = here ? 0 : nobody, absent_up = above ? 0 : nobody;
    float* __restrict__ d = dx + (size_t(plane) * s.h + 2 * r) * s.w;
    float* __restrict__ d2 = d + s.w;
    auto patch = [=](int c, bool inside, bool after) {
      const int c0 = inside ? c : 0, outside = inside ? 0 : nobody;
      const int at = k[c0] | absent | outside;
      float d00 = won(g[c0], at, 0), d01 = won(g[c0], at, 1);
      float d10 = won(g[c0], at, window), d11 = won(g[c0], at, window + 1);
      if constexpr (window == 3) {
        const int c1 = after ? c - 1 : 0, before = after ? 0 : nobody;
        const int left = k[c1] | absent | before, up = k_up[c0] | absent_up | outside;
        const int corner = k_up[c1] | absent_up | before;
        d00 = d00 + won(g[c1], left, 2) + won(g_up[c0], up, 6) + won(g_up[c1], corner, 8);
        d01 += won(g_up[c0], up, 7);
        d10 += won(g[c1], left, 5);
      }
      d[2 * c] = d00;
      if (inside || 2 * c + 1 < s.w) d[2 * c + 1] = d01;
      if (two) {
        d2[2 * c] = d10;
        if (inside || 2 * c + 1 < s.w) d2[2 * c + 1] = d11;
      }
    };
    each_column(t, cols, patches, s.ow, patch);
  }
}

__global__ void relu(float* y, const float* x, int n) {  // y may be x
  const int i = simt::thread_item();
  if (i >= n) return;
  y[i] = x[i] <= 0.f ? 0.f : x[i];
}
__global__ void relu_gradient(float* dx, const float* dy, const float* __restrict__ y, int n) {  // dx may be dy
  const int i = simt::thread_item();
  if (i >= n) return;
  dx[i] = y[i] <= 0.f ? 0.f : dy[i];
}

// The shape for a kernel that goes through the planes' rows, or with `patches` through rows of 2x2 patches.
Plane plane_of(const char* who, int planes, int h, int w, int window, bool patches) {
  std::string shape;
  for (int n : {planes, h, w}) shape.append("[").append(std::to_string(n)).append("]");
  if (window != 2 && window != 3)
    throw InputError(std::string(who) + ": a window of " + std::to_string(window) + " on x " + shape +
                     ", expected 2 or 3");
  if (planes < 0 || h < window || w < window || int64_t(planes) * h > INT32_MAX)
    throw InputError(std::string(who) + ": x has shape " + shape + ", expected [planes][h][w] with h and w at least " +
                     std::to_string(window) + " and less than 2^31 rows");
  Plane s{h, w, (h - window) / 2 + 1, (w - window) / 2 + 1, 0, 4};
  s.rows = planes * (patches ? (h + 1) / 2 : s.oh);
  const int width = patches ? (w + 1) / 2 : s.ow;
  while (s.cols < width && s.cols < 32) s.cols *= 2;
  return s;
}
template <auto kernel, class... A>
void launch_rows(const Plane& s, Stream stream, A... args) {
  const int n = s.rows / rows_per_block + (s.rows % rows_per_block != 0);
  simt::launch<kernel>(simt::blocks(n, min(256, rows_per_block * s.cols)), stream, args..., s);
}

// Calls f(first, count) for pieces of [0, n) that an int can count.
template <class F>
void pieces(size_t n, F f) {
  constexpr size_t most = size_t(1) << 30;
  for (size_t first = 0; first < n; first += most) f(first, int(n - first < most ? n - first : most));
}

}  // namespace

void maxpool_forward(float* y, uint8_t* which, const float* x, int planes, int h, int w, int window, Stream stream) {
  BATON_RANGE("maxpool_forward");
  const Plane s = plane_of("maxpool_forward", planes, h, w, window, false);
  if (window == 2) launch_rows<forward<2>>(s, stream, y, which, x);
  else launch_rows<forward<3>>(s, stream, y, which, x);
}

void maxpool_backward(float* dx, const float* dy, const uint8_t* which, int planes, int h, int w, int window,
                      Stream stream) {
  BATON_RANGE("maxpool_backward");
  const Plane s = plane_of("maxpool_backward", planes, h, w, window, true);
  if (window == 2) launch_rows<backward<2>>(s, stream, dx, dy, which);
  else launch_rows<backward<3>>(s, stream, dx, dy, which);
}

void relu_forward(float* y, const float* x, size_t n, Stream stream) {
  BATON_RANGE("relu_forward");
  pieces(n,
         [=](size_t first, int count) { simt::launch<relu>(simt::each(count), stream, y + first, x + first, count); });
}

void relu_backward(float* dx, const float* dy, const float* y, size_t n, Stream stream) {
  BATON_RANGE("relu_backward");
  pieces(n, [=](size_t first, int count) {
    simt::launch<relu_gradient>(simt::each(count), stream, dx + first, dy + first, y + first, count);
  });
}

}  // namespace baton
