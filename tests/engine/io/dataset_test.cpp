// Data files and whole files: what is read is what was written, and damage is an error that names the file.
#include "engine/io/dataset.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <numeric>
#include <set>

#include "engine/error.h"
#include "engine/io/files.h"
#include "tests/support/packed.h"

namespace baton {
namespace {

namespace fs = std::filesystem;
using test::Bytes, test::gzip, test::xz;

// A folder of its own that goes with the test.
class Folder {
 public:
  Folder() {
    std::string name = (fs::temp_directory_path() / "baton-dataset-XXXXXX").string();
    if (!mkdtemp(name.data())) throw RunError("mkdtemp");
    path_ = name;
  }
  ~Folder() { fs::remove_all(path_); }
  fs::path operator/(const std::string& name) const { return path_ / name; }
  const fs::path& path() const { return path_; }
  size_t size() const { return std::distance(fs::directory_iterator(path_), fs::directory_iterator()); }

 private:
  fs::path path_;
};

// Sets the search's surroundings, $BATON_DATA and the working folder, and puts them back.
class Surroundings {
 public:
  Surroundings(const fs::path& folder, const char* variable) : folder_(fs::current_path()) {
    if (const char* old = std::getenv("BATON_DATA")) old_ = old;
    fs::current_path(folder);
    set(variable);
  }
  ~Surroundings() {
    fs::current_path(folder_);
    set(old_ ? old_->c_str() : nullptr);
  }

 private:
  static void set(const char* value) { value ? setenv("BATON_DATA", value, 1) : unsetenv("BATON_DATA"); }
  fs::path folder_;
  std::optional<std::string> old_;
};

void write(const fs::path& path, const Bytes& bytes) {
  fs::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

void append_word(Bytes& bytes, uint32_t value) {
  for (int shift = 24; shift >= 0; shift -= 8) bytes.push_back(static_cast<uint8_t>(value >> shift));
}

Bytes idx_images(int count, int height = 4, int width = 3, int first = 0) {
  Bytes bytes;
  for (int word : {2051, count, height, width}) append_word(bytes, word);
  for (int i = 0; i < count * height * width; ++i) bytes.push_back(static_cast<uint8_t>(first + i * 7));
  return bytes;
}

Bytes idx_labels(int count, int first = 0) {
  Bytes bytes;
  for (int word : {2049, count}) append_word(bytes, word);
  for (int i = 0; i < count; ++i) bytes.push_back((first + i) % 10);
  return bytes;
}

void write_mnist(const fs::path& folder, int count, const std::string& dash = "-") {
  write(folder / ("train-images" + dash + "idx3-ubyte"), idx_images(count));
  write(folder / ("train-labels" + dash + "idx1-ubyte.gz"), gzip(idx_labels(count)));
  write(folder / ("t10k-images" + dash + "idx3-ubyte.xz"), xz(idx_images(2)));
  write(folder / ("t10k-labels" + dash + "idx1-ubyte"), idx_labels(2));
}

Bytes cifar_batch(int count, int first = 0) {
  Bytes bytes;
  for (int i = 0; i < count; ++i) {
    bytes.push_back((first + i) % 10);
    for (int k = 0; k < 3072; ++k) bytes.push_back(static_cast<uint8_t>(first + i + k));
  }
  return bytes;
}

void write_cifar10(const fs::path& folder) {
  for (int i = 0; i < 5; ++i) write(folder / ("data_batch_" + std::to_string(i + 1) + ".bin"), cifar_batch(3, i));
  write(folder / "test_batch.bin.xz", xz(cifar_batch(2, 9)));
}

// Records of the fine labels first, first + 1, ..., under coarse labels that are others.
Bytes cifar100_file(int count, int first = 0) {
  Bytes bytes;
  for (int i = first; i < first + count; ++i) {
    bytes.push_back(static_cast<uint8_t>((7 * i + 3) % 20));
    bytes.push_back(static_cast<uint8_t>(i % 100));
    for (int k = 0; k < 3072; ++k) bytes.push_back(static_cast<uint8_t>(i + k));
  }
  return bytes;
}

// The message of the InputError, so that tests can see that it names what is wrong.
template <class Work>
std::string input_error(Work work) {
  try {
    work();
  } catch (const InputError& error) {
    return error.what();
  }
  ADD_FAILURE() << "no InputError";
  return "";
}

bool has(const std::string& text, const std::string& piece) { return text.find(piece) != std::string::npos; }

TEST(ReadFile, UnpacksByContent) {
  const Folder folder;
  Bytes bytes(3'000'000);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(i * i >> 7);
  write(folder / "plain.gz", bytes);
  write(folder / "packed", gzip(bytes));
  write(folder / "packed.bin", xz(bytes));
  write(folder / "empty", {});
  Bytes twice = gzip({1, 2}), second = gzip({3});
  twice.insert(twice.end(), second.begin(), second.end());
  write(folder / "twice", twice);
  EXPECT_EQ(read_file(folder / "plain.gz"), bytes);
  EXPECT_EQ(read_file(folder / "packed"), bytes);
  EXPECT_EQ(read_file(folder / "packed.bin"), bytes);
  EXPECT_EQ(read_file(folder / "empty"), Bytes{});
  EXPECT_EQ(read_file(folder / "twice"), (Bytes{1, 2, 3}));
}

TEST(ReadFile, NamesWhatIsMissingOrDamaged) {
  const Folder folder;
  EXPECT_TRUE(has(input_error([&] { read_file(folder / "none"); }), "none"));
  EXPECT_THROW(read_file(folder.path()), InputError);
  Bytes bytes(50'000);
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<uint8_t>(i * i >> 5);
  for (const Bytes& packed : {gzip(bytes), xz(bytes)}) {
    for (size_t keep : {size_t{7}, packed.size() / 2, packed.size() - 1}) {
      write(folder / "cut", Bytes(packed.begin(), packed.begin() + static_cast<std::ptrdiff_t>(keep)));
      const std::string message = input_error([&] { read_file(folder / "cut"); });
      EXPECT_TRUE(has(message, "cut") && has(message, "truncated")) << message;
    }
    Bytes damaged = packed;
    damaged[packed.size() / 2] ^= 0x40;
    write(folder / "bad", damaged);
    EXPECT_TRUE(has(input_error([&] { read_file(folder / "bad"); }), "bad"));
    Bytes longer = packed;
    longer.insert(longer.end(), {'x', 'y', 'z', 'w'});
    write(folder / "long", longer);
    EXPECT_THROW(read_file(folder / "long"), InputError);
  }
}

TEST(WriteFile, ReplacesAndLeavesNothingBeside) {
  const Folder folder;
  write_file_atomically(folder / "a", "first");
  write_file_atomically(folder / "a", Bytes{1, 2, 3});
  EXPECT_EQ(read_file(folder / "a"), (Bytes{1, 2, 3}));
  fs::create_symlink(folder / "a", folder / "link");
  write_file_atomically(folder / "link", "x");
  EXPECT_TRUE(fs::is_symlink(folder / "link"));
  EXPECT_EQ(read_file(folder / "a"), Bytes{'x'});
  EXPECT_EQ(folder.size(), 2u);
}

TEST(WriteFile, FailsWithoutATrace) {
  const Folder folder;
  EXPECT_THROW(write_file_atomically(folder / "none/a", "text"), RunError);
  EXPECT_THROW(write_file_atomically(folder.path(), "text"), RunError);
  EXPECT_EQ(folder.size(), 0u);

  // A limit on the size of files stands in for a full disk: the write fails part of the way.
  write_file_atomically(folder / "a", "old");
  rlimit old{};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &old), 0);
  rlimit small = old;
  small.rlim_cur = 4096;
  auto* const handler = std::signal(SIGXFSZ, SIG_IGN);
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  std::string message;
  try {
    write_file_atomically(folder / "a", Bytes(100'000));
  } catch (const RunError& error) {
    message = error.what();
  }
  setrlimit(RLIMIT_FSIZE, &old);
  std::signal(SIGXFSZ, handler);
  EXPECT_TRUE(has(message, (folder / "a").string())) << message;
  EXPECT_EQ(read_file(folder / "a"), (Bytes{'o', 'l', 'd'}));
  EXPECT_EQ(folder.size(), 1u);
}

TEST(WriteFile, ReportsAFullDevice) {
  if (!fs::is_character_file("/dev/full")) GTEST_SKIP() << "no /dev/full here";
  EXPECT_THROW(write_file_atomically("/dev/full", "text"), RunError);
  EXPECT_TRUE(fs::is_character_file("/dev/full"));
}

TEST(MakeDirectories, MakesThemOrSaysWhyNot) {
  const Folder folder;
  make_directories(folder / "a/b/c");
  make_directories(folder / "a/b/c");
  EXPECT_TRUE(fs::is_directory(folder / "a/b/c"));
  write(folder / "file", {1});
  EXPECT_THROW(make_directories(folder / "file"), InputError);
  EXPECT_THROW(make_directories(folder / "file/b"), InputError);
}

TEST(Idx, ReadsWhatWasWritten) {
  const Folder folder;
  const Bytes pixels = idx_images(5), labels = idx_labels(5);
  for (int packing = 0; packing < 3; ++packing) {
    const auto pack = [&](const Bytes& bytes) { return packing == 0 ? bytes : packing == 1 ? gzip(bytes) : xz(bytes); };
    write(folder / "i", pack(pixels));
    write(folder / "l", pack(labels));
    const Images images = read_idx(folder / "i", folder / "l");
    EXPECT_EQ(images.count, 5);
    EXPECT_EQ(images.channels, 1);
    EXPECT_EQ(images.height, 4);
    EXPECT_EQ(images.width, 3);
    EXPECT_EQ(images.classes, 10);
    EXPECT_EQ(images.pixels, Bytes(pixels.begin() + 16, pixels.end()));
    EXPECT_EQ(images.labels, Bytes(labels.begin() + 8, labels.end()));
  }
}

TEST(Idx, RefusesDamage) {
  const Folder folder;
  const auto message = [&](const Bytes& images, const Bytes& labels) {
    write(folder / "i", images);
    write(folder / "l", labels);
    return input_error([&] { read_idx(folder / "i", folder / "l"); });
  };
  Bytes images = idx_images(5);
  images.pop_back();
  EXPECT_TRUE(has(message(images, idx_labels(5)), "truncated"));
  images.insert(images.end(), {0, 0});
  EXPECT_TRUE(has(message(images, idx_labels(5)), "trailing"));
  EXPECT_TRUE(has(message(Bytes(images.begin(), images.begin() + 9), idx_labels(5)), "truncated"));
  EXPECT_TRUE(has(message({}, idx_labels(5)), "not an IDX image file"));
  EXPECT_TRUE(has(message(idx_labels(5), idx_labels(5)), "is an IDX label file"));
  EXPECT_TRUE(has(message(idx_images(5), idx_images(5)), "is an IDX image file"));
  EXPECT_TRUE(has(message(Bytes(100, 9), idx_labels(5)), "magic"));
  EXPECT_TRUE(has(message(idx_images(5), idx_labels(4)), "4 labels"));
  EXPECT_TRUE(has(message(idx_images(0), idx_labels(0)), "0 images"));
  Bytes labels = idx_labels(5);
  labels.back() = 10;
  EXPECT_TRUE(has(message(idx_images(5), labels), "label 10 of image 4"));
  Bytes huge;
  for (uint32_t word : {2051u, 0xffffffffu, 0xffffffffu, 0xffffffffu}) append_word(huge, word);
  message(huge, idx_labels(5));
}

TEST(Cifar, ReadsRecordsAndRefusesDamage) {
  const Folder folder;
  write(folder / "a", cifar_batch(2, 4));
  write(folder / "b", gzip(cifar_batch(1, 9)));
  const Images images = read_cifar10({folder / "a", folder / "b"});
  EXPECT_EQ(images.count, 3);
  EXPECT_EQ(images.labels, (Bytes{4, 5, 9}));
  ASSERT_EQ(images.pixels.size(), 3u * 3072);
  EXPECT_EQ(images.pixels[0], 4);
  EXPECT_EQ(images.pixels[3072 + 1], 6);
  EXPECT_EQ(images.pixels[2 * 3072], 9);

  Bytes bytes = cifar_batch(2);
  bytes.pop_back();
  write(folder / "a", bytes);
  EXPECT_TRUE(has(input_error([&] { read_cifar10({folder / "a"}); }), "6145 bytes"));
  bytes = cifar_batch(2);
  bytes[3073] = 10;
  write(folder / "a", bytes);
  EXPECT_TRUE(has(input_error([&] { read_cifar10({folder / "a"}); }), "label 10 of record 1"));
  write(folder / "a", {});
  EXPECT_THROW(read_cifar10({folder / "a"}), InputError);
}

TEST(Cifar100, KeepsPixelsAndFineLabels) {
  const Folder folder;
  const Bytes bytes = cifar100_file(3, 98);
  Bytes pixels;
  for (int i = 98; i < 101; ++i) {
    for (int k = 0; k < 3072; ++k) pixels.push_back(static_cast<uint8_t>(i + k));
  }
  for (const Bytes& packed : {bytes, gzip(bytes), xz(bytes)}) {
    write(folder / "a", packed);
    const Images images = read_cifar100(folder / "a");
    EXPECT_EQ(images.count, 3);
    EXPECT_EQ(images.channels, 3);
    EXPECT_EQ(images.height, 32);
    EXPECT_EQ(images.width, 32);
    EXPECT_EQ(images.classes, 100);
    EXPECT_EQ(images.labels, (Bytes{98, 99, 0}));
    EXPECT_EQ(images.pixels, pixels);
  }
}

TEST(Cifar100, RefusesDamage) {
  const Folder folder;
  const auto message = [&](const Bytes& bytes) {
    write(folder / "file", bytes);
    return input_error([&] { read_cifar100(folder / "file"); });
  };
  const Bytes whole = cifar100_file(2);
  Bytes bytes = whole;
  bytes.pop_back();
  for (const Bytes& packed : {bytes, gzip(bytes)}) {
    const std::string text = message(packed);
    EXPECT_TRUE(has(text, "file") && has(text, "6147 bytes") && has(text, "3074")) << text;
  }
  bytes = whole;
  bytes.push_back(0);
  EXPECT_TRUE(has(message(bytes), "6149 bytes"));
  EXPECT_TRUE(has(message(cifar_batch(2)), "6146 bytes"));  // of CIFAR-10
  EXPECT_TRUE(has(message({}), "0 bytes"));
  EXPECT_TRUE(has(input_error([&] { read_cifar100(folder / "none"); }), "none"));

  bytes = whole;
  bytes[3074] = 19, bytes[3075] = 99;  // the greatest that there are
  write(folder / "file", bytes);
  EXPECT_EQ(read_cifar100(folder / "file").labels, (Bytes{0, 99}));
  bytes[3075] = 100;
  std::string text = message(bytes);
  EXPECT_TRUE(has(text, "file") && has(text, "labels 19 and 100 of record 1")) << text;
  bytes[3074] = 20, bytes[3075] = 99;
  text = message(bytes);
  EXPECT_TRUE(has(text, "labels 20 and 99 of record 1")) << text;
}

TEST(LoadSets, FindCifar100InItsFolders) {
  const Folder folder;
  const fs::path place = folder / "c", nested = place / "cifar-100-binary";
  write(nested / "train.bin.gz", gzip(cifar100_file(4, 10)));
  write(nested / "test.bin", cifar100_file(2, 50));
  const Dataset inner = load_cifar100(place);
  EXPECT_EQ(inner.name, "cifar100");
  EXPECT_EQ(inner.path, nested.string());
  EXPECT_FALSE(inner.generated);
  EXPECT_EQ(inner.train.labels, (Bytes{10, 11, 12, 13}));
  EXPECT_EQ(inner.test.labels, (Bytes{50, 51}));
  EXPECT_EQ(inner.test.classes, 100);
  EXPECT_FALSE(has(inner.source, folder.path().string()));
  EXPECT_EQ(load_cifar100(nested).train.labels, inner.train.labels);

  // Files in the folder itself come first, and the source tells test sets apart.
  write(place / "train.bin.xz", xz(cifar100_file(1, 7)));
  EXPECT_TRUE(has(input_error([&] { load_cifar100(place); }), "test.bin"));
  write(place / "test.bin.gz", gzip(cifar100_file(3, 8)));
  const Dataset outer = load_cifar100(place);
  EXPECT_EQ(outer.train.labels, (Bytes{7}));
  EXPECT_EQ(outer.test.labels, (Bytes{8, 9, 10}));
  EXPECT_EQ(outer.path, place.string());
  EXPECT_NE(outer.source, inner.source);

  fs::remove(nested / "train.bin.gz");
  const std::string text = input_error([&] { load_cifar100(nested); });
  EXPECT_TRUE(has(text, nested.string()) && has(text, "train.bin")) << text;
  EXPECT_TRUE(has(input_error([&] { load_cifar100(folder / "none"); }), "not a folder"));
  write(place / "test.bin.gz", gzip({1, 2, 3}));
  EXPECT_TRUE(has(input_error([&] { load_cifar100(place); }), "test.bin.gz"));
}

TEST(LoadSets, FindBothSpellingsAndPackings) {
  const Folder folder;
  for (const std::string dash : {"-", "."}) {
    const fs::path place = folder / ("mnist" + dash);
    write_mnist(place, 6, dash);
    const Dataset set = load_mnist(place);
    EXPECT_EQ(set.train.count, 6);
    EXPECT_EQ(set.test.count, 2);
    EXPECT_EQ(load_idx_test(place).count, 2);
    EXPECT_FALSE(set.generated);
    EXPECT_EQ(set.path, place.string());
    EXPECT_FALSE(has(set.source, folder.path().string()));
    EXPECT_EQ(load_mnist(place, {4, 1}).train.count, 4);
    EXPECT_THROW(load_mnist(place, {7, 1}), InputError);
  }
  write_cifar10(folder / "c/cifar-10-batches-bin");
  EXPECT_EQ(load_cifar10(folder / "c").train.labels, (Bytes{0, 1, 2, 1, 2, 3, 2, 3, 4, 3, 4, 5, 4, 5, 6}));
  EXPECT_EQ(load_cifar10(folder / "c").test.labels, (Bytes{9, 0}));
  EXPECT_EQ(load_cifar10(folder / "c", {7, 1}).train.labels, (Bytes{0, 1, 2, 1, 2, 3, 2}));

  EXPECT_TRUE(has(input_error([&] { load_mnist(folder / "none"); }), "not a folder"));
  fs::remove(folder / "mnist-/t10k-labels-idx1-ubyte");
  EXPECT_TRUE(has(input_error([&] { load_mnist(folder / "mnist-"); }), "t10k-labels"));
  fs::remove(folder / "c/cifar-10-batches-bin/data_batch_4.bin");
  EXPECT_TRUE(has(input_error([&] { load_cifar10(folder / "c"); }), "data_batch_4.bin"));
}

TEST(FindSets, FollowsTheSearchOrder) {
  const Folder folder;
  fs::create_directories(folder / "work");
  write_mnist(folder / "work/data", 11);
  write_mnist(folder / "variable/mnist", 12);
  write_mnist(folder / "option", 13);
  const std::string variable = (folder / "variable").string();
  const Surroundings surroundings(folder / "work", variable.c_str());
  const auto count = [](std::optional<fs::path> option = {}) { return find_mnist(option).train.count; };
  EXPECT_EQ(count(folder / "option"), 13);
  EXPECT_EQ(count(), 12);
  fs::remove(folder / "variable/mnist/t10k-labels-idx1-ubyte");
  EXPECT_EQ(count(), 11);
  const std::string message = input_error([&] { count(folder / "work"); });
  EXPECT_TRUE(has(message, "--data") && has(message, "train-images-idx3-ubyte")) << message;
  write_cifar10(folder / "work/data/cifar10");
  EXPECT_EQ(find_cifar10({}).train.count, 15);
  EXPECT_THROW(find_cifar10(folder / "option"), InputError);
}

TEST(FindSets, GeneratesWhenThereIsNone) {
  const Folder folder;
  fs::create_directories(folder / "work");
  const Surroundings surroundings(folder / "work", nullptr);
  const Dataset digits = find_mnist({}, 5, {30, 20}), textures = find_cifar10({}, 5, {30, 20});
  for (const Dataset* set : {&digits, &textures}) {
    EXPECT_TRUE(set->generated);
    EXPECT_TRUE(has(set->source, "generated"));
    EXPECT_EQ(set->path, "");
    EXPECT_EQ(set->train.count, 30);
    EXPECT_EQ(set->test.count, 20);
    EXPECT_FALSE(std::equal(set->test.pixels.begin(), set->test.pixels.end(), set->train.pixels.begin()));
  }
  EXPECT_THROW(find_mnist({}, 5, {60001, 1}), InputError);
}

TEST(Limit, KeepsTheFirst) {
  Images images{3, 1, 1, 2, 10, {1, 2, 3, 4, 5, 6}, {7, 8, 9}};
  EXPECT_THROW(limit(images, 4), InputError);
  EXPECT_THROW(limit(images, 0), InputError);
  limit(images, 2);
  EXPECT_EQ(images.count, 2);
  EXPECT_EQ(images.pixels, (Bytes{1, 2, 3, 4}));
  EXPECT_EQ(images.labels, (Bytes{7, 8}));
}

Images six_images() { return {6, 1, 1, 2, 4, {0, 1, 10, 11, 20, 21, 30, 31, 40, 41, 50, 51}, {3, 0, 2, 3, 1, 0}}; }

TEST(Subset, TakesTheImagesThatAreNamed) {
  const Images images = six_images();
  const std::vector<int32_t> indices{4, 0, 4};
  const Images some = subset(images, indices);
  EXPECT_EQ(some.count, 3);
  EXPECT_EQ(some.channels, 1);
  EXPECT_EQ(some.height, 1);
  EXPECT_EQ(some.width, 2);
  EXPECT_EQ(some.classes, 4);
  EXPECT_EQ(some.pixels, (Bytes{40, 41, 0, 1, 40, 41}));
  EXPECT_EQ(some.labels, (Bytes{1, 3, 1}));
  for (int32_t wrong : {-1, 6}) {
    const std::vector<int32_t> outside{0, wrong};
    EXPECT_TRUE(has(input_error([&] { subset(images, outside); }), std::to_string(wrong)));
  }
}

TEST(OfClasses, KeepsTheirOrderAndNumbersThemAnew) {
  const Images images = six_images();
  const std::vector<int> classes{3, 0};
  const Images some = of_classes(images, classes);
  EXPECT_EQ(some.count, 4);
  EXPECT_EQ(some.classes, 2);
  EXPECT_EQ(some.width, 2);
  EXPECT_EQ(some.pixels, (Bytes{0, 1, 10, 11, 30, 31, 50, 51}));
  EXPECT_EQ(some.labels, (Bytes{0, 1, 0, 1}));
  const std::vector<int> all{0, 1, 2, 3};
  EXPECT_EQ(of_classes(images, all).labels, images.labels);
  for (const std::vector<int>& wrong : {std::vector<int>{0, 4}, {-1}, {2, 2}})
    EXPECT_THROW(of_classes(images, wrong), InputError);
}

void expect_partition(const std::vector<std::vector<int32_t>>& parts, int count) {
  std::set<int32_t> seen;
  for (const auto& part : parts) {
    EXPECT_GE(part.size(), count / parts.size());
    EXPECT_LE(part.size(), count / parts.size() + 1);
    seen.insert(part.begin(), part.end());
  }
  ASSERT_EQ(seen.size(), static_cast<size_t>(count));
  EXPECT_EQ(*seen.begin(), 0);
  EXPECT_EQ(*seen.rbegin(), count - 1);
}

TEST(Split, IsASeededPartition) {
  for (int parts : {1, 3, 10, 103}) expect_partition(split_parts(103, parts, 4), 103);
  EXPECT_EQ(split_parts(103, 10, 4), split_parts(103, 10, 4));
  EXPECT_NE(split_parts(103, 10, 4), split_parts(103, 10, 5));
  EXPECT_EQ(split_parts(103, 10, 4).front().size(), 11u);
  EXPECT_EQ(split_parts(103, 10, 4).back().size(), 10u);
  for (int parts : {0, -1, 104}) EXPECT_THROW(split_parts(103, parts, 4), InputError);
}

TEST(Split, StratifiedSpreadsTheClasses) {
  Bytes labels;
  for (int i = 0; i < 205; ++i) labels.push_back(i < 100 ? 0 : i % 3 + 1);
  const auto parts = split_parts_stratified(labels, 10, 8);
  expect_partition(parts, 205);
  for (const auto& part : parts) {
    EXPECT_EQ(std::count_if(part.begin(), part.end(), [&](int32_t i) { return labels[i] == 0; }), 10);
    EXPECT_FALSE(std::is_sorted(part.begin(), part.end(), [&](int a, int b) { return labels[a] < labels[b]; }));
  }
  EXPECT_THROW(split_parts_stratified(labels, 0, 8), InputError);
}

// A value that may never change: a run of another year or platform must see the same parts.
TEST(Split, KeepsItsNumbers) {
  EXPECT_EQ(index_hash({}), 0xcbf29ce484222325ull);
  const std::vector<int32_t> zero_one{0, 1};
  const uint64_t hash = index_hash(split_parts(1000, 4, 1)[2]);
  EXPECT_EQ(index_hash(zero_one), 0x08cd4c29d1e47d34ull);
  EXPECT_EQ(hash, 0x18a4f406135c274full);
}

TEST(RealMnist, IsTheOneEveryoneKnows) {
  const Dataset set = find_mnist({}, 0, {});
  if (set.generated) {
    std::cout << "MNIST not found: used the generated set" << std::endl;
    GTEST_SKIP() << "no MNIST in $BATON_DATA or ./data";
  }
  EXPECT_EQ(set.train.count, 60000);
  EXPECT_EQ(set.test.count, 10000);
  EXPECT_EQ(set.train.image_bytes(), 784u);
  EXPECT_EQ(Bytes(set.train.labels.begin(), set.train.labels.begin() + 5), (Bytes{5, 0, 4, 1, 9}));
  EXPECT_EQ(Bytes(set.test.labels.begin(), set.test.labels.begin() + 5), (Bytes{7, 2, 1, 0, 4}));
  std::cout << set.source << std::endl;
}

}  // namespace
}  // namespace baton
