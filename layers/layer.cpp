#include "layers/layer.h"

#include "layers/estimators.h"

namespace baton {

Rows split_rows(const LayerContext& c, int groups) {
  if (groups < 1 || c.batch % groups != 0)
    throw InputError("a batch of " + std::to_string(c.batch) + " does not divide into " + std::to_string(groups) +
                     " groups");
  return {c.rows * groups, c.batch / groups};
}

Activation take_activation(const LayerContext& c, size_t size, bool squares, bool gradients) {
  Activation a;
  a.size = size;
  a.stride = size * c.batch;
  const size_t count = a.stride * c.rows;
  a.signal.value = c.arena.take<float>(count);
  a.signal.rounded = c.device.tensor_cores();
  if (squares) a.signal.square = c.arena.take<float>(count);
  if (gradients) a.signal.grad = c.arena.take<float>(count);
  if (gradients && squares) a.signal.grad_square = c.arena.take<float>(count);
  return a;
}

Linear::Linear(ParameterLayout& layout, std::string name, std::vector<int64_t> weight_shape, int fan_in,
               uint32_t stream_id)
    : name_(std::move(name)), outputs_(int(weight_shape[0])), stream_id_(stream_id) {
  weight_ = layout.add(name_ + ".weight", std::move(weight_shape), fan_in, false);
  layout.add(name_ + ".bias", {outputs_}, fan_in, true);
  weight_at_ = layout[weight()].offset;
  bias_at_ = layout[bias()].offset;
}
Linear::~Linear() = default;

void Linear::prepare(const LayerContext& c, bool squares) {
  device_ = &c.device;
  estimator_ = c.weights.make_estimator(*this, c);
  take_buffers(c, estimator_->noisy(), squares);
  estimator_->settle(*this);
}

bool Linear::reads_squares() const { return estimator_->reads_squares(); }

void Linear::forward(const Activation& x, const Pass& pass) {
  BATON_RANGE("layer forward");
  estimator_->forward(*this, x, pass);
}

void Linear::backward(const Activation& x, const Pass& pass) {
  BATON_RANGE("layer backward");
  estimator_->backward(*this, x, pass);
}

}  // namespace baton
