// The profile of a process (BATON_PTX_PROFILE=FILE): what each kernel counted over all of its launches, the work of
// each library call, and the nodes of the graph that was launched last, which of a training program is its step.
// Written as JSON when the process ends; tools/gpu-cost reads it.
#pragma once
#include "tests/ptx/counters.h"
#include "tests/ptx/stream.h"

namespace ptx {

bool is_profiling();

// Gives a launch the counters that it counts into; finish_kernel() then files them.
void begin_kernel(Launch&);
void finish_kernel(const Launch&);

// Called for every operation that has run, kernels included.
void profile_operation(const Operation&);
void profile_graph_begins(size_t nodes);
void profile_graph_ends();

}  // namespace ptx
