// Dropout (Srivastava et al. 2014): x *= m / (1 - p), where m is 1 with probability 1 - p, else 0, drawn anew for each
// element, replica and step. In place, and the same for the gradient: the mask is a function of its counter, so the way
// back draws it again.
#pragma once
#include "kernels/step_state.h"

namespace baton {

// x [replicas][count]; rate p in [0, 1). With q = ceil(count / 4), element i of replica r is dropped when word i / q of
// philox((i mod q, stream_id, step, first_replica + r), noise) is below p 2^32. states[0] gives step and key.
// rounded: the results are written as tf32 numbers, for tensor cores multiply them.
void dropout(float* x, size_t count, int replicas, float rate, const StepState* states, uint32_t stream_id, Stream,
             int first_replica = 0, bool rounded = false);

}  // namespace baton
