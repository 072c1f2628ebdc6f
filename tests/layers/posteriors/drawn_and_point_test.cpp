// The posteriors that draw all their weights (bgd, bbb) and the point estimates (sgd, adam, si, ewc): what they are
// built with, their first weights, their draws, what they warn of, and what they keep from task to task.
#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>

#include "kernels/bgd.h"
#include "tests/layers/posteriors/networks.h"
#include "tests/support/device.h"
#include "tests/support/messages.h"

namespace baton::test {
namespace {

struct Bench {
  explicit Bench(const ParameterLayout& layout, uint64_t seed = 3, int rows = 4)
      : layout(layout), states(memory, std::vector<StepState>(rows, state(seed))) {}
  static StepState state(uint64_t seed) {
    StepState s = state_of(seed, 1);
    s.lr_mean = s.lr_scale = 1;
    s.correction1 = s.correction2 = 1;
    return s;
  }
  std::unique_ptr<Posterior> make(const std::string& kind, const json& settings = json::object()) {
    auto posterior = make_posterior(memory.device(), memory.arena(), layout, kind, {settings});
    posterior->initialise(states);
    return posterior;
  }
  std::vector<float> read(const float* x, int rows = 1) { return download(memory.device(), x, layout.stride() * rows); }
  std::vector<float> read(const Posterior& p, const char* array) { return read(p.store().at(array)); }
  void write(Posterior& p, const char* array, const std::vector<float>& x) {
    upload(memory.device(), p.store().at(array), x);
  }
  bool gaps_are(const std::vector<float>& x, float value) const {
    for (const auto& gap : layout.gaps())
      for (size_t i = 0; i < gap.size; i++)
        if (x[gap.offset + i] != value) return false;
    return true;
  }
  std::vector<float> of(const std::vector<float>& x, int tensor) const {
    const TensorSpec& t = layout[tensor];
    return {x.begin() + long(t.offset), x.begin() + long(t.offset + t.size)};
  }

  ParameterLayout layout;
  Memory memory;
  Buffer<StepState> states;
};

ParameterLayout small_layout() { return perceptron(9, {7}, 5)()->layout(); }

// A convolution, whose bias follows it, and a dense layer, with many numbers each.
ParameterLayout wide_layout() {
  ParameterLayout layout;
  layout.add("conv.weight", {3000, 2, 3, 3}, 18, false);
  layout.add("conv.bias", {3000}, 18, true);
  layout.add("fc.weight", {2503, 31}, 31, false);
  layout.add("fc.bias", {2503}, 31, true);
  return layout;
}

void expect_normal(const std::vector<float>& x, double variance) {
  double sum = 0, square = 0;
  for (float v : x) sum += v, square += double(v) * v;
  const double n = double(x.size());
  EXPECT_NEAR(sum / n, 0, 4.5 * std::sqrt(variance / n));
  EXPECT_NEAR(square / n / variance, 1, 4.5 * std::sqrt(2 / n));
}

TEST(Learner, WhatMakesNoSenseIsRefused) {
  BATON_NEEDS_DEVICE();
  Bench bench(small_layout());
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const char* kind : {"bgd", "bbb"}) {
    const auto make = [&](int draws, int at_once, double sigma) {
      bench.make(kind, {{"draws", draws}, {"draws_at_once", at_once}, {"sigma", sigma}});
    };
    EXPECT_NO_THROW(make(10, 5, 0.05));
    EXPECT_NO_THROW(make(1, 0, 0.05));
    EXPECT_THROW(make(0, 0, 0.05), InputError);
    EXPECT_THROW(make(-3, 0, 0.05), InputError);
    EXPECT_THROW(make(10, 3, 0.05), InputError);
    EXPECT_THROW(make(10, 20, 0.05), InputError);
    EXPECT_THROW(make(10, -5, 0.05), InputError);
    EXPECT_THROW(make(10, 5, 0), InputError);
    EXPECT_THROW(make(10, 5, -0.1), InputError);
    EXPECT_THROW(make(10, 5, nan), InputError);
  }
  EXPECT_THROW(bench.make("bgd", {{"least_sigma", 2}, {"largest_sigma", 1}}), InputError);
  EXPECT_THROW(bench.make("bgd", {{"warn_ratio", 20}, {"halt_ratio", 10}}), InputError);
  // A point estimate has no sigma, and its draws are its weights.
  const auto point = bench.make("sgd");
  EXPECT_FALSE(point->uncertain());
  EXPECT_THROW(point->store().at("std"), InputError);
  EXPECT_TRUE(point->read_log_std(0, bench.layout[0]).empty());
  Buffer<float> draws(bench.memory, bench.layout.stride() * 2);
  point->sample(draws, 0, 5, 2, key_of(1));
  const std::vector<float> w = bench.read(*point, "mean"), all = draws.host();
  EXPECT_TRUE(exact(std::vector<float>(all.begin(), all.begin() + long(w.size())), w));
  EXPECT_TRUE(exact(std::vector<float>(all.begin() + long(w.size()), all.end()), w));
}

TEST(Learner, MethodsDrawsAndScales) {
  BATON_NEEDS_DEVICE();
  Bench bench(small_layout());
  const auto check_drawn = [&](const char* kind, int draws, int at_once) {
    SCOPED_TRACE(kind);
    const auto p = bench.make(kind, {{"draws", draws}, {"draws_at_once", at_once}});
    EXPECT_STREQ(p->kind().name, kind);
    EXPECT_EQ(p->draws(), draws);
    EXPECT_EQ(p->draws_at_once(), at_once ? at_once : draws);
    EXPECT_TRUE(p->uncertain());
    EXPECT_EQ(p->loss_scale(50), 1.f);  // the batch's sum
    const LayerContext context = p->training_context(50);
    EXPECT_EQ(context.rows, p->draws_at_once());
    EXPECT_EQ(context.batch, 50);
    EXPECT_TRUE(context.training && context.shared_input);
    ParameterLayout layout;
    Dense layer(layout, "fc1", 9, 7, true, 0);
    layer.prepare(context, false);
    EXPECT_FALSE(layer.reads_squares());
    EXPECT_EQ(layer.variance(), nullptr);
    EXPECT_EQ(product_weights(*p, layer, context).gradients, nullptr);  // only their moments are kept
  };
  check_drawn("bgd", 6, 3);
  check_drawn("bgd", 6, 0);
  check_drawn("bbb", 4, 2);
  for (const char* kind : {"sgd", "adam", "si", "ewc"}) {
    SCOPED_TRACE(kind);
    const auto p = bench.make(kind);
    EXPECT_STREQ(p->kind().name, kind);
    EXPECT_EQ(p->draws(), 1);
    EXPECT_EQ(p->loss_scale(50), 1.f / 50);  // the batch's mean
    const LayerContext context = p->training_context(2);
    EXPECT_EQ(context.rows, 1);
    EXPECT_FALSE(context.shared_input);
    ParameterLayout layout;
    Dense layer(layout, "fc1", 9, 7, true, 0);
    layer.prepare(context, false);
    EXPECT_FALSE(layer.reads_squares());
    EXPECT_EQ(product_weights(*p, layer, context).gradients, p->store().at("mean.grad"));
  }
}

TEST(Learner, Initialisation) {
  BATON_NEEDS_DEVICE();
  Bench bench(wide_layout()), other(wide_layout(), 4);
  const json one_draw{{"draws", 1}};
  const auto bgd = bench.make("bgd", one_draw);
  const std::vector<float> mean = bench.read(*bgd, "mean"), sd = bench.read(*bgd, "std");
  expect_normal(bench.of(mean, 0), 2. / (9 * 2 + 9 * 3000));
  expect_normal(bench.of(mean, 1), 2. / (1 + 9 * 3000));
  expect_normal(bench.of(mean, 2), 2. / (31 + 2503));
  expect_normal(bench.of(mean, 3), 2. / (1 + 2503));
  for (int t = 0; t < 4; t++) EXPECT_TRUE(exact(bench.of(sd, t), std::vector<float>(bench.layout[t].size, 0.05f))) << t;
  EXPECT_FALSE(bench.layout.gaps().empty());
  EXPECT_TRUE(bench.gaps_are(mean, 0));
  EXPECT_TRUE(bench.gaps_are(sd, 0));
  EXPECT_TRUE(exact(bench.read(*bench.make("bgd", one_draw), "mean"), mean));
  EXPECT_FALSE(exact(other.read(*other.make("bgd", one_draw), "mean"), mean));
  // No two tensors begin with the same numbers.
  EXPECT_NE(mean[bench.layout[0].offset] / mean[bench.layout[2].offset],
            mean[bench.layout[0].offset + 1] / mean[bench.layout[2].offset + 1]);
  const json s = bgd->describe_sigma(true);
  size_t weights = 0;
  for (const json& count : s["counts"]) weights += size_t(count);
  EXPECT_EQ(weights, bench.layout.parameters());
  EXPECT_EQ(s["initial"], 0.05);
  EXPECT_EQ(float(s["largest"]), 0.05f);
  EXPECT_EQ(float(s["smallest"]), 0.05f);
  EXPECT_FALSE(bgd->describe_sigma(false).contains("counts"));

  const auto bbb = bench.make("bbb", {{"sigma", 0.03}});
  EXPECT_TRUE(exact(bench.read(*bbb, "mean"), mean));
  const std::vector<float> rho = bench.read(*bbb, "rho"), its_sd = bench.read(*bbb, "std");
  for (size_t i = 0; i < rho.size(); i++) {
    ASSERT_EQ(its_sd[i], 0.03f);
    ASSERT_NEAR(std::log1p(std::exp(double(rho[i]))), 0.03, 1e-7);
  }
  const auto si = bench.make("si");
  const std::vector<float> w = bench.read(*si, "mean");
  for (int t : {0, 2}) EXPECT_TRUE(exact(bench.of(w, t), bench.of(mean, t)));
  for (int t : {1, 3}) EXPECT_TRUE(exact(bench.of(w, t), std::vector<float>(bench.layout[t].size, 0.f)));
  EXPECT_TRUE(exact(bench.read(*si, "centre"), w));
}

TEST(Learner, DrawsForPredictions) {
  BATON_NEEDS_DEVICE();
  Bench bench(small_layout());
  const size_t stride = bench.layout.stride();
  const int count = int(stride);
  const auto check = [&](Posterior& p) {
    SCOPED_TRACE(p.kind().name);
    Buffer<float> all(bench.memory, stride * 7), some(bench.memory, stride * 7), noise(bench.memory, stride * 7),
        zero(bench.memory, stride), one(bench.memory, stride, 1.f), mean(bench.memory, stride);
    const Key key = key_of(8, 7);
    p.sample(all, 0, 0, 7, key);
    for (const auto& [first, draws] : {std::pair(0, 3), {3, 1}, {4, 2}, {6, 1}})
      p.sample(some + stride * first, 0, first, draws, key);
    EXPECT_TRUE(exact(some.host(), all.host()));
    draw_weights(noise, stride, zero, one, count, 0, 7, key, bench.memory.stream());
    p.mean_weights(mean, 0);
    EXPECT_TRUE(exact(mean.host(), bench.read(p, "mean")));
    const std::vector<float> e = noise.host(), m = mean.host(), sd = bench.read(p, "std"), w = all.host();
    for (size_t i = 0; i < w.size(); i++)
      ASSERT_NEAR(w[i], double(m[i % stride]) + double(sd[i % stride]) * e[i], 1e-7) << i;
    p.sample(some, 0, 0, 7, key_of(9, 7));
    EXPECT_FALSE(exact(some.host(), w));
    // The draws of a step are those of its key and step.
    ParameterLayout layout;
    Dense layer(layout, "fc1", 9, 7, true, 0);
    const RowWeights drawn = product_weights(p, layer, p.training_context(2));
    const auto draws = [&](const StepState* states) {
      p.draw(0, states);
      return bench.read(drawn.weights, p.draws_at_once());
    };
    StepState later = Bench::state(3);
    later.step = 2;
    Buffer states(bench.memory, std::vector<StepState>(4, later));
    const std::vector<float> now = draws(bench.states);
    EXPECT_FALSE(exact(draws(states), now));
    EXPECT_TRUE(exact(draws(bench.states), now));
  };
  check(*bench.make("bgd", {{"draws", 4}}));
  check(*bench.make("bbb", {{"draws", 4}, {"draws_at_once", 2}}));
}

// sigma' = sigma (|x| + sqrt(1 + x^2)) grows by a factor f where x = -(f - 1 / f) / 2, and x = sigma E2 / 2.
float noise_moment(double factor, double sigma, int draws) { return float(-(factor - 1 / factor) / sigma * draws); }

TEST(Learner, WarnsOnceAndThenHalts) {
  BATON_NEEDS_DEVICE();
  Bench bench(small_layout());
  const auto bgd = bench.make("bgd", {{"draws", 2}, {"sigma", 0.05}});
  const double eta = 2;
  const auto step = [&](uint32_t number, float moment) {
    std::vector<StepState> states = bench.states.host();
    for (StepState& s : states) s.step = number;
    bench.states.set(states);
    std::vector<float> all(bench.layout.stride(), 0.f);
    all[bench.layout[0].offset + 3] = moment;
    bench.write(*bgd, "moments.noise", all);
    bgd->step(bench.states);
  };
  step(4, noise_moment(9, 0.05, 2));
  EXPECT_EQ(bgd->warning(128, eta), "");
  EXPECT_EQ(bgd->failure(128, eta), "");
  step(5, noise_moment(2.2, 9 * 0.05, 2));
  EXPECT_EQ(bgd->failure(128, eta), "");
  expect_says(bgd->warning(128, eta), {"step 5", "0.99", "19.8 times", "eta sigma0^2 B = 2 x 0.05^2 x 128 = 0.64",
                                       "above the 0.46", "lower sigma0, the batch or eta", "more draws than 2"});
  EXPECT_EQ(bgd->warning(128, eta), "");
  double largest = 0;
  for (const auto& [name, value] : bgd->figures())
    if (name == "sigma_largest") largest = value;
  EXPECT_NEAR(largest, 0.99, 1e-3);
  TripWire wire;
  const std::vector<uint8_t> notes = bgd->notes();
  ASSERT_GE(notes.size(), sizeof wire);
  std::memcpy(&wire, notes.data(), sizeof wire);
  EXPECT_EQ(wire.warned_step, 5);
  EXPECT_EQ(wire.halted_step, 0);
  // What it remembers serves another one: that has warned already.
  const auto restored = bench.make("bgd", {{"draws", 2}, {"sigma", 0.05}});
  restored->set_notes(notes);
  EXPECT_EQ(restored->warning(128, eta), "");
  EXPECT_EQ(restored->notes(), notes);
  step(9, noise_moment(6, 19.8 * 0.05, 2));
  expect_says(bgd->failure(128, eta), {"diverged at step 9", "5.94", "from 0.05", "passed 10 times", "at step 5",
                                       "eta sigma0^2 B = 2 x 0.05^2 x 128 = 0.64", "lower sigma0"});
  EXPECT_EQ(bgd->failure(128, eta).find("not finite"), std::string::npos);
  expect_says(bgd->failure(8, eta), {"= 0.04"});
  EXPECT_EQ(bgd->failure(8, eta).find("0.46"), std::string::npos);  // it is below what is known to hold
  for (int r = 0; r < 2; r++) EXPECT_EQ(bench.states.host()[r].halted, 9);
  const std::vector<float> mean = bench.read(*bgd, "mean"), sd = bench.read(*bgd, "std");
  step(10, noise_moment(2, 1, 2));
  EXPECT_TRUE(exact(bench.read(*bgd, "mean"), mean));
  EXPECT_TRUE(exact(bench.read(*bgd, "std"), sd));
}

TEST(Learner, AnUpdateThatIsNotFiniteHalts) {
  BATON_NEEDS_DEVICE();
  Bench bench(small_layout());
  const auto bgd = bench.make("bgd", {{"draws", 4}});
  std::vector<float> sum(bench.layout.stride(), 0.f);
  sum[bench.layout[1].offset] = NAN;
  sum[bench.layout[0].offset] = INFINITY;
  bench.write(*bgd, "moments.sum", sum);
  const std::vector<float> mean = bench.read(*bgd, "mean");
  bgd->step(bench.states);
  expect_says(bgd->failure(10, 1), {"step 1", "update of 2 weights was not finite", "lower", "eta sigma0^2 B"});
  EXPECT_TRUE(exact(bench.read(*bgd, "mean"), mean));
}

// What deviates from the paper acts where it is asked for, in the units of the settings.
TEST(Learner, BoundsOfSigma) {
  BATON_NEEDS_DEVICE();
  for (bool bounded : {false, true}) {
    Bench bench(small_layout());
    json settings{{"draws", 2}, {"sigma", 0.05}};
    if (bounded) settings["least_sigma"] = 0.5, settings["largest_sigma"] = 2;
    const auto bgd = bench.make("bgd", settings);
    std::vector<float> all(bench.layout.stride(), 0.f);
    all[bench.layout[0].offset] = noise_moment(3, 0.05, 2);
    all[bench.layout[0].offset + 1] = -noise_moment(4, 0.05, 2);
    bench.write(*bgd, "moments.noise", all);
    bgd->step(bench.states);
    const std::vector<float> sd = bench.read(*bgd, "std");
    EXPECT_NEAR(sd[bench.layout[0].offset], bounded ? 0.1 : 0.15, 1e-6);
    EXPECT_NEAR(sd[bench.layout[0].offset + 1], bounded ? 0.025 : 0.0125, 1e-6);
  }
}

TEST(Learner, HeadsAndRestarts) {
  BATON_NEEDS_DEVICE();
  Bench bench(small_layout());
  const auto bgd = bench.make("bgd", {{"draws", 2}}), bbb = bench.make("bbb"), si = bench.make("si"),
             restarting = bench.make("si", {{"restart_optimizer", true}});
  const std::vector<float> zero(bench.layout.stride(), 0.f), seven(bench.layout.stride(), 7.f);
  const auto arrays = [&](Posterior& p, const std::vector<const char*>& cleared, auto act) {
    SCOPED_TRACE(p.kind().name);
    const std::vector<std::string> all = p.store().arrays();
    for (const std::string& name : all) bench.write(p, name.c_str(), seven);
    act();
    for (const std::string& name : all) {
      const bool clear = std::find(cleared.begin(), cleared.end(), name) != cleared.end();
      EXPECT_TRUE(exact(bench.read(p, name.c_str()), clear ? zero : seven)) << name;
    }
  };
  arrays(*bgd, {"moments.sum", "moments.noise"}, [&] { bgd->clear_gradients(); });
  arrays(*bbb, {"moments.sum", "moments.noise"}, [&] { bbb->clear_gradients(); });
  arrays(*si, {"mean.grad"}, [&] { si->clear_gradients(); });
  arrays(*bgd, {}, [&] { bgd->reset_optimizer(); });
  arrays(*bbb, {"mean.m", "mean.v", "rho.m", "rho.v"}, [&] { bbb->reset_optimizer(); });
  arrays(*si, {"mean.m", "mean.v"}, [&] { si->reset_optimizer(); });
  // A stage begins with the optimizer as it is, but where a restart is asked for.
  for (Posterior* p : {bgd.get(), bbb.get(), si.get()}) arrays(*p, {}, [&] { EXPECT_FALSE(p->begin_stage(false)); });
  arrays(*restarting, {}, [&] { EXPECT_FALSE(restarting->begin_stage(true)); });
  arrays(*restarting, {"mean.m", "mean.v"}, [&] { EXPECT_TRUE(restarting->begin_stage(false)); });
}

// Importance and centre as kernels/baselines.h defines them.
TEST(Learner, Consolidation) {
  BATON_NEEDS_DEVICE();
  Bench bench(small_layout());
  const auto si = bench.make("si", {{"xi", 0.5}});
  const size_t n = bench.layout.stride();
  const auto set = [&](Posterior& p, const char* array, unsigned seed) {
    const std::vector<float> x = random_normal(n, 0.5f, 0.4f, seed);
    bench.write(p, array, x);
    return doubles(x);
  };
  const auto nobody_asks = [](int) -> std::vector<float> { throw InputError("si needs no Fisher information"); };
  Doubles w = set(*si, "mean", 1), centre = set(*si, "centre", 2), path = set(*si, "path", 3),
          importance = set(*si, "importance", 4), want(n);
  for (size_t i = 0; i < n; i++)
    want[i] = std::max(0., importance[i] + path[i] / ((w[i] - centre[i]) * (w[i] - centre[i]) + 0.5));
  si->end_stage(nobody_asks);
  EXPECT_TRUE(close(bench.read(*si, "importance"), want, {.l2 = 1e-6}));
  EXPECT_TRUE(exact(bench.read(*si, "centre"), w));
  EXPECT_TRUE(exact(bench.read(*si, "path"), Doubles(n)));

  const auto ewc = bench.make("ewc", {{"fisher_decay", 0.7}, {"fisher_examples", 77}});
  w = set(*ewc, "mean", 1);
  centre = set(*ewc, "centre", 2);
  std::vector<float> fisher(n), a(n);
  Doubles want_centre(n);
  for (size_t i = 0; i < n; i++) {
    fisher[i] = float(i % 3), a[i] = float(i % 5);
    want[i] = 0.7 * a[i] + fisher[i];
    want_centre[i] = want[i] > 0 ? (0.7 * a[i] * centre[i] + fisher[i] * w[i]) / want[i] : w[i];
  }
  bench.write(*ewc, "importance", a);
  int asked = 0;
  ewc->end_stage([&](int examples) {
    asked = examples;
    return fisher;
  });
  EXPECT_EQ(asked, 77);
  EXPECT_TRUE(close(bench.read(*ewc, "importance"), want, {.l2 = 1e-6}));
  EXPECT_TRUE(close(bench.read(*ewc, "centre"), want_centre, {.l2 = 1e-6}));
}

}  // namespace
}  // namespace baton::test
