#include "trainers/model_learning.h"

#include <algorithm>
#include <cmath>

#include "trainers/tasks.h"

namespace baton {

namespace {

// Sums over a layer's tensors and its z, in the order of the layers.
json by_layer(const std::vector<std::string>& names, const std::vector<double>& values) {
  json layers = json::object();
  for (size_t i = 0; i < names.size(); i++) {
    const std::string layer = names[i].substr(0, names[i].rfind('.'));
    layers[layer] = layers.value(layer, 0.0) + values[i];
  }
  return layers;
}

class BoundLearning : public Learning {
 public:
  BoundLearning(Device& device, Arena& arena, const Model& model, const DeviceImages& images,
                const std::vector<int32_t>& order, const TrainingPlan& plan)
      : model_(model),
        trainer_(device, arena, model.architecture.network(), images, plan, {order}, {int(order.size())}) {}

  void begin() override {
    trainer_.resume_from(model_.arrays, model_.step);
    trainer_.begin_stage(0);
  }
  int steps() const override { return trainer_.steps_of(0); }
  int steps_an_epoch() const override { return trainer_.steps_an_epoch(0); }
  int step() const override { return trainer_.stage_step(); }
  int advance(int count) override { return trainer_.advance(count); }
  EpochTotals take_totals() override { return trainer_.take_totals()[0]; }
  void save(const std::filesystem::path& path, const std::string& extra) override { trainer_.save(path, extra); }
  std::string restore(const std::filesystem::path& path) override { return trainer_.restore(path); }
  Predictions predict_at_mean(Predictor& predictor) override {
    return predictor.predict(trainer_.posterior(), 0, 0, 0);
  }
  json finish(Model& next) override {
    keep(next, trainer_.posterior());
    next.step = trainer_.steps_in_all();
    return by_layer(trainer_.posterior().kl_names(), trainer_.posterior().kl_by_name()[0]);
  }

 private:
  const Model& model_;
  IncrementalTrainer trainer_;
};

// A fully factorized Gaussian is what Bayesian gradient descent moves, too.
class DescentLearning : public Learning {
 public:
  DescentLearning(Device& device, Arena& arena, const Model& model, const DeviceImages& images,
                  const std::vector<int32_t>& order, const TaskPlan& plan, const BgdSettings& settings,
                  std::string identity)
      : device_(device),
        model_(model),
        identity_(std::move(identity)),
        trainer_(device, arena, model.architecture.network(), images, sequence_of(order), plan,
                 [&](Device& d, Arena& a, const ParameterLayout& layout) {
                   return std::make_unique<BgdLearner>(d, a, layout, settings);
                 }) {}

  void begin() override {
    ParameterStore& store = trainer_.learner().store();
    for (const TensorSpec& t : store.layout().tensors()) {
      store.write(device_, "mean", 0, t, values(t, ".mean"));
      std::vector<float> sd = values(t, ".log_std");
      for (float& s : sd) s = std::exp(s);
      if (model_.arrays.has(t.name + ".mask")) {  // sigma = mean = 0 stays so by itself
        const std::vector<uint8_t> kept = model_.arrays.at(t.name + ".mask", t.shape).as<uint8_t>();
        for (size_t i = 0; i < sd.size(); i++)
          if (!kept[i]) sd[i] = 0;
      }
      store.write(device_, "std", 0, t, sd);
    }
    trainer_.begin_stage(0);
  }
  int steps() const override { return trainer_.steps_of(0); }
  int steps_an_epoch() const override { return trainer_.steps_an_epoch(0); }
  int step() const override { return trainer_.stage_step(); }
  int advance(int count) override { return trainer_.advance(count); }
  EpochTotals take_totals() override { return trainer_.take_totals(); }
  std::string warning() override { return trainer_.warning(); }
  void save(const std::filesystem::path& path, const std::string& extra) override {
    trainer_.save(path, identity_, extra);
  }
  std::string restore(const std::filesystem::path& path) override { return trainer_.restore(path, identity_); }
  Predictions predict_at_mean(Predictor& predictor) override { return predictor.predict(trainer_.learner(), 0, 0); }

  json finish(Model& next) override {
    next.arrays = {};
    ParameterStore& store = trainer_.learner().store();
    for (const TensorSpec& t : store.layout().tensors()) {
      const auto put = [&](const char* array, const std::vector<float>& v) {
        next.arrays.tensors[t.name + array] = Tensor::of<float>(std::span<const float>(v), t.shape);
      };
      std::vector<float> log_std = store.read(device_, "std", 0, t), prior_log_std = values(t, ".log_std");
      for (size_t i = 0; i < log_std.size(); i++) log_std[i] = log_std[i] > 0 ? std::log(log_std[i]) : prior_log_std[i];
      put(".mean", store.read(device_, "mean", 0, t));
      put(".log_std", log_std);
      put(".prior_mean", values(t, ".mean"));
      put(".prior_log_std", prior_log_std);
      if (model_.arrays.has(t.name + ".mask"))
        next.arrays.tensors[t.name + ".mask"] = model_.arrays.at(t.name + ".mask", t.shape);
    }
    next.step = model_.step + uint32_t(steps());
    Arena arena;
    const auto posterior = posterior_of(device_, arena, next);
    return by_layer(posterior->kl_names(), posterior->kl_by_name()[0]);
  }

 private:
  static TaskSequence sequence_of(const std::vector<int32_t>& order) {
    TaskSequence sequence;
    sequence.examples = {order};
    return sequence;
  }
  std::vector<float> values(const TensorSpec& t, const char* array) const {
    return model_.arrays.at(t.name + array, t.shape).as<float>();
  }
  Device& device_;
  const Model& model_;
  std::string identity_;
  TaskTrainer trainer_;
};

}  // namespace

std::unique_ptr<Learning> learning_of(Device& device, Arena& arena, const Model& model, const DeviceImages& images,
                                      const std::vector<int32_t>& order, const Model& how, bool augment,
                                      const std::string& goes_on_from) {
  const int batch = std::min(how.batch, int(order.size()));
  if (how.rule == Rule::descent) {
    if (model.posterior.family != Family::gaussian)
      throw InputError(std::string("Bayesian gradient descent moves a fully factorized posterior (ffg); this one is ") +
                       name_of(model.posterior.family));
    if (augment) throw InputError("--augment is not for Bayesian gradient descent here");
    TaskPlan plan;
    plan.batch = batch;
    plan.epochs = how.epochs;
    plan.seed = model.seed + 0x9e3779b97f4a7c15ull * uint64_t(model.stages());  // its steps count from 0
    plan.lr = how.training.lr;
    plan.schedule = how.training.schedule;
    BgdSettings settings;
    settings.draws = how.draws;
    settings.eta = how.training.lr;
    float widest = -INFINITY;
    for (const auto& [name, tensor] : model.arrays.tensors)
      if (name.ends_with(".log_std") && !name.ends_with(".prior_log_std"))
        for (float x : tensor.as<float>()) widest = std::max(widest, x);
    settings.sigma = std::exp(widest);  // what a sigma that runs away is measured by
    return std::make_unique<DescentLearning>(device, arena, model, images, order, plan, settings, goes_on_from);
  }
  TrainingPlan plan;
  plan.posterior = model.posterior;
  plan.scale_rule = how.scale_rule;
  plan.batch = batch - batch % plan.posterior.groups;
  plan.epochs = how.epochs;
  plan.augment = augment;
  plan.seeds = {model.seed};
  plan.settings = {how.training};
  plan.stages_before = model.stages();
  plan.goes_on_from = goes_on_from;
  return std::make_unique<BoundLearning>(device, arena, model, images, order, plan);
}

}  // namespace baton
