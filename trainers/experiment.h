// A whole experiment: a list of jobs (method, number of parts, seeds), each trained stage by stage and judged on the
// test set after every stage, with a run log, a progress line, and checkpoints from which a killed run goes on to the
// very figures it would have had.
#pragma once
#include <filesystem>

#include "engine/io/dataset.h"
#include "engine/io/runlog.h"
#include "trainers/incremental.h"

namespace baton {

struct Job {
  std::string method;  // "ft", "ft_converged", "ffg", "ffg_laplace", ...
  int parts = 1;
  TrainingPlan plan;  // its seeds train side by side; settings are the same for all of them
};

struct ExperimentOptions {
  std::string experiment;  // "bil_mnist"
  std::string preset;
  std::filesystem::path out;
  bool resume = false;
  int samples = 100;               // draws of the weights in the prediction after a job's last stage
  int stage_samples = 100;         // and after the stages before it
  double checkpoint_seconds = 20;  // a checkpoint at the end of the first epoch after so long, and after every stage
  Normalisation normalisation = unit_range;
  json extra = json::object();  // what else the program has to say: it goes into result.json's settings
};

// Runs the jobs in turn and returns the object that result.json holds (it is written after every job). Files in
// options.out: log.jsonl, result.json, checkpoint/ while it runs. Throws InputError for more parts than images, or when
// --resume finds the checkpoint of another experiment; RunError when a file cannot be written or the loss is not
// finite; Stopped when a signal asks to end, with the checkpoint written.
json run_experiment(const ExperimentOptions&, const Dataset&, const NetworkFactory&, const std::vector<Job>&);

// The settings of one of a plan's replicas as result.json shows them.
json settings_json(const Job&, const ExperimentOptions&, size_t replica);

// The results by method and number of parts: mean and spread of the final accuracy, NLL and ECE, and the time.
std::string table_of(const json& result);

}  // namespace baton
