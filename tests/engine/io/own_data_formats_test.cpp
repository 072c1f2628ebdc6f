// A user's own data in single files: IDX, CIFAR binary and NumPy; and the limits of reading a file.
#include <gtest/gtest.h>
#include <zlib.h>

#include <cmath>
#include <limits>
#include <map>

#include "tests/support/data_files.h"

namespace baton {
namespace {

using namespace test;
using OwnDataFormats = DataFiles;

// ----------------------------------------------------------------------------------------------------------- read_file

TEST_F(OwnDataFormats, ReadFileStopsAtItsLimit) {
  Bytes bytes(3'000'000);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(i * i >> 7);
  for (const Bytes& content : {bytes, gzip(bytes), xz(bytes)}) {
    write("f", content);
    EXPECT_EQ(read_file(at("f"), bytes.size()), bytes);
    EXPECT_EQ(error_of([&] { read_file(at("f"), bytes.size() - 1); }),
              "f has more than 2999999 bytes, the most that are read");
    EXPECT_HAS(error_of([&] { read_file(at("f"), 1'500'000); }), "1500000");
    EXPECT_HAS(error_of([&] { read_file(at("f"), 0); }), "f has more than 0");
    EXPECT_EQ(read_file(at("f"), UINT64_MAX), bytes);
  }
  write("empty", {});
  EXPECT_EQ(read_file(at("empty"), 0), Bytes{});
  EXPECT_THROW(read_file("/dev/zero", 1000), InputError);
}

TEST_F(OwnDataFormats, AnXzHeaderMayNotClaimGigabytes) {
  Bytes bytes = xz(Bytes(1000, 7));
  // The first block's header: its length / 4 - 1, flags, sizes, the filter's number 0x21, 1, the dictionary's size, a
  // CRC.
  const size_t header = 12, length = (bytes[header] + 1) * 4 - 4;
  const uint8_t filter[] = {0x21, 1};
  const auto place = std::search(bytes.begin() + header, bytes.begin() + header + length, filter, filter + 2) + 2;
  const auto claim = [&](uint8_t code) {
    *place = code;
    const auto crc = static_cast<uint32_t>(crc32(0, &bytes[header], static_cast<uInt>(length)));
    for (int i = 0; i < 4; ++i) bytes[header + length + i] = static_cast<uint8_t>(crc >> (8 * i));
    write("f.xz", bytes);
  };
  claim(28);  // 64 MB, as "xz -9" has it
  EXPECT_EQ(read_file(at("f.xz")).size(), 1000u);
  claim(40);  // 4 GB - 1
  const std::string message = error_of([&] { read_file(at("f.xz")); });
  EXPECT_HAS(message, "cannot unpack f.xz (xz): it asks for 40");
  EXPECT_HAS(message, "MB of memory; at most 256 MB are given");
}

// ---------------------------------------------------------------------------------------------------------------- IDX

TEST_F(OwnDataFormats, IdxWithLabelsBesideIt) {
  const Images images = make_images(6, 1, 4, 3);
  const std::vector<std::pair<std::string, std::string>> names{
      {"train-images-idx3-ubyte", "train-labels-idx1-ubyte"},
      {"b/images.gz", "b/labels.xz"},
      {"c/my-idx3.xz", "c/my-idx1"},
      {"d/images/t10k-images.idx3-ubyte", "d/images/t10k-labels.idx1-ubyte.gz"}};
  for (const auto& [pixels, labels] : names) {
    const auto pack = [](const std::string& name, const Bytes& bytes) {
      return name.ends_with(".gz") ? gzip(bytes) : name.ends_with(".xz") ? xz(bytes) : bytes;
    };
    write(pixels, pack(pixels, idx(images)));
    expect_unlabelled(load(pixels), images);
    EXPECT_HAS(error_of(pixels, with([](auto& o) { o.labels_needed = true; })), "has no labels, and they are needed: ");
    write(labels, pack(labels, idx_of_labels(images.labels)));
    expect_images(load(pixels, with([](auto& o) { o.labels_needed = true; })), images, "IDX");
    EXPECT_TRUE(load(pixels).names.empty());
  }
  write("plain", idx(images));
  EXPECT_EQ(error_of("plain", with([](auto& o) { o.labels_needed = true; })),
            "plain has no labels, and they are needed");
}

TEST_F(OwnDataFormats, IdxWithLabelsElsewhere) {
  const Images images = make_images(6, 1, 4, 3);
  write("a", idx(images));
  write("l", gzip(idx_of_labels(images.labels)));
  save_npy(at("l8.npy"), tensor<uint8_t>(images.labels, {6}));
  save_npy(at("l64.npy"), tensor(std::vector<int64_t>(images.labels.begin(), images.labels.end()), {6, 1}));
  save_npy(at("lf.npy"), tensor(std::vector<float>(images.labels.begin(), images.labels.end()), {6}));
  save_npy(at("lu.npy"), tensor(std::vector<uint64_t>(images.labels.begin(), images.labels.end()), {6}));
  for (const char* labels : {"l", "l8.npy", "l64.npy", "lf.npy", "lu.npy"}) {
    expect_images(load("a", with([&](auto& o) { o.labels = at(labels); })), images, "IDX");
  }
  const auto message = [&](const char* labels) { return error_of("a", with([&](auto& o) { o.labels = at(labels); })); };
  write("short", idx_of_labels({1, 2, 0}));
  EXPECT_EQ(message("short"), "short has 3 labels, but a has 6 images");
  write("none", idx_of_labels({}));
  EXPECT_EQ(message("none"), "none has 0 labels, but a has 6 images");
  EXPECT_EQ(message("a"), "a is an IDX image file where an IDX label file is expected (magic 2051, expected 2049)");
  EXPECT_HAS(message("missing"), "missing");
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const auto& [value, text] : std::map<float, std::string>{{0.5f, "0.5"}, {-1, "-1"}, {256, "256"}}) {
    save_npy(at("bad.npy"), tensor<float>({0, 1, 2, value, 1, 0}, {6}));
    EXPECT_EQ(message("bad.npy"), "bad.npy: label " + text + " of image 3, expected a whole number from 0 to 255");
  }
  save_npy(at("bad.npy"), tensor<float>({nan, 1, 2, 0, 1, 0}, {6}));
  EXPECT_HAS(message("bad.npy"), "label nan of image 0");
  save_npy(at("bad.npy"), tensor<uint8_t>({0, 1, 2, 1, 1, 0}, {3, 2}));
  EXPECT_EQ(message("bad.npy"), "bad.npy has shape [3, 2]; expected labels of shape [n]");
  save_npz(at("l.npz"), {{"y", tensor<uint8_t>(images.labels, {6})}});
  EXPECT_HAS(message("l.npz"), "labels are read from IDX and .npy files");
}

TEST_F(OwnDataFormats, ClassesAreThoseAskedForOrThere) {
  Images images = make_images(6, 1, 4, 3);
  write("images", idx(images));
  write("labels", idx_of_labels(images.labels));
  EXPECT_EQ(load("images").images.classes, 3);
  EXPECT_EQ(load("images", with([](auto& o) { o.classes = 10; })).images.classes, 10);
  EXPECT_EQ(error_of("images", with([](auto& o) { o.classes = 2; })),
            "labels: label 2 of image 2, expected one below 2");
  write("labels", idx_of_labels({0, 1, 255, 0, 0, 0}));
  EXPECT_EQ(load("images").images.classes, 256);
}

TEST_F(OwnDataFormats, SizesMustBeTheNetworks) {
  write("images", idx(make_images(2, 1, 32, 28)));
  const auto size = [](int channels, int height, int width) {
    return with([&](auto& o) { o.channels = channels, o.height = height, o.width = width; });
  };
  EXPECT_EQ(load("images", size(1, 32, 28)).images.height, 32);
  EXPECT_EQ(error_of("images", size(0, 28, 28)), "images has images of 32 x 28 pixels; the network takes 28 x 28");
  EXPECT_EQ(error_of("images", size(0, 0, 32)), "images has images of 32 x 28 pixels; the network takes 32 x 32");
  EXPECT_EQ(error_of("images", size(3, 32, 28)), "images has images of 1 channel; the network takes 3");
  write("batch", cifar(make_images(2, 3, 32, 32)));
  EXPECT_EQ(error_of("batch", size(1, 32, 32)), "batch has images of 3 channels; the network takes 1");
}

TEST_F(OwnDataFormats, DamagedIdxIsRefused) {
  const Bytes whole = idx(make_images(2, 1, 4, 3));
  for (size_t keep = 0; keep < whole.size(); ++keep) {
    write("f", Bytes(whole.begin(), whole.begin() + keep));
    EXPECT_HAS(error_of("f"), "f ") << keep;
  }
  write("f", joined(whole, {0}));
  EXPECT_HAS(error_of("f"), "trailing");
  write("f", idx_of_labels({1, 2}));
  EXPECT_HAS(error_of("f"), "is an IDX label file where an IDX image file is expected");
  write("f", words({2051, 0xffffffff, 0xffffffff, 0xffffffff}));
  EXPECT_HAS(error_of("f"), "its header says");
  write("f", words({2051, 0, 28, 28}));
  EXPECT_HAS(error_of("f"), "0 images");
}

// -------------------------------------------------------------------------------------------------------------- CIFAR

TEST_F(OwnDataFormats, CifarBatches) {
  const Images ten = make_images(4, 3, 32, 32, 10), hundred = make_images(4, 3, 32, 32, 100);
  write("ten", gzip(cifar(ten)));
  write("hundred", cifar(hundred, true));
  expect_images(load("ten"), ten, "CIFAR-10 binary");
  expect_images(load("hundred"), hundred, "CIFAR-100 binary");
  EXPECT_EQ(load("ten", with([](auto& o) { o.classes = 20; })).images.classes, 20);
  EXPECT_EQ(error_of("ten", with([](auto& o) { o.classes = 5; })), "ten: label 5 of image 2, expected one below 5");
  EXPECT_HAS(error_of("ten", with([&](auto& o) { o.labels = at("hundred"); })), "ten holds its labels itself");
  Bytes bytes = cifar(ten);
  bytes[3073] = 10;
  write("ten", bytes);
  EXPECT_EQ(error_of("ten"), "ten: label 10 of record 1, expected one below 10");
  bytes.pop_back();
  write("ten", bytes);
  EXPECT_HAS(error_of("ten"), "ten is of no format that is read (12291 bytes)");
  write("ten", {});
  EXPECT_HAS(error_of("ten"), "(0 bytes)");
}

TEST_F(OwnDataFormats, ALengthThatFitsBothCifarsIsTheAskedOne) {
  // 3074 records of CIFAR-10 are as long as 3073 of CIFAR-100; of zeros, both can be.
  write("both", Bytes(size_t{3073} * 3074));
  EXPECT_EQ(load("both").images.count, 3074);
  EXPECT_EQ(load("both", with([](auto& o) { o.classes = 10; })).format, "CIFAR-10 binary");
  const OwnData fine = load("both", with([](auto& o) { o.classes = 100; }));
  EXPECT_EQ(fine.images.count, 3073);
  EXPECT_EQ(fine.format, "CIFAR-100 binary");
}

TEST_F(OwnDataFormats, ABatchMayBeginAsIdxDoes) {
  Images images = make_images(3, 3, 32, 32, 10);
  images.labels[0] = 0;
  for (int magic : {1, 3}) {
    std::fill_n(images.pixels.begin(), 15, 0);
    images.pixels[1] = 8, images.pixels[2] = static_cast<uint8_t>(magic);
    write("batch", cifar(images));
    expect_images(load("batch"), images, "CIFAR-10 binary");
  }
  // And a file of IDX may be as long as a batch.
  const Images same = make_images(1019, 1, 3, 1);
  write("same", idx(same));
  ASSERT_EQ(fs::file_size(at("same")), 3073u);
  EXPECT_EQ(load("same").format, "IDX");
  EXPECT_EQ(load("same").images.pixels, same.pixels);
}

// -------------------------------------------------------------------------------------------------------------- NumPy

TEST_F(OwnDataFormats, NumpyLayouts) {
  const Images grey = make_images(5, 1, 4, 6), color = make_images(5, 3, 4, 6);
  save_npy(at("labels.npy"), tensor<uint8_t>(grey.labels, {5}));
  const auto labels = with([&](auto& o) { o.labels = at("labels.npy"); });
  const auto check = [&](const Images& images, const Bytes& bytes, const std::vector<int64_t>& shape) {
    save_npy(at("x.npy"), tensor<uint8_t>(bytes, shape));
    expect_images(load("x.npy", labels), images, ".npy");
    OwnDataOptions options = labels;
    options.channels = images.channels;
    expect_images(load("x.npy", options), images, ".npy");
    expect_unlabelled(load("x.npy"), images);
    EXPECT_HAS(error_of("x.npy", with([](auto& o) { o.labels_needed = true; })), "x.npy has no labels");
  };
  check(grey, grey.pixels, {5, 4, 6});
  check(grey, grey.pixels, {5, 1, 4, 6});
  check(grey, grey.pixels, {5, 4, 6, 1});
  check(color, color.pixels, {5, 3, 4, 6});
  check(color, interleaved(color), {5, 4, 6, 3});

  // Both axes could be the channels: it is the second.
  const Images narrow = make_images(5, 3, 4, 3);
  check(narrow, narrow.pixels, {5, 3, 4, 3});
  const Images mixed = make_images(5, 1, 4, 3);
  save_npy(at("x.npy"), tensor<uint8_t>(mixed.pixels, {5, 1, 4, 3}));
  expect_images(load("x.npy", labels), mixed, ".npy");
}

TEST_F(OwnDataFormats, NumpyFloatsAreRounded) {
  const Images images = make_images(64, 1, 2, 2);  // every byte
  save_npy(at("f4.npy"), tensor(scaled<float>(images.pixels), {64, 2, 2}));
  save_npy(at("f8.npy"), tensor(scaled<double>(images.pixels), {64, 2, 2}));
  EXPECT_EQ(load("f4.npy").images.pixels, images.pixels);
  EXPECT_EQ(load("f8.npy").images.pixels, images.pixels);
  save_npy(at("f4.npy"), tensor<float>({0, 1, 0.501f / 255, 0.499f / 255}, {1, 2, 2}));
  EXPECT_EQ(load("f4.npy").images.pixels, (Bytes{0, 255, 1, 0}));
  write("f2.npy", npy_of_halves({0x0000, 0x3c00, 0x3800, 0x3400}, "(1, 2, 2)"));  // 0, 1, 1/2, 1/4
  EXPECT_EQ(load("f2.npy").images.pixels, (Bytes{0, 255, 128, 64}));
}

TEST_F(OwnDataFormats, NumpyThatIsNoSetIsRefused) {
  const auto message = [&](const Tensor& array) {
    save_npy(at("x.npy"), array);
    return error_of("x.npy");
  };
  const std::string expected = "; bytes (uint8) or floats in [0, 1] are expected";
  EXPECT_EQ(message(tensor<float>({0, 1, -0.25f, 1}, {1, 2, 2})), "x.npy has values from -0.25 to 1" + expected);
  EXPECT_EQ(message(tensor<float>({0, 255, 3, 1}, {1, 2, 2})), "x.npy has values from 0 to 255" + expected);
  EXPECT_EQ(message(tensor<double>({0, 1.0001, 0, 1}, {1, 2, 2})), "x.npy has values from 0 to 1.0001" + expected);
  EXPECT_EQ(message(tensor<float>({0, NAN, 1, 1}, {1, 2, 2})), "x.npy has values that are no numbers" + expected);
  EXPECT_HAS(message(tensor<float>({0, INFINITY, 0, 1}, {1, 2, 2})), "to inf");
  EXPECT_EQ(message(tensor<int64_t>({0, 1, 2, 3}, {1, 2, 2})), "x.npy has dtype I64" + expected);
  const std::string shapes = "; expected images of shape [n, h, w], [n, c, h, w] or [n, h, w, c], c = 1 or 3";
  EXPECT_EQ(message(tensor<uint8_t>({0, 1, 2, 3}, {1, 4})), "x.npy has shape [1, 4]" + shapes);
  EXPECT_EQ(message(tensor<uint8_t>(Bytes(16), {1, 2, 4, 2})), "x.npy has shape [1, 2, 4, 2]" + shapes);
  EXPECT_EQ(message(tensor<uint8_t>({}, {0, 2, 2})), "x.npy has shape [0, 2, 2]" + shapes);
  EXPECT_EQ(message(tensor<uint8_t>({}, {2, 0, 2})), "x.npy has shape [2, 0, 2]" + shapes);
  EXPECT_EQ(message(tensor<uint8_t>({3}, {})), "x.npy has shape []" + shapes);
  EXPECT_HAS(message(tensor<uint8_t>(Bytes(4), {1, 1, 1, 2, 2})), shapes);
  save_npy(at("x.npy"), tensor<uint8_t>(Bytes(4), {1, 1, 2, 2}));
  EXPECT_HAS(error_of("x.npy", with([](auto& o) { o.channels = 3; })), "[1, 1, 2, 2]");
  save_npy(at("x.npy"), tensor<uint8_t>(Bytes(4), {1, 2, 2}));
  EXPECT_EQ(error_of("x.npy", with([](auto& o) { o.channels = 3; })),
            "x.npy has images of 1 channel; the network takes 3");
  Bytes bytes = read_file(at("x.npy"));
  bytes.pop_back();
  write("x.npy", bytes);
  EXPECT_HAS(error_of("x.npy"), "x.npy");
}

TEST_F(OwnDataFormats, NpzNames) {
  const Images train = make_images(5, 1, 4, 6), test = make_images(3, 1, 4, 6);
  const Tensor x = tensor<uint8_t>(train.pixels, {5, 4, 6}), y = tensor<uint8_t>(train.labels, {5}),
               other = tensor<uint8_t>(test.pixels, {3, 4, 6}), other_labels = tensor<uint8_t>(test.labels, {3});
  const auto archive = [&](const std::map<std::string, Tensor>& arrays) { save_npz(at("a.npz"), arrays); };
  for (const auto& [images, labels] : {std::pair{"images", "labels"}, {"x", "y"}, {"x_train", "y_train"}}) {
    archive({{images, x}, {labels, y}});
    expect_images(load("a.npz"), train, ".npz");
    archive({{images, x}});
    expect_unlabelled(load("a.npz"), train);
    EXPECT_HAS(error_of("a.npz", with([](auto& o) { o.labels_needed = true; })), "a.npz has no labels");
    write("l", idx_of_labels(train.labels));
    expect_images(load("a.npz", with([&](auto& o) { o.labels = at("l"); })), train, ".npz");
  }
  archive({{"x_train", x}, {"y_train", y}, {"x_test", other}, {"y_test", other_labels}});
  expect_images(load("a.npz"), train, ".npz");
  expect_images(load("a.npz", with([](auto& o) { o.split = Split::test; })), test, ".npz");
  EXPECT_HAS(error_of("a.npz", with([&](auto& o) { o.labels = at("l"); })), "holds its labels itself");
  archive({{"x_test", other}, {"what", y}});
  EXPECT_EQ(error_of("a.npz"), "a.npz holds no images, x or x_train, but what, x_test");
  archive({{"x", x}, {"y", other_labels}});
  EXPECT_EQ(error_of("a.npz"), "a.npz: array 'y' has 3 labels, but a.npz has 5 images");
  archive({{"x", tensor<float>({2}, {1, 1, 1})}});
  EXPECT_HAS(error_of("a.npz"), "a.npz: array 'x' has values from 2 to 2");
  archive({{"x", x}, {"y", y}});
  EXPECT_HAS(error_of("a.npz", with([](auto& o) { o.classes = 2; })), "a.npz: array 'y': label 2 of image 2");
}

}  // namespace
}  // namespace baton
