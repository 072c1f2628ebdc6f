// The squares that travel beside activations under local reparameterization, where no fused kernel makes them.
#pragma once
#include "engine/runtime.h"

namespace baton {

void square(float* y, const float* x, size_t n, Stream);  // y = x x
// grad += 2 value grad_square: both paths of the gradient in one.
void fold_square_gradient(float* grad, const float* value, const float* grad_square, size_t n, Stream);

}  // namespace baton
