// Acquisition functions of a last layer. A warp takes a row.
//
// Margin: each lane keeps its two largest, and pairs of lanes merge theirs: (a1, a2) and (b1, b2) become
// (max(a1, b1), max(min(a1, b1), max(a2, b2))).
//
// BADGE (Ash et al. 2020) in C D dimensions: g_i . g_k = (r_i . r_k)(phi_i . phi_k), so
//   |g_i - g_k|^2 = |r_i|^2 |phi_i|^2 + |r_k|^2 |phi_k|^2 - 2 (r_i . r_k)(phi_i . phi_k)
// in 2 (C + D) FLOPs instead of 3 C D.
//
// A new sample k with curvature w changes S to S' = S - kappa s s', s = S phi_k, kappa = w / (1 + w v_k). With
// a = phi_i . s, c = kappa a, u = S F s, q = s' F s:
//   S' phi_i = S phi_i - c s,   v_i' = v_i - c a,   f_i' = f_i - 2 c (phi_i . u) + c^2 q
// so one pass over the features replaces n products with S and F, and S Phi' is not kept. Removing k again is the same
// with kappa = -w / (1 - w v_k).
//
// Elements (of type Real) read or written and FLOPs of a row; memory bounds them all:
//   margins              C + 1, few
//   gradient_embeddings  2 C + 2, 3 C
//   embedding_distances  D + C + 2, and one more with `keep` (the centre stays in the cache); 2 (C + D)
//   downdate_rows        D + 2, 2 D; with f D + 4, 4 D
//   fisher_scores        4, 4
#include "kernels/acquisition.h"

#include <cmath>

namespace baton {
namespace {

template <class Real>
__global__ void margins_kernel(Real* __restrict__ margin, const Real* __restrict__ p, int n, int classes) {
  const int row = simt::warp_item(), lane = simt::lane_id();
  if (row >= n) return;
  const Real* __restrict__ x = p + size_t(row) * classes;
  Real first = -INFINITY, second = -INFINITY;
  for (int c = lane; c < classes; c += simt::warp_size) {
    const Real value = x[c], lower = value < first ? value : first;
    first = value > first ? value : first;
    second = lower > second ? lower : second;
  }
  SIMT_UNROLL
  for (int bit = simt::warp_size / 2; bit > 0; bit /= 2) {
    const Real other1 = __shfl_xor_sync(~0u, first, bit), other2 = __shfl_xor_sync(~0u, second, bit);
    const Real lower = other1 < first ? other1 : first, upper = other2 > second ? other2 : second;
    first = other1 > first ? other1 : first;
    second = lower > upper ? lower : upper;
  }
  if (lane == 0) margin[row] = first - second;
}

template <class Real>
__global__ void embeddings_kernel(Real* __restrict__ r, Real* __restrict__ size, const Real* __restrict__ p,
                                  const Real* __restrict__ norm, int n, int classes) {
  const int row = simt::warp_item(), lane = simt::lane_id();
  if (row >= n) return;
  const Real* __restrict__ from = p + size_t(row) * classes;
  Real* __restrict__ to = r + size_t(row) * classes;
  Real top = -INFINITY;
  int at = classes;
  for (int c = lane; c < classes; c += simt::warp_size) {
    at = from[c] > top ? c : at;
    top = from[c] > top ? from[c] : top;
  }
  SIMT_UNROLL
  for (int bit = simt::warp_size / 2; bit > 0; bit /= 2) {
    const Real other = __shfl_xor_sync(~0u, top, bit);
    const int where = __shfl_xor_sync(~0u, at, bit);
    const bool wins = other > top || (other == top && where < at);
    top = wins ? other : top;
    at = wins ? where : at;
  }
  Real sum = 0;
  for (int c = lane; c < classes; c += simt::warp_size) {
    const Real value = (c == at ? Real(1) : Real(0)) - from[c];
    to[c] = value;
    sum += value * value;
  }
  sum = simt::warp_sum(sum);
  if (lane == 0) size[row] = sum * norm[row];
}

template <class Real>
__device__ __forceinline__ Real dot(const Real* __restrict__ a, const Real* __restrict__ b, int n) {
  Real sum = 0;
  SIMT_SIMD(reduction(+ : sum))
  for (int i = simt::lane_id(); i < n; i += simt::warp_size) sum += a[i] * b[i];
  return simt::warp_sum(sum);
}

template <class Real>
__global__ void distances_kernel(Real* __restrict__ distance, Embeddings<Real> e, int centre, bool keep) {
  const int row = simt::warp_item(), lane = simt::lane_id();
  if (row >= e.n) return;
  const size_t i = row, k = centre;
  const Real product = dot(e.x + i * e.dim, e.x + k * e.dim, e.dim);
  const Real overlap = dot(e.r + i * e.classes, e.r + k * e.classes, e.classes);
  if (lane == 0) {
    const Real d = e.size[i] + e.size[k] - Real(2) * overlap * product;
    const Real positive = d > Real(0) ? d : Real(0);  // rounding may make d negative
    distance[i] = keep && !(positive < distance[i]) ? distance[i] : positive;
  }
}

template <class Real, bool fisher>
__global__ void downdate_kernel(Real* __restrict__ v, Real* __restrict__ f, const Real* __restrict__ x,
                                const Real* __restrict__ s, const Real* __restrict__ u, Real kappa, Real q, int n,
                                int d) {
  const int row = simt::warp_item(), lane = simt::lane_id();
  if (row >= n) return;
  const Real* __restrict__ phi = x + size_t(row) * d;
  Real a = 0, b = 0;
  SIMT_SIMD(reduction(+ : a, b))
  for (int i = lane; i < d; i += simt::warp_size) {
    a += phi[i] * s[i];
    if constexpr (fisher) b += phi[i] * u[i];
  }
  a = simt::warp_sum(a);
  if constexpr (fisher) b = simt::warp_sum(b);
  if (lane == 0) {
    const Real c = kappa * a, variance = v[row] - c * a;
    v[row] = variance > Real(0) ? variance : Real(0);
    if constexpr (fisher) {
      const Real next = f[row] + c * (c * q - Real(2) * b);
      f[row] = next > Real(0) ? next : Real(0);
    }
  }
}

template <class Real>
__global__ void scores_kernel(Real* __restrict__ score, const Real* __restrict__ f, const Real* __restrict__ v,
                              const Real* __restrict__ w, Real sign, int n) {
  const int i = simt::thread_item();
  if (i >= n) return;
  score[i] = w[i] * f[i] / (Real(1) + sign * w[i] * v[i]);
}

void check(bool fine, const char* who, const std::string& what) {
  if (!fine) throw InputError(std::string(who) + ": " + what);
}
std::string shape(int n, int d) { return "[" + std::to_string(n) + "][" + std::to_string(d) + "]"; }

}  // namespace

template <class Real>
void margins(Real* margin, const Real* p, int n, int classes, Stream stream) {
  BATON_RANGE("margins");
  check(n >= 0 && classes >= 2, "margins", "p has shape " + shape(n, classes));
  simt::launch<margins_kernel<Real>>(simt::warps(n), stream, margin, p, n, classes);
}

template <class Real>
void gradient_embeddings(Real* r, Real* size, const Real* p, const Real* norm, int n, int classes, Stream stream) {
  BATON_RANGE("gradient_embeddings");
  check(n >= 0 && classes >= 1, "gradient_embeddings", "p has shape " + shape(n, classes));
  simt::launch<embeddings_kernel<Real>>(simt::warps(n), stream, r, size, p, norm, n, classes);
}

template <class Real>
void embedding_distances(Real* distance, const Embeddings<Real>& e, int centre, bool keep, Stream stream) {
  BATON_RANGE("embedding_distances");
  check(e.n >= 0 && e.dim >= 0, "embedding_distances", "x has shape " + shape(e.n, e.dim));
  check(e.classes >= 1, "embedding_distances", "r has shape " + shape(e.n, e.classes));
  check(centre >= 0 && centre < e.n, "embedding_distances",
        "row " + std::to_string(centre) + " of " + std::to_string(e.n) + " as the centre");
  simt::launch<distances_kernel<Real>>(simt::warps(e.n), stream, distance, e, centre, keep);
}

template <class Real>
void downdate_rows(Real* v, Real* f, const Real* x, const Real* s, const Real* u, Real kappa, Real q, int n, int d,
                   Stream stream) {
  BATON_RANGE("downdate_rows");
  check(n >= 0 && d >= 0, "downdate_rows", "x has shape " + shape(n, d));
  check(!f || u, "downdate_rows", "f needs u");
  const simt::Warps rows = simt::warps(n);
  if (f) simt::launch<downdate_kernel<Real, true>>(rows, stream, v, f, x, s, u, kappa, q, n, d);
  else simt::launch<downdate_kernel<Real, false>>(rows, stream, v, f, x, s, u, kappa, q, n, d);
}

template <class Real>
void fisher_scores(Real* score, const Real* f, const Real* v, const Real* w, bool removal, int n, Stream stream) {
  BATON_RANGE("fisher_scores");
  check(n >= 0, "fisher_scores", std::to_string(n) + " rows");
  simt::launch<scores_kernel<Real>>(simt::each(n), stream, score, f, v, w, Real(removal ? -1 : 1), n);
}

#define BATON_ACQUISITION(Real)                                                                                   \
  template void margins(Real*, const Real*, int, int, Stream);                                                    \
  template void gradient_embeddings(Real*, Real*, const Real*, const Real*, int, int, Stream);                    \
  template void embedding_distances(Real*, const Embeddings<Real>&, int, bool, Stream);                           \
  template void downdate_rows(Real*, Real*, const Real*, const Real*, const Real*, Real, Real, int, int, Stream); \
  template void fisher_scores(Real*, const Real*, const Real*, const Real*, bool, int, Stream);
BATON_ACQUISITION(float)
BATON_ACQUISITION(double)

}  // namespace baton
