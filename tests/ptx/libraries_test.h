// What the tests of the stand-in libraries share: arrays on the device, what a call prints, and processes of their own
// for errors that stay and for the disturbances, which are read from the environment once.
#pragma once
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <random>
#include <regex>
#include <string>
#include <vector>

namespace ptx::test {

// An array on the device, in an allocation of its own.
template <class T>
class Array {
 public:
  explicit Array(size_t count) : count_(count) {  // not written
    EXPECT_EQ(cudaMalloc(reinterpret_cast<void**>(&data_), count * sizeof(T)), cudaSuccess);
  }
  explicit Array(const std::vector<T>& values) : Array(values.size()) {
    EXPECT_EQ(cudaMemcpyAsync(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice, nullptr), cudaSuccess);
  }
  ~Array() { cudaFree(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  operator T*() const { return data_; }
  std::vector<T> host() const { return host(0, count_); }
  std::vector<T> host(size_t first, size_t count) const {
    std::vector<T> values(count);
    EXPECT_EQ(cudaMemcpyAsync(values.data(), data_ + first, count * sizeof(T), cudaMemcpyDeviceToHost, nullptr),
              cudaSuccess);
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t count_;
};

class Stream {
 public:
  Stream() { EXPECT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess); }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  operator cudaStream_t() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

template <class T>
std::vector<T> normals(size_t count, int seed) {
  std::mt19937 random(seed);
  std::normal_distribution<T> normal;
  std::vector<T> values(count);
  for (T& v : values) v = normal(random);
  return values;
}
inline std::vector<float> small_integers(size_t count, int seed) {
  std::mt19937 random(seed);
  std::vector<float> values(count);
  for (float& v : values) v = float(int(random() % 7)) - 3;
  return values;
}

// What a call returned and printed.
template <class Status>
struct Outcome {
  Status status;
  std::string words;
};
template <class Call>
auto outcome_of(Call call) {
  testing::internal::CaptureStderr();
  const auto status = call();
  return Outcome<decltype(call())>{status, testing::internal::GetCapturedStderr()};
}
inline bool says(const std::string& words, const char* expression) {
  return std::regex_search(words, std::regex(expression));
}

// The call returns this status and says these words (a regular expression).
#define EXPECT_REFUSED(call, expected_status, expression)                                            \
  do {                                                                                               \
    const auto found = ::ptx::test::outcome_of([&] { return call; });                                \
    EXPECT_EQ(found.status, expected_status);                                                        \
    EXPECT_TRUE(::ptx::test::says(found.words, expression)) << found.words << "not: " << expression; \
  } while (false)

// Runs the body in a process of its own, where its expectations must hold and the words (a POSIX regular expression) be
// said.
template <class Body>
void expect_in_child(Body body, const char* words) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // a fresh process, which reads the environment again
  EXPECT_EXIT(
      {
        body();
        std::fflush(stdout);
        std::_Exit(testing::Test::HasFailure() ? 1 : 0);
      },
      testing::ExitedWithCode(0), words);
}

// Sets BATON_PTX_DISTURB for the children of its scope.
class Disturbance {
 public:
  explicit Disturbance(const char* list) { setenv("BATON_PTX_DISTURB", list, 1); }
  ~Disturbance() { unsetenv("BATON_PTX_DISTURB"); }
};

}  // namespace ptx::test
