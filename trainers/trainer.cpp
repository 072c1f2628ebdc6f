#include "trainers/trainer.h"

#include <algorithm>
#include <cmath>

#include "engine/io/stop.h"

namespace baton {

namespace {

std::string text(auto x) { return std::to_string(x); }

Schedule parse_schedule(const std::string& name) {
  return name == "linear"   ? Schedule::linear
         : name == "cosine" ? Schedule::cosine
         : name == "steps"  ? Schedule::steps
                            : Schedule::constant;
}

std::vector<json> list_settings(const TrainingSettings& s) {
  std::vector<json> all;
  for (const Replica& r : s.replicas) all.push_back(r.settings);
  return all;
}

}  // namespace

int count_steps(double epochs, int examples, int batch) {
  return std::max(1, int(std::ceil(epochs * examples / batch - 1e-9)));
}

json sum_by_layer(const std::vector<std::string>& names, const std::vector<double>& values) {
  json layers = json::object();
  for (size_t i = 0; i < names.size(); i++) {
    const std::string layer = names[i].substr(0, names[i].rfind('.'));
    layers[layer] = layers.value(layer, 0.0) + values[i];
  }
  return layers;
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

Trainer::Trainer(Device& device, Arena& arena, const NetworkFactory& make, const DeviceImages& train,
                 const std::vector<Stages>& groups, const TrainingSettings& settings)
    : device_(device),
      settings_(settings),
      train_(train),
      network_(make()),
      posterior_(
          make_posterior(device, arena, network_->layout(), settings.kind, list_settings(settings), settings.masked)) {
  const int replicas = posterior_->replicas();
  int in_groups = 0;
  for (const Stages& given : groups) {
    Group& g = groups_.emplace_back(Group{given, {in_groups, int(given.order.size())}});
    Stages& s = g.stages;
    if (s.heads.empty()) s.heads.assign(s.sizes.size(), 0);
    if (s.augment.empty()) s.augment.assign(s.sizes.size(), false);
    check(s);
    order_stride_ = std::max(order_stride_, size_t(s.first(s.count())));
    in_groups += g.replicas.count;
  }
  if (in_groups != replicas)
    throw InputError("training needs an order of the examples for each of its " + text(replicas) + " replicas, not " +
                     text(in_groups));
  network_->prepare(posterior_->training_context(settings.batch));
  states_ = arena.take<StepState>(size_t(rows()));
  totals_ = arena.take<Totals>(size_t(rows()));
  std::vector<int32_t> all;
  for (const Group& g : groups_)
    for (const auto& order : g.stages.order) {
      all.insert(all.end(), order.begin(), order.end());
      all.resize(all.size() + order_stride_ - order.size());
    }
  order_ = arena.take<int32_t>(all.size());
  upload(device, order_, all);
  labels_ = arena.take<int32_t>(size_t(settings.batch) * replicas);
  loss_ = arena.take<float>(size_t(settings.batch) * rows());
  hit_ = arena.take<float>(size_t(settings.batch) * rows());
  if (!stages().pixel_order.empty()) upload_tasks(arena);
  for (const Replica& replica : settings_.replicas) {
    StepState s{};
    s.noise = key_of(replica.seed, 1);
    s.shuffle = key_of(replica.seed, 2);
    states_host_.push_back(s);
  }
  upload_states();
  posterior_->initialise(states_);
  for (int r = 0; r < replicas; r++)
    if (const Replica& from = settings_.replicas[size_t(r)]; from.pretrained)
      adopt(*posterior_, *network_, r, *from.pretrained, from.pretrained_sd);
  posterior_->settle();
}

void Trainer::check(const Stages& stages) const {
  const TrainingSettings& s = settings_;
  if (s.batch < 1) throw InputError("the batch must be at least 1, not " + text(s.batch));
  if (!(s.epochs > 0)) throw InputError("the number of epochs must be positive");
  if (stages.sizes.empty()) throw InputError("there must be at least one stage");
  const size_t count = stages.sizes.size(), pixels = size_t(train_.channels) * train_.plane;
  for (int size : stages.sizes)
    if (size < 1) throw InputError("a stage has no examples");
  for (const auto& order : stages.order) {
    if (order.size() != size_t(stages.first(stages.count())))
      throw InputError("an order's length is not the sum of its stages'");
    for (int32_t i : order)
      if (i < 0 || i >= train_.count) throw InputError("a stage names image " + text(i) + " of " + text(train_.count));
  }
  if (stages.heads.size() != count || stages.augment.size() != count)
    throw InputError("stages need a head and an augmentation for each of the " + text(count));
  for (int head : stages.heads)
    if (head < 0 || head >= network_->heads())
      throw InputError("a stage names head " + text(head) + " of " + text(network_->heads()));
  const Stages& first = groups_[0].stages;
  if (groups_.size() > 1 &&
      (std::count(stages.heads.begin(), stages.heads.end(), 0) != int64_t(count) || !first.pixel_order.empty() ||
       !stages.pixel_order.empty() ||
       std::count(stages.augment.begin(), stages.augment.end(), first.augment[0]) != int64_t(count)))
    throw InputError("groups that train side by side have one head, one augmentation and pixels as they are");
  if (stages.continuous() && (count != 1 || stages.pixel_order.empty()))
    throw InputError("continuous tasks are orders of the pixels of one set of examples");
  if (stages.pixel_order.empty()) return;
  if (std::find(stages.augment.begin(), stages.augment.end(), true) != stages.augment.end())
    throw InputError("images whose pixels are in another order cannot be augmented");
  if (!stages.continuous() && stages.pixel_order.size() != count)
    throw InputError("there are " + text(count) + " tasks and " + text(stages.pixel_order.size()) +
                     " orders of the pixels");
  for (const auto& order : stages.pixel_order) {
    std::vector<bool> seen(pixels);
    for (int32_t i : order)
      if (i >= 0 && size_t(i) < pixels) seen[size_t(i)] = true;
    if (order.size() != pixels || std::count(seen.begin(), seen.end(), true) != int64_t(pixels))
      throw InputError("an order of the pixels is no permutation of " + text(pixels));
  }
  for (const auto& row : stages.probabilities)
    if (row.size() != stages.pixel_order.size())
      throw InputError("a step of the schedule has " + text(row.size()) + " probabilities for " +
                       text(stages.pixel_order.size()) + " tasks");
}

void Trainer::upload_tasks(Arena& arena) {
  const Stages& stages = groups_[0].stages;
  std::vector<int32_t> orders;
  for (const auto& order : stages.pixel_order) orders.insert(orders.end(), order.begin(), order.end());
  pixel_orders_ = arena.take<int32_t>(orders.size());
  upload(device_, pixel_orders_, orders);
  tasks_ = {pixel_orders_, int(stages.pixel_order.size())};
  if (!stages.continuous()) return;
  std::vector<float> cumulative;
  for (const auto& row : stages.probabilities) {
    double sum = 0;
    for (double p : row) cumulative.push_back(float(sum += p));
  }
  float* sums = arena.take<float>(cumulative.size());
  upload(device_, sums, cumulative);
  tasks_.cumulative = sums;
  tasks_.steps = int(stages.probabilities.size());
}

const int32_t* Trainer::pixel_order(int task) const {
  return pixel_orders_ ? pixel_orders_ + size_t(task) * train_.channels * train_.plane : nullptr;
}

int Trainer::count_steps(int stage, int group) const {
  const Stages& s = stages(group);
  if (s.continuous()) return int(s.probabilities.size());
  return baton::count_steps(settings_.epochs, s.sizes[size_t(stage)], settings_.batch);
}
int Trainer::count_epoch_steps(int stage, int group) const {
  return std::max(1, int(std::lround(double(stages(group).sizes[size_t(stage)]) / settings_.batch)));
}
bool Trainer::stage_ended(int group) const {
  return stage(group) < 0 || stage_step(group) >= count_steps(stage(group), group);
}

const Trainer::Group& Trainer::group_of(int replica) const {
  return *std::find_if(groups_.begin(), groups_.end(),
                       [&](const Group& g) { return replica < g.replicas.first + g.replicas.count; });
}

void Trainer::download_states() {
  const std::vector<StepState> rows_of_all = download(device_, states_, size_t(rows()));
  for (size_t r = 0; r < states_host_.size(); r++)
    states_host_[r] = rows_of_all[r * size_t(posterior_->draws_at_once())];
}

void Trainer::upload_states() {
  std::vector<StepState> all;
  for (const StepState& s : states_host_) all.insert(all.end(), size_t(posterior_->draws_at_once()), s);
  upload(device_, states_, all);
}

void Trainer::start_from(const TensorFile& file, uint32_t step) {
  if (stage() >= 0) throw InputError("start_from() comes before the first begin_stage()");
  if (posterior_->replicas() != 1) throw InputError("start_from() is for one replica");
  posterior_->load(file, settings_.stages_before == 0);
  states_host_[0].step = step;
  upload_states();
}

uint32_t Trainer::count_history() { return download(device_, states_, 1)[0].step; }

// The head, its buffers and the augmentation are recorded in the graph: another of them needs another graph. Several
// groups have these in common.
void Trainer::take_stage() {
  const Group& g = groups_[0];
  const size_t stage = size_t(std::max(g.stage, 0));
  const int head = g.stages.heads[stage];
  const bool augments = g.stages.augment[stage];
  if (graph_ && graph_head_ == head && graph_augments_ == augments) return;
  network_->use_head(head);
  if (graph_ && graph_head_ != head) posterior_->clear_gradients();
  graph_head_ = head;
  graph_augments_ = augments;
  graph_.emplace();
}

void Trainer::begin_stage(int stage, int group) {
  Group& g = groups_[size_t(group)];
  if (stage < 0 || stage >= g.stages.count()) throw InputError("there is no stage " + text(stage + 1));
  const int of_all = settings_.stages_before + stage;
  const bool anew = posterior_->begin_stage(of_all == 0, g.replicas);
  download_states();
  for (int r = g.replicas.first; r < g.replicas.first + g.replicas.count; r++) {
    const json& from = posterior_->settings(r);
    StepState& s = states_host_[size_t(r)];
    s.steps_before = anew ? 0 : s.steps_before + s.stage_step;
    s.stage = of_all;
    s.stage_step = 0;
    s.stage_steps = count_steps(stage, group);
    s.part_offset = g.stages.first(stage);
    s.part_size = g.stages.sizes[size_t(stage)];
    s.schedule = parse_schedule(from["schedule"]);
    s.base_lr_mean = float(posterior_->step_size(r));
    s.base_lr_scale = float(from.value("lr_scale", 0.0));
    s.decay = float(double(from["decay"]));
    s.decay_steps = std::max(1, int(std::lround(double(from["decay_epochs"]) * count_epoch_steps(stage, group))));
    s.kl_weight = float(posterior_->kl_weight(r, s.part_size, settings_.batch));
    s.warmup_steps = int(from.value("warmup_epochs", 0.0) * count_epoch_steps(stage, group));
  }
  g.stage = stage;
  g.stage_step = 0;
  upload_states();
  take_stage();
}

void Trainer::rest(int group) {
  Group& g = groups_[size_t(group)];
  if (g.rests) return;
  g.rests = true;
  if (groups_.size() == 1) return;  // nobody goes on
  download_states();
  for (int r = g.replicas.first; r < g.replicas.first + g.replicas.count; r++) states_host_[size_t(r)].halted = -1;
  upload_states();
}

// One step, every shape fixed and every changing number in device memory: what the graph captures.
void Trainer::run_step() {
  const int replicas = posterior_->replicas(), at_once = posterior_->draws_at_once(), batch = settings_.batch;
  const bool shared = rows() > replicas;  // draws see one batch
  const Stream stream = device_.stream();
  advance_step(states_, rows(), stream);
  const Signal& x = network_->input().signal;
  gather_training_batch(x.value, x.square, labels_, train_, order_, order_stride_, states_, replicas, batch, stream,
                        graph_augments_, pixel_orders_ ? &tasks_ : nullptr);
  for (int first = 0; first < posterior_->draws(); first += at_once) {
    const Pass pass{states_, first};
    posterior_->draw(first, states_);
    network_->forward(pass);
    softmax_cross_entropy(loss_, hit_, network_->logits_gradient(), network_->logits(), labels_, rows(), batch,
                          network_->classes(), posterior_->loss_scale(batch), stream, shared);
    add_to_totals(totals_, loss_, hit_, states_, rows(), batch, stream);
    network_->backward(pass);
  }
  posterior_->step(states_);
}

int Trainer::advance(int count) {
  for (const Group& g : groups_)
    if (g.stage < 0) throw InputError("begin_stage() comes before run()");
  int done = 0;
  if (!graph_->captured() && count > 0) {  // the first step runs as it is, so that libraries load what they load lazily
    run_step();
    done = 1;
    graph_->capture(device_, [this] { run_step(); });
  }
  for (; done < count && !stop_requested(); done++) {
    BATON_RANGE("step");
    graph_->replay(device_);
  }
  for (Group& g : groups_)
    if (!g.rests) g.stage_step += done, g.step += done;
  return done;
}

std::vector<EpochTotals> Trainer::run(int count) {
  if (advance(count) < count) throw_stopped("nothing of this training is kept");
  return take_totals();
}

std::string Trainer::describe_place(int replica) const {
  return "stage " + text(settings_.stages_before + group_of(replica).stage + 1) + " (seed " +
         text(settings_.replicas[size_t(replica)].seed) + ")";
}

std::string Trainer::take_warning() { return posterior_->warning(settings_.batch, posterior_->step_size()); }

std::vector<EpochTotals> Trainer::take_totals(int group) {
  const std::string failure = posterior_->failure(settings_.batch, posterior_->step_size());
  if (!failure.empty()) throw RunError(describe_place(0) + ": " + failure);
  const int at_once = posterior_->draws_at_once();
  const std::vector<Totals> totals = download(device_, totals_, size_t(rows()));
  for (int row = 0; row < rows(); row++)
    if (totals[size_t(row)].nonfinite_step && !group_of(row / at_once).rests) {
      const std::string warning = take_warning();
      throw RunError("the loss is not finite: " + find_not_finite(row) + ", " + describe_place(row / at_once) +
                     ", step " + text(totals[size_t(row)].nonfinite_step) + " of the run" +
                     (warning.empty() ? "" : "; " + warning));
    }
  const Replicas of = groups_[size_t(group)].replicas;
  const auto kl = posterior_->take_accumulated_kl(of);
  std::vector<EpochTotals> result(size_t(of.count));
  for (int r = 0; r < of.count; r++) {
    EpochTotals& e = result[size_t(r)];
    const int first_row = (of.first + r) * at_once;
    for (int row = first_row; row < first_row + at_once; row++) {
      const Totals& t = totals[size_t(row)];
      e.loss += t.loss;
      e.accuracy += t.hits;
      e.examples += t.examples;
      e.steps += t.steps;
    }
    if (e.examples) e.loss /= double(e.examples), e.accuracy /= double(e.examples);
    e.steps /= posterior_->draws();  // the device counts every draw's
    e.examples = e.steps * settings_.batch;
    for (double sum : kl[size_t(r)]) {
      e.kl_by_name.push_back(e.steps ? sum / double(e.steps) : 0);
      e.kl += e.kl_by_name.back();
    }
    if (!std::isfinite(e.kl))
      throw RunError("the KL is not finite: " + find_not_finite(first_row) + ", " + describe_place(of.first + r) +
                     ", by step " + text(download(device_, states_, size_t(rows()))[size_t(first_row)].step) +
                     " of the run");
  }
  fill_zero(device_, totals_ + of.first * at_once, sizeof(Totals) * of.count * at_once);
  return result;
}

// The halted row still has the weights of the step whose loss was not finite, and every replay since has repeated its
// forward pass.
std::string Trainer::find_not_finite(int row) {
  const auto broken = [](const std::vector<float>& values) {
    return !std::all_of(values.begin(), values.end(), [](float x) { return std::isfinite(x); });
  };
  const auto name_layer = [](const std::string& tensor) { return tensor.substr(0, tensor.rfind('.')); };
  for (const StateArray& a : posterior_->state())
    for (const TensorSpec& t : a.store->layout().tensors())
      if (a.array.find("adam") == std::string::npos &&
          broken(a.store->read(device_, a.array, row / posterior_->draws_at_once(), t)))
        return "layer " + name_layer(t.name) + " (its " + t.name + "." + a.array + ")";
  for (const NamedActivation& a : network_->activations())
    if (broken(download(device_, a.activation.signal.value + a.activation.stride * row, a.activation.stride)))
      return "layer " + a.layer + " (its output)";
  return "the cross-entropy of finite logits";
}

}  // namespace baton
