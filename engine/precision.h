// The precision of the products of layers: what their operands are rounded to before they are multiplied. The sums of
// the products are of float32 in any case.
#pragma once
#include <cstdint>
#include <string>

#include "engine/error.h"
#include "engine/simt.h"

namespace baton {

// fp32: operands are not rounded. tf32: to 10 bits of mantissa, as a GPU's tensor cores take them.
enum class Precision { fp32, tf32 };

inline const char* name(Precision p) { return p == Precision::tf32 ? "tf32" : "fp32"; }
// InputError for another name.
inline Precision parse_precision(const std::string& name) {
  if (name == "fp32") return Precision::fp32;
  if (name == "tf32") return Precision::tf32;
  throw InputError("unknown precision '" + name + "': fp32 or tf32");
}

// The nearest number of tf32; of two that are as near, the one farther from 0 (PTX ISA, cvt.rna.tf32.f32). Infinities
// and NaNs stay, and what lies beyond the largest number becomes infinite.
__host__ __device__ __forceinline__ float round_to_tf32(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return __builtin_bit_cast(float, finite ? (bits + 0x1000u) & ~0x1fffu : bits);
}

}  // namespace baton
