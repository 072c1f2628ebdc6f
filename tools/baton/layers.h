// What a model believes about its weights, on the host, and the words for it: what the commands share that look into a
// model.
#pragma once
#include <string>
#include <vector>

#include "tools/baton/command.h"

namespace baton {

// One tensor of a posterior.
struct Belief {
  TensorSpec tensor;
  std::vector<float> mean;      // of the weight itself: under mnf z times the mean, z at its flow's mean
  std::vector<float> log_std;   // ln sigma; under cfg of the marginal, under mnf of w given z; empty for ft
  std::vector<uint8_t> pruned;  // empty: nothing is
  bool gone(size_t i) const { return !pruned.empty() && pruned[i]; }
};
// Of all tensors, in the layout's order.
std::vector<Belief> beliefs_of(Device&, Posterior&);
// Which weights `mask` tensors name as pruned; empty where the posterior has none.
std::vector<uint8_t> pruned_of(Device&, const Posterior&, const TensorSpec&);

std::string layer_of(const std::string& tensor);  // "conv1" of "conv1.weight" and "conv1.z"
std::vector<std::string> layers_of(const ParameterLayout&);

// The families and their options, in words; what an image goes through before the network.
std::string in_words(const PosteriorOptions&);
std::string in_words(const Normalisation&, int channels);
json to_json(const Normalisation&, int channels);

// Of an object that somebody's file holds: what is absent or of another type is NaN, or empty.
double number_in(const json& object, const std::string& key);
std::string text_in(const json& object, const std::string& key);

std::string brief(double value);                 // three digits: "0.0123", "1.2e-05"; "-" for a NaN
std::string counted(double value);               // "1,234,567"; "-" for a NaN
std::string plural(int64_t n, const char* one);  // "1 stage", "1,200 stages"

// Of description_of(model): "lenet5, 28 x 28 grey images, 10 classes; ffg, 2 stages learned (fingerprint ...)".
std::string model_text(const json& model);

// {"accuracy", "nll", "ece"} of predictions of labelled images.
json judged(const Predictions&, const Images&, int classes);

}  // namespace baton
