// The one loop in which every program trains: it looks at a group's totals at the ends of its epochs (or where the
// program says), and leaves a checkpoint from which a killed or stopped run goes on to the very figures it would have
// had.
#pragma once
#include <filesystem>

#include "engine/io/runlog.h"
#include "engine/io/stop.h"
#include "trainers/trainer.h"

namespace baton {

double seconds_now();  // of a clock that does not jump

// Where one training leaves its checkpoints, and what each says beside the trainer's own state.
class Checkpoints {
 public:
  // seconds: between checkpoints, at the trainer's next look. extra: the program's own progress; an object with whose
  // it is under "identity" can be read back by left_by_earlier_run().
  Checkpoints(std::filesystem::path path, double seconds, std::function<json()> extra,
              std::string words = "the checkpoint is written; --resume goes on from it");
  void save(Trainer&);
  void save_when_due(Trainer&);
  [[noreturn]] void stop(Trainer&);  // saves, and throws Stopped with the words for it
  // Runs what no checkpoint can be written in, such as a prediction: where a signal ends it, the checkpoint stands
  // before it.
  template <class F>
  auto keep_through(Trainer& trainer, F work) {
    try {
      return work();
    } catch (const Stopped&) {
      stop(trainer);
    }
  }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
  double seconds_, last_save_;
  std::function<json()> extra_;
  std::string words_;
};

// What an earlier run left at `path`, a JSON file or a trainer's checkpoint with such an `extra`; null where there is
// no file. InputError when it is of a run with another identity.
json left_by_earlier_run(const std::filesystem::path& path, const json& identity);

// The totals of a group of replicas since its last look, one a replica.
struct Look {
  int group;
  std::vector<EpochTotals> totals;
};
struct LearningLoop {
  std::function<void(int group)> begin;               // a stage of the group has begun
  std::function<int(int group, int step)> next_look;  // after `step`, at most the stage's last; empty: the epoch's last
  // The group's share of the time of training, which groups that learn side by side divide by their replicas; before
  // anything is saved.
  std::function<void(int group, double seconds)> add_seconds;
  std::function<void(const std::vector<Look>&)> look;  // of the groups that come to theirs at the same step
};
// Trains every group from where it stands through all its stages. Throws what Trainer::take_totals() throws, and
// Stopped with the checkpoint written where a signal asks the program to end.
void learn(Trainer&, Checkpoints&, const LearningLoop& = {});

}  // namespace baton
