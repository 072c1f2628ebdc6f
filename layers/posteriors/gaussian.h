// What the posteriors of Bayesian incremental learning share (Kochurov et al. 2018): a Gaussian over every weight, with
// the prior that it answers to, which is the posterior of the stage before. Used as it is, it is the fully factorized
// Gaussian (ffg). Each step is one of Adam on mean cross-entropy + beta / N KL(q || p).
#pragma once
#include "kernels/gaussian.h"
#include "layers/posteriors/posterior.h"

namespace baton {

class GaussianPosterior : public Posterior {
 public:
  explicit GaussianPosterior(const PosteriorSetup&);
  double kl_weight(int replica, int examples, int batch) const override;
  void initialise(const StepState*) override;
  void adopt(int replica, const TensorSpec&, std::span<const float> w, std::span<const float> prior_log_std) override;
  bool begin_stage(bool first, Replicas) override;
  void clear_gradients() override;
  void step(StepState*) override;
  std::vector<std::string> kl_names() const override { return kl_names_; }
  std::vector<std::vector<double>> kl_by_name() override;
  std::vector<std::vector<double>> take_accumulated_kl(Replicas) override;
  std::vector<double> accumulated_kl() override;
  void set_accumulated_kl(const std::vector<double>&) override;
  std::vector<double> mean_log_std() override;
  void sample(float* w, int replica, int first, int count, Key) override;
  std::vector<float> read_log_std(int replica, const TensorSpec&) override;
  void refresh(bool first_stage) override;
  std::unique_ptr<Estimator> make_estimator(Linear&, const LayerContext&) override;

  // The posterior becomes the prior, and the optimizer's moments start anew (Algorithm 1 of Kochurov et al.).
  virtual void hand_over(Replicas);

 protected:
  // Tensors whose weights are not held as independent Gaussians are left out of the step and of the KL.
  void use_runs(std::vector<Run>);
  GaussianArrays arrays() const;
  GaussianArrays arrays(int replica) const;  // of one replica alone
  GaussianWeights weights() const;
  // x[r][i] = values[r] for i < count, in an array of rows of `stride`.
  void fill(float* x, size_t stride, int count, const std::vector<float>& values);
  // Hooks of the kinds that build on this one.
  virtual void initialise_rest(const StepState*) {}
  virtual void add_kl(KlAccumulator);
  virtual void update_marginals() {}  // brings "log_std" up to date
  virtual void sample_weights(float* w, int replica, int first, int count, Key);
  void apply_mask() override;

  std::vector<std::string> kl_names_;  // at first the tensors'; complete before use_runs()
  Pieces pieces_{};
  KlAccumulator accumulated_{};  // over steps
  float* partial_ = nullptr;
  ScaleRule scale_rule_;

 private:
  std::vector<std::vector<double>> split_by_replica(const std::vector<double>& sums) const;
  KlAccumulator kl_{};
  float* values_ = nullptr;  // [replicas]
};

// What Adam on `means` alone needs (point_step): the array and, by its name, "NAME.grad", "NAME.adam_m", "NAME.adam_v".
GaussianArrays adam_arrays(const ParameterStore&, const std::string& means);

// The options that ffg, cfg and mnf share, and those of one of them.
Schema gaussian_options(Schema own = {});

}  // namespace baton
