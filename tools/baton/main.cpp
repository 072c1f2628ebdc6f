// baton: a network of one's own, made Bayesian, and kept up to date as data arrive.
#include <algorithm>

#include "engine/io/files.h"
#include "engine/io/program.h"
#include "tools/baton/command.h"
#include "tools/baton/config.h"

using namespace baton;

namespace {

struct Entry {
  std::unique_ptr<Command> command;
  CLI::App* app = nullptr;
};

// The arguments, followed by those settings of --config that the command line does not give itself.
std::vector<std::string> with_config(CLI::App& app, const std::string& command, std::vector<std::string> arguments) {
  const auto is = [](const std::string& argument, const std::string& option) {
    return argument == option || argument.rfind(option + "=", 0) == 0;
  };
  const auto found =
      std::find_if(arguments.begin(), arguments.end(), [&](const std::string& a) { return is(a, "--config"); });
  if (found == arguments.end()) return arguments;
  const bool joined = *found != "--config";
  if (!joined && found + 1 == arguments.end()) return arguments;  // CLI11 says what is missing
  const std::string path = joined ? found->substr(std::string("--config=").size()) : *(found + 1);
  const std::vector<uint8_t> bytes = read_file(path, 1 << 20);
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  for (const auto& [name, value] : config_settings(path, text)) {
    const std::string option = "--" + name;
    const CLI::Option* known = app.get_option_no_throw(option);
    if (!known || name == "config" || name == "help")
      throw InputError(path + ": baton " + command + " has no setting '" + name + "' (baton " + command +
                       " --help lists the options)");
    const auto gives = [&](const std::string& argument) {  // by any of the option's names
      const std::vector<std::string>& names = known->get_lnames();
      return std::any_of(names.begin(), names.end(), [&](const std::string& n) { return is(argument, "--" + n); });
    };
    if (std::any_of(arguments.begin(), arguments.end(), gives)) continue;
    if (known->get_items_expected_max() == 0 && value != "true" && value != "false")
      throw InputError(path + ": '" + name + "' is " + value + "; expected true or false");
    arguments.push_back(option + "=" + value);
  }
  return arguments;
}

int run(int argc, char** argv) {
  CLI::App app{
      "Baton keeps a network up to date as data arrive. What it knows is a posterior over its weights, which is the "
      "prior\nof what it learns next, so that old data are never needed again.",
      "baton"};
  app.require_subcommand(1);
  app.footer(
      "Begin:    baton init --from lenet5.safetensors --kind ffg --pretrained-sd 0.05 --out model.safetensors\n"
      "Go on:    baton update --model model.safetensors --data new/ --out next.safetensors\n"
      "Use:      baton predict --model next.safetensors --data photos/ --out predictions.csv\n"
      "Each command's --help has more.");
  std::vector<Entry> entries;
  std::string config;  // read by with_config()
  bool as_json = false;
  for (auto make : {init_command, update_command, predict_command, evaluate_command, prune_command, inspect_command,
                    compare_command, export_command}) {
    Entry entry;
    entry.command = make();
    entry.app = app.add_subcommand(entry.command->name, entry.command->summary);
    entry.command->add_options(*entry.app);
    entry.app->add_option("--config", config,
                          "a JSON file of settings: {\"epochs\": 5}; the command line goes before it");
    entry.app->add_flag("--json", as_json, "print one JSON object instead of text");
    entry.app->footer(std::string("Examples:\n") + entry.command->examples);
    entries.push_back(std::move(entry));
  }

  std::vector<std::string> arguments(argv + 1, argv + argc);
  Entry* chosen = nullptr;
  if (!arguments.empty())
    for (Entry& e : entries)
      if (arguments[0] == e.command->name) chosen = &e;
  if (chosen) arguments = with_config(*chosen->app, chosen->command->name, arguments);
  try {
    std::reverse(arguments.begin(), arguments.end());  // as CLI11 takes a vector
    app.parse(arguments);
  } catch (const CLI::CallForHelp& e) {
    app.exit(e);
    return 0;
  } catch (const CLI::ParseError& e) {
    const std::string where = chosen ? "baton " + std::string(chosen->command->name) : "baton";
    throw InputError(std::string(e.what()) + " (" + where + " --help lists " +
                     (chosen ? "the options)" : "the commands)"));
  }
  const json result = chosen->command->run();
  const std::string text = as_json ? json_text(result) + "\n" : chosen->command->text(result);
  if (fputs(text.c_str(), stdout) == EOF || fflush(stdout) != 0)
    throw RunError("the result could not be written to the standard output");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("baton", [&] { return run(argc, argv); });
}
