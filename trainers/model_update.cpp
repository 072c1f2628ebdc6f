#include "trainers/model_update.h"

#include <chrono>
#include <cmath>

#include "engine/io/files.h"
#include "engine/io/stop.h"
#include "trainers/metrics.h"
#include "trainers/model_learning.h"

namespace baton {

namespace fs = std::filesystem;

namespace {

// Steps between two looks at the totals. Fixed, not by the clock: an epoch's sums must not depend on where they were
// looked at.
constexpr int chunk = 16;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// An epoch's sums so far.
struct Sums {
  double loss = 0, hits = 0, kl = 0;
  int64_t examples = 0, steps = 0;
  std::vector<double> kl_by_name;

  void add(const EpochTotals& t) {
    loss += t.loss * double(t.examples);
    hits += t.accuracy * double(t.examples);
    kl += t.kl * double(t.steps);
    kl_by_name.resize(t.kl_by_name.size());
    for (size_t i = 0; i < t.kl_by_name.size(); i++) kl_by_name[i] += t.kl_by_name[i] * double(t.steps);
    examples += t.examples;
    steps += t.steps;
  }
  json to_json() const { return {loss, hits, kl, examples, steps, kl_by_name}; }
  static Sums of(const json& j) { return {j.at(0), j.at(1), j.at(2), j.at(3), j.at(4), j.at(5)}; }
  double mean(double sum) const { return sum / double(std::max<int64_t>(examples, 1)); }
  double mean_kl() const { return kl / double(std::max<int64_t>(steps, 1)); }
};

class Update {
 public:
  Update(Device& device, const Model& model, const OwnData& data, const fs::path& out, const UpdateOptions& options)
      : device_(device), model_(model), data_(data), out_(out), options_(options), hash_(content_hash(data.images)) {
    check();
    split();
    settings_ = training_json(model);
    if (options.augment) settings_["augment"] = true;
    if (options.hold_out > 0) settings_["hold_out"] = options.hold_out;
  }

  json run() {
    const fs::path checkpoint = checkpoint_of(out_);
    for (const fs::path& path : {out_, checkpoint}) remove_leftovers(path);
    if (options_.start == UpdateOptions::Start::resume) {
      if (auto stage = done_before()) {
        fs::remove(checkpoint);
        return *stage;
      }
    }
    std::error_code ignored;
    if (!options_.overwrite && fs::exists(out_, ignored))
      throw InputError(out_.string() + " is there already (--overwrite writes over it)");
    if (const int stage = model_.learned(hash_); stage && !options_.again)
      throw InputError("these " + std::to_string(data_.images.count) + " images were learned in stage " +
                       std::to_string(stage) + "; what is learned twice counts twice (--again does it all the same)");
    if (options_.start == UpdateOptions::Start::fresh && fs::exists(checkpoint, ignored))
      throw InputError(checkpoint.string() +
                       " is the checkpoint of an update that has not ended: --resume goes on with it, --restart "
                       "begins anew");
    if (options_.start == UpdateOptions::Start::restart) fs::remove(checkpoint, ignored);
    return train(checkpoint);
  }

 private:
  void check() const {
    if (!data_.labelled) throw InputError("an update needs labels");
    if (!(model_.epochs > 0 && model_.epochs <= 1e6))
      throw InputError("--epochs must be positive and at most a million");
    if (model_.batch < 1 || model_.batch > 1 << 20)
      throw InputError("--batch must be 1 to 1048576, not " + std::to_string(model_.batch));
    if (model_.draws < 1 || model_.draws > 1000)
      throw InputError("--draws must be 1 to 1000, not " + std::to_string(model_.draws));
    if (!(options_.hold_out >= 0 && options_.hold_out < 1))
      throw InputError("--hold-out is a share, from 0 to below 1");
    check_classes(model_, data_);
  }

  // A seeded order; its end is held out.
  void split() {
    order_ = split_parts(data_.images.count, 1, model_.seed)[0];
    const int held = int(std::lround(options_.hold_out * data_.images.count));
    if (held >= data_.images.count) throw InputError("--hold-out leaves no image to learn");
    held_.assign(order_.end() - held, order_.end());
    order_.resize(order_.size() - size_t(held));
  }

  // What an uninterrupted run would have left is there: it was killed between its last write and its end.
  std::optional<json> done_before() const {
    std::error_code ignored;
    if (!fs::is_regular_file(out_, ignored)) return std::nullopt;
    const TensorFile file = load_safetensors(out_);
    const auto format = file.metadata.find("format");
    if (format == file.metadata.end() || format->second.rfind("baton-model-", 0) != 0) return std::nullopt;
    const Model found = load_model(out_);
    if (found.history.empty()) return std::nullopt;
    json stage = found.history.back();
    // Where a model is updated in place, the file is its own parent.
    const bool of_this = stage.value("parent", "") == fingerprint(model_) || fingerprint(found) == fingerprint(model_);
    if (!of_this || stage.value("data", "") != hash_text(hash_) || stage.value("settings", json()) != settings_)
      return std::nullopt;
    stage["done_before"] = true;
    return stage;
  }

  json train(const fs::path& checkpoint) {
    Arena arena;
    const DeviceImages images = upload_images(device_, arena, data_.images, model_.normalisation);
    const std::unique_ptr<Learning> learning =
        learning_of(device_, arena, model_, images, order_, model_, options_.augment,
                    fingerprint(model_) + " " + hash_text(hash_) + " " + settings_.dump());
    std::unique_ptr<Predictor> judge;
    Images held;
    if (!held_.empty()) {
      held = subset(data_.images, held_);
      judge = std::make_unique<Predictor>(device_, arena, model_.architecture.network(),
                                          upload_images(device_, arena, held, model_.normalisation));
    }
    arena.freeze();
    const auto accuracy = [&] {
      return evaluate(learning->predict_at_mean(*judge).probability, held.labels, held.classes, {}, {}).accuracy;
    };

    json held_out;
    int resumed_at = 0;
    std::error_code ignored;
    if (fs::exists(checkpoint, ignored)) {
      const std::string text = learning->restore(checkpoint);
      try {
        const json extra = json::parse(text);
        sums_ = Sums::of(extra.at("sums"));
        last_ = Sums::of(extra.at("last"));
        held_out = extra.at("hold_out");
      } catch (const json::exception& e) {
        throw InputError(checkpoint.string() + ": not the checkpoint of an update (" + e.what() + ")");
      }
      resumed_at = learning->step();
    } else {
      learning->begin();
      if (judge) held_out = {{"images", held.count}, {"accuracy_before", accuracy()}};
    }
    const auto save = [&] {
      const json extra{{"sums", sums_.to_json()}, {"last", last_.to_json()}, {"hold_out", held_out}};
      learning->save(checkpoint, extra.dump());
    };

    const int steps = learning->steps(), an_epoch = learning->steps_an_epoch();
    const int epochs = (steps + an_epoch - 1) / an_epoch;
    const int batch = std::min(model_.batch, int(order_.size()));
    const double start = now();
    double saved = start;
    while (learning->step() < steps) {
      const int at = learning->step(), epoch_end = std::min(steps, (at / an_epoch + 1) * an_epoch);
      const int count = std::min(epoch_end, at / an_epoch * an_epoch + (at % an_epoch / chunk + 1) * chunk) - at;
      if (learning->advance(count) < count) {
        save();
        throw_stopped(checkpoint.string() + " is written; the same command with --resume goes on from it");
      }
      sums_.add(learning->take_totals());
      if (const std::string warning = learning->warning(); !warning.empty() && options_.warn) options_.warn(warning);
      const bool ends = learning->step() == epoch_end;
      if (options_.progress)
        options_.progress({(learning->step() + an_epoch - 1) / an_epoch, epochs, int64_t(learning->step()) * batch,
                           int64_t(resumed_at) * batch, int64_t(steps) * batch, sums_.mean(sums_.loss),
                           sums_.mean(sums_.hits), sums_.mean_kl(), ends});
      if (ends) last_ = sums_, sums_ = {};
      if (learning->step() < steps && now() - saved >= options_.checkpoint_seconds) {
        save();
        saved = now();
      }
    }
    const double seconds = now() - start;
    if (judge) {
      try {
        held_out["accuracy_after"] = accuracy();
      } catch (const Stopped&) {
        save();
        throw_stopped(checkpoint.string() + " is written; the same command with --resume goes on from it");
      }
    }

    Model next = model_;
    const json kl = learning->finish(next);
    if (next.class_names.empty() && model_.history.empty()) next.class_names = data_.class_names;
    double total = 0;
    for (const auto& [layer, nats] : kl.items()) total += nats.get<double>();
    json stage;
    stage["stage"] = model_.stages() + 1;
    stage["images"] = order_.size();
    stage["data"] = hash_text(hash_);
    stage["format"] = data_.format;
    stage["epochs"] = model_.epochs;
    stage["steps"] = steps;
    stage["settings"] = settings_;
    stage["loss"] = last_.mean(last_.loss);
    stage["accuracy"] = last_.mean(last_.hits);
    stage["kl"] = total;
    if (model_.posterior.family != Family::point) stage["kl_by_layer"] = kl;
    stage["parent"] = fingerprint(model_);
    if (judge) stage["hold_out"] = held_out;
    next.history.push_back(stage);
    save_model(out_, next);
    fs::remove(checkpoint, ignored);
    stage["seconds"] = seconds;
    stage["images_per_second"] = double(steps - resumed_at) * batch / std::max(seconds, 1e-9);
    stage["resumed_at_step"] = resumed_at;
    return stage;
  }

  Device& device_;
  const Model& model_;
  const OwnData& data_;
  fs::path out_;
  const UpdateOptions& options_;
  uint64_t hash_;
  json settings_;
  std::vector<int32_t> order_, held_;
  Sums sums_, last_;  // of the epoch under way, and of the one before it
};

}  // namespace

fs::path checkpoint_of(const fs::path& out) { return out.string() + ".unfinished"; }

json update_model(Device& device, const Model& model, const OwnData& data, const fs::path& out,
                  const UpdateOptions& options) {
  return Update(device, model, data, out, options).run();
}

}  // namespace baton
