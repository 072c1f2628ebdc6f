// baton inspect: what is in a model's file.
#include <algorithm>
#include <cmath>

#include "tools/baton/describe.h"

namespace baton {

namespace {

// log10 of sigma, of everything that is not pruned.
std::vector<double> log10_sigma(const Belief& b) {
  std::vector<double> values;
  for (size_t i = 0; i < b.log_std.size(); i++)
    if (!b.gone(i)) values.push_back(double(b.log_std[i]) / std::log(10.0));
  return values;
}

double median(std::vector<double> values) {
  if (values.empty()) return NAN;
  const auto middle = values.begin() + std::ptrdiff_t(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  if (values.size() % 2) return *middle;
  return (*middle + *std::max_element(values.begin(), middle)) / 2;
}

// At most 20 bins whose width is the same on a logarithmic scale.
json histogram(const std::vector<double>& values) {
  json bins = json::array();
  if (values.empty()) return bins;
  const auto [least, largest] = std::minmax_element(values.begin(), values.end());
  double width = 0.01;
  const auto bin = [&](double x) { return std::floor(x / width + 1e-9); };
  for (double next : {0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 100.0}) {
    if (bin(*largest) - bin(*least) < 20) break;
    width = next;
  }
  const double first = bin(*least);
  const auto place = [&](double x) { return size_t(std::min(bin(x) - first, 19.0)); };
  std::vector<int64_t> counts(place(*largest) + 1);
  for (double x : values) counts[place(x)]++;
  for (size_t i = 0; i < counts.size(); i++)
    bins.push_back({{"from", std::pow(10, (first + double(i)) * width)},
                    {"to", std::pow(10, (first + double(i) + 1) * width)},
                    {"weights", counts[i]}});
  return bins;
}

// What a layer's tensors add up to.
struct Sums {
  int64_t parameters = 0, pruned = 0;
  double absolute = 0;
  std::vector<double> sigma;  // log10
  void add(const Belief& b) {
    parameters += int64_t(b.mean.size());
    for (size_t i = 0; i < b.mean.size(); i++) {
      if (b.gone(i)) pruned++;
      else absolute += std::abs(double(b.mean[i]));
    }
    const std::vector<double> more = log10_sigma(b);
    sigma.insert(sigma.end(), more.begin(), more.end());
  }
  // kl: to the prior; NaN: there is none.
  json object(double kl) const {
    const double left = double(parameters - pruned);
    json j{{"parameters", parameters}, {"pruned", pruned}, {"mean_absolute", left > 0 ? absolute / left : NAN}};
    if (sigma.empty()) return j;
    if (!std::isnan(kl)) j["kl"] = kl, j["kl_per_parameter"] = kl / left;
    const auto [least, largest] = std::minmax_element(sigma.begin(), sigma.end());
    j["sigma"] = {
        {"least", std::pow(10, *least)}, {"median", std::pow(10, median(sigma))}, {"largest", std::pow(10, *largest)}};
    return j;
  }
};

class InspectCommand : public Command {
 public:
  InspectCommand()
      : Command("inspect", "what a model is, what it has learned and how sure it is",
                "  baton inspect --model model.safetensors\n"
                "      architecture, history, settings, and the uncertainty of every layer\n"
                "  baton inspect --model model.safetensors --json\n"
                "      the same for a program\n") {}

  void add_options(CLI::App& app) override {
    app.add_option("--model", model_, "the model");
    app.add_flag("--networks", networks_)->group("");  // prints tools/networks.json
  }

  json run() override {
    if (networks_) return describe_networks();
    if (model_.empty()) throw InputError("--model is required");
    Device device;
    Arena arena;
    const auto [m, posterior] = load_model(device, arena, model_);
    const ImageShape& image = m.network.image;

    json r;
    r["command"] = "inspect";
    r["model"] = describe_model(m);
    r["posterior"] = describe_posterior(m);
    r["image"] = {image.channels, image.height, image.width};
    r["normalisation"] = normalisation_json(m);
    r["normalisation_in_words"] = describe_normalisation(m);
    r["classes"] = list_classes(m);
    r["named_classes"] = !m.class_names.empty();
    r["origin"] = m.origin;
    r["history"] = m.history;
    double images = 0;
    for (const json& stage : m.history)
      if (const double n = number_in(stage, "images"); n > 0) images += n;
    r["images_learned"] = images;
    r["steps"] = m.step;
    r["prior"] = describe_prior(m);
    r["pruned"] = m.pruned;
    r["next_update"] = training_json(m);
    r["seed"] = m.seed;

    const json kl = sum_by_layer(posterior->kl_names(), posterior->kl_by_name()[0]);  // empty for a kind without a KL
    const std::vector<Belief> beliefs = read_beliefs(device, *posterior);
    Sums all;
    double total = kl.empty() ? NAN : 0;
    r["layers"] = json::array();
    for (const std::string& layer : list_layers(posterior->store().layout())) {
      Sums sums;
      for (const Belief& b : beliefs)
        if (layer_name(b.tensor.name) == layer) sums.add(b), all.add(b);
      json row{{"layer", layer}};
      row.update(sums.object(number_in(kl, layer)));
      r["layers"].push_back(row);
      total += number_in(kl, layer);
    }
    r["all_layers"] = all.object(total);
    if (!all.sigma.empty()) r["sigma_histogram"] = histogram(all.sigma);
    return r;
  }

  std::string text(const json& r) const override {
    if (networks_) return json_text(r) + "\n";
    const json &model = r["model"], &all = r["all_layers"];
    const bool has_sigma = all.contains("sigma"), has_kl = all.contains("kl");
    const std::vector<std::string> classes = r["classes"];
    std::string names;
    for (size_t i = 0; i < classes.size() && i < 20; i++) names += (i ? ", " : "") + classes[i];
    if (classes.size() > 20) names += ", ... (" + std::to_string(classes.size()) + ")";
    std::string t = list(
        {{"network",
          model["architecture"].get<std::string>() + "; " + grouped(all["parameters"]) + " weights and biases"},
         {"posterior", r["posterior"]},
         {"images", r["normalisation_in_words"]},
         {"classes", r["named_classes"] ? names : "numbers, 0 to " + std::to_string(classes.size() - 1)},
         {"first prior", origin_text(r["origin"])},
         {"learned", model["stages"] == 0 ? "nothing yet"
                                          : plural(model["stages"], "stage") + ", " + counted(r["images_learned"]) +
                                                " images, " + plural(r["steps"], "step")},
         {"prior now", r["prior"]},
         {"pruned", pruned_text(r)},
         {"fingerprint", model["fingerprint"]}});
    if (!r["history"].empty()) t += "\nWhat it has learned\n" + history_text(r["history"], has_kl);

    t += "\nLayers\n" + layers_text(r);
    if (has_kl) t += "KL: of the posterior to its prior, in nats: how far the last stage has moved it.\n";
    if (has_sigma)
      t += std::string("sigma: the standard deviation of a weight") +
           (model["kind"] == "cfg"   ? " (of its marginal)"
            : model["kind"] == "mnf" ? " given z (the KL is a mean over 8 draws of z)"
                                     : "") +
           ".\n\nHow many weights have which sigma\n" + histogram_text(r["sigma_histogram"]);
    else t += "A point estimate has no sigma and no KL.\n";
    return t + "\nSettings of the next update (baton update takes others)\n" + settings_text(r);
  }

 private:
  // What the KL is measured to.
  static std::string describe_prior(const Model& m) {
    if (!m.uncertain()) return "none (a point estimate)";
    if (!m.settings.contains("beta")) return "none is kept in the file";
    if (m.stages() < 2) return "the first prior";
    return "the posterior of stage " + std::to_string(m.stages() - 1);
  }

  static std::string origin_text(const json& origin) {
    std::string text = text_in(origin, "prior");
    if (text.empty()) text = "not told";
    if (const std::string from = text_in(origin, "pretrained"); !from.empty()) text += " (fingerprint " + from + ")";
    if (const std::string layers = text_in(origin, "transfer"); !layers.empty() && layers != "all")
      text += "; pretrained layers: " + layers;
    return printable(text);
  }

  static std::string pruned_text(const json& r) {
    const json &p = r["pruned"], &all = r["all_layers"];
    const double pruned = all["pruned"];
    if (pruned == 0) return "nothing";
    std::string text = counted(pruned) + " of " + grouped(all["parameters"]) + " weights and biases (" +
                       percent(pruned / all["parameters"].get<double>()) + ") are 0 for good";
    const std::string by = text_in(p, "by");
    if (!by.empty()) text += std::string(", by ") + (by == "snr" ? "signal-to-noise ratio" : printable(by));
    if (text_in(p, "scope") == "layer") text += ", the same share of every layer";
    return text;
  }

  static std::string history_text(const json& history, bool has_kl) {
    TextRows rows{{"stage", "images", "data", "epochs", "steps", "NLL", "accuracy"}};
    if (has_kl) rows[0].push_back("KL");
    bool held_out = false;
    for (const json& stage : history) held_out = held_out || stage.contains("hold_out");
    if (held_out) rows[0].push_back("held-out accuracy");
    for (const json& stage : history) {
      rows.push_back({std::to_string(rows.size()), counted(number_in(stage, "images")),
                      printable(text_in(stage, "data")), brief(number_in(stage, "epochs")),
                      counted(number_in(stage, "steps")), decimals(number_in(stage, "loss"), 4),
                      percent(number_in(stage, "accuracy"))});
      if (has_kl) rows.back().push_back(decimals(number_in(stage, "kl"), 1));
      if (held_out)
        rows.back().push_back(
            percent(number_in(stage.contains("hold_out") ? stage["hold_out"] : json(), "accuracy_after")));
    }
    return table(rows) +
           "data: a hash of the images and labels. NLL: mean negative log-likelihood of an image, nats, and accuracy: "
           "on\nthe images being learned, in the last epoch." +
           (has_kl ? " KL: of the stage's posterior to its prior, nats.\n" : "\n");
  }

  static std::string layers_text(const json& r) {
    const json& all = r["all_layers"];
    const bool pruned = all["pruned"] > 0, has_kl = all.contains("kl"), has_sigma = all.contains("sigma");
    TextRows rows{{"layer", "parameters"}};
    if (pruned) rows[0].push_back("pruned");
    rows[0].push_back("mean |mean|");
    if (has_kl) rows[0].insert(rows[0].end(), {"KL", "KL a weight"});
    if (has_sigma) rows[0].insert(rows[0].end(), {"sigma: least", "median", "largest"});
    const auto row = [&](const std::string& name, const json& l) {
      rows.push_back({name, grouped(l["parameters"])});
      const auto add = [&](const std::string& cell) { rows.back().push_back(cell); };
      if (pruned) add(percent(l["pruned"].get<double>() / l["parameters"].get<double>()));
      add(brief(number_in(l, "mean_absolute")));
      if (has_kl) add(decimals(number_in(l, "kl"), 1)), add(brief(number_in(l, "kl_per_parameter")));
      if (!has_sigma) return;
      const json sigma = l.value("sigma", json());
      for (const char* which : {"least", "median", "largest"}) add(brief(number_in(sigma, which)));
    };
    for (const json& l : r["layers"]) row(l["layer"], l);
    row("all", all);
    return table(rows);
  }

  static std::string histogram_text(const json& bins) {
    constexpr int widest = 50;
    int64_t most = 1;
    for (const json& b : bins) most = std::max(most, b["weights"].get<int64_t>());
    TextRows rows;
    for (const json& b : bins) rows.push_back({brief(b["from"]) + " to " + brief(b["to"]), grouped(b["weights"])});
    std::string text = table(rows), barred;
    size_t at = 0;
    for (const json& b : bins) {
      const size_t end = text.find('\n', at);
      const auto n = b["weights"].get<int64_t>();
      barred += text.substr(at, end - at);
      if (n > 0) barred += "  " + std::string(size_t(std::max<int64_t>(1, (n * widest + most / 2) / most)), '#');
      barred += "\n";
      at = end + 1;
    }
    return barred;
  }

  static std::string settings_text(const json& r) {
    const json& s = r["next_update"];
    const bool bgd = s["rule"] == "bgd";
    TextRows rows;
    if (bgd) rows.push_back({"--rule", "bgd", "Bayesian gradient descent"});
    rows.push_back({"--epochs", brief(s["epochs"]), "passes over the new images"});
    rows.push_back({"--batch", s["batch"].dump(), "images a step"});
    if (bgd) rows.push_back({"--draws", s["draws"].dump(), "of the weights, a step"});
    for (const Option& option : find_posterior(r["model"]["kind"]).options) {
      const json& value = s[option.name];
      // Of the settings of another rule, what bgd reads too.
      if (decided_by_init(option) || (bgd && option.name != "lr" && option.name != "schedule")) continue;
      rows.push_back({bgd && option.name == "lr" ? "--eta" : option_flag(option),
                      value.is_number_float() ? brief(value)
                      : value.is_string()     ? std::string(value)
                                              : value.dump(),
                      bgd && option.name == "lr" ? "scales a step" : option.help});
    }
    return list(rows);
  }

  std::string model_;
  bool networks_ = false;
};

}  // namespace

std::unique_ptr<Command> inspect_command() { return std::make_unique<InspectCommand>(); }

}  // namespace baton
