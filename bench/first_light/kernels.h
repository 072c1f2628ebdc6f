// Kernels that measure the device itself: latencies, rates, and what a launch costs. Each does one thing over and over.
#pragma once
#include "engine/runtime.h"

namespace baton {

// x[i] += 1 for i < n, a thread each: next to nothing, so a chain of them shows what a launch costs.
void touch(int32_t* x, int n, Stream);

// One thread does `steps` times: a = (a + *from) / 2; *to = a. With from == to every load waits for the store before
// it.
void load_after_store(float* to, const float* from, int steps, Stream);

// One thread follows `steps` links, i = next[i] from 0, and writes where it ends to `end`: every load waits for the one
// before it.
void follow_links(const uint32_t* next, int steps, uint32_t* end, Stream);

// Reads n float4, a thread each, `rows` times over. `sink` is written where four floats add up to exactly 1, hardly
// ever of random ones: without it the compiler would leave the loads out.
void read_all(const float4* x, int n, int rows, float* sink, Stream);

// `threads` threads draw 4 `rounds` standard normals each and write their sum to sum[thread].
void draw_normals(float* sum, int threads, int rounds, Stream);

// `threads` threads do 8 `rounds` fused multiply-adds each, in eight chains, and write their sum to sum[thread].
constexpr int fma_chains = 8;
void multiply_add(float* sum, int threads, int rounds, Stream);

// One block of 256 threads meets at `rounds` barriers. (The serial build has no barriers: there it measures nothing.)
void meet(int32_t* x, int rounds, Stream);

}  // namespace baton
