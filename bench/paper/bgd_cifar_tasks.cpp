// Tasks of colour images one after the other, an output layer each (Zeno et al. 2018, figure 4): CIFAR-10 and then five
// times ten classes of CIFAR-100, by BGD, SGD and Synaptic Intelligence. Without CIFAR-100's files: CIFAR-10 in five
// tasks of two classes.
#include <cmath>
#include <numeric>

#include "bench/common/bgd.h"
#include "engine/io/program.h"
#include "layers/task_cnn.h"

using namespace baton;

namespace {

BgdPreset preset_of(const std::string& name) {
  BgdPreset p;
  p.inference = Inference::committee;
  p.bgd.lr = 2;
  p.sgd.lr = 0.01;
  p.sgd.momentum = 0;
  p.adam.lr = p.si.lr = p.ewc.lr = 1e-3;
  p.si.strength = 0.01;
  p.si.xi = 1e-3;
  p.ewc.strength = 100;
  p.restart_optimizer = true;
  if (name == "paper") {
    p.batch = 256;
    p.epochs = 150;
    p.sigma = 0.019;
    p.fisher_examples = 5000;
  } else if (name == "quick") {  // minutes on two cores
    p.train_limit = 1000;        // of each task
    p.test_limit = 500;
    p.batch = 32;
    p.epochs = 5;
    p.sigma = 0.04;
    p.draws = 4;
    p.fisher_examples = 256;
  } else {
    throw InputError("unknown preset '" + name + "': quick or paper");
  }
#if !defined(BATON_CUDA)
  p.at_once = 1;  // a draw's activations stay in the cache
#endif
  return p;
}

struct Tasks {
  TaskData data;
  TaskSequence sequence;
  std::vector<std::string> names;
  int classes = 10;
};

// Appends a task: its training images to the common set, its test images as they are.
void add_task(Tasks& to, const std::string& name, Images train, Images test, int train_limit, int test_limit,
              bool augment) {
  if (train_limit && train_limit < train.count) limit(train, train_limit);
  if (test_limit && test_limit < test.count) limit(test, test_limit);
  Images& all = to.data.set.train;
  const int first = all.count;
  if (first == 0) {
    all = train;
  } else {
    all.pixels.insert(all.pixels.end(), train.pixels.begin(), train.pixels.end());
    all.labels.insert(all.labels.end(), train.labels.begin(), train.labels.end());
    all.count += train.count;
  }
  std::vector<int32_t> examples(train.count);
  std::iota(examples.begin(), examples.end(), first);
  to.sequence.heads.push_back(int(to.sequence.examples.size()));
  to.sequence.examples.push_back(std::move(examples));
  to.sequence.augment.push_back(augment);
  to.data.test.push_back(std::move(test));
  to.names.push_back(name);
}

std::string sentence_of(const json& result, const std::vector<std::string>& names) {
  std::string sentence = "Accuracy on every task after the last one";
  sentence += " (" + names.front() + " first):";
  char text[100];
  for (const json& run : result["runs"]) {
    sentence += "\n" + run["label"].get<std::string>() + ", seed " + std::to_string(int(run["seed"])) + ":";
    for (double a : run["stages"].back()["by_task"].get<std::vector<double>>()) {
      snprintf(text, sizeof text, " %.3f", a);
      sentence += text;
    }
    snprintf(text, sizeof text, "; mean %.3f", double(run["final_test_accuracy"]));
    sentence += text;
  }
  return sentence;
}

int run(int argc, char** argv) {
  CLI::App app{
      "Tasks of colour images one after the other, with an output layer each (figure 4 of Zeno et al. 2018): CIFAR-10\n"
      "and five times ten classes of CIFAR-100; or, without CIFAR-100's files, CIFAR-10 in five tasks of two classes.\n"
      "Writes result.json, log.jsonl and a plot to --out."};
  const std::string known = "bgd,sgd,adam,si,ewc";
  BgdOptions options;
  options.methods = "bgd,sgd,si";
  options.out_prefix = "results/bgd_cifar_tasks_";
  std::string cifar100;
  options.add_to(app, known, "quick (1,000 images a task, 5 epochs) or paper (150 epochs): sets what is not given");
  app.add_option("--cifar100", cifar100, "folder of CIFAR-100's binary files (train.bin, test.bin)");
  bool no_dropout = false;
  app.add_flag("--no-dropout", no_dropout, "train without dropout");
  try {
    parse(app, argc, argv);
  } catch (const HelpShown&) {
    return 0;
  }
  BgdPreset p = preset_of(options.preset);
  options.apply(p);
  const std::vector<uint64_t> seeds = options.seed_numbers();

  Tasks tasks;
  const Dataset ten = find_cifar10(options.data_folder(), 0, {});
  tasks.data.set = ten;
  tasks.data.set.train = {};
  if (!cifar100.empty()) {
    add_task(tasks, "CIFAR-10", ten.train, ten.test, p.train_limit, p.test_limit, options.preset == "paper");
    const Dataset hundred = load_cifar100(cifar100);
    for (int t = 0; t < 5; t++) {
      std::vector<int> classes(10);
      std::iota(classes.begin(), classes.end(), 10 * t);
      const std::string name = "CIFAR-100 " + std::to_string(10 * t) + "-" + std::to_string(10 * t + 9);
      add_task(tasks, name, of_classes(hundred.train, classes), of_classes(hundred.test, classes), p.train_limit,
               p.test_limit, false);
    }
    tasks.data.set.name = "cifar10+cifar100";
    tasks.data.set.source = ten.source + "; " + hundred.source;
  } else {
    tasks.classes = 2;
    for (int t = 0; t < 5; t++) {
      const int classes[] = {2 * t, 2 * t + 1};
      add_task(tasks, "classes " + std::to_string(2 * t) + " and " + std::to_string(2 * t + 1),
               of_classes(ten.train, classes), of_classes(ten.test, classes), p.train_limit, p.test_limit, false);
    }
  }
  tasks.data.set.train.classes = tasks.classes;

  const int heads = tasks.sequence.stages(), classes = tasks.classes;
  const bool dropout = !no_dropout;
  const NetworkFactory network = [heads, classes, dropout] {
    return std::make_unique<TaskCnn>(heads, classes, dropout);
  };
  std::vector<TaskRun> runs;
  for (const std::string& method : options.method_names(known))
    for (uint64_t seed : seeds) {
      std::string label = method;
      for (char& c : label) c = char(toupper(c));
      TaskRun r = task_run(p, options, method, label, seed, p.sigma, network, tasks.sequence);
      r.settings["dropout"] = dropout;
      r.settings["tasks"] = tasks.names;
      runs.push_back(std::move(r));
    }
  Dataset shown = ten;
  shown.train.count = tasks.data.set.train.count;
  shown.test.count = 0;
  for (const Images& t : tasks.data.test) shown.test.count += t.count;
  print_head("bgd_cifar_tasks", cifar100.empty() ? "CIFAR-10 in five tasks" : "CIFAR-10 and five parts of CIFAR-100",
             shown, options.preset);
  TaskExperimentOptions experiment = options.experiment("bgd_cifar_tasks");
  experiment.normalisation = standardise(tasks.data.set.train);
  const json result = run_task_experiment(experiment, tasks.data, runs);
  report_tasks(result, sentence_of(result, tasks.names), tasks.data.set, experiment.out);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("bgd_cifar_tasks", [&] { return run(argc, argv); });
}
