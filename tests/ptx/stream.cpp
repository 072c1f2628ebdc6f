#include "tests/ptx/stream.h"

#include <cstdio>
#include <map>
#include <memory>

#include "tests/ptx/profile.h"

namespace ptx {

namespace {

struct Stream {
  bool capturing = false;
  std::vector<Operation> recorded;
};

struct State {
  std::map<cudaStream_t, Stream> streams;
  cudaError_t last = cudaSuccess, sticky = cudaSuccess;
  uintptr_t next_handle = 0x1000;
};
State& state() {
  static State* s = new State;  // never destroyed: programs make calls at their very end
  return *s;
}

bool is_built_in(cudaStream_t stream) {
  return stream == nullptr || stream == cudaStreamLegacy || stream == cudaStreamPerThread;
}

Stream& find(cudaStream_t stream) {
  if (is_built_in(stream)) return state().streams[stream];
  const auto found = state().streams.find(stream);
  if (found == state().streams.end())
    throw Fault(FaultKind::configuration, "a stream that does not exist, or no longer");
  return found->second;
}

cudaError_t code_of(FaultKind kind) {
  switch (kind) {
    case FaultKind::access:
      return cudaErrorIllegalAddress;
    case FaultKind::alignment:
      return cudaErrorMisalignedAddress;
    case FaultKind::launch:
      return cudaErrorLaunchFailure;
    case FaultKind::configuration:
      return cudaErrorInvalidValue;
    case FaultKind::unsupported:
      return cudaErrorNotSupported;
  }
  return cudaErrorUnknown;
}

cudaError_t run(const Operation& operation) {
  try {
    operation.run();
    profile_operation(operation);
    return cudaSuccess;
  } catch (const Fault& fault) {
    return report(operation.is_kernel ? "a kernel" : operation.name.c_str(), fault);
  }
}

}  // namespace

cudaError_t report(const char* call, const Fault& fault) {
  std::fflush(stdout);
  std::fprintf(stderr, "ptx: %s: %s\n", call, fault.what());
  state().last = code_of(fault.kind);
  if (fault.kind != FaultKind::configuration && fault.kind != FaultKind::unsupported) state().sticky = state().last;
  return state().last;
}

cudaError_t sticky_error() { return state().sticky; }
cudaError_t peek_last_error() { return state().sticky != cudaSuccess ? state().sticky : state().last; }
cudaError_t take_last_error() {
  const cudaError_t error = peek_last_error();
  state().last = cudaSuccess;
  return error;
}
void set_last_error(cudaError_t error) { state().last = error; }

cudaError_t submit(cudaStream_t stream, Operation operation) {
  if (state().sticky != cudaSuccess) return state().sticky;
  try {
    Stream& s = find(stream);
    if (s.capturing) {
      s.recorded.push_back(std::move(operation));
      return cudaSuccess;
    }
  } catch (const Fault& fault) {
    return report(operation.name.c_str(), fault);
  }
  return run(operation);
}

cudaError_t replay(const std::vector<Operation>& operations, cudaStream_t stream) {
  if (state().sticky != cudaSuccess) return state().sticky;
  try {
    if (find(stream).capturing)
      throw Fault(FaultKind::configuration, "a graph is launched into a stream that is being captured");
  } catch (const Fault& fault) {
    return report("cudaGraphLaunch", fault);
  }
  profile_graph_begins(operations.size());
  for (const Operation& operation : operations)
    if (const cudaError_t error = run(operation); error != cudaSuccess) return error;
  profile_graph_ends();
  return cudaSuccess;
}

bool is_capturing(cudaStream_t stream) { return find(stream).capturing; }
bool any_capture() {
  for (const auto& [handle, stream] : state().streams)
    if (stream.capturing) return true;
  return false;
}

cudaStream_t create_stream() {
  const auto handle = reinterpret_cast<cudaStream_t>(state().next_handle += 0x10);
  state().streams[handle];
  return handle;
}
void check_stream(cudaStream_t stream) { find(stream); }
void destroy_stream(cudaStream_t stream) {
  if (is_built_in(stream)) throw Fault(FaultKind::configuration, "a built-in stream is destroyed");
  if (find(stream).capturing) throw Fault(FaultKind::configuration, "a stream is destroyed while it is captured");
  state().streams.erase(stream);
}

void begin_capture(cudaStream_t stream) {
  Stream& s = find(stream);
  if (is_built_in(stream)) throw Fault(FaultKind::configuration, "a built-in stream cannot be captured");
  if (s.capturing) throw Fault(FaultKind::configuration, "a capture begins in a stream that is being captured");
  s.capturing = true;
  s.recorded.clear();
}
std::vector<Operation> end_capture(cudaStream_t stream) {
  Stream& s = find(stream);
  if (!s.capturing) throw Fault(FaultKind::configuration, "a capture ends in a stream that is not being captured");
  s.capturing = false;
  return std::move(s.recorded);
}

}  // namespace ptx
