// What npy.cpp and npz.cpp share, and nobody else includes.
#pragma once
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "engine/error.h"
#include "engine/io/files.h"
#include "engine/io/safetensors.h"

namespace baton::npy {

// A text out of a file, made fit for a message of one line.
std::string printable(std::string_view text);

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
    if (offset > bytes_.size() || length > bytes_.size() - offset) refuse(who_, "is cut short");
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

// The array of a whole .npy file, whose bytes are taken over. `who` is named in messages.
Tensor parse(const std::string& who, std::vector<uint8_t> bytes);

// The bytes of a .npy file.
std::string format(const std::string& who, const Tensor& tensor);

}  // namespace baton::npy
