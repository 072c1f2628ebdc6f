// Draws of Gaussian weights, and their initial values.
#include <algorithm>
#include <cmath>

#include "tests/kernels/gaussian_fixture.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

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
