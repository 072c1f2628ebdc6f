#include "trainers/incremental.h"

#include <unistd.h>

#include <csignal>
#include <nlohmann/json.hpp>

#include "engine/io/stop.h"
#include "engine/io/synthetic.h"
#include "layers/lenet5.h"
#include "tests/support/device.h"
#include "tests/support/small_network.h"

namespace baton::test {
namespace {

namespace fs = std::filesystem;

NetworkFactory small() {
  return [] { return std::make_unique<SmallNetwork>(); };
}
NetworkFactory lenet5() {
  return [] { return std::make_unique<LeNet5>(); };
}

// `count` generated digits in `parts` parts, and a trainer of them.
struct Training {
  Training(const TrainingPlan& plan, int count, const NetworkFactory& network = small())
      : set(upload_images(memory.device(), memory.arena(), generate_digits(count, 11), unit_range)),
        trainer(memory.device(), memory.arena(), network, set, plan, orders(plan, count), sizes(plan, count)) {}
  static std::vector<std::vector<int32_t>> orders(const TrainingPlan& plan, int count) {
    std::vector<std::vector<int32_t>> all;
    for (uint64_t seed : plan.seeds) {
      all.emplace_back();
      for (const auto& part : split_parts(count, plan.parts, seed))
        all.back().insert(all.back().end(), part.begin(), part.end());
    }
    return all;
  }
  static std::vector<int> sizes(const TrainingPlan& plan, int count) {
    std::vector<int> all;
    for (const auto& part : split_parts(count, plan.parts, 0)) all.push_back(int(part.size()));
    return all;
  }
  // Every array that training goes on from, of one replica, without the gaps between tensors.
  std::vector<std::vector<float>> state(int replica = 0) {
    std::vector<std::vector<float>> arrays;
    for (const StateArray& a : trainer.posterior().state_arrays()) {
      arrays.emplace_back();
      for (const TensorSpec& t : a.store->layout().tensors()) {
        const std::vector<float> values = a.store->read(memory.device(), a.array, replica, t);
        arrays.back().insert(arrays.back().end(), values.begin(), values.end());
      }
    }
    return arrays;
  }
  // All stages but the first `from`, in two calls each.
  std::vector<EpochTotals> train(int from = 0) {
    std::vector<EpochTotals> totals;
    for (int stage = from; stage < trainer.stages(); stage++) {
      trainer.begin_stage(stage);
      const int half = trainer.steps_of(stage) / 2;
      for (int steps : {half, trainer.steps_of(stage) - half})
        for (const EpochTotals& t : trainer.run(steps)) totals.push_back(t);
    }
    return totals;
  }

  Memory memory;
  DeviceImages set;
  IncrementalTrainer trainer;
};

TrainingPlan plan_of(const PosteriorOptions& posterior, std::vector<uint64_t> seeds, int parts = 2, int batch = 8) {
  TrainingPlan plan;
  plan.posterior = posterior;
  plan.parts = parts;
  plan.batch = batch;
  plan.epochs = 1;
  plan.seeds = seeds;
  for (uint64_t seed : seeds) {  // its own settings for every seed
    TrainingSettings s;
    s.lr = 1e-3 * double(1 + seed % 3);
    s.lr_scale = 1e-2;
    s.beta = 1 + 0.1 * double(seed % 5);
    s.prior_sd = 0.5 + 0.1 * double(seed % 4);
    s.init_log_std = -4 - 0.1 * double(seed % 4);
    s.warmup_epochs = 0.5;
    s.schedule = seed % 2 ? Schedule::linear : Schedule::cosine;
    plan.settings.push_back(s);
  }
  return plan;
}

struct Kind {
  const char* name;
  PosteriorOptions posterior;
  ScaleRule rule;
};
PosteriorOptions options_of(Family family, int groups, FlowKind flow = FlowKind::gated, bool z_per_filter = false) {
  PosteriorOptions o(family);
  o.groups = groups;
  o.flow = flow;
  o.flow_hidden = 6;
  o.z_per_filter = z_per_filter;
  return o;
}
const Kind kinds[] = {
    {"ft", Family::point, ScaleRule::adam},
    {"ffg, Adam", Family::gaussian, ScaleRule::adam},
    {"ffg, natural", Family::gaussian, ScaleRule::natural},
    {"cfg", Family::channel, ScaleRule::adam},
    {"cfg, groups", options_of(Family::channel, 2), ScaleRule::natural},
    {"mnf", options_of(Family::multiplicative, 1), ScaleRule::adam},
    {"mnf, planar, groups", options_of(Family::multiplicative, 2, FlowKind::planar, true), ScaleRule::natural}};

void expect_same(const EpochTotals& a, const EpochTotals& b) {
  EXPECT_EQ(a.loss, b.loss);
  EXPECT_EQ(a.accuracy, b.accuracy);
  EXPECT_EQ(a.kl, b.kl);
  EXPECT_EQ(a.kl_by_name, b.kl_by_name);
  EXPECT_EQ(a.examples, b.examples);
  EXPECT_EQ(a.steps, b.steps);
}

TEST(Incremental, TheSameSeedIsTheSameRun) {
  BATON_NEEDS_DEVICE();
  for (const Kind& kind : kinds) {
    SCOPED_TRACE(kind.name);
    TrainingPlan plan = plan_of(kind.posterior, {3}), other = plan_of(kind.posterior, {4});
    plan.scale_rule = other.scale_rule = kind.rule;
    other.settings = plan.settings;
    Training a(plan, 100), b(plan, 100), c(other, 100);
    const auto ta = a.train(), tb = b.train();
    c.train();
    for (size_t i = 0; i < ta.size(); i++) expect_same(ta[i], tb[i]);
    EXPECT_EQ(a.state(), b.state());
    EXPECT_FALSE(exact(a.state().front(), c.state().front()));
    EXPECT_FALSE(exact(a.state().back(), c.state().back()));
  }
}

// Three replicas at once are three runs, whatever the company and the order they keep.
TEST(Incremental, ReplicasAreRunsOfTheirOwn) {
  BATON_NEEDS_DEVICE();
  for (const Kind& kind : kinds)
    for (const auto& [network, count, batch] : {std::tuple(small(), 60, 8), std::tuple(lenet5(), 12, 4)}) {
      SCOPED_TRACE(kind.name + std::string(" ") + network()->architecture());
      const auto train = [&](std::vector<uint64_t> seeds) {
        TrainingPlan plan = plan_of(kind.posterior, seeds, 2, batch);
        plan.scale_rule = kind.rule;
        Training run(plan, count, network);
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
          for (size_t i = 0; i < alone.at(seed).second.size(); i++)
            expect_same(other->at(seed).second[i], alone.at(seed).second[i]);
        }
      }
    }
}

TEST(Incremental, StepsAndTotals) {
  BATON_NEEDS_DEVICE();
  TrainingPlan plan = plan_of(Family::gaussian, {0, 1}, 3, 8);
  plan.epochs = 1.5;
  Training run(plan, 100);
  IncrementalTrainer& t = run.trainer;
  EXPECT_EQ(t.stages(), 3);
  EXPECT_EQ(t.part_size(0) + t.part_size(1) + t.part_size(2), 100);
  EXPECT_EQ(t.stage(), -1);
  EXPECT_THROW(t.run(1), InputError);
  for (int stage = 0; stage < 3; stage++) {
    EXPECT_EQ(t.steps_of(stage), int(std::ceil(1.5 * t.part_size(stage) / 8)));
    EXPECT_EQ(t.steps_an_epoch(stage), int(std::lround(t.part_size(stage) / 8.)));
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
  }
}

TEST(Incremental, LearnsGeneratedDigits) {
  BATON_NEEDS_DEVICE();
  for (const Kind& kind : kinds) {
    SCOPED_TRACE(kind.name);
    TrainingPlan plan;
    plan.posterior = kind.posterior;
    plan.scale_rule = kind.rule;
    plan.batch = 20;
    plan.epochs = 8;
    plan.seeds = {1};
    plan.settings.resize(1);
    plan.settings[0].lr = 3e-3;
    Training run(plan, 600);
    run.trainer.begin_stage(0);
    const int epoch = run.trainer.steps_an_epoch(0);
    const EpochTotals first = run.trainer.run(epoch)[0];
    run.trainer.run(run.trainer.steps_of(0) - 2 * epoch);
    const EpochTotals last = run.trainer.run(epoch)[0];
    EXPECT_LT(last.loss, 0.5 * first.loss) << first.loss;
    EXPECT_GT(last.accuracy, 0.75);
    EXPECT_GT(last.accuracy, first.accuracy);
    if (kind.posterior.family == Family::point) continue;
    // The posterior moves on: the data have sharpened or moved it, and the KL says so.
    EXPECT_GT(run.trainer.posterior().kl()[0], 0);
  }
}

// ------------------------------------------------------------------------------------------------- what is not finite
std::string run_error(Training& run, int steps) {
  try {
    run.trainer.run(steps);
  } catch (const RunError& e) {
    return e.what();
  }
  ADD_FAILURE() << "no RunError";
  return "";
}
void expect_says(const std::string& message, std::initializer_list<const char*> pieces) {
  for (const char* piece : pieces) EXPECT_NE(message.find(piece), std::string::npos) << piece << " in: " << message;
}

// The replica stands still at the step whose loss was not finite, with that step's parameters and moments; the others
// go on. Under every family.
TEST(Incremental, ANanStopsTheRun) {
  BATON_NEEDS_DEVICE();
  for (const Kind& kind : kinds) {
    SCOPED_TRACE(kind.name);
    TrainingPlan plan = plan_of(kind.posterior, {0, 1}, 2, 8);
    plan.scale_rule = kind.rule;
    plan.settings[1].lr = 1e30;  // the second replica's means are gone after one step
    plan.settings[1].schedule = Schedule::constant;
    Training one(plan, 64), bad(plan, 64);
    one.trainer.begin_stage(0);
    one.trainer.run(1);
    bad.trainer.begin_stage(0);
    expect_says(run_error(bad, 4), {"not finite", "layer ", "stage 1", "step 2 ", "seed 1"});
    EXPECT_EQ(bad.state(1), one.state(1));
    TrainingPlan good = plan;
    good.settings[1].lr = 1e-3;
    Training four(good, 64);
    four.trainer.begin_stage(0);
    four.trainer.run(4);
    EXPECT_EQ(bad.state(0), four.state(0));
  }
}

// One infinite weight, in the middle of the second stage: its layer is named, and nothing has moved since.
TEST(Incremental, AnInfiniteWeightIsNamed) {
  BATON_NEEDS_DEVICE();
  for (const Kind& kind : kinds)
    for (const char* tensor : {"conv1.weight", "fc1.bias"}) {
      SCOPED_TRACE(kind.name + std::string(", ") + tensor);
      TrainingPlan plan = plan_of(kind.posterior, {7}, 2, 8);
      plan.scale_rule = kind.rule;
      Training run(plan, 64);
      run.trainer.begin_stage(0);
      run.trainer.run(run.trainer.steps_of(0));
      run.trainer.begin_stage(1);
      run.trainer.run(1);
      ParameterStore& store = run.trainer.posterior().store();
      for (const TensorSpec& t : store.layout().tensors()) {
        if (t.name != tensor) continue;
        std::vector<float> mean = store.read(run.memory.device(), "mean", 0, t);
        mean[1] = INFINITY;
        store.write(run.memory.device(), "mean", 0, t, mean);
      }
      const auto before = run.state();
      const std::string step = "step " + std::to_string(run.trainer.steps_of(0) + 2) + " ";
      const std::string layer = "layer " + std::string(tensor).substr(0, std::string(tensor).find('.')) + " ";
      expect_says(run_error(run, 3), {layer.c_str(), tensor, "stage 2", step.c_str(), "seed 7"});
      EXPECT_EQ(run.state(), before);
    }
}

// Finite weights whose products overflow: the layer where it happens is named, not the first or the last.
TEST(Incremental, AnOverflowIsFoundWhereItBegins) {
  BATON_NEEDS_DEVICE();
  for (const Kind& kind : kinds) {
    SCOPED_TRACE(kind.name);
    TrainingPlan plan = plan_of(kind.posterior, {7}, 1, 8);
    plan.scale_rule = kind.rule;
    Training run(plan, 64);
    run.trainer.begin_stage(0);
    ParameterStore& store = run.trainer.posterior().store();
    for (const TensorSpec& t : store.layout().tensors())
      if (t.name == "conv1.weight" || t.name == "fc1.weight")
        store.write(run.memory.device(), "mean", 0, t, std::vector<float>(t.size, t.name[0] == 'c' ? 1e15f : 1e30f));
    const auto before = run.state();
    expect_says(run_error(run, 3), {"layer fc1 (its output)", "stage 1", "step 1 "});
    EXPECT_EQ(run.state(), before);
  }
}

// ------------------------------------------------------------------------------------------------- pretrained,
// augmented
std::shared_ptr<Pretrained> pretrained_small(bool laplace) {
  auto p = std::make_shared<Pretrained>();
  p->description = laplace ? "laplace" : "one sd";
  const SmallNetwork network;
  for (const TensorSpec& t : network.layout().tensors()) {
    if (t.name == "fc2.weight") continue;  // a head that begins anew
    p->weights[t.name] = random_normal(t.size, 0, t.bias ? 0.1f : std::sqrt(2.f / float(t.fan_in)), unsigned(t.offset));
    if (laplace && !t.bias) p->prior_log_std[t.name] = random_normal(t.size, -3, 0.3f, unsigned(t.offset + 1));
  }
  return p;
}

TEST(Incremental, APretrainedNetworkIsTheFirstPrior) {
  BATON_NEEDS_DEVICE();
  for (const Kind& kind : kinds)
    for (bool laplace : {false, true}) {
      SCOPED_TRACE(kind.name + std::string(laplace ? ", Laplace" : ""));
      TrainingPlan plan = plan_of(kind.posterior, {3, 4}, 2, 8);
      plan.scale_rule = kind.rule;
      plan.settings[1].pretrained = pretrained_small(laplace);
      plan.settings[1].pretrained_sd = 0.25;
      Training run(plan, 64);
      Posterior& posterior = run.trainer.posterior();
      const auto read = [&](const char* array, const TensorSpec& t) {
        return posterior.store().read(run.memory.device(), array, 1, t);
      };
      const Pretrained& from = *plan.settings[1].pretrained;
      for (const TensorSpec& t : posterior.store().layout().tensors()) {
        const auto w = from.weights.find(t.name);
        if (w == from.weights.end()) continue;
        EXPECT_TRUE(exact(read("mean", t), w->second)) << t.name;
        if (kind.posterior.family == Family::point) continue;
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
      TrainingPlan plain = plan;
      plain.settings[1].pretrained = nullptr;
      Training other(plain, 64);
      other.train();
      EXPECT_EQ(other.state(0), run.state(0));
      EXPECT_NE(other.state(1), run.state(1));
    }
}

TEST(Incremental, RefusesPretrainedNetworksOfAnotherShape) {
  BATON_NEEDS_DEVICE();
  TrainingPlan plan = plan_of(Family::gaussian, {3}, 2, 8);
  const auto refuses = [&](const char* what, auto change) {
    auto p = pretrained_small(true);
    change(*p);
    plan.settings[0].pretrained = p;
    EXPECT_THROW(Training(plan, 64), InputError) << what;
  };
  refuses("an unknown tensor", [](Pretrained& p) { p.weights["conv9.weight"] = {1}; });
  refuses("a short tensor", [](Pretrained& p) { p.weights["fc1.bias"].pop_back(); });
  refuses("short standard deviations", [](Pretrained& p) { p.prior_log_std["fc1.weight"].pop_back(); });
}

TEST(Incremental, AugmentedBatchesAreOthersAndTheSameEveryRun) {
  BATON_NEEDS_DEVICE();
  TrainingPlan plan = plan_of(Family::gaussian, {3}), augmented = plan;
  augmented.augment = true;
  Training plain(plan, 64), a(augmented, 64), b(augmented, 64);
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
  Memory memory;
  const DeviceImages set = upload_images(memory.device(), memory.arena(), generate_digits(20, 1), unit_range);
  const TrainingPlan good = plan_of(Family::gaussian, {0}, 2, 8);
  const auto build = [&](const TrainingPlan& plan, std::vector<std::vector<int32_t>> order, std::vector<int> sizes) {
    IncrementalTrainer(memory.device(), memory.arena(), small(), set, plan, order, sizes);
  };
  const auto order = Training::orders(good, 20);
  EXPECT_NO_THROW(build(good, order, {10, 10}));
  const auto refuses = [&](const char* what, auto change) {
    TrainingPlan plan = good;
    change(plan);
    EXPECT_THROW(build(plan, order, {10, 10}), InputError) << what;
  };
  refuses("no seeds", [](TrainingPlan& p) { p.seeds.clear(); });
  refuses("two seeds, one setting", [](TrainingPlan& p) { p.seeds.push_back(1); });
  refuses("no settings", [](TrainingPlan& p) { p.settings.clear(); });
  refuses("batch 0", [](TrainingPlan& p) { p.batch = 0; });
  refuses("batch -3", [](TrainingPlan& p) { p.batch = -3; });
  refuses("epochs 0", [](TrainingPlan& p) { p.epochs = 0; });
  refuses("epochs < 0", [](TrainingPlan& p) { p.epochs = -1; });
  refuses("epochs NaN", [](TrainingPlan& p) { p.epochs = NAN; });
  EXPECT_THROW(build(good, order, {}), InputError) << "no part";
  EXPECT_THROW(build(good, order, {20, 0}), InputError) << "an empty part";
  EXPECT_THROW(build(good, order, {10, 9}), InputError) << "an order of another length";
  EXPECT_THROW(build(good, {order[0], order[0]}, {10, 10}), InputError) << "too many orders";
  TrainingPlan nobody = good;
  nobody.seeds.clear(), nobody.settings.clear();
  EXPECT_THROW(build(nobody, {}, {10, 10}), InputError) << "no replicas at all";
  for (Family family : {Family::channel, Family::multiplicative}) {
    refuses("groups that do not divide the batch", [&](TrainingPlan& p) { p.posterior = options_of(family, 3); });
    refuses("no groups", [&](TrainingPlan& p) { p.posterior = options_of(family, 0); });
  }
  refuses("flow steps", [](TrainingPlan& p) { p.posterior = Family::multiplicative, p.posterior.flow_steps = 9; });
  refuses("flow steps", [](TrainingPlan& p) { p.posterior = Family::multiplicative, p.posterior.flow_steps = -1; });
  refuses("hidden units", [](TrainingPlan& p) { p.posterior = Family::multiplicative, p.posterior.flow_hidden = 0; });
}

// ------------------------------------------------------------------------------------------------------ checkpoints
class Checkpoint : public testing::Test {
 protected:
  void TearDown() override { fs::remove(path_); }
  fs::path path_ = fs::temp_directory_path() / ("baton_training_" + std::to_string(::getpid()) + ".safetensors");
};

// Saved in the middle of the second of three stages and taken up in a fresh trainer.
TEST_F(Checkpoint, AResumedRunIsTheUninterruptedOne) {
  BATON_NEEDS_DEVICE();
  for (const Kind& kind : kinds)
    for (std::vector<uint64_t> seeds : {std::vector<uint64_t>{7}, {1, 2}}) {
      SCOPED_TRACE(kind.name);
      TrainingPlan plan = plan_of(kind.posterior, seeds, 3, 8);
      plan.scale_rule = kind.rule;
      plan.epochs = 2;
      const int done = 3;
      Training whole(plan, 100);
      whole.trainer.begin_stage(0);
      whole.trainer.run(whole.trainer.steps_of(0));
      whole.trainer.begin_stage(1);
      whole.trainer.run(done);
      whole.trainer.save(path_, "{\"epoch\": 5}");
      const auto saved = whole.state();

      Training resumed(plan, 100);
      EXPECT_EQ(resumed.trainer.restore(path_), "{\"epoch\": 5}");
      EXPECT_EQ(resumed.trainer.stage(), 1);
      EXPECT_EQ(resumed.trainer.stage_step(), done);
      EXPECT_EQ(whole.state(), saved);  // saving changes nothing
      for (size_t r = 0; r < seeds.size(); r++) EXPECT_EQ(resumed.state(int(r)), whole.state(int(r)));
      EXPECT_EQ(resumed.trainer.posterior().kl(), whole.trainer.posterior().kl());

      const auto go_on = [&](Training& run) {
        auto totals = run.trainer.run(run.trainer.steps_of(1) - done);
        for (const EpochTotals& t : run.train(2)) totals.push_back(t);
        return totals;
      };
      const auto a = go_on(whole), b = go_on(resumed);
      ASSERT_EQ(a.size(), b.size());
      for (size_t i = 0; i < a.size(); i++) expect_same(a[i], b[i]);
      for (size_t r = 0; r < seeds.size(); r++) EXPECT_EQ(resumed.state(int(r)), whole.state(int(r)));
      EXPECT_NE(whole.state(), saved);
    }
}

// As if a signal came, until the end of the block.
struct Signal {
  explicit Signal(int signal) { pretend_signal(signal); }
  ~Signal() { pretend_signal(0); }
};

// Stopped in the middle of an epoch, at its start and at its end, and taken up in fresh trainers: their totals, their
// KLs and all else are those of an epoch that nothing interrupted.
TEST_F(Checkpoint, AStoppedEpochIsTheUninterruptedOne) {
  BATON_NEEDS_DEVICE();
  for (const Kind& kind : kinds) {
    SCOPED_TRACE(kind.name);
    TrainingPlan plan = plan_of(kind.posterior, {7, 2}, 2, 8);
    plan.scale_rule = kind.rule;
    plan.epochs = 2;
    Training whole(plan, 96);
    whole.train(0);
    Training again(plan, 96);  // as whole, but in epochs
    std::vector<EpochTotals> want;
    for (int stage : {0, 1}) {
      again.trainer.begin_stage(stage);
      for (int epoch = 0; epoch < 2; epoch++)
        for (const EpochTotals& t : again.trainer.run(6)) want.push_back(t);
    }

    auto run = std::make_unique<Training>(plan, 96);
    std::vector<EpochTotals> got;
    const auto stop = [&](int asked, int done) {
      {
        const Signal signal(SIGTERM);
        EXPECT_EQ(run->trainer.advance(asked), done);
      }
      run->trainer.save(path_, "more");
      const auto state = run->state();
      run = std::make_unique<Training>(plan, 96);
      EXPECT_EQ(run->trainer.restore(path_), "more");
      EXPECT_EQ(run->state(), state);
    };
    const auto take = [&] {
      for (const EpochTotals& t : run->trainer.take_totals()) got.push_back(t);
    };
    run->trainer.begin_stage(0);
    EXPECT_EQ(run->trainer.advance(2), 2);
    stop(4, 0);
    EXPECT_EQ(run->trainer.stage_step(), 2);
    stop(4, 1);  // the first step of a trainer always runs
    EXPECT_EQ(run->trainer.advance(3), 3);
    stop(0, 0);  // at the epoch's end, its totals untaken
    take();
    stop(0, 0);  // and taken
    EXPECT_EQ(run->trainer.advance(6), 6);
    take();
    run->trainer.begin_stage(1);
    stop(6, 0);
    EXPECT_EQ(run->trainer.stage(), 1);
    EXPECT_EQ(run->trainer.advance(6), 6);
    take();
    stop(6, 0);
    stop(6, 1);
    stop(5, 1);
    EXPECT_EQ(run->trainer.advance(4), 4);
    take();
    ASSERT_EQ(got.size(), want.size());
    for (size_t i = 0; i < got.size(); i++) expect_same(got[i], want[i]);
    for (int r : {0, 1}) {
      EXPECT_EQ(run->state(r), again.state(r));
      EXPECT_EQ(run->state(r), whole.state(r));
    }
    EXPECT_EQ(run->trainer.posterior().kl(), whole.trainer.posterior().kl());
  }
}

TEST(Incremental, RunEndsWithTheSignal) {
  BATON_NEEDS_DEVICE();
  for (const auto& [number, name, code] : {std::tuple(SIGINT, "SIGINT", 130), {SIGTERM, "SIGTERM", 143}}) {
    Training run(plan_of(Family::gaussian, {7}, 1, 8), 64);
    run.trainer.begin_stage(0);
    const Signal signal(number);
    try {
      run.trainer.run(4);
      ADD_FAILURE() << "not stopped";
    } catch (const Stopped& e) {
      EXPECT_EQ(e.exit_code(), code);
      expect_says(e.what(), {"stopped by ", name});
    }
  }
}

// What Posterior::save() keeps after a stage is all that the next one needs: taken up in a trainer that has that part
// alone, it is learned as if nothing had come between. To the same bits, but that load() computes the variances anew,
// and exp() rounds otherwise where the compiler has vectorised it otherwise; with the very variances, to the same bits.
TEST_F(Checkpoint, AStageGoesOnFromASavedPosterior) {
  BATON_NEEDS_DEVICE();
  const auto arrays_of = [](Memory& m, Posterior& posterior, const std::string& only = {}) {
    std::vector<std::vector<float>> arrays;
    for (const StateArray& a : posterior.state_arrays())
      for (const TensorSpec& t : a.store->layout().tensors())
        if (only.empty() || a.array == only) arrays.push_back(a.store->read(m.device(), a.array, 0, t));
    return arrays;
  };
  for (const Kind& kind : kinds)
    for (bool exact_variances : {false, true}) {
      SCOPED_TRACE(kind.name + std::string(exact_variances ? ", with its variances" : ""));
      const bool same = exact_variances || kind.posterior.family == Family::point;
      TrainingPlan plan = plan_of(kind.posterior, {7}, 2, 8);
      plan.scale_rule = kind.rule;
      plan.epochs = 2;
      Training first(plan, 101);
      first.trainer.begin_stage(0);
      first.trainer.run(first.trainer.steps_of(0));
      TensorFile model;
      first.trainer.posterior().save(model);
      save_safetensors(path_, model);
      const uint32_t steps = first.trainer.steps_in_all();
      EXPECT_EQ(steps, uint32_t(first.trainer.steps_of(0)));
      const auto variances = arrays_of(first.memory, first.trainer.posterior(), "variance");
      first.trainer.begin_stage(1);
      const int half = 5, rest = first.trainer.steps_of(1) - half;
      const std::vector<EpochTotals> want{first.trainer.run(half)[0], first.trainer.run(rest)[0]};
      const std::vector<double> kl = first.trainer.posterior().kl();
      const auto state = arrays_of(first.memory, first.trainer.posterior());
      const auto expect = [&](const EpochTotals& got, const EpochTotals& wanted) {
        if (same) return expect_same(got, wanted);
        EXPECT_NEAR(got.loss, wanted.loss, 1e-5 * wanted.loss);
        EXPECT_NEAR(got.kl, wanted.kl, 1e-4 * wanted.kl);
        EXPECT_EQ(got.steps, wanted.steps);
      };

      TrainingPlan second = plan;
      second.parts = 1;
      second.stages_before = 1;
      second.goes_on_from = "the first";
      const std::vector<int32_t> part = split_parts(101, 2, 7)[1];
      const auto make = [&](Memory& m) {
        return std::make_unique<IncrementalTrainer>(
            m.device(), m.arena(), small(), upload_images(m.device(), m.arena(), generate_digits(101, 11), unit_range),
            second, std::vector<std::vector<int32_t>>{part}, std::vector<int>{int(part.size())});
      };
      Memory memory, memory_of_resumed;
      const auto trainer = make(memory);
      trainer->resume_from(load_safetensors(path_), steps);
      size_t next = 0;
      for (const StateArray& a : trainer->posterior().state_arrays())
        for (const TensorSpec& t : a.store->layout().tensors())
          if (exact_variances && a.array == "variance")
            a.store->write(memory.device(), a.array, 0, t, variances[next++]);
      trainer->begin_stage(0);
      EXPECT_EQ(trainer->steps_of(0), half + rest);
      expect(trainer->run(half)[0], want[0]);
      // Stopped and taken up, too.
      trainer->save(path_, "");
      EXPECT_EQ(load_safetensors(path_).metadata.at("prior"), "posterior of stage 1");
      const auto resumed = make(memory_of_resumed);
      resumed->restore(path_);
      const EpochTotals last = trainer->run(rest)[0];
      expect(last, want[1]);
      expect_same(resumed->run(rest)[0], last);
      const auto end = arrays_of(memory, trainer->posterior());
      EXPECT_EQ(arrays_of(memory_of_resumed, resumed->posterior()), end);
      if (same) {
        EXPECT_EQ(end, state);
        EXPECT_EQ(trainer->posterior().kl(), kl);
      }
      EXPECT_EQ(trainer->steps_in_all(), steps + half + rest);
      // A checkpoint of it is of no other history.
      second.goes_on_from = "another";
      Memory memory_of_other;
      EXPECT_THROW(make(memory_of_other)->restore(path_), InputError);
    }
}

// A trainer that has been somewhere else forgets it all when it restores.
TEST_F(Checkpoint, RestoringUndoesWhatCameAfter) {
  BATON_NEEDS_DEVICE();
  for (Family family : {Family::point, Family::gaussian}) {
    Training run(plan_of(family, {7}, 2, 8), 64);
    run.trainer.begin_stage(0);
    run.trainer.run(2);
    run.trainer.save(path_, "");
    const EpochTotals next = run.trainer.run(2)[0];
    const auto after = run.state();
    run.trainer.begin_stage(1);
    run.trainer.run(3);
    EXPECT_EQ(run.trainer.restore(path_), "");
    EXPECT_EQ(run.trainer.stage(), 0);
    expect_same(run.trainer.run(2)[0], next);
    EXPECT_EQ(run.state(), after);
  }
}

TEST_F(Checkpoint, NamesAndShapesArePyTorchs) {
  BATON_NEEDS_DEVICE();
  TrainingPlan plan = plan_of(Family::gaussian, {7}, 1, 4);
  Training run(plan, 8, lenet5());
  run.trainer.begin_stage(0);
  run.trainer.run(1);
  run.trainer.save(path_, "more");
  const TensorFile file = load_safetensors(path_);
  const std::map<std::string, std::vector<int64_t>> shapes{
      {"conv1.weight", {20, 1, 5, 5}}, {"conv1.bias", {20}}, {"conv2.weight", {50, 20, 5, 5}}, {"conv2.bias", {50}},
      {"fc1.weight", {500, 800}},      {"fc1.bias", {500}},  {"fc2.weight", {10, 500}},        {"fc2.bias", {10}}};
  for (const auto& [name, shape] : shapes)
    for (const char* array : {"mean", "log_std", "variance", "prior_mean", "prior_log_std", "mean.adam_m",
                              "mean.adam_v", "log_std.adam_m", "log_std.adam_v"})
      EXPECT_EQ(file.at(name + "." + array).shape, shape) << name << "." << array;
  EXPECT_EQ(file.tensors.size(), shapes.size() * 9 + 3);  // and step_state, totals, booked_kl
  EXPECT_EQ(file.at("booked_kl").as<double>().size(), shapes.size());
  const ParameterStore& store = run.trainer.posterior().store();
  EXPECT_TRUE(exact(file.at("conv2.weight.log_std").as<float>(),
                    store.read(run.memory.device(), "log_std", 0, store.layout()[2])));
  EXPECT_EQ(file.metadata.at("architecture"), "lenet5");
  EXPECT_EQ(file.metadata.at("family"), "ffg");
  EXPECT_EQ(file.metadata.at("format"), "baton-training-2");
  EXPECT_EQ(file.metadata.at("stage"), "0");
  EXPECT_EQ(file.metadata.at("stage_step"), "1");
  EXPECT_EQ(file.metadata.at("step"), "1");
  EXPECT_EQ(file.metadata.at("extra"), "more");
  EXPECT_NE(file.metadata.at("prior"), "");
  const auto identity = nlohmann::json::parse(file.metadata.at("plan"));
  EXPECT_EQ(identity["seeds"], nlohmann::json({7}));
  EXPECT_EQ(identity["batch"], 4);
}

TEST_F(Checkpoint, PointPosteriorsAndReplicas) {
  BATON_NEEDS_DEVICE();
  Training run(plan_of(Family::point, {7, 8}, 1, 4), 8);
  run.trainer.begin_stage(0);
  run.trainer.run(1);
  run.trainer.save(path_, "");
  const TensorFile file = load_safetensors(path_);
  EXPECT_EQ(file.metadata.at("family"), "ft");
  EXPECT_EQ(file.tensors.size(), 2u * 6 * 3 + 3);
  for (const char* replica : {"replica0/", "replica1/"}) {
    EXPECT_EQ(file.at(std::string(replica) + "conv1.weight.mean").shape, (std::vector<int64_t>{3, 1, 5, 5}));
    EXPECT_FALSE(file.has(std::string(replica) + "conv1.weight.log_std"));
  }
}

TEST_F(Checkpoint, RefusesOtherRuns) {
  BATON_NEEDS_DEVICE();
  const TrainingPlan plan = plan_of(Family::gaussian, {7}, 2, 8);
  Training run(plan, 64);
  run.trainer.begin_stage(0);
  run.trainer.run(2);
  run.trainer.save(path_, "");
  const auto refuses = [&](const char* what, auto change, int count = 64) {
    TrainingPlan other = plan;
    change(other);
    Training fresh(other, count);
    const auto before = fresh.state();
    EXPECT_THROW(fresh.trainer.restore(path_), InputError) << what;
    EXPECT_EQ(fresh.state(), before) << what;
    EXPECT_EQ(fresh.trainer.stage(), -1) << what;
  };
  refuses("seed", [](TrainingPlan& p) { p.seeds = {8}; });
  refuses("family", [](TrainingPlan& p) { p.posterior.family = Family::point; });
  refuses("scale rule", [](TrainingPlan& p) { p.scale_rule = ScaleRule::natural; });
  refuses("batch", [](TrainingPlan& p) { p.batch = 4; });
  refuses("epochs", [](TrainingPlan& p) { p.epochs = 2; });
  refuses("parts", [](TrainingPlan& p) { p.parts = 4; });
  refuses("replicas", [](TrainingPlan& p) { p.seeds = {7, 7}, p.settings.resize(2); });
  refuses("learning rate", [](TrainingPlan& p) { p.settings[0].lr = 0.5; });
  refuses("schedule", [](TrainingPlan& p) { p.settings[0].schedule = Schedule::constant; });
  refuses("prior", [](TrainingPlan& p) { p.settings[0].prior_sd = 3; });
  refuses("augmentation", [](TrainingPlan& p) { p.augment = true; });
  refuses("a pretrained network", [](TrainingPlan& p) { p.settings[0].pretrained = pretrained_small(false); });
  refuses(
      "size", [](TrainingPlan&) {}, 66);
  Training lenet(plan, 64, lenet5());
  EXPECT_THROW(lenet.trainer.restore(path_), InputError) << "network";
  Training same(plan, 64);
  EXPECT_NO_THROW(same.trainer.restore(path_));
}

// What the draws and the flows are is part of a run too.
TEST_F(Checkpoint, RefusesOtherFamilies) {
  BATON_NEEDS_DEVICE();
  for (Family family : {Family::channel, Family::multiplicative}) {
    const TrainingPlan plan = plan_of(options_of(family, 2), {7}, 2, 8);
    Training run(plan, 64);
    run.trainer.begin_stage(0);
    run.trainer.run(1);
    run.trainer.save(path_, "");
    const auto refuses = [&](const char* what, auto change) {
      TrainingPlan other = plan;
      change(other.posterior);
      Training fresh(other, 64);
      EXPECT_THROW(fresh.trainer.restore(path_), InputError) << name_of(family) << ": " << what;
    };
    refuses("family", [](PosteriorOptions& o) { o.family = Family::gaussian; });
    refuses("groups", [](PosteriorOptions& o) { o.groups = 1; });
    if (family == Family::channel) continue;
    refuses("flow", [](PosteriorOptions& o) { o.flow = FlowKind::affine; });
    refuses("steps", [](PosteriorOptions& o) { o.flow_steps = 1; });
    refuses("hidden units", [](PosteriorOptions& o) { o.flow_hidden = 7; });
    refuses("z", [](PosteriorOptions& o) { o.z_per_filter = true; });
    refuses("base", [](PosteriorOptions& o) { o.fixed_base = true; });
    refuses("path gradient", [](PosteriorOptions& o) { o.path_gradient = true; });
    refuses("base width", [](PosteriorOptions& o) { o.z_log_std = -3; });
  }
}

TEST_F(Checkpoint, RefusesDamagedFiles) {
  BATON_NEEDS_DEVICE();
  const TrainingPlan plan = plan_of(Family::gaussian, {7}, 2, 8);
  Training run(plan, 64), fresh(plan, 64);
  EXPECT_THROW(fresh.trainer.restore(path_), InputError) << "no file";
  run.trainer.begin_stage(0);
  run.trainer.save(path_, "");
  const TensorFile good = load_safetensors(path_);
  const auto refuses = [&](const char* what, auto change) {
    TensorFile file = good;
    change(file);
    save_safetensors(path_, file);
    EXPECT_THROW(fresh.trainer.restore(path_), InputError) << what;
  };
  refuses("no metadata", [](TensorFile& f) { f.metadata.clear(); });
  refuses("no stage", [](TensorFile& f) { f.metadata.erase("stage"); });
  refuses("a tensor is missing", [](TensorFile& f) { f.tensors.erase("fc2.bias.log_std"); });
  refuses("a tensor is too short",
          [](TensorFile& f) { f.tensors["fc2.bias.mean"] = Tensor::of<float>(std::vector<float>(9), {9}); });
  refuses("no step state", [](TensorFile& f) { f.tensors.erase("step_state"); });
  refuses("no totals", [](TensorFile& f) { f.tensors.erase("totals"); });
  refuses("short totals",
          [](TensorFile& f) { f.tensors["totals"] = Tensor::of<uint8_t>(std::vector<uint8_t>(5), {5}); });
  refuses("no booked KL", [](TensorFile& f) { f.tensors.erase("booked_kl"); });
  refuses("an older format", [](TensorFile& f) { f.metadata["format"] = "baton-training-1"; });
  refuses("a short step state",
          [](TensorFile& f) { f.tensors["step_state"] = Tensor::of<uint8_t>(std::vector<uint8_t>(5), {5}); });
  fs::resize_file(path_, fs::file_size(path_) / 2);
  EXPECT_THROW(fresh.trainer.restore(path_), InputError) << "cut short";
}

}  // namespace
}  // namespace baton::test
