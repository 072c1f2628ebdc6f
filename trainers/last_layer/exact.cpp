// One new sample, phi and y, on N(theta; w, Sigma), with J = I (x) phi' [C x CD], f = J w and p = softmax(f):
//   B = Sigma J' [CD x C]: row-major, this is Sigma, seen as (CD C) x D, times phi
//   A = J B [C x C], the covariance of the logits
//   G = diag(p) - p p' = F F',  F = diag(sqrt p) - p sqrt(p)'   (sum p = 1; G is singular and never inverted)
//   I + F'A F = L L',  T = F L'^-1:   G (I + A G)^-1 = T T', and
//   Sigma' = Sigma - (B T)(B T)',   P' = P + G (x) phi phi',   ln det P' = ln det P + 2 sum ln L_ii
// A Newton step is w' = w + Sigma' J'(e_y - p) = w + B a, a = r - T T'A r with r = e_y - p. The implicit step solves
//   a = e_y - softmax(f + A a)
// by damped Newton: with h the residual, (I + G A)^-1 h = h - T T'A h at u = f + A a, which descends the strictly
// convex lse(u) - u_y + a'A a / 2. Its first iteration is the Newton step.
//
// All C x C algebra is on the host: it is C^3 beside the (CD)^2 C of the products, a chain of small dependent steps,
// and a sample needs one transfer of C^2 + C numbers each way. Every update works on copies, which replace the state at
// the end: an error changes nothing.
#include "trainers/last_layer/exact.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace baton {
namespace {

using Doubles = std::vector<double>;

constexpr size_t room = size_t(1) << 23;  // doubles of scratch that a pass over many rows takes (64 MB)
constexpr double most_variance = 4.5e15;  // 1 / eps

int rows_at_once(int count, size_t doubles_a_row) {
  return int(std::clamp<size_t>(room / doubles_a_row, 1, size_t(std::max(count, 1))));
}

bool all_finite(const Doubles& x) {
  return std::all_of(x.begin(), x.end(), [](double v) { return std::isfinite(v); });
}
double dot(const Doubles& a, const Doubles& b) { return std::inner_product(a.begin(), a.end(), b.begin(), 0.0); }
double largest(const Doubles& x) {
  double top = 0;
  for (double v : x) top = std::max(top, std::abs(v));
  return top;
}

void check_settings(int dim, int classes, double tau) {
  if (dim < 1 || classes < 2)
    throw InputError("a last layer needs features and two classes: dim " + std::to_string(dim) + ", classes " +
                     std::to_string(classes));
  if (!(tau > 0) || !std::isfinite(tau)) throw InputError("prior precision " + std::to_string(tau) + ": above 0");
}

void check_weights(const Doubles& weights, int dim, int classes) {
  if (weights.size() != size_t(dim) * classes)
    throw InputError(std::to_string(weights.size()) + " weights, expected " + std::to_string(classes) + " x " +
                     std::to_string(dim));
  if (!all_finite(weights)) throw InputError("weights that are not finite");
}

// Throws InputError for another dim, features that are not finite and, where labels are wanted, those outside [0, C).
std::vector<int32_t> checked_labels(Device& device, const FeatureRows<double>& rows, int dim, int classes,
                                    bool labelled) {
  if (rows.count < 0 || rows.dim != dim)
    throw InputError("features of shape [" + std::to_string(rows.count) + "][" + std::to_string(rows.dim) +
                     "], expected dim " + std::to_string(dim));
  if (rows.count == 0) return {};
  Scratch::Frame scratch(device);
  auto* hash = scratch.take<uint64_t>(rows.count);
  auto* nonfinite = scratch.take<int32_t>(rows.count);
  inspect_rows(hash, nonfinite, rows.x, rows.count, dim, device.stream());
  const auto bad = download(device, nonfinite, rows.count);
  if (const auto at = std::find(bad.begin(), bad.end(), 1); at != bad.end())
    throw InputError("sample " + std::to_string(at - bad.begin()) + " has features that are not finite");
  if (!labelled) return {};
  if (!rows.labels) throw InputError("samples without labels");
  auto labels = download(device, rows.labels, rows.count);
  for (int i = 0; i < rows.count; i++)
    if (labels[i] < 0 || labels[i] >= classes)
      throw InputError("sample " + std::to_string(i) + " has the label " + std::to_string(labels[i]) +
                       ", expected 0 to " + std::to_string(classes - 1));
  return labels;
}

// softmax(W phi_n) [n][C] of all rows; weights [C][D] on the device.
Doubles probabilities(Device& device, const double* weights, const double* x, int n, int dim, int classes) {
  const int step = rows_at_once(n, 2 * size_t(classes));
  Scratch::Frame scratch(device);
  auto *logits = scratch.take<double>(size_t(step) * classes), *p = scratch.take<double>(size_t(step) * classes);
  Doubles all(size_t(n) * classes);
  for (int first = 0; first < n; first += step) {
    const int count = std::min(step, n - first);
    multiply(device, false, true, count, classes, dim, 1.0, x + size_t(first) * dim, dim, weights, dim, 0.0, logits,
             classes);
    softmax_residual<double>(p, nullptr, nullptr, nullptr, logits, nullptr, count, classes, device.stream());
    copy_to_host(device, all.data() + size_t(first) * classes, p, sizeof(double) * size_t(count) * classes);
  }
  return all;
}

// 1 - p_c as the sum of the others: 1 - p keeps no digits of a confident sample's curvature.
double all_but(const double* p, int c, int classes) {
  double sum = 0;
  for (int e = 0; e < classes; e++) sum += e == c ? 0 : p[e];
  return sum;
}

// u -> softmax(u); returns ln sum exp u.
double softmax_in_place(Doubles& u) {
  const double top = *std::max_element(u.begin(), u.end());
  double sum = 0;
  for (double& v : u) sum += v = std::exp(v - top);
  for (double& v : u) v /= sum;
  return top + std::log(sum);
}

// y = M x, or M'x, for M [n x n].
Doubles product(const Doubles& m, const Doubles& x, bool transpose = false) {
  const int n = int(x.size());
  Doubles y(n, 0);
  for (int i = 0; i < n; i++)
    for (int j = 0; j < n; j++) y[transpose ? j : i] += m[size_t(i) * n + j] * x[transpose ? i : j];
  return y;
}

// T and 2 sum ln L_ii (see above) of a sample with probabilities p and logit covariance A.
struct Gain {
  Doubles t;  // [C x C]
  double log_determinant = 0;

  Gain(const Doubles& p, const Doubles& a) {
    const int n = int(p.size());
    const auto at = [n](int i, int j) { return size_t(i) * n + j; };
    Doubles l(size_t(n) * n, 0), af(size_t(n) * n, 0), f(size_t(n) * n);
    for (int i = 0; i < n; i++)
      for (int j = 0; j < n; j++)
        f[at(i, j)] = i == j ? std::sqrt(p[i]) * all_but(p.data(), i, n) : -p[i] * std::sqrt(p[j]);
    for (int i = 0; i < n; i++)
      for (int k = 0; k < n; k++)
        for (int j = 0; j < n; j++) af[at(i, j)] += a[at(i, k)] * f[at(k, j)];
    for (int k = 0; k < n; k++)
      for (int i = 0; i < n; i++)
        for (int j = 0; j <= i; j++) l[at(i, j)] += f[at(k, i)] * af[at(k, j)];
    for (int j = 0; j < n; j++) {
      double pivot = 1 + l[at(j, j)];
      for (int k = 0; k < j; k++) pivot -= l[at(j, k)] * l[at(j, k)];
      if (!(pivot > 0) || !std::isfinite(pivot)) throw RunError("the covariance is no longer positive definite");
      const double root = l[at(j, j)] = std::sqrt(pivot);
      log_determinant += 2 * std::log(root);
      for (int i = j + 1; i < n; i++) {
        double sum = l[at(i, j)];
        for (int k = 0; k < j; k++) sum -= l[at(i, k)] * l[at(j, k)];
        l[at(i, j)] = sum / root;
      }
    }
    t = std::move(f);  // rows of T solve L t' = f'
    for (int i = 0; i < n; i++)
      for (int j = 0; j < n; j++) {
        double sum = t[at(i, j)];
        for (int k = 0; k < j; k++) sum -= l[at(j, k)] * t[at(i, k)];
        t[at(i, j)] = sum / l[at(j, j)];
      }
  }

  // (I + G A)^-1 h
  Doubles step(const Doubles& a, const Doubles& h) const {
    const Doubles back = product(t, product(t, product(a, h), true));
    Doubles d = h;
    for (size_t c = 0; c < d.size(); c++) d[c] -= back[c];
    return d;
  }
};

Doubles residual(const Doubles& p, int label) {
  Doubles r(p.size());
  for (int c = 0; c < int(p.size()); c++) r[c] = c == label ? all_but(p.data(), c, int(p.size())) : -p[c];
  return r;
}

// The root of a = e_y - softmax(f + A a).
Doubles implicit_step(const Doubles& a_matrix, const Doubles& f, int label) {
  constexpr double done = 1e-14, near = 1e-9, usable = 1e-7;
  const int n = int(f.size());
  Doubles a(n, 0), p;
  const auto objective = [&](const Doubles& at) {  // leaves p = softmax(u)
    const Doubles shift = product(a_matrix, at);
    p = f;
    for (int c = 0; c < n; c++) p[c] += shift[c];
    const double own = p[label];
    return softmax_in_place(p) - own + dot(at, shift) / 2;
  };
  double now = objective(a), before = INFINITY;
  for (int iteration = 0;; iteration++) {
    Doubles h = residual(p, label);
    for (int c = 0; c < n; c++) h[c] -= a[c];
    const double error = largest(h);
    const bool stalls = error <= near && error > before / 2;  // what is left is rounding
    if (error <= done || stalls) return a;
    if (!std::isfinite(error) || iteration == 100) {
      if (error <= usable) return a;
      throw RunError("an implicit step did not converge: residual " + std::to_string(error));
    }
    before = error;
    const Doubles delta = Gain(p, a_matrix).step(a_matrix, h);
    const double slope = dot(h, product(a_matrix, delta));  // minus the derivative along delta
    const auto moved = [&](double t) {
      Doubles b = a;
      for (int c = 0; c < n; c++) b[c] += t * delta[c];
      return b;
    };
    double t = 1;
    Doubles next = moved(t);
    double value = objective(next);
    if (error > near)
      for (int halving = 0; halving < 50 && !(value <= now - 1e-4 * t * slope); halving++) {
        t /= 2;
        next = moved(t);
        value = objective(next);
      }
    a = std::move(next);
    now = value;
  }
}

Evidence evidence_of(double log_likelihood, double log_determinant, double order, double tau, double squares,
                     double determinant_by_log_tau) {
  return {log_likelihood - (log_determinant - order * std::log(tau) + tau * squares) / 2,
          (order - tau * squares - determinant_by_log_tau) / 2};
}

}  // namespace

// ------------------------------------------------------------------------------------------------- all C D weights
struct ExactLastLayer::State {
  State(Device& d, int dimension, int class_count)
      : device(d), dim(dimension), classes(class_count), order(dim * classes), factorizer(d, arena, order) {
    const size_t all = size_t(order) * order, small = size_t(classes) * classes + classes;
    for (double** m : {&p, &sigma, &next_p, &next_sigma, &h}) *m = arena.take<double>(all);
    for (double** v : {&w, &next_w, &diagonal}) *v = arena.take<double>(order);
    for (double** m : {&b, &q}) *m = arena.take<double>(size_t(order) * classes);
    for (double** m : {&logit_moments, &gains}) *m = arena.take<double>(small);
    one = arena.take<double>(1);
    upload(device, one, {1.0});
  }

  size_t bytes() const { return sizeof(double) * order * order; }

  // into += sum_n G_n (x) phi_n phi_n', for p [n][C]. The curvature's sign is that of the pair of classes, so that a
  // block is a product of rows scaled by sqrt |G_ce| with themselves, and symmetric.
  void add_curvature(double* into, const double* x, const Doubles& probability, int n) {
    const int pairs = classes * (classes + 1) / 2, step = rows_at_once(n, size_t(dim) + pairs);
    Scratch::Frame scratch(device);
    auto *scaled = scratch.take<double>(size_t(step) * dim), *weights = scratch.take<double>(size_t(step) * pairs);
    for (int first = 0; first < n; first += step) {
      const int count = std::min(step, n - first);
      Doubles sizes(size_t(count) * pairs);
      for (int i = 0; i < count; i++) {
        const double* row = probability.data() + size_t(first + i) * classes;
        size_t pair = 0;
        for (int c = 0; c < classes; c++)
          for (int e = 0; e <= c; e++)
            sizes[pair++ * count + i] = row[c] * (c == e ? all_but(row, c, classes) : row[e]);
      }
      upload(device, weights, sizes);
      size_t pair = 0;
      for (int c = 0; c < classes; c++)
        for (int e = 0; e <= c; e++) {
          scale_rows(scaled, x + size_t(first) * dim, weights + pair++ * count, count, dim, device.stream());
          rank_update(device, true, dim, count, c == e ? 1.0 : -1.0, scaled, dim, 1.0, block(into, c, e), order);
        }
    }
    for (int c = 0; c < classes; c++)
      for (int e = 0; e < c; e++) mirror_lower(block(into, c, e), dim, order, device.stream());
    mirror_lower(into, order, order, device.stream());
  }
  double* block(double* m, int c, int e) const { return m + size_t(c) * dim * order + size_t(e) * dim; }

  // next_sigma's lower triangle = the Cholesky factor of next_p + ridge I.
  void factor(double ridge) {
    copy_on_device(device, next_sigma, next_p, bytes());
    if (ridge != 0) add_diagonal(next_sigma, ridge, order, device.stream());
    if (factorizer.cholesky(next_sigma, order) != 0)
      throw RunError("the posterior precision is not positive definite: raise the prior precision or rescale features");
  }
  // next_sigma = (next_p + ridge I)^-1; returns the log-determinant of what it inverts.
  double invert(double ridge) {
    factor(ridge);
    const double value = factorizer.log_determinant(next_sigma, order);
    factorizer.invert(next_sigma, order);
    return value;
  }

  Doubles diagonal_of(const double* m) {
    row_dots(diagonal, 1.0, m, size_t(order) + 1, one, 0, 0.0, order, 1, device.stream());
    return download(device, diagonal, order);
  }

  // What has been computed beside the state: throws where it must not become the state.
  void verify(double new_log_determinant) {
    const Doubles precisions = diagonal_of(next_p), variances = diagonal_of(next_sigma);
    const bool finite = std::isfinite(new_log_determinant) && all_finite(download(device, next_w, order)) &&
                        all_finite(precisions) && all_finite(variances);
    if (!finite || !(*std::min_element(variances.begin(), variances.end()) > 0))
      throw RunError("the posterior is no longer finite and positive definite");
  }
  void commit(double new_log_determinant) {
    std::swap(p, next_p), std::swap(sigma, next_sigma), std::swap(w, next_w);
    log_determinant = new_log_determinant;
  }

  // One sample on next_w and next_sigma. Returns the probabilities whose curvature next_sigma now holds, and adds to
  // the log-determinant of its inverse.
  Doubles absorb(const double* phi, int label, int sample, ExactRule rule, double& log_det) {
    multiply(device, false, false, order * classes, 1, dim, 1.0, next_sigma, dim, phi, 1, 0.0, b, 1);
    double* logits = logit_moments + size_t(classes) * classes;
    for (int c = 0; c < classes; c++)
      multiply(device, false, false, 1, classes, dim, 1.0, phi, dim, b + size_t(c) * dim * classes, classes, 0.0,
               logit_moments + size_t(c) * classes, classes);
    multiply(device, false, false, classes, 1, dim, 1.0, next_w, dim, phi, 1, 0.0, logits, 1);
    Doubles a = download(device, logit_moments, size_t(classes) * classes + classes);
    const Doubles f(a.end() - classes, a.end());
    a.resize(size_t(classes) * classes);
    double top = 0, bottom = INFINITY;
    for (int c = 0; c < classes; c++) {
      for (int e = 0; e < c; e++) {
        double &low = a[size_t(c) * classes + e], &high = a[size_t(e) * classes + c];
        low = high = (low + high) / 2;
      }
      top = std::max(top, a[size_t(c) * classes + c]), bottom = std::min(bottom, a[size_t(c) * classes + c]);
    }
    const std::string who = "sample " + std::to_string(sample);
    if (!all_finite(a) || !all_finite(f)) throw RunError(who + ": its logits are not finite");
    if (bottom < 0) throw RunError(who + ": the covariance is no longer positive definite");
    if (top > most_variance)
      throw InputError(who + ": the variance of its logits is " + std::to_string(top) +
                       ", and nothing of the old data would be left: rescale the features");

    const auto probabilities_after = [&](const Doubles& step) {
      Doubles p = product(a, step);
      for (int c = 0; c < classes; c++) p[c] += f[c];
      softmax_in_place(p);
      return p;
    };
    Doubles old = f, step;
    softmax_in_place(old);
    if (rule == ExactRule::implicit) step = implicit_step(a, f, label);
    else step = Gain(old, a).step(a, residual(old, label));
    const Doubles kept = rule == ExactRule::newton_old ? old : probabilities_after(step);
    const Gain gain(kept, a);

    Doubles both = gain.t;
    both.insert(both.end(), step.begin(), step.end());
    upload(device, gains, both);
    const double* coefficients = gains + size_t(classes) * classes;
    multiply(device, false, false, order, 1, classes, 1.0, b, classes, coefficients, 1, 1.0, next_w, 1);
    multiply(device, false, false, order, classes, classes, 1.0, b, classes, gains, classes, 0.0, q, classes);
    rank_update(device, false, order, classes, -1.0, q, classes, 1.0, next_sigma, order);
    mirror_lower(next_sigma, order, order, device.stream());
    log_det += gain.log_determinant;
    return kept;
  }

  Device& device;
  const int dim, classes, order;
  Arena arena;
  Factorizer<double> factorizer;
  double *p, *sigma, *next_p, *next_sigma, *h;  // [CD][CD], whole
  double *w, *next_w, *diagonal;                // [CD]
  double *b, *q;                                // [CD][C]
  double* logit_moments;                        // A [C][C], then f [C]
  double* gains;                                // T [C][C], then the step a [C]
  double* one;
  double log_determinant = 0;  // ln det P
};

ExactLastLayer::ExactLastLayer(Device& device, int dim, int classes, double tau)
    : device_(device), dim_(dim), classes_(classes), tau_(tau) {
  check_settings(dim, classes, tau);
  if (int64_t(dim) * classes > most_weights)
    throw InputError("an exact last layer holds matrices over all weights: " + std::to_string(classes) +
                     " classes of " + std::to_string(dim) + " features are " + std::to_string(int64_t(dim) * classes) +
                     " weights, at most " + std::to_string(most_weights));
  s_ = std::make_unique<State>(device, dim, classes);
  add_diagonal(s_->p, tau, s_->order, device.stream());
  add_diagonal(s_->sigma, 1 / tau, s_->order, device.stream());
  s_->log_determinant = s_->order * std::log(tau);
}
ExactLastLayer::~ExactLastLayer() = default;

MapResult ExactLastLayer::fit(const FeatureRows<double>& rows, const MapOptions& options) {
  checked_labels(device_, rows, dim_, classes_, true);
  MapOptions own = options;
  own.tau = tau_;  // one prior for the weights and their covariance
  MapResult result = fit_map(device_, rows, classes_, own);
  fit_covariance(rows, result.weights);
  return result;
}

void ExactLastLayer::fit_covariance(const FeatureRows<double>& rows, const std::vector<double>& weights) {
  State& s = *s_;
  check_weights(weights, dim_, classes_);
  checked_labels(device_, rows, dim_, classes_, false);
  upload(device_, s.next_w, weights);
  fill_zero(device_, s.next_p, s.bytes());
  s.add_curvature(s.next_p, rows.x, probabilities(device_, s.next_w, rows.x, rows.count, dim_, classes_), rows.count);
  const double log_det = s.invert(tau_);
  s.verify(log_det);
  copy_on_device(device_, s.h, s.next_p, s.bytes());
  add_diagonal(s.next_p, tau_, s.order, device_.stream());
  s.commit(log_det);
}

Evidence ExactLastLayer::evidence(double log_likelihood) {
  const Doubles w = weights(), variances = s_->diagonal_of(s_->sigma);
  return evidence_of(log_likelihood, s_->log_determinant, s_->order, tau_, dot(w, w),
                     tau_ * std::accumulate(variances.begin(), variances.end(), 0.0));
}

void ExactLastLayer::logits(const double* x, int n, double* out) {
  multiply(device_, false, true, n, classes_, dim_, 1.0, x, dim_, s_->w, dim_, 0.0, out, classes_);
}

// X Sigma_c for every class c makes rows (n, c, e) of D numbers; each times its phi_n is an entry of f_var.
void ExactLastLayer::logit_covariances(const double* x, int n, double* out) {
  const State& s = *s_;
  if (n < 0) throw InputError(std::to_string(n) + " rows");
  const size_t square = size_t(classes_) * classes_, wide = square * dim_;
  const int step = rows_at_once(n, 2 * wide);
  Scratch::Frame scratch(device_);
  auto *products = scratch.take<double>(step * wide), *repeated = scratch.take<double>(step * wide);
  auto* index = scratch.take<int32_t>(step * square);
  std::vector<int32_t> sources(step * square);
  for (size_t i = 0; i < sources.size(); i++) sources[i] = int32_t(i / square);
  upload(device_, index, sources);
  for (int first = 0; first < n; first += step) {
    const int count = std::min(step, n - first), entries = int(count * square);
    const double* part = x + size_t(first) * dim_;
    gather_rows(repeated, part, index, entries, dim_, device_.stream());
    for (int c = 0; c < classes_; c++)
      multiply(device_, false, false, count, s.order, dim_, 1.0, part, dim_, s.sigma + size_t(c) * dim_ * s.order,
               s.order, 0.0, products + size_t(c) * s.order, int(wide));
    row_dots(out + first * square, 1.0, products, size_t(dim_), repeated, size_t(dim_), 0.0, entries, dim_,
             device_.stream());
  }
}

LinkedPredictions ExactLastLayer::predict(const double* x, int n, const LinkOptions& options) {
  const bool drawn = options.link == Link::monte_carlo;
  if (options.link == Link::mean_field)
    throw InputError("the mean-field link takes one variance for all classes, which exact covariances do not have");
  if (n < 0) throw InputError(std::to_string(n) + " rows");
  if (drawn && (options.draws < 1 || options.draws > (1 << 30) / classes_))
    throw InputError(std::to_string(options.draws) + " draws");
  const size_t square = size_t(classes_) * classes_;
  const int step = rows_at_once(n, 2 * square + 2 * size_t(classes_) + 2);
  Scratch::Frame scratch(device_);
  auto *f = scratch.take<double>(size_t(step) * classes_), *probability = scratch.take<double>(size_t(step) * classes_);
  auto *entropy = scratch.take<double>(step), *information = scratch.take<double>(step);
  double* variance = options.link == Link::map ? nullptr : scratch.take<double>(step * square);
  double *factor = nullptr, *normals = nullptr;
  if (drawn) {
    factor = scratch.take<double>(step * square);
    normals = scratch.take<double>(size_t(options.draws) * classes_);
    fill_normals(normals, options.draws * classes_, key_of(options.seed, 13), device_.stream());
  }
  LinkedPredictions result;
  const auto append = [&](Doubles& to, const double* from, size_t count) {
    const Doubles part = download(device_, from, count);
    to.insert(to.end(), part.begin(), part.end());
  };
  for (int first = 0; first < n; first += step) {
    const int count = std::min(step, n - first);
    const double* part = x + size_t(first) * dim_;
    logits(part, count, f);
    if (variance) logit_covariances(part, count, variance);
    link_probabilities<double>(
        {probability, entropy, drawn ? information : nullptr, f, variance, normals, factor, variance != nullptr},
        options.link, options.lambda, options.draws, count, classes_, device_.stream());
    append(result.probability, probability, size_t(count) * classes_);
    append(result.entropy, entropy, count);
    if (drawn) append(result.information, information, count);
  }
  return result;
}

void ExactLastLayer::update(const FeatureRows<double>& rows, ExactRule rule) {
  State& s = *s_;
  const auto labels = checked_labels(device_, rows, dim_, classes_, true);
  if (rows.count == 0) return;
  copy_on_device(device_, s.next_sigma, s.sigma, s.bytes());
  copy_on_device(device_, s.next_p, s.p, s.bytes());
  copy_on_device(device_, s.next_w, s.w, sizeof(double) * s.order);
  double log_det = s.log_determinant;
  Doubles kept;
  for (int i = 0; i < rows.count; i++) {
    const Doubles p = s.absorb(rows.x + size_t(i) * dim_, labels[i], i, rule, log_det);
    kept.insert(kept.end(), p.begin(), p.end());
  }
  s.add_curvature(s.next_p, rows.x, kept, rows.count);
  s.verify(log_det);
  s.commit(log_det);
}

MapResult ExactLastLayer::update_jointly(const FeatureRows<double>& rows, int iterations) {
  State& s = *s_;
  const auto labels = checked_labels(device_, rows, dim_, classes_, true);
  if (iterations < 1) throw InputError(std::to_string(iterations) + " Newton steps, at least 1");
  const int n = rows.count;
  const size_t outputs = size_t(n) * classes_;
  Scratch::Frame scratch(device_);
  auto *logits = scratch.take<double>(outputs), *r = scratch.take<double>(outputs), *loss = scratch.take<double>(n);
  auto *shift = scratch.take<double>(s.order), *slope = scratch.take<double>(s.order);
  const Doubles start = weights();

  struct Point {
    Doubles weights, gradient;
    double objective, log_likelihood;
  };
  MapResult result;
  // Leaves next_w = the point's weights.
  const auto evaluate = [&](Doubles weights) {
    Point at{std::move(weights), {}, 0, 0};
    Doubles moved = at.weights;
    for (int i = 0; i < s.order; i++) moved[i] -= start[i];
    upload(device_, s.next_w, at.weights);
    upload(device_, shift, moved);
    multiply(device_, false, false, s.order, 1, s.order, 1.0, s.p, s.order, shift, 1, 0.0, slope, 1);
    at.objective = dot(moved, download(device_, slope, s.order)) / 2;
    if (n) {
      multiply(device_, false, true, n, classes_, dim_, 1.0, rows.x, dim_, s.next_w, dim_, 0.0, logits, classes_);
      softmax_residual<double>(nullptr, r, loss, nullptr, logits, rows.labels, n, classes_, device_.stream());
      multiply(device_, true, false, classes_, dim_, n, -1.0, r, classes_, rows.x, dim_, 1.0, slope, dim_);
      for (double l : download(device_, loss, n)) at.log_likelihood -= l;
    }
    at.gradient = download(device_, slope, s.order);
    at.objective -= at.log_likelihood;
    result.evaluations++;
    return at;
  };
  // next_p = P + H at next_w.
  const auto curve = [&] {
    copy_on_device(device_, s.next_p, s.p, s.bytes());
    s.add_curvature(s.next_p, rows.x, probabilities(device_, s.next_w, rows.x, n, dim_, classes_), n);
  };

  Point now = evaluate(start);
  const double enough = 1e-12 * (1 + largest(now.gradient));
  bool stalls = false;  // what is left of the gradient is rounding
  while (result.iterations < iterations && largest(now.gradient) > enough && !stalls) {
    curve();
    s.factor(0);
    upload(device_, shift, now.gradient);
    for (const bool transpose : {false, true}) s.factorizer.solve(transpose, s.next_sigma, s.order, shift, 1, 1);
    const Doubles step = download(device_, shift, s.order);
    const double fall = dot(now.gradient, step), rounding = 1e-13 * (1 + std::abs(now.objective));
    const auto move = [&](double t) {
      Doubles moved = now.weights;
      for (int i = 0; i < s.order; i++) moved[i] -= t * step[i];
      return evaluate(std::move(moved));
    };
    double t = 1;
    Point next = move(t);
    if (iterations > 1)
      for (int halving = 0; halving < 50 && !(next.objective <= now.objective - 1e-4 * t * fall + rounding);
           halving++) {
        t /= 2;
        next = move(t);
      }
    if (!std::isfinite(next.objective) || !all_finite(next.gradient))
      throw RunError("a joint update stopped being finite");
    stalls = iterations > 1 && fall <= rounding && largest(next.gradient) > largest(now.gradient) / 2;
    now = std::move(next);
    result.iterations++;
  }
  result.gradient = largest(now.gradient);
  result.converged = stalls || result.gradient <= enough;
  result.objective = now.objective, result.log_likelihood = now.log_likelihood;
  curve();
  const double log_det = s.invert(0);
  s.verify(log_det);
  s.commit(log_det);
  result.weights = std::move(now.weights);
  return result;
}

std::vector<double> ExactLastLayer::weights() const { return download(device_, s_->w, s_->order); }
std::vector<double> ExactLastLayer::covariance() const {
  return download(device_, s_->sigma, size_t(s_->order) * s_->order);
}
std::vector<double> ExactLastLayer::precision() const {
  return download(device_, s_->p, size_t(s_->order) * s_->order);
}
std::vector<double> ExactLastLayer::curvature() const {
  return download(device_, s_->h, size_t(s_->order) * s_->order);
}
double ExactLastLayer::log_determinant() const { return s_->log_determinant; }

// ------------------------------------------------------------------------------------------------------- Kronecker
KroneckerLastLayer::KroneckerLastLayer(Device& device, const FeatureRows<double>& rows, int classes,
                                       const std::vector<double>& weights, double tau, bool damped)
    : dim_(rows.dim), classes_(classes), tau_(tau), damped_(damped), weights_(weights) {
  check_settings(dim_, classes, tau);
  check_weights(weights, dim_, classes);
  if (rows.count < 1) throw InputError("a Kronecker approximation needs at least one sample");
  checked_labels(device, rows, dim_, classes, false);
  Arena arena;
  Factorizer<double> factorizer(device, arena, std::max(dim_, classes));
  const size_t square_a = size_t(dim_) * dim_, square_b = size_t(classes) * classes;
  auto *a = arena.take<double>(square_a), *b = arena.take<double>(square_b);
  auto *values = arena.take<double>(std::max(dim_, classes)), *w = arena.take<double>(weights.size());

  rank_update(device, true, dim_, rows.count, 1.0 / rows.count, rows.x, dim_, 0.0, a, dim_);
  mirror_lower(a, dim_, dim_, device.stream());
  a_ = download(device, a, square_a);

  upload(device, w, weights);
  const Doubles p = probabilities(device, w, rows.x, rows.count, dim_, classes);
  b_.assign(square_b, 0);
  for (int n = 0; n < rows.count; n++) {
    const double* row = p.data() + size_t(n) * classes;
    for (int c = 0; c < classes; c++)
      for (int e = 0; e < classes; e++)
        b_[size_t(c) * classes + e] += c == e ? row[c] * all_but(row, c, classes) : -row[c] * row[e];
  }
  upload(device, b, b_);

  const auto decompose = [&](double* m, int n, Doubles& vectors, Doubles& spectrum) {
    if (factorizer.eigen(m, values, n) != 0) throw RunError("the eigenvalues of a Kronecker factor did not converge");
    vectors = download(device, m, size_t(n) * n);
    spectrum = download(device, values, n);
    for (double& v : spectrum) v = std::max(v, 0.0);  // B has an eigenvalue 0, which rounding makes negative
    if (!all_finite(spectrum)) throw RunError("a Kronecker factor is not finite");
  };
  decompose(a, dim_, a_vectors_, a_values_);
  decompose(b, classes, b_vectors_, b_values_);
}

double KroneckerLastLayer::log_determinant() const {
  const double root = std::sqrt(tau_);
  double sum = 0;
  for (double b : b_values_)
    for (double a : a_values_) sum += damped_ ? std::log((b + root) * (a + root)) : std::log(b * a + tau_);
  return sum;
}

Evidence KroneckerLastLayer::evidence(double log_likelihood) const {
  const double root = std::sqrt(tau_);
  double by_log_tau = 0;  // of the log-determinant; undamped it is tau tr P^-1
  for (double b : b_values_)
    for (double a : a_values_)
      by_log_tau += damped_ ? root / 2 * (1 / (b + root) + 1 / (a + root)) : tau_ / (b * a + tau_);
  return evidence_of(log_likelihood, log_determinant(), double(dim_) * classes_, tau_, dot(weights_, weights_),
                     by_log_tau);
}

// With the eigenvectors u_j of A and v_i of B: sum_i v_i v_i' sum_j (u_j'phi)^2 / (b_i a_j + tau).
std::vector<double> KroneckerLastLayer::logit_covariances(const std::vector<double>& x, int n) const {
  if (n < 0 || x.size() != size_t(n) * dim_)
    throw InputError(std::to_string(x.size()) + " features, expected " + std::to_string(n) + " x " +
                     std::to_string(dim_));
  const double root = std::sqrt(tau_);
  const size_t square = size_t(classes_) * classes_;
  Doubles out(n * square, 0), squares(dim_);
  for (int k = 0; k < n; k++) {
    const double* phi = x.data() + size_t(k) * dim_;
    for (int j = 0; j < dim_; j++) {
      const double along = std::inner_product(phi, phi + dim_, a_vectors_.data() + size_t(j) * dim_, 0.0);
      squares[j] = along * along;
    }
    for (int i = 0; i < classes_; i++) {
      const double b = b_values_[i], *v = b_vectors_.data() + size_t(i) * classes_;
      double sum = 0;
      for (int j = 0; j < dim_; j++)
        sum += squares[j] / (damped_ ? (b + root) * (a_values_[j] + root) : b * a_values_[j] + tau_);
      for (int c = 0; c < classes_; c++)
        for (int e = 0; e < classes_; e++) out[k * square + size_t(c) * classes_ + e] += sum * v[c] * v[e];
    }
  }
  return out;
}

// ------------------------------------------------------------------------------------------------ prior precision
TunedPrior tune_prior(Device& device, const FeatureRows<double>& rows, int classes, EvidenceStructure structure,
                      SampleWeight weight, double low, double high, int grid, int refinements) {
  check_settings(rows.dim, classes, low);
  if (!(high > low) || !std::isfinite(high) || grid < 2 || refinements < 0)
    throw InputError("a search for the prior precision needs low < high, two values or more and refinements >= 0");
  std::vector<std::pair<double, double>> tried;  // tau, evidence
  MapOptions options;
  const auto evidence_at = [&](double log_tau) {
    const double tau = options.tau = std::clamp(std::exp(log_tau), low, high);
    const MapResult map = fit_map(device, rows, classes, options);
    options.start = map.weights;  // the next value's optimum is near
    double value = 0;
    if (structure == EvidenceStructure::shared) {
      LastLayer<double> layer(device, rows.dim, classes, {.tau = tau, .weight = weight});
      layer.fit_covariance(rows, map.weights);
      value = layer.log_evidence(map.log_likelihood);
    } else if (structure == EvidenceStructure::exact) {
      ExactLastLayer layer(device, rows.dim, classes, tau);
      layer.fit_covariance(rows, map.weights);
      value = layer.evidence(map.log_likelihood).value;
    } else {
      value = KroneckerLastLayer(device, rows, classes, map.weights, tau).evidence(map.log_likelihood).value;
    }
    if (!std::isfinite(value))
      throw RunError("the evidence at the prior precision " + std::to_string(tau) + " is not finite");
    tried.emplace_back(tau, value);
    return value;
  };

  // From the firmest prior down: its optimum is the nearest to the first start, 0.
  Doubles at(grid), values(grid);
  for (int i = grid - 1; i >= 0; i--) {
    at[i] = std::log(low) + (std::log(high) - std::log(low)) * i / (grid - 1);
    values[i] = evidence_at(at[i]);
  }
  const int best = int(std::max_element(values.begin(), values.end()) - values.begin());
  double left = at[std::max(best - 1, 0)], middle = at[best], right = at[std::min(best + 1, grid - 1)];
  double top = values[best];
  for (int i = 0; i < refinements; i++) {
    constexpr double section = 0.3819660112501051;  // (3 - sqrt 5) / 2
    const bool rightwards = right - middle >= middle - left;
    const double probe = middle + section * (rightwards ? right - middle : left - middle), value = evidence_at(probe);
    if (value > top) {
      (rightwards ? left : right) = middle;
      middle = probe, top = value;
    } else {
      (rightwards ? right : left) = probe;
    }
  }
  std::sort(tried.begin(), tried.end());
  const auto found =
      std::max_element(tried.begin(), tried.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  TunedPrior result{found->first, found->second, {}, {}};
  for (const auto& [tau, value] : tried) result.taus.push_back(tau), result.evidences.push_back(value);
  return result;
}

}  // namespace baton
