#include "trainers/last_layer/last_layer.h"

#include <algorithm>
#include <cmath>

#include "engine/io/runlog.h"
#include "engine/io/safetensors.h"
#include "trainers/last_layer/evidence.h"

namespace baton {

// Returns the options if they make sense: no memory is taken for others.
template <class Real>
static const LastLayerOptions& check_options(int dim, int classes, const LastLayerOptions& o) {
  if (dim < 1 || dim > 32768) throw InputError("a last layer has 1 to 32,768 features, not " + std::to_string(dim));
  if (classes < 2 || classes > 1500)
    throw InputError("a last layer has 2 to 1,500 classes, not " + std::to_string(classes));
  if (!(Real(o.tau) > 0) || !std::isfinite(Real(o.tau)) || !std::isfinite(Real(1 / o.tau)))
    throw InputError("the prior precision must be a positive number of this precision, not " + format_number(o.tau));
  if (o.refactor_after < 1) throw InputError("refactor_after must be at least 1");
  return o;
}

template <class Real>
LastLayer<Real>::LastLayer(Device& device, int dim, int classes, const LastLayerOptions& options)
    : device_(device), dim_(dim), classes_(classes), options_(check_options<Real>(dim, classes, options)) {
  const auto take = [&](size_t rows, size_t columns) { return arena_.template take<Real>(rows * columns); };
  for (Posterior* m : {&now_, &kept_})
    *m = {take(classes, dim), take(dim, dim), take(dim, dim), take(waiting_rows, dim), take(waiting_rows, dim)};
  scratch_ = take(dim, dim), u_ = take(block_rows, dim);
  steps_.gram = take(block_rows, block_rows), steps_.basis = take(block_rows, block_rows);
  steps_.logits = take(block_rows, classes), steps_.step = take(block_rows, classes);
  steps_.downdate = take(block_rows, block_rows), steps_.weight = take(block_rows, 1);
  steps_.failure = arena_.template take<int32_t>(1);
  products_ = take(chunk_rows, dim), overlap_ = take(chunk_rows, waiting_rows);
  probe_ = take(probes, dim), probe_p_ = take(probes, dim), probe_s_ = take(probes, dim);
  fill_normals(probe_, probes * dim, key_of(1, 12), device.stream());
  add_diagonal(now_.p, Real(options.tau), dim, device.stream());
  add_diagonal(now_.s, Real(1 / options.tau), dim, device.stream());
}

// ------------------------------------------------------------------------------------------------------ predictions
template <class Real>
void LastLayer<Real>::covariance_products(const Real* x, int n, Real* out) {
  multiply_packed(device_, false, false, n, dim_, dim_, x, now_.s, out);
  for (int first = 0; counts_.waiting_q && first < n; first += chunk_rows)
    add_waiting(x + size_t(first) * dim_, std::min(chunk_rows, n - first), now_.q, counts_.waiting_q, Real(-1),
                out + size_t(first) * dim_);
}

template <class Real>
void LastLayer<Real>::variances(const Real* x, int n, Real* out) {
  for (int first = 0; first < n; first += chunk_rows) {
    const int count = std::min(chunk_rows, n - first);
    const Real* rows = x + size_t(first) * dim_;
    covariance_products(rows, count, products_);
    row_dots(out + first, Real(1), rows, dim_, products_, dim_, Real(0), count, dim_, device_.stream());
  }
}

template <class Real>
void LastLayer<Real>::add_curvature(const Real* x, int n, SampleWeight kind, Real scale, Real* out) {
  const int most = std::min(chunk_rows, n);
  Scratch::Frame scratch(device_);
  Real *scaled = scratch.take<Real>(size_t(most) * dim_), *f = scratch.take<Real>(size_t(most) * classes_),
       *weight = scratch.take<Real>(most);
  for (int first = 0; first < n; first += most) {
    const int count = std::min(most, n - first);
    const Real* rows = x + size_t(first) * dim_;
    if (kind == SampleWeight::categorical) {
      logits(rows, count, f);
      softmax_residual<Real>(nullptr, nullptr, nullptr, weight, f, nullptr, count, classes_, device_.stream());
      scale_rows(scaled, rows, weight, count, dim_, device_.stream());
      rows = scaled;
    }
    rank_update(device_, true, dim_, count, scale, rows, dim_, Real(1), out, dim_);
  }
  mirror_lower(out, dim_, dim_, device_.stream());
}

template <class Real>
LinkedPredictions LastLayer<Real>::predict(const Real* x, int n, const LinkOptions& o) {
  BATON_RANGE("last_layer_predict");
  if (n < 1) throw InputError("predictions of no samples");
  return predict_rows<Real>(device_, x, n, dim_, classes_, chunk_rows, false, o,
                            std::bind_front(&LastLayer::logits, this), std::bind_front(&LastLayer::variances, this));
}

template <class Real>
double LastLayer<Real>::log_evidence(double log_likelihood) {
  whole_precision();
  if (factorizer_.cholesky(scratch_, dim_)) throw RunError("the precision of the last layer is not positive definite");
  const double log_determinant = classes_ * factorizer_.log_determinant(scratch_, dim_);
  return compute_evidence(log_likelihood, log_determinant, 0, weights(), options_.tau).value;
}

// ----------------------------------------------------------------------------------------------- fold, drift, factor
template <class Real>
double LastLayer<Real>::drift() {
  multiply_packed(device_, false, false, probes, dim_, dim_, probe_, now_.p, probe_p_);
  if (counts_.waiting_x) add_waiting(probe_, probes, now_.x, counts_.waiting_x, Real(1), probe_p_);
  covariance_products(probe_p_, probes, probe_s_);
  const std::vector<Real> z = download(device_, probe_, size_t(probes) * dim_),
                          back = download(device_, probe_s_, size_t(probes) * dim_);
  double worst = 0;
  for (int k = 0; k < probes; k++) {
    double error = 0, size = 0;
    for (int i = 0; i < dim_; i++) {
      const double want = z[size_t(k) * dim_ + i], e = back[size_t(k) * dim_ + i] - want;
      error += e * e, size += want * want;
    }
    const double relative = std::sqrt(error / size);
    if (std::isnan(relative)) return relative;
    worst = std::max(worst, relative);
  }
  return worst;
}

template <class Real>
void LastLayer<Real>::refactor() {
  BATON_RANGE("last_layer_refactor");
  fold();
  copy_on_device(device_, scratch_, now_.p, sizeof(Real) * dim_ * dim_);
  if (const int order = factorizer_.cholesky(scratch_, dim_))
    throw RunError("the precision of the last layer is not positive definite (feature " + std::to_string(order) +
                   " of " + std::to_string(dim_) + ")");
  factorizer_.invert(scratch_, dim_);
  copy_on_device(device_, now_.s, scratch_, sizeof(Real) * dim_ * dim_);
  counts_.downdates = 0;
}

template <class Real>
void LastLayer<Real>::settle() {
  if (counts_.waiting_q <= block_rows && counts_.waiting_x <= block_rows) return;
  fold();
  if (counts_.downdates < options_.refactor_after && drift() <= most_drift) return;
  try {
    refactor();
  } catch (const RunError&) {
    return;  // P only grows, so this precision is at its end: S stays as folded, and drift() says how good it is
  }
  counts_.refactored++;
}

// -------------------------------------------------------------------------------------------------------------- fits
// Runs `work`; if it throws, the posterior is again what it was.
template <class Real>
void LastLayer<Real>::all_or_nothing(const std::function<void()>& work) {
  copy(kept_, now_);
  const Counts counts = counts_;
  try {
    work();
  } catch (...) {
    copy(now_, kept_);
    counts_ = counts;
    throw;
  }
}

// Replaces W and P, which `fill_precision` writes, and makes S from P; `seen` are the samples' hashes. Throws
// InputError, ending in the advice, where P has no inverse or none that is good.
template <class Real>
void LastLayer<Real>::start_from(const Doubles& weights, const std::function<void()>& fill_precision,
                                 const std::string& advice, const std::vector<uint64_t>& seen) {
  all_or_nothing([&] {
    set_weights(weights);
    counts_.waiting_q = counts_.waiting_x = 0;
    fill_precision();
    try {
      refactor();
    } catch (const RunError& e) {
      throw InputError(e.what() + advice);
    }
    if (const double off = drift(); !(off <= most_drift))
      throw InputError("the covariance of the last layer is off by " + format_number(off) + advice);
  });
  seen_ = {seen.begin(), seen.end()};
  counts_.absorbed = 0;
}

template <class Real>
MapResult LastLayer<Real>::fit(const FeatureRows<Real>& data, const MapOptions& o) {
  check_features(device_, data, dim_);
  MapOptions options = o;
  options.tau = options_.tau;
  MapResult result = fit_map(device_, data, classes_, options);
  fit_covariance(data, result.weights);
  return result;
}

template <class Real>
void LastLayer<Real>::fit_covariance(const FeatureRows<Real>& data, const Doubles& weights) {
  BATON_RANGE("last_layer_fit_covariance");
  const std::vector<uint64_t> hashes = check_features(device_, data, dim_);
  if (data.count < 1) throw InputError("a covariance of no samples");
  const auto fill_precision = [&] {
    fill_zero(device_, now_.p, sizeof(Real) * dim_ * dim_);
    add_curvature(data.x, data.count, options_.weight, Real(1), now_.p);
    add_diagonal(now_.p, Real(options_.tau), dim_, device_.stream());
  };
  start_from(weights, fill_precision,
             ": features are collinear or differ too much in scale for " + std::string(real_name) +
                 " and tau = " + format_number(options_.tau) + "; scale them, raise tau, or use double",
             hashes);
}

template <class Real>
void LastLayer<Real>::set(const Doubles& weights, const Doubles& precision) {
  if (precision.size() != size_t(dim_) * dim_)
    throw InputError("a precision of " + std::to_string(precision.size()) + " numbers for " + std::to_string(dim_) +
                     " features");
  for (int i = 0; i < dim_; i++)
    for (int j = 0; j < i; j++) {
      const double a = precision[size_t(i) * dim_ + j], b = precision[size_t(j) * dim_ + i];
      if (!(std::abs(a - b) <= 1e-6 * (std::abs(a) + std::abs(b))))
        throw InputError("a precision that is not symmetric at (" + std::to_string(i) + ", " + std::to_string(j) + ")");
    }
  const auto fill_precision = [&] {
    upload(device_, now_.p, std::vector<Real>(precision.begin(), precision.end()));
    mirror_lower(now_.p, dim_, dim_, device_.stream());
  };
  start_from(weights, fill_precision,
             ": the given precision is singular, or nearly singular in " + std::string(real_name), {});
}

template <class Real>
void LastLayer<Real>::copy_from(const LastLayer& from) {
  if (from.dim_ != dim_ || from.classes_ != classes_)
    throw InputError("a last layer of [" + std::to_string(classes_) + "][" + std::to_string(dim_) +
                     "] cannot become one of [" + std::to_string(from.classes_) + "][" + std::to_string(from.dim_) +
                     "]");
  copy(now_, from.now_);
  options_ = from.options_;
  counts_ = from.counts_;
  seen_ = from.seen_;
}

// ----------------------------------------------------------------------------------------------------------- updates
template <class Real>
std::vector<uint64_t> LastLayer<Real>::check_update(const FeatureRows<Real>& data, const LastLayerUpdateOptions& o) {
  const std::vector<uint64_t> hashes = check_features(device_, data, dim_);
  if (data.count < 1) throw InputError("an update with no samples");
  if (o.passes < 1 || o.passes > block_rows)
    throw InputError("1 to " + std::to_string(block_rows) + " passes, not " + std::to_string(o.passes));
  if (o.rule != UpdateRule::implicit) check_gamma(o.gamma, 1e6);  // far beyond use; keeps a step finite
  download_labels(device_, data, classes_);
  std::unordered_set<uint64_t> here;
  for (int i = 0; i < data.count && !o.duplicates; i++) {
    const bool before = seen_.count(hashes[i]) != 0;
    if (before || !here.insert(hashes[i]).second)
      throw InputError("sample " + std::to_string(i) + " is a duplicate: its features " +
                       (before ? "were absorbed before" : "are there twice in this update") +
                       " and would count twice (allow duplicates if that is meant)");
  }
  return hashes;
}

// Throws where the steps of the samples from `first` on have failed.
template <class Real>
static void check_steps(Device& device, const UpdateSteps<Real>& steps, int first) {
  const int32_t failure = download(device, steps.failure, 1)[0];
  if (!failure) return;
  const std::string sample = "sample " + std::to_string(first + failure / 4);
  if (failure % 4 == 2)
    throw RunError(sample + ": its variance phi'S phi is negative, the covariance has lost its positive definiteness");
  if (failure % 4 == 3)
    throw InputError(sample +
                     ": its features are so large that the posterior would keep nothing of the earlier data in this "
                     "precision; scale them as those of the fit");
  throw InputError(sample + ": its logits or variance are not finite; its features are badly scaled");
}

// All steps are computed in the samples' own space first, so that a block which cannot be absorbed changes nothing.
template <class Real>
void LastLayer<Real>::update_block(const FeatureRows<Real>& data, const LastLayerUpdateOptions& o, int first) {
  const Real* x = data.x;
  const int samples = data.count, rows = samples * o.passes;
  steps_.labels = data.labels;
  covariance_products(x, samples, u_);
  multiply_packed(device_, false, true, samples, samples, dim_, u_, x, steps_.gram);
  logits(x, samples, steps_.logits);
  sequential_steps(steps_, o.rule, o.gamma, o.passes, samples, classes_, 1, device_.stream());
  check_steps(device_, steps_, first);

  multiply_packed(device_, true, false, classes_, dim_, samples, steps_.step, u_, now_.w, 1, 1);
  multiply_packed(device_, false, false, rows, dim_, samples, steps_.downdate, u_,
                  now_.q + size_t(counts_.waiting_q) * dim_);
  for (int pass = 0; pass < o.passes; pass++)
    scale_rows(now_.x + size_t(counts_.waiting_x + pass * samples) * dim_, x, steps_.weight + pass * samples, samples,
               dim_, device_.stream());
  counts_.waiting_q += rows, counts_.waiting_x += rows, counts_.downdates += rows;
  settle();
}

template <class Real>
void LastLayer<Real>::update(const FeatureRows<Real>& data, const LastLayerUpdateOptions& o) {
  BATON_RANGE("last_layer_update");
  const std::vector<uint64_t> hashes = check_update(data, o);
  // A pass of the authors' rule goes over all of the new samples, so with several passes all must be one block.
  const int block = block_rows / o.passes;
  if (o.passes > 1 && data.count > block)
    throw InputError("an update of " + std::to_string(o.passes) + " passes takes at most " + std::to_string(block) +
                     " samples, not " + std::to_string(data.count));
  const auto update_all = [&] {
    for (int first = 0; first < data.count; first += block)
      update_block(data.part(first, std::min(block, data.count - first)), o, first);
  };
  // A block that throws has changed nothing, so only blocks after the first need the way back.
  if (data.count > block) all_or_nothing(update_all);
  else update_all();
  seen_.insert(hashes.begin(), hashes.end());
  counts_.absorbed += data.count;
}

template <class Real>
void LastLayer<Real>::update_one_by_one(const FeatureRows<Real>& data, const LastLayerUpdateOptions& o) {
  BATON_RANGE("last_layer_update_one_by_one");
  const std::vector<uint64_t> hashes = check_update(data, o);
  const Stream stream = device_.stream();
  all_or_nothing([&] {
    fold();
    for (int i = 0; i < data.count * o.passes; i++) {
      const int sample = i % data.count;
      const Real* x = data.x + size_t(sample) * dim_;
      steps_.labels = data.labels + sample;
      Real *product = u_, *downdate = products_;
      row_dots(product, Real(1), now_.s, dim_, x, 0, Real(0), dim_, dim_, stream);
      row_dots(steps_.gram, Real(1), product, 0, x, 0, Real(0), 1, dim_, stream);
      row_dots(steps_.logits, Real(1), now_.w, dim_, x, 0, Real(0), classes_, dim_, stream);
      sequential_steps(steps_, o.rule, o.gamma, 1, 1, classes_, 1, stream);
      check_steps(device_, steps_, sample);
      multiply_packed(device_, false, false, 1, dim_, 1, steps_.downdate, product, downdate);
      add_outer(now_.s, Real(-1), downdate, downdate, dim_, dim_, stream);
      add_outer(now_.w, Real(1), steps_.step, product, classes_, dim_, stream);
      scale_rows(now_.x + size_t(counts_.waiting_x) * dim_, x, steps_.weight, 1, dim_, stream);
      counts_.waiting_x++, counts_.downdates++;
      settle();
    }
  });
  seen_.insert(hashes.begin(), hashes.end());
  counts_.absorbed += data.count;
}

template <class Real>
void LastLayer<Real>::update_first_order(const FeatureRows<Real>& data, double gamma) {
  BATON_RANGE("last_layer_update_first_order");
  check_gamma(gamma);
  check_update(data, {.duplicates = true});  // no sample is counted
  const size_t bytes = sizeof(Real) * classes_ * dim_;
  copy_on_device(device_, kept_.w, now_.w, bytes);
  Real* r = steps_.logits;
  for (int i = 0; i < data.count; i++) {
    const Real* x = data.x + size_t(i) * dim_;
    logits(x, 1, r);
    softmax_residual<Real>(nullptr, r, nullptr, nullptr, r, data.labels + i, 1, classes_, device_.stream());
    add_outer(now_.w, Real(gamma), r, x, classes_, dim_, device_.stream());
  }
  if (!all_finite(weights())) {
    copy_on_device(device_, now_.w, kept_.w, bytes);
    throw InputError("a first-order update with gamma = " + format_number(gamma) + " diverged: lower gamma");
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
  put("weights", now_.w, classes_, dim_);
  put("precision", now_.p, dim_, dim_);
  put("covariance", now_.s, dim_, dim_);
  put("waiting_downdates", now_.q, counts_.waiting_q, dim_);
  put("waiting_samples", now_.x, counts_.waiting_x, dim_);
  std::vector<uint64_t> seen(seen_.begin(), seen_.end());
  std::sort(seen.begin(), seen.end());
  file.tensors["seen"] = Tensor::of<uint64_t>(std::span<const uint64_t>(seen), {int64_t(seen.size())});
  const json settings = {{"tau", options_.tau},
                         {"weight", to_string(options_.weight)},
                         {"refactor_after", options_.refactor_after},
                         {"downdates", counts_.downdates},
                         {"refactored", counts_.refactored},
                         {"absorbed", counts_.absorbed}};
  file.metadata = {{"format", "baton.last_layer"}, {"version", "1"}, {"settings", settings.dump()}};
  save_safetensors(path, file);
}

template <class Real>
std::unique_ptr<LastLayer<Real>> LastLayer<Real>::load(Device& device, const std::filesystem::path& path) {
  TensorFile file = load_safetensors(path);
  const auto refuse = [&](const std::string& why) { throw InputError(path.string() + ": " + why); };
  const std::string format = file.metadata["format"], version = file.metadata["version"];  // "" where it has none
  if (format != "baton.last_layer" || version != "1")
    refuse("not a last layer of version 1 (format '" + format + "', version '" + version + "')");
  const json settings = json::parse(file.metadata["settings"], nullptr, false);
  LastLayerOptions options;
  Counts counts;
  try {
    options.tau = settings.at("tau");
    options.weight = parse_name<SampleWeight>(settings.at("weight"));
    options.refactor_after = settings.at("refactor_after");
    counts.downdates = settings.at("downdates");
    counts.refactored = settings.at("refactored");
    counts.absorbed = settings.at("absorbed");
  } catch (const json::exception&) {
    refuse("its settings are damaged");
  }
  const Tensor& w = file.at("weights");
  if (w.dtype != safetensors_dtype<Real>()) refuse("a last layer in " + w.dtype + ", asked for in " + real_name);
  if (w.shape.size() != 2 || w.shape[0] > 1500 || w.shape[1] > 32768) refuse("weights of shape " + shape_text(w.shape));
  const int64_t c = w.shape[0], d = w.shape[1];
  file.at("precision", {d, d}), file.at("covariance", {d, d});  // before memory for them is taken
  auto layer = std::make_unique<LastLayer>(device, int(d), int(c), options);
  const auto read = [&](const char* name, Real* to, int64_t rows) {
    const std::vector<Real> v = file.at(name, {rows, d}).as<Real>();
    if (!all_finite(v)) refuse(std::string("tensor '") + name + "' is not finite");
    upload(device, to, v);
  };
  const auto read_waiting = [&](const char* name, Real* to) {
    const std::vector<int64_t>& shape = file.at(name).shape;
    if (shape.size() != 2 || shape[0] > block_rows)
      refuse(std::string("tensor '") + name + "' of shape " + shape_text(shape));
    read(name, to, shape[0]);
    return int(shape[0]);
  };
  const Posterior& now = layer->now_;
  read("weights", now.w, c);
  read("precision", now.p, d);
  read("covariance", now.s, d);
  counts.waiting_q = read_waiting("waiting_downdates", now.q);
  counts.waiting_x = read_waiting("waiting_samples", now.x);
  layer->counts_ = counts;
  const std::vector<uint64_t> seen = file.at("seen").as<uint64_t>();
  layer->seen_.insert(seen.begin(), seen.end());
  if (const double off = layer->drift(); !(off <= 10 * most_drift))
    refuse("its covariance is not the inverse of its precision (off by " + format_number(off) + ")");
  return layer;
}

template class LastLayer<float>;
template class LastLayer<double>;

}  // namespace baton
