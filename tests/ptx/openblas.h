// OpenBLAS and its LAPACK by one name for float and double, columns first, on one thread: the bits of a result do not
// depend on the number of cores.
#pragma once
#include <cblas.h>

#include <vector>

#include "engine/openblas_host.h"

extern "C" {
void spotrf_(const char* uplo, const int* n, float* a, const int* lda, int* info);
void dpotrf_(const char* uplo, const int* n, double* a, const int* lda, int* info);
void spotri_(const char* uplo, const int* n, float* a, const int* lda, int* info);
void dpotri_(const char* uplo, const int* n, double* a, const int* lda, int* info);
void ssyevd_(const char* jobz, const char* uplo, const int* n, float* a, const int* lda, float* w, float* work,
             const int* lwork, int* iwork, const int* liwork, int* info);
void dsyevd_(const char* jobz, const char* uplo, const int* n, double* a, const int* lda, double* w, double* work,
             const int* lwork, int* iwork, const int* liwork, int* info);
}

namespace ptx::openblas {

template <class Real>
struct Functions;
template <>
struct Functions<float> {
  static constexpr auto gemm = cblas_sgemm;
  static constexpr auto syrk = cblas_ssyrk;
  static constexpr auto trsm = cblas_strsm;
  static constexpr auto potrf = spotrf_;
  static constexpr auto potri = spotri_;
  static constexpr auto syevd = ssyevd_;
};
template <>
struct Functions<double> {
  static constexpr auto gemm = cblas_dgemm;
  static constexpr auto syrk = cblas_dsyrk;
  static constexpr auto trsm = cblas_dtrsm;
  static constexpr auto potrf = dpotrf_;
  static constexpr auto potri = dpotri_;
  static constexpr auto syevd = dsyevd_;
};

inline CBLAS_TRANSPOSE op(bool transposed) { return transposed ? CblasTrans : CblasNoTrans; }
inline CBLAS_UPLO triangle(bool lower) { return lower ? CblasLower : CblasUpper; }

// C[m][n] = alpha op(A) op(B) + beta C
template <class Real>
void gemm(bool ta, bool tb, int m, int n, int k, Real alpha, const Real* a, int lda, const Real* b, int ldb, Real beta,
          Real* c, int ldc) {
  baton::prepare_openblas();
  Functions<Real>::gemm(CblasColMajor, op(ta), op(tb), m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

// A triangle of C[n][n] = alpha op(A) op(A)' + beta C
template <class Real>
void syrk(bool lower, bool ta, int n, int k, Real alpha, const Real* a, int lda, Real beta, Real* c, int ldc) {
  baton::prepare_openblas();
  Functions<Real>::syrk(CblasColMajor, triangle(lower), op(ta), n, k, alpha, a, lda, beta, c, ldc);
}

// B[m][n] becomes X with op(A) X = alpha B, or X op(A) = alpha B.
template <class Real>
void trsm(bool left, bool lower, bool ta, bool unit, int m, int n, Real alpha, const Real* a, int lda, Real* b,
          int ldb) {
  baton::prepare_openblas();
  Functions<Real>::trsm(CblasColMajor, left ? CblasLeft : CblasRight, triangle(lower), op(ta),
                        unit ? CblasUnit : CblasNonUnit, m, n, alpha, a, lda, b, ldb);
}

// The factorisations return LAPACK's info.
template <class Real>
int potrf(bool lower, int n, Real* a, int lda) {
  baton::prepare_openblas();
  int info = 0;
  Functions<Real>::potrf(lower ? "L" : "U", &n, a, &lda, &info);
  return info;
}
template <class Real>
int potri(bool lower, int n, Real* a, int lda) {
  baton::prepare_openblas();
  int info = 0;
  Functions<Real>::potri(lower ? "L" : "U", &n, a, &lda, &info);
  return info;
}
template <class Real>
int syevd(bool vectors, bool lower, int n, Real* a, int lda, Real* values) {
  baton::prepare_openblas();
  std::vector<Real> work(1 + 6 * size_t(n) + 2 * size_t(n) * n);  // what LAPACK needs at least, with vectors
  std::vector<int> integers(3 + 5 * size_t(n));
  const int work_size = int(work.size()), integers_size = int(integers.size());
  int info = 0;
  Functions<Real>::syevd(vectors ? "V" : "N", lower ? "L" : "U", &n, a, &lda, values, work.data(), &work_size,
                         integers.data(), &integers_size, &info);
  return info;
}

}  // namespace ptx::openblas
