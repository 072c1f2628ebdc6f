// Monte Carlo re-weighting, a baseline: draws W_s from the posterior, whose weights w_s follow the likelihood of new
// samples, ln w_s = gamma sum ln p(y | phi, W_s). Predictions are sum_s w_s softmax(W_s phi).
#pragma once
#include "trainers/last_layer/last_layer.h"

namespace baton {

template <class Real>
class Reweighting {
 public:
  // Throws InputError for no draws or too many, RunError where the layer's covariance is not positive definite.
  Reweighting(Device&, LastLayer<Real>&, int draws, uint64_t seed);
  // Throws InputError for samples of another dim, without valid labels or not finite, and leaves the weights unchanged.
  void update(const FeatureRows<Real>&, double gamma);
  std::vector<double> predict(const Real* x, int n);  // [n][C]; throws Stopped when a signal asks the program to end
  double effective_draws() const;                     // 1 / sum w_s^2

 private:
  std::vector<double> draw_weights() const;  // w_s
  Device& device_;
  int dim_, classes_, draws_;
  Arena arena_;
  Real* weights_;  // [draws][C][D]
  std::vector<double> log_weight_;
};

}  // namespace baton
