// The last layer's weights at the maximum of their posterior: softmax regression on fixed features,
//   J(W) = sum_n -ln softmax(W phi_n)[y_n] + tau / 2 |W - M|^2     (sums over samples, never means)
// by three methods. phi [n][D] and labels on the device; W [C][D] on the host. Real double is the reference; with float
// the products are float, sums over samples and the optimizer's vectors double.
#pragma once
#include <vector>

#include "engine/linalg.h"
#include "kernels/last_layer.h"

namespace baton {

// Rows of features and their labels, in device memory. labels may be null where only features are wanted.
template <class Real>
struct FeatureRows {
  const Real* x;          // [count][dim]
  const int32_t* labels;  // [count]
  int count, dim;
};

enum class MapMethod { newton, lbfgs };

struct MapOptions {
  MapMethod method = MapMethod::newton;
  double tau = 1;                  // prior precision, above 0
  std::vector<double> start;       // [C][D]: where to begin; empty: the prior's mean
  std::vector<double> prior_mean;  // M [C][D]; empty: 0
  // Stops when the largest |gradient| is at most this (times 1 + the largest at W = 0, for data of any scale), or when
  // no step lowers J any more.
  double tolerance = 1e-10;
  double least_decrease = 0;  // L-BFGS: also when J falls by less than this, relative (0: off; SciPy's default 2.2e-9)
  int iterations = 200;
  int memory = 10;  // pairs that L-BFGS keeps
};

struct MapResult {
  std::vector<double> weights;  // [C][D]
  double objective = 0, log_likelihood = 0;
  double gradient = 0;  // the largest |dJ/dW|
  int iterations = 0, evaluations = 0;
  bool converged = false;
};

// Newton: conjugate gradients on H d = -g with H v = sum_n (G_n V phi_n) phi_n' + tau V, stopped early as the gradient
// asks (Eisenstat and Walker), and a backtracking line search. L-BFGS: Nocedal and Wright, algorithm 7.5, with a line
// search for the strong Wolfe conditions. Throws InputError for n = 0, tau <= 0, labels outside [0, classes), features
// that are not finite, or a start of the wrong size; RunError when J stops being finite; Stopped when a signal asks the
// program to end.
template <class Real>
MapResult fit_map(Device&, const FeatureRows<Real>&, int classes, const MapOptions&);

// What the papers mean by retraining: Adam over shuffled batches from given weights, step size `lr` falling to 0 by a
// cosine, for so many epochs, on the mean of a batch's cross-entropy + tau / (2 n) |W|^2. Shuffles by SplitMix64(seed).
struct AdamOptions {
  double tau = 1, lr = 1e-2;
  int epochs = 200, batch = 64;
  uint64_t seed = 0;
  std::vector<double> start;  // empty: 0
};
template <class Real>
MapResult fit_adam(Device&, const FeatureRows<Real>&, int classes, const AdamOptions&);

}  // namespace baton
