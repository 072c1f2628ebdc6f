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
#include "engine/tf32.h"

namespace baton::simt {
constexpr bool has_warps = warp_size > 1;  // false in the serial build

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

// ------------------------------------------------------------------------ products of a warp, and asynchronous copies
// Each target's header has these, except that the serial build refuses to compile them: a warp is one lane there, and
// the kernel has a portable twin (kernels/README.md, rule 10).
//
//   void mma_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]);
//
// C += A B by the tensor cores: A is 16 x 8, B is 8 x 8, C is 16 x 8. A and B must hold tf32 numbers (round_to_tf32),
// whose last 13 bits are not looked at. All 32 lanes of a warp call it together. The lane 4 g + t holds, as the PTX ISA
// lays out the fragments of mma.m16n8k8 with .tf32 operands:
//
//   a = {A(g, t), A(g + 8, t), A(g, t + 4), A(g + 8, t + 4)}
//   b = {B(t, g), B(t + 4, g)}
//   c = {C(g, 2 t), C(g, 2 t + 1), C(g + 8, 2 t), C(g + 8, 2 t + 1)}
//
//   void load_matrix(float (&d)[4], const float* row);
//
// Reads four matrices M0 to M3 of 8 x 4 numbers from shared memory, by ldmatrix. All 32 lanes call it together: the
// lane 8 i + r gives the address of row r of M_i, four numbers in a row, aligned to 16 bytes. The lane 4 g + t gets
// d[i] = M_i(g, t). So where A lies row by row, and B column by column, the lane l gets operands of mma_tf32 by
//
//   load_matrix(a, &A[l % 16][l / 16 * 4]);                          // a
//   load_matrix(b, &B_columns[l % 8 + l / 16 * 8][l / 8 % 2 * 4]);   // b of 8 columns, then b of the 8 columns behind
//
//   template <int n, class T> void copy_async(T* to, const T* from);
//   template <int n, class T> void copy_async(T* to, const T* from, int valid);
//   void copy_async_commit();
//   template <int pending> void copy_async_wait();
//
// copy_async starts to copy n elements, 4, 8 or 16 bytes in all, from global to shared memory; both addresses are
// aligned to these bytes. Where a row ends early, only the first `valid` elements (0 to n) are read, and the others
// become 0. copy_async_commit makes a group of the copies that this thread has started since the last one; a group may
// be empty. copy_async_wait waits until at most the `pending` last groups of this thread are under way. After it, this
// thread may read what it copied; other threads may only after a barrier that follows (__syncthreads, or __syncwarp for
// the lanes of one warp). A kernel must not end before it has waited for all that it copied.
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
