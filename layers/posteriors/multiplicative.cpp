#include "layers/posteriors/multiplicative.h"

#include <algorithm>

namespace baton {

namespace {
constexpr int kl_draws = 8;
}

Multiplicative::Multiplicative(Device& device, Arena& arena, ParameterStore& store, const PosteriorOptions& options)
    : device_(device), store_(store), options_(options) {
  const auto& tensors = store.layout().tensors();
  if (options.flow_steps < 0 || options.flow_steps > most_flow_steps)
    throw InputError("a flow has 0 to " + std::to_string(most_flow_steps) + " steps, not " +
                     std::to_string(options.flow_steps));
  if (options.flow_hidden < 1) throw InputError("a flow needs at least one hidden unit");
  int z_at = 0, largest = 0;
  for (int i = 0; i < int(tensors.size()); i++) {
    const TensorSpec& t = tensors[i];
    Run run{int(t.offset), int(t.size), i};
    if (!t.bias) {
      const bool dense = t.shape.size() == 2;
      const int size = int(dense ? t.shape[1] : options.z_per_filter ? t.shape[0] : t.shape[0] * t.shape[1]);
      run.z_first = z_at;
      run.column = dense;
      run.width = dense ? size : int(t.size) / size;
      const std::string name = t.name.substr(0, t.name.rfind('.')) + ".z";
      names_.push_back(name);
      FlowTensor flow{};
      flow.size = size;
      flow.z_at = z_at;
      flow.stream_id = stream_z + uint32_t(i);
      const auto add = [&](const std::string& what, std::vector<int64_t> shape) {
        return int(layout_[layout_.add(name + "." + what, std::move(shape), 1, false)].offset);
      };
      flow.base_mean = add("base_mean", {size});
      flow.base_log_std = add("base_log_std", {size});
      const int hidden = options.flow_hidden;
      for (int k = 0; k < options.flow_steps; k++) {
        const std::string step = "flow" + std::to_string(k) + ".";
        FlowStep& s = flow.steps[k];
        if (options.flow == FlowKind::planar) {
          s.w0 = add(step + "w", {size});
          s.b0 = add(step + "b", {1});
          s.b1 = add(step + "u", {size});
          continue;
        }
        s.mask = add(step + "mask", {size});
        s.w0 = add(step + "hidden.weight", {hidden, size});
        s.b0 = add(step + "hidden.bias", {hidden});
        s.w1 = add(step + "shift.weight", {size, hidden});
        s.b1 = add(step + "shift.bias", {size});
        s.w2 = add(step + "gate.weight", {size, hidden});
        s.b2 = add(step + "gate.bias", {size});
      }
      table_.push_back(flow);
      z_at += (size + 63) / 64 * 64;
      largest = std::max(largest, size);
    }
    runs_.push_back(run);
  }
  if (int(table_.size()) > most_flow_tensors)
    throw InputError("multiplicative flows for " + std::to_string(table_.size()) + " tensors, at most " +
                     std::to_string(most_flow_tensors));
  flows_ = std::make_unique<ParameterStore>(arena, layout_, store.replicas());
  for (const char* name : {"value", "prior", "value.adam_m", "value.adam_v", "value.grad"}) flows_->add(name);
  FlowTensor* table = arena.take<FlowTensor>(table_.size());
  upload(device, table, table_);
  shape_ = {options.flow, options.flow_steps, options.flow_hidden, int(table_.size()), table, z_at,
            largest,      options.fixed_base};

  const int rows = store.replicas() * options.groups;
  const auto take_z = [&](int n) { return arena.take<float>(size_t(n) * z_at); };
  const auto take_trace = [&](int n) { return FlowTrace{arena.take<float>(flow_trace_floats(shape_, n)), n}; };
  const auto take_density = [&](int n) { return arena.take<double>(size_t(n) * table_.size()); };
  z0_ = take_z(rows), z_ = take_z(rows), dz_ = take_z(rows), prior_z0_ = take_z(rows), own_z0_ = take_z(rows);
  log_q_ = take_density(rows), log_prior_ = take_density(rows), own_log_q_ = take_density(rows);
  trace_ = take_trace(rows), prior_trace_ = take_trace(rows);
  if (options.path_gradient) own_trace_ = take_trace(rows);
  plain_prior_ = arena.take<int32_t>(store.replicas());
  int partials = 0;
  for (const Run& run : runs_)
    if (run.z_first >= 0) partials = std::max(partials, multiplier_partials(run));
  partial_ = arena.take<float>(size_t(std::max(partials, 1)) * rows);
  sample_z0_ = take_z(most_draws), sample_z_ = take_z(most_draws);
  sample_log_q_ = take_density(most_draws), sample_log_prior_ = take_density(most_draws);
  sample_trace_ = take_trace(most_draws), sample_prior_trace_ = take_trace(most_draws);
}

std::vector<StateArray> Multiplicative::state_arrays() {
  std::vector<StateArray> list;
  for (const char* name : {"value", "prior", "value.adam_m", "value.adam_v"}) list.push_back({flows_.get(), name});
  return list;
}

std::vector<std::string> Multiplicative::kl_names() const { return names_; }

FlowParameters Multiplicative::parameters(const char* array, int replica) const {
  return {flows_->at(array) + layout_.stride() * replica, layout_.stride()};
}

GaussianArrays Multiplicative::adam_arrays() const {
  GaussianArrays a{};
  a.mean = flows_->at("value");
  a.grad_mean = flows_->at("value.grad");
  a.mean_m = flows_->at("value.adam_m");
  a.mean_v = flows_->at("value.adam_v");
  a.stride = layout_.stride();
  a.count = int(layout_.stride());
  a.replicas = flows_->replicas();
  return a;
}

void Multiplicative::initialise(const StepState* states) {
  fill_zero(device_, flows_->at("value"), flows_->bytes());
  flow_initialise(flows_->at("value"), shape_, layout_.stride(), options_.z_log_std, states, flows_->replicas(),
                  device_.stream());
  copy_on_device(device_, flows_->at("prior"), flows_->at("value"), flows_->bytes());
  float* values = partial_;  // the prior of the first stage: N(1, 1)
  const auto fill = [&](int at, int size, float value) {
    upload(device_, values, std::vector<float>(flows_->replicas(), value));
    fill_rows(flows_->at("prior") + at, layout_.stride(), size, values, flows_->replicas(), device_.stream());
    device_.synchronize();  // values is used again
  };
  for (const FlowTensor& t : table_) fill(t.base_mean, t.size, 1.f), fill(t.base_log_std, t.size, 0.f);
  reset_optimizer();
  refresh(true);
}

void Multiplicative::reset_optimizer() {
  for (const char* name : {"value.adam_m", "value.adam_v"}) fill_zero(device_, flows_->at(name), flows_->bytes());
}

void Multiplicative::hand_over() {
  copy_on_device(device_, flows_->at("prior"), flows_->at("value"), flows_->bytes());
  refresh(false);
}

void Multiplicative::refresh(bool first_stage) {
  upload(device_, plain_prior_, std::vector<int32_t>(flows_->replicas(), first_stage ? 1 : 0));
}

Multipliers Multiplicative::multipliers(const float* draw_gradients) const {
  return {z_, draw_gradients, size_t(shape_.z_size), store_.layout().stride(), options_.groups};
}

void Multiplicative::draw(float* draws, const GaussianArrays& g, Pieces pieces, const StepState* states) {
  const Stream stream = device_.stream();
  const int groups = options_.groups;
  flow_draw_base(z0_, shape_, parameters("value"), groups, store_.replicas(), states, stream);
  flow_forward(z_, log_q_, shape_, parameters("value"), z0_, trace_, groups, stream);
  multiply_weights(draws, g.stride, g, pieces, multipliers(nullptr), stream);
}

void Multiplicative::backward(const float* draw_gradients, const GaussianArrays& g, const StepState* states,
                              KlAccumulator accumulator, int first_slot) {
  const Stream stream = device_.stream();
  const int groups = options_.groups, replicas = store_.replicas();
  const Multipliers z = multipliers(draw_gradients);
  for (const Run& run : runs_)
    if (run.z_first >= 0) multiplier_gradient(dz_, g, run, z, states, partial_, stream);
  flow_log_density(log_prior_, prior_z0_, shape_, parameters("prior"), z_, plain_prior_, prior_trace_, groups, stream,
                   &trace_);
  flow_kl(accumulator.sums + first_slot, accumulator.stride, log_q_, log_prior_, shape_.tensors, groups, replicas,
          stream);
  const float share = 1.f / float(groups);
  flow_log_density_backward(dz_, shape_, parameters("prior"), prior_z0_, plain_prior_, prior_trace_, states, -share,
                            groups, stream);
  if (options_.path_gradient) {  // ln q along the path of z alone: through the inverse, its parameters held
    flow_log_density(own_log_q_, own_z0_, shape_, parameters("value"), z_, nullptr, own_trace_, groups, stream,
                     &trace_);
    flow_log_density_backward(dz_, shape_, parameters("value"), own_z0_, nullptr, own_trace_, states, share, groups,
                              stream);
  }
  flow_backward(flows_->at("value.grad"), dz_, shape_, parameters("value"), z0_, trace_, states, share,
                !options_.path_gradient, groups, replicas, stream);
}

void Multiplicative::step(const StepState* states) { point_step(adam_arrays(), states, device_.stream()); }

void Multiplicative::sample(float* w, const GaussianArrays& g, Pieces pieces, int replica, bool noise, int first,
                            int count, Key key) {
  const Stream stream = device_.stream();
  flow_draw_base_draws(sample_z0_, shape_, parameters("value", replica), noise, first, count, key, stream);
  flow_forward(sample_z_, nullptr, shape_, parameters("value", replica), sample_z0_, {sample_trace_.memory, count},
               count, stream);
  multiply_weights(w, g.stride, g, pieces, {sample_z_, nullptr, size_t(shape_.z_size), 0, count}, stream);
}

void Multiplicative::kl(KlAccumulator accumulator, const GaussianArrays& g, Pieces pieces, int replica, int first_slot,
                        float* partial) {
  const Stream stream = device_.stream();
  const FlowTrace trace{sample_trace_.memory, kl_draws}, prior_trace{sample_prior_trace_.memory, kl_draws};
  flow_draw_base_draws(sample_z0_, shape_, parameters("value", replica), true, 0, kl_draws, key_of(0, 9), stream);
  flow_forward(sample_z_, sample_log_q_, shape_, parameters("value", replica), sample_z0_, trace, kl_draws, stream);
  flow_log_density(sample_log_prior_, sample_z0_, shape_, parameters("prior", replica), sample_z_,
                   plain_prior_ + replica, prior_trace, kl_draws, stream, &trace);
  flow_kl(accumulator.sums + first_slot, accumulator.stride, sample_log_q_, sample_log_prior_, shape_.tensors, kl_draws,
          1, stream);
  gaussian_kl(accumulator, g, pieces, partial, stream, {sample_z_, nullptr, size_t(shape_.z_size), 0, kl_draws});
}

}  // namespace baton
