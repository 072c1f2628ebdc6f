// The generated sets: a function of (seed, index) alone, balanced, and neither constant nor the same image again.
#include "engine/io/synthetic.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <set>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "engine/error.h"

namespace baton {
namespace {

using Generator = Images (*)(int, uint64_t);

class Generated : public testing::TestWithParam<Generator> {};

std::vector<uint8_t> image(const Images& images, int i) {
  const auto from = images.pixels.begin() + static_cast<std::ptrdiff_t>(i * images.image_bytes());
  return {from, from + static_cast<std::ptrdiff_t>(images.image_bytes())};
}

TEST_P(Generated, IsAFunctionOfSeedAndIndex) {
  const Images all = GetParam()(200, 7), again = GetParam()(200, 7), few = GetParam()(37, 7),
               other = GetParam()(200, 8);
  EXPECT_EQ(all.pixels, again.pixels);
  EXPECT_EQ(all.labels, again.labels);
  EXPECT_TRUE(std::equal(few.pixels.begin(), few.pixels.end(), all.pixels.begin()));
  EXPECT_TRUE(std::equal(few.labels.begin(), few.labels.end(), all.labels.begin()));
  EXPECT_NE(all.pixels, other.pixels);
  EXPECT_NE(all.labels, other.labels);
}

TEST_P(Generated, DoesNotDependOnTheNumberOfThreads) {
#ifdef _OPENMP
  const int before = omp_get_max_threads();
  omp_set_num_threads(1);
  const Images one = GetParam()(101, 3);
  omp_set_num_threads(4);
  const Images four = GetParam()(101, 3);
  omp_set_num_threads(before);
  EXPECT_EQ(one.pixels, four.pixels);
  EXPECT_EQ(one.labels, four.labels);
#else
  GTEST_SKIP() << "built without OpenMP";
#endif
}

TEST_P(Generated, HoldsEveryClassEquallyOften) {
  const Images images = GetParam()(500, 1);
  std::array<int, 10> seen{};
  for (uint8_t label : images.labels) ++seen.at(label);
  for (int count : seen) EXPECT_EQ(count, 50);
  EXPECT_FALSE(std::equal(images.labels.begin(), images.labels.begin() + 10, images.labels.begin() + 10));
}

TEST_P(Generated, HoldsImagesThatDifferAndAreNotFlat) {
  const Images images = GetParam()(300, 5);
  ASSERT_EQ(images.count, 300);
  ASSERT_EQ(images.classes, 10);
  ASSERT_EQ(images.pixels.size(), images.count * images.image_bytes());
  std::set<std::vector<uint8_t>> distinct;
  for (int i = 0; i < images.count; ++i) {
    const std::vector<uint8_t> pixels = image(images, i);
    const auto [low, high] = std::minmax_element(pixels.begin(), pixels.end());
    EXPECT_GT(*high - *low, 50) << "image " << i;
    distinct.insert(pixels);
  }
  EXPECT_EQ(distinct.size(), 300u);
}

TEST_P(Generated, RefusesAnEmptySet) {
  EXPECT_THROW(GetParam()(0, 1), InputError);
  EXPECT_THROW(GetParam()(-5, 1), InputError);
}

INSTANTIATE_TEST_SUITE_P(Sets, Generated, testing::Values(&generate_digits, &generate_textures),
                         [](const auto& info) { return info.index == 0 ? "Digits" : "Textures"; });

TEST(GeneratedDigits, HaveTheShapeOfMnistAndMostlyBlackPaper) {
  const Images images = generate_digits(200, 11);
  EXPECT_EQ(images.channels, 1);
  EXPECT_EQ(images.height, 28);
  EXPECT_EQ(images.width, 28);
  const double mean = std::accumulate(images.pixels.begin(), images.pixels.end(), 0.0) / images.pixels.size();
  EXPECT_GT(mean, 15);  // MNIST: 33
  EXPECT_LT(mean, 60);
}

TEST(GeneratedTextures, HaveTheShapeOfCifar) {
  const Images images = generate_textures(10, 11);
  EXPECT_EQ(images.channels, 3);
  EXPECT_EQ(images.height, 32);
  EXPECT_EQ(images.width, 32);
}

// Nearest class mean of the training set: far above chance, or the labels say nothing; far below 1, or it is too easy.
TEST(GeneratedDigits, AreLearnableAndNotTrivial) {
  const Images train = generate_digits(2000, 20), test = generate_digits(500, 21);
  const size_t size = train.image_bytes();
  std::vector<double> means(10 * size);
  for (int i = 0; i < train.count; ++i) {
    for (size_t k = 0; k < size; ++k) means[train.labels[i] * size + k] += train.pixels[i * size + k] / 200.0;
  }
  int right = 0;
  for (int i = 0; i < test.count; ++i) {
    std::array<double, 10> distance{};
    for (int c = 0; c < 10; ++c) {
      for (size_t k = 0; k < size; ++k) {
        const double off = test.pixels[i * size + k] - means[c * size + k];
        distance[c] += off * off;
      }
    }
    right += std::min_element(distance.begin(), distance.end()) - distance.begin() == test.labels[i];
  }
  EXPECT_GT(right, 250);
  EXPECT_LT(right, 475);
}

}  // namespace
}  // namespace baton
