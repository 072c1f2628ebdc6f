#include <algorithm>
#include <cmath>

#include "tests/kernels/bgd_fixture.h"
#include "tests/support/device.h"
#include "tests/support/npz.h"

namespace baton::test {
namespace {

struct Posterior {
  Posterior(const std::vector<float>& mean_, const std::vector<float>& sd_, std::vector<StepState> states_)
      : count(int(mean_.size())),
        replicas(int(states_.size())),
        mean(memory, mean_),
        sd(memory, sd_),
        sum(memory, mean_.size()),
        noise(memory, mean_.size()),
        partial(memory, bgd_partials(int(mean_.size())), NAN),
        states(memory, states_),
        statistics(memory, size_t(1)),
        wire(memory, size_t(1)) {}
  void set_moments(const std::vector<float>& s, const std::vector<float>& n) { sum.set(s), noise.set(n); }
  void update(const BgdRule& rule) {
    bgd_update(mean, sd, {sum, noise}, count, rule, statistics, wire, states, replicas, partial, memory.stream());
    partial.host(), sum.host(), noise.host();  // check their guards
  }
  void at_step(uint32_t step) {
    std::vector<StepState> s = states.host();
    for (StepState& one : s) one.step = step;
    states.set(s);
  }
  SigmaStatistics seen() { return statistics.host()[0]; }
  TripWire tripped() { return wire.host()[0]; }

  Memory memory;
  int count, replicas;
  Buffer<float> mean, sd, sum, noise, partial;
  Buffer<StepState> states;
  Buffer<SigmaStatistics> statistics;
  Buffer<TripWire> wire;
};

// A wire that nothing trips.
BgdRule quiet(float gradient_scale = 1) {
  BgdRule rule;
  rule.gradient_scale = gradient_scale;
  rule.initial_sd = 1;
  rule.warn_ratio = rule.halt_ratio = 3e38f;
  return rule;
}

// Algorithm 1 for one weight, in double and without cancellation.
struct Weight {
  double mean, sd;
};
Weight updated(double mean, double sd, double e1, double e2, double eta) {
  return {mean - eta * sd * sd * e1, sd * std::exp(-std::asinh(0.5 * sd * e2))};
}

// Every standard deviation relative to itself; every mean relative to what was added up to it.
void expect_weights(Posterior& p, const std::vector<double>& mean, const std::vector<double>& sd,
                    const std::vector<float>& old_mean, double mean_tolerance, double sd_tolerance) {
  const std::vector<float> got_mean = p.mean.host(), got_sd = p.sd.host();
  for (int i = 0; i < p.count; i++) {
    const double scale = std::abs(old_mean[i]) + std::abs(mean[i] - old_mean[i]);
    const double mean_error = std::abs(got_mean[i] - mean[i]) / std::max(scale, 1e-30),
                 sd_error = std::abs(got_sd[i] - sd[i]) / std::max(sd[i], 1e-40);
    ASSERT_LE(mean_error, mean_tolerance) << i << ": " << got_mean[i] << ", expected " << mean[i];
    ASSERT_LE(sd_error, sd_tolerance) << i << ": " << got_sd[i] << ", expected " << sd[i];
  }
}

int bin_of(float sd) {  // by the edges
  int bin = 0;
  while (bin + 1 < sd_bins && sd >= sd_bin_edge(bin + 1)) bin++;
  return bin;
}
// Of the standard deviations that the device holds, all but the largest x and the non-finite ones.
void expect_statistics(const SigmaStatistics& got, const std::vector<float>& sd) {
  std::vector<float> counted;
  std::vector<uint32_t> histogram(sd_bins);
  for (float s : sd)
    if (s > 0) counted.push_back(s), histogram[bin_of(s)]++;
  std::sort(counted.begin(), counted.end());
  const size_t n = counted.size();
  ASSERT_EQ(got.weights, int(n));
  EXPECT_TRUE(exact(std::vector<uint32_t>(got.histogram, got.histogram + sd_bins), histogram));
  if (n == 0) return;
  EXPECT_EQ(got.largest, counted.back());
  EXPECT_EQ(got.smallest, counted.front());
  const float median = counted[n / 2], lower = counted[(n - 1) / 2];
  EXPECT_TRUE(std::abs(got.median - median) <= 1.0001f / 16 * median ||
              std::abs(got.median - lower) <= 1.0001f / 16 * lower)
      << got.median << ", expected " << lower << " or " << median;
}

TEST(BgdUpdate, SmallEdgesOfBins) {
  EXPECT_EQ(sd_bin_edge(0), 0x1p-24f);
  EXPECT_EQ(sd_bin_edge(3), 1.375f * 0x1p-24f);
  EXPECT_EQ(sd_bin_edge(8), 0x1p-23f);
  EXPECT_EQ(sd_bin_edge(8 * 24), 1.f);
  EXPECT_EQ(sd_bin_edge(8 * 24 + 5), 1.625f);
  EXPECT_EQ(sd_bin_edge(sd_bins - 1), 1.875f * 0x1p7f);
}

// The authors' vectors: x = sigma E[g e] / 2 from 1e-6 to 1e6, both signs. Their own float32 step leaves 179 standard
// deviations at 0 or below.
TEST(BgdUpdate, GoldenVectors) {
  BATON_NEEDS_DEVICE();
  const Npz golden(golden_file("bgd/update_vectors"));
  const std::vector<float> mean = golden.f32("mu"), sd = golden.f32("sigma");
  const float eta = float(golden.scalar("eta"));
  ASSERT_EQ(eta, 2);
  Posterior p(mean, sd, states_of(1, eta));
  p.set_moments(golden.f32("egrad"), golden.f32("egradeps"));
  p.update(quiet());
  expect_weights(p, golden.f64("mu_f64"), golden.f64("sigma_exact"), mean, 4e-7, 2e-6);
  const std::vector<float> now = p.sd.host(), noise = golden.f32("egradeps");
  const std::vector<double> want = golden.f64("sigma_exact");
  double largest_x = 0;
  for (size_t i = 0; i < now.size(); i++) {
    EXPECT_GT(now[i], 0) << i;
    const double x = 0.5 * sd[i] * noise[i];
    largest_x = std::max(largest_x, std::abs(x));
    if (std::abs(x) < 1) {  // where the steps of a run lie: they must not lean
      EXPECT_NEAR(now[i], want[i], 2.5e-7 * want[i]) << i << ", x " << x;
    }
  }
  expect_statistics(p.seen(), now);
  EXPECT_NEAR(p.seen().largest_x, largest_x, 1e-6 * largest_x);
  EXPECT_EQ(p.seen().nonfinite, 0);
  EXPECT_EQ(p.tripped().warned_step, 0);
  EXPECT_EQ(p.tripped().halted_step, 0);
  record("bgd_update.vectors.mean", p.mean.host());
  record("bgd_update.vectors.sd", now, 2e-6f);
}

// Every step of a recorded run, alone: from the recorded state, with the recorded expectations.
void check_recorded_steps(const char* name, const std::vector<std::string>& tensors, bool bounded) {
  const Npz golden(golden_file(std::string("bgd/") + name));
  const int steps = int(golden.shape("batch_size")[0]);
  const float eta = float(golden.scalar("eta"));
  for (int t = 0; t < steps; t++)
    for (const std::string& tensor : tensors) {
      SCOPED_TRACE(testing::Message() << name << ", step " << t << ", " << tensor);
      auto part = [&](const char* key, int at) {
        const std::vector<double> all = golden.f64(key + tensor);
        const size_t n = all.size() / golden.shape(key + tensor)[0];
        return std::vector<double>(all.begin() + n * at, all.begin() + n * (at + 1));
      };
      auto floats = [&](const char* key, int at) {
        const std::vector<double> v = part(key, at);
        return std::vector<float>(v.begin(), v.end());
      };
      const std::vector<float> mean = floats("mu.", t), sd = floats("sigma.", t), e1 = floats("egrad.", t),
                               e2 = floats("egradeps.", t);
      Posterior p(mean, sd, states_of(t + 1, eta));
      p.set_moments(e1, e2);
      p.update(quiet());
      // The recorded values went through the authors' formula in double: at x = 2e5 that loses 2e-6 of sigma.
      expect_weights(p, part("mu.", t + 1), part("sigma.", t + 1), mean, 5e-7, bounded ? 1e-6 : 5e-6);
      std::vector<double> want_mean, want_sd;
      for (int i = 0; i < p.count; i++) {
        const Weight w = updated(mean[i], sd[i], e1[i], e2[i], eta);
        want_mean.push_back(w.mean), want_sd.push_back(w.sd);
        if (e1[i] == 0 && e2[i] == 0) {
          ASSERT_EQ(bits({p.mean.host()[i], p.sd.host()[i]}), bits({mean[i], sd[i]})) << i;
        }
      }
      expect_weights(p, want_mean, want_sd, mean, 4e-7, 2e-6);
      expect_statistics(p.seen(), p.sd.host());
    }
}

const std::vector<std::string> mlp_tensors{"layer1.0.weight", "layer1.0.bias",       "layer2.0.weight",
                                           "layer2.0.bias",   "last_layer.0.weight", "last_layer.0.bias"};

TEST(BgdUpdate, GoldenSteps) {
  BATON_NEEDS_DEVICE();
  check_recorded_steps("mlp_small_f64", mlp_tensors, true);
  // One head a task: the other's gradients are zeros.
  check_recorded_steps("conv_heads_f64",
                       {"c1.weight", "c1.bias", "c2.weight", "c2.bias", "fc.weight", "fc.bias", "last.0.weight",
                        "last.0.bias", "last.1.weight", "last.1.bias"},
                       true);
}

TEST(BgdUpdate, GoldenStepsOfADivergingRun) {
  BATON_NEEDS_DEVICE();
  check_recorded_steps("mlp_hot_f64", mlp_tensors, false);
}

// Sizes, the scale of the sums, clamp and bounds against a double loop.
void check_update(int count, const BgdRule& rule, const std::string& name = "") {
  SCOPED_TRACE(testing::Message() << count << " weights, scale " << rule.gradient_scale << ", clamp " << rule.clamp
                                  << ", bounds " << rule.least_sd << " to " << rule.largest_sd);
  const float eta = 1.5f;
  const std::vector<float> mean = normals(count, 1), sum = normals(count, 3, 0, 30), noise = normals(count, 4, 0, 30);
  std::vector<float> sd = deviations(count, 2);
  for (int i = 5; i < count; i += 7) sd[i] = 0;
  Posterior p(mean, sd, states_of(3, eta, 3));
  p.set_moments(sum, noise);
  p.update(rule);
  std::vector<double> want_mean, want_sd;
  double largest_x = 0;
  auto clamped = [&](double v) { return rule.clamp > 0 ? std::clamp<double>(v, -rule.clamp, rule.clamp) : v; };
  for (int i = 0; i < count; i++) {
    const double e1 = clamped(double(sum[i]) * rule.gradient_scale),
                 e2 = clamped(double(noise[i]) * rule.gradient_scale);
    Weight w = updated(mean[i], sd[i], e1, e2, eta);
    if (sd[i] > 0 && rule.least_sd > 0) w.sd = std::max<double>(w.sd, rule.least_sd);
    if (sd[i] > 0 && rule.largest_sd > 0) w.sd = std::min<double>(w.sd, rule.largest_sd);
    largest_x = std::max(largest_x, std::abs(0.5 * sd[i] * e2));
    want_mean.push_back(w.mean), want_sd.push_back(w.sd);
  }
  expect_weights(p, want_mean, want_sd, mean, 4e-7, 1e-6);
  expect_statistics(p.seen(), p.sd.host());
  EXPECT_NEAR(p.seen().largest_x, largest_x, 1e-6 * largest_x);
  EXPECT_EQ(p.seen().nonfinite, 0);
  const std::vector<float> now_mean = p.mean.host(), now_sd = p.sd.host();
  for (int i = 0; i < count; i++)
    if (sd[i] == 0) {
      EXPECT_EQ(bits({now_mean[i], now_sd[i]}), bits({mean[i], 0.f})) << i;
    }
  if (!name.empty()) record("bgd_update." + name, now_sd);

  // The same bits again, with scratch and statistics that were used before.
  Posterior again(mean, sd, states_of(3, eta, 3));
  again.set_moments(std::vector<float>(count), std::vector<float>(count));
  again.update(rule);
  again.mean.set(mean), again.sd.set(sd);
  again.set_moments(sum, noise);
  again.update(rule);
  EXPECT_EQ(bits(again.mean.host()), bits(now_mean));
  EXPECT_EQ(bits(again.sd.host()), bits(now_sd));
  const SigmaStatistics a = p.seen(), b = again.seen();
  EXPECT_EQ(std::memcmp(&a, &b, sizeof a), 0);
}

BgdRule clamp_and_bounds(float clamp, float least, float largest, float scale = 0.1f) {
  BgdRule rule = quiet(scale);
  rule.clamp = clamp, rule.least_sd = least, rule.largest_sd = largest;
  return rule;
}

TEST(BgdUpdate, SmallSizes) {
  BATON_NEEDS_DEVICE();
  check_update(6, quiet(0.5f));
  check_update(11, clamp_and_bounds(2, 0.03f, 0.09f));
}

TEST(BgdUpdate, Sizes) {
  BATON_NEEDS_DEVICE();
  for (int count : {1, 2, 3, 4, 13, 255, 256, 257, 1023, 2050, 4095, 4096, 4097}) check_update(count, quiet(0.1f));
  check_update(70001, quiet(0.1f), "large");
}

TEST(BgdUpdate, ClampAndBounds) {
  BATON_NEEDS_DEVICE();
  check_update(1003, clamp_and_bounds(2, 0, 0), "clamp");
  check_update(1003, clamp_and_bounds(0, 0.05f, 0));
  check_update(1003, clamp_and_bounds(0, 0, 0.07f));
  check_update(1003, clamp_and_bounds(1, 0.05f, 0.07f), "bounds");
}

TEST(BgdUpdate, SmallScaleOfTheSums) {
  BATON_NEEDS_DEVICE();
  const std::vector<float> mean = normals(9, 1), sd = deviations(9, 2), sum = normals(9, 3),
                           noise = normals(9, 4, 0, 9);
  Posterior one(mean, sd, states_of(1)), four(mean, sd, states_of(1));
  one.set_moments(sum, noise);
  std::vector<float> sum4 = sum, noise4 = noise;
  for (int i = 0; i < 9; i++) sum4[i] *= 4, noise4[i] *= 4;
  four.set_moments(sum4, noise4);
  one.update(quiet()), four.update(quiet(0.25f));
  EXPECT_EQ(bits(one.mean.host()), bits(four.mean.host()));
  EXPECT_EQ(bits(one.sd.host()), bits(four.sd.host()));
  EXPECT_NE(bits(one.sd.host()), bits(sd));
}

// What has no gradient (a head that is not in use) stays as it is to the bit, even outside the bounds; and what is
// pruned is not brought back.
TEST(BgdUpdate, SmallNothingMovesWithoutMoments) {
  BATON_NEEDS_DEVICE();
  std::vector<float> mean = normals(10, 1), sd = deviations(10, 2);
  mean[2] = sd[2] = 0, mean[7] = sd[7] = 0, sd[9] = 0;
  Posterior p(mean, sd, states_of(1, 2));
  for (const BgdRule& rule : {quiet(), clamp_and_bounds(1, 0.05f, 0.06f)}) {
    p.update(rule);
    EXPECT_EQ(bits(p.mean.host()), bits(mean));
    EXPECT_EQ(bits(p.sd.host()), bits(sd));
    expect_statistics(p.seen(), sd);
    EXPECT_EQ(p.seen().weights, 7);
    EXPECT_EQ(p.seen().largest_x, 0);
  }

  p.set_moments(normals(10, 3, 0, 10), normals(10, 4, 0, 10));
  for (const BgdRule& rule : {quiet(), clamp_and_bounds(0, 0.01f, 0.5f)}) {
    p.update(rule);
    for (int i : {2, 7, 9}) EXPECT_EQ(bits({p.mean.host()[i], p.sd.host()[i]}), bits({mean[i], 0.f})) << i;
    EXPECT_EQ(p.seen().weights, 7);
    EXPECT_NE(p.sd.host()[0], sd[0]);
  }
}

TEST(BgdUpdate, SmallEverythingPruned) {
  BATON_NEEDS_DEVICE();
  Posterior p(std::vector<float>(6), std::vector<float>(6), states_of(4));
  p.set_moments(normals(6, 1), normals(6, 2));
  BgdRule rule;
  rule.initial_sd = 0.06f;
  p.update(rule);
  EXPECT_EQ(bits(p.mean.host()), bits(std::vector<float>(6)));
  EXPECT_EQ(bits(p.sd.host()), bits(std::vector<float>(6)));
  expect_statistics(p.seen(), p.sd.host());
  EXPECT_EQ(p.seen().nonfinite, 0);
  EXPECT_EQ(p.tripped().warned_step, 0);
  EXPECT_EQ(p.tripped().halted_step, 0);
}

// Beyond x = 2^64, x^2 is beyond float.
TEST(BgdUpdate, SmallLargeStepsStayPositive) {
  BATON_NEEDS_DEVICE();
  std::vector<float> noise;
  for (float x : {1e4f, 1e8f, 1e16f, 1e19f, 2e19f, 1e25f, 1e30f}) noise.push_back(x), noise.push_back(-x);
  const size_t n = noise.size();
  Posterior p(std::vector<float>(n), std::vector<float>(n, 2.f), states_of(1));
  p.set_moments(std::vector<float>(n), noise);
  p.update(quiet());
  const std::vector<float> sd = p.sd.host();
  for (size_t i = 0; i < n; i++) {
    EXPECT_GT(sd[i], 0) << noise[i];
    const double want = 2 * std::exp(-std::asinh(double(noise[i])));
    EXPECT_NEAR(sd[i], want, 1e-5 * want) << noise[i];
  }
  EXPECT_EQ(p.seen().nonfinite, 0);
}

TEST(BgdUpdate, SmallBinsAreClipped) {
  BATON_NEEDS_DEVICE();
  std::vector<float> sd;
  for (int bin : {0, 1, 7, 8, 100, 191, 192, 254, 255}) {
    sd.push_back(sd_bin_edge(bin));
    sd.push_back(std::nextafter(sd_bin_edge(bin), 0.f));
    sd.push_back(std::nextafter(sd_bin_edge(bin), 1e9f));
  }
  for (float s : {0.f, 1e-30f, 0x1p-25f, 255.99f, 256.f, 1e9f, 1e-42f}) sd.push_back(s);
  Posterior p(std::vector<float>(sd.size()), sd, states_of(1));
  sigma_statistics(p.statistics, p.sd, p.count, p.partial, p.memory.stream());
  expect_statistics(p.seen(), sd);
  EXPECT_EQ(p.seen().weights, int(sd.size()) - 1);
  p.update(quiet());
  expect_statistics(p.seen(), sd);
}

// The worst that the median's bin can hold: all of it at one edge, and the middle of the ranks at the end of it.
TEST(SigmaStatistics, MedianWithinASixteenth) {
  BATON_NEEDS_DEVICE();
  for (int others : {0, 1, 8, 9})
    for (float rest : {0.01f, 4.f})
      for (float most : {0.5f, 0.56249f}) {
        std::vector<float> sd(9 + (others == 9), most);
        sd.insert(sd.end(), others, rest);
        Posterior p(std::vector<float>(sd.size()), sd, states_of(1));
        sigma_statistics(p.statistics, p.sd, p.count, p.partial, p.memory.stream());
        EXPECT_NEAR(p.seen().median, most, 1.0001f / 16 * most) << others << " at " << rest;
        expect_statistics(p.seen(), sd);
      }
}

// The middle in every bin, the first and the last included, with as many weights below it as above, one more or fewer,
// and pruned ones, which do not count.
TEST(SigmaStatistics, MedianInEveryBin) {
  BATON_NEEDS_DEVICE();
  for (int bin = 0; bin < sd_bins; bin += bin == 0 || bin == sd_bins - 2 ? 1 : 3)
    for (int more : {0, 1, -1}) {
      SCOPED_TRACE(testing::Message() << "bin " << bin << ", " << more << " more above");
      const float middle = 0.5f * (sd_bin_edge(bin) + sd_bin_edge(bin + 1));
      std::vector<float> sd(3, middle);
      const int aside = 4;
      for (int i = 0; i < aside; i++) sd.push_back(bin > 0 ? sd_bin_edge(i * bin / aside) : middle);
      for (int i = 0; i < aside + more; i++)
        sd.push_back(bin + 1 < sd_bins ? sd_bin_edge(sd_bins - 1 - i * (sd_bins - 1 - bin) / (aside + more)) : middle);
      sd.insert(sd.end(), 5, 0.f);
      Posterior p(std::vector<float>(sd.size()), sd, states_of(1));
      sigma_statistics(p.statistics, p.sd, p.count, p.partial, p.memory.stream());
      EXPECT_EQ(p.seen().median, middle);
      expect_statistics(p.seen(), sd);
      p.update(quiet());  // the same kernel behind a step that moves nothing
      EXPECT_EQ(p.seen().median, middle);
    }
}

// More blocks than a block has threads: every one counts, and the same bits come out every time.
TEST(SigmaStatistics, OfManyBlocks) {
  BATON_NEEDS_DEVICE();
  const int count = 300 * 4096 + 11;
  std::vector<float> sd = deviations(count, 5, 0.02f, 0.5f);
  for (int i = 0; i < count; i += 7) sd[i] = 0;
  sd[count - 1] = 90.f, sd[5 * 4096] = 1e-5f;  // what the last block and one of the first have
  Posterior p(std::vector<float>(count), sd, states_of(1));
  for (int time = 0; time < 2; time++) {
    sigma_statistics(p.statistics, p.sd, count, p.partial, p.memory.stream());
    expect_statistics(p.seen(), sd);
    EXPECT_EQ(p.seen().largest, 90.f);
    EXPECT_EQ(p.seen().smallest, 1e-5f);
  }
}

TEST(SigmaStatistics, OfGivenDeviations) {
  BATON_NEEDS_DEVICE();
  for (int count : {1, 2, 3, 4, 5, 250, 257, 2049, 20011})
    for (float spread : {0.f, 0.3f, 4.f}) {
      SCOPED_TRACE(testing::Message() << count << ", " << spread);
      std::vector<float> sd = deviations(count, count, 0.02f, spread);
      for (int i = 3; i < count; i += 4) sd[i] = 0;
      Posterior p(std::vector<float>(count), sd, states_of(1));
      SigmaStatistics garbage;
      std::memset(&garbage, 0x7f, sizeof garbage);
      p.statistics.set({garbage});
      sigma_statistics(p.statistics, p.sd, count, p.partial, p.memory.stream());
      p.partial.host();
      expect_statistics(p.seen(), sd);
      EXPECT_EQ(p.seen().largest_x, 0);
      EXPECT_EQ(p.seen().nonfinite, 0);
      EXPECT_EQ(bits(p.sd.host()), bits(sd));
    }
}

// ---------------------------------------------------------------------------------------------------- the trip-wire
// Standard deviations of 0.5, but one: with x = -3/4 it doubles at every step.
struct Runaway {
  explicit Runaway(int count, int replicas = 2, float sd = 0.5f)
      : p(normals(count, 1), std::vector<float>(count, sd), states_of(1, 1, replicas)) {
    rule.initial_sd = sd;
  }
  void step(uint32_t number) {
    p.at_step(number);
    const std::vector<float> sd = p.sd.host();
    std::vector<float> noise(p.count);
    noise[p.count - 1] = -1.5f / sd[p.count - 1];
    p.set_moments(noise, noise);
    p.update(rule);
  }
  std::vector<int> halted() {
    std::vector<int> steps;
    for (const StepState& s : p.states.host()) steps.push_back(s.halted);
    return steps;
  }
  BgdRule rule;
  Posterior p;
};

bool same(const TripWire& a, const TripWire& b) { return std::memcmp(&a, &b, sizeof a) == 0; }
bool same(const SigmaStatistics& a, const SigmaStatistics& b) { return std::memcmp(&a, &b, sizeof a) == 0; }

// An update that must do nothing at all.
void expect_stands_still(Posterior& p, const BgdRule& rule) {
  const std::vector<float> mean = p.mean.host(), sd = p.sd.host();
  const std::vector<StepState> states = p.states.host();
  const TripWire wire = p.tripped();
  const SigmaStatistics statistics = p.seen();
  p.set_moments(normals(p.count, 50), normals(p.count, 51));
  p.update(rule);
  EXPECT_EQ(bits(p.mean.host()), bits(mean));
  EXPECT_EQ(bits(p.sd.host()), bits(sd));
  EXPECT_TRUE(same(p.tripped(), wire));
  EXPECT_TRUE(same(p.seen(), statistics));
  const std::vector<StepState> now = p.states.host();
  EXPECT_EQ(std::memcmp(now.data(), states.data(), sizeof(StepState) * states.size()), 0);
}

TEST(TripWire, SmallWarnsOnceAndHalts) {
  BATON_NEEDS_DEVICE();
  Runaway run(7);
  uint32_t step = 11;
  TripWire warned{};
  for (float want = 1; want <= 32; want *= 2, step++) {  // warns above 5: at 8. Halts above 50: at 64.
    run.step(step);
    const SigmaStatistics seen = run.p.seen();
    EXPECT_NEAR(seen.largest, want, 1e-5 * want);
    EXPECT_NEAR(seen.largest_x, 0.75, 1e-6);
    EXPECT_EQ(run.halted(), (std::vector<int>{0, 0}));
    const TripWire wire = run.p.tripped();
    EXPECT_EQ(wire.halted_step, 0);
    if (want < 7) {
      EXPECT_EQ(wire.warned_step, 0) << want;
    } else if (want < 9) {
      EXPECT_EQ(wire.warned_step, int(step));
      EXPECT_EQ(wire.largest, seen.largest);
      EXPECT_EQ(wire.median, seen.median);
      EXPECT_EQ(wire.largest_x, seen.largest_x);
      warned = wire;
    } else {
      EXPECT_TRUE(same(wire, warned)) << want;  // what happened first
    }
  }
  EXPECT_EQ(warned.warned_step, 14);
  run.step(step);
  EXPECT_NEAR(run.p.sd.host()[6], 64, 1e-3);  // the step itself is done
  const TripWire wire = run.p.tripped();
  EXPECT_EQ(wire.halted_step, int(step));
  EXPECT_EQ(wire.halted_largest, run.p.sd.host()[6]);
  EXPECT_EQ(wire.nonfinite, 0);
  EXPECT_EQ(wire.warned_step, warned.warned_step);
  EXPECT_EQ(wire.largest, warned.largest);
  EXPECT_EQ(wire.median, warned.median);
  EXPECT_EQ(run.halted(), (std::vector<int>{int(step), int(step)}));
  expect_stands_still(run.p, run.rule);

  // The wire alone holds it, too.
  std::vector<StepState> states = run.p.states.host();
  for (StepState& s : states) s.halted = 0;
  run.p.states.set(states);
  run.p.at_step(step + 1);
  const std::vector<float> mean = run.p.mean.host(), sd = run.p.sd.host();
  run.p.update(run.rule);
  EXPECT_EQ(bits(run.p.mean.host()), bits(mean));
  EXPECT_EQ(bits(run.p.sd.host()), bits(sd));
  EXPECT_TRUE(same(run.p.tripped(), wire));
}

// Passed means more than the ratio; and one step may do both.
TEST(TripWire, SmallAtTheRatio) {
  BATON_NEEDS_DEVICE();
  for (float sd : {4.f, std::nextafter(4.f, 5.f), 16.f, std::nextafter(16.f, 17.f)}) {
    Posterior p(std::vector<float>(5), {0.25f, 0.5f, sd, 0.5f, 1.f}, states_of(6, 1, 3));
    BgdRule rule;
    rule.initial_sd = 0.5f, rule.warn_ratio = 8, rule.halt_ratio = 32;
    p.update(rule);
    EXPECT_EQ(p.tripped().warned_step, sd > 4 ? 6 : 0) << sd;
    EXPECT_EQ(p.tripped().halted_step, sd > 16 ? 6 : 0) << sd;
    for (const StepState& s : p.states.host()) EXPECT_EQ(s.halted, sd > 16 ? 6 : 0) << sd;
    EXPECT_EQ(p.tripped().largest, sd > 4 ? sd : 0);
    EXPECT_EQ(p.tripped().halted_largest, sd > 16 ? sd : 0);
  }
}

TEST(TripWire, SmallHaltedStates) {
  BATON_NEEDS_DEVICE();
  for (int replicas : {1, 3})
    for (int halted = 0; halted < replicas; halted++) {
      std::vector<StepState> states = states_of(6, 1, replicas);
      states[halted].halted = 5;
      Posterior p(normals(9, 1), deviations(9, 2), states);
      BgdRule rule;
      rule.initial_sd = 1e-6f;  // it would halt
      expect_stands_still(p, rule);
    }
}

TEST(TripWire, SmallNotFinite) {
  BATON_NEEDS_DEVICE();
  const float nan = NAN, infinity = INFINITY;
  const std::vector<float> mean = normals(11, 1), sd = deviations(11, 2);
  for (float clamp : {0.f, 1e30f}) {
    SCOPED_TRACE(clamp);
    std::vector<float> sum = normals(11, 3), noise = normals(11, 4);
    sum[0] = nan, noise[3] = nan, sum[6] = nan, noise[6] = nan;
    if (clamp == 0) sum[8] = infinity, noise[9] = -infinity;  // sd would be infinite
    std::vector<int> bad{0, 3, 6};
    if (clamp == 0) bad.push_back(8), bad.push_back(9);
    Posterior p(mean, sd, states_of(21, 1, 2));
    p.set_moments(sum, noise);
    BgdRule rule = quiet();
    rule.clamp = clamp;
    p.update(rule);
    const std::vector<float> now_mean = p.mean.host(), now_sd = p.sd.host();
    for (int i = 0; i < 11; i++) {
      if (std::count(bad.begin(), bad.end(), i)) {
        EXPECT_EQ(bits({now_mean[i], now_sd[i]}), bits({mean[i], sd[i]})) << i;
      } else {
        const Weight w = updated(mean[i], sd[i], sum[i], noise[i], 1);
        EXPECT_NEAR(now_mean[i], w.mean, 1e-6) << i;
        EXPECT_NEAR(now_sd[i], w.sd, 1e-6 * w.sd) << i;
      }
    }
    EXPECT_EQ(p.seen().nonfinite, int(bad.size()));
    expect_statistics(p.seen(), now_sd);
    const TripWire wire = p.tripped();
    EXPECT_EQ(wire.halted_step, 21);
    EXPECT_EQ(wire.nonfinite, int(bad.size()));
    EXPECT_EQ(wire.halted_largest, p.seen().largest);
    EXPECT_EQ(wire.warned_step, 0);
    for (const StepState& s : p.states.host()) EXPECT_EQ(s.halted, 21);
    expect_stands_still(p, rule);
  }
}

TEST(TripWire, OneNotFiniteAmongMany) {
  BATON_NEEDS_DEVICE();
  const int count = 10007;
  const std::vector<float> mean = normals(count, 1), sd = deviations(count, 2);
  for (int at : {0, 4095, 4096, 10006}) {
    std::vector<float> sum(count), noise(count);
    noise[at] = NAN;
    Posterior p(mean, sd, states_of(3));
    p.set_moments(sum, noise);
    p.update(quiet());
    EXPECT_EQ(p.seen().nonfinite, 1) << at;
    EXPECT_EQ(p.tripped().halted_step, 3) << at;
    EXPECT_EQ(bits(p.sd.host()), bits(sd)) << at;
  }
}

// ----------------------------------------------------------------------------------------------- against exact Bayes
// L = h theta^2 / 2 at every step, a curvature for each weight: the posterior is Gaussian, 1/sigma^2 = 1/sigma0^2 + h t
// and mu = mu0 sigma^2 / sigma0^2. Algorithm 1 solves equation (21) by one explicit step, so 1/sigma^2 grows by
// sigma^2 h^2 / 2 more than by h.
struct Quadratic {
  Quadratic(int count_, double longest_) : count(count_), longest(longest_) {
    for (int i = 0; i < count; i++) curvature.push_back(float(longest * (i + 1) / count / (sd0 * sd0)));
  }
  double precision(int i, int steps) const { return 1 / (double(sd0) * sd0) + double(curvature[i]) * steps; }

  const float sd0 = 0.06f;
  int count;
  double longest;  // h sigma0^2 of the last weight
  std::vector<float> curvature;
};

// E[g] = h mu and E[g e] = h sigma, as they are.
TEST(ExactBayes, QuadraticWithExactExpectations) {
  BATON_NEEDS_DEVICE();
  const int steps = 200;
  const Quadratic q(16, 1. / steps);  // the data end with at most the weight of the start
  const std::vector<float> mean = normals(q.count, 1, 0, 0.5f);
  Posterior p(mean, std::vector<float>(q.count, q.sd0), states_of(1));
  BgdRule rule;
  rule.initial_sd = q.sd0;
  std::vector<float> sum(q.count), noise(q.count);
  for (int t = 1; t <= steps; t++) {
    const std::vector<float> m = p.mean.host(), s = p.sd.host();
    for (int i = 0; i < q.count; i++) sum[i] = q.curvature[i] * m[i], noise[i] = q.curvature[i] * s[i];
    p.set_moments(sum, noise);
    p.at_step(t);
    p.update(rule);
  }
  const std::vector<float> m = p.mean.host(), s = p.sd.host();
  for (int i = 0; i < q.count; i++) {
    const double exact_precision = q.precision(i, steps);
    EXPECT_NEAR(double(s[i]) * s[i] * exact_precision, 1, 1e-3) << i;
    EXPECT_NEAR(m[i] * exact_precision * q.sd0 * q.sd0 / mean[i], 1, 3e-3) << i;
  }
}

// Where the start weighs little: sigma^2 h t -> 1, from below by log(t) / (2 t). In float as in double: roundings of
// thousands of steps do not lean.
TEST(ExactBayes, DeviationsFallAsTheRootOfTheSteps) {
  BATON_NEEDS_DEVICE();
  const Quadratic q(3, 1);
  Posterior p(std::vector<float>(q.count), std::vector<float>(q.count, q.sd0), states_of(1));
  std::vector<double> sd(q.count, q.sd0);
  for (int t = 1; t <= 3200; t++) {
    const std::vector<float> s = p.sd.host();
    std::vector<float> noise(q.count);
    for (int i = 0; i < q.count; i++) {
      noise[i] = q.curvature[i] * s[i];
      sd[i] = updated(0, sd[i], 0, double(q.curvature[i]) * sd[i], 1).sd;
    }
    p.set_moments(std::vector<float>(q.count), noise);
    p.update(quiet());
    if (t != 200 && t != 3200) continue;
    const std::vector<float> now = p.sd.host();
    for (int i = 0; i < q.count; i++) {
      EXPECT_NEAR(double(now[i]) * now[i] * q.precision(i, t), 1, t == 200 ? 0.02 : 0.002) << i;
      EXPECT_NEAR(now[i], sd[i], 1e-5 * sd[i]) << i;
    }
  }
}

// The same with draws: draw_weights, the gradients h theta_k, accumulate_moments, bgd_update. Ten draws give h with a
// relative error of sqrt((2 + (mu / sigma)^2) / 10) at every step.
TEST(ExactBayes, QuadraticWithDraws) {
  BATON_NEEDS_DEVICE();
  const int steps = 200, draws = 10, count = 250;
  const Quadratic q(count, 1. / steps);
  const size_t stride = count + 2;
  const std::vector<float> mean = normals(count, 1, 0, q.sd0);
  Posterior p(mean, std::vector<float>(count, q.sd0), states_of(1));
  BgdRule rule;
  rule.gradient_scale = 1.f / draws;
  rule.initial_sd = q.sd0;
  Buffer<float> w(p.memory, stride * draws);
  for (int t = 1; t <= steps; t++) {
    p.at_step(t);
    draw_weights(w, stride, p.mean, p.sd, count, 0, draws, p.states, p.memory.stream());
    std::vector<float> grad = w.host();
    for (size_t at = 0; at < grad.size(); at++)
      if (at % stride < size_t(count)) grad[at] *= q.curvature[at % stride];
    w.set(grad);
    accumulate_moments({p.sum, p.noise}, w, stride, 0, count, {0, draws, false}, p.states, p.memory.stream());
    p.update(rule);
  }
  EXPECT_EQ(p.tripped().warned_step, 0);
  const std::vector<float> m = p.mean.host(), s = p.sd.host();
  double ratio = 0, spread = 0, mean_error = 0, predicted = 0;
  for (int i = 0; i < count; i++) {
    const double want = q.precision(i, steps), got = 1 / (double(s[i]) * s[i]);
    const double of_data = 1 - 1 / (want * q.sd0 * q.sd0);  // how much of the precision the draws made
    ratio += got / want - 1;
    spread += std::pow(got / want - 1, 2);
    predicted += of_data * of_data * (2 + 1) / draws / steps;
    const double want_mean = mean[i] / (q.sd0 * q.sd0 * want);
    mean_error += std::pow((m[i] - want_mean) * std::sqrt(want), 2);
    EXPECT_NEAR(got / want, 1, 0.1) << i;
    EXPECT_NEAR(m[i], want_mean, 0.15 / std::sqrt(want)) << i;
  }
  EXPECT_NEAR(ratio / count, 0, 4 * std::sqrt(predicted) / count + 1e-3);
  EXPECT_NEAR(std::sqrt(spread / predicted), 1, 0.25);
  EXPECT_LT(std::sqrt(mean_error / count), 0.03);
  record("bgd.quadratic.sd", s, 1e-5f);
}

}  // namespace
}  // namespace baton::test
