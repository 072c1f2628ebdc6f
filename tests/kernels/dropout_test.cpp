#include "kernels/dropout.h"

#include <algorithm>
#include <cstring>
#include <random>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

constexpr uint32_t layer = stream_dropout + 2;

StepState state_of(uint32_t step, uint64_t seed = 5) {
  StepState s{};
  s.noise = key_of(seed);
  s.step = step;
  return s;
}

// x after dropout. A second state, of another key and step, must not be read.
std::vector<float> drop(const std::vector<float>& values, int replicas, float rate, uint32_t step = 3,
                        uint32_t stream_id = layer, uint64_t seed = 5, int first_replica = 0) {
  Memory memory;
  Buffer x(memory, values);
  Buffer states(memory, std::vector<StepState>{state_of(step, seed), state_of(step + 1, seed + 1)});
  dropout(x, values.size() / replicas, replicas, rate, states, stream_id, memory.stream(), first_replica);
  return x.host();
}

std::vector<float> integers(size_t n, int seed) {
  std::mt19937 random(seed);
  std::vector<float> v(n);
  for (float& x : v) x = float(1 + int(random() % 15)) * (random() % 2 ? 1.f : -1.f);
  return v;
}

double word_of(size_t i, size_t count, uint32_t r, uint32_t step, uint32_t stream_id) {
  const size_t q = (count + 3) / 4;
  const uint4 u = philox(make_uint4(uint32_t(i % q), stream_id, step, r), key_of(5));
  return i / q == 0 ? u.x : i / q == 1 ? u.y : i / q == 2 ? u.z : u.w;
}

void check(size_t count, int replicas, float rate) {
  SCOPED_TRACE(testing::Message() << replicas << "x" << count << " at " << rate);
  const std::vector<float> values = integers(count * replicas, 1);
  std::vector<double> want;
  for (int r = 0; r < replicas; r++)
    for (size_t i = 0; i < count; i++)
      want.push_back(
          word_of(i, count, r, 3, layer) < double(rate) * 4294967296. ? 0 : values[count * r + i] / (1 - double(rate)));
  const std::vector<float> got = drop(values, replicas, rate);
  for (size_t i = 0; i < got.size(); i++) EXPECT_EQ(got[i] == 0, want[i] == 0) << i;
  if (rate == 0.5f || rate == 0.75f) {  // a scale of 2 or 4
    EXPECT_TRUE(exact(got, want));
  } else if (count > 2) {
    EXPECT_TRUE(close(got, want, {.l2 = 2e-7}));
  }
  record("dropout." + std::to_string(replicas) + "x" + std::to_string(count) + "." + std::to_string(rate), got, 0);
}

TEST(Dropout, Small) {
  BATON_NEEDS_DEVICE();
  check(7, 2, 0.5f);
}

TEST(Dropout, IsItsDefinition) {
  BATON_NEEDS_DEVICE();
  for (size_t count : {1, 2, 3, 4, 5, 6, 9, 10, 11, 1023, 5000}) check(count, 2, 0.5f);
  check(3001, 3, 0.75f);
  check(3001, 3, 0.2f);
  check(64 * 1000, 1, 0.1f);
}

TEST(Dropout, NothingIsAllThereIs) {
  BATON_NEEDS_DEVICE();
  EXPECT_TRUE(drop({}, 1, 0.5f).empty());
}

TEST(Dropout, RateZeroLeavesTheBits) {
  BATON_NEEDS_DEVICE();
  std::vector<float> values = integers(301, 2);
  values[0] = -0.f, values[1] = 1e-42f, values[2] = INFINITY, values[3] = NAN;
  const std::vector<float> got = drop(values, 1, 0);
  EXPECT_EQ(std::memcmp(got.data(), values.data(), values.size() * sizeof(float)), 0);
}

TEST(Dropout, HidesNoNaN) {
  BATON_NEEDS_DEVICE();
  for (float x : drop(std::vector<float>(37, NAN), 1, 0.5f)) EXPECT_TRUE(std::isnan(x));
}

TEST(Dropout, BackwardDrawsTheSameMask) {
  BATON_NEEDS_DEVICE();
  const size_t count = 999;
  Memory memory;
  Buffer<float> x(memory, 2 * count, 1.f), grad(memory, 2 * count, 1.f);
  Buffer states(memory, std::vector<StepState>{state_of(7)});
  dropout(x, count, 2, 0.3f, states, layer, memory.stream());
  dropout(grad, count, 2, 0.3f, states, layer, memory.stream());
  const std::vector<float> mask = x.host();
  EXPECT_EQ(mask, grad.host());
  EXPECT_NE(std::count(mask.begin(), mask.end(), 0.f), 0);
}

// Replicas that come in several calls have the masks that they would have in one.
void check_first_replica(size_t count, int replicas, int first, float rate) {
  SCOPED_TRACE(testing::Message() << replicas << "x" << count << " from " << first << " at " << rate);
  const std::vector<float> values = integers(count * replicas, 4);
  const std::vector<float> whole = drop(values, replicas, rate);
  const auto from = std::ptrdiff_t(count) * first;
  const std::vector<float> rest(values.begin() + from, values.end()), want(whole.begin() + from, whole.end());
  const std::vector<float> got = drop(rest, replicas - first, rate, 3, layer, 5, first);
  EXPECT_TRUE(exact(got, want));
  for (size_t i = 0; i < got.size(); i++)
    EXPECT_EQ(got[i] == 0, word_of(i % count, count, uint32_t(first + i / count), 3, layer) < rate * 4294967296.) << i;
  record("dropout.from" + std::to_string(first) + "." + std::to_string(count), got, 0);
}

TEST(Dropout, SmallFirstReplica) {
  BATON_NEEDS_DEVICE();
  check_first_replica(9, 4, 2, 0.5f);
}

TEST(Dropout, FirstReplica) {
  BATON_NEEDS_DEVICE();
  check_first_replica(1001, 4, 2, 0.25f);
  check_first_replica(514, 5, 4, 0.5f);
  const std::vector<float> ones(500, 1.f);
  EXPECT_NE(drop(ones, 1, 0.5f, 3, layer, 5, 1), drop(ones, 1, 0.5f));
}

TEST(Dropout, KeepsTheMeanAndHasItsVariance) {
  BATON_NEEDS_DEVICE();
  const size_t n = 200000;
  for (float rate : {0.1f, 0.5f, 0.9f}) {
    const std::vector<float> factors = drop(std::vector<float>(n, 1.f), 2, rate);
    double sum = 0, squares = 0;
    size_t dropped = 0;
    for (float f : factors) sum += f, squares += double(f) * f, dropped += f == 0;
    const double mean = sum / n, variance = squares / n - mean * mean, expected = rate / (1 - rate);
    EXPECT_NEAR(dropped / double(n), rate, 4 * std::sqrt(rate * (1 - rate) / n)) << rate;
    EXPECT_NEAR(mean, 1, 4 * std::sqrt(expected / n)) << rate;
    EXPECT_NEAR(variance / expected, 1, 0.04) << rate;
    for (size_t part = 0; part < 4; part++) {  // each word's quarter of a replica
      size_t here = 0;
      for (size_t i = 0; i < n / 8; i++) here += factors[part * (n / 8) + i] == 0;
      EXPECT_NEAR(here / (n / 8.), rate, 4 * std::sqrt(rate * (1 - rate) / (n / 8.))) << rate << " quarter " << part;
    }
  }
}

// Of independent masks at p = 1/2, half of the elements agree.
TEST(Dropout, StepsReplicasStreamsAndKeysDiffer) {
  BATON_NEEDS_DEVICE();
  const size_t count = 10000;
  const std::vector<float> ones(2 * count, 1.f), both = drop(ones, 2, 0.5f);
  auto of_replica = [&](const std::vector<float>& v, int r) {
    return std::vector<float>(v.begin() + r * count, v.begin() + (r + 1) * count);
  };
  const std::vector<float> mask = of_replica(both, 0);
  const std::vector<std::vector<float>> others{of_replica(both, 1), of_replica(drop(ones, 2, 0.5f, 4), 0),
                                               of_replica(drop(ones, 2, 0.5f, 3, layer + 1), 0),
                                               of_replica(drop(ones, 2, 0.5f, 3, layer, 6), 0)};
  for (const auto& other : others) {
    size_t same = 0;
    for (size_t i = 0; i < count; i++) same += mask[i] == other[i];
    EXPECT_NEAR(same / double(count), 0.5, 0.02);
  }
  for (size_t lag : {size_t(1), count / 4, count / 2}) {  // nor do neighbours, or one counter's words, agree
    size_t same = 0;
    for (size_t i = 0; i + lag < count; i++) same += mask[i] == mask[i + lag];
    EXPECT_NEAR(same / double(count - lag), 0.5, 0.03) << lag;
  }
  EXPECT_EQ(mask, of_replica(drop(ones, 2, 0.5f), 0));
}

TEST(Dropout, RefusesRates) {
  for (float rate : {-0.1f, 1.f, 1.5f, NAN})
    EXPECT_THROW(dropout(nullptr, 0, 1, rate, nullptr, layer, {}), InputError) << rate;
  EXPECT_THROW(dropout(nullptr, size_t(1) << 34, 1, 0.5f, nullptr, layer, {}), InputError);
}

}  // namespace
}  // namespace baton::test
