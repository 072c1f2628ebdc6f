// Normalizing flows over z; the formulas are in flow.h. h, t, k of a RealNVP step come from the elements that it keeps,
// so the inverse finds them again from z' and is one pass as well:
//   gated   z = t + (z' - t) (1 + e^-k),  ln g = -ln(1 + e^-k)      affine  z = (z' - t) e^-k
// Backward, with a = dL/dz' of a changed element and c = dL/dlogdet (a -> dL/dz in place):
//   gated   dt = (1 - g) a,  dk = (1 - g) (g a (z - t) + c),  a <- g a       affine  dt = a,  dk = a z e^k + c,  a <-
//   e^k a
// and of the density at a given z, through the inverse (a = dL/dz -> dL/dz', c = -1):
//   gated   dt = -e^-k a,  dk = (1 - g) (c - a (z - t)),  a <- a / g         affine  dt = -e^-k a,  dk = c - a z,  a <-
//   e^-k a
// then dh = W1' dt + W2' dk,  dW1 = dt h',  dW2 = dk h',  d = (1 - h^2) dh,  dW0 = d (m z)',  a += m W0' d.
// Planar, x = w.z + b, th = tanh x, s = 1 - th^2, sp = softplus(w.u), J = th^2 + s sp, u^ = u + c w:
//   forward  dx = s u^.a + c_ld (-2 th s (sp - 1)) / J,  a <- a + w dx;  density  dx = -s u^.a + 2 th s (sp - 1) / J,
//   a <- a + w dx / J.  x of the inverse is the root of x + (sp - 1) tanh x = w.z' + b: Newton inside a bracket.
//
// Numerics. A gate only contracts, so the inverse multiplies errors by 1 / g at every step: k is clamped to >= -3 (g >=
// 0.047) both ways, with gradient 0 where it is. Parameters, z and gradients are floats; between the first and the last
// step everything is double (the trace too), which costs nothing: the weights' traffic is what counts. So log q and z0
// are those of the float z that is passed in, to rounding. Where the pass that made z is at hand, the inverse takes its
// z before the rounding to float: nothing is amplified then, and equal flows have equal densities.
//
// Work. RealNVP: two launches a step. Hidden units: a block a unit, a sum over D. Outputs: a block a tile of 64
// elements, a warp an element, a sum over the hidden units; rows of kept elements are not read. The way back likewise:
// a tile's dt, dk with their products by the columns of W1, W2 and the outer products, then a unit's sum over the tiles
// and its row of dW0; the product by W0' waits for the next launch, which starts with it. Bytes a step, row and
// element: 4 (H + 2 H / 2) forward, as much for a density, 1.5 times that for its way back, and 4 (2 H + 3 H written)
// backward; 4 H + 2 H FLOPs forward, twice that backward. Planar: a block a tensor does all the steps, 2 D floats each.
// Sums over tiles and groups are in a fixed order: every run gives the same bits.
#include "kernels/flow.h"

namespace baton {

namespace {

constexpr int tile = 64;                                          // elements; every tensor starts a new one
constexpr int threads = 256;                                      // of most blocks
constexpr int mine = simt::warp_size == 1 ? tile : 1;             // neighbours of a tile that one thread takes
constexpr int teams = simt::warp_size == 1 ? 1 : threads / tile;  // threads that share an element or a unit
constexpr double least_gate = -3;                                 // what k is clamped to
constexpr double half_ln_2pi = 0.91893853320467274178;

// -------------------------------------------------------------------------------------------------------- the trace
// Of one row, in doubles. RealNVP: state, adjoint [z]; masked, value, gate [steps][z]; hidden [steps][tensors][hidden];
// slope [tensors][hidden]; logdet [steps][tiles]; partial [tiles][hidden]. Planar: state, adjoint [z]; masked
// [steps][z] (here: the steps' inputs); hidden [steps][tensors][3] (here: x, w.u, w.w).
struct Trace {
  double* memory;
  size_t row_size;
  int z, steps, tensors, hidden;

  __host__ __device__ int tiles() const { return z / tile; }
  __device__ double* row(int q) const { return memory + row_size * q; }
  __device__ double* state(int q) const { return row(q); }        // z on its way; in the end the last
  __device__ double* adjoint(int q) const { return row(q) + z; }  // dL/dz on its way
  __device__ double* masked(int q, int k) const { return row(q) + size_t(z) * (2 + k); }  // m z of step k
  __device__ double* value(int q, int k) const {  // of a changed element, before the step: gated z - t, affine z
    return row(q) + size_t(z) * (2 + steps + k);
  }
  __device__ double* gate(int q, int k) const { return row(q) + size_t(z) * (2 + 2 * steps + k); }  // k, not clamped
  __device__ double* hidden_of(int q, int k, int tensor) const {
    return row(q) + size_t(z) * (2 + 3 * steps) + (size_t(k) * tensors + tensor) * hidden;
  }
  __device__ double* slope(int q, int tensor) const { return hidden_of(q, steps, tensor); }  // dL/d(W0 (m z) + b0)
  __device__ double* logdet(int q, int k) const { return hidden_of(q, steps + 1, 0) + size_t(k) * tiles(); }
  __device__ double* partial(int q) const { return logdet(q, steps); }  // of dL/dh
  __device__ double* planar(int q, int k, int tensor) const {
    return row(q) + size_t(z) * (2 + steps) + (size_t(k) * tensors + tensor) * 3;
  }
};

size_t row_doubles(const FlowShape& s) {
  const size_t z = size_t(s.z_size), steps = size_t(s.steps), tensors = size_t(s.tensors), hidden = size_t(s.hidden);
  const size_t count = s.kind == FlowKind::planar
                           ? z * (2 + steps) + steps * tensors * 3
                           : z * (2 + 3 * steps) + (steps + 1) * tensors * hidden + z / tile * (steps + hidden);
  return (count + 31) / 32 * 32;
}

// ----------------------------------------------------------------------------------------------------------- pieces
struct Tile {
  int tensor, first, count;  // elements first, ..., first + count - 1 of the tensor
};
__device__ __forceinline__ Tile tile_of(const FlowShape& s, int index) {
  Tile at{0, 0, 0};
  for (int t = 0; t < s.tensors; t++) {
    const int first = index * tile - s.table[t].z_at, left = s.table[t].size - first;
    if (first >= 0 && left > 0) at = {t, first, left < tile ? left : tile};
  }
  return at;
}

__device__ __forceinline__ double clamped(double k) { return k < least_gate ? least_gate : k; }  // a NaN stays

__device__ __forceinline__ bool passed_over(const int32_t* identity, int r) { return identity && identity[r] != 0; }

// The sum over the block, for every thread.
__device__ __forceinline__ double block_total(double v) {
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

__device__ __forceinline__ void put(float& to, double v, bool add) { to = float(add ? double(to) + v : v); }

// ------------------------------------------------------------------------------------------------- RealNVP: forward
__global__ void enter_kernel(FlowShape s, FlowParameters p, Trace trace, const float* __restrict__ z,
                             const double* __restrict__ exact, int first_step, int groups) {
  const Tile at = tile_of(s, blockIdx.x);
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
  const int n = passed_over(identity, r) ? 0 : tensor.size;
  const float* __restrict__ values = p.values + p.stride * r;
  const float* __restrict__ w = values + at.w0 + size_t(unit) * tensor.size;
  const double* __restrict__ masked = trace.masked(q, step) + tensor.z_at;
  double sum = 0;
  SIMT_SIMD(reduction(+ : sum))
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += double(w[i]) * masked[i];
  sum = block_total(sum);
  if (threadIdx.x == 0) trace.hidden_of(q, step, t)[unit] = tanh(sum + values[at.b0 + unit]);
}

// z' from z, or the inverse; `next` is the step that comes after it on this way, -1 for none.
__global__ void couple_kernel(FlowShape s, FlowParameters p, Trace trace, const int32_t* identity, bool inverse,
                              int step, int next, int groups) {
  __shared__ double shifts[tile], gates[tile];
  const Tile tile_at = tile_of(s, blockIdx.x);
  const int q = simt::row(), r = q / groups, first = tile_at.first;
  const FlowTensor& tensor = s.table[tile_at.tensor];
  const FlowStep& at = tensor.steps[step];
  const bool none = passed_over(identity, r);
  const float* __restrict__ values = p.values + p.stride * r;
  const float* __restrict__ mask = values + at.mask + first;
  const float* __restrict__ w1 = values + at.w1 + size_t(first) * s.hidden;
  const float* __restrict__ w2 = values + at.w2 + size_t(first) * s.hidden;
  const double* __restrict__ h = trace.hidden_of(q, step, tile_at.tensor);
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
        const double closed = exp(-clamped(k)), away = inverse ? (z - t) * (1 + closed) : z - t;
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
  logdet = block_total(logdet);
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

// The last z to floats, and the density. z0 (forward) null: z0 is that last z.
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
  sum = block_total(sum);
  if (log_q && threadIdx.x == 0) log_q[size_t(s.tensors) * q + t] = sum;
}

// ------------------------------------------------------------------------------------------------ RealNVP: backward
// What the kernels of a way back share. A block takes `batch` rows in turn: the groups of a replica where gradients of
// parameters are summed over them, else one.
struct Back {
  float* gradients;  // null: the density's, whose parameters are constants
  float* dz;
  const float* z0;
  const int32_t* identity;
  const StepState* states;
  float scale;
  bool density, inverse;
  int groups, batch;
};

// One tile: adds m W0' d of the step `done` (-1: none yet, a is what the pass starts from) to a, then goes through the
// outputs of `step` (-1: none left, a is the result).
__global__ void couple_backward_kernel(FlowShape s, FlowParameters p, Trace trace, Back b, int step, int done) {
  __shared__ double sums[teams * tile], shift_slopes[tile], gate_slopes[tile];
  const Tile tile_at = tile_of(s, blockIdx.x);
  const int count = tile_at.count, first = tile_at.first;
  const FlowTensor& tensor = s.table[tile_at.tensor];
  const size_t i = tensor.z_at + first;
  const int t = threadIdx.x, team = t * mine / tile, column = t % (tile / mine) * mine;
  for (int j = 0; j < b.batch; j++) {
    const int q = simt::row() * b.batch + j, r = q / b.groups;
    const bool none = passed_over(b.identity, r);
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
            const double closed = exp(-clamped(k)), g = 1 / (1 + closed), shut = closed * g;
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
      const double* __restrict__ h = trace.hidden_of(q, step, tile_at.tensor);
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

// One unit: d, and its row of dW0.
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
    const double h = trace.hidden_of(q, step, t)[unit];
    const double d = block_total(sum) * (1 - h * h);
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

// ----------------------------------------------------------------------------------------------------------- planar
// What w.u and w.w say of a step: u^ = u + along w, w.u^ = sp - 1, and the slopes of sp and of along. Where w is 0, u^
// is u and w.u^ is 0.
struct Bend {
  double sp, along, sp_by_wu, along_by_wu, along_by_ww;
};
__device__ __forceinline__ Bend bend_of(double wu, double ww) {
  if (!(ww > 1e-30)) return {1, 0, 0, 0, 0};
  const double e = exp(-fabs(wu)), l = log1p(e), sigmoid = wu > 0 ? 1 / (1 + e) : e / (1 + e);
  const double along = (l + fmax(-wu, 0.) - 1) / ww;
  return {l + fmax(wu, 0.), along, sigmoid, (sigmoid - 1) / ww, -along / ww};
}

// The root of x + (sp - 1) tanh x = target, which is odd and increasing: Newton's steps inside a bracket, else halves.
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
  const int steps = passed_over(identity, r) ? 0 : s.steps;
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
    wz = block_total(wz), wu = block_total(wu), ww = block_total(ww);
    const Bend bend = bend_of(wu, ww);
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
  sum = block_total(sum);
  if (log_q && threadIdx.x == 0) log_q[size_t(s.tensors) * q + t] = sum - logdet;
}

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
    const int steps = passed_over(b.identity, r) ? 0 : s.steps;
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
      wa = block_total(wa), ua = block_total(ua);
      const double* kept = trace.planar(q, k, t);
      const double x = kept[0];
      const Bend bend = bend_of(kept[1], kept[2]);
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

// ------------------------------------------------------------------------------------------------- base, KL, start
struct BaseNoise {
  const StepState* states;  // null: `key`, draw numbers from `first_draw`, no groups
  Key key;
  uint32_t first_draw;
  bool noise;
};

__global__ void draw_base_kernel(float* __restrict__ z0, FlowShape s, FlowParameters p, BaseNoise b, int groups) {
  const Tile at = tile_of(s, blockIdx.x);
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

// Counters by the parameters' places in the store, draw 1: no other initialisation uses these.
__device__ __forceinline__ void fill_normal(float* __restrict__ values, int at, int count, float sd, Key key) {
  SIMT_SIMD()
  for (int i = threadIdx.x; i < count; i += blockDim.x)
    values[at + i] = sd * normal4(key, uint32_t(at + i), stream_init, 0, 1).x;
}
__device__ __forceinline__ void fill(float* __restrict__ values, int at, int count, float value) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) values[at + i] = value;
}

// One step of one tensor, and the base with step 0. A balanced mask: a coin for every two neighbours says which of them
// is kept; odd steps toss the coins of the step before them, and keep the others.
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

// ----------------------------------------------------------------------------------------------------------- checks
constexpr int most_rows = 65535;  // of a grid

std::string number(long n) { return std::to_string(n); }

void check_shape(const std::string& who, const FlowShape& s) {
  const bool planar = s.kind == FlowKind::planar;
  if (s.kind != FlowKind::gated && s.kind != FlowKind::affine && !planar)
    throw InputError(who + ": no such kind of flow: " + number(int(s.kind)));
  if (s.steps < 0 || s.steps > most_flow_steps || s.tensors < 1 || s.tensors > most_flow_tensors ||
      (!planar && (s.hidden < 1 || int64_t(s.hidden) * s.largest > INT32_MAX)))
    throw InputError(who + ": a flow of " + number(s.steps) + " steps with " + number(s.hidden) +
                     " hidden units over " + number(s.tensors) + " tensors; at most " + number(most_flow_steps) +
                     " steps and " + number(most_flow_tensors) + " tensors");
  if (s.largest < 1 || s.z_size < s.largest || s.z_size % tile != 0)
    throw InputError(who + ": a row of z of " + number(s.z_size) + " floats, the largest tensor " + number(s.largest) +
                     "; every tensor is rounded up to " + number(tile));
}

void check_rows(const std::string& who, int groups, int rows) {
  if (groups < 1 || rows < 1 || rows % groups != 0 || rows > most_rows)
    throw InputError(who + ": " + number(rows) + " rows of z in groups of " + number(groups));
}

Trace open(const std::string& who, const FlowShape& s, FlowTrace trace, int groups) {
  check_shape(who, s);
  check_rows(who, groups, trace.rows);
  if (!trace.memory || reinterpret_cast<uintptr_t>(trace.memory) % sizeof(double) != 0)
    throw InputError(who + ": the trace has no memory, or none that is aligned to 64 floats");
  return {reinterpret_cast<double*>(trace.memory), row_doubles(s), s.z_size, s.steps, s.tensors, s.hidden};
}

// The steps in their order or against it, then z and the density.
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

void draw(const std::string& who, float* z0, const FlowShape& s, FlowParameters p, const BaseNoise& noise, int groups,
          int rows, Stream stream) {
  check_shape(who, s);
  check_rows(who, groups, rows);
  simt::launch<draw_base_kernel>(simt::blocks(s.z_size / tile, 32, 0, rows), stream, z0, s, p, noise, groups);
}

}  // namespace

size_t flow_trace_floats(const FlowShape& s, int rows) {
  check_shape("flow_trace_floats", s);
  check_rows("flow_trace_floats", 1, rows);
  return row_doubles(s) * size_t(rows) * (sizeof(double) / sizeof(float));
}

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

void flow_forward(float* z, double* log_q, const FlowShape& s, FlowParameters p, const float* z0, FlowTrace trace,
                  int groups, Stream stream) {
  BATON_RANGE("flow_forward");
  const Trace view = open("flow_forward", s, trace, groups);
  if (z == z0) throw InputError("flow_forward: z is z0 itself, expected memory of its own");
  run(s, p, view, nullptr, false, z, log_q, z0, nullptr, trace.rows, groups, stream);
}

void flow_log_density(double* log_q, float* z0, const FlowShape& s, FlowParameters p, const float* z,
                      const int32_t* identity, FlowTrace trace, int groups, Stream stream, const FlowTrace* made_by) {
  BATON_RANGE("flow_log_density");
  const Trace view = open("flow_log_density", s, trace, groups);
  if (z == z0) throw InputError("flow_log_density: z0 is z itself, expected memory of its own");
  const double* exact = nullptr;
  if (made_by) {
    if (made_by->rows != trace.rows || made_by->memory == trace.memory)
      throw InputError("flow_log_density: the trace that made z has " + number(made_by->rows) +
                       " rows of z, expected " + number(trace.rows) + " in memory of its own");
    exact = open("flow_log_density", s, *made_by, groups).memory;  // a row begins with its last z
  }
  run(s, p, view, identity, true, z0, log_q, z, exact, trace.rows, groups, stream);
}

void flow_log_density_backward(float* dz, const FlowShape& s, FlowParameters p, const float* z0,
                               const int32_t* identity, FlowTrace trace, const StepState* states, float scale,
                               int groups, Stream stream) {
  BATON_RANGE("flow_log_density_backward");
  const Trace view = open("flow_log_density_backward", s, trace, groups);
  run_back(s, p, view, {nullptr, dz, z0, identity, states, scale, true, true, groups, 1}, trace.rows, stream);
}

void flow_backward(float* gradients, float* dz, const FlowShape& s, FlowParameters p, const float* z0, FlowTrace trace,
                   const StepState* states, float scale, bool density, int groups, int replicas, Stream stream) {
  BATON_RANGE("flow_backward");
  const Trace view = open("flow_backward", s, trace, groups);
  if (replicas < 1 || int64_t(groups) * replicas != trace.rows)
    throw InputError("flow_backward: " + number(trace.rows) + " rows of z for " + number(replicas) + " replicas of " +
                     number(groups) + " groups");
  run_back(s, p, view, {gradients, dz, z0, nullptr, states, scale, density, false, groups, groups}, trace.rows, stream);
}

void flow_kl(double* accumulator, size_t accumulator_stride, const double* log_q, const double* log_prior, int tensors,
             int groups, int replicas, Stream stream) {
  BATON_RANGE("flow_kl");
  if (tensors < 1 || groups < 1 || replicas < 1 || replicas > most_rows || accumulator_stride < size_t(tensors))
    throw InputError("flow_kl: log_q is [" + number(replicas) + " replicas x " + number(groups) + " groups][" +
                     number(tensors) + "], an accumulator's row has " + number(long(accumulator_stride)));
  simt::launch<flow_kl_kernel>(simt::each(tensors, replicas), stream, accumulator, accumulator_stride, log_q, log_prior,
                               tensors, groups);
}

void flow_initialise(float* values, const FlowShape& s, size_t stride, float log_std, const StepState* states,
                     int replicas, Stream stream) {
  BATON_RANGE("flow_initialise");
  check_shape("flow_initialise", s);
  check_rows("flow_initialise", 1, replicas);
  simt::launch<initialise_kernel>(simt::blocks(s.tensors * max(s.steps, 1), threads, 0, replicas), stream, values, s,
                                  stride, log_std, states);
}

}  // namespace baton
