#include "networks.h"

#include "layers/networks.h"

using namespace baton;

namespace {
int round_up(int n) { return (n + 63) / 64 * 64; }
int z_of(const TensorSpec& t) { return int(t.shape.size() == 2 ? t.shape[1] : t.shape[0] * t.shape[1]); }
}  // namespace

std::vector<Run> NetworkSizes::runs(bool with_z) const {
  std::vector<Run> runs;
  int z_at = 0;
  for (int i = 0; i < int(layout.tensors().size()); i++) {
    const TensorSpec& t = layout[i];
    Run run{int(t.offset), int(t.size), i};
    if (with_z && !t.bias) {
      run.z_first = z_at;
      run.column = t.shape.size() == 2;
      run.width = run.column ? z_of(t) : int(t.size) / z_of(t);
      z_at += round_up(z_of(t));
    }
    runs.push_back(run);
  }
  return runs;
}

std::vector<int> NetworkSizes::z_sizes() const {
  std::vector<int> sizes;
  for (const TensorSpec& t : layout.tensors())
    if (!t.bias) sizes.push_back(z_of(t));
  return sizes;
}

int NetworkSizes::z_stride() const {
  int stride = 0;
  for (int size : z_sizes()) stride += round_up(size);
  return stride;
}

const NetworkSizes& lenet5_sizes() {
  static const NetworkSizes sizes{"/lenet5", make_network(network_spec("lenet5"))->layout()};
  return sizes;
}
const NetworkSizes& conv3fc3_sizes() {
  static const NetworkSizes sizes{"/3conv3fc", make_network(network_spec("3conv3fc"))->layout()};
  return sizes;
}

GaussianArrays take_arrays(Buffers& b, const NetworkSizes& network, int replicas, bool gaussian) {
  GaussianArrays a{};
  a.stride = network.layout.stride();
  a.count = int(a.stride);
  a.replicas = replicas;
  const size_t n = a.stride * replicas;
  a.mean = b.normal(n, 0.1f);
  a.grad_mean = b.normal(n, 1e-2f);
  a.mean_m = b.normal(n, 1e-2f);
  a.mean_v = b.positive(n, 1e-4f);
  if (!gaussian) return a;
  a.log_std = b.normal(n, 0.5f);
  a.variance = b.room<float>(n);
  variance_of(a.variance, a.log_std, a.stride, a.count, replicas, b.stream());
  a.prior_mean = b.normal(n, 0.1f);
  a.prior_log_std = b.normal(n, 0.5f);
  a.grad_variance = b.normal(n, 1e-2f);
  a.scale_m = b.normal(n, 1e-2f);
  a.scale_v = b.positive(n, 1e-4f);
  return a;
}

Pieces take_pieces(Buffers& b, const std::vector<Run>& runs) {
  const std::vector<Run> pieces = pieces_of(runs);
  return {b.put(pieces), int(pieces.size()), slots_of(runs)};
}
