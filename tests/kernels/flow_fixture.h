// Flows in double by their definitions, and flows on the device with all that the calls need.
#pragma once
#include "kernels/flow.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <memory>
#include <ostream>
#include <random>
#include <vector>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/npz.h"

namespace baton::test {
namespace {

using Doubles = std::vector<double>;
using Floats = std::vector<float>;
constexpr float untouched = 9;

inline double softplus(double x) { return std::log1p(std::exp(-std::abs(x))) + std::max(x, 0.); }

// ---------------------------------------------------------------------------------------------------- the reference
// One tensor's flow over the parameters `v` of one replica.
struct Reference {
  FlowKind kind;
  int steps, hidden;
  FlowTensor at;
  const Doubles& v;

  // The state before a step from that after it, or the other way round; adds to the logdet of the step forward.
  void couple(int k, bool inverse, Doubles& z, double& logdet) const {
    const FlowStep& f = at.steps[k];
    const int size = at.size;
    Doubles h(hidden);
    for (int j = 0; j < hidden; j++) {
      double sum = v[f.b0 + j];
      for (int i = 0; i < size; i++) sum += v[f.w0 + j * size + i] * v[f.mask + i] * z[i];
      h[j] = std::tanh(sum);
    }
    for (int i = 0; i < size; i++) {
      if (v[f.mask + i] != 0) continue;
      double t = v[f.b1 + i], gate = v[f.b2 + i];
      for (int j = 0; j < hidden; j++) t += v[f.w1 + i * hidden + j] * h[j], gate += v[f.w2 + i * hidden + j] * h[j];
      if (kind == FlowKind::gated) {
        const double g = 1 / (1 + std::exp(-std::max(gate, -3.)));
        z[i] = inverse ? (z[i] - (1 - g) * t) / g : z[i] * g + (1 - g) * t;
        logdet += std::log(g);
      } else {
        z[i] = inverse ? (z[i] - t) * std::exp(-gate) : z[i] * std::exp(gate) + t;
        logdet += gate;
      }
    }
  }
  void planar(int k, bool inverse, Doubles& z, double& logdet) const {
    const FlowStep& f = at.steps[k];
    double wz = 0, wu = 0, ww = 0;
    for (int i = 0; i < at.size; i++) {
      wz += v[f.w0 + i] * z[i];
      wu += v[f.w0 + i] * v[f.b1 + i];
      ww += v[f.w0 + i] * v[f.w0 + i];
    }
    const double sp = ww > 0 ? softplus(wu) : 1, b = v[f.b0];
    double a = wz;
    if (inverse) {
      double low = wz - std::abs(sp - 1) - 1, high = wz + std::abs(sp - 1) + 1;
      for (int n = 0; n < 200; n++) {
        a = 0.5 * (low + high);
        (a + (sp - 1) * std::tanh(a + b) > wz ? high : low) = a;
      }
    }
    const double th = std::tanh(a + b), sech = 1 / std::cosh(a + b);
    for (int i = 0; i < at.size; i++)
      z[i] += (inverse ? -th : th) * (v[f.b1 + i] + (ww > 0 ? (sp - 1 - wu) / ww * v[f.w0 + i] : 0));
    logdet += std::log(th * th + sech * sech * sp);
  }
  void step(int k, bool inverse, Doubles& z, double& logdet) const {
    if (kind == FlowKind::planar) planar(k, inverse, z, logdet);
    else couple(k, inverse, z, logdet);
  }
  double base(const Doubles& z0) const {
    double sum = 0;
    for (int i = 0; i < at.size; i++) {
      const double e = (z0[i] - v[at.base_mean + i]) * std::exp(-v[at.base_log_std + i]);
      sum -= 0.5 * e * e + v[at.base_log_std + i] + 0.5 * std::log(2 * M_PI);
    }
    return sum;
  }
  double forward(Doubles& z) const {  // returns ln q of the result
    double logdet = 0;
    const double log_base = base(z);
    for (int k = 0; k < steps; k++) step(k, false, z, logdet);
    return log_base - logdet;
  }
  double log_density(Doubles& z, bool identity = false) const {  // z becomes z0
    double logdet = 0;
    for (int k = identity ? 0 : steps; k-- > 0;) step(k, true, z, logdet);
    return base(z) - logdet;
  }
};

// ------------------------------------------------------------------------------------------------ flows on a device
struct Case {
  FlowKind kind = FlowKind::gated;
  std::vector<int> sizes{5};
  int hidden = 3, steps = 2, groups = 1, replicas = 1;
  bool fixed_base = false;
};
inline std::ostream& operator<<(std::ostream& out, const Case& c) {
  out << (c.kind == FlowKind::gated ? "gated" : c.kind == FlowKind::affine ? "affine" : "planar") << " [";
  for (int size : c.sizes) out << size << " ";
  return out << "], H " << c.hidden << ", " << c.steps << " steps, " << c.groups << " groups, " << c.replicas
             << " replicas" << (c.fixed_base ? ", fixed base" : "");
}

// A network's flows with one set of parameters, and everything that the calls need.
struct Flows {
  explicit Flows(const Case& c_) : c(c_) {
    auto take = [&](size_t count) {  // with gaps between
      const int at = int(stride);
      stride += count;
      for (size_t i = 0; i < count; i++) used.push_back(true);
      stride += 3;
      used.insert(used.end(), 3, false);
      return at;
    };
    for (int size : c.sizes) {
      FlowTensor t{};
      t.size = size, t.z_at = z_size, t.stream_id = stream_z + uint32_t(table.size());
      z_size += (size + 63) / 64 * 64;
      largest = std::max(largest, size);
      t.base_mean = take(size), t.base_log_std = take(size);
      for (int k = 0; k < c.steps; k++) {
        FlowStep& f = t.steps[k];
        if (c.kind == FlowKind::planar) {
          f.w0 = take(size), f.b0 = take(1), f.b1 = take(size);
        } else {
          f.mask = take(size), f.w0 = take(c.hidden * size), f.b0 = take(c.hidden);
          f.w1 = take(c.hidden * size), f.b1 = take(size), f.w2 = take(c.hidden * size), f.b2 = take(size);
        }
      }
      table.push_back(t);
    }
    device_table = std::make_unique<Buffer<FlowTensor>>(memory, table);
    values.assign(stride * c.replicas, 0);
    device_values = std::make_unique<Buffer<float>>(memory, values);
    gradients = std::make_unique<Buffer<float>>(memory, values.size(), untouched);
    const size_t trace_floats = flow_trace_floats(shape(), rows());
    forward_memory = std::make_unique<Buffer<float>>(memory, trace_floats, NAN);
    density_memory = std::make_unique<Buffer<float>>(memory, trace_floats, NAN);
    for (auto* b : {&z0, &z, &back, &dz, &added}) *b = std::make_unique<Buffer<float>>(memory, z_floats(), untouched);
    log_q = std::make_unique<Buffer<double>>(memory, densities(), 9.);
    states = std::make_unique<Buffer<StepState>>(memory, size_t(c.replicas));
    identity = std::make_unique<Buffer<int32_t>>(memory, size_t(c.replicas));
    set_weights(Floats(c.replicas, 1.f));
  }

  FlowShape shape() {
    return {c.kind, c.steps, c.hidden, int(table.size()), *device_table, z_size, largest, c.fixed_base};
  }
  FlowParameters parameters() { return {*device_values, stride}; }
  int rows() const { return c.groups * c.replicas; }
  size_t z_floats() const { return size_t(z_size) * rows(); }
  size_t densities() const { return table.size() * rows(); }
  size_t at(int q, int tensor, int i) const { return size_t(z_size) * q + table[tensor].z_at + i; }
  void put(int replica, int offset, const Floats& x) {
    std::copy(x.begin(), x.end(), values.begin() + stride * replica + offset);
  }
  void upload() { device_values->set(values); }
  void set_weights(const Floats& kl_now) {
    std::vector<StepState> s(c.replicas);
    for (int r = 0; r < c.replicas; r++) s[r].noise = key_of(70, r), s[r].step = 4 + r, s[r].kl_now = kl_now[r];
    states->set(s);
  }

  // The calls.
  void forward() {
    flow_forward(*z, *log_q, shape(), parameters(), *z0, {*forward_memory, rows()}, c.groups, memory.stream());
  }
  // As forward(), of a z0 that is drawn; for predictions of `samples` rows.
  void draw(const FlowNoise& noise, int samples = 0) {
    flow_forward(*z, *log_q, shape(), parameters(), *z0, {*forward_memory, samples ? samples : rows()},
                 samples ? samples : c.groups, memory.stream(), &noise);
  }
  // Into log_q, back and, with a scale, added.
  FlowDensity density_of(float scale = 0, bool with_identity = false) {
    return {parameters(),
            with_identity ? identity->data() : nullptr,
            {*density_memory, rows()},
            *log_q,
            *back,
            scale != 0 ? added->data() : nullptr,
            scale};
  }
  void density(float scale = 0, bool with_identity = false, bool of_forward = false) {
    const FlowTrace made_by{*forward_memory, rows()};
    flow_log_density({density_of(scale, with_identity)}, shape(), *z, *states, c.groups, memory.stream(),
                     of_forward ? &made_by : nullptr);
  }
  void backward(float scale, bool with_density = true, const std::vector<FlowDensity>& densities = {}) {
    flow_backward(*gradients, *dz, densities, shape(), parameters(), *z0, {*forward_memory, rows()}, *states, scale,
                  with_density, c.groups, c.replicas, memory.stream());
    forward_memory->host(), density_memory->host();  // check their guards
  }

  Reference reference(int tensor, const Doubles& v) const { return {c.kind, c.steps, c.hidden, table[tensor], v}; }
  Doubles replica(int r) const { return {values.begin() + long(stride) * r, values.begin() + long(stride) * (r + 1)}; }
  Doubles tensor_of(const Floats& x, int q, int t) const {
    return {x.begin() + long(at(q, t, 0)), x.begin() + long(at(q, t, table[t].size))};
  }
  // Everything but the tensors' own elements is as it was.
  bool padding_untouched(const Floats& x) const {
    std::vector<bool> own(z_floats());
    for (int q = 0; q < rows(); q++)
      for (size_t t = 0; t < table.size(); t++)
        for (int i = 0; i < table[t].size; i++) own[at(q, int(t), i)] = true;
    for (size_t i = 0; i < x.size(); i++)
      if (!own[i] && x[i] != untouched) return false;
    return true;
  }
  Floats own(const Floats& x) const {  // without the padding
    Floats y;
    for (int q = 0; q < rows(); q++)
      for (size_t t = 0; t < table.size(); t++)
        for (int i = 0; i < table[t].size; i++) y.push_back(x[at(q, int(t), i)]);
    return y;
  }

  Memory memory;
  Case c;
  size_t stride = 0;
  int z_size = 0, largest = 0;
  std::vector<bool> used{};
  std::vector<FlowTensor> table{};
  Floats values{};
  std::unique_ptr<Buffer<FlowTensor>> device_table{};
  std::unique_ptr<Buffer<float>> device_values{}, gradients{}, forward_memory{}, density_memory{}, z0{}, z{}, back{},
      dz{}, added{};
  std::unique_ptr<Buffer<double>> log_q{};
  std::unique_ptr<Buffer<StepState>> states{};
  std::unique_ptr<Buffer<int32_t>> identity{};
};

struct Spread {
  float gate_mean = 1, gate_sd = 1, weight = 0.6f;
  bool uniform_gates = false;  // in mean +- sd
  bool stiff = false;          // planar: w.u^ = -0.99
};

// Random parameters, z0 about the base, and something in dz.
inline void randomize(Flows& f, unsigned seed, Spread s = {}) {
  std::mt19937 random(seed);
  auto normal = [&](size_t n, float mean, float sd) {
    std::normal_distribution<float> d(mean, sd);
    Floats x(n);
    for (float& v : x) v = d(random);
    return x;
  };
  for (int r = 0; r < f.c.replicas; r++)
    for (const FlowTensor& t : f.table) {
      const size_t size = t.size, hidden = f.c.hidden;
      f.put(r, t.base_mean, normal(size, 1, 0.5f)), f.put(r, t.base_log_std, normal(size, -1, 0.3f));
      Floats mask(size);
      for (int k = 0; k < f.c.steps; k++) {
        const FlowStep& at = t.steps[k];
        if (f.c.kind == FlowKind::planar) {
          const Floats w = normal(size, 0, 1.5f / std::sqrt(float(size)));
          Floats u = normal(size, 0.1f, 1.5f / std::sqrt(float(size)));
          if (s.stiff) {  // softplus(w.u) = 0.01
            double wu = 0, ww = 0;
            for (size_t i = 0; i < size; i++) wu += double(w[i]) * u[i], ww += double(w[i]) * w[i];
            for (size_t i = 0; i < size; i++) u[i] += float((std::log(std::expm1(0.01)) - wu) / ww * w[i]);
          }
          f.put(r, at.w0, w), f.put(r, at.b0, normal(1, 0, 0.5f)), f.put(r, at.b1, u);
          continue;
        }
        for (float& m : mask) m = k % 2 ? 1 - m : float(random() & 1);
        f.put(r, at.mask, mask);
        f.put(r, at.w0, normal(hidden * size, 0, s.weight / std::sqrt(float(size))));
        f.put(r, at.b0, normal(hidden, 0, 0.3f));
        f.put(r, at.w1, normal(hidden * size, 0, s.weight / std::sqrt(float(hidden))));
        f.put(r, at.w2, normal(hidden * size, 0, s.weight / std::sqrt(float(hidden))));
        f.put(r, at.b1, normal(size, 1, 0.5f));
        Floats gates = normal(size, f.c.kind == FlowKind::gated ? s.gate_mean : s.gate_mean - 1, 0.3f * s.gate_sd);
        if (f.c.kind == FlowKind::gated) gates = normal(size, s.gate_mean, s.gate_sd);
        if (s.uniform_gates) {
          std::uniform_real_distribution<float> d(s.gate_mean - s.gate_sd, s.gate_mean + s.gate_sd);
          for (float& g : gates) g = d(random);
        }
        f.put(r, at.b2, gates);
      }
    }
  f.upload();
  Floats z0(f.z_floats(), untouched), dz(f.z_floats(), untouched);
  for (int q = 0; q < f.rows(); q++)
    for (const FlowTensor& t : f.table) {
      const float* v = f.values.data() + f.stride * (q / f.c.groups);
      const Floats e = normal(t.size, 0, 1), up = normal(t.size, 0, 1);
      for (int i = 0; i < t.size; i++) {
        z0[size_t(f.z_size) * q + t.z_at + i] = v[t.base_mean + i] + std::exp(v[t.base_log_std + i]) * e[i];
        dz[size_t(f.z_size) * q + t.z_at + i] = up[i];
      }
    }
  f.z0->set(z0), f.dz->set(dz);
}

// ---------------------------------------------------------------------------------------------------------- goldens
inline Npz golden_of(const std::string& name) { return Npz(golden_file(std::string("layers/") + name)); }

constexpr const char* coupling_names[] = {"m", "W0", "b0", "W1", "b1", "W2", "b2"};
constexpr const char* planar_names[] = {"w", "b", "u"};

// f(name in the golden without its prefix, offset, size) for every tensor of parameters but the base.
template <class F>
void each_parameter(const Flows& f, F visit) {
  const FlowTensor& t = f.table[0];
  for (int k = 0; k < f.c.steps; k++) {
    const std::string prefix = "f" + std::to_string(k) + "_";
    const FlowStep& s = t.steps[k];
    if (f.c.kind == FlowKind::planar) {
      const int at[] = {s.w0, s.b0, s.b1}, size[] = {t.size, 1, t.size};
      for (int i = 0; i < 3; i++) visit(prefix + planar_names[i], at[i], size[i]);
    } else {
      const int at[] = {s.mask, s.w0, s.b0, s.w1, s.b1, s.w2, s.b2}, all = t.size * f.c.hidden;
      const int size[] = {t.size, all, f.c.hidden, all, t.size, all, t.size};
      for (int i = 0; i < 7; i++) visit(prefix + coupling_names[i], at[i], size[i]);
    }
  }
}

// Parameters from the arrays called prefix + ..., for every replica.
inline void load(Flows& f, const Npz& golden, const std::string& prefix) {
  for (int r = 0; r < f.c.replicas; r++) {
    Floats log_std;
    for (double sd : golden.f64(prefix + "s0")) log_std.push_back(float(std::log(sd)));
    f.put(r, f.table[0].base_mean, golden.f32(prefix + "m0")), f.put(r, f.table[0].base_log_std, log_std);
    each_parameter(f, [&](const std::string& name, int at, int) { f.put(r, at, golden.f32(prefix + name)); });
  }
  f.upload();
}

inline Floats rows_of(const Flows& f, const Floats& x) {  // [rows][size] to rows of z
  Floats z(f.z_floats(), untouched);
  const int size = f.table[0].size;
  for (int q = 0; q < f.rows(); q++) std::copy_n(x.begin() + size * q, size, z.begin() + f.z_size * q);
  return z;
}

// ------------------------------------------------------------------------------------------------------- comparisons
// Some indices of 0, ..., n - 1: all, or a random choice.
inline std::vector<int> some_of(int n, int most, unsigned seed) {
  std::vector<int> all(n);
  for (int i = 0; i < n; i++) all[i] = i;
  if (n > most) {
    std::mt19937 random(seed);
    std::shuffle(all.begin(), all.end(), random);
    all.resize(most);
  }
  return all;
}
// Of two functions at once. Five points: the error is of the fourth order.
using Two = std::array<double, 2>;
inline Two slopes(double& x, const std::function<Two()>& f) {
  const double at = x, h = 1e-4;
  auto value = [&](double by) {
    x = at + by;
    return f();
  };
  const Two a = value(h), b = value(-h), c = value(2 * h), d = value(-2 * h);
  x = at;
  auto slope = [&](int i) { return (8 * (a[i] - b[i]) - (c[i] - d[i])) / (12 * h); };
  return {slope(0), slope(1)};
}
inline double slope(double& x, const std::function<double()>& f) {
  return slopes(x, [&] { return Two{f(), 0}; })[0];
}
// As a whole; gradients are floats, and sums of groups of them may cancel.
inline void expect_gradient(const Doubles& got, const Doubles& want) {
  ASSERT_EQ(got.size(), want.size());
  double error = 0, norm = 0;
  for (size_t i = 0; i < got.size(); i++) error += std::pow(got[i] - want[i], 2), norm += want[i] * want[i];
  EXPECT_LE(std::sqrt(error), 2e-6 * std::sqrt(norm) + 2e-7);
}

}  // namespace
}  // namespace baton::test
