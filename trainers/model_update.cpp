#include "trainers/model_update.h"

#include <cmath>
#include <optional>

#include "engine/io/files.h"
#include "engine/io/stop.h"
#include "trainers/checkpoints.h"
#include "trainers/inference.h"
#include "trainers/laplace.h"

namespace baton {

namespace fs = std::filesystem;

namespace {

// Steps between two looks at the totals. Fixed, not by the clock: an epoch's sums must not depend on where they were
// looked at.
constexpr int chunk = 16;

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
  static Sums from(const json& j) { return {j.at(0), j.at(1), j.at(2), j.at(3), j.at(4), j.at(5)}; }
  double mean(double sum) const { return sum / double(std::max<int64_t>(examples, 1)); }
  double mean_kl() const { return kl / double(std::max<int64_t>(steps, 1)); }
};

class Update {
 public:
  Update(Device& device, const Model& model, const OwnData& data, const fs::path& out, const UpdateOptions& options)
      : device_(device), model_(model), data_(data), out_(out), options_(options), hash_(content_hash(data.images)) {
    check();
    split();
    device.set_precision(model.precision);
    settings_ = training_json(model);
    if (options.augment) settings_["augment"] = true;
    if (options.hold_out > 0) settings_["hold_out"] = options.hold_out;
    if (options.head > 0) settings_["head"] = options.head;
  }

  json run() {
    const fs::path checkpoint = checkpoint_of(out_);
    for (const fs::path& path : {out_, checkpoint}) remove_leftovers(path);
    if (const auto stage = options_.start == UpdateOptions::Start::resume ? done_before() : std::nullopt) {
      fs::remove(checkpoint);
      return *stage;
    }
    std::error_code ignored;
    if (!options_.overwrite && fs::exists(out_, ignored))
      throw InputError(out_.string() + " is there already (--overwrite writes over it)");
    if (const int stage = model_.find_stage(hash_); stage && !options_.again)
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
    if (model_.rule == "bgd" && model_.kind != "ffg")
      throw InputError("Bayesian gradient descent moves a fully factorized posterior (ffg); this one is " +
                       model_.kind);
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
    if (!load_safetensors(out_).metadata["format"].starts_with("baton-model-")) return std::nullopt;
    const Model found = read_model(out_);
    if (found.history.empty()) return std::nullopt;
    json stage = found.history.back();
    // Where a model is updated in place, the file is its own parent.
    const bool of_this = stage.value("parent", "") == fingerprint(model_) || fingerprint(found) == fingerprint(model_);
    if (!of_this || stage.value("data", "") != hash_text(hash_) || stage.value("settings", json()) != settings_)
      return std::nullopt;
    stage["done_before"] = true;
    return stage;
  }

  // Bayesian gradient descent moves a fully factorized Gaussian, too. Its noise is counted from 0 in every stage, so
  // every stage has a seed of its own.
  bool by_bgd() const { return model_.rule == "bgd"; }

  TrainingSettings make_training() const {
    TrainingSettings t;
    t.kind = by_bgd() ? "bgd" : model_.kind;
    t.masked = model_.masked;
    t.batch = std::min(model_.batch, int(order_.size()));
    t.epochs = model_.epochs;
    t.stages_before = by_bgd() ? 0 : model_.stages();
    t.identity = fingerprint(model_) + " " + hash_text(hash_) + " " + settings_.dump();
    Replica replica{model_.seed, model_.settings};
    if (by_bgd()) {
      replica.seed += 0x9e3779b97f4a7c15ull * uint64_t(model_.stages());
      float widest = -INFINITY;  // what a sigma that runs away is measured by
      for (const auto& [name, tensor] : model_.arrays.tensors)
        if (name.ends_with(".log_std") && !name.ends_with(".prior_log_std"))
          for (float x : tensor.as<float>()) widest = std::max(widest, x);
      replica.settings = {{"eta", model_.settings["lr"]},
                          {"schedule", model_.settings["schedule"]},
                          {"draws", model_.draws},
                          {"sigma", std::exp(widest)}};
    }
    const int groups = model_.settings.value("groups", 1);
    t.batch -= t.batch % groups;
    t.replicas = {replica};
    return t;
  }

  json train(const fs::path& path) {
    Arena arena;
    const DeviceImages images = upload_images(device_, arena, data_.images, model_.normalisation);
    Stages stages = tasks_in_turn({order_});
    stages.heads = {options_.head};
    stages.augment = {options_.augment};
    const NetworkFactory make = network_factory(model_.network);
    Trainer trainer(device_, arena, make, images, stages, make_training());
    std::optional<Predictor> predictor;
    Images held;
    if (!held_.empty()) {
      held = subset(data_.images, held_);
      predictor.emplace(device_, arena, make, upload_images(device_, arena, held, model_.normalisation));
      predictor->look_as(options_.head, nullptr);
    }
    arena.freeze();
    const auto accuracy = [&] {
      return evaluate(predictor->predict(trainer.posterior(), 0, 0, 0).probability, held.labels, held.classes).accuracy;
    };

    json held_out;
    int resumed_at = 0;
    std::error_code ignored;
    if (fs::exists(path, ignored)) {
      const std::string text = trainer.restore(path);
      try {
        const json extra = json::parse(text);
        sums_ = Sums::from(extra.at("sums"));
        last_ = Sums::from(extra.at("last"));
        held_out = extra.at("hold_out");
      } catch (const json::exception& e) {
        throw InputError(path.string() + ": not the checkpoint of an update (" + e.what() + ")");
      }
      resumed_at = trainer.stage_step();
    } else {
      trainer.start_from(model_.arrays, by_bgd() ? 0 : model_.step);
      trainer.begin_stage(0);
      if (predictor) held_out = {{"images", held.count}, {"accuracy_before", accuracy()}};
    }
    Checkpoints checkpoints(
        path, options_.checkpoint_seconds,
        [&] {
          return json{{"sums", sums_.to_json()}, {"last", last_.to_json()}, {"hold_out", held_out}};
        },
        path.string() + " is written; the same command with --resume goes on from it");

    const int steps = trainer.count_steps(0), an_epoch = trainer.count_epoch_steps(0);
    const int epochs = (steps + an_epoch - 1) / an_epoch;
    const int batch = std::min(model_.batch, int(order_.size()));
    const auto epoch_end = [&](int at) { return std::min(steps, (at / an_epoch + 1) * an_epoch); };
    const double start = seconds_now();
    LearningLoop loop;
    loop.next_look = [&](int, int at) {
      return std::min(epoch_end(at), at / an_epoch * an_epoch + (at % an_epoch / chunk + 1) * chunk);
    };
    loop.look = [&](const std::vector<Look>& looks) {
      sums_.add(looks[0].totals[0]);
      if (const std::string warning = trainer.take_warning(); !warning.empty() && options_.warn) options_.warn(warning);
      const int at = trainer.stage_step();
      const bool ends = at == epoch_end(at - 1);
      if (options_.progress)
        options_.progress({(at + an_epoch - 1) / an_epoch, epochs, int64_t(at) * batch, int64_t(resumed_at) * batch,
                           int64_t(steps) * batch, sums_.mean(sums_.loss), sums_.mean(sums_.hits), sums_.mean_kl(),
                           ends});
      if (ends) last_ = sums_, sums_ = {};
    };
    learn(trainer, checkpoints, loop);
    const double seconds = seconds_now() - start;
    if (predictor) held_out["accuracy_after"] = checkpoints.keep_through(trainer, accuracy);
    checkpoints.keep_through(trainer, [&] {
      trainer.posterior().end_stage([&](int examples) { return find_fisher(trainer.posterior(), examples); });
    });

    Model next = model_;
    keep(next, trainer.posterior());
    next.step = by_bgd() ? model_.step + uint32_t(steps) : trainer.count_history();
    if (by_bgd()) set_prior(next);
    if (next.class_names.empty() && model_.history.empty()) next.class_names = data_.class_names;
    const json kl = find_kl(next, trainer.posterior());
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
    if (model_.uncertain()) stage["kl_by_layer"] = kl;
    stage["parent"] = fingerprint(model_);
    if (predictor) stage["hold_out"] = held_out;
    next.history.push_back(stage);
    save_model(out_, next);
    fs::remove(path, ignored);
    stage["seconds"] = seconds;
    stage["images_per_second"] = double(steps - resumed_at) * batch / std::max(seconds, 1e-9);
    stage["resumed_at_step"] = resumed_at;
    return stage;
  }

  // Of the first examples that were learned.
  std::vector<float> find_fisher(const Posterior& posterior, int examples) const {
    const size_t count = std::min(order_.size(), size_t(examples));
    return mean_fisher(device_, network_factory(model_.network, options_.head),
                       subset(data_.images, std::span(order_).first(count)), model_.normalisation, posterior.store());
  }

  // The posterior before is the prior of what Bayesian gradient descent left; pruned weights have the prior's sigma.
  void set_prior(Model& next) const {
    const std::unique_ptr<Network> network = make_network(model_.network);
    for (const TensorSpec& t : network->layout().tensors()) {
      const std::vector<float> prior = model_.arrays.at(t.name + ".log_std", t.shape).as<float>();
      next.arrays.tensors[t.name + ".prior_mean"] = model_.arrays.at(t.name + ".mean", t.shape);
      next.arrays.tensors[t.name + ".prior_log_std"] = model_.arrays.at(t.name + ".log_std", t.shape);
      if (!model_.masked) continue;
      const std::vector<uint8_t> kept = model_.arrays.at(t.name + ".mask", t.shape).as<uint8_t>();
      std::vector<float> log_std = next.arrays.at(t.name + ".log_std", t.shape).as<float>();
      for (size_t i = 0; i < kept.size(); i++)
        if (!kept[i]) log_std[i] = prior[i];
      next.arrays.tensors[t.name + ".log_std"] = Tensor::of<float>(log_std, t.shape);
    }
  }

  // KL of the next model to its prior by layer, nats.
  json find_kl(const Model& next, Posterior& trained) const {
    if (!by_bgd()) return sum_by_layer(trained.kl_names(), trained.kl_by_name()[0]);
    Arena arena;
    const auto posterior = make_posterior(device_, arena, next);
    return sum_by_layer(posterior->kl_names(), posterior->kl_by_name()[0]);
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
