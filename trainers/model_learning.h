// How a model learns one part of the data, step by step: by the evidence bound (trainers/incremental.h), or by Bayesian
// gradient descent (trainers/tasks.h).
#pragma once
#include "trainers/model.h"
#include "trainers/predictor.h"

namespace baton {

class Learning {
 public:
  virtual ~Learning() = default;
  virtual void begin() = 0;  // from the model's posterior
  virtual int steps() const = 0;
  virtual int steps_an_epoch() const = 0;
  virtual int step() const = 0;  // of this part, done
  // As IncrementalTrainer's.
  virtual int advance(int count) = 0;
  virtual EpochTotals take_totals() = 0;
  virtual std::string warning() { return {}; }  // what may go wrong, once
  virtual void save(const std::filesystem::path&, const std::string& extra) = 0;
  virtual std::string restore(const std::filesystem::path&) = 0;
  virtual Predictions predict_at_mean(Predictor&) = 0;
  // Arrays and step count into the next model, the posterior before as its prior; returns the KL between the two by
  // layer, nats.
  virtual json finish(Model& next) = 0;
};

// Images order[0], order[1], ... of the set on the device, by the settings of `how` (training, rule, batch, epochs).
// goes_on_from: what tells this learning's checkpoints apart.
std::unique_ptr<Learning> learning_of(Device&, Arena&, const Model& model, const DeviceImages&,
                                      const std::vector<int32_t>& order, const Model& how, bool augment,
                                      const std::string& goes_on_from);

}  // namespace baton
