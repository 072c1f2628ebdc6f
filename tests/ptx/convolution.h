// Convolutions (cross-correlations) of packed NCHW tensors on the host, for the stand-in of cuDNN.
#pragma once
#include <compare>
#include <cstddef>
#include <cstdint>
#include <string>

namespace ptx {

struct ConvolutionShape {
  int batch, channels, height, width;
  int filters, kernel_height, kernel_width;
  int pad_height, pad_width, stride_height, stride_width;

  int out_height() const { return (height + 2 * pad_height - kernel_height) / stride_height + 1; }
  int out_width() const { return (width + 2 * pad_width - kernel_width) / stride_width + 1; }
  size_t input_size() const { return size_t(batch) * channels * height * width; }
  size_t kernel_size() const { return size_t(filters) * channels * kernel_height * kernel_width; }
  size_t output_size() const { return size_t(batch) * filters * out_height() * out_width(); }
  double flops() const { return 2.0 * double(output_size()) * channels * kernel_height * kernel_width; }
  std::string text() const;  // "128x20x12x12 to 50, kernel 5x5, padding 0x0, stride 1x1"

  auto operator<=>(const ConvolutionShape&) const = default;
};

// y = x * w, dx from dy and w, dw from x and dy. The result is overwritten. The bits depend on the shape alone.
void convolve(const ConvolutionShape&, const float* x, const float* w, float* y);
void convolve_data_gradient(const ConvolutionShape&, const float* w, const float* dy, float* dx);
void convolve_weight_gradient(const ConvolutionShape&, const float* x, const float* dy, float* dw);

// Adds errors of at most `relative` of the largest element: of both signs, also where a value is 0, and the same for
// the same place and seed.
void add_errors(float* values, size_t count, float relative, uint64_t seed);

}  // namespace ptx
