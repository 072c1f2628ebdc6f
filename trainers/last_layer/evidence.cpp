#include "trainers/last_layer/evidence.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "trainers/last_layer/exact.h"
#include "trainers/last_layer/kronecker.h"

namespace baton {

Evidence compute_evidence(double log_likelihood, double log_determinant, double determinant_by_log_tau,
                          const std::vector<double>& weights, double tau) {
  const double order = double(weights.size()),
               squares = std::inner_product(weights.begin(), weights.end(), weights.begin(), 0.0);
  return {log_likelihood - (log_determinant - order * std::log(tau) + tau * squares) / 2,
          (order - tau * squares - determinant_by_log_tau) / 2};
}

TunedPrior tune_prior(Device& device, const FeatureRows<double>& rows, int classes, EvidenceStructure structure,
                      SampleWeight weight, double low, double high, int grid, int refinements) {
  if (!(low > 0) || !(high > low) || !std::isfinite(high) || grid < 2 || refinements < 0)
    throw InputError("a search for the prior precision needs 0 < low < high, two values or more and refinements >= 0");
  std::vector<std::pair<double, double>> tried;  // tau, evidence
  MapOptions options;
  const auto evidence_at = [&](double log_tau) {
    const double tau = options.tau = std::clamp(std::exp(log_tau), low, high);
    const MapResult map = fit_map(device, rows, classes, options);
    options.start = map.weights;  // the next value's optimum is near
    double value = 0;
    if (structure == EvidenceStructure::shared) {
      LastLayer<double> layer(device, rows.dim, classes, {.tau = tau, .weight = weight});
      layer.fit_covariance(rows, map.weights);
      value = layer.log_evidence(map.log_likelihood);
    } else if (structure == EvidenceStructure::exact) {
      ExactLastLayer layer(device, rows.dim, classes, tau);
      layer.fit_covariance(rows, map.weights);
      value = layer.evidence(map.log_likelihood).value;
    } else {
      value = KroneckerLastLayer(device, rows, classes, map.weights, tau).evidence(map.log_likelihood).value;
    }
    if (!std::isfinite(value))
      throw RunError("the evidence at the prior precision " + std::to_string(tau) + " is not finite");
    tried.emplace_back(tau, value);
    return value;
  };

  // The firmest prior comes first, since its optimum is the nearest to the first start, 0.
  std::vector<double> at(grid), values(grid);
  for (int i = grid - 1; i >= 0; i--) {
    at[i] = std::log(low) + (std::log(high) - std::log(low)) * i / (grid - 1);
    values[i] = evidence_at(at[i]);
  }
  const int best = int(std::max_element(values.begin(), values.end()) - values.begin());
  double left = at[std::max(best - 1, 0)], middle = at[best], right = at[std::min(best + 1, grid - 1)];
  double top = values[best];
  for (int i = 0; i < refinements; i++) {
    constexpr double section = 0.3819660112501051;  // (3 - sqrt 5) / 2
    const bool rightwards = right - middle >= middle - left;
    const double probe = middle + section * (rightwards ? right - middle : left - middle), value = evidence_at(probe);
    if (value > top) {
      (rightwards ? left : right) = middle;
      middle = probe, top = value;
    } else {
      (rightwards ? right : left) = probe;
    }
  }
  std::sort(tried.begin(), tried.end());
  const auto found =
      std::max_element(tried.begin(), tried.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  TunedPrior result{found->first, found->second, {}, {}};
  for (const auto& [tau, value] : tried) result.taus.push_back(tau), result.evidences.push_back(value);
  return result;
}

}  // namespace baton
