// baton prune: the weights of the lowest signal-to-noise ratio |mean| / sigma, or of the lowest magnitude, become 0 for
// good (Graves 2011; Blundell et al. 2015; Zeno et al. 2018, section 4.1).
#include <algorithm>
#include <cmath>

#include "engine/select.h"
#include "kernels/prune.h"
#include "tools/baton/layers.h"
#include "tools/baton/predictions.h"

namespace baton {

namespace {

struct Tensors {
  std::vector<TensorSpec> all;
  std::vector<Stretch> weights;  // without biases
  int count = 0;                 // of weights
};

Tensors tensors_of(const ParameterLayout& layout) {
  Tensors t{layout.tensors(), {}, 0};
  for (const TensorSpec& tensor : t.all)
    if (!tensor.bias) t.weights.push_back({int(tensor.offset), int(tensor.size)}), t.count += int(tensor.size);
  return t;
}

// The model with a posterior that can be pruned, nothing more pruned than before.
Model with_masks(const Model& model) {
  Model m = model;
  m.posterior.masked = true;
  const auto network = m.architecture.network()();
  for (const TensorSpec& t : network->layout().tensors())
    if (!m.arrays.has(t.name + ".mask"))
      m.arrays.tensors[t.name + ".mask"] = Tensor::of<uint8_t>(std::vector<uint8_t>(t.size, 1), t.shape);
  return m;
}

struct Pruning {
  double fraction;
  Ranking ranking;
  bool by_layer;
};

struct Result {
  Model model;
  int left = 0, already = 0;  // weights that are left; that were pruned before
  json tensors = json::array();
};

const char* name_of(Ranking r) { return r == Ranking::signal_to_noise ? "snr" : "magnitude"; }

Result prune(Device& device, const Model& model, const Pruning& how) {
  Result result{with_masks(model)};
  Arena arena;
  const auto posterior = posterior_of(device, arena, result.model);
  const ParameterStore& store = posterior->store();
  const size_t stride = store.layout().stride();
  const Tensors tensors = tensors_of(store.layout());

  float* sd = nullptr;
  if (posterior->family() != Family::point) {
    std::vector<float> values = download(device, store.at("log_std"), stride);
    for (float& x : values) x = float(std::exp(double(x)));
    sd = arena.take<float>(stride);
    upload(device, sd, values);
  }
  float* score = arena.take<float>(tensors.count);
  prune_scores(score, store.at("mean"), sd, tensors.weights, how.ranking, device.stream());
  // What is pruned already is the first to be pruned: what the mask says, not what looks like it.
  std::vector<float> scores = download(device, score, size_t(tensors.count));
  std::vector<uint8_t> before;
  for (const TensorSpec& t : tensors.all)
    if (!t.bias)
      for (uint8_t gone : pruned_of(device, *posterior, t)) before.push_back(gone);
  for (size_t j = 0; j < scores.size(); j++)
    if (before[j]) scores[j] = -1, result.already++;
  upload(device, score, scores);

  std::vector<uint8_t> marked(scores.size(), 0);
  std::vector<double> thresholds;
  const auto mark = [&](int first, int count) {
    uint8_t* marks = arena.take<uint8_t>(size_t(count));
    const int lowest = int(std::lround(how.fraction * count));
    const Selection chosen = mark_lowest(device, marks, score + first, count, lowest);
    const std::vector<uint8_t> these = download(device, marks, size_t(count));
    std::copy(these.begin(), these.end(), marked.begin() + first);
    return lowest > 0 && chosen.threshold >= 0 ? double(chosen.threshold) : NAN;
  };
  if (how.by_layer) {
    int first = 0;
    for (const Stretch& s : tensors.weights) thresholds.push_back(mark(first, s.count)), first += s.count;
  } else {
    thresholds.assign(tensors.weights.size(), mark(0, tensors.count));
  }

  std::vector<uint8_t> mask;
  size_t j = 0, n = 0;
  for (const TensorSpec& t : tensors.all) {
    if (t.bias) {
      for (uint8_t gone : pruned_of(device, *posterior, t)) mask.push_back(gone);
      continue;
    }
    int left = 0;
    for (size_t i = 0; i < t.size; i++, j++) {
      mask.push_back(marked[j] || before[j]);  // by layer a layer may have lost more before than its share
      left += !mask.back();
    }
    result.left += left;
    result.tensors.push_back({{"tensor", t.name},
                              {"weights", t.size},
                              {"left", left},
                              {"share_left", double(left) / double(t.size)},
                              {"threshold", thresholds[n++]}});
  }
  posterior->mask(mask);
  keep(result.model, *posterior);
  result.model.pruned = {{"fraction", how.fraction},
                         {"by", name_of(how.ranking)},
                         {"scope", how.by_layer ? "layer" : "global"},
                         {"left", result.left}};
  return result;
}

class PruneCommand : public Command {
 public:
  const char* name() const override { return "prune"; }
  const char* summary() const override { return "set the weights that matter least to 0 for good"; }
  const char* examples() const override {
    return "  baton prune --model model.safetensors --fraction 0.95 --out small.safetensors\n"
           "      leaves 5 % of the weights, those whose mean is largest in units of its own uncertainty\n"
           "  baton prune --model model.safetensors --fraction 0.95 --data digits/ --out small.safetensors\n"
           "      and tells the accuracy before and after\n"
           "  baton prune --model model.safetensors --fractions 0.5,0.75,0.9,0.95 --data digits/\n"
           "      what each share would cost; writes nothing\n";
  }
  void add_options(CLI::App& app) override {
    app.add_option("--model", model_, "the model to prune")->required();
    auto* one = app.add_option("--fraction", fraction_,
                               "share of all weights to be 0, from 0 to 1; what is pruned already counts. Biases stay");
    auto* many = app.add_option("--fractions", fractions_,
                                "several, as 0.5,0.75,0.9,0.95: a table of what each costs on --data; nothing is "
                                "written")
                     ->delimiter(',');
    one->excludes(many);
    app.add_option("--by", by_,
                   "snr: lowest |mean| / sigma (where there is a sigma, the default); magnitude: lowest |mean| (ft's)")
        ->check(CLI::IsMember({"snr", "magnitude"}));
    app.add_option("--scope", scope_,
                   "global: one threshold for the whole network; layer: the same share of every weight tensor")
        ->check(CLI::IsMember({"global", "layer"}))
        ->capture_default_str();
    data_.add_to(app, "labelled images to measure the accuracy on, before and after", false);
    prediction_.add_to(app);
    app.add_option("--out", out_, "the pruned model");
    app.add_flag("--overwrite", overwrite_, "write over --out if it is there");
  }

  json run() override {
    const bool table = !fractions_.empty();
    if (!table && std::isnan(fraction_)) throw InputError("baton prune needs --fraction (or --fractions)");
    if (table && !out_.empty()) throw InputError("--fractions writes nothing: --out goes with --fraction");
    if (table && !data_.given()) throw InputError("--fractions needs --data, to measure what each share costs");
    if (!table && out_.empty()) throw InputError("--fraction needs --out, the file of the pruned model");
    const std::vector<double> fractions = table ? fractions_ : std::vector<double>{fraction_};
    for (double f : fractions)
      if (!(f >= 0 && f <= 1))
        throw InputError((table ? "--fractions has " : "--fraction is ") + brief(f) +
                         "; expected a share of the weights from 0 to 1");
    check_free(out_, overwrite_);
    const Model model = load_model(model_);
    Device device;
    {
      Arena arena;  // a family that cannot be pruned says so
      posterior_of(device, arena, with_masks(model));
    }
    const bool point = model.posterior.family == Family::point;
    if (point && by_ == "snr") throw InputError(model_ + " is a point estimate (ft): it has no sigma to prune by");
    Pruning how{0, point || by_ == "magnitude" ? Ranking::magnitude : Ranking::signal_to_noise, scope_ == "layer"};
    const int weights = tensors_of(model.architecture.network()()->layout()).count,
              pruned = pruned_before(device, model);
    for (double f : fractions)
      if (std::lround(f * weights) < pruned)
        throw InputError(percent(double(pruned) / weights) + " of the weights are pruned already (" + grouped(pruned) +
                         " of " + grouped(weights) + "), which counts: a fraction of " + brief(f) + " is less");

    json result;
    result["command"] = "prune";
    result["model"] = description_of(model);
    result["by"] = name_of(how.ranking);
    result["scope"] = scope_;
    result["weights"] = weights;
    result["pruned_before"] = pruned;
    OwnData data;
    double error = NAN;
    if (data_.given()) {
      data = data_.load(model, true);
      result["data"] = description_of(data);
      result["samples"] = prediction_.samples(model);
      result["seed"] = prediction_.seed();
      result["before"] = judge(device, model, data);
      error = 1 - result["before"]["accuracy"].get<double>();
    }
    const auto add = [&](json& to, const Result& r, double fraction) {
      const int values = point ? 1 : 2;
      to["fraction"] = fraction;
      to["left"] = r.left;
      to["tensors"] = r.tensors;
      to["bytes_dense"] = 4 * values * int64_t(weights);
      to["bytes_sparse"] = (4 * values + 4) * int64_t(r.left);  // and an index each
      if (!data_.given()) return;
      to["after"] = judge(device, r.model, data);
      const double now = 1 - to["after"]["accuracy"].get<double>();
      to["error_ratio"] = error > 0 ? now / error : NAN;
    };
    if (table) result["fractions"] = json::array();
    for (double f : fractions) {
      how.fraction = f;
      const Result r = prune(device, model, how);
      if (table) {
        json row;
        add(row, r, f);
        result["fractions"].push_back(row);
        continue;
      }
      add(result, r, f);
      save_model(out_, r.model);
      result["out"] = printable(out_);
      result["fingerprint"] = fingerprint(r.model);
    }
    return result;
  }

  std::string text(const json& r) const override {
    std::string t = r.contains("data") ? how_text(r) + "images      " + data_text(r["data"]) + "\n"
                                       : "model       " + model_text(r["model"]) + "\n";
    t += "pruned      the weights of the lowest " +
         std::string(r["by"] == "snr" ? "|mean| / sigma (signal-to-noise ratio" : "|mean| (magnitude") +
         (r["model"]["family"] == "mnf" ? "; without z, which weights share)" : ")") + ", biases never;\n            " +
         (r["scope"] == "global" ? "one threshold for all layers\n" : "the same share of every layer\n");
    if (r["pruned_before"] > 0)
      t += "before      " + grouped(r["pruned_before"]) + " of the " + grouped(r["weights"]) +
           " weights were pruned already\n";
    return t + "\n" + (r.contains("fractions") ? text_of_table(r) : text_of_one(r));
  }

 private:
  json judge(Device& device, const Model& model, const OwnData& data) const {
    return judged(predict_images(prediction_, device, model, data.images), data.images, model.architecture.classes);
  }

  static int pruned_before(Device& device, const Model& model) {
    if (!model.posterior.masked) return 0;
    Arena arena;
    const auto posterior = posterior_of(device, arena, model);
    int pruned = 0;
    for (const TensorSpec& t : posterior->store().layout().tensors()) {
      if (t.bias) continue;
      const std::vector<uint8_t> gone = pruned_of(device, *posterior, t);
      pruned += int(std::count(gone.begin(), gone.end(), 1));
    }
    return pruned;
  }

  static std::string text_of_table(const json& r) {
    std::vector<std::vector<std::string>> rows{{"pruned", "weights left", "accuracy", "error", "error ratio"}};
    const auto row = [&](double fraction, int64_t left, const json& m, double ratio) {
      const double accuracy = m["accuracy"];
      rows.push_back({percent(fraction), grouped(left), percent(accuracy), percent(1 - accuracy), decimals(ratio, 3)});
    };
    const int64_t weights = r["weights"], left = weights - r["pruned_before"].get<int64_t>();
    row(1 - double(left) / double(weights), left, r["before"], 1);
    for (const json& f : r["fractions"]) row(f["fraction"], f["left"], f["after"], f["error_ratio"]);
    return table(rows) +
           "\nFirst row: the model as it is. Error ratio: error / the error of the first row. Nothing was "
           "written.\n";
  }

  static std::string text_of_one(const json& r) {
    std::vector<std::vector<std::string>> rows{{"tensor", "weights", "left", "share left", "threshold"}};
    const bool by_layer = r["scope"] == "layer";
    for (const json& l : r["tensors"])
      rows.push_back(
          {l["tensor"], grouped(l["weights"]), grouped(l["left"]), percent(l["share_left"]), brief(l["threshold"])});
    const double weights = r["weights"], left = r["left"];
    rows.push_back({"all weights", counted(weights), counted(left), percent(left / weights),
                    by_layer ? "" : brief(r["tensors"][0]["threshold"])});
    std::string t = table(rows) + "threshold: the largest " + (r["by"] == "snr" ? "|mean| / sigma" : "|mean|") +
                    " that became 0\n\n";
    if (r.contains("after")) {
      const json &before = r["before"], &after = r["after"];
      t += "accuracy    " + percent(before["accuracy"]) + " before, " + percent(after["accuracy"]) + " after; error " +
           percent(1 - before["accuracy"].get<double>()) + " before, " + percent(1 - after["accuracy"].get<double>()) +
           " after (ratio " + decimals(r["error_ratio"], 3) + ")\n";
    }
    const bool point = r["model"]["family"] == "ft";
    t += "size        " + grouped(r["bytes_sparse"]) + " bytes for the weights that are left (" +
         (point ? "value" : "mean, sigma") + " and a 4-byte index each), " + grouped(r["bytes_dense"]) +
         " bytes for all\n";
    t += "written     " + r["out"].get<std::string>() + " (all weights, zeros too; later updates leave them 0)\n";
    return t;
  }

  std::string model_, out_, by_, scope_ = "global";
  double fraction_ = NAN;
  std::vector<double> fractions_;
  bool overwrite_ = false;
  DataArguments data_;
  PredictionArguments prediction_;
};

}  // namespace

std::unique_ptr<Command> prune_command() { return std::make_unique<PruneCommand>(); }

}  // namespace baton
