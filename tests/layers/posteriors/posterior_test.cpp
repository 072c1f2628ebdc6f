#include "layers/posteriors/posterior.h"

#include "tests/support/device.h"
#include "tests/support/small_network.h"

namespace baton::test {
namespace {

ParameterLayout gapped_layout() {  // every tensor leaves a gap behind it
  ParameterLayout layout;
  layout.add("a.weight", {3, 50}, 50, false);
  layout.add("a.bias", {3}, 50, true);
  layout.add("b.weight", {7, 3}, 3, false);
  return layout;
}

// Settings of the replicas of a Gaussian posterior.
std::vector<json> scales(const std::vector<float>& log_std, const std::vector<float>& prior_sd,
                         const char* scale_rule = "adam") {
  std::vector<json> settings;
  for (size_t r = 0; r < log_std.size(); r++)
    settings.push_back({{"init_log_std", log_std[r]}, {"prior_sd", prior_sd[r]}, {"scale_rule", scale_rule}});
  return settings;
}
const std::vector<json> two_points(2, json::object());

// A posterior with its step states.
struct StateBench {
  StateBench(const ParameterLayout& layout, const std::string& kind, const std::vector<json>& settings)
      : owner(make_posterior(memory.device(), memory.arena(), layout, kind, settings)),
        posterior(*owner),
        states(memory, settings.size()) {
    std::vector<StepState> all;
    for (int r = 0; r < posterior.replicas(); r++) all.push_back(state_of(uint64_t(r), 0));
    states.set(all);
  }
  size_t stride() const { return posterior.store().layout().stride(); }
  std::vector<float> row(const std::string& array, int replica = 0) {
    return download(memory.device(), posterior.store().at(array) + stride() * replica, stride());
  }
  void fill(const std::string& array, const std::vector<float>& values, int replica = 0) {
    upload(memory.device(), posterior.store().at(array) + stride() * replica, values);
  }
  std::vector<float> read(const std::string& array, const TensorSpec& t, int replica = 0) {
    return posterior.store().read(memory.device(), array, replica, t);
  }
  void write(const std::string& array, const TensorSpec& t, const std::vector<float>& values, int replica = 0) {
    posterior.store().write(memory.device(), array, replica, t, values);
  }
  // Fresh random values in the tensors, none in the gaps.
  void scatter(const std::string& array, float mean, float sd, unsigned seed) {
    for (int r = 0; r < posterior.replicas(); r++)
      for (const TensorSpec& t : posterior.store().layout().tensors())
        write(array, t, random_normal(t.size, mean, sd, seed++), r);
  }
  void advance() { advance_step(states, posterior.replicas(), memory.stream()); }

  Memory memory;
  std::unique_ptr<Posterior> owner;
  Posterior& posterior;
  Buffer<StepState> states;
};

StepState training_state(uint64_t seed, float lr, float lr_scale, float kl_weight, int steps) {
  StepState s = state_of(seed, 0);
  s.stage_steps = steps;
  s.base_lr_mean = lr, s.base_lr_scale = lr_scale, s.kl_weight = kl_weight;
  return s;
}

TEST(PosteriorState, InitialiseStatistics) {
  BATON_NEEDS_DEVICE();
  ParameterLayout layout;
  layout.add("w1", {100, 50}, 50, false);
  layout.add("b1", {100}, 50, true);
  layout.add("w2", {40, 200}, 200, false);
  StateBench bench(layout, "ffg", scales({-5, -3}, {1, 0.5f}));
  for (const char* array : {"mean", "mean.adam_m", "log_std.adam_v", "prior_mean"})
    bench.fill(array, std::vector<float>(bench.stride(), 7), 1);  // initialise() starts from whatever there was
  bench.posterior.initialise(bench.states);
  for (int r = 0; r < 2; r++) {
    for (const TensorSpec& t : layout.tensors()) {
      const auto mean = bench.read("mean", t, r);
      double sum = 0, sum2 = 0;
      for (float m : mean) sum += m, sum2 += double(m) * m;
      const double n = double(t.size), sd = t.bias ? 0 : std::sqrt(2. / t.fan_in);
      EXPECT_NEAR(sum / n, 0, 4 * sd / std::sqrt(n)) << t.name;
      EXPECT_NEAR(std::sqrt(sum2 / n), sd, 4 * sd / std::sqrt(2 * n)) << t.name;
      EXPECT_TRUE(exact(bench.read("log_std", t, r), std::vector<float>(t.size, r ? -3.f : -5.f)));
      EXPECT_TRUE(exact(bench.read("prior_mean", t, r), std::vector<float>(t.size, 0)));
      EXPECT_TRUE(close(bench.read("variance", t, r), Doubles(t.size, std::exp(r ? -6. : -10.)), {.l2 = 1e-6}));
      for (float p : bench.read("prior_log_std", t, r)) ASSERT_FLOAT_EQ(p, std::log(r ? 0.5f : 1.f));
    }
    for (const char* array : {"mean.adam_m", "mean.adam_v", "log_std.adam_m", "log_std.adam_v"})
      EXPECT_TRUE(exact(bench.row(array, r), std::vector<float>(bench.stride(), 0))) << array;
  }
  EXPECT_FALSE(exact(bench.row("mean", 0), bench.row("mean", 1)));  // other seeds, other weights
  const auto mean_log_std = bench.posterior.mean_log_std();
  EXPECT_FLOAT_EQ(float(mean_log_std[0]), -5);
  EXPECT_FLOAT_EQ(float(mean_log_std[1]), -3);

  StateBench point(layout, "ft", two_points);  // the same seeds, the same weights
  point.posterior.initialise(point.states);
  for (int r = 0; r < 2; r++) EXPECT_TRUE(exact(point.row("mean", r), bench.row("mean", r)));
}

TEST(PosteriorState, FamiliesAndViews) {
  BATON_NEEDS_DEVICE();
  StateBench point(gapped_layout(), "ft", two_points), gaussian(gapped_layout(), "ffg", scales({-5, -5}, {1, 1}));
  EXPECT_STREQ(point.posterior.kind().name, "ft");
  EXPECT_STREQ(gaussian.posterior.kind().name, "ffg");
  EXPECT_FALSE(point.posterior.uncertain());
  EXPECT_TRUE(gaussian.posterior.uncertain());
  for (StateBench* bench : {&point, &gaussian}) {
    ParameterLayout layout;
    Dense layer(layout, "a", 50, 3, true, 0);
    const LayerContext context = bench->posterior.training_context(4);
    EXPECT_EQ(context.rows, 2);
    EXPECT_TRUE(context.training && !context.shared_input);
    layer.prepare(context, false);
    EXPECT_EQ(layer.reads_squares(), bench == &gaussian);
    EXPECT_EQ(layer.variance() != nullptr, bench == &gaussian);
  }
  EXPECT_EQ(point.posterior.kl(), (std::vector<double>{0, 0}));
  EXPECT_EQ(point.posterior.kl_names(), std::vector<std::string>{});
  EXPECT_EQ(point.posterior.mean_log_std(), std::vector<double>{});
  std::vector<std::string> names;
  for (const StateArray& a : point.posterior.state()) {
    EXPECT_EQ(a.store, &point.posterior.store());
    names.push_back(a.array);
  }
  EXPECT_EQ(names, (std::vector<std::string>{"mean", "mean.adam_m", "mean.adam_v"}));
  EXPECT_EQ(gaussian.posterior.state().size(), 9u);
}

TEST(PosteriorState, KlAgainstReference) {
  BATON_NEEDS_DEVICE();
  StateBench bench(gapped_layout(), "ffg", scales({-2, -3}, {1, 0.5f}));
  bench.posterior.initialise(bench.states);
  bench.scatter("mean", 0, 1, 1), bench.scatter("log_std", -2, 0.5f, 50);
  bench.scatter("prior_mean", 0, 1, 100), bench.scatter("prior_log_std", -1, 0.3f, 150);
  bench.posterior.refresh(true);
  const auto kl = bench.posterior.kl(), accumulated = bench.posterior.take_accumulated_kl()[0];
  const auto by_name = bench.posterior.kl_by_name();
  EXPECT_EQ(bench.posterior.kl_names(), (std::vector<std::string>{"a.weight", "a.bias", "b.weight"}));
  EXPECT_EQ(accumulated, (std::vector<double>{0, 0, 0}));
  for (int r = 0; r < 2; r++) {
    double want = 0, before = 0;
    for (int slot = 0; slot < 3; slot++) {
      const TensorSpec& t = bench.posterior.store().layout()[slot];
      const auto m = bench.read("mean", t, r), l = bench.read("log_std", t, r), pm = bench.read("prior_mean", t, r),
                 pl = bench.read("prior_log_std", t, r);
      for (size_t i = 0; i < t.size; i++) {
        const double sp2 = std::exp(2. * pl[i]), away = double(m[i]) - pm[i];
        want += double(pl[i]) - l[i] + (std::exp(2. * l[i]) + away * away) / (2 * sp2) - 0.5;
      }
      EXPECT_NEAR(by_name[r][slot] / (want - before), 1, 1e-6) << t.name;
      before = want;
    }
    EXPECT_NEAR(kl[r] / want, 1, 1e-6);
  }
}

// With gaps as large as tensors, only the tensors count, whatever lies in the gaps: before training, after steps and
// after a hand-over. Nothing writes there.
TEST(PosteriorState, GapsWeighNothing) {
  BATON_NEEDS_DEVICE();
  for (const char* rule : {"adam", "natural"}) {
    StateBench bench(gapped_layout(), "ffg", scales({-5, -3}, {1, 0.5f}, rule));
    bench.states.set({training_state(0, 1e-2f, 1e-2f, 0.1f, 10), training_state(1, 1e-2f, 1e-2f, 0.1f, 10)});
    bench.posterior.initialise(bench.states);
    const ParameterLayout& layout = bench.posterior.store().layout();
    ASSERT_FALSE(layout.gaps().empty());
    const auto fill_gaps = [&](const char* array, float value) {
      for (int r = 0; r < 2; r++) {
        auto row = bench.row(array, r);
        for (const auto& gap : layout.gaps())
          for (size_t i = gap.offset; i < gap.offset + gap.size; i++) row[i] = value + float(r);
        bench.fill(array, row, r);
      }
    };
    fill_gaps("mean", 3), fill_gaps("log_std", -1), fill_gaps("prior_mean", 5), fill_gaps("prior_log_std", 0.5f);
    for (const char* array : {"mean.grad", "variance.grad"}) fill_gaps(array, 1);
    const auto expect_idle = [&] {
      const auto kl = bench.posterior.kl();
      for (int r = 0; r < 2; r++) {
        const auto m = bench.row("mean", r), l = bench.row("log_std", r), pm = bench.row("prior_mean", r),
                   pl = bench.row("prior_log_std", r);
        for (const auto& gap : layout.gaps())
          for (size_t i = gap.offset; i < gap.offset + gap.size; i++) {
            ASSERT_EQ(m[i], 3 + float(r));
            ASSERT_EQ(l[i], -1 + float(r));
          }
        double want = 0;
        for (const TensorSpec& t : layout.tensors())
          for (size_t i = t.offset; i < t.offset + t.size; i++)
            want += double(pl[i]) - l[i] +
                    (std::exp(2. * l[i]) + std::pow(double(m[i]) - pm[i], 2)) * std::exp(-2. * pl[i]) / 2 - 0.5;
        EXPECT_NEAR(kl[r], want, 1e-5 * std::abs(want) + 1e-4);
      }
    };
    expect_idle();
    for (int stage = 0; stage < 2; stage++) {
      bench.scatter("mean.grad", 0, 1, 5), bench.scatter("variance.grad", 0, 1, 6);
      for (int i = 0; i < 3; i++) bench.advance(), bench.posterior.step(bench.states);
      expect_idle();
      EXPECT_EQ(bench.posterior.take_accumulated_kl()[0].size(), layout.tensors().size());
      bench.posterior.begin_stage(false);
      for (double kl : bench.posterior.kl()) EXPECT_EQ(kl, 0);
      expect_idle();
    }
  }
}

TEST(PosteriorState, HandOverCopiesAndForgetsTheOptimizer) {
  BATON_NEEDS_DEVICE();
  for (const bool gaussian : {true, false}) {
    StateBench bench(gapped_layout(), gaussian ? "ffg" : "ft", gaussian ? scales({-2, -3}, {1, 0.5f}) : two_points);
    bench.states.set({training_state(0, 1e-2f, 1e-2f, 0.1f, 10), training_state(1, 2e-2f, 1e-2f, 0.1f, 10)});
    bench.posterior.initialise(bench.states);
    bench.scatter("mean.grad", 0, 1, 5);
    if (gaussian) bench.scatter("variance.grad", 0, 1, 6);
    for (int i = 0; i < 3; i++) bench.advance(), bench.posterior.step(bench.states);
    const std::vector<float> mean = bench.row("mean", 1);
    std::vector<std::string> moments{"mean.adam_m", "mean.adam_v"};
    if (gaussian) {
      moments.insert(moments.end(), {"log_std.adam_m", "log_std.adam_v"});
      EXPECT_GT(bench.posterior.kl()[1], 0);
    }
    for (const auto& array : moments) EXPECT_FALSE(exact(bench.row(array, 1), std::vector<float>(bench.stride(), 0)));
    if (gaussian) {
      const auto log_std = bench.row("log_std", 1), variance = bench.row("variance", 1);
      EXPECT_TRUE(bench.posterior.begin_stage(false));
      EXPECT_TRUE(exact(bench.row("prior_mean", 1), mean));
      EXPECT_TRUE(exact(bench.row("prior_log_std", 1), log_std));
      EXPECT_TRUE(exact(bench.row("log_std", 1), log_std));
      EXPECT_TRUE(exact(bench.row("variance", 1), variance));
      EXPECT_EQ(bench.posterior.kl(), (std::vector<double>{0, 0}));
    } else {
      EXPECT_TRUE(bench.posterior.begin_stage(false));
    }
    EXPECT_TRUE(exact(bench.row("mean", 1), mean));
    for (int r = 0; r < 2; r++)
      for (const auto& array : moments)
        EXPECT_TRUE(exact(bench.row(array, r), std::vector<float>(bench.stride(), 0))) << array;
  }
}

TEST(PosteriorState, ResetOptimizerKeepsTheRest) {
  BATON_NEEDS_DEVICE();
  StateBench bench(gapped_layout(), "ffg", scales({-2}, {1}));
  bench.states.set({training_state(0, 1e-2f, 1e-2f, 0.1f, 10)});
  bench.posterior.initialise(bench.states);
  bench.scatter("mean.grad", 0, 1, 5), bench.scatter("variance.grad", 0, 1, 6);
  bench.advance(), bench.posterior.step(bench.states);
  const auto mean = bench.row("mean"), log_std = bench.row("log_std"), prior = bench.row("prior_mean");
  bench.posterior.reset_optimizer();
  EXPECT_TRUE(exact(bench.row("mean"), mean));
  EXPECT_TRUE(exact(bench.row("log_std"), log_std));
  EXPECT_TRUE(exact(bench.row("prior_mean"), prior));
  for (const char* array : {"mean.adam_m", "mean.adam_v", "log_std.adam_m", "log_std.adam_v"})
    EXPECT_TRUE(exact(bench.row(array), std::vector<float>(bench.stride(), 0))) << array;
}

TEST(PosteriorState, RefreshDerivesTheVariances) {
  BATON_NEEDS_DEVICE();
  StateBench bench(gapped_layout(), "ffg", scales({-2, -3}, {1, 1}));
  bench.posterior.initialise(bench.states);
  bench.scatter("log_std", -3, 1, 9);
  bench.posterior.refresh(true);
  for (int r = 0; r < 2; r++) {
    Doubles want;
    for (float l : bench.row("log_std", r)) want.push_back(std::exp(2. * l));
    EXPECT_TRUE(close(bench.row("variance", r), want, {.l2 = 1e-6}));
  }
}

// Two stages of four Adam steps of a 6-7-3 network, by an independent implementation. The gradients come from the
// reference layers with the golden noise, at the weights as the posterior holds them.
TEST(PosteriorState, GoldenTrajectory) {
  BATON_NEEDS_DEVICE();
  const Npz z(golden_file("layers/incr_ffg_adam_logsigma"));
  const auto meta = nlohmann::json::parse(z.text("meta_json"));
  const int batch = meta["batch"], in = meta["sizes"][0], hidden = meta["sizes"][1], out = meta["sizes"][2];
  const std::string tensors[] = {"W1", "b1", "W2", "b2"};
  ParameterLayout layout;
  layout.add("W1", {hidden, in}, in, false);
  layout.add("b1", {hidden}, in, true);
  layout.add("W2", {out, hidden}, hidden, false);
  layout.add("b2", {out}, hidden, true);
  StateBench bench(layout, "ffg", scales({0}, {float(meta["prior_sigma"])}));
  const float lr = meta["lr"];
  StepState state = training_state(0, lr, lr, float(double(meta["beta"]) / double(meta["Ntot"])), 4);
  bench.states.set({state});
  bench.posterior.initialise(bench.states);
  for (int t = 0; t < 4; t++) {
    bench.write("mean", layout[t], z.f32("in_mu_" + tensors[t]));
    bench.write("log_std", layout[t], z.f32("in_log_sigma_" + tensors[t]));
  }
  bench.posterior.refresh(true);
  const Doubles x = z.f64("in_x"), eps1 = z.f64("eps_l1"), eps2 = z.f64("eps_l2"), losses = z.f64("out_nll_kl_loss");
  const auto labels = z.i64("in_y");
  const auto part = [](const Doubles& all, int index, int count) {
    return Doubles(all.begin() + index * count, all.begin() + (index + 1) * count);
  };
  for (int step = 0; step < 8; step++) {
    SCOPED_TRACE("step " + std::to_string(step));
    if (step == 4) {
      bench.posterior.begin_stage(false);
      EXPECT_EQ(bench.posterior.kl()[0], 0);
      state = bench.states.host()[0];
      state.stage = 1, state.stage_step = 0;
      bench.states.set({state});
    }
    // The gradients of the mean negative log-likelihood.
    ReferenceLayer layers[] = {ReferenceLayer::dense(batch, in, hidden), ReferenceLayer::dense(batch, hidden, out)};
    for (int i = 0; i < 2; i++) {
      layers[i].mean = doubles(bench.read("mean", layout[2 * i]));
      layers[i].variance = doubles(bench.read("variance", layout[2 * i]));
      layers[i].bias_mean = doubles(bench.read("mean", layout[2 * i + 1]));
      layers[i].bias_variance = doubles(bench.read("variance", layout[2 * i + 1]));
    }
    ReferencePool relu;
    layers[0].forward(part(x, step, batch * in), part(eps1, step, batch * hidden));
    const Doubles logits =
        layers[1].forward(relu.forward(layers[0].y, batch * hidden, 1, 1, 0), part(eps2, step, batch * out));
    Doubles up(logits.size());
    double nll = 0;
    for (int b = 0; b < batch; b++) {
      const int label = int(labels[step * batch + b]);
      double sum = 0;
      for (int c = 0; c < out; c++) sum += std::exp(logits[b * out + c]);
      nll += (std::log(sum) - logits[b * out + label]) / batch;
      for (int c = 0; c < out; c++) up[b * out + c] = (std::exp(logits[b * out + c]) / sum - (c == label)) / batch;
    }
    const Doubles to_hidden = layers[1].backward(up);
    layers[0].backward(relu.backward(to_hidden, layers[0].outputs()));
    for (int i = 0; i < 2; i++) {
      bench.write("mean.grad", layout[2 * i], floats(layers[i].g_mean));
      bench.write("mean.grad", layout[2 * i + 1], floats(layers[i].g_bias_mean));
      bench.write("variance.grad", layout[2 * i], floats(layers[i].g_variance));
      bench.write("variance.grad", layout[2 * i + 1], floats(layers[i].g_bias_variance));
    }
    const double kl = bench.posterior.kl()[0], want_kl = losses[step * 3 + 1];
    EXPECT_NEAR(nll, losses[step * 3], 1e-5 * losses[step * 3]);
    EXPECT_NEAR(kl, want_kl, 1e-5 * want_kl + 3e-6);  // float: small by cancellation
    EXPECT_NEAR(nll + kl * state.kl_weight, losses[step * 3 + 2], 1e-5 * losses[step * 3 + 2]);

    bench.advance();
    bench.posterior.step(bench.states);
    double accumulated = 0;
    const auto by_name = bench.posterior.take_accumulated_kl();
    for (double one : by_name[0]) accumulated += one;
    EXPECT_NEAR(accumulated, want_kl, 1e-5 * want_kl + 3e-6);
    for (int t = 0; t < 4; t++)
      for (const auto& [array, golden] : {std::pair("mean", "mu_"), {"log_std", "log_sigma_"}}) {
        const std::string name = golden + tensors[t];
        SCOPED_TRACE(name);
        const int size = int(layout[t].size);
        const Doubles start = z.f64("in_" + name);
        Doubles want = part(z.f64("out_" + name), step, size), got = doubles(bench.read(array, layout[t]));
        EXPECT_TRUE(close(got, want, {.l2 = 1e-6}));
        for (int i = 0; i < size; i++) want[i] -= start[i], got[i] -= start[i];  // how far it has moved
        EXPECT_TRUE(close(got, want, {.l2 = 2e-3}));
      }
  }
}

// What every step adds, by name, until it is taken.
TEST(PosteriorState, BookedKlIsTheSumOverTheSteps) {
  BATON_NEEDS_DEVICE();
  StateBench bench(gapped_layout(), "ffg", scales({-2, -3}, {1, 0.5f}));
  bench.states.set({training_state(0, 1e-2f, 1e-2f, 0.1f, 10), training_state(1, 2e-2f, 1e-2f, 0.1f, 10)});
  bench.posterior.initialise(bench.states);
  bench.scatter("mean.grad", 0, 1, 5), bench.scatter("variance.grad", 0, 1, 6);
  std::vector<Doubles> want(2, Doubles(3, 0));
  for (int i = 0; i < 3; i++) {
    const auto now = bench.posterior.kl_by_name();
    for (int r = 0; r < 2; r++)
      for (int slot = 0; slot < 3; slot++) want[r][slot] += now[r][slot];
    bench.advance(), bench.posterior.step(bench.states);
  }
  const auto accumulated = bench.posterior.take_accumulated_kl(), again = bench.posterior.take_accumulated_kl();
  for (int r = 0; r < 2; r++) {
    EXPECT_TRUE(close(accumulated[r], want[r], {.l2 = 1e-6}));
    EXPECT_EQ(again[r], Doubles(3, 0));
  }
}

// Every replica steps by its own gradients, moments and step sizes.
TEST(PosteriorState, ReplicasStepAlone) {
  BATON_NEEDS_DEVICE();
  for (const auto& [kind, rule] : {std::pair("ffg", "adam"), {"ffg", "natural"}, {"ft", ""}}) {
    SCOPED_TRACE(testing::Message() << kind << " " << rule);
    const bool gaussian = kind == std::string("ffg");
    const auto train = [&, kind = kind, rule = rule](int first, int count) {
      std::vector<StepState> states;
      std::vector<float> log_std, prior_sd;
      for (int r = first; r < first + count; r++) {
        states.push_back(training_state(uint64_t(r), 1e-2f * float(r + 1), 2e-2f, 0.1f / float(r + 1), 10));
        log_std.push_back(-2.f - float(r)), prior_sd.push_back(1.f / float(r + 1));
      }
      StateBench bench(gapped_layout(), kind,
                       gaussian ? scales(log_std, prior_sd, rule) : std::vector<json>(count, json::object()));
      bench.states.set(states);
      bench.posterior.initialise(bench.states);
      for (int i = 0; i < 4; i++) {
        for (int r = first; r < first + count; r++)
          for (const TensorSpec& t : bench.posterior.store().layout().tensors()) {
            const unsigned seed = unsigned(1000 * r + 10 * i + int(t.offset));
            bench.write("mean.grad", t, random_normal(t.size, 0, 1, seed), r - first);
            if (gaussian) bench.write("variance.grad", t, random_normal(t.size, 0, 1, seed + 5), r - first);
          }
        bench.advance(), bench.posterior.step(bench.states);
      }
      std::vector<std::vector<float>> rows;
      for (int r = 0; r < count; r++)
        for (const StateArray& a : bench.posterior.state()) rows.push_back(bench.row(a.array, r));
      return rows;
    };
    std::vector<std::vector<float>> one_by_one;
    for (int r = 0; r < 3; r++)
      for (auto& row : train(r, 1)) one_by_one.push_back(row);
    EXPECT_EQ(train(0, 3), one_by_one);
  }
}

}  // namespace
}  // namespace baton::test
