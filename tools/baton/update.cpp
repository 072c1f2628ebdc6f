// baton update: the posterior becomes the prior, and a new part of the data is learned.
#include <cmath>
#include <optional>

#include "engine/io/progress.h"
#include "tools/baton/command.h"
#include "trainers/model_update.h"

namespace baton {

namespace {

class UpdateCommand : public Command {
 public:
  UpdateCommand()
      : Command("update", "learn new data alone: the posterior is the prior",
                "  baton update --model model.safetensors --data new/ --out next.safetensors\n"
                "      learns the pictures in new/cat/*.png, new/dog/*.jpg, ...; model.safetensors stays as it is\n"
                "  baton update --model model.safetensors --data mnist/ --images 30000:36000 --epochs 5 --out "
                "next.safetensors\n"
                "      6,000 images of an IDX set\n"
                "  baton update --model model.safetensors --data new/ --out next.safetensors --resume\n"
                "      goes on after a kill or Ctrl-C, to the same file bit for bit") {
    data_ = DataArguments("--data", "train");
  }

  void add_options(CLI::App& app) override {
    add_model(app);
    data_.add_to(app, "the new images and their labels", true);
    add_out(app, "the next model's file");
    app.add_flag("--in-place", in_place_, "the next model takes the place of --model");
    app.add_flag("--resume", resume_, "go on with an update that was killed or stopped");
    app.add_flag("--restart", restart_, "forget an unfinished update's checkpoint");
    app.add_flag("--again", o_.again, "learn images that the model has learned before");
    app.add_option("--checkpoint-seconds", o_.checkpoint_seconds, "between two checkpoints (beside --out: .unfinished)")
        ->capture_default_str();
    auto* training = app.add_option_group("Training (default: the model's own settings; baton inspect shows them)");
    training
        ->add_option("--rule", rule_,
                     "elbo: the rule of the posterior's own kind; bgd: Bayesian gradient descent (kind ffg)")
        ->check(CLI::IsMember({"elbo", "bgd"}));
    training->add_option("--epochs", epochs_, "passes over the new images");
    training->add_option("--batch", batch_, "images a step");
    training->add_option("--precision", precision_, "of the layers' products: fp32 or tf32");
    Schema later = posterior_options();
    std::erase_if(later, decided_by_init);
    posterior_.add_to(*training, later, false);
    training->add_option("--head", o_.head, "the output layer that learns, of a network with several; the first is 0");
    training->add_flag("--augment", o_.augment, "random flips and crops (colour photographs)");
    training->add_option("--hold-out", o_.hold_out, "share of the images to judge by instead of learning, as 0.1");
  }

  json run() override {
    if (out_.empty() != in_place_) throw InputError("--out or --in-place is needed, and not both");
    if (resume_ && restart_) throw InputError("--resume and --restart are opposites");
    if (!(o_.checkpoint_seconds >= 0)) throw InputError("--checkpoint-seconds cannot be negative");
    const std::string out = in_place_ ? model_ : out_;
    Model model = read_model(model_);
    take_settings(model);
    std::error_code ignored;
    o_.overwrite = overwrite_ || std::filesystem::equivalent(model_, out, ignored);
    o_.start = resume_    ? UpdateOptions::Start::resume
               : restart_ ? UpdateOptions::Start::restart
                          : UpdateOptions::Start::fresh;
    const OwnData data = data_.load(model, true);

    fprintf(stderr, "baton update: %s (%s), stage %d of %s, %s\n", format_value(data.images.count, "image").c_str(),
            data.format.c_str(), model.stages() + 1, model.network.description().c_str(), model.kind.c_str());
    Device device;
    std::unique_ptr<Progress> progress;
    const bool minimises_kl = model.settings.contains("beta") && model.rule == "elbo";
    o_.progress = [&](const UpdateProgress& p) {
      if (!progress) {
        ProgressOptions options;
        options.loss_name = "NLL";
        options.interval = 2;
        options.images_before = p.images_before;
        progress = std::make_unique<Progress>("", p.total, stderr, options);
      }
      char kl[80] = "";
      if (minimises_kl)
        snprintf(kl, sizeof kl, "KL %.4g (%.3g an image)", p.kl,
                 double(model.settings["beta"]) * p.kl / double(data.images.count));
      if (p.epoch != epoch_) progress->stage("epoch " + std::to_string(p.epoch) + "/" + std::to_string(p.epochs));
      epoch_ = p.epoch;
      progress->update(p.images, p.loss, p.accuracy, kl);
    };
    o_.warn = [&](const std::string& warning) {
      if (progress) progress->stage("");
      epoch_ = 0;
      fprintf(stderr, "baton update: warning: %s\n", warning.c_str());
    };
    json j = update_model(device, model, data, out, o_);
    if (progress) progress->finish();
    j.update({{"model", out}, {"kind", model.kind}, {"device", device.description()}});
    return j;
  }

  std::string text(const json& j) const override {
    if (j.value("done_before", false))
      return fill(j,
                  "{model} is complete already: these images were learned as stage {stage}. Nothing was left to do.\n");
    std::string text = fill(
        j,
        "{model} is written: stage {stage}, {images:,} new images, {seconds:.1} s ({images_per_second:,} images/s)\n"
        "likelihood: {loss:.4} nats an image (mean negative log-likelihood of the last epoch), training accuracy "
        "{accuracy:%}\n");
    std::string layers;
    for (const auto& [layer, kl] : entry(j, "kl_by_layer").items())
      layers += (layers.empty() ? "" : ", ") + layer + " " + format_value(kl, ".1");
    if (!layers.empty()) text += fill(j, "KL to the prior: {kl:.1} nats (") + layers + ")\n";
    if (j.contains("hold_out"))
      text +=
          fill(j["hold_out"],
               "hold-out: {images:,} of the new images, accuracy {accuracy_before:%} before, {accuracy_after:%} after "
               "(at the posterior's mean)\n");
    return text;
  }

 private:
  void take_settings(Model& model) const {
    if (!rule_.empty() && rule_ != model.rule) {
      model.settings["lr"] = rule_ == "bgd" ? 1 : 2e-3;  // eta is no step size of Adam's
      model.rule = rule_;
    }
    model.epochs = epochs_.value_or(model.epochs);
    model.batch = batch_.value_or(model.batch);
    if (!precision_.empty()) model.precision = parse_precision(precision_);
    json given = posterior_.given();
    if (model.kind == "ffg") {  // what the rule bgd takes: a model of this kind keeps eta as its step size
      if (given.contains("draws")) model.draws = given["draws"];
      if (given.contains("eta")) given["lr"] = given["eta"];
      given.erase("draws");
      given.erase("eta");
    }
    model.settings.update(given);
    complete_options(find_posterior(model.kind).options, model.settings, model.kind);  // refuses what it has not
  }

  UpdateOptions o_;
  std::string rule_, precision_;
  bool in_place_ = false, resume_ = false, restart_ = false;
  int epoch_ = 0;  // that the progress line shows
  std::optional<double> epochs_;
  std::optional<int> batch_;
  SchemaArguments posterior_;
};

}  // namespace

std::unique_ptr<Command> update_command() { return std::make_unique<UpdateCommand>(); }

}  // namespace baton
