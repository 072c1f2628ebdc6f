// ReLU and max pooling. Pooling windows are 2x2 or 3x3 (overlapping) with stride 2, without padding; rows and columns
// that fill no window are dropped. which[o] is the winner's place in its window, row-major (the first of equals).
#pragma once
#include "engine/runtime.h"

namespace baton {

// planes = replicas * batch * channels. y, which: [planes][oh][ow] with oh = (h - window) / 2 + 1.
void maxpool_forward(float* y, uint8_t* which, const float* x, int planes, int h, int w, int window, Stream);
// dx = the sum of the gradients of the windows that an input won. Every element of dx is written.
void maxpool_backward(float* dx, const float* dy, const uint8_t* which, int planes, int h, int w, int window, Stream);

void relu_forward(float* y, const float* x, size_t n, Stream);                     // y may be x
void relu_backward(float* dx, const float* dy, const float* y, size_t n, Stream);  // from the output; dx may be dy

}  // namespace baton
