// Normalizing flows over the multiplicative variables z of MNF (Louizos and Welling 2017; Kochurov et al. 2018, with
// the joint bound of their Appendix C):
//   z0 = m0 + s0 e,  z = f_K(... f_1(z0)),  ln q(z) = ln N(z0; m0, s0^2) - sum logdet.
// The bound needs ln q~(z) of the *previous* posterior at a z that the current one made, so every flow has its inverse.
//
// Masked RealNVP (mask m of 0s and 1s, fixed, part of the parameters):
//   h = tanh(W0 (m z) + b0),  t = W1 h + b1,  k = W2 h + b2,
//   gated   z' = m z + (1 - m) (z g + (1 - g) t),  g = sigmoid(max(k, -3)),  logdet = sum (1 - m) ln g
//   affine  z' = m z + (1 - m) (z e^k + t),                          logdet = sum (1 - m) k
// Planar:   z' = z + u^ tanh(w.z + b),  u^ = u + (softplus(w.u) - 1 - w.u) w / |w|^2,
//   logdet = ln(1 + (1 - tanh^2) w.u^);  inverse: a + (w.u^) tanh(a + b) = w.z' has one root a, and
//   z = z' - u^ tanh(a + b).
//
// Between the float z at both ends all is double: ln q and z0 are those of the z that is given, to rounding. Where
// gates are nearly shut or bends stiff, the inverse multiplies the rounding of z itself (by up to 21 each time that a
// gated step changes an element), so there a round trip through many steps is no identity to 1e-5, whatever the
// arithmetic. Without steps the flow is its base.
//
// All the z of a network go through together, in one launch a stage of the computation, for rows = replicas * groups:
// row q uses the parameters of replica q / groups. Parameters of all flows lie in one flat store (engine/store.h).
#pragma once
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
  int z_at;            // where its z lies in a row of z
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

// What a pass keeps for its way back, for `rows` rows: those of the call. Take it once: flow_trace_floats() floats,
// 64-aligned. The way back of flow_forward reads that pass's trace, that of flow_log_density its own: two traces.
struct FlowTrace {
  float* memory;
  int rows;
};
size_t flow_trace_floats(const FlowShape&, int rows);

// z0 = m0 + s0 e into z0 [rows][z_size]; e_i of tensor t is lane i mod 4 of normal4(states[r].noise,
// g * ceil(D / 4) + i / 4, stream_id, states[r].step), q = r * groups + g.
void flow_draw_base(float* z0, const FlowShape&, FlowParameters, int groups, int replicas, const StepState*, Stream);
// For predictions, `samples` rows of replica 0 of the parameters: draw first_sample + s in place of the step.
// noise false: z0 = m0.
void flow_draw_base_draws(float* z0, const FlowShape&, FlowParameters, bool noise, int first_sample, int samples, Key,
                          Stream);

// z = flow(z0), log_q[rows][tensors] = ln q(z) (log_q may be null). z may not be z0.
void flow_forward(float* z, double* log_q, const FlowShape&, FlowParameters, const float* z0, FlowTrace, int groups,
                  Stream);

// log_q[rows][tensors] = ln q(z) at any z, through the inverse; z0 [rows][z_size] = the inverse image. identity (device
// memory, [replicas], may be null): where identity[r] is not 0 the flow's steps are passed over, the base remains.
// made_by: the trace of the flow_forward (of any flow of this shape) that made z, if it did: then z counts as it was
// before its rounding to float, which nearly shut gates and stiff bends would multiply.
void flow_log_density(double* log_q, float* z0, const FlowShape&, FlowParameters, const float* z,
                      const int32_t* identity, FlowTrace, int groups, Stream, const FlowTrace* made_by = nullptr);

// After flow_log_density with the same arguments: dz [rows][z_size] += states[r].kl_now * scale * d ln q(z) / dz. The
// flow's parameters are constants here.
void flow_log_density_backward(float* dz, const FlowShape&, FlowParameters, const float* z0, const int32_t* identity,
                               FlowTrace, const StepState* states, float scale, int groups, Stream);

// After flow_forward: the gradient of  sum_q sum_i dz[q][i] z[q][i] + states[r].kl_now * scale * sum_q sum_t ln q(z)
// with respect to every parameter, written (=) to gradients [replicas][stride], summed over the groups; masks get 0,
// and so does the base when it is fixed. dz is overwritten with the gradient by z0 (the base's own density left out).
// density false: the second term is left out ("sticking the landing": the path gradient of ln q is then the caller's,
// through flow_log_density_backward with a scale of +1).
void flow_backward(float* gradients, float* dz, const FlowShape&, FlowParameters, const float* z0, FlowTrace,
                   const StepState* states, float scale, bool density, int groups, int replicas, Stream);

// accumulator[accumulator_stride * r + t] += mean over the groups of log_q - log_prior: the KL of z, [rows][tensors]
// both.
void flow_kl(double* accumulator, size_t accumulator_stride, const double* log_q, const double* log_prior, int tensors,
             int groups, int replicas, Stream);

// Parameters of a fresh flow: near the identity with z = 1 (every replica; states[r].noise, stream stream_init, draw 1,
// counters by the place in the store). Masks: a random balanced one for even steps (a coin for every two neighbours)
// and its complement for the odd one that follows. base mean 1, ln s0 = log_std.
// W ~ N(0, (0.1)^2 / fan_in), b0 = 0; gated b1 = 1, b2 = 2; affine b1 = 0, b2 = 0; planar u, w ~ N(0, 0.1^2 / D).
void flow_initialise(float* values, const FlowShape&, size_t stride, float log_std, const StepState*, int replicas,
                     Stream);

}  // namespace baton
