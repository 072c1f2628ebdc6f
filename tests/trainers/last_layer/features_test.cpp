// Features against the networks they come from, against what they approximate, and as files hold them.
#include "trainers/last_layer/features.h"

#include <unistd.h>

#include <cstring>
#include <fstream>
#include <random>

#include "engine/io/npy.h"
#include "tests/support/device.h"
#include "tests/support/small_network.h"

namespace baton::test {
namespace {

namespace fs = std::filesystem;

template <class F>
void expect_refusal(F f, const std::string& words) {
  try {
    f();
    ADD_FAILURE() << "no error, expected: " << words;
  } catch (const InputError& e) {
    EXPECT_NE(std::string(e.what()).find(words), std::string::npos) << e.what();
  }
}

Images random_images(int count, int channels, int side, unsigned seed) {
  std::mt19937 random(seed);
  Images images{count, channels, side, side, 10, {}, {}};
  for (size_t i = 0; i < images.image_bytes() * count; i++) images.pixels.push_back(uint8_t(random() % 256));
  for (int i = 0; i < count; i++) images.labels.push_back(uint8_t(random() % 10));
  return images;
}
const Normalisation normalisation = {{1.f / 64, 1.f / 80, 1.f / 128}, {-2, -1.5f, -1}};

NamedWeights random_network_weights(const Network& network, unsigned seed) {
  NamedWeights w;
  for (const TensorSpec& t : network.layout().tensors())
    w[t.name] = random_normal(t.size, 0, t.bias ? 0.2f : std::sqrt(2.f / float(t.fan_in)), seed++);
  return w;
}

// A forward pass in batches of another size: the last hidden layer and the logits.
struct Outputs {
  std::vector<float> hidden, logits;
};
Outputs forward(Network& network, const NamedWeights& weights, const Images& images) {
  Memory memory;
  Device& device = memory.device();
  ParameterStore store(memory.arena(), network.layout(), 1);
  PointWeights source(store.add("mean"), network.layout().stride());
  network.prepare({device, memory.arena(), source, 1, images.count, /*training*/ false});
  for (const TensorSpec& t : network.layout().tensors()) store.write(device, "mean", 0, t, weights.at(t.name));
  upload(device, network.input().signal.value, pixel_features(images, normalisation).x);
  network.forward({});
  const auto layers = network.activations();
  const Activation hidden = layers[layers.size() - 2].activation;
  return {download(device, hidden.signal.value, hidden.size * images.count),
          download(device, network.logits(), size_t(network.classes()) * images.count)};
}

// W features + b.
Doubles logits_of(const FeatureSet& set, const std::vector<float>& w, const std::vector<float>& b) {
  Doubles logits;
  for (int i = 0; i < set.count; i++)
    for (size_t c = 0; c < b.size(); c++) {
      double sum = b[c];
      for (int d = 0; d < set.dim; d++) sum += double(w[c * set.dim + d]) * set.x[size_t(i) * set.dim + d];
      logits.push_back(sum);
    }
  return logits;
}

// Whole batches of 128, one more image, less than one; in every place the image that belongs there.
void expect_features(const NetworkFactory& make, const std::string& last, int dim, const std::string& source) {
  const NamedWeights weights = random_network_weights(*make(), 3);
  const Images images = random_images(260, 1, 28, 4);
  Memory memory;
  const FeatureSet all = extract_features(memory.device(), make, weights, images, normalisation);
  EXPECT_EQ(all.count, 260);
  EXPECT_EQ(all.dim, dim);
  EXPECT_EQ(all.classes, 10);
  EXPECT_EQ(all.source, source);
  EXPECT_TRUE(exact(all.labels, images.labels));
  const Outputs want = forward(*make(), weights, images);
  EXPECT_TRUE(close(all.x, doubles(want.hidden), {.l2 = 1e-6}));
  EXPECT_TRUE(close(logits_of(all, weights.at(last + ".weight"), weights.at(last + ".bias")), doubles(want.logits),
                    {.l2 = 1e-5}));
  for (int count : {1, 128, 129}) {
    Images few = images;
    few.count = count;
    few.pixels.resize(few.image_bytes() * size_t(count)), few.labels.resize(size_t(count));
    const FeatureSet set = extract_features(memory.device(), make, weights, few, normalisation);
    EXPECT_EQ(set.count, count);
    EXPECT_TRUE(exact(set.x, std::vector<float>(all.x.begin(), all.x.begin() + long(count) * dim))) << count;
  }
}

TEST(Features, LeNet5) {
  BATON_NEEDS_DEVICE();
  expect_features(network_factory(network_spec("lenet5")), "fc2", 500, "lenet5, fc1");
}

TEST(Features, Mlp) {
  BATON_NEEDS_DEVICE();
  const NetworkFactory make = network_factory(network_spec("mlp", 10, {{"hidden", {30, 20}}}));
  expect_features(make, "fc3", 20, "mlp-784-30-20-10, fc2");
  // By the definition.
  const NamedWeights weights = random_network_weights(*make(), 5);
  const Images images = random_images(3, 1, 28, 6);
  Memory memory;
  const FeatureSet got = extract_features(memory.device(), make, weights, images, normalisation);
  FeatureSet h = pixel_features(images, normalisation);
  for (const char* layer : {"fc1", "fc2"}) {
    const Doubles y =
        logits_of(h, weights.at(std::string(layer) + ".weight"), weights.at(std::string(layer) + ".bias"));
    h.x.clear(), h.dim = int(y.size()) / 3;
    for (double v : y) h.x.push_back(float(std::max(0., v)));
  }
  EXPECT_TRUE(close(got.x, doubles(h.x), {.l2 = 1e-5}));
}

TEST(Features, WhatNoNetworkTakes) {
  BATON_NEEDS_DEVICE();
  const NetworkFactory make = network_factory(network_spec("mlp", 10, {{"hidden", {6}}}));
  const NamedWeights weights = random_network_weights(*make(), 5);
  NamedWeights less = weights, shorter = weights;
  less.erase("fc2.bias");
  shorter["fc1.weight"].pop_back();
  const Images images = random_images(3, 1, 28, 6);
  Memory memory;
  const auto extract = [&](const NamedWeights& w, const Images& i, int head) {
    return [&memory, make, w, i, head] { extract_features(memory.device(), make, w, i, normalisation, head); };
  };
  EXPECT_NO_THROW(extract(weights, images, 0)());
  expect_refusal(extract(less, images, 0), "fc2.bias");
  expect_refusal(extract(shorter, images, 0), "fc1.weight");
  expect_refusal(extract(weights, images, 1), "no head 1");
  expect_refusal(extract(weights, Images{0, 1, 28, 28, 10, {}, {}}, 0), "no images");
  expect_refusal(extract(weights, random_images(3, 1, 27, 6), 0), "784 numbers, not 729");
  expect_refusal(extract(weights, random_images(3, 3, 32, 6), 0), "784 numbers, not 3072");
  expect_refusal([] { pixel_features(Images{0, 1, 28, 28, 10, {}, {}}, normalisation); }, "no images");
}

TEST(Features, Pixels) {
  Images images{2, 3, 1, 2, 4, {}, {3, 1}};
  for (int i = 0; i < 12; i++) images.pixels.push_back(uint8_t(20 * i));
  const FeatureSet set = pixel_features(images, {{1, 0.5f, 0.25f}, {0, 10, -100}});
  EXPECT_EQ(set.count, 2);
  EXPECT_EQ(set.dim, 6);
  EXPECT_EQ(set.classes, 4);
  EXPECT_EQ(set.source, "pixels");
  EXPECT_EQ(set.labels, (std::vector<int32_t>{3, 1}));
  EXPECT_EQ(set.x, (std::vector<float>{0, 20, 30, 40, -80, -75, 120, 140, 90, 100, -50, -45}));
}

TEST(Features, FourierFeaturesMakeAKernel) {
  for (int from_dim : {1, 4, 6}) {
    FeatureSet from;
    from.count = 12, from.dim = from_dim, from.classes = 3, from.source = "random";
    from.x = random_normal(size_t(12 * from_dim), 0, 0.8f, 7);
    for (int i = 0; i < 12; i++) from.labels.push_back(i % 3);
    const int dim = 20000;
    for (double length : {0.7, 2.}) {
      const FeatureSet set = fourier_features(from, dim, length, 5);
      EXPECT_EQ(set.count, 12);
      EXPECT_EQ(set.dim, dim);
      EXPECT_EQ(set.classes, 3);
      EXPECT_EQ(set.labels, from.labels);
      EXPECT_EQ(set.source, length == 2 ? "random, 20000 Fourier features of length 2"
                                        : "random, 20000 Fourier features of length 0.7");
      for (int i = 0; i < 12; i++)
        for (int j = 0; j <= i; j++) {
          double square = 0, kernel = 0;
          for (int k = 0; k < from_dim; k++) {
            const double d = from.x[size_t(i * from_dim + k)] - from.x[size_t(j * from_dim + k)];
            square += d * d;
          }
          for (int d = 0; d < dim; d++) kernel += double(set.x[size_t(i) * dim + d]) * set.x[size_t(j) * dim + d];
          // 2 cos cos has a variance of at most 1.
          EXPECT_NEAR(kernel, std::exp(-square / (2 * length * length)), 5 / std::sqrt(double(dim)))
              << i << ", " << j << ", length " << length;
        }
      EXPECT_TRUE(exact(fourier_features(from, dim, length, 5).x, set.x));
      EXPECT_GT(difference(fourier_features(from, dim, length, 6).x, set.x).l2, 0.5);
    }
    // A row's features are its own.
    const FeatureSet set = fourier_features(from, 10, 1, 5), last = fourier_features(rows_of(from, {11}), 10, 1, 5);
    EXPECT_TRUE(exact(last.x, std::vector<float>(set.x.end() - 10, set.x.end())));
  }
  FeatureSet one;
  one.count = one.dim = 1, one.x = {1};
  for (int dim : {0, -1, 32769}) expect_refusal([&] { fourier_features(one, dim, 1, 1); }, "Fourier features, not");
  for (double length : {0., -1., double(NAN)})
    expect_refusal([&] { fourier_features(one, 4, length, 1); }, "length scale");
}

// -------------------------------------------------------------------------------------------------------------- files
class FeatureFiles : public testing::Test {
 protected:
  FeatureFiles() { fs::create_directory(folder_); }
  ~FeatureFiles() override { fs::remove_all(folder_); }
  std::string at(const std::string& name) const { return (folder_ / name).string(); }
  template <class T>
  static Tensor tensor(const std::vector<T>& values, const std::vector<int64_t>& shape) {
    return Tensor::of<T>(std::span<const T>(values), shape);
  }
  template <class T>
  std::string npy(const std::string& name, const std::vector<T>& values, const std::vector<int64_t>& shape) const {
    save_npy(at(name), tensor(values, shape));
    return at(name);
  }
  std::string safetensors(const std::string& name, const std::map<std::string, Tensor>& tensors) const {
    TensorFile file;
    file.tensors = tensors;
    save_safetensors(at(name), file);
    return at(name);
  }
  static Tensor halves(const std::string& dtype, const std::vector<uint16_t>& bits, const std::vector<int64_t>& shape) {
    Tensor t{dtype, shape, std::vector<uint8_t>(2 * bits.size()), {}};
    std::memcpy(t.bytes.data(), bits.data(), t.bytes.size());
    return t;
  }

 private:
  fs::path folder_ = fs::temp_directory_path() / ("baton_features_" + std::to_string(::getpid()));
};

const std::vector<float> values{1, -0.5f, 0.25f, 3, 65504, -2};  // halves hold them

TEST_F(FeatureFiles, Dtypes) {
  const std::vector<double> in_double(values.begin(), values.end());
  const std::vector<uint16_t> bits{0x3C00, 0xB800, 0x3400, 0x4200, 0x7BFF, 0xC000};
  const std::vector<uint16_t> bfloat{0x3F80, 0xBF00, 0x3E80, 0x4040, 0x477F, 0xC000};
  std::string header = "{'descr': '<f2', 'fortran_order': False, 'shape': (3, 2), }";
  header.resize(117, ' ');
  std::ofstream(at("f2.npy"), std::ios::binary) << std::string("\x93NUMPY\x01\x00\x76\x00", 10) << header << '\n'
                                                << std::string(reinterpret_cast<const char*>(bits.data()), 12);
  const std::string several = safetensors("all.safetensors", {{"f64", tensor(in_double, {3, 2})},
                                                              {"f32", tensor(values, {3, 2})},
                                                              {"f16", halves("F16", bits, {3, 2})},
                                                              {"a:b", tensor(values, {3, 2})}});
  for (const std::string& file :
       {npy("f8.npy", in_double, {3, 2}), npy("f4.npy", values, {3, 2}), at("f2.npy"), several + ":f64",
        several + ":f32", several + ":f16", several + ":a:b",
        safetensors("one.safetensors", {{"x", tensor(values, {3, 2})}, {"y", tensor(values, {6})}})}) {
    SCOPED_TRACE(file);
    const FeatureSet set = load_features(file, "");
    EXPECT_EQ(set.count, 3);
    EXPECT_EQ(set.dim, 2);
    EXPECT_EQ(set.classes, 0);
    EXPECT_TRUE(set.labels.empty());
    EXPECT_TRUE(exact(set.x, values));
  }
  const std::string brain = safetensors("bf16.safetensors", {{"x", halves("BF16", bfloat, {3, 2})}});
  EXPECT_EQ(load_features(brain, "").x, (std::vector<float>{1, -0.5f, 0.25f, 3, 65280, -2}));

  const std::string x = npy("x.npy", values, {3, 2});
  const std::string labels = safetensors("labels.safetensors", {{"u8", tensor<uint8_t>({4, 0, 2}, {3})},
                                                                {"u32", tensor<uint32_t>({4, 0, 2}, {3})},
                                                                {"i32", tensor<int32_t>({4, 0, 2}, {3})},
                                                                {"i64", tensor<int64_t>({4, 0, 2}, {3})}});
  for (const std::string& file : {npy<int64_t>("i8.npy", {4, 0, 2}, {3}), npy<int32_t>("i4.npy", {4, 0, 2}, {3}),
                                  npy<uint8_t>("u1.npy", {4, 0, 2}, {3}), npy<uint32_t>("u4.npy", {4, 0, 2}, {3}),
                                  labels + ":u8", labels + ":u32", labels + ":i32", labels + ":i64"}) {
    SCOPED_TRACE(file);
    const FeatureSet set = load_features(x, file);
    EXPECT_EQ(set.labels, (std::vector<int32_t>{4, 0, 2}));
    EXPECT_EQ(set.classes, 5);
  }
  // Both from one file: the matrix and the vector.
  const std::string both =
      safetensors("both.safetensors", {{"x", tensor(values, {3, 2})}, {"y", tensor<int64_t>({1499, 0, 2}, {3})}});
  EXPECT_EQ(load_features(both, both).classes, 1500);
}

TEST_F(FeatureFiles, WhatIsRefused) {
  const auto refused = [](const std::string& features, const std::string& labels, const std::string& words) {
    SCOPED_TRACE(words);
    const std::string& culprit = labels.empty() ? features : labels;
    expect_refusal([&] { load_features(features, labels); }, words);
    expect_refusal([&] { load_features(features, labels); }, culprit.substr(0, culprit.find(".safetensors")));
  };
  const std::string x = npy("x.npy", values, {3, 2});
  refused(at("none.npy"), "", "");
  refused(at("none.safetensors"), "", "");
  refused(x, at("none.npy"), "");
  refused(npy("vector.npy", values, {6}), "", "of shape [6], expected [samples, features]");
  refused(npy("cube.npy", values, {3, 2, 1}), "", "of shape [3, 2, 1]");
  refused(npy<float>("empty.npy", {}, {0, 2}), "", "of shape [0, 2]");
  refused(npy<float>("bare.npy", {}, {2, 0}), "", "of shape [2, 0]");
  refused(npy("wide.npy", std::vector<float>(32769), {1, 32769}), "", "at most 32,768 features");
  refused(npy<int64_t>("integers.npy", {1, 2}, {1, 2}), "", "features of dtype I64, expected F64, F32, F16 or BF16");
  for (float bad : {NAN, INFINITY, -INFINITY}) {
    std::vector<float> spoilt = values;
    spoilt[3] = bad;
    refused(npy("spoilt.npy", spoilt, {3, 2}), "", "row 1, column 1 is not finite");
  }
  refused(npy<double>("vast.npy", {1, 2, 3, 4, 1e300, 6}, {2, 3}), "", "row 1, column 1 is not finite");  // in float

  refused(x, npy<int64_t>("two.npy", {1, 2}, {2}), "labels of shape [2] for 3 samples");
  refused(x, npy<int64_t>("column.npy", {1, 2, 3}, {3, 1}), "labels of shape [3, 1] for 3 samples");
  refused(x, npy<int64_t>("negative.npy", {1, -1, 3}, {3}), "label -1, expected 0 to 1,499");
  refused(x, npy<int64_t>("large.npy", {1, 1500, 3}, {3}), "label 1500, expected 0 to 1,499");
  refused(x, npy<int64_t>("vast.npy", {1, int64_t(1) << 32, 3}, {3}), "label 4294967296");
  refused(x, npy<uint32_t>("unsigned.npy", {1, 4294967295u, 3}, {3}), "label 4294967295");
  refused(x, npy<float>("float.npy", {1, 2, 3}, {3}), "labels of dtype F32, expected I64, I32, U32 or U8");

  const std::string two = safetensors(
      "two.safetensors", {{"a", tensor(values, {3, 2})}, {"b", tensor(values, {2, 3})}, {"c", tensor(values, {6})}});
  refused(two, "", "more than one tensor of rank 2 (a, b, ...): name one");
  EXPECT_EQ(load_features(two + ":b", "").dim, 3);
  refused(two + ":c", "", "of shape [6], expected [samples, features]");
  refused(two + ":d", "", "'d'");
  refused(two + "x", "", "FILE.npy or FILE.safetensors:NAME");
  refused(safetensors("flat.safetensors", {{"c", tensor(values, {6})}}), "", "no tensor of rank 2 (c)");
  refused(x, safetensors("matrix.safetensors", {{"m", tensor<int64_t>({1, 2, 3}, {3, 1})}}), "no tensor of rank 1 (m)");
  std::ofstream(at("text.npy")) << "1 2 3\n";
  refused(at("text.npy"), "", "");
}

TEST(Features, BiasAndRows) {
  FeatureSet set;
  set.count = 3, set.dim = 2, set.classes = 5, set.source = "here";
  set.x = {1, 2, 3, 4, 5, 6}, set.labels = {4, 0, 2};
  const FeatureSet some = rows_of(set, {2, 0, 2});
  EXPECT_EQ(some.count, 3);
  EXPECT_EQ(some.dim, 2);
  EXPECT_EQ(some.classes, 5);
  EXPECT_EQ(some.source, "here");
  EXPECT_EQ(some.x, (std::vector<float>{5, 6, 1, 2, 5, 6}));
  EXPECT_EQ(some.labels, (std::vector<int32_t>{2, 4, 2}));
  EXPECT_EQ(rows_of(set, {}).count, 0);
  for (int row : {-1, 3})
    expect_refusal([&] { rows_of(set, {0, row}); }, "row " + std::to_string(row) + " of 3 features");
  append_bias(set);
  EXPECT_EQ(set.dim, 3);
  EXPECT_EQ(set.count, 3);
  EXPECT_EQ(set.x, (std::vector<float>{1, 2, 1, 3, 4, 1, 5, 6, 1}));
  EXPECT_EQ(set.labels, (std::vector<int32_t>{4, 0, 2}));
  set.labels.clear();
  EXPECT_TRUE(rows_of(set, {1}).labels.empty());
}

template <class Real>
void expect_upload() {
  FeatureSet set;
  set.count = 3, set.dim = 2;
  set.x = {1, 2, 3, 4, 5, 0.1f}, set.labels = {4, 0, 2};
  Memory memory;
  const FeatureRows<Real> rows = upload_features<Real>(memory.device(), memory.arena(), set);
  EXPECT_EQ(rows.count, 3);
  EXPECT_EQ(rows.dim, 2);
  EXPECT_TRUE(exact(download(memory.device(), rows.x, 6), set.x));
  EXPECT_EQ(download(memory.device(), rows.labels, 3), set.labels);
  set.labels.clear();
  EXPECT_EQ(upload_features<Real>(memory.device(), memory.arena(), set).labels, nullptr);
}
TEST(Features, Upload) {
  BATON_NEEDS_DEVICE();
  expect_upload<float>();
  expect_upload<double>();
}

}  // namespace
}  // namespace baton::test
