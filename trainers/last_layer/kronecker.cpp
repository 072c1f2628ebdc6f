#include "trainers/last_layer/kronecker.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace baton {

KroneckerLastLayer::KroneckerLastLayer(Device& device, const FeatureRows<double>& rows, int classes,
                                       const Doubles& weights, double tau, bool damped)
    : dim_(rows.dim), classes_(classes), tau_(tau), damped_(damped), weights_(weights) {
  check_tau(tau);
  check_weights(weights, classes, dim_, "a last layer");
  if (rows.count < 1) throw InputError("a Kronecker approximation needs at least one sample");
  check_features(device, rows, dim_);
  Arena arena;
  Factorizer<double> factorizer(device, arena, std::max(dim_, classes));
  const size_t square_a = size_t(dim_) * dim_, square_b = size_t(classes) * classes;
  auto *a = arena.take<double>(square_a), *values = arena.take<double>(std::max(dim_, classes));
  rank_update(device, true, dim_, rows.count, 1.0 / rows.count, rows.x, dim_, 0.0, a, dim_);
  mirror_lower(a, dim_, dim_, device.stream());
  a_ = download(device, a, square_a);
  const Doubles p = class_probabilities(device, place(device, arena, weights), rows.x, rows.count, dim_, classes);
  b_.assign(square_b, 0);
  for (int n = 0; n < rows.count; n++) {
    const double* row = p.data() + size_t(n) * classes;
    for (int c = 0; c < classes; c++)
      for (int e = 0; e < classes; e++)
        b_[size_t(c) * classes + e] += c == e ? row[c] * all_but(row, c, classes) : -row[c] * row[e];
  }
  double* b = place(device, arena, b_);

  const auto decompose = [&](double* m, int n, Doubles& vectors, Doubles& spectrum) {
    if (factorizer.eigen(m, values, n) != 0) throw RunError("the eigenvalues of a Kronecker factor did not converge");
    vectors = download(device, m, size_t(n) * n);
    spectrum = download(device, values, n);
    for (double& v : spectrum) {
      if (!std::isfinite(v)) throw RunError("a Kronecker factor is not finite");
      v = std::max(v, 0.0);  // B has an eigenvalue 0, which rounding makes negative
    }
  };
  decompose(a, dim_, a_vectors_, a_values_);
  decompose(b, classes, b_vectors_, b_values_);
}

double KroneckerLastLayer::eigenvalue(double b, double a) const {
  const double root = std::sqrt(tau_);
  return damped_ ? (b + root) * (a + root) : b * a + tau_;
}

double KroneckerLastLayer::log_determinant() const {
  double sum = 0;
  for (double b : b_values_)
    for (double a : a_values_) sum += std::log(eigenvalue(b, a));
  return sum;
}

Evidence KroneckerLastLayer::evidence(double log_likelihood) const {
  const double root = std::sqrt(tau_);
  double by_log_tau = 0;  // of the log-determinant; undamped it is tau tr P^-1
  for (double b : b_values_)
    for (double a : a_values_)
      by_log_tau += damped_ ? root / 2 * (1 / (b + root) + 1 / (a + root)) : tau_ / (b * a + tau_);
  return compute_evidence(log_likelihood, log_determinant(), by_log_tau, weights_, tau_);
}

// With the eigenvectors u_j of A and v_i of B: sum_i v_i v_i' sum_j (u_j'phi)^2 / (b_i a_j + tau).
Doubles KroneckerLastLayer::logit_covariances(const Doubles& x, int n) const {
  if (n < 0 || x.size() != size_t(n) * dim_)
    throw InputError(std::to_string(x.size()) + " features, expected " + std::to_string(n) + " x " +
                     std::to_string(dim_));
  const size_t square = size_t(classes_) * classes_;
  Doubles out(n * square, 0), squares(dim_);
  for (int k = 0; k < n; k++) {
    const double* phi = x.data() + size_t(k) * dim_;
    for (int j = 0; j < dim_; j++) {
      const double along = std::inner_product(phi, phi + dim_, a_vectors_.data() + size_t(j) * dim_, 0.0);
      squares[j] = along * along;
    }
    for (int i = 0; i < classes_; i++) {
      const double b = b_values_[i], *v = b_vectors_.data() + size_t(i) * classes_;
      double sum = 0;
      for (int j = 0; j < dim_; j++) sum += squares[j] / eigenvalue(b, a_values_[j]);
      for (int c = 0; c < classes_; c++)
        for (int e = 0; e < classes_; e++) out[k * square + size_t(c) * classes_ + e] += sum * v[c] * v[e];
    }
  }
  return out;
}

}  // namespace baton
