// What the tests of posteriors share: kinds with settings, networks so small that every gradient can be checked, and a
// look at the weights that an estimator holds.
#pragma once
#include "layers/networks.h"
#include "layers/posteriors/posterior.h"
#include "tests/support/small_network.h"

namespace baton::test {

// 2x8x8  conv1 3x3, 3, ReLU, max 2x2/2 -> 3x3x3  conv2 3x3 p1, 2, ReLU -> 2x3x3  fc1 5, ReLU  fc2 4
class TinyNetwork : public Network {
 public:
  TinyNetwork()
      : Network("tiny", {2, 8, 8}, 4),
        conv1(add_convolution("conv1", 3, 3, 0, Pooling::max2)),
        conv2(add_convolution("conv2", 2, 3, 1, Pooling::none)),
        fc1(add_dense("fc1", 5)),
        fc2(add_head("fc2")) {}
  Conv2d &conv1, &conv2;
  Dense &fc1, &fc2;
};

// 3x8x8  c1 3x3 p1, 4, ReLU -> 4x8x8  c2 3x3, 6, ReLU, max 2x2/2 -> 6x3x3  fc 16, ReLU  two heads of 5
class HeadsNetwork : public Network {
 public:
  HeadsNetwork() : Network("two heads", {3, 8, 8}, 5) {
    add_convolution("c1", 4, 3, 1, Pooling::none);
    add_convolution("c2", 6, 3, 0, Pooling::max2);
    add_dense("fc", 16);
    for (int i = 0; i < 2; i++) add_head("last." + std::to_string(i));
  }
};

inline NetworkFactory perceptron(int in, const std::vector<int>& hidden, int classes) {
  return network_factory({"mlp", classes, {1, 1, in}, {{"hidden", hidden}}});
}
inline std::unique_ptr<Network> convolutional_heads() { return std::make_unique<HeadsNetwork>(); }

// A kind of posterior with settings that differ from the standard.
struct Kind {
  std::string name;
  json settings = json::object();
};
inline Kind cfg(int groups = 1) { return {"cfg", {{"groups", groups}}}; }
inline Kind mnf(const char* flow, bool z_per_filter, int groups = 1) {
  return {"mnf",
          {{"flow", flow},
           {"flow_steps", 2},
           {"flow_hidden", 3},
           {"z", z_per_filter ? "per-filter" : "per-channel"},
           {"groups", groups}}};
}
// z is as wide as its base, around 1.
inline Kind without_flow(bool z_per_filter, double z_log_std) {
  Kind kind = mnf("realnvp", z_per_filter);
  kind.settings["flow_steps"] = 0, kind.settings["z_log_std"] = z_log_std;
  return kind;
}

// The weights that the product of a layer is made with under a posterior, and where their gradients go: the draws of a
// step, where the posterior makes any. An estimator does not show them; a derived class may name them.
inline RowWeights product_weights(Posterior& posterior, Linear& layer, const LayerContext& context) {
  struct Points : PointEstimator {
    static RowWeights look(const PointEstimator& e) { return e.*(&Points::w_); }
  };
  struct Means : LocalReparameterization {
    static RowWeights look(const LocalReparameterization& e) { return e.*(&Means::means_); }
  };
  const std::unique_ptr<Estimator> estimator = posterior.make_estimator(layer, context);
  if (const auto* points = dynamic_cast<const PointEstimator*>(estimator.get())) return Points::look(*points);
  return Means::look(dynamic_cast<const LocalReparameterization&>(*estimator));
}

inline bool begins_with(const std::string& text, const std::string& start) {
  return !start.empty() && text.compare(0, start.size(), start) == 0;
}
inline bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

}  // namespace baton::test
