// Streams, captured graphs and events of the stand-in CUDA runtime.
//
// In order (BATON_PTX_SEED unset or 0) an operation runs when it is put on a stream, so that its error comes out of the
// call that caused it. Under a seed it waits until somebody synchronises, as a GPU may: a host that does not wait for
// its results then reads old ones.
#pragma once
#include <cuda_runtime_api.h>

#include <functional>
#include <string>
#include <vector>

#include "tests/ptx/fault.h"

namespace ptx {

// What a library's call costs, for tools/gpu-cost. Zero for a copy or a memset but for its bytes.
struct Work {
  double flops = 0, bytes = 0;
};

// One thing that a stream does: a kernel, a copy, a memset, a library's product.
struct Operation {
  std::string name;           // a kernel's mangled name, or "cublasSgemm n=128 m=500 k=800"
  std::function<void()> run;  // throws Fault
  Work work;
  bool is_kernel = false;
};

// Puts an operation on a stream: runs it (now or at the next synchronisation), or records it where the stream is being
// captured. Returns what the CUDA call has to return; an error has been printed and is the process's last error.
cudaError_t submit(cudaStream_t, Operation);

// Whether the stream is being captured. Throws Fault for a stream that does not exist (any more).
bool is_capturing(cudaStream_t);

// Prints a fault ("ptx: cublasSgemm: ..."), makes it the process's error and returns CUDA's code for it.
cudaError_t report(const char* call, const Fault&);

// The error that stays after a faulty kernel, or cudaSuccess.
cudaError_t sticky_error();

// Runs the body of a library's function: `ok`, or `failed` after a fault, which has then been reported.
template <class Status, class Body>
Status guarded(const char* call, Status ok, Status failed, Body body) {
  try {
    if (sticky_error() != cudaSuccess) return failed;
    body();
    return ok;
  } catch (const Fault& fault) {
    report(call, fault);
    return failed;
  }
}

}  // namespace ptx
