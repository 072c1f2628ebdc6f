// The links from logits to class probabilities.
#include <algorithm>
#include <limits>

#include "tests/kernels/last_layer_fixture.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

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

}  // namespace
}  // namespace baton::test
