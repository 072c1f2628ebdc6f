// Looking ahead against all batches, and the experiment of active learning against fits and choices one by one.
#include "trainers/last_layer/active_learning.h"

#include <set>

#include "tests/trainers/last_layer/selection_fixture.h"

namespace baton::test {
namespace {

// --------------------------------------------------------------------------------------------------------- look-ahead
template <class Real>
double test_loss(LastLayer<Real>& layer, const Samples& test) {
  const Posterior at(layer);
  double loss = 0;
  for (int i = 0; i < test.count(); i++) loss -= std::log(softmax(times(at.w, test.row(i)))[test.labels[i]]);
  return loss / test.count();
}

// So many trials of so few samples that every batch in every order is among them.
TEST(LookAhead, FindsTheBestOfAllBatches) {
  BATON_NEEDS_DEVICE();
  const Samples pool = overlapping_samples(9, 5, 3, 30, 1.5), base = overlapping_samples(12, 5, 3, 31, 1.5),
                test = overlapping_samples(50, 5, 3, 32, 1.5);
  Rows<double> rows(pool), tests(test);
  const std::vector<int> candidates = {8, 1, 4, 2, 7};
  struct Case {
    UpdateRule rule;
    double gamma;
    int passes;
  };
  for (const Case& c : {Case{UpdateRule::implicit, 1, 1}, Case{UpdateRule::gaussian, 10, 1},
                        Case{UpdateRule::categorical, 3, 1}, Case{UpdateRule::implicit, 1, 2}})
    for (uint64_t seed = 0; seed < 3; seed++) {
      SCOPED_TRACE(testing::Message() << to_string(c.rule) << ", " << c.passes << " passes, seed " << seed);
      LookAheadOptions o;
      o.trials = 400, o.seed = seed;
      o.update.rule = c.rule, o.update.gamma = c.gamma, o.update.passes = c.passes;
      const auto explicitly = [&](const std::vector<int>& batch) {
        Samples chosen{{}, {}, 5, 3};
        for (int i : batch) chosen.append(pool.row(i), pool.labels[i]);
        Rows<double> r(chosen);
        const auto layer = fitted(base);
        layer->update(r, o.update);
        return test_loss(*layer, test);
      };
      double least = INFINITY, most = -INFINITY;
      for (int i : candidates)
        for (int j : candidates)
          if (i != j) {
            const double loss = explicitly({i, j});
            least = std::min(least, loss), most = std::max(most, loss);
          }
      const auto layer = fitted(base);
      const Posterior at(*layer);
      const std::vector<int> got = look_ahead_batch<double>(rows.device(), *layer, rows, candidates, 2, tests, o);
      ASSERT_EQ(got.size(), 2u);
      EXPECT_NEAR(explicitly(got), least, 1e-12);
      EXPECT_GT(most, least + 1e-3);
      EXPECT_TRUE(Posterior(*layer) == at);
      EXPECT_EQ(look_ahead_batch<double>(rows.device(), *layer, rows, candidates, 2, tests, o), got);
      if (c.passes == 1 && !seed) {
        Rows<float> single(pool), single_tests(test);
        const auto other = fitted<float>(base);
        const std::vector<int> near =
            look_ahead_batch<float>(rows.device(), *other, single, candidates, 2, single_tests, o);
        EXPECT_NEAR(explicitly(near), least, 1e-5);
      }
    }
}

// More trials begin with the same ones, so the best only becomes better.
TEST(LookAhead, MoreTrialsAreNoWorse) {
  BATON_NEEDS_DEVICE();
  const Samples pool = overlapping_samples(80, 5, 3, 33, 1.5), base = overlapping_samples(12, 5, 3, 34, 1.5),
                test = overlapping_samples(60, 5, 3, 35, 1.5);
  Rows<double> rows(pool), tests(test);
  std::set<std::vector<int>> seen;
  for (uint64_t seed = 0; seed < 4; seed++) {
    double last = INFINITY;
    for (int trials = 2; trials <= 24; trials++) {
      LookAheadOptions o;
      o.trials = trials, o.seed = seed;
      const auto layer = fitted(base);
      const std::vector<int> got = look_ahead_batch<double>(rows.device(), *layer, rows, all_of(pool), 6, tests, o);
      EXPECT_EQ(std::set<int>(got.begin(), got.end()).size(), 6u);
      seen.insert(got);
      for (int i : got) layer->update(rows.row(i));
      const double loss = test_loss(*layer, test);
      EXPECT_LE(loss, last + 1e-12);
      last = loss;
    }
  }
  EXPECT_GE(seen.size(), 8u);
}

// The second trial takes one of each cluster: where classes are clusters and none is known, nothing else comes near.
TEST(LookAhead, TakesOneOfEachCluster) {
  BATON_NEEDS_DEVICE();
  const Samples pool = overlapping_samples(60, 12, 6, 36, 0.05), test = overlapping_samples(60, 12, 6, 37, 0.05);
  Rows<double> rows(pool), tests(test);
  int whole = 0;
  for (uint64_t seed = 0; seed < 10; seed++) {
    LastLayer<double> layer(rows.device(), 12, 6, {});
    LookAheadOptions o;
    o.trials = 2, o.seed = seed;
    std::set<int> classes;
    for (int i : look_ahead_batch<double>(rows.device(), layer, rows, all_of(pool), 6, tests, o))
      classes.insert(pool.labels[i]);
    whole += classes.size() == 6;
  }
  EXPECT_GE(whole, 8);  // by chance: 1.5 % each
}

// The third takes what the layer is unsure of: one in ten, and all that the test set is about.
TEST(LookAhead, TakesUnsureSamples) {
  BATON_NEEDS_DEVICE();
  std::mt19937 random(38);
  std::normal_distribution<double> normal;
  Samples base{{}, {}, 3, 2}, pool = base, test = base;
  const auto sure = [&](Samples& s) {
    const int label = int(random() % 2);
    s.append({label ? 6 + 0.1 * normal(random) : -6 + 0.1 * normal(random), 0, 1}, label);
  };
  const auto unsure = [&](Samples& s) {
    const int label = int(random() % 2);
    s.append({0.01 * normal(random), label ? 2. : -2., 1}, label);
  };
  for (int i = 0; i < 10; i++) sure(base);
  for (int i = 0; i < 100; i++) i % 10 == 3 ? unsure(pool) : sure(pool);
  for (int i = 0; i < 40; i++) unsure(test);
  Rows<double> rows(pool), tests(test);
  for (uint64_t seed = 0; seed < 5; seed++) {
    LookAheadOptions o;
    o.trials = 3, o.seed = seed;
    const auto layer = fitted(base);
    for (int i : look_ahead_batch<double>(rows.device(), *layer, rows, all_of(pool), 4, tests, o))
      EXPECT_EQ(i % 10, 3) << seed;
    // More than there are of them: the rest is drawn from all.
    o.trials = 9;
    EXPECT_EQ(look_ahead_batch<double>(rows.device(), *layer, rows, all_of(pool), 30, tests, o).size(), 30u);
  }
}

TEST(LookAhead, Refuses) {
  BATON_NEEDS_DEVICE();
  const Samples pool = overlapping_samples(80, 4, 3, 39), test = overlapping_samples(10, 4, 3, 40);
  Rows<double> rows(pool), tests(test);
  const auto layer = fitted(overlapping_samples(10, 4, 3, 41));
  const FeatureRows<double> good = rows, good_tests = tests;
  LookAheadOptions o;
  o.trials = 3;
  const auto look = [&](const FeatureRows<double>& from, const FeatureRows<double>& t, int batch) {
    look_ahead_batch<double>(rows.device(), *layer, from, all_of(pool), batch, t, o);
  };
  EXPECT_NO_THROW(look(good, good_tests, 64));
  EXPECT_THROW(look(good, good_tests, 65), InputError);
  EXPECT_THROW(look(good, good_tests, 0), InputError);
  FeatureRows<double> odd = good_tests;
  odd.dim = 5;
  EXPECT_THROW(look(good, odd, 2), InputError);
  odd = good_tests, odd.labels = nullptr;
  EXPECT_THROW(look(good, odd, 2), InputError);
  odd = good_tests, odd.count = 0;
  EXPECT_THROW(look(good, odd, 2), InputError);
  odd = good, odd.labels = nullptr;
  EXPECT_THROW(look(odd, good_tests, 2), InputError);
  Samples wrong = test;
  wrong.labels[3] = 7;
  Rows<double> wrong_tests(wrong);
  EXPECT_THROW(look(good, wrong_tests, 2), InputError);
  o.trials = 0;
  EXPECT_THROW(look(good, good_tests, 2), InputError);
  o.trials = 3, o.update.passes = 0;
  EXPECT_THROW(look(good, good_tests, 2), InputError);
  o.update = {}, o.update.rule = UpdateRule::gaussian, o.update.gamma = -1;
  EXPECT_THROW(look(good, good_tests, 2), InputError);
}

// --------------------------------------------------------------------------------------------------------- experiments
// All of the pool is labelled in the end, so what was not chosen were the initial samples.
TEST(ActiveLearningRun, IsFitsAndChoices) {
  BATON_NEEDS_DEVICE();
  const Samples pool = overlapping_samples(40, 5, 4, 50), test = overlapping_samples(100, 5, 4, 51);
  Rows<double> rows(pool), tests(test);
  const FeatureRows<double> test_rows = tests;
  std::set<std::set<int>> initials;
  for (uint64_t seed = 0; seed < 4; seed++)
    for (Acquisition a : {Acquisition::random, Acquisition::badge, Acquisition::margin}) {
      SCOPED_TRACE(testing::Message() << to_string(a) << ", seed " << seed);
      ActiveLearningOptions plan;
      plan.initial = 5, plan.cycles = 5, plan.batch = 7, plan.seed = seed, plan.layer.tau = 0.5;
      plan.selection.acquisition = a;
      plan.selection.sequential = seed % 2 == 0;
      plan.selection.link.link = seed % 2 ? Link::map : Link::mean_field;
      const ActiveLearningCurve curve = run_active_learning<double>(rows.device(), rows, tests, 4, plan);
      EXPECT_EQ(curve.labelled, (std::vector<int>{5, 12, 19, 26, 33, 40}));
      ASSERT_EQ(curve.chosen.size(), 5u);
      EXPECT_GT(curve.selection_seconds, 0);
      std::set<int> known;
      for (int i = 0; i < 40; i++) known.insert(i);
      for (const std::vector<int>& batch : curve.chosen) {
        EXPECT_EQ(batch.size(), 7u);
        for (int i : batch) EXPECT_EQ(known.erase(i), 1u);
      }
      ASSERT_EQ(known.size(), 5u);
      initials.insert(known);
      std::set<int> classes;
      for (int i : known) classes.insert(pool.labels[i]);
      EXPECT_EQ(classes.size(), 4u);
      for (int cycle = 0; cycle <= 5; cycle++) {  // fitted anew, from nothing
        Samples labelled{{}, {}, 5, 4};
        for (int i : known) labelled.append(pool.row(i), pool.labels[i]);
        const auto layer = fitted(labelled, SampleWeight::categorical, 0.5);
        const LinkedPredictions p = layer->predict(test_rows.x, 100, plan.selection.link);
        double right = 0, nll = 0;
        for (int i = 0; i < 100; i++) {
          const auto row = p.probability.begin() + i * 4;
          right += std::max_element(row, row + 4) - row == test.labels[i];
          nll -= std::log(row[test.labels[i]]) / 100;
        }
        EXPECT_DOUBLE_EQ(curve.accuracy[cycle], right / 100);
        EXPECT_NEAR(curve.nll[cycle], nll, 1e-7);
        if (cycle < 5) known.insert(curve.chosen[cycle].begin(), curve.chosen[cycle].end());
      }
      // The same again.
      EXPECT_EQ(run_active_learning<double>(rows.device(), rows, tests, 4, plan).chosen, curve.chosen);
    }
  EXPECT_EQ(initials.size(), 4u);  // by seed, not by acquisition
}

TEST(ActiveLearningRun, StratifiesAsFarAsItCan) {
  BATON_NEEDS_DEVICE();
  Samples pool = overlapping_samples(30, 4, 3, 52);
  for (int i = 0; i < 30; i++) pool.labels[i] = i == 17 ? 2 : i < 27 ? 0 : 1;  // 26, 3, 1
  Rows<double> rows(pool);
  for (int initial : {2, 3, 9, 12}) {
    ActiveLearningOptions plan;
    plan.initial = initial, plan.cycles = 1, plan.batch = 30 - initial, plan.seed = uint64_t(initial);
    plan.selection.acquisition = Acquisition::random;
    const ActiveLearningCurve curve = run_active_learning<double>(rows.device(), rows, rows, 3, plan);
    std::vector<int> count(3);
    for (int i = 0; i < 30; i++)
      if (!std::count(curve.chosen[0].begin(), curve.chosen[0].end(), i)) count[pool.labels[i]]++;
    EXPECT_LE(*std::max_element(count.begin(), count.end()), initial == 2 ? 1 : initial);
    const std::vector<int> want = initial == 3    ? std::vector<int>{1, 1, 1}
                                  : initial == 9  ? std::vector<int>{5, 3, 1}
                                  : initial == 12 ? std::vector<int>{8, 3, 1}
                                                  : count;
    EXPECT_EQ(count, want);
  }
}

// Every cycle has numbers of its own.
TEST(ActiveLearningRun, CyclesDrawDifferentNumbers) {
  BATON_NEEDS_DEVICE();
  const Samples pool = overlapping_samples(35, 4, 3, 53);
  Rows<double> rows(pool);
  ActiveLearningOptions plan;
  plan.initial = 3, plan.cycles = 4, plan.batch = 8;
  plan.selection.acquisition = Acquisition::random, plan.selection.seed = 5;
  const auto chosen = run_active_learning<double>(rows.device(), rows, rows, 3, plan).chosen;
  std::set<int> left;
  for (const std::vector<int>& batch : chosen) left.insert(batch.begin(), batch.end());
  const auto layer = fitted(pool);
  for (int cycle = 0; cycle < 4; cycle++) {
    SelectionOptions o = plan.selection;
    o.seed = SplitMix64(5, uint64_t(cycle)).next();
    EXPECT_EQ(select_batch<double>(rows.device(), *layer, rows, {left.begin(), left.end()}, 8, o), chosen[cycle]);
    for (int i : chosen[cycle]) left.erase(i);
  }
}

TEST(ActiveLearningRun, LookingAheadIsAnUpperBaseline) {
  BATON_NEEDS_DEVICE();
  const Samples pool = overlapping_samples(150, 6, 4, 54, 1.5), test = overlapping_samples(200, 6, 4, 55, 1.5);
  Rows<double> rows(pool), tests(test);
  Rows<float> single(pool), single_tests(test);
  double ahead = 0, chance = 0;
  for (uint64_t seed = 0; seed < 3; seed++) {
    ActiveLearningOptions plan;
    plan.initial = 8, plan.cycles = 3, plan.batch = 4, plan.seed = seed, plan.trials = 60;
    plan.selection.acquisition = Acquisition::random, plan.selection.seed = seed;
    chance += run_active_learning<double>(rows.device(), rows, tests, 4, plan).nll.back();
    plan.look_ahead = true;
    ahead += run_active_learning<double>(rows.device(), rows, tests, 4, plan).nll.back();
    const ActiveLearningCurve in_float = run_active_learning<float>(rows.device(), single, single_tests, 4, plan);
    EXPECT_EQ(in_float.labelled.back(), 20);
    EXPECT_GT(in_float.accuracy.back(), 0.5);
  }
  EXPECT_LT(ahead, chance);
}

TEST(ActiveLearningRun, Refuses) {
  BATON_NEEDS_DEVICE();
  const Samples pool = overlapping_samples(20, 4, 3, 56);
  Rows<double> rows(pool);
  const FeatureRows<double> good = rows;
  ActiveLearningOptions plan;
  plan.initial = 5, plan.cycles = 2, plan.batch = 3;
  const auto run = [&](const FeatureRows<double>& from, const FeatureRows<double>& test, int classes) {
    run_active_learning<double>(rows.device(), from, test, classes, plan);
  };
  EXPECT_NO_THROW(run(good, good, 3));
  EXPECT_THROW(run(good, good, 2), InputError);  // labels beyond
  FeatureRows<double> odd = good;
  odd.dim = 3;
  EXPECT_THROW(run(good, odd, 3), InputError);
  odd = good, odd.labels = nullptr;
  EXPECT_THROW(run(good, odd, 3), InputError);
  EXPECT_THROW(run(odd, good, 3), InputError);
  plan.initial = 0;
  EXPECT_THROW(run(good, good, 3), InputError);
  plan.initial = 15;
  EXPECT_THROW(run(good, good, 3), InputError);
  plan.initial = 5, plan.batch = 0;
  EXPECT_THROW(run(good, good, 3), InputError);
  plan.batch = 3, plan.cycles = -1;
  EXPECT_THROW(run(good, good, 3), InputError);
}

}  // namespace
}  // namespace baton::test
