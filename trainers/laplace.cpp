#include "trainers/laplace.h"

#include <algorithm>
#include <cmath>

#include "engine/io/stop.h"
#include "kernels/softmax_xent.h"
#include "kernels/squares.h"
#include "layers/estimators.h"

namespace baton {

Curvature parse_curvature(const std::string& name) {
  if (name == "ggn") return Curvature::ggn;
  if (name == "empirical") return Curvature::empirical;
  throw InputError("unknown curvature '" + name + "': ggn or empirical");
}
const char* name(Curvature c) { return c == Curvature::ggn ? "ggn" : "empirical"; }

NamedWeights curvature_diagonal(Device& device, const NetworkFactory& make, const Images& images,
                                const Normalisation& normalisation, const NamedWeights& weights, Curvature kind) {
  constexpr int batch = 128;
  if (images.count < 1) throw InputError("a curvature needs at least one image");
  Arena arena;
  const std::unique_ptr<Network> network = make();
  const ParameterLayout& layout = network->layout();
  const DeviceImages set = upload_images(device, arena, images, normalisation);
  ParameterStore store(arena, layout, 1);
  float *mean = store.add("mean"), *sums = store.add("sums");
  PointWeights source(mean, layout.stride(), sums);
  network->prepare({device, arena, source, 1, batch, true});
  for (const TensorSpec& t : layout.tensors()) {
    const auto found = weights.find(t.name);
    if (found == weights.end()) throw InputError("a curvature of " + t.name + " needs its weights");
    store.write(device, "mean", 0, t, found->second);
  }
  const int classes = network->classes(), batches = (images.count + batch - 1) / batch;
  std::vector<int32_t> index(size_t(batches) * batch);
  for (int i = 0; i < int(index.size()); i++) index[i] = std::min(i, images.count - 1);
  int32_t* indices = arena.take<int32_t>(index.size());
  upload(device, indices, index);
  int32_t* labels = arena.take<int32_t>(batch);
  float *loss = arena.take<float>(batch), *hit = arena.take<float>(batch);
  for (int b = 0; b < batches; b++) {
    if (stop_requested()) throw_stopped("nothing of this curvature is kept");
    gather_indexed(network->input().signal.value, nullptr, labels, set, indices + size_t(b) * batch, batch,
                   device.stream());
    network->forward({});
    // What fills the last batch up says nothing.
    const int valid = std::min(batch, images.count - b * batch);
    float* logits_gradient = network->logits_gradient();
    const auto back = [&] {
      fill_zero(device, logits_gradient + size_t(valid) * classes, sizeof(float) * size_t(batch - valid) * classes);
      network->backward({});
    };
    if (kind == Curvature::empirical) {
      softmax_cross_entropy(loss, hit, logits_gradient, network->logits(), labels, 1, batch, classes, 1.f,
                            device.stream());
      back();
      continue;
    }
    for (int k = 0; k < classes; k++) {
      fisher_column(logits_gradient, network->logits(), k, batch, classes, device.stream());
      back();
    }
  }
  NamedWeights result;
  for (const TensorSpec& t : layout.tensors()) result[t.name] = store.read(device, "sums", 0, t);
  return result;
}

std::vector<float> mean_fisher(Device& device, const NetworkFactory& make, const Images& images,
                               const Normalisation& normalisation, const ParameterStore& store) {
  const ParameterLayout& layout = store.layout();
  NamedWeights weights;
  for (const TensorSpec& t : layout.tensors()) weights[t.name] = store.read(device, "mean", 0, t);
  const NamedWeights sums = curvature_diagonal(device, make, images, normalisation, weights, Curvature::ggn);
  std::vector<float> flat(layout.stride(), 0.f);
  for (const TensorSpec& t : layout.tensors())
    for (size_t i = 0; i < t.size; i++) flat[t.offset + i] = sums.at(t.name)[i] / float(images.count);
  return flat;
}

NamedWeights laplace_log_std(const NamedWeights& curvature, const LaplaceSettings& s) {
  if (!(s.tau > 0) || !(s.temperature > 0) || !(s.least_sd > 0))
    throw InputError("a Laplace prior needs a positive prior precision, temperature and least standard deviation");
  NamedWeights result;
  for (const auto& [name, sums] : curvature)
    for (float sum : sums) {
      const double sd = 1 / std::sqrt(double(sum) / s.temperature + s.tau);
      result[name].push_back(float(std::log(std::max(sd, s.least_sd))));
    }
  return result;
}

}  // namespace baton
