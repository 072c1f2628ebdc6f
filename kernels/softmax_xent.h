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

// What a stretch of training adds up, one a replica; the host reads and clears it once an epoch.
struct Totals {
  double loss, hits;  // sums over examples
  int64_t examples, steps;
  int32_t nonfinite_step;  // the first step (of the run, 1-based) whose loss was not finite; 0: none
  int32_t pad;
};
// Adds one batch to the totals, in a fixed order; `step` numbers come from the replica's StepState, which is halted
// where the loss is not finite.
struct StepState;
void add_to_totals(Totals* totals, const float* loss, const float* hit, StepState* states, int replicas, int batch,
                   Stream);

}  // namespace baton
