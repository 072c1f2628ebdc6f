// The cuBLAS functions that Baton calls (libcublas.so.13), by OpenBLAS.
//
// Refused is what NVIDIA's documentation forbids or leaves undefined: handles that do not exist, wrong extents and
// leading dimensions, scaling factors in device memory, operands outside an allocation or never written, outputs that
// overlap. Refused is also what would make results differ from one run to the next: atomics, and a product without a
// workspace of the program's own. Then cuBLAS takes its workspace from a pool, which depends on what ran before, and
// with the workspace it chooses the order of a sum; a captured call would even allocate it.
//
// In the math mode that allows tf32 the operands of products in float32 are rounded to it.
#include <cublas_v2.h>

#include <string>

#include "tests/ptx/library.h"
#include "tests/ptx/matrices.h"
#include "tests/ptx/openblas.h"
#include "tests/ptx/options.h"
#include "tests/ptx/tf32.h"

struct cublasContext {
  cudaStream_t stream = nullptr;
  ptx::Workspace workspace;
  cublasMath_t math = CUBLAS_DEFAULT_MATH;
};

namespace ptx {

namespace {

constexpr Statuses<cublasStatus_t> statuses{CUBLAS_STATUS_SUCCESS, CUBLAS_STATUS_INVALID_VALUE,
                                            CUBLAS_STATUS_NOT_SUPPORTED, CUBLAS_STATUS_EXECUTION_FAILED};
constexpr size_t workspace_alignment = 256;
constexpr size_t smallest_workspace = 16 * 1024;  // with less, says NVIDIA, some functions may fail

Handles<cublasContext>& handles() {
  static auto* all = new Handles<cublasContext>("cuBLAS handle");
  return *all;
}

// A handle that can compute.
cublasContext& ready(cublasHandle_t handle) {
  cublasContext& h = handles().find(handle);
  check_stream(h.stream);
  if (h.workspace.bytes == 0)
    refuse(
        "the handle has no workspace of the program's own: cublasSetWorkspace was not called, or not after "
        "cublasSetStream, which resets it. cuBLAS would use its pool: the bits of the result would depend on what ran "
        "before, and a captured call would allocate");
  return h;
}

bool transposed(const char* name, cublasOperation_t op) {
  if (op != CUBLAS_OP_N && op != CUBLAS_OP_T && op != CUBLAS_OP_C)
    refuse(std::string(name) + " is no operation: " + std::to_string(op));
  return op != CUBLAS_OP_N;
}
bool is_lower(cublasFillMode_t fill) {
  if (fill != CUBLAS_FILL_MODE_LOWER && fill != CUBLAS_FILL_MODE_UPPER)
    refuse("uplo is neither lower nor upper: " + std::to_string(fill));
  return fill == CUBLAS_FILL_MODE_LOWER;
}

std::string shape_text(std::initializer_list<std::pair<const char*, long long>> extents) {
  std::string text;
  for (const auto& [name, extent] : extents) text += std::string(" ") + name + "=" + std::to_string(extent);
  return text;
}

template <class T>
struct Operand {
  T* data;
  int ld;
  long long stride = 0;
};

// Under the disturbance `sums` a batch adds its first terms apart from the others, and how many they are depends on the
// number of matrices: a replica's result then differs from a single product's and depends on its company.
int first_terms(int k, bool in_batch, int count) {
  if (!options().disturb_sums || !in_batch || k < 2) return k;
  return 1 + count % (k - 1);
}

// An operand that has been written; under tf32 it is a rounded copy.
template <class Real>
const Real* read_operand(const Matrix<const Real>& matrix, cublasMath_t math, std::vector<Real>& rounded) {
  const Real* values = matrix.read();
  if constexpr (std::is_same_v<Real, float>)
    if (math == CUBLAS_TF32_TENSOR_OP_MATH && values) {
      rounded.assign(values, values + matrix.extent() / sizeof(float));
      round_to_tf32(rounded.data(), rounded.size());
      return rounded.data();
    }
  return values;
}

template <class Real>
cublasStatus_t gemm(const char* call, cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m,
                    int n, int k, const Real* alpha_at, Operand<const Real> in_a, Operand<const Real> in_b,
                    const Real* beta_at, Operand<Real> out_c, bool in_batch = false, int count = 1) {
  return attempt_operation(statuses, call, [&]() -> Submission {
    const cublasContext& h = ready(handle);
    const bool ta = transposed("transa", op_a), tb = transposed("transb", op_b);
    check_not_negative("m", m);
    check_not_negative("n", n);
    check_not_negative("k", k);
    check_not_negative("the batch count", count);
    check_not_negative("the stride of A", in_a.stride);
    check_not_negative("the stride of B", in_b.stride);
    check_not_negative("the stride of C", out_c.stride);
    const Real alpha = host_scalar<Real>("alpha", alpha_at), beta = host_scalar<Real>("beta", beta_at);
    const Batch<const Real> a{{"A", in_a.data, ta ? k : m, ta ? m : k, in_a.ld}, in_a.stride, count};
    const Batch<const Real> b{{"B", in_b.data, tb ? n : k, tb ? k : n, in_b.ld}, in_b.stride, count};
    const Batch<Real> c{{"C", out_c.data, m, n, out_c.ld}, out_c.stride, count};
    if (m == 0 || n == 0 || count == 0) return {};
    check_apart(c);
    check_apart(c, a);
    check_apart(c, b);
    check_apart(a, h.workspace);
    check_apart(b, h.workspace);
    check_apart(c, h.workspace);

    const auto run = [=, workspace = h.workspace, math = h.math] {
      overwrite(workspace);
      const int first = first_terms(k, in_batch, count);
      std::vector<Real> rounded_a, rounded_b;
      for (int i = 0; i < count; i++) {
        const Real *ai = read_operand(a[i], math, rounded_a), *bi = read_operand(b[i], math, rounded_b);
        if (beta != 0) c[i].read();
        Real* ci = c[i].write();
        openblas::gemm(ta, tb, m, n, first, alpha, ai, in_a.ld, bi, in_b.ld, beta, ci, out_c.ld);
        if (first == k) continue;
        ai += size_t(first) * (ta ? 1 : in_a.ld);
        bi += size_t(first) * (tb ? in_b.ld : 1);
        openblas::gemm(ta, tb, m, n, k - first, alpha, ai, in_a.ld, bi, in_b.ld, Real(1), ci, out_c.ld);
      }
    };
    const double matrices_a = in_a.stride ? count : 1, matrices_b = in_b.stride ? count : 1;
    return {h.stream,
            {call + std::string(ta ? " T" : " N") + (tb ? "T" : "N") + shape_text({{"m", m}, {"n", n}, {"k", k}}) +
                 (in_batch ? shape_text({{"count", count}}) : ""),
             run,
             {2.0 * m * n * k * count, matrices_a * a.first.bytes() + matrices_b * b.first.bytes() +
                                           double(count) * c.first.bytes() * (beta != 0 ? 2 : 1)}}};
  });
}

template <class Real>
cublasStatus_t syrk(const char* call, cublasHandle_t handle, cublasFillMode_t fill, cublasOperation_t op, int n, int k,
                    const Real* alpha_at, Operand<const Real> in_a, const Real* beta_at, Operand<Real> out_c) {
  return attempt_operation(statuses, call, [&]() -> Submission {
    const cublasContext& h = ready(handle);
    const bool lower = is_lower(fill), ta = transposed("trans", op);
    check_not_negative("n", n);
    check_not_negative("k", k);
    const Real alpha = host_scalar<Real>("alpha", alpha_at), beta = host_scalar<Real>("beta", beta_at);
    const Matrix<const Real> a("A", in_a.data, ta ? k : n, ta ? n : k, in_a.ld);
    const Matrix<Real> c("C", out_c.data, n, n, out_c.ld, lower ? Part::lower : Part::upper);
    if (n == 0) return {};
    check_apart("C", c, "A", a);
    check_apart("the workspace", Region(h.workspace), "A", a);
    check_apart("the workspace", Region(h.workspace), "C", c);

    const auto run = [=, workspace = h.workspace] {
      overwrite(workspace);
      const Real* from = a.read();
      if (beta != 0) c.read();
      openblas::syrk(lower, ta, n, k, alpha, from, in_a.ld, beta, c.write(), out_c.ld);
    };
    return {h.stream,
            {call + std::string(lower ? " L" : " U") + (ta ? "T" : "N") + shape_text({{"n", n}, {"k", k}}),
             run,
             {1.0 * n * (n + 1) * k, double(a.bytes()) + double(c.bytes()) * (beta != 0 ? 2 : 1)}}};
  });
}

template <class Real>
cublasStatus_t trsm(const char* call, cublasHandle_t handle, cublasSideMode_t side, cublasFillMode_t fill,
                    cublasOperation_t op, cublasDiagType_t diagonal, int m, int n, const Real* alpha_at,
                    Operand<const Real> in_a, Operand<Real> in_out_b) {
  return attempt_operation(statuses, call, [&]() -> Submission {
    const cublasContext& h = ready(handle);
    if (side != CUBLAS_SIDE_LEFT && side != CUBLAS_SIDE_RIGHT) refuse("side is neither left nor right");
    if (diagonal != CUBLAS_DIAG_UNIT && diagonal != CUBLAS_DIAG_NON_UNIT) refuse("diag is neither unit nor non-unit");
    const bool left = side == CUBLAS_SIDE_LEFT, unit = diagonal == CUBLAS_DIAG_UNIT;
    const bool lower = is_lower(fill), ta = transposed("trans", op);
    check_not_negative("m", m);
    check_not_negative("n", n);
    const Real alpha = host_scalar<Real>("alpha", alpha_at);
    const int order = left ? m : n;
    const Part part = lower ? (unit ? Part::below_diagonal : Part::lower) : (unit ? Part::above_diagonal : Part::upper);
    const Matrix<const Real> a("A", in_a.data, order, order, in_a.ld, part);
    const Matrix<Real> b("B", in_out_b.data, m, n, in_out_b.ld);
    if (m == 0 || n == 0) return {};
    check_apart("B", b, "A", a);
    check_apart("the workspace", Region(h.workspace), "A", a);
    check_apart("the workspace", Region(h.workspace), "B", b);

    const auto run = [=, workspace = h.workspace] {
      overwrite(workspace);
      const Real* triangle = a.read();
      b.read();
      openblas::trsm(left, lower, ta, unit, m, n, alpha, triangle, in_a.ld, b.write(), in_out_b.ld);
    };
    return {h.stream,
            {call + std::string(left ? " L" : " R") + (lower ? "L" : "U") + (ta ? "T" : "N") + (unit ? "U" : "N") +
                 shape_text({{"m", m}, {"n", n}}),
             run,
             {double(m) * n * order, double(a.bytes()) + 2.0 * double(b.bytes())}}};
  });
}

template <class Real>
cublasStatus_t copy(const char* call, cublasHandle_t handle, int n, const Real* x, int x_step, Real* y, int y_step) {
  return attempt_operation(statuses, call, [&]() -> Submission {
    const cublasContext& h = ready(handle);
    check_not_negative("n", n);
    if (x_step < 1 || y_step < 1) not_supported("increments below 1 are not known here");
    const Matrix<const Real> from("x", x, 1, n, x_step);  // a row of a matrix
    const Matrix<Real> to("y", y, 1, n, y_step);
    if (n == 0) return {};
    check_apart("y", to, "x", from);
    return {h.stream,
            {call + shape_text({{"n", n}, {"incx", x_step}, {"incy", y_step}}),
             [=] {
               const Real* source = from.read();
               Real* target = to.write();
               for (size_t i = 0; i < size_t(n); i++) target[i * y_step] = source[i * x_step];
             },
             {0, double(from.bytes()) + double(to.bytes())}}};
  });
}

}  // namespace
}  // namespace ptx

using namespace ptx;

extern "C" {

// ------------------------------------------------------------------------------------------------------------ handle
cublasStatus_t cublasCreate_v2(cublasHandle_t* handle) {
  return attempt(statuses, "cublasCreate", [&] {
    forbid_while_capturing("it allocates");
    handles().create(handle);
  });
}
cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) {
  return attempt(statuses, "cublasDestroy", [&] {
    forbid_while_capturing("it waits for the device");
    handles().destroy(handle);
  });
}
cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
  return attempt(statuses, "cublasSetStream", [&] {
    cublasContext& h = handles().find(handle);
    check_stream(stream);
    h.stream = stream, h.workspace = {};  // which is again the library's own
  });
}
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void* workspace, size_t bytes) {
  return attempt(statuses, "cublasSetWorkspace", [&] {
    cublasContext& h = handles().find(handle);
    if (bytes < smallest_workspace)
      refuse("a workspace of " + std::to_string(bytes) + " bytes; with less than " +
             std::to_string(smallest_workspace) + " some functions may fail");
    DeviceMemory::instance().storage(reinterpret_cast<uint64_t>(workspace), bytes, "the workspace");
    if (reinterpret_cast<uint64_t>(workspace) % workspace_alignment != 0)
      refuse("the workspace is not aligned to " + std::to_string(workspace_alignment) + " bytes");
    h.workspace = {workspace, bytes};
  });
}
cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t mode) {
  return attempt(statuses, "cublasSetPointerMode", [&] {
    handles().find(handle);
    if (mode != CUBLAS_POINTER_MODE_HOST) not_supported("only pointer mode host is known here");
  });
}
cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
  return attempt(statuses, "cublasSetMathMode", [&] {
    cublasContext& h = handles().find(handle);
    if (mode != CUBLAS_DEFAULT_MATH && mode != CUBLAS_PEDANTIC_MATH && mode != CUBLAS_TF32_TENSOR_OP_MATH)
      not_supported("math mode " + std::to_string(mode) +
                    ": only the default and the pedantic one, which compute in float32 and float64, and tf32 are known "
                    "here");
    h.math = mode;
  });
}
cublasStatus_t cublasSetAtomicsMode(cublasHandle_t handle, cublasAtomicsMode_t mode) {
  return attempt(statuses, "cublasSetAtomicsMode", [&] {
    handles().find(handle);
    if (mode != CUBLAS_ATOMICS_NOT_ALLOWED) not_supported("with atomics results would not repeat");
  });
}
cublasStatus_t cublasGetVersion_v2(cublasHandle_t handle, int* version) {
  return attempt(statuses, "cublasGetVersion", [&] {
    handles().find(handle);
    *version = CUBLAS_VERSION;
  });
}
const char* cublasGetStatusString(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS:
      return "the operation completed successfully";
    case CUBLAS_STATUS_NOT_INITIALIZED:
      return "the library was not initialized";
    case CUBLAS_STATUS_ALLOC_FAILED:
      return "the resource allocation failed";
    case CUBLAS_STATUS_INVALID_VALUE:
      return "an invalid value was passed";
    case CUBLAS_STATUS_ARCH_MISMATCH:
      return "the architecture is not supported";
    case CUBLAS_STATUS_MAPPING_ERROR:
      return "an access to memory failed";
    case CUBLAS_STATUS_EXECUTION_FAILED:
      return "the GPU program failed";
    case CUBLAS_STATUS_INTERNAL_ERROR:
      return "an internal operation failed";
    case CUBLAS_STATUS_NOT_SUPPORTED:
      return "the functionality is not supported";
    case CUBLAS_STATUS_LICENSE_ERROR:
      return "the license is missing";
  }
  return "an unknown status";
}

// ---------------------------------------------------------------------------------------------------------- products
cublasStatus_t cublasSgemm_v2(cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n,
                              int k, const float* alpha, const float* a, int lda, const float* b, int ldb,
                              const float* beta, float* c, int ldc) {
  return gemm<float>("cublasSgemm", handle, op_a, op_b, m, n, k, alpha, {a, lda}, {b, ldb}, beta, {c, ldc});
}
cublasStatus_t cublasDgemm_v2(cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m, int n,
                              int k, const double* alpha, const double* a, int lda, const double* b, int ldb,
                              const double* beta, double* c, int ldc) {
  return gemm<double>("cublasDgemm", handle, op_a, op_b, m, n, k, alpha, {a, lda}, {b, ldb}, beta, {c, ldc});
}
cublasStatus_t cublasSgemmStridedBatched(cublasHandle_t handle, cublasOperation_t op_a, cublasOperation_t op_b, int m,
                                         int n, int k, const float* alpha, const float* a, int lda, long long stride_a,
                                         const float* b, int ldb, long long stride_b, const float* beta, float* c,
                                         int ldc, long long stride_c, int count) {
  return gemm<float>("cublasSgemmStridedBatched", handle, op_a, op_b, m, n, k, alpha, {a, lda, stride_a},
                     {b, ldb, stride_b}, beta, {c, ldc, stride_c}, true, count);
}
cublasStatus_t cublasSsyrk_v2(cublasHandle_t handle, cublasFillMode_t fill, cublasOperation_t op, int n, int k,
                              const float* alpha, const float* a, int lda, const float* beta, float* c, int ldc) {
  return syrk<float>("cublasSsyrk", handle, fill, op, n, k, alpha, {a, lda}, beta, {c, ldc});
}
cublasStatus_t cublasDsyrk_v2(cublasHandle_t handle, cublasFillMode_t fill, cublasOperation_t op, int n, int k,
                              const double* alpha, const double* a, int lda, const double* beta, double* c, int ldc) {
  return syrk<double>("cublasDsyrk", handle, fill, op, n, k, alpha, {a, lda}, beta, {c, ldc});
}
cublasStatus_t cublasStrsm_v2(cublasHandle_t handle, cublasSideMode_t side, cublasFillMode_t fill, cublasOperation_t op,
                              cublasDiagType_t diagonal, int m, int n, const float* alpha, const float* a, int lda,
                              float* b, int ldb) {
  return trsm<float>("cublasStrsm", handle, side, fill, op, diagonal, m, n, alpha, {a, lda}, {b, ldb});
}
cublasStatus_t cublasDtrsm_v2(cublasHandle_t handle, cublasSideMode_t side, cublasFillMode_t fill, cublasOperation_t op,
                              cublasDiagType_t diagonal, int m, int n, const double* alpha, const double* a, int lda,
                              double* b, int ldb) {
  return trsm<double>("cublasDtrsm", handle, side, fill, op, diagonal, m, n, alpha, {a, lda}, {b, ldb});
}
cublasStatus_t cublasScopy_v2(cublasHandle_t handle, int n, const float* x, int incx, float* y, int incy) {
  return copy("cublasScopy", handle, n, x, incx, y, incy);
}
cublasStatus_t cublasDcopy_v2(cublasHandle_t handle, int n, const double* x, int incx, double* y, int incy) {
  return copy("cublasDcopy", handle, n, x, incx, y, incy);
}

}  // extern "C"
