// Asynchronous copies (cp.async) of a block's threads. What a copy writes counts as not written until its thread has
// waited for it and has come to a barrier. In between, this thread alone may read it.
#pragma once
#include "tests/ptx/warp.h"

namespace ptx {

// A lane's copy, which nobody sees yet, to `offset` of Block::shared.
void start_copy(Warp&, const Instruction&, int lane, uint32_t offset, const char* data);
void commit_copies(Warp&);                  // of the active lanes
void await_copies(Warp&, uint32_t groups);  // lets the copies arrive of all groups but the last ones, so many
void await_all_copies(Warp&);               // also of those in no group yet
void show_copies(Warp&, uint32_t mask);     // at a barrier: those that have arrived, of the lanes of the mask

// Throws Fault where a thread of this warp has a copy for which it has not waited.
void expect_no_copies(const Warp&);

// Whether a byte of shared memory is the destination of a copy that its thread has waited for, the thread being this
// lane; or of a copy of any thread.
bool has_arrived(const Warp&, int lane, uint32_t offset);
bool is_copied(const Block&, uint32_t offset);

}  // namespace ptx
