// A line that shows the progress of a run: redrawn in place on a terminal, printed at intervals into a log file.
#pragma once
#include <cstdio>
#include <functional>
#include <optional>
#include <string>

namespace baton {

struct ProgressOptions {
  std::optional<bool> terminal;  // whether to redraw in place; unset: isatty(out)
  double interval = 10;          // seconds between two plain lines, at least
  long images_before = 0;        // images that a resumed run had done already: progress, but not speed
  std::string loss_name = "loss";
  int width = 0;                  // columns of the terminal; 0: as the terminal says, or 80 if it does not
  std::function<double()> clock;  // seconds, for tests; unset: the steady clock
};

// Not thread-safe, as one thread trains and reports. Errors of writing are ignored, so that a closed terminal does not
// end a run.
class Progress {
 public:
  // `total_images` is for the whole run, over all of its stages; 0 if unknown (no bar, no remaining time).
  Progress(std::string title, long total_images, FILE* out = stderr, ProgressOptions options = {});
  ~Progress();  // finish(): an exception's message starts on a line of its own
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  // Ends the current stage with its last line and starts the next. Line breaks in the label become blanks.
  void stage(std::string label);

  // `images_done` counts from the start of the run; it includes images_before. A NaN accuracy (a fraction) is not
  // shown. more: further figures of the caller, which are shown after these.
  void update(long images_done, double loss, double accuracy, std::string more = {});

  // Ends the last stage; nothing is left half drawn. May be called twice.
  void finish();

 private:
  struct Tick {
    double seconds;
    long images;
  };

  double now() const;
  int columns() const;
  std::string line(bool with_bar) const;
  void draw();
  void end_stage();

  std::string title_, label_, more_;
  long total_;
  FILE* out_;
  ProgressOptions options_;
  bool terminal_;
  double start_, last_draw_;
  Tick last_;                                      // the newest update
  double recent_images_ = 0, recent_seconds_ = 0;  // both fade with age; their ratio is the rate
  double loss_ = 0, accuracy_ = 0;
  bool undrawn_ = false;    // an update that no line shows yet
  bool open_line_ = false;  // the cursor stands behind a drawn line
};

}  // namespace baton
