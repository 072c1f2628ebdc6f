// Predictions against a network's own forward passes, and what a signal leaves of them.
#include "trainers/predictor.h"

#include <csignal>

#include "engine/io/stop.h"
#include "engine/io/synthetic.h"
#include "kernels/gaussian.h"
#include "tests/support/device.h"
#include "tests/support/small_network.h"
#include "trainers/device_data.h"

namespace baton::test {
namespace {

constexpr int images = 23, classes = 10;

NetworkFactory small() {
  return [] { return std::make_unique<SmallNetwork>(); };
}

// Digits on the device, and a posterior of `replicas` networks.
struct Bench {
  explicit Bench(const std::string& kind, int replicas = 1)
      : digits(generate_digits(images, 4)),
        set(upload_images(memory.device(), memory.arena(), digits, unit_range)),
        posterior(make_posterior(
            memory.device(), memory.arena(), SmallNetwork().layout(), kind,
            std::vector<json>(size_t(replicas), kind == "ft" ? json::object() : json{{"init_log_std", -2.5}}))) {
    std::vector<StepState> all;
    for (int r = 0; r < replicas; r++) all.push_back(state_of(uint64_t(r), 0));
    Buffer<StepState> states(memory, all);
    posterior->initialise(states);
  }
  Predictions predict(int samples, uint64_t seed = 1, int at_once = 0, int batch = 0, int replica = 0) {
    Predictor predictor(memory.device(), memory.arena(), small(), set, at_once, batch);
    EXPECT_EQ(predictor.images(), images);
    return predictor.predict(*posterior, replica, samples, seed);
  }
  // The softmax of every image for given weights, in double from the network's own logits.
  Doubles softmax(const float* weights) {
    SmallNetwork network;
    PointWeights source(weights, network.layout().stride());
    network.prepare({memory.device(), memory.arena(), source, 1, images, /*training*/ false, /*shared_input*/ true});
    std::vector<float> x;
    for (uint8_t pixel : digits.pixels) x.push_back(float(pixel) / 255);
    upload(memory.device(), network.input().signal.value, x);
    network.forward({});
    const auto logits = download(memory.device(), network.logits(), size_t(images) * classes);
    Doubles p;
    for (int i = 0; i < images; i++) {
      double sum = 0;
      for (int c = 0; c < classes; c++) sum += std::exp(double(logits[i * classes + c]));
      for (int c = 0; c < classes; c++) p.push_back(std::exp(double(logits[i * classes + c])) / sum);
    }
    return p;
  }

  Memory memory;
  Images digits;
  DeviceImages set;
  std::unique_ptr<Posterior> posterior;
};

Doubles entropies(const Doubles& p) {
  Doubles h(p.size() / classes, 0);
  for (size_t i = 0; i < p.size(); i++) h[i / classes] -= p[i] > 0 ? p[i] * std::log(p[i]) : 0;
  return h;
}
Doubles square_sums(const Doubles& p) {
  Doubles sums(p.size() / classes, 0);
  for (size_t i = 0; i < p.size(); i++) sums[i / classes] += p[i] * p[i];
  return sums;
}

TEST(Predictor, AtTheMeanIsOneForwardPass) {
  BATON_NEEDS_DEVICE();
  for (const char* kind : {"ffg", "ft"}) {
    Bench bench(kind);
    const Predictions got = bench.predict(0);
    const Doubles want = bench.softmax(bench.posterior->store().at("mean"));
    ASSERT_EQ(got.probability.size(), size_t(images) * classes);
    EXPECT_TRUE(close(got.probability, want, {.l2 = 2e-6}));
    EXPECT_TRUE(close(got.entropy, entropies(want), {.l2 = 2e-6}));
    for (float information : got.mutual_information) EXPECT_NEAR(information, 0, 1e-6);
    EXPECT_TRUE(exact(got.epistemic_variance, std::vector<float>(images, 0)));
    Doubles aleatoric = square_sums(want);
    for (double& v : aleatoric) v = 1 - v;
    EXPECT_TRUE(close(got.aleatoric_variance, aleatoric, {.l2 = 2e-6}));
    if (bench.posterior->uncertain()) continue;
    const Predictions sampled = bench.predict(5);  // a point posterior has nothing to sample
    EXPECT_TRUE(exact(sampled.probability, got.probability));
    EXPECT_TRUE(exact(sampled.mutual_information, got.mutual_information));
    EXPECT_TRUE(exact(sampled.aleatoric_variance, got.aleatoric_variance));
    EXPECT_TRUE(exact(sampled.epistemic_variance, got.epistemic_variance));
  }
}

TEST(Predictor, AveragesOverDraws) {
  BATON_NEEDS_DEVICE();
  Bench bench("ffg", 2);
  const int samples = 7;
  const ParameterStore& store = bench.posterior->store();
  const size_t stride = store.layout().stride();
  for (int replica : {0, 1}) {
    Buffer<float> draws(bench.memory, stride * samples);
    sample_weights(draws, store.at("mean") + stride * replica, 0, store.at("variance") + stride * replica, int(stride),
                   stride, 0, samples, key_of(3, 7), bench.memory.stream());
    Doubles mean(size_t(images) * classes, 0), entropy(images, 0), squares(images, 0);
    for (int s = 0; s < samples; s++) {
      const Doubles p = bench.softmax(draws + stride * s), h = entropies(p);
      for (size_t i = 0; i < p.size(); i++) mean[i] += p[i] / samples;
      const Doubles q = square_sums(p);
      for (size_t i = 0; i < h.size(); i++) entropy[i] += h[i] / samples, squares[i] += q[i] / samples;
    }
    const Doubles total = entropies(mean), mean_squares = square_sums(mean);
    Doubles information, aleatoric, epistemic;
    for (int i = 0; i < images; i++) {
      information.push_back(total[i] - entropy[i]);
      aleatoric.push_back(1 - squares[i]);
      epistemic.push_back(squares[i] - mean_squares[i]);
    }
    const Predictions got = bench.predict(samples, 3, 0, 0, replica);
    EXPECT_TRUE(close(got.probability, mean, {.l2 = 2e-6}));
    EXPECT_TRUE(close(got.entropy, total, {.l2 = 2e-6}));
    EXPECT_TRUE(close(got.mutual_information, information, {.l2 = 1e-4}));
    EXPECT_TRUE(close(got.aleatoric_variance, aleatoric, {.l2 = 2e-6}));
    EXPECT_TRUE(close(got.epistemic_variance, epistemic, {.l2 = 1e-4}));
  }
}

TEST(Predictor, DoesNotDependOnHowTheWorkIsCut) {
  BATON_NEEDS_DEVICE();
  Bench bench("ffg");
  const int samples = 7;
  const Predictions want = bench.predict(samples, 3, 1, images);
  for (int at_once : {1, 2, 7, 9, 0})
    for (int batch : {images, 1, 5, 22, 100, 0}) {
      SCOPED_TRACE(testing::Message() << at_once << " draws and " << batch << " images at once");
      const Predictions got = bench.predict(samples, 3, at_once, batch);
      EXPECT_TRUE(close(got.probability, want.probability, {.l2 = 1e-6}));
      EXPECT_TRUE(close(got.entropy, want.entropy, {.l2 = 1e-6}));
      EXPECT_TRUE(close(got.mutual_information, want.mutual_information, {.l2 = 1e-4}));
      EXPECT_TRUE(close(got.aleatoric_variance, want.aleatoric_variance, {.l2 = 1e-6}));
      EXPECT_TRUE(close(got.epistemic_variance, want.epistemic_variance, {.l2 = 1e-4}));
      if (!on_gpu && batch == images) {  // draws side by side are the same products
        EXPECT_TRUE(exact(got.probability, want.probability));
        EXPECT_TRUE(exact(got.entropy, want.entropy));
        EXPECT_TRUE(exact(got.mutual_information, want.mutual_information));
        EXPECT_TRUE(exact(got.aleatoric_variance, want.aleatoric_variance));
        EXPECT_TRUE(exact(got.epistemic_variance, want.epistemic_variance));
      }
    }
}

TEST(Predictor, APredictorServesManyTimes) {
  BATON_NEEDS_DEVICE();
  Bench bench("ffg", 2);
  Predictor predictor(bench.memory.device(), bench.memory.arena(), small(), bench.set, 2, 10);
  const Predictions first = predictor.predict(*bench.posterior, 0, 5, 3);
  bench.memory.arena().freeze();
  const Predictions other_replica = predictor.predict(*bench.posterior, 1, 5, 3);
  const Predictions other_seed = predictor.predict(*bench.posterior, 0, 5, 4);
  const Predictions mean = predictor.predict(*bench.posterior, 0, 0, 3);
  const Predictions again = predictor.predict(*bench.posterior, 0, 5, 3);
  EXPECT_TRUE(exact(again.probability, first.probability));
  EXPECT_TRUE(exact(again.entropy, first.entropy));
  EXPECT_TRUE(exact(again.mutual_information, first.mutual_information));
  EXPECT_TRUE(exact(again.aleatoric_variance, first.aleatoric_variance));
  EXPECT_TRUE(exact(again.epistemic_variance, first.epistemic_variance));
  EXPECT_FALSE(exact(other_replica.probability, first.probability));
  EXPECT_FALSE(exact(other_seed.probability, first.probability));
  EXPECT_FALSE(exact(mean.probability, first.probability));
}

TEST(Predictor, ProbabilitiesAndInformation) {
  BATON_NEEDS_DEVICE();
  Bench bench("ffg");
  for (int samples : {0, 1, 20}) {
    const Predictions p = bench.predict(samples);
    ASSERT_EQ(p.probability.size(), size_t(images) * classes);
    ASSERT_EQ(p.entropy.size(), size_t(images));
    ASSERT_EQ(p.mutual_information.size(), size_t(images));
    ASSERT_EQ(p.aleatoric_variance.size(), size_t(images));
    ASSERT_EQ(p.epistemic_variance.size(), size_t(images));
    double most = 0, most_variance = 0;
    for (int i = 0; i < images; i++) {
      double sum = 0, variance = 0;
      for (int c = 0; c < classes; c++) {
        const double q = p.probability[i * classes + c];
        sum += q, variance += q * (1 - q);
      }
      EXPECT_NEAR(sum, 1, 1e-5);
      EXPECT_NEAR(double(p.aleatoric_variance[i]) + p.epistemic_variance[i], variance, 1e-6);
      EXPECT_GE(p.aleatoric_variance[i], 0);
      EXPECT_GE(p.epistemic_variance[i], 0);
      EXPECT_GE(p.mutual_information[i], 0);
      EXPECT_LE(p.mutual_information[i], p.entropy[i] + 1e-6);
      EXPECT_LE(p.entropy[i], std::log(double(classes)) + 1e-6);
      most = std::max(most, double(p.mutual_information[i]));
      most_variance = std::max(most_variance, double(p.epistemic_variance[i]));
    }
    if (samples > 1) {
      EXPECT_GT(most, 0.01);
      EXPECT_GT(most_variance, 1e-3);
    } else {
      EXPECT_EQ(most_variance, 0);
      EXPECT_NEAR(most, 0, 1e-6);
    }
  }
}

// ------------------------------------------------------------------------------------------------------- signals
struct TakeBack {  // the pretended signal, whatever a test does
  ~TakeBack() { pretend_signal(0); }
};
template <class F>
void expect_stopped(F predict) {
  try {
    predict();
    ADD_FAILURE() << "not stopped";
  } catch (const Stopped& e) {
    EXPECT_EQ(e.exit_code(), 128 + SIGTERM);
    EXPECT_EQ(e.exit_code(), 143);
    EXPECT_STREQ(e.what(), "stopped by SIGTERM: a prediction was under way");
  }
}

TEST(Predictor, StopsOnASignal) {
  BATON_NEEDS_DEVICE();
  const TakeBack take_back;
  Bench bench("ffg");
  Predictor predictor(bench.memory.device(), bench.memory.arena(), small(), bench.set, 2, 10);
  const Predictions want = predictor.predict(*bench.posterior, 0, 5, 3);
  for (int samples : {0, 5}) {
    pretend_signal(SIGTERM);
    expect_stopped([&] { predictor.predict(*bench.posterior, 0, samples, 3); });
    pretend_signal(0);
    const Predictions again = predictor.predict(*bench.posterior, 0, 5, 3);
    EXPECT_TRUE(exact(again.probability, want.probability));
    EXPECT_TRUE(exact(again.epistemic_variance, want.epistemic_variance));
  }
}

// A network in whose pass number `at` (from 1) the signal comes; 0: never.
struct Interrupted : SmallNetwork {
  Interrupted(int& passes, const int& at) : passes(passes), at(at) {}
  void forward_layers(const Pass& pass) override {
    SmallNetwork::forward_layers(pass);
    if (++passes == at) pretend_signal(SIGTERM);
  }
  int& passes;
  const int& at;
};
// Draws that are all zeros, counted.
const PosteriorKind counted_kind{"counted", "draws that are counted", {}, nullptr};
struct CountedDraws : Posterior {
  CountedDraws(Memory& memory, const ParameterLayout& layout)
      : Posterior({memory.device(), memory.arena(), layout, counted_kind, {json::object()}}) {}
  void initialise(const StepState*) override {}
  bool begin_stage(bool, Replicas) override { return false; }
  void step(StepState*) override {}
  void sample(float* w, int, int, int count, Key) override {
    fill_zero(device_, w, store_.row_bytes() * size_t(count));
    drawn += count;
  }
  void mean_weights(float* w, int) override { fill_zero(device_, w, store_.row_bytes()); }
  std::unique_ptr<Estimator> make_estimator(Linear&, const LayerContext&) override { return nullptr; }
  int drawn = 0;
};

TEST(Predictor, StopsBetweenBatchesAndBetweenDraws) {
  BATON_NEEDS_DEVICE();
  const TakeBack take_back;
  Bench bench("ffg");
  CountedDraws posterior(bench.memory, SmallNetwork().layout());
  int passes = 0, at = 0;
  Predictor predictor(
      bench.memory.device(), bench.memory.arena(), [&] { return std::make_unique<Interrupted>(passes, at); }, bench.set,
      1, 5);
  constexpr int batches = 5, samples = 3;
  const auto expect = [&](int draws, int signal_in, int expected_passes, int expected_draws) {
    SCOPED_TRACE(testing::Message() << draws << " draws, the signal in pass " << signal_in);
    passes = posterior.drawn = 0, at = signal_in;
    expect_stopped([&] { predictor.predict(posterior, 0, draws, 1); });
    EXPECT_EQ(passes, expected_passes);
    EXPECT_EQ(posterior.drawn, expected_draws);
    pretend_signal(0);
  };
  pretend_signal(SIGTERM);
  expect(samples, 0, 0, 0);  // before the first draw
  for (int draws : {0, samples}) expect(draws, 2, 2, draws ? 1 : 0);
  expect(samples, batches, batches, 1);  // in the last batch of the first draw: no second one is made
  expect(samples, batches + 3, batches + 3, 2);
  passes = posterior.drawn = 0, at = samples * batches;  // too late to matter: nothing is left to do
  const Predictions p = predictor.predict(posterior, 0, samples, 1, /*choices*/ true);
  EXPECT_EQ(passes, samples * batches);
  EXPECT_EQ(posterior.drawn, samples);
  EXPECT_EQ(p.chosen, std::vector<uint8_t>(size_t(samples) * images, 0));
  for (float v : p.aleatoric_variance) EXPECT_NEAR(v, 0.9, 1e-6);
}

}  // namespace
}  // namespace baton::test
