// Plain convolutions on the host, computed directly: no im2col matrix is written.
//
//   forward           y[n,p]      = sum_cij w[n,c,i,j] x[c,p+(i,j)]
//   backward_weights  dw[n,c,i,j] = sum_b,p dy[b,n,p] x[b,c,p+(i,j)]
//   backward_data     dx[c,p+(i,j)] += sum_n w[n,c,i,j] dy[n,p]
//
// There are three ways, each of which is the best for some shapes:
//
// By rows (this file). The vector runs along an output row, whose inputs for a given kernel element are contiguous in
// memory. So the inner loop is that of a matrix product with its right-hand operand read in place: for each kernel
// element, `positions` vector loads, `filters` broadcasts, and filters x positions fused multiply-adds into registers.
// Padding is a copy into rows with a zero border; rows are rounded up to whole vectors where the width needs it.
// Kernels of 3x3 and 5x5, which the networks have, are unrolled; any other size takes the same code with a loop.
//
// By filters (conv_filters_host.cpp): forward, and backward_data as the convolution of dy with the mirrored kernel. The
// vector runs over 16 filters, and a tile is one place of 6 images. Products with padding are left out, so rows of 7 or
// 15 cost nothing extra.
//
// Sparse (conv_sparse_host.cpp): both backward passes. Behind a max pooling most of dy is zero. Its non-zeros are put
// into lists. Each of them adds its k rows of k times `channels` contiguous floats, with the channels innermost: from x
// to dw, or from w to dx. A list is as long as it can be while the sum stays in registers: all non-zeros of a filter in
// some images for dw, all those of a place for dx. This way is taken where a sample of dy's planes has few non-zeros;
// it is right for any dy, as the others are.
//
// Each output is computed by one thread in one order, so results do not depend on the number of threads.
#include "engine/conv_host.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "engine/precision_host.h"

namespace baton {

namespace {

using namespace conv;

// Where a vector of an output plane lies: `in` in a padded input plane, `out` in the output plane. Where a row is not a
// whole number of vectors, its last one overlaps the one before, and the same values are stored twice. Of a row that is
// shorter than a vector only a part is stored.
struct Position {
  int in, out;
};

struct Geometry {
  ConvShape s;
  int k, oh, ow, ow8;  // output size; width rounded up to whole vectors
  int xh, xw;          // padded input size; xw has room for whole vectors of the last kernel column
  bool pad_input;      // the input must be copied into padded rows
  bool pad_output;     // dy must be copied into rows of ow8
  std::vector<Position> forward_positions;  // overlapping tails
  std::vector<Position> whole_positions;    // rows of ow8

  explicit Geometry(const ConvShape& shape) : s(shape), k(shape.kernel), oh(shape.out_height()), ow(shape.out_width()) {
    ow8 = (ow + lanes - 1) / lanes * lanes;
    xh = s.height + 2 * s.pad;
    xw = ow8 + k - 1;
    pad_input = s.pad > 0 || xw != s.width;
    pad_output = ow8 != ow;
    for (int y = 0; y < oh; y++)
      for (int x = 0; x < ow8; x += lanes) {
        const int tail = ow >= lanes ? std::min(x, ow - lanes) : 0;
        forward_positions.push_back({y * xw + tail, y * ow + tail});
        whole_positions.push_back({y * xw + x, y * ow8 + x});
      }
  }
  size_t padded_input() const { return size_t(s.in_channels) * xh * xw; }     // of one image
  size_t padded_output() const { return size_t(s.out_channels) * oh * ow8; }  // of one image
};

void pad_image(const Geometry& g, float* to, const float* from) {
  const ConvShape& s = g.s;
  std::memset(to, 0, g.padded_input() * sizeof(float));
  for (int c = 0; c < s.in_channels; c++)
    for (int y = 0; y < s.height; y++)
      std::memcpy(to + (size_t(c) * g.xh + y + s.pad) * g.xw + s.pad, from + (size_t(c) * s.height + y) * s.width,
                  sizeof(float) * s.width);
}
void pad_rows(const Geometry& g, float* to, const float* from) {
  for (int row = 0; row < g.s.out_channels * g.oh; row++) {
    std::memcpy(to + size_t(row) * g.ow8, from + size_t(row) * g.ow, sizeof(float) * g.ow);
    for (int x = g.ow; x < g.ow8; x++) to[size_t(row) * g.ow8 + x] = 0;
  }
}

// ---- forward. Weights packed [c][i][j][m] for each group of M filters.
template <int K, int M, int N>
inline __attribute__((always_inline)) void forward_tile(const Geometry& g, const float* x, const float* w,
                                                        const Position* at, float* y) {
  const int k = K ? K : g.k;
  Vec sum[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) sum[m][n] = Vec{};
  const float* from[N];
  for (int n = 0; n < N; n++) from[n] = x + at[n].in;
  const size_t plane = size_t(g.xh) * g.xw;
  for (int c = 0; c < g.s.in_channels; c++)
    for (int i = 0; i < k; i++) {
      const size_t row = c * plane + size_t(i) * g.xw;
#pragma GCC unroll 5
      for (int j = 0; j < k; j++) {
        Vec b[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) b[n] = load(from[n] + row + j);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
          const Vec a = broadcast(w[m]);
#pragma GCC unroll 4
          for (int n = 0; n < N; n++) sum[m][n] = fused(a, b[n], sum[m][n]);
        }
        w += M;
      }
    }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) {
      float* to = y + size_t(m) * g.oh * g.ow + at[n].out;
      if (g.ow >= lanes) store(to, sum[m][n]);
      else std::memcpy(to, &sum[m][n], sizeof(float) * g.ow);
    }
}
template <int K, int M, int N>
void forward_group(const Geometry& g, const float* x, const float* w, float* y) {
  const auto& at = g.forward_positions;
  size_t p = 0;
  for (; p + N <= at.size(); p += N) forward_tile<K, M, N>(g, x, w, &at[p], y);
  for (; p < at.size(); p++) forward_tile<K, M, 1>(g, x, w, &at[p], y);
}
// Filters of a group: at most 12 accumulators, so that they, the vectors and a broadcast stay in 16 registers.
int group_of(int filters) { return filters % 4 == 0 ? 4 : filters % 6 == 0 ? 6 : 5; }
template <int K>
void forward_image(const Geometry& g, const float* x, const float* packed, float* y) {
  const int size = group_of(g.s.out_channels), n_all = g.s.out_channels;
  const size_t per_filter = size_t(g.s.in_channels) * g.k * g.k, out = size_t(g.oh) * g.ow;
  int n = 0;
  for (; n + size <= n_all; n += size) {
    const float* w = packed + n * per_filter;
    if (size == 6) forward_group<K, 6, 2>(g, x, w, y + n * out);
    if (size == 5) forward_group<K, 5, 2>(g, x, w, y + n * out);
    if (size == 4) forward_group<K, 4, 3>(g, x, w, y + n * out);
  }
  for (; n < n_all; n++) forward_group<K, 1, 4>(g, x, packed + n * per_filter, y + n * out);
}
void pack_forward(const Geometry& g, const float* w, float* packed) {
  const int size = group_of(g.s.out_channels), n_all = g.s.out_channels;
  const int per_filter = g.s.in_channels * g.k * g.k;
  for (int n = 0; n < n_all;) {
    const int m_count = n + size <= n_all ? size : 1;
    for (int e = 0; e < per_filter; e++)
      for (int m = 0; m < m_count; m++)
        packed[size_t(n) * per_filter + e * m_count + m] = w[size_t(n + m) * per_filter + e];
    n += m_count;
  }
}

// ---- backward with respect to the weights, for M filters and one kernel row (c, i) at a time.
template <int K, int M>
inline __attribute__((always_inline)) void weights_row(const Geometry& g, const float* x, size_t x_image,
                                                       const float* dy, size_t dy_image, int images, float* lanes_sum,
                                                       size_t filter_stride) {
  Vec sum[M][K];
  for (int m = 0; m < M; m++)
    for (int j = 0; j < K; j++) sum[m][j] = load(lanes_sum + m * filter_stride + j * lanes);
  const size_t out = size_t(g.oh) * g.ow8;
  const Position* at = g.whole_positions.data();
  const int positions = int(g.whole_positions.size());
  for (int b = 0; b < images; b++) {
    const float* xb = x + b * x_image;
    const float* db = dy + b * dy_image;
    for (int p = 0; p < positions; p++, db += lanes) {  // one flat loop, as short rows would be mostly loop overhead
      const float* xp = xb + at[p].in;
      Vec d[M];
#pragma GCC unroll 4
      for (int m = 0; m < M; m++) d[m] = load(db + m * out);
#pragma GCC unroll 7
      for (int j = 0; j < K; j++) {
        const Vec a = load(xp + j);
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) sum[m][j] = fused(a, d[m], sum[m][j]);
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int j = 0; j < K; j++) store(lanes_sum + m * filter_stride + j * lanes, sum[m][j]);
}
constexpr int image_block = 16;  // images whose planes stay in the first-level cache over the K rows of a kernel
template <int K, int M>
void weights_group(const Geometry& g, const float* x, size_t x_image, const float* dy, size_t dy_image, float* dw,
                   std::vector<float>& sums) {
  const int channels = g.s.in_channels;
  const size_t filter_stride = size_t(channels) * K * K * lanes, plane = size_t(g.xh) * g.xw;
  sums.assign(M * filter_stride, 0.f);
  for (int b = 0; b < g.s.batch; b += image_block) {
    const int images = std::min(image_block, g.s.batch - b);
    for (int c = 0; c < channels; c++)
      for (int i = 0; i < K; i++)
        weights_row<K, M>(g, x + b * x_image + c * plane + size_t(i) * g.xw, x_image, dy + b * dy_image, dy_image,
                          images, sums.data() + (size_t(c) * K + i) * K * lanes, filter_stride);
  }
  for (size_t e = 0; e < M * filter_stride / lanes; e++) {
    const float* s = &sums[e * lanes];
    dw[e] = ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
  }
}

// ---- backward with respect to the data. Weights packed [c][i][n][j].
template <int K, int N>
inline __attribute__((always_inline)) void data_tile(const Geometry& g, const float* dy, const float* w,
                                                     const Position* at, float* dx) {
  Vec sum[K][N];
  for (int j = 0; j < K; j++)
    for (int n = 0; n < N; n++) sum[j][n] = Vec{};
  const size_t out = size_t(g.oh) * g.ow8;
  for (int f = 0; f < g.s.out_channels; f++) {
    Vec b[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) b[n] = load(dy + f * out + at[n].out);
#pragma GCC unroll 5
    for (int j = 0; j < K; j++) {
      const Vec a = broadcast(w[j]);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) sum[j][n] = fused(a, b[n], sum[j][n]);
    }
    w += K;
  }
  for (int j = 0; j < K; j++)
    for (int n = 0; n < N; n++) store(dx + at[n].in + j, load(dx + at[n].in + j) + sum[j][n]);
}
template <int K>
void data_image(const Geometry& g, const float* dy, const float* packed, float* dx) {  // dx: padded planes
  constexpr int N = K <= 3 ? 4 : 2;
  const auto& at = g.whole_positions;
  const size_t plane = size_t(g.xh) * g.xw;
  std::memset(dx, 0, g.padded_input() * sizeof(float));
  for (int c = 0; c < g.s.in_channels; c++)
    for (int i = 0; i < K; i++) {
      const float* w = packed + (size_t(c) * K + i) * g.s.out_channels * K;
      float* row = dx + c * plane + size_t(i) * g.xw;
      size_t p = 0;
      for (; p + N <= at.size(); p += N) data_tile<K, N>(g, dy, w, &at[p], row);
      for (; p < at.size(); p++) data_tile<K, 1>(g, dy, w, &at[p], row);
    }
}
void pack_data(const Geometry& g, const float* w, float* packed) {
  const int k = g.k, channels = g.s.in_channels, filters = g.s.out_channels;
  for (int n = 0; n < filters; n++)
    for (int c = 0; c < channels; c++)
      for (int i = 0; i < k; i++)
        for (int j = 0; j < k; j++)
          packed[((size_t(c) * k + i) * filters + n) * k + j] = w[((size_t(n) * channels + c) * k + i) * k + j];
}

// The convolution of dy that gives dx.
ConvShape mirrored(const ConvShape& s) {
  return {s.batch, s.out_channels, s.out_height(), s.out_width(), s.in_channels, s.kernel, s.kernel - 1 - s.pad};
}

}  // namespace

struct Convolution::Plan {
  explicit Plan(const ConvShape& s) : geometry(s), sparse(s) {}
  Geometry geometry;
  Sparse sparse;
  size_t packed_size, image_size;  // of one replica's weights, of one padded image
  float* packed = nullptr;         // [replicas][packed_size]
  float* padded_x = nullptr;       // [replicas][batch][image_size]
  float* padded_dy = nullptr;      // [batch] images
};

namespace {
void check_shape(const ConvShape& s) {
  if (s.out_height() < 1 || s.out_width() < 1 || s.batch < 1 || s.kernel < 1 || s.kernel > 7)
    throw InputError("convolution: input " + std::to_string(s.height) + "x" + std::to_string(s.width) + ", padding " +
                     std::to_string(s.pad) + ", has no output for a kernel of " + std::to_string(s.kernel) +
                     " (kernels of 1 to 7 are supported)");
}
}  // namespace

// There is nothing to offer: the shape chooses among the ways above, and the density of a gradient.
std::vector<OfferedAlgorithm> Convolution::offered_algorithms(Device&, const ConvShape& s, ConvDirection) {
  check_shape(s);
  return {};
}

Convolution::Convolution(Device&, Arena& arena, const ConvShape& s, int replicas) : shape_(s), replicas_(replicas) {
  check_shape(s);
  plan_ = std::make_unique<Plan>(s);
  const Geometry& g = plan_->geometry;
  const size_t images = size_t(replicas) * s.batch;
  const Sparse& sparse = plan_->sparse;
  plan_->packed_size = std::max(s.weight_size(), sparse.packed_weights());
  plan_->image_size = std::max(g.pad_input ? g.padded_input() : 0, sparse.image());
  plan_->packed = arena.take<float>(replicas * plan_->packed_size);
  if (plan_->image_size) plan_->padded_x = arena.take<float>(images * plan_->image_size);
  if (g.pad_output) plan_->padded_dy = arena.take<float>(size_t(s.batch) * g.padded_output());
}
Convolution::~Convolution() = default;
Convolution::Convolution(Convolution&&) noexcept = default;

// Calls body<K>() with the kernel size as a constant.
template <class F>
static void with_kernel(int k, F body) {
  switch (k) {
    case 1:
      return body.template operator()<1>();
    case 2:
      return body.template operator()<2>();
    case 3:
      return body.template operator()<3>();
    case 4:
      return body.template operator()<4>();
    case 5:
      return body.template operator()<5>();
    case 6:
      return body.template operator()<6>();
    case 7:
      return body.template operator()<7>();
  }
}

void Convolution::forward(Device& device, Matrices x, Matrices w, MutableMatrices y) const {
  const Geometry& g = plan_->geometry;
  const ConvShape& s = shape_;
  Operands operands(device);
  x = operands.take(x, s.input_size(), replicas_), w = operands.take(w, s.weight_size(), replicas_);
  const size_t in_image = size_t(s.in_channels) * s.height * s.width, out_image = size_t(s.out_channels) * g.oh * g.ow;
#pragma omp parallel
  if (by_filters(s)) {
    run_filters(s, replicas_, x, w, false, y, plan_->packed);
  } else {
#pragma omp for schedule(static)
    for (int r = 0; r < replicas_; r++) pack_forward(g, w.data + w.stride * r, plan_->packed + r * s.weight_size());
#pragma omp for schedule(static)
    for (int task = 0; task < replicas_ * s.batch; task++) {
      const int r = task / s.batch, b = task % s.batch;
      const float* image = x.data + x.stride * r + b * in_image;
      if (g.pad_input) {
        float* padded = plan_->padded_x + task * g.padded_input();
        pad_image(g, padded, image);
        image = padded;
      }
      const float* packed = plan_->packed + r * s.weight_size();
      float* to = y.data + y.stride * r + b * out_image;
      if (g.k == 5) forward_image<5>(g, image, packed, to);
      else if (g.k == 3) forward_image<3>(g, image, packed, to);
      else forward_image<0>(g, image, packed, to);
    }
  }
}

// The backward passes take one replica after the other: which way one takes, and so its last bits, must not depend on
// the others.
void Convolution::backward_weights(Device& device, Matrices xs, Matrices dys, MutableMatrices dws) const {
  const Geometry& g = plan_->geometry;
  const ConvShape& s = shape_;
  Operands operands(device);
  xs = operands.take(xs, s.input_size(), replicas_), dys = operands.take(dys, s.output_size(), replicas_);
  const size_t in_image = size_t(s.in_channels) * s.height * s.width, out_image = size_t(s.out_channels) * g.oh * g.ow;
  const int group = 2;
  const size_t per_filter = size_t(s.in_channels) * g.k * g.k;
  for (int r = 0; r < replicas_; r++) {
    const float *x = xs.data + xs.stride * r, *dy = dys.data + dys.stride * r;
    float* dw = dws.data + dws.stride * r;
    if (plan_->sparse.worthwhile(dy)) {
      plan_->sparse.weights(x, dy, dw, plan_->padded_x);
      continue;
    }
#pragma omp parallel
    {
      std::vector<float> sums;
      if (g.pad_input || g.pad_output)
#pragma omp for schedule(static)
        for (int b = 0; b < s.batch; b++) {
          if (g.pad_input) pad_image(g, plan_->padded_x + b * g.padded_input(), x + b * in_image);
          if (g.pad_output) pad_rows(g, plan_->padded_dy + b * g.padded_output(), dy + b * out_image);
        }
      const float* from = g.pad_input ? plan_->padded_x : x;
      const float* gradient = g.pad_output ? plan_->padded_dy : dy;
#pragma omp for schedule(dynamic)
      for (int n = 0; n < s.out_channels; n += group) {
        const float* own = gradient + size_t(n) * g.oh * g.ow8;
        float* to = dw + n * per_filter;
        with_kernel(g.k, [&]<int K>() {
          if (n + 2 <= s.out_channels) weights_group<K, 2>(g, from, g.padded_input(), own, g.padded_output(), to, sums);
          else weights_group<K, 1>(g, from, g.padded_input(), own, g.padded_output(), to, sums);
        });
      }
    }
  }
}

void Convolution::backward_data(Device& device, Matrices dys, Matrices ws, MutableMatrices dxs) const {
  const Geometry& g = plan_->geometry;
  const ConvShape& s = shape_;
  Operands operands(device);
  dys = operands.take(dys, s.output_size(), replicas_), ws = operands.take(ws, s.weight_size(), replicas_);
  const size_t in_image = size_t(s.in_channels) * s.height * s.width, out_image = size_t(s.out_channels) * g.oh * g.ow;
  const ConvShape back = mirrored(s);
  for (int r = 0; r < replicas_; r++) {
    const float *dy = dys.data + dys.stride * r, *w = ws.data + ws.stride * r;
    float* dx = dxs.data + dxs.stride * r;
    if (s.in_channels > 1 && plan_->sparse.worthwhile(dy)) {  // with one channel, vectors would be half empty
      plan_->sparse.data(dy, w, dx, plan_->padded_x, plan_->packed);
      continue;
    }
    if (by_filters(back)) {
#pragma omp parallel
      run_filters(back, 1, {dy, 0}, {w, 0}, true, {dx, 0}, plan_->packed);
      continue;
    }
    pack_data(g, w, plan_->packed);
#pragma omp parallel for schedule(static)
    for (int b = 0; b < s.batch; b++) {
      const float* from = dy + b * out_image;
      if (g.pad_output) {
        float* rows = plan_->padded_dy + b * g.padded_output();
        pad_rows(g, rows, from);
        from = rows;
      }
      float* image = dx + b * in_image;
      float* to = g.pad_input ? plan_->padded_x + b * g.padded_input() : image;
      with_kernel(g.k, [&]<int K>() { data_image<K>(g, from, plan_->packed, to); });
      if (g.pad_input)
        for (int c = 0; c < s.in_channels; c++)
          for (int row = 0; row < s.height; row++)
            std::memcpy(image + (size_t(c) * s.height + row) * s.width,
                        to + (size_t(c) * g.xh + row + s.pad) * g.xw + s.pad, sizeof(float) * s.width);
    }
  }
}

}  // namespace baton
