// Labelled image sets in host memory: the data sets' own file formats, where they are looked for, and the split of a
// set into the parts that incremental learning takes one after the other.
#pragma once
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace baton {

struct Images {
  int count = 0, channels = 0, height = 0, width = 0, classes = 0;
  std::vector<uint8_t> pixels;  // [count][channels][height][width], 0 to 255
  std::vector<uint8_t> labels;  // [count], below classes

  size_t image_bytes() const { return static_cast<size_t>(channels) * height * width; }
};

struct Dataset {
  std::string name;    // "mnist" or "cifar10", also when generated in its place
  std::string source;  // what the images are, for results: format and fingerprint, or "generated ..."; never a path
  std::string path;    // the folder they were read from, for the screen; empty when generated
  bool generated = false;
  Images train, test;
};

// How many images a caller will use; 0 is all. A set that is cut short holds the first images, exactly as limit() would
// leave them, but what lies behind them need not be read or generated.
struct Limits {
  int train = 0, test = 0;
};

// One IDX pair (big-endian headers; plain, gzip or xz) of grey images, any height and width.
// InputError: a wrong magic number (images and labels exchanged is said in so many words), unequal counts, an empty
// set, missing or trailing bytes, a label that is not below `classes`.
Images read_idx(const std::filesystem::path& images_path, const std::filesystem::path& labels_path, int classes = 10);

// CIFAR-10 binary batches, one after the other: a record is a label byte and 3*32*32 pixel bytes in planes R, G, B.
// InputError: a file that is empty or is not a whole number of records, a label above 9.
Images read_cifar10(const std::vector<std::filesystem::path>& batches);

// A CIFAR-100 file: a record is the coarse label's byte, the fine label's and the pixels as in CIFAR-10. The labels
// kept are the fine ones. InputError: not a whole number of records, a coarse label above 19 or a fine one above 99.
Images read_cifar100(const std::filesystem::path& path);

// The steps of these readers, for a file whose bytes are there already; `path` names it in messages.
Images idx_images(std::vector<uint8_t> bytes, const std::filesystem::path& path);  // no labels, classes 0
std::vector<uint8_t> idx_labels(std::vector<uint8_t> bytes, const std::filesystem::path& path);
// Adds the records of one file to a set of 3 x 32 x 32, that of CIFAR-10 or of CIFAR-100 as to.classes says.
void append_cifar(Images& to, const std::vector<uint8_t>& bytes, const std::filesystem::path& path);
// InputError unless there is a label for every image, all below images.classes.
void check_labels(const Images& images, const std::filesystem::path& labels_path,
                  const std::filesystem::path& images_path);
// The file as it is named, or with .gz or .xz; nothing when none is there.
std::optional<std::filesystem::path> find_packed(const std::filesystem::path& folder, const std::string& name);
// part: "train" or "t10k"; content: "images" or "labels". Both spellings of the name (see load_mnist) are in use.
std::optional<std::filesystem::path> find_idx(const std::filesystem::path& folder, const std::string& part,
                                              const std::string& content);

// The set in this folder: {train,t10k}-{images-idx3,labels-idx1}-ubyte, or with a dot ("train-images.idx3-ubyte"), each
// with "", ".gz" or ".xz". InputError names the first missing file; train and test images must have one size.
Dataset load_mnist(const std::filesystem::path& folder, Limits limits = {});

// The t10k pair alone, for a folder that holds just that (Fashion-MNIST as out-of-distribution images).
Images load_idx_test(const std::filesystem::path& folder);

// data_batch_1..5.bin and test_batch.bin, each with "", ".gz" or ".xz", in the folder or its "cifar-10-batches-bin".
Dataset load_cifar10(const std::filesystem::path& folder, Limits limits = {});

// train.bin and test.bin, each with "", ".gz" or ".xz", in the folder or its "cifar-100-binary".
Dataset load_cifar100(const std::filesystem::path& folder);

// Looks in --data (data_option), $BATON_DATA and ./data, in this order, each being the set's own folder or holding a
// sub-folder "mnist" or "cifar10". A --data without the set is an InputError; the other places are passed over when
// they do not hold all of its files, but a damaged file in them is an error like anywhere. Where no place holds the
// set, it is generated (engine/io/synthetic.h) from the seed: 60,000 + 10,000 digits, or 50,000 + 10,000 textures, or
// fewer by `limits`.
Dataset find_mnist(const std::optional<std::filesystem::path>& data_option, uint64_t seed_for_generated = 0,
                   Limits limits = {});
Dataset find_cifar10(const std::optional<std::filesystem::path>& data_option, uint64_t seed_for_generated = 0,
                     Limits limits = {});

// Keeps the first n images. n <= 0 or n > count is an InputError.
void limit(Images& images, int n);

// The images that `indices` name, in that order. An index outside the set is an InputError.
Images subset(const Images& images, std::span<const int32_t> indices);
// The images of these classes, in their order, with labels 0, 1, ... in the order of `classes`. A class that the set
// does not have, or a class named twice, is an InputError.
Images of_classes(const Images& images, std::span<const int> classes);

// The numbers of one seeded permutation of [0, count), cut into `parts` runs of equal length (the last ones shorter by
// one when it does not divide). A function of its arguments alone, on every platform.
// parts <= 0 or parts > count is an InputError.
std::vector<std::vector<int32_t>> split_parts(int count, int parts, uint64_t seed);

// The same, with every class spread evenly: the share of a class in two parts differs by at most one image.
std::vector<std::vector<int32_t>> split_parts_stratified(std::span<const uint8_t> labels, int parts, uint64_t seed);

// FNV-1a (64 bits) of the indices as little-endian bytes: tells in a log whether two runs saw the same split.
uint64_t index_hash(std::span<const int32_t> indices);

// SplitMix64, the engine's generator for work on the host that happens once: splits and generated images. It is not
// std::shuffle or a std distribution because those differ between standard libraries.
class SplitMix64 {
 public:
  explicit SplitMix64(uint64_t seed) : state_(seed) {}
  // An independent generator for item `index` of a stream: both are mixed, so neighbours share nothing.
  SplitMix64(uint64_t seed, uint64_t index) : state_(mix(seed) ^ mix(index + 0x632be59bd9b4e019ull)) {}
  uint64_t next() { return mix(state_ += 0x9e3779b97f4a7c15ull); }
  // Uniform in [0, bound) without bias; bound > 0.
  uint64_t below(uint64_t bound) {
    const uint64_t rejected = (0 - bound) % bound;  // 2^64 mod bound: the incomplete last interval
    uint64_t value = next();
    while (value < rejected) value = next();
    return value % bound;
  }
  // Uniform in [0, 1), 24 bits.
  float uniform() { return static_cast<float>(next() >> 40) * 0x1p-24f; }
  float uniform(float low, float high) { return low + (high - low) * uniform(); }
  // Nearly normal, mean 0 and variance 1, within +-3.5: the sum of four uniform 16-bit numbers.
  float normal() {
    const uint64_t bits = next();
    const uint64_t sum = (bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48);
    return (static_cast<float>(sum) - 131070.0f) * (1.7320508f / 65536.0f);
  }

 private:
  static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
  uint64_t state_;
};

}  // namespace baton
