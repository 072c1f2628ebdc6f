// What the tests of the exact and the Kronecker approximation and of the evidence share.
#pragma once
#include <numeric>
#include <random>

#include "tests/trainers/last_layer/samples.h"
#include "trainers/last_layer/exact.h"

namespace baton::test {

constexpr double one_shot = 1e-10, optimum = 1e-8;  // also of chains of updates

inline testing::AssertionResult within(double got, double want, double tolerance) {
  return within(Doubles{got}, Doubles{want}, tolerance);
}

inline double frobenius(const Doubles& m) { return std::sqrt(std::inner_product(m.begin(), m.end(), m.begin(), 0.0)); }

constexpr int digit_weights = digit_dim * digit_classes;
// Classes around random centres, one feature always 1.
inline Samples class_samples(int n, int dim, int classes, uint32_t seed, double spread = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  Doubles centres;
  for (int i = 0; i < classes * dim; i++) centres.push_back(normal(random));
  Samples s{{}, {}, dim, classes};
  for (int i = 0; i < n; i++) {
    s.labels.push_back(int32_t(random() % classes));
    for (int d = 0; d < dim; d++)
      s.x.push_back(d + 1 == dim ? 1 : centres[s.labels.back() * dim + d] + spread * normal(random));
  }
  return s;
}

inline Doubles logit_covariances(ExactLastLayer& layer, Rows<>& rows, int classes) {
  Buffer<double> v(rows.memory(), size_t(rows.count()) * classes * classes);
  layer.logit_covariances(rows.x(), rows.count(), v);
  return v.host();
}

// A layer fitted to random samples of 3 classes and 4 features.
struct Small {
  static constexpr int dim = 4, classes = 3, order = 12;
  explicit Small(double tau = 0.5, double spread = 1)
      : base(class_samples(30, dim, classes, 1, spread)),
        more(class_samples(12, dim, classes, 2, spread)),
        base_rows(base),
        more_rows(more),
        layer(base_rows.device(), dim, classes, tau) {
    layer.fit(base_rows);
  }
  Samples base, more;
  Rows<> base_rows, more_rows;
  ExactLastLayer layer;
};

}  // namespace baton::test
