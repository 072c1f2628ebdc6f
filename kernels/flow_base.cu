// Normalizing flows: draws of the base distribution, the KL of z, and the parameters of a fresh flow.
#include "kernels/flow_parts.h"

namespace baton {

namespace {

// ------------------------------------------------------------------------------------------------- base, KL, start
struct BaseNoise {
  const StepState* states;  // null: `key`, draw numbers from `first_draw`, no groups
  Key key;
  uint32_t first_draw;
  bool noise;
};

__global__ void draw_base_kernel(float* __restrict__ z0, FlowShape s, FlowParameters p, BaseNoise b, int groups) {
  const Tile at = find_tile(s, blockIdx.x);
  const int q = simt::row(), r = b.states ? q / groups : 0, g = b.states ? q % groups : 0;
  const FlowTensor& tensor = s.table[at.tensor];
  const Key key = b.states ? b.states[r].noise : b.key;
  const uint32_t step = b.states ? b.states[r].step : b.first_draw + q, stream_id = tensor.stream_id;
  const uint32_t counter = uint32_t(g) * ((tensor.size + 3) / 4) + at.first / 4;
  const float* __restrict__ mean = p.values + p.stride * r + tensor.base_mean + at.first;
  const float* __restrict__ log_std = p.values + p.stride * r + tensor.base_log_std + at.first;
  float* __restrict__ to = z0 + size_t(s.z_size) * q + tensor.z_at + at.first;
  const int count = at.count, noisy = b.noise;
  SIMT_SIMD()
  for (int i = threadIdx.x; i < (count + 3) / 4; i += blockDim.x) {
    const float4 e = normal4(key, counter + i, stream_id, step);
    const float lane[4] = {e.x, e.y, e.z, e.w};
    SIMT_UNROLL
    for (int c = 0; c < 4; c++) {
      const int j = 4 * i + c;
      if (j < count) to[j] = noisy ? mean[j] + expf(log_std[j]) * lane[c] : mean[j];
    }
  }
}

__global__ void flow_kl_kernel(double* __restrict__ accumulator, size_t accumulator_stride,
                               const double* __restrict__ log_q, const double* __restrict__ log_prior, int tensors,
                               int groups) {
  const int t = simt::thread_item(), r = simt::row();
  if (t >= tensors) return;
  double sum = 0;
  for (int g = 0; g < groups; g++) {
    const size_t i = (size_t(r) * groups + g) * tensors + t;
    sum += log_q[i] - log_prior[i];
  }
  accumulator[accumulator_stride * r + t] += sum / groups;
}

// Counters are the parameters' places in the store, with draw 1, which no other initialisation uses.
__device__ __forceinline__ void fill_normal(float* __restrict__ values, int at, int count, float sd, Key key) {
  SIMT_SIMD()
  for (int i = threadIdx.x; i < count; i += blockDim.x)
    values[at + i] = sd * normal4(key, uint32_t(at + i), stream_init, 0, 1).x;
}
__device__ __forceinline__ void fill(float* __restrict__ values, int at, int count, float value) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) values[at + i] = value;
}

// A block initialises one step of one tensor, and with step 0 the base. A balanced mask: a coin for every two
// neighbours decides which of them is kept. An odd step uses the coins of the step before it, and keeps the other one.
__global__ void initialise_kernel(float* values, FlowShape s, size_t stride, float log_std, const StepState* states) {
  const int t = blockIdx.x % s.tensors, step = blockIdx.x / s.tensors, r = simt::row();
  const FlowTensor& tensor = s.table[t];
  const int size = tensor.size;
  const Key key = states[r].noise;
  float* own = values + stride * r;
  if (step == 0) {
    fill(own, tensor.base_mean, size, 1.f);
    fill(own, tensor.base_log_std, size, log_std);
  }
  if (step < s.steps) {
    const FlowStep& at = tensor.steps[step];
    if (s.kind == FlowKind::planar) {
      const float sd = 0.1f / sqrtf(float(size));
      fill_normal(own, at.w0, size, sd, key);
      fill_normal(own, at.b1, size, sd, key);
      fill(own, at.b0, 1, 0.f);
    } else {
      const float sd = 0.1f / sqrtf(float(s.hidden));
      const int coins = tensor.steps[step / 2 * 2].mask;
      for (int i = threadIdx.x; i < size; i += blockDim.x) {
        const uint32_t coin = philox(make_uint4(uint32_t(coins + i / 2), stream_init, 0, 1), key).x >> 31;
        own[at.mask + i] = float((coin + i + step) & 1);
      }
      fill_normal(own, at.w0, s.hidden * size, 0.1f / sqrtf(float(size)), key);
      fill_normal(own, at.w1, s.hidden * size, sd, key);
      fill_normal(own, at.w2, s.hidden * size, sd, key);
      fill(own, at.b0, s.hidden, 0.f);
      fill(own, at.b1, size, s.kind == FlowKind::gated ? 1.f : 0.f);
      fill(own, at.b2, size, s.kind == FlowKind::gated ? 2.f : 0.f);
    }
  }
}

void draw(const std::string& who, float* z0, const FlowShape& s, FlowParameters p, const BaseNoise& noise, int groups,
          int rows, Stream stream) {
  check_flow_shape(who, s);
  check_flow_rows(who, groups, rows);
  simt::launch<draw_base_kernel>(simt::blocks(s.z_size / tile, 32, 0, rows), stream, z0, s, p, noise, groups);
}

}  // namespace

void flow_draw_base(float* z0, const FlowShape& s, FlowParameters p, int groups, int replicas, const StepState* states,
                    Stream stream) {
  BATON_RANGE("flow_draw_base");
  if (!states) throw InputError("flow_draw_base: no states");
  draw("flow_draw_base", z0, s, p, {states, Key{}, 0, true}, groups, groups * replicas, stream);
}

void flow_draw_base_draws(float* z0, const FlowShape& s, FlowParameters p, bool noise, int first_sample, int samples,
                          Key key, Stream stream) {
  BATON_RANGE("flow_draw_base_draws");
  draw("flow_draw_base_draws", z0, s, p, {nullptr, key, uint32_t(first_sample), noise}, 1, samples, stream);
}

void flow_kl(double* accumulator, size_t accumulator_stride, const double* log_q, const double* log_prior, int tensors,
             int groups, int replicas, Stream stream) {
  BATON_RANGE("flow_kl");
  if (tensors < 1 || groups < 1 || replicas < 1 || replicas > most_flow_rows || accumulator_stride < size_t(tensors))
    throw InputError("flow_kl: log_q is [" + std::to_string(replicas) + " replicas x " + std::to_string(groups) +
                     " groups][" + std::to_string(tensors) + "], an accumulator's row has " +
                     std::to_string(long(accumulator_stride)));
  simt::launch<flow_kl_kernel>(simt::each(tensors, replicas), stream, accumulator, accumulator_stride, log_q, log_prior,
                               tensors, groups);
}

void flow_initialise(float* values, const FlowShape& s, size_t stride, float log_std, const StepState* states,
                     int replicas, Stream stream) {
  BATON_RANGE("flow_initialise");
  check_flow_shape("flow_initialise", s);
  check_flow_rows("flow_initialise", 1, replicas);
  simt::launch<initialise_kernel>(simt::blocks(s.tensors * max(s.steps, 1), threads, 0, replicas), stream, values, s,
                                  stride, log_std, states);
}

}  // namespace baton
