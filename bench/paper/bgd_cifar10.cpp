// Bayesian gradient descent on CIFAR-10 (Zeno et al. 2018, figures 2 and 3, table 3): VGG11 without batch
// normalisation, BGD beside SGD: test accuracy by epoch and by inference, the histogram of sigma, and what pruning
// leaves.
#include <cmath>

#include "bench/common/bgd.h"
#include "engine/io/program.h"
#include "layers/vgg11.h"

using namespace baton;

namespace {

BgdPreset preset_of(const std::string& name) {
  BgdPreset p;
  p.batch = 128;
  p.augment = true;
  p.sigma = 0.015;
  p.bgd.lr = 6;
  p.sgd.lr = 0.01;
  p.sgd.momentum = 0.9;
  p.sgd.schedule = Schedule::steps;
  p.sgd.decay = 0.1;
  p.sgd.decay_epochs = 100;
  p.pruned = {0.5, 0.75, 0.9, 0.95};
  if (name == "paper") {
    p.epochs = 400;
    p.judge_every = 5;
  } else if (name == "quick") {  // minutes on two cores: far too little for VGG11, enough to see every part of it run
    p.train_limit = 1000;
    p.test_limit = 500;
    p.epochs = 8;
    p.judge_every = 1;
    p.draws = 2;
    p.samples = 5;
    p.batch = 32;
    p.sigma = 0.02;
    p.augment = false;
  } else {
    throw InputError("unknown preset '" + name + "': quick or paper");
  }
#if !defined(BATON_CUDA)
  p.at_once = 1;  // a draw's activations stay in the cache
#endif
  return p;
}

std::string sentence_of(const json& result) {
  std::string sentence;
  char text[300];
  for (const json& run : result["runs"]) {
    const json& last = run["stages"].back()["by_inference"];
    snprintf(text, sizeof text, "%s%s, seed %d: MAP %.2f %%", sentence.empty() ? "" : "\n",
             run["label"].get<std::string>().c_str(), int(run["seed"]), 100 * double(last["map"]));
    sentence += text;
    if (!run.contains("sigma")) continue;
    snprintf(text, sizeof text,
             ", mean of sampled networks %.2f %%, committee %.2f %%; sigma from %.3g to median %.3g, largest %.3g",
             100 * double(last["sampled"]), 100 * double(last["committee"]), double(run["sigma"]["initial"]),
             double(run["sigma"]["median"]), double(run["sigma"]["largest"]));
    sentence += text;
  }
  return sentence;
}

int run(int argc, char** argv) {
  CLI::App app{
      "Bayesian gradient descent on CIFAR-10: VGG11 without batch normalisation by BGD and SGD (figures 2 and 3 and\n"
      "table 3 of Zeno et al. 2018). Writes result.json, log.jsonl and a plot to --out."};
  const std::string known = "bgd,sgd,adam,bbb,bbb_mixture";
  BgdOptions options;
  options.methods = "bgd,sgd";
  options.out_prefix = "results/bgd_cifar10_";
  options.add_to(app, known, "quick (1,000 images, 8 epochs) or paper (400 epochs): sets what is not given");
  bool augment = false;
  CLI::Option* given = app.add_flag("--augment,!--no-augment", augment, "random flips and padded crops");
  try {
    parse(app, argc, argv);
  } catch (const HelpShown&) {
    return 0;
  }
  BgdPreset p = preset_of(options.preset);
  options.apply(p);
  if (*given) p.augment = augment;
  const std::vector<uint64_t> seeds = options.seed_numbers();

  Limits limits;
  limits.train = p.train_limit;
  limits.test = p.test_limit;
  TaskData data;
  data.set = find_cifar10(options.data_folder(), 0, limits);
  data.test = {data.set.test};
  TaskSequence sequence;
  sequence.examples.emplace_back(data.set.train.count);
  for (int i = 0; i < data.set.train.count; i++) sequence.examples[0][i] = i;
  sequence.augment = {p.augment};

  std::vector<TaskRun> runs;
  for (const std::string& method : options.method_names(known))
    for (uint64_t seed : seeds) {
      std::string label = method;
      for (char& c : label) c = char(toupper(c));
      TaskRun r = task_run(
          p, options, method, label, seed, p.sigma, [] { return std::make_unique<Vgg11>(); }, sequence);
      r.settings["augment"] = p.augment;
      r.histogram = true;
      runs.push_back(std::move(r));
    }
  print_head("bgd_cifar10", "CIFAR-10", data.set, options.preset);
  TaskExperimentOptions experiment = options.experiment("bgd_cifar10");
  experiment.normalisation = standardise(data.set.train);
  const json result = run_task_experiment(experiment, data, runs);
  report_tasks(result, sentence_of(result), data.set, experiment.out);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("bgd_cifar10", [&] { return run(argc, argv); });
}
