// Bayesian gradient descent (bgd; Zeno et al. 2018, Algorithm 1; kernels/bgd.h): every step is its own small Bayesian
// update, so nothing has to know where a stage ends.
#include <cstring>

#include "layers/posteriors/drawn.h"

namespace baton {

namespace {

std::string number(double x) {
  char text[32];
  snprintf(text, sizeof text, "%.3g", x);
  return text;
}

class BgdPosterior : public DrawnPosterior {
 public:
  explicit BgdPosterior(const PosteriorSetup& setup) : DrawnPosterior(setup), sigma_(settings()["sigma"]) {
    const auto option = [&](const char* name) { return double(settings()[name]); };
    rule_.gradient_scale = 1.f / float(draws_);
    rule_.clamp = float(option("clamp"));
    rule_.least_sd = float(option("least_sigma") * sigma_);
    rule_.largest_sd = float(option("largest_sigma") * sigma_);
    rule_.initial_sd = float(sigma_);
    rule_.warn_ratio = float(option("warn_ratio"));
    rule_.halt_ratio = float(option("halt_ratio"));
    if (option("largest_sigma") > 0 && option("largest_sigma") < option("least_sigma"))
      throw InputError("bgd: the bounds of sigma are exchanged");
    if (option("halt_ratio") < option("warn_ratio")) throw InputError("bgd: halt_ratio is below warn_ratio");
    partial_ = arena_.take<float>(bgd_partials(stride()));
    statistics_ = arena_.take<SigmaStatistics>(1);
    wire_ = arena_.take<TripWire>(1);
  }

  double step_size(int) const override { return settings()["eta"]; }
  void initialise(const StepState* states) override {
    initialise_glorot(mean_, true, states);
    fill_sigma(float(sigma_), false);
  }
  bool begin_stage(bool, Replicas) override { return false; }
  void step(StepState* states) override {
    bgd_update(mean_, sd_, moments_, stride(), rule_, statistics_, wire_, states, draws_at_once_, partial_,
               device_.stream());
  }

  std::string warning(int batch, double lr) override {
    const TripWire wire = trip_wire();
    if (!wire.warned_step || warned_) return {};
    warned_ = true;
    return "step " + std::to_string(wire.warned_step) + ": the largest sigma is " + number(wire.largest) + ", " +
           number(wire.largest / sigma_) + " times its initial value (median " + number(wire.median) +
           ", largest |sigma E[g e] / 2| " + number(wire.largest_x) + "). Sigma may be running away; " +
           explain(batch, lr);
  }

  std::string failure(int batch, double lr) override {
    const TripWire wire = trip_wire();
    if (!wire.halted_step) return {};
    return "sigma diverged at step " + std::to_string(wire.halted_step) + ": the largest is " +
           number(wire.halted_largest) + " from " + number(sigma_) + " at the start" +
           (wire.nonfinite ? ", and the update of " + std::to_string(wire.nonfinite) + " weights was not finite" : "") +
           (wire.warned_step ? " (it passed " + number(rule_.warn_ratio) + " times its initial value at step " +
                                   std::to_string(wire.warned_step) + ")"
                             : "") +
           ". " + explain(batch, lr);
  }

  Figures figures() override {
    const SigmaStatistics s = download(device_, statistics_, 1)[0];
    return {{"sigma_largest", s.largest},
            {"sigma_median", s.median},
            {"sigma_smallest", s.smallest},
            {"largest_x", s.largest_x},
            {"nonfinite", s.nonfinite}};
  }

  std::vector<uint8_t> notes() override {
    const TripWire wire = trip_wire();
    std::vector<uint8_t> bytes(sizeof wire + 1, uint8_t(warned_));
    std::memcpy(bytes.data(), &wire, sizeof wire);
    return bytes;
  }
  void set_notes(const std::vector<uint8_t>& bytes) override {
    copy_to_device(device_, wire_, bytes.data(), sizeof(TripWire));
    warned_ = bytes.back() != 0;
  }

  json describe_sigma(bool histogram) override {
    sigma_statistics(statistics_, sd_, stride(), partial_, device_.stream());
    const SigmaStatistics s = download(device_, statistics_, 1)[0];
    json j{{"initial", sigma_}, {"smallest", s.smallest}, {"median", s.median}, {"largest", s.largest}};
    if (!histogram) return j;
    int first = 0, last = sd_bins;
    while (first < last && s.histogram[first] == 0) first++;
    while (last > first && s.histogram[last - 1] == 0) last--;
    for (int b = first; b <= last; b++) j["edges"].push_back(sd_bin_edge(b));
    for (int b = first; b < last; b++) j["counts"].push_back(s.histogram[b]);
    return j;
  }

 private:
  TripWire trip_wire() { return download(device_, wire_, 1)[0]; }

  std::string explain(int batch, double lr) const {
    const double scale = lr * sigma_ * sigma_ * batch;
    return "eta sigma0^2 B = " + number(lr) + " x " + number(sigma_) + "^2 x " + std::to_string(batch) + " = " +
           number(scale) + (scale > 0.5 ? ", above the 0.46 that is known to hold" : "") +
           ": lower sigma0, the batch or eta (sigma itself answers to sigma0^2 B), or take more draws than " +
           std::to_string(draws_);
  }

  double sigma_;
  BgdRule rule_;
  float* partial_;
  SigmaStatistics* statistics_;
  TripWire* wire_;
  bool warned_ = false;
};

}  // namespace

extern const PosteriorKind bgd_kind{
    "bgd", "bgd, Bayesian gradient descent: every weight has a mean and a standard deviation, updated at every step",
    with_schedule(
        1, "bgd: the step size of the means, in units of sigma^2",
        drawn_options(
            10, {number_option("clamp", 0, not_negative, "bgd: bound of |E[g]| and |E[g e]| (0: none, as the paper)"),
                 number_option("least_sigma", 0, not_negative, "bgd: lower bound of sigma, times its initial value"),
                 number_option("largest_sigma", 0, not_negative,
                               "bgd: upper bound of sigma, times its initial value (0: none)"),
                 number_option("warn_ratio", 10, {1, 1e30, true}, "bgd: of sigma to its initial value: warn"),
                 number_option("halt_ratio", 100, {1, 1e30, true}, "bgd: of sigma to its initial value: stop")}),
        "eta"),
    make_kind<BgdPosterior>, false};

}  // namespace baton
