// Bayesian gradient descent on CIFAR-10 (Zeno et al. 2018, figures 2 and 3, table 3): VGG11 without batch
// normalisation, BGD beside SGD: test accuracy by epoch and by inference, the histogram of sigma, and what pruning
// leaves.
#include "bench/common/program.h"
#include "engine/io/program.h"

using namespace baton;

namespace {

Preset make_preset(bool paper) {
  Preset p;
  p.batch = 128;
  p.augment = true;
  p.samples = 10;
  p.inference = "sampled";
  p.pruned = "0.5,0.75,0.9,0.95";
  p.methods = baseline_methods({"bgd", "sgd", "adam", "bbb", "bbb_mixture"});
  // On the CPU the draws run one at a time, so that the activations of a large network stay in the cache.
  if (!on_gpu) find_method(p, "bgd").settings["draws_at_once"] = 1;
  set_sigma(p, 0.015);
  find_method(p, "bgd").settings["eta"] = 6;
  find_method(p, "sgd").settings = {
      {"lr", 0.01}, {"momentum", 0.9}, {"schedule", "steps"}, {"decay", 0.1}, {"decay_epochs", 100}};
  if (paper) {
    p.epochs = 400;
    p.measure_every = 5;
  } else {  // minutes on two cores: far too little for VGG11, enough to see every part of it run
    p.train_limit = 1000;
    p.test_limit = 500;
    p.epochs = 8;
    p.measure_every = 1;
    p.samples = 5;
    p.batch = 32;
    p.augment = false;
    set_sigma(p, 0.02);
    find_method(p, "bgd").settings["draws"] = 2;
  }
  return p;
}

std::string sentence_about(const json& result) {
  std::string sentence;
  for (const json& run : result["runs"]) {
    const json& last = run["stages"].back()["by_inference"];
    sentence += format_text("%s%s, seed %d: MAP %.2f %%", sentence.empty() ? "" : "\n",
                            run["label"].get<std::string>().c_str(), int(run["seed"]), 100 * double(last["map"]));
    if (!run.contains("sigma")) continue;
    sentence += format_text(
        ", mean of sampled networks %.2f %%, committee %.2f %%; sigma from %.3g to median %.3g, largest %.3g",
        100 * double(last["sampled"]), 100 * double(last["committee"]), double(run["sigma"]["initial"]),
        double(run["sigma"]["median"]), double(run["sigma"]["largest"]));
  }
  return sentence;
}

int run(int argc, char** argv) {
  PaperProgram program(
      "bgd_cifar10",
      "Bayesian gradient descent on CIFAR-10: VGG11 without batch normalisation by BGD and SGD (figures 2 and 3 and\n"
      "table 3 of Zeno et al. 2018). Writes result.json, log.jsonl and a plot to --out.",
      argc, argv, make_preset);
  program.methods = "bgd,sgd";
  program.out_prefix = "results/bgd_cifar10_";
  program.add_options("quick (1,000 images, 8 epochs) or paper (400 epochs): what the other options start from");
  if (!program.parse()) return 0;
  const ExperimentData data = program.find_data(find_cifar10);
  std::vector<ExperimentRun> runs;
  for (const Method& method : program.chosen_methods())
    for (uint64_t seed : program.seed_numbers()) {
      ExperimentRun& r = runs.emplace_back(program.make_run(method, upper(method.name), network_spec("vgg11"), seed));
      r.stages = whole_set(data.set.train.count, program.preset.augment);
      r.more["augment"] = program.preset.augment;
      r.histogram = true;
    }
  ExperimentOptions experiment = program.experiment();
  experiment.normalisation = standardise(data.set.train);
  return run_and_report(program, "CIFAR-10", experiment, data, runs, sentence_about);
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("bgd_cifar10", [&] { return run(argc, argv); });
}
