// Matrix products on the host: OpenBLAS with one thread a call, in our own parallel loop over fixed tiles. So a result
// does not depend on the number of threads or replicas, and no second thread pool competes with OpenMP's.
#include <cblas.h>

#include <algorithm>

#include "engine/blas_tiles_host.h"
#include "engine/openblas_host.h"
#include "engine/precision_host.h"

namespace baton {

namespace {

// How many pieces the rows or columns of one product are cut into. It depends on the shape alone.
constexpr double flops_per_tile = 4e6;
constexpr int most_tiles = 8;

constexpr size_t floats_a_tile = 64 * 1024;  // of for_product_tiles: a tile and two arrays of its size fit in L2

}  // namespace

void for_product_tiles(Device& device, int m, int n, int k, Matrices a, Matrices b, int replicas,
                       const std::function<void(int replica, int row, int rows, const float* c)>& tile) {
  prepare_openblas();
  Operands operands(device);
  a = operands.take(a, size_t(m) * k, replicas), b = operands.take(b, size_t(k) * n, replicas);
  const int fits = int(floats_a_tile / size_t(n)) / 16 * 16;
  const int even = (m / 8 + 15) / 16 * 16;  // enough tiles for a few threads
  const int rows = std::max(16, std::min(fits, even)), tiles = (m + rows - 1) / rows;
#pragma omp parallel if (tiles > 1)
  {
    std::vector<float> c(size_t(rows) * n);
#pragma omp for schedule(dynamic)
    for (int t = 0; t < tiles; t++) {
      const int row = t * rows, count = std::min(rows, m - row);
      for (int r = 0; r < replicas; r++) {
        cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, count, n, k, 1.f, a.data + a.stride * r + row, m,
                    b.data + b.stride * r, n, 0.f, c.data(), n);
        tile(r, row, count, c.data());
      }
    }
  }
}

void gemm(Device& device, bool transpose_a, bool transpose_b, int m, int n, int k, Matrices a, Matrices b, float beta,
          MutableMatrices c, int replicas) {
  prepare_openblas();
  if (m == 0 || n == 0 || replicas == 0) return;
  Operands operands(device);
  a = operands.take(a, size_t(m) * k, replicas), b = operands.take(b, size_t(k) * n, replicas);
  const bool cut_rows = m >= n;
  const int extent = cut_rows ? m : n;
  const int wanted = int(std::clamp(2.0 * m * n * k / flops_per_tile, 1.0, double(most_tiles)));
  const int step = ((extent + wanted - 1) / wanted + 15) / 16 * 16;  // whole register tiles
  const int tiles = (extent + step - 1) / step;
  const int lda = transpose_a ? m : k, ldb = transpose_b ? k : n;
#pragma omp parallel for schedule(static) if (tiles * replicas > 1)
  for (int task = 0; task < tiles * replicas; task++) {
    const int r = task / tiles, first = task % tiles * step, count = std::min(step, extent - first);
    const float* ar = a.data + a.stride * r;
    const float* br = b.data + b.stride * r;
    float* cr = c.data + c.stride * r;
    if (cut_rows) ar += transpose_a ? first : size_t(first) * lda, cr += size_t(first) * n;
    else br += transpose_b ? size_t(first) * ldb : first, cr += first;
    cblas_sgemm(CblasRowMajor, transpose_a ? CblasTrans : CblasNoTrans, transpose_b ? CblasTrans : CblasNoTrans,
                cut_rows ? count : m, cut_rows ? n : count, k, 1.f, ar, lda, br, ldb, beta, cr, n);
  }
}

}  // namespace baton
