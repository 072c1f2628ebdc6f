// Point estimates. Fine-tuning (ft) goes on from stage to stage by Adam, whose state starts anew with each stage. The
// others learn task after task: SGD with momentum (sgd), Adam (adam), and Adam with a quadratic anchor at what it knew
// (kernels/baselines.h): Synaptic Intelligence (si; Zenke et al. 2017), which measures each weight's part in the loss
// along its path, and EWC (ewc; Kirkpatrick et al. 2017), by the Fisher information at a task's end.
#include "kernels/baselines.h"
#include "kernels/prune.h"
#include "layers/posteriors/gaussian.h"

namespace baton {

namespace {

// What they share: weights, and a gradient of each.
class PointEstimate : public Posterior {
 public:
  explicit PointEstimate(const PosteriorSetup& setup)
      : Posterior(setup), weights_(add_state("mean")), grad_(store_.add("mean.grad")) {
    add_mask();
  }
  bool uncertain() const override { return false; }
  void clear_gradients() override { fill_zero(device_, grad_, store_.bytes()); }
  void sample(float* w, int replica, int, int count, Key) override {
    for (int s = 0; s < count; s++) mean_weights(w + size_t(stride()) * s, replica);
  }
  std::unique_ptr<Estimator> make_estimator(Linear& layer, const LayerContext& c) override {
    return std::make_unique<PointEstimator>(layer, c, RowWeights{weights_, grad_, size_t(stride())});
  }

 protected:
  void apply_mask() override {
    if (masked_)
      hold_pruned(weights_, nullptr, nullptr, nullptr, nullptr, store_.at("mask"), stride() * replicas(),
                  device_.stream());
  }
  float *weights_, *grad_;
};

class FineTuning : public PointEstimate {
 public:
  explicit FineTuning(const PosteriorSetup& setup) : PointEstimate(setup) {
    for (const char* name : {"mean.adam_m", "mean.adam_v"}) add_state(name, Role::optimizer);
  }
  void initialise(const StepState* states) override {
    initialise_he(weights_, states);
    reset_optimizer();
    refresh(true);
  }
  bool begin_stage(bool first, Replicas of) override {
    if (!first) reset_optimizer(of);
    return true;
  }
  void step(StepState* states) override {
    BATON_RANGE("update");
    point_step(adam_arrays(store_, "mean"), states, device_.stream());
    apply_mask();
  }
};

class PointPosterior : public PointEstimate {
 public:
  explicit PointPosterior(const PosteriorSetup& setup) : PointEstimate(setup) {
    const std::string name = kind().name;
    arrays_.weights = weights_;
    arrays_.grad = grad_;
    arrays_.m = add_state("mean.m", Role::optimizer);
    arrays_.v = add_state("mean.v", Role::optimizer);
    rule_.rule = name == "sgd" ? PointRule::sgd : PointRule::adam;
    rule_.momentum = float(settings().value("momentum", 0.0));
    rule_.weight_decay = float(double(settings()["weight_decay"]));
    if (name != "si" && name != "ewc") return;
    const double strength = settings()["strength"];
    rule_.strength = float(name == "ewc" ? strength / 2 : strength);  // EWC: lambda / 2
    arrays_.importance = importance_ = add_state("importance");
    arrays_.centre = centre_ = add_state("centre");
    if (name == "si") arrays_.path = add_state("path", Role::other);
    else fisher_ = arena_.take<float>(size_t(stride()));
  }
  void initialise(const StepState* states) override {
    initialise_glorot(weights_, false, states);
    if (centre_) copy_on_device(device_, centre_, weights_, store_.bytes());
  }
  bool begin_stage(bool first, Replicas of) override {
    const bool anew = !first && bool(settings()["restart_optimizer"]);
    if (anew) reset_optimizer(of);
    return anew;
  }
  void end_stage(const FisherInformation& fisher) override {
    if (arrays_.path)
      consolidate_path(importance_, centre_, arrays_.path, weights_, stride(), float(double(settings()["xi"])),
                       device_.stream());
    if (!fisher_) return;
    upload(device_, fisher_, fisher(int(settings()["fisher_examples"])));
    consolidate_fisher(importance_, centre_, fisher_, weights_, stride(), float(double(settings()["fisher_decay"])),
                       device_.stream());
  }
  void step(StepState* states) override {
    point_update(arrays_, stride(), rule_, states, device_.stream());
    apply_mask();
  }

 private:
  PointSettings rule_;
  PointArrays arrays_{};
  float *importance_ = nullptr, *centre_ = nullptr, *fisher_ = nullptr;
};

Schema point_options(double lr, Schema own) {
  own.push_back(number_option("weight_decay", 0, not_negative, "added to the gradient, times the weight (L2)"));
  own.push_back(flag_option("restart_optimizer", false, "the optimizer's state starts anew with each task"));
  return with_schedule(lr, "step size", std::move(own));
}
Option strength() {
  return number_option("strength", 0, not_negative, "strength of SI's (c) and EWC's (lambda) penalty");
}

}  // namespace

extern const PosteriorKind ft_kind{"ft", "ft, a point estimate (fine-tuning): weights without uncertainty",
                                   with_schedule(1e-3, "Adam's step size", {}), make_kind<FineTuning>};
extern const PosteriorKind sgd_kind{
    "sgd", "sgd, a point estimate by stochastic gradient descent",
    point_options(0.01, {number_option("momentum", 0, {0, 0.999999}, "momentum of SGD")}), make_kind<PointPosterior>,
    false};
extern const PosteriorKind adam_kind{"adam", "adam, a point estimate by Adam", point_options(1e-3, {}),
                                     make_kind<PointPosterior>, false};
extern const PosteriorKind si_kind{"si",
                                   "si, Synaptic Intelligence: Adam, anchored where weights mattered along their path",
                                   point_options(1e-3, {strength(), number_option("xi", 0.1, positive, "si: damping")}),
                                   make_kind<PointPosterior>, false};
extern const PosteriorKind ewc_kind{
    "ewc", "ewc, elastic weight consolidation: Adam, anchored by the Fisher information of earlier tasks",
    point_options(1e-3, {strength(),
                         whole_option("fisher_examples", 1000, {1, 1e9}, "ewc: of a task, for its Fisher information"),
                         number_option("fisher_decay", 1, {0, 1}, "ewc: what an older task's information keeps")}),
    make_kind<PointPosterior>, false};

}  // namespace baton
