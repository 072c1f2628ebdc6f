// The safetensors format: 8 bytes of little-endian header length, a JSON header, then the tensors' raw bytes, without
// gaps. Checkpoints are written in it, and networks trained elsewhere are read from it.
#pragma once
#include <bit>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace baton {

static_assert(std::endian::native == std::endian::little, "safetensors holds little-endian numbers");

// "F32" for float, and so on. F16 and BF16 have no C++ type here: they are read, through Tensor::as<float>(), not made.
template <class T>
constexpr std::string_view safetensors_dtype() {
  if constexpr (std::is_same_v<T, double>) return "F64";
  else if constexpr (std::is_same_v<T, float>) return "F32";
  else if constexpr (std::is_same_v<T, int64_t>) return "I64";
  else if constexpr (std::is_same_v<T, int32_t>) return "I32";
  else if constexpr (std::is_same_v<T, uint64_t>) return "U64";
  else if constexpr (std::is_same_v<T, uint32_t>) return "U32";
  else if constexpr (std::is_same_v<T, uint8_t>) return "U8";
  else static_assert(!sizeof(T), "no safetensors dtype for this type");
}

// Exact: every half and every bfloat16 is a float. NaNs stay NaNs.
float float_of_half(uint16_t bits);
float float_of_bfloat16(uint16_t bits);

struct Tensor {
  std::string dtype;  // F64 F32 F16 BF16 I64 I32 U64 U32 U8
  std::vector<int64_t> shape;
  std::vector<uint8_t> bytes;
  std::string origin = {};  // "FILE: tensor 'NAME'" where it was loaded, for messages; never written

  // The product of the shape: 1 for a scalar (rank 0).
  int64_t size() const;

  // Throws InputError if the shape does not hold exactly the values given.
  template <class T>
  static Tensor of(std::span<const T> values, std::vector<int64_t> shape) {
    Tensor tensor{std::string(safetensors_dtype<T>()), std::move(shape), std::vector<uint8_t>(values.size_bytes()), {}};
    if (!values.empty()) std::memcpy(tensor.bytes.data(), values.data(), values.size_bytes());
    tensor.check();
    return tensor;
  }

  // The values, bit for bit. float is also given for F16 and BF16, and double for F32, F16 and BF16, because these
  // lose nothing; any other pair of types throws InputError, naming the tensor, its dtype and the one asked for.
  template <class T>
  std::vector<T> as() const {
    check();
    if constexpr (std::is_floating_point_v<T>) {
      if (dtype == "F16" || dtype == "BF16" || (dtype == "F32" && sizeof(T) > sizeof(float))) {
        const std::vector<float> values = widened();
        return std::vector<T>(values.begin(), values.end());
      }
    }
    expect_dtype(safetensors_dtype<T>());
    std::vector<T> values(bytes.size() / sizeof(T));
    if (!bytes.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
    return values;
  }

  // Throws InputError for an unknown dtype, a negative extent, or a byte length that is not shape x dtype.
  void check() const;

 private:
  std::vector<float> widened() const;
  void expect_dtype(std::string_view wanted) const;
};

struct TensorFile {
  std::map<std::string, std::string> metadata;
  std::map<std::string, Tensor> tensors;
  std::string path;  // where it was loaded, for messages; empty for one made here

  bool has(const std::string& name) const { return tensors.count(name) != 0; }

  // Throws InputError if there is no such tensor; the message names the file and the tensors that it has.
  const Tensor& at(const std::string& name) const;

  // The same, and throws InputError for another shape than this; the message has both.
  const Tensor& at(const std::string& name, const std::vector<int64_t>& shape) const;
};

// Writes the file atomically. The header is padded with blanks, so that the data begin at a multiple of 8, and wider
// dtypes come first, so that every tensor is aligned to its own type in a mapped file. Throws InputError for a tensor
// that does not check(), or a name that the format does not allow; RunError if the file cannot be written.
void save_safetensors(const std::filesystem::path& path, const TensorFile& file);

// Throws InputError, which names the file and the tensor, for a file that does not exist, is cut short, or breaks the
// format in any way. Every byte of a file that loads belongs to its header or to a tensor of the header.
TensorFile load_safetensors(const std::filesystem::path& path);

// "[20, 1, 5, 5]"
std::string shape_text(std::span<const int64_t> shape);

}  // namespace baton
