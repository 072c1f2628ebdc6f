#include "engine/io/schema.h"

#include <cmath>

#include "engine/error.h"

namespace baton {

namespace {

std::string number_text(double x) {
  char text[32];
  snprintf(text, sizeof text, "%g", x);
  return text;
}

bool within(const Bounds& b, double x) { return (b.above_least ? x > b.least : x >= b.least) && x <= b.most; }

bool whole_fits(const Bounds& b, const json& value) { return value.is_number_integer() && within(b, double(value)); }

}  // namespace

Option whole_option(std::string name, int standard, Bounds bounds, std::string help) {
  return {std::move(name), std::move(help), Option::Type::whole, standard, bounds};
}
Option number_option(std::string name, double standard, Bounds bounds, std::string help) {
  return {std::move(name), std::move(help), Option::Type::number, standard, bounds};
}
Option flag_option(std::string name, bool standard, std::string help) {
  return {std::move(name), std::move(help), Option::Type::flag, standard};
}
Option choice_option(std::string name, std::string standard, std::vector<std::string> choices, std::string help) {
  return {std::move(name), std::move(help), Option::Type::choice, std::move(standard), {}, std::move(choices)};
}
Option wholes_option(std::string name, std::vector<int> standard, Bounds bounds, std::string help) {
  return {std::move(name), std::move(help), Option::Type::wholes, std::move(standard), bounds};
}
Option by_replica(Option option) {
  option.by_replica = true;
  return option;
}

const Option* find_option(const Schema& schema, const std::string& name) {
  for (const Option& option : schema)
    if (option.name == name) return &option;
  return nullptr;
}

std::string option_flag(const Option& option) {
  std::string flag = "--" + option.name;
  for (char& c : flag)
    if (c == '_') c = '-';
  return flag;
}

std::string describe_option(const Option& option) {
  const Bounds& b = option.bounds;
  const auto range = [&] {
    if (b.least <= -1e30) return std::string();
    const std::string from = number_text(b.least);
    if (b.most >= 1e30) return b.above_least ? " above " + from : " of at least " + from;
    return (b.above_least ? " above " + from + " and up to " : " from " + from + " to ") + number_text(b.most);
  };
  switch (option.type) {
    case Option::Type::whole:
      return "a whole number" + range();
    case Option::Type::number:
      return "a number" + range();
    case Option::Type::flag:
      return "true or false";
    case Option::Type::wholes:
      return "whole numbers" + range() + ", separated by commas";
    case Option::Type::choice:
      break;
  }
  std::string list;
  for (size_t i = 0; i < option.choices.size(); i++)
    list += (i == 0 ? "" : i + 1 == option.choices.size() ? " or " : ", ") + option.choices[i];
  return list;
}

void check_option(const Option& option, const json& value, const std::string& who) {
  bool fits = false;
  switch (option.type) {
    case Option::Type::whole:
      fits = whole_fits(option.bounds, value);
      break;
    case Option::Type::number:
      fits = value.is_number() && std::isfinite(double(value)) && within(option.bounds, double(value));
      break;
    case Option::Type::flag:
      fits = value.is_boolean();
      break;
    case Option::Type::choice:
      for (const std::string& choice : option.choices) fits |= value == choice;
      break;
    case Option::Type::wholes:
      fits = value.is_array();
      for (const json& one : value) fits = fits && whole_fits(option.bounds, one);
      break;
  }
  if (!fits)
    throw InputError(who + " is " + (value.is_string() ? "'" + value.get<std::string>() + "'" : value.dump()) +
                     "; expected " + describe_option(option));
}

json parse_option(const Option& option, const std::string& text, const std::string& who) {
  json value = text;
  if (option.type == Option::Type::wholes) value = json::parse("[" + text + "]", nullptr, false);
  else if (option.type == Option::Type::number) {  // "1e-3", ".5" and "5." too, which JSON does not know
    char* end = nullptr;
    const double number = std::strtod(text.c_str(), &end);
    if (!text.empty() && *end == 0) value = number;
  } else if (option.type != Option::Type::choice) value = json::parse(text, nullptr, false);
  if (value.is_discarded()) value = text;
  check_option(option, value, who);
  return value;
}

json complete_options(const Schema& schema, const json& given, const std::string& who) {
  for (const auto& [name, value] : given.items()) {
    const Option* option = find_option(schema, name);
    if (!option) throw InputError(who + " has no option '" + name + "'");
    check_option(*option, value, who + ": '" + name + "'");
  }
  json all = json::object();
  for (const Option& option : schema)
    all[option.name] = given.contains(option.name) ? given[option.name] : option.standard;
  return all;
}

}  // namespace baton
