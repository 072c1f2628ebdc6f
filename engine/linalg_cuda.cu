// Dense linear algebra on the GPU: products by cuBLAS, factorisations by cuSOLVER in its deterministic mode. Both
// repeat bit for bit on one model of GPU with one version of the libraries.
//
// Both are column-major, and to them a row-major matrix is its transpose. So C = op(A) op(B) is called as
// C' = op(B)' op(A)'. Our lower triangle is their upper one, and our A = L L' their U' U with U = L'. Eigenvectors,
// which are columns there, are rows here. L X = B becomes X' U = B', with the triangle on the right.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "engine/cuda_libraries.h"
#include "engine/linalg.h"
#include "engine/linalg_checks.h"

namespace baton {

namespace {

template <class Real>
struct Library;
template <>
struct Library<float> {
  static constexpr auto gemm = cublasSgemm;
  static constexpr auto syrk = cublasSsyrk;
  static constexpr auto trsm = cublasStrsm;
  static constexpr auto copy = cublasScopy;
  static constexpr auto potrf = cusolverDnSpotrf;
  static constexpr auto potrf_size = cusolverDnSpotrf_bufferSize;
  static constexpr auto potri = cusolverDnSpotri;
  static constexpr auto potri_size = cusolverDnSpotri_bufferSize;
  static constexpr auto syevd = cusolverDnSsyevd;
  static constexpr auto syevd_size = cusolverDnSsyevd_bufferSize;
};
template <>
struct Library<double> {
  static constexpr auto gemm = cublasDgemm;
  static constexpr auto syrk = cublasDsyrk;
  static constexpr auto trsm = cublasDtrsm;
  static constexpr auto copy = cublasDcopy;
  static constexpr auto potrf = cusolverDnDpotrf;
  static constexpr auto potrf_size = cusolverDnDpotrf_bufferSize;
  static constexpr auto potri = cusolverDnDpotri;
  static constexpr auto potri_size = cusolverDnDpotri_bufferSize;
  static constexpr auto syevd = cusolverDnDsyevd;
  static constexpr auto syevd_size = cusolverDnDsyevd_bufferSize;
};

constexpr cublasFillMode_t lower = CUBLAS_FILL_MODE_UPPER;  // our lower triangle to a column-major library
constexpr cusolverEigMode_t vectors = CUSOLVER_EIG_MODE_VECTOR;

// *last = n - i, where i is the first row whose part of the lower triangle has an element that is not finite, if any.
template <class Real>
__global__ void find_not_finite_kernel(int* __restrict__ last, const Real* __restrict__ a, int n) {
  const int row = simt::warp_item();
  if (row >= n) return;
  int bad = 0;
  for (int j = simt::lane_id(); j <= row; j += simt::warp_size) bad |= !isfinite(a[size_t(row) * n + j]);
  if (bad) atomicMax(last, n - row);
}

cublasOperation_t op(bool transpose) { return transpose ? CUBLAS_OP_T : CUBLAS_OP_N; }
int leading(int ld) { return std::max(1, ld); }  // BLAS demands at least 1, also of a matrix without columns

}  // namespace

template <class Real>
void multiply(Device& device, bool transpose_a, bool transpose_b, int m, int n, int k, Real alpha, const Real* a,
              int lda, const Real* b, int ldb, Real beta, Real* c, int ldc) {
  linalg::check_multiply(transpose_a, transpose_b, m, n, k, lda, ldb, ldc);
  if (m == 0 || n == 0) return;
  BATON_CALL(Library<Real>::gemm, device.libraries().blas, op(transpose_b), op(transpose_a), n, m, k, &alpha, b,
             leading(ldb), a, leading(lda), &beta, c, ldc);
}

template <class Real>
void rank_update(Device& device, bool transpose, int n, int k, Real alpha, const Real* a, int lda, Real beta, Real* c,
                 int ldc) {
  linalg::check_rank_update(transpose, n, k, lda, ldc);
  if (n == 0) return;
  BATON_CALL(Library<Real>::syrk, device.libraries().blas, lower, op(!transpose), n, k, &alpha, a, leading(lda), &beta,
             c, ldc);
}

template <class Real>
struct Factorizer<Real>::Workspace {
  cusolverDnHandle_t solver = nullptr;
  Real* work = nullptr;  // one for all calls, as they follow one another on the stream
  Real* diagonal = nullptr;
  int* info = nullptr;
  int work_size = 0;

  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (solver) cusolverDnDestroy(solver);
  }

  void take(Device& device, Arena& arena, int largest) {
    BATON_CALL(cusolverDnCreate, &solver);
    BATON_CALL(cusolverDnSetStream, solver, device.stream());
    BATON_CALL(cusolverDnSetDeterministicMode, solver, CUSOLVER_DETERMINISTIC_RESULTS);
    diagonal = arena.take<Real>(largest);
    info = arena.take<int>(1);
    if (largest == 0) return;
    // A smaller matrix may need more; cuSOLVER does not rule it out. (These calls do not read the matrix.)
    for (int n = 1; n <= largest; n++) {
      int potrf = 0, potri = 0, syevd = 0;
      BATON_CALL(Library<Real>::potrf_size, solver, lower, n, diagonal, n, &potrf);
      BATON_CALL(Library<Real>::potri_size, solver, lower, n, diagonal, n, &potri);
      BATON_CALL(Library<Real>::syevd_size, solver, vectors, lower, n, diagonal, n, diagonal, &syevd);
      work_size = std::max({work_size, potrf, potri, syevd});
    }
    work = arena.take<Real>(work_size);
  }

  // The status of a factorisation. Waits until it is done.
  int report(Device& device, const char* what) const {
    int said = 0;
    copy_to_host(device, &said, info, sizeof said);
    if (said < 0) throw RunError(std::string(what) + " refuses its argument " + std::to_string(-said));
    return said;
  }

  std::vector<Real> diagonal_of(Device& device, const Real* a, int n) const {
    BATON_CALL(Library<Real>::copy, device.libraries().blas, n, a, n + 1, diagonal, 1);
    return download(device, diagonal, n);
  }
};

template <class Real>
Factorizer<Real>::Factorizer(Device& device, Arena& arena, int largest) : device_(device), largest_(largest) {
  linalg::check_extent("Factorizer", "the largest order", largest);
  workspace_ = std::make_unique<Workspace>();
  workspace_->take(device, arena, largest);
}

template <class Real>
Factorizer<Real>::~Factorizer() = default;
template <class Real>
Factorizer<Real>::Factorizer(Factorizer&&) noexcept = default;

template <class Real>
int Factorizer<Real>::cholesky(Real* a, int n) {
  linalg::check_order("cholesky", n, largest_);
  if (n == 0) return 0;
  const Workspace& w = *workspace_;
  BATON_CALL(Library<Real>::potrf, w.solver, lower, n, a, n, w.work, w.work_size, w.info);
  const int info = w.report(device_, "potrf");
  // cuSOLVER does not document what it does with a NaN. A NaN spreads only to later rows, so the first of them is the
  // right answer.
  const std::vector<Real> diagonal = w.diagonal_of(device_, a, n);
  const int factorised = info > 0 ? info - 1 : n;
  for (int i = 0; i < factorised; i++)
    if (!std::isfinite(diagonal[i])) return i + 1;
  return info;
}

template <class Real>
void Factorizer<Real>::invert(Real* l, int n) {
  linalg::check_order("invert", n, largest_);
  if (n == 0) return;
  const Workspace& w = *workspace_;
  BATON_CALL(Library<Real>::potri, w.solver, lower, n, l, n, w.work, w.work_size, w.info);
  if (const int info = w.report(device_, "potri"); info != 0)
    throw RunError("invert: element " + std::to_string(info) + " of the factor's diagonal is 0");
  mirror_lower(l, n, n, device_.stream());
}

template <class Real>
void Factorizer<Real>::solve(bool transpose, const Real* l, int n, Real* b, int columns, int ldb) {
  linalg::check_solve(n, largest_, columns, ldb);
  if (n == 0 || columns == 0) return;
  const Real one = 1;
  BATON_CALL(Library<Real>::trsm, device_.libraries().blas, CUBLAS_SIDE_RIGHT, lower, op(transpose),
             CUBLAS_DIAG_NON_UNIT, columns, n, &one, l, n, b, ldb);
}

template <class Real>
double Factorizer<Real>::log_determinant(const Real* l, int n) {
  linalg::check_order("log_determinant", n, largest_);
  if (n == 0) return 0;
  double sum = 0;
  for (const Real x : workspace_->diagonal_of(device_, l, n)) sum += std::log(double(x));
  return 2 * sum;
}

template <class Real>
int Factorizer<Real>::eigen(Real* a, Real* values, int n) {
  linalg::check_order("eigen", n, largest_);
  if (n == 0) return 0;
  const Workspace& w = *workspace_;
  // With an element that is not finite, cuSOLVER may even write outside its arrays.
  fill_zero(device_, w.info, sizeof *w.info);
  simt::launch<find_not_finite_kernel<Real>>(simt::warps(n), device_.stream(), w.info, static_cast<const Real*>(a), n);
  if (const int last = w.report(device_, "eigen"); last > 0) return n - last + 1;
  BATON_CALL(Library<Real>::syevd, w.solver, vectors, lower, n, a, n, values, w.work, w.work_size, w.info);
  if (const int info = w.report(device_, "syevd"); info != 0) return info;
  const std::vector<Real> found = download(device_, values, n);
  for (int i = 0; i < n; i++)
    if (!std::isfinite(found[i])) return i + 1;
  return 0;
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
