// Tasks one after the other, and side by side: their sequences, Bayesian gradient descent by its definition, heads, and
// what holds a network to what it knew.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "tests/support/device.h"
#include "tests/support/training.h"

namespace baton::test {
namespace {

TestedKind make_bgd(int draws, int at_once = 0, double sigma = 0.04) {
  return {"bgd", "bgd", {{"draws", draws}, {"draws_at_once", at_once}, {"sigma", sigma}}};
}
TestedKind point(const char* kind, double lr, const json& more = json::object()) {
  json settings{{"lr", lr}};
  settings.update(more);
  return {kind, kind, settings};
}
// For one epoch a task.
TrainingSettings settings_of(const TestedKind& kind, int batch = 8, uint64_t seed = 3) {
  return plain_settings(kind, {seed}, batch);
}
std::vector<int32_t> count_from(int first, int count) {
  std::vector<int32_t> all(count);
  std::iota(all.begin(), all.end(), first);
  return all;
}

// ----------------------------------------------------------------------------------------------------- the sequences
TEST(Tasks, PermutedPixels) {
  const auto orders = permute_pixels(6, 784, 3);
  ASSERT_EQ(orders.size(), 6u);
  EXPECT_EQ(orders[0], count_from(0, 784));
  for (const auto& order : orders) {
    auto sorted = order;
    std::sort(sorted.begin(), sorted.end());
    EXPECT_EQ(sorted, count_from(0, 784));
  }
  for (int a = 0; a < 6; a++)
    for (int b = 0; b < a; b++) {  // a pixel stays in its place one time in 784
      int same = 0;
      for (int i = 0; i < 784; i++) same += orders[a][i] == orders[b][i];
      EXPECT_LT(same, 12) << a << ", " << b;
    }
  EXPECT_EQ(permute_pixels(6, 784, 3), orders);
  const auto fewer = permute_pixels(2, 784, 3), other = permute_pixels(2, 784, 4);
  EXPECT_EQ(fewer[1], orders[1]);
  EXPECT_NE(other[1], orders[1]);
  EXPECT_EQ(other[0], orders[0]);
  EXPECT_EQ(permute_pixels(2, 1, 3)[1], std::vector<int32_t>{0});
  EXPECT_THROW(permute_pixels(0, 784, 3), InputError);
  EXPECT_THROW(permute_pixels(2, 0, 3), InputError);
  // Where a pixel goes is uniform: places over many orders, in ten equal parts, by chi squared with nine degrees.
  const auto many = permute_pixels(2001, 10, 8);
  for (int pixel : {0, 9}) {
    double counts[10] = {}, chi2 = 0;
    for (size_t t = 1; t < many.size(); t++)
      counts[std::find(many[t].begin(), many[t].end(), pixel) - many[t].begin()]++;
    for (double c : counts) chi2 += (c - 200) * (c - 200) / 200;
    EXPECT_LT(chi2, 27.9);  // one in a thousand
  }
}

TEST(Tasks, TheScheduleIsTheAuthors) {
  const Npz golden(golden_file("bgd/cont_task_probs"));
  for (const auto& [name, tasks, steps] : {std::tuple("probs_t10_i1000_b4", 10, 1000), {"probs_t4_i40_b4", 4, 40}}) {
    SCOPED_TRACE(name);
    const std::vector<double> want = golden.f64(name);  // [tasks][steps], in float
    const auto got = continuous_schedule(tasks, steps, 4);
    ASSERT_EQ(got.size(), size_t(steps));
    double worst = 0;
    for (int i = 0; i < steps; i++) {
      ASSERT_EQ(got[i].size(), size_t(tasks));
      double sum = 0;
      for (int t = 0; t < tasks; t++) {
        sum += got[i][t];
        worst = std::max(worst, std::abs(got[i][t] - want[size_t(t) * steps + i]));
      }
      EXPECT_NEAR(sum, 1, 1e-12);
    }
    EXPECT_LT(worst, 1e-6);
  }
  EXPECT_EQ(continuous_schedule(1, 3, 4), (std::vector<std::vector<double>>(3, {1.})));
  for (const auto& row : continuous_schedule(7, 333, 2)) {  // the least steep: all the time two tasks at most
    int running = 0;
    double sum = 0;
    for (double p : row) {
      EXPECT_TRUE(p >= 0 && p <= 1);
      running += p > 0;
      sum += p;
    }
    EXPECT_LE(running, 2);
    EXPECT_NEAR(sum, 1, 1e-12);
  }
  EXPECT_THROW(continuous_schedule(0, 10, 4), InputError);
  EXPECT_THROW(continuous_schedule(4, 3, 4), InputError);
  EXPECT_THROW(continuous_schedule(4, 40, 1.9), InputError);
  EXPECT_THROW(continuous_schedule(4, 40, NAN), InputError);
}

// What every training refuses: Incremental.RefusesPlans.
TEST(Tasks, WhatMakesNoSenseIsRefused) {
  BATON_NEEDS_DEVICE();
  using S = Stages&;
  const auto build = [](auto change, const NetworkFactory& network = small_mlp(4)) {
    Stages stages = permuted_tasks(2, 20);
    change(stages);
    Training(settings_of(make_bgd(2)), stages, digits(20), network);
  };
  const auto refuses = [&](const char* what, auto change) { EXPECT_THROW(build(change), InputError) << what; };
  EXPECT_NO_THROW(build([](S) {}));
  refuses("no tasks", [](S s) { s.sizes.clear(), s.pixel_order.clear(); });
  refuses("an empty task", [](S s) { s.sizes[1] = 0, s.order[0].resize(20); });
  refuses("an image too many", [](S s) { s.order[0].back() = 20; });
  refuses("a negative image", [](S s) { s.order[0][0] = -1; });
  refuses("heads for some tasks", [](S s) { s.heads = {0}; });
  refuses("a head that is not there", [](S s) { s.heads = {0, 1}; });
  EXPECT_THROW(build([](S s) { s.heads = {0, 2}; }, two_heads()), InputError) << "a third head";
  refuses("a negative head", [](S s) { s.heads = {0, -1}; });
  refuses("augmentation for some tasks", [](S s) { s.augment = {false, false, true}; });
  refuses("augmented images of another order", [](S s) { s.augment = {false, true}; });
  refuses("orders for some tasks", [](S s) { s.pixel_order.pop_back(); });
  refuses("a short order", [](S s) { s.pixel_order[1].pop_back(); });
  refuses("a pixel twice", [](S s) { s.pixel_order[1][0] = s.pixel_order[1][1]; });
  refuses("a pixel that is not there", [](S s) { s.pixel_order[1][0] = 784; });
  const auto continuous = [](S s) {
    s.sizes.pop_back();
    s.order[0].resize(20);
    s.probabilities = continuous_schedule(2, 12, 4);
  };
  EXPECT_NO_THROW(build(continuous));
  refuses("continuous tasks of two sets", [](S s) { s.probabilities = continuous_schedule(2, 12, 4); });
  refuses("continuous tasks without orders", [&](S s) { continuous(s), s.pixel_order.clear(); });
  refuses("a step of other tasks", [&](S s) { continuous(s), s.probabilities[7].push_back(0); });

  Training run(settings_of(make_bgd(2)), permuted_tasks(2, 20), digits(20), small_mlp(4));
  EXPECT_THROW(run.trainer.run(1), InputError);
  EXPECT_THROW(run.trainer.begin_stage(2), InputError);
  EXPECT_THROW(run.trainer.begin_stage(-1), InputError);
}

TEST(Tasks, StepsAndTotals) {
  BATON_NEEDS_DEVICE();
  TrainingSettings settings = settings_of(make_bgd(4, 2));
  settings.epochs = 1.5;
  Stages stages = permuted_tasks(2, 50);
  stages.sizes[1] = 21;
  stages.order[0].resize(71);
  Training run(settings, stages, digits(50), small_mlp(6));
  Trainer& t = run.trainer;
  EXPECT_EQ(t.stages().count(), 2);
  EXPECT_EQ(t.stage(), -1);
  EXPECT_EQ(t.count_steps(0), 10);  // 9.4
  EXPECT_EQ(t.count_steps(1), 4);   // 3.9
  EXPECT_EQ(t.count_epoch_steps(0), 6);
  EXPECT_EQ(t.count_epoch_steps(1), 3);
  t.begin_stage(0);
  for (int steps : {1, 3, 2}) {
    const std::vector<EpochTotals> totals = t.run(steps);
    ASSERT_EQ(totals.size(), 1u);
    const EpochTotals& e = totals[0];
    EXPECT_EQ(e.steps, steps);
    EXPECT_EQ(e.examples, 8 * steps);  // once, however many draws see them
    EXPECT_TRUE(e.loss > 0.5 && e.loss < 10) << e.loss;
    EXPECT_TRUE(e.accuracy >= 0 && e.accuracy <= 1);
    EXPECT_EQ(e.kl, 0);  // it is kept by other kinds
    EXPECT_TRUE(e.kl_by_name.empty());
  }
  EXPECT_EQ(t.stage_step(), 6);
  t.begin_stage(1);
  EXPECT_EQ(t.stage(), 1);
  EXPECT_EQ(t.stage_step(), 0);
  t.run(2);
  EXPECT_EQ(t.step(), 8);
  EXPECT_EQ(t.stage_step(), 2);
  EXPECT_EQ(t.stages().tasks(), 2);
  EXPECT_NE(t.pixel_order(1), nullptr);
  EXPECT_EQ(download(run.memory.device(), t.pixel_order(1), 784), stages.pixel_order[1]);

  Training continuous(settings, continuous_tasks(3, 50, 31), digits(50), small_mlp(6));
  EXPECT_EQ(continuous.trainer.stages().count(), 1);
  EXPECT_EQ(continuous.trainer.stages().tasks(), 3);
  EXPECT_EQ(continuous.trainer.count_steps(0), 31);
  continuous.stage(0);
  EXPECT_EQ(Training(settings, whole_set(20), digits(50), small_mlp(6)).trainer.pixel_order(0), nullptr);
}

// ------------------------------------------------------------------------------------------------------------ a step
// The images of the batch that the network was given last, found among the digits by their (ordered) pixels.
std::vector<int> batch_of(Training& run, int batch, const std::vector<int32_t>& order, const Images& images) {
  const std::vector<float> x =
      download(run.memory.device(), run.trainer.network().input().signal.value, size_t(batch) * 784);
  std::vector<int> found;
  for (int b = 0; b < batch; b++)
    for (int n = 0; n < images.count; n++) {
      bool same = true;
      for (int i = 0; i < 784 && same; i++)
        same = std::abs(x[size_t(b) * 784 + i] * 255 - float(images.pixels[size_t(n) * 784 + order[i]])) < 0.01f;
      if (same) {
        found.push_back(n);
        break;
      }
    }
  return found;
}

// A step of Bayesian gradient descent from what was to what is, in double: the network, its draws and the update by
// loops over their definitions.
TEST(Tasks, AStepIsTheAlgorithm) {
  BATON_NEEDS_DEVICE();
  const int batch = 9, draws = 6, hidden = 14;
  const double eta = 1.5;
  for (const int at_once : {6, 2}) {
    SCOPED_TRACE(at_once);
    const Stages stages = permuted_tasks(2, 60);
    TestedKind kind = make_bgd(draws, at_once);
    kind.settings["eta"] = eta;
    Training run(settings_of(kind, batch, 5), stages, digits(60), small_mlp(hidden));
    Device& device = run.memory.device();
    const ParameterStore& store = run.trainer.posterior().store();
    const ParameterLayout& layout = run.trainer.network().layout();
    const size_t stride = layout.stride();
    uint32_t step = 0;
    for (int stage : {0, 1}) {
      run.trainer.begin_stage(stage);
      for (int i = 0; i < 2; i++) {
        const std::vector<float> mean = download(device, store.at("mean"), stride),
                                 sd = download(device, store.at("std"), stride);
        const EpochTotals totals = run.trainer.run(1)[0];
        step++;
        const std::vector<int> images = batch_of(run, batch, stages.pixel_order[stage], digits(60));
        ASSERT_EQ(images.size(), size_t(batch));

        StepState s{};
        s.noise = key_of(5, 1);
        s.step = step;
        Buffer states(run.memory, std::vector<StepState>{s});
        Buffer<float> zero(run.memory, stride), one(run.memory, stride, 1.f), noise(run.memory, stride * draws);
        draw_weights(noise, stride, zero, one, int(stride), 0, draws, states, run.memory.stream());
        const std::vector<float> e = noise.host();

        Doubles x;
        for (int n : images)
          for (int32_t p : stages.pixel_order[stage]) x.push_back(double(digits(60).pixels[size_t(n) * 784 + p]) / 255);
        Doubles e1(stride), e2(stride);
        double loss = 0;
        for (int k = 0; k < draws; k++) {
          const auto weights = [&](int tensor) {
            Doubles w;
            for (size_t at = layout[tensor].offset; at < layout[tensor].offset + layout[tensor].size; at++)
              w.push_back(double(mean[at]) + double(sd[at]) * e[stride * k + at]);
            return w;
          };
          ReferenceLayer fc1 = ReferenceLayer::dense(batch, 784, hidden),
                         fc2 = ReferenceLayer::dense(batch, hidden, 10);
          fc1.mean = weights(0), fc1.bias_mean = weights(1);
          fc2.mean = weights(2), fc2.bias_mean = weights(3);
          ReferencePool relu;
          const Doubles logits = fc2.forward(relu.forward(fc1.forward(x, {}), batch * hidden, 1, 1, 0), {});
          Doubles up(logits.size());
          for (int b = 0; b < batch; b++) {
            const int label = digits(60).labels[images[b]];
            double sum = 0;
            for (int c = 0; c < 10; c++) sum += std::exp(logits[b * 10 + c]);
            loss += (std::log(sum) - logits[b * 10 + label]) / (batch * draws);
            for (int c = 0; c < 10; c++) up[b * 10 + c] = std::exp(logits[b * 10 + c]) / sum - (c == label);
          }
          fc1.backward(relu.backward(fc2.backward(up), fc1.outputs()));
          const Doubles* gradients[] = {&fc1.g_mean, &fc1.g_bias_mean, &fc2.g_mean, &fc2.g_bias_mean};
          for (int t = 0; t < 4; t++)
            for (size_t j = 0; j < layout[t].size; j++) {
              const size_t at = layout[t].offset + j;
              e1[at] += (*gradients[t])[j] / draws;
              e2[at] += (*gradients[t])[j] * e[stride * k + at] / draws;
            }
        }
        EXPECT_NEAR(totals.loss, loss, 2e-6 * loss);
        const std::vector<float> next_mean = download(device, store.at("mean"), stride),
                                 next_sd = download(device, store.at("std"), stride);
        for (const TensorSpec& t : layout.tensors())
          for (size_t at = t.offset; at < t.offset + t.size; at++) {
            const double old = sd[at], z = old * e2[at] / 2;
            ASSERT_NEAR(next_mean[at], mean[at] - eta * old * old * e1[at], 1e-6) << t.name << " " << at - t.offset;
            ASSERT_NEAR(next_sd[at] / (old * std::sqrt(1 + z * z) - old * z), 1, 5e-6)
                << t.name << " " << at - t.offset;
          }
        EXPECT_GT(difference(next_mean, mean).worst, 1e-4);  // the step moves something
        EXPECT_GT(difference(next_sd, sd).worst, 1e-3);
      }
    }
  }
}

TEST(Tasks, HowManyDrawsAtOnceDoesNotMatter) {
  BATON_NEEDS_DEVICE();
  for (TestedKind kind : {make_bgd(6), task_kinds[1]}) {
    std::vector<std::vector<float>> first;
    kind.settings["draws"] = 6;
    for (int at_once : {6, 1, 2}) {
      SCOPED_TRACE(at_once);
      kind.settings["draws_at_once"] = at_once;
      Training run(settings_of(kind, 10), permuted_tasks(1, 50), digits(50), small_mlp(8));
      run.trainer.begin_stage(0);
      const auto before = run.state();
      run.trainer.run(5);
      const auto after = run.state();
      EXPECT_NE(after[0], before[0]);
      if (at_once == 6) first = after;
      EXPECT_TRUE(close(after[0], first[0], {.l2 = 1e-6}));
      EXPECT_TRUE(close(after[1], first[1], {.l2 = 1e-6}));
    }
  }
}

// The first step of a graph is not a replay, the others are.
TEST(Tasks, AReplayIsTheStep) {
  BATON_NEEDS_DEVICE();
  for (const TestedKind& kind : task_kinds) {
    SCOPED_TRACE(kind.name);
    std::vector<std::vector<float>> want;
    for (const std::vector<int>& calls : {std::vector<int>(10, 1), std::vector<int>{10}, {1, 4, 5}, {3, 0, 1, 6}}) {
      Training run(settings_of(kind), permuted_tasks(2, 40), digits(40), small_mlp(6));
      for (int stage : {0, 1}) {
        run.trainer.begin_stage(stage);
        for (int steps : calls) run.trainer.run(steps);
        run.end_stage();
      }
      if (want.empty()) want = run.state();
      EXPECT_EQ(run.state(), want);
    }
  }
}

// A head that is not in use stays as it is, to the bit, and its gradients are not those of the last task. Where a prior
// pulls at all weights (ffg, mnf), that is so once the prior is the head itself: from the second stage on.
TEST(Tasks, HeadsWait) {
  BATON_NEEDS_DEVICE();
  for (const TestedKind& kind :
       {make_bgd(4, 2), point("sgd", 0.05), make_bgd(4), stage_kinds[0], stage_kinds[1], stage_kinds[5]}) {
    SCOPED_TRACE(kind.name);
    Training run(settings_of(kind), stages_by_head(60), digits_for_heads(60), two_heads());
    const bool has_prior = !run.trainer.posterior().kl_names().empty();
    const auto heads = [&](int head) {
      std::vector<std::vector<float>> all;
      for (const StateArray& array : run.trainer.posterior().state())
        for (const char* tensor : {".weight", ".bias"})
          if (array.array == "mean" || array.array == "std" || array.array == "log_std")
            all.push_back(run.tensor(array.array, "head" + std::to_string(head) + tensor));
      return all;
    };
    for (int stage : {0, 1, 2}) {
      const int used = stage == 1;
      const auto before = heads(used), waits = heads(1 - used);
      const auto body = run.tensor("mean", "fc1.weight");
      run.stage(stage);
      if (stage > 0 || !has_prior) {
        EXPECT_EQ(heads(1 - used), waits);
      }
      EXPECT_NE(heads(used), before);
      EXPECT_NE(run.tensor("mean", "fc1.weight"), body);
    }
  }
}

// ---------------------------------------------------------------------------------------------------- learning at all
TEST(Tasks, LearnsGeneratedDigits) {
  BATON_NEEDS_DEVICE();
  for (const TestedKind& kind : task_kinds) {
    SCOPED_TRACE(kind.name);
    TrainingSettings settings = settings_of(kind, 20);
    settings.epochs = 6;
    Training run(settings, whole_set(400), digits(400), small_mlp(24));
    run.trainer.begin_stage(0);
    const EpochTotals first = run.trainer.run(20)[0];
    run.trainer.run(run.trainer.count_steps(0) - 40);
    const EpochTotals last = run.trainer.run(20)[0];
    EXPECT_LT(last.loss, 0.75 * first.loss) << first.loss;
    EXPECT_GT(last.accuracy, 0.5);
    EXPECT_GT(last.accuracy, first.accuracy);
    EXPECT_EQ(run.trainer.take_warning(), "");
  }
}

// The first task, after a second one: an anchor keeps the weights nearer to where they were.
TEST(Tasks, AnchorsHold) {
  BATON_NEEDS_DEVICE();
  for (const auto& [kind, strength] : {std::pair("si", 3000), {"ewc", 4}}) {
    SCOPED_TRACE(kind);
    double moved[2];
    for (int held : {0, 1}) {
      TrainingSettings settings = settings_of(point(kind, 1e-3, {{"strength", held ? strength : 0}}), 10);
      settings.epochs = 5;
      Training run(settings, permuted_tasks(2, 100), digits(100), small_mlp(10));
      run.stage(0);
      const std::vector<float> before = run.array("mean");
      EXPECT_TRUE(exact(run.array("centre"), before));
      const std::vector<float> importance = run.array("importance");
      EXPECT_GT(*std::max_element(importance.begin(), importance.end()), 0);
      run.trainer.begin_stage(1);
      run.trainer.run(run.trainer.count_steps(1));
      const std::vector<float> after = run.array("mean");
      moved[held] = 0;
      for (size_t i = 0; i < after.size(); i++) moved[held] += importance[i] * std::pow(after[i] - before[i], 2);
    }
    EXPECT_LT(moved[1], 0.8 * moved[0]);
    EXPECT_GT(moved[1], 0);
  }
}

// With a decay to next to nothing, nothing moves from the second epoch on.
TEST(Tasks, TheStepSchedule) {
  BATON_NEEDS_DEVICE();
  TrainingSettings settings =
      settings_of(point("sgd", 0.1, {{"schedule", "steps"}, {"decay", 1e-30}, {"decay_epochs", 1}}), 10);
  settings.epochs = 3;
  Training run(settings, permuted_tasks(2, 50), digits(50), small_mlp(6));
  for (int stage : {0, 1}) {
    run.trainer.begin_stage(stage);
    const auto start = run.state();
    run.trainer.run(4);
    const auto fourth = run.state();
    EXPECT_NE(fourth, start);
    run.trainer.run(1);
    const auto fifth = run.state();
    EXPECT_NE(fifth, fourth);
    run.trainer.run(10);
    EXPECT_EQ(run.array("mean"), fifth[0]);
  }
}

// Adam that goes on over tasks is one Adam: cutting a run into tasks of the same examples and orders must not change
// the size of its steps. (Its corrections belong to its moments, not to the task.) Restarted, it is a new one.
TEST(Tasks, AdamGoesOnOverTasks) {
  BATON_NEEDS_DEVICE();
  for (bool restart : {false, true}) {
    Training run(settings_of(point("adam", 1e-3, {{"restart_optimizer", restart}}), 10), permuted_tasks(2, 200),
                 digits(200), small_mlp(6));
    run.trainer.begin_stage(0);
    run.trainer.run(20);
    run.trainer.begin_stage(1);
    const std::vector<float> before = run.array("mean"), m = run.array("mean.m"), none(m.size(), 0.f);
    run.trainer.run(1);
    const std::vector<float> after = run.array("mean"), next_m = run.array("mean.m"), next_v = run.array("mean.v");
    EXPECT_EQ(exact(m, none), restart);
    const int steps = restart ? 1 : 21;
    Doubles want, got;
    for (size_t i = 0; i < m.size(); i++) {
      const double corrected_m = next_m[i] / (1 - std::pow(0.9, steps)),
                   corrected_v = next_v[i] / (1 - std::pow(0.999, steps));
      want.push_back(-1e-3 * corrected_m / (std::sqrt(corrected_v) + 1e-8));
      got.push_back(double(after[i]) - before[i]);
    }
    EXPECT_TRUE(close(got, want, {.l2 = 1e-3, .bias = 1e-2}));
  }
}

// ------------------------------------------------------------------------------------------------------- what diverges
// What Bayesian gradient descent notes for its messages.
TripWire read_wire(Posterior& posterior) {
  const std::vector<uint8_t> notes = posterior.notes();
  TripWire wire;
  std::memcpy(&wire, notes.data(), sizeof wire);
  return wire;
}

// eta sigma0^2 B far above what is known to hold: the run stops with numbers still in its hands, and says what to do.
TEST(Tasks, ARunawaySigmaStopsTheRun) {
  BATON_NEEDS_DEVICE();
  TrainingSettings settings = settings_of(make_bgd(2, 0, 0.1), 100);
  settings.epochs = 1000;
  Training run(settings, whole_set(400), digits(400), small_mlp(40));
  run.trainer.begin_stage(0);
  std::string message, warning;
  for (int i = 0; i < 200 && message.empty(); i++) {
    message = run_error(run, 2);
    if (warning.empty()) warning = run.trainer.take_warning();
  }
  expect_says(message, {"stage 1", "seed 3", "sigma diverged", "eta sigma0^2 B = 1 x 0.1^2 x 100 = 1", "lower sigma0",
                        "above the 0.46"});
  expect_says(warning, {"eta sigma0^2 B", "lower"});
  const TripWire wire = read_wire(run.trainer.posterior());
  EXPECT_GT(wire.warned_step, 0);
  EXPECT_LT(wire.warned_step, wire.halted_step);
  EXPECT_GE(wire.halted_largest, 100 * 0.1f);
  for (const auto& array : run.state())
    for (float x : array) ASSERT_TRUE(std::isfinite(x));
  for (float s : run.array("std")) ASSERT_GT(s, 0);
  // It stays where it stopped.
  const auto state = run.state();
  EXPECT_NE(run_error(run, 3), "");
  EXPECT_EQ(run.state(), state);
}

// ------------------------------------------------------------------------------------------------------------- memory
TEST(Tasks, NoGrowthAndNoCopiesOfTheNoise) {
  BATON_NEEDS_DEVICE();
  const int hidden = 64, batch = 10, draws = 10;
  for (int at_once : {10, 1}) {
    SCOPED_TRACE(at_once);
    Training run(settings_of(make_bgd(draws, at_once), batch), permuted_tasks(2, 50), digits(50), small_mlp(hidden));
    Arena& arena = run.memory.arena();
    const size_t bytes = arena.bytes();
    const size_t row = run.trainer.posterior().store().row_bytes();
    // Activations and their gradients of every draw at once, each buffer rounded up; the images, orders and small
    // things.
    const size_t activations = 4 * (784 + 2 * size_t(at_once) * (hidden + 10)) * batch;
    const size_t images = 50 * 785, orders = 4 * 2 * (784 + 50);
    EXPECT_LT(bytes, (at_once + 4) * row + activations + images + orders + (64 << 10));
    EXPECT_LT(bytes, size_t(at_once + 6) * row + activations + images);
    arena.freeze();
    for (int stage : {0, 1}) run.stage(stage);
    EXPECT_EQ(arena.bytes(), bytes);
  }
}

}  // namespace
}  // namespace baton::test
