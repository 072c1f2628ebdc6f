// The two kinds of errors that Baton throws. A program prints what() as one line and exits with exit_code().
#pragma once
#include <stdexcept>
#include <string>

namespace baton {

class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& message, int exit_code) : std::runtime_error(message), exit_code_(exit_code) {}
  int exit_code() const { return exit_code_; }

 private:
  int exit_code_;
};

// The caller's input is wrong: a file, an option, a shape. The message names it, what was found and what was expected.
class InputError : public Error {
 public:
  explicit InputError(const std::string& message) : Error(message, 2) {}
};

// The input was right, but the work could not be done: a full disk, a device error, a NaN in training.
class RunError : public Error {
 public:
  explicit RunError(const std::string& message) : Error(message, 1) {}
};

}  // namespace baton
