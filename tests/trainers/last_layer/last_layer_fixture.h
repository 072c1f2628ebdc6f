// What the tests of a last layer's posterior and of its updates share.
#pragma once
#include <unistd.h>

#include <filesystem>
#include <map>

#include "engine/io/safetensors.h"
#include "tests/trainers/last_layer/samples.h"
#include "trainers/last_layer/last_layer.h"

namespace baton::test {

inline Doubles random_weights(int classes, int dim, uint64_t seed) {
  SplitMix64 random(seed);
  Doubles w;
  for (int i = 0; i < classes * dim; i++) w.push_back(random.normal() / std::sqrt(double(dim)));
  return w;
}

inline Device& the_device() { return Memory().device(); }  // one for the process

// What save() writes, as one map of everything.
using Snapshot = std::map<std::string, std::string>;
inline std::filesystem::path temporary(const std::string& name) {
  return std::filesystem::temp_directory_path() /
         ("baton_last_layer_" + name + "_" + std::to_string(::getpid()) + ".safetensors");
}
template <class Real>
Snapshot snapshot(LastLayer<Real>& layer) {
  const std::filesystem::path path = temporary("snapshot");
  layer.save(path);
  const TensorFile file = load_safetensors(path);
  std::filesystem::remove(path);
  Snapshot all(file.metadata.begin(), file.metadata.end());
  for (const auto& [name, tensor] : file.tensors)
    all["tensor " + name] =
        tensor.dtype + shape_text(tensor.shape) + std::string(tensor.bytes.begin(), tensor.bytes.end());
  return all;
}
inline testing::AssertionResult same(const Snapshot& got, const Snapshot& want) {
  for (const auto& [name, value] : want)
    if (!got.count(name) || got.at(name) != value) return testing::AssertionFailure() << name << " differs";
  if (got.size() != want.size()) return testing::AssertionFailure() << "more than there was";
  return testing::AssertionSuccess();
}

inline Doubles product(const Doubles& a, const Doubles& b, int n) {
  Doubles c(size_t(n) * n, 0);
  for (int i = 0; i < n; i++)
    for (int k = 0; k < n; k++)
      for (int j = 0; j < n; j++) c[size_t(i) * n + j] += a[size_t(i) * n + k] * b[size_t(k) * n + j];
  return c;
}
inline Doubles identity(int n) {
  Doubles eye(size_t(n) * n, 0);
  for (int i = 0; i < n; i++) eye[size_t(i) * n + i] = 1;
  return eye;
}
inline double apart(const Doubles& got, const Doubles& want) { return difference(got, want).l2; }

template <class Real>
constexpr bool wide = sizeof(Real) == 8;
template <class Real>
constexpr double either(double in_double, double in_float) {
  return wide<Real> ? in_double : in_float;
}
template <class Real>
Tolerance tolerance(double in_double, double in_float) {
  const double t = either<Real>(in_double, in_float);
  return {.l2 = t, .worst = t, .bias = t};
}

inline LastLayerOptions with(double tau, SampleWeight weight, int refactor_after = 1000) {
  return {.tau = tau, .weight = weight, .refactor_after = refactor_after};
}
inline LastLayerUpdateOptions rule_of(UpdateRule rule, double gamma = 10, int passes = 1) {
  return {.rule = rule, .gamma = gamma, .passes = passes};
}
constexpr UpdateRule all_rules[] = {UpdateRule::implicit, UpdateRule::gaussian, UpdateRule::categorical,
                                    UpdateRule::categorical_published};

// A posterior fitted to `base` random samples; `more` others lie ready.
template <class Real>
struct Fitted {
  Fitted(int dim, int classes, int base, int more, SampleWeight weight = SampleWeight::categorical,
         int refactor_after = 1000, double tau = 1)
      : samples(normal_samples(base + more, dim, classes, 21)),
        rows(samples),
        fitted(rows.part(0, base)),
        fresh(rows.part(base, more)),
        weights(random_weights(classes, dim, 22)),
        layer(rows.device(), dim, classes, with(tau, weight, refactor_after)) {
    layer.fit_covariance(fitted, weights);
  }
  FeatureRows<Real> next(int first, int count) { return fresh.part(first, count); }
  Samples samples;
  Rows<Real> rows;
  FeatureRows<Real> fitted, fresh;
  Doubles weights;
  LastLayer<Real> layer;
};

template <class Real>
class LastLayerOf : public testing::Test {};
using Precisions = testing::Types<float, double>;
struct PrecisionNames {
  template <class T>
  static std::string GetName(int) {
    return wide<T> ? "Double" : "Float";
  }
};
TYPED_TEST_SUITE(LastLayerOf, Precisions, PrecisionNames);

}  // namespace baton::test
