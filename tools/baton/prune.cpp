// baton prune: the weights of the lowest signal-to-noise ratio |mean| / sigma, or of the lowest magnitude, become 0 for
// good (Graves 2011; Blundell et al. 2015; Zeno et al. 2018, section 4.1).
#include <algorithm>
#include <cmath>

#include "engine/select.h"
#include "kernels/prune.h"
#include "tools/baton/describe.h"

namespace baton {

namespace {

// From here on its posterior can be pruned; nothing more is pruned than before.
void make_prunable(Model& m) {
  m.masked = true;
  const auto network = make_network(m.network);
  for (const TensorSpec& t : network->layout().tensors())
    if (!m.arrays.has(t.name + ".mask"))
      m.arrays.tensors[t.name + ".mask"] = Tensor::of<uint8_t>(std::vector<uint8_t>(t.size, 1), t.shape);
}

// Prunes one posterior, of one network.
class Pruner {
 public:
  Pruner(Device& device, Posterior& posterior, Ranking ranking, bool by_layer)
      : device_(device), posterior_(posterior), tensors_(posterior.store().layout().tensors()), by_layer_(by_layer) {
    std::vector<float> sd(posterior.store().layout().stride());
    for (const TensorSpec& t : tensors_) {
      const std::vector<float> log_std = posterior.read_log_std(0, t);
      for (size_t i = 0; i < log_std.size(); i++) sd[t.offset + i] = float(std::exp(double(log_std[i])));
      const std::vector<uint8_t> gone = posterior.read_pruned(t);
      std::vector<uint8_t>& before = t.bias ? biases_before_ : before_;
      before.insert(before.end(), gone.begin(), gone.end());
      if (!t.bias) stretches_.push_back({int(t.offset), int(t.size)});
    }
    score_ = arena_.take<float>(before_.size());
    float* deviations = nullptr;
    if (ranking == Ranking::signal_to_noise) upload(device, deviations = arena_.take<float>(sd.size()), sd);
    prune_scores(score_, posterior.store().at("mean"), deviations, stretches_, ranking, device.stream());
    // What is pruned already is the first to be pruned: what the mask says, not what looks like it.
    std::vector<float> scores = download(device, score_, before_.size());
    for (size_t j = 0; j < scores.size(); j++)
      if (before_[j]) scores[j] = -1;
    upload(device, score_, scores);
  }

  int weights() const { return int(before_.size()); }  // without biases
  int pruned_before() const { return int(std::count(before_.begin(), before_.end(), 1)); }

  // Prunes a share of the weights: of all together, or of every tensor. Sets "left" and "tensors".
  void prune(double fraction, json& result) {
    std::vector<uint8_t> marked(before_.size(), 0);
    std::vector<double> thresholds;
    const auto mark = [&](int first, int count) {
      Arena arena;
      uint8_t* marks = arena.take<uint8_t>(size_t(count));
      const int lowest = int(std::lround(fraction * count));
      const Selection chosen = mark_lowest(device_, marks, score_ + first, count, lowest);
      const std::vector<uint8_t> these = download(device_, marks, size_t(count));
      std::copy(these.begin(), these.end(), marked.begin() + first);
      return lowest > 0 && chosen.threshold >= 0 ? double(chosen.threshold) : NAN;
    };
    if (!by_layer_) thresholds.assign(stretches_.size(), mark(0, weights()));
    for (int first = 0; const Stretch& s : stretches_) {
      if (by_layer_) thresholds.push_back(mark(first, s.count));
      first += s.count;
    }

    std::vector<uint8_t> mask;
    size_t weight = 0, bias = 0, tensor = 0;
    int all_left = 0;
    result["left"] = 0;
    result["tensors"] = json::array();
    for (const TensorSpec& t : tensors_) {
      if (t.bias) {
        for (size_t i = 0; i < t.size; i++) mask.push_back(biases_before_[bias++]);
        continue;
      }
      int left = 0;
      for (size_t i = 0; i < t.size; i++, weight++) {
        mask.push_back(marked[weight] || before_[weight]);  // by layer, one may have lost more before than its share
        left += !mask.back();
      }
      all_left += left;
      result["tensors"].push_back({{"tensor", t.name},
                                   {"weights", t.size},
                                   {"left", left},
                                   {"share_left", double(left) / double(t.size)},
                                   {"threshold", thresholds[tensor++]}});
    }
    result["left"] = all_left;
    posterior_.mask(mask);
  }

 private:
  Device& device_;
  Posterior& posterior_;
  std::vector<TensorSpec> tensors_;
  bool by_layer_;
  Arena arena_;
  std::vector<Stretch> stretches_;               // of the weights
  std::vector<uint8_t> before_, biases_before_;  // what was pruned, of the weights and of the biases
  float* score_;                                 // of the weights
};

class PruneCommand : public Command {
 public:
  PruneCommand()
      : Command("prune", "set the weights that matter least to 0 for good",
                "  baton prune --model model.safetensors --fraction 0.95 --out small.safetensors\n"
                "      leaves 5 % of the weights, those whose mean is largest in units of its own uncertainty\n"
                "  baton prune --model model.safetensors --fraction 0.95 --data digits/ --out small.safetensors\n"
                "      and tells the accuracy before and after\n"
                "  baton prune --model model.safetensors --fractions 0.5,0.75,0.9,0.95 --data digits/\n"
                "      what each share would cost; writes nothing\n") {}

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
                   "snr: lowest |mean| / sigma (the default where there is a sigma); magnitude: lowest |mean|")
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
    Device device;
    Arena arena;
    LoadedModel loaded{read_model(model_), nullptr};
    Model& model = loaded.model;
    const json described = describe_model(model);
    make_prunable(model);
    loaded.posterior = make_posterior(device, arena, model);  // a kind that cannot be pruned says so
    if (!model.uncertain() && by_ == "snr")
      throw InputError(model_ + " is a point estimate (" + model.kind + "): it has no sigma to prune by");
    const std::string by = !by_.empty() ? by_ : model.uncertain() ? "snr" : "magnitude";
    const Ranking ranking = by == "snr" ? Ranking::signal_to_noise : Ranking::magnitude;
    Pruner pruner(device, *loaded.posterior, ranking, scope_ == "layer");
    const int weights = pruner.weights(), pruned = pruner.pruned_before();
    for (double f : fractions)
      if (std::lround(f * weights) < pruned)
        throw InputError(percent(double(pruned) / weights) + " of the weights are pruned already (" + grouped(pruned) +
                         " of " + grouped(weights) + "), which counts: a fraction of " + brief(f) + " is less");

    json result{{"command", "prune"}, {"model", described}, {"by", by},
                {"scope", scope_},    {"weights", weights}, {"pruned_before", pruned}};
    OwnData data;
    if (data_.given()) {
      data = data_.load(model, true);
      result["data"] = describe_data(data);
      prediction_.describe(result, model);
    }
    const auto judge_now = [&] {
      return judge(prediction_.predict(device, loaded, data.images), data.images, model.network.classes);
    };
    if (data_.given()) result["before"] = judge_now();
    const double error = data_.given() ? 1 - result["before"]["accuracy"].get<double>() : NAN;
    const auto prune = [&](json& to, double fraction) {
      const int64_t values = model.uncertain() ? 2 : 1;
      to["fraction"] = fraction;
      pruner.prune(fraction, to);
      to["bytes_dense"] = 4 * values * weights;
      to["bytes_sparse"] = (4 * values + 4) * to["left"].get<int64_t>();  // and an index each
      if (!data_.given()) return;
      to["after"] = judge_now();
      const double now = 1 - to["after"]["accuracy"].get<double>();
      to["error_ratio"] = error > 0 ? now / error : NAN;
    };
    if (!table) {
      prune(result, fraction_);
      keep(model, *loaded.posterior);
      model.pruned = {{"fraction", fraction_}, {"by", by}, {"scope", scope_}, {"left", result["left"]}};
      save_model(out_, model);
      result["out"] = printable(out_);
      result["fingerprint"] = fingerprint(model);
      return result;
    }
    result["fractions"] = json::array();
    for (double f : fractions) {
      prune(result["fractions"].emplace_back(), f);
      loaded.posterior->load(model.arrays, model.stages() <= 1);  // the weights come back
    }
    return result;
  }

  std::string text(const json& r) const override {
    std::string t = r.contains("data") ? how_text(r) + "images      " + data_text(r["data"]) + "\n"
                                       : "model       " + model_text(r["model"]) + "\n";
    t += "pruned      the weights of the lowest " +
         std::string(r["by"] == "snr" ? "|mean| / sigma (signal-to-noise ratio" : "|mean| (magnitude") +
         (r["model"]["kind"] == "mnf" ? "; without z, which weights share)" : ")") + ", biases never;\n            " +
         (r["scope"] == "global" ? "one threshold for all layers\n" : "the same share of every layer\n");
    if (r["pruned_before"] > 0)
      t += "before      " + grouped(r["pruned_before"]) + " of the " + grouped(r["weights"]) +
           " weights were pruned already\n";
    return t + "\n" + (r.contains("fractions") ? table_text(r) : one_text(r));
  }

 private:
  static std::string table_text(const json& r) {
    TextRows rows{{"pruned", "weights left", "accuracy", "error", "error ratio"}};
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

  static std::string one_text(const json& r) {
    TextRows rows{{"tensor", "weights", "left", "share left", "threshold"}};
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
    t += "size        " + grouped(r["bytes_sparse"]) + " bytes for the weights that are left (" +
         (r["model"]["uncertain"] ? "mean, sigma" : "value") + " and a 4-byte index each), " +
         grouped(r["bytes_dense"]) + " bytes for all\n";
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
