// Learning stage after stage without the data of earlier stages. Every step is
//   a batch; for each pass over some draws of the weights: draw, forward, loss, backward; then the posterior's step.
// What tells fine-tuning, Bayesian incremental learning (Kochurov et al. 2018, Algorithm 1: the posterior of a stage is
// the prior of the next) and Bayesian gradient descent (Zeno et al. 2018) apart is the posterior. Replicas (runs of a
// table, points of a search) train side by side, each on its own order of the examples and with its own settings. They
// form groups: the replicas of a group go through the same stages together, and a group's stages end where they end,
// whatever the others do. Bits do not depend on the company.
#pragma once
#include <filesystem>
#include <map>
#include <optional>

#include "engine/io/safetensors.h"
#include "kernels/softmax_xent.h"
#include "layers/networks.h"
#include "layers/posteriors/posterior.h"
#include "trainers/device_data.h"
#include "trainers/stages.h"

namespace baton {

// A network trained before, as the centre of the first prior: N(w, sd^2) for the tensors that it names.
struct Pretrained {
  std::map<std::string, std::vector<float>> weights;
  std::map<std::string, std::vector<float>> prior_log_std;  // for each weight (Laplace); where absent, one sd for all
  std::string description;                                  // for results and for telling runs apart
};
// A replica takes over the pretrained tensors; posterior.settle() follows the last one. InputError for a tensor that
// the network has not, or of another size.
void adopt(Posterior&, const Network&, int replica, const Pretrained&, double sd);

struct Replica {
  uint64_t seed = 0;               // of the order, the weights and the noise
  json settings = json::object();  // options of the posterior's kind that differ from the standard
  std::shared_ptr<const Pretrained> pretrained{};
  double pretrained_sd = 0.1;  // of the pretrained tensors' prior, where no Laplace says otherwise
};

struct TrainingSettings {
  std::string kind = "ffg";  // of the posterior
  std::vector<Replica> replicas{Replica{}};
  int batch = 100;
  double epochs = 1;  // a stage
  bool masked = false;
  // Where training goes on from a posterior that earlier stages left (start_from): how many they were. identity: what
  // else tells this training apart from others, for its checkpoints.
  int stages_before = 0;
  std::string identity;
};

struct EpochTotals {                      // of one replica, since the last time
  double loss = 0, accuracy = 0, kl = 0;  // means over examples, and over steps for the KL
  int64_t examples = 0, steps = 0;
  std::vector<double> kl_by_name;  // as Posterior::kl_names()
};

// Sums over a layer's tensors (and its z), in the order of the layers: of a KL by name, for results and logs.
json sum_by_layer(const std::vector<std::string>& names, const std::vector<double>& values);

// Steps of a stage of so many examples: ceil(epochs * examples / batch), at least 1.
int count_steps(double epochs, int examples, int batch);

class Trainer {
 public:
  // groups: the stages of each group, which has the next stages.order.size() of the replicas. Where there are several,
  // all are of the first head, with pixels as they are, and augment all stages or none. Throws InputError for settings
  // or stages that make no sense.
  Trainer(Device&, Arena&, const NetworkFactory&, const DeviceImages& train, const std::vector<Stages>& groups,
          const TrainingSettings&);
  Trainer(Device& device, Arena& arena, const NetworkFactory& make, const DeviceImages& train, const Stages& stages,
          const TrainingSettings& settings)
      : Trainer(device, arena, make, train, std::vector{stages}, settings) {}

  const TrainingSettings& settings() const { return settings_; }
  Posterior& posterior() { return *posterior_; }
  Network& network() { return *network_; }
  int groups() const { return int(groups_.size()); }
  const Stages& stages(int group = 0) const { return groups_[size_t(group)].stages; }
  int stage(int group = 0) const { return groups_[size_t(group)].stage; }            // 0-based; -1 before the first
  int stage_step(int group = 0) const { return groups_[size_t(group)].stage_step; }  // steps of this stage done
  int64_t step(int group = 0) const { return groups_[size_t(group)].step; }          // of this training
  bool stage_ended(int group = 0) const;                                             // or none has begun
  int count_steps(int stage, int group = 0) const;
  int count_epoch_steps(int stage, int group = 0) const;  // examples / batch, rounded
  const int32_t* pixel_order(int task) const;             // in device memory; null: pixels as they are

  // The posterior of settings().stages_before stages, as Posterior::save() wrote it, before the first begin_stage();
  // `step`: of the whole history so far, so that no noise is used twice. One replica. InputError for a tensor that is
  // missing.
  void start_from(const TensorFile&, uint32_t step);
  uint32_t count_history();  // steps of the whole history, those of start_from() included

  // Hands the group's posteriors on (but for the very first stage of all) and restarts the stage's step count.
  void begin_stage(int stage, int group = 0);
  // The group has learned all that it will: it stands still while others go on.
  void rest(int group);
  bool rests(int group) const { return groups_[size_t(group)].rests; }
  // Runs `count` steps of all groups: a captured graph, replayed; fewer where a signal asks the program to end
  // (engine/io/stop.h). Returns how many.
  int advance(int count);
  // What the group's steps since the last time add up to, of every replica. Throws RunError when a loss was not finite
  // (of any group), naming the layer where it began, the stage and the step (the replica stands still at that step), or
  // when sigma diverged.
  std::vector<EpochTotals> take_totals(int group = 0);
  // Both, where no checkpoint is kept: throws Stopped when a signal asks the program to end.
  std::vector<EpochTotals> run(int count);
  // What may go wrong, once, in a sentence; empty: nothing.
  std::string take_warning();

  // Everything that decides how training goes on, in the middle of an epoch too: its totals so far are kept. `extra`
  // goes into the metadata (the program's own progress).
  void save(const std::filesystem::path&, const std::string& extra);
  std::string restore(const std::filesystem::path&);  // returns `extra`; InputError when the file is of another run

 private:
  struct Group {
    Stages stages;
    Replicas replicas;
    int stage = -1, stage_step = 0;
    int64_t step = 0;
    bool rests = false;
  };
  void check(const Stages&) const;
  void run_step();
  void download_states();
  void upload_states();
  void take_stage();
  const Group& group_of(int replica) const;
  std::string list_groups(const std::function<int64_t(const Group&)>&) const;
  void upload_tasks(Arena&);
  std::string find_not_finite(int row);
  std::string describe_place(int replica) const;
  std::string make_identity() const;
  int rows() const { return posterior_->replicas() * posterior_->draws_at_once(); }
  Device& device_;
  TrainingSettings settings_;
  std::vector<Group> groups_;
  DeviceImages train_;
  std::unique_ptr<Network> network_;
  std::unique_ptr<Posterior> posterior_;
  std::vector<StepState> states_host_;  // one a replica
  StepState* states_;                   // one a row of a pass: draws have their replica's
  Totals* totals_;
  int32_t *order_, *labels_, *pixel_orders_ = nullptr;
  size_t order_stride_ = 0;
  float *loss_, *hit_;
  TaskInputs tasks_{};
  std::optional<Graph> graph_;  // of the head and augmentation below
  int graph_head_ = -1;
  bool graph_augments_ = false;
};

}  // namespace baton
