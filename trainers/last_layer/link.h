// Class probabilities from a Gaussian over the logits, by the links of kernels/last_layer.h.
#pragma once
#include <functional>
#include <vector>

#include "kernels/last_layer.h"
#include "trainers/last_layer/names.h"

namespace baton {

template <>
struct NamesOf<Link> {
  static constexpr const char *what = "link",
                              *names[] = {"map", "mean_field", "probit", "monte_carlo", "bridge", "bridge_norm"};
};

struct LinkOptions {
  Link link = Link::mean_field;
  double lambda = M_PI / 8;  // of mean_field
  int draws = 1000;          // of monte_carlo
  uint64_t seed = 0;         // of the draws
};

struct LinkedPredictions {
  std::vector<double> probability;  // [n][C]
  std::vector<double> entropy;      // [n], nats
  std::vector<double> information;  // [n], nats: what the weights' uncertainty adds; filled by monte_carlo alone
};

// What a posterior of the logits writes to `out` for `count` rows of features x.
template <class Real>
using RowFunction = std::function<void(const Real* x, int count, Real* out)>;

// Predictions for n rows of features x [n][dim], `step` rows at a time. `logits` writes [count][C]. `variances` writes
// [count], one variance for all classes, or with `full` the covariances [count][C][C]; Link::map does without it.
// Throws InputError for fewer than one draw, or too many, and for a negative lambda.
template <class Real>
LinkedPredictions predict_rows(Device&, const Real* x, int n, int dim, int classes, int step, bool full,
                               const LinkOptions&, const RowFunction<Real>& logits, const RowFunction<Real>& variances);

// softmax(W phi_n) [n][C] of all rows, on the host; W [C][D] on the device.
std::vector<double> class_probabilities(Device&, const double* weights, const double* x, int n, int dim, int classes);
// 1 - p_c as the sum of the others, since 1 - p_c keeps no digits of a confident sample's curvature diag(p) - p p'.
double all_but(const double* p, int c, int classes);
// u becomes softmax(u); returns ln sum exp u.
double softmax_in_place(std::vector<double>& u);

}  // namespace baton
