// A whole experiment: a list of runs (method, stages, seed), each trained stage by stage and measured on test images,
// with a run log, a progress line, and checkpoints from which a killed run goes on to the very figures it would have
// had. Runs that follow one another can train side by side, as replicas of one pass, with the figures that each would
// have alone.
#pragma once
#include <filesystem>
#include <optional>

#include "engine/io/dataset.h"
#include "trainers/inference.h"
#include "trainers/trainer.h"

namespace baton {

struct ExperimentRun {
  std::string method, label;  // "ffg_laplace"; "BGD 2x400"; the label is what tables and results tell runs apart by
  NetworkSpec network;
  Stages stages;
  TrainingSettings training;   // of one replica
  json more = json::object();  // further settings, as result.json shows them
  int samples = 100;           // draws of the weights in a prediction after the last stage
  int stage_samples = 100;     // and after the stages before it
  // Accuracies by every way of inference, test_accuracy being this one's; none: the average prediction's alone.
  std::optional<Inference> inference{};
  double measure_every = 0;    // epochs between two measurements within a stage; 0: at its end
  int checks = 1;              // of a continuous stage: measured so often
  std::vector<double> pruned;  // fractions of the weights, after the last stage
  bool histogram = false;      // of sigma, in the result
};

struct ExperimentOptions {
  std::string experiment;  // "bil_mnist"
  std::string preset;
  std::filesystem::path out;
  bool resume = false;
  bool save_models = false;  // every trained model (and its pruned forms), as `baton` reads them
  // How many runs train side by side, where they follow one another and have the network, the batch, the epochs, the
  // augmentation and the settings in common that are not a replica's own; 0: one on the CPU, all on the GPU. One where
  // models are saved.
  int at_once = 0;
  double checkpoint_seconds = 20;  // a checkpoint at the end of the first epoch after so long, and after measurements
  Normalisation normalisation = unit_range;
  Precision precision = Precision::fp32;
  json extra = json::object();  // what else the program has to say: it goes into result.json's settings
};

// The images that are learned, and each task's test images (one set for all of them where the stages are parts of one
// task, or tasks are orders of the pixels).
struct ExperimentData {
  Dataset set;  // `train`: with labels as the tasks' heads count them; `test` is not used
  std::vector<Images> test;
};

// Runs all and returns the object that result.json holds (it is written after every run, or after those that trained
// side by side). Files in options.out: log.jsonl, result.json, checkpoint/ while it runs, models where save_models is
// set. Throws InputError for runs that make no sense, or when --resume finds the checkpoint of another experiment;
// RunError when a file cannot be written, a loss is not finite, or sigma diverged; Stopped when a signal asks to end,
// with the checkpoint written.
json run_experiment(const ExperimentOptions&, const ExperimentData&, const std::vector<ExperimentRun>&);

// A run's settings as result.json shows them.
json describe_settings(const ExperimentRun&);

// The results by label and number of parts, means over seeds: final accuracy, NLL, calibration error, time; or the test
// error by every way of inference where the runs have them.
std::string format_table(const json& result);

}  // namespace baton
