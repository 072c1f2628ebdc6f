// The reference goes through the definitions in double precision; its inverse of a planar step bisects. Gradients are
// compared with difference quotients of the reference, whose error is about 1e-10.
#include "kernels/flow.h"

#include <functional>
#include <random>

#include "tests/kernels/flow_fixture.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

// All that the calls compute, of one set of flows with random parameters. The z of the density is not the flow's own.
void check_against_reference(const Case& c, unsigned seed, Spread spread = {}) {
  SCOPED_TRACE(testing::Message() << c << ", seed " << seed);
  Flows f(c);
  randomize(f, seed, spread);
  Floats weights;
  for (int r = 0; r < c.replicas; r++) weights.push_back(0.4f + 0.3f * r);
  f.set_weights(weights);
  const Floats z0 = f.z0->host(), up = f.dz->host();
  const int tensors = int(f.table.size());
  const float scale = 0.75f;

  f.forward();
  const Floats z = f.z->host();
  const Doubles log_q = f.log_q->host();
  EXPECT_TRUE(f.padding_untouched(z));
  f.backward(scale);
  const Floats gradients = f.gradients->host(), dz0 = f.dz->host();
  EXPECT_TRUE(f.padding_untouched(dz0));
  f.dz->set(up);
  f.backward(scale, false);
  const Floats without = f.gradients->host();

  Floats other = z;  // some way off
  std::mt19937 random(seed + 1);
  std::normal_distribution<float> normal;
  for (size_t i = 0; i < other.size(); i++)
    if (other[i] != untouched) other[i] += 0.3f * normal(random);
  f.z->set(other);
  std::vector<int32_t> identity(c.replicas);
  for (int r = 1; r < c.replicas; r += 2) identity[r] = 7;
  f.identity->set(identity);
  f.density(-scale, true);
  const Floats back = f.back->host(), added = f.added->host();
  const Doubles log_p = f.log_q->host();
  EXPECT_TRUE(f.padding_untouched(back));
  EXPECT_TRUE(f.padding_untouched(added));

  Doubles want_z, want_back, want_log_q, want_log_p, want_dz, got_dz, want_dz0, got_dz0;
  for (int q = 0; q < f.rows(); q++)
    for (int t = 0; t < tensors; t++) {
      const Doubles v = f.replica(q / c.groups);
      const Reference reference = f.reference(t, v);
      const double weight = scale * double(weights[q / c.groups]);
      const bool none = identity[q / c.groups] != 0;
      Doubles start = f.tensor_of(z0, q, t), given = f.tensor_of(other, q, t), x = start, y = given;
      want_log_q.push_back(reference.forward(x));
      want_log_p.push_back(reference.log_density(y, none));
      want_z.insert(want_z.end(), x.begin(), x.end());
      want_back.insert(want_back.end(), y.begin(), y.end());
      for (int i : some_of(f.table[t].size, 40, seed)) {
        got_dz.push_back(added[f.at(q, t, i)]);
        want_dz.push_back(-weight * slope(given[i], [&] {
          Doubles copy = given;
          return reference.log_density(copy, none);
        }));
        got_dz0.push_back(dz0[f.at(q, t, i)]);
        want_dz0.push_back(slope(start[i], [&] {  // the base's own density left out
          Doubles copy = start;
          double sum = weight * (reference.forward(copy) - reference.base(start));
          for (int k = 0; k < f.table[t].size; k++) sum += up[f.at(q, t, k)] * copy[k];
          return sum;
        }));
      }
    }
  EXPECT_TRUE(close(f.own(z), want_z, {.l2 = 1e-7}));
  EXPECT_TRUE(close(log_q, want_log_q, {.l2 = 1e-11, .bias = 1e-10}));
  EXPECT_TRUE(close(f.own(back), want_back, {.l2 = 1e-7}));
  EXPECT_TRUE(close(log_p, want_log_p, {.l2 = 1e-11, .bias = 1e-10}));
  EXPECT_TRUE(close(got_dz, want_dz, {.l2 = 2e-6}));
  EXPECT_TRUE(close(got_dz0, want_dz0, {.l2 = 2e-6}));

  for (int r = 0; r < c.replicas; r++) {
    Doubles v = f.replica(r);
    const Doubles kept = v;
    // The noise, by which z0 hangs on the base's parameters.
    std::vector<Doubles> noise;
    for (int g = 0; g < c.groups; g++)
      for (int t = 0; t < tensors; t++) {
        noise.push_back(f.tensor_of(z0, r * c.groups + g, t));
        for (int i = 0; i < f.table[t].size; i++)
          noise.back()[i] =
              (noise.back()[i] - kept[f.table[t].base_mean + i]) * std::exp(-kept[f.table[t].base_log_std + i]);
      }
    auto objective = [&](int t) {  // ln q, and what dz asks for
      const FlowTensor& at = f.table[t];
      Two sum{};
      for (int g = 0; g < c.groups; g++) {
        const Doubles& e = noise[size_t(g) * tensors + t];
        Doubles x(at.size);
        for (int i = 0; i < at.size; i++) x[i] = v[at.base_mean + i] + std::exp(v[at.base_log_std + i]) * e[i];
        sum[0] += f.reference(t, v).forward(x);
        for (int i = 0; i < at.size; i++) sum[1] += up[f.at(r * c.groups + g, t, i)] * x[i];
      }
      return sum;
    };
    for (int t = 0; t < tensors; t++) {
      const FlowTensor& at = f.table[t];
      auto compare = [&](const char* name, int offset, int count, bool zero) {
        SCOPED_TRACE(testing::Message() << name << " of tensor " << t << ", replica " << r);
        const long first = long(f.stride) * r + offset;
        if (zero) {
          EXPECT_TRUE(exact(Floats(gradients.begin() + first, gradients.begin() + first + count), Floats(count)));
          EXPECT_TRUE(exact(Floats(without.begin() + first, without.begin() + first + count), Floats(count)));
          return;
        }
        Doubles got, want, got_without_density, want_without_density;
        for (int i : some_of(count, 40, seed + offset)) {
          const auto [by_density, by_dz] = slopes(v[offset + i], [&] { return objective(t); });
          got.push_back(gradients[first + i]);
          want.push_back(scale * double(weights[r]) * by_density + by_dz);
          got_without_density.push_back(without[first + i]);
          want_without_density.push_back(by_dz);
        }
        expect_gradient(got, want);
        expect_gradient(got_without_density, want_without_density);
      };
      compare("base mean", at.base_mean, at.size, c.fixed_base);
      compare("base log sd", at.base_log_std, at.size, c.fixed_base);
      for (int k = 0; k < c.steps; k++) {
        const FlowStep& s = at.steps[k];
        if (c.kind == FlowKind::planar) {
          compare("w", s.w0, at.size, false), compare("b", s.b0, 1, false), compare("u", s.b1, at.size, false);
        } else {
          compare("mask", s.mask, at.size, true);
          compare("W0", s.w0, at.size * c.hidden, false), compare("b0", s.b0, c.hidden, false);
          compare("W1", s.w1, at.size * c.hidden, false), compare("b1", s.b1, at.size, false);
          compare("W2", s.w2, at.size * c.hidden, false), compare("b2", s.b2, at.size, false);
        }
      }
    }
    for (size_t i = 0; i < f.stride; i++)
      if (!f.used[i]) {
        ASSERT_EQ(gradients[f.stride * r + i], untouched) << "a gap at " << i;
      }
  }
  const std::string name =
      "flow." + std::to_string(int(c.kind)) + "." + std::to_string(seed) + "." + std::to_string(c.steps);
  record(name + ".z", z, 1e-6f);
  record(name + ".back", back, 1e-6f);
  record(name + ".added", added, 1e-5f);
  record(name + ".gradients", gradients, 1e-5f);
}

TEST(Flow, SmallAgainstReference) {
  BATON_NEEDS_DEVICE();
  for (FlowKind kind : {FlowKind::gated, FlowKind::affine, FlowKind::planar})
    check_against_reference({.kind = kind, .sizes = {5, 2}, .hidden = 2, .groups = 2}, 1);
}

TEST(Flow, AgainstReference) {
  BATON_NEEDS_DEVICE();
  for (FlowKind kind : {FlowKind::gated, FlowKind::affine, FlowKind::planar}) {
    check_against_reference({.kind = kind, .sizes = {7}, .hidden = 5, .steps = 3}, 2);
    check_against_reference({.kind = kind, .sizes = {1, 64, 3}, .hidden = 1, .steps = 2, .groups = 3}, 3);
    check_against_reference({.kind = kind, .sizes = {65, 130}, .hidden = 50, .steps = 2, .replicas = 2}, 4);
    check_against_reference({.kind = kind, .sizes = {20, 200}, .hidden = 70, .steps = 1, .groups = 2}, 5);
    check_against_reference({.kind = kind, .sizes = {9}, .hidden = 4, .steps = 8, .fixed_base = true}, 6);
    check_against_reference({.kind = kind, .sizes = {33}, .hidden = 130, .steps = 2, .fixed_base = true}, 7);
    check_against_reference({.kind = kind, .sizes = {6, 70}, .hidden = 2, .steps = 0, .groups = 2, .replicas = 2}, 8);
  }
}

// Gates from shut and clamped to open (with these seeds no difference quotient straddles the clamp), and stiff bends.
TEST(Flow, ExtremesAgainstReference) {
  BATON_NEEDS_DEVICE();
  for (int steps : {2, 4, 8}) {
    check_against_reference({.sizes = {40}, .hidden = 5, .steps = steps}, 11, {0, 4, 0.6f, true});
    check_against_reference({.kind = FlowKind::affine, .sizes = {40}, .hidden = 5, .steps = steps}, 12,
                            {1, 1, 0.6f, true});
    check_against_reference({.kind = FlowKind::planar, .sizes = {40}, .steps = steps}, 13, {.stiff = true});
  }
}

TEST(Flow, ClampedGatesHaveNoGradient) {
  BATON_NEEDS_DEVICE();
  Flows f({.sizes = {6}, .hidden = 3, .steps = 1});
  randomize(f, 21, {-6, 0.1f, 0.1f});
  const FlowTensor& t = f.table[0];
  f.put(0, t.steps[0].mask, {1, 0, 1, 0, 0, 1});
  f.values[t.steps[0].b2 + 3] = 1;  // open
  f.upload();
  const Floats z0 = f.z0->host();
  f.forward();
  const Floats z = f.z->host();
  f.backward(1);
  const Floats g = f.gradients->host();
  const double shut = 1 / (1 + std::exp(3.));
  for (int i : {1, 4}) {
    EXPECT_EQ(g[t.steps[0].b2 + i], 0);
    EXPECT_NE(g[t.steps[0].b1 + i], 0);
    for (int j = 0; j < 3; j++) EXPECT_EQ(g[t.steps[0].w2 + 3 * i + j], 0);
  }
  EXPECT_NE(g[t.steps[0].b2 + 3], 0);
  // z' = g z + (1 - g) t has slope g, forward and inverse.
  const Floats first = z;
  Floats moved = z0;
  moved[1] += 1;
  f.z0->set(moved);
  f.forward();
  EXPECT_NEAR(f.z->host()[1] - first[1], shut, 1e-6);
  f.density();
  EXPECT_NEAR(f.back->host()[1], moved[1], 1e-5);
}

// A planar step with w = 0 moves z by u tanh(b).
TEST(Flow, PlanarWithoutDirection) {
  BATON_NEEDS_DEVICE();
  Flows f({.kind = FlowKind::planar, .sizes = {5}, .steps = 2});
  randomize(f, 22);
  for (const FlowStep& s : {f.table[0].steps[0], f.table[0].steps[1]}) f.put(0, s.w0, Floats(5));
  f.upload();
  f.forward();
  const Floats z0 = f.z0->host(), z = f.z->host();
  for (int i = 0; i < 5; i++) {
    double want = z0[i];
    for (int k = 0; k < 2; k++) {
      const FlowStep& s = f.table[0].steps[k];
      want += double(f.values[s.b1 + i]) * std::tanh(double(f.values[s.b0]));
    }
    EXPECT_NEAR(z[i], want, 1e-6);
  }
  f.density();
  EXPECT_TRUE(close(f.own(f.back->host()), f.own(z0), {.l2 = 1e-6}));
  f.backward(1);
  for (float g : f.gradients->host()) EXPECT_TRUE(std::isfinite(g));
}

// ------------------------------------------------------------------------------------------------------ round trips
void check_round_trip(const Case& c, unsigned seed, Spread spread, double tolerance, bool of_forward = false) {
  SCOPED_TRACE(testing::Message() << c << ", seed " << seed);
  Flows f(c);
  randomize(f, seed, spread);
  f.forward();
  const Doubles log_q = f.log_q->host();
  f.density(0, false, of_forward);
  const Floats z0 = f.z0->host(), back = f.back->host();
  for (size_t i = 0; i < z0.size(); i++) {
    ASSERT_NEAR(back[i], z0[i], tolerance * (1 + std::abs(z0[i]))) << i;
  }
  const Doubles log_p = f.log_q->host();
  for (size_t i = 0; i < log_q.size(); i++) EXPECT_NEAR(log_p[i], log_q[i], tolerance * (100 + std::abs(log_q[i])));
}

TEST(Flow, InverseOfForwardIsTheIdentity) {
  BATON_NEEDS_DEVICE();
  for (int steps = 2; steps <= 8; steps++) {
    check_round_trip({.sizes = {20, 100}, .hidden = 10, .steps = steps}, 30 + steps, {2, 0.5f}, 1e-5);
    check_round_trip({.kind = FlowKind::affine, .sizes = {20, 100}, .hidden = 10, .steps = steps}, 40 + steps, {},
                     1e-5);
    check_round_trip({.kind = FlowKind::planar, .sizes = {20, 100}, .steps = steps}, 50 + steps, {}, 1e-5);
  }
}

// Of the z that a forward pass made, the inverse is the identity for any stack; of that z rounded to float, which
// nearly shut gates and stiff bends multiply, for few steps only. ExtremesAgainstReference holds the inverse of the
// rounded z.
TEST(Flow, InverseOfForwardIsTheIdentityAtExtremes) {
  BATON_NEEDS_DEVICE();
  for (unsigned seed : {61, 62, 63}) {
    check_round_trip({.sizes = {20, 100}, .hidden = 10, .steps = 2}, seed, {0, 4, 0.3f, true}, 1e-5);
    check_round_trip({.sizes = {20, 100}, .hidden = 10, .steps = 2}, seed, {-4, 0, 0.3f}, 1e-5);
    check_round_trip({.sizes = {20, 100}, .hidden = 10, .steps = 8}, seed, {4, 0, 0.3f}, 1e-5);
    check_round_trip({.kind = FlowKind::planar, .sizes = {20, 100}, .steps = 1}, seed, {.stiff = true}, 1e-5);
    check_round_trip({.kind = FlowKind::planar, .sizes = {20, 100}, .steps = 2}, seed, {.stiff = true}, 1e-4);
    for (int steps : {2, 4, 8}) {
      check_round_trip({.sizes = {20, 100}, .hidden = 10, .steps = steps}, seed, {0, 4, 0.3f, true}, 1e-6, true);
      check_round_trip({.sizes = {20, 100}, .hidden = 10, .steps = steps}, seed, {-4, 0, 0.3f}, 1e-6, true);
      check_round_trip({.kind = FlowKind::affine, .sizes = {20, 100}, .hidden = 10, .steps = steps}, seed,
                       {-3, 1, 0.3f}, 1e-6, true);
      check_round_trip({.kind = FlowKind::planar, .sizes = {20, 100}, .steps = steps}, seed, {.stiff = true}, 1e-6,
                       true);
    }
  }
}

// ------------------------------------------------------------------------------------------------------- identities
// At q = q~ and without the density's own term, both ways of ln q's path cancel: nothing is left, to the last bit.
TEST(Flow, PathGradientVanishesAtEquality) {
  BATON_NEEDS_DEVICE();
  for (FlowKind kind : {FlowKind::gated, FlowKind::affine, FlowKind::planar}) {
    Flows f({.kind = kind, .sizes = {5, 9}, .hidden = 3, .groups = 2, .replicas = 2}), old(f.c);
    randomize(f, 71), randomize(old, 71);
    f.set_weights({0.3f, 0.7f});
    f.forward();
    flow_log_density({f.density_of(1), old.density_of(-1)}, f.shape(), *f.z, *f.states, 2, f.memory.stream());
    EXPECT_TRUE(exact(f.log_q->host(), old.log_q->host()));
    Floats minus = f.own(f.added->host());
    EXPECT_TRUE(std::any_of(minus.begin(), minus.end(), [](float v) { return v != 0; }));
    for (float& v : minus) v = -v;
    EXPECT_TRUE(exact(f.own(old.added->host()), minus));
    f.dz->set(Floats(f.z_floats()));
    f.backward(1, false, {f.density_of(1), old.density_of(-1)});
    EXPECT_TRUE(exact(f.dz->host(), Floats(f.z_floats())));
    Floats g = f.gradients->host();
    for (size_t i = 0; i < g.size(); i++)
      if (!f.used[i % f.stride]) g[i] = 0;
    EXPECT_TRUE(exact(g, Floats(g.size())));
  }
}

// Two densities in one call are each alone, and the way back starts from the sum of all that is asked of z.
TEST(Flow, DensitiesTogetherAreEachAlone) {
  BATON_NEEDS_DEVICE();
  for (FlowKind kind : {FlowKind::gated, FlowKind::affine, FlowKind::planar}) {
    Flows f({.kind = kind, .sizes = {5, 70}, .hidden = 6, .groups = 2, .replicas = 2}), old(f.c);
    randomize(f, 74), randomize(old, 75);
    f.set_weights({0.3f, 0.7f});
    f.forward();
    old.z->set(f.z->host());
    old.states->set(f.states->host());
    old.identity->set({0, 1});
    f.density(1), old.density(-0.5f, true);
    const auto results = [&] {
      return std::tuple(f.log_q->host(), f.back->host(), f.added->host(), old.log_q->host(), old.back->host(),
                        old.added->host());
    };
    const auto alone = results();
    const std::vector<FlowDensity> both{f.density_of(1), old.density_of(-0.5f, true)};
    for (Flows* x : {&f, &old}) x->added->set(Floats(f.z_floats(), untouched));
    flow_log_density(both, f.shape(), *f.z, *f.states, 2, f.memory.stream());
    EXPECT_EQ(results(), alone);
    Floats sum = f.dz->host();
    const Floats a = f.added->host(), b = old.added->host();
    f.backward(1, false, both);
    const Floats dz0 = f.dz->host(), gradients = f.gradients->host();
    for (size_t i = 0; i < sum.size(); i++) sum[i] = sum[i] + a[i] + b[i];
    f.dz->set(sum);
    f.backward(1, false);
    EXPECT_TRUE(exact(f.own(dz0), f.own(f.dz->host())));
    EXPECT_TRUE(exact(gradients, f.gradients->host()));
  }
}

TEST(Flow, IdentityIsTheBase) {
  BATON_NEEDS_DEVICE();
  for (FlowKind kind : {FlowKind::gated, FlowKind::affine, FlowKind::planar}) {
    Flows f({.kind = kind, .sizes = {5, 70}, .groups = 2, .replicas = 2});
    randomize(f, 72);
    f.identity->set({1, 1});
    f.z->set(f.z0->host());
    f.density(0, true);
    EXPECT_TRUE(exact(f.own(f.back->host()), f.own(f.z0->host())));
    Doubles want;
    for (int q = 0; q < 4; q++)
      for (int t = 0; t < 2; t++) {
        const Doubles v = f.replica(q / 2);
        want.push_back(f.reference(t, v).base(f.tensor_of(f.z0->host(), q, t)));
      }
    EXPECT_TRUE(close(f.log_q->host(), want, {.l2 = 1e-12, .bias = 1e-11}));
  }
}

// Rows do not know of each other: a call for all is the calls for each, and every run gives the same bits.
TEST(Flow, GroupsAndReplicasAreSingleCalls) {
  BATON_NEEDS_DEVICE();
  for (FlowKind kind : {FlowKind::gated, FlowKind::affine, FlowKind::planar}) {
    const Case c{.kind = kind, .sizes = {5, 70}, .hidden = 6, .steps = 2, .groups = 3, .replicas = 2};
    Flows all(c);
    randomize(all, 73);
    all.set_weights({0.5f, 0.25f});
    const Floats z0 = all.z0->host(), up = all.dz->host();
    auto everything = [&](Flows& f) {
      f.forward();
      const Doubles log_q = f.log_q->host();
      f.density(1);
      f.backward(1);
      const Floats dz0 = f.dz->host();
      return std::tuple(f.z->host(), log_q, f.back->host(), f.log_q->host(), dz0, f.added->host(), f.gradients->host());
    };
    const auto [z, log_q, back, log_p, dz0, dz, gradients] = everything(all);
    all.dz->set(up);
    EXPECT_EQ(everything(all), std::tuple(z, log_q, back, log_p, dz0, dz, gradients));
    const long row = all.z_size, stride = long(all.stride);
    for (int r = 0; r < 2; r++) {
      Doubles sum(stride);
      for (int g = 0; g < 3; g++) {
        const int q = 3 * r + g;
        Case alone = c;
        alone.groups = alone.replicas = 1;
        Flows one(alone);
        auto part = [](const auto& x, long n, long i) {
          return std::decay_t<decltype(x)>(x.begin() + n * i, x.begin() + n * (i + 1));
        };
        one.values = part(all.values, stride, r);
        one.upload();
        one.set_weights({r ? 0.25f : 0.5f});
        one.z0->set(part(z0, row, q)), one.dz->set(part(up, row, q));
        const auto [z_, log_q_, back_, log_p_, dz0_, dz_, gradients_] = everything(one);
        EXPECT_TRUE(exact(z_, part(z, row, q)));
        EXPECT_TRUE(exact(log_q_, part(log_q, 2, q)));
        EXPECT_TRUE(exact(back_, part(back, row, q)));
        EXPECT_TRUE(exact(log_p_, part(log_p, 2, q)));
        EXPECT_TRUE(exact(dz0_, part(dz0, row, q)));
        EXPECT_TRUE(exact(dz_, part(dz, row, q)));
        for (long i = 0; i < stride; i++) sum[i] += all.used[i] ? gradients_[i] : untouched / 3.;
      }
      EXPECT_TRUE(
          close(Floats(gradients.begin() + stride * r, gradients.begin() + stride * (r + 1)), sum, {.l2 = 2e-7}));
    }
  }
}

// ---------------------------------------------------------------------------------------------------------- goldens
TEST(Flow, Goldens) {
  BATON_NEEDS_DEVICE();
  const std::pair<const char*, Case> cases[] = {
      {"flow_mnvp_D6_n2", {FlowKind::gated, {6}, 5, 2}},
      {"flow_affine_D6_n2", {FlowKind::affine, {6}, 5, 2}},
      {"flow_planar_D6_n3", {FlowKind::planar, {6}, 1, 3}},
      {"flow_planar_stiff_D6_n3", {FlowKind::planar, {6}, 1, 3}},
  };
  for (auto [name, c] : cases) {
    SCOPED_TRACE(name);
    const Npz golden = golden_of(name);
    c.replicas = 4;  // each row has an upstream gradient of its own for the logdet
    Flows f(c);
    load(f, golden, "in_");
    Floats weights = golden.f32("up_ld");
    for (float& w : weights) w = -w;
    f.set_weights(weights);
    f.z0->set(rows_of(f, golden.f32("in_z0")));
    f.forward();
    EXPECT_TRUE(close(f.own(f.z->host()), golden.f64("out_z"), {.l2 = 1e-6}));
    EXPECT_TRUE(close(f.log_q->host(), golden.f64("out_logq_fwd"), {.l2 = 1e-6}));
    Doubles logdet = f.log_q->host();
    const Doubles v = f.replica(0);
    for (int q = 0; q < 4; q++) logdet[q] = f.reference(0, v).base(f.tensor_of(f.z0->host(), q, 0)) - logdet[q];
    EXPECT_TRUE(close(logdet, golden.f64("out_logdet"), {.l2 = 1e-6}));
    f.dz->set(rows_of(f, golden.f32("up_z")));
    f.backward(1);
    EXPECT_TRUE(close(f.own(f.dz->host()), golden.f64("g_z0"), {.l2 = 2e-6}));
    const Floats gradients = f.gradients->host();
    each_parameter(f, [&](const std::string& parameter, int at, int size) {
      SCOPED_TRACE(parameter);
      Doubles sum(size);
      for (int r = 0; r < 4; r++)
        for (int i = 0; i < size; i++) sum[i] += gradients[f.stride * r + at + i];
      if (parameter.back() == 'm') {
        EXPECT_TRUE(exact(sum, Doubles(size)));
      } else {
        EXPECT_TRUE(close(sum, golden.f64("g_" + parameter), {.l2 = 5e-6, .bias = 1e-5}));
      }
    });

    f.set_weights(Floats(4, 1.f));
    f.z->set(rows_of(f, golden.f32("in_zt")));
    f.density(1);
    EXPECT_TRUE(close(f.own(f.back->host()), golden.f64("inv_out_z0"), {.l2 = 1e-6}));
    EXPECT_TRUE(close(f.log_q->host(), golden.f64("inv_out_logq"), {.l2 = 2e-6}));
    EXPECT_TRUE(close(f.own(f.added->host()), golden.f64("inv_g_zt"), {.l2 = 2e-6}));
  }
}

// The part of an MNF layer's bound that is about z: ln q(z), ln q~(z), and the gradient of the whole KL by the new
// flow, for K_w(z) = const + sum_i z_i^2 sum_o (mu - mu~)^2 / (2 sd~^2).
TEST(Flow, GoldenLayers) {
  BATON_NEEDS_DEVICE();
  for (const char* name : {"init", "sharedz", "perexample", "far", "stage1", "planar_numinv", "identity_closed"}) {
    SCOPED_TRACE(name);
    const std::string text = name;
    const Npz golden =
        golden_of((text == "planar_numinv" || text == "identity_closed" ? "mnf_dense_" : "mnf_dense_mnvp_") + text);
    const int samples = int(golden.shape("eps_z")[0]), size = int(golden.shape("eps_z")[1]);
    Case c{.sizes = {size}, .hidden = 6, .steps = text == "identity_closed" ? 0 : 2, .groups = samples};
    if (text == "planar_numinv") c.kind = FlowKind::planar;
    Flows now(c), old(c);
    load(now, golden, "in_new_");
    load(old, golden, text == "stage1" ? "in_new_" : "in_old_");
    if (text == "stage1") {  // no flow as yet: the base alone
      Floats log_std;
      for (double sd : golden.f64("in_old_s0")) log_std.push_back(float(std::log(sd)));
      old.put(0, old.table[0].base_mean, golden.f32("in_old_m0")), old.put(0, old.table[0].base_log_std, log_std);
      old.upload();
      old.identity->set({1});
    }
    const Doubles e = golden.f64("eps_z"), mean = golden.f64("in_new_m0"), sd = golden.f64("in_new_s0");
    Floats z0;
    for (int i = 0; i < samples * size; i++) z0.push_back(float(mean[i % size] + sd[i % size] * e[i]));
    now.z0->set(rows_of(now, z0));
    now.forward();
    EXPECT_TRUE(close(now.own(now.z->host()), golden.f64("out_z"), {.l2 = 1e-6}));
    EXPECT_TRUE(close(now.log_q->host(), golden.f64("out_logq"), {.l2 = 2e-6}));
    old.z->set(now.z->host());
    old.density(-1.f / samples, true);
    EXPECT_TRUE(close(old.own(old.back->host()), golden.f64("out_zt0"), {.l2 = 1e-6}));
    EXPECT_TRUE(close(old.log_q->host(), golden.f64("out_logqt"), {.l2 = 2e-6}));

    const Doubles sd0 = golden.f64("in_new_s0");
    auto expect_gradients = [&](const std::string& prefix) {
      const Floats g = now.gradients->host();
      auto compare = [&](const std::string& parameter, const Doubles& got) {
        SCOPED_TRACE(prefix + parameter);
        EXPECT_TRUE(close(got, golden.f64(prefix + parameter), {.l2 = 1e-5}));
      };
      auto part = [&](int at, int n) { return Doubles(g.begin() + at, g.begin() + at + n); };
      compare("m0", part(now.table[0].base_mean, size));
      Doubles by_sd = part(now.table[0].base_log_std, size);
      for (int i = 0; i < size; i++) by_sd[i] /= sd0[i];
      compare("s0", by_sd);
      each_parameter(now, [&](const std::string& parameter, int at, int n) {
        if (parameter.back() != 'm') compare(parameter, part(at, n));
      });
    };
    const Doubles mu = golden.f64("in_new_mu"), mu_old = golden.f64("in_old_mu"), sigma = golden.f64("in_old_sigma");
    const Floats z = now.own(now.z->host());
    Floats dz;
    for (int i = 0; i < samples * size; i++) {
      double r = 0;
      for (size_t k = i % size; k < mu.size(); k += size) r += std::pow((mu[k] - mu_old[k]) / sigma[k], 2);
      dz.push_back(float(z[i] * r / samples));
    }
    now.dz->set(rows_of(now, dz));
    now.backward(1.f / samples, true, {old.density_of(1, true)});
    expect_gradients("gkl_");
    if (golden.has("gstl_klz_m0")) {
      now.density(1), old.density(-1, true);
      now.dz->set(Floats(now.z_floats()));
      now.backward(1, false, {now.density_of(1), old.density_of(1, true)});
      expect_gradients("gstl_klz_");
    }
  }
}

// --------------------------------------------------------------------------------------------------- base, KL, start
float lane(float4 e, int k) { return k == 0 ? e.x : k == 1 ? e.y : k == 2 ? e.z : e.w; }

TEST(Flow, SmallBaseDraws) {
  BATON_NEEDS_DEVICE();
  Flows f({.sizes = {5, 66, 1}, .hidden = 1, .groups = 3, .replicas = 2});
  randomize(f, 81);
  f.z0->set(Floats(f.z_floats(), untouched));
  f.draw({FlowNoise::training, *f.states});
  const Floats got = f.z0->host();
  EXPECT_TRUE(f.padding_untouched(got));
  auto want_of = [&](int q, int replica, Key key, uint32_t group, uint32_t step, size_t t, int i) {
    const FlowTensor& at = f.table[t];
    const float* v = f.values.data() + f.stride * replica;
    const uint32_t counter = group * uint32_t((at.size + 3) / 4) + uint32_t(i / 4);
    const float e = lane(normal4(key, counter, at.stream_id, step), i % 4);
    const double want = v[at.base_mean + i] + std::exp(double(v[at.base_log_std + i])) * e;
    (void)q;
    return want;
  };
  Doubles want;
  const std::vector<StepState> states = f.states->host();
  for (int q = 0; q < 6; q++)
    for (size_t t = 0; t < 3; t++)
      for (int i = 0; i < f.table[t].size; i++)
        want.push_back(want_of(q, q / 3, states[q / 3].noise, q % 3, states[q / 3].step, t, i));
  EXPECT_TRUE(close(f.own(got), want, {.l2 = 2e-7}));
  record("flow.base", f.own(got), 1e-6f);

  // Draws: replica 0, and they do not depend on how many are made at once.
  const Key key = key_of(8);
  f.draw({FlowNoise::prediction, nullptr, key, 7}, 6);
  const Floats draws = f.z0->host();
  want.clear();
  for (int q = 0; q < 6; q++)
    for (size_t t = 0; t < 3; t++)
      for (int i = 0; i < f.table[t].size; i++) want.push_back(want_of(q, 0, key, 0, 7 + q, t, i));
  EXPECT_TRUE(close(f.own(draws), want, {.l2 = 2e-7}));
  f.draw({FlowNoise::prediction, nullptr, key, 9}, 1);
  const Floats again = f.z0->host();
  EXPECT_TRUE(exact(Floats(again.begin(), again.begin() + f.z_size),
                    Floats(draws.begin() + 2 * f.z_size, draws.begin() + 3 * f.z_size)));
  f.draw({FlowNoise::none}, 1);
  const Floats still = f.z0->host();
  for (const FlowTensor& t : f.table)
    for (int i = 0; i < t.size; i++) EXPECT_EQ(still[t.z_at + i], f.values[t.base_mean + i]);
}

TEST(Flow, BaseMoments) {
  BATON_NEEDS_DEVICE();
  const int groups = 4000;
  Flows f({.sizes = {6}, .hidden = 1, .steps = 0, .groups = groups});
  randomize(f, 82);
  f.draw({FlowNoise::training, *f.states});
  const Floats z0 = f.z0->host();
  for (int i = 0; i < 6; i++) {
    const double mean = f.values[f.table[0].base_mean + i], sd = std::exp(f.values[f.table[0].base_log_std + i]);
    double sum = 0, squares = 0, lag = 0;
    for (int g = 0; g < groups; g++) {
      const double e = (z0[f.at(g, 0, i)] - mean) / sd;
      sum += e, squares += e * e;
      if (g) lag += e * (z0[f.at(g - 1, 0, i)] - mean) / sd;
    }
    EXPECT_NEAR(sum / groups, 0, 5 / std::sqrt(groups));
    EXPECT_NEAR(squares / groups, 1, 5 * std::sqrt(2. / groups));
    EXPECT_NEAR(lag / groups, 0, 5 / std::sqrt(groups));
  }
}

// Of one element, by a sum over a grid of z.
TEST(Flow, DensityIntegratesToOne) {
  BATON_NEEDS_DEVICE();
  const int points = 301;
  for (FlowKind kind : {FlowKind::gated, FlowKind::affine, FlowKind::planar}) {
    Flows f({.kind = kind, .sizes = {1}, .hidden = 2, .steps = 3, .groups = points});
    randomize(f, 83);
    if (kind != FlowKind::planar)
      for (int k = 0; k < 3; k++) f.put(0, f.table[0].steps[k].mask, {float(k == 1)});
    f.upload();
    Floats z(f.z_floats());
    const double low = -5, high = 7, step = (high - low) / (points - 1);
    for (int g = 0; g < points; g++) z[f.at(g, 0, 0)] = float(low + step * g);
    f.z->set(z);
    f.density();
    double sum = 0;
    for (double log_q : f.log_q->host()) sum += std::exp(log_q) * step;
    EXPECT_NEAR(sum, 1, 1e-4);
  }
}

TEST(Flow, SmallDivergence) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  const int tensors = 3, groups = 2, replicas = 2, stride = 5;
  Doubles log_q, log_prior;
  for (int i = 0; i < tensors * groups * replicas; i++) log_q.push_back(0.1 * i * i - 3), log_prior.push_back(1.7 * i);
  Buffer<double> accumulator(memory, size_t(stride) * replicas, 4.), q(memory, log_q), p(memory, log_prior);
  flow_kl(accumulator, stride, q, p, tensors, groups, replicas, memory.stream());
  Doubles want(stride * replicas, 4);
  for (int r = 0; r < replicas; r++)
    for (int t = 0; t < tensors; t++)
      for (int g = 0; g < groups; g++) {
        const int i = (r * groups + g) * tensors + t;
        want[stride * r + t] += (log_q[i] - log_prior[i]) / groups;
      }
  EXPECT_TRUE(close(accumulator.host(), want, {.l2 = 1e-14, .bias = 1e-13}));
  accumulator.set(Doubles(stride * replicas));
  p.set(log_q);
  flow_kl(accumulator, stride, q, p, tensors, groups, replicas, memory.stream());
  EXPECT_TRUE(exact(accumulator.host(), Doubles(stride * replicas)));
}

TEST(Flow, FreshFlows) {
  BATON_NEEDS_DEVICE();
  for (FlowKind kind : {FlowKind::gated, FlowKind::affine, FlowKind::planar}) {
    Flows f({.kind = kind, .sizes = {20, 301}, .hidden = 20, .steps = 4, .groups = 2, .replicas = 2});
    f.device_values->set(Floats(f.values.size(), untouched));
    flow_initialise(*f.device_values, f.shape(), f.stride, std::log(0.1f), *f.states, 2, f.memory.stream());
    f.values = f.device_values->host();
    for (size_t i = 0; i < f.values.size(); i++) {
      ASSERT_TRUE(f.used[i % f.stride] ? f.values[i] != untouched : f.values[i] == untouched) << i;
    }
    auto part = [&](int r, int at, int n) {
      const float* v = f.values.data() + f.stride * r + at;
      return Floats(v, v + n);
    };
    auto expect_normal = [&](const Floats& x, double sd) {
      double sum = 0, squares = 0;
      for (double v : x) sum += v / sd, squares += v / sd * v / sd;
      const double n = double(x.size());
      EXPECT_NEAR(sum / n, 0, 5 / std::sqrt(n));
      EXPECT_NEAR(squares / n, 1, 5 * std::sqrt(2 / n));
    };
    for (int r = 0; r < 2; r++)
      for (const FlowTensor& t : f.table) {
        EXPECT_TRUE(exact(part(r, t.base_mean, t.size), Floats(t.size, 1.f)));
        EXPECT_TRUE(exact(part(r, t.base_log_std, t.size), Floats(t.size, std::log(0.1f))));
        for (int k = 0; k < 4; k++) {
          const FlowStep& s = t.steps[k];
          if (kind == FlowKind::planar) {
            expect_normal(part(r, s.w0, t.size), 0.1 / std::sqrt(t.size));
            expect_normal(part(r, s.b1, t.size), 0.1 / std::sqrt(t.size));
            EXPECT_NE(part(r, s.w0, t.size), part(r, s.b1, t.size));
            EXPECT_EQ(part(r, s.b0, 1)[0], 0);
            continue;
          }
          const Floats mask = part(r, s.mask, t.size), other = part(r, t.steps[k ^ 1].mask, t.size);
          int kept = 0;
          for (int i = 0; i < t.size; i++) {
            EXPECT_TRUE(mask[i] == 0 || mask[i] == 1);
            EXPECT_EQ(mask[i] + other[i], 1);
            kept += mask[i] == 1;
          }
          EXPECT_LE(std::abs(2 * kept - t.size), 1);
          EXPECT_NE(mask, part(1 - r, s.mask, t.size));
          EXPECT_NE(mask, part(r, t.steps[(k + 2) % 4].mask, t.size));
          expect_normal(part(r, s.w0, t.size * 20), 0.1 / std::sqrt(t.size));
          expect_normal(part(r, s.w1, t.size * 20), 0.1 / std::sqrt(20));
          expect_normal(part(r, s.w2, t.size * 20), 0.1 / std::sqrt(20));
          EXPECT_NE(part(r, s.w1, t.size * 20), part(r, s.w2, t.size * 20));
          EXPECT_TRUE(exact(part(r, s.b0, 20), Floats(20)));
          EXPECT_TRUE(exact(part(r, s.b1, t.size), Floats(t.size, kind == FlowKind::gated ? 1.f : 0.f)));
          EXPECT_TRUE(exact(part(r, s.b2, t.size), Floats(t.size, kind == FlowKind::gated ? 2.f : 0.f)));
        }
      }
    // z is about 1, and the prior made of it is hit.
    f.draw({FlowNoise::training, *f.states});
    EXPECT_TRUE(f.padding_untouched(f.z->host()));
    const Doubles log_q = f.log_q->host();
    double sum = 0, squares = 0;
    const Floats z = f.own(f.z->host());
    for (double v : z) sum += v - 1, squares += (v - 1) * (v - 1);
    EXPECT_NEAR(sum / double(z.size()), 0, 0.1);
    EXPECT_LT(std::sqrt(squares / double(z.size())), 0.3);
    f.density();
    const Doubles log_p = f.log_q->host();
    for (size_t i = 0; i < log_q.size(); i++) EXPECT_NEAR(log_p[i], log_q[i], 1e-4);
  }
}

TEST(Flow, RefusesShapes) {
  BATON_NEEDS_DEVICE();
  Flows f({.sizes = {5}});
  randomize(f, 90);
  const FlowTrace trace{*f.forward_memory, 1};
  auto forward = [&](const FlowShape& s, FlowTrace t, int groups) {
    flow_forward(*f.z, nullptr, s, f.parameters(), *f.z0, t, groups, f.memory.stream());
  };
  EXPECT_NO_THROW(forward(f.shape(), trace, 1));  // without the density
  EXPECT_THROW(forward(f.shape(), trace, 2), InputError);
  EXPECT_THROW(forward(f.shape(), trace, 0), InputError);
  EXPECT_THROW(forward(f.shape(), {nullptr, 1}, 1), InputError);
  EXPECT_THROW(forward(f.shape(), {*f.forward_memory, 0}, 1), InputError);
  const std::function<void(FlowShape&)> faults[] = {[](FlowShape& s) { s.steps = most_flow_steps + 1; },
                                                    [](FlowShape& s) { s.steps = -1; },
                                                    [](FlowShape& s) { s.hidden = 0; },
                                                    [](FlowShape& s) { s.tensors = 0; },
                                                    [](FlowShape& s) { s.tensors = 9; },
                                                    [](FlowShape& s) { s.z_size = 65; },
                                                    [](FlowShape& s) { s.largest = 65; },
                                                    [](FlowShape& s) { s.kind = FlowKind(3); }};
  for (const auto& fault : faults) {
    FlowShape s = f.shape();
    fault(s);
    EXPECT_THROW(forward(s, trace, 1), InputError);
    EXPECT_THROW(flow_trace_floats(s, 1), InputError);
    EXPECT_THROW(flow_log_density({f.density_of()}, s, *f.z, nullptr, 1, {}), InputError);
    EXPECT_THROW(flow_initialise(*f.device_values, s, f.stride, 0, *f.states, 1, {}), InputError);
    EXPECT_THROW(flow_backward(*f.gradients, *f.dz, {}, s, f.parameters(), *f.z0, trace, *f.states, 1, true, 1, 1, {}),
                 InputError);
  }
  EXPECT_THROW(flow_forward(*f.z0, nullptr, f.shape(), f.parameters(), *f.z0, trace, 1, {}), InputError);
  EXPECT_THROW(f.draw({FlowNoise::training}), InputError);
  const auto density = [&](const std::vector<FlowDensity>& densities, const FlowTrace* made_by = nullptr) {
    flow_log_density(densities, f.shape(), *f.z, nullptr, 1, {}, made_by);
  };
  FlowDensity in_place = f.density_of(), in_forward = f.density_of();
  in_place.z0 = *f.z, in_forward.trace = trace;
  EXPECT_THROW(density({}), InputError);
  EXPECT_THROW(density({in_place}), InputError);
  EXPECT_THROW(density({f.density_of(1)}), InputError);  // without states
  EXPECT_THROW(density({in_forward}, &trace), InputError);
  EXPECT_THROW(density({f.density_of(), f.density_of()}), InputError);
  EXPECT_THROW(f.backward(1, true, std::vector<FlowDensity>(3, f.density_of(1))), InputError);
  EXPECT_THROW(
      flow_backward(*f.gradients, *f.dz, {}, f.shape(), f.parameters(), *f.z0, trace, *f.states, 1, true, 1, 2, {}),
      InputError);
  EXPECT_THROW(flow_kl(nullptr, 2, nullptr, nullptr, 3, 1, 1, {}), InputError);
  EXPECT_THROW(flow_kl(nullptr, 3, nullptr, nullptr, 3, 0, 1, {}), InputError);
}

}  // namespace
}  // namespace baton::test
