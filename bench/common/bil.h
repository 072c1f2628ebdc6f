// What the programs of Bayesian incremental learning share: their options, their presets' form, their jobs and their
// closing words.
#pragma once
#include <CLI/CLI.hpp>
#include <map>

#include "trainers/experiment.h"

namespace baton {

// What the paper leaves open, for one program.
struct BilPreset {
  int batch = 100, train_limit = 0, test_limit = 0, samples = 100, stage_samples = 100;
  double epochs = 10, ft_converged_epochs = 0;
  bool augment = false;
  ScaleRule scale_rule = ScaleRule::adam;
  PosteriorOptions posterior;          // what CFG and MNF have beside the rest
  TrainingSettings ft, ffg, cfg, mnf;  // by family
  TrainingSettings& of(Family);
};
void set_cifar(BilPreset&);  // what bil_cifar10 and bil_cifar5p5 share

std::vector<std::string> split_list(const std::string& text);  // at commas
// Whole numbers from 0 on, separated by commas; InputError naming the option.
std::vector<uint64_t> numbers_of(const std::string& option, const std::string& text);
// Finite numbers, separated by commas; InputError naming the option where one is not `allowed`, and what it should be.
std::vector<double> decimals_of(const std::string& option, const std::string& text, bool (*allowed)(double),
                                const char* wanted);

// The options of all these programs: add them to the command line, parse, then apply them to the preset.
class BilOptions {
 public:
  std::string data, methods, parts = "1,10", seeds = "0", preset = "quick", out;
  std::string out_prefix = "results/";  // of the default folder, which ends in the preset's name
  bool resume = false;
  int at_once = 0;
  double checkpoint_seconds = 20;

  // ft_converged: the program can run FT at convergence too.
  void add_to(CLI::App&, const std::string& known_methods, const std::string& preset_help, bool ft_converged);
  void apply(BilPreset&) const;  // InputError for values that make no sense
  std::vector<int> part_numbers(int most) const;
  std::vector<uint64_t> seed_numbers() const { return numbers_of("--seeds", seeds); }
  std::filesystem::path out_folder() const { return out.empty() ? out_prefix + preset : out; }
  std::optional<std::filesystem::path> data_folder() const;
  ExperimentOptions experiment(const std::string& name, const BilPreset&) const;

 private:
  struct Given {
    CLI::Option *epochs, *ft_converged, *batch, *lr, *schedule, *rule, *lr_scale, *prior, *init, *beta, *warmup,
        *samples, *stage_samples, *augment, *groups, *moments, *flow, *flow_steps, *flow_hidden, *z, *fixed_base,
        *path_gradient, *z_sd;
  } given_{};
  double epochs_ = 0, ft_converged_epochs_ = 0, z_sd_ = 0.1;
  int batch_ = 0, train_limit_ = 0, test_limit_ = 0, samples_ = 0, stage_samples_ = 0;
  std::string schedule_, scale_rule_, flow_, z_;
  bool augment_ = false;
  TrainingSettings settings_;
  PosteriorOptions posterior_;
};

// A program that learns one data set in parts: `bil_mnist`, `bil_cifar10`.
struct BilProgram {
  std::string name, title, description, methods, preset_help, out_prefix = "results/";
  BilPreset (*preset)(const std::string&);
  Dataset (*find)(const std::optional<std::filesystem::path>&, Limits);
  Normalisation (*normalisation)(const Dataset&);
  NetworkFactory network;
};
int run_bil(const BilProgram&, int argc, char** argv);

void parse(CLI::App&, int argc, char** argv);  // InputError for bad options; prints help and throws HelpShown
struct HelpShown {};

// Table, sentences, files and plot.
void report(const json& result, const std::string& sentence, const Dataset&, const std::filesystem::path& out);
// What every paper program ends with: a word on generated data, the files' names, and the plot.
void print_files(const Dataset&, const std::filesystem::path& out);
// Mean final accuracy of a method at T parts, or NaN.
double final_accuracy(const json& result, const std::string& method, int parts);

}  // namespace baton
