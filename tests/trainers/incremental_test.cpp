#include "trainers/incremental.h"

#include <unistd.h>

#include <nlohmann/json.hpp>

#include "engine/synthetic.h"
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
  // Every array that training goes on from, of one replica.
  std::vector<std::vector<float>> state(int replica = 0) {
    const ParameterStore& store = trainer.posterior().store();
    const size_t stride = store.layout().stride();
    std::vector<std::vector<float>> arrays;
    for (const std::string& name : trainer.posterior().state_arrays())
      arrays.push_back(download(memory.device(), store.at(name) + stride * replica, stride));
    if (trainer.posterior().family() == Family::gaussian)
      arrays.push_back(download(memory.device(), store.at("variance") + stride * replica, stride));
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

TrainingPlan plan_of(Family family, std::vector<uint64_t> seeds, int parts = 2, int batch = 8) {
  TrainingPlan plan;
  plan.family = family;
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
    s.init_log_sd = -4 - 0.1 * double(seed % 4);
    s.warmup_epochs = 0.5;
    s.schedule = seed % 2 ? Schedule::linear : Schedule::cosine;
    plan.settings.push_back(s);
  }
  return plan;
}

struct Kind {
  const char* name;
  Family family;
  ScaleRule rule;
};
const Kind kinds[] = {{"ft", Family::point, ScaleRule::adam},
                      {"ffg, Adam", Family::gaussian, ScaleRule::adam},
                      {"ffg, natural", Family::gaussian, ScaleRule::natural}};

void expect_same(const EpochTotals& a, const EpochTotals& b) {
  EXPECT_EQ(a.loss, b.loss);
  EXPECT_EQ(a.accuracy, b.accuracy);
  EXPECT_EQ(a.kl, b.kl);
  EXPECT_EQ(a.examples, b.examples);
  EXPECT_EQ(a.steps, b.steps);
}

TEST(Incremental, TheSameSeedIsTheSameRun) {
  BATON_NEEDS_DEVICE();
  for (const Kind& kind : kinds) {
    SCOPED_TRACE(kind.name);
    TrainingPlan plan = plan_of(kind.family, {3}), other = plan_of(kind.family, {4});
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
        TrainingPlan plan = plan_of(kind.family, seeds, 2, batch);
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
    plan.family = kind.family;
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
    if (kind.family == Family::point) continue;
    // The posterior moves on: the data have sharpened or moved it, and the KL says so.
    EXPECT_GT(run.trainer.posterior().kl()[0], 0);
  }
}

TEST(Incremental, ANanStopsTheRun) {
  BATON_NEEDS_DEVICE();
  for (Family family : {Family::point, Family::gaussian}) {
    TrainingPlan plan = plan_of(family, {0, 1}, 2, 8);
    Training run(plan, 64);
    run.trainer.begin_stage(0);
    run.trainer.run(run.trainer.steps_of(0));
    plan.settings[1].lr = 1e30;  // the second replica's means are gone after one step
    plan.settings[1].schedule = Schedule::constant;
    Training bad(plan, 64);
    bad.trainer.begin_stage(0);
    try {
      bad.trainer.run(4);
      FAIL() << "no error";
    } catch (const RunError& e) {
      const std::string what = e.what();
      EXPECT_NE(what.find("replica 1"), std::string::npos) << what;
      EXPECT_NE(what.find("stage 1"), std::string::npos) << what;
      EXPECT_NE(what.find("step 2"), std::string::npos) << what;
    }
  }
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
      TrainingPlan plan = plan_of(kind.family, seeds, 3, 8);
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
    for (const char* array : {"mean", "log_std", "prior_mean", "prior_log_std", "mean.adam_m", "mean.adam_v",
                              "log_std.adam_m", "log_std.adam_v"})
      EXPECT_EQ(file.at(name + "." + array).shape, shape) << name << "." << array;
  EXPECT_EQ(file.tensors.size(), shapes.size() * 8 + 1);  // and step_state
  const ParameterStore& store = run.trainer.posterior().store();
  EXPECT_TRUE(exact(file.at("conv2.weight.log_std").as<float>(),
                    store.read(run.memory.device(), "log_std", 0, store.layout()[2])));
  EXPECT_EQ(file.metadata.at("architecture"), "lenet5");
  EXPECT_EQ(file.metadata.at("family"), "ffg");
  EXPECT_EQ(file.metadata.at("format"), "baton-training-1");
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
  EXPECT_EQ(file.tensors.size(), 2u * 6 * 3 + 1);
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
  refuses("family", [](TrainingPlan& p) { p.family = Family::point; });
  refuses("scale rule", [](TrainingPlan& p) { p.scale_rule = ScaleRule::natural; });
  refuses("batch", [](TrainingPlan& p) { p.batch = 4; });
  refuses("epochs", [](TrainingPlan& p) { p.epochs = 2; });
  refuses("parts", [](TrainingPlan& p) { p.parts = 4; });
  refuses("replicas", [](TrainingPlan& p) { p.seeds = {7, 7}, p.settings.resize(2); });
  refuses("learning rate", [](TrainingPlan& p) { p.settings[0].lr = 0.5; });
  refuses("schedule", [](TrainingPlan& p) { p.settings[0].schedule = Schedule::constant; });
  refuses("prior", [](TrainingPlan& p) { p.settings[0].prior_sd = 3; });
  refuses(
      "size", [](TrainingPlan&) {}, 66);
  Training lenet(plan, 64, lenet5());
  EXPECT_THROW(lenet.trainer.restore(path_), InputError) << "network";
  Training same(plan, 64);
  EXPECT_NO_THROW(same.trainer.restore(path_));
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
  refuses("a short step state",
          [](TensorFile& f) { f.tensors["step_state"] = Tensor::of<uint8_t>(std::vector<uint8_t>(5), {5}); });
  fs::resize_file(path_, fs::file_size(path_) / 2);
  EXPECT_THROW(fresh.trainer.restore(path_), InputError) << "cut short";
}

}  // namespace
}  // namespace baton::test
