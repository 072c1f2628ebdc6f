// What runtime_cuda.cu, blas_cuda.cu, linalg_cuda.cu and select_cuda.cu share: checked calls, and the handles of cuBLAS
// and cuDNN, bound to the device's stream. Nothing outside these four files includes this.
#pragma once
#include <cublas_v2.h>
#include <cudnn.h>
#include <cusolverDn.h>

#include "engine/runtime.h"

namespace baton {

// Throw RunError with the failing call and the library's words.
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

  cublasHandle_t blas = nullptr;
  cudnnHandle_t dnn = nullptr;

 private:
  Arena workspace_;  // cuBLAS's own: with a fixed one its calls are capturable and repeat bit for bit
};

}  // namespace baton
