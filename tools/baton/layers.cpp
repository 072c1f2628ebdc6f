#include "tools/baton/layers.h"

#include <algorithm>
#include <cmath>

#include "trainers/metrics.h"
#include "trainers/parse.h"

namespace baton {

std::vector<uint8_t> pruned_of(Device& device, const Posterior& posterior, const TensorSpec& t) {
  std::vector<uint8_t> pruned;
  if (!posterior.options().masked) return pruned;
  for (float kept : posterior.store().read(device, "mask", 0, t)) pruned.push_back(kept == 0.f);
  return pruned;
}

std::vector<Belief> beliefs_of(Device& device, Posterior& posterior) {
  const ParameterStore& store = posterior.store();
  const size_t stride = store.layout().stride();
  posterior.mean_log_std();  // brings cfg's marginals up to date
  Arena arena;
  float* w = arena.take<float>(stride);
  posterior.mean_weights(w, 0);
  const std::vector<float> flat = download(device, w, stride);
  std::vector<Belief> beliefs;
  for (const TensorSpec& t : store.layout().tensors()) {
    Belief b{t, {flat.begin() + long(t.offset), flat.begin() + long(t.offset + t.size)}, {}, {}};
    if (posterior.family() != Family::point) b.log_std = store.read(device, "log_std", 0, t);
    b.pruned = pruned_of(device, posterior, t);
    beliefs.push_back(std::move(b));
  }
  return beliefs;
}

std::string layer_of(const std::string& tensor) { return tensor.substr(0, tensor.rfind('.')); }

std::vector<std::string> layers_of(const ParameterLayout& layout) {
  std::vector<std::string> layers;
  for (const TensorSpec& t : layout.tensors())
    if (layers.empty() || layers.back() != layer_of(t.name)) layers.push_back(layer_of(t.name));
  return layers;
}

std::string in_words(const PosteriorOptions& o) {
  const std::string groups = o.groups == 1 ? "" : "; " + std::to_string(o.groups) + " groups of a batch draw their own";
  switch (o.family) {
    case Family::point:
      return "ft, a point estimate (fine-tuning): weights without uncertainty";
    case Family::gaussian:
      return "ffg, fully factorized Gaussian: every weight has a mean and a standard deviation, sigma";
    case Family::channel:
      return "cfg, channel factorized Gaussian: the weights of a kernel have a covariance, all others a sigma each" +
             (o.moments ? std::string("; trained through exact marginal moments") : groups);
    case Family::multiplicative:
      return "mnf, multiplicative normalizing flow: w = z mean + sigma e, with z " +
             std::string(o.z_per_filter ? "per filter" : "per filter and channel") + " from a flow (" +
             name_of(o.flow) + ", " + std::to_string(o.flow_steps) + " steps" +
             (o.flow == FlowKind::planar ? "" : ", " + std::to_string(o.flow_hidden) + " hidden units") + ")" + groups;
  }
  return "";
}

std::string in_words(const Normalisation& n, int channels) {
  const auto same = [&](const float* values, float value) {
    return std::all_of(values, values + channels, [&](float x) { return x == value; });
  };
  if (same(n.scale, 1.f / 255) && same(n.shift, 0)) return "pixels from 0 to 255 are divided by 255";
  std::string means, deviations;
  for (int c = 0; c < channels; c++) {  // x = (pixel - m) / s
    means += (c ? ", " : "") + decimals(-double(n.shift[c]) / n.scale[c], 2);
    deviations += (c ? ", " : "") + decimals(1 / double(n.scale[c]), 2);
  }
  return "from pixels of 0 to 255 " + means + " is subtracted, then they are divided by " + deviations +
         (channels > 1 ? " (by channel)" : "");
}

json to_json(const Normalisation& n, int channels) {
  json scale = json::array(), shift = json::array();
  for (int c = 0; c < channels; c++) scale.push_back(n.scale[c]), shift.push_back(n.shift[c] + 0.f);  // no -0
  return {{"scale", scale}, {"shift", shift}};
}

double number_in(const json& object, const std::string& key) {
  const auto found = object.is_object() ? object.find(key) : object.end();
  return found != object.end() && found->is_number() ? found->get<double>() : NAN;
}

std::string text_in(const json& object, const std::string& key) {
  const auto found = object.is_object() ? object.find(key) : object.end();
  return found != object.end() && found->is_string() ? found->get<std::string>() : "";
}

std::string brief(double value) {
  if (std::isnan(value)) return "-";
  char text[32];
  snprintf(text, sizeof text, "%.3g", value);
  return text;
}

std::string counted(double value) {
  return std::isfinite(value) && std::abs(value) < 1e15 ? grouped(std::llround(value)) : "-";
}

std::string plural(int64_t n, const char* one) { return grouped(n) + " " + one + (n == 1 ? "" : "s"); }

std::string model_text(const json& model) {
  return model["architecture"].get<std::string>() + "; " + model["family"].get<std::string>() + ", " +
         plural(model["stages"], "stage") + " learned (fingerprint " + model["fingerprint"].get<std::string>() + ")";
}

json judged(const Predictions& p, const Images& images, int classes) {
  const Metrics m = evaluate(p.probability, images.labels, classes, p.entropy, p.mutual_information);
  return {{"accuracy", m.accuracy}, {"nll", m.nll}, {"ece", m.ece}};
}

}  // namespace baton
