#include "trainers/last_layer/active_learning.h"

#include <chrono>
#include <limits>

#include "engine/io/stop.h"

namespace baton {

// -------------------------------------------------------------------------------------------------------- look-ahead
namespace {

// The cluster of each row, by Lloyd's algorithm from k-means++ centres. A cluster may be empty.
template <class Real>
std::vector<int> k_means(Device& device, const Candidates<Real>& rows, int clusters, SplitMix64& random) {
  const int n = rows.count, d = rows.dim;
  Scratch::Frame scratch(device);
  Real *norm = scratch.take<Real>(n), *member = scratch.take<Real>(size_t(n) * clusters),
       *overlap = scratch.take<Real>(size_t(n) * clusters), *centre_norm = scratch.take<Real>(clusters),
       *ones = place(device, scratch, std::vector<Real>(n, Real(1)));
  row_dots(norm, Real(1), rows.x, d, rows.x, d, Real(0), n, d, device.stream());
  // Distances of features are those of embeddings with r = 1.
  const std::vector<int> seeds = draw_plus_plus(device, Embeddings<Real>{rows.x, ones, norm, n, d, 1},
                                                int(random.below(uint64_t(n))), clusters, random);
  Real* centre = place_rows(device, scratch, rows.x, seeds, d);
  std::vector<int> cluster(n, -1);
  for (int round = 0; round < 30; round++) {
    row_dots(centre_norm, Real(1), centre, d, centre, d, Real(0), clusters, d, device.stream());
    multiply_packed(device, false, true, n, clusters, d, rows.x, centre, overlap);
    const std::vector<Real> squares = download(device, centre_norm, clusters),
                            products = download(device, overlap, size_t(n) * clusters);
    bool moved = false;
    std::vector<int> size(clusters);
    for (int i = 0; i < n; i++) {
      int nearest = 0;
      double least = std::numeric_limits<double>::infinity();
      for (int k = 0; k < clusters; k++) {
        const double distance = double(squares[k]) - 2 * double(products[size_t(i) * clusters + k]);
        if (distance < least) least = distance, nearest = k;
      }
      moved |= cluster[i] != nearest;
      cluster[i] = nearest, size[nearest]++;
    }
    if (!moved) break;
    std::vector<Real> share(size_t(n) * clusters);
    for (int i = 0; i < n; i++) share[size_t(i) * clusters + cluster[i]] = Real(1. / size[cluster[i]]);
    upload(device, member, share);
    multiply_packed(device, true, false, clusters, d, n, member, rows.x, centre);
  }
  return cluster;
}

// The positions of `trials` batches: in turn a random one, one of each cluster, and one of small margins.
template <class Real>
std::vector<std::vector<int>> draw_trials(Device& device, LastLayer<Real>& layer, const Candidates<Real>& rows,
                                          int batch, int trials, uint64_t seed) {
  const int n = rows.count, classes = layer.classes();
  SplitMix64 random(seed);
  std::vector<std::vector<int>> members(batch);
  if (trials > 1) {
    const std::vector<int> cluster = k_means(device, rows, batch, random);
    for (int i = 0; i < n; i++) members[cluster[i]].push_back(i);
  }
  std::vector<int> unsure;
  if (trials > 2) {
    Scratch::Frame scratch(device);
    Real *p = scratch.take<Real>(size_t(n) * classes), *margin = scratch.take<Real>(n);
    layer.logits(rows.x, n, p);
    softmax_residual<Real>(p, nullptr, nullptr, nullptr, p, nullptr, n, classes, device.stream());
    margins(margin, p, n, classes, device.stream());
    const std::vector<Real> m = download(device, margin, n);
    double mean = 0;
    for (Real v : m) mean += double(v) / n;
    for (int i = 0; i < n; i++)
      if (double(m[i]) < mean) unsure.push_back(i);
  }
  std::vector<std::vector<int>> all(trials);
  for (int t = 0; t < trials; t++) {
    std::vector<int>& picks = all[t];
    std::vector<char> taken(n);
    if (t % 3 == 1) {
      for (const std::vector<int>& m : members)
        if (!m.empty()) picks.push_back(m[random.below(m.size())]);
    } else if (t % 3 == 2) {
      const int count = std::min(batch, int(unsure.size()));
      for (int i : draw_different(int(unsure.size()), count, random)) picks.push_back(unsure[i]);
    }
    for (int i : picks) taken[i] = 1;
    if (int(picks.size()) < batch)  // random, or what clusters and unsure samples leave open
      for (int i : draw_different(n, n, random))
        if (!taken[i] && int(picks.size()) < batch) picks.push_back(i);
  }
  return all;
}

}  // namespace

template <class Real>
std::vector<int> look_ahead_batch(Device& device, LastLayer<Real>& layer, const FeatureRows<Real>& pool,
                                  const std::vector<int>& candidates, int batch, const FeatureRows<Real>& test,
                                  const LookAheadOptions& o) {
  BATON_RANGE("look_ahead_batch");
  const int d = layer.dim(), classes = layer.classes(), passes = o.update.passes, trials = o.trials;
  if (trials < 1) throw InputError("looking ahead takes at least one trial");
  if (passes < 1) throw InputError("at least one pass, not " + std::to_string(passes));
  if (o.update.rule != UpdateRule::implicit) check_gamma(o.update.gamma);
  check_features(device, test, d, "test sample");
  if (test.count < 1) throw InputError("looking ahead needs test samples");
  if (batch > most_update_samples)
    throw InputError("looking ahead takes batches of at most " + std::to_string(most_update_samples) + ", not " +
                     std::to_string(batch));
  download_labels(device, test, classes, "test sample");
  Arena arena;
  const Candidates<Real> rows(device, arena, layer, pool, candidates, batch, true);
  const std::vector<std::vector<int>> picks = draw_trials(device, layer, rows, batch, trials, o.seed);

  // Products of what any trial uses: G = Phi S Phi' and T = Phi S Phi_test'.
  std::vector<int32_t> used, slot(rows.count, -1);
  for (const std::vector<int>& trial : picks)
    for (int i : trial)
      if (slot[i] < 0) slot[i] = int32_t(used.size()), used.push_back(i);
  const int n = int(used.size()), tests = test.count;
  if (int64_t(n) * n > INT32_MAX || int64_t(trials) * batch * batch > INT32_MAX)
    throw InputError("looking ahead: " + std::to_string(trials) + " trials of " + std::to_string(batch) +
                     " samples are too many");
  const Stream stream = device.stream();
  const auto take = [&](size_t r, size_t columns) { return arena.take<Real>(r * columns); };
  const Real* x = place_rows(device, arena, rows.x, used, d);
  Real *z = take(n, d), *logits = take(n, classes), *gram = take(n, n), *test_products = take(n, tests),
       *test_logits = take(tests, classes);
  layer.covariance_products(x, n, z);
  layer.logits(x, n, logits);
  layer.logits(test.x, tests, test_logits);
  multiply_packed(device, false, true, n, n, d, z, x, gram);
  multiply_packed(device, false, true, n, tests, d, z, test.x, test_products);

  // All trials' updates in one launch.
  const size_t b = batch, cases = trials;
  std::vector<int32_t> batch_labels, batch_at, batch_pairs;
  for (const std::vector<int>& trial : picks)
    for (int i : trial) {
      batch_labels.push_back(rows.host_labels[i]);
      batch_at.push_back(slot[i]);
      for (int j : trial) batch_pairs.push_back(slot[i] * n + slot[j]);
    }
  UpdateSteps<Real> steps{};
  steps.gram = place_rows(device, arena, gram, batch_pairs, 1), steps.basis = take(cases, b * b);
  steps.logits = place_rows(device, arena, logits, batch_at, classes), steps.step = take(cases, b * classes);
  steps.downdate = take(cases, passes * b * b), steps.weight = take(cases, passes * b);
  steps.failure = arena.take<int32_t>(cases);
  steps.labels = place(device, arena, batch_labels);
  sequential_steps(steps, o.update.rule, o.update.gamma, passes, batch, classes, trials, stream);

  // W' phi = W phi + step' (U phi): logits of the test set after each trial.
  const int32_t* at = place(device, arena, batch_at);
  Real *near = take(b, tests), *moved = take(tests, classes), *loss = take(tests, 1), *total = take(cases, 1),
       *ones = place(device, arena, std::vector<Real>(tests, Real(1)));
  for (int t = 0; t < trials; t++) {
    gather_rows(near, test_products, at + t * b, batch, tests, stream);
    copy_on_device(device, moved, test_logits, sizeof(Real) * tests * classes);
    multiply_packed(device, true, false, tests, classes, batch, near, steps.step + t * b * classes, moved, 1, 1);
    softmax_residual<Real>(nullptr, nullptr, loss, nullptr, moved, test.labels, tests, classes, stream);
    row_dots(total + t, Real(1), loss, 0, ones, 0, Real(0), 1, tests, stream);
  }
  const std::vector<Real> losses = download(device, total, cases);
  const std::vector<int32_t> failures = download(device, steps.failure, cases);
  int best = -1;
  for (int t = 0; t < trials; t++)
    if (!failures[t] && std::isfinite(losses[t]) && (best < 0 || losses[t] < losses[best])) best = t;
  if (best < 0) throw RunError("looking ahead: no trial's update has finite logits");
  std::vector<int> result;
  for (int i : picks[best]) result.push_back(candidates[i]);
  return result;
}

// ------------------------------------------------------------------------------------------------------- experiments
namespace {

// One of every class in turn, as long as it has any; classes and samples in random order.
std::vector<int> draw_stratified(const std::vector<int32_t>& labels, int classes, int count, uint64_t seed) {
  SplitMix64 random(seed, 0);
  std::vector<std::vector<int>> of_class(classes);
  for (int i : draw_different(int(labels.size()), int(labels.size()), random)) of_class[labels[i]].push_back(i);
  const std::vector<int> order = draw_different(classes, classes, random);
  std::vector<int> result;
  for (size_t round = 0; int(result.size()) < count; round++)
    for (int c : order)
      if (round < of_class[c].size() && int(result.size()) < count) result.push_back(of_class[c][round]);
  return result;
}

}  // namespace

template <class Real>
ActiveLearningCurve run_active_learning(Device& device, const FeatureRows<Real>& pool, const FeatureRows<Real>& test,
                                        int classes, const ActiveLearningOptions& o) {
  const int64_t most = int64_t(o.initial) + int64_t(o.cycles) * o.batch;
  if (o.initial < 1 || o.cycles < 0 || o.batch < 1)
    throw InputError("active learning with " + std::to_string(o.initial) + " initial samples and " +
                     std::to_string(o.cycles) + " batches of " + std::to_string(o.batch));
  if (most > pool.count)
    throw InputError("active learning up to " + std::to_string(most) + " samples from a pool of " +
                     std::to_string(pool.count));
  check_features(device, test, pool.dim, "test sample");
  if (test.count < 1) throw InputError("active learning needs test samples");
  LastLayer<Real> layer(device, pool.dim, classes, o.layer);
  const std::vector<int32_t> labels = download_labels(device, pool, classes, "pool sample"),
                             test_labels = download_labels(device, test, classes, "test sample");

  std::vector<int> labelled = draw_stratified(labels, classes, o.initial, o.seed);
  std::vector<char> known(pool.count);
  for (int i : labelled) known[i] = 1;
  MapOptions fit;  // Newton
  ActiveLearningCurve curve;
  for (int cycle = 0;; cycle++) {
    if (stop_requested()) throw_stopped("the curve under way is not kept");
    const int count = int(labelled.size());
    {
      Scratch::Frame scratch(device);
      const Real* x = place_rows(device, scratch, pool.x, labelled, pool.dim);
      std::vector<int32_t> picked;
      for (int i : labelled) picked.push_back(labels[i]);
      const int32_t* y = place(device, scratch, picked);
      fit.start = layer.fit({x, y, count, pool.dim}, fit).weights;
    }

    const LinkedPredictions made = layer.predict(test.x, test.count, o.selection.link);
    double right = 0, nll = 0;
    for (int i = 0; i < test.count; i++) {
      const auto p = made.probability.begin() + size_t(i) * classes;
      right += std::max_element(p, p + classes) - p == test_labels[i];
      nll -= std::log(std::max(p[test_labels[i]], std::numeric_limits<double>::min()));
    }
    curve.labelled.push_back(count);
    curve.accuracy.push_back(right / test.count);
    curve.nll.push_back(nll / test.count);
    if (cycle == o.cycles) return curve;

    std::vector<int> candidates;
    for (int i = 0; i < pool.count; i++)
      if (!known[i]) candidates.push_back(i);
    device.synchronize();
    const auto start = std::chrono::steady_clock::now();
    std::vector<int> chosen;
    if (o.look_ahead) {
      const uint64_t seed = SplitMix64(o.seed, uint64_t(cycle) + 1).next();
      chosen = look_ahead_batch(device, layer, pool, candidates, o.batch, test, {o.trials, o.selection.update, seed});
    } else {
      SelectionOptions selection = o.selection;
      selection.seed = SplitMix64(selection.seed, uint64_t(cycle)).next();
      chosen = select_batch(device, layer, pool, candidates, o.batch, selection);
    }
    device.synchronize();
    curve.selection_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    for (int i : chosen) labelled.push_back(i), known[i] = 1;
    curve.chosen.push_back(chosen);
  }
}

#define BATON_ACTIVE_LEARNING(Real)                                                                                  \
  template std::vector<int> look_ahead_batch(Device&, LastLayer<Real>&, const FeatureRows<Real>&,                    \
                                             const std::vector<int>&, int, const FeatureRows<Real>&,                 \
                                             const LookAheadOptions&);                                               \
  template ActiveLearningCurve run_active_learning(Device&, const FeatureRows<Real>&, const FeatureRows<Real>&, int, \
                                                   const ActiveLearningOptions&);
BATON_ACTIVE_LEARNING(float)
BATON_ACTIVE_LEARNING(double)

}  // namespace baton
