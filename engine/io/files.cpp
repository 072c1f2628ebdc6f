#include "engine/io/files.h"

#include <fcntl.h>
#include <lzma.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <string>
#include <system_error>
#include <utility>

#include "engine/error.h"

namespace baton {
namespace {

namespace fs = std::filesystem;
using Bytes = std::vector<uint8_t>;

constexpr std::array<uint8_t, 2> kGzipMagic{0x1f, 0x8b};
constexpr std::array<uint8_t, 6> kXzMagic{0xfd, '7', 'z', 'X', 'Z', 0x00};
constexpr size_t kChunk = size_t{1} << 16;               // a larger one would cost small files a system call more
constexpr uint64_t kMostBytes = uint64_t{1} << 48;       // keeps sums of sizes within 64 bits
constexpr uint64_t kMostXzMemory = uint64_t{256} << 20;  // "xz -9" needs 65 MB; a header may claim a dictionary of 4 GB

// The system's text for an errno value, without the shared buffer of strerror.
std::string reason(int error) { return std::error_code(error, std::generic_category()).message(); }

// Owns a descriptor. close() is called by hand where its result matters, as after writing.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }
  bool close() { return ::close(std::exchange(fd_, -1)) == 0; }

 private:
  int fd_;
};

[[noreturn]] void throw_too_long(const fs::path& path, uint64_t most) {
  throw InputError(path.string() + " has more than " + std::to_string(most) + " bytes, the most that are read");
}

// Doubles the size of the buffer, so that big files are not copied for every chunk. It never exceeds the limit by more
// than one byte, which shows that the file is too long.
void grow(Bytes& bytes, const fs::path& path, uint64_t most, uint64_t slack = 0) {
  const size_t filled = bytes.size();
  if (filled > most + slack) throw_too_long(path, most);
  bytes.resize(std::min(filled + std::max(kChunk, filled), most + slack + 1));
}

Bytes read_plain(const fs::path& path, uint64_t most) {
  // Packing makes incompressible content larger, but by less than this; content that is not packed is checked again.
  const uint64_t slack = most / 64 + (uint64_t{1} << 20);
  Descriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.get() < 0) throw InputError("cannot open " + path.string() + ": " + reason(errno));
  struct stat info {};
  if (::fstat(file.get(), &info) != 0) throw InputError("cannot read " + path.string() + ": " + reason(errno));
  const uint64_t size = S_ISREG(info.st_mode) ? static_cast<uint64_t>(info.st_size) : 0;
  if (size > most + slack) throw_too_long(path, most);
  // One byte more than the size, so that the read that finds the end needs no second buffer.
  Bytes bytes(size != 0 ? size + 1 : 0);
  size_t filled = 0;
  while (true) {
    if (filled == bytes.size()) grow(bytes, path, most, slack);
    const ssize_t got = ::read(file.get(), bytes.data() + filled, bytes.size() - filled);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw InputError("cannot read " + path.string() + ": " + reason(errno));
    if (got == 0) break;
    filled += static_cast<size_t>(got);
  }
  bytes.resize(filled);
  return bytes;
}

[[noreturn]] void throw_packed(const fs::path& path, const char* format, const std::string& what) {
  throw InputError("cannot unpack " + path.string() + " (" + format + "): " + what);
}

Bytes unpack_gzip(const fs::path& path, const Bytes& packed, uint64_t most) {
  z_stream stream{};
  constexpr int kGzipOnly = 16;  // added to the window bits: expect a gzip header and check its CRC
  if (inflateInit2(&stream, MAX_WBITS + kGzipOnly) != Z_OK) throw RunError("cannot start zlib: out of memory");
  struct End {
    z_stream* stream;
    ~End() { inflateEnd(stream); }
  } end{&stream};

  Bytes out;
  size_t filled = 0, used = 0;
  while (true) {
    if (filled == out.size()) grow(out, path, most);
    // avail_in and avail_out are 32 bits wide, and a file may be longer.
    const uInt give = static_cast<uInt>(std::min<size_t>(packed.size() - used, size_t{1} << 30));
    const uInt room = static_cast<uInt>(std::min<size_t>(out.size() - filled, size_t{1} << 30));
    stream.next_in = const_cast<Bytef*>(packed.data() + used);
    stream.avail_in = give;
    stream.next_out = out.data() + filled;
    stream.avail_out = room;
    const int status = inflate(&stream, Z_NO_FLUSH);
    used += give - stream.avail_in;
    filled += room - stream.avail_out;
    if (status == Z_STREAM_END) {
      if (used == packed.size()) break;
      // gzip files may be joined end to end; anything else behind a member is damage.
      if (packed[used] != kGzipMagic[0]) throw_packed(path, "gzip", "unexpected bytes after the end");
      inflateReset(&stream);
    } else if (status == Z_MEM_ERROR) {
      throw RunError("cannot unpack " + path.string() + ": out of memory");
    } else if (status != Z_OK && status != Z_BUF_ERROR) {
      throw_packed(path, "gzip", std::string("corrupt: ") + (stream.msg ? stream.msg : "bad data"));
    } else if (used == packed.size() && stream.avail_out > 0) {
      throw_packed(path, "gzip", "truncated: the file ends too early");
    }
  }
  out.resize(filled);
  return out;
}

Bytes unpack_xz(const fs::path& path, const Bytes& packed, uint64_t most) {
  lzma_stream stream = LZMA_STREAM_INIT;
  if (lzma_stream_decoder(&stream, kMostXzMemory, LZMA_CONCATENATED) != LZMA_OK) {
    throw RunError("cannot start liblzma: out of memory");
  }
  struct End {
    lzma_stream* stream;
    ~End() { lzma_end(stream); }
  } end{&stream};

  Bytes out;
  size_t filled = 0;
  stream.next_in = packed.data();
  stream.avail_in = packed.size();
  while (true) {
    if (filled == out.size()) grow(out, path, most);
    stream.next_out = out.data() + filled;
    stream.avail_out = out.size() - filled;
    const lzma_ret status = lzma_code(&stream, LZMA_FINISH);
    filled = out.size() - stream.avail_out;
    if (status == LZMA_STREAM_END) break;
    if (status == LZMA_MEM_ERROR) throw RunError("cannot unpack " + path.string() + ": out of memory");
    // There is always space for output here, so no progress means that input is missing.
    if (status == LZMA_BUF_ERROR) throw_packed(path, "xz", "truncated: the file ends too early");
    if (status == LZMA_MEMLIMIT_ERROR) {
      throw_packed(path, "xz",
                   "it asks for " + std::to_string((lzma_memusage(&stream) >> 20) + 1) + " MB of memory; at most " +
                       std::to_string(kMostXzMemory >> 20) + " MB are given");
    }
    if (status != LZMA_OK) throw_packed(path, "xz", "corrupt: liblzma error " + std::to_string(status));
  }
  out.resize(filled);
  return out;
}

bool starts_with(const Bytes& bytes, std::span<const uint8_t> magic) {
  return bytes.size() >= magic.size() && std::equal(magic.begin(), magic.end(), bytes.begin());
}

// Writes everything, or returns the errno of what failed.
int write_all(int fd, std::span<const uint8_t> bytes) {
  while (!bytes.empty()) {
    const ssize_t wrote = ::write(fd, bytes.data(), std::min(bytes.size(), size_t{1} << 30));
    if (wrote < 0 && errno == EINTR) continue;
    if (wrote < 0) return errno;
    if (wrote == 0) return EIO;
    bytes = bytes.subspan(static_cast<size_t>(wrote));
  }
  return 0;
}

[[noreturn]] void throw_write(const fs::path& path, int error) {
  throw RunError("cannot write " + path.string() + ": " + reason(error));
}

// For pipes and devices, which a rename would replace by a file.
void write_straight(const fs::path& path, std::span<const uint8_t> bytes) {
  Descriptor file(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
  if (file.get() < 0) throw_write(path, errno);
  if (const int error = write_all(file.get(), bytes)) throw_write(path, error);
  if (!file.close()) throw_write(path, errno);
}

// Removes the temporary file unless the rename has taken it.
struct Temporary {
  fs::path path;
  bool kept = false;
  ~Temporary() {
    if (!kept) ::unlink(path.c_str());
  }
};

// Makes a rename survive a power cut. Some file systems cannot flush a folder; the content is safe already.
void flush_folder(const fs::path& file) {
  const fs::path folder = file.has_parent_path() ? file.parent_path() : fs::path(".");
  Descriptor descriptor(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (descriptor.get() >= 0) ::fsync(descriptor.get());
}

}  // namespace

Bytes read_file(const fs::path& path, uint64_t most_bytes) {
  most_bytes = std::min(most_bytes, kMostBytes);
  Bytes bytes = read_plain(path, most_bytes);
  if (starts_with(bytes, kGzipMagic)) bytes = unpack_gzip(path, bytes, most_bytes);
  else if (starts_with(bytes, kXzMagic)) bytes = unpack_xz(path, bytes, most_bytes);
  if (bytes.size() > most_bytes) throw_too_long(path, most_bytes);
  return bytes;
}

void write_file_atomically(const fs::path& path, std::span<const uint8_t> bytes) {
  struct stat old {};
  const bool exists = ::stat(path.c_str(), &old) == 0;
  if (exists && S_ISDIR(old.st_mode)) throw_write(path, EISDIR);
  if (exists && !S_ISREG(old.st_mode)) return write_straight(path, bytes);

  std::error_code ignored;
  const fs::path target = exists && fs::is_symlink(path, ignored) ? fs::canonical(path, ignored) : path;
  Temporary temporary{target.string() + ".tmp-" + std::to_string(::getpid())};
  Descriptor file(::open(temporary.path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0666));
  if (file.get() < 0) {
    const int error = errno;
    temporary.kept = true;  // there is no file of ours to remove
    throw_write(path, error);
  }
  if (exists) (void)!::fchmod(file.get(), old.st_mode & 07777);
  if (const int error = write_all(file.get(), bytes)) throw_write(path, error);
  // A full disk may show only here, when the system has buffered the writes.
  if (::fsync(file.get()) != 0) throw_write(path, errno);
  if (!file.close()) throw_write(path, errno);
  if (::rename(temporary.path.c_str(), target.c_str()) != 0) throw_write(path, errno);
  temporary.kept = true;
  flush_folder(target);
}

void write_file_atomically(const fs::path& path, std::string_view text) {
  write_file_atomically(path, std::span(reinterpret_cast<const uint8_t*>(text.data()), text.size()));
}

void remove_leftovers(const fs::path& path) {
  const std::string prefix = path.filename().string() + ".tmp-";
  std::error_code error;
  std::vector<fs::path> found;
  for (fs::directory_iterator at(path.has_parent_path() ? path.parent_path() : ".", error), end; !error && at != end;
       at.increment(error)) {
    const std::string name = at->path().filename().string();
    if (name.rfind(prefix, 0) != 0 || name.size() > prefix.size() + 10) continue;
    if (name.find_first_not_of("0123456789", prefix.size()) != std::string::npos || name.size() == prefix.size())
      continue;
    const long pid = std::stol(name.substr(prefix.size()));
    if (pid > 0 && pid < INT32_MAX && ::kill(static_cast<pid_t>(pid), 0) != 0 && errno == ESRCH)
      found.push_back(at->path());
  }
  for (const fs::path& leftover : found) fs::remove(leftover, error);
}

void make_directories(const fs::path& path) {
  std::error_code error;
  fs::create_directories(path, error);
  if (!error && fs::is_directory(path, error)) return;
  if (!error || error == std::errc::file_exists || error == std::errc::not_a_directory) {
    throw InputError("cannot make the folder " + path.string() + ": a file is in the way");
  }
  throw RunError("cannot make the folder " + path.string() + ": " + error.message());
}

fs::path in_build_folder(const fs::path& name) {
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error);
  if (error) throw RunError("/proc/self/exe: " + error.message());
  return program.parent_path().parent_path() / name;
}

}  // namespace baton
