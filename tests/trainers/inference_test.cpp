// Ways of inference: their names, and how good the choices of draws are by each of them.
#include "trainers/inference.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <utility>

#include "engine/error.h"
#include "tests/support/npz.h"
#include "tests/support/test_data.h"

namespace baton::test {
namespace {

TEST(TaskMeasures, NamesOfInference) {
  for (const auto& [i, text] : {std::pair(Inference::map, "map"),
                                {Inference::sampled, "sampled"},
                                {Inference::softmax, "softmax"},
                                {Inference::committee, "committee"}}) {
    EXPECT_STREQ(name(i), text);
    EXPECT_EQ(parse_inference(text), i);
  }
  EXPECT_THROW(parse_inference("mean"), InputError);
  EXPECT_THROW(parse_inference(""), InputError);
  const InferenceAccuracies a{0.1, 0.2, 0.3, 0.4};
  EXPECT_EQ(a.of(Inference::map), 0.1);
  EXPECT_EQ(a.of(Inference::sampled), 0.2);
  EXPECT_EQ(a.of(Inference::softmax), 0.3);
  EXPECT_EQ(a.of(Inference::committee), 0.4);
}

TEST(TaskMeasures, OfChoices) {
  // Four draws of three images: votes {0: 2, 2: 2}, {1: 4}, {0: 1, 1: 1, 2: 2}.
  const std::vector<uint8_t> chosen{2, 1, 2, 0, 1, 0, 2, 1, 2, 0, 1, 1};
  EXPECT_DOUBLE_EQ(sampled_accuracy(chosen, {0, 1, 2}), 8. / 12);
  EXPECT_DOUBLE_EQ(sampled_accuracy(chosen, {1, 0, 0}), 1. / 12);
  EXPECT_DOUBLE_EQ(committee_accuracy(chosen, {0, 1, 2}, 3), 1);  // a tie goes to the first class
  EXPECT_DOUBLE_EQ(committee_accuracy(chosen, {2, 1, 2}, 3), 2. / 3);
  EXPECT_DOUBLE_EQ(committee_accuracy(chosen, {2, 0, 0}, 3), 0);
  EXPECT_THROW(committee_accuracy(chosen, {0, 1, 2}, 2), InputError);
  EXPECT_THROW(committee_accuracy(chosen, {0, 1, 2, 0, 1}, 3), InputError);
  EXPECT_THROW(sampled_accuracy(chosen, {0, 1, 2, 0, 1}), InputError);
  for (const auto& [c, l] : {std::pair(chosen, std::vector<uint8_t>{}), {{}, {0, 1, 2}}, {{}, {}}}) {
    EXPECT_THROW(sampled_accuracy(c, l), InputError);
    EXPECT_THROW(committee_accuracy(c, l, 3), InputError);
  }
}

TEST(TaskMeasures, OfTheAuthorsRuns) {
  for (const char* name : {"mlp_small_f64", "conv_heads_f64"}) {
    SCOPED_TRACE(name);
    const Npz golden(golden_file(std::string("bgd/") + name));
    const auto shape = golden.shape("test.logits_mc");
    const size_t draws = size_t(shape[0]), batch = size_t(shape[1]), classes = size_t(shape[2]);
    const std::vector<double> logits = golden.f64("test.logits_mc"), accuracy = golden.f64("test.acc");
    const std::vector<int64_t> y = golden.i64("y"), votes = golden.i64("test.votes"),
                               committee = golden.i64("test.pred_committee");
    std::vector<uint8_t> chosen, labels(y.begin(), y.begin() + long(batch)), of_votes, first;
    for (size_t row = 0; row < draws * batch; row++) {
      const auto from = logits.begin() + long(row * classes);
      chosen.push_back(uint8_t(std::max_element(from, from + long(classes)) - from));
    }
    EXPECT_NEAR(sampled_accuracy(chosen, labels), accuracy[1], 1e-12);
    EXPECT_NEAR(committee_accuracy(chosen, labels, int(classes)), accuracy[2], 1e-12);
    // The same from the recorded votes, draw by draw; and every decision of the committee's.
    for (size_t k = 0; k < draws; k++)
      for (size_t b = 0; b < batch; b++) {
        int64_t left = int64_t(k);
        size_t c = 0;
        while (left >= votes[b * classes + c]) left -= votes[b * classes + c++];
        of_votes.push_back(uint8_t(c));
      }
    EXPECT_EQ(committee_accuracy(of_votes, std::vector<uint8_t>(committee.begin(), committee.end()), int(classes)), 1);
    EXPECT_EQ(sampled_accuracy(of_votes, labels), sampled_accuracy(chosen, labels));
  }
}

}  // namespace
}  // namespace baton::test
