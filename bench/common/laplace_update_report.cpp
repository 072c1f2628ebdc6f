#include "bench/common/laplace_update_report.h"

#include <algorithm>
#include <cmath>
#include <set>

namespace baton {

namespace {

template <class... Values>
std::string format(const char* pattern, Values... values) {
  char text[300];
  snprintf(text, sizeof text, pattern, values...);
  return text;
}

const json* find_update(const json& updates, const std::string& set, double tau, int base, int fresh, UpdateMethod m) {
  for (const json& u : updates)
    if (u["set"] == set && u["tau"] == tau && u["base"] == base && u["new"] == fresh && u["method"] == to_string(m))
      return &u;
  return nullptr;
}

}  // namespace

std::string format_updates(const json& updates, const std::string& set, const UpdateStudyOptions& study) {
  std::set<std::pair<double, int>, std::greater<>> groups;
  for (const json& u : updates)
    if (u["set"] == set) groups.emplace(double(u["tau"]), int(u["base"]));
  std::string text;
  for (const auto& [tau, base] : groups) {
    text += format("\n%s, base of %d, tau = %g: accuracy %% (milliseconds of the update)\n%-26s", set.c_str(), base,
                   tau, "new samples");
    for (int n : study.news) text += format("%20d", n);
    text += "\n";
    for (UpdateMethod m : all_update_methods()) {
      if (!std::count(study.methods.begin(), study.methods.end(), m)) continue;
      text += format("%-26s", label(m));
      for (int n : study.news) {
        std::string cell = "-";
        if (const json* u = find_update(updates, set, tau, base, n, m)) {
          cell = format("%.2f", 100 * double((*u)["accuracy"]["mean"]));
          if (u->contains("seconds")) cell += format(" (%.3g)", 1e3 * double((*u)["seconds"]["median"]));
        }
        text += format("%20s", cell.c_str());
      }
      text += "\n";
    }
  }
  return text;
}

std::string describe_updates(const json& updates, const std::string& set, const UpdateStudyOptions& study, int base) {
  const int fresh = study.news[study.news.size() / 2];
  std::string text;
  for (double tau : study.taus) {
    const json* ours = find_update(updates, set, tau, base, fresh, UpdateMethod::implicit);
    if (!ours) continue;
    const double seconds = (*ours)["seconds"]["median"];
    text += format("%s, base %d, %d new, tau = %g: the implicit step takes %.3g ms", set.c_str(), base, fresh, tau,
                   1e3 * seconds);
    for (UpdateMethod m : {UpdateMethod::lbfgs_warm, UpdateMethod::newton_warm, UpdateMethod::adam})
      if (const json* other = find_update(updates, set, tau, base, fresh, m))
        text += format(", %s %.0f times as long", label(m), double((*other)["seconds"]["median"]) / seconds);
    if (const json* other = find_update(updates, set, tau, base, fresh, UpdateMethod::retrained))
      text += format("; its accuracy is %+.2f points from retraining's",
                     100 * (double((*ours)["accuracy"]["mean"]) - double((*other)["accuracy"]["mean"])));
    text += ".\n";
  }
  return text;
}

std::string describe_active(const json& active, const std::string& set, const std::string& acquisition) {
  const json *top = nullptr, *sequential = nullptr;
  for (const json& a : active)
    if (a["set"] == set && a["acquisition"] == acquisition) (a["mode"] == "top" ? top : sequential) = &a;
  if (!top || !sequential) return "";
  const size_t points = (*top)["labelled"].size(), seeds = (*top)["accuracy"].size();
  double best = -INFINITY, error = 0;
  int at = 0;
  for (size_t i = 1; i < points; i++) {
    std::vector<double> difference;
    for (size_t s = 0; s < seeds; s++)
      difference.push_back(double((*sequential)["accuracy"][s][i]) - double((*top)["accuracy"][s][i]));
    const MeanAndSpread m = mean_and_spread(difference);
    if (m.mean > best) best = m.mean, error = m.sd / std::sqrt(double(m.n)), at = int((*top)["labelled"][i]);
  }
  return format(
      "%s, %s: updates between the picks change accuracy by at most %+.2f points (s.e. %.2f), at %d labels; %d "
      "seeds.\n",
      set.c_str(), acquisition.c_str(), 100 * best, 100 * error, at, int(seeds));
}

}  // namespace baton
