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
// All C x C algebra is on the host: it is a chain of small dependent steps, which costs C^3 beside the (CD)^2 C of the
// products.
#include "trainers/last_layer/exact.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace baton {
namespace {

constexpr double most_variance = 4.5e15;  // 1 / eps

double dot(const Doubles& a, const Doubles& b) { return std::inner_product(a.begin(), a.end(), b.begin(), 0.0); }

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
    const double error = largest_magnitude(h);
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

// Returns C D if the arguments make sense: no memory is taken for others.
int check_order(int dim, int classes, double tau) {
  check_tau(tau);
  if (dim < 1 || classes < 2)
    throw InputError("a last layer needs features and two classes: dim " + std::to_string(dim) + ", classes " +
                     std::to_string(classes));
  const int64_t order = int64_t(dim) * classes;
  if (order > ExactLastLayer::most_weights)
    throw InputError("an exact last layer holds matrices over all weights: " + std::to_string(classes) +
                     " classes of " + std::to_string(dim) + " features are " + std::to_string(order) +
                     " weights, at most " + std::to_string(ExactLastLayer::most_weights));
  return int(order);
}

}  // namespace

ExactLastLayer::ExactLastLayer(Device& device, int dim, int classes, double tau)
    : device_(device), dim_(dim), classes_(classes), order_(check_order(dim, classes, tau)), tau_(tau) {
  for (double** m : {&p_, &sigma_, &next_p_, &next_sigma_, &h_}) *m = arena_.take<double>(size_t(order_) * order_);
  for (double** v : {&w_, &next_w_, &diagonal_}) *v = arena_.take<double>(order_);
  for (double** m : {&b_, &q_}) *m = arena_.take<double>(size_t(order_) * classes);
  for (double** m : {&a_, &t_}) *m = arena_.take<double>(size_t(classes) * classes);
  for (double** v : {&f_, &step_}) *v = arena_.take<double>(classes);
  one_ = place(device, arena_, Doubles{1});
  add_diagonal(p_, tau, order_, device.stream());
  add_diagonal(sigma_, 1 / tau, order_, device.stream());
}

Doubles ExactLastLayer::diagonal(const double* m) {
  row_dots(diagonal_, 1.0, m, size_t(order_) + 1, one_, 0, 0.0, order_, 1, device_.stream());
  return download(device_, diagonal_, order_);
}

std::vector<int32_t> ExactLastLayer::check_samples(const FeatureRows<double>& rows) {
  check_features(device_, rows, dim_);
  return rows.count ? download_labels(device_, rows, classes_) : std::vector<int32_t>{};
}

// into += sum_n G_n (x) phi_n phi_n', for p [n][C]. All samples' G_ce have one sign, + for c = e and - else, so that
// the block of two classes is + or - a product of rows scaled by sqrt |G_ce| with themselves.
void ExactLastLayer::add_curvature(double* into, const double* x, const Doubles& probability, int n) {
  const int pairs = classes_ * (classes_ + 1) / 2, step = rows_at_once(n, size_t(dim_) + pairs);
  const auto block = [&](int c, int e) { return into + size_t(c) * dim_ * order_ + size_t(e) * dim_; };
  Scratch::Frame scratch(device_);
  auto *scaled = scratch.take<double>(size_t(step) * dim_), *weights = scratch.take<double>(size_t(step) * pairs);
  for (int first = 0; first < n; first += step) {
    const int count = std::min(step, n - first);
    Doubles sizes(size_t(count) * pairs);
    for (int i = 0; i < count; i++) {
      const double* row = probability.data() + size_t(first + i) * classes_;
      size_t pair = 0;
      for (int c = 0; c < classes_; c++)
        for (int e = 0; e <= c; e++) sizes[pair++ * count + i] = row[c] * (c == e ? all_but(row, c, classes_) : row[e]);
    }
    upload(device_, weights, sizes);
    size_t pair = 0;
    for (int c = 0; c < classes_; c++)
      for (int e = 0; e <= c; e++) {
        scale_rows(scaled, x + size_t(first) * dim_, weights + pair++ * count, count, dim_, device_.stream());
        rank_update(device_, true, dim_, count, c == e ? 1.0 : -1.0, scaled, dim_, 1.0, block(c, e), order_);
      }
  }
  for (int c = 0; c < classes_; c++)
    for (int e = 0; e < c; e++) mirror_lower(block(c, e), dim_, order_, device_.stream());
  mirror_lower(into, order_, order_, device_.stream());
}

// Makes the lower triangle of next_sigma the Cholesky factor of next_p + ridge I.
void ExactLastLayer::factor(double ridge) {
  copy_on_device(device_, next_sigma_, next_p_, bytes());
  if (ridge != 0) add_diagonal(next_sigma_, ridge, order_, device_.stream());
  if (factorizer_.cholesky(next_sigma_, order_) != 0)
    throw RunError("the posterior precision is not positive definite: raise the prior precision or rescale features");
}

// next_sigma = (next_p + ridge I)^-1; returns the log-determinant of what it inverts.
double ExactLastLayer::invert(double ridge) {
  factor(ridge);
  const double value = factorizer_.log_determinant(next_sigma_, order_);
  factorizer_.invert(next_sigma_, order_);
  return value;
}

// Makes next_p, next_sigma and next_w the state. Throws where they must not become it.
void ExactLastLayer::commit(double log_determinant) {
  const Doubles precisions = diagonal(next_p_), variances = diagonal(next_sigma_);
  const bool finite = std::isfinite(log_determinant) && all_finite(download(device_, next_w_, order_)) &&
                      all_finite(precisions) && all_finite(variances);
  if (!finite || !(*std::min_element(variances.begin(), variances.end()) > 0))
    throw RunError("the posterior is no longer finite and positive definite");
  std::swap(p_, next_p_), std::swap(sigma_, next_sigma_), std::swap(w_, next_w_);
  log_determinant_ = log_determinant;
}

// Absorbs one sample in next_w_ and next_sigma_. Returns the probabilities whose curvature next_sigma_ now holds, and
// adds to the log-determinant of its inverse.
Doubles ExactLastLayer::absorb(const double* phi, int label, int sample, ExactRule rule, double& log_determinant) {
  multiply_packed(device_, false, false, order_ * classes_, 1, dim_, next_sigma_, phi, b_);
  for (int c = 0; c < classes_; c++)
    multiply_packed(device_, false, false, 1, classes_, dim_, phi, b_ + size_t(c) * dim_ * classes_, a_ + c * classes_);
  multiply_packed(device_, false, false, classes_, 1, dim_, next_w_, phi, f_);
  Doubles a = download(device_, a_, size_t(classes_) * classes_);
  const Doubles f = download(device_, f_, classes_);
  double top = 0, bottom = INFINITY;
  for (int c = 0; c < classes_; c++) {
    for (int e = 0; e < c; e++) {
      double &low = a[size_t(c) * classes_ + e], &high = a[size_t(e) * classes_ + c];
      low = high = (low + high) / 2;
    }
    top = std::max(top, a[size_t(c) * classes_ + c]), bottom = std::min(bottom, a[size_t(c) * classes_ + c]);
  }
  const std::string who = "sample " + std::to_string(sample);
  if (!all_finite(a) || !all_finite(f)) throw RunError(who + ": its logits are not finite");
  if (bottom < 0) throw RunError(who + ": the covariance is no longer positive definite");
  if (top > most_variance)
    throw InputError(who + ": the variance of its logits is " + std::to_string(top) +
                     ", and nothing of the old data would be left: rescale the features");

  Doubles p = f, step;  // p: at the mean before the step
  softmax_in_place(p);
  if (rule == ExactRule::implicit) step = implicit_step(a, f, label);
  else step = Gain(p, a).step(a, residual(p, label));
  if (rule != ExactRule::newton_old) {  // at the mean after it
    p = product(a, step);
    for (int c = 0; c < classes_; c++) p[c] += f[c];
    softmax_in_place(p);
  }
  const Gain gain(p, a);

  upload(device_, step_, step);
  upload(device_, t_, gain.t);
  multiply_packed(device_, false, false, order_, 1, classes_, b_, step_, next_w_, 1, 1);
  multiply_packed(device_, false, false, order_, classes_, classes_, b_, t_, q_);
  rank_update(device_, false, order_, classes_, -1.0, q_, classes_, 1.0, next_sigma_, order_);
  mirror_lower(next_sigma_, order_, order_, device_.stream());
  log_determinant += gain.log_determinant;
  return p;
}

MapResult ExactLastLayer::fit(const FeatureRows<double>& rows, const MapOptions& options) {
  check_samples(rows);
  MapOptions own = options;
  own.tau = tau_;  // one prior for the weights and their covariance
  MapResult result = fit_map(device_, rows, classes_, own);
  fit_covariance(rows, result.weights);
  return result;
}

void ExactLastLayer::fit_covariance(const FeatureRows<double>& rows, const Doubles& weights) {
  check_weights(weights, classes_, dim_, "a last layer");
  check_features(device_, rows, dim_);
  upload(device_, next_w_, weights);
  fill_zero(device_, next_p_, bytes());
  add_curvature(next_p_, rows.x, class_probabilities(device_, next_w_, rows.x, rows.count, dim_, classes_), rows.count);
  commit(invert(tau_));
  copy_on_device(device_, h_, p_, bytes());
  add_diagonal(p_, tau_, order_, device_.stream());
}

Evidence ExactLastLayer::evidence(double log_likelihood) {
  const Doubles variances = diagonal(sigma_);
  const double trace = std::accumulate(variances.begin(), variances.end(), 0.0);
  return compute_evidence(log_likelihood, log_determinant_, tau_ * trace, weights(), tau_);
}

void ExactLastLayer::logits(const double* x, int n, double* out) {
  multiply_packed(device_, false, true, n, classes_, dim_, x, w_, out);
}

// The products X Sigma_c for every class c are rows (n, c, e) of D numbers; each row times its phi_n is an entry of
// out.
void ExactLastLayer::logit_covariances(const double* x, int n, double* out) {
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
      multiply(device_, false, false, count, order_, dim_, 1.0, part, dim_, sigma_ + size_t(c) * dim_ * order_, order_,
               0.0, products + size_t(c) * order_, int(wide));
    row_dots(out + first * square, 1.0, products, size_t(dim_), repeated, size_t(dim_), 0.0, entries, dim_,
             device_.stream());
  }
}

LinkedPredictions ExactLastLayer::predict(const double* x, int n, const LinkOptions& o) {
  if (o.link == Link::mean_field)
    throw InputError("the mean-field link takes one variance for all classes, which exact covariances do not have");
  if (n < 0) throw InputError(std::to_string(n) + " rows");
  const int step = rows_at_once(n, 2 * (size_t(classes_) + 1) * classes_ + 2);
  return predict_rows<double>(device_, x, n, dim_, classes_, step, true, o,
                              std::bind_front(&ExactLastLayer::logits, this),
                              std::bind_front(&ExactLastLayer::logit_covariances, this));
}

void ExactLastLayer::update(const FeatureRows<double>& rows, ExactRule rule) {
  const std::vector<int32_t> labels = check_samples(rows);
  if (rows.count == 0) return;
  copy_on_device(device_, next_sigma_, sigma_, bytes());
  copy_on_device(device_, next_p_, p_, bytes());
  copy_on_device(device_, next_w_, w_, sizeof(double) * order_);
  double log_det = log_determinant_;
  Doubles kept;
  for (int i = 0; i < rows.count; i++) {
    const Doubles p = absorb(rows.x + size_t(i) * dim_, labels[i], i, rule, log_det);
    kept.insert(kept.end(), p.begin(), p.end());
  }
  add_curvature(next_p_, rows.x, kept, rows.count);
  commit(log_det);
}

MapResult ExactLastLayer::update_jointly(const FeatureRows<double>& rows, int iterations) {
  check_samples(rows);
  if (iterations < 1) throw InputError(std::to_string(iterations) + " Newton steps, at least 1");
  const int n = rows.count;
  const size_t outputs = size_t(n) * classes_;
  Scratch::Frame scratch(device_);
  auto *logits = scratch.take<double>(outputs), *r = scratch.take<double>(outputs), *loss = scratch.take<double>(n);
  auto *shift = scratch.take<double>(order_), *slope = scratch.take<double>(order_);
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
    for (int i = 0; i < order_; i++) moved[i] -= start[i];
    upload(device_, next_w_, at.weights);
    upload(device_, shift, moved);
    multiply_packed(device_, false, false, order_, 1, order_, p_, shift, slope);
    at.objective = dot(moved, download(device_, slope, order_)) / 2;
    if (n) {
      multiply_packed(device_, false, true, n, classes_, dim_, rows.x, next_w_, logits);
      softmax_residual<double>(nullptr, r, loss, nullptr, logits, rows.labels, n, classes_, device_.stream());
      multiply_packed(device_, true, false, classes_, dim_, n, r, rows.x, slope, -1, 1);
      for (double l : download(device_, loss, n)) at.log_likelihood -= l;
    }
    at.gradient = download(device_, slope, order_);
    at.objective -= at.log_likelihood;
    result.evaluations++;
    return at;
  };
  // Makes next_p P + H at next_w.
  const auto curve = [&] {
    copy_on_device(device_, next_p_, p_, bytes());
    add_curvature(next_p_, rows.x, class_probabilities(device_, next_w_, rows.x, n, dim_, classes_), n);
  };

  Point now = evaluate(start);
  const double enough = 1e-12 * (1 + largest_magnitude(now.gradient));
  bool stalls = false;  // what is left of the gradient is rounding
  while (result.iterations < iterations && largest_magnitude(now.gradient) > enough && !stalls) {
    curve();
    factor(0);
    upload(device_, shift, now.gradient);
    for (const bool transpose : {false, true}) factorizer_.solve(transpose, next_sigma_, order_, shift, 1, 1);
    const Doubles step = download(device_, shift, order_);
    const double fall = dot(now.gradient, step), rounding = 1e-13 * (1 + std::abs(now.objective));
    Point next;
    double t = 1;
    const auto move = [&] {
      Doubles moved = now.weights;
      for (int i = 0; i < order_; i++) moved[i] -= t * step[i];
      next = evaluate(std::move(moved));
    };
    const auto overshoots = [&] { return !(next.objective <= now.objective - 1e-4 * t * fall + rounding); };
    for (move(); iterations > 1 && t > 0x1p-50 && overshoots(); move()) t /= 2;
    if (!std::isfinite(next.objective) || !all_finite(next.gradient))
      throw RunError("a joint update stopped being finite");
    stalls =
        iterations > 1 && fall <= rounding && largest_magnitude(next.gradient) > largest_magnitude(now.gradient) / 2;
    now = std::move(next);
    result.iterations++;
  }
  result.gradient = largest_magnitude(now.gradient);
  result.converged = stalls || result.gradient <= enough;
  result.objective = now.objective, result.log_likelihood = now.log_likelihood;
  curve();
  commit(invert(0));
  result.weights = std::move(now.weights);
  return result;
}

}  // namespace baton
