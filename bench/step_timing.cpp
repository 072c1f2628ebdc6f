// Times a whole training step of LeNet5, or a prediction by 100 draws, and prints one JSON line: the counterpart of
// bench/peers/lenet5_torch.py, which bench/peers/compare runs beside it.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "engine/program.h"
#include "engine/synthetic.h"
#include "layers/lenet5.h"
#include "trainers/incremental.h"

using namespace baton;

namespace {

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

int run(int argc, char** argv) {
  CLI::App app{"Times a LeNet5 training step or prediction"};
  std::string which = "ffg_step";
  int batch = 128, steps = 20, warmup = 3, replicas = 1, samples = 100;
  app.add_option("--case", which, "ffg_step, ft_step or predict_weight")
      ->check(CLI::IsMember({"ffg_step", "ft_step", "predict_weight"}));
  app.add_option("--batch", batch, "examples a step");
  app.add_option("--steps", steps, "timed steps");
  app.add_option("--warmup", warmup, "steps before them");
  app.add_option("--replicas", replicas, "networks at once");
  app.add_option("--samples", samples, "draws of a prediction");
  CLI11_PARSE(app, argc, argv);

  Device device;
  Arena arena;
  const Images images = generate_digits(std::max(2000, batch), 1);
  const DeviceImages set = upload_images(device, arena, images, unit_range);
  const NetworkFactory make = [] { return std::make_unique<LeNet5>(); };
  TrainingPlan plan;
  plan.family = which == "ft_step" ? Family::point : Family::gaussian;
  plan.batch = batch;
  plan.epochs = 1000;
  std::vector<int32_t> order(images.count);
  for (int i = 0; i < images.count; i++) order[i] = i;
  for (int r = 0; r < replicas; r++) plan.seeds.push_back(r), plan.settings.emplace_back();
  IncrementalTrainer trainer(device, arena, make, set, plan, std::vector<std::vector<int32_t>>(replicas, order),
                             {images.count});
  trainer.begin_stage(0);
  std::function<void()> once = [&] { trainer.run(1); };
  std::optional<Predictor> predictor;
  if (which == "predict_weight") {
    Images some = images;
    limit(some, batch);
    predictor.emplace(device, arena, make, upload_images(device, arena, some, unit_range), 0, batch);
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
