#include "trainers/predictor.h"

#include <algorithm>

namespace baton {

namespace {
#if defined(BATON_CUDA)
constexpr int draws_at_once = 10, images_at_once = 500;  // fills the chip
#else
constexpr int draws_at_once = 1, images_at_once = 128;  // stays in the cache
#endif
}  // namespace

Predictor::Predictor(Device& device, Arena& arena, const NetworkFactory& make, const DeviceImages& set, int at_once,
                     int batch)
    : device_(device), set_(set), at_once_(at_once ? at_once : draws_at_once), single_(make()) {
  batch_ = std::min(set.count, batch ? batch : images_at_once);
  batches_ = (set.count + batch_ - 1) / batch_;
  single_->prepare({device, arena, 1, batch_, false, false}, true);
  if (at_once_ > 1) {
    many_ = make();
    many_->prepare({device, arena, at_once_, batch_, false, false}, true);
  }
  const int classes = single_->classes(), padded = batches_ * batch_;
  std::vector<int32_t> index(padded);  // the last batch is filled up with the last image, and its results are dropped
  for (int i = 0; i < padded; i++) index[i] = std::min(i, set.count - 1);
  index_ = arena.take<int32_t>(padded);
  upload(device, index_, index);
  labels_ = arena.take<int32_t>(batch_);
  weights_ = arena.take<float>(single_->layout().stride() * at_once_);
  sums_ = arena.take<float>(size_t(padded) * classes);
  entropies_ = arena.take<float>(padded);
  information_ = arena.take<float>(padded);
}

void Predictor::accumulate(Network& network, WeightsView weights, int draws) {
  const int classes = network.classes();
  for (int b = 0; b < batches_; b++) {
    gather_indexed(network.input().signal.value, nullptr, labels_, set_, index_ + size_t(b) * batch_, batch_,
                   device_.stream());
    network.forward(device_, weights, nullptr);
    accumulate_predictions(sums_ + size_t(b) * batch_ * classes, entropies_ + size_t(b) * batch_, network.logits(),
                           draws, batch_, classes, device_.stream());
  }
}

Predictions Predictor::predict(Posterior& posterior, int replica, int samples, uint64_t seed) {
  BATON_RANGE("predict");
  const int classes = single_->classes(), padded = batches_ * batch_;
  const size_t stride = posterior.store().layout().stride();
  fill_zero(device_, sums_, size_t(padded) * classes * sizeof(float));
  fill_zero(device_, entropies_, size_t(padded) * sizeof(float));
  const bool at_mean = samples == 0 || posterior.family() == Family::point;
  if (at_mean) {
    posterior.mean_weights(weights_, replica);
    accumulate(*single_, {weights_, nullptr, stride}, 1);
  } else {
    const Key key = key_of(seed, 7);
    for (int first = 0; first < samples;) {
      const int draws = samples - first >= at_once_ ? at_once_ : 1;
      posterior.sample(weights_, replica, first, draws, key);
      accumulate(draws > 1 ? *many_ : *single_, {weights_, nullptr, stride}, draws);
      first += draws;
    }
  }
  finish_predictions(sums_, entropies_, information_, sums_, entropies_, at_mean ? 1 : samples, padded, classes,
                     device_.stream());
  return {download(device_, sums_, size_t(set_.count) * classes), download(device_, entropies_, set_.count),
          download(device_, information_, set_.count)};
}

}  // namespace baton
