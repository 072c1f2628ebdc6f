// A whole experiment of learning tasks one after the other: a list of runs (method, seed), each trained and judged on
// the tasks' test sets, with a run log, a progress line, and checkpoints from which a killed run goes on to the very
// figures it would have had.
#pragma once
#include <filesystem>

#include "engine/io/dataset.h"
#include "engine/io/runlog.h"
#include "kernels/prune.h"
#include "trainers/tasks.h"

namespace baton {

// How a prediction comes from a posterior (Zeno et al. 2018, section 4): the weights at the mean; the mean accuracy of
// sampled networks (the paper's default); the class of the mean softmax; a majority vote, ties to the first class.
enum class Inference { map, sampled, softmax, committee };
Inference inference_of(const std::string& name);  // "map", ...; InputError
const char* name_of(Inference);

struct InferenceAccuracies {
  double map = 0, sampled = 0, softmax = 0, committee = 0;  // fractions; all alike for a point estimate
  double of(Inference) const;
};
// chosen [draws][images]: the classes that the draws chose.
double sampled_accuracy(const std::vector<uint8_t>& chosen, const std::vector<uint8_t>& labels);
double committee_accuracy(const std::vector<uint8_t>& chosen, const std::vector<uint8_t>& labels, int classes);

struct TaskRun {
  std::string method, label;  // "bgd", "BGD 2x400"
  uint64_t seed = 0;
  json settings = json::object();  // as result.json shows them
  TaskSequence sequence;
  TaskPlan plan;
  NetworkFactory network;
  LearnerFactory learner;
  Inference inference = Inference::sampled;
  int samples = 10;                // draws of a prediction
  double judge_every = 0;          // epochs between two judgements within a stage; 0: at its end
  int checks = 1;                  // of a continuous stage: judged so often
  int fisher_examples = 0;         // EWC: of a task, for its Fisher information
  bool restart_optimizer = false;  // at every task
  std::vector<double> pruned;      // fractions, after the last stage
  bool histogram = false;          // of sigma, in the result
};

struct TaskExperimentOptions {
  std::string experiment, preset;
  std::filesystem::path out;
  bool resume = false, save_models = false;
  double checkpoint_seconds = 20;
  Normalisation normalisation = unit_range;
  json extra = json::object();
};

// The images that are learned, and each task's test images (one set for all of them where tasks are orders of the
// pixels).
struct TaskData {
  Dataset set;  // `train`: with labels as the tasks' heads count them; `test` is not used
  std::vector<Images> test;
};

// Files in options.out: log.jsonl, result.json, checkpoint/ while it runs; MODEL.safetensors (and its pruned form) for
// every run where save_models is set. Throws InputError when --resume finds another experiment's checkpoint; RunError
// when a file cannot be written, a loss is not finite, or sigma diverged; Stopped when a signal asks to end, with the
// checkpoint written.
json run_task_experiment(const TaskExperimentOptions&, const TaskData&, const std::vector<TaskRun>&);

// Means over seeds, by label: final accuracy by inference, NLL, time.
std::string task_table_of(const json& result);

}  // namespace baton
