// Times a whole training step of LeNet5 or 3Conv3FC under any posterior, a prediction by 100 draws, or a step of
// Bayesian gradient descent or SGD on the perceptron 784-1200-1200-10, and prints one JSON line: the counterpart of
// bench/peers/step_torch.py, which bench/peers/compare runs beside it. The steps are of a second stage, where the prior
// is a posterior that was handed on (under MNF, with a flow to be inverted).
#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "engine/io/program.h"
#include "engine/io/synthetic.h"
#include "trainers/predictor.h"
#include "trainers/trainer.h"

using namespace baton;

namespace {

double median(std::vector<double> v) {
  std::sort(v.begin(), v.end());
  return v[v.size() / 2];
}

int run(int argc, char** argv) {
  CLI::App app{"Times a training step or a prediction of LeNet5, 3Conv3FC or a perceptron"};
  std::string which = "ffg_step", network = "lenet5", precision = "fp32";
  int batch = 128, steps = 20, warmup = 3, replicas = 1, samples = 100, draws = 10, at_once = 0, together = 0;
  bool path_gradient = false;
  app.add_option("--network", network, "lenet5, mlp1200 (generated digits) or 3conv3fc (generated colour images)")
      ->check(CLI::IsMember({"lenet5", "3conv3fc", "mlp1200"}));
  app.add_option("--case", which,
                 "ft_step, ffg_step, cfg_step, mnf_step or predict_weight; of mlp1200: bgd_step, sgd_step")
      ->check(CLI::IsMember({"ft_step", "ffg_step", "cfg_step", "mnf_step", "predict_weight", "bgd_step", "sgd_step"}));
  app.add_option("--draws", draws, "K of BGD");
  app.add_option("--at-once", at_once, "draws of BGD that run side by side [all]");
  app.add_option("--batch", batch, "examples a step");
  app.add_option("--precision", precision, "of the layers' products: fp32 or tf32");
  app.add_option("--steps", steps, "timed steps");
  app.add_option("--warmup", warmup, "steps before them");
  app.add_option("--together", together,
                 "steps between two looks at the clock and at the totals, which wait for the device "
                 "[1 on the CPU, up to 10 on the GPU]; of predictions always 1");
  app.add_option("--replicas", replicas, "networks at once");
  app.add_option("--samples", samples, "draws of a prediction");
  app.add_flag("--path-gradient", path_gradient, "mnf_step as bil_mnist trains it: ln q(z) through the flow's inverse");
  CLI11_PARSE(app, argc, argv);

  const bool perceptron = network == "mlp1200";
  if (perceptron != (which == "bgd_step" || which == "sgd_step"))
    throw InputError("--network " + network + " has no case " + which);
  Device device;
  device.set_precision(parse_precision(precision));
  Arena arena;
  const bool digits = network != "3conv3fc";
  const int count = std::max(2000, batch);
  const Images images = digits ? generate_digits(count, 1) : generate_textures(count, 1);
  const Normalisation normalisation = digits ? unit_range : standardise(images);
  const NetworkFactory make =
      network_factory(perceptron ? network_spec("mlp", 10, {{"hidden", {1200, 1200}}}) : network_spec(network));
  TrainingSettings training;
  training.kind = which == "predict_weight" ? "ffg" : which.substr(0, which.find('_'));
  training.batch = batch;
  training.epochs = 1000;
  training.replicas.clear();
  json settings = json::object();
  if (training.kind == "mnf") settings["path_gradient"] = path_gradient;
  if (training.kind == "bgd") settings = {{"draws", draws}, {"draws_at_once", at_once}, {"sigma", 0.04}};
  if (training.kind == "sgd") settings["momentum"] = 0.9;
  for (int r = 0; r < replicas; r++) training.replicas.push_back({uint64_t(r), settings});
  Stages stages = whole_set(count);
  stages.order.assign(size_t(replicas), stages.order[0]);
  if (!perceptron) stages.sizes = {count / 2, count - count / 2}, stages.augment.clear();
  Trainer trainer(device, arena, make, upload_images(device, arena, images, normalisation), stages, training);
  for (int stage = 0; stage < stages.count(); stage++) trainer.begin_stage(stage);
  std::function<void(int)> advance = [&](int steps_now) { trainer.run(steps_now); };
  std::optional<Predictor> predictor;
  if (which == "predict_weight") {
    Images some = images;
    limit(some, batch);
    predictor.emplace(device, arena, make, upload_images(device, arena, some, normalisation), 0, batch);
    advance = [&](int) { predictor->predict(trainer.posterior(), 0, samples, 1); };
    together = 1;
  }
  if (together < 1) together = on_gpu ? std::clamp(steps, 1, 10) : 1;
  std::vector<double> ms;
  for (int i = -(warmup + together - 1) / together; i * together < steps; i++) {
    const auto start = std::chrono::steady_clock::now();
    advance(together);
    device.synchronize();
    const double t = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    if (i >= 0) ms.push_back(t / together);
  }
  nlohmann::ordered_json j;
  j["network"] = network;
  j["case"] = which;
  j["batch"] = batch;
  j["precision"] = name(device.precision());
  j["replicas"] = replicas;
  if (which == "bgd_step") j["draws"] = draws;
  j["peak_bytes"] = device.peak_bytes();
  j["together"] = together;
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
