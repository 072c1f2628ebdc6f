// The moments of a batch of predictions: the posterior predictive p(c|x) = mean over samples of softmax(logits), its
// entropy, and the mutual information between the prediction and the weights, H[mean p] - mean H[p].
#pragma once
#include "engine/runtime.h"

namespace baton {

// Adds `samples` softmaxes to the running sums. logits [samples][batch][classes]; probability_sum [batch][classes] and
// entropy_sum [batch] are added to (+=), in the order of the samples.
void accumulate_predictions(float* probability_sum, float* entropy_sum, const float* logits, int samples, int batch,
                            int classes, Stream);

// Turns the sums over `samples` draws into means: probability [batch][classes], entropy of the mean [batch], mutual
// information [batch] (clipped at 0: it is non-negative but for rounding). Nats. In place is allowed for probability.
void finish_predictions(float* probability, float* entropy, float* mutual_information, const float* probability_sum,
                        const float* entropy_sum, int samples, int batch, int classes, Stream);

// The class that every sample chooses, the first of equals: chosen[chosen_stride * s + b]. logits
// [samples][batch][classes], at most 256 classes.
void choose_classes(uint8_t* chosen, size_t chosen_stride, const float* logits, int samples, int batch, int classes,
                    Stream);

}  // namespace baton
