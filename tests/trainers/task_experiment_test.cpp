#include "trainers/task_experiment.h"

#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <fstream>
#include <numeric>

#include "engine/io/stop.h"
#include "engine/io/synthetic.h"
#include "layers/mlp.h"
#include "tests/support/device.h"
#include "tests/support/npz.h"

namespace baton::test {
namespace {

namespace fs = std::filesystem;

// ------------------------------------------------------------------------------------------------------- the measures
TEST(TaskMeasures, NamesOfInference) {
  for (const auto& [i, name] : {std::pair(Inference::map, "map"),
                                {Inference::sampled, "sampled"},
                                {Inference::softmax, "softmax"},
                                {Inference::committee, "committee"}}) {
    EXPECT_STREQ(name_of(i), name);
    EXPECT_EQ(inference_of(name), i);
  }
  EXPECT_THROW(inference_of("mean"), InputError);
  EXPECT_THROW(inference_of(""), InputError);
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

// ----------------------------------------------------------------------------------------------------- the experiment
struct Stop {};  // what kills an experiment here

NetworkFactory mlp(int* stop_after = nullptr) {
  return [=]() -> std::unique_ptr<Network> {
    if (stop_after && (*stop_after)-- == 0) throw Stop();
    return std::make_unique<Mlp>(784, std::vector<int>{8}, 10);
  };
}
BgdSettings bgd_settings(double warn_ratio) {
  BgdSettings s;
  s.draws = 4, s.at_once = 2, s.sigma = 0.04, s.warn_ratio = warn_ratio;
  return s;
}
LearnerFactory bgd(double warn_ratio = 10) {
  return [=](Device& device, Arena& arena, const ParameterLayout& layout) {
    return std::make_unique<BgdLearner>(device, arena, layout, bgd_settings(warn_ratio));
  };
}
LearnerFactory bbb() {
  BbbSetup s;
  s.rule.draws = 2, s.sigma = 0.03;
  return [=](Device& device, Arena& arena, const ParameterLayout& layout) {
    return std::make_unique<BbbLearner>(device, arena, layout, s);
  };
}
LearnerFactory point(PointRule rule, Anchor anchor, float strength) {
  PointSetup s;
  s.rule.rule = rule, s.rule.strength = strength;
  s.anchor = anchor;
  return [=](Device& device, Arena& arena, const ParameterLayout& layout) {
    return std::make_unique<PointLearner>(device, arena, layout, s);
  };
}

constexpr int train_images = 60, test_images = 40;

TaskData digits() {
  TaskData data;
  data.set.name = "mnist";
  data.set.source = "generated for a test";
  data.set.generated = true;
  data.set.train = generate_digits(train_images, 1);
  data.test = {generate_digits(test_images, 2)};
  return data;
}
TaskSequence permuted(int tasks) {
  TaskSequence s;
  s.examples.resize(tasks, std::vector<int32_t>(train_images));
  for (auto& examples : s.examples) std::iota(examples.begin(), examples.end(), 0);
  s.pixel_order = permuted_pixels(tasks, 784, 5);
  return s;
}
TaskRun run_of(const std::string& method, uint64_t seed, const LearnerFactory& learner, double lr) {
  TaskRun r;
  r.method = method, r.label = method + " 8", r.seed = seed;
  r.settings["lr"] = lr;
  r.sequence = permuted(3);
  r.plan.batch = 10, r.plan.epochs = 2, r.plan.seed = seed, r.plan.lr = lr;
  r.network = mlp();
  r.learner = learner;
  r.samples = 5;
  r.fisher_examples = 20;
  return r;
}

class TaskExperiment : public testing::Test {
 protected:
  TaskExperiment() { fs::remove_all(folder_); }
  ~TaskExperiment() override { fs::remove_all(folder_); }
  TaskExperimentOptions options(const std::string& name, bool resume = false) {
    TaskExperimentOptions o;
    o.experiment = "test", o.preset = "tiny";
    o.out = folder_ / name;
    o.resume = resume;
    o.extra["note"] = 7;
    return o;
  }
  static std::vector<json> lines(const TaskExperimentOptions& o) {
    std::vector<json> all;
    std::ifstream in(o.out / "log.jsonl");
    for (std::string line; std::getline(in, line);) all.push_back(json::parse(line));
    return all;
  }
  static json result(const TaskExperimentOptions& o) {
    std::ifstream in(o.out / "result.json");
    return json::parse(in);
  }
  // Without what differs from run to run.
  static json timeless(json j) {
    if (j.is_object()) {
      for (const char* key :
           {"seconds", "test_seconds", "examples_per_second", "peak_device_bytes", "time", "train_seconds"})
        j.erase(key);
      for (auto& [key, value] : j.items()) value = timeless(value);
    } else if (j.is_array()) {
      for (auto& value : j) value = timeless(value);
    }
    return j;
  }
  static std::vector<json> timeless(std::vector<json> all) {
    for (json& j : all) j = timeless(j);
    return all;
  }
  fs::path folder_ = fs::temp_directory_path() / ("baton_task_experiment_" + std::to_string(::getpid()));
};

TEST_F(TaskExperiment, ResultAndFiles) {
  BATON_NEEDS_DEVICE();
  const TaskData data = digits();
  std::vector<TaskRun> runs{run_of("bgd", 0, bgd(), 1),
                            run_of("bgd", 1, bgd(), 1),
                            run_of("sgd", 0, point(PointRule::sgd, Anchor::none, 0), 0.05),
                            run_of("ewc", 0, point(PointRule::sgd, Anchor::fisher, 0.5f), 0.05),
                            run_of("si", 0, point(PointRule::adam, Anchor::path, 0.5f), 1e-3),
                            run_of("bbb", 0, bbb(), 1e-3)};
  runs[0].histogram = true;
  runs[1].inference = Inference::committee;
  const TaskExperimentOptions o = options("a");
  const json r = run_task_experiment(o, data, runs);
  EXPECT_EQ(r, result(o));
  EXPECT_FALSE(fs::exists(o.out / "checkpoint"));
  EXPECT_EQ(r["experiment"], "test");
  EXPECT_EQ(r["preset"], "tiny");
  EXPECT_EQ(r["dataset"]["train"], train_images);
  EXPECT_EQ(r["dataset"]["test"], test_images);
  EXPECT_EQ(r["dataset"]["generated"], true);
  EXPECT_EQ(r["settings"]["note"], 7);
  EXPECT_GT(size_t(r["peak_device_bytes"]), 0u);
  ASSERT_EQ(r["runs"].size(), runs.size());
  const size_t parameters = 784 * 8 + 8 + 8 * 10 + 10;
  for (size_t i = 0; i < runs.size(); i++) {
    const json& one = r["runs"][i];
    SCOPED_TRACE(one["label"].get<std::string>());
    EXPECT_EQ(one["method"], runs[i].method);
    EXPECT_EQ(one["label"], runs[i].label);
    EXPECT_EQ(one["seed"], runs[i].seed);
    EXPECT_EQ(one["settings"], runs[i].settings);
    EXPECT_EQ(one["parts"], 3);
    EXPECT_EQ(one["parameters"], parameters);
    EXPECT_EQ(one["inference"], name_of(runs[i].inference));
    ASSERT_EQ(one["stages"].size(), 3u);
    for (int s = 0; s < 3; s++) {
      const json& stage = one["stages"][s];
      EXPECT_EQ(stage["stage"], s + 1);
      EXPECT_EQ(stage["epoch"], 2);
      EXPECT_EQ(stage["train_examples"], train_images);
      ASSERT_EQ(stage["by_task"].size(), size_t(s + 1));
      double mean = 0;
      for (const json& accuracy : stage["by_task"]) {
        EXPECT_TRUE(double(accuracy) >= 0 && double(accuracy) <= 1);
        mean += double(accuracy) / (s + 1);
      }
      EXPECT_NEAR(stage["test_accuracy"], mean, 1e-12);
      EXPECT_NEAR(stage["by_inference"][name_of(runs[i].inference)], mean, 1e-12);
      // Before the last stage only the ways that the run's own inference takes.
      if (s == 2) {
        EXPECT_EQ(stage["by_inference"].size(), 4u);
      }
      EXPECT_TRUE(double(stage["test_nll"]) > 0 && double(stage["test_nll"]) < 30);
      EXPECT_TRUE(double(stage["test_ece"]) >= 0 && double(stage["test_ece"]) <= 1);
      EXPECT_GT(double(stage["seconds"]), 0);
      EXPECT_EQ(stage.contains("sigma_largest"), runs[i].method == "bgd");
    }
    EXPECT_EQ(one["final_test_accuracy"], one["stages"][2]["test_accuracy"]);
    EXPECT_EQ(one.contains("sigma"), runs[i].method == "bgd");
    EXPECT_FALSE(one.contains("pruning"));
    EXPECT_FALSE(one.contains("warnings"));
    if (runs[i].method != "bgd" && runs[i].method != "bbb") {  // one network: it is all one
      for (const json& accuracy : one["stages"][2]["by_inference"]) EXPECT_EQ(accuracy, one["final_test_accuracy"]);
    }
  }
  const json& sigma = r["runs"][0]["sigma"];
  EXPECT_EQ(sigma["initial"], 0.04);
  EXPECT_LE(double(sigma["smallest"]), double(sigma["median"]) * 1.1);
  EXPECT_LE(double(sigma["median"]), double(sigma["largest"]) * 1.1);
  ASSERT_EQ(sigma["edges"].size(), sigma["counts"].size() + 1);
  size_t count = 0;
  for (const json& c : sigma["counts"]) count += size_t(c);
  EXPECT_EQ(count, parameters);
  EXPECT_GT(size_t(sigma["counts"].front()), 0u);
  EXPECT_GT(size_t(sigma["counts"].back()), 0u);
  EXPECT_LE(double(sigma["edges"].front()), double(sigma["smallest"]));
  EXPECT_GT(double(sigma["edges"].back()), double(sigma["largest"]));
  EXPECT_FALSE(r["runs"][1]["sigma"].contains("counts"));

  const std::vector<json> log = lines(o);
  ASSERT_EQ(log.size(), runs.size() * 3 * 2);  // a line an epoch
  for (size_t i = 0; i < log.size(); i++) {
    EXPECT_EQ(log[i]["run"], i / 6);
    EXPECT_EQ(log[i]["stage"], i % 6 / 2 + 1);
    EXPECT_EQ(log[i]["epoch"], i % 2 + 1);
    EXPECT_EQ(log[i]["step"], (i % 6 + 1) * 6);
    EXPECT_TRUE(double(log[i]["train_loss"]) > 0);
  }
  const std::string table = task_table_of(r);
  for (const char* label : {"bgd 8", "sgd 8", "ewc 8", "si 8", "bbb 8"})
    EXPECT_NE(table.find(label), std::string::npos) << table;
}

// The figures of a stage by every way of inference are what their names say, whichever way the run asks for.
TEST_F(TaskExperiment, EveryStageByEveryInference) {
  BATON_NEEDS_DEVICE();
  std::vector<json> by;
  for (Inference inference : {Inference::map, Inference::sampled, Inference::softmax, Inference::committee}) {
    std::vector<TaskRun> runs{run_of("bgd", 0, bgd(), 1)};
    runs[0].inference = inference;
    by.push_back(run_task_experiment(options(name_of(inference)), digits(), runs)["runs"][0]["stages"]);
  }
  for (int stage = 0; stage < 3; stage++)
    for (const json& stages : by)
      for (size_t i = 0; i < by.size(); i++) {
        const char* name = name_of(Inference(i));
        if (!stages[stage]["by_inference"].contains(name)) continue;  // it need not be there
        EXPECT_EQ(stages[stage]["by_inference"][name], by[i][stage]["test_accuracy"])
            << "stage " << stage + 1 << ", " << name;
      }
}

TEST_F(TaskExperiment, JudgementsWithinAStage) {
  BATON_NEEDS_DEVICE();
  std::vector<TaskRun> runs{run_of("bgd", 0, bgd(), 1), run_of("bgd", 1, bgd(), 1)};
  runs[0].sequence = permuted(1);
  runs[0].plan.epochs = 4;
  runs[0].judge_every = 1;
  runs[1].sequence = permuted(3);
  runs[1].sequence.examples.resize(1);
  runs[1].sequence.probabilities = continuous_schedule(3, 12, 4);
  runs[1].checks = 4;
  const json r = run_task_experiment(options("a"), digits(), runs);
  ASSERT_EQ(r["runs"][0]["stages"].size(), 4u);
  for (int i = 0; i < 4; i++) {
    EXPECT_EQ(r["runs"][0]["stages"][i]["epoch"], i + 1);
    EXPECT_EQ(r["runs"][0]["stages"][i]["by_task"].size(), 1u);
  }
  EXPECT_EQ(r["runs"][1]["parts"], 3);
  ASSERT_EQ(r["runs"][1]["stages"].size(), 4u);
  for (int i = 0; i < 4; i++) {
    EXPECT_EQ(r["runs"][1]["stages"][i]["epoch"], (i + 1) * 0.5);  // 3 of 6 steps
    EXPECT_EQ(r["runs"][1]["stages"][i]["by_task"].size(), 3u);
  }
}

TEST_F(TaskExperiment, Pruning) {
  BATON_NEEDS_DEVICE();
  std::vector<TaskRun> runs{run_of("bgd", 0, bgd(), 1), run_of("sgd", 0, point(PointRule::sgd, Anchor::none, 0), 0.05)};
  for (TaskRun& r : runs) {
    r.sequence = permuted(1);
    r.pruned = {0, 0.9, 0.333, 0, 1};
  }
  TaskExperimentOptions o = options("a");
  o.save_models = true;
  const json result = run_task_experiment(o, digits(), runs);
  const int weights = 784 * 8 + 8 * 10;
  for (const json& run : result["runs"]) {
    SCOPED_TRACE(run["label"].get<std::string>());
    const json& pruning = run["pruning"];
    const bool uncertain = run["method"] == "bgd";
    EXPECT_EQ(pruning["weights"], weights);
    EXPECT_NEAR(pruning["error"], 1 - double(run["final_test_accuracy"]), 1e-12);
    ASSERT_EQ(pruning["results"].size(), uncertain ? 10u : 5u);
    for (size_t i = 0; i < pruning["results"].size(); i++) {
      const json& one = pruning["results"][i];
      const double fraction = runs[0].pruned[i % 5];
      SCOPED_TRACE(testing::Message() << one["ranking"] << " " << fraction);
      EXPECT_EQ(one["ranking"], uncertain && i < 5 ? "signal-to-noise" : "magnitude");
      EXPECT_EQ(one["fraction"], fraction);
      const int left = weights - int(std::lround(fraction * weights));
      EXPECT_EQ(one["weights_left"], left);
      EXPECT_EQ(one["bytes_dense"], (uncertain ? 8 : 4) * weights);
      EXPECT_EQ(one["bytes_sparse"], (uncertain ? 12 : 8) * left);
      // What is left of each layer is what is left in all; after fraction 1 or .9 fraction 0 finds the network whole.
      EXPECT_NEAR(double(one["layers"]["fc1.weight"]) * 784 * 8 + double(one["layers"]["fc2.weight"]) * 80, left, 1e-6);
      if (fraction == 0) {
        EXPECT_EQ(one["error"], pruning["error"]);
        EXPECT_NEAR(one["error_ratio"], 1, 1e-12);
      }
      if (fraction == 1) {
        EXPECT_GT(double(one["error"]), 0.6);  // biases alone
      }
    }
  }
  // The pruned file holds what is left.
  const TensorFile whole = load_safetensors(o.out / "bgd_8_seed0.safetensors"),
                   pruned = load_safetensors(o.out / "bgd_8_seed0_pruned90.safetensors");
  EXPECT_EQ(whole.at("fc1.weight.mean").shape, (std::vector<int64_t>{8, 784}));
  EXPECT_TRUE(whole.has("fc1.weight.log_std"));
  int64_t left = 0;
  for (const char* name : {"fc1.weight", "fc2.weight"}) {
    const std::vector<float> all = whole.at(std::string(name) + ".mean").as<float>(),
                             kept = pruned.at(std::string(name) + ".mean").as<float>(),
                             log_std = whole.at(std::string(name) + ".log_std").as<float>(),
                             sd = pruned.at(std::string(name) + ".std").as<float>();
    const std::vector<int32_t> index = pruned.at(std::string(name) + ".index").as<int32_t>();
    ASSERT_EQ(index.size(), kept.size());
    left += int64_t(index.size());
    for (size_t i = 0; i < index.size(); i++) {
      EXPECT_EQ(kept[i], all[index[i]]);
      EXPECT_NEAR(std::log(sd[i]), log_std[index[i]], 1e-6);
    }
  }
  EXPECT_EQ(left, weights - int(std::lround(0.9 * weights)));
  EXPECT_EQ(pruned.at("fc1.bias.mean").size(), 8);
}

// ----------------------------------------------------------------------------------------------------------- resuming
std::vector<TaskRun> several(int* stop_after = nullptr, double warn_ratio = 10) {
  std::vector<TaskRun> runs{run_of("bgd", 0, bgd(warn_ratio), 1),
                            run_of("si", 0, point(PointRule::adam, Anchor::path, 0.5f), 1e-3),
                            run_of("ewc", 3, point(PointRule::sgd, Anchor::fisher, 0.5f), 0.05)};
  for (TaskRun& r : runs) r.network = mlp(stop_after);
  runs[0].histogram = true;
  runs[0].pruned = {0.5};
  runs[1].restart_optimizer = true;
  return runs;
}

// Killed when a network is made: at the start of a run, or, under EWC, for the Fisher information of a task. What is
// there then goes on to the very result.
TEST_F(TaskExperiment, AKilledExperimentGoesOn) {
  BATON_NEEDS_DEVICE();
  const TaskData data = digits();
  const TaskExperimentOptions whole = options("whole");
  const json want = timeless(run_task_experiment(whole, data, several()));
  const std::vector<json> want_log = timeless(lines(whole));
  int killed = 0;
  for (int after = 1; after < 12; after++) {
    SCOPED_TRACE(testing::Message() << "killed at network " << after);
    const std::string name = "killed" + std::to_string(after);
    TaskExperimentOptions o = options(name);
    int left = after;
    o.checkpoint_seconds = after % 2 ? 0 : 1e9;  // after every epoch, or only where a stage is judged
    try {
      run_task_experiment(o, data, several(&left));
      break;  // it makes no more networks than that
    } catch (const Stop&) {
      killed++;
    }
    EXPECT_TRUE(fs::exists(o.out / "checkpoint"));
    EXPECT_EQ(timeless(run_task_experiment(options(name, true), data, several())), want);
    EXPECT_EQ(timeless(lines(o)), want_log);
    EXPECT_FALSE(fs::exists(o.out / "checkpoint"));
  }
  EXPECT_GE(killed, 6);
}

// Kills a run in the middle of a stage: once `steps` of its training have been done, by the count that the device
// keeps.
class KilledAfter {
 public:
  explicit KilledAfter(uint32_t steps) {
    look_when_asked([this, steps] {
      if (states_ && download(*device_, states_, 1)[0].step >= steps) throw Stop();
    });
  }
  ~KilledAfter() { look_when_asked(nullptr); }
  KilledAfter(const KilledAfter&) = delete;
  KilledAfter& operator=(const KilledAfter&) = delete;
  // The learner of the run.
  LearnerFactory learner(double warn_ratio = 10) {
    return [this, warn_ratio](Device& device, Arena& arena, const ParameterLayout& layout) {
      device_ = &device;
      return std::make_unique<Watched>(device, arena, layout, bgd_settings(warn_ratio), &states_);
    };
  }

 private:
  class Watched : public BgdLearner {
   public:
    Watched(Device& device, Arena& arena, const ParameterLayout& layout, const BgdSettings& s, const StepState** states)
        : BgdLearner(device, arena, layout, s), seen_(states) {}
    ~Watched() override { *seen_ = nullptr; }
    void step(StepState* states) override {
      *seen_ = states;
      BgdLearner::step(states);
    }

   private:
    const StepState** seen_;
  };
  Device* device_ = nullptr;
  const StepState* states_ = nullptr;
};

TEST_F(TaskExperiment, ARunKilledInAStageGoesOn) {
  BATON_NEEDS_DEVICE();
  const TaskData data = digits();
  const TaskExperimentOptions whole = options("whole");
  const json want = timeless(run_task_experiment(whole, data, several()));
  for (int after : {3, 15, 20, 35}) {  // of 36 steps
    SCOPED_TRACE(testing::Message() << "killed after step " << after);
    TaskExperimentOptions o = options("killed" + std::to_string(after));
    o.checkpoint_seconds = 0;
    {
      KilledAfter killed(after);
      std::vector<TaskRun> runs = several();
      runs[0].learner = killed.learner();
      EXPECT_THROW(run_task_experiment(o, data, runs), Stop);
    }
    EXPECT_EQ(timeless(run_task_experiment(options("killed" + std::to_string(after), true), data, several())), want);
    EXPECT_EQ(timeless(lines(o)), timeless(lines(whole)));
  }
}

// ---- a signal: before a step, in a prediction (of a judgement, or after pruning), in the Fisher information of a task
class SignalAtQuestion {  // of stop_requested()
 public:
  SignalAtQuestion() {
    look_when_asked([this] {
      if (left_-- == 0) pretend_signal(SIGINT);
    });
  }
  ~SignalAtQuestion() {
    look_when_asked(nullptr);
    pretend_signal(0);
  }
  SignalAtQuestion(const SignalAtQuestion&) = delete;
  SignalAtQuestion& operator=(const SignalAtQuestion&) = delete;
  void after(int questions) {
    pretend_signal(0);
    left_ = questions;
  }
  void never() { after(1 << 30); }
  int asked_since_never() const { return (1 << 30) - left_; }

 private:
  int left_ = 1 << 30;
};

std::vector<TaskRun> signalled() {
  std::vector<TaskRun> runs = several(nullptr, 1.0001);
  for (TaskRun& r : runs) r.judge_every = 1;
  for (int r : {1, 2}) runs[r].sequence = permuted(2);
  return runs;
}

TEST_F(TaskExperiment, ASignalledExperimentGoesOn) {
  BATON_NEEDS_DEVICE();
  const TaskData data = digits();
  const TaskExperimentOptions whole = options("whole");
  SignalAtQuestion signal;
  const json want = timeless(run_task_experiment(whole, data, signalled()));
  const int questions = signal.asked_since_never();
  ASSERT_EQ(want["runs"][0]["warnings"].size(), 1u);
  // Once, at many a question.
  for (int at = 0; at < questions; at += 11) {
    SCOPED_TRACE(testing::Message() << "signal at question " << at << " of " << questions);
    const std::string name = "stopped" + std::to_string(at);
    signal.after(at);
    try {
      run_task_experiment(options(name), data, signalled());
      ADD_FAILURE() << "not stopped";
    } catch (const Stopped& e) {
      EXPECT_EQ(e.exit_code(), 130);
      EXPECT_STREQ(e.what(), "stopped by SIGINT: the checkpoint is written; --resume goes on from it");
      EXPECT_TRUE(fs::exists(folder_ / name / "checkpoint"));
      signal.never();
      run_task_experiment(options(name, true), data, signalled());
    }
    EXPECT_EQ(timeless(result(options(name))), want);
    EXPECT_EQ(timeless(lines(options(name))), timeless(lines(whole)));
    EXPECT_FALSE(fs::exists(folder_ / name / "checkpoint"));
    if (HasFailure()) break;
    fs::remove_all(folder_ / name);
  }
  // Again and again, on the way to one end.
  int stops = 0;
  for (bool resume = false;; resume = true) {
    signal.after(20 + 7 * stops % 31);
    try {
      run_task_experiment(options("often", resume), data, signalled());
      break;
    } catch (const Stopped&) {
      ASSERT_LT(++stops, 100);
    }
  }
  EXPECT_GT(stops, 3);
  EXPECT_EQ(timeless(result(options("often"))), want);
  EXPECT_EQ(timeless(lines(options("often"))), timeless(lines(whole)));
}

// A warning belongs to the run: resumed after it, the run does not warn again, and its result still tells of it.
TEST_F(TaskExperiment, AWarningIsGivenOnce) {
  BATON_NEEDS_DEVICE();
  const double ratio = 1.0001;  // passed at once
  const TaskData data = digits();
  const json want = timeless(run_task_experiment(options("whole"), data, several(nullptr, ratio)));
  ASSERT_EQ(want["runs"][0]["warnings"].size(), 1u);
  TaskExperimentOptions o = options("killed");
  o.checkpoint_seconds = 0;
  {
    KilledAfter killed(15);
    std::vector<TaskRun> runs = several(nullptr, ratio);
    runs[0].learner = killed.learner(ratio);
    EXPECT_THROW(run_task_experiment(o, data, runs), Stop);
  }
  EXPECT_EQ(
      timeless(run_task_experiment(options("killed", true), data, several(nullptr, ratio)))["runs"][0]["warnings"],
      want["runs"][0]["warnings"]);
}

TEST_F(TaskExperiment, AnotherExperimentIsRefused) {
  BATON_NEEDS_DEVICE();
  const TaskData data = digits();
  TaskExperimentOptions o = options("a");
  o.checkpoint_seconds = 0;
  std::vector<TaskRun> runs = several();
  {
    KilledAfter killed(15);
    runs[0].learner = killed.learner();
    EXPECT_THROW(run_task_experiment(o, data, runs), Stop);
  }
  const auto refuses = [&](const char* what, auto change) {
    TaskExperimentOptions other = options("a", true);
    TaskData its_data = data;
    std::vector<TaskRun> its_runs = several();
    change(other, its_data, its_runs);
    EXPECT_THROW(run_task_experiment(other, its_data, its_runs), InputError) << what;
  };
  using O = TaskExperimentOptions&;
  using D = TaskData&;
  using R = std::vector<TaskRun>&;
  refuses("name", [](O x, D, R) { x.experiment = "other"; });
  refuses("data", [](O, D d, R) { d.set.source = "another"; });
  refuses("seed", [](O, D, R r) { r[0].seed = 9; });
  refuses("settings", [](O, D, R r) { r[2].settings["lr"] = 1; });
  refuses("epochs", [](O, D, R r) { r[1].plan.epochs = 3; });
  refuses("fewer runs", [](O, D, R r) { r.pop_back(); });
  refuses("their order", [](O, D, R r) { std::swap(r[0], r[1]); });
  EXPECT_NO_THROW(run_task_experiment(options("a", true), data, several()));

  // Also between two runs, where there is no checkpoint of a run in progress.
  runs = several();
  runs[1].network = []() -> std::unique_ptr<Network> { throw Stop(); };
  EXPECT_THROW(run_task_experiment(options("a"), data, runs), Stop);
  refuses("settings", [](O, D, R r) { r[2].settings["lr"] = 1; });
  fs::remove(o.out / "checkpoint" / "run.safetensors");
  refuses("settings", [](O, D, R r) { r[2].settings["lr"] = 1; });
  EXPECT_NO_THROW(run_task_experiment(options("a", true), data, several()));

  EXPECT_THROW(run_task_experiment(options("b"), data, {}), InputError);
  TaskData none = data;
  none.test.clear();
  EXPECT_THROW(run_task_experiment(options("b"), none, several()), InputError);
  TaskData two = data;
  two.test.push_back(two.test[0]);
  EXPECT_THROW(run_task_experiment(options("b"), two, several()), InputError);
}

TEST_F(TaskExperiment, ADamagedCheckpointIsRefused) {
  BATON_NEEDS_DEVICE();
  const TaskData data = digits();
  TaskExperimentOptions o = options("a");
  o.checkpoint_seconds = 0;
  std::vector<TaskRun> runs = several();
  {
    KilledAfter killed(8);
    runs[0].learner = killed.learner();
    EXPECT_THROW(run_task_experiment(o, data, runs), Stop);
  }
  const fs::path path = o.out / "checkpoint" / "run.safetensors";
  fs::resize_file(path, fs::file_size(path) - 1);
  EXPECT_THROW(run_task_experiment(options("a", true), data, several()), InputError);
  std::ofstream(o.out / "checkpoint" / "experiment.json") << "{\"run\": 1";
  EXPECT_THROW(run_task_experiment(options("a", true), data, several()), InputError);
  std::ofstream(o.out / "checkpoint" / "experiment.json") << "[]";
  EXPECT_THROW(run_task_experiment(options("a", true), data, several()), InputError);
}

}  // namespace
}  // namespace baton::test
