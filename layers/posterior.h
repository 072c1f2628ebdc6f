// What is believed about the weights: a point estimate (fine-tuning) or a fully factorized Gaussian (FFG), over the
// flat store, with the prior that it answers to. Handing a posterior on as the next prior is one copy of two arrays.
#pragma once
#include "engine/store.h"
#include "kernels/gaussian.h"
#include "layers/layer.h"

namespace baton {

enum class Family { point, gaussian };
const char* name_of(Family);  // "ft", "ffg"

class Posterior {
 public:
  Posterior(Device&, Arena&, const ParameterLayout&, Family, int replicas);

  // Weight means N(0, 2 / fan_in) (He et al. 2015), biases 0, sigma = exp(log_sd[r]), prior N(0, prior_sd[r]^2).
  void initialise(const StepState* states, const std::vector<float>& log_sd, const std::vector<float>& prior_sd);
  // The stage's end: prior = posterior, and the optimizer's moments start anew (Algorithm 1 of Kochurov et al.).
  void hand_over();
  void reset_optimizer();
  // One optimizer step from the gradients; the KL before it is added to totals.
  void step(ScaleRule, const StepState*, Totals*);
  std::vector<double> kl();           // of every replica to its prior; nats; 0 for a point posterior
  std::vector<double> mean_log_sd();  // over all parameters, of every replica

  WeightsView weights() const;
  GradientsView gradients() const;
  Family family() const { return family_; }
  int replicas() const { return store_.replicas(); }
  ParameterStore& store() { return store_; }
  const ParameterStore& store() const { return store_; }
  // The arrays that a checkpoint must hold for training to go on bit for bit.
  const std::vector<std::string>& state_arrays() const { return state_arrays_; }
  void refresh();  // recomputes what is derived (variances) after arrays were written from a checkpoint

 private:
  GaussianArrays arrays() const;
  Device& device_;
  Family family_;
  ParameterStore store_;
  std::vector<std::string> state_arrays_;
  float* partial_ = nullptr;
  float* values_ = nullptr;  // [replicas]
  double* kl_ = nullptr;     // [replicas]
};

}  // namespace baton
