// A file of settings.
#include "tools/baton/config.h"

#include <nlohmann/json.hpp>
#include <set>

#include "tests/fuzz/fuzz.h"

namespace baton {

FUZZ(config) {
  const auto settings = config_settings("config.json", {reinterpret_cast<const char*>(input.data()), input.size()});
  std::set<std::string> names;
  nlohmann::ordered_json object = nlohmann::ordered_json::object();
  for (const auto& [name, text] : settings) {
    FUZZ_CHECK(!name.empty() && name[0] != '-');
    FUZZ_CHECK(name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789-") == std::string::npos);
    FUZZ_CHECK(names.insert(name).second);
    object[name] = text;
  }
  // The same settings, all as texts, are the same settings.
  const std::string written = object.dump();
  if (written.size() <= 64 << 10) FUZZ_CHECK(config_settings("written", written) == settings);
}

}  // namespace baton
