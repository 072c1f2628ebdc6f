#include <gtest/gtest.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "engine/error.h"
#include "tests/support/npz.h"

namespace baton::test {
namespace {

namespace fs = std::filesystem;

// One stored array in an archive.
std::string archive(const std::string& descr, const std::string& shape, const std::string& data) {
  const auto le = [](auto value) { return std::string(reinterpret_cast<const char*>(&value), sizeof value); };
  const std::string dictionary = "{'descr': '" + descr + "', 'fortran_order': False, 'shape': " + shape + ", }\n";
  const std::string npy =
      std::string("\x93NUMPY\1\0", 8) + le(static_cast<uint16_t>(dictionary.size())) + dictionary + data;
  const uint32_t size = static_cast<uint32_t>(npy.size());
  const auto crc = static_cast<uint32_t>(::crc32(0, reinterpret_cast<const Bytef*>(npy.data()), size));
  const uint16_t none = 0, one = 1;
  const std::string entry = le(uint16_t{20}) + le(none) + le(none) + le(0u) + le(crc) + le(size) + le(size) + le(one);
  const std::string member = le(0x04034B50u) + entry + le(none) + "a" + npy;
  const std::string directory = le(0x02014B50u) + le(uint16_t{20}) + entry + std::string(16, '\0') + "a";
  return member + directory + le(0x06054B50u) + le(0u) + le(one) + le(one) +
         le(static_cast<uint32_t>(directory.size())) + le(static_cast<uint32_t>(member.size())) + le(none);
}

class NpzTest : public ::testing::Test {
 protected:
  void TearDown() override { fs::remove(path_); }
  Npz load(const std::string& bytes) {
    fs::remove(path_);
    std::ofstream(path_, std::ios::binary) << bytes;
    return Npz(path_);
  }
  template <class T>
  Npz pair(const std::string& descr, T first, T second) {
    const T values[] = {first, second};
    return load(archive(descr, "(2, 1)", std::string(reinterpret_cast<const char*>(values), sizeof values)));
  }

  fs::path path_ = fs::temp_directory_path() / ("baton_npz_" + std::to_string(::getpid()) + ".npz");
};

TEST(NpzGoldens, ADenseCaseReads) {
  const Npz golden(golden_file("layers/ffg_dense_small_gauss"));
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
  const Npz golden(golden_file("layers/net_lenet5_ffg_b4"));
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

TEST_F(NpzTest, EveryDtypeConverts) {
  const auto check = [&]<class T>(const std::string& descr, T first, T second) {
    const Npz file = pair(descr, first, second);
    EXPECT_EQ(file.names(), std::vector<std::string>{"a"});
    EXPECT_EQ(file.shape("a"), (std::vector<int64_t>{2, 1}));
    EXPECT_EQ(file.f64("a"), (std::vector<double>{static_cast<double>(first), static_cast<double>(second)})) << descr;
    EXPECT_EQ(file.f32("a"), (std::vector<float>{static_cast<float>(first), static_cast<float>(second)})) << descr;
    if (std::is_integral_v<T> && descr != "<u8") {
      EXPECT_EQ(file.i64("a"), (std::vector<int64_t>{static_cast<int64_t>(first), static_cast<int64_t>(second)}));
    } else {
      EXPECT_THROW(file.i64("a"), InputError) << descr;
    }
    if (descr[0] == '|' && descr != "|i1") EXPECT_EQ(file.text("a").size(), 2u);
    else EXPECT_THROW(file.text("a"), InputError) << descr;
    EXPECT_THROW(file.scalar("a"), InputError);
  };
  check("<f8", 0.1, 1e30);
  check("<f4", 0.1f, -2.5f);
  check("<i8", -(int64_t{1} << 53) - 1, int64_t{7});
  check("<u8", UINT64_MAX, uint64_t{7});
  check("<i4", -70000, 7);
  check("<u4", UINT32_MAX, 7u);
  check("<i2", int16_t{-32768}, int16_t{7});
  check("|i1", int8_t{-128}, int8_t{7});
  check("|u1", uint8_t{255}, uint8_t{7});
  check("|b1", uint8_t{0}, uint8_t{1});
  EXPECT_EQ(pair<uint16_t>("<f2", 0x3C00, 0xC000).f64("a"), (std::vector<double>{1, -2}));
}

TEST_F(NpzTest, TextsAndScalars) {
  EXPECT_EQ(load(archive("|u1", "(5,)", "h\xC3\xA9 {")).text("a"), "h\xC3\xA9 {");
  EXPECT_EQ(load(archive("|i1", "()", "\x80")).scalar("a"), -128);
  EXPECT_EQ(load(archive("|i1", "(1, 1)", "\x80")).scalar("a"), -128);
}

TEST_F(NpzTest, ComplaintsNameTheFileAndTheArray) {
  const Npz file = pair("<f8", 1.0, 2.0);
  for (const auto& ask : std::vector<std::function<void()>>{[&] { file.f64("b"); }, [&] { file.i64("a"); },
                                                            [&] { file.text("a"); }, [&] { file.scalar("a"); }}) {
    try {
      ask();
      ADD_FAILURE() << "accepted";
    } catch (const InputError& error) {
      EXPECT_NE(std::string(error.what()).find(path_.string()), std::string::npos) << error.what();
      EXPECT_NE(std::string(error.what()).find("array '"), std::string::npos) << error.what();
    }
  }
  EXPECT_THROW(Npz("no/such/file.npz"), InputError);
}

std::string bytes_of(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

template <class T>
T number_at(const std::string& bytes, std::size_t offset) {
  T value{};
  if (offset + sizeof value > bytes.size()) ADD_FAILURE() << "the file ends before " << offset;
  else std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

TEST_F(NpzTest, WhatIsSavedLoads) {
  const std::map<std::string, Tensor> arrays{
      {"probability", Tensor::of<float>(std::vector<float>{0.25f, 0.75f, 1e-9f, 1, 0.5f, 0.5f}, {3, 2})},
      {"prediction", Tensor::of<int64_t>(std::vector<int64_t>{1, -1, INT64_MIN}, {3})},
      {"of.nothing", Tensor::of<double>({}, {0, 4})},
      {"scalar", Tensor::of<uint8_t>(std::vector<uint8_t>{200}, {})}};
  save_npz(path_, arrays);
  const std::map<std::string, Tensor> read = load_npz(path_);
  ASSERT_EQ(read.size(), arrays.size());
  for (const auto& [name, tensor] : arrays) {
    ASSERT_TRUE(read.count(name)) << name;
    EXPECT_EQ(read.at(name).dtype, tensor.dtype) << name;
    EXPECT_EQ(read.at(name).shape, tensor.shape) << name;
    EXPECT_EQ(read.at(name).bytes, tensor.bytes) << name;
  }
  save_npz(path_, {});
  EXPECT_TRUE(load_npz(path_).empty());
}

// A reader that goes from local header to local header, not by the directory.
TEST_F(NpzTest, LocalHeadersSayWhatTheDirectorySays) {
  const Tensor first = Tensor::of<float>(std::vector<float>{1, 2, 3}, {3}),
               second = Tensor::of<int32_t>(std::vector<int32_t>{7}, {1, 1});
  save_npz(path_, {{"a", first}, {"bc", second}});
  const std::string bytes = bytes_of(path_);
  std::size_t at = 0;
  for (const auto& [name, tensor] : {std::pair{std::string("a"), first}, {std::string("bc"), second}}) {
    const fs::path alone = path_.string() + ".npy";
    save_npy(alone, tensor);
    const std::string npy = bytes_of(alone);
    fs::remove(alone);
    EXPECT_EQ(number_at<uint32_t>(bytes, at), 0x04034B50u);
    EXPECT_EQ(number_at<uint16_t>(bytes, at + 8), 0) << "stored";
    EXPECT_EQ(number_at<uint32_t>(bytes, at + 14),
              ::crc32(0, reinterpret_cast<const Bytef*>(npy.data()), static_cast<uInt>(npy.size())));
    EXPECT_EQ(number_at<uint32_t>(bytes, at + 18), npy.size());
    EXPECT_EQ(number_at<uint32_t>(bytes, at + 22), npy.size());
    EXPECT_EQ(number_at<uint16_t>(bytes, at + 26), name.size() + 4);
    EXPECT_EQ(bytes.substr(at + 30, name.size() + 4), name + ".npy");
    EXPECT_EQ(bytes.substr(at + 30 + name.size() + 4, npy.size()), npy);
    at += 30 + name.size() + 4 + npy.size();
  }
  EXPECT_EQ(number_at<uint32_t>(bytes, at), 0x02014B50u);
  EXPECT_EQ(number_at<uint32_t>(bytes, at + 12), 33u << 16) << "1980-01-01 00:00: no clock";
}

TEST_F(NpzTest, WhatCannotBeSavedIsRefused) {
  const Tensor fine = Tensor::of<float>(std::vector<float>{1}, {1});
  for (const std::string& name : {std::string(), std::string("a/b"), std::string("a b"), std::string("a\n"),
                                  std::string("\xC3\xA9"), std::string(1001, 'a')})
    EXPECT_THROW(save_npz(path_, {{name, fine}}), InputError) << name;
  EXPECT_THROW(save_npz(path_, {{"a", Tensor{"BF16", {1}, {0, 0}}}}), InputError);
  EXPECT_THROW(save_npz(path_, {{"a", Tensor{"F32", {2}, {0, 0, 0, 0}}}}), InputError);
  EXPECT_FALSE(fs::exists(path_));
  std::map<std::string, Tensor> many;
  for (int i = 0; i < 65535; ++i) many.emplace(std::to_string(i), Tensor{"U8", {0}, {}});
  EXPECT_THROW(save_npz(path_, many), InputError);
  many.erase("7");
  save_npz(path_, many);
  EXPECT_EQ(load_npz(path_).size(), 65534u);
  EXPECT_THROW(save_npz("/no/such/folder/a.npz", {{"a", fine}}), RunError);

  save_npz(path_, {{"a", fine}});
  EXPECT_THROW(save_npz(path_, {{"a", fine}, {"b", Tensor{"F16", {1}, {0, 0}}}}), InputError);
  EXPECT_EQ(load_npz(path_).size(), 1u) << "the old file is whole";
}

}  // namespace
}  // namespace baton::test
