// Whether tests that need the device can run: always on the CPU; on a GPU build, where a GPU is at hand.
//
//   TEST(Dense, Forward) {
//     BATON_NEEDS_DEVICE();
//     Device device;
#pragma once
#include <gtest/gtest.h>

#include "engine/runtime.h"

namespace baton {

inline bool device_available() {
#if defined(BATON_CUDA)
  static const bool available = [] {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
  }();
  return available;
#else
  return true;
#endif
}

}  // namespace baton

#define BATON_NEEDS_DEVICE() \
  if (!::baton::device_available()) GTEST_SKIP() << "no NVIDIA GPU on this machine"
