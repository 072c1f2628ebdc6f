// The golden files: NumPy .npz archives (uncompressed zips of .npy), and the fingerprints that stand for big tensors.
#pragma once
#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace baton::test {

// Reads the whole archive once and checks it. Stored (not deflated) entries, .npy versions 1 to 3, C order, little
// endian; dtypes f4 f8 i1 u1 i4 i8 b1. Anything else throws InputError, which names the file and the array.
class Npz {
 public:
  explicit Npz(const std::filesystem::path& path);

  bool has(const std::string& name) const { return arrays_.count(name) != 0; }
  std::vector<std::string> names() const;

  // These throw InputError if there is no such array.
  std::vector<int64_t> shape(const std::string& name) const;
  std::vector<double> f64(const std::string& name) const;   // i8 beyond 2^53 is rounded
  std::vector<float> f32(const std::string& name) const;    // rounded to nearest
  std::vector<int64_t> i64(const std::string& name) const;  // integers and bools only
  std::string text(const std::string& name) const;          // of uint8, such as meta_json
  double scalar(const std::string& name) const;             // exactly one element, of any shape

 private:
  struct Array {
    std::string dtype;  // as in .npy, without the byte order: "f8"
    std::vector<int64_t> shape;
    std::size_t offset, count;  // into bytes_
  };

  const Array& at(const std::string& name) const;
  Array parse_npy(const std::string& who, std::size_t begin, std::size_t end) const;
  template <class T>
  std::vector<T> convert(const std::string& name) const;

  std::string path_;
  std::vector<uint8_t> bytes_;
  std::map<std::string, Array> arrays_;
};

// [sum, l2 norm, max abs, 8 sign projections] over the flat C-order index; one wrong entry anywhere moves the
// projections. Compare entries 0 and 3..10 with a tolerance scaled by the l2 norm: they cancel, and may be small.
std::array<double, 11> fingerprint(std::span<const double> values);

}  // namespace baton::test
