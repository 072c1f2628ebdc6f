// The parameters of LeNet5 and 3Conv3FC as the kernels over the flat store see them: where their tensors lie, the runs
// and pieces of gaussian_step, and the z of MNF (one for each filter and channel, or for each input).
#pragma once
#include "common.h"
#include "kernels/gaussian.h"
#include "layers/network.h"

struct NetworkSizes {
  const char* name;  // "/lenet5"
  baton::ParameterLayout layout;
  double parameters() const { return double(layout.parameters()); }
  std::vector<baton::Run> runs(bool with_z) const;
  std::vector<int> z_sizes() const;  // of the weights, in their order
  int z_stride() const;              // each rounded up to 64, as kernels/flow.h wants a row of z
};
const NetworkSizes& lenet5_sizes();
const NetworkSizes& conv3fc3_sizes();

baton::GaussianArrays take_arrays(Buffers&, const NetworkSizes&, int replicas, bool gaussian);
baton::Pieces take_pieces(Buffers&, const std::vector<baton::Run>&);
inline std::string replicas_name(int replicas) { return "/replicas:" + std::to_string(replicas); }
