#include "tests/ptx/convolution.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "tests/ptx/openblas.h"

namespace ptx {

std::string ConvolutionShape::text() const {
  const auto pair = [](int a, int b) { return std::to_string(a) + "x" + std::to_string(b); };
  return pair(batch, channels) + "x" + pair(height, width) + " to " + std::to_string(filters) + ", kernel " +
         pair(kernel_height, kernel_width) + ", padding " + pair(pad_height, pad_width) + ", stride " +
         pair(stride_height, stride_width);
}

namespace {

// A convolution is a product over some images at once: of the weights [filters][taps], a tap being a place in a kernel,
// with the patches [taps][points] of the input, a point being a place in an output. All three matrices are row-major
// here, which OpenBLAS reads as their transposes.
constexpr int points_at_once = 512;

class Product {
 public:
  explicit Product(const ConvolutionShape& shape)
      : s(shape),
        taps(s.channels * s.kernel_height * s.kernel_width),
        image_points(s.out_height() * s.out_width()),
        group(std::clamp(points_at_once / image_points, 1, s.batch)) {
    patches.resize(size_t(taps) * group * image_points);
    outputs.resize(size_t(s.filters) * group * image_points);
  }

  const ConvolutionShape& s;
  int taps, image_points, group;        // group: images at once
  std::vector<float> patches, outputs;  // [taps][points], [filters][points]

  // f(first image, images, points)
  template <class F>
  void for_groups(F f) const {
    for (int first = 0; first < s.batch; first += group) {
      const int images = std::min(group, s.batch - first);
      f(first, images, images * image_points);
    }
  }

  void gather_patches(const float* x, int first, int images) {
    for_rows(first, images, [&](size_t from, size_t row, int begin, int end) {
      std::fill_n(&patches[row], begin, 0.f);
      std::fill(&patches[row] + end, &patches[row] + s.out_width(), 0.f);
      if (s.stride_width == 1) std::copy_n(x + (from + begin), end - begin, &patches[row + begin]);
      else
        for (int i = begin; i < end; i++) patches[row + i] = x[from + size_t(i) * s.stride_width];
    });
  }
  void add_patches(float* dx, int first, int images) const {
    for_rows(first, images, [&](size_t to, size_t row, int begin, int end) {
      if (s.stride_width == 1)
        for (int i = begin; i < end; i++) dx[to + i] += patches[row + i];
      else
        for (int i = begin; i < end; i++) dx[to + size_t(i) * s.stride_width] += patches[row + i];
    });
  }
  void gather_outputs(const float* y, int first, int images) {
    for_outputs(first, images, [&](size_t image, size_t row) { std::copy_n(y + image, image_points, &outputs[row]); });
  }
  void scatter_outputs(float* y, int first, int images) const {
    for_outputs(first, images, [&](size_t image, size_t row) { std::copy_n(&outputs[row], image_points, y + image); });
  }

 private:
  // f(start, row, begin, end) for every row of every output under every tap: its point i is element row + i of the
  // patches, and reads input element start + i * stride if begin <= i < end, else the padding.
  template <class F>
  void for_rows(int first, int images, F f) const {
    const int out_height = s.out_height(), out_width = s.out_width();
    size_t row = 0;
    for (int channel = 0; channel < s.channels; channel++)
      for (int r = 0; r < s.kernel_height; r++)
        for (int q = 0; q < s.kernel_width; q++) {
          const int left = q - s.pad_width;  // of the input, under point 0
          const int begin = std::clamp((-left + s.stride_width - 1) / s.stride_width, 0, out_width);
          const int last = s.width - 1 - left;
          const int end = last < 0 ? begin : std::clamp(last / s.stride_width + 1, begin, out_width);
          for (int image = first; image < first + images; image++)
            for (int i = 0; i < out_height; i++, row += out_width) {
              const int line = i * s.stride_height + r - s.pad_height;
              const bool inside = line >= 0 && line < s.height;
              const size_t start = ((size_t(image) * s.channels + channel) * s.height + line) * s.width + left;
              f(start, row, inside ? begin : out_width, inside ? end : out_width);
            }
        }
  }
  // f(where an output's channel of an image starts, where it starts in `outputs`)
  template <class F>
  void for_outputs(int first, int images, F f) const {
    size_t row = 0;
    for (int filter = 0; filter < s.filters; filter++)
      for (int image = first; image < first + images; image++, row += image_points)
        f((size_t(image) * s.filters + filter) * image_points, row);
  }
};

}  // namespace

void convolve(const ConvolutionShape& s, const float* x, const float* w, float* y) {
  Product p(s);
  p.for_groups([&](int first, int images, int points) {
    p.gather_patches(x, first, images);
    openblas::gemm(false, false, points, s.filters, p.taps, 1.f, p.patches.data(), points, w, p.taps, 0.f,
                   p.outputs.data(), points);
    p.scatter_outputs(y, first, images);
  });
}

void convolve_data_gradient(const ConvolutionShape& s, const float* w, const float* dy, float* dx) {
  Product p(s);
  std::fill_n(dx, s.input_size(), 0.f);
  p.for_groups([&](int first, int images, int points) {
    p.gather_outputs(dy, first, images);
    openblas::gemm(false, true, points, p.taps, s.filters, 1.f, p.outputs.data(), points, w, p.taps, 0.f,
                   p.patches.data(), points);
    p.add_patches(dx, first, images);
  });
}

void convolve_weight_gradient(const ConvolutionShape& s, const float* x, const float* dy, float* dw) {
  Product p(s);
  p.for_groups([&](int first, int images, int points) {
    p.gather_patches(x, first, images);
    p.gather_outputs(dy, first, images);
    openblas::gemm(true, false, p.taps, s.filters, points, 1.f, p.patches.data(), points, p.outputs.data(), points,
                   first == 0 ? 0.f : 1.f, dw, p.taps);
  });
}

void add_errors(float* values, size_t count, float relative, uint64_t seed) {
  float largest = 0;
  for (size_t i = 0; i < count; i++)
    if (std::isfinite(values[i])) largest = std::max(largest, std::fabs(values[i]));
  for (size_t i = 0; i < count; i++) {
    uint64_t bits = (i + 1 + seed) * 0x9E3779B97F4A7C15;
    bits ^= bits >> 32;
    bits *= 0xD6E8FEB86659FD93;
    const float in_one = float(int64_t(bits)) * 0x1p-63f;  // -1 to 1
    values[i] += in_one * relative * largest;
  }
}

}  // namespace ptx
