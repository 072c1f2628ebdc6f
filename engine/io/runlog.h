// What a paper program leaves behind: log.jsonl, one line an epoch while it runs, and result.json, one object at the
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
  // Opens `directory`, creating it, and log.jsonl in it. A fresh start empties log.jsonl; a resumed one keeps its
  // lines, less a last line that a crash tore. result.json is left alone until result() replaces it. Throws InputError
  // if the directory cannot be made, or if a kept log has a bad line before its end; RunError if log.jsonl cannot be
  // written.
  explicit RunLog(const std::filesystem::path& directory, bool resume = false);
  ~RunLog();
  RunLog(const RunLog&) = delete;
  RunLog& operator=(const RunLog&) = delete;

  // Drops every line for which `keep` is false: on resume, the epochs later than the checkpoint, which will run again.
  // The file is replaced in one step. Throws InputError for a bad line, RunError if the log cannot be written.
  void truncate_after(const std::function<bool(const json&)>& keep);

  // Appends one line to log.jsonl; it has left the process when this returns. NaN and infinities become null.
  // Throws RunError if it cannot be written (a full disk); the log then still ends in a whole line.
  void epoch(const json& line);

  // Writes result.json beside and renames it, so a crash leaves the old file or the new one. NaN becomes null.
  // Throws RunError if it cannot be written; no half-written file stays.
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
  double sd;    // with n - 1; NaN (null in JSON) for fewer than two values, which have no spread to speak of
  std::size_t n;
};

MeanAndSpread mean_and_spread(std::span<const double> values);

}  // namespace baton
