// A .npy file: "\x93NUMPY", the version (two bytes), the header's length (2 bytes; 4 from version 2 on), the header (a
// Python dictionary of descr, fortran_order and shape), the data.
//
// An .npz file is a zip: members, each behind a local header; the directory, which says of every member its name, CRC,
// sizes and place; a record of where the directory is. The directory alone is believed: NumPy leaves place-holders in
// the local headers. Zip64 widens what does not fit 32 bits: an extra field of a directory entry, and a second closing
// record with its locator before the first.
#include "engine/io/npy.h"

#include <zlib.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cstring>
#include <optional>
#include <span>
#include <string_view>
#include <system_error>
#include <utility>

#include "engine/error.h"
#include "engine/io/files.h"

namespace baton {
namespace {

constexpr std::size_t kLongestHeader = std::size_t{1} << 16, kMostAxes = 8;
constexpr uint64_t kMostMembers = 65536;
constexpr std::size_t kChunk = std::size_t{1} << 20;

[[noreturn]] void bad(const std::string& who, const std::string& what) { throw InputError(who + " " + what); }

// What a file says of itself, fit for a message of one line.
std::string printable(std::string_view text) {
  std::string shown(text.substr(0, 100));
  for (char& c : shown) {
    if (std::iscntrl(static_cast<unsigned char>(c))) c = '?';
  }
  return shown + (text.size() > 100 ? "..." : "");
}

// Reads numbers from a byte range, never past its end.
class Reader {
 public:
  Reader(std::string who, std::span<const uint8_t> bytes) : who_(std::move(who)), bytes_(bytes) {}

  template <class T>
  T at(uint64_t offset) const {
    T value;
    std::memcpy(&value, slice(offset, sizeof value).data(), sizeof value);
    return value;
  }
  std::span<const uint8_t> slice(uint64_t offset, uint64_t length) const {
    if (offset > bytes_.size() || length > bytes_.size() - offset) bad(who_, "is cut short");
    return bytes_.subspan(offset, length);
  }
  std::string_view text(uint64_t offset, uint64_t length) const {
    const std::span<const uint8_t> range = slice(offset, length);
    return {reinterpret_cast<const char*>(range.data()), range.size()};
  }

 private:
  std::string who_;
  std::span<const uint8_t> bytes_;
};

// ------------------------------------------------------------------------------------------------------------- .npy

struct Dtype {
  std::string_view code, name;  // NumPy's, without the byte order; the Tensor's
  std::size_t width;            // bytes an element in the file
};
// The first of a name is the one that is written.
constexpr Dtype kDtypes[] = {{"f8", "F64", 8}, {"f4", "F32", 4}, {"f2", "F16", 2}, {"i8", "I64", 8},
                             {"i4", "I32", 4}, {"i2", "I32", 2}, {"i1", "I32", 1}, {"u8", "U64", 8},
                             {"u4", "U32", 4}, {"u2", "I32", 2}, {"u1", "U8", 1},  {"b1", "U8", 1}};

struct Header {
  Dtype dtype;
  bool fortran_order;
  std::vector<int64_t> shape;
};

// The header's dictionary: exactly the three keys, in any order.
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
      else bad(who_, "has the unexpected key '" + printable(key) + "' in its header");
      if (!take(',')) {
        expect('}');
        break;
      }
    }
    skip_blanks();
    if (!rest_.empty()) broken();
    if (!dtype || !fortran_order || !shape) {
      bad(who_, std::string("has no ") + (!dtype ? "descr" : !shape ? "shape" : "fortran_order") + " in its header");
    }
    return {*dtype, *fortran_order, *std::move(shape)};
  }

 private:
  [[noreturn]] void broken() const { bad(who_, "has a header that is not NumPy's dictionary"); }

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
    if (rest_.starts_with('[')) bad(who_, "has a structured dtype");
    const std::string_view text = quoted();
    for (const Dtype& dtype : kDtypes) {
      const bool ordered = text.starts_with('<') || (text.starts_with('|') && dtype.width == 1);
      if (ordered && text.substr(1) == dtype.code) return dtype;
    }
    bad(who_, "has dtype " + printable(text) + "; expected f2 f4 f8 i1 i2 i4 i8 u1 u2 u4 u8 b1, little-endian");
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
      if (rest_.empty() || rest_[0] < '0' || rest_[0] > '9') bad(who_, "has a shape that is not a tuple of integers");
      if (shape.size() == kMostAxes) bad(who_, "has more than " + std::to_string(kMostAxes) + " axes");
      int64_t extent = 0;
      for (; !rest_.empty() && rest_[0] >= '0' && rest_[0] <= '9'; rest_.remove_prefix(1)) {
        if (__builtin_mul_overflow(extent, int64_t{10}, &extent) ||
            __builtin_add_overflow(extent, int64_t{rest_[0] - '0'}, &extent)) {
          bad(who_, "has an impossibly large shape");
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
    // The middle axes' place in C order is m; in Fortran order, the first of them is the fastest.
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

// The array of a whole .npy file, whose bytes are taken over.
Tensor parse_npy(const std::string& who, std::vector<uint8_t> bytes) {
  const Reader reader(who, bytes);
  if (!std::string_view("\x93NUMPY").starts_with(reader.text(0, std::min<std::size_t>(6, bytes.size())))) {
    bad(who, "is not a .npy file");
  }
  const auto version = reader.at<uint8_t>(6), minor = reader.at<uint8_t>(7);
  if (version < 1 || version > 3 || minor != 0) {
    bad(who,
        "has .npy version " + std::to_string(version) + "." + std::to_string(minor) + "; expected 1.0, 2.0 or 3.0");
  }
  const std::size_t start = version == 1 ? 10 : 12;
  const std::size_t length = version == 1 ? reader.at<uint16_t>(8) : reader.at<uint32_t>(8);
  if (length > kLongestHeader) bad(who, "has a header of " + std::to_string(length) + " bytes; at most 64 KB are read");
  const Header header = HeaderParser(who, reader.text(start, length)).parse();

  int64_t count = 1;
  for (int64_t extent : header.shape) {
    if (__builtin_mul_overflow(count, extent, &count)) bad(who, "has the impossible shape " + shape_text(header.shape));
  }
  const std::size_t width = header.dtype.width, data = bytes.size() - start - length;
  if (data % width != 0 || data / width != static_cast<uint64_t>(count)) {
    bad(who, "has " + std::to_string(data) + " bytes of data, which " + std::string(header.dtype.code) + " " +
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

// ------------------------------------------------------------------------------------------------------------- .npz

constexpr uint16_t kNarrow16 = 0xFFFF;  // these stand for "see zip64"
constexpr uint32_t kNarrow32 = 0xFFFFFFFF;

struct Directory {
  uint64_t begin, end, members;
};

struct Member {
  std::string who;        // for messages
  uint64_t local, begin;  // its local header, its data
  uint64_t stored, size;  // bytes there, and inflated
  uint32_t crc;
  bool deflated;
};

// The record that closes a zip. It is followed by a comment of any bytes, so a candidate must reach the end exactly.
uint64_t find_directory_end(const std::string& path, std::span<const uint8_t> bytes) {
  constexpr std::size_t kLength = 22;
  const Reader reader(path, bytes);
  for (std::size_t back = kLength; back <= std::min<std::size_t>(bytes.size(), kLength + 0xFFFF); ++back) {
    const std::size_t offset = bytes.size() - back;
    if (reader.at<uint32_t>(offset) == 0x06054B50u && reader.at<uint16_t>(offset + 20) == back - kLength) return offset;
  }
  bad(path, "is not a zip archive, or it is cut short");
}

Directory find_directory(const std::string& path, std::span<const uint8_t> bytes) {
  constexpr uint64_t kLocator = 20;
  const Reader reader(path, bytes);
  const uint64_t record = find_directory_end(path, bytes);
  const auto disk = reader.at<uint16_t>(record + 4), first_disk = reader.at<uint16_t>(record + 6),
             here = reader.at<uint16_t>(record + 8), members = reader.at<uint16_t>(record + 10);
  const auto size = reader.at<uint32_t>(record + 12), begin = reader.at<uint32_t>(record + 16);

  Directory directory{begin, record, members};
  bool one = (disk == 0 || disk == kNarrow16) && (first_disk == 0 || first_disk == kNarrow16) && here == members;
  uint64_t length = size;
  if (record >= kLocator && reader.at<uint32_t>(record - kLocator) == 0x07064B50u) {
    const auto wide = reader.at<uint64_t>(record - kLocator + 8);
    if (reader.at<uint32_t>(wide) != 0x06064B50u) bad(path, "has a damaged zip64 record");
    directory = {reader.at<uint64_t>(wide + 48), wide, reader.at<uint64_t>(wide + 32)};
    length = reader.at<uint64_t>(wide + 40);
    one = one && reader.at<uint32_t>(record - kLocator + 4) == 0 && reader.at<uint32_t>(wide + 16) == 0 &&
          reader.at<uint32_t>(wide + 20) == 0 && reader.at<uint64_t>(wide + 24) == directory.members;
    // The record reaches its locator, and the numbers given twice agree.
    const uint64_t tail = record - kLocator - wide;
    if (wide > record - kLocator || tail < 56 || reader.at<uint64_t>(wide + 4) != tail - 12 ||
        (members != kNarrow16 && members != directory.members) || (begin != kNarrow32 && begin != directory.begin) ||
        (size != kNarrow32 && size != length)) {
      bad(path, "has a damaged zip64 record");
    }
  }
  if (!one) bad(path, "is a part of a split zip");
  if (directory.begin > directory.end || length != directory.end - directory.begin) {
    bad(path, "has a damaged zip directory");
  }
  if (directory.members > kMostMembers) {
    bad(path,
        "has " + std::to_string(directory.members) + " members; at most " + std::to_string(kMostMembers) + " are read");
  }
  return directory;
}

// Replaces those of a directory entry's three numbers that did not fit 32 bits. They stand in the extra field 1, in
// this order, and only those that are needed.
void widen(const std::string& who, std::span<const uint8_t> extra, std::array<uint64_t*, 3> numbers) {
  if (std::none_of(numbers.begin(), numbers.end(), [](const uint64_t* n) { return *n == kNarrow32; })) return;
  const Reader reader(who, extra);
  for (uint64_t at = 0; at < extra.size();) {
    const auto kind = reader.at<uint16_t>(at), length = reader.at<uint16_t>(at + 2);
    const Reader field(who, reader.slice(at + 4, length));
    at += 4u + length;
    if (kind != 1) continue;
    uint64_t used = 0;
    for (uint64_t* number : numbers) {
      if (*number != kNarrow32) continue;
      *number = field.at<uint64_t>(used);
      used += sizeof(uint64_t);
    }
    return;
  }
  // Without the field the numbers mean what they say.
}

// The members by the names of their arrays, all checked but for their content.
std::map<std::string, Member> read_directory(const std::string& path, std::span<const uint8_t> bytes,
                                             uint64_t most_bytes) {
  const Reader reader(path, bytes);
  const Directory directory = find_directory(path, bytes);
  std::map<std::string, Member> members;
  uint64_t offset = directory.begin;
  for (uint64_t i = 0; i < directory.members; ++i) {
    if (reader.at<uint32_t>(offset) != 0x02014B50u) bad(path, "has a damaged zip directory");
    const auto flags = reader.at<uint16_t>(offset + 8), method = reader.at<uint16_t>(offset + 10),
               name_length = reader.at<uint16_t>(offset + 28), extra_length = reader.at<uint16_t>(offset + 30),
               comment_length = reader.at<uint16_t>(offset + 32);
    const std::string_view file_name = reader.text(offset + 46, name_length);
    const std::string name(file_name.ends_with(".npy") ? file_name.substr(0, file_name.size() - 4) : file_name);
    const std::string who = path + ": array '" + printable(name) + "'";
    Member member{who,
                  reader.at<uint32_t>(offset + 42),
                  0,
                  reader.at<uint32_t>(offset + 20),
                  reader.at<uint32_t>(offset + 24),
                  reader.at<uint32_t>(offset + 16),
                  method == 8};
    widen(who, reader.slice(offset + 46 + name_length, extra_length), {&member.size, &member.stored, &member.local});
    offset += 46u + name_length + extra_length + comment_length;

    if (flags & 1) bad(who, "is encrypted");
    if (method != 0 && method != 8) {
      bad(who, "is packed by method " + std::to_string(method) + "; expected stored or deflated");
    }
    if (member.size > most_bytes) {
      bad(who,
          "would have " + std::to_string(member.size) + " bytes; at most " + std::to_string(most_bytes) + " are read");
    }
    if (!member.deflated && member.stored != member.size) bad(who, "is stored, and its two sizes differ");
    // Deflate makes at most 258 bytes of two bits: what is claimed beyond that is refused before it is allocated.
    if (member.size / 1032 > member.stored) bad(who, "claims more bytes than its packed ones can hold");
    if (reader.at<uint32_t>(member.local) != 0x04034B50u) bad(who, "is not where the zip directory says");
    const auto local_name = reader.at<uint16_t>(member.local + 26),
               local_extra = reader.at<uint16_t>(member.local + 28);
    if (reader.at<uint16_t>(member.local + 8) != method || reader.text(member.local + 30, local_name) != file_name) {
      bad(who, "is another one where the zip directory says");
    }
    member.begin = member.local + 30 + local_name + local_extra;
    reader.slice(member.begin, member.stored);
    if (!members.emplace(name, std::move(member)).second) bad(who, "is there twice");
  }
  if (offset != directory.end) bad(path, "has a damaged zip directory");

  // Members that share bytes would let a small file unpack to any size.
  std::vector<const Member*> order;
  for (const auto& [name, member] : members) order.push_back(&member);
  std::sort(order.begin(), order.end(), [](const Member* a, const Member* b) { return a->local < b->local; });
  uint64_t reached = 0;
  for (const Member* member : order) {
    if (member->local < reached) bad(member->who, "overlaps another member");
    reached = member->begin + member->stored;
    if (reached > directory.begin) bad(member->who, "overlaps the zip directory");
  }
  return members;
}

// Grows with what there is to write, not with what is claimed.
std::vector<uint8_t> inflate_exactly(const Member& member, std::span<const uint8_t> packed) {
  z_stream stream{};
  if (inflateInit2(&stream, -MAX_WBITS) != Z_OK) throw RunError("cannot start zlib: out of memory");  // no zlib header
  struct End {
    z_stream* stream;
    ~End() { inflateEnd(stream); }
  } end{&stream};

  std::vector<uint8_t> out;
  out.reserve(member.size + 1);  // one byte more, to see an overrun; memory is not touched before the data come
  std::size_t filled = 0, used = 0;
  while (true) {
    if (filled == out.size()) {
      if (filled > member.size) bad(member.who, "unpacks to more bytes than the zip directory says");
      out.resize(std::min<std::size_t>(member.size + 1, filled + kChunk));
    }
    // avail_in is 32 bits wide, and a member may be longer.
    const auto give = static_cast<uInt>(std::min<std::size_t>(packed.size() - used, std::size_t{1} << 30));
    const auto room = static_cast<uInt>(out.size() - filled);
    stream.next_in = const_cast<Bytef*>(packed.data() + used);
    stream.avail_in = give;
    stream.next_out = out.data() + filled;
    stream.avail_out = room;
    const int status = inflate(&stream, Z_NO_FLUSH);
    used += give - stream.avail_in;
    filled += room - stream.avail_out;
    if (status == Z_STREAM_END) break;
    if (status == Z_MEM_ERROR) throw RunError("cannot unpack " + member.who + ": out of memory");
    if (status != Z_OK && status != Z_BUF_ERROR) {
      bad(member.who, std::string("is damaged: ") + (stream.msg ? stream.msg : "bad deflated data"));
    }
    if (used == packed.size() && stream.avail_out > 0) bad(member.who, "is damaged: its deflated data end too early");
  }
  if (filled != member.size || used != packed.size()) {
    bad(member.who, "unpacks " + std::to_string(used) + " bytes to " + std::to_string(filled) +
                        "; the zip directory says " + std::to_string(packed.size()) + " to " +
                        std::to_string(member.size));
  }
  out.resize(filled);
  return out;
}

// The bytes of a .npy file.
std::string npy_text(const std::string& who, const Tensor& tensor) {
  const auto* dtype = std::find_if(std::begin(kDtypes), std::end(kDtypes),
                                   [&](const Dtype& known) { return known.name == tensor.dtype; });
  if (dtype == std::end(kDtypes) || tensor.dtype == "F16") {
    bad(who, "has dtype " + tensor.dtype + "; .npy is written for F64, F32, I64, I32, U64, U32, U8");
  }
  if (tensor.shape.size() > kMostAxes) bad(who, "has more than " + std::to_string(kMostAxes) + " axes");
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

// Numbers of one width, one after the other.
template <class T, class... Values>
std::string little(Values... values) {
  std::string bytes;
  for (const T value : {static_cast<T>(values)...}) bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
  return bytes;
}

}  // namespace

Tensor load_npy(const std::filesystem::path& path) { return parse_npy(path.string(), read_file(path)); }

std::map<std::string, Tensor> load_npz(const std::filesystem::path& path, uint64_t most_bytes) {
  const std::vector<uint8_t> bytes = read_file(path);
  // Packed once more, a small archive could unpack to any size.
  std::error_code error;
  const uint64_t there = std::filesystem::file_size(path, error);
  if (!error && there != bytes.size()) bad(path.string(), "is an .npz archive that is packed by gzip or xz");
  std::map<std::string, Tensor> arrays;
  for (const auto& [name, member] : read_directory(path.string(), bytes, most_bytes)) {
    const std::span<const uint8_t> stored = std::span(bytes).subspan(member.begin, member.stored);
    std::vector<uint8_t> content =
        member.deflated ? inflate_exactly(member, stored) : std::vector<uint8_t>(stored.begin(), stored.end());
    if (crc32_z(0, content.data(), content.size()) != member.crc) bad(member.who, "is damaged: its checksum is wrong");
    arrays.emplace(name, parse_npy(member.who, std::move(content)));
  }
  return arrays;
}

void save_npy(const std::filesystem::path& path, const Tensor& tensor) {
  write_file_atomically(path, npy_text(tensor.origin.empty() ? path.string() + ": a tensor" : tensor.origin, tensor));
}

void save_npz(const std::filesystem::path& path, const std::map<std::string, Tensor>& arrays) {
  if (arrays.size() > 0xFFFE) bad(path.string(), "would have more than 65534 arrays");
  std::string bytes, directory;
  for (const auto& [name, tensor] : arrays) {
    const std::string who = path.string() + ": array '" + printable(name) + "'";
    if (name.empty() || name.size() > 1000 ||
        std::any_of(name.begin(), name.end(), [](unsigned char c) { return c < 0x21 || c > 0x7E || c == '/'; })) {
      bad(who, "has a name that is not 1 to 1000 visible characters of ASCII, without '/'");
    }
    const std::string content = npy_text(who, tensor), file_name = name + ".npy";
    // Bytes that need zip64 are refused, by the sum that the closing record must hold as well.
    if (bytes.size() + content.size() + directory.size() > kNarrow32 - (uint64_t{1} << 16)) {
      bad(who, "does not fit: an .npz is written up to 4 GB");
    }
    const auto size = static_cast<uint32_t>(content.size()), place = static_cast<uint32_t>(bytes.size());
    const auto crc = static_cast<uint32_t>(crc32_z(0, reinterpret_cast<const Bytef*>(content.data()), content.size()));
    // What a local header and a directory entry share: version 2.0, no flags, stored, 1980-01-01 00:00 (the same
    // arrays are the same bytes), CRC, sizes, length of the name, no extra field.
    const std::string shared =
        little<uint16_t>(20, 0, 0, 0, 33) + little<uint32_t>(crc, size, size) + little<uint16_t>(file_name.size(), 0);
    bytes += little<uint32_t>(0x04034B50u) + shared + file_name + content;
    // No comment, disk 0, no attributes.
    directory += little<uint32_t>(0x02014B50u) + little<uint16_t>(20) + shared + little<uint16_t>(0, 0, 0) +
                 little<uint32_t>(0, place) + file_name;
  }
  const auto begin = static_cast<uint32_t>(bytes.size()), length = static_cast<uint32_t>(directory.size());
  bytes += directory + little<uint32_t>(0x06054B50u) + little<uint16_t>(0, 0, arrays.size(), arrays.size()) +
           little<uint32_t>(length, begin) + little<uint16_t>(0);
  write_file_atomically(path, bytes);
}

}  // namespace baton
