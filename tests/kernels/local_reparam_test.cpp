// Noise is drawn inside the kernels, so the tests draw the documented noise again on the host and hold it.
#include "kernels/local_reparam.h"

#include <algorithm>
#include <array>
#include <functional>
#include <random>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"
#include "tests/support/npz.h"

namespace baton::test {
namespace {

constexpr uint32_t stream_id = 3;

float lane(float4 e, int k) { return k == 0 ? e.x : k == 1 ? e.y : k == 2 ? e.z : e.w; }

std::vector<StepState> states_of(int replicas, uint32_t step = 11) {
  std::vector<StepState> states(replicas);
  for (int r = 0; r < replicas; r++) {
    states[r].noise = key_of(40, r);
    states[r].step = step + r;
  }
  return states;
}

// A dense layer is one of planes of one element, but for its noise.
struct Layer {
  bool dense;
  int replicas, batch, channels, h = 1, w = 1, window = 2;

  DenseShape units() const { return {replicas, batch, channels}; }
  ConvPlanes planes() const { return {replicas, batch, channels, h, w, window}; }
  size_t stride() const { return channels + 5; }  // of the biases
  size_t size() const { return size_t(replicas) * batch * channels * h * w; }
  int pooled(int side) const { return (side - window) / 2 + 1; }
  size_t windows() const { return size_t(replicas) * batch * channels * pooled(h) * pooled(w); }

  size_t index(int r, int b, int c, int y, int x) const {
    return (((size_t(r) * batch + b) * channels + c) * h + y) * w + x;
  }
  // f(index, bias, replica, example, channel, y, x) for every output.
  template <class F>
  void each(F f) const {
    for (int r = 0; r < replicas; r++)
      for (int b = 0; b < batch; b++)
        for (int c = 0; c < channels; c++)
          for (int y = 0; y < h; y++)
            for (int x = 0; x < w; x++) f(index(r, b, c, y, x), stride() * r + c, r, b, c, y, x);
  }
  std::vector<float> noise(const std::vector<StepState>& states) const {
    std::vector<float> e(size());
    const int q = (channels + 3) / 4, wh = (h + 1) / 2, ww = (w + 1) / 2;
    each([&](size_t i, size_t, int r, int b, int c, int y, int x) {
      const uint32_t element = dense ? b * q + c % q : (b * channels + c) * (wh * ww) + y / 2 * ww + x / 2;
      e[i] = lane(normal4(states[r].noise, element, stream_id, states[r].step), dense ? c / q : 2 * (y % 2) + x % 2);
    });
    return e;
  }
};
std::ostream& operator<<(std::ostream& out, const Layer& l) {
  return out << (l.dense ? "dense [" : "conv [") << l.replicas << "][" << l.batch << "][" << l.channels << "][" << l.h
             << "][" << l.w << "] window " << l.window;
}

struct Inputs {
  std::vector<float> m, v, bias_mean, bias_variance, grad, grad_square;
};
// Variances are 0 or no less than 0.01; channel 0 has no bias variance, so that its v is 0 in places.
Inputs inputs_of(const Layer& l, size_t outputs, bool mean_bias = true) {
  std::mt19937 random(int(l.size()));
  std::normal_distribution<float> normal;
  auto draw = [&](size_t n, bool variance) {
    std::vector<float> x(n);
    for (float& value : x)
      value = variance ? (random() % 4 ? 0.01f + 0.3f * std::abs(normal(random)) : 0) : normal(random);
    return x;
  };
  Inputs in{draw(l.size(), false),
            draw(l.size(), true),
            draw(l.stride() * l.replicas, false),
            draw(l.stride() * l.replicas, true),
            draw(outputs, false),
            draw(outputs, false)};
  for (int r = 0; r < l.replicas; r++) in.bias_variance[l.stride() * r] = 0;
  if (!mean_bias) std::fill(in.bias_mean.begin(), in.bias_mean.end(), 0.f);
  return in;
}

struct Options {
  bool noisy = true, relu = true, squares = true, in_place = false;
  uint32_t step = 11;
};

struct Result {
  std::vector<float> value, square, v, dm, dv, db_mean, db_variance;
  std::vector<uint8_t> which;
  std::vector<float> slope;
};

// Forward and back. In place: as the layers do it, m is out.value, dm is out.grad and dv is out.grad_square.
Result run(const Layer& l, const Inputs& in, Options o) {
  Memory memory;
  Buffer m(memory, in.m), v(memory, in.v), bias_mean(memory, in.bias_mean), bias_variance(memory, in.bias_variance);
  Buffer grad(memory, in.grad), grad_square(memory, in.grad_square);
  Buffer<float> value(memory, l.size(), NAN), square(memory, l.size(), NAN);
  Buffer<float> dm(memory, l.size(), NAN), dv(memory, l.size(), NAN);
  Buffer<float> db_mean(memory, in.bias_mean.size(), 9.f), db_variance(memory, in.bias_mean.size(), 9.f);
  Buffer<float> sums(memory, size_t(2) * l.replicas * l.batch * l.channels, NAN);
  Buffer states(memory, states_of(l.replicas, o.step));

  Signal out{value, o.squares ? square.data() : nullptr, grad, o.squares ? grad_square.data() : nullptr};
  float *to_m = dm, *to_v = o.noisy ? dv.data() : nullptr;
  if (o.in_place) {
    out.value = m, to_m = grad;
    if (o.noisy && o.squares) to_v = grad_square;
  }
  float* variance = o.noisy ? v.data() : nullptr;
  const Bias bias{bias_mean, o.noisy ? bias_variance.data() : nullptr, l.stride()};
  float* to_bias_variance = o.noisy ? db_variance.data() : nullptr;
  const Stream stream = memory.stream();
  if (l.dense) {
    dense_sample(out, m, variance, bias, l.units(), o.relu, states, stream_id, stream);
    dense_sample_backward(to_m, to_v, out, variance, l.units(), o.relu, states, stream_id, stream);
    dense_bias_gradient(db_mean, to_bias_variance, l.stride(), to_m, to_v, l.units(), stream);
  } else {
    conv_sample(out, m, variance, bias, l.planes(), o.relu, states, stream_id, stream);
    conv_sample_backward(to_m, to_v, sums, out, variance, l.planes(), o.relu, states, stream_id, stream);
    conv_bias_gradient(db_mean, to_bias_variance, l.stride(), sums, l.planes(), stream);
  }
  return {(o.in_place ? m : value).host(),
          square.host(),
          v.host(),
          (o.in_place ? grad : dm).host(),
          (to_v == grad_square.data() ? grad_square : dv).host(),
          db_mean.host(),
          db_variance.host(),
          {},
          {}};
}

// The definition, in double.
struct Reference {
  std::vector<double> value, square, v, dm, dv, db_mean, db_variance;
};
Reference reference(const Layer& l, const Inputs& in, Options o) {
  const std::vector<float> e = l.noise(states_of(l.replicas, o.step));
  Reference r;
  r.value.resize(l.size()), r.square = r.v = r.dm = r.dv = r.value;
  r.db_mean.resize(in.bias_mean.size(), 9.), r.db_variance = r.db_mean;
  for (int row = 0; row < l.replicas; row++)
    for (int c = 0; c < l.channels; c++) r.db_mean[l.stride() * row + c] = r.db_variance[l.stride() * row + c] = 0;
  l.each([&](size_t i, size_t b, int, int, int, int, int) {
    double y = double(in.m[i]) + in.bias_mean[b];
    r.v[i] = double(in.v[i]) + in.bias_variance[b];
    if (o.noisy) y += std::sqrt(r.v[i]) * e[i];
    double g = in.grad[i];
    if (o.squares) g += 2 * y * in.grad_square[i];
    if (o.relu && !(y > 0)) y = g = 0;
    r.value[i] = y, r.square[i] = y * y, r.dm[i] = g;
    r.dv[i] = r.v[i] > 0 ? g * e[i] / (2 * std::sqrt(r.v[i])) : 0;
    r.db_mean[b] += r.dm[i], r.db_variance[b] += r.dv[i];
  });
  return r;
}

testing::AssertionResult zero_where_zero(const std::vector<float>& got, const std::vector<double>& want) {
  for (size_t i = 0; i < want.size(); i++)
    if (want[i] == 0 && got[i] != 0) return testing::AssertionFailure() << "[" << i << "] is " << got[i] << ", not 0";
  return testing::AssertionSuccess();
}

void check_against_reference(const Layer& l, Options o) {
  SCOPED_TRACE(testing::Message() << l << (o.noisy ? " sampled" : " point") << (o.relu ? " relu" : "")
                                  << (o.squares ? " squares" : "") << (o.in_place ? " in place" : ""));
  const Inputs in = inputs_of(l, l.size());
  const Result got = run(l, in, o);
  const Reference want = reference(l, in, o);
  EXPECT_TRUE(close(got.value, want.value, {.l2 = 3e-7}));
  EXPECT_TRUE(close(got.dm, want.dm, {.l2 = 5e-7}));
  EXPECT_TRUE(close(got.db_mean, want.db_mean, {.l2 = 1e-6}));
  if (o.squares) {
    EXPECT_TRUE(close(got.square, want.square, {.l2 = 5e-7}));
  }
  if (o.noisy) {
    EXPECT_TRUE(close(got.v, want.v, {.l2 = 1e-7}));
    EXPECT_TRUE(close(got.dv, want.dv, {.l2 = 1e-6}));
    EXPECT_TRUE(close(got.db_variance, want.db_variance, {.l2 = 1e-6}));
    EXPECT_TRUE(zero_where_zero(got.dv, want.dv));
  } else {
    EXPECT_TRUE(exact(got.v, in.v));
    EXPECT_TRUE(exact(got.db_variance, std::vector<float>(got.db_variance.size(), 9.f)));
  }
  const std::string name = std::string("local_reparam.") + (l.dense ? "dense." : "conv.") + std::to_string(l.size()) +
                           (o.noisy ? ".sampled" : ".point") + (o.relu ? ".relu" : "") + (o.squares ? ".squares" : "") +
                           (o.in_place ? ".in_place" : "");
  record(name + ".value", got.value);
  record(name + ".dm", got.dm);
  if (o.noisy) record(name + ".dv", got.dv);
  record(name + ".db", got.db_mean);
}

void check_all(const Layer& l) {
  for (bool relu : {false, true})
    for (bool in_place : {false, true}) {
      check_against_reference(l, {.noisy = true, .relu = relu, .squares = true, .in_place = in_place});
      check_against_reference(l, {.noisy = true, .relu = relu, .squares = false, .in_place = in_place});
      check_against_reference(l, {.noisy = false, .relu = relu, .squares = false, .in_place = in_place});
      check_against_reference(l, {.noisy = false, .relu = relu, .squares = true, .in_place = in_place});
    }
}

TEST(LocalReparam, SmallAgainstReference) {
  BATON_NEEDS_DEVICE();
  for (bool noisy : {true, false}) {
    check_against_reference({true, 1, 2, 7}, {.noisy = noisy, .squares = noisy, .in_place = noisy});
    check_against_reference({false, 1, 1, 2, 5, 3}, {.noisy = noisy, .squares = noisy, .in_place = noisy});
  }
}

TEST(LocalReparam, DenseAgainstReference) {
  BATON_NEEDS_DEVICE();
  for (int units : {1, 2, 3, 4, 5, 10}) check_all({true, 2, 4, units});
  check_all({true, 2, 3, 7});
  check_all({true, 2, 3, 643});  // more than four a thread
  check_all({true, 1, 9, 512});
}

TEST(LocalReparam, ConvAgainstReference) {
  BATON_NEEDS_DEVICE();
  for (int h : {1, 2, 5})
    for (int w : {1, 4, 7}) check_all({false, 2, 3, 2, h, w});
  check_all({false, 2, 2, 3, 24, 24});
  check_all({false, 1, 2, 3, 17, 15});
}

std::vector<float> integers(size_t n, int seed) {
  std::mt19937 random(seed);
  std::vector<float> v(n);
  for (float& x : v) x = float(int(random() % 7)) - 3;
  return v;
}

TEST(LocalReparam, PointExact) {
  BATON_NEEDS_DEVICE();
  for (const Layer& l : {Layer{true, 2, 3, 6}, Layer{false, 2, 2, 3, 3, 4}}) {
    SCOPED_TRACE(testing::Message() << l);
    const size_t n = l.size(), biases = l.stride() * l.replicas;
    const Inputs in{integers(n, 1),      integers(n, 2), integers(biases, 3),
                    integers(biases, 4), integers(n, 5), integers(n, 6)};
    for (bool squares : {false, true}) {
      const Options o{.noisy = false, .relu = true, .squares = squares};
      const Result got = run(l, in, o);
      const Reference want = reference(l, in, o);
      EXPECT_TRUE(exact(got.value, want.value));
      if (squares) {
        EXPECT_TRUE(exact(got.square, want.square));
      }
      EXPECT_TRUE(exact(got.dm, want.dm));
      EXPECT_TRUE(exact(got.db_mean, want.db_mean));
    }
  }
}

// Zero variance is the deterministic layer: the sample is m + b, dv is 0, nothing is NaN.
TEST(LocalReparam, ZeroVarianceIsThePoint) {
  BATON_NEEDS_DEVICE();
  for (const Layer& l : {Layer{true, 2, 3, 6}, Layer{false, 2, 2, 3, 3, 4}}) {
    SCOPED_TRACE(testing::Message() << l);
    Inputs in = inputs_of(l, l.size());
    std::fill(in.v.begin(), in.v.end(), 0.f);
    std::fill(in.bias_variance.begin(), in.bias_variance.end(), 0.f);
    const Result sampled = run(l, in, {.squares = false}), point = run(l, in, {.noisy = false, .squares = false});
    EXPECT_TRUE(exact(sampled.value, point.value));
    EXPECT_TRUE(exact(sampled.dm, point.dm));
    EXPECT_TRUE(exact(sampled.db_mean, point.db_mean));
    EXPECT_TRUE(exact(sampled.dv, std::vector<float>(l.size())));
  }
}

// A variance product that rounding has left below 0 counts as 0, to the bits; under a tiny bias variance the root of
// the sum would be a NaN, which no step survives. Every second element is such a one. A NaN is none: it stays.
void make_negative(Inputs& in) {
  for (size_t i = 0; i < in.v.size(); i += 2) in.v[i] = i % 4 ? -3e-9f : -1e-5f;
  std::fill(in.bias_variance.begin(), in.bias_variance.end(), 1e-20f);
}
void expect_as_zero(Result got, const Result& zero) {
  EXPECT_TRUE(exact(got.value, zero.value));
  EXPECT_TRUE(exact(got.square, zero.square));
  EXPECT_TRUE(exact(got.dm, zero.dm));
  EXPECT_TRUE(exact(got.dv, zero.dv));
  EXPECT_TRUE(exact(got.db_mean, zero.db_mean));
  EXPECT_TRUE(exact(got.db_variance, zero.db_variance));
  for (const auto* values : {&got.value, &got.square, &got.dm, &got.dv, &got.db_mean, &got.db_variance})
    EXPECT_TRUE(std::all_of(values->begin(), values->end(), [](float x) { return std::isfinite(x); }));
}
Inputs with_zeros(Inputs in) {
  for (float& v : in.v) v = v < 0 ? 0 : v;
  return in;
}

TEST(LocalReparam, SmallNegativeVarianceIsZero) {
  BATON_NEEDS_DEVICE();
  for (const Layer& l : {Layer{true, 2, 2, 6}, Layer{false, 1, 2, 2, 3, 4}})
    for (bool relu : {false, true})
      for (bool in_place : {false, true}) {
        SCOPED_TRACE(testing::Message() << l << (relu ? " ReLU" : "") << (in_place ? " in place" : ""));
        Inputs in = inputs_of(l, l.size());
        make_negative(in);
        const Options o{.relu = relu, .in_place = in_place};
        const Result got = run(l, in, o);
        expect_as_zero(got, run(l, with_zeros(in), o));
        for (float v : got.v) EXPECT_GE(v, 1e-20f);
        in.v[3] = NAN;
        EXPECT_TRUE(std::isnan(run(l, in, o).value[3]));
      }
}

// ---------------------------------------------------------------------------------------------------------- pooling
// In place: the gradients take the place of m and v.
struct PoolOptions {
  bool noisy = true, keep = true, in_place = false, squares = true;
};
Result run_pooled(const Layer& l, const Inputs& in, PoolOptions o) {
  const auto [noisy, keep, in_place, squares] = o;
  Memory memory;
  Buffer m(memory, in.m), v(memory, in.v), bias_mean(memory, in.bias_mean), bias_variance(memory, in.bias_variance);
  Buffer grad(memory, in.grad), grad_square(memory, in.grad_square);
  Buffer<float> value(memory, l.windows(), NAN), square(memory, l.windows(), NAN), slope(memory, l.windows(), NAN);
  Buffer<uint8_t> which(memory, l.windows(), uint8_t(77));
  Buffer<float> dm(memory, l.size(), NAN), dv(memory, l.size(), NAN);
  Buffer<float> db_mean(memory, in.bias_mean.size(), 9.f), db_variance(memory, in.bias_mean.size(), 9.f);
  Buffer<float> sums(memory, size_t(2) * l.replicas * l.batch * l.channels, NAN);
  Buffer states(memory, states_of(l.replicas));

  Signal out{value, squares ? square.data() : nullptr, grad, squares ? grad_square.data() : nullptr};
  const Bias bias{bias_mean, noisy ? bias_variance.data() : nullptr, l.stride()};
  conv_sample_pool(out, keep ? which.data() : nullptr, keep && noisy ? slope.data() : nullptr, m,
                   noisy ? v.data() : nullptr, bias, l.planes(), states, stream_id, memory.stream());
  Buffer<float>&to_m = in_place ? m : dm, &to_v = in_place ? v : dv;
  if (keep) {
    conv_sample_pool_backward(to_m, noisy ? to_v.data() : nullptr, sums, out, which, noisy ? slope.data() : nullptr,
                              l.planes(), memory.stream());
    conv_bias_gradient(db_mean, noisy ? db_variance.data() : nullptr, l.stride(), sums, l.planes(), memory.stream());
  }
  return {value.host(),   square.host(),      v.host(),     to_m.host(), to_v.host(),
          db_mean.host(), db_variance.host(), which.host(), slope.host()};
}

// The places in the unpooled planes of every window.
std::vector<std::vector<size_t>> windows_of(const Layer& l) {
  std::vector<std::vector<size_t>> windows;
  l.each([&](size_t i, size_t, int, int, int, int y, int x) {
    if (y % 2 || x % 2 || y + l.window > l.h || x + l.window > l.w) return;
    windows.emplace_back();
    for (int k = 0; k < l.window * l.window; k++)
      windows.back().push_back(i + size_t(k / l.window) * l.w + k % l.window);
  });
  return windows;
}
// The place of the window's largest element, the first of equals.
int largest(const std::vector<float>& x, const std::vector<size_t>& window) {
  int place = 0;
  for (int k = 1; k < int(window.size()); k++)
    if (x[window[k]] > x[window[place]]) place = k;
  return place;
}

// Pooling what conv_sample gives, with the very same noise. Without a mean bias no addition is in another order, and
// the results are the same bit for bit.
void check_pooled(const Layer& l, PoolOptions o, bool mean_bias) {
  const auto [noisy, keep, in_place, squares] = o;
  SCOPED_TRACE(testing::Message() << l << (noisy ? " sampled" : " point") << (mean_bias ? " biased" : "")
                                  << (in_place ? " in place" : "") << (squares ? " squares" : ""));
  Inputs in = inputs_of(l, l.windows(), mean_bias), unpooled = in;
  unpooled.grad.assign(l.size(), 0.f), unpooled.grad_square = unpooled.grad;
  const Result all = run(l, unpooled, {.noisy = noisy, .relu = false, .squares = noisy});
  const Result got = run_pooled(l, in, o);
  const std::vector<float> e = l.noise(states_of(l.replicas));
  const auto windows = windows_of(l);
  ASSERT_EQ(windows.size(), l.windows());

  std::vector<float> value, square;
  std::vector<double> slope, kept, dm(l.size()), dv(l.size()), db_mean(in.bias_mean.size(), 9.);
  for (int r = 0; r < l.replicas; r++)
    for (int c = 0; c < l.channels; c++) db_mean[l.stride() * r + c] = 0;
  std::vector<double> db_variance = db_mean;
  std::vector<size_t> bias(l.size());
  l.each([&](size_t i, size_t b, int, int, int, int, int) { bias[i] = b; });
  std::vector<uint8_t> which;
  for (size_t o = 0; o < windows.size(); o++) {
    const int place = largest(all.value, windows[o]);
    const size_t i = windows[o][place];
    const float y = all.value[i] > 0 ? all.value[i] : 0;
    value.push_back(y), square.push_back(y * y), which.push_back(y > 0 ? place : l.window * l.window);
    if (y <= 0) continue;
    const double v = all.v[i], dydv = noisy && v > 0 ? e[i] / (2 * std::sqrt(v)) : 0;
    const double g = in.grad[o] + (squares ? 2. * y * in.grad_square[o] : 0);
    slope.push_back(dydv), kept.push_back(got.slope[o]);
    dm[i] += g, dv[i] += g * dydv;  // windows of 3 share winners
    db_mean[bias[i]] += g, db_variance[bias[i]] += g * dydv;
  }
  EXPECT_TRUE(exact(got.which, which));
  const Tolerance summed{.l2 = got.value.size() > 200 ? 5e-6 : 1e-6};  // signs cancel
  if (mean_bias) EXPECT_TRUE(close(got.value, value, {.l2 = 3e-7}));
  else EXPECT_TRUE(exact(got.value, value));
  EXPECT_TRUE(close(got.dm, dm, {.l2 = 5e-7}));
  EXPECT_TRUE(close(got.db_mean, db_mean, summed));
  EXPECT_TRUE(zero_where_zero(got.dm, dm));
  if (squares) EXPECT_TRUE(close(got.square, square, {.l2 = 5e-7}));
  else EXPECT_TRUE(exact(got.square, std::vector<float>(l.windows(), NAN)));
  if (noisy) {
    EXPECT_TRUE(close(kept, slope, {.l2 = 1e-6}));
    EXPECT_TRUE(close(got.dv, dv, {.l2 = 1e-6}));
    EXPECT_TRUE(close(got.db_variance, db_variance, summed));
    EXPECT_TRUE(zero_where_zero(got.dv, dv));
  }
  if (mean_bias || in_place) return;
  // Where no backward pass follows:
  const Result again = run_pooled(l, in, {.noisy = noisy, .keep = false, .squares = squares});
  EXPECT_TRUE(exact(again.value, got.value));
  EXPECT_TRUE(exact(again.square, got.square));
  const std::string name = "local_reparam.pooled." + std::to_string(l.h) + "x" + std::to_string(l.w) + "." +
                           std::to_string(l.size()) + ".window" + std::to_string(l.window) +
                           (noisy ? ".sampled" : ".point") + (squares ? ".squares" : "");
  record(name + ".value", got.value);
  record(name + ".which", std::vector<float>(got.which.begin(), got.which.end()), 0);
  record(name + ".dm", got.dm);
  if (noisy) record(name + ".dv", got.dv);
  record(name + ".db", got.db_mean, 1e-5f);  // thousands of signs cancel, in another order
}
void check_pooled(Layer l) {
  for (int window : {2, 3}) {
    l.window = window;
    if (l.h < window || l.w < window) continue;
    for (bool mean_bias : {false, true}) {
      check_pooled(l, {.noisy = true, .in_place = mean_bias}, mean_bias);
      for (bool squares : {false, true})
        check_pooled(l, {.noisy = false, .in_place = mean_bias, .squares = squares}, mean_bias);
    }
  }
}

TEST(LocalReparam, SmallPooledAgainstUnpooled) {
  BATON_NEEDS_DEVICE();
  for (int window : {2, 3})
    for (bool noisy : {true, false})
      check_pooled({false, 1, 1, 1, 5, 7, window}, {.noisy = noisy, .in_place = noisy, .squares = noisy}, true);
}

TEST(LocalReparam, PooledAgainstUnpooled) {
  BATON_NEEDS_DEVICE();
  for (int h : {2, 3, 4, 8})
    for (int w : {2, 3, 5, 8, 15}) check_pooled({false, 2, 2, 3, h, w});
  check_pooled({false, 2, 2, 2, 4, 6});
  check_pooled({false, 2, 2, 2, 5, 7});
  check_pooled({false, 2, 2, 3, 24, 24});  // LeNet5
  check_pooled({false, 1, 2, 3, 32, 32});  // 3Conv3FC
  check_pooled({false, 2, 2, 3, 15, 15});
  check_pooled({false, 2, 3, 2, 7, 7});
  check_pooled({false, 1, 1, 1, 72, 72});  // as large as windows of 3 may be
  check_pooled({false, 1, 2, 2, 3, 131});  // a row wider than a block
  check_pooled({false, 1, 2, 2, 33, 6});
}

TEST(LocalReparam, SmallPooledNegativeVarianceIsZero) {
  BATON_NEEDS_DEVICE();
  for (int window : {2, 3})
    for (bool in_place : {false, true}) {
      const Layer l{false, 1, 2, 2, 5, 7, window};
      SCOPED_TRACE(testing::Message() << l << (in_place ? " in place" : ""));
      Inputs in = inputs_of(l, l.windows());
      make_negative(in);
      const Result got = run_pooled(l, in, {.in_place = in_place}),
                   zero = run_pooled(l, with_zeros(in), {.in_place = in_place});
      expect_as_zero(got, zero);
      EXPECT_TRUE(exact(got.which, zero.which));
      EXPECT_TRUE(exact(got.slope, zero.slope));
      in.v[0] = NAN;  // the first of its window: nothing is larger than it
      EXPECT_TRUE(std::isnan(run_pooled(l, in, {.in_place = in_place}).value[0]));
    }
}

TEST(LocalReparam, PooledZeroVariance) {
  BATON_NEEDS_DEVICE();
  for (int window : {2, 3}) {
    const Layer l{false, 1, 4, 3, 5, 8, window};
    SCOPED_TRACE(testing::Message() << l);
    Inputs in = inputs_of(l, l.windows());
    in.m = integers(l.size(), 8), in.bias_mean = integers(in.bias_mean.size(), 9);
    std::fill(in.v.begin(), in.v.end(), 0.f);
    std::fill(in.bias_variance.begin(), in.bias_variance.end(), 0.f);
    const Result got = run_pooled(l, in, {}), point = run_pooled(l, in, {.noisy = false});
    EXPECT_TRUE(exact(got.value, point.value));
    EXPECT_TRUE(exact(got.dm, point.dm));
    std::vector<float> y(l.size());
    l.each([&](size_t i, size_t b, int, int, int, int, int) { y[i] = in.m[i] + in.bias_mean[b]; });
    std::vector<uint8_t> which;
    for (const auto& w : windows_of(l)) {
      const int place = largest(y, w);
      which.push_back(y[w[place]] > 0 ? place : window * window);
    }
    EXPECT_TRUE(exact(got.which, which));  // the first of equals wins
    EXPECT_TRUE(exact(point.which, which));
    EXPECT_TRUE(exact(got.slope, std::vector<float>(l.windows())));
    EXPECT_TRUE(exact(got.dv, std::vector<float>(l.size())));
  }
}

// One place that wins all four of the windows that it is in gets the sum of their gradients.
TEST(LocalReparam, SmallPooledSharedWinner) {
  BATON_NEEDS_DEVICE();
  const Layer l{false, 1, 1, 1, 5, 5, 3};
  Inputs in = inputs_of(l, l.windows());
  std::fill(in.m.begin(), in.m.end(), 0.f);
  std::fill(in.bias_mean.begin(), in.bias_mean.end(), 0.f);
  in.m[12] = 2;
  in.grad = {1, 2, 4, 8};
  const Result got = run_pooled(l, in, {.noisy = false, .squares = false});
  EXPECT_TRUE(exact(got.value, std::vector<float>{2, 2, 2, 2}));
  EXPECT_TRUE(exact(got.which, std::vector<uint8_t>{8, 6, 2, 0}));
  std::vector<float> dm(25);
  dm[12] = 15;
  EXPECT_TRUE(exact(got.dm, dm));
  EXPECT_EQ(got.db_mean[0], 15);
}

// ----------------------------------------------------------------------------------------------- finite differences
std::vector<double> slopes(std::vector<double> x, const std::function<double(const std::vector<double>&)>& f) {
  std::vector<double> slope(x.size());
  for (size_t i = 0; i < x.size(); i++) {
    const double at = x[i], step = 1e-6;
    x[i] = at + step;
    const double above = f(x);
    x[i] = at - step;
    slope[i] = (above - f(x)) / (2 * step);
    x[i] = at;
  }
  return slope;
}

// sum of grad y + grad_square y^2 over the outputs of the map, in double: x is m, v, bias mean and bias variance in
// turn.
double objective(const Layer& l, const Inputs& in, const std::vector<float>& e, const std::vector<double>& x, bool relu,
                 bool pooled) {
  const size_t n = l.size(), biases = in.bias_mean.size();
  std::vector<double> y(n);
  l.each([&](size_t i, size_t b, int, int, int, int, int) {
    y[i] = x[i] + x[2 * n + b] + std::sqrt(x[n + i] + x[2 * n + biases + b]) * e[i];
    if (relu) y[i] = std::max(y[i], 0.);
  });
  std::vector<double> outputs;
  if (pooled)
    for (const auto& w : windows_of(l)) {
      double most = y[w[0]];
      for (size_t i : w) most = std::max(most, y[i]);
      outputs.push_back(most);
    }
  else outputs = y;
  double sum = 0;
  for (size_t o = 0; o < outputs.size(); o++)
    sum += in.grad[o] * outputs[o] + in.grad_square[o] * outputs[o] * outputs[o];
  return sum;
}

TEST(LocalReparam, FiniteDifferences) {
  BATON_NEEDS_DEVICE();
  struct Case {
    Layer layer;
    bool relu, pooled;
  };
  for (const Case& c : {Case{{true, 2, 2, 5}, false, false}, Case{{true, 2, 2, 5}, true, false},
                        Case{{false, 2, 2, 2, 3, 3}, true, false}, Case{{false, 2, 2, 2, 4, 5}, true, true},
                        Case{{false, 2, 2, 2, 5, 6, 3}, true, true}}) {
    const Layer& l = c.layer;
    SCOPED_TRACE(testing::Message() << l << (c.relu ? " relu" : "") << (c.pooled ? " pooled" : ""));
    Inputs in = inputs_of(l, c.pooled ? l.windows() : l.size());
    for (float& v : in.v) v += 0.05f;  // no root of 0
    const Result got = c.pooled ? run_pooled(l, in, {}) : run(l, in, {.relu = c.relu});
    std::vector<double> at;
    for (const auto* part : {&in.m, &in.v, &in.bias_mean, &in.bias_variance})
      at.insert(at.end(), part->begin(), part->end());
    const std::vector<float> e = l.noise(states_of(l.replicas));
    const std::vector<double> want =
        slopes(at, [&](const std::vector<double>& x) { return objective(l, in, e, x, c.relu, c.pooled); });
    auto cut = [](const auto& all, size_t first, size_t count) {
      return std::vector<double>(all.begin() + first, all.begin() + first + count);
    };
    const size_t n = l.size(), biases = in.bias_mean.size();
    EXPECT_TRUE(close(got.dm, cut(want, 0, n), {.l2 = 1e-6}));
    EXPECT_TRUE(close(got.dv, cut(want, n, n), {.l2 = 1e-6}));
    for (int r = 0; r < l.replicas; r++) {
      const size_t row = l.stride() * r;
      EXPECT_TRUE(close(cut(got.db_mean, row, l.channels), cut(want, 2 * n + row, l.channels), {.l2 = 1e-6}));
      EXPECT_TRUE(
          close(cut(got.db_variance, row, l.channels), cut(want, 2 * n + biases + row, l.channels), {.l2 = 2e-6}));
    }
  }
}

// ------------------------------------------------------------------------------------------------------- invariance
TEST(LocalReparam, BatchSplitKeepsTheNoise) {
  BATON_NEEDS_DEVICE();
  for (Layer whole : {Layer{true, 1, 8, 6}, Layer{false, 1, 8, 2, 5, 4}}) {
    SCOPED_TRACE(testing::Message() << whole);
    Layer half = whole;
    half.batch = 4;
    const Inputs in = inputs_of(whole, whole.size());
    Inputs first = in;
    for (auto* part : {&first.m, &first.v, &first.grad, &first.grad_square}) part->resize(half.size());
    auto head = [](std::vector<float> x, size_t n) {
      x.resize(n);
      return x;
    };
    const Result a = run(whole, in, {}), b = run(half, first, {});
    EXPECT_TRUE(exact(head(a.value, half.size()), b.value));
    EXPECT_TRUE(exact(head(a.dm, half.size()), b.dm));
    EXPECT_TRUE(exact(head(a.dv, half.size()), b.dv));
    if (whole.dense) continue;
    for (int window : {2, 3}) {
      whole.window = half.window = window;
      const Result pooled = run_pooled(whole, in, {}), pooled_half = run_pooled(half, first, {});
      EXPECT_TRUE(exact(head(pooled.value, half.windows()), pooled_half.value));
      EXPECT_TRUE(exact(head(pooled.dv, half.size()), pooled_half.dv));
    }
  }
}

TEST(LocalReparam, NoiseDiffersByStepReplicaAndExample) {
  BATON_NEEDS_DEVICE();
  for (const Layer& l : {Layer{true, 2, 2, 9}, Layer{false, 2, 2, 1, 3, 3}}) {
    Inputs in = inputs_of(l, l.size());
    std::fill(in.m.begin(), in.m.end(), 0.f);
    std::fill(in.bias_mean.begin(), in.bias_mean.end(), 0.f);
    std::fill(in.v.begin(), in.v.end(), 1.f);
    std::fill(in.bias_variance.begin(), in.bias_variance.end(), 0.f);
    std::vector<float> e = run(l, in, {.relu = false}).value, next = run(l, in, {.relu = false, .step = 500}).value;
    EXPECT_TRUE(exact(e, l.noise(states_of(l.replicas))));
    e.insert(e.end(), next.begin(), next.end());
    std::sort(e.begin(), e.end());
    EXPECT_EQ(std::adjacent_find(e.begin(), e.end()), e.end());  // all different
  }
}

// ---------------------------------------------------------------------------------------------------------- goldens
// An input of zeros under a deterministic bias: v is 0 for a whole example or patch.
TEST(LocalReparam, GoldenZeroVariance) {
  BATON_NEEDS_DEVICE();
  for (const char* name : {"ffg_dense_zero_row", "ffg_conv_zero_patch"}) {
    SCOPED_TRACE(name);
    const Npz golden(golden_file(std::string("layers/") + name));
    const auto shape = golden.shape("out_m");
    Layer l{shape.size() == 2, 1, int(shape[0]), int(shape[1])};
    if (!l.dense) l.h = int(shape[2]), l.w = int(shape[3]);
    Inputs in = inputs_of(l, l.size());
    in.m = golden.f32("out_m"), in.v = golden.f32("out_v"), in.grad = golden.f32("up_y");
    std::fill(in.bias_mean.begin(), in.bias_mean.end(), 0.f);  // they are in m and v
    std::fill(in.bias_variance.begin(), in.bias_variance.end(), 0.f);
    const Options o{.relu = false, .squares = false};
    const Result got = run(l, in, o);
    const Reference want = reference(l, in, o);
    EXPECT_TRUE(close(got.value, want.value, {.l2 = 3e-7}));
    EXPECT_TRUE(exact(got.dm, in.grad));
    EXPECT_TRUE(close(got.dv, want.dv, {.l2 = 1e-6}));
    const std::vector<double> y = golden.f64("out_y");
    int zeros = 0;
    for (size_t i = 0; i < got.v.size(); i++)
      if (in.v[i] == 0) {
        zeros++;
        EXPECT_FLOAT_EQ(got.value[i], float(y[i]));  // whatever the noise
        EXPECT_EQ(got.dv[i], 0);
      }
    EXPECT_GT(zeros, 0);
  }
}

TEST(LocalReparam, RefusesShapes) {
  float x = 0;
  uint8_t which = 0;
  StepState state{};
  const Signal out{&x, &x, &x, &x};
  const Bias bias{&x, &x, 1};
  EXPECT_THROW(dense_sample(out, &x, &x, bias, {1, 0, 1}, true, &state, 0, {}), InputError);
  EXPECT_THROW(dense_sample_backward(&x, &x, out, &x, {0, 1, 1}, true, &state, 0, {}), InputError);
  EXPECT_THROW(conv_sample(out, &x, &x, bias, {1, 1, 1, 0, 1}, true, &state, 0, {}), InputError);
  EXPECT_THROW(conv_sample_backward(&x, &x, &x, out, &x, {1, 1, 0, 1, 1}, true, &state, 0, {}), InputError);
  EXPECT_THROW(conv_sample_pool(out, &which, &x, &x, &x, bias, {1, 1, 1, 1, 4}, &state, 0, {}), InputError);
  EXPECT_THROW(conv_sample_pool_backward(&x, &x, &x, out, &which, &x, {1, 1, 1, 4, 1}, {}), InputError);
  EXPECT_THROW(conv_sample_pool(out, &which, nullptr, &x, &x, bias, {1, 1, 1, 2, 2}, &state, 0, {}), InputError);
  EXPECT_THROW(conv_sample_pool(out, nullptr, &x, &x, &x, bias, {1, 1, 1, 2, 2}, &state, 0, {}), InputError);
  EXPECT_THROW(conv_sample_pool({&x}, &which, &x, &x, &x, bias, {1, 1, 1, 2, 2}, &state, 0, {}), InputError);
  EXPECT_THROW(conv_sample_pool_backward(&x, &x, &x, {&x, &x, &x}, &which, &x, {1, 1, 1, 2, 2}, {}), InputError);
  for (ConvPlanes s : {ConvPlanes{1, 1, 1, 2, 4, 3}, ConvPlanes{1, 1, 1, 4, 2, 3}, ConvPlanes{1, 1, 1, 8, 8, 4},
                       ConvPlanes{1, 1, 1, 8, 8, 1}, ConvPlanes{1, 1, 1, 74, 73, 3}, ConvPlanes{1, 1, 1, 5, 2000, 3},
                       ConvPlanes{1, 1, 1, 100000, 100000, 3}}) {
    EXPECT_THROW(conv_sample_pool(out, &which, &x, &x, &x, bias, s, &state, 0, {}), InputError);
    EXPECT_THROW(conv_sample_pool_backward(&x, &x, &x, out, &which, &x, s, {}), InputError);
  }
}

}  // namespace
}  // namespace baton::test
