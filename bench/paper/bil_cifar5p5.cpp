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
#include "engine/io/files.h"
#include "engine/io/program.h"
#include "engine/io/stop.h"
#include "trainers/checkpoints.h"
#include "trainers/laplace.h"
#include "trainers/metrics.h"
#include "trainers/model.h"
#include "trainers/predictor.h"

using namespace baton;

namespace {

namespace fs = std::filesystem;

// Pretraining and the grid of sigma, beside the preset of all programs.
struct Prior {
  int old_limit = 0;                                     // images of the old classes, 0: all
  double pretrain_epochs = 60;                           // on them
  std::string grid = "0.001,0.003,0.01,0.03,0.1,0.3,1";  // of sigma
  double grid_epochs = 60;                               // of the first part, for each sigma
};

Preset make_preset(const std::string& name) {
  Preset p;
  p.batch = 128;
  const std::vector<Method> cifar = cifar_methods();
  p.methods = {cifar[0], ft_method(1e-3, "ft_pretrained")};
  for (size_t i = 1; i < cifar.size(); i++)
    for (const char* prior : {"", "_grid", "_laplace"}) {
      p.methods.push_back(cifar[i]);
      p.methods.back().name += prior;
    }
  if (name == "paper") {
    p.epochs = 60;
    p.augment = true;
  } else if (name == "quick") {  // subsets, in minutes on two cores
    p.train_limit = 4000;
    p.test_limit = 1000;
    p.samples = 20;
    p.stage_samples = 5;
  } else {
    refuse_preset(name);
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
  NetworkSpec network = network_spec("3conv3fc", 5);
  NetworkFactory make = network_factory(network);
};

json describe_pretraining(const Prelude& prelude, const Preset& p, const Prior& prior, uint64_t seed) {
  return {{"classes", prelude.old_classes},
          {"images", prelude.old_set.train.count},
          {"epochs", prior.pretrain_epochs},
          {"batch", p.batch},
          {"settings", p.methods[0].settings},
          {"augment", p.augment},
          {"seed", seed},
          {"source", prelude.old_set.source}};
}

// Where checkpoints go; one that a fresh run finds is none of its own.
struct Folder {
  Folder(const fs::path& out, bool resume_, double seconds_)
      : path(out / "checkpoint"), resume(resume_), seconds(seconds_) {
    make_directories(path);
    if (resume) return;
    for (const fs::directory_entry& entry : fs::directory_iterator(path))
      if (const std::string name = entry.path().filename(); name.starts_with("pretraining_") || name.starts_with("sd_"))
        fs::remove(entry.path());
  }
  fs::path path;
  bool resume;
  double seconds;
};

// One network trained on the old classes, all at once, or read from the file that an earlier run left.
NamedWeights pretrain(const Prelude& prelude, const Preset& p, const Prior& prior, uint64_t seed, const fs::path& path,
                      const Folder& folder) {
  const json identity = describe_pretraining(prelude, p, prior, seed);
  const std::unique_ptr<Network> network = prelude.make();
  NamedWeights weights;
  if (folder.resume && fs::exists(path)) {
    const TensorFile file = load_safetensors(path);
    const auto found = file.metadata.find("pretraining");
    if (found != file.metadata.end() && found->second == identity.dump()) {
      for (const TensorSpec& t : network->layout().tensors()) weights[t.name] = file.at(t.name, t.shape).as<float>();
      return weights;
    }
  }
  Device device;
  Arena arena;
  TrainingSettings training;
  training.kind = "ft";
  training.replicas = {{seed, p.methods[0].settings}};
  training.batch = p.batch;
  training.epochs = prior.pretrain_epochs;
  const DeviceImages train = upload_images(device, arena, prelude.old_set.train, prelude.normalisation);
  Trainer trainer(device, arena, prelude.make, train,
                  split_into_parts(prelude.old_set.train.count, 1, {seed}, p.augment), training);
  Predictor predictor(device, arena, prelude.make,
                      upload_images(device, arena, prelude.old_set.test, prelude.normalisation));
  Checkpoints checkpoints(folder.path / ("pretraining_seed" + std::to_string(seed) + ".safetensors"), folder.seconds,
                          [&] {
                            return json{{"identity", identity}};
                          });
  if (left_by_earlier_run(checkpoints.path(), identity).is_null()) trainer.begin_stage(0);
  else trainer.restore(checkpoints.path());
  finish_stage(trainer, checkpoints);
  const Predictions predicted =
      checkpoints.keep_through(trainer, [&] { return predictor.predict(trainer.posterior(), 0, 0, 0); });
  const Metrics m =
      evaluate(predicted.probability, prelude.old_set.test.labels, 5, predicted.entropy, predicted.mutual_information);
  printf("pretrained on classes %s, seed %llu: test accuracy %.4f on them\n", joined(prelude.old_classes).c_str(),
         static_cast<unsigned long long>(seed), m.accuracy);
  fflush(stdout);
  TensorFile file = mean_network(device, trainer.posterior());
  for (const TensorSpec& t : network->layout().tensors()) weights[t.name] = file.at(t.name, t.shape).as<float>();
  file.metadata = {{"format", "baton-pretrained-1"},
                   {"architecture", network->architecture()},
                   {"pretraining", identity.dump()},
                   {"test_accuracy", std::to_string(m.accuracy)}};
  save_safetensors(path, file);
  fs::remove(checkpoints.path());
  return weights;
}

// The tensors that go over to the new classes.
std::set<std::string> choose_transferred(const std::string& what, const ParameterLayout& layout) {
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
  SdSearch(const Prelude& prelude, const Preset& p, const Prior& prior, const json& identity, const Folder& folder,
           int at_once)
      : prelude_(prelude),
        p_(p),
        grid_(parse_numbers("--sigma-grid", prior.grid, positive)),
        epochs_(prior.grid_epochs),
        folder_(folder),
        at_once_(size_t(at_once)) {
    kept_ = {{"identity", identity}, {"points", json::object()}};
    if (const json before = left_by_earlier_run(kept_path(), identity); !before.is_null()) kept_ = before;
  }

  std::vector<GridPoint> find_points(const Method& method, int parts, uint64_t seed,
                                     const std::shared_ptr<const Pretrained>& pretrained) {
    const std::string which = method.name + " T=" + std::to_string(parts) + " seed " + std::to_string(seed);
    json& found = kept_["points"][which];  // [sd, accuracy, NLL]
    if (found.is_null()) found = json::array();
    const std::vector<int32_t> part = split_parts(prelude_.new_set.train.count, parts, seed)[0];
    while (found.size() < grid_.size()) {
      const size_t first = found.size(), end = std::min(grid_.size(), first + at_once_);
      search(which, {grid_.begin() + long(first), grid_.begin() + long(end)}, method, seed, pretrained, part, found);
      write_file_atomically(kept_path(), kept_.dump());
      fs::remove(running_path());
    }
    std::vector<GridPoint> points;
    for (const json& f : found) points.push_back({f[0], f[1], f[2].is_null() ? NAN : double(f[2])});
    return points;
  }

 private:
  fs::path kept_path() const { return folder_.path / "sd_search.json"; }
  fs::path running_path() const { return folder_.path / "sd_search.safetensors"; }

  void search(const std::string& which, const std::vector<double>& sds, const Method& method, uint64_t seed,
              const std::shared_ptr<const Pretrained>& pretrained, const std::vector<int32_t>& part, json& found) {
    const size_t held = std::max<size_t>(1, part.size() / 10);
    const std::vector<int32_t> rest(part.begin(), part.end() - long(held)),
        hold_out(part.end() - long(held), part.end());
    const Images judged = subset(prelude_.new_set.train, hold_out);
    Device device;
    Arena arena;
    TrainingSettings training;
    training.kind = method.kind;
    training.batch = p_.batch;
    training.epochs = epochs_;
    training.replicas.clear();
    for (double sd : sds) training.replicas.push_back({seed, method.settings, pretrained, sd});
    Stages stages = tasks_in_turn({rest});
    stages.order.assign(sds.size(), rest);
    stages.augment = {p_.augment};
    const DeviceImages train = upload_images(device, arena, prelude_.new_set.train, prelude_.normalisation);
    Trainer trainer(device, arena, prelude_.make, train, stages, training);
    Predictor predictor(device, arena, prelude_.make, upload_images(device, arena, judged, prelude_.normalisation));
    const json extra{{"identity", kept_["identity"]}, {"search", which}, {"sds", sds}};
    Checkpoints checkpoints(running_path(), folder_.seconds, [&] { return extra; });
    if (left_by_earlier_run(running_path(), kept_["identity"]) == extra) trainer.restore(running_path());
    else trainer.begin_stage(0);  // there is none, or it is of a search that has ended since
    finish_stage(trainer, checkpoints);
    json points = json::array();
    checkpoints.keep_through(trainer, [&] {
      for (size_t r = 0; r < sds.size(); r++) {
        const Predictions predicted = predictor.predict(trainer.posterior(), int(r), p_.samples, seed);
        const Metrics m =
            evaluate(predicted.probability, judged.labels, 5, predicted.entropy, predicted.mutual_information);
        points.push_back({sds[r], m.accuracy, m.nll});
      }
    });
    for (const json& point : points) found.push_back(point);
  }

  const Prelude& prelude_;
  const Preset& p_;
  std::vector<double> grid_;
  double epochs_;
  const Folder& folder_;
  size_t at_once_;
  json kept_;  // as the file holds it
};

std::string sentence_about(const json& result, const std::vector<Method>& methods, int parts) {
  std::string sentence;
  const double none = final_accuracy(result, "ffg", parts), ft = final_accuracy(result, "ft_pretrained", parts);
  char text[300];
  for (const Method& method : methods) {
    const std::string& m = method.name;
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

// "grid" of "ffg_grid"; empty: the method has no prior from pretraining.
std::string prior_name(const Method& m) {
  const size_t cut = m.name.find('_');
  return cut == std::string::npos ? "" : m.name.substr(cut + 1);
}

int run(int argc, char** argv) {
  PaperProgram program(
      "bil_cifar5p5",
      "CIFAR(5+5): 3Conv3FC is pretrained on five classes of CIFAR-10; the other five arrive in T parts. Compares\n"
      "fine-tuning with posteriors whose first prior is N(0, s^2), N(w*, sigma^2) with sigma from a grid, or a "
      "Laplace\n"
      "approximation at the pretrained w*. Writes result.json, log.jsonl, the pretrained networks and a plot to --out.",
      argc, argv, make_preset);
  Prior prior;
  if (program.preset_name == "quick") prior = {10000, 10, "0.003,0.01,0.03,0.1", 10};
  program.methods = "ft,ft_pretrained,ffg,ffg_grid,ffg_laplace";
  program.parts = "10";
  program.out_prefix = "results/cifar5p5_";
  program.add_options("quick (subsets) or paper (all): what the other options start from");
  auto* pretraining = program.app.add_option_group("Pretraining and priors");
  std::string transfer = "conv", curvature = "ggn";
  int class_seed = 0;
  LaplaceSettings laplace;
  pretraining->add_option("--class-seed", class_seed, "of the draw of the five old classes")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  pretraining->add_option("--pretrain-epochs", prior.pretrain_epochs, "on the old classes")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  pretraining->add_option("--old-limit", prior.old_limit, "use the first N images of the old classes (0: all)")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  pretraining->add_option("--transfer", transfer, "conv, all-but-last or all: the rest is fresh")
      ->capture_default_str();
  pretraining->add_option("--sigma-grid", prior.grid, "standard deviations")->capture_default_str();
  pretraining->add_option("--curvature", curvature, "of the Laplace prior: ggn or empirical")->capture_default_str();
  pretraining->add_option("--tau", laplace.tau, "the Laplace prior's own precision")->capture_default_str();
  pretraining->add_option("--laplace-temperature", laplace.temperature, "divides the data's precision")
      ->capture_default_str();
  if (!program.parse()) return 0;
  const Preset& p = program.preset;
  if (program.given("--epochs")) prior.grid_epochs = p.epochs;  // of every stage, the grid's too
  parse_numbers("--sigma-grid", prior.grid, positive);
  const Curvature kind = parse_curvature(curvature);
  Prelude prelude;
  const std::set<std::string> names = choose_transferred(transfer, prelude.make()->layout());
  const std::vector<Method> methods = program.chosen_methods();
  const std::vector<uint64_t> seeds = program.seed_numbers();

  // The old classes' set and the new ones', from one reading of all.
  const Dataset all = find_cifar10(program.data_folder());
  const std::vector<std::vector<int32_t>> drawn = split_parts(10, 1, uint64_t(class_seed) + 1000);
  const std::vector<int> classes(drawn[0].begin(), drawn[0].end());
  prelude.old_classes.assign(classes.begin(), classes.begin() + 5);
  prelude.new_classes.assign(classes.begin() + 5, classes.end());
  std::sort(prelude.old_classes.begin(), prelude.old_classes.end());
  std::sort(prelude.new_classes.begin(), prelude.new_classes.end());
  for (const auto& [set, chosen, train_limit] : {std::tuple{&prelude.old_set, &prelude.old_classes, prior.old_limit},
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
  const std::vector<int> parts = program.part_numbers(prelude.new_set.train.count);
  const fs::path out = program.out_folder();
  const Folder folder(out, program.resume, program.checkpoint_seconds);
  printf("bil_cifar5p5: %s, old classes %s (%d images), new classes %s (%d training and %d test images)%s, preset %s\n",
         all.generated ? "GENERATED images (no CIFAR-10 was found)" : "CIFAR-10", joined(prelude.old_classes).c_str(),
         prelude.old_set.train.count, joined(prelude.new_classes).c_str(), prelude.new_set.train.count,
         prelude.new_set.test.count, all.path.empty() ? "" : (" from " + all.path).c_str(),
         program.preset_name.c_str());
  fflush(stdout);

  bool any_pretrained = false, any_laplace = false;
  for (const Method& m : methods) {
    any_pretrained |= !prior_name(m).empty();
    any_laplace |= prior_name(m) == "laplace";
  }
  std::map<uint64_t, std::shared_ptr<const Pretrained>> flat, curved;  // by seed
  for (uint64_t seed : seeds) {
    if (!any_pretrained) break;
    const fs::path path = out / ("pretrained_seed" + std::to_string(seed) + ".safetensors");
    const NamedWeights weights = pretrain(prelude, p, prior, seed, path, folder);
    Pretrained from;
    for (const std::string& name : names) from.weights[name] = weights.at(name);
    char epochs[40];
    snprintf(epochs, sizeof epochs, " for %g epochs", prior.pretrain_epochs);
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
    snprintf(text, sizeof text, ", Laplace %s, tau %g, temperature %g", name(kind), laplace.tau, laplace.temperature);
    from.description += text;
    curved[seed] = std::make_shared<Pretrained>(from);
    printf("Laplace prior, seed %llu: mean log sigma %.2f over %.0f weights\n", static_cast<unsigned long long>(seed),
           sum / count, count);
    fflush(stdout);
  }

#if defined(BATON_CUDA)
  const int at_once = program.at_once ? program.at_once : int(seeds.size() + split_list(prior.grid).size());
#else
  const int at_once = program.at_once ? program.at_once : 1;
#endif
  json of_search{{"pretraining", describe_pretraining(prelude, p, prior, 0)},
                 {"set", {prelude.new_set.source, prelude.new_set.train.count}},
                 {"transfer", transfer},
                 {"grid", prior.grid},
                 {"grid_epochs", prior.grid_epochs}};
  for (const Method& m : methods)
    if (prior_name(m) == "grid") of_search["settings"][m.name] = m.settings;
  SdSearch search(prelude, p, prior, of_search, folder, at_once);
  json searches = json::array();
  std::vector<ExperimentRun> runs;
  for (const Method& m : methods)
    for (int t : parts)
      for (const std::vector<uint64_t>& group : program.seed_groups()) {
        ExperimentRun run = program.make_run(m, m.name, prelude.network, group);
        run.stages = split_into_parts(prelude.new_set.train.count, t, group, p.augment);
        for (Replica& replica : run.training.replicas) {
          const std::string from = prior_name(m);
          if (from == "pretrained" || from == "grid") replica.pretrained = flat.at(replica.seed);
          if (from == "laplace") replica.pretrained = curved.at(replica.seed);
          if (from != "grid") continue;
          const std::vector<GridPoint> points = search.find_points(m, t, replica.seed, replica.pretrained);
          const GridPoint best = *std::min_element(points.begin(), points.end(),
                                                   [](const auto& a, const auto& b) { return a.nll < b.nll; });
          replica.pretrained_sd = best.sd;
          json said{{"method", m.name}, {"parts", t}, {"seed", replica.seed}, {"chosen_sd", best.sd}};
          printf("%s T=%d seed %llu, sigma on the hold-out of the first part:", m.name.c_str(), t,
                 static_cast<unsigned long long>(replica.seed));
          for (const GridPoint& g : points) {
            said["points"].push_back({{"sd", g.sd}, {"holdout_accuracy", g.accuracy}, {"holdout_nll", g.nll}});
            printf(" %g: NLL %.3f (%.3f)", g.sd, g.nll, g.accuracy);
          }
          printf("; chosen %g\n", best.sd);
          fflush(stdout);
          searches.push_back(said);
        }
        runs.push_back(std::move(run));
      }

  ExperimentOptions experiment = program.experiment();
  experiment.normalisation = prelude.normalisation;
  experiment.extra = {{"old_classes", prelude.old_classes},
                      {"new_classes", prelude.new_classes},
                      {"old_images", prelude.old_set.train.count},
                      {"pretrain_epochs", prior.pretrain_epochs},
                      {"transfer", transfer},
                      {"sigma_search", searches}};
  ExperimentData data{prelude.new_set, {prelude.new_set.test}};
  const json result = run_experiment(experiment, data, runs);
  report(result, sentence_about(result, methods, *std::max_element(parts.begin(), parts.end())), prelude.new_set, out);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("bil_cifar5p5", [&] { return run(argc, argv); });
}
