// What is believed about the weights, over the flat store, with the prior that it answers to:
//   ft   a point estimate (fine-tuning)
//   ffg  fully factorized Gaussian
//   cfg  Gaussian with a Cholesky factor for each filter and channel of a convolution
//   (layers/posteriors/channel_blocks.h); dense
//        layers, whose "kernels" are 1x1, and biases are FFG
//   mnf  w = z mu + sigma e with multiplicative variables z from a normalizing flow
//   (layers/posteriors/multiplicative.h)
// Handing a posterior on as the next prior copies everything that describes it.
#pragma once
#include <memory>
#include <span>

#include "engine/store.h"
#include "kernels/flow.h"
#include "kernels/gaussian.h"
#include "layers/layer.h"

namespace baton {

struct TensorFile;
class ChannelBlocks;
class Multiplicative;

enum class Family { point, gaussian, channel, multiplicative };
const char* name_of(Family);  // "ft", "ffg", "cfg", "mnf"

struct PosteriorOptions {
  PosteriorOptions(Family f = Family::gaussian) : family(f) {}
  Family family;
  int groups = 1;  // CFG, MNF: groups of a batch that draw their own weights, or z, to lower the gradient's variance
  bool moments = false;  // CFG: local reparameterization from the exact marginal moments instead of draws
  // MNF:
  FlowKind flow = FlowKind::gated;
  int flow_steps = 2, flow_hidden = 50;
  bool z_per_filter = false;  // of convolutions (Louizos and Welling 2017), instead of per filter and channel
  bool fixed_base = false;
  bool path_gradient = false;       // drop the score term of ln q(z), whose mean is 0 (Roeder et al. 2017)
  float z_log_std = -2.302585093f;  // initial ln of the base's standard deviation
  // Some weights are pruned: mean and sigma are 0 there and stay so (not for CFG, whose kernels' weights are tied).
  bool masked = false;
};

// An array of a store that a checkpoint must hold for training to go on bit for bit.
struct StateArray {
  ParameterStore* store;
  std::string array;
};

class Posterior {
 public:
  Posterior(Device&, Arena&, const ParameterLayout&, const PosteriorOptions&, int replicas);
  ~Posterior();

  // Weight means N(0, 2 / fan_in) (He et al. 2015), biases 0, sigma = exp(log_std[r]), prior N(0, prior_sd[r]^2); under
  // MNF z is near 1 and its prior N(1, 1).
  void initialise(const StepState* states, const std::vector<float>& log_std, const std::vector<float>& prior_sd);
  // A pretrained tensor of one replica: its mean is w, its prior N(w, exp(prior_log_std)^2) (one value, or one a
  // weight), and sigma no wider than the prior. A point posterior takes the mean alone. settle() follows the last one.
  void adopt(int replica, const TensorSpec&, std::span<const float> w, std::span<const float> prior_log_std);
  void settle();
  // The stage's end: prior = posterior, and the optimizer's moments start anew (Algorithm 1 of Kochurov et al.).
  void hand_over();
  void reset_optimizer();

  // The step's draws, where the family has any: before the forward pass.
  void draw(const StepState*);
  // One optimizer step from the gradients; the KL before it is booked.
  void step(ScaleRule, const StepState*);

  // Where the KL is booked: every tensor, and every tensor's z.
  const std::vector<std::string>& kl_names() const { return kl_names_; }
  // KL of every replica to its prior, by kl_names(); nats; zeros for a point posterior. Under MNF the mean over 8 draws
  // of z.
  std::vector<std::vector<double>> kl_by_name();
  std::vector<double> kl();  // summed over the names
  // The booked sums over the steps since the last call, by replica and name.
  std::vector<std::vector<double>> take_booked_kl();
  // The booked sums themselves, as they are, [replicas][names]; and put back where a checkpoint is restored.
  std::vector<double> booked_sums();
  void book(const std::vector<double>&);
  std::vector<double> mean_log_std();  // over all parameters, of every replica; marginal under CFG

  WeightsView weights() const;
  GradientsView gradients() const;
  LayerContext context(int batch);  // for the network that trains with this posterior

  // `count` draws of a replica's weights into w [count][stride], numbered from `first`: they do not depend on how many
  // are made at once.
  void sample(float* w, int replica, int first, int count, Key);
  // The weights at the posterior mean (under MNF with z at the flow's image of its base's mean) into w [stride].
  void mean_weights(float* w, int replica);

  Family family() const { return options_.family; }
  const PosteriorOptions& options() const { return options_; }
  int replicas() const { return store_.replicas(); }
  ParameterStore& store() { return store_; }
  const ParameterStore& store() const { return store_; }
  const std::vector<StateArray>& state_arrays() const { return state_arrays_; }
  // What is believed, of the first replica, as tensors "conv1.weight.mean", ".log_std", ".prior_mean",
  // ".prior_log_std" and the family's own, ".mask" (bytes) where weights are pruned: everything but the optimizer and
  // what can be computed. load() takes it back; InputError for what is missing or of another shape, and then nothing
  // has changed.
  void save(TensorFile&) const;
  void load(const TensorFile&, bool first_stage);
  // Prunes: `pruned` over all tensors in the layout's order, without gaps. InputError unless options().masked.
  void mask(const std::vector<uint8_t>& pruned);
  // Recomputes what is derived after means and scales were written. first_stage: no hand-over has happened.
  void refresh(bool first_stage);
  // The same after all of state_arrays() were: what they hold stays bit for bit.
  void restored(bool first_stage);

 private:
  bool gaussian() const { return options_.family != Family::point; }
  GaussianArrays arrays() const;
  void add_state(const char* name);
  void apply_mask();
  void sample_all(float* w, int replica, int first, int count, Key);
  Device& device_;
  Arena& arena_;
  PosteriorOptions options_;
  ParameterStore store_;
  std::vector<StateArray> state_arrays_;
  std::vector<std::string> kl_names_;
  std::unique_ptr<ChannelBlocks> channels_;
  std::unique_ptr<Multiplicative> multipliers_;
  std::vector<Run> runs_;  // what gaussian_step covers: all tensors but those that have blocks
  Pieces pieces_{};
  KlAccumulator accumulator_{}, kl_{};
  float* draw_ = nullptr;  // [replicas * groups][stride]
  float* draw_grad_ = nullptr;
  float* partial_ = nullptr;
  float* values_ = nullptr;  // [replicas]
};

}  // namespace baton
