// The channel factorized Gaussian (CFG; Kochurov et al. 2018): each block of d weights, the k x k kernel of one filter
// and one input channel, has a posterior of its own,
//   w = mu + L e,   e ~ N(0, I_d),   L [d, d] lower triangular with a positive diagonal,
// and the KL to a prior N(mu_0, L_0 L_0^T) of the same form:
//   KL = 1/2 (|L_0^-1 L|_F^2 + |L_0^-1 (mu - mu_0)|^2 - d) + sum_i (ln L_0,ii - ln L_ii).
//
// A factor is stored packed, row-major: entry (i, j <= i) at i (i + 1) / 2 + j. The diagonal holds ln L_ii, and the
// entries below it are the ratios L_ij / L_ii, so that a step of the optimizer has the same effect on wide and narrow
// rows. `packed(d)` = d (d + 1) / 2.
#pragma once
#include "kernels/softmax_xent.h"
#include "kernels/step_state.h"

namespace baton {

__host__ __device__ constexpr int packed(int d) { return d * (d + 1) / 2; }
constexpr int largest_block = 49;  // a 7 x 7 kernel

// One convolution's weights. Pointers are at the tensor: element i of block b of replica r is mean[stride * r + b * d +
// i], entry k of its factor is factor[factor_stride * r + b * packed(d) + k]. Device memory.
struct CholeskyArrays {
  float* mean;
  const float* prior_mean;
  float *mean_m, *mean_v;  // Adam's moments
  size_t stride;
  float* factor;
  const float* prior_factor;   // as factor
  const float* prior_inverse;  // L_0^-1, packed, without logarithms and ratios
  float *factor_m, *factor_v;
  size_t factor_stride;
  int blocks, d, replicas;
};

// Draws: w[w_stride * q + b * d + i] for row q = r * groups + g. e_i of block b is lane i mod 4 of
// normal4(states[r].noise, (g * blocks + b) * ceil(d / 4) + i / 4, stream_id, states[r].step).
void cholesky_sample(float* w, size_t w_stride, const CholeskyArrays&, int groups, const StepState*, uint32_t stream_id,
                     Stream);
// The same for predictions: `samples` draws of one replica. Row s has the draw's number first_sample + s in place of
// the step, group 0 and the given key, so draws do not depend on how many are made at once.
void cholesky_sample_draws(float* w, size_t w_stride, const float* mean, const float* factor, int blocks, int d,
                           int first_sample, int samples, Key, uint32_t stream_id, Stream);

// One Adam step (step sizes lr_mean for the mean, lr_scale for the factor) of J = data + kl_now KL, from
// grad_w[w_stride * q + ...] = d data / d w of the draws that cholesky_sample made in the same step (e drawn again):
//   d data/d mu = sum_g grad_w,  d data/d L = sum_g tril(grad_w e^T),  plus kl_now times
//   dKL/dmu = S_0^-1 (mu - mu_0),  dKL/dL = tril(S_0^-1 L) - diag(1 / L_ii).
// The KL before the step is added to kl[kl_stride * r] (+=). partial: scratch, [replicas][blocks]. A replica whose loss
// was not finite (StepState::halted) is left as it is.
// extra_factor_grad (in the layout and the stored coordinates of factor) is added to d data/d factor, and
// extra_mean_grad (in the layout of mean) to d data/d mu: the gradients that cholesky_moments.h computes. Either may be
// null. grad_w may be null; then there are no others.
void cholesky_step(const CholeskyArrays&, const float* grad_w, size_t w_stride, int groups, uint32_t stream_id,
                   const float* extra_mean_grad, const float* extra_factor_grad, const StepState*, double* kl,
                   size_t kl_stride, float* partial, Stream);

// The KL alone: kl[kl_stride * r] = KL. The same scratch. Where posterior and prior are the same it is 0 but for the
// rounding of off-diagonal terms (less than 1e-6 nats for a network).
void cholesky_kl(double* kl, size_t kl_stride, const CholeskyArrays&, float* partial, Stream);

// inverse = L^-1 (packed, without logarithms and ratios) from a stored factor, computed in double. For once a stage.
// inverse may not be factor.
void cholesky_invert(float* inverse, const float* factor, size_t factor_stride, int blocks, int d, int replicas,
                     Stream);
// factor = sigma I: the diagonal exp(log_std[sd_stride * r + b * d + i]), nothing below it.
void cholesky_from_diagonal(float* factor, size_t factor_stride, const float* log_std, size_t sd_stride, int blocks,
                            int d, int replicas, Stream);
// The marginal standard deviations: log_std[...] = ln sqrt(sum_j L_ij^2).
void cholesky_marginals(float* log_std, size_t sd_stride, const float* factor, size_t factor_stride, int blocks, int d,
                        int replicas, Stream);

}  // namespace baton
