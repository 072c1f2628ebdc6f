#include "trainers/last_layer/update_study.h"

#include <algorithm>
#include <numeric>

#include "trainers/checkpoints.h"
#include "trainers/last_layer/reweighting.h"
#include "trainers/metrics.h"

namespace baton {

const char* label(UpdateMethod method) {
  constexpr const char* labels[] = {"base model",      "first order",   "Monte Carlo re-weighting",
                                    "authors' rule",   "implicit step", "authors' rule, one by one",
                                    "L-BFGS, warm",    "Newton, warm",  "retrained (Newton)",
                                    "retrained (Adam)"};
  return labels[int(method)];
}
std::vector<UpdateMethod> all_update_methods() {
  std::vector<UpdateMethod> all;
  for (size_t i = 0; i < names(UpdateMethod()).all.size(); i++) all.push_back(UpdateMethod(i));
  return all;
}

std::vector<int> draw_order(int count, uint64_t seed, uint64_t stream) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  SplitMix64 random(seed, stream);
  for (int i = count - 1; i > 0; i--) std::swap(order[i], order[random.below(uint64_t(i) + 1)]);
  return order;
}

struct Judged {
  Metrics metrics;
  std::vector<int> choice;  // [test]
};

namespace {

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v.size() % 2 ? v[v.size() / 2] : (v[v.size() / 2 - 1] + v[v.size() / 2]) / 2;
}

Judged judge(const std::vector<double>& probability, const std::vector<uint8_t>& labels, int classes) {
  const std::vector<float> p(probability.begin(), probability.end());
  Judged judged{evaluate(p, labels, classes, {}, {}), {}};
  for (auto row = p.begin(); row != p.end(); row += classes)
    judged.choice.push_back(int(std::max_element(row, row + classes) - row));
  return judged;
}

}  // namespace

template <class Real>
void run_update_study(Device& device, const FeatureSet& pool, const FeatureSet& test, const UpdateStudyOptions& o,
                      const std::function<void(const json&)>& line) {
  if (o.bases.empty() || o.news.empty() || o.taus.empty() || o.seeds.empty())
    throw InputError("a study of updates needs bases, numbers of new samples, prior precisions and seeds");
  if (pool.dim != test.dim)
    throw InputError("the pool has " + std::to_string(pool.dim) + " features, the test set " +
                     std::to_string(test.dim));
  const auto [least_base, most_base] = std::minmax_element(o.bases.begin(), o.bases.end());
  const auto [least_new, most_new] = std::minmax_element(o.news.begin(), o.news.end());
  if (*least_base < 1) throw InputError("a base set needs at least one sample");
  if (*least_new < 1) throw InputError("an update needs at least one sample");
  const int most = *most_base + *most_new;
  if (most > pool.count)
    throw InputError("the pool has " + std::to_string(pool.count) + " samples, " + std::to_string(*most_base) + " + " +
                     std::to_string(*most_new) + " are asked for");
  if (o.repeats < 1) throw InputError("a timing needs at least one repetition");
  const int classes = std::max(pool.classes, test.classes), dim = pool.dim;
  const std::vector<uint8_t> test_labels(test.labels.begin(), test.labels.end());
  Arena arena;
  const FeatureRows<Real> tested = upload_features<Real>(device, arena, test),
                          pooled = upload_features<Real>(device, arena, pool);
  const auto judge_layer = [&](LastLayer<Real>& layer) {
    return judge(layer.predict(tested.x, tested.count, o.link).probability, test_labels, classes);
  };

  for (double tau : o.taus) {
    LastLayer<Real> base(device, dim, classes, {.tau = tau, .weight = o.weight}),
        layer(device, dim, classes, {.tau = tau, .weight = o.weight}),
        gaussian_base(device, dim, classes,
                      {.tau = tau, .weight = SampleWeight::gaussian});  // where the authors' rule starts
    for (int n : o.bases)
      for (size_t s = 0; s < o.seeds.size(); s++) {
        const uint64_t seed = o.seeds[s];
        if (o.skip && o.skip(tau, n, seed)) continue;
        const std::vector<int> order = draw_order(pool.count, seed, 21);
        std::vector<int> chosen(order.begin(), order.begin() + most), labels;
        std::rotate(chosen.begin() + n, chosen.begin() + *most_base, chosen.end());  // the same new ones for every base
        for (int i : chosen) labels.push_back(pool.labels[i]);
        Arena unit;
        const Real* x = place_rows(device, unit, pooled.x, chosen, dim);
        const int32_t* y = place(device, unit, labels);
        const std::vector<double> fitted = base.fit({x, y, n, dim}).weights;
        gaussian_base.fit_covariance({x, y, n, dim}, fitted);
        const Judged before = judge_layer(base);
        for (int b : o.news)
          for (UpdateMethod method : o.methods) {
            const FeatureRows<Real> fresh{x + size_t(n) * dim, y + n, b, dim}, all{x, y, n + b, dim};
            const auto report = [&](const Judged& j, const std::vector<double>& seconds) {
              int flips = 0;
              for (size_t i = 0; i < j.choice.size(); i++) flips += j.choice[i] != before.choice[i];
              json row{{"tau", tau},
                       {"base", n},
                       {"new", b},
                       {"seed", seed},
                       {"method", to_string(method)},
                       {"label", label(method)},
                       {"accuracy", j.metrics.accuracy},
                       {"nll", j.metrics.nll},
                       {"ece", j.metrics.ece},
                       {"flips", double(flips) / double(j.choice.size())},
                       {"gain", j.metrics.accuracy - before.metrics.accuracy}};
              if (!seconds.empty()) row["seconds"] = median(seconds);
              line(row);
            };
            // Every repetition starts from the same posterior, and leaves its work in `layer`.
            const auto time = [&](int repeats, const LastLayer<Real>& from, const std::function<void()>& work) {
              std::vector<double> seconds;
              for (int k = 0; k < repeats; k++) {
                if (stop_requested()) throw_stopped("the unit under way is not kept");
                layer.copy_from(from);
                device.synchronize();
                const double start = seconds_now();
                work();
                device.synchronize();
                seconds.push_back(seconds_now() - start);
              }
              return seconds;
            };
            const auto time_update = [&](const LastLayer<Real>& from, const std::function<void()>& update) {
              const std::vector<double> seconds = time(o.repeats, from, update);
              report(judge_layer(layer), seconds);
            };
            const auto time_fit = [&](int repeats, const std::function<MapResult()>& fit) {
              MapResult result;
              const std::vector<double> seconds = time(repeats, base, [&] { result = fit(); });
              layer.fit_covariance(all, result.weights);
              report(judge_layer(layer), seconds);
            };
            const auto time_map = [&](MapOptions options) {
              options.tau = tau;
              time_fit(o.repeats, [&] { return fit_map(device, all, classes, options); });
            };
            LastLayerUpdateOptions update{.gamma = o.gamma, .duplicates = true};  // a set may hold equal samples
            if (method != UpdateMethod::implicit) update.rule = UpdateRule::gaussian;
            using M = UpdateMethod;
            if (method == M::base) report(before, {});
            else if (method == M::first_order)
              time_update(base, [&] { layer.update_first_order(fresh, o.gamma_first_order); });
            else if (method == M::gaussian) time_update(gaussian_base, [&] { layer.update(fresh, update); });
            else if (method == M::one_by_one)
              time_update(gaussian_base, [&] { layer.update_one_by_one(fresh, update); });
            else if (method == M::implicit) time_update(base, [&] { layer.update(fresh, update); });
            else if (method == M::lbfgs_warm)  // stops where SciPy's L-BFGS-B does
              time_map({.method = MapMethod::lbfgs, .start = fitted, .tolerance = 1e-5, .least_decrease = 2.2e-9});
            else if (method == M::newton_warm) time_map({.start = fitted, .tolerance = 1e-6});
            else if (method == M::retrained) time_map({.tolerance = 1e-6});
            else if (method == M::monte_carlo) {
              Reweighting<Real> draws(device, base, o.draws, seed);
              const std::vector<double> seconds = time(1, base, [&] { draws.update(fresh, o.gamma_monte_carlo); });
              report(judge(draws.predict(tested.x, tested.count), test_labels, classes), seconds);
            } else if (method == M::adam && int(s) < o.adam_seeds) {
              time_fit(1, [&] {
                return fit_adam(device, all, classes, {.tau = tau, .epochs = o.adam_epochs, .seed = seed});
              });
            }
          }
        if (o.finished) o.finished(tau, n, seed);
      }
  }
}

template void run_update_study<float>(Device&, const FeatureSet&, const FeatureSet&, const UpdateStudyOptions&,
                                      const std::function<void(const json&)>&);
template void run_update_study<double>(Device&, const FeatureSet&, const FeatureSet&, const UpdateStudyOptions&,
                                       const std::function<void(const json&)>&);

std::vector<json> summarise(const std::vector<json>& lines) {
  json groups;  // in the order of their first lines
  for (const json& l : lines) groups[json{l["tau"], l["base"], l["new"], l["method"]}.dump()].push_back(l);
  std::vector<json> all;
  for (const json& group : groups) {
    const auto collect = [&](const char* key) {
      std::vector<double> values;
      for (const json& l : group)
        if (l.contains(key)) values.push_back(l[key]);
      return values;
    };
    json& result = all.emplace_back();
    for (const char* key : {"set", "tau", "base", "new", "method", "label"})
      if (group[0].contains(key)) result[key] = group[0][key];
    for (const char* key : {"accuracy", "nll", "ece", "flips", "gain"}) {
      const MeanAndSpread m = mean_and_spread(collect(key));
      result[key] = {{"mean", m.mean}, {"sd", m.sd}, {"n", m.n}};
    }
    if (const std::vector<double> seconds = collect("seconds"); !seconds.empty())
      result["seconds"] = {{"median", median(seconds)},
                           {"least", *std::min_element(seconds.begin(), seconds.end())},
                           {"greatest", *std::max_element(seconds.begin(), seconds.end())}};
  }
  return all;
}

}  // namespace baton
