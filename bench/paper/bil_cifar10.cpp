// Bayesian incremental learning on CIFAR-10 (Kochurov et al. 2018, figure 1, middle): 3Conv3FC learns 50,000 images in
// T parts. The KL is weighted by 0.05, as the paper does for its larger network.
#include "bench/common/bil.h"
#include "engine/io/program.h"

using namespace baton;

namespace {

Preset make_preset(bool paper) {
  Preset p;
  p.batch = 128;
  p.methods = cifar_methods();
  if (paper) {
    p.epochs = 60;
    p.augment = true;  // without it plain FT falls well short of the published curve
  } else {             // a subset, in minutes on two cores: shows that everything runs, and the order
    p.train_limit = 10000;
    p.test_limit = 1000;
    p.samples = 20;
    p.stage_samples = 5;
  }
  return p;
}

int run(int argc, char** argv) {
  PaperProgram program(
      "bil_cifar10",
      "Bayesian incremental learning on CIFAR-10: 3Conv3FC learns the images in T parts, by fine-tuning (ft) and with\n"
      "a posterior that is handed on as the next prior: fully factorized Gaussian (ffg), channel factorized Gaussian\n"
      "(cfg), multiplicative normalizing flows (mnf). Writes result.json, log.jsonl and a plot to --out.",
      argc, argv, make_preset);
  program.methods = "ft,ffg,cfg,mnf";
  program.out_prefix = "results/cifar10_";
  const BilProgram bil{.title = "CIFAR-10",
                       .network = "3conv3fc",
                       .find = find_cifar10,
                       .normalisation = [](const Dataset& set) { return standardise(set.train); },
                       .ft_converged_epochs = program.paper() ? 120. : 0.};
  return run_bil(program, bil, "quick (10,000 images) or paper (all): what the other options start from");
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("bil_cifar10", [&] { return run(argc, argv); });
}
