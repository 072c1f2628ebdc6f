#include "engine/io/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <string_view>
#include <utility>

namespace baton {
namespace {

constexpr double kRedraw = 0.1;   // seconds between two frames: ten a second cost nothing and look smooth
constexpr double kMemory = 15.0;  // seconds after which a measured speed has faded to 1/e

bool starts_character(char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }  // of UTF-8

int width_of(std::string_view text) {
  return static_cast<int>(std::count_if(text.begin(), text.end(), starts_character));
}

// The first `columns` characters; a cut text ends in a dot, and no character is cut in two.
std::string fit(const std::string& text, int columns) {
  if (width_of(text) <= columns) return text;
  if (columns <= 0) return "";
  std::size_t end = 0;
  for (int seen = 0; end < text.size(); ++end) {
    if (starts_character(text[end]) && ++seen == columns) break;
  }
  return text.substr(0, end) + ".";
}

// A line break or an escape sequence in a label would not stay on one line.
std::string one_line(std::string text) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = ' ';
  }
  return text;
}

template <class... Args>
std::string format(const char* pattern, Args... args) {
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, pattern, args...);
  return buffer;
}

std::string clock_time(double seconds) {
  if (!(seconds >= 0) || seconds > 9e8) return "--:--";
  const long s = std::lround(seconds);
  if (s >= 86400) return format("%ldd%02ldh", s / 86400, s / 3600 % 24);
  if (s >= 3600) return format("%ld:%02ld:%02ld", s / 3600, s / 60 % 60, s % 60);
  return format("%ld:%02ld", s / 60, s % 60);
}

std::string speed(double rate) {
  if (rate >= 9.995e5) return format("%.2fM img/s", rate / 1e6);
  if (rate >= 9995) return format("%.1fk img/s", rate / 1e3);
  return format("%.0f img/s", rate);
}

}  // namespace

Progress::Progress(std::string title, long total_images, FILE* out, ProgressOptions options)
    : title_(one_line(std::move(title))),
      total_(total_images),
      out_(out),
      options_(std::move(options)),
      terminal_(options_.terminal.value_or(out && ::isatty(::fileno(out)) == 1)),
      start_(now()),
      last_draw_(start_),
      last_{start_, options_.images_before} {}

Progress::~Progress() { finish(); }

double Progress::now() const {
  if (options_.clock) return options_.clock();
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Asked at every frame, for windows change their size.
int Progress::columns() const {
  if (options_.width > 0) return options_.width;
  winsize size{};
  if (::ioctl(::fileno(out_), TIOCGWINSZ, &size) == 0 && size.ws_col > 0) return size.ws_col;
  return 80;
}

void Progress::stage(std::string label) {
  end_stage();
  label_ = one_line(std::move(label));
}

void Progress::update(long images_done, double loss, double accuracy, std::string more) {
  const double t = now();
  const double seconds = std::max(0.0, t - last_.seconds);
  const double fade = std::exp(-seconds / kMemory);
  recent_images_ = recent_images_ * fade + static_cast<double>(std::max(0L, images_done - last_.images));
  recent_seconds_ = recent_seconds_ * fade + seconds;
  last_ = {t, images_done};
  loss_ = loss;
  accuracy_ = accuracy;
  more_ = one_line(std::move(more));
  undrawn_ = true;
  // The first frame on a terminal is drawn at once; the first plain line only after the interval.
  const bool first_frame = terminal_ && !open_line_;
  if (first_frame || t - last_draw_ >= (terminal_ ? kRedraw : options_.interval)) draw();
}

void Progress::finish() { end_stage(); }

void Progress::end_stage() {
  if (undrawn_) draw();
  if (open_line_) {
    std::fputc('\n', out_);
    std::fflush(out_);
    open_line_ = false;
  }
}

std::string Progress::line(bool with_bar) const {
  const double fraction =
      total_ > 0 ? std::clamp(static_cast<double>(last_.images) / static_cast<double>(total_), 0.0, 1.0) : 0;
  const double rate = recent_seconds_ > 0 ? recent_images_ / recent_seconds_ : 0;

  std::string left = title_;
  if (!label_.empty()) left += (left.empty() ? "" : " ") + label_;
  // Rounded down, so that 100% is shown only when nothing is left to do.
  std::string right = total_ > 0 ? format("%3d%%  ", static_cast<int>(fraction * 100)) : "";
  right += options_.loss_name + format(" %.4g", loss_);
  if (!std::isnan(accuracy_)) right += format("  acc %.2f%%", 100 * accuracy_);
  if (!more_.empty()) right += "  " + more_;
  right += "  " + speed(rate) + "  " + clock_time(last_.seconds - start_);
  if (total_ > 0) {
    const double todo = static_cast<double>(std::max(0L, total_ - last_.images));
    right += " left " + clock_time(todo == 0 ? 0 : rate > 0 ? todo / rate : -1);
  }
  if (!with_bar) return left.empty() ? right : left + "  " + right;

  // The numbers are always shown. Then the stage is more important than the bar, and the bar than the title, which
  // never changes. The last column stays empty, because some terminals wrap when it is written.
  const int width = std::max(1, columns() - 1);
  const int room = width - width_of(right) - 2;
  if (room <= 0) return fit(right, width);
  const std::string& name = label_.empty() ? title_ : label_;
  if (width_of(left) > room) left = name;
  constexpr int kLeastCells = 6, kMostCells = 24, kFrame = 3;  // a blank and two brackets
  if (total_ > 0 && width_of(name) + kFrame + kLeastCells <= room) {
    if (width_of(left) + kFrame + kLeastCells > room) left = name;
    const int cells = std::min(room - width_of(left) - kFrame, kMostCells);
    const int full = static_cast<int>(fraction * cells);
    left += " [" + std::string(full, '#') + std::string(cells - full, '-') + "]";
  }
  return fit(left, room) + "  " + right;
}

// One write for each line, so that lines of another process cannot mix with it.
void Progress::draw() {
  std::string text;
  if (terminal_) {
    text = "\r" + line(true) + "\x1b[K";
    open_line_ = true;
  } else {
    text = line(false) + "\n";
  }
  std::fwrite(text.data(), 1, text.size(), out_);
  std::fflush(out_);
  last_draw_ = now();
  undrawn_ = false;
}

}  // namespace baton
