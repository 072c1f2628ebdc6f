#include "engine/io/runlog.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <limits>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/error.h"
#include "engine/io/files.h"

namespace baton {
namespace {

// A message from elsewhere may hold broken UTF-8; a replacement character in the log is better than losing the line.
std::string dump(const json& value, int indent) {
  return value.dump(indent, ' ', false, json::error_handler_t::replace);
}

struct LogLine {
  std::string text;
  json value;
};

// The lines of a log. A last line without its newline is kept if it is a whole object. One that does not parse was cut
// by a crash and is dropped (a crash of the machine may also leave a last line of zero bytes).
std::vector<LogLine> read_log(const std::filesystem::path& path) {
  const std::vector<uint8_t> bytes = read_file(path);
  std::string_view rest(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  std::vector<LogLine> lines;
  for (long number = 1; !rest.empty(); ++number) {
    const std::size_t end = rest.find('\n');
    const std::string_view text = rest.substr(0, end);
    rest = end == std::string_view::npos ? std::string_view() : rest.substr(end + 1);
    if (text.empty()) continue;
    json value = json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (value.is_object()) {
      lines.push_back({std::string(text), std::move(value)});
    } else if (!rest.empty()) {
      throw InputError(path.string() + ": line " + std::to_string(number) +
                       " is not a JSON object; repair or remove the log before resuming");
    }
  }
  return lines;
}

std::string join(const std::vector<LogLine>& lines) {
  std::string text;
  for (const LogLine& line : lines) (text += line.text) += '\n';
  return text;
}

}  // namespace

RunLog::RunLog(const std::filesystem::path& directory, bool resume) : directory_(directory) {
  make_directories(directory_);
  if (resume && std::filesystem::exists(log_path())) write_file_atomically(log_path(), join(read_log(log_path())));
  open_log(!resume);
}

RunLog::~RunLog() { close_log(); }

void RunLog::open_log(bool empty_it) {
  log_ = ::open(log_path().c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC | (empty_it ? O_TRUNC : 0), 0666);
  if (log_ < 0) throw RunError(log_path().string() + ": cannot open the log for writing: " + std::strerror(errno));
}

void RunLog::close_log() {
  if (log_ >= 0) ::close(log_);
  log_ = -1;
}

void RunLog::truncate_after(const std::function<bool(const json&)>& keep) {
  std::vector<LogLine> lines = read_log(log_path());
  const std::size_t before = lines.size();
  std::erase_if(lines, [&](const LogLine& line) { return !keep(line.value); });
  if (lines.size() == before) return;
  write_file_atomically(log_path(), join(lines));
  close_log();  // its descriptor is that of the replaced file
  open_log(false);
}

void RunLog::epoch(const json& line) {
  if (log_ < 0) throw RunError(log_path().string() + ": the log is closed after an earlier failure");
  const std::string text = dump(line, -1) + '\n';
  struct stat before {};
  const bool known = ::fstat(log_, &before) == 0 && S_ISREG(before.st_mode);
  std::size_t done = 0;
  while (done < text.size()) {
    const ssize_t wrote = ::write(log_, text.data() + done, text.size() - done);
    if (wrote > 0) {
      done += static_cast<std::size_t>(wrote);
    } else if (wrote == 0 || errno != EINTR) {
      const int error = wrote == 0 ? EIO : errno;
      // A full disk may have taken the start of the line; remove it, so that the log stays readable.
      std::string torn;
      if (done > 0 && (!known || ::ftruncate(log_, before.st_size) != 0)) torn = " (its last line is torn)";
      throw RunError(log_path().string() + ": cannot append to the log: " + std::strerror(error) + torn);
    }
  }
}

void RunLog::result(const json& object) { write_file_atomically(result_path(), dump(object, 2) + '\n'); }

MeanAndSpread mean_and_spread(std::span<const double> values) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const std::size_t n = values.size();
  if (n == 0) return {nan, nan, 0};
  double sum = 0;
  for (double value : values) sum += value;
  const double mean = sum / static_cast<double>(n);
  if (n == 1) return {mean, nan, 1};
  // In two passes: accuracies of several seeds differ in digits that E[x^2] - E[x]^2 would lose.
  double squares = 0;
  for (double value : values) squares += (value - mean) * (value - mean);
  return {mean, std::sqrt(squares / static_cast<double>(n - 1)), n};
}

}  // namespace baton
