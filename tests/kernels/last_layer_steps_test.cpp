// The steps of a closed-form update.
#include <algorithm>
#include <limits>
#include <numeric>

#include "tests/kernels/last_layer_fixture.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

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

}  // namespace
}  // namespace baton::test
