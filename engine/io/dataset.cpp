#include "engine/io/dataset.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <future>
#include <numeric>
#include <utility>

#include "engine/error.h"
#include "engine/io/files.h"
#include "engine/io/synthetic.h"

namespace baton {
namespace {

namespace fs = std::filesystem;

constexpr uint32_t kImageMagic = 2051, kLabelMagic = 2049;  // "unsigned bytes, three axes" and "... one axis"
constexpr int kCifarPixels = 3 * 32 * 32, kCifarRecord = 1 + kCifarPixels;
constexpr int kCifarBatches = 5, kCifarBatchCount = 10000;

uint32_t big_endian(const std::vector<uint8_t>& bytes, size_t at) {
  return uint32_t{bytes[at]} << 24 | uint32_t{bytes[at + 1]} << 16 | uint32_t{bytes[at + 2]} << 8 | bytes[at + 3];
}

// Checks the magic number and that the header is whole.
void check_idx_header(const std::vector<uint8_t>& bytes, const fs::path& path, uint32_t magic, size_t header) {
  const bool images = magic == kImageMagic;
  const std::string what = images ? "an IDX image file" : "an IDX label file";
  if (bytes.size() < 4)
    throw InputError(path.string() + " is not " + what + ": it has " + std::to_string(bytes.size()) + " bytes");
  const uint32_t found = big_endian(bytes, 0);
  if (found == (images ? kLabelMagic : kImageMagic)) {
    throw InputError(path.string() + " is " + (images ? "an IDX label file" : "an IDX image file") + " where " + what +
                     " is expected (magic " + std::to_string(found) + ", expected " + std::to_string(magic) + ")");
  }
  if (found != magic) {
    throw InputError(path.string() + " is not " + what + ": magic " + std::to_string(found) + ", expected " +
                     std::to_string(magic));
  }
  if (bytes.size() < header) throw InputError(path.string() + " is truncated within its header");
}

// Compares the file's length with what its header promises.
void check_idx_length(size_t found, uint64_t expected, const fs::path& path) {
  if (found == expected) return;
  throw InputError(path.string() + (found < expected ? " is truncated: " : " has trailing bytes: ") +
                   std::to_string(found) + " bytes, its header says " + std::to_string(expected));
}

[[noreturn]] void throw_missing(const fs::path& folder, const std::string& name) {
  std::error_code ignored;
  if (!fs::is_directory(folder, ignored)) throw InputError(folder.string() + " is not a folder");
  throw InputError(folder.string() + " holds no " + name + " (nor .gz or .xz of it)");
}

Images read_idx_part(const fs::path& folder, const std::string& part) {
  const auto images = find_idx(folder, part, "images");
  if (!images) throw_missing(folder, part + "-images-idx3-ubyte");
  const auto labels = find_idx(folder, part, "labels");
  if (!labels) throw_missing(folder, part + "-labels-idx1-ubyte");
  return read_idx(*images, *labels);
}

bool holds_mnist(const fs::path& folder) {
  for (const char* part : {"train", "t10k"}) {
    if (!find_idx(folder, part, "images") || !find_idx(folder, part, "labels")) return false;
  }
  return true;
}

// The five training batches and the test batch; a missing one is nothing.
std::array<std::optional<fs::path>, kCifarBatches + 1> cifar_files(const fs::path& folder) {
  std::array<std::optional<fs::path>, kCifarBatches + 1> files;
  for (int i = 0; i < kCifarBatches; ++i) {
    files[i] = find_packed(folder, "data_batch_" + std::to_string(i + 1) + ".bin");
  }
  files[kCifarBatches] = find_packed(folder, "test_batch.bin");
  return files;
}

bool holds_cifar10(const fs::path& folder) {
  for (const fs::path& candidate : {folder, folder / "cifar-10-batches-bin"}) {
    const auto files = cifar_files(candidate);
    if (std::all_of(files.begin(), files.end(), [](const auto& file) { return file.has_value(); })) return true;
  }
  return false;
}

std::string hex(uint64_t value) {
  char text[17];
  std::snprintf(text, sizeof text, "%016llx", static_cast<unsigned long long>(value));
  return text;
}

struct Fnv {
  uint64_t hash = 0xcbf29ce484222325ull;
  void add(uint8_t byte) { hash = (hash ^ byte) * 0x100000001b3ull; }
};

// Says which images were used without saying where they lay. Taken before the set is cut, so that it names the files.
std::string fingerprint(const Images& images) {
  Fnv fnv;
  for (uint8_t byte : images.pixels) fnv.add(byte);
  for (uint8_t byte : images.labels) fnv.add(byte);
  return "test set fnv1a " + hex(fnv.hash);
}

void apply(const Limits& limits, Dataset& set) {
  if (limits.train != 0) limit(set.train, limits.train);
  if (limits.test != 0) limit(set.test, limits.test);
}

// How many images to generate for a limit, and that it can be met.
int generated_count(int limit, int whole) {
  if (limit == 0) return whole;
  if (limit < 0 || limit > whole) {
    throw InputError("cannot take the first " + std::to_string(limit) + " of " + std::to_string(whole) + " images");
  }
  return limit;
}

Dataset generate(const char* name, const char* kind, Images (*make)(int, uint64_t), int train, int test, uint64_t seed,
                 const Limits& limits) {
  Dataset set;
  set.name = name;
  set.source = std::string("generated ") + kind + ", seed " + std::to_string(seed) + " (no " + name + " files found)";
  set.generated = true;
  // The streams of the two halves differ whatever the seed.
  set.train = make(generated_count(limits.train, train), 2 * seed);
  set.test = make(generated_count(limits.test, test), 2 * seed + 1);
  return set;
}

// Where the set lies by the search order, or nothing.
std::optional<fs::path> locate(const std::optional<fs::path>& data_option, const char* name,
                               bool (*holds)(const fs::path&), const char* looked_for) {
  const auto at = [&](const fs::path& place) -> std::optional<fs::path> {
    for (const fs::path& folder : {place, place / name}) {
      if (holds(folder)) return folder;
    }
    return std::nullopt;
  };
  if (data_option) {
    if (auto folder = at(*data_option)) return folder;
    throw InputError("--data " + data_option->string() + " does not hold " + name +
                     ": looked there and in its folder " + name + " for " + looked_for + " (plain, .gz or .xz)");
  }
  if (const char* variable = std::getenv("BATON_DATA"); variable && *variable) {
    if (auto folder = at(variable)) return folder;
  }
  return at("data");
}

// Fisher-Yates, from the top down.
std::vector<int32_t> permutation(int count, uint64_t seed) {
  std::vector<int32_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  SplitMix64 random(seed, 0);
  for (int i = count - 1; i > 0; --i) std::swap(order[i], order[random.below(static_cast<uint64_t>(i) + 1)]);
  return order;
}

void check_parts(int count, int parts) {
  if (parts > 0 && parts <= count) return;
  throw InputError("cannot split " + std::to_string(count) + " images into " + std::to_string(parts) + " parts");
}

}  // namespace

Images idx_images(std::vector<uint8_t> bytes, const fs::path& path) {
  constexpr size_t kHeader = 16;
  constexpr uint32_t kMostImages = INT32_MAX, kMostSide = 1 << 14;  // keeps the products below within 64 bits
  check_idx_header(bytes, path, kImageMagic, kHeader);
  const uint32_t count = big_endian(bytes, 4), height = big_endian(bytes, 8), width = big_endian(bytes, 12);
  if (count == 0 || height == 0 || width == 0 || count > kMostImages || height > kMostSide || width > kMostSide) {
    throw InputError(path.string() + ": its header says " + std::to_string(count) + " images of " +
                     std::to_string(height) + " x " + std::to_string(width));
  }
  check_idx_length(bytes.size(), kHeader + uint64_t{count} * height * width, path);
  bytes.erase(bytes.begin(), bytes.begin() + kHeader);
  return {static_cast<int>(count), 1, static_cast<int>(height), static_cast<int>(width), 0, std::move(bytes), {}};
}

std::vector<uint8_t> idx_labels(std::vector<uint8_t> bytes, const fs::path& path) {
  constexpr size_t kHeader = 8;
  check_idx_header(bytes, path, kLabelMagic, kHeader);
  check_idx_length(bytes.size(), kHeader + uint64_t{big_endian(bytes, 4)}, path);
  bytes.erase(bytes.begin(), bytes.begin() + kHeader);
  return bytes;
}

void append_cifar(Images& to, const std::vector<uint8_t>& bytes, const fs::path& path) {
  const bool fine = to.classes == 100;
  const size_t head = fine ? 2 : 1, record = head + kCifarPixels;
  if (bytes.empty() || bytes.size() % record != 0) {
    throw InputError(path.string() + (fine ? " is not a CIFAR-100 file: " : " is not a CIFAR-10 batch: ") +
                     std::to_string(bytes.size()) + " bytes, expected a whole number of records of " +
                     std::to_string(record));
  }
  for (size_t at = 0; at < bytes.size(); at += record) {
    const uint8_t label = bytes[at + head - 1];
    if (fine && (bytes[at] >= 20 || label >= 100)) {
      throw InputError(path.string() + ": labels " + std::to_string(bytes[at]) + " and " + std::to_string(label) +
                       " of record " + std::to_string(at / record) + ", expected one below 20 and one below 100");
    }
    if (!fine && label >= 10) {
      throw InputError(path.string() + ": label " + std::to_string(label) + " of record " +
                       std::to_string(at / record) + ", expected one below 10");
    }
    to.labels.push_back(label);
    to.pixels.insert(to.pixels.end(), bytes.begin() + at + head, bytes.begin() + at + record);
  }
  to.count = static_cast<int>(to.labels.size());
}

void check_labels(const Images& images, const fs::path& path, const fs::path& images_path) {
  if (images.labels.size() != static_cast<size_t>(images.count)) {
    throw InputError(path.string() + " has " + std::to_string(images.labels.size()) + " labels, but " +
                     images_path.string() + " has " + std::to_string(images.count) + " images");
  }
  for (int i = 0; i < images.count; ++i) {
    if (images.labels[i] < images.classes) continue;
    throw InputError(path.string() + ": label " + std::to_string(images.labels[i]) + " of image " + std::to_string(i) +
                     ", expected one below " + std::to_string(images.classes));
  }
}

std::optional<fs::path> find_packed(const fs::path& folder, const std::string& name) {
  for (const char* suffix : {"", ".gz", ".xz"}) {
    std::error_code ignored;
    const fs::path path = folder / (name + suffix);
    if (fs::is_regular_file(path, ignored)) return path;
  }
  return std::nullopt;
}

std::optional<fs::path> find_idx(const fs::path& folder, const std::string& part, const std::string& content) {
  const std::string axes = content == "images" ? "idx3-ubyte" : "idx1-ubyte";
  if (auto path = find_packed(folder, part + "-" + content + "-" + axes)) return path;
  return find_packed(folder, part + "-" + content + "." + axes);
}

Images read_idx(const fs::path& images_path, const fs::path& labels_path, int classes) {
  if (classes < 1 || classes > 256) throw InputError("classes must be 1 to 256, not " + std::to_string(classes));
  Images images = idx_images(read_file(images_path), images_path);
  images.classes = classes;
  images.labels = idx_labels(read_file(labels_path), labels_path);
  check_labels(images, labels_path, images_path);
  return images;
}

Images read_cifar10(const std::vector<fs::path>& batches) {
  // Unpacking xz is most of the time, so the files are read side by side.
  std::vector<std::future<std::vector<uint8_t>>> files;
  for (const fs::path& path : batches) {
    files.push_back(std::async(std::launch::async, [&path] { return read_file(path); }));
  }
  std::vector<std::vector<uint8_t>> contents;
  size_t bytes = 0;
  for (auto& file : files) {
    contents.push_back(file.get());
    bytes += contents.back().size();
  }
  Images images{0, 3, 32, 32, 10, {}, {}};
  images.pixels.reserve(bytes / kCifarRecord * kCifarPixels);
  for (size_t file = 0; file < contents.size(); ++file) append_cifar(images, contents[file], batches[file]);
  return images;
}

Images read_cifar100(const fs::path& path) {
  Images images{0, 3, 32, 32, 100, {}, {}};
  append_cifar(images, read_file(path), path);
  return images;
}

Images load_idx_test(const fs::path& folder) { return read_idx_part(folder, "t10k"); }

Dataset load_mnist(const fs::path& folder, Limits limits) {
  Dataset set;
  set.name = "mnist";
  set.path = folder.string();
  set.train = read_idx_part(folder, "train");
  set.test = read_idx_part(folder, "t10k");
  if (set.train.height != set.test.height || set.train.width != set.test.width) {
    throw InputError(folder.string() + ": training images of " + std::to_string(set.train.height) + " x " +
                     std::to_string(set.train.width) + ", but test images of " + std::to_string(set.test.height) +
                     " x " + std::to_string(set.test.width));
  }
  set.source = "MNIST, IDX files, " + fingerprint(set.test);
  apply(limits, set);
  return set;
}

Dataset load_cifar10(const fs::path& folder, Limits limits) {
  const fs::path inner = folder / "cifar-10-batches-bin";
  std::error_code ignored;
  const bool nested = !find_packed(folder, "data_batch_1.bin") && fs::is_directory(inner, ignored);
  const fs::path place = nested ? inner : folder;
  const auto files = cifar_files(place);
  for (int i = 0; i < kCifarBatches; ++i) {
    if (!files[i]) throw_missing(place, "data_batch_" + std::to_string(i + 1) + ".bin");
  }
  if (!files[kCifarBatches]) throw_missing(place, "test_batch.bin");

  // Unpacking five batches takes seconds; a run on the first few thousand images needs only one.
  int needed = kCifarBatches;
  if (limits.train > 0) needed = std::min(kCifarBatches, (limits.train - 1) / kCifarBatchCount + 1);
  std::vector<fs::path> batches;
  for (int i = 0; i < needed; ++i) batches.push_back(*files[i]);

  Dataset set;
  set.name = "cifar10";
  set.path = place.string();
  set.train = read_cifar10(batches);
  if (needed < kCifarBatches && set.train.count < limits.train) {  // shorter batches than the official ones
    for (int i = needed; i < kCifarBatches; ++i) batches.push_back(*files[i]);
    set.train = read_cifar10(batches);
  }
  set.test = read_cifar10({*files[kCifarBatches]});
  set.source = "CIFAR-10, binary batches, " + fingerprint(set.test);
  apply(limits, set);
  return set;
}

Dataset load_cifar100(const fs::path& folder) {
  const fs::path inner = folder / "cifar-100-binary";
  std::error_code ignored;
  const fs::path place = !find_packed(folder, "train.bin") && fs::is_directory(inner, ignored) ? inner : folder;
  Dataset set;
  set.name = "cifar100";
  set.path = place.string();
  for (const char* name : {"train.bin", "test.bin"}) {
    const auto file = find_packed(place, name);
    if (!file) throw_missing(place, name);
    (std::string(name) == "train.bin" ? set.train : set.test) = read_cifar100(*file);
  }
  set.source = "CIFAR-100, binary files, " + fingerprint(set.test);
  return set;
}

Dataset find_mnist(const std::optional<fs::path>& data_option, uint64_t seed, Limits limits) {
  const auto folder =
      locate(data_option, "mnist", holds_mnist, "train-images-idx3-ubyte and the three other IDX files");
  if (folder) return load_mnist(*folder, limits);
  return generate("mnist", "digits", generate_digits, 60000, 10000, seed, limits);
}

Dataset find_cifar10(const std::optional<fs::path>& data_option, uint64_t seed, Limits limits) {
  const auto folder = locate(data_option, "cifar10", holds_cifar10, "data_batch_1.bin to _5.bin and test_batch.bin");
  if (folder) return load_cifar10(*folder, limits);
  return generate("cifar10", "textures", generate_textures, 50000, 10000, seed, limits);
}

void limit(Images& images, int n) {
  if (n <= 0 || n > images.count) {
    throw InputError("cannot take the first " + std::to_string(n) + " of " + std::to_string(images.count) + " images");
  }
  images.count = n;
  images.pixels.resize(n * images.image_bytes());
  images.labels.resize(n);
  images.pixels.shrink_to_fit();
}

std::vector<std::vector<int32_t>> split_parts(int count, int parts, uint64_t seed) {
  check_parts(count, parts);
  const std::vector<int32_t> order = permutation(count, seed);
  std::vector<std::vector<int32_t>> result;
  auto from = order.begin();
  for (int part = 0; part < parts; ++part) {
    const auto to = from + count / parts + (part < count % parts ? 1 : 0);
    result.emplace_back(from, to);
    from = to;
  }
  return result;
}

std::vector<std::vector<int32_t>> split_parts_stratified(std::span<const uint8_t> labels, int parts, uint64_t seed) {
  const int count = static_cast<int>(labels.size());
  check_parts(count, parts);
  const std::vector<int32_t> order = permutation(count, seed);
  // Deals the images out like cards, one class after the other; within a part they stay in random order.
  std::array<int, 256> dealt{};
  for (uint8_t label : labels) ++dealt[label];
  std::exclusive_scan(dealt.begin(), dealt.end(), dealt.begin(), 0);
  std::vector<std::vector<int32_t>> result(parts);
  for (int32_t index : order) result[dealt[labels[index]]++ % parts].push_back(index);
  return result;
}

uint64_t index_hash(std::span<const int32_t> indices) {
  Fnv fnv;
  for (int32_t index : indices) {
    for (int shift = 0; shift < 32; shift += 8) fnv.add(static_cast<uint8_t>(static_cast<uint32_t>(index) >> shift));
  }
  return fnv.hash;
}

Images subset(const Images& images, std::span<const int32_t> indices) {
  Images to = images;
  const size_t bytes = images.image_bytes();
  to.count = static_cast<int>(indices.size());
  to.pixels.resize(bytes * indices.size());
  to.labels.resize(indices.size());
  for (size_t i = 0; i < indices.size(); i++) {
    if (indices[i] < 0 || indices[i] >= images.count)
      throw InputError("subset: image " + std::to_string(indices[i]) + " of " + std::to_string(images.count));
    std::copy_n(&images.pixels[bytes * indices[i]], bytes, &to.pixels[bytes * i]);
    to.labels[i] = images.labels[indices[i]];
  }
  return to;
}

Images of_classes(const Images& images, std::span<const int> classes) {
  std::vector<int> label(images.classes, -1);
  for (size_t k = 0; k < classes.size(); k++) {
    if (classes[k] < 0 || classes[k] >= images.classes || label[classes[k]] >= 0)
      throw InputError("of_classes: class " + std::to_string(classes[k]) + " is not one of " +
                       std::to_string(images.classes) + ", or named twice");
    label[classes[k]] = static_cast<int>(k);
  }
  std::vector<int32_t> indices;
  for (int i = 0; i < images.count; i++)
    if (label[images.labels[i]] >= 0) indices.push_back(i);
  Images to = subset(images, indices);
  to.classes = static_cast<int>(classes.size());
  for (uint8_t& l : to.labels) l = static_cast<uint8_t>(label[l]);
  return to;
}

}  // namespace baton
