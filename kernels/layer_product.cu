// The products forward and to the gradients of inputs, which are the same kernels: the gradient of a convolution's
// input is a convolution of its output's gradient with the kernels turned round.
//
// FLOPs: 2 rows batch positions out in kernel^2 for each product. Bytes: operands and results once; a tile of C is read
// as often as there are tiles beside it, mostly from the L2 cache.
#include "kernels/layer_product_parts.h"

namespace baton {

namespace {

// Results of images, [rows][batch][channels][plane].
template <int products>
struct StoreImages {
  MutableMatrices to[products];
  int rows, channels, plane;
  __device__ __forceinline__ void one(int i, int j, const float (&sums)[2], int, int row) const {
    const int b = i / plane, p = i - b * plane;
    const size_t at = (size_t(b) * channels + j) * plane + p;
    SIMT_UNROLL
    for (int o = 0; o < products; o++) to[o].data[to[o].stride * size_t(row) + at] = sums[o];
  }
  __device__ __forceinline__ void warp(const float (&sums)[products][2][4][4], int first_row, int first_column,
                                       int part, int row) const {
    for_sums(sums, first_row, first_column, [&](int i, int j, const float(&values)[2]) {
      if (i < rows && j < channels) one(i, j, values, part, row);
    });
  }
};

// y = x * w of the shape, with `inputs` arrays of x (their squares are formed where there is one for two products).
template <int inputs, int products>
struct Correlation {
  ConvShape shape;
  int rows;  // of the launch
  Operand x[inputs], w[products];
  StoreImages<products> store;

  template <class T, class A>
  void run(const typename A::Source& a, Stream stream) const {
    using B = MatrixRows<T, T::columns, 4, products>;
    Form<T, A, B, products == 2, StoreImages<products>> form;
    form.a = a;
    const int depth = shape.in_channels * shape.kernel * shape.kernel;
    form.b.rows = shape.out_channels, form.b.depth = (depth + 3) / 4 * 4;
    for (int o = 0; o < products; o++) form.b.of[o] = w[o];
    form.store = store;
    form.split = {store.rows, shape.out_channels, depth, 1, (depth + step_depth - 1) / step_depth};
    launch_product(form, rows, stream);
  }
  template <class T, int width>
  void run_dense(Stream stream) const {
    using A = MatrixRows<T, T::rows, width, inputs>;
    typename A::Source a{{}, shape.batch, shape.in_channels};
    for (int o = 0; o < inputs; o++) a.of[o] = x[o];
    run<T, A>(a, stream);
  }
  template <class T, bool padded>
  void run_windows(Stream stream) const {
    using A = Windows<T, T::rows, padded, inputs>;
    typename A::Source a{{}, shape, store.rows, shape.in_channels * shape.kernel * shape.kernel};
    for (int o = 0; o < inputs; o++) a.of[o] = x[o];
    run<T, A>(a, stream);
  }
  void run(Stream stream) const {
    if (is_dense(shape)) {
      if (!is_aligned(x, shape.in_channels)) run_dense<Tile<1, 1, 4>, 1>(stream);
      else if (long(shape.batch) * shape.out_channels >= 128 * 1024) run_dense<Tile<4, 2>, 4>(stream);
      else run_dense<Tile<1, 1, 4>, 4>(stream);
    } else if (shape.out_channels > 32) {
      if (shape.pad > 0) run_windows<Tile<2, 2>, true>(stream);
      else run_windows<Tile<2, 2>, false>(stream);
    } else {
      if (shape.pad > 0) run_windows<Tile<2, 1>, true>(stream);
      else run_windows<Tile<2, 1>, false>(stream);
    }
  }
};

template <int inputs, int products>
void correlate(const ConvShape& s, int rows, const Matrices (&x)[inputs], const Operand (&w)[products],
               const MutableMatrices (&y)[products], Stream stream) {
  const int plane = s.out_height() * s.out_width();
  Correlation<inputs, products> c{s, rows, {}, {}, {{}, s.batch * plane, s.out_channels, plane}};
  for (int o = 0; o < inputs; o++) c.x[o] = {x[o].data, x[o].stride, 1};
  for (int o = 0; o < products; o++) c.w[o] = w[o], c.store.to[o] = y[o];
  c.run(stream);
}

}  // namespace

LayerProduct::LayerProduct(Arena& arena, ProductJobs& jobs, const ConvShape& s, int rows, int groups, Matrices means,
                           Matrices variances, bool backward, MutableMatrices mean_gradients,
                           MutableMatrices variance_gradients)
    : shape_(s),
      rows_(rows),
      groups_(groups),
      mean_sets_(means.stride ? rows * groups : 1),
      dual_(variances.data),
      forward_floats_(size_t(s.out_channels) * forward_pitch(s)),
      mean_gradients_(mean_gradients),
      variance_gradients_(variance_gradients) {
  if (s.batch < 1 || s.in_channels < 1 || s.out_channels < 1 || s.out_height() < 1 || s.out_width() < 1 || s.pad < 0 ||
      rows < 1 || groups < 1)
    throw InputError("the products of a layer: every extent must be at least 1");
  if (s.kernel < 1 || s.kernel > 5 || s.pad >= s.kernel)
    throw InputError("the products of a layer: kernels are 1x1 to 5x5 and wider than the padding, not " +
                     std::to_string(s.kernel) + " with a padding of " + std::to_string(s.pad));
  const int sets = mean_sets_ + (dual_ ? rows : 0), launched = rows * groups;
  forward_ = arena.take<float>(forward_floats_ * sets);
  if (backward) {
    backward_floats_ = size_t(s.in_channels) * backward_pitch(s);
    backward_ = arena.take<float>(backward_floats_ * sets);
  }
  const auto after = [&](float* p, size_t floats) { return p ? p + floats * mean_sets_ : nullptr; };
  jobs.add(Packing{means, forward_, backward_, s, mean_sets_});
  if (dual_)
    jobs.add(Packing{variances, after(forward_, forward_floats_), after(backward_, backward_floats_), s, rows});
  parts_ = parts_of_gradients(s);
  if (!mean_gradients.data || (parts_ == 1 && (groups == 1 || !dual_))) return;
  const size_t weights = s.weight_size(), part = weights * (dual_ ? 2 : 1);
  partial_ = arena.take<float>(part * parts_ * launched);
  jobs.add(PartSum{mean_gradients, {partial_, part * parts_}, int(weights), parts_, int(part), launched});
  if (dual_)
    jobs.add(PartSum{variance_gradients,
                     {partial_ + weights, part * parts_ * groups},
                     int(weights),
                     parts_ * groups,
                     int(part),
                     rows});
}

void LayerProduct::forward(Matrices x, MutableMatrices m, MutableMatrices v, Stream stream) const {
  BATON_RANGE("product_forward");
  const size_t n = forward_floats_;
  const int rows = rows_ * groups_;
  const Operand mean{forward_, n, rows / mean_sets_}, variance{forward_ + n * mean_sets_, n, groups_};
  if (dual_) correlate<1, 2>(shape_, rows, {x}, {mean, variance}, {m, v}, stream);
  else correlate<1, 1>(shape_, rows, {x}, {mean}, {m}, stream);
}

void LayerProduct::backward_data(Matrices dm, Matrices dv, MutableMatrices dx, MutableMatrices dsquare,
                                 Stream stream) const {
  BATON_RANGE("product_backward_data");
  const ConvShape s{shape_.batch,       shape_.out_channels, shape_.out_height(),           shape_.out_width(),
                    shape_.in_channels, shape_.kernel,       shape_.kernel - 1 - shape_.pad};
  const size_t n = backward_floats_;
  const int rows = rows_ * groups_;
  const Operand mean{backward_, n, rows / mean_sets_}, variance{backward_ + n * mean_sets_, n, groups_};
  if (dual_) correlate<2, 2>(s, rows, {dm, dv}, {mean, variance}, {dx, dsquare}, stream);
  else correlate<1, 1>(s, rows, {dm}, {mean}, {dx}, stream);
}

}  // namespace baton
