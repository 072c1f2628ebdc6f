#include "layers/posteriors/channel_blocks.h"

#include <algorithm>

namespace baton {

namespace {

int extent(const TensorSpec& t) { return int(t.shape[2] * t.shape[3]); }
int count_of(const TensorSpec& t) { return int(t.shape[0] * t.shape[1]); }

// "conv1.weight" -> "conv1.bias"
std::string bias_of(const std::string& weight) { return weight.substr(0, weight.rfind('.')) + ".bias"; }

}  // namespace

ChannelBlocks::ChannelBlocks(Device& device, Arena& arena, ParameterStore& store, int groups, bool moments)
    : device_(device),
      store_(store),
      factors_(arena, factor_layout(store.layout()), store.replicas()),
      groups_(groups),
      moments_(moments) {
  const auto& tensors = store.layout().tensors();
  int most = 0;
  for (int i = 0; i < int(tensors.size()); i++) {
    if (!covers(tensors[i])) continue;
    if (extent(tensors[i]) > largest_block)
      throw InputError(tensors[i].name + ": kernels of " + std::to_string(extent(tensors[i])) + " weights, at most " +
                       std::to_string(largest_block) + " can have a Cholesky factor");
    weights_.push_back(i);
    most = std::max(most, count_of(tensors[i]));
    for (int j = 0; j < int(tensors.size()); j++)
      if (tensors[j].name == bias_of(tensors[i].name)) biases_.push_back(j);
  }
  if (weights_.empty()) throw InputError("a channel factorized posterior needs a convolution");
  for (const char* name : {"scale_tril", "prior_scale_tril", "scale_tril.adam_m", "scale_tril.adam_v"})
    factors_.add(name);
  factors_.add("prior_inverse");
  if (moments) factors_.add("scale_tril.grad");
  partial_ = arena.take<float>(size_t(most) * store.replicas());
}

std::vector<StateArray> ChannelBlocks::state_arrays() {
  std::vector<StateArray> list;
  for (const char* name : {"scale_tril", "prior_scale_tril", "scale_tril.adam_m", "scale_tril.adam_v"})
    list.push_back({&factors_, name});
  return list;
}

CholeskyArrays ChannelBlocks::arrays(size_t i) const {
  const TensorSpec& t = store_.layout()[weights_[i]];
  const size_t at = t.offset, factor_at = factors_.layout()[int(i)].offset;
  CholeskyArrays a{};
  a.mean = store_.at("mean") + at;
  a.prior_mean = store_.at("prior_mean") + at;
  a.mean_m = store_.at("mean.adam_m") + at;
  a.mean_v = store_.at("mean.adam_v") + at;
  a.stride = store_.layout().stride();
  a.factor = factors_.at("scale_tril") + factor_at;
  a.prior_factor = factors_.at("prior_scale_tril") + factor_at;
  a.prior_inverse = factors_.at("prior_inverse") + factor_at;
  a.factor_m = factors_.at("scale_tril.adam_m") + factor_at;
  a.factor_v = factors_.at("scale_tril.adam_v") + factor_at;
  a.factor_stride = factors_.layout().stride();
  a.blocks = count_of(t);
  a.d = extent(t);
  a.replicas = store_.replicas();
  return a;
}

void ChannelBlocks::initialise() {
  for (size_t i = 0; i < weights_.size(); i++) {
    const CholeskyArrays a = arrays(i);
    cholesky_from_diagonal(a.factor, a.factor_stride, store_.at("log_std") + store_.layout()[weights_[i]].offset,
                           a.stride, a.blocks, a.d, a.replicas, device_.stream());
  }
  settle_prior();
}

void ChannelBlocks::settle_prior() {
  for (size_t i = 0; i < weights_.size(); i++) {
    const CholeskyArrays a = arrays(i);
    float* prior = factors_.at("prior_scale_tril") + factors_.layout()[int(i)].offset;
    cholesky_from_diagonal(prior, a.factor_stride, store_.at("prior_log_std") + store_.layout()[weights_[i]].offset,
                           a.stride, a.blocks, a.d, a.replicas, device_.stream());
  }
  refresh();
}

void ChannelBlocks::refresh() {
  for (size_t i = 0; i < weights_.size(); i++) {
    const CholeskyArrays a = arrays(i);
    cholesky_invert(factors_.at("prior_inverse") + factors_.layout()[int(i)].offset, a.prior_factor, a.factor_stride,
                    a.blocks, a.d, a.replicas, device_.stream());
  }
}

void ChannelBlocks::reset_optimizer() {
  for (const char* name : {"scale_tril.adam_m", "scale_tril.adam_v"})
    fill_zero(device_, factors_.at(name), factors_.bytes());
}

void ChannelBlocks::hand_over() {
  copy_on_device(device_, factors_.at("prior_scale_tril"), factors_.at("scale_tril"), factors_.bytes());
  refresh();
}

void ChannelBlocks::draw(float* draws, const GaussianArrays& g, const StepState* states) {
  if (moments_) return fill_zero(device_, factors_.at("scale_tril.grad"), factors_.bytes());
  for (size_t i = 0; i < weights_.size(); i++)
    cholesky_sample(draws + store_.layout()[weights_[i]].offset, g.stride, arrays(i), groups_, states,
                    stream_draws + uint32_t(weights_[i]), device_.stream());
  for (int b : biases_)
    draw_gaussian(draws, g.stride, g, int(store_.layout()[b].offset), int(store_.layout()[b].size), groups_, states,
                  stream_draws + uint32_t(b), device_.stream());
}

void ChannelBlocks::step(const float* gradients, const GaussianArrays& g, const StepState* states,
                         KlAccumulator accumulator) {
  if (moments_) {
    for (size_t i = 0; i < weights_.size(); i++) {
      const size_t at = store_.layout()[weights_[i]].offset, factor_at = factors_.layout()[int(i)].offset;
      cholesky_step(arrays(i), nullptr, 0, 1, 0, g.grad_mean + at, factors_.at("scale_tril.grad") + factor_at, states,
                    accumulator.sums + weights_[i], accumulator.stride, partial_, device_.stream());
    }
    return;
  }
  for (int b : biases_)
    draw_gaussian_backward(g, gradients, g.stride, int(store_.layout()[b].offset), int(store_.layout()[b].size),
                           groups_, states, stream_draws + uint32_t(b), device_.stream());
  for (size_t i = 0; i < weights_.size(); i++)
    cholesky_step(arrays(i), gradients + store_.layout()[weights_[i]].offset, g.stride, groups_,
                  stream_draws + uint32_t(weights_[i]), nullptr, nullptr, states, accumulator.sums + weights_[i],
                  accumulator.stride, partial_, device_.stream());
}

void ChannelBlocks::kl(KlAccumulator accumulator) {
  for (size_t i = 0; i < weights_.size(); i++)
    cholesky_kl(accumulator.sums + weights_[i], accumulator.stride, arrays(i), partial_, device_.stream());
}

void ChannelBlocks::sample(float* w, size_t stride, int replica, int first, int count, Key key) {
  for (size_t i = 0; i < weights_.size(); i++) {
    const CholeskyArrays a = arrays(i);
    cholesky_sample_draws(w + store_.layout()[weights_[i]].offset, stride, a.mean + a.stride * replica,
                          a.factor + a.factor_stride * replica, a.blocks, a.d, first, count, key,
                          stream_draws + uint32_t(weights_[i]), device_.stream());
  }
}

void ChannelBlocks::marginals() {
  for (size_t i = 0; i < weights_.size(); i++) {
    const CholeskyArrays a = arrays(i);
    cholesky_marginals(store_.at("log_std") + store_.layout()[weights_[i]].offset, a.stride, a.factor, a.factor_stride,
                       a.blocks, a.d, a.replicas, device_.stream());
  }
}

}  // namespace baton
