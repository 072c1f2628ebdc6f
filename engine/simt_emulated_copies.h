// A thread's asynchronous copies in the emulator (simt_emulated.cpp, which alone includes this and has no sanitizers).
//
// A copy is under way until the thread has waited for it: its destination is NaN. Then it has arrived: the thread sees
// it, and no other one does, so it is placed in memory while the thread runs and hidden, NaN again, while another runs.
// A barrier ends that: it shows the copy to all.
#pragma once
#include "engine/simt.h"

namespace baton::simt::emu {

class Copies {
 public:
  static constexpr int most = 256;  // at once

  void clear() { first_ = arrived_ = count_ = 0, group_ = 0; }
  bool full() const { return count_ == most; }
  bool any_arrived() const { return arrived_ > 0; }
  // The oldest that is under way, or nullptr.
  const Copy* under_way() const { return arrived_ < count_ ? &ring_[(first_ + arrived_) % most] : nullptr; }

  void start(const Copy& copy) {
    if (!ring_) ring_ = new Copy[most];
    for (int k = 0; k < arrived_; k++)  // the thread alone has used this place since, and does so again
      if (Copy& old = of(k); old.to < copy.to + copy.words && copy.to < old.to + old.words) old.words = 0;
    for (; arrived_ && of(0).words == 0; drop()) continue;
    of(count_) = copy;
    of(count_++).group = group_;
  }
  void commit() { group_++; }
  // Whether a wait for all groups but the last `pending` lets another copy arrive; which.
  bool next_arrival(unsigned pending, Copy& copy) {
    if (arrived_ == count_ || of(arrived_).group + pending >= group_) return false;
    copy = of(arrived_++);
    return true;
  }

  // Word by word, as the sanitizers would see memcpy.
  void place() {
    for (int k = 0; k < arrived_; k++)
      for (int i = 0; i < of(k).words; i++) static_cast<volatile Word*>(of(k).to)[i] = of(k).data[i];
  }
  void hide() {  // what the thread has made of them is kept
    for (int k = 0; k < arrived_; k++)
      for (int i = 0; i < of(k).words; i++) {
        volatile Word& word = of(k).to[i];
        of(k).data[i] = word;
        word = ~0u;
      }
  }
  // For all from now on. `hidden`: the thread does not run.
  void show(bool hidden) {
    if (hidden) place();
    while (arrived_) drop();
  }

 private:
  Copy& of(int k) { return ring_[(first_ + k) % most]; }
  void drop() { first_ = (first_ + 1) % most, arrived_--, count_--; }

  int first_ = 0, arrived_ = 0, count_ = 0;  // in the ring, in the order in which they were started
  unsigned group_ = 0;                       // the one that is open
  Copy* ring_ = nullptr;                     // made once, for the sanitizers know nothing of it
};

}  // namespace baton::simt::emu
