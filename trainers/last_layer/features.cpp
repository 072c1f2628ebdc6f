#include "trainers/last_layer/features.h"

#include <algorithm>
#include <cmath>

#include "engine/io/npy.h"
#include "engine/io/safetensors.h"
#include "engine/io/stop.h"
#include "layers/estimators.h"

namespace baton {

namespace {

constexpr int most_features = 32768;

// "FILE.npy" or "FILE.safetensors[:NAME]"; a safetensors file without a name must hold one tensor of this rank.
Tensor load_tensor(const std::string& where, size_t rank) {
  const size_t at = where.find(".safetensors");
  if (at == std::string::npos) return load_npy(where);
  const size_t end = at + std::string(".safetensors").size();
  if (end < where.size() && where[end] != ':')
    throw InputError(where + ": features are FILE.npy or FILE.safetensors:NAME");
  const TensorFile file = load_safetensors(where.substr(0, end));
  if (end < where.size()) return file.at(where.substr(end + 1));
  const Tensor* only = nullptr;
  std::string names;
  for (const auto& [name, tensor] : file.tensors) {
    names += (names.empty() ? "" : ", ") + name;
    if (tensor.shape.size() != rank) continue;
    if (only)
      throw InputError(where + ": holds more than one tensor of rank " + std::to_string(rank) + " (" + names +
                       ", ...): name one, as FILE.safetensors:NAME");
    only = &tensor;
  }
  if (!only) throw InputError(where + ": holds no tensor of rank " + std::to_string(rank) + " (" + names + ")");
  return *only;
}

std::vector<float> floats_of(const std::string& where, const Tensor& t) {
  if (t.dtype == "F64") {
    const Doubles v = t.as<double>();
    return {v.begin(), v.end()};
  }
  if (t.dtype == "F32" || t.dtype == "F16" || t.dtype == "BF16") return t.as<float>();
  throw InputError(where + ": features of dtype " + t.dtype + ", expected F64, F32, F16 or BF16");
}

std::vector<int64_t> integers_of(const std::string& where, const Tensor& t) {
  const auto widen = [](const auto& v) { return std::vector<int64_t>(v.begin(), v.end()); };
  if (t.dtype == "I64") return t.as<int64_t>();
  if (t.dtype == "I32") return widen(t.as<int32_t>());
  if (t.dtype == "U8") return widen(t.as<uint8_t>());
  if (t.dtype == "U32") return widen(t.as<uint32_t>());
  throw InputError(where + ": labels of dtype " + t.dtype + ", expected I64, I32, U32 or U8");
}

// The labels of images; the features and their source are still to come.
FeatureSet start_features(const Images& images) {
  if (images.count < 1) throw InputError("features of no images");
  return {images.count, 0, images.classes, {}, {images.labels.begin(), images.labels.end()}, ""};
}

}  // namespace

FeatureSet extract_features(Device& device, const NetworkFactory& make, const NamedWeights& weights,
                            const Images& images, const Normalisation& normalisation, int head) {
  constexpr int batch = 128;
  FeatureSet result = start_features(images);
  Arena arena;
  const std::unique_ptr<Network> network = make();
  network->use_head(head);
  if (size_t(network->input_shape().size()) != images.image_bytes())
    throw InputError(std::string(network->architecture()) + " takes images of " +
                     std::to_string(network->input_shape().size()) + " numbers, not " +
                     std::to_string(images.image_bytes()));
  const DeviceImages set = upload_images(device, arena, images, normalisation);
  ParameterStore store(arena, network->layout(), 1);
  float* mean = store.add("mean");
  PointWeights source(mean, network->layout().stride());
  network->prepare({device, arena, source, 1, batch, false});
  for (const TensorSpec& t : network->layout().tensors()) {
    const auto found = weights.find(t.name);
    if (found == weights.end()) throw InputError("features need the weights of " + t.name);
    store.write(device, "mean", 0, t, found->second);
  }
  const std::vector<NamedActivation> layers = network->activations();
  if (layers.size() < 2) throw InputError(std::string(network->architecture()) + " has no hidden layer");
  const auto& [layer, hidden] = layers[layers.size() - 2];
  result.dim = int(hidden.size), result.source = std::string(network->architecture()) + ", " + layer;
  const int batches = (images.count + batch - 1) / batch;
  std::vector<int32_t> index(size_t(batches) * batch);
  for (int i = 0; i < int(index.size()); i++) index[i] = std::min(i, images.count - 1);
  int32_t *indices = arena.take<int32_t>(index.size()), *labels = arena.take<int32_t>(batch);
  upload(device, indices, index);
  for (int b = 0; b < batches; b++) {
    if (stop_requested()) throw_stopped("nothing of these features is kept");
    gather_indexed(network->input().signal.value, nullptr, labels, set, indices + size_t(b) * batch, batch,
                   device.stream());
    network->forward({});
    const size_t valid = std::min(batch, images.count - b * batch);
    const std::vector<float> rows = download(device, hidden.signal.value, valid * hidden.size);
    result.x.insert(result.x.end(), rows.begin(), rows.end());
  }
  return result;
}

FeatureSet pixel_features(const Images& images, const Normalisation& normalisation) {
  FeatureSet result = start_features(images);
  result.dim = int(images.image_bytes()), result.source = "pixels";
  result.x.resize(images.pixels.size());
  const size_t plane = size_t(images.height) * images.width;
  for (size_t i = 0; i < images.pixels.size(); i++) {
    const size_t channel = i / plane % images.channels;
    result.x[i] = float(images.pixels[i]) * normalisation.scale[channel] + normalisation.shift[channel];
  }
  return result;
}

FeatureSet fourier_features(const FeatureSet& from, int dim, double length, uint64_t seed, double amplitude) {
  if (dim < 1 || dim > most_features) throw InputError("1 to 32,768 Fourier features, not " + std::to_string(dim));
  if (!(length > 0) || !(amplitude > 0))
    throw InputError("the length scale and the amplitude of Fourier features must be positive");
  FeatureSet result{
      from.count,   dim,
      from.classes, {},
      from.labels,  from.source + ", " + std::to_string(dim) + " Fourier features of length " + format_number(length)};
  const int wide = (from.dim + 3) / 4 * 4;  // row d: the frequencies of feature d, to whole draws of four
  const Key key = key_of(seed, 15);
  std::vector<float> frequency(size_t(dim) * wide);
  for (size_t i = 0; i < frequency.size() / 4; i++) {
    const float4 z = normal4(key, uint32_t(i), 0, 0);
    const float four[4] = {z.x, z.y, z.z, z.w};
    std::copy(four, four + 4, &frequency[4 * i]);
  }
  SplitMix64 random(seed, 15);
  std::vector<double> phase(dim);
  for (double& b : phase) b = 2 * M_PI * random.uniform();
  result.x.resize(size_t(from.count) * dim);
  const double scale = amplitude * std::sqrt(2.0 / dim);
  constexpr int rows_at_once = 1024;  // between two looks at whether to stop
  for (int first = 0; first < from.count; first += rows_at_once) {
    if (stop_requested()) throw_stopped("nothing of these features is kept");
#pragma omp parallel for schedule(static)
    for (int n = first; n < std::min(from.count, first + rows_at_once); n++)
      for (int d = 0; d < dim; d++) {
        const float *w = &frequency[size_t(d) * wide], *x = &from.x[size_t(n) * from.dim];
        float sum = 0;
        SIMT_SIMD(reduction(+ : sum))
        for (int i = 0; i < from.dim; i++) sum += w[i] * x[i];
        result.x[size_t(n) * dim + d] = float(scale * std::cos(sum / length + phase[d]));
      }
  }
  return result;
}

FeatureSet load_features(const std::string& features, const std::string& labels) {
  const Tensor t = load_tensor(features, 2);
  if (t.shape.size() != 2 || t.shape[0] < 1 || t.shape[1] < 1 || t.shape[1] > most_features || t.shape[0] > INT32_MAX)
    throw InputError(features + ": features of shape " + shape_text(t.shape) +
                     ", expected [samples, features] with at most 32,768 features");
  FeatureSet result{int(t.shape[0]), int(t.shape[1]), 0, floats_of(features, t), {}, "file"};
  for (size_t i = 0; i < result.x.size(); i++)
    if (!std::isfinite(result.x[i]))
      throw InputError(features + ": row " + std::to_string(i / result.dim) + ", column " +
                       std::to_string(i % result.dim) + " is not finite");
  if (labels.empty()) return result;
  const Tensor y = load_tensor(labels, 1);
  if (y.shape.size() != 1 || y.shape[0] != t.shape[0])
    throw InputError(labels + ": labels of shape " + shape_text(y.shape) + " for " + std::to_string(t.shape[0]) +
                     " samples");
  for (int64_t label : integers_of(labels, y)) {
    if (label < 0 || label >= 1500)
      throw InputError(labels + ": label " + std::to_string(label) + ", expected 0 to 1,499");
    result.labels.push_back(int32_t(label));
    result.classes = std::max(result.classes, int(label) + 1);
  }
  return result;
}

void append_bias(FeatureSet& set) {
  std::vector<float> wide(size_t(set.count) * (set.dim + 1));
  for (int i = 0; i < set.count; i++) {
    std::copy_n(&set.x[size_t(i) * set.dim], set.dim, &wide[size_t(i) * (set.dim + 1)]);
    wide[size_t(i) * (set.dim + 1) + set.dim] = 1;
  }
  set.x = std::move(wide);
  set.dim++;
}

FeatureSet rows_of(const FeatureSet& set, const std::vector<int>& index) {
  FeatureSet result{int(index.size()), set.dim, set.classes, {}, {}, set.source};
  for (int i : index) {
    if (i < 0 || i >= set.count)
      throw InputError("row " + std::to_string(i) + " of " + std::to_string(set.count) + " features");
    result.x.insert(result.x.end(), &set.x[size_t(i) * set.dim], &set.x[size_t(i) * set.dim] + set.dim);
    if (!set.labels.empty()) result.labels.push_back(set.labels[i]);
  }
  return result;
}

}  // namespace baton
