#include "trainers/last_layer/update_study.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>

#include "engine/io/stop.h"
#include "trainers/metrics.h"

namespace baton {

namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double median_of(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v.size() % 2 ? v[v.size() / 2] : (v[v.size() / 2 - 1] + v[v.size() / 2]) / 2;
}

std::vector<int> shuffled(int count, uint64_t seed) {
  std::vector<int> order(count);
  for (int i = 0; i < count; i++) order[i] = i;
  SplitMix64 random(seed, 21);
  for (int i = count - 1; i > 0; i--) std::swap(order[i], order[random.below(uint64_t(i) + 1)]);
  return order;
}

void stop_if_asked() {
  if (stop_requested()) throw_stopped("the unit under way is not kept");
}

struct Judged {
  double accuracy = 0, nll = 0, ece = 0;
  std::vector<int> choice;  // [test]
};

Judged judge(const std::vector<double>& probability, const std::vector<uint8_t>& labels, int classes) {
  const std::vector<float> p(probability.begin(), probability.end());
  const Metrics m = evaluate(p, labels, classes, {}, {});
  Judged j{m.accuracy, m.nll, m.ece, {}};
  for (size_t i = 0; i < labels.size(); i++)
    j.choice.push_back(int(std::max_element(&p[i * classes], &p[i * classes] + classes) - &p[i * classes]));
  return j;
}

}  // namespace

const std::vector<UpdateMethod>& all_update_methods() {
  static const std::vector<UpdateMethod> all = {
      UpdateMethod::base,      UpdateMethod::first_order, UpdateMethod::monte_carlo, UpdateMethod::gaussian,
      UpdateMethod::implicit,  UpdateMethod::one_by_one,  UpdateMethod::lbfgs_warm,  UpdateMethod::newton_warm,
      UpdateMethod::retrained, UpdateMethod::adam};
  return all;
}
const char* name_of(UpdateMethod m) {
  switch (m) {
    case UpdateMethod::base:
      return "base";
    case UpdateMethod::first_order:
      return "first_order";
    case UpdateMethod::monte_carlo:
      return "monte_carlo";
    case UpdateMethod::gaussian:
      return "gaussian";
    case UpdateMethod::implicit:
      return "implicit";
    case UpdateMethod::one_by_one:
      return "one_by_one";
    case UpdateMethod::lbfgs_warm:
      return "lbfgs_warm";
    case UpdateMethod::newton_warm:
      return "newton_warm";
    case UpdateMethod::retrained:
      return "retrained";
    case UpdateMethod::adam:
      return "adam";
  }
  return "";
}
const char* words_of(UpdateMethod m) {
  switch (m) {
    case UpdateMethod::base:
      return "base model";
    case UpdateMethod::first_order:
      return "first order";
    case UpdateMethod::monte_carlo:
      return "Monte Carlo re-weighting";
    case UpdateMethod::gaussian:
      return "authors' rule";
    case UpdateMethod::implicit:
      return "implicit step";
    case UpdateMethod::one_by_one:
      return "authors' rule, one by one";
    case UpdateMethod::lbfgs_warm:
      return "L-BFGS, warm";
    case UpdateMethod::newton_warm:
      return "Newton, warm";
    case UpdateMethod::retrained:
      return "retrained (Newton)";
    case UpdateMethod::adam:
      return "retrained (Adam)";
  }
  return "";
}
UpdateMethod update_method_of(const std::string& name) {
  std::string known;
  for (UpdateMethod m : all_update_methods()) {
    if (name == name_of(m)) return m;
    known += (known.empty() ? "" : ", ") + std::string(name_of(m));
  }
  throw InputError("unknown method '" + name + "': of " + known);
}

template <class Real>
void run_update_study(Device& device, const FeatureSet& pool, const FeatureSet& test, const UpdateStudy& o,
                      const std::function<void(const json&)>& line) {
  if (o.bases.empty() || o.news.empty() || o.taus.empty() || o.seeds.empty())
    throw InputError("a study of updates needs bases, numbers of new samples, prior precisions and seeds");
  if (pool.dim != test.dim)
    throw InputError("the pool has " + std::to_string(pool.dim) + " features, the test set " +
                     std::to_string(test.dim));
  const int most_base = *std::max_element(o.bases.begin(), o.bases.end());
  const int most_new = *std::max_element(o.news.begin(), o.news.end());
  for (int n : o.bases)
    if (n < 1) throw InputError("a base set needs at least one sample");
  for (int n : o.news)
    if (n < 1) throw InputError("an update needs at least one sample");
  if (most_base + most_new > pool.count)
    throw InputError("the pool has " + std::to_string(pool.count) + " samples, " + std::to_string(most_base) + " + " +
                     std::to_string(most_new) + " are asked for");
  if (o.repeats < 1) throw InputError("a timing needs at least one repetition");
  const int classes = std::max(pool.classes, test.classes), dim = pool.dim;
  Arena arena;
  const FeatureRows<Real> tested = upload_features<Real>(device, arena, test);
  const FeatureRows<Real> all = upload_features<Real>(device, arena, pool);
  const std::vector<uint8_t> labels(test.labels.begin(), test.labels.end());
  Real* x = arena.take<Real>(size_t(most_base + most_new) * dim);
  int32_t *y = arena.take<int32_t>(most_base + most_new), *index = arena.take<int32_t>(most_base + most_new);

  for (double tau : o.taus) {
    LastLayerOptions settings;
    settings.tau = tau;
    settings.weight = o.weight;
    LastLayer<Real> base(device, dim, classes, settings), layer(device, dim, classes, settings);
    settings.weight = SampleWeight::gaussian;  // of the authors' rule: its own covariance
    LastLayer<Real> gaussian_base(device, dim, classes, settings);
    for (int n : o.bases)
      for (size_t s = 0; s < o.seeds.size(); s++) {
        if (o.skip && o.skip(tau, n, o.seeds[s])) continue;
        const std::vector<int> order = shuffled(pool.count, o.seeds[s]);
        std::vector<int32_t> chosen(order.begin(), order.begin() + most_base + most_new);
        // The new samples are the same for every base set.
        std::rotate(chosen.begin() + n, chosen.begin() + most_base, chosen.end());
        std::vector<int32_t> chosen_labels;
        for (int i : chosen) chosen_labels.push_back(pool.labels[i]);
        upload(device, index, chosen);
        upload(device, y, chosen_labels);
        gather_rows(x, all.x, index, int(chosen.size()), dim, device.stream());
        const MapResult fitted = base.fit({x, y, n, dim});
        gaussian_base.fit_covariance({x, y, n, dim}, fitted.weights);
        const Judged before = judge(base.predict(tested.x, tested.count, o.link).probability, labels, classes);
        for (int b : o.news) {
          const FeatureRows<Real> fresh{x + size_t(n) * dim, y + n, b, dim}, together{x, y, n + b, dim};
          const auto report = [&](UpdateMethod method, const Judged& j, std::optional<double> seconds) {
            int flips = 0;
            for (size_t i = 0; i < labels.size(); i++) flips += j.choice[i] != before.choice[i];
            json row{{"tau", tau},
                     {"base", n},
                     {"new", b},
                     {"seed", o.seeds[s]},
                     {"method", name_of(method)},
                     {"label", words_of(method)},
                     {"accuracy", j.accuracy},
                     {"nll", j.nll},
                     {"ece", j.ece},
                     {"flips", double(flips) / double(labels.size())},
                     {"gain", j.accuracy - before.accuracy}};
            if (seconds) row["seconds"] = *seconds;
            line(row);
          };
          const auto judged = [&] {
            return judge(layer.predict(tested.x, tested.count, o.link).probability, labels, classes);
          };
          // The median of some updates, each from the same posterior.
          const auto timed = [&](const LastLayer<Real>& from, const std::function<void()>& update) {
            std::vector<double> seconds;
            for (int k = 0; k < o.repeats; k++) {
              stop_if_asked();
              layer.copy_from(from);
              device.synchronize();
              const double start = now();
              update();
              device.synchronize();
              seconds.push_back(now() - start);
            }
            return median_of(seconds);
          };
          UpdateOptions update;
          update.gamma = o.gamma;
          update.duplicates = true;  // a set may hold equal samples
          for (UpdateMethod method : o.methods) {
            stop_if_asked();
            double seconds = 0;
            switch (method) {
              case UpdateMethod::base:
                report(method, before, std::nullopt);
                break;
              case UpdateMethod::first_order:
                seconds = timed(base, [&] { layer.update_first_order(fresh, o.gamma_first_order); });
                report(method, judged(), seconds);
                break;
              case UpdateMethod::monte_carlo: {
                Reweighting<Real> draws(device, base, o.draws, o.seeds[s]);
                const double start = now();
                draws.update(fresh, o.gamma_monte_carlo);
                seconds = now() - start;
                report(method, judge(draws.predict(tested.x, tested.count), labels, classes), seconds);
                break;
              }
              case UpdateMethod::gaussian:
                update.rule = UpdateRule::gaussian;
                seconds = timed(gaussian_base, [&] { layer.update(fresh, update); });
                report(method, judged(), seconds);
                break;
              case UpdateMethod::one_by_one:
                update.rule = UpdateRule::gaussian;
                seconds = timed(gaussian_base, [&] { layer.update_one_by_one(fresh, update); });
                report(method, judged(), seconds);
                break;
              case UpdateMethod::implicit:
                update.rule = UpdateRule::implicit;
                seconds = timed(base, [&] { layer.update(fresh, update); });
                report(method, judged(), seconds);
                break;
              case UpdateMethod::lbfgs_warm:
              case UpdateMethod::newton_warm:
              case UpdateMethod::retrained:
              case UpdateMethod::adam: {
                if (method == UpdateMethod::adam && int(s) >= o.adam_seeds) break;
                MapOptions map;
                map.tau = tau;
                if (method != UpdateMethod::retrained) map.start = fitted.weights;
                if (method == UpdateMethod::lbfgs_warm) {
                  map.method = MapMethod::lbfgs;
                  map.tolerance = 1e-5;  // where SciPy's L-BFGS-B stops
                  map.least_decrease = 2.2e-9;
                } else {
                  map.tolerance = 1e-6;
                }
                AdamOptions adam;
                adam.tau = tau, adam.epochs = o.adam_epochs, adam.seed = o.seeds[s];
                MapResult result;
                std::vector<double> times;
                for (int k = 0; k < (method == UpdateMethod::adam ? 1 : o.repeats); k++) {
                  const double start = now();
                  result = method == UpdateMethod::adam ? fit_adam(device, together, classes, adam)
                                                        : fit_map(device, together, classes, map);
                  times.push_back(now() - start);
                }
                layer.copy_from(base);
                layer.fit_covariance(together, result.weights);
                report(method, judged(), median_of(times));
                break;
              }
            }
          }
        }
        if (o.finished) o.finished(tau, n, o.seeds[s]);
      }
  }
}

template void run_update_study<float>(Device&, const FeatureSet&, const FeatureSet&, const UpdateStudy&,
                                      const std::function<void(const json&)>&);
template void run_update_study<double>(Device&, const FeatureSet&, const FeatureSet&, const UpdateStudy&,
                                       const std::function<void(const json&)>&);

json summary_of(const std::vector<json>& lines) {
  if (lines.empty()) throw InputError("a summary of no lines");
  json result;
  for (const char* key : {"set", "tau", "base", "new", "method", "label"})
    if (lines[0].contains(key)) result[key] = lines[0][key];
  for (const char* key : {"accuracy", "nll", "ece", "flips", "gain"}) {
    std::vector<double> v;
    for (const json& l : lines) v.push_back(l[key]);
    const MeanAndSpread m = mean_and_spread(v);
    result[key] = {{"mean", m.mean}, {"sd", m.sd}, {"n", m.n}};
  }
  std::vector<double> seconds;
  for (const json& l : lines)
    if (l.contains("seconds")) seconds.push_back(l["seconds"]);
  if (!seconds.empty())
    result["seconds"] = {{"median", median_of(seconds)},
                         {"least", *std::min_element(seconds.begin(), seconds.end())},
                         {"greatest", *std::max_element(seconds.begin(), seconds.end())}};
  return result;
}

}  // namespace baton
