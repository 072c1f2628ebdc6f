// Class probabilities from a Gaussian over the logits, by the links of kernels/last_layer.h.
#pragma once
#include <functional>

#include "trainers/last_layer/names.h"
#include "trainers/last_layer/rows.h"

namespace baton {

inline Names names(Link) { return {"link", {"map", "mean_field", "probit", "monte_carlo", "bridge", "bridge_norm"}}; }

struct LinkOptions {
  Link link = Link::mean_field;
  double lambda = M_PI / 8;  // of mean_field
  int draws = 1000;          // of monte_carlo
  uint64_t seed = 0;         // of the draws
};

struct LinkedPredictions {
  Doubles probability;  // [n][C]
  Doubles entropy;      // [n], nats
  Doubles information;  // [n], nats: what the weights' uncertainty adds; filled by monte_carlo alone
};

// What a posterior of the logits writes to `out` for `count` rows of features x.
template <class Real>
using RowFunction = std::function<void(const Real* x, int count, Real* out)>;

// Predictions for n rows of features x [n][dim], `step` rows at a time. `logits` writes [count][C]. `variances` writes
// [count], one variance for all classes, or with `full` the covariances [count][C][C]; Link::map does without it.
// Throws InputError for fewer than one draw, or too many, and for a negative lambda.
template <class Real>
LinkedPredictions predict_rows(Device& device, const Real* x, int n, int dim, int classes, int step, bool full,
                               const LinkOptions& o, const RowFunction<Real>& logits,
                               const RowFunction<Real>& variances) {
  const bool drawn = o.link == Link::monte_carlo;
  if (drawn && (o.draws < 1 || int64_t(o.draws) * classes > INT32_MAX - 3))
    throw InputError("Monte Carlo predictions of " + std::to_string(o.draws) + " draws");
  if (o.link == Link::mean_field && !(o.lambda >= 0))
    throw InputError("lambda of the mean-field link must not be negative");
  const size_t square = full ? size_t(classes) * classes : 1, rows = std::min(step, std::max(n, 1));
  Scratch::Frame scratch(device);
  Real *f = scratch.take<Real>(rows * classes), *p = scratch.take<Real>(rows * classes),
       *entropy = scratch.take<Real>(rows), *variance = scratch.take<Real>(rows * square),
       *information = scratch.take<Real>(rows), *normals = nullptr, *factor = nullptr;
  if (drawn) {
    factor = scratch.take<Real>(rows * square);
    normals = scratch.take<Real>(size_t(o.draws) * classes);
    fill_normals(normals, o.draws * classes, key_of(o.seed, 13), device.stream());
  }
  LinkedPredictions result;
  const auto append = [&](Doubles& to, const Real* from, size_t count) {
    const std::vector<Real> host = download(device, from, count);
    to.insert(to.end(), host.begin(), host.end());
  };
  for (int first = 0; first < n; first += step) {
    const int count = std::min(step, n - first);
    const Real* part = x + size_t(first) * dim;
    logits(part, count, f);
    if (o.link == Link::map) variance = nullptr;
    else variances(part, count, variance);
    link_probabilities<Real>({p, entropy, drawn ? information : nullptr, f, variance, normals, factor, full}, o.link,
                             o.lambda, o.draws, count, classes, device.stream());
    append(result.probability, p, size_t(count) * classes);
    append(result.entropy, entropy, count);
    if (drawn) append(result.information, information, count);
  }
  return result;
}

// softmax(W phi_n) [n][C] of all rows, on the host; W [C][D] on the device.
inline Doubles class_probabilities(Device& device, const double* weights, const double* x, int n, int dim,
                                   int classes) {
  const RowFunction<double> logits = [&](const double* rows, int count, double* out) {
    multiply_packed(device, false, true, count, classes, dim, rows, weights, out);
  };
  const int step = rows_at_once(n, 2 * size_t(classes));
  return predict_rows(device, x, n, dim, classes, step, false, {.link = Link::map}, logits, {}).probability;
}

// 1 - p_c as the sum of the others, since 1 - p_c keeps no digits of a confident sample's curvature diag(p) - p p'.
inline double all_but(const double* p, int c, int classes) {
  double sum = 0;
  for (int e = 0; e < classes; e++) sum += e == c ? 0 : p[e];
  return sum;
}

// u becomes softmax(u); returns ln sum exp u.
inline double softmax_in_place(Doubles& u) {
  const double top = *std::max_element(u.begin(), u.end());
  double sum = 0;
  for (double& v : u) sum += v = std::exp(v - top);
  for (double& v : u) v /= sum;
  return top + std::log(sum);
}

}  // namespace baton
