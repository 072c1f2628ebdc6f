// The exact Laplace approximation of a last layer, in double: the Gauss-Newton (= Fisher) matrix of the softmax over
// all C D weights, for small C D. theta is W row-major, so that weight (c, d) is element c D + d.
//   H = sum_n G_n (x) phi_n phi_n',   G = diag(p) - p p',   P = H + tau I,   Sigma = P^-1
#pragma once
#include "trainers/last_layer/evidence.h"

namespace baton {

// How a new sample's step is taken, with Sigma over all weights. The samples are taken one after the other.
enum class ExactRule {
  newton_old,  // one Newton step; the covariance with G at the mean before it
  newton_new,  // the same step; the covariance with G at the mean after it
  implicit,  // the minimiser for this sample: a = e_y - softmax(f + A a), W' = W + Sigma (a (x) phi); G at the new mean
};

class ExactLastLayer {
 public:
  static constexpr int most_weights = 8192;  // C D: 512 MB a matrix
  // Throws InputError for more weights.
  ExactLastLayer(Device&, int dim, int classes, double tau);
  ~ExactLastLayer();

  // As those of LastLayer. An error leaves the posterior unchanged.
  MapResult fit(const FeatureRows<double>&, const MapOptions& = {});
  void fit_covariance(const FeatureRows<double>&, const std::vector<double>& weights);
  void update(const FeatureRows<double>&, ExactRule);
  // argmin sum_new -ln p + 1/2 (w - w0)' P0 (w - w0) by at most `iterations` Newton steps on all samples at once (1:
  // one full step; more: damped, until convergence), then P = P0 + H_new there.
  MapResult update_jointly(const FeatureRows<double>&, int iterations);

  Evidence evidence(double log_likelihood);
  // On the device: logits [n][C], and their covariances [n][C][C] = (I (x) phi') Sigma (I (x) phi).
  void logits(const double* x, int n, double* out);
  void logit_covariances(const double* x, int n, double* out);
  LinkedPredictions predict(const double* x, int n, const LinkOptions&);  // throws InputError for mean_field

  std::vector<double> weights() const;     // [C][D]
  std::vector<double> covariance() const;  // [CD][CD]
  std::vector<double> precision() const;   // [CD][CD]
  std::vector<double> curvature() const;   // H of the last fit, [CD][CD]
  double log_determinant() const;          // ln det P

 private:
  struct State;
  Device& device_;
  int dim_, classes_;
  double tau_;
  std::unique_ptr<State> s_;
};

}  // namespace baton
