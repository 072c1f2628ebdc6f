#include "bench/first_light/kernels.h"

#include "engine/philox.h"

namespace baton {
namespace {

__global__ void touch_kernel(int32_t* __restrict__ x, int n) {
  const int i = simt::thread_item();
  if (i >= n) return;
  x[i] += 1;
}

// No __restrict__: the compiler must believe that `from` may be `to`.
__global__ void load_after_store_kernel(float* to, const float* from, int steps) {
  if (simt::thread_item() >= 1) return;
  float a = 1;
  for (int i = 0; i < steps; i++) {
    a = 0.5f * (a + *from);
    *to = a;
  }
}

__global__ void follow_links_kernel(const uint32_t* next, int steps, uint32_t* end) {
  if (simt::thread_item() >= 1) return;
  uint32_t i = 0;
  for (int step = 0; step < steps; step++) i = next[i];
  *end = i;
}

__global__ void read_all_kernel(const float4* __restrict__ x, int n, float* __restrict__ sink) {
  const int i = simt::thread_item();
  if (i >= n) return;
  const float4 v = x[i];
  const float sum = (v.x + v.y) + (v.z + v.w);
  if (sum == 1.f) *sink = sum;
}

__global__ void draw_normals_kernel(float* __restrict__ sum, int threads, int rounds) {
  const int i = simt::thread_item();
  if (i >= threads) return;
  const Key key = key_of(1);
  float total = 0;
  for (int round = 0; round < rounds; round++) {
    const float4 e = normal4(key, uint32_t(i), 1, uint32_t(round));
    total += (e.x + e.y) + (e.z + e.w);
  }
  sum[i] = total;
}

__global__ void multiply_add_kernel(float* __restrict__ sum, int threads, int rounds, float factor) {
  const int i = simt::thread_item();
  if (i >= threads) return;
  float a[fma_chains];
  SIMT_UNROLL
  for (int c = 0; c < fma_chains; c++) a[c] = float(i + c);
  for (int round = 0; round < rounds; round++) {
    SIMT_UNROLL
    for (int c = 0; c < fma_chains; c++) a[c] = fmaf(a[c], factor, 1.f);
  }
  float total = 0;
  SIMT_UNROLL
  for (int c = 0; c < fma_chains; c++) total += a[c];
  sum[i] = total;
}

__global__ void meet_kernel(int32_t* __restrict__ x, int rounds) {
  for (int round = 0; round < rounds; round++) __syncthreads();
  if (threadIdx.x == 0) *x += 1;
}

}  // namespace

void touch(int32_t* x, int n, Stream stream) { simt::launch<touch_kernel>(simt::each(n), stream, x, n); }

void load_after_store(float* to, const float* from, int steps, Stream stream) {
  simt::launch<load_after_store_kernel>(simt::each(1), stream, to, from, steps);
}

void follow_links(const uint32_t* next, int steps, uint32_t* end, Stream stream) {
  simt::launch<follow_links_kernel>(simt::each(1), stream, next, steps, end);
}

void read_all(const float4* x, int n, int rows, float* sink, Stream stream) {
  simt::launch<read_all_kernel>(simt::each(n, rows), stream, x, n, sink);
}

void draw_normals(float* sum, int threads, int rounds, Stream stream) {
  simt::launch<draw_normals_kernel>(simt::each(threads), stream, sum, threads, rounds);
}

void multiply_add(float* sum, int threads, int rounds, Stream stream) {
  simt::launch<multiply_add_kernel>(simt::each(threads), stream, sum, threads, rounds, 0.5f);
}

void meet(int32_t* x, int rounds, Stream stream) { simt::launch<meet_kernel>(simt::blocks(1), stream, x, rounds); }

}  // namespace baton
