// The evidence of a last layer's Laplace approximations, and the prior precision that makes it highest.
#pragma once
#include "trainers/last_layer/last_layer.h"

namespace baton {

// ln p(D | W) - 1/2 [ln det P - C D ln tau + tau |W|^2], and its derivative by ln tau at fixed W and H,
// 1/2 [C D - tau |W|^2 - d ln det P / d ln tau], where the last term is tau tr P^-1.
struct Evidence {
  double value, by_log_tau;
};
// `determinant_by_log_tau` is the last term.
Evidence compute_evidence(double log_likelihood, double log_determinant, double determinant_by_log_tau,
                          const std::vector<double>& weights, double tau);

enum class EvidenceStructure { shared, exact, kronecker };
struct TunedPrior {
  double tau, evidence;
  std::vector<double> taus, evidences;  // all that were tried, ascending by tau
};
// Finds the prior precision of the highest evidence, refitting the MAP at every value: a grid of ln tau over
// [low, high], then golden sections around its best value. Throws InputError for bounds or counts that make no sense,
// RunError where an evidence is not finite, and what fit_map throws.
TunedPrior tune_prior(Device&, const FeatureRows<double>&, int classes, EvidenceStructure, SampleWeight,
                      double low = 1e-4, double high = 1e4, int grid = 9, int refinements = 8);

}  // namespace baton
