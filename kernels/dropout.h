// Dropout (Srivastava et al. 2014): x *= m / (1 - p), m = 1 with probability 1 - p, for each element of each replica
// anew at every step. In place, forward and backward alike: the mask is a function of its counter, so the gradient's
// pass draws it again.
#pragma once
#include "kernels/step_state.h"

namespace baton {

// x [replicas][count]; rate p in [0, 1). Element i of replica r, with q = ceil(count / 4): word i / q of
// philox((i mod q, stream_id, step, first_replica + r), noise); it is dropped when word < p 2^32. Step and key from
// states[0].
void dropout(float* x, size_t count, int replicas, float rate, const StepState* states, uint32_t stream_id, Stream,
             int first_replica = 0);

}  // namespace baton
