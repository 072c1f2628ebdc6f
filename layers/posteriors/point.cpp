// Point estimates that learn task after task: SGD with momentum (sgd), Adam (adam), and Adam with a quadratic anchor at
// what it knew (kernels/baselines.h): Synaptic Intelligence (si; Zenke et al. 2017), which measures each weight's part
// in the loss along its path, and EWC (ewc; Kirkpatrick et al. 2017), by the Fisher information at a task's end.
#include "kernels/baselines.h"
#include "kernels/prune.h"
#include "layers/posteriors/posterior.h"

namespace baton {

namespace {

class PointPosterior : public Posterior {
 public:
  explicit PointPosterior(const PosteriorSetup& setup) : Posterior(setup) {
    const std::string name = kind().name;
    arrays_.weights = add_state("mean");
    if (masked_) upload(device_, add_state("mask"), std::vector<float>(size_t(stride()), 1.f));
    arrays_.grad = grad_ = store_.add("grad");
    arrays_.m = add_state("mean.m", false);
    arrays_.v = add_state("mean.v", false);
    rule_.rule = name == "sgd" ? PointRule::sgd : PointRule::adam;
    rule_.momentum = float(settings().value("momentum", 0.0));
    rule_.weight_decay = float(double(settings()["weight_decay"]));
    if (name != "si" && name != "ewc") return;
    const double strength = settings()["strength"];
    rule_.strength = float(name == "ewc" ? strength / 2 : strength);  // EWC: lambda / 2
    arrays_.importance = importance_ = add_state("importance");
    arrays_.centre = centre_ = add_state("centre");
    if (name == "si") arrays_.path = add_state("path", false);
    else fisher_ = arena_.take<float>(size_t(stride()));
  }
  bool uncertain() const override { return false; }
  void initialise(const StepState* states) override {
    initialise_glorot(arrays_.weights, false, states);
    if (centre_) copy_on_device(device_, centre_, arrays_.weights, store_.bytes());
  }
  bool begin_stage(bool first) override {
    const bool anew = !first && bool(settings()["restart_optimizer"]);
    if (anew) reset_optimizer();
    return anew;
  }
  void end_stage(const FisherInformation& fisher) override {
    if (arrays_.path)
      consolidate_path(importance_, centre_, arrays_.path, arrays_.weights, stride(), float(double(settings()["xi"])),
                       device_.stream());
    if (!fisher_) return;
    upload(device_, fisher_, fisher(int(settings()["fisher_examples"])));
    consolidate_fisher(importance_, centre_, fisher_, arrays_.weights, stride(),
                       float(double(settings()["fisher_decay"])), device_.stream());
  }
  void clear_gradients() override { fill_zero(device_, grad_, store_.bytes()); }
  void reset_optimizer() override {
    fill_zero(device_, arrays_.m, store_.bytes());
    fill_zero(device_, arrays_.v, store_.bytes());
  }
  void step(StepState* states) override {
    point_update(arrays_, stride(), rule_, states, device_.stream());
    apply_mask();
  }
  void sample(float* w, int replica, int, int count, Key) override {
    for (int s = 0; s < count; s++) mean_weights(w + size_t(stride()) * s, replica);
  }
  std::unique_ptr<Estimator> make_estimator(Linear& layer, const LayerContext& c) override {
    return std::make_unique<PointEstimator>(layer, c, RowWeights{arrays_.weights, grad_, size_t(stride())});
  }

 private:
  void apply_mask() override {
    if (masked_)
      hold_pruned(arrays_.weights, nullptr, nullptr, nullptr, nullptr, store_.at("mask"), stride(), device_.stream());
  }
  PointSettings rule_;
  PointArrays arrays_{};
  float *importance_ = nullptr, *centre_ = nullptr, *grad_, *fisher_ = nullptr;
};

std::unique_ptr<Posterior> make(const PosteriorSetup& setup) { return std::make_unique<PointPosterior>(setup); }

Schema point_options(double lr, Schema own) {
  own.push_back(number_option("weight_decay", 0, not_negative, "added to the gradient, times the weight (L2)"));
  own.push_back(flag_option("restart_optimizer", false, "the optimizer's state starts anew with each task"));
  return with_schedule(lr, "step size", std::move(own));
}
Option strength(const char* help) { return number_option("strength", 0, not_negative, help); }

}  // namespace

extern const PosteriorKind sgd_kind, adam_kind, si_kind, ewc_kind;
const PosteriorKind sgd_kind{"sgd",
                             "sgd, a point estimate by stochastic gradient descent",
                             point_options(0.01, {number_option("momentum", 0, {0, 0.999999}, "momentum of SGD")}),
                             make,
                             true,
                             false};
const PosteriorKind adam_kind{"adam", "adam, a point estimate by Adam", point_options(1e-3, {}), make, true, false};
const PosteriorKind si_kind{"si",
                            "si, Synaptic Intelligence: Adam, anchored where weights mattered along their path",
                            point_options(1e-3, {strength("strength of SI's (c) and EWC's (lambda) penalty"),
                                                 number_option("xi", 0.1, positive, "si: damping")}),
                            make,
                            true,
                            false};
const PosteriorKind ewc_kind{
    "ewc",
    "ewc, elastic weight consolidation: Adam, anchored by the Fisher information of earlier tasks",
    point_options(1e-3, {strength("strength of SI's (c) and EWC's (lambda) penalty"),
                         whole_option("fisher_examples", 1000, {1, 1e9}, "ewc: of a task, for its Fisher information"),
                         number_option("fisher_decay", 1, {0, 1}, "ewc: what an older task's information keeps")}),
    make,
    true,
    false};

}  // namespace baton
