// Runs a launch: its blocks one after the other, the warps of a block until they wait, the lanes of a warp together as
// long as they are at the same instruction.
//
// In order: of the lanes that can run, those at the smallest instruction go on, so that lanes which a branch has parted
// meet again where their ways do. Under a seed: any lane goes on, with or without its neighbours, for a few
// instructions; blocks and warps come in random order. Only what the program orders by barriers and by instructions
// that name a mask may then decide its results.
#include <algorithm>
#include <bit>
#include <climits>
#include <numeric>

#include "tests/ptx/copies.h"
#include "tests/ptx/counters.h"
#include "tests/ptx/warp.h"

namespace ptx {

void fail(const Warp& w, const Instruction& i, int lane, const std::string& what, FaultKind kind) {
  const Launch& launch = *w.block->launch;
  const Origin& origin = launch.kernel->origins[i.number];
  const uint32_t thread = w.index * lanes + uint32_t(lane);
  const auto triple = [](uint64_t x, uint64_t y, uint64_t z) {
    return "(" + std::to_string(x) + "," + std::to_string(y) + "," + std::to_string(z) + ")";
  };
  const Extent& b = launch.block;
  std::string message = what + "\n  kernel " + launch.kernel->name + ", block " +
                        triple(w.block->x, w.block->y, w.block->z) + ", thread " +
                        triple(thread % b.x, thread / b.x % b.y, thread / (b.x * b.y)) + "\n  PTX line " +
                        std::to_string(origin.line) + ": " + origin.text;
  const Module& module = *launch.module;
  const char* word = "\n  source ";
  for (int at = origin.place; at >= 0; at = module.places[size_t(at)].caller) {
    const SourcePlace& place = module.places[size_t(at)];
    if (size_t(place.file) < module.files.size())
      message += word + module.files[size_t(place.file)] + ":" + std::to_string(place.line);
    word = ", called at ";
  }
  throw Fault(kind, message);
}

namespace {

int first_lane(uint32_t mask) { return std::countr_zero(mask); }

void set_pc(Warp& w, uint32_t mask, int pc) {
  for (int lane = 0; lane < lanes; lane++)
    if (has_lane(mask, lane)) w.pc[lane] = pc;
}

// The lanes that run next, all at one instruction, and the smallest instruction at which another lane waits to run.
struct Choice {
  uint32_t mask = 0;
  int pc = 0, others = INT_MAX;
};
Choice choose_in_order(const Warp& w, uint32_t runnable) {
  int pcs[lanes];
  Choice c;
  c.pc = INT_MAX;
  for (int lane = 0; lane < lanes; lane++) {
    pcs[lane] = has_lane(runnable, lane) ? w.pc[lane] : INT_MAX;
    c.pc = std::min(c.pc, pcs[lane]);
  }
  for (int lane = 0; lane < lanes; lane++) {
    c.mask |= uint32_t(pcs[lane] == c.pc) << lane;
    c.others = std::min(c.others, pcs[lane] == c.pc ? INT_MAX : pcs[lane]);
  }
  return c;
}
Choice choose_at_random(const Warp& w, uint32_t runnable, Random& random) {
  uint64_t skip = random.below(uint64_t(std::popcount(runnable)));
  uint32_t left = runnable;
  while (skip--) left &= left - 1;
  const int lane = first_lane(left);
  Choice c;
  c.pc = w.pc[lane];
  if (random.below(4) == 0) c.mask = 1u << lane;
  else
    for (int other = 0; other < lanes; other++)
      if (has_lane(runnable, other) && w.pc[other] == c.pc) c.mask |= 1u << other;
  return c;
}

// What a meeting needs: the lanes of the mask that all must give. Throws Fault where it cannot take place.
uint32_t lanes_to_meet(const Warp& w, const Instruction& i) {
  const uint32_t* mask = lanes_of<uint32_t>(w, i.c);
  const int first = first_lane(w.active);
  const uint32_t named = mask[first];
  uint32_t others = 0, outside = 0;
  for (int lane = 0; lane < lanes; lane++) {
    others |= uint32_t(mask[lane] != named) << lane;
    outside |= uint32_t(!has_lane(mask[lane], lane)) << lane;
  }
  if (others &= w.active) fail(w, i, first_lane(others), "lanes of one instruction name different masks");
  if (outside &= w.active) fail(w, i, first_lane(outside), "a lane is not in the mask that it names");
  if (const uint32_t gone = named & w.present & ~w.alive)
    fail(w, i, first, "the mask names lane " + std::to_string(first_lane(gone)) + ", which has exited");
  return named & w.alive;
}

// Runs a warp until all of its lanes have exited or wait at a barrier of the block.
template <bool in_random_order, bool counting>
void run_warp(Warp& w) {
  Launch& launch = *w.block->launch;
  const Instruction* code = launch.kernel->code.data();
  for (;;) {
    const uint32_t runnable = w.alive & ~w.at_barrier & ~w.at_meeting;
    if (!runnable) {
      if (!w.at_meeting) return;
      const int lane = first_lane(w.at_meeting);
      fail(w, code[w.pc[lane]], lane,
           w.at_barrier ? "lanes wait for others of their mask, which wait at a barrier of the block"
                        : "lanes wait for others of their mask, which never come to this instruction");
    }
    Choice chosen;
    if constexpr (in_random_order) chosen = choose_at_random(w, runnable, *launch.random);
    else chosen = choose_in_order(w, runnable);
    uint32_t mask = chosen.mask;  // the lanes that go on together
    int pc = chosen.pc;
    for (;;) {
      const Instruction& i = code[pc];
      uint32_t active = mask;
      if (i.guard >= 0) {
        const uint32_t p = predicate_of(w, uint32_t(i.guard));
        active &= i.guard_negated ? ~p : p;
      }
      w.active = active;
      if constexpr (counting) {
        w.active = mask;  // a warp issues an instruction also for the lanes that it does not concern
        launch.counters->count_instruction(w, i);
        w.active = active;
      }
      if (i.flow == Flow::next) {
        if (active) i.handler(w, i);
        pc++;
      } else if (i.flow == Flow::branch) {
        if constexpr (counting)
          if (i.guard >= 0) {
            launch.counters->branches++;
            launch.counters->divergent_branches += active != mask && active != 0;
          }
        if (active == mask) {
          pc = i.target;
        } else if (active == 0) {
          pc++;
        } else {
          set_pc(w, active, i.target);
          set_pc(w, mask & ~active, pc + 1);
          break;
        }
      } else if (i.flow == Flow::exit) {
        w.alive &= ~active;
        mask &= ~active;
        pc++;
        if (!mask) break;
      } else if (active != mask) {
        fail(w, i, first_lane(mask & ~active), "a barrier or an exchange under a predicate that not all lanes share");
      } else if (i.flow == Flow::barrier) {
        set_pc(w, mask, pc);
        w.at_barrier |= mask;
        break;
      } else {  // a meeting
        const uint32_t needed = lanes_to_meet(w, i);
        uint32_t here = mask;
        for (int lane = 0; lane < lanes; lane++)
          if (has_lane(w.at_meeting, lane) && w.pc[lane] == pc) here |= 1u << lane;
        if (needed & ~here) {
          set_pc(w, mask, pc);
          w.at_meeting |= mask;
          break;
        }
        w.active = needed;
        i.handler(w, i);
        pc++;
        if (needed != mask) {  // those who waited go on, each from here
          w.at_meeting &= ~needed;
          set_pc(w, needed | mask, pc);
          break;
        }
      }
      if (pc >= chosen.others || (in_random_order && mask != w.alive && launch.random->below(16) == 0)) {
        set_pc(w, mask, pc);
        break;
      }
    }
  }
}

// All lanes that live wait at barriers: lets those go on whose barrier has all of its threads. Throws Fault where none
// can, for then the block waits for ever.
void release_barrier(std::vector<Warp>& warps) {
  const Warp* first = nullptr;
  int pc = -1;
  for (const Warp& w : warps)
    if (w.at_barrier && !first) first = &w, pc = w.pc[first_lane(w.at_barrier)];
  const Instruction* code = first->block->launch->kernel->code.data();
  const Instruction& barrier = code[pc];
  const uint32_t number = lanes_of<uint32_t>(*first, barrier.b)[first_lane(first->at_barrier)];

  uint32_t arrived = 0, present = 0;
  for (const Warp& w : warps) {
    present += uint32_t(std::popcount(w.present));
    for (int lane = 0; lane < lanes; lane++) {
      if (!has_lane(w.at_barrier, lane)) continue;
      const Instruction& other = code[w.pc[lane]];
      if (lanes_of<uint32_t>(w, other.b)[lane] != number) continue;
      arrived++;
      if (w.pc[lane] != pc)
        fail(w, other, lane,
             "threads of a block wait at different barriers: this one, and PTX line " +
                 std::to_string(first->block->launch->kernel->origins[size_t(pc)].line));
    }
  }
  const bool counted = barrier.parts == 2;
  const uint32_t needed = counted ? lanes_of<uint32_t>(*first, barrier.c)[first_lane(first->at_barrier)] : present;
  if (arrived != needed) {
    uint32_t alive = 0;
    for (const Warp& w : warps) alive += uint32_t(std::popcount(w.alive));
    fail(*first, barrier, first_lane(first->at_barrier),
         std::to_string(arrived) + " threads wait at a barrier for " + std::to_string(needed) + ", " +
             std::to_string(present - alive) + " have exited and " + std::to_string(alive - arrived) +
             " wait elsewhere");
  }
  uint32_t yes = 0;
  if (barrier.kind != 0)
    for (const Warp& w : warps)
      yes +=
          uint32_t(std::popcount((barrier.flag ? ~predicate_of(w, barrier.a) : predicate_of(w, barrier.a)) & w.alive));
  for (Warp& w : warps) {
    uint32_t released = 0;
    for (int lane = 0; lane < lanes; lane++)
      if (has_lane(w.at_barrier, lane) && w.pc[lane] == pc) {
        released |= 1u << lane;
        w.pc[lane]++;
        if (barrier.kind == 1) lanes_of<uint32_t>(w, barrier.d)[lane] = yes;
      }
    if (barrier.kind > 1) {
      const bool result = barrier.kind == 2 ? yes == arrived : yes > 0;
      uint32_t& p = predicate_of(w, barrier.d);
      p = (p & ~released) | (result ? released : 0);
    }
    w.at_barrier &= ~released;
    show_copies(w, released);
  }
}

// What it held stays: nothing can be read that the block has not written.
void clear_shared(Block& block, const Kernel& kernel) {
  std::fill(block.shared_state.begin(), block.shared_state.begin() + block.static_bytes, Block::gap);
  for (const Variable& v : kernel.shared) std::fill_n(block.shared_state.begin() + v.offset, v.bytes, Block::unwritten);
  std::fill(block.shared_state.begin() + block.static_bytes, block.shared_state.end(), Block::unwritten);
}

// The register files of a block's warps. Kept between launches: most launches are small.
char* register_files(size_t bytes) {
  static std::vector<char> storage;
  if (storage.size() < bytes + place_alignment) storage.resize(bytes + place_alignment);
  char* start = storage.data();
  return start + (-reinterpret_cast<uintptr_t>(start) & (place_alignment - 1));
}

void set_special(Warp& w, Special which, int lane, uint32_t value) {
  lanes_of<uint32_t>(w, uint32_t(which) * narrow_bytes)[lane] = value;
}

void prepare_warp(Warp& w, const Launch& launch, uint32_t warps) {
  std::memcpy(w.registers + launch.kernel->constants_place, launch.kernel->constants.data(),
              launch.kernel->constants.size());
  const Extent &b = launch.block, &g = launch.grid;
  for (int lane = 0; lane < lanes; lane++) {
    const uint32_t thread = w.index * lanes + uint32_t(lane), bit = 1u << lane;
    set_special(w, tid_x, lane, thread % b.x);
    set_special(w, tid_y, lane, thread / b.x % b.y);
    set_special(w, tid_z, lane, thread / (b.x * b.y));
    set_special(w, ntid_x, lane, b.x);
    set_special(w, ntid_y, lane, b.y);
    set_special(w, ntid_z, lane, b.z);
    set_special(w, nctaid_x, lane, g.x);
    set_special(w, nctaid_y, lane, g.y);
    set_special(w, nctaid_z, lane, g.z);
    set_special(w, laneid, lane, uint32_t(lane));
    set_special(w, warpid, lane, w.index);
    set_special(w, nwarpid, lane, warps);
    set_special(w, lanemask_eq, lane, bit);
    set_special(w, lanemask_lt, lane, bit - 1);
    set_special(w, lanemask_le, lane, bit | (bit - 1));
    set_special(w, lanemask_gt, lane, ~(bit | (bit - 1)));
    set_special(w, lanemask_ge, lane, ~(bit - 1));
  }
}

template <bool in_random_order, bool counting>
void run_block(Launch& launch, Block& block, std::vector<Warp>& warps, std::vector<uint32_t>& order) {
  for (Warp& w : warps) {
    w.alive = w.present;
    w.at_barrier = w.at_meeting = 0;
    std::fill(std::begin(w.pc), std::end(w.pc), 0);
    for (int lane = 0; lane < lanes; lane++) {
      set_special(w, ctaid_x, lane, block.x);
      set_special(w, ctaid_y, lane, block.y);
      set_special(w, ctaid_z, lane, block.z);
    }
  }
  if constexpr (counting) launch.counters->begin_block(launch, int(warps.size()));
  for (;;) {
    if constexpr (in_random_order) launch.random->shuffle(order);
    for (const uint32_t k : order)
      if (warps[k].alive & ~warps[k].at_barrier) run_warp<in_random_order, counting>(warps[k]);
    uint32_t alive = 0;
    for (const Warp& w : warps) alive |= w.alive;
    if (!alive) break;
    release_barrier(warps);
    if constexpr (counting) launch.counters->pass_barrier();
  }
  for (const Warp& w : warps) expect_no_copies(w);
  block.copies.clear();
  if constexpr (counting) launch.counters->end_block();
}

template <bool in_random_order, bool counting>
void run_blocks(Launch& launch) {
  const Kernel& kernel = *launch.kernel;
  const uint32_t threads = uint32_t(launch.block.count()), warp_count = (threads + lanes - 1) / lanes;
  const size_t file_bytes = (kernel.register_bytes + 4095) / 4096 * 4096;
  char* files = register_files(file_bytes * warp_count);

  Block block;
  block.launch = &launch;
  block.static_bytes = kernel.shared_bytes;
  block.shared.resize(kernel.shared_bytes + launch.dynamic_bytes);
  block.shared_state.resize(block.shared.size());
  std::vector<Warp> warps(warp_count);
  for (uint32_t k = 0; k < warp_count; k++) {
    Warp& w = warps[k];
    w.registers = files + file_bytes * k;
    w.index = k;
    const uint32_t here = std::min<uint32_t>(lanes, threads - k * lanes);
    w.present = here == lanes ? ~0u : (1u << here) - 1;
    w.block = &block;
    w.counters = launch.counters;
    prepare_warp(w, launch, warp_count);
  }
  std::vector<uint32_t> warp_order(warp_count);
  std::iota(warp_order.begin(), warp_order.end(), 0);

  const uint64_t blocks = launch.grid.count();
  std::vector<uint64_t> block_order;
  if constexpr (in_random_order) {
    block_order.resize(blocks);
    std::iota(block_order.begin(), block_order.end(), 0);
    launch.random->shuffle(block_order);
  }
  for (uint64_t n = 0; n < blocks; n++) {
    const uint64_t id = in_random_order ? block_order[n] : n;
    block.x = uint32_t(id % launch.grid.x);
    block.y = uint32_t(id / launch.grid.x % launch.grid.y);
    block.z = uint32_t(id / (uint64_t(launch.grid.x) * launch.grid.y));
    if (!block.shared.empty()) clear_shared(block, kernel);
    run_block<in_random_order, counting>(launch, block, warps, warp_order);
  }
  if constexpr (counting) launch.counters->end_launch(blocks, blocks * threads);
}

}  // namespace

void run(Launch& launch) {
  if (launch.random) {
    if (launch.counters) run_blocks<true, true>(launch);
    else run_blocks<true, false>(launch);
  } else {
    if (launch.counters) run_blocks<false, true>(launch);
    else run_blocks<false, false>(launch);
  }
}

}  // namespace ptx
