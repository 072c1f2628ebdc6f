// The interface to the device: stream, memory, events, graph capture. runtime_host.cpp implements it for the serial and
// emulated builds (calls run at once, and memory is the host's), runtime_cuda.cu for the GPU.
#pragma once
#include <algorithm>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "engine/precision.h"
#include "engine/simt.h"

namespace baton {

struct LibraryHandles;  // cuBLAS and cuDNN on the GPU; nothing on the host
class Scratch;

// A stream and the libraries bound to it. A program has one; kernels and library calls run in order on its stream.
class Device {
 public:
  Device();  // throws RunError when there is no usable device
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  // Of the products of layers (engine/blas.h), from here on: a program sets it before it prepares a network, for a
  // Convolution and a captured step keep what they were made with. The products of engine/linalg.h know nothing of it.
  Precision precision() const { return precision_; }
  void set_precision(Precision precision) { precision_ = precision; }

  Stream stream() const { return stream_; }
  LibraryHandles& libraries() { return *libraries_; }
  void synchronize();
  // "NVIDIA H200, CUDA 13.0" or "host CPU, 2 threads, serial kernels"
  std::string description() const;
  size_t peak_bytes() const;   // the most device memory that arenas have had at any time so far
  size_t allocations() const;  // how often arenas have asked the system for memory so far
  Scratch& scratch() { return *scratch_; }

 private:
  Stream stream_{};
  Precision precision_ = Precision::fp32;
  std::unique_ptr<LibraryHandles> libraries_;
  std::unique_ptr<Scratch> scratch_;
};

// The only source of device memory. Tensors are taken before step 0; each is filled with zeros and 256-byte aligned.
// After freeze() any request is an error, so memory cannot grow after step 0. It is freed as a whole.
class Arena {
 public:
  Arena() = default;
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  template <class T>
  T* take(size_t count) {
    return static_cast<T*>(take_bytes(count * sizeof(T)));
  }
  void freeze() { frozen_ = true; }
  size_t bytes() const { return bytes_; }

 private:
  void* take_bytes(size_t bytes);
  struct Chunk {
    void* base;
    size_t size, used;
  };
  std::vector<Chunk> chunks_;
  size_t bytes_ = 0;
  bool frozen_ = false;
};

// Memory for repeated calls, such as predictions: the tensors of a call lie in a Frame, and those of the next call use
// the same memory. It is kept, so it grows only when a call asks for more than any call before. Tensors are 256-byte
// aligned and not initialised. Frames may nest; the last to begin ends first. A Frame may end before the stream's work
// is done, for later work in the same memory comes after it on the stream. Not within a captured step.
class Scratch {
 public:
  class Frame {
   public:
    explicit Frame(Device& device) : scratch_(device.scratch()), first_(scratch_.used_) {}
    ~Frame() { scratch_.used_ = first_; }
    Frame(const Frame&) = delete;
    Frame& operator=(const Frame&) = delete;
    template <class T>
    T* take(size_t count) {
      return static_cast<T*>(scratch_.take_bytes(count * sizeof(T)));
    }

   private:
    Scratch& scratch_;
    size_t first_;
  };

 private:
  // A slot holds one tensor of a frame. A slot that is too small is replaced by one of at least twice its size, so all
  // replaced slots together are no larger than those that are kept.
  struct Slot {
    void* data = nullptr;
    size_t bytes = 0;
  };
  void* take_bytes(size_t bytes) {
    if (used_ == slots_.size()) slots_.emplace_back();
    Slot& slot = slots_[used_];
    if (!slot.data || slot.bytes < bytes) {
      const size_t wanted = std::max(bytes, 2 * slot.bytes);
      slot = {arena_.take<char>(wanted), wanted};
    }
    used_++;
    return slot.data;
  }
  Arena arena_;
  std::vector<Slot> slots_;
  size_t used_ = 0;
};

// Whether this build's kernels run on a GPU. A constant of the program, but not of what is compiled: .cpp files are the
// same in every build.
extern const bool on_gpu;

// Ordered on the stream; copies from and to the host return when the bytes have arrived.
void copy_to_device(Device&, void* device, const void* host, size_t bytes);
void copy_to_host(Device&, void* host, const void* device, size_t bytes);
void copy_on_device(Device&, void* to, const void* from, size_t bytes);  // asynchronous; capturable
void fill_zero(Device&, void* device, size_t bytes);                     // asynchronous; capturable

template <class T>
void upload(Device& d, T* device, const std::vector<T>& host) {
  copy_to_device(d, device, host.data(), host.size() * sizeof(T));
}
template <class T>
std::vector<T> download(Device& d, const T* device, size_t count) {
  std::vector<T> host(count);
  copy_to_host(d, host.data(), device, count * sizeof(T));
  return host;
}

// A point in the stream's time.
class Event {
 public:
  Event();
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  void record(Device&);
  double seconds_since(const Event& earlier);  // waits for this event

 private:
  void* handle_ = nullptr;
  double host_time_ = 0;
};

// A step as a graph: capture() records what `body` puts on the stream, replay() runs it again. On the host, replay()
// calls the body. So what changes from step to step must be in device memory, and not in arguments. The body must have
// run once before, with the same shapes: a library may load kernels and take memory at its first call of a kind, and
// neither is possible in a capture.
class Graph {
 public:
  Graph() = default;
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void capture(Device&, std::function<void()> body);
  void replay(Device&);
  bool captured() const { return bool(body_); }
  int nodes() const { return nodes_; }  // 0 on the host

 private:
  std::function<void()> body_;
  void* executable_ = nullptr;
  int nodes_ = 0;
};

}  // namespace baton
