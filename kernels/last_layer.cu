// Laplace approximation of the last layer: residuals of the softmax, operations on rows, and Adam. The steps of a
// closed-form update are in last_layer_steps.cu, the predictive links in last_layer_links.cu.
//
// Bytes: softmax_residual 4 to 12 a logit in float; row_dots reads both rows.
#include "kernels/last_layer_parts.h"

namespace baton {
namespace {

template <class Real>
__global__ void residual_kernel(Real* p, Real* r, Real* loss, Real* curvature, const Real* logits,
                                const int32_t* labels, int n, int classes) {
  const int row = simt::warp_item(), lane = simt::lane_id();
  if (row >= n) return;
  const Real* x = logits + size_t(row) * classes;
  const int label = labels ? labels[row] : 0;
  const bool known = label >= 0 && label < classes;
  const Real top = largest(x, classes), own = known ? x[label] : Real(NAN);
  Real sum = 0;
  for (int c = lane; c < classes; c += simt::warp_size) sum += exponential(x[c] - top);
  sum = simt::warp_sum(sum);
  for (int c = lane; c < classes; c += simt::warp_size) {
    const Real q = exponential(x[c] - top) / sum;
    if (p) p[size_t(row) * classes + c] = q;
    if (r) r[size_t(row) * classes + c] = known ? (c == label ? Real(1) : Real(0)) - q : Real(NAN);
  }
  if (lane == 0) {
    if (loss) loss[row] = logarithm(sum) + (top - own);
    if (curvature) curvature[row] = (Real(1) - Real(1) / sum) / sum;  // exp(top - top) = 1
  }
}

template <class Real>
__global__ void curvature_product_kernel(Real* out, const Real* p, const Real* d, int n, int classes) {
  const int row = simt::warp_item(), lane = simt::lane_id();
  if (row >= n) return;
  const size_t at = size_t(row) * classes;
  Real dot = 0;
  for (int c = lane; c < classes; c += simt::warp_size) dot += p[at + c] * d[at + c];
  dot = simt::warp_sum(dot);
  for (int c = lane; c < classes; c += simt::warp_size) out[at + c] = p[at + c] * (d[at + c] - dot);
}

template <class Real>
__global__ void row_dots_kernel(Real* v, Real alpha, const Real* __restrict__ a, size_t lda, const Real* __restrict__ b,
                                size_t ldb, Real beta, int n, int d) {
  const int row = simt::warp_item(), lane = simt::lane_id();
  if (row >= n) return;
  const Real* __restrict__ x = a + lda * row;
  const Real* __restrict__ y = b + ldb * row;
  Real sum = 0;
  SIMT_SIMD(reduction(+ : sum))
  for (int i = lane; i < d; i += simt::warp_size) sum += x[i] * y[i];
  sum = simt::warp_sum(sum);
  if (lane == 0) v[row] = beta == Real(0) ? alpha * sum : alpha * sum + beta * v[row];
}

template <class Real>
__global__ void scale_rows_kernel(Real* out, const Real* x, const Real* w, int d) {
  const size_t at = size_t(blockIdx.x) * d;
  const Real scale = root(w[blockIdx.x]);
  for (int i = threadIdx.x; i < d; i += blockDim.x) out[at + i] = scale * x[at + i];
}

template <class Real>
__global__ void gather_rows_kernel(Real* __restrict__ out, const Real* __restrict__ x, const int32_t* index, int d) {
  const size_t to = size_t(blockIdx.x) * d, from = size_t(index[blockIdx.x]) * d;
  for (int i = threadIdx.x; i < d; i += blockDim.x) out[to + i] = x[from + i];
}

template <class Real>
__global__ void add_outer_kernel(Real* __restrict__ a, Real alpha, const Real* x, const Real* y, int columns) {
  Real* __restrict__ row = a + size_t(blockIdx.x) * columns;
  const Real scale = alpha * x[blockIdx.x];
  for (int i = threadIdx.x; i < columns; i += blockDim.x) row[i] += scale * y[i];
}

template <class Real>
__global__ void add_diagonal_kernel(Real* a, Real value, int n) {
  const int i = simt::thread_item();
  if (i >= n) return;
  a[size_t(i) * n + i] += value;
}

__device__ __forceinline__ uint64_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
__device__ __forceinline__ uint64_t bits_of(double x) { return __builtin_bit_cast(uint64_t, x); }

// The hash is a sum over positions of mixed (bits, position), so it does not depend on the order of the sum.
template <class Real>
__global__ void inspect_kernel(uint64_t* hash, int32_t* nonfinite, const Real* x, int n, int d) {
  const int row = simt::warp_item(), lane = simt::lane_id();
  if (row >= n) return;
  uint64_t sum = 0;
  int bad = 0;
  for (int i = lane; i < d; i += simt::warp_size) {
    const Real value = x[size_t(row) * d + i] + Real(0);  // -0 becomes 0
    bad |= !finite(value);
    uint64_t z = bits_of(value) + 0x9E3779B97F4A7C15ull * uint64_t(i + 1);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    sum += z ^ (z >> 31);
  }
  sum = simt::warp_sum(sum);
  bad = simt::warp_sum(bad);
  if (lane == 0) {
    hash[row] = sum;
    nonfinite[row] = bad ? 1 : 0;
  }
}

template <class Real>
__global__ void normals_kernel(Real* x, int n, Key key) {
  const int i = simt::thread_item();
  if (4 * i >= n) return;
  const float4 z = normal4(key, uint32_t(i), 0, 0);
  const float four[4] = {z.x, z.y, z.z, z.w};
  SIMT_UNROLL
  for (int k = 0; k < 4; k++)
    if (4 * i + k < n) x[4 * i + k] = four[k];
}

template <class Real>
__global__ void adam_kernel(Real* w, Real* m, Real* v, const Real* g, Real lr, Real decay, Real correction1,
                            Real correction2, int n) {
  const int i = simt::thread_item();
  if (i >= n) return;
  const Real slope = g[i] + decay * w[i];
  m[i] = Real(0.9) * m[i] + Real(0.1) * slope;
  v[i] = Real(0.999) * v[i] + Real(0.001) * slope * slope;
  w[i] -= lr * m[i] * correction1 / (root(v[i] * correction2) + Real(1e-8));
}

}  // namespace

template <class Real>
void softmax_residual(Real* p, Real* r, Real* loss, Real* curvature, const Real* logits, const int32_t* labels, int n,
                      int classes, Stream stream) {
  BATON_RANGE("softmax_residual");
  check(n >= 0 && classes >= 1, "softmax_residual", "logits has shape " + shape(n, classes));
  check(labels || (!r && !loss), "softmax_residual", "residuals and losses need labels");
  simt::launch<residual_kernel<Real>>(simt::warps(n), stream, p, r, loss, curvature, logits, labels, n, classes);
}

template <class Real>
void softmax_curvature_product(Real* out, const Real* p, const Real* d, int n, int classes, Stream stream) {
  BATON_RANGE("softmax_curvature_product");
  check(n >= 0 && classes >= 1, "softmax_curvature_product", "p has shape " + shape(n, classes));
  simt::launch<curvature_product_kernel<Real>>(simt::warps(n), stream, out, p, d, n, classes);
}

template <class Real>
void row_dots(Real* v, Real alpha, const Real* a, size_t lda, const Real* b, size_t ldb, Real beta, int n, int d,
              Stream stream) {
  BATON_RANGE("row_dots");
  check(n >= 0 && d >= 0, "row_dots", "rows of shape " + shape(n, d));
  simt::launch<row_dots_kernel<Real>>(simt::warps(n), stream, v, alpha, a, lda, b, ldb, beta, n, d);
}

template <class Real>
void scale_rows(Real* out, const Real* x, const Real* w, int n, int d, Stream stream) {
  BATON_RANGE("scale_rows");
  check(n >= 0 && d >= 0, "scale_rows", "rows of shape " + shape(n, d));
  simt::launch<scale_rows_kernel<Real>>(simt::blocks(n), stream, out, x, w, d);
}

template <class Real>
void gather_rows(Real* out, const Real* x, const int32_t* index, int n, int d, Stream stream) {
  BATON_RANGE("gather_rows");
  check(n >= 0 && d >= 0, "gather_rows", "rows of shape " + shape(n, d));
  simt::launch<gather_rows_kernel<Real>>(simt::blocks(n), stream, out, x, index, d);
}

template <class Real>
void add_outer(Real* a, Real alpha, const Real* x, const Real* y, int rows, int columns, Stream stream) {
  BATON_RANGE("add_outer");
  check(rows >= 0 && columns >= 0, "add_outer", "a matrix of shape " + shape(rows, columns));
  simt::launch<add_outer_kernel<Real>>(simt::blocks(rows), stream, a, alpha, x, y, columns);
}

template <class Real>
void add_diagonal(Real* a, Real value, int n, Stream stream) {
  check(n >= 0, "add_diagonal", "a matrix of order " + std::to_string(n));
  simt::launch<add_diagonal_kernel<Real>>(simt::each(n), stream, a, value, n);
}

template <class Real>
void inspect_rows(uint64_t* hash, int32_t* nonfinite, const Real* x, int n, int d, Stream stream) {
  BATON_RANGE("inspect_rows");
  check(n >= 0 && d >= 0, "inspect_rows", "rows of shape " + shape(n, d));
  simt::launch<inspect_kernel<Real>>(simt::warps(n), stream, hash, nonfinite, x, n, d);
}

template <class Real>
void fill_normals(Real* x, int n, Key key, Stream stream) {
  check(n >= 0, "fill_normals", std::to_string(n) + " numbers");
  simt::launch<normals_kernel<Real>>(simt::each((n + 3) / 4), stream, x, n, key);
}

template <class Real>
void adam_step(Real* w, Real* m, Real* v, const Real* g, Real lr, Real decay, int t, int n, Stream stream) {
  BATON_RANGE("adam_step");
  check(t >= 1 && n >= 0, "adam_step", "step " + std::to_string(t));
  const Real correction1 = Real(1 / (1 - std::pow(0.9, t))), correction2 = Real(1 / (1 - std::pow(0.999, t)));
  simt::launch<adam_kernel<Real>>(simt::each(n), stream, w, m, v, g, lr, decay, correction1, correction2, n);
}

#define BATON_LAST_LAYER(Real)                                                                               \
  template void softmax_residual(Real*, Real*, Real*, Real*, const Real*, const int32_t*, int, int, Stream); \
  template void softmax_curvature_product(Real*, const Real*, const Real*, int, int, Stream);                \
  template void row_dots(Real*, Real, const Real*, size_t, const Real*, size_t, Real, int, int, Stream);     \
  template void scale_rows(Real*, const Real*, const Real*, int, int, Stream);                               \
  template void gather_rows(Real*, const Real*, const int32_t*, int, int, Stream);                           \
  template void add_outer(Real*, Real, const Real*, const Real*, int, int, Stream);                          \
  template void add_diagonal(Real*, Real, int, Stream);                                                      \
  template void inspect_rows(uint64_t*, int32_t*, const Real*, int, int, Stream);                            \
  template void fill_normals(Real*, int, Key, Stream);                                                       \
  template void adam_step(Real*, Real*, Real*, const Real*, Real, Real, int, int, Stream);
BATON_LAST_LAYER(float)
BATON_LAST_LAYER(double)

}  // namespace baton
