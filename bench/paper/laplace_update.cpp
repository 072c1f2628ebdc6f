// Bayesian updates of a last layer in closed form (Huseljic et al. 2024): a model of 10, 100 or 1,000 samples takes in
// 1 to 50 new ones, beside first-order steps, re-weighted Monte Carlo draws and retraining; then active learning with
// and without updates between the picks of a batch. The features are pixels, the last hidden layer of Baton's own
// networks, random Fourier features of another width, or matrices from files.
#include <fstream>
#include <map>
#include <numeric>

#include "bench/common/laplace_update_report.h"
#include "bench/common/program.h"
#include "engine/io/program.h"
#include "trainers/last_layer/active_learning.h"
#include "trainers/last_layer/evidence.h"
#include "trainers/last_layer/update_study.h"
#include "trainers/trainer.h"

using namespace baton;

namespace {

// The defaults are those of the preset `paper`.
struct Options {
  std::string preset, sets = "pixels,lenet5,conv3fc3,fourier", parts = "updates,active", methods, data, out,
                      precision = "double", extractor_precision = "fp32";
  bool resume = false;
  // Features.
  std::string features, labels, test_features, test_labels;
  int extractor_images = 20000, extractor_epochs = 10, pool = 20000, test = 10000, fourier_dim = 768;
  double fourier_length = 10;
  // Updates.
  std::string taus = "1,0.1", link = "mean_field";
  int adam_seeds = -1;
  UpdateStudyOptions study;
  // Active learning.
  std::string acquisitions = "random,margin,entropy,bald,badge,bait,look_ahead", rule = "implicit";
  std::vector<uint64_t> active_seeds = std::vector<uint64_t>(30);  // 0 to 29
  int active_pool = 1000;
  ActiveLearningOptions active;

  bool by_evidence() const { return taus == "evidence"; }
  int most_base() const { return *std::max_element(study.bases.begin(), study.bases.end()); }
};

Options preset_options(const std::string& name) {
  Options o;
  o.preset = name;
  o.study.seeds = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, o.study.adam_seeds = 10, o.active.cycles = 20;
  if (name == "quick") {
    o.sets = "pixels,lenet5";
    o.taus = "1", o.study.bases = {100, 1000}, o.study.news = {1, 10, 50}, o.study.seeds = {0, 1, 2, 3, 4};
    o.acquisitions = "random,margin,badge,look_ahead", o.active_seeds.resize(10);
    o.extractor_images = 2000, o.extractor_epochs = 2, o.pool = 5000, o.test = 1000;
    o.study.adam_seeds = 5, o.active_pool = 600, o.active.cycles = 8;
  }
  std::iota(o.active_seeds.begin(), o.active_seeds.end(), 0);
  return o;
}

// Empty: help was asked for and printed.
std::optional<Options> read_options(int argc, char** argv) {
  Options o = preset_options(find_preset(argc, argv));
  UpdateStudyOptions& study = o.study;
  CLI::App app{
      "Bayesian updates of a last layer in closed form: a model of few samples takes in new ones, beside first-order\n"
      "steps, re-weighted draws and retraining; then active learning with and without updates between the picks of a\n"
      "batch. Writes result.json, log.jsonl and a plot to --out. The defaults shown are those of the preset."};
  app.option_defaults()->always_capture_default();
  CLI::App* group = nullptr;
  const auto begin_group = [&](const char* title) { group = app.add_option_group(title); };
  const auto add = [&](const char* name, auto& variable, const char* help) {
    return group->add_option(name, variable, help);
  };
  const auto add_positive = [&](const char* name, auto& number, const char* help) {
    add(name, number, help)->check(CLI::PositiveNumber);
  };
  const auto add_list = [&](const char* name, auto& list, const char* help) {
    return add(name, list, help)->delimiter(',');
  };
  begin_group("What to run");
  add("--preset", o.preset, "quick (minutes on two cores) or paper: the defaults of what is not given");
  add("--sets", o.sets, "features: of pixels, lenet5 (MNIST), conv3fc3 (CIFAR-10), fourier, file");
  add("--parts", o.parts, "of updates,active");
  add("--methods", o.methods,
      "of base,first_order,monte_carlo,gaussian,implicit,one_by_one,lbfgs_warm,newton_warm,retrained,adam "
      "(default: all)");
  add_list("--seeds", study.seeds, "of the choice of samples (updates)");
  add("--data", o.data, "folder with the set's files (else $BATON_DATA, ./data, generated)");
  add("--out", o.out, "folder of the results (default: results/laplace_update_PRESET)");
  group->add_flag("--resume", o.resume, "go on where a killed run in --out stopped");
  add("--precision", o.precision, "of the last layer: double or float")->check(CLI::IsMember({"double", "float"}));
  begin_group("Features");
  add("--features", o.features, "matrix of the set 'file': FILE.npy or FILE.safetensors[:NAME]");
  add("--labels", o.labels, "its labels");
  add("--test-features", o.test_features, "the same of test samples");
  add("--test-labels", o.test_labels, "their labels");
  add_positive("--extractor-images", o.extractor_images, "training images that the network learns");
  add_positive("--extractor-epochs", o.extractor_epochs, "of its training");
  add("--extractor-precision", o.extractor_precision, "of its products: fp32 or tf32");
  add_positive("--pool", o.pool, "further training images, for the last layer");
  add_positive("--test", o.test, "test images");
  add("--fourier-dim", o.fourier_dim, "of the set 'fourier'");
  add("--fourier-length", o.fourier_length, "its length scale");
  begin_group("Updates");
  add_list("--bases", study.bases, "samples before the update")->check(CLI::Range(1, 1000000));
  add_list("--new", study.news, "new samples")->check(CLI::Range(1, 1000000));
  add("--taus", o.taus, "prior precisions; 'evidence': for each set, the one of highest evidence for the largest base");
  add_positive("--gamma", study.gamma, "of the authors' rule");
  add_positive("--gamma-first-order", study.gamma_first_order, "step size");
  add_positive("--gamma-monte-carlo", study.gamma_monte_carlo, "power of the likelihood");
  add_positive("--draws", study.draws, "of Monte Carlo re-weighting");
  add("--repeats", study.repeats, "of a timed update");
  add_positive("--adam-epochs", study.adam_epochs, "of retraining by Adam");
  add("--adam-seeds", o.adam_seeds, "seeds for which Adam runs (-1: all of the preset's)");
  add("--link", o.link, "of NLL and ECE: map, mean_field, probit, monte_carlo, bridge, bridge_norm");
  begin_group("Active learning");
  add("--acquisitions", o.acquisitions, "of random,margin,entropy,bald,badge,bait,look_ahead");
  add_list("--active-seeds", o.active_seeds, "of the pool, the first samples and the choices");
  add_positive("--active-pool", o.active_pool, "samples to choose from");
  add_positive("--active-tau", o.active.layer.tau, "prior precision");
  add("--active-rule", o.rule, "of the updates between picks: implicit, gaussian or categorical");
  add_positive("--initial", o.active.initial, "labelled samples at the start");
  add_positive("--batch", o.active.batch, "samples chosen at a time");
  add_positive("--cycles", o.active.cycles, "batches");
  add_positive("--trials", o.active.trials, "batches that look-ahead tries");
  if (!parse_options(app, argc, argv)) return std::nullopt;

  study.taus.clear();
  if (!o.by_evidence()) study.taus = parse_numbers("--taus", o.taus, positive);
  if (o.adam_seeds >= 0) study.adam_seeds = o.adam_seeds;
  study.link.link = parse_name<Link>(o.link);
  if (!o.methods.empty()) {
    study.methods.clear();
    for (const std::string& m : split_list(o.methods)) study.methods.push_back(parse_name<UpdateMethod>(m));
  }
  LastLayerUpdateOptions& update = o.active.selection.update;
  update.rule = parse_name<UpdateRule>(o.rule), update.gamma = study.gamma;
  if (update.rule == UpdateRule::gaussian) o.active.layer.weight = SampleWeight::gaussian;
  o.active.selection.link.draws = 200;
  for (const std::string& part : split_list(o.parts))
    if (part != "updates" && part != "active") throw InputError("unknown part '" + part + "': updates or active");
  if (o.out.empty()) o.out = "results/laplace_update_" + o.preset;
  return o;
}

// ----------------------------------------------------------------------------------------------------------- features
struct FeaturePair {
  std::string name, title;
  bool generated = false;
  FeatureSet pool, test;
  int classes() const { return std::max(pool.classes, test.classes); }
};

FeatureSet first_rows(FeatureSet set, int count) {
  set.count = std::min(count, set.count);
  set.x.resize(size_t(set.count) * set.dim);
  set.labels.resize(set.count);
  return set;
}

// Trains the network whose last hidden layer makes the features. Its images are not among the last layer's samples.
NamedWeights train_extractor(Device& device, const NetworkFactory& make, const Images& images,
                             const Normalisation& normalisation, int epochs) {
  Arena arena;
  TrainingSettings training;
  training.kind = "ft", training.epochs = epochs;
  training.replicas = {{0, {{"lr", 1e-3}, {"schedule", "linear"}}}};
  Trainer trainer(device, arena, make, upload_images(device, arena, images, normalisation),
                  split_into_parts(images.count, 1, {0}), training);
  trainer.begin_stage(0);
  trainer.run(trainer.count_steps(0));
  NamedWeights weights;
  const ParameterStore& store = trainer.posterior().store();
  for (const TensorSpec& t : store.layout().tensors()) weights[t.name] = store.read(device, "mean", 0, t);
  return weights;
}

FeaturePair make_features(Device& device, const std::string& name, const Options& o) {
  FeaturePair pair{name, "features from files", false, {}, {}};
  if (name == "file") {
    if (o.features.empty() || o.labels.empty() || o.test_features.empty() || o.test_labels.empty())
      throw InputError("the set 'file' needs --features, --labels, --test-features and --test-labels");
    pair.pool = load_features(o.features, o.labels);
    pair.test = first_rows(load_features(o.test_features, o.test_labels), o.test);
    if (pair.pool.dim != pair.test.dim)
      throw InputError("--features have " + std::to_string(pair.pool.dim) + " columns, --test-features " +
                       std::to_string(pair.test.dim));
    return pair;
  }
  const bool cifar = name == "conv3fc3", network = cifar || name == "lenet5", fourier = name == "fourier";
  if (!network && !fourier && name != "pixels")
    throw InputError("unknown set '" + name + "': of pixels, lenet5, conv3fc3, fourier, file");
  Limits limits;
  limits.train = o.extractor_images + o.pool, limits.test = o.test;
  const auto data = o.data.empty() ? std::nullopt : std::optional<std::filesystem::path>(o.data);
  const Dataset set = cifar ? find_cifar10(data, 0, limits) : find_mnist(data, 0, limits);
  std::vector<int32_t> first, rest;
  for (int i = 0; i < set.train.count; i++) (i < o.extractor_images ? first : rest).push_back(i);
  if (rest.empty()) throw InputError("no training images are left beside the extractor's");
  const Images learned = subset(set.train, first), pool = subset(set.train, rest);
  const Normalisation normalisation = cifar ? standardise(learned) : unit_range;
  pair.title = "MNIST, pixels", pair.generated = set.generated;
  if (network) {
    pair.title = cifar ? "CIFAR-10, 3Conv3FC features" : "MNIST, LeNet-5 features";
    const NetworkFactory make = network_factory(network_spec(cifar ? "3conv3fc" : "lenet5"));
    const NamedWeights weights = train_extractor(device, make, learned, normalisation, o.extractor_epochs);
    pair.pool = extract_features(device, make, weights, pool, normalisation);
    pair.test = extract_features(device, make, weights, set.test, normalisation);
    return pair;
  }
  pair.pool = pixel_features(pool, normalisation), pair.test = pixel_features(set.test, normalisation);
  if (fourier) {
    pair.title = "MNIST, " + std::to_string(o.fourier_dim) + " random Fourier features";
    for (FeatureSet* s : {&pair.pool, &pair.test}) *s = fourier_features(*s, o.fourier_dim, o.fourier_length, 0, 3);
  }
  return pair;
}

// ------------------------------------------------------------------------------------------------------- earlier runs
// The lines of the finished units that a killed run has left in its log, and under "settings" the line of its settings.
// A unit is a (set, tau, base, seed) of updates, or a (set, acquisition, mode, seed) of active learning. The lines of
// other units are dropped, and these run again.
using Earlier = std::map<std::string, std::vector<json>>;

// Empty where there is no log. Throws InputError unless the first line has the same settings.
Earlier read_earlier(const std::filesystem::path& log, const json& settings) {
  std::ifstream file(log);
  Earlier begun, units;  // a unit's last line says that it is finished
  for (std::string text; std::getline(file, text);) {
    const json line = json::parse(text, nullptr, false);
    if (!line.is_object()) break;  // torn by the kill
    if (units.empty()) {
      if (line.value("part", "") != "settings" || line["settings"] != settings)
        throw InputError("--resume: " + log.string() + " is of a run with other settings");
      units["settings"] = {line};
    } else if (line.contains("unit")) {
      units[line["unit"]] = begun[line["unit"]];
    } else if (line.contains("of")) {
      begun[line["of"]].push_back(line);
    }
  }
  return units;
}

// ------------------------------------------------------------------------------------------------------------ updates
// Runs the study on one set and adds its summaries to the result.
template <class Real>
void run_updates(Device& device, const FeaturePair& pair, Options& o, RunLog& log, const Earlier& earlier,
                 json& result) {
  UpdateStudyOptions& study = o.study;
  if (o.by_evidence()) {
    Arena arena;
    const FeatureRows<double> rows = upload_features<double>(device, arena, first_rows(pair.pool, o.most_base()));
    const TunedPrior tuned = tune_prior(device, rows, pair.classes(), EvidenceStructure::shared, study.weight);
    printf("%s: tau = %.3g has the highest evidence (%.1f) for %d samples\n", pair.name.c_str(), tuned.tau,
           tuned.evidence, rows.count);
    study.taus = {tuned.tau};
    result["sets"].back()["tuned"] = {{"tau", tuned.tau}, {"taus", tuned.taus}, {"evidences", tuned.evidences}};
  }
  const auto unit = [&](double tau, int base, uint64_t seed) {
    return json{"updates", pair.name, tau, base, seed}.dump();
  };
  std::vector<json> lines;
  study.skip = [&](double tau, int base, uint64_t seed) {
    const auto found = earlier.find(unit(tau, base, seed));
    if (found != earlier.end()) lines.insert(lines.end(), found->second.begin(), found->second.end());
    return found != earlier.end();
  };
  study.finished = [&](double tau, int base, uint64_t seed) { log.epoch({{"unit", unit(tau, base, seed)}}); };
  run_update_study<Real>(device, pair.pool, pair.test, study, [&](const json& row) {
    json line{{"part", "updates"}, {"of", unit(row["tau"], row["base"], row["seed"])}, {"set", pair.name}};
    line.update(row);
    lines.push_back(line);
    log.epoch(line);
  });
  for (const json& summary : summarise(lines)) result["updates"].push_back(summary);
  printf("%s\n%s", format_updates(result["updates"], pair.name, study).c_str(),
         describe_updates(result["updates"], pair.name, study, o.most_base()).c_str());
}

// ---------------------------------------------------------------------------------------------------- active learning
struct Strategy {
  std::string acquisition, mode, label;
};

std::vector<Strategy> parse_strategies(const std::string& text) {
  std::vector<Strategy> list;
  for (const std::string& name : split_list(text)) {
    if (name == "random" || name == "look_ahead") {
      list.push_back({name, name, name == "random" ? name : "look-ahead (knows the test labels)"});
    } else {
      parse_name<Acquisition>(name);
      list.push_back({name, "top", name + ", top of the batch"});
      list.push_back({name, "sequential", name + ", update between picks"});
    }
  }
  return list;
}

// The curves of one strategy for all seeds.
template <class Real>
json run_active(Device& device, const FeaturePair& pair, const Strategy& strategy, const Options& o, RunLog& log,
                const Earlier& earlier) {
  const json head{{"set", pair.name}, {"acquisition", strategy.acquisition}, {"mode", strategy.mode}};
  json row = head;
  row["label"] = strategy.label;
  double seconds = 0;
  Arena test_arena;
  const FeatureRows<Real> test = upload_features<Real>(device, test_arena, pair.test);
  for (uint64_t seed : o.active_seeds) {
    const std::string unit = json{"active", pair.name, strategy.acquisition, strategy.mode, seed}.dump();
    json line{{"part", "active"}, {"of", unit}};
    if (const auto found = earlier.find(unit); found != earlier.end()) {
      line = found->second.at(0);
    } else {
      std::vector<int> index = draw_order(pair.pool.count, seed, 22);
      index.resize(std::min(o.active_pool, pair.pool.count));
      Arena arena;
      const FeatureRows<Real> pool = upload_features<Real>(device, arena, rows_of(pair.pool, index));
      ActiveLearningOptions a = o.active;
      a.look_ahead = strategy.mode == "look_ahead";
      a.seed = a.selection.seed = seed;
      if (!a.look_ahead) a.selection.acquisition = parse_name<Acquisition>(strategy.acquisition);
      a.selection.sequential = strategy.mode == "sequential";
      const ActiveLearningCurve curve = run_active_learning(device, pool, test, pair.classes(), a);
      line.update(head);
      line.update({{"seed", seed},
                   {"labelled", curve.labelled},
                   {"accuracy", curve.accuracy},
                   {"nll", curve.nll},
                   {"selection_seconds", curve.selection_seconds}});
      log.epoch(line);
      log.epoch({{"unit", unit}});
    }
    row["labelled"] = line["labelled"];
    row["seeds"].push_back(seed);
    for (const char* key : {"accuracy", "nll"}) row[key].push_back(line[key]);
    seconds += double(line["selection_seconds"]);
  }
  row["selection_seconds"] = seconds / double(o.active_seeds.size());
  return row;
}

// ------------------------------------------------------------------------------------------------------------ program
json describe_settings(const Options& o) {
  const UpdateStudyOptions& study = o.study;
  return {{"taus", o.by_evidence() ? json(o.taus) : json(study.taus)},
          {"bases", study.bases},
          {"new", study.news},
          {"seeds", study.seeds},
          {"weight", to_string(study.weight)},
          {"gamma", study.gamma},
          {"gamma_first_order", study.gamma_first_order},
          {"gamma_monte_carlo", study.gamma_monte_carlo},
          {"draws", study.draws},
          {"repeats", study.repeats},
          {"adam_epochs", study.adam_epochs},
          {"link", o.link},
          {"precision", o.precision},
          {"extractor_images", o.extractor_images},
          {"extractor_epochs", o.extractor_epochs},
          {"extractor_precision", o.extractor_precision},
          {"active",
           {{"rule", o.rule},
            {"tau", o.active.layer.tau},
            {"pool", o.active_pool},
            {"initial", o.active.initial},
            {"batch", o.active.batch},
            {"cycles", o.active.cycles},
            {"trials", o.active.trials}}}};
}

template <class Real>
void run(Options o) {
  const auto wanted = [&](const char* part) { return o.parts.find(part) != std::string::npos; };
  const std::vector<Strategy> strategies = parse_strategies(o.acquisitions);
  Device device;
  device.set_precision(parse_precision(o.extractor_precision));
  const std::filesystem::path folder = o.out;
  const json settings = describe_settings(o);
  json identity = settings;  // what decides the lines of the log
  identity["images"] = {o.pool, o.test, o.fourier_dim, o.fourier_length, o.adam_seeds};
  identity["features"] = {o.features, o.labels, o.test_features, o.test_labels};
  identity["methods"] = o.methods;
  const Earlier earlier = o.resume ? read_earlier(folder / "log.jsonl", identity) : Earlier();
  RunLog log(folder, !earlier.empty());
  log.truncate_after(
      [&](const json& line) { return line.contains("unit") || earlier.count(line.value("of", "settings")); });
  if (earlier.empty()) log.epoch({{"part", "settings"}, {"settings", identity}});
  json result{{"experiment", "laplace_update"}, {"preset", o.preset},    {"settings", settings},
              {"device", device.description()}, {"sets", json::array()}, {"updates", json::array()},
              {"active", json::array()}};
  printf("laplace_update: preset %s, last layer in %s, on %s\n", o.preset.c_str(), o.precision.c_str(),
         device.description().c_str());
  Dataset shown;
  shown.name = "mnist";
  for (const std::string& name : split_list(o.sets)) {
    FeaturePair pair = make_features(device, name, o);
    if (name != "fourier") append_bias(pair.pool), append_bias(pair.test);  // Fourier features' phases make a bias
    shown.generated |= pair.generated;
    result["sets"].push_back({{"name", name},
                              {"title", pair.title},
                              {"dim", pair.pool.dim},
                              {"classes", pair.classes()},
                              {"pool", pair.pool.count},
                              {"test", pair.test.count},
                              {"source", pair.pool.source},
                              {"generated", pair.generated}});
    printf("\n%s: %s, %d features, %d samples to learn from, %d to test on\n", name.c_str(), pair.title.c_str(),
           pair.pool.dim, pair.pool.count, pair.test.count);
    fflush(stdout);
    if (wanted("updates")) {
      run_updates<Real>(device, pair, o, log, earlier, result);
      fflush(stdout);
      log.result(result);
    }
    if (!wanted("active")) continue;
    for (const Strategy& strategy : strategies) {
      const json row = run_active<Real>(device, pair, strategy, o, log, earlier);
      result["active"].push_back(row);
      double last = 0;
      for (const json& curve : row["accuracy"]) last += double(curve.back()) / double(row["accuracy"].size());
      printf("%-12s %-36s accuracy %.2f %% with %d labels, choosing took %.3f s a run\n", name.c_str(),
             strategy.label.c_str(), 100 * last, int(row["labelled"].back()), double(row["selection_seconds"]));
      fflush(stdout);
      log.result(result);
    }
    for (const Strategy& strategy : strategies)
      if (strategy.mode == "top") printf("%s", describe_active(result["active"], name, strategy.acquisition).c_str());
  }
  log.result(result);
  print_files(shown, folder);
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("laplace_update", [&] {
    try {
      if (const std::optional<Options> o = read_options(argc, argv))
        o->precision == "double" ? run<double>(*o) : run<float>(*o);
    } catch (const Stopped&) {  // the program's words for whatever was under way
      throw_stopped("what is finished is in log.jsonl; --resume goes on from it");
    }
    return 0;
  });
}
