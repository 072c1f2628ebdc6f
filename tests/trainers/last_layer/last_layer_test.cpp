// The last-layer posterior against recorded values and against its own definition: P is the sum, S its inverse,
// whatever the calls; and what fails changes nothing.
#include "trainers/last_layer/last_layer.h"

#include <unistd.h>

#include <cstring>
#include <functional>
#include <random>

#include "engine/io/dataset.h"
#include "engine/io/safetensors.h"
#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"
#include "tests/support/laplace_goldens.h"

namespace baton::test {
namespace {

namespace fs = std::filesystem;
using Doubles = std::vector<double>;

struct Samples {
  Doubles x;  // [n][dim]
  std::vector<int32_t> labels;
  int dim, classes;

  int count() const { return int(labels.size()); }
  Doubles row(int i) const { return Doubles(x.begin() + long(i) * dim, x.begin() + long(i + 1) * dim); }
  void append(const Doubles& row, int label) {
    x.insert(x.end(), row.begin(), row.end());
    labels.push_back(label);
  }
  Samples pick(const std::vector<int>& index) const {
    Samples s{{}, {}, dim, classes};
    for (int i : index) s.append(row(i), labels[size_t(i)]);
    return s;
  }
  Samples slice(int first, int n) const {
    std::vector<int> index;
    for (int i = 0; i < n; i++) index.push_back(first + i);
    return pick(index);
  }
  Samples reversed() const {
    std::vector<int> index;
    for (int i = count(); i-- > 0;) index.push_back(i);
    return pick(index);
  }
  Samples scaled(double factor) const {
    Samples s = *this;
    for (double& v : s.x) v *= factor;
    return s;
  }
};

Samples digits_at(const std::vector<int64_t>& index) {
  const DigitRows rows = digit_rows(index);
  return {rows.x, rows.labels, digit_dim, digit_classes};
}
Samples digits(const std::string& split) { return digits_at(digit_split(split)); }
Samples random_samples(int n, int dim, int classes, uint64_t seed) {
  SplitMix64 random(seed);
  Samples s{{}, {}, dim, classes};
  for (int i = 0; i < n; i++) {
    Doubles row;
    for (int k = 0; k < dim; k++) row.push_back(random.normal());
    s.append(row, int(random.below(uint64_t(classes))));
  }
  return s;
}
Doubles random_weights(int classes, int dim, uint64_t seed) {
  SplitMix64 random(seed);
  Doubles w;
  for (int i = 0; i < classes * dim; i++) w.push_back(random.normal() / std::sqrt(double(dim)));
  return w;
}

// Samples on the device.
template <class Real>
class Rows {
 public:
  explicit Rows(const Samples& s)
      : x_(memory_, std::vector<Real>(s.x.begin(), s.x.end())), labels_(memory_, s.labels), samples_(s) {}
  FeatureRows<Real> all() { return part(0, samples_.count()); }
  FeatureRows<Real> part(int first, int count) {
    return {x_ + size_t(first) * samples_.dim, labels_ + first, count, samples_.dim};
  }
  int count() const { return samples_.count(); }
  Memory& memory() { return memory_; }

 private:
  Memory memory_;
  Buffer<Real> x_;
  Buffer<int32_t> labels_;
  Samples samples_;
};

Device& the_device() {
  static Memory memory;
  return memory.device();
}

// What save() writes, as one map of everything.
using Snapshot = std::map<std::string, std::string>;
fs::path temporary(const std::string& name) {
  return fs::temp_directory_path() / ("baton_last_layer_" + name + "_" + std::to_string(::getpid()) + ".safetensors");
}
template <class Real>
Snapshot snapshot(LastLayer<Real>& layer) {
  const fs::path path = temporary("snapshot");
  layer.save(path);
  const TensorFile file = load_safetensors(path);
  fs::remove(path);
  Snapshot all(file.metadata.begin(), file.metadata.end());
  for (const auto& [name, tensor] : file.tensors)
    all["tensor " + name] =
        tensor.dtype + shape_text(tensor.shape) + std::string(tensor.bytes.begin(), tensor.bytes.end());
  return all;
}
testing::AssertionResult same(const Snapshot& got, const Snapshot& want) {
  for (const auto& [name, value] : want)
    if (!got.count(name) || got.at(name) != value) return testing::AssertionFailure() << name << " differs";
  if (got.size() != want.size()) return testing::AssertionFailure() << "more than there was";
  return testing::AssertionSuccess();
}

template <class E, class F>
void expect_error(F f, const std::string& words) {
  try {
    f();
    ADD_FAILURE() << "no error, expected: " << words;
  } catch (const E& e) {
    EXPECT_NE(std::string(e.what()).find(words), std::string::npos) << e.what();
  }
}

Doubles product(const Doubles& a, const Doubles& b, int n) {
  Doubles c(size_t(n) * n, 0);
  for (int i = 0; i < n; i++)
    for (int k = 0; k < n; k++)
      for (int j = 0; j < n; j++) c[size_t(i) * n + j] += a[size_t(i) * n + k] * b[size_t(k) * n + j];
  return c;
}
Doubles identity(int n) {
  Doubles eye(size_t(n) * n, 0);
  for (int i = 0; i < n; i++) eye[size_t(i) * n + i] = 1;
  return eye;
}
double apart(const Doubles& got, const Doubles& want) { return difference(got, want).l2; }

template <class Real>
constexpr bool wide = sizeof(Real) == 8;
template <class Real>
constexpr double either(double in_double, double in_float) {
  return wide<Real> ? in_double : in_float;
}
template <class Real>
Tolerance within(double in_double, double in_float) {
  const double t = either<Real>(in_double, in_float);
  return {.l2 = t, .worst = t, .bias = t};
}

LastLayerOptions with(double tau, SampleWeight weight, int refactor_after = 1000) {
  return {.tau = tau, .weight = weight, .refactor_after = refactor_after};
}
UpdateOptions rule_of(UpdateRule rule, double gamma = 10, int passes = 1) {
  return {.rule = rule, .gamma = gamma, .passes = passes};
}
constexpr UpdateRule all_rules[] = {UpdateRule::implicit, UpdateRule::gaussian, UpdateRule::categorical,
                                    UpdateRule::categorical_published};

// A posterior fitted to `base` random samples; `more` others lie ready.
template <class Real>
struct Fitted {
  Fitted(int dim, int classes, int base, int more, SampleWeight weight = SampleWeight::categorical,
         int refactor_after = 1000, double tau = 1)
      : samples(random_samples(base + more, dim, classes, 21)),
        rows(samples),
        fitted(rows.part(0, base)),
        fresh(rows.part(base, more)),
        weights(random_weights(classes, dim, 22)),
        layer(rows.memory().device(), dim, classes, with(tau, weight, refactor_after)) {
    layer.fit_covariance(fitted, weights);
  }
  FeatureRows<Real> next(int first, int count) {
    FeatureRows<Real> part = fresh;
    part.x += size_t(first) * part.dim, part.labels += first, part.count = count;
    return part;
  }
  Samples samples;
  Rows<Real> rows;
  FeatureRows<Real> fitted, fresh;
  Doubles weights;
  LastLayer<Real> layer;
};

template <class Real>
class LastLayerOf : public testing::Test {};
using Precisions = testing::Types<float, double>;
struct Names {
  template <class T>
  static std::string GetName(int) {
    return wide<T> ? "Double" : "Float";
  }
};
TYPED_TEST_SUITE(LastLayerOf, Precisions, Names);

// -------------------------------------------------------------------------------------------------- recorded values
template <class Real>
void expect_covariance(const Npz& z, const std::string& name, const Doubles& got, Tolerance t) {
  if (z.has(name)) {
    EXPECT_TRUE(close(got, z.f64(name), t));
    return;
  }
  Doubles diagonal, row7(got.begin() + 7 * 65, got.begin() + 8 * 65);
  double square = 0;
  for (int i = 0; i < 65; i++) diagonal.push_back(got[size_t(i) * 66]);
  for (double v : got) square += v * v;
  EXPECT_TRUE(close(diagonal, z.f64(name + "_diag"), t));
  EXPECT_TRUE(close(row7, z.f64(name + "_row7"), t));
  EXPECT_NEAR(std::sqrt(square), z.scalar(name + "_frob"), t.l2 * z.scalar(name + "_frob"));
}

TYPED_TEST(LastLayerOf, Goldens) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  struct Case {
    std::string name;
    SampleWeight base;
    UpdateRule rule;
  };
  // `implicit` starts from the categorical covariance, as do both categorical rules.
  const Case cases[] = {{"gaussian", SampleWeight::gaussian, UpdateRule::gaussian},
                        {"categorical", SampleWeight::categorical, UpdateRule::categorical},
                        {"catquirk", SampleWeight::categorical, UpdateRule::categorical_published},
                        {"implicit", SampleWeight::categorical, UpdateRule::implicit}};
  Rows<Real> news(digits("new50"));
  for (const std::string set : {"base100", "base1000"}) {
    const Npz z = golden("digits_update_shared_" + set);
    const Doubles map = golden("digits_map_" + set).f64("W_map");
    Rows<Real> base(digits(set));
    for (const Case& c : cases) {
      LastLayer<Real> layer(the_device(), 65, 10, with(1, c.base));
      layer.fit_covariance(base.all(), map);
      const std::string weight = name_of(c.base);
      EXPECT_TRUE(close(layer.precision(), z.f64("prec_" + weight), within<Real>(1e-10, 1e-4)));
      EXPECT_TRUE(close(layer.covariance(), z.f64("cov_" + weight), within<Real>(1e-10, 1e-4)));
      for (const std::string gamma : {"_g1", "_g10"})
        for (int b : {1, 10, 50}) {
          if (c.rule == UpdateRule::implicit && gamma == "_g10") continue;
          const std::string name = c.name + (c.rule == UpdateRule::implicit ? "" : gamma) + "_b" + std::to_string(b);
          SCOPED_TRACE(set + " " + name);
          for (bool one_by_one : {false, true}) {
            layer.fit_covariance(base.all(), map);
            const UpdateOptions o = rule_of(c.rule, gamma == "_g10" ? 10 : 1);
            if (one_by_one) layer.update_one_by_one(news.part(0, b), o);
            else layer.update(news.part(0, b), o);
            const Tolerance t = b == 1 ? within<Real>(1e-10, 1e-3) : within<Real>(1e-8, 1e-3);
            EXPECT_TRUE(close(layer.weights(), z.f64(name + "_W"), t));
            expect_covariance<Real>(z, name + "_cov", layer.covariance(), t);
            EXPECT_EQ(layer.absorbed(), b);
          }
        }
    }
    LastLayer<Real> layer(the_device(), 65, 10, with(1, SampleWeight::gaussian));
    layer.fit_covariance(base.all(), map);
    layer.update(news.part(0, 10), rule_of(UpdateRule::gaussian, 10, 2));
    EXPECT_TRUE(close(layer.weights(), z.f64("gaussian_g10_b10_passes2_W"), within<Real>(1e-8, 1e-3)));
    expect_covariance<Real>(z, "gaussian_g10_b10_passes2_cov", layer.covariance(), within<Real>(1e-8, 1e-3));
    const Doubles before = layer.covariance();
    for (int b : {1, 10, 50}) {
      layer.set_weights(map);
      layer.update_first_order(news.part(0, b), 0.01);
      EXPECT_TRUE(
          close(layer.weights(), z.f64("firstorder_g0.01_b" + std::to_string(b) + "_W"), within<Real>(1e-10, 1e-4)));
    }
    EXPECT_TRUE(exact(layer.covariance(), before));
    EXPECT_EQ(layer.absorbed(), 10);
  }
}

// From the samples on: this fit's MAP is the recorded one.
TYPED_TEST(LastLayerOf, FitsAndPredictsGoldens) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  const Npz z = golden("digits_predict_base100"), update = golden("digits_update_shared_base100");
  Rows<Real> base(digits("base100"));
  Samples points{z.f64("Phi"), {}, 65, 10};
  for (int64_t y : z.i64("y")) points.labels.push_back(int32_t(y));
  Rows<Real> tests(points);
  for (SampleWeight weight : {SampleWeight::gaussian, SampleWeight::categorical}) {
    const std::string name = name_of(weight);
    LastLayer<Real> layer(the_device(), 65, 10, with(1, weight));
    const MapResult map = layer.fit(base.all());
    EXPECT_TRUE(map.converged);
    EXPECT_TRUE(close(layer.weights(), golden("digits_map_base100").f64("W_map"), within<Real>(1e-8, 1e-3)));
    EXPECT_TRUE(close(layer.covariance(), update.f64("cov_" + name), within<Real>(1e-8, 1e-3)));
    Buffer<Real> variances(tests.memory(), 50), logits(tests.memory(), 500);
    layer.variances(tests.all().x, 50, variances);
    layer.logits(tests.all().x, 50, logits);
    EXPECT_TRUE(close(variances.host(), z.f64("var_shared_" + name), within<Real>(1e-8, 1e-3)));
    EXPECT_TRUE(close(logits.host(), z.f64("f_mu"), within<Real>(1e-8, 1e-3)));
    const auto predicted = [&](Link link, double lambda) {
      return layer.predict(tests.all().x, 50, {.link = link, .lambda = lambda}).probability;
    };
    const Tolerance t = within<Real>(1e-8, 1e-3);
    EXPECT_TRUE(close(predicted(Link::map, 0), z.f64("p_map"), t));
    EXPECT_TRUE(close(predicted(Link::mean_field, M_PI / 8), z.f64("p_meanfield_" + name + "_pi8"), t));
    if (weight == SampleWeight::gaussian) {
      EXPECT_TRUE(close(predicted(Link::mean_field, 1), z.f64("p_meanfield_gaussian_1"), t));
    }
  }
}

TYPED_TEST(LastLayerOf, TinyGoldens) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  const Npz z = golden("tiny_softmax");
  Samples s{z.f64("Phi"), {}, 3, 3};
  for (int64_t y : z.i64("y")) s.labels.push_back(int32_t(y));
  Rows<Real> base(s);
  Samples one{{}, {}, 3, 3};
  one.append(z.f64("phi_new"), int(z.scalar("y_new")));
  Rows<Real> fresh(one);
  struct Case {
    std::string name;
    UpdateRule rule;
    double gamma;
  };
  const Case cases[] = {{"upd_gaussian_g1", UpdateRule::gaussian, 1},
                        {"upd_gaussian_g10", UpdateRule::gaussian, 10},
                        {"upd_cat_g1", UpdateRule::categorical, 1},
                        {"upd_catquirk_g1", UpdateRule::categorical_published, 1},
                        {"shared_implicit", UpdateRule::implicit, 1}};
  const Tolerance t = within<Real>(1e-10, 1e-4);
  for (const Case& c : cases) {
    SCOPED_TRACE(c.name);
    const SampleWeight weight = c.rule == UpdateRule::gaussian ? SampleWeight::gaussian : SampleWeight::categorical;
    LastLayer<Real> layer(the_device(), 3, 3, with(z.scalar("tau"), weight));
    layer.fit_covariance(base.all(), z.f64("W_map"));
    EXPECT_TRUE(close(layer.precision(), z.f64(std::string("shared_prec_") + name_of(weight)), t));
    EXPECT_TRUE(close(layer.covariance(), z.f64(std::string("shared_cov_") + name_of(weight)), t));
    layer.update(fresh.all(), rule_of(c.rule, c.gamma));
    EXPECT_TRUE(close(layer.weights(), z.f64(c.name + "_W"), t));
    EXPECT_TRUE(close(layer.covariance(), z.f64(c.name + "_cov"), t));
  }
}

// A linear-Gaussian model's covariance: that of the gaussian rule with X / sigma, from the prior on.
TYPED_TEST(LastLayerOf, RecursiveLeastSquares) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  const Npz z = golden("gaussian_rls");
  Samples s{z.f64("X"), {}, 5, 2};
  for (int i = 0; i < 60; i++) s.labels.push_back(i % 2);
  s = s.scaled(1 / std::sqrt(z.scalar("sigma2")));
  Rows<Real> rows(s), back(s.reversed());
  const Doubles sequence = z.f64("seq_cov"), means = z.f64("seq_mean"), y = z.f64("y");
  const double sd = std::sqrt(z.scalar("sigma2")), tau = z.scalar("tau");
  LastLayer<Real> layer(the_device(), 5, 2, with(tau, SampleWeight::gaussian));
  Doubles b(5, 0.);  // X'y / sigma^2, so that S b is the regression's mean
  double yy = 0, fit = 0;
  for (int i = 0; i < 60; i++) {
    layer.update(rows.part(i, 1), rule_of(UpdateRule::gaussian, 1));
    ASSERT_TRUE(close(layer.covariance(), Doubles(sequence.begin() + i * 25, sequence.begin() + (i + 1) * 25),
                      within<Real>(1e-10, 1e-4)))
        << i;
    yy += y[size_t(i)] * y[size_t(i)] / (sd * sd);
    const Doubles cov = layer.covariance();
    Doubles mean(5, 0.);
    for (int d = 0; d < 5; d++) b[size_t(d)] += s.x[size_t(i) * 5 + size_t(d)] * y[size_t(i)] / sd;
    for (int d = 0; d < 25; d++) mean[size_t(d / 5)] += cov[size_t(d)] * b[size_t(d % 5)];
    ASSERT_TRUE(close(mean, Doubles(means.begin() + i * 5, means.begin() + (i + 1) * 5), within<Real>(1e-10, 1e-3)));
    fit = 0;
    for (int d = 0; d < 5; d++) fit += mean[size_t(d)] * b[size_t(d)];
  }
  // ln N(y; 0, sigma^2 I + X X' / tau), its determinant from log_evidence's.
  double square = 0;
  for (double w : layer.weights()) square += w * w;
  const double determinant = -layer.log_evidence(0) - tau * square / 2;  // ln det P - D ln tau; two classes, one S
  const double evidence = -0.5 * (60 * std::log(2 * M_PI * sd * sd) + yy - fit + determinant);
  EXPECT_NEAR(evidence, z.scalar("log_evidence"), either<Real>(1e-9, 1e-2) * std::abs(evidence));
  EXPECT_TRUE(close(layer.covariance(), z.f64("batch_cov"), within<Real>(1e-10, 1e-4)));
  EXPECT_TRUE(close(layer.precision(), z.f64("batch_prec"), within<Real>(1e-10, 1e-5)));
  LastLayer<Real> other(the_device(), 5, 2, with(z.scalar("tau"), SampleWeight::gaussian));
  other.update(back.all(), rule_of(UpdateRule::gaussian, 1));
  EXPECT_TRUE(close(other.covariance(), layer.covariance(), within<Real>(1e-12, 1e-4)));
}

TYPED_TEST(LastLayerOf, WoodburyChain) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  const Npz z = golden("woodbury_chain");
  Rows<Real> rows(digits_at(z.i64("idx")));
  UpdateOptions o = rule_of(UpdateRule::gaussian, 1);
  o.duplicates = true;  // 2000 of 1797 digits
  for (int call : {1, 50})
    for (int refactor_after : {1000, 1000000}) {
      SCOPED_TRACE(std::to_string(call) + " a call, refactored after " + std::to_string(refactor_after));
      LastLayer<Real> layer(the_device(), 65, 10, with(1, SampleWeight::gaussian, refactor_after));
      for (int first = 0; first < 2000; first += call) layer.update(rows.part(first, call), o);
      const double off = apart(layer.covariance(), z.f64("cov_final"));
      char text[32];
      snprintf(text, sizeof text, "%.1e", off);
      this->RecordProperty("off" + std::to_string(call) + "_" + std::to_string(refactor_after), text);
      EXPECT_LT(off, either<Real>(1e-13, 1e-5));
      EXPECT_LT(apart(product(layer.covariance(), layer.precision(), 65), identity(65)), either<Real>(1e-12, 1e-4));
      EXPECT_LT(layer.drift(), either<Real>(1e-12, 1e-4));
      EXPECT_EQ(layer.absorbed(), 2000);
      if (refactor_after == 1000) {
        EXPECT_GE(layer.refactored(), 1);
        EXPECT_LT(layer.downdates(), 1000);
      } else {
        EXPECT_EQ(layer.refactored(), 0);
        EXPECT_EQ(layer.downdates(), 2000);
      }
    }
}

// ------------------------------------------------------------------------------------------------ calls and their
// order
TYPED_TEST(LastLayerOf, OneByOneIsTheSame) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  for (UpdateRule rule : all_rules)
    for (int passes : {1, 3}) {
      SCOPED_TRACE(std::string(name_of(rule)) + ", passes " + std::to_string(passes));
      const int n = passes == 1 ? 75 : 10;
      Fitted<Real> a(33, 7, 60, n), b(33, 7, 60, n);
      const UpdateOptions o = rule_of(rule, 2, passes);
      a.layer.update(a.fresh, o);
      b.layer.update_one_by_one(b.fresh, o);
      const Tolerance t = within<Real>(1e-10, 2e-4);
      EXPECT_TRUE(close(a.layer.weights(), b.layer.weights(), t));
      EXPECT_TRUE(close(a.layer.covariance(), b.layer.covariance(), t));
      EXPECT_TRUE(close(a.layer.precision(), b.layer.precision(), t));
      EXPECT_EQ(a.layer.downdates(), n * passes);
      EXPECT_EQ(b.layer.downdates(), n * passes);
      EXPECT_EQ(b.layer.absorbed(), n);
      EXPECT_NE(apart(a.layer.weights(), a.weights), 0);
    }
}

TYPED_TEST(LastLayerOf, CallsAddUp) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  for (UpdateRule rule : all_rules) {
    SCOPED_TRACE(name_of(rule));
    Fitted<Real> whole(65, 10, 100, 100), parts(65, 10, 100, 100);
    const UpdateOptions o = rule_of(rule, 2);
    whole.layer.update(whole.fresh, o);
    int first = 0;
    for (int b : {1, 31, 2, 33, 3, 30}) {
      parts.layer.update(parts.next(first, b), o);
      first += b;
    }
    ASSERT_EQ(first, 100);
    const Tolerance t = within<Real>(1e-10, 3e-4);
    EXPECT_TRUE(close(parts.layer.weights(), whole.layer.weights(), t));
    EXPECT_TRUE(close(parts.layer.covariance(), whole.layer.covariance(), t));
    EXPECT_TRUE(close(parts.layer.precision(), whole.layer.precision(), t));
  }
}

// Nothing is lost between calls: 1,000 of one sample are one of 1,000.
TYPED_TEST(LastLayerOf, ThousandCalls) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  for (int dim : {65, 300})
    for (UpdateRule rule : {UpdateRule::implicit, UpdateRule::gaussian}) {
      if (dim == 300 && rule == UpdateRule::gaussian) continue;
      Fitted<Real> many(dim, 10, 100, 1000), once(dim, 10, 100, 1000);
      const UpdateOptions o = rule_of(rule, 2);
      for (int i = 0; i < 1000; i++) many.layer.update(many.next(i, 1), o);
      once.layer.update(once.fresh, o);
      const double s = apart(many.layer.covariance(), once.layer.covariance()),
                   p = apart(many.layer.precision(), once.layer.precision()),
                   w = apart(many.layer.weights(), once.layer.weights());
      char text[128];
      snprintf(text, sizeof text, "S %.1e, P %.1e, W %.1e, drift %.1e", s, p, w, many.layer.drift());
      this->RecordProperty(std::string(name_of(rule)) + std::to_string(dim), text);
      SCOPED_TRACE(std::string(name_of(rule)) + ", D = " + std::to_string(dim) + ": " + text);
      EXPECT_LT(s, either<Real>(1e-12, 1e-6 * (dim > 100 ? 3 : 1)));
      EXPECT_LT(p, either<Real>(1e-12, 1e-6 * (dim > 100 ? 3 : 1)));
      EXPECT_LT(w, either<Real>(1e-12, 1e-5));
      EXPECT_EQ(many.layer.absorbed(), 1000);
      EXPECT_LT(many.layer.drift(), either<Real>(1e-12, 1e-4));
      EXPECT_LT(apart(product(many.layer.covariance(), many.layer.precision(), dim), identity(dim)),
                either<Real>(1e-11, 1e-3));
    }
}

// S of the gaussian rule is a sum over samples: their order and labels do not matter. A mean depends on the order, of
// the implicit rule only a little.
TYPED_TEST(LastLayerOf, OrderAndLabels) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  const Samples fresh = digits("new50").slice(0, 10);
  Samples relabelled = fresh;
  for (int32_t& y : relabelled.labels) y = (y + 3) % 10;
  Rows<Real> base(digits("base100")), forth(fresh), back(fresh.reversed()), other(relabelled);
  const Doubles map = golden("digits_map_base100").f64("W_map");
  const auto run = [&](UpdateRule rule, Rows<Real>& rows) {
    auto layer = std::make_unique<LastLayer<Real>>(
        the_device(), 65, 10,
        with(1, rule == UpdateRule::gaussian ? SampleWeight::gaussian : SampleWeight::categorical));
    layer->fit_covariance(base.all(), map);
    layer->update(rows.all(), rule_of(rule, 1));
    return layer;
  };
  const auto first = run(UpdateRule::gaussian, forth);
  EXPECT_TRUE(close(run(UpdateRule::gaussian, back)->covariance(), first->covariance(), within<Real>(1e-12, 1e-5)));
  EXPECT_TRUE(exact(run(UpdateRule::gaussian, other)->covariance(), first->covariance()));
  EXPECT_GT(apart(run(UpdateRule::gaussian, other)->weights(), first->weights()), 1e-3);
  const auto mean = run(UpdateRule::implicit, forth);
  const double moved = apart(mean->weights(), map),
               order = apart(run(UpdateRule::implicit, back)->weights(), mean->weights());
  EXPECT_GT(order, 0);
  EXPECT_LT(order, moved / 10);
}

// --------------------------------------------------------------------------------------------- fold, factor and files
TYPED_TEST(LastLayerOf, FoldIsInvisible) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  Fitted<Real> f(20, 4, 40, 30);
  f.layer.update(f.next(0, 17), {});
  Buffer<Real> variances(f.rows.memory(), 40), products(f.rows.memory(), 40 * 20);
  const auto look = [&] {
    f.layer.variances(f.fitted.x, 40, variances);
    f.layer.covariance_products(f.fitted.x, 40, products);
    Doubles all = f.layer.covariance();
    for (const Doubles& more : {f.layer.precision(), f.layer.weights(), Doubles{f.layer.drift() < 1e-3 ? 1. : 0.}})
      all.insert(all.end(), more.begin(), more.end());
    for (Real v : variances.host()) all.push_back(v);
    for (Real v : products.host()) all.push_back(v);
    return all;
  };
  const Snapshot waiting = snapshot(f.layer);
  const Doubles before = look();
  EXPECT_TRUE(same(snapshot(f.layer), waiting)) << "looking changes nothing";
  EXPECT_NE(waiting.at("tensor waiting_downdates").find("[17, 20]"), std::string::npos);
  f.layer.fold();
  EXPECT_TRUE(close(look(), before, within<Real>(1e-14, 1e-6)));
  EXPECT_NE(snapshot(f.layer).at("tensor waiting_downdates").find("[0, 20]"), std::string::npos);
  const Snapshot folded = snapshot(f.layer);
  f.layer.fold();
  EXPECT_TRUE(same(snapshot(f.layer), folded));
  EXPECT_EQ(f.layer.downdates(), 17);
}

TYPED_TEST(LastLayerOf, Refactor) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  Fitted<Real> f(30, 4, 40, 200, SampleWeight::gaussian);
  f.layer.update(f.fresh, rule_of(UpdateRule::gaussian, 1));
  const Doubles before = f.layer.covariance(), precision = f.layer.precision(), weights = f.layer.weights();
  EXPECT_EQ(f.layer.downdates(), 200);
  f.layer.refactor();
  EXPECT_EQ(f.layer.downdates(), 0);
  EXPECT_EQ(f.layer.refactored(), 0) << "counts what updates did";
  EXPECT_TRUE(close(f.layer.covariance(), before, within<Real>(1e-13, 1e-5)));
  EXPECT_TRUE(close(f.layer.precision(), precision, within<Real>(1e-15, 1e-6)));
  EXPECT_TRUE(exact(f.layer.weights(), weights));
  EXPECT_LT(f.layer.drift(), either<Real>(1e-13, 1e-5));

  Fitted<Real> often(30, 4, 40, 200, SampleWeight::gaussian, 40);
  often.layer.update(often.fresh, rule_of(UpdateRule::gaussian, 1));
  EXPECT_GE(often.layer.refactored(), 2);
  EXPECT_LT(often.layer.downdates(), 100);
  EXPECT_TRUE(close(often.layer.covariance(), before, within<Real>(1e-13, 1e-5)));
}

// A prior so weak that the first samples take five digits (of double thirteen) from S: it is made anew from P.
TYPED_TEST(LastLayerOf, DriftIsMended) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  const double tau = either<Real>(1e-11, 1e-2);
  Rows<Real> rows(random_samples(100, 8, 3, 31).scaled(11));
  LastLayer<Real> layer(the_device(), 8, 3, with(tau, SampleWeight::gaussian, 1000000));
  for (int i = 0; i < 100; i++) layer.update(rows.part(i, 1), rule_of(UpdateRule::gaussian, 1));
  EXPECT_GE(layer.refactored(), 1);
  EXPECT_LT(layer.drift(), either<Real>(1e-10, 1e-4));
  EXPECT_LT(apart(product(layer.covariance(), layer.precision(), 8), identity(8)), either<Real>(1e-10, 1e-4));
}

TYPED_TEST(LastLayerOf, FilesContinue) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  const fs::path path = temporary("continue");
  for (int before : {0, 1, 31, 32, 33, 70})
    for (bool one_by_one : {false, true}) {
      SCOPED_TRACE(before);
      Fitted<Real> f(25, 5, 40, 150, SampleWeight::categorical, 50, 0.7);
      if (before && one_by_one) f.layer.update_one_by_one(f.next(0, before), {});
      else if (before) f.layer.update(f.next(0, before), {});
      f.layer.save(path);
      const auto other = LastLayer<Real>::load(the_device(), path);
      EXPECT_EQ(other->dim(), 25);
      EXPECT_EQ(other->classes(), 5);
      EXPECT_EQ(other->options().tau, 0.7);
      EXPECT_EQ(other->options().weight, SampleWeight::categorical);
      EXPECT_EQ(other->options().refactor_after, 50);
      EXPECT_EQ(other->absorbed(), before);
      EXPECT_TRUE(same(snapshot(*other), snapshot(f.layer)));
      expect_error<InputError>([&] { other->update(f.fitted, {}); }, "duplicate");
      if (before) expect_error<InputError>([&] { other->update(f.next(0, 1), {}); }, "absorbed before");
      for (LastLayer<Real>* layer : {&f.layer, other.get()}) {
        layer->update(f.next(before, 1), {});
        layer->update(f.next(before + 1, 40), rule_of(UpdateRule::categorical));
        layer->update(f.next(before + 41, 39), rule_of(UpdateRule::gaussian, 2));
      }
      EXPECT_GE(f.layer.refactored(), 1);
      EXPECT_TRUE(same(snapshot(*other), snapshot(f.layer)));
    }
  LastLayer<Real> fresh(the_device(), 4, 2, with(3, SampleWeight::gaussian));  // nothing but the prior
  fresh.save(path);
  EXPECT_TRUE(same(snapshot(*LastLayer<Real>::load(the_device(), path)), snapshot(fresh)));
  fs::remove(path);
}

TYPED_TEST(LastLayerOf, FilesThatAreRefused) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  const fs::path path = temporary("refused");
  Fitted<Real> f(12, 3, 30, 5);
  f.layer.update(f.fresh, {});
  f.layer.save(path);
  const TensorFile good = load_safetensors(path);
  const auto refused = [&](const std::string& words, const std::function<void(TensorFile&)>& spoil) {
    TensorFile file = good;
    spoil(file);
    save_safetensors(path, file);
    expect_error<InputError>([&] { LastLayer<Real>::load(the_device(), path); }, words);
  };
  const auto number = [](const char* name, size_t at, Real value) {
    return [=](TensorFile& file) {
      std::memcpy(file.tensors.at(name).bytes.data() + at * sizeof(Real), &value, sizeof value);
    };
  };
  refused("not a last layer", [](TensorFile& f) { f.metadata["format"] = "baton.checkpoint"; });
  refused("not a last layer", [](TensorFile& f) { f.metadata["version"] = "2"; });
  refused("not a last layer", [](TensorFile& f) { f.metadata.clear(); });
  refused("settings are damaged", [](TensorFile& f) { f.metadata["settings"] = "{"; });
  refused("settings are damaged", [](TensorFile& f) { f.metadata.erase("settings"); });
  refused("settings are damaged", [](TensorFile& f) { f.metadata["settings"] = "{\"tau\": \"one\"}"; });
  for (const char* name : {"weights", "precision", "covariance", "waiting_downdates", "waiting_samples"}) {
    refused(std::string("'") + name + "' is not finite", number(name, 5, Real(NAN)));
    refused(std::string("'") + name + "' is not finite", number(name, 0, Real(INFINITY)));
    refused(name, [&](TensorFile& f) { f.tensors.erase(name); });
    const bool shaping = name == std::string("weights");  // the others must fit it
    refused(shaping ? "precision" : name, [&](TensorFile& f) {
      f.tensors[name] = Tensor::of<Real>(std::span<const Real>(std::vector<Real>(26)), {2, 13});
    });
  }
  refused("seen", [](TensorFile& f) { f.tensors.erase("seen"); });
  refused("waiting_samples", [](TensorFile& f) {
    f.tensors["waiting_samples"] = Tensor::of<Real>(std::span<const Real>(std::vector<Real>(33 * 12)), {33, 12});
  });
  refused("not the inverse", number("covariance", 0, Real(1.5)));
  refused("not the inverse", number("precision", 14, Real(5)));
  refused("not the inverse", number("waiting_samples", 14, Real(30)));
  refused("not the inverse", number("waiting_downdates", 14, Real(3)));
  // Of another precision.
  using Other = std::conditional_t<wide<Real>, float, double>;
  Fitted<Other> other(12, 3, 30, 5);
  other.layer.save(path);
  expect_error<InputError>([&] { LastLayer<Real>::load(the_device(), path); },
                           std::string("in ") + (wide<Real> ? "F32" : "F64"));
  // Cut short.
  save_safetensors(path, good);
  fs::resize_file(path, fs::file_size(path) - 1);
  EXPECT_THROW(LastLayer<Real>::load(the_device(), path), InputError);
  fs::resize_file(path, 20);
  EXPECT_THROW(LastLayer<Real>::load(the_device(), path), InputError);
  fs::remove(path);
  EXPECT_THROW(LastLayer<Real>::load(the_device(), path), InputError);
}

// ------------------------------------------------------------------------------------------------------------- errors
TYPED_TEST(LastLayerOf, WhatFailsChangesNothing) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  const int dim = 12, classes = 3;
  Fitted<Real> f(dim, classes, 30, 60);
  f.layer.update(f.next(0, 5), {});  // rows wait, so that folding them would show
  const Snapshot before = snapshot(f.layer);
  const Samples fresh = f.samples.slice(35, 50);
  using Samples2 = std::function<void(Samples&)>;
  const auto refused = [&](const std::string& words, const Samples2& spoil, UpdateOptions o = {},
                           bool first_order = true) {
    SCOPED_TRACE(words);
    Samples s = fresh;
    spoil(s);
    Rows<Real> rows(s);
    expect_error<InputError>([&] { f.layer.update(rows.all(), o); }, words);
    EXPECT_TRUE(same(snapshot(f.layer), before));
    expect_error<InputError>([&] { f.layer.update_one_by_one(rows.all(), o); }, words);
    EXPECT_TRUE(same(snapshot(f.layer), before));
    if (first_order) {
      expect_error<InputError>([&] { f.layer.update_first_order(rows.all(), 0.1); }, words);
      EXPECT_TRUE(same(snapshot(f.layer), before));
    }
  };
  const auto at = [&](int sample, double value) { return [=](Samples& s) { s.x[size_t(sample) * dim + 3] = value; }; };
  for (int sample : {0, 40})
    for (double bad : {double(NAN), double(INFINITY), -double(INFINITY)})
      refused("sample " + std::to_string(sample) + " has features that are not finite", at(sample, bad));
  refused("sample 40 has label -1", [](Samples& s) { s.labels[40] = -1; });
  refused("sample 49 has label 3", [](Samples& s) { s.labels[49] = 3; });
  refused("13 features, the last layer 12", [](Samples& s) { s = random_samples(4, 13, 3, 5); });
  const Samples known = f.samples;
  const auto repeat = [&](int sample, const Doubles& row) {
    return [=](Samples& s) { std::copy(row.begin(), row.end(), s.x.begin() + long(sample) * 12); };
  };
  refused("sample 40 is a duplicate: its features are there twice", repeat(40, fresh.row(7)), {}, false);
  refused("sample 40 is a duplicate: its features were absorbed before", repeat(40, known.row(3)), {}, false);
  refused("sample 2 is a duplicate: its features were absorbed before", repeat(2, known.row(34)), {}, false);
  // Too large: a variance that is not finite, and one that leaves nothing of what was.
  for (int sample : {0, 3, 31, 40}) {
    const auto scale = [&](double factor) {
      return [=](Samples& s) {
        for (int k = 0; k < 12; k++) s.x[size_t(sample) * 12 + k] *= factor;
      };
    };
    const std::string name = "sample " + std::to_string(sample);
    for (UpdateRule rule : all_rules) {
      refused(name + ": its logits or variance are not finite", scale(either<Real>(1e200, 1e20)), rule_of(rule), false);
      refused(name + ": its features are so large", scale(either<Real>(1e9, 1e5)), rule_of(rule), false);
    }
  }
  refused(
      "passes, not 0", [](Samples&) {}, rule_of(UpdateRule::implicit, 1, 0), false);
  refused(
      "passes, not -1", [](Samples&) {}, rule_of(UpdateRule::implicit, 1, -1), false);
  refused(
      "passes, not 33", [](Samples&) {}, rule_of(UpdateRule::implicit, 1, 33), false);
  for (double gamma : {0., -1., double(NAN), double(INFINITY), 1e7})
    for (UpdateRule rule : {UpdateRule::gaussian, UpdateRule::categorical, UpdateRule::categorical_published})
      refused(
          "gamma must be positive", [](Samples&) {}, rule_of(rule, gamma), false);

  Rows<Real> rows(fresh);
  const auto unchanged = [&](const std::string& words, const std::function<void()>& call) {
    SCOPED_TRACE(words);
    expect_error<InputError>(call, words);
    EXPECT_TRUE(same(snapshot(f.layer), before));
  };
  // With passes, all samples are one block.
  unchanged("3 passes takes at most 10 samples, not 11",
            [&] { f.layer.update(rows.part(0, 11), rule_of(UpdateRule::implicit, 1, 3)); });
  unchanged("no samples", [&] { f.layer.update(rows.part(0, 0), {}); });
  unchanged("no samples", [&] { f.layer.update_one_by_one(rows.part(0, 0), {}); });
  FeatureRows<Real> unlabelled = rows.all();
  unlabelled.labels = nullptr;
  unchanged("needs labels", [&] { f.layer.update(unlabelled, {}); });
  unchanged("needs labels", [&] { f.layer.update_one_by_one(unlabelled, {}); });
  unchanged("needs labels", [&] { f.layer.update_first_order(unlabelled, 1); });
  for (double gamma : {0., -1., double(NAN), double(INFINITY)})
    unchanged("gamma must be positive", [&] { f.layer.update_first_order(rows.all(), gamma); });
  unchanged("diverged", [&] { f.layer.update_first_order(rows.all(), 1e308); });

  unchanged("weights", [&] { f.layer.set_weights(Doubles(35)); });
  unchanged("not finite", [&] { f.layer.set_weights(Doubles(36, NAN)); });
  if (!wide<Real>) unchanged("not finite", [&] { f.layer.set_weights(Doubles(36, 1e300)); });
  unchanged("weights", [&] { f.layer.fit_covariance(f.fitted, Doubles(35)); });
  unchanged("not finite", [&] { f.layer.fit_covariance(f.fitted, Doubles(36, INFINITY)); });
  unchanged("no samples", [&] { f.layer.fit_covariance(rows.part(0, 0), f.weights); });
  Samples spoilt = fresh;
  at(17, NAN)(spoilt);
  Rows<Real> bad(spoilt), narrow(random_samples(4, 11, 3, 5));
  unchanged("sample 17 has features", [&] { f.layer.fit_covariance(bad.all(), f.weights); });
  unchanged("not finite", [&] { f.layer.fit(bad.all()); });
  unchanged("11 features, the last layer 12", [&] { f.layer.fit(narrow.all()); });
  unchanged("11 features, the last layer 12", [&] { f.layer.fit_covariance(narrow.all(), f.weights); });
  Samples mislabelled = fresh;
  mislabelled.labels[4] = 3;
  Rows<Real> wrong(mislabelled);
  unchanged("label 3", [&] { f.layer.fit(wrong.all()); });

  // It is as good as ever.
  f.layer.update(rows.part(0, 50), {});
  EXPECT_EQ(f.layer.absorbed(), 55);
}

TYPED_TEST(LastLayerOf, DuplicatesWhereTheyAreMeant) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  Fitted<Real> f(12, 3, 30, 5, SampleWeight::gaussian);
  UpdateOptions o = rule_of(UpdateRule::gaussian, 1);
  o.duplicates = true;
  Samples twice = f.samples.slice(30, 1);
  for (int i : {30, 3}) twice.append(f.samples.row(i), f.samples.labels[size_t(i)]);
  for (double& v : twice.x) v += 0;
  Rows<Real> rows(twice);
  const Doubles before = f.layer.precision();
  f.layer.update(rows.all(), o);
  f.layer.update(rows.part(0, 1), o);
  Doubles want = before;
  for (int i : {30, 30, 30, 3})
    for (int j = 0; j < 12; j++)
      for (int k = 0; k < 12; k++)
        want[size_t(j) * 12 + k] += f.samples.x[size_t(i) * 12 + j] * f.samples.x[size_t(i) * 12 + k];
  EXPECT_TRUE(close(f.layer.precision(), want, within<Real>(1e-14, 1e-6)));
  EXPECT_EQ(f.layer.absorbed(), 4);
  // What was allowed is known thereafter, and 0 is -0.
  expect_error<InputError>([&] { f.layer.update(rows.part(0, 1), {}); }, "duplicate");
  Samples zeros{Doubles(24, 0.), {0, 1}, 12, 3};
  for (int k = 0; k < 6; k++) zeros.x[size_t(12 + k)] = -0.;
  Rows<Real> signs(zeros);
  expect_error<InputError>([&] { f.layer.update(signs.all(), {}); }, "twice in this update");
  // A new fit forgets; so does set().
  f.layer.fit_covariance(f.fitted, f.weights);
  f.layer.update(rows.part(0, 1), rule_of(UpdateRule::gaussian, 1));
  f.layer.set(f.weights, before);
  EXPECT_EQ(f.layer.absorbed(), 0);
  f.layer.update(rows.part(1, 2), rule_of(UpdateRule::gaussian, 1));
  EXPECT_EQ(f.layer.absorbed(), 2);
}

// Collinear features: what the samples leave open is known only as well as the prior says, and in this precision it
// says nothing.
TYPED_TEST(LastLayerOf, SingularFeatures) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  for (uint64_t seed : {1, 2, 3, 4, 5}) {
    Samples s = random_samples(80, 10, 3, seed);
    for (int i = 0; i < 80; i++) s.x[size_t(i) * 10 + 7] = 3 * s.x[size_t(i) * 10 + 2] - s.x[size_t(i) * 10 + 5];
    Rows<Real> rows(s), sound(random_samples(20, 10, 3, seed + 50));
    for (SampleWeight weight : {SampleWeight::gaussian, SampleWeight::categorical}) {
      LastLayer<Real> layer(the_device(), 10, 3, with(1e-30, weight));
      layer.fit_covariance(sound.all(), random_weights(3, 10, 9));
      layer.update(sound.part(0, 3), {.duplicates = true});
      const Snapshot before = snapshot(layer);
      for (const char* words : {"collinear", "raise tau", "tau = 1e-30"}) {
        expect_error<InputError>([&] { layer.fit_covariance(rows.all(), random_weights(3, 10, 8)); }, words);
        EXPECT_TRUE(same(snapshot(layer), before));
      }
      EXPECT_THROW(layer.fit(rows.all()), InputError);
      EXPECT_TRUE(same(snapshot(layer), before));
    }
    LastLayer<Real> firm(the_device(), 10, 3, with(0.1, SampleWeight::gaussian));
    EXPECT_NO_THROW(firm.fit(rows.all()));
  }
}

TYPED_TEST(LastLayerOf, SetPrecision) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  Fitted<Real> f(12, 3, 30, 5);
  const Doubles precision = f.layer.precision(), covariance = f.layer.covariance(), w = random_weights(3, 12, 5);
  f.layer.update(f.fresh, {});
  const Snapshot before = snapshot(f.layer);
  const auto refused = [&](const std::string& words, const std::function<void(Doubles&)>& spoil) {
    Doubles p = precision;
    spoil(p);
    expect_error<InputError>([&] { f.layer.set(w, p); }, words);
    EXPECT_TRUE(same(snapshot(f.layer), before));
  };
  refused("143 numbers", [](Doubles& p) { p.pop_back(); });
  refused("not symmetric at (5, 2)", [](Doubles& p) { p[5 * 12 + 2] += 0.01; });
  refused("not symmetric at (5, 2)", [](Doubles& p) { p[5 * 12 + 2] = NAN; });
  refused("not symmetric", [](Doubles& p) { p[5 * 12 + 2] = p[2 * 12 + 5] = INFINITY; });
  refused("not positive definite", [](Doubles& p) { p[4 * 12 + 4] = -1; });
  refused("not positive definite", [](Doubles& p) { p[4 * 12 + 4] = NAN; });
  refused("not positive definite", [](Doubles& p) { p[0 * 12 + 3] = p[3 * 12 + 0] = 1e6; });
  refused("", [](Doubles& p) { p = Doubles(144, 1.); });  // of rank one
  refused("nearly singular", [](Doubles& p) {
    p = identity(12);
    const double rest = either<Real>(1 - 1e-14, 1 - 3e-7);
    p[1] = p[12] = rest, p[2] = p[24] = rest, p[14] = p[25] = rest;
  });
  expect_error<InputError>([&] { f.layer.set(Doubles(35), precision); }, "weights");
  expect_error<InputError>([&] { f.layer.set(Doubles(36, NAN), precision); }, "not finite");
  EXPECT_TRUE(same(snapshot(f.layer), before));
  Doubles nearly = precision;
  nearly[5 * 12 + 2] *= 1 + 1e-7;  // what a print and a parse may do
  f.layer.set(w, nearly);
  EXPECT_TRUE(close(f.layer.weights(), w, within<Real>(1e-15, 1e-6)));
  EXPECT_TRUE(close(f.layer.precision(), precision, within<Real>(1e-7, 1e-6)));
  EXPECT_TRUE(close(f.layer.covariance(), covariance, within<Real>(1e-6, 1e-4)));
  EXPECT_EQ(f.layer.absorbed(), 0);
  EXPECT_EQ(f.layer.downdates(), 0);
  f.layer.set(w, precision);
  EXPECT_TRUE(close(f.layer.covariance(), covariance, within<Real>(1e-13, 1e-5)));
}

// A file may hold a matrix that is no covariance, though it is P's inverse: what then?
TYPED_TEST(LastLayerOf, WithoutPositiveDefiniteness) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  const int dim = 6;
  const fs::path path = temporary("indefinite");
  LastLayer<Real> prior(the_device(), dim, 3, with(1, SampleWeight::gaussian, 1));
  prior.save(path);
  TensorFile file = load_safetensors(path);
  for (const char* name : {"precision", "covariance"}) {
    const Real minus = -1;
    std::memcpy(file.tensors.at(name).bytes.data() + sizeof(Real) * (dim * dim - 1), &minus, sizeof minus);
  }
  save_safetensors(path, file);
  const auto layer = LastLayer<Real>::load(the_device(), path);
  fs::remove(path);
  Samples s = random_samples(80, dim, 3, 6), wrong = random_samples(80, dim, 3, 7);
  for (int i = 0; i < 80; i++) s.x[size_t(i) * dim + 5] = 0;
  for (int k = 0; k < 5; k++) wrong.x[70 * size_t(dim) + k] = 0;  // straight along the negative axis
  for (int i = 0; i < 70; i++) wrong.x[size_t(i) * dim + 5] = 0;
  Rows<Real> rows(s), into(wrong);
  layer->update(rows.part(0, 5), rule_of(UpdateRule::gaussian, 1));
  Snapshot before = snapshot(*layer);
  for (bool one_by_one : {false, true}) {
    expect_error<RunError>(
        [&] {
          if (one_by_one) layer->update_one_by_one(into.all(), rule_of(UpdateRule::gaussian, 1));
          else layer->update(into.all(), rule_of(UpdateRule::gaussian, 1));
        },
        "sample 70: its variance phi'S phi is negative");
    EXPECT_TRUE(same(snapshot(*layer), before));
  }
  const Doubles covariance = layer->covariance();
  expect_error<RunError>([&] { layer->refactor(); }, "not positive definite (feature 6 of 6)");
  EXPECT_TRUE(close(layer->covariance(), covariance, within<Real>(1e-14, 1e-6)));
  EXPECT_THROW(layer->log_evidence(0), RunError);
  // Updates that want a new factor (after every downdate, here) go on without one.
  layer->update(rows.part(5, 75), rule_of(UpdateRule::gaussian, 1));
  EXPECT_EQ(layer->refactored(), 0);
  EXPECT_EQ(layer->downdates(), 80);
  EXPECT_LT(layer->drift(), either<Real>(1e-12, 1e-4));
  EXPECT_THROW(Reweighting<Real>(the_device(), *layer, 10, 1), RunError);
}

TYPED_TEST(LastLayerOf, OptionsThatAreRefused) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  const auto make = [](int dim, int classes, const LastLayerOptions& o) {
    return [=] { LastLayer<Real>(the_device(), dim, classes, o); };
  };
  expect_error<InputError>(make(0, 3, {}), "features, not 0");
  expect_error<InputError>(make(32769, 3, {}), "features, not 32769");
  expect_error<InputError>(make(3, 1, {}), "classes, not 1");
  expect_error<InputError>(make(3, 1501, {}), "classes, not 1501");
  for (double tau : {0., -1., double(NAN), double(INFINITY), 1e-320})
    expect_error<InputError>(make(3, 3, {.tau = tau}), "the prior precision must be a positive ");
  for (double tau : {1e-46, 1e-40, 1e39})
    if (wide<Real>) EXPECT_NO_THROW(make(3, 3, {.tau = tau})());
    else EXPECT_THROW(make(3, 3, {.tau = tau})(), InputError);
  expect_error<InputError>(make(3, 3, {.refactor_after = 0}), "refactor_after");
  LastLayer<Real> layer(the_device(), 2, 2, {.tau = 4});
  EXPECT_TRUE(exact(layer.precision(), Doubles{4, 0, 0, 4}));
  EXPECT_TRUE(exact(layer.covariance(), Doubles{0.25, 0, 0, 0.25}));
  EXPECT_TRUE(exact(layer.weights(), Doubles(4, 0.)));
}

TEST(LastLayer, Names) {
  for (SampleWeight w : {SampleWeight::gaussian, SampleWeight::categorical}) EXPECT_EQ(sample_weight_of(name_of(w)), w);
  for (UpdateRule r : all_rules) EXPECT_EQ(update_rule_of(name_of(r)), r);
  for (Link l : {Link::map, Link::mean_field, Link::probit, Link::monte_carlo, Link::bridge, Link::bridge_norm})
    EXPECT_EQ(link_of(name_of(l)), l);
  EXPECT_EQ(link_of("mean_field"), Link::mean_field);
  expect_error<InputError>([] { sample_weight_of("poisson"); },
                           "unknown sample weight 'poisson': one of gaussian, categorical");
  expect_error<InputError>([] { update_rule_of(""); }, "one of implicit, gaussian, categorical, categorical_published");
  expect_error<InputError>([] { link_of("logit"); },
                           "one of map, mean_field, probit, monte_carlo, bridge, bridge_norm");
}

// -------------------------------------------------------------------------------------------------------- predictions
Doubles softmax(const Doubles& f) {
  double top = -INFINITY, sum = 0;
  for (double v : f) top = std::max(top, v);
  Doubles p;
  for (double v : f) p.push_back(std::exp(v - top)), sum += p.back();
  for (double& v : p) v /= sum;
  return p;
}
double entropy(const Doubles& p) {
  double h = 0;
  for (double v : p) h -= v > 0 ? v * std::log(v) : 0;
  return h;
}
// The link of logits f with covariance v I, by its definition.
Doubles linked(Link link, const Doubles& f, double v, double lambda) {
  const double k = double(f.size());
  Doubles u = f;
  if (link == Link::mean_field || link == Link::probit)
    for (double& x : u) x /= std::sqrt(1 + (link == Link::probit ? M_PI / 8 : lambda) * v);
  if (link != Link::bridge && link != Link::bridge_norm) return softmax(u);
  double mean = 0, inverse = 0, total = 0, d = v - v / k;
  for (double x : f) mean += x / k;
  const double norm = link == Link::bridge_norm ? d / std::sqrt(k / 2) : 1;
  for (double& x : u) x = (x - mean) / std::sqrt(norm), inverse += std::exp(-x);
  d /= norm;
  for (double& x : u) x = (1 - 2 / k + std::exp(x) / (k * k) * inverse) / d, total += x;
  for (double& x : u) x /= total;
  return u;
}

TYPED_TEST(LastLayerOf, Links) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  const int n = 40, classes = 5;
  Fitted<Real> f(12, classes, 30, 60);
  f.layer.update(f.next(0, 10), {});
  const Real* x = f.next(10, n).x;
  Buffer<Real> logits(f.rows.memory(), n * classes), variances(f.rows.memory(), n);
  f.layer.logits(x, n, logits);
  f.layer.variances(x, n, variances);
  const auto mu = logits.host(), v = variances.host();
  // The two themselves.
  const Doubles s = f.layer.covariance(), w = f.layer.weights();
  Doubles want_mu, want_v;
  for (int i = 0; i < n; i++) {
    const Doubles phi = f.samples.row(40 + i);
    for (int c = 0; c < classes; c++) {
      double sum = 0;
      for (int k = 0; k < 12; k++) sum += w[size_t(c) * 12 + k] * phi[size_t(k)];
      want_mu.push_back(sum);
    }
    double sum = 0;
    for (int j = 0; j < 12; j++)
      for (int k = 0; k < 12; k++) sum += phi[size_t(j)] * s[size_t(j) * 12 + k] * phi[size_t(k)];
    want_v.push_back(sum);
  }
  EXPECT_TRUE(close(mu, want_mu, within<Real>(1e-13, 1e-5)));
  EXPECT_TRUE(close(v, want_v, within<Real>(1e-13, 1e-5)));
  for (Link link : {Link::map, Link::mean_field, Link::probit, Link::bridge, Link::bridge_norm})
    for (double lambda : {M_PI / 8, 3.}) {
      SCOPED_TRACE(name_of(link));
      const LinkedPredictions got = f.layer.predict(x, n, {.link = link, .lambda = lambda});
      Doubles p, h;
      for (int i = 0; i < n; i++) {
        const Doubles row =
            linked(link, Doubles(mu.begin() + i * classes, mu.begin() + (i + 1) * classes), v[i], lambda);
        p.insert(p.end(), row.begin(), row.end());
        h.push_back(entropy(row));
      }
      EXPECT_TRUE(close(got.probability, p, within<Real>(1e-12, 1e-5)));
      EXPECT_TRUE(close(got.entropy, h, within<Real>(1e-12, 1e-5)));
      EXPECT_TRUE(got.information.empty());
    }

  const int draws = 4000;
  const LinkedPredictions got = f.layer.predict(x, n, {.link = Link::monte_carlo, .draws = draws, .seed = 3});
  ASSERT_EQ(got.information.size(), size_t(n));
  std::mt19937_64 random(4);
  std::normal_distribution<double> normal;
  for (int i = 0; i < n; i++) {
    const int many = 40000;
    Doubles mean(classes, 0), square(classes, 0);
    double entropies = 0, entropy_squares = 0;
    for (int k = 0; k < many; k++) {
      Doubles u;
      for (int c = 0; c < classes; c++) u.push_back(mu[size_t(i) * classes + c] + std::sqrt(v[i]) * normal(random));
      const Doubles p = softmax(u);
      for (int c = 0; c < classes; c++) mean[c] += p[c] / many, square[c] += p[c] * p[c] / many;
      const double h = entropy(p);
      entropies += h / many, entropy_squares += h * h / many;
    }
    Doubles p(got.probability.begin() + i * classes, got.probability.begin() + (i + 1) * classes);
    for (int c = 0; c < classes; c++)
      EXPECT_NEAR(p[c], mean[c], 5 * std::sqrt((square[c] - mean[c] * mean[c]) * (1. / draws + 1. / many)));
    EXPECT_NEAR(got.entropy[i], entropy(p), 1e-5);
    EXPECT_NEAR(entropy(p) - got.information[i], entropies,
                5 * std::sqrt((entropy_squares - entropies * entropies) * (1. / draws + 1. / many)));
    EXPECT_GT(got.information[i], 0);
  }
  const LinkOptions again{.link = Link::monte_carlo, .draws = draws, .seed = 3};
  EXPECT_TRUE(exact(f.layer.predict(x, n, again).probability, got.probability));
  EXPECT_TRUE(exact(f.layer.predict(x, n, again).information, got.information));
  const LinkOptions other{.link = Link::monte_carlo, .draws = draws, .seed = 4};
  EXPECT_GT(apart(f.layer.predict(x, n, other).probability, got.probability), 1e-5);

  expect_error<InputError>([&] { f.layer.predict(x, 0); }, "no samples");
  expect_error<InputError>([&] { f.layer.predict(x, n, {.link = Link::monte_carlo, .draws = 0}); }, "draw");
  expect_error<InputError>([&] { f.layer.predict(x, n, {.link = Link::monte_carlo, .draws = 1 << 30}); }, "draws");
  expect_error<InputError>([&] { f.layer.predict(x, n, {.lambda = -1}); }, "lambda");
  expect_error<InputError>([&] { f.layer.predict(x, n, {.lambda = NAN}); }, "lambda");
}

// The map link looks at W alone: S may be anything.
TYPED_TEST(LastLayerOf, MapLinkNeedsNoVariance) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  Fitted<Real> f(12, 3, 30, 5);
  LastLayer<Real> prior(the_device(), 12, 3, with(1e-6, SampleWeight::gaussian));
  prior.set_weights(f.weights);
  const LinkOptions map{.link = Link::map};
  EXPECT_TRUE(exact(prior.predict(f.fitted.x, 30, map).probability, f.layer.predict(f.fitted.x, 30, map).probability));
}

TYPED_TEST(LastLayerOf, ChunksAreInvisible) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  const int n = 2070, dim = 6, classes = 4;
  Fitted<Real> f(dim, classes, 20, n);
  f.layer.update(f.next(0, 20), {});
  Buffer<Real> variances(f.rows.memory(), n), one(f.rows.memory(), 1);
  f.layer.variances(f.fresh.x, n, variances);
  const auto v = variances.host();
  for (const LinkOptions& link : {LinkOptions{}, {.link = Link::map}, {.link = Link::monte_carlo, .draws = 50}}) {
    const LinkedPredictions all = f.layer.predict(f.fresh.x, n, link);
    ASSERT_EQ(all.probability.size(), size_t(n) * classes);
    ASSERT_EQ(all.entropy.size(), size_t(n));
    LinkedPredictions rows;
    for (int i = 0; i < n; i++) {
      const Real* x = f.fresh.x + size_t(i) * dim;
      const LinkedPredictions row = f.layer.predict(x, 1, link);
      for (const auto& [to, from] : {std::pair(&rows.probability, &row.probability),
                                     {&rows.entropy, &row.entropy},
                                     {&rows.information, &row.information}})
        to->insert(to->end(), from->begin(), from->end());
      if (link.link != Link::mean_field) continue;
      f.layer.variances(x, 1, one);
      ASSERT_NEAR(one.host()[0], v[size_t(i)], either<Real>(1e-12, 1e-5) * v[size_t(i)]) << i;
    }
    EXPECT_TRUE(close(rows.probability, all.probability, within<Real>(1e-12, 1e-5)));
    EXPECT_TRUE(close(rows.entropy, all.entropy, within<Real>(1e-12, 1e-5)));
    if (link.link == Link::monte_carlo) {
      EXPECT_TRUE(close(rows.information, all.information, within<Real>(1e-10, 1e-4)));
    }
  }
  // So are those of a fit.
  for (SampleWeight weight : {SampleWeight::gaussian, SampleWeight::categorical}) {
    LastLayer<Real> layer(the_device(), dim, classes, with(0.5, weight));
    layer.fit_covariance(f.fresh, f.weights);
    Doubles want = identity(dim);
    for (double& p : want) p /= 2;
    for (int i = 0; i < n; i++) {
      const Doubles phi = f.samples.row(20 + i);
      Doubles logits(classes, 0);
      for (int c = 0; c < classes; c++)
        for (int k = 0; k < dim; k++) logits[size_t(c)] += f.weights[size_t(c) * dim + k] * phi[size_t(k)];
      const Doubles p = softmax(logits);
      const double top = *std::max_element(p.begin(), p.end());
      const double w = weight == SampleWeight::gaussian ? 1 : top * (1 - top);
      for (int j = 0; j < dim; j++)
        for (int k = 0; k < dim; k++) want[size_t(j) * dim + k] += w * phi[size_t(j)] * phi[size_t(k)];
    }
    EXPECT_TRUE(close(layer.precision(), want, within<Real>(1e-12, 1e-5)));
  }
}

// After a first call of each kind, predictions and updates of no more samples take no memory.
TYPED_TEST(LastLayerOf, NothingGrowsAfterTheFirstCalls) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  Fitted<Real> f(6, 3, 20, 40);
  Device& device = f.rows.memory().device();
  Reweighting<Real> draws(device, f.layer, 20, 3);
  int next = 0;
  const auto calls = [&] {
    for (Link link : {Link::map, Link::mean_field, Link::probit, Link::monte_carlo, Link::bridge, Link::bridge_norm})
      f.layer.predict(f.fitted.x, 20, {.link = link, .draws = 100});
    f.layer.update(f.next(next, 4));
    f.layer.update_one_by_one(f.next(next + 4, 2));
    f.layer.update_first_order(f.next(next, 2), 0.1);
    draws.update(f.next(next, 4), 1);
    draws.predict(f.fitted.x, 20);
    next += 6;
  };
  calls();
  const size_t allocations = device.allocations(), peak = device.peak_bytes();
  for (int time = 0; time < 5; time++) calls();
  EXPECT_EQ(device.allocations(), allocations);
  EXPECT_EQ(device.peak_bytes(), peak);
}

TYPED_TEST(LastLayerOf, LogEvidence) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  const int dim = 9, classes = 4;
  const double tau = 0.3;
  Fitted<Real> f(dim, classes, 30, 20, SampleWeight::categorical, 1000, tau);
  f.layer.update(f.fresh, {});
  Doubles l = f.layer.precision();
  double determinant = 0, square = 0;
  for (int j = 0; j < dim; j++)
    for (int i = j; i < dim; i++) {
      double sum = l[size_t(i) * dim + j];
      for (int k = 0; k < j; k++) sum -= l[size_t(i) * dim + k] * l[size_t(j) * dim + k];
      l[size_t(i) * dim + j] = i == j ? std::sqrt(sum) : sum / l[size_t(j) * dim + j];
      if (i == j) determinant += std::log(sum);
    }
  for (double w : f.layer.weights()) square += w * w;
  const double want = -17.5 - 0.5 * (classes * determinant - classes * dim * std::log(tau) + tau * square);
  const Snapshot before = snapshot(f.layer);
  EXPECT_NEAR(f.layer.log_evidence(-17.5), want, either<Real>(1e-11, 1e-4) * std::abs(want));
  EXPECT_TRUE(same(snapshot(f.layer), before));
}

// -------------------------------------------------------------------------------------------------------- reweighting
TYPED_TEST(LastLayerOf, Reweighting) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  const int classes = 3, draws = 4000, n = 20;
  Fitted<Real> f(5, classes, 30, 50);
  f.layer.update(f.next(0, 7), {});  // rows wait
  const FeatureRows<Real> points = f.next(10, n);
  Reweighting<Real> weighted(the_device(), f.layer, draws, 3);
  EXPECT_NEAR(weighted.effective_draws(), draws, 1e-6 * draws);
  const Doubles p = weighted.predict(points.x, n);
  const LinkedPredictions link = f.layer.predict(points.x, n, {.link = Link::monte_carlo, .draws = draws, .seed = 8});
  ASSERT_EQ(p.size(), link.probability.size());
  double moved = 0;
  for (size_t i = 0; i < p.size(); i++) {
    const double q = link.probability[i];
    EXPECT_NEAR(p[i], q, 5 * std::sqrt(2 * q * (1 - q) / draws)) << i;  // no draw's variance is beyond q (1 - q)
    moved = std::max(moved, std::abs(q - f.layer.predict(points.x, n, {.link = Link::map}).probability[i]));
  }
  EXPECT_GT(moved, 0.02) << "draws, not the mean";
  for (int i = 0; i < n; i++) EXPECT_NEAR(p[i * 3] + p[i * 3 + 1] + p[i * 3 + 2], 1, 1e-5);

  // Correlated weights: S = 0.1 I + 0.9 1 1', at inputs along 1 and across it.
  LastLayer<Real> correlated(the_device(), 5, classes, with(1, SampleWeight::gaussian));
  Doubles inverse = identity(5);
  for (double& v : inverse) v = 10 * v - 9 / 4.6;
  correlated.set(random_weights(classes, 5, 9), inverse);
  Samples directions{{}, {0, 0, 0}, 5, classes};
  directions.x = {1, 1, 1, 1, 1, 4, -4, 0, 4, -4, 2, 0, 0, 0, 0};
  Rows<Real> along(directions);
  const Doubles drawn = Reweighting<Real>(the_device(), correlated, 4 * draws, 3).predict(along.all().x, 3);
  const Doubles by_link =
      correlated.predict(along.all().x, 3, {.link = Link::monte_carlo, .draws = 4 * draws, .seed = 8}).probability;
  for (size_t i = 0; i < drawn.size(); i++)
    EXPECT_NEAR(drawn[i], by_link[i], 5 * std::sqrt(by_link[i] * (1 - by_link[i]) / (2 * draws))) << i;

  // Samples in one call or two, in any order; and p(a) p(b | a) = p(b) p(a | b) exactly, for the draws.
  const auto label = [&](int i) { return f.samples.labels[size_t(40 + i)]; };
  const auto at = [&](Reweighting<Real>& r, int i) { return r.predict(points.x + size_t(i) * 5, 1)[size_t(label(i))]; };
  const auto sample = [&](int i) { return f.next(10 + i, 1); };
  Reweighting<Real> a(the_device(), f.layer, draws, 3), b(the_device(), f.layer, draws, 3),
      both(the_device(), f.layer, draws, 3), weak(the_device(), f.layer, draws, 3);
  const double first_a = at(a, 0), first_b = at(b, 1);
  EXPECT_NEAR(first_a, p[size_t(label(0))], 1e-6);
  a.update(sample(0), 1);
  b.update(sample(1), 1);
  EXPECT_GT(at(a, 0), first_a);
  EXPECT_GT(at(b, 1), first_b);
  EXPECT_NEAR(first_a * at(a, 1), first_b * at(b, 0), either<Real>(1e-12, 1e-5));
  EXPECT_LT(a.effective_draws(), 0.999 * draws);
  EXPECT_GT(a.effective_draws(), 1);
  weak.update(sample(0), 0.01);
  EXPECT_GT(weak.effective_draws(), a.effective_draws());
  EXPECT_GT(at(weak, 0), first_a);
  EXPECT_LT(at(weak, 0), at(a, 0));
  a.update(sample(1), 1);
  b.update(sample(0), 1);
  both.update(f.next(10, 2), 1);
  EXPECT_TRUE(close(a.predict(points.x, n), b.predict(points.x, n), within<Real>(1e-12, 1e-5)));
  EXPECT_TRUE(close(a.predict(points.x, n), both.predict(points.x, n), within<Real>(1e-12, 1e-5)));
  EXPECT_NEAR(a.effective_draws(), both.effective_draws(), 1e-4 * draws);
  for (int i = 0; i < 40; i++) both.update(sample(0), 1e3);  // far beyond what exp() holds
  EXPECT_GE(both.effective_draws(), 0.999);
  EXPECT_GT(at(both, 0), 0.5);

  // Deterministic by seed.
  Reweighting<Real> again(the_device(), f.layer, draws, 3), other(the_device(), f.layer, draws, 4);
  EXPECT_TRUE(exact(again.predict(points.x, n), p));
  EXPECT_GT(apart(other.predict(points.x, n), p), 1e-5);

  const Doubles now = a.predict(points.x, n);
  const auto refused = [&](const FeatureRows<Real>& rows, double gamma, const std::string& words) {
    expect_error<InputError>([&] { a.update(rows, gamma); }, words);
    EXPECT_TRUE(exact(a.predict(points.x, n), now));
  };
  Samples spoilt = f.samples.slice(40, 3);
  spoilt.labels[2] = 3;
  Rows<Real> mislabelled(spoilt), narrow(random_samples(2, 4, 3, 1));
  spoilt.labels[2] = 0, spoilt.x[7] = NAN;
  Rows<Real> bad(spoilt);
  refused(mislabelled.all(), 1, "not valid");
  refused(bad.all(), 1, "not valid");
  refused(narrow.all(), 1, "4 features, the draws 5");
  refused(f.next(10, 0), 1, "needs samples");
  refused({points.x, nullptr, 2, 5}, 1, "labels");
  for (double gamma : {0., -1., double(NAN), double(INFINITY)}) refused(sample(0), gamma, "gamma");
  expect_error<InputError>([&] { Reweighting<Real>(the_device(), f.layer, 0, 1); }, "at least one draw");
  expect_error<InputError>([&] { Reweighting<Real>(the_device(), f.layer, 1 << 30, 1); }, "too many draws");
}

}  // namespace
}  // namespace baton::test
