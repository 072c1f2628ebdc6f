// The products to the gradients of weights. Their depth is the examples and positions of a batch, which is long where
// the result is small, so it is split into parts, which ProductJobs adds up.
//
// FLOPs: 2 rows batch positions out in kernel^2 for each product. Bytes: operands once a tile, and 8 for each
// weight, product and part.
#include "kernels/layer_product_parts.h"

namespace baton {

namespace {

// One part's gradients of the weights, [rows][columns].
template <int products>
struct StoreGradients {
  MutableMatrices to[products];
  size_t part_stride;
  int rows, columns;
  __device__ __forceinline__ void one(int i, int j, const float (&sums)[2], int part, int row) const {
    if (i >= rows || j >= columns) return;
    const size_t at = part_stride * size_t(part) + size_t(i) * columns + j;
    SIMT_UNROLL
    for (int o = 0; o < products; o++) to[o].data[to[o].stride * size_t(row) + at] = sums[o];
  }
  __device__ __forceinline__ void column(const float (&values)[2][4], int i, int j, int part, int row) const {
    store_column(*this, values, i, j, part, row);
  }
};

template <int products>
struct Gradients {
  ConvShape shape;
  int rows, parts;
  Operand x, dy[products];
  StoreGradients<products> store;

  template <class T, class A, class B>
  void run(const typename A::Source& a, const typename B::Source& b, int depth, Stream stream) const {
    Form<T, A, B, products == 2, StoreGradients<products>> form;
    form.a = a, form.b = b, form.store = store;
    for (int o = 0; o < products; o++) form.a.of[o] = dy[o];
    form.b.of[0] = x;
    const int steps = (depth + step_depth - 1) / step_depth;
    form.split = {store.rows, store.columns, depth, parts, (steps + parts - 1) / parts};
    launch_product(form, rows, stream);
  }
  template <class T, int width>
  void run_dense(Stream stream) const {
    using A = MatrixColumns<T, T::rows, width, products>;
    using B = MatrixColumns<T, T::columns, width, 1>;
    run<T, A, B>({{}, shape.out_channels, shape.batch}, {{}, shape.in_channels, shape.batch}, shape.batch, stream);
  }
  template <class T, int width, bool padded>
  void run_windows(Stream stream) const {
    using A = PlaneRows<T, T::rows, width, products>;
    using B = WindowColumns<T, T::columns, padded>;
    const int plane = shape.out_height() * shape.out_width();
    run<T, A, B>({{}, shape.out_channels, plane, shape.batch}, {{}, shape, store.columns, shape.batch * plane},
                 shape.batch * plane, stream);
  }
  template <class T, int width>
  void run_windows(Stream stream) const {
    if (shape.pad > 0) run_windows<T, width, true>(stream);
    else run_windows<T, width, false>(stream);
  }
  void run(Stream stream) const {
    const int plane = shape.out_height() * shape.out_width();
    const bool small = store.rows <= 32 && store.columns <= 32;
    if (is_dense(shape)) {
      const Operand inputs[1] = {x};
      if (!is_aligned(dy, shape.out_channels) || !is_aligned(inputs, shape.in_channels))
        run_dense<Tile<1, 1, 4>, 1>(stream);
      else run_dense<Tile<2, 4>, 4>(stream);
    } else if (!is_aligned(dy, plane)) {
      if (small) run_windows<Tile<1, 1, 4>, 1>(stream);
      else run_windows<Tile<2, 2>, 1>(stream);
    } else {
      if (small) run_windows<Tile<1, 1, 4>, 4>(stream);
      else run_windows<Tile<2, 4>, 4>(stream);
    }
  }
};

}  // namespace

void LayerProduct::backward_weights(Matrices x, Matrices dm, Matrices dv, Stream stream) const {
  BATON_RANGE("product_backward_weights");
  const size_t weights = shape_.weight_size();
  const auto multiply = [&]<int count>() {
    Gradients<count> g{shape_, rows_ * groups_, parts_, {x.data, x.stride, 1}, {}, {}};
    g.store.rows = shape_.out_channels, g.store.columns = int(weights) / shape_.out_channels;
    g.store.part_stride = weights * count;
    for (int o = 0; o < count; o++) {
      const Matrices& dy = o == 0 ? dm : dv;
      g.dy[o] = {dy.data, dy.stride, 1};
      g.store.to[o] = partial_ ? MutableMatrices{partial_ + weights * o, weights * count * parts_}
                               : (o == 0 ? mean_gradients_ : variance_gradients_);
    }
    g.run(stream);
  };
  if (dual_) multiply.template operator()<2>();
  else multiply.template operator()<1>();
}

}  // namespace baton
