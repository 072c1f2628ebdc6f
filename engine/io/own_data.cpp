// The format of a file is recognized by its first bytes and its length, never by its name. Everything is read in the
// order of the data set; of several errors in files that are decoded in parallel, the first in that order is thrown.
#include "engine/io/own_data.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <map>
#include <new>
#include <system_error>

#include "engine/io/files.h"
#include "engine/io/npy.h"
#include "engine/io/npy_images.h"
#include "engine/io/own_data_parts.h"
#include "engine/io/picture.h"

namespace baton {
namespace {

using namespace own_data;
using Bytes = std::vector<uint8_t>;

// Without control characters: the name of a file may have any, and a message is one line.
std::string one_line(std::string text) {
  for (char& c : text) {
    if (std::iscntrl(static_cast<unsigned char>(c))) c = '?';
  }
  return text;
}

// ----------------------------------------------------------------------------------------------------------- options

void check_options(const OwnDataOptions& options) {
  const auto refuse = [](const char* what, int value, const char* expected) {
    throw InputError(std::string(what) + " is " + std::to_string(value) + "; expected " + expected);
  };
  if (options.channels != 0 && options.channels != 1 && options.channels != 3) {
    refuse("the number of channels", options.channels, "1 or 3");
  }
  if (options.height < 0) refuse("the height", options.height, "1 or more");
  if (options.width < 0) refuse("the width", options.width, "1 or more");
  if (options.classes < 0 || options.classes > kMostClasses) {
    refuse("the number of classes", options.classes, "1 to 256");
  }
  if (options.class_names.size() > kMostClasses) {
    throw InputError(std::to_string(options.class_names.size()) + " classes are named; at most 256 are known");
  }
  if (options.first < 0 || options.last < 0 || (options.last != 0 && options.last <= options.first)) {
    throw InputError("images " + std::to_string(options.first) + " to " + std::to_string(options.last) +
                     " are no range; expected a first one that is not negative and an end behind it");
  }
}

// Checks a set of any format but pictures against the options, gives it labels if it has none, and cuts it to the range
// that is asked for.
void finish(OwnData& data, const fs::path& path, const fs::path& labels_path, const OwnDataOptions& options) {
  Images& images = data.images;
  if (options.channels != 0 && images.channels != options.channels) {
    refuse(path, "has images of " + std::to_string(images.channels) +
                     (images.channels == 1 ? " channel" : " channels") + "; the network takes " +
                     std::to_string(options.channels));
  }
  check_size(path.string(), "has images of ", images.height, images.width, options);
  check_total(path.string(), images.count, images.image_bytes(), options);
  if (!data.labelled) images.labels.assign(images.count, 0);
  if (options.classes != 0) images.classes = options.classes;
  if (images.classes == 0) {
    images.classes = images.labels.empty() ? 1 : 1 + *std::max_element(images.labels.begin(), images.labels.end());
  }
  check_labels(images, labels_path, path);

  const auto [first, last] = find_range(options, images.count, path);
  if (last - first == static_cast<size_t>(images.count)) return;
  const size_t bytes = images.image_bytes();
  images.count = static_cast<int>(last - first);
  std::copy(images.pixels.begin() + first * bytes, images.pixels.begin() + last * bytes, images.pixels.begin());
  std::copy(images.labels.begin() + first, images.labels.begin() + last, images.labels.begin());
  images.pixels.resize(images.count * bytes);
  images.labels.resize(images.count);
  images.pixels.shrink_to_fit();
}

// ------------------------------------------------------------------------------------------------------------- NumPy

// The images and the labels of an .npz, under any of the names that are in common use.
std::pair<Tensor, std::optional<Tensor>> find_arrays(const fs::path& path, const OwnDataOptions& options) {
  std::map<std::string, Tensor> arrays = load_npz(path, 8 * options.most_bytes + kRoom);
  const std::string split = options.split == Split::train ? "train" : "test";
  const std::array<std::array<std::string, 2>, 3> pairs{
      {{"images", "labels"}, {"x", "y"}, {"x_" + split, "y_" + split}}};
  for (const auto& [x, y] : pairs) {
    const auto images = arrays.find(x), labels = arrays.find(y);
    if (images == arrays.end()) continue;
    std::optional<Tensor> found;
    if (labels != arrays.end()) found = std::move(labels->second);
    return {std::move(images->second), std::move(found)};
  }
  std::vector<std::string> names;
  for (const auto& [name, array] : arrays) names.push_back(name);
  refuse(path, "holds no images, x or x_" + split + (names.empty() ? "" : ", but " + listed(names)));
}

// ------------------------------------------------------------------------------------------------------------- files

bool begins_with(const Bytes& bytes, const char* magic) {
  return bytes.size() >= std::strlen(magic) && std::memcmp(bytes.data(), magic, std::strlen(magic)) == 0;
}

// The content of a file. NumPy's formats are only recognized, as their reader opens the file itself.
struct Content {
  bool npy = false, npz = false;
  Bytes bytes;  // of any other format: all bytes, unpacked
};

// Throws InputError for more than `most` bytes, or 8 times as many in a .npy file, whose numbers may have 8 bytes.
Content read_content(const fs::path& path, uint64_t most) {
  std::error_code error;
  // Reading a pipe would wait for its writer.
  if (fs::exists(path, error) && !fs::is_regular_file(path, error)) refuse(path, "is not a file");
  const auto recognize = [](const Bytes& bytes) {
    return Content{begins_with(bytes, "\x93NUMPY"), begins_with(bytes, "PK\3\4") || begins_with(bytes, "PK\5\6"), {}};
  };
  Bytes start(6);
  std::ifstream file(path, std::ios::binary);
  file.read(reinterpret_cast<char*>(start.data()), static_cast<std::streamsize>(start.size()));
  start.resize(file.gcount());
  Content content = recognize(start);
  if (content.npy && fs::file_size(path, error) > 8 * most && !error) {
    refuse(path, "has " + std::to_string(fs::file_size(path, error)) + " bytes; at most " + std::to_string(8 * most) +
                     " are loaded");
  }
  if (content.npy || content.npz) return content;
  Bytes bytes = read_file(path, most);
  content = recognize(bytes);
  if (!content.npy && !content.npz) content.bytes = std::move(bytes);
  return content;
}

Bytes read_labels(const fs::path& path, uint64_t count) {
  Content content = read_content(path, 64 * count + kRoom);
  if (content.npy) return npy_labels(load_npy(path));
  if (content.npz) refuse(path, "is an .npz archive; labels are read from IDX and .npy files");
  return idx_labels(std::move(content.bytes), path);
}

// The name of the file of labels that belongs to a file of images; empty if the name of the latter does not determine
// it.
std::string guess_labels_name(const fs::path& images) {
  std::string name = images.filename().string();
  for (const char* packed : {".gz", ".xz"}) {
    if (name.ends_with(packed)) name.resize(name.size() - std::strlen(packed));
  }
  const std::string old = name;
  for (const auto& [from, to] : {std::pair<std::string, std::string>{"images", "labels"}, {"idx3", "idx1"}}) {
    if (const size_t at = name.rfind(from); at != std::string::npos) name.replace(at, from.size(), to);
  }
  return name == old ? "" : name;
}

[[noreturn]] void throw_own_labels(const fs::path& path, const fs::path& labels) {
  refuse(path, "holds its labels itself; the labels of " + labels.string() + " have no place beside them");
}

// A batch of CIFAR-10 may begin with the bytes of an IDX file: label 0, dark pixels 0, 8, 3. Then the length decides.
bool is_idx(const Bytes& bytes, bool is_cifar) {
  if (bytes.size() < 4 || bytes[0] != 0 || bytes[1] != 0 || bytes[2] != 8 || (bytes[3] != 1 && bytes[3] != 3)) {
    return false;
  }
  if (!is_cifar || bytes.size() < 16) return true;
  uint64_t length = 1;
  for (size_t at = 4; at < 16; at += 4) {
    const uint64_t extent = uint64_t{bytes[at]} << 24 | bytes[at + 1] << 16 | bytes[at + 2] << 8 | bytes[at + 3];
    if (__builtin_mul_overflow(length, extent, &length)) return false;
  }
  return length == bytes.size() - 16;
}

OwnData load_file(const fs::path& path, const OwnDataOptions& options) {
  Content content = read_content(path, options.most_bytes + options.most_bytes / 1024 + kRoom);
  OwnData data;
  Images& images = data.images;
  fs::path labels_path = path;
  if (content.npz) {
    data.format = ".npz";
    auto [pixels, labels] = find_arrays(path, options);
    if (labels && options.labels) throw_own_labels(path, *options.labels);
    images = npy_images(std::move(pixels), options.channels);
    if (labels) {
      images.labels = npy_labels(*labels);
      labels_path = labels->origin;
      data.labelled = true;
    }
  } else if (content.npy) {
    data.format = ".npy";
    images = npy_images(load_npy(path), options.channels);
  } else {
    const size_t size = content.bytes.size();
    const bool ten = size != 0 && size % 3073 == 0, hundred = size != 0 && size % 3074 == 0;
    if (is_idx(content.bytes, ten || hundred)) {
      data.format = "IDX";
      images = idx_images(std::move(content.bytes), path);
    } else if (looks_like_picture(content.bytes)) {
      refuse(path, "is a picture; a folder of pictures is expected");
    } else if (ten || hundred) {
      if (options.labels) throw_own_labels(path, *options.labels);
      const bool fine = hundred && (!ten || options.classes == 100);
      data.format = fine ? "CIFAR-100 binary" : "CIFAR-10 binary";
      images = {0, 3, 32, 32, fine ? 100 : 10, {}, {}};
      append_cifar(images, content.bytes, path);
      data.labelled = true;
    } else {
      refuse(path, "is of no format that is read (" + std::to_string(size) +
                       " bytes): IDX images, a CIFAR batch, .npy or .npz are expected, or a folder");
    }
  }

  if (!data.labelled) {
    const std::string name = data.format == "IDX" ? guess_labels_name(path) : "";
    auto found = options.labels;
    if (!found && !name.empty()) found = find_packed(path.parent_path(), name);
    if (found) {
      labels_path = *found;
      images.labels = read_labels(labels_path, images.count);
      data.labelled = true;
    } else if (options.labels_needed) {
      refuse(path, "has no labels, and they are needed" + (name.empty() ? "" : ": there is no " + name + " beside it"));
    }
  }
  finish(data, path, labels_path, options);
  return data;
}

// ----------------------------------------------------------------------------------------------------------- folders

OwnData load_batches(const fs::path& folder, const std::vector<std::string>& names, int classes,
                     const OwnDataOptions& options) {
  if (options.labels) throw_own_labels(folder, *options.labels);
  std::vector<fs::path> paths;
  for (const std::string& name : names) {
    const auto path = find_packed(folder, name);
    if (!path) refuse(folder, "holds no " + name + " (nor .gz or .xz of it)");
    paths.push_back(*path);
  }
  std::vector<Bytes> contents(paths.size());
  side_by_side(paths.size(), [&](size_t i) {
    contents[i] = read_file(paths[i], options.most_bytes + options.most_bytes / 1024 + kRoom);
  });
  OwnData data;
  data.format = classes == 100 ? "CIFAR-100 binary" : "CIFAR-10 binary";
  data.images = {0, 3, 32, 32, classes, {}, {}};
  uint64_t records = 0;
  for (const Bytes& content : contents) records += content.size() / 3073;
  check_total(folder.string(), records, 3072, options);
  data.images.pixels.reserve(records * 3072);
  for (size_t i = 0; i < paths.size(); ++i) append_cifar(data.images, contents[i], paths[i]);
  data.labelled = true;
  finish(data, folder, folder, options);
  return data;
}

// Loads a set in the files of MNIST or CIFAR; returns nothing if the folder has none of these files.
std::optional<OwnData> load_known(const fs::path& folder, const OwnDataOptions& options) {
  const bool train = options.split == Split::train;
  for (const std::string part : {train ? "train" : "t10k", train ? "t10k" : "train"}) {
    const auto images = find_idx(folder, part, "images");
    if (!images) continue;
    OwnDataOptions with_labels = options;
    if (!with_labels.labels) with_labels.labels = find_idx(folder, part, "labels");
    return load_file(*images, with_labels);
  }
  using Names = std::vector<std::string>;
  struct Known {
    const char* inner;  // the folder that the publisher's archive unpacks to
    int classes;
    Names train, test;
  };
  Names batches;
  for (int i = 1; i <= 5; ++i) batches.push_back("data_batch_" + std::to_string(i) + ".bin");
  const Known sets[] = {{"cifar-10-batches-bin", 10, batches, {"test_batch.bin"}},
                        {"cifar-100-binary", 100, {"train.bin"}, {"test.bin"}}};
  for (const Known& set : sets) {
    for (const fs::path& place : {folder, folder / set.inner}) {
      for (const Names& half : {train ? set.train : set.test, train ? set.test : set.train}) {
        const bool any = std::any_of(half.begin(), half.end(),
                                     [&](const std::string& name) { return find_packed(place, name).has_value(); });
        if (any) return load_batches(place, half, set.classes, options);
      }
    }
  }
  return std::nullopt;
}

}  // namespace

std::string own_data::product(int64_t height, int64_t width) {
  return std::to_string(height) + " x " + std::to_string(width);
}

std::string own_data::listed(const std::vector<std::string>& names) {
  constexpr size_t kMost = 10;
  std::string text;
  for (size_t i = 0; i < std::min(kMost, names.size()); ++i) text += (i ? ", " : "") + names[i];
  return text + (names.size() > kMost ? ", ..." : "");
}

std::pair<size_t, size_t> own_data::find_range(const OwnDataOptions& options, size_t count, const fs::path& path) {
  const size_t first = options.first, last = options.last == 0 ? count : options.last;
  if (first >= count || last > count) {
    refuse(path, "holds " + std::to_string(count) + " images; those from " + std::to_string(first) +
                     (options.last ? " to before " + std::to_string(last) : "") + " are asked for");
  }
  return {first, last};
}

void own_data::check_total(const std::string& who, uint64_t count, uint64_t image_bytes,
                           const OwnDataOptions& options) {
  if (count <= INT32_MAX && count <= options.most_bytes / image_bytes) return;
  refuse(who, "holds " + std::to_string(count) + " images of " + std::to_string(image_bytes) + " bytes; at most " +
                  std::to_string(options.most_bytes) + " bytes in all are loaded");
}

void own_data::check_size(const std::string& who, const char* verb, int height, int width,
                          const OwnDataOptions& options) {
  if ((options.height == 0 || height == options.height) && (options.width == 0 || width == options.width)) return;
  refuse(who, verb + product(height, width) + " pixels; the network takes " +
                  product(options.height ? options.height : height, options.width ? options.width : width));
}

OwnData load_own_data(const std::filesystem::path& path, const OwnDataOptions& asked) {
  OwnDataOptions options = asked;
  options.most_bytes = std::clamp<uint64_t>(asked.most_bytes, 1, uint64_t{1} << 40);  // keeps sums within 64 bits
  check_options(options);
  try {
    std::error_code ignored;
    if (!fs::is_directory(path, ignored)) return load_file(path, options);
    if (auto known = load_known(path, options)) return *std::move(known);
    return load_pictures(path, options);
  } catch (const InputError& error) {
    throw InputError(one_line(error.what()));
  } catch (const std::bad_alloc&) {
    throw RunError(one_line("cannot load " + path.string() + ": out of memory"));
  }
}

uint64_t content_hash(const Images& images) {
  uint64_t hash = 0xcbf29ce484222325ull;
  const auto add = [&](uint8_t byte) { hash = (hash ^ byte) * 0x100000001b3ull; };
  for (int number : {images.count, images.channels, images.height, images.width}) {
    for (int shift = 0; shift < 32; shift += 8) add(static_cast<uint8_t>(static_cast<uint32_t>(number) >> shift));
  }
  for (uint8_t byte : images.pixels) add(byte);
  for (uint8_t label : images.labels) add(label);
  return hash;
}

std::string hash_text(uint64_t hash) {
  std::array<char, 17> text;
  std::snprintf(text.data(), text.size(), "%016llx", static_cast<unsigned long long>(hash));
  return text.data();
}

}  // namespace baton
