// What the commands say of models, of data and of how they predict, and what a model believes about its weights.
#pragma once
#include <string>
#include <vector>

#include "tools/baton/command.h"

namespace baton {

// {"architecture", "kind", "uncertain", "stages", "fingerprint"} and {"format", "images", "labelled", "hash"}.
json describe_model(const Model&);
json describe_data(const OwnData&);
std::vector<std::string> list_classes(const Model&);  // the names of the outputs
std::string in_words(std::string key);                // "flow steps" of "flow_steps"
std::string describe_posterior(const Model&);         // its kind, and the options that shape it
// What an image goes through before the network.
std::string describe_normalisation(const Model&);
json normalisation_json(const Model&);

// Of describe_model(): "lenet5, 28 x 28 grey images, 10 classes; ffg, 2 stages learned (fingerprint ...)".
std::string model_text(const json& model);
// Of describe_data(): "10,000 images (IDX)".
std::string data_text(const json& data);
// Of a result with "model" and what PredictionArguments::describe() sets: which model predicts, and how. Two lines.
std::string how_text(const json& result);
// Whether draws of the weights differed: otherwise what they tell is 0 and means nothing.
bool has_epistemic(const json& result);

// {"accuracy", "nll", "ece"} of predictions of labelled images.
json judge(const Predictions&, const Images&, int classes);
double mean(const std::vector<float>&);
// The most probable class of each image, the first of equals.
std::vector<int> choose_classes(const Predictions&, int classes);

// One tensor of a posterior, on the host.
struct Belief {
  TensorSpec tensor;
  std::vector<float> mean;      // of the weight itself: under mnf z times the mean, z at its flow's mean
  std::vector<float> log_std;   // ln sigma; under cfg of the marginal, under mnf of w given z; empty: a point estimate
  std::vector<uint8_t> pruned;  // empty: nothing is
  bool gone(size_t i) const { return !pruned.empty() && pruned[i]; }
};
// Of all tensors, in the layout's order.
std::vector<Belief> read_beliefs(Device&, Posterior&);

std::string layer_name(const std::string& tensor);  // "conv1" of "conv1.weight" and "conv1.z"
std::vector<std::string> list_layers(const ParameterLayout&);
// Of a result's "layers" and "all_layers", the rows of a table: the layers, and "all".
json list_sums(const json& result);

}  // namespace baton
