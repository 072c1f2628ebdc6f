// Monte Carlo re-weighting, a baseline: draws W_s from the posterior, whose weights w_s follow the likelihood of new
// samples, ln w_s = gamma sum ln p(y | phi, W_s). Predictions are sum_s w_s softmax(W_s phi).
#pragma once
#include <algorithm>
#include <cmath>

#include "engine/io/stop.h"
#include "trainers/last_layer/last_layer.h"

namespace baton {

template <class Real>
class Reweighting {
 public:
  // Throws InputError for no draws or too many, RunError where the layer's covariance is not positive definite.
  Reweighting(Device& device, LastLayer<Real>& layer, int draws, uint64_t seed)
      : device_(device), dim_(layer.dim()), classes_(layer.classes()), draws_(draws) {
    if (draws < 1) throw InputError("re-weighting needs at least one draw");
    const size_t d = dim_, rows = size_t(draws) * classes_;
    if (rows * d > size_t(INT32_MAX)) throw InputError("re-weighting: too many draws");
    log_weight_.assign(size_t(draws), 0);
    Arena scratch;
    Real* normals = scratch.take<Real>(rows * d);
    Factorizer<Real> factorizer(device, scratch, dim_);
    const Doubles covariance = layer.covariance(), mean = layer.weights();
    std::vector<Real> lower(covariance.begin(), covariance.end());
    for (size_t i = 0; i < d; i++) std::fill_n(&lower[i * d + i] + 1, d - i - 1, Real(0));
    Real* factor = place(device, scratch, lower);
    if (factorizer.cholesky(factor, dim_)) throw RunError("the covariance of the last layer is not positive definite");
    fill_normals(normals, int(rows * d), key_of(seed, 14), device.stream());
    std::vector<Real> all;
    for (int s = 0; s < draws; s++) all.insert(all.end(), mean.begin(), mean.end());
    weights_ = place(device, arena_, all);
    multiply_packed(device, false, true, int(rows), dim_, dim_, normals, factor, weights_, 1, 1);
  }

  // Throws InputError for samples of another dim, without valid labels or not finite, and leaves the weights unchanged.
  void update(const FeatureRows<Real>& data, double gamma) {
    check_gamma(gamma);
    check_features(device_, data, dim_);
    if (data.count < 1) throw InputError("re-weighting needs samples");
    const std::vector<int32_t> y = download_labels(device_, data, classes_);
    const int wide = draws_ * classes_;
    Scratch::Frame scratch(device_);
    const size_t rows = size_t(data.count) * draws_;
    Real *logits = scratch.take<Real>(size_t(data.count) * wide), *loss = scratch.take<Real>(rows);
    std::vector<int32_t> repeated(rows);
    for (size_t i = 0; i < rows; i++) repeated[i] = y[i / draws_];
    const int32_t* labels = place(device_, scratch, repeated);
    multiply_packed(device_, false, true, data.count, wide, dim_, data.x, weights_, logits);
    softmax_residual<Real>(nullptr, nullptr, loss, nullptr, logits, labels, int(rows), classes_, device_.stream());
    const std::vector<Real> losses = download(device_, loss, rows);
    if (!all_finite(losses)) throw InputError("re-weighting: a sample's likelihood is not finite");
    for (size_t i = 0; i < rows; i++) log_weight_[i % draws_] -= gamma * losses[i];
  }

  // [n][C]; throws Stopped when a signal asks the program to end.
  Doubles predict(const Real* x, int n) {
    const Doubles w = draw_weights();
    const int wide = draws_ * classes_, chunk = std::max(1, std::min(n, 4000000 / wide));
    Scratch::Frame scratch(device_);
    Real *logits = scratch.take<Real>(size_t(chunk) * wide), *mean = scratch.take<Real>(size_t(chunk) * classes_),
         *weight = place(device_, scratch, std::vector<Real>(w.begin(), w.end()));
    Doubles result;
    for (int first = 0; first < n; first += chunk) {
      if (stop_requested()) throw_stopped("a prediction was under way");
      const int count = std::min(chunk, n - first);
      multiply_packed(device_, false, true, count, wide, dim_, x + size_t(first) * dim_, weights_, logits);
      softmax_residual<Real>(logits, nullptr, nullptr, nullptr, logits, nullptr, count * draws_, classes_,
                             device_.stream());
      for (int i = 0; i < count; i++)
        multiply_packed(device_, false, false, 1, classes_, draws_, weight, logits + size_t(i) * wide,
                        mean + size_t(i) * classes_);
      const std::vector<Real> host = download(device_, mean, size_t(count) * classes_);
      result.insert(result.end(), host.begin(), host.end());
    }
    return result;
  }

  // 1 / sum w_s^2
  double effective_draws() const {
    double squares = 0;
    for (double w : draw_weights()) squares += w * w;
    return 1 / squares;
  }

 private:
  // w_s
  Doubles draw_weights() const {
    Doubles w = log_weight_;
    softmax_in_place(w);
    return w;
  }

  Device& device_;
  int dim_, classes_, draws_;
  Arena arena_;
  Real* weights_;  // [draws][C][D]
  Doubles log_weight_;
};

}  // namespace baton
