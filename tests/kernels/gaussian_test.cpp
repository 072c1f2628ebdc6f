#include "kernels/gaussian.h"

#include <algorithm>
#include <memory>
#include <random>

#include "tests/kernels/gaussian_fixture.h"
#include "tests/support/device.h"
#include "tests/support/npz.h"

namespace baton::test {
namespace {

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
      EXPECT_TRUE(close(p->accumulated->host(), golden.f64("out_kl_sum"), {.l2 = 3e-6}));
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
  EXPECT_NEAR(p->accumulated->host()[0], p->divergence()[0], n * 1e-7);  // a step of size 0
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
    EXPECT_EQ(p->accumulated->host()[0], 0);
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

  const std::vector<double> got = p.accumulated->host();
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
  EXPECT_THROW(multiplier_gradient(nullptr, a, {}, {}, nullptr, {}), InputError);
  a.count = 0;
  EXPECT_THROW(gaussian_kl({}, a, {}, nullptr, {}), InputError);
  EXPECT_THROW(draw_gaussian(nullptr, 4, a, 0, 1, 1, nullptr, 0, {}), InputError);
  EXPECT_THROW(draw_gaussian_backward(a, nullptr, 4, 0, 1, 1, nullptr, 0, {}), InputError);
  a.count = 3, a.replicas = 0;
  EXPECT_THROW(point_step(a, nullptr, {}), InputError);
  for (const baton::Run& run : {baton::Run{0, 0, 0}, baton::Run{0, -1, 0}, baton::Run{0, 3, 0, 0, 2},
                                baton::Run{0, 3, 0, 0, 0}, baton::Run{0, 3, 0, 0, 2, true}})
    EXPECT_THROW(z_parts_of({run}), InputError);
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

// Several runs are added to slots of their own, and what lies between them is not touched.
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
  p.accumulated->set({1, 2, 3, 4, 5, 6});  // the accumulator is added to
  p.advance(), whole.advance();
  p.step(ScaleRule::adam), whole.step(ScaleRule::adam);
  for (size_t i = 0; i < 6; i++) EXPECT_NEAR(p.accumulated->host()[i], kl[i] + double(i + 1), 1e-6 * (kl[i] + 6));
  const std::vector<float> after = p.mean->host(), all = whole.mean->host();
  for (size_t i = 0; i < after.size(); i++) {
    const int j = int(i % 24);
    const bool in = (j >= 2 && j < 7) || (j >= 10 && j < 17);
    if (in) EXPECT_NEAR(after[i], all[i], 1e-6) << i;
    else EXPECT_EQ(after[i], before[i]) << i;
  }
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
        EXPECT_GT(p.accumulated->host()[slot], 0);
        EXPECT_EQ(p.accumulated->host()[3 + slot], 0);
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

}  // namespace
}  // namespace baton::test
