// baton prune: the weights of the lowest signal-to-noise ratio |mean| / sigma, or of the lowest magnitude, become 0 for
// good (Graves 2011; Blundell et al. 2015; Zeno et al. 2018, section 4.1).
#include <algorithm>
#include <cmath>

#include "engine/select.h"
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

// Prunes a share of the weights, of all together or of every tensor, biases never. What is pruned already counts, and
// stays. Returns "left" and "tensors".
json prune(Device& device, Posterior& posterior, bool by_snr, bool by_layer, double fraction) {
  const std::vector<TensorSpec>& tensors = posterior.store().layout().tensors();
  std::vector<float> scores;  // of the weights, tensor after tensor
  for (const TensorSpec& t : tensors) {
    if (t.bias) continue;
    const std::vector<float> mean = posterior.store().read(device, "mean", 0, t),
                             log_std = posterior.read_log_std(0, t);
    const std::vector<uint8_t> pruned = posterior.read_pruned(t);
    // What is pruned already is the first to be pruned: what the mask says, not what looks like it.
    for (size_t i = 0; i < t.size; i++)
      scores.push_back(pruned[i] ? -1 : std::abs(mean[i]) / (by_snr ? float(std::exp(double(log_std[i]))) : 1));
  }
  Arena arena;
  float* score = arena.take<float>(scores.size());
  uint8_t* marked = arena.take<uint8_t>(scores.size());
  upload(device, score, scores);

  const auto mark = [&](size_t first, size_t count) {  // returns the threshold
    const int lowest = int(std::lround(fraction * double(count)));
    const Selection chosen = mark_lowest(device, marked + first, score + first, int(count), lowest);
    return lowest > 0 && chosen.threshold >= 0 ? double(chosen.threshold) : NAN;
  };
  double threshold = by_layer ? NAN : mark(0, scores.size());
  std::vector<uint8_t> mask;  // of all tensors
  int64_t all_left = 0;
  size_t weight = 0;
  json list = json::array();
  for (const TensorSpec& t : tensors) {
    std::vector<uint8_t> pruned = posterior.read_pruned(t);
    if (!t.bias) {
      if (by_layer) threshold = mark(weight, t.size);
      const std::vector<uint8_t> marks = download(device, marked + weight, t.size);
      weight += t.size;
      for (size_t i = 0; i < t.size; i++)
        pruned[i] |= marks[i];  // by layer, one may have lost more before than its share
      const int64_t left = std::count(pruned.begin(), pruned.end(), 0);
      all_left += left;
      list.push_back({{"tensor", t.name},
                      {"weights", t.size},
                      {"left", left},
                      {"share_left", double(left) / double(t.size)},
                      {"threshold", threshold}});
    }
    mask.insert(mask.end(), pruned.begin(), pruned.end());
  }
  posterior.mask(mask);
  return {{"left", all_left}, {"tensors", list}};
}

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
    add_model(app);
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
    add_out(app, "the pruned model");
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
        throw InputError((table ? "--fractions has " : "--fraction is ") + format_value(f, "g") +
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
    int weights = 0, pruned = 0;  // without biases
    for (const TensorSpec& t : loaded.posterior->store().layout().tensors()) {
      if (t.bias) continue;
      const std::vector<uint8_t> gone = loaded.posterior->read_pruned(t);
      weights += int(t.size), pruned += int(std::count(gone.begin(), gone.end(), 1));
    }
    for (double f : fractions)
      if (std::lround(f * weights) < pruned)
        throw InputError(
            fill({{"share", double(pruned) / weights}, {"pruned", pruned}, {"weights", weights}, {"fraction", f}},
                 "{share:%} of the weights are pruned already ({pruned:,} of {weights:,}), which counts: a "
                 "fraction of {fraction:g} is less"));

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
    const auto prune_to = [&](json& to, double fraction) {
      const int64_t values = model.uncertain() ? 2 : 1;
      to["fraction"] = fraction;
      to.update(prune(device, *loaded.posterior, by == "snr", scope_ == "layer", fraction));
      to["bytes_dense"] = 4 * values * weights;
      to["bytes_sparse"] = (4 * values + 4) * to["left"].get<int64_t>();  // and an index each
      if (!data_.given()) return;
      to["after"] = judge_now();
      const double before = find_error(result["before"]);
      to["error_ratio"] = before > 0 ? find_error(to["after"]) / before : NAN;
    };
    if (table) {
      result["fractions"] = json::array();
      for (double f : fractions) {
        prune_to(result["fractions"].emplace_back(), f);
        loaded.posterior->load(model.arrays, model.stages() <= 1);  // the weights come back
      }
      return result;
    }
    prune_to(result, fraction_);
    keep(model, *loaded.posterior);
    model.pruned = {{"fraction", fraction_}, {"by", by}, {"scope", scope_}, {"left", result["left"]}};
    save_model(out_, model);
    result["out"] = printable(out_);
    result["fingerprint"] = fingerprint(model);
    return result;
  }

  std::string text(const json& r) const override {
    std::string t = "model       " + model_text(r["model"]) + "\n";
    if (r.contains("data")) t = how_text(r) + "images      " + data_text(r["data"]) + "\n";
    t += "pruned      the weights of the lowest " +
         std::string(r["by"] == "snr" ? "|mean| / sigma (signal-to-noise ratio" : "|mean| (magnitude") +
         (r["model"]["kind"] == "mnf" ? "; without z, which weights share)" : ")") + ", biases never;\n            " +
         (r["scope"] == "global" ? "one threshold for all layers\n" : "the same share of every layer\n");
    if (r["pruned_before"] > 0)
      t += fill(r, "before      {pruned_before:,} of the {weights:,} weights were pruned already\n");
    return t + "\n" + (r.contains("fractions") ? table_text(r) : one_text(r));
  }

 private:
  static double find_error(const json& judged) { return 1 - judged["accuracy"].get<double>(); }

  static std::string table_text(const json& r) {
    const double pruned = number_in(r, "pruned_before"), weights = number_in(r, "weights");
    json rows = r["fractions"];
    const json whole{
        {"fraction", pruned / weights}, {"left", weights - pruned}, {"after", r["before"]}, {"error_ratio", 1}};
    rows.insert(rows.begin(), whole);
    for (json& row : rows) row["error"] = find_error(row["after"]);
    return baton::table(rows,
                        "pruned={fraction:%}; weights left={left:,}; accuracy={after/accuracy:%}; error={error:%}; "
                        "error ratio={error_ratio:.3}") +
           "\nFirst row: the model as it is. Error ratio: error / the error of the first row. Nothing was written.\n";
  }

  static std::string one_text(const json& result) {
    json r = result, rows = r["tensors"];
    rows.push_back({{"tensor", "all weights"},
                    {"weights", r["weights"]},
                    {"left", r["left"]},
                    {"share_left", number_in(r, "left") / number_in(r, "weights")},
                    {"threshold", rows[0]["threshold"]}});
    for (json& row : rows) row["threshold"] = format_value(row["threshold"], "g");
    if (r["scope"] == "layer") rows.back()["threshold"] = "";
    r["ranked_by"] = r["by"] == "snr" ? "|mean| / sigma" : "|mean|";
    r["stored"] = r["model"]["uncertain"] ? "mean, sigma" : "value";
    std::string t = baton::table(rows,
                                 "tensor={tensor}; weights={weights:,}; left={left:,}; share left={share_left:%}; "
                                 "threshold={threshold}") +
                    fill(r, "threshold: the largest {ranked_by} that became 0\n\n");
    if (r.contains("after")) {
      r["error_before"] = find_error(r["before"]);
      r["error_after"] = find_error(r["after"]);
      t += fill(r,
                "accuracy    {before/accuracy:%} before, {after/accuracy:%} after; error {error_before:%} before, "
                "{error_after:%} after (ratio {error_ratio:.3})\n");
    }
    return t +
           fill(r,
                "size        {bytes_sparse:,} bytes for the weights that are left ({stored} and a 4-byte index each), "
                "{bytes_dense:,} bytes for all\n"
                "written     {out} (all weights, zeros too; later updates leave them 0)\n");
  }

  std::string by_, scope_ = "global";
  double fraction_ = NAN;
  std::vector<double> fractions_;
};

}  // namespace

std::unique_ptr<Command> prune_command() { return std::make_unique<PruneCommand>(); }

}  // namespace baton
