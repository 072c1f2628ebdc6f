// A fuzz target is a file with one FUZZ(name) { ... }, which reads the bytes `input`. With BATON_LIBFUZZER it is a
// libFuzzer program's entry; without, it joins the table that corpus_test.cpp runs through.
//
// A reader may give up with InputError or RunError, and its message is one line. Everything else that leaves it,
// std::bad_alloc too, ends the program.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "engine/error.h"

#define FUZZ_CHECK(condition)                                                     \
  do {                                                                            \
    if (!(condition)) baton::fuzz::failed(__FILE__, __LINE__, "not " #condition); \
  } while (false)

namespace baton::fuzz {

namespace fs = std::filesystem;
using Bytes = std::vector<uint8_t>;
using Input = std::span<const uint8_t>;
using Target = void (*)(Input);

[[noreturn]] inline void failed(const char* file, int line, const std::string& what) {
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
  std::abort();
}

// Whether the work ends without one of the two errors that it may throw.
template <class Work>
bool succeeds(const Work& work) {
  const auto check_message = [](const std::string& text) {
    FUZZ_CHECK(!text.empty());
    FUZZ_CHECK(std::none_of(text.begin(), text.end(), [](unsigned char c) { return c < 0x20; }));
  };
  try {
    work();
    return true;
  } catch (const InputError& error) {
    check_message(error.what());
  } catch (const RunError& error) {
    check_message(error.what());
  }
  return false;
}

// Cuts an input into pieces; behind its end all are empty.
class Pieces {
 public:
  explicit Pieces(Input input) : rest_(input) {}
  bool empty() const { return rest_.empty(); }
  Input take(size_t length) {
    const Input piece = rest_.first(std::min(length, rest_.size()));
    rest_ = rest_.subspan(piece.size());
    return piece;
  }
  uint8_t byte() {
    const Input piece = take(1);
    return piece.empty() ? 0 : piece[0];
  }
  // A length of two bytes, the low one first, and as many bytes as that.
  Input sized() {
    const size_t low = byte(), high = byte();
    return take(low | high << 8);
  }
  Input rest() { return take(rest_.size()); }

 private:
  Input rest_;
};

// A file in memory, which readers open by its path.
class MemoryFile {
 public:
  explicit MemoryFile(Input bytes) : fd_(::memfd_create("input", MFD_CLOEXEC)) {
    FUZZ_CHECK(fd_ >= 0);
    while (!bytes.empty()) {
      const ssize_t wrote = ::write(fd_, bytes.data(), bytes.size());
      FUZZ_CHECK(wrote > 0);
      bytes = bytes.subspan(static_cast<size_t>(wrote));
    }
  }
  ~MemoryFile() { ::close(fd_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  fs::path path() const { return "/proc/self/fd/" + std::to_string(fd_); }

 private:
  int fd_;
};

// The program's folder for what needs a name, in memory where the system has such a place; it goes with the program,
// or, when that crashes, with what set BATON_FUZZ_SCRATCH.
inline const fs::path& scratch() {
  struct Folder {
    fs::path path;
    Folder() {
      const char* asked = std::getenv("BATON_FUZZ_SCRATCH");
      std::error_code ignored;
      const fs::path place = asked && *asked                         ? fs::path(asked)
                             : fs::is_directory("/dev/shm", ignored) ? fs::path("/dev/shm")
                                                                     : fs::temp_directory_path();
      std::string name = (place / "baton-fuzz-XXXXXX").string();
      FUZZ_CHECK(::mkdtemp(name.data()));
      path = name;
    }
    ~Folder() {
      std::error_code ignored;
      fs::remove_all(path, ignored);
    }
  };
  static const Folder folder;
  return folder.path;
}

// Whether each target took its last input: what it calls first did not refuse it.
inline bool run(Target target, Input input) {
  return succeeds([&] { target(input); });
}

inline std::map<std::string, Target>& targets() {
  static std::map<std::string, Target> table;
  return table;
}

struct Registered {
  Registered(const char* name, Target target) { targets()[name] = target; }
};

}  // namespace baton::fuzz

#ifdef BATON_LIBFUZZER
#define FUZZ_ENTRY(name)                                                    \
  extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) { \
    baton::fuzz::run(&fuzz_##name, {data, size});                           \
    return 0;                                                               \
  }
#else
#define FUZZ_ENTRY(name) static const baton::fuzz::Registered registered_##name(#name, &fuzz_##name);
#endif

#define FUZZ(name)                                   \
  static void fuzz_##name(baton::fuzz::Input input); \
  FUZZ_ENTRY(name)                                   \
  static void fuzz_##name(baton::fuzz::Input input)
