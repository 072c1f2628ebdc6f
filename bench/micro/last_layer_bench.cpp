// The closed-form update of the last layer in float and double: its kernels (kernels/last_layer.h, acquisition.h), its
// products with the covariance (engine/linalg.h) and whole updates (trainers/last_layer/last_layer.h).
#include "common.h"
#include "kernels/acquisition.h"
#include "trainers/last_layer/last_layer.h"

using namespace baton;

namespace {

template <class Real>
const std::string real_name = sizeof(Real) == 8 ? "/double" : "/float";

std::string size_name(int n, int d) { return "/n:" + std::to_string(n) + "/d:" + std::to_string(d); }

template <class Real>
Real* normals(Buffers& b, size_t n, double sd = 1) {
  std::vector<Real> v(n);
  std::mt19937 random(1);
  std::normal_distribution<double> normal(0, sd);
  for (Real& x : v) x = Real(normal(random));
  return b.put(v);
}

// Products with the covariance; the bytes count every operand once. multiply makes Phi S [b x D] with 2 b D^2 FLOPs;
// rank_update folds b rows with b D^2 FLOPs, reading and writing half of S; Cholesky and inverse take D^3 FLOPs.
template <class Real>
void products(int b, int d) {
  const double size = sizeof(Real), n = d;
  add("covariance_products" + real_name<Real> + size_name(b, d), {size * (n * n + 2 * b * n), 2 * b * n * n},
      [=](Buffers& buffers) -> std::function<void()> {
        const Real *x = normals<Real>(buffers, size_t(b) * d), *s = normals<Real>(buffers, size_t(d) * d);
        Real* u = buffers.room<Real>(size_t(b) * d);
        return [=, device = &buffers.device] {
          multiply(*device, false, false, b, d, d, Real(1), x, d, s, d, Real(0), u, d);
        };
      });
  add("covariance_fold" + real_name<Real> + size_name(b, d), {size * (n * n + b * n), b * n * n},
      [=](Buffers& buffers) -> std::function<void()> {
        const Real* q = normals<Real>(buffers, size_t(b) * d, 1e-6);
        Real* s = normals<Real>(buffers, size_t(d) * d);
        return [=, device = &buffers.device] { rank_update(*device, true, d, b, Real(-1), q, d, Real(1), s, d); };
      });
}

template <class Real>
void factor(int d) {
  const double n = d;
  add_direct("covariance_from_precision" + real_name<Real> + "/d:" + std::to_string(d),
             {2. * sizeof(Real) * n * n, n * n * n}, 1, [=](Buffers& b) -> std::function<void()> {
               std::vector<Real> p(size_t(d) * d, Real(0.1));
               for (int i = 0; i < d; i++) p[size_t(i) * d + i] = Real(1.1);
               const Real* from = b.put(p);
               Real* a = b.room<Real>(size_t(d) * d);
               const auto factorizer = std::make_shared<Factorizer<Real>>(b.device, b.arena, d);
               return [=, device = &b.device] {
                 copy_on_device(*device, a, from, sizeof(Real) * d * d);
                 factorizer->cholesky(a, d);
                 factorizer->invert(a, d);
               };
             });
}

// The hand-written kernels of one sample: row_dots makes the product S phi, add_outer the rank-one downdate.
template <class Real>
void rank_one(int d) {
  const double size = sizeof(Real), n = d;
  add("row_dots" + real_name<Real> + size_name(d, d), {size * (n * n + 2 * n), 2 * n * n},
      [=](Buffers& b) -> std::function<void()> {
        const Real *s = normals<Real>(b, size_t(d) * d), *x = normals<Real>(b, d);
        Real* v = b.room<Real>(d);
        return [=, stream = b.stream()] { row_dots(v, Real(1), s, d, x, 0, Real(0), d, d, stream); };
      });
  add("add_outer" + real_name<Real> + size_name(d, d), {size * (2 * n * n + 2 * n), 2 * n * n},
      [=](Buffers& b) -> std::function<void()> {
        Real* s = normals<Real>(b, size_t(d) * d);
        const Real* x = normals<Real>(b, d, 1e-6);
        return [=, stream = b.stream()] { add_outer(s, Real(-1), x, x, d, d, stream); };
      });
  add("mirror_lower" + real_name<Real> + size_name(d, d), {size * n * n, 0}, [=](Buffers& b) -> std::function<void()> {
    Real* s = normals<Real>(b, size_t(d) * d);
    return [=, stream = b.stream()] { mirror_lower(s, d, d, stream); };
  });
}

// b sequential steps in the samples' own space. The bytes count gram, basis and downdate once, and logits read and
// written. A sample takes 4 b^2 FLOPs for its rank-one updates, 4 b C for logits and steps, and about 5 Newton
// iterations of 30 C.
template <class Real>
void steps(int b, int cases, UpdateRule rule) {
  const int c = 10;
  const double size = sizeof(Real), n = b;
  add("sequential_steps/" + std::string(to_string(rule)) + real_name<Real> + "/samples:" + std::to_string(b) +
          "/cases:" + std::to_string(cases),
      {cases * size * (3 * n * n + 3 * n * c), cases * n * (4 * n * n + 4 * n * c + 5 * 30 * c)},
      [=](Buffers& buffers) -> std::function<void()> {
        // The arrays are not reset between calls: the Gram matrix shrinks from call to call, which takes as long.
        std::vector<Real> gram(size_t(cases) * b * b, Real(0));
        for (int k = 0; k < cases; k++)
          for (int i = 0; i < b; i++) gram[(size_t(k) * b + i) * b + i] = Real(1);
        UpdateSteps<Real> s{};
        s.gram = buffers.put(gram);
        s.basis = buffers.room<Real>(size_t(cases) * b * b);
        s.logits = normals<Real>(buffers, size_t(cases) * b * c);
        s.labels = buffers.integers<int32_t>(size_t(cases) * b, c);
        s.step = buffers.room<Real>(size_t(cases) * b * c);
        s.downdate = buffers.room<Real>(size_t(cases) * b * b);
        s.weight = buffers.room<Real>(size_t(cases) * b);
        s.failure = buffers.room<int32_t>(cases);
        return [=, stream = buffers.stream()] { sequential_steps(s, rule, 1, 1, b, c, cases, stream); };
      });
}

// The bytes are logits and variance read, probabilities and entropy written. A class takes 10 FLOPs, and 8 for each
// draw.
template <class Real>
void links(Link link, int n, int draws) {
  const int c = 10;
  const double size = sizeof(Real), rows = n;
  add("link_probabilities/" + std::string(to_string(link)) + real_name<Real> + "/n:" + std::to_string(n),
      {rows * size * (2 * c + 2), rows * c * (10. + 8. * draws)}, [=](Buffers& b) -> std::function<void()> {
        LinkArrays<Real> x{};
        x.probability = b.room<Real>(size_t(n) * c);
        x.entropy = b.room<Real>(n);
        x.information = draws ? b.room<Real>(n) : nullptr;
        x.logits = normals<Real>(b, size_t(n) * c);
        x.variance = b.put(std::vector<Real>(n, Real(0.5)));
        x.normals = draws ? normals<Real>(b, size_t(draws) * c) : nullptr;
        return [=, stream = b.stream()] { link_probabilities(x, link, 1., draws, n, c, stream); };
      });
}

// The head notes of kernels/last_layer.cu and kernels/acquisition.cu derive these bytes and FLOPs.
template <class Real>
void scores(int n, int d) {
  const int c = 10;
  const double size = sizeof(Real), rows = n;
  add("softmax_residual" + real_name<Real> + "/n:" + std::to_string(n), {rows * size * 2 * c, rows * 6 * c},
      [=](Buffers& b) -> std::function<void()> {
        const Real* f = normals<Real>(b, size_t(n) * c);
        const int32_t* y = b.integers<int32_t>(n, c);
        Real *r = b.room<Real>(size_t(n) * c), *loss = b.room<Real>(n);
        return [=, stream = b.stream()] { softmax_residual<Real>(nullptr, r, loss, nullptr, f, y, n, c, stream); };
      });
  add("margins" + real_name<Real> + "/n:" + std::to_string(n), {rows * size * (c + 1), rows * 2 * c},
      [=](Buffers& b) -> std::function<void()> {
        const Real* p = normals<Real>(b, size_t(n) * c);
        Real* m = b.room<Real>(n);
        return [=, stream = b.stream()] { margins(m, p, n, c, stream); };
      });
  add("downdate_rows" + real_name<Real> + size_name(n, d), {rows * size * (d + 2), rows * 2 * d},
      [=](Buffers& b) -> std::function<void()> {
        const Real *x = normals<Real>(b, size_t(n) * d), *s = normals<Real>(b, d, 1e-4);
        Real* v = b.put(std::vector<Real>(n, Real(1)));
        return [=, stream = b.stream()] {
          downdate_rows<Real>(v, nullptr, x, s, nullptr, Real(1e-3), Real(0), n, d, stream);
        };
      });
  add("inspect_rows" + real_name<Real> + size_name(n, d), {rows * size * d, rows * 10 * d},
      [=](Buffers& b) -> std::function<void()> {
        const Real* x = normals<Real>(b, size_t(n) * d);
        uint64_t* hash = b.room<uint64_t>(n);
        int32_t* bad = b.room<int32_t>(n);
        return [=, stream = b.stream()] { inspect_rows(hash, bad, x, n, d, stream); };
      });
}

// A whole update of b samples after 1,000, with folds, drift checks and waiting rows, as calls follow one another: 16
// calls on 16 batches of samples, again and again. The bytes are S read once, a call's share of the folds (S and P are
// read and written every 32 samples), U, Q and X written, Phi and W. The products with S take 2 b D^2 FLOPs, the folds
// 4 b D^2.
template <class Real>
void update(int b, int d) {
  const int c = 10, calls = 16, base = 1000;
  const double size = sizeof(Real), n = d;
  add_direct("last_layer_update" + real_name<Real> + "/samples:" + std::to_string(b) + "/d:" + std::to_string(d),
             {size * (n * n * (1 + 4. * b / 32) + 4. * b * n + 2 * c * n), 6. * b * n * n}, calls,
             [=](Buffers& buffers) -> std::function<void()> {
               const Real* x = normals<Real>(buffers, size_t(base + calls * b) * d, 0.1);
               const int32_t* y = buffers.integers<int32_t>(base + calls * b, c);
               const auto layer = std::make_shared<LastLayer<Real>>(buffers.device, d, c, LastLayerOptions{});
               layer->fit_covariance({x, y, base, d}, std::vector<double>(size_t(c) * d, 0.));
               return [=] {
                 for (int i = 0; i < calls; i++)
                   layer->update({x + size_t(base + i * b) * d, y + base + i * b, b, d}, {.duplicates = true});
               };
             });
}

template <class Real>
void add_all() {
  for (int d : {384, 768}) {
    for (int b : {1, 10, 32}) products<Real>(b, d);
    factor<Real>(d);
    rank_one<Real>(d);
  }
  for (int b : {1, 10, 32}) steps<Real>(b, 1, UpdateRule::implicit);
  steps<Real>(10, 1, UpdateRule::gaussian);
  steps<Real>(10, 300, UpdateRule::implicit);
  links<Real>(Link::mean_field, 10000, 0);
  links<Real>(Link::bridge, 10000, 0);
  links<Real>(Link::monte_carlo, 1000, 100);
  scores<Real>(1000, 768);
  for (int d : {384, 768})
    for (int b : {1, 10, 32}) update<Real>(b, d);
}

}  // namespace

void add_last_layer_benchmarks() {
  add_all<float>();
  add_all<double>();
}
