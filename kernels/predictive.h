// The moments of a batch of predictions: the posterior predictive p(c|x) = mean over samples of softmax(logits), its
// entropy, and the mutual information between the prediction and the weights, H[mean p] - mean H[p]. The same split of
// variances (Kwon et al. 2020, traces): sum_c pbar_c (1 - pbar_c) = aleatoric 1 - mean_s sum_c p_sc^2, which data carry
// themselves, + epistemic mean_s sum_c p_sc^2 - sum_c pbar_c^2, which the weights' uncertainty adds.
#pragma once
#include "engine/runtime.h"

namespace baton {

// Adds `samples` softmaxes to the running sums. logits [samples][batch][classes]; probability_sum [batch][classes] and
// entropy_sum [batch] are added to (+=), in the order of the samples; square_sum [batch], sum_c p_c^2, too (it may be
// null).
void accumulate_predictions(float* probability_sum, float* entropy_sum, const float* logits, int samples, int batch,
                            int classes, Stream, float* square_sum = nullptr);

// Turns the sums over `samples` draws into means: probability [batch][classes], entropy of the mean [batch], mutual
// information [batch] (clipped at 0: it is non-negative but for rounding). Nats. In place is allowed for probability.
// variances, where not null, with square_sum: aleatoric [batch], then epistemic [batch] (clipped at 0).
void finish_predictions(float* probability, float* entropy, float* mutual_information, const float* probability_sum,
                        const float* entropy_sum, int samples, int batch, int classes, Stream,
                        float* variances = nullptr, const float* square_sum = nullptr);

// The class that every sample chooses, the first of equals: chosen[chosen_stride * s + b]. logits
// [samples][batch][classes], at most 256 classes.
void choose_classes(uint8_t* chosen, size_t chosen_stride, const float* logits, int samples, int batch, int classes,
                    Stream);

}  // namespace baton
