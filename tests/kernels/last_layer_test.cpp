#include "kernels/last_layer.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>

#include "tests/kernels/last_layer_fixture.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

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
