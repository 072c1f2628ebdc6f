// Another precision of the device for as long as it lives: the tests of a process share one device.
#pragma once
#include "engine/runtime.h"

namespace baton::test {

class WithPrecision {
 public:
  WithPrecision(Device& device, Precision precision) : device_(device), before_(device.precision()) {
    device.set_precision(precision);
  }
  ~WithPrecision() { device_.set_precision(before_); }
  WithPrecision(const WithPrecision&) = delete;
  WithPrecision& operator=(const WithPrecision&) = delete;

 private:
  Device& device_;
  Precision before_;
};

}  // namespace baton::test
