#include "layers/dense.h"

#include <nlohmann/json.hpp>

#include "tests/support/device.h"
#include "tests/support/small_network.h"

namespace baton::test {
namespace {

constexpr uint32_t stream_id = 3;

// A golden dense layer: y = m + sqrt(v) eps without ReLU, with the gradients of sum(up y).
struct Golden {
  explicit Golden(const std::string& name)
      : z(golden_file("layers/" + name)), x(z.f32("in_x")), up(z.f64("up_y")), eps(z.f64("eps")) {
    const auto meta = nlohmann::json::parse(z.text("meta_json"));
    const bool integers = z.has("in_mu_q");
    mean = z.f64(integers ? "in_mu_q" : "in_mu"), sd = z.f64(integers ? "in_sigma_q" : "in_sigma");
    if (integers) {
      for (double& v : mean) v *= meta["mu_scale"].get<double>();
      for (double& v : sd) v *= meta["sigma_scale"].get<double>();
    }
    batch = int(z.shape("in_x")[0]), in = int(z.shape("in_x")[1]), out = int(z.shape("out_m")[1]);
    bias_mean = z.has("in_b_mu") ? z.f64("in_b_mu") : Doubles(out, 0);
    bias_sd = z.has("in_b_sigma") ? z.f64("in_b_sigma") : Doubles(out, 0);
  }
  Npz z;
  int batch, in, out;
  std::vector<float> x;
  Doubles up, eps, mean, sd, bias_mean, bias_sd;
};

class DenseGolden : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Layers, DenseGolden,
                         testing::Values("ffg_dense_small_gauss", "ffg_dense_small_detbias", "ffg_dense_small_nobias",
                                         "ffg_dense_odd", "ffg_dense_tiny_sigma", "ffg_dense_zero_row",
                                         "ffg_dense_full_lenet_fc1", "ffg_dense_full_lenet_fc2"));

TEST_P(DenseGolden, TheReferenceIsRight) {
  const Golden golden(GetParam());
  ReferenceLayer r = ReferenceLayer::dense(golden.batch, golden.in, golden.out);
  r.mean = golden.mean, r.variance = squares(golden.sd);
  r.bias_mean = golden.bias_mean, r.bias_variance = squares(golden.bias_sd);
  r.forward(doubles(golden.x), golden.eps);
  r.backward(golden.up);
  const double tolerance = golden.z.has("in_log_sigma") ? 1e-12 : 1e-7;  // the big cases are stored in float32
  expect_golden(golden.z, "out_m", r.m, tolerance);
  expect_golden(golden.z, "out_v", r.v, tolerance);
  expect_golden(golden.z, "out_y", r.y, tolerance);
  expect_golden(golden.z, "g_x", r.g_x, tolerance);
  expect_golden(golden.z, "g_mu", r.g_mean, tolerance);
  expect_golden(golden.z, "g_sigma", sigma_gradient(floats(r.g_variance), golden.sd), 1e-7);
  if (golden.z.has("g_b_mu")) expect_golden(golden.z, "g_b_mu", r.g_bias_mean, tolerance);
}

// The layer draws its own noise e, so y is checked as out_m + sqrt(out_v) e. Of its gradients, the ones through the
// mean do not depend on the noise; those through the variance are linear in up e, so an upstream gradient of
// up eps / e brings out the golden ones.
TEST_P(DenseGolden, TheLayerAgrees) {
  BATON_NEEDS_DEVICE();
  const Golden golden(GetParam());
  ParameterLayout layout;
  Dense layer(layout, "fc", golden.in, golden.out, false, stream_id);
  LayerBench bench(layout, 1, golden.batch, true, golden.in);
  layer.prepare(bench.context(), true);
  bench.set("fc.weight", floats(golden.mean), floats(squares(golden.sd)));
  bench.set("fc.bias", floats(golden.bias_mean), floats(squares(golden.bias_sd)));
  bench.set_input(golden.x);
  const Signal& y = layer.output().signal;
  const size_t outputs = golden.up.size(), inputs = golden.x.size();
  const Doubles e = dense_noise(bench.state(0), stream_id, golden.batch, golden.out);

  layer.forward(bench.x(), bench.pass());
  const Doubles m = golden.z.f64("out_m"), v = golden.z.f64("out_v");
  Doubles want, square;
  for (size_t i = 0; i < outputs; i++)
    want.push_back(m[i] + std::sqrt(v[i]) * e[i]), square.push_back(want[i] * want[i]);
  EXPECT_TRUE(close(bench.read(y.value, outputs), want, {.l2 = 1e-6}));
  EXPECT_TRUE(close(bench.read(y.square, outputs), square, {.l2 = 2e-6}));

  const auto backward = [&](const Doubles& up) {
    bench.write(y.grad, floats(up));
    bench.write(y.grad_square, std::vector<float>(outputs, 0));
    layer.backward(bench.x(), bench.pass());
  };
  backward(golden.up);
  expect_golden(golden.z, "g_mu", doubles(bench.mean_gradient("fc.weight")), 1e-6);
  if (golden.z.has("g_b_mu")) expect_golden(golden.z, "g_b_mu", doubles(bench.mean_gradient("fc.bias")), 1e-6);
  const std::vector<float> through_mean = bench.read(bench.x().signal.grad, inputs);
  Doubles up = golden.up;
  for (size_t i = 0; i < outputs; i++) up[i] *= golden.eps[i] / e[i];
  backward(up);
  expect_golden(golden.z, "g_sigma", sigma_gradient(bench.variance_gradient("fc.weight"), golden.sd), 5e-6);
  if (golden.z.has("g_b_sigma"))
    expect_golden(golden.z, "g_b_sigma", sigma_gradient(bench.variance_gradient("fc.bias"), golden.bias_sd), 5e-6);
  expect_golden(golden.z, "g_x",
                total_gradient(golden.x, through_mean, bench.read(bench.x().signal.grad_square, inputs)), 5e-6);
  EXPECT_TRUE(bench.gaps_untouched());
}

struct Shape {
  int replicas, batch, in, out;
  bool relu, feeds_layer, sampled;
};

// What a layer leaves behind, every replica after the other.
struct Left {
  std::vector<float> y, x_grad, x_grad_square, weight_mean, weight_variance, bias_mean, bias_variance;
};
void expect_same(const std::vector<float>& got, const std::vector<float>& want) { EXPECT_TRUE(exact(got, want)); }

// Runs replicas first..first + count of a problem that `seed` fixes; checks each against the reference if asked to.
Left run(Shape s, int first, int count, bool check) {
  SCOPED_TRACE(testing::Message() << "[" << s.batch << "][" << s.in << "] -> " << s.out << ", relu " << s.relu
                                  << ", feeds a layer " << s.feeds_layer << ", sampled " << s.sampled);
  ParameterLayout layout;
  Dense layer(layout, "fc", s.in, s.out, s.relu, stream_id);
  LayerBench bench(layout, count, s.batch, s.sampled, s.in);
  layer.prepare(bench.context(), s.feeds_layer && s.sampled);
  std::vector<StepState> states;
  std::vector<float> x, up, up_square;
  const auto append = [](std::vector<float>& to, const std::vector<float>& more) {
    to.insert(to.end(), more.begin(), more.end());
  };
  std::vector<ReferenceLayer> references;
  for (int r = first; r < first + count; r++) {
    const unsigned seed = unsigned(100 * r);
    ReferenceLayer ref = ReferenceLayer::dense(s.batch, s.in, s.out);
    const auto mean = random_normal(ref.weights(), 0, 0.3f, seed + 1);
    const auto variance = random_uniform(ref.weights(), 0, 0.1f, seed + 2);
    const auto bias_mean = random_normal(s.out, 0, 0.3f, seed + 3),
               bias_variance = random_uniform(s.out, 0, 0.1f, seed + 4);
    bench.set("fc.weight", mean, variance, r - first);
    bench.set("fc.bias", bias_mean, bias_variance, r - first);
    append(x, random_normal(ref.inputs(), 0.2f, 1, seed + 5));
    append(up, random_normal(ref.outputs(), 0, 1, seed + 6));
    append(up_square, random_normal(ref.outputs(), 0, 0.3f, seed + 7));
    ref.mean = doubles(mean), ref.bias_mean = doubles(bias_mean);
    if (s.sampled) ref.variance = doubles(variance), ref.bias_variance = doubles(bias_variance);
    references.push_back(ref);
    states.push_back(state_of(uint64_t(r), uint32_t(40 + r)));
  }
  bench.set_states(states);
  bench.set_input(x);
  const Signal& y = layer.output().signal;
  EXPECT_EQ(y.square != nullptr, s.feeds_layer && s.sampled);
  EXPECT_EQ(y.grad_square != nullptr, s.feeds_layer && s.sampled);
  layer.forward(bench.x(), bench.pass());
  Left left;
  left.y = bench.read(y.value, up.size());
  bench.write(y.grad, up);
  if (y.grad_square) bench.write(y.grad_square, up_square);
  layer.backward(bench.x(), bench.pass());
  left.x_grad = bench.read(bench.x().signal.grad, x.size());
  if (s.sampled) left.x_grad_square = bench.read(bench.x().signal.grad_square, x.size());
  for (int r = 0; r < count; r++) {
    append(left.weight_mean, bench.mean_gradient("fc.weight", r));
    append(left.bias_mean, bench.mean_gradient("fc.bias", r));
    append(left.weight_variance, bench.variance_gradient("fc.weight", r));
    append(left.bias_variance, bench.variance_gradient("fc.bias", r));
  }
  EXPECT_TRUE(bench.gaps_untouched());
  for (int r = 0; check && r < count; r++) {
    ReferenceLayer& ref = references[r];
    const size_t ni = ref.inputs(), no = ref.outputs();
    const auto part = [r](const std::vector<float>& all, size_t n) {
      return std::vector<float>(all.begin() + long(r * n), all.begin() + long((r + 1) * n));
    };
    ref.forward(doubles(part(x, ni)), dense_noise(states[r], stream_id, s.batch, s.out));
    Doubles want = ref.y;
    if (s.relu)
      for (double& v : want) v = std::max(0.0, v);
    EXPECT_TRUE(close(part(left.y, no), want, {.l2 = 2e-6}));
    Doubles g = total_gradient(floats(want), part(up, no), y.grad_square ? part(up_square, no) : std::vector<float>());
    for (size_t i = 0; i < no; i++)
      if (s.relu && want[i] <= 0) g[i] = 0;
    ref.backward(g);
    EXPECT_TRUE(close(bench.mean_gradient("fc.weight", r), ref.g_mean, {.l2 = 2e-6}));
    EXPECT_TRUE(close(bench.mean_gradient("fc.bias", r), ref.g_bias_mean, {.l2 = 2e-6}));
    EXPECT_TRUE(close(total_gradient(part(x, ni), part(left.x_grad, ni),
                                     s.sampled ? part(left.x_grad_square, ni) : std::vector<float>()),
                      ref.g_x, {.l2 = 2e-6}));
    if (!s.sampled) continue;
    EXPECT_TRUE(close(bench.variance_gradient("fc.weight", r), ref.g_variance, {.l2 = 5e-6}));
    EXPECT_TRUE(close(bench.variance_gradient("fc.bias", r), ref.g_bias_variance, {.l2 = 5e-6}));
  }
  return left;
}

TEST(DenseLayer, AgainstReference) {
  BATON_NEEDS_DEVICE();
  for (bool sampled : {true, false})
    for (bool relu : {true, false})
      for (bool feeds_layer : {true, false}) {
        run({1, 5, 33, 22, relu, feeds_layer, sampled}, 0, 1, true);
        run({3, 3, 17, 10, relu, feeds_layer, sampled}, 0, 3, true);
      }
  run({2, 1, 1, 5, true, true, true}, 0, 2, true);
  run({1, 17, 120, 131, true, true, true}, 0, 1, true);
}

TEST(DenseLayer, ReplicasDoNotSeeEachOther) {
  BATON_NEEDS_DEVICE();
  for (bool sampled : {true, false}) {
    const Shape s{3, 6, 40, 21, true, true, sampled};
    const Left all = run(s, 0, 3, false);
    Left one_by_one;
    for (int r = 0; r < 3; r++) {
      const Left one = run(s, r, 1, false);
      for (auto field : {&Left::y, &Left::x_grad, &Left::x_grad_square, &Left::weight_mean, &Left::weight_variance,
                         &Left::bias_mean, &Left::bias_variance})
        (one_by_one.*field).insert((one_by_one.*field).end(), (one.*field).begin(), (one.*field).end());
    }
    for (auto field : {&Left::y, &Left::x_grad, &Left::x_grad_square, &Left::weight_mean, &Left::weight_variance,
                       &Left::bias_mean, &Left::bias_variance})
      expect_same(all.*field, one_by_one.*field);
  }
}

TEST(DenseLayer, NoiseFollowsSeedStreamAndStep) {
  BATON_NEEDS_DEVICE();
  const auto forward = [](uint64_t seed, uint32_t stream, uint32_t step) {
    ParameterLayout layout;
    Dense layer(layout, "fc", 4, 6, false, stream);
    LayerBench bench(layout, 1, 2, true, 4);
    layer.prepare(bench.context(), true);
    bench.set("fc.weight", std::vector<float>(24, 0), std::vector<float>(24, 1));
    bench.set("fc.bias", std::vector<float>(6, 0), std::vector<float>(6, 0));
    bench.set_input(std::vector<float>(8, 0.5f));
    bench.set_states({state_of(seed, step)});
    layer.forward(bench.x(), bench.pass());
    return bench.read(layer.output().signal.value, 12);
  };
  const auto y = forward(1, 2, 3);
  EXPECT_TRUE(close(y, dense_noise(state_of(1, 3), 2, 2, 6), {.l2 = 1e-6}));  // m = 0, v = 1
  EXPECT_TRUE(exact(forward(1, 2, 3), y));
  EXPECT_FALSE(exact(forward(2, 2, 3), y));
  EXPECT_FALSE(exact(forward(1, 1, 3), y));
  EXPECT_FALSE(exact(forward(1, 2, 4), y));
}

}  // namespace
}  // namespace baton::test
