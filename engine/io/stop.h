// How a run ends early: on SIGINT or SIGTERM it finishes its step, writes a checkpoint and leaves.
#pragma once
#include <functional>
#include <string>

#include "engine/error.h"

namespace baton {

// From here on the first SIGINT or SIGTERM only sets a flag; another one ends the program at once, as it would have
// without this call (files are written beside and renamed, so that is safe too). Programs that write checkpoints call
// it once, before their first thread. A signal that is ignored (under nohup) stays ignored.
void stop_on_signals();

// Whether a signal has come. Loops over steps, images or draws ask this, save what they can, and throw_stopped().
bool stop_requested();

// The run was asked to end, and its checkpoint is written: exit status 128 + the signal's number, as shells have it.
class Stopped : public Error {
 public:
  using Error::Error;
};
// what: what is left behind, "the checkpoint is written; --resume goes on from it". The message names the signal.
[[noreturn]] void throw_stopped(const std::string& what);

// For tests: as if the signal had come; 0 takes it back.
void pretend_signal(int signal);
// For tests: stop_requested() calls `look` before it answers; nullptr takes it away. A step that a graph replays calls
// nothing on the host, but every build asks before each step but the first of a graph, so what looks here sees the same
// steps on a CPU and on a GPU. It may count, read device memory, pretend a signal, or throw.
void look_when_asked(std::function<void()> look);

}  // namespace baton
