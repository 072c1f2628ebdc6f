// Numeric comparisons for tests, and a notebook of results that lets two builds be compared.
//
//   EXPECT_TRUE(exact(got, want));                         bit for bit but that any NaN equals any NaN, and -0 equals 0
//   EXPECT_TRUE(close(got, reference, {.l2 = 1e-6}));      against a double-precision reference
//   EXPECT_TRUE(close(gradient, central_differences(x, 1e-2f, f), {.l2 = 1e-3}));
//   record("softmax_xent.loss", got);                      see below
#pragma once
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace baton::test {

template <class A, class B>
testing::AssertionResult exact(const std::vector<A>& got, const std::vector<B>& want) {
  if (got.size() != want.size())
    return testing::AssertionFailure() << got.size() << " elements, expected " << want.size();
  size_t wrong = 0, first = 0;
  for (size_t i = 0; i < got.size(); i++) {
    const bool same = got[i] == A(want[i]) || (got[i] != got[i] && want[i] != want[i]);
    if (!same && wrong++ == 0) first = i;
  }
  if (!wrong) return testing::AssertionSuccess();
  return testing::AssertionFailure() << wrong << " of " << got.size() << " elements differ, the first is [" << first
                                     << "]: " << +got[first] << ", expected " << +want[first];
}

// How far a result is from its reference. Everything is relative to the size of the reference as a whole, so elements
// that are small by cancellation do not count more than they matter.
struct Difference {
  double l2 = 0;     // |got - want| / |want|
  double worst = 0;  // max |got - want| / max |want|
  double bias = 0;   // |sum (got - want)| / sum |want|: errors that lean to one side
  size_t at = 0;     // of the worst element
  size_t nonfinite = 0;
  bool nonzero = false;  // both sides have an element that is not zero
};

template <class A, class B>
Difference difference(const std::vector<A>& got, const std::vector<B>& want) {
  Difference d;
  double error2 = 0, want2 = 0, lean = 0, want1 = 0, worst = 0, top = 0;
  bool got_any = false, want_any = false;
  for (size_t i = 0; i < got.size() && i < want.size(); i++) {
    const double g = double(got[i]), w = double(want[i]), e = g - w;
    if (!std::isfinite(g)) {
      if (d.nonfinite++ == 0) d.at = i;
      continue;
    }
    error2 += e * e, want2 += w * w, lean += e, want1 += std::abs(w);
    if (std::abs(e) > worst) worst = std::abs(e), d.at = d.nonfinite ? d.at : i;
    top = std::max(top, std::abs(w));
    got_any |= g != 0, want_any |= w != 0;
  }
  auto ratio = [](double a, double b) { return a == 0 ? 0 : b == 0 ? INFINITY : a / b; };
  d.l2 = ratio(std::sqrt(error2), std::sqrt(want2));
  d.worst = ratio(worst, top);
  d.bias = ratio(std::abs(lean), want1);
  d.nonzero = got_any && want_any;
  return d;
}

struct Tolerance {
  double l2 = 1e-6;
  double worst = 0;  // 0: ten times l2
  double bias = 0;   // 0: as l2
};

// All finite, not all zero, and within the tolerances.
template <class A, class B>
testing::AssertionResult close(const std::vector<A>& got, const std::vector<B>& want, Tolerance t = {}) {
  if (got.size() != want.size())
    return testing::AssertionFailure() << got.size() << " elements, expected " << want.size();
  const Difference d = difference(got, want);
  const double worst = t.worst ? t.worst : 10 * t.l2, bias = t.bias ? t.bias : t.l2;
  if (d.nonfinite)
    return testing::AssertionFailure() << d.nonfinite << " of " << got.size()
                                       << " elements are not finite, the first is [" << d.at << "], expected "
                                       << +want[d.at];
  if (!d.nonzero) return testing::AssertionFailure() << "all elements are zero";
  if (d.l2 <= t.l2 && d.worst <= worst && d.bias <= bias) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "relative L2 " << d.l2 << " (at most " << t.l2 << "), worst " << d.worst
                                     << " (at most " << worst << ") at [" << d.at << "]: " << +got[d.at]
                                     << ", expected " << +want[d.at] << "; bias " << d.bias << " (at most " << bias
                                     << ")";
}

// df/dx by central differences, one element at a time; f takes a vector<float> and returns a double.
template <class F>
std::vector<double> central_differences(std::vector<float> x, float step, F f) {
  std::vector<double> slope(x.size());
  for (size_t i = 0; i < x.size(); i++) {
    const float at = x[i], high = at + step, low = at - step;
    x[i] = high;
    const double above = f(x);
    x[i] = low;
    const double below = f(x);
    x[i] = at;
    slope[i] = (above - below) / (double(high) - double(low));
  }
  return slope;
}

// With BATON_RECORD=FILE, appends a named result to FILE; tests/kernels/compare_records compares two such files,
// written by two builds. The tolerance says how near they must be: max |a - b| <= tolerance max |a|; 0 means bit for
// bit.
inline void record(const std::string& name, const std::vector<float>& values, float tolerance = 1e-6f) {
  static const char* const path = std::getenv("BATON_RECORD");
  if (!path) return;
  std::FILE* file = std::fopen(path, "ab");
  if (!file) {
    ADD_FAILURE() << "cannot write " << path;
    return;
  }
  const uint32_t length = uint32_t(name.size());
  const uint64_t count = values.size();
  std::fwrite(&length, sizeof length, 1, file);
  std::fwrite(name.data(), 1, length, file);
  std::fwrite(&tolerance, sizeof tolerance, 1, file);
  std::fwrite(&count, sizeof count, 1, file);
  std::fwrite(values.data(), sizeof(float), count, file);
  if (std::fclose(file) != 0) ADD_FAILURE() << "cannot write " << path;
}

}  // namespace baton::test
