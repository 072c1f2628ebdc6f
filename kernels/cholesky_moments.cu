// The variances are one matrix product. With S = L L^T and the products of a patch's pixels, both packed,
//   v[b,p][n] = sum_c sum_{j<=i} Q[b,p][c,ij] S'[n][c,ij],   Q_ij = patch_i patch_j,   S'_ij = S_ij (2 S_ij where j <
//   i)
// and on the way back, with T = dL/dS':
//   T = dv^T Q     dL/dL_ij = 2 sum_k T_ik L_kj with T as a symmetric matrix, then in the stored coordinates
//   dQ = dv S'     dL/dpatch_i = sum_j dQ_ij patch_j (twice for j = i) with dQ as a symmetric matrix
//   dL/dx of a pixel is the sum over the patches that contain it. It is gathered, so no atomics are needed.
// A few images are computed at a time, and one replica after the other, in one workspace; patches are read again on the
// way back.
//
// For B images of P outputs, C channels, N filters and D = d (d + 1) / 2: 2 B P C N D FLOPs forward, twice that and
// 2 B P C d^2 backward; 4 B P C D bytes of products, which are written and read once forward, twice backward.
#include "kernels/cholesky_moments.h"

#include <algorithm>

namespace baton {

namespace {

struct Patches {
  int in_channels, height, width, kernel, pad, out_height, out_width;
};
Patches patches_of(const ConvShape& s) {
  return {s.in_channels, s.height, s.width, s.kernel, s.pad, s.out_height(), s.out_width()};
}

__host__ __device__ constexpr int at(int i, int j) { return i * (i + 1) / 2 + j; }  // j <= i
__device__ __forceinline__ int symmetric_at(int i, int j) { return j <= i ? at(i, j) : at(j, i); }

// The patch of an item, which is an (image, output, channel), numbered in that order.
__device__ __forceinline__ void load_patch(float* __restrict__ patch, const float* __restrict__ x, const Patches& s,
                                           int item) {
  const int c = item % s.in_channels, row = item / s.in_channels, outputs = s.out_height * s.out_width;
  const int b = row / outputs, p = row - b * outputs;
  const int top = p / s.out_width - s.pad, left = p % s.out_width - s.pad;
  const float* __restrict__ plane = x + (size_t(b) * s.in_channels + c) * s.height * s.width;
  for (int i = simt::lane_id(); i < s.kernel * s.kernel; i += simt::warp_size) {
    const int y = top + i / s.kernel, column = left + i % s.kernel;
    const bool inside = y >= 0 && y < s.height && column >= 0 && column < s.width;
    patch[i] = inside ? plane[y * s.width + column] : 0.f;
  }
}

__global__ void __launch_bounds__(simt::warp_size)
    products_kernel(float* __restrict__ products, const float* __restrict__ x, Patches s) {
  SIMT_DYNAMIC_SHARED(float, patch);
  const int d = s.kernel * s.kernel;
  load_patch(patch, x, s, blockIdx.x);
  __syncthreads();
  float* __restrict__ to = products + size_t(blockIdx.x) * packed(d);
  for (int i = 0; i < d; i++) {
    const float own = patch[i];
    SIMT_SIMD()
    for (int j = simt::lane_id(); j <= i; j += simt::warp_size) to[at(i, j)] = own * patch[j];
  }
}

__global__ void __launch_bounds__(simt::warp_size)
    patch_gradient_kernel(float* __restrict__ gradient, const float* __restrict__ products_gradient,
                          const float* __restrict__ x, Patches s) {
  SIMT_DYNAMIC_SHARED(float, shared);  // the patch and the gradients of its products
  const int d = s.kernel * s.kernel;
  float* __restrict__ patch = shared, * __restrict__ up = shared + d;
  load_patch(patch, x, s, blockIdx.x);
  const float* __restrict__ from = products_gradient + size_t(blockIdx.x) * packed(d);
  for (int k = simt::lane_id(); k < packed(d); k += simt::warp_size) up[k] = from[k];
  __syncthreads();
  for (int i = simt::lane_id(); i < d; i += simt::warp_size) {
    float sum = up[at(i, i)] * patch[i];
    for (int j = 0; j < d; j++) sum = fmaf(up[symmetric_at(i, j)], patch[j], sum);
    gradient[size_t(blockIdx.x) * d + i] = sum;
  }
}

// Adds the gradients of the patches that contain a pixel to its dx.
__global__ void gather_kernel(float* __restrict__ dx, const float* __restrict__ patch_gradient, Patches s) {
  const int item = simt::thread_item(), b = simt::row(), pixels = s.height * s.width;
  if (item >= s.in_channels * pixels) return;
  const int c = item / pixels, pixel = item - c * pixels, y = pixel / s.width, x = pixel - y * s.width;
  const int oh = s.out_height, ow = s.out_width, d = s.kernel * s.kernel;
  float sum = 0;
  for (int i = 0; i < d; i++) {
    const int oy = y + s.pad - i / s.kernel, ox = x + s.pad - i % s.kernel;
    if (oy >= 0 && oy < oh && ox >= 0 && ox < ow)
      sum += patch_gradient[((size_t(b) * oh * ow + oy * ow + ox) * s.in_channels + c) * d + i];
  }
  dx[size_t(b) * s.in_channels * pixels + item] += sum;
}

// planes [image][filter][output] from rows [image][output][filter], and the other way round.
__global__ void to_planes_kernel(float* __restrict__ planes, const float* __restrict__ rows, int outputs, int filters) {
  const int item = simt::thread_item(), n = item / outputs, p = item - n * outputs;
  if (item >= outputs * filters) return;
  const size_t image = size_t(simt::row()) * outputs * filters;
  planes[image + item] = rows[image + size_t(p) * filters + n];
}
__global__ void to_rows_kernel(float* __restrict__ rows, const float* __restrict__ planes, int outputs, int filters) {
  const int item = simt::thread_item(), p = item / filters, n = item - p * filters;
  if (item >= outputs * filters) return;
  const size_t image = size_t(simt::row()) * outputs * filters;
  rows[image + item] = planes[image + size_t(n) * outputs + p];
}

// Loads a block's factor L from its stored coordinates.
__device__ __forceinline__ void load_factor(float* __restrict__ l, const float* __restrict__ stored, int d) {
  for (int i = simt::lane_id(); i < d; i += simt::warp_size) l[at(i, i)] = expf(stored[at(i, i)]);
  __syncthreads();
  for (int i = 1; i < d; i++)
    for (int j = simt::lane_id(); j < i; j += simt::warp_size) l[at(i, j)] = l[at(i, i)] * stored[at(i, j)];
  __syncthreads();
}

__global__ void __launch_bounds__(simt::warp_size)
    covariance_kernel(float* __restrict__ covariance, const float* __restrict__ factor, int d) {
  SIMT_DYNAMIC_SHARED(float, l);
  const size_t block = size_t(blockIdx.x) * packed(d);
  load_factor(l, factor + block, d);
  for (int i = 0; i < d; i++)
    for (int j = simt::lane_id(); j <= i; j += simt::warp_size) {
      float sum = 0;
      SIMT_SIMD(reduction(+ : sum))
      for (int k = 0; k <= j; k++) sum = fmaf(l[at(i, k)], l[at(j, k)], sum);
      covariance[block + at(i, j)] = j < i ? 2.f * sum : sum;
    }
}

__global__ void __launch_bounds__(simt::warp_size)
    factor_gradient_kernel(float* __restrict__ gradient, const float* __restrict__ covariance_gradient,
                           const float* __restrict__ factor, int d) {
  SIMT_DYNAMIC_SHARED(float, shared);  // L, T and dL/dL
  float* __restrict__ l = shared, * __restrict__ t = l + packed(d), * __restrict__ g = t + packed(d);
  const size_t block = size_t(blockIdx.x) * packed(d);
  for (int k = simt::lane_id(); k < packed(d); k += simt::warp_size) t[k] = covariance_gradient[block + k];
  load_factor(l, factor + block, d);
  for (int i = 0; i < d; i++)
    for (int j = simt::lane_id(); j <= i; j += simt::warp_size) {
      float sum = 0;
      for (int k = j; k < d; k++) sum = fmaf(t[symmetric_at(i, k)], l[at(k, j)], sum);
      g[at(i, j)] = 2.f * sum;
    }
  __syncthreads();
  float* __restrict__ to = gradient + block;
  for (int i = 0; i < d; i++)
    for (int j = simt::lane_id(); j < i; j += simt::warp_size) to[at(i, j)] += l[at(i, i)] * g[at(i, j)];
  for (int i = simt::lane_id(); i < d; i += simt::warp_size) {
    float sum = 0;
    SIMT_SIMD(reduction(+ : sum))
    for (int j = 0; j <= i; j++) sum = fmaf(g[at(i, j)], l[at(i, j)], sum);
    to[at(i, i)] += sum;
  }
}

// A warp for each of n items, with shared memory for `floats` floats.
simt::Blocks one_warp_each(int n, int floats) { return simt::blocks(n, simt::warp_size, sizeof(float) * floats); }

}  // namespace

CholeskyMoments::CholeskyMoments(Device&, Arena& arena, const ConvShape& shape, int replicas, size_t bytes)
    : shape_(shape), replicas_(replicas) {
  const ConvShape& s = shape_;
  if (s.batch < 1 || s.in_channels < 1 || s.out_channels < 1 || s.kernel < 1 || s.pad < 0 || s.out_height() < 1 ||
      s.out_width() < 1 || s.kernel * s.kernel > largest_block || replicas < 1)
    throw InputError("CholeskyMoments: " + std::to_string(replicas) + " replicas of x [" + std::to_string(s.batch) +
                     ", " + std::to_string(s.in_channels) + ", " + std::to_string(s.height) + ", " +
                     std::to_string(s.width) + "] and " + std::to_string(s.out_channels) + " filters of " +
                     std::to_string(s.kernel) + " x " + std::to_string(s.kernel) + ", padding " +
                     std::to_string(s.pad) + " (a filter may have at most " + std::to_string(largest_block) +
                     " elements a channel)");
  const int d = s.kernel * s.kernel;
  const size_t patches = size_t(s.out_height()) * s.out_width() * s.in_channels;  // of an image
  images_ = int(std::clamp<size_t>(bytes / (sizeof(float) * patches * packed(d)), 1, s.batch));
  products_ = arena.take<float>(images_ * patches * packed(d));
  patch_gradient_ = arena.take<float>(images_ * patches * d);
  rows_ = arena.take<float>(size_t(images_) * s.out_height() * s.out_width() * s.out_channels);
  covariance_ = arena.take<float>(size_t(s.out_channels) * s.in_channels * packed(d));
  covariance_gradient_ = arena.take<float>(size_t(s.out_channels) * s.in_channels * packed(d));
}

void CholeskyMoments::forward(Device& device, Matrices x, const float* factor, size_t factor_stride,
                              MutableMatrices v) const {
  BATON_RANGE("CholeskyMoments::forward");
  const ConvShape& s = shape_;
  const Stream stream = device.stream();
  const int d = s.kernel * s.kernel, blocks = s.out_channels * s.in_channels, outputs = s.out_height() * s.out_width();
  const size_t in_image = s.input_size() / s.batch, out_image = s.output_size() / s.batch;
  for (int r = 0; r < replicas_; r++) {
    simt::launch<covariance_kernel>(one_warp_each(blocks, packed(d)), stream, covariance_, factor + factor_stride * r,
                                    d);
    for (int b = 0; b < s.batch; b += images_) {
      const int images = std::min(images_, s.batch - b), rows = images * outputs;
      simt::launch<products_kernel>(one_warp_each(rows * s.in_channels, d), stream, products_,
                                    x.data + x.stride * r + b * in_image, patches_of(s));
      gemm(device, false, true, rows, s.out_channels, s.in_channels * packed(d), {products_, 0}, {covariance_, 0}, 0,
           {rows_, 0}, 1);
      simt::launch<to_planes_kernel>(simt::each(outputs * s.out_channels, images), stream,
                                     v.data + v.stride * r + b * out_image, static_cast<const float*>(rows_), outputs,
                                     s.out_channels);
    }
  }
}

void CholeskyMoments::backward(Device& device, Matrices x, const float* factor, size_t factor_stride, Matrices dv,
                               MutableMatrices dx, float* dfactor, size_t dfactor_stride) const {
  BATON_RANGE("CholeskyMoments::backward");
  const ConvShape& s = shape_;
  const Stream stream = device.stream();
  const int d = s.kernel * s.kernel, blocks = s.out_channels * s.in_channels, outputs = s.out_height() * s.out_width();
  const int columns = s.in_channels * packed(d);
  const size_t in_image = s.input_size() / s.batch, out_image = s.output_size() / s.batch;
  for (int r = 0; r < replicas_; r++) {
    const float* own_factor = factor + factor_stride * r;
    if (dx.data) simt::launch<covariance_kernel>(one_warp_each(blocks, packed(d)), stream, covariance_, own_factor, d);
    for (int b = 0; b < s.batch; b += images_) {
      const int images = std::min(images_, s.batch - b), rows = images * outputs;
      const float* own_x = x.data + x.stride * r + b * in_image;
      simt::launch<products_kernel>(one_warp_each(rows * s.in_channels, d), stream, products_, own_x, patches_of(s));
      simt::launch<to_rows_kernel>(simt::each(outputs * s.out_channels, images), stream, rows_,
                                   dv.data + dv.stride * r + b * out_image, outputs, s.out_channels);
      gemm(device, true, false, s.out_channels, columns, rows, {rows_, 0}, {products_, 0}, b == 0 ? 0.f : 1.f,
           {covariance_gradient_, 0}, 1);
      if (!dx.data) continue;
      // The gradient of the products overwrites the products.
      gemm(device, false, false, rows, columns, s.out_channels, {rows_, 0}, {covariance_, 0}, 0, {products_, 0}, 1);
      simt::launch<patch_gradient_kernel>(one_warp_each(rows * s.in_channels, d + packed(d)), stream, patch_gradient_,
                                          static_cast<const float*>(products_), own_x, patches_of(s));
      simt::launch<gather_kernel>(simt::each(int(in_image), images), stream, dx.data + dx.stride * r + b * in_image,
                                  static_cast<const float*>(patch_gradient_), patches_of(s));
    }
    simt::launch<factor_gradient_kernel>(one_warp_each(blocks, 3 * packed(d)), stream, dfactor + dfactor_stride * r,
                                         static_cast<const float*>(covariance_gradient_), own_factor, d);
  }
}

}  // namespace baton
