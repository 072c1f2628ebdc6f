#include "bench/common/bil.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "engine/io/files.h"
#include "trainers/parse.h"

namespace baton {

TrainingSettings& BilPreset::of(Family f) {
  return f == Family::point ? ft : f == Family::gaussian ? ffg : f == Family::channel ? cfg : mnf;
}

void set_cifar(BilPreset& p) {
  p.ffg.lr = 1e-3;
  p.ffg.lr_scale = 1e-2;
  p.ffg.prior_sd = 1;
  p.ffg.init_log_std = -5;
  p.ffg.beta = 0.05;
  p.ffg.schedule = Schedule::linear;
  p.cfg = p.mnf = p.ffg;
  p.ft.lr = 1e-3;
  p.ft.schedule = Schedule::linear;
  p.batch = 128;
}

std::vector<std::string> split_list(const std::string& text) {
  std::vector<std::string> parts(1);
  for (char c : text)
    if (c == ',') parts.emplace_back();
    else parts.back() += c;
  return parts;
}

std::vector<uint64_t> numbers_of(const std::string& option, const std::string& text) {
  std::vector<uint64_t> list;
  for (const std::string& word : split_list(text)) {
    size_t used = 0;
    long long value = -1;
    try {
      value = std::stoll(word, &used);
    } catch (const std::exception&) {
    }
    if (word.empty() || used != word.size() || value < 0)
      throw InputError(option + ": '" + word + "' is not a whole number from 0 on");
    list.push_back(uint64_t(value));
  }
  return list;
}

std::vector<double> decimals_of(const std::string& option, const std::string& text, bool (*allowed)(double),
                                const char* wanted) {
  std::vector<double> list;
  for (const std::string& word : split_list(text)) {
    size_t used = 0;
    double value = NAN;
    try {
      value = std::stod(word, &used);
    } catch (const std::exception&) {
    }
    if (word.empty() || used != word.size() || !std::isfinite(value) || !allowed(value))
      throw InputError(option + ": '" + word + "' is not " + wanted);
    list.push_back(value);
  }
  return list;
}

void BilOptions::add_to(CLI::App& app, const std::string& known_methods, const std::string& preset_help,
                        bool ft_converged) {
  auto* what = app.add_option_group("What to run");
  what->add_option("--preset", preset, preset_help)->capture_default_str();
  what->add_option("--methods", methods, "of " + known_methods)->capture_default_str();
  what->add_option("--parts", parts, "numbers of parts T")->capture_default_str();
  what->add_option("--seeds", seeds, "of split, weights, order and noise")->capture_default_str();
  what->add_option("--data", data, "folder with the set's files (else $BATON_DATA, ./data, ../shared/data, generated)");
  what->add_option("--train-limit", train_limit_, "use the first N training images");
  what->add_option("--test-limit", test_limit_, "use the first N test images");
  what->add_option("--out", out, "folder of the results [" + out_prefix + "PRESET]");
  what->add_flag("--resume", resume, "go on from the checkpoint in --out");
  auto* training = app.add_option_group("Training");
  given_.epochs = training->add_option("--epochs", epochs_, "of each stage");
  if (ft_converged)
    given_.ft_converged =
        training->add_option("--ft-converged-epochs", ft_converged_epochs_,
                             "where T > 1, also run FT with so many epochs a stage, as ft_converged (0: do not)");
  given_.batch = training->add_option("--batch", batch_, "examples a step");
  given_.lr = training->add_option("--lr", settings_.lr, "Adam's step size for the means");
  given_.schedule =
      training->add_option("--schedule", schedule_, "of the step sizes in a stage: constant, linear, cosine");
  given_.rule = training->add_option("--scale-rule", scale_rule_, "how log sigma moves: adam or natural (gradient)");
  given_.lr_scale = training->add_option("--lr-scale", settings_.lr_scale, "step size of log sigma");
  given_.prior = training->add_option("--prior-sd", settings_.prior_sd, "of the first prior");
  given_.init = training->add_option("--init-log-std", settings_.init_log_std, "initial log sigma");
  given_.beta = training->add_option("--beta", settings_.beta, "weight of the KL");
  given_.warmup = training->add_option("--warmup-epochs", settings_.warmup_epochs,
                                       "over which the KL's weight grows, in each stage");
  given_.augment = training->add_flag("--augment,!--no-augment", augment_, "random flips and padded crops");
  auto* families = app.add_option_group("CFG and MNF");
  given_.groups = families->add_option("--groups", posterior_.groups,
                                       "groups of a batch that draw their own weights (cfg) or z (mnf)");
  given_.moments = families->add_flag("--cfg-moments", posterior_.moments,
                                      "sample cfg's outputs from their exact marginal moments, not its weights (slow)");
  given_.flow = families->add_option("--flow", flow_, "of z: realnvp (gated), affine or planar");
  given_.flow_steps = families->add_option("--flow-steps", posterior_.flow_steps, "of the flow");
  given_.flow_hidden = families->add_option("--flow-hidden", posterior_.flow_hidden, "units of a step's hidden layer");
  given_.z = families->add_option("--z", z_, "of convolutions: per-channel (filter and channel) or per-filter");
  given_.z_sd = families->add_option("--z-sd", z_sd_, "initial standard deviation of z");
  given_.fixed_base = families->add_flag("--fixed-base", posterior_.fixed_base, "do not learn the flow's base");
  given_.path_gradient =
      families->add_flag("--path-gradient", posterior_.path_gradient, "drop the score term of ln q(z)");
  auto* rest = app.add_option_group("Prediction and running");
  given_.samples = rest->add_option("--samples", samples_, "draws of the weights in the final prediction");
  given_.stage_samples = rest->add_option("--stage-samples", stage_samples_, "draws after the stages before the last");
  rest->add_option("--at-once", at_once, "seeds that train side by side [1 on the CPU, all on the GPU]");
  rest->add_option("--checkpoint-seconds", checkpoint_seconds, "between checkpoints, at the ends of epochs")
      ->capture_default_str();
}

void BilOptions::apply(BilPreset& p) const {
  if (*given_.epochs) p.epochs = epochs_;
  if (given_.ft_converged && *given_.ft_converged) p.ft_converged_epochs = ft_converged_epochs_;
  if (*given_.batch) p.batch = batch_;
  if (train_limit_) p.train_limit = train_limit_;
  if (test_limit_) p.test_limit = test_limit_;
  if (*given_.samples) p.samples = samples_;
  if (*given_.stage_samples) p.stage_samples = stage_samples_;
  else if (*given_.samples) p.stage_samples = samples_;
  if (*given_.augment) p.augment = augment_;
  if (*given_.rule) p.scale_rule = scale_rule_of(scale_rule_);
  if (*given_.groups) p.posterior.groups = posterior_.groups;
  if (*given_.moments) p.posterior.moments = posterior_.moments;
  if (*given_.flow) p.posterior.flow = flow_kind_of(flow_);
  if (*given_.flow_steps) p.posterior.flow_steps = posterior_.flow_steps;
  if (*given_.flow_hidden) p.posterior.flow_hidden = posterior_.flow_hidden;
  if (*given_.fixed_base) p.posterior.fixed_base = posterior_.fixed_base;
  if (*given_.path_gradient) p.posterior.path_gradient = posterior_.path_gradient;
  if (*given_.z) {
    if (z_ != "per-filter" && z_ != "per-channel")
      throw InputError("unknown --z '" + z_ + "': per-channel or per-filter");
    p.posterior.z_per_filter = z_ == "per-filter";
  }
  if (*given_.z_sd) {
    if (!(z_sd_ > 0)) throw InputError("--z-sd must be positive");
    p.posterior.z_log_std = float(std::log(z_sd_));
  }
  for (Family f : {Family::point, Family::gaussian, Family::channel, Family::multiplicative}) {
    TrainingSettings& s = p.of(f);
    if (*given_.lr) s.lr = settings_.lr;
    if (*given_.schedule) s.schedule = schedule_of(schedule_);
    if (*given_.lr_scale) s.lr_scale = settings_.lr_scale;
    if (*given_.prior) s.prior_sd = settings_.prior_sd;
    if (*given_.init) s.init_log_std = settings_.init_log_std;
    if (*given_.beta) s.beta = settings_.beta;
    if (*given_.warmup) s.warmup_epochs = settings_.warmup_epochs;
    if (!(s.prior_sd > 0)) throw InputError("--prior-sd must be positive");
    if (!(s.beta >= 0)) throw InputError("--beta cannot be negative");
  }
  if (p.samples < 0 || p.stage_samples < 0 || train_limit_ < 0 || test_limit_ < 0 || at_once < 0)
    throw InputError("--samples, --stage-samples, --train-limit, --test-limit and --at-once cannot be negative");
  if (!(p.epochs > 0)) throw InputError("--epochs must be positive");
  if (p.batch < 1) throw InputError("--batch must be at least 1");
  if (p.posterior.groups < 1 || p.batch % p.posterior.groups != 0)
    throw InputError("--groups: a batch of " + std::to_string(p.batch) + " does not divide into " +
                     std::to_string(p.posterior.groups));
  if (p.posterior.flow_steps < 0 || p.posterior.flow_steps > most_flow_steps)
    throw InputError("--flow-steps: 0 to " + std::to_string(most_flow_steps));
  if (p.posterior.flow_hidden < 1) throw InputError("--flow-hidden must be at least 1");
}

std::vector<int> BilOptions::part_numbers(int most) const {
  std::vector<int> list;
  for (uint64_t t : numbers_of("--parts", parts)) {
    if (t < 1) throw InputError("--parts: there must be at least one part, not 0");
    if (t > uint64_t(most))
      throw InputError("--parts: " + std::to_string(t) + " parts of " + std::to_string(most) + " images");
    list.push_back(int(t));
  }
  return list;
}

std::optional<std::filesystem::path> BilOptions::data_folder() const {
  return data.empty() ? std::nullopt : std::optional<std::filesystem::path>(data);
}

ExperimentOptions BilOptions::experiment(const std::string& name, const BilPreset& p) const {
  ExperimentOptions o;
  o.experiment = name;
  o.preset = preset;
  o.out = out_folder();
  o.resume = resume;
  o.samples = p.samples;
  o.stage_samples = p.stage_samples;
  o.checkpoint_seconds = checkpoint_seconds;
  return o;
}

void parse(CLI::App& app, int argc, char** argv) {
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp& e) {
    app.exit(e);
    throw HelpShown{};
  } catch (const CLI::ParseError& e) {
    throw InputError(std::string(e.what()) + " (--help lists the options)");
  }
}

double final_accuracy(const json& result, const std::string& method, int parts) {
  std::vector<double> values;
  for (const json& run : result["runs"])
    if (run["method"] == method && run["parts"] == parts) values.push_back(run["final_test_accuracy"]);
  return mean_and_spread(values).mean;
}

namespace {

const char* upper(const std::string& method) {
  return method == "ft" ? "FT" : method == "ffg" ? "FFG" : method == "cfg" ? "CFG" : "MNF";
}

std::string sentence_of(const json& result, const std::vector<int>& parts) {
  const int most = *std::max_element(parts.begin(), parts.end());
  const double ft = final_accuracy(result, "ft", most);
  char text[400];
  std::string sentence;
  for (const char* method : {"ffg", "cfg", "mnf"}) {
    const double value = final_accuracy(result, method, most);
    if (!std::isfinite(value) || !std::isfinite(ft)) continue;
    const double gap = 100 * (value - ft);
    if (sentence.empty())
      snprintf(text, sizeof text,
               "After %d part%s %s ends at %.2f %% and FT at %.2f %%: the posterior handed on is %.2f points %s.", most,
               most == 1 ? "" : "s", upper(method), 100 * value, 100 * ft, std::abs(gap),
               gap >= 0 ? "ahead" : "behind");
    else
      snprintf(text, sizeof text, " %s ends at %.2f %%, %.2f points %s.", upper(method), 100 * value, std::abs(gap),
               gap >= 0 ? "ahead" : "behind");
    sentence += text;
  }
  for (const char* method : {"ffg", "cfg", "mnf", "ft"}) {
    const double many = final_accuracy(result, method, most), one = final_accuracy(result, method, 1);
    if (most == 1 || !std::isfinite(many) || !std::isfinite(one)) continue;
    snprintf(text, sizeof text, " Learning in parts %s %s %.2f points against all the data at once (%.2f %%).",
             many <= one ? "costs" : "gains", upper(method), std::abs(100 * (one - many)), 100 * one);
    sentence += text;
  }
  return sentence;
}

}  // namespace

void report(const json& result, const std::string& sentence, const Dataset& set, const std::filesystem::path& out) {
  printf("\n%s\n%s\n", table_of(result).c_str(), sentence.c_str());
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

int run_bil(const BilProgram& program, int argc, char** argv) {
  CLI::App app{program.description};
  BilOptions options;
  options.methods = program.methods;
  options.out_prefix = program.out_prefix;
  options.add_to(app, "ft, ft_converged, ffg, cfg, mnf", program.preset_help, true);
  try {
    parse(app, argc, argv);
  } catch (const HelpShown&) {
    return 0;
  }
  BilPreset p = program.preset(options.preset);
  options.apply(p);
  std::vector<std::string> names = split_list(options.methods);
  for (const std::string& m : names)
    if (m != "ft_converged") family_of(m);
  const std::vector<uint64_t> seeds = options.seed_numbers();
  options.part_numbers(1 << 30);
  // FT at convergence beside FT at the others' budget: where the budget is small, in the stages of many parts.
  const bool add_converged = p.ft_converged_epochs > 0 && std::count(names.begin(), names.end(), "ft") &&
                             !std::count(names.begin(), names.end(), "ft_converged");
  if (add_converged) names.push_back("ft_converged");

  Limits limits;
  limits.train = p.train_limit;
  limits.test = p.test_limit;
  const Dataset set = program.find(options.data_folder(), limits);
  const std::vector<int> parts = options.part_numbers(set.train.count);

#if defined(BATON_CUDA)
  const size_t side_by_side = options.at_once ? options.at_once : seeds.size();
#else
  const size_t side_by_side = options.at_once ? options.at_once : 1;
#endif
  std::vector<Job> jobs;
  for (const std::string& method : names)
    for (int t : parts) {
      if (method == "ft_converged" && add_converged && t == 1) continue;
      for (size_t first = 0; first < seeds.size(); first += side_by_side) {
        Job job;
        job.method = method;
        job.parts = t;
        job.plan.posterior = p.posterior;
        job.plan.posterior.family = method == "ft_converged" ? Family::point : family_of(method);
        job.plan.scale_rule = p.scale_rule;
        job.plan.parts = t;
        job.plan.batch = p.batch;
        job.plan.augment = p.augment;
        job.plan.epochs = method == "ft_converged" && p.ft_converged_epochs > 0 ? p.ft_converged_epochs : p.epochs;
        for (size_t i = first; i < std::min(seeds.size(), first + side_by_side); i++) {
          job.plan.seeds.push_back(seeds[i]);
          job.plan.settings.push_back(p.of(job.plan.posterior.family));
        }
        jobs.push_back(job);
      }
    }

  ExperimentOptions experiment = options.experiment(program.name, p);
  experiment.normalisation = program.normalisation(set);
  printf("%s: %s, %d training and %d test images%s, preset %s\n", program.name.c_str(),
         set.generated ? ("GENERATED images (no " + program.title + " was found)").c_str() : program.title.c_str(),
         set.train.count, set.test.count, set.path.empty() ? "" : (" from " + set.path).c_str(),
         options.preset.c_str());
  fflush(stdout);
  const json result = run_experiment(experiment, set, program.network, jobs);
  report(result, sentence_of(result, parts), set, experiment.out);
  return 0;
}

}  // namespace baton
