// Images and labels out of NumPy's arrays. Messages name Tensor::origin.
#pragma once
#include <cstdint>
#include <vector>

#include "engine/io/dataset.h"
#include "engine/io/safetensors.h"

namespace baton {

// [n, h, w], [n, c, h, w] or [n, h, w, c], where c is `channels`, or 1 or 3 if that is 0; an axis of length c that
// could be either is the second. Bytes, or floats in [0, 1], rounded to k / 255. No labels, classes 0. InputError:
// another shape (nothing empty), another dtype, a float outside [0, 1].
Images npy_images(Tensor tensor, int channels);

// [n] or [n, 1] of any dtype. InputError: another shape, a number that is not whole or not from 0 to 255.
std::vector<uint8_t> npy_labels(const Tensor& tensor);

}  // namespace baton
