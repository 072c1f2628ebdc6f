// Laplace approximation of the last layer: links from a Gaussian f ~ N(mu, V) over the logits to class probabilities.
// They are MacKay's probit approximation, mean field, Monte Carlo, and the Laplace bridge:
//   mu' = mu - (V 1) (1'mu) / (1'V 1), V' = V - (V 1)(V 1)' / (1'V 1), d = diag V',
//   [norm: c = mean(d) / sqrt(C / 2), mu' /= sqrt(c), d /= c],
//   alpha_k = (1 - 2 / C + e^{mu'_k} / C^2 sum_l e^{-mu'_l}) / d_k
// The kernel leaves out the factor e^{max mu'} / C^2 sum_l e^{-mu'_l} of alpha: the mean of the Dirichlet does not
// depend on it, and it overflows.
//
// A warp takes a row: it reads f and V and writes p. More draws cost FLOPs, not bytes.
#include "kernels/last_layer_parts.h"

namespace baton {
namespace {

// In nats. A NaN stays NaN, or an input that is not a number would look like a certain one.
template <class Real>
__device__ __forceinline__ Real entropy_of_row(const Real* p, int classes) {
  Real h = 0;
  for (int c = simt::lane_id(); c < classes; c += simt::warp_size)
    h -= p[c] == Real(0) ? Real(0) : p[c] * logarithm(p[c]);
  return simt::warp_sum(h);
}

template <class Real>
__device__ __forceinline__ Real variance_of(const LinkArrays<Real>& x, int row, int c, int classes) {
  return x.full ? x.variance[(size_t(row) * classes + c) * classes + c] : x.variance[row];
}

template <class Real>
__global__ void closed_link_kernel(LinkArrays<Real> x, Link link, Real lambda, int n, int classes) {
  const int row = simt::warp_item(), lane = simt::lane_id();
  if (row >= n) return;
  const Real* f = x.logits + size_t(row) * classes;
  Real* p = x.probability + size_t(row) * classes;
  if (link == Link::map || link == Link::mean_field || link == Link::probit) {
    for (int c = lane; c < classes; c += simt::warp_size)
      p[c] = link == Link::map ? f[c] : f[c] / root(Real(1) + lambda * variance_of(x, row, c, classes));
    softmax_row(p, p, classes);
  } else {
    Real mean = 0, total = 0;  // 1'mu, 1'V 1
    for (int c = lane; c < classes; c += simt::warp_size) {
      mean += f[c];
      if (x.full)
        for (int k = 0; k < classes; k++) total += x.variance[(size_t(row) * classes + c) * classes + k];
      else total += x.variance[row];
    }
    mean = simt::warp_sum(mean), total = simt::warp_sum(total);
    const auto row_sum = [&](int c) {
      if (!x.full) return x.variance[row];
      Real sum = 0;
      for (int k = 0; k < classes; k++) sum += x.variance[(size_t(row) * classes + c) * classes + k];
      return sum;
    };
    Real norm = 1;
    if (link == Link::bridge_norm) {
      Real d = 0;
      for (int c = lane; c < classes; c += simt::warp_size) {
        const Real s = row_sum(c);
        d += variance_of(x, row, c, classes) - s * s / total;
      }
      norm = simt::warp_sum(d) / Real(classes) / root(Real(classes) / Real(2));
    }
    Real top = -INFINITY, low = -INFINITY;  // max mu', max -mu'
    for (int c = lane; c < classes; c += simt::warp_size) {
      p[c] = (f[c] - row_sum(c) * mean / total) / root(norm);
      top = p[c] > top ? p[c] : top;
      low = -p[c] > low ? -p[c] : low;
    }
    top = largest_of_warp(top), low = largest_of_warp(low);
    Real inverse = 0;  // sum_l exp(-mu'_l - low)
    for (int c = lane; c < classes; c += simt::warp_size) inverse += exponential(-p[c] - low);
    inverse = simt::warp_sum(inverse);
    const Real flat = Real(classes) * Real(classes - 2) * exponential(-top - low) / inverse;
    Real sum = 0;
    for (int c = lane; c < classes; c += simt::warp_size) {
      const Real s = row_sum(c), d = (variance_of(x, row, c, classes) - s * s / total) / norm;
      p[c] = (flat + exponential(p[c] - top)) / d;
      sum += p[c];
    }
    sum = simt::warp_sum(sum);
    for (int c = lane; c < classes; c += simt::warp_size) p[c] /= sum;
  }
  const Real h = entropy_of_row(p, classes);
  if (x.entropy && lane == 0) x.entropy[row] = h;
}

// L L' = V by columns, the rows below the diagonal over the lanes. A pivot that rounding made negative counts as 0.
template <class Real>
__device__ __forceinline__ void factor_row(Real* l, const Real* v, int n) {
  for (int j = 0; j < n; j++) {
    Real pivot = v[j * n + j];
    for (int k = 0; k < j; k++) pivot -= l[j * n + k] * l[j * n + k];
    pivot = pivot > 0 ? root(pivot) : Real(0);
    for (int i = j + simt::lane_id(); i < n; i += simt::warp_size) {
      Real sum = v[i * n + j];
      for (int k = 0; k < j; k++) sum -= l[i * n + k] * l[j * n + k];
      l[i * n + j] = i == j ? pivot : pivot > 0 ? sum / pivot : Real(0);
    }
    __syncwarp();
  }
}

template <class Real>
__global__ void monte_carlo_kernel(LinkArrays<Real> x, int draws, int n, int classes) {
  const int row = simt::warp_item(), lane = simt::lane_id();
  if (row >= n) return;
  const Real* f = x.logits + size_t(row) * classes;
  Real* p = x.probability + size_t(row) * classes;
  Real* l = x.full ? x.factor + size_t(row) * classes * classes : nullptr;
  if (x.full) factor_row(l, x.variance + size_t(row) * classes * classes, classes);
  const Real sd = x.full ? Real(0) : root(x.variance[row]);
  const auto logit = [&](const Real* eps, int c) {
    if (!x.full) return f[c] + sd * eps[c];
    Real sum = f[c];
    for (int k = 0; k <= c; k++) sum += l[c * classes + k] * eps[k];
    return sum;
  };
  for (int c = lane; c < classes; c += simt::warp_size) p[c] = 0;
  Real entropies = 0;
  for (int s = 0; s < draws; s++) {
    const Real* eps = x.normals + size_t(s) * classes;
    Real top = -INFINITY;
    for (int c = lane; c < classes; c += simt::warp_size) {
      const Real u = logit(eps, c);
      top = u > top ? u : top;
    }
    top = largest_of_warp(top);
    Real z = 0, moment = 0;
    for (int c = lane; c < classes; c += simt::warp_size) {
      const Real d = logit(eps, c) - top, q = exponential(d);
      z += q;
      moment += q > 0 ? q * d : Real(0);
    }
    z = simt::warp_sum(z), moment = simt::warp_sum(moment);
    entropies += logarithm(z) - moment / z;
    for (int c = lane; c < classes; c += simt::warp_size) p[c] += exponential(logit(eps, c) - top) / z;
  }
  for (int c = lane; c < classes; c += simt::warp_size) p[c] /= Real(draws);
  const Real h = entropy_of_row(p, classes);
  if (lane == 0) {
    const Real information = h - entropies / Real(draws);
    if (x.entropy) x.entropy[row] = h;
    if (x.information) x.information[row] = information < 0 ? Real(0) : information;
  }
}

}  // namespace

template <class Real>
void link_probabilities(const LinkArrays<Real>& x, Link link, double lambda, int draws, int n, int classes,
                        Stream stream) {
  BATON_RANGE("link_probabilities");
  check(n >= 0 && classes >= 2, "link_probabilities", "logits has shape " + shape(n, classes));
  check(link == Link::map || x.variance, "link_probabilities", "every link but map needs variances");
  check(link != Link::mean_field || !x.full, "link_probabilities", "mean field takes one variance an input");
  if (link == Link::monte_carlo) {
    check(draws >= 1 && x.normals && (!x.full || x.factor), "link_probabilities",
          "Monte Carlo needs draws, normals and, with full covariances, room for their factors");
    simt::launch<monte_carlo_kernel<Real>>(simt::warps(n), stream, x, draws, n, classes);
  } else {
    const double scale = link == Link::probit ? M_PI / 8 : lambda;
    simt::launch<closed_link_kernel<Real>>(simt::warps(n), stream, x, link, Real(scale), n, classes);
  }
}

template void link_probabilities(const LinkArrays<float>&, Link, double, int, int, int, Stream);
template void link_probabilities(const LinkArrays<double>&, Link, double, int, int, int, Stream);

}  // namespace baton
