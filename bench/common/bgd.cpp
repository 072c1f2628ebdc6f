#include "bench/common/bgd.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "trainers/parse.h"

namespace baton {

BgdMethod& BgdPreset::of(const std::string& method) {
  if (method == "bgd" || method == "bgd_continuous") return bgd;
  if (method == "sgd" || method == "sgd_continuous") return sgd;
  if (method == "adam") return adam;
  if (method == "bbb" || method == "bbb_mixture") return bbb;
  if (method == "si") return si;
  if (method == "ewc") return ewc;
  throw InputError("unknown method '" + method + "'");
}

void BgdOptions::add_to(CLI::App& app, const std::string& known_methods, const std::string& preset_help) {
  auto* what = app.add_option_group("What to run");
  what->add_option("--preset", preset, preset_help)->capture_default_str();
  what->add_option("--methods", methods, "of " + known_methods)->capture_default_str();
  what->add_option("--seeds", seeds, "of weights, order, noise and tasks")->capture_default_str();
  what->add_option("--data", data, "folder with the set's files (else $BATON_DATA, ./data, ../shared/data, generated)");
  what->add_option("--train-limit", train_limit_, "use the first N training images");
  what->add_option("--test-limit", test_limit_, "use the first N test images");
  what->add_option("--out", out, "folder of the results [" + out_prefix + "PRESET]");
  what->add_flag("--resume", resume, "go on from the checkpoint in --out");
  what->add_flag("--save-models", save_models, "write every trained model (and its pruned forms) into --out");
  auto* training = app.add_option_group("Training");
  given_.epochs = training->add_option("--epochs", epochs_, "of each task");
  given_.batch = training->add_option("--batch", batch_, "examples a step");
  given_.draws = training->add_option("--draws", draws_, "K: BGD's draws of the weights a step");
  given_.bbb_draws = training->add_option("--bbb-draws", bbb_draws_, "Bayes by Backprop's");
  given_.at_once = training->add_option("--at-once", at_once_, "draws that run side by side, a divisor of K");
  given_.sigma = training->add_option("--sigma", sigma_, "initial standard deviation (BGD, BBB)");
  given_.eta = training->add_option("--eta", eta_, "BGD's step size of the means");
  given_.lr = training->add_option("--lr", given_method_.lr, "step size of the other methods");
  given_.momentum = training->add_option("--momentum", given_method_.momentum, "of SGD and BBB");
  given_.decay_weights = training->add_option("--weight-decay", given_method_.weight_decay, "of SGD");
  given_.schedule = training->add_option("--schedule", schedule_,
                                         "of the other methods' step sizes: constant, linear, cosine, steps");
  given_.decay = training->add_option("--decay", given_method_.decay, "factor of the schedule 'steps'");
  given_.decay_epochs = training->add_option("--decay-epochs", given_method_.decay_epochs, "between its steps");
  given_.strength =
      training->add_option("--strength", given_method_.strength, "of SI's (c) and EWC's (lambda) penalty");
  given_.xi = training->add_option("--xi", given_method_.xi, "SI's damping");
  given_.fisher = training->add_option("--fisher-examples", fisher_, "of a task, for EWC's Fisher information");
  auto* bbb = app.add_option_group("Bayes by Backprop");
  given_.prior = bbb->add_option("--prior", prior_, "gaussian or mixture");
  given_.sd1 = bbb->add_option("--prior-sd", bbb_.sd1, "of the prior (of its wide component)");
  given_.sd2 = bbb->add_option("--prior-sd2", bbb_.sd2, "of the mixture's narrow component");
  given_.weight1 = bbb->add_option("--prior-weight", bbb_.weight1, "of the mixture's wide component");
  auto* safety = app.add_option_group("BGD: deviations from the paper (off by default) and the trip-wire");
  given_.clamp = safety->add_option("--clamp", bounds.clamp, "bound of |E[g]| and |E[g e]|");
  given_.least =
      safety->add_option("--least-sigma", bounds.least_ratio, "lower bound of sigma, times its initial value");
  given_.largest =
      safety->add_option("--largest-sigma", bounds.largest_ratio, "upper bound of sigma, times its initial value");
  given_.warn = safety->add_option("--warn-ratio", bounds.warn_ratio, "of sigma to its initial value: warn")
                    ->capture_default_str();
  given_.halt = safety->add_option("--halt-ratio", bounds.halt_ratio, "of sigma to its initial value: stop")
                    ->capture_default_str();
  auto* rest = app.add_option_group("Prediction and running");
  given_.samples = rest->add_option("--samples", samples_, "draws of the weights in a prediction");
  given_.inference =
      rest->add_option("--inference", inference_, "what test_accuracy is: map, sampled, softmax or committee");
  given_.judge =
      rest->add_option("--judge-every", judge_, "epochs between two judgements within a task (0: at its end)");
  given_.pruned = rest->add_option("--prune", pruned_, "fractions of the weights to prune at the end, as 0.5,0.95");
  rest->add_option("--checkpoint-seconds", checkpoint_seconds, "between checkpoints, at the ends of epochs")
      ->capture_default_str();
}

void BgdOptions::apply(BgdPreset& p) const {
  if (*given_.epochs) p.epochs = epochs_;
  if (*given_.batch) {
    p.batch = batch_;
    for (BgdMethod* m : {&p.bgd, &p.sgd, &p.adam, &p.bbb, &p.si, &p.ewc}) m->batch = 0;
  }
  if (*given_.draws) p.draws = draws_;
  if (*given_.bbb_draws) p.bbb_draws = bbb_draws_;
  if (*given_.at_once) p.at_once = at_once_;
  if (*given_.sigma) p.sigma = sigma_;
  if (*given_.eta) p.bgd.lr = eta_;
  if (*given_.samples) p.samples = samples_;
  if (*given_.inference) p.inference = inference_of(inference_);
  if (*given_.judge) p.judge_every = judge_;
  if (*given_.pruned)
    p.pruned = pruned_.empty()
                   ? std::vector<double>()
                   : decimals_of(
                         "--prune", pruned_, [](double v) { return v >= 0 && v <= 1; }, "a fraction from 0 to 1");
  if (*given_.fisher) p.fisher_examples = fisher_;
  if (train_limit_) p.train_limit = train_limit_;
  if (test_limit_) p.test_limit = test_limit_;
  for (BgdMethod* m : {&p.sgd, &p.adam, &p.bbb, &p.si, &p.ewc}) {
    if (*given_.lr) m->lr = given_method_.lr;
    if (*given_.momentum) m->momentum = given_method_.momentum;
    if (*given_.decay_weights) m->weight_decay = given_method_.weight_decay;
    if (*given_.schedule) m->schedule = schedule_of(schedule_, true);
    if (*given_.decay) m->decay = given_method_.decay;
    if (*given_.decay_epochs) m->decay_epochs = given_method_.decay_epochs;
    if (*given_.strength) m->strength = given_method_.strength;
    if (*given_.xi) m->xi = given_method_.xi;
    if (!(m->lr > 0) || !std::isfinite(m->lr)) throw InputError("--lr must be positive");
    if (!(m->momentum >= 0 && m->momentum < 1)) throw InputError("--momentum is at least 0 and below 1");
    if (!(m->weight_decay >= 0) || !std::isfinite(m->weight_decay))
      throw InputError("--weight-decay cannot be negative");
    if (!(m->decay > 0 && m->decay <= 1)) throw InputError("--decay is above 0 and at most 1");
    if (!(m->decay_epochs > 0) || !std::isfinite(m->decay_epochs)) throw InputError("--decay-epochs must be positive");
    if (!(m->xi > 0) || !std::isfinite(m->xi)) throw InputError("--xi must be positive");
    if (!(m->strength >= 0) || !std::isfinite(m->strength)) throw InputError("--strength cannot be negative");
  }
  if (*given_.prior) {
    if (prior_ != "gaussian" && prior_ != "mixture")
      throw InputError("unknown --prior '" + prior_ + "': gaussian or mixture");
    p.bbb_rule.prior = prior_ == "mixture" ? BbbPrior::mixture : BbbPrior::gaussian;
  }
  if (*given_.sd1) p.bbb_rule.sd1 = bbb_.sd1;
  if (*given_.sd2) p.bbb_rule.sd2 = bbb_.sd2;
  if (*given_.weight1) p.bbb_rule.weight1 = bbb_.weight1;
  if (!(p.bbb_rule.sd1 > 0) || !(p.bbb_rule.sd2 > 0) || !std::isfinite(p.bbb_rule.sd1) ||
      !std::isfinite(p.bbb_rule.sd2))
    throw InputError("--prior-sd and --prior-sd2 must be positive");
  if (!(p.bbb_rule.weight1 > 0 && p.bbb_rule.weight1 < 1)) throw InputError("--prior-weight is between 0 and 1");
  if (!(p.sigma > 0) || !std::isfinite(p.sigma)) throw InputError("--sigma must be positive");
  if (!(p.bgd.lr > 0) || !std::isfinite(p.bgd.lr)) throw InputError("--eta must be positive");
  if (!(p.epochs > 0 && p.epochs <= 1e6)) throw InputError("--epochs must be positive, and at most a million");
  if (p.batch < 1) throw InputError("--batch must be at least 1");
  if (p.draws < 1 || p.bbb_draws < 1) throw InputError("--draws and --bbb-draws must be at least 1");
  if (p.at_once < 0 || (p.at_once > 0 && p.draws % p.at_once != 0))
    throw InputError("--at-once: " + std::to_string(p.draws) + " draws do not divide into passes of " +
                     std::to_string(p.at_once));
  if (p.samples < 1) throw InputError("--samples must be at least 1");
  if (!(p.judge_every >= 0) || train_limit_ < 0 || test_limit_ < 0 || p.fisher_examples < 1)
    throw InputError("--judge-every, --train-limit, --test-limit and --fisher-examples cannot be negative");
  if (!(bounds.clamp >= 0) || !(bounds.least_ratio >= 0) || !(bounds.largest_ratio >= 0) ||
      (bounds.largest_ratio > 0 && bounds.largest_ratio < bounds.least_ratio))
    throw InputError("--clamp, --least-sigma and --largest-sigma cannot be negative, nor the bounds exchanged");
  if (!(bounds.warn_ratio > 1) || !(bounds.halt_ratio >= bounds.warn_ratio))
    throw InputError("--warn-ratio is above 1, and --halt-ratio not below it");
}

std::vector<std::string> BgdOptions::method_names(const std::string& known) const {
  const std::vector<std::string> all = split_list(known);
  std::vector<std::string> names = split_list(methods);
  for (const std::string& name : names)
    if (std::find(all.begin(), all.end(), name) == all.end())
      throw InputError("unknown method '" + name + "', expected some of " + known);
  return names;
}

TaskExperimentOptions BgdOptions::experiment(const std::string& name) const {
  TaskExperimentOptions o;
  o.experiment = name;
  o.preset = preset;
  o.out = out_folder();
  o.resume = resume;
  o.save_models = save_models;
  o.checkpoint_seconds = checkpoint_seconds;
  return o;
}

TaskRun task_run(const BgdPreset& preset, const BgdOptions& options, const std::string& method,
                 const std::string& label, uint64_t seed, double sigma, const NetworkFactory& network,
                 const TaskSequence& sequence) {
  BgdPreset p = preset;
  const BgdMethod& m = p.of(method);
  if (m.batch) p.batch = m.batch;
  TaskRun run;
  run.method = method;
  run.label = label;
  run.seed = seed;
  run.sequence = sequence;
  run.network = network;
  run.inference = p.inference;
  run.samples = p.samples;
  run.judge_every = p.judge_every;
  run.pruned = p.pruned;
  run.plan.batch = p.batch;
  run.plan.epochs = p.epochs;
  run.plan.seed = seed;
  run.plan.lr = m.lr;
  run.plan.schedule = m.schedule;
  run.plan.decay = m.decay;
  run.plan.decay_epochs = m.decay_epochs;
  json& s = run.settings;
  s["batch"] = p.batch;
  s["epochs"] = p.epochs;
  const bool drawn = method.starts_with("bgd") || method.starts_with("bbb");
  if (drawn) {
    s["draws"] = method.starts_with("bbb") ? p.bbb_draws : p.draws;
    s["sigma"] = sigma;
  }
  const bool of_bgd = method.starts_with("bgd");
  s[of_bgd ? "eta" : "lr"] = m.lr;
  if (!of_bgd) s["schedule"] = name_of(m.schedule);
  if (m.schedule == Schedule::steps) s["decay"] = {m.decay, m.decay_epochs};
  if (of_bgd) {
    BgdSettings settings = options.bounds;
    settings.draws = p.draws;
    settings.at_once = p.at_once;
    settings.sigma = sigma;
    settings.eta = m.lr;
    s["step_scale"] = m.lr * sigma * sigma * p.batch;
    if (settings.clamp > 0) s["clamp"] = settings.clamp;
    if (settings.least_ratio > 0) s["least_sigma_ratio"] = settings.least_ratio;
    if (settings.largest_ratio > 0) s["largest_sigma_ratio"] = settings.largest_ratio;
    s["trip_wire"] = {settings.warn_ratio, settings.halt_ratio};
    run.learner = [settings](Device& d, Arena& a, const ParameterLayout& l) {
      return std::make_unique<BgdLearner>(d, a, l, settings);
    };
    return run;
  }
  if (drawn) {
    BbbSetup setup;
    setup.rule = p.bbb_rule;
    if (method == "bbb_mixture") setup.rule.prior = BbbPrior::mixture;
    setup.rule.draws = p.bbb_draws;
    setup.rule.momentum = float(m.momentum);
    setup.sigma = sigma;
    // w = 1 / M on the KL against a batch's summed NLL, M batches an epoch (Graves 2011).
    run.plan.kl_weight = double(p.batch) / double(sequence.examples[0].size());
    s["kl_weight"] = run.plan.kl_weight;
    s["momentum"] = m.momentum;
    if (setup.rule.prior == BbbPrior::mixture)
      s["prior"] = {{"mixture", setup.rule.weight1}, {"sd", {setup.rule.sd1, setup.rule.sd2}}};
    else s["prior"] = {{"sd", setup.rule.sd1}};
    run.learner = [setup](Device& d, Arena& a, const ParameterLayout& l) {
      return std::make_unique<BbbLearner>(d, a, l, setup);
    };
    return run;
  }
  PointSetup setup;
  const bool adam = method != "sgd" && method != "sgd_continuous";  // SI and EWC as their authors' code: Adam
  setup.rule.rule = adam ? PointRule::adam : PointRule::sgd;
  setup.rule.momentum = adam ? 0.f : float(m.momentum);
  setup.rule.weight_decay = float(m.weight_decay);
  setup.anchor = method == "si" ? Anchor::path : method == "ewc" ? Anchor::fisher : Anchor::none;
  setup.rule.strength = float(method == "ewc" ? m.strength / 2 : m.strength);  // EWC: lambda / 2
  setup.xi = m.xi;
  s["optimizer"] = adam ? "adam" : "sgd";
  if (!adam) s["momentum"] = m.momentum;
  if (m.weight_decay > 0) s["weight_decay"] = m.weight_decay;
  if (setup.anchor != Anchor::none) s["strength"] = m.strength;
  if (setup.anchor == Anchor::path) s["xi"] = m.xi;
  if (setup.anchor == Anchor::fisher) s["fisher_examples"] = run.fisher_examples = p.fisher_examples;
  run.restart_optimizer = p.restart_optimizer;
  run.learner = [setup](Device& d, Arena& a, const ParameterLayout& l) {
    return std::make_unique<PointLearner>(d, a, l, setup);
  };
  return run;
}

void print_head(const std::string& name, const std::string& title, const Dataset& set, const std::string& preset) {
  printf("%s: %s, %d training and %d test images%s, preset %s\n", name.c_str(),
         set.generated ? ("GENERATED images (no " + title + " was found)").c_str() : title.c_str(), set.train.count,
         set.test.count, set.path.empty() ? "" : (" from " + set.path).c_str(), preset.c_str());
  fflush(stdout);
}

void report_tasks(const json& result, const std::string& sentence, const Dataset& set,
                  const std::filesystem::path& out) {
  printf("\n%s\n%s\n", task_table_of(result).c_str(), sentence.c_str());
  print_files(set, out);
}

double final_accuracy_of(const json& result, const std::string& label) {
  std::vector<double> values;
  for (const json& run : result["runs"])
    if (run["label"] == label) values.push_back(run["final_test_accuracy"]);
  return mean_and_spread(values).mean;
}

}  // namespace baton
