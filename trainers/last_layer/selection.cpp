// What one choice costs beyond the update of the posterior, O(D^2), with n candidates whose scores come to the host:
//   margin, entropy, bald   logits n C D, links n C (times the draws), variances by v_i -= kappa (phi_i . s)^2: n D
//   badge                   the same; all at once, without new logits, n (D + C) for the distances to the last pick
//   bait                    n D: see kernels/acquisition.cu
// kappa follows from the chosen row's own variance, v' = v - kappa v^2, for every rule and number of passes.
//
// BAIT: with x_i = sqrt(w_i) phi_i and F the mean over the pool of x x', tr(S F) falls by x'S F S x / (1 + x'S x) when
// x joins, and rises by x'S F S x / (1 - x'S x) when it leaves. All at once, S itself stays, and S_t = S - A'A + R'R
// where the rows A = sqrt(kappa) s joined and the rows R left. One after the other, w_i and S follow the posterior, but
// F stays that of the weights before the first choice, since a new F would cost n D^2.
#include "trainers/last_layer/selection.h"

#include <limits>

namespace baton {
namespace {

constexpr int chunk_rows = 1024;  // of passes over all candidates

template <class Real>
void check_scores(const std::vector<Real>& score) {
  for (size_t i = 0; i < score.size(); i++)
    if (!std::isfinite(score[i]))
      throw InputError("candidate " + std::to_string(i) +
                       " has no finite score: its features are badly scaled for this precision");
}

// The first of the largest that is not taken.
template <class Real>
int best_of(const std::vector<Real>& score, const std::vector<char>& taken) {
  check_scores(score);
  int best = -1;
  for (size_t i = 0; i < score.size(); i++)
    if (!taken[i] && (best < 0 || score[i] > score[best])) best = int(i);
  return best;
}

// A row that is not taken, with probability in proportion to its distance (see draw_plus_plus).
template <class Real>
int draw_by_distance(const std::vector<Real>& distance, const std::vector<char>& taken, SplitMix64& random) {
  check_scores(distance);
  double sum = 0;
  for (size_t i = 0; i < distance.size(); i++) sum += taken[i] ? 0 : double(distance[i]);
  const double limit = double(random.next() >> 11) * 0x1p-53 * sum;
  double running = 0;
  int last = -1, first = -1;
  for (size_t i = 0; i < distance.size(); i++) {
    if (taken[i]) continue;
    if (first < 0) first = int(i);
    if (distance[i] > 0) last = int(i);
    running += double(distance[i]);
    if (running > limit) return int(i);
  }
  return last >= 0 ? last : first;
}

template <class Real>
class Selector {
 public:
  Selector(Device& device, LastLayer<Real>& layer, const FeatureRows<Real>& pool, const std::vector<int>& candidates,
           int batch, const SelectionOptions& options)
      : device_(device),
        layer_(layer),
        o_(options),
        batch_(batch),
        rows_(device, arena_, layer, pool, candidates, batch, options.sequential) {
    link_ = o_.acquisition == Acquisition::bald ? Link::monte_carlo : o_.link.link;
    if (link_ == Link::monte_carlo && o_.link.draws < 1)
      throw InputError("Monte Carlo predictions need at least one draw");
    if (o_.acquisition == Acquisition::random) return;
    const auto take = [&](size_t rows, size_t columns) { return arena_.template take<Real>(rows * columns); };
    v_ = take(n_, 1), logits_ = take(n_, classes_), score_ = take(n_, 1);
    s_ = take(dim_, 1), fs_ = take(dim_, 1), u_ = take(dim_, 1), number_ = take(1, 1);
    if (bait()) {
      w_ = take(n_, 1), f_ = take(n_, 1);
      fisher_ = take(dim_, dim_);
      layer.add_curvature(pool.x, pool.count, SampleWeight::categorical, Real(1. / pool.count), fisher_);
      measure();
      return;
    }
    p_ = take(n_, classes_), entropy_ = take(n_, 1);
    if (link_ == Link::monte_carlo) {
      normals_ = take(o_.link.draws, classes_);
      fill_normals(normals_, o_.link.draws * classes_, key_of(o_.link.seed, 13), device.stream());
    }
    if (link_ != Link::map) layer.variances(rows_.x, n_, v_);
    if (o_.acquisition == Acquisition::badge) {
      r_ = take(n_, classes_), norm_ = take(n_, 1), size_ = take(n_, 1);
      row_dots(norm_, Real(1), rows_.x, dim_, rows_.x, dim_, Real(0), n_, dim_, device.stream());
    }
  }

  std::vector<int> choose() {
    if (o_.acquisition == Acquisition::random) {
      picks_ = draw_different(n_, batch_, random_);
      for (int k : picks_)
        if (o_.sequential) learn(k, false);
    } else if (o_.sequential) {
      while (int(picks_.size()) < batch_) {
        pick(next());
        learn(picks_.back(), int(picks_.size()) < batch_);
      }
    } else if (bait()) {
      return forward_backward();
    } else if (o_.acquisition == Acquisition::badge) {
      const Embeddings<Real> e = embeddings();
      return draw_plus_plus(device_, e, largest(e), batch_, random_);
    } else {
      const std::vector<Real> score = scores();
      while (int(picks_.size()) < batch_) pick(best_of(score, taken_));
    }
    return picks_;
  }

 private:
  bool bait() const { return o_.acquisition == Acquisition::bait; }
  void pick(int k) { picks_.push_back(k), taken_[k] = 1; }
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
  // The curvature weights w of all candidates.
  void weigh() {
    layer_.logits(rows_.x, n_, logits_);
    softmax_residual<Real>(nullptr, nullptr, nullptr, w_, logits_, nullptr, n_, classes_, device_.stream());
  }

  int best_by_fisher() {
    fisher_scores(score_, f_, v_, w_, false, n_, device_.stream());
    return best_of(download(device_, score_, n_), taken_);
  }
  int next() {
    if (o_.acquisition == Acquisition::badge) return largest(embeddings());
    if (!bait()) return best_of(scores(), taken_);
    weigh();
    return best_by_fisher();
  }

  double number(const Real* at) { return double(download(device_, at, 1)[0]); }
  // s' F s on the host, F s on the device.
  double fisher_form(const Real* s) {
    multiply_packed(device_, false, false, 1, dim_, dim_, s, fisher_, fs_);
    row_dots(number_, Real(1), fs_, 0, s, 0, Real(0), 1, dim_, device_.stream());
    return number(number_);
  }

  // Lets the layer learn row k. With `follow`, the other rows' variances, and BAIT's f, follow the posterior.
  void learn(int k, bool follow) {
    LastLayerUpdateOptions update = o_.update;
    update.duplicates = true;  // a pool may hold equal samples
    const FeatureRows<Real> sample = {rows_.row(k), rows_.labels + k, 1, dim_};
    follow = follow && (bait() || link_ != Link::map);
    double v = 0, q = 0;
    if (follow) {
      v = number(v_ + k);
      layer_.covariance_products(sample.x, 1, s_);
      if (bait()) {
        q = fisher_form(s_);
        layer_.covariance_products(fs_, 1, u_);
      }
    }
    const int64_t refactored = layer_.refactored();
    layer_.update(sample, update);
    if (!follow || !(v > 0)) return;
    if (layer_.refactored() != refactored) {  // S is not the old one less s s'
      if (bait()) measure();
      else layer_.variances(rows_.x, n_, v_);
      return;
    }
    layer_.variances(sample.x, 1, number_);
    const double kappa = (v - number(number_)) / (v * v);
    downdate_rows(v_, f_, rows_.x, s_, u_, Real(kappa), Real(q), n_, dim_, device_.stream());
  }

  // ------------------------------------------------------------------------------------------------------------ BAIT
  // Computes v = phi'S phi and f = phi'S F S phi of all candidates.
  void measure() {
    const size_t d = dim_;
    const int most = std::min(chunk_rows, n_);
    Scratch::Frame scratch(device_);
    Real *z = scratch.take<Real>(most * d), *zf = scratch.take<Real>(most * d);
    for (int first = 0; first < n_; first += most) {
      const int count = std::min(most, n_ - first);
      layer_.covariance_products(rows_.row(first), count, z);
      multiply_packed(device_, false, false, count, dim_, dim_, z, fisher_, zf);
      row_dots(v_ + first, Real(1), rows_.row(first), d, z, d, Real(0), count, dim_, device_.stream());
      row_dots(f_ + first, Real(1), zf, d, z, d, Real(0), count, dim_, device_.stream());
    }
  }

  std::vector<int> forward_backward() {
    const size_t d = dim_;
    const int most = int(std::min<int64_t>(2 * int64_t(batch_), n_));
    Scratch::Frame scratch(device_);
    Real *joined = scratch.take<Real>(most * d), *left = scratch.take<Real>((most - batch_) * d),
         *overlap = scratch.take<Real>(most);
    int joins = 0, leaves = 0;
    const auto times_s = [&](const Real* x, Real* out) {  // S x, where S is the posterior's with what joined and left
      layer_.covariance_products(x, 1, out);
      const auto add = [&](const Real* rows, int count, Real sign) {
        if (!count) return;
        row_dots(overlap, Real(1), rows, d, x, 0, Real(0), count, dim_, device_.stream());
        multiply_packed(device_, false, false, 1, dim_, count, overlap, rows, out, sign, 1);
      };
      add(joined, joins, Real(-1));
      add(left, leaves, Real(1));
    };
    // Row x with weight w and variance v joins or leaves; `variance` and `f` of the `count` rows `all` follow.
    const auto move = [&](const Real* x, double w, double v, bool removal, const Real* all, Real* variance, Real* f,
                          int count) {
      const double kappa = w / (removal ? 1 - w * v : 1 + w * v);
      times_s(x, s_);
      const double q = fisher_form(s_);
      times_s(fs_, u_);
      downdate_rows(variance, f, all, s_, u_, Real(removal ? -kappa : kappa), Real(q), count, dim_, device_.stream());
      upload(device_, number_, {Real(kappa)});
      scale_rows((removal ? left + leaves++ * d : joined + joins++ * d), s_, number_, 1, dim_, device_.stream());
    };

    weigh();
    const std::vector<Real> weight = download(device_, w_, n_);
    while (int(picks_.size()) < most) {
      const int k = best_by_fisher();
      pick(k);
      move(rows_.row(k), double(weight[k]), number(v_ + k), false, rows_.x, v_, f_, n_);
    }

    // Backward among the picks alone.
    std::vector<int> kept(most);  // positions in picks_
    std::iota(kept.begin(), kept.end(), 0);
    const Real *x = place_rows(device_, scratch, rows_.x, picks_, dim_),
               *w = place_rows(device_, scratch, w_, picks_, 1);
    Real *v = place_rows(device_, scratch, v_, picks_, 1), *f = place_rows(device_, scratch, f_, picks_, 1);
    while (int(kept.size()) > batch_) {
      fisher_scores(score_, f, v, w, true, most, device_.stream());
      const std::vector<Real> rise = download(device_, score_, most);
      // Where rounding has left 1 - w v at 0 or below, no other row knows this direction, so it is the last to leave.
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
  const int n_ = rows_.count, dim_ = rows_.dim, classes_ = layer_.classes();
  SplitMix64 random_{o_.seed};
  Link link_;
  std::vector<char> taken_ = std::vector<char>(n_);
  std::vector<int> picks_;
  Real *v_ = nullptr, *logits_ = nullptr, *p_ = nullptr, *entropy_ = nullptr, *score_ = nullptr, *normals_ = nullptr;
  Real *s_ = nullptr, *fs_ = nullptr, *u_ = nullptr, *number_ = nullptr;  // S phi_k, F s, S F s
  Real *r_ = nullptr, *norm_ = nullptr, *size_ = nullptr;                 // BADGE
  Real *fisher_ = nullptr, *w_ = nullptr, *f_ = nullptr;                  // BAIT: F, p_max (1 - p_max), phi'S F S phi
};

}  // namespace

template <class Real>
std::vector<int> draw_plus_plus(Device& device, const Embeddings<Real>& e, int first, int count, SplitMix64& random) {
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

template <class Real>
std::vector<int> select_batch(Device& device, LastLayer<Real>& layer, const FeatureRows<Real>& pool,
                              const std::vector<int>& candidates, int batch, const SelectionOptions& options) {
  BATON_RANGE("select_batch");
  std::vector<int> picks = Selector<Real>(device, layer, pool, candidates, batch, options).choose();
  for (int& k : picks) k = candidates[k];
  return picks;
}

#define BATON_SELECTION(Real)                                                                                          \
  template std::vector<int> draw_plus_plus(Device&, const Embeddings<Real>&, int, int, SplitMix64&);                   \
  template std::vector<int> select_batch(Device&, LastLayer<Real>&, const FeatureRows<Real>&, const std::vector<int>&, \
                                         int, const SelectionOptions&);
BATON_SELECTION(float)
BATON_SELECTION(double)

}  // namespace baton
