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
