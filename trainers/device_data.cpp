#include "trainers/device_data.h"

#include <algorithm>
#include <cmath>

namespace baton {

DeviceImages upload_images(Device& device, Arena& arena, const Images& images, const Normalisation& normalisation) {
  uint8_t* pixels = arena.take<uint8_t>(images.pixels.size());
  uint8_t* labels = arena.take<uint8_t>(images.labels.size());
  upload(device, pixels, images.pixels);
  upload(device, labels, images.labels);
  return {pixels,        labels,        images.count, images.channels,      images.height * images.width,
          normalisation, images.height, images.width, device.tensor_cores()};
}

Normalisation standardise(const Images& images) {
  if (images.channels < 1 || images.channels > 3 || images.count < 1)
    throw InputError("standardise: " + std::to_string(images.count) + " images of " + std::to_string(images.channels) +
                     " channels, expected some of 1 to 3");
  Normalisation n{};
  const size_t plane = size_t(images.height) * images.width;
  for (int c = 0; c < images.channels; c++) {
    double sum = 0, squares = 0;
    for (int i = 0; i < images.count; i++) {
      const uint8_t* p = &images.pixels[(size_t(i) * images.channels + c) * plane];
      uint64_t plane_sum = 0, plane_squares = 0;
      for (size_t k = 0; k < plane; k++) plane_sum += p[k], plane_squares += uint64_t(p[k]) * p[k];
      sum += double(plane_sum), squares += double(plane_squares);
    }
    const double count = double(plane) * images.count, mean = sum / count;
    const double sd = std::max(1.0, std::sqrt(std::max(0.0, squares / count - mean * mean)));
    n.scale[c] = float(1 / sd);
    n.shift[c] = float(-mean / sd);
  }
  return n;
}

}  // namespace baton
