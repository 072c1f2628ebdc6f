#include "trainers/tasks.h"

#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <map>
#include <numeric>

#include "engine/io/stop.h"
#include "engine/io/synthetic.h"
#include "layers/mlp.h"
#include "tests/support/device.h"
#include "tests/support/small_network.h"

namespace baton::test {
namespace {

namespace fs = std::filesystem;

NetworkFactory mlp(int hidden) {
  return [=] { return std::make_unique<Mlp>(784, std::vector<int>{hidden}, 10); };
}

// 784  fc1 12, ReLU  two heads of 5
class DigitHeads : public Network {
 public:
  DigitHeads() : fc1_(layout_, "fc1", 784, 12, true, stream_layers) {
    for (int i = 0; i < 2; i++)
      heads_.emplace_back(layout_, "head" + std::to_string(i), 12, 5, false, stream_layers + 1);
  }
  const char* architecture() const override { return "digit heads"; }
  int classes() const override { return 5; }
  int heads() const override { return 2; }
  void use_head(int head) override {
    Network::use_head(head);
    head_ = head;
  }
  const ParameterLayout& layout() const override { return layout_; }
  void prepare(const LayerContext& c, bool shared_input) override {
    LayerContext input = c;
    if (shared_input) input.replicas = 1;
    x_ = take_activation(input, 784, false, false);
    if (shared_input) x_.stride = 0;
    fc1_.prepare(c, true);
    for (Dense& head : heads_) head.prepare(c, false);
  }
  const Activation& input() const override { return x_; }
  const float* logits() const override { return heads_[head_].output().signal.value; }
  float* logits_gradient() override { return heads_[head_].output().signal.grad; }
  void forward(Device& device, WeightsView w, const StepState* states) override {
    fc1_.forward(device, w, x_, states);
    heads_[head_].forward(device, w, fc1_.output(), states);
  }
  void backward(Device& device, WeightsView w, GradientsView g, const StepState* states) override {
    heads_[head_].backward(device, w, g, fc1_.output(), states);
    fc1_.backward(device, w, g, x_, states);
  }
  std::vector<NamedActivation> activations() const override { return {{"fc1", fc1_.output()}}; }

 private:
  ParameterLayout layout_;
  Dense fc1_;
  std::vector<Dense> heads_;
  int head_ = 0;
  Activation x_;
};
NetworkFactory two_heads() {
  return [] { return std::make_unique<DigitHeads>(); };
}

LearnerFactory bgd(const BgdSettings& settings) {
  return [=](Device& device, Arena& arena, const ParameterLayout& layout) {
    return std::make_unique<BgdLearner>(device, arena, layout, settings);
  };
}
LearnerFactory bgd(int draws, int at_once = 0, double sigma = 0.04) {
  BgdSettings s;
  s.draws = draws, s.at_once = at_once, s.sigma = sigma;
  return bgd(s);
}
LearnerFactory bbb(int draws, int at_once = 0, BbbPrior prior = BbbPrior::mixture, PointRule rule = PointRule::sgd) {
  BbbSetup s;
  s.rule.draws = draws, s.at_once = at_once, s.sigma = 0.03;
  s.rule.prior = prior, s.rule.rule = rule, s.rule.momentum = 0.5f;
  return [=](Device& device, Arena& arena, const ParameterLayout& layout) {
    return std::make_unique<BbbLearner>(device, arena, layout, s);
  };
}
LearnerFactory point(PointRule rule, Anchor anchor = Anchor::none, float momentum = 0, float strength = 0) {
  PointSetup s;
  s.rule.rule = rule, s.rule.momentum = momentum, s.rule.strength = strength;
  s.anchor = anchor;
  return [=](Device& device, Arena& arena, const ParameterLayout& layout) {
    return std::make_unique<PointLearner>(device, arena, layout, s);
  };
}

std::vector<int32_t> run_of(int first, int count) {
  std::vector<int32_t> all(count);
  std::iota(all.begin(), all.end(), first);
  return all;
}
// `tasks` tasks of all `count` digits, each but the first with an order of the pixels of its own.
TaskSequence permuted(int tasks, int count) {
  TaskSequence s;
  s.examples.assign(tasks, run_of(0, count));
  s.pixel_order = permuted_pixels(tasks, 784, 6);
  return s;
}
// One task of the digits as they are.
TaskSequence plain(int count) {
  TaskSequence s;
  s.examples = {run_of(0, count)};
  return s;
}
// Digits 0 to 4 with the first head and 5 to 9 with the second, and the first again.
TaskSequence by_head(const Images& digits) {
  TaskSequence s;
  s.examples.resize(3);
  for (int i = 0; i < digits.count; i++)
    for (int stage = 0; stage < 3; stage++)
      if ((digits.labels[i] >= 5) == (stage == 1)) s.examples[stage].push_back(i);
  s.heads = {0, 1, 0};
  return s;
}

TaskPlan plan_of(int batch = 8, double lr = 1, uint64_t seed = 3) {
  TaskPlan plan;
  plan.batch = batch, plan.lr = lr, plan.seed = seed;
  return plan;
}

const Images& digits(int count) {
  static std::map<int, Images> made;
  if (!made.count(count)) made[count] = generate_digits(count, 11);
  return made[count];
}
Images for_heads(Images images) {  // labels as the heads count them
  for (uint8_t& label : images.labels) label %= 5;
  return images;
}

// A trainer of generated digits.
struct Training {
  Training(const TaskPlan& plan, const TaskSequence& sequence, const LearnerFactory& learner,
           const NetworkFactory& network, const Images& images)
      : set(upload_images(memory.device(), memory.arena(), images, unit_range)),
        trainer(memory.device(), memory.arena(), network, set, sequence, plan, learner) {}
  // What training goes on from, without the gaps between tensors.
  std::vector<std::vector<float>> state() {
    std::vector<std::vector<float>> arrays;
    for (const std::string& a : trainer.learner().state_arrays()) arrays.push_back(array(a));
    return arrays;
  }
  std::vector<float> array(const std::string& name) {
    std::vector<float> all;
    for (const TensorSpec& t : trainer.learner().store().layout().tensors()) {
      const std::vector<float> values = trainer.learner().store().read(memory.device(), name, 0, t);
      all.insert(all.end(), values.begin(), values.end());
    }
    return all;
  }
  std::vector<float> tensor(const std::string& array, const std::string& name) {
    for (const TensorSpec& t : trainer.learner().store().layout().tensors())
      if (t.name == name) return trainer.learner().store().read(memory.device(), array, 0, t);
    throw InputError("no tensor " + name);
  }
  // As an experiment does at a task's end.
  void end_task() {
    auto* p = dynamic_cast<PointLearner*>(&trainer.learner());
    if (p && p->setup().anchor == Anchor::path) p->consolidate_path();
    if (p && p->setup().anchor == Anchor::fisher) {
      std::vector<float> fisher = random_uniform(p->store().layout().stride(), 0, 2, 4);
      for (const auto& gap : p->store().layout().gaps()) std::fill_n(fisher.begin() + long(gap.offset), gap.size, 0.f);
      p->consolidate_fisher(fisher);
    }
  }
  EpochTotals stage(int number) {
    trainer.begin_stage(number);
    const EpochTotals totals = trainer.run(trainer.steps_of(number));
    end_task();
    return totals;
  }

  Memory memory;
  DeviceImages set;
  TaskTrainer trainer;
};

struct Kind {
  const char* name;
  LearnerFactory learner;
  double lr, kl_weight;
};
std::vector<Kind> kinds() {
  return {{"bgd", bgd(4, 2), 1, 0},
          {"bbb", bbb(2), 1e-3, 0.1},
          {"bbb, Adam, Gaussian", bbb(2, 1, BbbPrior::gaussian, PointRule::adam), 1e-3, 0.1},
          {"sgd", point(PointRule::sgd, Anchor::none, 0.9f), 0.05, 0},
          {"adam", point(PointRule::adam), 1e-3, 0},
          {"si", point(PointRule::adam, Anchor::path, 0, 0.3f), 1e-3, 0},
          {"ewc", point(PointRule::sgd, Anchor::fisher, 0.9f, 0.5f), 0.02, 0}};
}

void expect_same(const EpochTotals& a, const EpochTotals& b) {
  EXPECT_EQ(a.loss, b.loss);
  EXPECT_EQ(a.accuracy, b.accuracy);
  EXPECT_EQ(a.examples, b.examples);
  EXPECT_EQ(a.steps, b.steps);
}
void expect_says(const std::string& message, const std::vector<std::string>& pieces) {
  for (const std::string& piece : pieces)
    EXPECT_NE(message.find(piece), std::string::npos) << "'" << piece << "' in: " << message;
}

// ----------------------------------------------------------------------------------------------------- the sequences
TEST(Tasks, PermutedPixels) {
  const auto orders = permuted_pixels(6, 784, 3);
  ASSERT_EQ(orders.size(), 6u);
  EXPECT_EQ(orders[0], run_of(0, 784));
  for (const auto& order : orders) {
    auto sorted = order;
    std::sort(sorted.begin(), sorted.end());
    EXPECT_EQ(sorted, run_of(0, 784));
  }
  for (int a = 0; a < 6; a++)
    for (int b = 0; b < a; b++) {  // a pixel stays in its place one time in 784
      int same = 0;
      for (int i = 0; i < 784; i++) same += orders[a][i] == orders[b][i];
      EXPECT_LT(same, 12) << a << ", " << b;
    }
  EXPECT_EQ(permuted_pixels(6, 784, 3), orders);
  const auto fewer = permuted_pixels(2, 784, 3), other = permuted_pixels(2, 784, 4);
  EXPECT_EQ(fewer[1], orders[1]);
  EXPECT_NE(other[1], orders[1]);
  EXPECT_EQ(other[0], orders[0]);
  EXPECT_EQ(permuted_pixels(2, 1, 3)[1], std::vector<int32_t>{0});
  EXPECT_THROW(permuted_pixels(0, 784, 3), InputError);
  EXPECT_THROW(permuted_pixels(2, 0, 3), InputError);
  // Where a pixel goes is uniform: places over many orders, in ten equal parts, by chi squared with nine degrees.
  const auto many = permuted_pixels(2001, 10, 8);
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

TEST(Tasks, WhatMakesNoSenseIsRefused) {
  BATON_NEEDS_DEVICE();
  const auto refuses = [&](const char* what, auto change, const NetworkFactory& network = mlp(4)) {
    TaskPlan plan = plan_of();
    TaskSequence sequence = permuted(2, 20);
    change(plan, sequence);
    EXPECT_THROW(Training(plan, sequence, bgd(2), network, digits(20)), InputError) << what;
  };
  const auto accepts = [&](const char* what, auto change) {
    TaskPlan plan = plan_of();
    TaskSequence sequence = permuted(2, 20);
    change(plan, sequence);
    EXPECT_NO_THROW(Training(plan, sequence, bgd(2), mlp(4), digits(20))) << what;
  };
  using P = TaskPlan&;
  using S = TaskSequence&;
  accepts("as it is", [](P, S) {});
  refuses("a batch of 0", [](P p, S) { p.batch = 0; });
  refuses("no epochs", [](P p, S) { p.epochs = 0; });
  refuses("epochs that are no number", [](P p, S) { p.epochs = NAN; });
  refuses("no tasks", [](P, S s) { s.examples.clear(), s.pixel_order.clear(); });
  refuses("an empty task", [](P, S s) { s.examples[1].clear(); });
  refuses("an image too many", [](P, S s) { s.examples[1].back() = 20; });
  refuses("a negative image", [](P, S s) { s.examples[0][0] = -1; });
  refuses("heads for some tasks", [](P, S s) { s.heads = {0}; });
  refuses("a head that is not there", [](P, S s) { s.heads = {0, 1}; });
  refuses(
      "a third head",
      [](P, S s) {
        s.heads = {0, 2};
      },
      two_heads());
  refuses("a negative head", [](P, S s) { s.heads = {0, -1}; });
  refuses("augmentation for some tasks", [](P, S s) { s.augment = {false, false, true}; });
  refuses("orders for some tasks", [](P, S s) { s.pixel_order.pop_back(); });
  refuses("a short order", [](P, S s) { s.pixel_order[1].pop_back(); });
  refuses("a pixel twice", [](P, S s) { s.pixel_order[1][0] = s.pixel_order[1][1]; });
  refuses("a pixel that is not there", [](P, S s) { s.pixel_order[1][0] = 784; });
  const auto continuous = [](S s) {
    s.examples.pop_back();
    s.probabilities = continuous_schedule(2, 12, 4);
  };
  accepts("continuous tasks", [&](P, S s) { continuous(s); });
  refuses("continuous tasks of two sets", [](P, S s) { s.probabilities = continuous_schedule(2, 12, 4); });
  refuses("continuous tasks without orders", [&](P, S s) { continuous(s), s.pixel_order.clear(); });
  refuses("a step of other tasks", [&](P, S s) { continuous(s), s.probabilities[7].push_back(0); });

  Training run(plan_of(), permuted(2, 20), bgd(2), mlp(4), digits(20));
  EXPECT_THROW(run.trainer.run(1), InputError);
  EXPECT_THROW(run.trainer.begin_stage(2), InputError);
  EXPECT_THROW(run.trainer.begin_stage(-1), InputError);
}

TEST(Tasks, StepsAndTotals) {
  BATON_NEEDS_DEVICE();
  TaskPlan plan = plan_of(8);
  plan.epochs = 1.5;
  TaskSequence sequence = permuted(2, 50);
  sequence.examples[1].resize(21);
  Training run(plan, sequence, bgd(4, 2), mlp(6), digits(50));
  TaskTrainer& t = run.trainer;
  EXPECT_EQ(t.stages(), 2);
  EXPECT_EQ(t.stage(), -1);
  EXPECT_EQ(t.steps_of(0), 10);  // 9.4
  EXPECT_EQ(t.steps_of(1), 4);   // 3.9
  EXPECT_EQ(t.steps_an_epoch(0), 6);
  EXPECT_EQ(t.steps_an_epoch(1), 3);
  t.begin_stage(0);
  for (int steps : {1, 3, 2}) {
    const EpochTotals e = t.run(steps);
    EXPECT_EQ(e.steps, steps);
    EXPECT_EQ(e.examples, 8 * steps);  // once, however many draws see them
    EXPECT_TRUE(e.loss > 0.5 && e.loss < 10) << e.loss;
    EXPECT_TRUE(e.accuracy >= 0 && e.accuracy <= 1);
  }
  EXPECT_EQ(t.stage_step(), 6);
  t.begin_stage(1);
  EXPECT_EQ(t.stage(), 1);
  EXPECT_EQ(t.stage_step(), 0);
  t.run(2);
  EXPECT_EQ(t.step(), 8);
  EXPECT_EQ(t.stage_step(), 2);
  EXPECT_EQ(t.sequence().tasks(), 2);
  EXPECT_NE(t.pixel_order(1), nullptr);
  EXPECT_EQ(download(run.memory.device(), t.pixel_order(1), 784), sequence.pixel_order[1]);

  sequence = permuted(3, 50);
  sequence.examples.resize(1);
  sequence.probabilities = continuous_schedule(3, 31, 4);
  Training continuous(plan, sequence, bgd(2), mlp(6), digits(50));
  EXPECT_EQ(continuous.trainer.stages(), 1);
  EXPECT_EQ(continuous.trainer.sequence().tasks(), 3);
  EXPECT_EQ(continuous.trainer.steps_of(0), 31);
  continuous.stage(0);
  EXPECT_EQ(Training(plan, plain(20), bgd(2), mlp(6), digits(50)).trainer.pixel_order(0), nullptr);
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
    const TaskSequence sequence = permuted(2, 60);
    Training run(plan_of(batch, eta, 5), sequence, bgd(draws, at_once), mlp(hidden), digits(60));
    Device& device = run.memory.device();
    const ParameterLayout& layout = run.trainer.network().layout();
    const size_t stride = layout.stride();
    uint32_t step = 0;
    for (int stage : {0, 1}) {
      run.trainer.begin_stage(stage);
      for (int i = 0; i < 2; i++) {
        const std::vector<float> mean = download(device, run.trainer.learner().means(), stride),
                                 sd = download(device, run.trainer.learner().deviations(), stride);
        const EpochTotals totals = run.trainer.run(1);
        step++;
        const std::vector<int> images = batch_of(run, batch, sequence.pixel_order[stage], digits(60));
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
          for (int32_t p : sequence.pixel_order[stage])
            x.push_back(double(digits(60).pixels[size_t(n) * 784 + p]) / 255);
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
        const std::vector<float> next_mean = download(device, run.trainer.learner().means(), stride),
                                 next_sd = download(device, run.trainer.learner().deviations(), stride);
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
  for (const bool bayes_by_backprop : {false, true}) {
    std::vector<std::vector<float>> first;
    for (int at_once : {6, 1, 2}) {
      SCOPED_TRACE(at_once);
      TaskPlan plan = plan_of(10, bayes_by_backprop ? 1e-3 : 1);
      plan.kl_weight = 0.1;
      Training run(plan, permuted(1, 50), bayes_by_backprop ? bbb(6, at_once) : bgd(6, at_once), mlp(8), digits(50));
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

// The first step of a call to run() is not a replay, the others are.
TEST(Tasks, AReplayIsTheStep) {
  BATON_NEEDS_DEVICE();
  for (const Kind& kind : kinds()) {
    SCOPED_TRACE(kind.name);
    TaskPlan plan = plan_of(8, kind.lr);
    plan.kl_weight = kind.kl_weight;
    std::vector<std::vector<float>> want;
    for (const std::vector<int>& calls : {std::vector<int>(10, 1), std::vector<int>{10}, {1, 4, 5}, {3, 0, 1, 6}}) {
      Training run(plan, permuted(2, 40), kind.learner, mlp(6), digits(40));
      for (int stage : {0, 1}) {
        run.trainer.begin_stage(stage);
        for (int steps : calls) run.trainer.run(steps);
        run.end_task();
      }
      if (want.empty()) want = run.state();
      EXPECT_EQ(run.state(), want);
    }
  }
}

TEST(Tasks, TheSameSeedIsTheSameRun) {
  BATON_NEEDS_DEVICE();
  for (const Kind& kind : kinds()) {
    SCOPED_TRACE(kind.name);
    TaskPlan plan = plan_of(8, kind.lr), other = plan_of(8, kind.lr, 4);
    Training a(plan, permuted(1, 40), kind.learner, mlp(6), digits(40)),
        b(plan, permuted(1, 40), kind.learner, mlp(6), digits(40)),
        c(other, permuted(1, 40), kind.learner, mlp(6), digits(40));
    expect_same(a.stage(0), b.stage(0));
    c.stage(0);
    EXPECT_EQ(a.state(), b.state());
    EXPECT_NE(a.state()[0], c.state()[0]);
  }
}

// A head that is not in use stays as it is, to the bit, and its gradients are not those of the last task.
TEST(Tasks, HeadsWait) {
  BATON_NEEDS_DEVICE();
  const Images images = for_heads(digits(60));
  for (const auto& [name, learner, lr] :
       {std::tuple("bgd", bgd(4, 2), 1.), {"sgd", point(PointRule::sgd), 0.05}, {"bgd at once", bgd(4), 1.}}) {
    SCOPED_TRACE(name);
    Training run(plan_of(8, lr), by_head(digits(60)), learner, two_heads(), images);
    const auto heads = [&](int head) {
      std::vector<std::vector<float>> all;
      for (const std::string& array : run.trainer.learner().state_arrays())
        for (const char* tensor : {".weight", ".bias"})
          if (array == "mean" || array == "std")
            all.push_back(run.tensor(array, "head" + std::to_string(head) + tensor));
      return all;
    };
    for (int stage : {0, 1, 2}) {
      const int used = stage == 1;
      const auto before = heads(used), waits = heads(1 - used);
      const auto body = run.tensor("mean", "fc1.weight");
      run.stage(stage);
      EXPECT_EQ(heads(1 - used), waits);
      EXPECT_NE(heads(used), before);
      EXPECT_NE(run.tensor("mean", "fc1.weight"), body);
    }
  }
}

// -------------------------------------------------------------------------------------------------------- checkpoints
class TaskCheckpoint : public testing::Test {
 protected:
  void TearDown() override { fs::remove(path_); }
  fs::path path_ = fs::temp_directory_path() / ("baton_tasks_" + std::to_string(::getpid()) + ".safetensors");
};

// Saved in the middle of the second of three tasks, and taken up in a fresh trainer.
TEST_F(TaskCheckpoint, AResumedRunIsTheUninterruptedOne) {
  BATON_NEEDS_DEVICE();
  const Images headed = for_heads(digits(60));
  for (const Kind& kind : kinds())
    for (const bool heads : {false, true}) {
      SCOPED_TRACE(kind.name + std::string(heads ? ", heads" : ", orders of the pixels"));
      TaskPlan plan = plan_of(8, kind.lr);
      plan.kl_weight = kind.kl_weight;
      plan.schedule = Schedule::linear;
      plan.epochs = 1.5;
      const TaskSequence sequence = heads ? by_head(digits(60)) : permuted(3, 60);
      const auto make = [&] {
        return std::make_unique<Training>(plan, sequence, kind.learner, heads ? two_heads() : mlp(6),
                                          heads ? headed : digits(60));
      };
      const auto whole = make();
      whole->stage(0);
      whole->trainer.begin_stage(1);
      whole->trainer.run(3);
      const auto saved = whole->state();
      whole->trainer.save(path_, "this run", "{\"more\": 1}");
      EXPECT_EQ(whole->state(), saved);

      const auto resumed = make();
      EXPECT_EQ(resumed->trainer.restore(path_, "this run"), "{\"more\": 1}");
      EXPECT_EQ(resumed->trainer.stage(), 1);
      EXPECT_EQ(resumed->trainer.stage_step(), 3);
      EXPECT_EQ(resumed->trainer.step(), whole->trainer.step());
      EXPECT_EQ(resumed->state(), saved);
      const auto go_on = [&](Training& run) {
        std::vector<EpochTotals> totals{run.trainer.run(run.trainer.steps_of(1) - 3)};
        run.end_task();
        totals.push_back(run.stage(2));
        return totals;
      };
      const auto a = go_on(*whole), b = go_on(*resumed);
      for (size_t i = 0; i < a.size(); i++) expect_same(a[i], b[i]);
      EXPECT_EQ(resumed->state(), whole->state());
      EXPECT_NE(whole->state(), saved);
    }
}

// As if a signal came, until the end of the block.
struct Signal {
  explicit Signal(int signal) { pretend_signal(signal); }
  ~Signal() { pretend_signal(0); }
};

// Stopped in the middle of an epoch, at its start and at its end, and taken up in fresh trainers.
TEST_F(TaskCheckpoint, AStoppedEpochIsTheUninterruptedOne) {
  BATON_NEEDS_DEVICE();
  const Images headed = for_heads(digits(60));
  for (const Kind& kind : kinds()) {
    SCOPED_TRACE(kind.name);
    TaskPlan plan = plan_of(8, kind.lr);
    plan.kl_weight = kind.kl_weight;
    const auto make = [&] {
      return std::make_unique<Training>(plan, by_head(digits(60)), kind.learner, two_heads(), headed);
    };
    const auto whole = make();
    std::vector<EpochTotals> want, got;
    for (int stage : {0, 1}) want.push_back(whole->stage(stage));
    ASSERT_EQ(want[0].steps, 4);
    ASSERT_EQ(want[0].examples, 32);

    auto run = make();
    const auto stop = [&](int asked, int done) {
      {
        const Signal signal(SIGINT);
        EXPECT_EQ(run->trainer.advance(asked), done);
      }
      run->trainer.save(path_, "this run", "more");
      const auto state = run->state();
      run = make();
      EXPECT_EQ(run->trainer.restore(path_, "this run"), "more");
      EXPECT_EQ(run->state(), state);
    };
    run->trainer.begin_stage(0);
    stop(4, 1);  // the first step of a trainer always runs
    EXPECT_EQ(run->trainer.advance(1), 1);
    stop(2, 1);
    stop(1, 1);
    EXPECT_EQ(run->trainer.stage_step(), 4);
    got.push_back(run->trainer.take_totals());
    stop(0, 0);
    run->end_task();
    run->trainer.begin_stage(1);
    stop(0, 0);
    EXPECT_EQ(run->trainer.advance(2), 2);
    stop(2, 0);
    const int rest = run->trainer.steps_of(1) - 2;
    EXPECT_EQ(run->trainer.advance(rest), rest);
    got.push_back(run->trainer.take_totals());
    run->end_task();
    for (int stage : {0, 1}) expect_same(got[stage], want[stage]);
    EXPECT_EQ(run->state(), whole->state());
    EXPECT_EQ(run->trainer.step(), whole->trainer.step());
  }
}

// How many draws run at once is no part of a run: what was added up goes over.
TEST_F(TaskCheckpoint, TotalsOfOtherDrawsAtOnce) {
  BATON_NEEDS_DEVICE();
  Training two(plan_of(), plain(60), bgd(4, 2), mlp(6), digits(60));
  two.trainer.begin_stage(0);
  two.trainer.advance(3);
  two.trainer.save(path_, "", "");
  two.trainer.advance(2);
  const EpochTotals want = two.trainer.take_totals();
  for (int at_once : {1, 4}) {
    Training other(plan_of(), plain(60), bgd(4, at_once), mlp(6), digits(60));
    other.trainer.restore(path_, "");
    other.trainer.advance(2);
    const EpochTotals got = other.trainer.take_totals();
    EXPECT_EQ(got.steps, 5);
    EXPECT_EQ(got.examples, want.examples);
    EXPECT_NEAR(got.loss, want.loss, 1e-5 * want.loss);
    EXPECT_EQ(got.accuracy, want.accuracy);
  }
}

TEST(Tasks, RunEndsWithTheSignal) {
  BATON_NEEDS_DEVICE();
  Training run(plan_of(), plain(60), bgd(2), mlp(6), digits(60));
  run.trainer.begin_stage(0);
  const Signal signal(SIGTERM);
  try {
    run.trainer.run(4);
    ADD_FAILURE() << "not stopped";
  } catch (const Stopped& e) {
    EXPECT_EQ(e.exit_code(), 143);
    expect_says(e.what(), {"stopped by SIGTERM"});
  }
}

TEST_F(TaskCheckpoint, ContinuousTasksToo) {
  BATON_NEEDS_DEVICE();
  TaskSequence sequence = permuted(3, 60);
  sequence.examples.resize(1);
  sequence.probabilities = continuous_schedule(3, 20, 4);
  Training whole(plan_of(), sequence, bgd(2), mlp(6), digits(60)),
      resumed(plan_of(), sequence, bgd(2), mlp(6), digits(60));
  whole.trainer.begin_stage(0);
  whole.trainer.run(9);
  whole.trainer.save(path_, "", "");
  resumed.trainer.restore(path_, "");
  expect_same(whole.trainer.run(11), resumed.trainer.run(11));
  EXPECT_EQ(resumed.state(), whole.state());
}

// A trainer that has been somewhere else forgets it all when it restores.
TEST_F(TaskCheckpoint, RestoringUndoesWhatCameAfter) {
  BATON_NEEDS_DEVICE();
  const Images headed = for_heads(digits(60));
  for (const Kind& kind : kinds()) {
    SCOPED_TRACE(kind.name);
    TaskPlan plan = plan_of(8, kind.lr);
    plan.kl_weight = kind.kl_weight;
    Training run(plan, by_head(digits(60)), kind.learner, two_heads(), headed);
    run.trainer.begin_stage(0);
    run.trainer.run(2);
    run.trainer.save(path_, "", "");
    const EpochTotals next = run.trainer.run(2);
    const auto after = run.state();
    run.stage(1);
    EXPECT_EQ(run.trainer.restore(path_, ""), "");
    EXPECT_EQ(run.trainer.stage(), 0);
    expect_same(run.trainer.run(2), next);
    EXPECT_EQ(run.state(), after);
  }
}

TEST_F(TaskCheckpoint, NamesShapesAndSchedule) {
  BATON_NEEDS_DEVICE();
  TaskPlan plan = plan_of(10, 0.8);
  plan.schedule = Schedule::steps;
  plan.decay = 0.5;
  plan.decay_epochs = 0.4;
  plan.kl_weight = 0.25;
  plan.epochs = 2;
  Training run(plan, permuted(2, 50), bgd(2), mlp(6), digits(50));
  run.stage(0);
  run.trainer.begin_stage(1);
  // Five steps an epoch, so every two steps the step size is halved; a task begins with it anew.
  for (int step = 1; step <= 7; step++) {
    run.trainer.run(1);
    run.trainer.save(path_, "identity", "more");
    const std::vector<uint8_t> raw = load_safetensors(path_).at("step_state").as<uint8_t>();
    StepState s;
    ASSERT_EQ(raw.size(), sizeof s);
    std::memcpy(static_cast<void*>(&s), raw.data(), sizeof s);
    EXPECT_EQ(s.lr_mean, 0.8f * std::pow(0.5f, float((step - 1) / 2))) << step;
    EXPECT_EQ(s.stage, 1);
    EXPECT_EQ(s.stage_step, step);
    EXPECT_EQ(s.stage_steps, 10);
    EXPECT_EQ(s.step, uint32_t(10 + step));
    EXPECT_EQ(s.part_offset, 50);
    EXPECT_EQ(s.part_size, 50);
    EXPECT_EQ(s.kl_now, 0.25f);
    EXPECT_EQ(s.halted, 0);
  }
  const TensorFile file = load_safetensors(path_);
  const std::map<std::string, std::vector<int64_t>> shapes{
      {"fc1.weight", {6, 784}}, {"fc1.bias", {6}}, {"fc2.weight", {10, 6}}, {"fc2.bias", {10}}};
  for (const auto& [name, shape] : shapes)
    for (const char* array : {"mean", "std"}) {
      EXPECT_EQ(file.at(name + "." + array).shape, shape);
      EXPECT_TRUE(exact(file.at(name + "." + array).as<float>(), run.tensor(array, name)));
    }
  EXPECT_EQ(file.tensors.size(), 11u);  // and the step's state, the totals, and what the trip-wire noted
  const std::map<std::string, std::string> metadata{{"format", "baton-tasks-2"}, {"architecture", "mlp-784-6-10"},
                                                    {"method", "bgd"},           {"stage", "1"},
                                                    {"stage_step", "7"},         {"step", "17"},
                                                    {"plan", "identity"},        {"extra", "more"}};
  EXPECT_EQ(file.metadata, metadata);
}

TEST_F(TaskCheckpoint, RefusesOtherRunsAndDamage) {
  BATON_NEEDS_DEVICE();
  const TaskPlan plan = plan_of();
  Training run(plan, permuted(2, 40), bgd(2), mlp(6), digits(40)),
      fresh(plan, permuted(2, 40), bgd(2), mlp(6), digits(40)),
      witness(plan, permuted(2, 40), bgd(2), mlp(6), digits(40));
  EXPECT_THROW(fresh.trainer.restore(path_, "a"), InputError) << "no file";
  run.stage(0);
  run.trainer.begin_stage(1);
  run.trainer.run(2);
  run.trainer.save(path_, "a", "extra");
  const TensorFile good = load_safetensors(path_);
  for (Training* t : {&fresh, &witness}) {  // somewhere in a run of their own
    t->trainer.begin_stage(0);
    t->trainer.run(3);
  }
  const auto unchanged = [&](const char* what) {
    EXPECT_EQ(fresh.state(), witness.state()) << what;
    EXPECT_EQ(fresh.trainer.stage(), 0) << what;
    EXPECT_EQ(fresh.trainer.stage_step(), 3) << what;
    EXPECT_EQ(fresh.trainer.step(), 3) << what;
  };
  EXPECT_THROW(fresh.trainer.restore(path_, "b"), InputError);
  unchanged("another run");
  const auto refuses = [&](const char* what, auto change) {
    TensorFile file = good;
    change(file);
    save_safetensors(path_, file);
    EXPECT_THROW(fresh.trainer.restore(path_, "a"), InputError) << what;
    unchanged(what);
  };
  using F = TensorFile&;
  refuses("no metadata", [](F f) { f.metadata.clear(); });
  refuses("an older format", [](F f) { f.metadata["format"] = "baton-tasks-1"; });
  refuses("no totals", [](F f) { f.tensors.erase("totals"); });
  for (int bytes : {0, 5})
    refuses("short totals",
            [&](F f) { f.tensors["totals"] = Tensor::of<uint8_t>(std::vector<uint8_t>(bytes), {int64_t(bytes)}); });
  for (const char* key : {"format", "plan", "stage", "stage_step", "step", "extra"})
    refuses(key, [&](F f) { f.metadata.erase(key); });
  for (const char* text : {"2", "-1", "", "x", "1x", "99999999999999999999", "0.5"})
    refuses(text, [&](F f) { f.metadata["stage"] = text; });
  refuses("stage_step", [](F f) { f.metadata["stage_step"] = "6"; });
  refuses("step", [](F f) { f.metadata["step"] = "-3"; });
  refuses("a tensor is missing", [](F f) { f.tensors.erase("fc2.bias.std"); });
  refuses("the first tensor is missing", [](F f) { f.tensors.erase("fc1.weight.mean"); });
  refuses("a tensor is too short",
          [](F f) { f.tensors["fc2.bias.std"] = Tensor::of<float>(std::vector<float>(9), {9}); });
  refuses("a tensor of another type",
          [](F f) { f.tensors["fc2.bias.std"] = Tensor::of<int32_t>(std::vector<int32_t>(10), {10}); });
  refuses("no step state", [](F f) { f.tensors.erase("step_state"); });
  refuses("a short step state",
          [](F f) { f.tensors["step_state"] = Tensor::of<uint8_t>(std::vector<uint8_t>(8), {8}); });
  save_safetensors(path_, good);
  const auto size = fs::file_size(path_);
  for (uintmax_t left : {size - 1, size / 2, uintmax_t(9), uintmax_t(0)}) {
    fs::resize_file(path_, left);
    EXPECT_THROW(fresh.trainer.restore(path_, "a"), InputError) << left;
    unchanged("cut short");
  }
  expect_same(fresh.trainer.run(2), witness.trainer.run(2));
  EXPECT_EQ(fresh.state(), witness.state());

  save_safetensors(path_, good);
  Training other(plan, permuted(2, 40), point(PointRule::sgd), mlp(6), digits(40)),
      wider(plan, permuted(2, 40), bgd(2), mlp(7), digits(40));
  EXPECT_THROW(wider.trainer.restore(path_, "a"), InputError);
  EXPECT_THROW(other.trainer.restore(path_, "a"), InputError) << "a point estimate from a posterior";
  EXPECT_EQ(fresh.trainer.restore(path_, "a"), "extra");
  EXPECT_EQ(fresh.state(), run.state());
}

// ---------------------------------------------------------------------------------------------------- learning at all
TEST(Tasks, LearnsGeneratedDigits) {
  BATON_NEEDS_DEVICE();
  std::vector<Kind> all = kinds();
  for (Kind& kind : all) kind.kl_weight *= 1e-2;
  for (const Kind& kind : all) {
    SCOPED_TRACE(kind.name);
    TaskPlan plan = plan_of(20, kind.lr);
    plan.kl_weight = kind.kl_weight;
    plan.epochs = 6;
    Training run(plan, plain(400), kind.learner, mlp(24), digits(400));
    run.trainer.begin_stage(0);
    const EpochTotals first = run.trainer.run(20);
    run.trainer.run(run.trainer.steps_of(0) - 40);
    const EpochTotals last = run.trainer.run(20);
    EXPECT_LT(last.loss, 0.75 * first.loss) << first.loss;
    EXPECT_GT(last.accuracy, 0.5);
    EXPECT_GT(last.accuracy, first.accuracy);
    EXPECT_EQ(run.trainer.warning(), "");
  }
}

// The first task, after a second one: an anchor keeps the weights nearer to where they were.
TEST(Tasks, AnchorsHold) {
  BATON_NEEDS_DEVICE();
  for (const auto& [rule, anchor, strength, lr] :
       {std::tuple(PointRule::adam, Anchor::path, 3000.f, 1e-3), {PointRule::sgd, Anchor::fisher, 2.f, 0.05}}) {
    SCOPED_TRACE(int(anchor));
    double moved[2];
    for (int held : {0, 1}) {
      TaskPlan plan = plan_of(10, lr);
      plan.epochs = 5;
      Training run(plan, permuted(2, 100), point(rule, anchor, 0, held ? strength : 0.f), mlp(10), digits(100));
      run.stage(0);
      const std::vector<float> before = run.array("mean");
      EXPECT_TRUE(exact(run.array("centre"), before));
      const std::vector<float> importance = run.array("importance");
      EXPECT_GT(*std::max_element(importance.begin(), importance.end()), 0);
      run.trainer.begin_stage(1);
      run.trainer.run(run.trainer.steps_of(1));
      const std::vector<float> after = run.array("mean");
      moved[held] = 0;
      for (size_t i = 0; i < after.size(); i++) moved[held] += importance[i] * std::pow(after[i] - before[i], 2);
    }
    EXPECT_LT(moved[1], 0.8 * moved[0]);
    EXPECT_GT(moved[1], 0);
  }
}

// With decay 0 nothing moves from the second epoch on.
TEST(Tasks, TheStepSchedule) {
  BATON_NEEDS_DEVICE();
  TaskPlan plan = plan_of(10, 0.1);
  plan.schedule = Schedule::steps;
  plan.decay = 0;
  plan.decay_epochs = 1;
  plan.epochs = 3;
  Training run(plan, permuted(2, 50), point(PointRule::sgd), mlp(6), digits(50));
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
// the size of its steps. (Its corrections belong to its moments, not to the task.)
TEST(Tasks, AdamGoesOnOverTasks) {
  BATON_NEEDS_DEVICE();
  Training run(plan_of(10, 1e-3), permuted(2, 200), point(PointRule::adam), mlp(6), digits(200));
  run.trainer.begin_stage(0);
  run.trainer.run(20);
  run.trainer.begin_stage(1);
  const std::vector<float> before = run.array("mean"), m = run.array("mean.m"), v = run.array("mean.v");
  run.trainer.run(1);
  const std::vector<float> after = run.array("mean"), next_m = run.array("mean.m"), next_v = run.array("mean.v");
  EXPECT_GT(difference(m, std::vector<float>(m.size(), 0.f)).worst, 0);  // nothing was restarted
  Doubles want, got;
  for (size_t i = 0; i < m.size(); i++) {
    const double m21 = next_m[i] / (1 - std::pow(0.9, 21)), v21 = next_v[i] / (1 - std::pow(0.999, 21));
    want.push_back(-1e-3 * m21 / (std::sqrt(v21) + 1e-8));
    got.push_back(double(after[i]) - before[i]);
  }
  EXPECT_TRUE(close(got, want, {.l2 = 1e-3, .bias = 1e-2}));
}

// ------------------------------------------------------------------------------------------------------- what diverges
std::string run_error(TaskTrainer& trainer, int steps) {
  try {
    trainer.run(steps);
  } catch (const RunError& e) {
    return e.what();
  }
  return "";
}

// eta sigma0^2 B far above what is known to hold: the run stops with numbers still in its hands, and says what to do.
TEST(Tasks, ARunawaySigmaStopsTheRun) {
  BATON_NEEDS_DEVICE();
  BgdSettings settings;
  settings.draws = 2;
  settings.sigma = 0.1;
  TaskPlan plan = plan_of(100);
  plan.epochs = 1000;
  Training run(plan, plain(400), bgd(settings), mlp(40), digits(400));
  run.trainer.begin_stage(0);
  std::string message, warning;
  for (int i = 0; i < 200 && message.empty(); i++) {
    message = run_error(run.trainer, 2);
    if (warning.empty()) warning = run.trainer.warning();
  }
  expect_says(message, {"task 1", "seed 3", "sigma diverged", "eta sigma0^2 B = 1 x 0.1^2 x 100 = 1", "lower sigma0",
                        "above the 0.46"});
  expect_says(warning, {"eta sigma0^2 B", "lower"});
  auto& learner = dynamic_cast<BgdLearner&>(run.trainer.learner());
  const TripWire wire = learner.trip_wire();
  EXPECT_GT(wire.warned_step, 0);
  EXPECT_LT(wire.warned_step, wire.halted_step);
  EXPECT_GE(wire.halted_largest, 100 * 0.1f);
  for (const auto& array : run.state())
    for (float x : array) ASSERT_TRUE(std::isfinite(x));
  for (float s : run.array("std")) ASSERT_GT(s, 0);
  // It stays where it stopped.
  const auto state = run.state();
  EXPECT_NE(run_error(run.trainer, 3), "");
  EXPECT_EQ(run.state(), state);
}

// Under every method a loss that is not finite stops the run at that step.
TEST(Tasks, ANanStopsTheRun) {
  BATON_NEEDS_DEVICE();
  for (const Kind& kind : kinds()) {
    SCOPED_TRACE(kind.name);
    TaskPlan plan = plan_of(8, kind.lr);
    plan.kl_weight = kind.kl_weight;
    Training run(plan, permuted(2, 40), kind.learner, mlp(6), digits(40));
    run.stage(0);
    run.trainer.begin_stage(1);
    run.trainer.run(1);
    ParameterStore& store = run.trainer.learner().store();
    std::vector<float> bias = run.tensor("mean", "fc2.bias");
    bias[3] = INFINITY;
    store.write(run.memory.device(), "mean", 0, store.layout()[3], bias);
    const auto before = run.state();
    expect_says(run_error(run.trainer, 3), {"task 2", "seed 3", "loss is not finite", "step 7 "});
    EXPECT_EQ(run.state(), before);
  }
}

// A trainer that has diverged can be taken back to a checkpoint from before.
TEST_F(TaskCheckpoint, RestoringAfterADivergence) {
  BATON_NEEDS_DEVICE();
  BgdSettings settings;
  settings.draws = 2;
  settings.sigma = 0.04;
  settings.warn_ratio = 1.0001, settings.halt_ratio = 1.6;
  Training run(plan_of(20), plain(100), bgd(settings), mlp(8), digits(100));
  run.trainer.begin_stage(0);
  run.trainer.run(1);
  run.trainer.save(path_, "", "");
  const EpochTotals next = run.trainer.run(1);
  const auto after = run.state();
  const std::string warning = run.trainer.warning();
  EXPECT_NE(warning, "");
  ParameterStore& store = run.trainer.learner().store();
  std::vector<float> sd = run.tensor("std", "fc2.bias");
  sd[3] = 1;
  store.write(run.memory.device(), "std", 0, store.layout()[3], sd);
  EXPECT_NE(run_error(run.trainer, 1), "");
  run.trainer.restore(path_, "");
  expect_same(run.trainer.run(1), next);
  EXPECT_EQ(run.state(), after);
}

// ------------------------------------------------------------------------------------------------------------- memory
TEST(Tasks, NoGrowthAndNoCopiesOfTheNoise) {
  BATON_NEEDS_DEVICE();
  const int hidden = 64, batch = 10, draws = 10;
  for (int at_once : {10, 1}) {
    SCOPED_TRACE(at_once);
    Training run(plan_of(batch), permuted(2, 50), bgd(draws, at_once), mlp(hidden), digits(50));
    Arena& arena = run.memory.arena();
    const size_t bytes = arena.bytes();
    const size_t row = run.trainer.learner().store().row_bytes();
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
