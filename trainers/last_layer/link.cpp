#include "trainers/last_layer/link.h"

#include <algorithm>
#include <cmath>

#include "trainers/last_layer/rows.h"

namespace baton {

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

std::vector<double> class_probabilities(Device& device, const double* weights, const double* x, int n, int dim,
                                        int classes) {
  const RowFunction<double> logits = [&](const double* rows, int count, double* out) {
    multiply_packed(device, false, true, count, classes, dim, rows, weights, out);
  };
  const int step = rows_at_once(n, 2 * size_t(classes));
  return predict_rows(device, x, n, dim, classes, step, false, {.link = Link::map}, logits, {}).probability;
}

double all_but(const double* p, int c, int classes) {
  double sum = 0;
  for (int e = 0; e < classes; e++) sum += e == c ? 0 : p[e];
  return sum;
}

double softmax_in_place(std::vector<double>& u) {
  const double top = *std::max_element(u.begin(), u.end());
  double sum = 0;
  for (double& v : u) sum += v = std::exp(v - top);
  for (double& v : u) v /= sum;
  return top + std::log(sum);
}

#define BATON_PREDICT_ROWS(Real)                                                                              \
  template LinkedPredictions predict_rows(Device&, const Real*, int, int, int, int, bool, const LinkOptions&, \
                                          const RowFunction<Real>&, const RowFunction<Real>&);
BATON_PREDICT_ROWS(float)
BATON_PREDICT_ROWS(double)

}  // namespace baton
