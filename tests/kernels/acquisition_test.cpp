#include "kernels/acquisition.h"

#include <algorithm>
#include <random>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

template <class Real>
std::vector<Real> normals(size_t n, int seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<Real> v(n);
  for (Real& x : v) x = Real(normal(random));
  return v;
}
template <class Real>
std::vector<Real> probabilities(int n, int classes, int seed) {
  std::vector<Real> p = normals<Real>(size_t(n) * classes, seed);
  for (int i = 0; i < n; i++) {
    double sum = 0;
    for (int c = 0; c < classes; c++) sum += std::exp(2 * double(p[i * classes + c]));
    for (int c = 0; c < classes; c++) p[i * classes + c] = Real(std::exp(2 * double(p[i * classes + c])) / sum);
  }
  return p;
}
std::vector<float> floats(const std::vector<float>& v) { return v; }
std::vector<float> floats(const std::vector<double>& v) { return {v.begin(), v.end()}; }
template <class Real>
std::string named(const char* what, int n, int d) {
  return std::string("acquisition.") + what + (sizeof(Real) == 8 ? ".double." : ".float.") + std::to_string(n) + "." +
         std::to_string(d);
}
template <class Real>
constexpr double accurate() {
  return sizeof(Real) == 8 ? 1e-13 : 1e-5;
}

// ------------------------------------------------------------------------------------------------------------ margins
template <class Real>
void check_margins(int n, int classes) {
  SCOPED_TRACE(testing::Message() << n << " rows, " << classes << " classes");
  Memory memory;
  const std::vector<Real> p = probabilities<Real>(n, classes, n + classes);
  Buffer from(memory, p);
  Buffer<Real> margin(memory, n, Real(NAN));
  margins<Real>(margin, from, n, classes, memory.stream());
  std::vector<Real> want(n);
  for (int i = 0; i < n; i++) {
    std::vector<Real> row(p.begin() + i * classes, p.begin() + (i + 1) * classes);
    std::sort(row.rbegin(), row.rend());
    want[i] = row[0] - row[1];
  }
  EXPECT_TRUE(exact(margin.host(), want));
}
TEST(Margins, SmallExact) {
  BATON_NEEDS_DEVICE();
  check_margins<float>(3, 10), check_margins<double>(5, 33), check_margins<double>(2, 2);
}
TEST(Margins, Exact) {
  BATON_NEEDS_DEVICE();
  for (int classes : {2, 3, 31, 32, 64, 65, 150}) check_margins<float>(70, classes), check_margins<double>(7, classes);
  check_margins<float>(1, 10), check_margins<float>(5000, 10), check_margins<double>(0, 10);
}
TEST(Margins, SmallTiesHaveNone) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  Buffer p(memory, std::vector<float>{0.4f, 0.2f, 0.4f, 0.5f, 0.5f, 0, 0, 0, 1});
  Buffer<float> margin(memory, 3, NAN);
  margins<float>(margin, p, 3, 3, memory.stream());
  EXPECT_TRUE(exact(margin.host(), std::vector<float>{0, 0, 1}));
}

// -------------------------------------------------------------------------------------------------------------- BADGE
struct Explicit {
  std::vector<double> g;  // [n][C D]
  int n, length;
  double distance(int i, int k) const {
    double sum = 0;
    for (int j = 0; j < length; j++) sum += std::pow(g[size_t(i) * length + j] - g[size_t(k) * length + j], 2);
    return sum;
  }
};
template <class Real>
Explicit explicit_embeddings(const std::vector<Real>& p, const std::vector<Real>& x, int n, int classes, int d) {
  Explicit e{{}, n, classes * d};
  for (int i = 0; i < n; i++) {
    const auto row = p.begin() + i * classes;
    const int top = int(std::max_element(row, row + classes) - row);
    for (int c = 0; c < classes; c++)
      for (int j = 0; j < d; j++) e.g.push_back(((c == top) - double(row[c])) * double(x[size_t(i) * d + j]));
  }
  return e;
}

template <class Real>
void check_embeddings(int n, int classes, int d) {
  SCOPED_TRACE(testing::Message() << n << " rows, " << classes << " classes, " << d << " features");
  Memory memory;
  const std::vector<Real> p = probabilities<Real>(n, classes, 3), values = normals<Real>(size_t(n) * d, 4);
  const Explicit want = explicit_embeddings(p, values, n, classes, d);
  std::vector<Real> norms(n);
  for (int i = 0; i < n; i++) {
    double sum = 0;
    for (int j = 0; j < d; j++) sum += std::pow(double(values[size_t(i) * d + j]), 2);
    norms[i] = Real(sum);
  }
  Buffer probability(memory, p), x(memory, values), norm(memory, norms);
  Buffer<Real> r(memory, p.size(), Real(NAN)), size(memory, n, Real(NAN)), distance(memory, n, Real(NAN));
  gradient_embeddings<Real>(r, size, probability, norm, n, classes, memory.stream());
  std::vector<double> sizes(n), residuals(p.size());
  for (int i = 0; i < n; i++) {
    for (int j = 0; j < want.length; j++) sizes[i] += std::pow(want.g[size_t(i) * want.length + j], 2);
    const auto row = p.begin() + i * classes;
    for (int c = 0; c < classes; c++)
      residuals[i * classes + c] = (c == std::max_element(row, row + classes) - row) - double(row[c]);
  }
  EXPECT_TRUE(close(size.host(), sizes, {.l2 = accurate<Real>()}));
  EXPECT_TRUE(close(r.host(), residuals, {.l2 = accurate<Real>()}));

  // One centre after the other; the first does not look at what was there.
  const Embeddings<Real> e = {x, r, size, n, d, classes};
  const int picks[] = {n / 2, 0, n - 1};
  std::vector<double> nearest(n, INFINITY);
  for (int t = 0; t < 3; t++) {
    embedding_distances<Real>(distance, e, picks[t], t > 0, memory.stream());
    for (int i = 0; i < n; i++) nearest[i] = std::min(nearest[i], want.distance(i, picks[t]));
    EXPECT_TRUE(close(distance.host(), nearest, {.l2 = accurate<Real>()})) << t;
  }
  record(named<Real>("distances", n, d), floats(distance.host()), 1e-5f);
}
TEST(Embeddings, SmallAgainstExplicitOnes) {
  BATON_NEEDS_DEVICE();
  check_embeddings<float>(5, 3, 7), check_embeddings<double>(4, 2, 40);
}
TEST(Embeddings, AgainstExplicitOnes) {
  BATON_NEEDS_DEVICE();
  check_embeddings<float>(300, 10, 65), check_embeddings<double>(300, 10, 65);
  check_embeddings<float>(33, 77, 384), check_embeddings<double>(65, 40, 1), check_embeddings<double>(7, 2, 1);
}

TEST(Embeddings, SmallTheFirstOfEqualsIsThePrediction) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  std::vector<double> p(80);
  p[7] = p[38] = 0.5;       // two lanes
  p[40 + 3] = p[75] = 0.5;  // one lane
  Buffer from(memory, p), norm(memory, std::vector<double>{2, 3});
  Buffer<double> r(memory, 80, NAN), size(memory, 2, NAN);
  gradient_embeddings<double>(r, size, from, norm, 2, 40, memory.stream());
  std::vector<double> want(80);
  want[7] = want[43] = 0.5, want[38] = want[75] = -0.5;
  EXPECT_TRUE(exact(r.host(), want));
  EXPECT_TRUE(exact(size.host(), std::vector<double>{1, 1.5}));
}

TEST(Embeddings, SmallEqualRowsAreNoDistanceApart) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  std::vector<float> values = normals<float>(20, 5);
  for (int j = 0; j < 10; j++) values[10 + j] = values[j];
  Buffer x(memory, values), r(memory, std::vector<float>{0.3f, -0.3f, 0.3f, -0.3f});
  double square = 0;
  for (int j = 0; j < 10; j++) square += double(values[j]) * values[j];
  // Sizes a little too small: what rounding may do must not become negative.
  Buffer size(memory, std::vector<float>(2, float(0.18 * square * (1 - 1e-6))));
  Buffer<float> distance(memory, 2, NAN);
  embedding_distances<float>(distance, {x, r, size, 2, 10, 2}, 0, false, memory.stream());
  EXPECT_TRUE(exact(distance.host(), std::vector<float>{0, 0}));
}

TEST(Embeddings, SmallTheNearerIsKept) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  Buffer x(memory, std::vector<double>{1, 2, 3}), r(memory, std::vector<double>{1, 0.5, 2}),
      size(memory, std::vector<double>{100, 200, 300}), distance(memory, std::vector<double>{400, 20, 1});
  const Embeddings<double> e = {x, r, size, 3, 1, 1};
  embedding_distances<double>(distance, e, 2, true, memory.stream());
  EXPECT_TRUE(exact(distance.host(), std::vector<double>{100 + 300 - 12, 20, 1}));
  embedding_distances<double>(distance, e, 2, false, memory.stream());
  EXPECT_TRUE(exact(distance.host(), std::vector<double>{100 + 300 - 12, 200 + 300 - 12, 300 + 300 - 72}));
}

// --------------------------------------------------------------------------------------------------- variances, BAIT
// A positive definite matrix.
std::vector<double> spd(int d, int seed) {
  const std::vector<double> a = normals<double>(size_t(d) * d, seed);
  std::vector<double> m(size_t(d) * d);
  for (int i = 0; i < d; i++)
    for (int j = 0; j < d; j++) {
      for (int k = 0; k < d; k++) m[i * d + j] += a[i * d + k] * a[j * d + k] / d;
      m[i * d + j] += i == j;
    }
  return m;
}
std::vector<double> times(const std::vector<double>& m, const std::vector<double>& x) {
  std::vector<double> y(x.size());
  for (size_t i = 0; i < x.size(); i++)
    for (size_t j = 0; j < x.size(); j++) y[i] += m[i * x.size() + j] * x[j];
  return y;
}
double dot(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); i++) sum += a[i] * b[i];
  return sum;
}

template <class Real>
void check_downdates(int n, int d) {
  SCOPED_TRACE(testing::Message() << n << " rows of " << d);
  Memory memory;
  const Stream stream = memory.stream();
  const std::vector<Real> values = normals<Real>(size_t(n) * d, 6);
  std::vector<double> s = spd(d, 7);
  const std::vector<double> fisher = spd(d, 8);
  const auto row = [&](int i) {
    return std::vector<double>(values.begin() + size_t(i) * d, values.begin() + size_t(i + 1) * d);
  };
  const auto measure = [&](std::vector<double>& v, std::vector<double>& f) {
    v.clear(), f.clear();
    for (int i = 0; i < n; i++) {
      const std::vector<double> z = times(s, row(i));
      v.push_back(dot(z, row(i))), f.push_back(dot(z, times(fisher, z)));
    }
  };
  std::vector<double> v, f;
  measure(v, f);
  const auto cast = [](const std::vector<double>& x) { return std::vector<Real>(x.begin(), x.end()); };
  Buffer x(memory, values), variance(memory, cast(v)), alone(memory, cast(v)), numerator(memory, cast(f)),
      product(memory, std::vector<Real>(d)), image(memory, std::vector<Real>(d));
  for (int t = 0; t < 4; t++) {  // three join, the second leaves
    const int k = t == 3 ? 1 % n : t % n;
    const double w = 0.2, sign = t == 3 ? -1 : 1, own = dot(row(k), times(s, row(k)));
    const double kappa = sign * w / (1 + sign * w * own);
    const std::vector<double> sk = times(s, row(k)), fs = times(fisher, sk), u = times(s, fs);
    product.set(cast(sk)), image.set(cast(u));
    downdate_rows<Real>(variance, numerator, x, product, image, Real(kappa), Real(dot(sk, fs)), n, d, stream);
    downdate_rows<Real>(alone, nullptr, x, product, nullptr, Real(kappa), Real(NAN), n, d, stream);
    for (int i = 0; i < d; i++)
      for (int j = 0; j < d; j++) s[i * d + j] -= kappa * sk[i] * sk[j];
    measure(v, f);
    EXPECT_TRUE(close(variance.host(), v, {.l2 = accurate<Real>()})) << t;
    EXPECT_TRUE(close(numerator.host(), f, {.l2 = 3 * accurate<Real>()})) << t;
    EXPECT_TRUE(close(alone.host(), v, {.l2 = accurate<Real>()})) << t;
  }
  record(named<Real>("variance", n, d), floats(variance.host()), 1e-5f);
  record(named<Real>("numerator", n, d), floats(numerator.host()), 1e-5f);

  std::vector<Real> weights(n);
  for (int i = 0; i < n; i++) weights[i] = Real(0.25 / (1 + i % 7));
  Buffer w(memory, weights);
  Buffer<Real> score(memory, n, Real(NAN));
  for (bool removal : {false, true}) {
    fisher_scores<Real>(score, numerator, variance, w, removal, n, stream);
    const std::vector<Real> vs = variance.host(), fs = numerator.host();
    std::vector<double> want(n);
    for (int i = 0; i < n; i++)
      want[i] = double(weights[i]) * fs[i] / (1 + (removal ? -1. : 1.) * double(weights[i]) * vs[i]);
    // Elementwise: a removal may divide by nearly nothing.
    const std::vector<Real> got = score.host();
    for (int i = 0; i < n; i++) {
      const double denominator = 1 + (removal ? -1. : 1.) * double(weights[i]) * vs[i];
      EXPECT_NEAR(got[i] / want[i], 1,
                  accurate<Real>() * (1 + (1 + std::abs(weights[i] * vs[i])) / std::abs(denominator)))
          << i;
    }
  }
}
TEST(Downdates, SmallAgainstMatrices) {
  BATON_NEEDS_DEVICE();
  check_downdates<float>(5, 6), check_downdates<double>(3, 34);
}
TEST(Downdates, AgainstMatrices) {
  BATON_NEEDS_DEVICE();
  check_downdates<float>(200, 65), check_downdates<double>(200, 65), check_downdates<double>(1, 1);
  check_downdates<double>(7, 100);
}
TEST(Downdates, SmallStayNonNegative) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  Buffer x(memory, std::vector<float>{1, 2}), s(memory, std::vector<float>{1}), u(memory, std::vector<float>{10});
  Buffer v(memory, std::vector<float>{1, 9}), f(memory, std::vector<float>{1, 900});
  downdate_rows<float>(v, f, x, s, u, 2, 1, 2, 1, memory.stream());
  EXPECT_TRUE(exact(v.host(), std::vector<float>{0, 1}));
  EXPECT_TRUE(exact(f.host(), std::vector<float>{0, 900 - 160 + 16}));
}

TEST(Acquisition, Refuses) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  Buffer<float> a(memory, 8);
  const Stream stream = memory.stream();
  const Embeddings<float> e = {a, a, a, 2, 2, 2};
  EXPECT_THROW(margins<float>(a, a, 4, 1, stream), InputError);
  EXPECT_THROW(margins<float>(a, a, -1, 2, stream), InputError);
  EXPECT_THROW(gradient_embeddings<float>(a, a, a, a, 1, 0, stream), InputError);
  EXPECT_THROW(embedding_distances<float>(a, e, -1, false, stream), InputError);
  EXPECT_THROW(embedding_distances<float>(a, e, 2, false, stream), InputError);
  EXPECT_THROW(downdate_rows<float>(a, a, a, a, nullptr, 1, 1, 2, 2, stream), InputError);
  EXPECT_THROW(downdate_rows<float>(a, nullptr, a, a, nullptr, 1, 1, -2, 2, stream), InputError);
  EXPECT_THROW(fisher_scores<float>(a, a, a, a, false, -1, stream), InputError);
}

}  // namespace
}  // namespace baton::test
