#include "layers/posteriors/drawn.h"

#include <cmath>

#include "engine/io/safetensors.h"
#include "kernels/prune.h"

namespace baton {

DrawnPosterior::DrawnPosterior(const PosteriorSetup& setup)
    : Posterior(setup), draws_(settings()["draws"]), draws_at_once_(settings()["draws_at_once"]) {
  if (draws_at_once_ == 0) draws_at_once_ = draws_;
  if (draws_ % draws_at_once_ != 0)
    throw InputError(std::to_string(draws_) + " draws a step do not divide into passes of " +
                     std::to_string(draws_at_once_));
  mean_ = add_state("mean");
  sd_ = add_state("std", Role::other);  // a file has log_std
  add_mask();
  moments_ = {store_.add("moments.sum"), store_.add("moments.noise")};
  drawn_ = arena_.take<float>(size_t(stride()) * draws_at_once_);
}

void DrawnPosterior::fill_sigma(float sigma, bool gaps) {
  std::vector<float> row(size_t(stride()), gaps ? sigma : 0.f);
  for (const TensorSpec& t : store_.layout().tensors())
    std::fill(row.begin() + long(t.offset), row.begin() + long(t.offset + t.size), sigma);
  upload(device_, sd_, row);
}

// sigma = 0 and mean = 0 stay so: no draw leaves 0, and an update moves nothing without a sigma.
void DrawnPosterior::apply_mask() {
  if (!masked_) return;
  for (float* array : {mean_, sd_})
    zero_pruned(array, size_t(stride()), store_.at("mask"), stride(), 1, device_.stream());
}

void DrawnPosterior::draw(int first_draw, const StepState* states) {
  draw_weights(drawn_, size_t(stride()), mean_, sd_, stride(), first_draw, draws_at_once_, states, device_.stream());
}

std::unique_ptr<Estimator> DrawnPosterior::make_estimator(Linear& layer, const LayerContext& c) {
  return std::make_unique<MomentsEstimator>(layer, c, drawn_, size_t(stride()), moments_);
}

void DrawnPosterior::clear_gradients() {
  fill_zero(device_, moments_.sum, store_.bytes());
  fill_zero(device_, moments_.noise, store_.bytes());
}

void DrawnPosterior::sample(float* w, int, int first, int draws, Key key) {
  draw_weights(w, size_t(stride()), mean_, sd_, stride(), first, draws, key, device_.stream());
}

std::vector<float> DrawnPosterior::read_log_std(int replica, const TensorSpec& t) {
  std::vector<float> sd = store_.read(device_, "std", replica, t);
  for (float& s : sd) s = std::log(s);
  return sd;
}

void DrawnPosterior::save(TensorFile& file) const {
  Posterior::save(file);
  const float sigma = float(double(settings()["sigma"]));  // in place of 0, which is pruned
  for (const TensorSpec& t : store_.layout().tensors()) {
    std::vector<float> log_std = store_.read(device_, "std", 0, t);
    for (float& s : log_std) s = std::log(s > 0 ? s : sigma);
    file.tensors[t.name + ".log_std"] = Tensor::of<float>(log_std, t.shape);
  }
}

void DrawnPosterior::load(const TensorFile& file, bool first_stage) {
  std::vector<std::vector<float>> means, sds, masks;
  for (const TensorSpec& t : store_.layout().tensors()) {
    means.push_back(file.at(t.name + ".mean", t.shape).as<float>());
    sds.push_back(file.at(t.name + ".log_std", t.shape).as<float>());
    for (float& s : sds.back()) s = std::exp(s);
    for (const std::vector<float>* values : {&means.back(), &sds.back()})
      for (float x : *values)
        if (!std::isfinite(x))
          throw InputError(file.path + ": tensor '" + t.name + "' has a mean or a log_std that is not finite");
    if (masked_) masks.push_back(read_mask(file, t));
  }
  for (size_t i = 0; i < means.size(); i++) {
    const TensorSpec& t = store_.layout()[int(i)];
    store_.write(device_, "mean", 0, t, means[i]);
    store_.write(device_, "std", 0, t, sds[i]);
    if (masked_) store_.write(device_, "mask", 0, t, masks[i]);
  }
  refresh(first_stage);
}

Schema drawn_options(int draws, Schema own) {
  Schema all{whole_option("draws", draws, {1, 1000}, "draws of the weights a step (K)"),
             whole_option("draws_at_once", 0, {0, 1000}, "of them side by side, a divisor of K (0: all)"),
             number_option("sigma", 0.05, positive, "initial standard deviation of every weight")};
  all.insert(all.end(), own.begin(), own.end());
  return all;
}

}  // namespace baton
