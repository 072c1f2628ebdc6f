#include "layers/posterior.h"

#include <cmath>

namespace baton {

const char* name_of(Family family) { return family == Family::point ? "ft" : "ffg"; }

Posterior::Posterior(Device& device, Arena& arena, const ParameterLayout& layout, Family family, int replicas)
    : device_(device), family_(family), store_(arena, layout, replicas) {
  for (const char* name : {"mean", "mean.adam_m", "mean.adam_v"}) store_.add(name), state_arrays_.push_back(name);
  store_.add("mean.grad");
  values_ = arena.take<float>(replicas);
  if (family == Family::point) return;
  for (const char* name : {"log_std", "prior_mean", "prior_log_std", "log_std.adam_m", "log_std.adam_v"})
    store_.add(name), state_arrays_.push_back(name);
  store_.add("variance");
  store_.add("variance.grad");
  partial_ = arena.take<float>(size_t(gaussian_partials(int(layout.stride()))) * replicas);
  kl_ = arena.take<double>(replicas);
}

GaussianArrays Posterior::arrays() const {
  GaussianArrays a{};
  a.mean = store_.at("mean");
  a.grad_mean = store_.at("mean.grad");
  a.mean_m = store_.at("mean.adam_m");
  a.mean_v = store_.at("mean.adam_v");
  if (family_ == Family::gaussian) {
    a.log_sd = store_.at("log_std");
    a.variance = store_.at("variance");
    a.prior_mean = store_.at("prior_mean");
    a.prior_log_sd = store_.at("prior_log_std");
    a.grad_variance = store_.at("variance.grad");
    a.scale_m = store_.at("log_std.adam_m");
    a.scale_v = store_.at("log_std.adam_v");
  }
  a.stride = store_.layout().stride();
  a.count = int(store_.layout().stride());
  a.replicas = store_.replicas();
  return a;
}

void Posterior::initialise(const StepState* states, const std::vector<float>& log_sd,
                           const std::vector<float>& prior_sd) {
  const ParameterLayout& layout = store_.layout();
  const Stream stream = device_.stream();
  const int stride = int(layout.stride());
  fill_zero(device_, store_.at("mean"), store_.bytes());
  for (const TensorSpec& t : layout.tensors())
    if (!t.bias)
      init_normal(store_.at("mean"), layout.stride(), int(t.offset), int(t.size), std::sqrt(2.f / t.fan_in), states,
                  replicas(), stream);
  reset_optimizer();
  if (family_ == Family::point) return;
  std::vector<float> prior_log_sd;
  for (float sd : prior_sd) prior_log_sd.push_back(std::log(sd));
  upload(device_, values_, log_sd);
  fill_rows(store_.at("log_std"), layout.stride(), stride, values_, replicas(), stream);
  upload(device_, values_, prior_log_sd);
  fill_zero(device_, store_.at("prior_mean"), store_.bytes());
  fill_rows(store_.at("prior_log_std"), layout.stride(), stride, values_, replicas(), stream);
  for (const ParameterLayout::Gap& gap : layout.gaps())  // what lies between tensors must weigh nothing in the KL
    fill_rows(store_.at("log_std") + gap.offset, layout.stride(), int(gap.size), values_, replicas(), stream);
  device_.synchronize();  // values_ is used again
  refresh();
}

void Posterior::refresh() {
  if (family_ == Family::gaussian)
    variance_of(store_.at("variance"), store_.at("log_std"), store_.layout().stride(), int(store_.layout().stride()),
                replicas(), device_.stream());
}

void Posterior::reset_optimizer() {
  for (const char* name : {"mean.adam_m", "mean.adam_v", "log_std.adam_m", "log_std.adam_v"})
    if (family_ == Family::gaussian || name[0] == 'm') fill_zero(device_, store_.at(name), store_.bytes());
}

void Posterior::hand_over() {
  reset_optimizer();
  if (family_ == Family::point) return;
  copy_on_device(device_, store_.at("prior_mean"), store_.at("mean"), store_.bytes());
  copy_on_device(device_, store_.at("prior_log_std"), store_.at("log_std"), store_.bytes());
}

void Posterior::step(ScaleRule rule, const StepState* states, Totals* totals) {
  BATON_RANGE("update");
  if (family_ == Family::point) point_step(arrays(), states, device_.stream());
  else gaussian_step(arrays(), rule, states, totals, partial_, device_.stream());
}

std::vector<double> Posterior::kl() {
  if (family_ == Family::point) return std::vector<double>(replicas(), 0.0);
  gaussian_kl(kl_, arrays(), partial_, device_.stream());
  return download(device_, kl_, replicas());
}

std::vector<double> Posterior::mean_log_sd() {
  std::vector<double> means(replicas(), 0.0);
  if (family_ == Family::point) return means;
  for (int r = 0; r < replicas(); r++) {
    for (const TensorSpec& t : store_.layout().tensors())
      for (float x : store_.read(device_, "log_std", r, t)) means[r] += x;
    means[r] /= double(store_.layout().parameters());
  }
  return means;
}

WeightsView Posterior::weights() const {
  return {store_.at("mean"), family_ == Family::gaussian ? store_.at("variance") : nullptr, store_.layout().stride()};
}

GradientsView Posterior::gradients() const {
  return {store_.at("mean.grad"), family_ == Family::gaussian ? store_.at("variance.grad") : nullptr,
          store_.layout().stride()};
}

}  // namespace baton
