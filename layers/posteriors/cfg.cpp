// Channel factorized Gaussian (cfg; Kochurov et al. 2018): for every convolution a Cholesky factor for each filter and
// channel (kernels/cholesky.h); dense layers, whose "kernels" are 1x1, and biases are fully factorized. Factors lie in
// a store of their own, one tensor [filters, channels, k k (k k + 1) / 2] a convolution. Every step draws the weights
// and biases of convolutions; with the option `moments` nothing is drawn, and outputs are sampled from their exact
// marginal moments instead.
#include <algorithm>

#include "kernels/cholesky.h"
#include "layers/conv2d.h"
#include "layers/posteriors/gaussian.h"

namespace baton {

namespace {

bool is_convolution(const TensorSpec& t) { return t.shape.size() == 4; }

ParameterLayout factor_layout(const ParameterLayout& layout) {
  ParameterLayout factors;
  for (const TensorSpec& t : layout.tensors())
    if (is_convolution(t))
      factors.add(t.name, {t.shape[0], t.shape[1], packed(int(t.shape[2] * t.shape[3]))}, t.fan_in, false);
  return factors;
}

class CfgPosterior : public GaussianPosterior {
 public:
  explicit CfgPosterior(const PosteriorSetup& setup)
      : GaussianPosterior(setup),
        groups_(settings()["groups"]),
        moments_(settings()["moments"]),
        factors_(setup.arena, factor_layout(setup.layout), replicas()) {
    const auto& tensors = store_.layout().tensors();
    int most = 0;
    std::vector<Run> runs;
    for (int i = 0; i < int(tensors.size()); i++) {
      const TensorSpec& t = tensors[i];
      if (!is_convolution(t)) {
        runs.push_back({int(t.offset), int(t.size), i});
        continue;
      }
      const int extent = int(t.shape[2] * t.shape[3]);
      if (extent > largest_block)
        throw InputError(t.name + ": kernels of " + std::to_string(extent) + " weights, at most " +
                         std::to_string(largest_block) + " can have a Cholesky factor");
      weights_.push_back(i);
      most = std::max(most, int(t.shape[0] * t.shape[1]));
    }
    if (weights_.empty()) throw InputError("a channel factorized posterior needs a convolution");
    for (const char* name : {"scale_tril", "prior_scale_tril"}) add_state(name, Role::believed, &factors_);
    for (const char* name : {"scale_tril.adam_m", "scale_tril.adam_v"}) add_state(name, Role::optimizer, &factors_);
    factors_.add("prior_inverse");
    if (moments_) factors_.add("scale_tril.grad");
    block_partial_ = arena_.take<float>(size_t(most) * replicas());
    if (!moments_) {
      draws_ = arena_.take<float>(size_t(stride()) * replicas() * groups_);
      draw_gradients_ = arena_.take<float>(size_t(stride()) * replicas() * groups_);
    }
    use_runs(std::move(runs));
  }

  std::unique_ptr<Estimator> make_estimator(Linear& layer, const LayerContext& c) override {
    const auto found = std::find(weights_.begin(), weights_.end(), layer.weight());
    if (found == weights_.end()) return GaussianPosterior::make_estimator(layer, c);
    if (!moments_)
      return std::make_unique<PointEstimator>(layer, c, RowWeights{draws_, draw_gradients_, size_t(stride()), groups_});
    const size_t at = factors_.layout()[int(found - weights_.begin())].offset;
    const RowWeights factors{factors_.at("scale_tril") + at, factors_.at("scale_tril.grad") + at,
                             factors_.layout().stride()};
    return std::make_unique<ChannelMoments>(layer, c, weights(), factors,
                                            static_cast<const Conv2d&>(layer).shape(c.batch));
  }

  void initialise_rest(const StepState*) override { settle_factors(); }
  void settle() override {
    settle_factors();
    refresh(true);
  }
  void restored(bool first_stage) override {
    GaussianPosterior::restored(first_stage);
    invert_prior();
  }
  void hand_over(Replicas of) override {
    GaussianPosterior::hand_over(of);
    copy_rows(factors_, "prior_scale_tril", "scale_tril", of);
    invert_prior();
  }

  void draw(int, const StepState* states) override {
    BATON_RANGE("draw");
    if (moments_) return fill_zero(device_, factors_.at("scale_tril.grad"), factors_.bytes());
    for (size_t i = 0; i < weights_.size(); i++)
      cholesky_sample(draws_ + tensor(weights_[i]).offset, size_t(stride()), blocks(i), groups_, states,
                      stream_draws + uint32_t(weights_[i]), device_.stream());
    for (int w : weights_)
      draw_gaussian(draws_, size_t(stride()), arrays(), int(bias(w).offset), int(bias(w).size), groups_, states,
                    stream_draws + uint32_t(w + 1), device_.stream());
  }

  void step(StepState* states) override {
    for (int w : weights_)
      if (!moments_)
        draw_gaussian_backward(arrays(), draw_gradients_, size_t(stride()), int(bias(w).offset), int(bias(w).size),
                               groups_, states, stream_draws + uint32_t(w + 1), device_.stream());
    for (size_t i = 0; i < weights_.size(); i++) {
      const size_t at = tensor(weights_[i]).offset;
      double* kl = accumulated_.sums + weights_[i];
      if (moments_)
        cholesky_step(blocks(i), nullptr, 0, 1, 0, store_.at("mean.grad") + at,
                      factors_.at("scale_tril.grad") + factors_.layout()[int(i)].offset, states, kl,
                      accumulated_.stride, block_partial_, device_.stream());
      else
        cholesky_step(blocks(i), draw_gradients_ + at, size_t(stride()), groups_, stream_draws + uint32_t(weights_[i]),
                      nullptr, nullptr, states, kl, accumulated_.stride, block_partial_, device_.stream());
    }
    GaussianPosterior::step(states);
  }

  void add_kl(KlAccumulator sums) override {
    for (size_t i = 0; i < weights_.size(); i++)
      cholesky_kl(sums.sums + weights_[i], sums.stride, blocks(i), block_partial_, device_.stream());
    GaussianPosterior::add_kl(sums);
  }

  void sample_weights(float* w, int replica, int first, int count, Key key) override {
    GaussianPosterior::sample_weights(w, replica, first, count, key);
    for (size_t i = 0; i < weights_.size(); i++) {
      const CholeskyArrays a = blocks(i);
      cholesky_sample_draws(w + tensor(weights_[i]).offset, size_t(stride()), a.mean + a.stride * replica,
                            a.factor + a.factor_stride * replica, a.blocks, a.d, first, count, key,
                            stream_draws + uint32_t(weights_[i]), device_.stream());
    }
  }

  void update_marginals() override {
    for (size_t i = 0; i < weights_.size(); i++) {
      const CholeskyArrays a = blocks(i);
      cholesky_marginals(store_.at("log_std") + tensor(weights_[i]).offset, a.stride, a.factor, a.factor_stride,
                         a.blocks, a.d, a.replicas, device_.stream());
    }
  }

 private:
  const TensorSpec& tensor(int number) const { return store_.layout()[number]; }
  const TensorSpec& bias(int weight) const { return tensor(weight + 1); }  // of the same layer

  CholeskyArrays blocks(size_t i) const {
    const TensorSpec& t = tensor(weights_[i]);
    const size_t at = t.offset, factor_at = factors_.layout()[int(i)].offset;
    CholeskyArrays a{};
    a.mean = store_.at("mean") + at;
    a.prior_mean = store_.at("prior_mean") + at;
    a.mean_m = store_.at("mean.adam_m") + at;
    a.mean_v = store_.at("mean.adam_v") + at;
    a.stride = size_t(stride());
    a.factor = factors_.at("scale_tril") + factor_at;
    a.prior_factor = factors_.at("prior_scale_tril") + factor_at;
    a.prior_inverse = factors_.at("prior_inverse") + factor_at;
    a.factor_m = factors_.at("scale_tril.adam_m") + factor_at;
    a.factor_v = factors_.at("scale_tril.adam_v") + factor_at;
    a.factor_stride = factors_.layout().stride();
    a.blocks = int(t.shape[0] * t.shape[1]);
    a.d = int(t.shape[2] * t.shape[3]);
    a.replicas = replicas();
    return a;
  }

  // L = diag(sigma), L_prior = diag(sigma_prior), from log_std and prior_log_std.
  void settle_factors() {
    for (const auto& [factor, log_std] : {std::pair{"scale_tril", "log_std"}, {"prior_scale_tril", "prior_log_std"}})
      for (size_t i = 0; i < weights_.size(); i++) {
        const CholeskyArrays a = blocks(i);
        cholesky_from_diagonal(factors_.at(factor) + factors_.layout()[int(i)].offset, a.factor_stride,
                               store_.at(log_std) + tensor(weights_[i]).offset, a.stride, a.blocks, a.d, a.replicas,
                               device_.stream());
      }
    invert_prior();
  }

  void invert_prior() {
    for (size_t i = 0; i < weights_.size(); i++) {
      const CholeskyArrays a = blocks(i);
      cholesky_invert(factors_.at("prior_inverse") + factors_.layout()[int(i)].offset, a.prior_factor, a.factor_stride,
                      a.blocks, a.d, a.replicas, device_.stream());
    }
  }

  int groups_;
  bool moments_;
  ParameterStore factors_;
  std::vector<int> weights_;                            // of convolutions: numbers of tensors in the layout
  float *draws_ = nullptr, *draw_gradients_ = nullptr;  // [replicas * groups][stride]
  float* block_partial_;
};

}  // namespace

extern const PosteriorKind cfg_kind{
    "cfg",
    "cfg, channel factorized Gaussian: the weights of a kernel have a covariance, all others a sigma each",
    gaussian_options(
        {whole_option("groups", 1, {1, 256}, "groups of a batch that draw their own weights (cfg) or z (mnf)"),
         flag_option("moments", false, "cfg: sample outputs from their exact marginal moments, not weights (slow)")}),
    make_kind<CfgPosterior>,
    true,
    false,
    false};

}  // namespace baton
