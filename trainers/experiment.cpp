#include "trainers/experiment.h"

#include <chrono>
#include <cmath>
#include <map>
#include <numeric>

#include "engine/io/files.h"
#include "engine/io/progress.h"
#include "engine/io/stop.h"
#include "trainers/metrics.h"
#include "trainers/parse.h"

namespace baton {

namespace {

namespace fs = std::filesystem;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// One job under way: what its checkpoint must say besides the trainer's own state.
struct Progression {
  size_t job = 0;
  json runs = json::array();     // finished jobs'
  json current = json::array();  // this job's, one a seed, with the stages so far
  double stage_seconds = 0;      // of training, in the stage under way
  double epoch_seconds = 0;      // and in its epoch under way
};

[[noreturn]] void stop() { throw_stopped("the checkpoint is written; --resume goes on from it"); }

class Runner {
 public:
  Runner(const ExperimentOptions& options, const Dataset& data, const NetworkFactory& make,
         const std::vector<Job>& jobs)
      : options_(options),
        data_(data),
        make_(make),
        jobs_(jobs),
        log_(options.out, options.resume),
        folder_(options.out / "checkpoint") {
    make_directories(folder_);
    if (options.resume) load();
    else
      for (const char* name : {"experiment.json", "job.safetensors"}) fs::remove(folder_ / name);
    // A line of an epoch that the checkpoint does not hold will be written again.
    const size_t job = at_.job;
    const int64_t step = resume_step_;
    log_.truncate_after([&](const json& line) {
      const size_t of = line.value("job", size_t(0));
      return of < job || (of == job && line.value("step", int64_t(0)) <= step);
    });
  }

  json run() {
    long total = 0;
    for (size_t j = 0; j < jobs_.size(); j++) {
      if (j == at_.job) before_job_ = total;
      total += images_of(jobs_[j]);
    }
    if (at_.job == jobs_.size()) before_job_ = total;
    ProgressOptions progress_options;
    progress_options.images_before = before_job_;
    if (resuming_job_) progress_options.images_before += resume_step_ * images_a_step(jobs_[at_.job]);
    Progress progress(options_.experiment, total, stderr, progress_options);
    for (; at_.job < jobs_.size(); at_.job++) {
      run_job(jobs_[at_.job], progress);
      for (const json& r : at_.current) at_.runs.push_back(r);
      at_.current = json::array();
      Progression next = at_;
      next.job++;
      save_state(next);
      log_.result(result());
      before_job_ += images_of(jobs_[at_.job]);
      if (next.job < jobs_.size() && stop_requested()) stop();
    }
    progress.finish();
    const json final_result = result();
    log_.result(final_result);
    fs::remove_all(folder_);
    return final_result;
  }

 private:
  std::vector<int> part_sizes(int parts) const {
    std::vector<int> sizes;
    for (const auto& part : split_parts(data_.train.count, parts, 0)) sizes.push_back(int(part.size()));
    return sizes;
  }
  static long images_a_step(const Job& job) { return long(job.plan.batch) * long(job.plan.seeds.size()); }
  long images_of(const Job& job) const {
    long steps = 0;
    for (int size : part_sizes(job.parts))
      steps += std::max(1L, std::lround(std::ceil(job.plan.epochs * size / job.plan.batch - 1e-9)));
    return steps * images_a_step(job);
  }

  json identity() const {
    json j;
    j["experiment"] = options_.experiment;
    j["dataset"] = {data_.name, data_.source, data_.train.count, data_.test.count};
    j["samples"] = {options_.samples, options_.stage_samples};
    for (const Job& job : jobs_) {
      json one;
      for (size_t r = 0; r < job.plan.seeds.size(); r++) one["settings"].push_back(settings_json(job, options_, r));
      one["method"] = job.method;
      one["parts"] = job.parts;
      one["seeds"] = job.plan.seeds;
      j["jobs"].push_back(one);
    }
    return j;
  }
  void save_state(const Progression& at) {
    json j;
    j["identity"] = identity();
    j["job"] = at.job;
    j["runs"] = at.runs;
    write_file_atomically(folder_ / "experiment.json", j.dump());
  }
  void load() {
    const fs::path path = folder_ / "experiment.json";
    if (!fs::exists(path)) {
      if (fs::exists(folder_ / "job.safetensors")) {
        resuming_job_ = true;  // killed in its first job
        peek_job();
      }
      return;
    }
    const std::vector<uint8_t> bytes = read_file(path);
    const json j = json::parse(bytes.begin(), bytes.end(), nullptr, false);
    if (j.is_discarded() || !j.contains("identity")) throw InputError(path.string() + ": not a checkpoint of Baton");
    check_identity(j["identity"], path);
    at_.job = j["job"];
    at_.runs = j["runs"];
    if (fs::exists(folder_ / "job.safetensors")) {
      resuming_job_ = true;
      peek_job();
    }
  }
  // The job's checkpoint counts when it is of the job that comes next; an older one is of a job that has ended since.
  void peek_job() {
    const fs::path path = folder_ / "job.safetensors";
    const TensorFile file = load_safetensors(path);
    const auto extra = file.metadata.find("extra");
    const json j = extra == file.metadata.end() ? json() : json::parse(extra->second, nullptr, false);
    if (!j.is_object() || !j.contains("job")) throw InputError(path.string() + ": not a checkpoint of an experiment");
    check_identity(j["identity"], path);
    resuming_job_ = j["job"] == at_.job;
    if (resuming_job_) resume_step_ = std::stoll(file.metadata.at("step"));
  }
  void check_identity(const json& found, const fs::path& path) const {
    if (found != identity())
      throw InputError(path.string() + ": --resume finds another experiment here; use its options, or another --out");
  }

  void save_job(IncrementalTrainer& trainer) {
    json j;
    j["identity"] = identity();
    j["job"] = at_.job;
    j["current"] = at_.current;
    j["stage_seconds"] = at_.stage_seconds;
    j["epoch_seconds"] = at_.epoch_seconds;
    trainer.save(folder_ / "job.safetensors", j.dump());
    last_save_ = now();
  }

  void run_job(const Job& job, Progress& progress) {
    Arena arena;
    const int replicas = int(job.plan.seeds.size());
    std::vector<std::vector<int32_t>> order(replicas);
    std::vector<int> sizes;
    std::vector<std::string> hashes;
    for (int r = 0; r < replicas; r++) {
      sizes.clear();
      for (const auto& part : split_parts(data_.train.count, job.parts, job.plan.seeds[r])) {
        order[r].insert(order[r].end(), part.begin(), part.end());
        sizes.push_back(int(part.size()));
      }
      char text[32];
      snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(index_hash(order[r])));
      hashes.push_back(text);
    }
    const DeviceImages train = upload_images(device_, arena, data_.train, options_.normalisation);
    IncrementalTrainer trainer(device_, arena, make_, train, job.plan, order, sizes);
    Predictor predictor(device_, arena, make_, upload_images(device_, arena, data_.test, options_.normalisation));
    arena.freeze();

    int stage = 0;
    if (resuming_job_) {
      resuming_job_ = false;
      const json j = json::parse(trainer.restore(folder_ / "job.safetensors"));
      at_.current = j["current"];
      at_.stage_seconds = j["stage_seconds"];
      at_.epoch_seconds = j["epoch_seconds"];
      stage = trainer.stage();
      if (int(at_.current[0]["stages"].size()) > stage) stage++, at_.stage_seconds = 0;  // it had been judged
    } else {
      at_.current = json::array();
      at_.stage_seconds = at_.epoch_seconds = 0;
      for (int r = 0; r < replicas; r++) {
        json run;
        run["method"] = job.method;
        run["parts"] = job.parts;
        run["seed"] = job.plan.seeds[r];
        run["settings"] = settings_json(job, options_, size_t(r));
        run["split_hash"] = hashes[r];
        run["stages"] = json::array();
        at_.current.push_back(run);
      }
    }
    last_save_ = now();
    for (; stage < trainer.stages(); stage++) {
      if (trainer.stage() != stage) {
        trainer.begin_stage(stage);
        at_.stage_seconds = 0;
      }
      progress.stage(label_of(job) + " " + std::to_string(stage + 1) + "/" + std::to_string(job.parts));
      train_stage(job, trainer, progress);
      try {
        judge_stage(job, trainer, predictor);
      } catch (const Stopped&) {  // it will be judged when it is resumed
        save_job(trainer);
        stop();
      }
      save_job(trainer);
    }
    for (json& run : at_.current) run["final_test_accuracy"] = run["stages"].back()["test_accuracy"];
  }

  static std::string label_of(const Job& job) { return job.method + " T=" + std::to_string(job.parts); }

  void train_stage(const Job& job, IncrementalTrainer& trainer, Progress& progress) {
    BATON_RANGE("stage");
    const int stage = trainer.stage(), steps = trainer.steps_of(stage), an_epoch = trainer.steps_an_epoch(stage);
    int step_before = 0;
    for (int s = 0; s < stage; s++) step_before += trainer.steps_of(s);
    while (trainer.stage_step() < steps) {
      const int count = std::min(an_epoch - trainer.stage_step() % an_epoch, steps - trainer.stage_step());
      const double start = now();
      const bool stopped = trainer.advance(count) < count;
      std::vector<EpochTotals> totals;
      if (!stopped) totals = trainer.take_totals();
      device_.synchronize();
      const double seconds = now() - start;
      at_.stage_seconds += seconds;
      at_.epoch_seconds += seconds;
      if (stopped) {
        save_job(trainer);
        stop();
      }
      double loss = 0, accuracy = 0;
      for (size_t r = 0; r < totals.size(); r++) {
        json line;
        line["job"] = at_.job;
        line["method"] = job.method;
        line["parts"] = job.parts;
        line["seed"] = job.plan.seeds[r];
        line["stage"] = stage + 1;
        line["epoch"] = (trainer.stage_step() + an_epoch - 1) / an_epoch;
        line["step"] = step_before + trainer.stage_step();
        line["train_loss"] = totals[r].loss;
        line["train_accuracy"] = totals[r].accuracy;
        line["kl"] = totals[r].kl;
        if (job.plan.posterior.family != Family::point) line["kl_by_layer"] = by_layer(trainer, totals[r].kl_by_name);
        line["seconds"] = at_.epoch_seconds;
        log_.epoch(line);
        loss += totals[r].loss / double(totals.size());
        accuracy += totals[r].accuracy / double(totals.size());
      }
      at_.epoch_seconds = 0;
      progress.update(before_job_ + (step_before + trainer.stage_step()) * images_a_step(job), loss, accuracy);
      if (now() - last_save_ > options_.checkpoint_seconds) save_job(trainer);
    }
  }

  // Sums over a layer's tensors and its z, in the order of the layers.
  static json by_layer(IncrementalTrainer& trainer, const std::vector<double>& kl) {
    json layers = json::object();
    const std::vector<std::string>& names = trainer.posterior().kl_names();
    for (size_t i = 0; i < names.size(); i++) {
      const std::string layer = names[i].substr(0, names[i].rfind('.'));
      layers[layer] = layers.value(layer, 0.0) + kl[i];
    }
    return layers;
  }

  void judge_stage(const Job& job, IncrementalTrainer& trainer, Predictor& predictor) {
    const int stage = trainer.stage();
    const bool last = stage + 1 == trainer.stages();
    const std::vector<std::vector<double>> kl = trainer.posterior().kl_by_name();
    const std::vector<double> log_std = trainer.posterior().mean_log_std();
    std::vector<json> judged;
    for (size_t r = 0; r < at_.current.size(); r++) {
      const int samples = job.plan.posterior.family == Family::point ? 0
                          : last                                     ? options_.samples
                                                                     : options_.stage_samples;
      const double start = now();
      const Predictions p = predictor.predict(trainer.posterior(), int(r), samples, job.plan.seeds[r] * 1000 + stage);
      const Metrics m = evaluate(p.probability, data_.test.labels, data_.test.classes, p.entropy, p.mutual_information);
      json s;
      s["stage"] = stage + 1;
      s["train_examples"] = trainer.part_size(stage);
      s["test_accuracy"] = m.accuracy;
      s["test_nll"] = m.nll;
      s["test_ece"] = m.ece;
      s["predictive_entropy"] = m.entropy;
      s["mutual_information"] = m.mutual_information;
      s["samples"] = samples;
      s["kl"] = std::accumulate(kl[r].begin(), kl[r].end(), 0.0);
      if (job.plan.posterior.family != Family::point) s["kl_by_layer"] = by_layer(trainer, kl[r]);
      s["mean_log_std"] = job.plan.posterior.family == Family::point ? json() : json(log_std[r]);
      s["seconds"] = at_.stage_seconds;
      s["examples_per_second"] = double(trainer.steps_of(stage)) * job.plan.batch * double(at_.current.size()) /
                                 std::max(at_.stage_seconds, 1e-9);
      s["test_seconds"] = now() - start;
      judged.push_back(s);
    }
    for (size_t r = 0; r < judged.size(); r++) at_.current[r]["stages"].push_back(judged[r]);  // all or none
  }

  json result() const {
    json j;
    j["experiment"] = options_.experiment;
    j["preset"] = options_.preset;
    j["dataset"] = {{"name", data_.name},
                    {"source", data_.source},
                    {"generated", data_.generated},
                    {"train", data_.train.count},
                    {"test", data_.test.count}};
    j["device"] = device_.description();
    j["peak_device_bytes"] = device_.peak_bytes();
    j["settings"] = {{"samples", options_.samples}, {"stage_samples", options_.stage_samples}};
    j["settings"].update(options_.extra);
    j["runs"] = at_.runs;
    return j;
  }

  const ExperimentOptions& options_;
  const Dataset& data_;
  const NetworkFactory& make_;
  const std::vector<Job>& jobs_;
  RunLog log_;
  fs::path folder_;
  Device device_;
  Progression at_;
  bool resuming_job_ = false;
  int64_t resume_step_ = 0;
  long before_job_ = 0;  // images
  double last_save_ = 0;
};

}  // namespace

json settings_json(const Job& job, const ExperimentOptions& options, size_t replica) {
  const TrainingSettings& s = job.plan.settings.at(replica);
  json j;
  j["epochs"] = job.plan.epochs;
  j["batch"] = job.plan.batch;
  j["lr"] = s.lr;
  j["schedule"] = name_of(s.schedule);
  if (job.plan.augment) j["augment"] = true;
  if (s.pretrained) j["pretrained"] = s.pretrained->description;
  if (job.plan.posterior.family == Family::point) return j;
  const PosteriorOptions& o = job.plan.posterior;
  if (o.family == Family::channel || o.family == Family::multiplicative) j["groups"] = o.groups;
  if (o.family == Family::channel && o.moments) j["moments"] = true;
  if (o.family == Family::multiplicative) {
    j["flow"] = name_of(o.flow);
    j["flow_steps"] = o.flow_steps;
    j["flow_hidden"] = o.flow_hidden;
    j["z"] = o.z_per_filter ? "per filter" : "per filter and channel";
    j["fixed_base"] = o.fixed_base;
    j["path_gradient"] = o.path_gradient;
    j["z_log_std"] = o.z_log_std;
  }
  j["scale_rule"] = name_of(job.plan.scale_rule);
  j["lr_scale"] = s.lr_scale;
  j["prior_sd"] = s.prior_sd;
  if (s.pretrained && s.pretrained->prior_log_std.empty()) j["pretrained_sd"] = s.pretrained_sd;
  j["init_log_std"] = s.init_log_std;
  j["beta"] = s.beta;
  j["warmup_epochs"] = s.warmup_epochs;
  j["samples"] = options.samples;
  return j;
}

json run_experiment(const ExperimentOptions& options, const Dataset& data, const NetworkFactory& make,
                    const std::vector<Job>& jobs) {
  for (const Job& job : jobs) split_parts(data.train.count, job.parts, 0);  // more parts than images is known at once
  return Runner(options, data, make, jobs).run();
}

std::string table_of(const json& result) {
  struct Row {
    std::vector<double> accuracy, nll, ece;
    double seconds = 0;
  };
  std::vector<std::pair<std::string, int>> order;
  std::map<std::pair<std::string, int>, Row> rows;
  for (const json& run : result["runs"]) {
    const std::pair<std::string, int> key{run["method"], run["parts"]};
    if (!rows.count(key)) order.push_back(key);
    Row& row = rows[key];
    const json& last = run["stages"].back();
    row.accuracy.push_back(last["test_accuracy"]);
    row.nll.push_back(last["test_nll"]);
    row.ece.push_back(last["test_ece"]);
    for (const json& s : run["stages"]) row.seconds += double(s["seconds"]) + double(s["test_seconds"]);
  }
  std::string text =
      "method         T  seeds  test accuracy        NLL     ECE     time\n"
      "-------------------------------------------------------------------\n";
  for (const auto& key : order) {
    const Row& row = rows[key];
    const MeanAndSpread a = mean_and_spread(row.accuracy), n = mean_and_spread(row.nll), e = mean_and_spread(row.ece);
    char line[160], spread[24] = "";
    if (a.n > 1) snprintf(spread, sizeof spread, "+- %.4f", a.sd);
    snprintf(line, sizeof line, "%-13s %2d  %5zu  %.4f %-11s %8.4f %7.4f %7.1fs\n", key.first.c_str(), key.second, a.n,
             a.mean, spread, n.mean, e.mean, row.seconds);
    text += line;
  }
  return text;
}

}  // namespace baton
