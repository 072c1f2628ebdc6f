// The golden files: NumPy .npz archives, and the fingerprints that stand for big tensors.
#pragma once
#include <array>
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "engine/io/npy.h"
#include "tests/support/test_data.h"

namespace baton::test {

// Reads the whole archive once (load_npz), and gives its arrays as the numbers that a test wants. What is not there, or
// is of another kind, throws InputError, which names the file and the array.
class Npz {
 public:
  explicit Npz(const std::filesystem::path& path) : path_(path.string()), arrays_(load_npz(path)) {}

  bool has(const std::string& name) const { return arrays_.count(name) != 0; }
  std::vector<std::string> names() const;

  // These throw InputError if there is no such array.
  std::vector<int64_t> shape(const std::string& name) const { return at(name).shape; }
  std::vector<double> f64(const std::string& name) const;   // i8 and u8 beyond 2^53 are rounded
  std::vector<float> f32(const std::string& name) const;    // rounded to nearest
  std::vector<int64_t> i64(const std::string& name) const;  // integers and bools only, but u8
  std::string text(const std::string& name) const;          // of uint8, such as meta_json
  double scalar(const std::string& name) const;             // exactly one element, of any shape

 private:
  const Tensor& at(const std::string& name) const;
  template <class T>
  std::vector<T> convert(const std::string& name) const;

  std::string path_;
  std::map<std::string, Tensor> arrays_;
};

// [sum, l2 norm, max abs, 8 sign projections] over the flat C-order index; one wrong entry anywhere moves the
// projections. Compare entries 0 and 3..10 with a tolerance scaled by the l2 norm: they cancel, and may be small.
std::array<double, 11> fingerprint(std::span<const double> values);

}  // namespace baton::test
