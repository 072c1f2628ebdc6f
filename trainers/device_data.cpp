#include "trainers/device_data.h"

namespace baton {

DeviceImages upload_images(Device& device, Arena& arena, const Images& images, const Normalisation& normalisation) {
  uint8_t* pixels = arena.take<uint8_t>(images.pixels.size());
  uint8_t* labels = arena.take<uint8_t>(images.labels.size());
  upload(device, pixels, images.pixels);
  upload(device, labels, images.labels);
  return {pixels, labels, images.count, images.channels, images.height * images.width, normalisation};
}

}  // namespace baton
