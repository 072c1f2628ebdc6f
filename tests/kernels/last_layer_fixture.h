// Random arrays, and small linear algebra in double.
#pragma once
#include "kernels/last_layer.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "tests/support/buffers.h"
#include "tests/support/compare.h"

namespace baton::test {
namespace {

template <class Real>
std::vector<Real> normals(size_t n, int seed, double sd = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0, sd);
  std::vector<Real> v(n);
  for (Real& x : v) x = Real(normal(random));
  return v;
}
inline std::vector<int32_t> labels_of(size_t n, int classes, int seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> v(n);
  for (int32_t& x : v) x = int32_t(random() % classes);
  return v;
}
template <class To, class From>
std::vector<To> as(const std::vector<From>& v) {
  return std::vector<To>(v.begin(), v.end());
}
template <class T>
std::vector<T> part(const std::vector<T>& v, size_t first, size_t count) {
  return std::vector<T>(v.begin() + first, v.begin() + first + count);
}
template <class Real>
constexpr double pick(double in_float, double in_double) {
  return sizeof(Real) == 4 ? in_float : in_double;
}
template <class Real>
constexpr const char* name_of_real = sizeof(Real) == 4 ? "float" : "double";

// softmax(x), and ln sum exp x.
inline double softmax(std::vector<double>& p, const double* x, int n) {
  const double top = *std::max_element(x, x + n);
  double sum = 0;
  p.assign(n, 0);
  for (int c = 0; c < n; c++) sum += p[c] = std::exp(x[c] - top);
  for (double& q : p) q /= sum;
  return top + std::log(sum);
}

template <class F>
void expect_refusal(const std::string& words, F call) {
  try {
    call();
    ADD_FAILURE() << "no error: " << words;
  } catch (const InputError& e) {
    EXPECT_NE(std::string(e.what()).find(words), std::string::npos) << e.what();
  }
}

// Row-major x [n][k] times y [k][m].
inline std::vector<double> product(const std::vector<double>& x, const std::vector<double>& y, int n, int k, int m) {
  std::vector<double> out(size_t(n) * m);
  for (int i = 0; i < n; i++)
    for (int l = 0; l < k; l++)
      for (int j = 0; j < m; j++) out[size_t(i) * m + j] += x[size_t(i) * k + l] * y[size_t(l) * m + j];
  return out;
}
inline std::vector<double> transposed(const std::vector<double>& x, int n, int m) {
  std::vector<double> out(x.size());
  for (int i = 0; i < n; i++)
    for (int j = 0; j < m; j++) out[size_t(j) * n + i] = x[size_t(i) * m + j];
  return out;
}

}  // namespace
}  // namespace baton::test
