// What the tests of selection and of active learning share.
#pragma once
#include <numeric>
#include <random>

#include "tests/trainers/last_layer/samples.h"
#include "trainers/last_layer/last_layer.h"

namespace baton::test {

// Classes that overlap, with a constant feature.
inline Samples overlapping_samples(int n, int dim, int classes, unsigned seed, double spread = 1) {
  std::mt19937 random(seed), centres(1);
  std::normal_distribution<double> normal;
  Doubles mean;
  for (int i = 0; i < classes * dim; i++) mean.push_back(normal(centres));
  Samples s{{}, {}, dim, classes};
  for (int i = 0; i < n; i++) {
    const int label = int(random() % unsigned(classes));
    Doubles row;
    for (int j = 0; j + 1 < dim; j++) row.push_back(mean[label * dim + j] + spread * normal(random));
    row.push_back(1);
    s.append(row, label);
  }
  return s;
}
inline std::vector<int> all_of(const Samples& s) {
  std::vector<int> all(s.count());
  std::iota(all.begin(), all.end(), 0);
  return all;
}

template <class Real = double>
std::unique_ptr<LastLayer<Real>> fitted(const Samples& base, SampleWeight weight = SampleWeight::categorical,
                                        double tau = 1) {
  Rows<Real> rows(base);
  LastLayerOptions o;
  o.tau = tau, o.weight = weight;
  auto layer = std::make_unique<LastLayer<Real>>(rows.device(), base.dim, base.classes, o);
  layer->fit(rows);
  return layer;
}

inline double dot(const Doubles& a, const Doubles& b) { return std::inner_product(a.begin(), a.end(), b.begin(), 0.); }
inline Doubles times(const Doubles& m, const Doubles& x) {
  Doubles y;
  for (size_t i = 0; i * x.size() < m.size(); i++)
    y.push_back(std::inner_product(x.begin(), x.end(), m.begin() + long(i * x.size()), 0.));
  return y;
}
// What a layer holds, and what follows for a sample.
struct Posterior {
  Doubles w, s, p;
  template <class Real>
  explicit Posterior(LastLayer<Real>& l) : w(l.weights()), s(l.covariance()), p(l.precision()) {}
  bool operator==(const Posterior& o) const { return w == o.w && s == o.s && p == o.p; }

  double variance(const Doubles& x) const { return dot(x, times(s, x)); }
  Doubles linked(const Doubles& x, const LinkOptions& o) const {
    Doubles f = times(w, x);
    if (o.link == Link::mean_field)
      for (double& v : f) v /= std::sqrt(1 + o.lambda * variance(x));
    return softmax(f);
  }
  double curvature(const Doubles& x) const {
    const Doubles q = softmax(times(w, x));
    const double top = *std::max_element(q.begin(), q.end());
    return top * (1 - top);
  }
  Doubles fisher(const Samples& pool) const {
    const int d = pool.dim;
    Doubles f(size_t(d) * d);
    for (int n = 0; n < pool.count(); n++) {
      const Doubles x = pool.row(n);
      const double weight = curvature(x) / pool.count();
      for (int i = 0; i < d; i++)
        for (int j = 0; j < d; j++) f[i * d + j] += weight * x[i] * x[j];
    }
    return f;
  }
};

}  // namespace baton::test
