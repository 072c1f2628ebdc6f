// What own_data.cpp and own_data_pictures.cpp share, and nobody else includes.
#pragma once
#include <algorithm>
#include <atomic>
#include <exception>
#include <future>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "engine/error.h"
#include "engine/io/files.h"
#include "engine/io/own_data.h"

namespace baton::own_data {

namespace fs = std::filesystem;

constexpr int kMostClasses = 256;              // labels are bytes
constexpr uint64_t kRoom = uint64_t{1} << 20;  // for headers and the like, beside pixels or labels

using baton::refuse;
[[noreturn]] inline void refuse(const fs::path& path, const std::string& what) { refuse(path.string(), what); }

// "28 x 32"
std::string product(int64_t height, int64_t width);
// "a, b, c"; of many names the first few.
std::string listed(const std::vector<std::string>& names);

// The range [first, second) that the options ask for of `count` images.
std::pair<size_t, size_t> find_range(const OwnDataOptions& options, size_t count, const fs::path& path);
// Throw InputError, which begins with `who`: for more images than are loaded; for images that are not of the size that
// the options ask for (`verb` stands before their size).
void check_total(const std::string& who, uint64_t count, uint64_t image_bytes, const OwnDataOptions& options);
void check_size(const std::string& who, const char* verb, int height, int width, const OwnDataOptions& options);

// Calls work(i) for every i below count, in any order and on all cores. Throws the error of the lowest i.
template <class Work>
void side_by_side(size_t count, const Work& work) {
  constexpr size_t kMostThreads = 16;
  const size_t threads = std::min({count, kMostThreads, size_t{std::max(1u, std::thread::hardware_concurrency())}});
  std::vector<std::exception_ptr> errors(count);
  std::atomic<size_t> next{0};
  const auto run = [&] {
    for (size_t i = next++; i < count; i = next++) {
      try {
        work(i);
      } catch (...) {
        errors[i] = std::current_exception();
      }
    }
  };
  {
    std::vector<std::future<void>> others;
    try {
      while (others.size() + 1 < threads) others.push_back(std::async(std::launch::async, run));
    } catch (const std::system_error&) {  // the system gives no more threads: those that there are do all the work
    }
    run();
  }
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

// Loads a folder of pictures, or one with a folder of pictures for each class (own_data_pictures.cpp).
OwnData load_pictures(const fs::path& folder, const OwnDataOptions& options);

}  // namespace baton::own_data
