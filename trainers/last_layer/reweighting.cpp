#include "trainers/last_layer/reweighting.h"

#include <algorithm>
#include <cmath>

#include "engine/io/stop.h"

namespace baton {

template <class Real>
Reweighting<Real>::Reweighting(Device& device, LastLayer<Real>& layer, int draws, uint64_t seed)
    : device_(device), dim_(layer.dim()), classes_(layer.classes()), draws_(draws) {
  if (draws < 1) throw InputError("re-weighting needs at least one draw");
  const size_t d = dim_, rows = size_t(draws) * classes_;
  if (rows * d > size_t(INT32_MAX)) throw InputError("re-weighting: too many draws");
  log_weight_.assign(size_t(draws), 0);
  Arena scratch;
  Real* normals = scratch.take<Real>(rows * d);
  Factorizer<Real> factorizer(device, scratch, dim_);
  const std::vector<double> covariance = layer.covariance(), mean = layer.weights();
  Real* factor = place(device, scratch, std::vector<Real>(covariance.begin(), covariance.end()));
  if (factorizer.cholesky(factor, dim_)) throw RunError("the covariance of the last layer is not positive definite");
  std::vector<Real> lower = download(device, factor, d * d);
  for (size_t i = 0; i < d; i++)
    for (size_t j = i + 1; j < d; j++) lower[i * d + j] = 0;
  upload(device, factor, lower);
  fill_normals(normals, int(rows * d), key_of(seed, 14), device.stream());
  std::vector<Real> all;
  for (int s = 0; s < draws; s++) all.insert(all.end(), mean.begin(), mean.end());
  weights_ = place(device, arena_, all);
  multiply(device, false, true, int(rows), dim_, dim_, Real(1), normals, dim_, factor, dim_, Real(1), weights_, dim_);
}

template <class Real>
void Reweighting<Real>::update(const FeatureRows<Real>& data, double gamma) {
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
  multiply(device_, false, true, data.count, wide, dim_, Real(1), data.x, dim_, weights_, dim_, Real(0), logits, wide);
  softmax_residual<Real>(nullptr, nullptr, loss, nullptr, logits, labels, int(rows), classes_, device_.stream());
  const std::vector<Real> losses = download(device_, loss, rows);
  std::vector<double> next = log_weight_;
  for (size_t i = 0; i < rows; i++) {
    if (!std::isfinite(losses[i])) throw InputError("re-weighting: a sample's likelihood is not finite");
    next[i % draws_] -= gamma * losses[i];
  }
  log_weight_ = next;
}

template <class Real>
std::vector<double> Reweighting<Real>::draw_weights() const {
  const double top = *std::max_element(log_weight_.begin(), log_weight_.end());
  std::vector<double> w;
  double sum = 0;
  for (double l : log_weight_) sum += w.emplace_back(std::exp(l - top));
  for (double& v : w) v /= sum;
  return w;
}

template <class Real>
std::vector<double> Reweighting<Real>::predict(const Real* x, int n) {
  const std::vector<double> w = draw_weights();
  const int wide = draws_ * classes_, chunk = std::max(1, std::min(n, 4000000 / wide));
  Scratch::Frame scratch(device_);
  Real *logits = scratch.take<Real>(size_t(chunk) * wide), *mean = scratch.take<Real>(size_t(chunk) * classes_),
       *weight = place(device_, scratch, std::vector<Real>(w.begin(), w.end()));
  std::vector<double> result;
  for (int first = 0; first < n; first += chunk) {
    if (stop_requested()) throw_stopped("a prediction was under way");
    const int count = std::min(chunk, n - first);
    multiply(device_, false, true, count, wide, dim_, Real(1), x + size_t(first) * dim_, dim_, weights_, dim_, Real(0),
             logits, wide);
    softmax_residual<Real>(logits, nullptr, nullptr, nullptr, logits, nullptr, count * draws_, classes_,
                           device_.stream());
    for (int i = 0; i < count; i++)
      multiply(device_, false, false, 1, classes_, draws_, Real(1), weight, draws_, logits + size_t(i) * wide, classes_,
               Real(0), mean + size_t(i) * classes_, classes_);
    const std::vector<Real> host = download(device_, mean, size_t(count) * classes_);
    result.insert(result.end(), host.begin(), host.end());
  }
  return result;
}

template <class Real>
double Reweighting<Real>::effective_draws() const {
  double squares = 0;
  for (double w : draw_weights()) squares += w * w;
  return 1 / squares;
}

template class Reweighting<float>;
template class Reweighting<double>;

}  // namespace baton
