// The interface to the libraries for dense linear algebra in float and double: products, rank updates, factorisations.
// Host: OpenBLAS and its LAPACK; GPU: cuBLAS and cuSOLVER. All matrices are row-major with a leading dimension: element
// (i, j) of A is a[i * lda + j]. Instantiated for float and double.
// Every result has the same bits in every call with the same shapes, for any number of threads.
#pragma once
#include <memory>

#include "engine/runtime.h"

namespace baton {

// C = alpha op(A) op(B) + beta C: op(A) is m x k, op(B) is k x n, C is m x n. With beta = 0, C is not read. C overlaps
// neither operand. Throws InputError for a negative extent or a leading dimension shorter than its rows.
template <class Real>
void multiply(Device&, bool transpose_a, bool transpose_b, int m, int n, int k, Real alpha, const Real* a, int lda,
              const Real* b, int ldb, Real beta, Real* c, int ldc);

// The lower triangle of the symmetric C [n x n]: C = alpha A A' + beta C with A [n x k], or, transposed, alpha A' A +
// beta C with A [k x n]. The strict upper triangle is neither read nor written. Throws as multiply.
template <class Real>
void rank_update(Device&, bool transpose, int n, int k, Real alpha, const Real* a, int lda, Real beta, Real* c,
                 int ldc);

// Copies the lower triangle of A [n x n] into its upper one.
template <class Real>
void mirror_lower(Real* a, int n, int lda, Stream);

// Factorisations of symmetric matrices of an order up to `largest`, packed (leading dimension n). The workspace is
// taken from the arena before step 0. A matrix of a larger order throws InputError.
template <class Real>
class Factorizer {
 public:
  Factorizer(Device&, Arena&, int largest);
  ~Factorizer();
  Factorizer(Factorizer&&) noexcept;

  // A = L L' in place: reads and writes the lower triangle, and leaves the strict upper one as it is. Returns 0, or the
  // order of the first leading minor that is not positive definite (also for a NaN in it); A is then overwritten in
  // part. Waits for the result.
  int cholesky(Real* a, int n);
  // Replaces the lower factor L by the whole inverse (L L')^-1, both triangles. Throws RunError for a factor with 0 on
  // its diagonal; L is then overwritten in part. Waits for the result.
  void invert(Real* l, int n);
  // B = L^-1 B, or L'^-1 B (transpose); B [n x columns].
  void solve(bool transpose, const Real* l, int n, Real* b, int columns, int ldb);
  // ln det (L L') = 2 sum ln L_ii, in double. Waits for the result.
  double log_determinant(const Real* l, int n);
  // Eigenvalues in ascending order into values [n]; row i of A becomes the unit eigenvector of values[i]. Reads the
  // lower triangle. Returns 0. If an element there is not finite, returns the first such row, counted from 1, and
  // leaves A as it was. If it did not converge, returns another positive number. Waits for the result.
  int eigen(Real* a, Real* values, int n);

 private:
  struct Workspace;
  Device& device_;
  int largest_;
  std::unique_ptr<Workspace> workspace_;
};

}  // namespace baton
