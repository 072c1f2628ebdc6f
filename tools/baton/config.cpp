#include "tools/baton/config.h"

#include <nlohmann/json.hpp>
#include <set>

#include "engine/error.h"

namespace baton {

namespace {

using json = nlohmann::ordered_json;

std::string scalar(const std::string& who, const std::string& key, const json& value) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_number()) return value.dump();
  if (value.is_boolean()) return value.get<bool>() ? "true" : "false";
  throw InputError(who + ": '" + key + "' is " + (value.is_null() ? "null" : "neither a text nor a number"));
}

}  // namespace

std::vector<std::pair<std::string, std::string>> config_settings(const std::string& who, std::string_view text) {
  constexpr size_t longest = 64 << 10;
  if (text.size() > longest) throw InputError(who + ": longer than 64 KB, no file of settings");
  std::set<std::string> keys;
  std::string twice;
  const auto watch = [&](int depth, json::parse_event_t event, json& value) {
    if (event == json::parse_event_t::key && depth == 1 && !keys.insert(value.get<std::string>()).second)
      twice = value.get<std::string>();
    return true;
  };
  json object;
  try {
    object = json::parse(text, watch);
  } catch (const json::exception& e) {
    throw InputError(who + " is not JSON: " + e.what());
  }
  if (!object.is_object()) throw InputError(who + " is not a JSON object of settings");
  const auto fine = [](const std::string& key) {
    return !key.empty() && key[0] != '-' &&
           key.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789-") == std::string::npos;
  };
  std::vector<std::pair<std::string, std::string>> settings;
  for (const auto& [key, value] : object.items()) {
    if (!fine(key)) throw InputError(who + ": a setting's name is an option's without the dashes, as \"epochs\"");
    if (!value.is_array()) {
      settings.emplace_back(key, scalar(who, key, value));
      continue;
    }
    std::string joined;
    for (const json& element : value) joined += (joined.empty() ? "" : ",") + scalar(who, key, element);
    settings.emplace_back(key, joined);
  }
  if (!twice.empty()) throw InputError(who + ": '" + twice + "' is there twice");
  return settings;
}

}  // namespace baton
