// What the posteriors share that draw all their weights (Zeno et al. 2018; Blundell et al. 2015): a mean and a standard
// deviation of every weight, K draws of all of them a step in passes of some side by side, and the moments of the
// draws' gradients. One network.
#pragma once
#include "layers/posteriors/posterior.h"

namespace baton {

class DrawnPosterior : public Posterior {
 public:
  int draws() const override { return draws_; }
  int draws_at_once() const override { return draws_at_once_; }
  float loss_scale(int) const override { return 1.f; }
  void draw(int first_draw, const StepState*) override;
  void clear_gradients() override;
  void sample(float* w, int replica, int first, int count, Key) override;
  std::vector<float> read_log_std(int replica, const TensorSpec&) override;
  std::unique_ptr<Estimator> make_estimator(Linear&, const LayerContext&) override;
  // As the other posteriors' files: ".mean", ".log_std" and, where weights are pruned, ".mask".
  void save(TensorFile&) const override;
  void load(const TensorFile&, bool first_stage) override;

 protected:
  explicit DrawnPosterior(const PosteriorSetup&);
  void apply_mask() override;
  void fill_sigma(float sigma, bool gaps);  // gaps: also the places between the tensors
  int draws_, draws_at_once_;
  float *mean_, *sd_, *drawn_;
  Moments moments_;
};

Schema drawn_options(int draws, Schema own);

}  // namespace baton
