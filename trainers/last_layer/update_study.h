// How good and how fast a closed-form update of the last layer is beside what it stands in for (Huseljic et al. 2024,
// section 5): a base set is learned, a few new samples arrive, and every method takes them in.
#pragma once
#include "engine/io/runlog.h"
#include "trainers/last_layer/features.h"

namespace baton {

enum class UpdateMethod {
  base,         // the model before the new samples
  first_order,  // W' = W + gamma r phi'
  monte_carlo,  // re-weighted draws
  gaussian,     // the authors' rule, in blocks
  implicit,     // the default step, in blocks
  one_by_one,   // the authors' rule, with a rank-one downdate for each sample
  lbfgs_warm,   // the MAP of all samples by L-BFGS from the base weights
  newton_warm,  // the same by Newton
  retrained,    // the MAP and the covariance of all samples, from 0
  adam,         // 200 epochs of Adam from 0: what the papers call retraining
};
inline Names names(UpdateMethod) {
  return {"method",
          {"base", "first_order", "monte_carlo", "gaussian", "implicit", "one_by_one", "lbfgs_warm", "newton_warm",
           "retrained", "adam"}};
}
const char* label(UpdateMethod);  // for tables and figures
std::vector<UpdateMethod> all_update_methods();

struct UpdateStudyOptions {
  std::vector<UpdateMethod> methods = all_update_methods();
  std::vector<int> bases = {10, 100, 1000}, news = {1, 2, 5, 10, 20, 50};  // numbers of samples
  std::vector<double> taus = {1};
  std::vector<uint64_t> seeds = {0};                // of the choice of base and new samples
  SampleWeight weight = SampleWeight::categorical;  // of the base covariance; the gaussian rules start from `gaussian`
  double gamma = 10, gamma_first_order = 1e-3, gamma_monte_carlo = 1e-2;
  int draws = 1000;                       // of monte_carlo
  int repeats = 5;                        // of a timed update: the median counts
  int adam_epochs = 200, adam_seeds = 2;  // Adam runs for the first so many seeds alone
  LinkOptions link;                       // of NLL and ECE
  // A unit is one (tau, base, seed). Those for which `skip` is true were done before and are left out; `finished` is
  // called after a unit's last line.
  std::function<bool(double tau, int base, uint64_t seed)> skip;
  std::function<void(double tau, int base, uint64_t seed)> finished;
};

// Calls `line` for every tau, base, seed, number of new samples and method with {tau, base, seed, new, method,
// accuracy, nll, ece, flips (the share of the test samples whose class changes), gain (accuracy minus the base
// model's), seconds}. Seconds are those of the update alone with features in device memory, without the base fit and
// without the covariance that a retrained model would need for the next update. Throws InputError when base + new
// exceed the pool; Stopped, within a unit too, when a signal asks the program to end.
template <class Real>
void run_update_study(Device&, const FeatureSet& pool, const FeatureSet& test, const UpdateStudyOptions&,
                      const std::function<void(const json&)>& line);

// One summary for every (tau, base, new, method) of the lines, in the order of their first lines: mean, sd and n over
// seeds of accuracy, nll, ece, flips and gain; median, least and greatest of the seconds.
std::vector<json> summarise(const std::vector<json>& lines);

// 0 .. count - 1 in a random order, by a stream of numbers of its own.
std::vector<int> draw_order(int count, uint64_t seed, uint64_t stream);

}  // namespace baton
