// Updates every replica's StepState for the next step. A thread takes a replica; it is the first node of a captured
// step.
//
//   t = steps of this stage so far, s = steps that it will have, p = (t - 1) / s in [0, 1)
//   step size = base * factor, where factor is
//     constant  1
//     linear    1 - p
//     cosine    (1 + cos(pi p)) / 2
//     steps     decay^floor((t - 1) / n)
//   Adam's corrections are 1 / (1 - beta^t): t starts anew with every stage, as the optimizer's state is reset before
//   each stage (Kochurov et al. 2018, section 5), unless steps_before is not 0 and the optimizer goes on.
#include "kernels/step_state.h"

namespace baton {

namespace {

// (1 + cos(pi p)) / 2 = cos^2(pi p / 2) for p in [0, 1], by Taylor's series: cosf's slow path would need a stack.
__device__ __forceinline__ float half_cosine(float p) {
  const float x = 1.57079633f * p, t = x * x;
  const float c = 1.f + t * (-0.5f + t * (1.f / 24 + t * (-1.f / 720 + t * (1.f / 40320 + t * (-1.f / 3628800)))));
  return c * c;
}

__global__ void advance_step_kernel(StepState* __restrict__ states, int replicas) {
  const int r = simt::thread_item();
  if (r >= replicas) return;
  StepState s = states[r];
  if (s.halted) return;
  s.step++;
  s.stage_step++;
  const float progress = float(s.stage_step - 1) / float(s.stage_steps);
  float factor = 1.f;
  if (s.schedule == Schedule::linear) factor = 1.f - progress;
  if (s.schedule == Schedule::cosine) factor = half_cosine(progress);
  if (s.schedule == Schedule::steps && s.decay_steps > 0)
    for (int passed = (s.stage_step - 1) / s.decay_steps; passed > 0; passed--) factor *= s.decay;
  s.lr_mean = s.base_lr_mean * factor;
  s.lr_scale = s.base_lr_scale * factor;
  const float warm = s.warmup_steps > 0 ? fminf(1.f, float(s.stage_step) / float(s.warmup_steps)) : 1.f;
  s.kl_now = s.kl_weight * warm;
  const float t = float(s.steps_before + s.stage_step);
  s.correction1 = 1.f / (1.f - powf(adam_beta1, t));
  s.correction2 = 1.f / (1.f - powf(adam_beta2, t));
  states[r] = s;
}

}  // namespace

void advance_step(StepState* states, int replicas, Stream stream) {
  BATON_RANGE("advance_step");
  simt::launch<advance_step_kernel>(simt::each(replicas), stream, states, replicas);
}

}  // namespace baton
