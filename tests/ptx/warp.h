// The state of a launch while it runs: a block's shared memory, and its warps with a program counter for each lane.
#pragma once
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "tests/ptx/fault.h"
#include "tests/ptx/program.h"

namespace ptx {

struct Extent {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t(x) * y * z; }
};

struct Counters;

// Numbers of a seeded schedule (SplitMix64).
struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    return z ^ z >> 31;
  }
  uint64_t below(uint64_t bound) { return next() % bound; }
  template <class T>
  void shuffle(std::vector<T>& v) {
    for (size_t k = v.size(); k > 1; k--) std::swap(v[k - 1], v[below(k)]);
  }
};

// One kernel launch.
struct Launch {
  const Module* module = nullptr;
  const Kernel* kernel = nullptr;
  Extent grid, block;
  uint32_t dynamic_bytes = 0;
  std::vector<char> parameters;
  uint32_t number = 0;           // counts up: says which launch it was that wrote or read
  Counters* counters = nullptr;  // nullptr: nobody counts
  Random* random = nullptr;      // of a seeded schedule; nullptr: in order
};

// An asynchronous copy, until a barrier shows what it has brought to all threads.
struct PendingCopy {
  const Instruction* instruction;
  uint32_t offset, bytes;  // in Block::shared
  uint32_t group;          // of its thread's groups
  bool arrived;            // its thread has waited for it
  char data[16];
};
struct ThreadCopies {
  uint32_t group = 0;               // that is open
  std::vector<PendingCopy> copies;  // in the order of the program
};

// The block that runs. Shared memory is filled with 0xff before each block, so that what a kernel takes from it without
// having written it is a NaN in what follows, beside being reported.
struct Block {
  enum State : uint8_t { gap, unwritten, written };  // of each byte of shared memory
  Launch* launch = nullptr;
  uint32_t x = 0, y = 0, z = 0;
  uint32_t static_bytes = 0;  // dynamic shared memory follows them in `shared`
  std::vector<char> shared;
  std::vector<uint8_t> shared_state;
  std::vector<ThreadCopies> copies;  // of each thread, from the first copy on
};

struct Warp {
  char* registers = nullptr;  // the register file
  uint32_t active = 0;        // lanes that the present instruction acts on
  uint32_t alive = 0;         // lanes that have not exited
  uint32_t at_barrier = 0;    // lanes that wait for the block
  uint32_t at_meeting = 0;    // lanes that wait for others of the warp
  uint32_t index = 0;         // in its block
  uint32_t present = 0;       // lanes that exist: the last warp of a block may be short
  int pc[lanes];              // where each lane goes on; of a waiting lane, the instruction it waits in
  Block* block = nullptr;
  Counters* counters = nullptr;
};

// Throws a Fault that names the kernel, the block, the thread, the line of PTX and, where it is known, of the source.
[[noreturn]] void fail(const Warp&, const Instruction&, int lane, const std::string& what,
                       FaultKind kind = FaultKind::launch);

// Executes a launch, all of its blocks. Throws Fault.
void run(Launch&);

// ---- a register's lanes, for handlers
template <class T>
using Stored = std::conditional_t<(sizeof(T) < 4), uint32_t, T>;  // 8- and 16-bit values lie in 32-bit lanes

template <class T>
inline Stored<T>* lanes_of(const Warp& w, uint32_t place) {
  return reinterpret_cast<Stored<T>*>(w.registers + place);
}
inline uint32_t& predicate_of(const Warp& w, uint32_t place) {
  return *reinterpret_cast<uint32_t*>(w.registers + place);
}
template <class T>
inline Stored<T> widened(T v) {  // sign-extended where T is signed
  if constexpr (sizeof(T) >= 4) return v;
  else if constexpr (std::is_signed_v<T>) return uint32_t(int32_t(v));
  else return uint32_t(v);
}
inline bool has_lane(uint32_t mask, int lane) { return mask >> lane & 1; }

}  // namespace ptx
