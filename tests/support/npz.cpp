#include "tests/support/npz.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <string_view>
#include <utility>

#include "engine/error.h"
#include "engine/files.h"

namespace baton::test {
namespace {

static_assert(std::endian::native == std::endian::little, "the goldens are little-endian");

[[noreturn]] void bad(const std::string& who, const std::string& what) { throw InputError(who + ": " + what); }

uint32_t crc32(std::span<const uint8_t> bytes) {
  static const auto table = [] {
    std::array<uint32_t, 256> t{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int bit = 0; bit < 8; ++bit) c = c & 1 ? c >> 1 ^ 0xEDB88320u : c >> 1;
      t[i] = c;
    }
    return t;
  }();
  uint32_t crc = ~0u;
  for (uint8_t byte : bytes) crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF];
  return ~crc;
}

// Reads numbers from a byte range, never past its end.
class Reader {
 public:
  Reader(std::string who, std::span<const uint8_t> bytes) : who_(std::move(who)), bytes_(bytes) {}

  template <class T>
  T at(std::size_t offset) const {
    T value;
    const std::span<const uint8_t> range = slice(offset, sizeof value);
    std::memcpy(&value, range.data(), sizeof value);
    return value;
  }
  std::span<const uint8_t> slice(std::size_t offset, std::size_t length) const {
    if (offset > bytes_.size() || length > bytes_.size() - offset) bad(who_, "is cut short");
    return bytes_.subspan(offset, length);
  }
  std::string text(std::size_t offset, std::size_t length) const {
    const std::span<const uint8_t> range = slice(offset, length);
    return std::string(range.begin(), range.end());
  }

 private:
  std::string who_;
  std::span<const uint8_t> bytes_;
};

// The record that closes a zip. It is followed by a comment of any bytes, so a candidate must reach the end exactly.
std::size_t find_directory_end(const std::string& path, std::span<const uint8_t> bytes) {
  constexpr std::size_t kLength = 22;
  const Reader reader(path, bytes);
  for (std::size_t back = kLength; back <= std::min<std::size_t>(bytes.size(), kLength + 0xFFFF); ++back) {
    const std::size_t offset = bytes.size() - back;
    if (reader.at<uint32_t>(offset) == 0x06054B50u && reader.at<uint16_t>(offset + 20) == back - kLength) return offset;
  }
  bad(path, "is not a zip archive, or it is cut short");
}

// What follows `'key':` in the Python dictionary of a .npy header.
std::string_view value_of(const std::string& who, std::string_view header, const std::string& key) {
  const std::size_t found = header.find("'" + key + "':");
  if (found == std::string_view::npos) bad(who, "its header has no " + key);
  header.remove_prefix(found + key.size() + 3);
  return header.substr(std::min(header.find_first_not_of(' '), header.size()));
}

std::size_t width_of(const std::string& dtype) {
  for (const char* known : {"f4", "f8", "i1", "u1", "i4", "i8", "b1"}) {
    if (dtype == known) return static_cast<std::size_t>(dtype[1] - '0');
  }
  return 0;
}

// "(4, 7)", "(4,)" or "()".
std::vector<int64_t> parse_shape(const std::string& who, std::string_view text) {
  const std::size_t close = text.find(')');
  if (!text.starts_with('(') || close == std::string_view::npos) bad(who, "its header has no shape");
  std::vector<int64_t> shape;
  for (std::size_t i = 1; i < close;) {
    if (text[i] < '0' || text[i] > '9') {
      if (text[i] != ' ' && text[i] != ',') bad(who, "its shape is not a tuple of integers");
      ++i;
      continue;
    }
    int64_t extent = 0;
    for (; text[i] >= '0' && text[i] <= '9'; ++i) {
      if (__builtin_mul_overflow(extent, int64_t{10}, &extent) ||
          __builtin_add_overflow(extent, int64_t{text[i] - '0'}, &extent)) {
        bad(who, "its shape is impossibly large");
      }
    }
    shape.push_back(extent);
  }
  return shape;
}

}  // namespace

Npz::Npz(const std::filesystem::path& path) : path_(path.string()), bytes_(read_file(path)) {
  const Reader reader(path_, bytes_);
  const std::size_t end = find_directory_end(path_, bytes_);
  const auto entries = reader.at<uint16_t>(end + 10);
  const auto directory = reader.at<uint32_t>(end + 16);
  if (reader.at<uint16_t>(end + 4) != 0 || reader.at<uint16_t>(end + 8) != entries)
    bad(path_, "is a part of a split zip");
  if (entries == 0xFFFF || directory == 0xFFFFFFFFu) bad(path_, "is a zip64 archive, which is not supported");

  std::size_t offset = directory;
  for (int i = 0; i < entries; ++i) {
    if (reader.at<uint32_t>(offset) != 0x02014B50u) bad(path_, "has a damaged zip directory");
    const auto flags = reader.at<uint16_t>(offset + 8), method = reader.at<uint16_t>(offset + 10);
    const auto crc = reader.at<uint32_t>(offset + 16), stored = reader.at<uint32_t>(offset + 20),
               size = reader.at<uint32_t>(offset + 24), local = reader.at<uint32_t>(offset + 42);
    const auto name_length = reader.at<uint16_t>(offset + 28);
    std::string name = reader.text(offset + 46, name_length);
    offset += 46u + name_length + reader.at<uint16_t>(offset + 30) + reader.at<uint16_t>(offset + 32);

    if (name.ends_with(".npy")) name.resize(name.size() - 4);
    const std::string who = path_ + ": array '" + name + "'";
    if (flags & 1) bad(who, "is encrypted");
    if (method != 0) bad(who, "is compressed; expected an uncompressed archive (numpy.savez)");
    if (stored == 0xFFFFFFFFu || size == 0xFFFFFFFFu || local == 0xFFFFFFFFu)
      bad(who, "needs zip64, which is not supported");
    if (stored != size) bad(who, "is stored, and its two sizes differ");
    if (reader.at<uint32_t>(local) != 0x04034B50u) bad(who, "is not where the zip directory says");
    // The local header's own sizes may be zip64 place-holders (NumPy writes those); only its length is wanted.
    const std::size_t begin = local + 30u + reader.at<uint16_t>(local + 26) + reader.at<uint16_t>(local + 28);
    if (crc32(reader.slice(begin, size)) != crc) bad(who, "is damaged: its checksum is wrong");
    if (!arrays_.emplace(name, parse_npy(who, begin, begin + size)).second) bad(who, "is there twice");
  }
  if (offset != end) bad(path_, "has a damaged zip directory");
}

Npz::Array Npz::parse_npy(const std::string& who, std::size_t begin, std::size_t end) const {
  const Reader reader(who, std::span(bytes_).subspan(begin, end - begin));
  if (reader.text(0, 6) != "\x93NUMPY") bad(who, "is not a .npy file");
  const auto version = reader.at<uint8_t>(6);
  if (version < 1 || version > 3) bad(who, "has .npy version " + std::to_string(version) + "; expected 1, 2 or 3");
  const std::size_t start = version == 1 ? 10 : 12;
  const std::size_t length = version == 1 ? reader.at<uint16_t>(8) : reader.at<uint32_t>(8);
  const std::string header = reader.text(start, length);

  const std::string_view descr = value_of(who, header, "descr");
  const std::size_t close = descr.find('\'', 1);
  if (!descr.starts_with('\'') || close == std::string_view::npos || close < 3) bad(who, "has a structured dtype");
  const std::string dtype(descr.substr(2, close - 2));
  const char order = descr[1];
  const std::size_t width = width_of(dtype);
  if (width == 0 || !(order == '<' || (order == '|' && width == 1))) {
    bad(who, "has dtype " + std::string(descr.substr(1, close - 1)) + "; expected <f4 <f8 |i1 |u1 <i4 <i8 |b1");
  }
  Array array{dtype, parse_shape(who, value_of(who, header, "shape")), begin + start + length, 1};
  for (int64_t extent : array.shape) {
    if (__builtin_mul_overflow(array.count, static_cast<std::size_t>(extent), &array.count)) {
      bad(who, "its shape is impossibly large");
    }
  }
  // NumPy calls an array of one dimension C order; the flag is only set where the order matters.
  if (!value_of(who, header, "fortran_order").starts_with("False")) bad(who, "is in Fortran order; expected C order");
  const std::size_t data = end - array.offset;
  if (data % width != 0 || data / width != array.count) {
    bad(who, "has " + std::to_string(data) + " bytes of data, which its shape and dtype do not");
  }
  return array;
}

const Npz::Array& Npz::at(const std::string& name) const {
  const auto found = arrays_.find(name);
  if (found == arrays_.end()) bad(path_, "has no array '" + name + "'");
  return found->second;
}

std::vector<std::string> Npz::names() const {
  std::vector<std::string> names;
  for (const auto& [name, array] : arrays_) names.push_back(name);
  return names;
}

template <class T>
std::vector<T> Npz::convert(const std::string& name) const {
  const Array& array = at(name);
  std::vector<T> values(array.count);
  const auto read = [&]<class Stored>(Stored) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      Stored value;
      std::memcpy(&value, bytes_.data() + array.offset + i * sizeof value, sizeof value);
      values[i] = static_cast<T>(value);
    }
  };
  if (array.dtype == "f8") read(double{});
  else if (array.dtype == "f4") read(float{});
  else if (array.dtype == "i1") read(int8_t{});
  else if (array.dtype == "i4") read(int32_t{});
  else if (array.dtype == "i8") read(int64_t{});
  else read(uint8_t{});  // u1, and b1, which is stored as 0 and 1
  return values;
}

std::vector<int64_t> Npz::shape(const std::string& name) const { return at(name).shape; }
std::vector<double> Npz::f64(const std::string& name) const { return convert<double>(name); }
std::vector<float> Npz::f32(const std::string& name) const { return convert<float>(name); }

std::vector<int64_t> Npz::i64(const std::string& name) const {
  if (at(name).dtype[0] == 'f')
    bad(path_ + ": array '" + name + "'", "has dtype " + at(name).dtype + "; expected integers");
  return convert<int64_t>(name);
}

std::string Npz::text(const std::string& name) const {
  const Array& array = at(name);
  if (array.dtype != "u1")
    bad(path_ + ": array '" + name + "'", "has dtype " + array.dtype + "; expected u1 for a text");
  const auto* first = reinterpret_cast<const char*>(bytes_.data() + array.offset);
  return std::string(first, first + array.count);
}

double Npz::scalar(const std::string& name) const {
  const std::vector<double> values = f64(name);
  if (values.size() != 1) {
    bad(path_ + ": array '" + name + "'", "has " + std::to_string(values.size()) + " elements; expected one");
  }
  return values[0];
}

std::array<double, 11> fingerprint(std::span<const double> values) {
  long double sum = 0, squares = 0, projections[8] = {};
  double most = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double a = values[i];
    sum += a;
    squares += static_cast<long double>(a) * a;
    if (std::fabs(a) > most || std::isnan(a)) most = std::fabs(a);  // a NaN stays: nothing is greater than it
    for (uint32_t k = 0; k < 8; ++k) {
      uint32_t h = static_cast<uint32_t>(i) * 2654435761u + k * 40503u;
      h ^= h >> 16;
      h *= 0x85EBCA6Bu;
      h ^= h >> 13;
      h *= 0xC2B2AE35u;
      h ^= h >> 16;
      projections[k] += h & 1 ? -a : a;
    }
  }
  std::array<double, 11> print{static_cast<double>(sum), static_cast<double>(std::sqrt(squares)), most};
  for (int k = 0; k < 8; ++k) print[3 + k] = static_cast<double>(projections[k]);
  return print;
}

}  // namespace baton::test
