// Rows of candidates lie gathered on the device, in the order that was given; a choice is a position in them. Scores of
// n rows come to the host at every choice: labels come from there too.
//
// What one choice costs beyond the update of the posterior, O(D^2):
//   margin, entropy, bald   logits n C D, links n C (times the draws), variances by v_i -= kappa (phi_i . s)^2: n D
//   badge                   the same; all at once, without new logits, n (D + C) for the distances to the last pick
//   bait                    n D: see kernels/acquisition.cu
// kappa is taken from the variance of the chosen row itself, v' = v - kappa v^2: right for every rule and number of
// passes.
//
// BAIT: with x_i = sqrt(w_i) phi_i and F = mean over the pool of x x', tr(S F) falls by x'S F S x / (1 + x'S x) when x
// joins and rises by x'S F S x / (1 - x'S x) when it leaves. All at once, S_t = S - A'A + R'R where the rows A =
// sqrt(kappa) s joined and the rows R left, so S itself stays. One after the other, F is that of the weights before the
// first choice (anew it would cost n D^2 a choice); w_i and S follow the posterior.
//
// Random numbers: SplitMix64(seed). random: position t of a Fisher-Yates shuffle from the front. badge all at once: a
// pick after the first is the first row at which the running sum of squared distances (double) exceeds uniform53 times
// their sum.
// An experiment's cycle t selects with the seed SplitMix64(seed, t).next().
#include "trainers/last_layer/active_learning.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <numeric>

#include "engine/error.h"
#include "engine/io/dataset.h"
#include "engine/io/stop.h"
#include "kernels/acquisition.h"

namespace baton {
namespace {

constexpr int chunk_rows = 1024;  // of passes over the whole pool
constexpr int cluster_rounds = 30;

double uniform(SplitMix64& random) { return double(random.next() >> 11) * 0x1p-53; }

// The first `count` of a random order of 0 .. n - 1.
std::vector<int> draw_different(int n, int count, SplitMix64& random) {
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  for (int i = 0; i < count; i++) std::swap(order[i], order[i + int(random.below(uint64_t(n - i)))]);
  order.resize(count);
  return order;
}

[[noreturn]] void not_finite(int candidate) {
  throw InputError("candidate " + std::to_string(candidate) +
                   " has no finite score: its features are badly scaled for this precision");
}

// The first of the largest that is not taken.
template <class Real>
int best_of(const std::vector<Real>& score, const std::vector<char>& taken) {
  int best = -1;
  for (size_t i = 0; i < score.size(); i++) {
    if (!std::isfinite(score[i])) not_finite(int(i));
    if (!taken[i] && (best < 0 || score[i] > score[best])) best = int(i);
  }
  return best;
}

// With probability in proportion to the distances; where nothing is left but copies of what is taken, the first.
template <class Real>
int draw_by_distance(const std::vector<Real>& distance, const std::vector<char>& taken, SplitMix64& random) {
  double sum = 0;
  int last = -1, first = -1;
  for (size_t i = 0; i < distance.size(); i++) {
    if (!std::isfinite(distance[i])) not_finite(int(i));
    if (taken[i]) continue;
    if (first < 0) first = int(i);
    if (distance[i] > 0) last = int(i);
    sum += double(distance[i]);
  }
  const double limit = uniform(random) * sum;
  double running = 0;
  for (size_t i = 0; i < distance.size(); i++) {
    if (taken[i]) continue;
    running += double(distance[i]);
    if (running > limit) return int(i);
  }
  return last >= 0 ? last : first;
}

void check_labels(const std::vector<int32_t>& labels, int classes, const char* whose) {
  for (size_t i = 0; i < labels.size(); i++)
    if (labels[i] < 0 || labels[i] >= classes)
      throw InputError(std::string(whose) + " " + std::to_string(i) + " has label " + std::to_string(labels[i]) +
                       ", the last layer knows classes 0 to " + std::to_string(classes - 1));
}

// The candidates' rows and labels on the device. with_labels: they will be learned.
template <class Real>
struct Candidates {
  Candidates(Device& device, Arena& arena, const LastLayer<Real>& layer, const FeatureRows<Real>& pool,
             const std::vector<int>& candidates, int batch, bool with_labels)
      : count(int(candidates.size())), dim(pool.dim) {
    if (pool.dim != layer.dim())
      throw InputError("the pool's samples have " + std::to_string(pool.dim) + " features, the last layer " +
                       std::to_string(layer.dim()));
    if (batch < 1 || batch > count)
      throw InputError("a batch of " + std::to_string(batch) + " from " + std::to_string(count) + " candidates");
    if (with_labels && !pool.labels) throw InputError("a selection that learns as it chooses needs the pool's labels");
    std::vector<char> there(std::max(pool.count, 0));
    for (int i : candidates) {
      if (i < 0 || i >= pool.count)
        throw InputError("candidate " + std::to_string(i) + " is outside the pool of " + std::to_string(pool.count));
      if (there[i]) throw InputError("candidate " + std::to_string(i) + " is named twice");
      there[i] = 1;
    }
    const std::vector<int32_t> index(candidates.begin(), candidates.end());
    int32_t *at = arena.take<int32_t>(count), *bad = arena.take<int32_t>(count);
    uint64_t* hash = arena.take<uint64_t>(count);
    x = arena.take<Real>(size_t(count) * dim);
    upload(device, at, index);
    gather_rows(x, pool.x, at, count, dim, device.stream());
    inspect_rows(hash, bad, x, count, dim, device.stream());
    const std::vector<int32_t> nonfinite = download(device, bad, count);
    for (int i = 0; i < count; i++)
      if (nonfinite[i]) throw InputError("sample " + std::to_string(index[i]) + " has features that are not finite");
    if (!with_labels) return;
    const std::vector<int32_t> all = download(device, pool.labels, pool.count);
    for (int32_t i : index) host_labels.push_back(all[i]);
    check_labels(host_labels, layer.classes(), "candidate");
    labels = arena.take<int32_t>(count);
    upload(device, labels, host_labels);
  }
  const Real* row(int i) const { return x + size_t(i) * dim; }
  int count, dim;
  Real* x;
  int32_t* labels = nullptr;
  std::vector<int32_t> host_labels;
};

// k-means++ seeding over embeddings, after `first` (Arthur and Vassilvitskii 2007).
template <class Real>
std::vector<int> plus_plus(Device& device, const Embeddings<Real>& e, int first, int count, SplitMix64& random) {
  Scratch::Frame scratch(device);
  Real* distance = scratch.take<Real>(e.n);
  std::vector<int> picks = {first};
  std::vector<char> taken(e.n);
  taken[first] = 1;
  while (int(picks.size()) < count) {
    embedding_distances(distance, e, picks.back(), picks.size() > 1, device.stream());
    picks.push_back(draw_by_distance(download(device, distance, e.n), taken, random));
    taken[picks.back()] = 1;
  }
  return picks;
}

// ---------------------------------------------------------------------------------------------------------- selection
template <class Real>
class Selection {
 public:
  Selection(Device& device, LastLayer<Real>& layer, const FeatureRows<Real>& pool, const std::vector<int>& candidates,
            int batch, const SelectionOptions& options)
      : device_(device),
        layer_(layer),
        o_(options),
        batch_(batch),
        rows_(device, arena_, layer, pool, candidates, batch, options.sequential),
        n_(rows_.count),
        dim_(rows_.dim),
        classes_(layer.classes()),
        random_(options.seed),
        taken_(n_) {
    const bool bald = o_.acquisition == Acquisition::bald, bait = o_.acquisition == Acquisition::bait;
    link_ = bald ? Link::monte_carlo : o_.link.link;
    if (link_ == Link::monte_carlo && o_.link.draws < 1)
      throw InputError("Monte Carlo predictions need at least one draw");
    if (o_.acquisition == Acquisition::random) return;
    const size_t n = n_, d = dim_, c = classes_;
    v_ = arena_.take<Real>(n);
    logits_ = arena_.take<Real>(n * c);
    score_ = arena_.take<Real>(n);
    s_ = arena_.take<Real>(d), fs_ = arena_.take<Real>(d), u_ = arena_.take<Real>(d), number_ = arena_.take<Real>(1);
    if (bait) {
      w_ = arena_.take<Real>(n);
      f_ = arena_.take<Real>(n);
      prepare_fisher(pool);
      return;
    }
    p_ = arena_.take<Real>(n * c);
    entropy_ = arena_.take<Real>(n);
    if (link_ == Link::monte_carlo) {
      normals_ = arena_.take<Real>(size_t(o_.link.draws) * c);
      fill_normals(normals_, o_.link.draws * classes_, key_of(o_.link.seed, 13), device.stream());
    }
    if (link_ != Link::map) layer.variances(rows_.x, n_, v_);
    if (o_.acquisition == Acquisition::badge) {
      r_ = arena_.take<Real>(n * c);
      norm_ = arena_.take<Real>(n);
      size_ = arena_.take<Real>(n);
      row_dots(norm_, Real(1), rows_.x, d, rows_.x, d, Real(0), n_, dim_, device.stream());
    }
  }

  std::vector<int> at_once() {
    switch (o_.acquisition) {
      case Acquisition::random:
        return draw_different(n_, batch_, random_);
      case Acquisition::badge: {
        const Embeddings<Real> e = embeddings();
        return plus_plus(device_, e, largest(e), batch_, random_);
      }
      case Acquisition::bait:
        return forward_backward();
      default:
        break;
    }
    const std::vector<Real> score = scores();
    best_of(score, taken_);  // are they finite?
    std::vector<int> order(n_);
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + batch_, order.end(),
                      [&](int a, int b) { return score[a] != score[b] ? score[a] > score[b] : a < b; });
    order.resize(batch_);
    return order;
  }

  std::vector<int> one_by_one() {
    if (o_.acquisition == Acquisition::random) {
      picks_ = draw_different(n_, batch_, random_);
      for (int k : picks_) learn(k, false);
      return picks_;
    }
    while (int(picks_.size()) < batch_) {
      const int k = next();
      picks_.push_back(k), taken_[k] = 1;
      learn(k, int(picks_.size()) < batch_);
    }
    return picks_;
  }

 private:
  void predict(Real* information) {
    layer_.logits(rows_.x, n_, logits_);
    link_probabilities<Real>(
        {p_, entropy_, information, logits_, link_ == Link::map ? nullptr : v_, normals_, nullptr, false}, link_,
        o_.link.lambda, o_.link.draws, n_, classes_, device_.stream());
  }
  // Higher is better.
  std::vector<Real> scores() {
    const bool bald = o_.acquisition == Acquisition::bald;
    predict(bald ? score_ : nullptr);
    if (bald || o_.acquisition == Acquisition::entropy) return download(device_, bald ? score_ : entropy_, n_);
    margins(score_, p_, n_, classes_, device_.stream());
    std::vector<Real> score = download(device_, score_, n_);
    for (Real& v : score) v = -v;
    return score;
  }
  Embeddings<Real> embeddings() {
    predict(nullptr);
    gradient_embeddings(r_, size_, p_, norm_, n_, classes_, device_.stream());
    return {rows_.x, r_, size_, n_, dim_, classes_};
  }
  int largest(const Embeddings<Real>& e) { return best_of(download(device_, e.size, n_), taken_); }
  void weigh() {
    layer_.logits(rows_.x, n_, logits_);
    softmax_residual<Real>(nullptr, nullptr, nullptr, w_, logits_, nullptr, n_, classes_, device_.stream());
  }

  int next() {
    if (o_.acquisition == Acquisition::badge) return largest(embeddings());
    if (o_.acquisition != Acquisition::bait) return best_of(scores(), taken_);
    weigh();
    fisher_scores(score_, f_, v_, w_, false, n_, device_.stream());
    return best_of(download(device_, score_, n_), taken_);
  }

  double number(const Real* at) { return double(download(device_, at, 1)[0]); }
  // s' F s on the host, F s on the device.
  double fisher_form(const Real* s) {
    multiply(device_, false, false, 1, dim_, dim_, Real(1), s, dim_, fisher_, dim_, Real(0), fs_, dim_);
    row_dots(number_, Real(1), fs_, 0, s, 0, Real(0), 1, dim_, device_.stream());
    return number(number_);
  }

  // Shows the layer row k; with `follow`, what is known of the other rows stays that of the posterior.
  void learn(int k, bool follow) {
    UpdateOptions update = o_.update;
    update.duplicates = true;  // a pool may hold equal samples
    const FeatureRows<Real> sample = {rows_.row(k), rows_.labels + k, 1, dim_};
    const bool bait = o_.acquisition == Acquisition::bait;
    follow = follow && (bait || link_ != Link::map);
    double v = 0, q = 0;
    if (follow) {
      v = number(v_ + k);
      layer_.covariance_products(sample.x, 1, s_);
      if (bait) {
        q = fisher_form(s_);
        layer_.covariance_products(fs_, 1, u_);
      }
    }
    const int64_t refactored = layer_.refactored();
    layer_.update(sample, update);
    if (!follow || !(v > 0)) return;
    if (layer_.refactored() != refactored) {  // S is not the old one less s s'
      if (bait) measure();
      else layer_.variances(rows_.x, n_, v_);
      return;
    }
    layer_.variances(sample.x, 1, number_);
    const double kappa = (v - number(number_)) / (v * v);
    downdate_rows(v_, bait ? f_ : nullptr, rows_.x, s_, u_, Real(kappa), Real(q), n_, dim_, device_.stream());
  }

  // ------------------------------------------------------------------------------------------------------------ BAIT
  void prepare_fisher(const FeatureRows<Real>& pool) {
    const size_t d = dim_;
    fisher_ = arena_.take<Real>(d * d);
    Scratch::Frame scratch(device_);
    const int most = std::min(chunk_rows, pool.count);
    Real *scaled = scratch.take<Real>(most * d), *weight = scratch.take<Real>(most),
         *logits = scratch.take<Real>(size_t(most) * classes_);
    for (int first = 0; first < pool.count; first += most) {
      const int count = std::min(most, pool.count - first);
      const Real* x = pool.x + first * d;
      layer_.logits(x, count, logits);
      softmax_residual<Real>(nullptr, nullptr, nullptr, weight, logits, nullptr, count, classes_, device_.stream());
      scale_rows(scaled, x, weight, count, dim_, device_.stream());
      rank_update(device_, true, dim_, count, Real(1. / pool.count), scaled, dim_, Real(first ? 1 : 0), fisher_, dim_);
    }
    mirror_lower(fisher_, dim_, dim_, device_.stream());
    measure();
  }
  // v = phi'S phi and f = phi'S F S phi of all candidates.
  void measure() {
    const size_t d = dim_;
    const int most = std::min(chunk_rows, n_);
    Scratch::Frame scratch(device_);
    Real *z = scratch.take<Real>(most * d), *zf = scratch.take<Real>(most * d);
    for (int first = 0; first < n_; first += most) {
      const int count = std::min(most, n_ - first);
      layer_.covariance_products(rows_.row(first), count, z);
      multiply(device_, false, false, count, dim_, dim_, Real(1), z, dim_, fisher_, dim_, Real(0), zf, dim_);
      row_dots(v_ + first, Real(1), rows_.row(first), d, z, d, Real(0), count, dim_, device_.stream());
      row_dots(f_ + first, Real(1), zf, d, z, d, Real(0), count, dim_, device_.stream());
    }
  }

  std::vector<int> forward_backward() {
    const size_t d = dim_;
    const int most = int(std::min<int64_t>(2 * int64_t(batch_), n_));
    Scratch::Frame scratch(device_);
    Real *joined = scratch.take<Real>(most * d), *left = scratch.take<Real>((most - batch_) * d),
         *overlap = scratch.take<Real>(most), *scale = scratch.take<Real>(1);
    int joins = 0, leaves = 0;
    const auto times_s = [&](const Real* x, Real* out) {  // of the posterior with what joined and left
      layer_.covariance_products(x, 1, out);
      const auto add = [&](const Real* rows, int count, Real sign) {
        if (!count) return;
        row_dots(overlap, Real(1), rows, d, x, 0, Real(0), count, dim_, device_.stream());
        multiply(device_, false, false, 1, dim_, count, sign, overlap, count, rows, dim_, Real(1), out, dim_);
      };
      add(joined, joins, Real(-1));
      add(left, leaves, Real(1));
    };
    // Row x of weight w and variance v joins or leaves; v_ and f_ of `count` rows from `all` on follow.
    const auto move = [&](const Real* x, double w, double v, bool removal, const Real* all, Real* variance, Real* f,
                          int count) {
      const double kappa = w / (removal ? 1 - w * v : 1 + w * v);
      times_s(x, s_);
      const double q = fisher_form(s_);
      times_s(fs_, u_);
      downdate_rows(variance, f, all, s_, u_, Real(removal ? -kappa : kappa), Real(q), count, dim_, device_.stream());
      upload(device_, scale, std::vector<Real>{Real(kappa)});
      scale_rows((removal ? left + leaves++ * d : joined + joins++ * d), s_, scale, 1, dim_, device_.stream());
    };

    weigh();
    const std::vector<Real> weight = download(device_, w_, n_);
    while (int(picks_.size()) < most) {
      fisher_scores(score_, f_, v_, w_, false, n_, device_.stream());
      const int k = best_of(download(device_, score_, n_), taken_);
      picks_.push_back(k), taken_[k] = 1;
      move(rows_.row(k), double(weight[k]), number(v_ + k), false, rows_.x, v_, f_, n_);
    }

    // Backward among the picks alone.
    std::vector<int> kept(most);  // positions in picks_
    std::iota(kept.begin(), kept.end(), 0);
    Real *x = scratch.take<Real>(most * d), *v = scratch.take<Real>(most), *f = scratch.take<Real>(most),
         *w = scratch.take<Real>(most);
    int32_t* index = scratch.take<int32_t>(most);
    upload(device_, index, std::vector<int32_t>(picks_.begin(), picks_.end()));
    gather_rows(x, rows_.x, index, most, dim_, device_.stream());
    gather_rows(v, v_, index, most, 1, device_.stream());
    gather_rows(f, f_, index, most, 1, device_.stream());
    gather_rows(w, w_, index, most, 1, device_.stream());
    while (int(kept.size()) > batch_) {
      fisher_scores(score_, f, v, w, true, most, device_.stream());
      const std::vector<Real> rise = download(device_, score_, most);
      // Where rounding left 1 - w v at 0 or below, nothing else knows this direction: the last to leave.
      const auto cost = [&](int i) { return rise[i] >= 0 ? double(rise[i]) : std::numeric_limits<double>::infinity(); };
      const auto least = std::min_element(kept.begin(), kept.end(), [&](int a, int b) { return cost(a) < cost(b); });
      const int i = *least;
      kept.erase(least);
      if (int(kept.size()) > batch_) move(x + i * d, double(weight[picks_[i]]), number(v + i), true, x, v, f, most);
    }
    std::vector<int> result;
    for (int i : kept) result.push_back(picks_[i]);
    return result;
  }

  Device& device_;
  LastLayer<Real>& layer_;
  const SelectionOptions& o_;
  int batch_;
  Arena arena_;
  Candidates<Real> rows_;
  int n_, dim_, classes_;
  SplitMix64 random_;
  Link link_;
  std::vector<char> taken_;
  std::vector<int> picks_;
  Real *v_ = nullptr, *logits_ = nullptr, *p_ = nullptr, *entropy_ = nullptr, *score_ = nullptr, *normals_ = nullptr;
  Real *s_ = nullptr, *fs_ = nullptr, *u_ = nullptr, *number_ = nullptr;  // S phi_k, F s, S F s
  Real *r_ = nullptr, *norm_ = nullptr, *size_ = nullptr;                 // BADGE
  Real *fisher_ = nullptr, *w_ = nullptr, *f_ = nullptr;                  // BAIT: F, p_max (1 - p_max), phi'S F S phi
};

}  // namespace

const char* name_of(Acquisition a) {
  switch (a) {
    case Acquisition::random:
      return "random";
    case Acquisition::margin:
      return "margin";
    case Acquisition::entropy:
      return "entropy";
    case Acquisition::bald:
      return "bald";
    case Acquisition::badge:
      return "badge";
    case Acquisition::bait:
      return "bait";
  }
  return "";
}

Acquisition acquisition_of(const std::string& name) {
  std::string known;
  for (Acquisition a : {Acquisition::random, Acquisition::margin, Acquisition::entropy, Acquisition::bald,
                        Acquisition::badge, Acquisition::bait}) {
    if (name == name_of(a)) return a;
    known += (known.empty() ? "" : ", ") + std::string(name_of(a));
  }
  throw InputError("unknown acquisition function '" + name + "': one of " + known);
}

template <class Real>
std::vector<int> select_batch(Device& device, LastLayer<Real>& layer, const FeatureRows<Real>& pool,
                              const std::vector<int>& candidates, int batch, const SelectionOptions& options) {
  BATON_RANGE("select_batch");
  Selection<Real> selection(device, layer, pool, candidates, batch, options);
  std::vector<int> picks = options.sequential ? selection.one_by_one() : selection.at_once();
  for (int& k : picks) k = candidates[k];
  return picks;
}

// ---------------------------------------------------------------------------------------------------------- look-ahead
namespace {

// Clusters of the rows by Lloyd's algorithm from k-means++ centres: a cluster for each row. Empty ones may be.
template <class Real>
std::vector<int> k_means(Device& device, const Candidates<Real>& rows, int clusters, SplitMix64& random) {
  const int n = rows.count, d = rows.dim;
  Scratch::Frame scratch(device);
  Real *ones = scratch.take<Real>(n), *norm = scratch.take<Real>(n), *centre = scratch.take<Real>(size_t(clusters) * d),
       *member = scratch.take<Real>(size_t(n) * clusters), *overlap = scratch.take<Real>(size_t(n) * clusters),
       *centre_norm = scratch.take<Real>(clusters);
  int32_t* index = scratch.take<int32_t>(clusters);
  upload(device, ones, std::vector<Real>(n, Real(1)));
  row_dots(norm, Real(1), rows.x, d, rows.x, d, Real(0), n, d, device.stream());
  // Distances of features are those of embeddings with r = 1.
  const std::vector<int> seeds = plus_plus(device, Embeddings<Real>{rows.x, ones, norm, n, d, 1},
                                           int(random.below(uint64_t(n))), clusters, random);
  upload(device, index, std::vector<int32_t>(seeds.begin(), seeds.end()));
  gather_rows(centre, rows.x, index, clusters, d, device.stream());
  std::vector<int> cluster(n, -1);
  for (int round = 0; round < cluster_rounds; round++) {
    row_dots(centre_norm, Real(1), centre, d, centre, d, Real(0), clusters, d, device.stream());
    multiply(device, false, true, n, clusters, d, Real(1), rows.x, d, centre, d, Real(0), overlap, clusters);
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
    multiply(device, true, false, clusters, d, n, Real(1), member, clusters, rows.x, d, Real(0), centre, d);
  }
  return cluster;
}

// Positions of `trials` batches: in turn random, one of each cluster, and of small margin.
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
  if (o.update.rule != UpdateRule::implicit && (!(o.update.gamma > 0) || !std::isfinite(o.update.gamma)))
    throw InputError("gamma must be positive, not " + std::to_string(o.update.gamma));
  if (test.dim != d)
    throw InputError("the test samples have " + std::to_string(test.dim) + " features, the last layer " +
                     std::to_string(d));
  if (test.count < 1 || !test.labels) throw InputError("looking ahead needs test samples and their labels");
  if (batch > most_update_samples)
    throw InputError("looking ahead takes batches of at most " + std::to_string(most_update_samples) + ", not " +
                     std::to_string(batch));
  check_labels(download(device, test.labels, test.count), classes, "test sample");
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
  Real *x = arena.take<Real>(size_t(n) * d), *z = arena.take<Real>(size_t(n) * d),
       *logits = arena.take<Real>(size_t(n) * classes), *gram = arena.take<Real>(size_t(n) * n),
       *test_products = arena.take<Real>(size_t(n) * tests), *test_logits = arena.take<Real>(size_t(tests) * classes);
  int32_t* index = arena.take<int32_t>(n);
  upload(device, index, used);
  gather_rows(x, rows.x, index, n, d, stream);
  layer.covariance_products(x, n, z);
  layer.logits(x, n, logits);
  layer.logits(test.x, tests, test_logits);
  multiply(device, false, true, n, n, d, Real(1), z, d, x, d, Real(0), gram, n);
  multiply(device, false, true, n, tests, d, Real(1), z, d, test.x, d, Real(0), test_products, tests);

  // All trials' updates in one launch.
  const size_t b = batch, cases = trials;
  UpdateSteps<Real> steps{};
  steps.gram = arena.take<Real>(cases * b * b), steps.basis = arena.take<Real>(cases * b * b);
  steps.logits = arena.take<Real>(cases * b * classes), steps.step = arena.take<Real>(cases * b * classes);
  steps.downdate = arena.take<Real>(cases * passes * b * b), steps.weight = arena.take<Real>(cases * passes * b);
  steps.failure = arena.take<int32_t>(cases);
  int32_t *labels = arena.take<int32_t>(cases * b), *at = arena.take<int32_t>(cases * b),
          *pairs = arena.take<int32_t>(cases * b * b);
  std::vector<int32_t> batch_labels, batch_at, batch_pairs;
  for (const std::vector<int>& trial : picks)
    for (int i : trial) {
      batch_labels.push_back(rows.host_labels[i]);
      batch_at.push_back(slot[i]);
      for (int j : trial) batch_pairs.push_back(slot[i] * n + slot[j]);
    }
  upload(device, labels, batch_labels);
  upload(device, at, batch_at);
  upload(device, pairs, batch_pairs);
  gather_rows(steps.gram, gram, pairs, int(cases * b * b), 1, stream);
  gather_rows(steps.logits, logits, at, int(cases * b), classes, stream);
  steps.labels = labels;
  sequential_steps(steps, o.update.rule, o.update.gamma, passes, batch, classes, trials, stream);

  // W' phi = W phi + step' (U phi): logits of the test set after each trial.
  Real *near = arena.take<Real>(b * tests), *moved = arena.take<Real>(size_t(tests) * classes),
       *loss = arena.take<Real>(tests), *ones = arena.take<Real>(tests), *total = arena.take<Real>(cases);
  upload(device, ones, std::vector<Real>(tests, Real(1)));
  for (int t = 0; t < trials; t++) {
    gather_rows(near, test_products, at + t * b, batch, tests, stream);
    copy_on_device(device, moved, test_logits, sizeof(Real) * tests * classes);
    multiply(device, true, false, tests, classes, batch, Real(1), near, tests, steps.step + t * b * classes, classes,
             Real(1), moved, classes);
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

// --------------------------------------------------------------------------------------------------------- experiments
namespace {

// One of every class in turn, as long as it has any; classes and samples in random order.
std::vector<int> stratified(const std::vector<int32_t>& labels, int classes, int count, uint64_t seed) {
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
                                        int classes, const ActiveLearningPlan& plan) {
  const int64_t most = int64_t(plan.initial) + int64_t(plan.cycles) * plan.batch;
  if (plan.initial < 1 || plan.cycles < 0 || plan.batch < 1)
    throw InputError("active learning with " + std::to_string(plan.initial) + " initial samples and " +
                     std::to_string(plan.cycles) + " batches of " + std::to_string(plan.batch));
  if (most > pool.count)
    throw InputError("active learning up to " + std::to_string(most) + " samples from a pool of " +
                     std::to_string(pool.count));
  if (test.dim != pool.dim)
    throw InputError("the test samples have " + std::to_string(test.dim) + " features, the pool's " +
                     std::to_string(pool.dim));
  if (test.count < 1 || !test.labels || !pool.labels)
    throw InputError("active learning needs labels, and test samples");
  LastLayer<Real> layer(device, pool.dim, classes, plan.layer);
  const std::vector<int32_t> labels = download(device, pool.labels, pool.count),
                             test_labels = download(device, test.labels, test.count);
  check_labels(labels, classes, "pool sample");
  check_labels(test_labels, classes, "test sample");

  Arena arena;
  Real* x = arena.take<Real>(size_t(most) * pool.dim);
  int32_t *y = arena.take<int32_t>(most), *index = arena.take<int32_t>(most);
  std::vector<int> labelled = stratified(labels, classes, plan.initial, plan.seed);
  std::vector<char> known(pool.count);
  for (int i : labelled) known[i] = 1;
  MapOptions fit;  // Newton
  ActiveLearningCurve curve;
  for (int cycle = 0;; cycle++) {
    if (stop_requested()) throw_stopped("the curve under way is not kept");
    const int count = int(labelled.size());
    std::vector<int32_t> picked;
    for (int i : labelled) picked.push_back(labels[i]);
    upload(device, y, picked);
    upload(device, index, std::vector<int32_t>(labelled.begin(), labelled.end()));
    gather_rows(x, pool.x, index, count, pool.dim, device.stream());
    fit.start = layer.fit({x, y, count, pool.dim}, fit).weights;

    const LinkedPredictions made = layer.predict(test.x, test.count, plan.selection.link);
    double right = 0, nll = 0;
    for (int i = 0; i < test.count; i++) {
      const auto p = made.probability.begin() + size_t(i) * classes;
      right += std::max_element(p, p + classes) - p == test_labels[i];
      nll -= std::log(std::max(p[test_labels[i]], std::numeric_limits<double>::min()));
    }
    curve.labelled.push_back(count);
    curve.accuracy.push_back(right / test.count);
    curve.nll.push_back(nll / test.count);
    if (cycle == plan.cycles) return curve;

    std::vector<int> candidates;
    for (int i = 0; i < pool.count; i++)
      if (!known[i]) candidates.push_back(i);
    device.synchronize();
    const auto start = std::chrono::steady_clock::now();
    std::vector<int> chosen;
    if (plan.look_ahead) {
      const LookAheadOptions o = {plan.trials, plan.selection.update,
                                  SplitMix64(plan.seed, uint64_t(cycle) + 1).next()};
      chosen = look_ahead_batch(device, layer, pool, candidates, plan.batch, test, o);
    } else {
      SelectionOptions o = plan.selection;
      o.seed = SplitMix64(o.seed, uint64_t(cycle)).next();
      chosen = select_batch(device, layer, pool, candidates, plan.batch, o);
    }
    device.synchronize();
    curve.selection_seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    for (int i : chosen) labelled.push_back(i), known[i] = 1;
    curve.chosen.push_back(chosen);
  }
}

#define BATON_ACTIVE_LEARNING(Real)                                                                                    \
  template std::vector<int> select_batch(Device&, LastLayer<Real>&, const FeatureRows<Real>&, const std::vector<int>&, \
                                         int, const SelectionOptions&);                                                \
  template std::vector<int> look_ahead_batch(Device&, LastLayer<Real>&, const FeatureRows<Real>&,                      \
                                             const std::vector<int>&, int, const FeatureRows<Real>&,                   \
                                             const LookAheadOptions&);                                                 \
  template ActiveLearningCurve run_active_learning(Device&, const FeatureRows<Real>&, const FeatureRows<Real>&, int,   \
                                                   const ActiveLearningPlan&);
BATON_ACTIVE_LEARNING(float)
BATON_ACTIVE_LEARNING(double)

}  // namespace baton
