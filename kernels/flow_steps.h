// What a block does at the steps of a flow, forth (in either direction) and back, and the trace between. flow.cu alone
// includes it. A thread keeps to its elements of z between barriers: e = threadIdx.x, threadIdx.x + blockDim.x, ...
#pragma once
#include "kernels/flow.h"

namespace baton {

namespace {  // the emulator's shared variables must not lie in COMDAT functions

constexpr int tile = 64;           // every tensor of z starts at a multiple of it
constexpr int threads = 512;       // of a block that goes through all the steps of a tensor
constexpr double least_gate = -3;  // what the gates' k is clamped to

// -------------------------------------------------------------------------------------------------------- the trace
// What a pass keeps of each step and element, in doubles. `input` is m z of RealNVP, z before the step of a planar one;
// shift_slope is dL/dt, or th dL/dz' of a planar step. RealNVP alone has the others: dL/dk; of an element that the step
// changes, before the step, z - t for gated steps and z for affine ones; k before it is clamped.
enum class Kept : int { input, shift_slope, gate_slope, value, gate };
// Of a planar step: x = w.z + b, w.u and w.w, and the derivatives of the loss by x, w.u, w.w and, of u^ = u + along w,
// along itself.
struct PlanarKept {
  double x, wu, ww, by_x, by_wu, by_ww, along;
};

// A view of a trace: each row has state, adjoint [z]; [steps][kinds of Kept][z]; and [steps][tensors][units], which are
// the hidden units h and the slopes dL/d(W0 (m z) + b0), or a PlanarKept.
struct Trace {
  double* memory;
  size_t row_size;
  int z, steps, tensors, kinds, units;

  __device__ double* row(int q) const { return memory + row_size * q; }
  __device__ double* step_units(int q, int k, int tensor) const {
    return row(q) + size_t(z) * (2 + kinds * steps) + (size_t(k) * tensors + tensor) * units;
  }
};

// One tensor of one row: what a block works on.
struct Chain {
  FlowShape shape;
  const FlowTensor& tensor;
  const float* values;  // the parameters of the row's replica
  Trace trace;
  int q, t;
  int steps;  // 0 where the flow is its base alone

  __device__ size_t at() const { return size_t(shape.z_size) * q + tensor.z_at; }      // in an array of floats
  __device__ double* state() const { return trace.row(q) + tensor.z_at; }              // z before or after a step
  __device__ double* adjoint() const { return trace.row(q) + trace.z + tensor.z_at; }  // dL/dz on the way back
  __device__ double* kept(Kept kind, int k) const {
    return trace.row(q) + size_t(trace.z) * (2 + trace.kinds * k + int(kind)) + tensor.z_at;
  }
  __device__ double* hidden(int k) const { return trace.step_units(q, k, t); }
  __device__ double* slope(int k) const { return hidden(k) + shape.hidden; }
  __device__ PlanarKept& planar(int k) const { return *reinterpret_cast<PlanarKept*>(trace.step_units(q, k, t)); }
};
__device__ __forceinline__ Chain open_chain(const FlowShape& s, FlowParameters p, const Trace& trace,
                                            const int32_t* identity, int t, int q, int groups) {
  const int r = q / groups;
  return {s, s.table[t], p.values + p.stride * r, trace, q, t, identity && identity[r] != 0 ? 0 : s.steps};
}

// ----------------------------------------------------------------------------------------------------------- pieces
__device__ __forceinline__ double clamp_gate(double k) { return k < least_gate ? least_gate : k; }  // NaN stays NaN

// The sum of v over the block, for every thread.
__device__ __forceinline__ double sum_over_block(double v) {
  __shared__ double parts[32];
  v = simt::warp_sum(v);
  if (simt::lane_id() == 0) parts[threadIdx.x / simt::warp_size] = v;
  __syncthreads();
  const int warps = blockDim.x / simt::warp_size;
  double sum = 0;
  for (int w = 0; w < warps; w++) sum += parts[w];
  __syncthreads();  // parts may be used again
  return sum;
}

// What w.u and w.w determine of a planar step: u^ = u + along w, sp = softplus(w.u) with w.u^ = sp - 1, and the
// derivatives of both. Where w is 0, u^ is u and w.u^ is 0.
struct Bend {
  double sp, along, sp_by_wu, along_by_wu, along_by_ww;
};
__device__ __forceinline__ Bend compute_bend(double wu, double ww) {
  if (!(ww > 1e-30)) return {1, 0, 0, 0, 0};
  const double e = exp(-fabs(wu)), l = log1p(e), sigmoid = wu > 0 ? 1 / (1 + e) : e / (1 + e);
  const double along = (l + fmax(-wu, 0.) - 1) / ww;
  return {l + fmax(wu, 0.), along, sigmoid, (sigmoid - 1) / ww, -along / ww};
}

// ------------------------------------------------------------------------------------------------------ RealNVP, forth
constexpr int lanes = simt::warp_size == 1 ? 1 : 8;  // neighbours of a warp that share an element

// Two sums of the terms f(i), i = first, first + step, ... below n. On a GPU the loads of `together` terms are under
// way at once; without that a block would wait for memory all the time.
struct Two {
  double a, b;
};
constexpr int together = 8;
template <class F>
__device__ __forceinline__ Two sum_terms(int first, int step, int n, F f) {
  double a = 0, b = 0;
  if constexpr (simt::warp_size == 1) {
    SIMT_SIMD(reduction(+ : a, b))
    for (int i = first; i < n; i += step) {
      const Two term = f(i);
      a += term.a, b += term.b;
    }
  } else {
    for (int i = first; i < n; i += together * step) {
      Two terms[together];
      SIMT_UNROLL
      for (int j = 0; j < together; j++) terms[j] = f(min(i + j * step, n - 1));
      SIMT_UNROLL
      for (int j = 0; j < together; j++) {
        const bool is_term = i + j * step < n;
        a += is_term ? terms[j].a : 0, b += is_term ? terms[j].b : 0;
      }
    }
  }
  return {a, b};
}

// The sum of v over the lanes of an element, for all of them.
__device__ __forceinline__ double sum_over_lanes(double v) {
  SIMT_UNROLL
  for (int bit = lanes / 2; bit > 0; bit /= 2) v += __shfl_xor_sync(~0u, v, bit);
  return v;
}

// Step k: z' from z in the chain's state, or with `inverse` z from z'. Returns the logdet of this thread's elements.
__device__ __forceinline__ double couple(const Chain& c, int k, bool inverse) {
  const FlowStep& at = c.tensor.steps[k];
  const int size = c.tensor.size, units = c.shape.hidden;
  const int warp = threadIdx.x / simt::warp_size, warps = blockDim.x / simt::warp_size;
  const float* __restrict__ mask = c.values + at.mask;
  double* state = c.state();
  double* input = c.kept(Kept::input, k);
  SIMT_SIMD()
  for (int e = threadIdx.x; e < size; e += blockDim.x) input[e] = double(mask[e]) * state[e];
  __syncthreads();

  double* h = c.hidden(k);
  for (int unit = warp; unit < units; unit += warps) {
    const float* __restrict__ w = c.values + at.w0 + size_t(unit) * size;
    const double own = sum_terms(simt::lane_id(), simt::warp_size, size, [&](int i) {
                         return Two{double(w[i]) * input[i], 0};
                       }).a;
    const double sum = simt::warp_sum(own);
    if (simt::lane_id() == 0) h[unit] = tanh(sum + c.values[at.b0 + unit]);
  }
  __syncthreads();

  double* value = c.kept(Kept::value, k);
  double* gate = c.kept(Kept::gate, k);
  const int of_warp = simt::warp_size / lanes;
  for (int first = warp * of_warp; first < size; first += warps * of_warp) {
    const int e = first + simt::lane_id() / lanes, n = e >= size || mask[e] != 0 ? 0 : units;
    const float* __restrict__ w1 = c.values + at.w1 + size_t(e) * units;
    const float* __restrict__ w2 = c.values + at.w2 + size_t(e) * units;
    const Two own = sum_terms(simt::lane_id() % lanes, lanes, n, [&](int j) {
      return Two{double(w1[j]) * h[j], double(w2[j]) * h[j]};
    });
    const double t_sum = sum_over_lanes(own.a), k_sum = sum_over_lanes(own.b);
    if (n > 0 && simt::lane_id() % lanes == 0) value[e] = t_sum, gate[e] = k_sum;
  }
  __syncthreads();

  double logdet = 0;
  for (int e = threadIdx.x; e < size; e += blockDim.x) {
    if (mask[e] != 0) continue;
    const double z = state[e], t = value[e] + c.values[at.b1 + e], g = gate[e] + c.values[at.b2 + e];
    if (c.shape.kind == FlowKind::gated) {
      const double closed = exp(-clamp_gate(g)), away = inverse ? (z - t) * (1 + closed) : z - t;
      logdet -= log1p(closed);
      value[e] = away;
      state[e] = inverse ? t + away : t + away / (1 + closed);
    } else {
      const double before = inverse ? (z - t) * exp(-g) : z;
      logdet += g;
      value[e] = before;
      state[e] = inverse ? before : before * exp(g) + t;
    }
    gate[e] = g;
  }
  return logdet;
}

// ------------------------------------------------------------------------------------------------------- RealNVP, back
constexpr int mine = simt::warp_size == 1 ? tile : 1;             // neighbouring columns that one thread takes
constexpr int teams = simt::warp_size == 1 ? 1 : threads / tile;  // threads that share a hidden unit

// The slopes d of step k's hidden units, from those of its outputs.
__device__ __forceinline__ void couple_back_to_hidden(const Chain& c, int k) {
  __shared__ double sums[teams * tile];
  const FlowStep& at = c.tensor.steps[k];
  const int size = c.tensor.size, units = c.shape.hidden;
  const int thread = threadIdx.x, team = thread * mine / tile, column = thread % (tile / mine) * mine;
  [[maybe_unused]] const float* __restrict__ mask = c.values + at.mask;
  const double* shift_slope = c.kept(Kept::shift_slope, k);
  const double* gate_slope = c.kept(Kept::gate_slope, k);
  for (int unit0 = 0; unit0 < units; unit0 += tile) {
    const int unit = unit0 + column, width = max(0, min(mine, units - unit));
    const float* __restrict__ w1 = c.values + at.w1 + unit;
    const float* __restrict__ w2 = c.values + at.w2 + unit;
    double sum[mine] = {};
    if constexpr (mine == 1) {  // the slopes of elements that the step keeps are 0
      sum[0] = sum_terms(team, teams, width > 0 ? size : 0, [&](int e) {
                 const size_t row = size_t(e) * units;
                 return Two{double(w1[row]) * shift_slope[e] + double(w2[row]) * gate_slope[e], 0};
               }).a;
    } else {
      for (int first = 0; first < size; first += tile) {
        double part[mine] = {};
        for (int e = first; e < min(size, first + tile); e++) {
          const double dt = shift_slope[e], dk = gate_slope[e];
          const size_t row = size_t(e) * units;
          const int changed = mask[e] != 0 ? 0 : width;
          SIMT_SIMD()
          for (int j = 0; j < changed; j++) part[j] += double(w1[row + j]) * dt + double(w2[row + j]) * dk;
        }
        SIMT_SIMD()
        for (int j = 0; j < mine; j++) sum[j] += part[j];
      }
    }
    SIMT_UNROLL
    for (int j = 0; j < mine; j++) sums[team * tile + column + j] = sum[j];
    __syncthreads();
    for (int i = thread; i < min(tile, units - unit0); i += blockDim.x) {
      double total = 0;
      for (int j = 0; j < teams; j++) total += sums[j * tile + i];
      const double h = c.hidden(k)[unit0 + i];
      c.slope(k)[unit0 + i] = total * (1 - h * h);
    }
    __syncthreads();
  }
}

// a = start(e), then back through all the steps, from the last or with `inverse` from the first; then finish(e, a).
template <class Start, class Finish>
__device__ __forceinline__ void couple_back(const Chain& c, bool inverse, double logdet_slope, Start start,
                                            Finish finish) {
  const int size = c.tensor.size;
  double* adjoint = c.adjoint();
  for (int n = 0; n <= c.steps; n++) {
    const int k = inverse ? n : c.steps - 1 - n, done = inverse ? n - 1 : c.steps - n;
    for (int first = threadIdx.x * mine; first < size; first += blockDim.x * mine) {
      const int count = min(mine, size - first);
      double sum[mine] = {};
      if (n > 0) {
        const double* slope = c.slope(done);
        const float* __restrict__ w = c.values + c.tensor.steps[done].w0 + first;
        if constexpr (mine == 1) {
          sum[0] = sum_terms(0, 1, c.shape.hidden, [&](int unit) {
                     return Two{double(w[size_t(unit) * size]) * slope[unit], 0};
                   }).a;
        } else {
          for (int unit = 0; unit < c.shape.hidden; unit++) {
            const double d = slope[unit];
            SIMT_SIMD()
            for (int i = 0; i < count; i++) sum[i] += double(w[size_t(unit) * size + i]) * d;
          }
        }
      }
      for (int i = 0; i < count; i++) {
        const int e = first + i;
        double a = n == 0 ? start(e) : adjoint[e] + double(c.values[c.tensor.steps[done].mask + e]) * sum[i];
        if (n < c.steps) {
          double dt = 0, dk = 0;
          if (c.values[c.tensor.steps[k].mask + e] == 0) {
            const double value = c.kept(Kept::value, k)[e], gate = c.kept(Kept::gate, k)[e];
            if (c.shape.kind == FlowKind::gated) {
              const double closed = exp(-clamp_gate(gate)), g = 1 / (1 + closed), shut = closed * g;
              dt = inverse ? -closed * a : shut * a;
              dk = shut * ((inverse ? -a : g * a) * value + logdet_slope);
              dk = gate < least_gate ? 0 : dk;
              a = inverse ? a * (1 + closed) : a * g;
            } else {
              const double stretch = inverse ? exp(-gate) : exp(gate);
              dt = inverse ? -stretch * a : a;
              dk = (inverse ? -a : a * stretch) * value + logdet_slope;
              a *= stretch;
            }
          }
          c.kept(Kept::shift_slope, k)[e] = dt, c.kept(Kept::gate_slope, k)[e] = dk;
        } else {
          finish(e, a);
        }
        adjoint[e] = a;
      }
    }
    __syncthreads();
    if (n < c.steps) couple_back_to_hidden(c, k);
  }
}

// -------------------------------------------------------------------------------------------------------------- planar
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

// As couple().
__device__ __forceinline__ double bend_along(const Chain& c, int k, bool inverse) {
  const FlowStep& f = c.tensor.steps[k];
  const int size = c.tensor.size;
  const float* __restrict__ w = c.values + f.w0;
  const float* __restrict__ u = c.values + f.b1;
  double* state = c.state();
  double* before = c.kept(Kept::input, k);
  double wz = 0, wu = 0, ww = 0;
  SIMT_SIMD(reduction(+ : wz, wu, ww))
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    wz += double(w[i]) * state[i];
    wu += double(w[i]) * u[i];
    ww += double(w[i]) * w[i];
  }
  wz = sum_over_block(wz), wu = sum_over_block(wu), ww = sum_over_block(ww);
  const Bend bend = compute_bend(wu, ww);
  const double target = wz + c.values[f.b0], x = inverse ? planar_root(bend.sp, target) : target;
  const double th = tanh(x), move = inverse ? -th : th;
  SIMT_SIMD()
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    const double z = state[i], moved = z + move * (u[i] + bend.along * w[i]);
    before[i] = inverse ? moved : z;
    state[i] = moved;
  }
  if (threadIdx.x != 0) return 0;
  PlanarKept& kept = c.planar(k);
  kept.x = x, kept.wu = wu, kept.ww = ww;
  return log(th * th + (1 - th * th) * bend.sp);
}

// As couple_back().
template <class Start, class Finish>
__device__ __forceinline__ void bend_back(const Chain& c, bool inverse, double logdet_slope, Start start,
                                          Finish finish) {
  const int size = c.tensor.size;
  double* adjoint = c.adjoint();
  for (int i = threadIdx.x; i < size; i += blockDim.x) adjoint[i] = start(i);
  for (int n = 0; n < c.steps; n++) {
    const int k = inverse ? n : c.steps - 1 - n;
    const float* __restrict__ w = c.values + c.tensor.steps[k].w0;
    const float* __restrict__ u = c.values + c.tensor.steps[k].b1;
    double wa = 0, ua = 0;
    SIMT_SIMD(reduction(+ : wa, ua))
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
      wa += double(w[i]) * adjoint[i];
      ua += double(u[i]) * adjoint[i];
    }
    wa = sum_over_block(wa), ua = sum_over_block(ua);
    PlanarKept& kept = c.planar(k);
    const Bend bend = compute_bend(kept.wu, kept.ww);
    const double th = tanh(kept.x), sech2 = 1 - th * th, det = th * th + sech2 * bend.sp;
    const double by_x =
        (inverse ? -sech2 : sech2) * (ua + bend.along * wa) - logdet_slope * 2 * th * sech2 * (bend.sp - 1) / det;
    const double pull = inverse ? by_x / det : by_x;
    if (threadIdx.x == 0) {  // through u^ = u + along w, along = (sp - 1 - w.u) / w.w, and w.u^ = sp - 1
      const double by_along = th * wa, by_sp = logdet_slope * sech2 / det;
      kept.by_x = by_x, kept.along = bend.along;
      kept.by_wu = by_sp * bend.sp_by_wu + by_along * bend.along_by_wu, kept.by_ww = by_along * bend.along_by_ww;
    }
    double* by_u = c.kept(Kept::shift_slope, k);
    SIMT_SIMD()
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
      by_u[i] = th * adjoint[i];
      adjoint[i] += pull * w[i];
    }
  }
  for (int i = threadIdx.x; i < size; i += blockDim.x) finish(i, adjoint[i]);
}

}  // namespace

}  // namespace baton
