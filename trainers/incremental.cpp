#include "trainers/incremental.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <nlohmann/json.hpp>

#include "engine/io/stop.h"

namespace baton {

IncrementalTrainer::IncrementalTrainer(Device& device, Arena& arena, const NetworkFactory& make,
                                       const DeviceImages& train, const TrainingPlan& plan,
                                       const std::vector<std::vector<int32_t>>& order,
                                       const std::vector<int>& part_sizes)
    : device_(device),
      plan_(plan),
      train_(train),
      part_sizes_(part_sizes),
      network_(make()),
      posterior_(device, arena, network_->layout(), plan.posterior, int(plan.seeds.size())) {
  const int replicas = int(plan.seeds.size());
  if (replicas < 1 || plan.settings.size() != plan.seeds.size() || order.size() != plan.seeds.size())
    throw InputError("a training plan needs as many settings and orders as seeds, and at least one");
  if (plan.batch < 1) throw InputError("the batch must be at least 1, not " + std::to_string(plan.batch));
  if (!(plan.epochs > 0)) throw InputError("the number of epochs must be positive");
  if (part_sizes.empty()) throw InputError("there must be at least one part");
  int offset = 0;
  for (int size : part_sizes) {
    if (size < 1) throw InputError("a part of the training set is empty");
    part_offsets_.push_back(offset);
    offset += size;
  }
  order_stride_ = size_t(offset);
  if (plan.batch % plan.posterior.groups != 0)
    throw InputError("a batch of " + std::to_string(plan.batch) + " does not divide into " +
                     std::to_string(plan.posterior.groups) + " groups");
  network_->prepare(posterior_.context(plan.batch), false);
  states_ = arena.take<StepState>(replicas);
  totals_ = arena.take<Totals>(replicas);
  order_ = arena.take<int32_t>(order_stride_ * replicas);
  labels_ = arena.take<int32_t>(size_t(plan.batch) * replicas);
  loss_ = arena.take<float>(size_t(plan.batch) * replicas);
  hit_ = arena.take<float>(size_t(plan.batch) * replicas);
  std::vector<int32_t> all;
  for (const auto& o : order) {
    if (o.size() != order_stride_) throw InputError("an order's length is not the sum of its parts'");
    for (int32_t i : o)
      if (i < 0 || i >= train.count)
        throw InputError("an order names image " + std::to_string(i) + " of " + std::to_string(train.count));
    all.insert(all.end(), o.begin(), o.end());
  }
  upload(device, order_, all);
  states_host_.resize(replicas);
  std::vector<float> log_std, prior_sd;
  for (int r = 0; r < replicas; r++) {
    StepState& s = states_host_[r];
    s = {};
    s.noise = key_of(plan.seeds[r], 1);
    s.shuffle = key_of(plan.seeds[r], 2);
    log_std.push_back(float(plan.settings[r].init_log_std));
    prior_sd.push_back(float(plan.settings[r].prior_sd));
  }
  upload_states();
  posterior_.initialise(states_, log_std, prior_sd);
  adopt_pretrained();
}

void adopt(Posterior& posterior, const Network& network, int replica, const Pretrained& pretrained, double sd) {
  const auto& tensors = network.layout().tensors();
  for (const auto& [name, weights] : pretrained.weights) {
    const auto tensor = std::find_if(tensors.begin(), tensors.end(), [&](const auto& t) { return t.name == name; });
    if (tensor == tensors.end())
      throw InputError("the pretrained network has a tensor " + name + ", which " + network.architecture() +
                       " has not");
    const auto laplace = pretrained.prior_log_std.find(name);
    const std::vector<float> one{float(std::log(sd))};
    posterior.adopt(replica, *tensor, weights, laplace == pretrained.prior_log_std.end() ? one : laplace->second);
  }
}

void IncrementalTrainer::adopt_pretrained() {
  if (std::none_of(plan_.settings.begin(), plan_.settings.end(), [](const auto& s) { return bool(s.pretrained); }))
    return;
  for (int r = 0; r < posterior_.replicas(); r++)
    if (const TrainingSettings& s = plan_.settings[r]; s.pretrained)
      adopt(posterior_, *network_, r, *s.pretrained, s.pretrained_sd);
  posterior_.settle();
}

int IncrementalTrainer::steps_of(int stage) const {
  return std::max(1, int(std::ceil(plan_.epochs * part_sizes_[stage] / plan_.batch - 1e-9)));
}
int IncrementalTrainer::steps_an_epoch(int stage) const {
  return std::max(1, int(std::lround(double(part_sizes_[stage]) / plan_.batch)));
}

void IncrementalTrainer::upload_states() { upload(device_, states_, states_host_); }

void IncrementalTrainer::begin_stage(int stage) {
  if (plan_.stages_before + stage > 0) posterior_.hand_over();
  stage_ = stage;
  stage_step_ = 0;
  states_host_ = download(device_, states_, states_host_.size());
  for (size_t r = 0; r < states_host_.size(); r++) {
    const TrainingSettings& from = plan_.settings[r];
    StepState& s = states_host_[r];
    s.stage = plan_.stages_before + stage;
    s.stage_step = 0;
    s.stage_steps = steps_of(stage);
    s.part_offset = part_offsets_[stage];
    s.part_size = part_sizes_[stage];
    s.schedule = from.schedule;
    s.base_lr_mean = float(from.lr);
    s.base_lr_scale = float(from.lr_scale);
    s.kl_weight = float(from.beta / part_sizes_[stage]);
    s.warmup_steps = int(from.warmup_epochs * steps_an_epoch(stage));
  }
  upload_states();
}

// One step, every shape fixed and every changing number in device memory: what the graph captures.
void IncrementalTrainer::step() {
  const int replicas = posterior_.replicas(), batch = plan_.batch;
  const Stream stream = device_.stream();
  advance_step(states_, replicas, stream);
  const Signal& x = network_->input().signal;
  gather_training_batch(x.value, x.square, labels_, train_, order_, order_stride_, states_, replicas, batch, stream,
                        plan_.augment);
  posterior_.draw(states_);
  network_->forward(device_, posterior_.weights(), states_);
  softmax_cross_entropy(loss_, hit_, network_->logits_gradient(), network_->logits(), labels_, replicas, batch,
                        network_->classes(), 1.f / float(batch), stream);
  add_to_totals(totals_, loss_, hit_, states_, replicas, batch, stream);
  network_->backward(device_, posterior_.weights(), posterior_.gradients(), states_);
  posterior_.step(plan_.scale_rule, states_);
}

void IncrementalTrainer::resume_from(const TensorFile& file, uint32_t step) {
  if (stage_ >= 0) throw InputError("resume_from() comes before the first begin_stage()");
  if (posterior_.replicas() != 1) throw InputError("resume_from() is for one replica");
  posterior_.load(file, plan_.stages_before == 0);
  states_host_[0].step = step;
  upload_states();
}

uint32_t IncrementalTrainer::steps_in_all() { return download(device_, states_, 1)[0].step; }

std::vector<EpochTotals> IncrementalTrainer::run(int count) {
  if (advance(count) < count) throw_stopped("nothing of this training is kept");
  return take_totals();
}

int IncrementalTrainer::advance(int count) {
  if (stage_ < 0) throw InputError("begin_stage() comes before run()");
  int done = 0;
  if (!graph_.captured() && count > 0) {  // the first step runs as it is, so that libraries load what they load lazily
    step();
    done = 1;
    graph_.capture(device_, [this] { step(); });
  }
  for (; done < count && !stop_requested(); done++) {
    BATON_RANGE("step");
    graph_.replay(device_);
  }
  stage_step_ += done;
  return done;
}

std::vector<EpochTotals> IncrementalTrainer::take_totals() {
  std::vector<EpochTotals> result;
  const auto booked = posterior_.take_booked_kl();
  for (const Totals& t : download(device_, totals_, states_host_.size())) {
    const size_t r = result.size();
    if (t.nonfinite_step)
      throw RunError("the loss is not finite: " + where_not_finite(int(r)) + ", stage " +
                     std::to_string(plan_.stages_before + stage_ + 1) + ", step " + std::to_string(t.nonfinite_step) +
                     " of the run (seed " + std::to_string(plan_.seeds[r]) + ")");
    EpochTotals e;
    e.examples = t.examples;
    e.steps = t.steps;
    e.loss = t.examples ? t.loss / double(t.examples) : 0;
    e.accuracy = t.examples ? t.hits / double(t.examples) : 0;
    for (double sum : booked[r]) {
      e.kl_by_name.push_back(t.steps ? sum / double(t.steps) : 0);
      e.kl += e.kl_by_name.back();
    }
    if (!std::isfinite(e.kl))
      throw RunError("the KL is not finite: " + where_not_finite(int(r)) + ", stage " +
                     std::to_string(plan_.stages_before + stage_ + 1) + ", by step " +
                     std::to_string(download(device_, states_, states_host_.size())[r].step) + " of the run (seed " +
                     std::to_string(plan_.seeds[r]) + ")");
    result.push_back(e);
  }
  fill_zero(device_, totals_, sizeof(Totals) * states_host_.size());
  return result;
}

// The halted replica still has the weights of the step whose loss was not finite, and every replay since has repeated
// its forward pass.
std::string IncrementalTrainer::where_not_finite(int replica) {
  const auto broken = [](const std::vector<float>& values) {
    return !std::all_of(values.begin(), values.end(), [](float x) { return std::isfinite(x); });
  };
  const auto layer_of = [](const std::string& tensor) { return tensor.substr(0, tensor.rfind('.')); };
  for (const StateArray& a : posterior_.state_arrays())
    for (const TensorSpec& t : a.store->layout().tensors())
      if (a.array.find("adam") == std::string::npos && broken(a.store->read(device_, a.array, replica, t)))
        return "layer " + layer_of(t.name) + " (its " + t.name + "." + a.array + ")";
  for (const NamedActivation& a : network_->activations())
    if (broken(download(device_, a.activation.signal.value + a.activation.stride * replica, a.activation.stride)))
      return "layer " + a.layer + " (its output)";
  return "the cross-entropy of finite logits";
}

namespace {
constexpr const char* training_format = "baton-training-2";  // 1 had no totals of an epoch under way

std::string tensor_name(const std::string& tensor, const std::string& array, int replica, int replicas) {
  const std::string name = tensor + "." + array;
  return replicas == 1 ? name : "replica" + std::to_string(replica) + "/" + name;
}
std::string identity_of(const TrainingPlan& plan, const char* architecture, const std::vector<int>& part_sizes) {
  nlohmann::ordered_json j;
  j["architecture"] = architecture;
  const PosteriorOptions& o = plan.posterior;
  j["family"] = name_of(o.family);
  if (o.family == Family::channel) j["draws"] = {o.groups, o.moments};
  if (o.family == Family::multiplicative)
    j["draws"] = {o.groups,       int(o.flow),  o.flow_steps,    o.flow_hidden,
                  o.z_per_filter, o.fixed_base, o.path_gradient, o.z_log_std};
  j["augment"] = plan.augment;
  j["scale_rule"] = plan.scale_rule == ScaleRule::adam ? "adam" : "natural";
  j["batch"] = plan.batch;
  j["epochs"] = plan.epochs;
  j["seeds"] = plan.seeds;
  if (plan.posterior.masked) j["masked"] = true;
  if (!plan.goes_on_from.empty()) j["goes_on_from"] = {plan.stages_before, plan.goes_on_from};
  j["part_sizes"] = part_sizes;
  for (const TrainingSettings& s : plan.settings)
    j["settings"].push_back({s.lr, s.lr_scale, s.prior_sd, s.init_log_std, s.beta, s.warmup_epochs, int(s.schedule),
                             s.pretrained ? s.pretrained->description : "", s.pretrained_sd});
  return j.dump();
}
}  // namespace

void IncrementalTrainer::save(const std::filesystem::path& path, const std::string& extra) {
  TensorFile file;
  const int replicas = posterior_.replicas();
  for (int r = 0; r < replicas; r++)
    for (const StateArray& a : posterior_.state_arrays())
      for (const TensorSpec& t : a.store->layout().tensors()) {
        const std::vector<float> values = a.store->read(device_, a.array, r, t);
        file.tensors[tensor_name(t.name, a.array, r, replicas)] =
            Tensor::of<float>(std::span<const float>(values), t.shape);
      }
  states_host_ = download(device_, states_, states_host_.size());
  const auto* raw = reinterpret_cast<const uint8_t*>(states_host_.data());
  const size_t bytes = states_host_.size() * sizeof(StepState);
  file.tensors["step_state"] = Tensor::of<uint8_t>(std::span<const uint8_t>(raw, bytes), {int64_t(bytes)});
  const std::vector<Totals> totals = download(device_, totals_, states_host_.size());
  const auto* sums = reinterpret_cast<const uint8_t*>(totals.data());
  file.tensors["totals"] =
      Tensor::of<uint8_t>(std::span(sums, totals.size() * sizeof(Totals)), {int64_t(totals.size() * sizeof(Totals))});
  const std::vector<double> booked = posterior_.booked_sums();
  file.tensors["booked_kl"] = Tensor::of<double>(std::span<const double>(booked), {int64_t(booked.size())});
  file.metadata["format"] = training_format;
  file.metadata["architecture"] = network_->architecture();
  file.metadata["family"] = name_of(plan_.posterior.family);
  const int before = plan_.stages_before + stage_;
  file.metadata["prior"] = before == 0 ? "the first prior" : "posterior of stage " + std::to_string(before);
  file.metadata["stage"] = std::to_string(stage_);
  file.metadata["stage_step"] = std::to_string(stage_step_);
  file.metadata["step"] = std::to_string(states_host_[0].step);
  file.metadata["plan"] = identity_of(plan_, network_->architecture(), part_sizes_);
  file.metadata["extra"] = extra;
  save_safetensors(path, file);
}

std::string IncrementalTrainer::restore(const std::filesystem::path& path) {
  const TensorFile file = load_safetensors(path);
  const auto meta = [&](const std::string& key) {
    const auto found = file.metadata.find(key);
    if (found == file.metadata.end()) throw InputError(path.string() + ": no \"" + key + "\" in the metadata");
    return found->second;
  };
  if (meta("format") != training_format)
    throw InputError(path.string() + ": its format is '" + meta("format") + "'; this version reads '" +
                     training_format + "'");
  if (meta("plan") != identity_of(plan_, network_->architecture(), part_sizes_))
    throw InputError(path.string() + ": a checkpoint of another run (its plan is " + meta("plan") + ")");
  // Everything is read and checked before anything is written, so a damaged file leaves the trainer as it was.
  const auto whole_number = [&](const std::string& key, int most) {
    const std::string text = meta(key);
    int value = -1;
    const auto end = std::from_chars(text.data(), text.data() + text.size(), value);
    if (end.ec != std::errc() || end.ptr != text.data() + text.size() || value < 0 || value > most)
      throw InputError(path.string() + ": \"" + key + "\" is '" + text + "', expected 0 to " + std::to_string(most));
    return value;
  };
  const int stage = whole_number("stage", stages() - 1), stage_step = whole_number("stage_step", steps_of(stage));
  std::vector<std::vector<float>> values;
  const int replicas = posterior_.replicas();
  for (int r = 0; r < replicas; r++)
    for (const StateArray& a : posterior_.state_arrays())
      for (const TensorSpec& t : a.store->layout().tensors())
        values.push_back(file.at(tensor_name(t.name, a.array, r, replicas), t.shape).as<float>());
  const Tensor& raw = file.at("step_state", {int64_t(states_host_.size() * sizeof(StepState))});
  const std::vector<uint8_t> state_bytes = raw.as<uint8_t>();
  const std::vector<uint8_t> total_bytes =
      file.at("totals", {int64_t(states_host_.size() * sizeof(Totals))}).as<uint8_t>();
  const std::vector<double> booked = file.at("booked_kl", {int64_t(posterior_.booked_sums().size())}).as<double>();
  const std::string extra = meta("extra");

  size_t next = 0;
  for (int r = 0; r < replicas; r++)
    for (const StateArray& a : posterior_.state_arrays())
      for (const TensorSpec& t : a.store->layout().tensors()) a.store->write(device_, a.array, r, t, values[next++]);
  posterior_.restored(plan_.stages_before + stage == 0);
  posterior_.book(booked);
  std::memcpy(states_host_.data(), state_bytes.data(), state_bytes.size());
  upload_states();
  copy_to_device(device_, totals_, total_bytes.data(), total_bytes.size());
  stage_ = stage;
  stage_step_ = stage_step;
  return extra;
}

}  // namespace baton
