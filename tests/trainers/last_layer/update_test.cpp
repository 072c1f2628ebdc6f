// A last layer's updates against recorded values and against the definition: P is the sum over the samples and S its
// inverse, whatever the calls.
#include "tests/trainers/last_layer/last_layer_fixture.h"

namespace baton::test {
namespace {

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
      const std::string weight = to_string(c.base);
      EXPECT_TRUE(close(layer.precision(), z.f64("prec_" + weight), tolerance<Real>(1e-10, 1e-4)));
      EXPECT_TRUE(close(layer.covariance(), z.f64("cov_" + weight), tolerance<Real>(1e-10, 1e-4)));
      for (const std::string gamma : {"_g1", "_g10"})
        for (int b : {1, 10, 50}) {
          if (c.rule == UpdateRule::implicit && gamma == "_g10") continue;
          const std::string name = c.name + (c.rule == UpdateRule::implicit ? "" : gamma) + "_b" + std::to_string(b);
          SCOPED_TRACE(set + " " + name);
          for (bool one_by_one : {false, true}) {
            layer.fit_covariance(base.all(), map);
            const LastLayerUpdateOptions o = rule_of(c.rule, gamma == "_g10" ? 10 : 1);
            if (one_by_one) layer.update_one_by_one(news.part(0, b), o);
            else layer.update(news.part(0, b), o);
            const Tolerance t = b == 1 ? tolerance<Real>(1e-10, 1e-3) : tolerance<Real>(1e-8, 1e-3);
            EXPECT_TRUE(close(layer.weights(), z.f64(name + "_W"), t));
            expect_covariance<Real>(z, name + "_cov", layer.covariance(), t);
            EXPECT_EQ(layer.absorbed(), b);
          }
        }
    }
    LastLayer<Real> layer(the_device(), 65, 10, with(1, SampleWeight::gaussian));
    layer.fit_covariance(base.all(), map);
    layer.update(news.part(0, 10), rule_of(UpdateRule::gaussian, 10, 2));
    EXPECT_TRUE(close(layer.weights(), z.f64("gaussian_g10_b10_passes2_W"), tolerance<Real>(1e-8, 1e-3)));
    expect_covariance<Real>(z, "gaussian_g10_b10_passes2_cov", layer.covariance(), tolerance<Real>(1e-8, 1e-3));
    const Doubles before = layer.covariance();
    for (int b : {1, 10, 50}) {
      layer.set_weights(map);
      layer.update_first_order(news.part(0, b), 0.01);
      EXPECT_TRUE(
          close(layer.weights(), z.f64("firstorder_g0.01_b" + std::to_string(b) + "_W"), tolerance<Real>(1e-10, 1e-4)));
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
    const std::string name = to_string(weight);
    LastLayer<Real> layer(the_device(), 65, 10, with(1, weight));
    const MapResult map = layer.fit(base.all());
    EXPECT_TRUE(map.converged);
    EXPECT_TRUE(close(layer.weights(), golden("digits_map_base100").f64("W_map"), tolerance<Real>(1e-8, 1e-3)));
    EXPECT_TRUE(close(layer.covariance(), update.f64("cov_" + name), tolerance<Real>(1e-8, 1e-3)));
    Buffer<Real> variances(tests.memory(), 50), logits(tests.memory(), 500);
    layer.variances(tests.all().x, 50, variances);
    layer.logits(tests.all().x, 50, logits);
    EXPECT_TRUE(close(variances.host(), z.f64("var_shared_" + name), tolerance<Real>(1e-8, 1e-3)));
    EXPECT_TRUE(close(logits.host(), z.f64("f_mu"), tolerance<Real>(1e-8, 1e-3)));
    const auto predicted = [&](Link link, double lambda) {
      return layer.predict(tests.all().x, 50, {.link = link, .lambda = lambda}).probability;
    };
    const Tolerance t = tolerance<Real>(1e-8, 1e-3);
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
  Rows<Real> base(tiny_samples());
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
  const Tolerance t = tolerance<Real>(1e-10, 1e-4);
  for (const Case& c : cases) {
    SCOPED_TRACE(c.name);
    const SampleWeight weight = c.rule == UpdateRule::gaussian ? SampleWeight::gaussian : SampleWeight::categorical;
    LastLayer<Real> layer(the_device(), 3, 3, with(z.scalar("tau"), weight));
    layer.fit_covariance(base.all(), z.f64("W_map"));
    EXPECT_TRUE(close(layer.precision(), z.f64(std::string("shared_prec_") + to_string(weight)), t));
    EXPECT_TRUE(close(layer.covariance(), z.f64(std::string("shared_cov_") + to_string(weight)), t));
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
                      tolerance<Real>(1e-10, 1e-4)))
        << i;
    yy += y[size_t(i)] * y[size_t(i)] / (sd * sd);
    const Doubles cov = layer.covariance();
    Doubles mean(5, 0.);
    for (int d = 0; d < 5; d++) b[size_t(d)] += s.x[size_t(i) * 5 + size_t(d)] * y[size_t(i)] / sd;
    for (int d = 0; d < 25; d++) mean[size_t(d / 5)] += cov[size_t(d)] * b[size_t(d % 5)];
    ASSERT_TRUE(close(mean, Doubles(means.begin() + i * 5, means.begin() + (i + 1) * 5), tolerance<Real>(1e-10, 1e-3)));
    fit = 0;
    for (int d = 0; d < 5; d++) fit += mean[size_t(d)] * b[size_t(d)];
  }
  // ln N(y; 0, sigma^2 I + X X' / tau), its determinant from log_evidence's.
  double square = 0;
  for (double w : layer.weights()) square += w * w;
  const double determinant = -layer.log_evidence(0) - tau * square / 2;  // ln det P - D ln tau; two classes, one S
  const double evidence = -0.5 * (60 * std::log(2 * M_PI * sd * sd) + yy - fit + determinant);
  EXPECT_NEAR(evidence, z.scalar("log_evidence"), either<Real>(1e-9, 1e-2) * std::abs(evidence));
  EXPECT_TRUE(close(layer.covariance(), z.f64("batch_cov"), tolerance<Real>(1e-10, 1e-4)));
  EXPECT_TRUE(close(layer.precision(), z.f64("batch_prec"), tolerance<Real>(1e-10, 1e-5)));
  LastLayer<Real> other(the_device(), 5, 2, with(z.scalar("tau"), SampleWeight::gaussian));
  other.update(back.all(), rule_of(UpdateRule::gaussian, 1));
  EXPECT_TRUE(close(other.covariance(), layer.covariance(), tolerance<Real>(1e-12, 1e-4)));
}

TYPED_TEST(LastLayerOf, WoodburyChain) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  const Npz z = golden("woodbury_chain");
  Rows<Real> rows(digits(z.i64("idx")));
  LastLayerUpdateOptions o = rule_of(UpdateRule::gaussian, 1);
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
      SCOPED_TRACE(std::string(to_string(rule)) + ", passes " + std::to_string(passes));
      const int n = passes == 1 ? 75 : 10;
      Fitted<Real> a(33, 7, 60, n), b(33, 7, 60, n);
      const LastLayerUpdateOptions o = rule_of(rule, 2, passes);
      a.layer.update(a.fresh, o);
      b.layer.update_one_by_one(b.fresh, o);
      const Tolerance t = tolerance<Real>(1e-10, 2e-4);
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
    SCOPED_TRACE(to_string(rule));
    Fitted<Real> whole(65, 10, 100, 100), parts(65, 10, 100, 100);
    const LastLayerUpdateOptions o = rule_of(rule, 2);
    whole.layer.update(whole.fresh, o);
    int first = 0;
    for (int b : {1, 31, 2, 33, 3, 30}) {
      parts.layer.update(parts.next(first, b), o);
      first += b;
    }
    ASSERT_EQ(first, 100);
    const Tolerance t = tolerance<Real>(1e-10, 3e-4);
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
      const LastLayerUpdateOptions o = rule_of(rule, 2);
      for (int i = 0; i < 1000; i++) many.layer.update(many.next(i, 1), o);
      once.layer.update(once.fresh, o);
      const double s = apart(many.layer.covariance(), once.layer.covariance()),
                   p = apart(many.layer.precision(), once.layer.precision()),
                   w = apart(many.layer.weights(), once.layer.weights());
      char text[128];
      snprintf(text, sizeof text, "S %.1e, P %.1e, W %.1e, drift %.1e", s, p, w, many.layer.drift());
      this->RecordProperty(std::string(to_string(rule)) + std::to_string(dim), text);
      SCOPED_TRACE(std::string(to_string(rule)) + ", D = " + std::to_string(dim) + ": " + text);
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
  EXPECT_TRUE(close(run(UpdateRule::gaussian, back)->covariance(), first->covariance(), tolerance<Real>(1e-12, 1e-5)));
  EXPECT_TRUE(exact(run(UpdateRule::gaussian, other)->covariance(), first->covariance()));
  EXPECT_GT(apart(run(UpdateRule::gaussian, other)->weights(), first->weights()), 1e-3);
  const auto mean = run(UpdateRule::implicit, forth);
  const double moved = apart(mean->weights(), map),
               order = apart(run(UpdateRule::implicit, back)->weights(), mean->weights());
  EXPECT_GT(order, 0);
  EXPECT_LT(order, moved / 10);
}

// --------------------------------------------------------------------------------------------------- fold and factor
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
  EXPECT_TRUE(close(look(), before, tolerance<Real>(1e-14, 1e-6)));
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
  EXPECT_TRUE(close(f.layer.covariance(), before, tolerance<Real>(1e-13, 1e-5)));
  EXPECT_TRUE(close(f.layer.precision(), precision, tolerance<Real>(1e-15, 1e-6)));
  EXPECT_TRUE(exact(f.layer.weights(), weights));
  EXPECT_LT(f.layer.drift(), either<Real>(1e-13, 1e-5));

  Fitted<Real> often(30, 4, 40, 200, SampleWeight::gaussian, 40);
  often.layer.update(often.fresh, rule_of(UpdateRule::gaussian, 1));
  EXPECT_GE(often.layer.refactored(), 2);
  EXPECT_LT(often.layer.downdates(), 100);
  EXPECT_TRUE(close(often.layer.covariance(), before, tolerance<Real>(1e-13, 1e-5)));
}

// A prior so weak that the first samples take five digits (of double thirteen) from S: it is made anew from P.
TYPED_TEST(LastLayerOf, DriftIsMended) {
  BATON_NEEDS_DEVICE();
  using Real = TypeParam;
  const double tau = either<Real>(1e-11, 1e-2);
  Rows<Real> rows(normal_samples(100, 8, 3, 31).scaled(11));
  LastLayer<Real> layer(the_device(), 8, 3, with(tau, SampleWeight::gaussian, 1000000));
  for (int i = 0; i < 100; i++) layer.update(rows.part(i, 1), rule_of(UpdateRule::gaussian, 1));
  EXPECT_GE(layer.refactored(), 1);
  EXPECT_LT(layer.drift(), either<Real>(1e-10, 1e-4));
  EXPECT_LT(apart(product(layer.covariance(), layer.precision(), 8), identity(8)), either<Real>(1e-10, 1e-4));
}

}  // namespace
}  // namespace baton::test
