// The diagonal of the curvature, against independent figures and against per-example gradients in double precision.
#include "trainers/laplace.h"

#include "tests/support/device.h"
#include "tests/support/small_network.h"

namespace baton::test {
namespace {

// One layer after the other: a convolution with ReLU and pooling where `kernel` is not 0, then dense layers with ReLU.
// What a network computes here it also computes in double precision, by plain loops.
struct Shape {
  int channels, side, filters, kernel, pad;
  Pooling pooling;
  std::vector<int> units;  // of the dense layers; the last are the classes

  int convolved() const { return side + 2 * pad - kernel + 1; }
  int window() const { return pooling == Pooling::none ? 0 : pooling == Pooling::max2 ? 2 : 3; }
  int pooled() const { return window() ? (convolved() - window()) / 2 + 1 : convolved(); }
  int features() const { return kernel ? filters * pooled() * pooled() : channels * side * side; }
};

class LayeredNetwork : public Network {
 public:
  explicit LayeredNetwork(const Shape& s) : Network("layered", {s.channels, s.side, s.side}, s.units.back()) {
    if (s.kernel) add_convolution("conv1", s.filters, s.kernel, s.pad, s.pooling);
    for (size_t i = 0; i + 1 < s.units.size(); i++) add_dense("fc" + std::to_string(i + 1), s.units[i]);
    add_head("fc" + std::to_string(s.units.size()));
  }
};

// 6-8-7-4 with inputs that no bytes hold: rows [examples][6], looked up by the number that all six pixels are.
class LookedUp : public Network {
 public:
  LookedUp(Device& device, std::vector<float> rows)
      : Network("looked up", {1, 1, 6}, 4), device_(device), rows_(std::move(rows)) {
    add_dense("fc1", 8);
    add_dense("fc2", 7);
    add_head("fc3");
  }
  void forward_layers(const Pass& pass) override {
    std::vector<float> x = download(device_, input().signal.value, input().stride);
    for (size_t i = 0; i < x.size(); i++) x[i] = rows_[size_t(x[i]) * 6 + i % 6];
    upload(device_, input().signal.value, x);
    Network::forward_layers(pass);
  }

 private:
  Device& device_;
  std::vector<float> rows_;
};

// 64-16-5 with hyperbolic tangents, which no layer of ours has: they are taken on the host. Where the biases of the
// hidden units are `shift` larger, their ReLUs let everything pass.
class TanhNetwork : public Network {
 public:
  static constexpr float shift = 8;
  explicit TanhNetwork(Device& device)
      : Network("tanh", {1, 8, 8}, 5), device_(device), hidden_(add_dense("fc1", 16)), output_(add_head("fc2")) {}
  void forward_layers(const Pass& pass) override {
    hidden_.forward(input(), pass);
    const Activation& y = hidden_.output();
    tanh_ = download(device_, y.signal.value, y.stride);
    for (float& v : tanh_) {
      EXPECT_GT(v, 0);
      v = std::tanh(v - shift);
    }
    upload(device_, y.signal.value, tanh_);
    output_.forward(y, pass);
  }
  void backward_layers(const Pass& pass) override {
    const Activation& y = hidden_.output();
    output_.backward(y, pass);
    std::vector<float> gradient = download(device_, y.signal.grad, y.stride);
    for (size_t i = 0; i < gradient.size(); i++) gradient[i] *= 1 - tanh_[i] * tanh_[i];
    upload(device_, y.signal.grad, gradient);
    upload(device_, y.signal.value, std::vector<float>(tanh_.size(), 1.f));  // what the ReLU asks on its way back
    hidden_.backward(input(), pass);
    upload(device_, y.signal.value, tanh_);
  }

 private:
  Device& device_;
  Dense &hidden_, &output_;
  std::vector<float> tanh_;
};

NetworkFactory factory(const Shape& s) {
  return [s] { return std::make_unique<LayeredNetwork>(s); };
}

NamedWeights random_weights(const Shape& s, unsigned seed) {
  NamedWeights w;
  const LayeredNetwork network(s);
  for (const TensorSpec& t : network.layout().tensors())
    w[t.name] = random_normal(t.size, 0, t.bias ? 0.2f : std::sqrt(2.f / float(t.fan_in)), seed++);
  return w;
}

// Every example alone: its gradient for each upstream gradient of the logits, squared and added up.
std::map<std::string, Doubles> reference(const Shape& s, const Images& images, const Normalisation& n,
                                         const NamedWeights& weights, Curvature kind) {
  std::vector<ReferenceLayer> layers;
  std::vector<std::string> names;
  if (s.kernel) layers.push_back({1, s.channels, s.side, s.side, s.filters, s.kernel, s.pad}), names.push_back("conv1");
  int in = s.features();
  for (size_t i = 0; i < s.units.size(); i++) {
    layers.push_back(ReferenceLayer::dense(1, in, s.units[i])), names.push_back("fc" + std::to_string(i + 1));
    in = s.units[i];
  }
  std::map<std::string, Doubles> sums;
  for (size_t i = 0; i < layers.size(); i++) {
    layers[i].mean = doubles(weights.at(names[i] + ".weight"));
    layers[i].bias_mean = doubles(weights.at(names[i] + ".bias"));
    sums[names[i] + ".weight"].assign(layers[i].mean.size(), 0);
    sums[names[i] + ".bias"].assign(layers[i].bias_mean.size(), 0);
  }
  std::vector<ReferencePool> pools(layers.size());
  const int classes = s.units.back(), plane = s.side * s.side;
  for (int image = 0; image < images.count; image++) {
    Doubles h;
    for (int i = 0; i < s.channels * plane; i++)
      h.push_back(double(images.pixels[size_t(image) * s.channels * plane + i]) * n.scale[i / plane] +
                  n.shift[i / plane]);
    for (size_t i = 0; i < layers.size(); i++) {
      ReferenceLayer& l = layers[i];
      l.forward(h, Doubles(l.outputs(), 0));
      h = i + 1 == layers.size()
              ? l.y
              : pools[i].forward(l.y, l.out, l.out_height(), l.out_width(), s.kernel && i == 0 ? s.window() : 0);
    }
    Doubles p;
    double total = 0;
    for (double logit : h) total += std::exp(logit);
    for (double logit : h) p.push_back(std::exp(logit) / total);
    for (int k = 0; k < classes; k++) {
      if (kind == Curvature::empirical && k != images.labels[image]) continue;
      Doubles up;  // of -ln p_k, weighted by sqrt(p_k)
      for (int c = 0; c < classes; c++)
        up.push_back((kind == Curvature::ggn ? std::sqrt(p[k]) : 1) * (p[c] - (c == k)));
      for (size_t i = layers.size(); i-- > 0;) {
        up = layers[i].backward(i + 1 == layers.size() ? up : pools[i].backward(up, layers[i].outputs()));
        for (const auto& [end, g] : {std::pair(".weight", &layers[i].g_mean), {".bias", &layers[i].g_bias_mean}}) {
          Doubles& sum = sums[names[i] + end];
          for (size_t j = 0; j < sum.size(); j++) sum[j] += (*g)[j] * (*g)[j];
        }
      }
    }
  }
  return sums;
}

Images random_images(const Shape& s, int count, int classes, unsigned seed) {
  std::mt19937 random(seed);
  Images images{count, s.channels, s.side, s.side, classes, {}, {}};
  for (size_t i = 0; i < images.image_bytes() * count; i++) images.pixels.push_back(uint8_t(random() % 256));
  for (int i = 0; i < count; i++) images.labels.push_back(uint8_t(random() % unsigned(classes)));
  return images;
}
const Normalisation normalisation = {{1.f / 64, 1.f / 80, 1.f / 128}, {-2, -1.5f, -1}};

NamedWeights curvature(const Shape& s, const Images& images, const NamedWeights& weights, Curvature kind) {
  Memory memory;
  return curvature_diagonal(memory.device(), factory(s), images, normalisation, weights, kind);
}

const Shape shapes[] = {{2, 6, 3, 3, 0, Pooling::max2, {5, 4}},  // a bit of everything
                        {3, 7, 4, 3, 1, Pooling::max3, {3}},     // overlapping windows
                        {1, 5, 2, 3, 1, Pooling::none, {4, 3}},  // no pooling
                        {1, 4, 0, 0, 0, Pooling::none, {6, 5, 3}}};

TEST(Laplace, AgainstPerExampleGradients) {
  BATON_NEEDS_DEVICE();
  for (const Shape& s : shapes)
    for (Curvature kind : {Curvature::ggn, Curvature::empirical})
      for (int count : {1, 130}) {  // the second: a whole batch and one that is not full
        SCOPED_TRACE(name(kind) + std::string(", images ") + std::to_string(count) + ", kernel " +
                     std::to_string(s.kernel) + ", window " + std::to_string(s.window()));
        const NamedWeights weights = random_weights(s, 5);
        const Images images = random_images(s, count, s.units.back(), 6);
        const NamedWeights got = curvature(s, images, weights, kind);
        const auto want = reference(s, images, normalisation, weights, kind);
        ASSERT_EQ(got.size(), want.size());
        for (const auto& [name, sums] : want) EXPECT_TRUE(close(got.at(name), sums, {.l2 = 5e-6})) << name;
      }
}

// Sums, not means: the images twice are twice the curvature, wherever batches begin and end.
TEST(Laplace, TwiceTheImagesAreTwiceTheSum) {
  BATON_NEEDS_DEVICE();
  const Shape& s = shapes[0];
  const NamedWeights weights = random_weights(s, 5);
  const Images once = random_images(s, 90, 4, 6);
  Images twice = once;
  twice.count = 180;
  twice.pixels.insert(twice.pixels.end(), once.pixels.begin(), once.pixels.end());
  twice.labels.insert(twice.labels.end(), once.labels.begin(), once.labels.end());
  for (Curvature kind : {Curvature::ggn, Curvature::empirical}) {
    const NamedWeights one = curvature(s, once, weights, kind), two = curvature(s, twice, weights, kind);
    for (const auto& [name, sums] : one) {
      Doubles want = doubles(sums);
      for (double& x : want) x *= 2;
      EXPECT_TRUE(close(two.at(name), want, {.l2 = 1e-6})) << name;
    }
  }
}

// A 6-8-7-4 network by an independent implementation.
TEST(Laplace, GoldenMlp) {
  BATON_NEEDS_DEVICE();
  const Npz z(golden_file("layers/laplace_mlp_relu"));
  const int count = 12, features = 6;
  Images images{count, 1, 1, features, 4, {}, {}};
  for (int i = 0; i < count; i++) {
    images.pixels.insert(images.pixels.end(), features, uint8_t(i));
    images.labels.push_back(uint8_t(z.i64("in_y")[i]));
  }
  const std::vector<float> rows = z.f32("in_x");
  ASSERT_EQ(rows.size(), size_t(count) * features);
  NamedWeights weights;
  for (int i = 1; i <= 3; i++) {
    weights["fc" + std::to_string(i) + ".weight"] = z.f32("in_W" + std::to_string(i));
    weights["fc" + std::to_string(i) + ".bias"] = z.f32("in_b" + std::to_string(i));
  }
  Memory memory;
  for (const auto& [kind, prefix] : {std::pair(Curvature::ggn, "ggn_"), {Curvature::empirical, "ef_"}}) {
    const NamedWeights got = curvature_diagonal(
        memory.device(), [&] { return std::make_unique<LookedUp>(memory.device(), rows); }, images,
        {{1, 1, 1}, {0, 0, 0}}, weights, kind);
    const NamedWeights log_std = laplace_log_std(got, {.tau = 2});
    for (int i = 1; i <= 3; i++)
      for (const auto& [end, letter] : {std::pair(".weight", "W"), {".bias", "b"}}) {
        const std::string ours = "fc" + std::to_string(i) + end, theirs = prefix + (letter + std::to_string(i));
        EXPECT_TRUE(close(got.at(ours), z.f64("out_" + theirs), {.l2 = 1e-5})) << theirs;
        Doubles sigma;
        for (float log : log_std.at(ours)) sigma.push_back(std::exp(double(log)));
        EXPECT_TRUE(close(sigma, z.f64("out_sigma_" + theirs), {.l2 = 1e-5})) << theirs;
      }
  }
}

// 200 real 8x8 digits of five classes, by an independent implementation. order: how its theta holds our tensors.
void check_digits(const std::string& file, const NetworkFactory& make,
                  const std::vector<std::pair<std::string, size_t>>& order, float shift = 0) {
  const Npz z(file);
  const Doubles x = z.f64("X"), theta = z.f64("theta");
  Images images{200, 1, 8, 8, 5, {}, {}};
  for (double value : x) images.pixels.push_back(uint8_t(std::lround(value * 16)));
  for (int64_t y : z.i64("y")) images.labels.push_back(uint8_t(y));
  NamedWeights weights;
  size_t at = 0;
  for (const auto& [name, size] : order) {
    weights[name] = floats(Doubles(theta.begin() + long(at), theta.begin() + long(at + size)));
    at += size;
  }
  ASSERT_EQ(at, theta.size());
  for (float& bias : weights["fc1.bias"]) bias += shift;
  Memory memory;
  for (const auto& [kind, name] : {std::pair(Curvature::ggn, "GGN_sum"), {Curvature::empirical, "EF_sum"}}) {
    const NamedWeights got =
        curvature_diagonal(memory.device(), make, images, {{1.f / 16, 1, 1}, {0, 0, 0}}, weights, kind);
    Doubles all;
    for (const auto& [tensor, size] : order) {
      const auto& sums = got.at(tensor);
      all.insert(all.end(), sums.begin(), sums.end());
    }
    EXPECT_TRUE(close(all, z.f64(name), {.l2 = 2e-5})) << name;
    if (kind != Curvature::ggn) continue;
    Doubles variance;
    const NamedWeights log_std = laplace_log_std(got, {.tau = z.scalar("tau")});
    for (const auto& [tensor, size] : order)
      for (float log : log_std.at(tensor)) variance.push_back(std::exp(2. * log));
    EXPECT_TRUE(close(variance, z.f64("var_ggn"), {.l2 = 2e-5}));
  }
}

TEST(Laplace, GoldenCnn) {  // a convolution, pooling and a dense layer
  BATON_NEEDS_DEVICE();
  check_digits(golden_file("layers/cnn_diag_laplace"), factory({1, 8, 4, 3, 0, Pooling::max2, {5}}),
               {{"conv1.weight", 36}, {"conv1.bias", 4}, {"fc1.weight", 180}, {"fc1.bias", 5}});
}
TEST(Laplace, GoldenTanhMlp) {  // 64-16-5; always-black pixels have no curvature
  BATON_NEEDS_DEVICE();
  Memory memory;
  check_digits(
      golden_file("laplace/mlp_diag_laplace"), [&] { return std::make_unique<TanhNetwork>(memory.device()); },
      {{"fc1.weight", 1024}, {"fc1.bias", 16}, {"fc2.weight", 80}, {"fc2.bias", 5}}, TanhNetwork::shift);
}

TEST(Laplace, StandardDeviations) {
  const NamedWeights sums{{"a.weight", {0, 3, 1e12f}}, {"a.bias", {15}}};
  const NamedWeights plain = laplace_log_std(sums, {});
  EXPECT_FLOAT_EQ(plain.at("a.weight")[0], 0);  // what the data say nothing about keeps the prior
  EXPECT_FLOAT_EQ(plain.at("a.weight")[1], std::log(0.5f));
  EXPECT_FLOAT_EQ(plain.at("a.weight")[2], std::log(1e-4f));  // the floor
  EXPECT_FLOAT_EQ(plain.at("a.bias")[0], std::log(0.25f));
  const NamedWeights wide = laplace_log_std(sums, {.tau = 4, .temperature = 5, .least_sd = 0.4});
  EXPECT_FLOAT_EQ(wide.at("a.weight")[0], std::log(0.5f));
  EXPECT_FLOAT_EQ(wide.at("a.weight")[1], std::log(1 / std::sqrt(4.6f)));
  EXPECT_FLOAT_EQ(wide.at("a.weight")[2], std::log(0.4f));
  EXPECT_FLOAT_EQ(wide.at("a.bias")[0], std::log(0.4f));
  for (double wrong : {0., -1., double(NAN)}) {
    EXPECT_THROW(laplace_log_std(sums, {.tau = wrong}), InputError);
    EXPECT_THROW(laplace_log_std(sums, {.temperature = wrong}), InputError);
    EXPECT_THROW(laplace_log_std(sums, {.least_sd = wrong}), InputError);
  }
}

TEST(Laplace, RefusesWhatDoesNotFit) {
  BATON_NEEDS_DEVICE();
  const Shape& s = shapes[0];
  const NamedWeights weights = random_weights(s, 5);
  const Images images = random_images(s, 3, 4, 6);
  NamedWeights less = weights, shorter = weights;
  less.erase("fc1.bias");
  shorter["fc1.weight"].pop_back();
  EXPECT_NO_THROW(curvature(s, images, weights, Curvature::empirical));
  EXPECT_THROW(curvature(s, images, less, Curvature::ggn), InputError);
  EXPECT_THROW(curvature(s, images, shorter, Curvature::ggn), InputError);
  EXPECT_THROW(curvature(s, Images{0, 2, 6, 6, 4, {}, {}}, weights, Curvature::ggn), InputError);
  EXPECT_EQ(parse_curvature("ggn"), Curvature::ggn);
  EXPECT_EQ(parse_curvature("empirical"), Curvature::empirical);
  EXPECT_STREQ(name(Curvature::empirical), "empirical");
  EXPECT_THROW(parse_curvature("hessian"), InputError);
}

}  // namespace
}  // namespace baton::test
