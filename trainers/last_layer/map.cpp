// The host holds the optimizer's vectors, C D doubles each. The device evaluates
//   J = sum_n -ln p_n[y_n] + tau / 2 |W - M|^2,   dJ/dW = -R' Phi + tau (W - M),   R = rows e_y - softmax(W phi)
//   H V = (rows G_n V phi_n)' Phi + tau V,        G = diag(p) - p p'
// each by two products n x D x C, one upload and one download of C D numbers.
//
// J is strictly convex, so a step is judged by J alone until the change of J is lost in rounding. From there on slopes
// decide: t (J'(0) + J'(t)) / 2 stands for J(t) - J(0), which turns sufficient decrease into the approximate Wolfe
// condition of Hager and Zhang (2005). So gradients go on falling to about eps, not sqrt(eps).
#include "trainers/last_layer/map.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "engine/io/dataset.h"
#include "engine/io/stop.h"

namespace baton {
namespace {

double dot(const Doubles& x, const Doubles& y) {
  double sum = 0;
  SIMT_SIMD(reduction(+ : sum))
  for (size_t i = 0; i < x.size(); i++) sum += x[i] * y[i];
  return sum;
}
void add(Doubles& y, double scale, const Doubles& x) {
  SIMT_SIMD()
  for (size_t i = 0; i < y.size(); i++) y[i] += scale * x[i];
}

// Returns the labels.
template <class Real>
std::vector<int32_t> check_samples(Device& device, const std::string& who, const FeatureRows<Real>& rows, int classes) {
  if (rows.count < 1) throw InputError(who + ": there are no samples");
  if (rows.dim < 1) throw InputError(who + ": features have dimension " + std::to_string(rows.dim));
  if (classes < 2) throw InputError(who + ": at least 2 classes, not " + std::to_string(classes));
  const std::vector<int32_t> labels = download_labels(device, rows, classes, who + ": sample");
  check_features(device, rows, rows.dim, who + ": sample");
  return labels;
}

Doubles or_zeros(const Doubles& given, const std::string& what, int classes, int dim) {
  if (given.empty()) return Doubles(size_t(classes) * dim, 0.);
  check_weights(given, classes, dim, what);
  return given;
}

struct Point : MapResult {
  Doubles slope;  // dJ/dW
  bool finite = false;
};

template <class Real>
class Objective {
 public:
  Objective(Device& device, const FeatureRows<Real>& rows, int classes, double tau, const Doubles& prior_mean,
            bool curvature)
      : device_(device), rows_(rows), classes_(classes), tau_(tau), mean_(prior_mean) {
    const size_t logits = size_t(rows.count) * classes;
    w_ = arena_.take<Real>(size());
    out_ = arena_.take<Real>(size() + rows.count);
    logits_ = arena_.take<Real>(logits);
    r_ = arena_.take<Real>(logits);
    p_ = curvature ? arena_.take<Real>(logits) : nullptr;
    arena_.freeze();
    up_.resize(size());
    down_.resize(size() + rows.count);
  }
  size_t size() const { return size_t(classes_) * rows_.dim; }
  int evaluations() const { return evaluations_; }

  void evaluate(Point& at) {
    evaluations_++;
    multiply_by_rows(at.weights);
    // The samples' part of the gradient and their losses lie in one piece, so that one copy fetches both.
    softmax_residual(p_, r_, out_ + size(), static_cast<Real*>(nullptr), logits_, rows_.labels, rows_.count, classes_,
                     device_.stream());
    multiply_by_residual(Real(-1));
    copy_to_host(device_, down_.data(), out_, down_.size() * sizeof(Real));
    double loss = 0, square = 0;
    for (size_t i = size(); i < down_.size(); i++) loss += double(down_[i]);
    at.slope.resize(size());
    for (size_t i = 0; i < size(); i++) {
      const double from_mean = at.weights[i] - mean_[i];
      square += from_mean * from_mean;
      at.slope[i] = double(down_[i]) + tau_ * from_mean;
    }
    at.log_likelihood = -loss;
    at.objective = loss + tau_ / 2 * square;
    at.gradient = largest_magnitude(at.slope);
    at.finite = std::isfinite(at.objective) && std::isfinite(dot(at.slope, at.slope));
  }
  // out = H v at the point that was evaluated last.
  void curvature_product(Doubles& out, const Doubles& v) {
    multiply_by_rows(v);
    softmax_curvature_product(r_, p_, logits_, rows_.count, classes_, device_.stream());
    multiply_by_residual(Real(1));
    copy_to_host(device_, down_.data(), out_, size() * sizeof(Real));
    for (size_t i = 0; i < size(); i++) out[i] = double(down_[i]) + tau_ * v[i];
  }
  // A change of J below this says nothing, since every loss, however small, is a difference of logits.
  double rounding(const Point& at) const {
    return 10 * std::numeric_limits<Real>::epsilon() * (rows_.count + std::abs(at.objective));
  }

 private:
  // logits = Phi W'
  void multiply_by_rows(const Doubles& w) {
    for (size_t i = 0; i < size(); i++) up_[i] = Real(w[i]);
    upload(device_, w_, up_);
    multiply_packed(device_, false, true, rows_.count, classes_, rows_.dim, rows_.x, w_, logits_);
  }
  // out = sign r' Phi
  void multiply_by_residual(Real sign) {
    multiply_packed(device_, true, false, classes_, rows_.dim, rows_.count, r_, rows_.x, out_, sign);
  }

  Device& device_;
  FeatureRows<Real> rows_;
  int classes_;
  double tau_;
  Doubles mean_;
  Arena arena_;
  Real *w_, *out_, *logits_, *r_, *p_;
  std::vector<Real> up_, down_;
  int evaluations_ = 0;
};

// ------------------------------------------------------------------------------------------------------- line search
struct Trial {
  double t, fall, slope;  // fall: J(t) - J(0)
};
// The minimiser of the cubic through two values and slopes; not finite where it has none.
double cubic_minimum(const Trial& a, const Trial& b) {
  const double width = b.t - a.t, mixed = a.slope + b.slope - 3 * (b.fall - a.fall) / width;
  const double root = std::copysign(std::sqrt(mixed * mixed - a.slope * b.slope), width);
  return b.t - width * (b.slope + root - mixed) / (b.slope - a.slope + 2 * root);
}

// Finds a step along d with sufficient decrease and |J'(t)| <= bend |J'(0)|, by the algorithms 3.5 and 3.6 of Nocedal
// and Wright in one loop; bend = infinity makes it a backtracking search. Returns false when no step lowers J.
template <class Real>
bool line_search(Objective<Real>& objective, const Point& from, const Doubles& d, double step, double bend, Point& to) {
  constexpr double sufficient = 1e-4;
  constexpr int most_trials = 20, most_unclear = 5;  // unclear: only the slopes tell the steps apart
  const double start = dot(from.slope, d), rounding = objective.rounding(from);
  if (!(start < 0)) return false;
  int unclear = 0;
  const auto try_step = [&](double t) {
    to.weights = from.weights;
    add(to.weights, t, d);
    objective.evaluate(to);
    if (!to.finite) return Trial{t, INFINITY, INFINITY};
    const double slope = dot(to.slope, d), fall = to.objective - from.objective;
    if (std::abs(fall) > rounding) return Trial{t, fall, slope};
    unclear++;
    return Trial{t, t * (start + slope) / 2, slope};
  };
  Trial low{0, 0, start}, high{};  // low: the best so far; once bracketed, a minimum lies between the two
  bool bracketed = false;
  double t = step;
  for (int k = 0; k < most_trials && unclear < most_unclear; k++) {
    const Trial now = try_step(t), before = low;
    if (!(now.fall <= sufficient * t * start) || (low.t > 0 && now.fall >= low.fall)) {
      high = now, bracketed = true;
    } else {
      if (std::abs(now.slope) <= bend * -start) return true;
      if (now.slope * (bracketed ? high.t - low.t : 1) >= 0) high = low, bracketed = true;
      low = now;
    }
    if (bracketed) {
      const double width = high.t - low.t, best = cubic_minimum(low, high);
      if (!std::isfinite(high.fall)) t = low.t + width / 10;
      else if (!std::isfinite(best)) t = low.t + width / 2;
      else t = low.t + width * std::clamp((best - low.t) / width, 0.02, 0.9);
    } else {
      const double width = now.t - before.t, best = cubic_minimum(before, now);
      t = now.t + width * (best > now.t ? std::clamp((best - now.t) / width, 1., 9.) : 9.);
    }
  }
  if (low.t == 0) return false;
  try_step(low.t);
  return true;
}

// -------------------------------------------------------------------------------------------------------- directions
// The Newton direction, by conjugate gradients on H d = -g.
class NewtonDirection {
 public:
  template <class Real>
  void find(Objective<Real>& objective, const Point& at, double limit, Doubles& d) {
    const size_t n = at.slope.size();
    const double norm = std::sqrt(dot(at.slope, at.slope));
    // The second choice of Eisenstat and Walker with their safeguard. It asks for no more digits than the quadratic
    // model deserves, than the end of the fit needs, and than the products have.
    double forcing = 0.5;
    if (last_norm_ > 0) {
      const double ratio = norm / last_norm_, floor = 0.9 * forcing_ * forcing_;
      forcing = std::min(0.5, std::max(0.9 * ratio * ratio, floor > 0.1 ? floor : 0.));
    }
    last_norm_ = norm, forcing_ = forcing;
    const double wanted = std::max({forcing * norm, limit / 2, 100. * std::numeric_limits<Real>::epsilon() * norm});
    d.assign(n, 0.);
    r_ = at.slope, hp_.resize(n), p_.resize(n);
    for (size_t i = 0; i < n; i++) p_[i] = -r_[i];  // r = H d + g
    double square = norm * norm;
    const int most = int(std::min<size_t>(n + 10, 1000));
    for (int k = 0; k < most && square > wanted * wanted; k++) {
      objective.curvature_product(hp_, p_);
      const double bend = dot(p_, hp_);
      if (!std::isfinite(bend)) throw RunError("fit_map: a product with the curvature is not finite");
      if (bend <= 0) break;  // rounding: H is positive definite
      const double alpha = square / bend;
      add(d, alpha, p_);
      add(r_, alpha, hp_);
      const double next = dot(r_, r_), beta = next / square;
      for (size_t i = 0; i < n; i++) p_[i] = beta * p_[i] - r_[i];
      square = next;
    }
  }

 private:
  Doubles r_, p_, hp_;
  double last_norm_ = 0, forcing_ = 0;
};

// The L-BFGS direction, by its two loops over the pairs of steps and changes of the gradient.
class LbfgsDirection {
 public:
  explicit LbfgsDirection(int memory) : memory_(memory) {}
  bool empty() const { return pairs_.empty(); }
  void forget() { pairs_.clear(); }

  void find(const Point& at, Doubles& d) {
    d = at.slope;
    std::vector<double> alpha(pairs_.size());
    for (size_t k = pairs_.size(); k-- > 0;) {
      alpha[k] = dot(pairs_[k].s, d) / pairs_[k].sy;
      add(d, -alpha[k], pairs_[k].y);
    }
    const double scale = empty() ? -1 : -pairs_.back().sy / pairs_.back().yy;
    for (double& v : d) v *= scale;
    for (size_t k = 0; k < pairs_.size(); k++) add(d, -alpha[k] - dot(pairs_[k].y, d) / pairs_[k].sy, pairs_[k].s);
  }
  void keep(const Point& from, const Point& to) {
    Pair pair{to.weights, to.slope, 0, 0};
    add(pair.s, -1, from.weights);
    add(pair.y, -1, from.slope);
    pair.sy = dot(pair.s, pair.y), pair.yy = dot(pair.y, pair.y);
    if (int(pairs_.size()) == memory_) pairs_.erase(pairs_.begin());
    if (pair.sy > std::numeric_limits<double>::epsilon() * pair.yy) pairs_.push_back(std::move(pair));
  }

 private:
  struct Pair {
    Doubles s, y;
    double sy, yy;
  };
  int memory_;
  std::vector<Pair> pairs_;  // the oldest first
};

}  // namespace

template <class Real>
MapResult fit_map(Device& device, const FeatureRows<Real>& rows, int classes, const MapOptions& o) {
  check_tau(o.tau);
  if (!(o.tolerance >= 0) || !(o.least_decrease >= 0) || o.iterations < 0 || o.memory < 1)
    throw InputError("fit_map: tolerances and iterations must not be negative, and L-BFGS keeps at least one pair");
  check_samples(device, "fit_map", rows, classes);
  const bool newton = o.method == MapMethod::newton;
  const Doubles mean = or_zeros(o.prior_mean, "fit_map: the prior's mean", classes, rows.dim);
  Objective<Real> objective(device, rows, classes, o.tau, mean, newton);

  Point at, next;
  at.weights = o.start.empty() ? mean : or_zeros(o.start, "fit_map: the start", classes, rows.dim);
  next.weights.assign(at.weights.size(), 0.);
  objective.evaluate(next);
  const double limit = o.tolerance * (1 + next.gradient);
  if (largest_magnitude(at.weights) == 0) at = next;
  else objective.evaluate(at);
  if (!at.finite) throw RunError("fit_map: the objective is not finite at the start");

  NewtonDirection conjugate;
  LbfgsDirection secant(o.memory);
  Doubles d;
  bool converged = false;
  int iterations = 0;
  const int patience = newton ? 1 : 10;  // how many steps may gain no more than rounding
  int idle = 0;
  double best = at.gradient;
  while (true) {
    if (stop_requested()) throw_stopped("nothing of this fit is kept");
    converged = at.gradient <= limit;
    if (converged || iterations == o.iterations) break;
    double step = 1;
    if (newton) {
      conjugate.find(objective, at, limit, d);
    } else {
      secant.find(at, d);
      if (secant.empty()) step = 1 / std::sqrt(dot(d, d));
    }
    if (!line_search(objective, at, d, step, newton ? INFINITY : 0.9, next)) {
      if (newton || secant.empty()) {
        converged = -dot(at.slope, d) <= objective.rounding(at);
        break;
      }
      secant.forget();  // the next direction is steepest descent
      continue;
    }
    iterations++;
    if (!newton) secant.keep(at, next);
    std::swap(at, next);
    const double decrease = next.objective - at.objective, rounding = objective.rounding(at);
    if (decrease > rounding || at.gradient < 0.9 * best) idle = 0, best = std::min(best, at.gradient);
    else idle++;
    const double least = o.least_decrease * std::max({std::abs(at.objective), std::abs(next.objective), 1.});
    converged = idle >= patience || (!newton && o.least_decrease > 0 && decrease <= least);
    if (converged) break;
  }
  at.iterations = iterations, at.evaluations = objective.evaluations(), at.converged = converged;
  return at;
}

template <class Real>
MapResult fit_adam(Device& device, const FeatureRows<Real>& rows, int classes, const AdamOptions& o) {
  if (!(o.tau >= 0) || !std::isfinite(o.tau) || !(o.lr > 0) || o.epochs < 1 || o.batch < 1)
    throw InputError("fit_adam: expected tau >= 0, a positive step size, and at least one epoch and sample a batch");
  const std::vector<int32_t> labels = check_samples(device, "fit_adam", rows, classes);
  const int n = rows.count, dim = rows.dim, batch = std::min(o.batch, n), weights = classes * dim;
  const Doubles start = or_zeros(o.start, "fit_adam: the start", classes, dim);

  Arena arena;
  Real *w = arena.take<Real>(weights), *m = arena.take<Real>(weights), *v = arena.take<Real>(weights);
  Real *g = arena.take<Real>(weights), *x = arena.take<Real>(size_t(batch) * dim);
  Real *logits = arena.take<Real>(size_t(batch) * classes), *r = arena.take<Real>(size_t(batch) * classes);
  int32_t* plan = arena.take<int32_t>(2 * size_t(n));  // an epoch's order, then its labels
  arena.freeze();
  upload(device, w, std::vector<Real>(start.begin(), start.end()));

  std::vector<int32_t> order(2 * size_t(n));
  std::iota(order.begin(), order.begin() + n, 0);
  SplitMix64 random(o.seed);
  const int64_t steps = int64_t(o.epochs) * ((n + batch - 1) / batch);
  int step = 0;
  for (int epoch = 0; epoch < o.epochs; epoch++) {
    if (stop_requested()) throw_stopped("nothing of this fit is kept");
    for (int i = n - 1; i > 0; i--) std::swap(order[i], order[random.below(uint64_t(i) + 1)]);
    for (int i = 0; i < n; i++) order[n + i] = labels[order[i]];
    upload(device, plan, order);
    for (int first = 0; first < n; first += batch) {
      const int count = std::min(batch, n - first);
      gather_rows(x, rows.x, plan + first, count, dim, device.stream());
      multiply_packed(device, false, true, count, classes, dim, x, w, logits);
      softmax_residual<Real>(nullptr, r, nullptr, nullptr, logits, plan + n + first, count, classes, device.stream());
      multiply_packed(device, true, false, classes, dim, count, r, x, g, Real(-1. / count));
      const double lr = o.lr * (1 + std::cos(M_PI * double(step) / double(steps))) / 2;
      step++;
      adam_step(w, m, v, g, Real(lr), Real(o.tau / n), step, weights, device.stream());
    }
  }

  Objective<Real> objective(device, rows, classes, o.tau, Doubles(weights, 0.), false);
  Point at;
  at.weights = download_doubles(device, w, weights);
  objective.evaluate(at);
  if (!at.finite) throw RunError("fit_adam: the objective is not finite after " + std::to_string(step) + " steps");
  at.iterations = step, at.evaluations = o.epochs + 1;
  return at;
}

#define BATON_LAST_LAYER_MAP(Real)                                                       \
  template MapResult fit_map(Device&, const FeatureRows<Real>&, int, const MapOptions&); \
  template MapResult fit_adam(Device&, const FeatureRows<Real>&, int, const AdamOptions&);
BATON_LAST_LAYER_MAP(float)
BATON_LAST_LAYER_MAP(double)

}  // namespace baton
