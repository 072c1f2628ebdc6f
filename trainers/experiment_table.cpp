#include <algorithm>

#include "trainers/experiment.h"

namespace baton {

namespace {

struct Row {
  std::string label;
  int parts;
  std::vector<double> accuracy, nll, ece, map, softmax, committee;
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
    if (row == rows.end()) row = rows.insert(row, Row{label, parts, {}, {}, {}, {}, {}, {}});
    const json& last = run["stages"].back();
    row->accuracy.push_back(last["test_accuracy"]);
    row->nll.push_back(last["test_nll"]);
    row->ece.push_back(last["test_ece"]);
    row->seconds += add_seconds(run["stages"]);
    if (!last.contains("by_inference")) continue;
    row->map.push_back(last["by_inference"]["map"]);
    row->softmax.push_back(last["by_inference"]["softmax"]);
    row->committee.push_back(last["by_inference"]["committee"]);
  }
  return rows;
}

double percent_wrong(const std::vector<double>& accuracy) { return 100 * (1 - mean_and_spread(accuracy).mean); }

}  // namespace

std::string format_table(const json& result) {
  const std::vector<Row> rows = collect_rows(result["runs"]);
  const bool by_inference = !rows.empty() && !rows[0].map.empty();
  std::string text =
      by_inference
          ? "run                     seeds  test error %      MAP   mean softmax  committee     NLL      time\n"
            "-------------------------------------------------------------------------------------------------\n"
          : "method         T  seeds  test accuracy        NLL     ECE     time\n"
            "-------------------------------------------------------------------\n";
  for (const Row& row : rows) {
    const MeanAndSpread a = mean_and_spread(row.accuracy), n = mean_and_spread(row.nll), e = mean_and_spread(row.ece);
    char line[200], spread[24] = "";
    if (a.n > 1 && by_inference) snprintf(spread, sizeof spread, "+- %.2f", 100 * a.sd);
    else if (a.n > 1) snprintf(spread, sizeof spread, "+- %.4f", a.sd);
    if (by_inference)
      snprintf(line, sizeof line, "%-22s %6zu  %6.2f %-8s %7.2f %14.2f %10.2f %7.4f %8.1fs\n", row.label.c_str(), a.n,
               percent_wrong(row.accuracy), spread, percent_wrong(row.map), percent_wrong(row.softmax),
               percent_wrong(row.committee), n.mean, row.seconds);
    else
      snprintf(line, sizeof line, "%-13s %2d  %5zu  %.4f %-11s %8.4f %7.4f %7.1fs\n", row.label.c_str(), row.parts, a.n,
               a.mean, spread, n.mean, e.mean, row.seconds);
    text += line;
  }
  return text;
}

}  // namespace baton
