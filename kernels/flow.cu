// Normalizing flows over z (flow.h has the formulas): the way forward, the density at a given z, and the way back of
// both; the KL of z, and the parameters of a fresh flow. flow_steps.h has what a block does at a step.
//
// h, t and k of a RealNVP step are functions of the elements that the step keeps, so the inverse finds them again from
// z' and is one pass as well:
//   gated   z = t + (z' - t) (1 + e^-k),   ln g = -ln(1 + e^-k)
//   affine  z = (z' - t) e^-k
// The inverse of a planar step, with x = w.z + b and sp = softplus(w.u), needs the root x of
//   x + (sp - 1) tanh x = w.z' + b,
// which Newton's method finds inside a bracket.
//
// The way back. With a = dL/dz' of an element that the step changes and c = dL/dlogdet, a becomes dL/dz in place:
//   gated   dt = (1 - g) a,   dk = (1 - g) (g a (z - t) + c),   a <- g a
//   affine  dt = a,           dk = a z e^k + c,                 a <- e^k a
// The density goes through the inverse, so there a = dL/dz becomes dL/dz', with c = -1:
//   gated   dt = -e^-k a,     dk = (1 - g) (c - a (z - t)),     a <- a / g
//   affine  dt = -e^-k a,     dk = c - a z,                     a <- e^-k a
// Then in both, for the hidden units and the elements that the step keeps:
//   dh = W1' dt + W2' dk,   dW1 = dt h',   dW2 = dk h',   d = (1 - h^2) dh,   dW0 = d (m z)',   a += m W0' d
// Planar, with x = w.z + b, th = tanh x, s = 1 - th^2, sp = softplus(w.u), J = th^2 + s sp, u^ = u + along w:
//   forward  dx = s u^.a - 2 c th s (sp - 1) / J,    a <- a + w dx
//   density  dx = -s u^.a + 2 th s (sp - 1) / J,     a <- a + w dx / J
//
// Numerics. A gate only contracts, so the inverse multiplies errors by 1 / g at every step: k is clamped to at least -3
// (g >= 0.047) in both directions, and its gradient is 0 where it is clamped. Parameters, z and gradients are floats;
// everything between the first and the last step is double, the trace too. So log q and z0 are those of the given float
// z, to rounding. Where the trace of the pass that made z is at hand, the inverse takes its z before it was rounded to
// float: then nothing is amplified, and equal flows have equal densities.
//
// Work. A step needs all of what the step before it made, and a launch costs a GPU more than the step itself. So a
// block takes a tensor of a row through all the steps, with barriers between them: a pass is one launch, of a density
// with its way back. A warp sums a hidden unit over D, eight threads an element over the hidden units; rows of elements
// that the step keeps are not read. The products dW0, dW1 and dW2 hold up no step: a second launch of the way back
// makes them, with a block for each step and tile of 64 elements. A step moves 8 H bytes and takes 6 H FLOPs for each
// row and element, 12 H bytes and as many FLOPs back, and 12 H bytes for the gradients. All sums are in a fixed order,
// so every run gives the same bits.
#include "kernels/flow_steps.h"

namespace baton {

namespace {

constexpr double half_ln_2pi = 0.91893853320467274178;

// ln N(z0; m0, s0^2), of this thread's elements of floats or of doubles.
template <class T>
__device__ __forceinline__ double base_density(const Chain& c, const T* z0) {
  const float* __restrict__ mean = c.values + c.tensor.base_mean;
  const float* __restrict__ log_std = c.values + c.tensor.base_log_std;
  double sum = 0;
  for (int i = threadIdx.x; i < c.tensor.size; i += blockDim.x) {
    const double e = (z0[i] - double(mean[i])) * exp(-double(log_std[i]));
    sum -= 0.5 * e * e + log_std[i] + half_ln_2pi;
  }
  return sum;
}

__device__ __forceinline__ void draw_base(const Chain& c, const FlowNoise& noise, int groups, float* __restrict__ z0) {
  const bool training = noise.kind == FlowNoise::training;
  const StepState* state = training ? noise.states + c.q / groups : nullptr;
  const Key key = training ? state->noise : noise.key;
  const uint32_t step = training ? state->step : uint32_t(noise.first + c.q), stream_id = c.tensor.stream_id;
  const int size = c.tensor.size, noisy = noise.kind != FlowNoise::none;
  const uint32_t counter = training ? uint32_t(c.q % groups) * ((size + 3) / 4) : 0;
  const float* __restrict__ mean = c.values + c.tensor.base_mean;
  const float* __restrict__ log_std = c.values + c.tensor.base_log_std;
  SIMT_SIMD()
  for (int i = threadIdx.x; i < (size + 3) / 4; i += blockDim.x) {
    const float4 e = normal4(key, counter + i, stream_id, step);
    const float lane[4] = {e.x, e.y, e.z, e.w};
    SIMT_UNROLL
    for (int j = 0; j < 4; j++) {
      const int at = 4 * i + j;
      if (at < size) z0[at] = noisy ? mean[at] + expf(log_std[at]) * lane[j] : mean[at];
    }
  }
  __syncthreads();
}

template <class Start, class Finish>
__device__ __forceinline__ void go_back(const Chain& c, bool inverse, double logdet_slope, Start start, Finish finish) {
  if (c.shape.kind == FlowKind::planar) bend_back(c, inverse, logdet_slope, start, finish);
  else couple_back(c, inverse, logdet_slope, start, finish);
}

// All the steps from the state, and the density of z by z0. Returns what is subtracted from that of z0.
__device__ __forceinline__ double go_forth(const Chain& c, bool inverse) {
  double logdet = 0;
  for (int n = 0; n < c.steps; n++) {
    const int k = inverse ? c.steps - 1 - n : n;
    logdet += c.shape.kind == FlowKind::planar ? bend_along(c, k, inverse) : couple(c, k, inverse);
  }
  return logdet;
}

__global__ void __launch_bounds__(threads, 1)
    flow_forward_kernel(FlowShape s, FlowParameters p, Trace trace, float* __restrict__ z, double* log_q, float* z0,
                        FlowNoise noise, bool draws, int groups) {
  const Chain c = open_chain(s, p, trace, nullptr, blockIdx.x, simt::row(), groups);
  z0 += c.at();
  if (draws) draw_base(c, noise, groups, z0);
  double* state = c.state();
  SIMT_SIMD()
  for (int i = threadIdx.x; i < c.tensor.size; i += blockDim.x) state[i] = double(z0[i]);
  const double logdet = go_forth(c, false);
  SIMT_SIMD()
  for (int i = threadIdx.x; i < c.tensor.size; i += blockDim.x) z[c.at() + i] = float(state[i]);
  if (log_q) {
    const double sum = sum_over_block(base_density(c, z0) - logdet);
    if (threadIdx.x == 0) log_q[size_t(s.tensors) * c.q + c.t] = sum;
  }
}

// A density with an opened trace.
struct Density {
  FlowDensity to;
  Trace trace;
};
__global__ void __launch_bounds__(threads, 1)
    flow_density_kernel(FlowShape s, Density first, Density second, const float* __restrict__ z,
                        const double* __restrict__ exact, const StepState* states, int groups) {
  const Density d = int(blockIdx.x) < s.tensors ? first : second;
  const Chain c =
      open_chain(s, d.to.parameters, d.trace, d.to.identity, int(blockIdx.x) % s.tensors, simt::row(), groups);
  double* state = c.state();
  const size_t of_trace = d.trace.row_size * c.q + c.tensor.z_at;
  SIMT_SIMD()
  for (int i = threadIdx.x; i < c.tensor.size; i += blockDim.x)
    state[i] = exact ? exact[of_trace + i] : double(z[c.at() + i]);
  const double logdet = go_forth(c, true);
  const double sum = sum_over_block(base_density(c, state) - logdet);
  if (threadIdx.x == 0) d.to.log_q[size_t(s.tensors) * c.q + c.t] = sum;
  if (d.to.z0)
    for (int i = threadIdx.x; i < c.tensor.size; i += blockDim.x) d.to.z0[c.at() + i] = float(state[i]);
  if (d.to.dz) {
    const double weight = double(states[c.q / groups].kl_now) * d.to.scale;
    const float* __restrict__ mean = c.values + c.tensor.base_mean;
    const float* __restrict__ log_std = c.values + c.tensor.base_log_std;
    go_back(
        c, true, -1, [&](int e) { return -(state[e] - mean[e]) * exp(-2 * double(log_std[e])); },
        [&](int e, double a) { d.to.dz[c.at() + e] = float(weight * a); });
  }
}

// dz and those of the densities, where there are any, to the slopes of every step, which the trace keeps.
__global__ void __launch_bounds__(threads, 1)
    flow_backward_kernel(FlowShape s, FlowParameters p, Trace trace, float* __restrict__ dz,
                         const float* __restrict__ first, const float* __restrict__ second, const StepState* states,
                         float scale, bool density, int groups) {
  const Chain c = open_chain(s, p, trace, nullptr, blockIdx.x, simt::row(), groups);
  const size_t at = c.at();
  go_back(
      c, false, density ? -double(states[c.q / groups].kl_now) * scale : 0,
      [&](int e) {
        float a = dz[at + e];
        if (first) a += first[at + e];
        if (second) a += second[at + e];
        return double(a);
      },
      [&](int e, double a) { dz[at + e] = float(a); });
}

__device__ __forceinline__ void put(float& to, double v, bool add) { to = float(add ? double(to) + v : v); }

// The gradients of one step and tile of 64 elements from the slopes, summed over the groups; with step 0 the base's.
__global__ void __launch_bounds__(threads, 1)
    flow_gradient_kernel(FlowShape s, FlowParameters p, Trace trace, float* __restrict__ all_gradients,
                         const float* __restrict__ z0, const StepState* states, float scale, bool density, int groups) {
  const int tiles = s.z_size / tile, of_row = int(blockIdx.x) % tiles * tile, k = blockIdx.x / tiles, r = simt::row();
  const int warp = threadIdx.x / simt::warp_size, warps = blockDim.x / simt::warp_size, lane = simt::lane_id();
  int t = 0;
  while (t + 1 < s.tensors && s.table[t + 1].z_at <= of_row) t++;
  const int first = of_row - s.table[t].z_at, count = min(tile, s.table[t].size - first);
  float* gradients = all_gradients + p.stride * r;
  const double weight = density ? double(states[r].kl_now) * scale : 0;
  for (int g = 0; g < groups; g++) {
    const Chain c = open_chain(s, p, trace, nullptr, t, r * groups + g, groups);
    const bool add = g > 0;
    if (k == 0) {
      for (int e = first + threadIdx.x; e < first + count; e += blockDim.x) {
        const double a = c.adjoint()[e];
        const double by_log_std = a * (double(z0[c.at() + e]) - c.values[c.tensor.base_mean + e]) - weight;
        put(gradients[c.tensor.base_mean + e], s.fixed_base ? 0 : a, add);
        put(gradients[c.tensor.base_log_std + e], s.fixed_base ? 0 : by_log_std, add);
      }
    }
    if (k < c.steps && s.kind == FlowKind::planar) {
      const FlowStep& at = c.tensor.steps[k];
      const PlanarKept& kept = c.planar(k);
      const double* before = c.kept(Kept::input, k);
      const double* by_u = c.kept(Kept::shift_slope, k);
      for (int e = first + threadIdx.x; e < first + count; e += blockDim.x) {
        const double w = c.values[at.w0 + e], u = c.values[at.b1 + e];
        put(gradients[at.w0 + e], before[e] * kept.by_x + kept.along * by_u[e] + kept.by_wu * u + 2 * kept.by_ww * w,
            add);
        put(gradients[at.b1 + e], by_u[e] + kept.by_wu * w, add);
      }
      if (first == 0 && threadIdx.x == 0) put(gradients[at.b0], kept.by_x, add);
    } else if (k < c.steps) {
      const FlowStep& at = c.tensor.steps[k];
      const int size = c.tensor.size, units = s.hidden;
      const double* __restrict__ input = c.kept(Kept::input, k) + first;
      const double* __restrict__ dt = c.kept(Kept::shift_slope, k) + first;
      const double* __restrict__ dk = c.kept(Kept::gate_slope, k) + first;
      const double* __restrict__ h = c.hidden(k);
      const double* __restrict__ d = c.slope(k);
      for (int e = threadIdx.x; e < count; e += blockDim.x) {
        gradients[at.mask + first + e] = 0;
        put(gradients[at.b1 + first + e], dt[e], add);
        put(gradients[at.b2 + first + e], dk[e], add);
      }
      for (int e = warp; e < count; e += warps) {
        float* __restrict__ dw1 = gradients + at.w1 + size_t(first + e) * units;
        float* __restrict__ dw2 = gradients + at.w2 + size_t(first + e) * units;
        SIMT_SIMD()
        for (int j = lane; j < units; j += simt::warp_size) {
          put(dw1[j], dt[e] * h[j], add);
          put(dw2[j], dk[e] * h[j], add);
        }
      }
      for (int unit = warp; unit < units; unit += warps) {
        float* __restrict__ dw0 = gradients + at.w0 + size_t(unit) * size + first;
        SIMT_SIMD()
        for (int e = lane; e < count; e += simt::warp_size) put(dw0[e], d[unit] * input[e], add);
        if (first == 0 && lane == 0) put(gradients[at.b0 + unit], d[unit], add);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------- the KL and fresh flows
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

// ---------------------------------------------------------------------------------------------------------- launches
constexpr int most_rows = 65535;  // that a grid has
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

// Rows must be whole groups.
void check_flow_rows(const std::string& who, int groups, int rows) {
  if (groups < 1 || rows < 1 || rows % groups != 0 || rows > most_rows)
    throw InputError(who + ": " + std::to_string(rows) + " rows of z in groups of " + std::to_string(groups));
}

Trace view_trace(const FlowShape& s, float* memory) {
  const bool planar = s.kind == FlowKind::planar;
  const int kinds = planar ? 2 : 5, units = planar ? int(sizeof(PlanarKept) / sizeof(double)) : 2 * s.hidden;
  const size_t count = size_t(s.z_size) * (2 + kinds * s.steps) + size_t(s.steps) * s.tensors * units;
  return {reinterpret_cast<double*>(memory), (count + 31) / 32 * 32, s.z_size, s.steps, s.tensors, kinds, units};
}

// After all the checks.
Trace open_trace(const std::string& who, const FlowShape& s, FlowTrace trace, int groups) {
  check_flow_shape(who, s);
  check_flow_rows(who, groups, trace.rows);
  if (!trace.memory || reinterpret_cast<uintptr_t>(trace.memory) % sizeof(double) != 0)
    throw InputError(who + ": the trace has no memory, or none that is aligned to 64 floats");
  return view_trace(s, trace.memory);
}

}  // namespace

size_t flow_trace_floats(const FlowShape& s, int rows) {
  check_flow_shape("flow_trace_floats", s);
  check_flow_rows("flow_trace_floats", 1, rows);
  return view_trace(s, nullptr).row_size * size_t(rows) * (sizeof(double) / sizeof(float));
}

void flow_forward(float* z, double* log_q, const FlowShape& s, FlowParameters p, float* z0, FlowTrace trace, int groups,
                  Stream stream, const FlowNoise* noise) {
  BATON_RANGE("flow_forward");
  const Trace view = open_trace("flow_forward", s, trace, groups);
  if (z == z0) throw InputError("flow_forward: z is z0 itself, expected memory of its own");
  if (noise && noise->kind == FlowNoise::training && !noise->states) throw InputError("flow_forward: no states");
  simt::launch<flow_forward_kernel>(simt::blocks(s.tensors, threads, 0, trace.rows), stream, s, p, view, z, log_q, z0,
                                    noise ? *noise : FlowNoise{}, noise != nullptr, groups);
}

void flow_log_density(const std::vector<FlowDensity>& densities, const FlowShape& s, const float* z,
                      const StepState* states, int groups, Stream stream, const FlowTrace* made_by) {
  BATON_RANGE("flow_log_density");
  if (densities.empty() || densities.size() > 2)
    throw InputError("flow_log_density: " + std::to_string(densities.size()) + " densities, expected one or two");
  Density views[2];
  for (size_t i = 0; i < densities.size(); i++) {
    const FlowDensity& d = densities[i];
    views[i] = {d, open_trace("flow_log_density", s, d.trace, groups)};
    if (d.z0 == z) throw InputError("flow_log_density: z0 is z itself, expected memory of its own");
    if (d.dz && !states) throw InputError("flow_log_density: no states");
    for (const FlowTrace* other : {made_by, i > 0 ? &densities[0].trace : nullptr})
      if (other && (other->rows != d.trace.rows || other->memory == d.trace.memory))
        throw InputError("flow_log_density: a trace of " + std::to_string(other->rows) + " rows beside one of " +
                         std::to_string(d.trace.rows) + ", expected as many in memory of its own");
  }
  // A row of the trace that made z begins with its last z.
  const double* exact = made_by ? open_trace("flow_log_density", s, *made_by, groups).memory : nullptr;
  simt::launch<flow_density_kernel>(
      simt::blocks(s.tensors * int(densities.size()), threads, 0, densities[0].trace.rows), stream, s, views[0],
      views[1], z, exact, states, groups);
}

void flow_backward(float* gradients, float* dz, const std::vector<FlowDensity>& densities, const FlowShape& s,
                   FlowParameters p, const float* z0, FlowTrace trace, const StepState* states, float scale,
                   bool density, int groups, int replicas, Stream stream) {
  BATON_RANGE("flow_backward");
  const Trace view = open_trace("flow_backward", s, trace, groups);
  if (replicas < 1 || int64_t(groups) * replicas != trace.rows)
    throw InputError("flow_backward: " + std::to_string(trace.rows) + " rows of z for " + std::to_string(replicas) +
                     " replicas of " + std::to_string(groups) + " groups");
  if (densities.size() > 2)
    throw InputError("flow_backward: " + std::to_string(densities.size()) + " densities, at most two");
  const auto of = [&](size_t i) -> const float* { return i < densities.size() ? densities[i].dz : nullptr; };
  simt::launch<flow_backward_kernel>(simt::blocks(s.tensors, threads, 0, trace.rows), stream, s, p, view, dz, of(0),
                                     of(1), states, scale, density, groups);
  simt::launch<flow_gradient_kernel>(simt::blocks(s.z_size / tile * max(s.steps, 1), threads, 0, replicas), stream, s,
                                     p, view, gradients, z0, states, scale, density, groups);
}

void flow_kl(double* accumulator, size_t accumulator_stride, const double* log_q, const double* log_prior, int tensors,
             int groups, int replicas, Stream stream) {
  BATON_RANGE("flow_kl");
  if (tensors < 1 || groups < 1 || replicas < 1 || replicas > most_rows || accumulator_stride < size_t(tensors))
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
