// Fine-tuning (ft): a point estimate that goes on from stage to stage, moved by Adam, whose state starts anew with each
// stage. It has no prior, so nothing holds it to what it knew.
#include "kernels/gaussian.h"
#include "kernels/prune.h"
#include "layers/posteriors/posterior.h"

namespace baton {

namespace {

class FineTuning : public Posterior {
 public:
  explicit FineTuning(const PosteriorSetup& setup) : Posterior(setup) {
    add_state("mean");
    for (const char* name : {"mean.adam_m", "mean.adam_v"}) add_state(name, false);
    if (masked_) upload(device_, add_state("mask"), std::vector<float>(size_t(stride()) * replicas(), 1.f));
    store_.add("mean.grad");
  }
  bool uncertain() const override { return false; }
  void initialise(const StepState* states) override {
    initialise_he(store_.at("mean"), states);
    reset_optimizer();
    refresh(true);
  }
  bool begin_stage(bool first) override {
    if (!first) reset_optimizer();
    return true;
  }
  void clear_gradients() override { fill_zero(device_, store_.at("mean.grad"), store_.bytes()); }
  void reset_optimizer() override {
    for (const char* name : {"mean.adam_m", "mean.adam_v"}) fill_zero(device_, store_.at(name), store_.bytes());
  }
  void step(StepState* states) override {
    BATON_RANGE("update");
    GaussianArrays a{};
    a.mean = store_.at("mean");
    a.grad_mean = store_.at("mean.grad");
    a.mean_m = store_.at("mean.adam_m");
    a.mean_v = store_.at("mean.adam_v");
    a.stride = size_t(stride());
    a.count = stride();
    a.replicas = replicas();
    point_step(a, states, device_.stream());
    apply_mask();
  }
  void sample(float* w, int replica, int, int count, Key) override {
    for (int s = 0; s < count; s++) mean_weights(w + size_t(stride()) * s, replica);
  }
  std::unique_ptr<Estimator> make_estimator(Linear& layer, const LayerContext& c) override {
    return std::make_unique<PointEstimator>(layer, c,
                                            RowWeights{store_.at("mean"), store_.at("mean.grad"), size_t(stride())});
  }

 private:
  void apply_mask() override {
    if (masked_)
      hold_pruned(store_.at("mean"), nullptr, nullptr, nullptr, nullptr, store_.at("mask"), stride() * replicas(),
                  device_.stream());
  }
};

}  // namespace

extern const PosteriorKind ft_kind;
const PosteriorKind ft_kind{
    "ft", "ft, a point estimate (fine-tuning): weights without uncertainty",
    with_schedule(1e-3, "Adam's step size", {}),
    [](const PosteriorSetup& setup) -> std::unique_ptr<Posterior> { return std::make_unique<FineTuning>(setup); }};

}  // namespace baton
