// Kernels that are wrong on purpose, and some that are right: what the emulator, the sanitizers and the interpreter of
// PTX say about them is what tests/faults/run checks.
//
//   faults NAME     runs one. Prints RIGHT or WRONG and what its result was, or the ERROR; exit status 0, 2, 3
//   faults --list   the names
//
// The faults at the end are those that only a build for the GPU can have: two memories, streams, read-only loads.
#include <cstdio>
#include <exception>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "engine/simt.h"

namespace baton {
namespace {

constexpr int threads = 256;

// ------------------------------------------------------------------------------------------------------- barriers
// simt::block_sum with one barrier or the other left out.
__device__ float block_sum(float v, bool first, bool second) {
  __shared__ float parts[32];
  v = simt::warp_sum(v);
  if (simt::lane_id() == 0) parts[threadIdx.x / simt::warp_size] = v;
  if (first) __syncthreads();
  if (threadIdx.x / simt::warp_size == 0)
    v = simt::warp_sum(simt::lane_id() < int(blockDim.x) / simt::warp_size ? parts[simt::lane_id()] : 0.f);
  if (second) __syncthreads();
  return v;
}
template <bool first, bool second>
__global__ void two_sums(float* sums, const float* x, int n) {
  float a = 0, b = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) a += x[i], b += 2 * x[i];
  a = block_sum(a, first, second);
  b = block_sum(b, first, second);
  if (threadIdx.x == 0) sums[0] = a, sums[1] = b;
}
// Every thread hands its number to the one before it, through shared memory.
__global__ void shift(float* y, bool barrier) {
  __shared__ float s[threads];
  const int t = threadIdx.x;
  s[t] = t;
  if (barrier) __syncthreads();
  y[t] = s[(t + 1) % threads];
}
__global__ void early_return(float* y, int n) {
  if (int(threadIdx.x) >= n) return;
  __syncthreads();
  y[threadIdx.x] = 1;
}
__global__ void two_barriers(float* y) {
  if (threadIdx.x < 32) __syncthreads();
  else __syncthreads();
  y[threadIdx.x] = 1;
}
__global__ void shuffle_in_branch(float* y) {
  float v = threadIdx.x;
  if (threadIdx.x < 16) v = simt::warp_sum(v);
  y[threadIdx.x] = v;
}
__global__ void shuffle_from_outside(float* y) {
  float v = threadIdx.x;
  if (threadIdx.x < 16) v = __shfl_sync(0xFFFF, v, 20);
  y[threadIdx.x] = v;
}

// ----------------------------------------------------------------------------------------------------------- races
__global__ void count(float* y, bool atomic) {
  if (atomic) atomicAdd(y, 1.f);
  else y[0] += 1;
}
__global__ void neighbour_in_global(float* y, float* out) {  // reads what another thread writes
  const int t = threadIdx.x;
  y[t] = t;
  out[t] = y[(t + 1) % threads];
}

// ---------------------------------------------------------------------------------------------------------- memory
__global__ void static_shared(float* y, int over) {
  __shared__ float s[threads];
  s[threadIdx.x + over] = 1;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
__device__ void put(float* p, int i) { p[i] = 1; }
__global__ void static_shared_by_pointer(float* y, int over) {
  __shared__ float s[threads];
  put(s, threadIdx.x + over);
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
__global__ void dynamic_shared(float* y, int over) {
  SIMT_DYNAMIC_SHARED(float, s);
  s[threadIdx.x + over] = 1;
  __syncthreads();
  y[threadIdx.x] = s[threadIdx.x];
}
__global__ void fill(float* y, int n) {
  const int i = simt::thread_item();
  if (i >= n) return;
  y[i] = 1;
}
__global__ void local_array(float* y, int over) {
  float a[4] = {1, 2, 3, 4};
  y[threadIdx.x] = a[(threadIdx.x & 3) + over];
}
__global__ void store4(float4* y) { y[threadIdx.x] = make_float4(1, 2, 3, 4); }
__global__ void unset(float* y, bool dynamic) {  // thread 7 forgets its element
  __shared__ float s[threads];
  SIMT_DYNAMIC_SHARED(float, d);
  float* from = dynamic ? d : s;
  if (threadIdx.x != 7) from[threadIdx.x] = 1;
  __syncthreads();
  y[threadIdx.x] = from[threadIdx.x];
}

// -------------------------------------------------------------------------------- products, and asynchronous copies
enum class Flaw {
  none,
  late_wait,               // one group too few has arrived
  no_barrier_after_wait,   // others read what has arrived for its thread alone
  no_barrier_before_copy,  // into a buffer that others still read
  swapped_rows,            // the upper and the lower half of a fragment
};
constexpr int steps = 4,
              row_stride = 12;  // numbers from one row of 8 to the next, so that no two rows have the same banks
// C = A B^T with A and B of 16 x 32, which follow one another in x: C(i, j) in y[16 i + j]. A warp has 8 columns.
template <Flaw flaw>
__global__ void product(float* y, const float* x) {
  SIMT_DYNAMIC_SHARED(float, s);
  const int t = threadIdx.x, lane = simt::lane_id(), warp = t / simt::warp_size;
  const auto fetch = [&](int step) {  // each thread half a row of A or of B
    const int row = t / 2, at = t % 2 * 4;
    simt::copy_async<4>(s + (step % 2 * 32 + row) * row_stride + at, x + row * 8 * steps + step * 8 + at);
  };
  float sums[4] = {};
  for (int step = 0; step < 2; step++) {
    fetch(step);
    simt::copy_async_commit();
  }
  for (int step = 0; step < steps; step++) {
    simt::copy_async_wait<flaw == Flaw::late_wait ? 2 : 1>();
    if (flaw != Flaw::no_barrier_after_wait) __syncthreads();
    const float *a_rows = s + step % 2 * 32 * row_stride, *b_rows = a_rows + (16 + 8 * warp) * row_stride;
    float a[4], b[4];
    simt::load_matrix(a,
                      a_rows + (flaw == Flaw::swapped_rows ? (lane % 16) ^ 8 : lane % 16) * row_stride + lane / 16 * 4);
    simt::load_matrix(b, b_rows + lane % 8 * row_stride + lane / 8 % 2 * 4);
    simt::mma_tf32(sums, a, {b[0], b[1]});
    if (flaw != Flaw::no_barrier_before_copy) __syncthreads();
    if (step + 2 < steps) fetch(step + 2);
    simt::copy_async_commit();
  }
  simt::copy_async_wait<0>();
  for (int i = 0; i < 4; i++) y[(lane / 4 + i / 2 * 8) * 16 + 8 * warp + lane % 4 * 2 + i % 2] = sums[i];
}
__global__ void fill_numbers(float* x, int n) {
  const int i = simt::thread_item();
  if (i >= n) return;
  x[i] = i * 7 % 13 - 6;
}
__global__ void unfinished(float* y, const float* x) {
  SIMT_DYNAMIC_SHARED(float, s);
  simt::copy_async<1>(s + threadIdx.x, x + threadIdx.x);
  simt::copy_async_commit();
  y[threadIdx.x] = 1;
}
__global__ void misaligned(float* y, const float* x) {
  SIMT_DYNAMIC_SHARED(float, s);
  simt::copy_async<2>(s + 2 * threadIdx.x, x + 2 * threadIdx.x + 1);
  simt::copy_async_commit();
  simt::copy_async_wait<0>();
  y[threadIdx.x] = s[2 * threadIdx.x];
}
__global__ void multiply(float* y) {
  float c[4] = {};
  simt::mma_tf32(c, {1, 1, 1, 1}, {1, 1});
  y[threadIdx.x] = c[0];
}

// ------------------------------------------------------------------------------------- only where there are two
// memories
#if defined(BATON_CUDA)
// Says that x is not written while y aliases it: nvcc reads x through the read-only path.
__global__ void shift_restricted(float* __restrict__ y, const float* __restrict__ x, int n) {
  const int i = simt::thread_item();
  if (i >= n) return;
  const float next = x[(i + 1) % n];
  y[i] = next;
}
__global__ void write_then_read(float* y, const float* __restrict__ x, int n) {
  const int i = simt::thread_item();
  if (i >= n) return;
  y[i] = 1;
  __syncwarp();
  y[i] = 1 + __ldg(x + i);
}
__global__ void __launch_bounds__(64) bounded(float* y) { y[threadIdx.x] = 1; }
__global__ void add_to_all(float* y, float by) { y[threadIdx.x] += by; }
__global__ void break_point(float* y) {
  asm volatile("brkpt;");
  y[threadIdx.x] = 1;
}
__global__ void exchange_without_barrier(float* y) {  // between the lanes of one warp
  __shared__ volatile float s[32];
  s[threadIdx.x] = threadIdx.x;
  y[threadIdx.x] = s[(threadIdx.x + 1) % 32];
}
#endif

// -------------------------------------------------------------------------------------------------------- programs
// Numbers in memory that kernels see, one allocation each.
class Numbers {
 public:
#if defined(BATON_CUDA)
  Numbers(size_t count, float value) {
    const std::vector<float> values(count, value);
    simt::check(cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(float)), "cudaMalloc");
    simt::check(cudaMemcpyAsync(data_, values.data(), count * sizeof(float), cudaMemcpyHostToDevice, nullptr), "copy");
    simt::check(cudaStreamSynchronize(nullptr), "synchronise");
  }
  float* data() { return data_; }
  float operator[](size_t i) const {
    float value;
    simt::check(cudaMemcpyAsync(&value, data_ + i, sizeof value, cudaMemcpyDeviceToHost, nullptr), "copy");
    simt::check(cudaStreamSynchronize(nullptr), "synchronise");
    return value;
  }

 private:
  float* data_ = nullptr;
#else
  Numbers(size_t count, float value) : values_(count, value) {}
  float* data() { return values_.data(); }
  float operator[](size_t i) const { return values_[i]; }

 private:
  std::vector<float> values_;
#endif
};
const int n = 10000;
Numbers x(n, 0.25f), y(1024, 0.f), z(1024, 0.f);

bool ones(int count) {
  for (int i = 0; i < count; i++)
    if (y[i] != 1) return false;
  return true;
}
template <bool first, bool second>
bool sums_right() {
  simt::launch<two_sums<first, second>>(simt::blocks(3, threads), {}, y.data(), x.data(), n);
  return y[0] == n * 0.25f && y[1] == n * 0.5f;
}
bool shift_right(bool barrier) {
  simt::launch<shift>(simt::blocks(2, threads), {}, y.data(), barrier);
  for (int t = 0; t < threads; t++)
    if (y[t] != (t + 1) % threads) return false;
  return true;
}
bool count_right(bool atomic) {
  simt::launch<count>(simt::blocks(2, 64), {}, y.data(), atomic);
  return y[0] == 128;
}
template <auto kernel>
bool shared_right(size_t bytes, int over) {
  simt::launch<kernel>(simt::blocks(2, threads, bytes), {}, y.data(), over);
  return ones(threads);
}
bool unset_right(bool dynamic) {  // a launch that set the shared memory comes first
  simt::launch<shift>(simt::blocks(1, threads), {}, y.data(), true);
  simt::launch<unset>(simt::blocks(1, threads, threads * sizeof(float)), {}, y.data(), dynamic);
  return ones(threads);
}
template <Flaw flaw>
bool product_right() {
  simt::launch<fill_numbers>(simt::each(1024), {}, z.data(), 1024);
  simt::launch<product<flaw>>(simt::blocks(1, 64, 2 * 32 * row_stride * sizeof(float)), {}, y.data(),
                              (const float*)z.data());
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) {
      float sum = 0;
      for (int k = 0; k < 8 * steps; k++)
        sum += float(((8 * steps * i + k) * 7 % 13 - 6) * ((8 * steps * (16 + j) + k) * 7 % 13 - 6));
      if (y[size_t(16 * i + j)] != sum) return false;
    }
  return true;
}

#if defined(BATON_CUDA)
// Captures `body` once and replays it three times.
void replay_additions(const std::function<void(cudaStream_t)>& body) {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  simt::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "create");
  simt::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin");
  body(stream);
  simt::check(cudaStreamEndCapture(stream, &graph), "end");
  simt::check(cudaGraphInstantiate(&executable, graph, 0), "instantiate");
  for (int step = 0; step < 3; step++) simt::check(cudaGraphLaunch(executable, stream), "launch");
  simt::check(cudaStreamSynchronize(stream), "synchronise");
}
// Whether `body` can be called while a stream is being captured.
bool in_capture(const std::function<void(cudaStream_t)>& body) {
  cudaStream_t stream;
  simt::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "create");
  simt::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "begin");
  body(stream);
  return true;
}
#endif

const std::map<std::string, std::function<bool()>> programs {
  {"good_block_sum", sums_right<true, true>}, {"good_shift", [] { return shift_right(true); }},
      {"good_atomic", [] { return count_right(true); }},
      {"good_dynamic_shared", [] { return shared_right<dynamic_shared>(threads * sizeof(float), 0); }},
      {"good_static_shared", [] { return shared_right<static_shared_by_pointer>(0, 0); }},
      {"good_partial_block",
       [] {
         simt::launch<fill>(simt::each(1000), {}, y.data(), 1000);
         return ones(1000) && y[1000] == 0;
       }},
      {"good_after_an_error",
       [] {
         try {
           simt::launch<early_return>(simt::blocks(1, threads), {}, y.data(), 200);
         } catch (const RunError&) {
           return sums_right<true, true>();
         }
         return false;
       }},

      {"no_barrier_before_read", sums_right<false, true>}, {"no_barrier_before_write", sums_right<true, false>},
      {"no_barrier_in_exchange", [] { return shift_right(false); }},
      {"early_return",
       [] {
         simt::launch<early_return>(simt::blocks(1, threads), {}, y.data(), 200);
         return true;
       }},
      {"two_barriers",
       [] {
         simt::launch<two_barriers>(simt::blocks(1, 64), {}, y.data());
         return true;
       }},
      {"shuffle_in_branch",
       [] {
         simt::launch<shuffle_in_branch>(simt::blocks(1, 64), {}, y.data());
         return true;
       }},
      {"shuffle_from_outside",
       [] {
         simt::launch<shuffle_from_outside>(simt::blocks(1, 32), {}, y.data());
         return true;
       }},

      {"race_on_a_count", [] { return count_right(false); }},
      {"race_in_global",
       [] {
         simt::launch<neighbour_in_global>(simt::blocks(1, threads), {}, y.data(), z.data());
         return true;
       }},

      {"static_shared_overrun", [] { return shared_right<static_shared>(0, 1); }},
      {"static_shared_overrun_by_pointer", [] { return shared_right<static_shared_by_pointer>(0, 1); }},
      {"dynamic_shared_overrun", [] { return shared_right<dynamic_shared>(threads * sizeof(float), 1); }},
      {"global_overrun",
       [] {
         simt::launch<fill>(simt::each(1025), {}, y.data(), 1025);
         return ones(1024);
       }},
      {"local_array_overrun",
       [] {
         simt::launch<local_array>(simt::blocks(1, 64), {}, y.data(), 1);
         return true;
       }},
      {"misaligned_float4",
       [] {
         simt::launch<store4>(simt::blocks(1, 64), {}, reinterpret_cast<float4*>(y.data() + 1));
         return true;
       }},
      {"unset_static_shared", [] { return unset_right(false); }},
      {"unset_dynamic_shared", [] { return unset_right(true); }}, {"good_product", product_right<Flaw::none>},
      {"late_wait", product_right<Flaw::late_wait>},
      {"no_barrier_after_wait", product_right<Flaw::no_barrier_after_wait>},
      {"no_barrier_before_copy", product_right<Flaw::no_barrier_before_copy>},
      {"swapped_fragment_rows", product_right<Flaw::swapped_rows>},
      {"unfinished_copy",
       [] {
         simt::launch<unfinished>(simt::blocks(1, 64, 64 * sizeof(float)), {}, y.data(), (const float*)x.data());
         return ones(64);
       }},
      {"misaligned_copy",
       [] {
         simt::launch<misaligned>(simt::blocks(1, 64, 128 * sizeof(float)), {}, y.data(), (const float*)x.data());
         return true;
       }},
      {"product_of_half_a_warp",
       [] {
         simt::launch<multiply>(simt::blocks(1, 48), {}, y.data());
         return true;
       }},
      {"too_many_threads",
       [] {
         simt::launch<shift>(simt::blocks(1, 2048), {}, y.data(), true);
         return true;
       }},
      {"too_much_shared",
       [] {
         simt::launch<unset>(simt::blocks(1, threads, 300 * 1024), {}, y.data(), true);
         return true;
       }},
#if defined(BATON_CUDA)
      {"good_restrict",
       [] {
         simt::launch<shift_restricted>(simt::each(1024), {}, y.data(), (const float*)z.data(), 1024);
         return y[0] == 0;
       }},
      {"good_replay",
       [] {
         replay_additions(
             [](cudaStream_t stream) { simt::launch<add_to_all>(simt::blocks(1, 64), stream, y.data(), 1.f); });
         return y[0] == 3;
       }},
      {"frozen_argument",  // the graph keeps the argument that it was captured with
       [] {
         float by = 0;
         replay_additions([&](cudaStream_t stream) {
           by += 1;
           simt::launch<add_to_all>(simt::blocks(1, 64), stream, y.data(), by);
         });
         return y[0] == 1 + 2 + 3;
       }},
      {"host_memory_in_a_kernel",
       [] {
         std::vector<float> host(1024);
         simt::launch<fill>(simt::each(1024), {}, host.data(), 1024);
         return true;
       }},
      {"device_memory_on_the_host", [] { return y.data()[0] == 0; }},
      {"use_after_free",
       [] {
         void* p = nullptr;
         simt::check(cudaMalloc(&p, 4096), "cudaMalloc");
         simt::check(cudaFree(p), "cudaFree");
         simt::launch<fill>(simt::each(1024), {}, static_cast<float*>(p), 1024);
         return true;
       }},
      {"unset_global",
       [] {
         void* p = nullptr;
         simt::check(cudaMalloc(&p, 4096), "cudaMalloc");
         simt::launch<shift_restricted>(simt::each(1024), {}, y.data(), (const float*)p, 1024);
         return true;
       }},
      {"copy_of_unset_global",
       [] {
         void* p = nullptr;
         float value;
         simt::check(cudaMalloc(&p, 4096), "cudaMalloc");
         simt::check(cudaMemcpyAsync(&value, p, sizeof value, cudaMemcpyDeviceToHost, nullptr), "copy");
         return true;
       }},
      {"restrict_broken_by_a_store",
       [] {
         simt::launch<shift_restricted>(simt::each(1024), {}, y.data(), (const float*)y.data(), 1024);
         return true;
       }},
      {"restrict_broken_by_a_load",
       [] {
         simt::launch<write_then_read>(simt::each(64), {}, y.data(), (const float*)y.data(), 64);
         return true;
       }},
      {"no_barrier_in_a_warp",
       [] {
         simt::launch<exchange_without_barrier>(simt::blocks(1, 32), {}, y.data());
         for (int t = 0; t < 32; t++)
           if (y[t] != (t + 1) % 32) return false;
         return true;
       }},
      {"unknown_instruction",
       [] {
         simt::launch<break_point>(simt::blocks(1, 32), {}, y.data());
         return true;
       }},
      {"beyond_launch_bounds",
       [] {
         simt::launch<bounded>(simt::blocks(1, 128), {}, y.data());
         return true;
       }},
      {"dynamic_shared_not_asked_for",
       [] {
         cudaLaunchConfig_t c{};
         c.gridDim = dim3(1);
         c.blockDim = dim3(threads);
         c.dynamicSmemBytes = 60000;
         simt::check(cudaLaunchKernelEx(&c, dynamic_shared, y.data(), 0), "launch");
         return true;
       }},
      {"too_many_rows",
       [] {
         simt::launch<fill>(simt::each(16, 70000), {}, y.data(), 16);
         return true;
       }},
      {"allocation_in_a_capture",
       [] {
         return in_capture([](cudaStream_t) {
           void* p = nullptr;
           simt::check(cudaMalloc(&p, 16), "cudaMalloc");
         });
       }},
      {"synchronisation_in_a_capture",
       [] {
         return in_capture(
             [](cudaStream_t stream) { simt::check(cudaStreamSynchronize(stream), "cudaStreamSynchronize"); });
       }},
      {"host_copy_in_a_capture",
       [] {
         return in_capture([](cudaStream_t stream) {
           static float value;
           simt::check(cudaMemcpyAsync(&value, y.data(), sizeof value, cudaMemcpyDeviceToHost, stream), "copy");
         });
       }},
      {"copy_in_the_wrong_direction",
       [] {
         float value = 0;
         simt::check(cudaMemcpyAsync(&value, y.data(), sizeof value, cudaMemcpyHostToDevice, nullptr), "copy");
         return true;
       }},
      {"stream_after_its_end",
       [] {
         cudaStream_t stream;
         simt::check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "create");
         simt::check(cudaStreamDestroy(stream), "destroy");
         simt::launch<fill>(simt::each(16), stream, y.data(), 16);
         return true;
       }},
      {"error_that_stays",  // after a kernel's fault nothing works any more
       [] {
         try {
           simt::launch<fill>(simt::each(1025), {}, y.data(), 1025);
         } catch (const RunError&) {
         }
         simt::launch<fill>(simt::each(16), {}, y.data(), 16);
         return true;
       }},
#endif
};

}  // namespace
}  // namespace baton

int main(int argc, char** argv) {
  const std::string name = argc == 2 ? argv[1] : "";
  if (name == "--list") {
    for (const auto& [each, run] : baton::programs) printf("%s\n", each.c_str());
    return 0;
  }
  const auto program = baton::programs.find(name);
  if (program == baton::programs.end()) {
    fprintf(stderr, "usage: faults NAME | --list\n");
    return 64;
  }
  try {
    const bool right = program->second();
    printf("%s\n", right ? "RIGHT" : "WRONG");
    return right ? 0 : 2;
  } catch (const std::exception& e) {
    printf("ERROR: %s\n", e.what());
    return 3;
  }
}
