// The cuSOLVER functions that Baton calls (libcusolver.so.12), by OpenBLAS's LAPACK.
//
// Where NVIDIA promises nothing, these behave so that a program which relies on something is seen:
//   - The size of a work array is not monotone in n, and is another one for every function. After a call it holds NaN.
//   - potrf with a NaN: the float version says in devInfo that all is well, the double version names the row. Both
//   leave
//     NaN on that row's diagonal.
//   - syevd with a NaN or an infinity in the triangle that it reads ends in an error that stays; the real one may run
//     into an illegal address.
//   - No function is documented as fit for capture (syevd waits for the device and computes on the host): every one is
//     refused while its stream is being captured.
#include <cusolverDn.h>

#include <cmath>
#include <string>

#include "tests/ptx/library.h"
#include "tests/ptx/matrices.h"
#include "tests/ptx/openblas.h"

struct cusolverDnContext {
  cudaStream_t stream = nullptr;
};

namespace ptx {

namespace {

constexpr Statuses<cusolverStatus_t> statuses{CUSOLVER_STATUS_SUCCESS, CUSOLVER_STATUS_INVALID_VALUE,
                                              CUSOLVER_STATUS_NOT_SUPPORTED, CUSOLVER_STATUS_EXECUTION_FAILED};

Handles<cusolverDnContext>& handles() {
  static auto* all = new Handles<cusolverDnContext>("cuSOLVER handle");
  return *all;
}

enum class Factorisation { potrf = 1, potri, syevd };

// Elements of a work array: from `function` * n upwards, with leaps.
int work_size(Factorisation function, int n) {
  const uint32_t scattered = (uint32_t(n) * 8 + uint32_t(function)) * 2654435761u >> 8;
  return int(function) * n + 1 + int(scattered % (16 * uint32_t(n) + 64));
}

bool is_lower(cublasFillMode_t fill) {
  if (fill != CUBLAS_FILL_MODE_LOWER && fill != CUBLAS_FILL_MODE_UPPER)
    refuse("uplo is neither lower nor upper: " + std::to_string(fill));
  return fill == CUBLAS_FILL_MODE_LOWER;
}
bool wants_vectors(cusolverEigMode_t job) {
  if (job != CUSOLVER_EIG_MODE_VECTOR && job != CUSOLVER_EIG_MODE_NOVECTOR)
    refuse("jobz is neither vector nor no vector: " + std::to_string(job));
  return job == CUSOLVER_EIG_MODE_VECTOR;
}

template <class Real>
cusolverStatus_t buffer_size(const char* call, cusolverDnHandle_t handle, Factorisation function, cublasFillMode_t fill,
                             int n, const Real* a, int lda, int* size,
                             cusolverEigMode_t job = CUSOLVER_EIG_MODE_VECTOR) {
  return attempt(statuses, call, [&] {
    handles().find(handle);
    is_lower(fill);
    wants_vectors(job);
    check_not_negative("n", n);
    const Matrix<const Real> checked("A", a, n, n, lda);
    if (!size) refuse("a null pointer to the work array's size");
    *size = work_size(function, n);
  });
}

// What all factorisations have in common: a symmetric matrix that becomes something else, a work array and devInfo.
template <class Real>
struct Factorised {
  Matrix<Real> a;  // the triangle that is read
  bool lower;
  int n, lda;
  Matrix<int> info;
  Workspace work;
  cudaStream_t stream;

  Factorised(cusolverDnHandle_t handle, Factorisation function, cublasFillMode_t fill, int order, Real* matrix, int ld,
             Real* work_array, int work_elements, int* dev_info)
      : a("A", matrix, (check_not_negative("n", order), order), order, ld, is_lower(fill) ? Part::lower : Part::upper),
        lower(is_lower(fill)),
        n(order),
        lda(ld),
        info("devInfo", dev_info, 1, 1, 1),
        stream(handles().find(handle).stream) {
    if (is_capturing(stream))
      refuse("the stream is being captured, and cuSOLVER documents no function as fit for that");
    const int needed = work_size(function, n);
    if (work_elements < needed)
      refuse("a work array of " + std::to_string(work_elements) + " elements, the function wants " +
             std::to_string(needed));
    work = {work_array, needed * sizeof(Real)};
    if (reinterpret_cast<uint64_t>(work_array) % sizeof(Real) != 0)
      throw Fault(FaultKind::alignment, "the work array is misaligned");
    check_apart("the work array", Region(work), "A", a);
    check_apart("the work array", Region(work), "devInfo", info);
    check_apart("devInfo", info, "A", a);
  }

  size_t at(int row, int column) const { return size_t(column) * lda + row; }
  std::string text(const char* call) const {
    return std::string(call) + (lower ? " L n=" : " U n=") + std::to_string(n);
  }
};

template <class Real>
cusolverStatus_t potrf(const char* call, cusolverDnHandle_t handle, cublasFillMode_t fill, int n, Real* matrix, int lda,
                       Real* work, int work_elements, int* dev_info) {
  return attempt_operation(statuses, call, [&]() -> Submission {
    const Factorised<Real> f(handle, Factorisation::potrf, fill, n, matrix, lda, work, work_elements, dev_info);
    const auto run = [f] {
      overwrite(f.work);
      f.a.read();
      Real* a = f.a.write();
      int info = openblas::potrf(f.lower, f.n, a, f.lda);
      if (sizeof(Real) == sizeof(double)) {  // the float version passes over a NaN
        const int done = info > 0 ? info - 1 : f.n;
        for (int i = 0; i < done; i++)
          if (std::isnan(a[f.at(i, i)])) {
            info = i + 1;
            break;
          }
      }
      *f.info.write() = info;
    };
    return {f.stream, {f.text(call), run, {1.0 / 3 * n * n * n, 2.0 * double(f.a.bytes())}}};
  });
}

template <class Real>
cusolverStatus_t potri(const char* call, cusolverDnHandle_t handle, cublasFillMode_t fill, int n, Real* matrix, int lda,
                       Real* work, int work_elements, int* dev_info) {
  return attempt_operation(statuses, call, [&]() -> Submission {
    const Factorised<Real> f(handle, Factorisation::potri, fill, n, matrix, lda, work, work_elements, dev_info);
    const auto run = [f] {
      overwrite(f.work);
      f.a.read();
      *f.info.write() = openblas::potri(f.lower, f.n, f.a.write(), f.lda);
    };
    return {f.stream, {f.text(call), run, {2.0 / 3 * n * n * n, 2.0 * double(f.a.bytes())}}};
  });
}

template <class Real>
cusolverStatus_t syevd(const char* call, cusolverDnHandle_t handle, cusolverEigMode_t job, cublasFillMode_t fill, int n,
                       Real* matrix, int lda, Real* eigenvalues, Real* work, int work_elements, int* dev_info) {
  return attempt_operation(statuses, call, [&]() -> Submission {
    const bool vectors = wants_vectors(job);
    const Factorised<Real> f(handle, Factorisation::syevd, fill, n, matrix, lda, work, work_elements, dev_info);
    const Matrix<Real> everything("A", matrix, n, n, lda);
    const Matrix<Real> values("W", eigenvalues, n, n ? 1 : 0, std::max(n, 1));
    check_apart("W", values, "A", everything);
    check_apart("W", values, "the work array", Region(f.work));
    check_apart("W", values, "devInfo", f.info);
    const auto run = [=] {
      overwrite(f.work);
      Real* a = f.a.read();
      for (int column = 0; column < f.n; column++)
        for (int row = f.lower ? column : 0; row < (f.lower ? f.n : column + 1); row++)
          if (!std::isfinite(a[f.at(row, column)]))
            throw Fault(FaultKind::access, "A[" + std::to_string(row) + "][" + std::to_string(column) +
                                               "] is not finite; there the real function may run into an illegal "
                                               "address");
      if (vectors) everything.write();  // else it leaves something in the triangle alone
      const int info = openblas::syevd(vectors, f.lower, f.n, a, f.lda, values.write());
      *f.info.write() = info;
    };
    return {f.stream, {f.text(call), run, {(vectors ? 9.0 : 4.0 / 3) * n * n * n, 2.0 * double(everything.bytes())}}};
  });
}

}  // namespace
}  // namespace ptx

using namespace ptx;

extern "C" {

cusolverStatus_t cusolverDnCreate(cusolverDnHandle_t* handle) {
  return attempt(statuses, "cusolverDnCreate", [&] {
    forbid_while_capturing("it allocates");
    handles().create(handle);
  });
}
cusolverStatus_t cusolverDnDestroy(cusolverDnHandle_t handle) {
  return attempt(statuses, "cusolverDnDestroy", [&] {
    forbid_while_capturing("it frees memory");
    handles().destroy(handle);
  });
}
cusolverStatus_t cusolverDnSetStream(cusolverDnHandle_t handle, cudaStream_t stream) {
  return attempt(statuses, "cusolverDnSetStream", [&] {
    cusolverDnContext& h = handles().find(handle);
    check_stream(stream);
    h.stream = stream;
  });
}
cusolverStatus_t cusolverDnSetDeterministicMode(cusolverDnHandle_t handle, cusolverDeterministicMode_t mode) {
  return attempt(statuses, "cusolverDnSetDeterministicMode", [&] {
    handles().find(handle);
    if (mode != CUSOLVER_DETERMINISTIC_RESULTS) not_supported("only deterministic results are known here");
  });
}

// cusolverDn{S,D}{potrf,potri,syevd} and their work sizes
#define BATON_PTX_CHOLESKY(letter, Real, name)                                                                         \
  cusolverStatus_t cusolverDn##letter##name##_bufferSize(cusolverDnHandle_t handle, cublasFillMode_t fill, int n,      \
                                                         Real* a, int lda, int* size) {                                \
    return buffer_size<Real>("cusolverDn" #letter #name "_bufferSize", handle, Factorisation::name, fill, n, a, lda,   \
                             size);                                                                                    \
  }                                                                                                                    \
  cusolverStatus_t cusolverDn##letter##name(cusolverDnHandle_t handle, cublasFillMode_t fill, int n, Real* a, int lda, \
                                            Real* work, int work_elements, int* info) {                                \
    return name<Real>("cusolverDn" #letter #name, handle, fill, n, a, lda, work, work_elements, info);                 \
  }
BATON_PTX_CHOLESKY(S, float, potrf)
BATON_PTX_CHOLESKY(D, double, potrf)
BATON_PTX_CHOLESKY(S, float, potri)
BATON_PTX_CHOLESKY(D, double, potri)
#undef BATON_PTX_CHOLESKY

#define BATON_PTX_SYEVD(letter, Real)                                                                                  \
  cusolverStatus_t cusolverDn##letter##syevd_bufferSize(cusolverDnHandle_t handle, cusolverEigMode_t job,              \
                                                        cublasFillMode_t fill, int n, const Real* a, int lda,          \
                                                        const Real*, int* size) {                                      \
    return buffer_size<Real>("cusolverDn" #letter "syevd_bufferSize", handle, Factorisation::syevd, fill, n, a, lda,   \
                             size, job);                                                                               \
  }                                                                                                                    \
  cusolverStatus_t cusolverDn##letter##syevd(cusolverDnHandle_t handle, cusolverEigMode_t job, cublasFillMode_t fill,  \
                                             int n, Real* a, int lda, Real* values, Real* work, int work_elements,     \
                                             int* info) {                                                              \
    return syevd<Real>("cusolverDn" #letter "syevd", handle, job, fill, n, a, lda, values, work, work_elements, info); \
  }
BATON_PTX_SYEVD(S, float)
BATON_PTX_SYEVD(D, double)
#undef BATON_PTX_SYEVD

}  // extern "C"
