#include "trainers/tasks.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <numeric>

#include "engine/io/stop.h"

namespace baton {

std::vector<std::vector<int32_t>> permuted_pixels(int tasks, int pixels, uint64_t seed) {
  if (tasks < 1 || pixels < 1) throw InputError("permuted tasks: at least one task and one pixel");
  std::vector<std::vector<int32_t>> orders(tasks, std::vector<int32_t>(pixels));
  for (int t = 0; t < tasks; t++) {
    std::iota(orders[t].begin(), orders[t].end(), 0);
    if (t == 0) continue;
    SplitMix64 random(seed, uint64_t(t));
    for (int i = pixels - 1; i > 0; i--) std::swap(orders[t][i], orders[t][random.below(uint64_t(i) + 1)]);
  }
  return orders;
}

// Task t takes over from t - 1 between floor(t L - L / beta) and floor(t L + L / beta), L = steps / tasks.
std::vector<std::vector<double>> continuous_schedule(int tasks, int steps, double beta) {
  if (tasks < 1 || steps < tasks) throw InputError("a continuous schedule needs a task, and a step for each");
  if (!(beta >= 2)) throw InputError("beta of the continuous schedule is at least 2: only neighbours overlap");
  const double length = double(steps) / tasks;
  const auto taken_over = [&](int t, int i) {  // how far task t has come, in [0, 1]
    if (t <= 0) return 1.;
    if (t >= tasks) return 0.;
    const double from = std::floor(t * length - length / beta), to = std::floor(t * length + length / beta);
    return std::clamp((i - from) / std::max(to - from, 1.), 0., 1.);
  };
  std::vector<std::vector<double>> rows(steps, std::vector<double>(tasks));
  for (int i = 0; i < steps; i++) {
    double sum = 0;
    for (int t = 0; t < tasks; t++) sum += rows[i][t] = std::min(taken_over(t, i), 1 - taken_over(t + 1, i));
    for (double& p : rows[i]) p /= sum;
  }
  return rows;
}

TaskTrainer::TaskTrainer(Device& device, Arena& arena, const NetworkFactory& make, const DeviceImages& train,
                         const TaskSequence& sequence, const TaskPlan& plan, const LearnerFactory& make_learner)
    : device_(device),
      plan_(plan),
      sequence_(sequence),
      train_(train),
      network_(make()),
      learner_(make_learner(device, arena, network_->layout())) {
  const auto text = [](auto x) { return std::to_string(x); };
  if (plan.batch < 1) throw InputError("the batch must be at least 1, not " + text(plan.batch));
  if (!(plan.epochs > 0)) throw InputError("the number of epochs must be positive");
  if (sequence.examples.empty()) throw InputError("there must be at least one task");
  const size_t stages = sequence.examples.size(), pixels = size_t(train.channels) * train.plane;
  if (sequence.heads.empty()) sequence_.heads.assign(stages, 0);
  if (sequence.augment.empty()) sequence_.augment.assign(stages, false);
  if (sequence_.heads.size() != stages || sequence_.augment.size() != stages)
    throw InputError("a task sequence needs a head and an augmentation for each of its " + text(stages) + " tasks");
  if (!sequence.probabilities.empty() && (stages != 1 || sequence.pixel_order.empty()))
    throw InputError("continuous tasks are orders of the pixels of one set of examples");
  if (!sequence.pixel_order.empty() &&
      std::find(sequence_.augment.begin(), sequence_.augment.end(), true) != sequence_.augment.end())
    throw InputError("images whose pixels are in another order cannot be augmented");
  if (sequence.probabilities.empty() && !sequence.pixel_order.empty() && sequence.pixel_order.size() != stages)
    throw InputError("a task sequence has " + text(stages) + " tasks and " + text(sequence.pixel_order.size()) +
                     " orders of the pixels");
  std::vector<int32_t> all, orders;
  for (const auto& part : sequence.examples) {
    if (part.empty()) throw InputError("a task has no examples");
    offsets_.push_back(int(all.size()));
    for (int32_t i : part)
      if (i < 0 || i >= train.count) throw InputError("a task names image " + text(i) + " of " + text(train.count));
    all.insert(all.end(), part.begin(), part.end());
  }
  for (const auto& order : sequence.pixel_order) {
    std::vector<bool> seen(pixels);
    for (int32_t i : order)
      if (i >= 0 && size_t(i) < pixels) seen[i] = true;
    if (order.size() != pixels || std::count(seen.begin(), seen.end(), true) != int64_t(pixels))
      throw InputError("an order of the pixels is no permutation of " + text(pixels));
    orders.insert(orders.end(), order.begin(), order.end());
  }
  for (int head : sequence_.heads)
    if (head < 0 || head >= network_->heads())
      throw InputError("a task names head " + text(head) + " of " + text(network_->heads()));

  const int replicas = learner_->draws_at_once();
  network_->prepare(learner_->context(plan.batch), true);
  states_ = arena.take<StepState>(replicas);
  totals_ = arena.take<Totals>(replicas);
  order_ = arena.take<int32_t>(all.size());
  upload(device, order_, all);
  labels_ = arena.take<int32_t>(plan.batch);
  loss_ = arena.take<float>(size_t(plan.batch) * replicas);
  hit_ = arena.take<float>(size_t(plan.batch) * replicas);
  if (!orders.empty()) {
    pixel_orders_ = arena.take<int32_t>(orders.size());
    upload(device, pixel_orders_, orders);
    inputs_ = {pixel_orders_, int(sequence.pixel_order.size())};
  }
  if (!sequence.probabilities.empty()) {
    std::vector<float> cumulative;
    for (const auto& row : sequence.probabilities) {
      if (row.size() != sequence.pixel_order.size())
        throw InputError("a step of the schedule has " + text(row.size()) + " probabilities for " +
                         text(sequence.pixel_order.size()) + " tasks");
      double sum = 0;
      for (double p : row) cumulative.push_back(float(sum += p));
    }
    cumulative_ = arena.take<float>(cumulative.size());
    upload(device, cumulative_, cumulative);
    inputs_.cumulative = cumulative_;
    inputs_.steps = int(sequence.probabilities.size());
  }
  state_.noise = key_of(plan.seed, 1);
  state_.shuffle = key_of(plan.seed, 2);
  upload_states();
  learner_->initialise(states_);
}

const int32_t* TaskTrainer::pixel_order(int task) const {
  return pixel_orders_ ? pixel_orders_ + size_t(task) * train_.channels * train_.plane : nullptr;
}

int TaskTrainer::steps_of(int stage) const {
  if (!sequence_.probabilities.empty()) return int(sequence_.probabilities.size());
  return std::max(1, int(std::ceil(plan_.epochs * double(sequence_.examples[stage].size()) / plan_.batch - 1e-9)));
}

int TaskTrainer::steps_an_epoch(int stage) const {
  return std::max(1, int(std::lround(double(sequence_.examples[stage].size()) / plan_.batch)));
}

// All replicas are draws of one network: their states are alike.
void TaskTrainer::upload_states() {
  upload(device_, states_, std::vector<StepState>(learner_->draws_at_once(), state_));
}

void TaskTrainer::begin_stage(int stage) {
  if (stage < 0 || stage >= stages()) throw InputError("no task " + std::to_string(stage + 1));
  stage_ = stage;
  stage_step_ = 0;
  state_ = download(device_, states_, 1)[0];
  StepState& s = state_;
  s.steps_before = restarted_ ? 0 : s.steps_before + s.stage_step;
  restarted_ = false;
  s.stage = stage;
  s.stage_step = 0;
  s.stage_steps = steps_of(stage);
  s.part_offset = offsets_[stage];
  s.part_size = int(sequence_.examples[stage].size());
  s.schedule = plan_.schedule;
  s.base_lr_mean = s.base_lr_scale = float(plan_.lr);
  s.decay = float(plan_.decay);
  s.decay_steps = std::max(1, int(std::lround(plan_.decay_epochs * steps_an_epoch(stage))));
  s.kl_weight = float(plan_.kl_weight);
  s.warmup_steps = 0;
  upload_states();
  network_->use_head(sequence_.heads[stage]);
  learner_->head_changed();
  graph_.emplace();  // the head, its buffers and the augmentation are recorded in it
}

void TaskTrainer::restart_optimizer() {
  learner_->restart_optimizer();
  restarted_ = true;
}

// One step, every shape fixed and every changing number in device memory: what the graph captures.
void TaskTrainer::one_step() {
  const int replicas = learner_->draws_at_once(), batch = plan_.batch;
  const Stream stream = device_.stream();
  advance_step(states_, replicas, stream);
  gather_training_batch(network_->input().signal.value, nullptr, labels_, train_, order_, 0, states_, 1, batch, stream,
                        sequence_.augment[stage_], pixel_orders_ ? &inputs_ : nullptr);
  for (int first = 0; first < learner_->draws(); first += replicas) {
    learner_->draw(first, states_);
    WeightsView w = learner_->weights();
    w.first_draw = first;
    network_->forward(device_, w, states_);
    softmax_cross_entropy(loss_, hit_, network_->logits_gradient(), network_->logits(), labels_, replicas, batch,
                          network_->classes(), learner_->loss_scale(batch), stream, true);
    add_to_totals(totals_, loss_, hit_, states_, replicas, batch, stream);
    network_->backward(device_, w, learner_->gradients(first), states_);
  }
  learner_->step(states_);
}

EpochTotals TaskTrainer::run(int count) {
  if (advance(count) < count) throw_stopped("nothing of this training is kept");
  return take_totals();
}

int TaskTrainer::advance(int count) {
  if (stage_ < 0) throw InputError("begin_stage() comes before run()");
  int done = 0;
  if (!graph_->captured() && count > 0) {  // the first step runs as it is, so that libraries load what they load lazily
    one_step();
    done = 1;
    if (count > 1) graph_->capture(device_, [this] { one_step(); });
  }
  for (; done < count && !stop_requested(); done++) {
    BATON_RANGE("step");
    graph_->replay(device_);
  }
  stage_step_ += done;
  steps_done_ += done;
  return done;
}

EpochTotals TaskTrainer::take_totals() {
  EpochTotals e;
  const auto where = [&] {
    return "task " + std::to_string(stage_ + 1) + " (seed " + std::to_string(plan_.seed) + ")";
  };
  const std::string failure = learner_->failure(plan_.batch);
  if (!failure.empty()) throw RunError(where() + ": " + failure);
  for (const Totals& t : download(device_, totals_, learner_->draws_at_once())) {
    if (t.nonfinite_step) {
      const std::string warning = learner_->warning(plan_.batch);
      throw RunError(where() + ": the loss is not finite at step " + std::to_string(t.nonfinite_step) + " of the run" +
                     (warning.empty() ? "" : "; " + warning));
    }
    e.loss += t.loss;
    e.accuracy += t.hits;
    e.examples += t.examples;
    e.steps += t.steps;
  }
  if (e.examples) e.loss /= double(e.examples), e.accuracy /= double(e.examples);
  e.steps /= learner_->draws();  // the device counts every draw's
  e.examples = e.steps * plan_.batch;
  fill_zero(device_, totals_, sizeof(Totals) * learner_->draws_at_once());
  return e;
}

namespace {
constexpr const char* tasks_format = "baton-tasks-2";  // 1 had no totals of an epoch under way
}

void TaskTrainer::save(const std::filesystem::path& path, const std::string& identity, const std::string& extra) {
  TensorFile file;
  for (const std::string& array : learner_->state_arrays())
    for (const TensorSpec& t : learner_->store().layout().tensors())
      file.tensors[t.name + "." + array] = Tensor::of<float>(learner_->store().read(device_, array, 0, t), t.shape);
  state_ = download(device_, states_, 1)[0];
  const auto* raw = reinterpret_cast<const uint8_t*>(&state_);
  file.tensors["step_state"] = Tensor::of<uint8_t>(std::span<const uint8_t>(raw, sizeof state_), {sizeof state_});
  const std::vector<Totals> totals = download(device_, totals_, learner_->draws_at_once());
  const int64_t total_bytes = int64_t(totals.size() * sizeof(Totals));
  file.tensors["totals"] = Tensor::of<uint8_t>(
      std::span(reinterpret_cast<const uint8_t*>(totals.data()), size_t(total_bytes)), {total_bytes});
  const std::vector<uint8_t> noted = learner_->noted();
  if (!noted.empty()) file.tensors["noted"] = Tensor::of<uint8_t>(noted, {int64_t(noted.size())});
  file.metadata["format"] = tasks_format;
  file.metadata["architecture"] = network_->architecture();
  file.metadata["method"] = learner_->method();
  file.metadata["stage"] = std::to_string(stage_);
  file.metadata["stage_step"] = std::to_string(stage_step_);
  file.metadata["step"] = std::to_string(steps_done_);
  file.metadata["plan"] = identity;
  file.metadata["extra"] = extra;
  save_safetensors(path, file);
}

std::string TaskTrainer::restore(const std::filesystem::path& path, const std::string& identity) {
  const TensorFile file = load_safetensors(path);
  const auto meta = [&](const std::string& key) {
    const auto found = file.metadata.find(key);
    if (found == file.metadata.end()) throw InputError(path.string() + ": no \"" + key + "\" in the metadata");
    return found->second;
  };
  if (meta("format") != tasks_format)
    throw InputError(path.string() + ": its format is '" + meta("format") + "'; this version reads '" + tasks_format +
                     "'");
  if (meta("plan") != identity) throw InputError(path.string() + ": a checkpoint of another run");
  const auto whole_number = [&](const std::string& key, int64_t most) {
    const std::string text = meta(key);
    int64_t value = -1;
    const auto end = std::from_chars(text.data(), text.data() + text.size(), value);
    if (end.ec != std::errc() || end.ptr != text.data() + text.size() || value < 0 || value > most)
      throw InputError(path.string() + ": \"" + key + "\" is '" + text + "', expected 0 to " + std::to_string(most));
    return value;
  };
  // Everything is read and checked before anything is written, so a damaged file leaves the trainer as it was.
  const int stage = int(whole_number("stage", stages() - 1)),
            stage_step = int(whole_number("stage_step", steps_of(stage)));
  const int64_t step = whole_number("step", INT32_MAX);
  std::vector<std::vector<float>> values;
  for (const std::string& array : learner_->state_arrays())
    for (const TensorSpec& t : learner_->store().layout().tensors())
      values.push_back(file.at(t.name + "." + array, t.shape).as<float>());
  const std::vector<uint8_t> raw = file.at("step_state", {sizeof state_}).as<uint8_t>();
  const std::vector<uint8_t> total_bytes = file.at("totals").as<uint8_t>();
  if (total_bytes.empty() || total_bytes.size() % sizeof(Totals) != 0)
    throw InputError(path.string() + ": tensor 'totals' has " + std::to_string(total_bytes.size()) + " bytes");
  std::vector<uint8_t> noted = learner_->noted();
  if (!noted.empty()) noted = file.at("noted", {int64_t(noted.size())}).as<uint8_t>();
  const std::string extra = meta("extra");

  size_t next = 0;
  for (const std::string& array : learner_->state_arrays())
    for (const TensorSpec& t : learner_->store().layout().tensors())
      learner_->store().write(device_, array, 0, t, values[next++]);
  if (!noted.empty()) learner_->note(noted);
  std::memcpy(&state_, raw.data(), sizeof state_);
  const StepState kept = state_;
  upload_states();
  begin_stage(stage);  // the head and the graph
  state_ = kept;
  upload_states();
  std::vector<Totals> totals(total_bytes.size() / sizeof(Totals));
  std::memcpy(totals.data(), total_bytes.data(), total_bytes.size());
  if (int(totals.size()) != learner_->draws_at_once()) {  // it ran with another number of draws at once
    for (size_t r = 1; r < totals.size(); r++) {
      totals[0].loss += totals[r].loss;
      totals[0].hits += totals[r].hits;
      totals[0].examples += totals[r].examples;
      totals[0].steps += totals[r].steps;
    }
    totals.resize(1);
    totals.resize(learner_->draws_at_once(), Totals{});
  }
  upload(device_, totals_, totals);
  stage_step_ = stage_step;
  steps_done_ = step;
  return extra;
}

}  // namespace baton
