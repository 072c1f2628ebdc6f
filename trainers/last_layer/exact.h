// The other structures of a last layer's Laplace approximation, in double: the exact Gauss-Newton (= Fisher) matrix of
// the softmax over all C D weights, for small C D, and its Kronecker approximation. theta = W row-major, c D + d.
//   H = sum_n G_n (x) phi_n phi_n',   G = diag(p) - p p',   P = H + tau I,   Sigma = P^-1
#pragma once
#include "trainers/last_layer/last_layer.h"

namespace baton {

// ln p(D | W) - 1/2 [ln det P - C D ln tau + tau |W|^2], and its derivative by ln tau at fixed W and H,
// C D / 2 - tau / 2 |W|^2 - tau / 2 tr P^-1.
struct Evidence {
  double value, by_log_tau;
};

// How a new sample's step is taken, with Sigma over all weights. All are sequential, in the samples' order.
enum class ExactRule {
  newton_old,  // one Newton step; the covariance with G at the mean before it
  newton_new,  // the same step; the covariance with G at the mean after it
  implicit,  // the minimiser for this sample: a = e_y - softmax(f + A a), W' = W + Sigma (a (x) phi); G at the new mean
};

class ExactLastLayer {
 public:
  static constexpr int most_weights = 8192;  // C D: 512 MB a matrix
  // Throws InputError beyond that.
  ExactLastLayer(Device&, int dim, int classes, double tau);
  ~ExactLastLayer();

  MapResult fit(const FeatureRows<double>&, const MapOptions& = {});
  void fit_covariance(const FeatureRows<double>&, const std::vector<double>& weights);
  Evidence evidence(double log_likelihood);
  // f_var [n][C][C] = (I (x) phi') Sigma (I (x) phi), on the device.
  void logit_covariances(const double* x, int n, double* out);
  void logits(const double* x, int n, double* out);
  LinkedPredictions predict(const double* x, int n, const LinkOptions&);  // not mean_field: InputError
  // As LastLayer::update: a failed call changes nothing.
  void update(const FeatureRows<double>&, ExactRule);
  // argmin sum_new -ln p + 1/2 (w - w0)' P0 (w - w0) by `iterations` Newton steps (1: one step on all samples at once;
  // more: damped, to convergence), then P = P0 + H_new there.
  MapResult update_jointly(const FeatureRows<double>&, int iterations);

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

// P = B (x) A + tau I by the eigenvalues of B = sum_n G_n [C x C] and A = 1/N sum phi phi' [D x D]; damped:
// (B + sqrt(tau) I) (x) (A + sqrt(tau) I).
class KroneckerLastLayer {
 public:
  KroneckerLastLayer(Device&, const FeatureRows<double>&, int classes, const std::vector<double>& weights, double tau,
                     bool damped = false);
  double log_determinant() const;
  Evidence evidence(double log_likelihood) const;
  std::vector<double> logit_covariances(const std::vector<double>& x, int n) const;  // [n][C][C]
  std::vector<double> factor_a() const { return a_; }
  std::vector<double> factor_b() const { return b_; }

 private:
  int dim_, classes_;
  double tau_;
  bool damped_;
  std::vector<double> weights_, a_, b_;                              // factors
  std::vector<double> a_vectors_, a_values_, b_vectors_, b_values_;  // rows are eigenvectors
};

// The prior precision with the highest evidence, refitting the MAP at every value: a coarse grid of ln tau over
// [low, high], then golden sections around its best.
enum class EvidenceStructure { shared, exact, kronecker };
struct TunedPrior {
  double tau, evidence;
  std::vector<double> taus, evidences;  // all that were tried, ascending
};
TunedPrior tune_prior(Device&, const FeatureRows<double>&, int classes, EvidenceStructure, SampleWeight,
                      double low = 1e-4, double high = 1e4, int grid = 9, int refinements = 8);

}  // namespace baton
