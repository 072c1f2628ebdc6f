// The CUDA runtime's functions that Baton calls (libcudart.so.13), over the interpreter.
//
// What a real runtime refuses, this one refuses: launches beyond the chip's limits or beyond what was asked for, copies
// in the wrong direction, allocating and synchronising while a stream is captured, handles that do not exist. After a
// fault of a kernel every later call fails, as on a GPU. The chip is an H100 or H200 in its limits (compute
// capability 9.0).
#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <map>
#include <memory>
#include <set>

#include "tests/ptx/device_memory.h"
#include "tests/ptx/fat_binary.h"
#include "tests/ptx/options.h"
#include "tests/ptx/profile.h"
#include "tests/ptx/stream.h"

namespace ptx {

namespace {

constexpr uint32_t max_threads = 1024, max_rows = 65535, multiprocessors = 132;
constexpr size_t default_shared = 48 * 1024, max_shared = 227 * 1024;  // bytes a block

// A registered fat binary; its PTX is parsed when a kernel of it is used first.
struct Binary {
  const void* wrapper = nullptr;
  std::unique_ptr<Module> module;
};
struct Function {
  Binary* binary = nullptr;
  std::string symbol;
  size_t dynamic_limit = default_shared;  // cudaFuncAttributeMaxDynamicSharedMemorySize
};

struct Runtime {
  std::map<const void*, Function> functions;  // by the address of the function that stands for it on the host
  std::set<const void*> events, graphs, executables;
  std::map<const void*, std::chrono::steady_clock::time_point> event_times;
  uint32_t launches = 0;
  struct {
    dim3 grid, block;
    size_t shared = 0;
    cudaStream_t stream = nullptr;
  } configuration;  // of a <<<>>> that is being called
};
Runtime& runtime() {
  static Runtime* r = new Runtime;
  return *r;
}

[[noreturn]] void refuse(const std::string& what) { throw Fault(FaultKind::configuration, what); }

// The body of a call that returns an error. A fault that stays comes first.
template <class Body>
cudaError_t call(const char* name, Body body) {
  return guarded(name, cudaSuccess, cudaErrorUnknown, body) == cudaSuccess ? cudaSuccess : peek_last_error();
}

void forbid_in_capture(const char* what) {
  if (!any_capture()) return;
  throw Fault(FaultKind::configuration, std::string(what) + " while a stream is being captured");
}

const Kernel& kernel_of(Function& f) {
  if (!f.binary->module) f.binary->module = parse_module(find_ptx(f.binary->wrapper));
  const auto found = f.binary->module->kernels.find(f.symbol);
  if (found == f.binary->module->kernels.end())
    throw Fault(FaultKind::unsupported, "the program's PTX has no kernel " + f.symbol);
  if (!found->second->unknown.empty())
    throw Fault(FaultKind::unsupported, found->second->unknown + ", in kernel " + found->second->name);
  return *found->second;
}

Function& function_of(const void* host_function) {
  const auto found = runtime().functions.find(host_function);
  if (found == runtime().functions.end()) refuse("a function that is no registered kernel");
  return found->second;
}

std::string extent_text(const dim3& d) {
  return std::to_string(d.x) + " x " + std::to_string(d.y) + " x " + std::to_string(d.z);
}

void check_launch(const Kernel& k, const Function& f, const dim3& grid, const dim3& block, size_t dynamic) {
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const std::string which = " (kernel " + k.name + ")";
  if (threads == 0 || grid.x == 0 || grid.y == 0 || grid.z == 0)
    refuse("an empty launch: grid " + extent_text(grid) + ", block " + extent_text(block) + which);
  if (threads > max_threads || block.z > 64)
    refuse(std::to_string(threads) + " threads in a block, at most " + std::to_string(max_threads) + which);
  if (k.max_threads && threads > k.max_threads)
    refuse(std::to_string(threads) + " threads in a block, but the kernel's launch bounds are " +
           std::to_string(k.max_threads) + which);
  if (grid.x > 0x7fffffffu || grid.y > max_rows || grid.z > max_rows)
    refuse("a grid of " + extent_text(grid) + " blocks, at most 2147483647 x 65535 x 65535" + which);
  if (k.shared_used > default_shared)
    refuse(std::to_string(k.shared_used) + " bytes of static shared memory, at most " + std::to_string(default_shared) +
           which);
  if (dynamic > f.dynamic_limit)
    refuse(std::to_string(dynamic) + " bytes of dynamic shared memory, asked for were " +
           std::to_string(f.dynamic_limit) + which);
  if (k.shared_used + dynamic > max_shared)
    refuse(std::to_string(k.shared_used + dynamic) + " bytes of shared memory, a block has " +
           std::to_string(max_shared) + which);
}

cudaError_t launch(const void* host_function, dim3 grid, dim3 block, void** arguments, size_t dynamic,
                   cudaStream_t stream) {
  Operation operation;
  const cudaError_t prepared = call("a kernel's launch", [&] {
    Function& f = function_of(host_function);
    const Kernel& k = kernel_of(f);
    check_launch(k, f, grid, block, dynamic);
    check_stream(stream);
    auto l = std::make_shared<Launch>();
    l->module = f.binary->module.get();
    l->kernel = &k;
    l->grid = {grid.x, grid.y, grid.z};
    l->block = {block.x, block.y, block.z};
    l->dynamic_bytes = uint32_t(dynamic);
    l->parameters.resize(k.parameter_bytes);
    for (size_t p = 0; p < k.parameters.size(); p++)
      std::memcpy(l->parameters.data() + k.parameters[p].offset, arguments[p], k.parameters[p].bytes);
    operation.name = k.symbol;
    operation.is_kernel = true;
    operation.run = [l] {
      l->number = ++runtime().launches;
      Random random{options().seed * 0x9E3779B97F4A7C15 + l->number};
      l->random = options().seed ? &random : nullptr;
      begin_kernel(*l);
      run(*l);
      finish_kernel(*l);
    };
  });
  return prepared == cudaSuccess ? submit(stream, std::move(operation)) : prepared;
}

struct Graph {
  std::vector<Operation> operations;
};
Graph* graph_of(const void* handle) {
  if (!runtime().graphs.contains(handle)) refuse("a graph that does not exist, or no longer");
  return static_cast<Graph*>(const_cast<void*>(handle));
}
Graph* executable_of(const void* handle) {
  if (!runtime().executables.contains(handle)) refuse("an executable graph that does not exist, or no longer");
  return static_cast<Graph*>(const_cast<void*>(handle));
}
void check_event(cudaEvent_t event) {
  if (!runtime().events.contains(event)) refuse("an event that does not exist, or no longer");
}

void copy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  DeviceMemory& memory = DeviceMemory::instance();
  const uint64_t to_address = reinterpret_cast<uint64_t>(to), from_address = reinterpret_cast<uint64_t>(from);
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (from_device) memory.check_written(from_address, bytes, "a copy's source");
  void* target = to_device ? memory.storage(to_address, bytes, "a copy's target") : to;
  const void* source = from_device ? memory.storage(from_address, bytes, "a copy's source") : from;
  std::memmove(target, source, bytes);
  if (to_device) memory.mark_written(to_address, bytes);
}

}  // namespace
}  // namespace ptx

using namespace ptx;

extern "C" {

// ---------------------------------------------------------------------------- what nvcc's host code calls
void** __cudaRegisterFatBinary(void* wrapper) { return reinterpret_cast<void**>(new Binary{wrapper, nullptr}); }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void** binary, const char* host_function, char*, const char* symbol, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  runtime().functions[host_function] = {reinterpret_cast<Binary*>(binary), symbol, default_shared};
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  runtime().configuration = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = runtime().configuration.grid;
  *block = runtime().configuration.block;
  *shared = runtime().configuration.shared;
  *static_cast<cudaStream_t*>(stream) = runtime().configuration.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host_function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host_function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return launch(kernel, grid, block, arguments, shared, stream);
}

// ------------------------------------------------------------------------------------------- kernels
cudaError_t cudaLaunchKernel(const void* host_function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  return launch(host_function, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* host_function, void** arguments) {
  if (c->numAttrs != 0)
    return report("cudaLaunchKernelExC", Fault(FaultKind::unsupported, "launch attributes are not known here"));
  return launch(host_function, c->gridDim, c->blockDim, arguments, c->dynamicSmemBytes, c->stream);
}
cudaError_t cudaFuncSetAttribute(const void* host_function, cudaFuncAttribute attribute, int value) {
  return call("cudaFuncSetAttribute", [&] {
    Function& f = function_of(host_function);
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return;  // preferences change no result
    const size_t used = kernel_of(f).shared_used;
    if (value < 0 || size_t(value) + used > max_shared)
      refuse(std::to_string(value) + " bytes of dynamic shared memory beside " + std::to_string(used) +
             " static ones, a block has " + std::to_string(max_shared));
    f.dynamic_limit = std::max(size_t(value), default_shared);
  });
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void* host_function) {
  return call("cudaFuncGetAttributes", [&] {
    Function& f = function_of(host_function);
    const Kernel& k = kernel_of(f);
    *a = {};
    a->ptxVersion = a->binaryVersion = 90;
    a->sharedSizeBytes = k.shared_used;
    a->maxThreadsPerBlock = int(k.max_threads ? k.max_threads : max_threads);
    a->maxDynamicSharedSizeBytes = int(f.dynamic_limit);
    a->numRegs = 32;  // ptxas alone knows
  });
}
// By threads and shared memory; registers, which only ptxas knows, are left out.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* host_function, int threads,
                                                                   size_t dynamic, unsigned) {
  return call("cudaOccupancyMaxActiveBlocksPerMultiprocessor", [&] {
    const size_t shared = kernel_of(function_of(host_function)).shared_used + dynamic + 1024;
    if (threads < 1 || threads > int(max_threads)) refuse(std::to_string(threads) + " threads in a block");
    *blocks = int(std::min<size_t>({2048 / size_t((threads + 31) / 32 * 32), size_t(228 * 1024) / shared, 32}));
  });
}

// -------------------------------------------------------------------------------------------- memory
cudaError_t cudaMalloc(void** p, size_t bytes) {
  bool out_of_memory = false;
  const cudaError_t error = call("cudaMalloc", [&] {
    forbid_in_capture("cudaMalloc");
    const uint64_t address = bytes ? DeviceMemory::instance().allocate(bytes) : 0;
    out_of_memory = bytes && address == 0;
    *p = reinterpret_cast<void*>(address);
  });
  if (error == cudaSuccess && out_of_memory) {
    set_last_error(cudaErrorMemoryAllocation);
    return cudaErrorMemoryAllocation;
  }
  return error;
}
cudaError_t cudaFree(void* p) {
  return call("cudaFree", [&] {
    if (!p) return;
    forbid_in_capture("cudaFree");
    if (!DeviceMemory::instance().release(reinterpret_cast<uint64_t>(p)))
      refuse("an address at which no allocation starts, or which was freed before");
  });
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  return call("cudaMemGetInfo", [&] {
    *total = DeviceMemory::capacity;
    *free = *total - DeviceMemory::instance().bytes_in_use();
  });
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  const cudaError_t checked = call("cudaMemcpyAsync", [&] {
    const DeviceMemory& memory = DeviceMemory::instance();
    const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    if (memory.contains(to) != to_device || memory.contains(from) != from_device)
      refuse(std::string("a copy in the wrong direction: the target is the ") +
             (memory.contains(to) ? "device's" : "host's") + ", the source the " +
             (memory.contains(from) ? "device's" : "host's"));
    if (is_capturing(stream) && kind != cudaMemcpyDeviceToDevice)
      refuse("a copy from or to the host's memory while the stream is being captured");
  });
  if (checked != cudaSuccess) return checked;
  return submit(stream, {"cudaMemcpy of " + std::to_string(bytes) + " bytes",
                         [=] { copy(to, from, bytes, kind); },
                         {0, 2.0 * double(bytes)}});
}
cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t stream) {
  return submit(
      stream, {"cudaMemset of " + std::to_string(bytes) + " bytes",
               [=] { DeviceMemory::instance().fill(reinterpret_cast<uint64_t>(p), value, bytes, "a memset's target"); },
               {0, double(bytes)}});
}

// ------------------------------------------------------------------------------------ streams, graphs
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return call("cudaStreamCreateWithFlags", [&] { *stream = create_stream(); });
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  return call("cudaStreamDestroy", [&] { destroy_stream(stream); });
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return call("cudaStreamSynchronize", [&] {
    check_stream(stream);
    forbid_in_capture("cudaStreamSynchronize");
  });
}
cudaError_t cudaDeviceSynchronize() {
  return call("cudaDeviceSynchronize", [&] { forbid_in_capture("cudaDeviceSynchronize"); });
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  return call("cudaStreamBeginCapture", [&] { begin_capture(stream); });
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  *graph = nullptr;
  return call("cudaStreamEndCapture", [&] {
    auto* made = new Graph{end_capture(stream)};
    runtime().graphs.insert(made);
    *graph = reinterpret_cast<cudaGraph_t>(made);
  });
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  return call("cudaGraphGetNodes", [&] {
    if (nodes) throw Fault(FaultKind::unsupported, "only the number of nodes can be asked for");
    *count = graph_of(graph)->operations.size();
  });
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  return call("cudaGraphInstantiate", [&] {
    auto* made = new Graph(*graph_of(graph));
    runtime().executables.insert(made);
    *executable = reinterpret_cast<cudaGraphExec_t>(made);
  });
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  return call("cudaGraphDestroy", [&] {
    Graph* g = graph_of(graph);
    runtime().graphs.erase(graph);
    delete g;
  });
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  return call("cudaGraphExecDestroy", [&] {
    Graph* g = executable_of(executable);
    runtime().executables.erase(executable);
    delete g;
  });
}
cudaError_t cudaGraphUpload(cudaGraphExec_t executable, cudaStream_t stream) {
  return call("cudaGraphUpload", [&] {
    executable_of(executable);
    check_stream(stream);
  });
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  const Graph* graph = nullptr;
  const cudaError_t found = call("cudaGraphLaunch", [&] { graph = executable_of(executable); });
  return found == cudaSuccess ? replay(graph->operations, stream) : found;
}

// --------------------------------------------------------------------------------------------- events
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return call("cudaEventCreate", [&] {
    *event = reinterpret_cast<cudaEvent_t>(new char);
    runtime().events.insert(*event);
  });
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  return call("cudaEventDestroy", [&] {
    check_event(event);
    runtime().events.erase(event);
    runtime().event_times.erase(event);
    delete reinterpret_cast<char*>(event);
  });
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return call("cudaEventRecord", [&] {
    check_event(event);
    if (is_capturing(stream)) throw Fault(FaultKind::unsupported, "events in a capture are not known here");
    runtime().event_times[event] = std::chrono::steady_clock::now();
  });
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return call("cudaEventSynchronize", [&] {
    check_event(event);
    forbid_in_capture("cudaEventSynchronize");
  });
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  return call("cudaEventElapsedTime", [&] {
    const auto& times = runtime().event_times;
    const auto a = times.find(from), b = times.find(to);
    if (a == times.end() || b == times.end()) refuse("an event that was not recorded");
    *milliseconds = std::chrono::duration<float, std::milli>(b->second - a->second).count();
  });
}

// ------------------------------------------------------------------------------- the device, and errors
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  *p = {};
  std::snprintf(p->name, sizeof p->name, "PTX interpreter on a CPU");
  p->major = 9;
  p->multiProcessorCount = multiprocessors;
  p->totalGlobalMem = DeviceMemory::capacity;
  p->warpSize = lanes;
  p->maxThreadsPerBlock = max_threads;
  p->sharedMemPerBlock = default_shared;
  p->sharedMemPerBlockOptin = max_shared;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxGridDimX:
      *value = 0x7fffffff;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = max_threads;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = int(default_shared);
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(max_shared);
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = lanes;
      return cudaSuccess;
    default:
      return report("cudaDeviceGetAttribute", Fault(FaultKind::unsupported, "attribute " + std::to_string(attribute)));
  }
}
cudaError_t cudaGetLastError() { return take_last_error(); }
cudaError_t cudaPeekAtLastError() { return peek_last_error(); }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
    case cudaErrorMisalignedAddress:
      return "misaligned address";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorNotSupported:
      return "operation not supported";
    default:
      return "an error of the CUDA runtime";
  }
}

}  // extern "C"
