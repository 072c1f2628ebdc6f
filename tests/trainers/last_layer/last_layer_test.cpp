// A last layer's posterior as a file, its errors, which change nothing, and its predictions; and re-weighting.
#include "trainers/last_layer/last_layer.h"

#include <cstring>
#include <functional>
#include <random>

#include "tests/trainers/last_layer/last_layer_fixture.h"
#include "trainers/last_layer/reweighting.h"

namespace baton::test {
namespace {

namespace fs = std::filesystem;

// ------------------------------------------------------------------------------------------------------------- files
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
  const auto refused = [&](const std::string& words, const Samples2& spoil, LastLayerUpdateOptions o = {},
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
  refused("13 features, the last layer 12", [](Samples& s) { s = normal_samples(4, 13, 3, 5); });
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
  unchanged("need labels", [&] { f.layer.update(unlabelled, {}); });
  unchanged("need labels", [&] { f.layer.update_one_by_one(unlabelled, {}); });
  unchanged("need labels", [&] { f.layer.update_first_order(unlabelled, 1); });
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
  Rows<Real> bad(spoilt), narrow(normal_samples(4, 11, 3, 5));
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
  LastLayerUpdateOptions o = rule_of(UpdateRule::gaussian, 1);
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
  EXPECT_TRUE(close(f.layer.precision(), want, tolerance<Real>(1e-14, 1e-6)));
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
    Samples s = normal_samples(80, 10, 3, seed);
    for (int i = 0; i < 80; i++) s.x[size_t(i) * 10 + 7] = 3 * s.x[size_t(i) * 10 + 2] - s.x[size_t(i) * 10 + 5];
    Rows<Real> rows(s), sound(normal_samples(20, 10, 3, seed + 50));
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
  EXPECT_TRUE(close(f.layer.weights(), w, tolerance<Real>(1e-15, 1e-6)));
  EXPECT_TRUE(close(f.layer.precision(), precision, tolerance<Real>(1e-7, 1e-6)));
  EXPECT_TRUE(close(f.layer.covariance(), covariance, tolerance<Real>(1e-6, 1e-4)));
  EXPECT_EQ(f.layer.absorbed(), 0);
  EXPECT_EQ(f.layer.downdates(), 0);
  f.layer.set(w, precision);
  EXPECT_TRUE(close(f.layer.covariance(), covariance, tolerance<Real>(1e-13, 1e-5)));
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
  Samples s = normal_samples(80, dim, 3, 6), wrong = normal_samples(80, dim, 3, 7);
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
  EXPECT_TRUE(close(layer->covariance(), covariance, tolerance<Real>(1e-14, 1e-6)));
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
  for (SampleWeight w : {SampleWeight::gaussian, SampleWeight::categorical})
    EXPECT_EQ(parse_sample_weight(to_string(w)), w);
  for (UpdateRule r : all_rules) EXPECT_EQ(parse_update_rule(to_string(r)), r);
  for (Link l : {Link::map, Link::mean_field, Link::probit, Link::monte_carlo, Link::bridge, Link::bridge_norm})
    EXPECT_EQ(parse_link(to_string(l)), l);
  EXPECT_EQ(parse_link("mean_field"), Link::mean_field);
  expect_error<InputError>([] { parse_sample_weight("poisson"); },
                           "unknown sample weight 'poisson': one of gaussian, categorical");
  expect_error<InputError>([] { parse_update_rule(""); },
                           "one of implicit, gaussian, categorical, categorical_published");
  expect_error<InputError>([] { parse_link("logit"); },
                           "one of map, mean_field, probit, monte_carlo, bridge, bridge_norm");
}

// -------------------------------------------------------------------------------------------------------- predictions
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
  EXPECT_TRUE(close(mu, want_mu, tolerance<Real>(1e-13, 1e-5)));
  EXPECT_TRUE(close(v, want_v, tolerance<Real>(1e-13, 1e-5)));
  for (Link link : {Link::map, Link::mean_field, Link::probit, Link::bridge, Link::bridge_norm})
    for (double lambda : {M_PI / 8, 3.}) {
      SCOPED_TRACE(to_string(link));
      const LinkedPredictions got = f.layer.predict(x, n, {.link = link, .lambda = lambda});
      Doubles p, h;
      for (int i = 0; i < n; i++) {
        const Doubles row =
            linked(link, Doubles(mu.begin() + i * classes, mu.begin() + (i + 1) * classes), v[i], lambda);
        p.insert(p.end(), row.begin(), row.end());
        h.push_back(entropy(row));
      }
      EXPECT_TRUE(close(got.probability, p, tolerance<Real>(1e-12, 1e-5)));
      EXPECT_TRUE(close(got.entropy, h, tolerance<Real>(1e-12, 1e-5)));
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
    EXPECT_TRUE(close(rows.probability, all.probability, tolerance<Real>(1e-12, 1e-5)));
    EXPECT_TRUE(close(rows.entropy, all.entropy, tolerance<Real>(1e-12, 1e-5)));
    if (link.link == Link::monte_carlo) {
      EXPECT_TRUE(close(rows.information, all.information, tolerance<Real>(1e-10, 1e-4)));
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
    EXPECT_TRUE(close(layer.precision(), want, tolerance<Real>(1e-12, 1e-5)));
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
  EXPECT_TRUE(close(a.predict(points.x, n), b.predict(points.x, n), tolerance<Real>(1e-12, 1e-5)));
  EXPECT_TRUE(close(a.predict(points.x, n), both.predict(points.x, n), tolerance<Real>(1e-12, 1e-5)));
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
  Rows<Real> mislabelled(spoilt), narrow(normal_samples(2, 4, 3, 1));
  spoilt.labels[2] = 0, spoilt.x[7] = NAN;
  Rows<Real> bad(spoilt);
  refused(mislabelled.all(), 1, "sample 2 has label 3");
  refused(bad.all(), 1, "sample 1 has features that are not finite");
  refused(narrow.all(), 1, "4 features, the last layer 5");
  refused(f.next(10, 0), 1, "needs samples");
  refused({points.x, nullptr, 2, 5}, 1, "labels");
  for (double gamma : {0., -1., double(NAN), double(INFINITY)}) refused(sample(0), gamma, "gamma");
  expect_error<InputError>([&] { Reweighting<Real>(the_device(), f.layer, 0, 1); }, "at least one draw");
  expect_error<InputError>([&] { Reweighting<Real>(the_device(), f.layer, 1 << 30, 1); }, "too many draws");
}

}  // namespace
}  // namespace baton::test
