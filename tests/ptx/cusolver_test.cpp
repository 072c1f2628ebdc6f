// The stand-in of cuSOLVER: factorisations against plain loops in double, and what it refuses.
#include <cusolverDn.h>

#include <cmath>
#include <limits>

#include "tests/ptx/libraries_test.h"
#include "tests/ptx/stream.h"

namespace ptx::test {
namespace {

template <class Real>
struct Functions;
template <>
struct Functions<float> {
  static constexpr auto potrf = cusolverDnSpotrf;
  static constexpr auto potrf_size = cusolverDnSpotrf_bufferSize;
  static constexpr auto potri = cusolverDnSpotri;
  static constexpr auto potri_size = cusolverDnSpotri_bufferSize;
  static constexpr auto syevd = cusolverDnSsyevd;
  static constexpr auto syevd_size = cusolverDnSsyevd_bufferSize;
};
template <>
struct Functions<double> {
  static constexpr auto potrf = cusolverDnDpotrf;
  static constexpr auto potrf_size = cusolverDnDpotrf_bufferSize;
  static constexpr auto potri = cusolverDnDpotri;
  static constexpr auto potri_size = cusolverDnDpotri_bufferSize;
  static constexpr auto syevd = cusolverDnDsyevd;
  static constexpr auto syevd_size = cusolverDnDsyevd_bufferSize;
};

constexpr auto lower = CUBLAS_FILL_MODE_LOWER, upper = CUBLAS_FILL_MODE_UPPER;
constexpr auto vectors = CUSOLVER_EIG_MODE_VECTOR, no_vectors = CUSOLVER_EIG_MODE_NOVECTOR;

template <class Real>
struct Solver {
  using F = Functions<Real>;
  cusolverDnHandle_t handle = nullptr;
  Array<int> info{1};

  Solver() { EXPECT_EQ(cusolverDnCreate(&handle), CUSOLVER_STATUS_SUCCESS); }
  ~Solver() {
    if (handle) cusolverDnDestroy(handle);
  }

  // These return devInfo.
  int potrf(cublasFillMode_t fill, int n, Real* a, int lda) {
    int size = 0;
    EXPECT_EQ(F::potrf_size(handle, fill, n, a, lda, &size), CUSOLVER_STATUS_SUCCESS);
    const Array<Real> work(size);
    EXPECT_EQ(F::potrf(handle, fill, n, a, lda, work, size, info), CUSOLVER_STATUS_SUCCESS);
    EXPECT_TRUE(std::isnan(work.host()[size - 1]));
    return info.host()[0];
  }
  int potri(cublasFillMode_t fill, int n, Real* a, int lda) {
    int size = 0;
    EXPECT_EQ(F::potri_size(handle, fill, n, a, lda, &size), CUSOLVER_STATUS_SUCCESS);
    const Array<Real> work(size);
    EXPECT_EQ(F::potri(handle, fill, n, a, lda, work, size, info), CUSOLVER_STATUS_SUCCESS);
    return info.host()[0];
  }
  int syevd(cusolverEigMode_t job, cublasFillMode_t fill, int n, Real* a, int lda, Real* values) {
    int size = 0;
    EXPECT_EQ(F::syevd_size(handle, job, fill, n, a, lda, values, &size), CUSOLVER_STATUS_SUCCESS);
    const Array<Real> work(size);
    EXPECT_EQ(F::syevd(handle, job, fill, n, a, lda, values, work, size, info), CUSOLVER_STATUS_SUCCESS);
    return info.host()[0];
  }
};

// A symmetric, positive definite matrix, and the device's copy of one triangle of it; the rest is not written.
template <class Real>
struct Symmetric {
  int n, lda;
  std::vector<Real> values;
  Array<Real> device;

  Symmetric(int n, int lda, cublasFillMode_t fill) : n(n), lda(lda), values(size_t(n) * lda), device(values.size()) {
    const std::vector<Real> b = normals<Real>(size_t(n) * n, 1);
    for (int i = 0; i < n; i++)
      for (int j = 0; j < n; j++) {
        double sum = i == j ? n : 0;
        for (int l = 0; l < n; l++) sum += double(b[size_t(i) * n + l]) * b[size_t(j) * n + l];
        values[at(i, j)] = Real(sum);
      }
    for (int j = 0; j < n; j++) upload(fill == lower ? j : 0, j, fill == lower ? n - j : j + 1);
  }
  size_t at(int row, int column) const { return size_t(column) * lda + row; }
  void upload(int row, int column, int rows) {
    EXPECT_EQ(cudaMemcpyAsync(device + at(row, column), &values[at(row, column)], rows * sizeof(Real),
                              cudaMemcpyHostToDevice, nullptr),
              cudaSuccess);
  }
  void set(int row, int column, Real value) {
    values[at(row, column)] = values[at(column, row)] = value;
    upload(row, column, 1);
  }
  Real get(int row, int column) const { return device.host(at(row, column), 1)[0]; }
  // Of the lower triangle, whichever one the device has.
  std::vector<double> triangle(cublasFillMode_t fill) const {
    std::vector<double> l(size_t(n) * n);
    for (int i = 0; i < n; i++)
      for (int j = 0; j <= i; j++) l[size_t(i) * n + j] = fill == lower ? get(i, j) : get(j, i);
    return l;
  }
};

template <class T>
class CusolverOf : public testing::Test {
 protected:
  static constexpr double tolerance = 100 * std::numeric_limits<T>::epsilon();
};
using Reals = testing::Types<float, double>;
TYPED_TEST_SUITE(CusolverOf, Reals);

TYPED_TEST(CusolverOf, FactorisesAndInvertsOneTriangle) {
  using Real = TypeParam;
  Solver<Real> solver;
  for (const auto fill : {lower, upper})
    for (const int n : {1, 2, 23, 70}) {
      SCOPED_TRACE(testing::Message() << "order " << n << " fill " << fill);
      Symmetric<Real> a(n, n + 2, fill);
      ASSERT_EQ(solver.potrf(fill, n, a.device, a.lda), 0);
      const std::vector<double> l = a.triangle(fill);
      for (int i = 0; i < n; i++)
        for (int j = 0; j <= i; j++) {
          double sum = 0;
          for (int k = 0; k <= j; k++) sum += l[size_t(i) * n + k] * l[size_t(j) * n + k];
          ASSERT_NEAR(sum, a.values[a.at(i, j)], this->tolerance * n);
        }
      ASSERT_EQ(solver.potri(fill, n, a.device, a.lda), 0);
      const std::vector<double> inverse = a.triangle(fill);
      for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) {
          double sum = 0;
          for (int k = 0; k < n; k++)
            sum += a.values[a.at(i, k)] * (k >= j ? inverse[size_t(k) * n + j] : inverse[size_t(j) * n + k]);
          ASSERT_NEAR(sum, i == j, this->tolerance * n);
        }
    }
}

TYPED_TEST(CusolverOf, SaysWhereAMatrixIsNotPositiveDefinite) {
  Solver<TypeParam> solver;
  Symmetric<TypeParam> a(40, 40, upper);
  a.set(30, 30, -1);
  EXPECT_EQ(solver.potrf(upper, a.n, a.device, a.lda), 31);
}

// The real one promises nothing: the double version says what the float version does not.
TYPED_TEST(CusolverOf, FactorisesOverANaN) {
  Solver<TypeParam> solver;
  Symmetric<TypeParam> a(40, 40, lower);
  a.set(30, 7, NAN);
  EXPECT_EQ(solver.potrf(lower, a.n, a.device, a.lda), sizeof(TypeParam) == sizeof(float) ? 0 : 31);
  EXPECT_TRUE(std::isfinite(a.get(29, 29)));
  EXPECT_TRUE(std::isnan(a.get(30, 30)));
}

TYPED_TEST(CusolverOf, SaysWhereATriangleIsSingular) {
  Solver<TypeParam> solver;
  for (const auto fill : {lower, upper})
    for (const int n : {12, 150}) {
      Symmetric<TypeParam> a(n, n, fill);
      a.set(9, 9, 0);
      a.set(5, 5, 0);
      EXPECT_EQ(solver.potri(fill, a.n, a.device, a.lda), 6);
    }
}

TYPED_TEST(CusolverOf, FindsEigenvalues) {
  using Real = TypeParam;
  Solver<Real> solver;
  for (const auto fill : {lower, upper})
    for (const int n : {1, 2, 33}) {
      Symmetric<Real> a(n, n + 1, fill), again(n, n + 1, fill);
      const Array<Real> w(n), only_values(n);
      ASSERT_EQ(solver.syevd(vectors, fill, n, a.device, a.lda, w), 0);
      ASSERT_EQ(solver.syevd(no_vectors, fill, n, again.device, again.lda, only_values), 0);
      const std::vector<Real> values = w.host(), others = only_values.host();
      for (int v = 0; v < n; v++) {
        ASSERT_NEAR(values[v], others[v], this->tolerance * values[n - 1]);
        ASSERT_LE(values[std::max(v - 1, 0)], values[v]);
        const std::vector<Real> x = a.device.host(a.at(0, v), n);
        for (int i = 0; i < n; i++) {
          double sum = 0;
          for (int j = 0; j < n; j++) sum += double(a.values[a.at(i, j)]) * x[j];
          ASSERT_NEAR(sum, double(values[v]) * x[i], this->tolerance * values[n - 1]);
        }
      }
    }
}

TYPED_TEST(CusolverOf, OrderZero) {
  Solver<TypeParam> solver;
  EXPECT_EQ(solver.potrf(lower, 0, nullptr, 1), 0);
  EXPECT_EQ(solver.potri(lower, 0, nullptr, 1), 0);
  EXPECT_EQ(solver.syevd(vectors, lower, 0, nullptr, 1, nullptr), 0);
}

// So that a program which asks for the largest order only is seen.
TEST(Cusolver, WorkIsNotMonotone) {
  Solver<float> solver;
  int falls = 0, last = 0, differs = 0;
  for (int n = 1; n <= 64; n++) {
    int potrf = 0, potri = 0;
    ASSERT_EQ(cusolverDnSpotrf_bufferSize(solver.handle, lower, n, nullptr, n, &potrf), CUSOLVER_STATUS_SUCCESS);
    ASSERT_EQ(cusolverDnSpotri_bufferSize(solver.handle, lower, n, nullptr, n, &potri), CUSOLVER_STATUS_SUCCESS);
    ASSERT_GT(potrf, 0);
    falls += potrf < last;
    differs += potrf != potri;
    last = potrf;
  }
  EXPECT_GT(falls, 10);
  EXPECT_GT(differs, 60);
}

TEST(Cusolver, Refuses) {
  const auto invalid = CUSOLVER_STATUS_INVALID_VALUE;
  Stream stream;
  Solver<float> solver;
  const cusolverDnHandle_t h = solver.handle;
  Symmetric<float> a(8, 8, lower);
  const Array<float> work(4096), values(8);
  int size = 0;
  ASSERT_EQ(cusolverDnSpotrf_bufferSize(h, lower, 8, a.device, 8, &size), CUSOLVER_STATUS_SUCCESS);
  EXPECT_EQ(cusolverDnSetDeterministicMode(h, CUSOLVER_DETERMINISTIC_RESULTS), CUSOLVER_STATUS_SUCCESS);
  EXPECT_REFUSED(cusolverDnSetDeterministicMode(h, CUSOLVER_ALLOW_NON_DETERMINISTIC_RESULTS),
                 CUSOLVER_STATUS_NOT_SUPPORTED, "deterministic");
  EXPECT_REFUSED(cusolverDnSpotrf_bufferSize(h, lower, -1, a.device, 8, &size), invalid, "n is -1");
  EXPECT_REFUSED(cusolverDnSpotrf_bufferSize(h, lower, 8, a.device, 7, &size), invalid, "leading dimension of A is 7");
  EXPECT_REFUSED(cusolverDnSpotrf(h, lower, 8, a.device, 8, work, size - 1, solver.info), invalid,
                 "a work array of [0-9]+ elements, the function wants");
  EXPECT_REFUSED(cusolverDnSpotrf(h, CUBLAS_FILL_MODE_FULL, 8, a.device, 8, work, 4096, solver.info), invalid, "uplo");
  EXPECT_REFUSED(cusolverDnSpotrf(h, lower, 8, a.device, 8, a.device, 4096, solver.info), invalid,
                 "the work array overlaps A");
  EXPECT_REFUSED(cusolverDnSpotri(h, lower, 8, a.device, 8, work, 4096, reinterpret_cast<int*>(a.device + 0)), invalid,
                 "devInfo overlaps A");
  EXPECT_REFUSED(cusolverDnSsyevd(h, vectors, lower, 8, a.device, 8, a.device + 8, work, 4096, solver.info), invalid,
                 "W overlaps A");
  EXPECT_REFUSED(cusolverDnSsyevd(h, cusolverEigMode_t(7), lower, 8, a.device, 8, values, work, 4096, solver.info),
                 invalid, "jobz");

  ASSERT_EQ(cusolverDnSetStream(h, stream), CUSOLVER_STATUS_SUCCESS);
  begin_capture(stream);
  EXPECT_REFUSED(cusolverDnSpotrf(h, lower, 8, a.device, 8, work, 4096, solver.info), invalid,
                 "the stream is being captured");
  cusolverDnHandle_t other = nullptr;
  EXPECT_REFUSED(cusolverDnCreate(&other), invalid, "while a stream is being captured");
  EXPECT_TRUE(end_capture(stream).empty());
  cusolverDnHandle_t stale = h;
  solver.handle = nullptr;
  ASSERT_EQ(cusolverDnDestroy(stale), CUSOLVER_STATUS_SUCCESS);
  EXPECT_REFUSED(cusolverDnSpotrf(stale, lower, 8, a.device, 8, work, 4096, solver.info), invalid,
                 "a cuSOLVER handle that does not exist");
}

TEST(CusolverDeathTest, FaultsThatStay) {
  const auto fails = [](const char* words, auto body) {
    expect_in_child(
        [&] {
          Solver<double> solver;
          Symmetric<double> a(8, 8, lower);
          const Array<double> work(4096), values(8);
          EXPECT_EQ(body(solver, a, work, values), CUSOLVER_STATUS_EXECUTION_FAILED);
          EXPECT_EQ(cusolverDnSetStream(solver.handle, nullptr), CUSOLVER_STATUS_EXECUTION_FAILED);
        },
        words);
  };
  fails("A .* is read but was never written", [](auto& s, auto& a, double* work, double*) {
    return cusolverDnDpotrf(s.handle, upper, 8, a.device, 8, work, 4096, s.info);
  });
  fails("devInfo .* is not an address of the device", [](auto& s, auto& a, double* work, double*) {
    int info = 0;
    return cusolverDnDpotrf(s.handle, lower, 8, a.device, 8, work, 4096, &info);
  });
  fails("the workspace is a null pointer", [](auto& s, auto& a, double*, double*) {
    return cusolverDnDpotrf(s.handle, lower, 8, a.device, 8, nullptr, 4096, s.info);
  });
  fails("A\\[6\\]\\[2\\] is not finite", [](auto& s, auto& a, double* work, double* values) {
    a.set(6, 2, NAN);
    return cusolverDnDsyevd(s.handle, vectors, lower, 8, a.device, 8, values, work, 4096, s.info);
  });
  fails("A\\[7\\]\\[7\\] is not finite", [](auto& s, auto& a, double* work, double* values) {
    a.set(7, 7, INFINITY);
    return cusolverDnDsyevd(s.handle, no_vectors, lower, 8, a.device, 8, values, work, 4096, s.info);
  });
}

}  // namespace
}  // namespace ptx::test
