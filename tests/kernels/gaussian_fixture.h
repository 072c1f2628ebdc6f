// A Gaussian posterior on the device, and one with multiplicative variables.
#pragma once
#include "kernels/gaussian.h"

#include <algorithm>
#include <memory>
#include <random>
#include <vector>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"

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
    accumulated = std::make_unique<Buffer<double>>(memory, size_t(replicas) * slots);
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
    gaussian_step(arrays(), rule, table(), *states, {*accumulated, size_t(slots)}, *partial, memory.stream(), z);
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
  std::unique_ptr<Buffer<double>> accumulated, kl;
};

inline StepState state_of(float lr_mean, float lr_scale, float kl_weight, int steps = 1000,
                          Schedule schedule = Schedule::constant) {
  StepState s{};
  s.noise = key_of(7);
  s.stage_steps = steps;
  s.schedule = schedule;
  s.base_lr_mean = lr_mean, s.base_lr_scale = lr_scale;
  s.kl_weight = kl_weight;
  return s;
}

inline std::vector<float> normals(size_t n, int seed, float mean = 0, float sd = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(mean, sd);
  std::vector<float> v(n);
  for (float& x : v) x = normal(random);
  return v;
}

inline void randomize(Posterior& p, int seed) {
  const size_t n = p.stride * p.replicas;
  p.mean->set(normals(n, seed)), p.set_sd(normals(n, seed + 1, -2, 0.5f));
  p.prior_mean->set(normals(n, seed + 2)), p.prior_log_std->set(normals(n, seed + 3, -1.5f, 0.5f));
  p.grad_mean->set(normals(n, seed + 4)), p.grad_variance->set(normals(n, seed + 5, 0, 3));
}

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

// KL of one parameter, in double; the stable form.
inline double kl_of(double mean, double log_std, double prior_mean, double prior_log_std) {
  const double t = log_std - prior_log_std, e = (mean - prior_mean) / std::exp(prior_log_std);
  return 0.5 * (std::expm1(2 * t) + e * e) - t;
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
        parts(p.memory, z_parts_of(p.runs)) {
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
    multiplier_gradient(dz, p.arrays(), {parts, int(parts.size())}, multipliers(), *p.states, p.memory.stream());
  }

  int groups;
  Run blocks, columns, plain;
  size_t z_stride;
  Posterior p;
  size_t grad_stride;
  int rows;
  Buffer<float> z, dz, grad, w;
  Buffer<ZPart> parts;
};
const ZShape small_shape{6, 5, 9, 7, 4};
const ZShape large_shape{180, 25, 130, 70, 300}, tall_shape{2, 3, 5, 1100, 1};  // several pieces and segments; rounds

}  // namespace
}  // namespace baton::test
