// Laplace approximation of the last layer: residuals, predictive links, and the steps of a closed-form update.
//
// One new sample (phi, y) on N(w_c; W_c, S), with s = S phi, v = phi's, f = W phi:
//   curvature w >= 0 of the sample:   S' = S - w / (1 + w v) s s'          (Sherman-Morrison; P' = P + w phi phi')
//   gaussian       w = 1                       W' = W + gamma r s' / (1 + v)
//   categorical    w = p_max (1 - p_max)       W' = W + gamma r s' / (1 + w v); then w again at the new logits, for S'
//   implicit       W' = W + a s', where a solves a = e_y - softmax(f + v a): with u = f + v a it is the minimum of the
//                  strictly convex lse(u) - u_y + |u - f|^2 / (2 v), so it exists, is unique and needs no step size.
//                  Newton: (I + v G) delta = e_y - softmax(u) - a with G = diag(p) - p p', by Sherman-Morrison,
//                    delta = D^-1 h + v D^-1 p (p' D^-1 h) / sum_c p_c / (1 + v p_c),   D = I + v diag(p),
//                  halved until the objective falls or no logit moves by more than 1/2: |D^3 lse[d, d, d]| is at most
//                  range(d) D^2 lse[d, d], so such a step always descends, where rounding hides it too; w at the new
//                  logits.
//
// A sequence of b samples never looks at S itself. With U = S Phi', M_t = Phi S_t Phi' and S_t phi_k = U E_t[:, k]:
//   s_t = U e, e = E_t[:, j];  m = M_t[:, j];  v = m_j
//   logits of all samples += m a';   W += a (U e)';   S -= kappa (U e)(U e)';   M -= kappa m m';   E -= kappa e m'
// so what is left of a call is one product with S before and one rank-b update after it: O(b D^2) of BLAS 3, and
// O(b^3 + b^2 C) here, in one block. Exactly the sequential rule, to rounding.
//
// Links, f ~ N(mu, V): MacKay's probit approximation; Monte Carlo; the Laplace bridge
//   mu' = mu - (V 1) (1'mu) / (1'V 1), V' = V - (V 1)(V 1)' / (1'V 1), d = diag V',
//   [norm: c = mean(d) / sqrt(C / 2), mu' /= sqrt(c), d /= c],
//   alpha_k = (1 - 2 / C + e^{mu'_k} / C^2 sum_l e^{-mu'_l}) / d_k,
// up to the factor e^{max mu'} / C^2 sum_l e^{-mu'_l}, which the mean of the Dirichlet does not see and which
// overflows.
//
// Sums run over lanes in one order: the same bits in every run. Traffic: softmax_residual 4 to 12 B a logit in float;
// row_dots reads both rows; links read f and V and write p (times the draws in flops, not in bytes: one warp a row).
#include "kernels/last_layer.h"

#include <cmath>
#include <limits>

namespace baton {
namespace {

template <class Real>
__device__ __forceinline__ Real largest_of_warp(Real v) {
  SIMT_UNROLL
  for (int bit = simt::warp_size / 2; bit > 0; bit /= 2) {
    const Real other = __shfl_xor_sync(~0u, v, bit);
    v = other > v ? other : v;
  }
  return v;
}
__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return ::exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return ::log(x); }
__device__ __forceinline__ float root(float x) { return sqrtf(x); }
__device__ __forceinline__ double root(double x) { return ::sqrt(x); }
template <class Real>
__device__ __forceinline__ bool finite(Real x) {
  return x - x == Real(0);
}

template <class Real>
__device__ __forceinline__ Real largest(const Real* x, int n) {
  Real top = -INFINITY;
  for (int c = simt::lane_id(); c < n; c += simt::warp_size) top = x[c] > top ? x[c] : top;
  return largest_of_warp(top);
}

// p = softmax(x); returns ln sum exp(x - top), top = max x. A lane writes the elements that it read. p may be x.
template <class Real>
__device__ __forceinline__ Real softmax_row(Real* p, const Real* x, Real top, int n) {
  Real sum = 0;
  for (int c = simt::lane_id(); c < n; c += simt::warp_size) {
    const Real e = exponential(x[c] - top);
    p[c] = e;
    sum += e;
  }
  sum = simt::warp_sum(sum);
  for (int c = simt::lane_id(); c < n; c += simt::warp_size) p[c] /= sum;
  return logarithm(sum);
}
template <class Real>
__device__ __forceinline__ void softmax_row(Real* p, const Real* x, int n) {
  softmax_row(p, x, largest(x, n), n);
}

template <class Real>
__global__ void residual_kernel(Real* p, Real* r, Real* loss, Real* curvature, const Real* logits,
                                const int32_t* labels, int n, int classes) {
  const int row = simt::warp_item(), lane = simt::lane_id();
  if (row >= n) return;
  const Real* x = logits + size_t(row) * classes;
  const int label = labels ? labels[row] : 0;
  const bool known = label >= 0 && label < classes;
  const Real top = largest(x, classes), own = known ? x[label] : Real(NAN);
  Real sum = 0;
  for (int c = lane; c < classes; c += simt::warp_size) sum += exponential(x[c] - top);
  sum = simt::warp_sum(sum);
  for (int c = lane; c < classes; c += simt::warp_size) {
    const Real q = exponential(x[c] - top) / sum;
    if (p) p[size_t(row) * classes + c] = q;
    if (r) r[size_t(row) * classes + c] = known ? (c == label ? Real(1) : Real(0)) - q : Real(NAN);
  }
  if (lane == 0) {
    if (loss) loss[row] = logarithm(sum) + (top - own);
    if (curvature) curvature[row] = (Real(1) - Real(1) / sum) / sum;  // exp(top - top) = 1
  }
}

template <class Real>
__global__ void curvature_product_kernel(Real* out, const Real* p, const Real* d, int n, int classes) {
  const int row = simt::warp_item(), lane = simt::lane_id();
  if (row >= n) return;
  const size_t at = size_t(row) * classes;
  Real dot = 0;
  for (int c = lane; c < classes; c += simt::warp_size) dot += p[at + c] * d[at + c];
  dot = simt::warp_sum(dot);
  for (int c = lane; c < classes; c += simt::warp_size) out[at + c] = p[at + c] * (d[at + c] - dot);
}

template <class Real>
__global__ void row_dots_kernel(Real* v, Real alpha, const Real* __restrict__ a, size_t lda, const Real* __restrict__ b,
                                size_t ldb, Real beta, int n, int d) {
  const int row = simt::warp_item(), lane = simt::lane_id();
  if (row >= n) return;
  const Real* __restrict__ x = a + lda * row;
  const Real* __restrict__ y = b + ldb * row;
  Real sum = 0;
  SIMT_SIMD(reduction(+ : sum))
  for (int i = lane; i < d; i += simt::warp_size) sum += x[i] * y[i];
  sum = simt::warp_sum(sum);
  if (lane == 0) v[row] = beta == Real(0) ? alpha * sum : alpha * sum + beta * v[row];
}

template <class Real>
__global__ void scale_rows_kernel(Real* out, const Real* x, const Real* w, int d) {
  const size_t at = size_t(blockIdx.x) * d;
  const Real scale = root(w[blockIdx.x]);
  for (int i = threadIdx.x; i < d; i += blockDim.x) out[at + i] = scale * x[at + i];
}

template <class Real>
__global__ void gather_rows_kernel(Real* __restrict__ out, const Real* __restrict__ x, const int32_t* index, int d) {
  const size_t to = size_t(blockIdx.x) * d, from = size_t(index[blockIdx.x]) * d;
  for (int i = threadIdx.x; i < d; i += blockDim.x) out[to + i] = x[from + i];
}

template <class Real>
__global__ void add_outer_kernel(Real* __restrict__ a, Real alpha, const Real* x, const Real* y, int columns) {
  Real* __restrict__ row = a + size_t(blockIdx.x) * columns;
  const Real scale = alpha * x[blockIdx.x];
  for (int i = threadIdx.x; i < columns; i += blockDim.x) row[i] += scale * y[i];
}

template <class Real>
__global__ void add_diagonal_kernel(Real* a, Real value, int n) {
  const int i = simt::thread_item();
  if (i >= n) return;
  a[size_t(i) * n + i] += value;
}

__device__ __forceinline__ uint64_t bits_of(float x) { return __builtin_bit_cast(uint32_t, x); }
__device__ __forceinline__ uint64_t bits_of(double x) { return __builtin_bit_cast(uint64_t, x); }

// The sum over positions of a mixed (bits, position): any order of the sum gives the same hash.
template <class Real>
__global__ void inspect_kernel(uint64_t* hash, int32_t* nonfinite, const Real* x, int n, int d) {
  const int row = simt::warp_item(), lane = simt::lane_id();
  if (row >= n) return;
  uint64_t sum = 0;
  int bad = 0;
  for (int i = lane; i < d; i += simt::warp_size) {
    const Real value = x[size_t(row) * d + i] + Real(0);  // -0 becomes 0
    bad |= !finite(value);
    uint64_t z = bits_of(value) + 0x9E3779B97F4A7C15ull * uint64_t(i + 1);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    sum += z ^ (z >> 31);
  }
  sum = simt::warp_sum(sum);
  bad = simt::warp_sum(bad);
  if (lane == 0) {
    hash[row] = sum;
    nonfinite[row] = bad ? 1 : 0;
  }
}

template <class Real>
__global__ void normals_kernel(Real* x, int n, Key key) {
  const int i = simt::thread_item();
  if (4 * i >= n) return;
  const float4 z = normal4(key, uint32_t(i), 0, 0);
  const float four[4] = {z.x, z.y, z.z, z.w};
  SIMT_UNROLL
  for (int k = 0; k < 4; k++)
    if (4 * i + k < n) x[4 * i + k] = four[k];
}

// ------------------------------------------------------------------------------------------------ steps of an update
// lse(u) - u_y + |u - f|^2 / (2 v) at u = f + v (a + t delta), and p = softmax(u).
template <class Real>
__device__ __forceinline__ Real implicit_objective(Real* p, const Real* f, const Real* a, const Real* delta, Real t,
                                                   Real v, int label, int n) {
  Real square = 0, own = 0;
  for (int c = simt::lane_id(); c < n; c += simt::warp_size) {
    const Real b = a[c] + t * delta[c], u = f[c] + v * b;
    p[c] = u;
    square += b * b;
    own += c == label ? u : Real(0);
  }
  const Real top = largest(p, n), lse = softmax_row(p, p, top, n);  // from top: exact where the label is on top
  return (top - simt::warp_sum(own)) + lse + v * simt::warp_sum(square) / 2;
}

// One warp: a = e_y - softmax(f + v a), p = softmax(f + v a).
template <class Real>
__device__ __forceinline__ void implicit_step(Real* a, Real* p, Real* delta, const Real* f, Real v, int label, int n) {
  constexpr bool wide = sizeof(Real) == 8;
  constexpr Real done = wide ? Real(1e-14) : Real(1e-6);                                      // of a
  constexpr Real fine = wide ? Real(1e-9) : Real(1e-4), near = Real(1e-3), safe = Real(0.5);  // of the logits
  const int lane = simt::lane_id();
  for (int c = lane; c < n; c += simt::warp_size) a[c] = delta[c] = 0;
  Real objective = implicit_objective(p, f, a, delta, Real(0), v, label, n), last = INFINITY;
  for (int iteration = 0; iteration < 60; iteration++) {
    Real error = 0, dot = 0, trace = 0;  // h = e_y - p - a; delta first holds D^-1 h
    for (int c = lane; c < n; c += simt::warp_size) {
      const Real h = (c == label ? Real(1) : Real(0)) - p[c] - a[c], scale = Real(1) + v * p[c];
      const Real size = h < 0 ? -h : h;
      error = size > error ? size : error;
      delta[c] = h / scale;
      dot += p[c] * delta[c];
      trace += p[c] / scale;
    }
    error = largest_of_warp(error), dot = simt::warp_sum(dot), trace = simt::warp_sum(trace);
    Real slope = 0, reach = 0;
    for (int c = lane; c < n; c += simt::warp_size) {
      const Real h = (c == label ? Real(1) : Real(0)) - p[c] - a[c];
      delta[c] += v * p[c] / (Real(1) + v * p[c]) * dot / trace;
      slope += h * delta[c];
      const Real size = delta[c] < 0 ? -delta[c] : delta[c];
      reach = size > reach ? size : reach;
    }
    slope = v * simt::warp_sum(slope);  // minus the derivative along delta; never negative
    reach = v * largest_of_warp(reach);
    if (reach > safe) {
      last = INFINITY;
    } else {  // close by, steps that no longer halve are rounding
      const bool stuck = !(reach < last / 2);
      if (error > done ? reach <= near && stuck : reach <= fine || stuck) break;
      last = reach;
    }
    Real t = 1, next = implicit_objective(p, f, a, delta, t, v, label, n);
    while (t * reach > safe && !(next <= objective - Real(1e-4) * t * slope)) {
      t /= 2;
      next = implicit_objective(p, f, a, delta, t, v, label, n);
    }
    for (int c = lane; c < n; c += simt::warp_size) a[c] += t * delta[c];
    objective = next;
  }
}

constexpr int steps_threads = 128;

template <class Real>
__global__ void steps_kernel(UpdateSteps<Real> s, UpdateRule rule, Real gamma, int passes, int b, int classes) {
  SIMT_DYNAMIC_SHARED(Real, shared);
  Real *m = shared, *e = m + b, *a = e + b, *p = a + classes, *delta = p + classes, *out = delta + classes;
  const int t0 = threadIdx.x, lane = simt::lane_id(), warp = t0 / simt::warp_size;
  const int warps = int(blockDim.x) / simt::warp_size;
  const size_t at = blockIdx.x;
  Real* gram = s.gram + at * b * b;
  Real* basis = s.basis + at * b * b;
  Real* logits = s.logits + at * b * classes;
  Real* step = s.step + at * b * classes;
  Real* downdate = s.downdate + at * passes * b * b;
  Real* weight = s.weight + at * passes * b;
  const int32_t* labels = s.labels + at * b;
  constexpr Real most = sizeof(Real) == 8 ? Real(4.5e15) : Real(8.4e6);  // 1 / eps: beyond it S' keeps nothing of S

  for (int i = warp; i < b; i += warps) {
    for (int k = lane; k < b; k += simt::warp_size) basis[i * b + k] = i == k ? Real(1) : Real(0);
    for (int c = lane; c < classes; c += simt::warp_size) step[i * classes + c] = 0;
  }
  if (t0 == 0) s.failure[at] = 0;
  __syncthreads();
  for (int t = 0; t < passes * b; t++) {
    const int j = t % b, label = labels[j];
    if (warp == 0) {
      const Real* f = logits + j * classes;
      const Real v = gram[j * b + j];
      softmax_row(p, f, classes);
      Real top = largest(p, classes);
      Real w = rule == UpdateRule::gaussian ? Real(1) : top * (Real(1) - top);
      if (rule == UpdateRule::implicit) {
        implicit_step(a, p, delta, f, v, label, classes);
      } else {
        const Real gain = rule == UpdateRule::categorical_published ? gamma * (Real(1) - w * v / (Real(1) + v))
                                                                    : gamma / (Real(1) + w * v);
        for (int c = lane; c < classes; c += simt::warp_size) {
          a[c] = gain * ((c == label ? Real(1) : Real(0)) - p[c]);
          p[c] = f[c] + v * a[c];
        }
        if (rule != UpdateRule::gaussian) softmax_row(p, p, classes);
      }
      if (rule != UpdateRule::gaussian) {  // the curvature that is kept: at the new logits
        top = largest(p, classes);
        w = top * (Real(1) - top);
      }
      Real sum = 0;
      for (int c = lane; c < classes; c += simt::warp_size) sum += a[c];
      sum = simt::warp_sum(sum);
      if (lane == 0) {
        const int reason = !finite(v) ? 1 : v < 0 ? 2 : v > most ? 3 : !(finite(sum) && finite(w)) ? 1 : 0;
        out[0] = w / (Real(1) + w * v);
        out[1] = Real(reason);
        weight[t] = w;
      }
    }
    for (int i = t0; i < b; i += blockDim.x) {
      m[i] = gram[j * b + i];
      e[i] = basis[i * b + j];
    }
    __syncthreads();
    const Real kappa = out[0];
    if (out[1] != Real(0)) {
      if (t0 == 0) s.failure[at] = 4 * j + int(out[1]);
      break;
    }
    for (int i = warp; i < b; i += warps) {
      const Real mi = m[i], ei = e[i];
      for (int c = lane; c < classes; c += simt::warp_size) {
        logits[i * classes + c] += mi * a[c];
        step[i * classes + c] += ei * a[c];
      }
      for (int k = lane; k < b; k += simt::warp_size) {
        gram[i * b + k] -= kappa * mi * m[k];
        basis[i * b + k] -= kappa * ei * m[k];
      }
    }
    for (int i = t0; i < b; i += blockDim.x) downdate[t * b + i] = root(kappa) * e[i];
    __syncthreads();
  }
}

// -------------------------------------------------------------------------------------------------------------- links
// A NaN stays one: an input that is none must not pass for a certain one.
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

template <class Real>
__global__ void adam_kernel(Real* w, Real* m, Real* v, const Real* g, Real lr, Real decay, Real correction1,
                            Real correction2, int n) {
  const int i = simt::thread_item();
  if (i >= n) return;
  const Real slope = g[i] + decay * w[i];
  m[i] = Real(0.9) * m[i] + Real(0.1) * slope;
  v[i] = Real(0.999) * v[i] + Real(0.001) * slope * slope;
  w[i] -= lr * m[i] * correction1 / (root(v[i] * correction2) + Real(1e-8));
}

void check(bool fine, const char* who, const std::string& what) {
  if (!fine) throw InputError(std::string(who) + ": " + what);
}
std::string shape(int n, int d) { return "[" + std::to_string(n) + "][" + std::to_string(d) + "]"; }

}  // namespace

template <class Real>
void softmax_residual(Real* p, Real* r, Real* loss, Real* curvature, const Real* logits, const int32_t* labels, int n,
                      int classes, Stream stream) {
  BATON_RANGE("softmax_residual");
  check(n >= 0 && classes >= 1, "softmax_residual", "logits has shape " + shape(n, classes));
  check(labels || (!r && !loss), "softmax_residual", "residuals and losses need labels");
  simt::launch<residual_kernel<Real>>(simt::warps(n), stream, p, r, loss, curvature, logits, labels, n, classes);
}

template <class Real>
void softmax_curvature_product(Real* out, const Real* p, const Real* d, int n, int classes, Stream stream) {
  BATON_RANGE("softmax_curvature_product");
  check(n >= 0 && classes >= 1, "softmax_curvature_product", "p has shape " + shape(n, classes));
  simt::launch<curvature_product_kernel<Real>>(simt::warps(n), stream, out, p, d, n, classes);
}

template <class Real>
void row_dots(Real* v, Real alpha, const Real* a, size_t lda, const Real* b, size_t ldb, Real beta, int n, int d,
              Stream stream) {
  BATON_RANGE("row_dots");
  check(n >= 0 && d >= 0, "row_dots", "rows of shape " + shape(n, d));
  simt::launch<row_dots_kernel<Real>>(simt::warps(n), stream, v, alpha, a, lda, b, ldb, beta, n, d);
}

template <class Real>
void scale_rows(Real* out, const Real* x, const Real* w, int n, int d, Stream stream) {
  BATON_RANGE("scale_rows");
  check(n >= 0 && d >= 0, "scale_rows", "rows of shape " + shape(n, d));
  simt::launch<scale_rows_kernel<Real>>(simt::blocks(n), stream, out, x, w, d);
}

template <class Real>
void gather_rows(Real* out, const Real* x, const int32_t* index, int n, int d, Stream stream) {
  BATON_RANGE("gather_rows");
  check(n >= 0 && d >= 0, "gather_rows", "rows of shape " + shape(n, d));
  simt::launch<gather_rows_kernel<Real>>(simt::blocks(n), stream, out, x, index, d);
}

template <class Real>
void add_outer(Real* a, Real alpha, const Real* x, const Real* y, int rows, int columns, Stream stream) {
  BATON_RANGE("add_outer");
  check(rows >= 0 && columns >= 0, "add_outer", "a matrix of shape " + shape(rows, columns));
  simt::launch<add_outer_kernel<Real>>(simt::blocks(rows), stream, a, alpha, x, y, columns);
}

template <class Real>
void add_diagonal(Real* a, Real value, int n, Stream stream) {
  check(n >= 0, "add_diagonal", "a matrix of order " + std::to_string(n));
  simt::launch<add_diagonal_kernel<Real>>(simt::each(n), stream, a, value, n);
}

template <class Real>
void inspect_rows(uint64_t* hash, int32_t* nonfinite, const Real* x, int n, int d, Stream stream) {
  BATON_RANGE("inspect_rows");
  check(n >= 0 && d >= 0, "inspect_rows", "rows of shape " + shape(n, d));
  simt::launch<inspect_kernel<Real>>(simt::warps(n), stream, hash, nonfinite, x, n, d);
}

template <class Real>
void fill_normals(Real* x, int n, Key key, Stream stream) {
  check(n >= 0, "fill_normals", std::to_string(n) + " numbers");
  simt::launch<normals_kernel<Real>>(simt::each((n + 3) / 4), stream, x, n, key);
}

template <class Real>
void sequential_steps(const UpdateSteps<Real>& s, UpdateRule rule, double gamma, int passes, int samples, int classes,
                      int cases, Stream stream) {
  BATON_RANGE("sequential_steps");
  check(samples >= 1 && samples <= most_update_samples, "sequential_steps",
        "1 to " + std::to_string(most_update_samples) + " samples a call, not " + std::to_string(samples));
  check(classes >= 2 && classes <= 1500, "sequential_steps", "2 to 1500 classes, not " + std::to_string(classes));
  check(passes >= 1 && cases >= 0, "sequential_steps", "passes " + std::to_string(passes));
  const size_t shared = (2 * size_t(samples) + 3 * size_t(classes) + 2) * sizeof(Real);
  simt::launch<steps_kernel<Real>>(simt::blocks(cases, steps_threads, shared), stream, s, rule, Real(gamma), passes,
                                   samples, classes);
}

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

template <class Real>
void adam_step(Real* w, Real* m, Real* v, const Real* g, Real lr, Real decay, int t, int n, Stream stream) {
  BATON_RANGE("adam_step");
  check(t >= 1 && n >= 0, "adam_step", "step " + std::to_string(t));
  const Real correction1 = Real(1 / (1 - std::pow(0.9, t))), correction2 = Real(1 / (1 - std::pow(0.999, t)));
  simt::launch<adam_kernel<Real>>(simt::each(n), stream, w, m, v, g, lr, decay, correction1, correction2, n);
}

#define BATON_LAST_LAYER(Real)                                                                               \
  template void softmax_residual(Real*, Real*, Real*, Real*, const Real*, const int32_t*, int, int, Stream); \
  template void softmax_curvature_product(Real*, const Real*, const Real*, int, int, Stream);                \
  template void row_dots(Real*, Real, const Real*, size_t, const Real*, size_t, Real, int, int, Stream);     \
  template void scale_rows(Real*, const Real*, const Real*, int, int, Stream);                               \
  template void gather_rows(Real*, const Real*, const int32_t*, int, int, Stream);                           \
  template void add_outer(Real*, Real, const Real*, const Real*, int, int, Stream);                          \
  template void add_diagonal(Real*, Real, int, Stream);                                                      \
  template void inspect_rows(uint64_t*, int32_t*, const Real*, int, int, Stream);                            \
  template void fill_normals(Real*, int, Key, Stream);                                                       \
  template void sequential_steps(const UpdateSteps<Real>&, UpdateRule, double, int, int, int, int, Stream);  \
  template void link_probabilities(const LinkArrays<Real>&, Link, double, int, int, int, Stream);            \
  template void adam_step(Real*, Real*, Real*, const Real*, Real, Real, int, int, Stream);
BATON_LAST_LAYER(float)
BATON_LAST_LAYER(double)

}  // namespace baton
