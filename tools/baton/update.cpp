// baton update: the posterior becomes the prior, and a new part of the data is learned.
#include <cmath>

#include "engine/io/progress.h"
#include "tools/baton/command.h"
#include "trainers/model_update.h"
#include "trainers/parse.h"

namespace baton {

namespace {

class UpdateCommand : public Command {
 public:
  const char* name() const override { return "update"; }
  const char* summary() const override { return "learn new data alone: the posterior is the prior"; }
  const char* examples() const override {
    return "  baton update --model model.safetensors --data new/ --out next.safetensors\n"
           "      learns the pictures in new/cat/*.png, new/dog/*.jpg, ...; model.safetensors stays as it is\n"
           "  baton update --model model.safetensors --data mnist/ --images 30000:36000 --epochs 5 --out "
           "next.safetensors\n"
           "      6,000 images of an IDX set\n"
           "  baton update --model model.safetensors --data new/ --out next.safetensors --resume\n"
           "      goes on after a kill or Ctrl-C, to the same file bit for bit";
  }
  void add_options(CLI::App& app) override {
    app.add_option("--model", model_, "the model so far")->required();
    data_.add_to(app, "the new images and their labels", true);
    out_option_ = app.add_option("--out", out_, "the next model's file");
    app.add_flag("--in-place", in_place_, "the next model takes the place of --model");
    app.add_flag("--overwrite", overwrite_, "write over --out");
    app.add_flag("--resume", resume_, "go on with an update that was killed or stopped");
    app.add_flag("--restart", restart_, "forget an unfinished update's checkpoint");
    app.add_flag("--again", again_, "learn images that the model has learned before");
    app.add_option("--checkpoint-seconds", checkpoint_seconds_, "between two checkpoints (beside --out: .unfinished)")
        ->capture_default_str();
    auto* training = app.add_option_group("Training (default: the model's own settings; baton inspect shows them)");
    rule_option_ =
        training->add_option("--rule", rule_, "elbo: Adam on the evidence bound; bgd: Bayesian gradient descent (ffg)");
    epochs_ = training->add_option("--epochs", given_.epochs, "passes over the new images");
    batch_ = training->add_option("--batch", given_.batch, "images a step");
    lr_ = training->add_option("--lr,--eta", given_.training.lr, "Adam's step size of the means; eta of bgd");
    draws_ = training->add_option("--draws", given_.draws, "bgd: draws of the weights a step (K)");
    lr_scale_ = training->add_option("--lr-scale", given_.training.lr_scale, "of the log standard deviations");
    schedule_option_ = training->add_option("--schedule", schedule_, "of the step sizes: constant, linear, cosine");
    beta_ = training->add_option("--beta", given_.training.beta,
                                 "weight of the KL in mean NLL + beta / N KL; 1 is the evidence bound itself");
    warmup_ = training->add_option("--warmup-epochs", given_.training.warmup_epochs, "in which the KL's weight grows");
    scale_rule_option_ =
        training->add_option("--scale-rule", scale_rule_, "of the standard deviations: adam or natural");
    training->add_flag("--augment", augment_, "random flips and crops (colour photographs)");
    training->add_option("--hold-out", hold_out_, "share of the images to judge by instead of learning, as 0.1");
  }

  json run() override {
    if (out_.empty() != in_place_) throw InputError("--out or --in-place is needed, and not both");
    if (resume_ && restart_) throw InputError("--resume and --restart are opposites");
    if (!(checkpoint_seconds_ >= 0)) throw InputError("--checkpoint-seconds cannot be negative");
    const std::string out = in_place_ ? model_ : out_;
    Model model = load_model(model_);
    if (*rule_option_) {
      const Rule rule = rule_of(rule_);
      if (rule != model.rule) model.training.lr = rule == Rule::descent ? 1 : 2e-3;  // eta is no step size of Adam's
      model.rule = rule;
    }
    if (*epochs_) model.epochs = given_.epochs;
    if (*batch_) model.batch = given_.batch;
    if (*draws_) model.draws = given_.draws;
    if (*lr_) model.training.lr = given_.training.lr;
    if (*lr_scale_) model.training.lr_scale = given_.training.lr_scale;
    if (*schedule_option_) model.training.schedule = schedule_of(schedule_);
    if (*beta_) model.training.beta = given_.training.beta;
    if (*warmup_) model.training.warmup_epochs = given_.training.warmup_epochs;
    if (*scale_rule_option_) model.scale_rule = scale_rule_of(scale_rule_);
    const TrainingSettings& t = model.training;
    if (!(t.lr > 0) || !(t.lr_scale >= 0) || !(t.beta >= 0) || !(t.warmup_epochs >= 0))
      throw InputError("--lr must be positive, --lr-scale, --beta and --warmup-epochs not negative");
    UpdateOptions o;
    o.augment = augment_;
    o.hold_out = hold_out_;
    o.again = again_;
    std::error_code ignored;
    o.overwrite = overwrite_ || std::filesystem::equivalent(model_, out, ignored);
    o.start = resume_    ? UpdateOptions::Start::resume
              : restart_ ? UpdateOptions::Start::restart
                         : UpdateOptions::Start::fresh;
    o.checkpoint_seconds = checkpoint_seconds_;
    const OwnData data = data_.load(model, true);

    fprintf(stderr, "baton update: %s images (%s), stage %d of %s, %s\n", grouped(data.images.count).c_str(),
            data.format.c_str(), model.stages() + 1, model.architecture.description().c_str(),
            name_of(model.posterior.family));
    Device device;
    std::unique_ptr<Progress> progress;
    const bool no_kl = model.posterior.family == Family::point || model.rule == Rule::descent;  // none is minimised
    o.progress = [&](const UpdateProgress& p) {
      if (!progress) {
        ProgressOptions options;
        options.loss_name = "NLL";
        options.interval = 2;
        options.images_before = p.images_before;
        progress = std::make_unique<Progress>("", p.total, stderr, options);
      }
      char kl[80] = "";
      if (!no_kl)
        snprintf(kl, sizeof kl, "KL %.4g (%.3g an image)", p.kl,
                 model.training.beta * p.kl / double(data.images.count));
      if (p.epoch != epoch_) progress->stage("epoch " + std::to_string(p.epoch) + "/" + std::to_string(p.epochs));
      epoch_ = p.epoch;
      progress->update(p.images, p.loss, p.accuracy, kl);
    };
    o.warn = [&](const std::string& warning) {
      if (progress) progress->stage("");
      epoch_ = 0;
      fprintf(stderr, "baton update: warning: %s\n", warning.c_str());
    };
    json j = update_model(device, model, data, out, o);
    if (progress) progress->finish();
    j["model"] = out;
    j["family"] = name_of(model.posterior.family);
    j["device"] = device.description();
    return j;
  }

  std::string text(const json& j) const override {
    const std::string model = j["model"];
    if (j.value("done_before", false))
      return model + " is complete already: these images were learned as stage " + std::to_string(int(j["stage"])) +
             ". Nothing was left to do.\n";
    std::string text = model + " is written: stage " + std::to_string(int(j["stage"])) + ", " + grouped(j["images"]) +
                       " new images, " + decimals(j["seconds"], 1) + " s (" +
                       grouped(std::llround(double(j["images_per_second"]))) + " images/s)\n";
    text += "likelihood: " + decimals(j["loss"], 4) +
            " nats an image (mean negative log-likelihood of the last epoch), "
            "training accuracy " +
            percent(j["accuracy"]) + "\n";
    if (j["family"] != "ft") {
      text += "KL to the prior: " + decimals(j["kl"], 1) + " nats (";
      bool first = true;
      for (const auto& [layer, value] : j["kl_by_layer"].items()) {
        text += (first ? "" : ", ") + layer + " " + decimals(value, 1);
        first = false;
      }
      text += ")\n";
    }
    if (j.contains("hold_out"))
      text += "hold-out: " + grouped(j["hold_out"]["images"]) + " of the new images, accuracy " +
              percent(j["hold_out"]["accuracy_before"]) + " before, " + percent(j["hold_out"]["accuracy_after"]) +
              " after (at the posterior's mean)\n";
    return text;
  }

 private:
  std::string model_, out_, schedule_, rule_, scale_rule_;
  bool augment_ = false;
  double hold_out_ = 0;
  bool in_place_ = false, overwrite_ = false, resume_ = false, restart_ = false, again_ = false;
  double checkpoint_seconds_ = 10;
  int epoch_ = 0;
  Model given_;
  DataArguments data_{"--data", Split::train};
  CLI::Option *out_option_ = nullptr, *epochs_ = nullptr, *batch_ = nullptr, *lr_ = nullptr, *lr_scale_ = nullptr,
              *schedule_option_ = nullptr, *beta_ = nullptr, *warmup_ = nullptr, *rule_option_ = nullptr,
              *scale_rule_option_ = nullptr, *draws_ = nullptr;
};

}  // namespace

std::unique_ptr<Command> update_command() { return std::make_unique<UpdateCommand>(); }

}  // namespace baton
