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
  static const bool available = [] {
    try {
      Device device;
      return true;
    } catch (const RunError&) {
      return false;
    }
  }();
  return available;
}

}  // namespace baton

#define BATON_NEEDS_DEVICE() \
  if (!::baton::device_available()) GTEST_SKIP() << "no NVIDIA GPU on this machine"
