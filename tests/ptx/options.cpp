#include "tests/ptx/options.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace ptx {

namespace {

[[noreturn]] void refuse(const char* variable, const std::string& value, const char* expected) {
  std::fprintf(stderr, "ptx: %s is '%s', expected %s\n", variable, value.c_str(), expected);
  std::_Exit(2);
}

Options read_environment() {
  Options o;
  if (const char* text = std::getenv("BATON_PTX_SEED"); text && *text) {
    char* end = nullptr;
    o.seed = std::strtoull(text, &end, 10);
    if (*end) refuse("BATON_PTX_SEED", text, "a number");
  }
  if (const char* text = std::getenv("BATON_PTX_PROFILE")) o.profile = text;
  if (const char* text = std::getenv("BATON_PTX_DISTURB")) {
    std::string list = text;
    while (!list.empty()) {
      const size_t comma = list.find(',');
      const std::string word = list.substr(0, comma);
      list = comma == std::string::npos ? "" : list.substr(comma + 1);
      if (word == "sums") o.disturb_sums = true;
      else if (word == "convolutions") o.disturb_convolutions = true;
      else if (word == "unsupported") o.refuse_first_algorithm = true;
      else refuse("BATON_PTX_DISTURB", text, "some of sums,convolutions,unsupported");
    }
  }
  return o;
}

}  // namespace

const Options& options() {
  static const Options read = read_environment();
  return read;
}

}  // namespace ptx
