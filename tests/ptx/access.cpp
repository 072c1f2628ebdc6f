#include "tests/ptx/access.h"

#include <sys/mman.h>

#include <bit>
#include <cstdio>
#include <cstdlib>

#include "tests/ptx/copies.h"
#include "tests/ptx/counters.h"

namespace ptx {

namespace {

// Which launch stored to, and which launch read through the read-only path, the 64 words of 256 bytes of memory.
struct Granule {
  uint32_t stored_by, read_by;
  uint64_t stored, read;  // a bit for each word, of those launches
};
constexpr int granule_bits = 8;

Granule* granules() {
  static Granule* const all = [] {
    void* p = mmap(nullptr, (DeviceMemory::window_bytes >> granule_bits) * sizeof(Granule), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
      std::perror("ptx: cannot reserve address space for the record of accesses");
      std::_Exit(1);
    }
    return static_cast<Granule*>(p);
  }();
  return all;
}

uint64_t ones(uint64_t count) { return count >= 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1; }

// Notes that the present launch accesses words [first, first + count) of memory; returns whether it did the contrary
// with one of them before.
template <bool store>
bool note_words(uint64_t first, uint64_t count, uint32_t launch) {
  bool conflict = false;
  while (count > 0) {
    Granule& g = granules()[first >> 6];
    const uint64_t here = std::min<uint64_t>(count, 64 - (first & 63)), bits = ones(here) << (first & 63);
    uint32_t& mine = store ? g.stored_by : g.read_by;
    uint64_t& my_words = store ? g.stored : g.read;
    if (mine != launch) mine = launch, my_words = 0;
    my_words |= bits;
    const uint32_t others = store ? g.read_by : g.stored_by;
    conflict |= others == launch && ((store ? g.read : g.stored) & bits) != 0;
    first += here;
    count -= here;
  }
  return conflict;
}

std::string hexadecimal(uint64_t address) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(address));
  return text;
}

const char* verb(Access access) {
  return access == Access::store    ? "a store to "
         : access == Access::atomic ? "an atomic operation on "
                                    : "a load from ";
}

void check_alignment(const Warp& w, const Instruction& i, const Addresses& a) {
  uint64_t low = 0;
  for (int lane = 0; lane < lanes; lane++) low |= a.of[lane];
  if ((low & (i.bytes - 1)) == 0) return;
  for (int lane = 0; lane < lanes; lane++)
    if (has_lane(w.active, lane) && a.of[lane] % i.bytes != 0)
      fail(w, i, lane,
           "an access of " + std::to_string(i.bytes) + " bytes at the misaligned address " + hexadecimal(a.of[lane]),
           FaultKind::alignment);
}

// The access of one lane to `bytes` bytes, byte by byte.
void check_lane(const Warp& w, const Instruction& i, int lane, uint64_t address, Access access, size_t bytes) {
  DeviceMemory& memory = DeviceMemory::instance();
  if (!memory.contains(address))
    fail(w, i, lane, std::string(verb(access)) + hexadecimal(address) + ", which is not an address of the device",
         FaultKind::access);
  if (!memory.allocated(address, bytes))
    fail(w, i, lane, std::string(verb(access)) + hexadecimal(address) + ", outside any allocation", FaultKind::access);
  if (access == Access::store) memory.mark_written(address, bytes);
  else if (!memory.written(address, bytes))
    fail(w, i, lane, "device memory at " + hexadecimal(address) + " is read before it was written");
}

}  // namespace

Addresses addresses_of(const Warp& w, const Address& address) {
  Addresses a;
  const uint64_t displacement = uint64_t(address.displacement);
  if (!address.has_base) {
    for (int lane = 0; lane < lanes; lane++) a.of[lane] = displacement;
    return a;
  }
  if (address.wide_base) {
    const uint64_t* base = lanes_of<uint64_t>(w, address.base);
    PTX_EACH_LANE a.of[lane] = base[lane] + displacement;
  } else {
    const uint32_t* base = lanes_of<uint32_t>(w, address.base);
    PTX_EACH_LANE a.of[lane] = uint32_t(base[lane] + uint32_t(displacement));
  }
  if (w.active != ~0u) {
    const uint64_t first = a.of[std::countr_zero(w.active)];
    PTX_EACH_LANE a.of[lane] = has_lane(w.active, lane) ? a.of[lane] : first;
  }
  return a;
}

Addresses check_global(Warp& w, const Instruction& i, const Addresses& a, Access access) {
  check_alignment(w, i, a);
  const DeviceMemory& memory = DeviceMemory::instance();
  Addresses offsets;
  uint64_t largest = 0;
  PTX_EACH_LANE {
    offsets.of[lane] = memory.offset_of(a.of[lane]);
    largest = largest > offsets.of[lane] ? largest : offsets.of[lane];
  }
  bool simple = largest < DeviceMemory::window_bytes;
  const bool contiguous = simple && offsets.contiguous(i.bytes);
  if (contiguous) {  // at most two pages, since no lane's access crosses one
    simple = memory.page_all_written(offsets.of[0]) && memory.page_all_written(offsets.of[lanes - 1]);
  } else if (simple) {
    for (int lane = 0; lane < lanes; lane++) simple &= memory.page_all_written(offsets.of[lane]);
  }
  if (!simple)
    for (int lane = 0; lane < lanes; lane++)
      if (has_lane(w.active, lane)) check_lane(w, i, lane, a.of[lane], access, i.bytes);

  const Launch& launch = *w.block->launch;
  if (!launch.kernel->reads_through_nc || access == Access::load) return offsets;
  const auto note = access == Access::load_read_only ? note_words<false> : note_words<true>;
  const int words = std::max(1, i.bytes / 4);
  bool conflict = false;
  if (contiguous && w.active == ~0u && i.bytes >= 4) {
    conflict = note(offsets.of[0] / 4, uint64_t(words) * lanes, launch.number);
    if (!conflict) return offsets;
  }
  for (int lane = 0; lane < lanes; lane++)
    if (has_lane(w.active, lane) && note(offsets.of[lane] / 4, words, launch.number))
      fail(w, i, lane,
           access == Access::load_read_only
               ? "a read-only load (ld.global.nc) at " + hexadecimal(a.of[lane]) + ", where this launch has stored"
               : std::string(verb(access)) + hexadecimal(a.of[lane]) +
                     ", which this launch has read through the read-only path (ld.global.nc)");
  return offsets;
}

Addresses check_copied(const Warp& w, const Instruction& i, const Addresses& a, const uint32_t* bytes) {
  check_alignment(w, i, a);
  Addresses offsets;
  for (int lane = 0; lane < lanes; lane++) {
    offsets.of[lane] = DeviceMemory::instance().offset_of(a.of[lane]);
    if (has_lane(w.active, lane) && bytes[lane] > 0) check_lane(w, i, lane, a.of[lane], Access::load, bytes[lane]);
  }
  return offsets;
}

namespace {

// Throws Fault, except where a thread reads what it has copied itself, which no barrier has shown to the others yet.
void judge_shared(const Warp& w, const Instruction& i, const Addresses& a, Access access) {
  const Block& block = *w.block;
  bool excused = false;
  for (int lane = 0; lane < lanes; lane++) {
    if (!has_lane(w.active, lane)) continue;
    const bool dynamic = a.of[lane] >= dynamic_window;
    const uint64_t within = dynamic ? a.of[lane] - dynamic_window : a.of[lane];
    const uint64_t limit = dynamic ? block.launch->dynamic_bytes : block.static_bytes;
    if (within + i.bytes > limit)
      fail(w, i, lane,
           std::string(verb(access)) + "byte " + std::to_string(within) + " of " + std::to_string(limit) +
               (dynamic ? " bytes of dynamic shared memory" : " bytes of static shared memory"),
           FaultKind::access);
    const uint32_t offset = uint32_t((dynamic ? block.static_bytes : 0) + within);
    const uint8_t* state = &block.shared_state[offset];
    for (int k = 0; k < i.bytes; k++) {
      if (state[k] == Block::gap)
        fail(w, i, lane, std::string(verb(access)) + "shared memory beyond a variable's end", FaultKind::access);
      if (access == Access::store || state[k] != Block::unwritten) continue;
      if (access != Access::load_for_others && has_arrived(w, lane, offset + uint32_t(k))) excused = true;
      else if (is_copied(block, offset + uint32_t(k)))
        fail(w, i, lane,
             "shared memory is read before an asynchronous copy has brought it: a wait or a barrier is missing");
      else fail(w, i, lane, "shared memory is read before it was written");
    }
  }
  if (!excused) fail(w, i, 0, "an access to shared memory that is wrong in no lane: a mistake in the interpreter");
}

// Whether all bytes of a lane's access have the least state that it needs. A state is 0, 1 or 2.
template <class Word>
bool state_is_good(const uint8_t* state, bool must_be_written) {
  constexpr Word each = Word(~Word(0)) / 255;  // 1 in every byte
  Word s;
  std::memcpy(&s, state, sizeof s);
  return must_be_written ? s == each * Block::written : ((s | s >> 1) & each) == each;
}

}  // namespace

Addresses check_shared(Warp& w, const Instruction& i, const Addresses& a, Access access) {
  check_alignment(w, i, a);
  Block& block = *w.block;
  Addresses offsets;
  const uint64_t static_bytes = block.static_bytes, dynamic_bytes = block.launch->dynamic_bytes;
  uint64_t beyond = 0;
  PTX_EACH_LANE {
    const bool dynamic = a.of[lane] >= dynamic_window;
    const uint64_t within = dynamic ? a.of[lane] - dynamic_window : a.of[lane];
    beyond |= uint64_t(within + i.bytes > (dynamic ? dynamic_bytes : static_bytes));
    offsets.of[lane] = dynamic ? static_bytes + within : within;
  }
  if (beyond) judge_shared(w, i, a, access);
  uint8_t* state = block.shared_state.data();
  const bool reads = access != Access::store, only_reads = access == Access::load || access == Access::load_for_others;
  if (offsets.contiguous(i.bytes)) {
    const uint8_t* first = state + offsets.of[0];
    const uint8_t least = reads ? Block::written : Block::unwritten;
    uint8_t below = 0;
    for (int k = 0; k < lanes * i.bytes; k++) below |= uint8_t(first[k] < least);
    if (below) judge_shared(w, i, a, access);
    if (!only_reads) std::memset(state + offsets.of[0], Block::written, size_t(lanes) * i.bytes);
    return offsets;
  }
  const int different = offsets.uniform() ? 1 : lanes;
  bool good = true;
  for (int lane = 0; lane < different; lane++) {
    const uint8_t* at = state + offsets.of[lane];
    switch (i.bytes) {
      case 1:
        good &= state_is_good<uint8_t>(at, reads);
        break;
      case 2:
        good &= state_is_good<uint16_t>(at, reads);
        break;
      case 4:
        good &= state_is_good<uint32_t>(at, reads);
        break;
      case 16:
        good &= state_is_good<uint64_t>(at + 8, reads);
        [[fallthrough]];
      default:
        good &= state_is_good<uint64_t>(at, reads);
    }
  }
  if (!good) judge_shared(w, i, a, access);
  if (!only_reads)
    for (int lane = 0; lane < different; lane++) std::memset(state + offsets.of[lane], Block::written, i.bytes);
  return offsets;
}

bool is_shared(const Warp& w, const Instruction& i, Addresses& a) {
  int shared = 0, count = 0;
  for (int lane = 0; lane < lanes; lane++)
    if (has_lane(w.active, lane)) count++, shared += a.of[lane] - shared_window < shared_window_bytes;
  if (shared == 0) return false;
  if (shared != count)
    fail(w, i, std::countr_zero(w.active), "some lanes' generic addresses are of shared memory, some are not",
         FaultKind::unsupported);
  for (uint64_t& address : a.of) address -= shared_window;
  return true;
}

}  // namespace ptx
