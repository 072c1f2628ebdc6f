#include "bench/common/program.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

#include "engine/io/files.h"

namespace baton {

namespace {

std::string list_methods(const Preset& preset) {
  return CLI::detail::join(
      preset.methods, [](const Method& m) { return m.name; }, ", ");
}

}  // namespace

std::vector<std::string> split_list(const std::string& text) {
  std::vector<std::string> parts(1);
  for (char c : text)
    if (c == ',') parts.emplace_back();
    else parts.back() += c;
  return parts;
}

std::vector<uint64_t> parse_wholes(const std::string& option, const std::string& text) {
  std::vector<uint64_t> list;
  for (const std::string& word : split_list(text)) {
    if (word.empty() || word.size() > 18 || word.find_first_not_of("0123456789") != std::string::npos)
      throw InputError(option + ": '" + word + "' is not a whole number from 0 on");
    list.push_back(std::stoull(word));
  }
  return list;
}

std::vector<double> parse_numbers(const std::string& option, const std::string& text, Bounds bounds) {
  std::vector<double> list;
  const Option number = number_option(option, 0, bounds, "");
  for (const std::string& word : split_list(text)) list.push_back(parse_option(number, word, option));
  return list;
}

std::string upper(std::string name) {
  for (char& c : name) c = char(toupper(static_cast<unsigned char>(c)));
  return name;
}

std::string format_text(const char* format, ...) {
  va_list values;
  va_start(values, format);
  char text[500];
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  return text;
}

Method& find_method(Preset& preset, const std::string& name) {
  for (Method& m : preset.methods)
    if (m.name == name) return m;
  throw InputError("unknown method '" + name + "', expected some of " + list_methods(preset));
}

std::vector<Method> baseline_methods(const std::vector<std::string>& names) {
  std::vector<Method> all;
  for (const std::string& name : names) {
    Method m{name, name.substr(0, name.find('_')), json::object()};  // "bgd_continuous" is a bgd
    if (name == "bbb_mixture") m.settings["prior"] = "mixture";
    all.push_back(m);
  }
  return all;
}

void set_sigma(Preset& preset, double sigma) {
  for (Method& m : preset.methods)
    if (m.kind == "bgd" || m.kind == "bbb") m.settings["sigma"] = sigma;
}

std::string find_preset(int argc, char** argv) {
  std::string preset = "quick";
  for (int i = 1; i < argc; i++) {
    const std::string argument = argv[i];
    if (argument == "--preset" && i + 1 < argc) preset = argv[i + 1];
    if (argument.starts_with("--preset=")) preset = argument.substr(9);
  }
  if (preset != "quick" && preset != "paper") throw InputError("unknown preset '" + preset + "': quick or paper");
  return preset;
}

PaperProgram::PaperProgram(std::string program_name, const std::string& description, int argc, char** argv,
                           Preset (*make_preset)(bool paper))
    : name(std::move(program_name)),
      preset_name(find_preset(argc, argv)),
      preset(make_preset(paper())),
      app(description),
      argc_(argc),
      argv_(argv) {}

void PaperProgram::add_options(const std::string& preset_help) {
  Preset& p = preset;
  const auto not_negative_number = CLI::NonNegativeNumber;
  app.option_defaults()->always_capture_default();
  auto* what = app.add_option_group("What to run");
  what->add_option("--preset", preset_name, preset_help);
  what->add_option("--methods", methods, "of " + list_methods(p));
  if (!parts.empty()) what->add_option("--parts", parts, "numbers of parts T");
  what->add_option("--seeds", seeds, "of order, weights, noise and tasks");
  what->add_option("--data", data, "folder with the set's files (else $BATON_DATA, ./data, generated)");
  what->add_option("--train-limit", p.train_limit, "use the first N training images (0: all)")
      ->check(not_negative_number);
  what->add_option("--test-limit", p.test_limit, "use the first N test images (0: all)")->check(not_negative_number);
  what->add_option("--out", out, "folder of the results [" + out_prefix + "PRESET]");
  what->add_flag("--resume", resume, "go on from the checkpoint in --out");
  what->add_flag("--save-models", save_models, "write every trained model into --out, as baton reads it");
  auto* training = app.add_option_group("Training");
  training->add_option("--epochs", p.epochs, "of each stage")->check(CLI::Range(1e-9, 1e6));
  training->add_option("--batch", p.batch, "examples a step")->check(CLI::Range(1, 1 << 20));
  training->add_flag("--augment,!--no-augment", p.augment, "random flips and padded crops");
  training->add_option("--precision", precision,
                       "of the layers' products, in predictions too: fp32, or tf32 as tensor cores take them");
  add_method_options();
  auto* rest = app.add_option_group("Prediction and running");
  rest->add_option("--samples", p.samples, "draws of the weights in the final prediction")->check(not_negative_number);
  rest->add_option("--stage-samples", p.stage_samples, "draws after the stages before the last (0: as many)")
      ->check(not_negative_number);
  if (!p.inference.empty())
    rest->add_option("--inference", p.inference, "what test_accuracy is: map, sampled, softmax or committee");
  rest->add_option("--measure-every,--judge-every", p.measure_every,
                   "epochs between two measurements within a stage (0: at its end)")
      ->check(not_negative_number);
  rest->add_option("--prune", p.pruned, "fractions of the weights to prune at the end, as 0.5,0.95");
  if (std::all_of(p.methods.begin(), p.methods.end(),
                  [](const Method& m) { return find_posterior(m.kind).many_replicas; }))
    rest->add_option("--at-once", at_once,
                     "runs of a kind (parts and seeds) that train side by side [1 on the CPU, all on the GPU]")
        ->check(not_negative_number)
        ->default_str("");
  rest->add_option("--checkpoint-seconds", checkpoint_seconds, "between checkpoints, at the ends of epochs")
      ->check(not_negative_number);
  app.footer("Options of the methods can be given to one method alone, as --" + preset.methods[0].name +
             "-schedule linear.");
}

// An option for all methods that have it comes first, so that one for a method alone overrides it.
void PaperProgram::add_method_options() {
  const auto add = [](CLI::App* group, const std::vector<Method*>& targets, const Option& option,
                      const std::string& flag) {
    const auto set = [=](const std::string& text) {
      const json value = parse_option(option, text, flag);
      for (Method* m : targets) m->settings[option.name] = value;
    };
    if (option.type == Option::Type::flag)
      return group->add_flag_function(
          flag + ",!--no-" + flag.substr(2), [set](int64_t given) { set(given > 0 ? "true" : "false"); }, option.help);
    return group->add_option_function<std::string>(flag, set, option.help)->type_name("");
  };
  CLI::App* of_all = app.add_option_group("Methods");
  CLI::App* of_each = app.add_option_group("")->group("");
  std::vector<std::string> done;
  for (Method& first : preset.methods)
    for (const Option& option : find_posterior(first.kind).options) {
      if (std::find(done.begin(), done.end(), option.name) != done.end()) continue;
      done.push_back(option.name);
      std::vector<Method*> targets;
      std::string standard;
      for (Method& m : preset.methods)
        if (const Option* own = find_option(find_posterior(m.kind).options, option.name)) {
          targets.push_back(&m);
          const json value = m.settings.value(option.name, own->standard);
          const std::string text = value.is_string() ? value.get<std::string>() : value.dump();
          if (standard.empty()) standard = text;
          else if (standard != text) standard = "by method";
        }
      add(of_all, targets, option, option_flag(option))->default_str(standard);
    }
  for (Method& m : preset.methods)
    for (const Option& option : find_posterior(m.kind).options)
      add(of_each, {&m}, option, "--" + m.name + "-" + option_flag(option).substr(2));
}

bool parse_options(CLI::App& app, int argc, char** argv) {
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp& e) {
    app.exit(e);
    return false;
  } catch (const CLI::ParseError& e) {
    throw InputError(std::string(e.what()) + " (--help lists the options)");
  }
  return true;
}

bool PaperProgram::parse() {
  if (!parse_options(app, argc_, argv_)) return false;
  if (given("--batch"))
    for (Method& m : preset.methods) m.batch = 0;
  if (given("--samples") && !given("--stage-samples")) preset.stage_samples = 0;
  if (preset.samples < 1 && !preset.inference.empty()) throw InputError("--samples must be at least 1");
  // A posterior of each method over some network: options that do not go together are refused before anything is
  // learned or written.
  Device device;
  device.set_precision(parse_precision(precision));
  Arena arena;
  const std::unique_ptr<Network> some = make_network(network_spec("lenet5"));
  for (const Method& m : chosen_methods()) {
    make_posterior(device, arena, some->layout(), m.kind, {m.settings});
    const int batch = m.batch ? m.batch : preset.batch, groups = m.settings.value("groups", 1);
    if (batch % groups != 0)
      throw InputError("--groups: a batch of " + std::to_string(batch) + " does not divide into " +
                       std::to_string(groups));
  }
  seed_numbers();
  return true;
}

std::vector<uint64_t> PaperProgram::seed_numbers() const { return parse_wholes("--seeds", seeds); }

std::vector<int> PaperProgram::part_numbers(int images) const {
  std::vector<int> list;
  for (uint64_t t : parse_wholes("--parts", parts)) {
    if (t < 1) throw InputError("--parts: there must be at least one part, not 0");
    if (t > uint64_t(images))
      throw InputError("--parts: " + std::to_string(t) + " parts of " + std::to_string(images) + " images");
    list.push_back(int(t));
  }
  return list;
}

std::vector<Method> PaperProgram::chosen_methods() {
  std::vector<Method> chosen;
  for (const std::string& wanted : split_list(methods)) chosen.push_back(find_method(preset, wanted));
  return chosen;
}

ExperimentData PaperProgram::find_data(Dataset (*find)(const std::optional<std::filesystem::path>&, uint64_t,
                                                       Limits)) const {
  Limits limits;
  limits.train = preset.train_limit;
  limits.test = preset.test_limit;
  const Dataset set = find(data, 0, limits);
  return {set, {set.test}};
}

ExperimentRun PaperProgram::make_run(const Method& method, const std::string& label, const NetworkSpec& network,
                                     uint64_t seed) const {
  ExperimentRun run;
  run.method = method.name;
  run.label = label;
  run.network = network;
  run.training.kind = method.kind;
  run.training.replicas = {{seed, method.settings}};
  run.training.batch = method.batch ? method.batch : preset.batch;
  run.training.epochs = preset.epochs;
  run.samples = preset.samples;
  run.stage_samples = preset.stage_samples ? preset.stage_samples : preset.samples;
  if (!preset.inference.empty()) run.inference = parse_inference(preset.inference);
  run.measure_every = preset.measure_every;
  if (!preset.pruned.empty()) run.pruned = parse_numbers("--prune", preset.pruned, {0, 1});
  return run;
}

ExperimentOptions PaperProgram::experiment() const {
  ExperimentOptions o;
  o.experiment = name;
  o.preset = preset_name;
  o.out = out_folder();
  o.resume = resume;
  o.save_models = save_models;
  o.at_once = at_once;
  o.checkpoint_seconds = checkpoint_seconds;
  o.precision = parse_precision(precision);
  return o;
}

double final_accuracy(const json& result, const std::string& label, int parts) {
  std::vector<double> values;
  for (const json& run : result["runs"])
    if (run["label"] == label && (parts == 0 || run["parts"] == parts)) values.push_back(run["final_test_accuracy"]);
  return mean_and_spread(values).mean;
}

int run_and_report(const PaperProgram& program, const std::string& title, const ExperimentOptions& options,
                   const ExperimentData& data, std::vector<ExperimentRun> runs,
                   const std::function<std::string(const json&)>& sentence) {
  const Dataset& set = data.set;
  int test_images = 0;
  for (const Images& test : data.test) test_images += test.count;
  printf("%s: %s, %d training and %d test images%s, preset %s\n", program.name.c_str(),
         set.generated ? ("GENERATED images (no " + title + " was found)").c_str() : title.c_str(), set.train.count,
         test_images, set.path.empty() ? "" : (" from " + set.path).c_str(), program.preset_name.c_str());
  fflush(stdout);
  for (ExperimentRun& run : runs) {
    if (run.training.kind != "bgd") continue;
    // Beside the settings: eta sigma^2 B, which tells whether sigma stays stable.
    const json s = complete_options(find_posterior("bgd").options, run.training.replicas[0].settings, "bgd");
    run.more["step_scale"] = double(s["eta"]) * double(s["sigma"]) * double(s["sigma"]) * run.training.batch;
  }
  const json result = run_experiment(options, data, runs);
  report(result, sentence(result), set, options.out);
  return 0;
}

void report(const json& result, const std::string& sentence, const Dataset& set, const std::filesystem::path& out) {
  printf("\n%s\n%s\n", format_table(result).c_str(), sentence.c_str());
  print_files(set, out);
}

void print_files(const Dataset& set, const std::filesystem::path& out) {
  if (set.generated)
    printf("These are GENERATED images, not %s: the figures do not compare with published ones.\n",
           set.name == "mnist" ? "MNIST" : "CIFAR-10");
  printf("\nResults: %s\nLog:     %s\n", (out / "result.json").c_str(), (out / "log.jsonl").c_str());
  fflush(stdout);
  const std::filesystem::path plot = in_build_folder("tools/plot");
  if (!std::filesystem::exists(plot))
    printf("The plot was not drawn, for %s is not there; tools/plot %s draws it.\n", plot.c_str(), out.c_str());
  else if (std::system(("'" + plot.string() + "' '" + out.string() + "'").c_str()) != 0)
    printf("The plot was not drawn; tools/plot %s draws it.\n", out.c_str());
}

}  // namespace baton
