#include "layers/posteriors/posterior.h"

#include <algorithm>
#include <cmath>

#include "engine/io/safetensors.h"
#include "kernels/prune.h"
#include "layers/posteriors/channel_blocks.h"
#include "layers/posteriors/multiplicative.h"

namespace baton {

const char* name_of(Family family) {
  switch (family) {
    case Family::point:
      return "ft";
    case Family::gaussian:
      return "ffg";
    case Family::channel:
      return "cfg";
    case Family::multiplicative:
      return "mnf";
  }
  return "";
}

Posterior::Posterior(Device& device, Arena& arena, const ParameterLayout& layout, const PosteriorOptions& options,
                     int replicas)
    : device_(device), arena_(arena), options_(options), store_(arena, layout, replicas) {
  if (options.groups < 1) throw InputError("a batch has at least one group, not " + std::to_string(options.groups));
  for (const char* name : {"mean", "mean.adam_m", "mean.adam_v"}) add_state(name);
  store_.add("mean.grad");
  values_ = arena.take<float>(replicas);
  if (options.masked) {
    if (options.family == Family::channel)
      throw InputError("cfg's kernels cannot be pruned: the weights of each are tied by a covariance");
    add_state("mask");
    const std::vector<float> kept(layout.stride() * replicas, 1.f);
    upload(device, store_.at("mask"), kept);
  }
  for (const TensorSpec& t : layout.tensors()) kl_names_.push_back(t.name);
  if (!gaussian()) return;
  for (const char* name : {"log_std", "prior_mean", "prior_log_std", "log_std.adam_m", "log_std.adam_v"})
    add_state(name);
  add_state("variance");  // derived, but not by the same vector loops everywhere: a resumed run needs its very bits
  store_.add("variance.grad");

  for (int i = 0; i < int(layout.tensors().size()); i++)
    runs_.push_back({int(layout[i].offset), int(layout[i].size), i});
  if (options.family == Family::channel) {
    channels_ = std::make_unique<ChannelBlocks>(device, arena, store_, options.groups, options.moments);
    for (const StateArray& a : channels_->state_arrays()) state_arrays_.push_back(a);
    std::erase_if(runs_, [&](const Run& run) { return channels_->covers(layout[run.slot]); });
  }
  if (options.family == Family::multiplicative) {
    multipliers_ = std::make_unique<Multiplicative>(device, arena, store_, options);
    for (const StateArray& a : multipliers_->state_arrays()) state_arrays_.push_back(a);
    for (const std::string& name : multipliers_->kl_names()) kl_names_.push_back(name);
    runs_ = multipliers_->runs();
  }
  if ((channels_ && !options.moments) || multipliers_) {
    draw_ = arena.take<float>(layout.stride() * replicas * options.groups);
    draw_grad_ = arena.take<float>(layout.stride() * replicas * options.groups);
  }
  const std::vector<Run> pieces = pieces_of(runs_);
  Run* table = arena.take<Run>(pieces.size());
  upload(device, table, pieces);
  pieces_ = {table, int(pieces.size()), slots_of(runs_)};
  partial_ = arena.take<float>(pieces.size() * replicas);
  for (KlAccumulator* accumulator : {&accumulator_, &kl_}) {
    *accumulator = {arena.take<double>(kl_names_.size() * replicas), kl_names_.size()};
    fill_zero(device, accumulator->sums, kl_names_.size() * replicas * sizeof(double));
  }
}
Posterior::~Posterior() = default;

void Posterior::add_state(const char* name) {
  store_.add(name);
  state_arrays_.push_back({&store_, name});
}

GaussianArrays Posterior::arrays() const {
  GaussianArrays a{};
  a.mean = store_.at("mean");
  a.grad_mean = store_.at("mean.grad");
  a.mean_m = store_.at("mean.adam_m");
  a.mean_v = store_.at("mean.adam_v");
  if (gaussian()) {
    a.log_std = store_.at("log_std");
    a.variance = store_.at("variance");
    a.prior_mean = store_.at("prior_mean");
    a.prior_log_std = store_.at("prior_log_std");
    a.grad_variance = store_.at("variance.grad");
    a.scale_m = store_.at("log_std.adam_m");
    a.scale_v = store_.at("log_std.adam_v");
  }
  a.stride = store_.layout().stride();
  a.count = int(store_.layout().stride());
  a.replicas = store_.replicas();
  return a;
}

// The same for one replica alone.
static GaussianArrays of_replica(GaussianArrays a, int replica) {
  const size_t by = a.stride * replica;
  a.mean += by, a.log_std += by, a.variance += by, a.prior_mean += by, a.prior_log_std += by, a.grad_mean += by,
      a.grad_variance += by, a.mean_m += by, a.mean_v += by, a.scale_m += by, a.scale_v += by;
  a.replicas = 1;
  return a;
}

void Posterior::initialise(const StepState* states, const std::vector<float>& log_std,
                           const std::vector<float>& prior_sd) {
  const ParameterLayout& layout = store_.layout();
  const Stream stream = device_.stream();
  const int stride = int(layout.stride());
  fill_zero(device_, store_.at("mean"), store_.bytes());
  for (const TensorSpec& t : layout.tensors())
    if (!t.bias)
      init_normal(store_.at("mean"), layout.stride(), int(t.offset), int(t.size), std::sqrt(2.f / t.fan_in), states,
                  replicas(), stream);
  if (gaussian()) {
    std::vector<float> prior_log_std;
    for (float sd : prior_sd) prior_log_std.push_back(std::log(sd));
    upload(device_, values_, log_std);
    fill_rows(store_.at("log_std"), layout.stride(), stride, values_, replicas(), stream);
    upload(device_, values_, prior_log_std);
    fill_zero(device_, store_.at("prior_mean"), store_.bytes());
    fill_rows(store_.at("prior_log_std"), layout.stride(), stride, values_, replicas(), stream);
    device_.synchronize();  // values_ is used again
    if (channels_) channels_->initialise();
    if (multipliers_) multipliers_->initialise(states);
  }
  reset_optimizer();
  refresh(true);
}

void Posterior::adopt(int replica, const TensorSpec& t, std::span<const float> w,
                      std::span<const float> prior_log_std) {
  if (w.size() != t.size || (prior_log_std.size() != 1 && prior_log_std.size() != t.size && gaussian()))
    throw InputError(t.name + ": a pretrained tensor of " + std::to_string(w.size()) + " weights and " +
                     std::to_string(prior_log_std.size()) + " prior standard deviations, expected " +
                     std::to_string(t.size));
  store_.write(device_, "mean", replica, t, {w.begin(), w.end()});
  if (!gaussian()) return;
  store_.write(device_, "prior_mean", replica, t, {w.begin(), w.end()});
  std::vector<float> prior(t.size), log_std = store_.read(device_, "log_std", replica, t);
  for (size_t i = 0; i < t.size; i++) {
    prior[i] = prior_log_std[prior_log_std.size() == 1 ? 0 : i];
    log_std[i] = std::min(log_std[i], prior[i]);
  }
  store_.write(device_, "prior_log_std", replica, t, prior);
  store_.write(device_, "log_std", replica, t, log_std);
}

void Posterior::settle() {
  if (channels_) channels_->initialise();
  refresh(true);
}

void Posterior::refresh(bool first_stage) {
  if (gaussian())
    variance_of(store_.at("variance"), store_.at("log_std"), store_.layout().stride(), int(store_.layout().stride()),
                replicas(), device_.stream());
  restored(first_stage);
}

void Posterior::restored(bool first_stage) {
  apply_mask();
  if (channels_) channels_->refresh();
  if (multipliers_) multipliers_->refresh(first_stage);
}

void Posterior::reset_optimizer() {
  for (const char* name : {"mean.adam_m", "mean.adam_v", "log_std.adam_m", "log_std.adam_v"})
    if (gaussian() || name[0] == 'm') fill_zero(device_, store_.at(name), store_.bytes());
  if (channels_) channels_->reset_optimizer();
  if (multipliers_) multipliers_->reset_optimizer();
}

void Posterior::hand_over() {
  reset_optimizer();
  if (!gaussian()) return;
  copy_on_device(device_, store_.at("prior_mean"), store_.at("mean"), store_.bytes());
  copy_on_device(device_, store_.at("prior_log_std"), store_.at("log_std"), store_.bytes());
  if (channels_) channels_->hand_over();
  if (multipliers_) multipliers_->hand_over();
}

void Posterior::draw(const StepState* states) {
  if (!channels_ && !multipliers_) return;
  BATON_RANGE("draw");
  if (channels_) channels_->draw(draw_, arrays(), states);
  if (multipliers_) multipliers_->draw(draw_, arrays(), pieces_, states);
}

void Posterior::step(ScaleRule rule, const StepState* states) {
  BATON_RANGE("update");
  if (!gaussian()) {
    point_step(arrays(), states, device_.stream());
    return apply_mask();
  }
  Multipliers z;
  if (channels_) channels_->step(draw_grad_, arrays(), states, accumulator_);
  if (multipliers_) {
    multipliers_->backward(draw_grad_, arrays(), states, accumulator_, int(store_.layout().tensors().size()));
    z = multipliers_->multipliers(draw_grad_);
  }
  gaussian_step(arrays(), rule, pieces_, states, accumulator_, partial_, device_.stream(), z);
  if (multipliers_) multipliers_->step(states);
  apply_mask();
}

void Posterior::apply_mask() {
  if (!options_.masked) return;
  const auto of_gaussian = [&](const char* name) { return gaussian() ? store_.at(name) : nullptr; };
  hold_pruned(store_.at("mean"), of_gaussian("log_std"), of_gaussian("variance"), of_gaussian("prior_mean"),
              of_gaussian("prior_log_std"), store_.at("mask"), int(store_.layout().stride()) * replicas(),
              device_.stream());
}

void Posterior::mask(const std::vector<uint8_t>& pruned) {
  if (!options_.masked) throw InputError("a posterior without masks cannot be pruned");
  if (pruned.size() != store_.layout().parameters())
    throw InputError("a mask of " + std::to_string(pruned.size()) + " weights, expected " +
                     std::to_string(store_.layout().parameters()));
  size_t at = 0;
  for (const TensorSpec& t : store_.layout().tensors()) {
    std::vector<float> kept(t.size);
    for (float& k : kept) k = pruned[at++] ? 0.f : 1.f;
    for (int r = 0; r < replicas(); r++) store_.write(device_, "mask", r, t, kept);
  }
  apply_mask();
}

// What a model's file holds of the state arrays.
static bool is_belief(const StateArray& a) {
  return a.array.find("adam") == std::string::npos && a.array != "variance" && a.array != "mask";
}

void Posterior::save(TensorFile& file) const {
  for (const StateArray& a : state_arrays_)
    for (const TensorSpec& t : a.store->layout().tensors()) {
      if (!is_belief(a) && a.array != "mask") continue;
      const std::vector<float> values = a.store->read(device_, a.array, 0, t);
      const std::string name = t.name + "." + a.array;
      file.tensors[name] = a.array == "mask"
                               ? Tensor::of<uint8_t>(std::vector<uint8_t>(values.begin(), values.end()), t.shape)
                               : Tensor::of<float>(std::span<const float>(values), t.shape);
    }
}

void Posterior::load(const TensorFile& file, bool first_stage) {
  std::vector<std::vector<float>> values;
  for (const StateArray& a : state_arrays_)
    for (const TensorSpec& t : a.store->layout().tensors()) {
      const std::string name = t.name + "." + a.array;
      if (is_belief(a)) {
        values.push_back(file.at(name, t.shape).as<float>());
        for (float x : values.back())
          if (!std::isfinite(x)) throw InputError(file.path + ": tensor '" + name + "' has a value that is not finite");
      } else if (a.array == "mask") {
        const std::vector<uint8_t> kept = file.at(name, t.shape).as<uint8_t>();
        values.emplace_back(kept.begin(), kept.end());
        for (float& k : values.back()) k = k != 0 ? 1.f : 0.f;
      }
    }
  size_t next = 0;
  for (const StateArray& a : state_arrays_)
    for (const TensorSpec& t : a.store->layout().tensors())
      if (is_belief(a) || a.array == "mask") a.store->write(device_, a.array, 0, t, values[next++]);
  refresh(first_stage);
}

static std::vector<std::vector<double>> split_by_replica(const std::vector<double>& sums, size_t slots) {
  std::vector<std::vector<double>> rows;
  for (size_t at = 0; at + slots <= sums.size(); at += slots)
    rows.emplace_back(sums.begin() + long(at), sums.begin() + long(at + slots));
  return rows;
}

std::vector<std::vector<double>> Posterior::kl_by_name() {
  const size_t slots = kl_names_.size(), count = slots * replicas();
  if (!gaussian()) return std::vector(replicas(), std::vector<double>(slots, 0.0));
  fill_zero(device_, kl_.sums, count * sizeof(double));
  if (channels_) channels_->kl(kl_);
  if (multipliers_) {
    for (int r = 0; r < replicas(); r++)
      multipliers_->kl({kl_.sums + slots * r, slots}, of_replica(arrays(), r), pieces_, r,
                       int(store_.layout().tensors().size()), partial_);
  } else {
    gaussian_kl(kl_, arrays(), pieces_, partial_, device_.stream());
  }
  return split_by_replica(download(device_, kl_.sums, count), slots);
}

std::vector<double> Posterior::kl() {
  std::vector<double> totals;
  for (const auto& row : kl_by_name()) {
    double sum = 0;
    for (double x : row) sum += x;
    totals.push_back(sum);
  }
  return totals;
}

std::vector<std::vector<double>> Posterior::take_booked_kl() {
  const size_t slots = kl_names_.size(), count = slots * replicas();
  if (!gaussian()) return std::vector(replicas(), std::vector<double>(slots, 0.0));
  const std::vector<double> sums = download(device_, accumulator_.sums, count);
  fill_zero(device_, accumulator_.sums, count * sizeof(double));
  return split_by_replica(sums, slots);
}

std::vector<double> Posterior::booked_sums() {
  return gaussian() ? download(device_, accumulator_.sums, kl_names_.size() * replicas()) : std::vector<double>();
}

void Posterior::book(const std::vector<double>& sums) {
  if (sums.size() != booked_sums().size()) throw InputError("the booked KL of another posterior");
  if (gaussian()) upload(device_, accumulator_.sums, sums);
}

std::vector<double> Posterior::mean_log_std() {
  std::vector<double> means(replicas(), 0.0);
  if (!gaussian()) return means;
  if (channels_) channels_->marginals();
  for (int r = 0; r < replicas(); r++) {
    for (const TensorSpec& t : store_.layout().tensors())
      for (float x : store_.read(device_, "log_std", r, t)) means[r] += x;
    means[r] /= double(store_.layout().parameters());
  }
  return means;
}

WeightsView Posterior::weights() const {
  const size_t stride = store_.layout().stride();
  WeightsView view{store_.at("mean"), gaussian() ? store_.at("variance") : nullptr, stride, draw_, stride};
  if (channels_) view.factor = channels_->factors(), view.factor_stride = channels_->factor_stride();
  return view;
}

GradientsView Posterior::gradients() const {
  const size_t stride = store_.layout().stride();
  GradientsView view{store_.at("mean.grad"), gaussian() ? store_.at("variance.grad") : nullptr, stride, draw_grad_,
                     stride};
  if (channels_) view.factor = channels_->factor_gradients();
  return view;
}

LayerContext Posterior::context(int batch) {
  const bool moments = channels_ && options_.moments;
  const Draws draws = multipliers_ ? Draws::means : channels_ && !moments ? Draws::convolutions : Draws::none;
  return {device_, arena_, replicas(), batch, gaussian(), true, draws, draws == Draws::none ? 1 : options_.groups,
          moments};
}

void Posterior::sample(float* w, int replica, int first, int count, Key key) {
  sample_all(w, replica, first, count, key);
  const size_t stride = store_.layout().stride();
  if (options_.masked)
    zero_pruned(w, stride, store_.at("mask") + stride * replica, int(stride), count, device_.stream());
}

void Posterior::sample_all(float* w, int replica, int first, int count, Key key) {
  const size_t stride = store_.layout().stride();
  const float* mean = store_.at("mean") + stride * replica;
  if (!gaussian()) {
    for (int s = 0; s < count; s++) copy_on_device(device_, w + stride * s, mean, store_.row_bytes());
    return;
  }
  const float* variance = store_.at("variance") + stride * replica;
  if (multipliers_) {
    const GaussianArrays of = of_replica(arrays(), replica);
    for (int done = 0; done < count; done += Multiplicative::most_draws) {
      const int some = std::min(count - done, Multiplicative::most_draws);
      float* to = w + stride * done;
      for (int s = 0; s < some; s++) copy_on_device(device_, to + stride * s, mean, store_.row_bytes());
      multipliers_->sample(to, of, pieces_, replica, true, first + done, some, key);
      sample_weights(to, to, stride, variance, int(stride), stride, first + done, some, key, device_.stream());
    }
    return;
  }
  sample_weights(w, mean, 0, variance, int(stride), stride, first, count, key, device_.stream());
  if (channels_) channels_->sample(w, stride, replica, first, count, key);
}

void Posterior::mean_weights(float* w, int replica) {
  copy_on_device(device_, w, store_.at("mean") + store_.layout().stride() * replica, store_.row_bytes());
  if (multipliers_) multipliers_->sample(w, of_replica(arrays(), replica), pieces_, replica, false, 0, 1, Key{});
}

}  // namespace baton
