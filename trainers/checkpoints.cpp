#include "trainers/checkpoints.h"

#include <chrono>

#include "engine/io/files.h"
#include "engine/io/stop.h"

namespace baton {

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Checkpoints::Checkpoints(std::filesystem::path path, double seconds, std::function<json()> extra, std::string words)
    : path_(std::move(path)),
      seconds_(seconds),
      last_save_(seconds_now()),
      extra_(std::move(extra)),
      words_(std::move(words)) {}

void Checkpoints::save(Trainer& trainer) {
  trainer.save(path_, extra_().dump());
  last_save_ = seconds_now();
}

void Checkpoints::save_when_due(Trainer& trainer) {
  if (seconds_now() - last_save_ >= seconds_) save(trainer);
}

void Checkpoints::stop(Trainer& trainer) {
  save(trainer);
  throw_stopped(words_);
}

json left_by_earlier_run(const std::filesystem::path& path, const json& identity) {
  if (!std::filesystem::exists(path)) return json();
  std::vector<uint8_t> bytes;
  if (path.extension() == ".safetensors") {
    const std::string extra = load_safetensors(path).metadata["extra"];
    bytes.assign(extra.begin(), extra.end());
  } else {
    bytes = read_file(path);
  }
  const json j = json::parse(bytes, nullptr, false);
  if (!j.is_object() || !j.contains("identity")) throw InputError(path.string() + ": not a checkpoint of Baton");
  if (j["identity"] != identity)
    throw InputError(path.string() + ": --resume finds another experiment here; use its options, or another --out");
  return j;
}

void finish_stage(Trainer& trainer, Checkpoints& checkpoints, const StageLoop& loop) {
  const int steps = trainer.count_steps(trainer.stage()), an_epoch = trainer.count_epoch_steps(trainer.stage());
  while (trainer.stage_step() < steps) {
    const int at = trainer.stage_step();
    const int to = loop.next_look ? loop.next_look(at) : std::min(steps, (at / an_epoch + 1) * an_epoch);
    const double start = seconds_now();
    const bool stopped = trainer.advance(to - at) < to - at;
    std::vector<EpochTotals> totals;
    if (!stopped) totals = trainer.take_totals();  // waits for the device
    if (loop.add_seconds) loop.add_seconds(seconds_now() - start);
    if (stopped) checkpoints.stop(trainer);
    if (loop.look) loop.look(totals);
    if (trainer.stage_step() < steps) checkpoints.save_when_due(trainer);
  }
}

}  // namespace baton
