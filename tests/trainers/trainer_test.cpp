// Training in stages, under every kind of posterior: replicas, totals, what is not finite, and what is refused.
#include "trainers/trainer.h"

#include <unistd.h>

#include <csignal>

#include "engine/io/stop.h"
#include "tests/support/device.h"
#include "tests/support/training.h"

namespace baton::test {
namespace {

NetworkFactory lenet5() { return network_factory(network_spec("lenet5")); }

TEST(Incremental, TheSameSeedIsTheSameRun) {
  BATON_NEEDS_DEVICE();
  for (const TestedKind& kind : all_kinds()) {
    SCOPED_TRACE(kind.name);
    const TrainingSettings settings = varied_settings(kind, {3});
    TrainingSettings other = settings;
    other.replicas[0].seed = 4;
    Training a(settings, 100), b(settings, 100), c(other, 100);
    const auto totals = a.train();
    expect_same(totals, b.train());
    c.train();
    EXPECT_EQ(a.state(), b.state());
    EXPECT_FALSE(exact(a.state().front(), c.state().front()));
    if (find_posterior(kind.kind).many_replicas) {  // the last array of others may be one that nothing moves
      EXPECT_FALSE(exact(a.state().back(), c.state().back()));
    }
  }
}

// Three replicas at once are three runs, whatever the company and the order they keep.
TEST(Incremental, ReplicasAreRunsOfTheirOwn) {
  BATON_NEEDS_DEVICE();
  for (const TestedKind& kind : stage_kinds)
    for (const auto& [network, count, batch] : {std::tuple(small_network(), 60, 8), std::tuple(lenet5(), 12, 4)}) {
      SCOPED_TRACE(kind.name + std::string(" ") + network()->architecture());
      const auto train = [&](std::vector<uint64_t> seeds) {
        Training run(varied_settings(kind, seeds, batch), count, 2, network);
        const auto totals = run.train();
        std::map<uint64_t, std::pair<std::vector<std::vector<float>>, std::vector<EpochTotals>>> result;
        for (size_t r = 0; r < seeds.size(); r++) {
          result[seeds[r]].first = run.state(int(r));
          for (size_t i = r; i < totals.size(); i += seeds.size()) result[seeds[r]].second.push_back(totals[i]);
        }
        return result;
      };
      const auto together = train({1, 2, 5}), turned = train({5, 1, 2});
      for (uint64_t seed : {1, 2, 5}) {
        const auto alone = train({seed});
        for (const auto* other : {&together, &turned}) {
          EXPECT_TRUE(other->at(seed).first == alone.at(seed).first) << "seed " << seed;
          expect_same(other->at(seed).second, alone.at(seed).second);
        }
      }
    }
}

// Groups whose stages end at different steps, and of which one has more steps than the others: each replica has the
// bits and the totals of a run of its own. At step `cut` all goes over into another trainer by a checkpoint.
struct Table {
  struct Member {
    uint64_t seed;
    std::vector<std::vector<float>> state;
    std::vector<EpochTotals> totals;  // one a stage
  };
  Table(const TestedKind& kind, const std::vector<std::pair<int, std::vector<uint64_t>>>& groups, int cut) {
    std::vector<uint64_t> all;
    std::vector<Stages> stages;
    for (const auto& [parts, seeds] : groups) {
      stages.push_back(split_into_parts(45, parts, seeds));
      all.insert(all.end(), seeds.begin(), seeds.end());
    }
    for (uint64_t seed : all) members.push_back({seed, {}, {}});
    const TrainingSettings settings = varied_settings(kind, all);
    auto run = std::make_unique<Training>(settings, stages, digits(45));
    const auto path = std::filesystem::temp_directory_path() / ("baton_table_" + std::to_string(::getpid()));
    for (int step = 0;; step++) {
      if (step == cut) {
        run->trainer.save(path, "");
        run = std::make_unique<Training>(settings, stages, digits(45));
        run->trainer.restore(path);
        std::filesystem::remove(path);
      }
      Trainer& t = run->trainer;
      bool learning = false;
      for (int g = 0, first = 0; g < t.groups(); first += int(t.stages(g++).order.size())) {
        if (t.stage_ended(g) && t.stage(g) + 1 == t.stages(g).count()) t.rest(g);
        else if (t.stage_ended(g)) t.begin_stage(t.stage(g) + 1, g);
        learning |= !t.rests(g);
      }
      if (!learning) break;
      t.advance(1);
      for (int g = 0, first = 0; g < t.groups(); first += int(t.stages(g++).order.size())) {
        if (t.rests(g) || !t.stage_ended(g)) continue;
        const std::vector<EpochTotals> totals = t.take_totals(g);
        for (size_t r = 0; r < totals.size(); r++) members[size_t(first) + r].totals.push_back(totals[r]);
      }
      steps = step + 1;
    }
    for (size_t r = 0; r < members.size(); r++) members[r].state = run->state(int(r));
  }
  std::vector<Member> members;
  int steps = 0;
};
TEST(Incremental, GroupsGoThroughTheirStagesAsAlone) {
  BATON_NEEDS_DEVICE();
  const std::vector<std::pair<int, std::vector<uint64_t>>> groups{{1, {1, 5}}, {7, {1}}, {2, {2}}};
  for (const TestedKind& kind : stage_kinds) {
    SCOPED_TRACE(kind.name);
    const Table whole(kind, groups, -1);
    ASSERT_EQ(whole.steps, 7);  // of seven parts; of one and of two, six
    for (int cut : {3, 6}) {
      const Table resumed(kind, groups, cut);
      for (size_t r = 0; r < whole.members.size(); r++) {
        EXPECT_TRUE(resumed.members[r].state == whole.members[r].state) << "cut at " << cut << ", replica " << r;
        expect_same(resumed.members[r].totals, whole.members[r].totals);
      }
    }
    size_t at = 0;
    for (const auto& [parts, seeds] : groups)
      for (uint64_t seed : seeds) {
        const Table::Member alone = Table(kind, {{parts, {seed}}}, -1).members[0];
        const Table::Member& together = whole.members[at++];
        ASSERT_EQ(together.totals.size(), size_t(parts));
        EXPECT_TRUE(together.state == alone.state) << parts << " parts, seed " << seed;
        expect_same(together.totals, alone.totals);
      }
  }
  // What groups must have in common.
  const TrainingSettings two = varied_settings(ffg, {0, 1});
  std::vector<Stages> stages{split_into_parts(20, 1, {0}), split_into_parts(20, 2, {1}, true)};
  EXPECT_THROW(Training(two, stages, digits(20)), InputError) << "one of them is augmented";
  stages[1] = split_into_parts(20, 2, {1, 2});
  EXPECT_THROW(Training(two, stages, digits(20)), InputError) << "three orders for two replicas";
}

TEST(Incremental, StepsAndTotals) {
  BATON_NEEDS_DEVICE();
  TrainingSettings settings = varied_settings(ffg, {0, 1});
  settings.epochs = 1.5;
  Training run(settings, 100, 3);
  Trainer& t = run.trainer;
  const std::vector<int> sizes = t.stages().sizes;
  ASSERT_EQ(sizes.size(), 3u);
  EXPECT_EQ(sizes[0] + sizes[1] + sizes[2], 100);
  EXPECT_EQ(t.stage(), -1);
  EXPECT_THROW(t.run(1), InputError);
  for (int stage = 0; stage < 3; stage++) {
    EXPECT_EQ(t.count_steps(stage), int(std::ceil(1.5 * sizes[size_t(stage)] / 8)));
    EXPECT_EQ(t.count_epoch_steps(stage), int(std::lround(sizes[size_t(stage)] / 8.)));
    t.begin_stage(stage);
    EXPECT_EQ(t.stage(), stage);
    EXPECT_EQ(t.stage_step(), 0);
    const auto kl = t.posterior().kl();
    EXPECT_EQ(kl.size(), 2u);
    for (double one : kl) EXPECT_TRUE(stage == 0 ? one > 0 : one == 0) << one;
    for (int steps : {2, 3}) {
      const auto totals = t.run(steps);
      ASSERT_EQ(totals.size(), 2u);
      for (const EpochTotals& e : totals) {
        EXPECT_EQ(e.steps, steps);
        EXPECT_EQ(e.examples, 8 * steps);
        EXPECT_TRUE(std::isfinite(e.loss) && e.loss > 0);
        EXPECT_TRUE(e.accuracy >= 0 && e.accuracy <= 1);
        EXPECT_GT(e.kl, 0);
        ASSERT_EQ(e.kl_by_name.size(), t.posterior().kl_names().size());
        double sum = 0;
        for (double kl_of_one : e.kl_by_name) sum += kl_of_one;
        EXPECT_EQ(e.kl, sum);
      }
    }
    EXPECT_EQ(t.stage_step(), 5);
    EXPECT_EQ(t.step(), 5 * (stage + 1));
  }
}

TEST(Incremental, LearnsGeneratedDigits) {
  BATON_NEEDS_DEVICE();
  for (const TestedKind& kind : stage_kinds) {
    SCOPED_TRACE(kind.name);
    TrainingSettings settings = plain_settings(kind, {1}, 20);
    settings.epochs = 8;
    settings.replicas[0].settings["lr"] = 3e-3;
    Training run(settings, 600, 1);
    run.trainer.begin_stage(0);
    const int epoch = run.trainer.count_epoch_steps(0);
    const EpochTotals first = run.trainer.run(epoch)[0];
    run.trainer.run(run.trainer.count_steps(0) - 2 * epoch);
    const EpochTotals last = run.trainer.run(epoch)[0];
    EXPECT_LT(last.loss, 0.5 * first.loss) << first.loss;
    EXPECT_GT(last.accuracy, 0.75);
    EXPECT_GT(last.accuracy, first.accuracy);
    if (kind.kind == "ft") continue;
    // The posterior moves on: the data have sharpened or moved it, and the KL says so.
    EXPECT_GT(run.trainer.posterior().kl()[0], 0);
  }
}

TEST(Incremental, RunEndsWithTheSignal) {
  BATON_NEEDS_DEVICE();
  for (const TestedKind& kind : {ffg, task_kinds[0]})
    for (const auto& [number, name, code] : {std::tuple(SIGINT, "SIGINT", 130), {SIGTERM, "SIGTERM", 143}}) {
      Training run(plain_settings(kind, {7}), 64, 1);
      run.trainer.begin_stage(0);
      pretend_signal(number);
      try {
        run.trainer.run(4);
        ADD_FAILURE() << "not stopped";
      } catch (const Stopped& e) {
        EXPECT_EQ(e.exit_code(), code);
        expect_says(e.what(), {"stopped by ", name});
      }
      pretend_signal(0);
    }
}

// ------------------------------------------------------------------------------------------------- what is not finite
// The replica stands still at the step whose loss was not finite, with that step's parameters and moments; the others
// go on. Under every kind that has replicas.
TEST(Incremental, ANanStopsTheRun) {
  BATON_NEEDS_DEVICE();
  for (const TestedKind& kind : stage_kinds) {
    SCOPED_TRACE(kind.name);
    TrainingSettings settings = varied_settings(kind, {0, 1});
    settings.replicas[1].settings["lr"] = 1e30;  // the second replica's means are gone after one step
    settings.replicas[1].settings["schedule"] = "constant";
    Training one(settings, 64), bad(settings, 64);
    one.trainer.begin_stage(0);
    one.trainer.run(1);
    bad.trainer.begin_stage(0);
    expect_says(run_error(bad, 4), {"not finite", "layer ", "stage 1", "step 2 ", "seed 1"});
    EXPECT_EQ(bad.state(1), one.state(1));
    TrainingSettings good = settings;
    good.replicas[1].settings["lr"] = 1e-3;
    Training four(good, 64);
    four.trainer.begin_stage(0);
    four.trainer.run(4);
    EXPECT_EQ(bad.state(0), four.state(0));
  }
}

// One infinite weight, in the middle of the second stage: its layer is named, and nothing has moved since.
TEST(Incremental, AnInfiniteWeightIsNamed) {
  BATON_NEEDS_DEVICE();
  for (const TestedKind& kind : all_kinds())
    for (const char* tensor : {"conv1.weight", "fc1.bias", "fc2.bias"}) {
      SCOPED_TRACE(kind.name + std::string(", ") + tensor);
      Training run(varied_settings(kind, {7}), 64);
      run.stage(0);
      run.trainer.begin_stage(1);
      run.trainer.run(1);
      std::vector<float> mean = run.tensor("mean", tensor);
      mean[1] = INFINITY;
      run.set_tensor("mean", tensor, mean);
      const auto before = run.state();
      const std::string step = "step " + std::to_string(run.trainer.count_steps(0) + 2) + " ";
      const std::string layer = "layer " + std::string(tensor).substr(0, std::string(tensor).find('.')) + " ";
      expect_says(run_error(run, 3), {"loss is not finite", layer, tensor, "stage 2", step, "seed 7"});
      EXPECT_EQ(run.state(), before);
    }
}

// Finite weights whose products overflow: the layer where it happens is named, not the first or the last.
TEST(Incremental, AnOverflowIsFoundWhereItBegins) {
  BATON_NEEDS_DEVICE();
  for (const TestedKind& kind : stage_kinds) {
    SCOPED_TRACE(kind.name);
    Training run(varied_settings(kind, {7}), 64, 1);
    run.trainer.begin_stage(0);
    for (const auto& [name, value] : {std::pair("conv1.weight", 1e15f), {"fc1.weight", 1e30f}})
      run.set_tensor("mean", name, std::vector<float>(run.spec(name).size, value));
    const auto before = run.state();
    expect_says(run_error(run, 3), {"layer fc1 (its output)", "stage 1", "step 1 "});
    EXPECT_EQ(run.state(), before);
  }
}

// ---------------------------------------------------------------------------------------------- pretrained, augmented
TEST(Incremental, APretrainedNetworkIsTheFirstPrior) {
  BATON_NEEDS_DEVICE();
  for (const TestedKind& kind : stage_kinds)
    for (bool laplace : {false, true}) {
      SCOPED_TRACE(kind.name + std::string(laplace ? ", Laplace" : ""));
      TrainingSettings settings = varied_settings(kind, {3, 4});
      settings.replicas[1].pretrained = pretrained_small(laplace);
      settings.replicas[1].pretrained_sd = 0.25;
      Training run(settings, 64);
      Posterior& posterior = run.trainer.posterior();
      const auto read = [&](const char* array, const TensorSpec& t) {
        return posterior.store().read(run.memory.device(), array, 1, t);
      };
      const Pretrained& from = *settings.replicas[1].pretrained;
      for (const TensorSpec& t : posterior.store().layout().tensors()) {
        const auto w = from.weights.find(t.name);
        if (w == from.weights.end()) continue;
        EXPECT_TRUE(exact(read("mean", t), w->second)) << t.name;
        if (kind.kind == "ft") continue;
        EXPECT_TRUE(exact(read("prior_mean", t), w->second)) << t.name;
        const auto prior = from.prior_log_std.find(t.name);
        EXPECT_TRUE(exact(read("prior_log_std", t), prior == from.prior_log_std.end()
                                                        ? std::vector<float>(t.size, std::log(0.25f))
                                                        : prior->second))
            << t.name;
      }
      const auto first = run.state(1);
      run.train();
      EXPECT_NE(run.state(1), first);
      // The other replica knows nothing of it.
      TrainingSettings plain = settings;
      plain.replicas[1].pretrained = nullptr;
      Training other(plain, 64);
      other.train();
      EXPECT_EQ(other.state(0), run.state(0));
      EXPECT_NE(other.state(1), run.state(1));
    }
}

TEST(Incremental, RefusesPretrainedNetworksOfAnotherShape) {
  BATON_NEEDS_DEVICE();
  TrainingSettings settings = varied_settings(ffg, {3});
  const auto refuses = [&](const char* what, auto change) {
    auto p = pretrained_small(true);
    change(*p);
    settings.replicas[0].pretrained = p;
    EXPECT_THROW(Training(settings, 64), InputError) << what;
  };
  refuses("an unknown tensor", [](Pretrained& p) { p.weights["conv9.weight"] = {1}; });
  refuses("a short tensor", [](Pretrained& p) { p.weights["fc1.bias"].pop_back(); });
  refuses("short standard deviations", [](Pretrained& p) { p.prior_log_std["fc1.weight"].pop_back(); });
}

TEST(Incremental, AugmentedBatchesAreOthersAndTheSameEveryRun) {
  BATON_NEEDS_DEVICE();
  const TrainingSettings settings = varied_settings(ffg, {3});
  const Stages augmented = split_into_parts(64, 2, {3}, true);
  Training plain(settings, 64), a(settings, augmented, digits(64)), b(settings, augmented, digits(64));
  for (Training* run : {&plain, &a, &b}) run->trainer.begin_stage(0), run->trainer.run(3);
  const auto batch = [](Training& run) {
    const Activation& x = run.trainer.network().input();
    return download(run.memory.device(), x.signal.value, x.stride);
  };
  EXPECT_FALSE(exact(batch(a), batch(plain)));
  EXPECT_TRUE(exact(batch(a), batch(b)));
  EXPECT_EQ(a.state(), b.state());
  EXPECT_NE(a.state(), plain.state());
}

TEST(Incremental, RefusesPlans) {
  BATON_NEEDS_DEVICE();
  const TrainingSettings good = varied_settings(ffg, {0});
  const Stages parts = split_into_parts(20, 2, {0});
  const auto build = [&](const TrainingSettings& settings, const Stages& stages) {
    Training(settings, stages, digits(20));
  };
  EXPECT_NO_THROW(build(good, parts));
  using T = TrainingSettings&;
  const auto refuses = [&](const char* what, auto change) {
    TrainingSettings settings = good;
    change(settings);
    EXPECT_THROW(build(settings, parts), InputError) << what;
  };
  refuses("two replicas, one order", [](T s) { s.replicas.push_back(s.replicas[0]); });
  refuses("an unknown kind", [](T s) { s.kind = "ffh"; });
  refuses("an option that the kind has not", [](T s) { s.replicas[0].settings["groups"] = 1; });
  refuses("batch 0", [](T s) { s.batch = 0; });
  refuses("batch -3", [](T s) { s.batch = -3; });
  refuses("epochs 0", [](T s) { s.epochs = 0; });
  refuses("epochs < 0", [](T s) { s.epochs = -1; });
  refuses("epochs NaN", [](T s) { s.epochs = NAN; });
  const auto refuses_stages = [&](const char* what, auto change) {
    Stages stages = parts;
    change(stages);
    EXPECT_THROW(build(good, stages), InputError) << what;
  };
  using S = Stages&;
  refuses_stages("no part", [](S s) { s.sizes.clear(), s.augment.clear(); });
  refuses_stages("an empty part", [](S s) { s.sizes = {20, 0}; });
  refuses_stages("an order of another length", [](S s) { s.sizes = {10, 9}; });
  refuses_stages("too many orders", [](S s) { s.order.push_back(s.order[0]); });
  TrainingSettings nobody = good;
  nobody.replicas.clear();
  EXPECT_THROW(build(nobody, split_into_parts(20, 2, {})), InputError) << "no replicas at all";
  EXPECT_THROW(build(nobody, parts), InputError) << "no replicas";
  const auto refuses_kind = [&](const char* what, const char* kind, const json& settings) {
    EXPECT_THROW(build(varied_settings({what, kind, settings}, {0}), parts), InputError) << kind << ": " << what;
  };
  for (const char* kind : {"cfg", "mnf"}) {
    refuses_kind("groups that do not divide the batch", kind, {{"groups", 3}});
    refuses_kind("no groups", kind, {{"groups", 0}});
  }
  refuses_kind("flow steps", "mnf", {{"flow_steps", 9}});
  refuses_kind("flow steps", "mnf", {{"flow_steps", -1}});
  refuses_kind("hidden units", "mnf", {{"flow_hidden", 0}});
  // Kinds without replicas train one network; replicas share what decides the shape of a step.
  const Stages two_orders = split_into_parts(20, 2, {0, 1});
  EXPECT_THROW(build(plain_settings(task_kinds[0], {0, 1}), two_orders), InputError);
  TrainingSettings two = varied_settings(stage_kinds[5], {0, 1});
  EXPECT_NO_THROW(build(two, two_orders));
  two.replicas[1].settings["flow_hidden"] = 7;
  EXPECT_THROW(build(two, two_orders), InputError);
}

}  // namespace
}  // namespace baton::test
