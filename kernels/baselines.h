// The methods that Bayesian gradient descent is compared with: SGD with momentum and Adam, with the quadratic penalties
// (anchors) of Synaptic Intelligence and EWC, and Bayes by Backprop. All for one network; arrays over the flat store,
// in device memory.
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
// One step with the step size states[0].lr_mean; Adam's corrections are those of the state too. Then, where path is
// given,
//   path_i -= g_i (change of w_i),
// where g is the gradient of the loss without penalty or decay (Zenke et al. 2017). If the state is halted, nothing is
// done.
void point_update(const PointArrays&, int count, const PointSettings&, const StepState* states, Stream);

// The end of a task by Synaptic Intelligence: importance = relu(importance + path / ((w - centre)^2 + xi)), centre = w,
// path = 0.
void consolidate_path(float* importance, float* centre, float* path, const float* weights, int count, float xi, Stream);
// The end of a task by EWC (Kirkpatrick et al. 2017). Each task's penalty is fisher (w - w*)^2; all of them are kept as
// one quadratic: with a = importance and f = fisher, importance = decay a + f, centre = (decay a centre + f w) /
// importance (w where both are 0). decay = 1 gives the exact sum of all tasks' penalties, up to a constant; less is
// online EWC.
void consolidate_fisher(float* importance, float* centre, const float* fisher, const float* weights, int count,
                        float decay, Stream);

// ---- Bayes by Backprop (Blundell et al. 2015): sigma = ln(1 + exp rho), loss = NLL_sum + kl_weight (ln q - ln P) at
// the draws theta_k = mean + sigma e(k, .), the same noise as kernels/bgd.h.
enum class BbbPrior : int { gaussian, mixture };
struct BbbSettings {
  BbbPrior prior = BbbPrior::gaussian;
  float sd1 = 1, sd2 = 0.0024787522f;  // of the prior's wide and narrow component (e^-6); a Gaussian has sd1 alone
  float weight1 = 0.5f;                // pi, the weight of the wide component
  int draws = 1;                       // K
  float gradient_scale = 1;            // turns the sums of gradients into means over the draws: 1 / K
  float momentum = 0;
  PointRule rule = PointRule::sgd;
};
struct BbbArrays {
  float* mean;
  float* rho;
  float* sd;  // kept beside rho, for draws and predictions
  Moments moments;
  float *mean_m, *mean_v, *rho_m, *rho_v;  // the optimizer's moments
};
// With s_k = -d ln P / d theta at theta_k, E the mean over the K draws of the step, and d sd / d rho = sigmoid(rho) =
// 1 - exp(-sd):
//   g_mean = E1 + kl_weight E[s],   g_sd = E2 + kl_weight (E[s e] - 1 / sd),   g_rho = g_sd (1 - exp(-sd)),
// then SGD with momentum or Adam on mean and rho, with the step size states[0].lr_mean; kl_weight is states[0].kl_now.
// For the Gaussian prior E[s] and E[s e] are the exact means over the noise: mean / sd1^2 and sd / sd1^2.
void bbb_update(const BbbArrays&, int count, const BbbSettings&, const StepState* states, Stream);
// rho = ln(exp(sd) - 1), stable for small and large sd, and its inverse. rho may be sd.
void rho_of_sd(float* rho, const float* sd, int count, Stream);
void sd_of_rho(float* sd, const float* rho, int count, Stream);

}  // namespace baton
