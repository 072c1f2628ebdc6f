// Normalizing flows: the way back of both passes of flow.cu. With a = dL/dz' of an element that the step changes and
// c = dL/dlogdet, a becomes dL/dz in place:
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
// Work. A RealNVP step is two launches. First a block takes a tile: its dt and dk, their products with the columns of
// W1 and W2, and the outer products. Then a block takes a hidden unit: it sums over the tiles and writes the unit's row
// of dW0. The product with W0' waits for the next launch, which starts with it. A step moves 12 H bytes for each row
// and element on the way back of a density, 20 H bytes on that of a pass forward, and takes 12 H FLOPs. Sums over tiles
// and groups are in a fixed order, so every run gives the same bits.
#include "kernels/flow_parts.h"

namespace baton {

namespace {

constexpr int mine = simt::warp_size == 1 ? tile : 1;             // neighbours of a tile that one thread takes
constexpr int teams = simt::warp_size == 1 ? 1 : threads / tile;  // threads that share an element or a unit

__device__ __forceinline__ void put(float& to, double v, bool add) { to = float(add ? double(to) + v : v); }

// Arguments that all kernels of a way back have. A block takes `batch` rows in turn: all groups of a replica where the
// gradients of the parameters are summed over them, else one.
struct Back {
  float* gradients;  // null on the way back of a density, to which parameters are constants
  float* dz;
  const float* z0;
  const int32_t* identity;
  const StepState* states;
  float scale;
  bool density, inverse;
  int groups, batch;
};

// ------------------------------------------------------------------------------------------------------------ RealNVP
// One tile: adds m W0' d of the step `done` to a (-1: no step is done, and a is what the pass starts from), then goes
// back through the outputs of `step` (-1: no step is left, and a is the result).
__global__ void couple_backward_kernel(FlowShape s, FlowParameters p, Trace trace, Back b, int step, int done) {
  __shared__ double sums[teams * tile], shift_slopes[tile], gate_slopes[tile];
  const Tile tile_at = find_tile(s, blockIdx.x);
  const int count = tile_at.count, first = tile_at.first;
  const FlowTensor& tensor = s.table[tile_at.tensor];
  const size_t i = tensor.z_at + first;
  const int t = threadIdx.x, team = t * mine / tile, column = t % (tile / mine) * mine;
  for (int j = 0; j < b.batch; j++) {
    const int q = simt::row() * b.batch + j, r = q / b.groups;
    const bool none = is_identity(b.identity, r);
    const float* __restrict__ values = p.values + p.stride * r;
    float* __restrict__ gradients = b.gradients ? b.gradients + p.stride * r : nullptr;
    const bool add = j > 0;
    const double weight = double(b.states[r].kl_now) * b.scale;

    double sum[mine] = {};
    if (done >= 0) {
      const double* __restrict__ slope = trace.slope(q, tile_at.tensor);
      const float* __restrict__ w0 = values + tensor.steps[done].w0 + first + column;
      const int n = none ? 0 : s.hidden, width = mine == 1 ? int(column < count) : count;
      for (int unit = team; unit < n; unit += teams) {
        const float* __restrict__ w = w0 + size_t(unit) * tensor.size;
        const double d = slope[unit];
        SIMT_SIMD()
        for (int c = 0; c < width; c++) sum[mine == 1 ? 0 : c] += double(w[c]) * d;
      }
    }
    SIMT_UNROLL
    for (int c = 0; c < mine; c++) sums[team * tile + column + c] = sum[c];
    __syncthreads();

    double* __restrict__ adjoint = trace.adjoint(q) + i;
    const double logdet_slope = b.inverse ? -1 : b.density ? -weight : 0;
    for (int e = threadIdx.x; e < count; e += blockDim.x) {
      double a;
      if (done >= 0) {
        double more = 0;
        for (int k = 0; k < teams; k++) more += sums[k * tile + e];
        a = adjoint[e] + double(values[tensor.steps[done].mask + first + e]) * more;
      } else if (b.inverse) {
        const double z0 = trace.state(q)[i + e], precision = exp(-2 * double(values[tensor.base_log_std + first + e]));
        a = -(z0 - values[tensor.base_mean + first + e]) * precision;
      } else {
        a = b.dz[size_t(s.z_size) * q + i + e];
      }
      if (step >= 0) {
        const FlowStep& at = tensor.steps[step];
        double dt = 0, dk = 0;
        if (!none && values[at.mask + first + e] == 0) {
          const double value = trace.value(q, step)[i + e], k = trace.gate(q, step)[i + e];
          if (s.kind == FlowKind::gated) {
            const double closed = exp(-clamp_gate(k)), g = 1 / (1 + closed), shut = closed * g;
            dt = b.inverse ? -closed * a : shut * a;
            dk = shut * ((b.inverse ? -a : g * a) * value + logdet_slope);
            dk = k < least_gate ? 0 : dk;
            a = b.inverse ? a * (1 + closed) : a * g;
          } else {
            const double stretch = b.inverse ? exp(-k) : exp(k);
            dt = b.inverse ? -stretch * a : a;
            dk = (b.inverse ? -a : a * stretch) * value + logdet_slope;
            a *= stretch;
          }
        }
        shift_slopes[e] = dt, gate_slopes[e] = dk;
        if (gradients) {
          put(gradients[at.b1 + first + e], dt, add);
          put(gradients[at.b2 + first + e], dk, add);
          gradients[at.mask + first + e] = 0;
        }
      } else if (b.inverse) {
        b.dz[size_t(s.z_size) * q + i + e] += float(weight * a);
      } else {
        b.dz[size_t(s.z_size) * q + i + e] = float(a);
        const double z0 = b.z0[size_t(s.z_size) * q + i + e];
        const double by_log_std = a * (z0 - values[tensor.base_mean + first + e]) - (b.density ? weight : 0);
        put(gradients[tensor.base_mean + first + e], s.fixed_base ? 0 : a, add);
        put(gradients[tensor.base_log_std + first + e], s.fixed_base ? 0 : by_log_std, add);
      }
      adjoint[e] = a;
    }
    __syncthreads();

    if (step >= 0) {  // the same for the whole grid
      const FlowStep& at = tensor.steps[step];
      const double* __restrict__ h = trace.hidden_units(q, step, tile_at.tensor);
      double* __restrict__ partial = trace.partial(q) + size_t(blockIdx.x) * s.hidden;
      for (int unit0 = 0; unit0 < s.hidden; unit0 += tile) {
        const int unit = unit0 + column, width = max(0, min(mine, s.hidden - unit));
        double to_hidden[mine] = {};
        for (int e = team; e < count; e += teams) {
          const size_t row = (size_t(first) + e) * s.hidden + unit;
          const double dt = shift_slopes[e], dk = gate_slopes[e];
          if (!none && values[at.mask + first + e] == 0) {
            const float* __restrict__ w1 = values + at.w1 + row;
            const float* __restrict__ w2 = values + at.w2 + row;
            SIMT_SIMD()
            for (int c = 0; c < width; c++) to_hidden[mine == 1 ? 0 : c] += double(w1[c]) * dt + double(w2[c]) * dk;
          }
          if (gradients) {
            float* __restrict__ dw1 = gradients + at.w1 + row;
            float* __restrict__ dw2 = gradients + at.w2 + row;
            if (add) {
              SIMT_SIMD()
              for (int c = 0; c < width; c++) {
                dw1[c] = float(dw1[c] + dt * h[unit + c]);
                dw2[c] = float(dw2[c] + dk * h[unit + c]);
              }
            } else {
              SIMT_SIMD()
              for (int c = 0; c < width; c++) {
                dw1[c] = float(dt * h[unit + c]);
                dw2[c] = float(dk * h[unit + c]);
              }
            }
          }
        }
        SIMT_UNROLL
        for (int c = 0; c < mine; c++) sums[team * tile + column + c] = to_hidden[c];
        __syncthreads();
        for (int c = threadIdx.x; c < min(tile, s.hidden - unit0); c += blockDim.x) {
          double total = 0;
          for (int k = 0; k < teams; k++) total += sums[k * tile + c];
          partial[unit0 + c] = total;
        }
        __syncthreads();
      }
    }
  }
}

// One hidden unit: d, and its row of dW0.
__global__ void hidden_backward_kernel(FlowShape s, FlowParameters p, Trace trace, Back b, int step) {
  const int t = blockIdx.x % s.tensors, unit = blockIdx.x / s.tensors;
  const FlowTensor& tensor = s.table[t];
  const FlowStep& at = tensor.steps[step];
  const int first = tensor.z_at / tile, count = (tensor.size + tile - 1) / tile;
  for (int j = 0; j < b.batch; j++) {
    const int q = simt::row() * b.batch + j, r = q / b.groups;
    const double* __restrict__ partial = trace.partial(q) + size_t(first) * s.hidden + unit;
    double sum = 0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) sum += partial[size_t(i) * s.hidden];
    const double h = trace.hidden_units(q, step, t)[unit];
    const double d = sum_over_block(sum) * (1 - h * h);
    if (threadIdx.x == 0) trace.slope(q, t)[unit] = d;
    if (b.gradients) {
      float* gradients = b.gradients + p.stride * r;
      float* __restrict__ dw = gradients + at.w0 + size_t(unit) * tensor.size;
      const double* __restrict__ masked = trace.masked(q, step) + tensor.z_at;
      if (j > 0) {
        SIMT_SIMD()
        for (int i = threadIdx.x; i < tensor.size; i += blockDim.x) dw[i] = float(dw[i] + d * masked[i]);
      } else {
        SIMT_SIMD()
        for (int i = threadIdx.x; i < tensor.size; i += blockDim.x) dw[i] = float(d * masked[i]);
      }
      if (threadIdx.x == 0) put(gradients[at.b0 + unit], d, j > 0);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- planar
__global__ void planar_backward_kernel(FlowShape s, FlowParameters p, Trace trace, Back b) {
  const int t = blockIdx.x;
  const FlowTensor& tensor = s.table[t];
  const int size = tensor.size;
  for (int j = 0; j < b.batch; j++) {
    const int q = simt::row() * b.batch + j, r = q / b.groups;
    const float* values = p.values + p.stride * r;
    float* gradients = b.gradients ? b.gradients + p.stride * r : nullptr;
    const bool add = j > 0;
    const double weight = double(b.states[r].kl_now) * b.scale;
    const double logdet_slope = b.inverse ? -1 : b.density ? -weight : 0;
    const size_t at = size_t(s.z_size) * q + tensor.z_at;
    const float* __restrict__ base_mean = values + tensor.base_mean;
    const float* __restrict__ base_log_std = values + tensor.base_log_std;
    const double* __restrict__ z0 = trace.state(q) + tensor.z_at;  // of the inverse
    double* __restrict__ adjoint = trace.adjoint(q) + tensor.z_at;
    for (int i = threadIdx.x; i < size; i += blockDim.x)
      adjoint[i] = b.inverse ? -(z0[i] - base_mean[i]) * exp(-2 * double(base_log_std[i])) : double(b.dz[at + i]);
    const int steps = is_identity(b.identity, r) ? 0 : s.steps;
    for (int n = 0; n < steps; n++) {
      const int k = b.inverse ? n : steps - 1 - n;
      const FlowStep& f = tensor.steps[k];
      const float* __restrict__ w = values + f.w0;
      const float* __restrict__ u = values + f.b1;
      double wa = 0, ua = 0;
      SIMT_SIMD(reduction(+ : wa, ua))
      for (int i = threadIdx.x; i < size; i += blockDim.x) {
        wa += double(w[i]) * adjoint[i];
        ua += double(u[i]) * adjoint[i];
      }
      wa = sum_over_block(wa), ua = sum_over_block(ua);
      const double* kept = trace.planar(q, k, t);
      const double x = kept[0];
      const Bend bend = compute_bend(kept[1], kept[2]);
      const double th = tanh(x), sech2 = 1 - th * th, det = th * th + sech2 * bend.sp;
      const double by_x =
          (b.inverse ? -sech2 : sech2) * (ua + bend.along * wa) - logdet_slope * 2 * th * sech2 * (bend.sp - 1) / det;
      const double pull = b.inverse ? by_x / det : by_x;
      if (gradients) {
        // Through u^ = u + along w, along = (sp - 1 - w.u) / w.w, and w.u^ = sp - 1.
        const double by_along = th * wa, by_sp = logdet_slope * sech2 / det;
        const double by_wu = by_sp * bend.sp_by_wu + by_along * bend.along_by_wu, by_ww = by_along * bend.along_by_ww;
        const double* __restrict__ before = trace.masked(q, k) + tensor.z_at;
        float* __restrict__ dw = gradients + f.w0;
        float* __restrict__ du = gradients + f.b1;
        for (int i = threadIdx.x; i < size; i += blockDim.x) {
          const double by_u = th * adjoint[i];
          put(dw[i], before[i] * by_x + bend.along * by_u + by_wu * u[i] + 2 * by_ww * w[i], add);
          put(du[i], by_u + by_wu * w[i], add);
        }
        if (threadIdx.x == 0) put(gradients[f.b0], by_x, add);
      }
      SIMT_SIMD()
      for (int i = threadIdx.x; i < size; i += blockDim.x) adjoint[i] += pull * w[i];
    }
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
      const double a = adjoint[i];
      if (b.inverse) {
        b.dz[at + i] += float(weight * a);
      } else {
        b.dz[at + i] = float(a);
        const double by_log_std = a * (double(b.z0[at + i]) - base_mean[i]) - (b.density ? weight : 0);
        put(gradients[tensor.base_mean + i], s.fixed_base ? 0 : a, add);
        put(gradients[tensor.base_log_std + i], s.fixed_base ? 0 : by_log_std, add);
      }
    }
  }
}

void run_back(const FlowShape& s, FlowParameters p, const Trace& trace, const Back& b, int rows, Stream stream) {
  const int blocks = rows / b.batch;
  if (s.kind == FlowKind::planar || s.steps == 0) {
    simt::launch<planar_backward_kernel>(simt::blocks(s.tensors, threads, 0, blocks), stream, s, p, trace, b);
    return;
  }
  const auto per_tile = simt::blocks(trace.tiles(), threads, 0, blocks);
  int done = -1;
  for (int n = 0; n < s.steps; n++) {
    const int k = b.inverse ? n : s.steps - 1 - n;
    simt::launch<couple_backward_kernel>(per_tile, stream, s, p, trace, b, k, done);
    simt::launch<hidden_backward_kernel>(simt::blocks(s.tensors * s.hidden, threads, 0, blocks), stream, s, p, trace, b,
                                         k);
    done = k;
  }
  simt::launch<couple_backward_kernel>(per_tile, stream, s, p, trace, b, -1, done);
}

}  // namespace

void flow_log_density_backward(float* dz, const FlowShape& s, FlowParameters p, const float* z0,
                               const int32_t* identity, FlowTrace trace, const StepState* states, float scale,
                               int groups, Stream stream) {
  BATON_RANGE("flow_log_density_backward");
  const Trace view = open_trace("flow_log_density_backward", s, trace, groups);
  run_back(s, p, view, {nullptr, dz, z0, identity, states, scale, true, true, groups, 1}, trace.rows, stream);
}

void flow_backward(float* gradients, float* dz, const FlowShape& s, FlowParameters p, const float* z0, FlowTrace trace,
                   const StepState* states, float scale, bool density, int groups, int replicas, Stream stream) {
  BATON_RANGE("flow_backward");
  const Trace view = open_trace("flow_backward", s, trace, groups);
  if (replicas < 1 || int64_t(groups) * replicas != trace.rows)
    throw InputError("flow_backward: " + std::to_string(trace.rows) + " rows of z for " + std::to_string(replicas) +
                     " replicas of " + std::to_string(groups) + " groups");
  run_back(s, p, view, {gradients, dz, z0, nullptr, states, scale, density, false, groups, groups}, trace.rows, stream);
}

}  // namespace baton
