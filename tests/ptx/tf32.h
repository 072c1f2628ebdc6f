// What tensor cores do to operands of float32, for the stand-ins of cuBLAS and cuDNN.
#pragma once
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace ptx {

// Rounds to the nearest number of 10 stored bits of mantissa (tf32), ties away from 0.
inline void round_to_tf32(float* values, size_t count) {
  for (size_t i = 0; i < count; i++) {
    const uint32_t bits = std::bit_cast<uint32_t>(values[i]);
    if (std::isfinite(values[i])) values[i] = std::bit_cast<float>((bits + 0x1000) & 0xffffe000);
  }
}

}  // namespace ptx
