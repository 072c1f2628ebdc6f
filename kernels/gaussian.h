// The diagonal Gaussian posterior (FFG) and the point posterior over the flat parameter store. A step of either is one
// pass over the store.
#pragma once
#include <vector>

#include "kernels/softmax_xent.h"
#include "kernels/step_state.h"

namespace baton {

// Every array is [replicas][stride], with the first `count` elements of each row in use. Device memory.
struct GaussianArrays {
  float* mean;
  float* log_std;   // log sigma
  float* variance;  // sigma^2, kept beside it for the products
  const float* prior_mean;
  const float* prior_log_std;
  float* grad_mean;      // d/d mu of the mean cross-entropy
  float* grad_variance;  // d/d sigma^2 of the mean cross-entropy
  float* mean_m;         // Adam's first and second moments
  float* mean_v;
  float* scale_m;
  float* scale_v;  // unused by the natural-gradient rule
  size_t stride;
  int count, replicas;
};

// A run of parameters within one tensor: elements [first, first + count) of every replica. slot: the place of its KL in
// the accumulator. Under multiplicative variables (MNF) element first + i has the z with the number z_first + i / width
// (in a convolution: one for each filter and channel, or for each filter), or z_first + i mod width with `column` (in a
// dense layer: one for each input).
struct Run {
  int first, count, slot;
  int z_first = -1;  // below 0: no z
  int width = 1;
  bool column = false;
};
// The runs cut into pieces of about 2,048 parameters; a block of the kernels takes a piece. A piece of a run with z
// holds all the parameters of each of its z, or whole rows.
std::vector<Run> pieces_of(const std::vector<Run>&);
int slots_of(const std::vector<Run>&);  // one more than the largest slot
struct Pieces {
  const Run* table;  // device memory
  int count, slots;
};

// The KL summed over the steps: sums[stride * r + slot]; stride is at least the pieces' slots.
struct KlAccumulator {
  double* sums;
  size_t stride;
};

// The multiplicative variables of every row q = r * groups + g, and the gradients by the weights z mu of the row:
// z[z_stride * q + ...], grad[grad_stride * q + ...]. z null: there are none.
struct Multipliers {
  const float* z = nullptr;
  const float* grad = nullptr;
  size_t z_stride = 0, grad_stride = 0;
  int groups = 1;
};

// How log sigma moves.
enum class ScaleRule : int {
  adam,     // Adam with a step size of its own (StepState::lr_scale)
  natural,  // log sigma -= lr_scale / 2 * average of d(N_t/beta J)/d log sigma: the natural gradient (the Fisher
            // information of log sigma is 2), whose time scale is 1 / lr_scale steps for any data
};
constexpr float largest_scale_step = 0.1f;  // bound of the natural rule's step of log sigma, against noisy gradients

// One step of J = mean cross-entropy + kl_now KL(q || p) with Adam (Kingma and Ba 2015) for the means, over the pieces:
//   KL = sum [ (exp(2t) - 1 + z^2 e^2) / 2 - t ],  t = log sigma - log sigma_p,  e = (mu - mu_p) / sigma_p
//   dJ/dmu = z grad + kl_now z^2 e / sigma_p;   dJ/d log sigma = 2 sigma^2 grad_variance + kl_now (exp(2t) - 1)
// with z = 1 and grad = grad_mean where a piece has no z; z grad is summed and z^2 averaged over the groups (Kochurov
// et al. 2018, equations 21 and 22, for w | z ~ N(z mu, sigma^2)). The KL before the step is added to the accumulator.
// partial: scratch, a float for each piece and replica. A replica whose loss was not finite (StepState::halted) is left
// as it is.
void gaussian_step(const GaussianArrays&, ScaleRule, Pieces, const StepState*, KlAccumulator, float* partial, Stream,
                   const Multipliers& = {});

// Adds the KL itself to the accumulator, in double. The same scratch. grad and grad_stride of Multipliers are not read.
void gaussian_kl(KlAccumulator, const GaussianArrays&, Pieces, float* partial, Stream, const Multipliers& = {});

// w[w_stride * q + i] = z mean[i] over the pieces that have z, for every row q.
void multiply_weights(float* w, size_t w_stride, const GaussianArrays&, Pieces, const Multipliers&, Stream);
// The runs with z, in parts that hold all the weights of their z, for a block each: about 2,048 neighbouring weights,
// or a strip of at most 64 columns, whose rows begin at run.first and are run.width apart.
struct ZPart {
  Run run;
  int columns;  // of a strip
};
std::vector<ZPart> z_parts_of(const std::vector<Run>&);
struct ZParts {
  const ZPart* table;  // device memory
  int count;
};
// dz[z_stride * q + k] = d data / d z_k + kl_now / groups * d K_w / d z_k for every row q and all the z of the parts:
//   sum over its weights of  mu grad + kl_now / groups * z (mu - mu_p)^2 / sigma_p^2.
void multiplier_gradient(float* dz, const GaussianArrays&, ZParts, const Multipliers&, const StepState*, Stream);

// Draws of a few parameters for every row q = r * groups + g (the biases of layers whose weights are drawn):
//   w[w_stride * q + first + i] = mean + sigma e,  e = the first lane of normal4(noise, g * count + i, stream_id, step)
// and on the way back grad_mean = sum_g grad_w, grad_variance = sum_g grad_w e / (2 sigma) (=, not +=).
void draw_gaussian(float* w, size_t w_stride, const GaussianArrays&, int first, int count, int groups, const StepState*,
                   uint32_t stream_id, Stream);
void draw_gaussian_backward(const GaussianArrays&, const float* grad_w, size_t w_stride, int first, int count,
                            int groups, const StepState*, uint32_t stream_id, Stream);

// Adam on the means alone (fine-tuning).
void point_step(const GaussianArrays&, const StepState*, Stream);

// w[s][i] = mean[mean_stride * s + i] + sqrt(variance[i]) e: `samples` draws [samples][stride] of one replica's
// posterior. Draw s has the number first_sample + s, so draws do not depend on how many are made at once. w may be
// mean.
void sample_weights(float* w, const float* mean, size_t mean_stride, const float* variance, int count, size_t stride,
                    int first_sample, int samples, Key key, Stream);

// x[r][first + i] = sd times the normal of (states[r].noise, stream_init, first + i) for i < count. sd = 0 gives zeros.
void init_normal(float* x, size_t stride, int first, int count, float sd, const StepState*, int replicas, Stream);
// x[r][i] = values[r] for i < count. values: device memory [replicas].
void fill_rows(float* x, size_t stride, int count, const float* values, int replicas, Stream);
// variance = exp(2 log_std).
void variance_of(float* variance, const float* log_std, size_t stride, int count, int replicas, Stream);

}  // namespace baton
