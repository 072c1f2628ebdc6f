#include "kernels/cholesky.h"

#include <algorithm>
#include <memory>
#include <random>

#include "kernels/gaussian.h"
#include "tests/kernels/cholesky_fixture.h"
#include "tests/support/device.h"
#include "tests/support/npz.h"

namespace baton::test {
namespace {

// ---------------------------------------------------------------------------------------------------------- goldens
// Full matrices [blocks][d][d] of a golden.
std::vector<Lower> lowers(const Npz& golden, const std::string& name, int blocks, int d) {
  const Doubles all = golden.f64(name);
  std::vector<Lower> l(blocks, Lower(d));
  for (int b = 0; b < blocks; b++)
    for (int i = 0; i < d; i++)
      for (int j = 0; j <= i; j++) l[b](i, j) = all[(size_t(b) * d + i) * d + j];
  return l;
}
std::vector<float> padded(const std::vector<float>& v, size_t size) {
  std::vector<float> all = v;
  all.resize(size);
  return all;
}
std::vector<float> stored(const std::vector<Lower>& blocks) {
  std::vector<float> all;
  for (const Lower& l : blocks)
    for (double x : to_stored(l)) all.push_back(float(x));
  return all;
}
Doubles stored_gradients(const std::vector<Lower>& gradients, const std::vector<Lower>& factors) {
  Doubles all;
  for (size_t b = 0; b < factors.size(); b++)
    for (double x : gradient_to_stored(gradients[b], factors[b])) all.push_back(x);
  return all;
}
// d/d ln L_ii at fixed L_ij, from the gradient by stored coordinates.
Doubles log_diagonal(const Doubles& gradient, const std::vector<Lower>& factors) {
  Doubles all;
  for (size_t b = 0; b < factors.size(); b++) {
    const Lower& l = factors[b];
    for (int i = 0; i < l.d; i++) {
      const double* row = gradient.data() + b * packed(l.d) + entry(i, 0);
      all.push_back(row[i]);
      for (int j = 0; j < i; j++) all.back() -= row[j] * l(i, j) / l(i, i);
    }
  }
  return all;
}

std::unique_ptr<Posterior> posterior_of(const Npz& golden) {
  const auto shape = golden.shape("in_L");
  const int blocks = int(shape[0] * shape[1]), d = int(shape[2]);
  auto p = std::make_unique<Posterior>(d, blocks);
  p->mean->set(padded(golden.f32("in_mu"), p->stride));
  p->factor->set(padded(stored(lowers(golden, "in_L", blocks, d)), p->factor_stride));
  p->set_prior(padded(golden.f32("in_mup"), p->stride),
               padded(stored(lowers(golden, "in_Lp", blocks, d)), p->factor_stride));
  p->states->set({held_state(1)});
  return p;
}

TEST(Cholesky, GoldenDivergence) {
  BATON_NEEDS_DEVICE();
  for (const char* name : {"cfg_kl_3x3", "cfg_kl_5x5", "cfg_kl_diag_q", "cfg_kl_iso_prior"}) {
    SCOPED_TRACE(name);
    const Npz golden(golden_file(std::string("layers/") + name));
    auto p = posterior_of(golden);
    const int blocks = p->blocks, d = p->d;
    const auto factors = lowers(golden, "in_L", blocks, d), priors = lowers(golden, "in_Lp", blocks, d);

    // The reference of the other tests, first.
    const Doubles mean = golden.f64("in_mu"), prior_mean = golden.f64("in_mup");
    const Doubles block_kl = golden.f64("out_kl_block");
    std::vector<Lower> by_factor;
    for (int b = 0; b < blocks; b++) {
      const auto from = mean.begin() + b * d, prior_from = prior_mean.begin() + b * d;
      const auto reference = divergence_of({from, from + d}, factors[b], {prior_from, prior_from + d}, priors[b]);
      EXPECT_NEAR(reference.kl, block_kl[b], 1e-9 * std::abs(block_kl[b]));
      by_factor.push_back(reference.by_factor);
    }
    const auto want = lowers(golden, "g_L", blocks, d);
    for (int b = 0; b < blocks; b++) EXPECT_TRUE(close(by_factor[b].values, want[b].values, {.l2 = 1e-9}));

    EXPECT_TRUE(close(p->divergence(), golden.f64("out_kl"), {.l2 = 2e-6}));
    EXPECT_TRUE(close(doubles(p->partial->host()), block_kl, {.l2 = 3e-6}));
    p->step(false);
    EXPECT_TRUE(close(Doubles{p->kl->host()[0]}, golden.f64("out_kl"), {.l2 = 2e-6}));
    EXPECT_TRUE(close(p->mean_gradient(), golden.f64("g_mu"), {.l2 = 1e-5}));
    EXPECT_TRUE(close(p->factor_gradient(), stored_gradients(want, factors), {.l2 = 1e-5}));
    EXPECT_TRUE(close(log_diagonal(p->factor_gradient(), factors), golden.f64("g_logdiag"), {.l2 = 1e-5}));
    p->step(false);  // added once more
    EXPECT_TRUE(close(Doubles{p->kl->host()[0] / 2}, golden.f64("out_kl"), {.l2 = 2e-6}));
  }
}

TEST(Cholesky, DivergenceFromItselfIsZero) {
  BATON_NEEDS_DEVICE();
  const Npz golden(golden_file("layers/cfg_kl_equal"));
  auto p = posterior_of(golden);
  EXPECT_NEAR(p->divergence()[0], golden.scalar("out_kl"), 1e-11);
  p->step(false);
  EXPECT_NEAR(p->kl->host()[0], 0, 1e-11);
  for (double g : p->mean_gradient()) EXPECT_EQ(g, 0);
  for (double g : p->factor_gradient()) EXPECT_NEAR(g, 0, 2e-6);  // of gradients that are 1 where L = 2 L_0

  // A network's worth of blocks; and where nothing lies below the diagonal, 0 exactly.
  Posterior many(25, 300);
  const std::vector<float> mean = normals(many.stride, 1), factor = random_factor(many, 2, -2);
  many.mean->set(mean), many.factor->set(factor), many.set_prior(mean, factor);
  many.states->set({held_state(1)});
  EXPECT_NEAR(many.divergence()[0], 0, 1e-8);
  EXPECT_GE(many.divergence()[0], 0);
  Buffer log_std(many.memory, normals(300 * 25, 3, -2));
  for (auto* f : {&many.factor, &many.prior_factor})
    cholesky_from_diagonal(**f, many.factor_stride, log_std, 300 * 25, 300, 25, 1, many.memory.stream());
  many.set_prior(mean, many.prior_factor->host());
  EXPECT_EQ(many.divergence()[0], 0);
  many.step(false);
  EXPECT_EQ(many.kl->host()[0], 0);
  EXPECT_TRUE(exact(many.factor_m->host(), std::vector<float>(many.factor_stride)));
  EXPECT_TRUE(exact(many.mean_m->host(), std::vector<float>(many.stride)));
}

// The first steps of a stage: the KL is small beside its terms.
TEST(Cholesky, DivergenceNearItself) {
  BATON_NEEDS_DEVICE();
  const int d = 25, blocks = 3;
  Posterior p(d, blocks);
  const std::vector<float> prior = random_factor(p, 1, -2), mean = normals(p.stride, 2);
  std::vector<float> near = prior, near_mean = mean;
  const std::vector<float> shift = normals(near.size(), 3, 1e-3f, 3e-4f);
  for (size_t i = 0; i < near.size(); i++) near[i] += shift[i];
  for (size_t i = 0; i < near_mean.size(); i++) near_mean[i] += 1e-5f * shift[i];
  p.mean->set(near_mean), p.factor->set(near), p.set_prior(mean, prior);
  const Doubles factor = doubles(near), prior_factor = doubles(prior);
  const Doubles means = doubles(near_mean), prior_means = doubles(mean);
  double want = 0;
  for (int b = 0; b < blocks; b++)
    want += divergence_of({means.begin() + b * d, means.begin() + (b + 1) * d}, from_stored(&factor[b * packed(d)], d),
                          {prior_means.begin() + b * d, prior_means.begin() + (b + 1) * d},
                          from_stored(&prior_factor[b * packed(d)], d))
                .kl;
  EXPECT_GT(want, 1e-4);
  EXPECT_LT(want, 1e-2);
  EXPECT_NEAR(p.divergence()[0], want, 2e-4 * want);
}

TEST(Cholesky, GoldenWeightSampling) {
  BATON_NEEDS_DEVICE();
  struct Case {
    const char* name;
    int stride, pad;
  };
  for (Case c : {Case{"cfg_conv_3x3_p1", 1, 1}, Case{"cfg_conv_5x5_p0", 1, 0}, Case{"cfg_conv_2x3_s2", 2, 1}}) {
    SCOPED_TRACE(c.name);
    const Npz golden(golden_file(std::string("layers/") + c.name));
    const auto x_shape = golden.shape("in_x"), w_shape = golden.shape("in_mu"), y_shape = golden.shape("up_y");
    const int batch = int(x_shape[0]), channels = int(x_shape[1]), h = int(x_shape[2]), width = int(x_shape[3]);
    const int filters = int(w_shape[0]), kh = int(w_shape[2]), kw = int(w_shape[3]);
    const int oh = int(y_shape[2]), ow = int(y_shape[3]), blocks = filters * channels, d = kh * kw;
    const Doubles x = golden.f64("in_x"), up = golden.f64("up_y");
    Doubles grad_w(size_t(blocks) * d, 0);
    for (int b = 0; b < batch; b++)
      for (int n = 0; n < filters; n++)
        for (int ch = 0; ch < channels; ch++)
          for (int k = 0; k < d; k++)
            for (int p = 0; p < oh * ow; p++) {
              const int row = p / ow * c.stride + k / kw - c.pad, col = p % ow * c.stride + k % kw - c.pad;
              if (row < 0 || row >= h || col < 0 || col >= width) continue;
              grad_w[(size_t(n) * channels + ch) * d + k] +=
                  up[((size_t(b) * filters + n) * oh + p / ow) * ow + p % ow] *
                  x[((size_t(b) * channels + ch) * h + row) * width + col];
            }
    EXPECT_TRUE(close(grad_w, golden.f64("ws_g_mu"), {.l2 = 1e-12}));

    const Doubles mean = golden.f64("in_mu");
    const auto factors = lowers(golden, "in_L", blocks, d);
    // Draws and gradients by the factor under the noise e, in double.
    auto reference = [&](const Doubles& e, Doubles& w, std::vector<Lower>& by_factor) {
      w.clear(), by_factor.clear();
      for (int b = 0; b < blocks; b++) {
        const Doubles own(e.begin() + b * d, e.begin() + (b + 1) * d), noise = times(factors[b], own);
        Lower g(d);
        for (int i = 0; i < d; i++) {
          w.push_back(mean[b * d + i] + noise[i]);
          for (int j = 0; j <= i; j++) g(i, j) = grad_w[b * d + i] * own[j];
        }
        by_factor.push_back(g);
      }
    };
    Doubles w;
    std::vector<Lower> by_factor;
    reference(golden.f64("eps_w"), w, by_factor);
    EXPECT_TRUE(close(w, golden.f64("ws_out_w"), {.l2 = 1e-12}));
    const auto want = lowers(golden, "ws_g_L", blocks, d);
    for (int b = 0; b < blocks; b++) EXPECT_TRUE(close(by_factor[b].values, want[b].values, {.l2 = 1e-12}));
    EXPECT_TRUE(
        close(log_diagonal(stored_gradients(by_factor, factors), factors), golden.f64("ws_g_logdiag"), {.l2 = 1e-12}));

    Posterior p(d, blocks);
    p.mean->set(padded(golden.f32("in_mu"), p.stride));
    p.factor->set(padded(stored(factors), p.factor_stride));
    p.set_prior(p.mean->host(), p.factor->host());
    const StepState s = held_state(0);
    p.states->set({s});
    Doubles e;
    for (int b = 0; b < blocks; b++)
      for (int i = 0; i < d; i++) e.push_back(noise_of(s, 0, blocks, b, d, i));
    reference(e, w, by_factor);
    EXPECT_TRUE(close(p.packed_means(p.sample()), w, {.l2 = 3e-7}));
    p.grad_w->set(padded(floats(grad_w), p.stride));
    p.step();
    EXPECT_TRUE(close(p.mean_gradient(), grad_w, {.l2 = 3e-7}));
    EXPECT_TRUE(close(p.factor_gradient(), stored_gradients(by_factor, factors), {.l2 = 1e-6}));
  }
}

// ------------------------------------------------------------------------------------------------------ the gradient
// J = sum_g <grad_w, w> + kl_now KL, for every parameter; the noise is that of one step throughout.
TEST(Cholesky, FiniteDifferences) {
  BATON_NEEDS_DEVICE();
  for (int d : {1, 4, 9}) {
    SCOPED_TRACE(d);
    Posterior p(d, 2, 1, 2);
    randomize(p, 70 + d);
    p.states->set({held_state(0.5f)});
    p.step();
    const std::vector<float> mean = p.mean->host(), factor = p.factor->host(), up = p.grad_w->host();
    auto objective = [&] {
      const std::vector<float> w = p.sample();
      double j = 0.5 * p.divergence()[0];
      for (int g = 0; g < p.groups; g++)
        for (int i = 0; i < p.blocks * d; i++) j += double(w[p.stride * g + i]) * up[p.stride * g + i];
      return j;
    };
    const auto by_mean = central_differences(mean, 0x1p-5f, [&](const std::vector<float>& x) {
      p.mean->set(x);
      return objective();
    });
    p.mean->set(mean);
    const auto by_factor = central_differences(factor, 0x1p-6f, [&](const std::vector<float>& x) {
      p.factor->set(x);
      return objective();
    });
    EXPECT_TRUE(close(p.mean_gradient(), p.packed_means(by_mean), {.l2 = 1e-3}));
    EXPECT_TRUE(close(p.factor_gradient(), p.packed_factors(by_factor), {.l2 = 1e-3}));
  }
}

// ---------------------------------------------------------------------------------------------------------- the step
struct Moments {
  Doubles m, v;
  explicit Moments(size_t n) : m(n), v(n) {}
  double step(size_t i, double g, const StepState& s) {
    m[i] = adam_beta1 * m[i] + (1 - double(adam_beta1)) * g;
    v[i] = adam_beta2 * v[i] + (1 - double(adam_beta2)) * g * g;
    return m[i] * s.correction1 / (std::sqrt(v[i] * s.correction2) + adam_epsilon);
  }
};

void check_steps(int d, int blocks, int replicas, int groups, int steps, bool extra, bool data = true) {
  SCOPED_TRACE(testing::Message() << "d " << d << ", " << blocks << " blocks, " << replicas << " replicas, " << groups
                                  << " groups" << (extra ? ", extra" : "") << (data ? "" : ", no draws"));
  Posterior p(d, blocks, replicas, groups);
  randomize(p, d);
  std::vector<StepState> states;
  for (int r = 0; r < replicas; r++) states.push_back(state_of(0.01f + 0.01f * r, 0.02f, 0.3f / (r + 1), 7 + r));
  p.states->set(states);
  Doubles mean = doubles(p.mean->host()), factor = doubles(p.factor->host());
  const Doubles first_mean = mean, first_factor = factor;
  const Doubles prior_mean = doubles(p.prior_mean->host()), prior_factor = doubles(p.prior_factor->host());
  Moments of_mean(mean.size()), of_factor(factor.size());
  Doubles totals(replicas, 0);
  for (int t = 0; t < steps; t++) {
    const std::vector<float> up = normals(p.stride * replicas * groups, 300 + t, 0.5f);
    const std::vector<float> by_mean = normals(mean.size(), 400 + t), by_factor = normals(factor.size(), 500 + t, 1);
    p.grad_w->set(up);
    p.extra_mean->set(by_mean), p.extra_factor->set(by_factor);
    advance_step(*p.states, replicas, p.memory.stream());
    states = p.states->host();

    Doubles want_w(p.stride * replicas * groups, NAN);
    for (int r = 0; r < replicas; r++)
      for (int b = 0; b < blocks; b++) {
        const size_t at = p.stride * r + b * d, factor_at = p.factor_stride * r + b * packed(d);
        const Lower l = from_stored(&factor[factor_at], d), prior = from_stored(&prior_factor[factor_at], d);
        const auto kl = divergence_of({mean.begin() + at, mean.begin() + at + d}, l,
                                      {prior_mean.begin() + at, prior_mean.begin() + at + d}, prior);
        totals[r] += kl.kl;
        Doubles g_mean(d);
        Lower g(d);
        for (int i = 0; i < d; i++) g_mean[i] = states[r].kl_now * kl.by_mean[i];
        for (size_t k = 0; k < g.values.size(); k++) g.values[k] = states[r].kl_now * kl.by_factor.values[k];
        for (int group = 0; group < groups; group++) {
          const size_t row = p.stride * (r * groups + group) + b * d;
          Doubles e(d);
          for (int i = 0; i < d; i++) e[i] = noise_of(states[r], group, blocks, b, d, i);
          const Doubles noise = times(l, e);
          for (int i = 0; i < d; i++) {
            want_w[row + i] = mean[at + i] + noise[i];
            if (!data) continue;
            g_mean[i] += up[row + i];
            for (int j = 0; j <= i; j++) g(i, j) += up[row + i] * e[j];
          }
        }
        Doubles g_factor = gradient_to_stored(g, l);
        for (int i = 0; i < d; i++)
          mean[at + i] -=
              states[r].lr_mean * of_mean.step(at + i, g_mean[i] + (extra ? by_mean[at + i] : 0), states[r]);
        for (int k = 0; k < packed(d); k++)
          factor[factor_at + k] -=
              states[r].lr_scale *
              of_factor.step(factor_at + k, g_factor[k] + (extra ? by_factor[factor_at + k] : 0), states[r]);
      }
    const std::vector<float> w = p.sample();
    const auto rows = [&](const auto& all) {
      return Posterior::gathered(all, p.stride, blocks * d, replicas * groups);
    };
    EXPECT_TRUE(close(rows(w), rows(want_w), {.l2 = 2e-6}));
    p.step(data, extra);
  }
  auto moved = [](Doubles now, const Doubles& first) {
    for (size_t i = 0; i < now.size(); i++) now[i] -= first[i];
    return now;
  };
  // What lies between the replicas is as it was, so these compare whole arrays.
  EXPECT_TRUE(close(doubles(p.mean->host()), mean, {.l2 = 2e-6}));
  EXPECT_TRUE(close(doubles(p.factor->host()), factor, {.l2 = 5e-6}));
  EXPECT_TRUE(close(moved(doubles(p.mean->host()), first_mean), moved(mean, first_mean), {.l2 = 1e-4}));
  EXPECT_TRUE(
      close(moved(doubles(p.factor->host()), first_factor), moved(factor, first_factor), {.l2 = 1e-4, .worst = 3e-3}));
  EXPECT_TRUE(close(doubles(p.mean_m->host()), of_mean.m, {.l2 = 5e-6}));
  EXPECT_TRUE(close(doubles(p.mean_v->host()), of_mean.v, {.l2 = 5e-6}));
  EXPECT_TRUE(close(doubles(p.factor_m->host()), of_factor.m, {.l2 = 5e-6}));
  EXPECT_TRUE(close(doubles(p.factor_v->host()), of_factor.v, {.l2 = 5e-6}));
  for (int r = 0; r < replicas; r++) {
    EXPECT_NEAR(p.kl->host()[2 * r], totals[r], 3e-6 * totals[r]);
    EXPECT_EQ(p.kl->host()[2 * r + 1], 0);
  }
  const std::string name = "cholesky_step." + std::to_string(d) + "." + std::to_string(blocks) + "." +
                           std::to_string(groups) + (extra ? ".extra" : "");
  record(name + ".w", Posterior::gathered(p.w->host(), p.stride, blocks * d, replicas * groups), 5e-6f);
  record(name + ".mean", p.mean->host(), 1e-5f);
  record(name + ".factor", p.factor->host(), 1e-4f);
  record(name + ".factor_m", p.factor_m->host(), 1e-5f);
  record(name + ".kl", {float(p.kl->host()[0])}, 2e-6f);
}

TEST(Cholesky, SmallStepsAgainstReference) {
  BATON_NEEDS_DEVICE();
  check_steps(9, 2, 2, 2, 2, true);
  check_steps(6, 1, 1, 1, 1, false);
}

TEST(Cholesky, StepsAgainstReference) {
  BATON_NEEDS_DEVICE();
  check_steps(25, 7, 2, 1, 4, false);
  check_steps(25, 3, 1, 3, 3, true);
  check_steps(9, 20, 2, 2, 4, true);
  check_steps(49, 2, 2, 2, 3, true);
  check_steps(48, 2, 1, 1, 2, false);
  for (int d : {1, 2, 4, 8, 31, 32, 33}) check_steps(d, 3, 1, 2, 2, d % 2);
  check_steps(25, 3, 2, 1, 3, true, false);  // the moments' gradients alone
  check_steps(4, 300, 1, 1, 2, false);       // more blocks than the sum has threads
}

TEST(Cholesky, HaltedReplicasStandStill) {
  BATON_NEEDS_DEVICE();
  Posterior p(9, 3, 2);
  randomize(p, 1);
  std::vector<StepState> states(2, held_state(1));
  for (StepState& s : states) s.lr_mean = s.lr_scale = 0.1f;
  states[0].halted = 11;
  p.states->set(states);
  const std::vector<float> mean = p.mean->host(), factor = p.factor->host();
  p.step();
  EXPECT_EQ(p.kl->host()[0], 0);
  EXPECT_GT(p.kl->host()[2], 0);
  auto changed = [](const std::vector<float>& now, const std::vector<float>& before, size_t first, size_t last) {
    size_t n = 0;
    for (size_t i = first; i < last; i++) n += now[i] != before[i];
    return n;
  };
  EXPECT_EQ(changed(p.mean->host(), mean, 0, p.stride), 0u);
  EXPECT_EQ(changed(p.factor->host(), factor, 0, p.factor_stride), 0u);
  EXPECT_EQ(changed(p.factor_m->host(), std::vector<float>(factor.size()), 0, p.factor_stride), 0u);
  EXPECT_EQ(changed(p.mean->host(), mean, p.stride, 2 * p.stride), 27u);
  EXPECT_EQ(changed(p.factor->host(), factor, p.factor_stride, 2 * p.factor_stride), 3u * packed(9));
}

TEST(Cholesky, RefusesShapes) {
  CholeskyArrays a{};
  a.blocks = 4, a.d = 9, a.replicas = 2, a.stride = 36, a.factor_stride = 4 * 45;
  auto all_throw = [&] {
    EXPECT_THROW(cholesky_sample(nullptr, 36, a, 1, nullptr, 0, {}), InputError);
    EXPECT_THROW(cholesky_step(a, nullptr, 0, 1, 0, nullptr, nullptr, nullptr, nullptr, 1, nullptr, {}), InputError);
    EXPECT_THROW(cholesky_kl(nullptr, 1, a, nullptr, {}), InputError);
  };
  a.stride = 35, all_throw(), a.stride = 36;
  a.factor_stride = 179, all_throw(), a.factor_stride = 180;
  a.d = 50, a.stride = a.factor_stride = 10000, all_throw(), a.d = 0, all_throw(), a.d = 9;
  a.blocks = 0, all_throw(), a.blocks = 4;
  a.replicas = 0, all_throw(), a.replicas = 2;
  EXPECT_THROW(cholesky_sample(nullptr, 36, a, 0, nullptr, 0, {}), InputError);
  EXPECT_THROW(cholesky_sample(nullptr, 35, a, 1, nullptr, 0, {}), InputError);
  EXPECT_THROW(cholesky_step(a, a.mean + 1, 35, 1, 0, nullptr, nullptr, nullptr, nullptr, 1, nullptr, {}), InputError);
  EXPECT_THROW(cholesky_sample_draws(nullptr, 36, nullptr, nullptr, 4, 9, 0, 0, {}, 0, {}), InputError);
  EXPECT_THROW(cholesky_sample_draws(nullptr, 35, nullptr, nullptr, 4, 9, 0, 2, {}, 0, {}), InputError);
  EXPECT_THROW(cholesky_invert(nullptr, nullptr, 179, 4, 9, 2, {}), InputError);
  EXPECT_THROW(cholesky_from_diagonal(nullptr, 180, nullptr, 0, 4, 64, 1, {}), InputError);
  EXPECT_THROW(cholesky_marginals(nullptr, 35, nullptr, 0, 4, 9, 2, {}), InputError);
}

// -------------------------------------------------------------------------------------------------------- the sampler
// L = I, mu = 0: the draws are the noise itself, bit for bit.
TEST(Cholesky, DrawsTheDocumentedNoise) {
  BATON_NEEDS_DEVICE();
  for (int d : {1, 9, 25, 30}) {
    Posterior p(d, 3, 2, 2);
    std::vector<StepState> states{held_state(1, 7), held_state(1, 8)};
    p.states->set(states);
    const std::vector<float> w = p.sample();
    for (int q = 0; q < 4; q++)
      for (int b = 0; b < 3; b++)
        for (int i = 0; i < d; i++)
          EXPECT_EQ(w[p.stride * q + b * d + i], noise_of(states[q / 2], q % 2, 3, b, d, i)) << d;
    if (d == 25) record("cholesky_sample.noise", Posterior::gathered(w, p.stride, 3 * d, 4), 0);

    StepState s = states[0];
    Buffer<float> draws(p.memory, 5 * p.stride, NAN), split(p.memory, 2 * p.stride, NAN);
    cholesky_sample_draws(draws, p.stride, *p.mean, *p.factor, 3, d, 40, 5, s.noise, stream_id, p.memory.stream());
    cholesky_sample_draws(split, p.stride, *p.mean, *p.factor, 3, d, 43, 2, s.noise, stream_id, p.memory.stream());
    const std::vector<float> all = draws.host(), part = split.host();
    EXPECT_TRUE(exact(std::vector<float>(all.begin() + 3 * p.stride, all.end()), part));
    for (int row = 0; row < 5; row++)
      for (int b = 0; b < 3; b++)
        for (int i = 0; i < d; i++) {
          s.step = 40 + row;
          EXPECT_EQ(all[p.stride * row + b * d + i], noise_of(s, 0, 3, b, d, i)) << d;
        }
  }
}

TEST(Cholesky, DrawsHaveTheirDistribution) {
  BATON_NEEDS_DEVICE();
  const int d = 9, samples = 20000;
  Posterior p(d, 2);
  p.mean->set(normals(p.stride, 1)), p.factor->set(random_factor(p, 2, -0.5f, 2.f));
  Buffer<float> draws(p.memory, p.stride * samples, NAN);
  cholesky_sample_draws(draws, p.stride, *p.mean, *p.factor, 2, d, 0, samples, key_of(5), stream_id, p.memory.stream());
  const std::vector<float> w = draws.host(), mean = p.mean->host();
  const Doubles factor = doubles(p.factor->host());
  for (int b = 0; b < 2; b++) {
    const Lower l = from_stored(&factor[b * packed(d)], d);
    auto covariance = [&](int i, int j) {
      double sum = 0;
      for (int k = 0; k <= std::min(i, j); k++) sum += l(i, k) * l(j, k);
      return sum;
    };
    auto away = [&](int s, int i) { return double(w[p.stride * s + b * d + i]) - mean[b * d + i]; };
    for (int i = 0; i < d; i++) {
      double sum = 0;
      for (int s = 0; s < samples; s++) sum += away(s, i);
      EXPECT_LT(std::abs(sum / samples), 4.5 * std::sqrt(covariance(i, i) / samples)) << i;
      for (int j = 0; j <= i; j++) {
        double product = 0;
        for (int s = 0; s < samples; s++) product += away(s, i) * away(s, j);
        const double want = covariance(i, j), sd = std::sqrt(covariance(i, i) * covariance(j, j) + want * want);
        EXPECT_LT(std::abs(product / samples - want), 4.5 * sd / std::sqrt(samples)) << i << ", " << j;
      }
    }
    Doubles u;  // Kolmogorov and Smirnov, the last component
    for (int s = 0; s < samples; s++)
      u.push_back(0.5 * std::erfc(-away(s, d - 1) / std::sqrt(2 * covariance(d - 1, d - 1))));
    std::sort(u.begin(), u.end());
    double distance = 0;
    for (int s = 0; s < samples; s++)
      distance = std::max({distance, (s + 1.0) / samples - u[s], u[s] - double(s) / samples});
    EXPECT_LT(distance * std::sqrt(samples), 1.95);  // 1 in 1000
  }
  // Blocks are independent.
  double product = 0, scale = 0;
  for (int s = 0; s < samples; s++) {
    const double a = w[p.stride * s] - mean[0], b = w[p.stride * s + d] - mean[d];
    product += a * b, scale += a * a * b * b;
  }
  EXPECT_LT(std::abs(product), 4.5 * std::sqrt(scale));
}

// --------------------------------------------------------------------------------------------------------- identities
TEST(Cholesky, DiagonalFactorHasTheDiagonalGaussiansDivergence) {
  BATON_NEEDS_DEVICE();
  const int d = 25, blocks = 6, n = d * blocks;
  Posterior p(d, blocks);
  Memory& memory = p.memory;
  Buffer log_std(memory, normals(n, 3, -2)), prior_log_std(memory, normals(n, 4, -1.5f)),
      variance(memory, normals(n, 0));
  p.mean->set(normals(p.stride, 1)), p.prior_mean->set(normals(p.stride, 2));
  cholesky_from_diagonal(*p.factor, p.factor_stride, log_std, n, blocks, d, 1, memory.stream());
  cholesky_from_diagonal(*p.prior_factor, p.factor_stride, prior_log_std, n, blocks, d, 1, memory.stream());
  p.set_prior(p.prior_mean->host(), p.prior_factor->host());

  GaussianArrays g{};
  g.mean = *p.mean, g.prior_mean = *p.prior_mean, g.log_std = log_std, g.prior_log_std = prior_log_std;
  g.variance = variance, g.stride = g.count = n, g.replicas = 1;
  const auto table = pieces_of({{0, n, 0}});
  Buffer pieces(memory, table);
  Buffer<float> partial(memory, table.size());
  Buffer<double> kl(memory, 1, 0.);
  gaussian_kl({kl, 1}, g, {pieces, int(table.size()), 1}, partial, memory.stream());
  EXPECT_TRUE(close(p.divergence(), kl.host(), {.l2 = 1e-6}));

  Buffer<float> marginals(memory, n, NAN);
  cholesky_marginals(marginals, n, *p.factor, p.factor_stride, blocks, d, 1, memory.stream());
  EXPECT_TRUE(exact(marginals.host(), log_std.host()));
}

TEST(Cholesky, InverseAndMarginals) {
  BATON_NEEDS_DEVICE();
  for (int d : {1, 6, 9, 25, 49}) {
    SCOPED_TRACE(d);
    Posterior p(d, 3, 2);
    const std::vector<float> stored = random_factor(p, d, -2, 2.f);
    p.set_prior(p.mean->host(), stored);
    Doubles want(stored.size(), 0), sds(p.stride * 2, 0);
    const Doubles factor = doubles(stored);
    for (int r = 0; r < 2; r++)
      for (int b = 0; b < 3; b++) {
        const size_t at = p.factor_stride * r + b * packed(d);
        const Lower l = from_stored(&factor[at], d);
        std::copy_n(inverse_of(l).values.begin(), packed(d), want.begin() + at);
        for (int i = 0; i < d; i++) {
          double sum = 0;
          for (int j = 0; j <= i; j++) sum += l(i, j) * l(i, j);
          sds[p.stride * r + b * d + i] = 0.5 * std::log(sum);
        }
      }
    EXPECT_TRUE(close(p.prior_inverse->host(), want, {.l2 = 1e-7}));
    Buffer<float> log_std(p.memory, p.stride * 2);
    cholesky_marginals(log_std, p.stride, *p.prior_factor, p.factor_stride, 3, d, 2, p.memory.stream());
    EXPECT_TRUE(close(log_std.host(), sds, {.l2 = 2e-7}));

    Buffer<float> diagonal(p.memory, p.factor_stride * 2, 9.f);
    cholesky_from_diagonal(diagonal, p.factor_stride, log_std, p.stride, 3, d, 2, p.memory.stream());
    std::vector<float> want_diagonal(p.factor_stride * 2, 9.f);
    const std::vector<float> logs = log_std.host();
    for (int r = 0; r < 2; r++)
      for (int b = 0; b < 3; b++)
        for (int i = 0; i < d; i++)
          for (int j = 0; j <= i; j++)
            want_diagonal[p.factor_stride * r + b * packed(d) + entry(i, j)] =
                i == j ? logs[p.stride * r + b * d + i] : 0;
    EXPECT_TRUE(exact(diagonal.host(), want_diagonal));
  }
}

// Standard deviations from 1e-4 to 1 within a block, and correlations up to 0.95.
TEST(Cholesky, ExtremeFactors) {
  BATON_NEEDS_DEVICE();
  const int d = 25, blocks = 2;
  Posterior p(d, blocks);
  auto extreme = [&](int seed) {
    std::vector<float> f = random_factor(p, seed, 0, 1.5f);
    const std::vector<float> u = normals(f.size(), seed);
    for (int b = 0; b < blocks; b++)
      for (int i = 0; i < d; i++) f[b * packed(d) + entry(i, i)] = -9.2f * ((i * 7 + b) % d) / d + 0.1f * u[i];
    return f;
  };
  p.factor->set(extreme(1)), p.set_prior(normals(p.stride, 5, 0, 1e-4f), extreme(2));
  p.mean->set(normals(p.stride, 6, 0, 1e-4f));
  p.states->set({held_state(1)});
  p.step(false);
  const Doubles factor = doubles(p.factor->host()), prior = doubles(p.prior_factor->host());
  const Doubles mean = doubles(p.mean->host()), prior_mean = doubles(p.prior_mean->host());
  Doubles kls, by_mean, by_factor;
  for (int b = 0; b < blocks; b++) {
    const Lower l = from_stored(&factor[b * packed(d)], d), l0 = from_stored(&prior[b * packed(d)], d);
    double least = 1, most = 0;
    for (int i = 0; i < d; i++) least = std::min(least, l(i, i)), most = std::max(most, l(i, i));
    EXPECT_GT(most / least, 5e3);
    const auto reference = divergence_of({mean.begin() + b * d, mean.begin() + (b + 1) * d}, l,
                                         {prior_mean.begin() + b * d, prior_mean.begin() + (b + 1) * d}, l0);
    kls.push_back(reference.kl);
    by_mean.insert(by_mean.end(), reference.by_mean.begin(), reference.by_mean.end());
    const Doubles g = gradient_to_stored(reference.by_factor, l);
    by_factor.insert(by_factor.end(), g.begin(), g.end());
  }
  EXPECT_TRUE(close(doubles(p.partial->host()), kls, {.l2 = 1e-5}));
  EXPECT_TRUE(close(p.mean_gradient(), by_mean, {.l2 = 1e-5}));
  EXPECT_TRUE(close(p.factor_gradient(), by_factor, {.l2 = 1e-5}));
}

}  // namespace
}  // namespace baton::test
