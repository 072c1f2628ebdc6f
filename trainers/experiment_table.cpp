#include <algorithm>

#include "trainers/experiment.h"

namespace baton {

namespace {

struct Row {
  std::string label;
  int parts;
  std::map<std::string, std::vector<double>> figures;  // one a run, by their names in the result
  double seconds = 0;
};

// A stage's seconds grow from measurement to measurement.
double add_seconds(const json& stages) {
  double sum = 0;
  for (size_t i = 0; i < stages.size(); i++) {
    sum += double(stages[i]["test_seconds"]);
    if (i + 1 == stages.size() || stages[i + 1]["stage"] != stages[i]["stage"]) sum += double(stages[i]["seconds"]);
  }
  return sum;
}

std::vector<Row> collect_rows(const json& runs) {
  std::vector<Row> rows;
  for (const json& run : runs) {
    const std::string label = run["label"];
    const int parts = run["parts"];
    auto row =
        std::find_if(rows.begin(), rows.end(), [&](const Row& r) { return r.label == label && r.parts == parts; });
    if (row == rows.end()) row = rows.insert(row, Row{label, parts, {}});
    const json& last = run["stages"].back();
    for (const char* name : {"test_accuracy", "test_nll", "test_ece"}) row->figures[name].push_back(last[name]);
    row->seconds += add_seconds(run["stages"]);
    if (!last.contains("by_inference")) continue;
    for (const char* way : {"map", "softmax", "committee"}) row->figures[way].push_back(last["by_inference"][way]);
  }
  return rows;
}

}  // namespace

json describe_settings(const ExperimentRun& run) {
  const Replica& r = run.training.replicas.at(0);
  json j{{"epochs", run.training.epochs}, {"batch", run.training.batch}};
  j.update(complete_options(find_posterior(run.training.kind).options, r.settings, run.training.kind));
  if (j["schedule"] != "steps") j.erase("decay"), j.erase("decay_epochs");
  if (std::count(run.stages.augment.begin(), run.stages.augment.end(), true)) j["augment"] = true;
  if (r.pretrained) j["pretrained"] = r.pretrained->description;
  if (r.pretrained && r.pretrained->prior_log_std.empty()) j["pretrained_sd"] = r.pretrained_sd;
  j["samples"] = run.samples;
  j.update(run.more);
  return j;
}

std::string format_table(const json& result) {
  const std::vector<Row> rows = collect_rows(result["runs"]);
  const bool by_inference = !rows.empty() && rows[0].figures.count("map");
  std::string text =
      by_inference
          ? "run                     seeds  test error %      MAP   mean softmax  committee     NLL      time\n"
            "-------------------------------------------------------------------------------------------------\n"
          : "method         T  seeds  test accuracy        NLL     ECE     time\n"
            "-------------------------------------------------------------------\n";
  for (const Row& row : rows) {
    const auto mean = [&](const char* name) { return mean_and_spread(row.figures.at(name)).mean; };
    const auto percent_wrong = [&](const char* name) { return 100 * (1 - mean(name)); };
    const MeanAndSpread a = mean_and_spread(row.figures.at("test_accuracy"));
    char line[200], spread[24] = "";
    if (a.n > 1 && by_inference) snprintf(spread, sizeof spread, "+- %.2f", 100 * a.sd);
    else if (a.n > 1) snprintf(spread, sizeof spread, "+- %.4f", a.sd);
    if (by_inference)
      snprintf(line, sizeof line, "%-22s %6zu  %6.2f %-8s %7.2f %14.2f %10.2f %7.4f %8.1fs\n", row.label.c_str(), a.n,
               percent_wrong("test_accuracy"), spread, percent_wrong("map"), percent_wrong("softmax"),
               percent_wrong("committee"), mean("test_nll"), row.seconds);
    else
      snprintf(line, sizeof line, "%-13s %2d  %5zu  %.4f %-11s %8.4f %7.4f %7.1fs\n", row.label.c_str(), row.parts, a.n,
               a.mean, spread, mean("test_nll"), mean("test_ece"), row.seconds);
    text += line;
  }
  return text;
}

}  // namespace baton
