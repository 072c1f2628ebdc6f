// Bayesian incremental learning on CIFAR-10 (Kochurov et al. 2018, figure 1, middle): 3Conv3FC learns 50,000 images in
// T parts. The KL is weighted by 0.05, as the paper does for its larger network.
#include "bench/common/bil.h"
#include "engine/io/program.h"
#include "layers/conv3fc3.h"

using namespace baton;

namespace {

BilPreset preset_of(const std::string& name) {
  BilPreset p;
  set_cifar(p);
  if (name == "paper") {
    p.samples = 100;
    p.stage_samples = 100;
    p.epochs = 60;
    p.augment = true;  // without it plain FT falls well short of the published curve (README, CIFAR-10)
    p.ft_converged_epochs = 120;
  } else if (name == "quick") {  // a subset, in minutes on two cores: shows that everything runs, and the order
    p.train_limit = 10000;
    p.test_limit = 1000;
    p.samples = 20;
    p.stage_samples = 5;
    p.epochs = 10;
  } else {
    throw InputError("unknown preset '" + name + "': quick or paper");
  }
  return p;
}

}  // namespace

int main(int argc, char** argv) {
  BilProgram program;
  program.name = "bil_cifar10";
  program.title = "CIFAR-10";
  program.out_prefix = "results/cifar10_";
  program.description =
      "Bayesian incremental learning on CIFAR-10: 3Conv3FC learns the images in T parts, by fine-tuning (ft) and with "
      "a\n"
      "posterior that is handed on as the next prior: fully factorized Gaussian (ffg), channel factorized Gaussian "
      "(cfg),\n"
      "multiplicative normalizing flows (mnf). Writes result.json, log.jsonl and a plot to --out.";
  program.methods = "ft,ffg,cfg,mnf";
  program.preset_help = "quick (10,000 images) or paper (all): sets what is not given";
  program.preset = preset_of;
  program.find = [](const std::optional<std::filesystem::path>& folder, Limits limits) {
    return find_cifar10(folder, 0, limits);
  };
  program.normalisation = [](const Dataset& set) { return standardise(set.train); };
  program.network = [] { return std::make_unique<Conv3Fc3>(); };
  return run_program("bil_cifar10", [&] { return run_bil(program, argc, argv); });
}
