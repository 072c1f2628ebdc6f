// Multiplicative normalizing flows (mnf; Louizos and Welling 2017; Kochurov et al. 2018, appendix C): w = z mu + sigma
// e. Every weight tensor has multiplicative variables z, one for each filter and input channel of a convolution (or for
// each filter) and one for each input of a dense layer, and a normalizing flow that makes them (kernels/flow.h). The
// bound is joint in w and z:
//   KL = E_z [ K_w(z) + ln q(z) - ln q~(z) ],   K_w(z) = sum ln(s~/s) + (s^2 + z^2 (mu - mu~)^2) / (2 s~^2) - 1/2
// with ln q~(z) through the inverse of the previous flow. One z a step and group of examples; the same z serves the
// data term and the KL. The first stage's prior of z is N(1, 1): z near 1 pins the scale that z and mu share.
#include <algorithm>

#include "kernels/flow.h"
#include "layers/posteriors/gaussian.h"

namespace baton {

namespace {

constexpr int kl_draws = 8, draws_together = 16;

class MnfPosterior : public GaussianPosterior {
 public:
  explicit MnfPosterior(const PosteriorSetup& setup)
      : GaussianPosterior(setup), groups_(settings()["groups"]), path_gradient_(settings()["path_gradient"]) {
    lay_out_flows();
    flows_ = std::make_unique<ParameterStore>(arena_, layout_, replicas());
    for (const char* name : {"value", "prior"}) add_state(name, Role::believed, flows_.get());
    for (const char* name : {"value.adam_m", "value.adam_v"}) add_state(name, Role::optimizer, flows_.get());
    flows_->add("value.grad");
    take_buffers();
    use_runs(runs_);
  }

  std::unique_ptr<Estimator> make_estimator(Linear& layer, const LayerContext& c) override {
    return std::make_unique<LocalReparameterization>(layer, c, weights(),
                                                     RowWeights{draws_, draw_gradients_, size_t(stride()), groups_});
  }

  void initialise_rest(const StepState* states) override {
    fill_zero(device_, flows_->at("value"), flows_->bytes());
    flow_initialise(flows_->at("value"), shape_, layout_.stride(), float(double(settings()["z_log_std"])), states,
                    replicas(), device_.stream());
    copy_on_device(device_, flows_->at("prior"), flows_->at("value"), flows_->bytes());
    float* prior = flows_->at("prior");  // of the first stage: N(1, 1)
    for (const FlowTensor& t : table_) {
      fill(prior + t.base_mean, layout_.stride(), t.size, std::vector<float>(size_t(replicas()), 1.f));
      fill(prior + t.base_log_std, layout_.stride(), t.size, std::vector<float>(size_t(replicas()), 0.f));
    }
  }
  void restored(bool first_stage) override {
    GaussianPosterior::restored(first_stage);
    upload(device_, plain_prior_, std::vector<int32_t>(size_t(replicas()), first_stage ? 1 : 0));
  }
  void clear_gradients() override {
    GaussianPosterior::clear_gradients();
    fill_zero(device_, draw_gradients_, store_.bytes() * size_t(groups_));
  }
  void hand_over(Replicas of) override {
    GaussianPosterior::hand_over(of);
    copy_rows(*flows_, "prior", "value", of);
    upload(device_, plain_prior_ + of.first, std::vector<int32_t>(size_t(of.count), 0));
  }
  std::vector<uint8_t> notes() override {  // which replicas are in their first stage
    const std::vector<int32_t> plain = download(device_, plain_prior_, size_t(replicas()));
    return {plain.begin(), plain.end()};
  }
  void set_notes(const std::vector<uint8_t>& plain) override {
    upload(device_, plain_prior_, std::vector<int32_t>(plain.begin(), plain.end()));
  }

  // z, its densities, and the weights z mu into the draws.
  void draw(int, const StepState* states) override {
    BATON_RANGE("draw");
    const Stream stream = device_.stream();
    const FlowNoise noise{FlowNoise::training, states};
    flow_forward(z_, log_q_, shape_, parameters("value"), z0_, trace_, groups_, stream, &noise);
    multiply_weights(draws_, size_t(stride()), arrays(), pieces_, multipliers(nullptr), stream);
  }

  // The gradients of the flows come before the means move.
  void step(StepState* states) override {
    BATON_RANGE("update");
    backward_through_flows(states);
    gaussian_step(arrays(), scale_rule_, pieces_, states, accumulated_, partial_, device_.stream(),
                  multipliers(draw_gradients_));
    point_step(adam_arrays(*flows_, "value"), states, device_.stream());
    apply_mask();
  }

  // Over 8 draws of z, one replica after the other.
  void add_kl(KlAccumulator sums) override {
    const Stream stream = device_.stream();
    const FlowTrace trace{sample_trace_.memory, kl_draws}, prior_trace{sample_prior_trace_.memory, kl_draws};
    const FlowNoise noise{FlowNoise::prediction, nullptr, key_of(0, 9)};
    for (int r = 0; r < replicas(); r++) {
      const KlAccumulator own{sums.sums + sums.stride * r, sums.stride};
      flow_forward(sample_z_, sample_log_q_, shape_, parameters("value", r), sample_z0_, trace, kl_draws, stream,
                   &noise);
      flow_log_density({{parameters("prior", r), plain_prior_ + r, prior_trace, sample_log_prior_}}, shape_, sample_z_,
                       nullptr, kl_draws, stream, &trace);
      flow_kl(own.sums + first_z_name(), own.stride, sample_log_q_, sample_log_prior_, shape_.tensors, kl_draws, 1,
              stream);
      gaussian_kl(own, arrays(r), pieces_, partial_, stream, {sample_z_, nullptr, size_t(shape_.z_size), 0, kl_draws});
    }
  }

  void sample_weights(float* w, int replica, int first, int count, Key key) override {
    const GaussianArrays a = arrays(replica);
    for (int done = 0; done < count; done += draws_together) {
      const int some = std::min(count - done, draws_together);
      float* to = w + a.stride * done;
      for (int s = 0; s < some; s++) copy_on_device(device_, to + a.stride * s, a.mean, store_.row_bytes());
      multiply_by_z(to, replica, true, first + done, some, key);
      baton::sample_weights(to, to, a.stride, a.variance, a.count, a.stride, first + done, some, key, device_.stream());
    }
  }

  // With z at the flow's image of its base's mean.
  void mean_weights(float* w, int replica) override {
    GaussianPosterior::mean_weights(w, replica);
    multiply_by_z(w, replica, false, 0, 1, Key{});
  }

 private:
  // The flow of every weight tensor: where its parameters lie, and which z its weights have.
  void lay_out_flows() {
    const int steps = settings()["flow_steps"], hidden = settings()["flow_hidden"];
    const json& flow_name = settings()["flow"];
    const FlowKind kind = flow_name == "planar"   ? FlowKind::planar
                          : flow_name == "affine" ? FlowKind::affine
                                                  : FlowKind::gated;
    const bool per_filter = settings()["z"] == "per-filter";
    int z_at = 0, largest = 0;
    for (const TensorSpec& t : store_.layout().tensors()) {
      const int number = int(runs_.size());
      Run run{int(t.offset), int(t.size), number};
      if (!t.bias) {
        const bool dense = t.shape.size() == 2;
        const int size = int(dense ? t.shape[1] : per_filter ? t.shape[0] : t.shape[0] * t.shape[1]);
        run.z_first = z_at;
        run.column = dense;
        run.width = dense ? size : int(t.size) / size;
        const std::string name = t.name.substr(0, t.name.rfind('.')) + ".z";
        kl_names_.push_back(name);
        FlowTensor flow{};
        flow.size = size;
        flow.z_at = z_at;
        flow.stream_id = stream_z + uint32_t(number);
        const auto add = [&](const std::string& what, std::vector<int64_t> shape) {
          return int(layout_[layout_.add(name + "." + what, std::move(shape), 1, false)].offset);
        };
        flow.base_mean = add("base_mean", {size});
        flow.base_log_std = add("base_log_std", {size});
        for (int k = 0; k < steps; k++) {
          const std::string step = "flow" + std::to_string(k) + ".";
          FlowStep& s = flow.steps[k];
          if (kind == FlowKind::planar) {
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
    FlowTensor* table = arena_.take<FlowTensor>(table_.size());
    upload(device_, table, table_);
    shape_ = {kind, steps, hidden, int(table_.size()), table, z_at, largest, settings()["fixed_base"]};
  }

  void take_buffers() {
    const int rows = replicas() * groups_;
    const auto take_z = [&](int n) { return arena_.take<float>(size_t(n) * shape_.z_size); };
    const auto take_trace = [&](int n) { return FlowTrace{arena_.take<float>(flow_trace_floats(shape_, n)), n}; };
    const auto take_density = [&](int n) { return arena_.take<double>(size_t(n) * table_.size()); };
    z0_ = take_z(rows), z_ = take_z(rows), dz_ = take_z(rows);
    log_q_ = take_density(rows);
    trace_ = take_trace(rows);
    plain_prior_ = arena_.take<int32_t>(size_t(replicas()));
    // What ln q~(z) and, with the path gradient, ln q(z) along the path of z alone ask of z.
    const float share = 1.f / float(groups_);
    const auto take = [&](const char* array, const int32_t* identity, float scale) {
      densities_.push_back(
          {parameters(array), identity, take_trace(rows), take_density(rows), nullptr, take_z(rows), scale});
    };
    take("prior", plain_prior_, -share);
    if (path_gradient_) take("value", nullptr, share);
    const std::vector<ZPart> parts = z_parts_of(runs_);
    ZPart* table = arena_.take<ZPart>(parts.size());
    upload(device_, table, parts);
    z_parts_ = {table, int(parts.size())};
    sample_z0_ = take_z(draws_together), sample_z_ = take_z(draws_together);
    sample_log_q_ = take_density(draws_together), sample_log_prior_ = take_density(draws_together);
    sample_trace_ = take_trace(draws_together), sample_prior_trace_ = take_trace(draws_together);
    draws_ = arena_.take<float>(size_t(stride()) * rows);
    draw_gradients_ = arena_.take<float>(size_t(stride()) * rows);
  }

  void backward_through_flows(const StepState* states) {
    const Stream stream = device_.stream();
    multiplier_gradient(dz_, arrays(), z_parts_, multipliers(draw_gradients_), states, stream);
    flow_log_density(densities_, shape_, z_, states, groups_, stream, &trace_);
    flow_kl(accumulated_.sums + first_z_name(), accumulated_.stride, log_q_, densities_[0].log_q, shape_.tensors,
            groups_, replicas(), stream);
    flow_backward(flows_->at("value.grad"), dz_, densities_, shape_, parameters("value"), z0_, trace_, states,
                  1.f / float(groups_), !path_gradient_, groups_, replicas(), stream);
  }

  void multiply_by_z(float* w, int replica, bool noise, int first, int count, Key key) {
    const Stream stream = device_.stream();
    const FlowNoise z_noise{noise ? FlowNoise::prediction : FlowNoise::none, nullptr, key, first};
    flow_forward(sample_z_, nullptr, shape_, parameters("value", replica), sample_z0_, {sample_trace_.memory, count},
                 count, stream, &z_noise);
    multiply_weights(w, size_t(stride()), arrays(replica), pieces_,
                     {sample_z_, nullptr, size_t(shape_.z_size), 0, count}, stream);
  }

  FlowParameters parameters(const char* array, int replica = 0) const {
    return {flows_->at(array) + layout_.stride() * replica, layout_.stride()};
  }
  Multipliers multipliers(const float* gradients) const {
    return {z_, gradients, size_t(shape_.z_size), size_t(stride()), groups_};
  }
  int first_z_name() const { return int(store_.layout().tensors().size()); }

  int groups_;
  bool path_gradient_;
  std::vector<Run> runs_;
  std::vector<FlowTensor> table_;
  ParameterLayout layout_;  // of flows_
  std::unique_ptr<ParameterStore> flows_;
  FlowShape shape_{};
  float *draws_, *draw_gradients_;  // the weights z mu of every row, and their gradients: [replicas * groups][stride]
  float *z0_, *z_, *dz_;
  ZParts z_parts_{};
  double* log_q_;
  int32_t* plain_prior_;  // [replicas], 1 until the first hand-over: the prior of z is its base alone
  FlowTrace trace_{};
  std::vector<FlowDensity> densities_;
  float *sample_z0_, *sample_z_;
  double *sample_log_q_, *sample_log_prior_;
  FlowTrace sample_trace_{}, sample_prior_trace_{};
};

}  // namespace

extern const PosteriorKind mnf_kind{
    "mnf",
    "mnf, multiplicative normalizing flow: w = z mean + sigma e, with z from a flow",
    gaussian_options(
        {whole_option("groups", 1, {1, 256}, "groups of a batch that draw their own weights (cfg) or z (mnf)"),
         choice_option("flow", "realnvp", {"realnvp", "affine", "planar"}, "mnf: the flow of z; realnvp is gated"),
         whole_option("flow_steps", 2, {0, most_flow_steps}, "mnf: steps of the flow"),
         whole_option("flow_hidden", 50, {1, 4096}, "mnf: units of a flow step's hidden layer"),
         choice_option("z", "per-channel", {"per-channel", "per-filter"},
                       "mnf: the z of a convolution, per filter and channel or per filter"),
         flag_option("fixed_base", false, "mnf: do not learn the flow's base"),
         flag_option("path_gradient", false, "mnf: drop the score term of ln q(z), whose mean is 0"),
         number_option("z_log_std", -2.302585093, {-30, 10}, "mnf: initial ln of the base's standard deviation")}),
    make_kind<MnfPosterior>,
    true,
    true,
    false};

}  // namespace baton
