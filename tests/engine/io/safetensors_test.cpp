#include "engine/io/safetensors.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <vector>

#include "engine/error.h"

namespace baton {
namespace {

namespace fs = std::filesystem;

template <class T>
std::string bytes_of(T value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}

// A file by hand: the header as given, not padded.
std::string file_of(const std::string& header, const std::string& data) {
  return bytes_of<uint64_t>(header.size()) + header + data;
}

class SafetensorsTest : public ::testing::Test {
 protected:
  void TearDown() override { fs::remove(path_); }

  TensorFile load(const std::string& bytes) {
    std::ofstream(path_, std::ios::binary) << bytes;
    return load_safetensors(path_);
  }
  std::string saved(const TensorFile& file) {
    save_safetensors(path_, file);
    std::ifstream in(path_, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  // The message must name the file and say each of `words`.
  void expect_refused(const std::string& bytes, std::vector<std::string> words) {
    words.push_back(path_.string());
    try {
      load(bytes);
      ADD_FAILURE() << "accepted; expected a complaint about: " << words[0];
    } catch (const InputError& error) {
      const std::string what = error.what();
      for (const std::string& word : words) EXPECT_NE(what.find(word), std::string::npos) << what << " lacks " << word;
      EXPECT_EQ(what.find('\n'), std::string::npos) << what;
    }
  }

  fs::path path_ = fs::temp_directory_path() / ("baton_safetensors_" + std::to_string(::getpid()) + ".safetensors");
};

template <class T>
std::vector<T> bit_patterns() {
  std::vector<T> values = {
      T(0),        T(1), std::numeric_limits<T>::lowest(), std::numeric_limits<T>::max(), std::numeric_limits<T>::min(),
      T(100.0 / 3)};
  if constexpr (std::is_floating_point_v<T>) {
    for (T v : {T(-0.0), std::numeric_limits<T>::denorm_min(), std::numeric_limits<T>::infinity(),
                std::numeric_limits<T>::quiet_NaN()}) {
      values.push_back(v);
    }
  }
  return values;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

template <class... T>
void add_all(TensorFile& file) {
  ((file.tensors[std::string("weights.") + std::string(safetensors_dtype<T>())] =
        Tensor::of<T>(bit_patterns<T>(), {static_cast<int64_t>(bit_patterns<T>().size()), 1})),
   ...);
}

template <class T>
void expect_one(const TensorFile& file) {
  const std::string dtype(safetensors_dtype<T>());
  EXPECT_TRUE(same_bits(file.at("weights." + dtype).as<T>(), bit_patterns<T>())) << dtype;
}

template <class... T>
void expect_all(const TensorFile& file) {
  (expect_one<T>(file), ...);
}

TEST_F(SafetensorsTest, RoundTripIsBitForBit) {
  TensorFile file;
  file.metadata = {{"architecture", "lenet5"}, {"note", "\"quotes\", \xCF\x83\nand a line break"}, {"empty", ""}};
  add_all<double, float, int64_t, int32_t, uint64_t, uint32_t, uint8_t>(file);
  file.tensors["scalar"] = Tensor::of<float>(std::vector<float>{2.5f}, {});
  file.tensors["nothing"] = Tensor::of<double>({}, {3, 0, 2});
  file.tensors["half"] = Tensor{"F16", {2}, {0x00, 0x3C, 0x01, 0x00}};
  file.tensors["\"odd\" \xCF\x83 name\\"] = Tensor::of<uint8_t>(std::vector<uint8_t>{7}, {1});
  save_safetensors(path_, file);
  const TensorFile read = load_safetensors(path_);
  EXPECT_EQ(read.metadata, file.metadata);
  ASSERT_EQ(read.tensors.size(), file.tensors.size());
  expect_all<double, float, int64_t, int32_t, uint64_t, uint32_t, uint8_t>(read);
  for (const auto& [name, tensor] : file.tensors) {
    EXPECT_EQ(read.at(name).dtype, tensor.dtype) << name;
    EXPECT_EQ(read.at(name).shape, tensor.shape) << name;
    EXPECT_EQ(read.at(name).bytes, tensor.bytes) << name;
  }
  EXPECT_EQ(saved(read), saved(file)) << "the same content is the same file";
}

TEST_F(SafetensorsTest, AnEmptyFileRoundTrips) {
  EXPECT_EQ(saved({}), file_of("{}      ", ""));
  EXPECT_TRUE(load_safetensors(path_).tensors.empty());
}

TEST_F(SafetensorsTest, TheBytesAreTheFormats) {
  TensorFile file;
  file.metadata["stage"] = "3";
  file.tensors["a.bytes"] = Tensor::of<uint8_t>(std::vector<uint8_t>{1, 2, 3}, {3});
  file.tensors["b.weight"] = Tensor::of<float>(std::vector<float>{1.0f, -2.0f}, {1, 2});
  file.tensors["c.count"] = Tensor::of<int64_t>(std::vector<int64_t>{-2}, {});
  std::string header =
      "{\"__metadata__\":{\"stage\":\"3\"},"
      "\"c.count\":{\"dtype\":\"I64\",\"shape\":[],\"data_offsets\":[0,8]},"
      "\"b.weight\":{\"dtype\":\"F32\",\"shape\":[1,2],\"data_offsets\":[8,16]},"
      "\"a.bytes\":{\"dtype\":\"U8\",\"shape\":[3],\"data_offsets\":[16,19]}}";
  while (header.size() % 8 != 0) header += ' ';
  const std::string data("\xFE\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x00\x00\x80\x3F\x00\x00\x00\xC0\x01\x02\x03", 19);
  EXPECT_EQ(saved(file), file_of(header, data));
}

// As the Python package lays a state dict out: compact JSON, metadata first, blanks behind the header; F16 and BF16.
TEST_F(SafetensorsTest, AFileFromPythonReads) {
  std::string header =
      R"({"__metadata__":{"format":"pt"},"conv1.bias":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
      R"("conv1.weight":{"dtype":"BF16","shape":[2,1,1,1],"data_offsets":[8,12]},)"
      R"("fc.weight":{"dtype":"F16","shape":[1,3],"data_offsets":[12,18]}})";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const std::string data = bytes_of(0.5f) + bytes_of(-1.5f) + bytes_of<uint16_t>(0x3FC0) + bytes_of<uint16_t>(0xC000) +
                           bytes_of<uint16_t>(0x3E00) + bytes_of<uint16_t>(0xFBFF) + bytes_of<uint16_t>(0x0001);
  const TensorFile file = load(file_of(header, data));
  EXPECT_EQ(file.metadata.at("format"), "pt");
  EXPECT_EQ(file.at("conv1.bias").as<float>(), (std::vector<float>{0.5f, -1.5f}));
  EXPECT_EQ(file.at("conv1.bias").as<double>(), (std::vector<double>{0.5, -1.5}));
  EXPECT_EQ(file.at("conv1.weight", {2, 1, 1, 1}).as<float>(), (std::vector<float>{1.5f, -2.0f}));
  EXPECT_EQ(file.at("fc.weight").as<float>(), (std::vector<float>{1.5f, -65504.0f, 0x1p-24f}));
}

// A pretty-printed header, not padded, in another order than the data: all of it is allowed.
TEST_F(SafetensorsTest, AnyOrderAndAnyBlanksRead) {
  const TensorFile file =
      load(file_of("{ \"late\": {\"shape\": [1], \"data_offsets\": [3, 7], \"dtype\": \"F32\"},\n"
                   "  \"void\": {\"dtype\": \"F64\", \"shape\": [0], \"data_offsets\": [3, 3]},\n"
                   "  \"early\": {\"dtype\": \"U8\", \"shape\": [3], \"data_offsets\": [0, 3]} }",
                   "\x01\x02\x03" + bytes_of(4.5f)));
  EXPECT_EQ(file.at("late").as<float>(), std::vector<float>{4.5f});
  EXPECT_EQ(file.at("early").as<uint8_t>(), (std::vector<uint8_t>{1, 2, 3}));
  EXPECT_EQ(file.at("void").size(), 0);
}

TEST(Half, EveryHalfIsItsFloat) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double value = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    if (exponent == 31) value = fraction ? NAN : INFINITY;
    const float got = float_of_half(static_cast<uint16_t>(bits));
    ASSERT_EQ(std::signbit(got), bits >> 15 != 0) << bits;
    if (std::isnan(value)) {
      ASSERT_TRUE(std::isnan(got)) << bits;
    } else {
      ASSERT_EQ(std::fabs(got), value) << bits;
    }
  }
}

TEST(Bfloat16, IsTheUpperHalfOfAFloat) {
  EXPECT_EQ(float_of_bfloat16(0x3F80), 1.0f);
  EXPECT_EQ(float_of_bfloat16(0xC049), -3.140625f);
  EXPECT_EQ(float_of_bfloat16(0xFF80), -std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isnan(float_of_bfloat16(0x7FC0)));
}

std::string entry(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return "{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}";
}

TEST_F(SafetensorsTest, BrokenFilesAreRefused) {
  expect_refused("", {"cut short"});
  expect_refused("abc", {"cut short"});
  expect_refused(bytes_of<uint64_t>(100) + "{}", {"cut short", "100"});
  expect_refused(bytes_of<uint64_t>(~0ull) + "{}", {"not a safetensors file"});
  expect_refused(std::string(100, 'x'), {"not a safetensors file"});
  expect_refused(file_of("", ""), {"not JSON"});
  expect_refused(file_of("{\"a\":", ""), {"not JSON"});
  expect_refused(file_of("{} x", ""), {"not JSON"});
  expect_refused(file_of("{\"\xFF\":1}", ""), {"not JSON"});
  expect_refused(file_of("[]", ""), {"not a JSON object"});
  expect_refused(file_of("{}", "x"), {"1 bytes behind"});
  expect_refused(file_of("{\"__metadata__\":[]}", ""), {"__metadata__"});
  expect_refused(file_of("{\"__metadata__\":{\"epoch\":3}}", ""), {"__metadata__", "epoch"});
}

TEST_F(SafetensorsTest, BrokenEntriesAreRefusedByName) {
  const std::string name = "tensor 'a'", eight(8, 'x');
  const auto one = [](const std::string& value) { return "{\"a\":" + value + "}"; };
  expect_refused(file_of(one("3"), eight), {name, "dtype"});
  expect_refused(file_of(one("{\"dtype\":\"F32\",\"shape\":[2]}"), eight), {name, "data_offsets"});
  expect_refused(file_of(one("{\"dtype\":\"F32\",\"data_offsets\":[0,8]}"), eight), {name, "shape"});
  expect_refused(file_of(one(entry("F33", "[2]", "[0,8]")), eight), {name, "F33", "F32"});
  expect_refused(file_of(one(entry("F32", "[-2]", "[0,8]")), eight), {name, "shape"});
  expect_refused(file_of(one(entry("F32", "[2.0]", "[0,8]")), eight), {name, "shape"});
  expect_refused(file_of(one(entry("F32", "2", "[0,8]")), eight), {name, "shape"});
  expect_refused(file_of(one(entry("F32", "[2]", "[0,8,8]")), eight), {name, "data_offsets"});
  expect_refused(file_of(one(entry("F32", "[2]", "[-8,0]")), eight), {name, "data_offsets"});
  expect_refused(file_of(one(entry("F32", "[2]", "[8,0]")), eight), {name, "end before"});
  expect_refused(file_of(one(entry("F32", "[3]", "[0,8]")), eight), {name, "8 bytes", "F32 [3] needs 12"});
  expect_refused(file_of(one(entry("F64", "[]", "[0,4]")), "xxxx"), {name, "needs 8"});
  expect_refused(file_of(one(entry("F32", "[2]", "[0,8]")), "xxxxxxx"), {name, "cut short", "7"});
  expect_refused(file_of(one(entry("F32", "[2]", "[8,16]")), eight + eight), {name, "hole"});
  expect_refused(file_of(one(entry("F32", "[9223372036854775807,4]", "[0,8]")), eight), {name, "impossible"});
  expect_refused(file_of(one(entry("F32", "[4611686018427387904]", "[0,8]")), eight), {name, "impossible"});
  expect_refused(file_of(one(entry("F32", "[18446744073709551615]", "[0,8]")), eight), {name, "impossible"});
  expect_refused(file_of(one(entry("F32", "[4294967296,4294967296]", "[0,0]")), ""), {name, "impossible"});

  const auto two = [](const std::string& a, const std::string& b) { return "{\"b\":" + b + ",\"a\":" + a + "}"; };
  const std::string first = entry("U8", "[4]", "[0,4]");
  expect_refused(file_of(two(first, entry("U8", "[4]", "[3,7]")), eight), {"tensor 'b'", "overlaps"});
  expect_refused(file_of(two(first, first), eight), {"overlaps"});
  expect_refused(file_of(two(first, entry("U8", "[3]", "[5,8]")), eight), {"tensor 'b'", "hole"});
  expect_refused(file_of(two(first, entry("U8", "[3]", "[4,7]")), eight), {"1 bytes behind"});
  expect_refused(file_of("{\"a\":" + first + ",\"a\":" + first + "}", "xxxx"), {name, "twice"});
}

TEST_F(SafetensorsTest, AFileCutAnywhereIsRefused) {
  TensorFile file;
  file.tensors["a"] = Tensor::of<float>(std::vector<float>{1, 2, 3}, {3});
  const std::string bytes = saved(file);
  for (std::size_t length = 0; length < bytes.size(); ++length) expect_refused(bytes.substr(0, length), {});
}

TEST_F(SafetensorsTest, MissingNamesShapesAndTypesSayWhatWasExpected) {
  EXPECT_THROW(load_safetensors(path_), InputError) << "no such file";
  TensorFile file;
  file.tensors["fc1.weight"] = Tensor::of<float>(std::vector<float>{1, 2}, {1, 2});
  save_safetensors(path_, file);
  const TensorFile read = load_safetensors(path_);
  const auto message = [](auto&& act) -> std::string {
    try {
      act();
    } catch (const InputError& error) {
      return error.what();
    }
    return "accepted";
  };
  const std::string where = path_.string() + ": ";
  EXPECT_EQ(message([&] { read.at("fc2.weight"); }),
            where + "tensor 'fc2.weight' is missing; the file holds fc1.weight");
  EXPECT_EQ(message([&] {
              read.at("fc1.weight", {2, 2});
            }),
            where + "tensor 'fc1.weight' has shape [1, 2]; expected [2, 2]");
  EXPECT_EQ(message([&] { read.at("fc1.weight").as<int32_t>(); }),
            where + "tensor 'fc1.weight' holds F32; expected I32");
  EXPECT_EQ(message([] { TensorFile().at("x"); }), "tensor 'x' is missing; the file holds no tensors");
  const Tensor wide = Tensor::of<double>(std::vector<double>{0.1}, {1});
  EXPECT_THROW(wide.as<float>(), InputError) << "a double does not become a float unasked";
}

TEST_F(SafetensorsTest, WhatTheFormatCannotHoldIsNotWritten) {
  EXPECT_THROW(Tensor::of<float>(std::vector<float>{1, 2}, {3}), InputError);
  EXPECT_THROW(Tensor::of<float>(std::vector<float>{1, 2}, {-1, -2}), InputError);
  TensorFile old;
  old.metadata["content"] = "old";
  const std::string before = saved(old);
  TensorFile file;
  file.tensors["a"] = Tensor{"F32", {2}, {1, 2, 3}};
  EXPECT_THROW(save_safetensors(path_, file), InputError);
  file.tensors = {{"a", Tensor{"I3", {2}, {1, 2, 3}}}};
  EXPECT_THROW(save_safetensors(path_, file), InputError);
  file.tensors = {{"__metadata__", Tensor::of<uint8_t>({}, {0})}};
  EXPECT_THROW(save_safetensors(path_, file), InputError);
  file.tensors = {{"\xFF", Tensor::of<uint8_t>({}, {0})}};
  EXPECT_THROW(save_safetensors(path_, file), InputError);
  EXPECT_EQ(saved(old), before);
}

}  // namespace
}  // namespace baton
