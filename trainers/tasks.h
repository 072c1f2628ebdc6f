// Learning tasks one after the other without their earlier data (Zeno et al. 2018, sections 4.2 and 4.3): the same
// images under other orders of their pixels, or tasks of their own with an output layer each. One network, held and
// moved by a Learner; nothing tells Bayesian gradient descent where a task ends.
#pragma once
#include <filesystem>
#include <memory>
#include <optional>

#include "engine/io/safetensors.h"
#include "layers/posteriors/learner.h"
#include "trainers/device_data.h"
#include "trainers/incremental.h"

namespace baton {

using LearnerFactory = std::function<std::unique_ptr<Learner>(Device&, Arena&, const ParameterLayout&)>;

struct TaskSequence {
  std::vector<std::vector<int32_t>> examples;     // of each task, in the training set
  std::vector<int> heads;                         // of each task; empty: the first
  std::vector<std::vector<int32_t>> pixel_order;  // [tasks][channels * plane]; empty: pixels as they are
  std::vector<bool> augment;                      // of each task; empty: nothing is augmented
  // Continuous tasks: row i is the tasks' probabilities at step i of the one stage in which they all are learned.
  // Empty: one task after the other. `examples` then has one entry, from which all draw, and `pixel_order` says the
  // tasks.
  std::vector<std::vector<double>> probabilities;
  int tasks() const { return int(probabilities.empty() ? examples.size() : pixel_order.size()); }
  int stages() const { return int(examples.size()); }
};

// pixel_order[0] is the identity, the others are seeded permutations of [0, pixels).
std::vector<std::vector<int32_t>> permuted_pixels(int tasks, int pixels, uint64_t seed);
// The schedule of the continuous task-agnostic experiment: [steps][tasks], row i the probabilities of the tasks at step
// i, which rise and fall linearly so that neighbours overlap; beta: how steep (the authors': 4).
std::vector<std::vector<double>> continuous_schedule(int tasks, int steps, double beta);

struct TaskPlan {
  int batch = 128;
  double epochs = 1;  // a task
  uint64_t seed = 0;
  double lr = 1;  // eta of Bayesian gradient descent; the step size of the others
  Schedule schedule = Schedule::constant;
  double decay = 0.1, decay_epochs = 100;  // of Schedule::steps
  double kl_weight = 0;                    // of Bayes by Backprop: on the KL against the batch's summed NLL, 1 / M
};

class TaskTrainer {
 public:
  // Throws InputError for a sequence or a plan that makes no sense.
  TaskTrainer(Device&, Arena&, const NetworkFactory&, const DeviceImages& train, const TaskSequence&, const TaskPlan&,
              const LearnerFactory&);

  int stages() const { return sequence_.stages(); }
  int stage() const { return stage_; }
  int steps_of(int stage) const;
  int steps_an_epoch(int stage) const;
  int stage_step() const { return stage_step_; }
  void begin_stage(int stage);
  void restart_optimizer();  // its moments and step count start anew with the next stage; else they go on
  // Runs `count` steps: a captured graph, replayed; fewer where a signal asks the program to end (engine/io/stop.h).
  // Returns how many.
  int advance(int count);
  // What the steps since the last time add up to. Throws RunError when a loss was not finite or sigma diverged.
  EpochTotals take_totals();
  // Both, where no checkpoint is kept: throws Stopped when a signal asks the program to end.
  EpochTotals run(int count);
  std::string warning() { return learner_->warning(plan_.batch); }

  Learner& learner() { return *learner_; }
  Network& network() { return *network_; }
  const TaskPlan& plan() const { return plan_; }
  const TaskSequence& sequence() const { return sequence_; }
  const int32_t* pixel_order(int task) const;  // in device memory, or null
  int64_t step() const { return steps_done_; }
  int graph_nodes() const { return graph_ ? graph_->nodes() : 0; }

  // Everything that decides how training goes on, in the middle of an epoch too: its totals so far are kept.
  void save(const std::filesystem::path&, const std::string& identity, const std::string& extra);
  // Returns `extra`; InputError when the file is of another run (`identity`) or of another version of the format.
  std::string restore(const std::filesystem::path&, const std::string& identity);

 private:
  void one_step();
  void upload_states();
  Device& device_;
  TaskPlan plan_;
  TaskSequence sequence_;
  DeviceImages train_;
  std::unique_ptr<Network> network_;
  std::unique_ptr<Learner> learner_;
  std::vector<int> offsets_;
  StepState state_{};
  StepState* states_;
  Totals* totals_;
  int32_t *order_, *labels_, *pixel_orders_ = nullptr;
  float *cumulative_ = nullptr, *loss_, *hit_;
  TaskInputs inputs_{};
  std::optional<Graph> graph_;
  bool restarted_ = false;
  int stage_ = -1, stage_step_ = 0;
  int64_t steps_done_ = 0;
};

}  // namespace baton
