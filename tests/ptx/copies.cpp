#include "tests/ptx/copies.h"

#include <algorithm>
#include <cstring>

namespace ptx {

namespace {

ThreadCopies* copies_of(const Warp& w, int lane) {
  std::vector<ThreadCopies>& all = w.block->copies;
  return all.empty() ? nullptr : &all[w.index * lanes + uint32_t(lane)];
}
bool has_byte(const PendingCopy& c, uint32_t offset) { return offset - c.offset < c.bytes; }

template <class Arrives>
void let_arrive(Warp& w, Arrives arrives) {
  for (int lane = 0; lane < lanes; lane++) {
    ThreadCopies* t = has_lane(w.active, lane) ? copies_of(w, lane) : nullptr;
    if (!t) continue;
    for (PendingCopy& c : t->copies) {
      if (c.arrived || !arrives(*t, c)) continue;
      std::memcpy(&w.block->shared[c.offset], c.data, c.bytes);
      c.arrived = true;
    }
  }
}

}  // namespace

void start_copy(Warp& w, const Instruction& i, int lane, uint32_t offset, const char* data) {
  Block& block = *w.block;
  if (block.copies.empty()) block.copies.resize((block.launch->block.count() + lanes - 1) / lanes * lanes);
  ThreadCopies& t = *copies_of(w, lane);
  // What an older copy has brought to this place, the thread alone has used.
  std::erase_if(t.copies, [&](const PendingCopy& c) {
    return c.arrived && c.offset < offset + i.bytes && offset < c.offset + c.bytes;
  });
  t.copies.push_back({&i, offset, i.bytes, t.group, false, {}});
  std::memcpy(t.copies.back().data, data, i.bytes);
  std::memset(&block.shared[offset], 0xff, i.bytes);
  std::memset(&block.shared_state[offset], Block::unwritten, i.bytes);
}

void commit_copies(Warp& w) {
  for (int lane = 0; lane < lanes; lane++)
    if (ThreadCopies* t = has_lane(w.active, lane) ? copies_of(w, lane) : nullptr) t->group++;
}

void await_copies(Warp& w, uint32_t groups) {
  let_arrive(w, [&](const ThreadCopies& t, const PendingCopy& c) { return c.group + groups < t.group; });
}
void await_all_copies(Warp& w) {
  let_arrive(w, [](const ThreadCopies&, const PendingCopy&) { return true; });
}

void show_copies(Warp& w, uint32_t mask) {
  if (w.block->copies.empty()) return;
  for (int lane = 0; lane < lanes; lane++) {
    if (!has_lane(mask, lane)) continue;
    std::erase_if(copies_of(w, lane)->copies, [&](const PendingCopy& c) {
      if (c.arrived) std::memset(&w.block->shared_state[c.offset], Block::written, c.bytes);
      return c.arrived;
    });
  }
}

void expect_no_copies(const Warp& w) {
  if (w.block->copies.empty()) return;
  for (int lane = 0; lane < lanes; lane++)
    if (const ThreadCopies* t = copies_of(w, lane))
      for (const PendingCopy& c : t->copies)
        if (!c.arrived) fail(w, *c.instruction, lane, "the kernel ends before it has waited for this copy");
}

bool has_arrived(const Warp& w, int lane, uint32_t offset) {
  const ThreadCopies* t = copies_of(w, lane);
  return t && std::any_of(t->copies.begin(), t->copies.end(),
                          [&](const PendingCopy& c) { return c.arrived && has_byte(c, offset); });
}
bool is_copied(const Block& block, uint32_t offset) {
  for (const ThreadCopies& t : block.copies)
    for (const PendingCopy& c : t.copies)
      if (has_byte(c, offset)) return true;
  return false;
}

}  // namespace ptx
