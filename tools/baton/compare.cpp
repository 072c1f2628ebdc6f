// baton compare: how far apart two models of one architecture are.
#include <algorithm>
#include <cmath>

#include "tools/baton/describe.h"

namespace baton {

namespace {

// Sums over weights, and what is made of them.
struct Distances {
  double square = 0, difference2 = 0;  // of A's means; of B's less A's
  double in_sigma = 0, log_ratio = 0, kl = 0;
  int64_t parameters = 0, both = 0, one = 0;  // of `both` sides something is left; pruned on one side alone
  bool sigma_a = false, sigma_b = false;

  void add(const Belief& a, const Belief& b) {
    sigma_a = !a.log_std.empty(), sigma_b = !b.log_std.empty();
    for (size_t i = 0; i < a.mean.size(); i++) {
      const double m = a.mean[i], away = double(b.mean[i]) - m;
      parameters++;
      square += m * m, difference2 += away * away;
      one += a.gone(i) != b.gone(i);
      if (a.gone(i) || b.gone(i)) continue;
      both++;
      if (!sigma_a) continue;
      const double e = away / std::exp(double(a.log_std[i]));
      in_sigma += std::abs(e);
      if (!sigma_b) continue;
      const double t = double(b.log_std[i]) - a.log_std[i];
      log_ratio += t;
      kl += (std::expm1(2 * t) + e * e) / 2 - t;
    }
  }
  void add(const Distances& d) {
    square += d.square, difference2 += d.difference2, in_sigma += d.in_sigma, log_ratio += d.log_ratio, kl += d.kl;
    parameters += d.parameters, both += d.both, one += d.one;
    sigma_a = d.sigma_a, sigma_b = d.sigma_b;
  }
  json object() const {
    const double relative = square > 0 ? std::sqrt(difference2 / square) : difference2 > 0 ? INFINITY : 0;
    json j{{"parameters", parameters}, {"means_relative_l2", relative}, {"pruned_in_one", one}};
    if (sigma_a) j["mean_difference_in_sigma"] = both ? in_sigma / double(both) : NAN;
    if (!sigma_a || !sigma_b) return j;
    j["sigma_ratio"] = both ? std::exp(log_ratio / double(both)) : NAN;
    j["kl"] = kl;
    return j;
  }
};

// How the two histories belong together.
json relation(const Model& a, const Model& b) {
  int shared = 0;
  while (shared < std::min(a.stages(), b.stages()) && a.history[size_t(shared)] == b.history[size_t(shared)]) shared++;
  const auto parent = [&](const Model& m) {
    return shared < m.stages() ? text_in(m.history[size_t(shared)], "parent") : std::string();
  };
  const std::string of_a = fingerprint(a), of_b = fingerprint(b);
  const auto stages = [](int n) { return format_value(n, "stage"); };
  const auto tell = [&](const char* kind, const std::string& words) {
    return json{{"kind", kind}, {"shared_stages", shared}, {"in_words", words}};
  };
  if (of_a == of_b) return tell("same", "they are the same model");
  if (parent(b) == of_a)
    return tell("descendant", "the other goes on from the model itself: " + stages(b.stages() - shared) + " more");
  if (parent(a) == of_b)
    return tell("ancestor", "the model goes on from the other itself: " + stages(a.stages() - shared) + " more");
  if (!parent(a).empty() && parent(a) == parent(b))
    return tell("siblings", "both go on from one model (fingerprint " + printable(parent(a)) + "), which had learned " +
                                stages(shared));
  if (shared > 0) return tell("shared stages", "both have learned the same first " + stages(shared));
  if (a.origin == b.origin && a.seed == b.seed && a.stages() + b.stages() == 0)
    return tell("same beginning", "neither has learned anything; they began alike (prior, pretrained weights, seed)");
  return tell("none", "no stage in common");
}

// Everything of a model that a person chose, by name.
json collect_settings(const Model& m) {
  json s = training_json(m);
  s.update({{"seed", m.seed},
            {"precision", name(m.precision)},
            {"posterior", describe_posterior(m)},
            {"normalisation", describe_normalisation(m)},
            {"class_names", m.class_names},
            {"pruned", m.pruned},
            {"first_prior", text_in(m.origin, "prior")},
            {"pretrained", text_in(m.origin, "pretrained")}});
  return s;
}

class CompareCommand : public Command {
 public:
  CompareCommand()
      : Command("compare", "how far apart two models of one architecture are",
                "  baton compare --model model.safetensors --other next.safetensors\n"
                "      how far an update has moved the weights, by layer, in units of their uncertainty\n"
                "  baton compare --model ffg.safetensors --other pruned.safetensors --data photos/\n"
                "      and on which share of images they predict the same\n") {}

  void add_options(CLI::App& app) override {
    app.add_option("--model", model_, "a model, A")->required();
    app.add_option("--other", other_, "another of the same architecture, B; the kinds of posterior may differ")
        ->required();
    data_.add_to(app, "images to compare the predictions on, with or without labels", false);
    prediction_.add_to(app);
  }

  json run() override {
    Device device;
    Arena arena;
    const LoadedModel loaded_a = load_model(device, arena, model_), loaded_b = load_model(device, arena, other_);
    const Model &a = loaded_a.model, &b = loaded_b.model;
    if (a.network.description() != b.network.description())
      throw InputError(model_ + " and " + other_ + " cannot be compared: one is " + a.network.description() +
                       ", the other " + b.network.description());
    OwnData data;
    if (data_.given()) {
      if (!a.class_names.empty() && !b.class_names.empty() && a.class_names != b.class_names)
        throw InputError("the classes of " + model_ + " and " + other_ +
                         " have other names or another order: predictions cannot be compared");
      data = data_.load(a.class_names.empty() ? b : a, false);
    }
    json r{{"command", "compare"},      {"model", describe_model(a)}, {"other", describe_model(b)},
           {"history", relation(a, b)}, {"settings", json::array()},  {"layers", json::array()}};
    const json of_a = collect_settings(a), of_b = collect_settings(b);
    json names = of_a;
    names.update(of_b);
    for (const auto& [name, ignored] : names.items()) {
      const json value_a = of_a.value(name, json()), value_b = of_b.value(name, json());
      if (value_a != value_b) r["settings"].push_back({{"setting", name}, {"model", value_a}, {"other", value_b}});
    }

    const std::vector<Belief> beliefs_a = read_beliefs(device, *loaded_a.posterior),
                              beliefs_b = read_beliefs(device, *loaded_b.posterior);
    Distances all;
    for (const std::string& layer : list_layers(loaded_a.posterior->store().layout())) {
      Distances of_layer;
      for (size_t i = 0; i < beliefs_a.size(); i++)
        if (layer_name(beliefs_a[i].tensor.name) == layer) of_layer.add(beliefs_a[i], beliefs_b[i]);
      json row{{"layer", layer}};
      row.update(of_layer.object());
      r["layers"].push_back(row);
      all.add(of_layer);
    }
    r["all_layers"] = all.object();
    if (data_.given()) add_predictions(r, device, loaded_a, loaded_b, data);
    return r;
  }

  std::string text(const json& r) const override {
    std::string t = "A           " + model_text(r["model"]) + "\nB           " + model_text(r["other"]) +
                    fill(r, "\nhistory     {history/in_words}\n");
    TextRows rows{{"Settings that differ", "A", "B"}};
    std::string long_ones;  // whole sentences would tear the table apart
    for (const json& s : r["settings"]) {
      const std::string of_a = shown(s["model"]), of_b = shown(s["other"]), key = in_words(s["setting"]);
      if (of_a.size() + of_b.size() <= 60) rows.push_back({key, of_a, of_b});
      else long_ones += key + "\n  A: " + of_a + "\n  B: " + of_b + "\n";
    }
    if (r["settings"].empty()) t += "settings    the same\n";
    else t += "\n" + (rows.size() > 1 ? align_table(rows) : rows[0][0] + "\n") + long_ones;
    t += "\n" + layers_text(r);
    return r.contains("predictions") ? t + "\n" + predictions_text(r) : t;
  }

 private:
  void add_predictions(json& r, Device& device, const LoadedModel& a, const LoadedModel& b, const OwnData& data) const {
    const Predictions of_a = prediction_.predict(device, a, data.images),
                      of_b = prediction_.predict(device, b, data.images);
    const int classes = a.model.network.classes;
    const std::vector<int> chosen_a = choose_classes(of_a, classes), chosen_b = choose_classes(of_b, classes);
    double agree = 0, variation = 0;
    for (size_t i = 0; i < chosen_a.size(); i++) agree += chosen_a[i] == chosen_b[i];
    for (size_t i = 0; i < of_a.probability.size(); i++)
      variation += std::abs(double(of_a.probability[i]) - of_b.probability[i]) / 2;
    r["data"] = describe_data(data);
    prediction_.describe(r, a.model);
    r["samples"] = {prediction_.samples(a.model), prediction_.samples(b.model)};
    r["precision"] = {baton::name(prediction_.precision(a.model)), baton::name(prediction_.precision(b.model))};
    json p{{"agree", agree / data.images.count}, {"total_variation", variation / data.images.count}};
    if (data.labelled) {
      p["model"] = judge(of_a, data.images, classes);
      p["other"] = judge(of_b, data.images, classes);
    }
    r["predictions"] = p;
  }

  static std::string shown(const json& value) {
    if (value.empty() || value == "") return "-";
    if (value.is_number_float()) return format_value(value, "g");
    if (value.is_string()) return printable(value);
    if (value.is_object() && value.contains("fraction"))  // "pruned"
      return printable(fill(value, "{fraction:%} by {by}, {scope}"));
    return printable(one_line(value));
  }

  static std::string layers_text(const json& r) {
    const json& all = r["all_layers"];
    const bool in_sigma = all.contains("mean_difference_in_sigma"), both = all.contains("kl");
    json rows = list_sums(r);
    if (all["pruned_in_one"] == 0)
      for (json& row : rows) row.erase("pruned_in_one");
    std::string t =
        table(rows,
              "layer={layer}; parameters={parameters:,}; distance of means={means_relative_l2:g}; "
              "in sigmas of A={mean_difference_in_sigma:g}; sigma B / A={sigma_ratio:g}; KL of B to A={kl:.1}; "
              "pruned in one={pruned_in_one:,}");
    t += "distance of means: |B - A| / |A|, Euclidean, of all weights and biases of a layer.\n";
    if (in_sigma) t += "in sigmas of A: |B - A| of the means over A's standard deviation, the weights' average.\n";
    else t += "A is a point estimate: it has no standard deviations to measure the differences by.\n";
    if (both)
      t += "sigma B / A: ratio of the standard deviations, geometric mean. KL of B to A: in nats, as of independent "
           "Gaussians.\n";
    for (const auto& [name, side] : {std::pair<std::string, const char*>("A", "model"), {"B", "other"}}) {
      if (r[side]["kind"] == "mnf")
        t += name + " is mnf: w given z, with z at its flow's mean, stands for the weights.\n";
      if (r[side]["kind"] == "cfg") t += name + " is cfg: marginal standard deviations, without the covariances.\n";
    }
    if (!r["other"]["uncertain"]) t += "B is a point estimate: it has no standard deviations.\n";
    if (all["pruned_in_one"] > 0)
      t += "Weights that are pruned in one of the two count in the distance of means alone.\n";
    return t;
  }

  static std::string predictions_text(const json& r) {
    const json &of_a = r["samples"][0], &of_b = r["samples"][1];
    const auto draws = [](const json& n) {
      return n == 0 ? "one pass at the mean" : "an average over " + format_value(n, "draw") + " of the weights";
    };
    std::string rows =
        "the same class|{agree:%} of images\n"
        "total variation|{total_variation:.4} (mean; 0: the same probabilities, 1: disjoint)\n";
    if (r["predictions"].contains("model"))
      rows +=
          "accuracy of A|{model/accuracy:%}, NLL {model/nll:.4} nats an image\n"
          "accuracy of B|{other/accuracy:%}, NLL {other/nll:.4} nats an image\n";
    return "Predictions of " + data_text(r["data"]) + ": " + draws(of_a) +
           (of_a == of_b ? "" : " (A), " + draws(of_b) + " (B)") + "\n" + list(r["predictions"], rows);
  }

  std::string other_;
};

}  // namespace

std::unique_ptr<Command> compare_command() { return std::make_unique<CompareCommand>(); }

}  // namespace baton
