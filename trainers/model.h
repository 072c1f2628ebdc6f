// A model as people keep it: a network, what is believed about its weights, and where that came from. One safetensors
// file, which Python reads too: the posterior and its prior as "conv1.weight.mean", ".log_std", ".prior_mean",
// ".prior_log_std" and the kind's own arrays, ".mask" where weights are pruned; in the metadata the network, the kind
// of posterior, the normalisation of images, the precision of products (where it is absent: fp32), the settings of the
// next update, the step count of the noise, and every stage so far with the hash of its images. What paper programs
// save, `baton` reads, and the other way round.
#pragma once
#include <filesystem>
#include <memory>

#include "engine/io/own_data.h"
#include "trainers/trainer.h"

namespace baton {

struct Model {
  NetworkSpec network;
  std::string kind = "ffg";  // of the posterior
  bool masked = false;       // weights are pruned
  Normalisation normalisation = unit_range;
  Precision precision = Precision::fp32;  // that it was trained with; what uses the model sets it on the device
  std::vector<std::string> class_names;   // of the outputs; empty: numbers
  // Of the next update, where it says nothing else. rule: "elbo", as the kind itself learns, or "bgd", by Bayesian
  // gradient descent (kind ffg).
  std::string rule = "elbo";
  json settings = json::object();  // of the kind, all of them; lr: under rule bgd its eta
  int draws = 10;                  // rule bgd: K, of the weights, a step
  int batch = 100;
  double epochs = 10;
  uint64_t seed = 0;
  uint32_t step = 0;             // of all stages: what the noise is counted by
  json origin = json::object();  // how it began: network, prior, pretrained file
  // A stage: {"stage", "images", "data" (content_hash), "format", "epochs", "steps", "batch", "settings", "loss",
  // "accuracy", "kl", "kl_by_layer", "parent"}; no clock time, so that two runs leave the same file.
  json history = json::array();
  json pruned = json();  // {"fraction", "by", ...}; null: nothing is
  TensorFile arrays;     // Posterior::save

  int stages() const { return int(history.size()); }
  bool uncertain() const;  // false: a point estimate
  // The stage that learned these images, 1-based; 0: none did.
  int find_stage(uint64_t content) const;
  std::string class_name(int c) const { return c < int(class_names.size()) ? class_names[c] : std::to_string(c); }
};

// A model of this kind with its standard settings, no arrays yet. InputError for an unknown kind.
Model new_model(const NetworkSpec&, const std::string& kind);

// A model with its posterior on the device.
struct LoadedModel {
  Model model;
  std::unique_ptr<Posterior> posterior;
};
// InputError, naming the file and the reason: no Baton model (with a word on what it is instead: a plain network's
// weights, the checkpoint of an unfinished update), a newer version, another network's tensors, values that are not
// finite. Files of the version before (baton-model-1) are read too.
LoadedModel load_model(Device&, Arena&, const std::filesystem::path&);
// The model alone, without its posterior on a device: its tensors are not checked for values.
Model read_model(const std::filesystem::path&);
// Written beside and renamed; the same model is the same bytes.
void save_model(const std::filesystem::path&, const Model&);

// FNV-1a of everything that save_model() writes: which model another one came from.
std::string fingerprint(const Model&);

// The posterior, on the device.
std::unique_ptr<Posterior> make_posterior(Device&, Arena&, const Model&);
// The other way: takes the arrays from a posterior of the model's kind.
void keep(Model&, const Posterior&);

// Draws the means of what is not pretrained (null: of everything), and fills model.arrays. sd: of a pretrained tensor's
// prior where no Laplace approximation says otherwise.
void initialise(Device&, Model&, const Pretrained* pretrained = nullptr, double sd = 0.1);

// Options for reading images for this model.
OwnDataOptions data_options(const Model&);
// The images' labels and classes fit the model's: InputError otherwise. A model without class names takes the data's
// when it has learned nothing yet.
void check_classes(const Model&, const OwnData&);

// Weights at the posterior mean, as a plain network's: "conv1.weight" in PyTorch's layout.
TensorFile mean_network(Device&, Posterior&);

// The settings of updates as the file and the history have them.
json training_json(const Model&);

}  // namespace baton
