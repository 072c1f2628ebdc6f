// Products on the host, seen a tile at a time by whoever folds them into something smaller: they never exist as a
// whole.
#pragma once
#include <functional>

#include "engine/blas.h"

namespace baton {

// C[r] = A[r]^T B[r] for r = 0 .. replicas - 1 (A [k x m], B [k x n], row-major): `tile(r, row, rows, c)` gets rows
// [row, row + rows) of C[r] as c [rows][n], while they are in the core's cache. For every run of rows the replicas come
// in their order, on one thread; the runs are spread over OpenMP's threads. Their lengths divide by four but for the
// last and depend on the shape alone.
void for_product_tiles(int m, int n, int k, Matrices a, Matrices b, int replicas,
                       const std::function<void(int replica, int row, int rows, const float* c)>& tile);

}  // namespace baton
