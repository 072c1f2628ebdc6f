// What Bayesian gradient descent is compared with: SGD with momentum, Adam, their quadratic anchors (Synaptic
// Intelligence, EWC), and Bayes by Backprop. One network; arrays over the flat store, device memory.
#pragma once
#include "kernels/bgd.h"

namespace baton {

// ---- point estimates
enum class PointRule : int { sgd, adam };
struct PointArrays {
  float* weights;
  const float* grad;  // of the loss without penalty
  float* m;           // momentum, or Adam's first moment
  float* v;           // Adam's second moment (unused by SGD)
  // The anchor: strength * sum_i importance_i (w_i - centre_i)^2 is added to the loss. Null: none.
  const float* importance = nullptr;
  const float* centre = nullptr;
  float* path = nullptr;  // Synaptic Intelligence's running omega, or null
};
struct PointSettings {
  PointRule rule = PointRule::sgd;
  float momentum = 0;      // SGD: m = momentum m + g, w -= lr m (PyTorch's form, no dampening)
  float weight_decay = 0;  // added to the gradient: weight_decay w (L2)
  float strength = 0;      // of the anchor: its gradient is 2 strength importance (w - centre)
};
// One step with the step size states[0].lr_mean; Adam's beta and corrections are StepState's. Then, where path is
// given,
//   path_i -= g_i (change of w_i), g the gradient of the loss without penalty or decay (Zenke et al. 2017).
// A halted state: nothing is done.
void point_update(const PointArrays&, int count, const PointSettings&, const StepState* states, Stream);

// Synaptic Intelligence at a task's end: importance = relu(importance + path / ((w - centre)^2 + xi)), centre = w,
// path = 0.
void consolidate_path(float* importance, float* centre, float* path, const float* weights, int count, float xi, Stream);
// EWC at a task's end (Kirkpatrick et al. 2017): one penalty fisher (w - w*)^2 a task, as one quadratic: with
// a = importance and f = fisher, importance = decay a + f, centre = (decay a centre + f w) / importance (w where both
// are 0). decay = 1: the exact sum of all tasks' penalties up to a constant; below 1: online EWC.
void consolidate_fisher(float* importance, float* centre, const float* fisher, const float* weights, int count,
                        float decay, Stream);

// ---- Bayes by Backprop (Blundell et al. 2015): sigma = ln(1 + exp rho), loss = NLL_sum + kl_weight (ln q - ln P) at
// the draws theta_k = mean + sigma e(k, .), the same noise as kernels/bgd.h.
enum class BbbPrior : int { gaussian, mixture };
struct BbbSettings {
  BbbPrior prior = BbbPrior::gaussian;
  float sd1 = 1, sd2 = 0.0024787522f;  // of the prior's wide and narrow component (Gaussian: sd1 alone); e^-6
  float weight1 = 0.5f;                // pi, of the wide one
  int draws = 1;                       // K
  float gradient_scale = 1;            // turns the sums of gradients into E over draws: 1 / K
  float momentum = 0;
  PointRule rule = PointRule::sgd;
};
struct BbbArrays {
  float* mean;
  float* rho;
  float* sd;  // kept beside rho: what the draws and predictions read
  Moments moments;
  float *mean_m, *mean_v, *rho_m, *rho_v;  // the optimizer's
};
// With s_k = -d ln P / d theta at theta_k and E over the K draws of the step:
//   g_mean = E1 + kl_weight E[s],   g_sd = E2 + kl_weight (E[s e] - 1 / sd),   g_rho = g_sd (1 - exp(-sd)),
// (d sd / d rho = sigmoid(rho) = 1 - exp(-sd)), then SGD with momentum or Adam on mean and rho with
// states[0].lr_mean; kl_weight is states[0].kl_now. For the Gaussian prior E[s] and E[s e] are its exact means over the
// noise: mean / sd1^2 and sd / sd1^2.
void bbb_update(const BbbArrays&, int count, const BbbSettings&, const StepState* states, Stream);
// rho = ln(exp(sd) - 1), stable for small and large sd; and back. rho may be sd.
void rho_of_sd(float* rho, const float* sd, int count, Stream);
void sd_of_rho(float* sd, const float* rho, int count, Stream);

}  // namespace baton
