// Whole experiments of few images, and how a test kills or signals one: what experiment_test.cpp runs its cases in.
#pragma once
#include "trainers/experiment.h"

#include <unistd.h>

#include <csignal>
#include <fstream>
#include <numeric>

#include "engine/io/stop.h"
#include "engine/io/synthetic.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"
#include "trainers/metrics.h"
#include "trainers/model_update.h"
#include "trainers/predictor.h"

namespace baton::test {
namespace {

namespace fs = std::filesystem;

constexpr int train_images = 60, test_images = 40;

ExperimentData experiment_digits(int train = train_images, int test = test_images) {
  ExperimentData data;
  data.set.name = "mnist";
  data.set.source = "generated for a test";
  data.set.generated = true;
  data.set.train = generate_digits(train, 1);
  data.test = {generate_digits(test, 2)};
  return data;
}
// Tasks of all images, each but the first with an order of the pixels of its own.
Stages permuted(int tasks) {
  std::vector<int32_t> all(train_images);
  std::iota(all.begin(), all.end(), 0);
  Stages stages = tasks_in_turn(std::vector(size_t(tasks), all));
  stages.pixel_order = permute_pixels(tasks, 784, 5);
  return stages;
}
// Three such tasks, two epochs of six steps each.
ExperimentRun task_run(const std::string& method, uint64_t seed, const json& settings) {
  ExperimentRun r;
  r.method = method, r.label = method + " 8";
  r.network = network_spec("mlp", 10, {{"hidden", {8}}});
  r.stages = permuted(3);
  r.training.kind = method;
  r.training.batch = 10, r.training.epochs = 2;
  r.training.replicas = {{seed, settings}};
  r.samples = r.stage_samples = 5;
  r.inference = Inference::sampled;
  return r;
}
ExperimentRun bgd_run(uint64_t seed = 0, double warn_ratio = 10) {
  return task_run("bgd", seed, {{"draws", 4}, {"draws_at_once", 2}, {"sigma", 0.04}, {"warn_ratio", warn_ratio}});
}
const json ewc_settings{{"lr", 1e-3}, {"strength", 1}, {"fisher_examples", 20}};
std::vector<ExperimentRun> task_runs(double warn_ratio = 10) {
  std::vector<ExperimentRun> runs{bgd_run(0, warn_ratio),
                                  task_run("si", 0, {{"lr", 1e-3}, {"strength", 0.5}, {"restart_optimizer", true}}),
                                  task_run("ewc", 3, ewc_settings)};
  runs[0].histogram = true;
  runs[0].pruned = {0.5};
  return runs;
}
// A table: each method with each number of parts, for two seeds.
std::vector<ExperimentRun> part_runs(const std::vector<int>& parts = {2},
                                     const std::vector<std::string>& methods = {"ft", "ffg"}) {
  std::vector<ExperimentRun> runs;
  for (const std::string& method : methods)
    for (int t : parts)
      for (uint64_t seed : {0, 5}) {
        ExperimentRun r;
        r.method = r.label = method;
        r.network = network_spec("mlp", 10, {{"hidden", {16}}});
        r.stages = split_into_parts(72, t, {seed});
        r.training.kind = method;
        r.training.batch = 10;  // 4 of 3.6 steps an epoch of two parts
        r.training.epochs = 2.5;
        r.training.replicas = {{seed}};
        r.samples = r.stage_samples = 3;
        runs.push_back(r);
      }
  return runs;
}

struct Kill {};  // what kills an experiment here

// Something happens when the program asks for the n-th time (from 0) whether to stop: before each step but the first of
// a graph, before each draw and batch of a prediction and each batch of a Fisher information, and between two runs. (So
// does what generates images, before an experiment.)
class AtQuestion {
 public:
  AtQuestion() {
    look_when_asked([this] {
      if (left_-- != 0) return;
      if (!signal_) throw Kill();
      pretend_signal(signal_);
    });
  }
  ~AtQuestion() {
    look_when_asked(nullptr);
    pretend_signal(0);
  }
  AtQuestion(const AtQuestion&) = delete;
  AtQuestion& operator=(const AtQuestion&) = delete;
  void signal(int number, int question) {
    pretend_signal(0);
    signal_ = number, left_ = question;
  }
  void kill(int question) { signal(0, question); }
  void nothing() { kill(many); }
  int asked_since_nothing() const { return many - left_; }

 private:
  static constexpr int many = 1 << 30;
  int signal_ = 0, left_ = many;
};

class Experiment : public testing::Test {
 protected:
  Experiment() { fs::remove_all(folder_); }
  ~Experiment() override { fs::remove_all(folder_); }
  ExperimentOptions options(const std::string& name, bool resume = false) const {
    ExperimentOptions o;
    o.experiment = "test", o.preset = "tiny";
    o.out = folder_ / name;
    o.resume = resume;
    o.at_once = at_once_;
    o.extra["note"] = 7;
    return o;
  }
  ExperimentOptions saving(const std::string& name) const {  // a checkpoint at every epoch
    ExperimentOptions o = options(name);
    o.checkpoint_seconds = 0;
    return o;
  }
  json lines(const std::string& name) const {
    json all = json::array();
    std::ifstream in(folder_ / name / "log.jsonl");
    for (std::string line; std::getline(in, line);) all.push_back(json::parse(line));
    return all;
  }
  json result(const std::string& name) const {
    std::ifstream in(folder_ / name / "result.json");
    return json::parse(in);
  }
  fs::path checkpoint(const std::string& name) const { return folder_ / name / "checkpoint" / "run.safetensors"; }
  // Without what the clock says.
  static json timeless(json j) {
    if (j.is_object()) {
      for (const char* key : {"seconds", "test_seconds", "examples_per_second", "peak_device_bytes", "time"})
        j.erase(key);
      for (auto& [key, value] : j.items()) value = timeless(value);
    } else if (j.is_array()) {
      for (auto& value : j) value = timeless(value);
    }
    return j;
  }
  // What the experiment "whole" left: the folder `name` has the same.
  void expect_whole(const std::string& name) const {
    EXPECT_EQ(timeless(result(name)), timeless(result("whole")));
    EXPECT_EQ(timeless(lines(name)), timeless(lines("whole")));
    EXPECT_FALSE(fs::exists(folder_ / name / "checkpoint"));
  }
  // Stopped by a signal at every `stride`-th question, and again and again on the way to one end: after `least` to
  // least + spread - 1 questions.
  void expect_signals_leave_no_trace(const ExperimentData& data, const std::vector<ExperimentRun>& runs, int number,
                                     int stride, int least, int spread) {
    AtQuestion at;
    run_experiment(options("whole"), data, runs);
    const int questions = at.asked_since_nothing();
    const char* const name_of_signal = number == SIGINT ? "SIGINT" : "SIGTERM";
    for (int question = 0; question < questions; question += stride) {
      SCOPED_TRACE(testing::Message() << "signal at question " << question << " of " << questions);
      const std::string name = "stopped" + std::to_string(question);
      at.signal(number, question);
      try {
        run_experiment(options(name), data, runs);
        ADD_FAILURE() << "not stopped";
      } catch (const Stopped& e) {
        EXPECT_EQ(e.exit_code(), 128 + number);
        EXPECT_EQ(e.what(), std::string("stopped by ") + name_of_signal +
                                ": the checkpoint is written; --resume goes on from it");
        EXPECT_TRUE(fs::exists(folder_ / name / "checkpoint"));
        at.nothing();
        run_experiment(options(name, true), data, runs);
      }
      expect_whole(name);
      if (HasFailure()) break;
      fs::remove_all(folder_ / name);
    }
    int stops = 0;
    for (bool resume = false;; resume = true) {
      at.signal(number, least + 7 * stops % spread);
      try {
        run_experiment(options("often", resume), data, runs);
        break;
      } catch (const Stopped&) {
        ASSERT_LT(++stops, 100);
      }
    }
    EXPECT_GT(stops, 3);
    expect_whole("often");
  }
  int at_once_ = 2;
  fs::path folder_ = fs::temp_directory_path() / ("baton_experiment_" + std::to_string(::getpid()));
};
class TaskExperiment : public Experiment {};

}  // namespace
}  // namespace baton::test
