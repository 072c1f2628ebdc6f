#include "trainers/experiment.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "engine/io/files.h"
#include "engine/io/progress.h"
#include "engine/io/stop.h"
#include "trainers/checkpoints.h"
#include "trainers/laplace.h"
#include "trainers/model.h"
#include "trainers/pruning.h"

namespace baton {

namespace {

namespace fs = std::filesystem;

// What is left to do at the step where a run stands, beside going on.
enum class Due { nothing, measurement, end_of_stage };

// Where the experiment stands: what a checkpoint must say besides the trainer's own state.
struct Progression {
  size_t run = 0;
  json finished = json::array();                // of runs that have ended, one a replica
  json current = json::array();                 // of the run under way, one a replica, with the stages so far
  double stage_seconds = 0, epoch_seconds = 0;  // of training, in the stage and the epoch under way
  Due due = Due::nothing;
  json figures = json::object();  // the posterior's, at the end of the newest epoch
};

class Runner {
 public:
  Runner(const ExperimentOptions& options, const ExperimentData& data, const std::vector<ExperimentRun>& runs)
      : options_(options),
        data_(data),
        runs_(runs),
        log_(options.out, options.resume),
        folder_(options.out / "checkpoint"),
        identity_(make_identity()),
        checkpoints_(folder_ / "run.safetensors", options.checkpoint_seconds, [this] { return describe_run(); }) {
    device_.set_precision(options.precision);
    make_directories(folder_);
    if (options.resume) find_progress();
    else
      for (const fs::path& path : {state_path(), checkpoints_.path()}) fs::remove(path);
    // A line of an epoch that the checkpoint does not hold will be written again.
    log_.truncate_after([&](const json& line) {
      const size_t of = line.value("run", size_t(0));
      return of < at_.run || (of == at_.run && line.value("step", int64_t(0)) <= resume_step_);
    });
  }

  json run() {
    long total = 0;
    for (const ExperimentRun& r : runs_) total += count_images(r);
    for (size_t i = 0; i < at_.run; i++) before_run_ += count_images(runs_[i]);
    ProgressOptions progress_options;
    progress_options.images_before = before_run_;
    if (resuming_) progress_options.images_before += resume_step_ * images_a_step(runs_[at_.run]);
    Progress progress(options_.experiment, total, stderr, progress_options);
    progress_ = &progress;
    for (; at_.run < runs_.size(); at_.run++) {
      run_one(runs_[at_.run]);
      for (const json& r : at_.current) at_.finished.push_back(r);
      save_state(at_.run + 1);
      log_.result(result());
      before_run_ += count_images(runs_[at_.run]);
      if (at_.run + 1 < runs_.size() && stop_requested())
        throw_stopped("the checkpoint is written; --resume goes on from it");
    }
    progress.finish();
    const json final_result = result();
    log_.result(final_result);
    fs::remove_all(folder_);
    return final_result;
  }

 private:
  static long images_a_step(const ExperimentRun& r) {
    return long(r.training.batch) * long(r.training.replicas.size());
  }
  static long count_images(const ExperimentRun& r) {
    long steps = long(r.stages.probabilities.size());
    if (!r.stages.continuous())
      for (int size : r.stages.sizes) steps += count_steps(r.training.epochs, size, r.training.batch);
    return steps * images_a_step(r);
  }

  // ------------------------------------------------------------------------------------------------- checkpoints
  fs::path state_path() const { return folder_ / "experiment.json"; }
  json make_identity() const {
    json j;
    j["experiment"] = options_.experiment;
    j["dataset"] = {data_.set.name, data_.set.source, data_.set.train.count, data_.test[0].count};
    if (options_.precision != Precision::fp32) j["precision"] = name(options_.precision);
    for (const ExperimentRun& r : runs_) {
      json one{r.method,  r.label,         r.network.description(), r.stages.tasks(),
               r.samples, r.stage_samples, count_images(r)};
      for (size_t i = 0; i < r.training.replicas.size(); i++)
        one.push_back({r.training.replicas[i].seed, describe_settings(r, i)});
      j["runs"].push_back(one);
    }
    return j;
  }
  void save_state(size_t next) {
    const json j{{"identity", identity_}, {"run", next}, {"finished", at_.finished}};
    write_file_atomically(state_path(), j.dump());
  }
  json describe_run() const {
    return {{"identity", identity_},
            {"run", at_.run},
            {"current", at_.current},
            {"stage_seconds", at_.stage_seconds},
            {"epoch_seconds", at_.epoch_seconds},
            {"due", int(at_.due)},
            {"figures", at_.figures}};
  }
  void find_progress() {
    if (const json state = left_by_earlier_run(state_path(), identity_); !state.is_null()) {
      at_.run = state["run"];
      at_.finished = state["finished"];
    }
    const json run = left_by_earlier_run(checkpoints_.path(), identity_);
    resuming_ = !run.is_null() && run["run"] == at_.run;  // else it is of a run that has ended since
    if (resuming_) resume_step_ = std::stoll(load_safetensors(checkpoints_.path()).metadata.at("step"));
  }

  // -------------------------------------------------------------------------------------------------------- a run
  void run_one(const ExperimentRun& run) {
    Arena arena;
    const NetworkFactory make = network_factory(run.network);
    const DeviceImages train = upload_images(device_, arena, data_.set.train, options_.normalisation);
    Trainer trainer(device_, arena, make, train, run.stages, run.training);
    predictors_.clear();
    for (const Images& test : data_.test)
      predictors_.push_back(std::make_unique<Predictor>(device_, arena, make,
                                                        upload_images(device_, arena, test, options_.normalisation)));
    arena.freeze();

    int stage = 0;
    if (resuming_) {
      resuming_ = false;
      const json j = json::parse(trainer.restore(checkpoints_.path()));
      at_.current = j["current"];
      at_.stage_seconds = j["stage_seconds"];
      at_.epoch_seconds = j["epoch_seconds"];
      at_.due = Due(int(j["due"]));
      at_.figures = j["figures"];
      stage = trainer.stage();
    } else {
      at_.current = json::array();
      at_.stage_seconds = at_.epoch_seconds = 0;
      at_.due = Due::nothing;
      for (size_t r = 0; r < run.training.replicas.size(); r++) at_.current.push_back(begin_result(run, trainer, r));
    }
    for (; stage < run.stages.count(); stage++) {
      if (trainer.stage() != stage) {
        trainer.begin_stage(stage);
        at_.stage_seconds = 0;
      }
      std::string name = run.label;
      if (run.training.replicas.size() == 1) name += " seed " + std::to_string(run.training.replicas[0].seed);
      if (run.stages.count() > 1)
        name += ", stage " + std::to_string(stage + 1) + "/" + std::to_string(run.stages.count());
      progress_->stage(name);
      train_stage(run, trainer);
    }
    for (size_t r = 0; r < at_.current.size(); r++) {
      json& result = at_.current[r];
      result["final_test_accuracy"] = result["stages"].back()["test_accuracy"];
      if (const json sigma = trainer.posterior().describe_sigma(run.histogram); !sigma.is_null())
        result["sigma"] = sigma;
    }
    if (options_.save_models) save_model(make_model(run, trainer), run, "");
    if (!run.pruned.empty()) prune(run, trainer);
  }

  static json name_run(const ExperimentRun& run, size_t replica) {
    return {{"method", run.method},
            {"label", run.label},
            {"parts", run.stages.tasks()},
            {"seed", run.training.replicas[replica].seed}};
  }
  json begin_result(const ExperimentRun& run, Trainer& trainer, size_t replica) const {
    json j = name_run(run, replica);
    j["settings"] = describe_settings(run, replica);
    j["parameters"] = trainer.network().layout().parameters();
    j["split_hash"] = hash_text(index_hash(run.stages.order[replica]));
    if (run.inference) j["inference"] = name(*run.inference);
    j["stages"] = json::array();
    return j;
  }

  // Whether a stage is measured after this step.
  static bool is_measured(const ExperimentRun& run, const Trainer& trainer, int step) {
    const int steps = trainer.count_steps(trainer.stage());
    if (step == steps) return true;
    if (run.measure_every > 0) {
      const int every = std::max(1, int(std::lround(run.measure_every * trainer.count_epoch_steps(trainer.stage()))));
      return step % every == 0 && steps - step >= every / 2;
    }
    for (int c = 1; c < run.checks; c++)
      if (step == int(int64_t(steps) * c / run.checks)) return true;
    return false;
  }

  void train_stage(const ExperimentRun& run, Trainer& trainer) {
    BATON_RANGE("stage");
    const int steps = trainer.count_steps(trainer.stage()), an_epoch = trainer.count_epoch_steps(trainer.stage());
    if (at_.due != Due::nothing) do_what_is_due(run, trainer);
    StageLoop loop;
    loop.next_look = [&](int at) {
      int last = at + 1;  // to the end of the epoch, or to a measurement
      while (last < steps && last % an_epoch != 0 && !is_measured(run, trainer, last)) last++;
      return last;
    };
    loop.add_seconds = [&](double seconds) { at_.stage_seconds += seconds, at_.epoch_seconds += seconds; };
    loop.look = [&](const std::vector<EpochTotals>& totals) {
      log_epoch(run, trainer, totals);
      const int at = trainer.stage_step();
      at_.due = at == steps ? Due::end_of_stage : is_measured(run, trainer, at) ? Due::measurement : Due::nothing;
      if (at_.due != Due::nothing) do_what_is_due(run, trainer);
    };
    finish_stage(trainer, checkpoints_, loop);
  }

  void log_epoch(const ExperimentRun& run, Trainer& trainer, const std::vector<EpochTotals>& totals) {
    at_.figures = json::object();
    for (const auto& [name, value] : trainer.posterior().figures()) at_.figures[name] = value;
    const std::string warning = trainer.take_warning();
    double loss = 0, accuracy = 0;
    for (size_t r = 0; r < totals.size(); r++) {
      json line;
      line["run"] = at_.run;
      line.update(name_run(run, r));
      line["stage"] = trainer.stage() + 1;
      line["epoch"] = double(trainer.stage_step()) / trainer.count_epoch_steps(trainer.stage());
      line["step"] = trainer.step();
      line["train_loss"] = totals[r].loss;
      line["train_accuracy"] = totals[r].accuracy;
      if (!totals[r].kl_by_name.empty()) {
        line["kl"] = totals[r].kl;
        line["kl_by_layer"] = sum_by_layer(trainer.posterior().kl_names(), totals[r].kl_by_name);
      }
      line.update(at_.figures);
      line["seconds"] = at_.epoch_seconds;
      if (!warning.empty()) {
        line["warning"] = warning;
        at_.current[r]["warnings"].push_back(warning);
        fprintf(stderr, "\n%s: warning: %s, seed %s: %s\n", options_.experiment.c_str(), run.label.c_str(),
                std::to_string(run.training.replicas[r].seed).c_str(), warning.c_str());
      }
      log_.epoch(line);
      loss += totals[r].loss / double(totals.size());
      accuracy += totals[r].accuracy / double(totals.size());
    }
    at_.epoch_seconds = 0;
    progress_->update(before_run_ + trainer.step() * images_a_step(run), loss, accuracy);
  }

  // Where a signal ends this, the checkpoint stands before what was not finished.
  void do_what_is_due(const ExperimentRun& run, Trainer& trainer) {
    checkpoints_.keep_through(trainer, [&] {
      if (at_.due == Due::end_of_stage) {
        trainer.posterior().end_stage([&](int examples) { return find_fisher(run, trainer, examples); });
        at_.due = Due::measurement;
      }
      measure(run, trainer);
      at_.due = Due::nothing;
    });
    checkpoints_.save(trainer);
  }

  // Of the first examples of the stage just learned.
  std::vector<float> find_fisher(const ExperimentRun& run, Trainer& trainer, int most) {
    const size_t stage = size_t(trainer.stage());
    const std::span<const int32_t> order(run.stages.order[0]);
    Images images = subset(data_.set.train, order.subspan(size_t(run.stages.first(trainer.stage())),
                                                          size_t(std::min(run.stages.sizes[stage], most))));
    if (!run.stages.pixel_order.empty()) reorder_pixels(images, run.stages.pixel_order[stage]);
    return mean_fisher(device_, network_factory(run.network, trainer.stages().heads[stage]), images,
                       options_.normalisation, trainer.posterior().store());
  }

  // --------------------------------------------------------------------------------------------------- measurements
  // On how many tasks the network is measured after a stage: parts of one task have one test set.
  int count_measured(const ExperimentRun& run, int stage) const {
    if (run.stages.continuous()) return run.stages.tasks();
    return data_.test.size() > 1 || !run.stages.pixel_order.empty() ? stage + 1 : 1;
  }

  void measure(const ExperimentRun& run, Trainer& trainer) {
    Posterior& posterior = trainer.posterior();
    const int stage = trainer.stage(), tasks = count_measured(run, stage);
    const std::vector<std::vector<double>> kl = posterior.kl_by_name();
    const std::vector<double> log_std = posterior.mean_log_std();
    std::vector<json> measured;
    for (size_t r = 0; r < at_.current.size(); r++) {
      const double start = seconds_now();
      json s;
      s["stage"] = stage + 1;
      s["epoch"] = double(trainer.stage_step()) / trainer.count_epoch_steps(stage);
      s["train_examples"] = run.stages.sizes[size_t(stage)];
      add_measurements(s, run, trainer, int(r), tasks);
      if (!kl[r].empty()) {
        s["kl"] = std::accumulate(kl[r].begin(), kl[r].end(), 0.0);
        s["kl_by_layer"] = sum_by_layer(posterior.kl_names(), kl[r]);
      }
      if (!log_std.empty()) s["mean_log_std"] = log_std[r];
      s.update(at_.figures);
      s["seconds"] = at_.stage_seconds;
      s["examples_per_second"] = double(trainer.stage_step()) * run.training.batch * double(at_.current.size()) /
                                 std::max(at_.stage_seconds, 1e-9);
      s["test_seconds"] = seconds_now() - start;
      measured.push_back(s);
    }
    for (size_t r = 0; r < measured.size(); r++) at_.current[r]["stages"].push_back(measured[r]);  // all or none
  }

  // all_ways: by every inference; else by those that come with the run's own.
  Measurement measure_task(const ExperimentRun& run, Trainer& trainer, int replica, int task, bool all_ways) {
    const size_t set = predictors_.size() == 1 ? 0 : size_t(task);
    predictors_[set]->look_as(trainer.stages().heads[size_t(run.stages.continuous() ? 0 : task)],
                              trainer.pixel_order(task));
    const uint64_t seed = run.training.replicas[size_t(replica)].seed;
    const int stage = trainer.stage();
    const int samples = stage + 1 == run.stages.count() ? run.samples : run.stage_samples;
    // The draws are numbered as they always were, so that results repeat.
    const uint64_t draws = run.inference ? seed * 1000003 + uint64_t(trainer.step()) : seed * 1000 + uint64_t(stage);
    return baton::measure(*predictors_[set], trainer.posterior(), replica, data_.test[set].labels,
                          trainer.network().classes(), run.inference, all_ways, samples, draws);
  }

  void add_measurements(json& s, const ExperimentRun& run, Trainer& trainer, int replica, int tasks) {
    const bool all_ways = run.inference && (tasks == 1 || trainer.stage() + 1 == run.stages.count());
    const Inference own = run.inference.value_or(Inference::softmax);
    json by_task = json::array(), by_inference = json::object();
    Measurement mean;
    for (int t = 0; t < tasks; t++) {
      const Measurement m = measure_task(run, trainer, replica, t, all_ways);
      by_task.push_back(m.accuracies.of(own));
      mean.add(m, tasks);
    }
    s["test_accuracy"] = mean.accuracies.of(own);
    s["test_nll"] = mean.metrics.nll;
    s["test_ece"] = mean.metrics.ece;
    s["predictive_entropy"] = mean.metrics.entropy;
    s["mutual_information"] = mean.metrics.mutual_information;
    s["samples"] = mean.samples;
    if (!run.inference) return;
    for (Inference i : all_inferences)
      if (all_ways || (i == Inference::map) == (own == Inference::map)) by_inference[name(i)] = mean.accuracies.of(i);
    s["by_inference"] = by_inference;
    s["by_task"] = by_task;
  }

  // --------------------------------------------------------------------------------------------- models and pruning
  Model make_model(const ExperimentRun& run, Trainer& trainer) const {
    Model m = new_model(run.network, run.training.kind);
    m.settings = trainer.posterior().settings();
    m.normalisation = options_.normalisation;
    m.precision = options_.precision;
    m.batch = run.training.batch;
    m.epochs = run.training.epochs;
    m.seed = run.training.replicas[0].seed;
    m.step = trainer.count_history();
    m.origin = {{"experiment", options_.experiment}, {"method", run.method}, {"label", run.label}};
    for (int s = 0; s < run.stages.count(); s++)
      m.history.push_back({{"stage", s + 1}, {"images", run.stages.sizes[size_t(s)]}, {"epochs", run.training.epochs}});
    keep(m, trainer.posterior());
    return m;
  }
  void save_model(const Model& m, const ExperimentRun& run, const std::string& suffix) const {
    std::string name = run.label + "_seed" + std::to_string(m.seed);
    for (char& c : name)
      if (!isalnum(static_cast<unsigned char>(c))) c = '_';
    baton::save_model(options_.out / (name + suffix + ".safetensors"), m);
  }

  // From the checkpoint of the last measurement it is all done again where a signal ends it.
  void prune(const ExperimentRun& run, Trainer& trainer) {
    const int task = run.stages.tasks() - 1;
    const auto error = [&] {
      return 1 - measure_task(run, trainer, 0, task, true).accuracies.of(run.inference.value_or(Inference::softmax));
    };
    const auto keep_pruned = [&](double fraction) {
      if (!options_.save_models) return;
      Model m = make_model(run, trainer);
      m.masked = true;
      m.pruned = {{"fraction", fraction}};
      add_masks(m.arrays, trainer.posterior().store().layout());
      char suffix[32];
      snprintf(suffix, sizeof suffix, "_pruned%g", 100 * fraction);
      save_model(m, run, suffix);
    };
    try {
      at_.current[0]["pruning"] = prune_and_judge(device_, trainer.posterior(), run.pruned, error, keep_pruned);
    } catch (const Stopped&) {
      throw_stopped("the checkpoint is written; --resume goes on from it");
    }
  }

  json result() const {
    int test = 0;
    for (const Images& set : data_.test) test += set.count;
    json j;
    j["experiment"] = options_.experiment;
    j["preset"] = options_.preset;
    j["dataset"] = {{"name", data_.set.name},
                    {"source", data_.set.source},
                    {"generated", data_.set.generated},
                    {"train", data_.set.train.count},
                    {"test", test}};
    j["device"] = device_.description();
    j["precision"] = name(options_.precision);
    j["peak_device_bytes"] = device_.peak_bytes();
    j["settings"] = options_.extra;
    j["runs"] = at_.finished;
    return j;
  }

  const ExperimentOptions& options_;
  const ExperimentData& data_;
  const std::vector<ExperimentRun>& runs_;
  RunLog log_;
  fs::path folder_;
  json identity_;
  Checkpoints checkpoints_;
  Device device_;
  std::vector<std::unique_ptr<Predictor>> predictors_;
  Progress* progress_ = nullptr;
  Progression at_;
  bool resuming_ = false;
  int64_t resume_step_ = 0;
  long before_run_ = 0;  // images
};

}  // namespace

json describe_settings(const ExperimentRun& run, size_t replica) {
  const Replica& r = run.training.replicas.at(replica);
  json j{{"epochs", run.training.epochs}, {"batch", run.training.batch}};
  j.update(complete_options(find_posterior(run.training.kind).options, r.settings, run.training.kind));
  if (j["schedule"] != "steps") j.erase("decay"), j.erase("decay_epochs");
  if (std::count(run.stages.augment.begin(), run.stages.augment.end(), true)) j["augment"] = true;
  if (r.pretrained) j["pretrained"] = r.pretrained->description;
  if (r.pretrained && r.pretrained->prior_log_std.empty()) j["pretrained_sd"] = r.pretrained_sd;
  j["samples"] = run.samples;
  j.update(run.more);
  return j;
}

json run_experiment(const ExperimentOptions& options, const ExperimentData& data,
                    const std::vector<ExperimentRun>& runs) {
  if (runs.empty()) throw InputError("nothing to run");
  if (data.test.empty()) throw InputError("there are no test images");
  // What the trainers would find out when their turn comes: before anything in `out` is touched.
  for (const ExperimentRun& r : runs) {
    const PosteriorKind& kind = find_posterior(r.training.kind);
    if (!r.pruned.empty() && !kind.pruned_in_runs)
      throw InputError(r.training.kind +
                       " is not pruned within a run: save its models and prune them with baton prune");
    for (int size : r.stages.sizes)
      if (size < 1) throw InputError("a stage has no examples");
    if (data.test.size() != 1 && data.test.size() != size_t(r.stages.tasks()))
      throw InputError("there are " + std::to_string(data.test.size()) + " test sets for " +
                       std::to_string(r.stages.tasks()) + " tasks");
    if (r.training.replicas.size() > 1 && (options.save_models || !r.pruned.empty()))
      throw InputError("models are saved and pruned of one replica at a time");
  }
  return Runner(options, data, runs).run();
}

}  // namespace baton
