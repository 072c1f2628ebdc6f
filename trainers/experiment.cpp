#include "trainers/experiment.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <sstream>

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

// A run under way: what a checkpoint must say besides the trainer's own state.
struct Learner {
  size_t number = 0;                            // of the run
  json result;                                  // with the stages so far
  double stage_seconds = 0, epoch_seconds = 0;  // its share of training, in the stage and the epoch under way
  Due due = Due::nothing;
  json figures = json::object();  // the posterior's, at the end of the newest epoch
};

void to_json(json& j, const Learner& l) {
  j = {l.number, l.result, l.stage_seconds, l.epoch_seconds, int(l.due), l.figures};
}
void from_json(const json& j, Learner& l) { l = {j[0], j[1], j[2], j[3], Due(int(j[4])), j[5]}; }

// What runs that train side by side have in common; a run that trains alone has its place there.
json describe_steps(const ExperimentRun& run, size_t place) {
  const Stages& s = run.stages;
  const PosteriorKind& kind = find_posterior(run.training.kind);
  const auto augmented = std::count(s.augment.begin(), s.augment.end(), true);
  const bool alone = !kind.many_replicas || !run.pruned.empty() || !s.heads.empty() || !s.pixel_order.empty() ||
                     (augmented > 0 && augmented < s.count());
  return {run.network.description(),   kind.name,     run.training.batch,
          run.training.epochs,         augmented > 0, common_settings(kind, run.training.replicas[0].settings),
          alone ? json(place) : json()};
}

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
      return of < next_ || (of < next_ + count_together(next_) && line.value("step", int64_t(0)) <= resume_step_);
    });
  }

  json run() {
    long total = 0;
    for (const ExperimentRun& r : runs_) total += count_images(r);
    for (size_t i = 0; i < next_; i++) before_ += count_images(runs_[i]);
    ProgressOptions progress_options;
    progress_options.images_before = before_;
    for (size_t i = next_; resuming_ && i < next_ + count_together(next_); i++)
      progress_options.images_before += std::min(count_images(runs_[i]), long(resume_step_) * runs_[i].training.batch);
    Progress progress(options_.experiment, total, stderr, progress_options);
    progress_ = &progress;
    while (next_ < runs_.size()) {
      run_together(count_together(next_));
      for (const Learner& l : learners_) {
        finished_.push_back(l.result);
        before_ += count_images(runs_[l.number]);
      }
      next_ += learners_.size();
      const json state{{"identity", identity_}, {"run", next_}, {"finished", finished_}};
      write_file_atomically(state_path(), state.dump());
      log_.result(result());
      if (next_ < runs_.size() && stop_requested())
        throw_stopped("the checkpoint is written; --resume goes on from it");
    }
    progress.finish();
    const json final_result = result();
    log_.result(final_result);
    fs::remove_all(folder_);
    return final_result;
  }

 private:
  // How many of the runs from this one on train side by side.
  size_t count_together(size_t first) const {
    const size_t most = options_.save_models ? 1 : options_.at_once ? size_t(options_.at_once) : on_gpu ? SIZE_MAX : 1;
    size_t last = first;
    while (last < runs_.size() && last - first < most &&
           describe_steps(runs_[last], last) == describe_steps(runs_[first], first))
      last++;
    return last - first;
  }
  static long count_images(const ExperimentRun& r) {
    long steps = long(r.stages.probabilities.size());
    if (!r.stages.continuous())
      for (int size : r.stages.sizes) steps += count_steps(r.training.epochs, size, r.training.batch);
    return steps * r.training.batch;
  }

  // ------------------------------------------------------------------------------------------------- checkpoints
  fs::path state_path() const { return folder_ / "experiment.json"; }
  json make_identity() const {
    json j;
    j["experiment"] = options_.experiment;
    j["dataset"] = {data_.set.name, data_.set.source, data_.set.train.count, data_.test[0].count};
    if (options_.precision != Precision::fp32) j["precision"] = name(options_.precision);
    j["at_once"] = options_.at_once;
    for (const ExperimentRun& r : runs_)
      j["runs"].push_back({r.method, r.label, r.network.description(), r.stages.tasks(), r.samples, r.stage_samples,
                           count_images(r), r.training.replicas[0].seed, describe_settings(r)});
    return j;
  }
  json describe_run() const { return {{"identity", identity_}, {"run", next_}, {"learners", learners_}}; }
  void find_progress() {
    if (const json state = left_by_earlier_run(state_path(), identity_); !state.is_null()) {
      next_ = state["run"];
      finished_ = state["finished"];
    }
    const json run = left_by_earlier_run(checkpoints_.path(), identity_);
    resuming_ = !run.is_null() && run["run"] == next_;  // else it is of runs that have ended since
    if (!resuming_) return;
    std::istringstream steps(load_safetensors(checkpoints_.path()).metadata.at("step"));
    for (std::string step; std::getline(steps, step, ',');) resume_step_ = std::max<int64_t>(resume_step_, stoll(step));
  }

  // ----------------------------------------------------------------------------------------------------------- runs
  void run_together(size_t count) {
    Arena arena;
    const ExperimentRun& first = runs_[next_];
    const NetworkFactory make = network_factory(first.network);
    const DeviceImages train = upload_images(device_, arena, data_.set.train, options_.normalisation);
    TrainingSettings training = first.training;
    training.replicas.clear();
    std::vector<Stages> stages;
    learners_.clear();
    for (size_t i = next_; i < next_ + count; i++) {
      training.replicas.push_back(runs_[i].training.replicas[0]);
      stages.push_back(runs_[i].stages);
      learners_.emplace_back().number = i;
    }
    Trainer trainer(device_, arena, make, train, stages, training);
    predictors_.clear();
    for (const Images& test : data_.test)
      predictors_.push_back(std::make_unique<Predictor>(device_, arena, make,
                                                        upload_images(device_, arena, test, options_.normalisation)));
    arena.freeze();

    if (std::exchange(resuming_, false)) {
      learners_ = json::parse(trainer.restore(checkpoints_.path()))["learners"].get<std::vector<Learner>>();
      name_progress(trainer, 0);
    } else {
      for (Learner& l : learners_) l.result = begin_result(runs_[l.number], trainer);
    }
    do_what_is_due(trainer);
    LearningLoop loop;
    loop.begin = [&](int g) {
      learners_[size_t(g)].stage_seconds = 0;
      name_progress(trainer, g);
    };
    loop.next_look = [&](int g, int at) {
      const int steps = trainer.count_steps(trainer.stage(g), g),
                an_epoch = trainer.count_epoch_steps(trainer.stage(g), g);
      int last = at + 1;  // to the end of the epoch, or to a measurement
      while (last < steps && last % an_epoch != 0 && !is_measured(trainer, g, last)) last++;
      return last;
    };
    loop.add_seconds = [&](int g, double seconds) {
      learners_[size_t(g)].stage_seconds += seconds, learners_[size_t(g)].epoch_seconds += seconds;
    };
    loop.look = [&](const std::vector<Look>& looks) {
      log_epochs(trainer, looks);
      for (const Look& l : looks)
        if (is_measured(trainer, l.group, trainer.stage_step(l.group)))
          learners_[size_t(l.group)].due = trainer.stage_ended(l.group) ? Due::end_of_stage : Due::measurement;
      do_what_is_due(trainer);
    };
    learn(trainer, checkpoints_, loop);

    const json sigma = trainer.posterior().describe_sigma(first.histogram);
    for (Learner& l : learners_) {
      l.result["final_test_accuracy"] = l.result["stages"].back()["test_accuracy"];
      if (!sigma.is_null()) l.result["sigma"] = sigma;
    }
    if (options_.save_models) save_model(make_model(first, trainer), first, "");
    if (!first.pruned.empty()) prune(first, trainer);
  }

  void name_progress(const Trainer& trainer, int group) {
    const ExperimentRun& run = runs_[learners_[size_t(group)].number];
    std::string name = run.label + " seed " + std::to_string(run.training.replicas[0].seed);
    if (run.stages.count() > 1)
      name += ", stage " + std::to_string(trainer.stage(group) + 1) + "/" + std::to_string(run.stages.count());
    if (learners_.size() > 1) name += ", " + std::to_string(learners_.size()) + " side by side";
    progress_->stage(name);
  }

  static json name_run(const ExperimentRun& run) {
    return {{"method", run.method},
            {"label", run.label},
            {"parts", run.stages.tasks()},
            {"seed", run.training.replicas[0].seed}};
  }
  static json begin_result(const ExperimentRun& run, Trainer& trainer) {
    json j = name_run(run);
    j["settings"] = describe_settings(run);
    j["parameters"] = trainer.network().layout().parameters();
    j["split_hash"] = hash_text(index_hash(run.stages.order[0]));
    if (run.inference) j["inference"] = name(*run.inference);
    j["stages"] = json::array();
    return j;
  }

  // Whether a stage is measured after this step.
  bool is_measured(const Trainer& trainer, int group, int step) const {
    const ExperimentRun& run = runs_[learners_[size_t(group)].number];
    const int steps = trainer.count_steps(trainer.stage(group), group);
    if (step == steps) return true;
    if (run.measure_every > 0) {
      const int an_epoch = trainer.count_epoch_steps(trainer.stage(group), group);
      const int every = std::max(1, int(std::lround(run.measure_every * an_epoch)));
      return step % every == 0 && steps - step >= every / 2;
    }
    for (int c = 1; c < run.checks; c++)
      if (step == int(int64_t(steps) * c / run.checks)) return true;
    return false;
  }

  static double count_epochs(const Trainer& trainer, int group) {
    return double(trainer.stage_step(group)) / trainer.count_epoch_steps(trainer.stage(group), group);
  }

  void log_epochs(Trainer& trainer, const std::vector<Look>& looks) {
    const Figures figures = trainer.posterior().figures();
    const std::string warning = trainer.take_warning();
    double loss = 0, accuracy = 0;
    for (const Look& look : looks) {
      Learner& learner = learners_[size_t(look.group)];
      const ExperimentRun& run = runs_[learner.number];
      const EpochTotals& totals = look.totals[0];
      learner.figures = json::object();
      for (const auto& [name, value] : figures) learner.figures[name] = value;
      json line;
      line["run"] = learner.number;
      line.update(name_run(run));
      line["stage"] = trainer.stage(look.group) + 1;
      line["epoch"] = count_epochs(trainer, look.group);
      line["step"] = trainer.step(look.group);
      line["train_loss"] = totals.loss;
      line["train_accuracy"] = totals.accuracy;
      if (!totals.kl_by_name.empty()) {
        line["kl"] = totals.kl;
        line["kl_by_layer"] = sum_by_layer(trainer.posterior().kl_names(), totals.kl_by_name);
      }
      line.update(learner.figures);
      line["seconds"] = learner.epoch_seconds;
      learner.epoch_seconds = 0;
      if (!warning.empty()) {
        line["warning"] = warning;
        learner.result["warnings"].push_back(warning);
        fprintf(stderr, "\n%s: warning: %s, seed %s: %s\n", options_.experiment.c_str(), run.label.c_str(),
                std::to_string(run.training.replicas[0].seed).c_str(), warning.c_str());
      }
      log_.epoch(line);
      loss += totals.loss / double(looks.size());
      accuracy += totals.accuracy / double(looks.size());
    }
    long done = before_;
    for (int g = 0; g < trainer.groups(); g++) done += long(trainer.step(g)) * trainer.settings().batch;
    progress_->update(done, loss, accuracy);
  }

  // Where a signal ends this, the checkpoint stands before what was not finished.
  void do_what_is_due(Trainer& trainer) {
    const auto is_due = [](const Learner& l) { return l.due != Due::nothing; };
    if (std::none_of(learners_.begin(), learners_.end(), is_due)) return;
    checkpoints_.keep_through(trainer, [&] {
      Posterior& posterior = trainer.posterior();
      for (Learner& l : learners_)
        if (l.due == Due::end_of_stage) {
          posterior.end_stage([&](int examples) { return find_fisher(runs_[l.number], trainer, examples); });
          l.due = Due::measurement;
        }
      const std::vector<std::vector<double>> kl = posterior.kl_by_name();
      const std::vector<double> log_std = posterior.mean_log_std();
      for (size_t g = 0; g < learners_.size(); g++) {
        if (!is_due(learners_[g])) continue;
        measure(trainer, g, kl[g], log_std.empty() ? std::nullopt : std::optional(log_std[g]));
        learners_[g].due = Due::nothing;
      }
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

  void measure(Trainer& trainer, size_t group, const std::vector<double>& kl, std::optional<double> log_std) {
    Learner& learner = learners_[group];
    const ExperimentRun& run = runs_[learner.number];
    const int g = int(group), stage = trainer.stage(g);
    const double start = seconds_now();
    json s;
    s["stage"] = stage + 1;
    s["epoch"] = count_epochs(trainer, g);
    s["train_examples"] = run.stages.sizes[size_t(stage)];
    add_measurements(s, run, trainer, g, count_measured(run, stage));
    if (!kl.empty()) {
      s["kl"] = std::accumulate(kl.begin(), kl.end(), 0.0);
      s["kl_by_layer"] = sum_by_layer(trainer.posterior().kl_names(), kl);
    }
    if (log_std) s["mean_log_std"] = *log_std;
    s.update(learner.figures);
    s["seconds"] = learner.stage_seconds;
    s["examples_per_second"] =
        double(trainer.stage_step(g)) * run.training.batch / std::max(learner.stage_seconds, 1e-9);
    s["test_seconds"] = seconds_now() - start;
    learner.result["stages"].push_back(s);
  }

  // all_ways: by every inference; else by those that come with the run's own.
  Measurement measure_task(const ExperimentRun& run, Trainer& trainer, int group, int task, bool all_ways) {
    const size_t set = predictors_.size() == 1 ? 0 : size_t(task);
    predictors_[set]->look_as(trainer.stages().heads[size_t(run.stages.continuous() ? 0 : task)],
                              trainer.pixel_order(task));
    const uint64_t seed = run.training.replicas[0].seed;
    const int stage = trainer.stage(group);
    const int samples = stage + 1 == run.stages.count() ? run.samples : run.stage_samples;
    // The draws are numbered as they always were, so that results repeat.
    const uint64_t draws =
        run.inference ? seed * 1000003 + uint64_t(trainer.step(group)) : seed * 1000 + uint64_t(stage);
    return baton::measure(*predictors_[set], trainer.posterior(), group, data_.test[set].labels,
                          trainer.network().classes(), run.inference, all_ways, samples, draws);
  }

  void add_measurements(json& s, const ExperimentRun& run, Trainer& trainer, int group, int tasks) {
    const bool all_ways = run.inference && (tasks == 1 || trainer.stage(group) + 1 == run.stages.count());
    const Inference own = run.inference.value_or(Inference::softmax);
    json by_task = json::array(), by_inference = json::object();
    Measurement mean;
    for (int t = 0; t < tasks; t++) {
      const Measurement m = measure_task(run, trainer, group, t, all_ways);
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
      learners_[0].result["pruning"] = prune_and_judge(device_, trainer.posterior(), run.pruned, error, keep_pruned);
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
    j["runs"] = finished_;
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
  size_t next_ = 0;                // the first of the runs under way
  std::vector<Learner> learners_;  // those: each is a group of the trainer
  json finished_ = json::array();  // results of the runs before
  bool resuming_ = false;
  int64_t resume_step_ = 0;
  long before_ = 0;  // images of the runs before
};

}  // namespace

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
    if (r.training.replicas.size() != 1 || r.stages.order.size() != 1)
      throw InputError("a run has one replica; runs train side by side");
  }
  return Runner(options, data, runs).run();
}

}  // namespace baton
