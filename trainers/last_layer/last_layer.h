// A Laplace approximation of the last layer that new samples update in closed form (Huseljic et al. 2024, "Efficient
// Bayesian Updates for Deep Learning via Laplace Approximations"): W | data ~ prod_c N(w_c; W_c, S), with one D x D
// covariance S = P^-1 for all classes,
//   P = tau I + sum_n w_n phi_n phi_n',   w = 1 (gaussian) or p_max (1 - p_max) (categorical)
// and the MAP weights W. An update by b samples costs two products with S, O(b D^2); kernels/last_layer.h has its
// rules.
//
// The precision P is the stored truth. Both matrices are kept in two parts, S = S_0 - Q'Q and P = P_0 + X'X, where Q
// and X hold the rows appended since the last fold, so that an update reads S_0 once and writes neither S_0 nor P_0.
// When more than 32 rows wait, they are folded in; S is then held against P on random vectors, and made anew from P's
// Cholesky factor when it has drifted, or after many downdates. Many calls with one sample have the effect of one call
// with many samples.
#pragma once
#include <filesystem>
#include <unordered_set>

#include "trainers/last_layer/link.h"
#include "trainers/last_layer/map.h"

namespace baton {

// The weight of a sample in P.
enum class SampleWeight { gaussian, categorical };
inline Names names(SampleWeight) { return {"sample weight", {"gaussian", "categorical"}}; }
inline Names names(UpdateRule) {
  return {"update rule", {"implicit", "gaussian", "categorical", "categorical_published"}};
}

struct LastLayerOptions {
  double tau = 1;                                   // prior precision
  SampleWeight weight = SampleWeight::categorical;  // of the samples that the layer is fitted to
  int refactor_after = 1000;                        // downdates
};

struct LastLayerUpdateOptions {
  UpdateRule rule = UpdateRule::implicit;
  double gamma = 10;        // step size of the authors' rules
  int passes = 1;           // over the new samples (the authors' lmb): 2 counts every sample twice
  bool duplicates = false;  // accept a sample whose features a fit or an update has absorbed before
};

template <class Real>
class LastLayer {
 public:
  LastLayer(Device&, int dim, int classes, const LastLayerOptions&);
  LastLayer(const LastLayer&) = delete;
  LastLayer& operator=(const LastLayer&) = delete;

  int dim() const { return dim_; }
  int classes() const { return classes_; }
  const LastLayerOptions& options() const { return options_; }

  // Fits the MAP weights, then P and S. Throws what fit_map throws, and InputError where P is not positive definite in
  // this precision (collinear or badly scaled features), saying what to raise. An error leaves the posterior unchanged.
  MapResult fit(const FeatureRows<Real>&, const MapOptions& = {});
  // The same with given weights W [C][D]: P = tau I + sum w phi phi' over the rows.
  void fit_covariance(const FeatureRows<Real>&, const Doubles& weights);
  // Sets the whole state: W [C][D] and P [D][D].
  void set(const Doubles& weights, const Doubles& precision);
  // Copies the posterior of another layer, on the device. Throws InputError where its shape is another.
  void copy_from(const LastLayer&);

  // Absorbs new samples in their order. Throws InputError for rows of another dim, a label outside [0, C), features
  // that are not finite, a sample seen before (unless allowed), a sample so large that S would keep nothing of the old
  // data (phi'S phi beyond 1 / eps) and for fewer than one pass; RunError where S is no longer positive (call
  // refactor() then). An error leaves the posterior unchanged.
  void update(const FeatureRows<Real>&, const LastLayerUpdateOptions& = {});
  // The same numbers, one sample at a time, with S downdated by the rank-one kernel: what update() is compared to.
  void update_one_by_one(const FeatureRows<Real>&, const LastLayerUpdateOptions& = {});
  // W' = W + gamma r phi', one sample after the other, with S as it was. A baseline.
  void update_first_order(const FeatureRows<Real>&, double gamma);

  // On the device: logits [n][C] = Phi W', products [n][D] = Phi S (rows S phi), variances [n] = phi'S phi.
  void logits(const Real* x, int n, Real* out) {
    multiply_packed(device_, false, true, n, classes_, dim_, x, now_.w, out);
  }
  void covariance_products(const Real* x, int n, Real* out);
  void variances(const Real* x, int n, Real* out);
  // out [D][D] += scale sum_n w_n phi_n phi_n', with the weights of the samples at the posterior's mean. out is
  // symmetric.
  void add_curvature(const Real* x, int n, SampleWeight, Real scale, Real* out);
  LinkedPredictions predict(const Real* x, int n, const LinkOptions& = {});

  // On the host, what the posterior is now: W [C][D], S [D][D], P [D][D].
  Doubles weights() const { return download_doubles(device_, now_.w, size_t(classes_) * dim_); }
  Doubles covariance() const { return download_doubles(device_, whole_covariance(), size_t(dim_) * dim_); }
  Doubles precision() const { return download_doubles(device_, whole_precision(), size_t(dim_) * dim_); }
  void set_weights(const Doubles& weights) {
    const std::vector<Real> w(weights.begin(), weights.end());
    check_weights(w, classes_, dim_, "a last layer");
    upload(device_, now_.w, w);
  }

  // The evidence ln p(D | W) - 1/2 [C ln det P - C D ln tau + tau |W|^2], given the log-likelihood of the fitted data.
  double log_evidence(double log_likelihood);

  void fold() {  // adds the waiting rows to S_0 and P_0
    BATON_RANGE("last_layer_fold");
    if (counts_.waiting_q) add_rows(now_.s, Real(-1), now_.q, counts_.waiting_q);
    if (counts_.waiting_x) add_rows(now_.p, Real(1), now_.x, counts_.waiting_x);
    counts_.waiting_q = counts_.waiting_x = 0;
  }
  double drift();   // |S P z - z| / |z|, the larger of two random z
  void refactor();  // makes S from P; throws RunError where P is not positive definite, and leaves S unchanged
  int64_t downdates() const { return counts_.downdates; }    // since S was last factored
  int64_t refactored() const { return counts_.refactored; }  // how often updates did so
  int64_t absorbed() const { return counts_.absorbed; }      // samples that updates have added

  // W, P, S, the waiting rows, the hashes of the samples seen and the options, as safetensors; a loaded posterior goes
  // on bit for bit. load throws InputError for a file of another form, dim, classes or precision, and where S is not
  // the inverse of P.
  void save(const std::filesystem::path&);
  static std::unique_ptr<LastLayer> load(Device&, const std::filesystem::path&);

 private:
  static constexpr int waiting_rows = 64;              // of Q and of X
  static constexpr int block_rows = waiting_rows / 2;  // samples times passes in one block of an update
  static constexpr int chunk_rows = 1024;              // features in one pass over a whole set
  static constexpr int probes = 2;                     // random vectors that measure drift
  static constexpr double most_drift = sizeof(Real) == 8 ? 1e-8 : 2e-3;  // beyond it S is not the inverse of P
  static constexpr const char* real_name = sizeof(Real) == 8 ? "double" : "float";
  struct Posterior {
    Real *w, *s, *p, *q, *x;  // W [C][D], S_0 and P_0 [D][D], Q and X [waiting_rows][D]
  };
  struct Counts {
    int waiting_q = 0, waiting_x = 0;  // rows of Q and of X
    int64_t downdates = 0, refactored = 0, absorbed = 0;
  };
  void copy(const Posterior& to, const Posterior& from) {
    const size_t row = sizeof(Real) * dim_;
    copy_on_device(device_, to.w, from.w, row * classes_);
    copy_on_device(device_, to.s, from.s, row * dim_);
    copy_on_device(device_, to.p, from.p, row * dim_);
    copy_on_device(device_, to.q, from.q, row * waiting_rows);
    copy_on_device(device_, to.x, from.x, row * waiting_rows);
  }
  // m += sign rows' rows for a symmetric m [D][D].
  void add_rows(Real* m, Real sign, const Real* rows, int count) const {
    rank_update(device_, true, dim_, count, sign, rows, dim_, Real(1), m, dim_);
    mirror_lower(m, dim_, dim_, device_.stream());
  }
  // The same into scratch_, with m as it was.
  const Real* fold_into_scratch(const Real* m, Real sign, const Real* rows, int count) const {
    copy_on_device(device_, scratch_, m, sizeof(Real) * dim_ * dim_);
    add_rows(scratch_, sign, rows, count);
    return scratch_;
  }
  const Real* whole_covariance() const { return fold_into_scratch(now_.s, Real(-1), now_.q, counts_.waiting_q); }
  const Real* whole_precision() const { return fold_into_scratch(now_.p, Real(1), now_.x, counts_.waiting_x); }
  // out += sign x rows' rows for x [n][D], n at most chunk_rows: what waiting rows add to a product with S_0 or P_0.
  void add_waiting(const Real* x, int n, const Real* rows, int count, Real sign, Real* out) {
    multiply_packed(device_, false, true, n, count, dim_, x, rows, overlap_);
    multiply_packed(device_, false, false, n, dim_, count, overlap_, rows, out, sign, 1);
  }
  std::vector<uint64_t> check_update(const FeatureRows<Real>&, const LastLayerUpdateOptions&);
  void update_block(const FeatureRows<Real>&, const LastLayerUpdateOptions&, int first);
  void all_or_nothing(const std::function<void()>& work);
  void start_from(const Doubles& weights, const std::function<void()>& fill_precision, const std::string& advice,
                  const std::vector<uint64_t>& seen);
  void settle();

  Device& device_;
  int dim_, classes_;
  LastLayerOptions options_;
  Arena arena_;
  Factorizer<Real> factorizer_{device_, arena_, dim_};
  Posterior now_, kept_;  // a call that fails goes back to kept_
  Counts counts_;
  std::unordered_set<uint64_t> seen_;  // hashes of the samples absorbed
  Real *scratch_, *u_;                 // [D][D]; [samples][D]: Phi S
  UpdateSteps<Real> steps_{};
  Real *products_, *overlap_;          // of one chunk: Phi S, Phi Q'
  Real *probe_, *probe_p_, *probe_s_;  // z, P z, S P z
};

}  // namespace baton
