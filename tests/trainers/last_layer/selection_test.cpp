// Choices of active learning: against golden sequences of independent code, and against definitions written out in
// double precision on explicit matrices.
#include "trainers/last_layer/selection.h"

#include <limits>
#include <set>

#include "kernels/acquisition.h"
#include "tests/trainers/last_layer/selection_fixture.h"
#include "trainers/last_layer/exact.h"

namespace baton::test {
namespace {

// -------------------------------------------------------------------------------- definitions, on explicit matrices
// Gauss and Jordan, with pivots.
Doubles inverse(Doubles m, int n) {
  Doubles r(size_t(n) * n);
  for (int i = 0; i < n; i++) r[i * n + i] = 1;
  for (int k = 0; k < n; k++) {
    int pivot = k;
    for (int i = k; i < n; i++)
      if (std::abs(m[i * n + k]) > std::abs(m[pivot * n + k])) pivot = i;
    for (int j = 0; j < n; j++) std::swap(m[k * n + j], m[pivot * n + j]), std::swap(r[k * n + j], r[pivot * n + j]);
    const double scale = 1 / m[k * n + k];
    for (int j = 0; j < n; j++) m[k * n + j] *= scale, r[k * n + j] *= scale;
    for (int i = 0; i < n; i++)
      if (const double factor = m[i * n + k]; i != k)
        for (int j = 0; j < n; j++) m[i * n + j] -= factor * m[k * n + j], r[i * n + j] -= factor * r[k * n + j];
  }
  return r;
}

// Higher is better.
double uncertainty(const Doubles& p, Acquisition a) {
  if (a == Acquisition::entropy) {
    double h = 0;
    for (double v : p) h -= v > 0 ? v * std::log(v) : 0;
    return h;
  }
  Doubles sorted = p;
  std::sort(sorted.rbegin(), sorted.rend());
  return sorted[1] - sorted[0];
}
// BALD, from the numbers that the layer draws.
double information(const Posterior& posterior, const Doubles& x, const Doubles& normals, int draws) {
  const Doubles f = times(posterior.w, x);
  const double sd = std::sqrt(posterior.variance(x));
  Doubles mean(f.size());
  double own = 0;
  for (int t = 0; t < draws; t++) {
    Doubles u = f;
    for (size_t c = 0; c < f.size(); c++) u[c] += sd * normals[size_t(t) * f.size() + c];
    const Doubles q = softmax(u);
    own += uncertainty(q, Acquisition::entropy) / draws;
    for (size_t c = 0; c < f.size(); c++) mean[c] += q[c] / draws;
  }
  return uncertainty(mean, Acquisition::entropy) - own;
}

Doubles embedding(const Posterior& posterior, const Doubles& x, const LinkOptions& o) {
  const Doubles p = posterior.linked(x, o);
  const size_t top = size_t(std::max_element(p.begin(), p.end()) - p.begin());
  Doubles g;
  for (size_t c = 0; c < p.size(); c++)
    for (double v : x) g.push_back(((c == top) - p[c]) * v);
  return g;
}
double uniform(SplitMix64& random) { return double(random.next() >> 11) * 0x1p-53; }
// The free row of the largest embedding.
int largest_embedding(const Posterior& posterior, const Samples& pool, const std::vector<int>& candidates,
                      const std::vector<int>& picks, const LinkOptions& o) {
  int best = -1;
  double most = -INFINITY;
  for (int i : candidates) {
    const Doubles g = embedding(posterior, pool.row(i), o);
    if (dot(g, g) > most && !std::count(picks.begin(), picks.end(), i)) most = dot(g, g), best = i;
  }
  return best;
}
// From the largest embedding on, the first free row at which the sum of squared distances to the nearest pick passes
// its share.
std::vector<int> badge_batch(const Posterior& posterior, const Samples& pool, const std::vector<int>& candidates,
                             int batch, const LinkOptions& o, SplitMix64& random) {
  std::vector<int> picks = {largest_embedding(posterior, pool, candidates, {}, o)};
  std::vector<Doubles> g;
  for (int i : candidates) g.push_back(embedding(posterior, pool.row(i), o));
  Doubles distance(g.size(), INFINITY);
  while (int(picks.size()) < batch) {
    const auto taken = [&](size_t i) { return std::count(picks.begin(), picks.end(), candidates[i]) != 0; };
    const size_t last = size_t(std::find(candidates.begin(), candidates.end(), picks.back()) - candidates.begin());
    double sum = 0, running = 0;
    for (size_t i = 0; i < g.size(); i++) {
      double square = 0;
      for (size_t j = 0; j < g[i].size(); j++) square += (g[i][j] - g[last][j]) * (g[i][j] - g[last][j]);
      distance[i] = std::min(distance[i], square);
      sum += taken(i) ? 0 : distance[i];
    }
    const double limit = uniform(random) * sum;
    size_t i = 0;
    for (; i < g.size(); i++)
      if (!taken(i) && (running += distance[i]) > limit) break;
    if (i == g.size()) {
      ADD_FAILURE() << "nothing drawn";
      return picks;
    }
    picks.push_back(candidates[i]);
  }
  return picks;
}

// tr((P + w x x')^-1 F), the sample joining (sign 1) or leaving (-1).
double trace_after(Doubles p, const Doubles& fisher, const Doubles& x, double w, double sign) {
  const int d = int(x.size());
  for (int i = 0; i < d; i++)
    for (int j = 0; j < d; j++) p[i * d + j] += sign * w * x[i] * x[j];
  const Doubles s = inverse(p, d);
  return dot(s, fisher);
}
void move(Doubles& p, const Doubles& x, double w) {
  const size_t d = x.size();
  for (size_t i = 0; i < d; i++)
    for (size_t j = 0; j < d; j++) p[i * d + j] += w * x[i] * x[j];
}
int bait_pick(const Doubles& p, const Doubles& fisher, const Posterior& at, const Samples& pool,
              const std::vector<int>& candidates, const std::vector<int>& picks) {
  int best = -1;
  double least = INFINITY;
  for (int i : candidates) {
    if (std::count(picks.begin(), picks.end(), i)) continue;
    const double trace = trace_after(p, fisher, pool.row(i), at.curvature(pool.row(i)), 1);
    if (trace < least) least = trace, best = i;
  }
  return best;
}
std::vector<int> bait_batch(const Posterior& at, const Samples& pool, const std::vector<int>& candidates, int batch) {
  const Doubles fisher = at.fisher(pool);
  Doubles p = at.p;
  std::vector<int> picks;
  while (int(picks.size()) < std::min(2 * batch, int(candidates.size()))) {
    picks.push_back(bait_pick(p, fisher, at, pool, candidates, picks));
    move(p, pool.row(picks.back()), at.curvature(pool.row(picks.back())));
  }
  while (int(picks.size()) > batch) {
    Doubles trace;
    for (int i : picks) trace.push_back(trace_after(p, fisher, pool.row(i), at.curvature(pool.row(i)), -1));
    const auto least = picks.begin() + (std::min_element(trace.begin(), trace.end()) - trace.begin());
    move(p, pool.row(*least), -at.curvature(pool.row(*least)));
    picks.erase(least);
  }
  return picks;
}

Doubles link_normals(Device& device, const LinkOptions& o, int classes) {
  Arena arena;
  double* normals = arena.take<double>(size_t(o.draws) * classes);
  fill_normals(normals, o.draws * classes, key_of(o.seed, 13), device.stream());
  return download(device, normals, size_t(o.draws) * classes);
}

// One after the other, on a layer of its own, everything computed anew at every choice.
std::vector<int> reference_sequence(LastLayer<double>& layer, const Samples& pool, const std::vector<int>& candidates,
                                    int batch, const SelectionOptions& o) {
  Rows<double> rows(pool);
  const Doubles normals =
      o.acquisition == Acquisition::bald ? link_normals(rows.device(), o.link, pool.classes) : Doubles{};
  const Doubles fisher = Posterior(layer).fisher(pool);
  std::vector<int> picks;
  LastLayerUpdateOptions update = o.update;
  update.duplicates = true;
  while (int(picks.size()) < batch) {
    const Posterior now(layer);
    int pick = -1;
    if (o.acquisition == Acquisition::badge) {
      pick = largest_embedding(now, pool, candidates, picks, o.link);
    } else if (o.acquisition == Acquisition::bait) {
      pick = bait_pick(now.p, fisher, now, pool, candidates, picks);
    } else {
      double best = -INFINITY;
      for (int i : candidates) {
        if (std::count(picks.begin(), picks.end(), i)) continue;
        const double score = o.acquisition == Acquisition::bald
                                 ? information(now, pool.row(i), normals, o.link.draws)
                                 : uncertainty(now.linked(pool.row(i), o.link), o.acquisition);
        if (score > best) best = score, pick = i;
      }
    }
    picks.push_back(pick);
    layer.update(rows.row(pick), update);
  }
  return picks;
}

// ------------------------------------------------------------------------------------------------------------ goldens
struct Digits {
  Digits() : z(golden("digits_al_margin")) {
    base = digits("base100"), pool = digits(z.i64("pool"));
    options.acquisition = Acquisition::margin;
    options.link.link = Link::map;
    options.update.rule = UpdateRule::gaussian;
    options.update.gamma = 10;
  }
  std::vector<int> sequence(const std::string& name) const {
    const auto v = z.i64(name);
    return {v.begin(), v.end()};
  }
  template <class Real = double>
  std::unique_ptr<LastLayer<Real>> layer() const {
    return fitted<Real>(base, SampleWeight::gaussian);
  }
  Npz z;
  Samples base, pool;
  SelectionOptions options;
};

double margin_of(const Doubles& w, const Doubles& x) { return -uncertainty(softmax(times(w, x)), Acquisition::margin); }
int least_margin(const Doubles& w, const Samples& pool, const std::vector<int>& picks) {
  int best = -1;
  double least = INFINITY;
  for (int i = 0; i < pool.count(); i++) {
    const double m = margin_of(w, pool.row(i));
    if (m < least && !std::count(picks.begin(), picks.end(), i)) least = m, best = i;
  }
  return best;
}

TEST(ActiveLearningGolden, TopB) {
  BATON_NEEDS_DEVICE();
  const Digits d;
  Rows<double> pool(d.pool);
  const auto layer = d.layer();
  const Posterior before(*layer);
  EXPECT_EQ(select_batch<double>(pool.device(), *layer, pool, all_of(d.pool), 10, d.options), d.sequence("topb"));
  EXPECT_TRUE(Posterior(*layer) == before);
  Doubles margin;
  for (int i : d.sequence("topb")) margin.push_back(margin_of(before.w, d.pool.row(i)));
  EXPECT_TRUE(within(margin, d.z.f64("topb_margin"), 1e-8));
  Rows<float> single(d.pool);
  EXPECT_EQ(select_batch<float>(single.device(), *d.layer<float>(), single, all_of(d.pool), 10, d.options),
            d.sequence("topb"));
}

TEST(ActiveLearningGolden, SequenceOfGaussianUpdates) {
  BATON_NEEDS_DEVICE();
  const Digits d;
  Rows<double> pool(d.pool);
  SelectionOptions o = d.options;
  o.sequential = true;
  const std::vector<int> want = d.sequence("seq_gaussian10");
  {
    const auto layer = d.layer();
    EXPECT_EQ(select_batch<double>(pool.device(), *layer, pool, all_of(d.pool), 10, o), want);
    EXPECT_TRUE(within(layer->weights(), d.z.f64("seq_gaussian10_W"), 1e-8));
  }
  // The same by calls for one sample: the covariance goes on from call to call.
  const auto layer = d.layer();
  std::vector<int> left = all_of(d.pool), got;
  Doubles margin;
  for (int t = 0; t < 10; t++) {
    const Doubles w = layer->weights();
    const std::vector<int> one = select_batch<double>(pool.device(), *layer, pool, left, 1, o);
    ASSERT_EQ(one.size(), 1u);
    got.push_back(one[0]);
    margin.push_back(margin_of(w, d.pool.row(one[0])));
    left.erase(std::find(left.begin(), left.end(), one[0]));
  }
  EXPECT_EQ(got, want);
  EXPECT_TRUE(within(margin, d.z.f64("seq_gaussian10_margin"), 1e-8));
  EXPECT_TRUE(within(layer->weights(), d.z.f64("seq_gaussian10_W"), 1e-8));
  EXPECT_EQ(layer->absorbed(), 10);

  Rows<float> single(d.pool);
  const auto other = d.layer<float>();
  EXPECT_EQ(select_batch<float>(single.device(), *other, single, all_of(d.pool), 10, o), want);
  EXPECT_TRUE(within(other->weights(), d.z.f64("seq_gaussian10_W"), 1e-3));
}

TEST(ActiveLearningGolden, SequenceOfExactUpdates) {
  BATON_NEEDS_DEVICE();
  const Digits d;
  Rows<double> base(d.base), pool(d.pool);
  ExactLastLayer layer(pool.device(), 65, 10, 1);
  layer.fit(base);
  std::vector<int> picks;
  Doubles margin;
  for (int t = 0; t < 10; t++) {
    const Doubles w = layer.weights();
    picks.push_back(least_margin(w, d.pool, picks));
    margin.push_back(margin_of(w, d.pool.row(picks.back())));
    layer.update(pool.row(picks.back()), ExactRule::newton_old);
  }
  EXPECT_EQ(picks, d.sequence("seq_exact"));
  EXPECT_TRUE(within(margin, d.z.f64("seq_exact_margin"), 1e-7));
  EXPECT_TRUE(within(layer.weights(), d.z.f64("seq_exact_W"), 1e-8));
}

// What comes out when every call begins with the covariance of the fit: not what ours does.
TEST(ActiveLearningGolden, StaleCovarianceIsAnotherSequence) {
  BATON_NEEDS_DEVICE();
  const Digits d;
  Rows<double> pool(d.pool);
  const auto layer = d.layer();
  const Doubles p = layer->precision();
  std::vector<int> picks;
  Doubles margin;
  for (int t = 0; t < 10; t++) {
    const Doubles w = layer->weights();
    layer->set(w, p);
    picks.push_back(least_margin(w, d.pool, picks));
    margin.push_back(margin_of(w, d.pool.row(picks.back())));
    layer->update(pool.row(picks.back()), d.options.update);
  }
  EXPECT_EQ(picks, d.sequence("seq_stale"));
  EXPECT_TRUE(within(margin, d.z.f64("seq_stale_margin"), 1e-7));
  EXPECT_TRUE(within(layer->weights(), d.z.f64("seq_stale_W"), 1e-8));
  EXPECT_NE(d.sequence("seq_stale"), d.sequence("seq_gaussian10"));
}

// -------------------------------------------------------------------------------------------- against the definitions
constexpr Acquisition scored[] = {Acquisition::margin, Acquisition::entropy, Acquisition::bald, Acquisition::badge,
                                  Acquisition::bait};

// Candidates: all but some, out of order.
std::vector<int> some_of(const Samples& s) {
  std::vector<int> some;
  for (int i = s.count() - 1; i >= 0; i--)
    if (i % 5 != 2) some.push_back(i);
  return some;
}

TEST(ActiveLearning, TopBIsItsDefinition) {
  BATON_NEEDS_DEVICE();
  const Samples pool = overlapping_samples(60, 6, 4, 2, 1.5);
  const std::vector<int> candidates = some_of(pool);
  Rows<double> rows(pool);
  for (uint64_t seed = 0; seed < 6; seed++) {
    const auto layer = fitted(overlapping_samples(12, 6, 4, unsigned(10 + seed), 1.5));
    const Posterior at(*layer);
    for (Acquisition a : scored) {
      SCOPED_TRACE(testing::Message() << to_string(a) << ", seed " << seed);
      SelectionOptions o;
      o.acquisition = a, o.seed = seed, o.link.lambda = 2, o.link.draws = 60, o.link.seed = seed + 1;
      const std::vector<int> got = select_batch<double>(rows.device(), *layer, rows, candidates, 5, o);
      EXPECT_TRUE(Posterior(*layer) == at);
      std::vector<int> want;
      if (a == Acquisition::badge) {
        SplitMix64 random(seed);
        want = badge_batch(at, pool, candidates, 5, o.link, random);
      } else if (a == Acquisition::bait) {
        want = bait_batch(at, pool, candidates, 5);
      } else {
        const Doubles normals = link_normals(rows.device(), o.link, 4);
        std::vector<std::pair<double, int>> order;
        for (int i : candidates)
          order.push_back({a == Acquisition::bald ? -information(at, pool.row(i), normals, 60)
                                                  : -uncertainty(at.linked(pool.row(i), o.link), a),
                           i});
        std::sort(order.begin(), order.end());
        for (int t = 0; t < 5; t++) want.push_back(order[t].second);
      }
      EXPECT_EQ(got, want);
    }
  }
}

TEST(ActiveLearning, SequencesAreTheirDefinition) {
  BATON_NEEDS_DEVICE();
  const Samples pool = overlapping_samples(60, 6, 4, 3, 1.5);
  const std::vector<int> candidates = some_of(pool);
  Rows<double> rows(pool);
  struct Case {
    UpdateRule rule;
    double gamma;
    int passes;
    Link link;
  };
  const Case cases[] = {{UpdateRule::implicit, 1, 1, Link::mean_field},
                        {UpdateRule::gaussian, 5, 1, Link::mean_field},
                        {UpdateRule::categorical, 1, 1, Link::map},
                        {UpdateRule::implicit, 1, 3, Link::mean_field}};
  for (uint64_t seed = 0; seed < 3; seed++)
    for (const Case& c : cases)
      for (Acquisition a : scored) {
        SCOPED_TRACE(testing::Message() << to_string(a) << ", " << to_string(c.rule) << ", " << c.passes
                                        << " passes, seed " << seed);
        SelectionOptions o;
        o.acquisition = a, o.sequential = true, o.seed = seed;
        o.link.link = c.link, o.link.lambda = 3, o.link.draws = 40, o.link.seed = seed + 1;
        o.update.rule = c.rule, o.update.gamma = c.gamma, o.update.passes = c.passes;
        const Samples base = overlapping_samples(12, 6, 4, unsigned(20 + seed), 1.5);
        const auto layer = fitted(base, SampleWeight::categorical, 0.3),
                   other = fitted(base, SampleWeight::categorical, 0.3);
        const std::vector<int> want = reference_sequence(*other, pool, candidates, 12, o);
        EXPECT_EQ(select_batch<double>(rows.device(), *layer, rows, candidates, 12, o), want);
        EXPECT_TRUE(within(layer->weights(), other->weights(), 1e-11));
        EXPECT_TRUE(within(layer->covariance(), other->covariance(), 1e-11));
        EXPECT_TRUE(within(layer->precision(), other->precision(), 1e-11));
      }
}

// BADGE one after the other is BADGE all at once for one sample, with updates between; random numbers play no part.
TEST(ActiveLearning, SequentialBadgeAsksForOneAtATime) {
  BATON_NEEDS_DEVICE();
  const Samples pool = overlapping_samples(60, 6, 4, 20, 1.5), base = overlapping_samples(12, 6, 4, 21, 1.5);
  Rows<double> rows(pool);
  const auto layer = fitted(base);
  std::vector<int> left = some_of(pool), want;
  SelectionOptions o;
  o.acquisition = Acquisition::badge;
  const std::vector<int> at_once = select_batch<double>(rows.device(), *layer, rows, left, 10, o);
  for (int t = 0; t < 10; t++) {
    want.push_back(select_batch<double>(rows.device(), *layer, rows, left, 1, o)[0]);
    layer->update(rows.row(want.back()), o.update);
    left.erase(std::find(left.begin(), left.end(), want.back()));
  }
  EXPECT_EQ(want[0], at_once[0]);
  EXPECT_NE(want, at_once);
  o.sequential = true;
  for (o.seed = 0; o.seed < 3; o.seed++)
    EXPECT_EQ(select_batch<double>(rows.device(), *fitted(base), rows, some_of(pool), 10, o), want);
}

// S made anew on the way is not the old one less a rank-one matrix.
TEST(ActiveLearning, SequencesGoOnAfterRefactoring) {
  BATON_NEEDS_DEVICE();
  const Samples pool = overlapping_samples(90, 5, 3, 4, 1.5), base = overlapping_samples(10, 5, 3, 5, 1.5);
  Rows<double> rows(pool), first(base);
  for (Acquisition a : {Acquisition::entropy, Acquisition::bait, Acquisition::badge}) {
    SCOPED_TRACE(to_string(a));
    LastLayerOptions often;
    often.refactor_after = 3;
    LastLayer<double> layer(rows.device(), 5, 3, often), other(rows.device(), 5, 3, often);
    layer.fit(first), other.fit(first);
    SelectionOptions o;
    o.acquisition = a, o.sequential = true, o.link.lambda = 3;
    const std::vector<int> want = reference_sequence(other, pool, all_of(pool), 80, o);
    EXPECT_EQ(select_batch<double>(rows.device(), layer, rows, all_of(pool), 80, o), want);
    EXPECT_GE(layer.refactored(), 2);
  }
}

// v_i -= kappa (phi_i . s)^2 with kappa from the variance of the chosen row, over many updates.
template <class Real>
void check_variances(UpdateRule rule, int passes, double tolerance) {
  SCOPED_TRACE(testing::Message() << to_string(rule) << ", " << passes << " passes");
  const Samples pool = overlapping_samples(200, 20, 5, 6);
  Rows<Real> rows(pool);
  const FeatureRows<Real> all = rows;
  const auto layer = fitted<Real>(overlapping_samples(30, 20, 5, 7), SampleWeight::categorical, 0.01);
  Memory memory;
  Device& device = memory.device();
  Buffer<Real> v(memory, 200), fresh(memory, 200), s(memory, 20), one(memory, 1);
  layer->variances(all.x, 200, v);
  const std::vector<Real> start = v.host();
  LastLayerUpdateOptions o;
  o.rule = rule, o.gamma = 1, o.passes = passes;
  for (int k = 0; k < 60; k++) {
    const double own = double(v.host()[size_t(k)]);
    layer->covariance_products(rows.row(k).x, 1, s);
    layer->update(rows.row(k), o);
    layer->variances(rows.row(k).x, 1, one);
    const double kappa = (own - double(one.host()[0])) / (own * own);
    downdate_rows<Real>(v, nullptr, all.x, s, nullptr, Real(kappa), 0, 200, 20, device.stream());
  }
  layer->variances(all.x, 200, fresh);
  const std::vector<Real> got = v.host(), want = fresh.host();
  EXPECT_TRUE(within(Doubles(got.begin(), got.end()), Doubles(want.begin(), want.end()), tolerance));
  EXPECT_FALSE(within(Doubles(start.begin(), start.end()), Doubles(want.begin(), want.end()), 0.1));
}
TEST(ActiveLearning, VariancesFollowTheUpdates) {
  BATON_NEEDS_DEVICE();
  check_variances<double>(UpdateRule::implicit, 1, 1e-10);
  check_variances<double>(UpdateRule::gaussian, 1, 1e-10);
  check_variances<double>(UpdateRule::categorical, 2, 1e-10);
  check_variances<float>(UpdateRule::implicit, 1, 1e-3);
}

// BAIT's forward and backward rounds at sizes where they meet: as many as there are, and just more.
TEST(ActiveLearning, BaitAtTheEdges) {
  BATON_NEEDS_DEVICE();
  const Samples pool = overlapping_samples(9, 4, 3, 8), base = overlapping_samples(10, 4, 3, 9);
  Rows<double> rows(pool);
  const auto layer = fitted(base);
  const Posterior at(*layer);
  SelectionOptions o;
  o.acquisition = Acquisition::bait;
  for (int batch = 1; batch <= 9; batch++)
    EXPECT_EQ(select_batch<double>(rows.device(), *layer, rows, all_of(pool), batch, o),
              bait_batch(at, pool, all_of(pool), batch))
        << batch;
  // More rows than a pass over the pool takes at a time.
  const Samples large = overlapping_samples(2500, 4, 3, 10);
  Rows<double> many(large);
  std::vector<int> candidates;
  for (int i = 0; i < 1100; i++) candidates.push_back(2 * i + 1);
  EXPECT_EQ(select_batch<double>(many.device(), *layer, many, candidates, 3, o), bait_batch(at, large, candidates, 3));
  // Backward rounds do change something.
  int other = 0;
  for (unsigned seed = 0; seed < 10; seed++) {
    const Samples p = overlapping_samples(30, 4, 3, 40 + seed);
    Rows<double> r(p);
    const std::vector<int> picks = select_batch<double>(r.device(), *layer, r, all_of(p), 5, o);
    EXPECT_EQ(picks, bait_batch(at, p, all_of(p), 5));
    std::vector<int> forward;
    Doubles precision = at.p;
    for (int t = 0; t < 5; t++) {
      forward.push_back(bait_pick(precision, at.fisher(p), at, p, all_of(p), forward));
      move(precision, p.row(forward.back()), at.curvature(p.row(forward.back())));
    }
    other += picks != forward;
  }
  EXPECT_GT(other, 0);
}

TEST(ActiveLearning, Random) {
  BATON_NEEDS_DEVICE();
  const Samples pool = overlapping_samples(40, 4, 3, 11), base = overlapping_samples(10, 4, 3, 12);
  Rows<double> rows(pool);
  const auto layer = fitted(base), other = fitted(base);
  const Posterior at(*layer);
  SelectionOptions o;
  o.acquisition = Acquisition::random;
  std::vector<int> hits(40);
  std::set<std::vector<int>> batches;
  const std::vector<int> candidates = some_of(pool);
  for (o.seed = 0; o.seed < 600; o.seed++) {
    const std::vector<int> picks = select_batch<double>(rows.device(), *layer, rows, candidates, 4, o);
    EXPECT_EQ(std::set<int>(picks.begin(), picks.end()).size(), 4u);
    for (int i : picks) hits[size_t(i)]++;
    batches.insert(picks);
  }
  EXPECT_GT(batches.size(), 590u);
  for (int i = 0; i < 40; i++)  // 75 +- 8
    EXPECT_TRUE(i % 5 == 2 ? hits[size_t(i)] == 0 : hits[size_t(i)] > 40 && hits[size_t(i)] < 115) << i;
  EXPECT_TRUE(Posterior(*layer) == at);

  o.seed = 1;
  const std::vector<int> once = select_batch<double>(rows.device(), *layer, rows, candidates, 4, o);
  o.sequential = true;
  EXPECT_EQ(select_batch<double>(rows.device(), *layer, rows, candidates, 4, o), once);
  for (int i : once) other->update(rows.row(i));
  EXPECT_TRUE(Posterior(*layer) == Posterior(*other));
}

TEST(ActiveLearning, TheFirstOfEqualsIsChosen) {
  BATON_NEEDS_DEVICE();
  const Samples pool = overlapping_samples(20, 4, 3, 13);
  Rows<double> rows(pool);
  LastLayer<double> layer(rows.device(), 4, 3, {});  // all weights 0
  SelectionOptions o;
  o.link.link = Link::map;
  for (Acquisition a : {Acquisition::margin, Acquisition::entropy}) {
    o.acquisition = a;
    EXPECT_EQ(select_batch<double>(rows.device(), layer, rows, {7, 3, 11, 5}, 3, o), (std::vector<int>{7, 3, 11}));
    o.sequential = true;
    LastLayer<double> other(rows.device(), 4, 3, {});
    EXPECT_EQ(select_batch<double>(rows.device(), other, rows, {7, 3, 11, 5}, 1, o), (std::vector<int>{7}));
    o.sequential = false;
  }
}

TEST(ActiveLearning, APoolMayHoldEqualSamples) {
  BATON_NEEDS_DEVICE();
  const Samples base = overlapping_samples(10, 4, 3, 14);
  Samples pool{{}, {}, 4, 3};
  for (int i = 0; i < 12; i++) pool.append(overlapping_samples(12, 4, 3, 15).row(i / 4), i % 3);
  Rows<double> rows(pool);
  for (Acquisition a : {Acquisition::random, Acquisition::margin, Acquisition::entropy, Acquisition::bald,
                        Acquisition::badge, Acquisition::bait})
    for (bool sequential : {false, true}) {
      SCOPED_TRACE(testing::Message() << to_string(a) << (sequential ? ", sequential" : ""));
      SelectionOptions o;
      o.acquisition = a, o.sequential = sequential, o.link.draws = 20;
      const auto layer = fitted(base);
      const std::vector<int> picks = select_batch<double>(rows.device(), *layer, rows, all_of(pool), 12, o);
      EXPECT_EQ(std::set<int>(picks.begin(), picks.end()).size(), 12u);
      EXPECT_EQ(layer->absorbed(), sequential ? 12 : 0);
    }
  // BADGE draws a copy of a pick only where nothing else is left.
  SelectionOptions o;
  o.acquisition = Acquisition::badge;
  for (o.seed = 0; o.seed < 20; o.seed++) {
    const std::vector<int> picks = select_batch<double>(rows.device(), *fitted(base), rows, all_of(pool), 3, o);
    std::set<int> kinds;
    for (int i : picks) kinds.insert(i / 4);
    EXPECT_EQ(kinds.size(), 3u) << o.seed;
  }
}

TEST(ActiveLearning, FloatChoosesAsDouble) {
  BATON_NEEDS_DEVICE();
  const Samples pool = overlapping_samples(50, 6, 4, 16, 1.5), base = overlapping_samples(12, 6, 4, 17, 1.5);
  Samples rounded = pool, rounded_base = base;
  for (double& v : rounded.x) v = float(v);
  for (double& v : rounded_base.x) v = float(v);
  Rows<double> rows(rounded);
  Rows<float> single(rounded);
  for (Acquisition a : scored)
    for (bool sequential : {false, true}) {
      SelectionOptions o;
      o.acquisition = a, o.sequential = sequential, o.link.draws = 50;
      const auto layer = fitted<double>(rounded_base);
      const auto other = fitted<float>(rounded_base);
      EXPECT_EQ(select_batch<float>(rows.device(), *other, single, all_of(pool), 6, o),
                select_batch<double>(rows.device(), *layer, rows, all_of(pool), 6, o))
          << to_string(a) << sequential;
    }
}

TEST(ActiveLearning, Refuses) {
  BATON_NEEDS_DEVICE();
  Samples pool = overlapping_samples(20, 4, 3, 18);
  Rows<double> rows(pool);
  const auto layer = fitted(overlapping_samples(10, 4, 3, 19));
  const Posterior at(*layer);
  SelectionOptions o;
  const FeatureRows<double> good = rows;
  const auto select = [&](const FeatureRows<double>& from, const std::vector<int>& candidates, int batch) {
    select_batch<double>(rows.device(), *layer, from, candidates, batch, o);
  };
  EXPECT_THROW(select(good, {1, 2}, 3), InputError);
  EXPECT_THROW(select(good, {1, 2}, 0), InputError);
  EXPECT_THROW(select(good, {}, 1), InputError);
  EXPECT_THROW(select(good, {1, 20}, 1), InputError);
  EXPECT_THROW(select(good, {-1, 2}, 1), InputError);
  EXPECT_THROW(select(good, {1, 2, 1}, 2), InputError);
  FeatureRows<double> narrow = good;
  narrow.dim = 3;
  EXPECT_THROW(select(narrow, {1, 2}, 1), InputError);
  o.acquisition = Acquisition::bald, o.link.draws = 0;
  EXPECT_THROW(select(good, {1, 2}, 1), InputError);
  o = {}, o.sequential = true;
  FeatureRows<double> nameless = good;
  nameless.labels = nullptr;
  EXPECT_THROW(select(nameless, {1, 2}, 1), InputError);
  o.sequential = false;
  EXPECT_NO_THROW(select(nameless, {1, 2}, 1));
  // Nothing was learned before a label that cannot be.
  o.sequential = true;
  Samples wrong = pool;
  wrong.labels[2] = 3;
  Rows<double> wrong_rows(wrong);
  o.acquisition = Acquisition::random;
  for (o.seed = 0; o.seed < 5; o.seed++) EXPECT_THROW(select(wrong_rows, {0, 1, 2}, 3), InputError);
  EXPECT_TRUE(Posterior(*layer) == at);
  EXPECT_NO_THROW(select(wrong_rows, {0, 1}, 1));
  const auto fresh = fitted(overlapping_samples(10, 4, 3, 19));
  o.update.passes = 0;
  EXPECT_THROW(select_batch<double>(rows.device(), *fresh, good, {1, 2}, 1, o), InputError);
  wrong = pool;
  wrong.x[9] = NAN;
  Rows<double> broken(wrong);
  for (bool sequential : {false, true}) {
    o = {}, o.sequential = sequential;
    EXPECT_THROW(select_batch<double>(rows.device(), *fresh, broken, {0, 1, 2}, 1, o), InputError);
    EXPECT_NO_THROW(
        select_batch<double>(rows.device(), *fitted(overlapping_samples(10, 4, 3, 19)), broken, {0, 1}, 1, o));
  }
  EXPECT_TRUE(Posterior(*fresh) == at);

  for (Acquisition a : {Acquisition::random, Acquisition::margin, Acquisition::entropy, Acquisition::bald,
                        Acquisition::badge, Acquisition::bait})
    EXPECT_EQ(parse_acquisition(to_string(a)), a);
  EXPECT_THROW(parse_acquisition("margins"), InputError);
}

}  // namespace
}  // namespace baton::test
