// The channel factorized Gaussian: what is done once a stage. Inverses of factors for the KL, factors from standard
// deviations, and marginal standard deviations from factors.
#include "kernels/cholesky_parts.h"

namespace baton {

namespace {

// L = diag(L_ii) R, and R has a diagonal of ones: L^-1 = R^-1 diag(1 / L_ii). A lane takes a column. R^-1 is kept in
// shared memory, in double.
__global__ void __launch_bounds__(simt::warp_size, 1)
    cholesky_invert_kernel(float* __restrict__ inverse, const float* __restrict__ factor, size_t factor_stride, int d) {
  SIMT_DYNAMIC_SHARED(double, x);  // [d][d]
  const size_t at = factor_stride * simt::row() + size_t(blockIdx.x) * packed(d);
  factor += at, inverse += at;
  for (int j = simt::lane_id(); j < d; j += simt::warp_size) {
    const double scale = exp(-double(factor[diagonal(j)]));
    x[j * d + j] = 1;
    inverse[diagonal(j)] = float(scale);
    for (int i = j + 1; i < d; i++) {
      double sum = 0;
      for (int k = j; k < i; k++) sum -= double(factor[packed(i) + k]) * x[k * d + j];
      x[i * d + j] = sum;
      inverse[packed(i) + j] = float(sum * scale);
    }
  }
}

__global__ void cholesky_from_diagonal_kernel(float* __restrict__ factor, size_t factor_stride,
                                              const float* __restrict__ log_std, size_t sd_stride, int rows, int d) {
  const int item = simt::thread_item(), b = item / d, i = item - b * d;
  if (item >= rows) return;
  float* __restrict__ to = factor + factor_stride * simt::row() + size_t(b) * packed(d) + packed(i);
  for (int j = 0; j < i; j++) to[j] = 0;
  to[i] = log_std[sd_stride * simt::row() + item];
}

__global__ void cholesky_marginals_kernel(float* __restrict__ log_std, size_t sd_stride,
                                          const float* __restrict__ factor, size_t factor_stride, int rows, int d) {
  const int item = simt::thread_item(), b = item / d, i = item - b * d;
  if (item >= rows) return;
  const float* __restrict__ from = factor + factor_stride * simt::row() + size_t(b) * packed(d) + packed(i);
  float sum = 1;
  for (int j = 0; j < i; j++) sum = fmaf(from[j], from[j], sum);
  log_std[sd_stride * simt::row() + item] = from[i] + 0.5f * logf(sum);
}

}  // namespace

void cholesky_invert(float* inverse, const float* factor, size_t factor_stride, int blocks, int d, int replicas,
                     Stream stream) {
  BATON_RANGE("cholesky_invert");
  check_blocks("cholesky_invert", blocks, d, replicas);
  if (replicas > 1) check_stride("cholesky_invert", "factors", factor_stride, size_t(blocks) * packed(d));
  simt::launch<cholesky_invert_kernel>(simt::blocks(blocks, simt::warp_size, sizeof(double) * d * d, replicas), stream,
                                       inverse, factor, factor_stride, d);
}

void cholesky_from_diagonal(float* factor, size_t factor_stride, const float* log_std, size_t sd_stride, int blocks,
                            int d, int replicas, Stream stream) {
  BATON_RANGE("cholesky_from_diagonal");
  check_blocks("cholesky_from_diagonal", blocks, d, replicas);
  if (replicas > 1) check_stride("cholesky_from_diagonal", "factors", factor_stride, size_t(blocks) * packed(d));
  simt::launch<cholesky_from_diagonal_kernel>(simt::each(blocks * d, replicas), stream, factor, factor_stride, log_std,
                                              sd_stride, blocks * d, d);
}

void cholesky_marginals(float* log_std, size_t sd_stride, const float* factor, size_t factor_stride, int blocks, int d,
                        int replicas, Stream stream) {
  BATON_RANGE("cholesky_marginals");
  check_blocks("cholesky_marginals", blocks, d, replicas);
  if (replicas > 1) check_stride("cholesky_marginals", "standard deviations", sd_stride, size_t(blocks) * d);
  simt::launch<cholesky_marginals_kernel>(simt::each(blocks * d, replicas), stream, log_std, sd_stride, factor,
                                          factor_stride, blocks * d, d);
}

}  // namespace baton
