// Kernels of active learning with a last layer: the scores by which samples are chosen, and updates of the scores as
// the posterior changes. Arrays are row-major and packed: x [n][D] features, p and r [n][C]. Real is float or double.
#pragma once
#include "engine/runtime.h"

namespace baton {

// p_1st - p_2nd of every row; C >= 2.
template <class Real>
void margins(Real* margin, const Real* p, int n, int classes, Stream);

// The gradients of the cross-entropy by the last layer's weights, with the prediction as the label: g = r (x) phi with
// r = e_yhat - p, where yhat is the first of the largest p. They are never formed.
template <class Real>
struct Embeddings {
  const Real* x;     // [n][D]
  const Real* r;     // [n][C]
  const Real* size;  // [n]: |g|^2 = |r|^2 |phi|^2
  int n, dim, classes;
};
// r and size from p; norm [n] = |phi|^2.
template <class Real>
void gradient_embeddings(Real* r, Real* size, const Real* p, const Real* norm, int n, int classes, Stream);
// distance_i = |g_i - g_k|^2 to the row k = centre; with `keep` the smaller of that and the old distance_i.
template <class Real>
void embedding_distances(Real* distance, const Embeddings<Real>&, int centre, bool keep, Stream);

// Updates v_i = phi_i' S phi_i, and with u = S F s and q = s' F s also f_i = phi_i' S F S phi_i, for the posterior's S
// becoming S - kappa s s' (s = S phi_k of the old S). f may be null; then u and q are not used. kappa < 0 removes a
// sample again. v and f stay non-negative.
template <class Real>
void downdate_rows(Real* v, Real* f, const Real* x, const Real* s, const Real* u, Real kappa, Real q, int n, int d,
                   Stream);
// By how much tr(S F) falls when row i is added with curvature weight w_i: w f / (1 + w v). With `removal`, by how much
// it rises when the row is removed: w f / (1 - w v).
template <class Real>
void fisher_scores(Real* score, const Real* f, const Real* v, const Real* w, bool removal, int n, Stream);

}  // namespace baton
