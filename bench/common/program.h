// What the paper programs share: a preset that the command line changes, the runs made of it, and the closing words.
// A program says which preset it has and what its stages are; how to add one: bench/README.md.
#pragma once
#include <CLI/CLI.hpp>
#include <optional>

#include "trainers/experiment.h"

namespace baton {

// One of a program's methods.
struct Method {
  std::string name;                // "ffg", "bbb_mixture", "bgd_continuous"
  std::string kind;                // of the posterior
  json settings = json::object();  // options of the kind that differ from the standard
  int batch = 0;                   // 0: the preset's
};

// What the papers leave open, for one program: every field is an option of the command line.
struct Preset {
  int batch = 100, train_limit = 0, test_limit = 0;
  double epochs = 10;  // a stage
  bool augment = false;
  int samples = 100, stage_samples = 0;  // 0: as many after the stages before the last
  std::string inference;                 // empty: the average prediction
  double measure_every = 0;              // epochs
  std::string pruned;                    // fractions, as "0.5,0.95"
  std::vector<Method> methods;
};

// InputError for a name that the preset does not have; it lists those that it has.
Method& find_method(Preset&, const std::string& name);
// Those that are named of bgd, sgd, adam, bbb, bbb_mixture, si and ewc, with the settings that the papers share.
std::vector<Method> baseline_methods(const std::vector<std::string>& names);
void set_sigma(Preset&, double sigma);  // of all methods that draw their weights

class PaperProgram {
 public:
  // Reads --preset, which decides what the other options start from. InputError for an unknown one.
  PaperProgram(std::string name, const std::string& description, int argc, char** argv,
               Preset (*make_preset)(bool paper));

  std::string name, preset_name;
  Preset preset;
  CLI::App app;
  std::string methods, seeds = "0", parts, out, out_prefix;  // parts: "" where the program has none
  std::string precision = "fp32";
  std::optional<std::string> data;
  int at_once = 0;  // runs that train side by side; 0: what suits the device
  bool resume = false, save_models = false;
  double checkpoint_seconds = 20;

  // Adds every option that the preset and its methods have; `methods`, `parts` and `out_prefix` are set before. Options
  // of the kinds are bound to all methods that have them (--beta), and hidden ones to each alone (--ffg-beta).
  void add_options(const std::string& preset_help);
  // False: help was asked for and printed. InputError for bad options.
  bool parse();

  std::vector<uint64_t> seed_numbers() const;
  std::vector<int> part_numbers(int images) const;  // InputError for more parts than images
  std::vector<Method> chosen_methods();             // in the order of --methods; InputError for an unknown one
  // The set as find_mnist() or find_cifar10() finds it, cut short by the preset's limits.
  ExperimentData find_data(Dataset (*find)(const std::optional<std::filesystem::path>&, uint64_t, Limits)) const;
  bool paper() const { return preset_name == "paper"; }
  std::filesystem::path out_folder() const { return out.empty() ? out_prefix + preset_name : out; }
  bool given(const std::string& option) const { return app.get_option(option)->count() > 0; }
  // A run of one method: the preset's settings, the stages still to be filled in.
  ExperimentRun make_run(const Method&, const std::string& label, const NetworkSpec&, uint64_t seed) const;
  ExperimentOptions experiment() const;

 private:
  void add_method_options();
  int argc_;
  char** argv_;
};

// The value of --preset, "quick" without it. It is read before all other options, because it decides their defaults.
// InputError for a value other than quick and paper.
std::string find_preset(int argc, char** argv);
// False: help was asked for and printed. InputError for bad options.
bool parse_options(CLI::App&, int argc, char** argv);
// Numbers separated by commas; InputError naming the option.
std::vector<std::string> split_list(const std::string& text);
std::vector<uint64_t> parse_wholes(const std::string& option, const std::string& text);  // from 0 on
std::vector<double> parse_numbers(const std::string& option, const std::string& text, Bounds);

std::string upper(std::string name);  // "BGD"
std::string format_text(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Prints what the program learns ("bil_mnist: MNIST, 60000 training and 10000 test images, preset paper"), trains and
// measures the runs, and reports the result with the sentence made of it. Returns the program's exit status.
int run_and_report(const PaperProgram&, const std::string& title, const ExperimentOptions&, const ExperimentData&,
                   std::vector<ExperimentRun>, const std::function<std::string(const json&)>& sentence);
// Table, sentence, files and plot.
void report(const json& result, const std::string& sentence, const Dataset&, const std::filesystem::path& out);
// What every paper program ends with: a word on generated data, the files' names, and the plot.
void print_files(const Dataset&, const std::filesystem::path& out);
// Mean over seeds of a label's final accuracy (parts 0: of any number of parts), or NaN.
double final_accuracy(const json& result, const std::string& label, int parts = 0);

}  // namespace baton
