#include "tools/baton/command.h"

#include <algorithm>
#include <cmath>

#include "trainers/device_data.h"

namespace baton {

namespace fs = std::filesystem;

CLI::Option* DataArguments::add_to(CLI::App& app, const std::string& what, bool required) {
  CLI::Option* option =
      app.add_option(flag_, path_,
                     what +
                         ": an IDX file, a CIFAR batch, .npy, .npz, a data set's folder, or a folder of PNG/JPEG for "
                         "each class");
  if (required) option->required();
  app.add_option(companion("labels"), labels_, "their labels, where they lie in a file of their own (IDX or .npy)");
  split_text_ = split_ == Split::train ? "train" : "test";
  app.add_option(companion("split"), split_text_, "train or test: which half of a data set's folder or file")
      ->check(CLI::IsMember({"train", "test"}))
      ->capture_default_str();
  app.add_option(companion("images"), range_,
                 "FIRST:LAST, as 0:6000 for the first 6,000 (LAST is not among them); either may be left out");
  return option;
}

OwnData DataArguments::load(const Model& model, bool labels_needed) const {
  OwnDataOptions o = data_options(model);
  o.labels_needed = labels_needed;
  if (foreign_) o.classes = 0, o.class_names.clear();
  o.split = split_text_ == "train" ? Split::train : Split::test;
  if (!labels_.empty()) o.labels = labels_;
  if (!range_.empty()) {
    const size_t colon = range_.find(':');
    const auto number = [&](const std::string& text, int otherwise) {
      if (text.empty()) return otherwise;
      if (text.size() > 9 || text.find_first_not_of("0123456789") != std::string::npos)
        throw InputError(companion("images") + " is '" + range_ + "'; expected FIRST:LAST, as 0:6000");
      return std::stoi(text);
    };
    o.first = number(colon == std::string::npos ? "x" : range_.substr(0, colon), 0);
    o.last = number(range_.substr(colon + 1), 0);
  }
  OwnData data = load_own_data(path_, o);
  if (!foreign_) check_classes(model, data);
  return data;
}

void PredictionArguments::add_to(CLI::App& app) {
  app.add_option("--samples", samples_, "draws of the weights that a prediction averages")->capture_default_str();
  app.add_flag("--mean", mean_, "one pass with the posterior's mean instead");
  app.add_option("--seed", seed_, "of the draws")->capture_default_str();
}

int PredictionArguments::samples(const Model& model) const {
  if (!mean_ && (samples_ < 1 || samples_ > 1000000))
    throw InputError("--samples is " + std::to_string(samples_) + "; expected 1 to 1000000 (or --mean)");
  return mean_ || model.posterior.family == Family::point ? 0 : samples_;
}

Predictions PredictionArguments::predict(Device& device, const Model& model, const Images& images) const {
  Arena arena;
  const auto posterior = posterior_of(device, arena, model);
  Predictor predictor(device, arena, model.architecture.network(),
                      upload_images(device, arena, images, model.normalisation));
  return predictor.predict(*posterior, 0, samples(model), seed_);
}

std::string table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths;
  for (const auto& row : rows)
    for (size_t c = 0; c < row.size(); c++) {
      if (c == widths.size()) widths.push_back(0);
      widths[c] = std::max(widths[c], row[c].size());
    }
  std::string text;
  for (const auto& row : rows) {
    std::string line;
    for (size_t c = 0; c < row.size(); c++) {
      const std::string blanks(widths[c] - row[c].size(), ' ');
      line += (c ? "  " : "") + (c ? blanks + row[c] : row[c] + blanks);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  return text;
}

std::string decimals(double value, int digits) {
  if (std::isnan(value)) return "-";
  char text[64];
  snprintf(text, sizeof text, "%.*f", digits, value);
  return text;
}

std::string percent(double fraction, int digits) {
  return std::isnan(fraction) ? "-" : decimals(100 * fraction, digits) + " %";
}

std::string grouped(int64_t n) {
  std::string text = std::to_string(n < 0 ? -n : n);
  for (int at = int(text.size()) - 3; at > 0; at -= 3) text.insert(size_t(at), ",");
  return (n < 0 ? "-" : "") + text;
}

std::string json_text(const json& j) {
  const std::string pretty = j.dump(2, ' ', false, json::error_handler_t::replace);  // a path need not be UTF-8
  // Lists that hold no object and no list: on one line.
  std::string text;
  for (size_t i = 0; i < pretty.size(); i++) {
    if (pretty[i] == '"') {  // a string, whole
      size_t end = i + 1;
      while (pretty[end] != '"') end += pretty[end] == '\\' ? 2 : 1;
      text.append(pretty, i, end + 1 - i);
      i = end;
      continue;
    }
    if (pretty[i] == '[') {
      size_t end = i + 1;
      std::string flat = "[";
      for (; pretty[end] != ']' && pretty[end] != '[' && pretty[end] != '{'; end++) {
        if (pretty[end] == '"') {
          const size_t from = end++;
          while (pretty[end] != '"') end += pretty[end] == '\\' ? 2 : 1;
          flat.append(pretty, from, end + 1 - from);
        } else if (pretty[end] == '\n') {
          if (flat != "[") flat += ' ';
          while (pretty[end + 1] == ' ') end++;
        } else {
          flat += pretty[end];
        }
      }
      if (pretty[end] == ']') {
        if (flat.back() == ' ') flat.pop_back();
        text += flat + "]";
        i = end;
        continue;
      }
    }
    text += pretty[i];
  }
  return text;
}

void check_free(const std::string& path, bool overwrite) {
  std::error_code ignored;
  if (path.empty() || overwrite || !fs::is_regular_file(path, ignored)) return;
  throw InputError(path + " is there already (--overwrite writes over it)");
}

}  // namespace baton
