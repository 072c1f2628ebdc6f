// Checkpoints of a training: taken up at any step, it goes on to the very bits that an uninterrupted one ends in; and
// what is no checkpoint of this training is refused, and changes nothing.
#include <unistd.h>

#include <csignal>
#include <cstring>

#include "engine/io/stop.h"
#include "tests/support/device.h"
#include "tests/support/precision.h"
#include "tests/support/training.h"

namespace baton::test {
namespace {

namespace fs = std::filesystem;

const TestedKind& bgd = task_kinds[0];

// As if a signal came, until the end of the block.
struct Signal {
  explicit Signal(int signal) { pretend_signal(signal); }
  ~Signal() { pretend_signal(0); }
};

class Checkpoint : public testing::Test {
 protected:
  void TearDown() override { fs::remove(path_); }

  // Saved in the middle of the second of three stages and taken up in a fresh trainer. make(): the training.
  template <class F>
  void expect_resumed(F make) {
    const std::unique_ptr<Training> whole = make(), resumed = make();
    const int done = 3;
    whole->stage(0);
    whole->trainer.begin_stage(1);
    whole->trainer.run(done);
    whole->trainer.save(path_, "{\"epoch\": 5}");
    const auto saved = whole->states();

    EXPECT_EQ(resumed->trainer.restore(path_), "{\"epoch\": 5}");
    EXPECT_EQ(resumed->trainer.stage(), 1);
    EXPECT_EQ(resumed->trainer.stage_step(), done);
    EXPECT_EQ(resumed->trainer.step(), whole->trainer.step());
    EXPECT_EQ(whole->states(), saved);  // saving changes nothing
    EXPECT_EQ(resumed->states(), saved);
    EXPECT_EQ(resumed->trainer.posterior().kl(), whole->trainer.posterior().kl());

    const auto go_on = [&](Training& run) {
      auto totals = run.trainer.run(run.trainer.count_steps(1) - done);
      run.end_stage();
      for (const EpochTotals& t : run.train(2)) totals.push_back(t);
      return totals;
    };
    expect_same(go_on(*whole), go_on(*resumed));
    EXPECT_EQ(resumed->states(), whole->states());
    EXPECT_NE(whole->states(), saved);
  }

  // Stopped in the middle of an epoch, at its start and at its end, and taken up in fresh trainers: their totals, their
  // KLs and all else are those of an epoch that nothing interrupted. make(): two stages of two epochs of six steps.
  template <class F>
  void expect_stops_leave_no_trace(F make) {
    const std::unique_ptr<Training> whole = make(), again = make();
    whole->train();
    std::vector<EpochTotals> want, got;  // of epochs
    for (int stage : {0, 1}) {
      again->trainer.begin_stage(stage);
      for (int epoch = 0; epoch < 2; epoch++)
        for (const EpochTotals& t : again->trainer.run(6)) want.push_back(t);
      again->end_stage();
    }

    std::unique_ptr<Training> run = make();
    const auto stop = [&](int asked, int done) {
      {
        const Signal signal(SIGTERM);
        EXPECT_EQ(run->trainer.advance(asked), done);
      }
      run->trainer.save(path_, "more");
      const auto states = run->states();
      run = make();
      EXPECT_EQ(run->trainer.restore(path_), "more");
      EXPECT_EQ(run->states(), states);
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
    stop(0, 0);  // at the stage's end
    run->end_stage();
    stop(0, 0);
    run->trainer.begin_stage(1);
    stop(0, 0);
    EXPECT_EQ(run->trainer.stage(), 1);
    EXPECT_EQ(run->trainer.advance(2), 2);
    stop(4, 0);
    EXPECT_EQ(run->trainer.advance(4), 4);
    take();
    stop(6, 0);
    stop(6, 1);
    stop(5, 1);
    EXPECT_EQ(run->trainer.advance(4), 4);
    take();
    run->end_stage();
    expect_same(got, want);
    EXPECT_EQ(run->states(), again->states());
    EXPECT_EQ(run->states(), whole->states());
    EXPECT_EQ(run->trainer.posterior().kl(), whole->trainer.posterior().kl());
    EXPECT_EQ(run->trainer.step(), whole->trainer.step());
  }

  fs::path path_ = fs::temp_directory_path() / ("baton_training_" + std::to_string(::getpid()) + ".safetensors");
};
class TaskCheckpoint : public Checkpoint {};

TEST_F(Checkpoint, AResumedRunIsTheUninterruptedOne) {
  BATON_NEEDS_DEVICE();
  for (const TestedKind& kind : stage_kinds)
    for (std::vector<uint64_t> seeds : {std::vector<uint64_t>{7}, {1, 2}}) {
      SCOPED_TRACE(kind.name);
      TrainingSettings settings = varied_settings(kind, seeds);
      settings.epochs = 2;
      expect_resumed([&] { return std::make_unique<Training>(settings, 100, 3); });
    }
}
TEST_F(TaskCheckpoint, AResumedRunIsTheUninterruptedOne) {
  BATON_NEEDS_DEVICE();
  for (const TestedKind& kind : task_kinds) {
    SCOPED_TRACE(kind.name);
    TrainingSettings settings = plain_settings(kind, {3});
    settings.replicas[0].settings["schedule"] = "linear";
    settings.epochs = 1.5;
    expect_resumed(
        [&] { return std::make_unique<Training>(settings, stages_by_head(60), digits_for_heads(60), two_heads()); });
    expect_resumed(
        [&] { return std::make_unique<Training>(settings, permuted_tasks(3, 60), digits(60), small_mlp(6)); });
  }
}

TEST_F(Checkpoint, AStoppedEpochIsTheUninterruptedOne) {
  BATON_NEEDS_DEVICE();
  for (const TestedKind& kind : stage_kinds) {
    SCOPED_TRACE(kind.name);
    TrainingSettings settings = varied_settings(kind, {7, 2});
    settings.epochs = 2;
    expect_stops_leave_no_trace([&] { return std::make_unique<Training>(settings, 96); });
  }
}

TEST_F(TaskCheckpoint, AStoppedEpochIsTheUninterruptedOne) {
  BATON_NEEDS_DEVICE();
  Stages stages = split_into_parts(96, 2, {3});
  stages.heads = {0, 1};
  for (const TestedKind& kind : task_kinds) {
    SCOPED_TRACE(kind.name);
    TrainingSettings settings = plain_settings(kind, {3});
    settings.epochs = 2;
    expect_stops_leave_no_trace(
        [&] { return std::make_unique<Training>(settings, stages, digits_for_heads(96), two_heads()); });
  }
}

// How many draws run at once is no part of a run: what was added up goes over.
TEST_F(TaskCheckpoint, TotalsOfOtherDrawsAtOnce) {
  BATON_NEEDS_DEVICE();
  const auto make = [](int at_once) {
    TestedKind kind = bgd;
    kind.settings["draws_at_once"] = at_once;
    return std::make_unique<Training>(plain_settings(kind, {3}), whole_set(60), digits(60), small_mlp(6));
  };
  const auto two = make(2);
  two->trainer.begin_stage(0);
  two->trainer.advance(3);
  two->trainer.save(path_, "");
  two->trainer.advance(2);
  const EpochTotals want = two->trainer.take_totals()[0];
  for (int at_once : {1, 4}) {
    const auto other = make(at_once);
    other->trainer.restore(path_);
    other->trainer.advance(2);
    const EpochTotals got = other->trainer.take_totals()[0];
    EXPECT_EQ(got.steps, 5);
    EXPECT_EQ(got.examples, want.examples);
    EXPECT_NEAR(got.loss, want.loss, 1e-5 * want.loss);
    EXPECT_EQ(got.accuracy, want.accuracy);
  }
}

TEST_F(TaskCheckpoint, ContinuousTasksToo) {
  BATON_NEEDS_DEVICE();
  const auto make = [] {
    return std::make_unique<Training>(plain_settings(bgd, {3}), continuous_tasks(3, 60, 20), digits(60), small_mlp(6));
  };
  const auto whole = make(), resumed = make();
  whole->trainer.begin_stage(0);
  whole->trainer.run(9);
  whole->trainer.save(path_, "");
  resumed->trainer.restore(path_);
  expect_same(whole->trainer.run(11), resumed->trainer.run(11));
  EXPECT_EQ(resumed->state(), whole->state());
}

// What Posterior::save() keeps after a stage is all that the next one needs: taken up in a trainer that has that part
// alone, it is learned as if nothing had come between. To the same bits, but that load() computes the variances anew,
// and exp() rounds otherwise where the compiler has vectorised it otherwise; with the very variances, to the same bits.
TEST_F(Checkpoint, AStageGoesOnFromASavedPosterior) {
  BATON_NEEDS_DEVICE();
  for (const TestedKind& kind : stage_kinds)
    for (bool exact_variances : {false, true}) {
      SCOPED_TRACE(kind.name + std::string(exact_variances ? ", with its variances" : ""));
      const bool same = exact_variances || kind.kind == "ft";
      TrainingSettings settings = varied_settings(kind, {7});
      settings.epochs = 2;
      Training first(settings, 101);
      first.trainer.begin_stage(0);
      first.trainer.run(first.trainer.count_steps(0));
      TensorFile model;
      first.trainer.posterior().save(model);
      save_safetensors(path_, model);
      const uint32_t steps = first.trainer.count_history();
      EXPECT_EQ(steps, uint32_t(first.trainer.count_steps(0)));
      std::vector<float> variances;
      if (kind.kind != "ft") variances = first.array("variance");
      first.trainer.begin_stage(1);
      const int half = 5, rest = first.trainer.count_steps(1) - half;
      const std::vector<EpochTotals> want{first.trainer.run(half)[0], first.trainer.run(rest)[0]};
      const std::vector<double> kl = first.trainer.posterior().kl();
      const auto state = first.state();
      const auto expect = [&](const EpochTotals& got, const EpochTotals& wanted) {
        if (same) return expect_same(got, wanted);
        EXPECT_NEAR(got.loss, wanted.loss, 1e-5 * wanted.loss);
        EXPECT_NEAR(got.kl, wanted.kl, 1e-4 * wanted.kl);
        EXPECT_EQ(got.steps, wanted.steps);
      };

      TrainingSettings second = settings;
      second.stages_before = 1;
      second.identity = "goes on from the first";
      const Stages part = tasks_in_turn({split_parts(101, 2, 7)[1]});
      const auto make = [&] { return std::make_unique<Training>(second, part, digits(101)); };
      const auto run = make(), resumed = make();
      run->trainer.start_from(load_safetensors(path_), steps);
      size_t next = 0;
      if (exact_variances && kind.kind != "ft")
        for (const TensorSpec& t : run->trainer.posterior().store().layout().tensors()) {
          run->set_tensor("variance", t.name, {&variances[next], &variances[next] + t.size});
          next += t.size;
        }
      run->trainer.begin_stage(0);
      EXPECT_EQ(run->trainer.count_steps(0), half + rest);
      expect(run->trainer.run(half)[0], want[0]);
      // Stopped and taken up, too.
      run->trainer.save(path_, "");
      EXPECT_EQ(load_safetensors(path_).metadata.at("prior"), "posterior of stage 1");
      resumed->trainer.restore(path_);
      const EpochTotals last = run->trainer.run(rest)[0];
      expect(last, want[1]);
      expect_same(resumed->trainer.run(rest)[0], last);
      EXPECT_EQ(resumed->state(), run->state());
      if (same) {
        EXPECT_EQ(run->state(), state);
        EXPECT_EQ(run->trainer.posterior().kl(), kl);
      }
      EXPECT_EQ(run->trainer.count_history(), steps + half + rest);
      // A checkpoint of it is of no other history.
      second.identity = "goes on from another";
      EXPECT_THROW(make()->trainer.restore(path_), InputError);
    }
}

// A trainer that has been somewhere else forgets it all when it restores.
TEST_F(Checkpoint, RestoringUndoesWhatCameAfter) {
  BATON_NEEDS_DEVICE();
  for (const TestedKind& kind : all_kinds()) {
    if (kind.kind == "cfg") continue;  // the network with heads has no convolution
    SCOPED_TRACE(kind.name);
    Training run(plain_settings(kind, {3}), stages_by_head(60), digits_for_heads(60), two_heads());
    run.trainer.begin_stage(0);
    run.trainer.run(2);
    run.trainer.save(path_, "");
    const auto next = run.trainer.run(2);
    const auto after = run.state();
    run.stage(1);
    EXPECT_EQ(run.trainer.restore(path_), "");
    EXPECT_EQ(run.trainer.stage(), 0);
    EXPECT_EQ(run.trainer.stage_step(), 2);
    expect_same(run.trainer.run(2), next);
    EXPECT_EQ(run.state(), after);
  }
}

// A trainer that has diverged can be taken back to a checkpoint from before.
TEST_F(TaskCheckpoint, RestoringAfterADivergence) {
  BATON_NEEDS_DEVICE();
  TestedKind kind = bgd;
  kind.settings = {{"draws", 2}, {"sigma", 0.04}, {"warn_ratio", 1.0001}, {"halt_ratio", 1.6}};
  Training run(plain_settings(kind, {3}, 20), whole_set(100), digits(100), small_mlp(8));
  run.trainer.begin_stage(0);
  run.trainer.run(1);
  run.trainer.save(path_, "");
  const auto next = run.trainer.run(1);
  const auto after = run.state();
  EXPECT_NE(run.trainer.take_warning(), "");
  std::vector<float> sd = run.tensor("std", "fc2.bias");
  sd[3] = 1;
  run.set_tensor("std", "fc2.bias", sd);
  EXPECT_NE(run_error(run, 1), "");
  run.trainer.restore(path_);
  expect_same(run.trainer.run(1), next);
  EXPECT_EQ(run.state(), after);
}

// ----------------------------------------------------------------------------------------------------------- the file
TEST_F(Checkpoint, NamesAndShapesArePyTorchs) {
  BATON_NEEDS_DEVICE();
  Training run(varied_settings(ffg, {7}, 4), 8, 1, network_factory(network_spec("lenet5")));
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
  EXPECT_EQ(file.tensors.size(), shapes.size() * 9 + 4);  // and step_state, totals, accumulated_kl, notes
  EXPECT_EQ(file.at("accumulated_kl").as<double>().size(), shapes.size());
  EXPECT_EQ(file.at("notes").size(), 0);
  EXPECT_TRUE(exact(file.at("conv2.weight.log_std").as<float>(), run.tensor("log_std", "conv2.weight")));
  EXPECT_EQ(file.metadata.at("architecture"), "lenet5");
  EXPECT_EQ(file.metadata.at("kind"), "ffg");
  EXPECT_EQ(file.metadata.at("format"), "baton-training-3");
  EXPECT_EQ(file.metadata.at("stage"), "0");
  EXPECT_EQ(file.metadata.at("stage_step"), "1");
  EXPECT_EQ(file.metadata.at("step"), "1");
  EXPECT_EQ(file.metadata.at("extra"), "more");
  EXPECT_EQ(file.metadata.at("prior"), "the first prior");
  const json identity = json::parse(file.metadata.at("training"));
  EXPECT_EQ(identity["replicas"][0][0], 7);
  EXPECT_EQ(identity["batch"], 4);
}

TEST_F(TaskCheckpoint, NamesShapesAndSchedule) {
  BATON_NEEDS_DEVICE();
  const json schedule{{"schedule", "steps"}, {"decay", 0.5}, {"decay_epochs", 0.4}, {"draws", 2}};
  for (const auto& [kind, step_size, kl_weight] : {std::tuple("bgd", "eta", 0.f), {"bbb", "lr", 10 / 50.f}}) {
    SCOPED_TRACE(kind);
    TrainingSettings settings = plain_settings({kind, kind, schedule}, {3}, 10);
    settings.replicas[0].settings[step_size] = 0.01;
    settings.epochs = 2;
    settings.identity = "this run";
    Training run(settings, permuted_tasks(2, 50), digits(50), small_mlp(6));
    run.stage(0);
    run.trainer.begin_stage(1);
    // Five steps an epoch, so every two steps the step size is halved; a task begins with it anew.
    for (int step = 1; step <= 7; step++) {
      run.trainer.run(1);
      run.trainer.save(path_, "more");
      const std::vector<uint8_t> raw = load_safetensors(path_).at("step_state").as<uint8_t>();
      StepState s;
      ASSERT_EQ(raw.size(), sizeof s);
      std::memcpy(static_cast<void*>(&s), raw.data(), sizeof s);
      EXPECT_EQ(s.lr_mean, 0.01f * std::pow(0.5f, float((step - 1) / 2))) << step;
      EXPECT_EQ(s.stage, 1);
      EXPECT_EQ(s.stage_step, step);
      EXPECT_EQ(s.stage_steps, 10);
      EXPECT_EQ(s.step, uint32_t(10 + step));
      EXPECT_EQ(s.part_offset, 50);
      EXPECT_EQ(s.part_size, 50);
      EXPECT_EQ(s.kl_now, kl_weight);
      EXPECT_EQ(s.halted, 0);
    }
    const TensorFile file = load_safetensors(path_);
    const std::map<std::string, std::vector<int64_t>> shapes{
        {"fc1.weight", {6, 784}}, {"fc1.bias", {6}}, {"fc2.weight", {10, 6}}, {"fc2.bias", {10}}};
    for (const auto& [name, shape] : shapes)
      for (const char* array : {"mean", "std"}) {
        EXPECT_EQ(file.at(name + "." + array).shape, shape);
        EXPECT_TRUE(exact(file.at(name + "." + array).as<float>(), run.tensor(array, name)));
      }
    // And the step's state, the totals, no KL, and what bgd's trip-wire noted.
    EXPECT_EQ(file.tensors.size(), shapes.size() * run.trainer.posterior().state().size() + 4);
    EXPECT_EQ(file.at("accumulated_kl").size(), 0);
    EXPECT_EQ(file.at("notes").size() > 0, kind == std::string("bgd"));
    std::map<std::string, std::string> metadata = file.metadata;
    EXPECT_EQ(json::parse(metadata["training"])["identity"], "this run");
    metadata.erase("training");
    const std::map<std::string, std::string> want{{"format", "baton-training-3"},
                                                  {"architecture", "mlp-784-6-10"},
                                                  {"kind", kind},
                                                  {"prior", "posterior of stage 1"},
                                                  {"stage", "1"},
                                                  {"stage_step", "7"},
                                                  {"step", "17"},
                                                  {"extra", "more"}};
    EXPECT_EQ(metadata, want);
  }
}

TEST_F(Checkpoint, PointPosteriorsAndReplicas) {
  BATON_NEEDS_DEVICE();
  Training run(varied_settings(stage_kinds[0], {7, 8}, 4), 8, 1);
  run.trainer.begin_stage(0);
  run.trainer.run(1);
  run.trainer.save(path_, "");
  const TensorFile file = load_safetensors(path_);
  EXPECT_EQ(file.metadata.at("kind"), "ft");
  EXPECT_EQ(file.tensors.size(), 2u * 6 * 3 + 4);
  for (const char* replica : {"replica0/", "replica1/"}) {
    EXPECT_EQ(file.at(std::string(replica) + "conv1.weight.mean").shape, (std::vector<int64_t>{3, 1, 5, 5}));
    EXPECT_FALSE(file.has(std::string(replica) + "conv1.weight.log_std"));
  }
}

// --------------------------------------------------------------------------------------------------- what is refused
TEST_F(Checkpoint, RefusesOtherRuns) {
  BATON_NEEDS_DEVICE();
  const TrainingSettings settings = varied_settings(ffg, {7});
  Training run(settings, 64);
  run.trainer.begin_stage(0);
  run.trainer.run(2);
  run.trainer.save(path_, "");
  const auto refuses_training = [&](const char* what, Training&& fresh) {
    const auto before = fresh.state();
    EXPECT_THROW(fresh.trainer.restore(path_), InputError) << what;
    EXPECT_EQ(fresh.state(), before) << what;
    EXPECT_EQ(fresh.trainer.stage(), -1) << what;
  };
  using T = TrainingSettings&;
  const auto refuses = [&](const char* what, auto change) {
    TrainingSettings other = settings;
    change(other);
    refuses_training(what, Training(other, 64));
  };
  refuses("seed", [](T s) { s.replicas[0].seed = 8; });
  refuses("kind", [](T s) { s = varied_settings(stage_kinds[0], {7}); });
  refuses("scale rule", [](T s) { s.replicas[0].settings["scale_rule"] = "natural"; });
  refuses("batch", [](T s) { s.batch = 4; });
  refuses("epochs", [](T s) { s.epochs = 2; });
  refuses("replicas", [](T s) { s.replicas.push_back(s.replicas[0]); });
  refuses("learning rate", [](T s) { s.replicas[0].settings["lr"] = 0.5; });
  refuses("schedule", [](T s) { s.replicas[0].settings["schedule"] = "constant"; });
  refuses("prior", [](T s) { s.replicas[0].settings["prior_sd"] = 3; });
  refuses("masks", [](T s) { s.masked = true; });
  refuses("a pretrained network", [](T s) { s.replicas[0].pretrained = pretrained_small(false); });
  refuses("identity", [](T s) { s.identity = "b"; });
  refuses_training("parts", Training(settings, 64, 4));
  refuses_training("augmentation", Training(settings, split_into_parts(64, 2, {7}, true), digits(64)));
  refuses_training("size", Training(settings, 66));
  refuses_training("network", Training(settings, 64, 2, network_factory(network_spec("lenet5"))));
  {
    const WithPrecision tf32(run.memory.device(), Precision::tf32);
    refuses_training("precision", Training(settings, 64));
  }
  Training same(settings, 64);
  EXPECT_NO_THROW(same.trainer.restore(path_));
}

// Under tf32 too, a resumed run is the uninterrupted one; and it is another run than under fp32.
TEST_F(Checkpoint, ATrainingUnderTf32GoesOn) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  for (const TestedKind& kind : {ffg, bgd}) {
    SCOPED_TRACE(kind.name);
    const TrainingSettings settings = varied_settings(kind, {7});
    Training fp32(settings, 100, 3);
    const auto losses = fp32.train();
    const WithPrecision tf32(memory.device(), Precision::tf32);
    Training rounded(settings, 100, 3);
    const auto rounded_losses = rounded.train();
    ASSERT_EQ(rounded_losses.size(), losses.size());
    for (size_t i = 0; i < losses.size(); i++) EXPECT_NEAR(rounded_losses[i].loss, losses[i].loss, 0.05);
    EXPECT_NE(rounded.states(), fp32.states());
    expect_resumed([&] { return std::make_unique<Training>(settings, 100, 3); });
  }
}

// What the draws and the flows are is part of a run too.
TEST_F(Checkpoint, RefusesOtherFamilies) {
  BATON_NEEDS_DEVICE();
  for (const char* kind : {"cfg", "mnf", "bgd"}) {
    const json settings = known_settings(kind, {{"groups", 2}, {"flow_hidden", 6}, {"draws", 2}});
    Training run(varied_settings({kind, kind, settings}, {7}), 64);
    run.trainer.begin_stage(0);
    run.trainer.run(1);
    run.trainer.save(path_, "");
    const auto refuses = [&](const char* what, const std::string& other_kind, const json& change) {
      json other = settings;
      other.update(change);
      Training fresh(varied_settings({what, other_kind, known_settings(other_kind, other)}, {7}), 64);
      EXPECT_THROW(fresh.trainer.restore(path_), InputError) << kind << ": " << what;
    };
    refuses("kind", "ffg", json::object());
    refuses("a point estimate from a posterior", "sgd", json::object());
    if (kind == std::string("bgd")) {
      refuses("draws", kind, {{"draws", 4}});
      continue;
    }
    refuses("groups", kind, {{"groups", 1}});
    if (kind == std::string("cfg")) continue;
    refuses("flow", kind, {{"flow", "affine"}});
    refuses("steps", kind, {{"flow_steps", 1}});
    refuses("hidden units", kind, {{"flow_hidden", 7}});
    refuses("z", kind, {{"z", "per-filter"}});
    refuses("base", kind, {{"fixed_base", true}});
    refuses("path gradient", kind, {{"path_gradient", true}});
    refuses("base width", kind, {{"z_log_std", -3}});
  }
}

// A damaged file leaves a trainer that is somewhere in a run of its own as it is.
TEST_F(Checkpoint, RefusesDamagedFiles) {
  BATON_NEEDS_DEVICE();
  for (const auto& [kind, deviations] : {std::pair(ffg, "fc2.bias.log_std"), {bgd, "fc2.bias.std"}}) {
    SCOPED_TRACE(kind.name);
    const TrainingSettings settings = varied_settings(kind, {7});
    Training run(settings, 64), fresh(settings, 64), witness(settings, 64);
    EXPECT_THROW(fresh.trainer.restore(path_), InputError) << "no file";
    run.stage(0);
    run.trainer.begin_stage(1);
    run.trainer.run(2);
    run.trainer.save(path_, "extra");
    const TensorFile good = load_safetensors(path_);
    for (Training* t : {&fresh, &witness}) {
      t->trainer.begin_stage(0);
      t->trainer.run(3);
    }
    const auto unchanged = [&](const char* what) {
      EXPECT_EQ(fresh.state(), witness.state()) << what;
      EXPECT_EQ(fresh.trainer.stage(), 0) << what;
      EXPECT_EQ(fresh.trainer.stage_step(), 3) << what;
      EXPECT_EQ(fresh.trainer.step(), 3) << what;
    };
    const auto refuses = [&](const char* what, auto change) {
      TensorFile file = good;
      change(file);
      save_safetensors(path_, file);
      EXPECT_THROW(fresh.trainer.restore(path_), InputError) << what;
      unchanged(what);
    };
    using F = TensorFile&;
    const auto bytes = [](int count) { return Tensor::of<uint8_t>(std::vector<uint8_t>(count), {count}); };
    refuses("no metadata", [](F f) { f.metadata.clear(); });
    for (const char* format : {"baton-training-2", "baton-tasks-2"})
      refuses(format, [&](F f) { f.metadata["format"] = format; });
    for (const char* key : {"format", "training", "stage", "stage_step", "step", "extra"})
      refuses(key, [&](F f) { f.metadata.erase(key); });
    for (const char* text : {"2", "-1", "", "x", "1x", "99999999999999999999", "0.5"})
      refuses(text, [&](F f) { f.metadata["stage"] = text; });
    refuses("stage_step", [](F f) { f.metadata["stage_step"] = "6"; });
    refuses("step", [](F f) { f.metadata["step"] = "-3"; });
    for (const char* tensor : {"conv1.weight.mean", deviations, "step_state", "totals", "accumulated_kl", "notes"})
      refuses(tensor, [&](F f) { f.tensors.erase(tensor); });
    for (const char* tensor : {"fc2.bias.mean", deviations})
      refuses("a tensor is too short", [&](F f) { f.tensors[tensor] = Tensor::of<float>(std::vector<float>(9), {9}); });
    refuses("a tensor of another type",
            [&](F f) { f.tensors[deviations] = Tensor::of<int32_t>(std::vector<int32_t>(10), {10}); });
    for (int count : {5, 8}) refuses("a short step state", [&](F f) { f.tensors["step_state"] = bytes(count); });
    for (int count : {0, 5}) refuses("short totals", [&](F f) { f.tensors["totals"] = bytes(count); });
    refuses("notes of another kind", [&](F f) { f.tensors["notes"] = bytes(3); });
    refuses("the KL of another network",
            [](F f) { f.tensors["accumulated_kl"] = Tensor::of<double>(std::vector<double>(5), {5}); });
    save_safetensors(path_, good);
    const auto size = fs::file_size(path_);
    for (uintmax_t left : {size - 1, size / 2, uintmax_t(9), uintmax_t(0)}) {
      fs::resize_file(path_, left);
      EXPECT_THROW(fresh.trainer.restore(path_), InputError) << left;
      unchanged("cut short");
    }
    expect_same(fresh.trainer.run(2), witness.trainer.run(2));
    EXPECT_EQ(fresh.state(), witness.state());
    save_safetensors(path_, good);
    EXPECT_EQ(fresh.trainer.restore(path_), "extra");
    EXPECT_EQ(fresh.state(), run.state());
    fs::remove(path_);
  }
}

}  // namespace
}  // namespace baton::test
