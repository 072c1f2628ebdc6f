// The operands of a product on the host, as the device's precision has them.
#pragma once
#include "engine/blas.h"

namespace baton {

// Under fp32 the operands themselves; under tf32 rounded copies, which last as long as this.
class Operands {
 public:
  explicit Operands(Device& device) : frame_(device), rounds_(device.precision() == Precision::tf32) {}
  // A matrix of `size` floats for each replica.
  Matrices take(Matrices x, size_t size, int replicas) {
    if (!rounds_) return x;
    const int count = x.stride == 0 ? 1 : replicas;
    float* copies = frame_.take<float>(size * count);
    for (int r = 0; r < count; r++) {
      const float* from = x.data + x.stride * r;
      float* to = copies + size * r;
#pragma omp parallel for simd schedule(static) if (size > 1 << 16)
      for (size_t i = 0; i < size; i++) to[i] = simt::round_to_tf32(from[i]);
    }
    return {copies, x.stride == 0 ? 0 : size};
  }

 private:
  Scratch::Frame frame_;
  bool rounds_;
};

}  // namespace baton
