#include "bench/common/bil.h"

#include <algorithm>
#include <cmath>

namespace baton {

Method ft_method(double lr, const std::string& name) { return {name, "ft", {{"lr", lr}, {"schedule", "linear"}}}; }

Method gaussian_method(const std::string& kind, const json& own) {
  json settings{{"lr_scale", 1e-2}, {"prior_sd", 1}, {"schedule", "linear"}};
  settings.update(own);
  return {kind, kind, settings};
}

std::vector<Method> cifar_methods() {
  const json settings{{"lr", 1e-3}, {"init_log_std", -5}, {"beta", 0.05}};
  std::vector<Method> methods{ft_method(1e-3)};
  for (const char* kind : {"ffg", "cfg", "mnf"}) methods.push_back(gaussian_method(kind, settings));
  return methods;
}

namespace {

std::string sentence_about(const json& result, const std::vector<int>& parts) {
  const int most = *std::max_element(parts.begin(), parts.end());
  const double ft = final_accuracy(result, "ft", most);
  std::string sentence;
  for (const char* method : {"ffg", "cfg", "mnf"}) {
    const double value = final_accuracy(result, method, most);
    if (!std::isfinite(value) || !std::isfinite(ft)) continue;
    const double gap = 100 * (value - ft);
    const std::string name = upper(method);
    if (sentence.empty())
      sentence = format_text("After %d part%s %s ends at %.2f %% and FT at %.2f %%: the posterior handed on is", most,
                             most == 1 ? "" : "s", name.c_str(), 100 * value, 100 * ft);
    else sentence += format_text(" %s ends at %.2f %%,", name.c_str(), 100 * value);
    sentence += format_text(" %.2f points %s.", std::abs(gap), gap >= 0 ? "ahead" : "behind");
  }
  for (const char* method : {"ffg", "cfg", "mnf", "ft"}) {
    const double many = final_accuracy(result, method, most), one = final_accuracy(result, method, 1);
    if (most == 1 || !std::isfinite(many) || !std::isfinite(one)) continue;
    sentence +=
        format_text(" Learning in parts %s %s %.2f points against all the data at once (%.2f %%).",
                    many <= one ? "costs" : "gains", upper(method).c_str(), std::abs(100 * (one - many)), 100 * one);
  }
  return sentence;
}

}  // namespace

int run_bil(PaperProgram& program, BilProgram bil, const std::string& preset_help) {
  program.preset.methods.push_back(program.preset.methods[0]);
  program.preset.methods.back().name = "ft_converged";
  program.parts = "1,10";
  program.add_options(preset_help);
  program.app
      .add_option("--ft-converged-epochs", bil.ft_converged_epochs,
                  "where T > 1, also run FT with so many epochs a stage, as ft_converged (0: do not)")
      ->check(CLI::NonNegativeNumber);
  if (!program.parse()) return 0;
  std::vector<Method> methods = program.chosen_methods();
  const auto chosen = [&](const char* name) {
    return std::any_of(methods.begin(), methods.end(), [&](const Method& m) { return m.name == name; });
  };
  const bool add_converged = bil.ft_converged_epochs > 0 && chosen("ft") && !chosen("ft_converged");
  if (add_converged) methods.push_back(program.preset.methods.back());

  const ExperimentData data = program.find_data(bil.find);
  const std::vector<int> parts = program.part_numbers(data.set.train.count);
  std::vector<ExperimentRun> runs;
  for (const Method& method : methods)
    for (int t : parts) {
      const bool converged = method.name == "ft_converged";
      if (converged && add_converged && t == 1) continue;
      for (uint64_t seed : program.seed_numbers()) {
        ExperimentRun& run = runs.emplace_back(program.make_run(method, method.name, network_spec(bil.network), seed));
        run.stages = split_into_parts(data.set.train.count, t, {seed}, program.preset.augment);
        if (converged && bil.ft_converged_epochs > 0) run.training.epochs = bil.ft_converged_epochs;
      }
    }
  ExperimentOptions experiment = program.experiment();
  experiment.normalisation = bil.normalisation(data.set);
  return run_and_report(program, bil.title, experiment, data, runs,
                        [&](const json& result) { return sentence_about(result, parts); });
}

}  // namespace baton
