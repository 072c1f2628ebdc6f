// What must hold of everything that a reader returns.
#pragma once
#include <algorithm>
#include <filesystem>

#include "engine/io/own_data.h"
#include "engine/io/safetensors.h"
#include "tests/fuzz/fuzz.h"

namespace baton::fuzz {

inline void check_images(const Images& images) {
  FUZZ_CHECK(images.count >= 1 && images.height >= 1 && images.width >= 1);
  FUZZ_CHECK(images.channels == 1 || images.channels == 3);
  FUZZ_CHECK(images.classes >= 1 && images.classes <= 256);
  FUZZ_CHECK(images.pixels.size() == images.count * images.image_bytes());
  FUZZ_CHECK(images.labels.size() == static_cast<size_t>(images.count));
  FUZZ_CHECK(std::all_of(images.labels.begin(), images.labels.end(), [&](int l) { return l < images.classes; }));
}

inline void check_own_data(const OwnData& data, const OwnDataOptions& options) {
  const Images& images = data.images;
  check_images(images);
  FUZZ_CHECK(options.channels == 0 || images.channels == options.channels);
  FUZZ_CHECK(options.height == 0 || images.height == options.height);
  FUZZ_CHECK(options.width == 0 || images.width == options.width);
  FUZZ_CHECK(options.classes == 0 || images.classes == options.classes);
  FUZZ_CHECK(data.labelled || !options.labels_needed);
  FUZZ_CHECK(data.labelled || std::all_of(images.labels.begin(), images.labels.end(), [](int l) { return l == 0; }));
  FUZZ_CHECK(images.pixels.size() <= options.most_bytes);
  FUZZ_CHECK(data.names.empty() || data.names.size() == static_cast<size_t>(images.count));
  FUZZ_CHECK(data.class_names.empty() || data.class_names.size() == static_cast<size_t>(images.classes));
  FUZZ_CHECK(!data.format.empty() && data.format.find('/') == std::string::npos);
}

// Loads a user's own data; the last image alone must be the same one.
inline OwnData load_and_check(const fs::path& path, OwnDataOptions options) {
  const OwnData data = load_own_data(path, options);
  check_own_data(data, options);
  const Images& all = data.images;
  if (all.count == 1 || all.pixels.size() > 1 << 16) return data;
  options.first = all.count - 1;
  options.last = all.count;
  // Without the others' labels there may seem to be fewer classes.
  const OwnData last = load_own_data(path, options);
  check_own_data(last, options);
  FUZZ_CHECK(last.images.count == 1 && last.images.labels[0] == all.labels.back());
  FUZZ_CHECK(std::equal(last.images.pixels.begin(), last.images.pixels.end(),
                        all.pixels.end() - static_cast<std::ptrdiff_t>(all.image_bytes()), all.pixels.end()));
  return data;
}

inline bool same(const Tensor& a, const Tensor& b) {
  return a.dtype == b.dtype && a.shape == b.shape && a.bytes == b.bytes;
}

inline void check_tensor(const Tensor& tensor) {
  tensor.check();
  FUZZ_CHECK(!tensor.origin.empty());
  FUZZ_CHECK(std::all_of(tensor.shape.begin(), tensor.shape.end(), [](int64_t n) { return n >= 0; }));
}

}  // namespace baton::fuzz
