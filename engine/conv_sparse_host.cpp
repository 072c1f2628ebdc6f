// The sparse backward passes. The head note of conv_host.cpp says what they do and when they are chosen.
#include "engine/conv_host.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace baton::conv {

// Images are [block][y][x][c], padded with zeros, with the `channels` of a block innermost. So the inputs that meet a
// kernel row at one place are k * channels contiguous floats, or `vectors` vectors. Where these are few, a place's k
// rows are taken at once.
struct Sparse::Geometry {
  int channels = 0, blocks, vectors, rows;
  int xh, xw;
  size_t row, plane, image;  // floats: of a row, a block's plane, an image (with slack for the last row's vectors)
  int line;                  // floats of a kernel row: whole vectors
  std::vector<int> offsets;  // [oh * ow] of a place in a block's plane
  // The output rows at which the set of kernel rows that meet the input changes, and 0 and oh.
  std::vector<int> splits;

  explicit Geometry(const ConvShape& s) {
    const int k = s.kernel, oh = s.out_height(), ow = s.out_width();
    if (k != 3 && k != 5) return;  // channels stays 0: this way does not support the size
    constexpr int most = 20;       // channels of a block: the 13 vectors of a row of 5 fit the registers
    blocks = s.in_channels % 16 == 0 ? s.in_channels / 16 : (s.in_channels + most - 1) / most;
    channels = (s.in_channels + blocks - 1) / blocks;
    vectors = (k * channels + lanes - 1) / lanes;
    line = vectors * lanes;
    rows = k * vectors <= 12 ? k : 1;
    xh = s.height + 2 * s.pad, xw = s.width + 2 * s.pad;
    row = size_t(xw) * channels, plane = row * xh, image = (blocks * plane + 2 * lanes - 1) / lanes * lanes;
    for (int y = 0; y < oh; y++)
      for (int x = 0; x < ow; x++) offsets.push_back((y * xw + x) * channels);
    splits = {0, oh};
    if (rows == 1)
      for (int i = 0; i < k; i++)
        for (int y : {s.pad - i, s.height + s.pad - i})
          if (y > 0 && y < oh) splits.push_back(y);
    std::sort(splits.begin(), splits.end());
    splits.erase(std::unique(splits.begin(), splits.end()), splits.end());
  }
  size_t packed(const ConvShape& s) const { return size_t(blocks) * s.kernel * s.out_channels * line; }
  // The splits between which kernel row i meets the input.
  Span meets(const ConvShape& s, int i) const {
    const int oh = s.out_height(), first = std::clamp(s.pad - i, 0, oh), last = std::clamp(s.height + s.pad - i, 0, oh);
    auto find = [&](int y) { return int(std::lower_bound(splits.begin(), splits.end(), y) - splits.begin()); };
    return rows == 1 ? Span{find(first), find(last)} : Span{0, int(splits.size()) - 1};
  }
};

namespace {

// Of the non-zeros in dy, up to which they are listed; a little below the density at which both ways take as long.
constexpr double most_density = 0.3;

struct CompressTable {  // lane[mask] lists the bits that are set in mask
  unsigned char lane[256][8];
  constexpr CompressTable() : lane{} {
    for (int mask = 0; mask < 256; mask++)
      for (int bit = 0, n = 0; bit < 8; bit++)
        if (mask >> bit & 1) lane[mask][n++] = static_cast<unsigned char>(bit);
  }
};
alignas(64) constexpr CompressTable compress_table;
// Appends the non-zeros among values[0 .. count) and their places `at` + shift, and returns how many they are. May
// write up to a vector beyond them.
int list_nonzeros(const float* values, const int* at, int count, int shift, int* to_at, float* to_value) {
  int n = 0, i = 0;
#if defined(__AVX2__)
  const __m256i by = _mm256_set1_epi32(shift);
  for (; i + lanes <= count; i += lanes) {
    const __m256 v = _mm256_loadu_ps(values + i);
    const unsigned mask = unsigned(_mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NEQ_UQ)));
    const __m256i order =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(compress_table.lane[mask])));
    const __m256i place = _mm256_add_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + i)), by);
    _mm256_storeu_ps(to_value + n, _mm256_permutevar8x32_ps(v, order));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to_at + n), _mm256_permutevar8x32_epi32(place, order));
    n += __builtin_popcount(mask);
  }
#endif
  for (; i < count; i++) {
    to_value[n] = values[i];
    to_at[n] = at[i] + shift;
    n += values[i] != 0;
  }
  return n;
}

void to_channels_last(const Sparse::Geometry& g, const ConvShape& s, const float* from, float* to) {
  std::memset(to, 0, g.image * sizeof(float));
  const size_t from_plane = size_t(s.height) * s.width;
  for (int b = 0, c = 0; b < g.blocks; b++, c += g.channels)
    for (int y = 0; y < s.height; y++)
      transpose(from + c * from_plane + size_t(y) * s.width, from_plane, std::min(g.channels, s.in_channels - c),
                s.width, to + b * g.plane + (y + s.pad) * g.row + s.pad * g.channels, g.channels);
}
void from_channels_last(const Sparse::Geometry& g, const ConvShape& s, const float* from, float* to) {
  const size_t to_plane = size_t(s.height) * s.width;
  for (int b = 0, c = 0; b < g.blocks; b++, c += g.channels)
    for (int y = 0; y < s.height; y++)
      transpose(from + b * g.plane + (y + s.pad) * g.row + s.pad * g.channels, g.channels, s.width,
                std::min(g.channels, s.in_channels - c), to + c * to_plane + size_t(y) * s.width, to_plane);
}

// sum[r][v] += value[e] * from[at[e]][r][v] over a list: the inner loop of both passes.
template <int R, int V>
inline __attribute__((always_inline)) void add_list(Vec (&sum)[R][V], const float* from, size_t stride, const int* at,
                                                    const float* value, int count) {
  for (int e = 0; e < count; e++) {
    const Vec a = broadcast(value[e]);
    const float* f = from + at[e];
#pragma GCC unroll 5
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
      for (int v = 0; v < V; v++) sum[r][v] = fused(a, load(f + r * stride + v * lanes), sum[r][v]);
  }
}
// to[r][v] += that sum.
template <int R, int V>
void sparse_rows(const float* from, size_t from_stride, const int* at, const float* value, int count, float* to,
                 size_t to_stride) {
  Vec sum[R][V] = {};
  add_list<R, V>(sum, from, from_stride, at, value, count);
#pragma GCC unroll 5
  for (int r = 0; r < R; r++)
#pragma GCC unroll 16
    for (int v = 0; v < V; v++) {
      float* t = to + r * to_stride + v * lanes;
      store(t, load(t) + sum[r][v]);
    }
}
using SparseRows = void (*)(const float*, size_t, const int*, const float*, int, float*, size_t);
template <int R, int V>
SparseRows find_rows(int rows, int vectors) {
  if (rows == R && vectors == V) return sparse_rows<R, V>;
  if constexpr (R * V < (R == 1 ? 13 : 12 - R + 1)) return find_rows<R, V + 1>(rows, vectors);
  else if constexpr (R == 1) return find_rows<3, 1>(rows, vectors);
  else if constexpr (R == 3) return find_rows<5, 1>(rows, vectors);
  else return nullptr;
}

constexpr int filter_group = 8;  // filters a task
struct Scratch {
  std::vector<float> sums, value;
  std::vector<int> at, start, count;
};
// dw of filters [first, last). x: images with channels last, of one replica.
void sparse_weights(const Sparse::Geometry& g, const ConvShape& s, const float* x, const float* dy, int first, int last,
                    float* dw, Scratch& to) {
  const int k = s.kernel, ow = s.out_width(), places = s.out_height() * ow, segments = int(g.splits.size()) - 1;
  const size_t filter = size_t(g.blocks) * k * g.line;
  // Images whose planes of one block of channels stay in the first-level cache.
  const int at_once = std::clamp(int(24 * 1024 / (g.plane * sizeof(float))), 1, 16);
  const SparseRows add = find_rows<1, 1>(g.rows, g.vectors);
  to.sums.assign((last - first) * filter, 0.f);
  to.at.resize(size_t(last - first) * at_once * places + lanes), to.value.resize(to.at.size());
  to.start.resize(size_t(last - first) * (segments + 1));
  for (int b = 0; b < s.batch; b += at_once) {
    const int images = std::min(at_once, s.batch - b);
    int found = 0;
    for (int n = first; n < last; n++) {
      int* start = &to.start[size_t(n - first) * (segments + 1)];
      for (int p = 0; p < segments; p++) {
        start[p] = found;
        const int from = g.splits[p] * ow, count = g.splits[p + 1] * ow - from;
        for (int i = 0; i < images; i++)
          found += list_nonzeros(dy + (size_t(b + i) * s.out_channels + n) * places + from, &g.offsets[from], count,
                                 int(i * g.image), &to.at[found], &to.value[found]);
      }
      start[segments] = found;
    }
    for (int block = 0; block < g.blocks; block++)
      for (int n = first; n < last; n++)
        for (int i = 0; i < k; i += g.rows) {
          const int* start = &to.start[size_t(n - first) * (segments + 1)];
          const Span range = g.meets(s, i);
          const int e = start[range.first], count = start[range.last] - e;
          if (count > 0)
            add(x + b * g.image + block * g.plane + i * g.row, g.row, &to.at[e], &to.value[e], count,
                &to.sums[(n - first) * filter + (size_t(block) * k + i) * g.line], g.line);
        }
  }
  for (int n = first; n < last; n++)
    for (int c = 0; c < s.in_channels; c++)
      for (int i = 0; i < k; i++)
        for (int j = 0; j < k; j++)
          dw[((size_t(n) * s.in_channels + c) * k + i) * k + j] =
              to.sums[(n - first) * filter + (size_t(c / g.channels) * k + i) * g.line + j * g.channels +
                      c % g.channels];
}

// Weights packed [block][i][n][line].
void pack_sparse_data(const Sparse::Geometry& g, const ConvShape& s, const float* w, float* packed) {
  const int k = s.kernel;
  std::memset(packed, 0, g.packed(s) * sizeof(float));
  for (int n = 0; n < s.out_channels; n++)
    for (int c = 0; c < s.in_channels; c++)
      for (int i = 0; i < k; i++)
        for (int j = 0; j < k; j++)
          packed[((size_t(c / g.channels) * k + i) * s.out_channels + n) * g.line + j * g.channels + c % g.channels] =
              w[((size_t(n) * s.in_channels + c) * k + i) * k + j];
}
// dx, with channels last, of one image.
void sparse_data_image(const Sparse::Geometry& g, const ConvShape& s, const float* dy, const float* packed, float* dx,
                       Scratch& to) {
  const int k = s.kernel, oh = s.out_height(), ow = s.out_width(), places = oh * ow, filters = s.out_channels;
  // The filters that have a gradient at each place: the non-zeros of all planes, sorted by place.
  to.start.resize(places);
  for (int p = 0; p < places; p++) to.start[p] = p;
  to.count.assign(places, 0);
  to.at.resize(size_t(places) * filters + places + lanes), to.value.resize(to.at.size());
  int* at_plane = &to.at[size_t(places) * filters];  // one plane's list, before it is sorted
  to.sums.resize(places + lanes);
  for (int n = 0; n < filters; n++) {
    const int found = list_nonzeros(dy + size_t(n) * places, to.start.data(), places, 0, at_plane, to.sums.data());
    for (int e = 0; e < found; e++) {
      const int p = at_plane[e], to_e = p * filters + to.count[p]++;
      to.at[to_e] = n * g.line;
      to.value[to_e] = to.sums[e];
    }
  }
  const SparseRows add = find_rows<1, 1>(g.rows, g.vectors);
  const size_t slice = size_t(filters) * g.line;
  std::memset(dx, 0, g.image * sizeof(float));
  for (int block = 0; block < g.blocks; block++)
    for (int i = 0; i < k; i += g.rows) {
      const Span range = g.meets(s, i);
      const float* w = packed + (size_t(block) * k + i) * slice;
      float* plane = dx + block * g.plane + i * g.row;
      for (int p = g.splits[range.first] * ow; p < g.splits[range.last] * ow; p++)
        if (to.count[p])
          add(w, slice, &to.at[size_t(p) * filters], &to.value[size_t(p) * filters], to.count[p], plane + g.offsets[p],
              g.row);
    }
}

}  // namespace

Sparse::Sparse(const ConvShape& s) : shape_(s), geometry_(std::make_unique<Geometry>(s)) {}
Sparse::~Sparse() = default;
bool Sparse::possible() const { return geometry_->channels > 0; }
size_t Sparse::packed_weights() const { return possible() ? geometry_->packed(shape_) : 0; }
size_t Sparse::image() const { return possible() ? geometry_->image : 0; }

bool Sparse::worthwhile(const float* dy) const {
  if (!possible()) return false;
  const int size = shape_.out_height() * shape_.out_width(), planes = shape_.batch * shape_.out_channels;
  constexpr int every = 11;
  long found = 0, seen = 0;
  for (int p = 0; p < planes; p += every, seen += size) {
    const float* values = dy + size_t(p) * size;
    int n = 0;
    for (int i = 0; i < size; i++) n += values[i] != 0;
    found += n;
  }
  return double(found) <= most_density * double(seen);
}

void Sparse::weights(const float* x, const float* dy, float* dw, float* images) const {
  const Geometry& g = *geometry_;
  const ConvShape& s = shape_;
  const size_t in_image = size_t(s.in_channels) * s.height * s.width;
#pragma omp parallel
  {
    Scratch scratch;
#pragma omp for schedule(static)
    for (int b = 0; b < s.batch; b++) to_channels_last(g, s, x + b * in_image, images + b * g.image);
#pragma omp for schedule(dynamic)
    for (int n = 0; n < s.out_channels; n += filter_group)
      sparse_weights(g, s, images, dy, n, std::min(n + filter_group, s.out_channels), dw, scratch);
  }
}

void Sparse::data(const float* dy, const float* w, float* dx, float* images, float* packed) const {
  const Geometry& g = *geometry_;
  const ConvShape& s = shape_;
  const size_t in_image = size_t(s.in_channels) * s.height * s.width;
  const size_t out_image = size_t(s.out_channels) * s.out_height() * s.out_width();
  pack_sparse_data(g, s, w, packed);
#pragma omp parallel
  {
    Scratch scratch;
#pragma omp for schedule(static)
    for (int b = 0; b < s.batch; b++) {
      sparse_data_image(g, s, dy + b * out_image, packed, images + b * g.image, scratch);
      from_channels_last(g, s, images + b * g.image, dx + b * in_image);
    }
  }
}

}  // namespace baton::conv
