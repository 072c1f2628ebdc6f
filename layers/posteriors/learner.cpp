#include "layers/posteriors/learner.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/gaussian.h"

namespace baton {

void Learner::initialise_weights(float* mean, bool draw_biases, const StepState* states) {
  int kernel = 1;  // elements of a kernel: of the tensor that a bias follows
  for (const TensorSpec& t : store_.layout().tensors()) {
    double variance = 0;
    if (!t.bias) {
      kernel = 1;
      for (size_t d = 2; d < t.shape.size(); d++) kernel *= int(t.shape[d]);
      variance = 2. / (double(t.shape[1]) * kernel + double(t.shape[0]) * kernel);
    } else if (draw_biases) {
      variance = 2. / (1 + double(kernel) * double(t.shape[0]));
    }
    init_normal(mean, store_.layout().stride(), int(t.offset), int(t.size), float(std::sqrt(variance)), states, 1,
                device_.stream());
  }
}

namespace {
// The whole store's elements get `value`, its gaps 0.
void fill(Device& device, const ParameterStore& store, float* x, float value) {
  std::vector<float> row(store.layout().stride(), 0.f);
  for (const TensorSpec& t : store.layout().tensors())
    std::fill(row.begin() + t.offset, row.begin() + t.offset + t.size, value);
  upload(device, x, row);
}

int at_once_of(int asked, int draws) {
  if (draws < 1) throw InputError("a step needs at least one draw of the weights, not " + std::to_string(draws));
  if (asked == 0) return draws;
  if (asked < 0 || draws % asked != 0)
    throw InputError(std::to_string(draws) + " draws a step do not divide into passes of " + std::to_string(asked));
  return asked;
}

std::string number(double x) {
  char text[32];
  snprintf(text, sizeof text, "%.3g", x);
  return text;
}
}  // namespace

// ---------------------------------------------------------------------------------------------------------- drawn
DrawnLearner::DrawnLearner(Device& device, Arena& arena, const ParameterLayout& layout, int draws, int at_once,
                           double sigma)
    : Learner(device, arena, layout), draws_(draws), at_once_(at_once_of(at_once, draws)) {
  if (!(sigma > 0)) throw InputError("the initial sigma must be positive");
  mean_ = state("mean");
  sd_ = state("std");
  moments_ = {store_.add("moments.sum"), store_.add("moments.noise")};
  drawn_ = arena.take<float>(layout.stride() * at_once_);
}

void DrawnLearner::draw(int first_draw, const StepState* states) {
  draw_weights(drawn_, store_.layout().stride(), mean_, sd_, count(), first_draw, at_once_, states, device_.stream());
}

GradientsView DrawnLearner::gradients(int first_draw) {
  GradientsView g{nullptr, nullptr, store_.layout().stride()};
  g.moments = moments_;
  g.pass = {first_draw, at_once_, first_draw > 0};
  return g;
}

void DrawnLearner::head_changed() {
  fill_zero(device_, moments_.sum, store_.bytes());
  fill_zero(device_, moments_.noise, store_.bytes());
}

void DrawnLearner::sample(float* w, int first, int draws, Key key) {
  draw_weights(w, store_.layout().stride(), mean_, sd_, count(), first, draws, key, device_.stream());
}

void DrawnLearner::mean_weights(float* w) { copy_on_device(device_, w, mean_, store_.row_bytes()); }

// ------------------------------------------------------------------------------------------------------------ BGD
BgdLearner::BgdLearner(Device& device, Arena& arena, const ParameterLayout& layout, const BgdSettings& settings)
    : DrawnLearner(device, arena, layout, settings.draws, settings.at_once, settings.sigma), settings_(settings) {
  settings_.at_once = at_once_;
  partial_ = arena.take<float>(bgd_partials(count()));
  statistics_ = arena.take<SigmaStatistics>(1);
  wire_ = arena.take<TripWire>(1);
}

void BgdLearner::initialise(const StepState* states) {
  initialise_weights(mean_, true, states);
  fill(device_, store_, sd_, float(settings_.sigma));
}

void BgdLearner::step(StepState* states) {
  BgdRule rule;
  rule.gradient_scale = 1.f / float(settings_.draws);
  rule.clamp = float(settings_.clamp);
  rule.least_sd = float(settings_.least_ratio * settings_.sigma);
  rule.largest_sd = float(settings_.largest_ratio * settings_.sigma);
  rule.initial_sd = float(settings_.sigma);
  rule.warn_ratio = float(settings_.warn_ratio);
  rule.halt_ratio = float(settings_.halt_ratio);
  bgd_update(mean_, sd_, moments_, count(), rule, statistics_, wire_, states, at_once_, partial_, device_.stream());
}

SigmaStatistics BgdLearner::statistics() {
  sigma_statistics(statistics_, sd_, count(), partial_, device_.stream());
  return download(device_, statistics_, 1)[0];
}

TripWire BgdLearner::trip_wire() { return download(device_, wire_, 1)[0]; }

std::string BgdLearner::cause(int batch) const {
  const double scale = settings_.eta * settings_.sigma * settings_.sigma * batch;
  return "eta sigma0^2 B = " + number(settings_.eta) + " x " + number(settings_.sigma) + "^2 x " +
         std::to_string(batch) + " = " + number(scale) + (scale > 0.5 ? ", above the 0.46 that is known to hold" : "") +
         ": lower sigma0, the batch or eta (sigma itself answers to sigma0^2 B), or take more draws than " +
         std::to_string(settings_.draws);
}

std::string BgdLearner::warning(int batch) {
  const TripWire wire = trip_wire();
  if (!wire.warned_step || warned_) return {};
  warned_ = true;
  return "step " + std::to_string(wire.warned_step) + ": the largest sigma is " + number(wire.largest) + ", " +
         number(wire.largest / settings_.sigma) + " times its initial value (median " + number(wire.median) +
         ", largest |sigma E[g e] / 2| " + number(wire.largest_x) + "). Sigma may be running away; " + cause(batch);
}

std::string BgdLearner::failure(int batch) {
  const TripWire wire = trip_wire();
  if (!wire.halted_step) return {};
  return "sigma diverged at step " + std::to_string(wire.halted_step) + ": the largest is " +
         number(wire.halted_largest) + " from " + number(settings_.sigma) + " at the start" +
         (wire.nonfinite ? ", and the update of " + std::to_string(wire.nonfinite) + " weights was not finite" : "") +
         (wire.warned_step ? " (it passed " + number(settings_.warn_ratio) + " times its initial value at step " +
                                 std::to_string(wire.warned_step) + ")"
                           : "") +
         ". " + cause(batch);
}

Figures BgdLearner::figures() {
  const SigmaStatistics s = download(device_, statistics_, 1)[0];
  return {{"sigma_largest", s.largest},
          {"sigma_median", s.median},
          {"sigma_smallest", s.smallest},
          {"largest_x", s.largest_x},
          {"nonfinite", s.nonfinite}};
}

std::vector<uint8_t> BgdLearner::noted() {
  const TripWire wire = trip_wire();
  std::vector<uint8_t> bytes(sizeof wire + 1, uint8_t(warned_));
  std::memcpy(bytes.data(), &wire, sizeof wire);
  return bytes;
}

void BgdLearner::note(const std::vector<uint8_t>& bytes) {
  std::vector<TripWire> wire(1);
  std::memcpy(wire.data(), bytes.data(), sizeof(TripWire));
  upload(device_, wire_, wire);
  warned_ = bytes.back() != 0;
}

// ------------------------------------------------------------------------------------------------------------ BBB
BbbLearner::BbbLearner(Device& device, Arena& arena, const ParameterLayout& layout, const BbbSetup& setup)
    : DrawnLearner(device, arena, layout, setup.rule.draws, setup.at_once, setup.sigma), setup_(setup) {
  setup_.rule.gradient_scale = 1.f / float(draws_);
  arrays_.mean = mean_;
  arrays_.sd = sd_;
  arrays_.moments = moments_;
  arrays_.rho = state("rho");
  arrays_.mean_m = state("mean.m");
  arrays_.mean_v = state("mean.v");
  arrays_.rho_m = state("rho.m");
  arrays_.rho_v = state("rho.v");
}

void BbbLearner::initialise(const StepState* states) {
  initialise_weights(mean_, true, states);
  // The gaps between tensors too: the update takes ln sd of every place.
  upload(device_, sd_, std::vector<float>(store_.layout().stride(), float(setup_.sigma)));
  rho_of_sd(arrays_.rho, sd_, count(), device_.stream());
}

void BbbLearner::step(StepState* states) { bbb_update(arrays_, count(), setup_.rule, states, device_.stream()); }

void BbbLearner::restart_optimizer() {
  for (float* a : {arrays_.mean_m, arrays_.mean_v, arrays_.rho_m, arrays_.rho_v}) fill_zero(device_, a, store_.bytes());
}

// ---------------------------------------------------------------------------------------------------------- points
PointLearner::PointLearner(Device& device, Arena& arena, const ParameterLayout& layout, const PointSetup& setup)
    : Learner(device, arena, layout), setup_(setup) {
  arrays_.weights = state("mean");
  arrays_.grad = grad_ = store_.add("grad");
  arrays_.m = state("mean.m");
  arrays_.v = state("mean.v");
  if (setup.anchor == Anchor::none) return;
  arrays_.importance = importance_ = state("importance");
  arrays_.centre = centre_ = state("centre");
  if (setup.anchor == Anchor::path) arrays_.path = state("path");
  else fisher_ = arena.take<float>(layout.stride());
}

const char* PointLearner::method() const {
  if (setup_.anchor == Anchor::path) return "si";
  if (setup_.anchor == Anchor::fisher) return "ewc";
  return setup_.rule.rule == PointRule::sgd ? "sgd" : "adam";
}

void PointLearner::initialise(const StepState* states) {
  initialise_weights(arrays_.weights, false, states);
  if (centre_) copy_on_device(device_, centre_, arrays_.weights, store_.bytes());
}

GradientsView PointLearner::gradients(int) { return {grad_, nullptr, store_.layout().stride()}; }

void PointLearner::step(StepState* states) { point_update(arrays_, count(), setup_.rule, states, device_.stream()); }

void PointLearner::head_changed() { fill_zero(device_, grad_, store_.bytes()); }

void PointLearner::restart_optimizer() {
  fill_zero(device_, arrays_.m, store_.bytes());
  fill_zero(device_, arrays_.v, store_.bytes());
}

void PointLearner::mean_weights(float* w) { copy_on_device(device_, w, arrays_.weights, store_.row_bytes()); }

void PointLearner::consolidate_path() {
  baton::consolidate_path(importance_, centre_, arrays_.path, arrays_.weights, count(), float(setup_.xi),
                          device_.stream());
}

void PointLearner::consolidate_fisher(const std::vector<float>& fisher) {
  upload(device_, fisher_, fisher);
  baton::consolidate_fisher(importance_, centre_, fisher_, arrays_.weights, count(), float(setup_.fisher_decay),
                            device_.stream());
}

}  // namespace baton
