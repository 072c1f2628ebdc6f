// baton inspect: what is in a model's file.
#include <algorithm>
#include <cmath>

#include "tools/baton/describe.h"

namespace baton {

namespace {

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
  std::vector<double> sigma;  // log10, of what is not pruned
  void add(const Belief& b) {
    for (size_t i = 0; i < b.mean.size(); i++) {
      parameters++;
      if (b.gone(i)) {
        pruned++;
        continue;
      }
      absolute += std::abs(double(b.mean[i]));
      if (!b.log_std.empty()) sigma.push_back(double(b.log_std[i]) / std::log(10.0));
    }
  }
  // kl: to the prior; NaN: there is none.
  json object(double kl) const {
    const double left = double(parameters - pruned);
    json j{{"parameters", parameters}, {"pruned", pruned}, {"mean_absolute", left > 0 ? absolute / left : NAN}};
    if (sigma.empty()) return j;
    if (!std::isnan(kl)) j["kl"] = kl, j["kl_per_parameter"] = kl / left;
    std::vector<double> sorted = sigma;
    std::sort(sorted.begin(), sorted.end());
    const double median = (sorted[sorted.size() / 2] + sorted[(sorted.size() - 1) / 2]) / 2;
    j["sigma"] = {{"least", std::pow(10, sorted.front())},
                  {"median", std::pow(10, median)},
                  {"largest", std::pow(10, sorted.back())}};
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

    double images = 0;
    for (const json& stage : m.history)
      if (const double n = number_in(stage, "images"); n > 0) images += n;
    json r{{"command", "inspect"},
           {"model", describe_model(m)},
           {"posterior", describe_posterior(m)},
           {"image", {image.channels, image.height, image.width}},
           {"normalisation", normalisation_json(m)},
           {"normalisation_in_words", describe_normalisation(m)},
           {"classes", list_classes(m)},
           {"named_classes", !m.class_names.empty()},
           {"origin", m.origin},
           {"history", m.history},
           {"images_learned", images},
           {"steps", m.step},
           {"prior", describe_prior(m)},
           {"pruned", m.pruned},
           {"precision", baton::name(m.precision)},
           {"next_update", training_json(m)},
           {"seed", m.seed},
           {"layers", json::array()}};

    const json kl = sum_by_layer(posterior->kl_names(), posterior->kl_by_name()[0]);  // empty for a kind without a KL
    const std::vector<Belief> beliefs = read_beliefs(device, *posterior);
    Sums all;
    double total = kl.empty() ? NAN : 0;
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
    const json& all = r["all_layers"];
    const bool has_kl = all.contains("kl"), has_sigma = all.contains("sigma");
    const std::string kind = r["model"]["kind"];
    json shown = r;
    shown["first_prior"] = origin_text(r["origin"]);
    shown["classes_text"] = classes_text(r);
    shown["pruned_text"] = pruned_text(r);
    std::string t =
        list(shown,
             "network|{model/architecture}; {all_layers/parameters:,} weights and biases\n"
             "posterior|{posterior}\n"
             "images|{normalisation_in_words}\n"
             "classes|{classes_text}\n"
             "first prior|{first_prior}\n" +
                 std::string(r["history"].empty()
                                 ? "learned|nothing yet\n"
                                 : "learned|{model/stages:stage}, {images_learned:,} images, {steps:step}\n") +
                 "prior now|{prior}\n"
                 "pruned|{pruned_text}\n"
                 "fingerprint|{model/fingerprint}");
    if (!r["history"].empty()) t += "\nWhat it has learned\n" + history_text(r["history"], has_kl);

    json layers = list_sums(r);
    if (all["pruned"] > 0)
      for (json& l : layers) l["share"] = number_in(l, "pruned") / number_in(l, "parameters");
    t += "\nLayers\n" +
         table(layers,
               "layer={layer}; parameters={parameters:,}; pruned={share:%}; mean |mean|={mean_absolute:g}; KL={kl:.1}; "
               "KL a weight={kl_per_parameter:g}; sigma: least={sigma/least:g}; median={sigma/median:g}; "
               "largest={sigma/largest:g}");
    if (has_kl) t += "KL: of the posterior to its prior, in nats: how far the last stage has moved it.\n";
    const char* what = kind == "cfg" ? " (of its marginal)" : " given z (the KL is a mean over 8 draws of z)";
    if (!has_sigma) t += "A point estimate has no sigma and no KL.\n";
    else
      t += std::string("sigma: the standard deviation of a weight") + (kind == "cfg" || kind == "mnf" ? what : "") +
           ".\n\nHow many weights have which sigma\n" + histogram_text(r["sigma_histogram"]);
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

  static std::string classes_text(const json& r) {
    const json& classes = r["classes"];
    if (!r["named_classes"]) return "numbers, 0 to " + std::to_string(classes.size() - 1);
    std::string names;
    for (size_t i = 0; i < classes.size() && i < 20; i++) names += (i ? ", " : "") + std::string(classes[i]);
    return classes.size() > 20 ? names + ", ... (" + std::to_string(classes.size()) + ")" : names;
  }

  static std::string origin_text(const json& origin) {
    std::string text = text_in(origin, "prior");
    if (text.empty()) text = "not told";
    if (!text_in(origin, "pretrained").empty()) text += fill(origin, " (fingerprint {pretrained})");
    if (const std::string layers = text_in(origin, "transfer"); !layers.empty() && layers != "all")
      text += "; pretrained layers: " + layers;
    return printable(text);
  }

  static std::string pruned_text(const json& r) {
    json all = r["all_layers"];
    if (all["pruned"] == 0) return "nothing";
    all["share"] = number_in(all, "pruned") / number_in(all, "parameters");
    std::string text = fill(all, "{pruned:,} of {parameters:,} weights and biases ({share:%}) are 0 for good");
    const std::string by = text_in(r, "pruned/by");
    if (!by.empty()) text += ", by " + (by == "snr" ? "signal-to-noise ratio" : printable(by));
    return text_in(r, "pruned/scope") == "layer" ? text + ", the same share of every layer" : text;
  }

  static std::string history_text(json history, bool has_kl) {
    for (size_t i = 0; i < history.size(); i++) {
      history[i]["stage"] = i + 1;
      history[i]["data"] = printable(text_in(history[i], "data"));
      if (!has_kl) history[i].erase("kl");
    }
    return table(history,
                 "stage={stage}; images={images:,}; data={data}; epochs={epochs:g}; steps={steps:,}; NLL={loss:.4}; "
                 "accuracy={accuracy:%}; KL={kl:.1}; held-out accuracy={hold_out/accuracy_after:%}") +
           "data: a hash of the images and labels. NLL: mean negative log-likelihood of an image, nats, and accuracy: "
           "on\nthe images being learned, in the last epoch." +
           (has_kl ? " KL: of the stage's posterior to its prior, nats.\n" : "\n");
  }

  static std::string histogram_text(const json& bins) {
    constexpr int64_t widest = 50;
    int64_t most = 1;
    for (const json& b : bins) most = std::max<int64_t>(most, b["weights"]);
    TextRows rows;
    for (const json& b : bins) {
      const int64_t n = b["weights"], bar = n ? std::max<int64_t>(1, (n * widest + most / 2) / most) : 0;
      rows.push_back({fill(b, "{from:g} to {to:g}"), fill(b, "{weights:,}"),
                      std::string(size_t(bar), '#') + std::string(size_t(widest - bar), ' ')});
    }
    return align_table(rows);
  }

  static std::string settings_text(const json& r) {
    const json& s = r["next_update"];
    const bool bgd = s["rule"] == "bgd";
    TextRows rows;
    const auto add = [&](const std::string& flag, const json& value, const std::string& help) {
      rows.push_back({flag, format_value(value, value.is_number_float() ? "g" : ""), help});
    };
    if (r["model"]["kind"] == "ffg")
      add("--rule", s["rule"], bgd ? "Bayesian gradient descent" : "Adam on the evidence bound");
    add("--epochs", s["epochs"], "passes over the new images");
    add("--batch", s["batch"], "images a step");
    add("--precision", r["precision"], "of the layers' products, in predictions too");
    if (bgd) add("--draws", s["draws"], "of the weights, a step");
    for (const Option& option : find_posterior(r["model"]["kind"]).options) {
      if (decided_by_init(option)) continue;
      if (!bgd || option.name == "schedule") add(option_flag(option), s[option.name], option.help);
      else if (option.name == "lr") add("--eta", s["lr"], "scales a step");  // bgd reads no other settings of ffg's
    }
    return align_list(rows);
  }

  bool networks_ = false;
};

}  // namespace

std::unique_ptr<Command> inspect_command() { return std::make_unique<InspectCommand>(); }

}  // namespace baton
