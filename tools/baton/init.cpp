// baton init: the first model, from nothing or from a network trained elsewhere.
#include <algorithm>
#include <cmath>

#include "tools/baton/command.h"
#include "trainers/device_data.h"
#include "trainers/laplace.h"
#include "trainers/parse.h"

namespace baton {

namespace {

std::vector<std::string> words_of(const std::string& list) {
  std::vector<std::string> words(1);
  for (char c : list)
    if (c == ',') words.emplace_back();
    else words.back() += c;
  return words;
}

std::vector<float> three_of(const std::string& option, const std::string& list, int channels) {
  std::vector<float> values;
  for (const std::string& word : words_of(list)) {
    char* end = nullptr;
    values.push_back(std::strtof(word.c_str(), &end));
    if (word.empty() || *end || !std::isfinite(values.back()))
      throw InputError(option + ": '" + word + "' is not a number");
  }
  if (int(values.size()) != channels)
    throw InputError(option + " has " + std::to_string(values.size()) + " numbers; the network takes images of " +
                     std::to_string(channels) + (channels == 1 ? " channel" : " channels"));
  return values;
}

class Init : public Command {
 public:
  const char* name() const override { return "init"; }
  const char* summary() const override { return "make a model, from nothing or from a network trained elsewhere"; }
  const char* examples() const override {
    return "  baton init --from lenet5.safetensors --pretrained-sd 0.05 --out model.safetensors\n"
           "      a network trained in PyTorch becomes Bayesian: prior N(w, 0.05^2) around its weights, family ffg\n"
           "  baton init --from lenet5.safetensors --laplace --old-data mnist/ --old-data-images 0:30000 --out "
           "m.safetensors\n"
           "      the prior's width for every weight from a Laplace approximation on the data that it was trained on\n"
           "  baton init --architecture 3conv3fc --classes 5 --family mnf --mean 0.49,0.48,0.45 --std 0.25,0.24,0.26 "
           "--out m.safetensors\n"
           "      an untrained network for colour images, with PyTorch's kind of normalisation";
  }
  void add_options(CLI::App& app) override {
    app.add_option("--out", out_, "the model's file")->required();
    app.add_flag("--overwrite", overwrite_, "write over --out");
    auto* network = app.add_option_group("Network");
    network->add_option("--architecture", architecture_, "lenet5, 3conv3fc, vgg11 or mlp (with --from: recognised)");
    network->add_option("--from", from_, "a PyTorch network's weights as safetensors (tools/from-pytorch)");
    network->add_option("--classes", classes_, "outputs (default: 10, or as in --from)");
    network->add_option("--class-names", class_names_, "their names, in order, separated by commas");
    network->add_option("--hidden", hidden_, "mlp: widths of the hidden layers, as 400,400");
    network->add_option("--image", image_, "mlp: CHANNELSxHEIGHTxWIDTH, as 1x28x28");
    mean_option_ = network->add_option("--mean", mean_,
                                       "of each channel, subtracted from pixels in [0, 1], as in PyTorch's Normalize");
    std_option_ = network->add_option("--std", std_, "of each channel; divides what --mean leaves");
    by_.add_to(*network, "images whose mean and standard deviation normalise all images", false);
    auto* belief = app.add_option_group("Posterior and prior");
    belief->add_option("--family", family_, "ft (a point), ffg, cfg or mnf")->capture_default_str();
    belief->add_option("--prior-sd", prior_sd_, "prior N(0, sd^2) of what is not pretrained")->capture_default_str();
    belief->add_option("--init-sd", init_sd_, "initial standard deviation of the posterior, at most the prior's");
    belief->add_option("--pretrained-sd", pretrained_sd_, "prior N(w, sd^2) of pretrained weights w")
        ->capture_default_str();
    belief->add_option("--transfer", transfer_, "which pretrained layers: all, all-but-last or conv; the rest is fresh")
        ->capture_default_str();
    laplace_option_ = belief->add_flag("--laplace", laplace_,
                                       "prior N(w, 1 / precision) by a diagonal Laplace approximation on --old-data");
    old_.add_to(*belief, "with --laplace: the images that the pretrained network learned", false);
    belief->add_option("--curvature", curvature_, "with --laplace: ggn or empirical")->capture_default_str();
    belief->add_option("--tau", settings_.tau, "with --laplace: precision before any data")->capture_default_str();
    belief->add_option("--temperature", settings_.temperature, "with --laplace: divides the data's precision")
        ->capture_default_str();
    belief->add_option("--groups", groups_, "cfg, mnf: groups of a batch that draw their own weights")
        ->capture_default_str();
    belief->add_option("--flow", flow_, "mnf: realnvp, affine or planar")->capture_default_str();
    belief->add_option("--flow-steps", flow_steps_, "mnf")->capture_default_str();
    belief->add_option("--flow-hidden", flow_hidden_, "mnf: units in a flow's networks")->capture_default_str();
    auto* training = app.add_option_group("Settings of later updates (each can be given to baton update too)");
    lr_ = training->add_option("--lr", model_.training.lr, "Adam's step size of the means");
    lr_scale_ = training->add_option("--lr-scale", model_.training.lr_scale, "of the log standard deviations");
    beta_ = training->add_option("--beta", model_.training.beta, "weight of the KL; 1 is the evidence bound itself");
    schedule_option_ =
        training->add_option("--schedule", schedule_, "of step sizes in a stage: constant, linear, cosine");
    epochs_ = training->add_option("--epochs", model_.epochs, "passes over each part of the data");
    batch_ = training->add_option("--batch", model_.batch, "images a step");
    app.add_option("--seed", model_.seed, "of initial weights, orders and noise")->capture_default_str();
  }

  json run() override {
    check_free(out_, overwrite_);
    TensorFile weights;
    if (!from_.empty()) weights = load_safetensors(from_);
    set_architecture(weights);
    set_normalisation();
    set_training();
    model_.posterior = PosteriorOptions(family_of(family_));
    model_.posterior.groups = groups_;
    model_.posterior.flow = flow_kind_of(flow_);
    model_.posterior.flow_steps = flow_steps_;
    model_.posterior.flow_hidden = flow_hidden_;
    model_.posterior.path_gradient = true;
    model_.posterior.z_log_std = -3.5f;
    if (flow_steps_ < 0 || flow_steps_ > most_flow_steps || flow_hidden_ < 1 || flow_hidden_ > 4096)
      throw InputError("--flow-steps must be 0 to " + std::to_string(most_flow_steps) + ", --flow-hidden 1 to 4096");
    if (groups_ < 1 || groups_ > 256) throw InputError("--groups must be 1 to 256, not " + std::to_string(groups_));
    if (!(prior_sd_ > 0) || !(pretrained_sd_ > 0) || !(init_sd_ > 0))
      throw InputError("--prior-sd, --pretrained-sd and --init-sd must be positive");
    model_.training.prior_sd = prior_sd_;
    model_.training.init_log_std = std::log(init_sd_);
    Device device;
    Beginning beginning;
    beginning.pretrained_sd = pretrained_sd_;
    if (!from_.empty()) beginning.pretrained = pretrained(device, weights);
    else if (laplace_ || old_.given()) throw InputError("--laplace and --old-data need a network: --from");
    describe_origin(weights, beginning);
    initialise(device, model_, beginning);
    save_model(out_, model_);

    json j;
    j["model"] = out_;
    j["architecture"] = model_.architecture.description();
    j["family"] = name_of(model_.posterior.family);
    j["origin"] = model_.origin;
    j["parameters"] = model_.architecture.network()()->layout().parameters();
    j["fingerprint"] = fingerprint(model_);
    return j;
  }

  std::string text(const json& j) const override {
    const json& origin = j["origin"];
    std::string text = j["model"].get<std::string>() + " is written: " + j["architecture"].get<std::string>() + "; " +
                       grouped(j["parameters"]) + " weights and biases; posterior " + j["family"].get<std::string>() +
                       "\nprior: " + origin["prior"].get<std::string>() + "\n";
    if (origin.contains("fresh"))
      text += "fresh (not pretrained): " + std::to_string(origin["fresh"].size()) + " tensors\n";
    return text + "next:  baton update --model " + j["model"].get<std::string>() +
           " --data NEW --out NEXT.safetensors\n";
  }

 private:
  void set_architecture(TensorFile& weights) {
    Architecture& a = model_.architecture;
    if (!from_.empty()) {
      const auto format = weights.metadata.find("format");
      if (format != weights.metadata.end() && format->second.rfind("baton-model-", 0) == 0)
        throw InputError(from_ + " is a model already: baton update goes on with it (baton export writes its mean)");
      a = recognise(weights);
      if (!architecture_.empty() && architecture_ != a.name)
        throw InputError(from_ + " is " + a.description() + ", not " + architecture_);
      if (classes_ && classes_ != a.classes && transfer_ == "all")
        throw InputError(from_ + " has " + std::to_string(a.classes) + " classes; --classes " +
                         std::to_string(classes_) + " needs --transfer all-but-last or conv");
    } else {
      if (architecture_.empty()) throw InputError("--architecture or --from is needed");
      a = architecture_of(architecture_);
    }
    if (!hidden_.empty()) {
      if (!from_.empty()) throw InputError("--hidden is read off --from");
      a.hidden.clear();
      for (const std::string& word : words_of(hidden_)) {
        if (word.empty() || word.size() > 6 || word.find_first_not_of("0123456789") != std::string::npos)
          throw InputError("--hidden: '" + word + "' is no width");
        a.hidden.push_back(std::stoi(word));
      }
    }
    if (!image_.empty()) {
      int used = 0;
      const int inputs = a.channels * a.height * a.width;
      if (sscanf(image_.c_str(), "%4dx%5dx%5d%n", &a.channels, &a.height, &a.width, &used) != 3 ||
          used != int(image_.size()))
        throw InputError("--image is '" + image_ + "'; expected CHANNELSxHEIGHTxWIDTH, as 1x28x28");
      if (a.name != "mlp") a.network();  // says what it takes
      if (!from_.empty() && a.channels * a.height * a.width != inputs)
        throw InputError("--image " + image_ + " does not fit the " + std::to_string(inputs) + " inputs of " + from_);
    }
    if (classes_) a.classes = classes_;
    if (!class_names_.empty()) {
      model_.class_names = words_of(class_names_);
      if (!classes_ && from_.empty()) a.classes = int(model_.class_names.size());
      if (int(model_.class_names.size()) != a.classes)
        throw InputError("--class-names has " + std::to_string(model_.class_names.size()) + " names for " +
                         std::to_string(a.classes) + " classes");
      for (const std::string& n : model_.class_names)
        if (n.empty() || std::count(model_.class_names.begin(), model_.class_names.end(), n) > 1)
          throw InputError("--class-names: '" + n + "' is empty or there twice");
    }
    a.network();
  }

  void set_normalisation() {
    const int channels = model_.architecture.channels;
    if (by_.given()) {
      if (*mean_option_ || *std_option_) throw InputError("--normalise-by is in place of --mean and --std");
      model_.normalisation = standardise(by_.load(model_, false).images);
      return;
    }
    const std::vector<float> mean =
        mean_.empty() ? std::vector<float>(channels, 0.f) : three_of("--mean", mean_, channels);
    const std::vector<float> sd = std_.empty() ? std::vector<float>(channels, 1.f) : three_of("--std", std_, channels);
    for (int c = 0; c < channels; c++) {
      if (!(sd[c] > 0)) throw InputError("--std must be positive");
      model_.normalisation.scale[c] = 1.f / (255.f * sd[c]);
      model_.normalisation.shift[c] = -mean[c] / sd[c];
    }
  }

  // What the searches of the paper programs found, for those networks.
  void set_training() {
    const Model given = model_;
    const bool colour = model_.architecture.channels == 3;
    TrainingSettings& t = model_.training;
    t.lr = colour ? 1e-3 : 2e-3;
    t.lr_scale = 1e-2;
    t.beta = colour ? 0.05 : 0.03;
    t.schedule = Schedule::linear;
    model_.batch = colour ? 128 : 100;
    model_.epochs = 10;
    if (*lr_) t.lr = given.training.lr;
    if (*lr_scale_) t.lr_scale = given.training.lr_scale;
    if (*beta_) t.beta = given.training.beta;
    if (*schedule_option_) t.schedule = schedule_of(schedule_);
    if (*epochs_) model_.epochs = given.epochs;
    if (*batch_) model_.batch = given.batch;
    if (!(t.lr > 0) || !(t.lr_scale >= 0) || !(t.beta >= 0) || !(model_.epochs > 0) || model_.batch < 1)
      throw InputError("--lr, --epochs and --batch must be positive, --lr-scale and --beta not negative");
  }

  std::shared_ptr<const Pretrained> pretrained(Device& device, const TensorFile& weights) {
    auto from = std::make_shared<Pretrained>();
    const auto network = model_.architecture.network()();
    const auto& tensors = network->layout().tensors();
    const std::string last = tensors.back().name.substr(0, tensors.back().name.rfind('.'));
    NamedWeights all;
    for (const TensorSpec& t : tensors) {
      const bool head = t.name.rfind(last + ".", 0) == 0, convolution = t.name.rfind("conv", 0) == 0;
      const bool wanted =
          transfer_ == "all" || (transfer_ == "all-but-last" && !head) || (transfer_ == "conv" && convolution);
      if (!wanted) {
        fresh_.push_back(t.name);
        continue;
      }
      from->weights[t.name] = weights.at(t.name, t.shape).as<float>();
      for (float x : from->weights[t.name])
        if (!std::isfinite(x)) throw InputError(from_ + ": tensor '" + t.name + "' has a value that is not finite");
    }
    if (from->weights.empty()) throw InputError("unknown --transfer '" + transfer_ + "': all, all-but-last or conv");
    if (laplace_ != old_.given()) throw InputError("--laplace and --old-data go together");
    if (!laplace_) return from;
    if (model_.posterior.family == Family::point) throw InputError("ft has no prior: --laplace is of no use to it");
    // The curvature of the network as it was trained, its head included.
    Model old = model_;
    TensorFile copy = weights;
    old.architecture.classes = recognise(copy).classes;
    if (old.architecture.classes != model_.architecture.classes) old.class_names.clear();
    const OwnData data = old_.load(old, curvature_ == "empirical");
    const std::unique_ptr<Network> trained = old.architecture.network()();
    for (const TensorSpec& t : trained->layout().tensors()) all[t.name] = weights.at(t.name, t.shape).as<float>();
    const NamedWeights log_std =
        laplace_log_std(curvature_diagonal(device, old.architecture.network(), data.images, model_.normalisation, all,
                                           curvature_of(curvature_)),
                        settings_);
    for (const auto& [name, w] : from->weights) from->prior_log_std[name] = log_std.at(name);
    model_.origin["old_data"] = {{"images", data.images.count}, {"data", hash_text(content_hash(data.images))}};
    return from;
  }

  void describe_origin(const TensorFile& weights, const Beginning& beginning) {
    json& o = model_.origin;
    char text[200];
    snprintf(text, sizeof text, "N(0, %g^2)", prior_sd_);
    o["prior"] = model_.posterior.family == Family::point ? "none (a point estimate)" : text;
    if (!beginning.pretrained) return;
    if (model_.posterior.family != Family::point) {
      std::string prior;
      if (laplace_)
        prior = "N(w, 1 / precision), a Laplace approximation on " + std::to_string(int(o["old_data"]["images"])) +
                " images (" + curvature_ + ")";
      else {
        snprintf(text, sizeof text, "N(w, %g^2)", pretrained_sd_);
        prior = text;
      }
      if (!fresh_.empty()) {
        snprintf(text, sizeof text, "; of what is fresh N(0, %g^2)", prior_sd_);
        prior += text;
      }
      o["prior"] = prior + "; w: the pretrained network";
    }
    Model of;
    of.arrays.tensors = weights.tensors;
    o["pretrained"] = fingerprint(of);
    o["transfer"] = transfer_;
    if (!fresh_.empty()) o["fresh"] = fresh_;
  }

  Model model_;
  std::string out_, architecture_, from_, class_names_, hidden_, image_, mean_, std_,
      family_ = "ffg", transfer_ = "all", curvature_ = "ggn", schedule_, flow_ = "realnvp";
  bool overwrite_ = false, laplace_ = false;
  int classes_ = 0, groups_ = 1, flow_steps_ = 2, flow_hidden_ = 50;
  double prior_sd_ = 1, init_sd_ = 0.018, pretrained_sd_ = 0.05;
  LaplaceSettings settings_;
  DataArguments old_{"--old-data", Split::train}, by_{"--normalise-by", Split::train};
  std::vector<std::string> fresh_;
  CLI::Option *mean_option_ = nullptr, *std_option_ = nullptr, *laplace_option_ = nullptr, *lr_ = nullptr,
              *lr_scale_ = nullptr, *beta_ = nullptr, *schedule_option_ = nullptr, *epochs_ = nullptr,
              *batch_ = nullptr;
};

}  // namespace

std::unique_ptr<Command> init_command() { return std::make_unique<Init>(); }

}  // namespace baton
