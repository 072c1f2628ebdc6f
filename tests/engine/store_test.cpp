#include "engine/store.h"

#include <numeric>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"

namespace baton::test {
namespace {

ParameterLayout small_layout() {
  ParameterLayout layout;
  layout.add("conv.weight", {4, 2, 3, 3}, 18, false);  // 72 floats: 56 of a gap
  layout.add("conv.bias", {4}, 18, true);              // 60
  layout.add("fc.weight", {8, 16}, 16, false);         // 128: none
  layout.add("scale", {}, 1, false);                   // a scalar: 63
  return layout;
}

TEST(ParameterLayout, OffsetsAreAligned) {
  const ParameterLayout layout = small_layout();
  ASSERT_EQ(layout.tensors().size(), 4u);
  const size_t offsets[] = {0, 128, 192, 320}, sizes[] = {72, 4, 128, 1};
  for (int i = 0; i < 4; i++) {
    EXPECT_EQ(layout[i].offset, offsets[i]) << i;
    EXPECT_EQ(layout[i].size, sizes[i]) << i;
    EXPECT_EQ(layout[i].offset * sizeof(float) % 256, 0u) << i;
  }
  EXPECT_EQ(layout.stride(), 384u);
  EXPECT_EQ(layout.stride() * sizeof(float) % 256, 0u);
  EXPECT_EQ(layout.parameters(), 205u);
  EXPECT_EQ(layout[1].name, "conv.bias");
  EXPECT_EQ(layout[0].shape, (std::vector<int64_t>{4, 2, 3, 3}));
  EXPECT_EQ(layout[0].fan_in, 18);
  EXPECT_TRUE(layout[1].bias);
  EXPECT_FALSE(layout[2].bias);
}

TEST(ParameterLayout, IndicesAreInOrder) {
  ParameterLayout layout;
  EXPECT_EQ(layout.stride(), 0u);
  EXPECT_EQ(layout.parameters(), 0u);
  EXPECT_TRUE(layout.gaps().empty());
  EXPECT_EQ(layout.add("a", {64}, 1, false), 0);
  EXPECT_EQ(layout.add("b", {65}, 1, false), 1);
  EXPECT_EQ(layout.add("c", {1}, 1, false), 2);
  EXPECT_EQ(layout[1].offset, 64u);
  EXPECT_EQ(layout[2].offset, 192u);
}

// Every float of a row is in exactly one tensor or gap.
TEST(ParameterLayout, TensorsAndGapsFillTheRow) {
  const ParameterLayout layout = small_layout();
  std::vector<int> covered(layout.stride());
  for (const TensorSpec& t : layout.tensors())
    for (size_t i = 0; i < t.size; i++) covered.at(t.offset + i)++;
  for (const auto& gap : layout.gaps()) {
    EXPECT_GT(gap.size, 0u);
    for (size_t i = 0; i < gap.size; i++) covered.at(gap.offset + i)++;
  }
  EXPECT_TRUE(exact(covered, std::vector<int>(layout.stride(), 1)));
  EXPECT_EQ(layout.gaps().size(), 3u);
}

TEST(ParameterLayout, RefusesATakenName) {
  ParameterLayout layout = small_layout();
  try {
    layout.add("conv.bias", {9}, 1, true);
    FAIL() << "no error";
  } catch (const InputError& e) {
    EXPECT_NE(std::string(e.what()).find("conv.bias"), std::string::npos) << e.what();
  }
  EXPECT_EQ(layout.tensors().size(), 4u);
  EXPECT_EQ(layout.stride(), 384u);
}

std::vector<float> numbered(size_t n, float first) {
  std::vector<float> v(n);
  std::iota(v.begin(), v.end(), first);
  return v;
}

TEST(ParameterStore, WritesAndReadsTensors) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  const int replicas = 3;
  ParameterStore store(memory.arena(), small_layout(), replicas);
  float* mean = store.add("mean");
  float* scale = store.add("scale");
  EXPECT_EQ(reinterpret_cast<uintptr_t>(mean) % 256, 0u);
  EXPECT_EQ(reinterpret_cast<uintptr_t>(scale) % 256, 0u);
  EXPECT_EQ(store.at("mean"), mean);
  EXPECT_EQ(store.arrays(), (std::vector<std::string>{"mean", "scale"}));
  EXPECT_EQ(store.replicas(), replicas);
  EXPECT_EQ(store.row_bytes(), 384 * sizeof(float));
  EXPECT_EQ(store.bytes(), 3 * 384 * sizeof(float));

  const ParameterLayout& layout = store.layout();
  const size_t floats = layout.stride() * replicas;
  EXPECT_TRUE(exact(download(memory.device(), mean, floats), std::vector<float>(floats)));
  std::vector<float> want(floats);
  for (int r = 0; r < replicas; r++)
    for (const TensorSpec& t : layout.tensors()) {
      const std::vector<float> values = numbered(t.size, 1000.f * r + float(t.offset) + 1);
      store.write(memory.device(), "mean", r, t, values);
      std::copy(values.begin(), values.end(), want.begin() + layout.stride() * r + t.offset);
    }
  for (int r = 0; r < replicas; r++)
    for (const TensorSpec& t : layout.tensors())
      EXPECT_TRUE(exact(store.read(memory.device(), "mean", r, t), numbered(t.size, 1000.f * r + float(t.offset) + 1)));
  EXPECT_TRUE(exact(download(memory.device(), mean, floats), want));  // where they belong, the gaps still zero
  EXPECT_TRUE(exact(download(memory.device(), scale, floats), std::vector<float>(floats)));
}

TEST(ParameterStore, RefusesNamesAndSizes) {
  BATON_NEEDS_DEVICE();
  Memory memory;
  ParameterStore store(memory.arena(), small_layout(), 1);
  store.add("mean");
  EXPECT_THROW(store.add("mean"), InputError);
  EXPECT_THROW(store.at("means"), InputError);
  const TensorSpec& bias = store.layout()[1];
  EXPECT_THROW(store.write(memory.device(), "mean", 0, bias, std::vector<float>(5)), InputError);
  EXPECT_THROW(store.write(memory.device(), "means", 0, bias, std::vector<float>(4)), InputError);
  EXPECT_THROW(store.read(memory.device(), "means", 0, bias), InputError);
  EXPECT_EQ(store.arrays().size(), 1u);
  memory.arena().freeze();
  EXPECT_THROW(store.add("scale"), RunError);
}

}  // namespace
}  // namespace baton::test
