#include "engine/io/runlog.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "engine/error.h"
#include "engine/io/progress.h"

namespace baton {
namespace {

namespace fs = std::filesystem;

const double kNan = std::numeric_limits<double>::quiet_NaN();

std::string slurp(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

void spill(const fs::path& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

std::vector<std::string> files_in(const fs::path& directory) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(directory)) names.push_back(entry.path().filename());
  std::sort(names.begin(), names.end());
  return names;
}

// No file may grow beyond `bytes` while this lives: what a full disk does, without one.
class FullDisk {
 public:
  explicit FullDisk(rlim_t bytes) {
    handler_ = ::signal(SIGXFSZ, SIG_IGN);
    ::getrlimit(RLIMIT_FSIZE, &before_);
    const rlimit now{bytes, before_.rlim_max};
    ::setrlimit(RLIMIT_FSIZE, &now);
  }
  ~FullDisk() {
    ::setrlimit(RLIMIT_FSIZE, &before_);
    ::signal(SIGXFSZ, handler_);
  }

 private:
  rlimit before_{};
  void (*handler_)(int);
};

class RunLogTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto* info = ::testing::UnitTest::GetInstance()->current_test_info();
    dir_ = fs::temp_directory_path() / ("baton_runlog_" + std::string(info->name()) + "_" + std::to_string(::getpid()));
    fs::remove_all(dir_);
  }
  void TearDown() override { fs::remove_all(dir_); }

  std::string log() const { return slurp(dir_ / "log.jsonl"); }

  fs::path dir_;
};

TEST_F(RunLogTest, WritesOneLineAnEpochAndTheKeysInTheirOrder) {
  RunLog log(dir_ / "deeper");
  log.epoch({{"stage", 0}, {"epoch", 1}, {"loss", 0.1}});
  EXPECT_EQ(slurp(log.log_path()), "{\"stage\":0,\"epoch\":1,\"loss\":0.1}\n") << "a line must not wait in a buffer";
  log.epoch({{"zebra", "a\nb"}, {"ant", 2}});
  EXPECT_EQ(slurp(log.log_path()), "{\"stage\":0,\"epoch\":1,\"loss\":0.1}\n{\"zebra\":\"a\\nb\",\"ant\":2}\n");
}

TEST_F(RunLogTest, NumbersComeBackBitForBit) {
  RunLog log(dir_);
  const std::vector<double> values = {0.1, 1.0 / 3, 5e-324, 1.7976931348623157e308, -0.0, 98.76543210987654};
  log.epoch({{"v", values}});
  const json read = json::parse(slurp(log.log_path()));
  for (std::size_t i = 0; i < values.size(); ++i) {
    EXPECT_EQ(read["v"][i].get<double>(), values[i]);
    EXPECT_EQ(std::signbit(read["v"][i].get<double>()), std::signbit(values[i]));
  }
}

TEST_F(RunLogTest, NanAndInfinityAreNullAndBrokenTextIsReplaced) {
  RunLog log(dir_);
  const double inf = std::numeric_limits<double>::infinity();
  log.epoch({{"a", kNan}, {"b", inf}, {"c", -inf}, {"d", 1}});
  EXPECT_EQ(slurp(log.log_path()), "{\"a\":null,\"b\":null,\"c\":null,\"d\":1}\n");
  log.result({{"loss", kNan}, {"note", "\xFF"}});
  const json result = json::parse(slurp(log.result_path()));
  EXPECT_TRUE(result["loss"].is_null());
  EXPECT_EQ(result["note"], "\xEF\xBF\xBD");
}

TEST_F(RunLogTest, AFreshStartEmptiesTheLogAndKeepsTheOldResultUntilTheNewOneIsWritten) {
  {
    RunLog log(dir_);
    log.epoch({{"epoch", 1}});
    log.result({{"old", true}});
  }
  RunLog log(dir_);
  EXPECT_EQ(slurp(log.log_path()), "");
  EXPECT_EQ(json::parse(slurp(log.result_path())), json({{"old", true}}));
  log.result({{"new", true}});
  EXPECT_EQ(json::parse(slurp(log.result_path())), json({{"new", true}}));
  EXPECT_EQ(files_in(dir_), (std::vector<std::string>{"log.jsonl", "result.json"}));
}

TEST_F(RunLogTest, AResumedLogLosesItsTornLineAndTheEpochsThatRunAgain) {
  fs::create_directories(dir_);
  spill(dir_ / "log.jsonl", "{\"epoch\":1}\n{\"epoch\":2}\n{\"epoch\":3}\n{\"epo");
  RunLog log(dir_, true);
  EXPECT_EQ(this->log(), "{\"epoch\":1}\n{\"epoch\":2}\n{\"epoch\":3}\n");
  log.truncate_after([](const json& line) { return line["epoch"] <= 2; });
  EXPECT_EQ(this->log(), "{\"epoch\":1}\n{\"epoch\":2}\n");
  log.epoch({{"epoch", 3}, {"again", true}});
  EXPECT_EQ(this->log(), "{\"epoch\":1}\n{\"epoch\":2}\n{\"epoch\":3,\"again\":true}\n");
  EXPECT_EQ(files_in(dir_), std::vector<std::string>{"log.jsonl"});
}

TEST_F(RunLogTest, ResumeMendsEveryKindOfLastLine) {
  const std::string good = "{\"epoch\":1}\n";
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"", ""},
      {good, good},
      {"{\"epoch\":1}", good},  // only the newline was lost
      {good + std::string(40, '\0'), good},
      {good + "{\"epoch\":2,\"loss\":0.}\n", good},
      {good + "\n", good},
      {"{\"ep", ""},
  };
  for (const auto& [before, after] : cases) {
    fs::create_directories(dir_);
    spill(dir_ / "log.jsonl", before);
    RunLog log(dir_, true);
    EXPECT_EQ(this->log(), after) << before;
    log.epoch({{"epoch", 9}});
    EXPECT_EQ(this->log(), after + "{\"epoch\":9}\n") << before;
  }
}

TEST_F(RunLogTest, ResumeWithoutALogStartsOne) {
  RunLog log(dir_, true);
  log.epoch({{"epoch", 1}});
  EXPECT_EQ(this->log(), "{\"epoch\":1}\n");
}

TEST_F(RunLogTest, ABadLineBeforeTheEndIsNotSilentlyDropped) {
  fs::create_directories(dir_);
  const std::string before = "{\"epoch\":1}\n{\"epo\n{\"epoch\":3}\n";
  spill(dir_ / "log.jsonl", before);
  try {
    RunLog log(dir_, true);
    FAIL() << "accepted a damaged log";
  } catch (const InputError& error) {
    EXPECT_NE(std::string(error.what()).find("log.jsonl: line 2"), std::string::npos) << error.what();
  }
  EXPECT_EQ(log(), before);
}

TEST_F(RunLogTest, AFileInThePlaceOfTheDirectoryIsBadInput) {
  spill(dir_, "a file");
  EXPECT_THROW(RunLog log(dir_), InputError);
}

TEST_F(RunLogTest, AFullDiskIsOneClearErrorAndLeavesWholeFiles) {
  RunLog log(dir_);
  log.epoch({{"epoch", 1}});
  log.result({{"old", true}});
  const std::string lines = this->log(), result = slurp(log.result_path());
  const json big = {{"text", std::string(4000, 'x')}};
  std::string epoch_message, result_message;
  {
    FullDisk disk(1000);
    try {
      log.epoch(big);
    } catch (const RunError& error) {
      epoch_message = error.what();
    }
    try {
      log.result(big);
    } catch (const RunError& error) {
      result_message = error.what();
    }
  }
  EXPECT_NE(epoch_message.find("log.jsonl"), std::string::npos) << epoch_message;
  EXPECT_NE(result_message.find("result.json"), std::string::npos) << result_message;
  EXPECT_EQ((epoch_message + result_message).find('\n'), std::string::npos);
  EXPECT_EQ(this->log(), lines) << "the part of the line that fitted must be taken back";
  EXPECT_EQ(slurp(log.result_path()), result);
  EXPECT_EQ(files_in(dir_), (std::vector<std::string>{"log.jsonl", "result.json"}));
  log.epoch({{"epoch", 2}});  // there is room again
  EXPECT_EQ(this->log(), lines + "{\"epoch\":2}\n");
}

TEST(MeanAndSpread, OfNoneOneAndMany) {
  EXPECT_EQ(mean_and_spread({}).n, 0u);
  EXPECT_TRUE(std::isnan(mean_and_spread({}).mean));
  const std::vector<double> one = {0.5};
  EXPECT_EQ(mean_and_spread(one).mean, 0.5);
  EXPECT_TRUE(std::isnan(mean_and_spread(one).sd));
  const std::vector<double> many = {2, 4, 4, 4, 5, 5, 7, 9};
  EXPECT_DOUBLE_EQ(mean_and_spread(many).mean, 5);
  EXPECT_DOUBLE_EQ(mean_and_spread(many).sd, std::sqrt(32.0 / 7));
  EXPECT_EQ(mean_and_spread(many).n, 8u);
  const std::vector<double> close = {1e9 + 1, 1e9 + 2, 1e9 + 3};
  EXPECT_DOUBLE_EQ(mean_and_spread(close).sd, 1);
}

class ProgressTest : public ::testing::Test {
 protected:
  void SetUp() override { out_ = std::tmpfile(); }
  void TearDown() override { std::fclose(out_); }

  ProgressOptions options(bool terminal) {
    ProgressOptions options;
    options.terminal = terminal;
    options.interval = 10;
    options.width = 80;
    options.clock = [this] { return time_; };
    return options;
  }
  std::string written() const {
    std::string text(static_cast<std::size_t>(std::ftell(out_)), '\0');
    std::rewind(out_);
    EXPECT_EQ(std::fread(text.data(), 1, text.size(), out_), text.size());
    std::fseek(out_, 0, SEEK_END);
    return text;
  }

  FILE* out_ = nullptr;
  double time_ = 100;
};

TEST_F(ProgressTest, PlainLinesAreRareWholeAndEndEachStage) {
  {
    Progress progress("bil_mnist", 60000, out_, options(false));
    progress.stage("ffg 1/2");
    for (int second = 1; second <= 25; ++second) {
      time_ += 1;
      progress.update(second * 1000, 0.5, second == 25 ? kNan : 0.9812);
    }
    progress.stage("ffg\n2/2");
    time_ += 1;
    progress.update(26000, 0.25, 0.99);
    progress.finish();
    progress.finish();
  }
  EXPECT_EQ(written(),
            "bil_mnist ffg 1/2   16%  loss 0.5  acc 98.12%  1000 img/s  0:10 left 0:50\n"
            "bil_mnist ffg 1/2   33%  loss 0.5  acc 98.12%  1000 img/s  0:20 left 0:40\n"
            "bil_mnist ffg 1/2   41%  loss 0.5  1000 img/s  0:25 left 0:35\n"
            "bil_mnist ffg 2/2   43%  loss 0.25  acc 99.00%  1000 img/s  0:26 left 0:34\n");
}

TEST_F(ProgressTest, AFileIsNotATerminal) {
  Progress progress("run", 0, out_);
  progress.update(5, 1, kNan);
  progress.finish();
  const std::string text = written();
  EXPECT_EQ(text.find('\r'), std::string::npos);
  EXPECT_EQ(text.find('%'), std::string::npos) << "an unknown total has no percentage: " << text;
  EXPECT_EQ(text.back(), '\n');
}

TEST_F(ProgressTest, NothingToTellWritesNothing) {
  Progress progress("run", 10, out_, options(false));
  progress.stage("a");
  progress.stage("b");
  progress.finish();
  EXPECT_EQ(written(), "");
}

TEST_F(ProgressTest, AResumedRunDoesNotCountOldImagesAsSpeed) {
  ProgressOptions resumed = options(false);
  resumed.images_before = 50000;
  Progress progress("run", 60000, out_, resumed);
  time_ += 10;
  progress.update(51000, 1, kNan);
  EXPECT_EQ(written(), "run   85%  loss 1  100 img/s  0:10 left 1:30\n");
}

TEST_F(ProgressTest, TheSpeedFollowsTheRecentPast) {
  Progress progress("run", 100000, out_, options(false));
  long done = 0;
  for (int second = 0; second < 100; ++second) time_ += 1, progress.update(done += 500, 1, kNan);
  for (int second = 0; second < 100; ++second) time_ += 1, progress.update(done += 100, 1, kNan);
  const std::string text = written();
  const std::string last = text.substr(text.rfind("loss"));
  EXPECT_EQ(last, "loss 1  101 img/s  3:20 left 6:38\n");
}

TEST_F(ProgressTest, ATerminalIsRedrawnInPlaceTenTimesASecondAndNeverWraps) {
  const std::string sigma = "\xCF\x83\xC2\xB2";  // two columns, four bytes
  for (const std::string& label : {std::string("ffg 3/10"), std::string(200, 'x'), sigma + std::string(80, 'y')}) {
    std::rewind(out_);
    ASSERT_EQ(::ftruncate(::fileno(out_), 0), 0);
    {
      Progress progress("bil_mnist", 100000, out_, options(true));
      progress.stage(label);
      for (int i = 1; i <= 1000; ++i) {
        time_ += 0.001;
        progress.update(i * 100, 1234.5678, 0.5);
      }
    }
    const std::string text = written();
    EXPECT_EQ(text.back(), '\n');
    EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1);
    const auto frames = std::count(text.begin(), text.end(), '\r');
    EXPECT_GE(frames, 9);
    EXPECT_LE(frames, 12);
    EXPECT_NE(text.find("100%"), std::string::npos) << "the last frame shows the end";
    std::istringstream in(text.substr(0, text.size() - 1));
    std::string frame;
    std::getline(in, frame, '\r');  // before the first frame there is nothing
    EXPECT_EQ(frame, "");
    while (std::getline(in, frame, '\r')) {
      ASSERT_TRUE(frame.ends_with("\x1b[K")) << frame;
      const auto columns = std::count_if(frame.begin(), frame.end(), [](char c) { return (c & 0xC0) != 0x80; }) - 3;
      EXPECT_LE(columns, 79) << frame;
      EXPECT_NE(frame.find("loss 1235  acc 50.00%"), std::string::npos) << frame;
      EXPECT_EQ(frame.find(']') != std::string::npos, label.size() < 10) << "a long label displaces the bar: " << frame;
      EXPECT_TRUE(frame.starts_with(label.substr(0, 8))) << frame;
    }
  }
}

TEST_F(ProgressTest, AnyWidthHoldsTheLine) {
  for (int width = 1; width <= 120; ++width) {
    std::rewind(out_);
    ASSERT_EQ(::ftruncate(::fileno(out_), 0), 0);
    ProgressOptions narrow = options(true);
    narrow.width = width;
    Progress progress("bil_mnist", 1000, out_, narrow);
    progress.stage("ffg 3/10");
    progress.update(10, 0.5, 0.25);
    EXPECT_LE(written().size(), static_cast<std::size_t>(std::max(1, width - 1) + 4)) << width;
    progress.finish();
  }
}

}  // namespace
}  // namespace baton
