// The diagonal Gaussian posterior (FFG) and the point posterior over the flat parameter store: one pass a step each.
#pragma once
#include "kernels/softmax_xent.h"
#include "kernels/step_state.h"

namespace baton {

// Every array is [replicas][stride], its first `count` elements of each replica in use. Device memory.
struct GaussianArrays {
  float* mean;
  float* log_sd;    // log sigma
  float* variance;  // sigma^2, kept beside it for the products
  const float* prior_mean;
  const float* prior_log_sd;
  float* grad_mean;      // d/d mu of the mean cross-entropy
  float* grad_variance;  // d/d sigma^2 of the mean cross-entropy
  float* mean_m;         // Adam's first and second moments
  float* mean_v;
  float* scale_m;
  float* scale_v;  // unused by the natural-gradient rule
  size_t stride;
  int count, replicas;
};

// How log sigma moves.
enum class ScaleRule : int {
  adam,     // Adam with a step size of its own (StepState::lr_scale)
  natural,  // log sigma -= lr_scale / 2 * average of d(N_t/beta J)/d log sigma: the natural gradient (the Fisher
            // information of log sigma is 2), whose time scale is 1 / lr_scale steps whatever the data say
};
constexpr float largest_scale_step = 0.1f;  // of the natural rule, in log sigma: a noisy gradient must not explode it

// One step of J = mean cross-entropy + kl_now KL(q || p) with Adam (Kingma and Ba 2015) for the means:
//   KL = sum [ (exp(2t) - 1 + e^2) / 2 - t ],  t = log sigma - log sigma_p,  e = (mu - mu_p) / sigma_p
//   dJ/dmu = grad_mean + kl_now e / sigma_p;   dJ/d log sigma = 2 sigma^2 grad_variance + kl_now (exp(2t) - 1)
// The KL before the step is added to totals[r].kl. partial: scratch of gaussian_partials(count) floats a replica.
void gaussian_step(const GaussianArrays&, ScaleRule, const StepState*, Totals* totals, float* partial, Stream);
int gaussian_partials(int count);

// KL(q || p) of every replica, in double: kl[r]. The same scratch.
void gaussian_kl(double* kl, const GaussianArrays&, float* partial, Stream);

// Adam on the means alone (fine-tuning).
void point_step(const GaussianArrays&, const StepState*, Stream);

// w[s][i] = mean[i] + sqrt(variance[i]) e: `samples` draws [samples][stride] of replica 0's posterior. The draws are
// counted on from `first_sample`, so they do not depend on how many are made at once.
void sample_weights(float* w, const float* mean, const float* variance, int count, size_t stride, int first_sample,
                    int samples, Key key, Stream);

// x[r][first .. first + count) = sd times normal noise of (states[r].noise, stream_init, first + i); sd = 0 clears.
void init_normal(float* x, size_t stride, int first, int count, float sd, const StepState*, int replicas, Stream);
// x[r][i] = values[r] for i < count. values: device memory [replicas].
void fill_rows(float* x, size_t stride, int count, const float* values, int replicas, Stream);
// variance = exp(2 log_sd).
void variance_of(float* variance, const float* log_sd, size_t stride, int count, int replicas, Stream);

}  // namespace baton
