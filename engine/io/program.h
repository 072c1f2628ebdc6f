// The main function of every program of Baton. An error is printed as one line on stderr, which names the program, and
// the exit status is 2 for bad input and 1 for a failure. SIGINT and SIGTERM end the program by engine/io/stop.h (130,
// 143): what `body` does for longer than a second must ask stop_requested(), as training and predictions do.
#pragma once
#include <cstdio>
#include <exception>

#include "engine/error.h"
#include "engine/io/stop.h"

namespace baton {

template <class F>
int run_program(const char* name, F body) {
  stop_on_signals();
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
