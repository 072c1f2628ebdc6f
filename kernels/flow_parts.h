// What the files flow*.cu share, and nobody else includes: the trace of a pass, and the pieces that the way forward and
// the way back have in common.
#pragma once
#include "kernels/flow.h"

namespace baton {

namespace {  // a copy in each file: the emulator's shared variables must not lie in COMDAT functions

constexpr int tile = 64;           // elements of z that a block takes; every tensor starts a new tile
constexpr int threads = 256;       // of most blocks
constexpr double least_gate = -3;  // what the gates' k is clamped to

// -------------------------------------------------------------------------------------------------------- the trace
// A view of what a pass keeps of each row, in doubles:
//   RealNVP  state, adjoint [z]; masked, value, gate [steps][z]; hidden [steps][tensors][hidden];
//            slope [tensors][hidden]; logdet [steps][tiles]; partial [tiles][hidden]
//   planar   state, adjoint [z]; masked [steps][z], here the steps' inputs; planar [steps][tensors][3]
struct Trace {
  double* memory;
  size_t row_size;
  int z, steps, tensors, hidden;

  __host__ __device__ int tiles() const { return z / tile; }
  __device__ double* row(int q) const { return memory + row_size * q; }
  __device__ double* state(int q) const { return row(q); }                                // z before or after a step
  __device__ double* adjoint(int q) const { return row(q) + z; }                          // dL/dz on the way back
  __device__ double* masked(int q, int k) const { return row(q) + size_t(z) * (2 + k); }  // m z of step k
  // Of an element that the step changes, before the step: z - t for gated steps, z for affine ones.
  __device__ double* value(int q, int k) const { return row(q) + size_t(z) * (2 + steps + k); }
  __device__ double* gate(int q, int k) const { return row(q) + size_t(z) * (2 + 2 * steps + k); }  // k before clamping
  __device__ double* hidden_units(int q, int k, int tensor) const {
    return row(q) + size_t(z) * (2 + 3 * steps) + (size_t(k) * tensors + tensor) * hidden;
  }
  __device__ double* slope(int q, int tensor) const { return hidden_units(q, steps, tensor); }  // dL/d(W0 (m z) + b0)
  __device__ double* logdet(int q, int k) const { return hidden_units(q, steps + 1, 0) + size_t(k) * tiles(); }
  __device__ double* partial(int q) const { return logdet(q, steps); }  // a tile's part of dL/dh
  __device__ double* planar(int q, int k, int tensor) const {           // x, w.u and w.w
    return row(q) + size_t(z) * (2 + steps) + (size_t(k) * tensors + tensor) * 3;
  }
};

// ----------------------------------------------------------------------------------------------------------- pieces
struct Tile {
  int tensor, first, count;  // elements first, ..., first + count - 1 of the tensor
};
__device__ __forceinline__ Tile find_tile(const FlowShape& s, int index) {
  Tile at{0, 0, 0};
  for (int t = 0; t < s.tensors; t++) {
    const int first = index * tile - s.table[t].z_at, left = s.table[t].size - first;
    if (first >= 0 && left > 0) at = {t, first, left < tile ? left : tile};
  }
  return at;
}

__device__ __forceinline__ double clamp_gate(double k) { return k < least_gate ? least_gate : k; }  // NaN stays NaN

__device__ __forceinline__ bool is_identity(const int32_t* identity, int r) { return identity && identity[r] != 0; }

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

}  // namespace

// ----------------------------------------------------------------------------------------------------------- checks
// They throw InputError, which names the function `who`: for a flow that flow.h does not allow; for rows that are not
// whole groups, or more than a grid has.
constexpr int most_flow_rows = 65535;
void check_flow_shape(const std::string& who, const FlowShape&);
void check_flow_rows(const std::string& who, int groups, int rows);

size_t count_trace_doubles(const FlowShape&);  // of a row

namespace {

// The view of a trace's memory, after all the checks.
inline Trace open_trace(const std::string& who, const FlowShape& s, FlowTrace trace, int groups) {
  check_flow_shape(who, s);
  check_flow_rows(who, groups, trace.rows);
  if (!trace.memory || reinterpret_cast<uintptr_t>(trace.memory) % sizeof(double) != 0)
    throw InputError(who + ": the trace has no memory, or none that is aligned to 64 floats");
  return {reinterpret_cast<double*>(trace.memory), count_trace_doubles(s), s.z_size, s.steps, s.tensors, s.hidden};
}

}  // namespace

}  // namespace baton
