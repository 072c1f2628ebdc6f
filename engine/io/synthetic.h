// Generated image sets, used when the real files are not at hand: the shapes and the rough difficulty of MNIST and
// CIFAR-10, not their content. A result on them says nothing about the papers, and every output names them as
// generated.
#pragma once
#include <cstdint>

#include "engine/io/dataset.h"

namespace baton {

// [count][1][28][28] grey digits in white on black, drawn from strokes in several handwriting styles a digit, and then
// distorted. Every ten images hold every class once, in random order.
// Image i is a function of (seed, i) alone, so a shorter set is the beginning of a longer one and the number of
// threads does not matter. Take different seeds for training and testing. count <= 0 is an InputError; Stopped when a
// signal asks the program to end.
Images generate_digits(int count, uint64_t seed);

// [count][3][32][32] colour images of 10 classes: a textured shape on a textured background. Five shapes and five
// textures, and each class is a pair, so that neither the shape nor the texture is enough. Otherwise as above.
Images generate_textures(int count, uint64_t seed);

}  // namespace baton
