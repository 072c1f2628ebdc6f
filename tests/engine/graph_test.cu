// A replayed graph does what the calls that it captured would do: kernels, copies and library calls, with the step's
// number read from device memory.
#include <gtest/gtest.h>

#include <cstring>
#include <vector>

#include "engine/blas.h"
#include "engine/philox.h"
#include "engine/runtime.h"
#include "tests/support/device.h"

namespace baton {
namespace {

__global__ void advance_kernel(uint32_t* __restrict__ step, int n) {
  const int i = simt::thread_item();
  if (i >= n) return;
  step[i] += 1;
}

// y = y / 2 + noise of this step.
__global__ void walk_kernel(float* __restrict__ y, const uint32_t* __restrict__ step, Key key, int n) {
  const int i = simt::thread_item();
  if (i >= n) return;
  const float4 noise = normal4(key, uint32_t(i), 3, *step);
  y[i] = fmaf(0.5f, y[i], noise.x + noise.w);
}

constexpr int side = 48, items = side * side;
constexpr ConvShape conv_shape{3, 2, 9, 8, 4, 3, 1};

// The state of a small "training": a step of it uses every kind of call that a captured step may contain.
struct Walk {
  Device& device;
  Arena arena;
  uint32_t* step = arena.take<uint32_t>(1);
  float* y = arena.take<float>(items);
  float* last = arena.take<float>(items);
  float* product = arena.take<float>(2 * items);
  float* filtered = arena.take<float>(conv_shape.output_size());
  float* gradient = arena.take<float>(conv_shape.weight_size());
  Convolution convolution{device, arena, conv_shape, 1};

  explicit Walk(Device& d) : device(d) { arena.freeze(); }

  void advance() {
    simt::launch<advance_kernel>(simt::each(1), device.stream(), step, 1);
    simt::launch<walk_kernel>(simt::each(items), device.stream(), y, (const uint32_t*)step, key_of(7), items);
    fill_zero(device, product, 2 * items * sizeof(float));
    // Two replicas: the second matrix of the pair is shared.
    gemm(device, false, true, side, side, side / 2, {y, items / 2}, {last, 0}, 1, {product, items}, 2);
    convolution.forward(device, {y, 0}, {last, 0}, {filtered, 0});
    convolution.backward_weights(device, {y, 0}, {filtered, 0}, {gradient, 0});
    copy_on_device(device, last, y, items * sizeof(float));
  }

  std::vector<float> state() {
    std::vector<float> all;
    const auto add = [&](const float* p, size_t n) {
      const std::vector<float> part = download(device, p, n);
      all.insert(all.end(), part.begin(), part.end());
    };
    add(y, items), add(last, items), add(product, 2 * items);
    add(filtered, conv_shape.output_size()), add(gradient, conv_shape.weight_size());
    return all;
  }
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

TEST(Graph, ReplayEqualsEagerBitForBit) {
  BATON_NEEDS_DEVICE();
  Device device;
  Walk eager(device), replayed(device);
  Graph graph;
  EXPECT_FALSE(graph.captured());
  eager.advance(), replayed.advance();  // libraries load and allocate at their first calls
  graph.capture(device, [&] { replayed.advance(); });
  EXPECT_TRUE(graph.captured());
  EXPECT_EQ(download(device, replayed.step, 1)[0], 1u) << "capturing must not run the body";
  for (uint32_t step = 2; step <= 6; step++) {
    eager.advance();
    graph.replay(device);
    EXPECT_EQ(download(device, replayed.step, 1)[0], step);
    EXPECT_TRUE(same_bits(eager.state(), replayed.state())) << "step " << step;
  }
  float sum = 0;
  for (const float v : replayed.state()) sum += std::fabs(v);
  EXPECT_GT(sum, 1.f);
#if defined(BATON_CUDA)
  EXPECT_GE(graph.nodes(), 7);
#else
  EXPECT_EQ(graph.nodes(), 0);
#endif
}

TEST(Graph, CanBeCapturedAgain) {
  BATON_NEEDS_DEVICE();
  Device device;
  Arena arena;
  uint32_t* counts = arena.take<uint32_t>(8);
  Graph graph;
  const auto body = [&] { simt::launch<advance_kernel>(simt::each(8), device.stream(), counts, 8); };
  graph.capture(device, body);
  graph.replay(device);
  graph.capture(device, [&] { body(), body(); });
  graph.replay(device);
  EXPECT_EQ(download(device, counts, 8), std::vector<uint32_t>(8, 3));
}

#if defined(BATON_CUDA)
TEST(Graph, BodyThatThrowsLeavesTheStreamUsable) {
  BATON_NEEDS_DEVICE();
  Device device;
  Arena arena;
  uint32_t* count = arena.take<uint32_t>(1);
  const auto body = [&] { simt::launch<advance_kernel>(simt::each(1), device.stream(), count, 1); };
  Graph graph;
  EXPECT_THROW(graph.capture(device, [&] { body(), throw InputError("refused"); }), InputError);
  EXPECT_FALSE(graph.captured());
  body();
  EXPECT_EQ(download(device, count, 1)[0], 1u);
  graph.capture(device, body);
  graph.replay(device);
  EXPECT_EQ(download(device, count, 1)[0], 2u);
}
#endif

}  // namespace
}  // namespace baton
