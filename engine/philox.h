// Noise by a function without a state: Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
// 2011), keyed by the seed, with the counter (element, stream, step, draw). The numbers do not depend on the grid, the
// division into batches or the device. So a backward pass can draw them again, and a resumed run continues with the
// noise that it would have had.
//
// It uses only + - * fma sqrt and integers, so every target computes the same bits, and g++ vectorises all of it.
#pragma once
#include "engine/simt.h"

namespace baton {

struct Key {
  uint32_t lo, hi;
};

// Two ways to compute the same words. With 64-bit vector products (AVX-512) the words stay in 64-bit lanes, whose upper
// halves are not used: 0.45 ns a word on one core of an EPYC, against 0.8 for the other way, and 1.8 for that in AVX2.
__host__ __device__ __forceinline__ uint4 philox(uint4 c, Key k) {
#if defined(__AVX512DQ__) && !defined(__CUDACC__)
  uint64_t x = c.x, y = c.y, z = c.z, w = c.w;
  SIMT_UNROLL
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * (x & 0xffffffffu), p1 = uint64_t(0xCD9E8D57u) * (z & 0xffffffffu);
    x = (p1 >> 32) ^ y ^ k.lo;
    y = p1;
    z = (p0 >> 32) ^ w ^ k.hi;
    w = p0;
    k.lo += 0x9E3779B9u;
    k.hi += 0xBB67AE85u;
  }
  return make_uint4(uint32_t(x), uint32_t(y), uint32_t(z), uint32_t(w));
#else
  SIMT_UNROLL
  for (int round = 0; round < 10; round++) {
    // High and low words by separate products, so that g++ moves fewer words between lanes.
    const uint32_t high0 = uint32_t(uint64_t(0xD2511F53u) * c.x >> 32), low0 = 0xD2511F53u * c.x;
    const uint32_t high1 = uint32_t(uint64_t(0xCD9E8D57u) * c.z >> 32), low1 = 0xCD9E8D57u * c.z;
    c = make_uint4(high1 ^ c.y ^ k.lo, low1, high0 ^ c.w ^ k.hi, low0);
    k.lo += 0x9E3779B9u;
    k.hi += 0xBB67AE85u;
  }
  return c;
#endif
}

// ln x for x in [2^-32, 1], about 1 ulp (Cephes logf). Only + * fma, so it vectorises and is the same everywhere.
__host__ __device__ __forceinline__ float log_unit(float x) {
  int bits = __builtin_bit_cast(int, x) - 0x3f3504f3;  // sqrt(1/2)
  float e = float(bits >> 23);
  float f = __builtin_bit_cast(float, (bits & 0x7fffff) + 0x3f3504f3) - 1.f;  // in [sqrt(1/2) - 1, sqrt(2) - 1)
  float p = 7.0376836292e-2f;
  p = fmaf(p, f, -1.1514610310e-1f);
  p = fmaf(p, f, 1.1676998740e-1f);
  p = fmaf(p, f, -1.2420140846e-1f);
  p = fmaf(p, f, 1.4249322787e-1f);
  p = fmaf(p, f, -1.6668057665e-1f);
  p = fmaf(p, f, 2.0000714765e-1f);
  p = fmaf(p, f, -2.4999993993e-1f);
  p = fmaf(p, f, 3.3333331174e-1f);
  float ff = f * f;
  float y = fmaf(p * f, ff, e * -2.12194440e-4f);
  y = fmaf(-0.5f, ff, y);
  return fmaf(e, 0.693359375f, f + y);
}

// Two standard normals from two random words: sqrt(-2 ln u) * (cos, sin)(2 pi v).
__host__ __device__ __forceinline__ float2 box_muller(uint32_t a, uint32_t b) {
  float u = fmaf(float(int(a >> 1)), 0x1p-31f, 0x1p-32f);  // (0, 1]
  float r = sqrtf(-2.f * log_unit(u));
  uint32_t quadrant = (b + 0x20000000u) >> 30;                                 // nearest multiple of pi/2
  float t = float(int(b - (quadrant << 30))) * (1.5707963267949f * 0x1p-30f);  // [-pi/4, pi/4)
  float tt = t * t;
  float s = fmaf(fmaf(fmaf(-1.9515295891e-4f, tt, 8.3321608736e-3f), tt, -1.6666654611e-1f), tt * t, t);
  float c = fmaf(fmaf(fmaf(2.443315711809948e-5f, tt, -1.388731625493765e-3f), tt, 4.166664568298827e-2f), tt * tt,
                 fmaf(-0.5f, tt, 1.f));
  float cosine = quadrant & 1 ? s : c, sine = quadrant & 1 ? c : s;
  cosine = (quadrant + 1) & 2 ? -cosine : cosine;
  sine = quadrant & 2 ? -sine : sine;
  return make_float2(r * cosine, r * sine);
}

// The four standard normals of one counter.
__host__ __device__ __forceinline__ float4 normal4(Key key, uint32_t element, uint32_t stream, uint32_t step,
                                                   uint32_t draw = 0) {
  uint4 r = philox(make_uint4(element, stream, step, draw), key);
  float2 a = box_muller(r.x, r.y), b = box_muller(r.z, r.w);
  return make_float4(a.x, a.y, b.x, b.y);
}

// Spreads a user's seed over the 64 bits of a key (splitmix64's finaliser), so that seeds 0, 1, 2 share no key words.
__host__ __device__ __forceinline__ Key key_of(uint64_t seed, uint64_t purpose = 0) {
  uint64_t z = seed + 0x9E3779B97F4A7C15ull * (purpose + 1);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  z ^= z >> 31;
  return Key{uint32_t(z), uint32_t(z >> 32)};
}

}  // namespace baton
