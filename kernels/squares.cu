// Elementwise. square takes 8 bytes and 1 FLOP an element, fold_square_gradient 16 bytes and 3 FLOPs.
#include "kernels/squares.h"

namespace baton {

namespace {

constexpr int row_length = 1 << 20;  // elements of a grid row, so that an int can index any n

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

template <bool squared>
__global__ void accumulate_kernel(float* __restrict__ sum, const float* __restrict__ x, int rows, int n) {
  const int i = simt::thread_item();
  if (i >= n) return;
  float s = sum[i];
  for (int row = 0; row < rows; row++) {
    const float v = x[size_t(row) * n + i];
    s += squared ? v * v : v;
  }
  sum[i] = s;
}

__global__ void fisher_column_kernel(float* __restrict__ d, const float* __restrict__ logits, int k, int batch,
                                     int classes) {
  const int b = simt::thread_item();
  if (b >= batch) return;
  const float* __restrict__ x = logits + size_t(b) * classes;
  float* __restrict__ to = d + size_t(b) * classes;
  float top = x[0], total = 0;
  for (int c = 1; c < classes; c++) top = x[c] > top ? x[c] : top;
  for (int c = 0; c < classes; c++) total += expf(x[c] - top);
  const float root = sqrtf(expf(x[k] - top) / total), scale = -root / total;
  for (int c = 0; c < classes; c++) to[c] = scale * expf(x[c] - top) + (c == k ? root : 0.f);
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

void accumulate_rows(float* sum, const float* x, int rows, int n, Stream stream) {
  BATON_RANGE("accumulate_rows");
  simt::launch<accumulate_kernel<false>>(simt::each(n), stream, sum, x, rows, n);
}
void accumulate_squared_rows(float* sum, const float* x, int rows, int n, Stream stream) {
  BATON_RANGE("accumulate_squared_rows");
  simt::launch<accumulate_kernel<true>>(simt::each(n), stream, sum, x, rows, n);
}

void fisher_column(float* d, const float* logits, int k, int batch, int classes, Stream stream) {
  BATON_RANGE("fisher_column");
  if (classes < 1 || k < 0 || k >= classes)
    throw InputError("fisher_column: class " + std::to_string(k) + " of " + std::to_string(classes));
  simt::launch<fisher_column_kernel>(simt::each(batch), stream, d, logits, k, batch, classes);
}

}  // namespace baton
