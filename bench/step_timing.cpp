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
#include "layers/conv3fc3.h"
#include "layers/lenet5.h"
#include "layers/mlp.h"
#include "trainers/incremental.h"
#include "trainers/tasks.h"

using namespace baton;

namespace {

#if defined(BATON_CUDA)
constexpr bool on_gpu = true;
#else
constexpr bool on_gpu = false;
#endif

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

// A step of the perceptron on generated digits: BGD with K draws, `at_once` of them side by side, or SGD.
std::unique_ptr<TaskTrainer> perceptron(Device& device, Arena& arena, bool bgd, int batch, int draws, int at_once) {
  const Images images = generate_digits(std::max(2000, batch), 1);
  TaskSequence sequence;
  sequence.examples.emplace_back(images.count);
  for (int i = 0; i < images.count; i++) sequence.examples[0][i] = i;
  TaskPlan plan;
  plan.batch = batch;
  plan.epochs = 1000;
  plan.lr = bgd ? 1 : 0.01;
  const NetworkFactory make = [] { return std::make_unique<Mlp>(784, std::vector<int>{1200, 1200}, 10); };
  const LearnerFactory learner = [=](Device& d, Arena& a, const ParameterLayout& layout) -> std::unique_ptr<Learner> {
    BgdSettings settings;
    settings.draws = draws;
    settings.at_once = at_once;
    settings.sigma = 0.04;
    PointSetup point;
    point.rule.momentum = 0.9f;
    if (bgd) return std::make_unique<BgdLearner>(d, a, layout, settings);
    return std::make_unique<PointLearner>(d, a, layout, point);
  };
  auto trainer = std::make_unique<TaskTrainer>(device, arena, make, upload_images(device, arena, images, unit_range),
                                               sequence, plan, learner);
  trainer->begin_stage(0);
  return trainer;
}

int run(int argc, char** argv) {
  CLI::App app{"Times a training step or a prediction of LeNet5, 3Conv3FC or a perceptron"};
  std::string which = "ffg_step", network = "lenet5";
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
  app.add_option("--steps", steps, "timed steps");
  app.add_option("--warmup", warmup, "steps before them");
  app.add_option("--together", together,
                 "steps between two looks at the clock and at the totals, which wait for the device "
                 "[1 on the CPU, up to 10 on the GPU]; of predictions always 1");
  app.add_option("--replicas", replicas, "networks at once");
  app.add_option("--samples", samples, "draws of a prediction");
  app.add_flag("--path-gradient", path_gradient, "mnf_step as bil_mnist trains it: ln q(z) through the flow's inverse");
  CLI11_PARSE(app, argc, argv);

  const bool tasks = network == "mlp1200";
  if (tasks != (which == "bgd_step" || which == "sgd_step"))
    throw InputError("--network " + network + " has no case " + which);
  Device device;
  Arena arena;
  std::function<void(int)> advance;  // by so many steps
  std::unique_ptr<TaskTrainer> perceptron_trainer;
  std::optional<IncrementalTrainer> trainer;
  std::optional<Predictor> predictor;
  if (tasks) {
    perceptron_trainer = perceptron(device, arena, which == "bgd_step", batch, draws, at_once);
    advance = [&](int count) { perceptron_trainer->run(count); };
  } else {
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
    plan.posterior.path_gradient = path_gradient;
    plan.batch = batch;
    plan.epochs = 1000;
    std::vector<int32_t> order(images.count);
    for (int i = 0; i < images.count; i++) order[i] = i;
    for (int r = 0; r < replicas; r++) plan.seeds.push_back(r), plan.settings.emplace_back();
    trainer.emplace(device, arena, make, set, plan, std::vector<std::vector<int32_t>>(replicas, order),
                    std::vector<int>{count / 2, count - count / 2});
    for (int stage : {0, 1}) trainer->begin_stage(stage);
    advance = [&](int count) { trainer->run(count); };
    if (which == "predict_weight") {
      Images some = images;
      limit(some, batch);
      predictor.emplace(device, arena, make, upload_images(device, arena, some, normalisation), 0, batch);
      advance = [&](int) { predictor->predict(trainer->posterior(), 0, samples, 1); };
      together = 1;
    }
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
