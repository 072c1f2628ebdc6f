// baton inspect: what is in a model's file.
#include <algorithm>
#include <cmath>

#include "tools/baton/layers.h"
#include "tools/baton/predictions.h"

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
  json object(double kl) const {
    const double left = double(parameters - pruned);
    json j{{"parameters", parameters}, {"pruned", pruned}, {"mean_absolute", left > 0 ? absolute / left : NAN}};
    if (sigma.empty()) return j;
    const auto [least, largest] = std::minmax_element(sigma.begin(), sigma.end());
    j["kl"] = kl;
    j["kl_per_parameter"] = kl / left;
    j["sigma"] = {
        {"least", std::pow(10, *least)}, {"median", std::pow(10, median(sigma))}, {"largest", std::pow(10, *largest)}};
    return j;
  }
};

class InspectCommand : public Command {
 public:
  const char* name() const override { return "inspect"; }
  const char* summary() const override { return "what a model is, what it has learned and how sure it is"; }
  const char* examples() const override {
    return "  baton inspect --model model.safetensors\n"
           "      architecture, history, settings, and the uncertainty of every layer\n"
           "  baton inspect --model model.safetensors --json\n"
           "      the same for a program\n";
  }
  void add_options(CLI::App& app) override { app.add_option("--model", model_, "the model")->required(); }

  json run() override {
    const Model m = load_model(model_);
    Device device;
    Arena arena;
    const auto posterior = posterior_of(device, arena, m);
    const Architecture& a = m.architecture;

    json r;
    r["command"] = "inspect";
    r["model"] = description_of(m);
    r["posterior"] = in_words(m.posterior);
    r["image"] = {a.channels, a.height, a.width};
    r["normalisation"] = to_json(m.normalisation, a.channels);
    r["normalisation_in_words"] = in_words(m.normalisation, a.channels);
    r["classes"] = class_names(m);
    r["named_classes"] = !m.class_names.empty();
    r["origin"] = m.origin;
    r["history"] = m.history;
    double images = 0;
    for (const json& stage : m.history)
      if (const double n = number_in(stage, "images"); n > 0) images += n;
    r["images_learned"] = images;
    r["steps"] = m.step;
    r["prior"] = prior_in_words(m);
    r["pruned"] = m.pruned;
    r["next_update"] = training_json(m);
    r["seed"] = m.seed;

    std::map<std::string, double> kl;
    const std::vector<double> by_name = posterior->kl_by_name()[0];
    for (size_t i = 0; i < by_name.size(); i++) kl[layer_of(posterior->kl_names()[i])] += by_name[i];
    const std::vector<Belief> beliefs = beliefs_of(device, *posterior);
    Sums all;
    double total = 0;
    r["layers"] = json::array();
    for (const std::string& layer : layers_of(posterior->store().layout())) {
      Sums sums;
      for (const Belief& b : beliefs)
        if (layer_of(b.tensor.name) == layer) sums.add(b), all.add(b);
      json row{{"layer", layer}};
      row.update(sums.object(kl[layer]));
      r["layers"].push_back(row);
      total += kl[layer];
    }
    r["all_layers"] = all.object(total);
    if (!all.sigma.empty()) r["sigma_histogram"] = histogram(all.sigma);
    return r;
  }

  std::string text(const json& r) const override {
    const json &model = r["model"], &all = r["all_layers"];
    const bool gaussian = all.contains("sigma");
    std::vector<std::string> classes = r["classes"].get<std::vector<std::string>>();
    std::string names;
    for (size_t i = 0; i < classes.size() && i < 20; i++) names += (i ? ", " : "") + classes[i];
    if (classes.size() > 20) names += ", ... (" + std::to_string(classes.size()) + ")";
    std::string t;
    const auto line = [&](const char* what, const std::string& value) {
      t += what + std::string(14 - std::min<size_t>(13, std::string(what).size()), ' ') + value + "\n";
    };
    line("network",
         model["architecture"].get<std::string>() + "; " + grouped(all["parameters"]) + " weights and biases");
    line("posterior", r["posterior"]);
    line("images", r["normalisation_in_words"]);
    line("classes", r["named_classes"] ? names : "numbers, 0 to " + std::to_string(classes.size() - 1));
    line("first prior", origin_text(r["origin"]));
    line("learned", model["stages"] == 0 ? "nothing yet"
                                         : plural(model["stages"], "stage") + ", " + counted(r["images_learned"]) +
                                               " images, " + plural(r["steps"], "step"));
    line("prior now", r["prior"]);
    line("pruned", pruned_text(r));
    line("fingerprint", model["fingerprint"]);

    if (!r["history"].empty()) t += "\nWhat it has learned\n" + history_text(r["history"], gaussian);

    t += "\nLayers\n" + layers_text(r, gaussian);
    if (gaussian) {
      t += "KL: of the posterior to its prior, in nats: how far the last stage has moved it. sigma: the standard\n"
           "deviation of a weight" +
           std::string(model["family"] == "cfg"   ? " (of its marginal)"
                       : model["family"] == "mnf" ? " given z (the KL is a mean over 8 draws of z)"
                                                  : "") +
           ".\n\nHow many weights have which sigma\n" + histogram_text(r["sigma_histogram"]);
    } else {
      t += "A point estimate has no sigma and no KL.\n";
    }
    return t + "\nSettings of the next update (baton update takes others)\n" + settings_text(r, gaussian);
  }

 private:
  // What the posterior answers to: the KL's other side.
  static std::string prior_in_words(const Model& m) {
    if (m.posterior.family == Family::point) return "none (a point estimate)";
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

  static std::string history_text(const json& history, bool gaussian) {
    std::vector<std::vector<std::string>> rows{{"stage", "images", "data", "epochs", "steps", "NLL", "accuracy"}};
    if (gaussian) rows[0].push_back("KL");
    bool held_out = false;
    for (const json& stage : history) held_out = held_out || stage.contains("hold_out");
    if (held_out) rows[0].push_back("held-out accuracy");
    for (const json& stage : history) {
      rows.push_back({std::to_string(rows.size()), counted(number_in(stage, "images")),
                      printable(text_in(stage, "data")), brief(number_in(stage, "epochs")),
                      counted(number_in(stage, "steps")), decimals(number_in(stage, "loss"), 4),
                      percent(number_in(stage, "accuracy"))});
      if (gaussian) rows.back().push_back(decimals(number_in(stage, "kl"), 1));
      if (held_out)
        rows.back().push_back(
            percent(number_in(stage.contains("hold_out") ? stage["hold_out"] : json(), "accuracy_after")));
    }
    return table(rows) +
           "data: a hash of the images and labels. NLL: mean negative log-likelihood of an image, nats, and accuracy: "
           "on\nthe images being learned, in the last epoch." +
           (gaussian ? " KL: of the stage's posterior to its prior, nats.\n" : "\n");
  }

  static std::string layers_text(const json& r, bool gaussian) {
    const bool pruned = r["all_layers"]["pruned"] > 0;
    std::vector<std::vector<std::string>> rows{{"layer", "parameters"}};
    if (pruned) rows[0].push_back("pruned");
    rows[0].push_back("mean |mean|");
    if (gaussian)
      for (const char* heading : {"KL", "KL a weight", "sigma: least", "median", "largest"}) rows[0].push_back(heading);
    const auto row = [&](const std::string& name, const json& l) {
      rows.push_back({name, grouped(l["parameters"])});
      if (pruned) rows.back().push_back(percent(l["pruned"].get<double>() / l["parameters"].get<double>()));
      rows.back().push_back(brief(number_in(l, "mean_absolute")));
      if (!gaussian) return;
      rows.back().push_back(decimals(number_in(l, "kl"), 1));
      rows.back().push_back(brief(number_in(l, "kl_per_parameter")));
      const json sigma = l.contains("sigma") ? l["sigma"] : json();
      for (const char* which : {"least", "median", "largest"}) rows.back().push_back(brief(number_in(sigma, which)));
    };
    for (const json& l : r["layers"]) row(l["layer"], l);
    row("all", r["all_layers"]);
    return table(rows);
  }

  static std::string histogram_text(const json& bins) {
    constexpr int widest = 50;
    int64_t most = 1;
    for (const json& b : bins) most = std::max(most, b["weights"].get<int64_t>());
    std::vector<std::vector<std::string>> rows;
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

  static std::string settings_text(const json& r, bool gaussian) {
    const json& s = r["next_update"];
    std::vector<std::vector<std::string>> rows;
    const auto add = [&](const char* option, const std::string& value, const std::string& meaning) {
      rows.push_back({option, value, meaning});
    };
    const bool descent = s["rule"] == "bgd";
    add("--rule", s["rule"], descent ? "Bayesian gradient descent" : "Adam on the evidence bound");
    add("--epochs", brief(s["epochs"]), "passes over the new images");
    add("--batch", std::to_string(s["batch"].get<int>()), "images a step");
    if (descent) {
      add("--eta", brief(s["lr"]), "scales a step");
      add("--draws", std::to_string(s["draws"].get<int>()), "of the weights, a step");
    } else {
      add("--lr", brief(s["lr"]), "Adam's step size of the means");
      add("--schedule", s["schedule"], "of the step sizes in a stage");
    }
    if (gaussian && !descent) {
      add("--lr-scale", brief(s["lr_scale"]), "the same of ln sigma");
      add("--scale-rule", s["scale_rule"], "how sigma moves");
      add("--beta", brief(s["beta"]), "weight of the KL in mean NLL + beta / images KL");
      add("--warmup-epochs", brief(s["warmup_epochs"]), "in which that weight grows to beta");
    }
    // The words behind the values, left-aligned.
    size_t option = 0, value = 0;
    for (const auto& row : rows) option = std::max(option, row[0].size()), value = std::max(value, row[1].size());
    std::string text;
    for (const auto& row : rows)
      text += row[0] + std::string(option + 2 - row[0].size(), ' ') + row[1] +
              std::string(value + 2 - row[1].size(), ' ') + row[2] + "\n";
    return text;
  }

  std::string model_;
};

}  // namespace

std::unique_ptr<Command> inspect_command() { return std::make_unique<InspectCommand>(); }

}  // namespace baton
