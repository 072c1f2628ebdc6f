// Device memory for tests: the only way in which a test touches it, so one test serves every build.
//
//   test::Memory memory;                                  // a device and an arena
//   test::Buffer x(memory, std::vector<float>{1, 2, 3});  // uploaded
//   test::Buffer<float> y(memory, 3);                     // zeros; or (memory, 3, NAN)
//   square(y, x, 3, memory.stream());
//   EXPECT_TRUE(test::exact(y.host(), ...));
//
// Every buffer lies between two guards, and reading it back checks that no kernel has written there. Where the kernels
// are under AddressSanitizer there are none: the allocation's own red zones see reads too.
#pragma once
#include <gtest/gtest.h>

#include <vector>

#include "engine/runtime.h"

namespace baton::test {

// Bytes before and behind every buffer. Each variant of the kernels has its own buffers.cpp; the tests are compiled
// once.
size_t buffer_guard();

class Memory {
 public:
  Device& device() { return shared_device(); }
  Arena& arena() { return arena_; }
  Stream stream() { return device().stream(); }

 private:
  static Device& shared_device() {  // one for the process: libraries take long to start
    static Device device;
    return device;
  }
  Arena arena_;
};

template <class T>
class Buffer {
 public:
  Buffer(Memory& memory, const std::vector<T>& values) : memory_(memory), count_(values.size()) {
    base_ = memory.arena().template take<unsigned char>(2 * guard_ + bytes());
    if (guard_ != 0) {
      const std::vector<unsigned char> pattern(guard_, guard_byte);
      upload(memory.device(), base_, pattern);
      upload(memory.device(), base_ + guard_ + bytes(), pattern);
    }
    set(values);
  }
  Buffer(Memory& memory, size_t count, T value = T{}) : Buffer(memory, std::vector<T>(count, value)) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() { return reinterpret_cast<T*>(base_ + guard_); }
  operator T*() { return data(); }
  size_t size() const { return count_; }
  void set(const std::vector<T>& values) {
    if (values.size() != count_)
      throw InputError("a buffer of " + std::to_string(count_) + " elements was given " +
                       std::to_string(values.size()));
    if (count_) upload(memory_.device(), data(), values);
  }

  std::vector<T> host() {
    if (guard_ != 0) {
      check_guard("before", 0);
      check_guard("after", guard_ + bytes());
    }
    return count_ ? download(memory_.device(), data(), count_) : std::vector<T>{};
  }

 private:
  static constexpr unsigned char guard_byte = 0xA5;

  size_t bytes() const { return count_ * sizeof(T); }
  void check_guard(const char* where, size_t offset) {
    for (unsigned char byte : download(memory_.device(), base_ + offset, guard_))
      if (byte != guard_byte) {
        ADD_FAILURE() << "a kernel wrote " << where << " a buffer of " << count_ << " elements";
        return;
      }
  }

  Memory& memory_;
  size_t count_, guard_ = buffer_guard();
  unsigned char* base_;
};

}  // namespace baton::test
