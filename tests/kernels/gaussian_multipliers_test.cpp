// Gaussian weights under multiplicative variables.
#include "tests/kernels/gaussian_fixture.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

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
  std::vector<double> accumulated(size_t(replicas) * 3), now;
  for (int t = 0; t < steps; t++) {
    std::vector<float> grad = normals(m.grad_stride * m.rows, 300 + t), plain = normals(n, 400 + t);
    const std::vector<float> grad_variance = normals(n, 500 + t, 0, 3);
    for (float& g : grad) g = g < 0 ? g - 3 : g + 3;  // away from 0, where Adam's direction is not smooth
    for (float& g : plain) g = g < 0 ? g - 3 : g + 3;
    m.grad.set(grad), p.grad_mean->set(plain), p.grad_variance->set(grad_variance);
    p.advance();
    now.assign(accumulated.size(), 0);
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
    for (size_t i = 0; i < now.size(); i++) accumulated[i] += now[i];
  }
  EXPECT_TRUE(close(p.accumulated->host(), accumulated, {.l2 = 2e-6}));
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
  record(name + ".kl", {float(p.accumulated->host()[0]), float(p.accumulated->host()[2])});
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
  EXPECT_TRUE(close(m.p.accumulated->host(), plain.accumulated->host(), {.l2 = 1e-7}));
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
  record("multiplier_gradient." + std::to_string(groups) + "." + std::to_string(shape.filters), got, 2e-6f);
}
TEST(Multipliers, SmallGradientAgainstReference) {
  BATON_NEEDS_DEVICE();
  for (int groups : {1, 3}) check_multiplier_gradient(small_shape, groups);
}
TEST(Multipliers, GradientAgainstReference) {
  BATON_NEEDS_DEVICE();
  for (int groups : {1, 3})
    for (const ZShape& shape : {large_shape, tall_shape}) check_multiplier_gradient(shape, groups);
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

}  // namespace
}  // namespace baton::test
