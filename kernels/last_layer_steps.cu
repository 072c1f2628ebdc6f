// Laplace approximation of the last layer: the steps of a closed-form update.
//
// One new sample (phi, y) on N(w_c; W_c, S), with s = S phi, v = phi' s, f = W phi:
//   curvature w >= 0 of the sample:   S' = S - w / (1 + w v) s s'          (Sherman-Morrison; P' = P + w phi phi')
//   gaussian       w = 1                       W' = W + gamma r s' / (1 + v)
//   categorical    w = p_max (1 - p_max)       W' = W + gamma r s' / (1 + w v); then w again at the new logits, for S'
//   implicit       W' = W + a s', where a solves a = e_y - softmax(f + v a); then w at the new logits, for S'
//
// The implicit rule. With u = f + v a it is the minimum of the strictly convex lse(u) - u_y + |u - f|^2 / (2 v), so the
// solution exists, is unique and needs no step size. It is found by Newton's method:
//   (I + v G) delta = h,   h = e_y - softmax(u) - a,   G = diag(p) - p p',   by Sherman-Morrison
//   delta = D^-1 h + v D^-1 p (p' D^-1 h) / sum_c p_c / (1 + v p_c),   D = I + v diag(p)
// A step is halved until the objective falls, or until no logit moves by more than 1/2. |D^3 lse[d, d, d]| is at most
// range(d) D^2 lse[d, d], so such a step always descends, also where rounding hides that it does.
//
// A sequence of b samples never touches S itself. With U = S Phi', M_t = Phi S_t Phi' and S_t phi_k = U E_t[:, k]:
//   s_t = U e, e = E_t[:, j];  m = M_t[:, j];  v = m_j
//   logits of all samples += m a';   W += a (U e)';   S -= kappa (U e)(U e)';   M -= kappa m m';   E -= kappa e m'
// So a call costs one product with S before and one rank-b update of it after, O(b D^2) in BLAS 3, and O(b^3 + b^2 C)
// here, in one block. It is exactly the sequential rule, to rounding.
#include "kernels/last_layer_parts.h"

namespace baton {
namespace {

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
  const Real top = largest(p, n), lse = softmax_row(p, p, top, n);  // relative to top: exact where the label is the top
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
    } else {  // close to the solution, steps that no longer halve are rounding errors
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
  constexpr Real most = sizeof(Real) == 8 ? Real(4.5e15) : Real(8.4e6);  // 1 / eps: above it S' keeps no digit of S

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
      if (rule != UpdateRule::gaussian) {  // the curvature that S' gets is that at the new logits
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

}  // namespace

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

template void sequential_steps(const UpdateSteps<float>&, UpdateRule, double, int, int, int, int, Stream);
template void sequential_steps(const UpdateSteps<double>&, UpdateRule, double, int, int, int, int, Stream);

}  // namespace baton
