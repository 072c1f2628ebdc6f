#include "trainers/checkpoints.h"

#include <algorithm>
#include <chrono>
#include <climits>

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

void learn(Trainer& trainer, Checkpoints& checkpoints, const LearningLoop& loop) {
  for (;;) {
    std::vector<std::pair<int, int>> left;  // of the groups that learn: steps to its next look
    int steps = INT_MAX, learning = 0;
    for (int g = 0; g < trainer.groups(); g++) {
      if (trainer.stage_ended(g)) {
        if (trainer.stage(g) + 1 == trainer.stages(g).count()) {
          trainer.rest(g);
          continue;
        }
        trainer.begin_stage(trainer.stage(g) + 1, g);
        if (loop.begin) loop.begin(g);
      }
      const int at = trainer.stage_step(g), an_epoch = trainer.count_epoch_steps(trainer.stage(g), g);
      const int to = loop.next_look
                         ? loop.next_look(g, at)
                         : std::min(trainer.count_steps(trainer.stage(g), g), (at / an_epoch + 1) * an_epoch);
      left.emplace_back(g, to - at);
      steps = std::min(steps, to - at);
      learning += int(trainer.stages(g).order.size());
    }
    if (left.empty()) return;
    const double start = seconds_now();
    const bool stopped = trainer.advance(steps) < steps;
    std::vector<Look> looks;
    for (const auto& [g, its_steps] : left)
      if (!stopped && its_steps == steps) looks.push_back({g, trainer.take_totals(g)});  // waits for the device
    const double share = (seconds_now() - start) / learning;
    for (const auto& [g, its_steps] : left)
      if (loop.add_seconds) loop.add_seconds(g, share * double(trainer.stages(g).order.size()));
    if (stopped) checkpoints.stop(trainer);
    if (loop.look) loop.look(looks);
    if (std::any_of(left.begin(), left.end(), [&](const auto& l) { return !trainer.stage_ended(l.first); }))
      checkpoints.save_when_due(trainer);
  }
}

}  // namespace baton
