// Normalizing flows over z (flow.h has the formulas): the way forward, and the density at a given z. flow_backward.cu
// has the way back, flow_base.cu the base distribution, the KL and fresh parameters.
//
// h, t and k of a RealNVP step are functions of the elements that the step keeps, so the inverse finds them again from
// z' and is one pass as well:
//   gated   z = t + (z' - t) (1 + e^-k),   ln g = -ln(1 + e^-k)
//   affine  z = (z' - t) e^-k
// The inverse of a planar step, with x = w.z + b and sp = softplus(w.u), needs the root x of
//   x + (sp - 1) tanh x = w.z' + b,
// which Newton's method finds inside a bracket.
//
// Numerics. A gate only contracts, so the inverse multiplies errors by 1 / g at every step: k is clamped to at least -3
// (g >= 0.047) in both directions, and its gradient is 0 where it is clamped. Parameters, z and gradients are floats;
// everything between the first and the last step is double, the trace too. That costs nothing, for the time goes into
// reading the weights. So log q and z0 are those of the given float z, to rounding. Where the trace of the pass that
// made z is at hand, the inverse takes its z before it was rounded to float: then nothing is amplified, and equal flows
// have equal densities.
//
// Work. A RealNVP step is two launches. Hidden units: a block for each unit sums over D. Outputs: a block for each tile
// of 64 elements, a warp for each element, sums over the hidden units; rows of elements that the step keeps are not
// read. A step moves 8 H bytes and takes 6 H FLOPs for each row and element. A block for each tensor does all the
// planar steps, with 8 bytes for each element and step. All sums are in a fixed order, so every run gives the same
// bits.
#include "kernels/flow_parts.h"

namespace baton {

namespace {

constexpr double half_ln_2pi = 0.91893853320467274178;

// ------------------------------------------------------------------------------------------------------------ RealNVP
__global__ void enter_kernel(FlowShape s, FlowParameters p, Trace trace, const float* __restrict__ z,
                             const double* __restrict__ exact, int first_step, int groups) {
  const Tile at = find_tile(s, blockIdx.x);
  const int q = simt::row();
  const FlowTensor& tensor = s.table[at.tensor];
  const size_t i = tensor.z_at + at.first;
  const float* __restrict__ mask = p.values + p.stride * (q / groups) + tensor.steps[first_step].mask + at.first;
  const float* __restrict__ from = z + size_t(s.z_size) * q + i;
  double* __restrict__ state = trace.state(q) + i;
  double* __restrict__ masked = trace.masked(q, first_step) + i;
  SIMT_SIMD()
  for (int e = threadIdx.x; e < at.count; e += blockDim.x) {
    const double value = exact ? exact[trace.row_size * q + i + e] : double(from[e]);
    state[e] = value;
    masked[e] = double(mask[e]) * value;
  }
}

__global__ void hidden_kernel(FlowShape s, FlowParameters p, Trace trace, const int32_t* identity, int step,
                              int groups) {
  const int t = blockIdx.x % s.tensors, unit = blockIdx.x / s.tensors, q = simt::row(), r = q / groups;
  const FlowTensor& tensor = s.table[t];
  const FlowStep& at = tensor.steps[step];
  const int n = is_identity(identity, r) ? 0 : tensor.size;
  const float* __restrict__ values = p.values + p.stride * r;
  const float* __restrict__ w = values + at.w0 + size_t(unit) * tensor.size;
  const double* __restrict__ masked = trace.masked(q, step) + tensor.z_at;
  double sum = 0;
  SIMT_SIMD(reduction(+ : sum))
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += double(w[i]) * masked[i];
  sum = sum_over_block(sum);
  if (threadIdx.x == 0) trace.hidden_units(q, step, t)[unit] = tanh(sum + values[at.b0 + unit]);
}

// z' from z, or with `inverse` z from z'. `next` is the step that is computed after this one, or -1.
__global__ void couple_kernel(FlowShape s, FlowParameters p, Trace trace, const int32_t* identity, bool inverse,
                              int step, int next, int groups) {
  __shared__ double shifts[tile], gates[tile];
  const Tile tile_at = find_tile(s, blockIdx.x);
  const int q = simt::row(), r = q / groups, first = tile_at.first;
  const FlowTensor& tensor = s.table[tile_at.tensor];
  const FlowStep& at = tensor.steps[step];
  const bool none = is_identity(identity, r);
  const float* __restrict__ values = p.values + p.stride * r;
  const float* __restrict__ mask = values + at.mask + first;
  const float* __restrict__ w1 = values + at.w1 + size_t(first) * s.hidden;
  const float* __restrict__ w2 = values + at.w2 + size_t(first) * s.hidden;
  const double* __restrict__ h = trace.hidden_units(q, step, tile_at.tensor);
  const int warps = blockDim.x / simt::warp_size;
  for (int e = threadIdx.x / simt::warp_size; e < tile_at.count; e += warps) {
    const int n = none || mask[e] != 0 ? 0 : s.hidden;
    const size_t row = size_t(e) * s.hidden;
    double shift = 0, gate = 0;
    SIMT_SIMD(reduction(+ : shift, gate))
    for (int j = simt::lane_id(); j < n; j += simt::warp_size) {
      shift += double(w1[row + j]) * h[j];
      gate += double(w2[row + j]) * h[j];
    }
    shift = simt::warp_sum(shift), gate = simt::warp_sum(gate);
    if (simt::lane_id() == 0) shifts[e] = shift, gates[e] = gate;
  }
  __syncthreads();

  const size_t i = tensor.z_at + first;
  double* __restrict__ state = trace.state(q) + i;
  double* __restrict__ value = trace.value(q, step) + i;
  double* __restrict__ gate = trace.gate(q, step) + i;
  double* __restrict__ next_masked = next < 0 ? nullptr : trace.masked(q, next) + i;
  const float* __restrict__ next_mask = next < 0 ? nullptr : values + tensor.steps[next].mask + first;
  double logdet = 0;
  for (int e = threadIdx.x; e < tile_at.count; e += blockDim.x) {
    double z = state[e];
    if (!none && mask[e] == 0) {
      const double t = shifts[e] + values[at.b1 + first + e], k = gates[e] + values[at.b2 + first + e];
      if (s.kind == FlowKind::gated) {
        const double closed = exp(-clamp_gate(k)), away = inverse ? (z - t) * (1 + closed) : z - t;
        logdet -= log1p(closed);
        value[e] = away;
        z = inverse ? t + away : t + away / (1 + closed);
      } else {
        const double before = inverse ? (z - t) * exp(-k) : z;
        logdet += k;
        value[e] = before;
        z = inverse ? before : before * exp(k) + t;
      }
      gate[e] = k;
      state[e] = z;
    }
    if (next >= 0) next_masked[e] = double(next_mask[e]) * z;
  }
  logdet = sum_over_block(logdet);
  if (threadIdx.x == 0) trace.logdet(q, step)[blockIdx.x] = logdet;
}

// ln N(z0; m0, s0^2) summed over a tensor, of floats or of doubles.
template <class T>
__device__ __forceinline__ double base_density(const FlowTensor& tensor, const float* values,
                                               const T* __restrict__ z0) {
  const float* __restrict__ mean = values + tensor.base_mean;
  const float* __restrict__ log_std = values + tensor.base_log_std;
  double sum = 0;
  for (int i = threadIdx.x; i < tensor.size; i += blockDim.x) {
    const double e = (z0[i] - double(mean[i])) * exp(-double(log_std[i]));
    sum -= 0.5 * e * e + log_std[i] + half_ln_2pi;
  }
  return sum;
}

// Writes the last z as floats, and the density. z0 null: the last z is z0.
__global__ void leave_kernel(FlowShape s, FlowParameters p, Trace trace, float* __restrict__ z, double* log_q,
                             const float* __restrict__ z0, int groups) {
  const int t = blockIdx.x, q = simt::row();
  const FlowTensor& tensor = s.table[t];
  const size_t at = size_t(s.z_size) * q + tensor.z_at;
  const double* __restrict__ state = trace.state(q) + tensor.z_at;
  SIMT_SIMD()
  for (int i = threadIdx.x; i < tensor.size; i += blockDim.x) z[at + i] = float(state[i]);
  double sum = 0;
  if (log_q) {
    const float* values = p.values + p.stride * (q / groups);
    sum = z0 ? base_density(tensor, values, z0 + at) : base_density(tensor, values, state);
    const int first = tensor.z_at / tile, count = (tensor.size + tile - 1) / tile;
    for (int k = 0; k < s.steps; k++)
      for (int i = threadIdx.x; i < count; i += blockDim.x) sum -= trace.logdet(q, k)[first + i];
  }
  sum = sum_over_block(sum);
  if (log_q && threadIdx.x == 0) log_q[size_t(s.tensors) * q + t] = sum;
}

// ------------------------------------------------------------------------------------------------------------- planar
// The root of x + (sp - 1) tanh x = target. The left side is odd and increasing: Newton's steps inside a bracket, and
// bisection where one of them leaves it.
__device__ __forceinline__ double planar_root(double sp, double target) {
  const double bend = sp - 1, y = fabs(target);
  double low = bend > 0 ? fmax(0., y - bend) : y, high = bend > 0 ? y : y - bend, x = 0.5 * (low + high);
  for (int i = 0; i < 200; i++) {
    const double th = tanh(x), f = x + bend * th - y;
    if (f > 0) high = x;
    else low = x;
    double next = x - f / (th * th + (1 - th * th) * sp);
    if (!(next >= low && next <= high)) next = 0.5 * (low + high);
    const double move = fabs(next - x);
    x = next;
    if (move <= 2.3e-16 * x) break;
  }
  return copysign(x, target);
}
// All the steps of one tensor. z_in (z0 or z) and z_out (z or z0) are floats; a thread keeps to its elements.
__global__ void planar_kernel(FlowShape s, FlowParameters p, Trace trace, const int32_t* identity, bool inverse,
                              float* __restrict__ z_out, double* log_q, const float* __restrict__ z_in,
                              const double* __restrict__ exact, int groups) {
  const int t = blockIdx.x, q = simt::row(), r = q / groups;
  const FlowTensor& tensor = s.table[t];
  const float* values = p.values + p.stride * r;
  const size_t at = size_t(s.z_size) * q + tensor.z_at;
  double* __restrict__ state = trace.state(q) + tensor.z_at;
  SIMT_SIMD()
  for (int i = threadIdx.x; i < tensor.size; i += blockDim.x)
    state[i] = exact ? exact[trace.row_size * q + tensor.z_at + i] : double(z_in[at + i]);
  double logdet = 0;
  const int steps = is_identity(identity, r) ? 0 : s.steps;
  for (int n = 0; n < steps; n++) {
    const int k = inverse ? steps - 1 - n : n;
    const float* __restrict__ w = values + tensor.steps[k].w0;
    const float* __restrict__ u = values + tensor.steps[k].b1;
    double wz = 0, wu = 0, ww = 0;
    SIMT_SIMD(reduction(+ : wz, wu, ww))
    for (int i = threadIdx.x; i < tensor.size; i += blockDim.x) {
      wz += double(w[i]) * state[i];
      wu += double(w[i]) * u[i];
      ww += double(w[i]) * w[i];
    }
    wz = sum_over_block(wz), wu = sum_over_block(wu), ww = sum_over_block(ww);
    const Bend bend = compute_bend(wu, ww);
    const double target = wz + values[tensor.steps[k].b0], x = inverse ? planar_root(bend.sp, target) : target;
    const double th = tanh(x);
    logdet += log(th * th + (1 - th * th) * bend.sp);
    if (threadIdx.x == 0) {
      double* kept = trace.planar(q, k, t);
      kept[0] = x, kept[1] = wu, kept[2] = ww;
    }
    double* __restrict__ before = trace.masked(q, k) + tensor.z_at;
    const double move = inverse ? -th : th;
    SIMT_SIMD()
    for (int i = threadIdx.x; i < tensor.size; i += blockDim.x) {
      const double z = state[i], moved = z + move * (u[i] + bend.along * w[i]);
      before[i] = inverse ? moved : z;
      state[i] = moved;
    }
  }
  SIMT_SIMD()
  for (int i = threadIdx.x; i < tensor.size; i += blockDim.x) z_out[at + i] = float(state[i]);
  double sum = 0;
  if (log_q)
    sum = inverse ? base_density(tensor, values, static_cast<const double*>(state))
                  : base_density(tensor, values, z_in + at);
  sum = sum_over_block(sum);
  if (log_q && threadIdx.x == 0) log_q[size_t(s.tensors) * q + t] = sum - logdet;
}

// --------------------------------------------------------------------------------------------------------- launches
// The steps in their order, or with `inverse` in the opposite one, then z and the density.
void run(const FlowShape& s, FlowParameters p, const Trace& trace, const int32_t* identity, bool inverse, float* z_out,
         double* log_q, const float* z_in, const double* exact, int rows, int groups, Stream stream) {
  const auto per_tensor = simt::blocks(s.tensors, threads, 0, rows);
  if (s.kind == FlowKind::planar || s.steps == 0) {
    simt::launch<planar_kernel>(per_tensor, stream, s, p, trace, identity, inverse, z_out, log_q, z_in, exact, groups);
    return;
  }
  const int tiles = trace.tiles(), first = inverse ? s.steps - 1 : 0, forward = inverse ? -1 : 1;
  simt::launch<enter_kernel>(simt::blocks(tiles, tile, 0, rows), stream, s, p, trace, z_in, exact, first, groups);
  for (int n = 0; n < s.steps; n++) {
    const int k = first + forward * n, next = n + 1 < s.steps ? k + forward : -1;
    simt::launch<hidden_kernel>(simt::blocks(s.tensors * s.hidden, threads, 0, rows), stream, s, p, trace, identity, k,
                                groups);
    simt::launch<couple_kernel>(simt::blocks(tiles, threads, 0, rows), stream, s, p, trace, identity, inverse, k, next,
                                groups);
  }
  const float* z0 = inverse ? nullptr : z_in;
  simt::launch<leave_kernel>(per_tensor, stream, s, p, trace, z_out, log_q, z0, groups);
}

}  // namespace

void check_flow_shape(const std::string& who, const FlowShape& s) {
  const bool planar = s.kind == FlowKind::planar;
  if (s.kind != FlowKind::gated && s.kind != FlowKind::affine && !planar)
    throw InputError(who + ": no such kind of flow: " + std::to_string(int(s.kind)));
  if (s.steps < 0 || s.steps > most_flow_steps || s.tensors < 1 || s.tensors > most_flow_tensors ||
      (!planar && (s.hidden < 1 || int64_t(s.hidden) * s.largest > INT32_MAX)))
    throw InputError(who + ": a flow of " + std::to_string(s.steps) + " steps with " + std::to_string(s.hidden) +
                     " hidden units over " + std::to_string(s.tensors) + " tensors; at most " +
                     std::to_string(most_flow_steps) + " steps and " + std::to_string(most_flow_tensors) + " tensors");
  if (s.largest < 1 || s.z_size < s.largest || s.z_size % tile != 0)
    throw InputError(who + ": a row of z of " + std::to_string(s.z_size) + " floats, the largest tensor " +
                     std::to_string(s.largest) + "; every tensor is rounded up to " + std::to_string(tile));
}

void check_flow_rows(const std::string& who, int groups, int rows) {
  if (groups < 1 || rows < 1 || rows % groups != 0 || rows > most_flow_rows)
    throw InputError(who + ": " + std::to_string(rows) + " rows of z in groups of " + std::to_string(groups));
}

size_t count_trace_doubles(const FlowShape& s) {
  const size_t z = size_t(s.z_size), steps = size_t(s.steps), tensors = size_t(s.tensors), hidden = size_t(s.hidden);
  const size_t count = s.kind == FlowKind::planar
                           ? z * (2 + steps) + steps * tensors * 3
                           : z * (2 + 3 * steps) + (steps + 1) * tensors * hidden + z / tile * (steps + hidden);
  return (count + 31) / 32 * 32;
}

size_t flow_trace_floats(const FlowShape& s, int rows) {
  check_flow_shape("flow_trace_floats", s);
  check_flow_rows("flow_trace_floats", 1, rows);
  return count_trace_doubles(s) * size_t(rows) * (sizeof(double) / sizeof(float));
}

void flow_forward(float* z, double* log_q, const FlowShape& s, FlowParameters p, const float* z0, FlowTrace trace,
                  int groups, Stream stream) {
  BATON_RANGE("flow_forward");
  const Trace view = open_trace("flow_forward", s, trace, groups);
  if (z == z0) throw InputError("flow_forward: z is z0 itself, expected memory of its own");
  run(s, p, view, nullptr, false, z, log_q, z0, nullptr, trace.rows, groups, stream);
}

void flow_log_density(double* log_q, float* z0, const FlowShape& s, FlowParameters p, const float* z,
                      const int32_t* identity, FlowTrace trace, int groups, Stream stream, const FlowTrace* made_by) {
  BATON_RANGE("flow_log_density");
  const Trace view = open_trace("flow_log_density", s, trace, groups);
  if (z == z0) throw InputError("flow_log_density: z0 is z itself, expected memory of its own");
  const double* exact = nullptr;
  if (made_by) {
    if (made_by->rows != trace.rows || made_by->memory == trace.memory)
      throw InputError("flow_log_density: the trace that made z has " + std::to_string(made_by->rows) +
                       " rows of z, expected " + std::to_string(trace.rows) + " in memory of its own");
    exact = open_trace("flow_log_density", s, *made_by, groups).memory;  // a row begins with its last z
  }
  run(s, p, view, identity, true, z0, log_q, z, exact, trace.rows, groups, stream);
}

}  // namespace baton
