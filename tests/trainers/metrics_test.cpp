#include "trainers/metrics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

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

}  // namespace
}  // namespace baton
