// The emulated target of simt.h: a fiber per CUDA thread (simt_emulated.cpp). Included by simt.h alone.
#pragma once
#include "engine/simt_host.h"

#define SIMT_UNROLL
#define SIMT_SIMD(...)

namespace baton::simt {
struct Index {
  unsigned x, y, z;
};  // as in CUDA
}  // namespace baton::simt

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
void warp_exchange(unsigned mask, int source_lane, void* value, size_t bytes, Site);  // source_lane < 0: only wait
void preempt();                                                                       // may switch to another thread
int lane();

// ---- of products and asynchronous copies
using Word = uint32_t __attribute__((may_alias));
struct Copy {
  Word* to;
  int words;
  unsigned group;  // of its thread's groups
  Site site;
  uint32_t data[4];
};
struct Fragments {  // what a lane gives to a product
  const float *a, *b;
  float* c;
};
struct Rows {  // what a lane gives to load_matrix, and the rows that it reads then
  const float *mine, *read[4];
};
void multiply(Fragments*, Site);
void exchange_rows(Rows*, Site);
// Fails for addresses that are not aligned to the bytes, and where `valid` is not in [0, n].
void check_copy(const void* to, const void* from, int bytes, int valid, int n, Site);
void start_copy(const Copy&);
void commit_copies();
// Takes the copies that a wait waits for, one after the other; false: none is left.
bool next_arrival(unsigned pending, Copy&);
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
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  baton::simt::emu::preempt();
  return std::atomic_ref<T>(*p).fetch_add(v, std::memory_order_relaxed);
}

// ------------------------------------------------------------------------ products of a warp, and asynchronous copies
// What reads and writes the kernel's memory is here, and not in simt_emulated.cpp, so that sanitizers see it.
namespace baton::simt {
inline void mma_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2], SIMT_SITE) {
  emu::Fragments mine{a, b, c};
  emu::multiply(&mine, {file, line});
}
__forceinline__ void load_matrix(float (&d)[4], const float* row, SIMT_SITE) {
  emu::Rows rows{row, {}};
  emu::exchange_rows(&rows, {file, line});
  for (int i = 0; i < 4; i++) d[i] = rows.read[i][emu::lane() % 4];
}
template <int n, class T>
__forceinline__ void copy_async(T* to, const T* from, int valid = n, SIMT_SITE) {
  constexpr int bytes = n * int(sizeof(T));
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  emu::check_copy(to, from, bytes, valid, n, {file, line});
  T values[n] = {};
  for (int i = 0; i < valid; i++) values[i] = from[i];
  emu::Copy copy{reinterpret_cast<emu::Word*>(to), bytes / 4, 0, {file, line}, {}};
  std::memcpy(copy.data, values, bytes);
  for (int i = 0; i < copy.words; i++) copy.to[i] = ~0u;  // NaN until it arrives
  emu::start_copy(copy);
}
inline void copy_async_commit() { emu::commit_copies(); }
template <int pending>
__forceinline__ void copy_async_wait() {
  for (emu::Copy copy; emu::next_arrival(pending, copy);)
    for (int i = 0; i < copy.words; i++) copy.to[i] = copy.data[i];
}
}  // namespace baton::simt

// ---------------------------------------------------------------------------------------------------- launching
namespace baton::simt {
template <auto kernel, class... A>
void launch(Blocks shape, Stream, A... args) {
  auto call = [=] { kernel(args...); };
  emu::run(
      {unsigned(shape.n), unsigned(shape.rows), 1}, {unsigned(shape.threads), 1, 1}, shape.smem,
      [](void* f) { (*static_cast<decltype(call)*>(f))(); }, &call, __PRETTY_FUNCTION__);
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
