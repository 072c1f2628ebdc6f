#include "tests/support/npz.h"

#include <cmath>

#include "engine/error.h"

namespace baton::test {

const Tensor& Npz::at(const std::string& name) const {
  const auto found = arrays_.find(name);
  if (found == arrays_.end()) throw InputError(path_ + " has no array '" + name + "'");
  return found->second;
}

std::vector<std::string> Npz::names() const {
  std::vector<std::string> names;
  for (const auto& [name, array] : arrays_) names.push_back(name);
  return names;
}

template <class T>
std::vector<T> Npz::convert(const std::string& name) const {
  const Tensor& array = at(name);
  const auto cast = [](const auto& values) {
    std::vector<T> cast(values.size());
    for (std::size_t i = 0; i < cast.size(); ++i) cast[i] = static_cast<T>(values[i]);
    return cast;
  };
  if (array.dtype == "F64") return cast(array.as<double>());
  if (array.dtype == "I64") return cast(array.as<int64_t>());
  if (array.dtype == "I32") return cast(array.as<int32_t>());
  if (array.dtype == "U64") return cast(array.as<uint64_t>());
  if (array.dtype == "U32") return cast(array.as<uint32_t>());
  if (array.dtype == "U8") return cast(array.as<uint8_t>());
  return cast(array.as<float>());
}

std::vector<double> Npz::f64(const std::string& name) const { return convert<double>(name); }
std::vector<float> Npz::f32(const std::string& name) const { return convert<float>(name); }

std::vector<int64_t> Npz::i64(const std::string& name) const {
  const Tensor& array = at(name);
  if (array.dtype.starts_with('F') || array.dtype == "U64") {
    throw InputError(array.origin + " holds " + array.dtype + "; expected integers");
  }
  return convert<int64_t>(name);
}

std::string Npz::text(const std::string& name) const {
  const std::vector<uint8_t> bytes = at(name).as<uint8_t>();
  return std::string(bytes.begin(), bytes.end());
}

double Npz::scalar(const std::string& name) const {
  const std::vector<double> values = f64(name);
  if (values.size() != 1) {
    throw InputError(at(name).origin + " has " + std::to_string(values.size()) + " elements; expected one");
  }
  return values[0];
}

std::array<double, 11> fingerprint(std::span<const double> values) {
  long double sum = 0, squares = 0, projections[8] = {};
  double most = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const double a = values[i];
    sum += a;
    squares += static_cast<long double>(a) * a;
    if (std::fabs(a) > most || std::isnan(a)) most = std::fabs(a);  // a NaN stays: nothing is greater than it
    for (uint32_t k = 0; k < 8; ++k) {
      uint32_t h = static_cast<uint32_t>(i) * 2654435761u + k * 40503u;
      h ^= h >> 16;
      h *= 0x85EBCA6Bu;
      h ^= h >> 13;
      h *= 0xC2B2AE35u;
      h ^= h >> 16;
      projections[k] += h & 1 ? -a : a;
    }
  }
  std::array<double, 11> print{static_cast<double>(sum), static_cast<double>(std::sqrt(squares)), most};
  for (int k = 0; k < 8; ++k) print[3 + k] = static_cast<double>(projections[k]);
  return print;
}

}  // namespace baton::test
