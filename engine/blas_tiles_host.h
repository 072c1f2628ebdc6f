// Products on the host that are used a tile at a time, so that they never exist as a whole.
#pragma once
#include <functional>

#include "engine/blas.h"

namespace baton {

// C[r] = A[r]^T B[r] for r = 0 .. replicas - 1 (A [k x m], B [k x n], row-major): `tile(r, row, rows, c)` gets rows
// [row, row + rows) of C[r] as c [rows][n], while they are in the core's cache. For each run of rows, one thread calls
// tile for all replicas in their order; the runs are spread over OpenMP's threads. The lengths of the runs depend on
// the shape alone, and all but the last are multiples of four.
void for_product_tiles(Device&, int m, int n, int k, Matrices a, Matrices b, int replicas,
                       const std::function<void(int replica, int row, int rows, const float* c)>& tile);

}  // namespace baton
