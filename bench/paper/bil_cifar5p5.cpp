// CIFAR(5+5) (Kochurov et al. 2018, figure 1, right): 3Conv3FC is pretrained on five classes of CIFAR-10, drawn at
// random; then the other five arrive in T parts, and every stage is judged on their 5,000 test images.
//
//   ft              fine-tuning from scratch           ft_pretrained  fine-tuning from the pretrained convolutions
//   ffg             prior N(0, prior_sd^2)             ffg_grid       prior N(w*, sigma^2), sigma by a grid search
//   ffg_laplace     prior N(w*, 1 / precision), a diagonal Laplace approximation from the old data
// and cfg_grid, cfg_laplace, mnf_grid, mnf_laplace likewise. w* is the pretrained network. sigma is chosen on a
// hold-out of the first part: its grid runs as replicas of one training run, on the rest of that part. Pretraining and
// grids have checkpoints of their own, beside the experiment's.
#include <cmath>
#include <set>

#include "bench/common/bil.h"
#include "bench/common/resume.h"
#include "engine/io/files.h"
#include "engine/io/program.h"
#include "engine/io/stop.h"
#include "layers/conv3fc3.h"
#include "trainers/laplace.h"
#include "trainers/metrics.h"
#include "trainers/parse.h"

using namespace baton;

namespace {

namespace fs = std::filesystem;

struct Preset : BilPreset {
  int old_limit = 0;           // images of the old classes, 0: all
  double pretrain_epochs = 0;  // on them
  std::vector<double> grid;    // of sigma
  double grid_epochs = 0;      // of the first part, for each sigma
};

Preset preset_of(const std::string& name) {
  Preset p;
  set_cifar(p);
  if (name == "paper") {
    p.samples = 100;
    p.stage_samples = 100;
    p.epochs = 60;
    p.augment = true;
    p.pretrain_epochs = 60;
    p.grid = {1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1};
    p.grid_epochs = 60;
  } else if (name == "quick") {  // subsets, in minutes on two cores
    p.train_limit = 4000;
    p.test_limit = 1000;
    p.old_limit = 10000;
    p.samples = 20;
    p.stage_samples = 5;
    p.epochs = 10;
    p.pretrain_epochs = 10;
    p.grid = {3e-3, 1e-2, 3e-2, 1e-1};
    p.grid_epochs = 10;
  } else {
    throw InputError("unknown preset '" + name + "': quick or paper");
  }
  return p;
}

std::string joined(const std::vector<int>& numbers) {
  std::string text;
  for (int n : numbers) text += (text.empty() ? "" : ",") + std::to_string(n);
  return text;
}

// What decides the pretrained network and its priors: a file of them that says something else is not reused.
struct Prelude {
  std::vector<int> old_classes, new_classes;
  Dataset old_set, new_set;
  Normalisation normalisation{};
  NetworkFactory make = [] { return std::make_unique<Conv3Fc3>(5); };
};

json pretraining_of(const Prelude& prelude, const Preset& p, uint64_t seed) {
  return {{"classes", prelude.old_classes},
          {"images", prelude.old_set.train.count},
          {"epochs", p.pretrain_epochs},
          {"batch", p.batch},
          {"lr", p.ft.lr},
          {"schedule", name_of(p.ft.schedule)},
          {"augment", p.augment},
          {"seed", seed},
          {"source", prelude.old_set.source}};
}

// Where checkpoints go; one that a fresh run finds is none of its own.
struct Checkpoints {
  Checkpoints(const fs::path& out, bool resume_, double seconds_)
      : folder(out / "checkpoint"), resume(resume_), seconds(seconds_) {
    make_directories(folder);
    if (resume) return;
    for (const fs::directory_entry& entry : fs::directory_iterator(folder))
      if (const std::string name = entry.path().filename(); name.starts_with("pretraining_") || name.starts_with("sd_"))
        fs::remove(entry.path());
  }
  fs::path folder;
  bool resume;
  double seconds;
};

// One network trained on the old classes, all at once, or read from the file that an earlier run left.
NamedWeights pretrain(const Prelude& prelude, const Preset& p, uint64_t seed, const fs::path& path,
                      const Checkpoints& checkpoints) {
  const json identity = pretraining_of(prelude, p, seed), extra{{"identity", identity}};
  const std::unique_ptr<Network> network = prelude.make();
  NamedWeights weights;
  if (checkpoints.resume && fs::exists(path)) {
    const TensorFile file = load_safetensors(path);
    const auto found = file.metadata.find("pretraining");
    if (found != file.metadata.end() && found->second == identity.dump()) {
      for (const TensorSpec& t : network->layout().tensors()) weights[t.name] = file.at(t.name, t.shape).as<float>();
      return weights;
    }
  }
  Device device;
  Arena arena;
  TrainingPlan plan;
  plan.posterior.family = Family::point;
  plan.batch = p.batch;
  plan.epochs = p.pretrain_epochs;
  plan.augment = p.augment;
  plan.seeds = {seed};
  plan.settings = {p.ft};
  const auto order = split_parts(prelude.old_set.train.count, 1, seed);
  const DeviceImages train = upload_images(device, arena, prelude.old_set.train, prelude.normalisation);
  IncrementalTrainer trainer(device, arena, prelude.make, train, plan, order, {prelude.old_set.train.count});
  Predictor predictor(device, arena, prelude.make,
                      upload_images(device, arena, prelude.old_set.test, prelude.normalisation));
  const fs::path checkpoint = checkpoints.folder / ("pretraining_seed" + std::to_string(seed) + ".safetensors");
  if (left_by_earlier_run(checkpoint, identity).is_null()) trainer.begin_stage(0);
  else trainer.restore(checkpoint);
  finish_stage(trainer, checkpoint, extra, checkpoints.seconds);
  Predictions predicted;
  try {
    predicted = predictor.predict(trainer.posterior(), 0, 0, 0);
  } catch (const Stopped&) {
    trainer.save(checkpoint, extra.dump());
    stop_at_checkpoint();
  }
  const Metrics m =
      evaluate(predicted.probability, prelude.old_set.test.labels, 5, predicted.entropy, predicted.mutual_information);
  printf("pretrained on classes %s, seed %llu: test accuracy %.4f on them\n", joined(prelude.old_classes).c_str(),
         static_cast<unsigned long long>(seed), m.accuracy);
  fflush(stdout);
  TensorFile file;
  const ParameterStore& store = trainer.posterior().store();
  for (const TensorSpec& t : store.layout().tensors()) {
    weights[t.name] = store.read(device, "mean", 0, t);
    file.tensors[t.name] = Tensor::of<float>(std::span<const float>(weights[t.name]), t.shape);
  }
  file.metadata["format"] = "baton-pretrained-1";
  file.metadata["architecture"] = network->architecture();
  file.metadata["pretraining"] = identity.dump();
  file.metadata["test_accuracy"] = std::to_string(m.accuracy);
  save_safetensors(path, file);
  fs::remove(checkpoint);
  return weights;
}

// The tensors that go over to the new classes.
std::set<std::string> transferred(const std::string& what, const ParameterLayout& layout) {
  std::set<std::string> names;
  const std::string last = layout.tensors().back().name.substr(0, layout.tensors().back().name.rfind('.'));
  for (const TensorSpec& t : layout.tensors()) {
    const bool convolution = t.name.rfind("conv", 0) == 0, head = t.name.rfind(last, 0) == 0;
    if (what == "all" || (what == "all-but-last" && !head) || (what == "conv" && convolution)) names.insert(t.name);
  }
  if (names.empty()) throw InputError("unknown --transfer '" + what + "': conv, all-but-last or all");
  return names;
}

struct GridPoint {
  double sd, accuracy, nll;
};

// Trains the first part with every sigma of the grid, as many at once as shall be, a replica each, on nine tenths of
// it, and judges the rest. What is finished is kept in checkpoint/, so that a resumed run does not search again.
class SdSearch {
 public:
  SdSearch(const Prelude& prelude, const Preset& p, const json& identity, const Checkpoints& checkpoints, int at_once)
      : prelude_(prelude), p_(p), checkpoints_(checkpoints), at_once_(at_once) {
    kept_["identity"] = identity;
    kept_["points"] = json::object();
    const json before = left_by_earlier_run(kept_path(), identity);
    if (!before.is_null()) kept_ = before;
  }

  std::vector<GridPoint> points(const std::string& method, Family family, int parts, uint64_t seed,
                                const std::shared_ptr<const Pretrained>& pretrained) {
    const std::string which = method + " T=" + std::to_string(parts) + " seed " + std::to_string(seed);
    json& found = kept_["points"][which];  // [sd, accuracy, NLL]
    if (found.is_null()) found = json::array();
    const std::vector<int32_t> part = split_parts(prelude_.new_set.train.count, parts, seed)[0];
    while (found.size() < p_.grid.size()) {
      const size_t first = found.size(), end = std::min(p_.grid.size(), first + size_t(at_once_));
      search(which, std::vector<double>(p_.grid.begin() + long(first), p_.grid.begin() + long(end)), family, seed,
             pretrained, part, found);
      write_file_atomically(kept_path(), kept_.dump());
      fs::remove(running_path());
    }
    std::vector<GridPoint> points;
    for (const json& f : found) points.push_back({f[0], f[1], f[2].is_null() ? NAN : double(f[2])});
    return points;
  }

 private:
  fs::path kept_path() const { return checkpoints_.folder / "sd_search.json"; }
  fs::path running_path() const { return checkpoints_.folder / "sd_search.safetensors"; }

  void search(const std::string& which, const std::vector<double>& sds, Family family, uint64_t seed,
              const std::shared_ptr<const Pretrained>& pretrained, const std::vector<int32_t>& part, json& found) {
    const size_t held = std::max<size_t>(1, part.size() / 10);
    const std::vector<int32_t> rest(part.begin(), part.end() - long(held)),
        hold_out(part.end() - long(held), part.end());
    const Images judged = subset(prelude_.new_set.train, hold_out);
    Device device;
    Arena arena;
    TrainingPlan plan;
    plan.posterior = p_.posterior;
    plan.posterior.family = family;
    plan.scale_rule = p_.scale_rule;
    plan.batch = p_.batch;
    plan.augment = p_.augment;
    plan.epochs = p_.grid_epochs;
    for (double sd : sds) {
      TrainingSettings s = Preset(p_).of(family);
      s.pretrained = pretrained;
      s.pretrained_sd = sd;
      plan.seeds.push_back(seed);
      plan.settings.push_back(s);
    }
    const DeviceImages train = upload_images(device, arena, prelude_.new_set.train, prelude_.normalisation);
    IncrementalTrainer trainer(device, arena, prelude_.make, train, plan,
                               std::vector<std::vector<int32_t>>(sds.size(), rest), {int(rest.size())});
    Predictor predictor(device, arena, prelude_.make, upload_images(device, arena, judged, prelude_.normalisation));
    const json extra{{"identity", kept_["identity"]}, {"search", which}, {"sds", sds}};
    if (left_by_earlier_run(running_path(), kept_["identity"]) == extra) trainer.restore(running_path());
    else trainer.begin_stage(0);  // there is none, or it is of a search that has ended since
    finish_stage(trainer, running_path(), extra, checkpoints_.seconds);
    json points = json::array();
    try {
      for (size_t r = 0; r < sds.size(); r++) {
        const Predictions predicted = predictor.predict(trainer.posterior(), int(r), p_.samples, seed);
        const Metrics m =
            evaluate(predicted.probability, judged.labels, 5, predicted.entropy, predicted.mutual_information);
        points.push_back({sds[r], m.accuracy, m.nll});
      }
    } catch (const Stopped&) {
      trainer.save(running_path(), extra.dump());
      stop_at_checkpoint();
    }
    for (const json& point : points) found.push_back(point);
  }

  const Prelude& prelude_;
  const Preset& p_;
  const Checkpoints& checkpoints_;
  int at_once_;
  json kept_;  // as the file holds it
};

std::string sentence_of(const json& result, const std::vector<std::string>& methods, int parts) {
  std::string sentence;
  const double none = final_accuracy(result, "ffg", parts), ft = final_accuracy(result, "ft_pretrained", parts);
  char text[300];
  for (const std::string& m : methods) {
    if (m.find('_') == std::string::npos || m == "ft_pretrained") continue;
    const double value = final_accuracy(result, m, parts);
    if (std::isfinite(value) && std::isfinite(none)) {
      const double gap = 100 * (value - none);
      snprintf(text, sizeof text, "%s ends at %.2f %%, %.2f points %s FFG without pretraining (%.2f %%)", m.c_str(),
               100 * value, std::abs(gap), gap >= 0 ? "ahead of" : "behind", 100 * none);
      sentence += text;
      if (std::isfinite(ft)) {
        const double other = 100 * (value - ft);
        snprintf(text, sizeof text, " and %.2f points %s pretrained FT (%.2f %%)", std::abs(other),
                 other >= 0 ? "ahead of" : "behind", 100 * ft);
        sentence += text;
      }
      sentence += ". ";
    }
  }
  return sentence;
}

int run(int argc, char** argv) {
  CLI::App app{
      "CIFAR(5+5): 3Conv3FC is pretrained on five classes of CIFAR-10; the other five arrive in T parts. Compares\n"
      "fine-tuning with posteriors whose first prior is N(0, s^2), N(w*, sigma^2) with sigma from a grid, or a "
      "Laplace\n"
      "approximation at the pretrained w*. Writes result.json, log.jsonl, the pretrained networks and a plot to "
      "--out."};
  BilOptions options;
  options.methods = "ft,ft_pretrained,ffg,ffg_grid,ffg_laplace";
  options.parts = "10";
  options.out_prefix = "results/cifar5p5_";
  options.add_to(app, "ft, ft_pretrained, and ffg, cfg, mnf alone or with _grid or _laplace",
                 "quick (subsets) or paper (all): sets what is not given", false);
  auto* pretraining = app.add_option_group("Pretraining and priors");
  std::string transfer = "conv", curvature = "ggn", grid_text;
  int class_seed = 0, old_limit = -1;
  double pretrain_epochs = 0;
  LaplaceSettings laplace;
  pretraining->add_option("--class-seed", class_seed, "of the draw of the five old classes")->capture_default_str();
  pretraining->add_option("--pretrain-epochs", pretrain_epochs, "on the old classes");
  pretraining->add_option("--old-limit", old_limit, "use the first N images of the old classes");
  pretraining->add_option("--transfer", transfer, "conv, all-but-last or all: the rest is fresh")
      ->capture_default_str();
  pretraining->add_option("--sigma-grid", grid_text, "standard deviations, as 0.003,0.01,0.03");
  pretraining->add_option("--curvature", curvature, "of the Laplace prior: ggn or empirical")->capture_default_str();
  pretraining->add_option("--tau", laplace.tau, "the Laplace prior's own precision")->capture_default_str();
  pretraining->add_option("--laplace-temperature", laplace.temperature, "divides the data's precision")
      ->capture_default_str();
  try {
    parse(app, argc, argv);
  } catch (const HelpShown&) {
    return 0;
  }
  Preset p = preset_of(options.preset);
  const double preset_epochs = p.epochs;
  options.apply(p);
  if (p.epochs != preset_epochs) p.grid_epochs = p.epochs;  // --epochs is of every stage, the grid's too
  if (pretrain_epochs < 0 || class_seed < 0) throw InputError("--pretrain-epochs and --class-seed cannot be negative");
  if (pretrain_epochs > 0) p.pretrain_epochs = pretrain_epochs;
  if (old_limit >= 0) p.old_limit = old_limit;
  if (!grid_text.empty()) {
    p.grid.clear();
    for (const std::string& word : split_list(grid_text)) {
      char* end = nullptr;
      p.grid.push_back(std::strtod(word.c_str(), &end));
      if (word.empty() || *end || !(p.grid.back() > 0))
        throw InputError("--sigma-grid: '" + word + "' is not a positive number");
    }
  }
  const Curvature kind = curvature_of(curvature);
  Prelude prelude;
  const std::set<std::string> names = transferred(transfer, prelude.make()->layout());
  struct Method {
    std::string name, prior;
    Family family;
  };
  std::vector<Method> methods;
  for (const std::string& name : split_list(options.methods)) {
    const size_t cut = name.find('_');
    Method m{name, cut == std::string::npos ? "" : name.substr(cut + 1), family_of(name.substr(0, cut))};
    const bool point = m.family == Family::point;
    if (!(m.prior.empty() || (point && m.prior == "pretrained") ||
          (!point && (m.prior == "grid" || m.prior == "laplace"))))
      throw InputError("unknown method '" + name +
                       "': ft, ft_pretrained, and ffg, cfg, mnf alone or with _grid or _laplace");
    methods.push_back(m);
  }
  const std::vector<uint64_t> seeds = options.seed_numbers();
  options.part_numbers(1 << 30);

  // The old classes' set and the new ones', from one reading of all.
  const Dataset all = find_cifar10(options.data_folder());
  const std::vector<std::vector<int32_t>> drawn = split_parts(10, 1, uint64_t(class_seed) + 1000);
  const std::vector<int> classes(drawn[0].begin(), drawn[0].end());
  prelude.old_classes.assign(classes.begin(), classes.begin() + 5);
  prelude.new_classes.assign(classes.begin() + 5, classes.end());
  std::sort(prelude.old_classes.begin(), prelude.old_classes.end());
  std::sort(prelude.new_classes.begin(), prelude.new_classes.end());
  for (const auto& [set, chosen, train_limit] : {std::tuple{&prelude.old_set, &prelude.old_classes, p.old_limit},
                                                 std::tuple{&prelude.new_set, &prelude.new_classes, p.train_limit}}) {
    *set = {all.name,
            all.source + ", classes " + joined(*chosen),
            all.path,
            all.generated,
            of_classes(all.train, *chosen),
            of_classes(all.test, *chosen)};
    if (train_limit > 0 && train_limit < set->train.count) limit(set->train, train_limit);
    if (p.test_limit > 0 && p.test_limit < set->test.count) limit(set->test, p.test_limit);
  }
  prelude.normalisation = standardise(prelude.old_set.train);  // what the pretrained network saw
  const std::vector<int> parts = options.part_numbers(prelude.new_set.train.count);
  const fs::path out = options.out_folder();
  const Checkpoints checkpoints(out, options.resume, options.checkpoint_seconds);
  printf("bil_cifar5p5: %s, old classes %s (%d images), new classes %s (%d training and %d test images)%s, preset %s\n",
         all.generated ? "GENERATED images (no CIFAR-10 was found)" : "CIFAR-10", joined(prelude.old_classes).c_str(),
         prelude.old_set.train.count, joined(prelude.new_classes).c_str(), prelude.new_set.train.count,
         prelude.new_set.test.count, all.path.empty() ? "" : (" from " + all.path).c_str(), options.preset.c_str());
  fflush(stdout);

  bool any_pretrained = false, any_laplace = false;
  for (const Method& m : methods) {
    any_pretrained |= !m.prior.empty();
    any_laplace |= m.prior == "laplace";
  }
  std::map<uint64_t, std::shared_ptr<const Pretrained>> flat, curved;  // by seed
  for (uint64_t seed : seeds) {
    if (!any_pretrained) break;
    const fs::path path = out / ("pretrained_seed" + std::to_string(seed) + ".safetensors");
    const NamedWeights weights = pretrain(prelude, p, seed, path, checkpoints);
    Pretrained from;
    for (const std::string& name : names) from.weights[name] = weights.at(name);
    char epochs[40];
    snprintf(epochs, sizeof epochs, " for %g epochs", p.pretrain_epochs);
    from.description = "pretrained on " + std::to_string(prelude.old_set.train.count) + " images of classes " +
                       joined(prelude.old_classes) + epochs + ", transfer " + transfer;
    flat[seed] = std::make_shared<Pretrained>(from);
    if (!any_laplace) continue;
    Device device;
    NamedWeights squares;
    try {
      squares = curvature_diagonal(device, prelude.make, prelude.old_set.train, prelude.normalisation, weights, kind);
    } catch (const Stopped&) {
      throw_stopped("the pretrained network is kept; --resume goes on from it");
    }
    const NamedWeights log_std = laplace_log_std(squares, laplace);
    double sum = 0, count = 0;
    for (const std::string& name : names) {
      from.prior_log_std[name] = log_std.at(name);
      for (float x : log_std.at(name)) sum += x, count++;
    }
    char text[120];
    snprintf(text, sizeof text, ", Laplace %s, tau %g, temperature %g", name_of(kind), laplace.tau,
             laplace.temperature);
    from.description += text;
    curved[seed] = std::make_shared<Pretrained>(from);
    printf("Laplace prior, seed %llu: mean log sigma %.2f over %.0f weights\n", static_cast<unsigned long long>(seed),
           sum / count, count);
    fflush(stdout);
  }

#if defined(BATON_CUDA)
  const int at_once = options.at_once ? options.at_once : int(std::max(seeds.size(), p.grid.size()));
#else
  const int at_once = options.at_once ? options.at_once : 1;
#endif
  ExperimentOptions experiment = options.experiment("bil_cifar5p5", p);
  json of_search{{"pretraining", pretraining_of(prelude, p, 0)},
                 {"set", {prelude.new_set.source, prelude.new_set.train.count}},
                 {"transfer", transfer},
                 {"grid", p.grid}};
  for (const Method& m : methods) {
    if (m.prior != "grid") continue;
    Job job;
    job.plan.posterior = p.posterior;
    job.plan.posterior.family = m.family;
    job.plan.scale_rule = p.scale_rule;
    job.plan.batch = p.batch;
    job.plan.augment = p.augment;
    job.plan.epochs = p.grid_epochs;
    job.plan.settings = {p.of(m.family)};
    of_search["settings"][m.name] = settings_json(job, experiment, 0);
  }
  SdSearch search(prelude, p, of_search, checkpoints, at_once);
  json searches = json::array();
  std::vector<Job> jobs;
  for (const Method& m : methods)
    for (int t : parts)
      for (size_t first = 0; first < seeds.size(); first += size_t(at_once)) {
        Job job;
        job.method = m.name;
        job.parts = t;
        job.plan.posterior = p.posterior;
        job.plan.posterior.family = m.family;
        job.plan.scale_rule = p.scale_rule;
        job.plan.parts = t;
        job.plan.batch = p.batch;
        job.plan.augment = p.augment;
        job.plan.epochs = p.epochs;
        for (size_t i = first; i < std::min(seeds.size(), first + size_t(at_once)); i++) {
          const uint64_t seed = seeds[i];
          TrainingSettings s = p.of(m.family);
          if (m.prior == "pretrained" || m.prior == "grid") s.pretrained = flat.at(seed);
          if (m.prior == "laplace") s.pretrained = curved.at(seed);
          if (m.prior == "grid") {
            const std::vector<GridPoint> points = search.points(m.name, m.family, t, seed, s.pretrained);
            const GridPoint best = *std::min_element(points.begin(), points.end(),
                                                     [](const auto& a, const auto& b) { return a.nll < b.nll; });
            s.pretrained_sd = best.sd;
            json said{{"method", m.name}, {"parts", t}, {"seed", seed}, {"chosen_sd", best.sd}};
            printf("%s T=%d seed %llu, sigma on the hold-out of the first part:", m.name.c_str(), t,
                   static_cast<unsigned long long>(seed));
            for (const GridPoint& g : points) {
              said["points"].push_back({{"sd", g.sd}, {"holdout_accuracy", g.accuracy}, {"holdout_nll", g.nll}});
              printf(" %g: NLL %.3f (%.3f)", g.sd, g.nll, g.accuracy);
            }
            printf("; chosen %g\n", best.sd);
            fflush(stdout);
            searches.push_back(said);
          }
          job.plan.seeds.push_back(seed);
          job.plan.settings.push_back(s);
        }
        jobs.push_back(job);
      }

  experiment.normalisation = prelude.normalisation;
  experiment.extra = {{"old_classes", prelude.old_classes},
                      {"new_classes", prelude.new_classes},
                      {"old_images", prelude.old_set.train.count},
                      {"pretrain_epochs", p.pretrain_epochs},
                      {"transfer", transfer},
                      {"sigma_search", searches}};
  const json result = run_experiment(experiment, prelude.new_set, prelude.make, jobs);
  std::vector<std::string> all_methods;
  for (const Method& m : methods) all_methods.push_back(m.name);
  report(result, sentence_of(result, all_methods, *std::max_element(parts.begin(), parts.end())), prelude.new_set, out);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("bil_cifar5p5", [&] { return run(argc, argv); });
}
