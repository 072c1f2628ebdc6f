// The early end of a run: on SIGINT or SIGTERM it finishes its step, writes a checkpoint and ends.
#pragma once
#include <functional>
#include <string>

#include "engine/error.h"

namespace baton {

// After this call the first SIGINT or SIGTERM only sets a flag. Another one ends the program at once, as it would have
// without this call; that is safe too, as files are replaced atomically. Programs that write checkpoints call it once,
// before they start a thread. A signal that is ignored (under nohup) stays ignored.
void stop_on_signals();

// Whether a signal has come. Loops over steps, images or draws ask this, save what they can, and throw_stopped().
bool stop_requested();

// The run was asked to end, and its checkpoint is written. The exit status is 128 + the signal's number, as in shells.
class Stopped : public Error {
 public:
  using Error::Error;
};
// what: the state that is left, as "the checkpoint is written; --resume goes on from it". The message names the signal.
[[noreturn]] void throw_stopped(const std::string& what);

// For tests: acts as if the signal had come; 0 takes it back.
void pretend_signal(int signal);
// For tests: stop_requested() calls `look` before it answers; nullptr removes it. A step that a graph replays calls
// nothing on the host, but every build calls stop_requested() before each step except the first of a graph. So `look`
// sees the same steps on a CPU and on a GPU. It may count, read device memory, pretend a signal, or throw.
void look_when_asked(std::function<void()> look);

}  // namespace baton
