// What the posteriors beyond FFG add to a step: the Cholesky factors of CFG (kernels/cholesky.h, cholesky_moments.h),
// the multipliers of MNF (kernels/gaussian.h) and its normalizing flows (kernels/flow.h), at the shapes of LeNet5 and
// 3Conv3FC.
#include "kernels/cholesky.h"
#include "kernels/cholesky_moments.h"
#include "kernels/flow.h"
#include "networks.h"

using namespace baton;

namespace {

// ----------------------------------------------------------------------------------------- channel factorized Gaussian
// Factors near what training leaves: standard deviations of 0.02, and ratios below the diagonal of 0.1.
float* take_factors(Buffers& b, int blocks, int d) {
  std::vector<float> v(size_t(blocks) * packed(d));
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  float* to = v.data();
  for (int block = 0; block < blocks; block++)
    for (int i = 0; i < d; i++)
      for (int j = 0; j <= i; j++) *to++ = j == i ? -4.f + 0.1f * normal(random) : 0.1f * normal(random);
  return b.put(v);
}

CholeskyArrays take_blocks(Buffers& b, int blocks, int d) {
  CholeskyArrays a{};
  a.blocks = blocks, a.d = d, a.replicas = 1;
  a.stride = size_t(blocks) * d, a.factor_stride = size_t(blocks) * packed(d);
  a.mean = b.normal(a.stride, 0.1f);
  a.prior_mean = b.normal(a.stride, 0.1f);
  a.mean_m = b.normal(a.stride, 1e-2f), a.mean_v = b.positive(a.stride, 1e-4f);
  a.factor = take_factors(b, blocks, d);
  a.prior_factor = take_factors(b, blocks, d);
  float* inverse = b.room<float>(a.factor_stride);
  cholesky_invert(inverse, a.prior_factor, a.factor_stride, blocks, d, 1, b.stream());
  a.prior_inverse = inverse;
  a.factor_m = b.normal(a.factor_stride, 1e-2f), a.factor_v = b.positive(a.factor_stride, 1e-4f);
  return a;
}

// A block has d weights and P = d (d + 1) / 2 entries of its factor. Bytes a block: sample reads the factor and the
// means and writes a draw, 4 P + 8 d; step reads and writes factor, means and their moments, reads the prior, its
// inverse and the draw's gradient, 32 P + 32 d; kl reads the factor, the prior's inverse and diagonal, both means,
// 8 P + 12 d; invert 8 P. FLOPs (head note of kernels/cholesky.cu): sample 2 P and d normals; step 2/3 d^3 + 2 d^2, 15
// P of Adam, d normals; kl the product of two triangles and a vector, d^3 / 3 + d^2, and the sums 2 P; invert d^3 / 3.
void blocks(const char* layer, int count, int d) {
  const double n = count, p = packed(d), d1 = d, cube = d1 * d1 * d1;
  const std::string suffix = std::string(layer) + "/blocks:" + std::to_string(count) + "/d:" + std::to_string(d);
  add("cholesky_sample" + suffix, {n * (4 * p + 8 * d1), n * (2 * p + flops_a_normal * d1)},
      [=](Buffers& b) -> std::function<void()> {
        const CholeskyArrays a = take_blocks(b, count, d);
        const StepState* states = b.states(1);
        float* w = b.room<float>(a.stride);
        return [=, stream = b.stream()] { cholesky_sample(w, a.stride, a, 1, states, 0, stream); };
      });
  add("cholesky_step" + suffix,
      {n * (32 * p + 32 * d1), n * (2 * cube / 3 + 2 * d1 * d1 + 15 * p + flops_a_normal * d1)},
      [=](Buffers& b) -> std::function<void()> {
        const CholeskyArrays a = take_blocks(b, count, d);
        const StepState* states = b.states(1);
        const float* gradient = b.normal(a.stride, 1e-2f);
        double* kl = b.room<double>(1);
        float* partial = b.room<float>(count);
        return [=, stream = b.stream()] {
          cholesky_step(a, gradient, a.stride, 1, 0, nullptr, nullptr, states, kl, 1, partial, stream);
        };
      });
  add("cholesky_kl" + suffix, {n * (8 * p + 12 * d1), n * (cube / 3 + d1 * d1 + 2 * p)},
      [=](Buffers& b) -> std::function<void()> {
        const CholeskyArrays a = take_blocks(b, count, d);
        double* kl = b.room<double>(1);
        float* partial = b.room<float>(count);
        return [=, stream = b.stream()] { cholesky_kl(kl, 1, a, partial, stream); };
      });
  add("cholesky_invert" + suffix, {n * 8 * p, n * cube / 3}, [=](Buffers& b) -> std::function<void()> {
    const size_t stride = size_t(count) * packed(d);
    const float* factor = take_factors(b, count, d);
    float* inverse = b.room<float>(stride);
    return [=, stream = b.stream()] { cholesky_invert(inverse, factor, stride, count, d, 1, stream); };
  });
}

// Bytes: input, factors and variances once each; the way back reads them and writes gradients of input and factors.
// FLOPs of a filter, channel, position and image: the patch by a triangle and the squares' sum, 2 P + 2 d; the way back
// twice that (to the factor, to the patch).
void moments(const char* layer, ConvShape s) {
  const double d = double(s.kernel) * s.kernel, p = packed(s.kernel * s.kernel);
  const double factors = double(s.out_channels) * s.in_channels * p, in = double(s.input_size()),
               out = double(s.output_size());
  const double flops = out * s.in_channels * (2 * p + 2 * d);
  const int blocks = s.out_channels * s.in_channels, extent = s.kernel * s.kernel;
  const size_t stride = size_t(blocks) * packed(extent);
  const std::string suffix = std::string(layer) + batch_name(s.batch);
  add(
      "cholesky_moments/forward" + suffix, {4 * (in + out + factors), flops},
      [=](Buffers& b) -> std::function<void()> {
        const auto product = std::make_shared<CholeskyMoments>(b.device, b.arena, s, 1);
        const Matrices x{b.normal(s.input_size()), s.input_size()};
        const float* factor = take_factors(b, blocks, extent);
        const MutableMatrices v{b.room<float>(s.output_size()), s.output_size()};
        return [=, device = &b.device] { product->forward(*device, x, factor, stride, v); };
      },
      Sets::warm);
  add(
      "cholesky_moments/backward" + suffix, {4 * (3 * in + out + 3 * factors), 2 * flops},
      [=](Buffers& b) -> std::function<void()> {
        const auto product = std::make_shared<CholeskyMoments>(b.device, b.arena, s, 1);
        const Matrices x{b.normal(s.input_size()), s.input_size()};
        const float* factor = take_factors(b, blocks, extent);
        const Matrices dv{b.normal(s.output_size(), 1e-6f), s.output_size()};
        const MutableMatrices dx{b.normal(s.input_size()), s.input_size()};
        float* dfactor = b.normal(stride);
        return [=, device = &b.device] { product->backward(*device, x, factor, stride, dv, dx, dfactor, stride); };
      },
      Sets::warm);
}

// -------------------------------------------------------------------------------------------- multiplicative variables
struct TakenMultipliers {
  GaussianArrays arrays;
  Multipliers z;
};
TakenMultipliers take_multipliers(Buffers& b, const NetworkSizes& network, int groups) {
  const GaussianArrays a = take_arrays(b, network, 1, true);
  const size_t z_stride = size_t(network.z_stride());
  return {a, {b.normal(z_stride * groups), b.normal(a.stride * groups, 1e-2f), z_stride, a.stride, groups}};
}

// Bytes a parameter: gaussian_step as without z (kernels_bench.cpp), whose gradient is a group's, 72, and 4 a further
// group; multiply_weights reads the mean and writes a weight a group, 4 + 4; multiplier_gradient reads mean, prior, its
// log sigma and a gradient a group, 12 + 4. z itself is nothing beside them. FLOPs: step 59 and 3 a group; a product a
// group; mu grad, e^2 / s^2, 1 exp: 6 and 2 a group.
void multipliers(const NetworkSizes& network, int groups) {
  const double n = network.parameters();
  const std::string suffix = std::string(network.name) + "/groups:" + std::to_string(groups);
  add("gaussian_step/multiplied" + suffix, {n * (68 + 4 * groups), n * (59 + 3 * groups)},
      [=, &network](Buffers& b) -> std::function<void()> {
        const TakenMultipliers of = take_multipliers(b, network, groups);
        const Pieces pieces = take_pieces(b, network.runs(true));
        const StepState* states = b.states(1);
        const KlAccumulator accumulator{b.room<double>(network.layout.tensors().size()),
                                        network.layout.tensors().size()};
        float* partial = b.room<float>(pieces.count);
        return [=, stream = b.stream()] {
          gaussian_step(of.arrays, ScaleRule::adam, pieces, states, accumulator, partial, stream, of.z);
        };
      });
  add("multiply_weights" + suffix, {n * (4 + 4 * groups), n * groups},
      [=, &network](Buffers& b) -> std::function<void()> {
        const TakenMultipliers of = take_multipliers(b, network, groups);
        const Pieces pieces = take_pieces(b, network.runs(true));
        float* w = b.room<float>(of.arrays.stride * groups);
        return [=, stream = b.stream()] { multiply_weights(w, of.arrays.stride, of.arrays, pieces, of.z, stream); };
      });
  add("multiplier_gradient" + suffix, {n * (12 + 4 * groups), n * (6 + 2 * groups)},
      [=, &network](Buffers& b) -> std::function<void()> {
        const TakenMultipliers of = take_multipliers(b, network, groups);
        const StepState* states = b.states(1);
        const std::vector<ZPart> parts = z_parts_of(network.runs(true));
        const ZParts table{b.put(parts), int(parts.size())};
        float* dz = b.room<float>(of.z.z_stride * groups);
        return [=, stream = b.stream()] { multiplier_gradient(dz, of.arrays, table, of.z, states, stream); };
      });
}

// ------------------------------------------------------------------------------------------------- normalizing flows
struct TakenFlow {
  FlowShape shape;
  FlowParameters parameters;
  float* values;
  const StepState* states;
  float *z0, *z, *dz;
  double* log_q;
  FlowTrace trace;
};

// Gated RealNVP of `steps` steps and `hidden` units for every weight tensor's z, as posteriors have by default.
TakenFlow take_flow(Buffers& b, const NetworkSizes& network, int steps, int hidden, int rows) {
  TakenFlow f{};
  std::vector<FlowTensor> table;
  size_t at = 0;
  const auto take = [&](size_t n) {
    const size_t here = at;
    at += (n + 63) / 64 * 64;
    return int(here);
  };
  int z_at = 0, largest = 0;
  for (int size : network.z_sizes()) {
    FlowTensor t{};
    t.size = size, t.z_at = z_at;
    t.stream_id = stream_z + uint32_t(table.size());
    t.base_mean = take(size), t.base_log_std = take(size);
    for (int k = 0; k < steps; k++) {
      FlowStep& s = t.steps[k];
      s.mask = take(size), s.w0 = take(size_t(hidden) * size), s.b0 = take(hidden);
      s.w1 = take(size_t(size) * hidden), s.b1 = take(size), s.w2 = take(size_t(size) * hidden), s.b2 = take(size);
    }
    table.push_back(t);
    z_at += (size + 63) / 64 * 64;
    largest = std::max(largest, size);
  }
  f.shape = {FlowKind::gated, steps, hidden, int(table.size()), b.put(table), z_at, largest, false};
  f.values = b.room<float>(at);
  f.parameters = {f.values, at};
  f.states = b.states(1);
  flow_initialise(f.values, f.shape, at, -2.3f, f.states, 1, b.stream());
  const size_t z = size_t(z_at) * rows;
  f.z0 = b.room<float>(z), f.z = b.room<float>(z), f.dz = b.normal(z, 1e-3f);
  f.log_q = b.room<double>(table.size() * rows);
  f.trace = {b.room<float>(flow_trace_floats(f.shape, rows)), rows};
  const FlowNoise noise{FlowNoise::training, f.states};
  flow_forward(f.z, f.log_q, f.shape, f.parameters, f.z0, f.trace, rows, b.stream(), &noise);
  return f;
}

// Bytes a step and element of z, the weights' traffic once for all rows: forward and density read W0 and, of the half
// that changes, the rows of W1 and W2, 4 (H + H); the density's way back reads them again and W0 twice, 4 (H + H + H);
// the way back to the parameters reads W0, W1, W2 likewise and writes all three gradients, 4 (2 H + 3 H). FLOPs a row:
// forward and density 2 H for the hidden units and 4 H for half of the elements, 4 H; either way back twice that.
void flows(const NetworkSizes& network, int rows) {
  constexpr int steps = 2, hidden = 50;
  double elements = 0;
  for (int size : network.z_sizes()) elements += size;
  const double bytes = 4. * hidden * elements * steps, flops = 4. * hidden * elements * steps * rows;
  const std::string suffix = std::string(network.name) + "/rows:" + std::to_string(rows);
  add("flow_forward" + suffix, {2 * bytes, flops}, [=, &network](Buffers& b) -> std::function<void()> {
    const TakenFlow f = take_flow(b, network, steps, hidden, rows);
    return [=, stream = b.stream()] { flow_forward(f.z, f.log_q, f.shape, f.parameters, f.z0, f.trace, rows, stream); };
  });
  add("flow_backward" + suffix, {5 * bytes, 2 * flops}, [=, &network](Buffers& b) -> std::function<void()> {
    const TakenFlow f = take_flow(b, network, steps, hidden, rows);
    float* gradients = b.room<float>(f.parameters.stride);
    return [=, stream = b.stream()] {  // of a dz that earlier calls have overwritten
      flow_backward(gradients, f.dz, {}, f.shape, f.parameters, f.z0, f.trace, f.states, 1.f / float(rows), true, rows,
                    1, stream);
    };
  });
  for (const bool back : {false, true})
    add((back ? "flow_log_density_and_back" : "flow_log_density") + suffix,
        {(back ? 5 : 2) * bytes, (back ? 3 : 1) * flops}, [=, &network](Buffers& b) -> std::function<void()> {
          const TakenFlow f = take_flow(b, network, steps, hidden, rows);
          const FlowTrace trace{b.room<float>(flow_trace_floats(f.shape, rows)), rows};
          float* dz = back ? b.room<float>(size_t(f.shape.z_size) * rows) : nullptr;
          const FlowDensity density{f.parameters, nullptr, trace, f.log_q, nullptr, dz, -1.f / float(rows)};
          return [=, stream = b.stream()] { flow_log_density({density}, f.shape, f.z, f.states, rows, stream); };
        });
}

}  // namespace

void add_family_benchmarks() {
  blocks("/lenet5.conv2", 1000, 25);
  blocks("/3conv3fc.conv3", 8192, 25);
  moments("/lenet5.conv2", {128, 20, 12, 12, 50, 5, 0});
  moments("/3conv3fc.conv3", {128, 64, 7, 7, 128, 5, 2});
  for (const NetworkSizes* network : {&lenet5_sizes(), &conv3fc3_sizes()}) {
    multipliers(*network, 1), multipliers(*network, 4);
    flows(*network, 1), flows(*network, 4);
  }
}
