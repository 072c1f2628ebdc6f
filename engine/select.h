// Device-wide selection: CUB on the GPU, the standard library on the host.
#pragma once
#include "engine/runtime.h"

namespace baton {

struct Selection {
  float threshold;  // the greatest of the lowest
  int count;        // how many are marked
};

// Marks (1, else 0) the `lowest` smallest of scores[count]; of equal scores those that come first. Marks exactly
// `lowest`. Scores must not be NaN (their order would have no meaning): InputError. lowest > count: InputError.
// Its workspace lies in the device's Scratch (so not within a captured step).
Selection mark_lowest(Device&, uint8_t* marked, const float* scores, int count, int lowest);

}  // namespace baton
