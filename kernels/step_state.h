// The state of a replica that changes from step to step. It is in device memory, where the kernels of a captured step
// read it; advance_step() updates it at the start of every step.
#pragma once
#include "engine/philox.h"

namespace baton {

enum class Schedule : int { constant, linear, cosine, steps };  // of the step sizes over a stage

struct StepState {
  Key noise;             // of the weights' and activations' noise
  Key shuffle;           // of the order of the examples
  uint32_t step;         // steps of the whole run so far: the noise counter, never reset
  int32_t stage;         // 0-based
  int32_t stage_step;    // steps of this stage so far (1 during the first)
  int32_t stage_steps;   // steps that this stage will have
  int32_t steps_before;  // steps of the optimizer before this stage: 0 where its state starts anew
  int32_t part_offset;   // where this stage's part starts in the replica's order of the training set,
  int32_t part_size;     // and how many examples it has (N_t)
  Schedule schedule;
  float base_lr_mean;    // step size of the means at the stage's start
  float base_lr_scale;   // step size of the log standard deviations
  int32_t decay_steps;   // Schedule::steps: after every decay_steps steps of the stage
  float decay;           // the step sizes are multiplied by decay
  float kl_weight;       // beta / N_t, in the objective mean cross-entropy + kl_weight KL
  int32_t warmup_steps;  // the KL's weight grows linearly over this many steps (0: full from the start)
  // Computed by advance_step:
  float lr_mean, lr_scale, kl_now;
  float correction1, correction2;  // Adam's 1 / (1 - beta1^t), 1 / (1 - beta2^t)
  // Set by add_to_totals to the step (of the run) whose loss was not finite, else 0. From then on the replica does not
  // change, so that the host can look for the layer where it began.
  int32_t halted;
};

constexpr float adam_beta1 = 0.9f, adam_beta2 = 0.999f, adam_epsilon = 1e-8f;

// The streams of noise, one for each use. A layer's activations draw from stream `layer`.
enum NoiseStream : uint32_t {
  stream_layers = 0,
  stream_init = 1000,
  stream_weights = 2000,  // of whole draws of the weights
  stream_draws = 2500,    // of the tensors that a step draws: + the tensor's number
  stream_z = 2700,        // of the base of a tensor's multiplicative variables: + the tensor's number
  stream_augment = 3000,
  stream_tasks = 3100,    // which task an example of a mixture belongs to
  stream_dropout = 4000,  // + the layer's number
};

void advance_step(StepState* states, int replicas, Stream);

}  // namespace baton
