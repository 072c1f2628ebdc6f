#include "bench/common/bgd.h"

#include <algorithm>

namespace baton {

Method& find_method(Preset& preset, const std::string& name) {
  for (Method& m : preset.methods)
    if (m.name == name) return m;
  throw InputError("the preset has no method '" + name + "'");
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

void draw_one_at_a_time(Preset& preset) {
#if !defined(BATON_CUDA)
  for (Method& m : preset.methods)
    if (m.kind == "bgd") m.settings["draws_at_once"] = 1;
#endif
  (void)preset;
}

void set_sigma(Preset& preset, double sigma) {
  for (Method& m : preset.methods)
    if (m.kind == "bgd" || m.kind == "bbb") m.settings["sigma"] = sigma;
}

void add_step_scale(ExperimentRun& run) {
  if (run.training.kind != "bgd") return;
  const json s = complete_options(find_posterior("bgd").options, run.training.replicas[0].settings, "bgd");
  run.more["step_scale"] = double(s["eta"]) * double(s["sigma"]) * double(s["sigma"]) * run.training.batch;
}

}  // namespace baton
