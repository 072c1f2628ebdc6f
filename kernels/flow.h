// Normalizing flows over the multiplicative variables z of MNF (Louizos and Welling 2017; Kochurov et al. 2018, with
// the joint bound of their Appendix C):
//   z0 = m0 + s0 e,  z = f_K(... f_1(z0)),  ln q(z) = ln N(z0; m0, s0^2) - sum logdet.
// The bound needs ln q~(z) of the *previous* posterior at a z of the current one, so every flow has an inverse.
//
// Masked RealNVP (mask m of 0s and 1s, fixed, part of the parameters):
//   h = tanh(W0 (m z) + b0),  t = W1 h + b1,  k = W2 h + b2,
//   gated   z' = m z + (1 - m) (z g + (1 - g) t),  g = sigmoid(max(k, -3)),  logdet = sum (1 - m) ln g
//   affine  z' = m z + (1 - m) (z e^k + t),                          logdet = sum (1 - m) k
// Planar:   z' = z + u^ tanh(w.z + b),  u^ = u + (softplus(w.u) - 1 - w.u) w / |w|^2,
//   logdet = ln(1 + (1 - tanh^2) w.u^);  inverse: a + (w.u^) tanh(a + b) = w.z' has one root a, and
//   z = z' - u^ tanh(a + b).
//
// z is float at both ends, and everything between is double: ln q and z0 are those of the given z, to rounding. Where
// gates are nearly shut or bends are stiff, the inverse multiplies the rounding of z itself, by up to 21 each time that
// a gated step changes an element. There a round trip through many steps is not the identity to 1e-5, in any
// arithmetic. Without steps the flow is its base.
//
// A pass goes through all the steps of all the z of a network in one launch, with rows = replicas * groups: row q uses
// the parameters of replica q / groups. The parameters of all flows are in one flat store (engine/store.h).
#pragma once
#include <vector>

#include "engine/simt.h"
#include "kernels/step_state.h"

namespace baton {

enum class FlowKind : int { gated, affine, planar };
constexpr int most_flow_steps = 8, most_flow_tensors = 8;

// Offsets in floats into a row of the parameter store. RealNVP: mask [D], w0 [H, D], b0 [H], w1 [D, H], b1 [D], w2
// [D, H], b2 [D]. Planar: mask, w1, w2, b2 unused; w0 is w [D], b0 is b [1], b1 is u [D].
struct FlowStep {
  int mask, w0, b0, w1, b1, w2, b2;
};
struct FlowTensor {
  int size;            // D
  int z_at;            // the place of its z in a row of z
  int base_mean;       // m0 [D]
  int base_log_std;    // ln s0 [D]
  uint32_t stream_id;  // of its base noise
  FlowStep steps[most_flow_steps];
};
struct FlowShape {
  FlowKind kind;
  int steps, hidden, tensors;
  const FlowTensor* table;  // device memory [tensors]
  int z_size;               // floats of a row of z: every tensor's D, each rounded up to 64 (z_at: multiples of 64)
  int largest;              // the largest D
  bool fixed_base;          // the base distribution is not learned
};

// Parameters of every replica: [replicas][stride]. Device memory.
struct FlowParameters {
  const float* values;
  size_t stride;
};

// What a pass keeps for its way back, for the `rows` rows of the call. The memory has flow_trace_floats() floats,
// aligned to 64. flow_forward and every density need a trace each.
struct FlowTrace {
  float* memory;
  int rows;
};
size_t flow_trace_floats(const FlowShape&, int rows);

// Where z0 = m0 + s0 e has its noise e from. In training, e_i of a tensor in row q = r * groups + g is lane i mod 4 of
// normal4(states[r].noise, g * ceil(D / 4) + i / 4, stream_id, states[r].step). In predictions, whose rows are draws of
// one replica, it is that of normal4(key, i / 4, stream_id, first + q), so a draw does not depend on how many are made
// at once.
struct FlowNoise {
  enum Kind : int { none, training, prediction } kind;  // none: z0 = m0
  const StepState* states = nullptr;                    // of training
  Key key{};                                            // of predictions
  int first = 0;
};

// z = flow(z0), log_q[rows][tensors] = ln q(z) (log_q may be null). z may not be z0. Without noise z0 [rows][z_size] is
// given, else it is drawn from the base distribution and written.
void flow_forward(float* z, double* log_q, const FlowShape&, FlowParameters, float* z0, FlowTrace, int groups, Stream,
                  const FlowNoise* = nullptr);

// A density at any z, through the inverse.
struct FlowDensity {
  FlowParameters parameters;
  const int32_t* identity;  // [replicas], device memory, may be null: where it is not 0, the flow is its base alone
  FlowTrace trace;
  double* log_q;        // [rows][tensors] = ln q(z)
  float* z0 = nullptr;  // [rows][z_size] = the inverse image; may be null, may not be z
  float* dz = nullptr;  // [rows][z_size] = states[r].kl_now * scale * d ln q(z) / dz, the flow held; may be null
  float scale = 0;
};
// One density or two of the same z. states may be null where there is no dz. made_by: if a flow_forward (of any flow of
// this shape) made z, its trace; then z is taken as it was before its rounding to float, which nearly shut gates and
// stiff bends would multiply.
void flow_log_density(const std::vector<FlowDensity>&, const FlowShape&, const float* z, const StepState* states,
                      int groups, Stream, const FlowTrace* made_by = nullptr);

// To be called after flow_forward: writes (=) the gradient of
//   sum_q sum_i dz[q][i] z[q][i] + states[r].kl_now * scale * sum_q sum_t ln q(z)
// by every parameter to gradients [replicas][stride], summed over the groups; 0 for masks, and for a fixed base. dz
// here is the array dz plus those of the `densities`. The array is overwritten with the gradient by z0, without the
// base's own density. density false leaves the second term out, for "sticking the landing": the path gradient of ln q
// is then among the densities, with a scale of +1.
void flow_backward(float* gradients, float* dz, const std::vector<FlowDensity>& densities, const FlowShape&,
                   FlowParameters, const float* z0, FlowTrace, const StepState* states, float scale, bool density,
                   int groups, int replicas, Stream);

// The KL of z: accumulator[accumulator_stride * r + t] += mean over the groups of log_q - log_prior, which are both
// [rows][tensors].
void flow_kl(double* accumulator, size_t accumulator_stride, const double* log_q, const double* log_prior, int tensors,
             int groups, int replicas, Stream);

// Parameters of a fresh flow for every replica: nearly the identity, with z about 1. The noise is that of
// states[r].noise, stream_init and draw 1, with counters by the places in the store. Masks: a random balanced one for
// even steps (a coin for every two neighbours), and its complement for the odd step that follows. The base has mean 1
// and ln s0 = log_std. W ~ N(0, (0.1)^2 / fan_in), b0 = 0; gated b1 = 1, b2 = 2; affine b1 = 0, b2 = 0; planar u, w ~
// N(0, 0.1^2 / D).
void flow_initialise(float* values, const FlowShape&, size_t stride, float log_std, const StepState*, int replicas,
                     Stream);

}  // namespace baton
