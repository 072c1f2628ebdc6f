#include "trainers/last_layer/link.h"

#include <algorithm>

#include "engine/linalg.h"
#include "trainers/last_layer/names.h"
#include "trainers/last_layer/rows.h"

namespace baton {

constexpr const char* link_names[] = {"map", "mean_field", "probit", "monte_carlo", "bridge", "bridge_norm"};
const char* to_string(Link link) { return link_names[int(link)]; }
Link parse_link(const std::string& name) { return parse_name<Link>("link", link_names, name); }

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
  const auto append = [&](std::vector<double>& to, const Real* from, size_t count) {
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
  const int step = rows_at_once(n, 2 * size_t(classes));
  Scratch::Frame scratch(device);
  auto *logits = scratch.take<double>(size_t(step) * classes), *p = scratch.take<double>(size_t(step) * classes);
  std::vector<double> all(size_t(n) * classes);
  for (int first = 0; first < n; first += step) {
    const int count = std::min(step, n - first);
    multiply(device, false, true, count, classes, dim, 1.0, x + size_t(first) * dim, dim, weights, dim, 0.0, logits,
             classes);
    softmax_residual<double>(p, nullptr, nullptr, nullptr, logits, nullptr, count, classes, device.stream());
    copy_to_host(device, all.data() + size_t(first) * classes, p, sizeof(double) * size_t(count) * classes);
  }
  return all;
}

double all_but(const double* p, int c, int classes) {
  double sum = 0;
  for (int e = 0; e < classes; e++) sum += e == c ? 0 : p[e];
  return sum;
}

#define BATON_PREDICT_ROWS(Real)                                                                              \
  template LinkedPredictions predict_rows(Device&, const Real*, int, int, int, int, bool, const LinkOptions&, \
                                          const RowFunction<Real>&, const RowFunction<Real>&);
BATON_PREDICT_ROWS(float)
BATON_PREDICT_ROWS(double)

}  // namespace baton
