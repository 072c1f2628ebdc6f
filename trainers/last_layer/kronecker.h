// The Kronecker approximation of a last layer's posterior precision, in double: P = B (x) A + tau I by the eigenvalues
// of B = sum_n G_n [C x C] and A = 1/N sum phi phi' [D x D]; damped: (B + sqrt(tau) I) (x) (A + sqrt(tau) I).
#pragma once
#include "trainers/last_layer/evidence.h"

namespace baton {

class KroneckerLastLayer {
 public:
  // Throws InputError for no rows, features that are not finite, weights that are not [C][D] and tau <= 0; RunError
  // where the eigenvalues are not found.
  KroneckerLastLayer(Device&, const FeatureRows<double>&, int classes, const Doubles& weights, double tau,
                     bool damped = false);
  double log_determinant() const;  // ln det P
  Evidence evidence(double log_likelihood) const;
  Doubles logit_covariances(const Doubles& x, int n) const;  // [n][C][C], for x [n][D]
  Doubles factor_a() const { return a_; }
  Doubles factor_b() const { return b_; }

 private:
  double eigenvalue(double b, double a) const;  // of P, from those of B and A
  int dim_, classes_;
  double tau_;
  bool damped_;
  Doubles weights_, a_, b_;
  Doubles a_vectors_, a_values_, b_vectors_, b_values_;  // rows are eigenvectors
};

}  // namespace baton
