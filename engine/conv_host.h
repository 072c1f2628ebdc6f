// What the host's convolutions share: vectors of eight floats, a transpose, and the ways of computing a convolution
// that have files of their own. The head note of conv_host.cpp describes them all.
#pragma once
#if defined(__AVX__)
#include <immintrin.h>
#endif
#include <memory>

#include "engine/blas.h"

namespace baton::conv {

constexpr int lanes = 8;
typedef float Vec __attribute__((vector_size(4 * lanes), aligned(4), may_alias));  // loads and stores may be unaligned

inline __attribute__((always_inline)) Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline __attribute__((always_inline)) void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline __attribute__((always_inline)) Vec fused(Vec a, Vec b, Vec c) {
#if defined(__FMA__)
  return Vec(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
  return a * b + c;
#endif
}
inline __attribute__((always_inline)) Vec broadcast(float a) { return Vec{a, a, a, a, a, a, a, a}; }

// to[c][r] = from[r][c], for r < rows, c < columns.
void transpose(const float* from, size_t from_stride, int rows, int columns, float* to, size_t to_stride);

struct Span {
  int first, last;
};

// ---- by filters (conv_filters_host.cpp)
bool by_filters(const ConvShape&);  // whether this way is the best for the shape
// y = x convolved with w, for all replicas; to be called by every thread of an OpenMP team. mirror: w is that of the
// convolution whose mirrored one this is. packed: scratch, [replicas][weight_size()].
void run_filters(const ConvShape&, int replicas, Matrices x, Matrices w, bool mirror, MutableMatrices y, float* packed);

// ---- sparse (conv_sparse_host.cpp): backward passes of one replica that list the non-zeros of dy.
class Sparse {
 public:
  explicit Sparse(const ConvShape&);
  ~Sparse();
  bool possible() const;                   // made for kernels of 3x3 and 5x5
  size_t packed_weights() const;           // floats of scratch that data() takes
  size_t image() const;                    // and both for every image of the batch
  bool worthwhile(const float* dy) const;  // whether a sample of dy's planes has few enough non-zeros
  void weights(const float* x, const float* dy, float* dw, float* images) const;
  void data(const float* dy, const float* w, float* dx, float* images, float* packed) const;

  struct Geometry;

 private:
  ConvShape shape_;
  std::unique_ptr<Geometry> geometry_;
};

}  // namespace baton::conv
