// Bayes by Backprop (bbb; Blundell et al. 2015; kernels/baselines.h): a mean and sigma = ln(1 + exp rho) of every
// weight, moved by SGD on the summed loss and the KL to a fixed prior, Gaussian or a mixture of two.
#include "kernels/baselines.h"
#include "layers/posteriors/drawn.h"

namespace baton {

namespace {

class BbbPosterior : public DrawnPosterior {
 public:
  explicit BbbPosterior(const PosteriorSetup& setup) : DrawnPosterior(setup) {
    rule_.prior = settings()["prior"] == "mixture" ? BbbPrior::mixture : BbbPrior::gaussian;
    rule_.sd1 = float(double(settings()["prior_sd"]));
    rule_.sd2 = float(double(settings()["prior_sd2"]));
    rule_.weight1 = float(double(settings()["prior_weight"]));
    rule_.momentum = float(double(settings()["momentum"]));
    rule_.rule = settings()["optimizer"] == "adam" ? PointRule::adam : PointRule::sgd;
    rule_.draws = draws_;
    rule_.gradient_scale = 1.f / float(draws_);
    arrays_.mean = mean_;
    arrays_.sd = sd_;
    arrays_.moments = moments_;
    arrays_.rho = add_state("rho", Role::other);
    arrays_.mean_m = add_state("mean.m", Role::optimizer);
    arrays_.mean_v = add_state("mean.v", Role::optimizer);
    arrays_.rho_m = add_state("rho.m", Role::optimizer);
    arrays_.rho_v = add_state("rho.v", Role::optimizer);
  }
  // On the KL against a batch's summed loss: 1 / M, M batches an epoch (Graves 2011).
  double kl_weight(int, int examples, int batch) const override { return double(batch) / double(examples); }
  // The gaps between tensors too: the update takes ln sd of every place.
  void initialise(const StepState* states) override {
    initialise_glorot(mean_, true, states);
    fill_sigma(float(double(settings()["sigma"])), true);
    rho_of_sd(arrays_.rho, sd_, stride(), device_.stream());
  }
  bool begin_stage(bool, Replicas) override { return false; }
  void step(StepState* states) override { bbb_update(arrays_, stride(), rule_, states, device_.stream()); }
  void refresh(bool first_stage) override {
    rho_of_sd(arrays_.rho, sd_, stride(), device_.stream());
    DrawnPosterior::refresh(first_stage);
  }

 private:
  BbbSettings rule_;
  BbbArrays arrays_{};
};

}  // namespace

extern const PosteriorKind bbb_kind{
    "bbb", "bbb, Bayes by Backprop: every weight has a mean and a standard deviation, and a fixed prior",
    with_schedule(
        1e-3, "step size on the summed loss",
        drawn_options(
            1, {choice_option("prior", "gaussian", {"gaussian", "mixture"}, "bbb: gaussian, or a mixture of two"),
                number_option("prior_sd", 1, positive, "bbb: of the prior (of its wide component)"),
                number_option("prior_sd2", 0.0024787522, positive, "bbb: of the mixture's narrow component"),
                number_option("prior_weight", 0.5, {0, 0.999999, true}, "bbb: of the mixture's wide component"),
                number_option("momentum", 0, {0, 0.999999}, "momentum of SGD"),
                choice_option("optimizer", "sgd", {"sgd", "adam"}, "bbb: sgd or adam")})),
    make_kind<BbbPosterior>, false};

}  // namespace baton
