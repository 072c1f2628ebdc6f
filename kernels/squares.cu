// Elementwise; 8 and 16 bytes an element, 1 and 3 FLOPs. square: =, fold_square_gradient: +=.
#include "kernels/squares.h"

namespace baton {

namespace {

constexpr int row_length = 1 << 20;  // elements a grid row: indices stay in an int for any n

__global__ void square_kernel(float* __restrict__ y, const float* __restrict__ x, size_t n) {
  const int i = simt::thread_item();
  const size_t at = size_t(simt::row()) * row_length + i;
  if (i >= row_length || at >= n) return;
  y[at] = x[at] * x[at];
}

__global__ void fold_kernel(float* __restrict__ grad, const float* __restrict__ value,
                            const float* __restrict__ grad_square, size_t n) {
  const int i = simt::thread_item();
  const size_t at = size_t(simt::row()) * row_length + i;
  if (i >= row_length || at >= n) return;
  grad[at] += 2.f * value[at] * grad_square[at];
}

simt::Each shape_of(size_t n) {
  return simt::each(n < size_t(row_length) ? int(n) : row_length, int((n + row_length - 1) / row_length));
}

}  // namespace

void square(float* y, const float* x, size_t n, Stream stream) {
  BATON_RANGE("square");
  simt::launch<square_kernel>(shape_of(n), stream, y, x, n);
}

void fold_square_gradient(float* grad, const float* value, const float* grad_square, size_t n, Stream stream) {
  BATON_RANGE("fold_square_gradient");
  simt::launch<fold_kernel>(shape_of(n), stream, grad, value, grad_square, n);
}

}  // namespace baton
