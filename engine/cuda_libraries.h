// Shared by runtime_cuda.cu, blas_cuda.cu, linalg_cuda.cu and select_cuda.cu, and by no other file: checked calls, and
// the handles of cuBLAS and cuDNN, bound to the device's stream.
#pragma once
#include <cublas_v2.h>
#include <cudnn.h>
#include <cusolverDn.h>

#include "engine/runtime.h"

namespace baton {

// Throw RunError with the failing call and the library's message.
void check(cublasStatus_t status, const char* call);
void check(cudnnStatus_t status, const char* call);
void check(cusolverStatus_t status, const char* call);
inline void check(cudaError_t status, const char* call) { simt::check(status, call); }

// Calls a CUDA, cuBLAS, cuDNN or cuSOLVER function and throws when it fails: BATON_CALL(cudaFree, pointer).
#define BATON_CALL(function, ...) ::baton::check(function(__VA_ARGS__), #function)

struct LibraryHandles {
  explicit LibraryHandles(Stream stream);
  ~LibraryHandles();
  LibraryHandles(const LibraryHandles&) = delete;
  LibraryHandles& operator=(const LibraryHandles&) = delete;

  static constexpr cublasMath_t math = CUBLAS_PEDANTIC_MATH;  // float32 throughout, but within gemm() under tf32
  cublasHandle_t blas = nullptr;
  cudnnHandle_t dnn = nullptr;

 private:
  Arena workspace_;  // for cuBLAS: with a fixed workspace its calls can be captured and repeat bit for bit
};

}  // namespace baton
