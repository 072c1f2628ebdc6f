// How a last layer absorbs new samples.
#include <algorithm>
#include <cmath>

#include "trainers/last_layer/last_layer.h"

namespace baton {

constexpr double most_gamma = 1e6;  // far beyond use; keeps a step finite

template <class Real>
std::vector<uint64_t> LastLayer<Real>::check_update(const FeatureRows<Real>& data, const LastLayerUpdateOptions& o) {
  const std::vector<uint64_t> hashes = check_features(device_, data, dim_);
  if (data.count < 1) throw InputError("an update with no samples");
  if (o.passes < 1 || o.passes > block_rows)
    throw InputError("1 to " + std::to_string(block_rows) + " passes, not " + std::to_string(o.passes));
  if (o.rule != UpdateRule::implicit) check_gamma(o.gamma, most_gamma);
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
  multiply(device_, false, true, samples, samples, dim_, Real(1), u_, dim_, x, dim_, Real(0), steps_.gram, samples);
  logits(x, samples, steps_.logits);
  sequential_steps(steps_, o.rule, o.gamma, o.passes, samples, classes_, 1, device_.stream());
  check_steps(device_, steps_, first);

  multiply(device_, true, false, classes_, dim_, samples, Real(1), steps_.step, classes_, u_, dim_, Real(1), now_.w,
           dim_);
  multiply(device_, false, false, rows, dim_, samples, Real(1), steps_.downdate, samples, u_, dim_, Real(0),
           now_.q + size_t(counts_.waiting_q) * dim_, dim_);
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
      multiply(device_, false, false, 1, dim_, 1, Real(1), steps_.downdate, 1, product, dim_, Real(0), downdate, dim_);
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
  for (double w : weights())
    if (!std::isfinite(w)) {
      copy_on_device(device_, now_.w, kept_.w, bytes);
      throw InputError("a first-order update with gamma = " + shown(gamma) + " diverged: lower gamma");
    }
}

#define BATON_LAST_LAYER_UPDATES(Real)                                                                       \
  template void LastLayer<Real>::update(const FeatureRows<Real>&, const LastLayerUpdateOptions&);            \
  template void LastLayer<Real>::update_one_by_one(const FeatureRows<Real>&, const LastLayerUpdateOptions&); \
  template void LastLayer<Real>::update_first_order(const FeatureRows<Real>&, double);
BATON_LAST_LAYER_UPDATES(float)
BATON_LAST_LAYER_UPDATES(double)

}  // namespace baton
