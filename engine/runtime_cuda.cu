// The runtime on the GPU: one stream, which does not wait for the legacy default stream; arenas of large chunks;
// captured graphs.
#include <nvtx3/nvToolsExt.h>

#include <algorithm>
#include <atomic>
#include <utility>

#include "engine/cuda_libraries.h"

namespace baton {

namespace {

constexpr size_t alignment = 256, smallest_chunk = size_t(64) << 20;
constexpr size_t blas_workspace = size_t(32) << 20;  // NVIDIA's advice for Hopper, and more than enough for others

std::atomic<size_t> current_bytes{0}, highest_bytes{0}, allocated_times{0};

void count_allocation(size_t more) {
  allocated_times++;
  const size_t total = current_bytes += more;
  for (size_t seen = highest_bytes; seen < total && !highest_bytes.compare_exchange_weak(seen, total);) {
  }
}

cudaEvent_t event_of(void* handle) { return static_cast<cudaEvent_t>(handle); }
cudaGraphExec_t executable_of(void* handle) { return static_cast<cudaGraphExec_t>(handle); }

}  // namespace

extern const bool on_gpu = true;

Range::Range(const char* name) { nvtxRangePushA(name); }
Range::~Range() { nvtxRangePop(); }

void check(cublasStatus_t status, const char* call) {
  if (status != CUBLAS_STATUS_SUCCESS) throw RunError(std::string(call) + ": " + cublasGetStatusString(status));
}

void check(cudnnStatus_t status, const char* call) {
  if (status == CUDNN_STATUS_SUCCESS) return;
  char detail[512] = "";
  cudnnGetLastErrorString(detail, sizeof detail);
  throw RunError(std::string(call) + ": " + cudnnGetErrorString(status) + (*detail ? std::string(", ") + detail : ""));
}

void check(cusolverStatus_t status, const char* call) {  // cuSOLVER has no function that names its codes
  if (status == CUSOLVER_STATUS_SUCCESS) return;
  const char* words = status == CUSOLVER_STATUS_NOT_INITIALIZED    ? " (not initialised)"
                      : status == CUSOLVER_STATUS_ALLOC_FAILED     ? " (out of memory)"
                      : status == CUSOLVER_STATUS_INVALID_VALUE    ? " (an argument is not valid)"
                      : status == CUSOLVER_STATUS_ARCH_MISMATCH    ? " (this GPU is not supported)"
                      : status == CUSOLVER_STATUS_EXECUTION_FAILED ? " (a kernel failed)"
                      : status == CUSOLVER_STATUS_INTERNAL_ERROR   ? " (an internal error)"
                                                                   : "";
  throw RunError(std::string(call) + ": cuSOLVER status " + std::to_string(int(status)) + words);
}

// --------------------------------------------------------------------------------------------------------- device
LibraryHandles::LibraryHandles(Stream stream) {
  try {
    BATON_CALL(cublasCreate, &blas);
    BATON_CALL(cublasSetStream, blas, stream);  // before the workspace, which it would reset
    BATON_CALL(cublasSetWorkspace, blas, workspace_.take<char>(blas_workspace), blas_workspace);
    BATON_CALL(cublasSetPointerMode, blas, CUBLAS_POINTER_MODE_HOST);
    BATON_CALL(cublasSetMathMode, blas, math);
    BATON_CALL(cublasSetAtomicsMode, blas, CUBLAS_ATOMICS_NOT_ALLOWED);
    BATON_CALL(cudnnCreate, &dnn);
    BATON_CALL(cudnnSetStream, dnn, stream);
  } catch (...) {
    if (dnn) cudnnDestroy(dnn);
    if (blas) cublasDestroy(blas);
    throw;
  }
}

LibraryHandles::~LibraryHandles() {
  cudnnDestroy(dnn);
  cublasDestroy(blas);
}

Device::Device() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess || count == 0)
    throw RunError(std::string("no usable NVIDIA GPU: ") +
                   (status != cudaSuccess ? cudaGetErrorString(status) : "the driver lists none"));
  BATON_CALL(cudaStreamCreateWithFlags, &stream_, cudaStreamNonBlocking);
  try {
    libraries_ = std::make_unique<LibraryHandles>(stream_);
    scratch_ = std::make_unique<Scratch>();
  } catch (...) {
    cudaStreamDestroy(stream_);
    throw;
  }
}

Device::~Device() {
  cudaStreamSynchronize(stream_);
  libraries_.reset();  // they use the stream
  cudaStreamDestroy(stream_);
}

void Device::synchronize() { BATON_CALL(cudaStreamSynchronize, stream_); }

std::string Device::description() const {
  int device = 0, version = 0;
  cudaDeviceProp properties{};
  BATON_CALL(cudaGetDevice, &device);
  BATON_CALL(cudaGetDeviceProperties, &properties, device);
  BATON_CALL(cudaRuntimeGetVersion, &version);
  return std::string(properties.name) + ", CUDA " + std::to_string(version / 1000) + "." +
         std::to_string(version % 1000 / 10);
}

size_t Device::peak_bytes() const { return highest_bytes; }
size_t Device::allocations() const { return allocated_times; }

// --------------------------------------------------------------------------------------------------------- memory
// A chunk is zeroed when it is made, and no part of it is handed out twice.
void* Arena::take_bytes(size_t bytes) {
  if (frozen_) throw RunError("device memory was asked for after step 0 (" + std::to_string(bytes) + " bytes)");
  const size_t rounded = std::max(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (chunks_.empty() || chunks_.back().size - chunks_.back().used < rounded) {
    Chunk chunk{nullptr, std::max(rounded, smallest_chunk), 0};
    if (const cudaError_t status = cudaMalloc(&chunk.base, chunk.size); status != cudaSuccess) {
      cudaGetLastError();  // clears the error, which has no other effect, or the next launch would report it
      size_t free = 0, total = 0;
      cudaMemGetInfo(&free, &total);
      throw RunError("cudaMalloc of " + std::to_string(chunk.size) + " bytes: " + cudaGetErrorString(status) + " (" +
                     std::to_string(free) + " of " + std::to_string(total) + " bytes are free)");
    }
    chunks_.push_back(chunk);
    count_allocation(chunk.size);
    // On the legacy stream, for an arena has no other. It is done before the memory is handed out.
    BATON_CALL(cudaMemsetAsync, chunk.base, 0, chunk.size, cudaStreamLegacy);
    BATON_CALL(cudaStreamSynchronize, cudaStreamLegacy);
  }
  Chunk& chunk = chunks_.back();
  void* p = static_cast<char*>(chunk.base) + chunk.used;
  chunk.used += rounded;
  bytes_ += rounded;
  return p;
}

Arena::~Arena() {
  for (const Chunk& chunk : chunks_) {
    cudaFree(chunk.base);  // waits for the work that uses it
    current_bytes -= chunk.size;
  }
}

void copy_to_device(Device& d, void* device, const void* host, size_t bytes) {
  if (bytes == 0) return;
  BATON_CALL(cudaMemcpyAsync, device, host, bytes, cudaMemcpyHostToDevice, d.stream());
  d.synchronize();
}

void copy_to_host(Device& d, void* host, const void* device, size_t bytes) {
  if (bytes == 0) return;
  BATON_CALL(cudaMemcpyAsync, host, device, bytes, cudaMemcpyDeviceToHost, d.stream());
  d.synchronize();
}

void copy_on_device(Device& d, void* to, const void* from, size_t bytes) {
  if (bytes == 0) return;
  BATON_CALL(cudaMemcpyAsync, to, from, bytes, cudaMemcpyDeviceToDevice, d.stream());
}

void fill_zero(Device& d, void* device, size_t bytes) {
  if (bytes == 0) return;
  BATON_CALL(cudaMemsetAsync, device, 0, bytes, d.stream());
}

// --------------------------------------------------------------------------------------------------------- events
Event::Event() {
  cudaEvent_t event = nullptr;
  BATON_CALL(cudaEventCreate, &event);
  handle_ = event;
}

Event::~Event() { cudaEventDestroy(event_of(handle_)); }

void Event::record(Device& d) { BATON_CALL(cudaEventRecord, event_of(handle_), d.stream()); }

double Event::seconds_since(const Event& earlier) {
  float milliseconds = 0;
  BATON_CALL(cudaEventSynchronize, event_of(handle_));
  BATON_CALL(cudaEventElapsedTime, &milliseconds, event_of(earlier.handle_), event_of(handle_));
  return milliseconds * 1e-3;
}

// --------------------------------------------------------------------------------------------------------- graphs
namespace {

// A graph while it is being made.
struct RecordedGraph {
  cudaGraph_t graph = nullptr;
  RecordedGraph() = default;
  RecordedGraph(const RecordedGraph&) = delete;
  RecordedGraph& operator=(const RecordedGraph&) = delete;
  ~RecordedGraph() {
    if (graph) cudaGraphDestroy(graph);
  }
};

}  // namespace

Graph::~Graph() {
  if (executable_) cudaGraphExecDestroy(executable_of(executable_));
}

void Graph::capture(Device& d, std::function<void()> body) {
  RecordedGraph recorded;
  BATON_CALL(cudaStreamBeginCapture, d.stream(), cudaStreamCaptureModeThreadLocal);
  try {
    body();
  } catch (...) {  // end the capture, so that the stream stays usable, and pass the body's error on
    cudaStreamEndCapture(d.stream(), &recorded.graph);
    cudaGetLastError();
    throw;
  }
  BATON_CALL(cudaStreamEndCapture, d.stream(), &recorded.graph);

  size_t nodes = 0;
  cudaGraphExec_t executable = nullptr;
  BATON_CALL(cudaGraphGetNodes, recorded.graph, nullptr, &nodes);
  BATON_CALL(cudaGraphInstantiate, &executable, recorded.graph, 0);
  if (executable_) cudaGraphExecDestroy(executable_of(executable_));
  executable_ = executable;
  nodes_ = int(nodes);
  body_ = std::move(body);
  BATON_CALL(cudaGraphUpload, executable, d.stream());  // so that the first replay is as fast as the others
}

void Graph::replay(Device& d) {
  if (!executable_) throw RunError("a graph was replayed before it was captured");
  BATON_CALL(cudaGraphLaunch, executable_of(executable_), d.stream());
}

}  // namespace baton
