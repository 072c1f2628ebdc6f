// Bayesian gradient descent on MNIST (Zeno et al. 2018, tables 1 and 2): networks of two hidden layers learn the first
// 50,000 training images by BGD, by SGD and by Bayes by Backprop; then they are pruned, posteriors by their
// signal-to-noise ratio and by magnitude, point estimates by magnitude.
#include <cmath>

#include "bench/common/bgd.h"
#include "engine/io/program.h"
#include "layers/mlp.h"

using namespace baton;

namespace {

BgdPreset preset_of(const std::string& name) {
  BgdPreset p;
  p.batch = 128;
  p.train_limit = 50000;  // the paper's split: the last 10,000 training images are for validation
  p.sgd.lr = 0.05;
  p.sgd.momentum = 0.9;
  p.adam.lr = 1e-3;
  p.bbb.lr = 1e-3;  // on the summed loss
  p.bbb.momentum = 0;
  p.pruned = {0.5, 0.75, 0.9, 0.95, 0.98};
  if (name == "paper") {
    p.epochs = 600;
    p.judge_every = 10;
  } else if (name == "quick") {
    // So few epochs leave sigma at its start, where the paper's 0.05 is mostly noise. This is nearly gradient descent
    // on the mean; pruning by signal-to-noise wants the other end (--widths 1200 --sigma 0.08 --eta 1 --batch 48).
    p.epochs = 4;
    p.judge_every = 2;
    p.sigma = 0.01;
    p.bgd.lr = 36;
    p.sgd.lr = 0.1;
  } else {
    throw InputError("unknown preset '" + name + "': quick or paper");
  }
  return p;
}

// The authors' own values for these widths; between and beyond them their nearest.
double sigma_of(int width) { return width < 1000 ? 0.05 : width < 1600 ? 0.04 : 0.015; }

std::string upper(std::string name) {
  if (name == "bbb_mixture") return "BBB mixture";
  for (char& c : name) c = char(toupper(c));
  return name;
}

std::string sentence_of(const json& result, const std::vector<uint64_t>& widths) {
  std::string sentence;
  char text[300];
  for (uint64_t w : widths) {
    const std::string net = " 2x" + std::to_string(w);
    const double bgd = final_accuracy_of(result, "BGD" + net), sgd = final_accuracy_of(result, "SGD" + net);
    if (!std::isfinite(bgd)) continue;
    snprintf(text, sizeof text, "With 2x%d units BGD ends at %.2f %% test error", int(w), 100 * (1 - bgd));
    sentence += text;
    if (std::isfinite(sgd)) {
      snprintf(text, sizeof text, ", SGD after as many epochs at %.2f %%", 100 * (1 - sgd));
      sentence += text;
    }
    sentence += ". ";
  }
  for (const json& run : result["runs"]) {
    if (!run.contains("pruning")) continue;
    for (const json& p : run["pruning"]["results"])
      if (std::abs(double(p["fraction"]) - 0.95) < 1e-9) {
        snprintf(text, sizeof text,
                 "\n%-16s seed %d: 95 %% pruned by %-15s error %.2f %%, %.2f times the whole network's.",
                 run["label"].get<std::string>().c_str(), int(run["seed"]), p["ranking"].get<std::string>().c_str(),
                 100 * double(p["error"]), double(p["error_ratio"]));
        sentence += text;
      }
  }
  return sentence;
}

int run(int argc, char** argv) {
  CLI::App app{
      "Bayesian gradient descent on MNIST: networks 784-h-h-10 by BGD, SGD and Bayes by Backprop (tables 1 and 2 of\n"
      "Zeno et al. 2018), and what is left of them when most of their weights are pruned. Writes result.json, "
      "log.jsonl\n"
      "and a plot to --out."};
  const std::string known = "bgd,sgd,adam,bbb,bbb_mixture";
  BgdOptions options;
  options.methods = "bgd,sgd";
  options.out_prefix = "results/bgd_mnist_";
  std::string widths;
  options.add_to(app, known,
                 "quick (2x400, 4 epochs; sigma 0.01, eta with eta sigma^2 batch = 0.46) or paper (600 epochs): sets\n"
                 "what is not given");
  app.add_option("--widths", widths, "of the hidden layers [quick: 400; paper: 400,800,1200]");
  bool validate = false;
  app.add_flag("--validate", validate, "judge on the last 10,000 training images instead of the test images");
  try {
    parse(app, argc, argv);
  } catch (const HelpShown&) {
    return 0;
  }
  const BgdPreset usual = preset_of(options.preset);
  BgdPreset p = usual;
  options.apply(p);
  // Another sigma0 or batch keeps the step of the means, eta sigma0^2 B, and with it its stability.
  if (options.preset == "quick" && !options.eta_given())
    p.bgd.lr = usual.bgd.lr * std::pow(usual.sigma / p.sigma, 2) * usual.batch / p.batch;
  if (widths.empty()) widths = options.preset == "paper" ? "400,800,1200" : "400";
  const std::vector<uint64_t> hidden = numbers_of("--widths", widths), seeds = options.seed_numbers();
  const std::vector<std::string> methods = options.method_names(known);

  Limits limits;
  limits.train = p.train_limit;
  limits.test = p.test_limit;
  TaskData data;
  if (validate) limits.train = 0;
  data.set = find_mnist(options.data_folder(), 0, limits);
  if (validate) {
    constexpr int held_out = 10000;
    const int all = data.set.train.count, learned = all - held_out;
    if (learned < 1) throw InputError("--validate holds out 10,000 of " + std::to_string(all) + " training images");
    std::vector<int32_t> last(held_out);
    for (int i = 0; i < held_out; i++) last[i] = learned + i;
    data.set.test = subset(data.set.train, last);
    limit(data.set.train, std::min(learned, p.train_limit ? p.train_limit : learned));
    if (p.test_limit) limit(data.set.test, std::min(held_out, p.test_limit));
  }
  data.test = {data.set.test};
  const int pixels = data.set.train.channels * data.set.train.height * data.set.train.width;
  TaskSequence sequence;
  sequence.examples.emplace_back(data.set.train.count);
  for (int i = 0; i < data.set.train.count; i++) sequence.examples[0][i] = i;

  std::vector<TaskRun> runs;
  for (uint64_t width : hidden) {
    if (width < 1 || width > 100000) throw InputError("--widths: 1 to 100,000 units, not " + std::to_string(width));
    for (const std::string& method : methods)
      for (uint64_t seed : seeds) {
        const int w = int(width);
        TaskRun r = task_run(
            p, options, method, upper(method) + " 2x" + std::to_string(w), seed,
            options.sigma_given() || options.preset == "quick" ? p.sigma : sigma_of(w),
            [pixels, w] {
              return std::make_unique<Mlp>(pixels, std::vector<int>{w, w}, 10);
            },
            sequence);
        r.settings["width"] = w;
        r.histogram = true;
        runs.push_back(std::move(r));
      }
  }
  print_head("bgd_mnist", "MNIST", data.set, options.preset);
  TaskExperimentOptions experiment = options.experiment("bgd_mnist");
  if (validate) experiment.extra["judged_on"] = "the last 10,000 training images";
  const json result = run_task_experiment(experiment, data, runs);
  report_tasks(result, sentence_of(result, hidden), data.set, experiment.out);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("bgd_mnist", [&] { return run(argc, argv); });
}
