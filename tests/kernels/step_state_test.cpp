#include "kernels/step_state.h"

#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

StepState fresh(Schedule schedule, int stage_steps, int warmup = 0) {
  StepState s{};
  s.noise = key_of(1), s.shuffle = key_of(2);
  s.stage = 2, s.stage_steps = stage_steps;
  s.part_offset = 10, s.part_size = 20;
  s.schedule = schedule;
  s.base_lr_mean = 0.5f, s.base_lr_scale = 0.25f;
  s.kl_weight = 0.125f, s.warmup_steps = warmup;
  return s;
}

// Every state after each of `steps` steps: [step][replica].
std::vector<std::vector<StepState>> run(const std::vector<StepState>& first, int steps) {
  Memory memory;
  Buffer states(memory, first);
  std::vector<std::vector<StepState>> seen;
  for (int t = 0; t < steps; t++) {
    advance_step(states, int(first.size()), memory.stream());
    seen.push_back(states.host());
  }
  return seen;
}

TEST(StepState, SmallCounters) {
  BATON_NEEDS_DEVICE();
  std::vector<StepState> first{fresh(Schedule::constant, 5), fresh(Schedule::linear, 7)};
  first[0].step = 100;  // of earlier stages
  first[1].stage_step = 3, first[1].step = 40, first[1].stage = 0;
  const auto seen = run(first, 3);
  for (int t = 0; t < 3; t++)
    for (int r = 0; r < 2; r++) {
      const StepState &s = seen[t][r], &was = first[r];
      EXPECT_EQ(s.step, was.step + t + 1);
      EXPECT_EQ(s.stage_step, was.stage_step + t + 1);
      EXPECT_EQ(s.stage, was.stage);
      EXPECT_EQ(s.stage_steps, was.stage_steps);
      EXPECT_EQ(s.part_offset, was.part_offset);
      EXPECT_EQ(s.part_size, was.part_size);
      EXPECT_EQ(s.schedule, was.schedule);
      EXPECT_EQ(s.noise.lo, was.noise.lo);
      EXPECT_EQ(s.noise.hi, was.noise.hi);
      EXPECT_EQ(s.shuffle.lo, was.shuffle.lo);
      EXPECT_EQ(s.shuffle.hi, was.shuffle.hi);
      EXPECT_EQ(s.base_lr_mean, was.base_lr_mean);
      EXPECT_EQ(s.base_lr_scale, was.base_lr_scale);
      EXPECT_EQ(s.kl_weight, was.kl_weight);
      EXPECT_EQ(s.warmup_steps, was.warmup_steps);
    }
}

TEST(StepState, Schedules) {
  BATON_NEEDS_DEVICE();
  const int steps = 20;
  const double pi = std::acos(-1.);
  const auto seen = run({fresh(Schedule::constant, steps), fresh(Schedule::linear, steps),
                         fresh(Schedule::cosine, steps), fresh(Schedule::cosine, 1)},
                        steps);
  for (int t = 0; t < steps; t++) {
    const double p = double(t) / steps;
    const double factor[3] = {1, 1 - p, (1 + std::cos(pi * p)) / 2};
    for (int r = 0; r < 3; r++) {
      EXPECT_NEAR(seen[t][r].lr_mean, 0.5 * factor[r], 3e-7) << t << " " << r;
      EXPECT_NEAR(seen[t][r].lr_scale, 0.25 * factor[r], 2e-7) << t << " " << r;
      EXPECT_GT(seen[t][r].lr_mean, 0);
    }
  }
  EXPECT_EQ(seen[0][2].lr_mean, 0.5f);  // exactly, at first
  EXPECT_EQ(seen[0][3].lr_mean, 0.5f);
}

TEST(StepState, CosineToTheEnd) {
  BATON_NEEDS_DEVICE();
  const int steps = 1000;
  const double pi = std::acos(-1.);
  StepState s = fresh(Schedule::cosine, steps);
  s.stage_step = 980;
  float last = 1;
  for (const auto& now : run({s}, 20)) {
    const double p = double(now[0].stage_step - 1) / steps;
    EXPECT_NEAR(now[0].lr_mean, 0.25 * (1 + std::cos(pi * p)), 2e-7);
    EXPECT_LT(now[0].lr_mean, last);
    last = now[0].lr_mean;
  }
}

// decay^floor((t - 1) / n): the first n steps of the stage have the whole step size.
TEST(StepState, SmallScheduleOfSteps) {
  BATON_NEEDS_DEVICE();
  const int steps = 23;
  auto of = [](int decay_steps, float decay, int stage_step) {
    StepState s = fresh(Schedule::steps, 23);
    s.decay_steps = decay_steps, s.decay = decay, s.stage_step = stage_step;
    return s;
  };
  const std::vector<StepState> first{of(4, 0.5f, 0),  of(4, 0.5f, 6), of(1, 0.5f, 0),
                                     of(30, 0.5f, 0), of(0, 0.5f, 0), of(5, 0.1f, 0)};
  const auto seen = run(first, steps);
  for (int t = 0; t < steps; t++) {
    const double halvings[] = {double(t / 4), double((t + 6) / 4), double(t), 0, 0};
    for (int r = 0; r < 5; r++) {
      EXPECT_EQ(seen[t][r].lr_mean, 0.5 * std::pow(0.5, halvings[r])) << t << " " << r;
      EXPECT_EQ(seen[t][r].lr_scale, 0.25 * std::pow(0.5, halvings[r])) << t << " " << r;
    }
    const double tenths = std::pow(0.1, t / 5);
    EXPECT_NEAR(seen[t][5].lr_mean / (0.5 * tenths), 1, 1e-6) << t;
    EXPECT_NEAR(seen[t][5].lr_scale / (0.25 * tenths), 1, 1e-6) << t;
    for (int r = 0; r < 6; r++) {
      EXPECT_EQ(seen[t][r].decay_steps, first[r].decay_steps);
      EXPECT_EQ(seen[t][r].decay, first[r].decay);
      EXPECT_EQ(seen[t][r].base_lr_mean, 0.5f);
    }
  }
}

// The other schedules do not look at it.
TEST(StepState, DecayBelongsToOneSchedule) {
  BATON_NEEDS_DEVICE();
  std::vector<StepState> with, without;
  for (Schedule schedule : {Schedule::constant, Schedule::linear, Schedule::cosine}) {
    with.push_back(fresh(schedule, 9));
    without.push_back(fresh(schedule, 9));
    with.back().decay_steps = 2, with.back().decay = 0.5f;
  }
  const auto a = run(with, 9), b = run(without, 9);
  for (int t = 0; t < 9; t++)
    for (int r = 0; r < 3; r++) EXPECT_EQ(a[t][r].lr_mean, b[t][r].lr_mean) << t << " " << r;
}

TEST(StepState, WarmUp) {
  BATON_NEEDS_DEVICE();
  const auto seen = run({fresh(Schedule::constant, 10, 0), fresh(Schedule::constant, 10, 4)}, 8);
  for (int t = 0; t < 8; t++) {
    EXPECT_EQ(seen[t][0].kl_now, 0.125f);
    EXPECT_EQ(seen[t][1].kl_now, t < 4 ? 0.125f * (t + 1) / 4 : 0.125f);
    EXPECT_EQ(seen[t][1].kl_weight, 0.125f);
  }
}

TEST(StepState, Corrections) {
  BATON_NEEDS_DEVICE();
  StepState late = fresh(Schedule::constant, 1 << 30);
  late.stage_step = 200000;
  const int steps = 40;
  const auto seen = run({fresh(Schedule::constant, steps), late}, steps);
  for (int t = 1; t <= steps; t++) {
    const double first = 1 / (1 - std::pow(double(adam_beta1), t)), second = 1 / (1 - std::pow(double(adam_beta2), t));
    EXPECT_NEAR(seen[t - 1][0].correction1 / first, 1, 5e-6) << t;
    EXPECT_NEAR(seen[t - 1][0].correction2 / second, 1, 3e-4) << t;  // 1 - 0.999 cancels
    EXPECT_EQ(seen[t - 1][1].correction1, 1);
    EXPECT_EQ(seen[t - 1][1].correction2, 1);
  }
}

// A replica whose loss was not finite stands still at that step.
TEST(StepState, SmallHaltedReplicasStandStill) {
  BATON_NEEDS_DEVICE();
  std::vector<StepState> first{fresh(Schedule::cosine, 5, 3), fresh(Schedule::cosine, 5, 3)};
  first[0].step = 12, first[0].stage_step = 2, first[0].halted = 12;
  first[0].lr_mean = 0.75f, first[0].lr_scale = 0.5f, first[0].kl_now = 0.0625f, first[0].correction1 = 3;
  for (const auto& seen : run(first, 2)) {
    EXPECT_EQ(seen[0].step, 12u);
    EXPECT_EQ(seen[0].stage_step, 2);
    EXPECT_EQ(seen[0].halted, 12);
    EXPECT_EQ(seen[0].lr_mean, 0.75f);
    EXPECT_EQ(seen[0].lr_scale, 0.5f);
    EXPECT_EQ(seen[0].kl_now, 0.0625f);
    EXPECT_EQ(seen[0].correction1, 3);
    EXPECT_EQ(seen[1].halted, 0);
  }
  EXPECT_EQ(run(first, 2)[1][1].step, 2u);
}

TEST(StepState, ManyReplicas) {
  BATON_NEEDS_DEVICE();
  std::vector<StepState> first;
  for (int r = 0; r < 300; r++) {
    first.push_back(fresh(Schedule(r % 3), 100));
    first.back().step = r;
  }
  const auto seen = run(first, 2);
  for (int r = 0; r < 300; r++) EXPECT_EQ(seen[1][r].step, r + 2);
  const auto none = run({}, 1);  // nothing to do
  EXPECT_TRUE(none[0].empty());
}

}  // namespace
}  // namespace baton::test
