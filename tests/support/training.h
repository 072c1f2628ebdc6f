// What the tests of training share: settings of every kind of posterior with which a small network learns in a blink, a
// network with two heads, generated digits, and a trainer of them.
#pragma once
#include <cmath>
#include <map>

#include "engine/io/synthetic.h"
#include "tests/support/messages.h"
#include "tests/support/small_network.h"
#include "trainers/trainer.h"

namespace baton::test {

inline NetworkFactory small_network() {
  return [] { return std::make_unique<SmallNetwork>(); };
}
inline NetworkFactory small_mlp(int hidden) { return network_factory(network_spec("mlp", 10, {{"hidden", {hidden}}})); }

// 784  fc1 12, ReLU  two heads of 5
inline NetworkFactory two_heads() {
  class DigitHeads : public Network {
   public:
    DigitHeads() : Network("digit heads", {1, 28, 28}, 5) {
      add_dense("fc1", 12);
      for (const char* head : {"head0", "head1"}) add_head(head);
    }
  };
  return [] { return std::make_unique<DigitHeads>(); };
}

inline const Images& digits(int count) {
  static std::map<int, Images> made;
  if (!made.count(count)) made[count] = generate_digits(count, 11);
  return made[count];
}
// With the labels as each of the two heads counts them.
inline Images digits_for_heads(int count) {
  Images images = digits(count);
  for (uint8_t& label : images.labels) label %= 5;
  return images;
}
// Digits 0 to 4 with the first head, 5 to 9 with the second, and the first again.
inline Stages stages_by_head(int count) {
  std::vector<std::vector<int32_t>> examples(3);
  for (int i = 0; i < count; i++)
    for (int stage = 0; stage < 3; stage++)
      if ((digits(count).labels[size_t(i)] >= 5) == (stage == 1)) examples[size_t(stage)].push_back(i);
  Stages stages = tasks_in_turn(examples);
  stages.heads = {0, 1, 0};
  return stages;
}
// `tasks` tasks of all `count` digits, each but the first with an order of the pixels of its own.
inline Stages permuted_tasks(int tasks, int count) {
  std::vector<int32_t> all(static_cast<size_t>(count));
  for (int i = 0; i < count; i++) all[size_t(i)] = i;
  Stages stages = tasks_in_turn(std::vector(size_t(tasks), all));
  stages.pixel_order = permute_pixels(tasks, 784, 6);
  return stages;
}
// The same tasks at once, their probabilities rising and falling over the steps of one stage.
inline Stages continuous_tasks(int tasks, int count, int steps) {
  Stages stages = whole_set(count);
  stages.pixel_order = permute_pixels(tasks, 784, 6);
  stages.probabilities = continuous_schedule(tasks, steps, 4);
  return stages;
}

// ---------------------------------------------------------------------------------------------- kinds of posteriors
struct TestedKind {
  const char* name;
  std::string kind;
  json settings = json::object();
};
inline const TestedKind ffg{"ffg", "ffg"};
// Those that can train networks side by side (Bayesian incremental learning and fine-tuning).
inline const std::vector<TestedKind> stage_kinds{
    {"ft", "ft"},
    {"ffg, Adam", "ffg"},
    {"ffg, natural", "ffg", {{"scale_rule", "natural"}}},
    {"cfg", "cfg"},
    {"cfg, groups", "cfg", {{"scale_rule", "natural"}, {"groups", 2}}},
    {"mnf", "mnf", {{"flow_hidden", 6}}},
    {"mnf, planar, groups",
     "mnf",
     {{"scale_rule", "natural"}, {"groups", 2}, {"flow", "planar"}, {"flow_hidden", 6}, {"z", "per-filter"}}}};
// Those that learn one task after the other with one network.
inline const std::vector<TestedKind> task_kinds{
    {"bgd", "bgd", {{"eta", 1}, {"draws", 4}, {"draws_at_once", 2}, {"sigma", 0.04}}},
    {"bbb", "bbb", {{"draws", 2}, {"sigma", 0.03}, {"prior", "mixture"}, {"momentum", 0.5}}},
    {"bbb, Adam, Gaussian", "bbb", {{"draws", 2}, {"draws_at_once", 1}, {"sigma", 0.03}, {"optimizer", "adam"}}},
    {"sgd", "sgd", {{"lr", 0.05}, {"momentum", 0.9}}},
    {"adam", "adam"},
    {"si", "si", {{"strength", 0.3}}},
    {"ewc", "ewc", {{"strength", 1}}}};
inline std::vector<TestedKind> all_kinds() {
  std::vector<TestedKind> all = stage_kinds;
  all.insert(all.end(), task_kinds.begin(), task_kinds.end());
  return all;
}

// `settings` without those that the kind has not.
inline json known_settings(const std::string& kind, const json& settings) {
  json known = json::object();
  for (const auto& [name, value] : settings.items())
    if (find_option(find_posterior(kind).options, name)) known[name] = value;
  return known;
}

// One replica a seed, of the kind's settings alone, for one epoch a stage.
inline TrainingSettings plain_settings(const TestedKind& kind, const std::vector<uint64_t>& seeds, int batch = 8) {
  TrainingSettings s;
  s.kind = kind.kind;
  s.batch = batch;
  s.replicas.clear();
  for (uint64_t seed : seeds) s.replicas.push_back({seed, kind.settings});
  return s;
}
// The same, where every replica has further settings of its own.
inline TrainingSettings varied_settings(const TestedKind& kind, const std::vector<uint64_t>& seeds, int batch = 8) {
  TrainingSettings s = plain_settings(kind, seeds, batch);
  for (Replica& replica : s.replicas) {
    const uint64_t seed = replica.seed;
    json varied{{"lr", 1e-3 * double(1 + seed % 3)},           {"lr_scale", 1e-2},
                {"beta", 1 + 0.1 * double(seed % 5)},          {"prior_sd", 0.5 + 0.1 * double(seed % 4)},
                {"init_log_std", -4 - 0.1 * double(seed % 4)}, {"warmup_epochs", 0.5},
                {"schedule", seed % 2 ? "linear" : "cosine"}};
    varied = known_settings(kind.kind, varied);
    varied.update(kind.settings);
    replica.settings = varied;
  }
  return s;
}

// A network trained before: all of SmallNetwork's tensors but the weights of the head, which begin anew.
inline std::shared_ptr<Pretrained> pretrained_small(bool laplace) {
  auto p = std::make_shared<Pretrained>();
  p->description = laplace ? "laplace" : "one sd";
  const SmallNetwork network;
  for (const TensorSpec& t : network.layout().tensors()) {
    if (t.name == "fc2.weight") continue;
    p->weights[t.name] = random_normal(t.size, 0, t.bias ? 0.1f : std::sqrt(2.f / float(t.fan_in)), unsigned(t.offset));
    if (laplace && !t.bias) p->prior_log_std[t.name] = random_normal(t.size, -3, 0.3f, unsigned(t.offset + 1));
  }
  return p;
}

// ----------------------------------------------------------------------------------------------------------- training
struct Training {
  // Parts of `count` generated digits.
  Training(const TrainingSettings& settings, int count, int parts = 2, const NetworkFactory& network = small_network())
      : Training(settings, split_into_parts(count, parts, list_seeds(settings)), digits(count), network) {}
  Training(const TrainingSettings& settings, const Stages& stages, const Images& images,
           const NetworkFactory& network = small_network())
      : Training(settings, std::vector{stages}, images, network) {}
  Training(const TrainingSettings& settings, const std::vector<Stages>& groups, const Images& images,
           const NetworkFactory& network = small_network())
      : trainer(memory.device(), memory.arena(), network,
                upload_images(memory.device(), memory.arena(), images, unit_range), groups, settings) {}
  static std::vector<uint64_t> list_seeds(const TrainingSettings& settings) {
    std::vector<uint64_t> seeds;
    for (const Replica& replica : settings.replicas) seeds.push_back(replica.seed);
    return seeds;
  }

  // Every array that training goes on from, of one replica, without the gaps between tensors.
  std::vector<std::vector<float>> state(int replica = 0) {
    std::vector<std::vector<float>> arrays;
    for (const StateArray& a : trainer.posterior().state()) arrays.push_back(read(*a.store, a.array, replica));
    return arrays;
  }
  // The same of every replica, one after the other.
  std::vector<std::vector<float>> states() {
    std::vector<std::vector<float>> all;
    for (int r = 0; r < trainer.posterior().replicas(); r++)
      for (std::vector<float>& array : state(r)) all.push_back(std::move(array));
    return all;
  }
  std::vector<float> array(const std::string& name) { return read(trainer.posterior().store(), name, 0); }
  const TensorSpec& spec(const std::string& tensor) {
    return find_tensor(trainer.posterior().store().layout(), tensor);
  }
  std::vector<float> tensor(const std::string& array, const std::string& name) {
    return trainer.posterior().store().read(memory.device(), array, 0, spec(name));
  }
  void set_tensor(const std::string& array, const std::string& name, const std::vector<float>& values) {
    trainer.posterior().store().write(memory.device(), array, 0, spec(name), values);
  }

  // As an experiment does at a stage's end, with a Fisher information of no meaning.
  void end_stage() {
    trainer.posterior().end_stage([this](int) {
      const ParameterLayout& layout = trainer.posterior().store().layout();
      std::vector<float> fisher = random_uniform(layout.stride(), 0, 2, 4);
      for (const auto& gap : layout.gaps()) std::fill_n(fisher.begin() + long(gap.offset), gap.size, 0.f);
      return fisher;
    });
  }
  // A whole stage: its totals, one a replica.
  std::vector<EpochTotals> stage(int number) {
    trainer.begin_stage(number);
    const std::vector<EpochTotals> totals = trainer.run(trainer.count_steps(number));
    end_stage();
    return totals;
  }
  // All stages but the first `from`, in two calls each.
  std::vector<EpochTotals> train(int from = 0) {
    std::vector<EpochTotals> totals;
    for (int number = from; number < trainer.stages().count(); number++) {
      trainer.begin_stage(number);
      const int half = trainer.count_steps(number) / 2;
      for (int steps : {half, trainer.count_steps(number) - half})
        for (const EpochTotals& t : trainer.run(steps)) totals.push_back(t);
      end_stage();
    }
    return totals;
  }

  Memory memory;
  Trainer trainer;

 private:
  std::vector<float> read(const ParameterStore& store, const std::string& name, int replica) {
    std::vector<float> all;
    for (const TensorSpec& t : store.layout().tensors()) {
      const std::vector<float> values = store.read(memory.device(), name, replica, t);
      all.insert(all.end(), values.begin(), values.end());
    }
    return all;
  }
};

inline void expect_same(const EpochTotals& a, const EpochTotals& b) {
  EXPECT_EQ(a.loss, b.loss);
  EXPECT_EQ(a.accuracy, b.accuracy);
  EXPECT_EQ(a.kl, b.kl);
  EXPECT_EQ(a.kl_by_name, b.kl_by_name);
  EXPECT_EQ(a.examples, b.examples);
  EXPECT_EQ(a.steps, b.steps);
}
inline void expect_same(const std::vector<EpochTotals>& a, const std::vector<EpochTotals>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); i++) expect_same(a[i], b[i]);
}

// The message of the RunError that these steps end in; empty: they end in none.
inline std::string run_error(Training& run, int steps) {
  try {
    run.trainer.run(steps);
  } catch (const RunError& e) {
    return e.what();
  }
  return "";
}

}  // namespace baton::test
