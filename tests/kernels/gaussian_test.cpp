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

// A posterior on the device; host() and set() are by the names of GaussianArrays. Its runs of parameters: one, of all
// of them, where nothing else is said.
struct Posterior {
  Posterior(int count_, int replicas_, size_t stride_, std::vector<Run> runs_ = {})
      : count(count_), replicas(replicas_), stride(stride_), runs(std::move(runs_)) {
    if (runs.empty()) runs = {{0, count, 0}};
    slots = slots_of(runs);
    pieces = std::make_unique<Buffer<Run>>(memory, pieces_of(runs));
    for (auto* b : {&mean, &log_std, &variance, &prior_mean, &prior_log_std, &grad_mean, &grad_variance, &mean_m,
                    &mean_v, &scale_m, &scale_v})
      *b = std::make_unique<Buffer<float>>(memory, stride * replicas);
    states = std::make_unique<Buffer<StepState>>(memory, size_t(replicas));
    booked = std::make_unique<Buffer<double>>(memory, size_t(replicas) * slots);
    kl = std::make_unique<Buffer<double>>(memory, size_t(replicas) * slots);
    partial = std::make_unique<Buffer<float>>(memory, pieces->size() * replicas, NAN);
  }
  GaussianArrays arrays() {
    return {*mean,   *log_std, *variance, *prior_mean, *prior_log_std, *grad_mean, *grad_variance,
            *mean_m, *mean_v,  *scale_m,  *scale_v,    stride,         count,      replicas};
  }
  void set_sd(const std::vector<float>& log_stds) {
    log_std->set(log_stds);
    variance_of(*variance, *log_std, stride, count, replicas, memory.stream());
  }
  // A state that the next advance() makes the first step of its stage.
  void set_states(const std::vector<StepState>& s) { states->set(s); }
  void advance() { advance_step(*states, replicas, memory.stream()); }
  Pieces table() { return {*pieces, int(pieces->size()), slots}; }
  void step(ScaleRule rule, const Multipliers& z = {}) {
    gaussian_step(arrays(), rule, table(), *states, {*booked, size_t(slots)}, *partial, memory.stream(), z);
  }
  // [replica][slot]
  std::vector<double> divergence(const Multipliers& z = {}) {
    kl->set(std::vector<double>(kl->size()));
    gaussian_kl({*kl, size_t(slots)}, arrays(), table(), *partial, memory.stream(), z);
    partial->host();  // checks its guards
    return kl->host();
  }

  Memory memory;
  int count, replicas;
  size_t stride;
  std::vector<Run> runs;
  int slots = 0;
  std::unique_ptr<Buffer<Run>> pieces;
  std::unique_ptr<Buffer<float>> mean, log_std, variance, prior_mean, prior_log_std, grad_mean, grad_variance, mean_m,
      mean_v, scale_m, scale_v, partial;
  std::unique_ptr<Buffer<StepState>> states;
  std::unique_ptr<Buffer<double>> booked, kl;
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
  p.prior_mean->set(normals(n, seed + 2)), p.prior_log_std->set(normals(n, seed + 3, -1.5f, 0.5f));
  p.grad_mean->set(normals(n, seed + 4)), p.grad_variance->set(normals(n, seed + 5, 0, 3));
}

// KL of one parameter, in double; the stable form.
double kl_of(double mean, double log_std, double prior_mean, double prior_log_std) {
  const double t = log_std - prior_log_std, e = (mean - prior_mean) / std::exp(prior_log_std);
  return 0.5 * (std::expm1(2 * t) + e * e) - t;
}
std::vector<double> kl_of(Posterior& p) {
  const auto mean = p.mean->host(), log_std = p.log_std->host(), prior_mean = p.prior_mean->host(),
             prior_log_std = p.prior_log_std->host();
  std::vector<double> sums(p.replicas);
  for (int r = 0; r < p.replicas; r++)
    for (int j = 0; j < p.count; j++) {
      const size_t i = p.stride * r + j;
      sums[r] += kl_of(mean[i], log_std[i], prior_mean[i], prior_log_std[i]);
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
  p->set_sd(logs("in_sigma")), p->prior_log_std->set(logs("in_sigma_p"));
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
    const Npz golden(golden_file(std::string("layers/") + name));
    for (ScaleRule rule : {ScaleRule::adam, ScaleRule::natural}) {
      auto p = posterior_of(golden);
      EXPECT_TRUE(close(p->divergence(), golden.f64("out_kl_sum"), {.l2 = 3e-6}));
      EXPECT_TRUE(close(p->divergence(), kl_of(*p), {.l2 = 5e-7}));
      p->step(rule);
      EXPECT_TRUE(close(p->booked->host(), golden.f64("out_kl_sum"), {.l2 = 3e-6}));
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
  const Npz golden(golden_file("layers/kl_diag_near_equal"));
  auto p = posterior_of(golden);
  const double n = p->count, rounding = 2.5e-7;
  EXPECT_NEAR(p->divergence()[0], kl_of(*p)[0], n * 5e-8);
  const std::vector<float> log_std = p->log_std->host(), prior_log_std = p->prior_log_std->host();
  const std::vector<float> mean = p->mean->host(), prior_mean = p->prior_mean->host();
  p->step(ScaleRule::adam);
  EXPECT_NEAR(p->booked->host()[0], p->divergence()[0], n * 1e-7);  // a step of size 0
  const std::vector<double> g_mean = gradient_of(*p->mean_m), g_scale = gradient_of(*p->scale_m);
  for (int i = 0; i < p->count; i++) {
    const double t = double(log_std[i]) - prior_log_std[i], e = double(mean[i]) - prior_mean[i];
    EXPECT_NEAR(g_scale[i], std::expm1(2 * t), rounding * (1 + std::abs(t))) << i;
    const double g = e * std::exp(-2. * prior_log_std[i]);
    EXPECT_NEAR(g_mean[i], g, 2e-6 * std::abs(g)) << i;
  }
}

TEST(Gaussian, DivergenceFromItselfIsZero) {
  BATON_NEEDS_DEVICE();
  const Npz golden(golden_file("layers/kl_diag_equal"));
  for (ScaleRule rule : {ScaleRule::adam, ScaleRule::natural}) {
    auto p = posterior_of(golden);
    EXPECT_NEAR(p->divergence()[0], golden.scalar("out_kl_sum"), 1e-6);
    p->prior_mean->set(p->mean->host()), p->prior_log_std->set(p->log_std->host());
    const std::vector<float> before = p->mean->host();
    EXPECT_EQ(p->divergence()[0], 0);
    p->step(rule);
    EXPECT_EQ(p->booked->host()[0], 0);
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
  const std::vector<float> mean = p.mean->host(), log_std = p.log_std->host();
  auto head = [](std::vector<double> v) {
    v.resize(6);
    return v;
  };
  const auto by_mean = central_differences(mean, 0x1p-6f, [&](const std::vector<float>& x) {
    p.mean->set(x);
    return p.divergence()[0];
  });
  p.mean->set(mean);
  const auto by_scale = central_differences(log_std, 0x1p-8f, [&](const std::vector<float>& x) {
    p.log_std->set(x);
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
  std::vector<double> mean = doubles(*p.mean), log_std = doubles(*p.log_std), variance = doubles(*p.variance);
  const std::vector<double> prior_mean = doubles(*p.prior_mean), prior_log_std = doubles(*p.prior_log_std);
  const std::vector<double> first_mean = mean, first_log_std = log_std;
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
        const double shift = log_std[i] - prior_log_std[i],
                     e = (mean[i] - prior_mean[i]) * std::exp(-2 * prior_log_std[i]);
        totals[r] += kl_of(mean[i], log_std[i], prior_mean[i], prior_log_std[i]);
        mean[i] -= s.lr_mean * of_mean.step(i, grad_mean[i] + s.kl_now * e, s);
        const double by_data = 2 * variance[i] * grad_variance[i], by_prior = std::expm1(2 * shift);
        if (rule == ScaleRule::adam) {
          log_std[i] -= s.lr_scale * of_scale.step(i, by_data + s.kl_now * by_prior, s);
        } else {
          of_scale.m[i] = adam_beta1 * of_scale.m[i] + (1 - double(adam_beta1)) * (by_data / s.kl_now + by_prior);
          const double move = 0.5 * s.lr_scale * of_scale.m[i] * s.correction1;
          clipped += std::abs(move) > largest_scale_step;
          log_std[i] -= std::clamp(move, -double(largest_scale_step), double(largest_scale_step));
        }
        variance[i] = std::exp(2 * log_std[i]);
      }
  }
  EXPECT_TRUE(close(doubles(*p.mean), mean, {.l2 = 1e-6}));
  EXPECT_TRUE(close(doubles(*p.log_std), log_std, {.l2 = 2e-6}));
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
  EXPECT_TRUE(close(moved(doubles(*p.log_std), first_log_std), moved(log_std, first_log_std), {.l2 = 3e-5}));

  const std::vector<double> got = p.booked->host();
  for (int r = 0; r < replicas; r++) EXPECT_NEAR(got[r], totals[r], 2e-6 * totals[r]);
  EXPECT_TRUE(close(p.divergence(), kl_of(p), {.l2 = 1e-6}));
  const std::string name = std::string("gaussian_step.") + (rule == ScaleRule::adam ? "adam." : "natural.") +
                           std::to_string(count) + "." + std::to_string(steps);
  record(name + ".mean", p.mean->host());
  record(name + ".log_std", p.log_std->host());
  record(name + ".kl", {float(got[0])});
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
  const std::vector<float> first = p.mean->host(), log_std = p.log_std->host();
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
  EXPECT_TRUE(exact(p.log_std->host(), log_std));
  record("point_step.mean", p.mean->host());
}

TEST(Gaussian, RefusesShapes) {
  GaussianArrays a{};
  a.count = 4, a.stride = 3, a.replicas = 1;
  EXPECT_THROW(gaussian_step(a, ScaleRule::adam, {}, nullptr, {}, nullptr, {}), InputError);
  EXPECT_THROW(multiply_weights(nullptr, 4, a, {}, {}, {}), InputError);
  a.count = 0;
  EXPECT_THROW(gaussian_kl({}, a, {}, nullptr, {}), InputError);
  EXPECT_THROW(draw_gaussian(nullptr, 4, a, 0, 1, 1, nullptr, 0, {}), InputError);
  EXPECT_THROW(draw_gaussian_backward(a, nullptr, 4, 0, 1, 1, nullptr, 0, {}), InputError);
  a.count = 3, a.replicas = 0;
  EXPECT_THROW(point_step(a, nullptr, {}), InputError);
  a.replicas = 1;
  for (const baton::Run& run :
       {baton::Run{0, 3, 0}, baton::Run{0, 3, 0, 0, 2}, baton::Run{0, 3, 0, 0, 0}, baton::Run{0, 3, 0, 0, 2, true}})
    EXPECT_THROW(multiplier_gradient(nullptr, a, run, {}, nullptr, nullptr, {}), InputError);
  for (const baton::Run& run : {baton::Run{0, 0, 0}, baton::Run{0, -1, 0}, baton::Run{0, 3, 0, 0, 2},
                                baton::Run{0, 3, 0, 0, 0}, baton::Run{0, 3, 0, 0, 2, true}})
    EXPECT_THROW(pieces_of({run}), InputError);
}

// ------------------------------------------------------------------------------------------------------- the pieces
// Pieces lie one behind the other and hold whole z, or whole rows.
TEST(Gaussian, SmallPiecesOfRuns) {
  const std::vector<baton::Run> runs{{0, 10, 0},
                                     {64, 5000, 1},
                                     {5100, 25 * 300, 2, 7, 25},             // by blocks
                                     {13000, 3000 * 4, 3, 400, 3000},        // blocks wider than a piece
                                     {25000, 300 * 40, 4, 500, 300, true}};  // by columns
  const std::vector<baton::Run> pieces = pieces_of(runs);
  size_t next = 0;
  for (const baton::Run& run : runs) {
    SCOPED_TRACE(run.slot);
    int at = 0;
    while (at < run.count) {
      ASSERT_LT(next, pieces.size());
      const baton::Run& piece = pieces[next++];
      EXPECT_EQ(piece.first, run.first + at);
      EXPECT_EQ(piece.slot, run.slot);
      EXPECT_EQ(piece.width, run.width);
      EXPECT_EQ(piece.column, run.column);
      EXPECT_GT(piece.count, 0);
      EXPECT_LE(piece.count, std::max(2048, run.width));
      if (run.z_first < 0) {
        EXPECT_LT(piece.z_first, 0);
      } else {
        EXPECT_EQ(piece.count % run.width, 0);
        EXPECT_EQ(piece.z_first, run.column ? run.z_first : run.z_first + at / run.width);
      }
      at += piece.count;
    }
    EXPECT_EQ(at, run.count);
  }
  EXPECT_EQ(next, pieces.size());
  EXPECT_LE(pieces.size(), 1u + 3 + 4 + 4 + 7);  // no more than needed
  EXPECT_TRUE(pieces_of({}).empty());
}

// More pieces than a block has threads, of slots that alternate, and several replicas: every slot gets its own partial
// sums, added in double, the same bits every time; and a NaN stays in its slot.
TEST(Gaussian, ManyPiecesAreBooked) {
  BATON_NEEDS_DEVICE();
  constexpr int pieces = 700, slots = 5, replicas = 3;
  std::vector<baton::Run> runs;
  for (int i = 0; i < pieces; i++) runs.push_back({3 * i, 3, i * i % slots == 4 ? 4 : i % 3});  // slot 3 has none
  Posterior p(3 * pieces, replicas, 3 * pieces + 1, runs);
  ASSERT_EQ(p.pieces->size(), size_t(pieces));
  randomize(p, 31);
  std::vector<float> mean = p.mean->host();
  const int poisoned = 6;  // a piece of slot 0
  ASSERT_EQ(runs[poisoned].slot, 0);
  mean[p.stride + size_t(runs[poisoned].first)] = NAN;
  p.mean->set(mean);
  const std::vector<double> got = p.divergence();
  EXPECT_TRUE(exact(p.divergence(), got));
  const std::vector<float> partial = p.partial->host();
  for (int r = 0; r < replicas; r++)
    for (int slot = 0; slot < slots; slot++) {
      SCOPED_TRACE(testing::Message() << "replica " << r << ", slot " << slot);
      long double want = 0;
      for (int i = 0; i < pieces; i++)
        if (runs[i].slot == slot) want += partial[size_t(pieces) * r + i];
      const double sum = got[slots * r + slot];
      if (r == 1 && slot == 0) EXPECT_TRUE(std::isnan(sum));
      else EXPECT_NEAR(sum, double(want), 1e-14 * double(want));
      EXPECT_EQ(want == 0, slot == 3);
    }
}

// Several runs book into slots of their own, and what lies between them is not touched.
TEST(Gaussian, SmallRunsBookIntoTheirSlots) {
  BATON_NEEDS_DEVICE();
  const std::vector<baton::Run> runs{{2, 5, 2}, {10, 7, 0}};
  Posterior p(20, 2, 24, runs), whole(20, 2, 24);
  randomize(p, 30), randomize(whole, 30);
  p.set_states({state_of(0.1f, 0.1f, 0.5f), state_of(0.2f, 0.1f, 0.5f)});
  whole.set_states(p.states->host());
  const std::vector<float> before = p.mean->host();
  const std::vector<double> kl = p.divergence();
  for (int r = 0; r < 2; r++) {
    for (const baton::Run& run : runs) {
      double want = 0;
      for (int j = run.first; j < run.first + run.count; j++) {
        const size_t i = 24 * r + j;
        want += kl_of(before[i], p.log_std->host()[i], p.prior_mean->host()[i], p.prior_log_std->host()[i]);
      }
      EXPECT_NEAR(kl[3 * r + run.slot], want, 1e-6 * want);
    }
    EXPECT_EQ(kl[3 * r + 1], 0);
  }
  p.booked->set({1, 2, 3, 4, 5, 6});  // the accumulator is added to
  p.advance(), whole.advance();
  p.step(ScaleRule::adam), whole.step(ScaleRule::adam);
  for (size_t i = 0; i < 6; i++) EXPECT_NEAR(p.booked->host()[i], kl[i] + double(i + 1), 1e-6 * (kl[i] + 6));
  const std::vector<float> after = p.mean->host(), all = whole.mean->host();
  for (size_t i = 0; i < after.size(); i++) {
    const int j = int(i % 24);
    const bool in = (j >= 2 && j < 7) || (j >= 10 && j < 17);
    if (in) EXPECT_NEAR(after[i], all[i], 1e-6) << i;
    else EXPECT_EQ(after[i], before[i]) << i;
  }
}

// ------------------------------------------------------------------------------------------ multiplicative variables
struct ZShape {
  int filters, width;        // z by blocks: one for each of `filters` runs of `width` weights
  int columns, column_rows;  // z by columns
  int plain;                 // parameters without z
};

// A posterior of three runs, with z and the gradients of the rows' weights z mu.
struct Multiplied {
  Multiplied(const ZShape& s, int replicas, int groups_, int seed)
      : groups(groups_),
        blocks{3, s.filters * s.width, 0, 5, s.width},
        columns{blocks.first + blocks.count + 4, s.columns * s.column_rows, 2, 5 + s.filters + 3, s.columns, true},
        plain{columns.first + columns.count + 2, s.plain, 1},
        z_stride(size_t(columns.z_first) + s.columns + 2),
        p(plain.first + plain.count, replicas, size_t(plain.first + plain.count) + 3, {blocks, plain, columns}),
        grad_stride(p.stride + 5),
        rows(replicas * groups),
        z(p.memory, normals(z_stride * rows, seed + 50, 1, 0.4f)),
        dz(p.memory, z_stride * rows, 9.f),
        grad(p.memory, normals(grad_stride * rows, seed + 51)),
        w(p.memory, grad_stride * rows, 9.f),
        partial(p.memory, size_t(std::max(1, multiplier_partials(columns))) * rows, NAN) {
    randomize(p, seed);
    std::vector<StepState> states;
    for (int r = 0; r < replicas; r++) {
      states.push_back(state_of(0.01f + 0.01f * r, 0.02f, 0.3f / (r + 1)));
      states[r].kl_now = 0.3f / (r + 1);
    }
    p.set_states(states);
  }
  Multipliers multipliers() { return {z, grad, z_stride, grad_stride, groups}; }
  // The z of parameter j: its place in a row, below 0 where it has none.
  int z_of(int j) const {
    if (j >= blocks.first && j < blocks.first + blocks.count) return blocks.z_first + (j - blocks.first) / blocks.width;
    if (j >= columns.first && j < columns.first + columns.count)
      return columns.z_first + (j - columns.first) % columns.width;
    return -1;
  }
  // Whether parameter j is in a run at all.
  bool used(int j) const { return z_of(j) >= 0 || (j >= plain.first && j < plain.first + plain.count); }
  int slot_of(int j) const { return z_of(j) < 0 ? 1 : j >= columns.first ? 2 : 0; }
  void gradients() {
    for (const Run& run : {blocks, columns})
      multiplier_gradient(dz, p.arrays(), run, multipliers(), *p.states, partial, p.memory.stream());
  }

  int groups;
  Run blocks, columns, plain;
  size_t z_stride;
  Posterior p;
  size_t grad_stride;
  int rows;
  Buffer<float> z, dz, grad, w, partial;
};
const ZShape small_shape{6, 5, 9, 7, 4}, large_shape{180, 25, 130, 70, 300};  // the second: several pieces and segments

void check_multiplied(ScaleRule rule, const ZShape& shape, int groups) {
  SCOPED_TRACE(testing::Message() << (rule == ScaleRule::adam ? "adam " : "natural ") << groups << " groups of "
                                  << shape.filters);
  const int replicas = 2, steps = 3;
  Multiplied m(shape, replicas, groups, 70 + groups);
  Posterior& p = m.p;
  const size_t n = p.stride * replicas;
  const auto doubles = [](Buffer<float>& b) {
    const std::vector<float> v = b.host();
    return std::vector<double>(v.begin(), v.end());
  };
  std::vector<double> mean = doubles(*p.mean), log_std = doubles(*p.log_std);
  const std::vector<double> prior_mean = doubles(*p.prior_mean), prior_log_std = doubles(*p.prior_log_std);
  const std::vector<double> first_mean = mean, first_log_std = log_std, z = doubles(m.z);
  Moments of_mean(n), of_scale(n);
  std::vector<double> booked(size_t(replicas) * 3), now;
  for (int t = 0; t < steps; t++) {
    std::vector<float> grad = normals(m.grad_stride * m.rows, 300 + t), plain = normals(n, 400 + t);
    const std::vector<float> grad_variance = normals(n, 500 + t, 0, 3);
    for (float& g : grad) g = g < 0 ? g - 3 : g + 3;  // away from 0, where Adam's direction is not smooth
    for (float& g : plain) g = g < 0 ? g - 3 : g + 3;
    m.grad.set(grad), p.grad_mean->set(plain), p.grad_variance->set(grad_variance);
    p.advance();
    now.assign(booked.size(), 0);
    const std::vector<double> divergence = p.divergence(m.multipliers());
    p.step(rule, m.multipliers());
    const std::vector<StepState> states = p.states->host();
    for (int r = 0; r < replicas; r++)
      for (int j = 0; j < p.count; j++) {
        if (!m.used(j)) continue;
        const size_t i = p.stride * r + j;
        const StepState& s = states[r];
        double g = plain[i], z2 = 1;
        if (m.z_of(j) >= 0) {
          g = z2 = 0;
          for (int k = 0; k < groups; k++) {
            const size_t q = size_t(r) * groups + k;
            const double one = z[m.z_stride * q + m.z_of(j)];
            g += one * grad[m.grad_stride * q + j], z2 += one * one / groups;
          }
        }
        const double shift = log_std[i] - prior_log_std[i], away = mean[i] - prior_mean[i];
        const double precision = std::exp(-2 * prior_log_std[i]);
        now[size_t(r) * 3 + m.slot_of(j)] += 0.5 * (std::expm1(2 * shift) + z2 * away * away * precision) - shift;
        mean[i] -= s.lr_mean * of_mean.step(i, g + s.kl_now * z2 * away * precision, s);
        const double by_data = 2 * std::exp(2 * log_std[i]) * grad_variance[i], by_prior = std::expm1(2 * shift);
        if (rule == ScaleRule::adam) {
          log_std[i] -= s.lr_scale * of_scale.step(i, by_data + s.kl_now * by_prior, s);
        } else {
          of_scale.m[i] = adam_beta1 * of_scale.m[i] + (1 - double(adam_beta1)) * (by_data / s.kl_now + by_prior);
          log_std[i] -= std::clamp(0.5 * s.lr_scale * of_scale.m[i] * s.correction1, -double(largest_scale_step),
                                   double(largest_scale_step));
        }
      }
    EXPECT_TRUE(close(divergence, now, {.l2 = 1e-6}));
    for (size_t i = 0; i < now.size(); i++) booked[i] += now[i];
  }
  EXPECT_TRUE(close(p.booked->host(), booked, {.l2 = 2e-6}));
  EXPECT_TRUE(close(doubles(*p.mean), mean, {.l2 = 1e-6}));
  EXPECT_TRUE(close(doubles(*p.log_std), log_std, {.l2 = 2e-6}));
  EXPECT_TRUE(close(doubles(*p.mean_m), of_mean.m, {.l2 = 2e-6}));
  EXPECT_TRUE(close(doubles(*p.scale_m), of_scale.m, {.l2 = 5e-6}));
  const auto moved = [&](const std::vector<double>& after, const std::vector<double>& first) {
    std::vector<double> d(n);
    for (size_t i = 0; i < n; i++) d[i] = after[i] - first[i];
    return d;
  };
  EXPECT_TRUE(close(moved(doubles(*p.mean), first_mean), moved(mean, first_mean), {.l2 = 3e-5}));
  EXPECT_TRUE(close(moved(doubles(*p.log_std), first_log_std), moved(log_std, first_log_std), {.l2 = 3e-5}));
  const std::string name = std::string("multiplied_step.") + (rule == ScaleRule::adam ? "adam." : "natural.") +
                           std::to_string(groups) + "." + std::to_string(shape.filters);
  record(name + ".mean", p.mean->host());
  record(name + ".log_std", p.log_std->host());
  record(name + ".kl", {float(p.booked->host()[0]), float(p.booked->host()[2])});
}

TEST(Multipliers, SmallStepsAgainstReference) {
  BATON_NEEDS_DEVICE();
  for (ScaleRule rule : {ScaleRule::adam, ScaleRule::natural})
    for (int groups : {1, 3}) check_multiplied(rule, small_shape, groups);
}
TEST(Multipliers, StepsAgainstReference) {
  BATON_NEEDS_DEVICE();
  for (ScaleRule rule : {ScaleRule::adam, ScaleRule::natural})
    for (int groups : {1, 3}) check_multiplied(rule, large_shape, groups);
}

// z of 1 changes nothing.
TEST(Multipliers, SmallOnesAreNoMultipliers) {
  BATON_NEEDS_DEVICE();
  Multiplied m(small_shape, 1, 1, 5);
  Posterior plain(m.p.count, 1, m.p.stride, m.p.runs);
  randomize(plain, 5);
  plain.set_states(m.p.states->host());
  m.z.set(std::vector<float>(m.z.size(), 1.f));
  std::vector<float> grad = m.p.grad_mean->host();
  grad.resize(m.grad.size());
  m.grad.set(grad);
  for (int t = 0; t < 2; t++) {
    m.p.advance(), plain.advance();
    m.p.step(ScaleRule::adam, m.multipliers()), plain.step(ScaleRule::adam);
  }
  EXPECT_TRUE(close(m.p.mean->host(), plain.mean->host(), {.l2 = 1e-7}));
  EXPECT_TRUE(close(m.p.log_std->host(), plain.log_std->host(), {.l2 = 1e-7}));
  EXPECT_TRUE(close(m.p.booked->host(), plain.booked->host(), {.l2 = 1e-7}));
}

void check_multiply(const ZShape& shape, int groups) {
  Multiplied m(shape, 2, groups, 11);
  multiply_weights(m.w, m.grad_stride, m.p.arrays(), m.p.table(), m.multipliers(), m.p.memory.stream());
  const std::vector<float> z = m.z.host(), mean = m.p.mean->host();
  std::vector<float> want(m.grad_stride * m.rows, 9.f);
  for (int q = 0; q < m.rows; q++)
    for (int j = 0; j < m.p.count; j++)
      if (m.z_of(j) >= 0)
        want[m.grad_stride * q + j] = z[m.z_stride * q + m.z_of(j)] * mean[m.p.stride * (q / groups) + j];
  EXPECT_TRUE(exact(m.w.host(), want)) << groups;
  record("multiply_weights." + std::to_string(groups) + "." + std::to_string(shape.filters), m.w.host(), 0);
}
TEST(Multipliers, SmallMultiplyExact) {
  BATON_NEEDS_DEVICE();
  for (int groups : {1, 3}) check_multiply(small_shape, groups);
}
TEST(Multipliers, MultiplyExact) {
  BATON_NEEDS_DEVICE();
  for (int groups : {1, 3}) check_multiply(large_shape, groups);
}

void check_multiplier_gradient(const ZShape& shape, int groups) {
  Multiplied m(shape, 2, groups, 21);
  m.gradients();
  const std::vector<float> z = m.z.host(), mean = m.p.mean->host(), prior_mean = m.p.prior_mean->host(),
                           prior_log_std = m.p.prior_log_std->host(), grad = m.grad.host();
  const std::vector<StepState> states = m.p.states->host();
  std::vector<double> want(m.z_stride * m.rows);
  std::vector<bool> written(want.size());
  for (int q = 0; q < m.rows; q++)
    for (int j = 0; j < m.p.count; j++) {
      if (m.z_of(j) < 0) continue;
      const int r = q / groups;
      const size_t i = m.p.stride * r + j, k = m.z_stride * q + m.z_of(j);
      const double away = double(mean[i]) - prior_mean[i];
      want[k] += double(mean[i]) * grad[m.grad_stride * q + j] +
                 double(states[r].kl_now) / groups * z[k] * away * away * std::exp(-2. * prior_log_std[i]);
      written[k] = true;
    }
  std::vector<float> got = m.dz.host();
  for (size_t k = 0; k < got.size(); k++)
    if (!written[k]) {
      EXPECT_EQ(got[k], 9.f) << k;
      got[k] = 0;
    }
  EXPECT_TRUE(close(got, want, {.l2 = 2e-6})) << groups;
  m.partial.host();
  record("multiplier_gradient." + std::to_string(groups) + "." + std::to_string(shape.filters), got, 2e-6f);
}
TEST(Multipliers, SmallGradientAgainstReference) {
  BATON_NEEDS_DEVICE();
  for (int groups : {1, 3}) check_multiplier_gradient(small_shape, groups);
}
TEST(Multipliers, GradientAgainstReference) {
  BATON_NEEDS_DEVICE();
  for (int groups : {1, 3}) check_multiplier_gradient(large_shape, groups);
}

// The data term is linear in z and the KL quadratic, so differences may be wide.
TEST(Multipliers, GradientFiniteDifferences) {
  BATON_NEEDS_DEVICE();
  for (int groups : {1, 3}) {
    Multiplied m(small_shape, 2, groups, 31);
    m.gradients();
    const std::vector<float> grad = m.grad.host();
    const std::vector<StepState> states = m.p.states->host();
    auto want = central_differences(m.z.host(), 0.5f, [&](const std::vector<float>& z) {
      m.z.set(z);
      m.w.set(std::vector<float>(m.w.size()));
      multiply_weights(m.w, m.grad_stride, m.p.arrays(), m.p.table(), m.multipliers(), m.p.memory.stream());
      const std::vector<float> w = m.w.host();
      double sum = 0;
      for (size_t i = 0; i < w.size(); i++) sum += double(w[i]) * grad[i];
      const std::vector<double> kl = m.p.divergence(m.multipliers());
      for (size_t i = 0; i < kl.size(); i++) sum += double(states[i / 3].kl_now) * kl[i];
      return sum;
    });
    std::vector<float> got = m.dz.host();
    for (size_t k = 0; k < got.size(); k++)
      if (got[k] == 9.f) {
        EXPECT_NEAR(want[k], 0, 1e-12) << k;  // no weight has this z
        got[k] = 0, want[k] = 0;
      }
    EXPECT_TRUE(close(got, want, {.l2 = 1e-5})) << groups;
  }
}

// ------------------------------------------------------------------------------------- draws of a few parameters
void check_draws(int count, int groups) {
  SCOPED_TRACE(testing::Message() << count << " parameters, " << groups << " groups");
  const int replicas = 2, first = 3, rows = replicas * groups;
  const uint32_t stream_id = stream_draws + 4;
  const size_t w_stride = size_t(first) + count + 6;
  Posterior p(first + count + 2, replicas, size_t(first) + count + 5);
  randomize(p, 41);
  std::vector<StepState> states{state_of(0, 0, 1), state_of(0, 0, 1)};
  for (int r = 0; r < replicas; r++) states[r].noise = key_of(20 + r), states[r].step = 6 + r;
  p.set_states(states);
  Buffer<float> w(p.memory, w_stride * rows, 9.f);
  Buffer grad(p.memory, normals(w_stride * rows, 42));
  const std::vector<float> untouched(p.stride * replicas, 9.f);
  p.grad_mean->set(untouched), p.grad_variance->set(untouched);
  draw_gaussian(w, w_stride, p.arrays(), first, count, groups, *p.states, stream_id, p.memory.stream());
  draw_gaussian_backward(p.arrays(), grad, w_stride, first, count, groups, *p.states, stream_id, p.memory.stream());
  const std::vector<float> mean = p.mean->host(), variance = p.variance->host(), g = grad.host();
  std::vector<float> want(w_stride * rows, 9.f);
  std::vector<double> want_mean(p.stride * replicas), want_variance(p.stride * replicas);
  for (int q = 0; q < rows; q++)
    for (int i = 0; i < count; i++) {
      const int r = q / groups;
      const size_t at = p.stride * r + first + i, to = w_stride * q + first + i;
      const float e = normal4(states[r].noise, uint32_t(q % groups * count + i), stream_id, states[r].step).x;
      want[to] = mean[at] + std::sqrt(variance[at]) * e;
      want_mean[at] += g[to];
      want_variance[at] += double(g[to]) * e / (2 * std::sqrt(double(variance[at])));
    }
  EXPECT_TRUE(exact(w.host(), want));
  const auto of_draws = [&](Buffer<float>& b) {  // the rest is as it was
    std::vector<float> got = b.host();
    for (size_t i = 0; i < got.size(); i++) {
      const int j = int(i % p.stride) - first;
      if (j >= 0 && j < count) continue;
      EXPECT_EQ(got[i], 9.f) << i;
      got[i] = 0;
    }
    return got;
  };
  EXPECT_TRUE(close(of_draws(*p.grad_mean), want_mean, {.l2 = 1e-6}));
  EXPECT_TRUE(close(of_draws(*p.grad_variance), want_variance, {.l2 = 1e-6}));
  const std::string name = "draw_gaussian." + std::to_string(count) + "." + std::to_string(groups);
  record(name, w.host());  // through expf
  record(name + ".grad_variance", p.grad_variance->host());
}
TEST(DrawGaussian, SmallAgainstReference) {
  BATON_NEEDS_DEVICE();
  check_draws(5, 1), check_draws(5, 3);
}
TEST(DrawGaussian, AgainstReference) {
  BATON_NEEDS_DEVICE();
  check_draws(1, 1), check_draws(700, 2);
}

// ---------------------------------------------------------------------------------------------------- standing still
// A replica whose loss was not finite keeps every value, whatever its gradients say; the other one moves on.
TEST(Gaussian, SmallHaltedReplicasStandStill) {
  BATON_NEEDS_DEVICE();
  for (ScaleRule rule : {ScaleRule::adam, ScaleRule::natural})
    for (int groups : {0, 1, 3}) {
      Multiplied m(small_shape, 2, std::max(groups, 1), 61);
      Posterior& p = m.p;
      std::vector<StepState> states = p.states->host();
      states[1].halted = 4;
      p.set_states(states);
      std::vector<float> grad = m.grad.host(), plain = p.grad_mean->host(), scale = p.grad_variance->host();
      std::fill(grad.begin() + long(grad.size() / 2), grad.end(), NAN);
      std::fill(plain.begin() + long(plain.size() / 2), plain.end(), NAN);
      std::fill(scale.begin() + long(scale.size() / 2), scale.end(), INFINITY);
      m.grad.set(grad), p.grad_mean->set(plain), p.grad_variance->set(scale);
      std::vector<Buffer<float>*> values{p.mean.get(),   p.log_std.get(), p.variance.get(),
                                         p.mean_m.get(), p.mean_v.get(),  p.scale_m.get()};
      if (rule == ScaleRule::adam) values.push_back(p.scale_v.get());
      std::vector<std::vector<float>> before;
      for (auto* b : values) before.push_back(b->host());
      p.advance();
      p.step(rule, groups ? m.multipliers() : Multipliers{});
      for (size_t k = 0; k < values.size(); k++) {
        const std::vector<float> after = values[k]->host();
        const auto half = long(after.size() / 2);
        EXPECT_TRUE(exact(std::vector(after.begin() + half, after.end()),
                          std::vector(before[k].begin() + half, before[k].end())))
            << k;
        EXPECT_FALSE(exact(std::vector(after.begin(), after.begin() + half),
                           std::vector(before[k].begin(), before[k].begin() + half)))
            << k;
      }
      for (int slot = 0; slot < 3; slot++) {
        EXPECT_GT(p.booked->host()[slot], 0);
        EXPECT_EQ(p.booked->host()[3 + slot], 0);
      }
      if (groups) continue;
      before.clear();
      for (auto* b : values) before.push_back(b->host());
      point_step(p.arrays(), *p.states, p.memory.stream());
      for (size_t k = 0; k < values.size(); k++) {
        const std::vector<float> after = values[k]->host();
        const auto half = long(after.size() / 2);
        EXPECT_TRUE(exact(std::vector(after.begin() + half, after.end()),
                          std::vector(before[k].begin() + half, before[k].end())))
            << k;
      }
      EXPECT_FALSE(exact(p.mean->host(), before[0]));
    }
}

// ------------------------------------------------------------------------------------------------------- identities
// A constant curvature h of the loss (grad_variance = h / 2) has its optimum at 1/sigma^2 = 1/sigma_p^2 + h/kl_weight.
TEST(Gaussian, NaturalRuleFindsTheClosedForm) {
  BATON_NEEDS_DEVICE();
  const int n = 8;
  const float kl_weight = 0.01f;
  Posterior p(n, 1, n);
  std::vector<float> prior_log_std(n), grad_variance(n);
  std::vector<double> want(n);
  for (int i = 0; i < n; i++) {
    prior_log_std[i] = -0.5f * i / n;
    grad_variance[i] = 0.5f * std::pow(10.f, i - 4.f);  // curvatures of 1e-4 to 1e3, of a prior precision of about 1
    want[i] = -0.5 * std::log(std::exp(-2. * prior_log_std[i]) + 2 * double(grad_variance[i]) / kl_weight);
  }
  p.prior_log_std->set(prior_log_std), p.set_sd(std::vector<float>(n, -2.f)), p.grad_variance->set(grad_variance);
  p.set_states({state_of(0, 0.1f, kl_weight)});
  for (int t = 0; t < 400; t++) {
    p.advance();
    p.step(ScaleRule::natural);
  }
  const std::vector<float> got = p.log_std->host();
  for (int i = 0; i < n; i++) EXPECT_NEAR(got[i], want[i], 2e-5) << i;
}

// A diagonal linear-Gaussian model: part t of the data has N_t examples whose mean loss is h_t (w - c_t)^2 / 2. Learned
// part by part, each posterior the next one's prior, it is the posterior of all the data at once.
TEST(Gaussian, PartsInTurnAreTheBatchPosterior) {
  BATON_NEEDS_DEVICE();
  const int n = 4, parts = 3, steps = 300;
  const int examples[parts] = {50, 200, 10};
  Posterior p(n, 1, n);
  std::vector<float> mean{0.3f, -0.2f, 0, 0.1f}, log_std{0, -0.5f, -1, 0.5f};
  std::vector<double> precision(n), weighted(n);
  for (int i = 0; i < n; i++) {
    precision[i] = std::exp(-2. * log_std[i]);
    weighted[i] = precision[i] * mean[i];
  }
  p.mean->set(mean), p.set_sd(log_std);
  const std::vector<float> zeros(n);
  for (int t = 0; t < parts; t++) {
    const std::vector<float> center = normals(n, 10 + t, 0, 0.7f);
    std::vector<float> curvature = normals(n, 20 + t);
    for (int i = 0; i < n; i++) {
      curvature[i] = 0.1f + std::abs(curvature[i]);
      precision[i] += examples[t] * double(curvature[i]);
      weighted[i] += examples[t] * double(curvature[i]) * center[i];
    }
    p.prior_mean->set(p.mean->host()), p.prior_log_std->set(p.log_std->host());  // the hand-over
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
  const std::vector<float> got_mean = p.mean->host(), got_log_std = p.log_std->host(),
                           got_variance = p.variance->host();
  for (int i = 0; i < n; i++) {
    EXPECT_NEAR(got_mean[i], weighted[i] / precision[i], 1e-3) << i;
    EXPECT_NEAR(got_log_std[i], -0.5 * std::log(precision[i]), 1e-3) << i;
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
  sample_weights(w, m, 0, v, int(mean.size()), stride, first_sample, samples, key, memory.stream());
  return w.host();
}

// Means of their own for every draw, which lie where the draws go.
TEST(SampleWeights, SmallMeansOfEveryDraw) {
  BATON_NEEDS_DEVICE();
  const int count = 11, samples = 3;
  const size_t stride = 14;
  const std::vector<float> means = normals(stride * samples, 6), variance(count, 0.25f);
  Memory memory;
  Buffer m(memory, means), w(memory, means), v(memory, variance);
  Buffer<float> apart(memory, stride * samples, 9.f);
  sample_weights(w, w, stride, v, count, stride, 4, samples, key_of(2), memory.stream());
  sample_weights(apart, m, stride, v, count, stride, 4, samples, key_of(2), memory.stream());
  const std::vector<float> noise = draw_weights(std::vector<float>(count), variance, stride, 4, samples, key_of(2));
  const std::vector<float> got = w.host(), elsewhere = apart.host();
  for (size_t i = 0; i < got.size(); i++) {
    const bool used = i % stride < size_t(count);
    EXPECT_EQ(got[i], used ? means[i] + noise[i] : means[i]) << i;
    EXPECT_EQ(elsewhere[i], used ? got[i] : 9.f) << i;
  }
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
  Buffer log_std(memory, logs);
  Buffer<float> variance(memory, 30, 9.f);
  variance_of(variance, log_std, 15, 14, 2, memory.stream());
  const std::vector<float> got = variance.host();
  for (int i = 0; i < 30; i++)
    if (i % 15 == 14) EXPECT_EQ(got[i], 9) << i;
    else EXPECT_NEAR(got[i] / std::exp(2. * logs[i]), 1, 5e-7) << i;
  record("variance_of", got);
}

}  // namespace
}  // namespace baton::test
