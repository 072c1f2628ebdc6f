// The last layer's weights at the maximum of their posterior (MAP): softmax regression on fixed features,
//   J(W) = sum_n -ln softmax(W phi_n)[y_n] + tau / 2 |W - M|^2     (sums over samples, never means)
// by three methods. The features phi [n][D] and labels lie on the device, W [C][D] on the host. Real = double is the
// reference; with float the products are in float, and sums over samples and the optimizer's vectors in double.
#pragma once
#include "trainers/last_layer/rows.h"

namespace baton {

enum class MapMethod { newton, lbfgs };

struct MapOptions {
  MapMethod method = MapMethod::newton;
  double tau = 1;                       // prior precision, above 0
  std::vector<double> start = {};       // [C][D]: where to begin; empty: the prior's mean
  std::vector<double> prior_mean = {};  // M [C][D]; empty: 0
  // The fit stops when the largest |gradient| is at most tolerance times (1 + the largest one at W = 0), which suits
  // data of any scale, or when no step lowers J any more.
  double tolerance = 1e-10;
  double least_decrease = 0;  // L-BFGS stops also when J falls by less than this, relative (0: off; SciPy has 2.2e-9)
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

// Newton: conjugate gradients on H d = -g with H v = sum_n (G_n V phi_n) phi_n' + tau V, stopped as early as the
// gradient allows (Eisenstat and Walker 1996), and a backtracking line search. L-BFGS: Nocedal and Wright, algorithm
// 7.5, with a line search for the strong Wolfe conditions. Throws InputError for no samples, tau <= 0, labels outside
// [0, classes), features that are not finite, and a start of the wrong size; RunError when J stops being finite;
// Stopped when a signal asks the program to end.
template <class Real>
MapResult fit_map(Device&, const FeatureRows<Real>&, int classes, const MapOptions&);

// What the papers mean by retraining: Adam over shuffled batches from given weights, on the mean of a batch's
// cross-entropy + tau / (2 n) |W|^2, for a number of epochs in which the step size falls from `lr` to 0 by a cosine.
// The order of the samples comes from SplitMix64(seed).
struct AdamOptions {
  double tau = 1, lr = 1e-2;
  int epochs = 200, batch = 64;
  uint64_t seed = 0;
  std::vector<double> start = {};  // [C][D]; empty: 0
};
template <class Real>
MapResult fit_adam(Device&, const FeatureRows<Real>&, int classes, const AdamOptions&);

}  // namespace baton
