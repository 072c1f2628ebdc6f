// A user's own data in folders, and what every format has in common: ranges, limits, hashes.
#include "engine/io/own_data.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include "tests/support/data_files.h"

namespace baton {
namespace {

using namespace test;
using OwnDataTest = DataFiles;

// ------------------------------------------------------------------------------------------------------ sets in
// folders

TEST_F(OwnDataTest, FoldersOfMnistKind) {
  const Images train = make_images(5, 1, 4, 6), test = make_images(3, 1, 4, 6);
  const auto half = with([](auto& o) { o.split = Split::test; });
  write("m/train-images-idx3-ubyte.gz", gzip(idx(train)));
  expect_unlabelled(load("m"), train);
  EXPECT_HAS(error_of("m", with([](auto& o) { o.labels_needed = true; })), "train-labels-idx1-ubyte");
  write("m/train-labels.idx1-ubyte", idx_of_labels(train.labels));
  expect_images(load("m"), train, "IDX");
  expect_images(load("m", half), train, "IDX");  // the only half
  write("m/t10k-images-idx3-ubyte", idx(test));
  write("m/t10k-labels-idx1-ubyte", idx_of_labels(test.labels));
  expect_images(load("m"), train, "IDX");
  expect_images(load("m", half), test, "IDX");
  write("l", idx_of_labels({2, 2, 2}));
  EXPECT_EQ(load("m", with([&](auto& o) { o.split = Split::test, o.labels = at("l"); })).images.labels, Bytes(3, 2));
}

TEST_F(OwnDataTest, FoldersOfCifar) {
  const Images all = make_images(10, 3, 32, 32, 10), test = make_images(2, 3, 32, 32, 10);
  for (const std::string folder : {"c", "d/cifar-10-batches-bin"}) {
    for (int i = 0; i < 5; ++i) {
      write(folder + "/data_batch_" + std::to_string(i + 1) + ".bin",
            cifar(subset(all, std::vector<int32_t>{2 * i, 2 * i + 1})));
    }
    write(folder + "/test_batch.bin.xz", xz(cifar(test)));
  }
  const auto half = with([](auto& o) { o.split = Split::test; });
  for (const char* folder : {"c", "d"}) {
    expect_images(load(folder), all, "CIFAR-10 binary");
    expect_images(load(folder, half), test, "CIFAR-10 binary");
  }
  fs::remove(at("c/data_batch_3.bin"));
  EXPECT_EQ(error_of("c"), "c holds no data_batch_3.bin (nor .gz or .xz of it)");
  write("c/data_batch_3.bin", Bytes(100));
  EXPECT_EQ(error_of("c"),
            "c/data_batch_3.bin is not a CIFAR-10 batch: 100 bytes, expected a whole number of records of 3073");
  EXPECT_HAS(error_of("c", with([](auto& o) { o.most_bytes = 4 * 3072; })), "at most 12288 bytes in all");

  const Images fine = make_images(2, 3, 32, 32, 100);
  write("e/test.bin", cifar(fine, true));
  expect_images(load("e"), fine, "CIFAR-100 binary");
}

// ----------------------------------------------------------------------------------------------------------- pictures

TEST_F(OwnDataTest, FoldersOfClasses) {
  Images images = make_images(6, 1, 4, 3);
  images.labels = {0, 0, 0, 1, 2, 2};
  const std::vector<std::string> names{"Zebra/10.png", "Zebra/2.png", "Zebra/a.png", "cat/x", "dog/1.png", "dog/2.png"};
  for (int i : {5, 0, 3, 1, 4, 2}) write("p/" + names[i], png(images, i));
  write("p/.hidden", {1});
  write("p/dog/.DS_Store", {1});
  write("p/.git/HEAD", {1});
  const OwnData data = load("p");
  expect_images(data, images, "folder of pictures");
  EXPECT_EQ(data.names, names);
  EXPECT_EQ(data.class_names, (std::vector<std::string>{"Zebra", "cat", "dog"}));
  expect_images(load("p", with([](auto& o) { o.classes = 3, o.channels = 1, o.height = 4, o.width = 3; })), images,
                "folder of pictures");
  EXPECT_EQ(error_of("p", with([](auto& o) { o.classes = 2; })), "p has 3 classes (Zebra, cat, dog); expected 2");

  const auto known = with([](auto& o) { o.class_names = {"dog", "bird", "Zebra", "cat"}; });
  const OwnData other = load("p", known);
  EXPECT_EQ(other.images.labels, (Bytes{0, 0, 2, 2, 2, 3}));
  EXPECT_EQ(other.images.classes, 4);
  EXPECT_EQ(other.class_names, known.class_names);
  EXPECT_EQ(other.names[0], "dog/1.png");
  EXPECT_EQ(other.names[5], "cat/x");
  EXPECT_EQ(Bytes(other.images.pixels.begin(), other.images.pixels.begin() + 12),
            Bytes(images.pixels.begin() + 48, images.pixels.begin() + 60));
  EXPECT_EQ(error_of("p", with([](auto& o) {
                       o.class_names = {"dog", "cat"};
                     })),
            "p/Zebra is none of the known classes: dog, cat");
  EXPECT_HAS(error_of("p", with([&](auto& o) { o.labels = at("l"); })), "a file of labels has no place beside it");

  fs::create_directories(at("p/emu"));
  EXPECT_EQ(error_of("p"), "p/emu is a class without pictures");
  write("p/emu/.hidden", {1});
  EXPECT_EQ(error_of("p"), "p/emu is a class without pictures");
  write("p/emu/deep/1.png", png(images, 0));
  EXPECT_EQ(error_of("p"), "p/emu/deep is not a file; a picture is expected");
}

TEST_F(OwnDataTest, FoldersOfPictures) {
  const Images images = make_images(3, 1, 4, 3);
  for (int i = 0; i < 3; ++i) write("p/" + std::to_string(i) + ".png", png(images, i));
  const OwnData data = load("p", with([](auto& o) { o.classes = 7; }));
  expect_unlabelled(data, images);
  EXPECT_EQ(data.images.classes, 7);
  EXPECT_EQ(data.names, (std::vector<std::string>{"0.png", "1.png", "2.png"}));
  EXPECT_TRUE(data.class_names.empty());
  EXPECT_EQ(error_of("p", with([](auto& o) { o.labels_needed = true; })),
            "p has no labels, and they are needed: a folder for each class is expected");
  write("p/cat/1.png", png(images, 0));
  EXPECT_EQ(error_of("p"), "p/0.png lies beside folders of classes; only folders are expected there");
  fs::create_directories(at("none"));
  EXPECT_EQ(error_of("none"), "none holds no pictures");
  EXPECT_EQ(error_of("p/0.png"), "p/0.png is a picture; a folder of pictures is expected");
  EXPECT_HAS(error_of("missing"), "cannot open missing");
}

TEST_F(OwnDataTest, PicturesAreMadeGreyOrColoured) {
  const Images grey = make_images(1, 1, 4, 3), color = make_images(1, 3, 4, 3);
  write("p/a.png", png(color, 0));
  write("p/b.png", png(grey, 0));
  const OwnData three = load("p", with([](auto& o) { o.channels = 3; }));
  EXPECT_EQ(three.images.channels, 3);
  Bytes want = color.pixels;
  for (int c = 0; c < 3; ++c) want = joined(want, grey.pixels);
  EXPECT_EQ(three.images.pixels, want);
  const OwnData one = load("p", with([](auto& o) { o.channels = 1; }));
  EXPECT_EQ(one.images.channels, 1);
  EXPECT_EQ(Bytes(one.images.pixels.begin() + 12, one.images.pixels.end()), grey.pixels);
  EXPECT_EQ(error_of("p"), "p/b.png is 4 x 3 pixels in grey; a.png is 4 x 3 pixels in colour");
}

TEST_F(OwnDataTest, TheFirstOddPictureIsReported) {
  const Images images = make_images(1, 1, 28, 28);
  for (int i = 100; i < 140; ++i) write("p/cat/" + std::to_string(i), png(images, 0));
  const auto size = with([](auto& o) { o.height = o.width = 28; });
  write("p/cat/130", png(make_images(1, 1, 32, 28), 0));
  EXPECT_EQ(error_of("p", size), "p/cat/130 is 32 x 28 pixels; the network takes 28 x 28");
  EXPECT_EQ(error_of("p"), "p/cat/130 is 32 x 28 pixels in grey; cat/100 is 28 x 28 pixels in grey");
  write("p/cat/131", {1, 2, 3});
  write("p/cat/120", png(make_images(1, 1, 28, 14 * 4), 0));
  write("p/cat/119", flat_jpeg(28, 28, 9));
  for (int round = 0; round < 20; ++round) {
    EXPECT_EQ(error_of("p", size), "p/cat/120 is 28 x 56 pixels; the network takes 28 x 28");
  }
  // The same number of pixels does not make the same size.
  write("p/cat/101", png(make_images(1, 1, 14, 56), 0));
  EXPECT_HAS(error_of("p"), "p/cat/101 is 14 x 56 pixels");
  write("p/cat/101", {1, 2, 3});
  EXPECT_EQ(error_of("p"), "p/cat/101 is no picture: expected a PNG or a JPEG file");
  Bytes cut = png(images, 0);
  cut.pop_back();
  write("p/cat/100", cut);
  EXPECT_HAS(error_of("p"), "p/cat/100 is a damaged PNG");
}

TEST_F(OwnDataTest, BlocksAndThreadsKeepTheOrder) {
  Images images{1, 1, 1024, 2048, 1, {}, {0}};  // of 2 MB, so that 32 are a block
  for (int i = 0; i < 40; ++i) {
    images.pixels.assign(images.image_bytes(), static_cast<uint8_t>(3 * i));
    write("p/" + std::to_string(100 + i), png(images, 0));
  }
  const OwnData data = load("p");
  ASSERT_EQ(data.images.count, 40);
  for (int i = 0; i < 40; ++i) {
    EXPECT_EQ(data.images.pixels[i * images.image_bytes()], 3 * i);
    EXPECT_EQ(data.images.pixels[(i + 1) * images.image_bytes() - 1], 3 * i);
  }
  write("p/139", {1});
  EXPECT_HAS(error_of("p"), "p/139 is no picture");
}

TEST_F(OwnDataTest, OddNamesStayWithinTheFolder) {
  const Images images = make_images(2, 1, 4, 3);
  write("secret/1.png", png(images, 0));
  write("p/cat/1.png", png(images, 1));
  const std::vector<std::string> odd{"../secret", "cat/../../secret", "", "/", "cat"};
  const OwnData data = load("p", with([&](auto& o) { o.class_names = odd; }));
  EXPECT_EQ(data.images.count, 1);
  EXPECT_EQ(data.images.labels, Bytes{4});

  fs::create_symlink(at("secret/1.png"), at("p/cat/2.png"));  // the user's own doing
  EXPECT_EQ(load("p").images.count, 2);
  fs::create_symlink(at("nowhere"), at("p/cat/3.png"));
  EXPECT_EQ(error_of("p"), "p/cat/3.png is not a file; a picture is expected");
  fs::remove(at("p/cat/3.png"));
  ASSERT_EQ(mkfifo(at("p/cat/3.png").c_str(), 0600), 0);
  EXPECT_EQ(error_of("p"), "p/cat/3.png is not a file; a picture is expected");
  EXPECT_EQ(error_of("p/cat/3.png"), "p/cat/3.png is not a file");
  fs::remove(at("p/cat/3.png"));
  write("p/cat/4\n5\x01.png", {1});
  EXPECT_EQ(error_of("p"), "p/cat/4?5?.png is no picture: expected a PNG or a JPEG file");
}

// ----------------------------------------------------------------------------------------------- ranges, limits,
// hashes

TEST_F(OwnDataTest, RangesOfEveryFormat) {
  const Images color = make_images(7, 3, 32, 32, 7);
  Images grey = make_images(7, 1, 32, 32, 7);
  grey.labels = {0, 1, 2, 3, 4, 5, 6};
  write("images", idx(grey));
  write("labels", idx_of_labels(grey.labels));
  write("batch", cifar(color));
  save_npy(at("x.npy"), tensor<uint8_t>(grey.pixels, {7, 32, 32}));
  for (int i = 0; i < 7; ++i) write("p/" + std::to_string(i) + "/a.png", png(grey, i));
  for (const char* name : {"images", "batch", "x.npy", "p"}) {
    const OwnData all = load(name);
    for (const auto& [first, last] : {std::pair{0, 7}, {2, 5}, {6, 0}, {3, 7}, {0, 1}}) {
      const OwnData data = load(name, with([&](auto& o) { o.first = first, o.last = last; }));
      std::vector<int32_t> indices;
      for (int i = first; i < (last ? last : 7); ++i) indices.push_back(i);
      const Images want = subset(all.images, indices);
      EXPECT_EQ(data.images.count, want.count);
      EXPECT_EQ(data.images.pixels, want.pixels);
      EXPECT_EQ(data.images.labels, want.labels);
      EXPECT_EQ(data.images.classes, all.images.classes);
      EXPECT_EQ(data.class_names, all.class_names);
      if (name == std::string("p")) {
        EXPECT_EQ(data.names,
                  std::vector<std::string>(all.names.begin() + first, all.names.begin() + (last ? last : 7)));
      }
    }
    const auto message = [&](int first, int last) {
      return error_of(name, with([&](auto& o) { o.first = first, o.last = last; }));
    };
    EXPECT_EQ(message(5, 9), std::string(name) + " holds 7 images; those from 5 to before 9 are asked for");
    EXPECT_EQ(message(7, 0), std::string(name) + " holds 7 images; those from 7 are asked for");
    for (const auto& [first, last] : {std::pair{-1, 3}, {0, -1}, {3, 3}, {4, 2}}) {
      EXPECT_HAS(message(first, last), "are no range");
    }
  }
  // What lies outside the range is not decoded.
  write("p/6/a.png", {1});
  EXPECT_EQ(load("p", with([](auto& o) { o.last = 6; })).images.count, 6);
}

TEST_F(OwnDataTest, TooManyBytesAreRefused) {
  const Images images = make_images(4, 1, 10, 10);
  write("images", idx(images));
  save_npy(at("x.npy"), tensor(scaled<double>(images.pixels), {4, 10, 10}));
  save_npz(at("x.npz"), {{"x", tensor<uint8_t>(images.pixels, {4, 10, 10})}});
  for (int i = 0; i < 4; ++i) write("p/" + std::to_string(i), png(images, i));
  for (const char* name : {"images", "x.npy", "x.npz", "p"}) {
    EXPECT_EQ(load(name, with([](auto& o) { o.most_bytes = 400; })).images.count, 4);
    EXPECT_EQ(error_of(name, with([](auto& o) { o.most_bytes = 399; })),
              std::string(name) + " holds 4 images of 100 bytes; at most 399 bytes in all are loaded");
    EXPECT_NE(error_of(name, with([](auto& o) { o.most_bytes = 0; })), "no error");
    EXPECT_EQ(load(name, with([](auto& o) { o.most_bytes = UINT64_MAX; })).images.count, 4);
  }
  write("bomb", gzip(joined(words({2051, 4, 1000, 1000}), Bytes(4'000'000))));
  EXPECT_HAS(error_of("bomb", with([](auto& o) { o.most_bytes = 1000; })), "bomb has more than");
  save_npy(at("x.npy"), tensor<uint8_t>(Bytes(10'000'000), {100, 100, 1000}));
  EXPECT_HAS(error_of("x.npy", with([](auto& o) { o.most_bytes = 1000; })), "x.npy has 10000");
}

TEST_F(OwnDataTest, SenselessOptionsAreRefused) {
  write("images", idx(make_images(4, 1, 10, 10)));
  EXPECT_HAS(error_of("images", with([](auto& o) { o.channels = 2; })), "channels is 2; expected 1 or 3");
  EXPECT_HAS(error_of("images", with([](auto& o) { o.classes = 257; })), "classes is 257; expected 1 to 256");
  EXPECT_HAS(error_of("images", with([](auto& o) { o.classes = -1; })), "classes is -1");
  EXPECT_HAS(error_of("images", with([](auto& o) { o.height = -1; })), "height is -1");
  EXPECT_HAS(error_of("images", with([](auto& o) { o.width = -5; })), "width is -5");
  EXPECT_HAS(error_of("images", with([](auto& o) { o.class_names.resize(257); })), "257 classes");
}

TEST_F(OwnDataTest, TheHashIsOfTheImagesNotOfTheirFormat) {
  Images images = make_images(4, 3, 32, 32, 4);
  images.labels = {0, 1, 2, 3};
  std::vector<uint64_t> hashes{content_hash(images)};
  write("batch", cifar(images));
  hashes.push_back(content_hash(load("batch").images));
  write("l", idx_of_labels(images.labels));
  save_npy(at("x.npy"), tensor(scaled<float>(interleaved(images)), {4, 32, 32, 3}));
  hashes.push_back(content_hash(load("x.npy", with([&](auto& o) { o.labels = at("l"); })).images));
  for (int i = 0; i < 4; ++i) write("p/" + std::to_string(i) + "/a.png", png(images, i));
  hashes.push_back(content_hash(load("p").images));
  EXPECT_EQ(std::count(hashes.begin(), hashes.end(), hashes[0]), 4);

  EXPECT_NE(content_hash(subset(images, std::vector<int32_t>{1, 0, 2, 3})), hashes[0]);
  EXPECT_NE(content_hash(subset(images, std::vector<int32_t>{0, 1, 2})), hashes[0]);
  Images other = images;
  other.classes = 10;  // what the labels are taken for, not what they are
  EXPECT_EQ(content_hash(other), hashes[0]);
  other.labels[2] = 1;
  EXPECT_NE(content_hash(other), hashes[0]);
  other = images;
  std::swap(other.height, other.channels);
  EXPECT_NE(content_hash(other), hashes[0]);
  other = images;
  other.height = 16, other.width = 64;
  EXPECT_NE(content_hash(other), hashes[0]);
  other = images;
  other.pixels.back() ^= 1;
  EXPECT_NE(content_hash(other), hashes[0]);

  EXPECT_EQ(hash_text(0x00c0ffee00c0ffee), "00c0ffee00c0ffee");
  EXPECT_EQ(hash_text(UINT64_MAX), "ffffffffffffffff");
}

}  // namespace
}  // namespace baton
