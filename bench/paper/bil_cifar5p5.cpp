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

// What the old classes are for: the options of pretraining and of the priors from it, and the two sets of images.
struct Prelude {
  int class_seed = 0, old_limit = 0;                     // old_limit: images of the old classes, 0: all
  double epochs = 60, grid_epochs = 60;                  // on the old classes; on the first part, for each sigma
  std::string grid = "0.001,0.003,0.01,0.03,0.1,0.3,1";  // of sigma
  std::string transfer = "conv", curvature = "ggn";
  LaplaceSettings laplace;
  std::vector<int> old_classes, new_classes;
  Dataset old_set, new_set;
  Normalisation normalisation{};
  NetworkSpec network = network_spec("3conv3fc", 5);
  NetworkFactory make = network_factory(network);
};
using FromOldClasses = std::shared_ptr<const Pretrained>;

Preset make_preset(bool paper) {
  Preset p;
  p.batch = 128;
  const std::vector<Method> cifar = cifar_methods();
  p.methods = {cifar[0], ft_method(1e-3, "ft_pretrained")};
  for (size_t i = 1; i < cifar.size(); i++)
    for (const char* prior : {"", "_grid", "_laplace"}) {
      p.methods.push_back(cifar[i]);
      p.methods.back().name += prior;
    }
  if (paper) {
    p.epochs = 60;
    p.augment = true;
  } else {  // subsets, in minutes on two cores
    p.train_limit = 4000;
    p.test_limit = 1000;
    p.samples = 20;
    p.stage_samples = 5;
  }
  return p;
}

// What decides the pretrained network: a file of one that says something else is not reused.
json describe_pretraining(const PaperProgram& program, const Prelude& prelude, uint64_t seed) {
  const Preset& p = program.preset;
  json j{{"classes", prelude.old_classes},
         {"images", prelude.old_set.train.count},
         {"epochs", prelude.epochs},
         {"batch", p.batch},
         {"settings", p.methods[0].settings},
         {"augment", p.augment},
         {"seed", seed},
         {"source", prelude.old_set.source}};
  if (program.precision != "fp32") j["precision"] = program.precision;
  return j;
}

fs::path checkpoint_folder(const PaperProgram& program) { return program.out_folder() / "checkpoint"; }

// Trains one stage, from the checkpoint at `path` if an earlier run left it for the same `extra`, and judges every
// replica on its images of `judged` by so many samples. `network`, if not null, becomes the network of the posterior's
// means.
std::vector<Metrics> train_and_judge(const PaperProgram& program, const Prelude& prelude, const Images& images,
                                     const std::vector<Images>& judged, const Stages& stages, TrainingSettings training,
                                     int samples, const fs::path& path, const json& extra, TensorFile* network) {
  Device device;
  device.set_precision(parse_precision(program.precision));
  Arena arena;
  training.batch = program.preset.batch;
  Trainer trainer(device, arena, prelude.make, upload_images(device, arena, images, prelude.normalisation), stages,
                  training);
  Checkpoints checkpoints(path, program.checkpoint_seconds, [&] { return extra; });
  // Otherwise there is none, or it is of a stage that has ended since.
  if (left_by_earlier_run(path, extra["identity"]) == extra) trainer.restore(path);
  learn(trainer, checkpoints);
  return checkpoints.keep_through(trainer, [&] {
    std::vector<Metrics> metrics;
    for (size_t r = 0; r < training.replicas.size(); r++) {
      Arena memory;
      Predictor predictor(device, memory, prelude.make,
                          upload_images(device, memory, judged[r], prelude.normalisation));
      const Predictions made = predictor.predict(trainer.posterior(), int(r), samples, training.replicas[r].seed);
      metrics.push_back(evaluate(made.probability, judged[r].labels, 5, made.entropy, made.mutual_information));
    }
    if (network) *network = mean_network(device, trainer.posterior());
    return metrics;
  });
}

// One network trained on the old classes, all at once, or read from the file that an earlier run left in --out.
NamedWeights pretrain(const PaperProgram& program, const Prelude& prelude, uint64_t seed) {
  const Preset& p = program.preset;
  const std::string name = "seed" + std::to_string(seed) + ".safetensors";
  const fs::path path = program.out_folder() / ("pretrained_" + name),
                 checkpoint = checkpoint_folder(program) / ("pretraining_" + name);
  const json identity = describe_pretraining(program, prelude, seed);
  const std::unique_ptr<Network> network = prelude.make();
  TensorFile file;
  if (program.resume && fs::exists(path)) file = load_safetensors(path);
  if (const auto found = file.metadata.find("pretraining");
      found == file.metadata.end() || found->second != identity.dump()) {
    TrainingSettings training;
    training.kind = "ft", training.epochs = prelude.epochs;
    training.replicas = {{seed, p.methods[0].settings}};
    const double accuracy = train_and_judge(program, prelude, prelude.old_set.train, {prelude.old_set.test},
                                            split_into_parts(prelude.old_set.train.count, 1, {seed}, p.augment),
                                            training, 0, checkpoint, {{"identity", identity}}, &file)[0]
                                .accuracy;
    printf("pretrained on classes %s, seed %llu: test accuracy %.4f on them\n",
           CLI::detail::join(prelude.old_classes).c_str(), static_cast<unsigned long long>(seed), accuracy);
    fflush(stdout);
    file.metadata = {{"format", "baton-pretrained-1"},
                     {"architecture", network->architecture()},
                     {"pretraining", identity.dump()},
                     {"test_accuracy", std::to_string(accuracy)}};
    save_safetensors(path, file);
    fs::remove(checkpoint);
  }
  NamedWeights weights;
  for (const TensorSpec& t : network->layout().tensors()) weights[t.name] = file.at(t.name, t.shape).as<float>();
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

std::string name_search(const Method& method, int parts, uint64_t seed) {
  return method.name + " T=" + std::to_string(parts) + " seed " + std::to_string(seed);
}

// The search for sigma: on nine tenths of the first part, a replica for each seed and value of the grid trains,
// `at_once` of them side by side, and is judged on the rest of that part. `kept` is what checkpoint/sd_search.json
// holds, so that a resumed run does not search again: {"identity": of the search, "points": {name_search(): [[sd,
// accuracy, NLL], ...]}}. pretrained: by seed.
void find_points(const PaperProgram& program, const Prelude& prelude, const Method& method, int parts,
                 const std::map<uint64_t, FromOldClasses>& pretrained, size_t at_once, json& kept) {
  const Images& images = prelude.new_set.train;
  const fs::path running = checkpoint_folder(program) / "sd_search.safetensors";
  std::vector<std::pair<uint64_t, double>> missing;  // seed and sd
  for (uint64_t seed : program.seed_numbers()) {
    const std::vector<double> grid = parse_numbers("--sigma-grid", prelude.grid, positive);
    json& found = kept["points"][name_search(method, parts, seed)];
    if (found.is_null()) found = json::array();
    for (size_t i = found.size(); i < grid.size(); i++) missing.emplace_back(seed, grid[i]);
  }
  while (!missing.empty()) {
    const auto end = missing.begin() + long(std::min(missing.size(), at_once));
    const std::vector<std::pair<uint64_t, double>> points(missing.begin(), end);
    missing.erase(missing.begin(), end);
    TrainingSettings training;
    training.kind = method.kind, training.epochs = prelude.grid_epochs;
    training.replicas.clear();
    Stages stages;
    std::vector<Images> hold_outs;
    json extra{{"identity", kept["identity"]}, {"search", json::array()}};
    for (const auto& [seed, sd] : points) {
      std::vector<int32_t> rest = split_parts(images.count, parts, seed)[0];
      const size_t learned = rest.size() - std::max<size_t>(1, rest.size() / 10);
      hold_outs.push_back(subset(images, std::span(rest).subspan(learned)));
      rest.resize(learned);
      stages.sizes = {int(learned)};
      stages.order.push_back(rest);
      training.replicas.push_back({seed, method.settings, pretrained.at(seed), sd});
      extra["search"].push_back({name_search(method, parts, seed), sd});
    }
    stages.augment = {program.preset.augment};
    const std::vector<Metrics> metrics = train_and_judge(program, prelude, images, hold_outs, stages, training,
                                                         program.preset.samples, running, extra, nullptr);
    for (size_t r = 0; r < points.size(); r++)
      kept["points"][name_search(method, parts, points[r].first)].push_back(
          {points[r].second, metrics[r].accuracy, metrics[r].nll});
    write_file_atomically(checkpoint_folder(program) / "sd_search.json", kept.dump());
    fs::remove(running);
  }
}

std::string sentence_about(const json& result, const std::vector<Method>& methods, int parts) {
  const double none = final_accuracy(result, "ffg", parts), ft = final_accuracy(result, "ft_pretrained", parts);
  std::string sentence;
  for (const Method& method : methods) {
    const double value = final_accuracy(result, method.name, parts);
    if (method.name.find('_') == std::string::npos || method.name == "ft_pretrained" || !std::isfinite(value) ||
        !std::isfinite(none))
      continue;
    const auto compare = [&](const char* words, const char* other_name, double other) {
      const double gap = 100 * (value - other);
      sentence += format_text("%s %.2f points %s %s (%.2f %%)", words, std::abs(gap), gap >= 0 ? "ahead of" : "behind",
                              other_name, 100 * other);
    };
    sentence += format_text("%s ends at %.2f %%", method.name.c_str(), 100 * value);
    compare(",", "FFG without pretraining", none);
    if (std::isfinite(ft)) compare(" and", "pretrained FT", ft);
    sentence += ". ";
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
  Prelude prelude;
  if (!program.paper()) {
    prelude.old_limit = 10000;
    prelude.epochs = prelude.grid_epochs = 10;
    prelude.grid = "0.003,0.01,0.03,0.1";
  }
  program.methods = "ft,ft_pretrained,ffg,ffg_grid,ffg_laplace";
  program.parts = "10";
  program.out_prefix = "results/cifar5p5_";
  program.add_options("quick (subsets) or paper (all): what the other options start from");
  LaplaceSettings& laplace = prelude.laplace;
  auto* options = program.app.add_option_group("Pretraining and priors");
  options->add_option("--class-seed", prelude.class_seed, "of the draw of the five old classes")
      ->check(CLI::NonNegativeNumber);
  options->add_option("--pretrain-epochs", prelude.epochs, "on the old classes")->check(CLI::PositiveNumber);
  options->add_option("--old-limit", prelude.old_limit, "use the first N images of the old classes (0: all)")
      ->check(CLI::NonNegativeNumber);
  options->add_option("--transfer", prelude.transfer, "conv, all-but-last or all: the rest is fresh");
  options->add_option("--sigma-grid", prelude.grid, "standard deviations");
  options->add_option("--curvature", prelude.curvature, "of the Laplace prior: ggn or empirical");
  options->add_option("--tau", laplace.tau, "the Laplace prior's own precision");
  options->add_option("--laplace-temperature", laplace.temperature, "divides the data's precision");
  if (!program.parse()) return 0;
  const Preset& p = program.preset;
  if (program.given("--epochs")) prelude.grid_epochs = p.epochs;  // of every stage, the grid's too
  parse_numbers("--sigma-grid", prelude.grid, positive);
  const Curvature kind = parse_curvature(prelude.curvature);
  const std::set<std::string> names = choose_transferred(prelude.transfer, prelude.make()->layout());
  const std::vector<Method> methods = program.chosen_methods();
  const std::vector<uint64_t> seeds = program.seed_numbers();

  // The old classes' set and the new ones', from one reading of all.
  const Dataset all = find_cifar10(program.data);
  const std::vector<std::vector<int32_t>> drawn = split_parts(10, 1, uint64_t(prelude.class_seed) + 1000);
  const std::vector<int> classes(drawn[0].begin(), drawn[0].end());
  prelude.old_classes.assign(classes.begin(), classes.begin() + 5);
  prelude.new_classes.assign(classes.begin() + 5, classes.end());
  std::sort(prelude.old_classes.begin(), prelude.old_classes.end());
  std::sort(prelude.new_classes.begin(), prelude.new_classes.end());
  for (const auto& [set, chosen, train_limit] : {std::tuple{&prelude.old_set, &prelude.old_classes, prelude.old_limit},
                                                 std::tuple{&prelude.new_set, &prelude.new_classes, p.train_limit}}) {
    *set = {all.name,
            all.source + ", classes " + CLI::detail::join(*chosen),
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
  make_directories(checkpoint_folder(program));
  if (!program.resume)  // a fresh run's checkpoints are none of an earlier one's
    for (const fs::directory_entry& entry : fs::directory_iterator(checkpoint_folder(program)))
      if (const std::string name = entry.path().filename(); name.starts_with("pretraining_") || name.starts_with("sd_"))
        fs::remove(entry.path());
  printf("bil_cifar5p5: %s, old classes %s (%d images), new classes %s (%d training and %d test images)%s, preset %s\n",
         all.generated ? "GENERATED images (no CIFAR-10 was found)" : "CIFAR-10",
         CLI::detail::join(prelude.old_classes).c_str(), prelude.old_set.train.count,
         CLI::detail::join(prelude.new_classes).c_str(), prelude.new_set.train.count, prelude.new_set.test.count,
         all.path.empty() ? "" : (" from " + all.path).c_str(), program.preset_name.c_str());
  fflush(stdout);

  const auto wanted = [&](const char* prior) {
    return std::any_of(methods.begin(), methods.end(),
                       [&](const Method& m) { return prior ? prior_name(m) == prior : !prior_name(m).empty(); });
  };
  std::map<uint64_t, FromOldClasses> flat, curved;  // by seed
  for (uint64_t seed : seeds) {
    if (!wanted(nullptr)) break;
    const NamedWeights weights = pretrain(program, prelude, seed);
    Pretrained from;
    for (const std::string& name : names) from.weights[name] = weights.at(name);
    from.description =
        format_text("pretrained on %d images of classes %s for %g epochs, transfer %s", prelude.old_set.train.count,
                    CLI::detail::join(prelude.old_classes).c_str(), prelude.epochs, prelude.transfer.c_str());
    flat[seed] = std::make_shared<Pretrained>(from);
    if (!wanted("laplace")) continue;
    Device device;
    device.set_precision(parse_precision(program.precision));
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
    from.description +=
        format_text(", Laplace %s, tau %g, temperature %g", name(kind), laplace.tau, laplace.temperature);
    curved[seed] = std::make_shared<Pretrained>(from);
    printf("Laplace prior, seed %llu: mean log sigma %.2f over %.0f weights\n", static_cast<unsigned long long>(seed),
           sum / count, count);
    fflush(stdout);
  }

  const size_t at_once = program.at_once ? program.at_once : on_gpu ? SIZE_MAX : 1;
  json of_search{{"pretraining", describe_pretraining(program, prelude, 0)},
                 {"set", {prelude.new_set.source, prelude.new_set.train.count}},
                 {"transfer", prelude.transfer},
                 {"grid", prelude.grid},
                 {"grid_epochs", prelude.grid_epochs}};
  for (const Method& m : methods)
    if (prior_name(m) == "grid") of_search["settings"][m.name] = m.settings;
  json kept = left_by_earlier_run(checkpoint_folder(program) / "sd_search.json", of_search);
  if (kept.is_null()) kept = {{"identity", of_search}, {"points", json::object()}};
  json searches = json::array();
  std::vector<ExperimentRun> runs;
  for (const Method& m : methods)
    for (int t : parts) {
      const std::string from = prior_name(m);
      if (from == "grid") find_points(program, prelude, m, t, flat, at_once, kept);
      for (uint64_t seed : seeds) {
        ExperimentRun& run = runs.emplace_back(program.make_run(m, m.name, prelude.network, seed));
        run.stages = split_into_parts(prelude.new_set.train.count, t, {seed}, p.augment);
        Replica& replica = run.training.replicas[0];
        if (from == "pretrained" || from == "grid") replica.pretrained = flat.at(seed);
        if (from == "laplace") replica.pretrained = curved.at(seed);
        if (from != "grid") continue;
        const json& points = kept["points"][name_search(m, t, seed)];
        const auto nll = [](const json& point) { return point[2].is_null() ? NAN : double(point[2]); };
        replica.pretrained_sd = (*std::min_element(points.begin(), points.end(),
                                                   [&](const json& a, const json& b) { return nll(a) < nll(b); }))[0];
        json said{{"method", m.name}, {"parts", t}, {"seed", seed}, {"chosen_sd", replica.pretrained_sd}};
        printf("%s T=%d seed %llu, sigma on the hold-out of the first part:", m.name.c_str(), t,
               static_cast<unsigned long long>(seed));
        for (const json& g : points) {
          said["points"].push_back({{"sd", g[0]}, {"holdout_accuracy", g[1]}, {"holdout_nll", nll(g)}});
          printf(" %g: NLL %.3f (%.3f)", double(g[0]), nll(g), double(g[1]));
        }
        printf("; chosen %g\n", replica.pretrained_sd);
        fflush(stdout);
        searches.push_back(said);
      }
    }

  ExperimentOptions experiment = program.experiment();
  experiment.normalisation = prelude.normalisation;
  experiment.extra = {{"old_classes", prelude.old_classes},
                      {"new_classes", prelude.new_classes},
                      {"old_images", prelude.old_set.train.count},
                      {"pretrain_epochs", prelude.epochs},
                      {"transfer", prelude.transfer},
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
