#include "trainers/last_layer/rows.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace baton {

template <class Real>
std::vector<uint64_t> check_features(Device& device, const FeatureRows<Real>& rows, int dim, const std::string& what) {
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

void check_labels(const std::vector<int32_t>& labels, int classes, const std::string& what) {
  for (size_t i = 0; i < labels.size(); i++)
    if (labels[i] < 0 || labels[i] >= classes)
      throw InputError(what + " " + std::to_string(i) + " has label " + std::to_string(labels[i]) + ", expected 0 to " +
                       std::to_string(classes - 1));
}

template <class Real>
std::vector<int32_t> download_labels(Device& device, const FeatureRows<Real>& rows, int classes,
                                     const std::string& what) {
  if (!rows.labels) throw InputError(what + "s need labels");
  const std::vector<int32_t> labels = download(device, rows.labels, rows.count);
  check_labels(labels, classes, what);
  return labels;
}

template <class Real>
void check_weights(const std::vector<Real>& weights, int classes, int dim, const std::string& what) {
  if (weights.size() != size_t(classes) * dim)
    throw InputError(what + " has " + std::to_string(weights.size()) + " weights, expected " + std::to_string(classes) +
                     " x " + std::to_string(dim));
  if (!all_finite(weights)) throw InputError(what + " has weights that are not finite");
}

void check_gamma(double gamma, double most) {
  if (!(gamma > 0 && gamma <= most))
    throw InputError("gamma must be positive" + (gamma > most ? " and at most " + format_number(most) : "") + ", not " +
                     format_number(gamma));
}

void check_tau(double tau) {
  if (!(tau > 0) || !std::isfinite(tau))
    throw InputError("the prior precision must be positive and finite, not " + format_number(tau));
}

int rows_at_once(int count, size_t doubles_a_row) {
  constexpr size_t room = size_t(1) << 23;
  return int(std::clamp<size_t>(room / doubles_a_row, 1, size_t(std::max(count, 1))));
}

template <class Real>
bool all_finite(const std::vector<Real>& x) {
  return std::all_of(x.begin(), x.end(), [](Real v) { return std::isfinite(v); });
}

double largest_magnitude(const Doubles& x) {
  double top = 0;
  SIMT_SIMD(reduction(max : top))
  for (size_t i = 0; i < x.size(); i++) top = std::abs(x[i]) > top ? std::abs(x[i]) : top;
  return top;
}

std::string format_number(double value) {
  char text[32];
  snprintf(text, sizeof text, "%g", value);
  return text;
}

#define BATON_ROWS(Real)                                                                                     \
  template std::vector<uint64_t> check_features(Device&, const FeatureRows<Real>&, int, const std::string&); \
  template std::vector<int32_t> download_labels(Device&, const FeatureRows<Real>&, int, const std::string&); \
  template void check_weights(const std::vector<Real>&, int, int, const std::string&);                       \
  template bool all_finite(const std::vector<Real>&);
BATON_ROWS(float)
BATON_ROWS(double)

}  // namespace baton
