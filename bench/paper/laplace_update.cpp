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
                      precision = "double";
  bool resume = false;
  // Features.
  std::string features, labels, test_features, test_labels;
  int extractor_images = 20000, extractor_epochs = 10, pool = 20000, test = 10000, fourier_dim = 768;
  double fourier_length = 10;
  // Updates. `study` has what these words and lists mean.
  std::string seeds = "0,1,2,3,4,5,6,7,8,9", taus = "1,0.1", bases = "10,100,1000", news = "1,2,5,10,20,50",
              link = "mean_field";
  int adam_seeds = -1;
  UpdateStudyOptions study;
  // Active learning.
  std::string acquisitions = "random,margin,entropy,bald,badge,bait,look_ahead", rule = "implicit";
  std::string active_seeds = "0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29";
  int active_pool = 1000, initial = 20, batch = 10, cycles = 20, trials = 300;
  double active_tau = 1;

  bool by_evidence() const { return taus == "evidence"; }
  int most_base() const { return *std::max_element(study.bases.begin(), study.bases.end()); }
};

Options preset_options(const std::string& name) {
  Options o;
  o.preset = name;
  o.study.adam_seeds = 10;
  if (name == "quick") {
    o.sets = "pixels,lenet5";
    o.taus = "1", o.bases = "100,1000", o.news = "1,10,50", o.seeds = "0,1,2,3,4";
    o.acquisitions = "random,margin,badge,look_ahead", o.active_seeds = "0,1,2,3,4,5,6,7,8,9";
    o.extractor_images = 2000, o.extractor_epochs = 2, o.pool = 5000, o.test = 1000;
    o.study.adam_seeds = 5, o.active_pool = 600, o.cycles = 8;
  } else if (name != "paper") {
    refuse_preset(name);
  }
  return o;
}

std::vector<int> parse_counts(const std::string& option, const std::string& text) {
  std::vector<int> list;
  for (uint64_t n : parse_wholes(option, text)) {
    if (n < 1 || n > 1000000) throw InputError(option + ": 1 to 1,000,000, not " + std::to_string(n));
    list.push_back(int(n));
  }
  return list;
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
  auto* what = app.add_option_group("What to run");
  what->add_option("--preset", o.preset, "quick (minutes on two cores) or paper: the defaults of what is not given");
  what->add_option("--sets", o.sets, "features: of pixels, lenet5 (MNIST), conv3fc3 (CIFAR-10), fourier, file");
  what->add_option("--parts", o.parts, "of updates,active");
  what->add_option("--methods", o.methods,
                   "of base,first_order,monte_carlo,gaussian,implicit,one_by_one,lbfgs_warm,newton_warm,retrained,adam "
                   "(default: all)");
  what->add_option("--seeds", o.seeds, "of the choice of samples (updates)");
  what->add_option("--data", o.data, "folder with the set's files (else $BATON_DATA, ./data, generated)");
  what->add_option("--out", o.out, "folder of the results (default: results/laplace_update_PRESET)");
  what->add_flag("--resume", o.resume, "go on where a killed run in --out stopped");
  what->add_option("--precision", o.precision, "of the last layer: double or float");
  auto* features = app.add_option_group("Features");
  features->add_option("--features", o.features, "matrix of the set 'file': FILE.npy or FILE.safetensors[:NAME]");
  features->add_option("--labels", o.labels, "its labels");
  features->add_option("--test-features", o.test_features, "the same of test samples");
  features->add_option("--test-labels", o.test_labels, "their labels");
  features->add_option("--extractor-images", o.extractor_images, "training images that the network learns");
  features->add_option("--extractor-epochs", o.extractor_epochs, "of its training");
  features->add_option("--pool", o.pool, "further training images, for the last layer");
  features->add_option("--test", o.test, "test images");
  features->add_option("--fourier-dim", o.fourier_dim, "of the set 'fourier'");
  features->add_option("--fourier-length", o.fourier_length, "its length scale");
  auto* updates = app.add_option_group("Updates");
  updates->add_option("--bases", o.bases, "samples before the update");
  updates->add_option("--new", o.news, "new samples");
  updates->add_option("--taus", o.taus,
                      "prior precisions; 'evidence': for each set, the one of highest evidence for the largest base");
  updates->add_option("--gamma", study.gamma, "of the authors' rule");
  updates->add_option("--gamma-first-order", study.gamma_first_order, "step size");
  updates->add_option("--gamma-monte-carlo", study.gamma_monte_carlo, "power of the likelihood");
  updates->add_option("--draws", study.draws, "of Monte Carlo re-weighting");
  updates->add_option("--repeats", study.repeats, "of a timed update");
  updates->add_option("--adam-epochs", study.adam_epochs, "of retraining by Adam");
  updates->add_option("--adam-seeds", o.adam_seeds, "seeds for which Adam runs (-1: all of the preset's)");
  updates->add_option("--link", o.link, "of NLL and ECE: map, mean_field, probit, monte_carlo, bridge, bridge_norm");
  auto* active = app.add_option_group("Active learning");
  active->add_option("--acquisitions", o.acquisitions, "of random,margin,entropy,bald,badge,bait,look_ahead");
  active->add_option("--active-seeds", o.active_seeds, "of the pool, the first samples and the choices");
  active->add_option("--active-pool", o.active_pool, "samples to choose from");
  active->add_option("--active-tau", o.active_tau, "prior precision");
  active->add_option("--active-rule", o.rule, "of the updates between picks: implicit, gaussian or categorical");
  active->add_option("--initial", o.initial, "labelled samples at the start");
  active->add_option("--batch", o.batch, "samples chosen at a time");
  active->add_option("--cycles", o.cycles, "batches");
  active->add_option("--trials", o.trials, "batches that look-ahead tries");
  if (!parse_options(app, argc, argv)) return std::nullopt;

  study.taus.clear();
  if (!o.by_evidence()) study.taus = parse_numbers("--taus", o.taus, positive);
  study.bases = parse_counts("--bases", o.bases), study.news = parse_counts("--new", o.news);
  study.seeds = parse_wholes("--seeds", o.seeds);
  if (o.adam_seeds >= 0) study.adam_seeds = o.adam_seeds;
  study.link.link = parse_link(o.link);
  if (!o.methods.empty()) {
    study.methods.clear();
    for (const std::string& m : split_list(o.methods)) study.methods.push_back(parse_update_method(m));
  }
  if (!(study.gamma > 0) || !(study.gamma_first_order > 0) || !(study.gamma_monte_carlo > 0) || !(o.active_tau > 0))
    throw InputError("--gamma, --gamma-first-order, --gamma-monte-carlo and --active-tau must be positive");
  if (std::min({study.draws, study.adam_epochs, o.initial, o.batch, o.trials, o.cycles, o.active_pool, o.pool, o.test,
                o.extractor_images, o.extractor_epochs}) < 1)
    throw InputError(
        "--draws, --adam-epochs, --initial, --batch, --trials, --cycles, --active-pool, --pool, --test, "
        "--extractor-images and --extractor-epochs must be at least 1");
  if (o.precision != "double" && o.precision != "float")
    throw InputError("unknown --precision '" + o.precision + "': double or float");
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

FeatureSet first_rows(const FeatureSet& set, int count) {
  std::vector<int> index(std::min(count, set.count));
  std::iota(index.begin(), index.end(), 0);
  return rows_of(set, index);
}

// Trains the network whose last hidden layer makes the features. Its images are not among the last layer's samples.
NamedWeights train_extractor(Device& device, const NetworkFactory& make, const Images& images,
                             const Normalisation& normalisation, int epochs) {
  Arena arena;
  TrainingSettings training;
  training.kind = "ft";
  training.replicas = {{0, {{"lr", 1e-3}, {"schedule", "linear"}}}};
  training.epochs = epochs;
  Trainer trainer(device, arena, make, upload_images(device, arena, images, normalisation),
                  split_into_parts(images.count, 1, {0}), training);
  trainer.begin_stage(0);
  trainer.run(trainer.count_steps(0));
  NamedWeights weights;
  const ParameterStore& store = trainer.posterior().store();
  for (const TensorSpec& t : store.layout().tensors()) weights[t.name] = store.read(device, "mean", 0, t);
  return weights;
}

FeaturePair load_matrices(const Options& o) {
  if (o.features.empty() || o.labels.empty() || o.test_features.empty() || o.test_labels.empty())
    throw InputError("the set 'file' needs --features, --labels, --test-features and --test-labels");
  FeaturePair pair{"file", "features from files", false, load_features(o.features, o.labels),
                   load_features(o.test_features, o.test_labels)};
  if (pair.pool.dim != pair.test.dim)
    throw InputError("--features have " + std::to_string(pair.pool.dim) + " columns, --test-features " +
                     std::to_string(pair.test.dim));
  pair.test = first_rows(pair.test, o.test);
  return pair;
}

FeaturePair make_features(Device& device, const std::string& name, const Options& o) {
  if (name == "file") return load_matrices(o);
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
  FeaturePair pair;
  pair.name = name, pair.generated = set.generated;
  if (network) {
    pair.title = cifar ? "CIFAR-10, 3Conv3FC features" : "MNIST, LeNet-5 features";
    const NetworkFactory make = network_factory(network_spec(cifar ? "3conv3fc" : "lenet5"));
    const NamedWeights weights = train_extractor(device, make, learned, normalisation, o.extractor_epochs);
    pair.pool = extract_features(device, make, weights, pool, normalisation);
    pair.test = extract_features(device, make, weights, set.test, normalisation);
    return pair;
  }
  pair.pool = pixel_features(pool, normalisation), pair.test = pixel_features(set.test, normalisation);
  pair.title = "MNIST, pixels";
  if (fourier) {
    pair.title = "MNIST, " + std::to_string(o.fourier_dim) + " random Fourier features";
    for (FeatureSet* s : {&pair.pool, &pair.test}) *s = fourier_features(*s, o.fourier_dim, o.fourier_length, 0, 3);
  }
  return pair;
}

// ------------------------------------------------------------------------------------------------------- earlier runs
// The finished units that a killed run has left in its log: a (set, tau, base, seed) of updates, or a (set,
// acquisition, mode, seed) of active learning. Their lines stay; others are dropped and run again.
class Earlier {
 public:
  // Throws InputError unless the first line has the same settings.
  Earlier(const std::filesystem::path& log, const json& settings) {
    std::ifstream file(log);
    std::vector<json> lines;
    for (std::string text; std::getline(file, text);) {
      const json line = json::parse(text, nullptr, false);
      if (!line.is_object()) break;  // torn by the kill
      if (line.contains("unit")) units_[line["unit"]];
      lines.push_back(line);
    }
    found_ = !lines.empty();
    if (found_ && (lines[0].value("part", "") != "settings" || lines[0]["settings"] != settings))
      throw InputError("--resume: " + log.string() + " is of a run with other settings");
    for (const json& line : lines)
      if (line.contains("of") && done(line["of"])) units_[line["of"]].push_back(line);
  }
  bool found() const { return found_; }
  bool done(const std::string& unit) const { return units_.count(unit) != 0; }
  bool keeps(const json& line) const {
    return line.value("part", "") == "settings" || line.contains("unit") || (line.contains("of") && done(line["of"]));
  }
  const std::vector<json>& lines(const std::string& unit) const { return units_.at(unit); }  // of a finished unit

 private:
  bool found_ = false;
  std::map<std::string, std::vector<json>> units_;
};

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
    if (!earlier.done(unit(tau, base, seed))) return false;
    for (const json& line : earlier.lines(unit(tau, base, seed))) lines.push_back(line);
    return true;
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
      parse_acquisition(name);
      list.push_back({name, "top", name + ", top of the batch"});
      list.push_back({name, "sequential", name + ", update between picks"});
    }
  }
  return list;
}

// The curves of one strategy for all seeds.
template <class Real>
json run_active(Device& device, const FeaturePair& pair, const Strategy& strategy, const std::vector<uint64_t>& seeds,
                const Options& o, RunLog& log, const Earlier& earlier) {
  json row{{"set", pair.name},          {"acquisition", strategy.acquisition},
           {"mode", strategy.mode},     {"label", strategy.label},
           {"labelled", json::array()}, {"seeds", json::array()},
           {"accuracy", json::array()}, {"nll", json::array()},
           {"selection_seconds", 0.}};
  double seconds = 0;
  Arena test_arena;
  const FeatureRows<Real> test = upload_features<Real>(device, test_arena, pair.test);
  for (uint64_t seed : seeds) {
    const std::string unit = json{"active", pair.name, strategy.acquisition, strategy.mode, seed}.dump();
    json line;
    if (earlier.done(unit)) {
      line = earlier.lines(unit).at(0);
    } else {
      std::vector<int> index = shuffled(pair.pool.count, seed, 22);
      index.resize(std::min(o.active_pool, pair.pool.count));
      Arena arena;
      const FeatureRows<Real> pool = upload_features<Real>(device, arena, rows_of(pair.pool, index));
      ActiveLearningOptions a;
      a.look_ahead = strategy.mode == "look_ahead";
      a.trials = o.trials, a.initial = o.initial, a.batch = o.batch, a.cycles = o.cycles;
      a.seed = a.selection.seed = seed;
      a.layer.tau = o.active_tau;
      if (!a.look_ahead) a.selection.acquisition = parse_acquisition(strategy.acquisition);
      a.selection.sequential = strategy.mode == "sequential";
      a.selection.update.rule = parse_update_rule(o.rule), a.selection.update.gamma = o.study.gamma;
      a.selection.link.draws = 200;
      if (a.selection.update.rule == UpdateRule::gaussian) a.layer.weight = SampleWeight::gaussian;
      const ActiveLearningCurve curve = run_active_learning(device, pool, test, pair.classes(), a);
      line = {{"part", "active"},           {"of", unit},
              {"set", pair.name},           {"acquisition", strategy.acquisition},
              {"mode", strategy.mode},      {"seed", seed},
              {"labelled", curve.labelled}, {"accuracy", curve.accuracy},
              {"nll", curve.nll},           {"selection_seconds", curve.selection_seconds}};
      log.epoch(line);
      log.epoch({{"unit", unit}});
    }
    row["labelled"] = line["labelled"];
    row["seeds"].push_back(seed);
    for (const char* key : {"accuracy", "nll"}) row[key].push_back(line[key]);
    seconds += double(line["selection_seconds"]);
  }
  row["selection_seconds"] = seconds / double(seeds.size());
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
          {"active",
           {{"rule", o.rule},
            {"tau", o.active_tau},
            {"pool", o.active_pool},
            {"initial", o.initial},
            {"batch", o.batch},
            {"cycles", o.cycles},
            {"trials", o.trials}}}};
}

template <class Real>
void run(Options o) {
  const std::vector<std::string> parts = split_list(o.parts);
  const auto wanted = [&](const char* part) { return std::count(parts.begin(), parts.end(), part) != 0; };
  const std::vector<Strategy> strategies = parse_strategies(o.acquisitions);
  const std::vector<uint64_t> active_seeds = parse_wholes("--active-seeds", o.active_seeds);
  parse_update_rule(o.rule);
  Device device;
  const std::filesystem::path folder = o.out;
  const json settings = describe_settings(o);
  json identity = settings;  // what decides the lines of the log
  identity["images"] = {o.pool, o.test, o.fourier_dim, o.fourier_length, o.adam_seeds};
  identity["features"] = {o.features, o.labels, o.test_features, o.test_labels};
  identity["methods"] = o.methods;
  const Earlier earlier(o.resume ? folder / "log.jsonl" : std::filesystem::path(), identity);
  RunLog log(folder, earlier.found());
  if (earlier.found()) log.truncate_after([&](const json& line) { return earlier.keeps(line); });
  else log.epoch({{"part", "settings"}, {"settings", identity}});
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
      const json row = run_active<Real>(device, pair, strategy, active_seeds, o, log, earlier);
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
