// Local reparameterization of convolutions whose outputs are pooled: bias, noise, ReLU and max pooling in one pass,
// with the formulas of local_reparam.cu. The way back needs no noise: the pass forward keeps the winner's slope dy/dv
// of each window.
//
// Windows of 2x2 do not overlap: a thread draws the noise of a window, samples it and pools it. Windows of 3x3 at
// stride 2 share rows and columns, so a block first samples its plane into shared memory. There it is split by the
// parity of row and column, as the noise is: pre[2 (y mod 2) + x mod 2][y/2][x/2]. So drawing, pooling and the way back
// run over neighbours. The way back gathers: the pre-activation (y, x) lies in 4, 2, 2 or 1 windows, by its parities,
// and asks each whether it won there. No atomics are needed.
//
// Bytes: forward 8 for a pre-activation and 13 for a window, backward 8 and 17. A normal takes about 60 FLOPs.
#include "kernels/local_reparam_parts.h"

namespace baton {

namespace {

// squared: squares are written (always where there is noise). keep: a backward pass follows. No condition is left
// inside the loop, so that it vectorises.
template <bool noisy, bool squared, bool keep>
__global__ void conv_sample_pool_kernel(Signal out, uint8_t* __restrict__ which, float* __restrict__ slope,
                                        const float* __restrict__ m, const float* __restrict__ v, Bias bias,
                                        ConvPlanes s, const StepState* states, uint32_t stream_id) {
  const int plane = blockIdx.x, r = simt::row(), c = plane % s.channels;
  const int ph = s.pooled_h(), pw = s.pooled_w(), w = s.w, ww = (s.w + 1) / 2, wh = (s.h + 1) / 2;
  const size_t index = size_t(r) * s.batch * s.channels + plane;
  const float* __restrict__ mp = m + index * s.h * s.w;
  const float* __restrict__ vp = noisy ? v + index * s.h * s.w : nullptr;
  float* __restrict__ value = out.value + index * ph * pw;
  float* __restrict__ square = squared ? out.square + index * ph * pw : nullptr;
  uint8_t* __restrict__ place = keep ? which + index * ph * pw : nullptr;
  float* __restrict__ kept = noisy && keep ? slope + index * ph * pw : nullptr;
  const float bias_mean = bias.mean[bias.stride * r + c];
  const float bias_variance = noisy ? bias.variance[bias.stride * r + c] : 0.f;
  const Key key = noisy ? states[r].noise : Key{};
  const uint32_t step = noisy ? states[r].step : 0, counter = uint32_t(plane) * (wh * ww);
  const float inverse = 1.f / float(pw);
  const int count = ph * pw;
  SIMT_SIMD()
  for (int o = threadIdx.x; o < count; o += blockDim.x) {
    const int py = int((float(o) + 0.5f) * inverse), px = o - py * pw;  // exact below 2^20, and it vectorises
    const int a = 2 * py * w + 2 * px;
    float p0 = mp[a], p1 = mp[a + 1], p2 = mp[a + w], p3 = mp[a + w + 1];
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
    float4 e{};
    if constexpr (noisy) {
      e = normal4(key, counter + py * ww + px, stream_id, step);
      s0 = sqrtf(variance_with_bias(vp[a], bias_variance));
      s1 = sqrtf(variance_with_bias(vp[a + 1], bias_variance));
      s2 = sqrtf(variance_with_bias(vp[a + w], bias_variance));
      s3 = sqrtf(variance_with_bias(vp[a + w + 1], bias_variance));
      p0 += s0 * e.x, p1 += s1 * e.y, p2 += s2 * e.z, p3 += s3 * e.w;
    }
    // pool_window() written out: g++ does not vectorise this loop with a call that returns a struct.
    const float top = p1 > p0 ? p1 : p0, low = p3 > p2 ? p3 : p2;
    const float best = (low > top ? low : top) + bias_mean;
    const float y = simt::as_operand(best < 0.f ? 0.f : best, out.rounded);  // a NaN stays one: it must reach the loss
    value[o] = y;
    if constexpr (squared) square[o] = y * y;
    if constexpr (keep) {
      const int first = p1 > p0 ? 1 : 0, second = p3 > p2 ? 3 : 2, winner = low > top ? second : first;
      place[o] = uint8_t(best > 0.f ? winner : 4);
      if constexpr (noisy) {
        const float sd_top = p1 > p0 ? s1 : s0, sd_low = p3 > p2 ? s3 : s2, sd = low > top ? sd_low : sd_top;
        const float e_top = p1 > p0 ? e.y : e.x, e_low = p3 > p2 ? e.w : e.z, noise = low > top ? e_low : e_top;
        const float h = 0.5f * noise / (sd > 1e-15f ? sd : 1.f);
        kept[o] = sd > 1e-15f ? h : 0.f;
      }
    }
  }
}

// Writes zeros first, then each window's gradient to its winner: three quarters of the pre-activations get nothing, and
// a plane is small enough that the second store finds it in the cache.
template <bool noisy, bool squared>
__global__ void conv_sample_pool_backward_kernel(float* __restrict__ dm, float* __restrict__ dv,
                                                 float* __restrict__ sums, Signal out,
                                                 const uint8_t* __restrict__ which, const float* __restrict__ slope,
                                                 ConvPlanes s) {
  const int plane = blockIdx.x, r = simt::row();
  const int ph = s.pooled_h(), pw = s.pooled_w(), w = s.w, whole = s.h * s.w, windows = ph * pw;
  const size_t index = size_t(r) * s.batch * s.channels + plane, pooled = index * windows;
  float* __restrict__ to_m = dm + index * whole;
  float* __restrict__ to_v = noisy ? dv + index * whole : nullptr;
  for (int i = threadIdx.x; i < whole; i += blockDim.x) {
    to_m[i] = 0.f;
    if constexpr (noisy) to_v[i] = 0.f;
  }
  __syncthreads();
  float sum_m = 0, sum_v = 0;
  for (int o = threadIdx.x; o < windows; o += blockDim.x) {
    const int k = which[pooled + o], py = o / pw, px = o - py * pw;
    float g = out.grad[pooled + o];
    if constexpr (squared) g += 2.f * out.value[pooled + o] * out.grad_square[pooled + o];
    g = k < 4 ? g : 0.f;  // cut by the ReLU: a zero goes to the window's first place, which takes no branch
    const int at = (2 * py + ((k >> 1) & 1)) * w + 2 * px + (k & 1);
    to_m[at] = simt::as_operand(g, out.rounded);
    sum_m += g;
    if constexpr (noisy) {
      const float h = g * slope[pooled + o];
      to_v[at] = simt::as_operand(h, out.rounded);
      sum_v += h;
    }
  }
  sum_m = simt::block_sum(sum_m);
  sum_v = simt::block_sum(sum_v);
  if (threadIdx.x == 0) {
    sums[index] = sum_m;
    if (noisy) sums[size_t(s.replicas) * s.batch * s.channels + index] = sum_v;
  }
}

// ------------------------------------------------------------------------------------- convolution, 3x3 at stride 2
constexpr int places3 = 9;  // in a window; also the value of `which` where the ReLU cut

// Calls f(row, column) for all rows and columns. The serial build takes a row at a time, and goes on to `wide` columns
// in all rows but the last, so that rows that are one short of whole vectors become whole ones. There f must read and
// write in the place of the next row, which overwrites what it has written.
template <class F>
__device__ __forceinline__ void over_rows(int rows, int columns, [[maybe_unused]] int wide, F f) {
  if constexpr (simt::warp_size == 1) {
    for (int row = 0; row < rows; row++) {
      const int n = row + 1 < rows ? wide : columns;
      SIMT_SIMD()
      for (int column = 0; column < n; column++) f(row, column);
    }
  } else {
    for (int i = threadIdx.x; i < rows * columns; i += blockDim.x) f(i / columns, i % columns);
  }
}

// The quads of a plane: the 2x2 blocks that share a counter. They have one row and one column more than the windows.
struct Quads {
  int rows, columns, count;
  __host__ __device__ explicit Quads(const ConvPlanes& s)
      : rows((s.h + 1) / 2), columns((s.w + 1) / 2), count(rows * columns) {}
  // Backward: the windows among a border of one cell on every side; window (y, x) is cell (y + 1, x + 1).
  __host__ __device__ int pitch() const { return columns + 1; }
  __host__ __device__ int cells() const { return (rows + 1) * pitch(); }
  size_t forward_bytes() const { return sizeof(float) * (8 * count) + sizeof(int) * count; }
  size_t backward_bytes() const { return (2 * sizeof(float) + sizeof(int)) * cells() + sizeof(int) * count; }
};

template <bool noisy, bool squared, bool keep>
__global__ void conv_sample_pool3_kernel(Signal out, uint8_t* __restrict__ which, float* __restrict__ slope,
                                         const float* __restrict__ m, const float* __restrict__ v, Bias bias,
                                         ConvPlanes s, const StepState* states, uint32_t stream_id) {
  const int plane = blockIdx.x, r = simt::row(), c = plane % s.channels;
  const Quads quads(s);
  const int ph = s.pooled_h(), pw = s.pooled_w(), h = s.h, w = s.w, qw = quads.columns, n = quads.count;
  const size_t index = size_t(r) * s.batch * s.channels + plane;
  const float* mp = m + index * h * w;
  const float* vp = noisy ? v + index * h * w : nullptr;
  float* value = out.value + index * ph * pw;
  float* square = squared ? out.square + index * ph * pw : nullptr;
  float* kept = noisy && keep ? slope + index * ph * pw : nullptr;
  const float bias_mean = bias.mean[bias.stride * r + c];
  const float bias_variance = noisy ? bias.variance[bias.stride * r + c] : 0.f;
  SIMT_DYNAMIC_SHARED(float, pre);  // [4][n]: the noise, then the pre-activations
  float* slopes = pre + 4 * n;      // [4][n]
  int* places = reinterpret_cast<int*>(pre + 8 * n);

  if constexpr (noisy) {
    const Key key = states[r].noise;
    const uint32_t step = states[r].step, counter = uint32_t(plane) * n;
    SIMT_SIMD()
    for (int q = threadIdx.x; q < n; q += blockDim.x) {
      const float4 e = normal4(key, counter + q, stream_id, step);
      pre[q] = e.x, pre[n + q] = e.y, pre[2 * n + q] = e.z, pre[3 * n + q] = e.w;
    }
    __syncthreads();
  }

  auto sample = [=](int y, int x, int odd) {  // the pre-activation (y, 2 x + odd)
    const int i = y * w + 2 * x + odd, at = (2 * (y & 1) + odd) * n + (y >> 1) * qw + x;
    float p = mp[i];
    if constexpr (noisy) {
      const float sd = sqrtf(variance_with_bias(vp[i], bias_variance)), e = pre[at];
      p += sd * e;
      if constexpr (keep) {
        const float half = 0.5f * e / (sd > 1e-15f ? sd : 1.f);
        slopes[at] = sd > 1e-15f ? half : 0.f;
      }
    }
    pre[at] = p;
  };
  // In pairs. Where the width is odd, the second element of a row's last pair is the first of the next row, and nothing
  // uses it. But nothing may be read behind the plane's last row.
  const int rows = 2 * ph + 1;
  const bool rest = simt::warp_size == 1 && w % 2 == 1 && rows == h;
  over_rows(rows, rest ? w / 2 : qw, qw, [=](int y, int x) {
    sample(y, x, 0);
    if (simt::warp_size == 1 || 2 * x + 1 < w) sample(y, x, 1);
  });
  if (rest) sample(rows - 1, w / 2, 0);
  __syncthreads();

  over_rows(ph, pw, qw, [=](int py, int px) {
    const int corner = py * qw + px, o = py * pw + px;
    float best = pre[corner], won = 0.f;
    if constexpr (noisy && keep) won = slopes[corner];
    int place = 0;
    SIMT_UNROLL
    for (int k = 1; k < places3; k++) {
      const int ky = k / 3, kx = k % 3, at = (2 * (ky & 1) + (kx & 1)) * n + corner + ky / 2 * qw + kx / 2;
      const float p = pre[at];
      const int wins = p > best;
      best = wins ? p : best;
      place = wins ? k : place;
      if constexpr (noisy && keep) {
        const float theirs = slopes[at];
        won = wins ? theirs : won;
      }
    }
    best += bias_mean;
    const float y = simt::as_operand(best < 0.f ? 0.f : best, out.rounded);  // a NaN stays one: it must reach the loss
    value[o] = y;
    if constexpr (squared) square[o] = y * y;
    if constexpr (noisy && keep) kept[o] = won;
    if constexpr (keep) places[o] = best > 0.f ? place : places3;
  });
  // A loop of its own, for bytes would set the vector length of the one above. Each thread reads what it wrote.
  if constexpr (keep) {
    SIMT_SIMD()
    for (int o = threadIdx.x; o < ph * pw; o += blockDim.x) which[index * ph * pw + o] = uint8_t(places[o]);
  }
}

// The gradient of the pre-activation of parity k = 2 (y mod 2) + x mod 2 in its quad. `cell` is that of the window with
// the quad's indices.
template <int k>
__device__ __forceinline__ float won_by(const float* grad, const int* place, int cell, int pitch) {
  auto from = [=](int at, int wanted) {
    const float g = grad[at];
    return place[at] == wanted ? g : 0.f;
  };
  if constexpr (k == 0)
    return (from(cell - pitch - 1, 8) + from(cell - pitch, 6)) + (from(cell - 1, 2) + from(cell, 0));
  if constexpr (k == 1) return from(cell - pitch, 7) + from(cell, 1);
  if constexpr (k == 2) return from(cell - 1, 5) + from(cell, 3);
  return from(cell, 4);
}

template <bool noisy, bool squared>
__global__ void conv_sample_pool3_backward_kernel(float* __restrict__ dm, float* __restrict__ dv,
                                                  float* __restrict__ sums, Signal out,
                                                  const uint8_t* __restrict__ which, const float* __restrict__ slope,
                                                  ConvPlanes s) {
  const int plane = blockIdx.x, r = simt::row();
  const Quads quads(s);
  const int ph = s.pooled_h(), pw = s.pooled_w(), h = s.h, w = s.w, qw = quads.columns;
  const int pitch = quads.pitch(), cells = quads.cells();
  const size_t index = size_t(r) * s.batch * s.channels + plane, pooled = index * ph * pw;
  SIMT_DYNAMIC_SHARED(float, grad_m);                   // [cells]; 0 in the border and where the ReLU cut
  float* grad_v = grad_m + cells;                       // [cells]
  int* place = reinterpret_cast<int*>(grad_v + cells);  // [cells]
  int* flat = place + cells;                            // [windows]
  SIMT_SIMD()
  for (int i = threadIdx.x; i < cells; i += blockDim.x) grad_m[i] = 0.f, grad_v[i] = 0.f, place[i] = 0;
  SIMT_SIMD()
  for (int o = threadIdx.x; o < ph * pw; o += blockDim.x) flat[o] = which[pooled + o];
  __syncthreads();

  const float* grad = out.grad + pooled;
  const float* value = squared ? out.value + pooled : nullptr;
  const float* grad_square = squared ? out.grad_square + pooled : nullptr;
  const float* kept = noisy ? slope + pooled : nullptr;
  over_rows(ph, pw, qw, [=](int py, int px) {
    const int o = py * pw + px, cell = (py + 1) * pitch + px + 1, k = flat[o];
    const int counts = (k < places3) & (px < pw);  // beyond the row lies the border
    float g = grad[o];
    if constexpr (squared) g += 2.f * value[o] * grad_square[o];
    grad_m[cell] = counts ? g : 0.f;
    if constexpr (noisy) {
      const float gv = g * kept[o];
      grad_v[cell] = counts ? gv : 0.f;
    }
    place[cell] = k;
  });
  __syncthreads();

  float* to_m = dm + index * h * w;
  float* to_v = noisy ? dv + index * h * w : nullptr;
  auto gather = [=]<int k>(int qy, int qx) {
    const int i = (2 * qy + k / 2) * w + 2 * qx + k % 2, cell = (qy + 1) * pitch + qx + 1;
    to_m[i] = simt::as_operand(won_by<k>(grad_m, place, cell, pitch), out.rounded);
    if constexpr (noisy) to_v[i] = simt::as_operand(won_by<k>(grad_v, place, cell, pitch), out.rounded);
  };
  if constexpr (simt::warp_size == 1) {
    // By rows, in pairs. Where the width is odd, the next row overwrites what the last pair writes too much; the last
    // row goes without such a pair.
    for (int y = 0; y < h; y++) {
      const int pairs = y + 1 < h ? qw : w / 2, qy = y / 2;
      if (y % 2 == 0) {
        SIMT_SIMD()
        for (int qx = 0; qx < pairs; qx++) gather.template operator()<0>(qy, qx), gather.template operator()<1>(qy, qx);
        if (2 * pairs < w) gather.template operator()<0>(qy, pairs);
      } else {
        SIMT_SIMD()
        for (int qx = 0; qx < pairs; qx++) gather.template operator()<2>(qy, qx), gather.template operator()<3>(qy, qx);
        if (2 * pairs < w) gather.template operator()<2>(qy, pairs);
      }
    }
  } else {
    for (int q = threadIdx.x; q < quads.count; q += blockDim.x) {
      const int qy = q / qw, qx = q - qy * qw;
      const bool right = 2 * qx + 1 < w, below = 2 * qy + 1 < h;
      gather.template operator()<0>(qy, qx);
      if (right) gather.template operator()<1>(qy, qx);
      if (below) gather.template operator()<2>(qy, qx);
      if (right && below) gather.template operator()<3>(qy, qx);
    }
  }

  float sum_m = 0, sum_v = 0;
  SIMT_SIMD(reduction(+ : sum_m, sum_v))
  for (int i = threadIdx.x; i < cells; i += blockDim.x) {
    sum_m += grad_m[i];
    if constexpr (noisy) sum_v += grad_v[i];
  }
  sum_m = simt::block_sum(sum_m);
  sum_v = simt::block_sum(sum_v);
  if (threadIdx.x == 0) {
    sums[index] = sum_m;
    if (noisy) sums[size_t(s.replicas) * s.batch * s.channels + index] = sum_v;
  }
}

// Calls body<noisy, squared, flag>() likewise. Noise implies squares.
template <class F>
void with_squares(bool noisy, bool squared, bool flag, F body) {
  if (noisy && flag) body.template operator()<true, true, true>();
  if (noisy && !flag) body.template operator()<true, true, false>();
  if (!noisy)
    with_flags(squared, flag, [&]<bool square, bool set>() { body.template operator()<false, square, set>(); });
}

void check_pooled(const char* who, const ConvPlanes& s) {
  if (s.window != 2 && s.window != 3)
    throw InputError(std::string(who) + ": windows of 2 or 3, not " + std::to_string(s.window));
  check_shape(who, s.replicas > 0 && s.batch > 0 && s.channels > 0 && s.h >= s.window && s.w >= s.window);
  if (s.window == 3 && (long(s.h) * s.w > 1 << 16 || Quads(s).forward_bytes() > 48 * 1024))  // of shared memory
    throw InputError(std::string(who) + ": planes of " + std::to_string(s.h) + "x" + std::to_string(s.w) +
                     " are too large for windows of 3 (at most 72x72)");
}

}  // namespace

void conv_sample_pool(Signal out, uint8_t* which, float* slope, const float* m, const float* v, Bias bias, ConvPlanes s,
                      const StepState* states, uint32_t stream_id, Stream stream) {
  BATON_RANGE("conv_sample_pool");
  check_pooled("conv_sample_pool", s);
  if ((v && !out.square) || (!which != !slope && v))
    throw InputError("conv_sample_pool: a sampled layer writes squares, and which and slope come together");
  const int planes = s.batch * s.channels;
  with_squares(v, out.square, which, [&]<bool noisy, bool squared, bool keep>() {
    if (s.window == 3)
      simt::launch<conv_sample_pool3_kernel<noisy, squared, keep>>(
          simt::blocks(planes, plane_threads, Quads(s).forward_bytes(), s.replicas), stream, out, which, slope, m, v,
          bias, s, states, stream_id);
    else
      simt::launch<conv_sample_pool_kernel<noisy, squared, keep>>(simt::blocks(planes, plane_threads, 0, s.replicas),
                                                                  stream, out, which, slope, m, v, bias, s, states,
                                                                  stream_id);
  });
}

void conv_sample_pool_backward(float* dm, float* dv, float* sums, Signal out, const uint8_t* which, const float* slope,
                               ConvPlanes s, Stream stream) {
  BATON_RANGE("conv_sample_pool_backward");
  check_pooled("conv_sample_pool_backward", s);
  if (slope && !out.grad_square)
    throw InputError("conv_sample_pool_backward: a sampled layer writes squares, and needs grad_square");
  const int planes = s.batch * s.channels;
  with_squares(slope, out.grad_square, s.window == 3, [&]<bool noisy, bool squared, bool overlap>() {
    if constexpr (overlap)
      simt::launch<conv_sample_pool3_backward_kernel<noisy, squared>>(
          simt::blocks(planes, plane_threads, Quads(s).backward_bytes(), s.replicas), stream, dm, dv, sums, out, which,
          slope, s);
    else
      simt::launch<conv_sample_pool_backward_kernel<noisy, squared>>(simt::blocks(planes, plane_threads, 0, s.replicas),
                                                                     stream, dm, dv, sums, out, which, slope, s);
  });
}

}  // namespace baton
