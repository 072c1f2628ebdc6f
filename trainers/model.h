// A model as people keep it: a network of one of the fixed architectures, what is believed about its weights, and where
// that came from. One safetensors file, which Python reads too: the posterior and its prior as "conv1.weight.mean",
// ".log_std", ".prior_mean", ".prior_log_std" and the family's own arrays, ".mask" where weights are pruned; in the
// metadata the architecture, the family, the normalisation of images, the settings of the next update, the step count
// of the noise, and every stage so far with the hash of its images.
#pragma once
#include <filesystem>
#include <memory>

#include "engine/io/own_data.h"
#include "engine/io/runlog.h"
#include "engine/io/safetensors.h"
#include "trainers/incremental.h"

namespace baton {

struct Architecture {
  std::string name;  // lenet5, 3conv3fc, vgg11, mlp
  int classes = 10;
  int channels = 1, height = 28, width = 28;  // of an image
  std::vector<int> hidden;                    // mlp: the widths of its hidden layers

  // InputError for an unknown name, or sizes that the architecture does not take: they name what it does take.
  NetworkFactory network() const;
  std::string description() const;  // "lenet5, 28 x 28 grey images, 10 classes"
};
// The named architecture with its own image size (mlp: 28 x 28 grey images and hidden 400, 400).
Architecture architecture_of(const std::string& name);
// The architecture whose tensors these are, by their names and shapes: classes and an mlp's widths are read off.
// InputError that says which tensor fits none.
Architecture recognise(const TensorFile& weights);

// What an update moves the posterior by: Adam on the evidence bound (Kochurov et al.), or Bayesian gradient descent
// (Zeno et al.; ffg), whose every step is its own small update.
enum class Rule { bound, descent };
Rule rule_of(const std::string& name);  // "elbo", "bgd"; InputError
const char* name_of(Rule);

struct Model {
  Architecture architecture;
  PosteriorOptions posterior;
  Normalisation normalisation = unit_range;
  std::vector<std::string> class_names;  // of the outputs; empty: numbers
  // Of the next update, where it says nothing else:
  Rule rule = Rule::bound;
  TrainingSettings training;  // lr: under Rule::descent eta
  ScaleRule scale_rule = ScaleRule::adam;
  int draws = 10;  // Rule::descent: K, of the weights, a step
  int batch = 100;
  double epochs = 10;
  uint64_t seed = 0;
  uint32_t step = 0;             // of all stages: what the noise is counted by
  json origin = json::object();  // how it began: architecture, prior, pretrained file
  // A stage: {"stage", "images", "data" (content_hash), "format", "epochs", "steps", "batch", "settings", "loss",
  // "accuracy", "kl", "kl_by_layer", "parent"}; no clock time, so that two runs leave the same file.
  json history = json::array();
  json pruned = json();  // {"fraction", "by", ...}; null: nothing is
  TensorFile arrays;     // Posterior::save

  int stages() const { return int(history.size()); }
  // The stage that learned these images, 1-based; 0: none did.
  int learned(uint64_t content) const;
  std::string class_name(int c) const { return c < int(class_names.size()) ? class_names[c] : std::to_string(c); }
};

// InputError, naming the file and the reason: no Baton model (with a word on what it is instead: a plain network's
// weights, the checkpoint of an unfinished update), a newer version, another architecture's tensors, values that are
// not finite.
Model load_model(const std::filesystem::path&);
// Written beside and renamed; the same model is the same bytes.
void save_model(const std::filesystem::path&, const Model&);

// FNV-1a of everything that save_model() writes: which model another one came from.
std::string fingerprint(const Model&);

// The posterior, on the device.
std::unique_ptr<Posterior> posterior_of(Device&, Arena&, const Model&);
// The other way: takes the arrays from a posterior with model.posterior's options.
void keep(Model&, const Posterior&);

// What a model begins with.
struct Beginning {
  std::shared_ptr<const Pretrained> pretrained;  // null: N(0, training.prior_sd^2)
  double pretrained_sd = 0.1;                    // of a pretrained tensor's prior where no Laplace says otherwise
};
// Draws the means of what is not pretrained, and fills model.arrays.
void initialise(Device&, Model&, const Beginning&);

// Options for reading images for this model.
OwnDataOptions data_options(const Model&);
// The images' labels and classes fit the model's: InputError otherwise. A model without class names takes the data's
// when it has learned nothing yet.
void check_classes(const Model&, const OwnData&);

// Weights of `model`, at the posterior mean, as a plain network's: "conv1.weight" in PyTorch's layout.
TensorFile mean_network(Device&, const Model&);

// The settings of updates as the file and the history have them.
json training_json(const Model&);

}  // namespace baton
