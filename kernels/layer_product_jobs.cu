// What the products of all layers do together: weights are laid out as operands, and parts of gradients are added up. A
// block looks for its job by the number of its first block.
//
// Bytes: 4 for a weight, and 4 for each of its places; 4 for each part, and 4 for its sum.
#include "kernels/layer_product_parts.h"

namespace baton {

namespace {

constexpr int pack_threads = simt::warp_size == 1 ? 1 : 256, pack_each = simt::warp_size == 1 ? 256 : 1;
constexpr int pack_items = pack_threads * pack_each;  // of a block
// A block adds `together` neighbouring sums; each by `strands` threads, of which every one takes each `strands`-th
// part.
constexpr int together = 32, strands = simt::warp_size == 1 ? 1 : 8;

template <class Job>
__device__ __forceinline__ int job_of(const Job* jobs, int count) {
  int job = 0;
  while (job + 1 < count && int(blockIdx.x) >= jobs[job + 1].first_block) job++;
  return job;
}

__host__ __device__ inline int items_forward(const Packing& p) { return p.shape.out_channels * forward_pitch(p.shape); }
__host__ __device__ inline int items(const Packing& p) {
  return items_forward(p) + (p.backward ? p.shape.in_channels * backward_pitch(p.shape) : 0);
}

__device__ __forceinline__ void pack_one(const Packing& p, int item, int set) {
  const ConvShape& s = p.shape;
  const int plane = s.kernel * s.kernel, of_forward = items_forward(p);
  const float* from = p.weights.data + p.weights.stride * size_t(set);
  if (item < of_forward) {
    const int pitch = forward_pitch(s), out = item / pitch, k = item - out * pitch, depth = s.in_channels * plane;
    p.forward[size_t(set) * of_forward + item] = k < depth ? simt::round_to_tf32(from[size_t(out) * depth + k]) : 0.f;
  } else {
    const int i = item - of_forward, pitch = backward_pitch(s), in = i / pitch, k = i - in * pitch;
    const int out = k / plane, place = plane - 1 - (k - out * plane);
    const bool inside = out < s.out_channels;
    p.backward[size_t(set) * s.in_channels * pitch + i] =
        inside ? simt::round_to_tf32(from[(size_t(out) * s.in_channels + in) * plane + place]) : 0.f;
  }
}

__global__ void pack_kernel(const Packing* __restrict__ jobs, int count) {
  const Packing& p = jobs[job_of(jobs, count)];
  const int first = (int(blockIdx.x) - p.first_block) * pack_items, set = simt::row();
  for (int at = threadIdx.x; at < pack_items; at += blockDim.x)
    if (set < p.sets && first + at < items(p)) pack_one(p, first + at, set);
}

__global__ void add_parts_kernel(const PartSum* __restrict__ jobs, int count) {
  __shared__ float of_strands[strands * together];
  const PartSum& s = jobs[job_of(jobs, count)];
  const int first = (int(blockIdx.x) - s.first_block) * together, row = simt::row();
  for (int at = threadIdx.x; at < strands * together; at += blockDim.x) {
    const int i = first + at % together;
    float sum = 0;
    if (row < s.rows && i < s.count) {
      const float* from = s.from.data + s.from.stride * size_t(row) + i;
      for (int p = at / together; p < s.parts; p += strands) sum += from[size_t(p) * s.part_stride];
    }
    of_strands[at] = sum;
  }
  __syncthreads();
  for (int at = threadIdx.x; at < together; at += blockDim.x)
    if (row < s.rows && first + at < s.count) {
      float sum = of_strands[at];
      for (int strand = 1; strand < strands; strand++) sum += of_strands[strand * together + at];
      s.to.data[s.to.stride * size_t(row) + first + at] = sum;
    }
}

}  // namespace

void ProductJobs::add(const Packing& p) {
  packings_.push_back(p);
  packings_.back().first_block = packing_blocks_;
  packing_blocks_ += (items(p) + pack_items - 1) / pack_items;
  packing_rows_ = std::max(packing_rows_, p.sets);
}

void ProductJobs::add(const PartSum& s) {
  sums_.push_back(s);
  sums_.back().first_block = sum_blocks_;
  sum_blocks_ += (s.count + together - 1) / together;
  sum_rows_ = std::max(sum_rows_, s.rows);
}

void ProductJobs::settle(Device& device, Arena& arena) {
  device_packings_ = arena.take<Packing>(packings_.size());
  device_sums_ = arena.take<PartSum>(sums_.size());
  if (!packings_.empty()) upload(device, device_packings_, packings_);
  if (!sums_.empty()) upload(device, device_sums_, sums_);
}

void ProductJobs::pack(Stream stream) const {
  BATON_RANGE("pack_weights");
  if (packings_.empty()) return;
  simt::launch<pack_kernel>(simt::blocks(packing_blocks_, pack_threads, 0, packing_rows_), stream,
                            (const Packing*)device_packings_, int(packings_.size()));
}

void ProductJobs::add_up(Stream stream) const {
  BATON_RANGE("add_parts");
  if (sums_.empty()) return;
  simt::launch<add_parts_kernel>(simt::blocks(sum_blocks_, simt::warp_size == 1 ? 1 : strands * together, 0, sum_rows_),
                                 stream, (const PartSum*)device_sums_, int(sums_.size()));
}

}  // namespace baton
