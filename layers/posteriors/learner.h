// How a network's weights are held and moved by one of the methods that learn tasks one after the other: Bayesian
// gradient descent, Bayes by Backprop, and point estimates (SGD, Adam, Synaptic Intelligence, EWC). A step is
//   for each pass over some of the draws:  draw, forward, backward    then  step.
#pragma once
#include <string>
#include <utility>
#include <vector>

#include "kernels/baselines.h"
#include "layers/layer.h"

namespace baton {

using Figures = std::vector<std::pair<std::string, double>>;  // named numbers for logs

class Learner {
 public:
  virtual ~Learner() = default;
  virtual const char* method() const = 0;
  virtual int draws() const { return 1; }          // of the weights, a step
  virtual int draws_at_once() const { return 1; }  // replicas of the network in a pass; divides draws()
  // What multiplies an example's gradient of the cross-entropy: 1 for the batch's sum, 1 / batch for its mean.
  virtual float loss_scale(int batch) const = 0;
  LayerContext context(int batch) const {
    LayerContext c{device_, arena_, draws_at_once(), batch, false, true};
    c.moments = draws_are_made();
    return c;
  }

  virtual void initialise(const StepState*) = 0;
  virtual void draw(int /*first_draw*/, const StepState*) {}  // the weights of a pass, before its forward pass
  virtual WeightsView weights() const = 0;
  virtual GradientsView gradients(int first_draw) = 0;
  virtual void step(StepState*) = 0;  // states: one a replica of a pass, alike
  // Gradients that the network will no longer write are 0 from here on.
  virtual void head_changed() {}
  virtual void restart_optimizer() {}

  // What went wrong or may go wrong, of what the device has noted since the last call: a warning (once), or a
  // RunError's text. Empty: nothing.
  virtual std::string warning(int /*batch*/) { return {}; }
  virtual std::string failure(int /*batch*/) { return {}; }
  virtual Figures figures() { return {}; }  // of the newest step
  // What warning() and failure() have to remember, for a checkpoint; empty: nothing.
  virtual std::vector<uint8_t> noted() { return {}; }
  virtual void note(const std::vector<uint8_t>&) {}

  // For predictions: draws of the weights, numbered from `first`, and the weights at the mean. [count][stride]
  virtual bool uncertain() const { return draws_are_made(); }
  virtual void sample(float* /*w*/, int /*first*/, int /*count*/, Key) {
    throw InputError("a point estimate has no draws");
  }
  virtual void mean_weights(float* w) = 0;

  // The arrays that pruning works on; sd null for point estimates.
  virtual float* means() = 0;
  virtual float* deviations() { return nullptr; }

  ParameterStore& store() { return store_; }
  const ParameterStore& store() const { return store_; }
  const std::vector<std::string>& state_arrays() const { return state_arrays_; }

 protected:
  Learner(Device& device, Arena& arena, const ParameterLayout& layout)
      : device_(device), arena_(arena), store_(arena, layout, 1) {}
  virtual bool draws_are_made() const { return false; }
  float* state(const std::string& name) {
    state_arrays_.push_back(name);
    return store_.add(name);
  }
  // Weights N(0, 2 / (fan_in + fan_out)) (Glorot and Bengio 2010). Biases: 0; or, drawn, as the authors of Bayesian
  // gradient descent draw them: N(0, 2 / (1 + k k out)), kernels of k x k (1 for dense).
  void initialise_weights(float* mean, bool draw_biases, const StepState*);
  int count() const { return int(store_.layout().stride()); }

  Device& device_;
  Arena& arena_;
  ParameterStore store_;
  std::vector<std::string> state_arrays_;
};

// ---- what the two that draw their weights share: a mean and a standard deviation of every weight, K draws of all of
// them a step in passes of some side by side, and the moments of the draws' gradients.
class DrawnLearner : public Learner {
 public:
  int draws() const override { return draws_; }
  int draws_at_once() const override { return at_once_; }
  float loss_scale(int) const override { return 1.f; }
  void draw(int first_draw, const StepState*) override;
  WeightsView weights() const override { return {drawn_, nullptr, store_.layout().stride()}; }
  GradientsView gradients(int first_draw) override;
  void head_changed() override;
  void sample(float* w, int first, int count, Key) override;
  void mean_weights(float* w) override;
  float* means() override { return mean_; }
  float* deviations() override { return sd_; }

 protected:
  // at_once: replicas of a pass, 0 for all draws at once. InputError unless it divides draws, and sigma is positive.
  DrawnLearner(Device&, Arena&, const ParameterLayout&, int draws, int at_once, double sigma);
  bool draws_are_made() const override { return true; }

  int draws_, at_once_;
  float *mean_, *sd_, *drawn_;
  Moments moments_;
};

// ---- Bayesian gradient descent (kernels/bgd.h)
struct BgdSettings {
  int draws = 10;       // K
  int at_once = 0;      // replicas of a pass; 0: what suits the device; K must be a multiple
  double sigma = 0.05;  // initial sd of every weight and bias
  double eta = 1;       // for messages: the steps read StepState's
  double clamp = 0, least_ratio = 0, largest_ratio = 0;  // of the gradients' moments; of sigma to its initial value
  double warn_ratio = 10, halt_ratio = 100;
};

class BgdLearner : public DrawnLearner {
 public:
  BgdLearner(Device&, Arena&, const ParameterLayout&, const BgdSettings&);
  const char* method() const override { return "bgd"; }
  void initialise(const StepState*) override;
  void step(StepState*) override;
  std::string warning(int batch) override;
  std::string failure(int batch) override;
  Figures figures() override;
  std::vector<uint8_t> noted() override;
  void note(const std::vector<uint8_t>&) override;

  const BgdSettings& settings() const { return settings_; }
  SigmaStatistics statistics();  // of the standard deviations as they are
  TripWire trip_wire();

 private:
  std::string cause(int batch) const;
  BgdSettings settings_;
  float* partial_;
  SigmaStatistics* statistics_;
  TripWire* wire_;
  bool warned_ = false;
};

// ---- Bayes by Backprop (kernels/baselines.h)
struct BbbSetup {
  BbbSettings rule;
  int at_once = 0;
  double sigma = 0.05;
};

class BbbLearner : public DrawnLearner {
 public:
  BbbLearner(Device&, Arena&, const ParameterLayout&, const BbbSetup&);
  const char* method() const override { return "bbb"; }
  void initialise(const StepState*) override;
  void step(StepState*) override;
  void restart_optimizer() override;

 private:
  BbbSetup setup_;
  BbbArrays arrays_{};
};

// ---- point estimates
enum class Anchor { none, path, fisher };  // SGD or Adam alone, Synaptic Intelligence, EWC
struct PointSetup {
  PointSettings rule;
  Anchor anchor = Anchor::none;
  double xi = 0.1;          // Synaptic Intelligence's damping
  double fisher_decay = 1;  // EWC: what an older task's Fisher information keeps; 1: the exact sum of penalties
};

class PointLearner : public Learner {
 public:
  PointLearner(Device&, Arena&, const ParameterLayout&, const PointSetup&);
  const char* method() const override;
  float loss_scale(int batch) const override { return 1.f / float(batch); }
  void initialise(const StepState*) override;
  WeightsView weights() const override { return {arrays_.weights, nullptr, store_.layout().stride()}; }
  GradientsView gradients(int) override;
  void step(StepState*) override;
  void head_changed() override;
  void restart_optimizer() override;
  void mean_weights(float* w) override;
  float* means() override { return arrays_.weights; }

  const PointSetup& setup() const { return setup_; }
  // A task's end. Synaptic Intelligence folds its path into the importance; EWC needs the mean diagonal Fisher
  // information of the task's examples, in the store's layout on the host.
  void consolidate_path();
  void consolidate_fisher(const std::vector<float>& fisher);

 private:
  PointSetup setup_;
  PointArrays arrays_{};
  float *importance_ = nullptr, *centre_ = nullptr, *grad_, *fisher_ = nullptr;
};

}  // namespace baton
