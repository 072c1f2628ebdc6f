// Bayesian incremental learning on MNIST (Kochurov et al. 2018, figure 1, left): LeNet-5-Caffe learns 60,000 digits in
// T parts, by fine-tuning (FT) and with a fully factorized Gaussian posterior that is handed on as the next prior
// (FFG); T = 1 is all the data at once.
#include <CLI/CLI.hpp>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "engine/program.h"
#include "layers/lenet5.h"
#include "trainers/experiment.h"
#include "trainers/parse.h"

using namespace baton;

namespace {

// What the paper leaves open. The search that found the paper preset: bench/results/bil_mnist_search.
struct Preset {
  int batch, train_limit, test_limit, samples, stage_samples;
  double epochs, ft_converged_epochs;
  TrainingSettings ffg, ft;
  ScaleRule scale_rule;
};

Preset preset_of(const std::string& name) {
  Preset p{};
  p.scale_rule = ScaleRule::adam;
  p.ffg.lr = 2e-3;
  p.ffg.lr_scale = 1e-2;
  p.ffg.prior_sd = 1;
  p.ffg.init_log_sd = -4;
  p.ffg.beta = 0.03;
  p.ffg.schedule = Schedule::linear;
  p.ft.lr = 2e-3;
  p.ft.schedule = Schedule::linear;
  p.batch = 100;
  if (name == "paper") {
    p.samples = 100;
    p.stage_samples = 25;  // a prediction by 100 draws takes half a minute on two cores, and there are 30 such stages
    p.epochs = 10;
    p.ft_converged_epochs = 20;
  } else if (name == "quick") {  // minutes on two cores
    p.train_limit = 10000;
    p.test_limit = 2000;
    p.samples = 20;
    p.stage_samples = 10;
    p.epochs = 8;
  } else {
    throw InputError("unknown preset '" + name + "': quick or paper");
  }
  return p;
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts(1);
  for (char c : text)
    if (c == ',') parts.emplace_back();
    else parts.back() += c;
  return parts;
}
template <class T>
std::vector<T> numbers(const std::string& option, const std::string& text) {
  std::vector<T> list;
  for (const std::string& word : split(text)) {
    size_t used = 0;
    long long value = -1;
    try {
      value = std::stoll(word, &used);
    } catch (const std::exception&) {
    }
    if (word.empty() || used != word.size() || value < 0)
      throw InputError(option + ": '" + word + "' is not a whole number from 0 on");
    list.push_back(T(value));
  }
  return list;
}

// Mean final accuracy of a method at T parts, or NaN.
double final_accuracy(const json& result, const std::string& method, int parts) {
  std::vector<double> values;
  for (const json& run : result["runs"])
    if (run["method"] == method && run["parts"] == parts) values.push_back(run["final_test_accuracy"]);
  return mean_and_spread(values).mean;
}

std::string sentence_of(const json& result, const std::vector<int>& parts) {
  const int most = *std::max_element(parts.begin(), parts.end());
  const double ffg = final_accuracy(result, "ffg", most), ft = final_accuracy(result, "ft", most);
  const double ffg_one = final_accuracy(result, "ffg", 1), ft_one = final_accuracy(result, "ft", 1);
  char text[400];
  std::string sentence;
  if (std::isfinite(ffg) && std::isfinite(ft)) {
    const double gap = 100 * (ffg - ft);
    snprintf(text, sizeof text,
             "After %d part%s FFG ends at %.2f %% and FT at %.2f %%: the posterior handed on is %.2f points %s.", most,
             most == 1 ? "" : "s", 100 * ffg, 100 * ft, std::abs(gap), gap >= 0 ? "ahead" : "behind");
    sentence = text;
  }
  const auto against_one = [&](const char* name, double many, double one) {
    if (most == 1 || !std::isfinite(many) || !std::isfinite(one)) return;
    snprintf(text, sizeof text, " Learning in parts %s %s %.2f points against all the data at once (%.2f %%).",
             many <= one ? "costs" : "gains", name, std::abs(100 * (one - many)), 100 * one);
    sentence += text;
  };
  against_one("FFG", ffg, ffg_one);
  against_one("FT", ft, ft_one);
  return sentence;
}

int run(int argc, char** argv) {
  CLI::App app{
      "Bayesian incremental learning on MNIST: LeNet-5 learns the digits in T parts, by fine-tuning (ft) and with a\n"
      "Gaussian posterior that is handed on as the next prior (ffg). Writes result.json, log.jsonl and a plot to "
      "--out."};
  std::string data, methods = "ft,ffg", parts_text = "1,10", seeds_text = "0", preset_name = "quick", out;
  std::string schedule, scale_rule;
  double epochs = 0, ft_converged_epochs = 0;
  int batch = 0, train_limit = 0, test_limit = 0, samples = 0, stage_samples = 0, at_once = 0;
  double checkpoint_seconds = 20;
  bool resume = false;
  TrainingSettings ffg;
  const auto what = [&](const char* group) { return app.add_option_group(group); };
  auto* run_options = what("What to run");
  run_options->add_option("--preset", preset_name, "quick (10,000 images) or paper (all): sets what is not given")
      ->capture_default_str();
  run_options->add_option("--methods", methods, "of ft, ft_converged, ffg")->capture_default_str();
  run_options->add_option("--parts", parts_text, "numbers of parts T")->capture_default_str();
  run_options->add_option("--seeds", seeds_text, "of split, weights, order and noise")->capture_default_str();
  run_options->add_option("--data", data,
                          "folder with the IDX files (else $BATON_DATA, ./data, ../shared/data, generated)");
  run_options->add_option("--train-limit", train_limit, "use the first N training images");
  run_options->add_option("--test-limit", test_limit, "use the first N test images");
  run_options->add_option("--out", out, "folder of the results [results/PRESET]");
  run_options->add_flag("--resume", resume, "go on from the checkpoint in --out");
  auto* training = what("Training");
  auto* epochs_option = training->add_option("--epochs", epochs, "of each stage");
  auto* converged_option =
      training->add_option("--ft-converged-epochs", ft_converged_epochs,
                           "where T > 1, also run FT with so many epochs a stage, as ft_converged (0: do not)");
  auto* batch_option = training->add_option("--batch", batch, "examples a step");
  auto* lr_option = training->add_option("--lr", ffg.lr, "Adam's step size for the means");
  auto* schedule_option =
      training->add_option("--schedule", schedule, "of the step sizes in a stage: constant, linear, cosine");
  auto* rule_option =
      training->add_option("--scale-rule", scale_rule, "how log sigma moves: adam or natural (gradient)");
  auto* lr_scale_option = training->add_option("--lr-scale", ffg.lr_scale, "step size of log sigma");
  auto* prior_option = training->add_option("--prior-sd", ffg.prior_sd, "of the first prior");
  auto* init_option = training->add_option("--init-log-sd", ffg.init_log_sd, "initial log sigma");
  auto* beta_option = training->add_option("--beta", ffg.beta, "weight of the KL");
  auto* warmup_option =
      training->add_option("--warmup-epochs", ffg.warmup_epochs, "over which the KL's weight grows, in each stage");
  auto* rest = what("Prediction and running");
  auto* samples_option = rest->add_option("--samples", samples, "draws of the weights in the final prediction");
  auto* stage_samples_option =
      rest->add_option("--stage-samples", stage_samples, "draws after the stages before the last");
  rest->add_option("--at-once", at_once, "seeds that train side by side [1 on the CPU, all on the GPU]");
  rest->add_option("--checkpoint-seconds", checkpoint_seconds, "between checkpoints, at the ends of epochs")
      ->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp& e) {
    return app.exit(e);
  } catch (const CLI::ParseError& e) {
    throw InputError(std::string(e.what()) + " (--help lists the options)");
  }

  Preset p = preset_of(preset_name);
  if (*epochs_option) p.epochs = epochs;
  if (*converged_option) p.ft_converged_epochs = ft_converged_epochs;
  if (*batch_option) p.batch = batch;
  if (train_limit) p.train_limit = train_limit;
  if (test_limit) p.test_limit = test_limit;
  if (*samples_option) p.samples = samples;
  if (*stage_samples_option) p.stage_samples = stage_samples;
  else if (*samples_option) p.stage_samples = samples;
  if (*lr_option) p.ffg.lr = p.ft.lr = ffg.lr;
  if (*schedule_option) p.ffg.schedule = p.ft.schedule = schedule_of(schedule);
  if (*rule_option) p.scale_rule = scale_rule_of(scale_rule);
  if (*lr_scale_option) p.ffg.lr_scale = ffg.lr_scale;
  if (*prior_option) p.ffg.prior_sd = ffg.prior_sd;
  if (*init_option) p.ffg.init_log_sd = ffg.init_log_sd;
  if (*beta_option) p.ffg.beta = ffg.beta;
  if (*warmup_option) p.ffg.warmup_epochs = ffg.warmup_epochs;
  if (p.samples < 0 || p.stage_samples < 0 || train_limit < 0 || test_limit < 0 || at_once < 0)
    throw InputError("--samples, --stage-samples, --train-limit, --test-limit and --at-once cannot be negative");
  if (!(p.epochs > 0)) throw InputError("--epochs must be positive");
  if (p.batch < 1) throw InputError("--batch must be at least 1");
  if (!(p.ffg.prior_sd > 0)) throw InputError("--prior-sd must be positive");
  if (!(p.ffg.beta >= 0)) throw InputError("--beta cannot be negative");

  const std::vector<int> parts = numbers<int>("--parts", parts_text);
  for (int t : parts)
    if (t < 1) throw InputError("--parts: there must be at least one part, not " + std::to_string(t));
  const std::vector<uint64_t> seeds = numbers<uint64_t>("--seeds", seeds_text);
  std::vector<std::string> names = split(methods);
  for (const std::string& m : names)
    if (m != "ft" && m != "ft_converged" && m != "ffg")
      throw InputError("unknown method '" + m + "': ft, ft_converged or ffg");
  // FT at convergence beside FT at FFG's budget: where the budget is small, in the stages of many parts.
  const bool add_converged = p.ft_converged_epochs > 0 && std::count(names.begin(), names.end(), "ft") &&
                             !std::count(names.begin(), names.end(), "ft_converged");
  if (add_converged) names.push_back("ft_converged");

  Limits limits;
  limits.train = p.train_limit;
  limits.test = p.test_limit;
  const Dataset set = find_mnist(data.empty() ? std::nullopt : std::optional<std::filesystem::path>(data), 0, limits);
  for (int t : parts)
    if (t > set.train.count)
      throw InputError("--parts: " + std::to_string(t) + " parts of " + std::to_string(set.train.count) + " images");

#if defined(BATON_CUDA)
  const size_t side_by_side = at_once ? at_once : seeds.size();
#else
  const size_t side_by_side = at_once ? at_once : 1;
#endif
  std::vector<Job> jobs;
  for (const std::string& method : names)
    for (int t : parts) {
      if (method == "ft_converged" && add_converged && t == 1) continue;
      for (size_t first = 0; first < seeds.size(); first += side_by_side) {
        Job job;
        job.method = method;
        job.parts = t;
        job.plan.family = method == "ffg" ? Family::gaussian : Family::point;
        job.plan.scale_rule = p.scale_rule;
        job.plan.parts = t;
        job.plan.batch = p.batch;
        job.plan.epochs = method == "ft_converged" && p.ft_converged_epochs > 0 ? p.ft_converged_epochs : p.epochs;
        for (size_t i = first; i < std::min(seeds.size(), first + side_by_side); i++) {
          job.plan.seeds.push_back(seeds[i]);
          job.plan.settings.push_back(method == "ffg" ? p.ffg : p.ft);
        }
        jobs.push_back(job);
      }
    }

  ExperimentOptions options;
  options.experiment = "bil_mnist";
  options.preset = preset_name;
  options.out = out.empty() ? "results/" + preset_name : out;
  options.resume = resume;
  options.samples = p.samples;
  options.stage_samples = p.stage_samples;
  options.checkpoint_seconds = checkpoint_seconds;
  printf("bil_mnist: %s, %d training and %d test images%s, preset %s\n",
         set.generated ? "GENERATED digits (no MNIST was found)" : "MNIST", set.train.count, set.test.count,
         set.path.empty() ? "" : (" from " + set.path).c_str(), preset_name.c_str());
  fflush(stdout);
  const json result = run_experiment(
      options, set, [] { return std::make_unique<LeNet5>(); }, jobs);

  printf("\n%s\n%s\n", table_of(result).c_str(), sentence_of(result, parts).c_str());
  if (set.generated) printf("These are GENERATED digits, not MNIST: the figures do not compare with published ones.\n");
  printf("\nResults: %s\nLog:     %s\n", (options.out / "result.json").c_str(), (options.out / "log.jsonl").c_str());
  fflush(stdout);
  const std::string plot = std::string(BATON_SOURCE_DIR) + "/tools/plot '" + options.out.string() + "'";
  if (std::system(plot.c_str()) != 0) printf("The plot was not drawn; tools/plot %s draws it.\n", options.out.c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("bil_mnist", [&] { return run(argc, argv); });
}
