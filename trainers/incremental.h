// Bayesian incremental learning (Kochurov et al. 2018, Algorithm 1): the data arrive in T parts; each stage maximises
//   mean log-likelihood of the part - beta / N_t KL(q || p),   p = the posterior of the stage before,
// by Adam with its state reset at every stage. A point posterior makes it plain fine-tuning (FT). All replicas (seeds
// of a table, points of a search) train at once, each on its own order of the examples and with its own settings.
#pragma once
#include <filesystem>
#include <map>

#include "engine/io/safetensors.h"
#include "trainers/device_data.h"
#include "trainers/predictor.h"

namespace baton {

// A network trained before, as the centre of the first prior: N(w, sd^2) for the tensors that it names.
struct Pretrained {
  std::map<std::string, std::vector<float>> weights;
  std::map<std::string, std::vector<float>> prior_log_std;  // for each weight (Laplace); where absent, one sd for all
  std::string description;                                  // for results and for telling runs apart
};

// One replica's settings.
struct TrainingSettings {
  double lr = 1e-3;          // Adam's step size for the means
  double lr_scale = 1e-2;    // for log sigma: Adam's step size, or the natural rule's rate
  double prior_sd = 1;       // of the first prior N(0, prior_sd^2)
  double init_log_std = -5;  // initial log sigma
  double beta = 1;           // weight of the KL
  double warmup_epochs = 0;  // over which the KL's weight grows to beta, in every stage
  Schedule schedule = Schedule::constant;
  std::shared_ptr<const Pretrained> pretrained;  // null: the first prior is N(0, prior_sd^2) everywhere
  double pretrained_sd = 0.1;                    // of the pretrained tensors' prior, where no Laplace says otherwise
};

struct TrainingPlan {
  PosteriorOptions posterior;
  ScaleRule scale_rule = ScaleRule::adam;
  int parts = 1;
  int batch = 100;
  double epochs = 1;                       // a stage
  bool augment = false;                    // random flips and crops of the padded images, on the device
  std::vector<uint64_t> seeds;             // one a replica: of the split, the order, the weights and the noise
  std::vector<TrainingSettings> settings;  // one a replica
  // Where training goes on from a posterior that earlier stages left (resume_from): how many they were, and what tells
  // it apart from others.
  int stages_before = 0;
  std::string goes_on_from;
};

struct EpochTotals {                      // of one replica, since the last time
  double loss = 0, accuracy = 0, kl = 0;  // means over examples, and over steps for the KL
  int64_t examples = 0, steps = 0;
  std::vector<double> kl_by_name;  // as Posterior::kl_names()
};

// A replica takes over the pretrained tensors; posterior.settle() follows the last one. InputError for a tensor that
// the network has not, or of another size.
void adopt(Posterior&, const Network&, int replica, const Pretrained&, double sd);

class IncrementalTrainer {
 public:
  // order[r]: replica r's examples, its T parts in turn; part_sizes: the same for every replica. Throws InputError for
  // a plan that makes no sense (no part, more parts than images, a batch below 1, no seeds).
  IncrementalTrainer(Device&, Arena&, const NetworkFactory&, const DeviceImages& train, const TrainingPlan&,
                     const std::vector<std::vector<int32_t>>& order, const std::vector<int>& part_sizes);

  int stages() const { return int(part_sizes_.size()); }
  int stage() const { return stage_; }            // 0-based
  int steps_of(int stage) const;                  // ceil(epochs * N_t / batch)
  int steps_an_epoch(int stage) const;            // N_t / batch, rounded
  int stage_step() const { return stage_step_; }  // steps of this stage done
  int part_size(int stage) const { return part_sizes_[stage]; }

  // The posterior of plan().stages_before stages, as save_posterior() wrote it, before the first begin_stage(); `step`:
  // of the whole history so far, so that no noise is used twice. One replica. InputError for a tensor that is missing.
  void resume_from(const TensorFile&, uint32_t step);
  uint32_t steps_in_all();  // of the whole history

  // Hands the posterior on (but for the very first stage of all) and restarts optimizer and step counts.
  void begin_stage(int stage);
  // Runs `count` steps: a captured graph, replayed; fewer where a signal asks the program to end (engine/io/stop.h).
  // Returns how many.
  int advance(int count);
  // What the steps since the last time add up to. Throws RunError when a loss was not finite, naming the layer where it
  // began, the stage and the step; the replica stands still at that step.
  std::vector<EpochTotals> take_totals();
  // Both, where no checkpoint is kept: throws Stopped when a signal asks the program to end.
  std::vector<EpochTotals> run(int count);

  Posterior& posterior() { return posterior_; }
  Network& network() { return *network_; }
  const TrainingPlan& plan() const { return plan_; }
  int graph_nodes() const { return graph_.nodes(); }

  // Everything that decides how training goes on, in the middle of an epoch too: its totals so far are kept. `extra`
  // goes into the metadata (the program's own progress).
  void save(const std::filesystem::path&, const std::string& extra);
  std::string restore(const std::filesystem::path&);  // returns `extra`; InputError when the file is of another run

 private:
  void step();
  void upload_states();
  void adopt_pretrained();
  std::string where_not_finite(int replica);
  Device& device_;
  TrainingPlan plan_;
  DeviceImages train_;
  std::vector<int> part_sizes_, part_offsets_;
  std::unique_ptr<Network> network_;
  Posterior posterior_;
  std::vector<StepState> states_host_;
  StepState* states_;
  Totals* totals_;
  int32_t *order_, *labels_;
  float *loss_, *hit_;
  size_t order_stride_;
  Graph graph_;
  int stage_ = -1, stage_step_ = 0;
};

}  // namespace baton
