#include "tools/baton/command.h"

#include <cmath>

#include "trainers/device_data.h"

namespace baton {

namespace fs = std::filesystem;

namespace {

template <class Kind>
Schema merge_options(const std::vector<const Kind*>& kinds) {
  Schema all;
  for (const Kind* kind : kinds)
    for (const Option& option : kind->options) {
      if (find_option(all, option.name)) continue;
      all.push_back(option);
      std::string names;
      bool everywhere = true;
      for (const Kind* other : kinds) {
        const Option* same = find_option(other->options, option.name);
        everywhere = everywhere && same;
        if (!same) continue;
        names += (names.empty() ? "" : ", ") + std::string(other->name);
        if (same->standard != option.standard) all.back().standard = nullptr;
      }
      std::string& help = all.back().help;
      if (!everywhere && help.rfind(names + ": ", 0) != 0) help = names + ": " + help;
    }
  return all;
}

// As --help shows it behind an option: "FLOAT", "TEXT:{adam,natural}".
std::string type_text(const Option& option) {
  if (option.type == Option::Type::number) return "FLOAT";
  if (option.type == Option::Type::whole) return "INT";
  return option.choices.empty() ? "TEXT" : "TEXT:{" + CLI::detail::join(option.choices, ",") + "}";
}

}  // namespace

void SchemaArguments::add_to(CLI::App& app, const Schema& schema, bool standards) {
  for (const Option& option : schema) {
    const std::string flag = option_flag(option);
    const json& value = option.standard;
    if (option.type == Option::Type::flag) {
      const std::string off = standards && value == true ? " (it is; " + flag + "=false turns it off)" : "";
      app.add_flag_function(
          flag, [this, name = option.name](int64_t n) { given_[name] = n > 0; }, option.help + off);
      continue;
    }
    const auto take = [this, option](const std::string& text) {
      given_[option.name] = parse_option(option, text, option_flag(option));
    };
    CLI::Option* added = app.add_option_function<std::string>(flag, take, option.help)->type_name(type_text(option));
    if (!standards || value.is_null() || value.is_array()) continue;
    char number[32];
    snprintf(number, sizeof number, "%g", value.is_number() ? double(value) : 0.);
    added->default_str(value.is_string() ? std::string(value) : number);
  }
}

Schema posterior_options() {
  Schema all = merge_options(posterior_kinds());
  for (Option& option : all)
    if (option.name == "lr") option.help = "step size, of the means where there is a sigma (bgd: --eta)";
  return all;
}

Schema network_options() { return merge_options(network_kinds()); }

bool decided_by_init(const Option& option) {
  for (const char* name : {"groups", "moments", "flow", "flow_steps", "flow_hidden", "z", "fixed_base", "path_gradient",
                           "z_log_std", "init_log_std", "sigma", "prior", "prior_sd", "prior_sd2", "prior_weight"})
    if (option.name == name) return true;
  return false;
}

void DataArguments::add_to(CLI::App& app, const std::string& what, bool required) {
  app.add_option(flag_, path_,
                 what +
                     ": an IDX file, a CIFAR batch, .npy, .npz, a data set's folder, or a folder of PNG/JPEG for "
                     "each class")
      ->required(required);
  app.add_option(companion("labels"), labels_, "their labels, where they lie in a file of their own (IDX or .npy)");
  app.add_option(companion("split"), split_, "train or test: which half of a data set's folder or file")
      ->check(CLI::IsMember({"train", "test"}))
      ->capture_default_str();
  app.add_option(companion("images"), range_,
                 "FIRST:LAST, as 0:6000 for the first 6,000 (LAST is not among them); either may be left out");
}

OwnData DataArguments::load(const Model& model, bool labels_needed) const {
  OwnDataOptions o = data_options(model);
  o.labels_needed = labels_needed;
  if (foreign_) o.classes = 0, o.class_names.clear();
  o.split = split_ == "train" ? Split::train : Split::test;
  if (!labels_.empty()) o.labels = labels_;
  if (!range_.empty()) {
    const size_t colon = range_.find(':');
    const auto number = [&](const std::string& text) {
      if (text.empty()) return 0;
      if (text.size() > 9 || text.find_first_not_of("0123456789") != std::string::npos)
        throw InputError(companion("images") + " is '" + range_ + "'; expected FIRST:LAST, as 0:6000");
      return std::stoi(text);
    };
    o.first = number(colon == std::string::npos ? "x" : range_.substr(0, colon));
    o.last = number(range_.substr(colon + 1));
  }
  OwnData data = load_own_data(path_, o);
  if (!foreign_) check_classes(model, data);
  return data;
}

void PredictionArguments::add_to(CLI::App& app) {
  app.add_option("--samples", samples_, "draws of the weights that a prediction averages")->capture_default_str();
  app.add_flag("--mean", mean_, "one pass with the posterior's mean instead");
  app.add_option("--seed", seed_, "of the draws")->capture_default_str();
  app.add_option("--head", head_, "which output layer, of a network with several; the first is 0")
      ->capture_default_str();
  app.add_option("--precision", precision_, "of the layers' products: fp32 or tf32 (default: the model's)");
}

Precision PredictionArguments::precision(const Model& model) const {
  return precision_.empty() ? model.precision : parse_precision(precision_);
}

int PredictionArguments::samples(const Model& model) const {
  if (!mean_ && (samples_ < 1 || samples_ > 1000000))
    throw InputError("--samples is " + std::to_string(samples_) + "; expected 1 to 1000000 (or --mean)");
  return mean_ || !model.uncertain() ? 0 : samples_;
}

void PredictionArguments::describe(json& result, const Model& model) const {
  result["samples"] = samples(model);
  result["seed"] = seed_;
  if (head_) result["head"] = head_;
  result["precision"] = name(precision(model));
}

Predictions PredictionArguments::predict(Device& device, const LoadedModel& loaded, const Images& images) const {
  const Model& model = loaded.model;
  const int draws = samples(model);
  device.set_precision(precision(model));
  Arena arena;  // for one prediction
  Predictor predictor(device, arena, network_factory(model.network),
                      upload_images(device, arena, images, model.normalisation));
  predictor.look_as(head_, nullptr);
  fprintf(stderr, "baton: predicting %s, %s\n", format_value(images.count, "image").c_str(),
          draws ? (format_value(draws, "draw") + " of the weights").c_str() : "one pass");
  Predictions p = predictor.predict(*loaded.posterior, 0, draws, seed_);
  for (size_t i = 0; i < p.entropy.size(); i++)
    if (!std::isfinite(p.entropy[i]))
      throw RunError("the prediction for image " + std::to_string(i) +
                     " is not finite: the model's weights or their standard deviations are too large");
  return p;
}

CLI::Option* Command::add_out(CLI::App& app, const std::string& what) {
  app.add_flag("--overwrite", overwrite_, "write over --out if it is there");
  return app.add_option("--out", out_, what);
}

void check_free(const std::string& path, bool overwrite) {
  std::error_code ignored;
  if (path.empty() || overwrite || !fs::is_regular_file(path, ignored)) return;
  throw InputError(path + " is there already (--overwrite writes over it)");
}

}  // namespace baton
