// Random weights, the states of a step, and the noise of bgd.h by its definition.
#pragma once
#include "kernels/bgd.h"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"

namespace baton::test {
namespace {

inline std::vector<float> normals(size_t n, int seed, float mean = 0, float sd = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(mean, sd);
  std::vector<float> v(n);
  for (float& x : v) x = normal(random);
  return v;
}
// Positive, spread over several octaves.
inline std::vector<float> deviations(size_t n, int seed, float median = 0.06f, float spread = 1) {
  std::vector<float> v = normals(n, seed, 0, spread);
  for (float& x : v) x = median * std::exp(x);
  return v;
}
inline std::vector<uint32_t> bits(const std::vector<float>& v) {
  std::vector<uint32_t> b(v.size());
  if (!v.empty()) std::memcpy(b.data(), v.data(), v.size() * sizeof(float));
  return b;
}
template <class T>
std::vector<double> doubles(const std::vector<T>& v) {
  return {v.begin(), v.end()};
}

// The states of `replicas` draws at a step; the first counts, so the others have keys of their own.
inline std::vector<StepState> states_of(uint32_t step, float eta = 1, int replicas = 1, int seed = 5) {
  std::vector<StepState> states(replicas);
  for (int r = 0; r < replicas; r++) {
    states[r].noise = key_of(seed + r);
    states[r].step = step + 100 * r;
    states[r].lr_mean = eta + r;
  }
  states.back().step = step;
  states.front().step = step;
  return states;
}

// e(k, i), as the head note of bgd.h defines it.
inline float noise_of(const StepState& s, int draw, int place) {
  const float4 e = normal4(s.noise, place / 4, stream_weights, s.step, draw);
  const float lanes[4] = {e.x, e.y, e.z, e.w};
  return lanes[place % 4];
}

}  // namespace
}  // namespace baton::test
