// Bayesian gradient descent on CIFAR-10 (Zeno et al. 2018, figures 2 and 3, table 3): VGG11 without batch
// normalisation, BGD beside SGD: test accuracy by epoch and by inference, the histogram of sigma, and what pruning
// leaves.
#include "bench/common/bgd.h"
#include "engine/io/program.h"

using namespace baton;

namespace {

Preset make_preset(const std::string& name) {
  Preset p;
  p.batch = 128;
  p.augment = true;
  p.samples = 10;
  p.inference = "sampled";
  p.pruned = "0.5,0.75,0.9,0.95";
  p.methods = baseline_methods({"bgd", "sgd", "adam", "bbb", "bbb_mixture"});
  draw_one_at_a_time(p);
  set_sigma(p, 0.015);
  find_method(p, "bgd").settings["eta"] = 6;
  find_method(p, "sgd").settings = {
      {"lr", 0.01}, {"momentum", 0.9}, {"schedule", "steps"}, {"decay", 0.1}, {"decay_epochs", 100}};
  if (name == "paper") {
    p.epochs = 400;
    p.measure_every = 5;
  } else if (name == "quick") {  // minutes on two cores: far too little for VGG11, enough to see every part of it run
    p.train_limit = 1000;
    p.test_limit = 500;
    p.epochs = 8;
    p.measure_every = 1;
    p.samples = 5;
    p.batch = 32;
    p.augment = false;
    set_sigma(p, 0.02);
    find_method(p, "bgd").settings["draws"] = 2;
  } else {
    refuse_preset(name);
  }
  return p;
}

std::string sentence_about(const json& result) {
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
  PaperProgram program(
      "bgd_cifar10",
      "Bayesian gradient descent on CIFAR-10: VGG11 without batch normalisation by BGD and SGD (figures 2 and 3 and\n"
      "table 3 of Zeno et al. 2018). Writes result.json, log.jsonl and a plot to --out.",
      argc, argv, make_preset);
  program.methods = "bgd,sgd";
  program.out_prefix = "results/bgd_cifar10_";
  program.add_options("quick (1,000 images, 8 epochs) or paper (400 epochs): what the other options start from");
  if (!program.parse()) return 0;
  Limits limits;
  limits.train = program.preset.train_limit;
  limits.test = program.preset.test_limit;
  ExperimentData data;
  data.set = find_cifar10(program.data_folder(), 0, limits);
  data.test = {data.set.test};
  std::vector<ExperimentRun> runs;
  for (const Method& method : program.chosen_methods())
    for (uint64_t seed : program.seed_numbers()) {
      ExperimentRun r = program.make_run(method, upper(method.name), network_spec("vgg11"), {seed});
      r.stages = whole_set(data.set.train.count, program.preset.augment);
      r.more["augment"] = program.preset.augment;
      r.histogram = true;
      add_step_scale(r);
      runs.push_back(std::move(r));
    }
  print_head(program, "CIFAR-10", data.set);
  ExperimentOptions experiment = program.experiment();
  experiment.normalisation = standardise(data.set.train);
  const json result = run_experiment(experiment, data, runs);
  report(result, sentence_about(result), data.set, experiment.out);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("bgd_cifar10", [&] { return run(argc, argv); });
}
