#include "kernels/last_layer.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>
#include <random>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

template <class Real>
std::vector<Real> normals(size_t n, int seed, double sd = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0, sd);
  std::vector<Real> v(n);
  for (Real& x : v) x = Real(normal(random));
  return v;
}
std::vector<int32_t> labels_of(size_t n, int classes, int seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> v(n);
  for (int32_t& x : v) x = int32_t(random() % classes);
  return v;
}
template <class To, class From>
std::vector<To> as(const std::vector<From>& v) {
  return std::vector<To>(v.begin(), v.end());
}
template <class T>
std::vector<T> part(const std::vector<T>& v, size_t first, size_t count) {
  return std::vector<T>(v.begin() + first, v.begin() + first + count);
}
template <class Real>
constexpr double pick(double in_float, double in_double) {
  return sizeof(Real) == 4 ? in_float : in_double;
}
template <class Real>
constexpr const char* name_of_real = sizeof(Real) == 4 ? "float" : "double";

// softmax(x), and ln sum exp x.
double softmax(std::vector<double>& p, const double* x, int n) {
  const double top = *std::max_element(x, x + n);
  double sum = 0;
  p.assign(n, 0);
  for (int c = 0; c < n; c++) sum += p[c] = std::exp(x[c] - top);
  for (double& q : p) q /= sum;
  return top + std::log(sum);
}

template <class F>
void expect_refusal(const std::string& words, F call) {
  try {
    call();
    ADD_FAILURE() << "no error: " << words;
  } catch (const InputError& e) {
    EXPECT_NE(std::string(e.what()).find(words), std::string::npos) << e.what();
  }
}

// -------------------------------------------------------------------------------------------------------- residuals
template <class Real>
struct Residual {
  std::vector<Real> p, r, loss, curvature;
};
template <class Real>
Residual<Real> residual(const std::vector<Real>& logits, const std::vector<int32_t>& labels, int classes) {
  Memory memory;
  const int n = int(labels.size());
  Buffer x(memory, logits);
  Buffer y(memory, labels);
  Buffer<Real> p(memory, logits.size(), Real(9)), r(memory, logits.size(), Real(9)), loss(memory, n, Real(9)),
      curvature(memory, n, Real(9));
  softmax_residual<Real>(p, r, loss, curvature, x, y, n, classes, memory.stream());
  return {p.host(), r.host(), loss.host(), curvature.host()};
}

template <class Real>
void check_residual(int n, int classes, double spread) {
  SCOPED_TRACE(testing::Message() << name_of_real<Real> << " [" << n << "][" << classes << "] spread " << spread);
  const std::vector<Real> logits = normals<Real>(size_t(n) * classes, classes, spread);
  const std::vector<int32_t> labels = labels_of(n, classes, n);
  const Residual<Real> got = residual(logits, labels, classes);
  const std::vector<double> x = as<double>(logits);
  std::vector<double> p, r, loss, curvature, row;
  for (int i = 0; i < n; i++) {
    loss.push_back(softmax(row, &x[size_t(i) * classes], classes) - x[size_t(i) * classes + labels[i]]);
    for (int c = 0; c < classes; c++) p.push_back(row[c]), r.push_back((c == labels[i]) - row[c]);
    const double top = *std::max_element(row.begin(), row.end());
    curvature.push_back(top * (1 - top));
  }
  const Tolerance t{.l2 = pick<Real>(5e-7, 1e-14)};
  EXPECT_TRUE(close(got.p, p, t));
  EXPECT_TRUE(close(got.r, r, t));
  EXPECT_TRUE(close(got.loss, loss, t));
  EXPECT_TRUE(close(got.curvature, curvature, t));
  if constexpr (sizeof(Real) == 4) {
    const std::string name =
        "last_layer.residual." + std::to_string(n) + "x" + std::to_string(classes) + "." + std::to_string(int(spread));
    record(name + ".r", got.r);
    record(name + ".loss", got.loss);
    record(name + ".curvature", got.curvature);
  }
}

TEST(LastLayerKernels, SmallResidual) {
  BATON_NEEDS_DEVICE();
  check_residual<float>(3, 10, 1);
  check_residual<double>(5, 37, 3);
}

TEST(LastLayerKernels, Residual) {
  BATON_NEEDS_DEVICE();
  for (int classes : {2, 10, 37})
    for (double spread : {1., 10.}) {
      check_residual<float>(50, classes, spread);
      check_residual<double>(50, classes, spread);
    }
}

template <class Real>
void check_residual_extremes() {
  SCOPED_TRACE(name_of_real<Real>);
  const Real most = std::numeric_limits<Real>::max(), inf = INFINITY;
  // Large logits neither overflow nor lose the loss.
  Residual<Real> got = residual<Real>({most, -most, 0, 1e4, 1e4, -1e4, -inf, 0, 0, -1000, 0, -1000}, {0, 0, 1, 0}, 3);
  EXPECT_TRUE(exact(got.p, std::vector<double>{1, 0, 0, .5, .5, 0, 0, .5, .5, 0, 1, 0}));
  EXPECT_TRUE(exact(got.r, std::vector<double>{0, 0, 0, .5, -.5, 0, 0, .5, -.5, 1, -1, 0}));
  EXPECT_TRUE(close(got.loss, std::vector<double>{0, std::log(2.), std::log(2.), 1000}, {.l2 = 1e-7}));
  EXPECT_TRUE(exact(got.curvature, std::vector<double>{0, .25, .25, 0}));
  // What is no number, and a label that is no class, shows in its row, and nowhere else.
  got = residual<Real>({0, NAN, inf, 0, 1, 0, 0, 0, 2, 2, -inf, -inf}, {0, 0, -1, 2, 1, 0}, 2);
  for (int row = 0; row < 6; row++) {
    const bool numbers = row >= 2 && row < 5;
    EXPECT_EQ(std::isfinite(got.loss[row]), row == 4) << row;
    EXPECT_EQ(std::isfinite(got.curvature[row]), numbers) << row;
    for (int c : {0, 1}) {
      EXPECT_EQ(std::isfinite(got.p[2 * row + c]), numbers) << row;
      EXPECT_EQ(std::isfinite(got.r[2 * row + c]), row == 4) << row;
    }
  }
  EXPECT_TRUE(exact(part(got.r, 8, 2), std::vector<double>{-.5, .5}));
  // One class: certain.
  got = residual<Real>({5, -7}, {0, 0}, 1);
  EXPECT_TRUE(exact(got.p, std::vector<double>{1, 1}));
  const std::vector<double> zeros = {0, 0};
  EXPECT_TRUE(exact(got.r, zeros));
  EXPECT_TRUE(exact(got.loss, zeros));
  EXPECT_TRUE(exact(got.curvature, zeros));
}

TEST(LastLayerKernels, ResidualExtremes) {
  BATON_NEEDS_DEVICE();
  check_residual_extremes<float>();
  check_residual_extremes<double>();
}

TEST(LastLayerKernels, ResidualOutputsMayBeNull) {
  BATON_NEEDS_DEVICE();
  const int n = 5, classes = 4;
  const std::vector<float> logits = normals<float>(n * classes, 1);
  const std::vector<int32_t> labels = labels_of(n, classes, 2);
  const Residual<float> want = residual(logits, labels, classes);
  Memory memory;
  Buffer x(memory, logits);
  Buffer y(memory, labels);
  for (int one = 0; one < 4; one++)
    for (const bool with_labels : {true, false}) {
      if (!with_labels && (one == 1 || one == 2)) continue;
      Buffer<float> matrix(memory, n * classes), vector(memory, n);
      softmax_residual<float>(one == 0 ? matrix.data() : nullptr, one == 1 ? matrix.data() : nullptr,
                              one == 2 ? vector.data() : nullptr, one == 3 ? vector.data() : nullptr, x,
                              with_labels ? y.data() : nullptr, n, classes, memory.stream());
      if (one < 2) EXPECT_TRUE(exact(matrix.host(), one ? want.r : want.p));
      else EXPECT_TRUE(exact(vector.host(), one == 2 ? want.loss : want.curvature));
    }
}

template <class Real>
void check_curvature_product(int n, int classes) {
  SCOPED_TRACE(testing::Message() << name_of_real<Real> << " [" << n << "][" << classes << "]");
  std::vector<Real> p;
  const std::vector<Real> d = normals<Real>(size_t(n) * classes, 5);
  const std::vector<double> x = normals<double>(size_t(n) * classes, 6, 2);
  std::vector<double> want(d.size()), row;
  for (int i = 0; i < n; i++) {
    softmax(row, &x[size_t(i) * classes], classes);
    for (double q : row) p.push_back(Real(q));
    for (int a = 0; a < classes; a++)  // as the matrix that it is
      for (int b = 0; b < classes; b++)
        want[size_t(i) * classes + a] += ((a == b) * row[a] - row[a] * row[b]) * double(d[size_t(i) * classes + b]);
  }
  Memory memory;
  for (int place = 0; place < 3; place++) {
    Buffer p_(memory, p), d_(memory, d);
    Buffer<Real> fresh(memory, d.size(), Real(NAN));
    Buffer<Real>& out = place == 0 ? fresh : place == 1 ? p_ : d_;
    softmax_curvature_product<Real>(out, p_, d_, n, classes, memory.stream());
    const std::vector<Real> got = out.host();
    EXPECT_TRUE(close(got, want, {.l2 = pick<Real>(5e-7, 1e-14), .bias = 1e-6})) << place;
    if constexpr (sizeof(Real) == 4)
      if (place == 0) record("last_layer.curvature_product." + std::to_string(classes), got);
  }
}

TEST(LastLayerKernels, SmallCurvatureProduct) {
  BATON_NEEDS_DEVICE();
  for (int classes : {2, 10, 37}) {
    check_curvature_product<float>(7, classes);
    check_curvature_product<double>(7, classes);
  }
}

// ------------------------------------------------------------------------------------------------------------- rows
template <class Real>
void check_row_dots(int n, int d, bool one_a, bool one_b, double alpha, double beta) {
  SCOPED_TRACE(testing::Message() << name_of_real<Real> << " [" << n << "][" << d << "] " << one_a << one_b << ", "
                                  << alpha << ", " << beta);
  const size_t lda = one_a ? 0 : d + 3, ldb = one_b ? 0 : d;
  const std::vector<Real> a = normals<Real>((n - 1) * lda + d, 1), b = normals<Real>((n - 1) * ldb + d, 2);
  const std::vector<Real> before = beta == 0 ? std::vector<Real>(n, Real(NAN)) : normals<Real>(n, 3);
  std::vector<double> want(n);
  for (int i = 0; i < n; i++) {
    for (int k = 0; k < d; k++) want[i] += alpha * double(a[i * lda + k]) * double(b[i * ldb + k]);
    if (beta != 0) want[i] += beta * double(before[i]);
  }
  Memory memory;
  Buffer a_(memory, a), b_(memory, b), v(memory, before);
  row_dots<Real>(v, Real(alpha), a_, lda, b_, ldb, Real(beta), n, d, memory.stream());
  EXPECT_TRUE(close(v.host(), want, {.l2 = pick<Real>(1e-6, 1e-14)}));
  if constexpr (sizeof(Real) == 4)
    if (!one_a && !one_b && beta == 0) record("last_layer.row_dots." + std::to_string(d), v.host(), 2e-6f);
}

TEST(LastLayerKernels, SmallRowDots) {
  BATON_NEEDS_DEVICE();
  for (int d : {1, 7, 65})
    for (int one : {0, 1, 2}) {
      check_row_dots<float>(6, d, one == 1, one == 2, 1, 0);
      check_row_dots<double>(6, d, one == 1, one == 2, 0.5, -2);
    }
  check_row_dots<float>(5, 40, true, true, -1.5, 1);
  Memory memory;  // rows of nothing
  Buffer<float> v(memory, std::vector<float>{1, 2}), x(memory, 1);
  row_dots<float>(v, 3.f, x, 0, x, 0, 2.f, 2, 0, memory.stream());
  EXPECT_TRUE(exact(v.host(), std::vector<float>{2, 4}));
}

TEST(LastLayerKernels, RowDots) {
  BATON_NEEDS_DEVICE();
  for (int d : {64, 768, 1025}) {
    check_row_dots<float>(33, d, false, false, 2, 0);
    check_row_dots<double>(33, d, false, true, 2, 1);
  }
}

template <class Real>
void check_rows(int n, int d) {
  SCOPED_TRACE(testing::Message() << name_of_real<Real> << " [" << n << "][" << d << "]");
  Memory memory;
  const std::vector<Real> x = normals<Real>(size_t(n) * d, 1);
  std::vector<Real> w = normals<Real>(n, 2), scaled, gathered;
  for (Real& v : w) v *= v;
  w.front() = 0;
  std::vector<int32_t> index = labels_of(n + 3, n, 3);
  for (int i = 0; i < n; i++)
    for (int k = 0; k < d; k++) scaled.push_back(std::sqrt(w[i]) * x[size_t(i) * d + k]);
  for (int from : index)
    for (int k = 0; k < d; k++) gathered.push_back(x[size_t(from) * d + k]);
  Buffer x_(memory, x), w_(memory, w);
  Buffer index_(memory, index);
  Buffer<Real> out(memory, x.size(), Real(NAN)), picked(memory, gathered.size(), Real(NAN));
  scale_rows<Real>(out, x_, w_, n, d, memory.stream());
  EXPECT_TRUE(exact(out.host(), scaled));
  gather_rows<Real>(picked, x_, index_, n + 3, d, memory.stream());
  EXPECT_TRUE(exact(picked.host(), gathered));
  scale_rows<Real>(x_, x_, w_, n, d, memory.stream());
  EXPECT_TRUE(exact(x_.host(), scaled));

  const std::vector<Real> y = normals<Real>(d, 5);
  std::vector<double> outer;
  for (int i = 0; i < n; i++)
    for (int k = 0; k < d; k++) outer.push_back(double(x[size_t(i) * d + k]) - 1.5 * double(w[i]) * double(y[k]));
  Buffer y_(memory, y);
  x_.set(x);
  add_outer<Real>(x_, Real(-1.5), w_, y_, n, d, memory.stream());
  EXPECT_TRUE(close(x_.host(), outer, {.l2 = pick<Real>(2e-7, 1e-15)}));

  std::vector<Real> square = normals<Real>(size_t(d) * d, 6);
  Buffer square_(memory, square);
  add_diagonal<Real>(square_, Real(2.25), d, memory.stream());
  for (int i = 0; i < d; i++) square[size_t(i) * d + i] += Real(2.25);
  EXPECT_TRUE(exact(square_.host(), square));
}

TEST(LastLayerKernels, SmallRows) {
  BATON_NEEDS_DEVICE();
  check_rows<float>(3, 5);
  check_rows<double>(2, 9);
}

TEST(LastLayerKernels, Rows) {
  BATON_NEEDS_DEVICE();
  for (int d : {1, 33, 257, 600}) {
    check_rows<float>(11, d);
    check_rows<double>(11, d);
  }
}

template <class Real>
void check_inspection(int d) {
  SCOPED_TRACE(testing::Message() << name_of_real<Real> << " rows of " << d);
  const std::vector<Real> row = normals<Real>(d, d);
  std::vector<std::vector<Real>> rows{row, row};
  std::vector<int> bad{0, 0};
  const auto add = [&](const std::function<void(std::vector<Real>&)>& change, int is_bad = 0) {
    rows.push_back(row);
    change(rows.back());
    bad.push_back(is_bad);
  };
  add([](auto& r) { r.back() = std::nextafter(r.back(), Real(1e9)); });  // its last bit
  add([](auto& r) { r.front() = -r.front(); });
  add([](auto& r) { std::fill(r.begin(), r.end(), Real(0)); });
  add([](auto& r) { r.front() = std::numeric_limits<Real>::denorm_min(); });
  if (d > 1) {
    add([](auto& r) { std::swap(r.front(), r.back()); });
    add([](auto& r) { std::rotate(r.begin(), r.begin() + 1, r.end()); });
    add([](auto& r) { std::fill(r.begin(), r.end() - 1, Real(0)); });  // one number, at either end
    add([](auto& r) {
      const Real last = r.back();
      std::fill(r.begin(), r.end(), Real(0));
      r.front() = last;
    });
  }
  const size_t zero = rows.size();
  add([](auto& r) { r.back() = 0; });
  add([](auto& r) { r.back() = -Real(0); });
  for (Real none : {Real(NAN), Real(INFINITY), Real(-INFINITY)})
    for (int at : {0, d / 2, d - 1}) add([&](auto& r) { r[at] = none; }, 1);

  std::vector<Real> all;
  for (const auto& r : rows) all.insert(all.end(), r.begin(), r.end());
  Memory memory;
  Buffer x(memory, all);
  Buffer<uint64_t> hash(memory, rows.size());
  Buffer<int32_t> nonfinite(memory, rows.size(), 7);
  inspect_rows<Real>(hash, nonfinite, x, int(rows.size()), d, memory.stream());
  EXPECT_TRUE(exact(nonfinite.host(), bad));
  const std::vector<uint64_t> h = hash.host();
  for (size_t i = 0; i < rows.size(); i++)
    for (size_t j = 0; j < i; j++)
      if (!bad[i] && !bad[j]) {
        EXPECT_EQ(h[i] == h[j], rows[i] == rows[j]) << j << ", " << i;  // here -0 == 0
      }
  EXPECT_EQ(h[zero], h[zero + 1]);
}

TEST(LastLayerKernels, SmallInspectRows) {
  BATON_NEEDS_DEVICE();
  for (int d : {1, 2, 33, 100}) {
    check_inspection<float>(d);
    check_inspection<double>(d);
  }
}

template <class Real>
void check_normals(int n) {
  SCOPED_TRACE(testing::Message() << n << " of " << name_of_real<Real>);
  Memory memory;
  Buffer<Real> x(memory, n, Real(9));
  fill_normals<Real>(x, n, key_of(17), memory.stream());
  std::vector<Real> want;
  for (int i = 0; i < n; i++) {
    const float4 z = normal4(key_of(17), uint32_t(i / 4), 0, 0);
    const float four[4] = {z.x, z.y, z.z, z.w};
    want.push_back(Real(four[i % 4]));
  }
  EXPECT_TRUE(exact(x.host(), want));
}

TEST(LastLayerKernels, SmallFillNormals) {
  BATON_NEEDS_DEVICE();
  for (int n : {1, 6}) check_normals<float>(n);
  check_normals<double>(7);
}

TEST(LastLayerKernels, FillNormals) {
  BATON_NEEDS_DEVICE();
  for (int n : {0, 2, 3, 4, 5, 30, 4099}) check_normals<float>(n);
  check_normals<double>(1022);
}

template <class Real>
void check_adam(int n, double decay, int steps) {
  SCOPED_TRACE(testing::Message() << n << " of " << name_of_real<Real> << ", decay " << decay);
  Memory memory;
  const std::vector<Real> start = normals<Real>(n, 1);
  Buffer w(memory, start);
  Buffer<Real> m(memory, n), v(memory, n), g(memory, n);
  std::vector<double> want = as<double>(start), m1(n), m2(n);
  for (int t = 1; t <= steps; t++) {
    const std::vector<Real> slope = normals<Real>(n, 10 + t, t % 3 ? 1 : 100);
    g.set(slope);
    adam_step<Real>(w, m, v, g, Real(0.01), Real(decay), t, n, memory.stream());
    for (int i = 0; i < n; i++) {
      const double s = double(slope[i]) + decay * want[i];
      m1[i] = 0.9 * m1[i] + 0.1 * s;
      m2[i] = 0.999 * m2[i] + 0.001 * s * s;
      want[i] -= 0.01 * (m1[i] / (1 - std::pow(0.9, t))) / (std::sqrt(m2[i] / (1 - std::pow(0.999, t))) + 1e-8);
    }
  }
  EXPECT_TRUE(close(w.host(), want, {.l2 = pick<Real>(1e-6, 1e-13)}));
  EXPECT_TRUE(close(m.host(), m1, {.l2 = pick<Real>(1e-6, 1e-13)}));
  EXPECT_TRUE(close(v.host(), m2, {.l2 = pick<Real>(1e-6, 1e-13)}));
}

TEST(LastLayerKernels, SmallAdam) {
  BATON_NEEDS_DEVICE();
  check_adam<float>(5, 0.1, 4);
  check_adam<double>(7, 0, 2);
}

TEST(LastLayerKernels, Adam) {
  BATON_NEEDS_DEVICE();
  check_adam<float>(1000, 0, 30);
  check_adam<double>(300, 0.5, 30);
}

// ----------------------------------------------------------------------------------------------- steps of an update
// The implicit step another way: with u_c + v exp(u_c - l) = f_c + v [c = y], which has one solution for each l, the
// one l where sum exp(u_c - l) = 1. a_c = [c = y] - exp(u_c - l).
std::vector<double> implicit_reference(const std::vector<double>& f, double v, int label) {
  using Long = long double;
  const int n = int(f.size());
  std::vector<Long> q(n);
  const auto exponent = [v](Long g) {  // z with v e^z + z = g, by Newton from above
    Long z = g <= 0 ? g : g < v ? 0 : std::min(g, std::log(g / v));
    for (int i = 0; i < 200; i++) {
      const Long e = v * std::exp(z), next = z - (e + z - g) / (e + 1);
      if (!(next < z)) break;
      z = next;
    }
    return z;
  };
  const Long top = *std::max_element(f.begin(), f.end());
  Long low = top - 1 - v, high = top + v + 1 + std::log(Long(n));
  for (int i = 0; i < 110; i++) {
    const Long l = (low + high) / 2;
    Long sum = 0;
    for (int c = 0; c < n; c++) sum += q[c] = std::exp(exponent(f[c] + (c == label ? v : 0) - l));
    (sum > 1 ? low : high) = l;
  }
  std::vector<double> a(n);
  for (int c = 0; c < n; c++) a[c] = double((c == label) - q[c]);
  if (v > 0) {  // the label's own is the others' sum: no cancellation
    Long others = 0;
    for (int c = 0; c < n; c++)
      if (c != label) others += q[c];
    a[label] = double(others);
  }
  return a;
}

// The posterior itself, moved one sample after the other by the formulas.
struct Posterior {
  int dim, classes;
  std::vector<double> s, w;       // [D][D], [C][D]
  std::vector<double> downdates;  // rows sqrt(kappa) s_t
  std::vector<double> weights;

  std::vector<double> times(const double* phi) const {  // S phi
    std::vector<double> out(dim);
    for (int i = 0; i < dim; i++) out[i] = std::inner_product(phi, phi + dim, &s[size_t(i) * dim], 0.);
    return out;
  }
  std::vector<double> logits(const double* phi) const {
    std::vector<double> out(classes);
    for (int c = 0; c < classes; c++) out[c] = std::inner_product(phi, phi + dim, &w[size_t(c) * dim], 0.);
    return out;
  }
  double curvature(const double* phi) const {
    std::vector<double> p;
    const std::vector<double> f = logits(phi);
    softmax(p, f.data(), classes);
    const double top = *std::max_element(p.begin(), p.end());
    return top * (1 - top);
  }
  void add(const double* phi, int label, UpdateRule rule, double gamma) {
    const std::vector<double> sphi = times(phi), f = logits(phi);
    const double v = std::inner_product(phi, phi + dim, sphi.data(), 0.);
    std::vector<double> p, a(classes);
    softmax(p, f.data(), classes);
    double weight = rule == UpdateRule::gaussian ? 1 : curvature(phi);
    if (rule == UpdateRule::implicit) {
      a = implicit_reference(f, v, label);
      for (int c = 0; c < classes; c++)
        for (int i = 0; i < dim; i++) w[size_t(c) * dim + i] += a[c] * sphi[i];
    } else {  // the gain S1 phi, with S1 = S - weight / (1 + weight v) s s'; as published: / (1 + v)
      const double by = rule == UpdateRule::categorical_published ? 1 + v : 1 + weight * v;
      for (int c = 0; c < classes; c++)
        for (int i = 0; i < dim; i++)
          w[size_t(c) * dim + i] += gamma * ((c == label) - p[c]) * (sphi[i] - weight / by * sphi[i] * v);
    }
    if (rule != UpdateRule::gaussian) weight = curvature(phi);
    const double kappa = weight / (1 + weight * v);
    for (int i = 0; i < dim; i++)
      for (int k = 0; k < dim; k++) s[size_t(i) * dim + k] -= kappa * sphi[i] * sphi[k];
    for (double x : sphi) downdates.push_back(std::sqrt(kappa) * x);
    weights.push_back(weight);
  }
};

// Row-major x [n][k] times y [k][m].
std::vector<double> product(const std::vector<double>& x, const std::vector<double>& y, int n, int k, int m) {
  std::vector<double> out(size_t(n) * m);
  for (int i = 0; i < n; i++)
    for (int l = 0; l < k; l++)
      for (int j = 0; j < m; j++) out[size_t(i) * m + j] += x[size_t(i) * k + l] * y[size_t(l) * m + j];
  return out;
}
std::vector<double> transposed(const std::vector<double>& x, int n, int m) {
  std::vector<double> out(x.size());
  for (int i = 0; i < n; i++)
    for (int j = 0; j < m; j++) out[size_t(j) * n + i] = x[size_t(i) * m + j];
  return out;
}

template <class Real>
struct Steps {
  std::vector<Real> gram, basis, logits, step, downdate, weight;
  std::vector<int32_t> failure;
};
template <class Real>
Steps<Real> steps_of(const std::vector<Real>& gram, const std::vector<Real>& logits, const std::vector<int32_t>& labels,
                     UpdateRule rule, double gamma, int passes, int samples, int classes) {
  Memory memory;
  const int cases = int(labels.size()) / samples;
  Buffer gram_(memory, gram), logits_(memory, logits);
  Buffer labels_(memory, labels);
  const Real none = Real(NAN);
  Buffer<Real> basis(memory, gram.size(), none), step(memory, logits.size(), none),
      downdate(memory, passes * gram.size(), none), weight(memory, passes * labels.size(), none);
  Buffer<int32_t> failure(memory, cases, -1);
  sequential_steps<Real>({gram_, basis, logits_, labels_, step, downdate, weight, failure}, rule, gamma, passes,
                         samples, classes, cases, memory.stream());
  return {gram_.host(), basis.host(), logits_.host(), step.host(), downdate.host(), weight.host(), failure.host()};
}

const UpdateRule all_rules[] = {UpdateRule::implicit, UpdateRule::gaussian, UpdateRule::categorical,
                                UpdateRule::categorical_published};

struct Sequence {
  UpdateRule rule;
  double gamma;
  int passes, samples, classes, dim, cases;
};

template <class Real>
void check_steps(const Sequence& q) {
  SCOPED_TRACE(testing::Message() << name_of_real<Real> << ", rule " << int(q.rule) << ", gamma " << q.gamma << ", "
                                  << q.passes << " passes over " << q.samples << " samples, " << q.classes
                                  << " classes, D " << q.dim << ", " << q.cases << " cases");
  const int b = q.samples, d = q.dim, classes = q.classes;
  std::vector<double> gram, logits;
  std::vector<std::vector<double>> phis, us;
  std::vector<Posterior> posteriors;
  const std::vector<int32_t> labels = labels_of(size_t(q.cases) * b, classes, 7);
  for (int k = 0; k < q.cases; k++) {  // S = A A' / D + 1 / 10, W and phi of size one
    const std::vector<double> a = normals<double>(size_t(d) * d, 20 + k, 1 / std::sqrt(double(d)));
    Posterior post{d,  classes, product(a, transposed(a, d, d), d, d, d), normals<double>(size_t(classes) * d, 40 + k),
                   {}, {}};
    for (int i = 0; i < d; i++) post.s[size_t(i) * d + i] += 0.1;
    const std::vector<double> phi = normals<double>(size_t(b) * d, 60 + k, 1.5 / std::sqrt(double(d)));
    const std::vector<double> u = product(phi, post.s, b, d, d), m = product(u, transposed(phi, b, d), b, d, b),
                              f = product(phi, transposed(post.w, classes, d), b, d, classes);
    gram.insert(gram.end(), m.begin(), m.end());
    logits.insert(logits.end(), f.begin(), f.end());
    phis.push_back(phi), us.push_back(u), posteriors.push_back(post);
  }
  const Steps<Real> got = steps_of(as<Real>(gram), as<Real>(logits), labels, q.rule, q.gamma, q.passes, b, classes);
  EXPECT_TRUE(exact(got.failure, std::vector<int32_t>(q.cases)));
  const Tolerance t{.l2 = pick<Real>(2e-5, 2e-13), .worst = pick<Real>(4e-4, 4e-12)};
  const Tolerance certain{.l2 = pick<Real>(1e-4, 1e-10)};  // p_max (1 - p_max) cancels where a step leaves no doubt
  const size_t bb = size_t(b) * b, bc = size_t(b) * classes;
  for (int k = 0; k < q.cases; k++) {
    SCOPED_TRACE(testing::Message() << "case " << k);
    const std::vector<double>&phi = phis[k], &u = us[k];
    const Posterior& before = posteriors[k];
    Posterior after = before;
    for (int pass = 0; pass < q.passes; pass++)
      for (int i = 0; i < b; i++) after.add(&phi[size_t(i) * d], labels[size_t(k) * b + i], q.rule, q.gamma);
    const auto cut = [](const auto& v, size_t at, size_t count) { return as<double>(part(v, at * count, count)); };

    std::vector<double> moved = after.w, folded = after.s;
    for (size_t i = 0; i < moved.size(); i++) moved[i] -= before.w[i];
    EXPECT_TRUE(close(product(transposed(cut(got.step, k, bc), b, classes), u, classes, b, d), moved, t)) << "step";
    const std::vector<double> rows = product(cut(got.downdate, k, q.passes * bb), u, q.passes * b, b, d);
    EXPECT_TRUE(close(rows, after.downdates, certain)) << "downdate";
    EXPECT_TRUE(close(cut(got.weight, k, size_t(q.passes) * b), after.weights, certain)) << "weight";
    const std::vector<double> left = product(transposed(rows, q.passes * b, d), rows, d, q.passes * b, d);
    for (size_t i = 0; i < folded.size(); i++) folded[i] = before.s[i] - left[i];
    EXPECT_TRUE(close(folded, after.s, t)) << "S'";
    const std::vector<double> u_after = product(phi, after.s, b, d, d);  // rows (S' phi_k)'
    EXPECT_TRUE(close(product(transposed(cut(got.basis, k, bb), b, b), u, b, b, d), u_after, t)) << "basis";
    EXPECT_TRUE(close(cut(got.gram, k, bb), product(u_after, transposed(phi, b, d), b, d, b), t)) << "gram";
    EXPECT_TRUE(close(cut(got.logits, k, bc), product(phi, transposed(after.w, classes, d), b, d, classes), t))
        << "logits";

    // P' = P + sum w phi phi' is the inverse of S':  S' + (sum_t w_t S' phi_t phi_t') S = S.
    std::vector<double> gain(size_t(d) * d);
    for (int at = 0; at < q.passes * b; at++)
      for (int i = 0; i < d; i++)
        for (int l = 0; l < d; l++)
          gain[size_t(i) * d + l] += double(got.weight[size_t(k) * q.passes * b + at]) *
                                     u_after[size_t(at % b) * d + i] * phi[size_t(at % b) * d + l];
    std::vector<double> back = product(gain, before.s, d, d, d);
    for (size_t i = 0; i < back.size(); i++) back[i] += after.s[i];
    EXPECT_TRUE(close(back, before.s, t)) << "P'";
  }
  if constexpr (sizeof(Real) == 4) {
    const std::string name = "last_layer.steps." + std::to_string(int(q.rule)) + "." + std::to_string(q.passes) + "x" +
                             std::to_string(b) + "x" + std::to_string(classes);
    record(name + ".step", got.step, 1e-4f);
    record(name + ".weight", got.weight, 1e-4f);
    record(name + ".logits", got.logits, 1e-4f);
  }
}

TEST(SequentialSteps, Small) {
  BATON_NEEDS_DEVICE();
  for (UpdateRule rule : all_rules) check_steps<float>({rule, 1, 2, 3, 4, 5, 1});
  check_steps<double>({UpdateRule::implicit, 1, 1, 2, 33, 3, 2});
}

TEST(SequentialSteps, AgainstThePosteriorItself) {
  BATON_NEEDS_DEVICE();
  for (UpdateRule rule : all_rules)
    for (int samples : {1, 3, 17, 64})
      for (int classes : {2, 10, 33}) {
        if (samples == 64 && classes != 33) continue;  // the most of both; it costs the cube of the samples
        const int passes = samples % 2 + 1, dim = samples == 64 ? 40 : 19;
        check_steps<double>({rule, samples > 3 ? 1. : 4., passes, samples, classes, dim, samples < 64 ? 3 : 2});
        check_steps<double>({rule, 2, 3 - passes, samples, classes, dim, 1});
        check_steps<float>({rule, 1, passes, samples, classes, dim, 1});
      }
}

// A sample at a time is the same as all of them at once.
TEST(SequentialSteps, TwoCallsAreOne) {
  BATON_NEEDS_DEVICE();
  const int b = 4, d = 6, classes = 3;
  const std::vector<double> phi = normals<double>(b * d, 1), w = normals<double>(classes * d, 2);
  const std::vector<double> gram = product(phi, transposed(phi, b, d), b, d, b),
                            logits = product(phi, transposed(w, classes, d), b, d, classes);
  const std::vector<int32_t> labels{2, 0, 1, 1};
  for (UpdateRule rule : all_rules) {
    const Steps<double> all = steps_of(gram, logits, labels, rule, 2, 1, b, classes);
    // The others' part of a call: their rows of the gram matrix and the logits go along, as the last samples.
    std::vector<double> m = gram, f = logits;
    for (int i = 0; i < b; i++) {
      const Steps<double> one =
          steps_of<double>({m[i * b + i]}, part(f, i * classes, classes), {labels[i]}, rule, 2, 1, 1, classes);
      EXPECT_NEAR(one.weight[0], all.weight[i], 1e-12);
      const double kappa = one.downdate[0] * one.downdate[0];
      const std::vector<double> row = part(m, i * b, b);
      for (int k = 0; k < b; k++) {
        for (int c = 0; c < classes; c++) f[k * classes + c] += row[k] * one.step[c];
        for (int l = 0; l < b; l++) m[k * b + l] -= kappa * row[k] * row[l];
      }
    }
    EXPECT_TRUE(close(all.gram, m, {.l2 = 1e-12}));
    EXPECT_TRUE(close(all.logits, f, {.l2 = 1e-12}));
  }
}

// S does not see labels or gamma with curvature 1.
TEST(SequentialSteps, GaussianCovarianceKnowsNoLabels) {
  BATON_NEEDS_DEVICE();
  const int b = 3, d = 5;
  const std::vector<double> phi = normals<double>(b * d, 1), gram = product(phi, transposed(phi, b, d), b, d, b),
                            logits = normals<double>(b * 4, 2);
  const Steps<double> a = steps_of(gram, logits, {0, 1, 2}, UpdateRule::gaussian, 1, 1, b, 4),
                      c = steps_of(gram, logits, {3, 0, 0}, UpdateRule::gaussian, 10, 1, b, 4);
  EXPECT_TRUE(exact(a.downdate, c.downdate));
  EXPECT_TRUE(exact(a.gram, c.gram));
  EXPECT_TRUE(exact(a.weight, std::vector<double>{1, 1, 1}));
}

// One sample, `v` and logits of its own: a and the logits after it.
template <class Real>
void check_implicit(const std::vector<double>& f, int label, double v, double residual, double logit) {
  SCOPED_TRACE(testing::Message() << name_of_real<Real> << ", v " << v << ", " << f.size() << " classes, f_y "
                                  << f[label]);
  const int classes = int(f.size());
  const std::vector<Real> start = as<Real>(f);
  const Real own = Real(v);
  const Steps<Real> got = steps_of<Real>({own}, start, {label}, UpdateRule::implicit, 1, 1, 1, classes);
  EXPECT_EQ(got.failure[0], 0);
  const std::vector<double> want = implicit_reference(as<double>(start), double(own), label);
  double sum = 0, rest = 0, off = 0;
  std::vector<double> u(classes), p;
  for (int c = 0; c < classes; c++) u[c] = double(start[c]) + double(own) * double(got.step[c]);
  softmax(p, u.data(), classes);
  for (int c = 0; c < classes; c++) {
    const double a = double(got.step[c]);
    rest = std::max(rest, std::abs((c == label) - p[c] - a));
    off = std::max(off, std::abs(double(own) * (a - want[c])));
    EXPECT_NEAR(double(got.logits[c]), u[c], pick<Real>(2e-7, 4e-16) * (std::abs(u[c]) + std::abs(f[c]))) << c;
    sum += a;
  }
  EXPECT_LE(rest, residual);
  EXPECT_LE(off, logit);
  EXPECT_NEAR(sum, 0, classes * residual);
  const double top = *std::max_element(p.begin(), p.end());
  EXPECT_NEAR(double(got.weight[0]), top * (1 - top), 2 * residual);
}

TEST(SequentialSteps, ImplicitWronglyCertain) {
  BATON_NEEDS_DEVICE();
  const std::vector<double> wrong{50, -50, 50, -50, 0}, close_by{1, 0.5, 1.5};
  for (double v : {0., 1e-8, 1., 1e3, 1e8}) {
    check_implicit<double>(wrong, 1, v, 1e-12, 1e-8 * (1 + 1e-2 * v));
    check_implicit<double>(close_by, 0, v, 1e-12, 1e-8 * (1 + 1e-2 * v));
  }
}

TEST(SequentialSteps, ImplicitFixedPoint) {
  BATON_NEEDS_DEVICE();
  int seed = 0;
  for (double v : {0., 1e-8, 1e-4, 0.01, 1., 10., 1e3, 1e6, 1e8, 1e12})
    for (int classes : {2, 10, 33})
      for (double spread : {1., 20., 50.}) {
        std::vector<double> f = normals<double>(classes, ++seed, spread);
        const int worst = int(std::min_element(f.begin(), f.end()) - f.begin());
        const int best = int(std::max_element(f.begin(), f.end()) - f.begin());
        for (int label : {worst, best}) {
          // What a rounding error of a does to the logits: v eps / (1 + v G), G about |u - f| / v.
          check_implicit<double>(f, label, v, 1e-12, 1e-10 + 1e-15 * v);
          if (v <= 1e6) check_implicit<float>(f, label, v, 1e-5, 2e-5 + 1e-6 * v);
        }
        // Logits of +-50, and the label's alone is low.
        std::fill(f.begin(), f.end(), 50), f[0] = -50;
        check_implicit<double>(f, 0, v, 1e-12, 1e-10 + 1e-15 * v);
      }
}

// ---------------------------------------------------------------------------------------------- failures of a sequence
template <class Real>
void check_failures() {
  SCOPED_TRACE(name_of_real<Real>);
  const int b = 3, classes = 2;
  const Real inf = INFINITY, eps = std::numeric_limits<Real>::epsilon();
  const std::vector<Real> eye{1, 0, 0, 0, 1, 0, 0, 0, 1}, zeros(b * classes);
  struct Fault {
    int at;  // in the gram matrix, or less 100 in the logits
    Real value;
    int want;
  };
  for (const Fault& fault : std::vector<Fault>{{0, Real(NAN), 1},
                                               {4, Real(NAN), 4 + 1},
                                               {8, inf, 8 + 1},
                                               {8, -inf, 8 + 1},
                                               {2, Real(NAN), 8 + 1},  // sample 0 brings it to sample 2
                                               {104, Real(NAN), 8 + 1},
                                               {102, inf, 4 + 1},
                                               {0, Real(-1e-3), 2},
                                               {8, Real(-2), 8 + 2},  // 1 + v p = 0
                                               {4, Real(-1e6), 4 + 2},
                                               {4, Real(2) / eps, 4 + 3},
                                               {0, Real(1e30), 3},
                                               {8, std::numeric_limits<Real>::max(), 8 + 3},
                                               {8, Real(0.4) / eps, 0},
                                               {4, Real(0), 0}}) {
    for (UpdateRule rule : all_rules) {
      SCOPED_TRACE(testing::Message() << fault.value << " at " << fault.at << ", rule " << int(rule));
      // The second of three cases has the fault.
      std::vector<Real> gram, logits;
      for (int k = 0; k < 3; k++) {
        std::vector<Real> m = eye, f = zeros;
        if (k == 1) (fault.at < 100 ? m[fault.at] : f[fault.at - 100]) = fault.value;
        gram.insert(gram.end(), m.begin(), m.end());
        logits.insert(logits.end(), f.begin(), f.end());
      }
      const std::vector<int32_t> labels{0, 1, 0, 0, 1, 0, 0, 1, 0};
      const Steps<Real> got = steps_of(gram, logits, labels, rule, 1, 1, b, classes);
      EXPECT_TRUE(exact(got.failure, std::vector<int32_t>{0, fault.want, 0}));
      for (size_t i = 0; i < got.step.size(); i++)
        if (i / (b * classes) != 1) {
          EXPECT_TRUE(std::isfinite(got.step[i]));
          EXPECT_EQ(got.step[i], got.step[i % (b * classes)]);
        }
    }
  }
  // In the second pass: sample 1 spoils sample 0.
  for (int passes : {1, 2}) {
    const Steps<Real> got =
        steps_of<Real>({1, 0, Real(NAN), 1}, {0, 0, 0, 0}, {0, 1}, UpdateRule::gaussian, 1, passes, 2, classes);
    EXPECT_EQ(got.failure[0], passes == 1 ? 0 : 1);
  }
}

TEST(SequentialSteps, Failures) {
  BATON_NEEDS_DEVICE();
  check_failures<float>();
  check_failures<double>();
}

// ------------------------------------------------------------------------------------------------------------ links
const Link all_links[] = {Link::map,         Link::mean_field, Link::probit,
                          Link::monte_carlo, Link::bridge,     Link::bridge_norm};

template <class Real>
struct Linked {
  std::vector<Real> probability, entropy, information;
};

template <class Real>
Linked<Real> linked(Link link, const std::vector<Real>& logits, const std::vector<Real>& variance, bool full,
                    const std::vector<Real>& eps, int classes, double lambda = 0.7, bool outputs = true) {
  Memory memory;
  const int n = int(logits.size()) / classes, draws = int(eps.size()) / classes;
  Buffer f(memory, logits), v(memory, variance), e(memory, eps);
  Buffer<Real> p(memory, logits.size(), Real(NAN)), h(memory, n, Real(9)), mi(memory, n, Real(9)),
      room(memory, full ? logits.size() * classes : 0, Real(NAN));
  LinkArrays<Real> x{};
  x.probability = p, x.logits = f, x.full = full;
  if (outputs) x.entropy = h;
  if (link != Link::map) x.variance = v;
  if (link == Link::monte_carlo) {
    x.normals = e;
    if (outputs) x.information = mi;
    if (full) x.factor = room;
  }
  link_probabilities<Real>(x, link, lambda, draws, n, classes, memory.stream());
  EXPECT_TRUE(exact(f.host(), logits));
  return {p.host(), h.host(), mi.host()};
}

// One input in double, v [C][C].
void link_reference(Link link, const double* f, const double* v, const std::vector<double>& eps, int classes,
                    double lambda, Linked<double>& out) {
  const int draws = int(eps.size()) / classes;
  std::vector<double> p(classes), u(f, f + classes);
  const auto entropy = [](const std::vector<double>& q) {
    double h = 0;
    for (double x : q) h -= x > 0 ? x * std::log(x) : 0;
    return h;
  };
  double drawn = 0;
  if (link == Link::monte_carlo) {
    std::vector<double> l(size_t(classes) * classes);
    for (int i = 0; i < classes; i++)
      for (int j = 0; j <= i; j++) {
        double sum = v[i * classes + j];
        for (int k = 0; k < j; k++) sum -= l[i * classes + k] * l[j * classes + k];
        l[i * classes + j] = i == j                   ? std::sqrt(std::max(sum, 0.))
                             : l[j * classes + j] > 0 ? sum / l[j * classes + j]
                                                      : 0;
      }
    for (int s = 0; s < draws; s++) {
      std::vector<double> q;
      for (int i = 0; i < classes; i++) {
        u[i] = f[i];
        for (int k = 0; k <= i; k++) u[i] += l[i * classes + k] * eps[size_t(s) * classes + k];
      }
      softmax(q, u.data(), classes);
      drawn += entropy(q) / draws;
      for (int c = 0; c < classes; c++) p[c] += q[c] / draws;
    }
  } else if (link == Link::bridge || link == Link::bridge_norm) {
    std::vector<double> sums(classes), d(classes);
    double total = 0, mean = 0, norm = 0, inverse = 0, sum = 0;
    for (int i = 0; i < classes; i++) {
      for (int k = 0; k < classes; k++) sums[i] += v[i * classes + k];
      total += sums[i], mean += f[i];
    }
    for (int i = 0; i < classes; i++) {
      u[i] = f[i] - sums[i] * mean / total;
      d[i] = v[i * classes + i] - sums[i] * sums[i] / total;
      norm += d[i] / classes / std::sqrt(classes / 2.);
    }
    for (int i = 0; i < classes; i++) {
      if (link == Link::bridge_norm) u[i] /= std::sqrt(norm), d[i] /= norm;
      inverse += std::exp(-u[i]);
    }
    for (int i = 0; i < classes; i++)
      sum += p[i] = (1 - 2. / classes + std::exp(u[i]) / classes / classes * inverse) / d[i];
    for (double& x : p) x /= sum;
  } else {
    const double scale = link == Link::map ? 0 : link == Link::probit ? M_PI / 8 : lambda;
    for (int c = 0; c < classes; c++) u[c] /= std::sqrt(1 + (scale == 0 ? 0 : scale * v[c * classes + c]));
    softmax(p, u.data(), classes);
  }
  out.probability.insert(out.probability.end(), p.begin(), p.end());
  out.entropy.push_back(entropy(p));
  out.information.push_back(out.entropy.back() - drawn);
}

// Positive definite covariances [n][C][C].
template <class Real>
std::vector<Real> covariances(int n, int classes, int seed, double size) {
  std::vector<Real> out;
  for (int i = 0; i < n; i++) {
    const std::vector<double> a =
        normals<double>(size_t(classes) * classes, seed + i, std::sqrt(size / (2. * classes)));
    std::vector<double> v = product(a, transposed(a, classes, classes), classes, classes, classes);
    for (int c = 0; c < classes; c++) v[size_t(c) * classes + c] += size / 2;
    out.insert(out.end(), v.begin(), v.end());
  }
  return out;
}
// A variance an input as the covariance that it stands for.
template <class Real>
std::vector<double> spread_out(const std::vector<Real>& v, int classes) {
  std::vector<double> out;
  for (Real x : v)
    for (int i = 0; i < classes; i++)
      for (int k = 0; k < classes; k++) out.push_back(i == k ? double(x) : 0);
  return out;
}

template <class Real>
void check_link(Link link, bool full, int n, int classes, int draws, double spread, double size) {
  SCOPED_TRACE(testing::Message() << name_of_real<Real> << ", link " << int(link) << (full ? ", full, [" : ", [") << n
                                  << "][" << classes << "], " << draws << " draws, spread " << spread << ", variance "
                                  << size);
  const std::vector<Real> logits = normals<Real>(size_t(n) * classes, classes, spread);
  const std::vector<Real> eps = normals<Real>(size_t(draws) * classes, 3);
  std::vector<Real> variance = full ? covariances<Real>(n, classes, 5, size) : normals<Real>(n, 4);
  if (!full)
    for (Real& v : variance) v = Real(size) * v * v + Real(1e-3);
  const std::vector<double> f = as<double>(logits), v = full ? as<double>(variance) : spread_out(variance, classes);
  Linked<double> want;
  for (int i = 0; i < n; i++)
    link_reference(link, &f[size_t(i) * classes], &v[size_t(i) * classes * classes], as<double>(eps), classes, 0.7,
                   want);
  const Linked<Real> got = linked(link, logits, variance, full, eps, classes);
  const bool factors = full && link == Link::monte_carlo;
  const Tolerance t{.l2 = factors ? pick<Real>(2e-5, 1e-13) : pick<Real>(3e-6, 2e-14),
                    .worst = pick<Real>(4e-5, 1e-12)};
  EXPECT_TRUE(close(got.probability, want.probability, t));
  EXPECT_TRUE(close(got.entropy, want.entropy, t));
  for (int i = 0; i < n; i++) {
    double sum = 0;
    for (int c = 0; c < classes; c++) sum += double(got.probability[size_t(i) * classes + c]);
    EXPECT_NEAR(sum, 1, pick<Real>(2e-6, 1e-14)) << i;
  }
  if (link == Link::monte_carlo) {
    EXPECT_TRUE(close(got.information, want.information, {.l2 = pick<Real>(1e-4, 1e-12)}));
    for (Real x : got.information) EXPECT_GE(x, 0);
  } else {
    EXPECT_TRUE(exact(got.information, std::vector<Real>(n, Real(9))));
  }
  const Linked<Real> alone = linked(link, logits, variance, full, eps, classes, 0.7, false);
  EXPECT_TRUE(exact(alone.probability, got.probability));
  EXPECT_TRUE(exact(alone.entropy, std::vector<Real>(n, Real(9))));
  if constexpr (sizeof(Real) == 4) {
    const std::string name = "last_layer.link." + std::to_string(int(link)) + (full ? ".full." : ".") +
                             std::to_string(n) + "x" + std::to_string(classes) + "." + std::to_string(int(spread));
    record(name + ".p", got.probability, factors ? 1e-4f : 1e-5f);
    record(name + ".entropy", got.entropy, factors ? 1e-4f : 1e-5f);
  }
}

template <class Real>
void check_links(int n, int classes, int draws) {
  for (Link link : all_links)
    for (bool full : {false, true}) {
      if (full && (link == Link::map || link == Link::mean_field)) continue;
      for (double spread : {1., 4.}) check_link<Real>(link, full, n, classes, draws, spread, 2);
    }
}

TEST(Links, Small) {
  BATON_NEEDS_DEVICE();
  check_links<float>(2, 3, 3);
  check_link<double>(Link::monte_carlo, true, 1, 35, 2, 2, 3);
}

TEST(Links, AgainstReference) {
  BATON_NEEDS_DEVICE();
  for (int classes : {2, 3, 10, 33}) {
    check_links<float>(9, classes, 50);
    check_links<double>(9, classes, 50);
  }
  check_links<double>(2, 100, 7);
}

// A variance an input is the covariance v I.
TEST(Links, SharedVarianceIsADiagonalCovariance) {
  BATON_NEEDS_DEVICE();
  const int n = 3, classes = 5;
  const std::vector<double> logits = normals<double>(n * classes, 1), v{0.1, 2, 30},
                            eps = normals<double>(classes * 8, 2);
  for (Link link : {Link::probit, Link::monte_carlo, Link::bridge, Link::bridge_norm}) {
    const Linked<double> one = linked(link, logits, v, false, eps, classes),
                         all = linked(link, logits, spread_out(v, classes), true, eps, classes);
    EXPECT_TRUE(close(one.probability, all.probability, {.l2 = 1e-14})) << int(link);
    EXPECT_TRUE(close(one.entropy, all.entropy, {.l2 = 1e-14})) << int(link);
  }
}

// With less and less variance a prediction is that of the weights, but for the bridge: it takes its spread from the
// ratios of the variances alone, and the normed one scales the logits to a variance of its own.
template <class Real>
void check_small_variances() {
  SCOPED_TRACE(name_of_real<Real>);
  const int n = 4;
  for (int classes : {2, 5}) {
    const std::vector<Real> logits = normals<Real>(n * classes, 1, 2), eps = normals<Real>(classes * 20, 2),
                            map = linked(Link::map, logits, {}, false, eps, classes).probability;
    double before = 1;
    for (double v : {1e-1, 1e-3, 1e-5}) {
      double far = 0;
      for (Link link : {Link::mean_field, Link::probit, Link::monte_carlo})
        for (bool full : {false, true}) {
          if (full && link == Link::mean_field) continue;
          const std::vector<Real> variance = full ? covariances<Real>(n, classes, 5, v) : std::vector<Real>(n, Real(v));
          far = std::max(far, difference(linked(link, logits, variance, full, eps, classes).probability, map).worst);
        }
      EXPECT_LE(far, std::sqrt(v));
      EXPECT_LT(far, before / 5);
      before = far;
    }
    for (bool full : {false, true}) {  // none at all; a covariance without any rank
      const std::vector<Real> none(full ? n * classes * classes : n);
      for (Link link : {Link::mean_field, Link::probit, Link::monte_carlo}) {
        if (full && link == Link::mean_field) continue;
        const Linked<Real> got = linked(link, logits, none, full, eps, classes);
        EXPECT_TRUE(close(got.probability, map, {.l2 = pick<Real>(1e-6, 1e-14)}));
        if (link == Link::monte_carlo) {
          for (Real x : got.information) EXPECT_NEAR(double(x), 0, pick<Real>(1e-5, 1e-13));
        }
      }
    }
    const std::vector<Real> low(n, Real(1e-6)), high(n, Real(50));
    const std::vector<Real> bridge = linked(Link::bridge, logits, low, false, eps, classes).probability;
    EXPECT_TRUE(close(bridge, linked(Link::bridge, logits, high, false, eps, classes).probability,
                      {.l2 = pick<Real>(1e-6, 1e-14)}));
    if (classes == 2) {
      EXPECT_TRUE(close(bridge, map, {.l2 = pick<Real>(1e-6, 1e-14)}));
    }
    const std::vector<Real> sharp = linked(Link::bridge_norm, logits, low, false, eps, classes).probability;
    for (int i = 0; i < n; i++) {
      const auto row = logits.begin() + i * classes;
      for (int c = 0; c < classes; c++) {
        const bool top = row[c] == *std::max_element(row, row + classes);
        EXPECT_NEAR(double(sharp[i * classes + c]), top, 1e-6) << i << ", " << c;
      }
    }
  }
}

TEST(Links, WithoutVariance) {
  BATON_NEEDS_DEVICE();
  check_small_variances<float>();
  check_small_variances<double>();
}

// A covariance of rank one that rounding made indefinite: no NaN of its negative pivot.
template <class Real>
void check_indefinite() {
  const Real below = Real(1) - std::numeric_limits<Real>::epsilon();
  const Linked<Real> got = linked<Real>(Link::monte_carlo, {1, 0}, {1, 1, 1, below}, true, {0.5, 2, -1, 1}, 2),
                     map = linked<Real>(Link::map, {1, 0}, {}, false, {}, 2);
  EXPECT_TRUE(close(got.probability, map.probability, {.l2 = pick<Real>(1e-6, 1e-14)}));  // both logits move alike
}

TEST(Links, IndefiniteByRounding) {
  BATON_NEEDS_DEVICE();
  check_indefinite<float>();
  check_indefinite<double>();
}

// Logits far apart, which overflow where e^{mu} sum e^{-mu} is taken as it stands.
TEST(Links, Extremes) {
  BATON_NEEDS_DEVICE();
  const std::vector<double> logits{80, -80, 3, 1, 0, -1, 75, 80, -70}, v{1, 4, 0.5};
  const std::vector<float> f = as<float>(logits), eps = normals<float>(3 * 4, 2);
  for (Link link : all_links) {
    Linked<double> want;
    for (int i = 0; i < 3; i++)
      link_reference(link, &logits[3 * i], spread_out(std::vector<double>{v[i]}, 3).data(), as<double>(eps), 3, 0.7,
                     want);
    const Linked<float> got = linked(link, f, as<float>(v), false, eps, 3);
    EXPECT_TRUE(close(got.probability, want.probability, {.l2 = 2e-5})) << int(link);
    EXPECT_TRUE(close(got.entropy, want.entropy, {.l2 = 2e-5})) << int(link);
    const Linked<double> wide = linked<double>(link, {1e5, 0, -1e5}, {2}, false, as<double>(eps), 3);
    EXPECT_TRUE(close(wide.probability, std::vector<double>{1, 0, 0}, {.l2 = 1e-14})) << int(link);
    EXPECT_NEAR(wide.entropy[0], 0, 1e-14) << int(link);
    // Equal logits, equal probabilities, the most entropy.
    const Linked<double> even = linked<double>(link, {7, 7, 7, 7}, {3}, false, std::vector<double>(4), 4);
    EXPECT_TRUE(close(even.probability, std::vector<double>(4, 0.25), {.l2 = 1e-14})) << int(link);
    EXPECT_NEAR(even.entropy[0], std::log(4.), 1e-14) << int(link);
    // What is no number is none in everything that is said of its row, and nowhere else.
    const Linked<float> none = linked<float>(link, {1, NAN, 2, 3}, {1, 1}, false, {0.5f, 1}, 2);
    for (int i : {0, 1}) EXPECT_TRUE(std::isnan(none.probability[i]) && std::isfinite(none.probability[2 + i]));
    EXPECT_TRUE(std::isnan(none.entropy[0]) && std::isfinite(none.entropy[1])) << int(link);
    if (link == Link::monte_carlo) {
      EXPECT_TRUE(std::isnan(none.information[0]) && std::isfinite(none.information[1]));
    }
  }
}

// ----------------------------------------------------------------------------------------------------------- refusals
TEST(LastLayerKernels, RefusesShapes) {
  float x = 0;
  int32_t y = 0;
  uint64_t h = 0;
  expect_refusal("logits has shape [2][0]", [&] { softmax_residual<float>(&x, &x, &x, &x, &x, &y, 2, 0, {}); });
  expect_refusal("logits has shape [-1][3]", [&] { softmax_residual<float>(&x, &x, &x, &x, &x, &y, -1, 3, {}); });
  expect_refusal("need labels", [&] { softmax_residual<float>(&x, &x, nullptr, &x, &x, nullptr, 1, 3, {}); });
  expect_refusal("need labels", [&] { softmax_residual<float>(&x, nullptr, &x, &x, &x, nullptr, 1, 3, {}); });
  expect_refusal("p has shape [2][0]", [&] { softmax_curvature_product<float>(&x, &x, &x, 2, 0, {}); });
  expect_refusal("row_dots", [&] { row_dots<float>(&x, 1, &x, 1, &x, 1, 0, -1, 1, {}); });
  expect_refusal("scale_rows", [&] { scale_rows<float>(&x, &x, &x, 1, -1, {}); });
  expect_refusal("gather_rows", [&] { gather_rows<float>(&x, &x, &y, -1, 1, {}); });
  expect_refusal("add_outer", [&] { add_outer<float>(&x, 1, &x, &x, 1, -1, {}); });
  expect_refusal("add_diagonal", [&] { add_diagonal<float>(&x, 1, -1, {}); });
  expect_refusal("inspect_rows", [&] { inspect_rows<float>(&h, &y, &x, -1, 1, {}); });
  expect_refusal("fill_normals", [&] { fill_normals<float>(&x, -1, {}, {}); });
  expect_refusal("adam_step: step 0", [&] { adam_step<float>(&x, &x, &x, &x, 1, 0, 0, 1, {}); });
  const UpdateSteps<float> s{&x, &x, &x, &y, &x, &x, &x, &y};
  const auto steps = [&](int passes, int samples, int classes, int cases) {
    return [=] { sequential_steps<float>(s, UpdateRule::implicit, 1, passes, samples, classes, cases, {}); };
  };
  expect_refusal("1 to 64 samples a call, not 65", steps(1, 65, 2, 1));
  expect_refusal("1 to 64 samples a call, not 0", steps(1, 0, 2, 1));
  expect_refusal("2 to 1500 classes, not 1", steps(1, 1, 1, 1));
  expect_refusal("2 to 1500 classes, not 1501", steps(1, 1, 1501, 1));
  expect_refusal("passes 0", steps(0, 1, 2, 1));
  expect_refusal("sequential_steps", steps(1, 1, 2, -1));
  LinkArrays<float> l{&x, nullptr, nullptr, &x, nullptr, nullptr, nullptr, false};
  const auto link = [&](Link which, int classes, int draws = 1) {
    return [=] { link_probabilities<float>(l, which, 1, draws, 1, classes, {}); };
  };
  expect_refusal("logits has shape [1][1]", link(Link::map, 1));
  expect_refusal("needs variances", link(Link::bridge, 2));
  l.variance = &x;
  expect_refusal("needs draws", link(Link::monte_carlo, 2));
  l.normals = &x;
  expect_refusal("needs draws", link(Link::monte_carlo, 2, 0));
  l.full = true;
  expect_refusal("room for their factors", link(Link::monte_carlo, 2));
  expect_refusal("one variance an input", link(Link::mean_field, 2));
}

TEST(LastLayerKernels, NothingToDo) {
  BATON_NEEDS_DEVICE();
  softmax_residual<float>(nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0, 3, {});
  softmax_curvature_product<double>(nullptr, nullptr, nullptr, 0, 3, {});
  row_dots<float>(nullptr, 1, nullptr, 1, nullptr, 1, 0, 0, 5, {});
  scale_rows<float>(nullptr, nullptr, nullptr, 0, 3, {});
  gather_rows<float>(nullptr, nullptr, nullptr, 0, 3, {});
  add_outer<float>(nullptr, 1, nullptr, nullptr, 0, 3, {});
  add_diagonal<float>(nullptr, 1, 0, {});
  inspect_rows<float>(nullptr, nullptr, nullptr, 0, 3, {});
  adam_step<float>(nullptr, nullptr, nullptr, nullptr, 1, 0, 1, 0, {});
  sequential_steps<float>({}, UpdateRule::gaussian, 1, 1, 1, 2, 0, {});
  link_probabilities<float>({}, Link::map, 1, 0, 0, 2, {});
}

}  // namespace
}  // namespace baton::test
