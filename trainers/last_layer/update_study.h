// How good and how fast a closed-form update of the last layer is beside what it stands in for (Huseljic et al. 2024,
// section 5): a base set is learned, a few new samples arrive, and every method says what it makes of them.
#pragma once
#include <functional>

#include "engine/io/runlog.h"
#include "trainers/last_layer/features.h"

namespace baton {

enum class UpdateMethod {
  base,         // the model before the new samples
  first_order,  // W' = W + gamma_fo r phi'
  monte_carlo,  // re-weighted draws
  gaussian,     // the authors' rule, in blocks
  implicit,     // the default step, in blocks
  one_by_one,   // the authors' rule, a rank-one downdate a sample
  lbfgs_warm,   // the MAP of all samples by L-BFGS from the base weights
  newton_warm,  // the same by Newton
  retrained,    // the MAP and the covariance of all samples, from 0
  adam,         // 200 epochs of Adam from 0: what the papers call retraining
};
UpdateMethod update_method_of(const std::string& name);  // InputError
const char* name_of(UpdateMethod);
const char* words_of(UpdateMethod);  // for tables and figures
const std::vector<UpdateMethod>& all_update_methods();

struct UpdateStudy {
  std::vector<UpdateMethod> methods = all_update_methods();
  std::vector<int> bases = {10, 100, 1000}, news = {1, 2, 5, 10, 20, 50};
  std::vector<double> taus = {1};
  std::vector<uint64_t> seeds = {0};                // of the choice of base and new samples
  SampleWeight weight = SampleWeight::categorical;  // of the base covariance; the gaussian rules start from `gaussian`
  double gamma = 10, gamma_first_order = 1e-3, gamma_monte_carlo = 1e-2;
  int draws = 1000;                       // of monte_carlo
  int repeats = 5;                        // of a timed update: the median counts
  int adam_epochs = 200, adam_seeds = 2;  // Adam runs for the first so many seeds alone
  LinkOptions link;                       // of NLL and ECE
  // A unit is one (tau, base, seed): those for which this is true are left out (they were done before).
  std::function<bool(double tau, int base, uint64_t seed)> skip;
  std::function<void(double tau, int base, uint64_t seed)> finished;  // after a unit's last line
};

// For every tau, base, seed, number of new samples and method a line {tau, base, seed, new, method, accuracy, nll, ece,
// flips (share of the test samples whose class changes), gain (accuracy minus the base model's), seconds}. Seconds are
// those of the update alone, features in device memory: not of the base fit, nor of the covariance that a retrained
// model would need for the next update. `line` is called with each. Throws InputError when base + new exceed the pool;
// Stopped, within a unit too, when a signal asks the program to end.
template <class Real>
void run_update_study(Device&, const FeatureSet& pool, const FeatureSet& test, const UpdateStudy&,
                      const std::function<void(const json&)>& line);

// Lines of one (tau, base, new, method) as one: mean, sd and n of accuracy, nll, ece, flips and gain over seeds;
// median, least and greatest of the seconds.
json summary_of(const std::vector<json>& lines);

}  // namespace baton
