// A .npy file: "\x93NUMPY", the version (two bytes), the header's length (2 bytes; 4 from version 2 on), the header (a
// Python dictionary of descr, fortran_order and shape), the data.
#include "engine/io/npy.h"

#include <algorithm>
#include <cctype>
#include <optional>

#include "engine/io/files.h"
#include "engine/io/npy_parts.h"

namespace baton {
namespace {

using npy::printable;

constexpr std::size_t kLongestHeader = std::size_t{1} << 16, kMostAxes = 8;

struct Dtype {
  std::string_view code, name;  // NumPy's, without the byte order; the Tensor's
  std::size_t width;            // bytes an element in the file
};
// Of several with one name, the first is written.
constexpr Dtype kDtypes[] = {{"f8", "F64", 8}, {"f4", "F32", 4}, {"f2", "F16", 2}, {"i8", "I64", 8},
                             {"i4", "I32", 4}, {"i2", "I32", 2}, {"i1", "I32", 1}, {"u8", "U64", 8},
                             {"u4", "U32", 4}, {"u2", "I32", 2}, {"u1", "U8", 1},  {"b1", "U8", 1}};

struct Header {
  Dtype dtype;
  bool fortran_order;
  std::vector<int64_t> shape;
};

// Parses the header's dictionary: it must have exactly the three keys, in any order.
class HeaderParser {
 public:
  HeaderParser(const std::string& who, std::string_view text) : who_(who), rest_(text) {}

  Header parse() {
    std::optional<Dtype> dtype;
    std::optional<bool> fortran_order;
    std::optional<std::vector<int64_t>> shape;
    expect('{');
    while (!take('}')) {
      const std::string_view key = quoted();
      expect(':');
      if (key == "descr" && !dtype) dtype = parse_dtype();
      else if (key == "fortran_order" && !fortran_order) fortran_order = parse_bool();
      else if (key == "shape" && !shape) shape = parse_shape();
      else refuse(who_, "has the unexpected key '" + printable(key) + "' in its header");
      if (!take(',')) {
        expect('}');
        break;
      }
    }
    skip_blanks();
    if (!rest_.empty()) broken();
    if (!dtype || !fortran_order || !shape) {
      refuse(who_, std::string("has no ") + (!dtype ? "descr" : !shape ? "shape" : "fortran_order") + " in its header");
    }
    return {*dtype, *fortran_order, *std::move(shape)};
  }

 private:
  [[noreturn]] void broken() const { refuse(who_, "has a header that is not NumPy's dictionary"); }

  void skip_blanks() {
    while (!rest_.empty() && (rest_[0] == ' ' || rest_[0] == '\n')) rest_.remove_prefix(1);
  }
  bool take(char wanted) {
    skip_blanks();
    if (!rest_.starts_with(wanted)) return false;
    rest_.remove_prefix(1);
    return true;
  }
  void expect(char wanted) {
    if (!take(wanted)) broken();
  }
  bool take_word(std::string_view word) {
    if (!rest_.starts_with(word)) return false;
    rest_.remove_prefix(word.size());
    return true;
  }

  std::string_view quoted() {
    const bool twice = take('"');
    if (!twice) expect('\'');
    const std::size_t close = rest_.find(twice ? '"' : '\'');
    if (close == std::string_view::npos) broken();
    const std::string_view text = rest_.substr(0, close);
    rest_.remove_prefix(close + 1);
    return text;
  }

  Dtype parse_dtype() {
    skip_blanks();
    if (rest_.starts_with('[')) refuse(who_, "has a structured dtype");
    const std::string_view text = quoted();
    for (const Dtype& dtype : kDtypes) {
      const bool ordered = text.starts_with('<') || (text.starts_with('|') && dtype.width == 1);
      if (ordered && text.substr(1) == dtype.code) return dtype;
    }
    refuse(who_, "has dtype " + printable(text) + "; expected f2 f4 f8 i1 i2 i4 i8 u1 u2 u4 u8 b1, little-endian");
  }

  bool parse_bool() {
    skip_blanks();
    if (take_word("True")) return true;
    if (!take_word("False")) broken();
    return false;
  }

  // "(4, 7)", "(4,)" or "()"; Python 2 wrote (4L,).
  std::vector<int64_t> parse_shape() {
    std::vector<int64_t> shape;
    expect('(');
    while (!take(')')) {
      skip_blanks();
      if (rest_.empty() || rest_[0] < '0' || rest_[0] > '9')
        refuse(who_, "has a shape that is not a tuple of integers");
      if (shape.size() == kMostAxes) refuse(who_, "has more than " + std::to_string(kMostAxes) + " axes");
      int64_t extent = 0;
      for (; !rest_.empty() && rest_[0] >= '0' && rest_[0] <= '9'; rest_.remove_prefix(1)) {
        if (__builtin_mul_overflow(extent, int64_t{10}, &extent) ||
            __builtin_add_overflow(extent, int64_t{rest_[0] - '0'}, &extent)) {
          refuse(who_, "has an impossibly large shape");
        }
      }
      take_word("L");
      shape.push_back(extent);
      if (take(',')) continue;
      expect(')');
      if (shape.size() == 1) broken();  // (4) is no tuple
      break;
    }
    return shape;
  }

  const std::string& who_;
  std::string_view rest_;
};

// Column-major to row-major, in tiles over the first axis (contiguous in `from`) and the last (contiguous in `to`).
template <class T>
void reorder(const uint8_t* from, uint8_t* to, const std::vector<int64_t>& shape) {
  constexpr int64_t kTile = 32;
  const std::size_t last = shape.size() - 1;
  const int64_t rows = shape[0], columns = shape[last];
  int64_t middle = 1;
  for (std::size_t axis = 1; axis < last; ++axis) middle *= shape[axis];
  const int64_t row_stride = middle * columns, column_stride = middle * rows;
  for (int64_t m = 0; m < middle; ++m) {
    // The place along the middle axes is m in C order; in Fortran order the first of them varies fastest.
    int64_t reversed = 0, rest = m;
    for (std::size_t axis = last - 1, stride = static_cast<std::size_t>(middle); axis >= 1; --axis) {
      stride /= static_cast<std::size_t>(shape[axis]);
      reversed += rest % shape[axis] * static_cast<int64_t>(stride);
      rest /= shape[axis];
    }
    for (int64_t top = 0; top < rows; top += kTile) {
      for (int64_t left = 0; left < columns; left += kTile) {
        for (int64_t i = top; i < std::min(top + kTile, rows); ++i) {
          for (int64_t j = left; j < std::min(left + kTile, columns); ++j) {
            const int64_t source = i + reversed * rows + j * column_stride, target = i * row_stride + m * columns + j;
            std::memcpy(to + target * int64_t{sizeof(T)}, from + source * int64_t{sizeof(T)}, sizeof(T));
          }
        }
      }
    }
  }
}

std::vector<uint8_t> in_c_order(const std::vector<uint8_t>& bytes, const Header& header) {
  std::vector<uint8_t> ordered(bytes.size());
  switch (header.dtype.width) {
    case 1:
      reorder<uint8_t>(bytes.data(), ordered.data(), header.shape);
      break;
    case 2:
      reorder<uint16_t>(bytes.data(), ordered.data(), header.shape);
      break;
    case 4:
      reorder<uint32_t>(bytes.data(), ordered.data(), header.shape);
      break;
    default:
      reorder<uint64_t>(bytes.data(), ordered.data(), header.shape);
      break;
  }
  return ordered;
}

// Integers narrower than any of Tensor's signed ones.
template <class T>
std::vector<uint8_t> as_int32(const std::vector<uint8_t>& bytes) {
  const std::size_t count = bytes.size() / sizeof(T);
  std::vector<uint8_t> wide(count * sizeof(int32_t));
  for (std::size_t i = 0; i < count; ++i) {
    T value;
    std::memcpy(&value, bytes.data() + i * sizeof value, sizeof value);
    const int32_t widened = value;
    std::memcpy(wide.data() + i * sizeof widened, &widened, sizeof widened);
  }
  return wide;
}

}  // namespace

std::string npy::printable(std::string_view text) {
  std::string shown(text.substr(0, 100));
  for (char& c : shown) {
    if (std::iscntrl(static_cast<unsigned char>(c))) c = '?';
  }
  return shown + (text.size() > 100 ? "..." : "");
}

Tensor npy::parse(const std::string& who, std::vector<uint8_t> bytes) {
  const Reader reader(who, bytes);
  if (!std::string_view("\x93NUMPY").starts_with(reader.text(0, std::min<std::size_t>(6, bytes.size())))) {
    refuse(who, "is not a .npy file");
  }
  const auto version = reader.at<uint8_t>(6), minor = reader.at<uint8_t>(7);
  if (version < 1 || version > 3 || minor != 0) {
    refuse(who,
           "has .npy version " + std::to_string(version) + "." + std::to_string(minor) + "; expected 1.0, 2.0 or 3.0");
  }
  const std::size_t start = version == 1 ? 10 : 12;
  const std::size_t length = version == 1 ? reader.at<uint16_t>(8) : reader.at<uint32_t>(8);
  if (length > kLongestHeader)
    refuse(who, "has a header of " + std::to_string(length) + " bytes; at most 64 KB are read");
  const Header header = HeaderParser(who, reader.text(start, length)).parse();

  int64_t count = 1;
  for (int64_t extent : header.shape) {
    if (__builtin_mul_overflow(count, extent, &count))
      refuse(who, "has the impossible shape " + shape_text(header.shape));
  }
  const std::size_t width = header.dtype.width, data = bytes.size() - start - length;
  if (data % width != 0 || data / width != static_cast<uint64_t>(count)) {
    refuse(who, "has " + std::to_string(data) + " bytes of data, which " + std::string(header.dtype.code) + " " +
                    shape_text(header.shape) + " does not");
  }
  bytes.erase(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(start + length));
  if (header.fortran_order && header.shape.size() > 1 && count > 0) bytes = in_c_order(bytes, header);
  if (header.dtype.code == "i1") bytes = as_int32<int8_t>(bytes);
  else if (header.dtype.code == "i2") bytes = as_int32<int16_t>(bytes);
  else if (header.dtype.code == "u2") bytes = as_int32<uint16_t>(bytes);
  Tensor tensor{std::string(header.dtype.name), header.shape, std::move(bytes), who};
  tensor.check();
  return tensor;
}

std::string npy::format(const std::string& who, const Tensor& tensor) {
  const auto* dtype = std::find_if(std::begin(kDtypes), std::end(kDtypes),
                                   [&](const Dtype& known) { return known.name == tensor.dtype; });
  if (dtype == std::end(kDtypes) || tensor.dtype == "F16") {
    refuse(who, "has dtype " + tensor.dtype + "; .npy is written for F64, F32, I64, I32, U64, U32, U8");
  }
  if (tensor.shape.size() > kMostAxes) refuse(who, "has more than " + std::to_string(kMostAxes) + " axes");
  tensor.check();

  std::string header = std::string("{'descr': '") + (dtype->width == 1 ? "|" : "<") + std::string(dtype->code) +
                       "', 'fortran_order': False, 'shape': (";
  for (std::size_t axis = 0; axis < tensor.shape.size(); ++axis) {
    header += (axis ? ", " : "") + std::to_string(tensor.shape[axis]);
  }
  header += tensor.shape.size() == 1 ? ",), }" : "), }";
  // The data begin at a multiple of 64, as NumPy has them, and the header ends its line.
  constexpr std::size_t kStart = 10;
  header.resize((kStart + header.size() + 1 + 63) / 64 * 64 - kStart - 1, ' ');
  header += '\n';
  const auto length = static_cast<uint16_t>(header.size());

  std::string bytes("\x93NUMPY\x01\x00", 8);
  bytes.reserve(kStart + header.size() + tensor.bytes.size());
  bytes.append(reinterpret_cast<const char*>(&length), sizeof length);
  bytes += header;
  bytes.append(reinterpret_cast<const char*>(tensor.bytes.data()), tensor.bytes.size());
  return bytes;
}

Tensor load_npy(const std::filesystem::path& path) { return npy::parse(path.string(), read_file(path)); }

void save_npy(const std::filesystem::path& path, const Tensor& tensor) {
  write_file_atomically(path,
                        npy::format(tensor.origin.empty() ? path.string() + ": a tensor" : tensor.origin, tensor));
}

}  // namespace baton
