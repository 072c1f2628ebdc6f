// Softmax cross-entropy and the totals of a step.
#pragma once
#include "engine/runtime.h"

namespace baton {

// loss[r][b] = -log softmax(logits[r][b])[label], hit[r][b] = 1 where the arg max is the label, else 0;
// dlogits[r][b][c] = scale (softmax - onehot): the gradient of scale * sum of losses. dlogits may be null.
// Shapes: logits, dlogits [replicas][batch][classes]; labels [replicas][batch],
// or [batch] for all replicas (shared_labels).
void softmax_cross_entropy(float* loss, float* hit, float* dlogits, const float* logits, const int32_t* labels,
                           int replicas, int batch, int classes, float scale, Stream, bool shared_labels = false);

// Totals of a replica over many steps. The host reads and clears them once an epoch.
struct Totals {
  double loss, hits;  // sums over examples
  int64_t examples, steps;
  int32_t nonfinite_step;  // the first step (of the run, 1-based) whose loss was not finite; 0: none
  int32_t pad;
};
// Adds one batch to the totals, in a fixed order. The number of a step that is not finite comes from the replica's
// StepState, which is then halted.
struct StepState;
void add_to_totals(Totals* totals, const float* loss, const float* hit, StepState* states, int replicas, int batch,
                   Stream);

}  // namespace baton
