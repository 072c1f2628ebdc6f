// Selection on the GPU: CUB sorts (score, index) by a stable radix sort, so that equal scores stay in their order (-0
// and 0 are equal), and then the first are marked. About 100 bytes a score: four passes that read and write pairs.
#include <cub/device/device_radix_sort.cuh>
#include <limits>

#include "engine/cuda_libraries.h"
#include "engine/select.h"

namespace baton {

namespace {

__global__ void number_kernel(int* __restrict__ index, int* __restrict__ not_a_number, const float* __restrict__ scores,
                              int n) {
  const int i = simt::thread_item();
  if (i >= n) return;
  index[i] = i;
  if (scores[i] != scores[i]) atomicMin(not_a_number, i);
}

__global__ void mark_kernel(uint8_t* __restrict__ marked, const int* __restrict__ ranked, int n) {
  const int i = simt::thread_item();
  if (i < n) marked[ranked[i]] = 1;
}

template <class T>
T value_at(Device& device, const T* p) {
  T value;
  copy_to_host(device, &value, p, sizeof value);
  return value;
}

}  // namespace

Selection mark_lowest(Device& device, uint8_t* marked, const float* scores, int count, int lowest) {
  BATON_RANGE("mark_lowest");
  if (count < 0 || lowest < 0 || lowest > count)
    throw InputError("mark_lowest: the " + std::to_string(lowest) + " lowest of scores [" + std::to_string(count) +
                     "]");
  const Stream stream = device.stream();
  Scratch::Frame scratch(device);
  int *index = scratch.take<int>(count), *ranked_index = scratch.take<int>(count), *not_a_number = scratch.take<int>(1);
  float* ranked = scratch.take<float>(count);
  copy_to_device(device, not_a_number, &count, sizeof count);
  simt::launch<number_kernel>(simt::each(count), stream, index, not_a_number, scores, count);
  if (const int at = value_at(device, not_a_number); at < count)
    throw InputError("mark_lowest: scores[" + std::to_string(at) + "] is not a number");
  fill_zero(device, marked, count);
  if (lowest == 0) return {-std::numeric_limits<float>::infinity(), 0};

  size_t bytes = 0;
  const auto sort = [&](void* workspace) {
    check(cub::DeviceRadixSort::SortPairs(workspace, bytes, scores, ranked, static_cast<const int*>(index),
                                          ranked_index, count, 0, 32, stream),
          "cub::DeviceRadixSort::SortPairs");
  };
  sort(nullptr);  // asks for the size
  sort(scratch.take<char>(bytes));
  simt::launch<mark_kernel>(simt::each(lowest), stream, marked, static_cast<const int*>(ranked_index), lowest);
  return {value_at(device, ranked + (lowest - 1)), lowest};
}

}  // namespace baton
