// How the weights of a network are held, drawn, moved and handed on: one class a method, over the flat store. A step is
//   for each pass over some of the draws:  draw, the network's forward and backward pass      then  step.
// The registry at the end names every kind; how to add one: layers/README.md.
#pragma once
#include <functional>
#include <span>
#include <utility>

#include "engine/io/schema.h"
#include "layers/estimators.h"

namespace baton {

struct TensorFile;
struct PosteriorKind;

// An array of a store that a checkpoint must hold for training to go on bit for bit.
struct StateArray {
  enum class Role {
    believed,   // a model's file holds it too
    optimizer,  // 0 where the optimizer starts anew
    other,      // for instance what can be computed from others
  };
  ParameterStore* store;
  std::string array;
  Role role = Role::believed;
  bool believed() const { return role == Role::believed; }
};

using Figures = std::vector<std::pair<std::string, double>>;  // named numbers for logs

// The mean diagonal Fisher information of the first `examples` of the stage that ends, in the layout of the store.
using FisherInformation = std::function<std::vector<float>(int examples)>;

// Some of the networks that train side by side: `count` from `first` on.
struct Replicas {
  int first, count;
};

// What a posterior is built with.
struct PosteriorSetup {
  Device& device;
  Arena& arena;
  const ParameterLayout& layout;
  const PosteriorKind& kind;
  std::vector<json> settings;  // one a replica, each complete by the kind's schema
  bool masked = false;         // some weights are pruned: they are 0 and stay so
};

class Posterior : public WeightSource {
 public:
  const PosteriorKind& kind() const { return kind_; }
  const json& settings(int replica = 0) const { return settings_[size_t(replica)]; }
  bool masked() const { return masked_; }
  int replicas() const { return int(settings_.size()); }
  virtual int draws() const { return 1; }          // of the weights, a step (K)
  virtual int draws_at_once() const { return 1; }  // rows of a pass for each replica; divides draws()
  virtual bool uncertain() const { return true; }  // false: a point estimate, which has no draws
  // What multiplies an example's gradient of the cross-entropy: 1 for the batch's sum, 1 / batch for its mean.
  virtual float loss_scale(int batch) const { return 1.f / float(batch); }
  // The step size of the means at a stage's start.
  virtual double step_size(int replica = 0) const { return settings(replica)["lr"]; }
  // What multiplies the KL to the prior in the objective, for a stage of `examples`.
  virtual double kl_weight(int /*replica*/, int /*examples*/, int /*batch*/) const { return 0; }
  // For the network that trains with this posterior: its passes have replicas() * draws_at_once() rows.
  LayerContext training_context(int batch);

  // First weights and prior. states: [replicas].
  virtual void initialise(const StepState* states) = 0;
  // A pretrained tensor of one replica: its mean is w, its prior N(w, exp(prior_log_std)^2) (one value, or one a
  // weight), and sigma no wider than the prior; a point estimate takes the mean alone. settle() follows the last one.
  virtual void adopt(int replica, const TensorSpec&, std::span<const float> w, std::span<const float> prior_log_std);
  virtual void settle() { refresh(true); }

  // A stage of these replicas begins: their posterior is handed on as the prior, unless it is the first stage of all.
  // Returns whether the optimizer starts anew.
  virtual bool begin_stage(bool first, Replicas) = 0;
  bool begin_stage(bool first) { return begin_stage(first, all()); }
  // A stage has ended; its examples are still there.
  virtual void end_stage(const FisherInformation&) {}
  // Gradients that the network will no longer write are 0 from here on: it has taken another head.
  virtual void clear_gradients() {}
  void reset_optimizer(Replicas);
  void reset_optimizer() { reset_optimizer(all()); }

  // The weights of a pass: draws first_draw, first_draw + 1, ... of the step. states: [rows of a pass].
  virtual void draw(int /*first_draw*/, const StepState*) {}
  virtual void step(StepState* states) = 0;

  // Where the KL is accumulated: every tensor, and what else the kind has; empty for a kind without a KL.
  virtual std::vector<std::string> kl_names() const { return {}; }
  // KL of every replica to its prior by kl_names(), nats.
  virtual std::vector<std::vector<double>> kl_by_name() { return std::vector<std::vector<double>>(replicas()); }
  std::vector<double> kl();  // summed over the names
  // The sums of the KL over these replicas' steps since the last call, by replica and name.
  virtual std::vector<std::vector<double>> take_accumulated_kl(Replicas of) {
    return std::vector<std::vector<double>>(size_t(of.count));
  }
  std::vector<std::vector<double>> take_accumulated_kl() { return take_accumulated_kl(all()); }
  // The sums themselves, [replicas][names], for a checkpoint; and put back where it is restored.
  virtual std::vector<double> accumulated_kl() { return {}; }
  virtual void set_accumulated_kl(const std::vector<double>&) {}
  // Mean ln sigma over all parameters of every replica; empty for a kind that does not report it.
  virtual std::vector<double> mean_log_std() { return {}; }

  // What went wrong or may go wrong, of what the device has noted since the last call: a warning (once), or a
  // RunError's text. Empty: nothing. lr: the step size of the means.
  virtual std::string warning(int /*batch*/, double /*lr*/) { return {}; }
  virtual std::string failure(int /*batch*/, double /*lr*/) { return {}; }
  virtual Figures figures() { return {}; }  // of the newest step
  // What warning() and failure() have to remember, and what else state() does not tell, for a checkpoint; empty:
  // nothing.
  virtual std::vector<uint8_t> notes() { return {}; }
  virtual void set_notes(const std::vector<uint8_t>&) {}
  // How sigma is distributed at the end, for results; null: not of interest. histogram: with bins.
  virtual json describe_sigma(bool /*histogram*/) { return json(); }

  // `count` draws of a replica's weights into w [count][stride], numbered from `first`: they do not depend on how many
  // are made at once.
  virtual void sample(float* w, int replica, int first, int count, Key) = 0;
  // The weights at the posterior mean into w [stride].
  virtual void mean_weights(float* w, int replica);
  // A tensor of one replica on the host: ln sigma (marginal, given what else is random), and which weights are pruned.
  // Empty: there is none.
  virtual std::vector<float> read_log_std(int /*replica*/, const TensorSpec&) { return {}; }
  std::vector<uint8_t> read_pruned(const TensorSpec&) const;

  ParameterStore& store() { return store_; }
  const ParameterStore& store() const { return store_; }
  const std::vector<StateArray>& state() const { return state_; }
  // What is believed, of the first replica, as tensors "conv1.weight.mean", ".log_std", ".prior_mean",
  // ".prior_log_std" and the kind's own, ".mask" (bytes) where weights are pruned: everything but the optimizer and
  // what can be computed. load() takes it back; InputError for what is missing or of another shape, and then nothing
  // has changed.
  virtual void save(TensorFile&) const;
  virtual void load(const TensorFile&, bool first_stage);
  // Prunes: `pruned` over all tensors in the layout's order, without gaps. InputError unless masked().
  void mask(const std::vector<uint8_t>& pruned);
  // Recomputes what is derived after the arrays of a model were written. first_stage: nothing has been handed on yet.
  virtual void refresh(bool first_stage) { restored(first_stage); }
  // The same after all of state() was: what they hold stays bit for bit.
  virtual void restored(bool /*first_stage*/) { apply_mask(); }

 protected:
  explicit Posterior(const PosteriorSetup&);
  using Role = StateArray::Role;
  float* add_state(const std::string& array, Role = Role::believed, ParameterStore* = nullptr);  // null: store()
  void add_mask();                                                            // "mask", 1 everywhere; where masked()
  static std::vector<float> read_mask(const TensorFile&, const TensorSpec&);  // 1 where a weight is kept, 0 elsewhere
  virtual void apply_mask() {}
  int stride() const { return int(store_.layout().stride()); }
  Replicas all() const { return {0, replicas()}; }
  void copy_rows(const ParameterStore&, const char* to, const char* from, Replicas);
  // Weights N(0, 2 / (fan_in + fan_out)) (Glorot and Bengio 2010). Biases: 0; or, drawn, as the authors of Bayesian
  // gradient descent draw them: N(0, 2 / (1 + k k out)), kernels of k x k (1 for dense).
  void initialise_glorot(float* mean, bool draw_biases, const StepState*);
  // Weights N(0, 2 / fan_in) (He et al. 2015), biases 0, for every replica.
  void initialise_he(float* mean, const StepState*);

  Device& device_;
  Arena& arena_;
  const PosteriorKind& kind_;
  std::vector<json> settings_;
  bool masked_;
  ParameterStore store_;
  std::vector<StateArray> state_;
};

struct PosteriorKind {
  const char* name;
  const char* summary;  // "ffg, fully factorized Gaussian: ..."
  Schema options;
  std::unique_ptr<Posterior> (*make)(const PosteriorSetup&);  // make_kind of the kind's class
  bool many_replicas = true;                                  // networks can train side by side
  bool prunable = true;                                       // a model of this kind can have a mask
  bool pruned_in_runs = true;                                 // an experiment prunes it: its sigma is an array, "std"
};
template <class P>
std::unique_ptr<Posterior> make_kind(const PosteriorSetup& setup) {
  return std::make_unique<P>(setup);
}

const std::vector<const PosteriorKind*>& posterior_kinds();
// InputError for an unknown name: it lists those that there are.
const PosteriorKind& find_posterior(const std::string& name);
// settings: one a replica, options that differ from the standard; they may differ where the option is by_replica.
std::unique_ptr<Posterior> make_posterior(Device&, Arena&, const ParameterLayout&, const std::string& kind,
                                          const std::vector<json>& settings = {json::object()}, bool masked = false);
// Of settings, complete or not, what networks must have in common to train side by side.
json common_settings(const PosteriorKind&, const json& settings);
// What every kind has: a step size and its schedule over a stage, before its own options.
Schema with_schedule(double step_size, std::string help, Schema options, std::string name = "lr");

}  // namespace baton
