// What the programs of Bayesian incremental learning share (bil_mnist, bil_cifar10, bil_cifar5p5).
#pragma once
#include "bench/common/program.h"

namespace baton {

// FT's settings, and what FFG, CFG and MNF have in common: means and log sigma by Adam with step sizes that fall
// linearly over a stage. `own` overrides.
Method ft_method(double lr, const std::string& name = "ft");
Method gaussian_method(const std::string& kind, const json& own);
// ft, ffg, cfg and mnf for CIFAR-10: the KL is weighted by 0.05, as the paper does for its larger network.
std::vector<Method> cifar_methods();

// A program that learns one data set in T parts.
struct BilProgram {
  std::string title;  // of the data set
  std::string network;
  Dataset (*find)(const std::optional<std::filesystem::path>&, uint64_t, Limits);
  Normalisation (*normalisation)(const Dataset&);
  double ft_converged_epochs = 0;  // FT at convergence beside FT at the others' budget; 0: not
};
// The program's options are set but not parsed.
int run_bil(PaperProgram&, BilProgram, const std::string& preset_help);

}  // namespace baton
