#include "kernels/baselines.h"

#include <random>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"
#include "tests/support/npz.h"

namespace baton::test {
namespace {

std::vector<float> normals(size_t n, int seed, float mean = 0, float sd = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(mean, sd);
  std::vector<float> v(n);
  for (float& x : v) x = normal(random);
  return v;
}
std::vector<float> positives(size_t n, int seed, float scale = 1) {
  std::vector<float> v = normals(n, seed);
  for (float& x : v) x = scale * x * x + 0.1f * scale;
  return v;
}

// State of step t (from 1): a different step size and noise each time.
StepState state_of(int t, float lr, float kl_weight = 0) {
  StepState s{};
  s.noise = key_of(7);
  s.step = uint32_t(t);
  s.lr_mean = lr / float(t);
  s.kl_now = kl_weight;
  s.correction1 = float(1 / (1 - std::pow(double(adam_beta1), t)));
  s.correction2 = float(1 / (1 - std::pow(double(adam_beta2), t)));
  return s;
}

// An optimizer in double.
struct Reference {
  PointRule rule;
  double momentum;
  std::vector<double> m, v;
  Reference(PointRule rule, double momentum, size_t n) : rule(rule), momentum(momentum), m(n), v(n) {}
  double step(size_t i, double g, const StepState& s) {
    if (rule == PointRule::sgd) return s.lr_mean * (m[i] = momentum * m[i] + g);
    m[i] = double(adam_beta1) * m[i] + (1 - double(adam_beta1)) * g;
    v[i] = double(adam_beta2) * v[i] + (1 - double(adam_beta2)) * g * g;
    return s.lr_mean * (m[i] * s.correction1) / (std::sqrt(v[i] * s.correction2) + adam_epsilon);
  }
};

std::vector<double> doubles(const std::vector<float>& v) { return {v.begin(), v.end()}; }

// ------------------------------------------------------------------------------------------------- point estimates
void check_point(int n, const PointSettings& set, bool anchored, bool with_path) {
  const std::string name = std::string(set.rule == PointRule::adam ? "adam" : "sgd") + (anchored ? ".anchored" : "") +
                           (with_path ? ".path" : "");
  SCOPED_TRACE(name + " of " + std::to_string(n));
  const size_t size = size_t(n);
  Memory memory;
  const std::vector<float> importances = positives(size, 1), centres = normals(size, 2), paths = normals(size, 3);
  Buffer w(memory, normals(size, 4)), importance(memory, importances), centre(memory, centres), path(memory, paths);
  Buffer<float> grad(memory, size), m(memory, size), v(memory, size);
  Buffer<StepState> states(memory, 1);
  const PointArrays a{w,
                      grad,
                      m,
                      set.rule == PointRule::adam ? v.data() : nullptr,
                      anchored ? importance.data() : nullptr,
                      anchored ? centre.data() : nullptr,
                      with_path ? path.data() : nullptr};
  Reference optimizer(set.rule, set.momentum, size);
  std::vector<double> want = doubles(w.host()), want_path = doubles(paths);
  for (int t = 1; t <= 4; t++) {
    const std::vector<float> g = normals(size, 10 + t, 0.3f);
    const StepState s = state_of(t, 0.05f);
    grad.set(g);
    states.set({s});
    point_update(a, n, set, states, memory.stream());
    for (size_t i = 0; i < size; i++) {
      double total = g[i] + set.weight_decay * want[i];
      if (anchored) total += 2. * set.strength * importances[i] * (want[i] - centres[i]);
      const double step = optimizer.step(i, total, s);
      want[i] -= step;
      if (with_path) want_path[i] += g[i] * step;
    }
  }
  EXPECT_TRUE(close(w.host(), want, {.l2 = 5e-7, .worst = 2e-6}));
  EXPECT_TRUE(close(m.host(), optimizer.m, {.l2 = 2e-6}));
  if (set.rule == PointRule::adam) {
    EXPECT_TRUE(close(v.host(), optimizer.v, {.l2 = 2e-6}));
  } else {
    EXPECT_TRUE(exact(v.host(), std::vector<float>(size)));
  }
  EXPECT_TRUE(close(path.host(), want_path, {.l2 = 1e-6}));
  if (!with_path) {
    EXPECT_TRUE(exact(path.host(), paths));
  }
  EXPECT_TRUE(exact(importance.host(), importances));
  EXPECT_TRUE(exact(centre.host(), centres));
  if (n == 5001) record("point_update." + name, w.host());
}
void check_points(int n) {
  for (const bool anchored : {false, true})
    for (const bool with_path : {false, true}) {
      check_point(n, {PointRule::sgd, 0.9f, 0.01f, 0.7f}, anchored, with_path);
      check_point(n, {PointRule::adam, 0.9f, 0.01f, 0.7f}, anchored, with_path);
    }
}
TEST(PointUpdate, SmallAgainstReference) {
  BATON_NEEDS_DEVICE();
  check_point(37, {PointRule::sgd, 0.9f, 0.01f, 0.7f}, true, true);
  check_point(37, {PointRule::adam, 0, 0.01f, 0.7f}, true, true);
}
TEST(PointUpdate, AgainstReference) {
  BATON_NEEDS_DEVICE();
  for (int n : {1, 37, 256, 5001}) check_points(n);
}

// Integers, and a step size of 1/4: no rounding anywhere.
TEST(PointUpdate, SmallExact) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  Buffer w(memory, std::vector<float>{8, -4, 2}), grad(memory, std::vector<float>{4, 8, -2});
  Buffer m(memory, std::vector<float>{2, 0, 4}), importance(memory, std::vector<float>{1, 0, 3});
  Buffer centre(memory, std::vector<float>{6, 1, 2}), path(memory, std::vector<float>{1, 2, 3});
  StepState s{};
  s.lr_mean = 0.25f;
  Buffer states(memory, std::vector<StepState>{s});
  const PointSettings set{PointRule::sgd, 0.5f, 0.5f, 2.f};
  const PointArrays a{w, grad, m, nullptr, importance, centre, path};
  point_update(a, 3, set, states, memory.stream());
  // G = g + w / 2 + 4 importance (w - centre) = {16, 6, -1}
  EXPECT_TRUE(exact(m.host(), std::vector<float>{17, 6, 1}));
  EXPECT_TRUE(exact(w.host(), std::vector<float>{3.75f, -5.5f, 1.75f}));
  EXPECT_TRUE(exact(path.host(), std::vector<float>{18, 14, 2.5f}));
  s.halted = 3;
  states.set({s});
  point_update(a, 3, set, states, memory.stream());
  EXPECT_TRUE(exact(m.host(), std::vector<float>{17, 6, 1}));
  EXPECT_TRUE(exact(w.host(), std::vector<float>{3.75f, -5.5f, 1.75f}));
  EXPECT_TRUE(exact(path.host(), std::vector<float>{18, 14, 2.5f}));
}

TEST(ConsolidatePath, SmallAgainstReference) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  // Increments 2 / (1 + 1), 3 / (4 + 1), -5 / (0 + 1): the last would make its importance negative.
  Buffer importance(memory, std::vector<float>{1, 0, 4}), centre(memory, std::vector<float>{2, 1, 7});
  Buffer path(memory, std::vector<float>{2, 3, -5}), w(memory, std::vector<float>{1, 3, 7});
  consolidate_path(importance, centre, path, w, 3, 1, memory.stream());
  EXPECT_TRUE(exact(importance.host(), std::vector<float>{2, 0.6f, 0}));
  EXPECT_TRUE(exact(centre.host(), w.host()));
  EXPECT_TRUE(exact(path.host(), std::vector<float>(3)));

  const int n = 301;
  const std::vector<float> a = positives(n, 1), c = normals(n, 2), p = normals(n, 3), at = normals(n, 4);
  Buffer importances(memory, a), centres(memory, c), paths(memory, p), weights(memory, at);
  consolidate_path(importances, centres, paths, weights, n, 0.1f, memory.stream());
  std::vector<double> want(n);
  for (int i = 0; i < n; i++) {
    const double moved = double(at[i]) - c[i];
    want[i] = std::max(0., a[i] + p[i] / (moved * moved + double(0.1f)));
  }
  EXPECT_TRUE(close(importances.host(), want, {.l2 = 1e-6}));
  EXPECT_TRUE(exact(centres.host(), at));
}

// The golden's network: 10-8-3, mean cross-entropy over 6 examples; its gradient in double at float weights.
struct Mlp {
  static constexpr int in = 10, hidden = 8, classes = 3, batch = 6, size = 115;
  // The flat order: W1, b1, W2, b2.
  static std::vector<double> pack(const Npz& golden, const std::string& prefix, int step = 0) {
    std::vector<double> all;
    for (const auto& [name, n] : {std::pair{"W1", 80}, {"b1", 8}, {"W2", 24}, {"b2", 3}}) {
      const std::vector<double> v = golden.f64(prefix + name);
      all.insert(all.end(), v.begin() + step * n, v.begin() + (step + 1) * n);
    }
    return all;
  }
  static std::vector<float> gradient(const std::vector<float>& w, const double* x, const int64_t* y) {
    const float *w1 = &w[0], *b1 = &w[80], *w2 = &w[88], *b2 = &w[112];
    std::vector<double> g(size);
    for (int b = 0; b < batch; b++) {
      double h[hidden], p[classes], total = 0;
      for (int j = 0; j < hidden; j++) {
        double z = b1[j];
        for (int i = 0; i < in; i++) z += double(w1[j * in + i]) * x[b * in + i];
        h[j] = z > 0 ? z : 0;
      }
      for (int c = 0; c < classes; c++) {
        double z = b2[c];
        for (int j = 0; j < hidden; j++) z += double(w2[c * hidden + j]) * h[j];
        total += p[c] = std::exp(z);
      }
      for (int c = 0; c < classes; c++) {
        const double d = (p[c] / total - (c == y[b])) / batch;
        g[112 + c] += d;
        for (int j = 0; j < hidden; j++) {
          g[88 + c * hidden + j] += d * h[j];
          if (h[j] <= 0) continue;
          const double back = d * w2[c * hidden + j];
          g[80 + j] += back;
          for (int i = 0; i < in; i++) g[j * in + i] += back * x[b * in + i];
        }
      }
    }
    return {g.begin(), g.end()};
  }
};

// Two tasks of five SGD steps, the second with the anchor. The golden's importance may be negative: its relu is ours.
TEST(SynapticIntelligence, SmallGolden) {
  BATON_NEEDS_DEVICE();
  const Npz golden(golden_file("layers/si_sgd"));
  const int n = Mlp::size, steps = 5;
  const std::vector<double> x = golden.f64("in_x"), first = Mlp::pack(golden, "in_");
  const std::vector<int64_t> y = golden.i64("in_y");
  const std::vector<float> start(first.begin(), first.end());
  Memory memory;
  Buffer w(memory, start), centre(memory, start);
  Buffer<float> grad(memory, n), m(memory, n), importance(memory, n), path(memory, n);
  StepState s{};
  s.lr_mean = 0.1f;
  Buffer states(memory, std::vector<StepState>{s});
  for (int task = 0; task < 2; task++) {
    const std::string prefix = "out_t" + std::to_string(task);
    for (int t = 0; t < steps; t++) {
      SCOPED_TRACE(prefix + " step " + std::to_string(t));
      const int at = (task * steps + t) * Mlp::batch;
      grad.set(Mlp::gradient(w.host(), &x[size_t(at) * Mlp::in], &y[at]));
      point_update({w, grad, m, nullptr, importance, centre, path}, n, {.strength = 0.5f}, states, memory.stream());
      EXPECT_TRUE(close(w.host(), Mlp::pack(golden, prefix + "_theta_", t), {.l2 = 5e-7}));
      EXPECT_TRUE(close(path.host(), Mlp::pack(golden, prefix + "_omega_", t), {.l2 = 2e-6}));
    }
    consolidate_path(importance, centre, path, w, n, 0.1f, memory.stream());
    const std::vector<double> free = Mlp::pack(golden, prefix + "_Omega_");
    std::vector<double> want = free;
    for (double& o : want) o = std::max(0., o);
    EXPECT_TRUE(close(importance.host(), want, {.l2 = 2e-6}));
    if (task == 0) {
      EXPECT_TRUE(close(importance.host(), Mlp::pack(golden, prefix + "_Omega_relu_"), {.l2 = 2e-6}));
    }
    EXPECT_TRUE(exact(centre.host(), w.host()));
    importance.set({free.begin(), free.end()});  // what the golden's second task is anchored by
    m.set(std::vector<float>(n));
  }
}

// ---------------------------------------------------------------------------------------------------------------- EWC
// The one quadratic has the slope of all tasks' penalties anywhere.
void check_fisher(int n, float decay) {
  SCOPED_TRACE(testing::Message() << n << " weights, decay " << decay);
  const size_t size = size_t(n);
  Memory memory;
  Buffer<float> importance(memory, size), centre(memory, size, 5.f);
  const std::vector<float> at = normals(size, 1);
  std::vector<double> slope(size), sum(size);
  for (int task = 0; task < 4; task++) {
    const std::vector<float> f = positives(size, 20 + task), w = normals(size, 30 + task);
    Buffer fisher(memory, f), weights(memory, w);
    consolidate_fisher(importance, centre, fisher, weights, n, decay, memory.stream());
    for (size_t i = 0; i < size; i++) {
      sum[i] = double(decay) * sum[i] + f[i];
      slope[i] = double(decay) * slope[i] + double(f[i]) * (double(at[i]) - w[i]);
    }
    const std::vector<float> a = importance.host(), c = centre.host();
    std::vector<double> got(size);
    for (size_t i = 0; i < size; i++) got[i] = double(a[i]) * (double(at[i]) - c[i]);
    EXPECT_TRUE(close(a, sum, {.l2 = 1e-6}));
    EXPECT_TRUE(close(got, slope, {.l2 = 1e-6}));
    if (task == 0 || decay == 0) {
      EXPECT_TRUE(exact(c, w));
    }
  }
  if (n == 5001) record("consolidate_fisher.centre", centre.host());
}
TEST(ConsolidateFisher, SmallIsTheSumOfPenalties) {
  BATON_NEEDS_DEVICE();
  check_fisher(37, 1), check_fisher(37, 0.5f);
}
TEST(ConsolidateFisher, IsTheSumOfPenalties) {
  BATON_NEEDS_DEVICE();
  check_fisher(1, 1), check_fisher(5001, 0.9f), check_fisher(300, 0);
}
TEST(ConsolidateFisher, SmallWithoutInformation) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  Buffer importance(memory, std::vector<float>{0, 3, 2}), centre(memory, std::vector<float>{9, 0.1f, 1});
  Buffer fisher(memory, std::vector<float>{0, 0, 2}), w(memory, std::vector<float>{4, 1e6f, 3});
  consolidate_fisher(importance, centre, fisher, w, 3, 1, memory.stream());
  EXPECT_TRUE(exact(importance.host(), std::vector<float>{0, 3, 4}));
  EXPECT_TRUE(exact(centre.host(), std::vector<float>{4, 0.1f, 2}));
}

// ------------------------------------------------------------------------------------------------- Bayes by Backprop
double softplus(double rho) { return rho > 0 ? rho + std::log1p(std::exp(-rho)) : std::log1p(std::exp(rho)); }

TEST(Softplus, SmallBothWays) {
  BATON_NEEDS_DEVICE();
  std::vector<float> rhos, sds;
  for (float rho = -80; rho < 90; rho += 0.37f) rhos.push_back(rho);
  for (float sd = 1e-30f; sd < 90; sd *= 1.3f) sds.push_back(sd);
  Memory memory;
  Buffer rho(memory, rhos), sd(memory, sds);
  Buffer<float> to_sd(memory, rhos.size()), to_rho(memory, sds.size());
  sd_of_rho(to_sd, rho, int(rhos.size()), memory.stream());
  rho_of_sd(to_rho, sd, int(sds.size()), memory.stream());
  const std::vector<float> got_sd = to_sd.host(), got_rho = to_rho.host();
  for (size_t i = 0; i < rhos.size(); i++) {
    const double want = softplus(rhos[i]);
    EXPECT_NEAR(got_sd[i], want, 4e-7 * want) << rhos[i];
  }
  for (size_t i = 0; i < sds.size(); i++) {
    const double y = sds[i], want = y > 1 ? y + std::log1p(-std::exp(-y)) : std::log(std::expm1(y));
    EXPECT_NEAR(got_rho[i], want, 2e-7 * (1 + std::abs(want))) << sds[i];
  }
  // A pruned weight has no finite rho, and comes back.
  Buffer zero(memory, std::vector<float>{0});
  rho_of_sd(zero, zero, 1, memory.stream());
  EXPECT_EQ(zero.host()[0], -INFINITY);
  sd_of_rho(zero, zero, 1, memory.stream());
  EXPECT_EQ(zero.host()[0], 0);
}

float noise_of(const StepState& s, int draw, size_t i) {
  const float4 e = normal4(s.noise, uint32_t(i / 4), stream_weights, s.step, uint32_t(draw));
  return i % 4 == 0 ? e.x : i % 4 == 1 ? e.y : i % 4 == 2 ? e.z : e.w;
}

// ln P, by the logarithm of the components' sum.
double log_prior(const BbbSettings& set, double theta) {
  const auto part = [&](double weight, double sd) {
    return std::log(weight) - std::log(sd) - 0.5 * theta * theta / (sd * sd);
  };
  if (set.prior == BbbPrior::gaussian) return part(1, set.sd1);
  const double a = part(set.weight1, set.sd1), b = part(1. - set.weight1, set.sd2), top = std::max(a, b);
  return top + std::log(std::exp(a - top) + std::exp(b - top));
}
// -d ln P / d theta, by the ratio of the densities.
double score_of(const BbbSettings& set, double theta) {
  const double p1 = 1 / (double(set.sd1) * set.sd1), p2 = 1 / (double(set.sd2) * set.sd2);
  if (set.prior == BbbPrior::gaussian || set.weight1 == 1) return theta * p1;
  if (set.weight1 == 0) return theta * p2;
  const double narrow_to_wide =
      (1. - set.weight1) / set.weight1 * set.sd1 / set.sd2 * std::exp(0.5 * theta * theta * (p1 - p2));
  return theta * (p1 + narrow_to_wide * p2) / (1 + narrow_to_wide);
}

struct Bbb {
  explicit Bbb(int n) : n(n) {
    for (auto* p : {&mean, &rho, &sd, &sum, &noise, &mean_m, &mean_v, &rho_m, &rho_v})
      *p = std::make_unique<Buffer<float>>(memory, size_t(n));
  }
  void set(const std::vector<float>& means, const std::vector<float>& sds) {
    mean->set(means), sd->set(sds);
    rho_of_sd(*rho, *sd, n, memory.stream());
    sd_of_rho(*sd, *rho, n, memory.stream());
  }
  BbbArrays arrays() { return {*mean, *rho, *sd, {*sum, *noise}, *mean_m, *mean_v, *rho_m, *rho_v}; }
  void update(const BbbSettings& set, const StepState& s) {
    states.set({s});
    bbb_update(arrays(), n, set, states, memory.stream());
  }
  int n;
  Memory memory;
  std::unique_ptr<Buffer<float>> mean, rho, sd, sum, noise, mean_m, mean_v, rho_m, rho_v;
  Buffer<StepState> states{memory, 1};
};

// Weights on both sides of where the components cross.
std::vector<float> crossing(int n, int seed) {
  std::vector<float> v = normals(size_t(n), seed, 0, 0.5f);
  for (size_t i = 0; i < v.size(); i += 2) v[i] *= 0.01f;
  return v;
}
std::vector<float> deviations(int n, int seed) {
  std::vector<float> v = normals(size_t(n), seed, -4, 1.5f);
  for (float& x : v) x = std::exp(x);
  return v;
}

void check_bbb(int n, const BbbSettings& set) {
  const std::string name = std::string(set.prior == BbbPrior::mixture ? "mixture" : "gaussian") +
                           (set.rule == PointRule::adam ? ".adam" : ".sgd");
  SCOPED_TRACE(name + " of " + std::to_string(n) + ", draws " + std::to_string(set.draws));
  const size_t size = size_t(n);
  Bbb b(n);
  b.set(crossing(n, 1), deviations(n, 2));
  const float kl_weight = 0.01f;
  Reference mean_rule(set.rule, set.momentum, size), rho_rule(set.rule, set.momentum, size);
  for (int t = 1; t <= 3; t++) {
    const std::vector<float> sums = normals(size, 10 + t, 0, 4), noises = normals(size, 20 + t, 0, 4);
    b.sum->set(sums), b.noise->set(noises);
    const StepState s = state_of(t, 1e-3f, kl_weight);
    // Each step from where the last one ended, so that only a step's error counts.
    std::vector<double> mean = doubles(b.mean->host()), rho = doubles(b.rho->host()), sd(size);
    for (size_t i = 0; i < size; i++) sd[i] = b.sd->host()[i];
    b.update(set, s);
    for (size_t i = 0; i < size; i++) {
      double score = 0, noisy = 0;
      if (set.prior == BbbPrior::gaussian) {
        score = mean[i] / (double(set.sd1) * set.sd1), noisy = sd[i] / (double(set.sd1) * set.sd1);
      } else {
        for (int k = 0; k < set.draws; k++) {
          const double e = noise_of(s, k, i), at = score_of(set, mean[i] + sd[i] * e) / set.draws;
          score += at, noisy += at * e;
        }
      }
      const double g_mean = double(sums[i]) * set.gradient_scale + double(kl_weight) * score;
      const double g_sd = double(noises[i]) * set.gradient_scale + double(kl_weight) * (noisy - 1 / sd[i]);
      mean[i] -= mean_rule.step(i, g_mean, s);
      rho[i] -= rho_rule.step(i, g_sd * -std::expm1(-sd[i]), s);
      sd[i] = softplus(rho[i]);
    }
    EXPECT_TRUE(close(b.mean->host(), mean, {.l2 = 1e-6}));
    EXPECT_TRUE(close(b.rho->host(), rho, {.l2 = 1e-6}));
    EXPECT_TRUE(close(b.sd->host(), sd, {.l2 = 1e-6}));
    EXPECT_TRUE(close(b.mean_m->host(), mean_rule.m, {.l2 = 5e-6}));
    EXPECT_TRUE(close(b.rho_m->host(), rho_rule.m, {.l2 = 5e-6}));
    if (set.rule == PointRule::adam) {
      EXPECT_TRUE(close(b.mean_v->host(), mean_rule.v, {.l2 = 1e-5}));
      EXPECT_TRUE(close(b.rho_v->host(), rho_rule.v, {.l2 = 1e-5}));
    }
  }
  if (n == 3001 && set.draws > 1) {
    record("bbb_update.mean." + name, b.mean->host(), 2e-6f);
    record("bbb_update.sd." + name, b.sd->host(), 2e-6f);
  }
}
void check_bbb(int n) {
  for (const PointRule rule : {PointRule::sgd, PointRule::adam}) {
    check_bbb(n, {.prior = BbbPrior::gaussian, .sd1 = 0.3f, .draws = 2, .gradient_scale = 0.5f, .rule = rule});
    for (int draws : {1, 3})
      check_bbb(n, {.prior = BbbPrior::mixture,
                    .sd1 = 0.5f,
                    .sd2 = 0.02f,
                    .weight1 = 0.25f,
                    .draws = draws,
                    .gradient_scale = 1.f / float(draws),
                    .momentum = 0.9f,
                    .rule = rule});
  }
}
TEST(BayesByBackprop, SmallAgainstReference) {
  BATON_NEEDS_DEVICE();
  check_bbb(7);
}
TEST(BayesByBackprop, AgainstReference) {
  BATON_NEEDS_DEVICE();
  for (int n : {1, 1024, 1026, 3001}) check_bbb(n);
}

// Without data and momentum, SGD's m is kl_weight d/d(mean, rho) E[ln q - ln P]: of the draws, or of the KL itself.
TEST(BayesByBackprop, SmallGradientIsThatOfTheObjective) {
  BATON_NEEDS_DEVICE();
  const int n = 21;
  const StepState s = state_of(5, 0, 0.5f);
  for (const BbbPrior prior : {BbbPrior::gaussian, BbbPrior::mixture}) {
    SCOPED_TRACE(int(prior));
    const BbbSettings set{.prior = prior, .sd1 = 0.4f, .sd2 = 0.05f, .weight1 = 0.75f, .draws = 2};
    Bbb b(n);
    b.set(crossing(n, 3), deviations(n, 4));
    const std::vector<double> mean = doubles(b.mean->host()), rho = doubles(b.rho->host());
    const auto objective = [&](size_t i, double at_mean, double at_rho) {
      const double sd = softplus(at_rho), wide = set.sd1;
      if (prior == BbbPrior::gaussian) return (sd * sd + at_mean * at_mean) / (2 * wide * wide) - std::log(sd);
      double sum = 0;  // ln q(mean + sd e) = -ln sd - e^2 / 2
      for (int k = 0; k < set.draws; k++)
        sum += (-std::log(sd) - log_prior(set, at_mean + sd * noise_of(s, k, i))) / set.draws;
      return sum;
    };
    std::vector<double> by_mean(n), by_rho(n);
    for (size_t i = 0; i < size_t(n); i++) {
      const double h = 1e-6;
      by_mean[i] = 0.5 * (objective(i, mean[i] + h, rho[i]) - objective(i, mean[i] - h, rho[i])) / (2 * h);
      by_rho[i] = 0.5 * (objective(i, mean[i], rho[i] + h) - objective(i, mean[i], rho[i] - h)) / (2 * h);
    }
    b.update(set, s);
    EXPECT_TRUE(close(b.mean_m->host(), by_mean, {.l2 = 5e-6}));
    EXPECT_TRUE(close(b.rho_m->host(), by_rho, {.l2 = 5e-6}));
    EXPECT_TRUE(exact(b.mean->host(), mean));
  }
}

// sd2 = e^-8 at theta = 1: the narrow component's density is exp(-4e6). And far out, at the centre, and with all weight
// on one component.
TEST(BayesByBackprop, SmallExtremePriors) {
  BATON_NEEDS_DEVICE();
  const std::vector<float> means{1, -1, 0, 3e-4f, 2e-3f, 1e4f, -50, 1e-3f};
  const StepState s = state_of(1, 0, 1);
  for (const float weight1 : {0.f, 0.5f, 1.f}) {
    SCOPED_TRACE(weight1);
    const BbbSettings set{.prior = BbbPrior::mixture, .sd1 = 1, .sd2 = float(std::exp(-8.)), .weight1 = weight1};
    Bbb b(int(means.size()));
    b.set(means, std::vector<float>(means.size(), 1e-6f));
    const std::vector<float> sds = b.sd->host();
    b.update(set, s);
    const std::vector<float> got = b.mean_m->host(), got_rho = b.rho_m->host();
    for (size_t i = 0; i < means.size(); i++) {
      const double e = noise_of(s, 0, i), score = score_of(set, means[i] + double(sds[i]) * e);
      EXPECT_NEAR(got[i], score, 1e-5 * std::abs(score) + 1e-3) << i;  // 1e-3: of theta near 0, times e^16
      const double by_rho = (score * e - 1 / double(sds[i])) * -std::expm1(-double(sds[i]));
      EXPECT_NEAR(got_rho[i], by_rho, 1e-5 * (1 + std::abs(by_rho))) << i;
    }
  }
}

TEST(BayesByBackprop, SmallPrunedAndHaltedStand) {
  BATON_NEEDS_DEVICE();
  for (const BbbPrior prior : {BbbPrior::gaussian, BbbPrior::mixture})
    for (const PointRule rule : {PointRule::sgd, PointRule::adam}) {
      const BbbSettings set{.prior = prior, .momentum = 0.9f, .rule = rule};
      Bbb b(3);
      b.set({0.5f, 0, -1}, {0.1f, 0.2f, 0.3f});
      std::vector<float> sds = b.sd->host();
      sds[1] = 0;  // pruned, with the rho that it had
      b.sd->set(sds);
      b.sum->set({1, 2, 3}), b.noise->set({1, 2, 3});
      b.mean_m->set({1, 1, 1}), b.rho_m->set({1, 1, 1});
      StepState s = state_of(1, 0.1f, 1);
      s.halted = 1;
      const std::vector<float> mean = b.mean->host(), rho = b.rho->host();
      b.update(set, s);
      EXPECT_TRUE(exact(b.mean->host(), mean));
      EXPECT_TRUE(exact(b.rho->host(), rho));
      EXPECT_TRUE(exact(b.sd->host(), sds));
      EXPECT_TRUE(exact(b.mean_m->host(), std::vector<float>{1, 1, 1}));
      s.halted = 0;
      b.update(set, s);
      const std::vector<float> moved = b.mean->host(), moved_rho = b.rho->host(), moved_sd = b.sd->host();
      for (size_t i = 0; i < 3; i++) {
        EXPECT_EQ(moved[i] == mean[i], i == 1) << i;
        EXPECT_EQ(moved_rho[i] == rho[i], i == 1) << i;
        EXPECT_EQ(moved_sd[i] == sds[i], i == 1) << i;
        EXPECT_TRUE(std::isfinite(b.mean_m->host()[i]) && std::isfinite(b.rho_m->host()[i])) << i;
      }
    }
}

TEST(Baselines, RefusesSettings) {
  float x = 0;
  EXPECT_THROW(point_update({&x, &x, &x, nullptr}, 0, {}, nullptr, {}), InputError);
  EXPECT_THROW(point_update({&x, &x, &x, nullptr}, 1, {.rule = PointRule::adam}, nullptr, {}), InputError);
  EXPECT_THROW(point_update({&x, &x, &x, nullptr, &x}, 1, {}, nullptr, {}), InputError);
  EXPECT_THROW(point_update({&x, &x, &x, nullptr, nullptr, &x}, 1, {}, nullptr, {}), InputError);
  EXPECT_THROW(consolidate_path(&x, &x, &x, &x, 0, 1, {}), InputError);
  EXPECT_THROW(consolidate_path(&x, &x, &x, &x, 1, 0, {}), InputError);
  EXPECT_THROW(consolidate_fisher(&x, &x, &x, &x, 0, 1, {}), InputError);
  for (float decay : {-0.1f, 1.1f, NAN}) EXPECT_THROW(consolidate_fisher(&x, &x, &x, &x, 1, decay, {}), InputError);
  EXPECT_THROW(rho_of_sd(&x, &x, 0, {}), InputError);
  EXPECT_THROW(sd_of_rho(&x, &x, -1, {}), InputError);
  const BbbArrays a{&x, &x, &x, {&x, &x}, &x, nullptr, &x, nullptr};
  EXPECT_THROW(bbb_update(a, 0, {}, nullptr, {}), InputError);
  for (const BbbSettings& set :
       {BbbSettings{.draws = 0}, BbbSettings{.rule = PointRule::adam}, BbbSettings{.sd1 = 0},
        BbbSettings{.prior = BbbPrior::mixture, .sd2 = 0}, BbbSettings{.prior = BbbPrior::mixture, .weight1 = 1.5f}})
    EXPECT_THROW(bbb_update(a, 1, set, nullptr, {}), InputError);
}

}  // namespace
}  // namespace baton::test
