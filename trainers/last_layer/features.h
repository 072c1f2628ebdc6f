// Features for a last layer: what a network's last hidden layer makes of images, or matrices from files.
#pragma once
#include <filesystem>

#include "trainers/laplace.h"
#include "trainers/last_layer/last_layer.h"

namespace baton {

// A matrix of features with labels, on the host.
struct FeatureSet {
  int count = 0, dim = 0, classes = 0;
  std::vector<float> x;         // [count][dim]
  std::vector<int32_t> labels;  // [count]; empty where there are none
  std::string source;           // what made them, for results
};

// The input of the network's output layer for every image: its last hidden layer at these weights (of a point
// posterior, or the mean of another). weights: a value for each of its tensors (InputError else), as layers name them.
// This and fourier_features() throw Stopped when a signal asks the program to end.
FeatureSet extract_features(Device&, const NetworkFactory&, const NamedWeights& weights, const Images&,
                            const Normalisation&, int head = 0);
// The pixels themselves, normalised.
FeatureSet pixel_features(const Images&, const Normalisation&);
// Random Fourier features (Rahimi and Recht 2007) of other features: amplitude sqrt(2 / dim) cos(w . x + b), w ~ N(0, 1
// / length^2), b uniform in [0, 2 pi): what embeddings of a wider network are like where none are at hand.
FeatureSet fourier_features(const FeatureSet&, int dim, double length, uint64_t seed, double amplitude = 1);

// A .npy matrix [count, dim] (F64, F32, F16) or a tensor of a safetensors file ("FILE.safetensors:NAME"; the name may
// be left out where the file holds one tensor of rank 2), with labels from a .npy vector or a tensor of integers.
// classes is the largest label + 1. Throws InputError: another rank or dtype, lengths that disagree, negative labels,
// numbers that are not finite (naming row and column).
FeatureSet load_features(const std::string& features, const std::string& labels);

void append_bias(FeatureSet&);  // a constant feature of 1
FeatureSet rows_of(const FeatureSet&, const std::vector<int>& index);

// The rows in device memory, in another precision.
template <class Real>
FeatureRows<Real> upload_features(Device& device, Arena& arena, const FeatureSet& set) {
  const Real* x = place(device, arena, std::vector<Real>(set.x.begin(), set.x.end()));
  return {x, set.labels.empty() ? nullptr : place(device, arena, set.labels), set.count, set.dim};
}

}  // namespace baton
