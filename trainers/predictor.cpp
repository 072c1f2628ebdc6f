#include "trainers/predictor.h"

#include <algorithm>

#include "engine/io/stop.h"

namespace baton {

namespace {
// A GPU is filled; on a CPU a draw stays in the cache.
int draws_at_once() { return on_gpu ? 10 : 1; }
int images_at_once() { return on_gpu ? 500 : 128; }

void stop_if_asked() {
  if (stop_requested()) throw_stopped("a prediction was under way");
}
}  // namespace

Predictor::Predictor(Device& device, Arena& arena, const NetworkFactory& make, const DeviceImages& set, int at_once,
                     int batch)
    : device_(device), set_(set), at_once_(at_once ? at_once : draws_at_once()), single_(make()) {
  batch_ = std::min(set.count, batch ? batch : images_at_once());
  batches_ = (set.count + batch_ - 1) / batch_;
  weights_ = arena.take<float>(single_->layout().stride() * at_once_);
  source_.emplace(weights_, single_->layout().stride());
  single_->prepare({device, arena, *source_, 1, batch_, false, true});
  if (at_once_ > 1) {
    many_ = make();
    many_->prepare({device, arena, *source_, at_once_, batch_, false, true});
  }
  const int classes = single_->classes(), padded = batches_ * batch_;
  std::vector<int32_t> index(padded);  // the last batch is filled up with the last image, and its results are dropped
  for (int i = 0; i < padded; i++) index[i] = std::min(i, set.count - 1);
  index_ = arena.take<int32_t>(padded);
  upload(device, index_, index);
  labels_ = arena.take<int32_t>(batch_);
  chosen_ = arena.take<uint8_t>(size_t(padded) * at_once_);
  sums_ = arena.take<float>(size_t(padded) * classes);
  entropies_ = arena.take<float>(size_t(padded) * 2);    // sums over the draws: of entropies, then of squares
  information_ = arena.take<float>(size_t(padded) * 4);  // entropy, mutual information, aleatoric, epistemic variance
}

void Predictor::look_as(int head, const int32_t* pixel_order) {
  single_->use_head(head);
  if (many_) many_->use_head(head);
  pixel_order_ = pixel_order;
}

void Predictor::accumulate(Network& network, int draws, uint8_t* chosen) {
  const int classes = network.classes(), padded = batches_ * batch_;
  for (int b = 0; b < batches_; b++) {
    stop_if_asked();
    gather_indexed(network.input().signal.value, nullptr, labels_, set_, index_ + size_t(b) * batch_, batch_,
                   device_.stream(), pixel_order_);
    network.forward({});
    float* entropies = entropies_ + size_t(b) * batch_;
    accumulate_predictions(sums_ + size_t(b) * batch_ * classes, entropies, network.logits(), draws, batch_, classes,
                           device_.stream(), entropies + padded);
    if (chosen)
      choose_classes(chosen + size_t(b) * batch_, padded, network.logits(), draws, batch_, classes, device_.stream());
  }
}

Predictions Predictor::predict(Posterior& posterior, int replica, int samples, uint64_t seed, bool choices) {
  BATON_RANGE("predict");
  const int classes = single_->classes(), padded = batches_ * batch_;
  if (!posterior.uncertain()) samples = 0;
  fill_zero(device_, sums_, size_t(padded) * classes * sizeof(float));
  fill_zero(device_, entropies_, size_t(padded) * 2 * sizeof(float));
  Predictions p;
  const auto pass = [&](int draws) {
    accumulate(draws > 1 ? *many_ : *single_, draws, choices ? chosen_ : nullptr);
    for (int k = 0; choices && k < draws; k++) {
      const std::vector<uint8_t> row = download(device_, chosen_ + size_t(padded) * k, set_.count);
      p.chosen.insert(p.chosen.end(), row.begin(), row.end());
    }
  };
  if (samples == 0) {
    posterior.mean_weights(weights_, replica);
    pass(1);
  } else {
    const Key key = key_of(seed, 7);
    for (int first = 0, draws; first < samples; first += draws) {
      stop_if_asked();
      draws = samples - first >= at_once_ ? at_once_ : 1;
      posterior.sample(weights_, replica, first, draws, key);
      pass(draws);
    }
  }
  float* variances = information_ + size_t(padded) * 2;
  finish_predictions(sums_, information_, information_ + padded, sums_, entropies_, std::max(samples, 1), padded,
                     classes, device_.stream(), variances, entropies_ + padded);
  p.probability = download(device_, sums_, size_t(set_.count) * classes);
  p.entropy = download(device_, information_, set_.count);
  p.mutual_information = download(device_, information_ + padded, set_.count);
  p.aleatoric_variance = download(device_, variances, set_.count);
  p.epistemic_variance = download(device_, variances + padded, set_.count);
  return p;
}

}  // namespace baton
