// Tasks of colour images one after the other, an output layer each (Zeno et al. 2018, figure 4): CIFAR-10 and then five
// times ten classes of CIFAR-100, by BGD, SGD and Synaptic Intelligence. Without CIFAR-100's files: CIFAR-10 in five
// tasks of two classes.
#include <numeric>

#include "bench/common/program.h"
#include "engine/io/program.h"

using namespace baton;

namespace {

Preset make_preset(bool paper) {
  Preset p;
  p.samples = 10;
  p.inference = "committee";
  p.methods = baseline_methods({"bgd", "sgd", "adam", "si", "ewc"});
  // On the CPU the draws run one at a time, so that the activations of a large network stay in the cache.
  if (!on_gpu) find_method(p, "bgd").settings["draws_at_once"] = 1;
  find_method(p, "bgd").settings["eta"] = 2;
  find_method(p, "si").settings = {{"strength", 0.01}, {"xi", 1e-3}};
  find_method(p, "ewc").settings = {{"strength", 100}};
  for (const char* point : {"sgd", "adam", "si", "ewc"}) find_method(p, point).settings["restart_optimizer"] = true;
  if (paper) {
    p.batch = 256;
    p.epochs = 150;
    set_sigma(p, 0.019);
    find_method(p, "ewc").settings["fisher_examples"] = 5000;
  } else {                 // minutes on two cores
    p.train_limit = 1000;  // of each task
    p.test_limit = 500;
    p.batch = 32;
    p.epochs = 5;
    set_sigma(p, 0.04);
    find_method(p, "bgd").settings["draws"] = 4;
    find_method(p, "ewc").settings["fisher_examples"] = 256;
  }
  return p;
}

struct Tasks {
  ExperimentData data;
  std::vector<std::vector<int32_t>> examples;  // of each task, in the common set
  std::vector<bool> augment;
  std::vector<std::string> names;
  int classes = 10;  // of each task
};

// Appends a task of the classes from `first_class` on: its training images to the common set, its test images as they
// are.
void add_task(Tasks& to, const std::string& name, const Dataset& set, int first_class, const Preset& p, bool augment) {
  std::vector<int> classes(to.classes);
  std::iota(classes.begin(), classes.end(), first_class);
  Images train = of_classes(set.train, classes), test = of_classes(set.test, classes);
  if (p.train_limit && p.train_limit < train.count) limit(train, p.train_limit);
  if (p.test_limit && p.test_limit < test.count) limit(test, p.test_limit);
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
  to.examples.push_back(std::move(examples));
  to.augment.push_back(augment);
  to.data.test.push_back(std::move(test));
  to.names.push_back(name);
}

std::string sentence_about(const json& result, const std::vector<std::string>& names) {
  std::string sentence = "Accuracy on every task after the last one (" + names.front() + " first):";
  for (const json& run : result["runs"]) {
    sentence += "\n" + run["label"].get<std::string>() + ", seed " + std::to_string(int(run["seed"])) + ":";
    for (double a : run["stages"].back()["by_task"].get<std::vector<double>>()) sentence += format_text(" %.3f", a);
    sentence += format_text("; mean %.3f", double(run["final_test_accuracy"]));
  }
  return sentence;
}

int run(int argc, char** argv) {
  PaperProgram program(
      "bgd_cifar_tasks",
      "Tasks of colour images one after the other, with an output layer each (figure 4 of Zeno et al. 2018): CIFAR-10\n"
      "and five times ten classes of CIFAR-100; or, without CIFAR-100's files, CIFAR-10 in five tasks of two classes.\n"
      "Writes result.json, log.jsonl and a plot to --out.",
      argc, argv, make_preset);
  program.methods = "bgd,sgd,si";
  program.out_prefix = "results/bgd_cifar_tasks_";
  std::string cifar100;
  program.add_options("quick (1,000 images a task, 5 epochs) or paper (150 epochs): what the other options start from");
  program.app.add_option("--cifar100", cifar100, "folder of CIFAR-100's binary files (train.bin, test.bin)");
  bool no_dropout = false;
  program.app.add_flag("--no-dropout", no_dropout, "train without dropout");
  if (!program.parse()) return 0;
  const Preset& p = program.preset;

  Tasks tasks;
  const Dataset ten = find_cifar10(program.data, 0, {});
  tasks.data.set = ten;
  tasks.data.set.train = {};
  if (!cifar100.empty()) {
    add_task(tasks, "CIFAR-10", ten, 0, p, program.paper());
    const Dataset hundred = load_cifar100(cifar100);
    for (int c = 0; c < 50; c += 10)
      add_task(tasks, "CIFAR-100 " + std::to_string(c) + "-" + std::to_string(c + 9), hundred, c, p, false);
    tasks.data.set.name = "cifar10+cifar100";
    tasks.data.set.source = ten.source + "; " + hundred.source;
  } else {
    tasks.classes = 2;
    for (int c = 0; c < 10; c += 2)
      add_task(tasks, "classes " + std::to_string(c) + " and " + std::to_string(c + 1), ten, c, p, false);
  }
  tasks.data.set.train.classes = tasks.classes;

  Stages stages = tasks_in_turn(tasks.examples);
  for (int head = 0; head < stages.count(); head++) stages.heads.push_back(head);
  stages.augment = tasks.augment;
  const NetworkSpec network =
      network_spec("task-cnn", tasks.classes, {{"heads", stages.count()}, {"dropout", !no_dropout}});
  std::vector<ExperimentRun> runs;
  for (const Method& method : program.chosen_methods())
    for (uint64_t seed : program.seed_numbers()) {
      ExperimentRun& r = runs.emplace_back(program.make_run(method, upper(method.name), network, seed));
      r.stages = stages;
      r.more["dropout"] = !no_dropout;
      r.more["tasks"] = tasks.names;
    }
  ExperimentOptions experiment = program.experiment();
  experiment.normalisation = standardise(tasks.data.set.train);
  return run_and_report(program, cifar100.empty() ? "CIFAR-10 in five tasks" : "CIFAR-10 and five parts of CIFAR-100",
                        experiment, tasks.data, runs,
                        [&](const json& result) { return sentence_about(result, tasks.names); });
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("bgd_cifar_tasks", [&] { return run(argc, argv); });
}
