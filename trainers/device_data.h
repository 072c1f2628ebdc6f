// A data set on the device, as bytes.
#pragma once
#include "engine/io/dataset.h"
#include "kernels/batch.h"

namespace baton {

// Copies the images and labels into the arena. `normalisation` is applied when a batch is drawn.
DeviceImages upload_images(Device&, Arena&, const Images&, const Normalisation&);

// Per channel to mean 0 and standard deviation 1 over these images: CIFAR-10.
Normalisation standardise(const Images&);

constexpr Normalisation unit_range = {{1.f / 255, 1.f / 255, 1.f / 255}, {0, 0, 0}};  // bytes to [0, 1]: MNIST

}  // namespace baton
