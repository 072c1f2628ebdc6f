// Bayesian updates of a last layer in closed form (Huseljic et al. 2024): a model of 10, 100 or 1,000 samples takes in
// 1 to 50 new ones, beside first-order steps, re-weighted Monte Carlo draws and retraining; then active learning with
// and without updates between the picks of a batch. On pixels, on the last hidden layer of Baton's own networks, on
// random Fourier features of another width, or on features from files.
#include <cmath>
#include <fstream>
#include <map>
#include <set>

#include "bench/common/bil.h"
#include "engine/io/program.h"
#include "engine/io/stop.h"
#include "layers/conv3fc3.h"
#include "layers/lenet5.h"
#include "trainers/last_layer/active_learning.h"
#include "trainers/last_layer/exact.h"
#include "trainers/last_layer/update_study.h"

using namespace baton;

namespace {

struct Preset {
  std::string sets = "pixels,lenet5,conv3fc3,fourier", taus = "1,0.1", bases = "10,100,1000", news = "1,2,5,10,20,50",
              seeds = "0,1,2,3,4,5,6,7,8,9", acquisitions = "random,margin,entropy,bald,badge,bait,look_ahead";
  int extractor_images = 20000, extractor_epochs = 10, pool = 20000, test = 10000;
  int adam_seeds = 10, active_pool = 1000, cycles = 20, active_seeds = 30;
};

Preset preset_of(const std::string& name) {
  Preset p;
  if (name == "quick") {
    p.sets = "pixels,lenet5";
    p.taus = "1";
    p.bases = "100,1000";
    p.news = "1,10,50";
    p.seeds = "0,1,2,3,4";
    p.acquisitions = "random,margin,badge,look_ahead";
    p.extractor_images = 2000, p.extractor_epochs = 2, p.pool = 5000, p.test = 1000;
    p.adam_seeds = 5, p.active_pool = 600, p.cycles = 8, p.active_seeds = 10;
  } else if (name != "paper") {
    throw InputError("unknown preset '" + name + "': quick or paper");
  }
  return p;
}

std::vector<int> counts_of(const std::string& option, const std::string& text) {
  std::vector<int> list;
  for (uint64_t n : numbers_of(option, text)) {
    if (n < 1 || n > 1000000) throw InputError(option + ": 1 to 1,000,000, not " + std::to_string(n));
    list.push_back(int(n));
  }
  return list;
}

struct FeaturePair {
  std::string name, title;
  bool generated = false;
  FeatureSet pool, test;
};

struct Sources {
  std::optional<std::filesystem::path> data;
  std::string features, labels, test_features, test_labels;
  int extractor_images, extractor_epochs, pool, test, fourier_dim;
  double fourier_length;
  uint64_t seed;
};

// The network learns the first images; the last layer's samples are others.
NamedWeights trained_extractor(Device& device, const NetworkFactory& make, const Images& images,
                               const Normalisation& normalisation, int epochs, uint64_t seed) {
  Arena arena;
  TrainingPlan plan;
  plan.posterior.family = Family::point;
  plan.batch = 100;
  plan.epochs = epochs;
  plan.seeds = {seed};
  plan.settings.resize(1);
  plan.settings[0].lr = 1e-3;
  plan.settings[0].schedule = Schedule::linear;
  const DeviceImages train = upload_images(device, arena, images, normalisation);
  IncrementalTrainer trainer(device, arena, make, train, plan, split_parts(images.count, 1, seed), {images.count});
  trainer.begin_stage(0);
  trainer.run(trainer.steps_of(0));
  NamedWeights weights;
  const ParameterStore& store = trainer.posterior().store();
  for (const TensorSpec& t : store.layout().tensors()) weights[t.name] = store.read(device, "mean", 0, t);
  return weights;
}

FeaturePair features_of(Device& device, const std::string& name, const Sources& from) {
  FeaturePair pair;
  pair.name = name;
  if (name == "file") {
    if (from.features.empty() || from.labels.empty() || from.test_features.empty() || from.test_labels.empty())
      throw InputError("the set 'file' needs --features, --labels, --test-features and --test-labels");
    pair.title = "features from files";
    pair.pool = load_features(from.features, from.labels);
    pair.test = load_features(from.test_features, from.test_labels);
    if (pair.pool.dim != pair.test.dim)
      throw InputError("--features have " + std::to_string(pair.pool.dim) + " columns, --test-features " +
                       std::to_string(pair.test.dim));
    if (from.test < pair.test.count) {
      std::vector<int> first(from.test);
      for (int i = 0; i < from.test; i++) first[i] = i;
      pair.test = rows_of(pair.test, first);
    }
    append_bias(pair.pool);
    append_bias(pair.test);
    return pair;
  }
  const bool cifar = name == "conv3fc3";
  Limits limits;
  limits.train = from.extractor_images + from.pool, limits.test = from.test;
  const Dataset set = cifar ? find_cifar10(from.data, 0, limits) : find_mnist(from.data, 0, limits);
  pair.generated = set.generated;
  std::vector<int32_t> first, rest;
  for (int i = 0; i < set.train.count; i++) (i < from.extractor_images ? first : rest).push_back(i);
  if (rest.empty()) throw InputError("no training images are left beside the extractor's");
  const Images learned = subset(set.train, first), pool = subset(set.train, rest);
  const Normalisation normalisation = cifar ? standardise(learned) : unit_range;
  const std::string images = cifar ? "CIFAR-10" : "MNIST";
  if (name == "pixels" || name == "fourier") {
    pair.title = images + ", pixels";
    pair.pool = pixel_features(pool, normalisation);
    pair.test = pixel_features(set.test, normalisation);
    if (name == "fourier") {
      pair.title = images + ", " + std::to_string(from.fourier_dim) + " random Fourier features";
      for (FeatureSet* s : {&pair.pool, &pair.test})
        *s = fourier_features(*s, from.fourier_dim, from.fourier_length, from.seed, 3);
      return pair;  // their phases make a bias of their own
    }
  } else if (name == "lenet5" || name == "conv3fc3") {
    pair.title = images + (cifar ? ", 3Conv3FC features" : ", LeNet-5 features");
    NetworkFactory make;
    if (cifar) make = [] { return std::make_unique<Conv3Fc3>(); };
    else make = [] { return std::make_unique<LeNet5>(); };
    const NamedWeights weights =
        trained_extractor(device, make, learned, normalisation, from.extractor_epochs, from.seed);
    pair.pool = extract_features(device, make, weights, pool, normalisation);
    pair.test = extract_features(device, make, weights, set.test, normalisation);
  } else {
    throw InputError("unknown set '" + name + "': of pixels, lenet5, conv3fc3, fourier, file");
  }
  append_bias(pair.pool);
  append_bias(pair.test);
  return pair;
}

// ------------------------------------------------------------------------------------------------------------ updates
std::string table_of_updates(const json& updates, const std::string& set) {
  std::string text;
  std::map<std::pair<double, int>, std::vector<const json*>, std::greater<>> groups;
  for (const json& u : updates)
    if (u["set"] == set) groups[{u["tau"], u["base"]}].push_back(&u);
  char line[200];
  for (const auto& [key, rows] : groups) {
    std::vector<int> news;
    for (const json* r : rows)
      if (std::find(news.begin(), news.end(), int((*r)["new"])) == news.end()) news.push_back((*r)["new"]);
    snprintf(line, sizeof line, "\n%s, base of %d, tau = %g: accuracy %% (milliseconds of the update)\n%-26s",
             set.c_str(), key.second, key.first, "new samples [quick: 1,10,50; paper: 1,2,5,10,20,50]");
    text += line;
    for (int b : news) {
      snprintf(line, sizeof line, "%20d", b);
      text += line;
    }
    text += "\n";
    for (UpdateMethod m : all_update_methods()) {
      std::string row;
      for (int b : news) {
        std::string cell = "-";
        for (const json* r : rows)
          if ((*r)["method"] == name_of(m) && (*r)["new"] == b) {
            snprintf(line, sizeof line, "%.2f", 100 * double((*r)["accuracy"]["mean"]));
            cell = line;
            if (r->contains("seconds")) {
              snprintf(line, sizeof line, " (%.3g)", 1e3 * double((*r)["seconds"]["median"]));
              cell += line;
            }
          }
        snprintf(line, sizeof line, "%20s", cell.c_str());
        row += line;
      }
      if (row.find_first_not_of(" -") == std::string::npos) continue;
      snprintf(line, sizeof line, "%-26s", words_of(m));
      text += line + row + "\n";
    }
  }
  return text;
}

const json* find_update(const json& updates, const std::string& set, double tau, int base, int fresh, UpdateMethod m) {
  for (const json& u : updates)
    if (u["set"] == set && u["tau"] == tau && u["base"] == base && u["new"] == fresh && u["method"] == name_of(m))
      return &u;
  return nullptr;
}

std::string sentence_of_updates(const json& updates, const std::string& set, const std::vector<double>& taus, int base,
                                int fresh) {
  std::string text;
  char line[300];
  for (double tau : taus) {
    const json* ours = find_update(updates, set, tau, base, fresh, UpdateMethod::implicit);
    if (!ours) continue;
    const double seconds = (*ours)["seconds"]["median"];
    snprintf(line, sizeof line, "%s, base %d, %d new, tau = %g: the implicit step takes %.3g ms", set.c_str(), base,
             fresh, tau, 1e3 * seconds);
    text += line;
    for (UpdateMethod m : {UpdateMethod::lbfgs_warm, UpdateMethod::newton_warm, UpdateMethod::adam})
      if (const json* other = find_update(updates, set, tau, base, fresh, m)) {
        snprintf(line, sizeof line, ", %s %.0f times as long", words_of(m),
                 double((*other)["seconds"]["median"]) / seconds);
        text += line;
      }
    if (const json* other = find_update(updates, set, tau, base, fresh, UpdateMethod::retrained)) {
      snprintf(line, sizeof line, "; its accuracy is %+.2f points from retraining's",
               100 * (double((*ours)["accuracy"]["mean"]) - double((*other)["accuracy"]["mean"])));
      text += line;
    }
    text += ".\n";
  }
  return text;
}

// ---------------------------------------------------------------------------------------------------- active learning
struct Strategy {
  std::string acquisition, mode, label;
};

std::vector<Strategy> strategies_of(const std::string& text) {
  std::vector<Strategy> list;
  for (const std::string& name : split_list(text)) {
    if (name == "random") {
      list.push_back({name, name, "random"});
    } else if (name == "look_ahead") {
      list.push_back({name, name, "look-ahead (knows the test labels)"});
    } else {
      acquisition_of(name);
      list.push_back({name, "top", name + ", top of the batch"});
      list.push_back({name, "sequential", name + ", update between picks"});
    }
  }
  return list;
}

// Mean and standard error over seeds of sequential minus top-b at every point of the curve.
std::string sentence_of_active(const json& active, const std::string& set, const std::string& acquisition) {
  const json *top = nullptr, *sequential = nullptr;
  for (const json& a : active)
    if (a["set"] == set && a["acquisition"] == acquisition) (a["mode"] == "top" ? top : sequential) = &a;
  if (!top || !sequential) return "";
  const size_t points = (*top)["labelled"].size();
  double best = -INFINITY, error = 0;
  int at = 0;
  for (size_t i = 1; i < points; i++) {
    std::vector<double> difference;
    for (size_t s = 0; s < (*top)["accuracy"].size(); s++)
      difference.push_back(double((*sequential)["accuracy"][s][i]) - double((*top)["accuracy"][s][i]));
    const MeanAndSpread m = mean_and_spread(difference);
    if (m.mean > best) best = m.mean, error = m.sd / std::sqrt(double(m.n)), at = int((*top)["labelled"][i]);
  }
  char text[300];
  snprintf(text, sizeof text,
           "%s, %s: updates between the picks change accuracy by at most %+.2f points (s.e. %.2f), at %d labels; %d "
           "seeds.\n",
           set.c_str(), acquisition.c_str(), 100 * best, 100 * error, at, int((*top)["accuracy"].size()));
  return text;
}

// What a run that was killed has left in its log: whole units, a (set, tau, base, seed) of updates or a (set,
// acquisition, mode, seed) of active learning. Their lines stay, the others are dropped and run again.
class Earlier {
 public:
  // settings: a first line that says the same; else InputError.
  Earlier(const std::filesystem::path& log, const json& settings) {
    std::ifstream file(log);
    std::vector<json> lines;
    for (std::string text; std::getline(file, text);) {
      const json line = json::parse(text, nullptr, false);
      if (!line.is_object()) break;  // torn by the kill
      if (line.contains("unit")) whole_.insert(line["unit"].get<std::string>());
      lines.push_back(line);
    }
    if (lines.empty()) return;
    if (lines[0].value("part", "") != "settings" || lines[0]["settings"] != settings)
      throw InputError("--resume: " + log.string() + " is of a run with other settings");
    found_ = true;
    for (const json& line : lines)
      if (line.contains("of") && whole_.count(line["of"])) kept_[line["of"]].push_back(line);
  }
  bool found() const { return found_; }
  bool done(const std::string& unit) const { return whole_.count(unit) != 0; }
  bool keeps(const json& line) const {
    return line.value("part", "") == "settings" || line.contains("unit") ||
           (line.contains("of") && whole_.count(line["of"].get<std::string>()));
  }
  const std::vector<json>& lines(const std::string& unit) const {
    static const std::vector<json> none;
    const auto found = kept_.find(unit);
    return found == kept_.end() ? none : found->second;
  }

 private:
  bool found_ = false;
  std::set<std::string> whole_;
  std::map<std::string, std::vector<json>> kept_;
};

std::string update_unit(const std::string& set, double tau, int base, uint64_t seed) {
  return json{"updates", set, tau, base, seed}.dump();
}

template <class Real>
json run_active(Device& device, const FeaturePair& pair, const Strategy& strategy, const std::vector<uint64_t>& seeds,
                int pool_size, int initial, int batch, int cycles, double tau, const UpdateOptions& update, int trials,
                RunLog& log, const Earlier& earlier) {
  json row{{"set", pair.name},          {"acquisition", strategy.acquisition},
           {"mode", strategy.mode},     {"label", strategy.label},
           {"labelled", json::array()}, {"seeds", json::array()},
           {"accuracy", json::array()}, {"nll", json::array()},
           {"selection_seconds", 0.}};
  double seconds = 0;
  Arena test_arena;
  const FeatureRows<Real> test = upload_features<Real>(device, test_arena, pair.test);
  const auto add = [&](const json& line) {
    row["labelled"] = line["labelled"];
    row["seeds"].push_back(line["seed"]);
    row["accuracy"].push_back(line["accuracy"]);
    row["nll"].push_back(line["nll"]);
    seconds += double(line["selection_seconds"]);
  };
  for (uint64_t seed : seeds) {
    const std::string unit = json{"active", pair.name, strategy.acquisition, strategy.mode, seed}.dump();
    if (earlier.done(unit)) {
      add(earlier.lines(unit).at(0));
      continue;
    }
    std::vector<int> index(pair.pool.count);
    for (int i = 0; i < pair.pool.count; i++) index[i] = i;
    SplitMix64 random(seed, 22);
    for (int i = pair.pool.count - 1; i > 0; i--) std::swap(index[i], index[random.below(uint64_t(i) + 1)]);
    index.resize(std::min(pool_size, pair.pool.count));
    Arena arena;
    const FeatureRows<Real> pool = upload_features<Real>(device, arena, rows_of(pair.pool, index));
    ActiveLearningPlan plan;
    plan.layer.tau = tau;
    plan.selection.acquisition =
        strategy.mode == "look_ahead" ? Acquisition::random : acquisition_of(strategy.acquisition);
    plan.selection.sequential = strategy.mode == "sequential";
    plan.selection.update = update;
    plan.selection.seed = plan.seed = seed;
    plan.selection.link.draws = 200;
    plan.look_ahead = strategy.mode == "look_ahead";
    plan.trials = trials;
    plan.initial = initial, plan.batch = batch, plan.cycles = cycles;
    if (update.rule == UpdateRule::gaussian) plan.layer.weight = SampleWeight::gaussian;
    const ActiveLearningCurve curve =
        run_active_learning(device, pool, test, std::max(pair.pool.classes, pair.test.classes), plan);
    const json line{{"part", "active"},           {"of", unit},
                    {"set", pair.name},           {"acquisition", strategy.acquisition},
                    {"mode", strategy.mode},      {"seed", seed},
                    {"labelled", curve.labelled}, {"accuracy", curve.accuracy},
                    {"nll", curve.nll},           {"selection_seconds", curve.selection_seconds}};
    log.epoch(line);
    log.epoch({{"unit", unit}});
    add(line);
  }
  row["selection_seconds"] = seconds / double(seeds.size());
  return row;
}

int run(int argc, char** argv) {
  CLI::App app{
      "Bayesian updates of a last layer in closed form: a model of few samples takes in new ones, beside first-order\n"
      "steps, re-weighted draws and retraining; then active learning with and without updates between the picks of a\n"
      "batch. Writes result.json, log.jsonl and a plot to --out."};
  std::string preset = "quick", sets, taus, bases, news, seeds, methods, acquisitions, parts = "updates,active", data,
              out, precision = "double", rule = "implicit", link = "mean_field", active_seeds;
  Sources from{};
  from.fourier_dim = 768, from.fourier_length = 10;
  UpdateStudy study;
  int extractor_images = 0, extractor_epochs = 0, pool = 0, test = 0, adam_seeds = -1, active_pool = 0, cycles = 0;
  int initial = 20, batch = 10, trials = 300;
  bool resume = false;
  double active_tau = 1;
  auto* what = app.add_option_group("What to run");
  what->add_option("--preset", preset, "quick (minutes on two cores) or paper: sets what is not given")
      ->capture_default_str();
  what->add_option("--sets", sets,
                   "features: of pixels, lenet5 (MNIST), conv3fc3 (CIFAR-10), fourier, file [quick: pixels,lenet5; "
                   "paper: all but file]");
  what->add_option("--parts", parts, "of updates,active")->capture_default_str();
  what->add_option("--methods", methods,
                   "of base,first_order,monte_carlo,gaussian,implicit,one_by_one,lbfgs_warm,newton_warm,retrained,adam "
                   "[all]");
  what->add_option("--seeds", seeds, "of the choice of samples (updates)");
  what->add_option("--data", data, "folder with the set's files (else $BATON_DATA, ./data, ../shared/data, generated)");
  what->add_option("--out", out, "folder of the results [results/laplace_update_PRESET]");
  what->add_flag("--resume", resume, "go on where a killed run in --out stopped");
  what->add_option("--precision", precision, "of the last layer: double or float")->capture_default_str();
  auto* features = app.add_option_group("Features");
  features->add_option("--features", from.features, "matrix of the set 'file': FILE.npy or FILE.safetensors[:NAME]");
  features->add_option("--labels", from.labels, "its labels");
  features->add_option("--test-features", from.test_features, "the same of test samples");
  features->add_option("--test-labels", from.test_labels, "their labels");
  features->add_option("--extractor-images", extractor_images, "training images that the network learns");
  features->add_option("--extractor-epochs", extractor_epochs, "of its training");
  features->add_option("--pool", pool, "further training images, for the last layer");
  features->add_option("--test", test, "test images");
  features->add_option("--fourier-dim", from.fourier_dim, "of the set 'fourier'")->capture_default_str();
  features->add_option("--fourier-length", from.fourier_length, "its length scale")->capture_default_str();
  auto* updates = app.add_option_group("Updates");
  updates->add_option("--bases", bases, "samples before the update [quick: 100,1000; paper: 10,100,1000]");
  updates->add_option("--new", news, "new samples [quick: 1,10,50; paper: 1,2,5,10,20,50]");
  updates->add_option("--taus", taus,
                      "prior precisions [quick: 1; paper: 1,0.1]; 'evidence': by set, the one of highest evidence for "
                      "the largest base");
  updates->add_option("--gamma", study.gamma, "of the authors' rule")->capture_default_str();
  updates->add_option("--gamma-first-order", study.gamma_first_order, "step size")->capture_default_str();
  updates->add_option("--gamma-monte-carlo", study.gamma_monte_carlo, "power of the likelihood")->capture_default_str();
  updates->add_option("--draws", study.draws, "of Monte Carlo re-weighting")->capture_default_str();
  updates->add_option("--repeats", study.repeats, "of a timed update")->capture_default_str();
  updates->add_option("--adam-epochs", study.adam_epochs, "of retraining by Adam")->capture_default_str();
  updates->add_option("--adam-seeds", adam_seeds, "seeds for which Adam runs [all of the preset's]");
  updates->add_option("--link", link, "of NLL and ECE: map, mean_field, probit, monte_carlo, bridge, bridge_norm")
      ->capture_default_str();
  auto* active = app.add_option_group("Active learning");
  active->add_option("--acquisitions", acquisitions, "of random,margin,entropy,bald,badge,bait,look_ahead");
  active->add_option("--active-seeds", active_seeds,
                     "of the pool, the first samples and the choices [quick: 10 of them; paper: 30]");
  active->add_option("--active-pool", active_pool, "samples to choose from [quick: 600; paper: 1000]");
  active->add_option("--active-tau", active_tau, "prior precision")->capture_default_str();
  active->add_option("--active-rule", rule, "of the updates between picks: implicit, gaussian or categorical")
      ->capture_default_str();
  active->add_option("--initial", initial, "labelled samples at the start")->capture_default_str();
  active->add_option("--batch", batch, "samples chosen at a time")->capture_default_str();
  active->add_option("--cycles", cycles, "batches [quick: 8; paper: 20]");
  active->add_option("--trials", trials, "batches that look-ahead tries")->capture_default_str();
  try {
    parse(app, argc, argv);
  } catch (const HelpShown&) {
    return 0;
  }
  const Preset p = preset_of(preset);
  const auto given = [](const std::string& text, const std::string& otherwise) {
    return text.empty() ? otherwise : text;
  };
  const auto number = [](int n, int otherwise, const char* option) {
    if (n < 0) throw InputError(std::string(option) + " cannot be negative");
    return n ? n : otherwise;
  };
  const bool by_evidence = taus == "evidence";
  study.taus = by_evidence ? std::vector<double>()
                           : decimals_of(
                                 "--taus", given(taus, p.taus), [](double v) { return v > 0; }, "a positive number");
  study.bases = counts_of("--bases", given(bases, p.bases));
  study.news = counts_of("--new", given(news, p.news));
  study.seeds = numbers_of("--seeds", given(seeds, p.seeds));
  study.adam_seeds = adam_seeds < 0 ? p.adam_seeds : adam_seeds;
  study.link.link = link_of(link);
  if (!methods.empty()) {
    study.methods.clear();
    for (const std::string& m : split_list(methods)) study.methods.push_back(update_method_of(m));
  }
  if (!(study.gamma > 0) || !(study.gamma_first_order > 0) || !(study.gamma_monte_carlo > 0))
    throw InputError("--gamma, --gamma-first-order and --gamma-monte-carlo must be positive");
  if (study.draws < 1 || study.adam_epochs < 1) throw InputError("--draws and --adam-epochs must be at least 1");
  if (!(active_tau > 0)) throw InputError("--active-tau must be positive");
  if (initial < 1 || batch < 1 || trials < 1 || cycles < 0)
    throw InputError("--initial, --batch and --trials must be at least 1");
  if (precision != "double" && precision != "float")
    throw InputError("unknown --precision '" + precision + "': double or float");
  bool want_updates = false, want_active = false;
  for (const std::string& part : split_list(parts)) {
    if (part != "updates" && part != "active") throw InputError("unknown part '" + part + "': updates or active");
    (part == "updates" ? want_updates : want_active) = true;
  }
  from.data = data.empty() ? std::nullopt : std::optional<std::filesystem::path>(data);
  from.extractor_images = number(extractor_images, p.extractor_images, "--extractor-images");
  from.extractor_epochs = number(extractor_epochs, p.extractor_epochs, "--extractor-epochs");
  from.pool = number(pool, p.pool, "--pool");
  from.test = number(test, p.test, "--test");
  active_pool = number(active_pool, p.active_pool, "--active-pool");
  cycles = number(cycles, p.cycles, "--cycles");
  std::vector<uint64_t> repeated(p.active_seeds);
  for (int i = 0; i < p.active_seeds; i++) repeated[i] = uint64_t(i);
  if (!active_seeds.empty()) repeated = numbers_of("--active-seeds", active_seeds);
  const std::vector<Strategy> strategies = strategies_of(given(acquisitions, p.acquisitions));
  UpdateOptions update;
  update.rule = update_rule_of(rule);
  update.gamma = study.gamma;

  Device device;
  const std::filesystem::path folder = out.empty() ? "results/laplace_update_" + preset : out;
  const json settings{{"taus", by_evidence ? json(taus) : json(study.taus)},
                      {"bases", study.bases},
                      {"new", study.news},
                      {"seeds", study.seeds},
                      {"weight", name_of(study.weight)},
                      {"gamma", study.gamma},
                      {"gamma_first_order", study.gamma_first_order},
                      {"gamma_monte_carlo", study.gamma_monte_carlo},
                      {"draws", study.draws},
                      {"repeats", study.repeats},
                      {"adam_epochs", study.adam_epochs},
                      {"link", link},
                      {"precision", precision},
                      {"extractor_images", from.extractor_images},
                      {"extractor_epochs", from.extractor_epochs},
                      {"active",
                       {{"rule", rule},
                        {"tau", active_tau},
                        {"pool", active_pool},
                        {"initial", initial},
                        {"batch", batch},
                        {"cycles", cycles},
                        {"trials", trials}}}};
  json identity = settings;  // what decides the lines of the log
  identity["images"] = {from.pool, from.test, from.fourier_dim, from.fourier_length, adam_seeds};
  identity["features"] = {from.features, from.labels, from.test_features, from.test_labels};
  identity["methods"] = methods;
  const std::filesystem::path log_path = folder / "log.jsonl";
  const Earlier earlier(resume ? log_path : std::filesystem::path(), identity);
  RunLog log(folder, resume && earlier.found());
  if (earlier.found()) log.truncate_after([&](const json& line) { return earlier.keeps(line); });
  else log.epoch({{"part", "settings"}, {"settings", identity}});
  json result{{"experiment", "laplace_update"}, {"preset", preset},      {"settings", settings},
              {"device", device.description()}, {"sets", json::array()}, {"updates", json::array()},
              {"active", json::array()}};
  printf("laplace_update: preset %s, last layer in %s, on %s\n", preset.c_str(), precision.c_str(),
         device.description().c_str());
  bool any_generated = false;
  const std::vector<std::string> names = split_list(given(sets, p.sets));
  for (const std::string& name : names) {
    const FeaturePair pair = features_of(device, name, from);
    any_generated |= pair.generated;
    result["sets"].push_back({{"name", name},
                              {"title", pair.title},
                              {"dim", pair.pool.dim},
                              {"classes", std::max(pair.pool.classes, pair.test.classes)},
                              {"pool", pair.pool.count},
                              {"test", pair.test.count},
                              {"source", pair.pool.source},
                              {"generated", pair.generated}});
    printf("\n%s: %s, %d features, %d samples to learn from, %d to test on\n", name.c_str(), pair.title.c_str(),
           pair.pool.dim, pair.pool.count, pair.test.count);
    fflush(stdout);
    if (want_updates) {
      if (by_evidence) {
        std::vector<int> first(std::min(pair.pool.count, *std::max_element(study.bases.begin(), study.bases.end())));
        for (int i = 0; i < int(first.size()); i++) first[i] = i;
        Arena arena;
        const FeatureRows<double> rows = upload_features<double>(device, arena, rows_of(pair.pool, first));
        const TunedPrior tuned = tune_prior(device, rows, std::max(pair.pool.classes, pair.test.classes),
                                            EvidenceStructure::shared, study.weight);
        printf("%s: tau = %.3g has the highest evidence (%.1f) for %d samples\n", name.c_str(), tuned.tau,
               tuned.evidence, rows.count);
        study.taus = {tuned.tau};
        result["sets"].back()["tuned"] = {{"tau", tuned.tau}, {"taus", tuned.taus}, {"evidences", tuned.evidences}};
      }
      std::vector<json> lines;
      study.skip = [&](double tau, int base, uint64_t seed) {
        const std::string unit = update_unit(name, tau, base, seed);
        const std::vector<json>& before = earlier.lines(unit);
        lines.insert(lines.end(), before.begin(), before.end());
        return earlier.done(unit);
      };
      study.finished = [&](double tau, int base, uint64_t seed) {
        log.epoch({{"unit", update_unit(name, tau, base, seed)}});
      };
      const auto line = [&](const json& row) {
        json whole{{"part", "updates"}, {"of", update_unit(name, row["tau"], row["base"], row["seed"])}, {"set", name}};
        whole.update(row);
        lines.push_back(whole);
        log.epoch(whole);
      };
      if (precision == "double") run_update_study<double>(device, pair.pool, pair.test, study, line);
      else run_update_study<float>(device, pair.pool, pair.test, study, line);
      std::vector<std::string> keys;
      std::map<std::string, std::vector<json>> groups;
      for (const json& l : lines) {
        const std::string key = json{l["tau"], l["base"], l["new"], l["method"]}.dump();
        if (!groups.count(key)) keys.push_back(key);
        groups[key].push_back(l);
      }
      for (const std::string& key : keys) result["updates"].push_back(summary_of(groups[key]));
      printf("%s\n%s", table_of_updates(result["updates"], name).c_str(),
             sentence_of_updates(result["updates"], name, study.taus,
                                 *std::max_element(study.bases.begin(), study.bases.end()),
                                 study.news[study.news.size() / 2])
                 .c_str());
      fflush(stdout);
      log.result(result);
    }
    if (want_active) {
      for (const Strategy& strategy : strategies) {
        const json row = precision == "double"
                             ? run_active<double>(device, pair, strategy, repeated, active_pool, initial, batch, cycles,
                                                  active_tau, update, trials, log, earlier)
                             : run_active<float>(device, pair, strategy, repeated, active_pool, initial, batch, cycles,
                                                 active_tau, update, trials, log, earlier);
        result["active"].push_back(row);
        double last = 0;
        for (const json& curve : row["accuracy"]) last += double(curve.back()) / double(row["accuracy"].size());
        printf("%-12s %-36s accuracy %.2f %% with %d labels, choosing took %.3f s a run\n", name.c_str(),
               strategy.label.c_str(), 100 * last, int(row["labelled"].back()), double(row["selection_seconds"]));
        fflush(stdout);
        log.result(result);
      }
      for (const Strategy& strategy : strategies)
        if (strategy.mode == "top")
          printf("%s", sentence_of_active(result["active"], name, strategy.acquisition).c_str());
    }
  }
  log.result(result);
  Dataset shown;
  shown.name = "mnist";
  shown.generated = any_generated;
  print_files(shown, folder);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("laplace_update", [&] {
    try {
      return run(argc, argv);
    } catch (const Stopped&) {  // whatever was under way
      throw_stopped("what is finished is in log.jsonl; --resume goes on from it");
    }
  });
}
