// What the stand-in of cuDNN offers for a convolution: a table like the real heuristics', with everything in it that a
// program must not take, and the memory of what was offered and what ran.
#pragma once
#include <cudnn.h>

#include <compare>
#include <vector>

#include "tests/ptx/convolution.h"

namespace ptx {

enum class Direction { forward, data_gradient, weight_gradient };

struct Problem {
  Direction direction;
  ConvolutionShape shape;
  auto operator<=>(const Problem&) const = default;
};

// What can be said of the error of a result.
enum class Exactness {
  sum,        // a sum of products, in some order
  transform,  // Winograd and FFT: about 1e-6 of the largest element, also where the exact result is 0
  atomics,    // a sum whose order, and so its last bits, differ from call to call
};

struct Candidate {
  int algorithm;         // of the direction's own enumeration
  cudnnMathType_t math;  // what it computes with; DEFAULT and FMA are both float32 under a descriptor that says FMA
  Exactness exactness;
  cudnnStatus_t status;
  size_t memory;  // of the workspace, in bytes
  float milliseconds;
};

// All that the heuristics know of, the fastest first and those that do not support the problem last.
std::vector<Candidate> candidates(const Problem&);

// The first `count` candidates, which may be run from now on.
std::vector<Candidate> offer(const Problem&, int count);

// What was offered as `algorithm` for this problem and runs under a descriptor of this math type. Throws Fault where
// that was not offered.
Candidate offered(const Problem&, int algorithm, cudnnMathType_t descriptor);

// Under the disturbance `unsupported`: whether this is the algorithm that was tried first for this problem, which is
// refused then and ever after.
bool refused_under_disturbance(const Problem&, int algorithm);

// Whether the algorithm ran for this problem and math type, which a capture's first call does not do.
bool has_run(const Problem&, int algorithm, cudnnMathType_t);
void note_run(const Problem&, int algorithm, cudnnMathType_t);

}  // namespace ptx
