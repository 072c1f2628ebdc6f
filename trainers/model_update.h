// Bayes' rule for a model: the posterior becomes the prior, and a new part of the data is learned, alone. A run that is
// killed or asked to end goes on from its checkpoint and leaves the very file that an uninterrupted one would have.
#pragma once
#include <filesystem>
#include <functional>

#include "trainers/model.h"

namespace baton {

struct UpdateProgress {
  int epoch, epochs;                     // the one under way, from 1 on
  int64_t images, images_before, total;  // learned so far, by runs before this one, and in the end; every epoch counts
  double loss, accuracy;  // of the epoch so far: mean negative log-likelihood (nats) and training accuracy
  double kl;              // of the posterior to its prior, nats, mean over the epoch's steps so far
  bool epoch_ends;
};

struct UpdateOptions {
  bool augment = false;
  double hold_out = 0;     // a share of the images is not learned, but judged before and after
  bool overwrite = false;  // `out` may be there
  bool again = false;      // learn images that the model has learned before
  enum class Start { fresh, resume, restart } start = Start::fresh;
  int head = 0;                    // the output layer that learns, of a network with several
  double checkpoint_seconds = 10;  // 0: after every few steps
  std::function<void(const UpdateProgress&)> progress;
  std::function<void(const std::string&)> warn;  // what may go wrong, in a sentence
};

// The checkpoint of an update that writes `out`: beside it, gone when it has ended.
std::filesystem::path checkpoint_of(const std::filesystem::path& out);

// Learns `data` by the model's own settings (rule, settings, batch, epochs, precision: change them before, and the next
// model keeps them) and writes `out` (which may be the file that `model` came from). Returns the stage as the new
// model's history has it, and what only the clock knows: "seconds", "images_per_second", "resumed_at_step"; "hold_out"
// with the accuracies before and after; "done_before": true where the file was there already, complete.
// Throws InputError: images learned before (unless `again`), no labels, an unfinished update in the way (Start::fresh),
// the checkpoint of another one (Start::resume), settings that make no sense; Stopped when a signal asks to end, with
// the checkpoint written; RunError when a loss is not finite or a file cannot be written, and then `out` is as it was.
json update_model(Device&, const Model& model, const OwnData& data, const std::filesystem::path& out,
                  const UpdateOptions&);

}  // namespace baton
