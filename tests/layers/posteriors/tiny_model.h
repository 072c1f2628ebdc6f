// A tiny network with a posterior and one batch: its steps, its objective, and its gradients against differences of it.
#pragma once
#include "kernels/softmax_xent.h"
#include "tests/layers/posteriors/networks.h"

namespace baton::test {

// Arrays that the optimizer moves.
inline bool learned(const std::string& array) {
  return array == "mean" || array == "log_std" || array == "scale_tril" || array == "value";
}
inline StepState still(uint64_t seed, uint32_t step, float kl_now) {  // steps of size 0
  StepState s = state_of(seed, step);
  s.kl_now = kl_now;
  s.correction1 = s.correction2 = 1;
  return s;
}

// The network with its posterior and one batch.
struct Model {
  explicit Model(Kind kind, int replicas = 1, float log_std = -2, float kl_now = 0.02f)
      : owner(make(kind, replicas, log_std)), posterior(*owner), states(memory, size_t(replicas)) {
    network.prepare(posterior.training_context(batch));
    std::vector<StepState> all;
    for (int r = 0; r < replicas; r++) all.push_back(still(uint64_t(50 + r), uint32_t(3 + r), kl_now / float(r + 1)));
    states.set(all);
    posterior.initialise(states);
    if (log_std < least_log_std) set_log_std(log_std);
    const Activation& x = network.input();
    const std::vector<float> values = random_normal(x.stride * replicas, 0.2f, 1, 8);
    std::vector<float> square;
    for (float v : values) square.push_back(v * v);
    upload(device(), x.signal.value, values);
    if (x.signal.square) upload(device(), x.signal.square, square);
    for (int i = 0; i < replicas * batch; i++) labels.push_back(i * 7 % 5 % 4);
  }
  Device& device() { return memory.device(); }
  int replicas() const { return posterior.replicas(); }

  void forward() {
    posterior.draw(0, states);
    network.forward({states});
  }
  std::vector<float> logits() { return download(device(), network.logits(), size_t(replicas()) * batch * 4); }
  std::vector<float> activation(int layer) {
    const Activation a = network.activations()[layer].activation;
    return download(device(), a.signal.value, a.stride * replicas());
  }
  // A whole step of size 0: its gradients are then gradient().
  void step() {
    posterior.reset_optimizer();
    posterior.take_accumulated_kl();
    forward();
    Buffer label(memory, labels);
    Buffer<float> loss(memory, labels.size()), hit(memory, labels.size());
    softmax_cross_entropy(loss, hit, network.logits_gradient(), network.logits(), label, replicas(), batch, 4,
                          1.f / float(batch), memory.stream());
    network.backward({states});
    posterior.step(states);
  }
  // Adam's first moment after one step is (1 - beta1) times the gradient.
  Doubles gradient(const StateArray& a, int replica, const TensorSpec& t) {
    Doubles g = doubles(a.store->read(device(), a.array + ".adam_m", replica, t));
    for (double& one : g) one /= 1 - double(adam_beta1);
    return g;
  }
  // Mean cross-entropy + kl_now KL of every replica, in a step that finds the gradients of the last step().
  Doubles objective() {
    posterior.take_accumulated_kl();
    forward();
    posterior.step(states);
    const auto accumulated = posterior.take_accumulated_kl();
    const std::vector<float> l = logits();
    Doubles sums;
    for (int r = 0; r < replicas(); r++) {
      double loss = 0, kl = 0;
      for (int b = r * batch; b < (r + 1) * batch; b++) {
        double total = 0;
        for (int c = 0; c < 4; c++) total += std::exp(double(l[b * 4 + c]));
        loss += (std::log(total) - l[b * 4 + labels[b]]) / batch;
      }
      for (double one : accumulated[r]) kl += one;
      sums.push_back(loss + double(states.host()[r].kl_now) * kl);
    }
    return sums;
  }

  std::vector<float> read(const char* array, int tensor, int replica = 0) {
    return posterior.store().read(device(), array, replica, network.layout()[tensor]);
  }
  void write(const char* array, int tensor, const std::vector<float>& values, int replica = 0) {
    posterior.store().write(device(), array, replica, network.layout()[tensor], values);
  }
  void set_log_std(float value) {  // of every weight
    for (int r = 0; r < replicas(); r++)
      for (const TensorSpec& t : network.layout().tensors())
        posterior.store().write(device(), "log_std", r, t, std::vector<float>(t.size, value));
    posterior.settle();
  }
  // Random changes of everything that is learned.
  void scatter(float sd, unsigned seed) {
    for (const StateArray& a : posterior.state()) {
      if (!learned(a.array)) continue;
      for (int r = 0; r < replicas(); r++)
        for (const TensorSpec& t : a.store->layout().tensors()) {
          if (ends_with(t.name, ".mask")) continue;
          std::vector<float> values = a.store->read(device(), a.array, r, t);
          const std::vector<float> by = random_normal(t.size, 0, sd, seed++);
          for (size_t i = 0; i < values.size(); i++) values[i] += by[i];
          a.store->write(device(), a.array, r, t, values);
        }
    }
    posterior.refresh(first_stage);
  }
  void hand_over() {
    posterior.begin_stage(false);
    first_stage = false;
  }
  // The draws of the step, [replicas * groups][stride].
  std::vector<float> draws(int groups) {
    const RowWeights w = product_weights(posterior, network.conv1, posterior.training_context(batch));
    EXPECT_EQ(w.groups, groups);
    return download(device(), w.weights, w.stride * replicas() * groups);
  }

  static constexpr int batch = 4;
  static constexpr float least_log_std = -30;  // that the option init_log_std takes
  bool first_stage = true;
  Memory memory;
  TinyNetwork network;
  std::unique_ptr<Posterior> owner;
  Posterior& posterior;
  Buffer<StepState> states;
  std::vector<int32_t> labels;

 private:
  std::unique_ptr<Posterior> make(Kind& kind, int replicas, float log_std) {
    if (find_option(find_posterior(kind.name).options, "init_log_std"))
      kind.settings["init_log_std"] = std::max(log_std, least_log_std);
    return make_posterior(memory.device(), memory.arena(), network.layout(), kind.name,
                          std::vector<json>(replicas, kind.settings));
  }
};

inline const StateArray& state_array(const Posterior& p, const std::string& name) {
  for (const StateArray& a : p.state())
    if (a.array == name) return a;
  throw InputError("no array " + name);
}

// Every array that is learned, against differences of the objective with the noise held; both replicas at once. ReLU
// and max pooling have kinks: a step across one says nothing, so where a difference does not agree a smaller step is
// taken, until rounding drowns it. A gradient is wrong where the smallest step, with like slopes to both sides,
// disagrees.
inline void check_gradients(Model& m) {
  m.step();
  int used = 0, kinks = 0;
  for (const StateArray& a : m.posterior.state()) {
    if (!learned(a.array)) continue;
    const ParameterStore& store = *a.store;
    for (const TensorSpec& t : store.layout().tensors()) {
      if (a.array == "log_std" && m.posterior.kind().name == std::string("cfg") && t.shape.size() == 4) continue;
      SCOPED_TRACE(a.array + " of " + t.name);
      m.step();
      std::vector<Doubles> gradient;
      double top = 0;
      for (int r = 0; r < 2; r++) {
        gradient.push_back(m.gradient(a, r, t));
        for (double g : gradient[r]) top = std::max(top, std::abs(g));
      }
      if (ends_with(t.name, ".mask")) {
        EXPECT_EQ(top, 0);
        continue;
      }
      const Doubles here = m.objective();
      const size_t every = std::max<size_t>(1, t.size / 20);
      for (size_t i = 0; i < t.size; i += every) {
        float* at[2];
        float before[2];
        for (int r = 0; r < 2; r++) {
          at[r] = store.at(a.array) + store.layout().stride() * r + t.offset + i;
          before[r] = download(m.device(), at[r], 1)[0];
        }
        const auto objective_at = [&](double by) {
          for (int r = 0; r < 2; r++) upload(m.device(), at[r], std::vector<float>{float(before[r] + by)});
          m.posterior.refresh(m.first_stage);
          return m.objective();
        };
        bool agrees[2] = {false, false};
        std::string wrong[2];
        for (double h = 1.0 / 64; h > 1e-4 && !(agrees[0] && agrees[1]); h /= 4) {
          const double rounding = 2e-7 / h;  // of about 2e-7 of the objective
          if (rounding > 0.02 * top && h < 1.0 / 64) break;
          const Doubles up = objective_at(h), down = objective_at(-h);
          for (int r = 0; r < 2; r++) {
            if (agrees[r]) continue;
            const double right = (up[r] - here[r]) / h, left = (here[r] - down[r]) / h, slope = 0.5 * (right + left);
            agrees[r] = std::abs(gradient[r][i] - slope) < 1e-2 * top + 2 * rounding;
            const bool kink = std::abs(right - left) > 2e-2 * top + 2 * rounding;
            wrong[r] = agrees[r] || kink ? "" : std::to_string(gradient[r][i]) + ", expected " + std::to_string(slope);
          }
        }
        objective_at(0);
        for (int r = 0; r < 2; r++)
          EXPECT_EQ(wrong[r], "") << "element " << i << " of replica " << r << "; the largest gradient is " << top;
        used += 2, kinks += !agrees[0] + !agrees[1];
      }
    }
  }
  EXPECT_LT(kinks, 0.05 * used);
}

}  // namespace baton::test
