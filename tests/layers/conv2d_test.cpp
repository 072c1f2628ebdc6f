#include "layers/conv2d.h"

#include <nlohmann/json.hpp>

#include "tests/support/device.h"
#include "tests/support/small_network.h"

namespace baton::test {
namespace {

constexpr uint32_t stream_id = 2;

// A golden convolution: y = m + sqrt(v) eps without ReLU, with the gradients of sum(up y).
struct Golden {
  explicit Golden(const std::string& name)
      : z(golden_file("layers/" + name)),
        x(z.f32("in_x")),
        up(z.f64("up_y")),
        eps(z.f64("eps")),
        mean(z.f64("in_mu")),
        sd(z.f64("in_sigma")) {
    const auto in = z.shape("in_x"), w = z.shape("in_mu");
    const int pad = nlohmann::json::parse(z.text("meta_json"))["padding"];
    layer = {int(in[0]), int(in[1]), int(in[2]), int(in[3]), int(w[0]), int(w[2]), pad};
    bias_mean = z.has("in_b_mu") ? z.f64("in_b_mu") : Doubles(layer.out, 0);
    bias_sd = z.has("in_b_sigma") ? z.f64("in_b_sigma") : Doubles(layer.out, 0);
    layer.mean = mean, layer.variance = squares(sd);
    layer.bias_mean = bias_mean, layer.bias_variance = squares(bias_sd);
  }
  Npz z;
  std::vector<float> x;
  Doubles up, eps, mean, sd, bias_mean, bias_sd;
  ReferenceLayer layer{};
};

Conv2d conv_like(ParameterLayout& layout, const ReferenceLayer& r, Pooling pooling) {
  return Conv2d(layout, "conv", r.in, r.height, r.width, r.out, r.kernel, r.pad, pooling, stream_id);
}

class ConvGolden : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Layers, ConvGolden,
                         testing::Values("ffg_conv_lenet1_small", "ffg_conv_lenet2_small",
                                         "ffg_conv_lenet2_small_nobias", "ffg_conv_p1_small", "ffg_conv_p2_small",
                                         "ffg_conv_zero_patch", "ffg_conv_full_lenet2", "ffg_conv_full_3c3fc_conv1"));

TEST_P(ConvGolden, TheReferenceIsRight) {
  Golden golden(GetParam());
  ReferenceLayer& r = golden.layer;
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

// As DenseGolden.TheLayerAgrees. The layer has a ReLU that the goldens lack: its forward pass is compared behind it,
// and a constant in the bias that lifts every pre-activation above 0, and changes no gradient, takes it away.
TEST_P(ConvGolden, TheLayerAgrees) {
  BATON_NEEDS_DEVICE();
  const Golden golden(GetParam());
  const ReferenceLayer& r = golden.layer;
  ParameterLayout layout;
  Conv2d layer = conv_like(layout, r, Pooling::none);
  LayerBench bench(layout, 1, r.batch, true, size_t(r.in) * r.height * r.width);
  layer.prepare(bench.context(), true);
  EXPECT_EQ(layer.out_height(), int(golden.z.shape("out_m")[2]));
  EXPECT_EQ(layer.out_width(), int(golden.z.shape("out_m")[3]));
  bench.set("conv.weight", floats(golden.mean), floats(squares(golden.sd)));
  bench.set("conv.bias", floats(golden.bias_mean), floats(squares(golden.bias_sd)));
  bench.set_input(golden.x);
  const Signal& y = layer.output().signal;
  const size_t outputs = golden.up.size(), inputs = golden.x.size();
  const Doubles e = conv_noise(bench.state(0), stream_id, r.batch, r.out, r.out_height(), r.out_width());

  layer.forward(bench.x(), bench.pass());
  const Doubles m = golden.z.f64("out_m"), v = golden.z.f64("out_v");
  Doubles want, square;
  double top = 0;
  for (size_t i = 0; i < outputs; i++) {
    const double pre = m[i] + std::sqrt(v[i]) * e[i];
    want.push_back(std::max(0.0, pre)), square.push_back(want[i] * want[i]);
    top = std::max(top, std::abs(pre));
  }
  EXPECT_TRUE(close(bench.read(y.value, outputs), want, {.l2 = 1e-6}));
  EXPECT_TRUE(close(bench.read(y.square, outputs), square, {.l2 = 2e-6}));

  const double lift = std::exp2(std::ceil(std::log2(top) + 1));
  Doubles lifted = golden.bias_mean;
  for (double& b : lifted) b += lift;
  bench.set("conv.bias", floats(lifted), floats(squares(golden.bias_sd)));
  const auto backward = [&](const Doubles& up) {
    layer.forward(bench.x(), bench.pass());
    bench.write(y.grad, floats(up));
    bench.write(y.grad_square, std::vector<float>(outputs, 0));
    layer.backward(bench.x(), bench.pass());
  };
  backward(golden.up);
  for (float one : bench.read(y.value, outputs)) ASSERT_GT(one, 0);
  expect_golden(golden.z, "g_mu", doubles(bench.mean_gradient("conv.weight")), 1e-6);
  if (golden.z.has("g_b_mu")) expect_golden(golden.z, "g_b_mu", doubles(bench.mean_gradient("conv.bias")), 1e-6);
  const std::vector<float> through_mean = bench.read(bench.x().signal.grad, inputs);
  Doubles up = golden.up;
  for (size_t i = 0; i < outputs; i++) up[i] *= golden.eps[i] / e[i];
  backward(up);
  expect_golden(golden.z, "g_sigma", sigma_gradient(bench.variance_gradient("conv.weight"), golden.sd), 5e-6);
  if (golden.z.has("g_b_sigma"))
    expect_golden(golden.z, "g_b_sigma", sigma_gradient(bench.variance_gradient("conv.bias"), golden.bias_sd), 5e-6);
  expect_golden(golden.z, "g_x",
                total_gradient(golden.x, through_mean, bench.read(bench.x().signal.grad_square, inputs)), 5e-6);
  EXPECT_TRUE(bench.gaps_untouched());
}

// The problem of one replica: weights, input and upstream gradients, random and fixed by its number.
struct Problem {
  Problem(const ReferenceLayer& shape, size_t outputs, int replica) : layer(shape) {
    const unsigned seed = unsigned(1000 * replica + shape.kernel + shape.pad);
    mean = random_normal(layer.weights(), 0, 0.3f, seed + 1),
    variance = random_uniform(layer.weights(), 0, 0.05f, seed + 2);
    bias_mean = random_normal(layer.out, 0, 0.3f, seed + 3),
    bias_variance = random_uniform(layer.out, 0, 0.1f, seed + 4);
    x = random_normal(layer.inputs(), 0.2f, 1, seed + 5);
    up = random_normal(outputs, 0, 1, seed + 6), up_square = random_normal(outputs, 0, 0.3f, seed + 7);
    state = state_of(uint64_t(replica), uint32_t(60 + replica));
  }
  ReferenceLayer layer;
  std::vector<float> mean, variance, bias_mean, bias_variance, x, up, up_square;
  StepState state;
};

// What is left after both passes, replica after replica.
struct Left {
  std::vector<float> y, square, x_grad, x_grad_square, weight_mean, weight_variance, bias_mean, bias_variance;
  using Field = std::vector<float> Left::*;
  static constexpr Field fields[] = {
      &Left::y,           &Left::square,          &Left::x_grad,    &Left::x_grad_square,
      &Left::weight_mean, &Left::weight_variance, &Left::bias_mean, &Left::bias_variance};
};
void append(std::vector<float>& to, const std::vector<float>& more) { to.insert(to.end(), more.begin(), more.end()); }

int window_of(Pooling pooling) { return pooling == Pooling::none ? 0 : pooling == Pooling::max2 ? 2 : 3; }

// Max pooling as a pass of its own, on the host, behind a convolution that has none.
struct PoolingPass {
  ReferencePool pool;
  std::vector<float> y;

  void forward(const std::vector<float>& x, int planes, const ReferenceLayer& r, int window) {
    y = floats(pool.forward(doubles(x), planes, r.out_height(), r.out_width(), window));
  }
  // The gradient of x: that of y and of its square together, from the outputs up to the inputs.
  std::vector<float> backward(std::vector<float> up, const std::vector<float>& up_square, size_t inputs) const {
    for (size_t i = 0; i < up_square.size(); i++) up[i] += 2.f * y[i] * up_square[i];
    return floats(pool.backward(doubles(up), inputs));
  }
};

// apart: a convolution without pooling, and a pass of pooling behind it.
Left run(const std::vector<Problem>& problems, Pooling pooling, bool sampled, bool apart = false,
         bool input_gradient = true) {
  const ReferenceLayer& r = problems[0].layer;
  ParameterLayout layout;
  Conv2d layer = conv_like(layout, r, apart ? Pooling::none : pooling);
  const int count = int(problems.size());
  LayerBench bench(layout, count, r.batch, sampled, size_t(r.in) * r.height * r.width, input_gradient);
  layer.prepare(bench.context(), sampled);
  std::vector<StepState> states;
  std::vector<float> x, up, up_square;
  for (int i = 0; i < count; i++) {
    const Problem& p = problems[i];
    bench.set("conv.weight", p.mean, p.variance, i);
    bench.set("conv.bias", p.bias_mean, p.bias_variance, i);
    append(x, p.x), append(up, p.up), append(up_square, p.up_square);
    states.push_back(p.state);
  }
  bench.set_states(states);
  bench.set_input(x);
  const Signal& y = layer.output().signal;
  layer.forward(bench.x(), bench.pass());
  Left left;
  if (apart) {
    const size_t outputs = count * r.outputs();
    PoolingPass pool;
    pool.forward(bench.read(y.value, outputs), count * r.batch * r.out, r, window_of(pooling));
    left.y = pool.y;
    for (float one : pool.y)
      if (sampled) left.square.push_back(one * one);
    up = pool.backward(up, sampled ? up_square : std::vector<float>(), outputs);
    up_square.assign(outputs, 0);
  } else {
    left.y = bench.read(y.value, up.size());
    if (sampled) left.square = bench.read(y.square, up.size());
  }
  bench.write(y.grad, up);
  if (sampled) bench.write(y.grad_square, up_square);
  layer.backward(bench.x(), bench.pass());
  if (input_gradient) left.x_grad = bench.read(bench.x().signal.grad, x.size());
  if (input_gradient && sampled) left.x_grad_square = bench.read(bench.x().signal.grad_square, x.size());
  for (int i = 0; i < count; i++) {
    append(left.weight_mean, bench.mean_gradient("conv.weight", i));
    append(left.bias_mean, bench.mean_gradient("conv.bias", i));
    if (!sampled) continue;
    append(left.weight_variance, bench.variance_gradient("conv.weight", i));
    append(left.bias_variance, bench.variance_gradient("conv.bias", i));
  }
  EXPECT_TRUE(bench.gaps_untouched());
  return left;
}

size_t pooled_outputs(const ReferenceLayer& r, Pooling pooling) {
  if (pooling == Pooling::none) return r.outputs();
  const auto side = [&](int n) { return size_t(n - window_of(pooling)) / 2 + 1; };
  return size_t(r.batch) * r.out * side(r.out_height()) * side(r.out_width());
}
std::vector<Problem> problems_of(const ReferenceLayer& shape, Pooling pooling, int first, int count) {
  std::vector<Problem> problems;
  for (int i = first; i < first + count; i++) problems.emplace_back(shape, pooled_outputs(shape, pooling), i);
  return problems;
}

// Where cuDNN runs no product for a gradient, a transform gives it (engine/blas.h), with larger errors.
const double gradient_error = on_gpu ? 5e-6 : 2e-6, variance_gradient_error = on_gpu ? 1e-5 : 5e-6;

void check_against_reference(const ReferenceLayer& shape, Pooling pooling, bool sampled) {
  SCOPED_TRACE(testing::Message() << shape.batch << "x" << shape.in << "x" << shape.height << "x" << shape.width
                                  << " -> " << shape.out << ", kernel " << shape.kernel << ", pad " << shape.pad
                                  << ", window " << window_of(pooling) << ", sampled " << sampled);
  const auto problems = problems_of(shape, pooling, 0, 1);
  const Left got = run(problems, pooling, sampled);
  const Problem& p = problems[0];
  ReferenceLayer r = shape;
  r.mean = doubles(p.mean), r.bias_mean = doubles(p.bias_mean);
  if (sampled) r.variance = doubles(p.variance), r.bias_variance = doubles(p.bias_variance);
  r.forward(doubles(p.x), conv_noise(p.state, stream_id, r.batch, r.out, r.out_height(), r.out_width()));
  ReferencePool pool;
  const Doubles& y = pool.forward(r.y, r.batch * r.out, r.out_height(), r.out_width(), window_of(pooling));
  const Doubles up = total_gradient(floats(y), p.up, sampled ? p.up_square : std::vector<float>());
  r.backward(pool.backward(up, r.outputs()));
  EXPECT_TRUE(close(got.y, y, {.l2 = 2e-6}));
  EXPECT_TRUE(close(got.weight_mean, r.g_mean, {.l2 = gradient_error}));
  EXPECT_TRUE(close(got.bias_mean, r.g_bias_mean, {.l2 = 5e-6}));
  EXPECT_TRUE(close(total_gradient(p.x, got.x_grad, got.x_grad_square), r.g_x, {.l2 = gradient_error}));
  if (!sampled) return;
  EXPECT_TRUE(close(got.square, squares(y), {.l2 = 4e-6}));
  EXPECT_TRUE(close(got.weight_variance, r.g_variance, {.l2 = variance_gradient_error}));
  EXPECT_TRUE(close(got.bias_variance, r.g_bias_variance, {.l2 = 1e-5}));
}

const std::vector<ReferenceLayer> shapes = {{2, 1, 12, 12, 3, 5, 0},  {3, 2, 7, 7, 5, 5, 1},  {1, 3, 9, 10, 4, 5, 2},
                                            {2, 4, 6, 5, 3, 3, 1},    {2, 3, 11, 8, 9, 3, 0}, {1, 6, 5, 5, 2, 1, 0},
                                            {2, 20, 12, 12, 10, 5, 0}};

TEST(ConvLayer, AgainstReference) {
  BATON_NEEDS_DEVICE();
  for (const ReferenceLayer& shape : shapes)
    for (Pooling pooling : {Pooling::none, Pooling::max2, Pooling::max3})
      for (bool sampled : {true, false}) check_against_reference(shape, pooling, sampled);
}

TEST(ConvLayer, ReplicasDoNotSeeEachOther) {
  BATON_NEEDS_DEVICE();
  for (Pooling pooling : {Pooling::none, Pooling::max2, Pooling::max3})
    for (bool sampled : {true, false}) {
      const Left all = run(problems_of(shapes[2], pooling, 0, 3), pooling, sampled);
      Left one_by_one;
      for (int i = 0; i < 3; i++) {
        const Left one = run(problems_of(shapes[2], pooling, i, 1), pooling, sampled);
        for (auto field : Left::fields) append(one_by_one.*field, one.*field);
      }
      for (auto field : Left::fields) EXPECT_TRUE(exact(all.*field, one_by_one.*field));
    }
}

TEST(ConvLayer, FusedPoolingIsPoolingAfterwards) {
  BATON_NEEDS_DEVICE();
  for (const ReferenceLayer& shape : shapes)
    for (const auto& [pooling, sampled] :
         {std::pair(Pooling::max2, true), {Pooling::max2, false}, {Pooling::max3, true}, {Pooling::max3, false}}) {
      SCOPED_TRACE(testing::Message() << shape.height << "x" << shape.width << ", window " << window_of(pooling)
                                      << ", sampled " << sampled);
      std::vector<Problem> problems = problems_of(shape, pooling, 0, 2);
      Left fused = run(problems, pooling, sampled), apart = run(problems, pooling, sampled, true);
      // The fused pass adds the bias to the maximum, so the two round differently.
      for (auto field : Left::fields)
        EXPECT_TRUE((apart.*field).empty() || close(fused.*field, apart.*field, {.l2 = 2e-6}));
      // Without bias means they do the same, but for the order in which gradients are added up: those of the biases,
      // and those of windows that overlap.
      for (Problem& p : problems) p.bias_mean.assign(p.bias_mean.size(), 0);
      fused = run(problems, pooling, sampled), apart = run(problems, pooling, sampled, true);
      for (auto field : Left::fields) {
        const bool bias = field == &Left::bias_mean || (field == &Left::bias_variance && sampled);
        const bool overlap = pooling == Pooling::max3 && field != &Left::y && field != &Left::square;
        EXPECT_TRUE(((bias || overlap) && !(apart.*field).empty()) ? close(fused.*field, apart.*field, {.l2 = 1e-6})
                                                                   : exact(fused.*field, apart.*field));
      }
    }
}

TEST(ConvLayer, TheFirstLayerNeedsNoInputGradient) {
  BATON_NEEDS_DEVICE();
  for (Pooling pooling : {Pooling::none, Pooling::max2, Pooling::max3})
    for (bool sampled : {true, false}) {
      const auto problems = problems_of(shapes[0], pooling, 0, 2);
      const Left with = run(problems, pooling, sampled), without = run(problems, pooling, sampled, false, false);
      for (auto field : Left::fields)
        EXPECT_TRUE(field == &Left::x_grad || field == &Left::x_grad_square || exact(without.*field, with.*field));
    }
}

TEST(ConvLayer, AVanishingSigmaIsThePointPosterior) {
  BATON_NEEDS_DEVICE();
  for (Pooling pooling : {Pooling::none, Pooling::max2, Pooling::max3}) {
    auto problems = problems_of(shapes[1], pooling, 0, 1);
    for (auto field : {&Problem::variance, &Problem::bias_variance, &Problem::up_square})
      (problems[0].*field).assign((problems[0].*field).size(), 0);
    const Left sampled = run(problems, pooling, true), point = run(problems, pooling, false);
    for (auto field : {&Left::y, &Left::x_grad, &Left::weight_mean, &Left::bias_mean})
      EXPECT_TRUE(exact(sampled.*field, point.*field));
    for (auto field : {&Left::weight_variance, &Left::bias_variance, &Left::x_grad_square})
      for (float g : sampled.*field) EXPECT_EQ(g, 0);
  }
}

TEST(ConvLayer, RefusesShapesWithoutOutput) {
  BATON_NEEDS_DEVICE();
  ParameterLayout layout;
  Conv2d layer(layout, "conv", 1, 4, 4, 2, 5, 0, Pooling::none, 0);
  LayerBench bench(layout, 1, 1, true, 16);
  EXPECT_THROW(layer.prepare(bench.context(), true), InputError);
}

}  // namespace
}  // namespace baton::test
