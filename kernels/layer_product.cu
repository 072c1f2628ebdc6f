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
    if (i >= rows || j >= channels) return;
    const int b = i / plane, p = i - b * plane;
    const size_t at = (size_t(b) * channels + j) * plane + p;
    SIMT_UNROLL
    for (int o = 0; o < products; o++) to[o].data[to[o].stride * size_t(row) + at] = sums[o];
  }
  __device__ __forceinline__ void column(const float (&values)[2][4], int i, int j, int part, int row) const {
    store_column(*this, values, i, j, part, row);
  }
};

// Outputs, from the sums of pre-activations. Rows of a launch are groups of a row; a convolution's rows come in quads.
template <int products>
struct StoreSamples {
  static constexpr bool noisy = products == 2;
  Sampling s;
  ConvShape shape;
  Positions positions;
  int groups;
  bool dense;
  __device__ __forceinline__ void one(int, int, const float (&)[2], int, int) const {}  // see LayerProduct::forward
  __device__ __forceinline__ void column(const float (&values)[2][4], int i, int c, int, int row) const {
    if (c >= shape.out_channels) return;
    const int r = row / groups, first_example = row % groups * shape.batch;
    const Noise noise{noisy ? s.states[r].noise : Key{}, noisy ? s.states[r].step : 0};
    const size_t first_of_row = size_t(r) * groups * shape.batch, of_row = s.bias.stride * size_t(r) + c;
    const float bias_mean = s.bias.mean[of_row], bias_variance = noisy ? s.bias.variance[of_row] : 0.f;
    if (dense) {
      SIMT_UNROLL
      for (int q = 0; q < 4; q++)
        if (i + 8 * q < shape.batch)
          sample_unit(values[0][q], values[1][q], first_example + i + 8 * q, c, first_of_row, noise, bias_mean,
                      bias_variance);
      return;
    }
    const int place = i / 32 * 8 + i % 8, of_image = positions.down * positions.across;
    if (place >= positions.count) return;
    const int b = place / of_image, o = place - b * of_image;
    const int in_row = (first_example + b) * shape.out_channels + c;  // the plane's number
    sample_quad(values, in_row, first_of_row * shape.out_channels + in_row, o, noise, bias_mean, bias_variance);
  }

 private:
  struct Noise {
    Key key;
    uint32_t step;
  };
  __device__ __forceinline__ void sample_unit(float mean, float variance, int b, int j, size_t first_of_row,
                                              const Noise& noise, float bias_mean, float bias_variance) const {
    const int units = shape.out_channels, quarter = (units + 3) / 4, lane = j / quarter;
    float e = 0;
    if constexpr (noisy) {
      const float4 n = normal4(noise.key, uint32_t(b) * quarter + (j - lane * quarter), s.stream_id, noise.step);
      e = lane == 0 ? n.x : lane == 1 ? n.y : lane == 2 ? n.z : n.w;
    }
    const size_t at = (first_of_row + b) * units + j;
    if (s.relu) write_sample<noisy, true>(s.out, s.v, mean, variance, bias_mean, bias_variance, at, e);
    else write_sample<noisy, false>(s.out, s.v, mean, variance, bias_mean, bias_variance, at, e);
  }
  // The 2x2 block o of a plane, which shares a counter of the noise.
  __device__ __forceinline__ void sample_quad(const float (&values)[2][4], int in_row, size_t plane, int o,
                                              const Noise& noise, float bias_mean, float bias_variance) const {
    const int h = shape.out_height(), w = shape.out_width(), across = (w + 1) / 2;
    const int py = o / positions.across, px = o - py * positions.across;
    float4 n{};
    if constexpr (noisy)
      n = normal4(noise.key, uint32_t(in_row) * ((h + 1) / 2 * across) + py * across + px, s.stream_id, noise.step);
    const float e[4] = {n.x, n.y, n.z, n.w};
    if (!s.pooled) {
      SIMT_UNROLL
      for (int q = 0; q < 4; q++) {
        const int y = 2 * py + q / 2, x = 2 * px + q % 2;
        if (y < h && x < w)
          write_sample<noisy, true>(s.out, s.v, values[0][q], values[1][q], bias_mean, bias_variance,
                                    (plane * h + y) * w + x, e[q]);
      }
      return;
    }
    float p[4], sd[4] = {};
    SIMT_UNROLL
    for (int q = 0; q < 4; q++) {
      p[q] = values[0][q];
      if constexpr (noisy) {
        sd[q] = sqrtf(variance_with_bias(values[1][q], bias_variance));
        p[q] += sd[q] * e[q];
      }
    }
    const PooledWindow won = pool_window<noisy>(p[0], p[1], p[2], p[3], sd[0], sd[1], sd[2], sd[3], n, bias_mean);
    const size_t to = plane * (positions.down * positions.across) + o;
    const float y = simt::as_operand(won.y, s.out.rounded);
    s.out.value[to] = y;
    if (s.out.square) s.out.square[to] = y * y;
    if (s.which) s.which[to] = uint8_t(won.place);
    if (noisy && s.slope) s.slope[to] = won.slope;
  }
};

// y = x * w of the shape, with `inputs` arrays of x (their squares are formed where there is one for two products).
// by_columns: of a dense layer, w lies as [in][out].
template <int inputs, int products, bool by_columns, class Store>
struct Correlation {
  ConvShape shape;
  int rows;  // of the launch
  Positions positions;
  Operand x[inputs], w[products];
  Store store;

  template <class T, class A>
  void run(const typename A::Source& a, Stream stream) const {
    using B = std::conditional_t<by_columns, MatrixColumns<T, T::columns, 4, products>,
                                 MatrixRows<T, T::columns, 4, products>>;
    Form<T, A, B, products == 2, Store> form;
    form.a = a;
    const int depth = shape.in_channels * shape.kernel * shape.kernel;  // w's rows are filled up
    form.b.rows = by_columns ? (shape.out_channels + 3) / 4 * 4 : shape.out_channels;
    form.b.depth = by_columns ? depth : (depth + 3) / 4 * 4;
    for (int o = 0; o < products; o++) form.b.of[o] = w[o];
    form.store = store;
    form.split = {positions.rows(), shape.out_channels, depth, 1, (depth + step_depth - 1) / step_depth};
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
    typename A::Source a{{}, shape, positions, shape.in_channels * shape.kernel * shape.kernel};
    for (int o = 0; o < inputs; o++) a.of[o] = x[o];
    run<T, A>(a, stream);
  }
  void run(Stream stream) const {
    if constexpr (by_columns) return run_dense(stream);
    else if (is_dense(shape)) return run_dense(stream);
    else return run_windows(stream);
  }
  void run_dense(Stream stream) const {
    if (!is_aligned(x, shape.in_channels)) run_dense<Tile<1, 1, 4>, 1>(stream);
    else if (long(shape.batch) * shape.out_channels >= 128 * 1024) run_dense<Tile<4, 2>, 4>(stream);
    else run_dense<Tile<1, 1, 4>, 4>(stream);
  }
  void run_windows(Stream stream) const {
    if (shape.out_channels > 32) {
      if (shape.pad > 0) run_windows<Tile<2, 2>, true>(stream);
      else run_windows<Tile<2, 2>, false>(stream);
    } else {
      if (shape.pad > 0) run_windows<Tile<2, 1, 2>, true>(stream);
      else run_windows<Tile<2, 1, 2>, false>(stream);
    }
  }
};

template <int inputs, int products, bool by_columns = false, class Store>
void correlate(const ConvShape& s, int rows, const Positions& positions, const Matrices (&x)[inputs],
               const Operand (&w)[products], const Store& store, Stream stream) {
  Correlation<inputs, products, by_columns, Store> c{s, rows, positions, {}, {}, store};
  for (int o = 0; o < inputs; o++) c.x[o] = {x[o].data, x[o].stride, 1};
  for (int o = 0; o < products; o++) c.w[o] = w[o];
  c.run(stream);
}

// Results as they are.
template <int inputs, int products, bool by_columns = false>
void correlate_plainly(const ConvShape& s, int rows, const Matrices (&x)[inputs], const Operand (&w)[products],
                       const MutableMatrices (&y)[products], Stream stream) {
  const int h = s.out_height(), width = s.out_width();
  StoreImages<products> store{{}, s.batch * h * width, s.out_channels, h * width};
  for (int o = 0; o < products; o++) store.to[o] = y[o];
  correlate<inputs, products, by_columns>(s, rows, {h, width, s.batch * h * width, false}, x, w, store, stream);
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
  if (means.data) {
    forward_ = arena.take<float>(forward_floats_ * sets);
    if (backward && !is_dense(s)) {
      backward_floats_ = size_t(s.in_channels) * backward_pitch(s);
      backward_ = arena.take<float>(backward_floats_ * sets);
    }
    const auto after = [&](float* p, size_t floats) { return p ? p + floats * mean_sets_ : nullptr; };
    jobs.add(Packing{means, forward_, backward_, s, mean_sets_});
    if (dual_)
      jobs.add(Packing{variances, after(forward_, forward_floats_), after(backward_, backward_floats_), s, rows});
  }
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
  if (dual_) correlate_plainly<1, 2>(shape_, rows, {x}, {mean, variance}, {m, v}, stream);
  else correlate_plainly<1, 1>(shape_, rows, {x}, {mean}, {m}, stream);
}

// The serial build has no use for it: there the libraries multiply. It makes the pre-activations first.
void LayerProduct::forward(Matrices x, const Sampling& s, Stream stream) const {
  BATON_RANGE("product_forward_sampled");
  const int rows = rows_ * groups_, h = shape_.out_height(), w = shape_.out_width(), all = groups_ * shape_.batch;
  const bool dense = is_dense(shape_);
  if constexpr (!simt::has_warps) {
    const size_t size = shape_.output_size();
    forward(x, {s.m, size}, {s.v, size}, stream);
    float* v = dual_ ? s.v : nullptr;
    const ConvPlanes planes{rows_, all, shape_.out_channels, h, w};
    if (dense)
      dense_sample(s.out, s.m, v, s.bias, {rows_, all, shape_.out_channels}, s.relu, s.states, s.stream_id, stream);
    else if (s.pooled) conv_sample_pool(s.out, s.which, s.slope, s.m, v, s.bias, planes, s.states, s.stream_id, stream);
    else conv_sample(s.out, s.m, v, s.bias, planes, s.relu, s.states, s.stream_id, stream);
    return;
  }
  Positions positions{h, w, shape_.batch, false};
  if (!dense) {
    positions.quads = true;
    positions.down = s.pooled ? h / 2 : (h + 1) / 2, positions.across = s.pooled ? w / 2 : (w + 1) / 2;
    positions.count = shape_.batch * positions.down * positions.across;
  }
  const size_t n = forward_floats_;
  const Operand mean{forward_, n, rows / mean_sets_}, variance{forward_ + n * mean_sets_, n, groups_};
  if (dual_)
    correlate<1, 2>(shape_, rows, positions, {x}, {mean, variance},
                    StoreSamples<2>{s, shape_, positions, groups_, dense}, stream);
  else
    correlate<1, 1>(shape_, rows, positions, {x}, {mean}, StoreSamples<1>{s, shape_, positions, groups_, dense},
                    stream);
}

void LayerProduct::backward_data(Matrices dm, Matrices dv, MutableMatrices dx, MutableMatrices dsquare,
                                 Stream stream) const {
  BATON_RANGE("product_backward_data");
  const ConvShape s{shape_.batch,       shape_.out_channels, shape_.out_height(),           shape_.out_width(),
                    shape_.in_channels, shape_.kernel,       shape_.kernel - 1 - shape_.pad};
  const size_t n = backward_ ? backward_floats_ : forward_floats_;
  const float* w = backward_ ? backward_ : forward_;  // of dense layers the same matrix serves, by its columns
  const int rows = rows_ * groups_;
  const Operand mean{w, n, rows / mean_sets_}, variance{w + n * mean_sets_, n, groups_};
  if (backward_) {
    if (dual_) correlate_plainly<2, 2>(s, rows, {dm, dv}, {mean, variance}, {dx, dsquare}, stream);
    else correlate_plainly<1, 1>(s, rows, {dm}, {mean}, {dx}, stream);
  } else {
    if (dual_) correlate_plainly<2, 2, true>(s, rows, {dm, dv}, {mean, variance}, {dx, dsquare}, stream);
    else correlate_plainly<1, 1, true>(s, rows, {dm}, {mean}, {dx}, stream);
  }
}

}  // namespace baton
