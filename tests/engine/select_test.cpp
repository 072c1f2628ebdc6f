#include "engine/select.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

struct Marks {
  std::vector<uint8_t> marked;
  Selection selection;
};
Marks lowest_of(const std::vector<float>& values, int lowest) {
  Memory memory;
  Buffer scores(memory, values);
  Buffer<uint8_t> marked(memory, values.size(), 9);
  const Selection selection = mark_lowest(memory.device(), marked, scores, int(values.size()), lowest);
  const std::vector<float> after = scores.host();
  EXPECT_TRUE(values.empty() || std::memcmp(after.data(), values.data(), values.size() * sizeof(float)) == 0);
  return {marked.host(), selection};
}

// By a stable sort of everything.
void check(const std::vector<float>& values, int lowest) {
  SCOPED_TRACE(testing::Message() << lowest << " of " << values.size());
  std::vector<int> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return values[a] < values[b]; });
  std::vector<uint8_t> want(values.size(), 0);
  for (int i = 0; i < lowest; i++) want[order[i]] = 1;
  const Marks got = lowest_of(values, lowest);
  EXPECT_TRUE(exact(got.marked, want));
  EXPECT_EQ(got.selection.count, lowest);
  EXPECT_EQ(got.selection.threshold, lowest ? values[order[lowest - 1]] : -INFINITY);
}
void check_all(const std::vector<float>& values) {
  for (int lowest = 0; lowest <= int(values.size()); lowest++) check(values, lowest);
}

TEST(MarkLowest, OfFew) {
  BATON_NEEDS_DEVICE();
  check_all({});
  check_all({5});
  check_all({3, 1, 2});
  const Marks got = lowest_of({3, 1, 2}, 2);
  EXPECT_EQ(got.marked, (std::vector<uint8_t>{0, 1, 1}));
  EXPECT_EQ(got.selection.threshold, 2);
}

TEST(MarkLowest, TiesGoToTheFirst) {
  BATON_NEEDS_DEVICE();
  check_all({2, 1, 2, 1, 2, 1, 0, 2});
  check_all(std::vector<float>(9, 4.f));
  EXPECT_EQ(lowest_of({1, 1, 0, 1, 1}, 3).marked, (std::vector<uint8_t>{1, 1, 1, 0, 0}));
}

TEST(MarkLowest, ZerosOfEitherSignAreEqual) {
  BATON_NEEDS_DEVICE();
  check_all({0.f, -0.f, 0.f, -0.f, 1, -1, -0.f});
}

TEST(MarkLowest, NegativeAndInfinite) {
  BATON_NEEDS_DEVICE();
  check_all({-1, INFINITY, 3, -INFINITY, -1, 1e-42f, INFINITY, -1e30f, -INFINITY, 3.4e38f, -1e-42f});
}

TEST(MarkLowest, RandomAgainstASort) {
  BATON_NEEDS_DEVICE();
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (int n : {257, 5000, 100003}) {
    std::vector<float> values(n), coarse(n);
    for (float& v : values) v = normal(random);
    for (float& v : coarse) v = float(int(random() % 40)) - 1;
    for (int lowest : {0, 1, n / 10, n / 2, n - 1, n}) check(values, lowest), check(coarse, lowest);
  }
}

TEST(MarkLowest, RefusesWhatHasNoOrder) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  for (float nan : {NAN, -NAN})
    for (int at : {0, 2, 4}) {
      std::vector<float> values{1, 2, 3, 4, 5};
      values[at] = nan;
      Buffer scores(memory, values);
      Buffer<uint8_t> marked(memory, 5, 9);
      for (int lowest : {0, 2, 5}) try {
          mark_lowest(memory.device(), marked, scores, 5, lowest);
          ADD_FAILURE() << "not refused: " << at;
        } catch (const InputError& e) {
          EXPECT_NE(std::string(e.what()).find("scores[" + std::to_string(at) + "]"), std::string::npos) << e.what();
        }
      EXPECT_TRUE(exact(marked.host(), std::vector<uint8_t>(5, 9)));  // nothing was begun
    }
}

TEST(MarkLowest, RefusesCounts) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  Buffer<float> scores(memory, 3);
  Buffer<uint8_t> marked(memory, 3);
  auto call = [&](int count, int lowest) { mark_lowest(memory.device(), marked, scores, count, lowest); };
  EXPECT_THROW(call(3, 4), InputError);
  EXPECT_THROW(call(0, 1), InputError);
  EXPECT_THROW(call(3, -1), InputError);
  EXPECT_THROW(call(-1, -1), InputError);
}

TEST(MarkLowest, NothingGrowsAfterTheFirstCall) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  std::vector<float> values(5000);
  for (size_t i = 0; i < values.size(); i++) values[i] = float(i * 7919 % 5003);
  Buffer scores(memory, values);
  Buffer<uint8_t> marked(memory, values.size());
  const auto call = [&](int count, int lowest) { mark_lowest(memory.device(), marked, scores, count, lowest); };
  call(5000, 100);
  const size_t allocations = memory.device().allocations(), peak = memory.device().peak_bytes();
  for (int lowest : {100, 0, 4999}) call(5000, lowest), call(700, lowest % 700);
  EXPECT_EQ(memory.device().allocations(), allocations);
  EXPECT_EQ(memory.device().peak_bytes(), peak);
}

}  // namespace
}  // namespace baton::test
