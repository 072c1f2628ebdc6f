// Completes a symmetric matrix of which only the lower triangle was computed.
#include "engine/linalg.h"
#include "engine/linalg_checks.h"

namespace baton {

namespace {

constexpr int tile_size = 32, pitch = tile_size + 1;  // odd, so that a tile's column lies in different banks
constexpr int threads = 256;

// Tile (i, j), j <= i, is read by rows, transposed in shared memory and written to (j, i) by rows. For the numbers of
// the T (T + 1) / 2 blocks, the triangle of tiles is folded into rows of T: folded row r has the T - r tiles of tile
// row T - 1 - r, then the r tiles of tile row r - 1. With an even T, the last one, r = T / 2, has only the former.
template <class Real>
__device__ __forceinline__ void mirror_tile(Real* tile, Real* a, int n, int lda, int tiles) {
  const int folded = blockIdx.x / tiles, at = blockIdx.x % tiles;
  const int longer = tiles - folded;
  const int i = at < longer ? longer - 1 : folded - 1, j = at < longer ? at : at - longer;
  const int rows = min(tile_size, n - i * tile_size), columns = min(tile_size, n - j * tile_size);
  const Real* from = a + size_t(i) * tile_size * lda + j * tile_size;
  Real* to = a + size_t(j) * tile_size * lda + i * tile_size;

  const int t = threadIdx.x, lane = t % simt::warp_size, first = t / simt::warp_size;
  const int step = int(blockDim.x) / simt::warp_size;
  for (int r = first; r < rows; r += step)
    for (int c = lane; c < columns; c += simt::warp_size) tile[r * pitch + c] = from[size_t(r) * lda + c];
  __syncthreads();
  for (int c = first; c < columns; c += step)  // of a tile on the diagonal only what lies above the diagonal
    for (int r = lane + (i == j ? c + 1 : 0); r < rows; r += simt::warp_size)
      to[size_t(c) * lda + r] = tile[r * pitch + c];
}

__global__ void __launch_bounds__(threads) mirror_float_kernel(float* a, int n, int lda, int tiles) {
  __shared__ float tile[tile_size * pitch];
  mirror_tile(tile, a, n, lda, tiles);
}
__global__ void __launch_bounds__(threads) mirror_double_kernel(double* a, int n, int lda, int tiles) {
  __shared__ double tile[tile_size * pitch];
  mirror_tile(tile, a, n, lda, tiles);
}

}  // namespace

template <class Real>
void mirror_lower(Real* a, int n, int lda, Stream stream) {
  BATON_RANGE("mirror_lower");
  linalg::check_extent("mirror_lower", "n", n);
  linalg::check_matrix("mirror_lower", "A", n, n, lda);
  const int tiles = (n + tile_size - 1) / tile_size;
  const simt::Blocks shape = simt::blocks(tiles * (tiles + 1) / 2, threads);
  if constexpr (sizeof(Real) == sizeof(float)) simt::launch<mirror_float_kernel>(shape, stream, a, n, lda, tiles);
  else simt::launch<mirror_double_kernel>(shape, stream, a, n, lda, tiles);
}

template void mirror_lower(float*, int, int, Stream);
template void mirror_lower(double*, int, int, Stream);

}  // namespace baton
