// Permuted MNIST (Zeno et al. 2018, figure 1): one network learns task after task, each MNIST with its pixels in
// another fixed order. Bayesian gradient descent is not told where a task ends; SGD is not either; Synaptic
// Intelligence and EWC are. bgd_continuous and sgd_continuous learn the tasks without borders: each example's task is
// drawn, and neighbouring tasks overlap in time.
#include <cmath>

#include "bench/common/program.h"
#include "engine/io/program.h"

using namespace baton;

namespace {

Preset make_preset(bool paper) {
  Preset p;
  p.batch = 128;
  p.samples = 10;
  p.inference = "map";  // as the authors' scripts
  p.methods = baseline_methods({"bgd", "sgd", "adam", "si", "ewc", "bgd_continuous", "sgd_continuous"});
  find_method(p, "si").settings = {{"strength", 0.1}, {"xi", 0.1}};  // Adam, not restarted (Zenke et al. 2017)
  find_method(p, "ewc").settings = {{"strength", 100}};
  if (paper) {
    p.epochs = 20;
    set_sigma(p, 0.015);
    for (const char* adam : {"si", "ewc", "adam"}) find_method(p, adam).batch = 256;
    find_method(p, "ewc").settings["fisher_examples"] = 5000;
  } else {
    p.epochs = 2;
    set_sigma(p, 0.05);
  }
  return p;
}

std::string make_label(const std::string& method) {
  if (method == "adam") return "Adam";
  const size_t cut = method.find("_continuous");
  return upper(method.substr(0, cut)) + (cut == std::string::npos ? "" : ", continuous");
}

std::string sentence_about(const json& result, int tasks) {
  std::string sentence = "Average accuracy over the " + std::to_string(tasks) + " tasks after the last one:";
  std::vector<std::string> done;
  for (const json& run : result["runs"]) {
    const std::string label = run["label"];
    if (std::find(done.begin(), done.end(), label) != done.end()) continue;
    sentence += format_text("%s %s %.4f", done.empty() ? "" : ",", label.c_str(), final_accuracy(result, label));
    done.push_back(label);
  }
  return sentence + ".";
}

int run(int argc, char** argv) {
  PaperProgram program(
      "bgd_permuted_mnist",
      "Permuted MNIST: one network learns tasks that show the digits with their pixels in other orders (figure 1 of\n"
      "Zeno et al. 2018): BGD, which is told nothing of the tasks, beside SGD, Adam, Synaptic Intelligence and EWC.\n"
      "Writes result.json, log.jsonl and a plot to --out.",
      argc, argv, make_preset);
  program.methods = "bgd,sgd,si,ewc";
  program.out_prefix = "results/bgd_permuted_mnist_";
  program.add_options("quick (2x200, 2 epochs a task) or paper (2x2000, 20 epochs): what the other options start from");
  int tasks = 10, width = program.paper() ? 2000 : 200;
  double beta = 4;
  program.app.add_option("--tasks", tasks, "orders of the pixels, the first being MNIST's own")
      ->check(CLI::Range(1, 10000));
  program.app.add_option("--width", width, "of the two hidden layers")->check(CLI::Range(1, 65536));
  program.app.add_option("--overlap-beta", beta,
                         "of continuous tasks: neighbours overlap for 2 / beta of a task's length");
  if (!program.parse()) return 0;
  const Preset& p = program.preset;

  const ExperimentData data = program.find_data(find_mnist);
  NetworkSpec network = network_spec("mlp", 10, {{"hidden", {width, width}}});
  network.image = {data.set.train.channels, data.set.train.height, data.set.train.width};
  const int images = data.set.train.count;
  std::vector<ExperimentRun> runs;
  for (const Method& method : program.chosen_methods())
    for (uint64_t seed : program.seed_numbers()) {
      ExperimentRun& r = runs.emplace_back(program.make_run(method, make_label(method.name), network, seed));
      const bool continuous = method.name.ends_with("_continuous");
      const std::vector<int32_t> everything = whole_set(images).order[0];
      r.stages = tasks_in_turn(std::vector<std::vector<int32_t>>(continuous ? 1 : size_t(tasks), everything));
      r.stages.pixel_order = permute_pixels(tasks, network.image.size(), seed);
      r.more = {{"width", width}, {"tasks", tasks}, {"continuous", continuous}};
      if (continuous) {
        const int steps = int(std::ceil(p.epochs * tasks * images / r.training.batch));
        r.stages.probabilities = continuous_schedule(tasks, steps, beta);
        r.checks = tasks;
        r.more["overlap_beta"] = beta;
      }
    }
  return run_and_report(program, "MNIST", program.experiment(), data, runs,
                        [&](const json& result) { return sentence_about(result, tasks); });
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("bgd_permuted_mnist", [&] { return run(argc, argv); });
}
