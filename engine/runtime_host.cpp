// The runtime of the serial and emulated builds: device memory is the host's, and a call has run when it returns.
#include <atomic>
#include <chrono>
#include <cstdlib>

#include "engine/runtime.h"

namespace baton {

namespace {
std::atomic<size_t> current_bytes{0}, highest_bytes{0}, allocated_times{0};
double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
}  // namespace

extern const bool on_gpu = false;

struct LibraryHandles {};

Range::Range(const char*) {}
Range::~Range() = default;

Device::Device() : libraries_(std::make_unique<LibraryHandles>()), scratch_(std::make_unique<Scratch>()) {}
Device::~Device() = default;
void Device::synchronize() {}
std::string Device::description() const {
#if defined(SIMT_EMULATE)
  return "host CPU, emulated kernels";
#else
  return "host CPU, " + std::to_string(omp_get_max_threads()) + " threads, serial kernels";
#endif
}
size_t Device::peak_bytes() const { return highest_bytes; }
size_t Device::allocations() const { return allocated_times; }

// Here every tensor is allocated separately, so that AddressSanitizer has red zones between them.
void* Arena::take_bytes(size_t bytes) {
  if (frozen_) throw RunError("device memory was asked for after step 0 (" + std::to_string(bytes) + " bytes)");
  const size_t rounded = (bytes + 255) / 256 * 256;
  void* p = nullptr;
  if (posix_memalign(&p, 256, bytes ? bytes : 1)) throw RunError("out of memory: " + std::to_string(bytes) + " bytes");
  std::memset(p, 0, bytes);
  chunks_.push_back({p, rounded, rounded});
  bytes_ += rounded;
  allocated_times++;
  const size_t total = current_bytes += rounded;
  for (size_t seen = highest_bytes; seen < total && !highest_bytes.compare_exchange_weak(seen, total);) {
  }
  return p;
}
Arena::~Arena() {
  for (const Chunk& c : chunks_) free(c.base), current_bytes -= c.size;
}

void copy_to_device(Device&, void* device, const void* host, size_t bytes) { std::memcpy(device, host, bytes); }
void copy_to_host(Device&, void* host, const void* device, size_t bytes) { std::memcpy(host, device, bytes); }
void copy_on_device(Device&, void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
void fill_zero(Device&, void* device, size_t bytes) { std::memset(device, 0, bytes); }

Event::Event() = default;
Event::~Event() = default;
void Event::record(Device&) { host_time_ = now(); }
double Event::seconds_since(const Event& earlier) { return host_time_ - earlier.host_time_; }

Graph::~Graph() = default;
void Graph::capture(Device&, std::function<void()> body) { body_ = std::move(body); }
void Graph::replay(Device&) { body_(); }

}  // namespace baton
