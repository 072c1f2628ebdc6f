#include "engine/io/npy.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>
#include <zlib.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
#include <vector>

#include "engine/error.h"

namespace baton {
namespace {

namespace fs = std::filesystem;

template <class T>
std::string le(T value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof value);
}
template <class T>
std::string le_all(const std::vector<T>& values) {
  std::string bytes;
  for (T value : values) bytes += le(value);
  return bytes;
}

// A .npy file by hand. The padding makes nothing round: NumPy's own is 64, others' is not.
std::string npy(const std::string& dictionary, const std::string& data, int version = 1) {
  const std::string header = dictionary + std::string(3, ' ') + "\n";
  const std::string length =
      version == 1 ? le(static_cast<uint16_t>(header.size())) : le(static_cast<uint32_t>(header.size()));
  return std::string("\x93NUMPY") + static_cast<char>(version) + '\0' + length + header + data;
}
std::string dictionary(const std::string& descr, const std::string& shape, const std::string& fortran = "False") {
  return "{'descr': '" + descr + "', 'fortran_order': " + fortran + ", 'shape': " + shape + ", }";
}
const std::string kTwo = npy(dictionary("<f8", "(2,)"), le(1.0) + le(2.0));

std::string deflated(const std::string& data) {
  z_stream stream{};
  deflateInit2(&stream, 9, Z_DEFLATED, -MAX_WBITS, 9, Z_DEFAULT_STRATEGY);
  std::string packed(deflateBound(&stream, data.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(data.data()));
  stream.avail_in = static_cast<uInt>(data.size());
  stream.next_out = reinterpret_cast<Bytef*>(packed.data());
  stream.avail_out = static_cast<uInt>(packed.size());
  EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
  packed.resize(stream.total_out);
  deflateEnd(&stream);
  return packed;
}

struct ZipEntry {
  std::string name, data;
  bool packed = false, wide = false;  // deflated; sizes and place in a zip64 field of the directory
  uint16_t flags = 0, method = 0;     // 0: as `packed` says
  uint32_t crc_error = 0;
  int64_t size_error = 0, stored_error = 0, local_error = 0;
  std::string local_name = {};  // where it differs
  std::string behind = {};      // of the packed bytes, and counted with them
};

enum class End { kNarrow, kWide, kBoth };  // the closing record alone, place-holders before zip64, the numbers in both

// As NumPy writes it: the local headers hold place-holders for the sizes and a zip64 field behind the name.
std::string zip(const std::vector<ZipEntry>& entries, const std::string& comment = "", End end = End::kNarrow,
                uint64_t count_error = 0) {
  std::string body, directory;
  for (const ZipEntry& e : entries) {
    const std::string content = (e.packed ? deflated(e.data) : e.data) + e.behind;
    const uint64_t local = body.size() + e.local_error, size = e.data.size() + e.size_error,
                   stored = content.size() + e.stored_error;
    const auto crc = static_cast<uint32_t>(
        ::crc32(0, reinterpret_cast<const Bytef*>(e.data.data()), static_cast<uInt>(e.data.size())) ^ e.crc_error);
    const uint16_t method = e.method ? e.method : e.packed ? 8 : 0;
    const auto length_of = [](const std::string& text) { return le(static_cast<uint16_t>(text.size())); };
    const auto narrow = [&](uint64_t number) { return e.wide ? le(0xFFFFFFFFu) : le(static_cast<uint32_t>(number)); };
    const std::string field = le<uint16_t>(1) + le<uint16_t>(16) + le(size) + le(stored);
    const std::string wide = le<uint16_t>(0x5455) + le<uint16_t>(3) + "abc" + le<uint16_t>(1) + le<uint16_t>(24) +
                             le(size) + le(stored) + le(local);
    const std::string extra = e.wide ? wide : "", local_name = e.local_name.empty() ? e.name : e.local_name;
    body += le(0x04034B50u) + le<uint16_t>(45) + le(e.flags) + le(method) + le(0u) + le(crc) + le(0xFFFFFFFFu) +
            le(0xFFFFFFFFu) + length_of(local_name) + length_of(field) + local_name + field + content;
    directory += le(0x02014B50u) + le<uint16_t>(45) + le<uint16_t>(45) + le(e.flags) + le(method) + le(0u) + le(crc) +
                 narrow(stored) + narrow(size) + length_of(e.name) + length_of(extra) + le<uint16_t>(0) +
                 le<uint16_t>(0) + le<uint16_t>(0) + le(0u) + narrow(local) + e.name + extra;
  }
  const uint64_t count = entries.size() + count_error, begin = body.size(), length = directory.size();
  std::string wide;
  if (end != End::kNarrow) {
    wide = le(0x06064B50u) + le<uint64_t>(44) + le<uint16_t>(45) + le<uint16_t>(45) + le(0u) + le(0u) + le(count) +
           le(count) + le(length) + le(begin);
    wide += le(0x07064B50u) + le(0u) + le(begin + length) + le(1u);
  }
  const bool holders = end == End::kWide;
  const auto count16 = static_cast<uint16_t>(holders ? 0xFFFF : count);
  return body + directory + wide + le(0x06054B50u) + le<uint16_t>(0) + le<uint16_t>(0) + le(count16) + le(count16) +
         le(static_cast<uint32_t>(holders ? 0xFFFFFFFF : length)) +
         le(static_cast<uint32_t>(holders ? 0xFFFFFFFF : begin)) + le(static_cast<uint16_t>(comment.size())) + comment;
}

// The most memory that the process ever had, in bytes.
int64_t peak_memory() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss * int64_t{1024};
}

using Shape = std::vector<int64_t>;

class NpyTest : public ::testing::Test {
 protected:
  void TearDown() override { fs::remove(path_); }

  const fs::path& written(const std::string& bytes) {
    fs::remove(path_);  // a file cut to nothing and written again is flushed at once, and there are thousands
    std::ofstream(path_, std::ios::binary) << bytes;
    return path_;
  }
  Tensor load(const std::string& bytes) { return load_npy(written(bytes)); }
  std::map<std::string, Tensor> load_zip(const std::string& bytes) { return load_npz(written(bytes)); }
  std::string saved(const Tensor& tensor) {
    save_npy(path_, tensor);
    std::ifstream in(path_, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  // An array in Fortran order whose elements count up in C order.
  template <class T>
  void expect_reordered(const char* descr, const Shape& shape) {
    const int64_t count = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
    std::string text = "(";
    for (int64_t extent : shape) text += std::to_string(extent) + ",";
    std::vector<T> stored(count), expected(count);
    for (int64_t c = 0; c < count; ++c) {
      int64_t rest = c, place = 0, stride = count;
      for (std::size_t axis = shape.size(); axis-- > 0; rest /= shape[axis]) {
        stride /= shape[axis];
        place += rest % shape[axis] * stride;
      }
      expected[c] = stored[place] = static_cast<T>(c);
    }
    const Tensor read = load(npy(dictionary(descr, text + ")", "True"), le_all(stored)));
    EXPECT_EQ(read.shape, shape);
    if constexpr (sizeof(T) == 2) EXPECT_EQ(read.as<int32_t>(), std::vector<int32_t>(expected.begin(), expected.end()));
    else EXPECT_EQ(read.as<T>(), expected) << descr << text;
  }
  // The message must name the file and say `words`, in one line.
  void expect_complaint(const std::function<void()>& act, const std::string& words) {
    try {
      act();
      ADD_FAILURE() << "accepted; expected a complaint about: " << words;
    } catch (const InputError& error) {
      const std::string what = error.what();
      EXPECT_NE(what.find(words), std::string::npos) << what << " lacks " << words;
      EXPECT_NE(what.find(path_.string()), std::string::npos) << what;
      EXPECT_EQ(what.find_first_of(std::string("\n\0\x1B", 3)), std::string::npos) << what;
    }
  }
  // As a file of its own, and in an archive.
  void expect_array_refused(const std::string& bytes, const std::string& words) {
    expect_complaint([&] { load(bytes); }, words);
    for (const bool packed : {false, true}) {
      expect_complaint([&] { load_zip(zip({{"a.npy", bytes, packed}})); }, "array 'a' " + words);
    }
  }
  void expect_zip_refused(const std::string& bytes, const std::string& words) {
    expect_complaint([&] { load_zip(bytes); }, words);
  }

  fs::path path_ = fs::temp_directory_path() / ("baton_npy_" + std::to_string(::getpid()));
};

TEST_F(NpyTest, EveryDtypeReads) {
  const auto one = [&](const char* descr, const std::string& data, int version = 1) {
    return load(npy(dictionary(descr, "(2,)"), data, version));
  };
  EXPECT_EQ(one("<f8", le(0.1) + le(1e300)).as<double>(), (std::vector<double>{0.1, 1e300}));
  EXPECT_EQ(one("<f4", le(0.1f) + le(-2.5f), 2).as<float>(), (std::vector<float>{0.1f, -2.5f}));
  const Tensor half = one("<f2", le<uint16_t>(0x3C00) + le<uint16_t>(0xC001), 3);
  EXPECT_EQ(half.dtype, "F16");
  EXPECT_EQ(half.as<float>(), (std::vector<float>{1, -2 - 0x1p-9f}));
  EXPECT_EQ(one("<i8", le(INT64_MIN) + le(int64_t{-1})).as<int64_t>(), (std::vector<int64_t>{INT64_MIN, -1}));
  EXPECT_EQ(one("<i4", le(INT32_MIN) + le(70000)).as<int32_t>(), (std::vector<int32_t>{INT32_MIN, 70000}));
  EXPECT_EQ(one("<i2", le<int16_t>(-32768) + le<int16_t>(258)).as<int32_t>(), (std::vector<int32_t>{-32768, 258}));
  EXPECT_EQ(one("|i1", "\x80\x7F").as<int32_t>(), (std::vector<int32_t>{-128, 127}));
  EXPECT_EQ(one("<u8", le(UINT64_MAX) + le(uint64_t{1})).as<uint64_t>(), (std::vector<uint64_t>{UINT64_MAX, 1}));
  EXPECT_EQ(one("<u4", le(UINT32_MAX) + le(1u)).as<uint32_t>(), (std::vector<uint32_t>{UINT32_MAX, 1}));
  EXPECT_EQ(one("<u2", le<uint16_t>(65535) + le<uint16_t>(1)).as<int32_t>(), (std::vector<int32_t>{65535, 1}));
  EXPECT_EQ(one("|u1", "\xFF\x01").as<uint8_t>(), (std::vector<uint8_t>{255, 1}));
  EXPECT_EQ(one("|b1", std::string("\0\1", 2)).as<uint8_t>(), (std::vector<uint8_t>{0, 1}));
  EXPECT_EQ(one("<u1", "ab").dtype, "U8");
}

TEST_F(NpyTest, EveryShapeReads) {
  const auto shape = [&](const std::string& text, std::size_t count) {
    return load(npy(dictionary("|u1", text), std::string(count, 'x'))).shape;
  };
  EXPECT_EQ(shape("()", 1), Shape{});
  EXPECT_EQ(shape("(5,)", 5), Shape{5});
  EXPECT_EQ(shape("(2, 3)", 6), (Shape{2, 3}));
  EXPECT_EQ(shape("(2,3,)", 6), (Shape{2, 3}));
  EXPECT_EQ(shape("(2L, 1L)", 2), (Shape{2, 1})) << "as Python 2 wrote it";
  EXPECT_EQ(shape("(1, 1, 1, 2, 1, 1, 1, 1)", 2), (Shape{1, 1, 1, 2, 1, 1, 1, 1}));
  EXPECT_EQ(shape("(0,)", 0), Shape{0});
  EXPECT_EQ(shape("(3, 0, 9000000000)", 0), (Shape{3, 0, 9000000000}));
  EXPECT_EQ(load(npy("{\"shape\":(2,),\"descr\":\"<f4\",\"fortran_order\":False}", le(1.0f) + le(2.0f))).shape,
            Shape{2})
      << "the keys' order, the quotes and the blanks are free";
}

// The element at (i, j, ...) says so itself.
TEST_F(NpyTest, FortranOrderIsReordered) {
  for (const Shape& shape : {Shape{3, 5}, Shape{1, 7}, Shape{7, 1}, Shape{65, 40}, Shape{2, 3, 4}, Shape{33, 2, 5, 34},
                             Shape{2, 3, 2, 3, 2, 2, 2, 2}, Shape{6}, Shape{}}) {
    expect_reordered<double>("<f8", shape);
    expect_reordered<float>("<f4", shape);
    expect_reordered<int16_t>("<i2", shape);
    expect_reordered<uint8_t>("|u1", shape);
  }
  EXPECT_EQ(load(npy(dictionary("<f8", "(4, 0, 3)", "True"), "")).shape, (Shape{4, 0, 3}));
}

TEST_F(NpyTest, ArraysItCannotReadAreRefused) {
  const std::string data = le(1.0) + le(2.0);
  const auto refused = [&](const std::string& dictionary, const std::string& words) {
    expect_array_refused(npy(dictionary, data), words);
  };
  refused(dictionary(">f8", "(2,)"), "has dtype >f8; expected");
  for (const char* descr : {"<c16", "|O", "<U4", "|S16", "<M8[s]", "<f3", "f8", "=f8", "|f8", "", "<", "<f88"}) {
    refused(dictionary(descr, "(2,)"), std::string("has dtype ") + descr + "; expected");
  }
  refused(dictionary(std::string("<\n\x1B[31m") + std::string(300, 'x'), "(2,)"), "has dtype <??[31mxxx");
  refused("{'descr': [('shape', '<f8')], 'fortran_order': False, 'shape': (2,), }", "has a structured dtype");
  refused(dictionary("<f8", "(3,)"), "has 16 bytes of data, which f8 [3] does not");
  refused(dictionary("<f8", "(1,)"), "has 16 bytes of data");
  refused(dictionary("<f8", "(0,)"), "has 16 bytes of data");
  refused(dictionary("<f8", "(3, 1)", "True"), "has 16 bytes of data");
  expect_array_refused(npy(dictionary("<f8", "(2,)"), data + "x"), "has 17 bytes");
  expect_array_refused(npy(dictionary("<f8", "(2,)"), data, 4), "has .npy version 4.0");
  expect_array_refused(npy(dictionary("<f8", "(2,)"), data, 0), "has .npy version 0.0");
  std::string minor = npy(dictionary("<f8", "(2,)"), data);
  minor[7] = 1;
  expect_array_refused(minor, "has .npy version 1.1");
  refused(dictionary("<f8", "(9223372036854775808,)"), "has an impossibly large shape");
  expect_array_refused("not an array", "is not a .npy file");
  expect_array_refused("", "is cut short");
  expect_array_refused(npy(dictionary("<f8", "(2,)") + std::string(70000, ' '), data, 2), "has a header of 7");
  expect_array_refused(npy(dictionary("<f8", "(2,)"), data).substr(0, 40), "is cut short");
}

TEST_F(NpyTest, HeadersThatAreNotTheDictionaryAreRefused) {
  const std::string data = le(1.0) + le(2.0);
  const std::string tail = ", 'fortran_order': False, ";
  for (const std::string& header : std::vector<std::string>{
           "", "{", "}", "[]", "{'descr': '<f8'" + tail + "'shape': (2,)",
           "{'descr': '<f8'" + tail + "'shape': (2,)} x", "{'descr': '<f8'" + tail + "'shape': (2,), , }",
           "{'descr': '<f8' 'fortran_order': False}", "{'descr: 1}", "{'descr': <f8" + tail + "'shape': (2,)}",
           "{'descr': '<f8', 'fortran_order': 0, 'shape': (2,)}", "{'descr': '<f8'" + tail + "'shape': (2)}",
           "{'descr': '<f8'" + tail + "'shape': [2]}", "{'descr': '<f8'" + tail + "'shape': (2.0,)}",
           "{'descr': '<f8'" + tail + "'shape': (2"}) {
    expect_array_refused(npy(header, data), "has a header that is not NumPy's dictionary");
  }
  expect_array_refused(npy("{}", data), "has no descr");
  expect_array_refused(npy("{'descr': '<f8'" + tail + "}", data), "has no shape");
  expect_array_refused(npy("{'descr': '<f8', 'shape': (2,)}", data), "has no fortran_order");
  expect_array_refused(npy("{'descr': '<f8', 'descr': '<f8'" + tail + "'shape': (2,)}", data),
                       "has the unexpected key 'descr'");
  expect_array_refused(npy("{'colour\n': '<f8'}", data), "has the unexpected key 'colour?'");
  for (const char* shape : {"(-2,)", "(,)", "(2,}", "(None,)", "('2',)", "(1,,2)"}) {
    expect_array_refused(npy(dictionary("<f8", shape), data), "has a shape that is not a tuple of integers");
  }
  expect_array_refused(npy(dictionary("<f8", "(1, 1, 1, 1, 1, 1, 1, 1, 2)"), data), "has more than 8 axes");
}

// 2^60 elements, and products that wrap around to the 16 bytes there are.
TEST_F(NpyTest, AHeaderAloneAllocatesNothing) {
  load(kTwo);
  const int64_t before = peak_memory();
  for (const char* shape :
       {"(1152921504606846976,)", "(1073741824, 1073741824)", "(2, 9223372036854775807)", "(4611686018427387904, 4, 2)",
        "(4294967296, 4294967296, 2)", "(1152921504606846977, 16)", "(2305843009213693954,)",
        "(9223372036854775807, 9223372036854775807, 0)", "(9223372036854775808,)", "(99999999999999999999999999,)"}) {
    for (const char* order : {"False", "True"}) {
      for (const char* descr : {"<f8", "|u1", "|i1"}) {
        expect_array_refused(npy(dictionary(descr, shape, order), le(1.0) + le(2.0)), "has ");
      }
    }
  }
  for (const bool packed : {false, true}) {
    ZipEntry entry{"a.npy", kTwo, packed, true};
    for (const int64_t claim : {int64_t{1} << 30, int64_t{1} << 36, int64_t{1} << 60, INT64_MAX}) {
      entry.size_error = claim;
      entry.stored_error = packed ? 0 : claim;
      expect_zip_refused(zip({entry}), "");
      expect_complaint([&] { load_npz(path_, UINT64_MAX); }, "");
    }
  }
  expect_zip_refused(zip({{"a.npy", kTwo}}, "", End::kWide, uint64_t{1} << 60), "members");
  ZipEntry around{"a.npy", kTwo, true, true};  // the end of its packed bytes wraps to a place near the file's start
  around.stored_error = -static_cast<int64_t>(deflated(kTwo).size()) - 50;
  expect_zip_refused(zip({around}), "is cut short");
  EXPECT_LT(peak_memory() - before, int64_t{1} << 26);
}

TEST_F(NpyTest, CutShortAnywhereItIsRefused) {
  for (const std::string& whole :
       {kTwo, npy(dictionary("|i1", "(3, 2)", "True"), "abcdef", 3), npy(dictionary("|u1", "()"), "x")}) {
    for (std::size_t length = 0; length < whole.size(); ++length) {
      expect_complaint([&] { load(whole.substr(0, length)); }, "");
    }
    load(whole);
  }
  for (const End end : {End::kNarrow, End::kWide, End::kBoth}) {
    const std::string whole =
        zip({{"a.npy", kTwo}, {"b.npy", kTwo, true, true}, {"c.npy", kTwo, true}}, "comment", end);
    for (std::size_t length = 0; length < whole.size(); ++length) expect_zip_refused(whole.substr(0, length), "");
    EXPECT_EQ(load_zip(whole).size(), 3u);
    expect_zip_refused(whole.substr(1), "");
    expect_zip_refused("xyz" + whole, "");  // behind other bytes, the directory's places are wrong
    expect_zip_refused(whole + "x", "");
  }
}

// Sanitizers watch; what still loads must hold what its shape says.
TEST_F(NpyTest, ADamagedByteNeverReadsOutOfBounds) {
  const auto try_all = [&](const std::string& whole, const std::function<void(const std::string&)>& act) {
    for (std::size_t i = 0; i < whole.size(); ++i) {
      for (const int flip : {0x01, 0x10, 0x80, 0xFF}) {
        std::string damaged = whole;
        damaged[i] = static_cast<char>(damaged[i] ^ flip);
        try {
          act(damaged);
        } catch (const InputError&) {
        }
      }
    }
  };
  try_all(npy(dictionary("<i2", "(2, 3)", "True"), std::string(12, 'x')),
          [&](const std::string& b) { load(b).check(); });
  for (const End end : {End::kNarrow, End::kWide}) {
    const std::string whole = zip(
        {{"a.npy", kTwo}, {"b.npy", npy(dictionary("|u1", "(300,)"), std::string(300, 'x')), true, true}}, "note", end);
    try_all(whole, [&](const std::string& b) {
      for (const auto& [name, tensor] : load_zip(b)) tensor.check();
    });
  }
}

TEST_F(NpyTest, ArchivesRead) {
  std::string big;
  for (int i = 0; i < 300000; ++i) big += le(i % 1000 * 0.5f);  // more than a step of inflation
  const std::string large = npy(dictionary("<f4", "(300, 1000)"), big);
  for (const End end : {End::kNarrow, End::kWide, End::kBoth}) {
    for (const bool wide : {false, true}) {
      const auto arrays = load_zip(zip({{"stored.npy", kTwo, false, wide},
                                        {"deflated.npy", kTwo, true, wide},
                                        {"large.npy", large, true, wide},
                                        {"folder/empty.npy", npy(dictionary("<f8", "(0, 3)"), ""), true, wide},
                                        {"no suffix", npy(dictionary("|b1", "()"), "\1"), false, wide}},
                                       "a comment, PK\x05\x06 and all", end));
      ASSERT_EQ(arrays.size(), 5u);
      EXPECT_EQ(arrays.at("stored").as<double>(), (std::vector<double>{1, 2}));
      EXPECT_EQ(arrays.at("deflated").as<double>(), (std::vector<double>{1, 2}));
      EXPECT_EQ(arrays.at("deflated").origin, path_.string() + ": array 'deflated'");
      EXPECT_EQ(arrays.at("large").shape, (Shape{300, 1000}));
      EXPECT_EQ(std::memcmp(arrays.at("large").bytes.data(), big.data(), big.size()), 0);
      EXPECT_EQ(arrays.at("folder/empty").shape, (Shape{0, 3}));
      EXPECT_EQ(arrays.at("no suffix").as<uint8_t>(), std::vector<uint8_t>{1});
    }
  }
  EXPECT_TRUE(load_zip(zip({})).empty());
}

TEST_F(NpyTest, ArchivesItWouldMisreadAreRefused) {
  for (const bool packed : {false, true}) {
    const auto with = [&](const std::function<void(ZipEntry&)>& change) {
      ZipEntry entry{"a.npy", kTwo, packed};
      change(entry);
      return zip({entry, {"z.npy", kTwo}});
    };
    EXPECT_EQ(load_zip(with([](ZipEntry&) {})).size(), 2u);
    expect_zip_refused(with([](ZipEntry& e) { e.flags = 1; }), "array 'a' is encrypted");
    expect_zip_refused(with([](ZipEntry& e) { e.method = 14; }), "array 'a' is packed by method 14");
    expect_zip_refused(with([](ZipEntry& e) { e.crc_error = 1; }), "array 'a' is damaged: its checksum");
    expect_zip_refused(with([](ZipEntry& e) { e.local_name = "b.npy"; }), "array 'a' is another one");
    expect_zip_refused(with([](ZipEntry& e) { e.local_error = 1; }), "array 'a' is not where");
    expect_zip_refused(with([](ZipEntry& e) { e.size_error = -1; }), "array 'a' ");
    expect_zip_refused(with([](ZipEntry& e) { e.size_error = 1; }), "array 'a' ");
    expect_zip_refused(with([](ZipEntry& e) { e.stored_error = -1; }), "array 'a' ");
    expect_zip_refused(with([](ZipEntry& e) { e.stored_error = 1; }), "array ");
    expect_zip_refused(with([](ZipEntry& e) { e.name = "a\nb\x1B", e.crc_error = 1; }), "array 'a?b?'");
  }
  const auto refused = [&](std::vector<ZipEntry> entries, const std::string& words) {
    expect_zip_refused(zip(entries), words);
  };
  refused({{"a.npy", kTwo}, {"a.npy", kTwo}}, "array 'a' is there twice");
  refused({{"a.npy", kTwo}, {"a", kTwo}}, "array 'a' is there twice");
  refused({{"a.npy", kTwo, true, false, 0, 0, 0, -9}}, "unpacks to more bytes than the zip directory says");
  refused({{"a.npy", kTwo, true, false, 0, 0, 0, -1}}, "unpacks ");
  refused({{"a.npy", kTwo, true, false, 0, 0, 0, 1}}, "unpacks ");
  refused({{"a.npy", kTwo, false, false, 0, 8}}, "array 'a' ");  // said to be deflated, and is not
  refused({{"a.npy", deflated(kTwo).substr(0, 20), false, false, 0, 8, 0, 100}}, "deflated data end too early");
  refused({{"a.npy", kTwo, true, false, 0, 0, 0, 0, 0, 0, "", "x"}}, "unpacks ");
  refused({{"a.npy", "text"}}, "array 'a' is not a .npy file");
  refused({{"a.npy", kTwo, false, false, 0, 0, 0, 1, 1}}, "overlaps the zip directory");
  expect_zip_refused(zip({{"a.npy", kTwo}}, "", End::kNarrow, 1), "damaged zip directory");
  expect_zip_refused(zip({{"a.npy", kTwo}, {"b.npy", kTwo}}, "", End::kNarrow, uint64_t(-1)), "damaged zip directory");
  expect_zip_refused(zip({{"a.npy", kTwo}}, "", End::kWide, 65536), "has 65537 members");
  expect_zip_refused("PK", "is not a zip archive");
  expect_zip_refused(kTwo, "is not a zip archive");
  // The closing record, whose fields lie 22 bytes and fewer from the end.
  const auto closing = [&](std::size_t back) {
    std::string bytes = zip({{"a.npy", kTwo}});
    ++bytes[bytes.size() - back];
    return bytes;
  };
  for (const std::size_t field : {18, 16, 14, 12}) expect_zip_refused(closing(field), "is a part of a split zip");
  for (const std::size_t field : {10, 6}) expect_zip_refused(closing(field), "damaged zip directory");
}

// A member inside another one's bytes: the way of archives that unpack without end.
TEST_F(NpyTest, MembersThatShareBytesAreRefused) {
  ZipEntry outer{"a.npy", zip({{"b.npy", kTwo}})}, inner{"b.npy", kTwo};
  const auto header = static_cast<int64_t>(30 + outer.name.size() + 20);
  inner.local_error = -static_cast<int64_t>(outer.data.size());  // from behind `outer` to the start of its data
  ASSERT_EQ(zip({outer, inner}).compare(header, 4, "PK\x03\x04"), 0);
  expect_zip_refused(zip({outer, inner}), "array 'b' overlaps another member");
}

TEST_F(NpyTest, TheLimitOnAMembersBytesHolds) {
  for (const bool packed : {false, true}) {
    written(zip({{"a.npy", kTwo, packed}}));
    EXPECT_EQ(load_npz(path_, kTwo.size()).size(), 1u);
    expect_complaint([&] { load_npz(path_, kTwo.size() - 1); }, "would have " + std::to_string(kTwo.size()) + " bytes");
    EXPECT_EQ(load_npz(path_, UINT64_MAX).size(), 1u);
  }
}

template <class T>
void expect_round_trip(const fs::path& path, const std::string& descr) {
  const std::vector<T> values = {
      T(0),        T(1), std::numeric_limits<T>::lowest(), std::numeric_limits<T>::max(), std::numeric_limits<T>::min(),
      T(100.0 / 3)};
  for (const Shape& shape : {Shape{6}, Shape{2, 3}, Shape{1, 1, 1, 6, 1, 1, 1, 1}}) {
    save_npy(path, Tensor::of<T>(values, shape));
    const Tensor read = load_npy(path);
    EXPECT_EQ(read.dtype, safetensors_dtype<T>());
    EXPECT_EQ(read.shape, shape);
    EXPECT_EQ(read.as<T>(), values);
    EXPECT_EQ(read.origin, path.string());
  }
  std::ifstream in(path, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(in), {}};
  EXPECT_NE(bytes.find("'descr': '" + descr + "'"), std::string::npos) << bytes;
}

TEST_F(NpyTest, WhatIsSavedLoads) {
  expect_round_trip<double>(path_, "<f8");
  expect_round_trip<float>(path_, "<f4");
  expect_round_trip<int64_t>(path_, "<i8");
  expect_round_trip<int32_t>(path_, "<i4");
  expect_round_trip<uint64_t>(path_, "<u8");
  expect_round_trip<uint32_t>(path_, "<u4");
  expect_round_trip<uint8_t>(path_, "|u1");
  save_npy(path_, Tensor::of<double>({}, {3, 0, 2}));
  EXPECT_EQ(load_npy(path_).shape, (Shape{3, 0, 2}));
  save_npy(path_, Tensor::of<float>(std::vector<float>{2.5f}, {}));
  EXPECT_EQ(load_npy(path_).as<float>(), std::vector<float>{2.5f});
}

TEST_F(NpyTest, ASavedFileIsNumPysOwn) {
  const std::string start("\x93NUMPY\x01\x00\x76\x00", 10);
  const auto file = [&](const std::string& dictionary, const std::string& data) {
    return start + dictionary + std::string(128 - 11 - dictionary.size(), ' ') + "\n" + data;
  };
  EXPECT_EQ(saved(Tensor::of<double>(std::vector<double>{1, 2}, {2})),
            file("{'descr': '<f8', 'fortran_order': False, 'shape': (2,), }", le(1.0) + le(2.0)));
  EXPECT_EQ(saved(Tensor::of<uint8_t>(std::vector<uint8_t>{7}, {})),
            file("{'descr': '|u1', 'fortran_order': False, 'shape': (), }", "\7"));
  EXPECT_EQ(saved(Tensor::of<int32_t>({}, {0, 3})),
            file("{'descr': '<i4', 'fortran_order': False, 'shape': (0, 3), }", ""));
}

TEST_F(NpyTest, DataBeginAtAMultipleOf64) {
  for (int digits = 45; digits < 50; ++digits) {  // with 47 zeros, the header without its line's end would fill 128
    Shape shape = {0, 1, 1, 1, 1, 1};
    for (int i = 0; i < digits; ++i) shape[1 + i % 5] *= 10;
    EXPECT_EQ(saved(Tensor::of<float>({}, shape)).size() % 64, 0u);
    EXPECT_EQ(load_npy(path_).shape, shape);
  }
}

TEST_F(NpyTest, WhatCannotBeSavedIsRefused) {
  EXPECT_THROW(save_npy(path_, Tensor{"F16", {1}, {0, 0}}), InputError);
  EXPECT_THROW(save_npy(path_, Tensor{"BF16", {1}, {0, 0}}), InputError);
  EXPECT_THROW(save_npy(path_, Tensor{"F32", {2}, {0, 0, 0, 0}}), InputError);
  EXPECT_THROW(save_npy(path_, Tensor{"U8", {1, 1, 1, 1, 1, 1, 1, 1, 1}, {0}}), InputError);
  EXPECT_FALSE(fs::exists(path_));
  EXPECT_THROW(save_npy("/no/such/folder/a.npy", Tensor{"U8", {1}, {0}}), RunError);
}

TEST_F(NpyTest, AMissingFileIsBadInput) {
  EXPECT_THROW(load_npy("no/such/file.npy"), InputError);
  EXPECT_THROW(load_npz("no/such/file.npz"), InputError);
  EXPECT_THROW(load_npz(fs::temp_directory_path()), InputError);
}

}  // namespace
}  // namespace baton
