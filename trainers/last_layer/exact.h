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

  // As those of LastLayer. An error leaves the posterior unchanged.
  MapResult fit(const FeatureRows<double>&, const MapOptions& = {});
  void fit_covariance(const FeatureRows<double>&, const Doubles& weights);
  void update(const FeatureRows<double>&, ExactRule);
  // argmin sum_new -ln p + 1/2 (w - w0)' P0 (w - w0) by at most `iterations` Newton steps on all samples at once (1:
  // one full step; more: damped, until convergence), then P = P0 + H_new there.
  MapResult update_jointly(const FeatureRows<double>&, int iterations);

  Evidence evidence(double log_likelihood);
  // On the device: logits [n][C], and their covariances [n][C][C] = (I (x) phi') Sigma (I (x) phi).
  void logits(const double* x, int n, double* out);
  void logit_covariances(const double* x, int n, double* out);
  LinkedPredictions predict(const double* x, int n, const LinkOptions&);  // throws InputError for mean_field

  Doubles weights() const { return download(device_, w_, order_); }  // [C][D]
  Doubles covariance() const { return whole(sigma_); }               // [CD][CD]
  Doubles precision() const { return whole(p_); }                    // [CD][CD]
  Doubles curvature() const { return whole(h_); }                    // H of the last fit, [CD][CD]
  double log_determinant() const { return log_determinant_; }        // ln det P

 private:
  size_t bytes() const { return sizeof(double) * order_ * order_; }
  Doubles whole(const double* m) const { return download(device_, m, size_t(order_) * order_); }
  Doubles diagonal(const double* m);
  std::vector<int32_t> check_samples(const FeatureRows<double>&);
  void add_curvature(double* into, const double* x, const Doubles& probability, int n);
  void factor(double ridge);
  double invert(double ridge);
  Doubles absorb(const double* phi, int label, int sample, ExactRule, double& log_determinant);
  void commit(double log_determinant);

  Device& device_;
  const int dim_, classes_, order_;  // order: C D
  const double tau_;
  Arena arena_;
  Factorizer<double> factorizer_{device_, arena_, order_};
  // An update works on the next ones, which replace the others at its end, so that an error changes nothing.
  double *p_, *sigma_, *next_p_, *next_sigma_, *h_;  // [CD][CD], whole
  double *w_, *next_w_, *diagonal_;                  // [CD]
  double *b_, *q_;                                   // [CD][C]
  double *a_, *f_, *t_, *step_;                      // of one sample: A [C][C], f [C], T [C][C], the step a [C]
  double* one_;
  double log_determinant_ = order_ * std::log(tau_);
};

}  // namespace baton
