// How every program of Baton ends: an error is one line on stderr, naming the program, and the exit status says whose
// fault it was (2: bad input, 1: a failure).
#pragma once
#include <cstdio>
#include <exception>

#include "engine/error.h"

namespace baton {

template <class F>
int run_program(const char* name, F body) {
  try {
    return body();
  } catch (const Error& e) {
    fprintf(stderr, "%s: %s\n", name, e.what());
    return e.exit_code();
  } catch (const std::exception& e) {
    fprintf(stderr, "%s: %s\n", name, e.what());
    return 1;
  }
}

}  // namespace baton
