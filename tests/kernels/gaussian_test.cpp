#include "kernels/gaussian.h"

#include <algorithm>
#include <memory>
#include <random>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"
#include "tests/support/npz.h"

namespace baton::test {
namespace {

// A posterior on the device; host() and set() are by the names of GaussianArrays.
struct Posterior {
  Posterior(int count_, int replicas_, size_t stride_) : count(count_), replicas(replicas_), stride(stride_) {
    for (auto* b : {&mean, &log_sd, &variance, &prior_mean, &prior_log_sd, &grad_mean, &grad_variance, &mean_m, &mean_v,
                    &scale_m, &scale_v})
      *b = std::make_unique<Buffer<float>>(memory, stride * replicas);
    states = std::make_unique<Buffer<StepState>>(memory, size_t(replicas));
    totals = std::make_unique<Buffer<Totals>>(memory, size_t(replicas));
    kl = std::make_unique<Buffer<double>>(memory, size_t(replicas), 9.);
    partial = std::make_unique<Buffer<float>>(memory, size_t(gaussian_partials(count)) * replicas, NAN);
  }
  GaussianArrays arrays() {
    return {*mean,   *log_sd, *variance, *prior_mean, *prior_log_sd, *grad_mean, *grad_variance,
            *mean_m, *mean_v, *scale_m,  *scale_v,    stride,        count,      replicas};
  }
  void set_sd(const std::vector<float>& log_sds) {
    log_sd->set(log_sds);
    variance_of(*variance, *log_sd, stride, count, replicas, memory.stream());
  }
  // A state that the next advance() makes the first step of its stage.
  void set_states(const std::vector<StepState>& s) { states->set(s); }
  void advance() { advance_step(*states, replicas, memory.stream()); }
  void step(ScaleRule rule) { gaussian_step(arrays(), rule, *states, *totals, *partial, memory.stream()); }
  std::vector<double> divergence() {
    gaussian_kl(*kl, arrays(), *partial, memory.stream());
    partial->host();  // checks its guards
    return kl->host();
  }

  Memory memory;
  int count, replicas;
  size_t stride;
  std::unique_ptr<Buffer<float>> mean, log_sd, variance, prior_mean, prior_log_sd, grad_mean, grad_variance, mean_m,
      mean_v, scale_m, scale_v, partial;
  std::unique_ptr<Buffer<StepState>> states;
  std::unique_ptr<Buffer<Totals>> totals;
  std::unique_ptr<Buffer<double>> kl;
};

StepState state_of(float lr_mean, float lr_scale, float kl_weight, int steps = 1000,
                   Schedule schedule = Schedule::constant) {
  StepState s{};
  s.noise = key_of(7);
  s.stage_steps = steps;
  s.schedule = schedule;
  s.base_lr_mean = lr_mean, s.base_lr_scale = lr_scale;
  s.kl_weight = kl_weight;
  return s;
}

std::vector<float> normals(size_t n, int seed, float mean = 0, float sd = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(mean, sd);
  std::vector<float> v(n);
  for (float& x : v) x = normal(random);
  return v;
}

void randomize(Posterior& p, int seed) {
  const size_t n = p.stride * p.replicas;
  p.mean->set(normals(n, seed)), p.set_sd(normals(n, seed + 1, -2, 0.5f));
  p.prior_mean->set(normals(n, seed + 2)), p.prior_log_sd->set(normals(n, seed + 3, -1.5f, 0.5f));
  p.grad_mean->set(normals(n, seed + 4)), p.grad_variance->set(normals(n, seed + 5, 0, 3));
}

// KL of one parameter, in double; the stable form.
double kl_of(double mean, double log_sd, double prior_mean, double prior_log_sd) {
  const double t = log_sd - prior_log_sd, e = (mean - prior_mean) / std::exp(prior_log_sd);
  return 0.5 * (std::expm1(2 * t) + e * e) - t;
}
std::vector<double> kl_of(Posterior& p) {
  const auto mean = p.mean->host(), log_sd = p.log_sd->host(), prior_mean = p.prior_mean->host(),
             prior_log_sd = p.prior_log_sd->host();
  std::vector<double> sums(p.replicas);
  for (int r = 0; r < p.replicas; r++)
    for (int j = 0; j < p.count; j++) {
      const size_t i = p.stride * r + j;
      sums[r] += kl_of(mean[i], log_sd[i], prior_mean[i], prior_log_sd[i]);
    }
  return sums;
}

// ---------------------------------------------------------------------------------------------------------- the KL
// The golden's case in float32; kl_now is 1 and the data say nothing.
std::unique_ptr<Posterior> posterior_of(const Npz& golden) {
  auto logs = [&](const char* name) {
    std::vector<float> logs;
    for (double sd : golden.f64(name)) logs.push_back(float(std::log(sd)));
    return logs;
  };
  const int n = int(golden.f64("in_mu").size());
  auto p = std::make_unique<Posterior>(n, 1, n);
  p->mean->set(golden.f32("in_mu")), p->prior_mean->set(golden.f32("in_mu_p"));
  p->set_sd(logs("in_sigma")), p->prior_log_sd->set(logs("in_sigma_p"));
  StepState s = state_of(0, 0, 1);
  s.kl_now = s.correction1 = s.correction2 = 1;
  p->set_states({s});
  return p;
}

// Adam's first moment after one step is (1 - beta1) times the gradient.
std::vector<double> gradient_of(Buffer<float>& moment) {
  std::vector<double> g;
  for (float m : moment.host()) g.push_back(m / (1. - double(adam_beta1)));
  return g;
}

TEST(Gaussian, GoldenDivergence) {
  BATON_NEEDS_DEVICE();
  for (const char* name : {"kl_diag_small", "kl_diag_wide"}) {
    SCOPED_TRACE(name);
    const Npz golden(std::string(BATON_GOLDENS) + "/" + name + ".npz");
    for (ScaleRule rule : {ScaleRule::adam, ScaleRule::natural}) {
      auto p = posterior_of(golden);
      EXPECT_TRUE(close(p->divergence(), golden.f64("out_kl_sum"), {.l2 = 3e-6}));
      EXPECT_TRUE(close(p->divergence(), kl_of(*p), {.l2 = 5e-7}));
      p->step(rule);
      EXPECT_TRUE(close(std::vector<double>{p->totals->host()[0].kl}, golden.f64("out_kl_sum"), {.l2 = 3e-6}));
      const std::vector<double> sigma = golden.f64("in_sigma"), prior = golden.f64("in_sigma_p");
      const std::vector<double> want_mean = golden.f64("g_mu"), want_scale = golden.f64("g_log_sigma");
      const std::vector<double> mean = gradient_of(*p->mean_m), scale = gradient_of(*p->scale_m);
      EXPECT_TRUE(close(mean, want_mean, {.l2 = 1e-5}));
      EXPECT_TRUE(close(scale, want_scale, {.l2 = 1e-5}));
      for (size_t i = 0; i < mean.size(); i++) {  // log sigma up to 18 is rounded to 1e-6
        EXPECT_NEAR(mean[i], want_mean[i], 1e-5 * std::abs(want_mean[i])) << i;
        EXPECT_NEAR(scale[i], want_scale[i], 1e-5 * (1 + std::abs(want_scale[i]))) << i;
      }
    }
  }
}

// Where q is near p, a float KL of one parameter is good to about 1e-7, and so is its gradient by log sigma.
TEST(Gaussian, GoldenNearEquality) {
  BATON_NEEDS_DEVICE();
  const Npz golden(std::string(BATON_GOLDENS) + "/kl_diag_near_equal.npz");
  auto p = posterior_of(golden);
  const double n = p->count, rounding = 2.5e-7;
  EXPECT_NEAR(p->divergence()[0], kl_of(*p)[0], n * 5e-8);
  const std::vector<float> log_sd = p->log_sd->host(), prior_log_sd = p->prior_log_sd->host();
  const std::vector<float> mean = p->mean->host(), prior_mean = p->prior_mean->host();
  p->step(ScaleRule::adam);
  EXPECT_NEAR(p->totals->host()[0].kl, p->divergence()[0], n * 1e-7);  // a step of size 0
  const std::vector<double> g_mean = gradient_of(*p->mean_m), g_scale = gradient_of(*p->scale_m);
  for (int i = 0; i < p->count; i++) {
    const double t = double(log_sd[i]) - prior_log_sd[i], e = double(mean[i]) - prior_mean[i];
    EXPECT_NEAR(g_scale[i], std::expm1(2 * t), rounding * (1 + std::abs(t))) << i;
    const double g = e * std::exp(-2. * prior_log_sd[i]);
    EXPECT_NEAR(g_mean[i], g, 2e-6 * std::abs(g)) << i;
  }
}

TEST(Gaussian, DivergenceFromItselfIsZero) {
  BATON_NEEDS_DEVICE();
  const Npz golden(std::string(BATON_GOLDENS) + "/kl_diag_equal.npz");
  for (ScaleRule rule : {ScaleRule::adam, ScaleRule::natural}) {
    auto p = posterior_of(golden);
    EXPECT_NEAR(p->divergence()[0], golden.scalar("out_kl_sum"), 1e-6);
    p->prior_mean->set(p->mean->host()), p->prior_log_sd->set(p->log_sd->host());
    const std::vector<float> before = p->mean->host();
    EXPECT_EQ(p->divergence()[0], 0);
    p->step(rule);
    EXPECT_EQ(p->totals->host()[0].kl, 0);
    EXPECT_TRUE(exact(p->mean_m->host(), std::vector<float>(p->count)));
    EXPECT_TRUE(exact(p->scale_m->host(), std::vector<float>(p->count)));
    EXPECT_TRUE(exact(p->mean->host(), before));
  }
}

TEST(Gaussian, DivergenceFiniteDifferences) {
  BATON_NEEDS_DEVICE();
  Posterior p(6, 1, 8);
  randomize(p, 90);
  p.grad_mean->set(std::vector<float>(8)), p.grad_variance->set(std::vector<float>(8));
  StepState s = state_of(0, 0, 1);
  s.kl_now = s.correction1 = s.correction2 = 1;
  p.set_states({s});
  p.step(ScaleRule::adam);
  const std::vector<float> mean = p.mean->host(), log_sd = p.log_sd->host();
  auto head = [](std::vector<double> v) {
    v.resize(6);
    return v;
  };
  const auto by_mean = central_differences(mean, 0x1p-6f, [&](const std::vector<float>& x) {
    p.mean->set(x);
    return p.divergence()[0];
  });
  p.mean->set(mean);
  const auto by_scale = central_differences(log_sd, 0x1p-8f, [&](const std::vector<float>& x) {
    p.log_sd->set(x);
    return p.divergence()[0];
  });
  EXPECT_TRUE(close(head(gradient_of(*p.mean_m)), head(by_mean), {.l2 = 1e-3}));
  EXPECT_TRUE(close(head(gradient_of(*p.scale_m)), head(by_scale), {.l2 = 1e-3}));
}

// -------------------------------------------------------------------------------------------------------- the step
struct Moments {
  std::vector<double> m, v;
  explicit Moments(size_t n) : m(n), v(n) {}
  // Adam's direction, for a gradient g of element i.
  double step(size_t i, double g, const StepState& s) {
    m[i] = adam_beta1 * m[i] + (1 - double(adam_beta1)) * g;
    v[i] = adam_beta2 * v[i] + (1 - double(adam_beta2)) * g * g;
    return m[i] * s.correction1 / (std::sqrt(v[i] * s.correction2) + adam_epsilon);
  }
};

void check_steps(ScaleRule rule, int count, int replicas, int steps) {
  SCOPED_TRACE(testing::Message() << (rule == ScaleRule::adam ? "adam " : "natural ") << count << " x " << replicas);
  const size_t stride = count + 3, n = stride * replicas;
  Posterior p(count, replicas, stride);
  randomize(p, count);
  std::vector<StepState> states;
  for (int r = 0; r < replicas; r++)
    states.push_back(state_of(0.01f + 0.01f * r, 0.02f, 0.3f / (r + 1), 50, Schedule::linear));
  p.set_states(states);
  std::vector<double> totals(replicas);

  auto doubles = [](Buffer<float>& b) {
    const std::vector<float> v = b.host();
    return std::vector<double>(v.begin(), v.end());
  };
  std::vector<double> mean = doubles(*p.mean), log_sd = doubles(*p.log_sd), variance = doubles(*p.variance);
  const std::vector<double> prior_mean = doubles(*p.prior_mean), prior_log_sd = doubles(*p.prior_log_sd);
  const std::vector<double> first_mean = mean, first_log_sd = log_sd;
  Moments of_mean(n), of_scale(n);
  int clipped = 0;
  for (int t = 0; t < steps; t++) {
    std::vector<float> grad_mean = normals(n, 100 + t), grad_variance = normals(n, 200 + t, 0, t == 1 ? 1000 : 3);
    for (size_t i = 0; i < n; i++) {  // gradients that keep their sign: Adam's direction of a tiny one is not smooth
      grad_mean[i] = i % 2 ? 0.5f + std::abs(grad_mean[i]) : -0.5f - std::abs(grad_mean[i]);
    }
    p.grad_mean->set(grad_mean), p.grad_variance->set(grad_variance);
    p.advance();
    p.step(rule);
    states = p.states->host();
    for (int r = 0; r < replicas; r++)
      for (int j = 0; j < count; j++) {
        const size_t i = stride * r + j;
        const StepState& s = states[r];
        const double shift = log_sd[i] - prior_log_sd[i],
                     e = (mean[i] - prior_mean[i]) * std::exp(-2 * prior_log_sd[i]);
        totals[r] += kl_of(mean[i], log_sd[i], prior_mean[i], prior_log_sd[i]);
        mean[i] -= s.lr_mean * of_mean.step(i, grad_mean[i] + s.kl_now * e, s);
        const double by_data = 2 * variance[i] * grad_variance[i], by_prior = std::expm1(2 * shift);
        if (rule == ScaleRule::adam) {
          log_sd[i] -= s.lr_scale * of_scale.step(i, by_data + s.kl_now * by_prior, s);
        } else {
          of_scale.m[i] = adam_beta1 * of_scale.m[i] + (1 - double(adam_beta1)) * (by_data / s.kl_now + by_prior);
          const double move = 0.5 * s.lr_scale * of_scale.m[i] * s.correction1;
          clipped += std::abs(move) > largest_scale_step;
          log_sd[i] -= std::clamp(move, -double(largest_scale_step), double(largest_scale_step));
        }
        variance[i] = std::exp(2 * log_sd[i]);
      }
  }
  EXPECT_TRUE(close(doubles(*p.mean), mean, {.l2 = 1e-6}));
  EXPECT_TRUE(close(doubles(*p.log_sd), log_sd, {.l2 = 2e-6}));
  auto gaps_cut = [&](std::vector<double> v) {  // what lies between the rows is not computed
    for (size_t i = 0; i < n; i++)
      if (i % stride >= size_t(count)) v[i] = 0;
    return v;
  };
  EXPECT_TRUE(close(gaps_cut(doubles(*p.variance)), gaps_cut(variance), {.l2 = 5e-6}));
  EXPECT_TRUE(close(doubles(*p.mean_m), of_mean.m, {.l2 = 2e-6}));
  EXPECT_TRUE(close(doubles(*p.mean_v), of_mean.v, {.l2 = 2e-6}));
  EXPECT_TRUE(close(doubles(*p.scale_m), of_scale.m, {.l2 = 5e-6}));
  if (rule == ScaleRule::adam) {
    EXPECT_TRUE(close(doubles(*p.scale_v), of_scale.v, {.l2 = 5e-6}));
  } else {
    EXPECT_GT(clipped, 0);
    EXPECT_TRUE(exact(doubles(*p.scale_v), std::vector<double>(n)));
  }
  // The steps alone, which are small beside the values.
  auto moved = [&](const std::vector<double>& now, const std::vector<double>& first) {
    std::vector<double> d(n);
    for (size_t i = 0; i < n; i++) d[i] = now[i] - first[i];
    return d;
  };
  EXPECT_TRUE(close(moved(doubles(*p.mean), first_mean), moved(mean, first_mean), {.l2 = 3e-5}));
  EXPECT_TRUE(close(moved(doubles(*p.log_sd), first_log_sd), moved(log_sd, first_log_sd), {.l2 = 3e-5}));

  const std::vector<Totals> got = p.totals->host();
  for (int r = 0; r < replicas; r++) {
    EXPECT_NEAR(got[r].kl, totals[r], 2e-6 * totals[r]);
    EXPECT_EQ(got[r].loss, 0);
    EXPECT_EQ(got[r].examples, 0);
    EXPECT_EQ(got[r].steps, 0);
  }
  EXPECT_TRUE(close(p.divergence(), kl_of(p), {.l2 = 1e-6}));
  const std::string name = std::string("gaussian_step.") + (rule == ScaleRule::adam ? "adam." : "natural.") +
                           std::to_string(count) + "." + std::to_string(steps);
  record(name + ".mean", p.mean->host());
  record(name + ".log_sd", p.log_sd->host());
  record(name + ".kl", {float(got[0].kl)});
}

TEST(Gaussian, SmallStepsAgainstReference) {
  BATON_NEEDS_DEVICE();
  for (ScaleRule rule : {ScaleRule::adam, ScaleRule::natural}) check_steps(rule, 13, 2, 2);
}

TEST(Gaussian, StepsAgainstReference) {
  BATON_NEEDS_DEVICE();
  for (ScaleRule rule : {ScaleRule::adam, ScaleRule::natural}) {
    check_steps(rule, 5, 1, 6);
    check_steps(rule, 13, 2, 8);
    check_steps(rule, 2048, 1, 3);
    check_steps(rule, 4500, 2, 6);  // several blocks a replica
  }
}

TEST(Gaussian, PointStepsAgainstReference) {
  BATON_NEEDS_DEVICE();
  const int count = 21, replicas = 2;
  const size_t stride = 24, n = stride * replicas;
  Posterior p(count, replicas, stride);
  randomize(p, 5);
  p.set_states({state_of(0.01f, 0.5f, 1), state_of(0.03f, 0.5f, 1)});
  const std::vector<float> first = p.mean->host(), log_sd = p.log_sd->host();
  std::vector<double> want(first.begin(), first.end());
  Moments moments(n);
  for (int t = 0; t < 5; t++) {
    std::vector<float> g = normals(n, t, 2);
    p.grad_mean->set(g);
    p.advance();
    point_step(p.arrays(), *p.states, p.memory.stream());
    const auto states = p.states->host();
    for (size_t i = 0; i < n; i++)
      if (i % stride < size_t(count)) want[i] -= states[i / stride].lr_mean * moments.step(i, g[i], states[i / stride]);
  }
  EXPECT_TRUE(close(p.mean->host(), want, {.l2 = 5e-7}));
  EXPECT_TRUE(close(p.mean_m->host(), moments.m, {.l2 = 1e-6}));
  EXPECT_TRUE(close(p.mean_v->host(), moments.v, {.l2 = 1e-6}));
  EXPECT_TRUE(exact(p.log_sd->host(), log_sd));
  record("point_step.mean", p.mean->host());
}

TEST(Gaussian, RefusesShapes) {
  GaussianArrays a{};
  a.count = 4, a.stride = 3, a.replicas = 1;
  EXPECT_THROW(gaussian_step(a, ScaleRule::adam, nullptr, nullptr, nullptr, {}), InputError);
  a.count = 0;
  EXPECT_THROW(gaussian_kl(nullptr, a, nullptr, {}), InputError);
  a.count = 3, a.replicas = 0;
  EXPECT_THROW(point_step(a, nullptr, {}), InputError);
}

// ------------------------------------------------------------------------------------------------------- identities
// A constant curvature h of the loss (grad_variance = h / 2) has its optimum at 1/sigma^2 = 1/sigma_p^2 + h/kl_weight.
TEST(Gaussian, NaturalRuleFindsTheClosedForm) {
  BATON_NEEDS_DEVICE();
  const int n = 8;
  const float kl_weight = 0.01f;
  Posterior p(n, 1, n);
  std::vector<float> prior_log_sd(n), grad_variance(n);
  std::vector<double> want(n);
  for (int i = 0; i < n; i++) {
    prior_log_sd[i] = -0.5f * i / n;
    grad_variance[i] = 0.5f * std::pow(10.f, i - 4.f);  // curvatures of 1e-4 to 1e3, of a prior precision of about 1
    want[i] = -0.5 * std::log(std::exp(-2. * prior_log_sd[i]) + 2 * double(grad_variance[i]) / kl_weight);
  }
  p.prior_log_sd->set(prior_log_sd), p.set_sd(std::vector<float>(n, -2.f)), p.grad_variance->set(grad_variance);
  p.set_states({state_of(0, 0.1f, kl_weight)});
  for (int t = 0; t < 400; t++) {
    p.advance();
    p.step(ScaleRule::natural);
  }
  const std::vector<float> got = p.log_sd->host();
  for (int i = 0; i < n; i++) EXPECT_NEAR(got[i], want[i], 2e-5) << i;
}

// A diagonal linear-Gaussian model: part t of the data has N_t examples whose mean loss is h_t (w - c_t)^2 / 2. Learned
// part by part, each posterior the next one's prior, it is the posterior of all the data at once.
TEST(Gaussian, PartsInTurnAreTheBatchPosterior) {
  BATON_NEEDS_DEVICE();
  const int n = 4, parts = 3, steps = 300;
  const int examples[parts] = {50, 200, 10};
  Posterior p(n, 1, n);
  std::vector<float> mean{0.3f, -0.2f, 0, 0.1f}, log_sd{0, -0.5f, -1, 0.5f};
  std::vector<double> precision(n), weighted(n);
  for (int i = 0; i < n; i++) {
    precision[i] = std::exp(-2. * log_sd[i]);
    weighted[i] = precision[i] * mean[i];
  }
  p.mean->set(mean), p.set_sd(log_sd);
  const std::vector<float> zeros(n);
  for (int t = 0; t < parts; t++) {
    const std::vector<float> center = normals(n, 10 + t, 0, 0.7f);
    std::vector<float> curvature = normals(n, 20 + t);
    for (int i = 0; i < n; i++) {
      curvature[i] = 0.1f + std::abs(curvature[i]);
      precision[i] += examples[t] * double(curvature[i]);
      weighted[i] += examples[t] * double(curvature[i]) * center[i];
    }
    p.prior_mean->set(p.mean->host()), p.prior_log_sd->set(p.log_sd->host());  // the hand-over
    for (auto* moment : {&p.mean_m, &p.mean_v, &p.scale_m, &p.scale_v}) (*moment)->set(zeros);
    p.set_states({state_of(0.05f, 0.1f, 1.f / examples[t], steps, Schedule::cosine)});
    EXPECT_EQ(p.divergence()[0], 0);
    std::vector<float> half = curvature;
    for (float& h : half) h *= 0.5f;
    p.grad_variance->set(half);
    for (int k = 0; k < steps; k++) {
      std::vector<float> g = p.mean->host();
      for (int i = 0; i < n; i++) g[i] = curvature[i] * (g[i] - center[i]);
      p.grad_mean->set(g);
      p.advance();
      p.step(ScaleRule::natural);
    }
  }
  const std::vector<float> got_mean = p.mean->host(), got_log_sd = p.log_sd->host(), got_variance = p.variance->host();
  for (int i = 0; i < n; i++) {
    EXPECT_NEAR(got_mean[i], weighted[i] / precision[i], 1e-3) << i;
    EXPECT_NEAR(got_log_sd[i], -0.5 * std::log(precision[i]), 1e-3) << i;
    EXPECT_NEAR(got_variance[i] * precision[i], 1, 2e-3) << i;
  }
}

// --------------------------------------------------------------------------------------------------------- samplers
double ks_distance(std::vector<double> x) {  // from N(0, 1)
  std::sort(x.begin(), x.end());
  double worst = 0;
  for (size_t i = 0; i < x.size(); i++) {
    const double p = 0.5 * std::erfc(-x[i] / std::sqrt(2.));
    worst = std::max({worst, p - double(i) / x.size(), double(i + 1) / x.size() - p});
  }
  return worst;
}

std::vector<float> draw_weights(const std::vector<float>& mean, const std::vector<float>& variance, size_t stride,
                                int first_sample, int samples, Key key) {
  Memory memory;
  Buffer m(memory, mean), v(memory, variance);
  Buffer<float> w(memory, stride * samples, 9.f);
  sample_weights(w, m, v, int(mean.size()), stride, first_sample, samples, key, memory.stream());
  return w.host();
}

TEST(SampleWeights, ExactMapping) {
  BATON_NEEDS_DEVICE();
  const Key key = key_of(3);
  for (int count : {1, 2, 3, 4, 5, 11}) {
    const std::vector<float> got =
        draw_weights(std::vector<float>(count), std::vector<float>(count, 1.f), 12, 6, 3, key);
    std::vector<float> want(12 * 3, 9.f);
    const int q = (count + 3) / 4;
    for (int s = 0; s < 3; s++)
      for (int i = 0; i < count; i++) {
        const float4 e = normal4(key, i % q, stream_weights, 6 + s);
        want[12 * s + i] = i / q == 0 ? e.x : i / q == 1 ? e.y : i / q == 2 ? e.z : e.w;
      }
    EXPECT_TRUE(exact(got, want)) << count;
  }
}

TEST(SampleWeights, SmallDoNotDependOnHowManyAtOnce) {
  BATON_NEEDS_DEVICE();
  const std::vector<float> mean = normals(10, 1), variance(10, 0.25f);
  const std::vector<float> all = draw_weights(mean, variance, 16, 0, 6, key_of(1));
  const std::vector<float> some = draw_weights(mean, variance, 16, 2, 3, key_of(1));
  EXPECT_TRUE(exact(some, std::vector<float>(all.begin() + 2 * 16, all.begin() + 5 * 16)));
  const std::vector<float> certain = draw_weights(mean, std::vector<float>(10), 16, 0, 1, key_of(1));
  EXPECT_TRUE(exact(std::vector<float>(certain.begin(), certain.begin() + 10), mean));
}

TEST(SampleWeights, Distribution) {
  BATON_NEEDS_DEVICE();
  const int count = 501, samples = 40;
  const std::vector<float> mean = normals(count, 2);
  std::vector<float> variance = normals(count, 3);
  for (float& v : variance) v = 0.01f + v * v;
  const std::vector<float> w = draw_weights(mean, variance, count, 0, samples, key_of(9));
  std::vector<double> e;
  double sum = 0, square = 0, neighbours = 0, draws = 0;
  for (int s = 0; s < samples; s++)
    for (int i = 0; i < count; i++) {
      e.push_back((double(w[s * count + i]) - mean[i]) / std::sqrt(double(variance[i])));
      sum += e.back(), square += e.back() * e.back();
      if (i) neighbours += e.back() * e[e.size() - 2];
      if (s) draws += e.back() * e[e.size() - 1 - count];
    }
  const double n = double(e.size()), limit = 4 / std::sqrt(n);
  EXPECT_NEAR(sum / n, 0, limit);
  EXPECT_NEAR(square / n, 1, 1.5 * limit);
  EXPECT_NEAR(neighbours / n, 0, limit);
  EXPECT_NEAR(draws / n, 0, limit);
  EXPECT_LT(ks_distance(e) * std::sqrt(n), 1.95);  // one in a thousand
}

TEST(InitNormal, SmallElementsDoNotDependOnTheCall) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  std::vector<StepState> states(2);
  states[0].noise = key_of(1), states[1].noise = key_of(2);
  Buffer device_states(memory, states);
  Buffer<float> whole(memory, 40, 9.f), parts(memory, 40, 9.f);
  init_normal(whole, 20, 3, 15, 2.f, device_states, 2, memory.stream());
  init_normal(parts, 20, 3, 7, 2.f, device_states, 2, memory.stream());
  init_normal(parts, 20, 10, 8, 2.f, device_states, 2, memory.stream());
  std::vector<float> want(40, 9.f);
  for (int r = 0; r < 2; r++)
    for (int i = 3; i < 18; i++) want[20 * r + i] = 2 * normal4(states[r].noise, i, stream_init, 0).x;
  EXPECT_TRUE(exact(whole.host(), want));
  EXPECT_TRUE(exact(parts.host(), want));
  init_normal(whole, 20, 3, 15, 0.f, device_states, 2, memory.stream());
  for (int i = 0; i < 40; i++) want[i] = i % 20 >= 3 && i % 20 < 18 ? 0.f : 9.f;
  EXPECT_TRUE(exact(whole.host(), want));
}

TEST(InitNormal, Distribution) {
  BATON_NEEDS_DEVICE();
  const int n = 8000;
  Memory memory;
  Buffer states(memory, std::vector<StepState>{state_of(0, 0, 1)});
  Buffer<float> x(memory, n);
  init_normal(x, n, 0, n, 0.125f, states, 1, memory.stream());
  std::vector<double> e;
  double square = 0;
  for (float v : x.host()) e.push_back(8. * v), square += 64. * v * v;
  EXPECT_NEAR(square / n, 1, 6 / std::sqrt(double(n)));
  EXPECT_LT(ks_distance(e) * std::sqrt(double(n)), 1.95);
}

TEST(FillRows, SmallExact) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  Buffer values(memory, std::vector<float>{2, -3, 5});
  Buffer<float> x(memory, 3 * 4, 9.f);
  fill_rows(x, 4, 3, values, 3, memory.stream());
  EXPECT_TRUE(exact(x.host(), std::vector<float>{2, 2, 2, 9, -3, -3, -3, 9, 5, 5, 5, 9}));
}

TEST(VarianceOf, SmallAgainstReference) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  const std::vector<float> logs = normals(30, 4, -3, 2);
  Buffer log_sd(memory, logs);
  Buffer<float> variance(memory, 30, 9.f);
  variance_of(variance, log_sd, 15, 14, 2, memory.stream());
  const std::vector<float> got = variance.host();
  for (int i = 0; i < 30; i++)
    if (i % 15 == 14) EXPECT_EQ(got[i], 9) << i;
    else EXPECT_NEAR(got[i] / std::exp(2. * logs[i]), 1, 5e-7) << i;
  record("variance_of", got);
}

}  // namespace
}  // namespace baton::test
