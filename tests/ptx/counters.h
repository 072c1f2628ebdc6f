// What a launch did, counted for tools/gpu-cost: instructions by class, memory requests and how well they use sectors
// and banks, divergence, and the time that dependent instructions take one after the other.
//
// The last one is a scoreboard. Between two branches the compiler may order instructions as it likes, so each waits for
// its sources alone, and its result is there after a latency that its class has (latency_of); a warp issues one
// instruction a cycle. What follows a branch waits until all before it has been issued. A barrier waits for the slowest
// warp of the block. So `block_cycles` is the time that a block would take if nothing but its own dependences held it
// up, and no load missed the L2 cache: a model, not a measurement.
#pragma once
#include <array>
#include <cstdint>
#include <vector>

#include "tests/ptx/access.h"

namespace ptx {

// A chain of dependent instructions that ends in a register or at a point of a warp's time.
struct Chain {
  float cycles = 0;
  uint32_t loads = 0;     // global loads and atomic operations in it
  uint32_t barriers = 0;  // and barriers of the block
};

struct Counters {
  // Of all launches that were counted.
  uint64_t launches = 0, blocks = 0, threads = 0;
  std::array<uint64_t, size_t(Class::count)> warp_instructions{}, lane_instructions{};
  uint64_t load_requests = 0, load_sectors = 0, load_bytes = 0;     // global; bytes are those that lanes asked for
  uint64_t store_requests = 0, store_sectors = 0, store_bytes = 0;  // global, atomic operations included
  uint64_t loaded_footprint = 0, stored_footprint = 0;              // sectors touched, each once a launch
  uint64_t shared_requests = 0, shared_wavefronts = 0;
  uint64_t branches = 0, divergent_branches = 0;  // of warps, those with a guard
  double block_cycles = 0;                        // the sum over blocks
  Chain longest;                                  // of any block

  // Called by handlers, with the lanes' addresses.
  void count_global(const Warp&, const Instruction&, const Addresses&, bool store);
  void count_shared(const Warp&, const Instruction&, const Addresses&);

  // Called by the loop that runs a warp.
  void begin_block(const Launch&, int warps);
  void count_instruction(const Warp&, const Instruction&);
  void pass_barrier();
  void end_block();
  void end_launch(uint64_t blocks, uint64_t threads);

  void add(const Counters&);

 private:
  struct WarpTime {
    Chain begin;                // when the first instruction after the last branch can be issued
    Chain latest;               // when the last of those after it is
    float issued = 0;           // how many there were
    std::vector<Chain> ready;   // of each register, by its place / 4
    Chain copied;               // when all asynchronous copies so far are there
    std::vector<Chain> groups;  // and those of each group and before it
    // When all so far has been issued.
    Chain end() const;
  };
  std::vector<WarpTime> warps_;
};

float latency_of(Class);  // in cycles, from issue to the first use of the result

}  // namespace ptx
