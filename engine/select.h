// Device-wide selection: CUB on the GPU, the standard library on the host.
#pragma once
#include "engine/runtime.h"

namespace baton {

struct Selection {
  float threshold;  // the largest score that is marked
  int count;        // how many are marked
};

// marked[i] = 1 for the `lowest` smallest of scores[count], else 0. Of equal scores the first are marked, so that
// exactly `lowest` are. Throws InputError where lowest > count, or where a score is NaN, which has no place in an
// order. Its workspace is the device's Scratch, so it must not be called within a captured step.
Selection mark_lowest(Device&, uint8_t* marked, const float* scores, int count, int lowest);

}  // namespace baton
