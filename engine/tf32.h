// Rounding to tf32. A header of its own, so that whatever stands in for tensor cores rounds by the same function: it
// comes after simt.h's target or CUDA's headers, either of which has the keywords.
#pragma once
#include <cstdint>

namespace baton::simt {

// The nearest tf32 number: a float whose last 13 bits are 0. Ties go away from zero, as with cvt.rna.tf32.f32, which is
// a sequence of instructions on sm_90 where this is three. Infinities stay, what is beyond the largest tf32 number
// becomes one, and every NaN becomes the NaN 0x7fc00000. The same bits in every build, on the host too.
__host__ __device__ __forceinline__ float round_to_tf32(float x) {
  const uint32_t rounded = (__builtin_bit_cast(uint32_t, x) + 0x1000u) & 0xffffe000u;
  return __builtin_bit_cast(float, x == x ? rounded : 0x7fc00000u);
}

}  // namespace baton::simt
