// What tensor cores do to operands of float32, for the stand-ins of cuBLAS and cuDNN.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>

#include "engine/tf32.h"

namespace ptx {

inline void round_to_tf32(float* values, size_t count) {
  for (size_t i = 0; i < count; i++) values[i] = baton::simt::round_to_tf32(values[i]);
}

}  // namespace ptx
