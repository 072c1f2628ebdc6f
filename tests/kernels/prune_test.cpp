#include "kernels/prune.h"

#include <algorithm>
#include <cmath>
#include <random>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

// A store with gaps before, between and after the stretches.
struct Weights {
  Weights(Memory& memory, const std::vector<Stretch>& stretches, int seed, bool powers_of_two)
      : mean(), sd(), places(), device_mean(memory, filled(stretches, seed, powers_of_two)), device_sd(memory, sd) {}

  std::vector<float> mean, sd;
  std::vector<size_t> places;  // of weight j
  Buffer<float> device_mean, device_sd;

 private:
  const std::vector<float>& filled(const std::vector<Stretch>& stretches, int seed, bool powers_of_two) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    size_t size = 0;
    for (const Stretch& s : stretches) {
      size = std::max(size, size_t(s.first + s.count) + 3);
      for (int i = 0; i < s.count; i++) places.push_back(size_t(s.first + i));
    }
    for (size_t i = 0; i < size; i++) {
      mean.push_back(powers_of_two ? float(int(random() % 15)) - 7 : normal(random));
      sd.push_back(powers_of_two ? std::ldexp(1.f, -int(random() % 5)) : std::exp(normal(random) - 3));
    }
    for (size_t i = 0; i < size; i++) {  // pruned weights, and noise without signal, and signal without noise
      if (random() % 5 == 0) mean[i] = 0, sd[i] = random() % 2 ? 0 : sd[i];
      if (random() % 9 == 0) sd[i] = 0;
    }
    return mean;
  }
};

std::vector<double> scores_of(const Weights& w, Ranking ranking, bool with_sd) {
  std::vector<double> score;
  for (size_t i : w.places) {
    const double size = std::abs(double(w.mean[i]));
    if (with_sd && w.mean[i] == 0 && w.sd[i] == 0) score.push_back(-1);
    else score.push_back(ranking == Ranking::magnitude ? size : w.sd[i] == 0 ? INFINITY : size / w.sd[i]);
  }
  return score;
}

void check_scores(const std::vector<Stretch>& stretches, bool powers_of_two) {
  Memory memory;
  Weights w(memory, stretches, 1, powers_of_two);
  for (const auto& [ranking, with_sd] :
       {std::pair{Ranking::signal_to_noise, true}, {Ranking::magnitude, true}, {Ranking::magnitude, false}}) {
    SCOPED_TRACE(testing::Message() << "ranking " << int(ranking) << " sd " << with_sd);
    Buffer<float> score(memory, w.places.size(), NAN);
    prune_scores(score, w.device_mean, with_sd ? w.device_sd.data() : nullptr, stretches, ranking, memory.stream());
    std::vector<float> got = score.host();
    std::vector<double> want = scores_of(w, ranking, with_sd);
    if (powers_of_two || ranking == Ranking::magnitude) {
      EXPECT_TRUE(exact(got, want));
    } else {
      for (size_t j = 0; j < got.size(); j++)
        if (std::isinf(want[j])) {
          ASSERT_EQ(got[j], want[j]) << j;
          got[j] = 0, want[j] = 0;
        }
      EXPECT_TRUE(close(got, want, {.l2 = 1e-7}));
    }
    if (!powers_of_two) record("prune_scores." + std::to_string(int(ranking)) + (with_sd ? ".sd" : ""), got, 1e-6f);
  }
  EXPECT_TRUE(exact(w.device_mean.host(), w.mean));
  EXPECT_TRUE(exact(w.device_sd.host(), w.sd));
}

void check_pruning(const std::vector<Stretch>& stretches) {
  Memory memory;
  for (bool with_sd : {true, false}) {
    Weights w(memory, stretches, 2, false);
    std::mt19937 random(5);
    std::vector<uint8_t> marks;
    for (size_t j = 0; j < w.places.size(); j++) marks.push_back(random() % 3 ? 0 : uint8_t(1));
    Buffer pruned(memory, marks);
    prune_weights(w.device_mean, with_sd ? w.device_sd.data() : nullptr, pruned, stretches, memory.stream());
    std::vector<float> mean = w.mean, sd = w.sd;  // what no mark is set for, and what lies between, stays
    for (size_t j = 0; j < marks.size(); j++) {
      if (marks[j]) mean[w.places[j]] = 0;
      if (marks[j] && with_sd) sd[w.places[j]] = 0;
    }
    EXPECT_TRUE(exact(w.device_mean.host(), mean));
    EXPECT_TRUE(exact(w.device_sd.host(), sd));
    EXPECT_TRUE(exact(pruned.host(), marks));
  }
}

const std::vector<Stretch> odd{{3, 701}, {710, 0}, {720, 1}, {1024, 333}, {900, 77}};  // in any order

TEST(Prune, SmallScores) {
  BATON_NEEDS_DEVICE();
  check_scores({{2, 40}, {50, 7}}, true);
}

TEST(Prune, Scores) {
  BATON_NEEDS_DEVICE();
  check_scores(odd, true);
  check_scores(odd, false);
}

TEST(Prune, SmallPruning) {
  BATON_NEEDS_DEVICE();
  check_pruning({{2, 40}, {50, 7}});
}

TEST(Prune, Pruning) {
  BATON_NEEDS_DEVICE();
  check_pruning(odd);
}

// What is pruned is zero exactly, scores -1, and so is the first to be pruned again.
TEST(Prune, ThePrunedComeFirst) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  const std::vector<Stretch> all{{0, 4}};
  Buffer mean(memory, std::vector<float>{1, -0.f, 3, -4}), sd(memory, std::vector<float>{1, 2, 0, 1});
  Buffer pruned(memory, std::vector<uint8_t>{0, 0, 0, 1});
  Buffer<float> score(memory, 4);
  prune_weights(mean, sd, pruned, all, memory.stream());
  prune_scores(score, mean, sd, all, Ranking::signal_to_noise, memory.stream());
  EXPECT_EQ(score.host(), (std::vector<float>{1, 0, INFINITY, -1}));
  prune_scores(score, mean, sd, all, Ranking::magnitude, memory.stream());
  EXPECT_EQ(score.host(), (std::vector<float>{1, 0, 3, -1}));
}

// Where kept is 0 the posterior is its prior's scale around 0, with next to no noise; elsewhere not a bit changes.
void check_hold(int n) {
  Memory memory;
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> kept;
  for (int i = 0; i < n; i++) kept.push_back(random() % 3 ? 1.f : 0.f);
  const auto values = [&] {
    std::vector<float> v(size_t(n), 0.f);
    for (float& x : v) x = normal(random);
    v[random() % v.size()] = NAN;  // what is pruned becomes 0 whatever it was
    v[random() % v.size()] = INFINITY;
    return v;
  };
  const std::vector<float> mean = values(), log_std = values(), variance = values(), prior_mean = values(),
                           prior_log_std = values();
  const auto held = [&](const std::vector<float>& from, const std::vector<float>& to) {
    std::vector<float> v = from;
    for (size_t i = 0; i < v.size(); i++)
      if (kept[i] == 0) v[i] = to[i];
    return v;
  };
  const std::vector<float> none(size_t(n), 0.f), least(size_t(n), 1e-30f);
  Buffer m(memory, mean), l(memory, log_std), v(memory, variance), pm(memory, prior_mean), pl(memory, prior_log_std),
      k(memory, kept);
  for (int again = 0; again < 2; again++) {
    hold_pruned(m, l, v, pm, pl, k, n, memory.stream());
    EXPECT_TRUE(exact(m.host(), held(mean, none)));
    EXPECT_TRUE(exact(l.host(), held(log_std, prior_log_std)));
    EXPECT_TRUE(exact(v.host(), held(variance, least)));
    EXPECT_TRUE(exact(pm.host(), held(prior_mean, none)));
    EXPECT_TRUE(exact(pl.host(), prior_log_std));
    EXPECT_TRUE(exact(k.host(), kept));
  }
  Buffer point(memory, mean);
  hold_pruned(point, nullptr, nullptr, nullptr, nullptr, k, n, memory.stream());
  EXPECT_TRUE(exact(point.host(), held(mean, none)));
}

TEST(Prune, SmallHold) {
  BATON_NEEDS_DEVICE();
  check_hold(1);
  check_hold(47);
}

TEST(Prune, Hold) {
  BATON_NEEDS_DEVICE();
  check_hold(5003);
}

TEST(Prune, SmallZeroInDraws) {
  BATON_NEEDS_DEVICE();
  constexpr int n = 37, draws = 3;
  constexpr size_t stride = 40;
  Memory memory;
  std::vector<float> kept(n, 1.f), w(stride * draws);
  for (int i = 0; i < n; i += 3) kept[i] = 0;
  for (size_t i = 0; i < w.size(); i++) w[i] = float(i) + 1;
  Buffer k(memory, kept), x(memory, w);
  zero_pruned(x, stride, k, n, draws, memory.stream());
  for (size_t i = 0; i < w.size(); i++)
    if (i % stride < n && i % stride % 3 == 0) w[i] = 0;
  EXPECT_TRUE(exact(x.host(), w));
  EXPECT_THROW(zero_pruned(x, n - 1, k, n, draws, memory.stream()), InputError);
}

TEST(Prune, HoldRefusesHalfAGaussian) {
  float x[1] = {}, kept[1] = {1};
  EXPECT_THROW(hold_pruned(x, x, nullptr, x, x, kept, 1, {}), InputError);
  EXPECT_THROW(hold_pruned(x, x, x, nullptr, x, kept, 1, {}), InputError);
  EXPECT_THROW(hold_pruned(x, x, x, x, nullptr, kept, 1, {}), InputError);
}

TEST(Prune, Refuses) {
  const float values[1] = {};
  float result[1];
  EXPECT_THROW(prune_scores(result, values, nullptr, {}, Ranking::signal_to_noise, {}), InputError);
  EXPECT_THROW(prune_scores(result, values, values, {{-1, 1}}, Ranking::magnitude, {}), InputError);
  EXPECT_THROW(prune_scores(result, values, values, {{0, -1}}, Ranking::signal_to_noise, {}), InputError);
  EXPECT_THROW(prune_weights(result, nullptr, nullptr, {{0, 0}, {-2, 1}}, {}), InputError);
  prune_scores(result, values, values, {{7, 0}}, Ranking::signal_to_noise, {});  // nothing to do
  prune_weights(nullptr, nullptr, nullptr, {}, {});
}

}  // namespace
}  // namespace baton::test
