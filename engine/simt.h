// simt.h: one kernel source, three back ends.
//
//   nvcc                    the GPU.
//   g++                     SERIAL: every block has one thread and every warp one lane. Barriers vanish, block-stride
//                           loops get unit stride, and the compiler vectorises what is left. The portable CPU default.
//   g++ -DSIMT_EMULATE      EMULATED: every CUDA thread of a block is a fiber, with real barriers and shuffles, random
//                           schedules, divergence checks, and annotations for ASan and TSan. For tests (simt_emu.cpp).
//
// A kernel is launched by the shape of its work, which each back end turns into its own grid. Every shape takes a
// number of rows, the second grid dimension: it is where the replica axis lives.
//
//   simt::launch<kernel>(simt::each(n, rows), stream, args...)                  one thread per item and row
//   simt::launch<kernel>(simt::warps(n, rows), stream, args...)                 one warp per item and row
//   simt::launch<kernel>(simt::blocks(n, threads, smem, rows), stream, args...) one block per item and row
//
// Rules for kernels are in engine/README.md.
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
#if defined(__CUDACC__)
#define SIMT_UNROLL _Pragma("unroll")
#define SIMT_SIMD(...)
#elif defined(SIMT_EMULATE)
#define SIMT_UNROLL
#define SIMT_SIMD(...)
#else
#define SIMT_UNROLL _Pragma("GCC unroll 16")
#define SIMT_SIMD(...) SIMT_PRAGMA(omp simd __VA_ARGS__)  // the iterations of this loop may be reordered
#endif

#if defined(__CUDACC__)  // ------------------------------------------------------------------------------- GPU
#include <cuda_runtime.h>
#define SIMT_DYNAMIC_SHARED(T, name)                                    \
  extern __shared__ __align__(16) unsigned char simt_dynamic_shared_[]; \
  T* name = reinterpret_cast<T*>(simt_dynamic_shared_)
namespace baton::simt {
using Stream = cudaStream_t;
constexpr int warp_size = 32, warps_per_block = 4, threads_per_block = 256;
}  // namespace baton::simt
#else  // -------------------------------------------------------------------------------------------------- host
#include <omp.h>
#define __host__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __constant__ static const

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
constexpr float2 make_float2(float x, float y) { return {x, y}; }
constexpr float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}

// glibc's libmvec has vector versions of these; its headers only say so under -ffast-math.
extern "C" {
#pragma omp declare simd notinbranch
float expf(float) noexcept;
#pragma omp declare simd notinbranch
float logf(float) noexcept;
}

namespace baton::simt {
#if defined(SIMT_EMULATE)
struct Index {
  unsigned x, y, z;
};  // as in CUDA
#else
struct Index {
  int x, y, z;
};  // signed, cannot wrap: `int i = blockIdx.x * blockDim.x + threadIdx.x` then vectorises
#endif
using Stream = void*;
}  // namespace baton::simt

#if !defined(SIMT_EMULATE)  // ------------------------------------------------------------------ host, SERIAL
#define __global__ inline __attribute__((always_inline))
#define __shared__  // one thread per block: shared memory is a local variable
#define SIMT_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(baton::simt::dynamic_shared)
// `static`, not `inline`: g++ only keeps them in registers when it sees that nobody takes their address.
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

#else  // ------------------------------------------------------------------------------------- host, EMULATED
#define __global__ inline
#define __shared__ static __attribute__((section("simt_shared")))  // so that the emulator can find and poison it
#define SIMT_DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(baton::simt::emu::dynamic_shared)
extern baton::simt::Index threadIdx, blockIdx, blockDim, gridDim;
namespace baton::simt {
constexpr int warp_size = 32, warps_per_block = 4, threads_per_block = 256;
namespace emu {
extern unsigned char* dynamic_shared;
struct Site {
  const char* file;
  int line;
};
void block_barrier(Site);
void warp_exchange(unsigned mask, int source_lane, void* value, size_t bytes, Site);  // source_lane < 0: just wait
void preempt();                                                                       // a chance to switch
int lane();
void run(Index grid, Index block, size_t smem, void (*kernel)(void*), void* args, const char* name);
void set_seed(uint64_t seed);  // 0: threads and blocks in order; otherwise a random schedule
}  // namespace emu
}  // namespace baton::simt
#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()
inline void __syncthreads(SIMT_SITE) { baton::simt::emu::block_barrier({file, line}); }
inline void __syncwarp(unsigned mask = ~0u, SIMT_SITE) {
  baton::simt::emu::warp_exchange(mask, -1, nullptr, 0, {file, line});
}
inline void __threadfence() { baton::simt::emu::preempt(); }
template <class T>
T __shfl_sync(unsigned mask, T v, int src, SIMT_SITE) {
  baton::simt::emu::warp_exchange(mask, src & 31, &v, sizeof v, {file, line});
  return v;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, SIMT_SITE) {
  return __shfl_sync(mask, v, baton::simt::emu::lane() ^ bits, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, int by, SIMT_SITE) {
  int l = baton::simt::emu::lane();
  return __shfl_sync(mask, v, l + by < 32 ? l + by : l, file, line);
}
inline unsigned __ballot_sync(unsigned mask, bool p, SIMT_SITE) {
  unsigned bits = 0;
  for (int l = 0; l < 32; l++)
    if (mask >> l & 1) bits |= unsigned(__shfl_sync(mask, p, l, file, line)) << l;
  return bits;
}
#endif

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
#if defined(SIMT_EMULATE)
  baton::simt::emu::preempt();
#endif
  return std::atomic_ref<T>(*p).fetch_add(v, std::memory_order_relaxed);
}
#endif  // host

// ---------------------------------------------------------------------------------------------------- launching
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

// Which item is mine. A kernel launched with each(n) or warps(n) must return when its item is >= n.
__device__ __forceinline__ int thread_item() { return blockIdx.x * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int warp_item() { return (blockIdx.x * blockDim.x + threadIdx.x) / warp_size; }
__device__ __forceinline__ int lane_id() { return threadIdx.x % warp_size; }
__device__ __forceinline__ int row() { return blockIdx.y; }

#if defined(__CUDACC__)
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
#elif defined(SIMT_EMULATE)
template <auto kernel, class... A>
void launch(Blocks shape, Stream, A... args) {
  auto call = [=] { kernel(args...); };
  emu::run(
      {unsigned(shape.n), unsigned(shape.rows), 1}, {unsigned(shape.threads), 1, 1}, shape.smem,
      [](void* f) { (*static_cast<decltype(call)*>(f))(); }, &call, __PRETTY_FUNCTION__);
}
#else  // SERIAL
constexpr int parallel_grain = 4096;  // do not wake OpenMP's threads for fewer items
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
#endif

#if defined(__CUDACC__) || defined(SIMT_EMULATE)
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
#endif

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
// Adds to a counter in shared memory, which no other block sees: one thread a block needs no atomic.
template <class T>
__device__ __forceinline__ void add_shared(T* p, T v) {
  if constexpr (warp_size == 1) *p += v;
  else atomicAdd(p, v);
}
}  // namespace

}  // namespace baton::simt

namespace baton {
using simt::Stream;
}  // namespace baton

// ---------------------------------------------------------------------------------------------- profiler ranges
#if defined(__CUDACC__) || defined(BATON_CUDA)
#include <nvtx3/nvToolsExt.h>
namespace baton {
struct Range {  // an NVTX range: what Nsight shows and filters by
  explicit Range(const char* name) { nvtxRangePushA(name); }
  ~Range() { nvtxRangePop(); }
  Range(const Range&) = delete;
};
}  // namespace baton
#else
namespace baton {
struct Range {
  explicit Range(const char*) {}
  ~Range() {}
};
}  // namespace baton
#endif
#define BATON_JOIN_(a, b) a##b
#define BATON_JOIN(a, b) BATON_JOIN_(a, b)
#define BATON_RANGE(name) ::baton::Range BATON_JOIN(baton_range_, __LINE__)(name)
