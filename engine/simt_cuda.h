// The GPU target of simt.h: CUDA itself, and launches with checked configurations. Included by simt.h alone.
#pragma once
#include <cuda_runtime.h>

#define SIMT_UNROLL _Pragma("unroll")
#define SIMT_SIMD(...)
#define SIMT_DYNAMIC_SHARED(T, name)                                    \
  extern __shared__ __align__(16) unsigned char simt_dynamic_shared_[]; \
  T* name = reinterpret_cast<T*>(simt_dynamic_shared_)

namespace baton::simt {

using Stream = cudaStream_t;
constexpr int warp_size = 32, warps_per_block = 4, threads_per_block = 256;

inline void check(cudaError_t e, const char* what) {
  if (e != cudaSuccess) throw RunError(std::string(what) + ": " + cudaGetErrorString(e));
}

// ------------------------------------------------------------------------ products of a warp, and asynchronous copies
__device__ __forceinline__ void mma_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
__device__ __forceinline__ unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }
// ldmatrix moves pairs of 16-bit numbers: a pair is one number here.
__device__ __forceinline__ void load_matrix(float (&d)[4], const float* row) {
  unsigned r[4];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
  for (int i = 0; i < 4; i++) d[i] = __uint_as_float(r[i]);
}
// Copies of 16 bytes go past the L1 cache; smaller ones cannot.
template <int n, class T>
__device__ __forceinline__ void copy_async(T* to, const T* from) {
  constexpr int bytes = n * int(sizeof(T));
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from), "n"(bytes)
                 : "memory");
}
template <int n, class T>
__device__ __forceinline__ void copy_async(T* to, const T* from, int valid) {
  constexpr int bytes = n * int(sizeof(T));
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  const int read = valid * int(sizeof(T));
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(read)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(bytes),
                 "r"(read)
                 : "memory");
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// ---------------------------------------------------------------------------------------------------- launching
template <auto kernel, class... A>
void launch(Blocks shape, Stream stream, A... args) {
  if (shape.n == 0 || shape.rows == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(shape.n), unsigned(shape.rows));
  config.blockDim = dim3(unsigned(shape.threads));
  config.dynamicSmemBytes = shape.smem;
  config.stream = stream;
  if (shape.smem > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shape.smem)), __func__);
  check(cudaLaunchKernelEx(&config, kernel, args...), __PRETTY_FUNCTION__);
}
template <auto kernel, class... A>
void launch(Each shape, Stream stream, A... args) {
  launch<kernel>(Blocks{(shape.n + threads_per_block - 1) / threads_per_block, threads_per_block, 0, shape.rows},
                 stream, args...);
}
template <auto kernel, class... A>
void launch(Warps shape, Stream stream, A... args) {
  launch<kernel>(Blocks{(shape.n + warps_per_block - 1) / warps_per_block, warps_per_block * warp_size, 0, shape.rows},
                 stream, args...);
}
}  // namespace baton::simt
