// What the tests of the last layer share: golden files, samples on the host and on the device, and expected errors.
#pragma once
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "engine/io/dataset.h"
#include "tests/support/buffers.h"
#include "tests/support/compare.h"
#include "tests/support/device.h"
#include "tests/support/npz.h"
#include "trainers/last_layer/rows.h"

namespace baton::test {

using Doubles = std::vector<double>;

inline Npz golden(const std::string& name) { return Npz(golden_file("laplace/" + name)); }

struct Samples {
  Doubles x;  // [count][dim]
  std::vector<int32_t> labels;
  int dim = 0, classes = 0;

  int count() const { return int(labels.size()); }
  Doubles row(int i) const { return {x.begin() + size_t(i) * dim, x.begin() + size_t(i + 1) * dim}; }
  void append(const Doubles& features, int label) {
    x.insert(x.end(), features.begin(), features.end());
    labels.push_back(label);
  }
  Samples slice(int first, int n) const {
    Samples s{{}, {}, dim, classes};
    for (int i = first; i < first + n; i++) s.append(row(i), labels[size_t(i)]);
    return s;
  }
  Samples reversed() const {
    Samples s{{}, {}, dim, classes};
    for (int i = count(); i-- > 0;) s.append(row(i), labels[size_t(i)]);
    return s;
  }
  Samples scaled(double factor) const {
    Samples s = *this;
    for (double& v : s.x) v *= factor;
    return s;
  }
  Samples operator+(const Samples& more) const {
    Samples s = *this;
    for (int i = 0; i < more.count(); i++) s.append(more.row(i), more.labels[size_t(i)]);
    return s;
  }
};

inline Samples tiny_samples() {
  const Npz z = golden("tiny_softmax");
  Samples s{z.f64("Phi"), {}, 3, 3};
  for (int64_t y : z.i64("y")) s.labels.push_back(int32_t(y));
  return s;
}

// Handwritten digits: 64 pixels from 0 to 1, and a feature that is always 1.
constexpr int digit_dim = 65, digit_classes = 10;
inline Samples digits(const std::vector<int64_t>& index) {
  static const Npz split = golden("digits_split");
  static const std::vector<int64_t> pixels = split.i64("X_uint8"), labels = split.i64("y");
  Samples s{{}, {}, digit_dim, digit_classes};
  for (int64_t i : index) {
    for (int d = 0; d < 64; d++) s.x.push_back(double(pixels[size_t(i) * 64 + size_t(d)]) / 16);
    s.x.push_back(1);
    s.labels.push_back(int32_t(labels[size_t(i)]));
  }
  return s;
}
inline Samples digits(const std::string& split) { return digits(golden("digits_split").i64(split)); }

// Features and labels that have nothing to do with each other.
inline Samples normal_samples(int n, int dim, int classes, uint64_t seed) {
  SplitMix64 random(seed);
  Samples s{{}, {}, dim, classes};
  for (int i = 0; i < n; i++) {
    Doubles row;
    for (int k = 0; k < dim; k++) row.push_back(random.normal());
    s.append(row, int(random.below(uint64_t(classes))));
  }
  return s;
}

// Samples on the device.
template <class Real = double>
class Rows {
 public:
  explicit Rows(const Samples& s)
      : x_(memory_, std::vector<Real>(s.x.begin(), s.x.end())), labels_(memory_, s.labels), dim_(s.dim) {}
  operator FeatureRows<Real>() { return all(); }
  FeatureRows<Real> all() { return part(0, count()); }
  FeatureRows<Real> part(int first, int n) { return {x_ + size_t(first) * dim_, labels_ + first, n, dim_}; }
  FeatureRows<Real> row(int i) { return part(i, 1); }
  Real* x() { return x_; }
  int count() const { return int(labels_.size()); }
  Memory& memory() { return memory_; }
  Device& device() { return memory_.device(); }

 private:
  Memory memory_;
  Buffer<Real> x_;
  Buffer<int32_t> labels_;
  int dim_;
};

inline Doubles softmax(Doubles f) {
  const double top = *std::max_element(f.begin(), f.end());
  double sum = 0;
  for (double& v : f) sum += v = std::exp(v - top);
  for (double& v : f) v /= sum;
  return f;
}

// max |got - want| <= tolerance max |want|, and all finite.
inline testing::AssertionResult within(const Doubles& got, const Doubles& want, double tolerance) {
  if (got.size() != want.size())
    return testing::AssertionFailure() << got.size() << " elements, expected " << want.size();
  const Difference d = difference(got, want);
  if (d.nonfinite) return testing::AssertionFailure() << d.nonfinite << " elements are not finite";
  if (d.worst <= tolerance) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "worst " << d.worst << " (at most " << tolerance << ") at [" << d.at
                                     << "]: " << got[d.at] << ", expected " << want[d.at];
}

// f throws an E whose message contains the words.
template <class E, class F>
void expect_error(F f, const std::string& words) {
  try {
    f();
    ADD_FAILURE() << "no error, expected: " << words;
  } catch (const E& e) {
    EXPECT_NE(std::string(e.what()).find(words), std::string::npos) << e.what();
  }
}

}  // namespace baton::test
