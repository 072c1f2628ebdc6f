// The exact Laplace approximation of a last layer, against golden values of independent code (formulas in
// shared/goldens/laplace) and against what must hold for any data.
#include "trainers/last_layer/exact.h"

#include <cstring>

#include "tests/trainers/last_layer/exact_fixture.h"
#include "trainers/last_layer/kronecker.h"

namespace baton::test {
namespace {

Doubles diagonal(const Doubles& m, int n) {
  Doubles d;
  for (int i = 0; i < n; i++) d.push_back(m[size_t(i) * n + i]);
  return d;
}
Doubles row(const Doubles& m, int n, int i) { return {m.begin() + size_t(i) * n, m.begin() + size_t(i + 1) * n}; }

// A big matrix [n x n] is there whole, or as every 50th row and perhaps its norm.
void expect_matrix(const Npz& z, const std::string& name, const Doubles& got, int n, double tolerance) {
  SCOPED_TRACE(name);
  if (z.has(name)) {
    EXPECT_TRUE(within(got, z.f64(name), tolerance));
    return;
  }
  Doubles rows;
  for (int i = 0; i < n; i += 50) {
    const Doubles one = row(got, n, i);
    rows.insert(rows.end(), one.begin(), one.end());
  }
  EXPECT_TRUE(within(rows, z.f64(name + "_rows"), tolerance));
  if (z.has(name + "_frob")) {
    EXPECT_TRUE(within(frobenius(got), z.scalar(name + "_frob"), tolerance));
  }
}

Doubles predicted(const Doubles& w, const double* phi, int dim, int classes) {
  Doubles f(classes, 0);
  for (int c = 0; c < classes; c++)
    for (int d = 0; d < dim; d++) f[c] += w[size_t(c) * dim + d] * phi[d];
  return softmax(f);
}
double log_likelihood(const Doubles& w, const Samples& s) {
  double sum = 0;
  for (int i = 0; i < s.count(); i++)
    sum += std::log(predicted(w, s.x.data() + size_t(i) * s.dim, s.dim, int(w.size()) / s.dim)[s.labels[i]]);
  return sum;
}

struct Quality {
  double accuracy = 0, nll = 0;
};
Quality quality(ExactLastLayer& layer, const Samples& s, int classes) {
  Rows rows(s);
  const Doubles p = layer.predict(rows.x(), rows.count(), {.link = Link::map}).probability;
  Quality q;
  for (int i = 0; i < s.count(); i++) {
    const double* row = p.data() + size_t(i) * classes;
    q.accuracy += double(std::max_element(row, row + classes) - row == s.labels[i]) / s.count();
    q.nll -= std::log(row[s.labels[i]]) / s.count();
  }
  return q;
}

Doubles logits(ExactLastLayer& layer, Rows<>& rows, int classes) {
  Buffer<double> f(rows.memory(), size_t(rows.count()) * classes);
  layer.logits(rows.x(), rows.count(), f);
  return f.host();
}

// The largest entry of Sigma P - I.
double inverse_error(const ExactLastLayer& layer, int n) {
  const Doubles s = layer.covariance(), p = layer.precision();
  double worst = 0;
  for (int i = 0; i < n; i++) {
    Doubles line(n, 0);
    for (int k = 0; k < n; k++)
      for (int j = 0; j < n; j++) line[j] += s[size_t(i) * n + k] * p[size_t(k) * n + j];
    for (int j = 0; j < n; j++) worst = std::max(worst, std::abs(line[j] - (i == j)));
  }
  return worst;
}
bool symmetric(const Doubles& m, int n) {
  for (int i = 0; i < n; i++)
    for (int j = 0; j < i; j++)
      if (m[size_t(i) * n + j] != m[size_t(j) * n + i]) return false;
  return true;
}

// Every bit of the posterior.
Doubles everything(const ExactLastLayer& layer) {
  Doubles all = layer.weights();
  for (const Doubles& part : {layer.covariance(), layer.precision(), layer.curvature()})
    all.insert(all.end(), part.begin(), part.end());
  all.push_back(layer.log_determinant());
  return all;
}
bool same_bits(const Doubles& a, const Doubles& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
}

const ExactRule rules[] = {ExactRule::newton_old, ExactRule::newton_new, ExactRule::implicit};

// ---------------------------------------------------------------------------------------------------------- goldens
TEST(ExactLastLayer, TinySoftmaxPosterior) {
  BATON_NEEDS_DEVICE();
  const Npz z = golden("tiny_softmax");
  const Samples s = tiny_samples();
  Rows rows(s);
  ExactLastLayer layer(rows.device(), 3, 3, z.scalar("tau"));
  const MapResult map = layer.fit(rows);
  EXPECT_TRUE(map.converged);
  EXPECT_TRUE(within(map.weights, z.f64("W_map"), optimum));
  EXPECT_TRUE(exact(layer.weights(), map.weights));

  layer.fit_covariance(rows, z.f64("W_map"));
  EXPECT_TRUE(within(layer.curvature(), z.f64("H"), one_shot));
  EXPECT_TRUE(within(diagonal(layer.curvature(), 9), z.f64("diagH"), one_shot));
  EXPECT_TRUE(within(layer.precision(), z.f64("post_prec"), one_shot));
  EXPECT_TRUE(within(layer.covariance(), z.f64("post_cov"), one_shot));
  EXPECT_TRUE(within(layer.log_determinant(), z.scalar("logdet_prec"), one_shot));
  const Evidence e = layer.evidence(log_likelihood(layer.weights(), s));
  EXPECT_TRUE(within(e.value, z.scalar("log_marglik"), one_shot));
  EXPECT_TRUE(within(e.by_log_tau, z.scalar("dlogtau"), one_shot));
  EXPECT_TRUE(within(logits(layer, rows, 3), z.f64("f_mu"), one_shot));
  EXPECT_TRUE(within(logit_covariances(layer, rows, 3), z.f64("f_var"), one_shot));
  for (const auto& [link, name] : {std::pair{Link::map, "probs"},
                                   {Link::probit, "p_probit"},
                                   {Link::bridge, "p_bridge"},
                                   {Link::bridge_norm, "p_bridge_norm"}}) {
    const LinkedPredictions got = layer.predict(rows.x(), rows.count(), {.link = link});
    EXPECT_TRUE(within(got.probability, z.f64(name), one_shot)) << name;
    EXPECT_EQ(got.entropy.size(), 12u);
    EXPECT_TRUE(got.information.empty());
  }
}

TEST(ExactLastLayer, TinySoftmaxUpdates) {
  BATON_NEEDS_DEVICE();
  const Npz z = golden("tiny_softmax");
  const Samples s = tiny_samples();
  const Samples fresh{z.f64("phi_new"), {int32_t(z.scalar("y_new"))}, 3};
  Rows rows(s), one(fresh), both(s + fresh);
  const auto fitted = [&] {
    auto layer = std::make_unique<ExactLastLayer>(rows.device(), 3, 3, z.scalar("tau"));
    layer->fit_covariance(rows, z.f64("W_map"));
    return layer;
  };
  const std::string names[] = {"exact_old", "exact_new", "implicit"};
  for (int k = 0; k < 3; k++) {
    SCOPED_TRACE(names[k]);
    const auto layer = fitted();
    layer->update(one, rules[k]);
    EXPECT_TRUE(within(layer->weights(), z.f64(names[k] + "_W"), one_shot));
    EXPECT_TRUE(within(layer->covariance(), z.f64(names[k] + "_cov"), one_shot));
  }
  const auto step = fitted(), converged = fitted();
  EXPECT_EQ(step->update_jointly(one, 1).iterations, 1);
  EXPECT_TRUE(within(step->weights(), z.f64("exact_old_W"), one_shot));
  EXPECT_TRUE(within(step->covariance(), z.f64("exact_new_cov"), one_shot));
  EXPECT_TRUE(converged->update_jointly(one, 50).converged);
  EXPECT_TRUE(within(converged->weights(), z.f64("online_converged_W"), optimum));
  EXPECT_TRUE(within(converged->covariance(), z.f64("implicit_cov"), optimum));
  EXPECT_TRUE(within(step->fit(both).weights, z.f64("retrain_W"), optimum));
}

// Logistic regression on w with the prior precision tau is the softmax of two classes with w_1 = -w_0 = w / 2 and 2
// tau: w_1 - w_0 has the posterior of w, and w_1 + w_0 keeps its prior. Its probit differs, for that also knows w_1 +
// w_0.
TEST(ExactLastLayer, TinyBinary) {
  BATON_NEEDS_DEVICE();
  const Npz z = golden("tiny_binary");
  const double tau = z.scalar("tau");
  Samples s{z.f64("A"), {}, 2}, test{{}, {}, 2};
  for (double t : z.f64("t")) s.labels.push_back(int32_t(t));
  for (double x : z.f64("x_test")) test.x.insert(test.x.end(), {x, 1}), test.labels.push_back(0);
  Rows rows(s), points(test);
  ExactLastLayer layer(rows.device(), 2, 2, 2 * tau);
  const MapResult map = layer.fit(rows);
  const Doubles w = layer.weights(), golden_w = z.f64("w_map");
  EXPECT_TRUE(within({w[2] - w[0], w[3] - w[1]}, golden_w, optimum));
  EXPECT_NEAR(w[2] + w[0], 0, optimum);
  EXPECT_NEAR(w[3] + w[1], 0, optimum);
  EXPECT_TRUE(within(map.log_likelihood, z.scalar("log_lik"), optimum));
  EXPECT_TRUE(within(layer.evidence(map.log_likelihood).value, z.scalar("log_marglik_laplace"), optimum));

  layer.fit_covariance(rows, {-golden_w[0] / 2, -golden_w[1] / 2, golden_w[0] / 2, golden_w[1] / 2});
  EXPECT_TRUE(within(layer.evidence(z.scalar("log_lik")).value, z.scalar("log_marglik_laplace"), one_shot));
  const Doubles sigma = layer.covariance();
  const auto contrast = [](const Doubles& m, int n, int i, int j) {  // of classes 1 - 0
    return m[i * n + j] + m[(i + n / 2) * n + j + n / 2] - m[i * n + j + n / 2] - m[(i + n / 2) * n + j];
  };
  Doubles cov;
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++) cov.push_back(contrast(sigma, 4, i, j));
  EXPECT_TRUE(within(cov, z.f64("post_cov"), one_shot));
  const Doubles f = logits(layer, points, 2), v = logit_covariances(layer, points, 2);
  const Doubles p = layer.predict(points.x(), points.count(), {.link = Link::map}).probability;
  Doubles mean, variance, p_map;
  for (int i = 0; i < points.count(); i++) {
    mean.push_back(f[2 * i + 1] - f[2 * i]);
    variance.push_back(contrast({v.begin() + 4 * i, v.begin() + 4 * i + 4}, 2, 0, 0));
    p_map.push_back(p[2 * i + 1]);
  }
  EXPECT_TRUE(within(mean, z.f64("logit_mu"), one_shot));
  EXPECT_TRUE(within(variance, z.f64("logit_var"), one_shot));
  EXPECT_TRUE(within(p_map, z.f64("p_map"), one_shot));
}

TEST(ExactLastLayer, DigitsMap) {
  BATON_NEEDS_DEVICE();
  for (const std::string base : {"base100", "base1000"}) {
    SCOPED_TRACE(base);
    const Npz z = golden("digits_map_" + base);
    const Samples s = digits(base);
    Rows rows(s);
    ExactLastLayer layer(rows.device(), digit_dim, digit_classes, 1);
    const MapResult map = layer.fit(rows);
    EXPECT_TRUE(within(map.weights, z.f64("W_map"), optimum));
    EXPECT_TRUE(within(-map.log_likelihood, z.scalar("nll_train_sum"), optimum));

    layer.fit_covariance(rows, z.f64("W_map"));
    const Doubles h = layer.curvature(), sigma = layer.covariance(), p = layer.precision();
    EXPECT_TRUE(within(diagonal(h, digit_weights), z.f64("diag_H"), one_shot));
    EXPECT_TRUE(symmetric(h, digit_weights) && symmetric(sigma, digit_weights) && symmetric(p, digit_weights));
    if (base == "base100") {
      expect_matrix(z, "H_lik", h, digit_weights, one_shot);
      expect_matrix(z, "post_cov", sigma, digit_weights, one_shot);
      EXPECT_TRUE(within(diagonal(sigma, digit_weights), z.f64("diag_cov_full"), one_shot));
    } else {
      EXPECT_TRUE(within(frobenius(h), z.scalar("H_frob"), one_shot));
      EXPECT_TRUE(within(row(h, digit_weights, 7), z.f64("H_row7"), one_shot));
      EXPECT_TRUE(within(diagonal(sigma, digit_weights), z.f64("cov_diag"), one_shot));
      EXPECT_TRUE(within(row(sigma, digit_weights, 7), z.f64("cov_row7"), one_shot));
      EXPECT_TRUE(within(frobenius(sigma), z.scalar("cov_frob"), one_shot));
    }
    EXPECT_TRUE(within(layer.log_determinant(), z.scalar("logdet_prec"), one_shot));
    const Evidence e = layer.evidence(-z.scalar("nll_train_sum"));
    EXPECT_TRUE(within(e.value, z.scalar("log_marglik"), one_shot));
    EXPECT_TRUE(within(e.by_log_tau, z.scalar("dlogtau"), one_shot));
    const Quality q = quality(layer, digits("test"), digit_classes);
    EXPECT_NEAR(q.accuracy, z.scalar("test_acc"), 1e-12);
    EXPECT_TRUE(within(q.nll, z.scalar("test_nll"), one_shot));
  }
}

TEST(ExactLastLayer, DigitsPredict) {
  BATON_NEEDS_DEVICE();
  const Npz z = golden("digits_predict_base100");
  Rows rows(digits("base100"));
  ExactLastLayer layer(rows.device(), digit_dim, digit_classes, 1);
  layer.fit_covariance(rows, golden("digits_map_base100").f64("W_map"));
  Rows points({z.f64("Phi"), std::vector<int32_t>(50), digit_dim});
  EXPECT_TRUE(within(logits(layer, points, digit_classes), z.f64("f_mu"), one_shot));
  EXPECT_TRUE(within(logit_covariances(layer, points, digit_classes), z.f64("f_var"), one_shot));
  for (const auto& [link, name] : {std::pair{Link::map, "p_map"},
                                   {Link::probit, "p_probit"},
                                   {Link::bridge, "p_bridge"},
                                   {Link::bridge_norm, "p_bridge_norm"}})
    EXPECT_TRUE(within(layer.predict(points.x(), 50, {.link = link}).probability, z.f64(name), one_shot)) << name;

  // With the stored normals, by the kernel itself.
  Memory memory;
  Buffer<double> f(memory, logits(layer, points, digit_classes));
  Buffer<double> v(memory, logit_covariances(layer, points, digit_classes)), eps(memory, z.f64("eps"));
  Buffer<double> p(memory, 500), factor(memory, 5000);
  link_probabilities<double>({p, nullptr, nullptr, f, v, eps, factor, true}, Link::monte_carlo, 0, 1000, 50,
                             digit_classes, memory.stream());
  EXPECT_TRUE(within(p.host(), z.f64("p_mc_eps"), one_shot));

  // With others: a softmax varies less than a Bernoulli variable of its mean.
  constexpr int draws = 20000;
  const LinkedPredictions got = layer.predict(points.x(), 50, {.link = Link::monte_carlo, .draws = draws, .seed = 3});
  const Doubles want = z.f64("p_mc_200k");
  for (int i = 0; i < 500; i++) {
    const double variance = want[i] * (1 - want[i]) * (1.0 / draws + 1 / 200000.0);
    EXPECT_LE(std::abs(got.probability[i] - want[i]), 4 * std::sqrt(variance)) << i;
  }
  ASSERT_EQ(got.information.size(), 50u);
  for (int i = 0; i < 50; i++) {
    EXPECT_GT(got.information[i], 0);
    EXPECT_LT(got.information[i], got.entropy[i]);
  }
  const auto seeded = [&](uint64_t seed) {
    return layer.predict(points.x(), 50, {.link = Link::monte_carlo, .draws = 10, .seed = seed}).probability;
  };
  EXPECT_TRUE(same_bits(seeded(1), seeded(1)));
  EXPECT_FALSE(same_bits(seeded(1), seeded(2)));
}

TEST(ExactLastLayer, DigitsUpdates) {
  BATON_NEEDS_DEVICE();
  const Samples test = digits("test"), fresh = digits("new50");
  for (const std::string base : {"base100", "base1000"}) {
    const Npz z = golden("digits_update_exact_" + base);
    const Doubles map = golden("digits_map_" + base).f64("W_map");
    const Samples old = digits(base);
    Rows rows(old);
    ExactLastLayer layer(rows.device(), digit_dim, digit_classes, 1);
    for (const int b : {1, 10, 50}) {
      Rows more(fresh.slice(0, b));
      const auto expect = [&](const std::string& name) {
        const Doubles sigma = layer.covariance();
        EXPECT_TRUE(within(layer.weights(), z.f64(name + "_W"), optimum));
        const auto expect_one = [&](const std::string& what, const Doubles& got) {
          if (z.has(name + what)) {
            EXPECT_TRUE(within(got, z.f64(name + what), optimum)) << what;
          }
        };
        expect_one("_covdiag", diagonal(sigma, digit_weights));
        expect_one("_logdetcov", {-layer.log_determinant()});
        expect_one("_logdetprec", {layer.log_determinant()});
        expect_one("_covfrob", {frobenius(sigma)});
        if (z.has(name + "_cov") || z.has(name + "_cov_rows"))
          expect_matrix(z, name + "_cov", sigma, digit_weights, optimum);
        const Quality q = quality(layer, test, digit_classes);
        EXPECT_NEAR(q.accuracy, z.scalar(name + "_acc"), 1e-12);
        EXPECT_TRUE(within(q.nll, z.scalar(name + "_nll"), optimum));
      };
      const std::string names[] = {"seq_old", "seq_new", "implicit"};
      for (int k = 0; k < 3; k++) {
        const std::string name = names[k] + "_b" + std::to_string(b);
        SCOPED_TRACE(base + " " + name);
        layer.fit_covariance(rows, map);
        layer.update(more, rules[k]);
        expect(name);
      }
      for (const int iterations : {1, 50}) {
        const std::string name = (iterations == 1 ? "batchNewton1_b" : "onlineConverged_b") + std::to_string(b);
        SCOPED_TRACE(base + " " + name);
        layer.fit_covariance(rows, map);
        const MapResult result = layer.update_jointly(more, iterations);
        expect(name);
        EXPECT_TRUE(exact(layer.weights(), result.weights));
        EXPECT_TRUE(iterations == 1 || (result.converged && result.iterations < 15)) << result.iterations;
      }
      SCOPED_TRACE(base + " retrain_b" + std::to_string(b));
      Rows all(old + fresh.slice(0, b));
      layer.fit(all);
      expect("retrain_b" + std::to_string(b));
    }
  }
}

TEST(ExactLastLayer, DigitsEvidence) {
  BATON_NEEDS_DEVICE();
  const Npz z = golden("digits_marglik_base100");
  const Npz map = golden("digits_map_base100");
  const Doubles taus = z.f64("taus");
  Rows rows(digits("base100"));
  Doubles post_hoc, by_log_tau, refitted;
  for (double tau : taus) {
    ExactLastLayer layer(rows.device(), digit_dim, digit_classes, tau);
    layer.fit_covariance(rows, map.f64("W_map"));
    const Evidence e = layer.evidence(-map.scalar("nll_train_sum"));
    post_hoc.push_back(e.value), by_log_tau.push_back(e.by_log_tau);
    refitted.push_back(layer.evidence(layer.fit(rows).log_likelihood).value);
  }
  for (size_t i = 0; i < taus.size(); i++) {
    EXPECT_TRUE(within(post_hoc[i], z.f64("posthoc_lml")[i], one_shot)) << taus[i];
    EXPECT_TRUE(within(by_log_tau[i], z.f64("posthoc_dlogtau")[i], one_shot)) << taus[i];
    EXPECT_TRUE(within(refitted[i], z.f64("refit_lml")[i], optimum)) << taus[i];
  }
}

// ------------------------------------------------------------------------------------------- what holds for any data
TEST(ExactLastLayer, BeforeAnyDataItIsThePrior) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  ExactLastLayer layer(memory.device(), 2, 3, 4);
  EXPECT_TRUE(exact(layer.weights(), Doubles(6, 0)));
  EXPECT_TRUE(exact(diagonal(layer.covariance(), 6), Doubles(6, 0.25)));
  EXPECT_TRUE(exact(diagonal(layer.precision(), 6), Doubles(6, 4)));
  EXPECT_NEAR(layer.log_determinant(), 6 * std::log(4), 1e-14);
  EXPECT_NEAR(layer.evidence(-3).value, -3, 1e-14);
  EXPECT_NEAR(layer.evidence(-3).by_log_tau, 0, 1e-14);
}

TEST(ExactLastLayer, CovarianceStaysTheInverse) {
  BATON_NEEDS_DEVICE();
  for (const ExactRule rule : rules) {
    Small small;
    for (int round = 0; round < 5; round++) small.layer.update(small.more_rows, rule);
    EXPECT_LT(inverse_error(small.layer, Small::order), 1e-11);
    EXPECT_TRUE(symmetric(small.layer.covariance(), Small::order));
    EXPECT_TRUE(symmetric(small.layer.precision(), Small::order));
    small.layer.update_jointly(small.more_rows, 20);
    EXPECT_LT(inverse_error(small.layer, Small::order), 1e-11);
  }
}

TEST(ExactLastLayer, LogDeterminantFollows) {
  BATON_NEEDS_DEVICE();
  for (const ExactRule rule : rules) {
    Small small;
    small.layer.update(small.more_rows, rule);
    Memory memory;
    Factorizer<double> factorizer(memory.device(), memory.arena(), Small::order);
    Buffer<double> p(memory, small.layer.precision());
    ASSERT_EQ(factorizer.cholesky(p, Small::order), 0);
    EXPECT_NEAR(factorizer.log_determinant(p, Small::order), small.layer.log_determinant(), 1e-11);
  }
}

TEST(ExactLastLayer, OneCallOrMany) {
  BATON_NEEDS_DEVICE();
  for (const ExactRule rule : rules) {
    Small together, apart;
    together.layer.update(together.more_rows, rule);
    for (const auto& [first, count] : {std::pair{0, 1}, {1, 4}, {5, 7}}) {
      Rows part(apart.more.slice(first, count));
      apart.layer.update(part, rule);
    }
    EXPECT_TRUE(same_bits(together.layer.weights(), apart.layer.weights()));
    EXPECT_TRUE(same_bits(together.layer.covariance(), apart.layer.covariance()));
    EXPECT_TRUE(within(together.layer.precision(), apart.layer.precision(), 1e-14));
    EXPECT_TRUE(same_bits(together.layer.curvature(), apart.layer.curvature()));  // of the fit alone
  }
}

// P (w' - w) = (e_y - predicted(W' phi)) (x) phi, for samples far from what the model expects too.
TEST(ExactLastLayer, ImplicitStepIsTheMinimum) {
  BATON_NEEDS_DEVICE();
  for (const double scale : {1.0, 30.0, 1e3, 1e6}) {
    Small small(1e-3);
    Samples odd = small.more.slice(0, 1);
    for (double& v : odd.x) v *= scale;
    const Doubles before = small.layer.weights(), p = small.layer.precision();
    const Doubles expected = predicted(before, odd.x.data(), Small::dim, Small::classes);
    odd.labels[0] = int32_t(std::min_element(expected.begin(), expected.end()) - expected.begin());
    Rows one(odd);
    small.layer.update(one, ExactRule::implicit);
    const Doubles after = small.layer.weights();
    const Doubles q = predicted(after, odd.x.data(), Small::dim, Small::classes);
    Doubles pull(Small::order, 0), push;
    for (int i = 0; i < Small::order; i++)
      for (int j = 0; j < Small::order; j++) pull[i] += p[i * Small::order + j] * (after[j] - before[j]);
    for (int c = 0; c < Small::classes; c++)
      for (int d = 0; d < Small::dim; d++) push.push_back(((c == odd.labels[0]) - q[c]) * odd.x[d]);
    EXPECT_TRUE(within(pull, push, scale > 100 ? 1e-6 : 1e-9)) << scale;
  }
}

TEST(ExactLastLayer, RulesOfOneSampleAgree) {
  BATON_NEEDS_DEVICE();
  Small newton, jointly, implicit, converged;
  Rows one(newton.more.slice(3, 1));
  newton.layer.update(one, ExactRule::newton_new);
  jointly.layer.update_jointly(one, 1);
  EXPECT_TRUE(within(newton.layer.weights(), jointly.layer.weights(), 1e-12));
  EXPECT_TRUE(within(newton.layer.covariance(), jointly.layer.covariance(), 1e-12));
  EXPECT_NEAR(newton.layer.log_determinant(), jointly.layer.log_determinant(), 1e-12);
  implicit.layer.update(one, ExactRule::implicit);
  const MapResult result = converged.layer.update_jointly(one, 100);
  EXPECT_TRUE(result.converged);
  EXPECT_TRUE(within(implicit.layer.weights(), converged.layer.weights(), 1e-11));
  EXPECT_TRUE(within(implicit.layer.covariance(), converged.layer.covariance(), 1e-11));
}

// A weak prior and samples that contradict the model: undamped steps overshoot.
TEST(ExactLastLayer, JointUpdateIsDamped) {
  BATON_NEEDS_DEVICE();
  Small small(1e-4, 0.1);
  Samples odd = small.more;
  for (int32_t& label : odd.labels) label = (label + 1) % Small::classes;
  for (double& v : odd.x) v *= 20;
  Rows rows(odd);
  const Doubles before = small.layer.weights(), p = small.layer.precision();
  const MapResult result = small.layer.update_jointly(rows, 300);
  EXPECT_TRUE(result.converged) << result.gradient;
  EXPECT_GT(result.evaluations, result.iterations + 1);
  Doubles gradient(Small::order, 0), scale(Small::order, 0);
  double distance = 0;
  for (int i = 0; i < Small::order; i++)
    for (int j = 0; j < Small::order; j++) {
      gradient[i] += p[i * Small::order + j] * (result.weights[j] - before[j]);
      distance += (result.weights[i] - before[i]) * p[i * Small::order + j] * (result.weights[j] - before[j]) / 2;
    }
  for (int n = 0; n < odd.count(); n++) {
    const Doubles q = predicted(result.weights, odd.x.data() + n * Small::dim, Small::dim, Small::classes);
    for (int i = 0; i < Small::order; i++)
      gradient[i] += (q[i / Small::dim] - (odd.labels[n] == i / Small::dim)) * odd.x[n * Small::dim + i % Small::dim];
  }
  for (double g : gradient) EXPECT_NEAR(g, 0, 1e-8);
  EXPECT_NEAR(result.log_likelihood, log_likelihood(result.weights, odd), 1e-9);
  EXPECT_NEAR(result.objective, distance - result.log_likelihood, 1e-9);
  EXPECT_LT(inverse_error(small.layer, Small::order), 1e-9);
}

TEST(ExactLastLayer, CurvatureAddsOverBatches) {
  BATON_NEEDS_DEVICE();
  // 100 classes of 2 features: passes of 1660 rows.
  for (const auto& [n, dim, classes] : {std::array{30, 4, 3}, {2000, 2, 100}}) {
    const Samples s = class_samples(n, dim, classes, 5);
    const int order = dim * classes, half = n / 3;
    Doubles w;
    for (int i = 0; i < order; i++) w.push_back(std::sin(i));
    Rows all(s), first(s.slice(0, half)), second(s.slice(half, n - half));
    const auto curvature = [&](Rows<>& rows) {
      ExactLastLayer layer(rows.device(), dim, classes, 0.3);
      layer.fit_covariance(rows, w);
      Doubles p = layer.precision();
      const Doubles h = layer.curvature();
      for (int i = 0; i < order; i++) p[size_t(i) * order + i] -= 0.3;
      EXPECT_TRUE(within(p, h, 1e-13));
      return h;
    };
    const Doubles whole = curvature(all), one = curvature(first);
    Doubles sum = curvature(second);
    for (size_t i = 0; i < sum.size(); i++) sum[i] += one[i];
    EXPECT_TRUE(within(whole, sum, 1e-13));
    // A shift of all classes' weights changes no probability: H (1 (x) e_d) = 0.
    Doubles shift(order, 0);
    for (int i = 0; i < order; i++)
      for (int c = 0; c < classes; c++) shift[i] += whole[size_t(i) * order + c * dim];
    EXPECT_LT(*std::max_element(shift.begin(), shift.end()), 1e-12 * frobenius(whole));
  }
}

// 1 - p keeps no digits of what a confident sample knows; the sum of the other probabilities does.
TEST(ExactLastLayer, CurvatureOfAConfidentSample) {
  BATON_NEEDS_DEVICE();
  Rows one(Samples{{1}, {0}, 1});
  ExactLastLayer layer(one.device(), 1, 3, 1);
  layer.fit_covariance(one, {40, 0, 1});
  const double q1 = std::exp(-40), q2 = std::exp(-39);
  EXPECT_TRUE(within(layer.curvature(), {q1 + q2, -q1, -q2, -q1, q1, 0, -q2, 0, q2}, 1e-14));
  const KroneckerLastLayer kronecker(one.device(), one, 3, {40, 0, 1}, 1);
  EXPECT_TRUE(within(kronecker.factor_b(), layer.curvature(), 1e-14));
}

// What is computed in passes over many rows does not depend on them: 645 digits a pass, 209 rows of 100 classes.
TEST(ExactLastLayer, PredictionsOfManyRows) {
  BATON_NEEDS_DEVICE();
  for (const int classes : {10, 100}) {
    const int dim = classes == 10 ? 65 : 2, n = classes == 10 ? 1400 : 450, part = 90;
    const Samples s = class_samples(n, dim, classes, 9);
    Rows all(s);
    ExactLastLayer layer(all.device(), dim, classes, 2);
    Doubles w;
    for (int i = 0; i < dim * classes; i++) w.push_back(std::cos(i));
    Rows some(s.slice(0, 40));
    layer.fit_covariance(some, w);
    const Doubles v = logit_covariances(layer, all, classes);
    const Doubles p = layer.predict(all.x(), n, {.link = Link::probit}).probability;
    Doubles v_parts, p_parts;
    for (int first = 0; first < n; first += part) {
      Rows rows(s.slice(first, std::min(part, n - first)));
      const Doubles a = logit_covariances(layer, rows, classes);
      const Doubles b = layer.predict(rows.x(), rows.count(), {.link = Link::probit}).probability;
      v_parts.insert(v_parts.end(), a.begin(), a.end());
      p_parts.insert(p_parts.end(), b.begin(), b.end());
    }
    EXPECT_TRUE(within(v, v_parts, 1e-13));
    EXPECT_TRUE(within(p, p_parts, 1e-13));
  }
}

// After a first call of each kind, predictions and updates of no more samples take no memory.
TEST(ExactLastLayer, NothingGrowsAfterTheFirstCalls) {
  BATON_NEEDS_DEVICE();
  const int dim = 5, classes = 3;
  const Samples base = class_samples(30, dim, classes, 5), more = class_samples(6, dim, classes, 6);
  Rows rows(base), fresh(more);
  Device& device = rows.device();
  ExactLastLayer layer(device, dim, classes, 1);
  layer.fit_covariance(rows, Doubles(dim * classes, 0.1));
  const auto calls = [&] {
    for (Link link : {Link::map, Link::probit, Link::monte_carlo, Link::bridge})
      layer.predict(rows.x(), rows.count(), {.link = link, .draws = 50});
    for (ExactRule rule : {ExactRule::newton_old, ExactRule::newton_new, ExactRule::implicit})
      layer.update(fresh, rule);
    layer.update_jointly(fresh, 2);
  };
  calls();
  const size_t allocations = device.allocations(), peak = device.peak_bytes();
  for (int time = 0; time < 3; time++) calls();
  EXPECT_EQ(device.allocations(), allocations);
  EXPECT_EQ(device.peak_bytes(), peak);
}

// Probabilities that are 0 and 1 in double, and a sample without features.
TEST(ExactLastLayer, CertainAndEmptySamples) {
  BATON_NEEDS_DEVICE();
  for (const ExactRule rule : rules) {
    Small small;
    Doubles w = small.layer.weights();
    for (double& v : w) v *= 1e4;
    small.layer.fit_covariance(small.base_rows, w);
    small.layer.update(small.base_rows, rule);
    EXPECT_LT(inverse_error(small.layer, Small::order), 1e-9);

    Small other;
    const Doubles before = everything(other.layer);
    Samples nothing = other.more.slice(0, 1);
    nothing.x.assign(Small::dim, 0);
    Rows one(nothing);
    other.layer.update(one, rule);
    EXPECT_TRUE(exact(everything(other.layer), before));
    other.layer.update({other.more_rows.x(), other.more_rows.all().labels, 0, Small::dim}, rule);
    EXPECT_TRUE(same_bits(everything(other.layer), before));
  }
}

TEST(ExactLastLayer, AFailedCallChangesNothing) {
  BATON_NEEDS_DEVICE();
  Small small;
  const Doubles before = everything(small.layer);
  const auto broken = [&](auto change) {
    Samples s = small.more;
    change(s);
    return s;
  };
  constexpr int at = 7 * Small::dim + 1;  // in the eighth of twelve samples
  const Samples wrong[] = {
      broken([](Samples& s) { s.x[at] = NAN; }),
      broken([](Samples& s) { s.x[at] = -INFINITY; }),
      broken([](Samples& s) { s.labels[7] = -1; }),
      broken([](Samples& s) { s.labels[7] = Small::classes; }),
      class_samples(12, Small::dim + 1, Small::classes, 3),
  };
  const Samples too_large = broken([](Samples& s) { s.x[at] = 1e12; });
  const Samples overflow = broken([](Samples& s) { s.x[at] = 1e200; });
  for (const ExactRule rule : rules) {
    for (const Samples& s : wrong) {
      Rows rows(s);
      EXPECT_THROW(small.layer.update(rows, rule), InputError);
      EXPECT_TRUE(same_bits(everything(small.layer), before));
    }
    Rows large(too_large), over(overflow);
    EXPECT_THROW(small.layer.update(large, rule), InputError);
    EXPECT_TRUE(same_bits(everything(small.layer), before));
    EXPECT_THROW(small.layer.update(over, rule), RunError);
    EXPECT_TRUE(same_bits(everything(small.layer), before));
    EXPECT_THROW(small.layer.update({large.x(), nullptr, 12, Small::dim}, rule), InputError);
    EXPECT_THROW(small.layer.update({large.x(), large.all().labels, -1, Small::dim}, rule), InputError);
  }
  for (const Samples& s : wrong) {
    Rows rows(s);
    EXPECT_THROW(small.layer.update_jointly(rows, 5), InputError);
    EXPECT_THROW(small.layer.fit(rows), InputError);
    EXPECT_TRUE(same_bits(everything(small.layer), before));
  }
  Rows over(overflow);
  EXPECT_THROW(small.layer.update_jointly(over, 1), RunError);
  EXPECT_THROW(small.layer.update_jointly(over, 5), RunError);
  EXPECT_THROW(small.layer.update_jointly(small.more_rows, 0), InputError);
  EXPECT_THROW(small.layer.fit_covariance(over, Doubles(Small::order, 0)), RunError);
  EXPECT_THROW(small.layer.fit_covariance(small.more_rows, Doubles(5, 0)), InputError);
  EXPECT_THROW(small.layer.fit_covariance(small.more_rows, Doubles(Small::order, NAN)), InputError);
  EXPECT_TRUE(same_bits(everything(small.layer), before));
  // And it goes on as if nothing had been.
  Small other;
  small.layer.update(small.more_rows, ExactRule::implicit);
  other.layer.update(other.more_rows, ExactRule::implicit);
  EXPECT_TRUE(same_bits(everything(small.layer), everything(other.layer)));
}

TEST(ExactLastLayer, InputErrors) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  Device& device = memory.device();
  EXPECT_THROW(ExactLastLayer(device, 820, 10, 1), InputError);
  EXPECT_THROW(ExactLastLayer(device, 1 << 20, 1 << 20, 1), InputError);
  EXPECT_THROW(ExactLastLayer(device, 0, 10, 1), InputError);
  EXPECT_THROW(ExactLastLayer(device, 3, 1, 1), InputError);
  EXPECT_THROW(ExactLastLayer(device, 3, 2, 0), InputError);
  EXPECT_THROW(ExactLastLayer(device, 3, 2, NAN), InputError);
  Small small;
  double* x = small.more_rows.x();
  EXPECT_THROW(small.layer.predict(x, 3, {.link = Link::mean_field}), InputError);
  EXPECT_THROW(small.layer.predict(x, -1, {.link = Link::probit}), InputError);
  EXPECT_THROW(small.layer.predict(x, 3, {.link = Link::monte_carlo, .draws = 0}), InputError);
  EXPECT_TRUE(small.layer.predict(x, 0, {.link = Link::probit}).probability.empty());
  const Doubles w = small.layer.weights();
  const auto kronecker = [&](FeatureRows<double> rows, const Doubles& weights, double tau) {
    KroneckerLastLayer(device, rows, Small::classes, weights, tau);
  };
  EXPECT_THROW(kronecker(small.more_rows, Doubles(3, 0), 1), InputError);
  EXPECT_THROW(kronecker(small.more_rows, w, 0), InputError);
  EXPECT_THROW(kronecker({x, nullptr, 0, Small::dim}, w, 1), InputError);
  EXPECT_THROW(KroneckerLastLayer(device, small.more_rows, 3, w, 1).logit_covariances({1, 2, 3}, 1), InputError);
  const auto tune = [&](double low, double high, int grid) {
    tune_prior(device, small.more_rows, 3, EvidenceStructure::exact, SampleWeight::gaussian, low, high, grid);
  };
  EXPECT_THROW(tune(0, 1, 3), InputError);
  EXPECT_THROW(tune(2, 1, 3), InputError);
  EXPECT_THROW(tune(1, 2, 1), InputError);
}

// d evidence / d ln tau at fixed W and H, for the exact P and both forms of the Kronecker one.
TEST(ExactLastLayer, EvidenceByLogTau) {
  BATON_NEEDS_DEVICE();
  Small small;
  Device& device = small.base_rows.device();
  const Doubles w = small.layer.weights();
  constexpr double step = 1e-4;
  const auto at = [&](int form, double log_tau) {
    if (form > 0)
      return KroneckerLastLayer(device, small.base_rows, Small::classes, w, std::exp(log_tau), form == 2).evidence(-5);
    ExactLastLayer layer(device, Small::dim, Small::classes, std::exp(log_tau));
    layer.fit_covariance(small.base_rows, w);
    return layer.evidence(-5);
  };
  for (const int form : {0, 1, 2})
    for (const double log_tau : {-3.0, 0.0, 2.0})
      EXPECT_NEAR((at(form, log_tau + step).value - at(form, log_tau - step).value) / (2 * step),
                  at(form, log_tau).by_log_tau, 1e-6)
          << form << " " << log_tau;
}

}  // namespace
}  // namespace baton::test
