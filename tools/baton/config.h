// --config file.json: {"epochs": 5, "json": true, "hidden": [400, 400]} says what --epochs 5 --json --hidden 400,400
// say. What stands on the command line goes before it.
#pragma once
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace baton {

// The settings of a JSON object, in its order: (name without dashes, text). true is "true", a list its elements joined
// by commas. `who` names the file. InputError: not JSON, not an object, a key twice or of other signs than a-z, 0-9 and
// '-', a value that is null, an object, or a list with anything but numbers and texts; more than 64 KB.
std::vector<std::pair<std::string, std::string>> config_settings(const std::string& who, std::string_view text);

}  // namespace baton
