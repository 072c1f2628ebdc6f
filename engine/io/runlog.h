// The output of a paper program: log.jsonl, a line for each epoch while it runs, and result.json, one object at the
// end.
#pragma once
#include <cstddef>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <span>
#include <string>

namespace baton {

// Keys keep the order in which they were set, so that a person reads `method` before `seconds`.
using json = nlohmann::ordered_json;

class RunLog {
 public:
  // Makes `directory` where it does not exist, and opens log.jsonl in it. A fresh run empties log.jsonl; a resumed one
  // keeps its lines, except for a last line that a crash has cut. result.json stays until result() replaces it. Throws
  // InputError if the directory cannot be made, or if a kept log has a bad line before its end; RunError if log.jsonl
  // cannot be written.
  explicit RunLog(const std::filesystem::path& directory, bool resume = false);
  ~RunLog();
  RunLog(const RunLog&) = delete;
  RunLog& operator=(const RunLog&) = delete;

  // Drops every line for which `keep` is false. A resumed run drops the epochs after the checkpoint, as they will run
  // again. The file is replaced atomically. Throws InputError for a bad line, RunError if the log cannot be written.
  void truncate_after(const std::function<bool(const json&)>& keep);

  // Appends a line to log.jsonl, which is written out when this returns. NaN and infinities become null. Throws
  // RunError if it cannot be written (a full disk); the log then still ends in a whole line.
  void epoch(const json& line);

  // Writes result.json atomically: after a crash there is either the old file or the new one. NaN becomes null. Throws
  // RunError if it cannot be written; then no partial file is left.
  void result(const json& object);

  const std::filesystem::path& directory() const { return directory_; }
  std::filesystem::path log_path() const { return directory_ / "log.jsonl"; }
  std::filesystem::path result_path() const { return directory_ / "result.json"; }

 private:
  void open_log(bool empty_it);
  void close_log();

  std::filesystem::path directory_;
  int log_ = -1;
};

struct MeanAndSpread {
  double mean;  // NaN for no values
  double sd;    // with n - 1; NaN (null in JSON) for fewer than two values
  std::size_t n;
};

MeanAndSpread mean_and_spread(std::span<const double> values);

}  // namespace baton
