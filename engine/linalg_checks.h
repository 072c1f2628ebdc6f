// The checks of arguments in linalg_host.cpp, linalg_cuda.cu and linalg.cu. They throw InputError.
#pragma once
#include <string>

#include "engine/error.h"

namespace baton::linalg {

inline void check_extent(const char* what, const char* name, int value) {
  if (value < 0) throw InputError(std::string(what) + ": " + name + " is " + std::to_string(value));
}

// A matrix [rows x columns] whose rows lie `leading` elements apart.
inline void check_matrix(const char* what, const char* name, int rows, int columns, int leading) {
  if (leading < columns)
    throw InputError(std::string(what) + ": " + name + " [" + std::to_string(rows) + " x " + std::to_string(columns) +
                     "] has the leading dimension " + std::to_string(leading));
}

inline void check_multiply(bool transpose_a, bool transpose_b, int m, int n, int k, int lda, int ldb, int ldc) {
  check_extent("multiply", "m", m);
  check_extent("multiply", "n", n);
  check_extent("multiply", "k", k);
  check_matrix("multiply", "A", transpose_a ? k : m, transpose_a ? m : k, lda);
  check_matrix("multiply", "B", transpose_b ? n : k, transpose_b ? k : n, ldb);
  check_matrix("multiply", "C", m, n, ldc);
}

inline void check_rank_update(bool transpose, int n, int k, int lda, int ldc) {
  check_extent("rank_update", "n", n);
  check_extent("rank_update", "k", k);
  check_matrix("rank_update", "A", transpose ? k : n, transpose ? n : k, lda);
  check_matrix("rank_update", "C", n, n, ldc);
}

inline void check_order(const char* what, int n, int largest) {
  if (n < 0 || n > largest)
    throw InputError(std::string(what) + ": a matrix of order " + std::to_string(n) + ", planned for at most " +
                     std::to_string(largest));
}

inline void check_solve(int n, int largest, int columns, int ldb) {
  check_order("solve", n, largest);
  check_extent("solve", "the number of columns", columns);
  check_matrix("solve", "B", n, columns, ldb);
}

}  // namespace baton::linalg
