// Predictions of a whole set: the softmax averaged over draws of the weights, or at the posterior mean.
#pragma once
#include <optional>

#include "kernels/batch.h"
#include "kernels/predictive.h"
#include "layers/networks.h"
#include "layers/posteriors/posterior.h"

namespace baton {

struct Predictions {
  std::vector<float> probability;         // [images][classes]
  std::vector<float> entropy;             // [images], of the averaged prediction, nats
  std::vector<float> mutual_information;  // [images], nats; 0 at the mean
  std::vector<float> aleatoric_variance;  // [images], kernels/predictive.h
  std::vector<float> epistemic_variance;  // [images]; 0 at the mean
  std::vector<uint8_t> chosen;            // [draws][images]: the class that each draw chooses, where asked for
};

class Predictor {
 public:
  // For one set on the device. at_once: draws of the weights that run side by side as replicas (0: what suits the
  // device); batch: images at a time. Results do not depend on either.
  Predictor(Device&, Arena&, const NetworkFactory&, const DeviceImages&, int at_once = 0, int batch = 0);

  // samples = 0, or a point estimate: one pass at the mean. Otherwise the average over `samples` draws (Kochurov et
  // al.: 100), each draw of all weights serving the whole set. seed: of the draws. choices: fill Predictions::chosen.
  // Throws Stopped when a signal asks the program to end (engine/io/stop.h).
  Predictions predict(Posterior&, int replica, int samples, uint64_t seed, bool choices = false);
  int images() const { return set_.count; }
  // What the next predictions see: an output layer of the network, and an order of the pixels ([channels * plane] in
  // device memory; null: as they are).
  void look_as(int head, const int32_t* pixel_order);

 private:
  void accumulate(Network&, int draws, uint8_t* chosen);
  Device& device_;
  DeviceImages set_;
  int at_once_, batch_, batches_;
  std::unique_ptr<Network> single_, many_;
  int32_t* index_;
  int32_t* labels_;
  const int32_t* pixel_order_ = nullptr;
  uint8_t* chosen_;  // [draws at once][images, padded]
  float *weights_ = nullptr, *sums_, *entropies_, *information_;
  std::optional<PointWeights> source_;  // of both networks
};

}  // namespace baton
