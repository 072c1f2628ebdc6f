#include "layers/posteriors/posterior.h"

#include <cmath>
#include <numeric>

#include "engine/io/safetensors.h"
#include "kernels/gaussian.h"

namespace baton {

Posterior::Posterior(const PosteriorSetup& setup)
    : device_(setup.device),
      arena_(setup.arena),
      kind_(setup.kind),
      settings_(setup.settings),
      masked_(setup.masked),
      store_(setup.arena, setup.layout, int(setup.settings.size())) {
  if (setup.masked && !setup.kind.prunable)
    throw InputError(std::string(setup.kind.name) + "'s weights cannot be pruned one by one");
}

float* Posterior::add_state(const std::string& array, Role role, ParameterStore* store) {
  if (!store) store = &store_;
  state_.push_back({store, array, role});
  return store->add(array);
}

void Posterior::add_mask() {
  if (masked_) upload(device_, add_state("mask"), std::vector<float>(size_t(stride()) * replicas(), 1.f));
}

void Posterior::reset_optimizer(Replicas of) {
  for (const StateArray& a : state_)
    if (a.role == Role::optimizer)
      fill_zero(device_, a.store->at(a.array) + a.store->layout().stride() * of.first, a.store->row_bytes() * of.count);
}

void Posterior::copy_rows(const ParameterStore& store, const char* to, const char* from, Replicas of) {
  const size_t first = store.layout().stride() * of.first;
  copy_on_device(device_, store.at(to) + first, store.at(from) + first, store.row_bytes() * of.count);
}

LayerContext Posterior::training_context(int batch) {
  return {device_, arena_, *this, replicas() * draws_at_once(), batch, true, draws() > 1 || draws_at_once() > 1};
}

void Posterior::initialise_he(float* mean, const StepState* states) {
  fill_zero(device_, mean, store_.bytes());
  for (const TensorSpec& t : store_.layout().tensors())
    if (!t.bias)
      init_normal(mean, store_.layout().stride(), int(t.offset), int(t.size), std::sqrt(2.f / t.fan_in), states,
                  replicas(), device_.stream());
}

void Posterior::initialise_glorot(float* mean, bool draw_biases, const StepState* states) {
  int kernel = 1;  // elements of a kernel: of the tensor that a bias follows
  for (const TensorSpec& t : store_.layout().tensors()) {
    double variance = 0;
    if (!t.bias) {
      kernel = 1;
      for (size_t d = 2; d < t.shape.size(); d++) kernel *= int(t.shape[d]);
      variance = 2. / (double(t.shape[1]) * kernel + double(t.shape[0]) * kernel);
    } else if (draw_biases) {
      variance = 2. / (1 + double(kernel) * double(t.shape[0]));
    }
    init_normal(mean, store_.layout().stride(), int(t.offset), int(t.size), float(std::sqrt(variance)), states,
                replicas(), device_.stream());
  }
}

void Posterior::adopt(int replica, const TensorSpec& t, std::span<const float> w, std::span<const float> prior) {
  if (w.size() != t.size || (prior.size() != 1 && prior.size() != t.size && uncertain()))
    throw InputError(t.name + ": a pretrained tensor of " + std::to_string(w.size()) + " weights and " +
                     std::to_string(prior.size()) + " prior standard deviations, expected " + std::to_string(t.size));
  store_.write(device_, "mean", replica, t, {w.begin(), w.end()});
}

std::vector<double> Posterior::kl() {
  std::vector<double> totals;
  for (const auto& row : kl_by_name()) totals.push_back(std::accumulate(row.begin(), row.end(), 0.0));
  return totals;
}

void Posterior::mean_weights(float* w, int replica) {
  copy_on_device(device_, w, store_.at("mean") + store_.layout().stride() * replica, store_.row_bytes());
}

std::vector<uint8_t> Posterior::read_pruned(const TensorSpec& t) const {
  if (!masked_) return {};
  std::vector<uint8_t> pruned;
  for (float kept : store_.read(device_, "mask", 0, t)) pruned.push_back(kept == 0);
  return pruned;
}

void Posterior::mask(const std::vector<uint8_t>& pruned) {
  if (!masked_) throw InputError("a posterior without masks cannot be pruned");
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

// ------------------------------------------------------------------------------------------------------------ files
void Posterior::save(TensorFile& file) const {
  for (const StateArray& a : state_)
    for (const TensorSpec& t : a.store->layout().tensors()) {
      if (!a.believed()) continue;
      const std::vector<float> values = a.store->read(device_, a.array, 0, t);
      const std::string name = t.name + "." + a.array;
      file.tensors[name] = a.array == "mask"
                               ? Tensor::of<uint8_t>(std::vector<uint8_t>(values.begin(), values.end()), t.shape)
                               : Tensor::of<float>(values, t.shape);
    }
}

std::vector<float> Posterior::read_mask(const TensorFile& file, const TensorSpec& t) {
  std::vector<float> mask;
  for (uint8_t kept : file.at(t.name + ".mask", t.shape).as<uint8_t>()) mask.push_back(kept ? 1.f : 0.f);
  return mask;
}

void Posterior::load(const TensorFile& file, bool first_stage) {
  std::vector<std::vector<float>> values;
  for (const StateArray& a : state_)
    for (const TensorSpec& t : a.store->layout().tensors()) {
      const std::string name = t.name + "." + a.array;
      if (!a.believed()) continue;
      values.push_back(a.array == "mask" ? read_mask(file, t) : file.at(name, t.shape).as<float>());
      for (float x : values.back())
        if (!std::isfinite(x)) throw InputError(file.path + ": tensor '" + name + "' has a value that is not finite");
    }
  size_t next = 0;
  for (const StateArray& a : state_)
    for (const TensorSpec& t : a.store->layout().tensors())
      if (a.believed()) a.store->write(device_, a.array, 0, t, values[next++]);
  refresh(first_stage);
}

// --------------------------------------------------------------------------------------------------------- registry
extern const PosteriorKind ft_kind, ffg_kind, cfg_kind, mnf_kind, bgd_kind, bbb_kind, sgd_kind, adam_kind, si_kind,
    ewc_kind;

const std::vector<const PosteriorKind*>& posterior_kinds() {
  static const std::vector<const PosteriorKind*> kinds{&ft_kind,  &ffg_kind, &cfg_kind,  &mnf_kind, &bgd_kind,
                                                       &bbb_kind, &sgd_kind, &adam_kind, &si_kind,  &ewc_kind};
  return kinds;
}

const PosteriorKind& find_posterior(const std::string& name) {
  std::string list;
  for (const PosteriorKind* kind : posterior_kinds()) {
    if (name == kind->name) return *kind;
    list += (list.empty() ? "" : kind == posterior_kinds().back() ? " or " : ", ") + std::string(kind->name);
  }
  throw InputError("unknown posterior '" + name + "': " + list);
}

std::unique_ptr<Posterior> make_posterior(Device& device, Arena& arena, const ParameterLayout& layout,
                                          const std::string& name, const std::vector<json>& settings, bool masked) {
  const PosteriorKind& kind = find_posterior(name);
  if (settings.empty()) throw InputError("a posterior has at least one replica");
  if (settings.size() > 1 && !kind.many_replicas)
    throw InputError(name + " trains one network at a time, not " + std::to_string(settings.size()));
  PosteriorSetup setup{device, arena, layout, kind, {}, masked};
  for (const json& given : settings) {
    setup.settings.push_back(complete_options(kind.options, given, name));
    for (const Option& option : kind.options)
      if (!option.by_replica && setup.settings.back()[option.name] != setup.settings[0][option.name])
        throw InputError("networks that train side by side must have the same '" + option.name + "'");
  }
  return kind.make(setup);
}

json common_settings(const PosteriorKind& kind, const json& settings) {
  json common = complete_options(kind.options, settings, kind.name);
  for (const Option& option : kind.options)
    if (option.by_replica) common.erase(option.name);
  return common;
}

Schema with_schedule(double step_size, std::string help, Schema options, std::string name) {
  Schema all{by_replica(number_option(std::move(name), step_size, positive, std::move(help))),
             by_replica(choice_option("schedule", "constant", {"constant", "linear", "cosine", "steps"},
                                      "how the step sizes fall over a stage: constant, linear, cosine, steps")),
             by_replica(number_option("decay", 0.1, {0, 1, true}, "factor of the schedule 'steps'")),
             by_replica(number_option("decay_epochs", 100, positive, "epochs between the steps of that schedule"))};
  all.insert(all.end(), options.begin(), options.end());
  return all;
}

}  // namespace baton
