#include "layers/posteriors/gaussian.h"

#include <algorithm>
#include <cmath>

#include "kernels/prune.h"

namespace baton {

GaussianPosterior::GaussianPosterior(const PosteriorSetup& setup)
    : Posterior(setup),
      scale_rule_(settings()["scale_rule"] == "natural" ? ScaleRule::natural : ScaleRule::adam),
      values_(setup.arena.take<float>(size_t(replicas()))) {
  for (const char* name : {"mean", "log_std", "prior_mean", "prior_log_std"}) add_state(name);
  for (const char* name : {"mean.adam_m", "mean.adam_v", "log_std.adam_m", "log_std.adam_v"})
    add_state(name, Role::optimizer);
  add_mask();
  // Derived, but not by the same vector loops everywhere: a resumed run needs its very bits.
  add_state("variance", Role::other);
  store_.add("mean.grad");
  store_.add("variance.grad");
  for (const TensorSpec& t : store_.layout().tensors()) kl_names_.push_back(t.name);
}

void GaussianPosterior::use_runs(std::vector<Run> runs) {
  const std::vector<Run> pieces = pieces_of(runs);
  Run* table = arena_.take<Run>(pieces.size());
  upload(device_, table, pieces);
  pieces_ = {table, int(pieces.size()), slots_of(runs)};
  partial_ = arena_.take<float>(pieces.size() * replicas());
  for (KlAccumulator* sums : {&accumulated_, &kl_})
    *sums = {arena_.take<double>(kl_names_.size() * replicas()), kl_names_.size()};
}

GaussianArrays adam_arrays(const ParameterStore& store, const std::string& means) {
  GaussianArrays a{};
  a.mean = store.at(means);
  a.grad_mean = store.at(means + ".grad");
  a.mean_m = store.at(means + ".adam_m");
  a.mean_v = store.at(means + ".adam_v");
  a.stride = store.layout().stride();
  a.count = int(a.stride);
  a.replicas = store.replicas();
  return a;
}

GaussianArrays GaussianPosterior::arrays() const {
  GaussianArrays a = adam_arrays(store_, "mean");
  a.log_std = store_.at("log_std");
  a.variance = store_.at("variance");
  a.prior_mean = store_.at("prior_mean");
  a.prior_log_std = store_.at("prior_log_std");
  a.grad_variance = store_.at("variance.grad");
  a.scale_m = store_.at("log_std.adam_m");
  a.scale_v = store_.at("log_std.adam_v");
  return a;
}

GaussianArrays GaussianPosterior::arrays(int replica) const {
  GaussianArrays a = arrays();
  const size_t by = a.stride * replica;
  a.mean += by, a.log_std += by, a.variance += by, a.prior_mean += by, a.prior_log_std += by, a.grad_mean += by,
      a.grad_variance += by, a.mean_m += by, a.mean_v += by, a.scale_m += by, a.scale_v += by;
  a.replicas = 1;
  return a;
}

GaussianWeights GaussianPosterior::weights() const {
  return {store_.at("mean"), store_.at("variance"), store_.at("mean.grad"), store_.at("variance.grad"),
          size_t(stride())};
}

std::unique_ptr<Estimator> GaussianPosterior::make_estimator(Linear& layer, const LayerContext& c) {
  const GaussianWeights w = weights();
  return std::make_unique<LocalReparameterization>(layer, c, w, RowWeights{w.mean, w.mean_gradient, w.stride});
}

double GaussianPosterior::kl_weight(int replica, int examples, int) const {
  return double(settings(replica)["beta"]) / examples;
}

void GaussianPosterior::initialise(const StepState* states) {
  initialise_he(store_.at("mean"), states);
  std::vector<float> log_std, prior_log_std;
  for (const json& s : settings_) {
    log_std.push_back(float(double(s["init_log_std"])));
    prior_log_std.push_back(std::log(float(double(s["prior_sd"]))));
  }
  fill(store_.at("log_std"), size_t(stride()), stride(), log_std);
  fill_zero(device_, store_.at("prior_mean"), store_.bytes());
  fill(store_.at("prior_log_std"), size_t(stride()), stride(), prior_log_std);
  initialise_rest(states);
  reset_optimizer();
  refresh(true);
}

void GaussianPosterior::fill(float* x, size_t stride, int count, const std::vector<float>& values) {
  upload(device_, values_, values);
  fill_rows(x, stride, count, values_, replicas(), device_.stream());
  device_.synchronize();  // values_ is used again
}

void GaussianPosterior::adopt(int replica, const TensorSpec& t, std::span<const float> w,
                              std::span<const float> prior_log_std) {
  Posterior::adopt(replica, t, w, prior_log_std);
  store_.write(device_, "prior_mean", replica, t, {w.begin(), w.end()});
  std::vector<float> prior(t.size), log_std = store_.read(device_, "log_std", replica, t);
  for (size_t i = 0; i < t.size; i++) {
    prior[i] = prior_log_std[prior_log_std.size() == 1 ? 0 : i];
    log_std[i] = std::min(log_std[i], prior[i]);
  }
  store_.write(device_, "prior_log_std", replica, t, prior);
  store_.write(device_, "log_std", replica, t, log_std);
}

void GaussianPosterior::refresh(bool first_stage) {
  variance_of(store_.at("variance"), store_.at("log_std"), size_t(stride()), stride(), replicas(), device_.stream());
  restored(first_stage);
}

void GaussianPosterior::clear_gradients() {
  for (const char* name : {"mean.grad", "variance.grad"}) fill_zero(device_, store_.at(name), store_.bytes());
}

bool GaussianPosterior::begin_stage(bool first, Replicas of) {
  if (!first) hand_over(of);
  return true;
}

void GaussianPosterior::hand_over(Replicas of) {
  reset_optimizer(of);
  copy_rows(store_, "prior_mean", "mean", of);
  copy_rows(store_, "prior_log_std", "log_std", of);
}

void GaussianPosterior::step(StepState* states) {
  BATON_RANGE("update");
  gaussian_step(arrays(), scale_rule_, pieces_, states, accumulated_, partial_, device_.stream());
  apply_mask();
}

void GaussianPosterior::apply_mask() {
  if (masked_)
    hold_pruned(store_.at("mean"), store_.at("log_std"), store_.at("variance"), store_.at("prior_mean"),
                store_.at("prior_log_std"), store_.at("mask"), stride() * replicas(), device_.stream());
}

// --------------------------------------------------------------------------------------------------------------- KL
std::vector<std::vector<double>> GaussianPosterior::split_by_replica(const std::vector<double>& sums) const {
  std::vector<std::vector<double>> rows;
  for (auto at = sums.begin(); at != sums.end(); at += long(kl_names_.size()))
    rows.emplace_back(at, at + long(kl_names_.size()));
  return rows;
}

void GaussianPosterior::add_kl(KlAccumulator sums) { gaussian_kl(sums, arrays(), pieces_, partial_, device_.stream()); }

std::vector<std::vector<double>> GaussianPosterior::kl_by_name() {
  const size_t count = kl_names_.size() * replicas();
  fill_zero(device_, kl_.sums, count * sizeof(double));
  add_kl(kl_);
  return split_by_replica(download(device_, kl_.sums, count));
}

std::vector<std::vector<double>> GaussianPosterior::take_accumulated_kl(Replicas of) {
  double* first = accumulated_.sums + kl_names_.size() * of.first;
  const std::vector<double> sums = download(device_, first, kl_names_.size() * of.count);
  fill_zero(device_, first, sums.size() * sizeof(double));
  return split_by_replica(sums);
}

std::vector<double> GaussianPosterior::accumulated_kl() {
  return download(device_, accumulated_.sums, kl_names_.size() * replicas());
}

void GaussianPosterior::set_accumulated_kl(const std::vector<double>& sums) {
  if (sums.size() != kl_names_.size() * replicas()) throw InputError("the accumulated KL of another posterior");
  upload(device_, accumulated_.sums, sums);
}

std::vector<double> GaussianPosterior::mean_log_std() {
  update_marginals();
  std::vector<double> means(size_t(replicas()), 0.0);
  for (int r = 0; r < replicas(); r++) {
    for (const TensorSpec& t : store_.layout().tensors())
      for (float x : store_.read(device_, "log_std", r, t)) means[r] += x;
    means[r] /= double(store_.layout().parameters());
  }
  return means;
}

std::vector<float> GaussianPosterior::read_log_std(int replica, const TensorSpec& t) {
  update_marginals();
  return store_.read(device_, "log_std", replica, t);
}

// ------------------------------------------------------------------------------------------------------------ draws
void GaussianPosterior::sample(float* w, int replica, int first, int count, Key key) {
  sample_weights(w, replica, first, count, key);
  if (masked_)
    zero_pruned(w, size_t(stride()), store_.at("mask") + size_t(stride()) * replica, stride(), count, device_.stream());
}

void GaussianPosterior::sample_weights(float* w, int replica, int first, int count, Key key) {
  const GaussianArrays a = arrays(replica);
  baton::sample_weights(w, a.mean, 0, a.variance, stride(), a.stride, first, count, key, device_.stream());
}

// --------------------------------------------------------------------------------------------------------- the kind
Schema gaussian_options(Schema own) {
  Schema all = with_schedule(
      1e-3, "Adam's step size for the means",
      {choice_option("scale_rule", "adam", {"adam", "natural"}, "how log sigma moves: adam or natural (gradient)"),
       by_replica(number_option("lr_scale", 1e-2, not_negative, "step size of log sigma")),
       by_replica(number_option("prior_sd", 1, positive, "standard deviation of the first prior N(0, sd^2)")),
       by_replica(number_option("init_log_std", -5, {-30, 10}, "initial log sigma")),
       by_replica(number_option("beta", 1, not_negative, "weight of the KL in mean NLL + beta / N KL")),
       by_replica(
           number_option("warmup_epochs", 0, not_negative, "epochs over which the KL's weight grows, in each stage"))});
  all.insert(all.end(), own.begin(), own.end());
  return all;
}

namespace {
class Ffg : public GaussianPosterior {
 public:
  explicit Ffg(const PosteriorSetup& setup) : GaussianPosterior(setup) {
    std::vector<Run> runs;
    for (const TensorSpec& t : setup.layout.tensors()) runs.push_back({int(t.offset), int(t.size), int(runs.size())});
    use_runs(runs);
  }
};
}  // namespace

extern const PosteriorKind ffg_kind{
    "ffg",
    "ffg, fully factorized Gaussian: every weight has a mean and a standard deviation, sigma",
    gaussian_options(),
    make_kind<Ffg>,
    true,
    true,
    false};

}  // namespace baton
