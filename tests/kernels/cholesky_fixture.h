// Channel factorized Gaussians: a reference in double, and a posterior on the device.
#pragma once
#include "kernels/cholesky.h"

#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"

namespace baton::test {
namespace {

using Doubles = std::vector<double>;
constexpr uint32_t stream_id = stream_weights + 3;

inline int entry(int i, int j) { return i * (i + 1) / 2 + j; }
inline Doubles doubles(const std::vector<float>& v) { return {v.begin(), v.end()}; }
inline std::vector<float> floats(const Doubles& v) { return {v.begin(), v.end()}; }

inline std::vector<float> normals(size_t n, int seed, float mean = 0, float sd = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(mean, sd);
  std::vector<float> v(n);
  for (float& x : v) x = normal(random);
  return v;
}

inline StepState state_of(float lr_mean, float lr_scale, float kl_weight, int seed = 7) {
  StepState s{};
  s.noise = key_of(seed);
  s.step = 11;
  s.stage_steps = 50;
  s.schedule = Schedule::linear;
  s.base_lr_mean = lr_mean, s.base_lr_scale = lr_scale;
  s.kl_weight = kl_weight;
  return s;
}
// A state as it is within a step: size 0, Adam's moments those of the gradient.
inline StepState held_state(float kl_now, int seed = 7) {
  StepState s = state_of(0, 0, kl_now, seed);
  s.kl_now = kl_now;
  s.correction1 = s.correction2 = 1;
  return s;
}

// ----------------------------------------------------------------------------------------- reference, in double
// A lower triangular matrix of one block, packed as in the kernels, but as it is.
struct Lower {
  explicit Lower(int d_) : d(d_), values(packed(d_)) {}
  double& operator()(int i, int j) { return values[entry(i, j)]; }
  double operator()(int i, int j) const { return values[entry(i, j)]; }
  int d;
  Doubles values;
};

inline Lower from_stored(const double* stored, int d) {
  Lower l(d);
  for (int i = 0; i < d; i++) {
    l(i, i) = std::exp(stored[entry(i, i)]);
    for (int j = 0; j < i; j++) l(i, j) = stored[entry(i, j)] * l(i, i);
  }
  return l;
}
inline Doubles to_stored(const Lower& l) {
  Doubles stored = l.values;
  for (int i = 0; i < l.d; i++) {
    stored[entry(i, i)] = std::log(l(i, i));
    for (int j = 0; j < i; j++) stored[entry(i, j)] = l(i, j) / l(i, i);
  }
  return stored;
}
// From the gradient by L to that by stored coordinates.
inline Doubles gradient_to_stored(const Lower& g, const Lower& l) {
  Doubles stored = g.values;
  for (int i = 0; i < l.d; i++) {
    stored[entry(i, i)] = g(i, i) * l(i, i);
    for (int j = 0; j < i; j++) {
      stored[entry(i, i)] += g(i, j) * l(i, j);
      stored[entry(i, j)] = g(i, j) * l(i, i);
    }
  }
  return stored;
}
inline Lower inverse_of(const Lower& l) {
  Lower x(l.d);
  for (int j = 0; j < l.d; j++)
    for (int i = j; i < l.d; i++) {
      double sum = i == j;
      for (int k = j; k < i; k++) sum -= l(i, k) * x(k, j);
      x(i, j) = sum / l(i, i);
    }
  return x;
}
// x = L y, and x = L^T y.
inline Doubles times(const Lower& l, const Doubles& y) {
  Doubles x(l.d, 0);
  for (int i = 0; i < l.d; i++)
    for (int j = 0; j <= i; j++) x[i] += l(i, j) * y[j];
  return x;
}
inline Doubles transposed_times(const Lower& l, const Doubles& y) {
  Doubles x(l.d, 0);
  for (int i = 0; i < l.d; i++)
    for (int j = 0; j <= i; j++) x[j] += l(i, j) * y[i];
  return x;
}

struct BlockDivergence {
  double kl = 0;
  Doubles by_mean;
  Lower by_factor;
};
inline BlockDivergence divergence_of(const Doubles& mean, const Lower& l, const Doubles& prior_mean,
                                     const Lower& prior) {
  const int d = l.d;
  const Lower inverse = inverse_of(prior);
  BlockDivergence result{0, {}, Lower(d)};
  Doubles away(d);
  for (int i = 0; i < d; i++) away[i] = mean[i] - prior_mean[i];
  const Doubles z = times(inverse, away);
  result.by_mean = transposed_times(inverse, z);
  for (int i = 0; i < d; i++) result.kl += 0.5 * (z[i] * z[i] - 1) + std::log(prior(i, i) / l(i, i));
  for (int j = 0; j < d; j++) {
    Doubles column(d, 0);
    for (int i = j; i < d; i++) column[i] = l(i, j);
    const Doubles m = times(inverse, column), g = transposed_times(inverse, m);
    for (int i = j; i < d; i++) {
      result.kl += 0.5 * m[i] * m[i];
      result.by_factor(i, j) = g[i] - (i == j ? 1 / l(i, i) : 0);
    }
  }
  return result;
}

inline double noise_of(const StepState& s, int group, int blocks, int block, int d, int i) {
  const float4 e = normal4(s.noise, uint32_t((group * blocks + block) * ((d + 3) / 4) + i / 4), stream_id, s.step);
  return i % 4 == 0 ? e.x : i % 4 == 1 ? e.y : i % 4 == 2 ? e.z : e.w;
}

// ----------------------------------------------------------------------------------------- a posterior on the device
struct Posterior {
  Posterior(int d_, int blocks_, int replicas_ = 1, int groups_ = 1)
      : d(d_),
        blocks(blocks_),
        replicas(replicas_),
        groups(groups_),
        stride(size_t(blocks) * d + 3),
        factor_stride(size_t(blocks) * packed(d) + 5) {
    for (auto* b : {&mean, &prior_mean, &mean_m, &mean_v, &extra_mean})
      *b = std::make_unique<Buffer<float>>(memory, stride * replicas);
    for (auto* b : {&factor, &prior_factor, &prior_inverse, &factor_m, &factor_v, &extra_factor})
      *b = std::make_unique<Buffer<float>>(memory, factor_stride * replicas);
    for (auto* b : {&w, &grad_w}) *b = std::make_unique<Buffer<float>>(memory, stride * replicas * groups, NAN);
    partial = std::make_unique<Buffer<float>>(memory, size_t(blocks) * replicas, NAN);
    states = std::make_unique<Buffer<StepState>>(memory, size_t(replicas));
    kl = std::make_unique<Buffer<double>>(memory, size_t(2 * replicas), 0.);
  }
  CholeskyArrays arrays() {
    return {*mean,          *prior_mean, *mean_m,   *mean_v,       stride, *factor, *prior_factor,
            *prior_inverse, *factor_m,   *factor_v, factor_stride, blocks, d,       replicas};
  }
  void set_prior(const std::vector<float>& means, const std::vector<float>& factors) {
    prior_mean->set(means), prior_factor->set(factors);
    cholesky_invert(*prior_inverse, *prior_factor, factor_stride, blocks, d, replicas, memory.stream());
  }
  std::vector<float> sample() {
    cholesky_sample(*w, stride, arrays(), groups, *states, stream_id, memory.stream());
    return w->host();
  }
  void step(bool data = true, bool extra = false) {
    cholesky_step(arrays(), data ? grad_w->data() : nullptr, stride, groups, stream_id,
                  extra ? extra_mean->data() : nullptr, extra ? extra_factor->data() : nullptr, *states, *kl, 2,
                  *partial, memory.stream());
    partial->host();  // checks its guards
  }
  Doubles divergence() {
    Buffer<double> result(memory, size_t(2 * replicas), 9.);
    cholesky_kl(result, 2, arrays(), *partial, memory.stream());
    Doubles kls;
    for (int r = 0; r < replicas; r++) {
      kls.push_back(result.host()[2 * r]);
      EXPECT_EQ(result.host()[2 * r + 1], 9);
    }
    return kls;
  }
  // Of the tensors alone, without what lies between the replicas.
  template <class V>
  V packed_means(const V& all) const {
    return gathered(all, stride, size_t(blocks) * d, replicas);
  }
  template <class V>
  V packed_factors(const V& all) const {
    return gathered(all, factor_stride, size_t(blocks) * packed(d), replicas);
  }
  template <class V>
  static V gathered(const V& all, size_t stride, size_t count, int rows) {
    V v;
    for (int r = 0; r < rows; r++) v.insert(v.end(), all.begin() + stride * r, all.begin() + stride * r + count);
    return v;
  }
  // Adam's first moment after one step is (1 - beta1) times the gradient.
  Doubles mean_gradient() { return unscaled(packed_means(doubles(mean_m->host()))); }
  Doubles factor_gradient() { return unscaled(packed_factors(doubles(factor_m->host()))); }
  static Doubles unscaled(Doubles m) {
    for (double& x : m) x /= 1 - double(adam_beta1);
    return m;
  }

  Memory memory;
  int d, blocks, replicas, groups;
  size_t stride, factor_stride;
  std::unique_ptr<Buffer<float>> mean, prior_mean, mean_m, mean_v, extra_mean, factor, prior_factor, prior_inverse,
      factor_m, factor_v, extra_factor, w, grad_w, partial;
  std::unique_ptr<Buffer<StepState>> states;
  std::unique_ptr<Buffer<double>> kl;
};

inline std::vector<float> random_factor(const Posterior& p, int seed, float log_scale, float ratio = 0.4f) {
  std::vector<float> f = normals(p.factor_stride * p.replicas, seed, 0, ratio);
  const std::vector<float> logs = normals(f.size(), seed + 50, log_scale, 0.4f);
  for (int r = 0; r < p.replicas; r++)
    for (int b = 0; b < p.blocks; b++)
      for (int i = 0; i < p.d; i++) {
        const size_t at = p.factor_stride * r + size_t(b) * packed(p.d);
        for (int j = 0; j < i; j++) f[at + entry(i, j)] /= std::sqrt(float(p.d));
        f[at + entry(i, i)] = logs[at + entry(i, i)];
      }
  return f;
}
inline void randomize(Posterior& p, int seed) {
  const size_t n = p.stride * p.replicas;
  p.mean->set(normals(n, seed)), p.factor->set(random_factor(p, seed + 1, -1));
  p.set_prior(normals(n, seed + 2), random_factor(p, seed + 3, -0.5f));
  p.grad_w->set(normals(n * p.groups, seed + 4));
}

}  // namespace
}  // namespace baton::test
