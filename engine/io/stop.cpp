#include "engine/io/stop.h"

#include <signal.h>

#include <atomic>
#include <utility>

namespace baton {
namespace {

std::atomic<int> received{0};
static_assert(std::atomic<int>::is_always_lock_free, "a signal handler may touch nothing else");

std::function<void()> look_first;

extern "C" void note_signal(int signal) { received.store(signal); }

}  // namespace

void stop_on_signals() {
  for (int signal : {SIGINT, SIGTERM}) {
    struct sigaction old {};
    if (::sigaction(signal, nullptr, &old) != 0 || old.sa_handler == SIG_IGN) continue;
    struct sigaction action {};
    action.sa_handler = note_signal;
    action.sa_flags = SA_RESTART | static_cast<int>(SA_RESETHAND);  // the second signal acts by default
    ::sigaction(signal, &action, nullptr);
  }
}

bool stop_requested() {
  if (look_first) look_first();
  return received.load(std::memory_order_relaxed) != 0;
}

void throw_stopped(const std::string& what) {
  const int signal = received.load();
  throw Stopped(std::string("stopped by ") + (signal == SIGINT ? "SIGINT" : "SIGTERM") + ": " + what, 128 + signal);
}

void pretend_signal(int signal) { received.store(signal); }

void look_when_asked(std::function<void()> look) { look_first = std::move(look); }

}  // namespace baton
