// Trainings of a program's own, beside those of run_experiment(): they survive a signal too. Each leaves a checkpoint
// in the folder checkpoint/ of --out, with an object that says whose it is ("identity") and where it stood.
#pragma once
#include <filesystem>

#include "engine/io/runlog.h"
#include "trainers/incremental.h"

namespace baton {

[[noreturn]] void stop_at_checkpoint();  // throws Stopped with the words for it

// What an earlier run left at `path`, a JSON file or a trainer's checkpoint with such an `extra`; null where there is
// no file. InputError when it is of a run with another identity.
json left_by_earlier_run(const std::filesystem::path& path, const json& identity);

// Trains to the end of the stage under way. The checkpoint is written at the end of the first epoch after so many
// seconds, and where a signal ends the run (Stopped).
void finish_stage(IncrementalTrainer&, const std::filesystem::path& checkpoint, const json& extra,
                  double checkpoint_seconds);

}  // namespace baton
