// baton init: the first model, from nothing or from a network trained elsewhere.
#include <algorithm>
#include <cmath>
#include <optional>

#include "tools/baton/command.h"
#include "trainers/laplace.h"

namespace baton {

namespace {

std::string normal_text(const std::string& mean, double sd) {
  char digits[32];
  snprintf(digits, sizeof digits, "%g", sd);
  return "N(" + mean + ", " + digits + "^2)";
}

// What the searches of the paper programs found for incremental learning. For ft, ffg, cfg and mnf it takes the place
// of their standard settings.
json found_settings(bool colour) {
  return {{"lr", colour ? 1e-3 : 2e-3},     {"schedule", "linear"},  {"lr_scale", 1e-2},
          {"beta", colour ? 0.05 : 0.03},   {"path_gradient", true}, {"z_log_std", -3.5},
          {"init_log_std", std::log(0.018)}};
}

class Init : public Command {
 public:
  Init()
      : Command("init", "make a model, from nothing or from a network trained elsewhere",
                "  baton init --from lenet5.safetensors --pretrained-sd 0.05 --out model.safetensors\n"
                "      a network trained in PyTorch becomes Bayesian: prior N(w, 0.05^2) around its weights, kind ffg\n"
                "  baton init --from lenet5.safetensors --laplace --old-data mnist/ --old-data-images 0:30000 --out "
                "m.safetensors\n"
                "      the prior's width for every weight comes from a Laplace approximation on the old data\n"
                "  baton init --architecture 3conv3fc --classes 5 --kind mnf --mean 0.49,0.48,0.45 --std "
                "0.25,0.24,0.26 --out m.safetensors\n"
                "      an untrained network for colour images, with PyTorch's kind of normalisation") {}

  void add_options(CLI::App& app) override {
    add_out(app, "the model's file")->required();
    auto* network = app.add_option_group("Network");
    network->add_option("--architecture", architecture_, list_networks() + " (with --from: recognised)");
    network->add_option("--from", from_, "a PyTorch network's weights as safetensors (tools/from-pytorch)");
    network->add_option("--classes", classes_, "outputs (default: 10, or as in --from)");
    network->add_option("--class-names", class_names_, "their names, in order, separated by commas")->delimiter(',');
    network_.add_to(*network, network_options(), true);
    network->add_option("--image", image_, "mlp: CHANNELSxHEIGHTxWIDTH, as 1x28x28")->delimiter('x')->expected(3);
    network->add_option("--mean", mean_, "of each channel, subtracted from pixels in [0, 1], as in PyTorch's Normalize")
        ->delimiter(',');
    network->add_option("--std", std_, "of each channel; divides what --mean leaves")->delimiter(',');
    by_.add_to(*network, "images whose mean and standard deviation normalise all images", false);
    auto* belief = app.add_option_group("Posterior and prior");
    belief->option_defaults()->always_capture_default();
    const std::string kinds = CLI::detail::join(
        posterior_kinds(), [](const PosteriorKind* kind) { return kind->name; }, ", ");
    belief->add_option("--kind,--family", kind_, "of the posterior: " + kinds);
    belief->add_option("--pretrained-sd", pretrained_sd_, "prior N(w, sd^2) of pretrained weights w");
    belief->add_option("--transfer", transfer_, "which pretrained layers: all, all-but-last or conv; the rest is fresh")
        ->check(CLI::IsMember({"all", "all-but-last", "conv"}));
    belief->add_flag("--laplace", laplace_,
                     "prior N(w, 1 / precision) by a diagonal Laplace approximation on --old-data");
    old_.add_to(*belief, "with --laplace: the images that the pretrained network learned", false);
    belief->add_option("--curvature", curvature_, "with --laplace: ggn or empirical");
    belief->add_option("--tau", settings_.tau, "with --laplace: precision before any data");
    belief->add_option("--temperature", settings_.temperature, "with --laplace: divides the data's precision");
    // What only init decides, and the settings of updates.
    Schema first, later;
    for (Option option : posterior_options()) {
      if (found_settings(false).contains(option.name)) option.standard = nullptr;  // init takes another
      (decided_by_init(option) ? first : later).push_back(option);
    }
    posterior_.add_to(*belief, first, true);
    belief
        ->add_option("--init-sd", init_sd_,
                     "initial standard deviation of every weight, at most the prior's (default: 0.018)")
        ->excludes("--init-log-std");
    auto* training = app.add_option_group("Settings of later updates (each can be given to baton update too)");
    posterior_.add_to(*training, later, true);
    training->add_option("--epochs", epochs_, "passes over each part of the data");
    training->add_option("--batch", batch_, "images a step");
    training
        ->add_option("--precision", precision_,
                     "of the layers' products, in predictions too: fp32, or tf32 as tensor cores take them")
        ->capture_default_str();
    app.add_option("--seed", seed_, "of initial weights, orders and noise")->capture_default_str();
  }

  json run() override {
    check_free(out_, overwrite_);
    if (!from_.empty()) weights_ = load_safetensors(from_);
    model_ = new_model(choose_network(), kind_);
    model_.seed = seed_;
    model_.precision = parse_precision(precision_);
    choose_class_names();
    choose_normalisation();
    choose_settings();
    Device device;
    device.set_precision(model_.precision);
    std::optional<Pretrained> pretrained;
    if (!from_.empty()) pretrained = take_pretrained(device);
    else if (laplace_ || old_.given()) throw InputError("--laplace and --old-data need a network: --from");
    initialise(device, model_, pretrained ? &*pretrained : nullptr, pretrained_sd_);
    describe_origin();
    save_model(out_, model_);
    return {{"model", out_},
            {"architecture", model_.network.description()},
            {"kind", model_.kind},
            {"origin", model_.origin},
            {"parameters", make_network(model_.network)->layout().parameters()},
            {"fingerprint", fingerprint(model_)}};
  }

  std::string text(const json& j) const override {
    std::string text = fill(j,
                            "{model} is written: {architecture}; {parameters:,} weights and biases; posterior {kind}\n"
                            "prior: {origin/prior}\n");
    if (j["origin"].contains("fresh"))
      text += "fresh (not pretrained): " + std::to_string(j["origin"]["fresh"].size()) + " tensors\n";
    return text + fill(j, "next:  baton update --model {model} --data NEW --out NEXT.safetensors\n");
  }

 private:
  NetworkSpec choose_network() {
    NetworkSpec n;
    if (!from_.empty()) {
      const auto format = weights_.metadata.find("format");
      if (format != weights_.metadata.end() && format->second.rfind("baton-model-", 0) == 0)
        throw InputError(from_ + " is a model already: baton update goes on with it (baton export writes its mean)");
      TensorShapes shapes;
      for (const auto& [name, tensor] : weights_.tensors) shapes[name] = tensor.shape;
      n = recognise_network(shapes, from_);
      if (!architecture_.empty() && architecture_ != n.name)
        throw InputError(from_ + " is " + n.description() + ", not " + architecture_);
      if (classes_ && classes_ != n.classes && transfer_ == "all")
        throw InputError(fill({{"from", from_}, {"own", n.classes}, {"classes", classes_}},
                              "{from} has {own} classes; --classes {classes} needs --transfer all-but-last or conv"));
    } else {
      if (architecture_.empty()) throw InputError("--architecture or --from is needed");
      n = network_spec(architecture_);
    }
    if (!image_.empty()) {
      const int inputs = n.image.size();
      n.image = {image_[0], image_[1], image_[2]};
      check_network(n);
      if (!from_.empty() && n.image.size() != inputs)
        throw InputError("--image does not fit the " + std::to_string(inputs) + " inputs of " + from_);
    }
    trained_ = n;
    n.options.update(network_.given());
    if (classes_) n.classes = classes_;
    else if (!class_names_.empty() && from_.empty()) n.classes = int(class_names_.size());
    check_network(n);
    return n;
  }

  void choose_class_names() {
    if (class_names_.empty()) return;
    const std::vector<std::string>& names = model_.class_names = class_names_;
    if (int(names.size()) != model_.network.classes)
      throw InputError("--class-names has " + std::to_string(names.size()) + " names for " +
                       std::to_string(model_.network.classes) + " classes");
    for (const std::string& n : names)
      if (n.empty() || std::count(names.begin(), names.end(), n) > 1)
        throw InputError("--class-names: '" + n + "' is empty or there twice");
  }

  void choose_normalisation() {
    if (by_.given()) {
      if (!mean_.empty() || !std_.empty()) throw InputError("--normalise-by is in place of --mean and --std");
      model_.normalisation = standardise(by_.load(model_, false).images);
      return;
    }
    const size_t channels = size_t(model_.network.image.channels);
    for (std::vector<float>* values : {&mean_, &std_}) {
      if (values->empty()) values->assign(channels, values == &std_);
      if (values->size() != channels)
        throw InputError("--mean and --std need a number for each channel of an image: " + std::to_string(channels));
    }
    for (size_t c = 0; c < channels; c++) {
      if (!std::isfinite(mean_[c])) throw InputError("--mean is not finite");
      if (!(std_[c] > 0 && std::isfinite(std_[c]))) throw InputError("--std must be positive");
      model_.normalisation.scale[c] = 1.f / (255.f * std_[c]);
      model_.normalisation.shift[c] = -mean_[c] / std_[c];
    }
  }

  void choose_settings() {
    const bool colour = model_.network.image.channels == 3;
    const PosteriorKind& kind = find_posterior(kind_);
    const json found = found_settings(colour);
    json settings = json::object();
    if (kind_ == "ft" || find_option(kind.options, "beta"))
      for (const auto& [name, value] : found.items())
        if (find_option(kind.options, name)) settings[name] = value;
    settings.update(posterior_.given());
    if (init_sd_ && !(*init_sd_ > 0)) throw InputError("--init-sd must be positive");
    if (init_sd_) settings["init_log_std"] = std::log(*init_sd_);
    if (!(pretrained_sd_ > 0)) throw InputError("--pretrained-sd must be positive");
    model_.settings = complete_options(kind.options, settings, kind_);
    model_.epochs = epochs_.value_or(10);
    model_.batch = batch_.value_or(colour ? 128 : 100);
    if (!(model_.epochs > 0) || model_.batch < 1) throw InputError("--epochs and --batch must be positive");
  }

  // The kinds of incremental learning have a prior that pretrained weights can be the centre of.
  bool has_prior() const { return model_.settings.contains("beta"); }

  Pretrained take_pretrained(Device& device) {
    Pretrained from;
    const auto network = make_network(model_.network);
    const auto& tensors = network->layout().tensors();
    const size_t heads = tensors.size() - 2 * size_t(network->heads());  // from here on: weight and bias of each
    for (size_t i = 0; i < tensors.size(); i++) {
      const TensorSpec& t = tensors[i];
      if (transfer_ == "all-but-last" ? i >= heads : transfer_ == "conv" && t.name.rfind("conv", 0) != 0) {
        fresh_.push_back(t.name);
        continue;
      }
      from.weights[t.name] = weights_.at(t.name, t.shape).as<float>();
      for (float x : from.weights[t.name])
        if (!std::isfinite(x)) throw InputError(from_ + ": tensor '" + t.name + "' has a value that is not finite");
    }
    if (from.weights.empty()) throw InputError("--transfer conv: " + from_ + " has no convolutions");
    if (laplace_ != old_.given()) throw InputError("--laplace and --old-data go together");
    if (!laplace_) return from;
    if (!has_prior()) throw InputError(kind_ + " has no prior: --laplace is of no use to it");
    // The curvature of the network as it was trained, its head included.
    Model old = model_;
    old.network = trained_;
    if (trained_.classes != model_.network.classes) old.class_names.clear();
    const OwnData data = old_.load(old, curvature_ == "empirical");
    NamedWeights all;
    for (const auto& [name, tensor] : weights_.tensors) all[name] = tensor.as<float>();
    const NamedWeights log_std =
        laplace_log_std(curvature_diagonal(device, network_factory(trained_), data.images, model_.normalisation, all,
                                           parse_curvature(curvature_)),
                        settings_);
    for (const auto& [name, w] : from.weights) from.prior_log_std[name] = log_std.at(name);
    model_.origin["old_data"] = {{"images", data.images.count}, {"data", hash_text(content_hash(data.images))}};
    return from;
  }

  void describe_origin() {
    json& o = model_.origin;
    std::string prior = "none (a point estimate)";
    if (has_prior()) {
      const std::string fresh = normal_text("0", model_.settings["prior_sd"]);
      prior = fresh;
      if (!from_.empty()) {
        prior = laplace_ ? fill(o, "N(w, 1 / precision), a Laplace approximation on {old_data/images} images (") +
                               curvature_ + ")"
                         : normal_text("w", pretrained_sd_);
        if (!fresh_.empty()) prior += "; of what is fresh " + fresh;
        prior += "; w: the pretrained network";
      }
    } else if (model_.uncertain()) {
      prior = "set by the options of " + kind_;
    }
    o["prior"] = prior;
    if (from_.empty()) return;
    Model of;
    of.arrays.tensors = weights_.tensors;
    o["pretrained"] = fingerprint(of);
    o["transfer"] = transfer_;
    if (!fresh_.empty()) o["fresh"] = fresh_;
  }

  Model model_;
  TensorFile weights_;   // of --from
  NetworkSpec trained_;  // whose they are
  std::string architecture_, from_, kind_ = "ffg", transfer_ = "all", curvature_ = "ggn", precision_ = "fp32";
  std::vector<std::string> class_names_, fresh_;
  std::vector<float> mean_, std_;
  std::vector<int> image_;
  bool laplace_ = false;
  int classes_ = 0;
  uint64_t seed_ = 0;
  double pretrained_sd_ = 0.05;
  std::optional<double> init_sd_, epochs_;
  std::optional<int> batch_;
  SchemaArguments network_, posterior_;
  LaplaceSettings settings_;
  DataArguments old_{"--old-data", "train"}, by_{"--normalise-by", "train"};
};

}  // namespace

std::unique_ptr<Command> init_command() { return std::make_unique<Init>(); }

}  // namespace baton
