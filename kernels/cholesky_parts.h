// What cholesky.cu and cholesky_convert.cu share, and nobody else includes.
#pragma once
#include "kernels/cholesky.h"

namespace baton {

namespace {  // a copy in each file

__host__ __device__ constexpr int diagonal(int i) { return i * (i + 3) / 2; }

// Throw InputError, which names the function `who`.
inline void check_blocks(const char* who, int blocks, int d, int replicas) {
  if (blocks < 1 || d < 1 || d > largest_block || replicas < 1)
    throw InputError(std::string(who) + ": " + std::to_string(replicas) + " replicas of " + std::to_string(blocks) +
                     " blocks of " + std::to_string(d) + " weights (at most " + std::to_string(largest_block) + ")");
}
inline void check_stride(const char* who, const char* what, size_t stride, size_t count) {
  if (stride < count)
    throw InputError(std::string(who) + ": replicas' " + what + " of " + std::to_string(count) + " elements lie " +
                     std::to_string(stride) + " apart");
}

}  // namespace

}  // namespace baton
