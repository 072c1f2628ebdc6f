// For tests: runs a kernel written as PTX, on the interpreter itself.
#pragma once
#include <cstring>
#include <string>
#include <vector>

#include "tests/ptx/device_memory.h"
#include "tests/ptx/warp.h"

namespace ptx::test {

// The text of a module with one kernel `test`, whose arguments are 64-bit pointers p0, p1, ...
inline std::string module_of(const std::string& body, int pointers, const std::string& before = "") {
  std::string text = ".version 9.0\n.target sm_90\n.address_size 64\n" + before + ".visible .entry test(\n";
  for (int k = 0; k < pointers; k++) text += std::string(k ? ",\n" : "") + ".param .u64 p" + std::to_string(k);
  return text + ")\n{\n" + body + "\n}\n";
}

class Machine {
 public:
  explicit Machine(const std::string& text) : module_(parse_module(text)), kernel_(module_->kernels.at("test").get()) {}
  const Kernel& kernel() const { return *kernel_; }

  // Device memory that holds these values; unwritten memory where there are none.
  template <class T>
  static uint64_t upload(const std::vector<T>& values) {
    DeviceMemory& memory = DeviceMemory::instance();
    const uint64_t address = memory.allocate(values.size() * sizeof(T));
    std::memcpy(memory.storage(address, values.size() * sizeof(T), "values"), values.data(), values.size() * sizeof(T));
    memory.mark_written(address, values.size() * sizeof(T));
    return address;
  }
  static uint64_t unwritten(size_t bytes) { return DeviceMemory::instance().allocate(bytes); }
  template <class T>
  static std::vector<T> download(uint64_t address, size_t count) {
    std::vector<T> values(count);
    const char* from = DeviceMemory::instance().storage(address, count * sizeof(T), "values");
    std::memcpy(values.data(), from, count * sizeof(T));
    return values;
  }

  // Launches `grid` blocks of `block` threads; a seed gives a random schedule. Throws Fault.
  void run(uint32_t grid, uint32_t block, const std::vector<uint64_t>& pointers, uint64_t seed = 0,
           uint32_t dynamic_bytes = 0, Counters* counters = nullptr) {
    if (!kernel_->unknown.empty()) throw Fault(FaultKind::unsupported, kernel_->unknown);
    static uint32_t launches = 0;
    Launch launch;
    launch.module = module_.get();
    launch.kernel = kernel_;
    launch.grid.x = grid;
    launch.block.x = block;
    launch.dynamic_bytes = dynamic_bytes;
    launch.parameters.resize(8 * pointers.size());
    std::memcpy(launch.parameters.data(), pointers.data(), launch.parameters.size());
    launch.number = ++launches;
    Random random{seed};
    launch.random = seed ? &random : nullptr;
    launch.counters = counters;
    ptx::run(launch);
  }

 private:
  std::unique_ptr<Module> module_;
  const Kernel* kernel_;
};

}  // namespace ptx::test
