#include "trainers/metrics.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <tuple>

#include "engine/error.h"

namespace baton {
namespace {

TEST(Metrics, ByHand) {
  // Confidences .9 and .92 share a bin (one hit), .7 (a hit) and .4 (a miss) have theirs.
  const std::vector<float> p{.9f, .06f, .04f, .92f, .05f, .03f, .1f, .2f, .7f, .3f, .4f, .3f};
  const Metrics m = evaluate(p, {0, 1, 2, 2}, 3, {.1f, .2f, .3f, 1.f}, {0, .1f, 0, .3f});
  EXPECT_DOUBLE_EQ(m.accuracy, 0.5);
  EXPECT_NEAR(m.nll, -(std::log(.9) + std::log(.05) + std::log(.7) + std::log(.3)) / 4, 1e-7);
  EXPECT_NEAR(m.ece, (std::abs(.9 + .92 - 1) + std::abs(.7 - 1) + .4) / 4, 1e-7);
  EXPECT_NEAR(m.entropy, 0.4, 1e-7);
  EXPECT_NEAR(m.mutual_information, 0.1, 1e-7);
}

TEST(Metrics, CertainAndRight) {
  const Metrics m = evaluate({1, 0, 0, 1, 1, 0}, {0, 1, 0}, 2, {}, {});
  EXPECT_EQ(m.accuracy, 1);
  EXPECT_EQ(m.nll, 0);
  EXPECT_EQ(m.ece, 0);
  EXPECT_EQ(m.entropy, 0);
  EXPECT_EQ(m.mutual_information, 0);
}

TEST(Metrics, CertainAndWrongIsBounded) {
  const Metrics m = evaluate({1, 0, 1, 0}, {1, 1}, 2, {}, {});
  EXPECT_EQ(m.accuracy, 0);
  EXPECT_NEAR(m.nll, -std::log(1e-12), 1e-12);
  EXPECT_EQ(m.ece, 1);
}

TEST(Metrics, CalibratedPredictionsHaveNoError) {
  // Of 20 images with confidence .75, 15 are right; of 10 with confidence .6, 6.
  std::vector<float> p;
  std::vector<uint8_t> labels;
  for (int i = 0; i < 20; i++) p.insert(p.end(), {.75f, .25f}), labels.push_back(i >= 15);
  for (int i = 0; i < 10; i++) p.insert(p.end(), {.4f, .6f}), labels.push_back(i < 6);
  EXPECT_NEAR(evaluate(p, labels, 2, {}, {}).ece, 0, 1e-6);
}

TEST(Metrics, TheFirstOfEqualsIsThePrediction) {
  EXPECT_EQ(evaluate({.5f, .5f, .5f, .5f}, {0, 1}, 2, {}, {}).accuracy, 0.5);
}

TEST(Metrics, RefusesSizes) {
  const std::vector<float> p{.5f, .5f, .5f, .5f};
  EXPECT_THROW(evaluate({}, {}, 2, {}, {}), InputError);
  EXPECT_THROW(evaluate(p, {0}, 2, {}, {}), InputError);
  EXPECT_THROW(evaluate(p, {0, 1}, 3, {}, {}), InputError);
  EXPECT_THROW(evaluate(p, {0, 1}, 0, {}, {}), InputError);
  EXPECT_THROW(evaluate(p, {0, 1}, 2, {1.f}, {}), InputError);
  EXPECT_THROW(evaluate(p, {0, 1}, 2, {}, {1.f, 2.f, 3.f}), InputError);
  try {
    evaluate(p, {0, 1, 1}, 2, {}, {});
    FAIL() << "no error";
  } catch (const InputError& e) {
    EXPECT_NE(std::string(e.what()).find("4 probabilities for 3 labels of 2 classes"), std::string::npos) << e.what();
  }
}

// ------------------------------------------------------------------------------------- Brier, reliability, confusion
struct Sample {
  std::vector<float> probability;
  std::vector<uint8_t> labels;
};
Sample random_sample(int n, int classes, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 2);
  std::vector<float> e(classes);
  Sample s;
  for (int i = 0; i < n; i++) {
    float sum = 0;
    for (float& v : e) sum += v = std::exp(normal(random));
    for (float v : e) s.probability.push_back(v / sum);
    s.labels.push_back(uint8_t(random() % unsigned(classes)));
  }
  return s;
}

template <class F>
void expect_refusal(F f, const std::string& part) {
  try {
    f();
    ADD_FAILURE() << "no error";
  } catch (const InputError& e) {
    EXPECT_NE(std::string(e.what()).find(part), std::string::npos) << e.what();
  }
}

TEST(Brier, ByHand) {
  EXPECT_EQ(brier({1, 0, 0, 1}, {0, 1}, 2), 0);
  EXPECT_EQ(brier({1, 0, 0, 1}, {1, 0}, 2), 2);
  EXPECT_EQ(brier({.5f, .25f, .25f, 0, .5f, .5f}, {0, 2}, 3), (.25 + .0625 + .0625 + .25 + .25) / 2);
  EXPECT_EQ(brier({.25f, .25f, .25f, .25f}, {3}, 4), .75);  // 1 - 1 / classes
}

TEST(Reliability, ByHand) {
  // Of four bins the confidences .25 (its lower edge belongs to a bin), .5, .625 and 1 (in the last bin).
  const std::vector<float> p{.25f, .25f, .25f, .25f, .5f, .5f, 0, 0, .125f, .125f, .625f, .125f, 0, 0, 0, 1};
  const auto bins = reliability(p, {1, 0, 3, 3}, 4, 4);
  ASSERT_EQ(bins.size(), 4u);
  EXPECT_EQ(bins[0].count, 0);
  EXPECT_TRUE(std::isnan(bins[0].confidence) && std::isnan(bins[0].accuracy));
  EXPECT_EQ(bins[1].count, 1);
  EXPECT_EQ(bins[1].confidence, .25);
  EXPECT_EQ(bins[1].accuracy, 0);
  EXPECT_EQ(bins[2].count, 2);
  EXPECT_EQ(bins[2].confidence, .5625);
  EXPECT_EQ(bins[2].accuracy, .5);
  EXPECT_EQ(bins[3].count, 1);
  EXPECT_EQ(bins[3].confidence, 1);
  EXPECT_EQ(bins[3].accuracy, 1);
  EXPECT_EQ(reliability(p, {1, 0, 3, 3}, 4).size(), 15u);
}

TEST(Reliability, GivesTheCalibrationErrorOfEvaluate) {
  for (unsigned seed : {1, 2, 3}) {
    const Sample s = random_sample(500, 3 + 4 * int(seed), seed);
    const int classes = int(s.probability.size() / s.labels.size());
    double ece = 0, accuracy = 0;
    int64_t count = 0;
    for (const ReliabilityBin& bin : reliability(s.probability, s.labels, classes)) {
      if (!bin.count) continue;
      ece += std::abs(bin.confidence - bin.accuracy) * double(bin.count) / 500;
      accuracy += bin.accuracy * double(bin.count) / 500;
      count += bin.count;
    }
    const Metrics m = evaluate(s.probability, s.labels, classes, {}, {});
    EXPECT_NEAR(ece, m.ece, 1e-14);
    EXPECT_NEAR(accuracy, m.accuracy, 1e-14);
    EXPECT_EQ(count, 500);
    EXPECT_GT(m.ece, 0.1);
  }
}

// evaluate as its definition has it, all in one loop: its results may not move by a bit.
TEST(Metrics, EvaluateIsItsDefinition) {
  const Sample s = random_sample(1000, 10, 4);
  double confidence[15] = {}, correct[15] = {}, nll = 0, accuracy = 0, ece = 0;
  for (size_t i = 0; i < 1000; i++) {
    const float* p = &s.probability[i * 10];
    const int best = int(std::max_element(p, p + 10) - p), hit = best == s.labels[i];
    const int bin = std::min(14, int(p[best] * 15));
    confidence[bin] += p[best], correct[bin] += hit, accuracy += hit;
    nll -= std::log(std::max(double(p[s.labels[i]]), 1e-12));
  }
  for (int b = 0; b < 15; b++) ece += std::abs(confidence[b] - correct[b]);
  const Metrics m = evaluate(s.probability, s.labels, 10, {}, {});
  EXPECT_EQ(m.accuracy, accuracy / 1000);
  EXPECT_EQ(m.nll, nll / 1000);
  EXPECT_EQ(m.ece, ece / 1000);
}

TEST(ConfusionMatrix, ByHand) {
  // The last image's two classes are equal: the first is chosen.
  const std::vector<float> p{.5f, .25f, .25f, .25f, .5f, .25f, 0, 0, 1, 0, 1, 0, .25f, .375f, .375f};
  const std::vector<std::vector<int64_t>> want{{1, 1, 0}, {0, 0, 0}, {0, 2, 1}};
  EXPECT_EQ(confusion_matrix(p, {0, 0, 2, 2, 2}, 3), want);
}

TEST(ConfusionMatrix, TraceIsTheAccuracy) {
  const Sample s = random_sample(300, 5, 9);
  const auto counts = confusion_matrix(s.probability, s.labels, 5);
  int64_t right = 0, all = 0;
  for (int label = 0; label < 5; label++) {
    int64_t row = 0;
    for (int c = 0; c < 5; c++) row += counts[label][c];
    EXPECT_EQ(row, std::count(s.labels.begin(), s.labels.end(), label));
    right += counts[label][label], all += row;
  }
  EXPECT_EQ(all, 300);
  EXPECT_EQ(double(right) / 300, evaluate(s.probability, s.labels, 5, {}, {}).accuracy);
}

TEST(Metrics, AllRefuseSizesAndLabels) {
  const std::vector<float> p{.5f, .5f, .5f, .5f};
  const auto each = [&](const std::vector<float>& q, const std::vector<uint8_t>& labels, int classes,
                        const std::string& part) {
    expect_refusal([&] { evaluate(q, labels, classes, {}, {}); }, "evaluate: " + part);
    expect_refusal([&] { brier(q, labels, classes); }, "brier: " + part);
    expect_refusal([&] { reliability(q, labels, classes); }, "reliability: " + part);
    expect_refusal([&] { confusion_matrix(q, labels, classes); }, "confusion_matrix: " + part);
  };
  each({}, {}, 2, "0 probabilities for 0 labels of 2 classes");
  each(p, {0}, 2, "4 probabilities for 1 labels of 2 classes");
  each(p, {0, 1}, 0, "4 probabilities for 2 labels of 0 classes");
  each(p, {2, 0}, 2, "label 2 of 2 classes");
  for (int bins : {0, -1})
    expect_refusal([&] { reliability(p, {0, 1}, 2, bins); }, "reliability: " + std::to_string(bins) + " bins");
}

// -------------------------------------------------------------------------------------------------------- separation
TEST(Separation, ByHand) {
  const auto check = [](const std::vector<float>& known, const std::vector<float>& foreign, double auroc,
                        double fpr95) {
    const Separation s = separation(known, foreign);
    EXPECT_EQ(s.auroc, auroc);
    EXPECT_EQ(s.fpr95, fpr95);
  };
  check({1, 0, 2}, {4, 3}, 1, 0);
  check({4, 3}, {1, 0, 2}, 0, 1);
  check({5}, {5}, .5, 1);                         // a score that says nothing
  check({5, 5, 5}, {5, 5}, .5, 1);                // the same
  check({1, 3, 2, 4}, {3}, 2.5 / 4, .5);          // 1 and 2 are below, 3 is equal; 3 and 4 reach it
  check({0, 1, 2, 3}, {1.5f, 2.5f}, 5. / 8, .5);  // 2 + 3 wins; 2 and 3 reach 1.5
  check({-0.f}, {0.f}, .5, 1);                    // zeros are equal
  const float inf = std::numeric_limits<float>::infinity();
  check({-inf, 0}, {inf, inf}, 1, 0);
  check({-inf, inf}, {inf}, .75, .5);
}

TEST(Separation, TheThresholdLetsFivePercentGo) {
  // Foreign scores 0 .. 19: 19 of them, 95 %, reach 1. Of 21, 20 must; of 40, 38; of 19, all.
  std::vector<float> known, foreign;
  for (int i = 0; i < 100; i++) known.push_back(float(i) / 2 - .25f);  // -.25, .25, .75, ...
  const auto above = [&](float threshold) {
    return double(std::count_if(known.begin(), known.end(), [&](float x) { return x >= threshold; })) / 100;
  };
  for (const auto& [count, threshold] :
       {std::pair{1, 0.f}, {19, 0.f}, {20, 1.f}, {21, 1.f}, {39, 1.f}, {40, 2.f}, {100, 5.f}}) {
    foreign.clear();
    for (int i = 0; i < count; i++) foreign.push_back(float((i * 37) % count));
    EXPECT_EQ(separation(known, foreign).fpr95, above(threshold)) << count;
  }
}

TEST(Separation, AgainstAllPairs) {
  std::mt19937 random(5);
  for (const auto& [n, m, spread] :
       {std::tuple{1, 7, 3.f}, {40, 1, 3.f}, {200, 150, 2.f}, {150, 211, 40.f}, {99, 400, 1000.f}}) {
    SCOPED_TRACE(testing::Message() << n << " known, " << m << " foreign, spread " << spread);
    std::normal_distribution<float> normal(0, spread);
    std::vector<float> known(n), foreign(m);
    for (float& x : known) x = std::round(normal(random));  // ties, the more the smaller the spread
    for (float& x : foreign) x = std::round(normal(random) + spread);
    double wins = 0;
    for (float k : known)
      for (float f : foreign) wins += f > k ? 1 : f == k ? .5 : 0;
    // The least false positive rate of all thresholds that 95 % of the foreign scores reach.
    double fpr = 1;
    for (float threshold : foreign) {
      int reached = 0, taken = 0;
      for (float f : foreign) reached += f >= threshold;
      for (float k : known) taken += k >= threshold;
      if (reached * 100 >= 95 * m) fpr = std::min(fpr, double(taken) / n);
    }
    const Separation s = separation(known, foreign);
    EXPECT_EQ(s.auroc, wins / (double(n) * m));
    EXPECT_EQ(s.fpr95, fpr);
    EXPECT_NEAR(separation(foreign, known).auroc, 1 - s.auroc, 1e-15);
  }
}

TEST(Separation, LargeSetsAreSorted) {  // all pairs would take hours
  constexpr int n = 1'000'000;
  std::vector<float> known(n), foreign(n);
  for (int i = 0; i < n; i++) known[i] = float((int64_t(i) * 7919) % n), foreign[i] = known[i] + 1;
  const Separation s = separation(known, foreign);
  EXPECT_DOUBLE_EQ(s.auroc, .5 + (n - .5) / (double(n) * n));
  EXPECT_EQ(s.fpr95, double(n - 50'001) / n);
}

TEST(Separation, Refuses) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  expect_refusal([&] { separation({}, {1}); }, "0 scores of known images and 1 of foreign");
  expect_refusal([&] { separation({1, 2}, {}); }, "2 scores of known images and 0 of foreign");
  expect_refusal([&] { separation({1, nan}, {1}); }, "score 1 of the known images is NaN");
  expect_refusal([&] { separation({1}, {nan, 1}); }, "score 0 of the foreign images is NaN");
}

}  // namespace
}  // namespace baton
