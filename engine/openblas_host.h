// OpenBLAS as the host build uses it: one thread a call, inside our own loops, and the kernels of this processor.
#pragma once

namespace baton {

// To be called before any call of OpenBLAS; only the first does something.
void prepare_openblas();

}  // namespace baton
