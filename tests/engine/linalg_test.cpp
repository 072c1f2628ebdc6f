// Against loops in double, and by the identities that define a factorisation. Products of small integers are exact in
// either type, whatever the order of the sums.
#include "engine/linalg.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

template <class Real>
class Linalg : public testing::Test {};
using Reals = testing::Types<float, double>;
TYPED_TEST_SUITE(Linalg, Reals);

template <class Real>
constexpr double eps = std::numeric_limits<Real>::epsilon();

template <class Real>
std::vector<Real> integers(size_t n, int seed) {
  std::mt19937 random(seed);
  std::vector<Real> v(n);
  for (Real& x : v) x = Real(int(random() % 7)) - 3;
  return v;
}
template <class Real>
std::vector<Real> normals(size_t n, int seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<Real> v(n);
  for (Real& x : v) x = Real(normal(random));
  return v;
}

template <class Real>
bool same_bits(const std::vector<Real>& a, const std::vector<Real>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(Real)) == 0);
}

// The product [m x k][k x n] of packed matrices, either of them transposed, in double.
template <class A, class B>
std::vector<double> product(bool transpose_a, bool transpose_b, int m, int n, int k, const std::vector<A>& a,
                            const std::vector<B>& b) {
  std::vector<double> c(size_t(m) * n);
  for (int i = 0; i < m; i++)
    for (int j = 0; j < n; j++)
      for (int l = 0; l < k; l++)
        c[size_t(i) * n + j] += double(a[transpose_a ? size_t(l) * m + i : size_t(i) * k + l]) *
                                double(b[transpose_b ? size_t(j) * k + l : size_t(l) * n + j]);
  return c;
}

// What results are held against: they should be that far from it at most, in relation to the largest element.
template <class Real, class Want>
testing::AssertionResult near(const std::vector<Real>& got, const std::vector<Want>& want, double tolerance) {
  return close(got, want, {.l2 = tolerance, .worst = tolerance, .bias = tolerance});
}

template <class Real>
std::vector<Real> identity(int n) {
  std::vector<Real> v(size_t(n) * n);
  for (int i = 0; i < n; i++) v[size_t(i) * (n + 1)] = 1;
  return v;
}

// A random positive definite matrix of condition about 10, exactly symmetric.
template <class Real>
std::vector<Real> positive(int n, int seed) {
  const std::vector<double> g = normals<double>(size_t(n) * n, seed);
  std::vector<double> a = product(false, true, n, n, n, g, g);
  for (int i = 0; i < n; i++) a[size_t(i) * (n + 1)] += n / 2.;
  return {a.begin(), a.end()};
}

// Its strict upper triangle replaced.
template <class Real>
std::vector<Real> lower_with(std::vector<Real> a, int n, Real above) {
  for (int i = 0; i < n; i++)
    for (int j = i + 1; j < n; j++) a[size_t(i) * n + j] = above;
  return a;
}

const std::vector<int> orders{1, 2, 3, 7, 16, 31, 33, 64, 65, 100, 131};

// --------------------------------------------------------------------------------------------------------- products
struct Product {
  bool transpose_a, transpose_b;
  int m, n, k;
  double alpha = 1, beta = 0;
  int pad = 0;  // elements between the end of a row and the next
};

template <class Real>
void check_product(const Product& p) {
  SCOPED_TRACE(testing::Message() << p.m << "x" << p.n << "x" << p.k << (p.transpose_a ? " A'" : "")
                                  << (p.transpose_b ? " B'" : "") << " alpha " << p.alpha << " beta " << p.beta
                                  << " padding " << p.pad);
  const int lda = (p.transpose_a ? p.m : p.k) + p.pad, ldb = (p.transpose_b ? p.k : p.n) + 2 * p.pad, ldc = p.n + p.pad;
  std::vector<Real> a = integers<Real>(size_t(p.transpose_a ? p.k : p.m) * lda, 1);
  std::vector<Real> b = integers<Real>(size_t(p.transpose_b ? p.n : p.k) * ldb, 2);
  std::vector<Real> c = integers<Real>(size_t(p.m) * ldc, 3);
  const auto spoil = [](std::vector<Real>& v, int columns, int ld) {
    for (size_t i = 0; i < v.size(); i++)
      if (int(i % ld) >= columns) v[i] = NAN;
  };
  spoil(a, lda - p.pad, lda), spoil(b, ldb - 2 * p.pad, ldb), spoil(c, p.n, ldc);
  std::vector<Real> want = c;
  for (int i = 0; i < p.m; i++)
    for (int j = 0; j < p.n; j++) {
      double sum = 0;
      for (int l = 0; l < p.k; l++)
        sum += double(a[p.transpose_a ? size_t(l) * lda + i : size_t(i) * lda + l]) *
               double(b[p.transpose_b ? size_t(j) * ldb + l : size_t(l) * ldb + j]);
      Real& x = want[size_t(i) * ldc + j];
      x = Real(p.alpha * sum + (p.beta == 0 ? 0 : p.beta * double(x)));
      if (p.beta == 0) c[size_t(i) * ldc + j] = NAN;  // is not read
    }
  Memory memory;
  Buffer da(memory, a), db(memory, b), dc(memory, c);
  multiply<Real>(memory.device(), p.transpose_a, p.transpose_b, p.m, p.n, p.k, Real(p.alpha), da, lda, db, ldb,
                 Real(p.beta), dc, ldc);
  EXPECT_TRUE(exact(dc.host(), want));
  EXPECT_TRUE(exact(da.host(), a));
  EXPECT_TRUE(exact(db.host(), b));
}

TYPED_TEST(Linalg, MultiplyExact) {
  BATON_NEEDS_DEVICE();
  for (bool ta : {false, true})
    for (bool tb : {false, true})
      for (int pad : {0, 3}) {
        for (double beta : {0., 1., -2.}) {
          check_product<TypeParam>({ta, tb, 1, 1, 1, 1, beta, pad});
          check_product<TypeParam>({ta, tb, 3, 5, 7, -1, beta, pad});
          check_product<TypeParam>({ta, tb, 1, 65, 65, 2, beta, pad});
          check_product<TypeParam>({ta, tb, 65, 1, 33, 2, beta, pad});
          check_product<TypeParam>({ta, tb, 33, 10, 17, 0.5, beta, pad});
          check_product<TypeParam>({ta, tb, 10, 65, 65, 1, beta, pad});
          check_product<TypeParam>({ta, tb, 4, 3, 0, 1, beta, pad});  // no terms at all
        }
        // On the host: narrow tiles of few rows, with and without a rest; tiles of rows; and of columns.
        check_product<TypeParam>({ta, tb, 2, 1030, 600, 1, 1, pad});
        check_product<TypeParam>({ta, tb, 10, 300, 401, -2, 0, pad});
        check_product<TypeParam>({ta, tb, 32, 129, 310, 1, 1, pad});
        check_product<TypeParam>({ta, tb, 32, 70, 20, 1, 1, pad});
        check_product<TypeParam>({ta, tb, 401, 190, 270, 1, 1, pad});
        check_product<TypeParam>({ta, tb, 90, 601, 370, 1, 0, pad});
      }
}

TYPED_TEST(Linalg, MultiplyAgainstReference) {
  BATON_NEEDS_DEVICE();
  for (bool tb : {false, true})
    for (int m : {1, 10, 33}) {
      const int n = 257, k = 500;
      const auto a = normals<TypeParam>(m * k, 1), b = normals<TypeParam>(k * n, 2);
      Memory memory;
      Buffer da(memory, a), db(memory, b);
      Buffer<TypeParam> c(memory, m * n);
      multiply<TypeParam>(memory.device(), false, tb, m, n, k, 1, da, k, db, tb ? k : n, 0, c, n);
      EXPECT_TRUE(close(c.host(), product(false, tb, m, n, k, a, b), {.l2 = 8 * eps<TypeParam>}));
    }
}

TYPED_TEST(Linalg, MultiplyRefuses) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  Buffer<TypeParam> a(memory, 12), b(memory, 12), c(memory, 12, TypeParam(7));
  const auto run = [&](bool ta, bool tb, int m, int n, int k, int lda, int ldb, int ldc) {
    multiply<TypeParam>(memory.device(), ta, tb, m, n, k, 1, a, lda, b, ldb, 0, c, ldc);
  };
  EXPECT_THROW(run(false, false, -1, 3, 3, 3, 3, 3), InputError);
  EXPECT_THROW(run(false, false, 3, -1, 3, 3, 3, 3), InputError);
  EXPECT_THROW(run(false, false, 3, 3, -1, 3, 3, 3), InputError);
  EXPECT_THROW(run(false, false, 2, 4, 3, 2, 4, 4), InputError);
  EXPECT_THROW(run(true, false, 2, 4, 3, 1, 4, 4), InputError);
  EXPECT_THROW(run(false, false, 2, 4, 3, 3, 3, 4), InputError);
  EXPECT_THROW(run(false, true, 2, 4, 3, 3, 2, 4), InputError);
  EXPECT_THROW(run(false, false, 2, 4, 3, 3, 4, 3), InputError);
  run(true, true, 2, 4, 3, 2, 3, 4);
  c.set(std::vector<TypeParam>(12, 7));
  run(false, false, 0, 4, 3, 3, 4, 4), run(true, false, 0, 4, 3, 0, 4, 4);  // nothing to do
  run(false, false, 2, 0, 3, 3, 0, 0), run(false, true, 2, 0, 3, 3, 3, 0);
  EXPECT_TRUE(exact(c.host(), std::vector<TypeParam>(12, 7)));
}

// ----------------------------------------------------------------------------------------------------- rank updates
template <class Real>
void check_update(bool transpose, int n, int k, double alpha, double beta, int pad) {
  SCOPED_TRACE(testing::Message() << n << ", rank " << k << (transpose ? " A'A" : " AA'") << " alpha " << alpha
                                  << " beta " << beta << " padding " << pad);
  const int lda = (transpose ? n : k) + pad, ldc = n + pad;
  const std::vector<Real> a = integers<Real>(size_t(transpose ? k : n) * lda, 1);
  std::vector<Real> c = integers<Real>(size_t(n) * ldc, 2);
  for (int i = 0; i < n; i++)
    for (int j = i + 1; j < ldc; j++) c[size_t(i) * ldc + j] = NAN;  // the strict upper triangle, and what follows it
  std::vector<Real> want = c;
  for (int i = 0; i < n; i++)
    for (int j = 0; j <= i; j++) {
      double sum = 0;
      for (int l = 0; l < k; l++)
        sum += transpose ? double(a[size_t(l) * lda + i]) * double(a[size_t(l) * lda + j])
                         : double(a[size_t(i) * lda + l]) * double(a[size_t(j) * lda + l]);
      Real& x = want[size_t(i) * ldc + j];
      x = Real(alpha * sum + (beta == 0 ? 0 : beta * double(x)));
      if (beta == 0) c[size_t(i) * ldc + j] = NAN;
    }
  Memory memory;
  Buffer da(memory, a), dc(memory, c);
  rank_update<Real>(memory.device(), transpose, n, k, Real(alpha), da, lda, Real(beta), dc, ldc);
  EXPECT_TRUE(exact(dc.host(), want));
}

TYPED_TEST(Linalg, RankUpdateExact) {
  BATON_NEEDS_DEVICE();
  for (bool transpose : {false, true})
    for (int pad : {0, 3}) {
      for (double beta : {0., 1., 0.5})
        for (int n : {1, 3, 10, 33, 65})
          for (int k : {0, 1, 7, 32}) check_update<TypeParam>(transpose, n, k, k == 7 ? -2 : 1, beta, pad);
      check_update<TypeParam>(transpose, 301, 200, 1, 1, pad);   // two tiles on the host
      check_update<TypeParam>(transpose, 515, 230, -1, 0, pad);  // four, the last one shorter
    }
}

TYPED_TEST(Linalg, RankUpdateRefuses) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  Buffer<TypeParam> a(memory, 12), c(memory, 16, TypeParam(7));
  const auto run = [&](bool transpose, int n, int k, int lda, int ldc) {
    rank_update<TypeParam>(memory.device(), transpose, n, k, 1, a, lda, 0, c, ldc);
  };
  EXPECT_THROW(run(false, -1, 3, 3, 4), InputError);
  EXPECT_THROW(run(false, 4, -1, 3, 4), InputError);
  EXPECT_THROW(run(false, 4, 3, 2, 4), InputError);
  EXPECT_THROW(run(true, 4, 3, 3, 4), InputError);
  EXPECT_THROW(run(false, 4, 3, 3, 3), InputError);
  run(false, 0, 3, 3, 0);
  EXPECT_TRUE(exact(c.host(), std::vector<TypeParam>(16, 7)));
}

// ----------------------------------------------------------------------------------------------------------- mirror
TYPED_TEST(Linalg, MirrorLowerSmall) {
  BATON_NEEDS_DEVICE();
  for (int n : {0, 1, 2, 5, 31, 32, 33, 64, 65, 97, 130, 200})
    for (int pad : {0, 3}) {
      SCOPED_TRACE(n);
      const int lda = n + pad;
      std::vector<TypeParam> a(size_t(n) * lda);
      std::iota(a.begin(), a.end(), TypeParam(1));
      std::vector<TypeParam> want = a;
      for (int i = 0; i < n; i++)
        for (int j = 0; j < i; j++) want[size_t(j) * lda + i] = a[size_t(i) * lda + j];
      Memory memory;
      Buffer da(memory, a);
      mirror_lower<TypeParam>(da, n, lda, memory.stream());
      EXPECT_TRUE(exact(da.host(), want));
    }
  EXPECT_THROW(mirror_lower<TypeParam>(nullptr, -1, 4, {}), InputError);
  EXPECT_THROW(mirror_lower<TypeParam>(nullptr, 4, 3, {}), InputError);
}

// --------------------------------------------------------------------------------------------------- factorisations
template <class Real>
struct Factored {
  explicit Factored(int largest) : factorizer(memory.device(), memory.arena(), largest) { memory.arena().freeze(); }
  Memory memory, data;
  Factorizer<Real> factorizer;
};

// L of A by the textbook's loops, in double; the strict upper triangle is zero.
template <class Real>
std::vector<double> factor_of(const std::vector<Real>& a, int n) {
  std::vector<double> l(size_t(n) * n);
  for (int i = 0; i < n; i++)
    for (int j = 0; j <= i; j++) {
      double sum = double(a[size_t(i) * n + j]);
      for (int k = 0; k < j; k++) sum -= l[size_t(i) * n + k] * l[size_t(j) * n + k];
      l[size_t(i) * n + j] = i == j ? std::sqrt(sum) : sum / l[size_t(j) * (n + 1)];
    }
  return l;
}

TYPED_TEST(Linalg, CholeskyInvertDeterminant) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  Factored<Real> f(131);
  for (int n : orders) {
    SCOPED_TRACE(n);
    const std::vector<Real> a = positive<Real>(n, n);
    const double tolerance = 4 * eps<Real> * (n + 4);
    Buffer da(f.data, lower_with(a, n, Real(NAN)));
    ASSERT_EQ(f.factorizer.cholesky(da, n), 0);
    const std::vector<Real> got = da.host(), l = lower_with(got, n, Real(0));
    for (int i = 0; i < n; i++)
      for (int j = i + 1; j < n; j++) ASSERT_TRUE(std::isnan(got[size_t(i) * n + j])) << i << ", " << j;
    const std::vector<double> want = factor_of(a, n);
    EXPECT_TRUE(near(l, want, tolerance));
    EXPECT_TRUE(near(product(false, true, n, n, n, l, l), a, tolerance));

    double log_det = 0;
    for (int i = 0; i < n; i++) log_det += 2 * std::log(want[size_t(i) * (n + 1)]);
    EXPECT_NEAR(f.factorizer.log_determinant(da, n), log_det, tolerance * (1 + n));

    f.factorizer.invert(da, n);
    const std::vector<Real> inverse = da.host();
    EXPECT_TRUE(near(product(false, false, n, n, n, a, inverse), identity<double>(n), 20 * tolerance));
    for (int i = 0; i < n; i++)
      for (int j = 0; j < i; j++) ASSERT_EQ(inverse[size_t(i) * n + j], inverse[size_t(j) * n + i]);
  }
}

TYPED_TEST(Linalg, Solve) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  Factored<Real> f(400);
  for (int n : {1, 2, 7, 33, 65, 100, 400})
    for (int columns : {1, 3, 4, 5, 10, 65, 400})
      for (bool transpose : {false, true})
        for (int pad : {0, 2}) {
          if (n == 400 && columns != 3 && columns != 400) continue;
          if (n < 400 && columns == 400) continue;
          SCOPED_TRACE(testing::Message() << n << ", " << columns << " columns, " << transpose << " " << pad);
          std::vector<Real> l = normals<Real>(size_t(n) * n, n);  // small off the diagonal: well conditioned
          for (Real& x : l) x /= n;
          for (int i = 0; i < n; i++) l[size_t(i) * (n + 1)] = Real(1.5 + (i % 3));
          const int ldb = columns + pad;
          std::vector<Real> b = normals<Real>(size_t(n) * ldb, 2);
          Buffer dl(f.data, lower_with(l, n, Real(NAN))), db(f.data, b);
          f.factorizer.solve(transpose, dl, n, db, columns, ldb);
          const std::vector<Real> got = db.host();
          std::vector<double> want(b.begin(), b.end());  // by substitution; the padding as it was
          for (int step = 0; step < n; step++) {
            const int i = transpose ? n - 1 - step : step;
            for (int j = 0; j < columns; j++) {
              double sum = want[size_t(i) * ldb + j];
              for (int k = transpose ? i + 1 : 0; k < (transpose ? n : i); k++)
                sum -= double(transpose ? l[size_t(k) * n + i] : l[size_t(i) * n + k]) * want[size_t(k) * ldb + j];
              want[size_t(i) * ldb + j] = sum / double(l[size_t(i) * (n + 1)]);
            }
          }
          EXPECT_TRUE(near(got, want, 20 * eps<Real>));
          for (int i = 0; i < n; i++)
            for (int j = columns; j < ldb; j++) ASSERT_EQ(got[size_t(i) * ldb + j], b[size_t(i) * ldb + j]);
        }
}

// A diagonal element that makes exactly the minor of its order fail: by a little, to zero, or as no number.
TYPED_TEST(Linalg, NotPositiveDefinite) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  Factored<Real> f(300);
  for (int n : {1, 2, 7, 40, 65, 131, 300}) {
    const std::vector<Real> a = positive<Real>(n, n);
    const std::vector<double> l = factor_of(a, n);
    for (int i : {0, 1, n / 3, n / 2, n - 2, n - 1}) {
      if (i < 0 || i >= n) continue;
      SCOPED_TRACE(testing::Message() << "element " << i << " of " << n);
      const size_t at = size_t(i) * (n + 1);
      const auto order = [&](std::vector<Real> bad) {
        Buffer da(f.data, lower_with(bad, n, Real(NAN)));
        return f.factorizer.cholesky(da, n);
      };
      std::vector<Real> bad = a;
      bad[at] = Real(double(a[at]) - 1.1 * l[at] * l[at]);  // the pivot's square is -0.1 of what it was
      EXPECT_EQ(order(bad), i + 1);
      bad[at] = -1;
      EXPECT_EQ(order(bad), i + 1);
      bad[at] = NAN;
      EXPECT_EQ(order(bad), i + 1);
      bad[at] = INFINITY;
      EXPECT_EQ(order(bad), i + 1);
      if (i > 0) {  // off the diagonal: the first minor that contains it
        bad = a, bad[size_t(i) * n + i / 2] = NAN;
        EXPECT_EQ(order(bad), i + 1);
        bad[0] = 0;  // an earlier fault of another kind
        EXPECT_EQ(order(bad), 1);
        bad = a, bad[at] = -1, bad[size_t(i) * n] = NAN;
        EXPECT_EQ(order(bad), i + 1);
        bad = a, bad[at] = -1, bad[size_t(i - 1) * (n + 1)] = NAN;  // of a NaN and a negative pivot, the first
        EXPECT_EQ(order(bad), i);
      }
      EXPECT_EQ(order(a), 0);
    }
  }
  Buffer<Real> zeros(f.data, 16);
  EXPECT_EQ(f.factorizer.cholesky(zeros, 4), 1);
}

TYPED_TEST(Linalg, Eigen) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  Factored<Real> f(131);
  for (int n : orders) {
    SCOPED_TRACE(n);
    std::vector<Real> a = normals<Real>(size_t(n) * n, n);  // indefinite
    for (int i = 0; i < n; i++)
      for (int j = i + 1; j < n; j++) a[size_t(i) * n + j] = a[size_t(j) * n + i];
    const double tolerance = 10 * eps<Real> * (n + 4);
    Buffer da(f.data, lower_with(a, n, Real(NAN)));
    Buffer<Real> values(f.data, n, Real(NAN));
    ASSERT_EQ(f.factorizer.eigen(da, values, n), 0);
    const std::vector<Real> q = da.host(), lambda = values.host();
    EXPECT_TRUE(std::is_sorted(lambda.begin(), lambda.end()));
    EXPECT_TRUE(near(product(false, true, n, n, n, q, q), identity<double>(n), tolerance));  // rows: unit, orthogonal
    std::vector<double> scaled(q.begin(), q.end());
    for (int i = 0; i < n; i++)
      for (int j = 0; j < n; j++) scaled[size_t(i) * n + j] *= double(lambda[i]);
    EXPECT_TRUE(near(product(true, false, n, n, n, q, scaled), a, tolerance));  // Q' diag Q = A
    std::vector<double> lambda_q = product(false, false, n, n, n, q, a);        // row i of Q A is lambda_i row i of Q
    EXPECT_TRUE(near(scaled, lambda_q, tolerance));
  }
}

TYPED_TEST(Linalg, EigenKnown) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  Factored<Real> f(3);
  Buffer a(f.data, std::vector<Real>{2, 0, 0, 1, 2, 0, 0, 0, -5});
  Buffer<Real> values(f.data, 3);
  ASSERT_EQ(f.factorizer.eigen(a, values, 3), 0);
  EXPECT_TRUE(near(values.host(), std::vector<double>{-5, 1, 3}, 4 * eps<Real>));
  std::vector<Real> q = a.host();
  for (Real& x : q) x = std::abs(x);
  const double r = std::sqrt(0.5);
  EXPECT_TRUE(near(q, std::vector<double>{0, 0, 1, r, r, 0, r, r, 0}, 4 * eps<Real>));
  for (const double strange : {double(NAN), double(INFINITY)}) {
    a.set({2, 0, 0, Real(strange), 2, 0, 0, 0, -5});
    EXPECT_GT(f.factorizer.eigen(a, values, 3), 0);
  }
}

// Nothing is handed to the library where an element of the lower triangle is not finite: the first row that has one is
// named, and the matrix is left as it was.
TYPED_TEST(Linalg, EigenOfWhatIsNotFinite) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  Factored<Real> f(131);
  for (int n : {1, 2, 40, 131}) {
    const std::vector<Real> a = positive<Real>(n, n);
    for (int i : {0, 1, n / 2, n - 1}) {
      if (i >= n) continue;
      for (int j : {0, i / 2, i})
        for (const Real strange : {Real(NAN), Real(INFINITY), -Real(INFINITY)}) {
          SCOPED_TRACE(testing::Message() << strange << " at (" << i << ", " << j << ") of " << n);
          std::vector<Real> bad = a;
          bad[size_t(i) * n + j] = strange;
          bad[size_t(n - 1) * n] = strange;  // a later one says nothing
          Buffer da(f.data, bad);
          Buffer<Real> values(f.data, n, Real(7));
          EXPECT_EQ(f.factorizer.eigen(da, values, n), i + 1);
          EXPECT_TRUE(exact(da.host(), bad));
        }
    }
  }
}

TYPED_TEST(Linalg, InvertOfASingularFactor) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  Factored<Real> f(131);
  for (int n : {1, 2, 40, 131})
    for (int i : {0, n / 2, n - 1}) {
      SCOPED_TRACE(testing::Message() << "element " << i << " of " << n);
      std::vector<Real> l = identity<Real>(n);
      l[size_t(i) * (n + 1)] = 0;
      Buffer dl(f.data, l);
      try {
        f.factorizer.invert(dl, n);
        ADD_FAILURE() << "inverted";
      } catch (const RunError& e) {
        EXPECT_NE(std::string(e.what()).find("element " + std::to_string(i + 1) + " "), std::string::npos) << e.what();
      }
      dl.set(identity<Real>(n));
      EXPECT_NO_THROW(f.factorizer.invert(dl, n));
    }
}

TYPED_TEST(Linalg, FactorizerRefuses) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  Memory memory;
  EXPECT_THROW(Factorizer<Real>(memory.device(), memory.arena(), -1), InputError);
  Factorizer<Real> planned(memory.device(), memory.arena(), 3);
  Factorizer<Real> f(std::move(planned));
  Buffer<Real> a(memory, 16, Real(7)), b(memory, 16, Real(7));
  for (int n : {-1, 4}) {
    EXPECT_THROW(f.cholesky(a, n), InputError);
    EXPECT_THROW(f.invert(a, n), InputError);
    EXPECT_THROW(f.solve(false, a, n, b, 1, 1), InputError);
    EXPECT_THROW(f.log_determinant(a, n), InputError);
    EXPECT_THROW(f.eigen(a, b, n), InputError);
  }
  EXPECT_THROW(f.solve(false, a, 3, b, -1, 1), InputError);
  EXPECT_THROW(f.solve(false, a, 3, b, 4, 3), InputError);

  EXPECT_EQ(f.cholesky(a, 0), 0);  // nothing to do
  f.invert(a, 0);
  f.solve(true, a, 0, b, 2, 2);
  f.solve(true, a, 3, b, 0, 0);
  EXPECT_EQ(f.log_determinant(a, 0), 0);
  EXPECT_EQ(f.eigen(a, b, 0), 0);
  EXPECT_TRUE(exact(a.host(), std::vector<Real>(16, 7)));
  EXPECT_TRUE(exact(b.host(), std::vector<Real>(16, 7)));
  Factorizer<Real> none(memory.device(), memory.arena(), 0);
  EXPECT_EQ(none.cholesky(a, 0), 0);
}

// ------------------------------------------------------------------------------------------------------------- bits
// Everything above on sizes that are cut into tiles.
template <class Real>
std::vector<std::vector<Real>> all_of_it() {
  const int n = 420;
  Factored<Real> f(n);
  Device& device = f.data.device();
  std::vector<std::vector<Real>> results;
  Buffer x(f.data, normals<Real>(size_t(n) * n, 1));
  for (int m : {1, 10, 32, 64, n})
    for (bool tb : {false, true}) {
      Buffer<Real> c(f.data, size_t(m) * n);
      multiply<Real>(device, false, tb, m, n, n, 1, x, n, x, n, 0, c, n);
      results.push_back(c.host());
    }
  Buffer a(f.data, identity<Real>(n));
  rank_update<Real>(device, true, n, n, 1, x, n, 1, a, n);
  results.push_back(a.host());
  Buffer e(f.data, a.host());
  Buffer<Real> values(f.data, n);
  EXPECT_EQ(f.factorizer.cholesky(a, n), 0);
  results.push_back(a.host());
  for (int columns : {1, 10, n}) {
    Buffer b(f.data, normals<Real>(size_t(n) * columns, 2));
    f.factorizer.solve(columns == 10, a, n, b, columns, columns);
    results.push_back(b.host());
  }
  f.factorizer.invert(a, n);
  results.push_back(a.host());
  EXPECT_EQ(f.factorizer.eigen(e, values, n), 0);
  results.push_back(e.host());
  results.push_back(values.host());
  return results;
}

TYPED_TEST(Linalg, SameBits) {
  BATON_NEEDS_DEVICE();
  const auto first = all_of_it<TypeParam>();
  const auto same = [&](const char* what) {
    const auto now = all_of_it<TypeParam>();
    ASSERT_EQ(now.size(), first.size());
    for (size_t i = 0; i < now.size(); i++) EXPECT_TRUE(same_bits(now[i], first[i])) << what << ", result " << i;
  };
  same("again");
  if (on_gpu) return;
  const int threads = omp_get_max_threads();
  for (int t : {1, 2, 3}) {
    omp_set_num_threads(t);
    same("another number of threads");
  }
  omp_set_num_threads(threads);
}

}  // namespace
}  // namespace baton::test
