// A diagonal Laplace approximation at a trained network, as the prior of what it learns next (Kochurov et al. 2018,
// appendix A, leave its form open; Ritter et al. 2018):
//   precision_i = (sum over the old examples of F_ii) / temperature + tau,   prior of weight i: N(w_i, 1 / precision_i)
// with F the generalized Gauss-Newton matrix of the cross-entropy, which is its Fisher information, or the empirical
// Fisher. Sums, not means: twice the data, twice the precision. Squares of single examples' gradients, never of a
// batch's.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "layers/networks.h"
#include "trainers/device_data.h"

namespace baton {

enum class Curvature {
  ggn,        // sum_n sum_k p_nk (d ln p_nk / dw)^2, exact: one backward pass a class
  empirical,  // sum_n (d ln p(y_n) / dw)^2: one backward pass, but near zero where the network fits its labels
};
Curvature parse_curvature(const std::string& name);  // "ggn", "empirical"; InputError
const char* name(Curvature);

using NamedWeights = std::map<std::string, std::vector<float>>;

// The sum over all images, for every tensor of the network. weights: a value for each of its tensors (InputError else).
// Throws Stopped when a signal asks the program to end.
NamedWeights curvature_diagonal(Device&, const NetworkFactory&, const Images&, const Normalisation&,
                                const NamedWeights& weights, Curvature);

// The mean diagonal Fisher information of the images, exact over the labels, at the weights "mean" of a store: flat, in
// the store's layout.
std::vector<float> mean_fisher(Device&, const NetworkFactory&, const Images&, const Normalisation&,
                               const ParameterStore&);

struct LaplaceSettings {
  double tau = 1;          // the prior precision: what a weight that the data say nothing about keeps
  double temperature = 1;  // above 1 widens
  double least_sd = 1e-4;  // a floor, so that no weight freezes
};
// ln standard deviations from sums of curvature.
NamedWeights laplace_log_std(const NamedWeights& curvature, const LaplaceSettings&);

}  // namespace baton
