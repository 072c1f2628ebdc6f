// Bayesian gradient descent on MNIST (Zeno et al. 2018, tables 1 and 2): networks of two hidden layers learn the first
// 50,000 training images by BGD, by SGD and by Bayes by Backprop; then they are pruned, posteriors by their
// signal-to-noise ratio and by magnitude, point estimates by magnitude.
#include <cmath>
#include <numeric>

#include "bench/common/program.h"
#include "engine/io/program.h"

using namespace baton;

namespace {

Preset make_preset(bool paper) {
  Preset p;
  p.batch = 128;
  p.samples = 10;
  p.inference = "sampled";
  p.train_limit = 50000;  // the paper's split: the last 10,000 training images are for validation
  p.pruned = "0.5,0.75,0.9,0.95,0.98";
  p.methods = baseline_methods({"bgd", "sgd", "adam", "bbb", "bbb_mixture"});
  find_method(p, "sgd").settings = {{"lr", 0.05}, {"momentum", 0.9}};
  if (paper) {
    p.epochs = 600;
    p.measure_every = 10;
  } else {
    // So few epochs leave sigma at its start, where the paper's 0.05 is mostly noise. This is nearly gradient descent
    // on the mean; pruning by signal-to-noise wants the other end (--widths 1200 --sigma 0.08 --eta 1 --batch 48).
    p.epochs = 4;
    p.measure_every = 2;
    set_sigma(p, 0.01);
    find_method(p, "bgd").settings["eta"] = 36;
    find_method(p, "sgd").settings["lr"] = 0.1;
  }
  return p;
}

// The authors' own values for these widths; between and beyond them their nearest.
double choose_sigma(int width) { return width < 1000 ? 0.05 : width < 1600 ? 0.04 : 0.015; }

std::string make_label(const Method& method, uint64_t width) {
  return (method.name == "bbb_mixture" ? "BBB mixture" : upper(method.name)) + " 2x" + std::to_string(width);
}

std::string sentence_about(const json& result, const std::vector<uint64_t>& widths) {
  std::string sentence;
  for (uint64_t w : widths) {
    const std::string net = " 2x" + std::to_string(w);
    const double bgd = final_accuracy(result, "BGD" + net), sgd = final_accuracy(result, "SGD" + net);
    if (!std::isfinite(bgd)) continue;
    sentence += format_text("With 2x%d units BGD ends at %.2f %% test error", int(w), 100 * (1 - bgd));
    if (std::isfinite(sgd)) sentence += format_text(", SGD after as many epochs at %.2f %%", 100 * (1 - sgd));
    sentence += ". ";
  }
  for (const json& run : result["runs"]) {
    if (!run.contains("pruning")) continue;
    for (const json& p : run["pruning"]["results"])
      if (std::abs(double(p["fraction"]) - 0.95) < 1e-9)
        sentence +=
            format_text("\n%-16s seed %d: 95 %% pruned by %-15s error %.2f %%, %.2f times the whole network's.",
                        run["label"].get<std::string>().c_str(), int(run["seed"]),
                        p["ranking"].get<std::string>().c_str(), 100 * double(p["error"]), double(p["error_ratio"]));
  }
  return sentence;
}

int run(int argc, char** argv) {
  PaperProgram program(
      "bgd_mnist",
      "Bayesian gradient descent on MNIST: networks 784-h-h-10 by BGD, SGD and Bayes by Backprop (tables 1 and 2 of\n"
      "Zeno et al. 2018), and what is left of them when most of their weights are pruned. Writes result.json,\n"
      "log.jsonl and a plot to --out.",
      argc, argv, make_preset);
  const bool quick = !program.paper();
  program.methods = "bgd,sgd";
  program.out_prefix = "results/bgd_mnist_";
  program.add_options(
      "quick (2x400, 4 epochs; sigma 0.01, eta with eta sigma^2 batch = 0.46) or paper (600 epochs): what the other\n"
      "options start from");
  std::string widths = quick ? "400" : "400,800,1200";
  program.app.add_option("--widths", widths, "of the hidden layers");
  bool validate = false;
  program.app.add_flag("--validate", validate, "judge on the last 10,000 training images instead of the test images");
  if (!program.parse()) return 0;
  Preset& p = program.preset;
  json& bgd = find_method(p, "bgd").settings;
  // Another sigma0 or batch keeps the step of the means, eta sigma0^2 B, and with it its stability.
  if (quick && !program.given("--eta"))
    bgd["eta"] = double(bgd["eta"]) * std::pow(0.01 / double(bgd["sigma"]), 2) * 128 / p.batch;
  const std::vector<uint64_t> hidden = parse_wholes("--widths", widths);

  const int train_limit = p.train_limit;
  if (validate) p.train_limit = 0;
  ExperimentData data = program.find_data(find_mnist);
  if (validate) {
    constexpr int held_out = 10000;
    const int all = data.set.train.count, learned = all - held_out;
    if (learned < 1) throw InputError("--validate holds out 10,000 of " + std::to_string(all) + " training images");
    std::vector<int32_t> last(p.test_limit ? std::min(held_out, p.test_limit) : held_out);
    std::iota(last.begin(), last.end(), learned);
    data.test = {subset(data.set.train, last)};
    limit(data.set.train, train_limit ? std::min(learned, train_limit) : learned);
  }
  std::vector<ExperimentRun> runs;
  for (uint64_t width : hidden) {
    if (width < 1 || width > 65536) throw InputError("--widths: 1 to 65,536 units, not " + std::to_string(width));
    NetworkSpec network = network_spec("mlp", 10, {{"hidden", {width, width}}});
    network.image = {data.set.train.channels, data.set.train.height, data.set.train.width};
    for (Method method : program.chosen_methods()) {
      if ((method.kind == "bgd" || method.kind == "bbb") && !quick && !program.given("--sigma"))
        method.settings["sigma"] = choose_sigma(int(width));
      for (uint64_t seed : program.seed_numbers()) {
        ExperimentRun& r = runs.emplace_back(program.make_run(method, make_label(method, width), network, seed));
        r.stages = whole_set(data.set.train.count);
        r.more["width"] = width;
        r.histogram = true;
      }
    }
  }
  ExperimentOptions experiment = program.experiment();
  if (validate) experiment.extra["judged_on"] = "the last 10,000 training images";
  return run_and_report(program, "MNIST", experiment, data, runs,
                        [&](const json& result) { return sentence_about(result, hidden); });
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("bgd_mnist", [&] { return run(argc, argv); });
}
