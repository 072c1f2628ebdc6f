// Local reparameterization around the products of engine/blas.h: bias, noise and ReLU, and the way back of all three.
//
//   forward    v' = max(v, 0) + b_v;  y = relu?(m + b_mu + sqrt(v') e);  square = y y
//   backward   g = (grad + 2 y grad_square) [y > 0 where there is a ReLU];  dm = g;  dv = g e / (2 sqrt v')
//
// The derivative of sqrt at 0 is taken as 0: an all-zero input under a bias without variance has v' = 0, and gives no
// NaN. The noise is a function of (seed, layer, step, element), so it is drawn again on the way back and never kept.
// The forms that pool as well are in local_reparam_pool.cu.
//
// All sums are in a fixed order. Bytes of an output: forward 16, and 4 for v'; backward 24. A normal takes about 60
// FLOPs.
#include "kernels/local_reparam_parts.h"

namespace baton {

namespace {

constexpr int dense_threads = 128;

// dy/dv of y = m + sqrt(v) e.
__device__ __forceinline__ float slope_of(float v, float e) { return v > 1e-30f ? 0.5f * e / sqrtf(v) : 0.f; }

template <bool relu>
__device__ __forceinline__ float output_gradient(const Signal& out, size_t i) {
  float g = out.grad[i];
  if (out.grad_square) g += 2.f * out.value[i] * out.grad_square[i];
  if constexpr (relu) g = out.value[i] > 0.f ? g : 0.f;
  return g;
}

// ---------------------------------------------------------------------------------------------------------- dense
template <bool noisy, bool relu>
__global__ void dense_sample_kernel(Signal out, const float* m, float* v, Bias bias, DenseShape s,
                                    const StepState* states, uint32_t stream_id) {
  const int b = blockIdx.x, r = simt::row(), q = (s.units + 3) / 4;
  const size_t first = (size_t(r) * s.batch + b) * s.units;
  const float* bias_mean = bias.mean + bias.stride * r;
  const float* bias_variance = noisy ? bias.variance + bias.stride * r : nullptr;
  const Key key = noisy ? states[r].noise : Key{};  // a point posterior may come without states
  const uint32_t step = noisy ? states[r].step : 0;
  if constexpr (!noisy) {  // unit after unit: only the noise goes by quarters
    SIMT_SIMD()
    for (int j = threadIdx.x; j < s.units; j += blockDim.x)
      sample_one<false, relu>(out, m, v, bias_mean[j], 0.f, first + j, 0.f);
  } else {
    SIMT_SIMD()
    for (int i = threadIdx.x; i < q; i += blockDim.x) {
      const float4 e = normal4(key, uint32_t(b) * q + i, stream_id, step);
      const float lane[4] = {e.x, e.y, e.z, e.w};
      SIMT_UNROLL
      for (int k = 0; k < 4; k++) {
        const int j = i + k * q;
        if (j < s.units) sample_one<true, relu>(out, m, v, bias_mean[j], bias_variance[j], first + j, lane[k]);
      }
    }
  }
}

template <bool noisy, bool relu>
__global__ void dense_sample_backward_kernel(float* dm, float* dv, Signal out, const float* v, DenseShape s,
                                             const StepState* states, uint32_t stream_id) {
  const int b = blockIdx.x, r = simt::row(), q = (s.units + 3) / 4;
  const size_t first = (size_t(r) * s.batch + b) * s.units;
  const Key key = noisy ? states[r].noise : Key{};  // a point posterior may come without states
  const uint32_t step = noisy ? states[r].step : 0;
  if constexpr (!noisy) {
    SIMT_SIMD()
    for (int j = threadIdx.x; j < s.units; j += blockDim.x)
      dm[first + j] = simt::as_operand(output_gradient<relu>(out, first + j), out.rounded);
  } else {
    SIMT_SIMD()
    for (int i = threadIdx.x; i < q; i += blockDim.x) {
      const float4 e = normal4(key, uint32_t(b) * q + i, stream_id, step);
      const float lane[4] = {e.x, e.y, e.z, e.w};
      SIMT_UNROLL
      for (int k = 0; k < 4; k++) {
        const int j = i + k * q;
        if (j < s.units) {
          const float g = output_gradient<relu>(out, first + j);
          dm[first + j] = simt::as_operand(g, out.rounded);
          dv[first + j] = simt::as_operand(g * slope_of(v[first + j], lane[k]), out.rounded);
        }
      }
    }
  }
}

__global__ void dense_bias_gradient_kernel(float* __restrict__ db_mean, float* __restrict__ db_variance, size_t stride,
                                           const float* __restrict__ dm, const float* __restrict__ dv, DenseShape s) {
  const int j = simt::thread_item(), r = simt::row();
  if (j >= s.units) return;
  const size_t first = size_t(r) * s.batch * s.units + j;
  float sum_m = 0, sum_v = 0;
  for (int b = 0; b < s.batch; b++) {
    sum_m += dm[first + size_t(b) * s.units];
    if (dv) sum_v += dv[first + size_t(b) * s.units];
  }
  db_mean[stride * r + j] = sum_m;
  if (dv) db_variance[stride * r + j] = sum_v;
}

// ---------------------------------------------------------------------------------------------------- convolution
template <bool noisy, bool relu>
__global__ void conv_sample_kernel(Signal out, const float* m, float* v, Bias bias, ConvPlanes s,
                                   const StepState* states, uint32_t stream_id) {
  const int plane = blockIdx.x, r = simt::row(), c = plane % s.channels;
  const int wh = (s.h + 1) / 2, ww = (s.w + 1) / 2;
  const size_t first = (size_t(r) * s.batch * s.channels + plane) * s.h * s.w;
  const float bias_mean = bias.mean[bias.stride * r + c];
  const float bias_variance = noisy ? bias.variance[bias.stride * r + c] : 0.f;
  const Key key = noisy ? states[r].noise : Key{};  // a point posterior may come without states
  const uint32_t step = noisy ? states[r].step : 0;
  for (int o = threadIdx.x; o < wh * ww; o += blockDim.x) {
    const int py = o / ww, px = o - py * ww;
    float4 e{};
    if constexpr (noisy) e = normal4(key, uint32_t(plane) * (wh * ww) + o, stream_id, step);
    const float lane[4] = {e.x, e.y, e.z, e.w};
    SIMT_UNROLL
    for (int k = 0; k < 4; k++) {
      const int y = 2 * py + k / 2, x = 2 * px + k % 2;
      if (y < s.h && x < s.w)
        sample_one<noisy, relu>(out, m, v, bias_mean, bias_variance, first + size_t(y) * s.w + x, lane[k]);
    }
  }
}

template <bool noisy, bool relu>
__global__ void conv_sample_backward_kernel(float* dm, float* dv, float* sums, Signal out, const float* v, ConvPlanes s,
                                            const StepState* states, uint32_t stream_id) {
  const int plane = blockIdx.x, r = simt::row();
  const int wh = (s.h + 1) / 2, ww = (s.w + 1) / 2;
  const size_t index = size_t(r) * s.batch * s.channels + plane, first = index * s.h * s.w;
  const Key key = noisy ? states[r].noise : Key{};  // a point posterior may come without states
  const uint32_t step = noisy ? states[r].step : 0;
  float sum_m = 0, sum_v = 0;
  for (int o = threadIdx.x; o < wh * ww; o += blockDim.x) {
    const int py = o / ww, px = o - py * ww;
    float4 e{};
    if constexpr (noisy) e = normal4(key, uint32_t(plane) * (wh * ww) + o, stream_id, step);
    const float lane[4] = {e.x, e.y, e.z, e.w};
    SIMT_UNROLL
    for (int k = 0; k < 4; k++) {
      const int y = 2 * py + k / 2, x = 2 * px + k % 2;
      if (y < s.h && x < s.w) {
        const size_t i = first + size_t(y) * s.w + x;
        const float g = output_gradient<relu>(out, i);
        dm[i] = simt::as_operand(g, out.rounded);
        sum_m += g;
        if constexpr (noisy) {
          const float h = g * slope_of(v[i], lane[k]);
          dv[i] = simt::as_operand(h, out.rounded);
          sum_v += h;
        }
      }
    }
  }
  sum_m = simt::block_sum(sum_m);
  sum_v = simt::block_sum(sum_v);
  if (threadIdx.x == 0) {
    sums[index] = sum_m;
    if (noisy) sums[size_t(s.replicas) * s.batch * s.channels + index] = sum_v;
  }
}

__global__ void conv_bias_gradient_kernel(float* __restrict__ db_mean, float* __restrict__ db_variance, size_t stride,
                                          const float* __restrict__ sums, ConvPlanes s) {
  const int c = simt::thread_item(), r = simt::row();
  if (c >= s.channels) return;
  const size_t first = size_t(r) * s.batch * s.channels + c, half = size_t(s.replicas) * s.batch * s.channels;
  float sum_m = 0, sum_v = 0;
  for (int b = 0; b < s.batch; b++) {
    sum_m += sums[first + size_t(b) * s.channels];
    if (db_variance) sum_v += sums[half + first + size_t(b) * s.channels];
  }
  db_mean[stride * r + c] = sum_m;
  if (db_variance) db_variance[stride * r + c] = sum_v;
}

}  // namespace

void dense_sample(Signal out, const float* m, float* v, Bias bias, DenseShape s, bool relu, const StepState* states,
                  uint32_t stream_id, Stream stream) {
  BATON_RANGE("dense_sample");
  check_shape("dense_sample", s.replicas > 0 && s.batch > 0 && s.units > 0);
  with_flags(v, relu, [&]<bool noisy, bool cut>() {
    simt::launch<dense_sample_kernel<noisy, cut>>(simt::blocks(s.batch, dense_threads, 0, s.replicas), stream, out, m,
                                                  v, bias, s, states, stream_id);
  });
}

void dense_sample_backward(float* dm, float* dv, Signal out, const float* v, DenseShape s, bool relu,
                           const StepState* states, uint32_t stream_id, Stream stream) {
  BATON_RANGE("dense_sample_backward");
  check_shape("dense_sample_backward", s.replicas > 0 && s.batch > 0 && s.units > 0);
  with_flags(v, relu, [&]<bool noisy, bool cut>() {
    simt::launch<dense_sample_backward_kernel<noisy, cut>>(simt::blocks(s.batch, dense_threads, 0, s.replicas), stream,
                                                           dm, dv, out, v, s, states, stream_id);
  });
}

void dense_bias_gradient(float* db_mean, float* db_variance, size_t stride, const float* dm, const float* dv,
                         DenseShape s, Stream stream) {
  BATON_RANGE("dense_bias_gradient");
  simt::launch<dense_bias_gradient_kernel>(simt::each(s.units, s.replicas), stream, db_mean, db_variance, stride, dm,
                                           dv, s);
}

void conv_sample(Signal out, const float* m, float* v, Bias bias, ConvPlanes s, bool relu, const StepState* states,
                 uint32_t stream_id, Stream stream) {
  BATON_RANGE("conv_sample");
  check_shape("conv_sample", s.replicas > 0 && s.batch > 0 && s.channels > 0 && s.h > 0 && s.w > 0);
  with_flags(v, relu, [&]<bool noisy, bool cut>() {
    simt::launch<conv_sample_kernel<noisy, cut>>(simt::blocks(s.batch * s.channels, plane_threads, 0, s.replicas),
                                                 stream, out, m, v, bias, s, states, stream_id);
  });
}

void conv_sample_backward(float* dm, float* dv, float* sums, Signal out, const float* v, ConvPlanes s, bool relu,
                          const StepState* states, uint32_t stream_id, Stream stream) {
  BATON_RANGE("conv_sample_backward");
  check_shape("conv_sample_backward", s.replicas > 0 && s.batch > 0 && s.channels > 0 && s.h > 0 && s.w > 0);
  with_flags(v, relu, [&]<bool noisy, bool cut>() {
    simt::launch<conv_sample_backward_kernel<noisy, cut>>(
        simt::blocks(s.batch * s.channels, plane_threads, 0, s.replicas), stream, dm, dv, sums, out, v, s, states,
        stream_id);
  });
}

void conv_bias_gradient(float* db_mean, float* db_variance, size_t stride, const float* sums, ConvPlanes s,
                        Stream stream) {
  BATON_RANGE("conv_bias_gradient");
  simt::launch<conv_bias_gradient_kernel>(simt::each(s.channels, s.replicas), stream, db_mean, db_variance, stride,
                                          sums, s);
}

}  // namespace baton
