// The PTX that nvcc has put into a program.
#pragma once
#include <string_view>

namespace ptx {

// Finds the PTX in the fat binary that a program registers (the wrapper that __cudaRegisterFatBinary is given). Throws
// Fault (unsupported) where there is none or where it is compressed.
std::string_view find_ptx(const void* wrapper);

}  // namespace ptx
