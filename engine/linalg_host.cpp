// Dense linear algebra on the host: OpenBLAS and its LAPACK with one thread a call, in our own parallel loops over
// fixed tiles. So a result does not depend on the number of threads, and no second thread pool competes with OpenMP's.
//
// LAPACK is column-major, and to it a row-major matrix is its transpose. Our lower triangle is its upper one, our
// A = L L' its A = U' U with U = L', and its eigenvectors, which are columns there, are rows here.
#include <cblas.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <type_traits>
#include <vector>

#include "engine/linalg.h"
#include "engine/linalg_checks.h"
#include "engine/openblas_host.h"

// Fortran passes the lengths of strings after the arguments.
extern "C" {
void spotrf_(const char* triangle, const int* n, float* a, const int* lda, int* info, size_t);
void dpotrf_(const char* triangle, const int* n, double* a, const int* lda, int* info, size_t);
void spotri_(const char* triangle, const int* n, float* a, const int* lda, int* info, size_t);
void dpotri_(const char* triangle, const int* n, double* a, const int* lda, int* info, size_t);
void ssyevd_(const char* job, const char* triangle, const int* n, float* a, const int* lda, float* values, float* work,
             const int* lwork, int* iwork, const int* liwork, int* info, size_t, size_t);
void dsyevd_(const char* job, const char* triangle, const int* n, double* a, const int* lda, double* values,
             double* work, const int* lwork, int* iwork, const int* liwork, int* info, size_t, size_t);
}

namespace baton {

namespace {

// How many pieces a product is cut into. It depends on the shape alone. There are few, because each costs a copy of the
// operand that is not cut: 8 pieces of [64 x 768][768 x 768] are 15 % slower on one thread than the whole.
constexpr double flops_per_tile = 16e6;
constexpr int most_tiles = 4;
constexpr double worth_threads = 4e6;  // flops

template <class Real>
struct Library;
template <>
struct Library<float> {
  static constexpr auto gemm = cblas_sgemm;
  static constexpr auto syrk = cblas_ssyrk;
  static constexpr auto trsm = cblas_strsm;
  static constexpr auto trsv = cblas_strsv;
  static constexpr auto potrf = spotrf_;
  static constexpr auto potri = spotri_;
  static constexpr auto syevd = ssyevd_;
};
template <>
struct Library<double> {
  static constexpr auto gemm = cblas_dgemm;
  static constexpr auto syrk = cblas_dsyrk;
  static constexpr auto trsm = cblas_dtrsm;
  static constexpr auto trsv = cblas_dtrsv;
  static constexpr auto potrf = dpotrf_;
  static constexpr auto potri = dpotri_;
  static constexpr auto syevd = dsyevd_;
};

CBLAS_TRANSPOSE op(bool transpose) { return transpose ? CblasTrans : CblasNoTrans; }
int leading(int ld) { return std::max(1, ld); }  // BLAS demands at least 1, also of a matrix without columns

// The length of an extent's tiles: whole register tiles, at least `least`.
int tile_step(int extent, double flops, int least) {
  const int wanted = int(std::clamp(flops / flops_per_tile, 1.0, double(most_tiles)));
  return std::max(least, ((extent + wanted - 1) / wanted + 15) / 16 * 16);
}

// How C is cut: into tiles of `step` rows, or columns.
struct Cut {
  bool rows;
  int step;
};

// Where C has few rows, narrow tiles are faster even on one thread. Up to m n k = 10^6, and with B' also up to m n =
// 1200, OpenBLAS multiplies in place; above, it first copies B into another layout, which takes longer than a few rows
// of C. The table has the microseconds for [m x 768][768 x 768] as one call, as m products with a vector, and in such
// tiles (AMD EPYC with AVX-512, one thread, OpenBLAS 0.3.21; reading the matrix of doubles once takes 22):
//
//                double, B           double, B'          float, B            float, B'
//   m =  1      58   65   58        61   62   61        37   30   37        30   30   30
//   m =  2     179  132   60       205  126   74       111   59   37       149   60   32
//   m =  4     244  272  102       263  260  107       138  117   50       178  120   50
//   m = 10     344  690  234       379  641  263       203  294  115       238  301  114
//   m = 16     480 1094  352       537 1037  360       248  485  166       280  486  176
//   m = 32     872 2188  727       875 2011  745       422  959  356       456  969  342
constexpr int few_rows = 32, narrowest = 32;
constexpr double in_place_volume = 1e6, in_place_area = 1200;

Cut cut_product(bool transpose_b, int m, int n, int k) {
  if (m <= few_rows) {
    double columns = in_place_volume / (double(m) * std::max(1, k));
    if (transpose_b && k >= 32) columns = std::min(columns, in_place_area / m);
    if (columns >= narrowest && columns < n) return {false, int(columns) / narrowest * narrowest};
  }
  if (n <= few_rows && m > few_rows) {  // the same for few columns, as in the logits of many samples
    double rows = in_place_volume / (double(n) * std::max(1, k));
    if (transpose_b && k >= 32) rows = std::min(rows, in_place_area / n);
    if (rows >= narrowest && rows < m) return {true, int(rows) / 8 * 8};
  }
  const bool rows = m >= n;
  return {rows, tile_step(rows ? m : n, 2.0 * m * n * k, 16)};
}

// Copies the lower triangle to the upper one, by tiles that fit in the first-level cache. It cannot be mirror_lower():
// in the emulated builds the kernels are in another library, which depends on this one.
template <class Real>
void mirror(Real* a, int n) {
  constexpr int tile = 32;
  for (int i0 = 0; i0 < n; i0 += tile)
    for (int j0 = 0; j0 <= i0; j0 += tile)
      for (int j = j0; j < std::min(j0 + tile, n); j++)
        for (int i = std::max(i0, j + 1); i < std::min(i0 + tile, n); i++) a[size_t(j) * n + i] = a[size_t(i) * n + j];
}

}  // namespace

template <class Real>
void multiply(Device&, bool transpose_a, bool transpose_b, int m, int n, int k, Real alpha, const Real* a, int lda,
              const Real* b, int ldb, Real beta, Real* c, int ldc) {
  linalg::check_multiply(transpose_a, transpose_b, m, n, k, lda, ldb, ldc);
  if (m == 0 || n == 0) return;
  prepare_openblas();
  if (m == 1 && transpose_a && lda == 1)
    transpose_a = false, lda = k;  // the same vector; A' B' takes three times as long
  const Cut cut = cut_product(transpose_b, m, n, k);
  const int extent = cut.rows ? m : n, tiles = (extent + cut.step - 1) / cut.step;
  const auto multiply_tile = [&](int t) {
    const int first = t * cut.step, count = std::min(cut.step, extent - first);
    const Real *from_a = a, *from_b = b;
    Real* to = c;
    if (cut.rows) from_a += transpose_a ? first : size_t(first) * lda, to += size_t(first) * ldc;
    else from_b += transpose_b ? size_t(first) * ldb : first, to += first;
    Library<Real>::gemm(CblasRowMajor, op(transpose_a), op(transpose_b), cut.rows ? count : m, cut.rows ? n : count, k,
                        alpha, from_a, leading(lda), from_b, leading(ldb), beta, to, ldc);
  };
  if (tiles == 1) return multiply_tile(0);  // a small product is faster than the start of a parallel region
#pragma omp parallel for schedule(static) if (2.0 * m * n * k > worth_threads)
  for (int t = 0; t < tiles; t++) multiply_tile(t);
}

// A tile is a run of rows up to and including its piece of the diagonal. The longest rows come first, as they take the
// most time.
template <class Real>
void rank_update(Device&, bool transpose, int n, int k, Real alpha, const Real* a, int lda, Real beta, Real* c,
                 int ldc) {
  linalg::check_rank_update(transpose, n, k, lda, ldc);
  if (n == 0) return;
  prepare_openblas();
  const int step = tile_step(n, double(n) * n * k, 16), tiles = (n + step - 1) / step;
  const auto update_tile = [&](int t) {
    const int first = t * step, count = std::min(step, n - first);
    const Real* rows = a + (transpose ? first : size_t(first) * lda);
    Real* to = c + size_t(first) * ldc;
    if (first > 0)
      Library<Real>::gemm(CblasRowMajor, op(transpose), op(!transpose), count, first, k, alpha, rows, leading(lda), a,
                          leading(lda), beta, to, ldc);
    Library<Real>::syrk(CblasRowMajor, CblasLower, op(transpose), count, k, alpha, rows, leading(lda), beta, to + first,
                        ldc);
  };
  if (tiles == 1) return update_tile(0);
#pragma omp parallel for schedule(dynamic)
  for (int t = tiles - 1; t >= 0; t--) update_tile(t);
}

template <class Real>
struct Factorizer<Real>::Workspace {
  Real* work = nullptr;
  int* integers = nullptr;
  int work_size = 0, integers_size = 0;
};

template <class Real>
Factorizer<Real>::Factorizer(Device& device, Arena& arena, int largest) : device_(device), largest_(largest) {
  linalg::check_extent("Factorizer", "the largest order", largest);
  prepare_openblas();
  workspace_ = std::make_unique<Workspace>();
  Workspace& w = *workspace_;
  const int ask = -1, lda = leading(largest);
  int info = 0;
  Real size = 0, none = 0;
  Library<Real>::syevd("V", "U", &largest, &none, &lda, &none, &size, &ask, &w.integers_size, &ask, &info, 1, 1);
  if (info != 0) throw RunError("syevd: its workspace for order " + std::to_string(largest) + " is not known");
  // The size came as a float and may be rounded, so it is at least what LAPACK's documentation demands.
  const double least = 1 + 6.0 * largest + 2.0 * largest * largest;
  const double wanted = std::max(double(size), least);
  if (wanted > 2147483647.)
    throw InputError("Factorizer: eigenvectors of order " + std::to_string(largest) + " need too large a workspace");
  w.work_size = int(wanted);
  w.work = arena.take<Real>(w.work_size);
  w.integers = arena.take<int>(w.integers_size);
}

template <class Real>
Factorizer<Real>::~Factorizer() = default;
template <class Real>
Factorizer<Real>::Factorizer(Factorizer&&) noexcept = default;

template <class Real>
int Factorizer<Real>::cholesky(Real* a, int n) {
  linalg::check_order("cholesky", n, largest_);
  if (n == 0) return 0;
  int info = 0;
  Library<Real>::potrf("U", &n, a, &n, &info, 1);
  if (info < 0) throw RunError("potrf refuses its argument " + std::to_string(-info));
  // OpenBLAS stops at pivots <= 0, which a NaN is not. A NaN spreads only to later rows, so the first of them is the
  // right answer.
  const int factorised = info > 0 ? info - 1 : n;
  for (int i = 0; i < factorised; i++)
    if (!std::isfinite(a[size_t(i) * n + i])) return i + 1;
  return info;
}

template <class Real>
void Factorizer<Real>::invert(Real* l, int n) {
  linalg::check_order("invert", n, largest_);
  if (n == 0) return;
  int info = 0;
  Library<Real>::potri("U", &n, l, &n, &info, 1);
  if (info != 0) throw RunError("invert: element " + std::to_string(info) + " of the factor's diagonal is 0");
  mirror(l, n);
}

// For few right-hand sides a substitution for each is faster than OpenBLAS's trsm, which first prepares blocks of L. At
// order 768 one takes 40 us instead of 228, four 174 instead of 235 (transposed 185, 363), ten 437 instead of 378
// (transposed 474, 512).
template <class Real>
void Factorizer<Real>::solve(bool transpose, const Real* l, int n, Real* b, int columns, int ldb) {
  linalg::check_solve(n, largest_, columns, ldb);
  if (n == 0 || columns == 0) return;
  if (columns <= 4) {
    for (int j = 0; j < columns; j++)
      Library<Real>::trsv(CblasRowMajor, CblasLower, op(transpose), CblasNonUnit, n, l, n, b + j, ldb);
    return;
  }
  const int step = tile_step(columns, double(n) * n * columns, 64), tiles = (columns + step - 1) / step;
#pragma omp parallel for schedule(static) if (tiles > 1)
  for (int t = 0; t < tiles; t++)
    Library<Real>::trsm(CblasRowMajor, CblasLeft, CblasLower, op(transpose), CblasNonUnit, n,
                        std::min(step, columns - t * step), Real(1), l, n, b + size_t(t) * step, ldb);
}

template <class Real>
double Factorizer<Real>::log_determinant(const Real* l, int n) {
  linalg::check_order("log_determinant", n, largest_);
  double sum = 0;
  for (int i = 0; i < n; i++) sum += std::log(double(l[size_t(i) * n + i]));
  return 2 * sum;
}

template <class Real>
int Factorizer<Real>::eigen(Real* a, Real* values, int n) {
  linalg::check_order("eigen", n, largest_);
  if (n == 0) return 0;
  for (int i = 0; i < n; i++)  // with an element that is not finite, LAPACK may not even return
    for (int j = 0; j <= i; j++)
      if (!std::isfinite(a[size_t(i) * n + j])) return i + 1;
  Workspace& w = *workspace_;
  int info = 0;
  Library<Real>::syevd("V", "U", &n, a, &n, values, w.work, &w.work_size, w.integers, &w.integers_size, &info, 1, 1);
  if (info < 0) throw RunError("syevd refuses its argument " + std::to_string(-info));
  return info;
}

#define BATON_INSTANTIATE(Real)                                                                                     \
  template void multiply(Device&, bool, bool, int, int, int, Real, const Real*, int, const Real*, int, Real, Real*, \
                         int);                                                                                      \
  template void rank_update(Device&, bool, int, int, Real, const Real*, int, Real, Real*, int);                     \
  template class Factorizer<Real>
BATON_INSTANTIATE(float);
BATON_INSTANTIATE(double);
#undef BATON_INSTANTIATE

}  // namespace baton
