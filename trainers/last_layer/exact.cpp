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
// All C x C algebra is on the host: it costs C^3 beside the (CD)^2 C of the products, it is a chain of small dependent
// steps, and a sample needs one transfer of C^2 + C numbers each way. Every update works on copies, which replace the
// state at the end, so that an error changes nothing.
#include "trainers/last_layer/exact.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace baton {
namespace {

using Doubles = std::vector<double>;

constexpr double most_variance = 4.5e15;  // 1 / eps

double dot(const Doubles& a, const Doubles& b) { return std::inner_product(a.begin(), a.end(), b.begin(), 0.0); }
bool all_finite(const Doubles& x) {
  return std::all_of(x.begin(), x.end(), [](double v) { return std::isfinite(v); });
}
double largest(const Doubles& x) {
  double top = 0;
  for (double v : x) top = std::max(top, std::abs(v));
  return top;
}

std::vector<int32_t> check_samples(Device& device, const FeatureRows<double>& rows, int dim, int classes) {
  check_features(device, rows, dim);
  return rows.count ? download_labels(device, rows, classes) : std::vector<int32_t>{};
}

// u becomes softmax(u); returns ln sum exp u.
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

// Returns the root of a = e_y - softmax(f + A a).
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
    Doubles next;
    double value = 0, t = 1;
    const auto move = [&] {
      next = a;
      for (int c = 0; c < n; c++) next[c] += t * delta[c];
      value = objective(next);
    };
    for (move(); error > near && t > 0x1p-50 && !(value <= now - 1e-4 * t * slope); move()) t /= 2;
    a = std::move(next);
    now = value;
  }
}

}  // namespace

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
  Doubles whole(const double* m) const { return download(device, m, size_t(order) * order); }

  // into += sum_n G_n (x) phi_n phi_n', for p [n][C]. All samples' G_ce have one sign, + for c = e and - else, so that
  // the block of two classes is + or - a product of rows scaled by sqrt |G_ce| with themselves.
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

  // Makes the lower triangle of next_sigma the Cholesky factor of next_p + ridge I.
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

  // Throws where what has been computed beside the state must not become the state.
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

  // Absorbs one sample in next_w and next_sigma. Returns the probabilities whose curvature next_sigma now holds, and
  // adds to the log-determinant of its inverse.
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
  check_tau(tau);
  if (dim < 1 || classes < 2)
    throw InputError("a last layer needs features and two classes: dim " + std::to_string(dim) + ", classes " +
                     std::to_string(classes));
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
  check_samples(device_, rows, dim_, classes_);
  MapOptions own = options;
  own.tau = tau_;  // one prior for the weights and their covariance
  MapResult result = fit_map(device_, rows, classes_, own);
  fit_covariance(rows, result.weights);
  return result;
}

void ExactLastLayer::fit_covariance(const FeatureRows<double>& rows, const std::vector<double>& weights) {
  State& s = *s_;
  check_weights(weights, classes_, dim_, "a last layer");
  check_features(device_, rows, dim_);
  upload(device_, s.next_w, weights);
  fill_zero(device_, s.next_p, s.bytes());
  s.add_curvature(s.next_p, rows.x, class_probabilities(device_, s.next_w, rows.x, rows.count, dim_, classes_),
                  rows.count);
  const double log_det = s.invert(tau_);
  s.verify(log_det);
  copy_on_device(device_, s.h, s.next_p, s.bytes());
  add_diagonal(s.next_p, tau_, s.order, device_.stream());
  s.commit(log_det);
}

Evidence ExactLastLayer::evidence(double log_likelihood) {
  const Doubles variances = s_->diagonal_of(s_->sigma);
  const double trace = std::accumulate(variances.begin(), variances.end(), 0.0);
  return compute_evidence(log_likelihood, s_->log_determinant, tau_ * trace, weights(), tau_);
}

void ExactLastLayer::logits(const double* x, int n, double* out) {
  multiply(device_, false, true, n, classes_, dim_, 1.0, x, dim_, s_->w, dim_, 0.0, out, classes_);
}

// The products X Sigma_c for every class c are rows (n, c, e) of D numbers; each row times its phi_n is an entry of
// out.
void ExactLastLayer::logit_covariances(const double* x, int n, double* out) {
  const State& s = *s_;
  if (n < 0) throw InputError(std::to_string(n) + " rows");
  const size_t square = size_t(classes_) * classes_, wide = square * dim_;
  const int step = rows_at_once(n, 2 * wide);
  Scratch::Frame scratch(device_);
  auto *products = scratch.take<double>(step * wide), *repeated = scratch.take<double>(step * wide);
  std::vector<int32_t> sources(step * square);
  for (size_t i = 0; i < sources.size(); i++) sources[i] = int32_t(i / square);
  const int32_t* index = place(device_, scratch, sources);
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

LinkedPredictions ExactLastLayer::predict(const double* x, int n, const LinkOptions& o) {
  if (o.link == Link::mean_field)
    throw InputError("the mean-field link takes one variance for all classes, which exact covariances do not have");
  if (n < 0) throw InputError(std::to_string(n) + " rows");
  const int step = rows_at_once(n, 2 * (size_t(classes_) + 1) * classes_ + 2);
  return predict_rows<double>(
      device_, x, n, dim_, classes_, step, true, o,
      [&](const double* rows, int count, double* out) { logits(rows, count, out); },
      [&](const double* rows, int count, double* out) { logit_covariances(rows, count, out); });
}

void ExactLastLayer::update(const FeatureRows<double>& rows, ExactRule rule) {
  State& s = *s_;
  const std::vector<int32_t> labels = check_samples(device_, rows, dim_, classes_);
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
  check_samples(device_, rows, dim_, classes_);
  if (iterations < 1) throw InputError(std::to_string(iterations) + " Newton steps, at least 1");
  const int n = rows.count;
  const size_t outputs = size_t(n) * classes_;
  Scratch::Frame scratch(device_);
  auto *logits = scratch.take<double>(outputs), *r = scratch.take<double>(outputs), *loss = scratch.take<double>(n);
  auto *shift = scratch.take<double>(s.order), *slope = scratch.take<double>(s.order);
  const Doubles start = weights();

  struct Point {
    Doubles weights, gradient;
    double objective = 0, log_likelihood = 0;
  };
  MapResult result;
  // Leaves the point's weights in next_w.
  const auto evaluate = [&](Doubles weights) {
    Point at{std::move(weights), {}};
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
  // Makes next_p P + H at next_w.
  const auto curve = [&] {
    copy_on_device(device_, s.next_p, s.p, s.bytes());
    s.add_curvature(s.next_p, rows.x, class_probabilities(device_, s.next_w, rows.x, n, dim_, classes_), n);
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
    Point next;
    double t = 1;
    const auto move = [&] {
      Doubles moved = now.weights;
      for (int i = 0; i < s.order; i++) moved[i] -= t * step[i];
      next = evaluate(std::move(moved));
    };
    const auto overshoots = [&] { return !(next.objective <= now.objective - 1e-4 * t * fall + rounding); };
    for (move(); iterations > 1 && t > 0x1p-50 && overshoots(); move()) t /= 2;
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
std::vector<double> ExactLastLayer::covariance() const { return s_->whole(s_->sigma); }
std::vector<double> ExactLastLayer::precision() const { return s_->whole(s_->p); }
std::vector<double> ExactLastLayer::curvature() const { return s_->whole(s_->h); }
double ExactLastLayer::log_determinant() const { return s_->log_determinant; }

}  // namespace baton
