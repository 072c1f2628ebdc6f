// The moments of a batch of predictions: the posterior predictive p(c|x) = mean over samples of softmax(logits), its
// entropy, and the mutual information between the prediction and the weights, H[mean p] - mean H[p]. The variance
// sum_c pbar_c (1 - pbar_c) is split likewise (Kwon et al. 2020, traces): aleatoric, 1 - mean_s sum_c p_sc^2, is that
// of the data; epistemic, mean_s sum_c p_sc^2 - sum_c pbar_c^2, is what the weights' uncertainty adds.
#pragma once
#include "engine/runtime.h"

namespace baton {

// Adds `samples` softmaxes to the running sums, in the order of the samples. logits [samples][batch][classes];
// probability_sum [batch][classes], entropy_sum [batch], and square_sum [batch] of sum_c p_c^2 (may be null).
void accumulate_predictions(float* probability_sum, float* entropy_sum, const float* logits, int samples, int batch,
                            int classes, Stream, float* square_sum = nullptr);

// Turns the sums over `samples` draws into means: probability [batch][classes], entropy of the mean [batch], mutual
// information [batch] (rounding may make it negative; then it is 0). In nats. probability may be probability_sum.
// variances may be null; else it gets aleatoric [batch], then epistemic [batch] (at least 0), from square_sum.
void finish_predictions(float* probability, float* entropy, float* mutual_information, const float* probability_sum,
                        const float* entropy_sum, int samples, int batch, int classes, Stream,
                        float* variances = nullptr, const float* square_sum = nullptr);

// The class with the largest logit in every sample, the first of equals: chosen[chosen_stride * s + b]. logits
// [samples][batch][classes], at most 256 classes.
void choose_classes(uint8_t* chosen, size_t chosen_stride, const float* logits, int samples, int batch, int classes,
                    Stream);

}  // namespace baton
