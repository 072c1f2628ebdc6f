// The serial target of simt.h: a block is one thread and a warp is one lane; OpenMP runs the blocks. Included by simt.h
// alone.
#pragma once
#include "engine/simt_host.h"

#define SIMT_UNROLL _Pragma("GCC unroll 16")
#define SIMT_SIMD(...) SIMT_PRAGMA(omp simd __VA_ARGS__)  // the iterations of this loop may be reordered

namespace baton::simt {
struct Index {
  int x, y, z;
};  // signed, cannot wrap: `int i = blockIdx.x * blockDim.x + threadIdx.x` then vectorises
}  // namespace baton::simt

#define __global__ inline __attribute__((always_inline))
#define __shared__  // one thread per block: shared memory is a local variable
#define SIMT_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(baton::simt::dynamic_shared)
// `static`, not `inline`: g++ keeps them in registers only where it sees that their address is never taken.
[[maybe_unused]] static thread_local baton::simt::Index blockIdx, gridDim;
[[maybe_unused]] static constexpr baton::simt::Index threadIdx{0, 0, 0}, blockDim{1, 1, 1};
namespace baton::simt {
constexpr int warp_size = 1, warps_per_block = 1, threads_per_block = 1;
inline thread_local unsigned char* dynamic_shared;
}  // namespace baton::simt
__forceinline__ void __syncthreads() {}
__forceinline__ void __syncwarp(unsigned = ~0u) {}
__forceinline__ void __threadfence() {}
template <class T>
__forceinline__ T __shfl_sync(unsigned, T v, int) {
  return v;
}
template <class T>
__forceinline__ T __shfl_xor_sync(unsigned, T v, int) {
  return v;
}
template <class T>
__forceinline__ T __shfl_down_sync(unsigned, T v, int) {
  return v;
}
__forceinline__ unsigned __ballot_sync(unsigned, bool p) { return p; }
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  return std::atomic_ref<T>(*p).fetch_add(v, std::memory_order_relaxed);
}

// ------------------------------------------------------------------------ products of a warp, and asynchronous copies
// What they are for is in simt.h. Their declarations let a kernel name them in the branch that this build discards.
#define SIMT_NEEDS_WARPS "this collective needs a warp of 32 lanes: the serial build takes the portable twin"
namespace baton::simt {
template <class T>
void mma_tf32(T (&)[4], const float (&)[4], const float (&)[2]) {
  static_assert(sizeof(T) == 0, SIMT_NEEDS_WARPS);
}
template <class T>
void load_matrix(T (&)[4], const float*) {
  static_assert(sizeof(T) == 0, SIMT_NEEDS_WARPS);
}
template <int n, class T>
void copy_async(T*, const T*, int = n) {
  static_assert(n < 0, SIMT_NEEDS_WARPS);
}
template <class T = int>
void copy_async_commit() {
  static_assert(sizeof(T) == 0, SIMT_NEEDS_WARPS);
}
template <int pending>
void copy_async_wait() {
  static_assert(pending < 0, SIMT_NEEDS_WARPS);
}
}  // namespace baton::simt
#undef SIMT_NEEDS_WARPS

// ---------------------------------------------------------------------------------------------------- launching
namespace baton::simt {
constexpr int parallel_grain = 4096;  // fewer items run on one thread
template <auto kernel, class... A>
__attribute__((noinline)) void serial_range(int first, int last, A... args) {
#pragma omp simd
  for (int i = first; i < last; i++) {
    blockIdx.x = i;
    kernel(args...);
  }
}
template <auto kernel, class... A>
void launch(Each shape, Stream, A... args) {
  const long n = shape.n, total = n * shape.rows;
#pragma omp parallel if (total > parallel_grain)
  {
    const long parts = omp_get_num_threads(), part = omp_get_thread_num();
    long first = total * part / parts, last = total * (part + 1) / parts;
    while (first < last) {
      const long r = first / n, end = last < (r + 1) * n ? last : (r + 1) * n;
      blockIdx.y = int(r);
      serial_range<kernel>(int(first - r * n), int(end - r * n), args...);
      first = end;
    }
  }
}
template <auto kernel, class... A>
void launch(Blocks shape, Stream, A... args) {
#pragma omp parallel if (shape.n * shape.rows > 1)
  {
    std::vector<float4> dynamic((shape.smem + 15) / 16);
    dynamic_shared = reinterpret_cast<unsigned char*>(dynamic.data());
    gridDim = {shape.n, shape.rows, 1};
#pragma omp for schedule(static) collapse(2)
    for (int r = 0; r < shape.rows; r++)
      for (int i = 0; i < shape.n; i++) {
        blockIdx = {i, r, 0};
        kernel(args...);
      }
  }
}
template <auto kernel, class... A>
void launch(Warps shape, Stream stream, A... args) {
  launch<kernel>(Blocks{shape.n, 1, 0, shape.rows}, stream, args...);
}
}  // namespace baton::simt
