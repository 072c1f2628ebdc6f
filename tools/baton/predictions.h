// What `baton predict` and `baton evaluate` have in common.
#pragma once
#include <cmath>
#include <cstdio>
#include <string>

#include "tools/baton/command.h"

namespace baton {

// As text of people's own, such as a file's name, can stand in JSON and on a terminal: valid UTF-8, no control signs.
inline std::string printable(const std::string& text) {
  std::string shown = json::parse(json(text).dump(-1, ' ', false, json::error_handler_t::replace)).get<std::string>();
  for (char& c : shown)
    if (uint8_t(c) < 0x20 || c == 0x7F) c = '?';
  return shown;
}

inline json description_of(const Model& model) {
  return {{"architecture", model.architecture.description()},
          {"family", name_of(model.posterior.family)},
          {"stages", model.stages()},
          {"fingerprint", fingerprint(model)}};
}

inline json description_of(const OwnData& data) {
  return {{"format", data.format},
          {"images", data.images.count},
          {"labelled", data.labelled},
          {"hash", hash_text(content_hash(data.images))}};
}

inline std::vector<std::string> class_names(const Model& model) {
  std::vector<std::string> names;
  for (int c = 0; c < model.architecture.classes; c++) names.push_back(printable(model.class_name(c)));
  return names;
}

// The predictions; RunError where the network has overflowed.
inline Predictions predict_images(const PredictionArguments& arguments, Device& device, const Model& model,
                                  const Images& images) {
  const int samples = arguments.samples(model);
  fprintf(stderr, "baton: predicting %s image%s, %s\n", grouped(images.count).c_str(), images.count == 1 ? "" : "s",
          samples ? (grouped(samples) + (samples == 1 ? " draw" : " draws") + " of the weights").c_str() : "one pass");
  Predictions p = arguments.predict(device, model, images);
  for (size_t i = 0; i < p.entropy.size(); i++)
    if (!std::isfinite(p.entropy[i]))
      throw RunError("the prediction for image " + std::to_string(i) +
                     " is not finite: the model's weights or their standard deviations are too large");
  return p;
}

// Whether draws differed: else what they say of the weights is 0 and means nothing.
inline bool has_epistemic(const json& result) { return result["samples"].get<int>() > 1; }

inline double number(const json& j) { return j.is_number() ? j.get<double>() : NAN; }

// "10,000 images (IDX)"
inline std::string data_text(const json& data) {
  const auto n = data["images"].get<int64_t>();
  return grouped(n) + (n == 1 ? " image (" : " images (") + data["format"].get<std::string>() + ")";
}

// Which model predicts, and how: two lines.
inline std::string how_text(const json& result) {
  const json& model = result["model"];
  const int stages = model["stages"], samples = result["samples"];
  std::string text = "model       " + model["architecture"].get<std::string>() + "; " +
                     model["family"].get<std::string>() + ", " + std::to_string(stages) +
                     (stages == 1 ? " stage" : " stages") + " learned (fingerprint " +
                     model["fingerprint"].get<std::string>() + ")\nprediction  ";
  if (samples == 0) return text + "one pass with the mean of the weights\n";
  return text + "average over " + grouped(samples) + (samples == 1 ? " draw" : " draws") + " of the weights, seed " +
         std::to_string(result["seed"].get<uint64_t>()) + "\n";
}

}  // namespace baton
