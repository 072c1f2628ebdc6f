#include "kernels/bgd.h"

#include <algorithm>
#include <memory>
#include <random>

#include "tests/kernels/bgd_fixture.h"
#include "tests/support/device.h"
#include "tests/support/precision.h"

namespace baton::test {
namespace {

std::vector<float> integers(size_t n, int seed, int most = 3) {
  std::mt19937 random(seed);
  std::vector<float> v(n);
  for (float& x : v) x = float(int(random() % (2 * most + 1)) - most);
  return v;
}
double ks_distance(std::vector<double> x) {  // from N(0, 1)
  std::sort(x.begin(), x.end());
  double worst = 0;
  for (size_t i = 0; i < x.size(); i++) {
    const double p = 0.5 * std::erfc(-x[i] / std::sqrt(2.));
    worst = std::max({worst, p - double(i) / x.size(), double(i + 1) / x.size() - p});
  }
  return worst;
}

// ----------------------------------------------------------------------------------------------------------- draws
std::vector<float> draws_of(const std::vector<float>& mean, const std::vector<float>& sd, size_t stride, int first_draw,
                            int draws, const std::vector<StepState>& states) {
  Memory memory;
  Buffer m(memory, mean), s(memory, sd);
  Buffer device_states(memory, states);
  Buffer<float> w(memory, stride * draws, 9.f);
  draw_weights(w, stride, m, s, int(mean.size()), first_draw, draws, device_states, memory.stream());
  return w.host();
}
std::vector<float> draws_of(const std::vector<float>& mean, const std::vector<float>& sd, size_t stride, int first_draw,
                            int draws, Key key) {
  Memory memory;
  Buffer m(memory, mean), s(memory, sd);
  Buffer<float> w(memory, stride * draws, 9.f);
  draw_weights(w, stride, m, s, int(mean.size()), first_draw, draws, key, memory.stream());
  return w.host();
}

void check_mapping(int count, int first_draw, int draws) {
  SCOPED_TRACE(testing::Message() << count << " weights, draws from " << first_draw << ": " << draws);
  const size_t stride = (count + 3) / 4 * 4 + 4;
  const std::vector<StepState> states = states_of(17, 1, 2);
  const std::vector<float> zero(count), one(count, 1.f), mean = normals(count, 1), sd = deviations(count, 2);
  const std::vector<float> noise = draws_of(zero, one, stride, first_draw, draws, states);
  const std::vector<float> scaled = draws_of(mean, sd, stride, first_draw, draws, states);
  const std::vector<float> predicted = draws_of(zero, one, stride, first_draw, draws, key_of(3));
  StepState first_step{};
  first_step.noise = key_of(3);
  std::vector<float> want(stride * draws, 9.f), want_predicted = want;
  for (int k = 0; k < draws; k++)
    for (int i = 0; i < count; i++) {
      const size_t at = stride * k + i;
      want[at] = noise_of(states[0], first_draw + k, i);
      want_predicted[at] = noise_of(first_step, first_draw + k, i);
      const double value = double(mean[i]) + double(sd[i]) * want[at];
      ASSERT_NEAR(scaled[at], value, 1.2e-7 * (std::abs(mean[i]) + std::abs(sd[i] * want[at]))) << k << ", " << i;
    }
  EXPECT_TRUE(exact(noise, want));
  EXPECT_TRUE(exact(predicted, want_predicted));
  for (size_t at = 0; at < scaled.size(); at++) {
    if (at % stride >= size_t(count)) {
      ASSERT_EQ(scaled[at], 9.f) << at;
    }
  }
}

TEST(DrawWeights, SmallMapping) {
  BATON_NEEDS_DEVICE();
  for (int count : {3, 11}) check_mapping(count, 3, 2);
}

TEST(DrawWeights, Mapping) {
  BATON_NEEDS_DEVICE();
  for (int count : {1, 2, 4, 5, 8, 31, 255, 256, 258, 1021, 4099}) check_mapping(count, 0, 3);
  check_mapping(13, 0, 10);
  check_mapping(7, 1000, 1);
}

TEST(DrawWeights, SmallDoNotDependOnHowManyAtOnce) {
  BATON_NEEDS_DEVICE();
  const std::vector<StepState> states = states_of(4);
  const std::vector<float> mean = normals(10, 1), sd = deviations(10, 2);
  const size_t stride = 12;
  const std::vector<float> all = draws_of(mean, sd, stride, 0, 6, states);
  for (int first : {0, 1, 4})
    for (int draws : {1, 2}) {
      const std::vector<float> some = draws_of(mean, sd, stride, first, draws, states);
      EXPECT_TRUE(
          exact(some, std::vector<float>(all.begin() + stride * first, all.begin() + stride * (first + draws))));
    }
  // Nor on how many weights there are.
  const std::vector<float> mean7(mean.begin(), mean.begin() + 7), sd7(sd.begin(), sd.begin() + 7);
  const std::vector<float> fewer = draws_of(mean7, sd7, stride, 2, 1, states);
  for (int i = 0; i < 7; i++) EXPECT_EQ(fewer[i], all[2 * stride + i]) << i;
}

TEST(DrawWeights, SmallCertainWeightsAreTheMeans) {
  BATON_NEEDS_DEVICE();
  std::vector<float> mean = normals(9, 1);
  mean[3] = 0, mean[4] = 1e-42f, mean[5] = 3e38f;
  const std::vector<float> w = draws_of(mean, std::vector<float>(9), 9, 2, 2, states_of(8));
  for (int k = 0; k < 2; k++)
    EXPECT_EQ(bits(std::vector<float>(w.begin() + 9 * k, w.begin() + 9 * (k + 1))), bits(mean)) << k;
}

TEST(DrawWeights, Distribution) {
  BATON_NEEDS_DEVICE();
  const int count = 501, draws = 40;
  const std::vector<float> mean = normals(count, 2, 0, 0.1f), sd = deviations(count, 3);
  const std::vector<float> w = draws_of(mean, sd, count, 0, draws, states_of(1)),
                           later = draws_of(mean, sd, count, 0, draws, states_of(2));
  record("bgd.draw_weights", w, 0);
  std::vector<double> e, then;
  for (size_t at = 0; at < w.size(); at++) {
    e.push_back((double(w[at]) - mean[at % count]) / sd[at % count]);
    then.push_back((double(later[at]) - mean[at % count]) / sd[at % count]);
  }
  double sum = 0, square = 0, fourth = 0, neighbours = 0, between_draws = 0, between_steps = 0;
  for (size_t at = 0; at < e.size(); at++) {
    sum += e[at], square += e[at] * e[at], fourth += std::pow(e[at], 4);
    if (at) neighbours += e[at] * e[at - 1];
    if (at >= size_t(count)) between_draws += e[at] * e[at - count];
    between_steps += e[at] * then[at];
  }
  const double n = double(e.size()), limit = 4 / std::sqrt(n);
  EXPECT_NEAR(sum / n, 0, limit);
  EXPECT_NEAR(square / n, 1, 1.5 * limit);
  EXPECT_NEAR(fourth / n, 3, 10 * limit);
  EXPECT_NEAR(neighbours / n, 0, limit);
  EXPECT_NEAR(between_draws / n, 0, limit);
  EXPECT_NEAR(between_steps / n, 0, limit);
  EXPECT_LT(ks_distance(e) * std::sqrt(n), 1.95);  // one in a thousand
}

// --------------------------------------------------------------------------------------------------------- moments
struct Sums {
  std::vector<double> sum, noise;
};
// Of gradients [draws][grad_stride]; what the store held before is added to.
void add_moments(Sums& sums, const std::vector<double>& grad, size_t grad_stride, int first, int count, DrawnPass pass,
                 const StepState& state) {
  for (int i = 0; i < count; i++) {
    double sum = 0, noise = 0;
    for (int k = 0; k < pass.draws; k++) {
      const double g = grad[grad_stride * k + i];
      sum += g, noise += g * noise_of(state, pass.first_draw + k, first + i);
    }
    sums.sum[first + i] = pass.add ? sums.sum[first + i] + sum : sum;
    sums.noise[first + i] = pass.add ? sums.noise[first + i] + noise : noise;
  }
}

// The moments on the device, and what they should be. Both begin as numbers that nobody may touch outside a pass.
struct MomentStore {
  MomentStore(size_t size, std::vector<StepState> states_)
      : states(std::move(states_)),
        want{doubles(normals(size, 70, 100)), doubles(normals(size, 71, -100))},
        device_states(memory, states),
        sum(memory, normals(size, 70, 100)),
        noise(memory, normals(size, 71, -100)) {}
  Moments moments() { return {sum, noise}; }
  void begin(int first, int count) {  // what a pass that does not add must overwrite
    std::vector<float> s = sum.host(), n = noise.host();
    std::fill_n(s.begin() + first, count, NAN), std::fill_n(n.begin() + first, count, NAN);
    sum.set(s), noise.set(n);
  }
  void check(int first, int count, bool whole_numbers, double l2 = 1e-6) {
    const std::vector<float> s = sum.host(), n = noise.host();
    auto cut = [&](const auto& v) { return doubles(std::vector(v.begin() + first, v.begin() + first + count)); };
    if (whole_numbers) {
      EXPECT_TRUE(exact(cut(s), cut(want.sum)));
    } else {
      EXPECT_TRUE(close(cut(s), cut(want.sum), {.l2 = l2, .worst = 20 * l2}));
    }
    EXPECT_TRUE(close(cut(n), cut(want.noise), {.l2 = l2, .worst = 20 * l2}));
    for (int i = 0; i < int(s.size()); i++)
      if (i < first || i >= first + count) {
        ASSERT_EQ(s[i], want.sum[i]) << i;
        ASSERT_EQ(n[i], want.noise[i]) << i;
      }
  }

  Memory memory;
  std::vector<StepState> states;
  Sums want;
  Buffer<StepState> device_states;
  Buffer<float> sum, noise;
};

void check_accumulation(int first, int count, int draws) {
  SCOPED_TRACE(testing::Message() << count << " weights from " << first << ", " << draws << " draws");
  MomentStore store(first + count + 5, states_of(9, 1, 2));
  const size_t stride = count + 3;
  const std::vector<float> grad = normals(stride * draws, 1), whole = integers(stride * draws, 2);
  Buffer g(store.memory, grad), h(store.memory, whole);
  DrawnPass pass{2, draws, false};
  store.begin(first, count);
  accumulate_moments(store.moments(), h, stride, first, count, pass, store.device_states, store.memory.stream());
  add_moments(store.want, doubles(whole), stride, first, count, pass, store.states[0]);
  store.check(first, count, true);
  pass = {2 + draws, draws, true};
  accumulate_moments(store.moments(), g, stride, first, count, pass, store.device_states, store.memory.stream());
  add_moments(store.want, doubles(grad), stride, first, count, pass, store.states[0]);
  store.check(first, count, false);
}

TEST(Moments, SmallAccumulation) {
  BATON_NEEDS_DEVICE();
  check_accumulation(4, 6, 2);
  check_accumulation(3, 5, 2);
}

TEST(Moments, Accumulation) {
  BATON_NEEDS_DEVICE();
  for (int first : {0, 1, 2, 3, 4, 9})
    for (int count : {1, 2, 5, 8}) check_accumulation(first, count, 2);
  for (int draws : {1, 3, 10}) check_accumulation(64, 77, draws);
  check_accumulation(0, 4097, 3);
  check_accumulation(12, 2050, 3);
  check_accumulation(1003, 1025, 5);
  check_accumulation(510, 259, 10);
}

TEST(Moments, SmallTwoPassesAreOne) {
  BATON_NEEDS_DEVICE();
  const int first = 6, count = 11;
  const size_t stride = 12;
  const std::vector<float> grad = normals(stride * 10, 4);
  MomentStore one(24, states_of(3)), two(24, states_of(3));
  Buffer g(one.memory, grad);
  accumulate_moments(one.moments(), g, stride, first, count, {0, 10, false}, one.device_states, one.memory.stream());
  accumulate_moments(two.moments(), g, stride, first, count, {0, 5, false}, two.device_states, two.memory.stream());
  accumulate_moments(two.moments(), g.data() + 5 * stride, stride, first, count, {5, 5, true}, two.device_states,
                     two.memory.stream());
  EXPECT_TRUE(close(two.sum.host(), one.sum.host(), {.l2 = 2e-7}));
  EXPECT_TRUE(close(two.noise.host(), one.noise.host(), {.l2 = 2e-7}));
  add_moments(one.want, doubles(grad), stride, first, count, {0, 10, false}, one.states[0]);
  one.check(first, count, false);
}

using ProductMoments = void (*)(Device&, Moments, int, int, int, int, Matrices, Matrices, DrawnPass, const StepState*);
struct ProductWay {
  const char* name;
  ProductMoments run;
  bool everywhere = true;  // on a GPU too: then it is recorded
};
const std::vector<ProductWay> product_ways = [] {
  std::vector<ProductWay> ways{{"fused", product_moments_fused}, {"default", accumulate_product_moments}};
  if (!on_gpu) ways.push_back({"tiles", product_moments_by_tiles, false});
  return ways;
}();

struct ProductShape {
  int first, out, in, batch, draws;
  bool shared = false;  // the inputs, by all draws
};

// g_k = dy_k^T x_k, in double.
std::vector<double> products(const ProductShape& p, const std::vector<float>& dy, size_t dy_stride,
                             const std::vector<float>& x, size_t x_stride) {
  std::vector<double> g(size_t(p.draws) * p.out * p.in);
  for (int k = 0; k < p.draws; k++)
    for (int b = 0; b < p.batch; b++)
      for (int o = 0; o < p.out; o++)
        for (int i = 0; i < p.in; i++)
          g[(size_t(k) * p.out + o) * p.in + i] +=
              double(dy[dy_stride * k + size_t(b) * p.out + o]) * x[x_stride * k + size_t(b) * p.in + i];
  return g;
}

void check_products(const ProductShape& p) {
  const int count = p.out * p.in;
  const size_t dy_stride = size_t(p.batch) * p.out + 4, x_stride = p.shared ? 0 : size_t(p.batch) * p.in + 8;
  const size_t dy_size = dy_stride * p.draws, x_size = p.shared ? size_t(p.batch) * p.in : x_stride * p.draws;
  std::vector<std::vector<float>> sums, noises;
  for (const auto& way : product_ways) {
    SCOPED_TRACE(testing::Message() << way.name << ": " << p.out << " x " << p.in << " from " << p.first << ", batch "
                                    << p.batch << ", " << p.draws << (p.shared ? " draws, shared x" : " draws"));
    MomentStore store(p.first + count + 9, states_of(6, 1, p.draws));
    const std::vector<float> whole_dy = integers(dy_size, 1), whole_x = integers(x_size, 2);
    const std::vector<float> dy = normals(dy_size, 3), x = normals(x_size, 4);
    Buffer a(store.memory, whole_dy), b(store.memory, whole_x), c(store.memory, dy), d(store.memory, x);
    store.begin(p.first, count);
    DrawnPass pass{3, p.draws, false};
    way.run(store.memory.device(), store.moments(), p.first, p.out, p.in, p.batch, {a, dy_stride}, {b, x_stride}, pass,
            store.device_states);
    add_moments(store.want, products(p, whole_dy, dy_stride, whole_x, x_stride), count, p.first, count, pass,
                store.states[0]);
    store.check(p.first, count, true);
    pass = {3 + p.draws, p.draws, true};
    way.run(store.memory.device(), store.moments(), p.first, p.out, p.in, p.batch, {c, dy_stride}, {d, x_stride}, pass,
            store.device_states);
    add_moments(store.want, products(p, dy, dy_stride, x, x_stride), count, p.first, count, pass, store.states[0]);
    store.check(p.first, count, false, 2e-6);
    sums.push_back(store.sum.host()), noises.push_back(store.noise.host());
    if (way.everywhere)
      record(std::string("bgd.products.") + way.name + "." + std::to_string(p.out) + "." + std::to_string(p.in) + "." +
                 std::to_string(p.draws),
             noises.back(), 4e-6f);
  }
  EXPECT_TRUE(close(sums[1], sums[0], {.l2 = 1e-6}));
  EXPECT_TRUE(close(noises[1], noises[0], {.l2 = 1e-6}));
}

TEST(ProductMoments, SmallShapes) {
  BATON_NEEDS_DEVICE();
  check_products({0, 1, 1, 1, 1});
  check_products({64, 5, 7, 3, 2});
  check_products({4, 3, 6, 2, 3, true});
}

TEST(ProductMoments, Shapes) {
  BATON_NEEDS_DEVICE();
  for (const ProductShape& p : {ProductShape{128, 10, 24, 16, 10},
                                {64, 24, 36, 7, 3, true},
                                {0, 33, 50, 17, 4},
                                {192, 65, 66, 32, 5, true},
                                {64, 130, 97, 37, 3},
                                {64, 3, 201, 5, 10, true},
                                {256, 1, 9, 40, 6},
                                {320, 128, 64, 8, 1},
                                {64, 12, 129, 33, 7},
                                {448, 64, 128, 1, 2},
                                {64, 17, 31, 130, 8, true}})
    check_products(p);
}

// Under tf32 the operands are rounded: the moments are those of rounded ones.
TEST(ProductMoments, SmallUnderTf32) {
  BATON_NEEDS_DEVICE();
  for (const ProductShape& p : {ProductShape{64, 5, 7, 3, 2}, ProductShape{0, 6, 9, 20, 3, true}}) {
    const int count = p.out * p.in;
    const size_t dy_stride = size_t(p.batch) * p.out, x_stride = p.shared ? 0 : size_t(p.batch) * p.in;
    const std::vector<float> dy = normals(dy_stride * p.draws, 3),
                             x = normals(size_t(p.batch) * p.in * (p.shared ? 1 : p.draws), 4);
    std::vector<float> rounded_dy = dy, rounded_x = x;
    for (auto* v : {&rounded_dy, &rounded_x})
      for (float& f : *v) f = simt::round_to_tf32(f);
    for (const auto& way : product_ways) {
      SCOPED_TRACE(way.name);
      MomentStore store(p.first + count + 9, states_of(6, 1, p.draws));
      Buffer a(store.memory, dy), b(store.memory, x);
      store.begin(p.first, count);
      const DrawnPass pass{3, p.draws, false};
      const auto run = [&](Precision precision) {
        const WithPrecision with(store.memory.device(), precision);
        way.run(store.memory.device(), store.moments(), p.first, p.out, p.in, p.batch, {a, dy_stride}, {b, x_stride},
                pass, store.device_states);
        return store.sum.host();
      };
      const std::vector<float> fp32 = run(Precision::fp32);
      EXPECT_NE(run(Precision::tf32), fp32);
      add_moments(store.want, products(p, rounded_dy, dy_stride, rounded_x, x_stride), count, p.first, count, pass,
                  store.states[0]);
      store.check(p.first, count, false, 2e-6);
      if (way.everywhere)
        record(std::string("bgd.products.tf32.") + way.name + "." + std::to_string(p.out), store.noise.host(), 4e-6f);
    }
  }
}

TEST(ProductMoments, EveryNumberOfDraws) {
  BATON_NEEDS_DEVICE();
  for (int draws = 1; draws <= 10; draws++) check_products({64, 11, 13, 9, draws, draws % 2 == 0});
}

TEST(ProductMoments, SmallAreThoseOfGradientsThatExist) {
  BATON_NEEDS_DEVICE();
  const int out = 3, in = 5, batch = 2, draws = 2, first = 8, count = out * in;
  const std::vector<float> dy = integers(draws * batch * out, 1), x = integers(draws * batch * in, 2);
  const std::vector<double> g =
      products({first, out, in, batch, draws}, dy, size_t(batch) * out, x, size_t(batch) * in);
  MomentStore made(32, states_of(2)), given(32, states_of(2));
  Buffer a(made.memory, dy), b(made.memory, x), grad(made.memory, std::vector<float>(g.begin(), g.end()));
  accumulate_moments(given.moments(), grad, count, first, count, {4, draws, false}, given.device_states,
                     given.memory.stream());
  for (const auto& way : product_ways) {
    way.run(made.memory.device(), made.moments(), first, out, in, batch, {a, size_t(batch) * out},
            {b, size_t(batch) * in}, {4, draws, false}, made.device_states);
    EXPECT_TRUE(exact(made.sum.host(), given.sum.host())) << way.name;
    EXPECT_TRUE(close(made.noise.host(), given.noise.host(), {.l2 = 2e-7})) << way.name;
  }
}

TEST(ProductMoments, Errors) {
  BATON_NEEDS_DEVICE();
  MomentStore store(64, states_of(2));
  Buffer<float> dy(store.memory, 8), x(store.memory, 8);
  for (const auto& way : product_ways)
    for (int first : {1, 2, 3, 6})
      EXPECT_THROW(way.run(store.memory.device(), store.moments(), first, 2, 2, 2, {dy, 4}, {x, 4}, {0, 2, false},
                           store.device_states),
                   InputError)
          << way.name << ", " << first;
}

}  // namespace
}  // namespace baton::test
