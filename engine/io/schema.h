// What can be set, described once: the options of a posterior, of a network, of a training. A description serves the
// command line (--init-log-std), JSON files and checkpoints ("init_log_std"), and the identity of a run.
#pragma once
#include <limits>
#include <string>
#include <vector>

#include "engine/io/runlog.h"

namespace baton {

struct Bounds {
  double least = -1e30, most = 1e30;
  bool above_least = false;  // least itself is not allowed
};
constexpr Bounds positive{0, 1e30, true}, not_negative{0, 1e30};

struct Option {
  enum class Type { whole, number, flag, choice, wholes };  // wholes: a list of whole numbers
  std::string name;                                         // as JSON has it
  std::string help;
  Type type;
  json standard;  // the value where none is given
  Bounds bounds{};
  std::vector<std::string> choices{};
  // Networks that train side by side may differ in it. Others decide the shape of a step.
  bool by_replica = false;
};
using Schema = std::vector<Option>;

Option whole_option(std::string name, int standard, Bounds, std::string help);
Option number_option(std::string name, double standard, Bounds, std::string help);
Option flag_option(std::string name, bool standard, std::string help);
Option choice_option(std::string name, std::string standard, std::vector<std::string> choices, std::string help);
Option wholes_option(std::string name, std::vector<int> standard, Bounds, std::string help);
Option by_replica(Option);

const Option* find_option(const Schema&, const std::string& name);  // null: there is none
// InputError "WHO is VALUE; expected ..." for a value of another type or beyond its bounds.
void check_option(const Option&, const json& value, const std::string& who);
// The value that a text gives, as the command line or a CSV table has it; checked.
json parse_option(const Option&, const std::string& text, const std::string& who);
std::string describe_option(const Option&);  // "a whole number from 1 to 256"
std::string option_flag(const Option&);      // "--flow-steps"

// `given` with the standard value of whatever it leaves out, in the schema's order. InputError for a name that the
// schema has not or a value that does not fit; `who` begins the message.
json complete_options(const Schema&, const json& given, const std::string& who);

}  // namespace baton
