// A fat binary is a header of 16 bytes (magic, version, header size, bytes that follow) and entries one after the
// other, each with a head of its own: kind (1 PTX, 2 machine code), the head's size, and the size of what follows.
#include "tests/ptx/fat_binary.h"

#include <cstdint>
#include <cstring>

#include "tests/ptx/fault.h"

namespace ptx {

namespace {

template <class T>
T read_at(const char* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

}  // namespace

std::string_view find_ptx(const void* wrapper) {
  struct Wrapper {
    int magic, version;
    const char* data;
    void* file;
  };
  constexpr int wrapper_magic = 0x466243b1;
  constexpr uint32_t data_magic = 0xba55ed50;
  const Wrapper* w = static_cast<const Wrapper*>(wrapper);
  if (w->magic != wrapper_magic || read_at<uint32_t>(w->data) != data_magic)
    throw Fault(FaultKind::unsupported, "the program's fat binary has a form that is not known");
  const char* entry = w->data + read_at<uint16_t>(w->data + 6);
  const char* end = entry + read_at<uint64_t>(w->data + 8);
  bool compressed = false;
  while (entry < end) {
    const uint16_t kind = read_at<uint16_t>(entry);
    const uint32_t head = read_at<uint32_t>(entry + 4);
    const uint64_t size = read_at<uint64_t>(entry + 8);
    if (kind == 1) {
      const std::string_view text(entry + head, strnlen(entry + head, size));
      if (text.find(".version") != std::string_view::npos) return text;
      compressed = true;
    }
    entry += head + size;
  }
  throw Fault(FaultKind::unsupported, compressed ? "the program's PTX is compressed: compile with --compress-mode=none"
                                                 : "the program holds no PTX: compile with an architecture such as 90");
}

}  // namespace ptx
