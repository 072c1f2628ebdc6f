// What the commands of `baton` have in common. A command does its work and returns an object, which is what --json
// prints; the text for people is made of that object alone, so that both say the same.
#pragma once
#include <CLI/CLI.hpp>
#include <memory>
#include <string>

#include "trainers/model.h"
#include "trainers/predictor.h"

namespace baton {

class Command {
 public:
  virtual ~Command() = default;
  virtual const char* name() const = 0;
  virtual const char* summary() const = 0;   // one line
  virtual const char* examples() const = 0;  // the end of --help: whole command lines, each with what it does
  virtual void add_options(CLI::App&) = 0;
  // Throws InputError for options that make no sense together, and whatever the work throws. Progress goes to stderr.
  virtual json run() = 0;
  virtual std::string text(const json& result) const = 0;
};

std::unique_ptr<Command> init_command();
std::unique_ptr<Command> update_command();
std::unique_ptr<Command> predict_command();
std::unique_ptr<Command> evaluate_command();
std::unique_ptr<Command> prune_command();
std::unique_ptr<Command> inspect_command();
std::unique_ptr<Command> compare_command();
std::unique_ptr<Command> export_command();

// --data and what says more about it. `flag` may be another, as "--ood": then the others are "--ood-labels", ...
// foreign: images of other classes than the model's, whatever they are.
class DataArguments {
 public:
  explicit DataArguments(std::string flag = "--data", Split split = Split::test, bool foreign = false)
      : flag_(flag), split_(split), foreign_(foreign) {}
  CLI::Option* add_to(CLI::App&, const std::string& what, bool required);
  bool given() const { return !path_.empty(); }
  // The images, read as the model takes them.
  OwnData load(const Model&, bool labels_needed) const;

 private:
  std::string companion(const std::string& name) const { return flag_ == "--data" ? "--" + name : flag_ + "-" + name; }
  std::string flag_, path_, labels_, split_text_, range_;
  Split split_;
  bool foreign_;
};

// --samples, --mean, --seed.
class PredictionArguments {
 public:
  void add_to(CLI::App&);
  int samples(const Model&) const;  // 0: at the mean; a point posterior has nothing else
  uint64_t seed() const { return seed_; }
  // Of all images. Device memory is taken for one pass and given back.
  Predictions predict(Device&, const Model&, const Images&) const;

 private:
  int samples_ = 100;
  bool mean_ = false;
  uint64_t seed_ = 0;
};

// A table of texts with columns padded to their widest; the first column left-aligned, the others right.
std::string table(const std::vector<std::vector<std::string>>& rows);
std::string decimals(double value, int digits);        // "0.9931"; "-" for a NaN or a null
std::string percent(double fraction, int digits = 2);  // "99.31 %"
// "1,234,567"
std::string grouped(int64_t n);
std::string json_text(const json& j);  // two blanks a level, lists of numbers on one line
// Refuses to write over a file that is there, but with --overwrite; what: "--out".
void check_free(const std::string& path, bool overwrite);

}  // namespace baton
