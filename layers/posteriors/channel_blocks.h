// What CFG adds to a posterior: for every convolution a Cholesky factor for each filter and channel, the draws of its
// weights and biases, their step and their KL (kernels/cholesky.h). Factors lie in a store of their own, one tensor
// [filters, channels, k k (k k + 1) / 2] a convolution.
#pragma once
#include "engine/store.h"
#include "kernels/cholesky.h"
#include "layers/posteriors/posterior.h"

namespace baton {

class ChannelBlocks {
 public:
  // Covers the tensors of `store` with four extents, and the biases that follow them in draws.
  // moments: nothing is drawn; the layers return gradients of means and factors (kernels/cholesky_moments.h).
  ChannelBlocks(Device&, Arena&, ParameterStore& store, int groups, bool moments);
  bool covers(const TensorSpec& t) const { return t.shape.size() == 4; }
  std::vector<StateArray> state_arrays();

  void initialise();    // L = diag(sigma), L_0 = diag(sigma_p), from log_std and prior_log_std
  void settle_prior();  // L_0 = diag(sigma_p) alone
  void hand_over();
  void reset_optimizer();
  void refresh();  // the prior's inverse

  void draw(float* draws, const GaussianArrays&, const StepState*);
  // From the draws' gradients: one step of means and factors; the biases' gradients go to grad_mean and grad_variance.
  void step(const float* draw_gradients, const GaussianArrays&, const StepState*, KlAccumulator);
  void kl(KlAccumulator);
  void sample(float* w, size_t stride, int replica, int first, int count, Key);
  const float* factors() const { return factors_.at("scale_tril"); }
  float* factor_gradients() const { return moments_ ? factors_.at("scale_tril.grad") : nullptr; }
  size_t factor_stride() const { return factors_.layout().stride(); }
  void marginals();  // writes the marginal standard deviations into log_std

 private:
  CholeskyArrays arrays(size_t i) const;
  Device& device_;
  ParameterStore& store_;
  ParameterStore factors_;
  int groups_;
  bool moments_;
  std::vector<int> weights_, biases_;  // numbers of tensors in store_
  float* partial_ = nullptr;
};

}  // namespace baton
