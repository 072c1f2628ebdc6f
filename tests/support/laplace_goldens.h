// What the tests of the last layer share: the golden files of last-layer Laplace, and the digits that they are about.
#pragma once
#include <string>
#include <vector>

#include "tests/support/compare.h"
#include "tests/support/npz.h"

namespace baton::test {

inline Npz golden(const std::string& name) { return Npz(golden_file("laplace/" + name)); }

// Handwritten digits: 64 pixels from 0 to 1, and a feature that is always 1.
constexpr int digit_dim = 65, digit_classes = 10;
struct DigitRows {
  std::vector<double> x;  // [n][digit_dim]
  std::vector<int32_t> labels;
};
inline DigitRows digit_rows(const std::vector<int64_t>& index) {
  static const Npz split = golden("digits_split");
  static const std::vector<int64_t> pixels = split.i64("X_uint8"), labels = split.i64("y");
  DigitRows rows;
  for (int64_t i : index) {
    for (int d = 0; d < 64; d++) rows.x.push_back(double(pixels[size_t(i) * 64 + size_t(d)]) / 16);
    rows.x.push_back(1);
    rows.labels.push_back(int32_t(labels[size_t(i)]));
  }
  return rows;
}
inline std::vector<int64_t> digit_split(const std::string& name) { return golden("digits_split").i64(name); }

// max |got - want| <= tolerance max |want|, and all finite.
inline testing::AssertionResult within(const std::vector<double>& got, const std::vector<double>& want,
                                       double tolerance) {
  if (got.size() != want.size())
    return testing::AssertionFailure() << got.size() << " elements, expected " << want.size();
  const Difference d = difference(got, want);
  if (d.nonfinite) return testing::AssertionFailure() << d.nonfinite << " elements are not finite";
  if (d.worst <= tolerance) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "worst " << d.worst << " (at most " << tolerance << ") at [" << d.at
                                     << "]: " << got[d.at] << ", expected " << want[d.at];
}

}  // namespace baton::test
