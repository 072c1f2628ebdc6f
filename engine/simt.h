// One kernel source for three targets. This header defines what they share; each target has a header of its own:
//
//   simt_cuda.h       nvcc: the GPU. (tests/ptx interprets its output on a CPU.)
//   simt_serial.h     g++: every block has one thread and every warp one lane. Barriers are empty, block-stride loops
//                     have unit stride, and the compiler vectorises what is left. The default on a CPU.
//   simt_emulated.h   g++ -DSIMT_EMULATE: every CUDA thread of a block is a fiber, with real barriers and shuffles,
//                     random schedules, divergence checks, and annotations for ASan and TSan. For tests.
//
// A kernel is launched by the shape of its work, which each target turns into its own grid. Every shape takes a number
// of rows, the second dimension of the grid, which is for the replicas.
//
//   simt::launch<kernel>(simt::each(n, rows), stream, args...)                  one thread per item and row
//   simt::launch<kernel>(simt::warps(n, rows), stream, args...)                 one warp per item and row
//   simt::launch<kernel>(simt::blocks(n, threads, smem, rows), stream, args...) one block per item and row
//
// In the GPU build nvcc compiles the .cu files, and BATON_CUDA is defined for them alone. g++ compiles the .cpp files,
// the same ones as in the host build: they see the serial target, but can neither contain nor launch kernels, and ask
// `on_gpu` (engine/runtime.h) where a program should do something else on a GPU.
//
// kernels/README.md has the rules for kernels.
#pragma once
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "engine/error.h"

#define SIMT_PRAGMA(...) _Pragma(#__VA_ARGS__)

namespace baton::simt {
struct Each {
  int n, rows;
};  // one thread per item
struct Warps {
  int n, rows;
};  // one warp per item
struct Blocks {
  int n, threads;
  size_t smem;
  int rows;
};  // one block per item
constexpr Each each(int n, int rows = 1) { return {n, rows}; }
constexpr Warps warps(int n, int rows = 1) { return {n, rows}; }
constexpr Blocks blocks(int n, int threads = 256, size_t smem = 0, int rows = 1) { return {n, threads, smem, rows}; }
}  // namespace baton::simt

#if defined(BATON_CUDA)
#include "engine/simt_cuda.h"
#elif defined(SIMT_EMULATE)
#include "engine/simt_emulated.h"
#else
#include "engine/simt_serial.h"
#endif

namespace baton::simt {
// The item of this thread or warp. A kernel launched with each(n) or warps(n) must return when its item is >= n.
__device__ __forceinline__ int thread_item() { return blockIdx.x * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int warp_item() { return (blockIdx.x * blockDim.x + threadIdx.x) / warp_size; }
__device__ __forceinline__ int lane_id() { return threadIdx.x % warp_size; }
__device__ __forceinline__ int row() { return blockIdx.y; }

// --------------------------------------------------------------------------------------------------- collectives
namespace {  // shared variables must not be in COMDAT functions
template <class T>
__device__ __forceinline__ T warp_sum(T v) {  // every lane gets the result
  SIMT_UNROLL
  for (int bit = warp_size / 2; bit > 0; bit /= 2) v += __shfl_xor_sync(~0u, v, bit);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
  SIMT_UNROLL
  for (int bit = warp_size / 2; bit > 0; bit /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, bit));
  return v;
}
[[maybe_unused]] __device__ __forceinline__ float block_sum(float v) {  // thread 0 gets it; blockDim.x % warp_size == 0
  __shared__ float parts[32];
  v = warp_sum(v);
  if (lane_id() == 0) parts[threadIdx.x / warp_size] = v;
  __syncthreads();
  if (threadIdx.x / warp_size == 0) {
    v = lane_id() < int(blockDim.x) / warp_size ? parts[lane_id()] : 0.f;
    v = warp_sum(v);
  }
  __syncthreads();  // parts may be used again
  return v;
}
[[maybe_unused]] __device__ __forceinline__ double block_sum(double v) {
  __shared__ double parts[32];
  v = warp_sum(v);
  if (lane_id() == 0) parts[threadIdx.x / warp_size] = v;
  __syncthreads();
  if (threadIdx.x / warp_size == 0) {
    v = lane_id() < int(blockDim.x) / warp_size ? parts[lane_id()] : 0.;
    v = warp_sum(v);
  }
  __syncthreads();  // parts may be used again
  return v;
}
[[maybe_unused]] __device__ __forceinline__ float block_max(float v) {  // as block_sum
  __shared__ float parts[32];
  v = warp_max(v);
  if (lane_id() == 0) parts[threadIdx.x / warp_size] = v;
  __syncthreads();
  if (threadIdx.x / warp_size == 0) {
    v = lane_id() < int(blockDim.x) / warp_size ? parts[lane_id()] : parts[0];
    v = warp_max(v);
  }
  __syncthreads();  // parts may be used again
  return v;
}
// Adds to a counter in shared memory. Other blocks do not see it, so a block of one thread needs no atomic.
template <class T>
__device__ __forceinline__ void add_shared(T* p, T v) {
  if constexpr (warp_size == 1) *p += v;
  else atomicAdd(p, v);
}
}  // namespace

}  // namespace baton::simt

namespace baton {
using simt::Stream;

// A range of the profiler, which Nsight shows and filters by; nothing on the host.
class Range {
 public:
  explicit Range(const char* name);
  ~Range();
  Range(const Range&) = delete;
  Range& operator=(const Range&) = delete;
};
}  // namespace baton
#define BATON_JOIN_(a, b) a##b
#define BATON_JOIN(a, b) BATON_JOIN_(a, b)
#define BATON_RANGE(name) ::baton::Range BATON_JOIN(baton_range_, __LINE__)(name)
