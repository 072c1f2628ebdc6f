// What the benchmarks of bench/micro share. A case is a launcher on one set of random buffers, with a model of the
// bytes and FLOPs of a call; main.cpp registers it with Google Benchmark, times it and reports it.
//
// Byte models count compulsory traffic: every array that a call needs read once and every result written once,
// whatever cache it comes from. FLOP models count + - * / sqrt exp log and comparisons as 1 each, an fma as 2, a normal
// as 60 (head note of kernels/local_reparam.cu). Both are stated beside each case and never measured.
#pragma once
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "engine/runtime.h"
#include "kernels/step_state.h"

struct Work {  // of one call
  double bytes, flops;
};
constexpr double flops_a_normal = 60;

// Takes a case's inputs (random, never zeros: a GEMM runs faster on zeros) and outputs from an arena.
class Buffers {
 public:
  explicit Buffers(baton::Device& device) : device(device), fill_(scratch_arena_.take<baton::StepState>(1)) {}

  float* normal(size_t n, float sd = 1);          // N(0, sd^2)
  float* positive(size_t n, float scale = 1e-2);  // scale times squares of normals: variances, second moments
  template <class T>
  T* integers(size_t n, int below) {  // uniform in [0, below)
    std::vector<T> v(n);
    for (T& x : v) x = T(random_() % unsigned(below));
    return put(v);
  }
  template <class T>
  T* room(size_t n) {  // for results
    return arena.take<T>(n);
  }
  template <class T>
  T* put(const std::vector<T>& v) {
    T* p = arena.take<T>(v.size());
    baton::upload(device, p, v);
    return p;
  }
  // States of a stage over `part_size` examples, of another step at every call. Step sizes are so small that a long run
  // of optimizer steps leaves its inputs random.
  baton::StepState* states(int replicas, int part_size = 60000);
  baton::Stream stream() const { return device.stream(); }

  baton::Device& device;
  baton::Arena arena;

 private:
  void fill_normal(float* x, size_t n, float sd);
  baton::Arena scratch_arena_;
  baton::StepState* fill_;
  float* scratch_ = nullptr;
  size_t scratch_size_ = 0;
  std::mt19937 random_{1};
  uint64_t fills_ = 0;
  int step_ = 0;
};

// Takes one set of buffers and returns the call on it.
using Make = std::function<std::function<void()>(Buffers&)>;

enum class Sets {
  warm,       // one set, used again and again: it stays in the cache where it fits
  warm_cold,  // that, and a second benchmark that rotates over at least cold_bytes of sets
  by_size,    // warm_cold where a call moves 2 MB or more, else warm
};
constexpr size_t cold_bytes = size_t(128) << 20;  // over twice an H200's L2 (60 MB)

// A launcher. On the GPU a graph of 128 calls or more is replayed between two events: Time is one call's share.
void add(const std::string& name, Work, Make, Sets = Sets::by_size);
// Work that brings its own graphs or waits for the host: one invocation of the call makes `units` of the work.
void add_direct(const std::string& name, Work, int units, Make);

// In baselines_bench.cpp, bgd_bench.cpp, families_bench.cpp, kernels_bench.cpp, last_layer_bench.cpp,
// reparam_bench.cpp, seam_bench.cpp, step_bench.cpp and tasks_bench.cpp.
void add_baseline_benchmarks();
void add_bgd_benchmarks();
void add_kernel_benchmarks();
void add_family_benchmarks();
void add_last_layer_benchmarks();
void add_product_benchmarks();
void add_reparam_benchmarks();
void add_seam_benchmarks();
void add_step_benchmarks();
void add_task_benchmarks();

inline std::string batch_name(int batch, int replicas = 1) {
  return "/batch:" + std::to_string(batch) + "/replicas:" + std::to_string(replicas);
}
