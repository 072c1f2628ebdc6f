// Dropout from a counter. A thread makes one Philox call, whose four words are for the elements j, q + j, 2q + j and
// 3q + j, so that all reads and writes are contiguous.
//
//   x[i] *= m / (1 - p),  m = [word >= p 2^32]   (in place)
//
// This is a product and not a select, so that dropping does not hide an element that is not finite. An element takes 8
// bytes, one product and a quarter of a Philox call (about 25 integer operations).
#include "kernels/dropout.h"

#include <cmath>

namespace baton {

namespace {

__global__ void dropout_kernel(float* x, size_t count, int quarter, uint32_t threshold, float scale,
                               const StepState* states, uint32_t stream_id, int first_replica, bool rounded) {
  const int j = simt::thread_item(), r = simt::row();
  if (j >= quarter) return;
  const uint4 words =
      philox(make_uint4(uint32_t(j), stream_id, states[0].step, uint32_t(first_replica + r)), states[0].noise);
  const size_t q = size_t(quarter);
  float* to = x + count * r + j;
  to[0] = simt::as_operand(to[0] * (words.x < threshold ? 0.f : scale), rounded);
  if (q + j < count) to[q] = simt::as_operand(to[q] * (words.y < threshold ? 0.f : scale), rounded);
  if (2 * q + j < count) to[2 * q] = simt::as_operand(to[2 * q] * (words.z < threshold ? 0.f : scale), rounded);
  if (3 * q + j < count) to[3 * q] = simt::as_operand(to[3 * q] * (words.w < threshold ? 0.f : scale), rounded);
}

}  // namespace

void dropout(float* x, size_t count, int replicas, float rate, const StepState* states, uint32_t stream_id,
             Stream stream, int first_replica, bool rounded) {
  BATON_RANGE("dropout");
  if (!(rate >= 0 && rate < 1))
    throw InputError("dropout: a rate of " + std::to_string(rate) + ", expected at least 0 and less than 1");
  const size_t quarter = (count + 3) / 4;
  if (quarter > size_t(INT32_MAX))
    throw InputError("dropout: x [" + std::to_string(replicas) + "][" + std::to_string(count) +
                     "], expected less than 2^33 elements a replica");
  if (rate == 0) return;
  const uint32_t threshold = uint32_t(std::ceil(double(rate) * 0x1p32));  // of words: p 2^32
  const float scale = float(1 / (1 - double(rate)));
  simt::launch<dropout_kernel>(simt::each(int(quarter), replicas), stream, x, count, int(quarter), threshold, scale,
                               states, stream_id, first_replica, rounded);
}

}  // namespace baton
