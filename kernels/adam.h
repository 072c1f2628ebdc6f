// Shared by the kernels that fuse an optimizer's step: Adam, and the KL's part in the standard deviation.
#pragma once
#include "kernels/step_state.h"

namespace baton {

// Adam (Kingma and Ba 2015) on one parameter: step() updates its moments and returns what to subtract.
struct Adam {
  float lr, correction1, correction2;
  __device__ __forceinline__ float step(float& m, float& v, float g) const {
    m = adam_beta1 * m + (1.f - adam_beta1) * g;
    v = adam_beta2 * v + (1.f - adam_beta2) * g * g;
    return lr * (m * correction1) / (sqrtf(v * correction2) + adam_epsilon);
  }
};

// (exp(2t) - 1) / 2 - t, with ratio = exp(2t). A series takes its place where the difference would cancel, as in the
// first steps of a stage.
__device__ __forceinline__ float divergence_of_scale(float t, float ratio) {
  const float series = t * t * (1.f + t * (2.f / 3 + t * (1.f / 3 + t * (2.f / 15 + t * (2.f / 45)))));
  const float direct = 0.5f * (ratio - 1.f) - t;
  return t * t < 0.01f ? series : direct;
}

}  // namespace baton
