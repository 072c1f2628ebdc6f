#include "tools/baton/describe.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "trainers/metrics.h"

namespace baton {

json describe_model(const Model& model) {
  return {{"architecture", model.network.description()},
          {"kind", model.kind},
          {"uncertain", model.uncertain()},
          {"stages", model.stages()},
          {"fingerprint", fingerprint(model)}};
}

json describe_data(const OwnData& data) {
  return {{"format", data.format},
          {"images", data.images.count},
          {"labelled", data.labelled},
          {"hash", hash_text(content_hash(data.images))}};
}

std::vector<std::string> list_classes(const Model& model) {
  std::vector<std::string> names;
  for (int c = 0; c < model.network.classes; c++) names.push_back(printable(model.class_name(c)));
  return names;
}

std::string in_words(std::string key) {
  std::replace(key.begin(), key.end(), '_', ' ');
  return key;
}

std::string describe_posterior(const Model& model) {
  const PosteriorKind& kind = find_posterior(model.kind);
  std::string options;
  for (const Option& option : kind.options) {
    const json& value = model.settings[option.name];
    // Numbers are where it begins, which says little of where it is now.
    if (!decided_by_init(option) || option.type == Option::Type::number || value == false) continue;
    options += (options.empty() ? "; " : ", ") + in_words(option.name);
    if (option.type != Option::Type::flag) options += " " + format_value(value, "");
  }
  return kind.summary + options;
}

std::string describe_normalisation(const Model& model) {
  const Normalisation& n = model.normalisation;
  const int channels = model.network.image.channels;
  const auto same = [&](const float* values, float value) {
    return std::all_of(values, values + channels, [&](float x) { return x == value; });
  };
  if (same(n.scale, 1.f / 255) && same(n.shift, 0)) return "pixels from 0 to 255 are divided by 255";
  std::string means, deviations;
  for (int c = 0; c < channels; c++) {  // x = (pixel - m) / s
    means += (c ? ", " : "") + format_value(-double(n.shift[c]) / n.scale[c], ".2");
    deviations += (c ? ", " : "") + format_value(1 / double(n.scale[c]), ".2");
  }
  return "from pixels of 0 to 255 " + means + " is subtracted, then they are divided by " + deviations +
         (channels > 1 ? " (by channel)" : "");
}

json normalisation_json(const Model& model) {
  json scale = json::array(), shift = json::array();
  for (int c = 0; c < model.network.image.channels; c++) {
    scale.push_back(model.normalisation.scale[c]);
    shift.push_back(model.normalisation.shift[c] + 0.f);  // no -0
  }
  return {{"scale", scale}, {"shift", shift}};
}

std::string model_text(const json& model) {
  return fill(model, "{architecture}; {kind}, {stages:stage} learned (fingerprint {fingerprint})");
}

std::string data_text(const json& data) { return fill(data, "{images:image} ({format})"); }

std::string how_text(const json& result) {
  std::string way = "one pass with the mean of the weights";
  if (result["samples"] != 0) way = fill(result, "average over {samples:draw} of the weights, seed {seed}");
  if (result.contains("head")) way += fill(result, ", head {head}");
  if (result["precision"] != "fp32") way += fill(result, ", {precision}");
  return "model       " + model_text(result["model"]) + "\nprediction  " + way + "\n";
}

bool has_epistemic(const json& result) { return result["samples"] > 1; }

json judge(const Predictions& p, const Images& images, int classes) {
  const Metrics m = evaluate(p.probability, images.labels, classes, p.entropy, p.mutual_information);
  return {{"accuracy", m.accuracy}, {"nll", m.nll}, {"ece", m.ece}};
}

double mean(const std::vector<float>& values) {
  return std::accumulate(values.begin(), values.end(), 0.) / double(values.size());
}

std::vector<int> choose_classes(const Predictions& p, int classes) {
  std::vector<int> chosen;
  for (auto at = p.probability.begin(); at != p.probability.end(); at += classes)
    chosen.push_back(int(std::max_element(at, at + classes) - at));
  return chosen;
}

std::vector<Belief> read_beliefs(Device& device, Posterior& posterior) {
  const size_t stride = posterior.store().layout().stride();
  Arena arena;
  float* w = arena.take<float>(stride);
  posterior.mean_weights(w, 0);
  const std::vector<float> flat = download(device, w, stride);
  std::vector<Belief> beliefs;
  for (const TensorSpec& t : posterior.store().layout().tensors())
    beliefs.push_back({t,
                       {flat.begin() + long(t.offset), flat.begin() + long(t.offset + t.size)},
                       posterior.read_log_std(0, t),
                       posterior.read_pruned(t)});
  return beliefs;
}

std::string layer_name(const std::string& tensor) { return tensor.substr(0, tensor.rfind('.')); }

std::vector<std::string> list_layers(const ParameterLayout& layout) {
  std::vector<std::string> layers;
  for (const TensorSpec& t : layout.tensors())
    if (layers.empty() || layers.back() != layer_name(t.name)) layers.push_back(layer_name(t.name));
  return layers;
}

json list_sums(const json& result) {
  json rows = result["layers"], all{{"layer", "all"}};
  all.update(result["all_layers"]);
  rows.push_back(all);
  return rows;
}

}  // namespace baton
