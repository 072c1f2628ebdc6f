#include "kernels/cholesky_moments.h"

#include <memory>
#include <random>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"
#include "tests/support/npz.h"

namespace baton::test {
namespace {

using Doubles = std::vector<double>;

int entry(int i, int j) { return i * (i + 1) / 2 + j; }
Doubles doubles(const std::vector<float>& v) { return {v.begin(), v.end()}; }

std::vector<float> normals(size_t n, int seed, float mean = 0, float sd = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(mean, sd);
  std::vector<float> v(n);
  for (float& x : v) x = normal(random);
  return v;
}

// ----------------------------------------------------------------------------------------- reference, in double
// f(image, filter, channel, output, patch): patch[i] is the pixel's index in x, or -1 outside the image.
template <class F>
void each_patch(const ConvShape& s, F f) {
  const int ow = s.out_width(), outputs = s.out_height() * ow, d = s.kernel * s.kernel;
  std::vector<long> patch(d);
  for (int b = 0; b < s.batch; b++)
    for (int c = 0; c < s.in_channels; c++)
      for (int p = 0; p < outputs; p++) {
        for (int i = 0; i < d; i++) {
          const int y = p / ow + i / s.kernel - s.pad, x = p % ow + i % s.kernel - s.pad;
          const bool inside = y >= 0 && y < s.height && x >= 0 && x < s.width;
          patch[i] = inside ? ((long(b) * s.in_channels + c) * s.height + y) * s.width + x : -1;
        }
        for (int n = 0; n < s.out_channels; n++)
          f((size_t(b) * s.out_channels + n) * outputs + p, size_t(n) * s.in_channels + c, patch);
      }
}

// Stored factors to L, packed.
Doubles plain(const Doubles& stored, int d) {
  Doubles l = stored;
  for (size_t b = 0; b < l.size(); b += packed(d))
    for (int i = 0; i < d; i++) {
      l[b + entry(i, i)] = std::exp(l[b + entry(i, i)]);
      for (int j = 0; j < i; j++) l[b + entry(i, j)] *= l[b + entry(i, i)];
    }
  return l;
}
Doubles gradient_to_stored(const Doubles& g, const Doubles& l, int d) {
  Doubles stored(g.size(), 0);
  for (size_t b = 0; b < g.size(); b += packed(d))
    for (int i = 0; i < d; i++)
      for (int j = 0; j <= i; j++) {
        stored[b + entry(i, i)] += g[b + entry(i, j)] * l[b + entry(i, j)];
        if (j < i) stored[b + entry(i, j)] = g[b + entry(i, j)] * l[b + entry(i, i)];
      }
  return stored;
}

struct Reference {
  Doubles v, dx, dl;  // dl: by L as it is
};
Reference reference_of(const ConvShape& s, const Doubles& x, const Doubles& l, const Doubles& dv) {
  const int d = s.kernel * s.kernel;
  Reference r{Doubles(s.output_size(), 0), Doubles(s.input_size(), 0), Doubles(l.size(), 0)};
  each_patch(s, [&](size_t out, size_t block, const std::vector<long>& patch) {
    const double* own = &l[block * packed(d)];
    for (int j = 0; j < d; j++) {
      double z = 0;  // of L^T patch
      for (int i = j; i < d; i++) z += patch[i] < 0 ? 0 : own[entry(i, j)] * x[patch[i]];
      r.v[out] += z * z;
      for (int i = j; i < d; i++) {
        if (patch[i] < 0) continue;
        r.dl[block * packed(d) + entry(i, j)] += 2 * dv[out] * z * x[patch[i]];
        r.dx[patch[i]] += 2 * dv[out] * z * own[entry(i, j)];
      }
    }
  });
  return r;
}

std::vector<float> random_factors(int blocks, int d, int seed) {
  std::vector<float> f = normals(size_t(blocks) * packed(d), seed, 0, 0.5f);
  for (int b = 0; b < blocks; b++)
    for (int i = 0; i < d; i++) f[size_t(b) * packed(d) + entry(i, i)] -= 0.7f;
  return f;
}

// ------------------------------------------------------------------------------------------------------ on the device
// Replicas lie 3 (x), 7 (factors) and 5 (outputs) elements further apart than they must.
struct Bench {
  Bench(const ConvShape& s_, int replicas_ = 1, size_t bytes = size_t(64) << 20)
      : s(s_),
        replicas(replicas_),
        factor_size(s.out_channels * s.in_channels * packed(s.kernel * s.kernel)),
        moments(memory.device(), memory.arena(), s, replicas, bytes),
        x(memory, x_stride() * replicas),
        factor(memory, factor_stride() * replicas),
        v(memory, v_stride() * replicas, 9.f),
        dv(memory, v_stride() * replicas),
        dx(memory, x_stride() * replicas),
        dfactor(memory, factor_stride() * replicas) {}

  size_t x_stride() const { return s.input_size() + 3; }
  size_t factor_stride() const { return factor_size + 7; }
  size_t v_stride() const { return s.output_size() + 5; }
  void forward() { moments.forward(memory.device(), {x, x_stride()}, factor, factor_stride(), {v, v_stride()}); }
  void backward(bool input = true) {
    moments.backward(memory.device(), {x, x_stride()}, factor, factor_stride(), {dv, v_stride()},
                     {input ? dx.data() : nullptr, x_stride()}, dfactor, factor_stride());
  }
  static std::vector<float> row(const std::vector<float>& all, size_t stride, size_t count, int r) {
    return {all.begin() + stride * r, all.begin() + stride * r + count};
  }
  static std::vector<float> padded(std::vector<float> v, size_t size) {
    v.resize(size);
    return v;
  }

  Memory memory;
  ConvShape s;
  int replicas;
  size_t factor_size;
  CholeskyMoments moments;
  Buffer<float> x, factor, v, dv, dx, dfactor;
};

void check(const ConvShape& s, int replicas, size_t bytes = size_t(64) << 20) {
  SCOPED_TRACE(testing::Message() << replicas << " x [" << s.batch << ", " << s.in_channels << ", " << s.height << ", "
                                  << s.width << "], " << s.out_channels << " of " << s.kernel << ", padding " << s.pad);
  const int d = s.kernel * s.kernel, blocks = s.out_channels * s.in_channels;
  Bench t(s, replicas, bytes);
  const std::vector<float> x = normals(t.x.size(), 1, 0.3f), dv = normals(t.v.size(), 2, 0.5f);
  const std::vector<float> dx = normals(t.x.size(), 3), dfactor = normals(t.factor.size(), 4);
  std::vector<float> factor;
  for (int r = 0; r < replicas; r++) {
    const auto own = random_factors(blocks, d, 10 + r);
    factor.insert(factor.end(), own.begin(), own.end());
    factor.resize(t.factor_stride() * (r + 1));
  }
  t.x.set(x), t.dv.set(dv), t.factor.set(factor), t.dx.set(dx), t.dfactor.set(dfactor);
  t.forward();
  t.backward();
  const std::vector<float> v = t.v.host(), new_dx = t.dx.host(), new_dfactor = t.dfactor.host();
  for (int r = 0; r < replicas; r++) {
    const Doubles l = plain(doubles(Bench::row(factor, t.factor_stride(), t.factor_size, r)), d);
    const Reference want = reference_of(s, doubles(Bench::row(x, t.x_stride(), s.input_size(), r)), l,
                                        doubles(Bench::row(dv, t.v_stride(), s.output_size(), r)));
    EXPECT_TRUE(close(Bench::row(v, t.v_stride(), s.output_size(), r), want.v, {.l2 = 2e-6}));
    auto added = [&](const std::vector<float>& now, const std::vector<float>& before, size_t stride, size_t count) {
      Doubles sum = doubles(Bench::row(now, stride, count, r));
      for (size_t i = 0; i < count; i++) sum[i] -= before[stride * r + i];
      return sum;
    };
    EXPECT_TRUE(close(added(new_dx, dx, t.x_stride(), s.input_size()), want.dx, {.l2 = 3e-6}));
    EXPECT_TRUE(close(added(new_dfactor, dfactor, t.factor_stride(), t.factor_size), gradient_to_stored(want.dl, l, d),
                      {.l2 = 3e-6}));
    for (size_t i = s.output_size(); i < t.v_stride(); i++) EXPECT_EQ(v[t.v_stride() * r + i], 9);
    for (size_t i = s.input_size(); i < t.x_stride(); i++)
      EXPECT_EQ(new_dx[t.x_stride() * r + i], dx[t.x_stride() * r + i]);
    for (size_t i = t.factor_size; i < t.factor_stride(); i++)
      EXPECT_EQ(new_dfactor[t.factor_stride() * r + i], dfactor[t.factor_stride() * r + i]);
  }
  t.dx.set(dx), t.dfactor.set(dfactor);
  t.backward(false);
  EXPECT_TRUE(exact(t.dx.host(), dx));
  EXPECT_TRUE(exact(t.dfactor.host(), new_dfactor));

  const std::string name = "cholesky_moments." + std::to_string(s.kernel) + "." + std::to_string(s.pad) + "." +
                           std::to_string(s.batch) + "." + std::to_string(bytes);
  record(name + ".v", v, 2e-6f);
  record(name + ".dx", new_dx, 3e-6f);
  record(name + ".dfactor", new_dfactor, 3e-6f);
}

TEST(CholeskyMoments, SmallAgainstReference) {
  BATON_NEEDS_DEVICE();
  check({2, 2, 4, 5, 2, 2, 1}, 2);
}

TEST(CholeskyMoments, AgainstReference) {
  BATON_NEEDS_DEVICE();
  check({3, 2, 8, 7, 4, 3, 0}, 2);
  check({2, 3, 7, 8, 3, 5, 2}, 2);
  check({2, 2, 6, 6, 3, 3, 1}, 1);
  check({1, 1, 8, 8, 2, 7, 2}, 1);
  check({2, 3, 4, 3, 2, 1, 0}, 1);
  check({7, 2, 8, 7, 4, 3, 2}, 2, 3 * sizeof(float) * 2 * 10 * 9 * 45);  // 3, 3 and 1 images at a time
  check({3, 2, 8, 7, 4, 3, 1}, 1, 0);                                    // 1 at a time
}

// --------------------------------------------------------------------------------------------------------- goldens
TEST(CholeskyMoments, Goldens) {
  BATON_NEEDS_DEVICE();
  for (const char* name : {"cfg_conv_3x3_p1", "cfg_conv_5x5_p0"}) {
    SCOPED_TRACE(name);
    const Npz golden(golden_file(std::string("layers/") + name));
    const auto x_shape = golden.shape("in_x"), w_shape = golden.shape("in_mu"), y_shape = golden.shape("up_y");
    ConvShape s{
        int(x_shape[0]), int(x_shape[1]), int(x_shape[2]), int(x_shape[3]), int(w_shape[0]), int(w_shape[2]), 0};
    s.pad = int(y_shape[2] - s.out_height()) / 2;
    const int d = s.kernel * s.kernel, outputs = s.out_height() * s.out_width();
    const Doubles x = golden.f64("in_x"), l = golden.f64("in_L_packed"), mean = golden.f64("in_mu");
    const Doubles up = golden.f64("up_y"), eps = golden.f64("eps_y"), bias_sd = golden.f64("in_b_sigma");
    const Doubles golden_v = golden.f64("lrt_out_v");
    Doubles want_v = golden_v, dv(up.size()), want_dx = golden.f64("lrt_g_x");
    for (size_t i = 0; i < up.size(); i++) {
      const double sd = bias_sd[i / outputs % s.out_channels];
      want_v[i] -= sd * sd;
      dv[i] = 0.5 * up[i] * eps[i] / std::sqrt(golden_v[i]);
    }
    each_patch(s, [&](size_t out, size_t block, const std::vector<long>& patch) {  // the mean's part
      for (int i = 0; i < d; i++)
        if (patch[i] >= 0) want_dx[patch[i]] -= up[out] * mean[block * d + i];
    });
    const Reference reference = reference_of(s, x, l, dv);
    Doubles want_dl;  // of [filter][channel][d][d]
    const Doubles all = golden.f64("lrt_g_L");
    for (size_t row = 0; row < all.size() / d; row++)
      for (size_t j = 0; j <= row % d; j++) want_dl.push_back(all[row * d + j]);
    EXPECT_TRUE(close(reference.v, want_v, {.l2 = 1e-10}));
    EXPECT_TRUE(close(reference.dx, want_dx, {.l2 = 1e-10}));
    EXPECT_TRUE(close(reference.dl, want_dl, {.l2 = 1e-10}));

    Bench t(s);
    std::vector<float> stored(l.begin(), l.end());
    for (size_t b = 0; b < l.size(); b += packed(d))
      for (int i = 0; i < d; i++)
        for (int j = 0; j <= i; j++)
          stored[b + entry(i, j)] =
              float(j < i ? l[b + entry(i, j)] / l[b + entry(i, i)] : std::log(l[b + entry(i, i)]));
    t.x.set(Bench::padded(golden.f32("in_x"), t.x.size()));
    t.factor.set(Bench::padded(stored, t.factor.size()));
    t.dv.set(Bench::padded({dv.begin(), dv.end()}, t.dv.size()));
    t.forward();
    t.backward();
    EXPECT_TRUE(close(Bench::row(t.v.host(), 0, s.output_size(), 0), want_v, {.l2 = 2e-6}));
    EXPECT_TRUE(close(Bench::row(t.dx.host(), 0, s.input_size(), 0), want_dx, {.l2 = 3e-6}));
    EXPECT_TRUE(
        close(Bench::row(t.dfactor.host(), 0, t.factor_size, 0), gradient_to_stored(want_dl, l, d), {.l2 = 3e-6}));
  }
}

TEST(CholeskyMoments, FiniteDifferences) {
  BATON_NEEDS_DEVICE();
  for (int pad : {0, 2}) {
    SCOPED_TRACE(pad);
    const ConvShape s{1, 2, 4, 4, 2, 3, pad};
    Bench t(s);
    const std::vector<float> x = normals(t.x.size(), 1), dv = normals(t.v.size(), 3);
    const std::vector<float> factor = Bench::padded(random_factors(4, 9, 2), t.factor.size());
    t.x.set(x), t.factor.set(factor), t.dv.set(dv);
    t.backward();
    auto objective = [&] {
      t.forward();
      const std::vector<float> v = t.v.host();
      double j = 0;
      for (size_t i = 0; i < s.output_size(); i++) j += double(v[i]) * dv[i];
      return j;
    };
    const auto by_x = central_differences(x, 0x1p-5f, [&](const std::vector<float>& values) {
      t.x.set(values);
      return objective();
    });
    t.x.set(x);
    const auto by_factor = central_differences(factor, 0x1p-6f, [&](const std::vector<float>& values) {
      t.factor.set(values);
      return objective();
    });
    EXPECT_TRUE(close(doubles(t.dx.host()), by_x, {.l2 = 1e-3}));
    EXPECT_TRUE(close(doubles(t.dfactor.host()), by_factor, {.l2 = 1e-3}));
  }
}

// A diagonal L is the diagonal Gaussian, whose variances are a convolution of the squares.
TEST(CholeskyMoments, DiagonalFactorsConvolveTheSquares) {
  BATON_NEEDS_DEVICE();
  const ConvShape s{2, 3, 9, 8, 4, 5, 2};
  const int d = 25, blocks = 12;
  Bench t(s);
  Memory& memory = t.memory;
  const std::vector<float> x = normals(t.x.size(), 1), logs = normals(blocks * d, 2, -1, 0.5f);
  Buffer log_std(memory, logs);
  t.x.set(x);
  cholesky_from_diagonal(t.factor, t.factor_stride(), log_std, blocks * d, blocks, d, 1, memory.stream());
  t.forward();
  std::vector<float> squares = x, variances = logs;
  for (float& value : squares) value *= value;
  for (float& value : variances) value = std::exp(2 * value);
  Buffer square(memory, squares), variance(memory, variances);
  Buffer<float> want(memory, s.output_size(), NAN);
  Convolution(memory.device(), memory.arena(), s, 1).forward(memory.device(), {square, 0}, {variance, 0}, {want, 0});
  EXPECT_TRUE(close(Bench::row(t.v.host(), 0, s.output_size(), 0), want.host(), {.l2 = 1e-6}));
}

TEST(CholeskyMoments, RefusesShapes) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  auto make = [&](const ConvShape& s, int replicas = 1) {
    CholeskyMoments(memory.device(), memory.arena(), s, replicas);
  };
  EXPECT_THROW(make({1, 1, 4, 4, 1, 5, 0}), InputError);
  EXPECT_THROW(make({1, 1, 9, 9, 1, 8, 0}), InputError);
  EXPECT_THROW(make({0, 1, 4, 4, 1, 3, 0}), InputError);
  EXPECT_THROW(make({1, 0, 4, 4, 1, 3, 0}), InputError);
  EXPECT_THROW(make({1, 1, 4, 4, 0, 3, 0}), InputError);
  EXPECT_THROW(make({1, 1, 4, 4, 1, 0, 0}), InputError);
  EXPECT_THROW(make({1, 1, 4, 4, 1, 3, -1}), InputError);
  EXPECT_THROW(make({1, 1, 4, 4, 1, 3, 0}, 0), InputError);
}

}  // namespace
}  // namespace baton::test
