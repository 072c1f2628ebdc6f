// A Laplace approximation of the last layer that new samples update in closed form (Huseljic et al. 2024, "Efficient
// Bayesian Updates for Deep Learning via Laplace Approximations"): W | data ~ prod_c N(w_c; W_c, S), one D x D
// covariance S = P^-1 for all classes,
//   P = tau I + sum_n w_n phi_n phi_n',   w = 1 (gaussian) or p_max (1 - p_max) (categorical)
// with W the MAP. An update of b samples costs two products with S, O(b D^2); see kernels/last_layer.h for the rules.
//
// The precision P is the stored truth. S is kept folded: S = S_0 - Q'Q and P = P_0 + X'X with the rows that updates
// appended since the last fold, so a call neither reads nor writes more than S_0 once; above 32 waiting rows they
// are folded in, S is held against P on random vectors, and made anew from P's Cholesky factor when it has drifted (or
// after so many downdates). Downdates stay: many calls of one sample are one call of many samples.
#pragma once
#include <filesystem>
#include <string>
#include <unordered_set>

#include "trainers/last_layer/map.h"

namespace baton {

enum class SampleWeight { gaussian, categorical };
SampleWeight sample_weight_of(const std::string& name);  // InputError
const char* name_of(SampleWeight);
UpdateRule update_rule_of(const std::string& name);  // "implicit", "gaussian", "categorical"; InputError
const char* name_of(UpdateRule);
Link link_of(const std::string& name);  // "map", "mean_field", "probit", "monte_carlo", "bridge", "bridge_norm"
const char* name_of(Link);

struct LastLayerOptions {
  double tau = 1;                                   // prior precision
  SampleWeight weight = SampleWeight::categorical;  // of the samples that it is fitted to
  int refactor_after = 1000;                        // downdates
};

struct UpdateOptions {
  UpdateRule rule = UpdateRule::implicit;
  double gamma = 10;        // of the authors' rules
  int passes = 1;           // over the new samples (the authors' lmb): 2 counts them twice
  bool duplicates = false;  // accept a sample whose features were absorbed before (by fit or update)
};

struct LinkOptions {
  Link link = Link::mean_field;
  double lambda = M_PI / 8;  // of mean_field
  int draws = 1000;          // of monte_carlo
  uint64_t seed = 0;
};

struct LinkedPredictions {
  std::vector<double> probability;  // [n][C]
  std::vector<double> entropy;      // [n], nats
  std::vector<double> information;  // [n], nats; of Link::monte_carlo, else empty
};

template <class Real>
class LastLayer {
 public:
  LastLayer(Device&, int dim, int classes, const LastLayerOptions&);
  ~LastLayer();
  LastLayer(const LastLayer&) = delete;
  LastLayer& operator=(const LastLayer&) = delete;

  int dim() const { return dim_; }
  int classes() const { return classes_; }
  const LastLayerOptions& options() const { return options_; }

  // MAP weights, then P and S. Throws what fit_map throws; InputError where P is not positive definite in this
  // precision (collinear or badly scaled features), saying what to raise. The posterior is unchanged on an error.
  MapResult fit(const FeatureRows<Real>&, const MapOptions& = {});
  // The same with weights from elsewhere: W [C][D]. P = tau I + sum w phi phi' over the rows.
  void fit_covariance(const FeatureRows<Real>&, const std::vector<double>& weights);
  // The whole state from elsewhere: W [C][D], P [D][D].
  void set(const std::vector<double>& weights, const std::vector<double>& precision);

  // Becomes the same posterior as another of the same shape (InputError else): a copy on the device.
  void copy_from(const LastLayer&);

  // New samples, in their order. Throws InputError for another dim, a label outside [0, C), features that are not
  // finite, a sample seen before (unless allowed), a sample so large that S would keep nothing of the old data
  // (phi'S phi beyond 1 / eps), passes < 1; RunError where S is no longer positive (then refactor()). Nothing of the
  // posterior changes on an error.
  void update(const FeatureRows<Real>&, const UpdateOptions& = {});
  // The same numbers one sample at a time, S downdated by the hand-written rank-one kernel: what blocks are compared
  // to.
  void update_one_by_one(const FeatureRows<Real>&, const UpdateOptions& = {});
  // W' = W + gamma r phi', one sample after the other; S stays. A baseline.
  void update_first_order(const FeatureRows<Real>&, double gamma);

  // On the device: logits [n][C] = Phi W', products [n][D] = Phi S (rows S phi), variances [n] = phi'S phi.
  void logits(const Real* x, int n, Real* out);
  void covariance_products(const Real* x, int n, Real* out);
  void variances(const Real* x, int n, Real* out);
  LinkedPredictions predict(const Real* x, int n, const LinkOptions& = {});

  // On the host, what the posterior is now: W [C][D], S [D][D], P [D][D].
  std::vector<double> weights() const;
  std::vector<double> covariance() const;
  std::vector<double> precision() const;
  void set_weights(const std::vector<double>&);

  // ln p(D | W) - 1/2 [C ln det P - C D ln tau + tau |W|^2] for the log-likelihood of the fitted data: the evidence
  // with this structure's determinant.
  double log_evidence(double log_likelihood);

  void fold();      // appends what waits to S and P
  double drift();   // |S P z - z| / |z|, the larger of two random z
  void refactor();  // S from P; RunError when P is not positive definite: S is then unchanged
  int64_t downdates() const { return downdates_; }    // since S was last factored
  int64_t refactored() const { return refactored_; }  // how often updates did so
  int64_t absorbed() const { return absorbed_; }      // samples that updates have added

  // W, P, S, what waits, the hashes of samples seen and the settings, as safetensors: a loaded posterior goes on bit
  // for bit. load throws InputError for a file of another form, dim, classes or precision, or whose S is not P's
  // inverse.
  void save(const std::filesystem::path&);
  static std::unique_ptr<LastLayer> load(Device&, const std::filesystem::path&);

 private:
  struct State;
  std::vector<uint64_t> hashes_of(const Real* x, int n);
  std::vector<uint64_t> check_update(const FeatureRows<Real>&, const UpdateOptions&);
  void prepare_block(const Real* x, const int32_t* labels, int samples, const UpdateOptions&, int first);
  void update_block(const Real* x, const int32_t* labels, int samples, const UpdateOptions&, int first);
  template <class Work>
  void all_or_nothing(bool keep, Work);
  void settle();
  Device& device_;
  int dim_, classes_;
  LastLayerOptions options_;
  std::unique_ptr<State> s_;
  int waiting_q_ = 0, waiting_x_ = 0;  // rows of Q and of X
  int64_t downdates_ = 0, refactored_ = 0, absorbed_ = 0;
  std::unordered_set<uint64_t> seen_;
};

// Monte Carlo re-weighting, a baseline: draws of W from the posterior, whose weights w_s follow the likelihood of new
// samples, ln w_s = gamma sum ln p(y | phi, W_s); predictions sum_s w_s softmax(W_s phi).
template <class Real>
class Reweighting {
 public:
  Reweighting(Device&, LastLayer<Real>&, int draws, uint64_t seed);
  void update(const FeatureRows<Real>&, double gamma);
  std::vector<double> predict(const Real* x, int n);  // [n][C]
  double effective_draws() const;                     // 1 / sum w_s^2

 private:
  Device& device_;
  int dim_, classes_, draws_;
  Arena arena_;
  Real* weights_;  // [draws][C][D]
  std::vector<double> log_weight_;
};

}  // namespace baton
