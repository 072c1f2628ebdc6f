// Setup of OpenBLAS for the host build: one thread a call, inside our own parallel loops, and the kernels of this
// processor.
#pragma once

namespace baton {

// Must be called before OpenBLAS is. Only the first call does anything.
void prepare_openblas();

}  // namespace baton
