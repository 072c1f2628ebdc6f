// What the programs of Bayesian gradient descent share: their options, the runs that they make of them, and their
// closing words.
#pragma once
#include <CLI/CLI.hpp>
#include <optional>

#include "bench/common/bil.h"
#include "trainers/task_experiment.h"

namespace baton {

// What a program settles for one of its methods; options that are given override it.
struct BgdMethod {
  double lr = 1;  // eta of BGD
  int batch = 0;  // 0: the preset's
  double momentum = 0.9, weight_decay = 0;
  Schedule schedule = Schedule::constant;
  double decay = 0.1, decay_epochs = 100;
  double strength = 0;  // SI: c; EWC: lambda
  double xi = 0.1;
};

struct BgdPreset {
  int batch = 128, train_limit = 0, test_limit = 0, samples = 10, draws = 10, bbb_draws = 1, at_once = 0,
      fisher_examples = 1000;
  double epochs = 10, judge_every = 0;  // epochs a task; between judgements
  double sigma = 0.05;
  BgdMethod bgd, sgd, adam, bbb, si, ewc;
  BbbSettings bbb_rule;
  Inference inference = Inference::sampled;
  bool augment = false, restart_optimizer = false;
  std::vector<double> pruned;
  BgdMethod& of(const std::string& method);  // InputError for an unknown one
};

class BgdOptions {
 public:
  std::string data, methods, seeds = "0", preset = "quick", out, out_prefix;
  bool resume = false, save_models = false;
  double checkpoint_seconds = 20;

  void add_to(CLI::App&, const std::string& known_methods, const std::string& preset_help);
  void apply(BgdPreset&) const;  // InputError for values that make no sense
  std::vector<std::string> method_names(const std::string& known) const;
  std::vector<uint64_t> seed_numbers() const { return numbers_of("--seeds", seeds); }
  std::filesystem::path out_folder() const { return out.empty() ? out_prefix + preset : out; }
  std::optional<std::filesystem::path> data_folder() const {
    return data.empty() ? std::nullopt : std::optional<std::filesystem::path>(data);
  }
  TaskExperimentOptions experiment(const std::string& name) const;
  bool sigma_given() const { return bool(*given_.sigma); }
  bool eta_given() const { return bool(*given_.eta); }

 private:
  struct Given {
    CLI::Option *epochs, *batch, *draws, *bbb_draws, *at_once, *sigma, *eta, *lr, *momentum, *decay_weights, *schedule,
        *decay, *decay_epochs, *strength, *xi, *samples, *inference, *judge, *pruned, *clamp, *least, *largest, *warn,
        *halt, *prior, *sd1, *sd2, *weight1, *fisher;
  } given_{};
  double epochs_ = 0, sigma_ = 0, judge_ = 0;
  int batch_ = 0, draws_ = 0, bbb_draws_ = 0, at_once_ = 0, samples_ = 0, train_limit_ = 0, test_limit_ = 0,
      fisher_ = 0;
  double eta_ = 0;
  BgdMethod given_method_;
  BbbSettings bbb_;
  std::string schedule_, inference_, pruned_, prior_;

 public:
  BgdSettings bounds;  // clamp, ratios: deviations from the paper, off by default
};

// One run: the preset's settings for `method`, with what the network and the sequence are.
TaskRun task_run(const BgdPreset&, const BgdOptions&, const std::string& method, const std::string& label,
                 uint64_t seed, double sigma, const NetworkFactory&, const TaskSequence&);

void print_head(const std::string& name, const std::string& title, const Dataset&, const std::string& preset);
// Table, sentences, files and plot.
void report_tasks(const json& result, const std::string& sentence, const Dataset&, const std::filesystem::path& out);
// Mean over seeds of a label's final accuracy, or NaN.
double final_accuracy_of(const json& result, const std::string& label);

}  // namespace baton
