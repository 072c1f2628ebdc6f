// The prior precision of the highest evidence, by every structure of the posterior precision.
#include "trainers/last_layer/evidence.h"

#include "tests/trainers/last_layer/exact_fixture.h"
#include "trainers/last_layer/kronecker.h"

namespace baton::test {
namespace {

TEST(TunePrior, DigitsByExactEvidence) {
  BATON_NEEDS_DEVICE();
  const Npz z = golden("digits_marglik_base100");
  Rows rows(digits("base100"));
  const auto tune = [&](int refinements) {
    return tune_prior(rows.device(), rows, digit_classes, EvidenceStructure::exact, SampleWeight::categorical, 1e-3,
                      1e3, 13, refinements);
  };
  const TunedPrior grid = tune(0), fine = tune(10);
  EXPECT_TRUE(within(grid.evidences, z.f64("refit_lml"), optimum));
  for (int i = 0; i < 13; i++) EXPECT_NEAR(grid.taus[i] / z.f64("taus")[i], 1, 1e-12);
  EXPECT_NEAR(grid.tau, z.scalar("best_refit_tau"), 1e-12);
  EXPECT_EQ(fine.taus.size(), 23u);
  EXPECT_TRUE(std::is_sorted(fine.taus.begin(), fine.taus.end()));
  EXPECT_EQ(fine.evidence, *std::max_element(fine.evidences.begin(), fine.evidences.end()));
  EXPECT_GT(fine.evidence, grid.evidence);
  EXPECT_GT(fine.tau, 0.0316);
  EXPECT_LT(fine.tau, 0.316);
  for (const double factor : {0.97, 1.03}) {
    ExactLastLayer layer(rows.device(), digit_dim, digit_classes, fine.tau * factor);
    const double likelihood = layer.fit(rows).log_likelihood;
    EXPECT_LT(layer.evidence(likelihood).value, fine.evidence) << factor;
  }
}

TEST(TunePrior, EveryStructure) {
  BATON_NEEDS_DEVICE();
  Small small(1, 2);
  Device& device = small.base_rows.device();
  const auto evidence_at = [&](EvidenceStructure structure, SampleWeight weight, double tau) {
    MapOptions options;
    options.tau = tau;
    const MapResult map = fit_map<double>(device, small.base_rows, Small::classes, options);
    if (structure == EvidenceStructure::kronecker)
      return KroneckerLastLayer(device, small.base_rows, Small::classes, map.weights, tau)
          .evidence(map.log_likelihood)
          .value;
    if (structure == EvidenceStructure::exact) {
      ExactLastLayer layer(device, Small::dim, Small::classes, tau);
      layer.fit_covariance(small.base_rows, map.weights);
      return layer.evidence(map.log_likelihood).value;
    }
    LastLayerOptions shared;
    shared.tau = tau, shared.weight = weight;
    LastLayer<double> layer(device, Small::dim, Small::classes, shared);
    layer.fit_covariance(small.base_rows, map.weights);
    return layer.log_evidence(map.log_likelihood);
  };
  for (const auto structure : {EvidenceStructure::shared, EvidenceStructure::exact, EvidenceStructure::kronecker})
    for (const auto weight : {SampleWeight::gaussian, SampleWeight::categorical}) {
      SCOPED_TRACE(int(structure));
      const TunedPrior tuned = tune_prior(device, small.base_rows, Small::classes, structure, weight, 1e-3, 1e4, 8, 12);
      ASSERT_EQ(tuned.taus.size(), 20u);
      for (size_t i = 0; i < 20; i += 5)
        EXPECT_NEAR(tuned.evidences[i], evidence_at(structure, weight, tuned.taus[i]), 1e-7);
      // A maximum: to the sides it falls. (With the Gaussian curvature, an upper bound, it is at the firm end.)
      EXPECT_NEAR(tuned.evidence, evidence_at(structure, weight, tuned.tau), 1e-7);
      for (const double tau : {tuned.tau * 0.8, tuned.tau * 1.25}) {
        EXPECT_TRUE(tau < 1e-3 || tau > 1e4 || evidence_at(structure, weight, tau) < tuned.evidence)
            << tuned.tau << " " << tau;
      }
    }
  // A best value at an end stays there, and is searched from inside.
  const TunedPrior edge = tune_prior(device, small.base_rows, Small::classes, EvidenceStructure::exact,
                                     SampleWeight::gaussian, 1e3, 1e4, 3, 4);
  EXPECT_EQ(edge.tau, 1e3);
  EXPECT_EQ(edge.taus.size(), 7u);
  EXPECT_EQ(edge.taus.front(), 1e3);
  EXPECT_LT(edge.taus[1], 1200);
}

}  // namespace
}  // namespace baton::test
