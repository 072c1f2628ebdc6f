// Batches for the steps, out of a data set on the device. The set stays there as bytes; a batch is gathered by index.
#pragma once
#include "engine/runtime.h"
#include "kernels/step_state.h"

namespace baton {

// x = pixel * scale[c] + shift[c]
struct Normalisation {
  float scale[3], shift[3];
};

struct DeviceImages {     // device memory
  const uint8_t* pixels;  // [count][channels][plane]
  const uint8_t* labels;  // [count]
  int count, channels, plane;
  Normalisation normalisation;
  int height = 0, width = 0;  // of a plane; may be 0 without augmentation
  bool rounded = false;       // x is written as tf32 numbers, for tensor cores multiply it (kernels/layer_product.h)
};

// The example at position i of the epoch's order of n examples: a keyed permutation of [0, n). It is computed, not
// stored, so that an order needs no memory, and a resumed run no state. Public for its tests.
__host__ __device__ uint32_t shuffled(uint32_t i, uint32_t n, Key key, uint32_t epoch);

// The step's batch for every replica. Example b is at position (stage_step - 1) * batch + b of an endless sequence of
// epochs, each of which is a new order of the replica's part. order [replicas][order_stride] holds each replica's
// examples, one part after the other. x, x_squared [replicas][batch][channels * plane] (x_squared may be null), labels
// [replicas][batch].
//
// augment (He et al. 2016): each image is mirrored or not, padded with 4 zeros (of the normalised values) on each side,
// and cropped to its size at a random place: x(y, c) = image(y + p - 4, c' + q - 4), c' = c or width - 1 - c. The
// random numbers are words of Philox with the key `shuffle`, element b, stream stream_augment and the step: the top bit
// of word 0 mirrors, and words 1 and 2 give p and q (9 word / 2^32).
//
// tasks: see TaskInputs.
struct TaskInputs;
void gather_training_batch(float* x, float* x_squared, int32_t* labels, const DeviceImages&, const int32_t* order,
                           size_t order_stride, const StepState* states, int replicas, int batch, Stream,
                           bool augment = false, const TaskInputs* tasks = nullptr);

// Tasks that have the same images with their pixels in other orders (permuted MNIST), after normalisation: in task t,
// x[i] = image[pixel_order[t][i]], i over channels * plane. The task of a step is its stage. Where `cumulative` is
// given, each example has a task of its own: the first t with u < cumulative[stage_step - 1][t], or the last if there
// is none, with u = word w of Philox(key shuffle; b, stream_tasks, step, 0) / 2^32 (Zeno et al., continuous
// task-agnostic learning). augment and tasks exclude each other (InputError). Device memory.
struct TaskInputs {
  const int32_t* pixel_order;         // [tasks][channels * plane]
  int tasks;                          // stages beyond them wrap around
  const float* cumulative = nullptr;  // [steps][tasks]: running sums of the tasks' probabilities at each step
  int steps = 0;                      // steps beyond the last use the last row
};

// The images with the numbers index [batch]. pixel_order [channels * plane] of one task, or null for the images' own.
void gather_indexed(float* x, float* x_squared, int32_t* labels, const DeviceImages&, const int32_t* index, int batch,
                    Stream, const int32_t* pixel_order = nullptr);

}  // namespace baton
