// What the interpreter and the stand-ins refuse: an error of the program under test, with the place where it happened.
#pragma once
#include <stdexcept>
#include <string>

namespace ptx {

// How CUDA's runtime would report the error. All but `configuration` and `unsupported` stay: every later call of the
// process fails too, as after an illegal access on a GPU.
enum class FaultKind {
  access,         // an address outside an allocation, or of the host's memory
  alignment,      // an address that is not a multiple of what is accessed
  launch,         // anything else that a running kernel did: divergence, memory read before it was written, ...
  configuration,  // a launch or a call whose arguments are beyond the limits
  unsupported,    // an instruction or a use of a library that is not known here
};

struct Fault : std::runtime_error {
  Fault(FaultKind kind, const std::string& message) : std::runtime_error(message), kind(kind) {}
  FaultKind kind;
};

}  // namespace ptx
