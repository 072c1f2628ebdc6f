#include "trainers/experiment.h"

#include <unistd.h>

#include <csignal>
#include <fstream>

#include "engine/io/stop.h"
#include "engine/io/synthetic.h"
#include "tests/support/device.h"
#include "tests/support/small_network.h"

namespace baton::test {
namespace {

namespace fs = std::filesystem;

// ---- a signal comes when the program asks for the n-th time whether to stop: before a step, or in a prediction
int questions_left = 0;

void count_questions() {
  if (questions_left-- == 0) pretend_signal(SIGTERM);
}

class Experiment : public testing::Test {
 protected:
  Experiment() {
    fs::remove_all(folder_);
    data_.name = "mnist";
    data_.source = "generated for a test";
    data_.generated = true;
    data_.train = generate_digits(72, 1);
    data_.test = generate_digits(30, 2);
    for (const auto& [method, family] : {std::pair("ft", Family::point), {"ffg", Family::gaussian}}) {
      Job job;
      job.method = method;
      job.parts = 2;
      job.plan.posterior.family = family;
      job.plan.parts = 2;
      job.plan.batch = 10;  // 4 of 3.6 steps an epoch
      job.plan.epochs = 2.5;
      job.plan.seeds = {0, 5};
      job.plan.settings.resize(2);
      jobs_.push_back(job);
    }
    questions_left = 1 << 30;
    look_when_asked(count_questions);
  }
  ~Experiment() override {
    look_when_asked(nullptr);
    pretend_signal(0);
    fs::remove_all(folder_);
  }
  json run(const std::string& name, bool resume = false) {
    ExperimentOptions o;
    o.experiment = "test", o.preset = "tiny";
    o.out = folder_ / name;
    o.resume = resume;
    o.samples = o.stage_samples = 3;
    return run_experiment(
        o, data_, [] { return std::make_unique<SmallNetwork>(); }, jobs_);
  }
  // Without what the clock says.
  static json timeless(json j) {
    if (j.is_object()) {
      for (const char* key : {"seconds", "test_seconds", "examples_per_second", "peak_device_bytes"}) j.erase(key);
      for (auto& [key, value] : j.items()) value = timeless(value);
    } else if (j.is_array()) {
      for (auto& value : j) value = timeless(value);
    }
    return j;
  }
  json lines(const std::string& name) {
    json all = json::array();
    std::ifstream in(folder_ / name / "log.jsonl");
    for (std::string line; std::getline(in, line);) all.push_back(json::parse(line));
    return all;
  }
  Dataset data_;
  std::vector<Job> jobs_;
  fs::path folder_ = fs::temp_directory_path() / ("baton_experiment_" + std::to_string(::getpid()));
};

TEST_F(Experiment, ASignalledExperimentGoesOn) {
  BATON_NEEDS_DEVICE();
  const json want = timeless(run("whole")), want_log = timeless(lines("whole"));
  const int questions = (1 << 30) - questions_left;
  ASSERT_EQ(want["runs"].size(), 4u);
  ASSERT_EQ(want_log.size(), 2u * 2 * 2 * 3);  // a line for each of three epochs, the last of half
  for (int at = 0; at < questions; at += 3) {
    SCOPED_TRACE(testing::Message() << "signal at question " << at << " of " << questions);
    const std::string name = "stopped" + std::to_string(at);
    questions_left = at;
    try {
      run(name);
      ADD_FAILURE() << "not stopped";
    } catch (const Stopped& e) {
      EXPECT_EQ(e.exit_code(), 143);
      EXPECT_STREQ(e.what(), "stopped by SIGTERM: the checkpoint is written; --resume goes on from it");
      EXPECT_TRUE(fs::exists(folder_ / name / "checkpoint"));
      pretend_signal(0);
      run(name, true);
    }
    pretend_signal(0);
    std::ifstream in(folder_ / name / "result.json");
    EXPECT_EQ(timeless(json::parse(in)), want);
    EXPECT_EQ(timeless(lines(name)), want_log);
    EXPECT_FALSE(fs::exists(folder_ / name / "checkpoint"));
    if (HasFailure()) break;
    fs::remove_all(folder_ / name);
  }
  // Again and again, on the way to one end.
  int stops = 0;
  for (bool resume = false;; resume = true) {
    questions_left = 9 + stops % 5;
    try {
      run("often", resume);
      break;
    } catch (const Stopped&) {
      pretend_signal(0);
      ASSERT_LT(++stops, 100);
    }
  }
  pretend_signal(0);
  EXPECT_GT(stops, 3);
  std::ifstream in(folder_ / "often" / "result.json");
  EXPECT_EQ(timeless(json::parse(in)), want);
  EXPECT_EQ(timeless(lines("often")), want_log);
}

// A stage's time is that of all its steps, an epoch's too, whatever came between.
TEST_F(Experiment, TimeGoesOn) {
  BATON_NEEDS_DEVICE();
  questions_left = 5;  // before step 7, in the second epoch of four steps: the first step of all asks nothing
  EXPECT_THROW(run("a"), Stopped);
  pretend_signal(0);
  const fs::path checkpoint = folder_ / "a" / "checkpoint" / "job.safetensors";
  TensorFile file = load_safetensors(checkpoint);
  EXPECT_EQ(file.metadata.at("stage_step"), "6");
  json extra = json::parse(file.metadata.at("extra"));
  EXPECT_GT(double(extra["epoch_seconds"]), 0);
  EXPECT_GT(double(extra["stage_seconds"]), double(extra["epoch_seconds"]));
  extra["stage_seconds"] = 2000;
  extra["epoch_seconds"] = 1000;
  file.metadata["extra"] = extra.dump();
  save_safetensors(checkpoint, file);
  const json stage = run("a", true)["runs"][0]["stages"][0];
  EXPECT_TRUE(double(stage["seconds"]) > 2000 && double(stage["seconds"]) < 2500) << stage["seconds"];
  const json log = lines("a");
  EXPECT_TRUE(double(log[2]["seconds"]) > 1000 && double(log[2]["seconds"]) < 1500) << log[2]["seconds"];
  EXPECT_LT(double(log[4]["seconds"]), 500);
}

}  // namespace
}  // namespace baton::test
