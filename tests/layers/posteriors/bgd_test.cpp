// Whole trajectories of Bayesian gradient descent against the authors' own (tests/goldens/bgd).
#include <algorithm>
#include <map>

#include "kernels/bgd.h"
#include "kernels/softmax_xent.h"
#include "tests/layers/posteriors/networks.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

std::vector<float> part(const std::vector<float>& all, size_t index, size_t size) {
  return {all.begin() + long(index * size), all.begin() + long((index + 1) * size)};
}
Doubles part(const Doubles& all, size_t index, size_t size) {
  return {all.begin() + long(index * size), all.begin() + long((index + 1) * size)};
}

// A golden run on Baton's layers and update. The state that goes on from step to step is Baton's own: what drifts over
// the whole trajectory counts. Weights are mean + sd * the golden's noise, so gradients are the draws' own and their
// moments are taken here.
class GoldenRun {
 public:
  GoldenRun(const std::string& file, const NetworkFactory& make, std::map<std::string, std::string> names)
      : golden_(golden_file("bgd/" + file)), make_(make), names_(std::move(names)) {
    layout_ = make()->layout();
    draws_ = int(golden_.scalar("K"));
    mean_.assign(layout_.stride(), 0.f), sd_.assign(layout_.stride(), 0.f);
    for (const TensorSpec& t : layout_.tensors()) {
      put(mean_, t, part(golden_.f32("mu." + golden_name(t)), 0, t.size));
      put(sd_, t, std::vector<float>(t.size, float(golden_.scalar("std_init"))));
    }
  }

  void steps() {
    const std::vector<int64_t> batches = golden_.i64("batch_size"), heads = golden_.i64("head"), y = golden_.i64("y");
    const std::vector<float> x = golden_.f32("x");
    const size_t steps = batches.size(), rows = y.size() / steps;
    for (size_t s = 0; s < steps; s++) {
      SCOPED_TRACE(testing::Message() << "step " << s);
      std::vector<int32_t> labels;
      for (int64_t b = 0; b < batches[s]; b++) labels.push_back(int32_t(y[rows * s + b]));
      step(s, part(x, s, x.size() / steps), labels, int(heads[s]));
    }
  }

  void inference() {
    const std::vector<int64_t> y = golden_.i64("y");
    const int batch = int(golden_.i64("batch_size")[0]), head = int(golden_.i64("head")[0]);
    const std::vector<float> all = golden_.f32("x");
    const std::vector<float> x = part(all, 0, all.size() / golden_.i64("batch_size").size());
    std::vector<int32_t> labels(y.begin(), y.begin() + batch);
    const auto run = [&](const std::vector<float>& w, int replicas) {
      Memory memory;
      const auto network = make_();
      Buffer rows(memory, w);
      PointWeights weights(rows, layout_.stride());
      network->prepare({memory.device(), memory.arena(), weights, replicas, batch, /*training*/ false,
                        /*shared_input*/ true});
      network->use_head(head);
      upload(memory.device(), network->input().signal.value, cut(x, network->input().size * batch));
      network->forward({});
      return download(memory.device(), network->logits(), size_t(replicas) * batch * network->classes());
    };
    const std::vector<float> map = run(mean_, 1);
    EXPECT_TRUE(close(map, golden_.f64("test.logits_map"), {.l2 = 2e-6, .bias = 1e-5}));
    const int draws = int(golden_.shape("test.logits_mc")[0]);
    const std::vector<float> mc = run(drawn("test.eps.", 0, draws), draws);
    EXPECT_TRUE(close(mc, golden_.f64("test.logits_mc"), {.l2 = 2e-6, .bias = 1e-5}));

    const int classes = int(map.size()) / batch;
    const auto choice = [&](const auto& values, size_t row) {
      const auto from = values.begin() + long(row * classes);
      return int64_t(std::max_element(from, from + classes) - from);
    };
    std::vector<int64_t> votes(size_t(batch) * classes), pred_map, pred_committee, pred_softmax;
    Doubles softmax(size_t(batch) * classes), accuracy(4);
    for (int b = 0; b < batch; b++) {
      for (int k = 0; k < draws; k++) {
        const size_t row = size_t(k) * batch + b;
        votes[b * classes + choice(mc, row)]++;
        accuracy[1] += double(choice(mc, row) == labels[b]) / (batch * draws);
        double sum = 0;
        for (int c = 0; c < classes; c++) sum += std::exp(double(mc[row * classes + c]));
        for (int c = 0; c < classes; c++) softmax[b * classes + c] += std::exp(double(mc[row * classes + c])) / sum;
      }
      pred_map.push_back(choice(map, b));
      pred_committee.push_back(choice(votes, b));
      pred_softmax.push_back(choice(softmax, b));
      accuracy[0] += double(pred_map[b] == labels[b]) / batch;
      accuracy[2] += double(pred_committee[b] == labels[b]) / batch;
      accuracy[3] += double(pred_softmax[b] == labels[b]) / batch;
    }
    EXPECT_EQ(votes, golden_.i64("test.votes"));
    EXPECT_EQ(pred_map, golden_.i64("test.pred_map"));
    EXPECT_EQ(pred_committee, golden_.i64("test.pred_committee"));
    EXPECT_EQ(pred_softmax, golden_.i64("test.pred_aggsoftmax"));
    const Doubles want = golden_.f64("test.acc");
    for (int i = 0; i < 4; i++) EXPECT_NEAR(accuracy[i], want[i], 1e-12) << i;
  }

 private:
  // "fc1.weight" is the golden's "layer1.0.weight" by names_["fc1"] = "layer1.0".
  std::string golden_name(const TensorSpec& t) const {
    const size_t dot = t.name.rfind('.');
    const auto found = names_.find(t.name.substr(0, dot));
    return (found == names_.end() ? t.name.substr(0, dot) : found->second) + t.name.substr(dot);
  }
  static void put(std::vector<float>& to, const TensorSpec& t, const std::vector<float>& values) {
    ASSERT_EQ(values.size(), t.size);
    std::copy(values.begin(), values.end(), to.begin() + long(t.offset));
  }
  static std::vector<float> cut(const std::vector<float>& x, size_t size) {
    return {x.begin(), x.begin() + long(size)};
  }
  std::vector<float> of(const std::vector<float>& row, const TensorSpec& t) const {
    return {row.begin() + long(t.offset), row.begin() + long(t.offset + t.size)};
  }
  // mean + sd * noise, of the golden's noise of one step.
  std::vector<float> drawn(const std::string& prefix, size_t step, int draws) {
    std::vector<float> w(layout_.stride() * draws, 0.f);
    noise_.assign(w.size(), 0.f);
    for (const TensorSpec& t : layout_.tensors()) {
      const std::vector<float> e = golden_.f32(prefix + golden_name(t));
      for (int k = 0; k < draws; k++)
        for (size_t i = 0; i < t.size; i++) {
          const size_t at = layout_.stride() * k + t.offset + i;
          noise_[at] = e[(step * draws + k) * t.size + i];
          w[at] = mean_[t.offset + i] + sd_[t.offset + i] * noise_[at];
        }
    }
    return w;
  }

  void step(size_t s, const std::vector<float>& x, const std::vector<int32_t>& labels, int head) {
    Memory memory;
    const int batch = int(labels.size());
    const size_t stride = layout_.stride();
    const auto network = make_();
    ParameterStore store(memory.arena(), layout_, draws_);
    StoreWeights weights(store, false);
    network->prepare({memory.device(), memory.arena(), weights, draws_, batch, /*training*/ true,
                      /*shared_input*/ true});
    network->use_head(head);
    upload(memory.device(), network->input().signal.value, cut(x, network->input().size * batch));
    upload(memory.device(), store.at("mean"), drawn("eps.", s, draws_));
    Buffer label(memory, labels);
    Buffer<float> loss(memory, size_t(batch) * draws_), hit(memory, size_t(batch) * draws_);
    network->forward({});
    softmax_cross_entropy(loss, hit, network->logits_gradient(), network->logits(), label, draws_, batch,
                          network->classes(), 1.f, memory.stream(), true);
    network->backward({});

    const std::vector<float> losses = loss.host();
    Doubles mean_loss(draws_);
    for (size_t i = 0; i < losses.size(); i++) mean_loss[i / batch] += double(losses[i]) / batch;
    EXPECT_TRUE(close(mean_loss, part(golden_.f64("loss"), s, draws_), {.l2 = 2e-6}));

    const std::vector<float> g = download(memory.device(), store.at("mean.grad"), stride * draws_);
    Doubles sum(stride), sum_noise(stride);
    for (size_t at = 0; at < g.size(); at++) {
      sum[at % stride] += g[at];
      sum_noise[at % stride] += double(g[at]) * noise_[at];
    }
    const std::string idle = network->heads() > 1 ? "last." + std::to_string(1 - head) : "";
    for (const TensorSpec& t : layout_.tensors()) {
      SCOPED_TRACE(t.name);
      Doubles e1(t.size), e2(t.size);
      for (size_t i = 0; i < t.size; i++) e1[i] = sum[t.offset + i] / draws_, e2[i] = sum_noise[t.offset + i] / draws_;
      const Doubles want1 = part(golden_.f64("egrad." + golden_name(t)), s, t.size),
                    want2 = part(golden_.f64("egradeps." + golden_name(t)), s, t.size);
      if (begins_with(t.name, idle)) {
        EXPECT_TRUE(exact(e1, want1));
        EXPECT_TRUE(exact(e2, want2));
        continue;
      }
      EXPECT_TRUE(close(e1, want1, {.l2 = 5e-6, .bias = 2e-5}));
      EXPECT_TRUE(close(e2, want2, {.l2 = 5e-6, .bias = 2e-5}));
    }

    Buffer mean(memory, mean_), sd(memory, sd_), moments(memory, floats(sum)), noise_moments(memory, floats(sum_noise));
    StepState state = state_of(1, uint32_t(s + 1));
    state.lr_mean = float(golden_.scalar("eta"));
    Buffer states(memory, std::vector<StepState>(draws_, state));
    Buffer<SigmaStatistics> statistics(memory, 1);
    Buffer<TripWire> wire(memory, 1);
    Buffer<float> partial(memory, bgd_partials(int(stride)));
    BgdRule rule;
    rule.gradient_scale = 1.f / float(draws_);
    rule.initial_sd = float(golden_.scalar("std_init"));
    bgd_update(mean, sd, {moments, noise_moments}, int(stride), rule, statistics, wire, states, draws_, partial,
               memory.stream());
    const std::vector<float> before_mean = mean_, before_sd = sd_;
    mean_ = mean.host(), sd_ = sd.host();
    EXPECT_EQ(statistics.host()[0].nonfinite, 0);
    EXPECT_EQ(statistics.host()[0].weights, int(layout_.parameters()));
    for (const TensorSpec& t : layout_.tensors()) {
      SCOPED_TRACE(t.name);
      const Doubles mu = part(golden_.f64("mu." + golden_name(t)), s + 1, t.size),
                    sigma = part(golden_.f64("sigma." + golden_name(t)), s + 1, t.size);
      const std::vector<float> got_mu = of(mean_, t), got_sigma = of(sd_, t);
      for (size_t i = 0; i < t.size; i++) {
        ASSERT_NEAR(got_mu[i], mu[i], 5e-7) << i;
        ASSERT_NEAR(got_sigma[i] / sigma[i], 1, 2e-6) << i;
      }
      if (begins_with(t.name, idle)) {
        EXPECT_TRUE(exact(got_mu, of(before_mean, t)));
        EXPECT_TRUE(exact(got_sigma, of(before_sd, t)));
      } else {
        EXPECT_FALSE(exact(got_mu, of(before_mean, t)));
        EXPECT_FALSE(exact(got_sigma, of(before_sd, t)));
      }
    }
  }

  Npz golden_;
  NetworkFactory make_;
  std::map<std::string, std::string> names_;
  ParameterLayout layout_;
  int draws_;
  std::vector<float> mean_, sd_, noise_;
};

TEST(LearnerGoldens, APerceptronsWholeTrajectory) {
  BATON_NEEDS_DEVICE();
  GoldenRun run("mlp_small_f64", perceptron(36, {24, 24}, 10),
                {{"fc1", "layer1.0"}, {"fc2", "layer2.0"}, {"fc3", "last_layer.0"}});
  run.steps();
  run.inference();
}

TEST(LearnerGoldens, AConvolutionalNetworksWithHeads) {
  BATON_NEEDS_DEVICE();
  GoldenRun run("conv_heads_f64", convolutional_heads, {});
  run.steps();
  run.inference();
}

}  // namespace
}  // namespace baton::test
