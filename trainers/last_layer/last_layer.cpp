#include "trainers/last_layer/last_layer.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

#include "engine/io/files.h"
#include "engine/io/runlog.h"
#include "engine/io/safetensors.h"
#include "engine/io/stop.h"

namespace baton {

namespace {

constexpr int waiting_rows = 64, call_rows = waiting_rows / 2;  // appended since the last fold; of one block
constexpr int chunk_rows = 1024;                                // of features in passes over a whole set
constexpr int probes = 2;
constexpr double most_gamma = 1e6;  // far beyond use; keeps a step finite

template <class Real>
std::vector<Real> to_real(const std::vector<double>& v) {
  return std::vector<Real>(v.begin(), v.end());
}
template <class Real>
std::vector<double> to_double(const std::vector<Real>& v) {
  return std::vector<double>(v.begin(), v.end());
}
template <class Real>
constexpr const char* precision_name() {
  return sizeof(Real) == 8 ? "double" : "float";
}
std::string shown(double v) {
  char text[32];
  snprintf(text, sizeof text, "%g", v);
  return text;
}
// Beyond this |S P z - z| / |z| a covariance is not the inverse of its precision.
template <class Real>
constexpr double most_drift() {
  return sizeof(Real) == 8 ? 1e-8 : 2e-3;
}

template <class T>
T one_of(const char* what, const std::string& name, std::initializer_list<T> all) {
  std::string known;
  for (T t : all) {
    if (name == name_of(t)) return t;
    known += (known.empty() ? "" : ", ") + std::string(name_of(t));
  }
  throw InputError(std::string("unknown ") + what + " '" + name + "': one of " + known);
}

}  // namespace

const char* name_of(SampleWeight w) { return w == SampleWeight::gaussian ? "gaussian" : "categorical"; }
SampleWeight sample_weight_of(const std::string& name) {
  return one_of("sample weight", name, {SampleWeight::gaussian, SampleWeight::categorical});
}
const char* name_of(UpdateRule r) {
  switch (r) {
    case UpdateRule::implicit:
      return "implicit";
    case UpdateRule::gaussian:
      return "gaussian";
    case UpdateRule::categorical:
      return "categorical";
    case UpdateRule::categorical_published:
      return "categorical_published";
  }
  return "";
}
UpdateRule update_rule_of(const std::string& name) {
  return one_of(
      "update rule", name,
      {UpdateRule::implicit, UpdateRule::gaussian, UpdateRule::categorical, UpdateRule::categorical_published});
}
const char* name_of(Link l) {
  switch (l) {
    case Link::map:
      return "map";
    case Link::mean_field:
      return "mean_field";
    case Link::probit:
      return "probit";
    case Link::monte_carlo:
      return "monte_carlo";
    case Link::bridge:
      return "bridge";
    case Link::bridge_norm:
      return "bridge_norm";
  }
  return "";
}
Link link_of(const std::string& name) {
  return one_of("link", name,
                {Link::map, Link::mean_field, Link::probit, Link::monte_carlo, Link::bridge, Link::bridge_norm});
}

template <class Real>
struct LastLayer<Real>::State {
  State(Device& device, int dim, int classes) : factorizer(device, arena, dim) {
    const size_t d = dim, c = classes;
    w = arena.template take<Real>(c * d);
    s = arena.template take<Real>(d * d);
    p = arena.template take<Real>(d * d);
    q = arena.template take<Real>(waiting_rows * d);
    x = arena.template take<Real>(waiting_rows * d);
    scratch = arena.template take<Real>(d * d);
    kept_w = arena.template take<Real>(c * d);
    kept_s = arena.template take<Real>(d * d);
    kept_p = arena.template take<Real>(d * d);
    kept_q = arena.template take<Real>(waiting_rows * d);
    kept_x = arena.template take<Real>(waiting_rows * d);
    u = arena.template take<Real>(call_rows * d);
    steps.gram = arena.template take<Real>(call_rows * call_rows);
    steps.basis = arena.template take<Real>(call_rows * call_rows);
    steps.logits = arena.template take<Real>(call_rows * c);
    steps.step = arena.template take<Real>(call_rows * c);
    steps.downdate = arena.template take<Real>(call_rows * call_rows);
    steps.weight = arena.template take<Real>(call_rows);
    steps.failure = arena.template take<int32_t>(1);
    rows = arena.template take<Real>(chunk_rows * d);
    products = arena.template take<Real>(chunk_rows * d);
    chunk_logits = arena.template take<Real>(chunk_rows * c);
    chunk_values = arena.template take<Real>(3 * chunk_rows);
    probability = arena.template take<Real>(chunk_rows * c);
    overlap = arena.template take<Real>(chunk_rows * waiting_rows);
    hash = arena.template take<uint64_t>(chunk_rows);
    nonfinite = arena.template take<int32_t>(chunk_rows);
    probe = arena.template take<Real>(probes * d);
    probe_p = arena.template take<Real>(probes * d);
    probe_s = arena.template take<Real>(probes * d);
    fill_normals(probe, probes * dim, key_of(1, 12), device.stream());
  }
  Arena arena;
  Factorizer<Real> factorizer;
  Real *w, *s, *p, *q, *x;                                     // the posterior
  Real *scratch, *kept_w, *kept_s, *kept_p, *kept_q, *kept_x;  // a call that fails goes back to these
  Real* u;                                                     // [samples][D]: Phi S
  UpdateSteps<Real> steps{};
  Real *rows, *products, *chunk_logits, *chunk_values, *probability, *overlap;
  uint64_t* hash;
  int32_t* nonfinite;
  Real *probe, *probe_p, *probe_s;
};

template <class Real>
LastLayer<Real>::LastLayer(Device& device, int dim, int classes, const LastLayerOptions& options)
    : device_(device), dim_(dim), classes_(classes), options_(options) {
  if (dim < 1 || dim > 32768) throw InputError("a last layer has 1 to 32,768 features, not " + std::to_string(dim));
  if (classes < 2 || classes > 1500)
    throw InputError("a last layer has 2 to 1,500 classes, not " + std::to_string(classes));
  if (!(Real(options.tau) > 0) || !std::isfinite(Real(options.tau)) || !std::isfinite(Real(1 / options.tau))) {
    throw InputError("the prior precision must be a positive " + std::string(precision_name<Real>()) + ", not " +
                     shown(options.tau));
  }
  if (options.refactor_after < 1) throw InputError("refactor_after must be at least 1");
  s_ = std::make_unique<State>(device, dim, classes);
  const size_t n = size_t(dim) * dim;
  std::vector<Real> p(n, Real(0)), s(n, Real(0));
  for (int i = 0; i < dim; i++)
    p[size_t(i) * dim + i] = Real(options.tau), s[size_t(i) * dim + i] = Real(1 / options.tau);
  upload(device, s_->p, p);
  upload(device, s_->s, s);
}
template <class Real>
LastLayer<Real>::~LastLayer() = default;

// ------------------------------------------------------------------------------------------------------- what it is
template <class Real>
void LastLayer<Real>::logits(const Real* x, int n, Real* out) {
  multiply(device_, false, true, n, classes_, dim_, Real(1), x, dim_, s_->w, dim_, Real(0), out, classes_);
}

template <class Real>
void LastLayer<Real>::covariance_products(const Real* x, int n, Real* out) {
  multiply(device_, false, false, n, dim_, dim_, Real(1), x, dim_, s_->s, dim_, Real(0), out, dim_);
  for (int first = 0; waiting_q_ && first < n; first += chunk_rows) {
    const int count = std::min(chunk_rows, n - first);
    multiply(device_, false, true, count, waiting_q_, dim_, Real(1), x + size_t(first) * dim_, dim_, s_->q, dim_,
             Real(0), s_->overlap, waiting_q_);
    multiply(device_, false, false, count, dim_, waiting_q_, Real(-1), s_->overlap, waiting_q_, s_->q, dim_, Real(1),
             out + size_t(first) * dim_, dim_);
  }
}

template <class Real>
void LastLayer<Real>::variances(const Real* x, int n, Real* out) {
  for (int first = 0; first < n; first += chunk_rows) {
    const int count = std::min(chunk_rows, n - first);
    const Real* rows = x + size_t(first) * dim_;
    covariance_products(rows, count, s_->products);
    row_dots(out + first, Real(1), rows, dim_, s_->products, dim_, Real(0), count, dim_, device_.stream());
  }
}

template <class Real>
LinkedPredictions LastLayer<Real>::predict(const Real* x, int n, const LinkOptions& o) {
  BATON_RANGE("last_layer_predict");
  if (n < 1) throw InputError("predictions of no samples");
  const bool sampled = o.link == Link::monte_carlo;
  if (sampled && (o.draws < 1 || int64_t(o.draws) * classes_ > INT32_MAX - 3))
    throw InputError("Monte Carlo predictions of " + std::to_string(o.draws) + " draws");
  if (o.link == Link::mean_field && !(o.lambda >= 0))
    throw InputError("lambda of the mean-field link must not be negative");
  Scratch::Frame scratch(device_);
  Real* normals = sampled ? scratch.take<Real>(size_t(o.draws) * classes_) : nullptr;
  if (sampled) fill_normals(normals, o.draws * classes_, key_of(o.seed, 13), device_.stream());
  LinkedPredictions result;
  const auto append = [&](std::vector<double>& to, const Real* from, size_t count) {
    const std::vector<Real> host = download(device_, from, count);
    to.insert(to.end(), host.begin(), host.end());
  };
  for (int first = 0; first < n; first += chunk_rows) {
    const int count = std::min(chunk_rows, n - first);
    const Real* rows = x + size_t(first) * dim_;
    Real *variance = s_->chunk_values, *entropy = variance + chunk_rows, *information = entropy + chunk_rows;
    logits(rows, count, s_->chunk_logits);
    if (o.link != Link::map) variances(rows, count, variance);
    link_probabilities<Real>({s_->probability, entropy, sampled ? information : nullptr, s_->chunk_logits,
                              o.link == Link::map ? nullptr : variance, normals, nullptr, false},
                             o.link, o.lambda, o.draws, count, classes_, device_.stream());
    append(result.probability, s_->probability, size_t(count) * classes_);
    append(result.entropy, entropy, count);
    if (sampled) append(result.information, information, count);
  }
  return result;
}

template <class Real>
std::vector<double> LastLayer<Real>::weights() const {
  return to_double(download(device_, s_->w, size_t(classes_) * dim_));
}
template <class Real>
void LastLayer<Real>::set_weights(const std::vector<double>& weights) {
  if (weights.size() != size_t(classes_) * dim_)
    throw InputError(std::to_string(weights.size()) + " weights for a last layer of [" + std::to_string(classes_) +
                     "][" + std::to_string(dim_) + "]");
  const std::vector<Real> w = to_real<Real>(weights);
  for (Real v : w)
    if (!std::isfinite(v)) throw InputError("weights of a last layer that are not finite");
  upload(device_, s_->w, w);
}

// S_0 - Q'Q and P_0 + X'X, without folding.
template <class Real>
std::vector<double> LastLayer<Real>::covariance() const {
  copy_on_device(device_, s_->scratch, s_->s, sizeof(Real) * dim_ * dim_);
  rank_update(device_, true, dim_, waiting_q_, Real(-1), s_->q, dim_, Real(1), s_->scratch, dim_);
  mirror_lower(s_->scratch, dim_, dim_, device_.stream());
  return to_double(download(device_, s_->scratch, size_t(dim_) * dim_));
}
template <class Real>
std::vector<double> LastLayer<Real>::precision() const {
  copy_on_device(device_, s_->scratch, s_->p, sizeof(Real) * dim_ * dim_);
  rank_update(device_, true, dim_, waiting_x_, Real(1), s_->x, dim_, Real(1), s_->scratch, dim_);
  mirror_lower(s_->scratch, dim_, dim_, device_.stream());
  return to_double(download(device_, s_->scratch, size_t(dim_) * dim_));
}

template <class Real>
double LastLayer<Real>::log_evidence(double log_likelihood) {
  copy_on_device(device_, s_->scratch, s_->p, sizeof(Real) * dim_ * dim_);
  rank_update(device_, true, dim_, waiting_x_, Real(1), s_->x, dim_, Real(1), s_->scratch, dim_);
  if (s_->factorizer.cholesky(s_->scratch, dim_))
    throw RunError("the precision of the last layer is not positive definite");
  const double determinant = s_->factorizer.log_determinant(s_->scratch, dim_);
  double square = 0;
  for (double w : weights()) square += w * w;
  return log_likelihood -
         0.5 * (classes_ * determinant - double(classes_) * dim_ * std::log(options_.tau) + options_.tau * square);
}

// ----------------------------------------------------------------------------------------------- fold, drift, factor
template <class Real>
void LastLayer<Real>::fold() {
  BATON_RANGE("last_layer_fold");
  if (waiting_q_) {
    rank_update(device_, true, dim_, waiting_q_, Real(-1), s_->q, dim_, Real(1), s_->s, dim_);
    mirror_lower(s_->s, dim_, dim_, device_.stream());
  }
  if (waiting_x_) {
    rank_update(device_, true, dim_, waiting_x_, Real(1), s_->x, dim_, Real(1), s_->p, dim_);
    mirror_lower(s_->p, dim_, dim_, device_.stream());
  }
  waiting_q_ = waiting_x_ = 0;
}

template <class Real>
double LastLayer<Real>::drift() {
  multiply(device_, false, false, probes, dim_, dim_, Real(1), s_->probe, dim_, s_->p, dim_, Real(0), s_->probe_p,
           dim_);
  if (waiting_x_) {
    multiply(device_, false, true, probes, waiting_x_, dim_, Real(1), s_->probe, dim_, s_->x, dim_, Real(0),
             s_->overlap, waiting_x_);
    multiply(device_, false, false, probes, dim_, waiting_x_, Real(1), s_->overlap, waiting_x_, s_->x, dim_, Real(1),
             s_->probe_p, dim_);
  }
  covariance_products(s_->probe_p, probes, s_->probe_s);
  const std::vector<Real> z = download(device_, s_->probe, size_t(probes) * dim_),
                          back = download(device_, s_->probe_s, size_t(probes) * dim_);
  double worst = 0;
  for (int k = 0; k < probes; k++) {
    double error = 0, size = 0;
    for (int i = 0; i < dim_; i++) {
      const double want = z[size_t(k) * dim_ + i], e = back[size_t(k) * dim_ + i] - want;
      error += e * e, size += want * want;
    }
    const double relative = std::sqrt(error / size);
    worst = relative <= worst ? worst : relative;  // a NaN wins
    if (std::isnan(relative)) return relative;
  }
  return worst;
}

template <class Real>
void LastLayer<Real>::refactor() {
  BATON_RANGE("last_layer_refactor");
  fold();
  copy_on_device(device_, s_->scratch, s_->p, sizeof(Real) * dim_ * dim_);
  if (const int order = s_->factorizer.cholesky(s_->scratch, dim_))
    throw RunError("the precision of the last layer is not positive definite (feature " + std::to_string(order) +
                   " of " + std::to_string(dim_) + ")");
  s_->factorizer.invert(s_->scratch, dim_);
  copy_on_device(device_, s_->s, s_->scratch, sizeof(Real) * dim_ * dim_);
  downdates_ = 0;
}

template <class Real>
void LastLayer<Real>::settle() {
  if (waiting_q_ <= call_rows && waiting_x_ <= call_rows) return;
  fold();
  if (downdates_ < options_.refactor_after && drift() <= most_drift<Real>()) return;
  try {
    refactor();
  } catch (const RunError&) {
    return;  // P only grows, so this is the edge of the precision: S stays as folded, and drift() says how good it is
  }
  refactored_++;
}

// -------------------------------------------------------------------------------------------------------------- fits
template <class Real>
std::vector<uint64_t> LastLayer<Real>::hashes_of(const Real* x, int n) {
  std::vector<uint64_t> all;
  for (int first = 0; first < n; first += chunk_rows) {
    const int count = std::min(chunk_rows, n - first);
    inspect_rows(s_->hash, s_->nonfinite, x + size_t(first) * dim_, count, dim_, device_.stream());
    const std::vector<uint64_t> hashes = download(device_, s_->hash, count);
    const std::vector<int32_t> bad = download(device_, s_->nonfinite, count);
    for (int i = 0; i < count; i++)
      if (bad[i]) throw InputError("sample " + std::to_string(first + i) + " has features that are not finite");
    all.insert(all.end(), hashes.begin(), hashes.end());
  }
  return all;
}

template <class Real>
MapResult LastLayer<Real>::fit(const FeatureRows<Real>& data, const MapOptions& o) {
  if (data.dim != dim_)
    throw InputError("samples have " + std::to_string(data.dim) + " features, the last layer " + std::to_string(dim_));
  MapOptions options = o;
  options.tau = options_.tau;
  MapResult result = fit_map(device_, data, classes_, options);
  fit_covariance(data, result.weights);
  return result;
}

template <class Real>
void LastLayer<Real>::fit_covariance(const FeatureRows<Real>& data, const std::vector<double>& weights) {
  BATON_RANGE("last_layer_fit_covariance");
  if (data.dim != dim_)
    throw InputError("samples have " + std::to_string(data.dim) + " features, the last layer " + std::to_string(dim_));
  if (data.count < 1) throw InputError("a covariance of no samples");
  const std::vector<uint64_t> hashes = hashes_of(data.x, data.count);
  all_or_nothing(true, [&] {
    set_weights(weights);
    const Stream stream = device_.stream();
    fill_zero(device_, s_->p, sizeof(Real) * dim_ * dim_);
    waiting_q_ = waiting_x_ = 0;
    for (int first = 0; first < data.count; first += chunk_rows) {
      const int count = std::min(chunk_rows, data.count - first);
      const Real* rows = data.x + size_t(first) * dim_;
      if (options_.weight == SampleWeight::categorical) {
        Real* weight = s_->chunk_values;
        logits(rows, count, s_->chunk_logits);
        softmax_residual<Real>(nullptr, nullptr, nullptr, weight, s_->chunk_logits, nullptr, count, classes_, stream);
        scale_rows(s_->rows, rows, weight, count, dim_, stream);
        rows = s_->rows;
      }
      rank_update(device_, true, dim_, count, Real(1), rows, dim_, Real(1), s_->p, dim_);
    }
    add_diagonal(s_->p, Real(options_.tau), dim_, stream);
    mirror_lower(s_->p, dim_, dim_, stream);
    const std::string advice = ": features are collinear or differ too much in scale for " +
                               std::string(precision_name<Real>()) + " and tau = " + shown(options_.tau) +
                               "; scale them, raise tau, or use double";
    try {
      refactor();
    } catch (const RunError& e) {
      throw InputError(e.what() + advice);
    }
    if (const double off = drift(); !(off <= most_drift<Real>()))
      throw InputError("the covariance of the last layer is off by " + shown(off) + advice);
  });
  seen_.clear();
  seen_.insert(hashes.begin(), hashes.end());
  absorbed_ = 0;
}

template <class Real>
void LastLayer<Real>::set(const std::vector<double>& weights, const std::vector<double>& precision) {
  const size_t n = size_t(dim_) * dim_;
  if (precision.size() != n)
    throw InputError("a precision of " + std::to_string(precision.size()) + " numbers for " + std::to_string(dim_) +
                     " features");
  for (int i = 0; i < dim_; i++)
    for (int j = 0; j < i; j++) {
      const double a = precision[size_t(i) * dim_ + j], b = precision[size_t(j) * dim_ + i];
      if (!(std::abs(a - b) <= 1e-6 * (std::abs(a) + std::abs(b))))
        throw InputError("a precision that is not symmetric at (" + std::to_string(i) + ", " + std::to_string(j) + ")");
    }
  all_or_nothing(true, [&] {
    set_weights(weights);
    upload(device_, s_->p, to_real<Real>(precision));
    mirror_lower(s_->p, dim_, dim_, device_.stream());
    waiting_q_ = waiting_x_ = 0;
    try {
      refactor();
    } catch (const RunError& e) {
      throw InputError(e.what());
    }
    if (const double off = drift(); !(off <= most_drift<Real>()))
      throw InputError("a precision that is nearly singular in " + std::string(precision_name<Real>()) +
                       ": its inverse is off by " + shown(off));
  });
  seen_.clear();
  absorbed_ = 0;
}

template <class Real>
void LastLayer<Real>::copy_from(const LastLayer& from) {
  if (from.dim_ != dim_ || from.classes_ != classes_)
    throw InputError("a last layer of [" + std::to_string(classes_) + "][" + std::to_string(dim_) +
                     "] cannot become one of [" + std::to_string(from.classes_) + "][" + std::to_string(from.dim_) +
                     "]");
  const size_t square = sizeof(Real) * dim_ * dim_;
  copy_on_device(device_, s_->w, from.s_->w, sizeof(Real) * classes_ * dim_);
  copy_on_device(device_, s_->s, from.s_->s, square);
  copy_on_device(device_, s_->p, from.s_->p, square);
  copy_on_device(device_, s_->q, from.s_->q, sizeof(Real) * waiting_rows * dim_);
  copy_on_device(device_, s_->x, from.s_->x, sizeof(Real) * waiting_rows * dim_);
  options_ = from.options_;
  waiting_q_ = from.waiting_q_, waiting_x_ = from.waiting_x_;
  downdates_ = from.downdates_, refactored_ = from.refactored_, absorbed_ = from.absorbed_;
  seen_ = from.seen_;
}

// ----------------------------------------------------------------------------------------------------------- updates
// Runs `work`; if it throws, the posterior is what it was. keep: the arrays themselves may change on the way.
template <class Real>
template <class Work>
void LastLayer<Real>::all_or_nothing(bool keep, Work work) {
  if (!keep) return work();
  const size_t square = sizeof(Real) * dim_ * dim_, wide = sizeof(Real) * waiting_rows * dim_,
               mean = sizeof(Real) * classes_ * dim_;
  struct Pair {
    Real *now, *kept;
    size_t bytes;
  };
  const Pair arrays[] = {{s_->w, s_->kept_w, mean},
                         {s_->s, s_->kept_s, square},
                         {s_->p, s_->kept_p, square},
                         {s_->q, s_->kept_q, wide},
                         {s_->x, s_->kept_x, wide}};
  for (const Pair& a : arrays) copy_on_device(device_, a.kept, a.now, a.bytes);
  const int waiting_q = waiting_q_, waiting_x = waiting_x_;
  const int64_t downdates = downdates_, refactored = refactored_;
  try {
    work();
  } catch (...) {
    for (const Pair& a : arrays) copy_on_device(device_, a.now, a.kept, a.bytes);
    waiting_q_ = waiting_q, waiting_x_ = waiting_x;
    downdates_ = downdates, refactored_ = refactored;
    throw;
  }
}

template <class Real>
std::vector<uint64_t> LastLayer<Real>::check_update(const FeatureRows<Real>& data, const UpdateOptions& o) {
  if (data.dim != dim_)
    throw InputError("samples have " + std::to_string(data.dim) + " features, the last layer " + std::to_string(dim_));
  if (data.count < 1) throw InputError("an update with no samples");
  if (!data.labels) throw InputError("an update needs labels");
  if (o.passes < 1 || o.passes > call_rows)
    throw InputError("1 to " + std::to_string(call_rows) + " passes, not " + std::to_string(o.passes));
  if (o.rule != UpdateRule::implicit && !(o.gamma > 0 && o.gamma <= most_gamma))
    throw InputError("gamma must be positive and at most 1e6, not " + shown(o.gamma));
  const std::vector<int32_t> labels = download(device_, data.labels, data.count);
  for (int i = 0; i < data.count; i++)
    if (labels[i] < 0 || labels[i] >= classes_)
      throw InputError("sample " + std::to_string(i) + " has label " + std::to_string(labels[i]) +
                       ", the last layer knows classes 0 to " + std::to_string(classes_ - 1));
  const std::vector<uint64_t> hashes = hashes_of(data.x, data.count);
  if (!o.duplicates) {
    std::unordered_set<uint64_t> here;
    for (int i = 0; i < data.count; i++) {
      const bool before = seen_.count(hashes[i]) != 0;
      if (before || !here.insert(hashes[i]).second)
        throw InputError("sample " + std::to_string(i) + " is a duplicate: its features " +
                         (before ? "were absorbed before" : "are there twice in this update") +
                         " and would count twice (allow duplicates if that is meant)");
    }
  }
  return hashes;
}

[[noreturn]] static void fail(int failure, int first) {
  const std::string sample = "sample " + std::to_string(first + failure / 4);
  if (failure % 4 == 2)
    throw RunError(sample + ": its variance phi'S phi is negative, the covariance has lost its positive definiteness");
  if (failure % 4 == 3)
    throw InputError(sample +
                     ": its features are so large that the posterior would keep nothing of the earlier data in this "
                     "precision; scale them as those of the fit");
  throw InputError(sample + ": its logits or variance are not finite; its features are badly scaled");
}

// The call in the samples' own space: u, and all of steps. Changes nothing of the posterior; throws if it cannot be.
template <class Real>
void LastLayer<Real>::prepare_block(const Real* x, const int32_t* labels, int samples, const UpdateOptions& o,
                                    int first) {
  UpdateSteps<Real>& steps = s_->steps;
  steps.labels = labels;
  covariance_products(x, samples, s_->u);
  multiply(device_, false, true, samples, samples, dim_, Real(1), s_->u, dim_, x, dim_, Real(0), steps.gram, samples);
  logits(x, samples, steps.logits);
  sequential_steps(steps, o.rule, o.gamma, o.passes, samples, classes_, 1, device_.stream());
  if (const int32_t failure = download(device_, steps.failure, 1)[0]) fail(failure, first);
}

template <class Real>
void LastLayer<Real>::update_block(const Real* x, const int32_t* labels, int samples, const UpdateOptions& o,
                                   int first) {
  prepare_block(x, labels, samples, o, first);
  const UpdateSteps<Real>& steps = s_->steps;
  const int rows = samples * o.passes;
  multiply(device_, true, false, classes_, dim_, samples, Real(1), steps.step, classes_, s_->u, dim_, Real(1), s_->w,
           dim_);
  multiply(device_, false, false, rows, dim_, samples, Real(1), steps.downdate, samples, s_->u, dim_, Real(0),
           s_->q + size_t(waiting_q_) * dim_, dim_);
  for (int pass = 0; pass < o.passes; pass++)
    scale_rows(s_->x + size_t(waiting_x_ + pass * samples) * dim_, x, steps.weight + pass * samples, samples, dim_,
               device_.stream());
  waiting_q_ += rows, waiting_x_ += rows;
  downdates_ += rows;
  settle();
}

template <class Real>
void LastLayer<Real>::update(const FeatureRows<Real>& data, const UpdateOptions& o) {
  BATON_RANGE("last_layer_update");
  const std::vector<uint64_t> hashes = check_update(data, o);
  // Passes over all of the new samples, as the authors' rule: so with more than one, all must be one block.
  const int block = call_rows / o.passes;
  if (o.passes > 1 && data.count > block)
    throw InputError("an update of " + std::to_string(o.passes) + " passes takes at most " + std::to_string(block) +
                     " samples, not " + std::to_string(data.count));
  // A block throws before it changes anything, so only blocks after the first need the way back.
  all_or_nothing(data.count > block, [&] {
    for (int first = 0; first < data.count; first += block)
      update_block(data.x + size_t(first) * dim_, data.labels + first, std::min(block, data.count - first), o, first);
  });
  seen_.insert(hashes.begin(), hashes.end());
  absorbed_ += data.count;
}

template <class Real>
void LastLayer<Real>::update_one_by_one(const FeatureRows<Real>& data, const UpdateOptions& o) {
  BATON_RANGE("last_layer_update_one_by_one");
  const std::vector<uint64_t> hashes = check_update(data, o);
  const Stream stream = device_.stream();
  all_or_nothing(true, [&] {
    fold();
    for (int i = 0; i < data.count * o.passes; i++) {
      const int sample = i % data.count;
      const Real* x = data.x + size_t(sample) * dim_;
      UpdateSteps<Real>& steps = s_->steps;
      steps.labels = data.labels + sample;
      Real *product = s_->u, *downdate = s_->products;
      row_dots(product, Real(1), s_->s, dim_, x, 0, Real(0), dim_, dim_, stream);
      row_dots(steps.gram, Real(1), product, 0, x, 0, Real(0), 1, dim_, stream);
      row_dots(steps.logits, Real(1), s_->w, dim_, x, 0, Real(0), classes_, dim_, stream);
      sequential_steps(steps, o.rule, o.gamma, 1, 1, classes_, 1, stream);
      if (const int32_t failure = download(device_, steps.failure, 1)[0]) fail(failure, sample);
      multiply(device_, false, false, 1, dim_, 1, Real(1), steps.downdate, 1, product, dim_, Real(0), downdate, dim_);
      add_outer(s_->s, Real(-1), downdate, downdate, dim_, dim_, stream);
      add_outer(s_->w, Real(1), steps.step, product, classes_, dim_, stream);
      scale_rows(s_->x + size_t(waiting_x_) * dim_, x, steps.weight, 1, dim_, stream);
      waiting_x_++, downdates_++;
      settle();
    }
  });
  seen_.insert(hashes.begin(), hashes.end());
  absorbed_ += data.count;
}

template <class Real>
void LastLayer<Real>::update_first_order(const FeatureRows<Real>& data, double gamma) {
  BATON_RANGE("last_layer_update_first_order");
  if (!(gamma > 0) || !std::isfinite(gamma)) throw InputError("gamma must be positive, not " + shown(gamma));
  UpdateOptions o;
  o.duplicates = true;  // nothing is counted
  check_update(data, o);
  const Stream stream = device_.stream();
  copy_on_device(device_, s_->kept_w, s_->w, sizeof(Real) * classes_ * dim_);
  for (int i = 0; i < data.count; i++) {
    const Real* x = data.x + size_t(i) * dim_;
    logits(x, 1, s_->chunk_logits);
    softmax_residual<Real>(nullptr, s_->chunk_logits, nullptr, nullptr, s_->chunk_logits, data.labels + i, 1, classes_,
                           stream);
    add_outer(s_->w, Real(gamma), s_->chunk_logits, x, classes_, dim_, stream);
  }
  for (double w : weights())
    if (!std::isfinite(w)) {
      copy_on_device(device_, s_->w, s_->kept_w, sizeof(Real) * classes_ * dim_);
      throw InputError("a first-order update with gamma = " + shown(gamma) + " diverged: lower gamma");
    }
}

// ------------------------------------------------------------------------------------------------------------- files
template <class Real>
void LastLayer<Real>::save(const std::filesystem::path& path) {
  TensorFile file;
  const auto put = [&](const char* name, const Real* data, int64_t rows, int64_t columns) {
    const std::vector<Real> host = download(device_, data, size_t(rows * columns));
    file.tensors[name] = Tensor::of<Real>(std::span<const Real>(host), {rows, columns});
  };
  put("weights", s_->w, classes_, dim_);
  put("precision", s_->p, dim_, dim_);
  put("covariance", s_->s, dim_, dim_);
  put("waiting_downdates", s_->q, waiting_q_, dim_);
  put("waiting_samples", s_->x, waiting_x_, dim_);
  std::vector<uint64_t> seen(seen_.begin(), seen_.end());
  std::sort(seen.begin(), seen.end());
  file.tensors["seen"] = Tensor::of<uint64_t>(std::span<const uint64_t>(seen), {int64_t(seen.size())});
  const json settings = {
      {"tau", options_.tau},     {"weight", name_of(options_.weight)}, {"refactor_after", options_.refactor_after},
      {"downdates", downdates_}, {"refactored", refactored_},          {"absorbed", absorbed_}};
  file.metadata = {{"format", "baton.last_layer"}, {"version", "1"}, {"settings", settings.dump()}};
  save_safetensors(path, file);
}

template <class Real>
std::unique_ptr<LastLayer<Real>> LastLayer<Real>::load(Device& device, const std::filesystem::path& path) {
  const TensorFile file = load_safetensors(path);
  const auto meta = [&](const char* key) {
    const auto found = file.metadata.find(key);
    return found == file.metadata.end() ? std::string() : found->second;
  };
  if (meta("format") != "baton.last_layer" || meta("version") != "1")
    throw InputError(path.string() + ": not a last layer of version 1 (format '" + meta("format") + "', version '" +
                     meta("version") + "')");
  const json settings = json::parse(meta("settings"), nullptr, false);
  LastLayerOptions options;
  int64_t downdates = 0, refactored = 0, absorbed = 0;
  try {
    options.tau = settings.at("tau");
    options.weight = sample_weight_of(settings.at("weight"));
    options.refactor_after = settings.at("refactor_after");
    downdates = settings.at("downdates"), refactored = settings.at("refactored"), absorbed = settings.at("absorbed");
  } catch (const json::exception&) {
    throw InputError(path.string() + ": its settings are damaged");
  }
  const Tensor& w = file.at("weights");
  if (w.dtype != safetensors_dtype<Real>())
    throw InputError(path.string() + ": a last layer in " + w.dtype + ", asked for in " + precision_name<Real>());
  if (w.shape.size() != 2 || w.shape[0] > 1500 || w.shape[1] > 32768)
    throw InputError(path.string() + ": weights of shape " + shape_text(w.shape));
  const int64_t c = w.shape[0], d = w.shape[1];
  const auto numbers = [&](const char* name, int64_t rows) {
    std::vector<Real> v = file.at(name, {rows, d}).as<Real>();
    for (Real x : v)
      if (!std::isfinite(x)) throw InputError(path.string() + ": tensor '" + name + "' is not finite");
    return v;
  };
  const auto rows_of = [&](const char* name) {
    const std::vector<int64_t>& shape = file.at(name).shape;
    if (shape.size() != 2 || shape[0] > call_rows)
      throw InputError(path.string() + ": tensor '" + name + "' of shape " + shape_text(shape));
    return int(shape[0]);
  };
  file.at("precision", {d, d}), file.at("covariance", {d, d});  // before memory for them is taken
  auto layer = std::make_unique<LastLayer>(device, int(d), int(c), options);
  State& s = *layer->s_;
  upload(device, s.w, numbers("weights", c));
  upload(device, s.p, numbers("precision", d));
  upload(device, s.s, numbers("covariance", d));
  layer->waiting_q_ = rows_of("waiting_downdates"), layer->waiting_x_ = rows_of("waiting_samples");
  upload(device, s.q, numbers("waiting_downdates", layer->waiting_q_));
  upload(device, s.x, numbers("waiting_samples", layer->waiting_x_));
  layer->downdates_ = downdates, layer->refactored_ = refactored, layer->absorbed_ = absorbed;
  const std::vector<uint64_t> seen = file.at("seen").as<uint64_t>();
  layer->seen_.insert(seen.begin(), seen.end());
  if (const double off = layer->drift(); !(off <= 10 * most_drift<Real>()))
    throw InputError(path.string() + ": its covariance is not the inverse of its precision (off by " + shown(off) +
                     ")");
  return layer;
}

template class LastLayer<float>;
template class LastLayer<double>;

// -------------------------------------------------------------------------------------------------------- reweighting
template <class Real>
Reweighting<Real>::Reweighting(Device& device, LastLayer<Real>& layer, int draws, uint64_t seed)
    : device_(device), dim_(layer.dim()), classes_(layer.classes()), draws_(draws) {
  if (draws < 1) throw InputError("re-weighting needs at least one draw");
  const size_t d = dim_, rows = size_t(draws) * classes_;
  if (rows * d > size_t(INT32_MAX)) throw InputError("re-weighting: too many draws");
  log_weight_.assign(size_t(draws), 0);
  Arena scratch;
  Real *factor = scratch.take<Real>(d * d), *normals = scratch.take<Real>(rows * d);
  Factorizer<Real> factorizer(device, scratch, dim_);
  upload(device, factor, to_real<Real>(layer.covariance()));
  if (factorizer.cholesky(factor, dim_)) throw RunError("the covariance of the last layer is not positive definite");
  std::vector<Real> lower = download(device, factor, d * d);
  for (size_t i = 0; i < d; i++)
    for (size_t j = i + 1; j < d; j++) lower[i * d + j] = 0;
  upload(device, factor, lower);
  fill_normals(normals, int(rows * d), key_of(seed, 14), device.stream());
  weights_ = arena_.take<Real>(rows * d);
  const std::vector<Real> mean = to_real<Real>(layer.weights());
  std::vector<Real> all;
  for (int s = 0; s < draws; s++) all.insert(all.end(), mean.begin(), mean.end());
  upload(device, weights_, all);
  multiply(device, false, true, int(rows), dim_, dim_, Real(1), normals, dim_, factor, dim_, Real(1), weights_, dim_);
}

template <class Real>
void Reweighting<Real>::update(const FeatureRows<Real>& data, double gamma) {
  if (data.dim != dim_)
    throw InputError("samples have " + std::to_string(data.dim) + " features, the draws " + std::to_string(dim_));
  if (data.count < 1 || !data.labels) throw InputError("re-weighting needs samples with labels");
  if (!(gamma > 0) || !std::isfinite(gamma)) throw InputError("gamma must be positive, not " + shown(gamma));
  const int wide = draws_ * classes_;
  Scratch::Frame scratch(device_);
  const size_t rows = size_t(data.count) * draws_;
  Real *logits = scratch.take<Real>(size_t(data.count) * wide), *loss = scratch.take<Real>(rows);
  int32_t* labels = scratch.take<int32_t>(rows);
  const std::vector<int32_t> y = download(device_, data.labels, data.count);
  std::vector<int32_t> repeated(rows);
  for (size_t i = 0; i < rows; i++) repeated[i] = y[i / draws_];
  upload(device_, labels, repeated);
  multiply(device_, false, true, data.count, wide, dim_, Real(1), data.x, dim_, weights_, dim_, Real(0), logits, wide);
  softmax_residual<Real>(nullptr, nullptr, loss, nullptr, logits, labels, int(rows), classes_, device_.stream());
  const std::vector<Real> losses = download(device_, loss, rows);
  std::vector<double> next = log_weight_;
  for (size_t i = 0; i < rows; i++) {
    if (!std::isfinite(losses[i])) throw InputError("re-weighting: a sample's label or features are not valid");
    next[i % draws_] -= gamma * losses[i];
  }
  log_weight_ = next;
}

template <class Real>
std::vector<double> Reweighting<Real>::predict(const Real* x, int n) {
  const double top = *std::max_element(log_weight_.begin(), log_weight_.end());
  std::vector<Real> share(draws_);
  double sum = 0;
  for (double w : log_weight_) sum += std::exp(w - top);
  for (int s = 0; s < draws_; s++) share[s] = Real(std::exp(log_weight_[s] - top) / sum);
  const int wide = draws_ * classes_, chunk = std::max(1, std::min(n, 4000000 / wide));
  Scratch::Frame scratch(device_);
  Real *logits = scratch.take<Real>(size_t(chunk) * wide), *mean = scratch.take<Real>(size_t(chunk) * classes_),
       *weight = scratch.take<Real>(draws_);
  upload(device_, weight, share);
  std::vector<double> result;
  for (int first = 0; first < n; first += chunk) {
    if (stop_requested()) throw_stopped("a prediction was under way");
    const int count = std::min(chunk, n - first);
    multiply(device_, false, true, count, wide, dim_, Real(1), x + size_t(first) * dim_, dim_, weights_, dim_, Real(0),
             logits, wide);
    softmax_residual<Real>(logits, nullptr, nullptr, nullptr, logits, nullptr, count * draws_, classes_,
                           device_.stream());
    for (int i = 0; i < count; i++)
      multiply(device_, false, false, 1, classes_, draws_, Real(1), weight, draws_, logits + size_t(i) * wide, classes_,
               Real(0), mean + size_t(i) * classes_, classes_);
    const std::vector<Real> host = download(device_, mean, size_t(count) * classes_);
    result.insert(result.end(), host.begin(), host.end());
  }
  return result;
}

template <class Real>
double Reweighting<Real>::effective_draws() const {
  const double top = *std::max_element(log_weight_.begin(), log_weight_.end());
  double sum = 0, squares = 0;
  for (double w : log_weight_) {
    const double e = std::exp(w - top);
    sum += e, squares += e * e;
  }
  return sum * sum / squares;
}

template class Reweighting<float>;
template class Reweighting<double>;

}  // namespace baton
