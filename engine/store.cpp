#include "engine/store.h"

namespace baton {

namespace {
constexpr size_t alignment = 64;  // floats: 256 bytes
}

int ParameterLayout::add(std::string name, std::vector<int64_t> shape, int fan_in, bool bias) {
  for (const TensorSpec& t : tensors_)
    if (t.name == name) throw InputError("two tensors are called " + name);
  size_t size = 1;
  for (int64_t d : shape) size *= size_t(d);
  tensors_.push_back({std::move(name), std::move(shape), fan_in, bias, stride_, size});
  stride_ += (size + alignment - 1) / alignment * alignment;
  return int(tensors_.size()) - 1;
}

size_t ParameterLayout::parameters() const {
  size_t sum = 0;
  for (const TensorSpec& t : tensors_) sum += t.size;
  return sum;
}

std::vector<ParameterLayout::Gap> ParameterLayout::gaps() const {
  std::vector<Gap> gaps;
  for (size_t i = 0; i < tensors_.size(); i++) {
    const size_t end = tensors_[i].offset + tensors_[i].size;
    const size_t next = i + 1 < tensors_.size() ? tensors_[i + 1].offset : stride_;
    if (next > end) gaps.push_back({end, next - end});
  }
  return gaps;
}

float* ParameterStore::add(const std::string& array) {
  if (data_.count(array)) throw InputError("two parameter arrays are called " + array);
  float* p = arena_->take<float>(layout_.stride() * replicas_);
  order_.push_back(array);
  data_[array] = p;
  return p;
}

float* ParameterStore::at(const std::string& array) const {
  const auto found = data_.find(array);
  if (found == data_.end()) throw InputError("there is no parameter array called " + array);
  return found->second;
}

std::vector<float> ParameterStore::read(Device& device, const std::string& array, int replica,
                                        const TensorSpec& t) const {
  return download(device, at(array) + layout_.stride() * replica + t.offset, t.size);
}

void ParameterStore::write(Device& device, const std::string& array, int replica, const TensorSpec& t,
                           const std::vector<float>& values) {
  if (values.size() != t.size)
    throw InputError(t.name + ": " + std::to_string(values.size()) + " values, expected " + std::to_string(t.size));
  upload(device, at(array) + layout_.stride() * replica + t.offset, values);
}

}  // namespace baton
