// A user's own images in any of these forms: IDX, CIFAR binary, NumPy, or a folder of pictures for each class.
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "engine/io/dataset.h"

namespace baton {

enum class Split { train, test };  // which half of a data set's folder is meant

// What the network takes, and which data are asked for. 0 or an empty list: as the data are.
struct OwnDataOptions {
  Split split = Split::train;
  std::optional<std::filesystem::path> labels;  // a file of labels (IDX, .npy) beside a file of images
  int channels = 0, height = 0, width = 0;
  int classes = 0;
  std::vector<std::string> class_names;  // of a folder of classes: label c is the folder class_names[c]
  bool labels_needed = false;
  int first = 0, last = 0;                  // the images first .. last - 1; last 0: to the end
  uint64_t most_bytes = uint64_t(1) << 34;  // of all pixels; more are refused before memory is allocated
};

struct OwnData {
  Images images;  // labels are all 0 where `labelled` is false
  bool labelled = false;
  std::vector<std::string> names;        // of every image, in a folder of pictures: "cat/003.png"; else empty
  std::vector<std::string> class_names;  // in a folder of classes, by label; else empty
  std::string format;                    // "IDX", "CIFAR-10 binary", ".npz", "folder of pictures": never a path
};

// `path` is one of
//   a file of IDX images (plain, .gz, .xz); labels: options.labels, or the file beside it whose name has "labels" for
//     "images" and "idx1" for "idx3"
//   a CIFAR-10 (records of 3073 bytes) or CIFAR-100 (3074, fine labels) batch; where the length fits both, CIFAR-100 if
//     options.classes is 100, else CIFAR-10
//   .npy: images [n, h, w], [n, c, h, w] or [n, h, w, c] (c = 1 or 3; an axis of length c that could be either is the
//     second), bytes, or floats in [0, 1] (rounded to k / 255; anything outside is an InputError that says so); labels:
//     options.labels, whole numbers of any dtype, one an image
//   .npz: the same, under "images"/"labels", "x"/"y", or "x_train"/"y_train" and "x_test"/"y_test" by the split
//   a folder of an MNIST-like set (train-images-idx3-ubyte, ...) or of CIFAR's batches: the half that options.split
//     names, or the only half that is there
//   a folder of folders of PNG and JPEG pictures: one a class, in the order of class_names, or else of their names as
//     bytes compare; files sorted the same way; files that are no pictures are an InputError, but for hidden ones
//   a folder of pictures: without labels
// Pictures are converted to grey or colour by options.channels; other formats must have these channels. Sizes must
// agree with one another and with the options, for nothing is resized. Throws InputError, which names the file, what it
// has and what is expected, for anything else, for a label >= classes, a class folder that is not in class_names,
// labels that are missing but needed, and an empty set. No memory is allocated on the claim of a header alone.
OwnData load_own_data(const std::filesystem::path& path, const OwnDataOptions& options = {});

// FNV-1a (64 bits) of count, shape, pixels and labels: tells whether a model has seen these images, in any file format.
// Two orders of the same images differ.
uint64_t content_hash(const Images& images);

// "00c0ffee00c0ffee"
std::string hash_text(uint64_t hash);

}  // namespace baton
