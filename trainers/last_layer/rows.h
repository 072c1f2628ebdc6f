// Rows of features with their labels, in device memory, and the checks that everything which reads them makes.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "engine/linalg.h"
#include "kernels/last_layer.h"

namespace baton {

using Doubles = std::vector<double>;

template <class Real>
struct FeatureRows {
  const Real* x;          // [count][dim]
  const int32_t* labels;  // [count]; may be null where only the features are wanted
  int count, dim;

  FeatureRows part(int first, int n) const {
    return {x + size_t(first) * dim, labels ? labels + first : nullptr, n, dim};
  }
};

// Device memory from an arena, or from a frame of scratch memory, with a copy of `host`.
template <class Memory, class T>
T* place(Device& device, Memory& memory, const std::vector<T>& host) {
  T* copy = memory.template take<T>(host.size());
  upload(device, copy, host);
  return copy;
}
// The same for the rows [index.size()][dim] of x that the index names.
template <class Memory, class Real>
Real* place_rows(Device& device, Memory& memory, const Real* x, const std::vector<int32_t>& index, int dim) {
  const int32_t* at = place(device, memory, index);
  Real* rows = memory.template take<Real>(index.size() * dim);
  gather_rows(rows, x, at, int(index.size()), dim, device.stream());
  return rows;
}

template <class Real>
Doubles download_doubles(Device& device, const Real* from, size_t count) {
  const std::vector<Real> host = download(device, from, count);
  return {host.begin(), host.end()};
}

// multiply() of packed matrices: C [m][n] = alpha op(A) op(B) + beta C, op(A) is m x k, op(B) is k x n.
template <class Real>
void multiply_packed(Device& device, bool transpose_a, bool transpose_b, int m, int n, int k, const Real* a,
                     const Real* b, Real* c, std::type_identity_t<Real> alpha = 1,
                     std::type_identity_t<Real> beta = 0) {
  multiply<Real>(device, transpose_a, transpose_b, m, n, k, alpha, a, transpose_a ? m : k, b, transpose_b ? k : n, beta,
                 c, n);
}

// The hash of every row (see inspect_rows). Throws InputError for rows of another dim and for features that are not
// finite. `what` names a row in the message.
template <class Real>
std::vector<uint64_t> check_features(Device& device, const FeatureRows<Real>& rows, int dim,
                                     const std::string& what = "sample") {
  if (rows.dim != dim)
    throw InputError(what + "s have " + std::to_string(rows.dim) + " features, the last layer " + std::to_string(dim));
  if (rows.count < 0) throw InputError(std::to_string(rows.count) + " " + what + "s");
  if (rows.count == 0) return {};
  Scratch::Frame scratch(device);
  uint64_t* hash = scratch.take<uint64_t>(rows.count);
  int32_t* nonfinite = scratch.take<int32_t>(rows.count);
  inspect_rows(hash, nonfinite, rows.x, rows.count, dim, device.stream());
  const std::vector<int32_t> bad = download(device, nonfinite, rows.count);
  if (const auto at = std::find(bad.begin(), bad.end(), 1); at != bad.end())
    throw InputError(what + " " + std::to_string(at - bad.begin()) + " has features that are not finite");
  return download(device, hash, rows.count);
}
// Throws InputError where a label is outside [0, classes).
inline void check_labels(const std::vector<int32_t>& labels, int classes, const std::string& what = "sample") {
  for (size_t i = 0; i < labels.size(); i++)
    if (labels[i] < 0 || labels[i] >= classes)
      throw InputError(what + " " + std::to_string(i) + " has label " + std::to_string(labels[i]) + ", expected 0 to " +
                       std::to_string(classes - 1));
}
// The labels, copied to the host and checked. Throws InputError where there are none.
template <class Real>
std::vector<int32_t> download_labels(Device& device, const FeatureRows<Real>& rows, int classes,
                                     const std::string& what = "sample") {
  if (!rows.labels) throw InputError(what + "s need labels");
  const std::vector<int32_t> labels = download(device, rows.labels, rows.count);
  check_labels(labels, classes, what);
  return labels;
}
template <class Real>
bool all_finite(const std::vector<Real>& x) {
  return std::all_of(x.begin(), x.end(), [](Real v) { return std::isfinite(v); });
}
inline double largest_magnitude(const Doubles& x) {
  double top = 0;
  SIMT_SIMD(reduction(max : top))
  for (size_t i = 0; i < x.size(); i++) top = std::abs(x[i]) > top ? std::abs(x[i]) : top;
  return top;
}
// As "%g" writes it.
inline std::string format_number(double value) {
  char text[32];
  snprintf(text, sizeof text, "%g", value);
  return text;
}
// Throws InputError for weights that are not [C][D] or not finite. `what` names their owner.
template <class Real>
void check_weights(const std::vector<Real>& weights, int classes, int dim, const std::string& what) {
  if (weights.size() != size_t(classes) * dim)
    throw InputError(what + " has " + std::to_string(weights.size()) + " weights, expected " + std::to_string(classes) +
                     " x " + std::to_string(dim));
  if (!all_finite(weights)) throw InputError(what + " has weights that are not finite");
}
// Throws InputError unless gamma, the size of a step or the power of a likelihood, is positive and at most `most`.
inline void check_gamma(double gamma, double most = std::numeric_limits<double>::max()) {
  if (!(gamma > 0 && gamma <= most))
    throw InputError("gamma must be positive" + (gamma > most ? " and at most " + format_number(most) : "") + ", not " +
                     format_number(gamma));
}
// Throws InputError unless the prior precision is positive and finite.
inline void check_tau(double tau) {
  if (!(tau > 0) || !std::isfinite(tau))
    throw InputError("the prior precision must be positive and finite, not " + format_number(tau));
}

// How many of `count` rows a pass takes at a time when a row needs so many doubles: about 64 MB together.
inline int rows_at_once(int count, size_t doubles_a_row) {
  constexpr size_t room = size_t(1) << 23;
  return int(std::clamp<size_t>(room / doubles_a_row, 1, size_t(std::max(count, 1))));
}

}  // namespace baton
