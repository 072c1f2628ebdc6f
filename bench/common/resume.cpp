#include "bench/common/resume.h"

#include <algorithm>
#include <chrono>

#include "engine/io/files.h"
#include "engine/io/stop.h"

namespace baton {

void stop_at_checkpoint() { throw_stopped("the checkpoint is written; --resume goes on from it"); }

json left_by_earlier_run(const std::filesystem::path& path, const json& identity) {
  if (!std::filesystem::exists(path)) return json();
  json j;
  if (path.extension() == ".safetensors") {
    const TensorFile file = load_safetensors(path);
    const auto extra = file.metadata.find("extra");
    if (extra != file.metadata.end()) j = json::parse(extra->second, nullptr, false);
  } else {
    const std::vector<uint8_t> bytes = read_file(path);
    j = json::parse(bytes.begin(), bytes.end(), nullptr, false);
  }
  if (!j.is_object() || !j.contains("identity")) throw InputError(path.string() + ": not a checkpoint of Baton");
  if (j["identity"] != identity)
    throw InputError(path.string() + ": --resume finds another experiment here; use its options, or another --out");
  return j;
}

void finish_stage(IncrementalTrainer& trainer, const std::filesystem::path& checkpoint, const json& extra,
                  double checkpoint_seconds) {
  const auto now = [] {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  };
  double saved = now();
  const auto save = [&] {
    trainer.save(checkpoint, extra.dump());
    saved = now();
  };
  const int steps = trainer.steps_of(trainer.stage()), an_epoch = trainer.steps_an_epoch(trainer.stage());
  while (trainer.stage_step() < steps) {
    const int count = std::min(an_epoch - trainer.stage_step() % an_epoch, steps - trainer.stage_step());
    if (trainer.advance(count) < count) {
      save();
      stop_at_checkpoint();
    }
    trainer.take_totals();  // throws where a loss was not finite
    if (now() - saved > checkpoint_seconds) save();
  }
}

}  // namespace baton
