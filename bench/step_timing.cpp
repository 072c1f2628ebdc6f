// Times a whole training step of LeNet5 or 3Conv3FC under any posterior, or a prediction by 100 draws, and prints one
// JSON line: the counterpart of bench/peers/step_torch.py, which bench/peers/compare runs beside it. The steps are of a
// second stage, where the prior is a posterior that was handed on (under MNF, with a flow to be inverted).
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "engine/program.h"
#include "engine/synthetic.h"
#include "layers/conv3fc3.h"
#include "layers/lenet5.h"
#include "trainers/incremental.h"

using namespace baton;

namespace {

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

// "mnf_step": a training step under that posterior. A prediction is by draws of an FFG posterior.
Family family_of_case(const std::string& which) {
  for (Family f : {Family::point, Family::channel, Family::multiplicative})
    if (which == std::string(name_of(f)) + "_step") return f;
  return Family::gaussian;
}

int run(int argc, char** argv) {
  CLI::App app{"Times a training step or a prediction of LeNet5 or 3Conv3FC"};
  std::string which = "ffg_step", network = "lenet5";
  int batch = 128, steps = 20, warmup = 3, replicas = 1, samples = 100;
  app.add_option("--network", network, "lenet5 (generated digits) or 3conv3fc (generated colour images)")
      ->check(CLI::IsMember({"lenet5", "3conv3fc"}));
  app.add_option("--case", which, "ft_step, ffg_step, cfg_step, mnf_step or predict_weight")
      ->check(CLI::IsMember({"ft_step", "ffg_step", "cfg_step", "mnf_step", "predict_weight"}));
  app.add_option("--batch", batch, "examples a step");
  app.add_option("--steps", steps, "timed steps");
  app.add_option("--warmup", warmup, "steps before them");
  app.add_option("--replicas", replicas, "networks at once");
  app.add_option("--samples", samples, "draws of a prediction");
  CLI11_PARSE(app, argc, argv);

  Device device;
  Arena arena;
  const bool digits = network == "lenet5";
  const int count = std::max(2000, batch);
  const Images images = digits ? generate_digits(count, 1) : generate_textures(count, 1);
  const Normalisation normalisation = digits ? unit_range : standardise(images);
  const DeviceImages set = upload_images(device, arena, images, normalisation);
  const NetworkFactory make = [digits]() -> std::unique_ptr<Network> {
    if (digits) return std::make_unique<LeNet5>();
    return std::make_unique<Conv3Fc3>();
  };
  TrainingPlan plan;
  plan.posterior.family = family_of_case(which);
  plan.batch = batch;
  plan.epochs = 1000;
  std::vector<int32_t> order(images.count);
  for (int i = 0; i < images.count; i++) order[i] = i;
  for (int r = 0; r < replicas; r++) plan.seeds.push_back(r), plan.settings.emplace_back();
  IncrementalTrainer trainer(device, arena, make, set, plan, std::vector<std::vector<int32_t>>(replicas, order),
                             {count / 2, count - count / 2});
  for (int stage : {0, 1}) trainer.begin_stage(stage);
  std::function<void()> once = [&] { trainer.run(1); };
  std::optional<Predictor> predictor;
  if (which == "predict_weight") {
    Images some = images;
    limit(some, batch);
    predictor.emplace(device, arena, make, upload_images(device, arena, some, normalisation), 0, batch);
    once = [&] { predictor->predict(trainer.posterior(), 0, samples, 1); };
  }
  std::vector<double> ms;
  for (int i = 0; i < warmup + steps; i++) {
    const auto start = std::chrono::steady_clock::now();
    once();
    device.synchronize();
    const double t = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    if (i >= warmup) ms.push_back(t);
  }
  nlohmann::ordered_json j;
  j["network"] = network;
  j["case"] = which;
  j["batch"] = batch;
  j["replicas"] = replicas;
  j["ms_per_step"] = median(ms);
  j["ms_all"] = ms;
  j["images_per_second"] = 1e3 * batch * (predictor ? 1 : replicas) / median(ms);
  j["device"] = device.description();
  printf("%s\n", j.dump().c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("step_timing", [&] { return run(argc, argv); });
}
