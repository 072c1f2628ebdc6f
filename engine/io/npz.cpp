// An .npz file is a zip: members, each behind a local header; the directory, which says of every member its name, CRC,
// sizes and place; a record of where the directory is. Only the directory is trusted, for NumPy leaves place-holders in
// the local headers. Zip64 widens what does not fit 32 bits: by an extra field of a directory entry, and by a second
// closing record with its locator before the first.
#include <zlib.h>

#include <algorithm>
#include <array>
#include <system_error>

#include "engine/io/files.h"
#include "engine/io/npy.h"
#include "engine/io/npy_parts.h"

namespace baton {
namespace {

using npy::printable;
using npy::Reader;

constexpr uint64_t kMostMembers = 65536;
constexpr std::size_t kMemberChunk = std::size_t{1} << 20;

constexpr uint16_t kNarrow16 = 0xFFFF;  // both stand for a number that is in the zip64 record
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
  refuse(path, "is not a zip archive, or it is cut short");
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
    if (reader.at<uint32_t>(wide) != 0x06064B50u) refuse(path, "has a damaged zip64 record");
    directory = {reader.at<uint64_t>(wide + 48), wide, reader.at<uint64_t>(wide + 32)};
    length = reader.at<uint64_t>(wide + 40);
    one = one && reader.at<uint32_t>(record - kLocator + 4) == 0 && reader.at<uint32_t>(wide + 16) == 0 &&
          reader.at<uint32_t>(wide + 20) == 0 && reader.at<uint64_t>(wide + 24) == directory.members;
    // The record must reach its locator, and numbers that are given twice must agree.
    const uint64_t tail = record - kLocator - wide;
    if (wide > record - kLocator || tail < 56 || reader.at<uint64_t>(wide + 4) != tail - 12 ||
        (members != kNarrow16 && members != directory.members) || (begin != kNarrow32 && begin != directory.begin) ||
        (size != kNarrow32 && size != length)) {
      refuse(path, "has a damaged zip64 record");
    }
  }
  if (!one) refuse(path, "is a part of a split zip");
  if (directory.begin > directory.end || length != directory.end - directory.begin) {
    refuse(path, "has a damaged zip directory");
  }
  if (directory.members > kMostMembers) {
    refuse(path, "has " + std::to_string(directory.members) + " members; at most " + std::to_string(kMostMembers) +
                     " are read");
  }
  return directory;
}

// Replaces those of a directory entry's three numbers that did not fit 32 bits. The extra field 1 holds only these, in
// this order.
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
  // Without the field the numbers are taken as they are.
}

// The members by the names of their arrays. Everything but their content is checked.
std::map<std::string, Member> read_directory(const std::string& path, std::span<const uint8_t> bytes,
                                             uint64_t most_bytes) {
  const Reader reader(path, bytes);
  const Directory directory = find_directory(path, bytes);
  std::map<std::string, Member> members;
  uint64_t offset = directory.begin;
  for (uint64_t i = 0; i < directory.members; ++i) {
    if (reader.at<uint32_t>(offset) != 0x02014B50u) refuse(path, "has a damaged zip directory");
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

    if (flags & 1) refuse(who, "is encrypted");
    if (method != 0 && method != 8) {
      refuse(who, "is packed by method " + std::to_string(method) + "; expected stored or deflated");
    }
    if (member.size > most_bytes) {
      refuse(who, "would have " + std::to_string(member.size) + " bytes; at most " + std::to_string(most_bytes) +
                      " are read");
    }
    if (!member.deflated && member.stored != member.size) refuse(who, "is stored, and its two sizes differ");
    // Deflate makes at most 258 bytes of two bits: what is claimed beyond that is refused before it is allocated.
    if (member.size / 1032 > member.stored) refuse(who, "claims more bytes than its packed ones can hold");
    if (reader.at<uint32_t>(member.local) != 0x04034B50u) refuse(who, "is not where the zip directory says");
    const auto local_name = reader.at<uint16_t>(member.local + 26),
               local_extra = reader.at<uint16_t>(member.local + 28);
    if (reader.at<uint16_t>(member.local + 8) != method || reader.text(member.local + 30, local_name) != file_name) {
      refuse(who, "is another one where the zip directory says");
    }
    member.begin = member.local + 30 + local_name + local_extra;
    reader.slice(member.begin, member.stored);
    if (!members.emplace(name, std::move(member)).second) refuse(who, "is there twice");
  }
  if (offset != directory.end) refuse(path, "has a damaged zip directory");

  // Members that share bytes would let a small file unpack to any size.
  std::vector<const Member*> order;
  for (const auto& [name, member] : members) order.push_back(&member);
  std::sort(order.begin(), order.end(), [](const Member* a, const Member* b) { return a->local < b->local; });
  uint64_t reached = 0;
  for (const Member* member : order) {
    if (member->local < reached) refuse(member->who, "overlaps another member");
    reached = member->begin + member->stored;
    if (reached > directory.begin) refuse(member->who, "overlaps the zip directory");
  }
  return members;
}

// The member's bytes, which must be as many as the directory says. Memory grows with what is inflated, not with what is
// claimed.
std::vector<uint8_t> inflate_exactly(const Member& member, std::span<const uint8_t> packed) {
  z_stream stream{};
  if (inflateInit2(&stream, -MAX_WBITS) != Z_OK) throw RunError("cannot start zlib: out of memory");  // no zlib header
  struct End {
    z_stream* stream;
    ~End() { inflateEnd(stream); }
  } end{&stream};

  std::vector<uint8_t> out;
  out.reserve(member.size +
              1);  // one byte more, to see an overrun; the system gives memory only where data are written
  std::size_t filled = 0, used = 0;
  while (true) {
    if (filled == out.size()) {
      if (filled > member.size) refuse(member.who, "unpacks to more bytes than the zip directory says");
      out.resize(std::min<std::size_t>(member.size + 1, filled + kMemberChunk));
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
      refuse(member.who, std::string("is damaged: ") + (stream.msg ? stream.msg : "bad deflated data"));
    }
    if (used == packed.size() && stream.avail_out > 0)
      refuse(member.who, "is damaged: its deflated data end too early");
  }
  if (filled != member.size || used != packed.size()) {
    refuse(member.who, "unpacks " + std::to_string(used) + " bytes to " + std::to_string(filled) +
                           "; the zip directory says " + std::to_string(packed.size()) + " to " +
                           std::to_string(member.size));
  }
  out.resize(filled);
  return out;
}

// Numbers of one width, one after the other.
template <class T, class... Values>
std::string little(Values... values) {
  std::string bytes;
  for (const T value : {static_cast<T>(values)...}) bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
  return bytes;
}

}  // namespace

std::map<std::string, Tensor> load_npz(const std::filesystem::path& path, uint64_t most_bytes) {
  const std::vector<uint8_t> bytes = read_file(path);
  // read_file() unpacks gzip and xz; an archive that is packed once more could grow to any size.
  std::error_code error;
  const uint64_t there = std::filesystem::file_size(path, error);
  if (!error && there != bytes.size()) refuse(path.string(), "is an .npz archive that is packed by gzip or xz");
  std::map<std::string, Tensor> arrays;
  for (const auto& [name, member] : read_directory(path.string(), bytes, most_bytes)) {
    const std::span<const uint8_t> stored = std::span(bytes).subspan(member.begin, member.stored);
    std::vector<uint8_t> content =
        member.deflated ? inflate_exactly(member, stored) : std::vector<uint8_t>(stored.begin(), stored.end());
    if (crc32_z(0, content.data(), content.size()) != member.crc)
      refuse(member.who, "is damaged: its checksum is wrong");
    arrays.emplace(name, npy::parse(member.who, std::move(content)));
  }
  return arrays;
}

void save_npz(const std::filesystem::path& path, const std::map<std::string, Tensor>& arrays) {
  if (arrays.size() > 0xFFFE) refuse(path.string(), "would have more than 65534 arrays");
  std::string bytes, directory;
  for (const auto& [name, tensor] : arrays) {
    const std::string who = path.string() + ": array '" + printable(name) + "'";
    if (name.empty() || name.size() > 1000 ||
        std::any_of(name.begin(), name.end(), [](unsigned char c) { return c < 0x21 || c > 0x7E || c == '/'; })) {
      refuse(who, "has a name that is not 1 to 1000 visible characters of ASCII, without '/'");
    }
    const std::string content = npy::format(who, tensor), file_name = name + ".npy";
    // Sizes that need zip64 are refused; the closing record must hold the sum as well.
    if (bytes.size() + content.size() + directory.size() > kNarrow32 - (uint64_t{1} << 16)) {
      refuse(who, "does not fit: an .npz is written up to 4 GB");
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
