// Device memory: addresses that the host cannot touch, and a shadow that knows of every byte whether it is allocated
// and whether anything was ever written there.
//
// Programs see addresses of a window that is reserved without access, so that a host that follows a device pointer ends
// with SIGSEGV. What is stored there lies in a second mapping. No address is handed out twice, so a use after a free is
// seen too.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "tests/ptx/fault.h"

namespace ptx {

class DeviceMemory {
 public:
  static constexpr size_t capacity = size_t(20) << 30;  // what cudaMalloc hands out before it runs out of memory

  static DeviceMemory& instance();

  // 512-byte aligned, unwritten. Returns 0 when the capacity is used up.
  uint64_t allocate(size_t bytes);
  // False where no allocation starts at this address.
  bool release(uint64_t address);
  size_t bytes_in_use() const { return in_use_; }

  // Whether an address lies in the device's window, allocated or not.
  bool contains(uint64_t address) const { return address - window_ < window_bytes; }
  bool contains(const void* p) const { return contains(reinterpret_cast<uint64_t>(p)); }

  // Where the bytes at a device address are stored. Throws Fault, with `what` in its message, for a null or host
  // address and for bytes that no one allocation holds.
  char* storage(uint64_t address, size_t bytes, const char* what) const;

  // The same, typed, for what a library reads or writes. Throws Fault for a misaligned address too; `read` also for
  // elements that nobody has written, and `write` marks them as written.
  template <class T>
  const T* read(const T* p, size_t count, const char* what) const {
    char* at = typed_storage(reinterpret_cast<uint64_t>(p), sizeof(T), count, what);
    check_written(reinterpret_cast<uint64_t>(p), count * sizeof(T), what);
    return reinterpret_cast<const T*>(at);
  }
  template <class T>
  T* write(T* p, size_t count, const char* what) {
    char* at = typed_storage(reinterpret_cast<uint64_t>(p), sizeof(T), count, what);
    mark_written(reinterpret_cast<uint64_t>(p), count * sizeof(T));
    return reinterpret_cast<T*>(at);
  }

  void fill(uint64_t address, int value, size_t bytes, const char* what);  // as cudaMemset
  void mark_written(uint64_t address, size_t bytes);
  void check_written(uint64_t address, size_t bytes, const char* what) const;  // throws Fault
  // Whether every byte of [address, address + bytes), which lies in the window, is allocated; was written.
  bool allocated(uint64_t address, size_t bytes) const;
  bool written(uint64_t address, size_t bytes) const;

  // ---- for instructions: no checks. `offset` counts from the window's start.
  uint64_t offset_of(uint64_t address) const { return address - window_; }
  char* at(uint64_t offset) const { return storage_ + offset; }
  // True: every byte of the page may be read and written. False: ask allocated() and written().
  bool page_all_written(uint64_t offset) const { return pages_[offset >> page_bits] == all_written; }
  static constexpr int page_bits = 12;
  static constexpr size_t window_bytes = size_t(1) << 40;

 private:
  DeviceMemory();
  enum Page : uint8_t { see_bytes, all_written, none_written };  // none_written: allocated as a whole, still untouched
  enum Byte : uint8_t { free_byte, unwritten_byte, written_byte };

  char* typed_storage(uint64_t address, size_t size, size_t count, const char* what) const;
  bool all_bytes(uint64_t offset, size_t bytes, Byte least) const;

  uint64_t window_ = 0;       // the first address that programs see
  char* storage_ = nullptr;   // what is stored there
  uint8_t* pages_ = nullptr;  // a Page for each 4096 bytes
  uint8_t* bytes_ = nullptr;  // a Byte for each byte of a page that is see_bytes
  uint64_t next_ = 0;         // where the next allocation will be
  size_t in_use_ = 0;
};

}  // namespace ptx
