// Bayesian incremental learning on MNIST (Kochurov et al. 2018, figure 1, left): LeNet-5-Caffe learns 60,000 digits in
// T parts, by fine-tuning (FT) and with a posterior that is handed on as the next prior: fully factorized (FFG),
// channel factorized (CFG), multiplicative normalizing flows (MNF). T = 1 is all the data at once.
#include "bench/common/bil.h"
#include "engine/io/program.h"

using namespace baton;

namespace {

// What the paper leaves open. The searches that found the paper preset: bench/results/bil_mnist_search.
Preset make_preset(bool paper) {
  Preset p;
  const json settings{{"lr", 2e-3}, {"init_log_std", -4}, {"beta", 0.03}};
  json flows = settings;
  flows.update({{"path_gradient", true}, {"z_log_std", -3.5}});
  p.methods = {ft_method(2e-3), gaussian_method("ffg", settings), gaussian_method("cfg", settings),
               gaussian_method("mnf", flows)};
  if (paper) {
    p.stage_samples = 25;  // a prediction by 100 draws takes half a minute on two cores, and there are 30 such stages
  } else {                 // minutes on two cores
    p.train_limit = 10000;
    p.test_limit = 2000;
    p.samples = 20;
    p.stage_samples = 10;
    p.epochs = 8;
  }
  return p;
}

int run(int argc, char** argv) {
  PaperProgram program(
      "bil_mnist",
      "Bayesian incremental learning on MNIST: LeNet-5 learns the digits in T parts, by fine-tuning (ft) and with a\n"
      "posterior that is handed on as the next prior: fully factorized Gaussian (ffg), channel factorized Gaussian\n"
      "(cfg), multiplicative normalizing flows (mnf). Writes result.json, log.jsonl and a plot to --out.",
      argc, argv, make_preset);
  program.methods = "ft,ffg";
  program.out_prefix = "results/";
  const BilProgram bil{.title = "MNIST",
                       .network = "lenet5",
                       .find = find_mnist,
                       .normalisation = [](const Dataset&) { return unit_range; },
                       .ft_converged_epochs = program.paper() ? 20. : 0.};
  return run_bil(program, bil, "quick (10,000 images) or paper (all): what the other options start from");
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("bil_mnist", [&] { return run(argc, argv); });
}
