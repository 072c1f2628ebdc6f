// What the commands of `baton` have in common. A command does its work and returns an object, which is what --json
// prints; the text for people is made of that object alone, so that both say the same.
#pragma once
#include <CLI/CLI.hpp>
#include <memory>
#include <string>

#include "tools/baton/format.h"
#include "trainers/model.h"
#include "trainers/predictor.h"

namespace baton {

// --data and what says more about it. `flag` may be another, as "--ood": then the others are "--ood-labels", ...
// foreign: images of other classes than the model's, whatever they are.
class DataArguments {
 public:
  explicit DataArguments(std::string flag = "--data", std::string split = "test", bool foreign = false)
      : flag_(flag), split_(split), foreign_(foreign) {}
  void add_to(CLI::App&, const std::string& what, bool required);
  bool given() const { return !path_.empty(); }
  // The images, read as the model takes them.
  OwnData load(const Model&, bool labels_needed) const;

 private:
  std::string companion(const std::string& name) const { return flag_ == "--data" ? "--" + name : flag_ + "-" + name; }
  std::string flag_, split_, path_, labels_, range_;
  bool foreign_;
};

// --samples, --mean, --seed, --head, --precision.
class PredictionArguments {
 public:
  void add_to(CLI::App&);
  int samples(const Model&) const;  // 0: at the mean; a point estimate has nothing else
  Precision precision(const Model&) const;
  // Sets "samples", "seed", "precision" and, where it is not the first, "head".
  void describe(json& result, const Model&) const;
  // Of all images, after a line on stderr. RunError where the network has overflowed.
  Predictions predict(Device&, const LoadedModel&, const Images&) const;

 private:
  int samples_ = 100, head_ = 0;
  bool mean_ = false;
  uint64_t seed_ = 0;
  std::string precision_;
};

class Command {
 public:
  const char* const name;
  const char* const summary;   // one line
  const char* const examples;  // the end of --help: whole command lines, each with what it does

  virtual ~Command() = default;
  virtual void add_options(CLI::App&) = 0;
  // Throws InputError for options that make no sense together, and whatever the work throws. Progress goes to stderr.
  virtual json run() = 0;
  virtual std::string text(const json& result) const = 0;

 protected:
  Command(const char* own_name, const char* own_summary, const char* own_examples)
      : name(own_name), summary(own_summary), examples(own_examples) {}
  CLI::Option* add_model(CLI::App& app) { return app.add_option("--model", model_, "the model")->required(); }
  CLI::Option* add_out(CLI::App&, const std::string& what);  // and --overwrite

  std::string model_, out_;
  bool overwrite_ = false;
  DataArguments data_;
  PredictionArguments prediction_;
};

std::unique_ptr<Command> init_command();
std::unique_ptr<Command> update_command();
std::unique_ptr<Command> predict_command();
std::unique_ptr<Command> evaluate_command();
std::unique_ptr<Command> prune_command();
std::unique_ptr<Command> inspect_command();
std::unique_ptr<Command> compare_command();
std::unique_ptr<Command> export_command();

// The options of a schema: --init-log-std for "init_log_std".
class SchemaArguments {
 public:
  // standards: --help shows the standard values.
  void add_to(CLI::App&, const Schema&, bool standards);
  // What the command line gives, by the names in the schema. Parsing throws InputError for a value that does not fit.
  const json& given() const { return given_; }

 private:
  json given_ = json::object();
};
// Of all kinds, each option once: its help names the kinds that have it, and its standard value is null where they
// differ in it.
Schema posterior_options();
Schema network_options();
// `baton init` alone decides it: the shape of a posterior and where it begins.
bool decided_by_init(const Option&);

// Refuses to write over a file that is there, but with --overwrite.
void check_free(const std::string& path, bool overwrite);

}  // namespace baton
