// BATON_GOLDENS: the folder of the layer goldens, set by the build.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include "engine/error.h"
#include "tests/support/npz.h"

namespace baton::test {
namespace {

namespace fs = std::filesystem;

const fs::path kGoldens = BATON_GOLDENS;

template <class T>
std::string le(T value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}

uint32_t slow_crc32(const std::string& bytes) {
  uint32_t crc = ~0u;
  for (unsigned char byte : bytes) {
    crc ^= byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0);
  }
  return ~crc;
}

std::string npy(const std::string& dictionary, const std::string& data, int version = 1) {
  const std::string header = dictionary + std::string(64 - dictionary.size() % 64, ' ') + "\n";
  const std::string length = version == 1 ? le<uint16_t>(static_cast<uint16_t>(header.size()))
                                          : le<uint32_t>(static_cast<uint32_t>(header.size()));
  return std::string("\x93NUMPY") + static_cast<char>(version) + '\0' + length + header + data;
}

std::string dictionary(const std::string& descr, const std::string& shape, const std::string& fortran = "False") {
  return "{'descr': '" + descr + "', 'fortran_order': " + fortran + ", 'shape': " + shape + ", }";
}

struct ZipEntry {
  std::string name, data;
  uint16_t method = 0, flags = 0;
  uint32_t crc_error = 0;
  bool needs_zip64 = false;
};

// As NumPy writes it: the local header holds place-holders for the sizes and a zip64 field behind the name.
std::string zip(const std::vector<ZipEntry>& entries, const std::string& comment = "") {
  std::string body, directory;
  for (const ZipEntry& e : entries) {
    const auto local = static_cast<uint32_t>(body.size()), size = static_cast<uint32_t>(e.data.size());
    const uint32_t crc = slow_crc32(e.data) ^ e.crc_error, shown = e.needs_zip64 ? 0xFFFFFFFFu : size;
    const auto name = static_cast<uint16_t>(e.name.size());
    const std::string extra = le<uint16_t>(1) + le<uint16_t>(16) + le<uint64_t>(size) + le<uint64_t>(size);
    body += le(0x04034B50u) + le<uint16_t>(45) + le(e.flags) + le(e.method) + le(0u) + le(crc) + le(0xFFFFFFFFu) +
            le(0xFFFFFFFFu) + le(name) + le(static_cast<uint16_t>(extra.size())) + e.name + extra + e.data;
    directory += le(0x02014B50u) + le<uint16_t>(45) + le<uint16_t>(45) + le(e.flags) + le(e.method) + le(0u) + le(crc) +
                 le(shown) + le(shown) + le(name) + le<uint16_t>(0) + le<uint16_t>(0) + le<uint16_t>(0) +
                 le<uint16_t>(0) + le(0u) + le(local) + e.name;
  }
  const auto count = static_cast<uint16_t>(entries.size());
  return body + directory + le(0x06054B50u) + le<uint16_t>(0) + le<uint16_t>(0) + le(count) + le(count) +
         le(static_cast<uint32_t>(directory.size())) + le(static_cast<uint32_t>(body.size())) +
         le(static_cast<uint16_t>(comment.size())) + comment;
}

class NpzTest : public ::testing::Test {
 protected:
  void TearDown() override { fs::remove(path_); }
  Npz load(const std::string& bytes) {
    std::ofstream(path_, std::ios::binary) << bytes;
    return Npz(path_);
  }
  void expect_refused(const std::string& bytes, const std::string& words) {
    try {
      load(bytes);
      ADD_FAILURE() << "accepted; expected a complaint about: " << words;
    } catch (const InputError& error) {
      EXPECT_NE(std::string(error.what()).find(words), std::string::npos) << error.what();
      EXPECT_NE(std::string(error.what()).find(path_.string()), std::string::npos) << error.what();
    }
  }
  void expect_array_refused(const std::string& npy_bytes, const std::string& words) {
    expect_refused(zip({{"a.npy", npy_bytes}}), words);
  }

  fs::path path_ = fs::temp_directory_path() / ("baton_npz_" + std::to_string(::getpid()) + ".npz");
};

TEST(NpzGoldens, ADenseCaseReads) {
  const Npz golden(kGoldens / "ffg_dense_small_gauss.npz");
  EXPECT_EQ(golden.shape("in_x"), (std::vector<int64_t>{4, 7}));
  EXPECT_EQ(golden.shape("out_y"), (std::vector<int64_t>{4, 5}));
  EXPECT_NE(golden.text("meta_json").find("\"kind\""), std::string::npos) << golden.text("meta_json");
  EXPECT_FALSE(golden.has("in_nothing"));
  EXPECT_THROW(golden.f64("in_nothing"), InputError);
  EXPECT_THROW(golden.scalar("in_x"), InputError);
  EXPECT_THROW(golden.text("in_x"), InputError);

  // The layer's own formula finds its output, so shapes, order and values were all read as they were meant.
  const auto x = golden.f64("in_x"), mu = golden.f64("in_mu"), sigma = golden.f64("in_sigma"), eps = golden.f64("eps"),
             b_mu = golden.f64("in_b_mu"), b_sigma = golden.f64("in_b_sigma"), y = golden.f64("out_y");
  for (int b = 0; b < 4; ++b) {
    for (int o = 0; o < 5; ++o) {
      double m = b_mu[o], v = b_sigma[o] * b_sigma[o];
      for (int i = 0; i < 7; ++i) {
        m += x[b * 7 + i] * mu[o * 7 + i];
        v += std::pow(x[b * 7 + i] * sigma[o * 7 + i], 2);
      }
      EXPECT_NEAR(y[b * 5 + o], m + std::sqrt(v) * eps[b * 5 + o], 1e-12);
    }
  }
  const std::vector<float> x32 = golden.f32("in_x");
  for (std::size_t i = 0; i < x.size(); ++i) EXPECT_EQ(x32[i], x[i]) << "goldens' inputs are exact in float";
}

TEST(NpzGoldens, FingerprintsAgree) {
  const Npz golden(kGoldens / "net_lenet5_ffg_b4.npz");
  for (const std::string name : {"g_conv1_mu", "g_conv1_sigma", "g_conv2_mu", "g_conv2_sigma"}) {
    const std::array<double, 11> print = fingerprint(golden.f64(name));  // of values rounded to float
    const std::vector<double> expected = golden.f64(name + "_fp");
    ASSERT_EQ(expected.size(), print.size());
    for (std::size_t k = 0; k < print.size(); ++k) EXPECT_NEAR(print[k], expected[k], 1e-6 * expected[1]) << name << k;
  }
}

TEST(Fingerprint, OneWrongEntryMovesEveryProjection) {
  std::vector<double> values(1000);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = std::sin(static_cast<double>(i));
  const auto before = fingerprint(values);
  values[617] += 0.5;
  const auto after = fingerprint(values);
  EXPECT_NEAR(after[0] - before[0], 0.5, 1e-12);
  for (int k = 3; k < 11; ++k) EXPECT_NEAR(std::fabs(after[k] - before[k]), 0.5, 1e-12);
  values[617] -= 0.5;
  std::swap(values[3], values[5]);  // sum and norms cannot see this
  const auto swapped = fingerprint(values);
  double moved = 0;
  for (int k = 3; k < 11; ++k) moved = std::max(moved, std::fabs(swapped[k] - before[k]));
  EXPECT_GT(moved, 0.1);
}

TEST(Fingerprint, OfNothingAndOfNan) {
  for (double entry : fingerprint({})) EXPECT_EQ(entry, 0);
  const std::vector<double> values = {1, std::numeric_limits<double>::quiet_NaN(), 2};
  for (double entry : fingerprint(values)) EXPECT_TRUE(std::isnan(entry));
}

TEST_F(NpzTest, EveryDtypeAndShapeReads) {
  const Npz file = load(zip(
      {
          {"f4.npy", npy(dictionary("<f4", "(2, 1)"), le(0.1f) + le(-2.5f))},
          {"f8.npy", npy(dictionary("<f8", "(2,)"), le(0.1) + le(1e300), 2)},
          {"i1.npy", npy(dictionary("|i1", "(3,)"), "\x80\xFF\x7F", 3)},
          {"u1.npy", npy(dictionary("|u1", "(5,)"), "h\xC3\xA9 {")},
          {"i4.npy", npy(dictionary("<i4", "()"), le<int32_t>(-70000))},
          {"i8.npy", npy(dictionary("<i8", "(1, 1, 1)"), le<int64_t>(-(1LL << 53) - 1))},
          {"b1.npy", npy(dictionary("|b1", "(2,)"), std::string("\0\1", 2))},
          {"none.npy", npy(dictionary("<f8", "(0, 3)"), "")},
      },
      "a comment, PK\x05\x06 and all"));
  EXPECT_EQ(file.names().size(), 8u);
  EXPECT_EQ(file.f32("f4"), (std::vector<float>{0.1f, -2.5f}));
  EXPECT_EQ(file.f64("f4"), (std::vector<double>{0.1f, -2.5}));
  EXPECT_EQ(file.f64("f8"), (std::vector<double>{0.1, 1e300}));
  EXPECT_EQ(file.f64("i1"), (std::vector<double>{-128, -1, 127}));
  EXPECT_EQ(file.text("u1"), "h\xC3\xA9 {");
  EXPECT_EQ(file.scalar("i4"), -70000);
  EXPECT_TRUE(file.shape("i4").empty());
  EXPECT_EQ(file.i64("i8"), std::vector<int64_t>{-(1LL << 53) - 1});
  EXPECT_EQ(file.i64("b1"), (std::vector<int64_t>{0, 1}));
  EXPECT_EQ(file.shape("none"), (std::vector<int64_t>{0, 3}));
  EXPECT_TRUE(file.f64("none").empty());
  EXPECT_THROW(file.i64("f8"), InputError);
}

TEST_F(NpzTest, WhatItCannotReadIsRefusedByName) {
  const std::string data = le(1.0) + le(2.0);
  expect_array_refused(npy(dictionary(">f8", "(2,)"), data), "array 'a': has dtype >f8");
  expect_array_refused(npy(dictionary("<c16", "(1,)"), data), "<c16");
  expect_array_refused(npy(dictionary("<f2", "(8,)"), data), "<f2");
  expect_array_refused(npy("{'descr': [('x', '<f8')], 'fortran_order': False, 'shape': (2,), }", data), "structured");
  expect_array_refused(npy(dictionary("<f8", "(1, 2)", "True"), data), "Fortran");
  expect_array_refused(npy(dictionary("<f8", "(3,)"), data), "16 bytes");
  expect_array_refused(npy(dictionary("<f8", "(1,)"), data), "16 bytes");
  expect_array_refused(npy(dictionary("<f8", "(2,)"), data + "x"), "17 bytes");
  expect_array_refused(npy(dictionary("<f8", "(99999999999999999999,)"), data), "large");
  expect_array_refused(npy(dictionary("<f8", "(-2,)"), data), "tuple");
  expect_array_refused(npy("{'descr': '<f8', 'fortran_order': False}", data), "shape");
  expect_array_refused(npy(dictionary("<f8", "(2,)"), data, 4), "version 4");
  expect_array_refused("not an array", "not a .npy");
  expect_array_refused(npy(dictionary("<f8", "(2,)"), data).substr(0, 40), "cut short");
}

TEST_F(NpzTest, ArchivesItWouldMisreadAreRefused) {
  const std::string good = npy(dictionary("<f8", "(2,)"), le(1.0) + le(2.0));
  const std::string bytes = zip({{"a.npy", good}});
  EXPECT_EQ(load(bytes).f64("a"), (std::vector<double>{1, 2}));
  expect_refused(zip({{"a.npy", good, 8}}), "array 'a': is compressed");
  expect_refused(zip({{"a.npy", good, 0, 1}}), "encrypted");
  expect_refused(zip({{"a.npy", good, 0, 0, 1}}), "checksum");
  expect_refused(zip({{"a.npy", good, 0, 0, 0, true}}), "zip64");
  expect_refused(zip({{"a.npy", good}, {"a.npy", good}}), "twice");
  for (std::size_t length = 0; length < bytes.size(); length += 7) expect_refused(bytes.substr(0, length), "");
  expect_refused(bytes.substr(1), "");
  // Behind other bytes, the directory's offsets are wrong.
  expect_refused("xyz" + bytes, "zip directory");
}

TEST_F(NpzTest, AFlippedByteNeverReadsOutOfBounds) {
  const std::string bytes = zip({{"a.npy", npy(dictionary("<f8", "(2,)"), le(1.0) + le(2.0))}});
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    std::string damaged = bytes;
    damaged[i] = static_cast<char>(~damaged[i]);
    try {
      const Npz file = load(damaged);
      for (const std::string& name : file.names()) file.f64(name);
    } catch (const InputError&) {
    }
  }
}

TEST_F(NpzTest, AMissingFileIsBadInput) { EXPECT_THROW(Npz("no/such/file.npz"), InputError); }

}  // namespace
}  // namespace baton::test
