// Kernels of a Laplace approximation of the last layer (Huseljic et al. 2024): f = W phi, p = softmax(f), and a
// posterior q(W) = prod_c N(w_c; W_c, S) with one S [D x D] for all classes. The derivations are in the head notes of
// the .cu files. Arrays are row-major and packed: phi [n][D], W [C][D], logits [n][C]. Real is float or double; labels
// are int32.
#pragma once
#include "engine/philox.h"
#include "engine/runtime.h"

namespace baton {

// p = softmax(f), r = e_y - p, loss = -ln p_y, curvature = p_max (1 - p_max). p, r [n][C]; loss, curvature [n]. Any
// output may be null; labels may be null where r and loss are. A label outside [0, C) makes its r and loss NaN.
template <class Real>
void softmax_residual(Real* p, Real* r, Real* loss, Real* curvature, const Real* logits, const int32_t* labels, int n,
                      int classes, Stream);
// out = G d by rows, G = diag(p) - p p': the Gauss-Newton matrix of the cross-entropy. p, d, out [n][C]; may overlap.
template <class Real>
void softmax_curvature_product(Real* out, const Real* p, const Real* d, int n, int classes, Stream);

// v_i = alpha a_i . b_i + beta v_i over rows of length d, lda or ldb apart (0: one row for all). With beta = 0, v is
// not read.
template <class Real>
void row_dots(Real* v, Real alpha, const Real* a, size_t lda, const Real* b, size_t ldb, Real beta, int n, int d,
              Stream);
// out_i = sqrt(w_i) x_i; out may be x.
template <class Real>
void scale_rows(Real* out, const Real* x, const Real* w, int n, int d, Stream);
// out_i = x_index[i].
template <class Real>
void gather_rows(Real* out, const Real* x, const int32_t* index, int n, int d, Stream);
// A += alpha x y', A [rows][columns].
template <class Real>
void add_outer(Real* a, Real alpha, const Real* x, const Real* y, int rows, int columns, Stream);
// A += value I, A [n][n].
template <class Real>
void add_diagonal(Real* a, Real value, int n, Stream);
// Checks of rows: a hash of each row's bits (equal rows have equal hashes, and 0 and -0 count as equal), and 1 or 0 for
// whether one of its numbers is not finite.
template <class Real>
void inspect_rows(uint64_t* hash, int32_t* nonfinite, const Real* x, int n, int d, Stream);
// x[i] = lane i mod 4 of normal4(key, i / 4, 0, 0).
template <class Real>
void fill_normals(Real* x, int n, Key, Stream);

// How one new sample (phi, y) moves the posterior; v = phi' S phi, r = e_y - softmax(W phi).
enum class UpdateRule : int {
  implicit,  // W' = W + a (S phi)', a = e_y - softmax(f + v a): the minimiser of -ln p_y + (w' - w)' S^-1 (w' - w) / 2
  gaussian,  // W' = W + gamma r (S' phi)', curvature weight 1: the authors' rule
  // The same with the curvature weight p_max (1 - p_max): at the old logits for the step, at the new ones for S'.
  categorical,
  // As the authors' code has it: its gain divides by 1 + v, not by 1 + w v. For comparison only.
  categorical_published,
};

// A call of b = `samples` new samples, taken in their order (`passes` times over), for `cases` independent calls at
// once. It works in the space that the samples span, so that only products touch S and W. With U = Phi S [b][D], whose
// row i is (S phi_i)',
//   W' = W + step' U,      S' = S - (downdate U)' (downdate U),      P' = P + sum_t weight_t phi_t phi_t'.
template <class Real>
struct UpdateSteps {
  Real* gram;             // [cases][b][b]: in Phi S Phi'; out: of the posterior after the call
  Real* basis;            // [cases][b][b]: out: S' phi_k = sum_i basis[i][k] S phi_i
  Real* logits;           // [cases][b][C]: in W phi; out: after the call
  const int32_t* labels;  // [cases][b]
  Real* step;             // [cases][b][C]: out
  Real* downdate;         // [cases][passes b][b]: out
  Real* weight;           // [cases][passes b]: out
  // [cases]: out: 0, or 4 i + reason if sample i failed: 1 a number is not finite, 2 v is negative, 3 v exceeds 1 /
  // eps.
  int32_t* failure;
};
constexpr int most_update_samples = 64;  // b of a call
template <class Real>
void sequential_steps(const UpdateSteps<Real>&, UpdateRule, double gamma, int passes, int samples, int classes,
                      int cases, Stream);

// Links from a Gaussian N(f, V) over the logits to class probabilities.
enum class Link : int {
  map,          // softmax(f)
  mean_field,   // softmax(f / sqrt(1 + lambda v)), one variance v for each input
  probit,       // softmax(f_c / sqrt(1 + pi/8 V_cc))
  monte_carlo,  // mean of softmax(f + L eps), L L' = V
  bridge,       // Laplace bridge (Hobbhahn et al. 2022): the mean of a Dirichlet
  bridge_norm,  // the same of logits scaled to the variance sqrt(C / 2)
};
template <class Real>
struct LinkArrays {
  Real* probability;     // [n][C]: out
  Real* entropy;         // [n]: out, of the probability, nats; may be null
  Real* information;     // [n]: out, Link::monte_carlo: entropy - mean entropy of the draws (BALD); may be null
  const Real* logits;    // [n][C]
  const Real* variance;  // [n], the same for every class; or with `full` [n][C][C]; null for Link::map
  const Real* normals;   // [draws][C]: eps, the same for every input (common random numbers); Link::monte_carlo
  Real* factor;          // [n][C][C]: scratch for L; Link::monte_carlo with `full`
  bool full;             // whether `variance` holds covariance matrices
};
template <class Real>
void link_probabilities(const LinkArrays<Real>&, Link, double lambda, int draws, int n, int classes, Stream);

// Step t = 1, 2, ... of Adam (Kingma and Ba 2015) on w, with the gradient g + decay w; m and v are its moments.
template <class Real>
void adam_step(Real* w, Real* m, Real* v, const Real* g, Real lr, Real decay, int t, int n, Stream);

}  // namespace baton
