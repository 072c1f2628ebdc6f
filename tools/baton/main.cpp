// baton: a network of one's own, made Bayesian, and kept up to date as data arrive.
#include <algorithm>
#include <map>

#include "engine/io/files.h"
#include "engine/io/program.h"
#include "tools/baton/command.h"
#include "tools/baton/config.h"

using namespace baton;

namespace {

// The arguments, followed by those settings of --config that the command line does not give itself.
std::vector<std::string> with_config(CLI::App& app, std::vector<std::string> arguments) {
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
      throw InputError(path + ": baton " + app.get_name() + " has no setting '" + name + "' (baton " + app.get_name() +
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
  std::map<CLI::App*, std::unique_ptr<Command>> commands;
  std::string config;  // read by with_config()
  bool as_json = false;
  for (auto make : {init_command, update_command, predict_command, evaluate_command, prune_command, inspect_command,
                    compare_command, export_command}) {
    std::unique_ptr<Command> command = make();
    CLI::App* sub = app.add_subcommand(command->name, command->summary);
    command->add_options(*sub);
    sub->add_option("--config", config, "a JSON file of settings: {\"epochs\": 5}; the command line goes before it");
    sub->add_flag("--json", as_json, "print one JSON object instead of text");
    sub->footer(std::string("Examples:\n") + command->examples);
    commands[sub] = std::move(command);
  }

  std::vector<std::string> arguments(argv + 1, argv + argc);
  CLI::App* chosen = nullptr;
  for (const auto& [sub, command] : commands)
    if (!arguments.empty() && arguments[0] == command->name) chosen = sub;
  if (chosen) arguments = with_config(*chosen, arguments);
  try {
    std::reverse(arguments.begin(), arguments.end());  // as CLI11 takes a vector
    app.parse(arguments);
  } catch (const CLI::CallForHelp& e) {
    app.exit(e);
    return 0;
  } catch (const CLI::ParseError& e) {
    throw InputError(std::string(e.what()) + (chosen ? " (baton " + chosen->get_name() + " --help lists the options)"
                                                     : " (baton --help lists the commands)"));
  }
  const json result = commands.at(chosen)->run();
  const std::string text = as_json ? json_text(result) + "\n" : commands.at(chosen)->text(result);
  if (fputs(text.c_str(), stdout) == EOF || fflush(stdout) != 0)
    throw RunError("the result could not be written to the standard output");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("baton", [&] { return run(argc, argv); });
}
