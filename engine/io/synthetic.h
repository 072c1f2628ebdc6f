// Generated image sets, used where the real files are missing. They have the shapes and about the difficulty of MNIST
// and CIFAR-10, but not their content. A result on them says nothing about the papers, and every output calls them
// generated.
#pragma once
#include <cstdint>

#include "engine/io/dataset.h"

namespace baton {

// [count][1][28][28] grey digits in white on black, drawn from strokes in several handwriting styles for each digit,
// and then distorted. Every ten images have every class once, in random order. Image i is a function of (seed, i)
// alone, so a shorter set is the beginning of a longer one, and the number of threads does not matter. Training and
// testing need different seeds. Throws InputError for count <= 0, Stopped when a signal asks the program to end.
Images generate_digits(int count, uint64_t seed);

// [count][3][32][32] colour images of 10 classes: a textured shape on a textured background. There are five shapes and
// five textures, and a class is a pair of them, so that neither the shape nor the texture is enough. Otherwise as
// above.
Images generate_textures(int count, uint64_t seed);

}  // namespace baton
