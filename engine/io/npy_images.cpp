#include "engine/io/npy_images.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

#include "engine/error.h"

namespace baton {
namespace {

using Bytes = std::vector<uint8_t>;

[[noreturn]] void refuse_tensor(const Tensor& tensor, const std::string& what) {
  throw InputError(tensor.origin + what);
}

std::string short_text(double value) {
  std::array<char, 32> text;
  std::snprintf(text.data(), text.size(), "%.6g", value);
  return text.data();
}

// Calls use(i, value) for every number of the tensor, as a double.
template <class Use>
void each_number(const Tensor& tensor, const Use& use) {
  const auto walk = [&](auto element, const auto& widen) {
    const size_t count = tensor.bytes.size() / sizeof element;
    for (size_t i = 0; i < count; ++i) {
      std::memcpy(&element, tensor.bytes.data() + i * sizeof element, sizeof element);
      use(i, widen(element));
    }
  };
  const auto cast = [](auto element) { return static_cast<double>(element); };
  if (tensor.dtype == "F64") walk(double{}, cast);
  else if (tensor.dtype == "F32") walk(float{}, cast);
  else if (tensor.dtype == "F16") walk(uint16_t{}, [](uint16_t half) { return double{float_of_half(half)}; });
  else if (tensor.dtype == "I64") walk(int64_t{}, cast);
  else if (tensor.dtype == "I32") walk(int32_t{}, cast);
  else if (tensor.dtype == "U64") walk(uint64_t{}, cast);
  else if (tensor.dtype == "U32") walk(uint32_t{}, cast);
  else if (tensor.dtype == "U8") walk(uint8_t{}, cast);
  else refuse_tensor(tensor, " has dtype " + tensor.dtype + "; expected one of NumPy's");
}

Bytes bytes_of_floats(const Tensor& tensor) {
  double low = std::numeric_limits<double>::infinity(), high = -low;
  bool numbers = true;
  each_number(tensor, [&](size_t, double value) {
    low = std::min(low, value);
    high = std::max(high, value);
    numbers = numbers && value == value;
  });
  if (!numbers || low < 0 || high > 1) {
    const std::string found = numbers ? "from " + short_text(low) + " to " + short_text(high) : "that are no numbers";
    refuse_tensor(tensor, " has values " + found + "; bytes (uint8) or floats in [0, 1] are expected");
  }
  Bytes bytes(tensor.size());
  each_number(tensor, [&](size_t i, double value) { bytes[i] = static_cast<uint8_t>(value * 255 + 0.5); });
  return bytes;
}

// [n][h][w][c] to [n][c][h][w].
Bytes channels_first(const Bytes& from, size_t channels, size_t image_pixels) {
  Bytes to(from.size());
  const size_t image_bytes = channels * image_pixels;
  for (size_t image = 0; image < from.size(); image += image_bytes) {
    for (size_t i = 0; i < image_pixels; ++i) {
      for (size_t c = 0; c < channels; ++c) to[image + c * image_pixels + i] = from[image + i * channels + c];
    }
  }
  return to;
}

}  // namespace

Images npy_images(Tensor tensor, int channels) {
  const std::vector<int64_t>& shape = tensor.shape;
  const bool fits = std::all_of(shape.begin(), shape.end(), [](int64_t n) { return n > 0 && n <= INT32_MAX; });
  const auto is_channels = [&](int64_t n) { return channels != 0 ? n == channels : n == 1 || n == 3; };
  const bool four = shape.size() == 4, first = four && is_channels(shape[1]);
  if (!fits || (shape.size() != 3 && !first && !(four && is_channels(shape[3])))) {
    const std::string c = channels != 0 ? std::to_string(channels) : "1 or 3";
    refuse_tensor(tensor, " has shape " + shape_text(shape) + "; expected images of shape [n, h, w], [n, c, h, w] or " +
                              "[n, h, w, c], c = " + c);
  }
  const size_t rows = first ? 2 : 1;
  Images images;
  images.count = static_cast<int>(shape[0]);
  images.channels = four ? static_cast<int>(shape[first ? 1 : 3]) : 1;
  images.height = static_cast<int>(shape[rows]);
  images.width = static_cast<int>(shape[rows + 1]);
  if (tensor.dtype == "U8") images.pixels = std::move(tensor.bytes);
  else if (tensor.dtype.starts_with('F')) images.pixels = bytes_of_floats(tensor);
  else refuse_tensor(tensor, " has dtype " + tensor.dtype + "; bytes (uint8) or floats in [0, 1] are expected");
  if (!first && images.channels > 1) {
    images.pixels = channels_first(images.pixels, images.channels, images.image_bytes() / images.channels);
  }
  return images;
}

Bytes npy_labels(const Tensor& tensor) {
  if (tensor.shape.size() != 1 && !(tensor.shape.size() == 2 && tensor.shape[1] == 1)) {
    refuse_tensor(tensor, " has shape " + shape_text(tensor.shape) + "; expected labels of shape [n]");
  }
  Bytes labels(tensor.size());
  each_number(tensor, [&](size_t i, double value) {
    if (!(value >= 0 && value <= 255 && value == std::floor(value))) {
      refuse_tensor(tensor, ": label " + short_text(value) + " of image " + std::to_string(i) +
                                ", expected a whole number from 0 to 255");
    }
    labels[i] = static_cast<uint8_t>(value);
  });
  return labels;
}

}  // namespace baton
