// The flat parameter store: a network lists its tensors once, and every quantity of the parameters (mean, scale, prior,
// gradient, moment) is one aligned array [replicas][stride] over all of them. So an optimizer's step, the hand-over of
// a posterior to the next stage, or a checkpoint is one pass over each array. Tensors can still be accessed by name.
#pragma once
#include <map>
#include <string>
#include <vector>

#include "engine/runtime.h"

namespace baton {

struct TensorSpec {
  std::string name;            // PyTorch's, as "conv1.weight"
  std::vector<int64_t> shape;  // PyTorch's, as [out, in, kh, kw]
  int fan_in;                  // inputs of a unit, by which the initialisation scales
  bool bias;
  size_t offset, size;  // floats, in each replica's row
};

class ParameterLayout {
 public:
  // Appends a tensor, 256-byte aligned; returns its index. Throws InputError for a name already taken.
  int add(std::string name, std::vector<int64_t> shape, int fan_in, bool bias);
  const std::vector<TensorSpec>& tensors() const { return tensors_; }
  const TensorSpec& operator[](int index) const { return tensors_[index]; }
  size_t stride() const { return stride_; }  // floats of one replica, gaps included
  size_t parameters() const;                 // without the gaps
  struct Gap {
    size_t offset, size;
  };
  std::vector<Gap> gaps() const;  // the gaps that alignment leaves between tensors

 private:
  std::vector<TensorSpec> tensors_;
  size_t stride_ = 0;
};

// Named arrays over one layout, in one arena.
class ParameterStore {
 public:
  ParameterStore(Arena& arena, const ParameterLayout& layout, int replicas)
      : arena_(&arena), layout_(layout), replicas_(replicas) {}
  const ParameterLayout& layout() const { return layout_; }
  int replicas() const { return replicas_; }
  float* add(const std::string& array);       // [replicas][stride], zero; throws InputError for a name already taken
  float* at(const std::string& array) const;  // throws InputError for an unknown name
  const std::vector<std::string>& arrays() const { return order_; }
  size_t row_bytes() const { return layout_.stride() * sizeof(float); }
  size_t bytes() const { return row_bytes() * replicas_; }  // of one array

  // One tensor of one replica, on the host.
  std::vector<float> read(Device&, const std::string& array, int replica, const TensorSpec&) const;
  void write(Device&, const std::string& array, int replica, const TensorSpec&, const std::vector<float>&);

 private:
  Arena* arena_;
  ParameterLayout layout_;
  int replicas_;
  std::vector<std::string> order_;
  std::map<std::string, float*> data_;
};

}  // namespace baton
