// MAP weights of the last layer against converged optima from elsewhere, and the optimizers against each other.
#include "trainers/last_layer/map.h"

#include "tests/trainers/last_layer/samples.h"

namespace baton::test {
namespace {

// J and its gradient by plain loops.
double objective(const Samples& s, const Doubles& w, double tau, const Doubles& mean = {}) {
  double j = 0;
  for (int n = 0; n < s.count(); n++) {
    double sum = 0, own = 0;
    for (int c = 0; c < s.classes; c++) {
      double f = 0;
      for (int i = 0; i < s.dim; i++) f += w[size_t(c) * s.dim + i] * s.x[size_t(n) * s.dim + i];
      sum += std::exp(f);
      if (c == s.labels[n]) own = f;
    }
    j += std::log(sum) - own;
  }
  for (size_t i = 0; i < w.size(); i++) {
    const double d = w[i] - (mean.empty() ? 0 : mean[i]);
    j += tau / 2 * d * d;
  }
  return j;
}
Doubles gradient(const Samples& s, const Doubles& w, double tau) {
  Doubles g = w;
  for (double& v : g) v *= tau;
  for (int n = 0; n < s.count(); n++) {
    Doubles e(size_t(s.classes), 0.);
    double sum = 0;
    for (int c = 0; c < s.classes; c++) {
      for (int i = 0; i < s.dim; i++) e[c] += w[size_t(c) * s.dim + i] * s.x[size_t(n) * s.dim + i];
      sum += e[c] = std::exp(e[c]);
    }
    for (int c = 0; c < s.classes; c++)
      for (int i = 0; i < s.dim; i++)
        g[size_t(c) * s.dim + i] += (e[c] / sum - (c == s.labels[n])) * s.x[size_t(n) * s.dim + i];
  }
  return g;
}
double dot(const Doubles& a, const Doubles& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); i++) sum += a[i] * b[i];
  return sum;
}
Doubles minus(Doubles a, const Doubles& b) {
  for (size_t i = 0; i < a.size(); i++) a[i] -= b[i];
  return a;
}

Doubles random_weights(size_t size, uint64_t seed) {
  SplitMix64 random(seed);
  Doubles w;
  for (size_t i = 0; i < size; i++) w.push_back(random.normal());
  return w;
}

template <class Real>
MapResult map_of(const Samples& s, const MapOptions& o) {
  Rows<Real> rows(s);
  return fit_map(rows.device(), rows.all(), s.classes, o);
}
template <class Real>
MapResult adam_of(const Samples& s, const AdamOptions& o) {
  Rows<Real> rows(s);
  return fit_adam(rows.device(), rows.all(), s.classes, o);
}
MapOptions options(MapMethod method, double tau = 1) {
  MapOptions o;
  o.method = method, o.tau = tau;
  return o;
}
constexpr MapMethod both[] = {MapMethod::newton, MapMethod::lbfgs};

TEST(LastLayerMap, Goldens) {
  BATON_NEEDS_DEVICE();
  for (const char* set : {"base100", "base1000"}) {
    const Npz z = golden(std::string("digits_map_") + set);
    const Doubles want = z.f64("W_map");
    const Samples s = digits(set);
    for (MapMethod method : both) {
      SCOPED_TRACE(std::string(set) + (method == MapMethod::newton ? ", Newton" : ", L-BFGS"));
      MapOptions o = options(method);
      o.iterations = 400;
      const MapResult got = map_of<double>(s, o);
      const double tolerance = method == MapMethod::newton ? 1e-9 : 1e-8;
      EXPECT_TRUE(got.converged);
      EXPECT_TRUE(close(got.weights, want, {.l2 = tolerance, .worst = tolerance}));
      EXPECT_NEAR(-got.log_likelihood, z.scalar("nll_train_sum"), 1e-8 * z.scalar("nll_train_sum"));
      EXPECT_NEAR(got.objective, objective(s, want, 1), 1e-11 * got.objective);
      EXPECT_LE(got.gradient, 1e-8);
      // Competent: quadratic convergence, and next to no evaluations beyond one an iteration.
      if (method == MapMethod::newton) EXPECT_LE(got.iterations, 12);
      else EXPECT_LE(got.evaluations, 2 + 1.2 * got.iterations);
    }
  }
}

TEST(LastLayerMap, TinyGoldens) {
  BATON_NEEDS_DEVICE();
  const Npz z = golden("tiny_softmax");
  const double tau = z.scalar("tau");
  Samples s = tiny_samples();
  for (MapMethod method : both)
    EXPECT_TRUE(close(map_of<double>(s, options(method, tau)).weights, z.f64("W_map"), {.l2 = 1e-8, .worst = 1e-8}));
  s.append(z.f64("phi_new"), int(z.scalar("y_new")));
  for (MapMethod method : both)
    EXPECT_TRUE(
        close(map_of<double>(s, options(method, tau)).weights, z.f64("retrain_W"), {.l2 = 1e-8, .worst = 1e-8}));
}

TEST(LastLayerMap, Float) {
  BATON_NEEDS_DEVICE();
  for (const char* set : {"base100", "base1000"}) {
    const Npz z = golden(std::string("digits_map_") + set);
    for (MapMethod method : both) {
      const MapResult got = map_of<float>(digits(set), options(method));
      EXPECT_TRUE(got.converged);  // although no gradient of a float product falls to 1e-10
      EXPECT_LT(got.iterations, 200);
      EXPECT_TRUE(close(got.weights, z.f64("W_map"), {.l2 = 1e-4, .worst = 1e-3}));
      EXPECT_NEAR(-got.log_likelihood, z.scalar("nll_train_sum"), 1e-4 * z.scalar("nll_train_sum"));
    }
  }
}

// At a start that no iteration leaves, `gradient` and `objective` are those of J there.
TEST(LastLayerMap, ObjectiveAndGradient) {
  BATON_NEEDS_DEVICE();
  const Samples s = normal_samples(9, 4, 3, 1);
  const Doubles w = random_weights(12, 2), mean = random_weights(12, 3);
  for (const Doubles& prior : {Doubles{}, mean})
    for (MapMethod method : both) {
      MapOptions o = options(method, 0.3);
      o.start = w, o.prior_mean = prior, o.iterations = 0;
      const MapResult got = map_of<double>(s, o);
      EXPECT_FALSE(got.converged);
      EXPECT_EQ(got.weights, w);
      EXPECT_NEAR(got.objective, objective(s, w, 0.3, prior), 1e-12 * got.objective);
      double top = 0, square = 0;
      for (size_t i = 0; i < w.size(); i++) {
        Doubles high = w, low = w;
        high[i] += 1e-5, low[i] -= 1e-5;
        top = std::max(top, std::abs(objective(s, high, 0.3, prior) - objective(s, low, 0.3, prior)) / 2e-5);
        square += (w[i] - (prior.empty() ? 0 : prior[i])) * (w[i] - (prior.empty() ? 0 : prior[i]));
      }
      EXPECT_NEAR(got.gradient, top, 1e-7);
      EXPECT_NEAR(-got.log_likelihood, got.objective - 0.15 * square, 1e-12);
    }
}

// At the optimum no single weight's change lowers J, and the prior's mean counts.
TEST(LastLayerMap, PriorMean) {
  BATON_NEEDS_DEVICE();
  const Samples s = normal_samples(30, 5, 4, 4);
  const Doubles mean = random_weights(20, 5);
  Doubles first;
  for (MapMethod method : both) {
    MapOptions o = options(method, 0.5);
    o.prior_mean = mean;
    const MapResult got = map_of<double>(s, o);
    EXPECT_TRUE(got.converged);
    for (size_t i = 0; i < mean.size(); i++) {
      Doubles high = got.weights, low = got.weights;
      high[i] += 1e-4, low[i] -= 1e-4;
      const double above = objective(s, high, 0.5, mean), below = objective(s, low, 0.5, mean);
      EXPECT_NEAR(above, below, 1e-10 * got.objective);
      EXPECT_GT(std::min(above, below), got.objective);
    }
    if (first.empty()) first = got.weights;
    else EXPECT_TRUE(close(got.weights, first, {.l2 = 1e-8}));
    EXPECT_FALSE(close(map_of<double>(s, options(method, 0.5)).weights, first, {.l2 = 1e-2}));
  }
}

TEST(LastLayerMap, LargePrecisionGivesThePriorsMean) {
  BATON_NEEDS_DEVICE();
  const Samples s = normal_samples(20, 6, 3, 6);
  const Doubles mean = random_weights(18, 7);
  for (MapMethod method : both) {
    MapOptions o = options(method, 1e9);
    o.prior_mean = mean;
    o.start = random_weights(18, 8);
    const MapResult got = map_of<double>(s, o);
    EXPECT_TRUE(got.converged);
    EXPECT_TRUE(close(got.weights, mean, {.l2 = 1e-7}));
    o.start.clear(), o.prior_mean.clear();
    EXPECT_LT(map_of<double>(s, o).gradient, 1e-6);
  }
}

// A weak prior on separable data: steps of full length overshoot.
TEST(LastLayerMap, BothMethodsAgreeWithAWeakPrior) {
  BATON_NEEDS_DEVICE();
  const Samples s = digits("base100");
  for (double tau : {1e-3, 0.1, 10.}) {
    MapOptions o = options(MapMethod::newton, tau);
    const MapResult newton = map_of<double>(s, o);
    o.method = MapMethod::lbfgs, o.iterations = 2000;
    const MapResult lbfgs = map_of<double>(s, o);
    EXPECT_TRUE(newton.converged && lbfgs.converged) << tau;
    EXPECT_LT(newton.iterations, 40);
    EXPECT_NEAR(newton.objective, lbfgs.objective, 1e-10 * newton.objective);
    EXPECT_TRUE(close(lbfgs.weights, newton.weights, {.l2 = 1e-5}));
  }
}

// From far away Newton's full steps raise J; the line search must not follow them.
TEST(LastLayerMap, FarStart) {
  BATON_NEEDS_DEVICE();
  const Samples s = digits("base100");
  const Doubles want = golden("digits_map_base100").f64("W_map");
  Doubles far = random_weights(650, 9);
  for (double& v : far) v *= 30;
  for (MapMethod method : both) {
    MapOptions o = options(method);
    o.start = far, o.iterations = 500;
    const MapResult got = map_of<double>(s, o);
    EXPECT_TRUE(got.converged);
    EXPECT_TRUE(close(got.weights, want, {.l2 = 1e-8}));
  }
}

TEST(LastLayerMap, WarmStart) {
  BATON_NEEDS_DEVICE();
  const Samples old = digits("base1000"), fresh = digits("new50");
  Samples all = old;
  for (int i = 0; i < 10; i++)
    all.append({fresh.x.begin() + i * 65, fresh.x.begin() + (i + 1) * 65}, fresh.labels[size_t(i)]);
  for (MapMethod method : both) {
    MapOptions o = options(method);
    o.iterations = 400;
    const MapResult cold = map_of<double>(all, o);
    o.start = map_of<double>(old, o).weights;
    const MapResult warm = map_of<double>(all, o);
    o.iterations = 0;
    const double before = map_of<double>(all, o).objective - cold.objective;
    o.iterations = 1;
    const double after = map_of<double>(all, o).objective - cold.objective;
    o.iterations = 400;
    EXPECT_LT(after, before * (method == MapMethod::newton ? 0.5 : 1));
    EXPECT_TRUE(warm.converged && cold.converged);
    EXPECT_LT(warm.evaluations, cold.evaluations);
    EXPECT_LT(warm.iterations, cold.iterations);
    EXPECT_TRUE(close(warm.weights, cold.weights, {.l2 = 1e-8}));
    // Already there: nothing to do.
    o.start = cold.weights, o.tolerance = 1e-8;
    const MapResult there = map_of<double>(all, o);
    EXPECT_TRUE(there.converged);
    EXPECT_EQ(there.iterations, 0);
    EXPECT_EQ(there.weights, cold.weights);
  }
}

// A competent baseline: as many evaluations as SciPy 1.10's L-BFGS-B by its own criterion. The evaluation more of a
// warm start is the gradient at 0, which the tolerance is relative to.
TEST(LastLayerMap, EvaluationsOfLbfgs) {
  BATON_NEEDS_DEVICE();
  const struct {
    const char* base;
    int cold, warm;
  } scipy[] = {{"base100", 47, 39}, {"base1000", 104, 56}};
  const Samples fresh = digits("new50");
  for (const auto& [base, cold, warm] : scipy) {
    Samples s = digits(base);
    MapOptions o = options(MapMethod::lbfgs);
    o.tolerance = 1e-5, o.least_decrease = 2.2e-9;
    const MapResult first = map_of<double>(s, o);
    EXPECT_TRUE(first.converged);
    EXPECT_LE(first.evaluations, cold + 1) << base;
    for (int i = 0; i < 10; i++)
      s.append({fresh.x.begin() + i * 65, fresh.x.begin() + (i + 1) * 65}, fresh.labels[size_t(i)]);
    o.start = golden(std::string("digits_map_") + base).f64("W_map");
    const MapResult second = map_of<double>(s, o);
    EXPECT_TRUE(second.converged);
    EXPECT_LE(second.evaluations, 1 + warm + 1) << base;
  }
}

// Every iteration against BFGS on a dense inverse Hessian, updated by the last pairs from y's/y'y I, and against the
// strong Wolfe conditions.
TEST(LastLayerMap, IterationsOfLbfgs) {
  BATON_NEEDS_DEVICE();
  const Samples s = normal_samples(15, 3, 3, 15);
  const size_t n = 9, memory = 3;
  const double tau = 0.1;
  MapOptions o = options(MapMethod::lbfgs, tau);
  o.memory = int(memory), o.start = random_weights(n, 16);
  std::vector<Doubles> w, g;
  for (o.iterations = 0; o.iterations < 9; o.iterations++) {
    w.push_back(map_of<double>(s, o).weights);
    g.push_back(gradient(s, w.back(), tau));
  }
  for (size_t k = 0; k + 1 < w.size(); k++) {
    std::vector<Doubles> inverse(n, Doubles(n, 0.));
    for (size_t i = 0; i < n; i++) inverse[i][i] = 1;
    for (size_t j = k - std::min(k, memory); j < k; j++) {
      const Doubles ds = minus(w[j + 1], w[j]), dy = minus(g[j + 1], g[j]);
      const double sy = dot(ds, dy);
      if (j + std::min(k, memory) == k) {
        const Doubles last = minus(g[k], g[k - 1]);
        for (size_t i = 0; i < n; i++) inverse[i][i] = dot(minus(w[k], w[k - 1]), last) / dot(last, last);
      }
      Doubles hy;
      for (const Doubles& row : inverse) hy.push_back(dot(row, dy));
      const double yhy = dot(dy, hy);
      for (size_t a = 0; a < n; a++)
        for (size_t b = 0; b < n; b++)
          inverse[a][b] += (1 + yhy / sy) * ds[a] * ds[b] / sy - (hy[a] * ds[b] + ds[a] * hy[b]) / sy;
    }
    Doubles d;
    for (const Doubles& row : inverse) d.push_back(-dot(row, g[k]));
    const Doubles step = minus(w[k + 1], w[k]);
    EXPECT_NEAR(dot(step, d), std::sqrt(dot(step, step) * dot(d, d)), 1e-9 * std::sqrt(dot(step, step) * dot(d, d)))
        << "iteration " << k;
    EXPECT_LE(objective(s, w[k + 1], tau), objective(s, w[k], tau) + 1e-4 * dot(g[k], step));
    EXPECT_LE(std::abs(dot(g[k + 1], step)), -0.9 * dot(g[k], step));
  }
}

// A first step that is far too short, one that is far too long, and one that overflows.
TEST(LastLayerMap, StepLengths) {
  BATON_NEEDS_DEVICE();
  for (double scale : {1e-3, 1e3}) {
    Samples s = normal_samples(40, 3, 3, 17);
    for (double& v : s.x) v *= scale;
    const double tau = 1e-4 * scale * scale;
    MapOptions o = options(MapMethod::lbfgs, tau);
    o.iterations = 1;
    const MapResult one = map_of<double>(s, o);
    EXPECT_EQ(one.iterations, 1);
    const Doubles g = gradient(s, Doubles(9, 0.), tau);
    EXPECT_LE(std::abs(dot(gradient(s, one.weights, tau), one.weights)), -0.9 * dot(g, one.weights)) << scale;
    EXPECT_LT(one.objective, 40 * std::log(3.));
    EXPECT_LE(one.evaluations, 9) << scale;
  }
  Samples s{{}, {}, 2, 2};
  for (int i = 0; i < 8; i++) s.append({i < 4 ? 1e18 : -1e18, 1}, i < 4);
  MapOptions o = options(MapMethod::newton, 1e-3);
  o.start = {1e18, 0, -1e18, 0};  // certain, and wrong
  o.iterations = 1;
  const MapResult got = map_of<float>(s, o);
  EXPECT_EQ(got.iterations, 1);
  EXPECT_LT(got.objective, 1.5e37);  // from 1.6e37
}

// Many small problems of all scales.
TEST(LastLayerMap, Problems) {
  BATON_NEEDS_DEVICE();
  for (uint64_t seed = 0; seed < 40; seed++) {
    SCOPED_TRACE(seed);
    SplitMix64 random(seed);
    const int n = 1 + int(random.below(60)), dim = 1 + int(random.below(12)), classes = 2 + int(random.below(5));
    Samples s = normal_samples(n, dim, classes, seed);
    const double scale = std::pow(10., random.uniform(-3, 3));
    for (double& v : s.x) v *= scale;
    MapOptions newton = options(MapMethod::newton, std::pow(10., random.uniform(-4, 4)));
    newton.tolerance = seed % 2 ? 1e-10 : 0;
    MapOptions lbfgs = newton;
    lbfgs.method = MapMethod::lbfgs, lbfgs.iterations = 3000;
    const MapResult a = map_of<double>(s, newton), b = map_of<double>(s, lbfgs);
    EXPECT_TRUE(a.converged && b.converged);
    EXPECT_LT(a.iterations, 60);
    EXPECT_LE(b.evaluations, 1.5 * b.iterations + 80);
    EXPECT_NEAR(a.objective, b.objective, 1e-8 * (n + a.objective));
    const MapResult c = map_of<float>(s, newton), d = map_of<float>(s, lbfgs);
    EXPECT_TRUE(c.converged && d.converged);
    EXPECT_NEAR(c.objective, a.objective, 1e-4 * (n + a.objective));
    EXPECT_NEAR(d.objective, a.objective, 1e-4 * (n + a.objective));
  }
}

TEST(LastLayerMap, Stops) {
  BATON_NEEDS_DEVICE();
  const Samples s = digits("base100");
  MapOptions o = options(MapMethod::lbfgs);
  const MapResult full = map_of<double>(s, o);
  o.least_decrease = 2.2e-9;
  const MapResult early = map_of<double>(s, o);
  EXPECT_TRUE(early.converged);
  EXPECT_LT(early.evaluations, full.evaluations);
  EXPECT_NEAR(early.objective, full.objective, 1e-7 * full.objective);
  EXPECT_GT(early.gradient, full.gradient);
  o.least_decrease = 0, o.iterations = 5;
  const MapResult cut = map_of<double>(s, o);
  EXPECT_FALSE(cut.converged);
  EXPECT_EQ(cut.iterations, 5);
  o.iterations = 200, o.tolerance = 1e-4;  // times 1 + the largest gradient at 0
  MapOptions at_zero = o;
  at_zero.iterations = 0;
  const double scale = 1 + map_of<double>(s, at_zero).gradient;
  const MapResult loose = map_of<double>(s, o);
  EXPECT_LE(loose.gradient, 1e-4 * scale);
  EXPECT_GT(loose.gradient, 1e-6 * scale);
  o.start = random_weights(650, 10);
  o.prior_mean = Doubles(650, 0.);
  const MapResult elsewhere = map_of<double>(s, o);  // measured by the gradient at 0, not at the start
  EXPECT_LE(elsewhere.gradient, 1e-4 * scale);
  EXPECT_GT(elsewhere.gradient, 2e-5 * scale);
  // Without a tolerance: until rounding.
  for (MapMethod method : both) {
    o = options(method);
    o.tolerance = 0;
    const MapResult last = map_of<double>(s, o);
    EXPECT_TRUE(last.converged);
    EXPECT_LT(last.gradient, 1e-9);
    EXPECT_LT(last.iterations, 200);
  }
  // More pairs help.
  MapOptions few = options(MapMethod::lbfgs), many = few;
  few.memory = 1, many.memory = 20;
  const MapResult one = map_of<double>(s, few), twenty = map_of<double>(s, many);
  EXPECT_GT(one.evaluations, twenty.evaluations);
  EXPECT_TRUE(close(one.weights, twenty.weights, {.l2 = 1e-8}));
}

TEST(LastLayerMap, Adam) {
  BATON_NEEDS_DEVICE();
  const Samples s = digits("base100");
  const MapResult map = map_of<double>(s, options(MapMethod::newton));
  AdamOptions o;
  o.epochs = 300, o.lr = 0.05;
  const MapResult adam = adam_of<double>(s, o);
  EXPECT_EQ(adam.iterations, 300 * 2);  // 64 and 36
  EXPECT_GE(adam.objective, map.objective);
  EXPECT_LT(adam.objective, map.objective * (1 + 2e-4));
  EXPECT_TRUE(close(adam.weights, map.weights, {.l2 = 0.03, .bias = 0.03}));
  EXPECT_NEAR(adam.objective, objective(s, adam.weights, 1), 1e-10 * map.objective);
  double square = 0;
  for (double v : adam.weights) square += v * v;
  EXPECT_NEAR(-adam.log_likelihood, adam.objective - square / 2, 1e-10 * map.objective);
  EXPECT_TRUE(close(adam_of<float>(s, o).weights, adam.weights, {.l2 = 1e-3}));

  // The same seed, the same bits.
  const MapResult again = adam_of<double>(s, o);
  EXPECT_EQ(again.weights, adam.weights);
  EXPECT_EQ(again.objective, adam.objective);
  o.seed = 1;
  EXPECT_NE(adam_of<double>(s, o).weights, adam.weights);

  // A batch beyond the data is the data; from the MAP it stays.
  o.batch = 1000;
  EXPECT_EQ(adam_of<double>(s, o).iterations, 300);
  o.start = map.weights;
  EXPECT_TRUE(close(adam_of<double>(s, o).weights, map.weights, {.l2 = 1e-6}));
}

// One epoch of Adam by hand: the order of the draws, batches of 4, 4 and 2, the cosine and the scale of the prior.
TEST(LastLayerMap, AdamStepByStep) {
  BATON_NEEDS_DEVICE();
  const Samples s = normal_samples(10, 3, 3, 11);
  AdamOptions o;
  o.tau = 0.7, o.lr = 0.05, o.epochs = 2, o.batch = 4, o.seed = 12, o.start = random_weights(9, 13);
  Doubles w = o.start, m(9, 0.), v(9, 0.);
  std::vector<int> order(10);
  for (int i = 0; i < 10; i++) order[size_t(i)] = i;
  SplitMix64 random(o.seed);
  int t = 0;
  for (int epoch = 0; epoch < 2; epoch++) {
    for (size_t i = 9; i > 0; i--) std::swap(order[i], order[random.below(i + 1)]);
    for (size_t first = 0; first < 10; first += 4) {
      const size_t end = std::min<size_t>(first + 4, 10);
      Doubles g(9, 0.);
      for (size_t k = first; k < end; k++) {
        const size_t n = size_t(order[k]);
        double f[3], sum = 0;
        for (size_t c = 0; c < 3; c++) {
          f[c] = 0;
          for (size_t i = 0; i < 3; i++) f[c] += w[3 * c + i] * s.x[3 * n + i];
          sum += std::exp(f[c]);
        }
        for (size_t c = 0; c < 3; c++)
          for (size_t i = 0; i < 3; i++)
            g[3 * c + i] += (std::exp(f[c]) / sum - (int(c) == s.labels[n])) * s.x[3 * n + i] / double(end - first);
      }
      const double lr = o.lr * (1 + std::cos(M_PI * t / 6)) / 2;
      t++;
      for (size_t i = 0; i < 9; i++) {
        g[i] += o.tau / 10 * w[i];
        m[i] = 0.9 * m[i] + 0.1 * g[i];
        v[i] = 0.999 * v[i] + 0.001 * g[i] * g[i];
        w[i] -= lr * m[i] / (1 - std::pow(0.9, t)) / (std::sqrt(v[i] / (1 - std::pow(0.999, t))) + 1e-8);
      }
    }
  }
  EXPECT_TRUE(close(adam_of<double>(s, o).weights, w, {.l2 = 1e-12}));
}

TEST(LastLayerMap, Errors) {
  BATON_NEEDS_DEVICE();
  const Samples s = normal_samples(6, 4, 3, 14);
  const auto fails = [](const Samples& samples, const MapOptions& o, const std::string& words) {
    expect_error<InputError>([&] { map_of<double>(samples, o); }, words);
    expect_error<InputError>([&] { map_of<float>(samples, o); }, words);
  };
  Samples none = s;
  none.x.clear(), none.labels.clear();
  fails(none, {}, "there are no samples");
  for (double tau : {0., -1., std::nan(""), double(INFINITY)}) {
    MapOptions o;
    o.tau = tau;
    fails(s, o, "prior precision must be positive");
  }
  for (int label : {3, -1}) {
    Samples wrong = s;
    wrong.labels[4] = label;
    fails(wrong, {}, "sample 4 has label " + std::to_string(label) + ", expected 0 to 2");
  }
  for (double value : {std::nan(""), double(INFINITY)}) {
    Samples wrong = s;
    wrong.x[4 * 5 + 3] = value;
    fails(wrong, {}, "sample 5 has features that are not finite");
    expect_error<InputError>([&] { adam_of<double>(wrong, {}); }, "fit_adam: sample 5 has features");
  }
  MapOptions o;
  o.start = Doubles(11, 0.);
  fails(s, o, "the start has 11 weights, expected 3 x 4");
  o.start.clear(), o.prior_mean = Doubles(13, 0.);
  fails(s, o, "the prior's mean has 13 weights, expected 3 x 4");
  o.prior_mean.clear(), o.memory = 0;
  fails(s, o, "at least one pair");
  o = {};
  o.tolerance = std::nan("");
  fails(s, o, "tolerances");
  Rows<double> rows(s);
  expect_error<InputError>([&] { fit_map(rows.device(), rows.all(), 1, MapOptions{}); }, "at least 2 classes");
  FeatureRows<double> unlabelled = rows.all();
  unlabelled.labels = nullptr;
  expect_error<InputError>([&] { fit_map(rows.device(), unlabelled, 3, MapOptions{}); }, "need labels");
  Samples large = s;
  for (double& v : large.x) v *= 1e25;
  expect_error<RunError>([&] { map_of<float>(large, {}); }, "not finite");  // a float product overflows
  o = {};
  o.start = Doubles(12, 1e200);
  for (MapMethod method : both) {
    o.method = method;
    expect_error<RunError>([&] { map_of<double>(s, o); }, "not finite");
  }
  AdamOptions a;
  a.start = Doubles(5, 0.);
  expect_error<InputError>([&] { adam_of<double>(s, a); }, "the start has 5 weights, expected 3 x 4");
  a = {};
  a.lr = 0;
  expect_error<InputError>([&] { adam_of<double>(s, a); }, "step size");
  a = {};
  a.start = Doubles(12, 1e200);
  expect_error<RunError>([&] { adam_of<double>(s, a); }, "not finite");
}

}  // namespace
}  // namespace baton::test
