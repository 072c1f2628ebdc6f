#include "tests/ptx/cudnn_algorithms.h"

#include <algorithm>
#include <map>
#include <set>
#include <tuple>

#include "tests/ptx/library.h"
#include "tests/ptx/options.h"

namespace ptx {

namespace {

// Which problems an algorithm supports.
enum class Scope { all, winograd, winograd_nonfused, fft, fft_tiling, none };

// What its workspace holds.
enum class Memory { none, indices, patches, tiles, spectra };

struct Row {
  int algorithm;
  cudnnMathType_t math;
  Exactness exactness;
  Scope scope;
  Memory memory;
};

// In a plausible order of speed on a recent chip: tensor cores, transforms, products in float32.
const std::vector<Row> forward_rows{
    {CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM, CUDNN_TENSOR_OP_MATH, Exactness::sum, Scope::all,
     Memory::indices},
    {CUDNN_CONVOLUTION_FWD_ALGO_WINOGRAD_NONFUSED, CUDNN_FMA_MATH, Exactness::transform, Scope::winograd_nonfused,
     Memory::tiles},
    {CUDNN_CONVOLUTION_FWD_ALGO_WINOGRAD, CUDNN_DEFAULT_MATH, Exactness::transform, Scope::winograd, Memory::none},
    {CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM, CUDNN_DEFAULT_MATH, Exactness::sum, Scope::all, Memory::indices},
    {CUDNN_CONVOLUTION_FWD_ALGO_FFT_TILING, CUDNN_FMA_MATH, Exactness::transform, Scope::fft_tiling, Memory::spectra},
    {CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_GEMM, CUDNN_FMA_MATH, Exactness::sum, Scope::all, Memory::none},
    {CUDNN_CONVOLUTION_FWD_ALGO_GEMM, CUDNN_FMA_MATH, Exactness::sum, Scope::all, Memory::patches},
    {CUDNN_CONVOLUTION_FWD_ALGO_FFT, CUDNN_FMA_MATH, Exactness::transform, Scope::fft, Memory::spectra},
    {CUDNN_CONVOLUTION_FWD_ALGO_DIRECT, CUDNN_FMA_MATH, Exactness::sum, Scope::none, Memory::none},
};
const std::vector<Row> data_gradient_rows{
    {CUDNN_CONVOLUTION_BWD_DATA_ALGO_0, CUDNN_FMA_MATH, Exactness::atomics, Scope::all, Memory::none},
    {CUDNN_CONVOLUTION_BWD_DATA_ALGO_1, CUDNN_TENSOR_OP_MATH, Exactness::sum, Scope::all, Memory::indices},
    {CUDNN_CONVOLUTION_BWD_DATA_ALGO_WINOGRAD_NONFUSED, CUDNN_FMA_MATH, Exactness::transform, Scope::winograd_nonfused,
     Memory::tiles},
    {CUDNN_CONVOLUTION_BWD_DATA_ALGO_WINOGRAD, CUDNN_FMA_MATH, Exactness::transform, Scope::winograd, Memory::none},
    {CUDNN_CONVOLUTION_BWD_DATA_ALGO_1, CUDNN_DEFAULT_MATH, Exactness::sum, Scope::all, Memory::indices},
    {CUDNN_CONVOLUTION_BWD_DATA_ALGO_FFT_TILING, CUDNN_FMA_MATH, Exactness::transform, Scope::fft_tiling,
     Memory::spectra},
    {CUDNN_CONVOLUTION_BWD_DATA_ALGO_FFT, CUDNN_FMA_MATH, Exactness::transform, Scope::fft, Memory::spectra},
};
const std::vector<Row> weight_gradient_rows{
    {CUDNN_CONVOLUTION_BWD_FILTER_ALGO_0, CUDNN_FMA_MATH, Exactness::atomics, Scope::all, Memory::none},
    {CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1, CUDNN_TENSOR_OP_MATH, Exactness::sum, Scope::all, Memory::indices},
    {CUDNN_CONVOLUTION_BWD_FILTER_ALGO_WINOGRAD_NONFUSED, CUDNN_FMA_MATH, Exactness::transform,
     Scope::winograd_nonfused, Memory::tiles},
    {CUDNN_CONVOLUTION_BWD_FILTER_ALGO_3, CUDNN_DEFAULT_MATH, Exactness::atomics, Scope::all, Memory::indices},
    {CUDNN_CONVOLUTION_BWD_FILTER_ALGO_FFT_TILING, CUDNN_FMA_MATH, Exactness::transform, Scope::fft_tiling,
     Memory::spectra},
    {CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1, CUDNN_FMA_MATH, Exactness::sum, Scope::all, Memory::indices},
    {CUDNN_CONVOLUTION_BWD_FILTER_ALGO_FFT, CUDNN_FMA_MATH, Exactness::transform, Scope::fft, Memory::spectra},
    {CUDNN_CONVOLUTION_BWD_FILTER_ALGO_WINOGRAD, CUDNN_FMA_MATH, Exactness::transform, Scope::none, Memory::none},
};
const std::vector<Row>& rows_of(Direction direction) {
  return direction == Direction::forward         ? forward_rows
         : direction == Direction::data_gradient ? data_gradient_rows
                                                 : weight_gradient_rows;
}

bool supports(Scope scope, const ConvolutionShape& s) {
  const bool unit_strides = s.stride_height == 1 && s.stride_width == 1;
  const bool square = s.kernel_height == s.kernel_width;
  const int height = s.height + 2 * s.pad_height, width = s.width + 2 * s.pad_width;
  switch (scope) {
    case Scope::all:
      return true;
    case Scope::winograd:
      return unit_strides && square && s.kernel_height == 3;
    case Scope::winograd_nonfused:
      return unit_strides && square && (s.kernel_height == 3 || s.kernel_height == 5);
    case Scope::fft:
      return unit_strides && height <= 256 && width <= 256 && s.kernel_height > s.pad_height;
    case Scope::fft_tiling:
      return unit_strides && s.kernel_height <= 32 && s.kernel_width <= 32;
    case Scope::none:
      return false;
  }
  return false;
}

size_t bytes_of(Memory memory, const ConvolutionShape& s) {
  const size_t floats = sizeof(float);
  switch (memory) {
    case Memory::none:
      return 0;
    case Memory::indices:
      return size_t(s.out_height()) * s.out_width() * 16 + size_t(s.kernel_size()) / 8 * 8 + 64;
    case Memory::patches:
      return s.output_size() / s.filters * s.channels * s.kernel_height * s.kernel_width * floats;
    case Memory::tiles:
      return (s.input_size() + s.output_size() + s.kernel_size()) * 36 / 16 * floats;
    case Memory::spectra:
      return (s.input_size() + s.output_size() + s.kernel_size()) * 4 * floats;
  }
  return 0;
}

struct Memories {
  std::set<std::tuple<Problem, int, cudnnMathType_t>> offered, run;
  std::map<Problem, int> tried_first;
};
Memories& memories() {
  static auto* m = new Memories;
  return *m;
}

bool is_tensor_math(cudnnMathType_t math) {
  return math == CUDNN_TENSOR_OP_MATH || math == CUDNN_TENSOR_OP_MATH_ALLOW_CONVERSION;
}

}  // namespace

std::vector<Candidate> candidates(const Problem& problem) {
  std::vector<Candidate> found;
  float milliseconds = float(problem.shape.flops() * 2e-11) + 0.005f;
  for (const Row& row : rows_of(problem.direction)) {
    milliseconds *= 1.25f;
    if (supports(row.scope, problem.shape))
      found.push_back({row.algorithm, row.math, row.exactness, CUDNN_STATUS_SUCCESS,
                       bytes_of(row.memory, problem.shape), milliseconds});
  }
  for (const Row& row : rows_of(problem.direction))
    if (!supports(row.scope, problem.shape))
      found.push_back({row.algorithm, row.math, row.exactness, CUDNN_STATUS_NOT_SUPPORTED, 0, -1});
  return found;
}

std::vector<Candidate> offer(const Problem& problem, int count) {
  std::vector<Candidate> found = candidates(problem);
  found.resize(std::min(found.size(), size_t(count)));
  for (const Candidate& c : found)
    if (c.status == CUDNN_STATUS_SUCCESS) memories().offered.insert({problem, c.algorithm, c.math});
  return found;
}

Candidate offered(const Problem& problem, int algorithm, cudnnMathType_t descriptor) {
  bool with_other_math = false;
  for (const Candidate& c : candidates(problem)) {
    if (c.algorithm != algorithm || !memories().offered.count({problem, algorithm, c.math})) continue;
    if (is_tensor_math(c.math) == is_tensor_math(descriptor)) return c;
    with_other_math = true;
  }
  const std::string which = "algorithm " + std::to_string(algorithm) + " for " + problem.shape.text();
  if (with_other_math)
    not_supported(which + " was offered for another math type only than the descriptor's " +
                  std::to_string(descriptor));
  not_supported(which + " was never offered, or with a status that says so");
}

bool refused_under_disturbance(const Problem& problem, int algorithm) {
  return options().refuse_first_algorithm &&
         memories().tried_first.emplace(problem, algorithm).first->second == algorithm;
}

bool has_run(const Problem& problem, int algorithm, cudnnMathType_t math) {
  return memories().run.count({problem, algorithm, math});
}
void note_run(const Problem& problem, int algorithm, cudnnMathType_t math) {
  memories().run.insert({problem, algorithm, math});
}

}  // namespace ptx
