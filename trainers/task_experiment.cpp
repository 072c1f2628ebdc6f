#include "trainers/task_experiment.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <numeric>

#include "engine/io/files.h"
#include "engine/io/progress.h"
#include "engine/io/stop.h"
#include "trainers/laplace.h"
#include "trainers/metrics.h"
#include "trainers/task_pruning.h"

namespace baton {

Inference inference_of(const std::string& name) {
  for (Inference i : {Inference::map, Inference::sampled, Inference::softmax, Inference::committee})
    if (name == name_of(i)) return i;
  throw InputError("unknown inference '" + name + "': map, sampled, softmax or committee");
}

const char* name_of(Inference i) {
  switch (i) {
    case Inference::map:
      return "map";
    case Inference::sampled:
      return "sampled";
    case Inference::softmax:
      return "softmax";
    case Inference::committee:
      return "committee";
  }
  return "";
}

double InferenceAccuracies::of(Inference i) const {
  return i == Inference::map ? map : i == Inference::sampled ? sampled : i == Inference::softmax ? softmax : committee;
}

double sampled_accuracy(const std::vector<uint8_t>& chosen, const std::vector<uint8_t>& labels) {
  if (labels.empty() || chosen.empty() || chosen.size() % labels.size() != 0)
    throw InputError("sampled_accuracy: choices of whole draws over the labelled images are expected");
  size_t hits = 0;
  for (size_t i = 0; i < chosen.size(); i++) hits += chosen[i] == labels[i % labels.size()];
  return double(hits) / double(chosen.size());
}

double committee_accuracy(const std::vector<uint8_t>& chosen, const std::vector<uint8_t>& labels, int classes) {
  if (labels.empty() || chosen.empty() || chosen.size() % labels.size() != 0)
    throw InputError("committee_accuracy: choices of whole draws over the labelled images are expected");
  size_t hits = 0;
  std::vector<int> votes(classes);
  for (size_t n = 0; n < labels.size(); n++) {
    std::fill(votes.begin(), votes.end(), 0);
    for (size_t i = n; i < chosen.size(); i += labels.size()) {
      if (chosen[i] >= classes) throw InputError("committee_accuracy: a draw chose a class that is not there");
      votes[chosen[i]]++;
    }
    hits += std::max_element(votes.begin(), votes.end()) - votes.begin() == labels[n];
  }
  return double(hits) / double(labels.size());
}

namespace {

namespace fs = std::filesystem;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

struct Judgement {
  InferenceAccuracies accuracies;
  Metrics metrics;
};

// What is left to do at the step where a run stands, beside going on.
enum class Due { nothing, judgement, end_of_task };

[[noreturn]] void stop() { throw_stopped("the checkpoint is written; --resume goes on from it"); }

class TaskRunner {
 public:
  TaskRunner(const TaskExperimentOptions& options, const TaskData& data, const std::vector<TaskRun>& runs)
      : options_(options),
        data_(data),
        runs_(runs),
        log_(options.out, options.resume),
        folder_(options.out / "checkpoint") {
    make_directories(folder_);
    if (options.resume) load();
    else
      for (const char* name : {"experiment.json", "run.safetensors"}) fs::remove(folder_ / name);
    // A line of an epoch that the checkpoint does not hold will be written again.
    const size_t run = run_;
    const int64_t step = resume_step_;
    log_.truncate_after([&](const json& line) {
      const size_t of = line.value("run", size_t(0));
      return of < run || (of == run && line.value("step", int64_t(0)) <= step);
    });
  }

  json run() {
    long total = 0;
    for (size_t j = 0; j < runs_.size(); j++) {
      if (j == run_) before_run_ = total;
      total += images_of(runs_[j]);
    }
    if (run_ == runs_.size()) before_run_ = total;
    ProgressOptions progress_options;
    progress_options.images_before = before_run_;
    if (resuming_) progress_options.images_before += long(resume_step_) * runs_[run_].plan.batch;
    Progress progress(options_.experiment, total, stderr, progress_options);
    for (; run_ < runs_.size(); run_++) {
      run_one(runs_[run_], progress);
      finished_.push_back(current_);
      current_ = json::object();
      save_state(run_ + 1);
      log_.result(result());
      before_run_ += images_of(runs_[run_]);
      if (run_ + 1 < runs_.size() && stop_requested()) stop();
    }
    progress.finish();
    const json final_result = result();
    log_.result(final_result);
    fs::remove_all(folder_);
    return final_result;
  }

 private:
  static int steps_of(const TaskRun& r, size_t stage) {
    if (!r.sequence.probabilities.empty()) return int(r.sequence.probabilities.size());
    return std::max(1, int(std::ceil(r.plan.epochs * double(r.sequence.examples[stage].size()) / r.plan.batch - 1e-9)));
  }
  static long images_of(const TaskRun& r) {
    long steps = 0;
    for (size_t s = 0; s < r.sequence.examples.size(); s++) steps += steps_of(r, s);
    return steps * r.plan.batch;
  }

  json identity() const {
    json j;
    j["experiment"] = options_.experiment;
    j["dataset"] = {data_.set.name, data_.set.source, data_.set.train.count, data_.test[0].count};
    for (const TaskRun& r : runs_) j["runs"].push_back({r.method, r.label, r.seed, r.settings, images_of(r)});
    return j;
  }
  void save_state(size_t next) {
    json j;
    j["identity"] = identity();
    j["run"] = next;
    j["runs"] = finished_;
    write_file_atomically(folder_ / "experiment.json", j.dump());
  }
  void load() {
    const fs::path path = folder_ / "experiment.json", of_run = folder_ / "run.safetensors";
    if (fs::exists(path)) {
      const std::vector<uint8_t> bytes = read_file(path);
      const json j = json::parse(bytes.begin(), bytes.end(), nullptr, false);
      if (j.is_discarded() || !j.contains("identity")) throw InputError(path.string() + ": not a checkpoint of Baton");
      check_identity(j["identity"], path);
      run_ = j["run"];
      finished_ = j["runs"];
    }
    if (!fs::exists(of_run)) return;
    const TensorFile file = load_safetensors(of_run);
    const auto extra = file.metadata.find("extra");
    const json j = extra == file.metadata.end() ? json() : json::parse(extra->second, nullptr, false);
    if (!j.is_object() || !j.contains("run")) throw InputError(of_run.string() + ": not a checkpoint of an experiment");
    check_identity(j["identity"], of_run);
    resuming_ = j["run"] == run_;  // else it is of a run that has ended since
    if (resuming_) resume_step_ = std::stoll(file.metadata.at("step"));
  }
  void check_identity(const json& found, const fs::path& path) const {
    if (found != identity())
      throw InputError(path.string() + ": --resume finds another experiment here; use its options, or another --out");
  }
  void save_run(TaskTrainer& trainer) {
    json j;
    j["identity"] = identity();
    j["run"] = run_;
    j["current"] = current_;
    j["seconds"] = seconds_;
    j["epoch_seconds"] = epoch_seconds_;
    j["due"] = int(due_);
    j["figures"] = figures_;
    trainer.save(folder_ / "run.safetensors", identity().dump(), j.dump());
    last_save_ = now();
  }

  void run_one(const TaskRun& run, Progress& progress) {
    Arena arena;
    const DeviceImages train = upload_images(device_, arena, data_.set.train, options_.normalisation);
    TaskTrainer trainer(device_, arena, run.network, train, run.sequence, run.plan, run.learner);
    predictors_.clear();
    for (const Images& test : data_.test)
      predictors_.push_back(std::make_unique<Predictor>(device_, arena, run.network,
                                                        upload_images(device_, arena, test, options_.normalisation)));
    arena.freeze();

    int stage = 0;
    if (resuming_) {
      resuming_ = false;
      const json j = json::parse(trainer.restore(folder_ / "run.safetensors", identity().dump()));
      current_ = j["current"];
      seconds_ = j["seconds"];
      epoch_seconds_ = j["epoch_seconds"];
      due_ = Due(int(j["due"]));
      figures_ = j["figures"];
      stage = trainer.stage();
    } else {
      current_ = json::object();
      current_["method"] = run.method;
      current_["label"] = run.label;
      current_["parts"] = run.sequence.tasks();
      current_["seed"] = run.seed;
      current_["settings"] = run.settings;
      current_["parameters"] = trainer.network().layout().parameters();
      current_["inference"] = name_of(run.inference);
      current_["stages"] = json::array();
      seconds_ = epoch_seconds_ = 0;
      due_ = Due::nothing;
    }
    last_save_ = now();
    for (; stage < trainer.stages(); stage++) {
      if (trainer.stage() != stage) {
        if (stage > 0 && run.restart_optimizer) trainer.restart_optimizer();
        trainer.begin_stage(stage);
        seconds_ = 0;
      }
      std::string name = run.label + " seed " + std::to_string(run.seed);
      if (trainer.stages() > 1) name += ", task " + std::to_string(stage + 1) + "/" + std::to_string(trainer.stages());
      progress.stage(name);
      train_stage(run, trainer, progress);
    }
    current_["final_test_accuracy"] = current_["stages"].back()["test_accuracy"];
    if (auto* bgd = dynamic_cast<BgdLearner*>(&trainer.learner())) note_sigma(run, *bgd);
    if (options_.save_models) save_model(run, trainer);
    if (run.pruned.empty()) return;
    try {
      prune(run, trainer);
    } catch (const Stopped&) {  // from the checkpoint of the last judgement it is all done again
      stop();
    }
  }

  // At which steps of a stage it is judged.
  static bool judged_at(const TaskRun& run, const TaskTrainer& trainer, int step) {
    const int steps = trainer.steps_of(trainer.stage());
    if (step == steps) return true;
    if (run.judge_every > 0) {
      const int every = std::max(1, int(std::lround(run.judge_every * trainer.steps_an_epoch(trainer.stage()))));
      return step % every == 0 && steps - step >= every / 2;
    }
    for (int c = 1; c < run.checks; c++)
      if (step == int(int64_t(steps) * c / run.checks)) return true;
    return false;
  }

  void train_stage(const TaskRun& run, TaskTrainer& trainer, Progress& progress) {
    BATON_RANGE("stage");
    const int stage = trainer.stage(), steps = trainer.steps_of(stage), an_epoch = trainer.steps_an_epoch(stage);
    if (due_ != Due::nothing) finish_epoch(run, trainer);
    while (trainer.stage_step() < steps) {
      const int first = trainer.stage_step();
      int last = first + 1;  // to the end of the epoch, or to a judgement
      while (last < steps && last % an_epoch != 0 && !judged_at(run, trainer, last)) last++;
      const double start = now();
      const bool stopped = trainer.advance(last - first) < last - first;
      EpochTotals totals;
      if (!stopped) totals = trainer.take_totals();
      device_.synchronize();
      const double seconds = now() - start;
      seconds_ += seconds;
      epoch_seconds_ += seconds;
      if (stopped) {
        save_run(trainer);
        stop();
      }
      figures_ = json::object();
      for (const auto& [name, value] : trainer.learner().figures()) figures_[name] = value;
      json line;
      line["run"] = run_;
      line["method"] = run.method;
      line["label"] = run.label;
      line["seed"] = run.seed;
      line["stage"] = stage + 1;
      line["epoch"] = double(last) / an_epoch;
      line["step"] = trainer.step();
      line["train_loss"] = totals.loss;
      line["train_accuracy"] = totals.accuracy;
      line.update(figures_);
      line["seconds"] = epoch_seconds_;
      const std::string warning = trainer.warning();
      if (!warning.empty()) {
        line["warning"] = warning;
        current_["warnings"].push_back(warning);
        fprintf(stderr, "\n%s: warning: %s, seed %s: %s\n", options_.experiment.c_str(), run.label.c_str(),
                std::to_string(run.seed).c_str(), warning.c_str());
      }
      log_.epoch(line);
      epoch_seconds_ = 0;
      progress.update(before_run_ + trainer.step() * run.plan.batch, totals.loss, totals.accuracy);
      due_ = last == steps ? Due::end_of_task : judged_at(run, trainer, last) ? Due::judgement : Due::nothing;
      finish_epoch(run, trainer);
    }
  }

  // Does what is due. Where a signal ends that, the checkpoint stands before what was not finished.
  void finish_epoch(const TaskRun& run, TaskTrainer& trainer) {
    const bool judged = due_ != Due::nothing;
    try {
      if (due_ == Due::end_of_task) {
        end_task(run, trainer);
        due_ = Due::judgement;
      }
      if (due_ == Due::judgement) judge(run, trainer);
      due_ = Due::nothing;
    } catch (const Stopped&) {
      save_run(trainer);
      stop();
    }
    if (judged || now() - last_save_ > options_.checkpoint_seconds) save_run(trainer);
  }

  void end_task(const TaskRun& run, TaskTrainer& trainer) {
    auto* point = dynamic_cast<PointLearner*>(&trainer.learner());
    if (!point) return;
    if (point->setup().anchor == Anchor::path) point->consolidate_path();
    if (point->setup().anchor == Anchor::fisher) point->consolidate_fisher(fisher(run, trainer, *point));
  }

  // The mean diagonal Fisher information of the first examples of the task just learned, exact over the labels.
  std::vector<float> fisher(const TaskRun& run, TaskTrainer& trainer, PointLearner& point) {
    const int stage = trainer.stage();
    const auto& examples = trainer.sequence().examples[stage];
    const size_t some = std::min(examples.size(), size_t(std::max(run.fisher_examples, 1)));
    Images images = subset(data_.set.train, std::span(examples).first(some));
    if (!trainer.sequence().pixel_order.empty()) {
      const std::vector<int32_t>& order = trainer.sequence().pixel_order[stage];
      const std::vector<uint8_t> before = images.pixels;
      for (int n = 0; n < images.count; n++)
        for (size_t i = 0; i < order.size(); i++)
          images.pixels[n * order.size() + i] = before[n * order.size() + order[i]];
    }
    NamedWeights weights;
    const ParameterLayout& layout = point.store().layout();
    for (const TensorSpec& t : layout.tensors()) weights[t.name] = point.store().read(device_, "mean", 0, t);
    const int head = trainer.sequence().heads[stage];
    const NetworkFactory make = [&] {
      auto network = run.network();
      network->use_head(head);
      return network;
    };
    const NamedWeights sums =
        curvature_diagonal(device_, make, images, options_.normalisation, weights, Curvature::ggn);
    std::vector<float> flat(layout.stride(), 0.f);
    for (const TensorSpec& t : layout.tensors())
      for (size_t i = 0; i < t.size; i++) flat[t.offset + i] = sums.at(t.name)[i] / float(images.count);
    return flat;
  }

  Judgement judge_task(const TaskRun& run, TaskTrainer& trainer, int task, bool all_ways) {
    Predictor& predictor = *predictors_[predictors_.size() == 1 ? 0 : task];
    const std::vector<uint8_t>& labels = data_.test[data_.test.size() == 1 ? 0 : task].labels;
    const bool continuous = !run.sequence.probabilities.empty();
    predictor.look_as(continuous ? trainer.sequence().heads[0] : trainer.sequence().heads[task],
                      trainer.pixel_order(task));
    Learner& learner = trainer.learner();
    const int classes = trainer.network().classes();
    Judgement j;
    const bool sampled = learner.uncertain() && (all_ways || run.inference != Inference::map);
    const Predictions p =
        predictor.predict(learner, sampled ? run.samples : 0, run.seed * 1000003 + uint64_t(trainer.step()));
    j.metrics = evaluate(p.probability, labels, classes, p.entropy, p.mutual_information);
    j.accuracies.softmax = j.metrics.accuracy;
    j.accuracies.sampled = sampled_accuracy(p.chosen, labels);
    j.accuracies.committee = committee_accuracy(p.chosen, labels, classes);
    j.accuracies.map = j.accuracies.softmax;
    if (sampled && (all_ways || run.inference == Inference::map))
      j.accuracies.map = evaluate(predictor.predict(learner, 0, 0).probability, labels, classes, {}, {}).accuracy;
    return j;
  }

  void judge(const TaskRun& run, TaskTrainer& trainer) {
    const double start = now();
    const int stage = trainer.stage();
    const bool continuous = !run.sequence.probabilities.empty();
    const int tasks = continuous ? trainer.sequence().tasks() : stage + 1;
    const bool all_ways = tasks == 1 || stage + 1 == trainer.stages();  // else those that the run's own inference takes
    json s, by_task = json::array(), ways = json::object();
    InferenceAccuracies mean;
    double nll = 0, ece = 0;
    for (int t = 0; t < tasks; t++) {
      const Judgement j = judge_task(run, trainer, t, all_ways);
      by_task.push_back(j.accuracies.of(run.inference));
      mean.map += j.accuracies.map / tasks;
      mean.sampled += j.accuracies.sampled / tasks;
      mean.softmax += j.accuracies.softmax / tasks;
      mean.committee += j.accuracies.committee / tasks;
      nll += j.metrics.nll / tasks;
      ece += j.metrics.ece / tasks;
    }
    for (Inference i : {Inference::map, Inference::sampled, Inference::softmax, Inference::committee})
      if (all_ways || (i == Inference::map) == (run.inference == Inference::map)) ways[name_of(i)] = mean.of(i);
    s["stage"] = stage + 1;
    s["epoch"] = double(trainer.stage_step()) / trainer.steps_an_epoch(stage);
    s["train_examples"] = trainer.sequence().examples[stage].size();
    s["test_accuracy"] = mean.of(run.inference);
    s["test_nll"] = nll;
    s["test_ece"] = ece;
    s["by_inference"] = ways;
    s["by_task"] = by_task;
    s.update(figures_);
    s["seconds"] = seconds_;
    s["examples_per_second"] = double(trainer.stage_step()) * run.plan.batch / std::max(seconds_, 1e-9);
    s["test_seconds"] = now() - start;
    current_["stages"].push_back(s);
  }

  void note_sigma(const TaskRun& run, BgdLearner& bgd) {
    const SigmaStatistics s = bgd.statistics();
    json& to = current_["sigma"];
    to = {{"initial", bgd.settings().sigma}, {"smallest", s.smallest}, {"median", s.median}, {"largest", s.largest}};
    if (!run.histogram) return;
    int first = 0, last = sd_bins;
    while (first < last && s.histogram[first] == 0) first++;
    while (last > first && s.histogram[last - 1] == 0) last--;
    for (int b = first; b <= last; b++) to["edges"].push_back(sd_bin_edge(b));
    for (int b = first; b < last; b++) to["counts"].push_back(s.histogram[b]);
  }

  void prune(const TaskRun& run, TaskTrainer& trainer) {
    const int task = trainer.sequence().tasks() - 1;
    current_["pruning"] = prune_and_judge(
        device_, trainer.learner(), run.pruned,
        [&] { return 1 - judge_task(run, trainer, task, true).accuracies.of(run.inference); },
        [&](double fraction) {
          if (!options_.save_models) return;
          TensorFile file = model_file(run);
          add_pruned(file, device_, trainer.learner());
          save_safetensors(options_.out / (file_name(run) + "_pruned" + percent(fraction) + ".safetensors"), file);
        });
  }

  static std::string percent(double fraction) {
    char text[16];
    snprintf(text, sizeof text, "%g", 100 * fraction);
    return text;
  }
  static std::string file_name(const TaskRun& run) {
    std::string name = run.label + "_seed" + std::to_string(run.seed);
    for (char& c : name)
      if (!isalnum(static_cast<unsigned char>(c))) c = '_';
    return name;
  }

  TensorFile model_file(const TaskRun& run) const {
    TensorFile file;
    file.metadata["format"] = "baton-posterior-1";
    file.metadata["architecture"] = run.network()->architecture();
    file.metadata["method"] = run.method;
    file.metadata["seed"] = std::to_string(run.seed);
    return file;
  }
  void save_model(const TaskRun& run, TaskTrainer& trainer) {
    TensorFile file = model_file(run);
    Learner& learner = trainer.learner();
    for (const TensorSpec& t : learner.store().layout().tensors()) {
      file.tensors[t.name + ".mean"] = Tensor::of<float>(learner.store().read(device_, "mean", 0, t), t.shape);
      if (!learner.deviations()) continue;
      std::vector<float> sd = learner.store().read(device_, "std", 0, t);
      for (float& s : sd) s = std::log(s);
      file.tensors[t.name + ".log_std"] = Tensor::of<float>(sd, t.shape);
    }
    save_safetensors(options_.out / (file_name(run) + ".safetensors"), file);
  }

  int test_images() const {
    int sum = 0;
    for (const Images& test : data_.test) sum += test.count;
    return sum;
  }

  json result() const {
    json j;
    j["experiment"] = options_.experiment;
    j["preset"] = options_.preset;
    j["dataset"] = {{"name", data_.set.name},
                    {"source", data_.set.source},
                    {"generated", data_.set.generated},
                    {"train", data_.set.train.count},
                    {"test", test_images()}};
    j["device"] = device_.description();
    j["peak_device_bytes"] = device_.peak_bytes();
    j["settings"] = options_.extra;
    j["runs"] = finished_;
    return j;
  }

  const TaskExperimentOptions& options_;
  const TaskData& data_;
  const std::vector<TaskRun>& runs_;
  RunLog log_;
  fs::path folder_;
  Device device_;
  std::vector<std::unique_ptr<Predictor>> predictors_;
  size_t run_ = 0;
  json finished_ = json::array(), current_ = json::object();
  double seconds_ = 0, epoch_seconds_ = 0, last_save_ = 0;  // of the task, of its epoch under way
  Due due_ = Due::nothing;
  json figures_ = json::object();  // the learner's, at the end of the newest epoch
  bool resuming_ = false;
  int64_t resume_step_ = 0;
  long before_run_ = 0;  // images
};

}  // namespace

json run_task_experiment(const TaskExperimentOptions& options, const TaskData& data, const std::vector<TaskRun>& runs) {
  if (runs.empty()) throw InputError("nothing to run");
  if (data.test.empty()) throw InputError("there are no test images");
  // What the trainers would find out when their turn comes: before anything in `out` is touched.
  for (const TaskRun& r : runs)
    for (const auto& examples : r.sequence.examples)
      if (examples.empty()) throw InputError("a task has no examples");
  for (const TaskRun& r : runs)
    if (data.test.size() != 1 && data.test.size() != size_t(r.sequence.tasks()))
      throw InputError("there are " + std::to_string(data.test.size()) + " test sets for " +
                       std::to_string(r.sequence.tasks()) + " tasks");
  return TaskRunner(options, data, runs).run();
}

std::string task_table_of(const json& result) {
  struct Row {
    std::vector<double> accuracy, map, softmax, committee, nll;
    double seconds = 0;
  };
  std::vector<std::string> order;
  std::map<std::string, Row> rows;
  for (const json& run : result["runs"]) {
    const std::string key = run["label"];
    if (!rows.count(key)) order.push_back(key);
    Row& row = rows[key];
    const json& last = run["stages"].back();
    row.accuracy.push_back(last["test_accuracy"]);
    row.map.push_back(last["by_inference"]["map"]);
    row.softmax.push_back(last["by_inference"]["softmax"]);
    row.committee.push_back(last["by_inference"]["committee"]);
    row.nll.push_back(last["test_nll"]);
    for (const json& s : run["stages"]) row.seconds += double(s["test_seconds"]);
    for (size_t i = 0; i < run["stages"].size(); i++)  // a stage's seconds grow from judgement to judgement
      if (i + 1 == run["stages"].size() || run["stages"][i + 1]["stage"] != run["stages"][i]["stage"])
        row.seconds += double(run["stages"][i]["seconds"]);
  }
  std::string text =
      "run                     seeds  test error %      MAP   mean softmax  committee     NLL      time\n"
      "-------------------------------------------------------------------------------------------------\n";
  for (const std::string& key : order) {
    const Row& row = rows[key];
    const auto error = [](const std::vector<double>& accuracy) { return 100 * (1 - mean_and_spread(accuracy).mean); };
    const MeanAndSpread a = mean_and_spread(row.accuracy);
    char line[200], spread[24] = "";
    if (a.n > 1) snprintf(spread, sizeof spread, "+- %.2f", 100 * a.sd);
    snprintf(line, sizeof line, "%-22s %6zu  %6.2f %-8s %7.2f %14.2f %10.2f %7.4f %8.1fs\n", key.c_str(), a.n,
             error(row.accuracy), spread, error(row.map), error(row.softmax), error(row.committee),
             mean_and_spread(row.nll).mean, row.seconds);
    text += line;
  }
  return text;
}

}  // namespace baton
