// The squares of activations under local reparameterization, where no fused kernel makes them, and sums of squared
// gradients for the Fisher information.
#pragma once
#include "engine/runtime.h"

namespace baton {

void square(float* y, const float* x, size_t n, Stream);  // y = x x
// grad += 2 value grad_square: the gradient through the value and through its square together.
void fold_square_gradient(float* grad, const float* value, const float* grad_square, size_t n, Stream);

// sum [n] += the rows of x [rows][n] in their order, or the squares of their elements: for per-example curvature.
void accumulate_rows(float* sum, const float* x, int rows, int n, Stream);
void accumulate_squared_rows(float* sum, const float* x, int rows, int n, Stream);

// The columns of a square root of the softmax's Fisher information: for class k, d[b][c] = sqrt(p_k) ([c = k] - p_c),
// so that sum_k d_k d_k^T = diag(p) - p p^T, the Gauss-Newton matrix of the cross-entropy at an example's logits.
// logits, d [batch][classes].
void fisher_column(float* d, const float* logits, int k, int batch, int classes, Stream);

}  // namespace baton
