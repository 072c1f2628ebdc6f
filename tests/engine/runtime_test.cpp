// Memory of calls that come again: what a frame takes is taken once.
#include "engine/runtime.h"

#include <cstdint>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

TEST(Scratch, FramesTakeTheSameMemory) {
  BATON_NEEDS_DEVICE();
  Device device;
  float* first = nullptr;
  size_t allocations = 0, peak = 0;
  for (int call = 0; call < 3; call++) {
    Scratch::Frame frame(device);
    float* a = frame.take<float>(1000);
    double* b = frame.take<double>(call == 0 ? 500 : 3);  // less may be asked for
    if (call == 0) first = a, allocations = device.allocations(), peak = device.peak_bytes();
    EXPECT_EQ(a, first);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(a) % 256, 0u);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(b) % 256, 0u);
    EXPECT_NE(static_cast<void*>(a), static_cast<void*>(b));
    EXPECT_EQ(device.allocations(), allocations);
    EXPECT_EQ(device.peak_bytes(), peak);
  }
}

TEST(Scratch, FramesNest) {
  BATON_NEEDS_DEVICE();
  Device device;
  const std::vector<float> ones(300, 1.f), twos(200, 2.f);
  Scratch::Frame outer(device);
  float* a = outer.take<float>(300);
  upload(device, a, ones);
  float* inner_memory = nullptr;
  {
    Scratch::Frame inner(device);
    inner_memory = inner.take<float>(200);
    upload(device, inner_memory, twos);
    EXPECT_TRUE(exact(download(device, a, 300), ones));
  }
  EXPECT_EQ(outer.take<float>(200), inner_memory);
  EXPECT_TRUE(exact(download(device, a, 300), ones));
}

TEST(Scratch, GrowsOnlyWhenMoreIsAskedFor) {
  BATON_NEEDS_DEVICE();
  Device device;
  const auto take = [&](size_t count) {
    Scratch::Frame frame(device);
    float* p = frame.take<float>(count);
    const std::vector<float> values(count, 3.f);
    upload(device, p, values);
    EXPECT_TRUE(exact(download(device, p, count), values));
  };
  take(1 << 20);
  const size_t before = device.allocations(), peak = device.peak_bytes();
  take(1 << 20);
  take(1);
  EXPECT_EQ(device.allocations(), before);
  EXPECT_EQ(device.peak_bytes(), peak);
  take(size_t(1) << 25);  // 128 MB: above what a GPU's arena takes at once
  EXPECT_EQ(device.allocations(), before + 1);
  // A batch that is a little larger every time costs a few allocations, not one a call.
  for (size_t count = size_t(1) << 25; count < (size_t(1) << 25) + 8; count++) take(count);
  EXPECT_LE(device.allocations(), before + 2);
}

TEST(Arena, CountsItsAllocations) {
  BATON_NEEDS_DEVICE();
  Device device;
  const size_t before = device.allocations();
  Arena arena;
  arena.take<float>(1);
  EXPECT_EQ(device.allocations(), before + 1);
}

}  // namespace
}  // namespace baton::test
