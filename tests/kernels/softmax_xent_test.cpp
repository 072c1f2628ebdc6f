#include "kernels/softmax_xent.h"

#include <random>

#include "kernels/step_state.h"
#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

struct Result {
  std::vector<float> loss, hit, dlogits;
};

Result run(const std::vector<float>& logits, const std::vector<int32_t>& labels, int replicas, int batch, int classes,
           float scale, bool gradient = true, bool shared_labels = false) {
  Memory memory;
  Buffer x(memory, logits);
  Buffer label(memory, labels);
  const size_t rows = size_t(replicas) * batch;
  Buffer<float> loss(memory, rows, NAN), hit(memory, rows, NAN), dx(memory, logits.size(), NAN);
  softmax_cross_entropy(loss, hit, gradient ? dx.data() : nullptr, x, label, replicas, batch, classes, scale,
                        memory.stream(), shared_labels);
  return {loss.host(), hit.host(), dx.host()};
}

struct Reference {
  std::vector<double> loss, hit, dlogits;
};

Reference reference(const std::vector<float>& logits, const std::vector<int32_t>& labels, int classes, double scale) {
  Reference r;
  for (size_t row = 0; row < labels.size(); row++) {
    const float* x = &logits[row * classes];
    int first = 0;
    for (int c = 1; c < classes; c++)
      if (x[c] > x[first]) first = c;
    double sum = 0;
    for (int c = 0; c < classes; c++) sum += std::exp(double(x[c]) - x[first]);
    r.loss.push_back(std::log(sum) + x[first] - x[labels[row]]);
    r.hit.push_back(first == labels[row]);
    for (int c = 0; c < classes; c++)
      r.dlogits.push_back(scale * (std::exp(double(x[c]) - x[first]) / sum - (c == labels[row])));
  }
  return r;
}

void check_against_reference(int replicas, int batch, int classes, float spread) {
  SCOPED_TRACE(testing::Message() << "[" << replicas << "][" << batch << "][" << classes << "] spread " << spread);
  std::mt19937 random(classes);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> logits(size_t(replicas) * batch * classes);
  std::vector<int32_t> labels(size_t(replicas) * batch);
  for (float& x : logits) x = normal(random);
  for (int32_t& l : labels) l = int32_t(random() % classes);
  const float scale = 1.f / batch;
  const Result got = run(logits, labels, replicas, batch, classes, scale);
  const Reference want = reference(logits, labels, classes, scale);
  EXPECT_TRUE(exact(got.hit, want.hit));
  if (classes > 1) {
    EXPECT_TRUE(close(got.loss, want.loss, {.l2 = 5e-7}));
    EXPECT_TRUE(close(got.dlogits, want.dlogits, {.l2 = 5e-7}));
  } else {
    EXPECT_TRUE(exact(got.loss, want.loss));
    EXPECT_TRUE(exact(got.dlogits, want.dlogits));
  }
  const std::string name = "softmax_xent." + std::to_string(replicas) + "x" + std::to_string(batch) + "x" +
                           std::to_string(classes) + "." + std::to_string(int(spread));
  record(name + ".loss", got.loss);
  record(name + ".dlogits", got.dlogits);
  record(name + ".hit", got.hit, 0);
}

TEST(SoftmaxXent, SmallExact) {
  BATON_NEEDS_DEVICE();
  // Equal logits: every probability is 1 / 4, the first class is the arg max.
  Result r = run(std::vector<float>(12, 3.f), {0, 1, 3}, 1, 3, 4, 2.f);
  EXPECT_TRUE(exact(r.hit, std::vector<float>{1, 0, 0}));
  EXPECT_TRUE(exact(r.dlogits, std::vector<float>{-1.5, .5, .5, .5, .5, -1.5, .5, .5, .5, .5, .5, -1.5}));
  for (float loss : r.loss) EXPECT_FLOAT_EQ(loss, std::log(4.f));
  // The arg max is the first of equals, wherever the label stands.
  r = run({1, 2, 2, 0, 0, 0, 5, 5, 5, -1, -2, -1}, {1, 2, 0, 2}, 2, 2, 3, 1.f);
  EXPECT_TRUE(exact(r.hit, std::vector<float>{1, 0, 1, 0}));
}

TEST(SoftmaxXent, SmallAgainstReference) {
  BATON_NEEDS_DEVICE();
  check_against_reference(2, 3, 10, 1);
  check_against_reference(1, 2, 40, 3);
}

TEST(SoftmaxXent, AgainstReference) {
  BATON_NEEDS_DEVICE();
  check_against_reference(1, 1, 1, 1);
  check_against_reference(1, 7, 2, 1);
  check_against_reference(3, 50, 10, 1);
  check_against_reference(1, 128, 10, 30);
  check_against_reference(2, 9, 31, 1);
  check_against_reference(2, 9, 32, 1);
  check_against_reference(2, 9, 33, 1);
  check_against_reference(1, 4, 1000, 2);
}

TEST(SoftmaxXent, FiniteDifferences) {
  BATON_NEEDS_DEVICE();
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> logits(2 * 10);
  for (float& x : logits) x = normal(random);
  const std::vector<int32_t> labels{4, 9};
  const float scale = 0.5f;
  auto objective = [&](const std::vector<float>& x) {
    const Result r = run(x, labels, 1, 2, 10, scale, false);
    return double(scale) * (double(r.loss[0]) + r.loss[1]);
  };
  EXPECT_TRUE(close(run(logits, labels, 1, 2, 10, scale).dlogits, central_differences(logits, 1.f / 64, objective),
                    {.l2 = 3e-4}));
}

TEST(SoftmaxXent, LossWithoutGradientIsTheSame) {
  BATON_NEEDS_DEVICE();
  for (int classes : {10, 12}) {
    std::mt19937 random(4);
    std::normal_distribution<float> normal(0, 5);
    std::vector<float> logits(6 * classes);
    for (float& x : logits) x = normal(random);
    const std::vector<int32_t> labels{0, 1, 2, 3, 4, 5};
    const Result with = run(logits, labels, 2, 3, classes, 1.f);
    const Result without = run(logits, labels, 2, 3, classes, 1.f, false);
    EXPECT_TRUE(exact(without.loss, with.loss));
    EXPECT_TRUE(exact(without.hit, with.hit));
    for (float untouched : without.dlogits) EXPECT_TRUE(std::isnan(untouched));
  }
}

// The same rows whether every replica brings the labels or one copy serves them all.
void check_shared_labels(int replicas, int batch, int classes) {
  SCOPED_TRACE(testing::Message() << "[" << replicas << "][" << batch << "][" << classes << "]");
  std::mt19937 random(classes + batch);
  std::normal_distribution<float> normal(0, 2);
  std::vector<float> logits(size_t(replicas) * batch * classes);
  for (float& x : logits) x = normal(random);
  std::vector<int32_t> labels(batch), repeated;
  for (int32_t& l : labels) l = int32_t(random() % classes);
  for (int r = 0; r < replicas; r++) repeated.insert(repeated.end(), labels.begin(), labels.end());
  for (bool gradient : {true, false}) {
    const Result want = run(logits, repeated, replicas, batch, classes, 0.25f, gradient);
    const Result got = run(logits, labels, replicas, batch, classes, 0.25f, gradient, true);
    EXPECT_TRUE(exact(got.loss, want.loss));
    EXPECT_TRUE(exact(got.hit, want.hit));
    EXPECT_TRUE(exact(got.dlogits, want.dlogits));
    for (float loss : got.loss) EXPECT_TRUE(std::isfinite(loss));
  }
}

TEST(SoftmaxXent, SmallSharedLabels) {
  BATON_NEEDS_DEVICE();
  check_shared_labels(3, 2, 10);
}

TEST(SoftmaxXent, SharedLabels) {
  BATON_NEEDS_DEVICE();
  check_shared_labels(1, 5, 10);
  check_shared_labels(10, 128, 10);
  check_shared_labels(3, 7, 2);
  check_shared_labels(4, 33, 100);
  check_shared_labels(5, 1, 33);
}

TEST(SoftmaxXent, SmallExtremes) {
  BATON_NEEDS_DEVICE();
  const float inf = INFINITY;
  // Large logits neither overflow nor lose the loss.
  Result r = run({3e38f, -3e38f, 0, 1e4f, 1e4f, -1e4f, -inf, 0, 0}, {0, 0, 1}, 1, 3, 3, 1.f);
  EXPECT_FLOAT_EQ(r.loss[0], 0.f);
  EXPECT_FLOAT_EQ(r.loss[1], std::log(2.f));
  EXPECT_FLOAT_EQ(r.loss[2], std::log(2.f));
  EXPECT_TRUE(exact(r.hit, std::vector<float>{1, 1, 1}));
  EXPECT_TRUE(exact(r.dlogits, std::vector<float>{0, 0, 0, -.5, .5, 0, 0, -.5, .5}));
  // A NaN, an infinite maximum and a label that is no class show in the loss of their row, and nowhere else.
  r = run({0, NAN, NAN, 0, inf, 0, 1, 0, 0, 0, 0, 0}, {0, 0, 0, 2, -1, 0}, 1, 6, 2, 1.f);
  for (int row = 0; row < 6; row++) EXPECT_EQ(std::isfinite(r.loss[row]), row == 5) << row;
  EXPECT_TRUE(exact(r.hit, std::vector<float>{0, 0, 1, 0, 0, 1}));
  EXPECT_TRUE(exact(std::vector(r.dlogits.end() - 2, r.dlogits.end()), std::vector<float>{-.5, .5}));
}

TEST(SoftmaxXent, GradientSumsToZeroOverClasses) {
  BATON_NEEDS_DEVICE();
  std::mt19937 random(5);
  std::normal_distribution<float> normal(0, 2);
  std::vector<float> logits(20 * 10);
  for (float& x : logits) x = normal(random);
  const Result r = run(logits, std::vector<int32_t>(20, 7), 4, 5, 10, 1.f);
  for (int row = 0; row < 20; row++) {
    double sum = 0;
    for (int c = 0; c < 10; c++) sum += r.dlogits[row * 10 + c];
    EXPECT_NEAR(sum, 0, 5e-7);
  }
}

TEST(SoftmaxXent, RefusesShapes) {
  float x = 0;
  int32_t label = 0;
  try {
    softmax_cross_entropy(&x, &x, nullptr, &x, &label, 2, 3, 0, 1.f, {});
    FAIL() << "no error";
  } catch (const InputError& e) {
    EXPECT_NE(std::string(e.what()).find("logits has shape [2][3][0]"), std::string::npos) << e.what();
  }
  EXPECT_THROW(softmax_cross_entropy(&x, &x, nullptr, &x, &label, 1 << 16, 1 << 16, 10, 1.f, {}), InputError);
  EXPECT_THROW(softmax_cross_entropy(&x, &x, &x, &x, &label, 1, 1, 1, 1.f, {}), InputError);
  EXPECT_THROW(add_to_totals(nullptr, &x, &x, nullptr, 1, 0, {}), InputError);
}

StepState at_step(uint32_t step) {
  StepState s{};
  s.step = step;
  return s;
}

TEST(Totals, SmallAddsBatches) {
  BATON_NEEDS_DEVICE();
  const int replicas = 2, batch = 5;
  Memory memory;
  Buffer states(memory, std::vector<StepState>{at_step(11), at_step(12)});
  Totals start{};
  start.loss = 1;
  Buffer totals(memory, std::vector<Totals>(replicas, start));
  Buffer loss(memory, std::vector<float>{1, 2, 3, 4, 5, 10, 20, 30, 40, 50});
  Buffer hit(memory, std::vector<float>{1, 0, 0, 1, 0, 1, 1, 1, 1, 1});
  for (int call = 0; call < 2; call++) add_to_totals(totals, loss, hit, states, replicas, batch, memory.stream());
  const auto t = totals.host();
  EXPECT_EQ(t[0].loss, 31);
  EXPECT_EQ(t[1].loss, 301);
  EXPECT_EQ(t[0].hits, 4);
  EXPECT_EQ(t[1].hits, 10);
  for (const Totals& one : t) {
    EXPECT_EQ(one.examples, 10);
    EXPECT_EQ(one.steps, 2);
    EXPECT_EQ(one.nonfinite_step, 0);
  }
}

TEST(Totals, SmallReportsTheFirstStepThatIsNotFinite) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  Buffer<Totals> totals(memory, 3);
  Buffer<float> hit(memory, 9);
  Buffer<StepState> states(memory, 3);
  Buffer<float> loss(memory, 9);
  const float inf = INFINITY;
  const std::vector<std::vector<float>> steps{{1, 1, 1, 1, 1, 1, 1, 1, 1},
                                              {1, 1, 1, 1, NAN, 1, 1, 1, 1},
                                              {1, 1, 1, NAN, 1, 1, inf, -inf, 1},
                                              {3e38f, 3e38f, 3e38f, 1, 1, 1, 1, 1, 1}};
  for (size_t s = 0; s < steps.size(); s++) {
    loss.set(steps[s]);
    states.set(std::vector<StepState>(3, at_step(uint32_t(s + 1))));
    add_to_totals(totals, loss, hit, states, 3, 3, memory.stream());
  }
  const auto t = totals.host();
  EXPECT_EQ(t[0].nonfinite_step, 0);
  EXPECT_EQ(t[1].nonfinite_step, 2);
  EXPECT_EQ(t[2].nonfinite_step, 3);
}

// Where the loss is not finite the replica is halted at that step, and stays so.
TEST(Totals, SmallHaltsTheReplica) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  Buffer<Totals> totals(memory, 3);
  Buffer<float> hit(memory, 6), loss(memory, 6);
  std::vector<StepState> first{at_step(7), at_step(8), at_step(9)};
  Buffer states(memory, first);
  loss.set({1, 2, NAN, 1, 3, 4});
  add_to_totals(totals, loss, hit, states, 3, 2, memory.stream());
  EXPECT_EQ(states.host()[0].halted, 0);
  EXPECT_EQ(states.host()[1].halted, 8);
  EXPECT_EQ(states.host()[2].halted, 0);
  loss.set({INFINITY, 2, NAN, 1, 3, 4});
  advance_step(states, 3, memory.stream());
  add_to_totals(totals, loss, hit, states, 3, 2, memory.stream());
  EXPECT_EQ(states.host()[0].halted, 8);
  EXPECT_EQ(states.host()[1].halted, 8);
  EXPECT_EQ(states.host()[1].step, 8u);
  EXPECT_EQ(states.host()[2].halted, 0);
  EXPECT_EQ(states.host()[2].step, 10u);
  EXPECT_EQ(totals.host()[0].nonfinite_step, 8);
  EXPECT_EQ(totals.host()[1].nonfinite_step, 8);
}

TEST(Totals, AgainstReferenceAndTheSameEveryRun) {
  BATON_NEEDS_DEVICE();
  for (int batch : {1, 31, 128, 1000}) {
    const int replicas = 3;
    std::mt19937 random(batch);
    std::exponential_distribution<float> exponential;
    std::vector<float> losses(size_t(replicas) * batch), hits(losses.size());
    for (float& x : losses) x = exponential(random);
    for (float& x : hits) x = float(random() % 2);
    std::vector<Totals> runs[2];
    for (auto& result : runs) {
      Memory memory;
      Buffer loss(memory, losses), hit(memory, hits);
      Buffer states(memory, std::vector<StepState>(replicas, at_step(1)));
      Buffer<Totals> totals(memory, replicas);
      add_to_totals(totals, loss, hit, states, replicas, batch, memory.stream());
      result = totals.host();
    }
    std::vector<float> sums;
    for (int r = 0; r < replicas; r++) {
      double loss = 0, hit = 0;
      for (int b = 0; b < batch; b++) loss += losses[size_t(r) * batch + b], hit += hits[size_t(r) * batch + b];
      EXPECT_NEAR(runs[0][r].loss, loss, 1e-13 * loss);
      EXPECT_EQ(runs[0][r].hits, hit);
      EXPECT_EQ(runs[0][r].examples, batch);
      EXPECT_EQ(runs[0][r].loss, runs[1][r].loss);
      sums.push_back(float(runs[0][r].loss));
    }
    record("totals." + std::to_string(batch), sums);
  }
}

}  // namespace
}  // namespace baton::test
