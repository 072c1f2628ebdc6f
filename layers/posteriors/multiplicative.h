// What MNF adds to a posterior: multiplicative variables z for every weight tensor, one for each filter and input
// channel of a convolution (or for each filter) and one for each input of a dense layer, and the normalizing flow that
// makes them (kernels/flow.h). The bound is joint in w and z (Kochurov et al. 2018, appendix C):
//   KL = E_z [ K_w(z) + ln q(z) - ln q~(z) ],   K_w(z) = sum ln(s~/s) + (s^2 + z^2 (mu - mu~)^2) / (2 s~^2) - 1/2
// with ln q~(z) through the inverse of the previous flow. One z a step and group of examples; the same z serves the
// data term and the KL. The first stage's prior of z is N(1, 1): z near 1 pins the scale that z and mu share.
#pragma once
#include "engine/store.h"
#include "layers/posteriors/posterior.h"

namespace baton {

class Multiplicative {
 public:
  Multiplicative(Device&, Arena&, ParameterStore& store, const PosteriorOptions&);
  std::vector<StateArray> state_arrays();
  std::vector<std::string> kl_names() const;  // "conv1.z", ...
  // The runs of the flat store with their z: weights have one, biases none.
  std::vector<Run> runs() const { return runs_; }

  void initialise(const StepState*);
  void hand_over();
  void reset_optimizer();
  void refresh(bool first_stage);

  // z, its densities, and the weights z mu into draws.
  void draw(float* draws, const GaussianArrays&, Pieces, const StepState*);
  Multipliers multipliers(const float* draw_gradients) const;
  // From the draws' gradients: the gradients of the flows, before the means move; then the step of the flows.
  void backward(const float* draw_gradients, const GaussianArrays&, const StepState*, KlAccumulator, int first_slot);
  void step(const StepState*);

  // Draws of one replica, `count` at most most_draws: z, and the weights z mu into w [count][stride].
  static constexpr int most_draws = 16;
  void sample(float* w, const GaussianArrays& of_replica, Pieces, int replica, bool noise, int first, int count, Key);
  // The KL of one replica over 8 draws of z.
  void kl(KlAccumulator replicas_own, const GaussianArrays& of_replica, Pieces, int replica, int first_slot,
          float* partial);

 private:
  FlowParameters parameters(const char* array, int replica = 0) const;
  GaussianArrays adam_arrays() const;
  Device& device_;
  ParameterStore& store_;
  PosteriorOptions options_;
  std::vector<Run> runs_;
  std::vector<std::string> names_;
  std::vector<FlowTensor> table_;
  ParameterLayout layout_;  // of flows_
  std::unique_ptr<ParameterStore> flows_;
  FlowShape shape_{};
  float *z0_, *z_, *dz_, *prior_z0_, *own_z0_, *partial_;
  double *log_q_, *log_prior_, *own_log_q_;
  int32_t* plain_prior_;  // [replicas], 1 until the first hand-over: the prior of z is its base alone
  FlowTrace trace_{}, prior_trace_{}, own_trace_{};
  float *sample_z0_, *sample_z_;
  double *sample_log_q_, *sample_log_prior_;
  FlowTrace sample_trace_{}, sample_prior_trace_{};
};

}  // namespace baton
