// Batches by index. A block takes an image: it reads bytes and writes normalised floats, and their squares, which the
// variance products of local reparameterization read.
//
// The order of an epoch is a Feistel network over the next power of four of n. It is applied again until the result is
// below n (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002), on average two or three
// times at most: that is a bijection of [0, n) for each (key, epoch).
//
// Pixels in another order are read by index within one image: the reads stay in L1 and the writes are contiguous.
//
// Bytes of a call: replicas * batch * image * (1 + 4 or 8), and 4 a pixel for its place where there is an order, which
// come from a cache, as an order serves the whole batch. 2 or 3 FLOPs a pixel.
#include "kernels/batch.h"

namespace baton {

namespace {

constexpr int augment_padding = 4;
enum class Pixels { as_they_are, augmented, in_order };

__host__ __device__ __forceinline__ uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

__device__ __forceinline__ void load_image(float* __restrict__ x, float* __restrict__ x_squared,
                                           const uint8_t* __restrict__ pixels, const DeviceImages& set) {
  for (int c = 0; c < set.channels; c++) {
    const Normalisation& to = set.normalisation;  // selects, for an index would put it on the stack
    const float scale = c == 0 ? to.scale[0] : c == 1 ? to.scale[1] : to.scale[2];
    const float shift = c == 0 ? to.shift[0] : c == 1 ? to.shift[1] : to.shift[2];
    const int first = c * set.plane;
    if (x_squared) {
      SIMT_SIMD()
      for (int i = threadIdx.x; i < set.plane; i += blockDim.x) {
        const float v = simt::as_operand(float(int(pixels[first + i])) * scale + shift, set.rounded);
        x[first + i] = v;
        x_squared[first + i] = v * v;
      }
    } else {
      SIMT_SIMD()
      for (int i = threadIdx.x; i < set.plane; i += blockDim.x)
        x[first + i] = simt::as_operand(float(int(pixels[first + i])) * scale + shift, set.rounded);
    }
  }
}

// A mirrored and shifted image; what lies outside of it is 0. Coordinates are floats, which is exact, so that the loop
// vectorises.
__device__ __forceinline__ void load_augmented(float* __restrict__ x, float* __restrict__ x_squared,
                                               const uint8_t* __restrict__ pixels, const DeviceImages& set,
                                               uint4 random) {
  const int h = set.height, w = set.width, span = 2 * augment_padding + 1;
  const int down = int(uint64_t(random.y) * span >> 32) - augment_padding;
  const int right = int(uint64_t(random.z) * span >> 32) - augment_padding;
  const int first = random.x >> 31 ? w - 1 + right : right, sign = random.x >> 31 ? -1 : 1;
  const float inverse = 1.f / float(w);
  for (int c = 0; c < set.channels; c++) {
    const Normalisation& to = set.normalisation;
    const float scale = c == 0 ? to.scale[0] : c == 1 ? to.scale[1] : to.scale[2];
    const float shift = c == 0 ? to.shift[0] : c == 1 ? to.shift[1] : to.shift[2];
    const int plane = c * set.plane;
    for (int i = threadIdx.x; i < set.plane; i += blockDim.x) {
      const int row = int((float(i) + 0.5f) * inverse), from_y = row + down, from_x = first + sign * (i - row * w);
      const int inside = (from_y >= 0) & (from_y < h) & (from_x >= 0) & (from_x < w);
      const float pixel = float(int(pixels[plane + (inside ? from_y * w + from_x : 0)]));
      const float v = simt::as_operand(inside ? pixel * scale + shift : 0.f, set.rounded);
      x[plane + i] = v;
      if (x_squared) x_squared[plane + i] = v * v;
    }
  }
}

// An image's pixels in a given order. A pixel's place determines its channel, and so its normalisation.
__device__ __forceinline__ void load_ordered(float* __restrict__ x, float* __restrict__ x_squared,
                                             const uint8_t* __restrict__ pixels,
                                             const int32_t* __restrict__ pixel_order, const DeviceImages& set) {
  const Normalisation& to = set.normalisation;
  const int second = set.plane, third = 2 * set.plane, size = set.channels * set.plane;
  if (set.channels == 1) {
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
      const float v = simt::as_operand(float(int(pixels[pixel_order[i]])) * to.scale[0] + to.shift[0], set.rounded);
      x[i] = v;
      if (x_squared) x_squared[i] = v * v;
    }
  } else {
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
      const int from = pixel_order[i];
      const float scale = from < second ? to.scale[0] : from < third ? to.scale[1] : to.scale[2];
      const float shift = from < second ? to.shift[0] : from < third ? to.shift[1] : to.shift[2];
      const float v = simt::as_operand(float(int(pixels[from])) * scale + shift, set.rounded);
      x[i] = v;
      if (x_squared) x_squared[i] = v * v;
    }
  }
}

// The task of example b. The running sums increase, so the number of sums that are not above u is the place of the
// first that is.
__device__ __forceinline__ int task_of(const TaskInputs& tasks, const StepState& s, int b) {
  if (!tasks.cumulative) return s.stage % tasks.tasks;
  const double u = philox(make_uint4(uint32_t(b), stream_tasks, s.step, 0), s.shuffle).w * 0x1p-32;  // exact
  const float* __restrict__ sums = tasks.cumulative + size_t(min(s.stage_step, tasks.steps) - 1) * tasks.tasks;
  int task = 0;
  for (int t = 0; t < tasks.tasks - 1; t++) task += u >= double(sums[t]);
  return task;
}

template <Pixels how>
__global__ void gather_training_kernel(float* x, float* x_squared, int32_t* labels, DeviceImages set,
                                       const int32_t* order, size_t order_stride, const StepState* states, int batch,
                                       TaskInputs tasks) {
  const int b = blockIdx.x, r = simt::row();
  const StepState& s = states[r];
  const uint32_t position = uint32_t(s.stage_step - 1) * uint32_t(batch) + uint32_t(b), n = uint32_t(s.part_size);
  const uint32_t epoch = position / n;
  const uint32_t place = shuffled(position % n, n, s.shuffle, (uint32_t(s.stage) << 20) + epoch);
  const int example = order[order_stride * r + s.part_offset + place];
  const size_t image = size_t(set.channels) * set.plane, to = (size_t(r) * batch + b) * image;
  if constexpr (how == Pixels::augmented)
    load_augmented(x + to, x_squared ? x_squared + to : nullptr, set.pixels + example * image, set,
                   philox(make_uint4(uint32_t(b), stream_augment, s.step, 0), s.shuffle));
  else if constexpr (how == Pixels::in_order)
    load_ordered(x + to, x_squared ? x_squared + to : nullptr, set.pixels + example * image,
                 tasks.pixel_order + task_of(tasks, s, b) * image, set);
  else load_image(x + to, x_squared ? x_squared + to : nullptr, set.pixels + example * image, set);
  if (threadIdx.x == 0) labels[size_t(r) * batch + b] = set.labels[example];
}

template <Pixels how>
__global__ void gather_kernel(float* x, float* x_squared, int32_t* labels, DeviceImages set, const int32_t* index,
                              const int32_t* pixel_order) {
  const int b = blockIdx.x, example = index[b];
  const size_t image = size_t(set.channels) * set.plane, to = b * image;
  if constexpr (how == Pixels::in_order)
    load_ordered(x + to, x_squared ? x_squared + to : nullptr, set.pixels + example * image, pixel_order, set);
  else load_image(x + to, x_squared ? x_squared + to : nullptr, set.pixels + example * image, set);
  if (threadIdx.x == 0) labels[b] = set.labels[example];
}

constexpr int threads = 128;

}  // namespace

__host__ __device__ uint32_t shuffled(uint32_t i, uint32_t n, Key key, uint32_t epoch) {
  uint32_t half = 1;  // bits of each half of the Feistel block
  while (half < 16 && (1ull << (2 * half)) < n) half++;
  const uint32_t mask = (1u << half) - 1;
  do {
    uint32_t left = i >> half, right = i & mask;
    for (uint32_t round = 0; round < 6; round++) {
      const uint32_t f = mix(right ^ mix(key.lo + round * 0x9E3779B9u) ^ mix(key.hi ^ epoch * 0x85ebca6bu)) & mask;
      const uint32_t next = left ^ f;
      left = right;
      right = next;
    }
    i = left << half | right;
  } while (i >= n);
  return i;
}

void gather_training_batch(float* x, float* x_squared, int32_t* labels, const DeviceImages& set, const int32_t* order,
                           size_t order_stride, const StepState* states, int replicas, int batch, Stream stream,
                           bool augment, const TaskInputs* tasks) {
  BATON_RANGE("gather_training_batch");
  if (augment && (set.height < 1 || set.width < 1 || long(set.height) * set.width != set.plane))
    throw InputError("gather_training_batch: to augment, images of " + std::to_string(set.plane) +
                     " pixels a plane must have a height and a width, not " + std::to_string(set.height) + "x" +
                     std::to_string(set.width));
  if (augment && tasks) throw InputError("gather_training_batch: images are augmented or of tasks, not both");
  if (tasks && (tasks->tasks < 1 || !tasks->pixel_order))
    throw InputError("gather_training_batch: pixel_order [" + std::to_string(tasks->tasks) + "][" +
                     std::to_string(set.channels * set.plane) + "] must have at least one task");
  if (tasks && tasks->cumulative && tasks->steps < 1)
    throw InputError("gather_training_batch: cumulative [" + std::to_string(tasks->steps) + "][" +
                     std::to_string(tasks->tasks) + "] must have at least one step");
  const auto shape = simt::blocks(batch, threads, 0, replicas);
  const auto run = [&]<Pixels how>() {
    simt::launch<gather_training_kernel<how>>(shape, stream, x, x_squared, labels, set, order, order_stride, states,
                                              batch, tasks ? *tasks : TaskInputs{});
  };
  if (augment) run.operator()<Pixels::augmented>();
  else if (tasks) run.operator()<Pixels::in_order>();
  else run.operator()<Pixels::as_they_are>();
}

void gather_indexed(float* x, float* x_squared, int32_t* labels, const DeviceImages& set, const int32_t* index,
                    int batch, Stream stream, const int32_t* pixel_order) {
  BATON_RANGE("gather_indexed");
  const auto shape = simt::blocks(batch, threads);
  if (pixel_order)
    simt::launch<gather_kernel<Pixels::in_order>>(shape, stream, x, x_squared, labels, set, index, pixel_order);
  else simt::launch<gather_kernel<Pixels::as_they_are>>(shape, stream, x, x_squared, labels, set, index, pixel_order);
}

}  // namespace baton
