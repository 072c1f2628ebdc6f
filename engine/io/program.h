// How every program of Baton ends: an error is one line on stderr, naming the program, and the exit status says whose
// fault it was (2: bad input, 1: a failure). SIGINT and SIGTERM end it through engine/io/stop.h (130, 143): what `body`
// does for longer than a second must ask stop_requested(), as training and predictions do.
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
