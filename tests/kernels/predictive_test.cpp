#include "kernels/predictive.h"

#include <algorithm>
#include <array>
#include <random>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"
#include "tests/support/npz.h"

namespace baton::test {
namespace {

struct Moments {
  std::vector<float> probability, entropy, information, probability_sum, entropy_sum;
  std::vector<float> square_sum, aleatoric, epistemic;  // as they were, NaN, without variances
};

// The samples go in by calls of `cuts` samples each.
Moments run(const std::vector<float>& logits, const std::vector<int>& cuts, int batch, int classes,
            bool in_place = false, bool variances = true) {
  Memory memory;
  Buffer x(memory, logits);
  Buffer<float> probability_sum(memory, size_t(batch) * classes), entropy_sum(memory, batch);
  Buffer<float> probability(memory, size_t(batch) * classes, NAN), entropy(memory, batch, NAN),
      information(memory, batch, NAN), split(memory, size_t(batch) * 2, NAN),
      square_sum(memory, batch, variances ? 0 : NAN);
  int samples = 0;
  for (int cut : cuts) {
    accumulate_predictions(probability_sum, entropy_sum, x.data() + size_t(samples) * batch * classes, cut, batch,
                           classes, memory.stream(), variances ? square_sum.data() : nullptr);
    samples += cut;
  }
  Moments m;
  m.probability_sum = probability_sum.host(), m.entropy_sum = entropy_sum.host();
  finish_predictions(in_place ? probability_sum : probability, entropy, information, probability_sum, entropy_sum,
                     samples, batch, classes, memory.stream(), variances ? split.data() : nullptr, square_sum);
  m.probability = in_place ? probability_sum.host() : probability.host();
  m.entropy = entropy.host(), m.information = information.host(), m.square_sum = square_sum.host();
  const std::vector<float> both = split.host();
  m.aleatoric.assign(both.begin(), both.begin() + batch), m.epistemic.assign(both.begin() + batch, both.end());
  return m;
}

struct Reference {
  std::vector<double> probability, entropy, information, entropy_sum, square_sum, aleatoric, epistemic;
};
double entropy_of(const std::vector<double>& p) {
  double h = 0;
  for (double v : p) h -= v > 0 ? v * std::log(v) : 0;
  return h;
}
Reference reference(const std::vector<float>& logits, int samples, int batch, int classes) {
  Reference r;
  for (int b = 0; b < batch; b++) {
    std::vector<double> mean(classes);
    double entropies = 0, squares = 0, mean_squares = 0, variance = 0;
    for (int s = 0; s < samples; s++) {
      const float* x = &logits[(size_t(s) * batch + b) * classes];
      std::vector<double> p(classes);
      double top = -INFINITY, z = 0;
      for (int c = 0; c < classes; c++) top = std::max(top, double(x[c]));
      for (int c = 0; c < classes; c++) z += p[c] = std::exp(x[c] - top);
      for (int c = 0; c < classes; c++) mean[c] += (p[c] /= z) / samples;
      entropies += entropy_of(p);
      for (double v : p) squares += v * v;
    }
    for (double v : mean) mean_squares += v * v, variance += v * (1 - v);
    r.probability.insert(r.probability.end(), mean.begin(), mean.end());
    r.entropy.push_back(entropy_of(mean));
    r.information.push_back(entropy_of(mean) - entropies / samples);
    r.entropy_sum.push_back(entropies);
    r.square_sum.push_back(squares);
    r.epistemic.push_back(squares / samples - mean_squares);
    r.aleatoric.push_back(variance - r.epistemic.back());  // the two are the variance of the class
  }
  return r;
}

std::vector<float> normals(size_t n, float spread, int seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> v(n);
  for (float& x : v) x = normal(random);
  return v;
}

void check_against_reference(int samples, int batch, int classes, float spread) {
  SCOPED_TRACE(testing::Message() << "[" << samples << "][" << batch << "][" << classes << "] spread " << spread);
  const std::vector<float> logits = normals(size_t(samples) * batch * classes, spread, classes);
  const Moments got = run(logits, {samples}, batch, classes);
  const Reference want = reference(logits, samples, batch, classes);
  EXPECT_TRUE(close(got.probability, want.probability, {.l2 = 5e-7}));
  EXPECT_TRUE(close(got.entropy, want.entropy, {.l2 = 5e-7}));
  EXPECT_TRUE(close(got.entropy_sum, want.entropy_sum, {.l2 = 1e-6}));
  for (int b = 0; b < batch; b++) {
    EXPECT_NEAR(got.information[b], want.information[b], 3e-6) << b;
    EXPECT_NEAR(got.aleatoric[b], want.aleatoric[b], 1e-6) << b;
    EXPECT_NEAR(got.epistemic[b], want.epistemic[b], 1e-6) << b;
    if (samples == 1) {
      EXPECT_EQ(got.epistemic[b], 0.f) << b;
    }
  }
  EXPECT_TRUE(close(got.square_sum, want.square_sum, {.l2 = 1e-6}));
  const std::string name = "predictive." + std::to_string(samples) + "x" + std::to_string(batch) + "x" +
                           std::to_string(classes) + "." + std::to_string(int(spread));
  record(name + ".probability", got.probability);
  record(name + ".entropy", got.entropy);
  record(name + ".aleatoric", got.aleatoric, 1e-5f);
  if (samples > 1) record(name + ".information", got.information, 1e-5f);  // of one sample it is rounding
}

TEST(Predictive, SmallExact) {
  BATON_NEEDS_DEVICE();
  // Uniform, and all in one class (0 ln 0 = 0).
  const float inf = INFINITY;
  const Moments m = run({5, 5, 5, 5, -200, 300, 0, 0, -inf, -inf, 7, -inf}, {1}, 3, 4);
  EXPECT_TRUE(exact(m.probability, std::vector<float>{.25, .25, .25, .25, 0, 1, 0, 0, 0, 0, 1, 0}));
  EXPECT_FLOAT_EQ(m.entropy[0], std::log(4.f));
  EXPECT_EQ(m.entropy[1], 0.f);
  EXPECT_EQ(m.entropy[2], 0.f);
  EXPECT_TRUE(exact(m.information, std::vector<float>{0, 0, 0}));
  EXPECT_TRUE(exact(m.aleatoric, std::vector<float>{.75, 0, 0}));
  EXPECT_TRUE(exact(m.epistemic, std::vector<float>{0, 0, 0}));
  // Two certain samples that disagree: one bit, all of it about the weights.
  const Moments two = run({100, -100, -100, 100}, {2}, 1, 2);
  EXPECT_TRUE(exact(two.probability, std::vector<float>{.5, .5}));
  EXPECT_FLOAT_EQ(two.entropy[0], std::log(2.f));
  EXPECT_FLOAT_EQ(two.information[0], std::log(2.f));
  EXPECT_EQ(two.aleatoric[0], 0.f);
  EXPECT_EQ(two.epistemic[0], .5f);
  // A sample that does not know, (1/2, 1/2), and a certain one, (1, 0): the mean's variance 3/8 is 1/4 and 1/8. And two
  // that do not know: 1/2 and 0.
  const Moments mixed = run({3, 3, -1, -1, 200, 0, 7, 7}, {1, 1}, 2, 2);
  EXPECT_TRUE(exact(mixed.square_sum, std::vector<float>{1.5, 1}));
  EXPECT_TRUE(exact(mixed.aleatoric, std::vector<float>{.25, .5}));
  EXPECT_TRUE(exact(mixed.epistemic, std::vector<float>{.125, 0}));
}

TEST(Predictive, SmallWithoutVariances) {
  BATON_NEEDS_DEVICE();
  for (int classes : {10, 3}) {
    const std::vector<float> logits = normals(2 * 3 * classes, 2, 8);
    for (bool in_place : {false, true}) {
      const Moments with = run(logits, {2}, 3, classes, in_place),
                    without = run(logits, {2}, 3, classes, in_place, false);
      EXPECT_TRUE(exact(without.probability, with.probability));
      EXPECT_TRUE(exact(without.probability_sum, with.probability_sum));
      EXPECT_TRUE(exact(without.entropy, with.entropy));
      EXPECT_TRUE(exact(without.entropy_sum, with.entropy_sum));
      EXPECT_TRUE(exact(without.information, with.information));
      for (const auto* untouched : {&without.square_sum, &without.aleatoric, &without.epistemic})
        EXPECT_TRUE(exact(*untouched, std::vector<float>(3, NAN)));
    }
  }
}

TEST(Predictive, OneSampleHasNoEpistemicVariance) {
  BATON_NEEDS_DEVICE();
  for (int classes : {2, 10, 33, 100})
    EXPECT_TRUE(exact(run(normals(50 * classes, 3, 5), {1}, 50, classes).epistemic, std::vector<float>(50, 0)));
}

TEST(Predictive, SmallAgainstReference) {
  BATON_NEEDS_DEVICE();
  check_against_reference(3, 2, 10, 2);
}

TEST(Predictive, AgainstReference) {
  BATON_NEEDS_DEVICE();
  check_against_reference(1, 5, 10, 1);
  check_against_reference(100, 9, 10, 3);
  check_against_reference(20, 6, 2, 10);
  check_against_reference(10, 4, 33, 1);
  check_against_reference(10, 4, 100, 5);
}

TEST(Predictive, Golden) {
  BATON_NEEDS_DEVICE();
  const Npz golden(golden_file("layers/predict_average"));
  const auto shape = golden.shape("out_logits");
  const int samples = int(shape[0]), batch = int(shape[1]), classes = int(shape[2]);
  const Moments m = run(golden.f32("out_logits"), {samples}, batch, classes);
  EXPECT_TRUE(close(m.probability, golden.f64("out_prob_mean"), {.l2 = 1e-6}));
  EXPECT_TRUE(close(m.entropy, golden.f64("out_entropy"), {.l2 = 1e-6}));
  EXPECT_TRUE(close(m.information, golden.f64("out_mutual_information"), {.l2 = 1e-5}));
  record("predictive.golden", m.probability);
}

TEST(Predictive, SamplesMayComeInAnyCuts) {
  BATON_NEEDS_DEVICE();
  for (int classes : {10, 7}) {
    const std::vector<float> logits = normals(7 * 3 * classes, 4, 9);
    const Moments whole = run(logits, {7}, 3, classes), cut = run(logits, {3, 1, 3}, 3, classes);
    EXPECT_TRUE(exact(cut.probability_sum, whole.probability_sum));
    EXPECT_TRUE(exact(cut.entropy_sum, whole.entropy_sum));
    EXPECT_TRUE(exact(cut.information, whole.information));
    EXPECT_TRUE(exact(cut.square_sum, whole.square_sum));
    EXPECT_TRUE(exact(cut.aleatoric, whole.aleatoric));
    EXPECT_TRUE(exact(cut.epistemic, whole.epistemic));
  }
}

TEST(Predictive, MomentsAreConsistent) {
  BATON_NEEDS_DEVICE();
  const int samples = 12, batch = 8, classes = 10;
  std::vector<float> logits = normals(batch * classes, 3, 2);  // the same in every sample: nothing to learn of weights
  const std::vector<float> one = logits;
  for (int s = 1; s < samples; s++) logits.insert(logits.end(), one.begin(), one.end());
  const Moments m = run(logits, {samples}, batch, classes);
  const Moments varied = run(normals(samples * batch * classes, 3, 3), {samples}, batch, classes, true);
  for (int b = 0; b < batch; b++) {
    EXPECT_GE(m.information[b], 0.f);
    EXPECT_LT(m.information[b], 1e-6f);
    EXPECT_GE(m.epistemic[b], 0.f);  // of rounding both signs but for the clip
    EXPECT_LT(m.epistemic[b], 1e-6f);
    EXPECT_GT(m.aleatoric[b], 0.f);
    EXPECT_GT(varied.information[b], 0.f);
    EXPECT_GT(varied.epistemic[b], 0.f);
    EXPECT_GT(varied.aleatoric[b], 0.f);
    double variance = 0;
    for (int c = 0; c < classes; c++) {
      const double p = varied.probability[b * classes + c];
      variance += p * (1 - p);
    }
    EXPECT_NEAR(double(varied.aleatoric[b]) + varied.epistemic[b], variance, 1e-6);
    EXPECT_LE(varied.information[b], varied.entropy[b]);
    EXPECT_LE(varied.entropy[b], std::log(10.f) * 1.00001f);
    float sum = 0;
    for (int c = 0; c < classes; c++) sum += varied.probability[b * classes + c];
    EXPECT_NEAR(sum, 1, 1e-6);
  }
}

TEST(Predictive, SmallNaNStaysInItsRow) {
  BATON_NEEDS_DEVICE();
  const Moments m = run({0, NAN, 0, 0, 0, 0, 0, 0}, {2}, 2, 2, true);
  EXPECT_TRUE(std::isnan(m.probability[0]) && std::isnan(m.probability[1]));
  EXPECT_TRUE(std::isnan(m.entropy[0]) && std::isnan(m.information[0]));
  EXPECT_EQ(m.probability[2], .5f);
  EXPECT_FLOAT_EQ(m.entropy[1], std::log(2.f));
  EXPECT_TRUE(exact(m.aleatoric, std::vector<float>{NAN, .5}));
  EXPECT_TRUE(exact(m.epistemic, std::vector<float>{NAN, 0}));
  const Moments one = run({0, NAN, 0, 0}, {1}, 2, 2);
  EXPECT_TRUE(exact(one.aleatoric, std::vector<float>{NAN, .5}));
  EXPECT_TRUE(exact(one.epistemic, std::vector<float>{NAN, 0}));
}

constexpr uint8_t untouched = 0xEE;

// [samples][stride], as choose_classes leaves it.
std::vector<uint8_t> choose(const std::vector<float>& logits, int samples, int batch, int classes, size_t stride) {
  Memory memory;
  Buffer x(memory, logits);
  Buffer<uint8_t> chosen(memory, stride * samples, untouched);
  choose_classes(chosen, stride, x, samples, batch, classes, memory.stream());
  return chosen.host();
}

std::vector<uint8_t> chosen_reference(const std::vector<float>& logits, int samples, int batch, int classes,
                                      size_t stride) {
  std::vector<uint8_t> chosen(stride * samples, untouched);
  for (int s = 0; s < samples; s++)
    for (int b = 0; b < batch; b++) {
      const float* x = &logits[(size_t(s) * batch + b) * classes];
      chosen[stride * s + b] = uint8_t(std::max_element(x, x + classes) - x);  // the first of equals
    }
  return chosen;
}

TEST(ChooseClasses, SmallExact) {
  BATON_NEEDS_DEVICE();
  const float inf = INFINITY;
  // The first of equals, wherever they stand; infinities; zeros of both signs.
  EXPECT_TRUE(
      exact(choose({1, 2, 0, 2, 2, 1, 5, 5, 5, 0, 1, 1, -inf, -inf, -inf, -inf, -9, inf, -0.f, 0, -0.f}, 1, 7, 3, 7),
            std::vector<int>{1, 0, 0, 1, 0, 2, 0}));
  // A NaN wins over nothing, and as the first class nothing wins over it: a class that there is, always.
  EXPECT_TRUE(exact(choose({0, NAN, 1, 3, NAN, 1, 0, 1, NAN, NAN, 1, 2, NAN, NAN, NAN}, 1, 5, 3, 5),
                    std::vector<int>{2, 0, 1, 0, 0}));
  // Two samples, which a stride of 4 sets apart.
  EXPECT_TRUE(exact(choose({0, 1, 1, 0, 0, 1, 1, 0, 1, 0, 0, 1}, 2, 3, 2, 4),
                    std::vector<int>{1, 0, 1, untouched, 0, 0, 1, untouched}));
}

TEST(ChooseClasses, SmallAgainstReference) {
  BATON_NEEDS_DEVICE();
  const std::vector<float> logits = normals(2 * 3 * 10, 2, 6);
  EXPECT_TRUE(exact(choose(logits, 2, 3, 10, 5), chosen_reference(logits, 2, 3, 10, 5)));
}

TEST(ChooseClasses, AgainstReference) {
  BATON_NEEDS_DEVICE();
  for (const auto [samples, batch, classes, padding] :
       {std::array{1, 1, 1, 0}, {3, 7, 2, 0}, {10, 129, 10, 127}, {2, 65, 33, 1}, {4, 31, 100, 3}, {2, 300, 256, 0}}) {
    SCOPED_TRACE(testing::Message() << "[" << samples << "][" << batch << "][" << classes << "]");
    std::vector<float> logits = normals(size_t(samples) * batch * classes, 1.5f, classes + batch);
    for (float& x : logits) x = std::round(x);  // ties
    logits.back() = 100;                        // the last class can be chosen
    const size_t stride = size_t(batch) + padding;
    const std::vector<uint8_t> got = choose(logits, samples, batch, classes, stride);
    EXPECT_TRUE(exact(got, chosen_reference(logits, samples, batch, classes, stride)));
    EXPECT_EQ(got[stride * (samples - 1) + batch - 1], classes - 1);
    record("choose_classes." + std::to_string(samples) + "x" + std::to_string(batch) + "x" + std::to_string(classes),
           std::vector<float>(got.begin(), got.end()), 0);
  }
}

TEST(ChooseClasses, RefusesClasses) {
  uint8_t chosen = 0;
  const float x = 0;
  for (int classes : {-1, 0, 257}) {
    try {
      choose_classes(&chosen, 1, &x, 1, 1, classes, {});
      ADD_FAILURE() << "no error";
    } catch (const InputError& e) {
      EXPECT_NE(std::string(e.what()).find("256 classes, not " + std::to_string(classes)), std::string::npos)
          << e.what();
    }
  }
}

TEST(Predictive, RefusesShapes) {
  float x = 0;
  try {
    accumulate_predictions(&x, &x, &x, 0, 4, 10, {});
    FAIL() << "no error";
  } catch (const InputError& e) {
    EXPECT_NE(std::string(e.what()).find("logits has shape [0][4][10]"), std::string::npos) << e.what();
  }
  EXPECT_THROW(finish_predictions(&x, &x, &x, &x, &x, 1, 4, 0, {}), InputError);
  try {
    finish_predictions(&x, &x, &x, &x, &x, 1, 1, 2, {}, &x, nullptr);
    FAIL() << "no error";
  } catch (const InputError& e) {
    EXPECT_NE(std::string(e.what()).find("square_sum"), std::string::npos) << e.what();
  }
}

}  // namespace
}  // namespace baton::test
