// What the stand-ins of cuBLAS, cuSOLVER and cuDNN share: the handles that they give out, and how a call of theirs
// runs.
#pragma once
#include <algorithm>
#include <set>
#include <string>

#include "tests/ptx/device_memory.h"
#include "tests/ptx/stream.h"

namespace ptx {

// The call does not run, as with an argument that the real library would refuse; the process's next call may.
[[noreturn]] inline void refuse(const std::string& what) { throw Fault(FaultKind::configuration, what); }
[[noreturn]] inline void not_supported(const std::string& what) { throw Fault(FaultKind::unsupported, what); }

inline void forbid_while_capturing(const char* why) {
  if (any_capture()) refuse(std::string("called while a stream is being captured: ") + why);
}

// The handles or descriptors of one kind. A destroyed object stays in memory, so that no later one has its address and
// a stale handle is always seen.
template <class T>
class Handles {
 public:
  explicit Handles(const char* kind) : kind_(kind) {}
  Handles(const Handles&) = delete;
  Handles& operator=(const Handles&) = delete;

  void create(T** handle) {
    if (!handle) refuse("a null pointer to " + kind_);
    *handle = new T;
    alive_.insert(*handle);
  }
  T& find(T* handle) const {
    if (!handle) refuse("a null " + kind_);
    if (!alive_.count(handle)) refuse("a " + kind_ + " that does not exist, or no longer");
    return *handle;
  }
  void destroy(T* handle) {
    find(handle);
    alive_.erase(handle);
  }

 private:
  std::string kind_;
  std::set<const T*> alive_;
};

// What a library returns.
template <class Status>
struct Statuses {
  Status success, bad_argument, not_supported, failed;

  Status of(FaultKind kind) const {
    return kind == FaultKind::configuration ? bad_argument : kind == FaultKind::unsupported ? not_supported : failed;
  }
};

// Runs what a call does at once. A fault is reported, and `words`, where given, are set to its message.
template <class Status, class Body>
Status attempt(const Statuses<Status>& statuses, const char* call, Body body, std::string* words = nullptr) {
  Status failure = statuses.failed;  // also what a call returns after an error that stays
  const Status status = guarded(call, statuses.success, statuses.failed, [&] {
    try {
      body();
    } catch (const Fault& fault) {
      failure = statuses.of(fault.kind);
      if (words) *words = fault.what();
      throw;
    }
  });
  return status == statuses.success ? status : failure;
}

// What a call puts on a stream. Without an operation there is nothing to do.
struct Submission {
  cudaStream_t stream = nullptr;
  Operation operation = {};
};

// Runs `prepare`, which checks the arguments and returns a Submission, and submits that.
template <class Status, class Prepare>
Status attempt_operation(const Statuses<Status>& statuses, const char* call, Prepare prepare,
                         std::string* words = nullptr) {
  Submission made;
  const Status prepared = attempt(
      statuses, call, [&] { made = prepare(); }, words);
  if (prepared != statuses.success || !made.operation.run) return prepared;
  return submit(made.stream, std::move(made.operation)) == cudaSuccess ? statuses.success : statuses.failed;
}

inline void check_not_negative(const char* name, long long value) {
  if (value < 0) refuse(std::string(name) + " is " + std::to_string(value));
}

// A scaling factor, which the library reads from the host's memory.
template <class T>
T host_scalar(const char* name, const void* p) {
  if (!p) refuse(std::string(name) + " is a null pointer");
  if (DeviceMemory::instance().contains(p))
    refuse(std::string(name) + " is a pointer to device memory, but is read from the host's (pointer mode host)");
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

// Memory that a library uses as it likes during a call.
struct Workspace {
  void* data = nullptr;
  size_t bytes = 0;
};

// Leaves NaN in a workspace, as nobody may rely on what a library leaves there: in its first MiB, to save time.
// Throws Fault for memory that is not the device's, or no longer.
inline void overwrite(const Workspace& workspace) {
  if (workspace.bytes == 0) return;
  const uint64_t address = reinterpret_cast<uint64_t>(workspace.data);
  DeviceMemory::instance().storage(address, workspace.bytes, "the workspace");
  DeviceMemory::instance().fill(address, 0xff, std::min(workspace.bytes, size_t(1) << 20), "the workspace");
}

}  // namespace ptx
