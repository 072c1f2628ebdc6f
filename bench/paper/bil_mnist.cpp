// Bayesian incremental learning on MNIST (Kochurov et al. 2018, figure 1, left): LeNet-5-Caffe learns 60,000 digits in
// T parts, by fine-tuning (FT) and with a posterior that is handed on as the next prior: fully factorized (FFG),
// channel factorized (CFG), multiplicative normalizing flows (MNF). T = 1 is all the data at once.
#include "bench/common/bil.h"
#include "engine/io/program.h"
#include "layers/lenet5.h"

using namespace baton;

namespace {

// What the paper leaves open. The searches that found the paper preset: bench/results/bil_mnist_search.
BilPreset preset_of(const std::string& name) {
  BilPreset p;
  p.ffg.lr = 2e-3;
  p.ffg.lr_scale = 1e-2;
  p.ffg.prior_sd = 1;
  p.ffg.init_log_std = -4;
  p.ffg.beta = 0.03;
  p.ffg.schedule = Schedule::linear;
  p.cfg = p.mnf = p.ffg;
  p.posterior.path_gradient = true;
  p.posterior.z_log_std = -3.5f;
  p.ft.lr = 2e-3;
  p.ft.schedule = Schedule::linear;
  p.batch = 100;
  if (name == "paper") {
    p.samples = 100;
    p.stage_samples = 25;  // a prediction by 100 draws takes half a minute on two cores, and there are 30 such stages
    p.epochs = 10;
    p.ft_converged_epochs = 20;
  } else if (name == "quick") {  // minutes on two cores
    p.train_limit = 10000;
    p.test_limit = 2000;
    p.samples = 20;
    p.stage_samples = 10;
    p.epochs = 8;
  } else {
    throw InputError("unknown preset '" + name + "': quick or paper");
  }
  return p;
}

}  // namespace

int main(int argc, char** argv) {
  BilProgram program;
  program.name = "bil_mnist";
  program.title = "MNIST";
  program.description =
      "Bayesian incremental learning on MNIST: LeNet-5 learns the digits in T parts, by fine-tuning (ft) and with a\n"
      "posterior that is handed on as the next prior: fully factorized Gaussian (ffg), channel factorized Gaussian "
      "(cfg),\n"
      "multiplicative normalizing flows (mnf). Writes result.json, log.jsonl and a plot to --out.";
  program.methods = "ft,ffg";
  program.preset_help = "quick (10,000 images) or paper (all): sets what is not given";
  program.preset = preset_of;
  program.find = [](const std::optional<std::filesystem::path>& folder, Limits limits) {
    return find_mnist(folder, 0, limits);
  };
  program.normalisation = [](const Dataset&) { return unit_range; };
  program.network = [] { return std::make_unique<LeNet5>(); };
  return run_program("bil_mnist", [&] { return run_bil(program, argc, argv); });
}
