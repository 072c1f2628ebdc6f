// Images and labels from NumPy's arrays. Messages name Tensor::origin.
#pragma once
#include <cstdint>
#include <vector>

#include "engine/io/dataset.h"
#include "engine/io/safetensors.h"

namespace baton {

// The array is [n, h, w], [n, c, h, w] or [n, h, w, c], where c is `channels`, or 1 or 3 if that is 0. If both the
// second and the last axis could be c, it is the second. Numbers are bytes, or floats in [0, 1], which are rounded to k
// / 255. The result has no labels, and 0 classes. Throws InputError for another shape, an empty one, another dtype, or
// a float outside [0, 1].
Images npy_images(Tensor tensor, int channels);

// Labels [n] or [n, 1] of any dtype. Throws InputError for another shape, and for a number that is not an integer from
// 0 to 255.
std::vector<uint8_t> npy_labels(const Tensor& tensor);

}  // namespace baton
