// Convolutions by filters: one of the ways of conv_host.cpp, whose head note says when it is chosen.
#include "engine/conv_host.h"

#include <algorithm>
#include <vector>

namespace baton::conv {

namespace {

// Weights are packed [group][c][i][j][16]; P images are computed side by side.
constexpr int filters_wide = 2 * lanes, images_wide = 6;

// The kernel elements that meet the input, not its padding.
Span inside(int output, int pad, int kernel, int side) {
  return {std::max(0, pad - output), std::min(kernel, side + pad - output)};
}
template <int P>
inline __attribute__((always_inline)) void filters_tile(const ConvShape& s, const float* const (&x)[P], const float* w,
                                                        Span c_all, Span i_all, Span j_all, int at, float* sums) {
  Vec sum[P][2];
  for (int p = 0; p < P; p++)
    for (int n = 0; n < 2; n++) sum[p][n] = c_all.first ? load(sums + p * filters_wide + n * lanes) : Vec{};
  const int k = s.kernel;
  for (int c = c_all.first; c < c_all.last; c++)
    for (int i = i_all.first; i < i_all.last; i++) {
      const float* wp = w + (size_t(c * k + i) * k + j_all.first) * filters_wide;
      const int row = (c * s.height + i) * s.width + at;
      for (int j = j_all.first; j < j_all.last; j++, wp += filters_wide) {
        const Vec w0 = load(wp), w1 = load(wp + lanes);
#pragma GCC unroll 6
        for (int p = 0; p < P; p++) {
          const Vec a = broadcast(x[p][row + j]);
          sum[p][0] = fused(a, w0, sum[p][0]);
          sum[p][1] = fused(a, w1, sum[p][1]);
        }
      }
    }
  for (int p = 0; p < P; p++)
    for (int n = 0; n < 2; n++) store(sums + p * filters_wide + n * lanes, sum[p][n]);
}
template <int P>
void filters_images(const ConvShape& s, const float* x, const float* packed, float* y, std::vector<float>& sums) {
  const int k = s.kernel, oh = s.out_height(), ow = s.out_width(), in = s.in_channels;
  const size_t in_image = size_t(in) * s.height * s.width, out_plane = size_t(oh) * ow;
  const int chunk = std::max(1, 256 / (k * k));  // channels whose weights, 16 KB, stay in the first-level cache
  const float* images[P];
  for (int p = 0; p < P; p++) images[p] = x + p * in_image;
  sums.resize(size_t(ow) * P * filters_wide);
  for (int n = 0; n < s.out_channels; n += filters_wide) {
    const float* w = packed + size_t(n) * in * k * k;
    for (int oy = 0; oy < oh; oy++) {
      const Span i_all = inside(oy, s.pad, k, s.height);
      for (int c = 0; c < in; c += chunk)
        for (int ox = 0; ox < ow; ox++)
          filters_tile<P>(s, images, w, {c, std::min(in, c + chunk)}, i_all, inside(ox, s.pad, k, s.width),
                          (oy - s.pad) * s.width + ox - s.pad, &sums[size_t(ox) * P * filters_wide]);
      for (int p = 0; p < P; p++)
        transpose(&sums[p * filters_wide], P * filters_wide, ow, filters_wide,
                  y + (size_t(p) * s.out_channels + n) * out_plane + size_t(oy) * ow, out_plane);
    }
  }
}
template <int P>
void filters_some(int images, const ConvShape& s, const float* x, const float* packed, float* y,
                  std::vector<float>& sums) {
  if (images == P) filters_images<P>(s, x, packed, y, sums);
  else if constexpr (P > 1) filters_some<P - 1>(images, s, x, packed, y, sums);
}
// mirror: w is that of the plain convolution whose mirrored one this is.
void pack_filters(const ConvShape& s, const float* w, bool mirror, float* packed) {
  const int k = s.kernel, in = s.in_channels;
  for (int n = 0; n < s.out_channels; n++)
    for (int c = 0; c < in; c++)
      for (int e = 0; e < k * k; e++)
        packed[((size_t(n / filters_wide) * in + c) * k * k + e) * filters_wide + n % filters_wide] =
            mirror ? w[(size_t(c) * s.out_channels + n) * k * k + (k * k - 1 - e)]
                   : w[(size_t(n) * in + c) * k * k + e];
}

}  // namespace

bool by_filters(const ConvShape& s) {
  return s.out_channels % filters_wide == 0 && s.in_channels >= 8 && s.pad < s.kernel &&
         (s.pad > 0 || s.out_width() % lanes);
}

void run_filters(const ConvShape& s, int replicas, Matrices x, Matrices w, bool mirror, MutableMatrices y,
                 float* packed) {
  const size_t in_image = size_t(s.in_channels) * s.height * s.width;
  const size_t out_image = size_t(s.out_channels) * s.out_height() * s.out_width();
  std::vector<float> sums;
#pragma omp for schedule(static)
  for (int r = 0; r < replicas; r++) pack_filters(s, w.data + w.stride * r, mirror, packed + r * s.weight_size());
  const int blocks = (s.batch + images_wide - 1) / images_wide;
#pragma omp for schedule(dynamic)
  for (int task = 0; task < replicas * blocks; task++) {
    const int r = task / blocks, b = task % blocks * images_wide;
    const float *from = x.data + x.stride * r + b * in_image, *weights = packed + r * s.weight_size();
    float* to = y.data + y.stride * r + b * out_image;
    filters_some<images_wide>(std::min(images_wide, s.batch - b), s, from, weights, to, sums);
  }
}

void transpose(const float* from, size_t from_stride, int rows, int columns, float* to, size_t to_stride) {
  int r = 0;
#if defined(__AVX__)
  for (; r + lanes <= rows; r += lanes) {
    int c = 0;
    for (; c + lanes <= columns; c += lanes) {
      __m256 a[lanes], b[lanes];
      for (int i = 0; i < 4; i++) {  // halves of rows i and i + 4
        const float *high = from + (r + i) * from_stride + c, *low = high + 4 * from_stride;
        a[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(high)), _mm_loadu_ps(low), 1);
        a[i + 4] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(high + 4)), _mm_loadu_ps(low + 4), 1);
      }
      for (int i = 0; i < lanes; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
      }
      for (int i = 0; i < lanes; i += 4)
        for (int k = 0; k < 2; k++) {
          float* out = to + (c + i + 2 * k) * to_stride + r;
          _mm256_storeu_ps(out, _mm256_shuffle_ps(b[i + k], b[i + 2 + k], 0x44));
          _mm256_storeu_ps(out + to_stride, _mm256_shuffle_ps(b[i + k], b[i + 2 + k], 0xee));
        }
    }
    for (; c < columns; c++)
      for (int i = r; i < r + lanes; i++) to[c * to_stride + i] = from[i * from_stride + c];
  }
#endif
  for (; r < rows; r++)
    for (int c = 0; c < columns; c++) to[c * to_stride + r] = from[r * from_stride + c];
}

}  // namespace baton::conv
