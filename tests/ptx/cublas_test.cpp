// The stand-in of cuBLAS: results against plain loops in double, and what it refuses.
#include <cublas_v2.h>

#include <cmath>
#include <limits>

#include "tests/ptx/device_memory.h"
#include "tests/ptx/libraries_test.h"
#include "tests/ptx/stream.h"

namespace ptx::test {
namespace {

constexpr size_t workspace_bytes = 1 << 16;

struct Blas {
  Array<char> workspace{workspace_bytes};
  cublasHandle_t handle = nullptr;

  explicit Blas(cudaStream_t stream = nullptr) {
    EXPECT_EQ(cublasCreate(&handle), CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(cublasSetStream(handle, stream), CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(cublasSetWorkspace(handle, workspace, workspace_bytes), CUBLAS_STATUS_SUCCESS);
  }
  ~Blas() { cublasDestroy(handle); }
};

cublasStatus_t call_gemm(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, float alpha,
                         const float* a, int lda, const float* b, int ldb, float beta, float* c, int ldc) {
  return cublasSgemm(h, ta, tb, m, n, k, &alpha, a, lda, b, ldb, &beta, c, ldc);
}
cublasStatus_t call_gemm(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                         double alpha, const double* a, int lda, const double* b, int ldb, double beta, double* c,
                         int ldc) {
  return cublasDgemm(h, ta, tb, m, n, k, &alpha, a, lda, b, ldb, &beta, c, ldc);
}

template <class T>
double element(const std::vector<T>& m, bool transposed, int row, int column, int ld, size_t offset = 0) {
  return m[offset + (transposed ? size_t(row) * ld + column : size_t(column) * ld + row)];
}

// alpha op(A) op(B) + beta C, in c; what lies between the columns stays as it was.
template <class T>
void product(bool ta, bool tb, int m, int n, int k, double alpha, const std::vector<T>& a, int lda, size_t at_a,
             const std::vector<T>& b, int ldb, size_t at_b, double beta, std::vector<T>& c, int ldc, size_t at_c) {
  for (int j = 0; j < n; j++)
    for (int i = 0; i < m; i++) {
      double sum = 0;
      for (int l = 0; l < k; l++) sum += element(a, ta, i, l, lda, at_a) * element(b, tb, l, j, ldb, at_b);
      T& to = c[at_c + size_t(j) * ldc + i];
      to = T(alpha * sum + (beta == 0 ? 0 : beta * to));
    }
}

template <class T>
void expect_close(const std::vector<T>& found, const std::vector<T>& wanted, double relative) {
  ASSERT_EQ(found.size(), wanted.size());
  double scale = 0;
  for (const T w : wanted) scale = std::max(scale, std::fabs(double(w)));
  for (size_t i = 0; i < found.size(); i++) ASSERT_NEAR(found[i], wanted[i], relative * scale) << "element " << i;
}

template <class T>
class CublasOf : public testing::Test {
 protected:
  static constexpr double tolerance = 50 * std::numeric_limits<T>::epsilon();
};
using Reals = testing::Types<float, double>;
TYPED_TEST_SUITE(CublasOf, Reals);

TYPED_TEST(CublasOf, ProductsOfAllShapes) {
  using T = TypeParam;
  Blas blas;
  struct {
    int m, n, k, pad;
    T alpha, beta;
  } const cases[] = {{1, 1, 1, 0, 1, 0}, {3, 5, 7, 2, 1, 1}, {33, 10, 170, 3, T(0.5), -2}, {90, 70, 1, 0, -1, 0},
                     {4, 6, 0, 1, 1, 2}, {4, 6, 0, 1, 1, 0}, {128, 50, 400, 0, 1, 0}};
  for (const auto& [m, n, k, pad, alpha, beta] : cases)
    for (const bool ta : {false, true})
      for (const bool tb : {false, true}) {
        SCOPED_TRACE(testing::Message() << m << " x " << n << " x " << k << " transposed " << ta << tb);
        const int lda = (ta ? k : m) + pad + (k == 0), ldb = (tb ? n : k) + pad + (k == 0), ldc = m + pad;
        const std::vector<T> a = normals<T>(size_t(lda) * (ta ? m : k) + 1, 1);
        const std::vector<T> b = normals<T>(size_t(ldb) * (tb ? k : n) + 1, 2);
        std::vector<T> wanted = normals<T>(size_t(ldc) * n, 3);
        const Array<T> da(a), db(b), dc(wanted);
        product(ta, tb, m, n, k, alpha, a, lda, 0, b, ldb, 0, beta, wanted, ldc, 0);
        ASSERT_EQ(call_gemm(blas.handle, ta ? CUBLAS_OP_T : CUBLAS_OP_N, tb ? CUBLAS_OP_C : CUBLAS_OP_N, m, n, k, alpha,
                            static_cast<T*>(da), lda, static_cast<T*>(db), ldb, beta, static_cast<T*>(dc), ldc),
                  CUBLAS_STATUS_SUCCESS);
        expect_close(dc.host(), wanted, this->tolerance);
      }
}

// In the mode that allows tf32 the operands of products in float32 have 10 bits of mantissa, and no others.
TEST(Cublas, TensorCoresRoundOperands) {
  Blas blas;
  const int m = 30, n = 20, k = 100;
  const auto error_of = [&]<class T>(cublasMath_t mode, T) {
    const std::vector<T> a = normals<T>(m * k, 1), b = normals<T>(k * n, 2);
    std::vector<T> wanted(m * n);
    const Array<T> da(a), db(b), dc(wanted);
    product(false, false, m, n, k, 1, a, m, 0, b, k, 0, 0, wanted, m, 0);
    EXPECT_EQ(cublasSetMathMode(blas.handle, mode), CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(call_gemm(blas.handle, CUBLAS_OP_N, CUBLAS_OP_N, m, n, k, T(1), da, m, db, k, T(0), dc, m),
              CUBLAS_STATUS_SUCCESS);
    const std::vector<T> found = dc.host();
    double error = 0;
    for (size_t i = 0; i < found.size(); i++) error = std::max(error, std::fabs(double(found[i]) - wanted[i]));
    return error / std::sqrt(double(k));
  };
  EXPECT_LT(error_of(CUBLAS_PEDANTIC_MATH, 0.f), 2e-6);
  EXPECT_GT(error_of(CUBLAS_TF32_TENSOR_OP_MATH, 0.f), 2e-5);
  EXPECT_LT(error_of(CUBLAS_TF32_TENSOR_OP_MATH, 0.f), 3e-3);
  EXPECT_LT(error_of(CUBLAS_TF32_TENSOR_OP_MATH, 0.), 1e-14);
}

// The other triangle is not written, neither before nor after.
TYPED_TEST(CublasOf, RankUpdatesTouchOneTriangle) {
  using T = TypeParam;
  constexpr auto syrk = [] {
    if constexpr (sizeof(T) == 4) return cublasSsyrk;
    else return cublasDsyrk;
  }();
  Blas blas;
  const int n = 37, k = 12, ldc = n + 2;
  const T alpha = T(0.5), beta = 2;
  for (const bool lower : {false, true})
    for (const bool ta : {false, true}) {
      const int lda = (ta ? k : n) + 1;
      const std::vector<T> a = normals<T>(size_t(lda) * (ta ? n : k), 1);
      std::vector<T> c = normals<T>(size_t(ldc) * n, 2);
      const Array<T> da(a), dc(c.size());
      const auto first = [&](int j) { return size_t(j) * ldc + (lower ? j : 0); };
      const auto rows = [&](int j) { return lower ? n - j : j + 1; };
      for (int j = 0; j < n; j++)
        cudaMemcpyAsync(dc + first(j), &c[first(j)], rows(j) * sizeof(T), cudaMemcpyHostToDevice, nullptr);
      product(ta, !ta, n, n, k, alpha, a, lda, 0, a, lda, 0, beta, c, ldc, 0);
      ASSERT_EQ(syrk(blas.handle, lower ? CUBLAS_FILL_MODE_LOWER : CUBLAS_FILL_MODE_UPPER,
                     ta ? CUBLAS_OP_T : CUBLAS_OP_N, n, k, &alpha, da, lda, &beta, dc, ldc),
                CUBLAS_STATUS_SUCCESS);
      for (int j = 0; j < n; j++)
        expect_close(dc.host(first(j), rows(j)), {c.begin() + first(j), c.begin() + first(j) + rows(j)},
                     this->tolerance);
      const T* other = dc + (lower ? size_t(ldc) : 1);  // off the diagonal
      EXPECT_FALSE(DeviceMemory::instance().written(reinterpret_cast<uint64_t>(other), 1));
    }
}

// The other triangle, and with a unit diagonal that too, are not written at all: they may not be read.
TYPED_TEST(CublasOf, TriangularSolves) {
  using T = TypeParam;
  constexpr auto trsm = [] {
    if constexpr (sizeof(T) == 4) return cublasStrsm;
    else return cublasDtrsm;
  }();
  Blas blas;
  const int m = 20, n = 13;
  const T alpha = 2;
  for (int bits = 0; bits < 16; bits++) {
    const bool left = bits & 1, lower = bits & 2, ta = bits & 4, unit = bits & 8;
    const int order = left ? m : n, lda = order + 1, ldb = m + 3;
    std::vector<T> a = normals<T>(size_t(lda) * order, 1);
    const Array<T> da(a.size()), b(normals<T>(size_t(ldb) * n, 2));
    for (int j = 0; j < order; j++)
      for (int i = 0; i < order; i++) {
        T& value = a[size_t(j) * lda + i];
        value = i == j ? (unit ? 1 : 4 + std::fabs(value)) : (lower ? i > j : i < j) ? value / order : 0;
        if (value != 0 && !(unit && i == j))
          cudaMemcpyAsync(da + size_t(j) * lda + i, &value, sizeof value, cudaMemcpyHostToDevice, nullptr);
      }
    std::vector<T> wanted = b.host();
    ASSERT_EQ(trsm(blas.handle, left ? CUBLAS_SIDE_LEFT : CUBLAS_SIDE_RIGHT,
                   lower ? CUBLAS_FILL_MODE_LOWER : CUBLAS_FILL_MODE_UPPER, ta ? CUBLAS_OP_T : CUBLAS_OP_N,
                   unit ? CUBLAS_DIAG_UNIT : CUBLAS_DIAG_NON_UNIT, m, n, &alpha, da, lda, b, ldb),
              CUBLAS_STATUS_SUCCESS);
    const std::vector<T> x = b.host();
    std::vector<T> back = wanted;  // op(A) X or X op(A), which must be alpha B
    if (left) product(ta, false, m, n, m, 1, a, lda, 0, x, ldb, 0, 0, back, ldb, 0);
    else product(false, ta, m, n, n, 1, x, ldb, 0, a, lda, 0, 0, back, ldb, 0);
    for (int j = 0; j < n; j++)
      for (int i = 0; i < m; i++) wanted[size_t(j) * ldb + i] *= alpha;
    expect_close(back, wanted, this->tolerance);
  }
}

TYPED_TEST(CublasOf, CopiesWithIncrements) {
  using T = TypeParam;
  constexpr auto copy = [] {
    if constexpr (sizeof(T) == 4) return cublasScopy;
    else return cublasDcopy;
  }();
  Blas blas;
  const Array<T> x(std::vector<T>{1, 2, 3, 4, 5, 6, 7, 8, 9}), y(std::vector<T>(6, -1));
  ASSERT_EQ(copy(blas.handle, 3, x, 4, y, 2), CUBLAS_STATUS_SUCCESS);  // a diagonal
  EXPECT_EQ(y.host(), (std::vector<T>{1, -1, 5, -1, 9, -1}));
}

cublasStatus_t batched(const Blas& blas, int m, int n, int k, const float* a, long long stride_a, const float* b,
                       long long stride_b, float* c, int ldc, long long stride_c, int count) {
  const float one = 1, zero = 0;
  return cublasSgemmStridedBatched(blas.handle, CUBLAS_OP_N, CUBLAS_OP_T, m, n, k, &one, a, m, stride_a, b, n, stride_b,
                                   &zero, c, ldc, stride_c, count);
}

TEST(Cublas, BatchesAreSingleProducts) {
  Blas blas;
  const int m = 31, n = 14, k = 333, count = 5;
  const Array<float> a(normals<float>(size_t(m) * k * count + 7, 1)), b(normals<float>(size_t(n) * k, 2));
  const Array<float> c(size_t(m) * n * count), single(size_t(m) * n);
  ASSERT_EQ(batched(blas, m, n, k, a + 1, m * k, b, 0, c, m, m * n, count), CUBLAS_STATUS_SUCCESS);
  const std::vector<float> all = c.host();
  for (int i = 0; i < count; i++) {
    ASSERT_EQ(call_gemm(blas.handle, CUBLAS_OP_N, CUBLAS_OP_T, m, n, k, 1.f, a + 1 + size_t(i) * m * k, m, b, n, 0.f,
                        single, m),
              CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(single.host(), std::vector<float>(all.begin() + size_t(i) * m * n, all.begin() + size_t(i + 1) * m * n));
  }
  // Replicas side by side, with interleaved columns, do not overlap.
  const Array<float> wide(size_t(m) * n * count);
  ASSERT_EQ(batched(blas, m, n, k, a + 1, m * k, b, 0, wide, m * count, m, count), CUBLAS_STATUS_SUCCESS);
  const std::vector<float> interleaved = wide.host();
  for (int i = 0; i < count; i++)
    for (int j = 0; j < n; j++)
      for (int row = 0; row < m; row++)
        ASSERT_EQ(interleaved[(size_t(j) * count + i) * m + row], all[(size_t(i) * n + j) * m + row]);
}

TEST(Cublas, TheSameBitsAtAnyAddress) {
  Blas blas;
  const int m = 67, n = 43, k = 501;
  const std::vector<float> a = normals<float>(size_t(m) * k, 1), b = normals<float>(size_t(k) * n, 2);
  std::vector<float> first;
  for (const int offset : {0, 1, 3, 8}) {
    std::vector<float> moved_a(offset), moved_b(2 * offset);
    moved_a.insert(moved_a.end(), a.begin(), a.end());
    moved_b.insert(moved_b.end(), b.begin(), b.end());
    const Array<float> da(moved_a), db(moved_b), dc(size_t(m) * n);
    ASSERT_EQ(
        call_gemm(blas.handle, CUBLAS_OP_N, CUBLAS_OP_N, m, n, k, 1.f, da + offset, m, db + 2 * offset, k, 0.f, dc, m),
        CUBLAS_STATUS_SUCCESS);
    if (offset == 0) first = dc.host();
    EXPECT_EQ(dc.host(), first);
  }
}

TEST(Cublas, NothingToDoTouchesNothing) {
  Blas blas;
  EXPECT_EQ(call_gemm(blas.handle, CUBLAS_OP_N, CUBLAS_OP_N, 0, 4, 2, 1.f, nullptr, 1, nullptr, 2, 0.f, nullptr, 1),
            CUBLAS_STATUS_SUCCESS);
}

TEST(Cublas, BetaZeroDoesNotReadC) {
  Blas blas;
  const Array<float> a(std::vector<float>(4, 1)), nan(std::vector<float>(4, NAN));
  for (const int k : {0, 2}) {
    ASSERT_EQ(call_gemm(blas.handle, CUBLAS_OP_N, CUBLAS_OP_N, 2, 2, k, 1.f, a, 2, a, 2, 0.f, nan, 2),
              CUBLAS_STATUS_SUCCESS);
    EXPECT_EQ(nan.host(), std::vector<float>(4, float(k)));
  }
}

// A captured product is recorded under a name that says its shape, with its cost, and runs when the graph is launched.
TEST(Cublas, CanBeCaptured) {
  Stream stream;
  Blas blas(stream);
  const Array<float> a(std::vector<float>(6, 1)), b(std::vector<float>(12, 2)), c(8);
  begin_capture(stream);
  EXPECT_EQ(call_gemm(blas.handle, CUBLAS_OP_T, CUBLAS_OP_N, 2, 4, 3, 1.f, a, 3, b, 3, 0.f, c, 2),
            CUBLAS_STATUS_SUCCESS);
  const std::vector<Operation> recorded = end_capture(stream);
  ASSERT_EQ(recorded.size(), 1u);
  EXPECT_EQ(recorded[0].name, "cublasSgemm TN m=2 n=4 k=3");
  EXPECT_EQ(recorded[0].work.flops, 2 * 2 * 4 * 3);
  EXPECT_EQ(recorded[0].work.bytes, 4 * (2 * 3 + 3 * 4 + 2 * 4));
  EXPECT_EQ(replay(recorded, stream), cudaSuccess);
  EXPECT_EQ(c.host(), std::vector<float>(8, 6));
}

TEST(Cublas, RefusesHandlesAndModes) {
  cublasHandle_t handle = nullptr;
  const Array<char> workspace(workspace_bytes);
  ASSERT_EQ(cublasCreate(&handle), CUBLAS_STATUS_SUCCESS);
  int version = 0;
  EXPECT_EQ(cublasGetVersion(handle, &version), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(version, CUBLAS_VERSION);
  EXPECT_EQ(cublasSetPointerMode(handle, CUBLAS_POINTER_MODE_HOST), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(cublasSetMathMode(handle, CUBLAS_PEDANTIC_MATH), CUBLAS_STATUS_SUCCESS);
  EXPECT_EQ(cublasSetAtomicsMode(handle, CUBLAS_ATOMICS_NOT_ALLOWED), CUBLAS_STATUS_SUCCESS);
  EXPECT_REFUSED(cublasSetPointerMode(handle, CUBLAS_POINTER_MODE_DEVICE), CUBLAS_STATUS_NOT_SUPPORTED, "pointer mode");
  EXPECT_EQ(cublasSetMathMode(handle, CUBLAS_TF32_TENSOR_OP_MATH), CUBLAS_STATUS_SUCCESS);
  EXPECT_REFUSED(cublasSetMathMode(handle, CUBLAS_TENSOR_OP_MATH), CUBLAS_STATUS_NOT_SUPPORTED, "math mode 1");
  EXPECT_REFUSED(cublasSetAtomicsMode(handle, CUBLAS_ATOMICS_ALLOWED), CUBLAS_STATUS_NOT_SUPPORTED, "not repeat");
  EXPECT_REFUSED(cublasSetWorkspace(handle, workspace, 1024), CUBLAS_STATUS_INVALID_VALUE, "workspace of 1024 bytes");
  EXPECT_REFUSED(cublasSetWorkspace(handle, workspace + 64, 20000), CUBLAS_STATUS_INVALID_VALUE, "aligned to 256");
  cudaStream_t dead = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&dead, cudaStreamNonBlocking), cudaSuccess);
  ASSERT_EQ(cudaStreamDestroy(dead), cudaSuccess);
  EXPECT_REFUSED(cublasSetStream(handle, dead), CUBLAS_STATUS_INVALID_VALUE, "stream that does not exist");
  ASSERT_EQ(cublasDestroy(handle), CUBLAS_STATUS_SUCCESS);
  EXPECT_REFUSED(cublasDestroy(handle), CUBLAS_STATUS_INVALID_VALUE, "a cuBLAS handle that does not exist");
  EXPECT_REFUSED(cublasSetStream(nullptr, nullptr), CUBLAS_STATUS_INVALID_VALUE, "a null cuBLAS handle");
  EXPECT_STREQ(cublasGetStatusString(CUBLAS_STATUS_INVALID_VALUE), "an invalid value was passed");
}

TEST(Cublas, RefusesAProductWithoutAWorkspace) {
  Stream stream;
  Blas blas(stream);
  const Array<float> x(std::vector<float>(4, 1)), y(4);
  const auto call = [&] {
    return call_gemm(blas.handle, CUBLAS_OP_N, CUBLAS_OP_N, 2, 2, 2, 1.f, x, 2, x, 2, 0.f, y, 2);
  };
  EXPECT_EQ(call(), CUBLAS_STATUS_SUCCESS);
  ASSERT_EQ(cublasSetStream(blas.handle, stream), CUBLAS_STATUS_SUCCESS);  // resets the workspace
  EXPECT_REFUSED(call(), CUBLAS_STATUS_INVALID_VALUE,
                 "no workspace of the program's own.*captured call would allocate");
}

TEST(Cublas, RefusesArguments) {
  Blas blas;
  const cublasHandle_t h = blas.handle;
  const Array<float> x(std::vector<float>(64, 1)), y(std::vector<float>(64, 1));
  const float one = 1, zero = 0;
  const auto n = CUBLAS_OP_N;
  const auto invalid = CUBLAS_STATUS_INVALID_VALUE;
  EXPECT_REFUSED(call_gemm(h, n, n, -1, 2, 2, 1.f, x, 2, x, 2, 0.f, y, 2), invalid, "m is -1");
  EXPECT_REFUSED(call_gemm(h, n, n, 3, 2, 2, 1.f, x, 2, x, 2, 0.f, y, 3), invalid, "dimension of A is 2.* 3 elements");
  EXPECT_REFUSED(call_gemm(h, n, n, 2, 2, 3, 1.f, x, 2, x, 2, 0.f, y, 2), invalid, "leading dimension of B");
  EXPECT_REFUSED(call_gemm(h, n, n, 3, 2, 2, 1.f, x, 3, x, 2, 0.f, y, 2), invalid, "leading dimension of C");
  EXPECT_REFUSED(call_gemm(h, n, n, 0, 0, 0, 1.f, x, 0, x, 1, 0.f, y, 1), invalid, "dimension of A is 0");
  EXPECT_REFUSED(call_gemm(h, CUBLAS_OP_CONJG, n, 2, 2, 2, 1.f, x, 2, x, 2, 0.f, y, 2), invalid, "transa");
  EXPECT_REFUSED(cublasSgemm(h, n, n, 2, 2, 2, x, x, 2, x, 2, &zero, y, 2), invalid, "alpha is a pointer to device");
  EXPECT_REFUSED(cublasSgemm(h, n, n, 2, 2, 2, &one, x, 2, x, 2, nullptr, y, 2), invalid, "beta is a null pointer");
  EXPECT_REFUSED(call_gemm(h, n, n, 4, 4, 4, 1.f, x, 4, y, 4, 0.f, y + 15, 4), invalid, "C overlaps B");
  EXPECT_REFUSED(call_gemm(h, n, n, 4, 4, 4, 1.f, x + 4, 8, y, 4, 0.f, x + 1, 8), invalid, "C overlaps A");
  EXPECT_EQ(call_gemm(h, n, n, 4, 4, 4, 1.f, x + 4, 8, y, 4, 0.f, x, 8), CUBLAS_STATUS_SUCCESS);  // side by side
  float* w = reinterpret_cast<float*>(static_cast<char*>(blas.workspace));
  EXPECT_REFUSED(call_gemm(h, n, n, 2, 2, 2, 1.f, x, 2, x, 2, 0.f, w, 2), invalid, "the workspace overlaps C");
  EXPECT_REFUSED(batched(blas, 2, 2, 2, x, 4, x, 4, y, 2, 3, 3), invalid, "matrices C of a batch overlap.* 3 elements");
  EXPECT_REFUSED(batched(blas, 2, 2, 2, x, 4, x, 4, y, 2, 0, 2), invalid, "matrices C of a batch overlap");
  EXPECT_REFUSED(batched(blas, 2, 2, 2, x, -4, x, 4, y, 2, 4, 2), invalid, "stride of A is -4");
  EXPECT_REFUSED(batched(blas, 2, 2, 2, x, 4, x, 4, y, 2, 4, -1), invalid, "batch count is -1");
  EXPECT_REFUSED(cublasSsyrk(h, CUBLAS_FILL_MODE_FULL, n, 2, 2, &one, x, 2, &zero, y, 2), invalid, "uplo");
  EXPECT_REFUSED(cublasSsyrk(h, CUBLAS_FILL_MODE_LOWER, n, 4, 2, &one, x, 4, &zero, x + 7, 4), invalid, "C overlaps A");
  EXPECT_REFUSED(cublasScopy(h, 4, x, 1, x + 3, 1), invalid, "y overlaps x");
  EXPECT_REFUSED(cublasScopy(h, 4, x, -1, y, 1), CUBLAS_STATUS_NOT_SUPPORTED, "increments below 1");
}

// Errors of a kernel, after which nothing works any more.
TEST(CublasDeathTest, FaultsThatStay) {
  const auto fails = [](const char* words, auto arguments) {  // arguments(call): calls it with a, b, beta, c
    expect_in_child(
        [&] {
          Blas blas;
          arguments(blas, [&](const float* a, const float* b, float beta, float* c) {
            EXPECT_EQ(call_gemm(blas.handle, CUBLAS_OP_N, CUBLAS_OP_N, 4, 4, 4, 1.f, a, 4, b, 4, beta, c, 4),
                      CUBLAS_STATUS_EXECUTION_FAILED);
            EXPECT_EQ(cublasSetStream(blas.handle, nullptr), CUBLAS_STATUS_EXECUTION_FAILED);
            EXPECT_NE(cudaStreamSynchronize(nullptr), cudaSuccess);
          });
        },
        words);
  };
  const std::vector<float> ones(17, 1);
  fails("cublasSgemm NN m=4 n=4 k=4: B .* is not an address of the device", [&](Blas&, auto call) {
    const Array<float> x(ones), y(16);
    call(x, ones.data(), 0, y);
  });
  fails("A is a null pointer", [&](Blas&, auto call) {
    const Array<float> x(ones), y(16);
    call(nullptr, x, 0, y);
  });
  fails("C .*: 64 bytes, but its allocation ends after 60", [&](Blas&, auto call) {
    const Array<float> x(ones), y(15);
    call(x, x, 0, y);
  });
  fails("B .* is read but was never written", [&](Blas&, auto call) {
    const Array<float> x(ones), unwritten(16), y(16);
    call(x, unwritten, 0, y);
  });
  fails("C .* is read but was never written", [&](Blas&, auto call) {
    const Array<float> x(ones), unwritten(16);
    call(x, x, 1, unwritten);
  });
  fails("A .* is not aligned to 4 bytes", [&](Blas&, auto call) {
    const Array<float> x(ones), y(16);
    call(reinterpret_cast<const float*>(reinterpret_cast<const char*>(static_cast<float*>(x)) + 2), x, 0, y);
  });
  fails("A .* lies outside any allocation", [&](Blas&, auto call) {
    const Array<float> x(ones), y(16), freed(ones);
    cudaFree(freed);
    call(freed, x, 0, y);
  });
  fails("the workspace .* lies outside any allocation", [&](Blas& blas, auto call) {
    const Array<float> x(ones), y(16);
    cudaFree(blas.workspace);
    call(x, x, 0, y);
  });
}

// The part of the elements that differ.
double differing(const std::vector<float>& a, const float* b) {
  size_t count = 0;
  for (size_t i = 0; i < a.size(); i++) count += a[i] != b[i];
  return double(count) / double(a.size());
}

// Under `sums` a replica's result depends on whether it has company and on how much.
TEST(CublasDeathTest, DisturbedSums) {
  const Disturbance sums("sums");
  const auto body = [] {
    Blas blas;
    const int m = 40, n = 30, k = 200;
    const size_t size = size_t(m) * n;
    const std::vector<float> a = normals<float>(size_t(m) * k, 1), b = normals<float>(size_t(n) * k, 2);
    const Array<float> da(a), db(b), alone(size), two(size * 2), three(size * 3);
    call_gemm(blas.handle, CUBLAS_OP_N, CUBLAS_OP_T, m, n, k, 1.f, da, m, db, n, 0.f, alone, m);
    batched(blas, m, n, k, da, 0, db, 0, two, m, m * n, 2);
    batched(blas, m, n, k, da, 0, db, 0, three, m, m * n, 3);
    const std::vector<float> in_two = two.host(), in_three = three.host();
    EXPECT_GT(differing(alone.host(), in_two.data()), 0.1);
    EXPECT_GT(differing(three.host(0, size), in_two.data()), 0.1);
    EXPECT_EQ(differing(three.host(0, size), &in_three[size]), 0);
    std::vector<float> wanted(size);
    product(false, true, m, n, k, 1, a, m, 0, b, n, 0, 0, wanted, m, 0);
    expect_close(three.host(0, size), wanted, 1e-6);
    batched(blas, m, n, k, da, 0, db, 0, two, m, m * n, 2);
    EXPECT_EQ(two.host(), in_two);
  };
  expect_in_child(body, "");
}

}  // namespace
}  // namespace ptx::test
