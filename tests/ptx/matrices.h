// Matrices in device memory as BLAS and LAPACK see them: column after column, `ld` elements from one column's start to
// the next one's. Between the columns, and off the triangle that a function names, memory is neither read nor written.
#pragma once
#include <algorithm>
#include <string>
#include <type_traits>

#include "tests/ptx/device_memory.h"
#include "tests/ptx/library.h"

namespace ptx {

enum class Part { all, lower, upper, below_diagonal, above_diagonal };

// Where a matrix lies: enough to compare two of them, whatever their types.
class Region {
 public:
  Region(uint64_t address, size_t element, long long rows, long long columns, long long ld, Part part = Part::all)
      : address_(address), element_(element), rows_(rows), columns_(columns), ld_(ld), part_(part) {}
  explicit Region(const Workspace& w)
      : Region(reinterpret_cast<uint64_t>(w.data), 1, w.bytes, w.bytes ? 1 : 0, w.bytes) {}

  long long rows() const { return rows_; }
  long long columns() const { return columns_; }
  bool empty() const { return rows_ == 0 || columns_ == 0; }
  // Of the elements that are read or written; of all from the first to the last.
  size_t bytes() const {
    size_t sum = 0;
    for (long long j = 0; j < columns_; j++) sum += column(j).end - column(j).begin;
    return sum;
  }
  size_t extent() const { return empty() ? 0 : element_ * size_t((columns_ - 1) * ld_ + rows_); }

  bool precedes(const Region& other) const { return address_ + extent() <= other.address_; }
  // Whether an element of one is an element of the other.
  bool overlaps(const Region& other) const {
    if (empty() || other.empty()) return false;
    if (precedes(other) || other.precedes(*this)) return false;
    for (long long j = 0; j < columns_; j++) {
      const Bytes mine = column(j);
      // Of the other's columns, only those near it can meet it.
      const long long step = other.element_ * other.ld_, offset = (long long)(mine.begin - other.address_);
      const long long length = mine.end - mine.begin;
      for (long long k = std::max(0ll, offset / step - 1); k < other.columns_ && k * step < offset + length; k++) {
        const Bytes theirs = other.column(k);
        if (mine.begin < theirs.end && theirs.begin < mine.end) return true;
      }
    }
    return false;
  }

 protected:
  struct Bytes {
    uint64_t begin, end;
  };
  Bytes column(long long j) const {
    long long first = 0, end = rows_;
    if (part_ == Part::lower) first = j;
    if (part_ == Part::below_diagonal) first = j + 1;
    if (part_ == Part::upper) end = j + 1;
    if (part_ == Part::above_diagonal) end = j;
    const uint64_t start = address_ + element_ * uint64_t(j * ld_);
    return {start + element_ * std::min(first, rows_), start + element_ * std::min(end, rows_)};
  }

  uint64_t address_;
  size_t element_;
  long long rows_, columns_, ld_;
  Part part_;
};

// Matrix<const float> is an input, Matrix<float> an output or both. `name` appears in messages.
template <class T>
class Matrix : public Region {
 public:
  Matrix(const char* name, T* data, long long rows, long long columns, long long ld, Part part = Part::all)
      : Region(reinterpret_cast<uint64_t>(data), sizeof(T), rows, columns, ld, part), name_(name) {
    if (ld < std::max(1ll, rows))
      refuse("the leading dimension of " + std::string(name) + " is " + std::to_string(ld) + ", its columns have " +
             std::to_string(rows) + " elements");
  }

  const char* name() const { return name_; }
  Matrix moved(long long elements) const {
    Matrix other = *this;
    other.address_ += elements * (long long)sizeof(T);
    return other;
  }

  // Where it is stored, after a check that it lies in one allocation, and of the elements of its part: that they have
  // been written; or, of an output, that now they are. Null where there are no elements. Both throw Fault.
  T* read() const {
    T* at = stored();
    for_columns([this](uint64_t address, size_t bytes) { memory().check_written(address, bytes, name_); });
    return at;
  }
  T* write() const requires(!std::is_const_v<T>) {
    T* at = stored();
    for_columns([](uint64_t address, size_t bytes) { memory().mark_written(address, bytes); });
    return at;
  }

 private:
  static DeviceMemory& memory() { return DeviceMemory::instance(); }
  T* stored() const {
    if (empty()) return nullptr;
    memory().read(reinterpret_cast<const T*>(address_), 0, name_);  // for its alignment
    return reinterpret_cast<T*>(memory().storage(address_, extent(), name_));
  }
  template <class F>
  void for_columns(F f) const {
    if (part_ == Part::all && ld_ == rows_) return f(address_, extent());
    for (long long j = 0; j < columns_; j++)
      if (const Bytes c = column(j); c.begin < c.end) f(c.begin, c.end - c.begin);
  }

  const char* name_;
};

// Matrices of one shape, `stride` elements from one to the next; stride 0 is one matrix for all.
template <class T>
struct Batch {
  Matrix<T> first;
  long long stride;
  int count;

  Matrix<T> operator[](int i) const { return first.moved(i * stride); }
  bool precedes(const Region& other) const { return (*this)[count - 1].precedes(other); }
};

// What is written must not overlap what is read, nor the workspace. These throw Fault.
inline void check_apart(const char* output_name, const Region& output, const char* input_name, const Region& input) {
  if (output.overlaps(input)) refuse(std::string(output_name) + " overlaps " + input_name);
}
template <class T, class U>
void check_apart(const Batch<T>& outputs, const Batch<U>& inputs) {
  if (outputs.precedes(inputs.first) || inputs.precedes(outputs.first)) return;
  for (int i = 0; i < outputs.count; i++)
    for (int j = 0; j < (inputs.stride ? inputs.count : 1); j++)
      check_apart(outputs.first.name(), outputs[i], inputs.first.name(), inputs[j]);
}
template <class T>
void check_apart(const Batch<T>& outputs) {  // from one another; the distance of two tells all
  for (int i = 1; i < outputs.count && !outputs.first.precedes(outputs[i]); i++)
    if (outputs.first.overlaps(outputs[i]))
      refuse("matrices " + std::string(outputs.first.name()) + " of a batch overlap: they are " +
             std::to_string(outputs.stride) + " elements apart");
}
template <class T>
void check_apart(const Batch<T>& matrices, const Workspace& workspace) {
  const Region all(workspace);
  for (int i = 0; i < matrices.count; i++) check_apart("the workspace", all, matrices.first.name(), matrices[i]);
}

}  // namespace ptx
