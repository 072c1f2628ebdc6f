// Kinds of posteriors as a network meets them: gradients of the whole objective, draws and their moments, the places
// where one kind is another, and hand-overs. The kernels have tests of their own.
#include "kernels/cholesky.h"
#include "tests/layers/posteriors/tiny_model.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

// ------------------------------------------------------------------------------------------------------- gradients
// In the first stage, and in the second with a prior that is a whole posterior.
void check_stages(const Kind& kind) {
  SCOPED_TRACE(kind.name + " " + kind.settings.dump());
  Model m(kind, 2);
  m.scatter(0.1f, 70);
  check_gradients(m);
  m.hand_over();
  m.scatter(0.1f, 700);
  check_gradients(m);
}

TEST(Families, GradientsOfFfg) {
  BATON_NEEDS_DEVICE();
  check_stages(Kind{"ffg"});
}
TEST(Families, GradientsOfCfg) {
  BATON_NEEDS_DEVICE();
  for (int groups : {1, 2}) check_stages(cfg(groups));
}
TEST(Families, GradientsOfCfgByItsMoments) {  // nothing drawn: exact marginal moments
  BATON_NEEDS_DEVICE();
  check_stages({"cfg", {{"moments", true}}});
}
TEST(Families, GradientsOfMnfGated) {
  BATON_NEEDS_DEVICE();
  check_stages(mnf("realnvp", false, 1));
  check_stages(mnf("realnvp", true, 2));
}
TEST(Families, GradientsOfMnfAffine) {
  BATON_NEEDS_DEVICE();
  check_stages(mnf("affine", true, 1));
  check_stages(mnf("affine", false, 2));
}
TEST(Families, GradientsOfMnfPlanar) {
  BATON_NEEDS_DEVICE();
  check_stages(mnf("planar", false, 1));
  check_stages(mnf("planar", true, 2));
}
// Where the base is fixed it has no gradient; the rest has the same one.
TEST(Families, GradientsOfMnfWithAFixedBase) {
  BATON_NEEDS_DEVICE();
  Kind fixed = mnf("realnvp", false, 2);
  fixed.settings["fixed_base"] = true;
  Model a(mnf("realnvp", false, 2)), b(fixed);
  for (Model* m : {&a, &b}) m->scatter(0.1f, 70), m->step();
  const auto list_a = a.posterior.state(), list_b = b.posterior.state();
  for (size_t k = 0; k < list_a.size(); k++) {
    if (!learned(list_a[k].array)) continue;
    for (const TensorSpec& t : list_a[k].store->layout().tensors()) {
      const bool base = list_a[k].array == "value" && t.name.find(".base_") != std::string::npos;
      const Doubles free = a.gradient(list_a[k], 0, t), held = b.gradient(list_b[k], 0, t);
      EXPECT_TRUE(exact(held, base ? Doubles(t.size, 0) : free)) << t.name;
      EXPECT_EQ(bool(exact(free, held)), !base) << t.name;
    }
  }
}

// Without the score term the gradient of the KL vanishes draw by draw where posterior and prior are the same; with it
// only its mean does. The means and log sigma do not see the difference.
TEST(Families, ThePathGradientVanishesAtThePrior) {
  BATON_NEEDS_DEVICE();
  for (const char* flow : {"realnvp", "affine", "planar"}) {
    Kind path = mnf(flow, false, 2);
    path.settings["path_gradient"] = true;
    Model off(mnf(flow, false, 2)), on(path);
    double largest[2] = {0, 0};
    for (Model* m : {&off, &on}) {
      m->scatter(0.1f, 70);
      m->step();
    }
    const auto list = off.posterior.state(), list_on = on.posterior.state();
    for (size_t k = 0; k < list.size(); k++)
      for (const TensorSpec& t : list[k].store->layout().tensors()) {
        if (list[k].array != "mean" && list[k].array != "log_std") continue;
        EXPECT_TRUE(exact(on.gradient(list_on[k], 0, t), off.gradient(list[k], 0, t))) << t.name;
      }
    for (Model* m : {&off, &on}) {
      m->hand_over();
      m->forward();
      fill_zero(m->device(), m->network.logits_gradient(), sizeof(float) * Model::batch * 4);
      m->network.backward({m->states});
      m->posterior.step(m->states);
      for (const StateArray& a : m->posterior.state())
        if (a.array == "value")
          for (const TensorSpec& t : a.store->layout().tensors())
            for (double g : m->gradient(a, 0, t)) largest[m == &on] = std::max(largest[m == &on], std::abs(g));
    }
    EXPECT_GT(largest[0], 1e-3) << flow;
    EXPECT_LT(largest[1], 2e-4 * largest[0]) << flow;
  }
}

// ------------------------------------------------------------------------------------------------------- the KL
// Rounding is what is left right after a hand-over: nothing under FFG; what products of L_0^-1 with L leave under CFG;
// what the flow and its inverse leave in ln q under MNF.
TEST(Families, TheKlIsZeroAfterAHandOver) {
  BATON_NEEDS_DEVICE();
  const std::vector<std::pair<Kind, double>> cases{{{"ffg"}, 0},
                                                   {cfg(), 2e-6},
                                                   {mnf("realnvp", false), 1e-7},
                                                   {mnf("affine", true), 1e-7},
                                                   {mnf("planar", false), 1e-7}};
  for (const auto& [kind, least] : cases) {
    SCOPED_TRACE(kind.name);
    Model m(kind, 2);
    m.scatter(0.1f, 70);
    for (double kl : m.posterior.kl()) EXPECT_GT(kl, 10);
    m.hand_over();
    for (double kl : m.posterior.kl()) EXPECT_LE(std::abs(kl), least);
    m.step();
    for (const auto& row : m.posterior.take_accumulated_kl())
      for (double kl : row) EXPECT_LE(std::abs(kl), least);
    m.scatter(0.1f, 90);
    for (double kl : m.posterior.kl()) EXPECT_GT(kl, 1);
  }
}

double kl_of(double mean, double log_std, double prior_mean, double prior_log_std) {
  const double t = log_std - prior_log_std, e = (mean - prior_mean) / std::exp(prior_log_std);
  return 0.5 * (std::expm1(2 * t) + e * e) - t;
}

// A pretrained tensor: the prior N(w, s^2), the mean at w and sigma no wider than s. Then the mean moves.
TEST(Families, AdoptedTensorsHaveTheirPrior) {
  BATON_NEEDS_DEVICE();
  for (const Kind& kind : {Kind{"ffg"}, cfg(), without_flow(false, -20)}) {  // z is 1
    SCOPED_TRACE(kind.name);
    const float log_std = -2;
    Model m(kind, 2, log_std);
    const auto& tensors = m.network.layout().tensors();
    for (int k : {0, 1, 4}) {  // conv1.weight and its bias with one value, fc1.weight with one for each weight
      const TensorSpec& t = tensors[k];
      const std::vector<float> w = random_normal(t.size, 0, 0.3f, unsigned(k + 1));
      const std::vector<float> prior = k == 4 ? random_normal(t.size, -2, 0.5f, 40) : std::vector<float>{-1.5f};
      m.posterior.adopt(1, t, w, prior);
      m.posterior.settle();
      double want = 0, moved = 0;
      std::vector<float> mean = w;
      for (size_t i = 0; i < t.size; i++) {
        const double sp = prior[prior.size() == 1 ? 0 : i];
        mean[i] += 0.05f;
        want += kl_of(w[i], std::min(double(log_std), sp), w[i], sp);
        moved += kl_of(mean[i], std::min(double(log_std), sp), w[i], sp);
      }
      EXPECT_TRUE(exact(m.read("mean", k, 1), w));
      EXPECT_NEAR(m.posterior.kl_by_name()[1][k], want, 2e-6 * want) << t.name;
      m.write("mean", k, mean, 1);
      EXPECT_NEAR(m.posterior.kl_by_name()[1][k], moved, 5e-6 * moved) << t.name;
      // The other replica, and the other tensors, keep the prior that they had.
      double other = 0;
      for (float x : m.read("mean", k, 0)) other += kl_of(x, log_std, 0, 0);
      EXPECT_NEAR(m.posterior.kl_by_name()[0][k], other, 5e-6 * other) << t.name;
    }
    double rest = 0;
    for (float x : m.read("mean", 2, 1)) rest += kl_of(x, log_std, 0, 0);
    EXPECT_NEAR(m.posterior.kl_by_name()[1][2], rest, 5e-6 * rest);
    const std::vector<float> w(tensors[0].size), one{-1.f};
    EXPECT_THROW(m.posterior.adopt(0, tensors[0], std::vector<float>(3), one), InputError);
    EXPECT_THROW(m.posterior.adopt(0, tensors[0], w, std::vector<float>(2)), InputError);
    EXPECT_THROW(m.posterior.adopt(0, tensors[0], w, {}), InputError);
  }
  Model point(Kind{"ft"});
  const std::vector<float> w = random_normal(point.network.layout()[0].size, 0, 1, 3);
  point.posterior.adopt(0, point.network.layout()[0], w, {});
  point.posterior.settle();
  EXPECT_TRUE(exact(point.read("mean", 0), w));
}

// --------------------------------------------------------------------------------------- where one family is another
// A diagonal L: the KL is FFG's, and so are the marginals.
TEST(Families, CfgWithDiagonalFactorsIsFfg) {
  BATON_NEEDS_DEVICE();
  Model c(cfg(), 2), f(Kind{"ffg"}, 2);
  for (int k = 0; k < 8; k++)
    for (int r = 0; r < 2; r++) {
      const size_t n = f.network.layout()[k].size;
      for (const auto& [array, at] :
           {std::pair("mean", 0.f), {"log_std", -2.f}, {"prior_mean", 0.f}, {"prior_log_std", -1.f}}) {
        const std::vector<float> values = random_normal(n, at, 0.4f, unsigned(k * 10 + r + int(at)));
        c.write(array, k, values, r), f.write(array, k, values, r);
      }
    }
  c.posterior.settle(), f.posterior.settle();
  const auto of_c = c.posterior.kl_by_name(), of_f = f.posterior.kl_by_name();
  EXPECT_EQ(c.posterior.kl_names(), f.posterior.kl_names());
  for (int r = 0; r < 2; r++) EXPECT_TRUE(close(of_c[r], of_f[r], {.l2 = 1e-6}));
  const auto sd_c = c.posterior.mean_log_std(), sd_f = f.posterior.mean_log_std();
  for (int r = 0; r < 2; r++) EXPECT_NEAR(sd_c[r], sd_f[r], 1e-6);
}

// The plain lower triangle of a block from what is stored.
std::vector<Doubles> triangle(const std::vector<float>& stored, int block, int d) {
  std::vector<Doubles> l(d, Doubles(d, 0));
  const float* at = &stored[size_t(block) * packed(d)];
  for (int i = 0; i < d; i++) {
    l[i][i] = std::exp(double(at[i * (i + 1) / 2 + i]));
    for (int j = 0; j < i; j++) l[i][j] = at[i * (i + 1) / 2 + j] * l[i][i];
  }
  return l;
}
// w = mu + L e for weights and mu + sigma e for biases, with the noise of every group, and sigma e where L is diagonal.
TEST(Families, CfgDrawsAreWhatTheyShouldBe) {
  BATON_NEEDS_DEVICE();
  for (bool diagonal : {true, false}) {
    const int groups = 2, d = 9;
    Model m(cfg(groups), 2);
    if (!diagonal) m.scatter(0.2f, 70);
    m.posterior.draw(0, m.states);
    const ParameterLayout& layout = m.network.layout();
    const auto draws = m.draws(groups);
    const StateArray& factor = state_array(m.posterior, "scale_tril");
    for (int k : {0, 1, 2, 3}) {
      const TensorSpec& t = layout[k];
      for (int q = 0; q < 2 * groups; q++) {
        const int r = q / groups, g = q % groups;
        const StepState s = m.states.host()[r];
        const auto mean = m.read("mean", k, r), log_std = m.read("log_std", k, r);
        Doubles want(t.size);
        if (t.bias) {
          for (size_t i = 0; i < t.size; i++)
            want[i] = mean[i] + std::exp(double(log_std[i])) *
                                    normal4(s.noise, uint32_t(g * t.size + i), stream_draws + k, s.step).x;
        } else {
          const auto stored = factor.store->read(m.device(), "scale_tril", r, factor.store->layout()[k / 2]);
          const int blocks = int(t.size) / d;
          for (int b = 0; b < blocks; b++) {
            const auto l = triangle(stored, b, d);
            for (int i = 0; i < d; i++) {
              double sum = mean[b * d + i];
              for (int j = 0; j <= i; j++)
                sum +=
                    l[i][j] *
                    lane_of(normal4(s.noise, uint32_t((g * blocks + b) * 3 + j / 4), stream_draws + k, s.step), j % 4);
              want[b * d + i] = sum;
              if (diagonal) {
                EXPECT_NEAR(l[i][i], std::exp(double(log_std[b * d + i])), 1e-7);
              }
            }
          }
        }
        const auto first = draws.begin() + long(layout.stride() * q + t.offset);
        EXPECT_TRUE(close(std::vector<float>(first, first + long(t.size)), want, {.l2 = 1e-6}))
            << t.name << " of row " << q;
      }
    }
  }
}

// Without a flow and with a base of no width, z is 1.
TEST(Families, MnfWithoutMultipliersIsFfg) {
  BATON_NEEDS_DEVICE();
  for (bool per_filter : {false, true}) {
    Model z(without_flow(per_filter, -20), 2), f(Kind{"ffg"}, 2);
    z.step(), f.step();
    EXPECT_TRUE(exact(z.logits(), f.logits()));
    for (int layer = 0; layer < 4; layer++) EXPECT_TRUE(exact(z.activation(layer), f.activation(layer)));
    for (const char* array : {"mean", "log_std"})
      for (const TensorSpec& t : f.network.layout().tensors())
        for (int r = 0; r < 2; r++)
          EXPECT_TRUE(close(z.gradient({&z.posterior.store(), array}, r, t),
                            f.gradient({&f.posterior.store(), array}, r, t), {.l2 = 1e-6}))
              << array << " of " << t.name;
    const auto of_z = z.posterior.take_accumulated_kl(), of_f = f.posterior.take_accumulated_kl();
    for (int r = 0; r < 2; r++)
      EXPECT_TRUE(close(Doubles(of_z[r].begin(), of_z[r].begin() + 8), of_f[r], {.l2 = 1e-6}));
  }
}

// What a plain network makes of the rows of draws, a row for each group of examples.
std::vector<std::vector<float>> plain_activations(Model& m, int groups, bool draws_of_biases) {
  const ParameterLayout& layout = m.network.layout();
  const int rows = m.replicas() * groups;
  std::vector<float> w = m.draws(groups);
  for (const TensorSpec& t : layout.tensors())
    for (int q = 0; q < rows; q++)
      if (t.bias && !(draws_of_biases && t.name[0] == 'c')) {
        const auto mean = m.posterior.store().read(m.device(), "mean", q / groups, t);
        std::copy(mean.begin(), mean.end(), w.begin() + long(layout.stride() * q + t.offset));
      }
  Buffer drawn(m.memory, w);
  PointWeights weights(drawn, layout.stride());
  TinyNetwork plain;
  plain.prepare({m.device(), m.memory.arena(), weights, rows, Model::batch / groups, /*training*/ false});
  const Activation& x = m.network.input();
  upload(m.device(), plain.input().signal.value, download(m.device(), x.signal.value, x.stride * m.replicas()));
  plain.forward({});
  std::vector<std::vector<float>> all;
  for (const NamedActivation& a : plain.activations())
    all.push_back(download(m.device(), a.activation.signal.value, a.activation.stride * rows));
  return all;
}

// Every group of examples has the weights of its own draw.
TEST(Families, GroupsUseTheirOwnDraws) {
  BATON_NEEDS_DEVICE();
  for (int groups : {1, 2, 4}) {
    SCOPED_TRACE(groups);
    Model c(cfg(groups), 2), z(mnf("realnvp", false, groups), 2);
    for (Model* m : {&c, &z}) {
      m->scatter(0.1f, 70);
      if (m == &z) m->set_log_std(-60);  // the variance is 0
      m->forward();
      const size_t stride = m->network.layout().stride();
      const auto draws = m->draws(groups);
      for (int q = 1; q < 2 * groups; q++)
        EXPECT_FALSE(
            exact(std::vector<float>(draws.begin(), draws.begin() + 54),
                  std::vector<float>(draws.begin() + long(stride * q), draws.begin() + long(stride * q) + 54)));
      const auto want = plain_activations(*m, groups, m == &c);
      for (int layer = 0; layer < (m == &c ? 2 : 4); layer++)
        EXPECT_TRUE(close(m->activation(layer), want[layer], {.l2 = 1e-6})) << layer;
    }
  }
}

TEST(Families, AVanishingSigmaIsTheDeterministicNetwork) {
  BATON_NEEDS_DEVICE();
  Model point(Kind{"ft"}, 2);
  point.forward();
  for (const Kind& kind : {Kind{"ffg"}, cfg(), without_flow(false, -30)}) {
    SCOPED_TRACE(kind.name);
    Model m(kind, 2, -40);
    m.step();
    EXPECT_TRUE(close(m.logits(), point.logits(), {.l2 = 1e-6}));
    for (const StateArray& a : m.posterior.state())
      for (const TensorSpec& t : a.store->layout().tensors()) {
        if (!learned(a.array)) continue;
        for (double g : m.gradient(a, 1, t)) ASSERT_TRUE(std::isfinite(g)) << a.array << " of " << t.name;
      }
    const size_t stride = m.network.layout().stride();
    Buffer<float> w(m.memory, stride * 2), mean(m.memory, stride);
    m.posterior.sample(w, 1, 0, 2, key_of(4));
    m.posterior.mean_weights(mean, 1);
    for (int k = 0; k < 8; k++) {
      const TensorSpec& t = m.network.layout()[k];
      for (size_t from : {t.offset, stride + t.offset}) {
        const auto all = w.host();
        const std::vector<float> got(all.begin() + long(from), all.begin() + long(from + t.size));
        EXPECT_TRUE(t.bias || close(got, m.read("mean", k, 1), {.l2 = 1e-7})) << t.name;
      }
      const auto all = mean.host();
      const std::vector<float> got(all.begin() + long(t.offset), all.begin() + long(t.offset + t.size));
      EXPECT_TRUE(exact(got, m.read("mean", k, 1))) << t.name;
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ draws
TEST(Families, DrawsDoNotDependOnHowManyAtOnce) {
  BATON_NEEDS_DEVICE();
  for (const Kind& kind : {Kind{"ft"}, Kind{"ffg"}, cfg(2), mnf("realnvp", false, 2), mnf("planar", true)}) {
    SCOPED_TRACE(kind.name);
    Model m(kind, 2);
    m.scatter(0.1f, 70);
    const size_t stride = m.network.layout().stride();
    const auto draws = [&](int replica, int first, int count) {
      Buffer<float> w(m.memory, stride * count, 0.f);
      m.posterior.sample(w, replica, first, count, key_of(4));
      return w.host();
    };
    const auto all = draws(1, 0, 40);
    for (const auto& [first, count] : {std::pair(3, 1), {5, 20}, {16, 16}, {39, 1}}) {
      const auto some = draws(1, first, count);
      EXPECT_TRUE(exact(
          some, std::vector<float>(all.begin() + long(stride * first), all.begin() + long(stride * (first + count)))))
          << first;
    }
    if (kind.name == "ft") continue;
    EXPECT_FALSE(exact(draws(0, 0, 1), draws(1, 0, 1)));
    EXPECT_FALSE(exact(draws(1, 0, 1), draws(1, 1, 1)));
  }
}

struct Sampled {
  std::vector<float> w;
  size_t stride;
  int count;
  double at(int s, size_t i) const { return w[stride * s + i]; }
  double mean(size_t i) const {
    double sum = 0;
    for (int s = 0; s < count; s++) sum += at(s, i);
    return sum / count;
  }
  double covariance(size_t i, size_t j) const {
    double sum = 0;
    const double mi = mean(i), mj = mean(j);
    for (int s = 0; s < count; s++) sum += (at(s, i) - mi) * (at(s, j) - mj);
    return sum / count;
  }
};
Sampled draws_of(Model& m, int count) {
  const size_t stride = m.network.layout().stride();
  Buffer<float> w(m.memory, stride * count);
  m.posterior.sample(w, 1, 0, count, key_of(4));
  return {w.host(), stride, count};
}
// A sample covariance against its own standard error: sqrt((S_ii S_jj + S_ij^2) / n).
void expect_covariance(const Sampled& s, size_t i, size_t j, double ii, double jj, double ij) {
  EXPECT_NEAR(s.covariance(i, j), ij, 5 * std::sqrt((ii * jj + ij * ij) / s.count)) << i << ", " << j;
}

TEST(Families, CfgMoments) {
  BATON_NEEDS_DEVICE();
  Model m(cfg(), 2);
  m.scatter(0.3f, 70);
  const Sampled s = draws_of(m, 4000);
  const StateArray& factor = state_array(m.posterior, "scale_tril");
  const int d = 9;
  for (int k : {0, 2}) {  // the second block of each convolution, and its ties to the first
    const TensorSpec& t = m.network.layout()[k];
    const auto mean = m.read("mean", k, 1),
               stored = factor.store->read(m.device(), "scale_tril", 1, factor.store->layout()[k / 2]);
    const auto l = triangle(stored, 1, d), first = triangle(stored, 0, d);
    const auto product = [&](const std::vector<Doubles>& f, int i, int j) {
      double sum = 0;
      for (int n = 0; n < d; n++) sum += f[i][n] * f[j][n];
      return sum;
    };
    for (int i = 0; i < d; i++) {
      const size_t at = t.offset + d + i;
      EXPECT_NEAR(s.mean(at), mean[d + i], 5 * std::sqrt(product(l, i, i) / s.count));
      for (int j = 0; j <= i; j++)
        expect_covariance(s, at, t.offset + d + j, product(l, i, i), product(l, j, j), product(l, i, j));
      expect_covariance(s, at, t.offset + i, product(l, i, i), product(first, i, i), 0);
    }
  }
  for (int k : {1, 4, 7}) {  // what has no blocks
    const auto mean = m.read("mean", k, 1), variance = m.read("variance", k, 1);
    for (size_t i = 0; i < 3; i++) {
      const size_t at = m.network.layout()[k].offset + i;
      EXPECT_NEAR(s.mean(at), mean[i], 5 * std::sqrt(variance[i] / s.count));
      expect_covariance(s, at, at, variance[i], variance[i], variance[i]);
    }
  }
}

// w = z mu + sigma e: weights of one z move together. Without a flow z ~ N(m0, s0^2).
TEST(Families, MnfMoments) {
  BATON_NEEDS_DEVICE();
  for (bool per_filter : {false, true}) {
    SCOPED_TRACE(per_filter ? "per filter" : "per filter and channel");
    Model m(without_flow(per_filter, -1), 2);
    m.scatter(0.2f, 70);
    const Sampled s = draws_of(m, 4000);
    const StateArray& flow = state_array(m.posterior, "value");
    const auto flow_values = [&](const std::string& name) {
      for (const TensorSpec& t : flow.store->layout().tensors())
        if (t.name == name) return flow.store->read(m.device(), "value", 1, t);
      throw InputError("no " + name);
    };
    for (int k : {0, 4}) {
      const TensorSpec& t = m.network.layout()[k];
      const std::string layer = t.name.substr(0, t.name.find('.'));
      const auto base = flow_values(layer + ".z.base_mean"), log_std = flow_values(layer + ".z.base_log_std");
      const int width = k == 4 ? 18 : per_filter ? 18 : 9;
      EXPECT_EQ(base.size(), k == 4 ? 18 : t.size / width);
      const auto z_of = [&](size_t i) { return k == 4 ? i % width : i / width; };
      const auto mean = m.read("mean", k, 1), variance = m.read("variance", k, 1);
      const auto of = [&](size_t i, size_t j) {
        const double shared = z_of(i) == z_of(j) ? std::exp(2. * log_std[z_of(i)]) * mean[i] * mean[j] : 0;
        return shared + (i == j ? double(variance[i]) : 0);
      };
      for (size_t i = 0; i < t.size; i += 5) {
        EXPECT_NEAR(s.mean(t.offset + i), double(base[z_of(i)]) * mean[i], 5 * std::sqrt(of(i, i) / s.count)) << i;
        for (size_t j : {i, (i + 1) % t.size, (i + 18) % t.size})
          expect_covariance(s, t.offset + i, t.offset + j, of(i, i), of(j, j), of(i, j));
      }
    }
    const auto bias = m.read("mean", 1, 1), variance = m.read("variance", 1, 1);  // a bias has no z
    for (size_t i = 0; i < 3; i++)
      EXPECT_NEAR(s.mean(m.network.layout()[1].offset + i), bias[i], 5 * std::sqrt(variance[i] / s.count));

    Buffer<float> w(m.memory, s.stride);
    m.posterior.mean_weights(w, 1);
    const auto at_mean = w.host();
    for (int k = 0; k < 8; k++) {
      const TensorSpec& t = m.network.layout()[k];
      std::vector<float> want = m.read("mean", k, 1);
      if (!t.bias) {
        const auto base = flow_values(t.name.substr(0, t.name.find('.')) + ".z.base_mean");
        for (size_t i = 0; i < want.size(); i++)
          want[i] *= base[t.shape.size() == 2 ? i % base.size() : i / (want.size() / base.size())];
      }
      EXPECT_TRUE(
          exact(std::vector<float>(at_mean.begin() + long(t.offset), at_mean.begin() + long(t.offset + t.size)), want))
          << t.name;
    }
  }
}

// Through a flow: the draws of a narrow base are all near the image of its mean.
TEST(Families, MnfMeanWeightsAreTheImageOfTheBasesMean) {
  BATON_NEEDS_DEVICE();
  for (const char* flow : {"realnvp", "affine", "planar"}) {
    Kind kind = mnf(flow, false);
    kind.settings["z_log_std"] = -18;
    Model m(kind, 2, -60);
    const StateArray& values = state_array(m.posterior, "value");
    unsigned seed = 5;
    for (const TensorSpec& t : values.store->layout().tensors()) {
      if (ends_with(t.name, ".mask") || ends_with(t.name, ".base_log_std")) continue;
      std::vector<float> v = values.store->read(m.device(), "value", 1, t);
      const std::vector<float> by = random_normal(t.size, 0, 0.3f, seed++);
      for (size_t i = 0; i < v.size(); i++) v[i] += by[i];
      values.store->write(m.device(), "value", 1, t, v);
    }
    const Sampled s = draws_of(m, 2);
    Buffer<float> w(m.memory, s.stride);
    m.posterior.mean_weights(w, 1);
    const std::vector<float> first(s.w.begin(), s.w.begin() + long(s.stride));
    EXPECT_TRUE(close(first, w.host(), {.l2 = 2e-6})) << flow;
    EXPECT_FALSE(close(m.read("mean", 0, 1), std::vector<float>(first.begin(), first.begin() + 54), {.l2 = 1e-2}));
  }
}

TEST(Families, NamesAndArrays) {
  BATON_NEEDS_DEVICE();
  Model c(cfg(2)), z(mnf("realnvp", true, 2)), f(Kind{"ffg"});
  EXPECT_STREQ(c.posterior.kind().name, "cfg");
  EXPECT_STREQ(z.posterior.kind().name, "mnf");
  EXPECT_EQ(c.posterior.kl_names().size(), 8u);
  EXPECT_EQ(z.posterior.kl_names().size(), 12u);
  EXPECT_EQ(z.posterior.kl_names()[8], "conv1.z");
  EXPECT_EQ(z.posterior.kl_names()[11], "fc2.z");
  EXPECT_EQ(c.posterior.state().size(), f.posterior.state().size() + 4);
  EXPECT_EQ(z.posterior.state().size(), f.posterior.state().size() + 4);
  // What is drawn, in how many groups, and what goes through local reparameterization.
  const auto weights = [](Model& m, Linear& layer) {
    return product_weights(m.posterior, layer, m.posterior.training_context(Model::batch));
  };
  EXPECT_EQ(weights(f, f.network.conv1).weights, f.posterior.store().at("mean"));
  EXPECT_EQ(weights(f, f.network.conv1).groups, 1);
  EXPECT_NE(weights(c, c.network.conv1).weights, c.posterior.store().at("mean"));
  EXPECT_EQ(weights(c, c.network.conv1).groups, 2);
  EXPECT_EQ(weights(c, c.network.fc1).weights, c.posterior.store().at("mean"));
  EXPECT_EQ(weights(c, c.network.fc1).groups, 1);
  EXPECT_NE(weights(z, z.network.fc1).weights, z.posterior.store().at("mean"));
  EXPECT_EQ(weights(z, z.network.fc1).groups, 2);
  for (Model* m : {&c, &z, &f}) {
    EXPECT_EQ(m->network.conv2.reads_squares(), m != &c);
    EXPECT_TRUE(m->network.fc2.reads_squares());
  }
  TinyNetwork network;
  EXPECT_THROW(network.prepare(c.posterior.training_context(5)), InputError);  // 5 examples in 2 groups
  Memory memory;
  ParameterLayout dense;
  dense.add("fc.weight", {3, 4}, 4, false);
  EXPECT_THROW(make_posterior(memory.device(), memory.arena(), dense, "cfg"), InputError);
  ParameterLayout wide;
  wide.add("conv.weight", {1, 1, 9, 9}, 81, false);
  EXPECT_THROW(make_posterior(memory.device(), memory.arena(), wide, "cfg"), InputError);
}

// ---------------------------------------------------------------------------------------------------------- goldens
Doubles logarithms(Doubles x) {
  for (double& v : x) v = std::log(v);
  return x;
}

// A dense layer under MNF by an independent implementation: its loss is Ntot times ours. Its noise is not ours, so the
// base's mean is moved until z0, and with it all but the density of z0 and the gradient of s0, is the golden's.
void check_mnf_golden(const std::string& name, const std::string& flow, int steps) {
  SCOPED_TRACE(name);
  const Npz z(golden_file(std::string("layers/") + name));
  const auto meta = nlohmann::json::parse(z.text("meta_json"));
  const double total = meta["Ntot"], beta = meta["beta"];
  const int batch = 5, in = 7, out = 4;
  ParameterLayout layout;
  Dense fc(layout, "fc", in, out, false, 0);
  Memory memory;
  Device& device = memory.device();
  const json settings{{"flow", flow}, {"flow_steps", steps}, {"flow_hidden", 6}, {"init_log_std", -3}};
  const auto owner = make_posterior(device, memory.arena(), layout, "mnf", {settings});
  Posterior& posterior = *owner;
  const StepState state = still(5, 9, float(beta / total));
  Buffer states(memory, std::vector<StepState>{state});
  posterior.initialise(states);
  ParameterStore& store = posterior.store();
  const auto write = [&](const char* array, int tensor, const Doubles& values) {
    store.write(device, array, 0, layout[tensor], floats(values));
  };
  for (const auto& [tensor, prefix] : {std::pair(0, ""), {1, "b_"}})
    for (const auto& [age, prior] : {std::pair("in_new_", ""), {"in_old_", "prior_"}}) {
      write((prior + std::string("mean")).c_str(), tensor, z.f64(age + std::string(prefix) + "mu"));
      write((prior + std::string("log_std")).c_str(), tensor, logarithms(z.f64(age + std::string(prefix) + "sigma")));
    }
  const Doubles eps = z.f64("eps_z"), m0 = z.f64("in_new_m0"), s0 = z.f64("in_new_s0");
  Doubles e, moved = m0;
  for (int i = 0; i < in; i++) {
    e.push_back(lane_of(normal4(state.noise, uint32_t(i / 4), stream_z, state.step), i % 4));
    moved[i] += s0[i] * (eps[i] - e[i]);
  }
  const StateArray& value = state_array(posterior, "value");
  const auto flow_spec = [&](const std::string& tensor) -> const TensorSpec& {
    for (const TensorSpec& t : value.store->layout().tensors())
      if (t.name == "fc.z." + tensor) return t;
    throw InputError("no " + tensor);
  };
  std::vector<std::pair<std::string, std::string>> names;  // ours and the golden's
  for (int k = 0; k < steps; k++) {
    const std::string ours = "flow" + std::to_string(k) + ".", theirs = "f" + std::to_string(k) + "_";
    if (flow == "planar")
      for (const char* one : {"w", "b", "u"}) names.emplace_back(ours + one, theirs + one);
    else
      for (const auto& [one, other] : {std::pair("mask", "m"),
                                       {"hidden.weight", "W0"},
                                       {"hidden.bias", "b0"},
                                       {"shift.weight", "W1"},
                                       {"shift.bias", "b1"},
                                       {"gate.weight", "W2"},
                                       {"gate.bias", "b2"}})
        names.emplace_back(ours + one, theirs + other);
  }
  const bool plain = steps > 0 && !z.has("in_old_f0_m") && !z.has("in_old_f0_w");
  for (const auto& [ours, theirs] : names) {
    value.store->write(device, "value", 0, flow_spec(ours), z.f32("in_new_" + theirs));
    if (!plain) value.store->write(device, "prior", 0, flow_spec(ours), z.f32("in_old_" + theirs));
  }
  value.store->write(device, "value", 0, flow_spec("base_mean"), floats(moved));
  value.store->write(device, "value", 0, flow_spec("base_log_std"), floats(logarithms(s0)));
  value.store->write(device, "prior", 0, flow_spec("base_mean"), z.f32("in_old_m0"));
  value.store->write(device, "prior", 0, flow_spec("base_log_std"), floats(logarithms(z.f64("in_old_s0"))));
  posterior.reset_optimizer();
  posterior.refresh(plain);

  posterior.draw(0, states);
  const Doubles mu = z.f64("in_new_mu"), sigma = z.f64("in_new_sigma"), sampled_z = z.f64("out_z");
  Doubles w = mu;
  for (int i = 0; i < out * in; i++) w[i] *= sampled_z[i % in];
  const RowWeights drawn = product_weights(posterior, fc, posterior.training_context(batch));
  EXPECT_TRUE(close(download(device, drawn.weights + fc.weight_at(), size_t(out) * in), w, {.l2 = 1e-6}));

  ReferenceLayer layer = ReferenceLayer::dense(batch, in, out);
  layer.mean = w, layer.variance = squares(sigma);
  layer.bias_mean = z.f64("in_new_b_mu"), layer.bias_variance = squares(z.f64("in_new_b_sigma"));
  layer.forward(z.f64("in_x"), z.f64("eps_y"));
  EXPECT_TRUE(close(layer.y, z.f64("out_logits"), {.l2 = 1e-10}));
  Doubles up(layer.y.size());
  for (int b = 0; b < batch; b++) {
    double sum = 0;
    for (int c = 0; c < out; c++) sum += std::exp(layer.y[b * out + c]);
    for (int c = 0; c < out; c++)
      up[b * out + c] = (std::exp(layer.y[b * out + c]) / sum - (c == z.i64("in_y")[b])) / batch;
  }
  layer.backward(up);
  upload(device, drawn.gradients + fc.weight_at(), floats(layer.g_mean));
  write("variance.grad", 0, layer.g_variance);
  write("mean.grad", 1, layer.g_bias_mean), write("variance.grad", 1, layer.g_bias_variance);
  posterior.step(states);

  const auto expect_gradient = [&](const ParameterStore& of, const char* array, const TensorSpec& t, Doubles want) {
    Doubles got = doubles(of.read(device, array + std::string(".adam_m"), 0, t));
    for (double& g : got) g *= total / (1 - double(adam_beta1));
    EXPECT_TRUE(close(got, want, {.l2 = 1e-5})) << array << " of " << t.name;
  };
  const auto scaled = [](Doubles a, const Doubles& by) {
    for (size_t i = 0; i < a.size(); i++) a[i] *= by[i];
    return a;
  };
  expect_gradient(store, "mean", layout[0], z.f64("g_mu"));
  expect_gradient(store, "mean", layout[1], z.f64("g_b_mu"));
  expect_gradient(store, "log_std", layout[0], scaled(z.f64("g_sigma"), sigma));
  expect_gradient(store, "log_std", layout[1], scaled(z.f64("g_b_sigma"), z.f64("in_new_b_sigma")));
  for (const auto& [ours, theirs] : names)
    if (theirs.back() != 'm') expect_gradient(*value.store, "value", flow_spec(ours), z.f64("g_" + theirs));
  const Doubles g_m0 = z.f64("g_m0");
  Doubles g_s0 = z.f64("g_s0");
  for (int i = 0; i < in; i++) g_s0[i] = s0[i] * (g_s0[i] + g_m0[i] * (e[i] - eps[i]));
  expect_gradient(*value.store, "value", flow_spec("base_mean"), g_m0);
  expect_gradient(*value.store, "value", flow_spec("base_log_std"), g_s0);

  double shift = 0;  // of ln q: the density of the noise
  for (int i = 0; i < in; i++) shift += 0.5 * (eps[i] * eps[i] - e[i] * e[i]);
  const auto accumulated = posterior.take_accumulated_kl();
  const double kl_w = z.scalar("out_cross_entropy") - z.scalar("out_entropy");
  EXPECT_NEAR(kl_w, z.scalar("out_klw"), 1e-9 * std::abs(kl_w) + 1e-9);
  EXPECT_NEAR(accumulated[0][0], kl_w, 1e-5 * std::abs(kl_w) + 1e-6);
  EXPECT_NEAR(accumulated[0][1], z.scalar("out_klb"), 1e-5 * z.scalar("out_klb") + 1e-6);
  EXPECT_NEAR(accumulated[0][2], z.scalar("out_logq") - z.scalar("out_logqt") + shift, 2e-4);
}

TEST(Families, MnfGoldens) {
  BATON_NEEDS_DEVICE();
  for (const char* name :
       {"mnf_dense_mnvp_sharedz", "mnf_dense_mnvp_init", "mnf_dense_mnvp_stage1", "mnf_dense_mnvp_far"})
    check_mnf_golden(name, "realnvp", 2);
  check_mnf_golden("mnf_dense_planar_numinv", "planar", 2);
  check_mnf_golden("mnf_dense_identity_closed", "realnvp", 0);
}

// A convolution under CFG by an independent implementation. The means are moved until the draws are the golden's, and a
// constant in the bias lifts every output above the ReLU.
TEST(Families, CfgGolden) {
  BATON_NEEDS_DEVICE();
  const Npz z(golden_file("layers/cfg_conv_5x5_p0"));
  const int batch = 2, in = 2, side = 8, out = 3, k = 5, d = k * k, blocks = out * in;
  ParameterLayout layout;
  Conv2d conv(layout, "conv", in, side, side, out, k, 0, Pooling::none, 0);
  Memory memory;
  Device& device = memory.device();
  const auto owner = make_posterior(device, memory.arena(), layout, "cfg", {{{"init_log_std", -3}}});
  Posterior& posterior = *owner;
  const StepState state = still(5, 9, 0);
  Buffer states(memory, std::vector<StepState>{state});
  posterior.initialise(states);
  const LayerContext context = posterior.training_context(batch);
  Activation x = take_activation(context, size_t(in) * side * side, false, true);
  upload(device, x.signal.value, z.f32("in_x"));
  conv.prepare(context, false);

  const Doubles dense = z.f64("in_L"), w = z.f64("ws_out_w"), b_mu = z.f64("in_b_mu"), b_sigma = z.f64("in_b_sigma"),
                eps_b = z.f64("eps_b"), y = z.f64("ws_out_y"), g_mu = z.f64("ws_g_mu"), g_b_mu = z.f64("ws_g_b_mu");
  double lift = 1;
  for (double one : y) lift = std::max(lift, std::abs(one) + 1);
  const int entries = packed(d);
  Doubles stored(size_t(blocks) * entries), mean = w, bias(out), g_factor(stored.size()), bias_noise(out), got_bias;
  for (int b = 0; b < blocks; b++) {
    Doubles e;
    for (int j = 0; j < d; j++)
      e.push_back(lane_of(normal4(state.noise, uint32_t(b * 7 + j / 4), stream_draws, state.step), j % 4));
    for (int i = 0; i < d; i++) {
      const double diagonal = dense[(b * d + i) * d + i];
      for (int j = 0; j <= i; j++) {
        const double l = dense[(b * d + i) * d + j], g = g_mu[b * d + i] * e[j];  // d data/d L
        const size_t at = size_t(b) * entries + i * (i + 1) / 2;
        stored[at + j] = i == j ? std::log(l) : l / diagonal;
        mean[b * d + i] -= l * e[j];
        g_factor[at + i] += g * l;  // by ln L_ii, which scales the row
        if (j < i) g_factor[at + j] = g * diagonal;
      }
    }
  }
  for (int n = 0; n < out; n++) {
    bias_noise[n] = normal4(state.noise, uint32_t(n), stream_draws + 1, state.step).x;
    bias[n] = b_mu[n] + b_sigma[n] * (eps_b[n] - bias_noise[n]) + lift;
  }
  const StateArray& factor = state_array(posterior, "scale_tril");
  factor.store->write(device, "scale_tril", 0, factor.store->layout()[0], floats(stored));
  posterior.store().write(device, "mean", 0, layout[0], floats(mean));
  posterior.store().write(device, "mean", 0, layout[1], floats(bias));
  posterior.store().write(device, "log_std", 0, layout[1], floats(logarithms(b_sigma)));
  posterior.refresh(true);
  posterior.draw(0, states);
  const RowWeights drawn = product_weights(posterior, conv, context);
  EXPECT_TRUE(close(download(device, drawn.weights + conv.weight_at(), w.size()), w, {.l2 = 1e-6}));
  conv.forward(x, {states});
  Doubles lifted = doubles(download(device, conv.output().signal.value, y.size()));
  for (double& one : lifted) one -= lift;
  EXPECT_TRUE(close(lifted, y, {.l2 = 2e-6}));
  upload(device, conv.output().signal.grad, z.f32("up_y"));
  conv.backward(x, {states});
  EXPECT_TRUE(close(download(device, x.signal.grad, x.stride), z.f64("ws_g_x"), {.l2 = 1e-6}));
  posterior.step(states);
  const auto gradient = [&](const ParameterStore& store, const char* array, const TensorSpec& t) {
    Doubles g = doubles(store.read(device, array + std::string(".adam_m"), 0, t));
    for (double& one : g) one /= 1 - double(adam_beta1);
    return g;
  };
  EXPECT_TRUE(close(gradient(posterior.store(), "mean", layout[0]), g_mu, {.l2 = 2e-6}));
  EXPECT_TRUE(close(gradient(posterior.store(), "mean", layout[1]), g_b_mu, {.l2 = 2e-6}));
  EXPECT_TRUE(close(gradient(*factor.store, "scale_tril", factor.store->layout()[0]), g_factor, {.l2 = 2e-6}));
  Doubles g_b(out);
  for (int n = 0; n < out; n++) g_b[n] = g_b_mu[n] * bias_noise[n] * b_sigma[n];  // by ln sigma
  EXPECT_TRUE(close(gradient(posterior.store(), "log_std", layout[1]), g_b, {.l2 = 2e-6}));
}

}  // namespace
}  // namespace baton::test
