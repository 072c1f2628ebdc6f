// Permuted MNIST (Zeno et al. 2018, figure 1): one network learns task after task, each MNIST with its pixels in
// another fixed order. Bayesian gradient descent is not told where a task ends; SGD is not either; Synaptic
// Intelligence and EWC are. bgd_continuous and sgd_continuous learn the tasks without borders: each example's task is
// drawn, and neighbouring tasks overlap in time.
#include <cmath>

#include "bench/common/bgd.h"
#include "engine/io/program.h"
#include "layers/mlp.h"

using namespace baton;

namespace {

struct Preset : BgdPreset {
  int tasks = 10, width = 200;
};

Preset preset_of(const std::string& name) {
  Preset p;
  p.batch = 128;
  p.inference = Inference::map;  // as the authors' scripts
  p.sgd.lr = 0.01;
  p.sgd.momentum = 0;
  p.adam.lr = 1e-3;
  p.si.lr = p.ewc.lr = 1e-3;  // Adam, not restarted (Zenke et al. 2017)
  p.si.strength = 0.1;
  p.si.xi = 0.1;
  p.ewc.strength = 100;
  if (name == "paper") {
    p.width = 2000;
    p.epochs = 20;
    p.sigma = 0.015;
    p.si.batch = p.ewc.batch = p.adam.batch = 256;
    p.fisher_examples = 5000;
  } else if (name == "quick") {
    p.width = 200;
    p.epochs = 2;
    p.sigma = 0.05;
    p.fisher_examples = 1000;
  } else {
    throw InputError("unknown preset '" + name + "': quick or paper");
  }
  return p;
}

std::string label_of(const std::string& method) {
  if (method == "bgd_continuous") return "BGD, continuous";
  if (method == "sgd_continuous") return "SGD, continuous";
  std::string name = method;
  for (char& c : name) c = char(toupper(c));
  return name == "ADAM" ? "Adam" : name;
}

std::string sentence_of(const json& result, int tasks) {
  std::string sentence = "Average accuracy over the " + std::to_string(tasks) + " tasks after the last one:";
  std::vector<std::string> done;
  char text[120];
  for (const json& run : result["runs"]) {
    const std::string label = run["label"];
    if (std::find(done.begin(), done.end(), label) != done.end()) continue;
    snprintf(text, sizeof text, "%s %s %.4f", done.empty() ? "" : ",", label.c_str(), final_accuracy_of(result, label));
    sentence += text;
    done.push_back(label);
  }
  return sentence + ".";
}

int run(int argc, char** argv) {
  CLI::App app{
      "Permuted MNIST: one network learns tasks that show the digits with their pixels in other orders (figure 1 of\n"
      "Zeno et al. 2018): BGD, which is told nothing of the tasks, beside SGD, Adam, Synaptic Intelligence and EWC.\n"
      "Writes result.json, log.jsonl and a plot to --out."};
  const std::string known = "bgd,sgd,adam,si,ewc,bgd_continuous,sgd_continuous";
  BgdOptions options;
  options.methods = "bgd,sgd,si,ewc";
  options.out_prefix = "results/bgd_permuted_mnist_";
  options.add_to(app, known, "quick (2x200, 2 epochs a task) or paper (2x2000, 20 epochs): sets what is not given");
  int tasks = 0, width = 0;
  double beta = 4;
  CLI::Option* given_tasks = app.add_option("--tasks", tasks, "orders of the pixels, the first being MNIST's own [10]");
  CLI::Option* given_width = app.add_option("--width", width, "of the two hidden layers [quick: 200, paper: 2000]");
  app.add_option("--overlap-beta", beta, "of continuous tasks: neighbours overlap for 2 / beta of a task's length")
      ->capture_default_str();
  try {
    parse(app, argc, argv);
  } catch (const HelpShown&) {
    return 0;
  }
  Preset p = preset_of(options.preset);
  options.apply(p);
  if (*given_tasks) p.tasks = tasks;
  if (*given_width) p.width = width;
  if (p.tasks < 1 || p.width < 1) throw InputError("--tasks and --width must be at least 1");
  const std::vector<uint64_t> seeds = options.seed_numbers();

  Limits limits;
  limits.train = p.train_limit;
  limits.test = p.test_limit;
  TaskData data;
  data.set = find_mnist(options.data_folder(), 0, limits);
  data.test = {data.set.test};
  const int pixels = data.set.train.channels * data.set.train.height * data.set.train.width;
  std::vector<int32_t> everything(data.set.train.count);
  for (int i = 0; i < data.set.train.count; i++) everything[i] = i;

  const int w = p.width;
  const NetworkFactory network = [pixels, w] { return std::make_unique<Mlp>(pixels, std::vector<int>{w, w}, 10); };
  std::vector<TaskRun> runs;
  for (const std::string& method : options.method_names(known))
    for (uint64_t seed : seeds) {
      TaskSequence sequence;
      sequence.pixel_order = permuted_pixels(p.tasks, pixels, seed);
      const bool continuous = method.ends_with("_continuous");
      sequence.examples.assign(continuous ? 1 : p.tasks, everything);
      if (continuous) {
        const int batch = p.of(method).batch ? p.of(method).batch : p.batch;
        const int steps = int(std::ceil(p.epochs * p.tasks * data.set.train.count / batch));
        sequence.probabilities = continuous_schedule(p.tasks, steps, beta);
      }
      TaskRun r = task_run(p, options, method, label_of(method), seed, p.sigma, network, sequence);
      if (continuous) r.checks = p.tasks;
      r.settings["width"] = w;
      r.settings["tasks"] = p.tasks;
      r.settings["continuous"] = continuous;
      if (continuous) r.settings["overlap_beta"] = beta;
      runs.push_back(std::move(r));
    }
  print_head("bgd_permuted_mnist", "MNIST", data.set, options.preset);
  const TaskExperimentOptions experiment = options.experiment("bgd_permuted_mnist");
  const json result = run_task_experiment(experiment, data, runs);
  report_tasks(result, sentence_of(result, p.tasks), data.set, experiment.out);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("bgd_permuted_mnist", [&] { return run(argc, argv); });
}
