// The products forward and to the gradients of inputs, which are the same kernels: the gradient of a convolution's
// input is a convolution of its output's gradient with the kernels turned round.
//
// FLOPs: 2 rows batch positions out in kernel^2 for each product. Bytes: operands and results once; a tile of C is read
// as often as there are tiles beside it, mostly from the L2 cache.
#include "kernels/layer_product_parts.h"

namespace baton {

namespace {

// ---- the weights as operands: forward [out][in kernel^2], backward [in][out kernel^2] turned round; the rows of both
// are filled up with zeros to a multiple of 4, so that they can be copied 16 bytes at a time.
__host__ __device__ inline int forward_pitch(const ConvShape& s) {
  return (s.in_channels * s.kernel * s.kernel + 3) / 4 * 4;
}
__host__ __device__ inline int backward_pitch(const ConvShape& s) {
  return (s.out_channels * s.kernel * s.kernel + 3) / 4 * 4;
}

__global__ void pack_kernel(float* __restrict__ forward, float* __restrict__ backward, Matrices mean, Matrices variance,
                            ConvShape s, int mean_sets, int forward_count, int backward_count) {
  const int item = simt::thread_item(), set = simt::row(), plane = s.kernel * s.kernel;
  if (item >= forward_count + backward_count) return;
  const float* __restrict__ from =
      set < mean_sets ? mean.data + mean.stride * set : variance.data + variance.stride * (set - mean_sets);
  if (item < forward_count) {
    const int pitch = forward_pitch(s), out = item / pitch, k = item - out * pitch, depth = s.in_channels * plane;
    forward[size_t(set) * forward_count + item] = k < depth ? simt::round_to_tf32(from[size_t(out) * depth + k]) : 0.f;
  } else {
    const int i = item - forward_count, pitch = backward_pitch(s), in = i / pitch, k = i - in * pitch;
    const int out = k / plane, place = plane - 1 - (k - out * plane);
    backward[size_t(set) * backward_count + i] =
        out < s.out_channels ? simt::round_to_tf32(from[(size_t(out) * s.in_channels + in) * plane + place]) : 0.f;
  }
}

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

size_t LayerProduct::forward_floats() const { return size_t(shape_.out_channels) * forward_pitch(shape_); }
size_t LayerProduct::backward_floats() const {
  return backward_ ? size_t(shape_.in_channels) * backward_pitch(shape_) : 0;
}

LayerProduct::LayerProduct(Arena& arena, const ConvShape& s, int rows, int groups, int mean_sets, bool dual,
                           bool backward)
    : shape_(s), rows_(rows), groups_(groups), mean_sets_(mean_sets), variance_sets_(dual ? rows : 0) {
  if (s.batch < 1 || s.in_channels < 1 || s.out_channels < 1 || s.out_height() < 1 || s.out_width() < 1 || s.pad < 0)
    throw InputError("the products of a layer: every extent must be at least 1");
  if (s.kernel < 1 || s.kernel > 5 || s.pad >= s.kernel)
    throw InputError("the products of a layer: kernels are 1x1 to 5x5 and wider than the padding, not " +
                     std::to_string(s.kernel) + " with a padding of " + std::to_string(s.pad));
  if (rows < 1 || groups < 1 || (mean_sets != 1 && mean_sets != rows * groups))
    throw InputError("the products of a layer: means for every row and group, or for all together");
  const int sets = mean_sets_ + variance_sets_;
  forward_ = arena.take<float>(forward_floats() * sets);
  if (!backward) return;
  backward_ = arena.take<float>(size_t(s.in_channels) * backward_pitch(s) * sets);
  parts_ = parts_of_gradients(s);
  if (parts_ > 1 || (groups > 1 && dual))
    partial_ = arena.take<float>(s.weight_size() * launched_rows() * parts_ * (dual ? 2 : 1));
}

void LayerProduct::pack(Matrices mean, Matrices variance, Stream stream) const {
  BATON_RANGE("pack_weights");
  const int of_forward = int(forward_floats()), of_backward = int(backward_floats());
  simt::launch<pack_kernel>(simt::each(of_forward + of_backward, mean_sets_ + variance_sets_), stream, forward_,
                            backward_, mean, variance, shape_, mean_sets_, of_forward, of_backward);
}

void LayerProduct::forward(Matrices x, MutableMatrices m, MutableMatrices v, Stream stream) const {
  BATON_RANGE("product_forward");
  const size_t n = forward_floats();
  const Operand mean{forward_, n, launched_rows() / mean_sets_}, variance{forward_ + n * mean_sets_, n, groups_};
  if (variance_sets_) correlate<1, 2>(shape_, launched_rows(), {x}, {mean, variance}, {m, v}, stream);
  else correlate<1, 1>(shape_, launched_rows(), {x}, {mean}, {m}, stream);
}

void LayerProduct::backward_data(Matrices dm, Matrices dv, MutableMatrices dx, MutableMatrices dsquare,
                                 Stream stream) const {
  BATON_RANGE("product_backward_data");
  const ConvShape s{shape_.batch,       shape_.out_channels, shape_.out_height(),           shape_.out_width(),
                    shape_.in_channels, shape_.kernel,       shape_.kernel - 1 - shape_.pad};
  const size_t n = backward_floats();
  const Operand mean{backward_, n, launched_rows() / mean_sets_}, variance{backward_ + n * mean_sets_, n, groups_};
  if (variance_sets_) correlate<2, 2>(s, launched_rows(), {dm, dv}, {mean, variance}, {dx, dsquare}, stream);
  else correlate<1, 1>(s, launched_rows(), {dm}, {mean}, {dx}, stream);
}

}  // namespace baton
