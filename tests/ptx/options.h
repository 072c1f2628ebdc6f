// What the environment asks of the interpreter and the stand-ins.
//
//   BATON_PTX_SEED=n         0 (the default): blocks, warps and lanes in order. Otherwise a random schedule: lanes
//   apart
//                            until they must meet, warps and blocks in random order, operations when somebody waits.
//   BATON_PTX_PROFILE=FILE   counts what kernels do and writes it to FILE as JSON when the process ends (profile.h)
//   BATON_PTX_DISTURB=LIST   makes the libraries behave as differently as the real ones may; of, with commas between:
//       sums           one product and many (strided batches) add in different orders, and so does another batch count
//       convolutions   a convolution's result has errors of a few units in the last place of its largest element, of
//                      both signs, also where the exact result is 0
//       unsupported    the first algorithm of every convolution that the heuristics offer is refused when it is used
#pragma once
#include <cstdint>
#include <string>

namespace ptx {

struct Options {
  uint64_t seed = 0;
  std::string profile;  // empty: do not count
  bool disturb_sums = false, disturb_convolutions = false, refuse_first_algorithm = false;
};

// Read once. Ends the process with a message for a value that is not understood.
const Options& options();

}  // namespace ptx
