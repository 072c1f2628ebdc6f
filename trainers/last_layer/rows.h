// Rows of features with their labels, in device memory, and the checks that everything which reads them makes.
#pragma once
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
std::vector<uint64_t> check_features(Device&, const FeatureRows<Real>&, int dim, const std::string& what = "sample");
// Throws InputError where a label is outside [0, classes).
void check_labels(const std::vector<int32_t>& labels, int classes, const std::string& what = "sample");
// The labels, copied to the host and checked. Throws InputError where there are none.
template <class Real>
std::vector<int32_t> download_labels(Device&, const FeatureRows<Real>&, int classes,
                                     const std::string& what = "sample");
// Throws InputError for weights that are not [C][D] or not finite. `what` names their owner.
template <class Real>
void check_weights(const std::vector<Real>& weights, int classes, int dim, const std::string& what);
// Throws InputError unless gamma, the size of a step or the power of a likelihood, is positive and at most `most`.
void check_gamma(double gamma, double most = std::numeric_limits<double>::max());
// Throws InputError unless the prior precision is positive and finite.
void check_tau(double tau);

// How many of `count` rows a pass takes at a time when a row needs so many doubles: about 64 MB together.
int rows_at_once(int count, size_t doubles_a_row);
template <class Real>
bool all_finite(const std::vector<Real>&);
double largest_magnitude(const Doubles&);
std::string format_number(double);  // as "%g" writes it

}  // namespace baton
