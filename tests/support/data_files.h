// Data sets in every format that load_own_data() reads, written for a test into a folder of its own.
#pragma once
#include <gtest/gtest.h>
#include <png.h>
#include <turbojpeg.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "engine/error.h"
#include "engine/io/files.h"
#include "engine/io/npy.h"
#include "engine/io/own_data.h"
#include "tests/support/packed.h"

namespace baton::test {

namespace fs = std::filesystem;

// The folder goes with the test.
class DataFiles : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "baton-own-data-XXXXXX").string();
    ASSERT_TRUE(mkdtemp(name.data()));
    root_ = name;
  }
  void TearDown() override { fs::remove_all(root_); }

  fs::path at(const std::string& name) const { return root_ / name; }
  void write(const std::string& name, const Bytes& bytes) const {
    fs::create_directories(at(name).parent_path());
    std::ofstream(at(name), std::ios::binary).write(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }

  // The message of the InputError, without the folder's name; the message is one line.
  std::string error_of(const std::function<void()>& work) const {
    try {
      work();
    } catch (const InputError& error) {
      std::string text = error.what();
      EXPECT_TRUE(std::none_of(text.begin(), text.end(), [](unsigned char c) { return std::iscntrl(c); })) << text;
      for (size_t place; (place = text.find(root_.string() + "/")) != std::string::npos;) {
        text.erase(place, root_.string().size() + 1);
      }
      return text;
    }
    return "no error";
  }
  std::string error_of(const std::string& name, const OwnDataOptions& options = {}) const {
    return error_of([&] { load_own_data(at(name), options); });
  }
  OwnData load(const std::string& name, const OwnDataOptions& options = {}) const {
    return load_own_data(at(name), options);
  }

  fs::path root_;
};

inline bool has(const std::string& text, const std::string& piece) { return text.find(piece) != std::string::npos; }
#define EXPECT_HAS(text, piece) EXPECT_PRED2(baton::test::has, text, piece)

// Images that differ in every pixel, in planes.
inline Images make_images(int count, int channels, int height, int width, int classes = 3) {
  Images images{count, channels, height, width, classes, {}, {}};
  for (size_t i = 0; i < count * images.image_bytes(); ++i) images.pixels.push_back(static_cast<uint8_t>(i * 41 + 7));
  for (int i = 0; i < count; ++i) images.labels.push_back(static_cast<uint8_t>((2 * i + 1) % classes));
  return images;
}

inline Bytes words(std::initializer_list<uint32_t> values) {
  Bytes bytes;
  for (uint32_t value : values) {
    for (int shift = 24; shift >= 0; shift -= 8) bytes.push_back(static_cast<uint8_t>(value >> shift));
  }
  return bytes;
}

inline Bytes joined(Bytes first, const Bytes& second) {
  first.insert(first.end(), second.begin(), second.end());
  return first;
}

inline Bytes idx(const Images& images) {
  return joined(words({2051, uint32_t(images.count), uint32_t(images.height), uint32_t(images.width)}), images.pixels);
}
inline Bytes idx_of_labels(const Bytes& labels) { return joined(words({2049, uint32_t(labels.size())}), labels); }

inline Bytes cifar(const Images& images, bool fine = false) {
  Bytes bytes;
  for (int i = 0; i < images.count; ++i) {
    if (fine) bytes.push_back(static_cast<uint8_t>(i % 20));
    bytes.push_back(images.labels[i]);
    bytes.insert(bytes.end(), images.pixels.begin() + i * 3072, images.pixels.begin() + (i + 1) * 3072);
  }
  return bytes;
}

inline Bytes interleaved(const Images& images) {
  Bytes bytes;
  const size_t pixels = images.image_bytes() / images.channels;
  for (int i = 0; i < images.count; ++i) {
    for (size_t p = 0; p < pixels; ++p) {
      for (int c = 0; c < images.channels; ++c) {
        bytes.push_back(images.pixels[i * images.image_bytes() + c * pixels + p]);
      }
    }
  }
  return bytes;
}

template <class T>
inline Tensor tensor(const std::vector<T>& values, const std::vector<int64_t>& shape) {
  return Tensor::of<T>(values, shape);
}
template <class T>
std::vector<T> scaled(const Bytes& bytes) {
  std::vector<T> values;
  for (uint8_t byte : bytes) values.push_back(static_cast<T>(byte) / 255);
  return values;
}
inline Tensor half_tensor(const std::vector<uint16_t>& halves, const std::vector<int64_t>& shape) {
  Tensor made{"F16", shape, Bytes(2 * halves.size()), {}};
  std::memcpy(made.bytes.data(), halves.data(), made.bytes.size());
  return made;
}
// NumPy's <f2, which save_npy does not write.
inline Bytes npy_of_halves(const std::vector<uint16_t>& halves, const std::string& shape) {
  std::string header = "{'descr': '<f2', 'fortran_order': False, 'shape': " + shape + ", }\n";
  Bytes bytes{0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, static_cast<uint8_t>(header.size()), 0};
  bytes.insert(bytes.end(), header.begin(), header.end());
  return joined(bytes, half_tensor(halves, {int64_t(halves.size())}).bytes);
}

// Image i of the set.
inline Bytes png(const Images& images, int i) {
  const Images one = subset(images, std::vector<int32_t>{i});
  png_image image{};
  image.version = PNG_IMAGE_VERSION;
  image.width = one.width;
  image.height = one.height;
  image.format = one.channels == 1 ? PNG_FORMAT_GRAY : PNG_FORMAT_RGB;
  const Bytes pixels = interleaved(one);
  png_alloc_size_t size = 0;
  EXPECT_TRUE(png_image_write_to_memory(&image, nullptr, &size, 0, pixels.data(), 0, nullptr));
  Bytes bytes(size);
  EXPECT_TRUE(png_image_write_to_memory(&image, bytes.data(), &size, 0, pixels.data(), 0, nullptr));
  bytes.resize(size);
  return bytes;
}

inline Bytes flat_jpeg(int height, int width, uint8_t value) {
  tjhandle encoder = tjInitCompress();
  unsigned char* data = nullptr;
  unsigned long size = 0;
  const Bytes pixels(height * width, value);
  tjCompress2(encoder, pixels.data(), width, 0, height, TJPF_GRAY, &data, &size, TJSAMP_GRAY, 100, 0);
  const Bytes bytes(data, data + size);
  tjFree(data);
  tjDestroy(encoder);
  return bytes;
}

inline void expect_images(const OwnData& data, const Images& want, const std::string& format) {
  EXPECT_EQ(data.images.count, want.count);
  EXPECT_EQ(data.images.channels, want.channels);
  EXPECT_EQ(data.images.height, want.height);
  EXPECT_EQ(data.images.width, want.width);
  EXPECT_EQ(data.images.classes, want.classes);
  EXPECT_EQ(data.images.pixels, want.pixels);
  EXPECT_EQ(data.images.labels, want.labels);
  EXPECT_EQ(data.labelled, true);
  EXPECT_EQ(data.format, format);
  EXPECT_EQ(content_hash(data.images), content_hash(want));
}

inline void expect_unlabelled(const OwnData& data, const Images& want) {
  EXPECT_FALSE(data.labelled);
  EXPECT_EQ(data.images.pixels, want.pixels);
  EXPECT_EQ(data.images.labels, Bytes(want.count, 0));
  EXPECT_GE(data.images.classes, 1);
}

inline OwnDataOptions with(const std::function<void(OwnDataOptions&)>& set) {
  OwnDataOptions options;
  set(options);
  return options;
}

}  // namespace baton::test
