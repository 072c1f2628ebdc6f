#include "tests/ptx/counters.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>

namespace ptx {

namespace {

constexpr uint64_t sector_bytes = 32;

// Which sectors a launch has touched: bits for the eight sectors of 256 bytes.
struct Touched {
  uint32_t loaded_by, stored_by;
  uint8_t loaded, stored;
};
Touched* touched() {
  static Touched* const all = [] {
    void* p = mmap(nullptr, (DeviceMemory::window_bytes >> 8) * sizeof(Touched), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
      std::perror("ptx: cannot reserve address space for the counters");
      std::_Exit(1);
    }
    return static_cast<Touched*>(p);
  }();
  return all;
}

// Whether this launch touches the sector for the first time.
bool touch(uint64_t sector, bool store, uint32_t launch) {
  Touched& t = touched()[sector >> 3];
  uint32_t& by = store ? t.stored_by : t.loaded_by;
  uint8_t& bits = store ? t.stored : t.loaded;
  if (by != launch) by = launch, bits = 0;
  const uint8_t bit = uint8_t(1u << (sector & 7));
  const bool first = !(bits & bit);
  bits |= bit;
  return first;
}

const Chain& later(const Chain& a, const Chain& b) { return b.cycles > a.cycles ? b : a; }

}  // namespace

const char* name_of(Class c) {
  constexpr const char* names[] = {
      "integer", "integer64",  "division",    "float32",      "float64",     "special",      "exact32",
      "exact64", "conversion", "global_load", "global_store", "shared_load", "shared_store", "parameter",
      "atomic",  "exchange",   "barrier",     "tensor",       "matrix_load", "async_copy",   "control"};
  static_assert(std::size(names) == size_t(Class::count));
  return names[size_t(c)];
}

// Dependent-issue latencies of Hopper as published microbenchmarks and our estimates give them, rounded; loads are taken to hit the L2
// cache, which holds the whole state of these networks. tools/first-light measures the ones that decide.
float latency_of(Class c) {
  switch (c) {
    case Class::integer:
    case Class::float32:
      return 4;
    case Class::integer64:
      return 8;
    case Class::float64:
      return 16;
    case Class::conversion:
      return 8;
    case Class::special:
      return 20;
    case Class::exact32:
      return 40;
    case Class::exact64:
      return 120;
    case Class::division:
      return 70;
    case Class::parameter:
      return 8;
    case Class::shared_load:
      return 30;
    case Class::global_load:
      return 270;
    case Class::atomic:
      return 300;
    case Class::exchange:
      return 24;
    case Class::barrier:
      return 20;
    case Class::tensor:
    case Class::matrix_load:
      return 33;
    case Class::async_copy:
      return 290;
    case Class::global_store:
    case Class::shared_store:
    case Class::control:
    case Class::count:
      return 2;
  }
  return 0;
}

void Counters::count_global(const Warp& w, const Instruction& i, const Addresses& a, bool store) {
  uint64_t sectors[2 * lanes];
  int count = 0;
  for (int lane = 0; lane < lanes; lane++) {
    if (!has_lane(w.active, lane)) continue;
    const uint64_t offset = DeviceMemory::instance().offset_of(a.of[lane]);
    sectors[count++] = offset / sector_bytes;
    if ((offset + i.bytes - 1) / sector_bytes != offset / sector_bytes) sectors[count++] = offset / sector_bytes + 1;
  }
  std::sort(sectors, sectors + count);
  count = int(std::unique(sectors, sectors + count) - sectors);
  uint64_t fresh = 0;
  for (int k = 0; k < count; k++)
    if (sectors[k] < DeviceMemory::window_bytes / sector_bytes)
      fresh += touch(sectors[k], store, w.block->launch->number);
  const uint64_t bytes = uint64_t(std::popcount(w.active)) * i.bytes;
  if (store) store_requests++, store_sectors += count, store_bytes += bytes, stored_footprint += fresh;
  else load_requests++, load_sectors += count, load_bytes += bytes, loaded_footprint += fresh;
}

// Shared memory serves 32 banks of 4 bytes at once; lanes that ask for the same word share it. Accesses of 8 bytes are
// served by half warps, those of 16 bytes by quarters.
void Counters::count_shared(const Warp& w, const Instruction& i, const Addresses& a) {
  const int at_once = i.bytes <= 4 ? 32 : i.bytes == 8 ? 16 : 8;
  shared_requests++;
  for (int first = 0; first < lanes; first += at_once) {
    uint64_t words[lanes * 4];
    int count = 0;
    for (int lane = first; lane < first + at_once; lane++)
      if (has_lane(w.active, lane))
        for (int k = 0; k < std::max(1, i.bytes / 4); k++) words[count++] = a.of[lane] / 4 + k;
    std::sort(words, words + count);
    count = int(std::unique(words, words + count) - words);
    int in_bank[32] = {}, most = 0;
    for (int k = 0; k < count; k++) most = std::max(most, ++in_bank[words[k] % 32]);
    shared_wavefronts += most;
  }
}

void Counters::begin_block(const Launch& launch, int warps) {
  warps_.resize(size_t(warps));
  for (WarpTime& w : warps_) {
    w.begin = w.latest = {};
    w.issued = 0;
    w.copied = {};
    w.groups.clear();
    w.ready.assign(launch.kernel->constants_place / 4 + 1, {});
  }
}

void Counters::count_instruction(const Warp& w, const Instruction& i) {
  const size_t c = size_t(i.cost);
  warp_instructions[c]++;
  lane_instructions[c] += std::popcount(w.active);
  WarpTime& t = warps_[w.index];
  Chain start = t.begin;
  for (int k = 0; k < i.read_count; k++)
    if (i.reads[k] / 4 < t.ready.size()) start = later(start, t.ready[i.reads[k] / 4]);
  Chain result = start;
  result.cycles += latency_of(i.cost);
  if (i.cost == Class::global_load || i.cost == Class::atomic || i.cost == Class::async_copy) result.loads++;
  for (int k = 0; k < i.write_count; k++) t.ready[i.writes[k] / 4] = result;
  t.latest = later(t.latest, start);
  t.issued++;
  if (i.copying == Copying::start) t.copied = later(t.copied, result);
  if (i.copying == Copying::commit) t.groups.push_back(t.copied);
  const size_t pending = size_t(i.address.displacement);  // of a wait
  if (i.copying == Copying::wait && t.groups.size() > pending) {
    t.begin = t.latest = later(t.end(), t.groups[t.groups.size() - 1 - pending]);
    t.issued = 0;
  } else if (i.flow != Flow::next && i.flow != Flow::meeting) {
    t.begin = t.latest = t.end();
    t.issued = 0;
  }
}

Chain Counters::WarpTime::end() const {
  Chain by_issue = begin;
  by_issue.cycles += issued;
  return later(latest, by_issue);
}

void Counters::pass_barrier() {
  Chain last;
  for (const WarpTime& w : warps_) last = later(last, w.end());
  last.cycles += latency_of(Class::barrier);
  last.barriers++;
  for (WarpTime& w : warps_) w.begin = w.latest = last, w.issued = 0;
}

void Counters::end_block() {
  Chain last;
  for (const WarpTime& w : warps_) last = later(last, w.end());
  block_cycles += last.cycles;
  longest = later(longest, last);
}

void Counters::end_launch(uint64_t blocks_run, uint64_t threads_run) {
  launches++;
  blocks += blocks_run;
  threads += threads_run;
  warps_.clear();
}

void Counters::add(const Counters& o) {
  launches += o.launches, blocks += o.blocks, threads += o.threads;
  for (size_t c = 0; c < size_t(Class::count); c++) {
    warp_instructions[c] += o.warp_instructions[c];
    lane_instructions[c] += o.lane_instructions[c];
  }
  load_requests += o.load_requests, load_sectors += o.load_sectors, load_bytes += o.load_bytes;
  store_requests += o.store_requests, store_sectors += o.store_sectors, store_bytes += o.store_bytes;
  loaded_footprint += o.loaded_footprint, stored_footprint += o.stored_footprint;
  shared_requests += o.shared_requests, shared_wavefronts += o.shared_wavefronts;
  branches += o.branches, divergent_branches += o.divergent_branches;
  block_cycles += o.block_cycles;
  longest = later(longest, o.longest);
}

}  // namespace ptx
