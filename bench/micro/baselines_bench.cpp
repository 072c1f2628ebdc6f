// The updates of what Bayesian gradient descent is compared with (kernels/baselines.h), at the sizes of LeNet5 and
// 3Conv3FC.
#include "kernels/baselines.h"

#include "networks.h"

using namespace baton;

namespace {

// Bytes a weight: weight and m read and written, the gradient read, 20; Adam's v 8 more, importance and centre 8, the
// path 8. FLOPs: decay 2, SGD 4 or Adam 16, the anchor 4 (2 strength is one number), the path 2.
void point(const NetworkSizes& network, PointRule rule, bool anchored) {
  const double n = network.parameters();
  const bool adam = rule == PointRule::adam;
  const Work work{n * (20 + 8 * adam + 16 * anchored), n * ((adam ? 18 : 6) + 6 * anchored)};
  add(std::string("point_update/") + (adam ? "adam" : "sgd") + (anchored ? "/si" : "") + network.name, work,
      [=, &network](Buffers& b) -> std::function<void()> {
        const size_t size = network.layout.stride();
        PointArrays a{};
        a.weights = b.normal(size, 0.1f), a.grad = b.normal(size, 1e-2f);
        a.m = b.normal(size, 1e-2f), a.v = b.positive(size, 1e-4f);
        if (anchored) a.importance = b.positive(size), a.centre = b.normal(size, 0.1f), a.path = b.normal(size, 1e-2f);
        const PointSettings set{rule, 0.9f, 1e-4f, 1.f};
        const StepState* states = b.states(1);
        return [=, stream = b.stream()] { point_update(a, int(size), set, states, stream); };
      });
}

// Bytes a weight: consolidate_path reads four arrays and writes three, 28; consolidate_fisher four and two, 24.
// FLOPs: 6 and 7.
void consolidation(const NetworkSizes& network) {
  const double n = network.parameters();
  const size_t size = network.layout.stride();
  add(std::string("consolidate_path") + network.name, {28 * n, 6 * n}, [=](Buffers& b) -> std::function<void()> {
    float *importance = b.positive(size), *centre = b.normal(size, 0.1f), *path = b.normal(size, 1e-2f);
    const float* weights = b.normal(size, 0.1f);
    return [=, stream = b.stream()] { consolidate_path(importance, centre, path, weights, int(size), 0.1f, stream); };
  });
  add(std::string("consolidate_fisher") + network.name, {24 * n, 7 * n}, [=](Buffers& b) -> std::function<void()> {
    float *importance = b.positive(size), *centre = b.normal(size, 0.1f);
    const float *fisher = b.positive(size), *weights = b.normal(size, 0.1f);
    return
        [=, stream = b.stream()] { consolidate_fisher(importance, centre, fisher, weights, int(size), 0.9f, stream); };
  });
}

// Bytes a weight: mean, rho, sd and two m read and written, two moments read, 48; Adam's v 16 more. FLOPs: gradients
// 12, 2 exps with the sigmoid and the softplus 28, two steps of 4 or 16; the Gaussian's moments 2; a draw of the
// mixture a normal and 18 (theta 2, log odds 3, exp 2, responsibilities 4, score 4, sums 3).
void bbb(const NetworkSizes& network, BbbPrior prior, PointRule rule, int draws) {
  const double n = network.parameters();
  const bool adam = rule == PointRule::adam, mixture = prior == BbbPrior::mixture;
  const double of_prior = mixture ? draws * (flops_a_normal + 18) : 2;
  add(std::string("bbb_update/") + (mixture ? "mixture" : "gaussian") + (adam ? "/adam" : "/sgd") + network.name +
          "/draws:" + std::to_string(draws),
      {n * (adam ? 64 : 48), n * (40 + (adam ? 32 : 8) + of_prior)},
      [=, &network](Buffers& b) -> std::function<void()> {
        const size_t size = network.layout.stride();
        BbbArrays a{};
        a.mean = b.normal(size, 0.1f), a.sd = b.positive(size, 1e-2f), a.rho = b.room<float>(size);
        rho_of_sd(a.rho, a.sd, int(size), b.stream());
        a.moments = {b.normal(size, 1e-2f), b.normal(size, 1e-2f)};
        a.mean_m = b.normal(size, 1e-2f), a.mean_v = b.positive(size, 1e-4f);
        a.rho_m = b.normal(size, 1e-2f), a.rho_v = b.positive(size, 1e-4f);
        BbbSettings set{};
        set.prior = prior, set.draws = draws, set.gradient_scale = 1 / float(draws);
        set.momentum = 0.9f, set.rule = rule;
        const StepState* states = b.states(1);
        return [=, stream = b.stream()] { bbb_update(a, int(size), set, states, stream); };
      });
}

// Bytes 8. FLOPs: rho_of_sd 20 (exp, log, a series), sd_of_rho 20 (exp, a series, 1 division).
void conversions(const NetworkSizes& network) {
  const double n = network.parameters();
  const size_t size = network.layout.stride();
  add(std::string("rho_of_sd") + network.name, {8 * n, 20 * n}, [=](Buffers& b) -> std::function<void()> {
    const float* sd = b.positive(size);
    float* rho = b.room<float>(size);
    return [=, stream = b.stream()] { rho_of_sd(rho, sd, int(size), stream); };
  });
  add(std::string("sd_of_rho") + network.name, {8 * n, 20 * n}, [=](Buffers& b) -> std::function<void()> {
    const float* rho = b.normal(size, 3);
    float* sd = b.room<float>(size);
    return [=, stream = b.stream()] { sd_of_rho(sd, rho, int(size), stream); };
  });
}

}  // namespace

void add_baseline_benchmarks() {
  for (const NetworkSizes* network : {&lenet5_sizes(), &conv3fc3_sizes()}) {
    for (PointRule rule : {PointRule::sgd, PointRule::adam}) {
      point(*network, rule, false), point(*network, rule, true);
      bbb(*network, BbbPrior::gaussian, rule, 1);
      bbb(*network, BbbPrior::mixture, rule, 1), bbb(*network, BbbPrior::mixture, rule, 10);
    }
    consolidation(*network);
    conversions(*network);
  }
}
