// What the programs of Bayesian gradient descent share: the methods that it is compared with, and their results' form.
#pragma once
#include "bench/common/program.h"

namespace baton {

// A method of the preset, by name, whose settings the program changes.
Method& find_method(Preset&, const std::string& name);

// bgd, sgd, adam, bbb, bbb_mixture, si and ewc with the settings that their papers share, those that are named.
std::vector<Method> baseline_methods(const std::vector<std::string>& names);

// On the CPU BGD's draws run one at a time, so that the activations of a large network stay in the cache.
void draw_one_at_a_time(Preset&);
void set_sigma(Preset&, double sigma);  // of all methods that draw their weights

// What result.json shows of a BGD run beside its settings: eta sigma^2 B, which tells whether sigma stays stable.
void add_step_scale(ExperimentRun&);

}  // namespace baton
