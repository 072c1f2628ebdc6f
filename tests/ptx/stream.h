// Streams and captured graphs of the stand-in CUDA runtime.
//
// An operation runs when it is put on a stream, so that its error comes out of the call that caused it. While a stream
// is being captured, operations are recorded with their arguments instead, and run when the graph is launched.
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

// Puts an operation on a stream: runs it, or records it where the stream is being captured. Returns what the CUDA call
// has to return; an error has been printed and is the process's last error.
cudaError_t submit(cudaStream_t, Operation);

// Whether the stream is being captured. Throws Fault for a stream that does not exist (any more).
bool is_capturing(cudaStream_t);
bool any_capture();  // whether some stream is: allocating and synchronising are forbidden then

// Streams and captures for the runtime. They throw Fault for handles that do not exist.
cudaStream_t create_stream();
void destroy_stream(cudaStream_t);
void check_stream(cudaStream_t);
void begin_capture(cudaStream_t);
std::vector<Operation> end_capture(cudaStream_t);
// Runs the recorded operations one after the other. Returns as submit() does.
cudaError_t replay(const std::vector<Operation>&, cudaStream_t);

// Prints a fault ("ptx: cublasSgemm: ..."), makes it the process's error and returns CUDA's code for it.
cudaError_t report(const char* call, const Fault&);

// The error that stays after a faulty kernel, or cudaSuccess.
cudaError_t sticky_error();
cudaError_t take_last_error();  // as cudaGetLastError: also forgets an error that does not stay
cudaError_t peek_last_error();
void set_last_error(cudaError_t);

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
